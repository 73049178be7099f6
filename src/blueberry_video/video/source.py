"""Video sources: every supported input becomes a local file for a decoder, or a list of decoded frames.

A decoder never receives a URL, a protocol string or a name that it could parse as one: URLs are fetched here, and
bytes, streams and base64 are written to private temporary files, also those of single frames. ``sniff`` accepts only
containers that hold their own frames. In ISO files (mp4, mov) a ``dref`` entry may name an external file; FFmpeg
ignores it (``enable_drefs``).
"""

import base64
import os
import re
import shutil
import tempfile
import weakref
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO, cast
from urllib.parse import unquote

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from blueberry_video.video.errors import BrokenVideoError, LimitError, RefusedSourceError
from blueberry_video.video.fetch import Deadline, fetch, public_name
from blueberry_video.video.frame_list import (
    Animation,
    Arrays,
    Decoder,
    FrameList,
    Pictures,
    file_digest,
    opened_image,
    readable,
)
from blueberry_video.video.messages import read_message
from blueberry_video.video.sniff import IMAGES, local_path, sniff
from blueberry_video.video.source_options import SourceOptions

_IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff")
_FILES = (str, os.PathLike, bytes, bytearray, memoryview, Mapping)  # what can be the file of one frame
_PIECE = 1 << 20  # bytes, or characters of base64, processed at a time
_BLANKS = " \t\r\n"
_TO_BASE64 = {ord("-"): "+", ord("_"): "/"} | {ord(blank): None for blank in _BLANKS}  # accepts the URL-safe alphabet


@dataclass(eq=False)
class Source:
    """One video, ready for reading. ``close()``, or leaving the ``with`` block, deletes its temporary file.

    Attributes:
        kind: type of the input: "file", "url", "base64", "bytes" (also streams), "frames" or "decoder".
        name: name in messages, without the query and credentials of a URL.
        container: container detected from the first bytes (see ``sniff``); None for frames.
        path: local file for a decoder; None if ``frames`` is set.
        frames: decoded input and still images, readable while the source is open; None if ``path`` is set.
    """

    kind: str
    name: str
    container: str | None = None
    path: Path | None = None
    frames: FrameList | None = None
    _hash: str = field(default="", repr=False)
    _close: Callable[[], object] = field(default=lambda: None, repr=False)

    def __enter__(self) -> "Source":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        self._close()

    def content_hash(self) -> str:
        """Returns the hexadecimal SHA-256 of the bytes of the file, or of the frames. Cached after the first call."""
        if not self._hash:
            self._hash = (self.frames.fingerprint() if self.frames else file_digest(cast(Path, self.path))).hex()
        return self._hash


