"""Chosen frames of a local video file as uint8 tensors, by the first of several decoders that shows them.

``decode`` returns all of them at once; ``decode_in_chunks`` a few at a time, so that a video of any length passes
through constant memory. Both keep the reason of every backend that failed. Where none succeeds, salvage returns what
can be decoded, with a mask of what is missing.
"""

import contextlib
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import NamedTuple, TypeVar

import numpy as np
import torch
from torch import Tensor

from blueberry_video.video.backends import READERS, DamagedError, backend_failure, salvage
from blueberry_video.video.container import FAILURES, MAX_FRAME_PIXELS, OpenVideo, VideoInfo, one_line, open_video
from blueberry_video.video.errors import BrokenVideoError, DamagedVideoError

BACKENDS = ("pyav", "torchcodec", "decord", "torchvision")  # the order in which they are tried
Result = TypeVar("Result")
Choice = Sequence[int] | Callable[[VideoInfo], Sequence[int]]


@dataclass(frozen=True)
class DecodeOptions:
    """How frames are decoded.

    Attributes:
        backends: decoders in the order in which they are tried; those that do not work on this machine are passed over.
        num_threads: decoding threads; 0 chooses, at least 8 where the pictures are not huge: more than cores, for they
            wait for each other; keep 1 in loader workers.
        stream_index: which video stream of a file with several; None takes the one that FFmpeg holds for the best.
        salvage: where no backend can decode all frames, return what can be decoded and a mask of what is missing.
        max_missing_share: 0 to 1; a video of which more is missing is broken.
        decode_device: ``cpu``, or a CUDA device for torchcodec's hardware decoder, which pays for long clips of high
            resolution only.
        chunk_frames: frames that are decoded before they are handed on; bounds memory.
    """

    backends: tuple[str, ...] = BACKENDS
    num_threads: int = 0
    stream_index: int | None = None
    salvage: bool = True
    max_missing_share: float = 0.5
    decode_device: str = "cpu"
    chunk_frames: int = 16

    def __post_init__(self) -> None:
        object.__setattr__(self, "backends", tuple(self.backends))
        if unknown := [name for name in self.backends if name not in READERS]:
            raise ValueError(f"backends names {unknown[0]!r}, which does not exist: choose from {', '.join(READERS)}.")
        if not self.backends:
            raise ValueError(f"backends is empty: name at least one of {', '.join(READERS)}.")
        if not 0 <= self.num_threads <= 64 or self.chunk_frames < 1:
            raise ValueError(
                f"num_threads={self.num_threads} and chunk_frames={self.chunk_frames}: use 0 to 64 threads (0 chooses) "
                "and at least 1 frame."
            )
        if not re.fullmatch(r"cpu|cuda(:\d+)?", self.decode_device):
            raise ValueError(f"decode_device={self.decode_device!r} does not exist: use cpu, cuda or cuda:0.")
        if not 0 <= self.max_missing_share <= 1:
            raise ValueError(f"max_missing_share={self.max_missing_share} is a share: use 0 to 1, such as 0.5.")


@dataclass(frozen=True, eq=False)
class Frames:
    """Decoded frames.

    Attributes:
        pixels: uint8 (T, 3, H, W) RGB, channels last in memory (a view of (T, H, W, 3)).
        indices: their numbers in the file.
        timestamps: float64 (T,) seconds.
        missing: bool (T,); where set, the frame could not be decoded and its nearest neighbour is shown.
        suspect: bool (T,); where set, it was decoded after damage, and may show what was not there.
        backend: who decoded them, the last one where several did.
        failures: backend → why it did not.
    """

    pixels: Tensor
    indices: tuple[int, ...]
    timestamps: Tensor
    missing: Tensor
    suspect: Tensor
    backend: str
    failures: dict[str, str] = field(default_factory=dict)


class _Picture(NamedTuple):
    rgb: Tensor  # uint8 (H, W, 3)
    is_missing: bool
    is_suspect: bool
    backend: str


def decode(path: str | Path, choose: Choice, options: DecodeOptions | None = None) -> Frames:
    """Decodes chosen frames.

    Args:
        path: a local file.
        choose: frame indices in any order, repetitions allowed; or a function that picks them from the file's
            ``VideoInfo`` (what it raises passes through untouched).
        options: backends and what to do where they fail; the defaults if None.

    Raises:
        FileNotFoundError: there is no such file.
        RefusedSourceError: it is a playlist or a script.
        IndexError: an index outside the file.
        BrokenVideoError: no backend could decode these frames of this file.
    """
    return with_fallbacks(path, options or DecodeOptions(), lambda video, now: decode_open(video, choose, now))


def with_fallbacks(
    path: str | Path,
    options: DecodeOptions,
    work: Callable[[OpenVideo, DecodeOptions], Result],
    max_frame_pixels: int = MAX_FRAME_PIXELS,
    name: str | None = None,
) -> Result:
    """Runs ``work`` on an open file: strictly on its packet index; where no backend can follow that, on an index made
    by decoding everything; where that fails too and ``options.salvage`` is set, leniently on the packet index.

    Raises:
        FileNotFoundError, RefusedSourceError, BrokenVideoError: as ``decode``; and what ``work`` raises.
    """
    strict = replace(options, salvage=False)
    opened = partial(
        open_video, path, options.stream_index, options.num_threads, max_frame_pixels=max_frame_pixels, name=name
    )
    try:
        with opened() as video:
            return work(video, strict)
    except BrokenVideoError as error:
        first = error
    if not isinstance(first, DamagedVideoError):
        with contextlib.suppress(BrokenVideoError), opened(by_decoding=True) as video:  # the first error is told
            return work(video, strict)
    if not options.salvage:
        raise first
    with opened() as video:
        return work(video, options)


