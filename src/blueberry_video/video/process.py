"""Video preprocessing for multimodal models: source → sample → decode → resize → tokens → format.

Frames are resized as they are decoded, a few at a time, so that memory holds the resized video only. The plan of a
video is computed from its packets before decoding; above a budget, it has fewer frames, then fewer pixels.
"""

import contextlib
import time
import warnings
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass, replace
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor

from blueberry_video.video.cache import Cache, cache_key
from blueberry_video.video.clip import FrameReader, is_list, shown_times, with_reader
from blueberry_video.video.container import open_video
from blueberry_video.video.decode import Frames
from blueberry_video.video.formats import Formatted, format_frames
from blueberry_video.video.messages import read_message
from blueberry_video.video.plan import Plan, check_limits, faster_plans, make_plan
from blueberry_video.video.pool import Outcome, run_in_processes
from blueberry_video.video.quality import Stopwatch, coverage, frame_quality, peak_memory
from blueberry_video.video.resize import resize_to, video_size
from blueberry_video.video.result import ProcessedVideo, VideoChunk, VideoMetadata, from_entry, to_entry
from blueberry_video.video.sampling import seconds_per_frame
from blueberry_video.video.settings import VideoSettings, load_settings, with_overrides
from blueberry_video.video.source import Source, open_source

ENTRY = "3"  # changes with the fields of a cache entry
PACKAGES = ("blueberry-video", "av", "torchcodec", "decord", "torch")  # their versions determine pixels


@dataclass(frozen=True, eq=False)
class Hooks:
    """User functions of the pipeline; each must be importable by name for processing in parallel.

    Attributes:
        preprocess: decoded frames uint8 (n, 3, H, W) → uint8 frames of any one size, before resizing; called with a few
            frames at a time.
        score: candidate frames uint8 (N, 3, h, w), at most 160 pixels per side → importance (N,), at least 0; replaces
            the change scores of ``sampling="adaptive"``.
        formatter: ``ProcessedVideo`` with uint8 frames → its ``frames``; replaces ``format``.
        postprocess: finished ``ProcessedVideo`` → return value of ``process_video``.
    """

    preprocess: Callable[[Tensor], Tensor] | None = None
    score: Callable[[Tensor], Tensor] | None = None
    formatter: Callable[[ProcessedVideo], Any] | None = None
    postprocess: Callable[[ProcessedVideo], Any] | None = None


def process_video(
    source: Any, model: str | Path | None = "qwen2.5-vl", hooks: Hooks | None = None, **overrides: Any
) -> Any:
    """Converts a video to the input of a model.

    Args:
        source: a path, a URL, base64 text, bytes, a binary stream, frames, a chat message: see ``source.open_source``.
            Settings in the part of a message (``{"type": "video", "video": …, "fps": 1.0}``) precede all others.
        model: a name in conf/video, a YAML file, or a processor config saved by HuggingFace: see ``settings``.
        hooks: user functions.
        overrides: any field of the sections of ``VideoSettings``: ``fps=1.0, max_frames=32, format="huggingface"``.

    Returns:
        A ``ProcessedVideo``, or the return value of ``hooks.postprocess``.

    Raises:
        VideoError: a fault of the video; see ``errors`` for the subclasses.
        FileNotFoundError: the file does not exist.
        ValueError, TypeError: an unknown model or override, or values that do not fit this video.
    """
    return VideoProcessor(load_settings(model, overrides), hooks)(source)


def process_videos(
    sources: Iterable[Any],
    model: str | Path | None = "qwen2.5-vl",
    hooks: Hooks | None = None,
    workers: int = 2,
    ordered: bool = True,
    on_progress: Callable[[int, int], None] | None = None,
    **overrides: Any,
) -> Iterator[Outcome]:
    """Processes many videos in worker processes, each within ``timeout`` and ``process_memory_bytes``; a failure does
    not stop the others.

    Args:
        sources: any iterable, consumed as videos are processed.
        model, hooks, overrides: as ``process_video``.
        workers: number of processes.
        ordered: yield outcomes in the order of the sources, else as they finish.
        on_progress: called with (done, failed) after each video.

    Yields:
        ``Outcome``: ``value`` is the ProcessedVideo, or ``error`` the exception, with seconds and peak memory.
    """
    return VideoProcessor(load_settings(model, overrides), hooks).map(sources, workers, ordered, on_progress)


