"""Transform of a column of videos, applied when rows are read."""

from pathlib import Path

import av
import numpy as np
import pytest

from blueberry_video.data.video_column import VideoColumn, process_column
from blueberry_video.video import VideoProcessor, load_settings


@pytest.fixture
def processor() -> VideoProcessor:
    return VideoProcessor(load_settings(None, {"num_frames": 4}))


@pytest.fixture
def clip(tmp_path: Path) -> Path:
    path = tmp_path / "clip.avi"
    with av.open(str(path), "w") as output:
        stream = output.add_stream("mjpeg", rate=10)
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuvj420p"
        for level in range(0, 200, 20):
            output.mux(stream.encode(av.VideoFrame.from_ndarray(np.full((48, 64, 3), level, np.uint8), format="rgb24")))
        output.mux(stream.encode())
    return path


def test_all_types_of_cells_are_processed(clip: Path, processor: VideoProcessor):
    cells = [str(clip), {"path": str(clip), "bytes": None}, {"path": None, "bytes": clip.read_bytes()}, None]
    found = VideoColumn("video", processor)({"video": cells, "label": [1, 2, 3, 4]})
    assert found["label"] == [1, 2, 3, 4]
    assert [video and video.metadata.num_frames for video in found["video"]] == [4, 4, 4, None]
    assert found["video"][0].metadata.frame_indices == (0, 3, 6, 9)
    with pytest.raises(KeyError, match=r"column='clip'.*\blabel, video\b"):
        VideoColumn("clip", processor)({"video": cells, "label": []})


def test_rows_of_a_dataset_are_processed_when_read(clip: Path, processor: VideoProcessor):
    datasets = pytest.importorskip("datasets", reason="datasets is not installed")
    rows = datasets.Dataset.from_dict({"video": [str(clip)] * 3, "label": [0, 1, 2]})
    for dataset in (rows, rows.cast_column("video", datasets.Video())):
        row = process_column(dataset, "video", processor)[1]
        assert row["label"] == 1
        assert row["video"].metadata.frame_indices == (0, 3, 6, 9)
