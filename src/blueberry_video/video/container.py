"""Packet index of a video file: number of frames, timestamps, keyframes.

PyAV reads all packets once, which defines "frame i" by display order and timestamp. A decoder of ``backends.py`` with
different timestamps fails on that file, so that falling back to the next one never changes which frame is returned. An
``OpenVideo`` exists only inside one call: it is never opened before a fork and never pickled.
"""

import contextlib
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import NamedTuple

import av
import numpy as np
from av.container import InputContainer
from av.video.frame import VideoFrame
from av.video.stream import VideoStream

from blueberry_video.video.errors import BrokenVideoError, LimitError, VideoError, one_line
from blueberry_video.video.extent import Cut, find_cut
from blueberry_video.video.packets import is_user_data, picture_test, recovery_test
from blueberry_video.video.picture import orientation
from blueberry_video.video.picture_info import PictureInfo, picture_info
from blueberry_video.video.sniff import local_video
from blueberry_video.video.source_options import MAX_FRAME_PIXELS

FORMATS = (  # containers that hold their own frames; excludes playlists, image sequences and devices
    "mov,mp4,m4a,3gp,3g2,mj2,matroska,webm,avi,mpeg,mpegts,mpegvideo,flv,asf,ogg,gif,ivf,obu,av1,h264,hevc,m4v,mjpeg,"
    "yuv4mpegpipe,mxf,dv,mp3,flac,nut,rm,wtv"
)
PYAV_OPTIONS = {"protocol_whitelist": "file", "format_whitelist": FORMATS}
FAILURES = (ImportError, OSError, RuntimeError, ValueError, IndexError, av.error.FFmpegError)  # raised by decoders
Opener = Callable[[int | None], tuple[InputContainer, VideoStream]]
SHORT_GOP = 8  # packets per keyframe up to which one decoding thread is fastest


