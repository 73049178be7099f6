"""Four decoders behind one shape: wanted frame numbers in, pictures out, one after another and forward.

Each raises where it cannot show exactly the frames of the packet index. Indices are sorted and decoded forward: jumping
back and forth costs a long-GOP file most of its time.

Decoding pictures that nothing refers to and nobody asked for is skipped in PyAV (``skip_frame``): in H.264 and MPEG-1,
2 and 4 a B-frame of that kind changes no other picture, so what is shown stays the same to the bit.
"""

import contextlib
import functools
import io
import tempfile
from bisect import bisect_right
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import av
import numpy as np
import torch
from av.container import InputContainer
from av.video.frame import VideoFrame
from av.video.stream import VideoStream
from torch import Tensor

from blueberry_video.video.container import FAILURES, OpenVideo, one_line, open_video
from blueberry_video.video.picture import ToRGB


class DamagedError(ValueError):
    """A decoder met damage: another one would show what it makes of it, and not say so."""


_SKIPPABLE = {"h264", "mpeg1video", "mpeg2video", "mpeg4"}  # codecs whose "non-reference" means: of no other picture
_BATCH = 16  # frames that a backend without a forward iterator decodes at once


def read_pyav(video: OpenVideo, wanted: Sequence[int], device: str = "cpu") -> Iterator[Tensor]:
    """Pictures uint8 (H, W, 3) of ascending frame numbers.

    Seeks to the keyframe before a wanted frame and decodes forward; where a file cannot seek, or its frames do not
    carry its packets' timestamps, decodes everything from the start.

    Raises:
        DamagedError: these frames, or what they are predicted from, are damaged.
        ValueError, av.error.FFmpegError: they cannot be decoded.
    """
    done, to_rgb = 0, ToRGB((video.info.height, video.info.width))
    try:
        for frame in _by_timestamp(video, wanted):
            yield to_rgb(_whole(frame))
            done += 1
        if done < len(wanted):
            with _again(video, video.num_threads) as (container, stream):  # a raw stream cannot seek back to its start
                for frame in _from_the_start(video, container, stream, wanted[done:]):
                    yield to_rgb(_whole(frame))
    except av.error.InvalidDataError as error:
        raise DamagedError(one_line(error)) from error


def read_torchcodec(video: OpenVideo, wanted: Sequence[int], device: str = "cpu") -> Iterator[Tensor]:
    """As ``read_pyav``; pictures are on ``device``, which may be a CUDA device whose decoder is then used.

    Raises:
        ImportError, RuntimeError, ValueError: FFmpeg's libraries are missing, or it shows other frames.
    """
    from torchcodec.decoders import VideoDecoder  # raises where FFmpeg's libraries are missing

    info = video.info
    if video.pts is None:
        raise ValueError("torchcodec finds frames by their times, which this file does not tell")
    decoder = VideoDecoder(
        info.path,
        stream_index=info.stream_index,
        dimension_order="NHWC",
        num_ffmpeg_threads=video.num_threads,
        device=device,
        seek_mode="exact",  # the approximate mode shows wrong frames where the rate varies
    )
    _same_count("torchcodec", len(decoder), video)
    for start in range(0, len(wanted), _BATCH):
        numbers = list(wanted[start : start + _BATCH])
        batch = decoder.get_frames_at(numbers)
        _same_times("torchcodec", batch.pts_seconds.numpy(), video, numbers, 1e-4)
        yield from batch.data


def read_decord(video: OpenVideo, wanted: Sequence[int], device: str = "cpu") -> Iterator[Tensor]:
    """As ``read_pyav``, by decord 0.6, which is unmaintained and can hang on damaged files: for a killable process.

    Raises:
        ImportError, RuntimeError, ValueError: it is not installed, cannot read the file, or shows other frames.
    """
    import decord

    info = video.info
    if info.rotation:
        raise ValueError("decord pads turned pictures with black where their width is no multiple of 32")
    if info.container == "mpegts":
        raise ValueError("decord shows other frames of transport streams than the packets say")
    if info.pixel_format not in ("yuv420p", "yuvj420p") or info.height % 2 or info.width % 2:
        raise ValueError(f"decord converts {info.pixel_format} of {info.height}x{info.width} pixels to other colours")
    try:
        reader = decord.VideoReader(str(info.path), ctx=decord.cpu(0), num_threads=video.num_threads)
        _same_count("decord", len(reader), video)
        _same_times(
            "decord", np.asarray(reader.get_frame_timestamp(list(wanted)))[:, 0], video, wanted, 2e-3
        )  # float32
        last = -1
        for number in wanted:
            for _ in range(number - last - 1):
                reader.next()  # its seeking, and its skipping, show wrong frames in open groups of pictures
            picture = torch.from_numpy(reader.next().asnumpy())
            last = number
            if picture.shape[:2] != (info.height, info.width):
                raise ValueError(f"decord shows {tuple(picture.shape[:2])} pixels, not the size after rotation")
            yield picture
    except decord.DECORDError as error:  # a plain Exception, which no caller should have to know
        raise RuntimeError(str(error)) from error


