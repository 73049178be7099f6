"""Video processing pipeline, usable on its own: converts any video to the input of a multimodal model.

    from blueberry_video.video import process_video
    video = process_video("clip.mp4", model="qwen2.5-vl", fps=1.0, max_frames=32, format="huggingface")
    video.frames, video.metadata.timestamps, video.metadata.total_tokens, video.timing

One file per stage: source → decode → sampling → resize → tokens → formats. ``clip.load_clip`` opens, samples, decodes
and resizes a video in one call, for datasets; ``process`` runs all stages. ``conf/video`` holds the settings of each
model.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from blueberry_video.video.asynchronous import aprocess_video, aprocess_videos
    from blueberry_video.video.clip import load_clip
    from blueberry_video.video.errors import (
        BrokenVideoError,
        DamagedVideoError,
        FetchError,
        KilledError,
        LimitError,
        RefusedSourceError,
        VideoError,
    )
    from blueberry_video.video.live import LiveStream
    from blueberry_video.video.process import Hooks, VideoProcessor, process_video, process_videos, stream_video
    from blueberry_video.video.result import ProcessedVideo, VideoChunk, VideoMetadata
    from blueberry_video.video.scenes import Scene, find_scenes, process_streams
    from blueberry_video.video.settings import load_settings, models

_HOMES = {
    "asynchronous": "aprocess_video aprocess_videos",
    "clip": "load_clip",
    "errors": "BrokenVideoError DamagedVideoError FetchError KilledError LimitError RefusedSourceError VideoError",
    "live": "LiveStream",
    "process": "Hooks VideoProcessor process_video process_videos stream_video",
    "result": "ProcessedVideo VideoChunk VideoMetadata",
    "scenes": "Scene find_scenes process_streams",
    "settings": "load_settings models",
}
__all__ = [
    "BrokenVideoError",
    "DamagedVideoError",
    "FetchError",
    "Hooks",
    "KilledError",
    "LimitError",
    "LiveStream",
    "ProcessedVideo",
    "RefusedSourceError",
    "Scene",
    "VideoChunk",
    "VideoError",
    "VideoMetadata",
    "VideoProcessor",
    "aprocess_video",
    "aprocess_videos",
    "find_scenes",
    "load_clip",
    "load_settings",
    "models",
    "process_streams",
    "process_video",
    "process_videos",
    "stream_video",
]


def __getattr__(name: str) -> Any:
    """Imports a public name on first access, so that worker processes which use one module do not import torch."""
    for home, names in _HOMES.items():
        if name in names.split():
            return getattr(import_module(f"{__name__}.{home}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
