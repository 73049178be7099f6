"""Tone mapping of PQ and HLG video: the formulas in float64, known values, FFmpeg's tonemap, names in the metadata."""

import shutil
import subprocess
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch

from blueberry_video.video import decode as decoding
from blueberry_video.video import process_video
from blueberry_video.video.container import probe
from blueberry_video.video.decode import DecodeOptions, decode
from blueberry_video.video.errors import BrokenVideoError
from blueberry_video.video.hdr import (
    ToneMap,
    bt2390,
    hable,
    hlg_to_luminance,
    hlg_to_scene,
    luminance_to_pq,
    pq_to_luminance,
    to_bt709,
)

needs_ffmpeg = pytest.mark.skipif(
    shutil.which("ffmpeg") is None, reason="the files are written by ffmpeg, which is not installed"
)
SIDE = 128  # of 8 x 8 patches
TRANSFERS = {"pq": "smpte2084", "hlg": "arib-std-b67"}
STRICT = DecodeOptions(salvage=False)


def f64(*values: float) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)


def patches(saturation: int) -> np.ndarray:
    """Codes of 10 bits (3, 8, 8) of Y'CbCr of limited range."""
    rng = np.random.default_rng(saturation)
    chroma = 512 + rng.integers(-saturation, saturation + 1, (2, 8, 8))
    return np.concatenate([rng.integers(64, 900, (1, 8, 8)), chroma])


def write(path: Path, codes: np.ndarray, hdr: str, pixel_format: str = "yuv444p10le", **tags: str) -> Path:
    """Writes one lossless frame; the color tags are those of the container."""
    size = SIDE // codes.shape[1], SIDE // codes.shape[2]
    frame = np.repeat(np.repeat(codes, size[0], axis=1), size[1], axis=2).astype("<u2")
    names = {"color_primaries": "bt2020", "color_trc": TRANSFERS[hdr], "colorspace": "bt2020nc", "color_range": "tv"}
    options = [word for name, value in (names | tags).items() for word in (f"-{name}", value)]
    read = ["-f", "rawvideo", "-pix_fmt", pixel_format, "-s", f"{SIDE}x{SIDE}", "-r", "10", *options, "-i", "-"]
    command = ["ffmpeg", "-v", "error", "-y", *read, "-c:v", "ffv1", *options, str(path)]
    subprocess.run(command, input=frame.tobytes(), check=True)
    return path


def centers(pixels: torch.Tensor) -> np.ndarray:
    """Levels (3, 8, 8) of the patches."""
    return pixels[0, :, 8::16, 8::16].numpy().astype(np.float64)


def expected(codes: np.ndarray, hdr: str, peak: float, curve: str) -> np.ndarray:
    """The levels (3, 8, 8), before rounding, by the formulas of BT.2100, BT.2390, BT.1886 and Hable's curve."""
    y, cb, cr = (codes[0] - 64) / 876, (codes[1] - 512) / 896, (codes[2] - 512) / 896
    red, blue = y + 1.4746 * cr, y + 1.8814 * cb
    signal = np.clip(np.stack([red, (y - 0.2627 * red - 0.0593 * blue) / 0.6780, blue]), 0, 1)
    m1, m2, c1, c2, c3 = 0.1593017578125, 78.84375, 0.8359375, 18.8515625, 18.6875

    def eotf(e):
        return 10000 * (np.maximum(e ** (1 / m2) - c1, 0) / (c2 - c3 * e ** (1 / m2))) ** (1 / m1)

    def inverse(light):
        return ((c1 + c2 * (light / 10000) ** m1) / (1 + c3 * (light / 10000) ** m1)) ** m2

    if hdr == "pq":
        light = eotf(signal)
    else:
        a, b, c = 0.17883277, 0.28466892, 0.55991073
        scene = np.where(signal <= 0.5, signal**2 / 3, (np.exp((signal - c) / a) + b) / 12)
        light = 1000 * (0.2627 * scene[0] + 0.6780 * scene[1] + 0.0593 * scene[2]) ** 0.2 * scene
    to_709 = [[1.660491, -0.587641, -0.072850], [-0.124550, 1.132900, -0.008349], [-0.018151, -0.100579, 1.118730]]
    linear = np.einsum("ij,jhw->ihw", to_709, light)  # BT.2087
    brightest = np.maximum(linear.max(axis=0), 1e-6)
    level = np.minimum(brightest, peak)
    if curve == "hable":

        def filmic(x):
            return (x * (0.15 * x + 0.10 * 0.50) + 0.20 * 0.02) / (x * (0.15 * x + 0.50) + 0.20 * 0.30) - 0.02 / 0.30

        mapped = 100 * filmic(level / 100) / filmic(peak / 100)
    else:
        most = inverse(100.0) / inverse(peak)
        knee, e1 = 1.5 * most - 0.5, inverse(level) / inverse(peak)
        t = (e1 - knee) / (1 - knee)
        spline = (2 * t**3 - 3 * t**2 + 1) * knee + (t**3 - 2 * t**2 + t) * (1 - knee) + (-2 * t**3 + 3 * t**2) * most
        mapped = eotf(np.where(e1 < knee, e1, spline) * inverse(peak))
    return np.clip(linear * mapped / brightest / 100, 0, 1) ** (1 / 2.4) * 255