def read_torchvision(video: OpenVideo, wanted: Sequence[int], device: str = "cpu") -> Iterator[Tensor]:
    """As ``read_pyav``, by ``torchvision.io.read_video`` where it exists (before 0.26); reads the whole file.

    Raises:
        ImportError, RuntimeError, ValueError: there is no such function, or it shows other frames.
    """
    from torchvision.io import read_video

    pictures, _, _ = read_video(str(video.info.path), pts_unit="sec", output_format="THWC")
    _same_count("torchvision", len(pictures), video)
    if video.info.rotation or pictures.shape[1:3] != (video.info.height, video.info.width):
        raise ValueError("torchvision does not turn pictures as the file says")
    for number in wanted:
        yield pictures[number]


READERS: dict[str, Callable[[OpenVideo, Sequence[int], str], Iterator[Tensor]]] = {
    "pyav": read_pyav,
    "torchcodec": read_torchcodec,
    "decord": read_decord,
    "torchvision": read_torchvision,
}


@functools.cache
def backend_failure(name: str) -> str | None:
    """Why a backend does not work in this process, or None where it has decoded a tiny clip (tried once, on first use).

    Raises:
        ValueError: there is no backend of that name.
    """
    if name not in READERS:
        raise ValueError(f"backends names {name!r}, which does not exist: choose from {', '.join(READERS)}.")
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "tiny.avi")
        path.write_bytes(_tiny_clip())
        try:
            with open_video(path) as video:
                pictures = list(READERS[name](video, [0, 2], "cpu"))
        except FAILURES as error:
            return one_line(error)
    levels = [picture.float().mean().item() for picture in pictures]
    right = len(levels) == 2 and abs(levels[0] - 40) < 3 and abs(levels[1] - 200) < 3
    return None if right else f"decodes wrong pixels (mean levels {levels})"


def salvage(video: OpenVideo, wanted: Sequence[int]) -> Iterator[tuple[Tensor, bool, bool]]:
    """What can be decoded of ascending frame numbers, packet by packet: (uint8 (H, W, 3), is missing, is suspect).

    A missing picture is the nearest one before it that decodes (for the first ones: the first that does). A suspect one
    decoded, but after damage and before the next keyframe, so that it was predicted from what is wrong or gone. Reads
    from the start, with one picture in memory.

    Raises:
        ValueError: not one frame decodes.
    """
    to_rgb = ToRGB((video.info.height, video.info.width))
    last: VideoFrame | None = None
    position = 0  # how many of ``wanted`` are passed
    with _again(video, num_threads=1) as (container, stream):  # slices in threads of their own hide damage
        for number, (frame, is_suspect) in _numbered(video, _undamaged(container, stream)):
            while position < len(wanted) and wanted[position] <= number:
                is_missing = wanted[position] < number
                yield to_rgb(last or frame if is_missing else frame), is_missing, is_suspect and not is_missing
                position += 1
            last = frame
            if position == len(wanted):
                return
    if last is None:
        raise ValueError("not one of its frames decodes")
    for _ in wanted[position:]:
        yield to_rgb(last), True, False


@contextlib.contextmanager
def _again(video: OpenVideo, num_threads: int) -> Iterator[tuple[InputContainer, VideoStream]]:
    """The file and its stream, at its start, with a decoder that knows nothing yet."""
    forced = "mjpeg" if video.container.format.name == "mjpeg" else None
    options = dict(video.container.options)  # a limit that was raised is raised here too
    with av.open(str(video.info.path), format=forced, options=options, metadata_errors="replace") as container:
        stream = container.streams[video.stream.index]
        assert isinstance(stream, VideoStream)
        stream.codec_context.thread_count = num_threads
        stream.thread_type = "AUTO"
        stream.codec_context.options = video.stream.codec_context.options
        yield container, stream


def _by_timestamp(video: OpenVideo, wanted: Sequence[int]) -> Iterator[VideoFrame]:
    """Seeks to the keyframe before a wanted frame and decodes forward; stops early where a wanted frame does not
    come."""
    pts, container, stream = video.pts, video.container, video.stream
    if pts is None:
        return
    targets = [int(pts[number]) for number in wanted if number < len(pts)]
    keyframes = [int(pts[number]) for number in video.info.keyframes]
    near: Iterator[VideoFrame] = iter(())
    position: int | None = None
    for target in targets:
        last_key = bisect_right(keyframes, target) - 1
        if position is None or (last_key >= 0 and keyframes[last_key] > position):
            # one keyframe earlier where a seek lands behind its target: some containers seek by decoding time
            for key in (last_key, last_key - 1):
                container.seek(keyframes[key] if key >= 0 else int(pts[0]), stream=stream)
                near = _frames(container, stream, set(targets))
                frame = _next_until(near, target)
                if frame is not None or key < 0:
                    break
        else:
            frame = _next_until(near, target, position)
        if frame is None:
            return
        yield frame
        position = target


