"""Detection of the container of a local file, and refusal of files that a decoder must not open.

FFmpeg detects formats by content: a playlist under any name makes it open other files and URLs. Files are therefore
accepted by an allowlist of containers that hold their own frames, and special files (devices, pipes) are refused before
they are opened.
"""

import functools
import os
import re
import stat
from pathlib import Path

from blueberry_video.video.errors import BrokenVideoError, RefusedSourceError

_HEAD = 1 << 20  # bytes that FFmpeg reads to detect a format
IMAGES = ("jpeg", "png", "webp", "bmp", "tiff")  # formats decoded by Pillow; GIF is decoded by FFmpeg

# First bytes of the containers that hold their own frames; no other file reaches a decoder.
_CONTAINERS = (
    (rb".{4}(?:ftyp|styp|sidx|moov|moof|mdat|free|skip|wide|pnot)", "mov"),
    (rb"\x1aE\xdf\xa3", "matroska"),
    (rb"RIFF.{4}AVI ", "avi"),
    (rb"GIF8[79]a", "gif"),
    (rb"\0\0\x01\xba", "mpeg"),
    (rb"\0?\0\0\x01[\0-\x7f\xb0\xb3\xb5]", "elementary"),  # raw H.264, HEVC, MPEG-2 and MPEG-4 video
    (rb"(?:G.{187}){2}G|(?:.{4}G.{187}){2}.{4}G|(?:G.{203}){2}G", "mpegts"),
    (rb".{0,204}?(?:G.{187}){4}G", "mpegts"),  # an excerpt of a longer stream
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
    # two consecutive frame headers
    (rb"(\xff[\xe2-\xe5\xf2-\xf5\xfa-\xfd])[\x10-\xef].{24,2880}?\1[\x10-\xef]", "mp3"),
)
_ARCHIVES = rb"PK\x03\x04|PK\x05\x06|\x1f\x8b|BZh\d|\xfd7zXZ|7z\xbc\xaf|Rar!|\x28\xb5\x2f\xfd|.{257}ustar"
_NO_VIDEO = (
    (_ARCHIVES, "an archive: extract it"),
    (rb"RIFF.{4}WAVE", "audio without video"),
    (rb"\s*<(?:!doctype )?html", "a web page: use the URL of the video itself"),
    (rb"\xff\xfe|\xfe\xff|[^\0-\x08\x0e-\x1a\x1c-\x1f]{1,1024}\Z", "text"),
)
# Text that refers to other files and URLs: at the start, after a byte order mark and whitespace, or anywhere before the
# first NUL, which FFmpeg searches too.
_PLAYLIST = rb"#ext|ffconcat|<\?xml|<mpd|<asx|<smil|<playlist|<svg|\[playlist\]|\[reference\]|rtsptext|smiltext|v=0\s"
_REFERENCES = rb"#extm3u|ffconcat version|dash:profile|<compositionplaylist|<smoothstreamingmedia|^c=in ip"

# FFmpeg reads a file with such a name and an image suffix as an image sequence, regardless of its content.
_SEQUENCE = re.compile(r"[%*?\[\]{}]")
_VIDEO_SUFFIX = re.compile(
    r"|\.(mp4|m4v|mov|avi|mkv|webm|gif|m?ts|m2ts|mpe?g|flv|wmv|asf|og[gv]|3gp|ivf|y4m|[hx]?26[45]|hevc|obu|mxf|mp3|m4a|flac|"
    r"mjpe?g)",
    re.IGNORECASE,
)
_PROTOCOL = re.compile(r"\s*(subfile,|[A-Za-z][A-Za-z0-9+.-]*:)")


def local_path(text: str, folder: bool = False) -> Path:
    """Returns the resolved path of a regular file, or of a folder if ``folder``. Opens nothing.

    Raises:
        RefusedSourceError: a protocol string, or a device, pipe, socket or folder.
        FileNotFoundError: the path does not exist.
    """
    if text in ("", "-") or "\0" in text:
        raise RefusedSourceError(f"{text[:60]!r} is not the path of a file: pass a path.")
    if protocol := _PROTOCOL.match(text):
        raise RefusedSourceError(
            f"A source that begins with {protocol.group(1)!r} is a protocol. Only http and https are fetched, from a "
            "str, and file:// of this machine is read: pass the path of a local file, with './' before a name that "
            "contains a colon."
        )
    if text.startswith("~") and not os.path.exists(text):
        text = os.path.expanduser(text)
    try:
        path = Path(os.path.realpath(text))
        mode = path.stat().st_mode
    except UnicodeError as error:
        raise RefusedSourceError("The path has characters that a file name cannot have: rename the file.") from error
    except OSError as error:
        raise FileNotFoundError(f"There is no file at {str(path)[:300]} ({error.strerror}): check the path.") from error
    if not stat.S_ISREG(mode) and not (folder and stat.S_ISDIR(mode)):
        raise RefusedSourceError(f"{path} is a device, pipe, socket or folder: pass a regular file.")
    return path


def local_video(path: str | Path) -> tuple[Path, str]:
    """Returns the resolved path and the container of a file that may be decoded; raises as :func:`local_path` and
    :func:`sniff`."""
    found = local_path(os.fspath(path))
    return found, sniff(found, str(found))


def sniff(path: Path, name: str) -> str:
    """Returns the container of a regular file, detected from its first bytes. ``name`` is its name in messages.

    Raises:
        RefusedSourceError: the file is a playlist or description that refers to other files or URLs, or its name is an
            image sequence pattern.
        BrokenVideoError: the file is empty, text, an archive, or has an unknown container.
    """
    with path.open("rb") as file:
        head, tag = file.read(_HEAD), None
        if tag := re.match(rb"ID3[^\xff]{2}(.)([\0-\x7f]{4})", head, re.DOTALL):  # skipped, as FFmpeg does
            size = functools.reduce(lambda total, byte: total << 7 | byte, tag.group(2), 0)
            file.seek(size + (20 if tag.group(1)[0] & 16 else 10))
            head = file.read(_HEAD)
    if not head:
        raise BrokenVideoError(f"{name} is empty: download or copy it again.")
    start, text = head.removeprefix(b"\xef\xbb\xbf").lstrip(), head.partition(b"\0")[0]
    if re.match(_PLAYLIST, start, re.IGNORECASE) or re.search(_REFERENCES, text, re.IGNORECASE | re.MULTILINE):
        raise RefusedSourceError(
            f"{name} is a playlist or another text that refers to files or URLs, not a video: decoding could open "
            "them. Download the videos that it lists and use those files."
        )
    container = next((found for magic, found in _CONTAINERS if re.match(magic, head, re.DOTALL)), None)
    if container is None or (tag and container not in ("mp3", "flac")):
        what = next((what for magic, what in _NO_VIDEO if re.match(magic, head[:1024], re.DOTALL | re.IGNORECASE)), "")
        what = f"is no video file but {what}" if what else "has an unknown container: convert it, for example to mp4"
        raise BrokenVideoError(f"{name} {what}.")
    if container == "jpeg" and path.suffix.lower() in (".mjpeg", ".mjpg"):
        container = "mjpeg"  # consecutive JPEG images
    if container not in IMAGES and _SEQUENCE.search(str(path)) and not _VIDEO_SUFFIX.fullmatch(path.suffix):
        raise RefusedSourceError(f"{name} has the name of an image sequence pattern: rename the file.")
    return container
