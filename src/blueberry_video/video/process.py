"""Any video in, exactly what a multimodal model takes out: source → decode → sample → resize → tokens → format.

Frames are resized as they are decoded, a few at a time, so that memory holds the resized video and never the decoded
one. What a video will be (frames, size, tokens, bytes) is known from its packets before anything is decoded; where that
is over a budget, it is degraded in stated steps: fewer frames, then fewer pixels.
"""

import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from blueberry_video.video.cache import Cache, cache_key
from blueberry_video.video.container import OpenVideo, VideoInfo, open_video
from blueberry_video.video.decode import DecodeOptions, Frames, decode_in_chunks, with_fallbacks
from blueberry_video.video.formats import Formatted, format_frames
from blueberry_video.video.frame_list import FrameList
from blueberry_video.video.plan import Plan, check_decoded, check_limits, faster_plans, make_plan
from blueberry_video.video.pool import Outcome, run_in_processes
from blueberry_video.video.quality import Stopwatch, coverage, frame_quality, peak_memory
from blueberry_video.video.resize import crop, resize, video_size
from blueberry_video.video.result import ProcessedVideo, VideoChunk, VideoMetadata, from_entry, to_entry
from blueberry_video.video.sampling import candidate_frames, change_scores, choose
from blueberry_video.video.settings import VideoSettings, load_settings
from blueberry_video.video.source import Source, open_source

CHUNK_BYTES = 2**27  # of decoded frames in memory at a time
CANDIDATE_SIDE = 160  # pixels of the longer side of frames that scores are computed on
PACKAGES = ("blueberry-video", "av", "torchcodec", "decord", "torch")  # whose versions decide about pixels
Read = Callable[[Sequence[int], int], Iterator[Frames]]  # ascending frame numbers, frames a chunk → chunks


@dataclass(frozen=True, eq=False)
class Hooks:
    """What a user puts into the pipeline; each must be importable by name where videos are processed in parallel.

    Attributes:
        preprocess: decoded frames uint8 (n, 3, H, W) of one size → the same of any one size, before resizing; sees a
            few frames at a time.
        score: candidate frames uint8 (N, 3, h, w), at most 160 pixels wide and high → how much each matters, (N,) at
            least 0: for ``sampling="adaptive"``, in the place of how much the picture changes.
        formatter: the ProcessedVideo, with its uint8 frames → whatever is wanted, in the place of ``format``.
        postprocess: the finished ProcessedVideo → what ``process_video`` returns.
    """

    preprocess: Callable[[Tensor], Tensor] | None = None
    score: Callable[[Tensor], Tensor] | None = None
    formatter: Callable[[ProcessedVideo], Any] | None = None
    postprocess: Callable[[ProcessedVideo], Any] | None = None


