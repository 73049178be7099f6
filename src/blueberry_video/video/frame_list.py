"""Lists of decoded frames: arrays, images, folders of images and animations, with lazy loading."""

import contextlib
import functools
import hashlib
import itertools
import struct
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import ExifTags, Image, ImageOps
from torch import Tensor

from blueberry_video.video.errors import BrokenVideoError, LimitError, VideoError, one_line
from blueberry_video.video.ranges import check_indices
from blueberry_video.video.sniff import IMAGES
from blueberry_video.video.source_options import SourceOptions

# exceptions that Pillow raises for broken files
IMAGE_FAILURES = (OSError, SyntaxError, ValueError, EOFError, TypeError, LookupError, AttributeError, struct.error)


class FrameList(ABC):
    """List of frames of one size, loaded lazily.

    Attributes:
        size: (height, width) in pixels, after EXIF orientation.
    """

    size: tuple[int, int]

    def __init__(self, count: int, sizes: Iterator[tuple[int, int]], name: str, options: SourceOptions):
        self._count, self._name, self._fps = count, name, options.frames_fps
        self.size = (0, 0)
        for number, size in enumerate(sizes):
            found = f"Frame {number} of {name} is {size[0]} x {size[1]} (height x width)"
            if size[0] * size[1] > options.max_frame_pixels or 0 in size:
                limit = f"max_frame_pixels={options.max_frame_pixels}"
                raise LimitError(f"{found}, but must be 1 to {limit} pixels: resize it, or raise max_frame_pixels.")
            if number and size != self.size:
                first = f"{self.size[0]} x {self.size[1]}"
                raise BrokenVideoError(f"{found}, but frame 0 is {first}: resize all frames to the same size.")
            self.size = size

    def __len__(self) -> int:
        return self._count

    @property
    def fps(self) -> float:
        """Frames per second, from the timestamps or ``frames_fps``; 0.0 if unknown."""
        times = self.timestamps
        span = times[-1] - times[0] if times else 0.0
        return (self._count - 1) / span if span else self._fps or 0.0

    @property
    def timestamps(self) -> tuple[float, ...] | None:
        """Time of each frame in seconds, from the durations of an animation or ``frames_fps``; None if unknown."""
        return tuple(i / self._fps for i in range(self._count)) if self._fps else None

    @property
    def last_duration(self) -> float | None:
        """Display time of the last frame in seconds: its own, or the mean interval; None if unknown."""
        return 1 / self.fps if self.fps else None

    def read(self, indices: Sequence[int]) -> Tensor:
        """Loads frames as uint8 (n, 3, H, W) RGB, in the order of ``indices``, transparent pixels on white.

        Args:
            indices: frame indices in any order, with repetitions.

        Raises:
            IndexError: ``indices`` is empty, or an index is outside 0 … len - 1.
            BrokenVideoError: an image file cannot be decoded.
        """
        indices = check_indices(indices, self._count, self._name)
        wanted = sorted(set(indices))
        with readable(self._name):
            loaded = dict(zip(wanted, self._load(wanted)))
        return torch.from_numpy(np.stack([loaded[i] for i in indices])).permute(0, 3, 1, 2).contiguous()

    @abstractmethod
    def fingerprint(self) -> bytes:
        """Returns a digest of the bytes of image files, or of the values, shapes and types of arrays."""

    @abstractmethod
    def _load(self, indices: Sequence[int]) -> Iterator[np.ndarray]:
        """Yields uint8 (H, W, 3) pixels for distinct ascending indices."""


