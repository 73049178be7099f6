"""Content of packets: whether a packet holds a picture that is displayed.

A packet may hold only parameter sets, SEI messages, an access unit delimiter or filler data, or a picture that is never
displayed. Such a packet yields no frame, and it is not damaged. Headers are read as in ITU-T H.264 (7.3.1), H.265
(7.3.1.2), ISO/IEC 13818-2 (6.2.3) and 14496-2 (6.2.5), RFC 6386 (9.1), the VP9 bitstream specification (6.2, B) and
that of AV1 (5.3, 5.5.1, 5.9.2).
"""

from collections.abc import Callable

import av
from av.video.stream import VideoStream

_START_CODE = b"\x00\x00\x01"
_VP8_SHOWN = 0x10  # show_frame bit in the first byte
_STILL = 0x08  # reduced_still_picture_header: frames have no show_frame bit, and all are shown


def picture_test(stream: VideoStream) -> Callable[[av.Packet], bool]:
    """Returns a function that tells whether a packet of the stream yields a displayed frame. It returns True where the
    codec is not known to have packets without one."""
    name = stream.codec_context.name
    if name in ("h264", "hevc"):
        is_picture = _is_h264_picture if name == "h264" else _is_hevc_picture
        size = _length_size(name, bytes(stream.codec_context.extradata or b""))
        if size:
            return lambda packet: _any_with_length(memoryview(packet), size, is_picture)
        return lambda packet: _any_after_start_code(bytes(packet), is_picture)
    if name in ("mpeg1video", "mpeg2video"):
        return lambda packet: _any_after_start_code(bytes(packet), lambda data, at: data[at] == 0x00)
    if name == "mpeg4":
        return lambda packet: _any_after_start_code(bytes(packet), lambda data, at: data[at] == 0xB6)
    if name == "vp8":
        return lambda packet: bool(memoryview(packet)[0] & _VP8_SHOWN)
    if name == "vp9":
        return lambda packet: _vp9_shows(memoryview(packet))
    if "av1" in name:  # also libdav1d
        units = bytes(stream.codec_context.extradata or b"")[4:]  # of av1C, after its 4 bytes
        still = any(kind == 1 and unit and unit[0] & _STILL for kind, unit in _av1_units(units) or ())
        return lambda packet: still or _av1_shows(bytes(packet))
    return lambda packet: True


def is_user_data(data: bytes) -> bool:
    """Returns whether a packet of MPEG-1, 2 or 4 holds nothing but user data."""
    codes = {part[:1] for part in data.split(_START_CODE)[1:]}
    return codes == {b"\xb2"}


def recovery_test(stream: VideoStream) -> Callable[[av.Packet], bool]:
    """Returns a function that tells whether a packet that is marked as a keyframe yields a correct frame on its own.

    H.264 with periodic intra refresh has no such frames: its recovery points, which containers mark as keyframes, state
    after how many frames the picture is correct (ITU-T H.264, D.1.8 and D.2.8).
    """
    if stream.codec_context.name != "h264":
        return lambda packet: True
    size = _length_size("h264", bytes(stream.codec_context.extradata or b""))

    def is_correct(packet: av.Packet) -> bool:
        delay = 0
        for unit in _units(bytes(packet), size):
            if unit and unit[0] & 0x1F == 5:
                return True  # an IDR picture
            if unit and unit[0] & 0x1F == 6:
                delay = max(delay, _recovery_delay(unit[1:].replace(b"\x00\x00\x03", b"\x00\x00")))
        return delay == 0

    return is_correct


def _units(data: bytes, size: int) -> list[bytes]:
    """Returns the NAL units of a packet; ``size`` as in ``_length_size``."""
    if not size:
        return data.split(_START_CODE)[1:]
    units, at = [], 0
    while at + size < len(data):
        length = int.from_bytes(data[at : at + size], "big")
        units.append(data[at + size : at + size + length])
        at += size + length
    return units


def _recovery_delay(messages: bytes) -> int:
    """Returns 1 if the SEI messages contain a recovery point that is correct only after further frames, else 0."""
    at = 0
    while at + 2 < len(messages):
        kind = length = 0
        while at < len(messages) and messages[at] == 0xFF:
            kind, at = kind + 255, at + 1
        kind, at = kind + messages[min(at, len(messages) - 1)], at + 1
        while at < len(messages) and messages[at] == 0xFF:
            length, at = length + 255, at + 1
        length, at = length + messages[min(at, len(messages) - 1)], at + 1
        if kind == 6 and at < len(messages):
            return int(messages[at] < 0x80)  # the count, as an Exp-Golomb code: a leading 1 is 0
        at += length
    return 0