def process_video(
    source: Any, model: str | Path | None = "qwen2.5-vl", hooks: Hooks | None = None, **overrides: Any
) -> Any:
    """Turns any video into what a model takes.

    Args:
        source: a path, an address, base64 text, bytes, a binary stream, frames: see ``source.open_source``.
        model: a name in conf/video, a YAML file, or what HuggingFace saved beside a model: see ``settings``.
        hooks: a user's functions.
        overrides: any field of the sections of ``VideoSettings``: ``fps=1.0, max_frames=32, format="huggingface"``.

    Returns:
        A ``ProcessedVideo``, or what ``hooks.postprocess`` makes of it.

    Raises:
        VideoError: something is wrong with the video; the subclass says what (see ``errors``).
        FileNotFoundError: there is no such file.
        ValueError, TypeError: an unknown model or override, or values that this video cannot meet.
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
    """Many videos in killable processes, each within ``timeout`` and ``process_memory_bytes``; one that fails never
    stops the rest.

    Args:
        sources, model, hooks, overrides: as ``process_video``; sources may be any iterable, and is read no faster than
            videos are processed.
        workers: processes.
        ordered: outcomes in the order of the sources, else as they finish.
        on_progress: called with (done, failed) after each.

    Yields:
        ``Outcome``: ``value`` is the ProcessedVideo, or ``error`` what went wrong, with seconds and peak memory.
    """
    processor = VideoProcessor(load_settings(model, overrides), hooks)
    return processor.map(sources, workers, ordered, on_progress)


def stream_video(
    source: Any, model: str | Path | None = "qwen2.5-vl", hooks: Hooks | None = None, **overrides: Any
) -> Iterator[VideoChunk]:
    """A video of any length at constant memory, ``chunk_frames`` frames at a time; every frame unless told otherwise.

    Formatted chunks, one after the other, are the formatted whole. Pixel budgets over a whole video count for a chunk.

    Args:
        source, model, hooks, overrides: as ``process_video``.

    Raises:
        As ``process_video``.
    """
    if not {"sampling", "fps", "num_frames", "indices"} & overrides.keys():
        overrides["sampling"] = "all"
    overrides.setdefault("max_frames", 2**62)
    return VideoProcessor(load_settings(model, overrides), hooks).stream(source)


class VideoProcessor:
    """``process_video`` with its settings read once and its cache kept.

    Args:
        settings: see ``settings.load_settings``.
        hooks: a user's functions; videos that pass ``preprocess`` or ``score`` are not cached, for a function has no
            fingerprint.
    """

    def __init__(self, settings: VideoSettings, hooks: Hooks | None = None):
        self.settings, self.hooks = settings, hooks or Hooks()
        caches = settings.cache.cache_memory_bytes or settings.cache.cache_folder is not None
        self.cache = Cache(settings.cache) if caches and not (self.hooks.preprocess or self.hooks.score) else None

    def __call__(self, source: Any) -> Any:
        """As ``process_video``."""
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
            # what was given up for want of time is not what another day would give
            if self.cache is not None and entry is None and not (self.settings.run.max_seconds and video.degraded):
                try:
                    self.cache.put(key, *to_entry(video))
                except OSError as error:  # the video is there: only the next one will take as long
                    warnings.warn(str(error), stacklevel=2)
        if self.settings.run.measure_quality:
            with watch.stage("quality"):
                video = replace(video, quality=self._quality(video))
        with watch.stage("format"):
            video = replace(video, frames=self._formatted(video))
        seconds = time.perf_counter() - start
        rate = {"frames_per_second": video.metadata.num_frames / seconds, "peak_memory": float(peak_memory())}
        video = replace(video, timing=watch.seconds, quality={**video.quality, **rate}, cached=entry is not None)
        return self.hooks.postprocess(video) if self.hooks.postprocess else video

    def plan(self, source: Any) -> Plan:
        """What a video will be; decodes nothing, but for ``sampling="adaptive"`` its candidate frames.

        Raises:
            As ``process_video``.
        """
        with open_source(source, self.settings.source) as opened:
            return self._on(opened, lambda info, read: self._plan(info, read, Stopwatch()))

    def stream(self, source: Any) -> Iterator[VideoChunk]:
        """As ``stream_video``."""
        settings = self.settings
        if settings.run.isolate or self.hooks.formatter or self.hooks.postprocess:
            raise ValueError(
                "a stream is decoded in this process, and formatted a chunk at a time: leave out isolate, and the "
                "hooks formatter and postprocess."
            )
        with open_source(source, settings.source) as opened:
            if opened.frames is not None:
                info = _info_of(opened, opened.frames)
                yield from self._chunks(info, _reader_of(opened.frames, info))
                return
            assert opened.path is not None
            given = (settings.decode.stream_index, settings.decode.num_threads)
            largest = settings.source.max_frame_pixels
            with open_video(opened.path, *given, max_frame_pixels=largest, name=opened.name) as video:
                yield from self._chunks(video.info, _reader(video, settings.decode))

    def map(
        self,
        sources: Iterable[Any],
        workers: int = 2,
        ordered: bool = True,
        on_progress: Callable[[int, int], None] | None = None,
    ) -> Iterator[Outcome]:
        """As ``process_videos``."""
        run = replace(self.settings.run, isolate=False)
        function = partial(_process_one, replace(self.settings, run=run), self.hooks)
        return run_in_processes(
            function,
            sources,
            workers=workers,
            timeout=run.timeout,
            memory_bytes=run.process_memory_bytes,
            ordered=ordered,
            on_progress=on_progress,
        )

    # ---- stages ------------------------------------------------------------------------------------------------------

    def _on(self, source: Source, work: Callable[[VideoInfo, Read], Any]) -> Any:
        """Runs ``work`` on what the source's packets say and a function that reads its frames."""
        if source.frames is not None:
            info = _info_of(source, source.frames)
            return work(info, _reader_of(source.frames, info))
        assert source.path is not None

        def on_file(video: OpenVideo, options: DecodeOptions) -> Any:
            return work(video.info, _reader(video, options))

        largest = self.settings.source.max_frame_pixels
        return with_fallbacks(source.path, self.settings.decode, on_file, largest, source.name)

    def _decoded(self, source: Source, watch: Stopwatch) -> ProcessedVideo:
        """Everything but quality and format."""
        begun = time.perf_counter()

        def work(info: VideoInfo, read: Read) -> ProcessedVideo:
            watch.seconds["index"] = watch.seconds.get("index", 0.0) + time.perf_counter() - begun
            plan = self._plan(info, read, watch)
            limit = self.settings.run.max_seconds
            plans = [plan] if limit is None else [plan, *faster_plans(plan, info, self.settings)]
            for number, plan in enumerate(plans):
                deadline = float("inf") if limit is None or number == len(plans) - 1 else begun + limit
                taken = self._take(plan, info, read, watch, deadline)
                if taken is not None:
                    break
            assert taken is not None
            return self._result(plan, info, source, *taken)

        return self._on(source, work)

    def _plan(self, info: VideoInfo, read: Read, watch: Stopwatch) -> Plan:
        check_limits(info, self.settings)
        with watch.stage("sample"):
            return make_plan(info, self._choose(info, read), self.settings)

    def _choose(self, info: VideoInfo, read: Read) -> list[int]:
        options = self.settings.sampling
        if info.fps == 0 and options.sampling == "fps" and options.num_frames is None and options.indices is None:
            # frames that are given without times have been chosen already
            options = replace(options, sampling="all", fps=None)
            if info.num_frames > options.max_frames:
                options = replace(options, sampling="uniform", num_frames=options.max_frames)
        times, keyframes = info.timestamps, info.keyframes.tolist()
        if options.sampling != "adaptive" or options.indices is not None:
            return choose(times, options, keyframes)
        candidates = sorted(set(candidate_frames(times, options)))
        check_decoded(info, candidates, self.settings)
        scale = min(1.0, CANDIDATE_SIDE / max(info.height, info.width))
        size = (max(1, round(info.height * scale)), max(1, round(info.width * scale)))
        chunks = read(candidates, self._chunk_frames(info))
        small = torch.cat([resize(chunk.pixels, size, "fast", "bilinear").contiguous() for chunk in chunks])
        scores = self.hooks.score(small) if self.hooks.score else change_scores(small)
        return choose(times, options, keyframes, scores)

    def _take(
        self, plan: Plan, info: VideoInfo, read: Read, watch: Stopwatch, deadline: float
    ) -> tuple[Tensor, Tensor, Frames] | None:
        """(pixels, missing and suspect, last chunk) of the plan's frames; None where they would be too late."""
        wanted = sorted(set(plan.indices))
        hurried = deadline < float("inf")
        chunk_frames = 2 if hurried else self._chunk_frames(info)
        pixels = torch.empty(len(wanted), 3, plan.height, plan.width, dtype=torch.uint8)
        masks = torch.zeros(2, len(wanted), dtype=torch.bool)
        position, begun = 0, time.perf_counter()
        chunks = read(wanted, chunk_frames)
        chunk: Frames | None = None
        while position < len(wanted):
            with watch.stage("decode"):
                chunk = next(chunks)
            with watch.stage("resize"):
                rows = slice(position, position + len(chunk.indices))
                pixels[rows] = self._resized(chunk.pixels, (plan.height, plan.width))
                masks[:, rows] = torch.stack((chunk.missing, chunk.suspect))
            position += len(chunk.indices)
            now = time.perf_counter()
            if hurried and now + (now - begun) / position * (len(wanted) - position) > deadline:
                return None
        assert chunk is not None
        if len(wanted) < len(plan.indices):
            rows_of = {index: row for row, index in enumerate(wanted)}
            order = torch.tensor([rows_of[index] for index in plan.indices])
            pixels, masks = pixels[order], masks[:, order]
        return pixels, masks, chunk

    def _resized(self, pixels: Tensor, size: tuple[int, int]) -> Tensor:
        if self.hooks.preprocess:
            given, pixels = pixels, self.hooks.preprocess(pixels)
            right = isinstance(pixels, Tensor) and pixels.dtype == torch.uint8 and pixels.ndim == 4
            if not right or pixels.shape[:2] != given.shape[:2]:
                found = f"{pixels.dtype} {tuple(pixels.shape)}" if isinstance(pixels, Tensor) else type(pixels).__name__
                raise TypeError(
                    f"hooks.preprocess was given frames uint8 {tuple(given.shape)} and returned {found}: return as "
                    "many frames, uint8 (n, 3, H, W)."
                )
        options = self.settings.resize
        device = self.settings.format.device
        if device != "cpu":
            pixels = pixels.to(device)
        how = crop if options.rule == "crop" and options.resized_height is None else resize
        return how(pixels, size, options.resample, options.interpolation)

    def _result(
        self, plan: Plan, info: VideoInfo, source: Source, pixels: Tensor, masks: Tensor, last: Frames
    ) -> ProcessedVideo:
        times = info.timestamps[list(plan.indices)] - info.timestamps[0]
        distinct = np.unique(times)
        span = float(distinct[-1] - distinct[0])
        metadata = VideoMetadata(
            name=source.name,
            num_frames=len(plan.indices),
            original_fps=info.fps,
            sample_fps=(len(distinct) - 1) / span if span else 0.0,
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
            backend=last.backend,
        )
        return ProcessedVideo(
            pixels, pixels, metadata, masks[0], masks[1], plan.memory, {}, {}, plan.degraded, last.failures
        )

    def _quality(self, video: ProcessedVideo) -> dict[str, float]:
        options, metadata = self.settings.sampling, video.metadata
        last = metadata.duration - (1 / metadata.original_fps if metadata.original_fps else 0.0)
        first, last = options.video_start or 0.0, min(last, options.video_end or last)
        covered = coverage(metadata.timestamps, min(first, last), last)
        shares = {"missing_share": video.missing, "suspect_share": video.suspect}
        shown = video.pixels if video.missing.all() else video.pixels[~video.missing]
        return {**covered, **frame_quality(shown), **{key: float(mask.float().mean()) for key, mask in shares.items()}}

    def _formatted(self, video: ProcessedVideo) -> Any:
        if self.hooks.formatter:
            return self.hooks.formatter(video)
        return self._format(video.pixels, torch.tensor(video.metadata.timestamps, dtype=torch.float64))

    def _format(self, pixels: Tensor, timestamps: Tensor) -> Formatted:
        tokens = self.settings.tokens
        sizes = (tokens.patch_size, tokens.merge_size, tokens.temporal_patch_size)
        return format_frames(pixels, timestamps, self.settings.format, *sizes)

    def _chunk_frames(self, info: VideoInfo) -> int:
        """Frames that are decoded before they are resized: fewer where they are large."""
        return max(1, min(self.settings.decode.chunk_frames, CHUNK_BYTES // (3 * info.height * info.width)))

    def _chunks(self, info: VideoInfo, read: Read) -> Iterator[VideoChunk]:
        check_limits(info, self.settings)
        group = self.settings.tokens.temporal_patch_size
        chunk_frames = -(-self._chunk_frames(info) // group) * group  # so that no temporal patch is cut
        indices = sorted(set(self._choose(info, read)))
        size = video_size(info.height, info.width, min(len(indices), chunk_frames), self.settings.resize)
        for chunk in read(indices, chunk_frames):
            pixels = self._resized(chunk.pixels, size)
            times = chunk.timestamps - float(info.timestamps[0])
            formatted = self._format(pixels, times)
            yield VideoChunk(formatted, pixels, chunk.indices, times, chunk.missing, chunk.suspect)

    def _key(self, source: Source, watch: Stopwatch) -> str:
        """Of everything that the frames depend on; the format is made anew from what is cached."""
        with watch.stage("hash"):
            sections = asdict(self.settings)
            of_frames = {name: sections[name] for name in ("source", "decode", "sampling", "resize", "tokens", "run")}
            return cache_key(source.content_hash(), of_frames, _versions())


def _process_one(settings: VideoSettings, hooks: Hooks, source: Any) -> Any:
    """What a worker process does."""
    return VideoProcessor(settings, hooks)(source)


def _reader(video: OpenVideo, options: DecodeOptions) -> Read:
    return lambda wanted, chunk_frames: decode_in_chunks(video, wanted, replace(options, chunk_frames=chunk_frames))


def _reader_of(frames: FrameList, info: VideoInfo) -> Read:
    def read(wanted: Sequence[int], chunk_frames: int) -> Iterator[Frames]:
        for start in range(0, len(wanted), chunk_frames):
            part = tuple(wanted[start : start + chunk_frames])
            times = torch.from_numpy(info.timestamps[list(part)])
            nothing = torch.zeros(len(part), dtype=torch.bool)
            yield Frames(frames.read(part), part, times, nothing, nothing, "frames")

    return read


def _info_of(source: Source, frames: FrameList) -> VideoInfo:
    """Frames that are decoded already, as a video; without known times its rate is 0."""
    known = frames.timestamps
    times = np.arange(len(frames), dtype=np.float64) if known is None else np.array(known, np.float64)
    span = float(times[-1] - times[0])
    fps = (len(times) - 1) / span if known is not None and span else 0.0
    return VideoInfo(
        path=Path(source.name),
        name=source.name,
        num_frames=len(frames),
        fps=fps,
        duration=span + (1 / fps if fps else 0.0),
        height=frames.size[0],
        width=frames.size[1],
        timestamps=times,
        keyframes=np.arange(len(frames)),
        codec=source.kind,
        pixel_format="rgb24",
        container=source.container or source.kind,
        rotation=0,
        stream_index=0,
        lost=0,
    )


def _versions() -> dict[str, str]:
    found = {}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "none"
    return found