def open_source(value: object, options: SourceOptions | None = None) -> Source:
    """Opens a video of any supported type: checks it, and downloads it or writes it to a local file where needed.

    Args:
        value: one of
            a path of a video, a still image, or a folder of images (in natural order); ``~`` is the home folder, and
            ``file://`` URIs of this machine are paths;
            an http(s) URL; base64 text (at least 64 characters), or a base64 ``data:`` URI, of which
            ``data:video/jpeg;base64,…,…`` holds frames;
            bytes, a bytearray or memoryview; a binary stream, read to its end;
            a list of frames: all paths, URLs, base64 texts or bytes of images, all PIL images, or all arrays or
            tensors;
            an array or tensor (T, C, H, W) or (T, H, W, C) with C in 1, 3, 4, channels first where both layouts match,
            (T, H, W), or (H, W) for one frame; uint8, or float in [0, 1];
            a dict ``{"path": …, "bytes": …}`` or a decoder, the cells of a video column in HuggingFace datasets;
            a chat message, see ``messages``; the settings in its parts are read by ``VideoProcessor`` only.
        options: limits; defaults to ``SourceOptions()``.

    Raises:
        FileNotFoundError: the file does not exist.
        RefusedSourceError: a playlist, protocol string, special file or URL that is never opened.
        FetchError: a URL that could not be fetched.
        LimitError: the source exceeds a limit.
        BrokenVideoError: the source is not a video.
        TypeError: ``value`` has an unsupported type.
    """
    options = options or SourceOptions()
    value, _ = read_message(value)
    value = getattr(value, "_hf_encoded", None) or value  # the cell from which datasets made a decoder
    if isinstance(value, dict) and value.keys() <= {"path", "bytes"} and any(v is not None for v in value.values()):
        if value.get("bytes") is None:
            return open_source(value["path"], options)
        if not isinstance(value["bytes"], bytes | bytearray | memoryview):
            raise TypeError(f"'bytes' of a video is a {type(value['bytes']).__name__}: pass bytes, or only a 'path'.")
        return _open_bytes(value["bytes"], os.path.basename(value.get("path") or "bytes"), options)
    if isinstance(value, str):
        return _open_text(value, options)
    if isinstance(value, os.PathLike):
        return _open_path(os.fsdecode(value), options)
    if isinstance(value, bytes | bytearray | memoryview):
        return _open_bytes(value, "bytes", options)
    if isinstance(value, Image.Image):
        return _open_frames([value], options)
    if isinstance(value, Tensor) and (value.is_nested or value.device.type == "meta" or value.layout != torch.strided):
        raise TypeError("A video cannot be a nested, sparse or meta tensor: pass a dense tensor (T, C, H, W).")
    if isinstance(value, np.ndarray | Tensor) and value.ndim == 2:
        value = value[None]
    if isinstance(value, np.ndarray | Tensor) and value.ndim != 4:
        shape = tuple(value.shape)
        if value.ndim != 3 or {shape[0], shape[2]} & {3, 4} or (shape[2] == 1 and shape[0] != 1):
            fix = "pass (T, C, H, W) or (T, H, W, C), (T, H, W) for gray frames or (H, W) for one"
            raise BrokenVideoError(f"A video cannot be an array of shape {shape}: {fix}.")
    if isinstance(value, list | tuple | np.ndarray | Tensor):
        return _open_frames(value, options)
    if hasattr(value, "get_frames_at") or hasattr(value, "get_batch"):
        name = f"{type(value).__name__} of {len(cast(Any, value))} frames"
        return Source("decoder", name, frames=Decoder(value, name, options))
    if hasattr(value, "read"):
        return _open_stream(cast(BinaryIO, value), "stream", options)
    raise TypeError(
        f"A video cannot be a {type(value).__name__}: pass a path, a URL, base64 text, bytes, a binary stream, an "
        "array, a list of frames, a decoder, a chat message, or {'path': …, 'bytes': …}."
    )


def _open_text(text: str, options: SourceOptions) -> Source:
    if re.match(r"https?:", text, re.IGNORECASE):
        name, fill = _download(text, options, Deadline(options.fetch_timeout), options.max_bytes)
        return _from_temporary_file("url", name, options, fill)
    if (start := _start_of_base64(text)) is None:
        return _open_path(_local(text), options)
    if text[:start].lower() == "data:video/jpeg;base64,":
        _check_base64(text, start, options)  # before the frames are copied
        name = f"base64 text ({len(text) - start} characters)"
        return _open_frames([f"data:image/jpeg;base64,{part}" for part in text[start:].split(",")], options, name)
    name, fill = _base64(text, start, options)
    return _from_temporary_file("base64", name, options, fill)


def _download(
    text: str, options: SourceOptions, deadline: Deadline, max_bytes: int
) -> tuple[str, Callable[[BinaryIO], object]]:
    """Name of a URL, and the function that writes its content."""
    access, retries, networks = options.access, options.fetch_retries, options.allowed_networks
    return public_name(text), lambda file: fetch(text, file, max_bytes, deadline, networks, access, retries)


def _local(text: str) -> str:
    """Returns the path of a ``file://`` URI of this machine; other texts unchanged."""
    if not (uri := re.match(r"file://(?:localhost)?(?=/)", text, re.IGNORECASE)):
        return text
    path = text[uri.end() :]
    return path if "\0" in path or os.path.exists(path) else unquote(path)


def _start_of_base64(text: str) -> int | None:
    """Returns the position of the first character of base64; None for a text that is not base64."""
    if header := re.match(r"data:[^,]{0,256},", text, re.IGNORECASE):
        if not header.group().lower().endswith(";base64,"):
            raise BrokenVideoError("The data: URI is not base64: write data:video/mp4;base64,….")
        return header.end()
    may_be_base64 = len(text) >= 64 and re.fullmatch(r"[\w+/=\s-]*", text[:4096], re.ASCII)
    return 0 if may_be_base64 and (len(text) > 4096 or not os.path.exists(text)) else None


