"""Depth of videos from the command line and from Python: runs, published weights, kills, broken and unusual videos."""

import hashlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from blueberry_video import depth as entry
from blueberry_video import export, train
from blueberry_video.config import compose
from blueberry_video.data.write import write_video
from blueberry_video.depth import estimate_depth, open_model
from blueberry_video.inference.depth import depth_maps
from blueberry_video.models.depth_anything import DepthAnything, VideoDepthAnything
from blueberry_video.models.dinov2 import DINOv2
from blueberry_video.video import load_clip
from blueberry_video.video.sampling import SamplingOptions

SRC = Path(__file__).resolve().parents[1] / "src"
RUN = """
defaults:
  - train
  - override model: video_depth_anything/tiny_scan
  - override task: depth_video
  - override data: world_depth
  - _self_
name: depth
model:
  encoder: {image_size: 16, num_frames: 3, embed_dim: 12, depth: 4, num_heads: 2}
  features: 8
  out_channels: [8, 8, 8, 8]
  norm_groups: 4
  scan_head_dim: 4
  scan_state_dim: 2
data: {batch_size: 2, train: {dataset: {size: 4}}, val: {dataset: {size: 2}}}
"""


def built(kind: type, **options) -> torch.nn.Module:
    torch.manual_seed(0)
    encoder = DINOv2(image_size=28, num_frames=1, patch_size=14, embed_dim=384, depth=4, num_heads=6)
    return kind(encoder, (0, 1, 2, 3), 32, (8, 8, 32, 32), **options).eval()


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Runs of a video model with a scan: clips of 3 frames of 16 x 16 pixels."""
    folder = tmp_path_factory.mktemp("depth")
    (folder / "depth").mkdir()
    (folder / "depth/config.yaml").write_text(RUN)
    words = [
        "logger=csv",
        "callbacks.progress=null",
        "callbacks.media=null",
        "schedule=constant",
        "trainer.max_steps=2",
    ]
    words += [f"data.{split}.folder={folder / 'cache'}" for split in ("train", "val")]
    words += [f"output_dir={folder / 'outputs'}", "+task.input.mean=[0.4,0.5,0.6]", "+task.input.std=[0.2,0.2,0.3]"]
    train.run(compose(folder / "depth/config.yaml", words))
    torch.use_deterministic_algorithms(False)
    return folder / "outputs" / "depth"


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a published image model."""
    folder = tmp_path_factory.mktemp("published") / "model"
    encoder = DINOv2(
        image_size=28, num_frames=1, patch_size=14, embed_dim=384, depth=4, num_heads=6, interpolate_offset=0.0
    )
    DepthAnything(encoder, (0, 1, 2, 3), 32, (8, 8, 32, 32)).save_published(folder)
    return folder


def video(folder: Path, frames: int = 5, height: int = 24, width: int = 32) -> Path:
    pixels = np.random.default_rng(0).integers(0, 256, (frames, height, width, 3), dtype=np.uint8)
    write_video(folder / "clip.mp4", pixels, 8.0)
    return folder / "clip.mp4"


def maps_of(out: Path, kind: str = "disparity") -> np.ndarray:
    return np.concatenate([np.load(file)[kind] for file in sorted((out / "npz").glob("*.npz"))])


def files(folder: Path) -> dict[str, str]:
    found = sorted(path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in found}


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    def call(*arguments: object) -> None:
        monkeypatch.setattr(sys, "argv", ["depth", *map(str, arguments)])
        entry.main()

    return call


def test_a_run_with_its_own_normalization(run: Path, tmp_path: Path, command: Callable[..., None]) -> None:
    clip, out = video(tmp_path, 12), tmp_path / "out"
    command(clip, "--out", out, "--weights", run, "--format", "npz,mp4")
    opened = open_model(run)
    assert opened.mean == pytest.approx([0.4, 0.5, 0.6])
    pixels = load_clip(clip, SamplingOptions(sampling="all", frame_factor=1)).pixels
    frames = (pixels.float() / 255).transpose(0, 1)[None]
    frames = torch.stack(
        [torch.nn.functional.interpolate(each, (16, 24), mode="bicubic") for each in frames.unbind(2)], 2
    )
    normal = (frames - torch.tensor(opened.mean).view(3, 1, 1, 1)) / torch.tensor(opened.std).view(3, 1, 1, 1)
    with torch.no_grad():
        expected = opened.model(normal)[0]
    expected = torch.nn.functional.interpolate(expected[:, None], (24, 32), mode="bilinear", align_corners=True)[:, 0]
    torch.testing.assert_close(torch.from_numpy(maps_of(out)), expected, rtol=1e-4, atol=1e-5)
    about = json.loads((out / "depth.json").read_text())
    assert (about["kind"], about["unit"], about["frames"], about["fps"]) == ("disparity", None, 12, 8.0)
    assert (about["mode"], about["input_size"]) == ("auto", 16)