class Arrays(FrameList):
    """Frames from arrays or tensors, each (H, W), (C, H, W) or (H, W, C) with C in 1, 3, 4.

    The values are uint8, or float in [0, 1].
    """

    def __init__(self, frames: Sequence | np.ndarray | Tensor, name: str, options: SourceOptions):
        self._frames = [frame[None] for frame in frames] if all(frame.ndim == 2 for frame in frames) else frames
        frames = self._frames
        shapes = [tuple(frame.shape) for frame in frames]
        for number, shape in enumerate(shapes):
            if len(shape) != 3 or not (shape[0] in (1, 3, 4) or shape[2] in (1, 3, 4)):
                raise BrokenVideoError(
                    f"Frame {number} of {name} has shape {shape}: pass (H, W), (C, H, W) or (H, W, C) with 1, 3 or 4 "
                    "channels, and a whole video as (T, C, H, W) or (T, H, W, C)."
                )
        self._channels_first = shapes[0][0] in (1, 3, 4)  # also if both layouts match
        for number, shape in enumerate(shapes):
            if shape[0 if self._channels_first else 2] not in (1, 3, 4):
                found = f"Frame {number} of {name} has shape {shape}, but frame 0 has {shapes[0]}"
                raise BrokenVideoError(f"{found}: use one layout for all.")
        super().__init__(len(frames), ((s[1:] if self._channels_first else s[:2]) for s in shapes), name, options)
        for number, frame in enumerate(frames):
            values = _numpy(frame)
            is_float = np.issubdtype(values.dtype, np.floating)
            if values.dtype != np.uint8 and not (is_float and values.min() >= 0 and values.max() <= 1):  # also for NaN
                found = f"Frame {number} of {name} has {frame.dtype} values from {values.min()} to {values.max()}"
                raise BrokenVideoError(f"{found}: pass uint8, or floats in [0, 1] without normalization.")

    def _load(self, indices: Sequence[int]) -> Iterator[np.ndarray]:
        for i in indices:
            pixels = _numpy(self._frames[i])
            pixels = pixels.transpose(1, 2, 0) if self._channels_first else pixels
            if pixels.dtype != np.uint8:
                pixels = np.round(pixels.astype(np.float32) * 255).astype(np.uint8)
            if pixels.shape[2] == 4:
                pixels = _rgb(Image.fromarray(np.ascontiguousarray(pixels), "RGBA"))
            yield pixels if pixels.shape[2] > 1 else np.repeat(pixels, 3, axis=2)

    def fingerprint(self) -> bytes:
        digest = hashlib.sha256()
        for frame in self._frames:
            digest.update(f"{frame.dtype} {tuple(frame.shape)} ".encode())
            digest.update(np.ascontiguousarray(_numpy(frame)).data)
        return digest.digest()


class Decoder(FrameList):
    """Frames of an open decoder: ``VideoDecoder`` of torchcodec or ``VideoReader`` of decord.

    Timestamps are those of decord; torchcodec names only the average rate without decoding, so they are even.
    """

    def __init__(self, decoder: Any, name: str, options: SourceOptions):
        self._decoder = decoder
        first = self._decoded([0])[0]
        super().__init__(len(decoder), iter([first.shape[:2]]), name, options)

    @property
    def timestamps(self) -> tuple[float, ...] | None:
        if hasattr(self._decoder, "get_frame_timestamp"):
            return tuple(float(start) for start, _ in self._decoder.get_frame_timestamp(range(len(self))))
        rate = self._decoder.metadata.average_fps
        return tuple(i / rate for i in range(len(self))) if rate else super().timestamps

    @property
    def last_duration(self) -> float | None:
        if hasattr(self._decoder, "get_frame_timestamp"):
            [(start, end)] = self._decoder.get_frame_timestamp([len(self) - 1])
            if end > start:
                return float(end - start)
        return super().last_duration

    def _decoded(self, indices: Sequence[int]) -> np.ndarray:
        """Pixels (n, H, W, 3) of a few frames."""
        if hasattr(self._decoder, "get_frames_at"):
            pixels = self._decoder.get_frames_at(list(indices)).data
            return (pixels if pixels.shape[-1] == 3 else pixels.permute(0, 2, 3, 1)).cpu().numpy()
        found = self._decoder.get_batch(list(indices))
        return found.asnumpy() if hasattr(found, "asnumpy") else _numpy(found)

    def _load(self, indices: Sequence[int]) -> Iterator[np.ndarray]:
        for start in range(0, len(indices), 16):
            yield from self._decoded(indices[start : start + 16])

    def fingerprint(self) -> bytes:
        digest = hashlib.sha256()
        for i in range(len(self)):
            digest.update(np.ascontiguousarray(self._decoded([i])).data)
        return digest.digest()


class Pictures(FrameList):
    """Frames from image files or PIL images, one each. Pixels are loaded by ``read``."""

    def __init__(self, images: Sequence, name: str, options: SourceOptions):
        self._images = images
        super().__init__(len(images), self._sizes(), name, options)

    def _sizes(self) -> Iterator[tuple[int, int]]:
        for item in self._images:
            name = str(item) if isinstance(item, Path) else "an image"
            with readable(name), opened_image(item) as image:
                size = _size(image)
            yield size

    def _load(self, indices: Sequence[int]) -> Iterator[np.ndarray]:
        for i in indices:
            with opened_image(self._images[i]) as image:
                yield _rgb(image)

    def fingerprint(self) -> bytes:
        digest = hashlib.sha256(str(self.size).encode())
        for image in self._images:
            digest.update(file_digest(image) if isinstance(image, Path) else _rgb(image).tobytes())
        return digest.digest()


