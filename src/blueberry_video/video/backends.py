"""Four decoders with one interface: ascending frame indices in, an iterator of RGB tensors out.

Each decoder raises if it cannot return exactly the frames of the packet index. Frames are decoded forward, because
seeking back and forth is slow in files with long GOPs. PyAV skips non-reference frames that are not requested: in H.264
and MPEG-1, 2 and 4 such a B-frame affects no other frame, so the result is bit-identical.

A package adds a decoder with an entry point of the group ``blueberry.video.decoders``: a function with the arguments of
``read_pyav``. Its name is then a value of ``backends``; like the four, it has to decode a tiny clip first.
"""

import functools
import io
import tempfile
from collections.abc import Callable, Iterator, Sequence
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path

import av
import numpy as np
import torch
from av.container import InputContainer
from av.video.frame import VideoFrame
from av.video.stream import VideoStream
from torch import Tensor

from blueberry_video.video.alpha import AlphaDecoder
from blueberry_video.video.container import FAILURES, OpenVideo, open_video, video_frames
from blueberry_video.video.deinterlace import deinterlaced, with_neighbors
from blueberry_video.video.errors import one_line
from blueberry_video.video.packets import picture_test
from blueberry_video.video.picture import Rendering
from blueberry_video.video.ranges import check_choice
from blueberry_video.video.seeking import reopened, selected_frames


class DamagedError(ValueError):
    """A decoder found damage. Other decoders are not tried, because they return damaged frames without an error."""


GROUP = "blueberry.video.decoders"
Reader = Callable[[OpenVideo, Sequence[int], str], Iterator[Tensor]]
_BATCH = 16  # frames per call of a backend without a forward iterator


def read_pyav(
    video: OpenVideo, wanted: Sequence[int], device: str = "cpu", rendering: Rendering | None = None
) -> Iterator[Tensor]:
    """Decodes frames with PyAV and yields uint8 (H, W, 3) pictures.

    Seeks to the keyframe before a wanted frame and decodes forward. If the file is not seekable, or frames and packets
    have different timestamps, decodes everything from the start.

    Args:
        video: an open file.
        wanted: ascending frame indices.
        device: ignored; pictures are on the CPU.
        rendering: tone mapping and deinterlacing; none by default. Deinterlacing also decodes the frames next to the
            wanted ones.

    Raises:
        DamagedError: these frames, or frames that they are predicted from, are damaged.
        ValueError, av.error.FFmpegError: the frames cannot be decoded.
    """
    info, rendering = video.info, rendering or Rendering()
    to_rgb = rendering.converter((info.height, info.width), info.picture)
    try:
        if rendering.deinterlace == "none":
            yield from map(to_rgb, _frames(video, wanted))
            return
        needed, chosen = with_neighbors(wanted, info.num_frames), set(wanted)
        for number, frame in deinterlaced(zip(needed, _frames(video, needed)), rendering.deinterlace):
            if number in chosen:
                yield to_rgb(frame)
    except av.error.InvalidDataError as error:
        raise DamagedError(one_line(error)) from error


def read_torchcodec(video: OpenVideo, wanted: Sequence[int], device: str = "cpu") -> Iterator[Tensor]:
    """Decodes frames with torchcodec, on the hardware decoder if ``device`` is a CUDA device. See ``read_pyav``.

    Raises:
        ImportError, RuntimeError, ValueError: FFmpeg's libraries are missing, or the frames differ from the index.
    """
    from torchcodec.decoders import VideoDecoder  # raises if FFmpeg's libraries are missing

    info = video.info
    if video.pts is None:
        raise ValueError("torchcodec selects frames by timestamp, and this file has no timestamps")
    decoder = VideoDecoder(
        info.path,
        stream_index=info.stream_index,
        dimension_order="NHWC",
        num_ffmpeg_threads=video.num_threads,
        device=device,
        seek_mode="exact",  # the approximate mode returns wrong frames for variable frame rates
    )
    _same_count("torchcodec", len(decoder), video)
    for start in range(0, len(wanted), _BATCH):
        numbers = list(wanted[start : start + _BATCH])
        batch = decoder.get_frames_at(numbers)
        _same_times("torchcodec", batch.pts_seconds.numpy(), video, numbers, 1e-4)
        yield from batch.data