def _check_base64(text: str, start: int, options: SourceOptions) -> str:
    """Checks the size of base64 before it is decoded; returns its name."""
    size = (len(text) - start - sum(text.count(blank) for blank in _BLANKS)) * 3 // 4
    name = f"base64 text ({len(text) - start} characters)"
    if size - 2 > options.max_bytes:
        raise LimitError(f"{name} holds {size} bytes, more than max_bytes={options.max_bytes}: raise max_bytes.")
    return name


def _base64(text: str, start: int, options: SourceOptions) -> tuple[str, Callable[[BinaryIO], object]]:
    """Name of base64, and the function that writes what it encodes."""
    name = _check_base64(text, start, options)

    def decode(file: BinaryIO) -> None:
        rest, ended = "", False
        try:
            for at in range(start, len(text), _PIECE):
                piece = rest + text[at : at + _PIECE].translate(_TO_BASE64)
                if ended and piece:
                    raise ValueError("characters after the padding")
                whole = len(piece) // 4 * 4
                file.write(base64.b64decode(piece[:whole], validate=True))
                rest, ended = piece[whole:], piece.endswith("=")
            if len(rest) == 1 or "=" in rest:
                raise ValueError("its length is no multiple of 4, with or without padding: it is truncated")
            file.write(base64.b64decode(rest + "=" * (-len(rest) % 4), validate=True))
        except ValueError as error:
            raise BrokenVideoError(f"{name} is not valid base64 ({error}): encode the file again.") from error

    return name, decode


def _open_bytes(content: bytes | bytearray | memoryview, name: str, options: SourceOptions) -> Source:
    _check_bytes(name, memoryview(content).nbytes, options)
    whole = content if memoryview(content).contiguous else memoryview(content).tobytes()
    return _from_temporary_file("bytes", name, options, lambda file: file.write(whole))


def _open_stream(stream: BinaryIO, name: str, options: SourceOptions) -> Source:
    def copy(file: BinaryIO) -> None:
        size = 0
        while piece := stream.read(_PIECE):
            if not isinstance(piece, bytes | bytearray | memoryview):
                raise TypeError(f"The stream returns {type(piece).__name__}, not bytes: open it in binary mode.")
            size += len(piece)
            _check_bytes(name, size, options)
            file.write(piece)

    return _from_temporary_file("bytes", name, options, copy)


def _from_temporary_file(kind: str, name: str, options: SourceOptions, fill: Callable[[BinaryIO], object]) -> Source:
    """Returns a source that reads from a private temporary file written by ``fill``, deleted when the source is closed
    or garbage collected, at the latest when the interpreter exits."""
    descriptor, text = tempfile.mkstemp(prefix="blueberry-video-")
    path = Path(text)
    delete = _deletion(path)
    with ExitStack() as on_failure:
        on_failure.callback(delete)
        with open(descriptor, "wb") as file:
            fill(file)
        source = _checked(kind, name, path, options)
        on_failure.pop_all()
    source._close = weakref.finalize(source, delete)
    return source


def _deletion(path: Path) -> Callable[[], None]:
    owner = os.getpid()

    def delete() -> None:
        if os.getpid() != owner:  # a forked worker must not delete the file of its parent
            return
        if path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)

    return delete


def _open_path(text: str, options: SourceOptions) -> Source:
    path = local_path(text, folder=True)
    if path.is_file():
        return _checked("file", str(path), path, options)
    names = sorted((entry.name for entry in path.iterdir() if not entry.name.startswith(".")), key=_natural)
    other = next((name for name in names or ["no image"] if not name.lower().endswith(_IMAGE_SUFFIXES)), None)
    if other:
        allowed = f"only image files ({', '.join(_IMAGE_SUFFIXES)})"
        raise RefusedSourceError(f"The folder {path} holds {other}: pass a folder of {allowed}, or one video.")
    return _open_frames([path / name for name in names], options, str(path))


