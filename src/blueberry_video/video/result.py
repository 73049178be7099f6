"""What the pipeline returns, and how it is kept in a cache."""

import json
from dataclasses import asdict, dataclass, field
from typing import Any

from torch import Tensor

from blueberry_video.video.cache import Entry
from blueberry_video.video.tokens import MemoryEstimate


@dataclass(frozen=True)
class VideoMetadata:
    """What is known about a processed video.

    Attributes:
        name: of the source.
        num_frames: that were taken, repetitions included.
        original_fps: of the file, from its timestamps; 0.0 where it is unknown.
        sample_fps: of the frames taken: (n - 1) / (last - first timestamp) of the distinct ones; 0.0 for a still.
        timestamps: seconds from the file's first frame.
        duration: seconds of the file.
        resolution: (height, width) of the resized frames.
        total_tokens: visual tokens and what the model's prompt puts around them.
        grid_thw: patches in time, height and width; None where the model has no such grid.
        frame_indices: numbers of the frames in the file.
        total_frames: of the file.
        original_resolution: (height, width) after rotation.
        start_time: timestamp of the first frame in the container.
        codec, container: FFmpeg's names; the source's kind where nothing was decoded.
        backend: which decoder; ``(salvage)`` where frames may be missing or suspect.
    """

    name: str
    num_frames: int
    original_fps: float
    sample_fps: float
    timestamps: tuple[float, ...]
    duration: float
    resolution: tuple[int, int]
    total_tokens: int
    grid_thw: tuple[int, int, int] | None
    frame_indices: tuple[int, ...]
    total_frames: int
    original_resolution: tuple[int, int]
    start_time: float
    codec: str
    container: str
    backend: str


@dataclass(frozen=True, eq=False)
class ProcessedVideo:
    """What ``process_video`` returns.

    Attributes:
        frames: in the format that was asked for; uint8 (T, 3, H, W) RGB by default.
        pixels: the resized frames, uint8 (T, 3, H, W) RGB, whatever the format.
        metadata: see ``VideoMetadata``.
        missing: bool (T,): frames that could not be decoded, in whose place their neighbour stands.
        suspect: bool (T,): frames that were decoded after damage, and may show what was not there.
        memory: bytes in a model's memory, for each precision.
        timing: seconds of each stage: source, index, sample, decode, resize, quality, format.
        quality: coverage, largest_gap, duplicate_share, black_share, contrast, frames_per_second, peak_memory.
        degraded: what was reduced to meet a budget, in words.
        failures: decoder → why it was passed over.
        cached: whether the frames came from the cache.
    """

    frames: Any
    pixels: Tensor
    metadata: VideoMetadata
    missing: Tensor
    suspect: Tensor
    memory: dict[str, MemoryEstimate]
    timing: dict[str, float]
    quality: dict[str, float]
    degraded: tuple[str, ...] = ()
    failures: dict[str, str] = field(default_factory=dict)
    cached: bool = False

    def summary(self) -> dict[str, Any]:
        """All that is known but the frames, as plain values: for JSON, or a row of ``quality.wandb_table``."""
        return {
            "metadata": asdict(self.metadata),
            "timing": self.timing,
            "quality": self.quality,
            "missing": self.missing.nonzero().flatten().tolist(),
            "suspect": self.suspect.nonzero().flatten().tolist(),
            "degraded": list(self.degraded),
            "failures": self.failures,
            "cached": self.cached,
        }


@dataclass(frozen=True, eq=False)
class VideoChunk:
    """A part of a streamed video: formatted frames, their uint8 pixels, numbers, seconds, and the two masks."""

    frames: Any
    pixels: Tensor
    indices: tuple[int, ...]
    timestamps: Tensor
    missing: Tensor
    suspect: Tensor


def to_entry(video: ProcessedVideo) -> Entry:
    text = json.dumps(
        [asdict(video.metadata), {k: asdict(m) for k, m in video.memory.items()}, video.degraded, video.failures]
    )
    return {"pixels": video.pixels, "missing": video.missing, "suspect": video.suspect}, text


def from_entry(entry: Entry, name: str) -> ProcessedVideo:
    tensors, text = entry
    metadata, memory, degraded, failures = json.loads(text)
    metadata = {key: tuple(value) if isinstance(value, list) else value for key, value in metadata.items()}
    return ProcessedVideo(
        frames=tensors["pixels"],
        pixels=tensors["pixels"],
        metadata=VideoMetadata(**{**metadata, "name": name}),
        missing=tensors["missing"],
        suspect=tensors["suspect"],
        memory={precision: MemoryEstimate(**estimate) for precision, estimate in memory.items()},
        timing={},
        quality={},
        degraded=tuple(degraded),
        failures=failures,
    )
