"""Properties of the pictures of a video: pixel aspect ratio, fields, HDR, transparency."""

import struct
from dataclasses import dataclass
from fractions import Fraction

import av
from av.filter import Graph
from av.sidedata.sidedata import SideData
from av.video.frame import VideoFrame
from av.video.stream import VideoStream

from blueberry_video.video.hdr import HLG_PEAK, PQ_PEAK, SDR_WHITE

_TRANSFERS = {16: "pq", 18: "hlg"}  # smpte2084 and arib-std-b67, numbers of ITU-T H.273
_PRIMARIES = {1: "bt709", 4: "bt470m", 5: "bt470bg", 6: "smpte170m", 7: "smpte240m", 8: "film", 9: "bt2020"} | {
    10: "smpte428",
    11: "smpte431",
    12: "smpte432",
    22: "ebu3213",
}
_UNSPECIFIED = 2
_FIRST_FIELDS = {2: "top", 3: "bottom", 4: "bottom", 5: "top"}  # the field displayed first, of AVFieldOrder


@dataclass(frozen=True)
class PictureInfo:
    """Properties of the pictures of a video.

    Attributes:
        pixel_aspect: (width, height) of a pixel, in lowest terms, after rotation; that of the container, else that of
            the codec, as in FFmpeg.
        interlaced: the field that is displayed first, ``top`` or ``bottom``; None for progressive video. Read from the
            field order of the stream, or from the first frame where that states none.
        hdr: ``pq`` (SMPTE ST 2084) or ``hlg`` (ARIB STD-B67) of ITU-R BT.2100; None for other transfer characteristics.
        primaries: FFmpeg's name of the color primaries; None where they are not stated.
        peak: cd/m² of the brightest color of HDR video: MaxCLL, else the peak of the mastering display, else 10,000;
            1000 for HLG.
        has_alpha: whether frames have an alpha channel; they are blended over white.
    """

    pixel_aspect: tuple[int, int] = (1, 1)
    interlaced: str | None = None
    hdr: str | None = None
    primaries: str | None = None
    peak: float = SDR_WHITE
    has_alpha: bool = False


def picture_info(stream: VideoStream, frame: VideoFrame, turns: int) -> PictureInfo:
    """Returns the properties of a video from its stream and its first frame.

    Args:
        stream, frame: of PyAV; the frame is decoded.
        turns: quarter turns of the frame for display.
    """
    context = stream.codec_context
    aspect = stream.sample_aspect_ratio or 1
    width, height = (aspect.numerator, aspect.denominator) if aspect > 0 else (1, 1)
    transfer, primaries = int(frame.color_trc), int(frame.color_primaries)
    hdr = _TRANSFERS.get(int(context.color_trc) if transfer == _UNSPECIFIED else transfer)
    interlaced = _FIRST_FIELDS.get(context.field_order)
    if interlaced is None and frame.interlaced_frame:
        interlaced = "top" if _is_top_first(frame) else "bottom"
    return PictureInfo(
        pixel_aspect=(height, width) if turns % 2 else (width, height),
        interlaced=interlaced,
        hdr=hdr,
        primaries=_PRIMARIES.get(int(context.color_primaries) if primaries == _UNSPECIFIED else primaries),
        peak={"pq": _pq_peak(frame), "hlg": HLG_PEAK, None: SDR_WHITE}[hdr],
        has_alpha=has_alpha(frame) or has_alpha_stream(stream),
    )


def has_alpha(frame: VideoFrame) -> bool:
    """Checks whether the pixel format of a frame has an alpha channel. That of a palette may have one."""
    return frame.format.name == "pal8" or any(component.is_alpha for component in frame.format.components)


def has_alpha_stream(stream: VideoStream) -> bool:
    """Checks whether a VP8 or VP9 stream has its alpha channel in a second bitstream, as in WebM."""
    return stream.codec_context.name in ("vp8", "vp9") and stream.metadata.get("alpha_mode") == "1"


def _is_top_first(frame: VideoFrame) -> bool:
    """Reads the flag of a frame that PyAV does not have, with FFmpeg's ``select`` filter."""
    graph = Graph()
    graph.threads = 1
    base = frame.time_base or Fraction(1, av.time_base)
    source = graph.add_buffer(width=frame.width, height=frame.height, format=frame.format, time_base=base)
    select, sink = graph.add("select", "eq(interlace_type,TOPFIRST)"), graph.add("buffersink")
    source.link_to(select)
    select.link_to(sink)
    graph.configure()
    graph.push(frame)
    try:
        graph.pull()
    except (av.error.BlockingIOError, av.error.EOFError):
        return False
    return True


def _pq_peak(frame: VideoFrame) -> float:
    """Peak in cd/m² from AVContentLightMetadata (MaxCLL, MaxFALL: two unsigned integers) or
    AVMasteringDisplayMetadata (ten rationals, of which the last is the maximum; has_primaries, has_luminance)."""
    peak = 0.0
    if (data := _side_data(frame, "CONTENT_LIGHT_LEVEL")) and len(data) >= 8:
        peak = float(struct.unpack_from("II", data)[0])
    if not peak and (data := _side_data(frame, "MASTERING_DISPLAY_METADATA")) and len(data) >= 88:
        *_, numerator, denominator, _, is_known = struct.unpack_from("22i", data)
        peak = numerator / denominator if is_known and denominator else 0.0
    return min(max(peak, SDR_WHITE), PQ_PEAK) if peak else PQ_PEAK


def _side_data(frame: VideoFrame, kind: str) -> bytes | None:
    try:
        data = frame.side_data.get(kind)
    except ValueError:  # PyAV raises on kinds of side data that it does not know, such as EXIF
        return None
    return bytes(data) if isinstance(data, SideData) else None
