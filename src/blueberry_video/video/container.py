"""Packet index of a video file: number of frames, timestamps, keyframes.

PyAV reads all packets once, which defines "frame i" by display order and timestamp. A decoder of ``backends.py`` with
different timestamps fails on that file, so that falling back to the next one never changes which frame is returned. An
``OpenVideo`` exists only inside one call: it is never opened before a fork and never pickled.
"""

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import av
import numpy as np
from av.container import InputContainer
from av.video.frame import VideoFrame
from av.video.stream import VideoStream

from blueberry_video.video.errors import BrokenVideoError, LimitError, VideoError, one_line
from blueberry_video.video.picture import orientation
from blueberry_video.video.sniff import local_video
from blueberry_video.video.source_options import MAX_FRAME_PIXELS

FORMATS = (  # containers that hold their own frames; excludes playlists, image sequences and devices
    "mov,mp4,m4a,3gp,3g2,mj2,matroska,webm,avi,mpeg,mpegts,mpegvideo,flv,asf,ogg,gif,ivf,obu,av1,h264,hevc,m4v,mjpeg,"
    "yuv4mpegpipe,mxf,dv,mp3,flac,nut,rm,wtv"
)
PYAV_OPTIONS = {"protocol_whitelist": "file", "format_whitelist": FORMATS}
FAILURES = (ImportError, OSError, RuntimeError, ValueError, IndexError, av.error.FFmpegError)  # raised by decoders
Opener = Callable[[], tuple[InputContainer, VideoStream]]
_SHOWN_VP8 = 0x10  # show_frame bit in the first byte of a VP8 packet; other packets are only references


@dataclass(frozen=True, eq=False)
class VideoInfo:
    """Properties of a video file, read from its packets.

    Attributes:
        path: resolved path of the file.
        name: name in messages; the input of the user where the file is temporary.
        num_frames: number of displayed frames, including frames that the header lists but the file does not hold.
        fps: (n - 1) / (last - first timestamp); the rate in the header for a single frame; 0.0 if both are unknown.
        duration: seconds from the first frame to the end of the last.
        height, width: pixels after rotation.
        timestamps: float64 (num_frames,) seconds in display order, with any start.
        keyframes: int64 (k,) indices of the frames at which decoding can start.
        codec, pixel_format, container: FFmpeg's names.
        rotation: counter-clockwise rotation for display in degrees: 0, 90, 180 or 270.
        stream_index: index of the video stream in the file.
        lost: number of frames at the end that the header lists but the file does not hold.
    """

    path: Path
    name: str
    num_frames: int
    fps: float
    duration: float
    height: int
    width: int
    timestamps: np.ndarray
    keyframes: np.ndarray
    codec: str
    pixel_format: str
    container: str
    rotation: int = 0
    stream_index: int = 0
    lost: int = 0


@dataclass(frozen=True, eq=False)
class OpenVideo:
    """Open container with the packet index of its video stream. A context manager that closes the container."""

    container: InputContainer
    stream: VideoStream
    info: VideoInfo
    pts: np.ndarray | None  # int64 (num_frames,) in display order; None if frames and packets have different pts

    @property
    def num_threads(self) -> int:
        return self.stream.codec_context.thread_count

    def __enter__(self) -> "OpenVideo":
        return self

    def __exit__(self, *_: object) -> None:
        self.container.close()


def probe(path: str | Path, stream_index: int | None = None) -> VideoInfo:
    """Returns the properties of a file from its packets. Decodes one frame for size and rotation.

    Raises:
        FileNotFoundError: the file does not exist.
        RefusedSourceError: the file is a playlist or a script.
        BrokenVideoError: the file has no readable video stream.
    """
    with open_video(path, stream_index) as video:
        return video.info


