"""Asynchronous calls, scenes, streams, live sources, further samplers and models, and what other packages register."""

import asyncio
import json
import os
import shutil
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import av
import numpy as np
import pytest
import torch

from blueberry_video.models.vit import VisionTransformer
from blueberry_video.video import (
    LiveStream,
    Scene,
    aprocess_video,
    aprocess_videos,
    asynchronous,
    find_scenes,
    load_settings,
    models,
    process_streams,
    process_video,
    refinement,
    settings,
)
from blueberry_video.video.decode import DecodeOptions
from blueberry_video.video.errors import BrokenVideoError, FetchError, RefusedSourceError, VideoError
from blueberry_video.video.quality import log_to_mlflow
from blueberry_video.video.refinement import bursts, finer
from blueberry_video.video.sampling import SamplingOptions, choose
from blueberry_video.video.scenes import split


def write(path: Path, levels: list[list[int]], size: tuple[int, int] = (64, 48)) -> Path:
    """Writes a video with one stream per list of gray levels, 10 frames per second."""
    with av.open(str(path), "w") as output:
        streams = []
        for _ in levels:
            stream = output.add_stream("mpeg4", rate=10)
            stream.width, stream.height, stream.pix_fmt = *size, "yuv420p"
            streams.append(stream)
        for stream, values in zip(streams, levels):
            for value in values:
                picture = np.full((size[1], size[0], 3), value, np.uint8)
                output.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
            output.mux(stream.encode())
    return path


def test_asynchronous_calls_are_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    path = write(tmp_path / "a.mkv", [[10] * 8])
    running, most, lock = [0], [0], threading.Lock()
    real = asynchronous.VideoProcessor.__call__

    def counted(self, source):
        with lock:
            running[0] += 1
            most[0] = max(most[0], running[0])
        time.sleep(0.3)
        try:
            return real(self, source)
        finally:
            with lock:
                running[0] -= 1

    monkeypatch.setattr(asynchronous.VideoProcessor, "__call__", counted)

    async def work() -> tuple[list, list, int]:
        ticks = 0

        async def tick() -> None:
            nonlocal ticks
            while True:
                await asyncio.sleep(0.005)
                ticks += 1

        clock = asyncio.create_task(tick())
        one = await asyncio.gather(*(aprocess_video(path, "gemini") for _ in range(10)))
        assert most[0] == asynchronous.MOST_AT_ONCE
        most[0] = 0
        many = [o async for o in aprocess_videos([path, "none.mp4", path, path, path], "gemini", concurrency=2)]
        clock.cancel()
        return one, many, ticks

    one, many, ticks = asyncio.run(work())
    assert most[0] == 2
    assert ticks > 5  # the event loop was free
    assert len({video.metadata.frame_indices for video in one}) == 1
    assert [outcome.index for outcome in many] == [0, 1, 2, 3, 4]
    assert [type(outcome.error) for outcome in many] == [type(None), FileNotFoundError] + [type(None)] * 3


def test_scenes_hold_every_frame(tmp_path: Path):
    path = write(tmp_path / "a.mkv", [[20] * 12 + [200] * 9 + [90] * 14])
    scenes = find_scenes(path)
    assert [(scene.first, scene.last) for scene in scenes] == [(0, 11), (12, 20), (21, 34)]
    assert [scene.start for scene in scenes] == pytest.approx([0.0, 1.2, 2.1])
    assert [scene.end for scene in scenes] == pytest.approx([1.1, 2.0, 3.4])
    for scene, level in zip(scenes, (20, 200, 90)):
        video = process_video(path, video_start=scene.start, video_end=scene.end)
        assert abs(video.pixels.float() - level).max() < 6
    assert len(find_scenes(path, min_seconds=1.0)) == 2  # the second cut is 0.9 s after the first
    assert len(find_scenes(write(tmp_path / "b.mkv", [[2 * i for i in range(40)]]))) == 1
    motion = np.full(30, 0.2)  # every frame differs: motion, no cut
    motion[0] = 0
    assert split(motion, np.arange(30) / 10, 0.08, 0.5) == [Scene(0, 29, 0.0, 2.9)]


def test_streams_of_one_file(tmp_path: Path):
    path = write(tmp_path / "a.mkv", [[40] * 8, [180] * 8])
    for source in (path, path.read_bytes()):
        found = process_streams(source, num_frames=4)
        assert {index: round(float(video.pixels.float().mean()) / 20) for index, video in found.items()} == {0: 2, 1: 9}
    assert list(process_streams(path, streams=[1], num_frames=4)) == [1]