def test_published_weights_of_images_and_videos(published: Path, tmp_path: Path) -> None:
    clip = video(tmp_path)
    about = estimate_depth(clip, tmp_path / "image", published, ["npz"], input_size=28)
    assert (about["frames"], about["kind"]) == (5, "disparity")
    pixels = load_clip(clip, SamplingOptions(sampling="all", frame_factor=1)).pixels
    expected = torch.stack(list(depth_maps(open_model(published).model, pixels, 28)))
    torch.testing.assert_close(torch.from_numpy(maps_of(tmp_path / "image")), expected)
    model = built(VideoDepthAnything, max_depth=20.0, temporal="attention")
    model.save_published(tmp_path / "video_model")
    about = estimate_depth(clip, tmp_path / "video", tmp_path / "video_model", ["npz", "png"], input_size=28)
    assert (about["kind"], about["unit"]) == ("depth", "m")
    assert 0 < maps_of(tmp_path / "video", "depth").min() < maps_of(tmp_path / "video", "depth").max() < 20


@pytest.mark.parametrize(("height", "width", "frames"), [(48, 16, 3), (22, 34, 1), (16, 64, 2)])
def test_portrait_small_wide_and_single_frame_videos(
    run: Path, tmp_path: Path, height: int, width: int, frames: int
) -> None:
    about = estimate_depth(video(tmp_path, frames, height, width), tmp_path / "out", run, ["npz", "mp4"])
    assert about["frames"] == frames
    assert maps_of(tmp_path / "out").shape == (frames, height, width)


@pytest.mark.slow
def test_a_command_killed_at_a_random_frame_continues_to_the_same_files(run: Path, tmp_path: Path) -> None:
    clip = video(tmp_path, 150)
    estimate_depth(clip, tmp_path / "whole", run, ["npz", "png"])
    words = [sys.executable, "-m", "blueberry_video.depth", clip, "--out", tmp_path / "killed", "--checkpoint", run]
    words = [str(word) for word in [*words, "--format", "npz,png"]]
    environment = {**os.environ, "PYTHONPATH": str(SRC), "OMP_NUM_THREADS": str(torch.get_num_threads())}
    process = subprocess.Popen(words, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    first = tmp_path / "killed/npz/depth_00001.npz"
    while not first.exists() and process.poll() is None:
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    process.wait()
    subprocess.run(words, env=environment, check=True, capture_output=True)
    assert files(tmp_path / "killed") == files(tmp_path / "whole")


def test_a_broken_video_is_written_up_to_the_damage_and_reported(
    run: Path, tmp_path: Path, command: Callable[..., None]
) -> None:
    import av

    whole, broken = video(tmp_path, 40), tmp_path / "broken.mkv"
    with av.open(str(whole)) as source, av.open(str(broken), "w") as target:
        copied = target.add_stream_from_template(source.streams.video[0])
        for packet in source.demux(video=0):
            if packet.dts is not None:
                packet.stream = copied
                target.mux(packet)
    data = bytearray(broken.read_bytes())
    data[len(data) // 2 : len(data) // 2 + 3000] = bytes(3000)
    broken.write_bytes(data)
    with pytest.raises(ValueError, match=r"broken\.mkv breaks after \d+ frames"):
        command(broken, "--out", tmp_path / "out", "--checkpoint", run, "--format", "npz")
    about = json.loads((tmp_path / "out/depth.json").read_text())
    assert 5 < about["frames"] < 40
    assert about["error"]
    estimate_depth(whole, tmp_path / "whole", run, ["npz"])
    assert np.array_equal(maps_of(tmp_path / "out"), maps_of(tmp_path / "whole")[: about["frames"]])


def test_wrong_arguments_raise_before_anything_is_written(run: Path, published: Path, tmp_path: Path) -> None:
    clip, out = video(tmp_path), tmp_path / "out"
    for error, match, arguments in (
        (FileNotFoundError, r"video=.*none\.mp4", (tmp_path / "none.mp4", out, run)),
        (FileNotFoundError, r"nothing", (clip, out, tmp_path / "nothing")),
        (ValueError, r"mode='windws'.*windows", (clip, out, run, ["npz"], "windws")),
        (ValueError, r"mode='stream'.*frames", (clip, out, published, ["npz"], "stream")),
        (ValueError, r"formats=\['gif'\].*png", (clip, out, run, ["gif"])),
        (ValueError, r"input_size=3\b.*8", (clip, out, run, ["npz"], "auto", 4, 3)),
        (ValueError, r"range=\[2.0, 1.0\]", (clip, out, run, ["png"], "auto", 4, None, (2.0, 1.0))),
    ):
        with pytest.raises(error, match=match):
            estimate_depth(*arguments)
        assert not out.exists()
    (tmp_path / "text.mp4").write_text("no video")
    with pytest.raises(ValueError, match=r"text\.mp4"):
        estimate_depth(tmp_path / "text.mp4", out, run)
    assert not out.exists()


def test_a_run_is_exported_as_a_streaming_step(run: Path, tmp_path: Path) -> None:
    step, first = export.run(run, tmp_path / "exported", format="torch", size=(16, 24))
    assert (step.name, first.name) == ("depth.pt2", "depth_first.pt2")
    extra = {"depth.json": ""}
    programs = [torch.export.load(file, extra_files=extra).module() for file in (first, step)]
    assert json.loads(extra["depth.json"])["mean"] == pytest.approx([0.4, 0.5, 0.6])
    model, images = open_model(run).model, torch.randn(3, 1, 3, 16, 24, generator=torch.Generator().manual_seed(0))
    state: tuple | None = None
    found: tuple = ()
    with torch.no_grad():
        for index, image in enumerate(images):
            expected, state = model.step(image, state)
            found = programs[min(index, 1)](image, *found)
            torch.testing.assert_close(found[0], expected, rtol=1e-5, atol=1e-6)
            found = found[1:]
