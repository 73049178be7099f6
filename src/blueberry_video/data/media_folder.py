"""Base of the datasets of video and image files: resizing, labels and broken files."""

import csv
import errno
import fcntl
import hashlib
import io
import json
from collections.abc import Callable, Sequence
from pathlib import Path

from torch import Tensor
from torch.utils.data import Dataset

from blueberry_video.data.metadata import Media, Row
from blueberry_video.video import resize as resizing
from blueberry_video.video.errors import VideoError

LOST = {  # errors of a file that vanished or became unreadable; others, such as EMFILE and ENOMEM, are of the process
    getattr(errno, name)
    for name in ("ENOENT", "ENOTDIR", "EISDIR", "ELOOP", "EACCES", "EPERM", "EIO", "ESTALE", "ENXIO", "EREMOTEIO")
    if hasattr(errno, name)
}


class MediaFolder(Dataset):
    """Base of a map-style dataset of files; a subclass sets ``media``, ``rows`` and ``classes``, and reads a row.

    Args:
        root: the folder.
        image_size: pixels, one number for a square or (height, width); None keeps the size of each file.
        resize: ``crop`` scales the picture to cover ``image_size`` and crops the center; ``stretch`` changes the
            aspect ratio.
        max_broken_share: a file that cannot be read or has vanished is replaced by the next readable one and listed;
            above this share of such files an error is raised.
        skipped_file: CSV file in which skipped files are listed, shared by all processes of a run. If it is assigned
            later, it also receives the files that were skipped before.
        antialias: widen the bilinear kernel when downscaling. False: each pixel mixes its nearest 2 x 2, as in the
            published recipes of VideoMAE's fine-tuning and of V-JEPA.

    Attributes:
        skipped: file name -> reason, for files found by this process or read from ``skipped_file``.

    Raises:
        ValueError: an argument out of range.
    """

    media: Media
    rows: Sequence[Row]
    classes: dict[str, tuple[str, ...]]
    counted: Sequence[Row] | None = None  # rows that max_broken_share is a share of, if they are more than ``rows``
    repair = "Replace or remove them (with their metadata rows)"  # the fix for broken files

    def __init__(
        self,
        root: str | Path,
        image_size: int | Sequence[int] | None,
        resize: str,
        max_broken_share: float,
        skipped_file: str | None,
        antialias: bool = True,
    ):
        if resize not in ("crop", "stretch"):
            raise ValueError(f"resize={resize!r} is neither 'crop' nor 'stretch': use one of these.")
        size = (image_size, image_size) if isinstance(image_size, int) else image_size
        if size is not None and (len(size) != 2 or min(size) < 1):
            raise ValueError(
                f"image_size={image_size} must be a number of pixels of at least 1, [height, width], or null for the "
                "size of the files."
            )
        if not 0 <= max_broken_share <= 1:
            raise ValueError(
                f"max_broken_share={max_broken_share} is outside 0 to 1: use a share of the files, such as 0.05."
            )
        self.root = Path(root)
        self.location = str(root) if "://" in str(root) else str(self.root)  # in messages and in skipped_file
        self.image_size = (int(size[0]), int(size[1])) if size is not None else None
        self.resize, self.max_broken_share, self.antialias = resize, max_broken_share, antialias
        self.skipped: dict[str, str] = {}
        self.skipped_file = skipped_file

    @property
    def skipped_file(self) -> str | None:
        """CSV file in which skipped files are listed."""
        return self._skipped_file

    @skipped_file.setter
    def skipped_file(self, path: str | None) -> None:
        self._skipped_file = path
        for name, reason in dict(self.skipped).items():
            self._list(name, reason)

    def skip(self, name: str, reason: str) -> None:
        """Lists a broken file.

        Raises:
            RuntimeError: more than ``max_broken_share`` of the files are broken.
        """
        self.skipped[name] = reason
        self._list(name, reason)
        rows = self.counted or self.rows
        broken = self._num_skipped(rows)
        if broken > self.max_broken_share * len(rows):
            raise RuntimeError(
                f"{broken} of {len(rows)} {self.media.noun} files in {self.location} are broken, more than "
                f"max_broken_share={self.max_broken_share}: {self._examples()}. {self.repair}, or raise "
                "max_broken_share."
            )

    def _list(self, name: str, reason: str) -> None:
        if self._skipped_file is not None:
            self.skipped.update(_append_skipped(Path(self._skipped_file), self.location, name, reason))

    def _num_skipped(self, rows: Sequence[Row]) -> int:
        return sum(row.name in self.skipped for row in rows)

    def _first_good(self, start: int, read: Callable[[Row], dict]) -> dict:
        """Returns ``read`` of row ``start``, or of the first row after it that is not broken."""
        for step in range(len(self.rows)):
            row = self.rows[(start + step) % len(self.rows)]
            if row.name in self.skipped:
                continue
            try:
                return read(row)
            except (VideoError, OSError) as error:
                self.skip(row.name, broken_reason(error))
        raise RuntimeError(
            f"All {len(self.rows)} {self.media.noun} files in {self.location} are broken: {self._examples()}. Replace "
            "them."
        )

    def _resized(self, pixels: Tensor) -> Tensor:
        """Resizes uint8 (T, 3, H, W) to (T, 3, *image_size)."""
        if self.image_size is not None:
            how = resizing.crop if self.resize == "crop" else resizing.resize
            pixels = how(pixels, self.image_size, "fast", "bilinear", self.antialias)
        return pixels.contiguous()  # decoders return channels-last tensors

    @property
    def _resampling(self) -> list[str]:
        """Part of cache keys, which is empty for the default, so that earlier caches are found."""
        return [] if self.antialias else ["no antialias"]

    def _said(self, row: Row) -> dict:
        return row.annotations

    def _digest(self) -> str:
        """SHA-256 of all rows and of the sizes and modification times of their files."""
        digest = hashlib.sha256()
        for row in self.rows:
            digest.update(json.dumps([row.name, *self._version(row), row.caption, row.labels]).encode())
        return digest.hexdigest()

    def _version(self, row: Row) -> list[int]:
        """Size and modification time of the file of a row."""
        try:
            stat = row.path.stat()
        except OSError:  # vanished since it was listed: reading it skips it
            return [-1, -1]
        return [stat.st_size, stat.st_mtime_ns]

    def _examples(self) -> str:
        return "; ".join(f"{name}: {reason}" for name, reason in list(self.skipped.items())[:3])


def broken_reason(error: VideoError | OSError) -> str:
    """Returns why a file is broken; raises an error that is not about the file, such as too many open files."""
    if isinstance(error, OSError) and error.errno not in LOST and not isinstance(error, FileNotFoundError):
        raise error
    return str(error) if isinstance(error, VideoError) else f"the file has vanished or cannot be read ({error})"


def _append_skipped(path: Path, root: str | Path, name: str, reason: str) -> dict[str, str]:
    """Appends a row unless the file is already listed, under a lock. Returns file -> reason for this root."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a+", newline="") as file:
        fcntl.flock(file, fcntl.LOCK_EX)  # released when the file is closed
        file.seek(0)
        text = file.read()
        rows = [row for row in csv.reader(io.StringIO(text, newline="")) if len(row) == 3]  # others: cut off by a kill
        listed = {found: reason for of_root, found, reason in rows if of_root == str(root)}
        if name not in listed:
            writer = csv.writer(file)
            if text and not text.endswith("\n"):
                file.write("\n")
            if not text:
                writer.writerow(["root", "file", "reason"])
            writer.writerow([str(root), name, reason])
    return {**listed, name: reason}
