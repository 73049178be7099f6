"""What the packets of a video file say: how many frames it has, when each is shown, where decoding can start.

PyAV reads the packets once and thereby fixes what "frame i" means: its place in display order and its timestamp. The
decoders of ``backends.py`` only turn wanted frames into pixels, and one whose timestamps disagree has failed on that
file, so that falling back never silently changes which frame is shown.

Nothing here is open before a fork or ever pickled: an ``OpenVideo`` lives inside one call.
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

from blueberry_video.video.errors import BrokenVideoError, LimitError, VideoError
from blueberry_video.video.picture import orientation
from blueberry_video.video.sniff import local_video

FORMATS = (  # containers that hold their own frames: no playlists, no image sequences, no devices
    "mov,mp4,m4a,3gp,3g2,mj2,matroska,webm,avi,mpeg,mpegts,mpegvideo,flv,asf,ogg,gif,ivf,obu,av1,h264,hevc,m4v,mjpeg,"
    "yuv4mpegpipe,mxf,dv,mp3,flac,nut,rm,wtv"
)
PYAV_OPTIONS = {"protocol_whitelist": "file", "format_whitelist": FORMATS}
FAILURES = (ImportError, OSError, RuntimeError, ValueError, IndexError, av.error.FFmpegError)  # what decoders raise
Opener = Callable[[], tuple[InputContainer, VideoStream]]
MAX_FRAME_PIXELS = 8192 * 4352  # 8K
_SHOWN_VP8 = 0x10  # bit of a VP8 packet's first byte; the others are references that are never shown


@dataclass(frozen=True, eq=False)
class VideoInfo:
    """What a file's packets say.

    Attributes:
        path: the resolved file.
        name: for messages: what the user gave, where the file is a temporary one.
        num_frames: frames that are shown, those included that the header lists but the file no longer holds.
        fps: (n - 1) / (last - first timestamp); the header's rate where there is a single frame; 0.0 where neither is
            known.
        duration: seconds from the first frame to the end of the last.
        height, width: pixels after rotation.
        timestamps: float64 (num_frames,) seconds in display order; may start anywhere.
        keyframes: int64 (k,) numbers of the frames at which decoding can start.
        codec, pixel_format, container: FFmpeg's names.
        rotation: degrees by which the stored picture is turned counter-clockwise to be shown: 0, 90, 180 or 270.
        stream_index: which stream of the file.
        lost: frames at the end that the header lists but the file does not hold.
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
    rotation: int
    stream_index: int
    lost: int


@dataclass(frozen=True, eq=False)
class OpenVideo:
    """An open container with the index of its video stream; closed by leaving it as a context."""

    container: InputContainer
    stream: VideoStream
    info: VideoInfo
    pts: np.ndarray | None  # int64 (num_frames,) in display order; None where frames do not carry those of packets

    @property
    def num_threads(self) -> int:
        return self.stream.codec_context.thread_count

    def __enter__(self) -> "OpenVideo":
        return self

    def __exit__(self, *_: object) -> None:
        self.container.close()


