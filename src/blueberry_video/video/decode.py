"""Frames of a local video file as uint8 tensors, with their true timestamps.

One index, several decoders. PyAV reads the packets of a file once and thereby fixes what "frame i" means: its place in
display order and its timestamp. A backend only turns wanted frames into pixels, and a backend whose timestamps
disagree with the index has failed on that file, so that falling back never silently changes which frame is shown.

What a decoder is handed is always a resolved path of an existing regular file that does not begin like a playlist: a
name such as ``concat:…``, or an m3u8 renamed ``.mp4``, would make FFmpeg read other files or addresses. Decoders are
opened fresh in every call, so nothing here is open before a fork or ever pickled.
"""

import contextlib
import functools
import io
import tempfile
from bisect import bisect_right
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import av
import numpy as np
import torch
from av.container import InputContainer
from av.video.frame import VideoFrame
from av.video.reformatter import VideoReformatter
from av.video.stream import VideoStream
from PIL import Image
from torch import Tensor

BACKENDS = ("torchcodec", "pyav")  # the order in which they are tried
PLAYLISTS = (b"#extm3u", b"ffconcat", b"<?xml", b"<mpd", b"[playlist]")  # text that names other files
FORMATS = (  # containers that hold their own frames: no playlists, no image sequences, no devices
    "mov,mp4,m4a,3gp,3g2,mj2,matroska,webm,avi,mpeg,mpegts,mpegvideo,flv,asf,ogg,gif,ivf,obu,av1,h264,hevc,m4v,mjpeg,"
    "yuv4mpegpipe"
)
_PYAV_OPTIONS = {"protocol_whitelist": "file", "format_whitelist": FORMATS}
_FAILURES = (ImportError, OSError, RuntimeError, ValueError, IndexError, av.error.FFmpegError)  # what decoders raise


class BrokenVideoError(ValueError):
    """A file that no backend can read; the message names every backend's reason."""


@dataclass(frozen=True)
class VideoInfo:
    """What a file's packets say. ``timestamps`` are seconds in display order, one a frame, and may start anywhere.

    ``fps`` is (n - 1) / (last - first timestamp), the header's rate where there is a single frame, and 0.0 where
    neither is known. ``height`` and ``width`` are pixels after rotation.
    """

    path: Path
    num_frames: int
    fps: float
    height: int
    width: int
    timestamps: tuple[float, ...]
    stream_index: int


@dataclass(frozen=True)
class Frames:
    """``pixels`` uint8 (T, 3, H, W) RGB, ``timestamps`` float64 (T,) in seconds, and the backend that decoded them."""

    pixels: Tensor
    timestamps: Tensor
    backend: str


def probe(path: str | Path) -> VideoInfo:
    """Counts and times the frames of a file by reading its packets; decodes one frame for its size and rotation.

    Raises:
        FileNotFoundError: there is no such file.
        BrokenVideoError: it is a playlist, or holds no readable video stream.
    """
    container, index = _opened(_local_video(path), num_threads=1)
    container.close()
    return index.info


def decode(
    path: str | Path,
    choose: Sequence[int] | Callable[[VideoInfo], Sequence[int]],
    backends: Sequence[str] = BACKENDS,
    num_threads: int = 1,
) -> Frames:
    """Decodes chosen frames.

    Args:
        path: a local file.
        choose: frame indices in any order, repetitions allowed; or a function that picks them from the file's
            ``VideoInfo`` (what it raises passes through untouched).
        backends: tried in this order; those that do not work on this machine are passed over.
        num_threads: decoding threads; keep 1 in loader workers.

    Raises:
        FileNotFoundError: there is no such file.
        IndexError: an index outside the file.
        BrokenVideoError: no backend could decode these frames of this file.
    """
    container, index = _opened(_local_video(path), num_threads)
    with container:
        info = index.info
        indices = [int(i) for i in (choose(info) if callable(choose) else choose)]
        if not indices or min(indices) < 0 or max(indices) >= info.num_frames:
            raise IndexError(
                f"Frames {indices} were asked of {info.path}, which has the frames 0 to {info.num_frames - 1}: "
                "ask for at least one of these."
            )
        reasons = {}
        for name in backends:
            if reason := backend_failure(name):
                reasons[name] = reason
                continue
            try:
                pixels = _DECODERS[name](container, index, indices, num_threads)
            except _FAILURES as error:
                reasons[name] = _one_line(error)
                continue
            timestamps = torch.tensor([info.timestamps[i] for i in indices], dtype=torch.float64)
            return Frames(pixels, timestamps, name)
    listed = "; ".join(f"{name}: {reason}" for name, reason in reasons.items())
    raise BrokenVideoError(f"No backend could decode {info.path} ({listed}). Re-encode the file, or remove it.")