def decode_open(video: OpenVideo, choose: Choice, options: DecodeOptions) -> Frames:
    """``decode`` of a file that is open already; the same errors."""
    chosen = [int(i) for i in (choose(video.info) if callable(choose) else choose)]
    last = video.info.num_frames - 1
    if not chosen or min(chosen) < 0 or max(chosen) > last:
        raise IndexError(
            f"Frames {chosen} were asked of {video.info.name}, which has the frames 0 to {last}: ask for at least one "
            "of these."
        )
    wanted = sorted(set(chosen))
    [frames] = decode_in_chunks(video, wanted, replace(options, chunk_frames=len(wanted)))
    if chosen == wanted:
        return frames
    place = {index: i for i, index in enumerate(wanted)}
    rows = torch.tensor([place[index] for index in chosen])
    return replace(
        frames,
        pixels=frames.pixels[rows],
        indices=tuple(chosen),
        timestamps=frames.timestamps[rows],
        missing=frames.missing[rows],
        suspect=frames.suspect[rows],
    )


def decode_in_chunks(video: OpenVideo, wanted: Sequence[int], options: DecodeOptions) -> Iterator[Frames]:
    """Ascending frame numbers without repetitions, ``options.chunk_frames`` at a time.

    A backend that fails on the way is replaced by the next one from there on.

    Raises:
        BrokenVideoError: no backend could decode these frames; or, salvaging, more than ``max_missing_share`` of the
            frames so far are missing at the end.
    """
    failures: dict[str, str] = {}
    lost = 0
    pictures = _pictures(video, wanted, options, failures)
    for start in range(0, len(wanted), options.chunk_frames):
        indices = tuple(wanted[start : start + options.chunk_frames])
        missing, suspect = torch.zeros(2, len(indices), dtype=torch.bool)
        pixels: Tensor | None = None
        backend = ""
        for i, picture in zip(range(len(indices)), pictures):
            if pixels is None:
                pixels = picture.rgb.new_empty(len(indices), *picture.rgb.shape)
            _copy(picture.rgb, pixels[i])
            missing[i], suspect[i] = picture.is_missing, picture.is_suspect
            backend = picture.backend
        assert pixels is not None
        lost += int(missing.sum())
        if lost > options.max_missing_share * len(wanted):
            raise BrokenVideoError(
                f"More than {lost} of the {len(wanted)} frames asked of {video.info.name} cannot be decoded, above "
                f"max_missing_share={options.max_missing_share} ({_listed(failures)}). Re-encode the file, remove it, "
                "or raise max_missing_share."
            )
        timestamps = torch.from_numpy(video.info.timestamps[list(indices)])
        yield Frames(pixels.permute(0, 3, 1, 2), indices, timestamps, missing, suspect, backend, dict(failures))


def _pictures(
    video: OpenVideo, wanted: Sequence[int], options: DecodeOptions, failures: dict[str, str]
) -> Iterator[_Picture]:
    """The picture of each; writes down why backends fail."""
    if video.info.lost and not options.salvage:
        raise DamagedVideoError(
            f"{video.info.name} is cut short: its header lists {video.info.num_frames} frames, but it holds "
            f"{video.info.num_frames - video.info.lost}. Replace or remove the file, or set salvage=true to use what "
            "is there."
        )
    position = 0
    kind: type[BrokenVideoError] = BrokenVideoError
    for name in options.backends:
        if reason := backend_failure(name):
            failures[name] = reason
            continue
        try:
            for picture in READERS[name](video, wanted[position:], options.decode_device):
                position += 1
                yield _Picture(picture, False, False, name)
        except DamagedError as error:
            failures[name], kind = one_line(error), DamagedVideoError
            break  # the others would show what damage left, without a word
        except FAILURES as error:
            failures[name] = one_line(error)
        if position == len(wanted):
            return
    if not options.salvage:
        raise kind(
            f"No backend could decode {video.info.name} ({_listed(failures)}). Re-encode the file, remove it, or set "
            "salvage=true to use what can be decoded."
        )
    try:
        for salvaged in salvage(video, wanted[position:]):
            yield _Picture(*salvaged, "pyav (salvage)")
    except FAILURES as error:
        raise BrokenVideoError(
            f"Nothing of {video.info.name} can be decoded ({_listed(failures)}; salvage: {one_line(error)}). Re-encode "
            "the file, or remove it."
        ) from error


def _copy(picture: Tensor, place: Tensor) -> None:
    if picture.device.type == "cpu":  # torch would copy with OpenMP threads, which go on spinning beside the decoder's
        np.copyto(place.numpy(), picture.numpy())
    else:
        place.copy_(picture)


def _listed(failures: dict[str, str]) -> str:
    return "; ".join(f"{name}: {reason}" for name, reason in failures.items())