def read_decord(video: OpenVideo, wanted: Sequence[int], device: str = "cpu") -> Iterator[Tensor]:
    """Decodes frames with decord 0.6. See ``read_pyav``.

    decord is unmaintained and can hang on damaged files: run it in a process that can be killed.

    Raises:
        ImportError, RuntimeError, ValueError: decord is not installed, cannot read the file, or returns frames that
            differ from the index.
    """
    import decord

    info = video.info
    if video.pts is None:
        raise ValueError("decord repeats frames where packets have no timestamps")
    if info.rotation:
        raise ValueError("decord pads rotated frames with black if their width is not a multiple of 32")
    if info.container == "mpegts":
        raise ValueError("decord returns frames of transport streams that differ from the packet index")
    if info.pixel_format not in ("yuv420p", "yuvj420p") or info.height % 2 or info.width % 2:
        raise ValueError(f"decord converts {info.pixel_format} of {info.height}x{info.width} pixels to wrong colors")
    try:
        reader = decord.VideoReader(str(info.path), ctx=decord.cpu(0), num_threads=video.num_threads)
        _same_count("decord", len(reader), video)
        times = np.asarray(reader.get_frame_timestamp(list(wanted)))[:, 0]
        _same_times("decord", times, video, wanted, 2e-3)  # times are float32
        last = -1
        for number in wanted:
            for _ in range(number - last - 1):
                reader.next()  # seek and skip return wrong frames in open GOPs
            picture = torch.from_numpy(reader.next().asnumpy())
            last = number
            if picture.shape[:2] != (info.height, info.width):
                raise ValueError(f"decord returns {tuple(picture.shape[:2])} pixels, not the size after rotation")
            yield picture
    except decord.DECORDError as error:  # derives from Exception, so callers would need decord to catch it
        raise RuntimeError(str(error)) from error


def read_torchvision(video: OpenVideo, wanted: Sequence[int], device: str = "cpu") -> Iterator[Tensor]:
    """Decodes frames with ``torchvision.io.read_video`` (before 0.26), which reads the whole file. See ``read_pyav``.

    Raises:
        ImportError, RuntimeError, ValueError: the function does not exist, or the frames differ from the index.
    """
    from torchvision.io import read_video

    if video.pts is None:
        raise ValueError("this file has no timestamps, by which frames could be compared with the packet index")
    pictures, _, _ = read_video(str(video.info.path), pts_unit="sec", output_format="THWC")
    _same_count("torchvision", len(pictures), video)
    if video.info.rotation or pictures.shape[1:3] != (video.info.height, video.info.width):
        raise ValueError("torchvision does not apply the rotation of the file")
    for number in wanted:
        yield pictures[number]


READERS: dict[str, Reader] = {
    "pyav": read_pyav,
    "torchcodec": read_torchcodec,
    "decord": read_decord,
    "torchvision": read_torchvision,
}


@functools.cache
def _registered() -> dict[str, Reader]:
    return {point.name: _Loaded(point) for point in entry_points(group=GROUP)}


def readers() -> dict[str, Reader]:
    """Returns the decoders by name: the four, then those of installed packages, which are loaded on use."""
    return {**READERS, **{name: reader for name, reader in _registered().items() if name not in READERS}}


class _Loaded:
    def __init__(self, point: EntryPoint):
        self._point = point

    def __call__(self, video: OpenVideo, wanted: Sequence[int], device: str) -> Iterator[Tensor]:
        try:
            yield from self._checked(self._point.load()(video, wanted, device), video, len(wanted))
        except FAILURES:
            raise
        except Exception as error:  # of a kind that only the package knows
            raise RuntimeError(f"{self._point.value} raises {type(error).__name__}: {one_line(error)}") from error

    def _checked(self, pictures: Iterator[Tensor], video: OpenVideo, total: int) -> Iterator[Tensor]:
        name, size, count = self._point.name, (video.info.height, video.info.width, 3), 0
        for count, picture in enumerate(pictures, 1):
            if not isinstance(picture, Tensor) or picture.dtype != torch.uint8 or tuple(picture.shape) != size:
                raise ValueError(f"{name} must yield uint8 tensors of shape {size}, after rotation")
            if count > total:
                raise ValueError(f"{name} yields more than the {total} frames that were requested")
            yield picture
        if count < total:
            raise ValueError(f"{name} yields {count} of {total} frames")


@functools.cache
def backend_failure(name: str) -> str | None:
    """Returns why a backend fails to decode a tiny clip in this process, or None if it works. Cached. Raises ValueError
    if the backend does not exist."""
    check_choice("backends", name, readers())
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "tiny.avi")
        path.write_bytes(_tiny_clip())
        try:
            with open_video(path) as video:
                pictures = list(readers()[name](video, [0, 2], "cpu"))
        except FAILURES as error:
            return one_line(error)
    levels = [picture.float().mean().item() for picture in pictures]
    correct = len(levels) == 2 and abs(levels[0] - 40) < 3 and abs(levels[1] - 200) < 3
    return None if correct else f"decodes wrong pixels (mean levels {levels})"


