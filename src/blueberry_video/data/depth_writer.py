"""Writer of the maps of a video: NPZ shards, 16-bit PNG, EXR and a colored mp4, each with its scale in ``depth.json``.

Maps arrive in parts and are written as shards of a constant number of frames; together with the state of whatever
computes them they form a position from which a killed job continues, to the same files byte for byte. Formats that need
the range of the whole video are written from the shards at the end.

Layout of the folder: ``npz/depth_00000.npz`` …, ``png/00000000.png`` …, ``exr/00000000.exr`` …, ``depth.mp4``, and
``depth.json`` here and in each folder, as :mod:`~blueberry_video.data.depth_maps` reads it.
"""

import io
import json
import shutil
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from blueberry_video.atomic import atomic_file, write_bytes, write_text
from blueberry_video.data.progress import Progress
from blueberry_video.data.write import VideoWriter
from blueberry_video.installation import install_command
from blueberry_video.video.container import OpenVideo
from blueberry_video.video.decode import DecodeOptions, decode_in_chunks
from blueberry_video.video.errors import BrokenVideoError, one_line

FORMATS = ("npz", "png", "exr", "mp4")
BATCH = 8  # frames that a model receives at once; a constant, because results depend on it in the last bits
LEVELS = 65535  # of a 16-bit image
SIDECAR = "depth.json"


class Maps(Protocol):
    """Maps of a stream of frames, as :class:`~blueberry_video.inference.depth.DepthStream`."""

    def push(self, frames: Tensor) -> Tensor: ...

    def finish(self) -> Tensor: ...

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state: dict[str, Any]) -> None: ...


