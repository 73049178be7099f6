"""Depth of videos: windows as published, sliding windows, streams, sizes, and states."""

import numpy as np
import pytest
import torch
from torch import Tensor

from blueberry_video.inference.depth import (
    FrameDepth,
    StatefulDepth,
    WindowedDepth,
    depth_maps,
    depth_stream,
    network_size,
)
from blueberry_video.models.depth_anything.model import DepthAnything
from blueberry_video.models.depth_anything.video import VideoDepthAnything
from blueberry_video.models.dinov2 import DINOv2

SIZE = (20, 24)
KEYFRAMES = [0, 12, 24, 25, 26, 27, 28, 29, 30, 31]


def encoder() -> DINOv2:
    return DINOv2(image_size=16, num_frames=1, patch_size=8, embed_dim=16, depth=4, num_heads=2)


def built(temporal: str, max_depth: float | None = None) -> VideoDepthAnything:
    torch.manual_seed(0)
    model = VideoDepthAnything(
        encoder(),
        (0, 1, 2, 3),
        8,
        (8, 8, 8, 8),
        max_depth=max_depth,
        temporal=temporal,
        temporal_heads=2,
        scan_head_dim=4,
        norm_groups=4,
    )
    for parameter in model.parameters():
        if parameter.ndim > 1:
            torch.nn.init.normal_(parameter, std=0.2)
    return model.eval()


def video(frames: int) -> Tensor:
    generator = torch.Generator().manual_seed(frames)
    return torch.randint(0, 256, (frames, 3, *SIZE), dtype=torch.uint8, generator=generator)


def streamed(model: torch.nn.Module, frames: Tensor, parts: int, **options) -> Tensor:
    stream = depth_stream(model, SIZE, 16, **options)
    maps = [stream.push(part) for part in frames.split(parts)]
    return torch.cat([*maps, stream.finish()])


def published(model: VideoDepthAnything, frames: Tensor, align: bool = True) -> np.ndarray:
    """Independent form of the published inference on all frames at once, in numpy."""
    stream = WindowedDepth(model, SIZE, 16)
    inputs = [stream._input(frame[None])[0] for frame in frames]
    count, windows = len(inputs), []
    inputs += [inputs[-1]] * ((22 - count % 22) % 22 + 10)
    previous = None
    for start in range(0, count, 22):
        window = inputs[start : start + 32]
        if previous is not None:
            window[:10] = [previous[slot] for slot in KEYFRAMES]
        with torch.no_grad():
            windows.append(stream._output(model(torch.stack(window, 1)[None])[0]).double().numpy())
        previous = window
    done = list(windows[0])
    first, second = windows[0][0], windows[0][12]
    for maps in windows[1:]:
        scale, shift = 1.0, 0.0
        if align:
            found = np.concatenate([maps[0].ravel(), maps[1].ravel()])
            matrix = np.stack([found, np.ones_like(found)], 1)
            scale, shift = np.linalg.lstsq(matrix, np.concatenate([first.ravel(), second.ravel()]), rcond=None)[0]
        aligned = np.maximum(maps * scale + shift, 0)
        for slot in range(2, 10):
            weight = (slot - 2) / 7
            done[slot - 10] = (1 - weight) * done[slot - 10] + weight * aligned[slot]
        done += list(aligned[10:])
        second = aligned[12]
    return np.stack(done[:count])


@pytest.mark.parametrize("frames", [1, 10, 22, 23, 32, 33, 54, 71])
@pytest.mark.parametrize("parts", [1, 7, 100])
def test_windows_equal_the_published_inference(frames: int, parts: int) -> None:
    model = built("attention")
    torch.testing.assert_close(
        streamed(model, video(frames), parts).double(),
        torch.from_numpy(published(model, video(frames))),
        rtol=1e-4,
        atol=1e-4,
    )


def test_windows_of_a_metric_model_are_not_aligned() -> None:
    model = built("attention", max_depth=20.0)
    expected = torch.from_numpy(published(model, video(40), align=False))
    torch.testing.assert_close(streamed(model, video(40), 5).double(), expected, rtol=1e-4, atol=1e-4)


