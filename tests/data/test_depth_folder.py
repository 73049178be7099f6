"""Depth maps in files: pixel-exact round trips of every format, matching, resizing, broken files and bad input."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from blueberry_video.data.clip_cache import CachedClips
from blueberry_video.data.depth_folder import DepthFolder
from blueberry_video.data.depth_maps import DepthFormat, DepthSequence, read_format, read_stored
from blueberry_video.data.write import write_video

MILLIMETERS = {"kind": "depth", "unit": "mm", "invalid": 0}
FORMATS = ["png", "exr", "npz"]


def stored_map(seed: int = 0, size: tuple[int, int] = (12, 16)) -> np.ndarray:
    """uint16 values over the whole range, with 0, 1 and 65535."""
    values = np.random.default_rng(seed).integers(1, 65536, size).astype(np.uint16)
    values[0, :3] = 0, 1, 65535
    return values


def write_map(path: Path, values: np.ndarray, kind: str = "depth") -> Path:
    """Writes a map (H, W) in the format of the extension; .npz also (T, H, W)."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".png":
        Image.fromarray(values.astype(np.uint16)).save(path)
    elif path.suffix == ".npz":
        np.savez_compressed(path, **{kind: values})
    else:
        openexr = pytest.importorskip("OpenEXR", reason="EXR files need the extra exr")
        header = {"compression": openexr.ZIP_COMPRESSION, "type": openexr.scanlineimage}
        openexr.File(header, {"Z": values.astype(np.float32)}).write(str(path))
    return path


def sidecar(root: Path, content: dict | str = MILLIMETERS) -> Path:
    (root / "depth").mkdir(parents=True, exist_ok=True)
    text = content if isinstance(content, str) else json.dumps(content)
    (root / "depth" / "depth.json").write_text(text)
    return root


def picture(path: Path, size: tuple[int, int] = (12, 16), seed: int = 0) -> np.ndarray:
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 256, (*size, 3), np.uint8)
    Image.fromarray(pixels).save(path)
    return pixels


def pairs(root: Path, count: int = 4, suffix: str = "png") -> Path:
    """Images and maps with different values each."""
    for k in range(count):
        picture(root / "images" / f"{k}.png", seed=k)
        write_map(root / "depth" / f"{k}.{suffix}", stored_map(k))
    return sidecar(root)


def test_without_antialias_colors_are_plain_bilinear_and_maps_keep_their_pixels(tmp_path: Path):
    pixels = picture(tmp_path / "images" / "0.png", (48, 96))
    write_map(tmp_path / "depth" / "0.png", stored_map(0, (48, 96)))
    sidecar(tmp_path)
    plain, smooth = (DepthFolder(tmp_path, 16, antialias=choice) for choice in (False, True))
    cut = torch.from_numpy(pixels[1::3, 1::3][:, 8:24]).permute(2, 0, 1).float()  # the centers of 3 x 3 pixels
    assert (plain[0]["video"][0].float() - cut).abs().max() <= 1
    assert (smooth[0]["video"][0].float() - cut).abs().mean() > 10
    assert torch.equal(plain[0]["depth"], smooth[0]["depth"])
    assert plain.cache_key != smooth.cache_key


# ---- values ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", FORMATS)
def test_maps_of_every_format_are_pixel_exact(tmp_path: Path, suffix: str):
    folder = DepthFolder(pairs(tmp_path, suffix=suffix), image_size=None, max_broken_share=0)
    item = folder[2]
    stored = stored_map(2)
    np.testing.assert_array_equal(read_stored(tmp_path / "depth" / f"2.{suffix}"), stored)
    assert set(item) == {"video", "depth", "id"}
    assert item["id"] == "2.png"
    assert (item["video"].dtype, item["depth"].dtype) == (torch.uint8, torch.float32)
    np.testing.assert_array_equal(item["video"][0].permute(1, 2, 0).numpy(), picture(tmp_path / "x.png", seed=2))
    np.testing.assert_array_equal(item["depth"][0].numpy(), (stored * 0.001).astype(np.float32))
    assert item["depth"][0, 0, 0] == 0


@pytest.mark.parametrize("suffix", ["exr", "npz"])
def test_floats_are_exact_and_what_is_not_finite_is_invalid(tmp_path: Path, suffix: str):
    values = np.array([[0.1, 1e-7, 1e6], [np.nan, np.inf, -1.0], [-0.0, 3.0, -np.inf]], np.float32)
    path = write_map(tmp_path / f"a.{suffix}", values)
    [depth] = DepthSequence(path, DepthFormat("depth", "m")).read([0]).numpy()
    np.testing.assert_array_equal(depth, np.where(np.isfinite(values) & (values > 0), values, 0))
    path = write_map(tmp_path / f"b.{suffix}", values, "disparity")
    [disparity] = DepthSequence(path, DepthFormat("disparity")).read([0]).numpy()
    np.testing.assert_array_equal(disparity, np.where(np.isfinite(values), values, np.nan))


