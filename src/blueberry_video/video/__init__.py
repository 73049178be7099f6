"""The video processing pipeline, usable alone: any video in, exactly what a multimodal model takes out.

    from blueberry_video.video import process_video
    video = process_video("clip.mp4", model="qwen2.5-vl", fps=1.0, max_frames=32, format="huggingface")
    video.frames, video.metadata.timestamps, video.metadata.total_tokens, video.timing

One file a stage: source → decode → sampling → resize → tokens → formats; ``process`` runs them, ``conf/video`` holds
the settings of each model.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from blueberry_video.video.errors import (
        BrokenVideoError,
        DamagedVideoError,
        FetchError,
        KilledError,
        LimitError,
        RefusedSourceError,
        VideoError,
    )
    from blueberry_video.video.process import Hooks, VideoProcessor, process_video, process_videos, stream_video
    from blueberry_video.video.result import ProcessedVideo, VideoChunk, VideoMetadata
    from blueberry_video.video.settings import load_settings, models

_HOMES = {
    "errors": (
        "BrokenVideoError",
        "DamagedVideoError",
        "FetchError",
        "KilledError",
        "LimitError",
        "RefusedSourceError",
        "VideoError",
    ),
    "process": ("Hooks", "VideoProcessor", "process_video", "process_videos", "stream_video"),
    "result": ("ProcessedVideo", "VideoChunk", "VideoMetadata"),
    "settings": ("load_settings", "models"),
}
__all__ = [
    "BrokenVideoError",
    "DamagedVideoError",
    "FetchError",
    "Hooks",
    "KilledError",
    "LimitError",
    "ProcessedVideo",
    "RefusedSourceError",
    "VideoChunk",
    "VideoError",
    "VideoMetadata",
    "VideoProcessor",
    "load_settings",
    "models",
    "process_video",
    "process_videos",
    "stream_video",
]


def __getattr__(name: str) -> Any:
    """Imports a name when it is asked for: a worker process that needs one file here does not wait for torch."""
    for home, names in _HOMES.items():
        if name in names:
            return getattr(import_module(f"{__name__}.{home}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