@functools.cache
def backend_failure(name: str) -> str | None:
    """Why a backend does not work in this process, or None where it has decoded a tiny clip (tried once, on first use).

    Raises:
        ValueError: there is no backend of that name.
    """
    if name not in _DECODERS:
        raise ValueError(f"backends names {name!r}, which does not exist: choose from {', '.join(_DECODERS)}.")
    frames = [Image.fromarray(np.full((16, 16, 3), level, np.uint8)) for level in (40, 120, 200)]
    clip = io.BytesIO()
    frames[0].save(clip, format="GIF", save_all=True, append_images=frames[1:], duration=100)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "tiny.gif")
        path.write_bytes(clip.getvalue())
        try:
            container, index = _opened(path, num_threads=1)
            with container:
                pixels = _DECODERS[name](container, index, [2, 0], 1)
        except _FAILURES as error:
            return _one_line(error)
    levels = pixels.float().mean(dim=(1, 2, 3)).tolist()
    return (
        None if abs(levels[0] - 200) < 3 and abs(levels[1] - 40) < 3 else f"decodes wrong pixels (mean levels {levels})"
    )


@dataclass(frozen=True)
class _Index:
    info: VideoInfo
    pts: tuple[int, ...] | None  # display order; None where packets carry none or repeat one
    keyframes: tuple[int, ...]  # pts of those packets at which decoding can start


def _local_video(path: str | Path) -> Path:
    resolved = Path(path).resolve()
    if not resolved.is_file():
        raise FileNotFoundError(f"There is no video file at {resolved}: check the path, or copy the file there.")
    with resolved.open("rb") as file:
        start = file.read(64).removeprefix(b"\xef\xbb\xbf").lstrip().lower()
    if start.startswith(PLAYLISTS):
        raise BrokenVideoError(
            f"{resolved} is a playlist or other text, not a video: decoding it could open other files or addresses. "
            "Fetch the videos that it names and use those files."
        )
    return resolved


def _opened(path: Path, num_threads: int) -> tuple[InputContainer, _Index]:
    """An open container and its index; the caller closes it."""
    try:
        container = av.open(str(path), options=_PYAV_OPTIONS, metadata_errors="replace")
        try:
            return container, _read_index(path, container, num_threads)
        except _FAILURES:
            container.close()
            raise
    except _FAILURES as error:
        raise BrokenVideoError(
            f"{path} cannot be read as a video (pyav, whose packet index every backend uses: {_one_line(error)}). "
            "Re-encode the file, or remove it."
        ) from error


def _stream(container: InputContainer) -> VideoStream:
    stream = container.streams.best("video")
    if not isinstance(stream, VideoStream) or stream.disposition & stream.disposition.attached_pic:
        raise ValueError("it has no video stream")
    return stream


def _read_index(path: Path, container: InputContainer, num_threads: int) -> _Index:
    stream = _stream(container)
    stream.codec_context.thread_count = num_threads
    first: VideoFrame | None = None
    shown = []
    packets = 0
    for packet in container.demux(stream):
        if first is None:
            with contextlib.suppress(
                av.error.InvalidDataError
            ):  # a later packet may do; frames asked for are not lenient
                first = next(iter(packet.decode()), None)
        packets += packet.size > 0
        if packet.size and not packet.is_discard:  # an edit list marks what lies before its start
            shown.append((packet.pts, packet.is_keyframe))
    if packets < len(stream.index_entries):
        raise ValueError(
            f"it is cut short: its header lists {len(stream.index_entries)} frames, but it holds {packets}"
        )
    if first is None or not shown:
        raise ValueError("its video stream has no frame that decodes")
    known = {pts for pts, _ in shown if pts is not None}
    rate = float(stream.average_rate or stream.guessed_rate or 0)
    pts = tuple(sorted(known)) if len(known) == len(shown) else None
    if pts is not None and (base := stream.time_base) is not None:
        timestamps = tuple(p * base.numerator / base.denominator for p in pts)
    else:
        timestamps = tuple(i / rate if rate else float(i) for i in range(len(shown)))
    if len(shown) > 1 and timestamps[-1] > timestamps[0]:
        rate = (len(shown) - 1) / (timestamps[-1] - timestamps[0])
    height, width = (first.width, first.height) if _quarter_turns(first) % 2 else (first.height, first.width)
    info = VideoInfo(path, len(shown), rate, height, width, timestamps, stream.index)
    return _Index(info, pts, tuple(sorted(p for p, key in shown if key and p is not None)))


