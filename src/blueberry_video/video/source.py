"""Whatever a user hands in, as one object: a local file for a decoder, or frames that are decoded already.

A decoder is never handed an address, a protocol string or a name that it could read as one: addresses are fetched
here, and bytes, streams and base64 are written to a private temporary file. Nor is it handed contents that make it
open something else: a file is let through only if it begins like a container that holds its own frames. What is
refused is refused before a decoder sees it, and special files (devices, pipes) before they are opened.

In ISO files (mp4, mov) an entry of ``dref`` may name an outside file; FFmpeg leaves those alone (``enable_drefs``).
"""

import base64
import os
import re
import tempfile
import weakref
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO, cast

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from blueberry_video.video.errors import BrokenVideoError, LimitError, RefusedSourceError
from blueberry_video.video.fetch import fetch, public_name
from blueberry_video.video.frame_list import Animation, Arrays, FrameList, Pictures, file_digest, opened_image, readable
from blueberry_video.video.sniff import IMAGES, local_path, sniff
from blueberry_video.video.source_options import SourceOptions

_IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff")
_PIECE = 1 << 20  # bytes, or characters of base64, handled at a time
_BLANKS = " \t\r\n"
_TO_BASE64 = {ord("-"): "+", ord("_"): "/"} | {ord(blank): None for blank in _BLANKS}  # from the alphabet of URLs too


@dataclass(eq=False)
class Source:
    """One video, ready to be read; ``close()``, or leaving its ``with`` block, deletes its temporary file.

    Attributes:
        kind: how it was handed in: "file", "url", "base64", "bytes" (streams too) or "frames".
        name: for messages; without the query and credentials of an address.
        container: what its first bytes say (see ``sniff``); None for frames.
        path: the local file that a decoder is given; None where there are ``frames``.
        frames: decoded input and still images, to be read while the source is open; None where there is a ``path``.
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
        """SHA-256 in hex of what was handed in: a file's bytes, or the frames; computed once."""
        if not self._hash:
            self._hash = (self.frames.fingerprint() if self.frames else file_digest(cast(Path, self.path))).hex()
        return self._hash


def open_source(value: object, options: SourceOptions | None = None) -> Source:
    """Takes a video in whatever form it comes, checks it, and fetches or writes it to a local file where needed.

    Args:
        value: one of
            a path of a video, a still image, or a folder of images (in natural order);
            an http(s) address; base64 text (of 64 characters or more) or a base64 ``data:`` URI;
            bytes, a bytearray or memoryview; a binary stream, read to its end;
            a list of frames: all paths of images, all PIL images, or all arrays or tensors;
            an array or tensor (T, C, H, W) or (T, H, W, C), C in 1, 3, 4; channels are first where both fit; uint8, or
            float in [0, 1];
            a dict ``{"path": …, "bytes": …}``, as a video column of HuggingFace datasets holds.
        options: limits; the defaults where None.

    Raises:
        FileNotFoundError: there is no such file.
        RefusedSourceError: a playlist, protocol string, special file or address that is never opened.
        FetchError: an address that could not be fetched.
        LimitError: larger than a limit.
        BrokenVideoError: no video.
        TypeError: a value of another type.
    """
    options = options or SourceOptions()
    if isinstance(value, dict) and value.keys() <= {"path", "bytes"} and any(v is not None for v in value.values()):
        if value.get("bytes") is None:
            return open_source(value["path"], options)
        if not isinstance(value["bytes"], bytes | bytearray | memoryview):
            raise TypeError(f"'bytes' of a video is a {type(value['bytes']).__name__}: give bytes, or a 'path' alone.")
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
        raise TypeError("A video cannot be a nested, sparse or meta tensor: give a plain one, (T, C, H, W).")
    if isinstance(value, np.ndarray | Tensor) and value.ndim != 4:
        raise BrokenVideoError(
            f"An array of shape {tuple(value.shape)} is no video: give (T, C, H, W) or (T, H, W, C)."
        )
    if isinstance(value, list | tuple | np.ndarray | Tensor):
        return _open_frames(value, options)
    if hasattr(value, "read"):
        return _open_stream(cast(BinaryIO, value), "stream", options)
    raise TypeError(
        f"A video cannot be a {type(value).__name__}: give a path, an address, base64 text, bytes, a binary stream, an "
        "array, a list of frames, or {'path': …, 'bytes': …}."
    )


def _open_text(text: str, options: SourceOptions) -> Source:
    if re.match(r"https?:", text, re.IGNORECASE):
        limits = (options.max_bytes, options.fetch_timeout, options.allowed_networks)
        return _spilled("url", public_name(text), options, lambda file: fetch(text, file, *limits))
    if header := re.match(r"data:[^,]{0,256},", text, re.IGNORECASE):
        if not header.group().lower().endswith(";base64,"):
            raise BrokenVideoError("The data: URI is not in base64: write data:video/mp4;base64,….")
        return _open_base64(text, header.end(), options)
    long = len(text) >= 64 and re.fullmatch(r"[\w+/=\s-]*", text[:4096], re.ASCII)
    if long and (len(text) > 4096 or not os.path.exists(text)):
        return _open_base64(text, 0, options)
    return _open_path(text, options)


