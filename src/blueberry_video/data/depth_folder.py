"""Images or videos with depth or disparity maps in files.

The folder ``<root>`` or ``<root>/<split>`` contains

    images/**.jpg       one map per image: depth/<same name>.png, .exr or .npz
    videos/<name>       video files or folders of frames; one map per frame: depth/<name>.npz, or a folder depth/<name>/
                        of maps in natural order
    depth/depth.json    kind, unit and invalid value of the maps, see ``depth_maps``
"""

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import numpy as np
import torch.nn.functional as F
from torch import Tensor

from blueberry_video.data.clips import check_index
from blueberry_video.data.depth_maps import EXTENSIONS, DepthSequence, is_map, natural, read_format
from blueberry_video.data.media_folder import MediaFolder
from blueberry_video.data.metadata import IMAGES, VIDEOS, Row, read_metadata
from blueberry_video.video.clip import FrameReader, with_reader
from blueberry_video.video.decode import DecodeOptions, Frames
from blueberry_video.video.errors import BrokenVideoError, VideoError
from blueberry_video.video.resize import covering_size, window
from blueberry_video.video.sampling import ClipSampling
from blueberry_video.video.source import open_source

MAPS = "depth"  # folder of the maps


class DepthFolder(MediaFolder):
    """Map-style dataset of clips with maps: ``video`` uint8 (T, 3, H, W), ``id``, and either ``depth`` float32
    (T, H, W) in meters, 0 where it is invalid, or ``disparity`` float32 (T, H, W), NaN where it is invalid.

    Maps take the nearest pixel of the same crop, so that no value is a mixture of
    valid and invalid pixels, or of two surfaces. A file that cannot be read, or a clip without a valid pixel, is
    replaced by the next good one and listed.

    Args:
        root: the folder, with the layout above.
        image_size: pixels, one number for a square or (height, width); None keeps the size of each file, which must
            then be the same within a batch.
        num_frames: T; 1 for images.
        split: sub-folder of root; None if root contains the files.
        sampler: frames of a video: ``uniform``: spread over the whole video; ``random``: a window of every
            ``stride``-th frame at a random start, a pure function of (seed, epoch, name).
        stride: frame step of ``random``.
        pad: repeat the last frame of shorter videos, instead of raising.
        resize: ``crop`` scales the picture to cover ``image_size`` and crops the center; ``stretch`` changes the
            aspect ratio.
        max_broken_share: above this share of files without a usable clip, an error is raised.
        skipped_file: CSV file in which skipped files are listed, shared by all processes of a run; may be assigned
            later.
        seed: seed of the ``random`` windows.
        antialias: widen the bilinear kernel of colors when downscaling.

    Attributes:
        format: meaning of the stored values, from ``depth.json``.

    Raises:
        FileNotFoundError: no folder, no files in it, a file without its maps, maps without their file, or no
            ``depth.json``.
        ValueError: an invalid ``depth.json``, both images and videos, two files for one map, or an argument out of
            range; when reading: maps of a different size or number than the frames, or an 8-bit PNG.
        RuntimeError: (when reading) more than ``max_broken_share`` of the files are broken.
    """

    def __init__(
        self,
        root: str | Path,
        image_size: int | Sequence[int] | None,
        num_frames: int = 1,
        split: str | None = None,
        sampler: Literal["uniform", "random"] = "uniform",
        stride: int = 1,
        pad: bool = False,
        resize: Literal["crop", "stretch"] = "crop",
        max_broken_share: float = 0.05,
        skipped_file: str | None = None,
        seed: int = 0,
        antialias: bool = True,
    ):
        top = Path(root) if split is None else Path(root) / split
        super().__init__(top, image_size, resize, max_broken_share, skipped_file, antialias)
        if num_frames < 1:
            raise ValueError(f"num_frames={num_frames} must be at least 1.")
        self.sampling = ClipSampling(sampler, num_frames, stride, pad=pad)
        self.num_frames, self.seed = num_frames, seed
        self.varies_by_epoch = sampler == "random"
        self.classes: dict[str, tuple[str, ...]] = {}
        self.reversal_pairs: dict[str, tuple[tuple[int, int], ...]] = {}
        found = [media for media in (IMAGES, VIDEOS) if (top / media.folder).is_dir()]
        if not found:
            raise FileNotFoundError(
                f"{top} has neither images/ nor videos/: set root (and split={split!r}, its sub-folder or null) to a "
                f"folder with one of them and {MAPS}/."
            )
        if len(found) > 1:
            raise ValueError(
                f"{top} has images/ and videos/: keep them in two folders, and make both parts of a Mixture."
            )
        self.media = found[0]
        if self.media is IMAGES and num_frames != 1:
            raise ValueError(f"num_frames={num_frames} of the images in {top}/images must be 1.")
        self.format = read_format(self._maps)
        self.rows = self._rows()
        self._files = _matched(self.rows, self.root / self.media.folder, self._maps, self.media is VIDEOS)

    @property
    def _maps(self) -> Path:
        return self.root / MAPS

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict:
        return self.sample(index, epoch=0)

    def sample(self, index: int, epoch: int) -> dict:
        """Returns clip ``index`` of epoch ``epoch``."""
        check_index(index, len(self))
        return self._first_good(index, lambda row: self._read(row, epoch))

    @property
    def cache_key(self) -> str:
        """Everything that a clip depends on except its index: settings, and files with sizes and modification times."""
        digest = hashlib.sha256()
        for row in self.rows:
            for path in [*_files_in(row.path), *_files_in(self._files[row.name])]:
                stat = path.stat()
                digest.update(json.dumps([str(path), stat.st_size, stat.st_mtime_ns]).encode())
        settings = [self.image_size, self.resize, *vars(self.sampling).values(), self.seed, *vars(self.format).values()]
        settings += self._resampling
        return f"depth-folder-1/{json.dumps(settings)}/{digest.hexdigest()}"

    def _rows(self) -> list[Row]:
        """Rows of the files and, for videos, of the folders of frames."""
        folder = self.root / self.media.folder
        nested = [path for path in folder.iterdir() if path.is_dir() and _has_pictures(path)]
        if self.media is VIDEOS and nested:
            names = {path.name: path for path in nested}
            names |= {path.name: path for path in folder.iterdir() if path.suffix.lower() in VIDEOS.extensions}
            return [Row(name, names[name], None, {}) for name in sorted(names)]
        return read_metadata(self.root, "none", None, {}, self.media)[0]

    def _read(self, row: Row, epoch: int) -> dict:
        maps = DepthSequence(self._files[row.name], self.format)
        name = int(hashlib.sha256(row.name.encode()).hexdigest()[:16], 16)
        rng = np.random.default_rng([self.seed, epoch, name])

        def work(reader: FrameReader) -> Frames:
            if reader.info.num_frames != len(maps):
                raise ValueError(
                    f"{row.path} has {reader.info.num_frames} frames, but {maps.path} has {len(maps)} maps: keep one "
                    "map per frame."
                )
            return reader.load(reader.sample(self.sampling, rng))

        try:
            with open_source(row.path) as source:
                frames = with_reader(source, DecodeOptions(num_threads=1, salvage=False), work)
        except VideoError:
            raise
        except ValueError as error:  # too few frames
            raise ValueError(
                f"{row.path}: {error} In a config these are model.encoder.num_frames, data.train.stride and "
                "data.train.pad=true (or data.val.…)."
            ) from error
        values = maps.read(frames.indices)
        sizes = [tuple(each.shape[-2:]) for each in (frames.pixels, values)]
        if sizes[0] != sizes[1]:
            raise ValueError(
                f"{row.path} has {sizes[0]} pixels (height, width), but its maps in {maps.path} have {sizes[1]}: "
                "resize one to the other, maps with nearest-neighbor interpolation."
            )
        values = self._resized_maps(values)
        if not self.format.is_valid(values).any():
            raise BrokenVideoError(
                f"{maps.path} has no valid pixel: correct it, or invalid={self.format.invalid!r} in depth.json."
            )
        return {"video": self._resized(frames.pixels), self.format.kind: values, "id": row.name}

    def _resized_maps(self, maps: Tensor) -> Tensor:
        """Resizes (T, H, W) to the size and the crop of the frames, by the nearest pixel."""
        if self.image_size is None:
            return maps
        size = (
            covering_size(maps.shape[1], maps.shape[2], self.image_size) if self.resize == "crop" else self.image_size
        )
        resized = F.interpolate(maps[:, None], size, mode="nearest-exact")
        return window(resized, self.image_size)[:, 0].contiguous()