def open_video(
    path: str | Path,
    stream_index: int | None = None,
    num_threads: int = 1,
    by_decoding: bool = False,
    max_frame_pixels: int = MAX_FRAME_PIXELS,
    name: str | None = None,
) -> OpenVideo:
    """Opens a local file and reads its packet index.

    Args:
        path: a local file.
        stream_index: index of a video stream; None selects FFmpeg's best stream.
        num_threads: decoding threads; 0 selects the number automatically.
        by_decoding: index the frames, decoding the whole file, for rare codecs in which a packet is not one frame.
        max_frame_pixels: maximum height × width; nothing above it is decoded.
        name: name in messages; defaults to the path.

    Raises:
        FileNotFoundError, RefusedSourceError, BrokenVideoError: as in ``probe``.
        LimitError: frames larger than ``max_frame_pixels``.
    """
    resolved, kind = local_video(path)
    name = name or str(resolved)

    def opened() -> tuple[InputContainer, VideoStream]:
        # max_pixels stops frames that are larger than in the header
        options = {**PYAV_OPTIONS, "max_pixels": str(max_frame_pixels)}
        forced = "mjpeg" if kind == "mjpeg" else None  # FFmpeg detects a long one as an image pipe
        container = av.open(str(resolved), format=forced, options=options, metadata_errors="replace")
        try:
            stream = _choose_stream(container, stream_index, name)
            _check_size(resolved, name, stream, max_frame_pixels)
            if stream.codec_context.name == "hevc":  # otherwise it returns damaged frames without an error
                stream.codec_context.options = {"err_detect": "explode"}
            stream.codec_context.thread_count = num_threads or _threads(stream)
            stream.thread_type = "AUTO"
        except FAILURES:
            container.close()
            raise
        return container, stream

    try:
        return _index_frames(resolved, name, opened) if by_decoding else _index_packets(resolved, name, opened)
    except VideoError:
        raise
    except FAILURES as error:
        raise BrokenVideoError(
            f"{name} cannot be read as a video (pyav, which reads the packet index for every backend: "
            f"{one_line(error)}). Re-encode the file, or remove it."
        ) from error


def _choose_stream(container: InputContainer, stream_index: int | None, name: str) -> VideoStream:
    # PyAV has no decoder for a stream with codec_context=None
    videos = {stream.index: stream for stream in container.streams.video if stream.codec_context is not None}
    if stream_index is not None:
        if stream_index not in videos:
            problem = f"stream_index={stream_index} is not a video stream of {name}"
            raise VideoError(f"{problem}: use one of {sorted(videos)}, or null.")
        return videos[stream_index]
    if not videos:
        unknown = " of a known codec" if container.streams.video else ""
        raise ValueError(f"no video stream{unknown}")
    moving = [stream for stream in videos.values() if not stream.disposition & stream.disposition.attached_pic]
    best = container.streams.best("video")
    if isinstance(best, VideoStream) and best.index in videos and (best in moving or not moving):
        return best
    return (moving or list(videos.values()))[0]  # cover art only if there is no other video stream


