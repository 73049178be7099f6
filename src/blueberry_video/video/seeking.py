"""Decoding of selected frames with PyAV: one rule of seeking for all containers.

MP4 and Matroska seek to presentation times; transport and program streams (TS, M2TS, MPG, VOB) to decoding times, so
that a seek to the presentation time of a keyframe lands after it where B-frames follow. A seek has landed if the packet
of the keyframe follows; what precedes it is not decoded. Otherwise the next seek goes to the decoding time, then to
earlier times, and in the end the file is read from its start. What landed once is tried first for later keyframes.
"""

import contextlib
import itertools
from bisect import bisect_right
from collections.abc import Iterator, Sequence

import av
from av.container import InputContainer
from av.video.frame import VideoFrame
from av.video.stream import VideoStream

from blueberry_video.video.alpha import AlphaDecoder
from blueberry_video.video.container import OpenVideo, SeekPoint, video_frames
from blueberry_video.video.packets import picture_test

# codecs in which no other frame depends on a non-reference frame
_SKIPPABLE = {"h264", "mpeg1video", "mpeg2video", "mpeg4"}
# codecs in which no frame depends on one that precedes the keyframe in display order and follows it in decoding order
_LEADING = {"hevc", "mpeg1video", "mpeg2video", "mpeg4"}
_SECONDS_EARLIER = (1, 5, 25, 125)


def selected_frames(video: OpenVideo, wanted: Sequence[int]) -> Iterator[VideoFrame]:
    """Yields wanted frames, decoded from the keyframe before each. Stops at the first frame that is not found.

    Args:
        video: an open file.
        wanted: ascending frame indices.

    Raises:
        av.error.InvalidDataError: a packet from the keyframe to the frame does not decode.
    """
    if video.pts is None:
        return
    times = video.pts.tolist()
    numbers = [number for number in wanted if number < len(times)]
    known = frozenset(times)
    with contextlib.ExitStack() as stack:
        cursor = _Cursor(video, stack)
        for first, run in _runs(video, numbers):
            targets, point, back = [times[number] for number in run], first, 1
            while targets:
                for frame in cursor.decoded(video.seek_points[point] if point >= 0 else None, targets, known):
                    yield frame
                    targets = targets[1:]
                if targets and point < 0:
                    return
                point, back = max(point - back, -1), 2 * back  # after some keyframes, decoders need more frames


def _runs(video: OpenVideo, numbers: Sequence[int]) -> list[tuple[int, list[int]]]:
    """Returns (position of the seek point, frames to decode from it without another seek): decoding a few frames in
    between is cheaper than filling the threads again."""
    points = [point.frame for point in video.seek_points]
    runs: list[tuple[int, list[int]]] = []
    before = -1
    for number in numbers:
        point = bisect_right(points, number) - 1
        if runs and (point == before or points[point] - runs[-1][1][-1] <= max(1, video.num_threads)):
            runs[-1][1].append(number)
        else:
            runs.append((point, [number]))
        before = point
    return runs


class _Cursor:
    """Position in a file, which it opens again where seeking fails."""

    def __init__(self, video: OpenVideo, stack: contextlib.ExitStack):
        self._video, self._stack = video, stack
        self._container, self._stream = video.container, video.stream
        self._alpha = AlphaDecoder(video.stream)
        self._step = 0  # kind of seek that landed
        self._packets: Iterator[av.Packet] | None = None  # from the start of the file

    def decoded(self, point: SeekPoint | None, targets: Sequence[int], known: frozenset[int]) -> Iterator[VideoFrame]:
        """Yields the frames at ``targets``, decoded from a seek point, or from the start of the file if that is None.
        Ends at the first frame that does not come. ``known`` are the times of all frames."""
        packets = self._start() if point is None else self._land(point)
        context, waiting, left = self._stream.codec_context, set(targets), list(targets)
        skips, drops = context.name in _SKIPPABLE, point is not None and context.name in _LEADING
        ended, shows = False, picture_test(self._stream)
        tested = None if skips and context.name == "h264" else shows  # skip_frame is set here
        for packet in packets:
            pts, ended = packet.pts, not packet.size
            if not waiting and pts in known:
                break  # others are the second fields of a frame
            if drops and pts is not None and point is not None and pts < point.pts:
                continue
            if skips:
                # skipped, a packet without a picture is no error, and its parameter sets are read
                context.skip_frame = (
                    "DEFAULT" if ended or ((pts in waiting or pts not in known) and shows(packet)) else "NONREF"
                )
            waiting.discard(pts)
            self._alpha.feed(packet)
            for frame in self._alpha.attach(video_frames(packet, tested)):
                if not left or frame.pts is None or frame.pts > left[0]:
                    break
                if frame.pts == left[0]:
                    left.pop(0)
                    yield frame
            if not left:
                break
        if left and not ended:
            rest = [frame for frame in context.decode(None) if isinstance(frame, VideoFrame)]
            for frame in self._alpha.attach(rest):
                if left and frame.pts == left[0]:
                    left.pop(0)
                    yield frame
        context.flush_buffers()
        self._alpha.flush()

    def _land(self, point: SeekPoint) -> Iterator[av.Packet]:
        """Returns the packets of the stream from that of a keyframe on."""
        base = self._stream.time_base
        seconds = [round(earlier / base) if base else 0 for earlier in _SECONDS_EARLIER]
        times = [point.pts, point.dts, *(point.dts - earlier for earlier in seconds)]
        while self._step < len(times):
            with contextlib.suppress(av.error.FFmpegError):  # also errors before the keyframe, which are no damage
                self._container.seek(times[self._step], stream=self._stream)
                if packets := _from_packet(self._container.demux(self._stream), point):
                    return packets
            self._step += 1
        if self._packets is not None and (packets := _from_packet(self._packets, point)):
            return packets
        return _from_packet(self._start(), point) or iter(())

    def _start(self) -> Iterator[av.Packet]:
        self._stack.close()
        reopening = reopened(self._video, self._video.num_threads)
        self._container, self._stream = self._stack.enter_context(reopening)
        self._packets = self._container.demux(self._stream)
        return self._packets


def _from_packet(packets: Iterator[av.Packet], point: SeekPoint) -> Iterator[av.Packet] | None:
    """Returns the packets from that of the keyframe on, or None if they start after it or lack it."""
    for packet in packets:
        if packet.is_keyframe and packet.pts == point.pts:
            return itertools.chain([packet], packets)
        if packet.dts is not None and packet.dts > point.dts:
            return None
        if packet.is_keyframe and packet.pts is not None and packet.pts > point.pts:
            return None
    return None


@contextlib.contextmanager
def reopened(video: OpenVideo, num_threads: int) -> Iterator[tuple[InputContainer, VideoStream]]:
    """Opens the file again, at its start, with a new decoder."""
    forced = "mjpeg" if video.container.format.name == "mjpeg" else None
    options = dict(video.container.options)  # the same limits
    with av.open(str(video.info.path), format=forced, options=options, metadata_errors="replace") as container:
        stream = container.streams[video.stream.index]
        assert isinstance(stream, VideoStream)
        stream.codec_context.thread_count = num_threads
        stream.thread_type = "AUTO"
        stream.codec_context.options = video.stream.codec_context.options
        yield container, stream
