"""The whole pipeline: sources of every kind in, plans, budgets, caches, hooks, streams and processes."""

import json
from dataclasses import replace
from fractions import Fraction
from functools import partial
from pathlib import Path

import av
import numpy as np
import pytest
import torch
from PIL import Image

from blueberry_video.video import (
    BrokenVideoError,
    Hooks,
    KilledError,
    LimitError,
    ProcessedVideo,
    VideoProcessor,
    load_settings,
    models,
    process_video,
    process_videos,
    stream_video,
)
from blueberry_video.video.budget import RunOptions, shrink
from blueberry_video.video.command import main
from blueberry_video.video.resize import smart_resize


def write_clip(path: Path, num_frames: int = 60, width: int = 96, height: int = 64, keyint: int = 12) -> Path:
    """Frame i is grey at 20 + 3 i, with a white corner."""
    with av.open(str(path), "w") as output:
        stream = output.add_stream("libx264", rate=30)
        stream.width, stream.height, stream.pix_fmt, stream.gop_size = width, height, "yuv420p", keyint
        stream.codec_context.time_base = Fraction(1, 30)
        for i in range(num_frames):
            picture = np.full((height, width, 3), 20 + 3 * i % 200, np.uint8)
            picture[: height // 4, : width // 4] = 255
            output.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        output.mux(stream.encode())
    return path


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_clip(tmp_path_factory.mktemp("clips") / "clip.mp4")


def greys(pixels: torch.Tensor) -> list[int]:
    return [round(frame[:, frame.shape[1] // 2 :].float().mean().item()) for frame in pixels]


def test_frames_metadata_and_timing_are_those_of_the_video(clip: Path):
    video = process_video(clip, num_frames=8)
    known = video.metadata
    assert known.frame_indices == (0, 8, 17, 25, 34, 42, 51, 59)
    assert greys(video.pixels) == pytest.approx([20 + 3 * i % 200 for i in known.frame_indices], abs=2)
    assert known.timestamps == pytest.approx([i / 30 for i in known.frame_indices])
    assert (known.num_frames, known.total_frames, known.original_resolution) == (8, 60, (64, 96))
    assert known.original_fps == pytest.approx(30)
    assert known.duration == pytest.approx(2)
    assert known.sample_fps == pytest.approx(7 / (59 / 30))
    assert known.resolution == smart_resize(64, 96, 28, 128 * 28**2, 768 * 28**2) == video.pixels.shape[2:]
    assert known.grid_thw == (4, known.resolution[0] // 14, known.resolution[1] // 14)
    assert known.total_tokens == 4 * known.resolution[0] * known.resolution[1] // 28**2 + 2
    assert (known.codec, known.backend, known.name) == ("h264", "pyav", str(clip))
    assert {"source", "index", "sample", "decode", "resize", "quality", "format"} <= video.timing.keys()
    assert video.quality["coverage"] == pytest.approx(1)
    assert not video.missing.any()


@pytest.mark.parametrize("model", models())
def test_every_model_takes_a_video(clip: Path, model: str):
    plan = VideoProcessor(load_settings(model)).plan(clip)
    video = process_video(clip, model)
    assert isinstance(video, ProcessedVideo)
    assert video.metadata.frame_indices == plan.indices
    assert video.metadata.total_tokens == plan.tokens.total > 0
    assert video.pixels.shape == (len(plan.indices), 3, plan.height, plan.width)


def test_sources_of_every_kind_give_the_same_frames(clip: Path, tmp_path: Path):
    expected = process_video(clip, num_frames=4).pixels
    content = clip.read_bytes()
    for source in (str(clip), content, clip.open("rb"), {"path": None, "bytes": content}):
        assert torch.equal(process_video(source, num_frames=4).pixels, expected)
    frames = process_video(clip, indices=tuple(range(60)), resized_height=64, resized_width=96, max_frames=60)
    for source in (frames.pixels, frames.pixels.numpy(), list(frames.pixels.permute(0, 2, 3, 1).numpy())):
        video = process_video(source, num_frames=4)
        assert video.metadata.frame_indices == (0, 20, 39, 59)
        assert video.metadata.original_fps == 0
    for i in range(5):
        Image.fromarray(np.full((64, 96, 3), 40 * i, np.uint8)).save(tmp_path / f"{i}.png")
    video = process_video(tmp_path)  # all of them: nobody knows their rate; the last repeated to a whole patch
    assert video.metadata.frame_indices == (0, 1, 2, 3, 4, 4)
    assert greys(video.pixels) == [0, 40, 80, 120, 160, 160]
    assert process_video(tmp_path, frames_fps=1.0, fps=1.0).metadata.original_fps == 1


def test_unknown_models_and_overrides_are_refused_by_name(clip: Path):
    with pytest.raises(ValueError, match="max_frames"):
        process_video(clip, max_frame=3)
    with pytest.raises(ValueError, match=r"qwen2\.5-vl"):
        process_video(clip, "qwen2.5vl")


def test_adaptive_sampling_takes_more_where_the_picture_changes(tmp_path: Path):
    frames = np.zeros((60, 64, 96, 3), np.uint8)
    frames[30:, :, :, :] = (np.arange(30) * 8)[:, None, None, None]  # a still half, then one that changes
    video = process_video(frames, sampling="adaptive", num_frames=12, frames_fps=30.0)
    later = sum(index >= 30 for index in video.metadata.frame_indices)
    assert later >= 8
    assert (
        video.metadata.frame_indices
        == process_video(frames, sampling="adaptive", num_frames=12, frames_fps=30.0).metadata.frame_indices
    )
    early = Hooks(score=lambda small: torch.linspace(1, 0, len(small)) ** 4)
    guided = process_video(frames, hooks=early, sampling="adaptive", num_frames=12, frames_fps=30.0)
    assert sum(index < 30 for index in guided.metadata.frame_indices) >= 8


def test_hooks_see_frames_and_make_the_result(clip: Path):
    hooks = Hooks(preprocess=lambda pixels: 255 - pixels, formatter=lambda video: len(video.pixels))
    video = process_video(clip, hooks=hooks, num_frames=4)
    assert video.frames == 4
    assert greys(video.pixels)[0] == pytest.approx(235, abs=2)
    assert process_video(clip, hooks=Hooks(postprocess=lambda video: video.metadata.num_frames), num_frames=4) == 4


# ---- budgets ---------------------------------------------------------------------------------------------------------


def test_too_much_memory_costs_frames_first_and_then_pixels(clip: Path):
    whole = VideoProcessor(load_settings(None, {"num_frames": 32}))
    plan = whole.plan(clip)
    half = process_video(clip, None, num_frames=32, max_memory_bytes=plan.frame_bytes // 2)
    assert half.metadata.num_frames == 16
    assert half.metadata.resolution == (plan.height, plan.width)
    assert half.metadata.frame_indices[-1] == 59  # thinned, not cut
    assert half.degraded == (f"32 → 16 frames (max_memory_bytes={plan.frame_bytes // 2})",)
    little = process_video(clip, None, num_frames=32, max_memory_bytes=plan.frame_bytes // 16)
    assert little.metadata.num_frames == 4
    assert little.pixels.numel() <= plan.frame_bytes // 16
    assert len(little.degraded) == 2
    with pytest.raises(LimitError, match="max_memory_bytes=1000"):
        process_video(clip, None, max_memory_bytes=1000)


def test_too_many_tokens_are_refused_or_made_to_fit(clip: Path):
    many = {"num_frames": 32, "context_length": 1500, "reserved_tokens": 100}
    with pytest.raises(LimitError, match=r"context_length=1500 .*take at most \d+ frames"):
        process_video(clip, **many)
    video = process_video(clip, **many, on_overflow="fit")
    assert video.metadata.total_tokens <= 1400
    assert video.metadata.num_frames < 32
    assert video.degraded
    assert process_video(clip, **many, on_overflow="ignore").metadata.num_frames == 32


def test_too_little_time_costs_frames_and_then_keyframes(clip: Path):
    video = process_video(clip, num_frames=32, max_seconds=1e-9)
    assert video.metadata.num_frames == 4
    assert [step.split(" (")[0] for step in video.degraded] == [
        "32 → 16 frames",
        "16 → 8 frames",
        "8 → 4 frames",
        "4 frames → the keyframes before them",
    ]
    assert {index % 12 for index in video.metadata.frame_indices} == {0}
    assert process_video(clip, num_frames=32, max_seconds=60.0).metadata.num_frames == 32


@pytest.mark.parametrize("least", [1, 4, 7])
def test_shrinking_is_as_little_as_possible(least: int):
    for budget in range(1, 300):
        fits = partial(lambda budget, n, size: n * size[0] * size[1] <= budget * 100, budget)
        found = shrink(20, (40, 60), fits, 2, least, 10)
        if found is None:
            assert budget * 100 < 2 * 100
            continue
        frames, size = found
        assert frames * size[0] * size[1] <= budget * 100
        if size == (40, 60) and frames < 20:
            assert (frames + 2) * 2400 > budget * 100
        if size == (10, 10):
            assert frames == 2 or (frames + 2) * 100 > budget * 100 or frames == -(-least // 2) * 2
        elif size != (40, 60):
            assert frames == -(-least // 2) * 2


@pytest.mark.parametrize("wrong", [{"on_overflow": "no"}, {"max_seconds": 0.0}, {"timeout": -1.0}])
def test_wrong_limits_are_refused(wrong: dict):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        RunOptions(**wrong)


def test_limits_are_checked_before_anything_is_decoded(clip: Path):
    for limit, said in (
        ({"max_duration": 1.0}, "lasts 2 s, longer than max_duration=1"),
        ({"max_frame_pixels": 1000}, "max_frame_pixels=1000"),
        ({"max_decoded_pixels": 10_000}, "max_decoded_pixels=10000"),
        ({"max_bytes": 100}, "max_bytes=100"),
    ):
        with pytest.raises(LimitError, match=said):
            process_video(clip, **limit)


# ---- cache -----------------------------------------------------------------------------------------------------------


def test_the_cache_gives_the_same_video_and_notices_every_change(clip: Path, tmp_path: Path):
    folder = str(tmp_path / "cache")
    first = process_video(clip, num_frames=4, cache_folder=folder)
    again = process_video(clip, num_frames=4, cache_folder=folder)
    assert (first.cached, again.cached) == (False, True)
    assert torch.equal(first.pixels, again.pixels)
    assert torch.equal(first.frames, again.frames)
    assert first.metadata == again.metadata
    assert first.memory == again.memory
    assert process_video(clip, num_frames=4, cache_folder=folder, format="numpy").cached  # another format of the same
    assert not process_video(clip, num_frames=6, cache_folder=folder).cached
    assert not process_video(clip, num_frames=4, cache_folder=folder, resample="fast").cached
    copy = write_clip(tmp_path / "other.mp4", num_frames=61)
    assert not process_video(copy, num_frames=4, cache_folder=folder).cached
    copy.write_bytes(clip.read_bytes())
    assert process_video(copy, num_frames=4, cache_folder=folder).cached  # the content counts, not the name
    assert process_video(copy, num_frames=4, cache_folder=folder).metadata.name == str(copy)
    assert not process_video(clip, num_frames=4, cache_folder=folder, hooks=Hooks(preprocess=lambda p: p)).cached


def test_a_processor_remembers_in_memory(clip: Path):
    processor = VideoProcessor(load_settings(None, {"num_frames": 4, "cache_memory_bytes": 10**8}))
    assert [processor(clip).cached for _ in range(2)] == [False, True]


# ---- streams and processes -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("chunk_frames", [1, 7, 16, 100])
def test_chunks_of_a_stream_are_the_whole(clip: Path, chunk_frames: int):
    size = {"resized_height": 56, "resized_width": 84}
    whole = process_video(clip, sampling="all", format="huggingface", **size)
    chunks = list(stream_video(clip, chunk_frames=chunk_frames, format="huggingface", **size))
    assert [index for chunk in chunks for index in chunk.indices] == list(range(60))
    assert torch.equal(torch.cat([chunk.pixels for chunk in chunks]), whole.pixels)
    patches = torch.cat([chunk.frames["pixel_values_videos"] for chunk in chunks])
    assert torch.equal(patches, whole.frames["pixel_values_videos"])
    assert max(len(chunk.indices) for chunk in chunks) <= chunk_frames + 1


def double(video: ProcessedVideo) -> ProcessedVideo:
    return replace(video, frames=2 * video.metadata.num_frames)


def test_many_videos_in_processes_and_one_broken(clip: Path, tmp_path: Path):
    broken = tmp_path / "broken.mp4"
    broken.write_bytes(clip.read_bytes()[:3000])
    done = []
    outcomes = list(
        process_videos(
            [clip, broken, clip],
            hooks=Hooks(postprocess=double),
            workers=2,
            num_frames=4,
            on_progress=lambda *numbers: done.append(numbers),
        )
    )
    assert [outcome.index for outcome in outcomes] == [0, 1, 2]
    assert isinstance(outcomes[1].error, BrokenVideoError)
    assert outcomes[0].value.frames == 8
    assert torch.equal(outcomes[0].value.pixels, process_video(clip, num_frames=4).pixels)
    assert done[-1] == (3, 1)


def test_isolated_videos_are_ended_when_they_take_too_long(clip: Path):
    assert process_video(clip, num_frames=4, isolate=True).metadata.num_frames == 4
    with pytest.raises(KilledError, match="timeout"):
        process_video(clip, sampling="all", isolate=True, timeout=1e-3)


# ---- command ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("format", "written"),
    [
        ("huggingface", "frames.safetensors"),
        ("tensor", "frames.safetensors"),
        ("numpy", "frames.npy"),
        ("openai", "frames.json"),
        ("pil", "frames/00003.png"),
    ],
)
def test_the_command_prints_the_plan_and_writes_the_format(
    clip: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], format: str, written: str
):
    assert main([str(clip), "--out", str(tmp_path / "out"), "num_frames=4", f"format={format}"]) == 0
    told = capsys.readouterr().out
    assert "frames   4, numbers 0, 20, 39, 59" in told
    assert "tokens" in told
    assert "bf16" in told
    assert (tmp_path / "out" / written).is_file()
    assert Image.open(tmp_path / "out" / "contact_sheet.png").size[0] > 100
    known = json.loads((tmp_path / "out" / "video.json").read_text())
    assert known["metadata"]["frame_indices"] == [0, 20, 39, 59]


def test_the_command_says_what_is_wrong_in_a_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    for arguments, said in (
        ([str(tmp_path / "none.mp4")], "none.mp4"),
        (["x.mp4", "fbs=1"], "fps"),
        (["x.mp4", "nonsense"], "key=value"),
    ):
        assert main(arguments) == 1
        error = capsys.readouterr().err
        assert said in error
        assert error.count("\n") == 1


# ---- what a demanding user does --------------------------------------------------------------------------------------


def test_what_a_hook_returns_is_checked(clip: Path):
    for wrong in (lambda pixels: None, lambda pixels: pixels[:1], lambda pixels: pixels[:, :1]):
        with pytest.raises(TypeError, match=r"hooks\.preprocess .*uint8 \(8, 3, 64, 96\)"):
            process_video(clip, hooks=Hooks(preprocess=wrong), num_frames=8)


def test_a_stream_refuses_what_it_cannot_do(clip: Path):
    with pytest.raises(ValueError, match=r"isolate=False.*hooks formatter and postprocess.*isolate=false"):
        next(stream_video(clip, hooks=Hooks(formatter=len)))
    with pytest.raises(LimitError, match="max_frame_pixels=1000"):
        next(stream_video(clip, max_frame_pixels=1000))


def test_what_was_given_up_for_time_is_not_cached(clip: Path, tmp_path: Path):
    hurried = {"num_frames": 32, "max_seconds": 1e-9, "cache_folder": str(tmp_path)}
    assert process_video(clip, **hurried).degraded
    assert not process_video(clip, **hurried).cached


def test_a_cache_that_cannot_be_written_costs_no_result(clip: Path, tmp_path: Path):
    (tmp_path / "file").write_text("no folder")
    with pytest.warns(UserWarning, match="could not write"):
        assert process_video(clip, num_frames=4, cache_folder=str(tmp_path / "file")).metadata.num_frames == 4


def test_candidates_of_adaptive_sampling_count_as_decoded(clip: Path):
    with pytest.raises(LimitError, match="max_decoded_pixels=100000"):
        process_video(clip, sampling="adaptive", num_frames=8, max_decoded_pixels=100_000)


def test_more_frames_than_allowed_are_thinned_where_nobody_knows_their_rate():
    video = process_video(np.zeros((900, 32, 32, 3), np.uint8), resized_height=28, resized_width=28)
    assert video.metadata.num_frames == 768
    assert video.metadata.frame_indices[-1] == 899


@pytest.mark.parametrize(
    "wrong",
    [{"device": "meta"}, {"device": "cuda:99"}, {"decode_device": "foo"}, {"num_threads": 100_000}, {"fps": -1.0}],
)
def test_wrong_arguments_are_told_before_anything_is_opened(wrong: dict):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        process_video("nowhere.mp4", **wrong)


def test_a_long_animation_is_decoded_once(tmp_path: Path):
    pictures = [Image.new("RGB", (40, 30), (i % 256, 0, 0)) for i in range(300)]
    path = tmp_path / "long.png"
    pictures[0].save(path, save_all=True, append_images=pictures[1:], duration=100)
    video = process_video(path, sampling="all", max_frames=300, resized_height=28, resized_width=56)
    assert video.metadata.duration == pytest.approx(30)
    assert [round(frame[0].float().mean().item()) for frame in video.pixels] == [i % 256 for i in range(300)]
    assert video.timing["decode"] < 5  # quadratic, it took a minute for some more


def test_times_are_those_of_the_frames_in_whatever_order(clip: Path):
    video = process_video(clip, indices=(4, 0, 2, 2), format="huggingface", measure_quality=False)
    assert video.metadata.frame_indices == (4, 0, 2, 2)
    assert float(video.frames["second_per_grid_ts"][0]) == pytest.approx(2 * 2 / 30)
    with pytest.raises(ValueError, match=r"huggingface_layout=patches .*count=per_frame"):
        process_video(clip, "gemini", format="huggingface")
