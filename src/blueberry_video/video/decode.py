"""Decoding of selected frames of a local video file to uint8 tensors, with fallback from one decoder to the next.

``decode`` returns all frames at once. ``decode_in_chunks`` yields a few at a time, so that memory is constant for
videos of any length. Both record the reason of every backend that failed. If all fail, ``salvage`` returns the frames
that decode, with a mask of the missing ones.
"""

import contextlib
import itertools
import re
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import NamedTuple, TypeVar

import numpy as np
import torch
from torch import Tensor

from blueberry_video.video.backends import READERS, DamagedError, Reader, backend_failure, read_pyav, readers, salvage
from blueberry_video.video.container import FAILURES, MAX_FRAME_PIXELS, OpenVideo, VideoInfo, open_video
from blueberry_video.video.deinterlace import FILTERS, PROGRESSIVE_CODECS
from blueberry_video.video.errors import BrokenVideoError, DamagedVideoError, one_line
from blueberry_video.video.hdr import CURVES
from blueberry_video.video.picture import Rendering
from blueberry_video.video.ranges import check_at_least, check_between, check_choice, check_indices

BACKENDS = tuple(READERS)  # in the order in which they are tried
_WARNED: set[str] = set()  # kinds of HDR
Result = TypeVar("Result")
Choice = Sequence[int] | Callable[[VideoInfo], Sequence[int]]


@dataclass(frozen=True)
class DecodeOptions:
    """Options for decoding.

    Attributes:
        backends: decoders in the order in which they are tried; decoders that do not work on this machine are skipped.
            Those of other packages (entry points of the group ``blueberry.video.decoders``) have to be named.
        num_threads: decoding threads; 0 selects the number automatically, at least 8 unless frames are very large,
            because threads wait for each other. Use 1 in DataLoader workers.
        stream_index: index of the video stream; None selects FFmpeg's best stream.
        salvage: if no backend can decode all frames, return the frames that decode and a mask of the missing ones.
        max_missing_share: maximum share of missing frames, 0 to 1; above it the video is broken.
        decode_device: ``cpu``, or a CUDA device for torchcodec's hardware decoder, which is faster only for long clips
            of high resolution.
        chunk_frames: number of frames per chunk; bounds memory.
        tone_map: curve that maps HDR video (PQ, HLG) to BT.709 SDR, see ``hdr``: ``bt2390``, the EETF of ITU-R BT.2390;
            ``hable``, as FFmpeg's ``tonemap``; ``none``: the signal is taken as if it were SDR, with a warning.
        deinterlace: FFmpeg's filter for frames that are marked as interlaced: ``bwdif`` or ``yadif``, one frame per
            frame; ``none``.
    """

    backends: tuple[str, ...] = BACKENDS
    num_threads: int = 0
    stream_index: int | None = None
    salvage: bool = True
    max_missing_share: float = 0.5
    decode_device: str = "cpu"
    chunk_frames: int = 16
    tone_map: str = "none"
    deinterlace: str = "none"

    def __post_init__(self) -> None:
        object.__setattr__(self, "backends", tuple(self.backends))
        for name in self.backends:
            check_choice("backends", name, readers())
        if not self.backends:
            raise ValueError(f"backends=() is empty: use at least one of {', '.join(readers())}.")
        check_between(0, 64, num_threads=self.num_threads)
        check_at_least(1, chunk_frames=self.chunk_frames)
        if not re.fullmatch(r"cpu|cuda(:\d+)?", self.decode_device):
            raise ValueError(f"decode_device={self.decode_device!r} is unknown: use cpu, cuda or cuda:0.")
        check_between(0, 1, max_missing_share=self.max_missing_share)
        check_choice("tone_map", self.tone_map, ("none", *CURVES))
        check_choice("deinterlace", self.deinterlace, ("none", *FILTERS))

    def rendering(self, info: VideoInfo) -> Rendering:
        """Returns the processing that a video requires."""
        return Rendering(
            tone_map=self.tone_map if info.picture.hdr else "none",
            deinterlace="none" if info.codec in PROGRESSIVE_CODECS else self.deinterlace,
        )


