"""Declared extent of a container file: bytes that a file lost when it was cut, from its headers.

Containers state the sizes of their parts, so that a file that was cut while it was copied, downloaded or recorded can
be told from a whole one, although most of it decodes. Only sizes are read, a few bytes at a time, so that a range
request per size is enough. What a container leaves open (live recordings, streams to a pipe, padding after the end) is
no sign of a cut.

Sizes are read as in ISO/IEC 14496-12 (4.2 and 8.16.3), RFC 8794 and RFC 9559 (EBML, Matroska), the RIFF and OpenDML
specifications, RFC 3533 (Ogg), Adobe's FLV specification (annex E), the ASF specification (3.1 and 5.1) and ISO/IEC
13818-1.
"""

import os
import struct
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

MAX_READS = 8192  # of a few bytes; a file with more parts is not judged by the later ones
_TAIL = 1 << 17  # bytes at the end of an Ogg file, two pages of the largest size
Read = Callable[[int, int], bytes]  # (offset, number of bytes) -> bytes, fewer at the end of the file
Judge = Callable[[Read, int], "Cut | None"]


class Cut(NamedTuple):
    """End that a file lacks.

    Attributes:
        held: bytes of the file.
        declared: least number of bytes that the whole file has, from its headers; None if they do not tell, as in
            Ogg without its last page and in excerpts of transport streams.
        lacks: the part that is missing or incomplete.
    """

    held: int
    declared: int | None
    lacks: str

    def __str__(self) -> str:
        of = f" of {self.declared}" if self.declared is not None else ""
        return f"incomplete: {self.held}{of} bytes, {self.lacks}; copy it again"


def find_cut(path: Path, kind: str) -> Cut | None:
    """Returns the end that a file lacks, or None for a whole file and where the container cannot tell.

    Args:
        path: a regular file.
        kind: its container, from ``sniff``.
    """
    judge = _JUDGES.get(kind)
    if judge is None:
        return None
    descriptor = os.open(path, os.O_RDONLY)
    try:
        return judge(lambda start, count: os.pread(descriptor, count, start), os.fstat(descriptor).st_size)
    finally:
        os.close(descriptor)


def _mov(read: Read, size: int) -> Cut | None:
    at, has_index, has_media = 0, False, False
    for _ in range(MAX_READS):
        head = read(at, 16)
        if len(head) < 8:
            break
        length, kind = struct.unpack(">I4s", head[:8])
        header = 8
        if length == 1 and len(head) == 16:
            length, header = struct.unpack(">Q", head[8:])[0], 16
        has_index = has_index or kind in (b"moov", b"moof")
        has_media = has_media or kind == b"mdat"
        if (0 < length < header) or (at + length > size and kind not in _BOXES):
            break  # bytes after the end
        if at + length > size:
            index = "" if has_index else " and its index ('moov') is missing"
            return Cut(size, at + length, f"its box {kind.decode()!r} has {size - at} of {length} bytes{index}")
        if kind == b"sidx" and (end := _segments_end(read, at, length, header)) > size:
            return Cut(size, end, "segments that its index lists are missing")
        if not length:
            break  # to the end of the file
        at += length
    else:
        return None
    return Cut(size, None, "its index ('moov'), which is written last, is missing") if has_media > has_index else None


_BOXES = {b"ftyp", b"styp", b"moov", b"moof", b"mdat", b"free", b"skip", b"wide", b"sidx", b"meta", b"uuid", b"mfra"}


def _segments_end(read: Read, at: int, length: int, header: int) -> int:
    """Returns the end of the bytes that a segment index lists; 0 for one with more than a few thousand segments."""
    if length > 1 << 16:
        return 0
    box = read(at + header, length - header)
    wide = 8 if box[:1] == b"\x01" else 4
    first, entries = 12 + wide, 12 + 2 * wide
    if len(box) < entries + 4:
        return 0
    [count] = struct.unpack(">H", box[entries + 2 : entries + 4])
    if len(box) < entries + 4 + 12 * count:
        return 0
    sizes = struct.unpack(f">{3 * count}I", box[entries + 4 : entries + 4 + 12 * count])[::3]
    return at + length + int.from_bytes(box[first : first + wide], "big") + sum(size & 0x7FFFFFFF for size in sizes)


def _matroska(read: Read, size: int) -> Cut | None:
    at = 0
    for _ in range(MAX_READS):
        if (element := _element(read, at)) is None:
            return None
        kind, length, header = element
        if length is None:  # unknown, as in live recordings: its parts may have sizes
            if kind != _SEGMENT and kind != _CLUSTER:
                return None
            at += header
            continue
        if kind not in _EBML_PARTS:
            return None  # bytes after the end
        if at + header + length > size:
            name = _EBML_PARTS[kind]
            return Cut(size, at + header + length, f"its {name} has {size - at} of {header + length} bytes")
        at += header + length
    return None


_SEGMENT, _CLUSTER = 0x18538067, 0x1F43B675
_EBML_PARTS = {  # elements at the top level, in a Segment and in a Cluster
    0x1A45DFA3: "header",
    _SEGMENT: "Segment",
    0x114D9B74: "SeekHead",
    0x1549A966: "Info",
    0x1654AE6B: "Tracks",
    _CLUSTER: "Cluster",
    0x1C53BB6B: "Cues",
    0x1941A469: "Attachments",
    0x1043A770: "Chapters",
    0x1254C367: "Tags",
    0xEC: "Void",
    0xBF: "CRC-32",
    0xE7: "Timestamp",
    0xA7: "Position",
    0xAB: "PrevSize",
    0xA3: "SimpleBlock",
    0xA0: "BlockGroup",
}