def _threads(stream: VideoStream) -> int:
    """Returns the number of decoding threads: 8 to 16, because they wait for each other, with at most 128 MB."""
    frame_bytes = max(1, stream.codec_context.width * stream.codec_context.height * 3 // 2)
    return max(1, min(max(8, os.cpu_count() or 1), 16, 2**27 // frame_bytes))


def _check_size(path: Path, name: str, stream: VideoStream, max_frame_pixels: int) -> None:
    if len(stream.index_entries) > path.stat().st_size:
        listed = f"{name} lists {len(stream.index_entries)} frames in {path.stat().st_size} bytes"
        raise LimitError(f"{listed}: its header is damaged, or made to exhaust memory. Remove the file.")
    width, height = stream.codec_context.width, stream.codec_context.height
    if width * height > max_frame_pixels:
        found = f"{name} has frames of {width}x{height} pixels, more than max_frame_pixels={max_frame_pixels}"
        raise LimitError(f"{found}: scale the video down, or raise max_frame_pixels.")


def _index_packets(path: Path, name: str, opened: Opener) -> OpenVideo:
    container, stream = opened()
    try:
        first: VideoFrame | None = None
        seen, num_packets, keys, tried = [], 0, [], False
        is_vp8 = stream.codec_context.name == "vp8"
        for packet in container.demux(stream):
            size = packet.size
            if packet.is_keyframe and not tried:
                tried, first = True, _decode_alone(packet, stream)
            num_packets += size > 0
            if not size or packet.is_discard or (is_vp8 and not bytes(packet)[0] & _SHOWN_VP8):
                continue  # the flush packet at the end, packets before an edit list, VP8 references
            seen.append(packet.pts)
            keys.append(packet.is_keyframe)
        if first is None:  # reopened, because FFmpeg's VP9 decoder crashes if it continues after an error
            container.close()
            container, stream = opened()
            first = _first_frame(container, stream)
            container.close()
            container, stream = opened()
        lost = _num_listed(stream, num_packets) - num_packets
        pts = None if None in seen or len(set(seen)) != len(seen) else np.array(seen, np.int64)
        # AVI and ASF store decoding times only: with B-frames, they are not in display order
        reordered = container.format.name in ("avi", "asf") and stream.codec_context.has_b_frames > 0
        order = np.arange(len(seen)) if pts is None else np.argsort(pts)
        in_order = None if pts is None else pts[order]
        return _with_info(path, name, container, stream, first, in_order, np.array(keys)[order], lost, reordered)
    except FAILURES:
        container.close()
        raise


def _index_frames(path: Path, name: str, opened: Opener) -> OpenVideo:
    container, stream = opened()
    try:
        first: VideoFrame | None = None
        seen, keys = [], []
        for frame in container.decode(stream):
            first = first or frame
            seen.append(frame.pts)
            keys.append(frame.key_frame)
        if (listed := _num_listed(stream, len(seen))) > len(seen):
            raise ValueError(f"the header lists {listed} frames, but only {len(seen)} decode")
        known = [time for time in seen if time is not None]
        rising = len(known) == len(seen) and sorted(set(known)) == known
        pts = np.array(known, np.int64) if rising else None
        return _with_info(path, name, container, stream, first, pts, np.array(keys), lost=0)
    except FAILURES:
        container.close()
        raise


def _decode_alone(packet: av.Packet, stream: VideoStream) -> VideoFrame | None:
    """Decodes a single packet, such as a keyframe; None on failure. Flushes the decoder, or leaves it broken."""
    try:
        frames = [*packet.decode(), *stream.codec_context.decode(None)]  # drained: threads wait for more packets
        stream.codec_context.flush_buffers()
    except (av.error.InvalidDataError, av.error.EOFError):
        return None
    return next((frame for frame in frames if isinstance(frame, VideoFrame)), None)


def _first_frame(container: InputContainer, stream: VideoStream) -> VideoFrame | None:
    """Returns the first frame that decodes, for files with a damaged first keyframe or one before an edit list."""
    for packet in container.demux(stream):
        try:
            for frame in packet.decode():
                if isinstance(frame, VideoFrame):
                    return frame
        except (av.error.InvalidDataError, av.error.EOFError):
            continue
    return None


def _num_listed(stream: VideoStream, num_found: int) -> int:
    """Returns the number of packets in the header where it lists them (mp4, mov, avi), at least ``num_found``."""
    entries = stream.index_entries
    return max(num_found, sum(entry.size > 0 for entry in entries) if len(entries) > num_found else 0)


def _with_info(
    path: Path,
    name: str,
    container: InputContainer,
    stream: VideoStream,
    first: VideoFrame | None,
    pts: np.ndarray | None,
    keys: np.ndarray,
    lost: int,
    reordered: bool = False,
) -> OpenVideo:
    if first is None or not len(keys):
        raise ValueError("no frame of the video stream decodes")
    rate = float((stream.average_rate if pts is not None else stream.guessed_rate) or stream.guessed_rate or 0)
    if stream.disposition & stream.disposition.attached_pic:
        rate = 0.0  # cover art is a still image in a stream of nominally 90,000 frames per second
    base = stream.time_base
    if pts is not None and base is not None:
        timestamps = pts * base.numerator / base.denominator
    else:
        timestamps = np.arange(len(keys)) / (rate or 1.0)
    if len(keys) > 1 and timestamps[-1] > timestamps[0]:
        rate = (len(keys) - 1) / float(timestamps[-1] - timestamps[0])
    step = 1 / rate if rate else 0.0
    if lost:  # their true timestamps are unknown
        timestamps = np.concatenate([timestamps, timestamps[-1] + step * np.arange(1, lost + 1)])
    turns, _ = orientation(first)
    height, width = (first.width, first.height) if turns % 2 else (first.height, first.width)
    info = VideoInfo(
        path=path,
        name=name,
        num_frames=len(timestamps),
        fps=rate,
        duration=float(timestamps[-1] - timestamps[0]) + step,
        height=height,
        width=width,
        timestamps=timestamps.astype(np.float64),
        keyframes=np.flatnonzero(keys),
        codec=stream.codec_context.name,
        pixel_format=first.format.name,
        container=container.format.name,
        rotation=90 * turns,
        stream_index=stream.index,
        lost=lost,
    )
    return OpenVideo(container, stream, info, None if reordered else pts)