def salvage(
    video: OpenVideo, wanted: Sequence[int], rendering: Rendering | None = None
) -> Iterator[tuple[Tensor, bool, bool]]:
    """Decodes a damaged file packet by packet and yields (uint8 (H, W, 3), is_missing, is_suspect).

    A missing frame is replaced by the nearest earlier frame that decodes (at the start: by the first one). A suspect
    frame decoded after damage and before the next keyframe, so that it was predicted from wrong or missing frames.
    Reads from the start, with one picture in memory.

    Args:
        video: an open file.
        wanted: ascending frame indices.
        rendering: as for ``read_pyav``; the frames before and after one are the nearest that decode.

    Raises:
        ValueError: no frame decodes.
    """
    rendering = rendering or Rendering()
    to_rgb = rendering.converter((video.info.height, video.info.width), video.info.picture)
    last: VideoFrame | None = None
    position = 0  # in ``wanted``
    with reopened(video, num_threads=1) as (container, stream):  # slice threads hide damage
        frames = _numbered(video, _decodable(container, stream))
        if rendering.deinterlace != "none":
            keyed = (((number, is_suspect), frame) for number, (frame, is_suspect) in frames)
            changed = deinterlaced(keyed, rendering.deinterlace)
            frames = ((number, (frame, is_suspect)) for (number, is_suspect), frame in changed)
        for number, (frame, is_suspect) in frames:
            while position < len(wanted) and wanted[position] <= number:
                is_missing = wanted[position] < number
                yield to_rgb(last or frame if is_missing else frame), is_missing, is_suspect and not is_missing
                position += 1
            last = frame
            if position == len(wanted):
                return
    if last is None:
        raise ValueError("no frame decodes")
    for _ in wanted[position:]:
        yield to_rgb(last), True, False


def _frames(video: OpenVideo, wanted: Sequence[int]) -> Iterator[VideoFrame]:
    """Yields the frames at ascending indices, none of them damaged."""
    done = 0
    for frame in selected_frames(video, wanted):
        yield _undamaged(frame)
        done += 1
    if done < len(wanted):
        with reopened(video, video.num_threads) as (container, stream):  # a raw stream cannot seek to its start
            yield from map(_undamaged, _from_start(video, container, stream, wanted[done:]))


def _from_start(
    video: OpenVideo, container: InputContainer, stream: VideoStream, wanted: Sequence[int]
) -> Iterator[VideoFrame]:
    position, last, shows_frame, alpha = 0, -1, picture_test(stream), AlphaDecoder(stream)

    def decoded() -> Iterator[tuple[VideoFrame, bool]]:
        for packet in container.demux(stream):
            alpha.feed(packet)
            for frame in alpha.attach(video_frames(packet, shows_frame)):
                yield frame, False

    for last, (frame, _) in _numbered(video, decoded()):
        if last == wanted[position]:
            yield frame
            position += 1
            if position == len(wanted):
                return
    raise ValueError(
        f"frame {wanted[position]} of {video.info.num_frames} is not found: decoding ends with frame {last}"
    )


def _numbered(
    video: OpenVideo, frames: Iterator[tuple[VideoFrame, bool]]
) -> Iterator[tuple[int, tuple[VideoFrame, bool]]]:
    """Yields frames with their indices: the position of the timestamp, or a count if there are no timestamps."""
    numbers = None if video.pts is None else {int(pts): number for number, pts in enumerate(video.pts)}
    last = -1
    for count, (frame, is_suspect) in enumerate(frames):
        number = count if numbers is None else numbers.get(frame.pts, -1) if frame.pts is not None else -1
        if number > last:
            yield number, (frame, is_suspect)
            last = number


def _decodable(container: InputContainer, stream: VideoStream) -> Iterator[tuple[VideoFrame, bool]]:
    """Yields (frame, is_suspect) for the frames that decode. Skips packets that do not decode and frames that the
    decoder marks as corrupt."""
    packets, shows_frame, alpha = container.demux(stream), picture_test(stream), AlphaDecoder(stream)
    is_suspect = False
    while True:
        try:
            packet = next(packets)
        except StopIteration:
            return
        except (av.error.InvalidDataError, av.error.EOFError):
            return  # the container ends inside a packet
        is_suspect = is_suspect or packet.is_corrupt
        try:
            alpha.feed(packet)
            frames = alpha.attach(video_frames(packet, shows_frame))
        except av.error.InvalidDataError:
            is_suspect = True
            continue
        for frame in frames:
            if frame.is_corrupt:
                is_suspect = True
                continue
            is_suspect = is_suspect and not frame.key_frame
            yield frame, is_suspect


def _undamaged(frame: VideoFrame) -> VideoFrame:
    if frame.is_corrupt:
        raise DamagedError("a frame is damaged")
    return frame


def _same_count(name: str, count: int, video: OpenVideo) -> None:
    if count != video.info.num_frames:
        raise ValueError(f"{name} counts {count} frames, the packet index {video.info.num_frames}")


def _same_times(name: str, times: np.ndarray, video: OpenVideo, numbers: Sequence[int], tolerance: float) -> None:
    if video.pts is not None and not np.allclose(times, video.info.timestamps[list(numbers)], rtol=0, atol=tolerance):
        raise ValueError(f"{name} returns frames with timestamps that differ from the packet index")


@functools.cache
def _tiny_clip() -> bytes:
    """Encodes three gray frames in a container and codec that every backend supports."""
    clip = io.BytesIO()
    with av.open(clip, "w", format="avi") as output:
        stream = output.add_stream("mjpeg", rate=10)
        stream.width, stream.height = 64, 48
        stream.pix_fmt = "yuvj420p"
        for level in (40, 120, 200):
            output.mux(stream.encode(VideoFrame.from_ndarray(np.full((48, 64, 3), level, np.uint8), format="rgb24")))
        output.mux(stream.encode())
    return clip.getvalue()