def _next_until(frames: Iterator[VideoFrame], target: int, last: int | None = None) -> VideoFrame | None:
    """The frame of that timestamp, or None where none comes, or frames come in another order than their times; the one
    before had the timestamp ``last``."""
    for frame in frames:
        if frame.pts is None or frame.pts > target or (last is not None and frame.pts <= last):
            return None
        last = frame.pts
        if frame.pts == target:
            return frame
    return None


def _frames(container: InputContainer, stream: VideoStream, targets: set[int]) -> Iterator[VideoFrame]:
    """Frames from where the container stands, without those that nobody needs."""
    context = stream.codec_context
    skips = context.name in _SKIPPABLE
    for packet in container.demux(stream):
        if skips:
            context.skip_frame = "DEFAULT" if packet.pts in targets or not packet.size else "NONREF"
        yield from _video_frames(packet)


def _from_the_start(
    video: OpenVideo, container: InputContainer, stream: VideoStream, wanted: Sequence[int]
) -> Iterator[VideoFrame]:
    position, last = 0, -1
    for last, (frame, _) in _numbered(video, ((frame, False) for frame in container.decode(stream))):
        if last == wanted[position]:
            yield frame
            position += 1
            if position == len(wanted):
                return
    raise ValueError(f"frame {wanted[position]} does not come: its {video.info.num_frames} frames end with {last}")


def _numbered(
    video: OpenVideo, frames: Iterator[tuple[VideoFrame, bool]]
) -> Iterator[tuple[int, tuple[VideoFrame, bool]]]:
    """Each frame with its number: the place of its timestamp, or a count where there are no timestamps."""
    places = None if video.pts is None else {int(pts): number for number, pts in enumerate(video.pts)}
    last = -1
    for count, (frame, is_suspect) in enumerate(frames):
        number = count if places is None else places.get(frame.pts, -1) if frame.pts is not None else -1
        if number > last:
            yield number, (frame, is_suspect)
            last = number


def _undamaged(container: InputContainer, stream: VideoStream) -> Iterator[tuple[VideoFrame, bool]]:
    """The frames that decode, and whether they follow damage, passing over packets that do not decode and frames that
    the decoder itself calls corrupt."""
    packets = container.demux(stream)
    is_suspect = False
    while True:
        try:
            packet = next(packets)
        except StopIteration:
            return
        except (av.error.InvalidDataError, av.error.EOFError):
            return  # the container ends in the middle of a packet
        is_suspect = is_suspect or packet.is_corrupt
        try:
            frames = _video_frames(packet)
        except av.error.InvalidDataError:
            is_suspect = True
            continue
        for frame in frames:
            if frame.is_corrupt:
                is_suspect = True
                continue
            is_suspect = is_suspect and not frame.key_frame
            yield frame, is_suspect


def _video_frames(packet: av.Packet) -> list[VideoFrame]:
    return [frame for frame in packet.decode() if isinstance(frame, VideoFrame)]


def _whole(frame: VideoFrame) -> VideoFrame:
    if frame.is_corrupt:
        raise DamagedError("a frame is damaged")
    return frame


def _same_count(name: str, count: int, video: OpenVideo) -> None:
    if count != video.info.num_frames:
        raise ValueError(f"{name} counts {count} frames where the packets hold {video.info.num_frames}")


def _same_times(name: str, times: np.ndarray, video: OpenVideo, numbers: Sequence[int], tolerance: float) -> None:
    if video.pts is not None and not np.allclose(times, video.info.timestamps[list(numbers)], rtol=0, atol=tolerance):
        raise ValueError(f"{name} shows frames at other times than the packets say")


@functools.cache
def _tiny_clip() -> bytes:
    """Three grey pictures, in a container and a codec that every backend knows."""
    clip = io.BytesIO()
    with av.open(clip, "w", format="avi") as output:
        stream = output.add_stream("mjpeg", rate=10)
        stream.width, stream.height = 64, 48
        stream.pix_fmt = "yuvj420p"
        for level in (40, 120, 200):
            output.mux(stream.encode(VideoFrame.from_ndarray(np.full((48, 64, 3), level, np.uint8), format="rgb24")))
        output.mux(stream.encode())
    return clip.getvalue()