@dataclass(frozen=True, eq=False)
class Frames:
    """Decoded frames.

    Attributes:
        pixels: uint8 (T, 3, H, W) RGB, channels last in memory (a view of (T, H, W, 3)).
        indices: frame indices in the file.
        timestamps: float64 (T,) seconds.
        missing: bool (T,), True where the frame could not be decoded and is replaced by its nearest neighbor.
        suspect: bool (T,), True where the frame was decoded after damage and may be wrong.
        backend: backend that decoded the frames; the last one if there were several.
        failures: reason of failure by backend.
        damage: what the file lacks according to its headers, see ``VideoInfo.damage``; empty for a whole file.
    """

    pixels: Tensor
    indices: tuple[int, ...]
    timestamps: Tensor
    missing: Tensor
    suspect: Tensor
    backend: str
    failures: dict[str, str] = field(default_factory=dict)
    damage: str = ""


def in_order(frames: Frames, indices: Sequence[int]) -> Frames:
    """Returns frames of ascending distinct indices in the order of ``indices``, which may repeat."""
    if tuple(indices) == frames.indices:
        return frames
    rows = torch.from_numpy(np.searchsorted(frames.indices, indices))
    names = ("pixels", "timestamps", "missing", "suspect")
    return replace(frames, indices=tuple(indices), **{name: getattr(frames, name)[rows] for name in names})


class _Picture(NamedTuple):
    rgb: Tensor  # uint8 (H, W, 3)
    is_missing: bool
    is_suspect: bool
    backend: str


def decode(path: str | Path, choose: Choice, options: DecodeOptions | None = None) -> Frames:
    """Decodes selected frames.

    Args:
        path: a local file.
        choose: frame indices in any order, with repetitions; or a function that returns them for the ``VideoInfo`` of
            the file (its exceptions propagate unchanged).
        options: backends and behavior on failure; defaults to ``DecodeOptions()``.

    Raises:
        FileNotFoundError, RefusedSourceError: as :func:`probe`.
        IndexError: an index outside the file.
        BrokenVideoError: no backend could decode these frames.
    """

    def work(video: OpenVideo, current: DecodeOptions) -> Frames:
        chosen = choose(video.info) if callable(choose) else choose
        chosen = check_indices(chosen, video.info.num_frames, video.info.name)
        wanted = sorted(set(chosen))
        [frames] = decode_in_chunks(video, wanted, replace(current, chunk_frames=len(wanted)))
        return in_order(frames, chosen)

    return with_fallbacks(path, options or DecodeOptions(), work)


def with_fallbacks(
    path: str | Path,
    options: DecodeOptions,
    work: Callable[[OpenVideo, DecodeOptions], Result],
    max_frame_pixels: int = MAX_FRAME_PIXELS,
    name: str | None = None,
) -> Result:
    """Runs ``work`` on an open file, with up to three attempts.

    1. Without salvage, on the packet index.
    2. Without salvage, on an index built by decoding the whole file, if no backend agrees with the packet index.
    3. With salvage, on the packet index, if ``options.salvage`` is set.

    Raises as :func:`decode`, and the exceptions of ``work``.
    """
    strict, stream = replace(options, salvage=False), (options.stream_index, options.num_threads)
    opened = partial(open_video, path, *stream, max_frame_pixels=max_frame_pixels, name=name)
    try:
        with opened() as video:
            return work(video, strict)
    except BrokenVideoError as error:
        first = error
    if not isinstance(first, DamagedVideoError):
        with contextlib.suppress(BrokenVideoError), opened(by_decoding=True) as video:  # the first error is raised
            return work(video, strict)
    if not options.salvage:
        raise first
    with opened() as video:
        return work(video, options)


