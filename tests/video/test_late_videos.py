"""Videos with a first timestamp other than 0: the same frames and times as without the offset."""

from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
import torch

from blueberry_video.data.video_folder import VideoFolder
from blueberry_video.video import process_video, stream_video

OFFSET = 5.0


def write(path: Path, offset: float, num_frames: int = 40) -> Path:
    """Writes frames at 10 per second with gray level 20 + 5 i in frame i, the first one at ``offset`` seconds."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with av.open(str(path), "w") as output:
        stream = output.add_stream("libx264", rate=10)
        stream.width, stream.height, stream.pix_fmt, stream.gop_size = 64, 64, "yuv420p", 10
        stream.codec_context.time_base = Fraction(1, 1000)
        for i in range(num_frames):
            frame = av.VideoFrame.from_ndarray(np.full((64, 64, 3), 20 + 5 * i, np.uint8), format="rgb24")
            frame.pts, frame.time_base = round(1000 * offset) + 100 * i, Fraction(1, 1000)
            output.mux(stream.encode(frame))
        output.mux(stream.encode())
    return path


@pytest.fixture(scope="module")
def videos(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("videos")
    return write(folder / "punctual.mkv", 0.0), write(folder / "late.mkv", OFFSET)


@pytest.mark.parametrize(
    "options",
    [
        {"fps": 2.0},
        {"num_frames": 6},
        {"fps": 5.0, "video_start": 1.0, "video_end": 3.0},
        {"sampling": "adaptive", "num_frames": 6},
        {"sampling": "keyframes", "num_frames": 4},
        {"fps": 2.0, "model": "qwen3-vl"},
    ],
    ids=str,
)
def test_late_videos_are_processed_as_punctual_ones(videos: tuple[Path, Path], options: dict):
    punctual, late = (process_video(path, **options) for path in videos)
    assert (punctual.metadata.start_time, late.metadata.start_time) == (0.0, OFFSET)
    assert late.metadata.frame_indices == punctual.metadata.frame_indices
    times = [index / 10 for index in late.metadata.frame_indices]  # from the first frame of the file
    assert late.metadata.timestamps == pytest.approx(times)
    assert punctual.metadata.timestamps == pytest.approx(times)
    for name in ("duration", "sample_fps", "original_fps", "total_tokens"):
        assert getattr(late.metadata, name) == pytest.approx(getattr(punctual.metadata, name))
    assert late.quality["coverage"] == pytest.approx(punctual.quality["coverage"])
    assert torch.equal(late.pixels, punctual.pixels)


def test_streamed_chunks_of_late_videos_have_times_from_the_first_frame(videos: tuple[Path, Path]):
    for path in videos:
        chunks = list(stream_video(path, sampling="all"))
        times = torch.cat([chunk.timestamps for chunk in chunks])
        assert times.tolist() == pytest.approx([i / 10 for i in range(40)])


@pytest.mark.parametrize(
    "sampling",
    [
        {"sampler": "uniform"},
        {"sampler": "random", "stride": 2},
        {"sampler": "fixed_fps", "fps": 2.5},
        {"sampler": "multi_clip", "num_clips": 3},
    ],
    ids=lambda sampling: sampling["sampler"],
)
def test_clips_of_late_videos_equal_those_of_punctual_ones(tmp_path: Path, sampling: dict):
    for name, offset in (("punctual", 0.0), ("late", OFFSET)):
        write(tmp_path / name / "videos" / "a.mkv", offset)
    punctual, late = (VideoFolder(tmp_path / name, 6, metadata="none", **sampling) for name in ("punctual", "late"))
    for i in range(len(late)):
        assert torch.equal(late[i]["video"], punctual[i]["video"])
        assert late[i]["fps"] == pytest.approx(punctual[i]["fps"])
    step = late[0]["video"].float().mean((1, 2, 3)).diff().mean() / 5  # frames of the file per frame of the clip
    assert late[0]["fps"] == pytest.approx(10 / float(step), rel=0.05)