def test_scale_offset_unit_and_invalid_value():
    stored = np.array([[0, 10, 999, 65535]], np.uint16)
    depth = DepthFormat("depth", "cm", scale=2.0, offset=5.0, invalid=65535).values(stored)
    torch.testing.assert_close(depth, torch.tensor([[0.05, 0.25, 20.03, 0.0]]))
    disparity = DepthFormat("disparity", scale=-0.5, offset=1.0, invalid=10).values(stored)
    torch.testing.assert_close(disparity, torch.tensor([[1.0, torch.nan, -498.5, -32766.5]]), equal_nan=True)
    everything = DepthFormat("depth", "m", offset=-10.0, invalid="nan").values(stored)
    assert everything.tolist() == [[0, 0, 989, 65525]]
    sentinel = np.array([[-9999.9, 2.0]], np.float32)  # compared in the precision of the file
    assert DepthFormat("disparity", invalid=-9999.9).values(sentinel).isnan().tolist() == [[True, False]]


@pytest.mark.parametrize(("channels", "expected"), [("ZYR", 3.0), ("RY", 2.0), ("RG", 1.0)])
def test_channel_of_an_exr_file(tmp_path: Path, channels: str, expected: float):
    openexr = pytest.importorskip("OpenEXR", reason="EXR files need the extra exr")
    values = {"R": 1.0, "Y": 2.0, "Z": 3.0, "G": 4.0}
    maps = {name: np.full((2, 3), values[name], np.float32) for name in channels}
    openexr.File({"type": openexr.scanlineimage}, maps).write(str(tmp_path / "a.exr"))
    assert (read_stored(tmp_path / "a.exr") == expected).all()
    openexr.File({"type": openexr.scanlineimage}, {"A": maps["R"]}).write(str(tmp_path / "b.exr"))
    with pytest.raises(ValueError, match=r"b\.exr.*\bA\b"):
        read_stored(tmp_path / "b.exr")


# ---- resizing --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("resize", ["crop", "stretch"])
def test_maps_take_the_pixels_of_the_resized_image(tmp_path: Path, resize: str):
    """Red and depth are the same ramp, so that a different crop or offset shows."""
    rows, columns = np.mgrid[0:24, 0:36]
    ramp = (5 * columns + rows).astype(np.uint8)
    (tmp_path / "images").mkdir()
    Image.fromarray(np.stack([ramp] * 3, axis=2)).save(tmp_path / "images" / "a.png")
    write_map(sidecar(tmp_path) / "depth" / "a.png", ramp.astype(np.uint16) * 100 + 100)
    item = DepthFolder(tmp_path, (8, 8), resize=resize)[0]
    difference = item["video"][0, 0].float() + 1 - item["depth"][0] * 10
    assert item["depth"].shape == (1, 8, 8)
    assert difference.abs().max() <= 3.5  # half a source pixel of a ramp of 5 per column
    assert difference.mean().abs() <= 3


def test_resizing_never_mixes_values(tmp_path: Path):
    picture(tmp_path / "images" / "a.png", (50, 70))
    values = np.random.default_rng(0).choice(np.array([0, 1000, 60000], np.uint16), (50, 70))
    write_map(sidecar(tmp_path) / "depth" / "a.png", values)
    for size in ((14, 14), (90, 33)):
        depth = DepthFolder(tmp_path, size)[0]["depth"]
        assert depth.shape[1:] == size
        assert depth.unique().tolist() == [0, 1, 60]


# ---- videos ----------------------------------------------------------------------------------------------------------


def frames_folder(root: Path, name: str, frames: int = 11) -> None:
    """Frame k is gray 20 · k, and its depth k + 1 m; names without leading zeros."""
    for k in range(frames):
        path = root / "videos" / name / f"f{k}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (16, 12), (20 * k,) * 3).save(path)


def maps_of_frames(frames: int = 11) -> np.ndarray:
    return np.stack([np.full((12, 16), k + 1, np.float32) for k in range(frames)])