def test_pq_has_the_published_values():
    # BT.2408-7, table 1: 203 cd/m² is 58 %; BT.2390: 100 cd/m² is 50.81 %, 1000 cd/m² is 75.18 %
    torch.testing.assert_close(luminance_to_pq(f64(100, 203, 1000)), f64(0.5081, 0.5807, 0.7518), atol=1e-4, rtol=0)
    torch.testing.assert_close(pq_to_luminance(f64(0, 1)), f64(0, 10_000))
    light = torch.logspace(-3, 4, 50, dtype=torch.float64)
    torch.testing.assert_close(pq_to_luminance(luminance_to_pq(light)), light, rtol=1e-9, atol=0)


def test_hlg_has_the_published_values():
    # BT.2100 table 5: the signal 0.5 is 1/12 of scene light; BT.2408-7: 75 % is 203 cd/m² on a display of 1000 cd/m²
    torch.testing.assert_close(hlg_to_scene(f64(0, 0.5, 1)), f64(0, 1 / 12, 1), atol=1e-7, rtol=0)
    gray = hlg_to_luminance(hlg_to_scene(f64(0.75, 0.75, 0.75, 1, 1, 1).view(2, 3)))
    torch.testing.assert_close(gray, f64(203, 203, 203, 1000, 1000, 1000).view(2, 3), rtol=2e-3, atol=0)


@pytest.mark.parametrize("peak", [100.0, 400.0, 1000.0, 10_000.0])
def test_curves_map_the_peak_to_white_and_rise(peak: float):
    light = torch.linspace(0, peak, 1001, dtype=torch.float64)
    for curve in (bt2390, hable):
        mapped = curve(light, peak)
        assert mapped[0].abs() < 1e-9
        assert mapped[-1] == pytest.approx(100, abs=1e-6)
        assert (mapped.diff() >= -1e-9).all()
    knee = float(pq_to_luminance(1.5 * luminance_to_pq(f64(100)) - 0.5 * luminance_to_pq(f64(peak))))
    dark = light[light < knee]
    torch.testing.assert_close(bt2390(dark, peak), dark)  # unchanged below the knee


def test_the_matrix_of_bt2020_is_that_of_bt2087():
    published = [[1.6605, -0.5876, -0.0728], [-0.1246, 1.1329, -0.0083], [-0.0182, -0.1006, 1.1187]]
    torch.testing.assert_close(to_bt709("bt2020"), torch.tensor(published, dtype=torch.float64), atol=1e-4, rtol=0)
    torch.testing.assert_close(to_bt709("bt709"), torch.eye(3, dtype=torch.float64))
    torch.testing.assert_close(to_bt709("smpte432").sum(dim=1), torch.ones(3, dtype=torch.float64))  # white stays


def test_unknown_primaries_and_curves_raise():
    with pytest.raises(ValueError, match="smpte431"):
        ToneMap("bt2390", "pq", "smpte431", 1000.0)
    with pytest.raises(ValueError, match="tone_map='reinhard'"):
        DecodeOptions(tone_map="reinhard")


@needs_ffmpeg
@pytest.mark.parametrize("saturation", [0, 40, 300])  # 300: far outside of BT.709
@pytest.mark.parametrize("curve", ["bt2390", "hable"])
@pytest.mark.parametrize("hdr", TRANSFERS)
def test_every_patch_equals_the_formulas(tmp_path: Path, hdr: str, curve: str, saturation: int):
    path = write(tmp_path / "a.mkv", codes := patches(saturation), hdr)
    found = decode(path, [0], DecodeOptions(salvage=False, tone_map=curve))
    difference = np.abs(centers(found.pixels) - expected(codes, hdr, probe(path).picture.peak, curve))
    assert difference.max() < 0.55  # rounding to 8 bits, and float32


@needs_ffmpeg
@pytest.mark.parametrize(
    ("pixel_format", "tags"),
    [("gbrp10le", {"colorspace": "rgb", "color_range": "pc"}), ("yuv444p10le", {"color_range": "pc"})],
)
def test_full_range_and_rgb_reach_white(tmp_path: Path, pixel_format: str, tags: dict[str, str]):
    row = np.repeat(np.array([0, 200, 400, 520, 600, 769, 900, 1023])[None], 8, axis=0)
    codes = np.stack([row] * 3 if pixel_format == "gbrp10le" else [row, np.full_like(row, 512), np.full_like(row, 512)])
    path = write(tmp_path / "a.mkv", codes, "pq", pixel_format, **tags)
    light = bt2390(pq_to_luminance(torch.from_numpy(row / 1023)), 10_000.0)
    levels = ((light / 100) ** (1 / 2.4) * 255).numpy()
    found = centers(decode(path, [0], DecodeOptions(salvage=False, tone_map="bt2390")).pixels)
    assert np.abs(found - levels).max() < 0.55