def test_windows_recover_a_changed_scale() -> None:
    model = built("none")  # maps of a frame depend on it alone, up to the scale below
    expected = streamed(model, video(60), 60, mode="frames")
    forward, scales = model.forward, iter([1.0, 3.0, 0.5])
    model.forward = lambda clip: forward(clip) * next(scales) + 0.7  # type: ignore[method-assign]
    torch.testing.assert_close(streamed(model, video(60), 60, mode="windows"), expected + 0.7, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("latency", [1, 4, 31])
def test_sliding_windows_see_the_newest_frames_and_recover_a_changed_scale(latency: int) -> None:
    model = built("none")
    expected = streamed(model, video(45), 45, mode="frames")
    forward, seen = model.forward, []

    def changed(clip: Tensor) -> Tensor:
        seen.append(clip.shape[2])
        return forward(clip) * (1 + len(seen) % 3)

    model.forward = changed  # type: ignore[method-assign]
    found = streamed(model, video(45), 8, mode="sliding", latency=latency)
    torch.testing.assert_close(found, expected * 2, rtol=1e-3, atol=1e-3)  # the scale of the first window
    assert max(seen) <= 32
    assert seen[0] == latency


def test_sliding_windows_have_a_bounded_delay() -> None:
    stream = depth_stream(built("attention"), SIZE, 16, "sliding", latency=3)
    returned = [len(stream.push(frame[None])) for frame in video(40)]
    assert returned == [0, 0, 3] * 13 + [0]
    assert len(stream.finish()) == 1


@pytest.mark.parametrize("temporal", ["scan", "none"])
def test_a_stream_equals_the_clip(temporal: str) -> None:
    model, frames = built(temporal), video(12)
    stream = StatefulDepth(model, SIZE, 16)
    with torch.no_grad():
        expected = stream._output(model(stream._input(frames).transpose(0, 1)[None])[0])
    torch.testing.assert_close(streamed(model, frames, 5), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("temporal", "options"),
    [
        ("attention", {"mode": "windows"}),
        ("attention", {"mode": "stream"}),
        ("attention", {"mode": "sliding"}),
        ("scan", {}),
    ],
)
def test_a_restored_state_continues_bit_for_bit(temporal: str, options: dict, tmp_path) -> None:
    model, frames = built(temporal), video(75)
    whole, first, second = (depth_stream(model, SIZE, 16, **options) for _ in range(3))
    expected = torch.cat([*(whole.push(part) for part in frames.split(5)), whole.finish()])
    maps = [first.push(part) for part in frames[:40].split(5)]
    torch.save(first.state_dict(), tmp_path / "state.pt")
    second.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    maps += [second.push(part) for part in frames[40:].split(5)]
    assert torch.equal(torch.cat([*maps, second.finish()]), expected)


def test_the_iterator_yields_a_map_per_frame_and_holds_few_frames() -> None:
    alive = 0

    def frames():
        nonlocal alive
        for frame in video(50):
            alive += 1
            yield frame

    maps = depth_maps(built("attention"), frames(), 16)
    next(maps)
    assert alive == 32
    assert 1 + sum(1 for _ in maps) == 50
    assert list(depth_maps(built("attention"), [], 16)) == []


def test_image_models_and_modes() -> None:
    image = DepthAnything(encoder(), (0, 1, 2, 3), 8, (8, 8, 8, 8)).eval()
    assert isinstance(depth_stream(image, SIZE, 16), FrameDepth)
    assert isinstance(depth_stream(built("scan"), SIZE, 16), StatefulDepth)
    assert isinstance(depth_stream(built("attention"), SIZE, 16), WindowedDepth)
    maps = streamed(image, video(3), 2)
    assert maps.shape == (3, *SIZE)
    assert maps.min() >= 0
    with pytest.raises(ValueError, match=r"mode='stream'.*mode='frames'"):
        depth_stream(image, SIZE, 16, "stream")
    with pytest.raises(ValueError, match=r"mode='window'.*windows"):
        depth_stream(image, SIZE, 16, "window")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"latency=32\b.*31"):
        depth_stream(built("attention"), SIZE, 16, "sliding", 32)
    with pytest.raises(ValueError, match=r"uint8 \(n, 3, 20, 24\)"):
        depth_stream(image, SIZE, 16).push(torch.zeros(1, 3, 24, 20, dtype=torch.uint8))


@pytest.mark.parametrize(
    ("height", "width", "expected"),
    [
        (518, 518, (518, 518)),
        (480, 640, (518, 686)),  # 690.7: 49.3 patches
        (640, 480, (686, 518)),
        (1080, 1920, (518, 924)),  # 920.9: 65.8 patches
        (1000, 2000, (462, 924)),  # int(518 * 1.777 / 2) = 460: 33 patches
        (1, 1, (518, 518)),
    ],
)
def test_sizes_of_the_network(height: int, width: int, expected: tuple[int, int]) -> None:
    assert network_size(height, width) == expected


def test_sizes_out_of_range_raise() -> None:
    with pytest.raises(ValueError, match=r"input_size=13\b.*14"):
        network_size(20, 20, 13)
