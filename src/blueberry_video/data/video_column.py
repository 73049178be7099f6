"""Videos in a column of a HuggingFace dataset, processed when their row is read.

from datasets import load_dataset
processor = VideoProcessor(load_settings("qwen2.5-vl", {"num_frames": 16, "format": "huggingface"}))
dataset = process_column(load_dataset("…"), "video", processor)
dataset[0]["video"].frames["pixel_values_videos"]
"""

from collections.abc import Callable
from typing import Any


class VideoColumn:
    """A batch transform, as ``Dataset.with_transform`` and ``IterableDataset.map`` (batched) take it.

    Args:
        column: holds paths, bytes or dicts of both, as a column of type ``Video(decode=False)`` does.
        processor: a video → what takes its place, such as a ``VideoProcessor``.
    """

    def __init__(self, column: str, processor: Callable[[Any], Any]):
        self.column, self.processor = column, processor

    def __call__(self, batch: dict[str, list]) -> dict[str, list]:
        """Columns (name → list of values) → the same with processed videos; empty cells stay None.

        Raises:
            KeyError: there is no such column.
            VideoError: something is wrong with a video.
        """
        if self.column not in batch:
            raise KeyError(f"the dataset has no column {self.column!r}: choose from {', '.join(sorted(batch))}.")
        videos = [None if video is None else self.processor(video) for video in batch[self.column]]
        return {**batch, self.column: videos}


def process_column(dataset: Any, column: str, processor: Callable[[Any], Any]) -> Any:
    """A ``datasets.Dataset`` whose videos are processed when their row is read.

    The column's own decoding is switched off: files and bytes go through this pipeline, with its checks.
    """
    from datasets import Video  # an optional package

    if isinstance(dataset.features[column], Video):
        dataset = dataset.cast_column(column, Video(decode=False))
    return dataset.with_transform(VideoColumn(column, processor))