@needs_ffmpeg
@pytest.mark.parametrize(("hdr", "saturation"), [("pq", 0), ("pq", 20), ("hlg", 0)])
def test_hable_equals_the_ffmpeg_program(tmp_path: Path, hdr: str, saturation: int):
    # zscale's HLG scales each component by itself, not by luminance as BT.2100: compared on gray only
    filters = subprocess.run(["ffmpeg", "-v", "error", "-filters"], capture_output=True, text=True, check=True).stdout
    if " zscale " not in filters:
        pytest.skip("this ffmpeg has no zscale filter")
    path = write(tmp_path / "a.mkv", patches(saturation), hdr)
    peak = probe(path).picture.peak / 100
    chain = "zscale=t=linear:npl=100,format=gbrpf32le,zscale=p=bt709"
    chain = f"{chain},tonemap=tonemap=hable:desat=0:peak={peak},zscale=t=bt709"
    command = ["ffmpeg", "-v", "error", "-i", str(path), "-vf", chain, "-f", "rawvideo", "-pix_fmt", "gbrpf32le", "-"]
    raw = np.frombuffer(subprocess.run(command, capture_output=True, check=True).stdout, np.float32)
    peer = raw.reshape(3, SIDE, SIDE)[[2, 0, 1], 8::16, 8::16].clip(0, 1) * 255
    found = centers(decode(path, [0], DecodeOptions(salvage=False, tone_map="hable")).pixels)
    assert np.abs(found - peer).max() < 0.55


@needs_ffmpeg
def test_frames_of_ten_bits_are_tone_mapped_from_ten_bits(tmp_path: Path):
    # two grays that are equal in 8 bits: their light differs
    codes = np.full((3, 8, 8), 512)
    codes[0] = 512 + np.arange(8)
    path = write(tmp_path / "a.mkv", codes, "pq", color_range="tv")
    light = centers(decode(path, [0], DecodeOptions(tone_map="bt2390", salvage=False)).pixels)[0, 0]
    assert np.abs(light - expected(codes, "pq", 10_000.0, "bt2390")[0, 0]).max() < 0.55


@needs_ffmpeg
@pytest.mark.parametrize(
    ("metadata", "peak"),
    [
        (":max-cll=800,300:master-display=G(13250,34500)B(7500,3000)R(34000,16000)WP(15635,16450)L(40000000,1)", 800.0),
        (":master-display=G(13250,34500)B(7500,3000)R(34000,16000)WP(15635,16450)L(40000000,1)", 4000.0),
        ("", 10_000.0),
    ],
    ids=["MaxCLL", "mastering display", "none"],
)
def test_the_metadata_names_hdr_and_its_peak(tmp_path: Path, metadata: str, peak: float):
    path = tmp_path / "a.mp4"
    color = ["-color_primaries", "bt2020", "-color_trc", "smpte2084", "-colorspace", "bt2020nc"]
    source = ["-f", "lavfi", "-i", "testsrc2=size=128x96:rate=10:duration=1"]
    codec = ["-pix_fmt", "yuv420p10le", "-c:v", "libx265", "-x265-params", f"log-level=none{metadata}"]
    subprocess.run(["ffmpeg", "-v", "error", *source, *codec, *color, str(path)], check=True)
    info = probe(path).picture
    assert (info.hdr, info.primaries, info.peak) == ("pq", "bt2020", peak)
    video = process_video(path, num_frames=4, tone_map="bt2390")
    assert (video.metadata.hdr, video.metadata.primaries) == ("pq", "bt2020")
    assert video.metadata.backend == "pyav"


@needs_ffmpeg
def test_hdr_that_is_not_mapped_warns_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(decoding, "_WARNED", set())
    paths = [write(tmp_path / f"{i}.mkv", patches(0), "hlg") for i in range(2)]
    with pytest.warns(UserWarning, match="tone_map") as caught:
        _ = [decode(path, [0], STRICT) for path in paths]
    assert len(caught) == 1
    assert "hlg" in str(caught[0].message)
    monkeypatch.setattr(decoding, "_WARNED", set())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        decode(paths[0], [0], DecodeOptions(tone_map="hable", salvage=False))


@needs_ffmpeg
def test_a_backend_that_cannot_map_tones_is_replaced(tmp_path: Path):
    path = write(tmp_path / "a.mkv", patches(40), "pq")
    found = decode(path, [0], DecodeOptions(("torchcodec",), tone_map="bt2390"))
    assert found.backend == "pyav"
    assert list(found.failures) == ["torchcodec"]
    assert torch.equal(found.pixels, decode(path, [0], DecodeOptions(tone_map="bt2390")).pixels)


@needs_ffmpeg
def test_constant_luminance_raises(tmp_path: Path):
    path = write(tmp_path / "a.mkv", patches(40), "pq", colorspace="bt2020c")
    with pytest.raises(BrokenVideoError, match="tone_map"):
        decode(path, [0], DecodeOptions(tone_map="bt2390"))
