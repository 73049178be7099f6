"""Results of the pipeline and their cache entries."""

import json
from dataclasses import asdict, dataclass, field
from typing import Any

from torch import Tensor

from blueberry_video.video.cache import Entry
from blueberry_video.video.tokens import MemoryEstimate


@dataclass(frozen=True)
class VideoMetadata:
    """Metadata of a processed video.

    Attributes:
        name: name of the source.
        num_frames: number of sampled frames, including repetitions.
        original_fps: frames per second of the file, from its timestamps; 0.0 if unknown.
        sample_fps: (n - 1) / (last - first timestamp) of the distinct sampled frames; 0.0 for a single frame.
        seconds_per_frame: seconds of the video, or of its range, per distinct sampled frame; Qwen2.5-VL's
            ``second_per_grid_ts`` is temporal_patch_size times it.
        timestamps: seconds from the first frame of the file; of a list without a rate, at two frames per second.
        duration: duration of the file in seconds.
        resolution: (height, width) of the resized frames.
        total_tokens: visual tokens plus the text tokens that the prompt adds around them.
        grid_thw: patches in time, height and width; None for models without a patch grid.
        frame_indices: indices of the frames in the file.
        total_frames: number of frames of the file.
        original_resolution: (height, width) after rotation.
        start_time: timestamp of the first frame in the container.
        codec, container: FFmpeg's names; the kind of the source if it was not decoded.
        backend: the decoder; with ``(salvage)`` if frames may be missing or suspect.
        damage: what the file lacks according to its headers, such as "incomplete: 5000 of 9000 bytes, …"; empty for a
            whole file, and where the container does not tell.
        pixel_aspect: (width, height) of a pixel of the file after rotation; ``square_pixels`` corrects it.
        interlaced: ``top`` or ``bottom``, the field of the file that is displayed first; None if it is progressive.
            ``deinterlace`` removes it.
        hdr: ``pq`` or ``hlg``, transfer characteristics of the file; None if it is SDR. ``tone_map`` maps it to SDR.
        primaries: FFmpeg's name of the color primaries of the file; None where it states none.
        has_alpha: whether the frames of the file have an alpha channel, and were blended over white.
    """

    name: str
    num_frames: int
    original_fps: float
    sample_fps: float
    seconds_per_frame: float
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
    damage: str = ""
    pixel_aspect: tuple[int, int] = (1, 1)
    interlaced: str | None = None
    hdr: str | None = None
    primaries: str | None = None
    has_alpha: bool = False


@dataclass(frozen=True, eq=False)
class ProcessedVideo:
    """Output of ``process_video``.

    Attributes:
        frames: frames in the requested format; uint8 (T, 3, H, W) RGB by default.
        pixels: the resized frames, uint8 (T, 3, H, W) RGB, for any format.
        metadata: see ``VideoMetadata``.
        missing, suspect: bool (T,), see ``decode.Frames``.
        memory: memory in the model, for each precision.
        timing: seconds of each stage: source, index, sample, decode, resize, quality, format.
        quality: coverage, largest_gap, duplicate_share, black_share, contrast, frames_per_second, peak_memory.
        degraded: descriptions of the reductions that meet a budget.
        failures: decoder → reason of its failure.
        cached: whether the frames were read from the cache.
    """

    frames: Any
    pixels: Tensor
    metadata: VideoMetadata
    missing: Tensor
    suspect: Tensor
    memory: dict[str, MemoryEstimate]
    timing: dict[str, float] = field(default_factory=dict)
    quality: dict[str, float] = field(default_factory=dict)
    degraded: tuple[str, ...] = ()
    failures: dict[str, str] = field(default_factory=dict)
    cached: bool = False

    def __repr__(self) -> str:
        known = self.metadata
        size = f"{known.num_frames} frames of {known.resolution[0]}x{known.resolution[1]}"
        lost = f", {int(self.missing.sum())} missing" if self.missing.any() else ""
        damage = f", {known.damage}" if known.damage else ""
        return f"ProcessedVideo({known.name!r}, {size}, {known.total_tokens} tokens{lost}{damage})"

    def summary(self) -> dict[str, Any]:
        """Returns everything except the frames as plain values, for JSON or a row of ``quality.wandb_table``."""
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
    """Chunk of a streamed video: formatted frames, uint8 pixels, frame indices, timestamps in seconds, masks, and what
    the file lacks (``VideoMetadata.damage``)."""

    frames: Any
    pixels: Tensor
    indices: tuple[int, ...]
    timestamps: Tensor
    missing: Tensor
    suspect: Tensor
    damage: str = ""

    def __repr__(self) -> str:
        height, width = self.pixels.shape[2:]
        times = f"{float(self.timestamps[0]):.3f} to {float(self.timestamps[-1]):.3f} s"
        return f"VideoChunk({len(self.indices)} frames of {height}x{width}, {times})"


def to_entry(video: ProcessedVideo) -> Entry:
    """Converts a video to a cache entry."""
    memory = {precision: asdict(estimate) for precision, estimate in video.memory.items()}
    text = json.dumps([asdict(video.metadata), memory, video.degraded, video.failures])
    return {"pixels": video.pixels, "missing": video.missing, "suspect": video.suspect}, text


def from_entry(entry: Entry, name: str) -> ProcessedVideo:
    """Converts a cache entry to a video named ``name``; ``timing`` and ``quality`` are empty."""
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
        degraded=tuple(degraded),
        failures=failures,
    )