@pytest.mark.skipif(shutil.which("ffmpeg") is None, reason="ffmpeg is not installed")
def test_a_live_source_drops_and_counts_frames():
    command = ["ffmpeg", "-v", "error", "-f", "lavfi", "-i", "testsrc2=size=64x48:rate=50:duration=2"]
    command += ["-c:v", "mpeg2video", "-f", "mpegts", "pipe:1"]
    for slow in (False, True):
        with subprocess.Popen(command, stdout=subprocess.PIPE) as process:
            assert process.stdout is not None
            with LiveStream(process.stdout, queue_frames=200 if not slow else 3) as live:
                frames = []
                for frame in live:
                    if slow and not frames:
                        time.sleep(1.0)
                    frames.append(frame)
        assert len(frames) + live.dropped == live.decoded == 100
        assert (live.dropped > 50) == slow
        numbers = [frame.number for frame in frames]
        assert sorted(set(numbers)) == numbers
        assert numbers[-1] == 99  # the newest frames are kept
        assert frames[0].pixels.shape == (3, 48, 64)


def test_live_sources_are_checked(tmp_path: Path):
    for wrong in ("file:///etc/passwd", "http://8.8.8.8/a", "concat:a|b", str(tmp_path), "/dev/zero", "rtsp:///x"):
        with pytest.raises(RefusedSourceError):
            LiveStream(wrong)
    with pytest.raises(RefusedSourceError, match=r"127\.0\.0\.1.*allowed_networks"):
        LiveStream("rtsp://127.0.0.1:554/x")
    with (tmp_path / "list").open("wb+") as stream:
        stream.write(b"#EXTM3U\n#EXTINF:1,\n/etc/passwd\n")
        stream.seek(0)
        with LiveStream(stream) as live, pytest.raises(BrokenVideoError):
            list(live)
    read, end = os.pipe()
    with os.fdopen(read, "rb") as stream, os.fdopen(end, "wb"):
        live = LiveStream(stream, timeout=0.2, container="mpegts")
        with pytest.raises((FetchError, BrokenVideoError)):
            list(live)


def test_bursts_are_consecutive_and_cover_the_video():
    assert bursts(0, 99, 8, 4) == [0, 1, 2, 3, 96, 97, 98, 99]
    assert bursts(10, 109, 12, 4) == [10, 11, 12, 13, 58, 59, 60, 61, 106, 107, 108, 109]
    assert bursts(0, 9, 4, 4) == [3, 4, 5, 6]
    for total in range(1, 40):
        for count in range(1, total + 1):
            for size in (1, 3, 4):
                found = bursts(5, 4 + total, count, size)
                assert len(found) == len(set(found)) == count
                assert found == sorted(found)
                assert 5 <= found[0] <= found[-1] <= 4 + total
    options = SamplingOptions(sampling="bursts", num_frames=8, burst_frames=2)
    assert choose(np.arange(40) / 10, options) == [0, 1, 13, 14, 25, 26, 38, 39]


def test_progressive_sampling_decodes_more_where_frames_differ():
    assert finer([0, 8, 16], [0.0, 1.0], 3) == [10, 12, 14]
    assert finer([0, 1, 2], [1.0, 1.0], 5) == []
    frames = np.zeros((64, 48, 64, 3), np.uint8)
    frames[40:] = (np.arange(24) * 8)[:, None, None, None]
    video = process_video(frames, sampling="progressive", num_frames=16, frames_fps=16.0)
    indices = video.metadata.frame_indices
    assert len(set(indices)) == 16
    assert {0, 63} <= set(indices)
    assert sum(index >= 40 for index in indices) >= 10
    still = process_video(frames[:40], sampling="progressive", num_frames=16, frames_fps=16.0).metadata.frame_indices
    assert len(set(still)) == 16