def _decode_torchcodec(container: InputContainer, index: _Index, indices: list[int], num_threads: int) -> Tensor:
    from torchcodec.decoders import VideoDecoder  # raises where FFmpeg's libraries are missing

    info = index.info
    decoder = VideoDecoder(info.path, stream_index=info.stream_index, num_ffmpeg_threads=num_threads, seek_mode="exact")
    if len(decoder) != info.num_frames:
        raise ValueError(f"counts {len(decoder)} frames where the packets hold {info.num_frames}")
    batch = decoder.get_frames_at(indices)
    expected = torch.tensor([info.timestamps[i] for i in indices], dtype=torch.float64)
    if index.pts is not None and not torch.allclose(batch.pts_seconds, expected, rtol=0, atol=1e-4):
        raise ValueError("its timestamps disagree with the packets'")
    return batch.data


def _decode_pyav(container: InputContainer, index: _Index, indices: list[int], num_threads: int) -> Tensor:
    wanted = sorted(set(indices))
    frames = _by_timestamp(container, index, wanted)
    if frames is None:
        with av.open(
            str(index.info.path), options=_PYAV_OPTIONS
        ) as again:  # a raw stream cannot seek back to its start
            frames = _by_counting(again, index, wanted)
    pixels = np.stack([frames[i] for i in indices])  # (T, H, W, 3); raises where the resolution changes
    return torch.from_numpy(pixels).permute(0, 3, 1, 2).contiguous()


def _by_timestamp(container: InputContainer, index: _Index, wanted: list[int]) -> dict[int, np.ndarray] | None:
    """Seeks to the keyframe before a wanted frame and decodes forward; None where frames lack the packets'
    timestamps."""
    if index.pts is None:
        return None
    stream, to_rgb = _stream(container), VideoReformatter()
    found: dict[int, np.ndarray] = {}
    decoded: Iterator[VideoFrame] = iter(())
    position: int | None = None
    for i in wanted:
        target = index.pts[i]
        before = bisect_right(index.keyframes, target)
        keyframe = index.keyframes[before - 1] if before else index.pts[0]
        if position is None or keyframe > position:
            container.seek(keyframe, stream=stream)
            decoded = container.decode(stream)
            position = None
        for frame in decoded:
            if frame.pts is None or (position is not None and frame.pts <= position) or frame.pts > target:
                return None
            position = frame.pts
            if position == target:
                found[i] = _rgb(frame, to_rgb)
                break
        else:
            return None
    return found


def _by_counting(container: InputContainer, index: _Index, wanted: list[int]) -> dict[int, np.ndarray]:
    """Decodes the whole file and takes frames by their number: for raw streams and containers without true
    timestamps."""
    to_rgb, keep, count = VideoReformatter(), set(wanted), 0
    found: dict[int, np.ndarray] = {}
    for frame in container.decode(_stream(container)):
        if count in keep:
            found[count] = _rgb(frame, to_rgb)
        count += 1
    if count != index.info.num_frames:
        raise ValueError(f"only {count} of its {index.info.num_frames} frames decode")
    return found


def _rgb(frame: VideoFrame, to_rgb: VideoReformatter) -> np.ndarray:
    pixels = to_rgb.reformat(frame, format="rgb24", threads=1).to_ndarray()  # (H, W, 3)
    turns = _quarter_turns(frame)
    return np.rot90(pixels, k=turns) if turns else pixels


def _quarter_turns(frame: VideoFrame) -> int:
    return round(frame.rotation / 90) % 4


def _one_line(error: BaseException) -> str:
    """The first 200 characters of an error (torchcodec's is 6 kB where FFmpeg is missing)."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= 200 else text[:200] + "…"


_DECODERS: dict[str, Callable[[InputContainer, _Index, list[int], int], Tensor]] = {
    "torchcodec": _decode_torchcodec,
    "pyav": _decode_pyav,
}