def decode_in_chunks(video: OpenVideo, wanted: Sequence[int], options: DecodeOptions) -> Iterator[Frames]:
    """Decodes frames in chunks of ``options.chunk_frames``.

    A backend that fails midway is replaced by the next one from that frame on.

    Args:
        video: an open file.
        wanted: ascending frame indices without repetitions.
        options: backends, chunk size and salvage.

    Raises:
        BrokenVideoError: no backend could decode these frames; or with ``salvage`` the number of missing frames
            exceeds ``max_missing_share`` of ``wanted``.
    """
    failures: dict[str, str] = {}
    lost = 0
    pictures = _pictures(video, wanted, options, failures)
    for start in range(0, len(wanted), options.chunk_frames):
        indices = tuple(wanted[start : start + options.chunk_frames])
        missing, suspect = torch.zeros(2, len(indices), dtype=torch.bool)
        for i, picture in zip(range(len(indices)), pictures):
            if i == 0:
                pixels = picture.rgb.new_empty(len(indices), *picture.rgb.shape)
            _copy(picture.rgb, pixels[i])
            missing[i], suspect[i] = picture.is_missing, picture.is_suspect
        lost += int(missing.sum())
        if lost > options.max_missing_share * len(wanted):
            raise BrokenVideoError(
                f"{lost} or more of {len(wanted)} frames of {_described(video.info)} do not decode "
                f"({_reasons(failures)}): re-encode the file, remove it, or raise "
                f"max_missing_share={options.max_missing_share}."
            )
        timestamps = torch.from_numpy(video.info.timestamps[list(indices)])
        masks = (missing, suspect, picture.backend, dict(failures))
        yield Frames(pixels.permute(0, 3, 1, 2), indices, timestamps, *masks, video.info.damage)


def _pictures(
    video: OpenVideo, wanted: Sequence[int], options: DecodeOptions, failures: dict[str, str]
) -> Iterator[_Picture]:
    """Yields the picture of each wanted frame. Records the reasons of failed backends in ``failures``."""
    info = video.info
    if info.lacks_frames and not options.salvage:
        found = f"is truncated: it lists {info.num_frames} frames, but holds {info.num_frames - info.lost}"
        raise DamagedVideoError(
            f"{_described(info)} {found if info.lost else 'has lost frames at its end'}. Replace or remove the file, "
            "or set salvage=true to use the frames that it holds."
        )
    position = 0
    kind: type[BrokenVideoError] = BrokenVideoError
    rendering, known = options.rendering(video.info), readers()
    chosen: dict[str, Reader] = {name: known[name] for name in options.backends}
    if rendering != Rendering() or video.info.picture.has_alpha:
        for name in itertools.takewhile(lambda name: name != "pyav", options.backends):
            failures[name] = "only pyav reads alpha channels, maps tones and deinterlaces"
        chosen = {"pyav": partial(read_pyav, rendering=rendering)}
    if video.info.picture.hdr and rendering.tone_map == "none":
        _warn_of_hdr(video.info.picture.hdr, video.info.name)
    for name, reader in chosen.items():
        if reason := backend_failure(name):
            failures[name] = reason
            continue
        try:
            for picture in reader(video, wanted[position:], options.decode_device):
                position += 1
                yield _Picture(picture, False, False, name)
        except DamagedError as error:
            failures[name], kind = one_line(error), DamagedVideoError
            break  # other backends return damaged frames without an error
        except FAILURES as error:
            failures[name] = one_line(error)
        if position == len(wanted):
            return
    if not options.salvage:
        raise kind(
            f"No backend could decode {_described(info)} ({_reasons(failures)}). Re-encode the file, remove it, or set "
            "salvage=true to use the frames that decode."
        )
    try:
        for salvaged in salvage(video, wanted[position:], rendering):
            yield _Picture(*salvaged, "pyav (salvage)")
    except FAILURES as error:
        raise BrokenVideoError(
            f"No frame of {_described(info)} can be decoded ({_reasons(failures)}; salvage: {one_line(error)}). "
            "Re-encode the file, or remove it."
        ) from error


def _warn_of_hdr(hdr: str, name: str) -> None:
    """Warns once per process and kind, because data sets have many such files."""
    if hdr not in _WARNED:
        _WARNED.add(hdr)
        problem = f"{name} is HDR ({hdr}), and its signal is taken as if it were SDR, which looks flat"
        warnings.warn(f"{problem}: set tone_map=bt2390 to map it to BT.709.", stacklevel=2)


def _copy(picture: Tensor, into: Tensor) -> None:
    if picture.device.type == "cpu":  # torch's copy starts OpenMP threads, which compete with the decoder's
        np.copyto(into.numpy(), picture.numpy())
    else:
        into.copy_(picture)


def _described(info: VideoInfo) -> str:
    return f"{info.name} ({info.damage})" if info.damage else info.name


def _reasons(failures: dict[str, str]) -> str:
    return "; ".join(f"{name}: {reason}" for name, reason in failures.items())