def _matched(rows: Sequence[Row], files: Path, maps: Path, folders: bool) -> dict[str, Path]:
    """Returns name -> file of its maps or, with ``folders``, also folder, by the name without extension."""
    found: dict[str, list[Path]] = {}
    for path in maps.rglob("*"):
        if folders and path.is_dir() and any(is_map(each) for each in path.iterdir()):
            found.setdefault(path.relative_to(maps).as_posix(), []).append(path)
        elif path.is_file() and is_map(path):
            found.setdefault(path.relative_to(maps).with_suffix("").as_posix(), []).append(path)
    matched: dict[str, Path] = {}
    owners: dict[str, str] = {}
    for row in rows:
        stem = row.name if row.path.is_dir() else str(Path(row.name).with_suffix("").as_posix())
        if stem in owners:
            raise ValueError(
                f"{owners[stem]!r} and {row.name!r} in {files} have the same maps, {maps / stem}: rename one."
            )
        owners[stem] = row.name
        if stem not in found:
            raise FileNotFoundError(
                f"{row.name!r} in {files} has no maps: add {maps / stem}.png (or {', '.join(EXTENSIONS[1:])}; for "
                "videos also a folder), or remove the file."
            )
        if len(found[stem]) > 1:
            raise ValueError(f"{row.name!r} has several maps, {' and '.join(map(str, sorted(found[stem])))}: keep one.")
        matched[row.name] = found[stem][0]
    inside = {file for path in matched.values() if path.is_dir() for file in path.iterdir()}
    rest = [paths[0] for stem, paths in sorted(found.items()) if stem not in owners and paths[0] not in inside]
    if rest:
        raise FileNotFoundError(f"{rest[0]} belongs to no file in {files}: add the file, or remove the map.")
    return matched


def _has_pictures(folder: Path) -> bool:
    return any(each.suffix.lower() in IMAGES.extensions for each in folder.iterdir())


def _files_in(path: Path) -> list[Path]:
    return sorted((each for each in path.iterdir() if each.is_file()), key=natural) if path.is_dir() else [path]