class DepthWriter:
    """Writes maps of one video into a folder; continues in the folder of a killed job.

    Args:
        folder: is created; a folder of a different job, or with other content, raises.
        formats: at least one of ``npz``, ``png``, ``exr``, ``mp4``.
        settings: everything that the maps depend on, JSON values; stored in ``depth.json`` and compared.
        kind: ``depth`` in meters or ``disparity`` without a unit, larger for nearer pixels.
        range: values of the darkest and the brightest level of PNG and mp4; ``None``: the extremes of the video.
        shard_size: frames per NPZ file.

    Attributes:
        done: whether the folder is complete: nothing is to be written.
        state: the state that was saved with the last complete shard; ``None`` at the start.
        num_frames: maps in complete shards.

    Raises:
        FileExistsError: for a folder with other content.
        ImportError: for ``exr`` without the package OpenEXR.
        ValueError: for an unknown format or an empty range.
    """

    def __init__(
        self,
        folder: str | Path,
        formats: Sequence[str],
        settings: dict[str, Any],
        kind: str,
        range: Sequence[float] | None = None,
        shard_size: int = 32,
    ):
        unknown = set(formats) - set(FORMATS)
        if unknown or not formats:
            raise ValueError(f"formats={list(formats)} must be one or several of {', '.join(FORMATS)}.")
        if range is not None and not range[0] < range[1]:
            raise ValueError(f"range={list(range)} must be two ascending numbers, such as 0 and 20.")
        if "exr" in formats:
            _open_exr()
        self.folder, self.formats, self.range, self.shard_size = Path(folder), tuple(formats), range, shard_size
        about = {"kind": kind, "unit": "m" if kind == "depth" else None}
        self.about = {**about, "formats": sorted(formats), "range": None if range is None else list(range), **settings}
        self._work, self._shards = self.folder / ".unfinished", self.folder / "npz"
        self.state: Any = None
        self.num_frames, self._parts, self._waiting = 0, 0, 0
        self._maps: list[Tensor] = []
        self._extremes = (np.inf, -np.inf)
        self.done = self._open()

    def _open(self) -> bool:
        """Prepares the folder; returns whether it is complete."""
        if (self.folder / SIDECAR).is_file() or (self._work / SIDECAR).is_file():
            finished = (self.folder / SIDECAR).is_file()
            found = json.loads(((self.folder if finished else self._work) / SIDECAR).read_text())
            changed = [
                f"{key} was {found.get(key)} and is {now}" for key, now in self.about.items() if found.get(key) != now
            ]
            if changed:
                raise FileExistsError(
                    f"out={self.folder} holds other maps: {'; '.join(changed)}. Choose another folder, or remove it."
                )
            if finished and not found.get("error"):
                shutil.rmtree(self._work, ignore_errors=True)
                return True
            if finished:  # the video was broken: it may have been replaced
                shutil.rmtree(self.folder)
        elif self.folder.exists() and any(self.folder.iterdir()):
            raise FileExistsError(
                f"out={self.folder} exists and has no {SIDECAR} of this command: choose another folder."
            )
        self._work.mkdir(parents=True, exist_ok=True)
        self._shards.mkdir(exist_ok=True)
        write_text(self._work / SIDECAR, json.dumps(self.about, indent=1) + "\n")
        if (self._work / "state.pt").is_file():
            saved = torch.load(self._work / "state.pt", map_location="cpu", weights_only=True)
            self.state, self.num_frames, self._parts = saved["state"], saved["num_frames"], saved["parts"]
            self._extremes, self._maps = tuple(saved["extremes"]), [saved["maps"]]
            self._waiting = len(saved["maps"])
        return False

    def add(self, maps: Tensor, state: Any = None) -> None:
        """Adds the next maps, float32 (n, H, W); ``state`` is that after them, saved with every complete shard."""
        if not len(maps):
            return
        self._extremes = (min(self._extremes[0], float(maps.min())), max(self._extremes[1], float(maps.max())))
        self._maps.append(maps)
        self._waiting += len(maps)
        if self._waiting < self.shard_size:
            return
        while self._waiting >= self.shard_size:
            self._write_shard(self.shard_size)
        saved = {
            "state": state,
            "num_frames": self.num_frames,
            "parts": self._parts,
            "extremes": list(self._extremes),
            "maps": torch.cat(self._maps).clone(),
        }
        with atomic_file(self._work / "state.pt") as file:
            torch.save(saved, file)

    def finish(self, fps: float, error: str | None = None) -> dict[str, Any]:
        """Writes the remaining maps and all formats; returns the content of ``depth.json``.

        Args:
            fps: frames per second of the video.
            error: reason why the video ended early; stored.

        Raises:
            ValueError: if there are no maps.
        """
        if self._waiting:
            self._write_shard(self._waiting)
        if not self.num_frames:
            shutil.rmtree(self.folder)
            raise ValueError(f"out={self.folder}: the video has no frame that decodes. {error or ''}".rstrip())
        low, high = self.range or self._extremes
        high = high if high > low else low + 1.0  # constant maps
        about = {**self.about, "frames": self.num_frames, "fps": fps, "extremes": list(self._extremes)}
        if error is not None:
            about["error"] = error
        plain = {**about, "scale": 1.0, "offset": 0.0, "invalid": None}
        if "png" in self.formats:
            step = (high - low) / LEVELS
            about_png = {**plain, "scale": step, "offset": low}
            self._write_images("png", about_png, lambda file, each: _write_png(file, (each - low) / step))
        if "exr" in self.formats:
            self._write_images("exr", plain, _write_exr)
        if "mp4" in self.formats:
            self._write_mp4(fps, low, high)
        if "npz" in self.formats:
            write_text(self._shards / SIDECAR, json.dumps(plain, indent=1) + "\n")
        write_text(self.folder / SIDECAR, json.dumps({**about, "colors": [low, high]}, indent=1) + "\n")
        if "npz" not in self.formats:
            shutil.rmtree(self._shards)
        shutil.rmtree(self._work)
        self.done = True
        return about

    def _write_shard(self, count: int) -> None:
        maps = torch.cat(self._maps)
        buffer = io.BytesIO()
        named: dict[str, Any] = {self.about["kind"]: maps[:count].numpy()}
        np.savez(buffer, **named)
        write_bytes(self._shards / f"depth_{self._parts:05d}.npz", buffer.getvalue())
        self._maps = [maps[count:]]
        self._waiting -= count
        self._parts += 1
        self.num_frames += count

    def _written(self) -> Iterator[np.ndarray]:
        """Yields the maps (H, W) of the shards."""
        for part in range(self._parts):
            with np.load(self._shards / f"depth_{part:05d}.npz") as shard:
                yield from shard[self.about["kind"]]

    def _write_images(self, name: str, about: dict[str, Any], write: Callable[[Path, np.ndarray], None]) -> None:
        folder = self.folder / name
        folder.mkdir(exist_ok=True)
        for index, each in enumerate(self._written()):
            write(folder / f"{index:08d}.{name}", each)
        write_text(folder / SIDECAR, json.dumps(about, indent=1) + "\n")

    def _write_mp4(self, fps: float, low: float, high: float) -> None:
        palette = colors()
        with atomic_file(self.folder / "depth.mp4") as file:
            writer: VideoWriter | None = None
            for each in self._written():
                pixels = palette[np.clip((each - low) / (high - low) * 255, 0, 255).round().astype(np.uint8)]
                pixels = pixels[: pixels.shape[0] // 2 * 2, : pixels.shape[1] // 2 * 2]  # yuv420p: even sizes
                if writer is None:
                    writer = VideoWriter(file, pixels.shape[:2], fps).__enter__()
                writer.write(np.ascontiguousarray(pixels))
            assert writer is not None
            writer.__exit__(None)


def write_maps(opened: OpenVideo, decoding: DecodeOptions, stream: Maps, writer: DepthWriter) -> dict[str, Any]:
    """Decodes the frames of a video, evaluates and writes their maps, from the position of the writer.

    Args:
        opened: video.
        decoding: one frame at a time, without salvage.
        stream: computes maps; at its start.
        writer: unfinished.

    Returns:
        Content of ``depth.json``, with the key ``error`` if the video breaks after at least one frame.

    Raises:
        BrokenVideoError: if no frame decodes.
    """
    info, pushed, error = opened.info, 0, None
    waiting: list[Tensor] = []
    if writer.state is not None:
        pushed = writer.state["pushed"]
        stream.load_state_dict(writer.state["stream"])
    progress = Progress(str(writer.folder), info.num_frames, "frames")
    progress.add(pushed)
    frames = decode_in_chunks(opened, range(pushed, info.num_frames), decoding)
    while error is None and pushed + len(waiting) < info.num_frames:
        try:
            waiting.append(next(frames).pixels)
        except BrokenVideoError as broken:
            if not pushed + len(waiting):
                raise  # the next attempt may read it
            error = one_line(broken)
        complete = error is not None or pushed + len(waiting) == info.num_frames
        if waiting and (complete or len(waiting) == BATCH):
            maps = stream.push(torch.cat(waiting).contiguous())
            pushed += len(waiting)
            progress.add(len(waiting))
            waiting = []
            writer.add(maps, {"pushed": pushed, "stream": stream.state_dict()})
    writer.add(stream.finish())
    return writer.finish(info.fps, error)


def colors() -> np.ndarray:
    """Palette uint8 (256, 3) of maps: from blue (0) over green and yellow to red (255)."""
    from matplotlib import colormaps

    return (colormaps["Spectral_r"](np.arange(256))[:, :3] * 255).round().astype(np.uint8)


def _write_png(file: Path, levels: np.ndarray) -> None:
    """Writes (H, W) levels of 0 to 65,535 as 16-bit PNG; values outside are clipped."""
    buffer = io.BytesIO()
    Image.fromarray(np.clip(levels.round(), 0, LEVELS).astype(np.uint16)).save(buffer, "PNG")
    write_bytes(file, buffer.getvalue())


def _write_exr(file: Path, values: np.ndarray) -> None:
    """Writes (H, W) values as float32 channel Z."""
    package = _open_exr()
    header = {"compression": package.ZIP_COMPRESSION, "type": package.scanlineimage}
    temporary = file.with_name(f".{file.name}.tmp.exr")
    with package.File(header, {"Z": np.ascontiguousarray(values)}) as image:
        image.write(str(temporary))
    temporary.replace(file)


def _open_exr() -> Any:
    try:
        import OpenEXR
    except ImportError as error:
        raise ImportError(f"formats=exr requires the package OpenEXR: run `{install_command('exr')}`.") from error
    return OpenEXR
