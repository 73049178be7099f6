"""Which local files a decoder may be given: regular ones that begin like a container of their own frames.

The danger of a file is that FFmpeg judges it by its contents: a playlist under any name makes it open other files and
addresses. So what is let through is a list, and special files (devices, pipes) are refused before they are opened.
"""

import functools
import os
import re
import stat
from pathlib import Path

from blueberry_video.video.errors import BrokenVideoError, RefusedSourceError

_HEAD = 1 << 20  # bytes by which FFmpeg recognises a format
IMAGES = ("jpeg", "png", "webp", "bmp", "tiff")  # still images and what else Pillow decodes; GIF is left to FFmpeg

# How files begin that hold their own frames; nothing else reaches a decoder.
_CONTAINERS = (
    (rb".{4}(?:ftyp|styp|sidx|moov|moof|mdat|free|skip|wide|pnot)", "mov"),
    (rb"\x1aE\xdf\xa3", "matroska"),
    (rb"RIFF.{4}AVI ", "avi"),
    (rb"GIF8[79]a", "gif"),
    (rb"\0\0\x01\xba", "mpeg"),
    (rb"\0?\0\0\x01[\0-\x7f\xb0\xb3\xb5]", "elementary"),  # raw H.264, HEVC, MPEG-2 and MPEG-4 video
    (rb"(?:G.{187}){2}G|(?:.{4}G.{187}){2}.{4}G|(?:G.{203}){2}G", "mpegts"),
    (rb".{0,204}?(?:G.{187}){4}G", "mpegts"),  # cut out of a longer stream
    (rb"\x1f\x07\0[\x3f\xbf]", "dv"),
    (rb"nut/multimedia container\0", "nut"),
    (rb"\.RMF\0", "rm"),
    (rb"\xb7\xd8\x00 7I\xda\x11\xa6N\x00\x07\xe9\x5e\xad\x8d", "wtv"),
    (rb"FLV\x01", "flv"),
    (rb"0&\xb2u\x8ef\xcf\x11\xa6\xd9\0\xaa\0b\xcel", "asf"),
    (rb"OggS\0", "ogg"),
    (rb"DKIF\0\0", "ivf"),
    (rb"YUV4MPEG2 ", "yuv4mpeg"),
    (rb"\x12\0\n", "obu"),
    (rb"\x06\x0e\+4\x02\x05\x01\x01\r\x01\x02\x01\x01\x02", "mxf"),
    (rb"fLaC", "flac"),
    (rb"\xff\xd8\xff", "jpeg"),
    (rb"\x89PNG\r\n\x1a\n", "png"),
    (rb"RIFF.{4}WEBP", "webp"),
    (rb"BM.{12}[\x0c-\x7c]\0\0\0", "bmp"),
    (rb"II\*\0|MM\0\*", "tiff"),
    (
        rb"(\xff[\xe2-\xe5\xf2-\xf5\xfa-\xfd])[\x10-\xef].{24,2880}?\1[\x10-\xef]",
        "mp3",
    ),  # a header, and the next frame's
)
_NO_VIDEO = (
    (
        rb"PK\x03\x04|PK\x05\x06|\x1f\x8b|BZh\d|\xfd7zXZ|7z\xbc\xaf|Rar!|\x28\xb5\x2f\xfd|.{257}ustar",
        "an archive: unpack it",
    ),
    (rb"RIFF.{4}WAVE", "sound without pictures"),
    (rb"\s*<(?:!doctype )?html", "a web page: give the address of the video itself"),
    (rb"\xff\xfe|\xfe\xff|[^\0-\x08\x0e-\x1a\x1c-\x1f]{1,1024}\Z", "text"),
)
# What names other files and addresses: at the start after a byte order mark and blanks, or in what is text up to the
# first NUL, where FFmpeg looks as well.
_PLAYLIST = rb"#ext|ffconcat|<\?xml|<mpd|<asx|<smil|<playlist|<svg|\[playlist\]|\[reference\]|rtsptext|smiltext|v=0\s"
_NAMES_OTHERS = rb"#extm3u|ffconcat version|dash:profile|<compositionplaylist|<smoothstreamingmedia|^c=in ip"