def _element(read: Read, at: int) -> tuple[int, int | None, int] | None:
    """Returns identifier, length (None: unknown) and header bytes of an EBML element; None if there is none."""
    head = read(at, 12)
    wide = 9 - head[0].bit_length() if head and head[0] else 9
    if wide > 4 or len(head) <= wide or not head[wide]:
        return None
    length_wide = 9 - head[wide].bit_length()
    field = head[wide : wide + length_wide]
    if len(field) < length_wide:
        return None
    length = int.from_bytes(field, "big") & (1 << 7 * length_wide) - 1
    unknown = length == (1 << 7 * length_wide) - 1
    return int.from_bytes(head[:wide], "big"), None if unknown else length, wide + length_wide


def _riff(read: Read, size: int) -> Cut | None:
    at = 0
    for _ in range(MAX_READS):  # one after the other in OpenDML files above a gigabyte
        head = read(at, 12)
        if len(head) < 12 or head[:4] != b"RIFF" or head[8:] not in (b"AVI ", b"AVIX"):
            return None
        [length] = struct.unpack("<I", head[4:8])
        if length in _OPEN_RIFF:
            return None
        if at + length > size:  # some writers count the 8 bytes of the header as well
            return Cut(size, at + 8 + length, f"its RIFF chunk has {size - at} of {8 + length} bytes")
        at += 8 + length + length % 2
    return None


_OPEN_RIFF = (0, 0xFFFFFFFF, 0x7FFFFFFF)  # recordings that were not finished, and streams


def _ogg(read: Read, size: int) -> Cut | None:
    start = max(0, size - _TAIL)
    tail = read(start, size - start)
    at = tail.rfind(b"OggS\0")
    while at >= 0:
        page = tail[at:]
        header = 27 + page[26] if len(page) > 26 else 27
        length = header + sum(page[27:header]) if len(page) >= header else header + 1
        if length > len(page):
            return Cut(size, start + at + length, "its last page is cut")
        if page[5] <= 7:  # else no page, but bytes within one
            return None if page[5] & 4 else Cut(size, None, "no page ends its streams")
        at = tail.rfind(b"OggS\0", 0, at)
    return None


def _flv(read: Read, size: int) -> Cut | None:
    head = read(0, 4096)
    if len(head) < 13:
        return None
    at, declared = int.from_bytes(head[5:9], "big") + 4, 0
    if (found := head.find(b"\0\x08filesize\0")) >= 0 and len(head) >= found + 19:
        declared = int(min(max(struct.unpack(">d", head[found + 11 : found + 19])[0], 0), 2**62))
    if declared > size and not _ends_with_tag(read, size):
        return Cut(size, declared, "its last tag is cut")
    for _ in range(MAX_READS):
        tag = read(at, 11)
        if not tag or tag[0] not in (8, 9, 18):
            return None
        if len(tag) < 11:
            return Cut(size, at + 15, "its last tag is cut")
        length = 15 + int.from_bytes(tag[1:4], "big")  # with the size of the tag, which follows it
        if at + length - 4 > size:
            return Cut(size, at + length, f"its last tag has {size - at} of {length} bytes")
        at += length
    return None


def _ends_with_tag(read: Read, size: int) -> bool:
    length = int.from_bytes(read(size - 4, 4), "big")
    if not 11 <= length <= size - 13:
        return False
    tag = read(size - 4 - length, 4)
    return tag[0] in (8, 9, 18) and int.from_bytes(tag[1:4], "big") + 11 == length


def _asf(read: Read, size: int) -> Cut | None:
    at = 0
    for _ in range(MAX_READS):
        head = read(at, 24)
        if len(head) < 24 or head[:16] not in _ASF_PARTS:
            return None
        length = int.from_bytes(head[16:], "little")
        if length < 24:
            return None
        if at + length > size:
            name = _ASF_PARTS[head[:16]]
            return Cut(size, at + length, f"its {name} has {size - at} of {length} bytes")
        at += length
    return None


_ASF_PARTS = {
    bytes.fromhex("3026b2758e66cf11a6d900aa0062ce6c"): "Header Object",
    bytes.fromhex("3626b2758e66cf11a6d900aa0062ce6c"): "Data Object",
    bytes.fromhex("90080033b1e5cf1189f400a0c90349cb"): "Simple Index Object",
}


def _mpegts(read: Read, size: int) -> Cut | None:
    head = read(0, 1024)
    for length, skipped in ((188, 0), (192, 4), (204, 0)):
        syncs = range(skipped, len(head), length)
        if len(syncs) >= 3 and all(head[at] == 0x47 for at in syncs):
            rest = size % length
            if rest > skipped and read(size - rest + skipped, 1) == b"G":
                return Cut(size, None, f"its last packet has {rest} of {length} bytes")
    return None


_JUDGES: dict[str, Judge] = {
    "mov": _mov,
    "matroska": _matroska,
    "avi": _riff,
    "ogg": _ogg,
    "flv": _flv,
    "asf": _asf,
    "mpegts": _mpegts,
}