class Animation(FrameList):
    """Frames of an animated WebP, PNG or TIFF file. Decodes forward and restarts only for an earlier frame. Raises
    LimitError above ``max_decoded_pixels``, and BrokenVideoError for an unreadable file."""

    def __init__(self, path: Path, name: str, options: SourceOptions):
        self._path = path
        self._image: Image.Image | None = None
        self._position = 0  # of the last decoded frame
        with readable(name), opened_image(path) as image:
            # default image of a PNG, which is not part of the animation
            self._skipped = int(getattr(image, "default_image", False))
            count, size = getattr(image, "n_frames", 1) - self._skipped, _size(image)
        if count * size[0] * size[1] > options.max_decoded_pixels:
            found = f"{name} has {count} frames of {size[0]} x {size[1]} pixels"
            limit = f"max_decoded_pixels={options.max_decoded_pixels}"
            raise LimitError(f"{found}, more than {limit}: raise that, or shorten the animation.")
        super().__init__(count, iter([size]), name, options)

    @functools.cached_property
    def _durations(self) -> list[float]:
        """Milliseconds of each frame, empty if the file has none. A frame without one is shown for 100 ms, as in
        browsers and in FFmpeg's reader of GIF."""
        with readable(self._name):  # some formats provide them only after decoding
            found = [image.info.get("duration", 0) for image in self._walk(range(len(self)))]
        return [duration or 100.0 for duration in found] if any(found) else []

    @property
    def timestamps(self) -> tuple[float, ...] | None:
        if not self._durations:
            return super().timestamps
        return tuple(total / 1000 for total in itertools.accumulate(self._durations[:-1], initial=0.0))

    @property
    def last_duration(self) -> float | None:
        return self._durations[-1] / 1000 if self._durations else super().last_duration

    def _walk(self, indices: Sequence[int]) -> Iterator[Image.Image]:
        for i in indices:
            if self._image is None or i < self._position:
                self._image = opened_file(self._path, self._name)
            image = self._image
            image.seek(i + self._skipped)
            if _size(image) != self.size:  # checked before decoding, because the size is unbounded
                raise ValueError(f"frame {i} is {_size(image)}, frame 0 is {self.size}")
            image.load()
            self._position = i
            yield image

    def _load(self, indices: Sequence[int]) -> Iterator[np.ndarray]:
        return map(_rgb, self._walk(indices))

    def fingerprint(self) -> bytes:
        return file_digest(self._path)


def file_digest(path: Path) -> bytes:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").digest()


def _numpy(frame: np.ndarray | Tensor) -> np.ndarray:
    if isinstance(frame, np.ndarray):
        return frame
    frame = frame.detach().cpu()
    return (frame.float() if frame.dtype == torch.bfloat16 else frame).numpy()


def opened_image(image: Path | Image.Image, name: str = "") -> AbstractContextManager[Image.Image]:
    """Context manager of an image with its header read and its pixels not yet decoded. Closes files on exit."""
    return nullcontext(image) if isinstance(image, Image.Image) else opened_file(image, name)


def opened_file(path: Path, name: str = "") -> Image.Image:
    """Opens an image file and reads its header; raises as :func:`readable`. The caller closes it."""
    with readable(name or str(path)):
        opened = Image.open(path, formats=IMAGES)
        opened.filename = ""  # prevents memory mapping, which swaps height and width of a rotated TIFF
        return opened


@contextlib.contextmanager
def readable(name: str) -> Iterator[None]:
    """Context manager that converts Pillow's exceptions to LimitError (too many pixels) or BrokenVideoError."""
    try:
        yield
    except VideoError:
        raise
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise LimitError(f"{name} has too many pixels for Pillow ({error}): resize it.") from error
    except IMAGE_FAILURES as error:
        raise BrokenVideoError(
            f"{name} cannot be read as an image ({one_line(error)}): use JPEG, PNG, WebP, BMP or TIFF files."
        ) from error


def _orientation(image: Image.Image) -> int:
    """Returns the EXIF orientation, 1 to 8: 1 for a TIFF, which Pillow rotates, or a PNG with EXIF after pixels."""
    if image.format == "TIFF" or (image.format == "PNG" and "exif" not in image.info):
        return 1
    return image.getexif().get(ExifTags.Base.Orientation, 1)


def _size(image: Image.Image) -> tuple[int, int]:
    """Returns (height, width) after EXIF orientation."""
    return image.size if 5 <= _orientation(image) <= 8 else image.size[::-1]


def _rgb(image: Image.Image) -> np.ndarray:
    """Returns uint8 (H, W, 3) pixels after EXIF orientation, transparent ones on white."""
    if image.mode in ("I", "F"):
        raise ValueError(f"mode={image.mode} has no known value range")
    if 2 <= _orientation(image) <= 8:
        image = ImageOps.exif_transpose(image)
    if image.has_transparency_data:  # on white, as in qwen-vl-utils
        layers = image.convert("RGBA")
        image = Image.new("RGB", image.size, (255, 255, 255))
        image.paste(layers, mask=layers.getchannel("A"))
    if image.mode.startswith("I;16"):  # Pillow's conversion clips at 255
        image = Image.fromarray(((np.asarray(image).astype(np.uint32) + 128) // 257).astype(np.uint8))
    return np.asarray(image.convert("RGB"))
