"""Transform for videos in a column of a HuggingFace dataset, processed when their row is read.

from datasets import load_dataset
processor = VideoProcessor(load_settings("qwen2.5-vl", {"num_frames": 16, "format": "huggingface"}))
dataset = process_column(load_dataset("…"), "video", processor)
dataset[0]["video"].frames["pixel_values_videos"]
"""

from collections.abc import Callable
from typing import Any


class VideoColumn:
    """Batch transform for ``Dataset.with_transform`` and ``IterableDataset.map`` (batched).

    Args:
        column: contains paths, bytes or dicts of both, like a column of type ``Video(decode=False)``.
        processor: function from a video to its replacement, such as a ``VideoProcessor``.
    """

    def __init__(self, column: str, processor: Callable[[Any], Any]):
        self.column, self.processor = column, processor

    def __call__(self, batch: dict[str, list]) -> dict[str, list]:
        """Processes the videos of a batch (column -> list of values); empty cells remain None.

        Raises:
            KeyError: there is no such column.
            VideoError: a video cannot be read.
        """
        if self.column not in batch:
            raise KeyError(f"column={self.column!r} is not in the dataset: use one of {', '.join(sorted(batch))}.")
        videos = [None if video is None else self.processor(video) for video in batch[self.column]]
        return {**batch, self.column: videos}


def process_column(dataset: Any, column: str, processor: Callable[[Any], Any]) -> Any:
    """Returns a ``datasets.Dataset`` that processes videos when their row is read.

    The decoding of the column is disabled: files and bytes are read by this package, with its checks.
    """
    from datasets import Video  # an optional package

    if isinstance(dataset.features[column], Video):
        dataset = dataset.cast_column(column, Video(decode=False))
    return dataset.with_transform(VideoColumn(column, processor))