def _open_base64(text: str, start: int, options: SourceOptions) -> Source:
    size = (len(text) - start - sum(text.count(blank) for blank in _BLANKS)) * 3 // 4
    name = f"base64 text ({len(text) - start} characters)"
    if size - 2 > options.max_bytes:
        raise LimitError(f"{name} holds {size} bytes, more than max_bytes={options.max_bytes}: raise it.")

    def decode(file: BinaryIO) -> None:
        rest, ended = "", False
        try:
            for at in range(start, len(text), _PIECE):
                piece = rest + text[at : at + _PIECE].translate(_TO_BASE64)
                if ended and piece:
                    raise ValueError("text follows its padding")
                whole = len(piece) // 4 * 4
                file.write(base64.b64decode(piece[:whole], validate=True))
                rest, ended = piece[whole:], piece.endswith("=")
            if rest:
                raise ValueError("its length is no multiple of 4, so it was cut")
        except ValueError as error:
            raise BrokenVideoError(f"{name} is malformed ({error}): encode the file again.") from error

    return _spilled("base64", name, options, decode)


def _open_bytes(content: bytes | bytearray | memoryview, name: str, options: SourceOptions) -> Source:
    if (size := memoryview(content).nbytes) > options.max_bytes:
        raise LimitError(f"{name} has {size} bytes, more than max_bytes={options.max_bytes}: raise it, or cut it.")
    return _spilled(
        "bytes",
        name,
        options,
        lambda file: file.write(memoryview(content).tobytes() if not memoryview(content).contiguous else content),
    )


def _open_stream(stream: BinaryIO, name: str, options: SourceOptions) -> Source:
    def copy(file: BinaryIO) -> None:
        size = 0
        while piece := stream.read(_PIECE):
            if not isinstance(piece, bytes | bytearray | memoryview):
                raise TypeError(f"The stream gives {type(piece).__name__}, not bytes: open it in binary mode.")
            size += len(piece)
            if size > options.max_bytes:
                raise LimitError(f"{name} is longer than max_bytes={options.max_bytes}: raise it, or cut the file.")
            file.write(piece)

    return _spilled("bytes", name, options, copy)


def _spilled(kind: str, name: str, options: SourceOptions, fill: Callable[[BinaryIO], object]) -> Source:
    """A source whose content ``fill`` writes to a private temporary file, deleted at the latest when Python ends."""
    descriptor, text = tempfile.mkstemp(prefix="blueberry-video-")
    path, owner = Path(text), os.getpid()

    def delete() -> None:
        if os.getpid() == owner:  # not where a forked worker lets go of its copy
            path.unlink(missing_ok=True)

    with ExitStack() as on_failure:
        on_failure.callback(delete)
        with open(descriptor, "wb") as file:
            fill(file)
        source = _checked(kind, name, path, options)
        on_failure.pop_all()
    source._close = weakref.finalize(source, delete)
    return source


def _open_path(text: str, options: SourceOptions) -> Source:
    path = local_path(text, folder=True)
    if path.is_file():
        return _checked("file", str(path), path, options)
    names = sorted((entry.name for entry in path.iterdir() if not entry.name.startswith(".")), key=_natural)
    other = next((name for name in names or ["no image"] if not name.lower().endswith(_IMAGE_SUFFIXES)), None)
    if other:
        raise RefusedSourceError(
            f"The folder {path} holds {other}: give a folder of image files alone ({', '.join(_IMAGE_SUFFIXES)}), or "
            "the path of one video."
        )
    return _open_frames([path / name for name in names], options, str(path))


def _open_frames(frames: Sequence | np.ndarray | Tensor, options: SourceOptions, name: str = "") -> Source:
    name = name or f"{type(frames).__name__} of {len(frames)} frames"
    if len(frames) == 0:
        raise BrokenVideoError(f"{name} holds no frame: give at least one.")
    kinds = ((str, os.PathLike), (Image.Image,), (np.ndarray,), (Tensor,))
    kind = next((kind for kind in kinds if all(isinstance(frame, kind) for frame in frames)), None)
    if kind is None:
        raise TypeError(
            f"{name} mixes types, or holds one that is no picture: give only paths of images, only PIL images, only "
            "numpy arrays or only tensors."
        )
    if kind in kinds[2:]:
        return Source("frames", name, frames=Arrays(frames, name, options))
    if kind is kinds[0]:
        frames = [local_path(os.fsdecode(frame)) for frame in frames]
        if (size := sum(path.stat().st_size for path in frames)) > options.max_bytes:
            raise LimitError(f"{name} has {size} bytes, more than max_bytes={options.max_bytes}: raise it.")
    return Source("frames", name, frames=Pictures(list(frames), name, options))


def _checked(kind: str, name: str, path: Path, options: SourceOptions) -> Source:
    if (size := path.stat().st_size) > options.max_bytes:
        raise LimitError(f"{name} has {size} bytes, more than max_bytes={options.max_bytes}: raise it, or cut it.")
    container = sniff(path, name)
    if container not in IMAGES:
        return Source(kind, name, container, path)
    with readable(name), opened_image(path, name) as image:
        animated = container != "jpeg" and getattr(image, "n_frames", 1) > 1
    frames = Animation(path, name, options) if animated else Pictures([path], name, options)
    return Source(kind, name, container, frames=frames)


def _natural(name: str) -> tuple[list[int | str], str]:
    """Sorts numbers in names by their value: 2.png before 10.png."""
    parts = re.split(r"([0-9]+)", name.lower())  # text and numbers in turn
    return [int(part) if number % 2 else part for number, part in enumerate(parts)], name