def _open_frames(frames: Sequence | np.ndarray | Tensor, options: SourceOptions, name: str = "") -> Source:
    name = name or f"{type(frames).__name__} of {len(frames)} frames"
    if len(frames) == 0:
        raise BrokenVideoError(f"{name} holds no frame: pass at least one.")
    kinds = (_FILES, (Image.Image,), (np.ndarray,), (Tensor,))
    kind = next((kind for kind in kinds if all(isinstance(frame, kind) for frame in frames)), None)
    if kind is None:
        found = ", ".join(sorted({type(frame).__name__ for frame in frames}))
        allowed = "image paths, URLs, base64 texts or bytes, PIL images, arrays or tensors"
        raise TypeError(f"{name} has mixed types ({found}): pass only {allowed}.")
    if kind in kinds[2:]:
        return Source("frames", name, frames=Arrays(frames, name, options))
    if kind is kinds[0]:
        return _open_image_files(list(frames), options, name)
    return Source("frames", name, frames=Pictures(list(frames), name, options))


def _open_image_files(frames: Sequence, options: SourceOptions, name: str) -> Source:
    """Source of paths, URLs, base64 texts, bytes and dicts of images, with one deadline and one byte limit. What is no
    file yet is written to one private folder."""
    deadline, paths, total = Deadline(options.fetch_timeout), [], 0
    with ExitStack() as on_failure:
        folder: Path | None = None
        for number, frame in enumerate(frames):
            where = f"Frame {number} of {name}"
            content = _frame_content(frame, options, deadline, options.max_bytes - total)
            if isinstance(content, Path):
                path = content
            else:
                if folder is None:
                    folder = Path(tempfile.mkdtemp(prefix="blueberry-video-"))
                    on_failure.callback(_deletion(folder))
                path = folder / f"{number}"
                with path.open("xb") as file:
                    content(file)
                if (container := sniff(path, where)) not in IMAGES:
                    raise BrokenVideoError(f"{where} is {container} and no image: pass a video by itself.")
            paths.append(path)
            total += path.stat().st_size
            _check_bytes(name, total, options)
        source = Source("frames", name, frames=Pictures(paths, name, options))
        on_failure.pop_all()
    if folder is not None:
        source._close = weakref.finalize(source, _deletion(folder))
    return source


def _frame_content(
    frame: Any, options: SourceOptions, deadline: Deadline, max_bytes: int
) -> Path | Callable[[BinaryIO], object]:
    """Path of a local image, or the function that writes the image."""
    if isinstance(frame, Mapping):
        if frame.keys() > {"path", "bytes"} or not (given := [value for value in frame.values() if value is not None]):
            raise TypeError(
                f"A frame cannot be a dict of {', '.join(map(str, frame))}: pass {{'path': …, 'bytes': …}}."
            )
        return _frame_content(frame.get("bytes") or given[0], options, deadline, max_bytes)
    if isinstance(frame, bytes | bytearray | memoryview):
        return lambda file: file.write(memoryview(frame).tobytes())
    if isinstance(frame, os.PathLike):
        return local_path(os.fsdecode(frame))
    if re.match(r"https?:", frame, re.IGNORECASE):
        return _download(frame, options, deadline, max(max_bytes, 0))[1]
    if (start := _start_of_base64(frame)) is not None:
        return _base64(frame, start, options)[1]
    return local_path(_local(frame))


def _checked(kind: str, name: str, path: Path, options: SourceOptions) -> Source:
    _check_bytes(name, path.stat().st_size, options)
    container = sniff(path, name)
    if container not in IMAGES:
        return Source(kind, name, container, path)
    with readable(name), opened_image(path, name) as image:
        animated = container != "jpeg" and getattr(image, "n_frames", 1) > 1
    frames = Animation(path, name, options) if animated else Pictures([path], name, options)
    return Source(kind, name, container, frames=frames)


def _check_bytes(name: str, size: int, options: SourceOptions) -> None:
    if size > options.max_bytes:
        limit = f"max_bytes={options.max_bytes}"
        raise LimitError(f"{name} has at least {size} bytes, above {limit}: raise max_bytes, or shorten the video.")


def _natural(name: str) -> tuple[list[int | str], str]:
    """Sort key that orders numbers in names by value: 2.png before 10.png."""
    parts = re.split(r"([0-9]+)", name.lower())  # text and numbers alternate
    return [int(part) if number % 2 else part for number, part in enumerate(parts)], name