def test_other_packages_register_samplers_and_models(tmp_path: Path):
    package = tmp_path / "more-1.0.dist-info"
    package.mkdir()
    (package / "METADATA").write_text("Metadata-Version: 2.1\nName: more\nVersion: 1.0\n")
    (package / "entry_points.txt").write_text(
        "[blueberry.video.samplers]\nlast = more:last\nwrong = more:wrong\n"
        "[blueberry.video.models]\nmine = more:PROFILE\n"
    )
    (tmp_path / "mine.yaml").write_text("sampling: {sampling: last, num_frames: 4}\n")
    (tmp_path / "more.py").write_text(
        "from pathlib import Path\nPROFILE = Path(__file__).parent / 'mine.yaml'\n"
        "def last(times, count, keyframes): return range(len(times) - count, len(times))\n"
        "def wrong(times, count, keyframes): return [len(times)]\n"
    )
    code = (
        "import numpy as np\nfrom blueberry_video.video import load_settings, models\n"
        "from blueberry_video.video.sampling import choose\n"
        "options = load_settings('mine').sampling\n"
        "assert 'mine' in models()\nassert choose(np.arange(20) / 10, options) == [16, 17, 18, 19]\n"
        "try: choose(np.arange(20) / 10, load_settings('mine', {'sampling': 'wrong'}).sampling)\n"
        "except ValueError as error: assert 'more:wrong' in str(error)\n"
        "else: raise AssertionError\nprint('done')"
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(tmp_path), *sys.path])}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False)
    assert done.stdout == "done\n", done.stderr
    with pytest.raises(ValueError, match=r"sampling='last'.*bursts"):
        SamplingOptions(sampling="last")
    assert "mine" not in models()


def test_other_packages_register_decoders(tmp_path: Path):
    clip = write(tmp_path / "a.mkv", [[20 * i for i in range(10)]])
    package = tmp_path / "codecs-1.0.dist-info"
    package.mkdir()
    (package / "METADATA").write_text("Metadata-Version: 2.1\nName: codecs\nVersion: 1.0\n")
    names = ("exact", "short", "many", "floats", "odd", "wrong", "absent", "pyav")
    lines = [f"{name} = more_decoders:{name}" for name in names]
    (package / "entry_points.txt").write_text("\n".join(["[blueberry.video.decoders]", *lines]))
    (tmp_path / "more_decoders.py").write_text(
        "from blueberry_video.video.backends import read_pyav\n"
        "class OwnError(Exception): pass\n"
        "def exact(video, wanted, device): return read_pyav(video, wanted)\n"
        "def short(video, wanted, device): return read_pyav(video, wanted[:2])\n"
        "def many(video, wanted, device): return read_pyav(video, [*wanted, wanted[-1]][: len(wanted) + 1])\n"
        "def floats(video, wanted, device): return (p.float() for p in read_pyav(video, wanted))\n"
        "def odd(video, wanted, device): raise OwnError('no licence')\n"
        "def wrong(video, wanted, device): return (255 - p for p in read_pyav(video, wanted))\n"
        "def pyav(video, wanted, device): raise AssertionError\n"
    )
    code = (
        "from blueberry_video.video import process_video\n"
        "from blueberry_video.video.decode import DecodeOptions, decode\n"
        f"path, indices = {str(clip)!r}, [1, 4, 9]\n"
        "order = ('short', 'many', 'floats', 'odd', 'wrong', 'absent', 'exact')\n"
        "frames = decode(path, indices, DecodeOptions(backends=order, salvage=False))\n"
        "plain = decode(path, indices, DecodeOptions(backends=('pyav',), salvage=False))\n"
        "assert frames.backend == 'exact' and (frames.pixels == plain.pixels).all()\n"
        "failed = frames.failures\n"
        "assert list(failed) == list(order[:-1]), failed\n"
        "assert '2 of 3' in failed['short'] and 'more than the 2' in failed['many']\n"
        "assert 'uint8' in failed['floats'] and 'wrong pixels' in failed['wrong']\n"
        "assert 'OwnError: no licence' in failed['odd'] and 'absent' in failed['absent'], failed\n"
        "assert process_video(path, backends=['exact'], num_frames=4).metadata.backend == 'exact'\n"
        "assert 'exact' not in DecodeOptions().backends\nprint('done')"
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(tmp_path), *sys.path])}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False)
    assert done.stdout == "done\n", done.stderr
    with pytest.raises(ValueError, match=r"backends='exact'.*torchcodec"):
        DecodeOptions(backends=("exact",))