def _length_size(codec: str, extradata: bytes) -> int:
    """Returns the bytes of the length before each NAL unit (avcC, hvcC), or 0 if start codes separate the units."""
    if len(extradata) < 7 or extradata.startswith((_START_CODE, b"\x00" + _START_CODE)):
        return 0
    if codec == "h264":
        return extradata[4] % 4 + 1 if extradata[0] == 1 else 0
    return extradata[21] % 4 + 1 if len(extradata) > 22 else 0


def _is_h264_picture(data: bytes | memoryview, at: int) -> bool:
    return data[at] & 0x1F in (1, 2, 5)  # slice, data partition A, slice of an IDR picture


def _is_hevc_picture(data: bytes | memoryview, at: int) -> bool:
    # types below 32 are slices; layers above 0 are further views or qualities of the same picture
    return data[at] >> 1 & 0x3F < 32 and not data[at] & 1 and not (at + 1 < len(data) and data[at + 1] >> 3)


def _any_with_length(data: memoryview, size: int, is_picture: Callable[[memoryview, int], bool]) -> bool:
    at, end = 0, len(data)
    while at + size < end:
        length = int.from_bytes(data[at : at + size], "big")
        # a unit that is empty or does not fit is damaged: the decoder decides
        if not 0 < length <= end - at - size or is_picture(data, at + size):
            return True
        at += size + length
    return False


def _any_after_start_code(data: bytes, is_picture: Callable[[bytes, int], bool]) -> bool:
    at = data.find(_START_CODE)
    if at < 0:
        return True  # not the syntax of this codec: the decoder decides
    while 0 <= at < len(data) - 3:
        if is_picture(data, at + 3):
            return True
        at = data.find(_START_CODE, at + 3)
    return False


def _vp9_shows(data: memoryview) -> bool:
    """Returns whether a packet has a visible frame. The index of a superframe (several frames) is at its end."""
    marker, count = data[-1], data[-1] % 8 + 1
    size = (marker >> 3) % 4 + 1
    index = 2 + size * count
    starts = [0]
    if marker >> 5 == 0b110 and len(data) >= index and data[-index] == marker:
        for i in range(count - 1):
            field = len(data) - index + 1 + size * i
            starts.append(starts[-1] + int.from_bytes(data[field : field + size], "little"))
    return any(_vp9_frame_is_shown(data[start : start + 2]) for start in starts if start < len(data))


def _vp9_frame_is_shown(header: memoryview) -> bool:
    bits = int.from_bytes(header, "big") << (8 * (2 - len(header)))
    if bits >> 14 != 0b10:
        return True  # not a VP9 frame: the decoder decides
    at = 11 if bits >> 12 & 3 != 3 else 10  # after marker and profile; profile 3 has a reserved bit
    shows_existing, shown = bits >> at & 1, bits >> (at - 2) & 1
    return bool(shows_existing or shown)


def _av1_units(data: bytes) -> list[tuple[int, bytes]] | None:
    """Returns (type, payload) of the OBUs of a packet; None if it is not a sequence of them."""
    units, at = [], 0
    while at < len(data):
        kind, extended, sized = data[at] >> 3 & 15, data[at] >> 2 & 1, data[at] >> 1 & 1
        forbidden, at, length, shift = data[at] & 0x80, at + 1 + extended, 0, 0
        if forbidden:
            return None
        while sized:  # LEB128
            if at >= len(data) or shift > 49:
                return None
            length |= (data[at] & 0x7F) << shift
            shift, at, sized = shift + 7, at + 1, data[at] >> 7
        length = length if shift else len(data) - at
        if at + length > len(data):
            return None
        units.append((kind, data[at : at + length]))
        at += length
    return units


def _av1_shows(data: bytes) -> bool:
    """Returns whether a packet has a visible frame: a frame header (3) or a frame (6) that shows itself or an earlier
    one."""
    units = _av1_units(data)
    if not units:
        return True  # not AV1: the decoder decides
    if any(kind == 1 and unit and unit[0] & _STILL for kind, unit in units):
        return True
    return any(kind in (3, 6) and bool(unit) and bool(unit[0] & 0x90) for kind, unit in units)