@pytest.mark.parametrize("form", ["folder of png", "one npz", "folder of npz"])
def test_frames_and_maps_of_a_sequence_belong_together(tmp_path: Path, form: str):
    frames_folder(tmp_path, "walk")
    maps = maps_of_frames()
    if form == "one npz":
        write_map(tmp_path / "depth" / "walk.npz", maps)
    elif form == "folder of npz":
        for start in (0, 4, 8):
            write_map(tmp_path / "depth" / "walk" / f"{start}.npz", maps[start : start + 4])
    else:
        for k, each in enumerate(maps):
            write_map(tmp_path / "depth" / "walk" / f"f{k}.png", each.astype(np.uint16))
    sidecar(tmp_path, {"kind": "depth", "unit": "m", "invalid": 0})
    clip = DepthFolder(tmp_path, None, num_frames=5)[0]
    assert clip["id"] == "walk"
    shown = clip["video"][:, 0, 0, 0] // 20
    assert (len(shown), shown.diff().min() > 0) == (5, True)
    assert clip["depth"][:, 3, 3].tolist() == (shown + 1).tolist()
    windows = DepthFolder(tmp_path, None, num_frames=3, sampler="random", stride=2)
    clips = [windows.sample(0, epoch) for epoch in range(8)]
    assert len({int(each["video"][0, 0, 0, 0]) for each in clips}) > 1
    for each in clips:
        assert each["depth"][:, 0, 0].tolist() == (each["video"][:, 0, 0, 0] // 20 + 1).tolist()


def test_too_few_frames_raise_or_are_padded(tmp_path: Path):
    frames_folder(tmp_path, "walk", 3)
    write_map(tmp_path / "depth" / "walk.npz", maps_of_frames(3))
    sidecar(tmp_path, {"kind": "depth", "unit": "m"})
    with pytest.raises(ValueError, match=r"videos/walk.*num_frames=5\b.*has 3\b.*data\.train\.pad=true"):
        DepthFolder(tmp_path, None, num_frames=5, sampler="random")[0]
    clip = DepthFolder(tmp_path, None, num_frames=5, sampler="random", pad=True)[0]
    assert clip["depth"][:, 0, 0].tolist() == [1, 2, 3, 3, 3]


def test_a_video_file_with_disparity(tmp_path: Path):
    (tmp_path / "train" / "videos").mkdir(parents=True)
    levels = torch.arange(6, dtype=torch.uint8)[:, None, None, None] * 40
    write_video(tmp_path / "train" / "videos" / "a.mp4", levels.expand(6, 12, 16, 3).numpy(), 8.0)
    write_map(tmp_path / "train" / "depth" / "a.npz", maps_of_frames(6), "disparity")
    sidecar(tmp_path / "train", {"kind": "disparity", "unit": None})
    clip = DepthFolder(tmp_path, 8, num_frames=3, split="train")[0]
    assert clip["id"] == "a.mp4"
    assert set(clip) == {"video", "disparity", "id"}
    shown = (clip["video"][:, 0].float().mean((1, 2)) / 40).round()
    assert clip["disparity"][:, 4, 4].tolist() == (shown + 1).tolist()
    write_map(tmp_path / "train" / "depth" / "a.npz", maps_of_frames(5), "disparity")
    with pytest.raises(ValueError, match=r"6 frames.*5 maps"):
        DepthFolder(tmp_path, 8, num_frames=3, split="train")[0]


# ---- broken files and bad input --------------------------------------------------------------------------------------


@pytest.mark.parametrize("broken", ["invalid", "truncated map", "truncated image", "vanished"])
def test_broken_pairs_are_replaced_and_listed(tmp_path: Path, broken: str):
    pairs(tmp_path)
    folder = DepthFolder(tmp_path, None, max_broken_share=0.25, skipped_file=str(tmp_path / "skipped.csv"))
    path = tmp_path / ("images" if broken == "truncated image" else "depth") / "1.png"
    if broken == "invalid":
        write_map(path, np.zeros((12, 16), np.uint16))
    elif broken == "vanished":
        path.unlink()
    else:
        path.write_bytes(path.read_bytes()[:60])
    assert folder[1]["id"] == "2.png"
    assert list(folder.skipped) == ["1.png"]
    assert "1.png" in (tmp_path / "skipped.csv").read_text()
    write_map(tmp_path / "depth" / "3.png", np.zeros((12, 16), np.uint16))
    with pytest.raises(RuntimeError, match=r"2 of 4\b.*max_broken_share=0\.25"):
        folder[3]


def test_invalid_everywhere_after_the_crop_is_skipped_too(tmp_path: Path):
    values = np.ones((12, 36), np.uint16)
    values[:, 10:26] = 0
    for name in "ab":
        picture(tmp_path / "images" / f"{name}.png", (12, 36))
        write_map(tmp_path / "depth" / f"{name}.png", values if name == "a" else np.ones((12, 36)))
    folder = DepthFolder(sidecar(tmp_path), 12, max_broken_share=0.5)
    assert folder[0]["id"] == "b.png"


def break_size(root: Path) -> None:
    write_map(root / "depth" / "0.png", stored_map(size=(16, 12)))


def break_bits(root: Path) -> None:
    Image.fromarray(np.ones((12, 16), np.uint8)).save(root / "depth" / "0.png")


def break_array(root: Path) -> None:
    (root / "depth" / "0.png").unlink()
    write_map(root / "depth" / "0.npz", stored_map(), "z")


@pytest.mark.parametrize(
    ("damage", "error", "match"),
    [
        (break_size, ValueError, r"0\.png.*\(12, 16\).*\(16, 12\)"),
        (break_bits, ValueError, r"0\.png.*mode=L\b.*16-bit"),
        (break_array, ValueError, r"0\.npz.*\bz\b.*kind='depth'"),
        (lambda root: (root / "depth" / "0.png").unlink(), FileNotFoundError, r"'0\.png'.*depth/0\.png"),
        (lambda root: (root / "images" / "0.png").unlink(), FileNotFoundError, r"depth/0\.png.*images"),
        (lambda root: write_map(root / "depth" / "0.npz", stored_map()), ValueError, r"'0\.png'.*0\.npz.*0\.png"),
        (lambda root: picture(root / "images" / "0.jpg"), ValueError, r"'0\.jpg'.*'0\.png'.*rename"),
        (lambda root: (root / "videos").mkdir(), ValueError, r"images/ and videos/.*Mixture"),
        (lambda root: (root / "depth" / "depth.json").unlink(), FileNotFoundError, r'depth\.json.*"kind"'),
        (lambda root: sidecar(root, "{"), ValueError, r"depth\.json.*JSON"),
        (lambda root: sidecar(root, {"unit": "m"}), ValueError, r"depth\.json.*\bkind\b"),
        (lambda root: sidecar(root, {"kind": "z"}), ValueError, r"depth\.json.*kind='z'"),
        (lambda root: sidecar(root, {"kind": "depth"}), ValueError, r"unit=None.*'mm'"),
        (lambda root: sidecar(root, {"kind": "depth", "unit": "ft"}), ValueError, r"unit='ft'.*'mm'"),
        (lambda root: sidecar(root, {"kind": "disparity", "unit": "m"}), ValueError, r"unit='m'.*null"),
        (lambda root: sidecar(root, {**MILLIMETERS, "Scale": 2}), ValueError, r"depth\.json.*'Scale'.*'scale'"),
        (lambda root: sidecar(root, {"kind": "depth", "units": "m"}), ValueError, r"depth\.json.*'units'.*'unit'"),
        (lambda root: sidecar(root, {**MILLIMETERS, "scale": 0}), ValueError, r"scale=0\b"),
        (lambda root: sidecar(root, {**MILLIMETERS, "offset": "1"}), ValueError, r"offset='1'"),
        (lambda root: sidecar(root, {**MILLIMETERS, "invalid": "no"}), ValueError, r"invalid='no'"),
    ],
)
def test_bad_input_raises(tmp_path: Path, damage, error: type[Exception], match: str):
    damage(pairs(tmp_path))
    with pytest.raises(error, match=match):
        DepthFolder(tmp_path, None, max_broken_share=0.9)[0]


@pytest.mark.parametrize(
    ("arguments", "error", "match"),
    [
        ({"num_frames": 2}, ValueError, r"num_frames=2\b.*images"),
        ({"num_frames": 0}, ValueError, r"num_frames=0\b"),
        ({"image_size": 0}, ValueError, r"image_size=0\b"),
        ({"split": "val"}, FileNotFoundError, r"split='val'"),
        ({"stride": 2}, ValueError, r"stride=2\b.*random"),
    ],
)
def test_bad_arguments_raise(tmp_path: Path, arguments: dict, error: type[Exception], match: str):
    with pytest.raises(error, match=match):
        DepthFolder(pairs(tmp_path), **{"image_size": 8, **arguments})


def test_exr_without_the_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "a.exr").write_bytes(b"")
    monkeypatch.setitem(sys.modules, "OpenEXR", None)
    with pytest.raises(ImportError, match=r"OpenEXR.*pip install -e .*\[exr\]"):
        read_stored(tmp_path / "a.exr")


def test_sub_folders_and_the_cache(tmp_path: Path):
    for name in ("a/x", "b/x"):
        picture(tmp_path / "images" / f"{name}.png", seed=len(name))
        write_map(tmp_path / "depth" / f"{name}.npz", stored_map(ord(name[0])))
    folder = DepthFolder(sidecar(tmp_path), (8, 8))
    assert read_format(tmp_path / "depth") == folder.format == DepthFormat("depth", "mm", invalid=0)
    cached = CachedClips(folder, tmp_path / "cache")
    for index, name in enumerate(("a/x.png", "b/x.png")):
        assert folder[index]["id"] == cached[index]["id"] == name
        torch.testing.assert_close(cached[index]["depth"], folder[index]["depth"], rtol=0, atol=0)
    before = folder.cache_key
    write_map(tmp_path / "depth" / "a" / "x.npz", stored_map(99))
    assert DepthFolder(tmp_path, (8, 8)).cache_key != before
    with pytest.raises(IndexError):
        folder[2]