def test_a_bare_config_and_a_hub_id_name_the_preprocessing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    config = {
        "model_type": "qwen2_5_vl",
        "vision_config": {"patch_size": 14, "spatial_merge_size": 2, "temporal_patch_size": 2},
        "text_config": {"hidden_size": 2048, "num_hidden_layers": 36, "max_position_embeddings": 32768},
    }
    snapshot = tmp_path / "hub/models--Qwen--Small/snapshots/abc"
    snapshot.mkdir(parents=True)
    (snapshot / "config.json").write_text(json.dumps(config))
    refs = tmp_path / "hub/models--Qwen--Small/refs"
    refs.mkdir()
    (refs / "main").write_text("abc")
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    monkeypatch.delenv("HF_HUB_CACHE", raising=False)
    expected = load_settings("qwen2.5-vl")
    for model in ("Qwen/Small", snapshot, snapshot / "config.json"):
        found = load_settings(model)
        assert (found.sampling, found.resize, found.format) == (expected.sampling, expected.resize, expected.format)
        assert (found.tokens.hidden_size, found.tokens.num_layers, found.tokens.context_length) == (2048, 36, 32768)
        assert found.tokens.num_parameters is None  # of another size
    with pytest.raises(FileNotFoundError, match=r"Qwen/Other.*local cache"):
        load_settings("Qwen/Other")
    (snapshot / "config.json").write_text('{"model_type": "llama"}')
    with pytest.raises(ValueError, match=r"model_type='llama'.*qwen3_vl"):
        load_settings(snapshot)


def test_the_input_of_an_encoder_of_this_project(tmp_path: Path):
    clip = write(tmp_path / "a.mkv", [[20 + i for i in range(30)]])
    run, published, jepa = (tmp_path / name for name in ("run", "published", "jepa"))
    for folder in (run, published, jepa):
        folder.mkdir()
    (run / "config.yaml").write_text(
        "model: {encoder: {image_size: 32, num_frames: 8, patch_size: 8, tubelet_size: 2}}\n"
        "task: {input: {mean: [0.5, 0.5, 0.5], std: [0.5, 0.5, 0.5]}}\nseed: 1\n"
    )
    (published / "config.json").write_text(
        '{"model_type": "videomae", "image_size": 32, "num_frames": 8, "patch_size": 8, "tubelet_size": 2}'
    )
    (published / "preprocessor_config.json").write_text('{"image_mean": [0.5, 0.5, 0.5], "image_std": [0.5, 0.5, 0.5]}')
    (jepa / "config.json").write_text(
        '{"model_type": "vjepa2", "crop_size": 32, "frames_per_clip": 8, "patch_size": 8}'
    )
    encoder = VisionTransformer(
        image_size=32, num_frames=8, patch_size=8, tubelet_size=2, embed_dim=24, depth=1, num_heads=2
    )
    for folder in (run, published, jepa):
        video = process_video(clip, model=folder)
        assert video.frames.shape == (3, 8, 32, 32)
        assert video.frames.dtype == torch.float32
        assert video.metadata.grid_thw == encoder.grid((1, *video.frames.shape)) == (4, 4, 4)
        assert encoder(video.frames[None]).shape == (1, 64, 24)
        mean, std = (0.5, 0.5) if folder is not jepa else (0.485, 0.229)
        expected = (video.pixels[:, 0].float() / 255 - mean) / std
        assert torch.allclose(video.frames[0], expected, atol=1e-5)
    (run / "config.yaml").write_text("model: {depth: 3}\n")
    with pytest.raises(ValueError, match="image_size"):
        load_settings(run)


def test_videos_are_logged_to_mlflow(monkeypatch: pytest.MonkeyPatch):
    tables, metrics = [], {}
    stub = SimpleNamespace(
        log_table=lambda data, name: tables.append((data, name)),
        log_metric=lambda key, value, step: metrics.update({key: (value, step)}),
    )
    monkeypatch.setitem(sys.modules, "mlflow", stub)
    rows = [{"name": "a", "timing": {"decode": 1.0}}, {"name": "b", "timing": {"decode": 3.0}, "late": 5}]
    log_to_mlflow(rows, step=7)
    assert tables == [({"name": ["a", "b"], "timing/decode": [1.0, 3.0], "late": [None, 5]}, "videos.json")]
    assert metrics == {"video/timing/decode": (2.0, 7), "video/late": (5.0, 7)}


def test_names_are_public():
    assert callable(refinement.registered)
    assert settings.MODEL_GROUP == "blueberry.video.models"
    assert issubclass(RefusedSourceError, VideoError)


def test_the_decoding_benchmark_leaves_out_files_that_do_not_decode(tmp_path: Path):
    write(tmp_path / "good.mkv", [[10] * 20])
    (tmp_path / "bad.mp4").write_bytes(b"\0\0\0\x20ftypisom" + bytes(200))
    (tmp_path / "notes.txt").write_text("no video")
    script = Path(__file__).parents[2] / "benchmarks/decode.py"
    command = [sys.executable, str(script), str(tmp_path), "--repeats", "1"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, done.stderr
    assert "recommended here" in done.stdout
    assert "bad.mp4 is left out" in done.stdout
    assert "notes.txt is left out" in done.stdout