def probe(path: str | Path, stream_index: int | None = None) -> VideoInfo:
    """Counts and times the frames of a file by reading its packets; decodes one frame for its size and rotation.

    Raises:
        FileNotFoundError: there is no such file.
        RefusedSourceError: it is a playlist or a script.
        BrokenVideoError: it holds no readable video stream.
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
    """Opens a local file and reads its index.

    Args:
        path: a local file.
        stream_index: a video stream of the file; None takes the one that FFmpeg holds for the best.
        num_threads: of the decoder; 0 chooses.
        by_decoding: count and time the frames that come out of the decoder, not the packets that go in: for the rare
            codec in which a packet need not hold one frame. Costs the time of decoding everything.
        max_frame_pixels: height × width above which nothing is decoded.
        name: for messages; the path if None.

    Raises:
        FileNotFoundError, RefusedSourceError, BrokenVideoError: as ``probe``.
        LimitError: larger frames than ``max_frame_pixels``.
    """
    resolved, kind = local_video(path)
    name = name or str(resolved)

    def opened() -> tuple[InputContainer, VideoStream]:
        # max_pixels stops frames that are larger than the header says
        options = {**PYAV_OPTIONS, "max_pixels": str(max_frame_pixels)}
        # FFmpeg takes a long row of JPEG pictures for a pipe of images
        forced = "mjpeg" if kind == "mjpeg" else None
        container = av.open(str(resolved), format=forced, options=options, metadata_errors="replace")
        try:
            stream = _choose_stream(container, stream_index, name)
            _check_size(resolved, name, stream, max_frame_pixels)
            if stream.codec_context.name == "hevc":  # else it shows what damage left of a picture, and says nothing
                stream.codec_context.options = {"err_detect": "explode"}
            stream.codec_context.thread_count = num_threads or _threads(stream)
            stream.thread_type = "AUTO"
        except FAILURES:
            container.close()
            raise
        return container, stream

    try:
        return _by_frames(resolved, name, opened) if by_decoding else _by_packets(resolved, name, opened)
    except VideoError:
        raise
    except FAILURES as error:
        raise BrokenVideoError(
            f"{name} cannot be read as a video (pyav, whose packet index every backend uses: {one_line(error)}). "
            "Re-encode the file, or remove it."
        ) from error


def one_line(error: BaseException) -> str:
    """The first 200 characters of an error (torchcodec's is 6 kB where FFmpeg is missing)."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= 200 else text[:200] + "…"


def _choose_stream(container: InputContainer, stream_index: int | None, name: str) -> VideoStream:
    # PyAV has no decoder for a stream whose codec context is None
    videos = {stream.index: stream for stream in container.streams.video if stream.codec_context is not None}
    if stream_index is not None:
        if stream_index not in videos:
            raise VideoError(
                f"stream_index={stream_index} is no video stream of {name}: choose from {sorted(videos)}, or use null."
            )
        return videos[stream_index]
    if not videos:
        unknown = " of a known codec" if container.streams.video else ""
        raise ValueError(f"it has no video stream{unknown}")
    moving = [stream for stream in videos.values() if not stream.disposition & stream.disposition.attached_pic]
    best = container.streams.best("video")
    if isinstance(best, VideoStream) and best.index in videos and (best in moving or not moving):
        return best
    return (moving or list(videos.values()))[0]  # cover art is the picture only where there is no other


def _threads(stream: VideoStream) -> int:
    """More than cores, for decoding threads wait for each other; each holds a frame, of 128 MB in all."""
    frame_bytes = max(1, stream.codec_context.width * stream.codec_context.height * 3 // 2)
    return max(1, min(max(8, os.cpu_count() or 1), 16, 2**27 // frame_bytes))


def _check_size(path: Path, name: str, stream: VideoStream, max_frame_pixels: int) -> None:
    if len(stream.index_entries) > path.stat().st_size:
        raise LimitError(
            f"{name} says it has {len(stream.index_entries)} frames, but it has {path.stat().st_size} bytes: its "
            "header is damaged, or meant to fill memory. Leave it out."
        )
    width, height = stream.codec_context.width, stream.codec_context.height
    if width * height > max_frame_pixels:
        raise LimitError(
            f"{name} has frames of {width}x{height} pixels, more than max_frame_pixels={max_frame_pixels}: make it "
            "smaller, or raise the limit."
        )


def _by_packets(path: Path, name: str, opened: Opener) -> OpenVideo:
    container, stream = opened()
    try:
        first: VideoFrame | None = None
        seen, held, keys, tried = [], 0, [], False
        is_vp8 = stream.codec_context.name == "vp8"
        for packet in container.demux(stream):
            size = packet.size
            if packet.is_keyframe and not tried:
                tried, first = True, _frame_of(packet, stream)
            held += size > 0
            if not size or packet.is_discard or (is_vp8 and not bytes(packet)[0] & _SHOWN_VP8):
                continue  # the flush at the end; what lies before the start of an edit list; what is never shown
            seen.append(packet.pts)
            keys.append(packet.is_keyframe)
        if first is None:  # FFmpeg's VP9 decoder crashes where it goes on after an error: a fresh one
            container.close()
            container, stream = opened()
            first = _first_frame(container, stream)
            container.close()
            container, stream = opened()
        lost = _listed(stream, held) - held
        pts = None if None in seen or len(set(seen)) != len(seen) else np.array(seen, np.int64)
        # AVI and ASF know only when a packet is decoded: the frames come in another order than these times
        reordered = container.format.name in ("avi", "asf") and stream.codec_context.has_b_frames > 0
        order = np.arange(len(seen)) if pts is None else np.argsort(pts)
        in_order = None if pts is None else pts[order]
        return _indexed(path, name, container, stream, first, in_order, np.array(keys)[order], lost, reordered)
    except FAILURES:
        container.close()
        raise


def _by_frames(path: Path, name: str, opened: Opener) -> OpenVideo:
    container, stream = opened()
    try:
        first: VideoFrame | None = None
        seen, keys = [], []
        for frame in container.decode(stream):
            first = first or frame
            seen.append(frame.pts)
            keys.append(frame.key_frame)
        if (listed := _listed(stream, len(seen))) > len(seen):
            raise ValueError(f"its header lists {listed} frames, but only {len(seen)} decode")
        known = [time for time in seen if time is not None]
        rising = len(known) == len(seen) and sorted(set(known)) == known
        pts = np.array(known, np.int64) if rising else None
        return _indexed(path, name, container, stream, first, pts, np.array(keys), lost=0)
    except FAILURES:
        container.close()
        raise


def _frame_of(packet: av.Packet, stream: VideoStream) -> VideoFrame | None:
    """The frame of one packet, if it decodes by itself, as a keyframe does; leaves the decoder as new, or broken."""
    try:
        frames = [*packet.decode(), *stream.codec_context.decode(None)]  # drained: threads would wait for more packets
        stream.codec_context.flush_buffers()
    except (av.error.InvalidDataError, av.error.EOFError):
        return None
    return next((frame for frame in frames if isinstance(frame, VideoFrame)), None)


def _first_frame(container: InputContainer, stream: VideoStream) -> VideoFrame | None:
    """The first frame that comes out of the decoder: where the first keyframe is damaged, or lies before the start of
    an edit list."""
    for packet in container.demux(stream):
        try:
            for frame in packet.decode():
                if isinstance(frame, VideoFrame):
                    return frame
        except (av.error.InvalidDataError, av.error.EOFError):
            continue
    return None


def _listed(stream: VideoStream, held: int) -> int:
    """Packets that the header promises, where it lists each (mp4, mov, avi); else those that were found."""
    entries = stream.index_entries
    if len(entries) <= held:
        return held
    return max(held, sum(entry.size > 0 for entry in entries))


def _indexed(
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
        raise ValueError("its video stream has no frame that decodes")
    rate = float((stream.average_rate if pts is not None else stream.guessed_rate) or stream.guessed_rate or 0)
    if stream.disposition & stream.disposition.attached_pic:
        rate = 0.0  # cover art: a still, whose stream claims 90,000 frames a second
    base = stream.time_base
    if pts is not None and base is not None:
        timestamps = pts * base.numerator / base.denominator
    else:
        timestamps = np.arange(len(keys)) / (rate or 1.0)
    if len(keys) > 1 and timestamps[-1] > timestamps[0]:
        rate = (len(keys) - 1) / float(timestamps[-1] - timestamps[0])
    step = 1 / rate if rate else 0.0
    if lost:  # their true times went with them
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