def stream_video(
    source: Any, model: str | Path | None = "qwen2.5-vl", hooks: Hooks | None = None, **overrides: Any
) -> Iterator[VideoChunk]:
    """Processes a video of any length at constant memory, ``chunk_frames`` frames at a time; all frames by default.

    The concatenated chunks equal the formatted video. Pixel budgets of a whole video apply to each chunk. Arguments and
    exceptions are those of :func:`process_video`.
    """
    if not {"sampling", "fps", "num_frames", "indices"} & overrides.keys():
        overrides["sampling"] = "all"
    overrides.setdefault("max_frames", 2**62)
    return VideoProcessor(load_settings(model, overrides), hooks).stream(source)


class VideoProcessor:
    """``process_video`` with fixed settings and a cache that persists between calls.

    Args:
        settings: see ``settings.load_settings``.
        hooks: user functions; with ``preprocess`` or ``score``, videos are not cached, since a function has no
            fingerprint.
    """

    def __init__(self, settings: VideoSettings, hooks: Hooks | None = None):
        self.settings, self.hooks = settings, hooks or Hooks()
        caches = settings.cache.cache_memory_bytes or settings.cache.cache_folder is not None
        self.cache = Cache(settings.cache) if caches and not (self.hooks.preprocess or self.hooks.score) else None

    def __call__(self, source: Any) -> Any:
        """Processes one video; see ``process_video``."""
        value, named = read_message(source)
        if named:
            return self._with(named)(value)
        if self.settings.run.isolate:
            [outcome] = self.map([source], workers=1)
            if outcome.error is not None:
                raise outcome.error
            return outcome.value
        watch, start = Stopwatch(), time.perf_counter()
        with watch.stage("source"):
            opened = open_source(source, self.settings.source)
        with opened:
            key = "" if self.cache is None else self._key(opened, watch)
            entry = self.cache.get(key) if self.cache is not None else None
            video = from_entry(entry, opened.name) if entry is not None else self._decoded(opened, watch)
            # reductions due to max_seconds depend on the load of the machine
            if self.cache is not None and entry is None and not (self.settings.run.max_seconds and video.degraded):
                try:
                    self.cache.put(key, *to_entry(video))
                except OSError as error:  # the result is valid without the cache
                    warnings.warn(str(error), stacklevel=2)
        if self.settings.run.measure_quality:
            with watch.stage("quality"):
                video = replace(video, quality=self._quality(video))
        with watch.stage("format"):
            times = torch.tensor(video.metadata.timestamps, dtype=torch.float64)
            per_frame = video.metadata.seconds_per_frame
            formatter = self.hooks.formatter
            video = replace(
                video, frames=formatter(video) if formatter else self._format(video.pixels, times, per_frame)
            )
        seconds = time.perf_counter() - start
        rate = {"frames_per_second": video.metadata.num_frames / seconds, "peak_memory": float(peak_memory())}
        video = replace(video, timing=watch.seconds, quality={**video.quality, **rate}, cached=entry is not None)
        return self.hooks.postprocess(video) if self.hooks.postprocess else video

    def plan(self, source: Any) -> Plan:
        """Returns the plan of a video; decodes nothing, except the candidate frames of ``sampling="adaptive"``. Raises
        as :func:`process_video`."""
        value, named = read_message(source)
        if named:
            return self._with(named).plan(value)
        with open_source(value, self.settings.source) as opened:
            limit = self.settings.source.max_frame_pixels
            return with_reader(opened, self.settings.decode, lambda reader: self._plan(reader, Stopwatch()), limit)

    def stream(self, source: Any) -> Iterator[VideoChunk]:
        """Streams one video; see ``stream_video``."""
        value, named = read_message(source)
        if named:
            yield from self._with(named).stream(value)
            return
        settings = self.settings
        if settings.run.isolate or self.hooks.formatter or self.hooks.postprocess:
            raise ValueError(
                f"isolate={settings.run.isolate} and the hooks formatter and postprocess cannot be used with a stream, "
                "which is decoded in this process and formatted chunk by chunk: set isolate=false and remove the hooks."
            )
        with open_source(source, settings.source) as opened:
            if opened.frames is not None:
                yield from self._chunks(FrameReader.of_frames(opened, settings.decode))
                return
            options, limit = settings.decode, settings.source.max_frame_pixels
            stream = (cast(Path, opened.path), options.stream_index, options.num_threads)
            with open_video(*stream, max_frame_pixels=limit, name=opened.name) as video:
                yield from self._chunks(FrameReader.of_video(video, options))

    def map(
        self,
        sources: Iterable[Any],
        workers: int = 2,
        ordered: bool = True,
        on_progress: Callable[[int, int], None] | None = None,
    ) -> Iterator[Outcome]:
        """Processes many videos in worker processes; see ``process_videos``."""
        run = replace(self.settings.run, isolate=False)
        function = partial(_process_one, replace(self.settings, run=run), self.hooks)
        limits: dict[str, Any] = {"workers": workers, "timeout": run.timeout, "memory_bytes": run.process_memory_bytes}
        return run_in_processes(function, sources, **limits, ordered=ordered, on_progress=on_progress)

    def _with(self, overrides: dict[str, Any]) -> "VideoProcessor":
        """Returns a processor with the settings of a message, and the same cache."""
        changed = VideoProcessor(with_overrides(self.settings, overrides), self.hooks)
        changed.cache = self.cache
        return changed

    # ---- stages ------------------------------------------------------------------------------------------------------

    def _decoded(self, source: Source, watch: Stopwatch) -> ProcessedVideo:
        """Runs all stages except quality and format."""
        begun = time.perf_counter()

        def work(reader: FrameReader) -> ProcessedVideo:
            watch.seconds["index"] = watch.seconds.get("index", 0.0) + time.perf_counter() - begun
            plan = self._plan(reader, watch)
            limit = self.settings.run.max_seconds
            plans = [plan] if limit is None else [plan, *faster_plans(plan, reader.info, self.settings)]
            for plan in plans[:-1]:
                with contextlib.suppress(_LateError):
                    return self._result(plan, reader, source, self._load(plan, reader, watch, begun + (limit or 0.0)))
            return self._result(plans[-1], reader, source, self._load(plans[-1], reader, watch))

        return with_reader(source, self.settings.decode, work, self.settings.source.max_frame_pixels)

    def _plan(self, reader: FrameReader, watch: Stopwatch) -> Plan:
        check_limits(reader.info, self.settings)
        with watch.stage("sample"):
            return make_plan(reader.info, self._sample(reader), self.settings)

    def _sample(self, reader: FrameReader) -> list[int]:
        limit = self.settings.source.max_decoded_pixels
        return reader.sample(self.settings.sampling, score=self.hooks.score, max_decoded_pixels=limit)

    def _load(self, plan: Plan, reader: FrameReader, watch: Stopwatch, deadline: float | None = None) -> Frames:
        """Decodes and resizes the frames of a plan; raises ``_LateError`` once it would end after the deadline."""
        begun = time.perf_counter()

        def check_time(done: int, total: int) -> None:
            now = time.perf_counter()
            if deadline is not None and now + (now - begun) / done * (total - done) > deadline:
                raise _LateError

        aspect = reader.info.picture.pixel_aspect
        resized = partial(self._resized, size=(plan.height, plan.width), pixel_aspect=aspect)
        return reader.load(plan.indices, resized, None if deadline is None else 2, watch, check_time)

    def _resized(self, pixels: Tensor, size: tuple[int, int], pixel_aspect: tuple[int, int]) -> Tensor:
        if self.hooks.preprocess:
            given, pixels = pixels, self.hooks.preprocess(pixels)
            right = isinstance(pixels, Tensor) and pixels.dtype == torch.uint8 and pixels.ndim == 4
            if not right or pixels.shape[:2] != given.shape[:2]:
                found = f"{pixels.dtype} {tuple(pixels.shape)}" if isinstance(pixels, Tensor) else type(pixels).__name__
                raise TypeError(
                    f"hooks.preprocess received frames uint8 {tuple(given.shape)} and returned {found}: return uint8 "
                    "(n, 3, H, W) with the same number of frames."
                )
        if self.settings.format.device != "cpu":
            pixels = pixels.to(self.settings.format.device)
        return resize_to(pixels, size, self.settings.resize, pixel_aspect)

    def _result(self, plan: Plan, reader: FrameReader, source: Source, frames: Frames) -> ProcessedVideo:
        info = reader.info
        options = self.settings.sampling
        times = shown_times(info, plan.indices, options)
        distinct = np.unique(times)
        span = float(distinct[-1] - distinct[0])
        metadata = VideoMetadata(
            name=source.name,
            num_frames=len(plan.indices),
            original_fps=info.fps,
            sample_fps=(len(distinct) - 1) / span if span else 0.0,
            seconds_per_frame=seconds_per_frame(info.timestamps, plan.indices, options, info.fps, info.duration),
            timestamps=tuple(times.tolist()),
            duration=info.duration,
            resolution=(plan.height, plan.width),
            total_tokens=plan.tokens.total,
            grid_thw=plan.tokens.grid_thw,
            frame_indices=plan.indices,
            total_frames=info.num_frames,
            original_resolution=(info.height, info.width),
            start_time=float(info.timestamps[0]),
            codec=info.codec,
            container=info.container,
            backend=frames.backend,
            damage=info.damage,
            pixel_aspect=info.picture.pixel_aspect,
            interlaced=info.picture.interlaced,
            hdr=info.picture.hdr,
            primaries=info.picture.primaries,
            has_alpha=info.picture.has_alpha,
        )
        return ProcessedVideo(
            frames=frames.pixels,
            pixels=frames.pixels,
            metadata=metadata,
            missing=frames.missing,
            suspect=frames.suspect,
            memory=plan.memory,
            degraded=plan.degraded,
            failures=frames.failures,
        )

    def _quality(self, video: ProcessedVideo) -> dict[str, float]:
        options, metadata = self.settings.sampling, video.metadata
        rate = metadata.original_fps  # the last frame may be shown for longer than others
        last = (metadata.total_frames - 1) / rate if rate else metadata.duration
        first, last = options.video_start or 0.0, min(last, options.video_end or last)
        covered = coverage(metadata.timestamps, min(first, last), last)
        shares = {"missing_share": video.missing, "suspect_share": video.suspect}
        shown = video.pixels if video.missing.all() else video.pixels[~video.missing]
        return {**covered, **frame_quality(shown), **{key: float(mask.float().mean()) for key, mask in shares.items()}}

    def _format(self, pixels: Tensor, timestamps: Tensor, per_frame: float) -> Formatted:
        tokens = self.settings.tokens
        sizes = (tokens.patch_size, tokens.merge_size, tokens.temporal_patch_size)
        return format_frames(pixels, timestamps, self.settings.format, *sizes, per_frame)

    def _chunks(self, reader: FrameReader) -> Iterator[VideoChunk]:
        info = reader.info
        check_limits(info, self.settings)
        group = self.settings.tokens.temporal_patch_size
        chunk_frames = -(-reader.chunk_frames // group) * group  # whole temporal patches
        indices = sorted(set(self._sample(reader)))
        count = min(len(indices), chunk_frames)
        aspect = info.picture.pixel_aspect
        size = video_size(info.height, info.width, count, self.settings.resize, is_list(info), aspect)
        per_frame = seconds_per_frame(info.timestamps, indices, self.settings.sampling, info.fps, info.duration)
        for chunk in reader.read(indices, chunk_frames):
            pixels = self._resized(chunk.pixels, size, aspect)
            times = chunk.timestamps - float(info.timestamps[0])
            formatted = self._format(pixels, times, per_frame)
            yield VideoChunk(formatted, pixels, chunk.indices, times, chunk.missing, chunk.suspect, chunk.damage)

    def _key(self, source: Source, watch: Stopwatch) -> str:
        """Returns the cache key of the frames; the format is recomputed from the cached frames."""
        with watch.stage("hash"):
            sections = asdict(self.settings)
            for secret in ("request_headers", "token", "token_hosts", "fetch_retries"):
                del sections["source"][secret]
            of_frames = {name: sections[name] for name in ("source", "decode", "sampling", "resize", "tokens", "run")}
            versions = {package: _version(package) for package in PACKAGES}
            return cache_key(source.content_hash(), of_frames, versions | {"entry": ENTRY})


class _LateError(Exception):
    """Decoding would end after the deadline."""


def _process_one(settings: VideoSettings, hooks: Hooks, source: Any) -> Any:
    """Processes one video in a worker process."""
    return VideoProcessor(settings, hooks)(source)


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "none"