# FFmpeg takes a file with such a name for a sequence of images, whatever it holds, if it has the suffix of an image.
_SEQUENCE = re.compile(r"[%*?\[\]{}]")
_VIDEO_SUFFIX = re.compile(
    r"|\.(mp4|m4v|mov|avi|mkv|webm|gif|m?ts|m2ts|mpe?g|flv|wmv|asf|og[gv]|3gp|ivf|y4m|[hx]?26[45]|hevc|obu|mxf|mp3|m4a|flac|"
    r"mjpe?g)",
    re.IGNORECASE,
)
_PROTOCOL = re.compile(r"\s*(subfile,|[A-Za-z][A-Za-z0-9+.-]*:)")


def local_path(text: str, folder: bool = False) -> Path:
    """The resolved path of a regular file, or of a folder where ``folder``; it is looked at and not opened.

    Raises:
        RefusedSourceError: a protocol string, or a device, pipe, socket or folder.
        FileNotFoundError: there is nothing of that name.
    """
    if text in ("", "-") or "\0" in text:
        raise RefusedSourceError(f"{text[:60]!r} is no path of a file: give one.")
    if protocol := _PROTOCOL.match(text):
        raise RefusedSourceError(
            f"A source that begins with {protocol.group(1)!r} is a protocol, of which only http and https (as str, and "
            "not as a frame) are fetched: give the path of a local file, with './' before a name that has a colon."
        )
    try:
        path = Path(os.path.realpath(text))
        mode = path.stat().st_mode
    except UnicodeError as error:
        raise RefusedSourceError("The path has characters that no file name can have: give another.") from error
    except OSError as error:
        raise FileNotFoundError(f"There is no file at {str(path)[:300]} ({error.strerror}): check the path.") from error
    if not stat.S_ISREG(mode) and not (folder and stat.S_ISDIR(mode)):
        raise RefusedSourceError(f"{path} is no regular file but a device, pipe, socket or folder: give a file.")
    return path


def local_video(path: str | Path) -> tuple[Path, str]:
    """The resolved path of a file that may be decoded, and its container.

    Raises:
        FileNotFoundError: there is no such file.
        RefusedSourceError: a protocol string, a special file, or a playlist.
        BrokenVideoError: no video.
    """
    found = local_path(os.fspath(path))
    return found, sniff(found, str(found))


def sniff(path: Path, name: str) -> str:
    """The container of a file by its first bytes, from a list of those that hold their own frames.

    Args:
        path: a regular file.
        name: what messages call it.

    Raises:
        RefusedSourceError: a playlist or description that names other files or addresses, or a name that does.
        BrokenVideoError: empty, text, an archive, or of no known container.
    """
    with path.open("rb") as file:
        head, tag = file.read(_HEAD), None
        if tag := re.match(rb"ID3[^\xff]{2}(.)([\0-\x7f]{4})", head, re.DOTALL):  # FFmpeg looks behind it, so we do
            size = functools.reduce(lambda total, byte: total << 7 | byte, tag.group(2), 0)
            file.seek(size + (20 if tag.group(1)[0] & 16 else 10))
            head = file.read(_HEAD)
    if not head:
        raise BrokenVideoError(f"{name} is empty: fetch or copy it again.")
    start, text = head.removeprefix(b"\xef\xbb\xbf").lstrip(), head.partition(b"\0")[0]
    if re.match(_PLAYLIST, start, re.IGNORECASE) or re.search(_NAMES_OTHERS, text, re.IGNORECASE | re.MULTILINE):
        raise RefusedSourceError(
            f"{name} is a playlist or other text that names files and addresses, not a video: decoding it could open "
            "them. Fetch the videos that it names and use those files."
        )
    container = next((found for magic, found in _CONTAINERS if re.match(magic, head, re.DOTALL)), None)
    if container is None or (tag and container not in ("mp3", "flac")):
        what = next((what for magic, what in _NO_VIDEO if re.match(magic, head[:1024], re.DOTALL | re.IGNORECASE)), "")
        what = f"is no video but {what}" if what else "begins like no known video file: convert it, e.g. to mp4"
        raise BrokenVideoError(f"{name} {what}.")
    if container == "jpeg" and path.suffix.lower() in (".mjpeg", ".mjpg"):
        container = "mjpeg"  # many pictures, one after the other
    if container not in IMAGES and _SEQUENCE.search(str(path)) and not _VIDEO_SUFFIX.fullmatch(path.suffix):
        raise RefusedSourceError(f"{name} is named like the pattern of a sequence of images: rename it.")
    return container