@dataclass(frozen=True, eq=False)
class VideoInfo:
    """Properties of a video file, read from its packets.

    Attributes:
        path: resolved path of the file.
        name: name in messages; the input of the user where the file is temporary.
        num_frames: number of displayed frames, including frames that the header lists but the file does not hold.
        fps: (n - 1) / (last - first timestamp); the rate in the header for a single frame; 0.0 if both are unknown.
        duration: seconds from the first frame to the end of the last, from the duration of its packet; from the header
            where packets have none; else as if it were shown for the mean interval.
        height, width: pixels after rotation.
        timestamps: float64 (num_frames,) seconds in display order, with any start.
        keyframes: int64 (k,) indices of the frames at which decoding can start.
        codec, pixel_format, container: FFmpeg's names.
        rotation: counter-clockwise rotation for display in degrees: 0, 90, 180 or 270.
        stream_index: index of the video stream in the file.
        lost: number of frames at the end that the header lists but the file does not hold.
        cut: the end that the file lacks according to its headers; None for a whole file, and where they do not tell.
        picture: pixel aspect ratio, fields, HDR and transparency.
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
    cut: Cut | None = None
    picture: PictureInfo = field(default_factory=PictureInfo)

    @property
    def damage(self) -> str:
        """What the file lacks, for messages and reports; empty for a whole file."""
        return str(self.cut) if self.cut else ""

    @property
    def lacks_frames(self) -> bool:
        """Whether frames are missing at the end, as far as the headers tell: mp4 lists every frame, so that only those
        that are listed count there; in other containers a cut file has lost frames that nothing counts."""
        unlisted = self.cut is not None and self.cut.declared is not None and not self.container.startswith("mov")
        return self.lost > 0 or unlisted


class SeekPoint(NamedTuple):
    """Packet of a keyframe: index of its frame, presentation and decoding time in the time base of the stream. The
    decoding time is the presentation time where it is unknown."""

    frame: int
    pts: int
    dts: int


@dataclass(frozen=True, eq=False)
class OpenVideo:
    """Open container with the packet index of its video stream. A context manager that closes the container.

    Attributes:
        container, stream: of PyAV, at any position.
        info: properties of the file.
        pts: int64 (num_frames,) in display order; None if frames and packets have different pts.
        seek_points: ascending; empty if the packets of keyframes have no timestamps.
    """

    container: InputContainer
    stream: VideoStream
    info: VideoInfo
    pts: np.ndarray | None
    seek_points: tuple[SeekPoint, ...] = ()

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

    def opened(threads: int | None) -> tuple[InputContainer, VideoStream]:
        # max_pixels stops frames that are larger than in the header
        options = {**PYAV_OPTIONS, "max_pixels": str(max_frame_pixels)}
        forced = "mjpeg" if kind == "mjpeg" else None  # FFmpeg detects a long one as an image pipe
        container = av.open(str(resolved), format=forced, options=options, metadata_errors="replace")
        try:
            stream = _choose_stream(container, stream_index, name)
            _check_size(resolved, name, stream, max_frame_pixels)
            if stream.codec_context.name == "hevc":  # otherwise it returns damaged frames without an error
                stream.codec_context.options = {"err_detect": "explode"}
            stream.codec_context.thread_count = threads or num_threads or _threads(stream)
            stream.thread_type = "AUTO"
        except FAILURES:
            container.close()
            raise
        return container, stream

    cut = find_cut(resolved, kind)
    try:
        if by_decoding:
            video = _index_frames(resolved, name, opened)
        else:
            video = _index_packets(resolved, name, opened, num_threads)
        return replace(video, info=replace(video.info, cut=cut)) if cut else video
    except VideoError:
        raise
    except FAILURES as error:
        if cut:
            raise BrokenVideoError(
                f"{name} is {cut}. Its rest cannot be read as a video ({one_line(error)})."
            ) from error
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


def _threads(stream: VideoStream, gop: float = float("inf")) -> int:
    """Returns the number of decoding threads.

    8 to 16, because they wait for each other, with at most 128 MB; one if a GOP is so short that threads would mostly
    be filled and emptied.
    """
    if gop <= SHORT_GOP:
        return 1
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


def _index_packets(path: Path, name: str, opened: Opener, num_threads: int) -> OpenVideo:
    container, stream = opened(None)
    try:
        key_packet: av.Packet | None = None
        num_packets, num_keys = 0, 0
        seen, keys, decoding_times, durations, early = [], [], [], [], set()
        shows_frame, is_correct = picture_test(stream), recovery_test(stream)
        for packet in container.demux(stream):
            if not packet.size:
                continue  # the flush packet at the end; frames that AVI drops
            num_packets += 1
            is_key = packet.is_keyframe and is_correct(packet)
            num_keys += is_key
            if is_key and key_packet is None:
                key_packet = packet
            if packet.is_discard or not shows_frame(packet):
                continue  # packets before an edit list; packets without a frame
            key_pts = None if key_packet is None else key_packet.pts
            if packet.pts is not None and (key_packet is None or (key_pts is not None and packet.pts < key_pts)):
                early.add(packet.pts)  # precedes the first keyframe, in decoding or in display order
            seen.append(packet.pts)
            keys.append(is_key)
            decoding_times.append(packet.dts)
            durations.append(packet.duration)
        if None in seen or len(set(seen)) != len(seen):
            # without times, only decoding tells which frames there are; a damaged file keeps the index of its packets
            with contextlib.suppress(*FAILURES):
                by_decoding = _index_frames(path, name, opened)
                container.close()
                return by_decoding
        threads = num_threads or _threads(stream, num_packets / max(1, num_keys))
        stream.codec_context.thread_count = threads
        first = _decode_alone(key_packet, stream) if key_packet is not None else None
        if first is None:  # reopened, because FFmpeg's VP9 decoder crashes if it continues after an error
            container.close()
            container, stream = opened(threads)
            first = _first_frame(container, stream)
            container.close()
            container, stream = opened(threads)
        lost = _num_listed(stream, num_packets) - num_packets
        known = [pts for pts in seen if pts is not None]
        has_times = len(set(known)) == len(seen)
        kept = list(range(len(seen)))
        if has_times:
            if early and key_packet is not None and key_packet.pts is not None:
                absent = early - _shown_at_start(opened, key_packet.pts)
                kept = [number for number in kept if known[number] not in absent]
            kept.sort(key=known.__getitem__)
        # AVI and ASF store decoding times only: with B-frames, they are not in display order
        reordered = container.format.name in ("avi", "asf") and stream.codec_context.has_b_frames > 0
        pts = np.array([known[number] for number in kept], np.int64) if has_times else None
        points = []
        for index, number in enumerate(kept):
            if keys[number] and has_times and not reordered:
                dts = decoding_times[number]
                points.append(SeekPoint(index, known[number], known[number] if dts is None else dts))
        return _with_info(
            *(path, name, container, stream, first, pts, np.array([keys[number] for number in kept])),
            lost=lost,
            last_duration=_last_duration(container, stream, [(known[i], durations[i]) for i in kept], kept)
            if has_times
            else None,
            reordered=reordered,
            seek_points=points,
        )
    except FAILURES:
        container.close()
        raise


def _index_frames(path: Path, name: str, opened: Opener) -> OpenVideo:
    container, stream = opened(None)
    try:
        first: VideoFrame | None = None
        seen, keys, durations, by_key = [], [], [], {}
        has_key, is_correct, shows_frame = False, recovery_test(stream), picture_test(stream)
        for packet in container.demux(stream):
            is_key = bool(packet.size) and packet.is_keyframe and is_correct(packet)
            pts, dts = packet.pts, packet.dts
            has_key = has_key or is_key
            if is_key and pts is not None:
                by_key[pts] = pts if dts is None else dts
            try:
                frames = video_frames(packet, shows_frame)
            except av.error.InvalidDataError:
                if has_key:
                    raise
                continue  # a recording that starts between keyframes
            for frame in frames:
                first = first or frame
                seen.append(frame.pts)
                keys.append(frame.key_frame)
                durations.append(frame.duration)
        if (listed := _num_listed(stream, len(seen))) > len(seen):
            raise ValueError(f"the header lists {listed} frames, but only {len(seen)} decode")
        known = [time for time in seen if time is not None]
        rising = len(known) == len(seen) and sorted(set(known)) == known
        times = np.array(known, np.int64) if rising else None
        points = [SeekPoint(i, time, by_key[time]) for i, time in enumerate(seen) if time in by_key] if rising else []
        last = durations[-1] if durations else None
        return _with_info(path, name, container, stream, first, times, np.array(keys), 0, last, seek_points=points)
    except FAILURES:
        container.close()
        raise


def _shown_at_start(opened: Opener, key: int) -> set[int]:
    """Returns the timestamps of the frames that the decoder returns before that of the first keyframe, ``key``.

    A recording may start between keyframes, and its first keyframe may follow frames that are predicted from earlier
    ones. The decoder skips what it cannot decode there.
    """
    shown: set[int] = set()
    container, stream = opened(1)
    shows_frame = picture_test(stream)
    with container:
        for packet in container.demux(stream):
            with contextlib.suppress(av.error.InvalidDataError):
                for frame in video_frames(packet, shows_frame):
                    if frame.pts is None or frame.pts >= key:
                        return shown
                    shown.add(frame.pts)
    return shown


def _decode_alone(packet: av.Packet, stream: VideoStream) -> VideoFrame | None:
    """Decodes a single packet, such as a keyframe; None on failure. Flushes the decoder, or leaves it broken."""
    try:
        frames = [*packet.decode(), *stream.codec_context.decode(None)]  # drained: threads wait for more packets
        stream.codec_context.flush_buffers()
    except (av.error.InvalidDataError, av.error.EOFError):
        return None
    return next((frame for frame in frames if isinstance(frame, VideoFrame)), None)


def video_frames(packet: av.Packet, shows_frame: Callable[[av.Packet], bool] | None = None) -> list[VideoFrame]:
    """Returns the frames that the decoder yields for a packet.

    With ``shows_frame``, the ``picture_test`` of the stream, a packet without a picture is no error in H.264 and MPEG:
    its parameter sets are read, and user data alone is not decoded.
    """
    context = packet.stream.codec_context
    if shows_frame is not None and context.name.startswith("mpeg") and is_user_data(bytes(packet)):
        return []  # decoding threads would raise the error for a later packet
    if shows_frame is not None and context.name == "h264":
        context.skip_frame = "NONREF" if packet.size and not shows_frame(packet) else "DEFAULT"
    try:
        return [frame for frame in packet.decode() if isinstance(frame, VideoFrame)]
    except av.error.InvalidDataError:
        if shows_frame is None or not packet.size or not context.name.startswith("mpeg") or shows_frame(packet):
            raise
        return []


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


def _last_duration(
    container: InputContainer, stream: VideoStream, shown: Sequence[tuple[int, int | None]], order: Sequence[int]
) -> int | None:
    """Returns the display time of the last frame in the time base of the stream; None if unknown.

    It is the duration of its packet. That is 0 in FLV and ASF; and in mp4 it is the time to the next packet in decoding
    order, which at a varying rate with B-frames is not the display time. There the header names the end of the stream.

    Args:
        container, stream: of PyAV.
        shown: presentation time and duration of each packet, in display order.
        order: position of these packets in the file.
    """
    if not shown:
        return None
    last, duration = shown[-1]
    kind = container.format.name.split(",")[0]
    reordered = list(order) != sorted(order) and len({found for _, found in shown}) > 1
    if (duration or kind not in ("flv", "asf")) and not (kind == "mov" and reordered):
        return duration
    end = (stream.start_time or 0) + stream.duration if stream.duration else 0
    if not end and container.duration and len(container.streams) == 1 and stream.time_base:
        end = round(((container.start_time or 0) + container.duration) / av.time_base / stream.time_base)
    return end - last if end > last else duration


def _with_info(
    path: Path,
    name: str,
    container: InputContainer,
    stream: VideoStream,
    first: VideoFrame | None,
    pts: np.ndarray | None,
    keys: np.ndarray,
    lost: int,
    last_duration: int | None = None,
    reordered: bool = False,
    seek_points: Sequence[SeekPoint] = (),
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
    last_seconds = float(last_duration * base) if last_duration and base is not None and not lost else step
    if lost:  # their true timestamps are unknown
        timestamps = np.concatenate([timestamps, timestamps[-1] + step * np.arange(1, lost + 1)])
    turns, _ = orientation(first)
    height, width = (first.width, first.height) if turns % 2 else (first.height, first.width)
    info = VideoInfo(
        path=path,
        name=name,
        num_frames=len(timestamps),
        fps=rate,
        duration=float(timestamps[-1] - timestamps[0]) + last_seconds,
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
        picture=picture_info(stream, first, turns),
    )
    return OpenVideo(container, stream, info, None if reordered else pts, tuple(seek_points))
