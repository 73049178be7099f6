"""What folders of videos and folders of images share: sizes, labels, and files that turn out to be broken."""

import csv
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


class MediaFolder(Dataset):
    """Base of a map-style dataset of files; a subclass sets ``media``, ``rows`` and ``classes``, and reads a row.

    Args:
        root: the folder.
        image_size: pixels, one number for a square or (height, width); None keeps each file's size.
        resize: ``crop`` scales until the picture covers ``image_size`` and cuts out the centre; ``stretch`` changes
            the aspect.
        max_broken_share: a file that cannot be read is replaced by the next good one and listed; above this share of
            broken files the run stops.
        skipped_file: csv in which skipped files are listed, shared by all processes of a run; may also be set later.

    Attributes:
        skipped: file name -> reason, of those that this process met or read from ``skipped_file``.

    Raises:
        ValueError: an argument out of range.
    """

    media: Media
    rows: list[Row]
    classes: dict[str, tuple[str, ...]]

    def __init__(
        self,
        root: str | Path,
        image_size: int | Sequence[int] | None,
        resize: str,
        max_broken_share: float,
        skipped_file: str | None,
    ):
        if resize not in ("crop", "stretch"):
            raise ValueError(f"resize={resize!r} is neither 'crop' nor 'stretch': choose one of these.")
        size = (image_size, image_size) if isinstance(image_size, int) else image_size
        if size is not None and (len(size) != 2 or min(size) < 1):
            raise ValueError(
                f"image_size={image_size} is no size in pixels: write one number of at least 1, [height, width], or "
                "null for the size of the files."
            )
        if not 0 <= max_broken_share <= 1:
            raise ValueError(
                f"max_broken_share={max_broken_share} is outside 0 to 1: it is a share of the files, such as 0.05."
            )
        self.root = Path(root)
        self.image_size = (int(size[0]), int(size[1])) if size is not None else None
        self.resize, self.max_broken_share, self.skipped_file = resize, max_broken_share, skipped_file
        self.skipped: dict[str, str] = {}

    def skip(self, name: str, reason: str) -> None:
        """Lists a broken file.

        Raises:
            RuntimeError: more than ``max_broken_share`` of the files are broken.
        """
        self.skipped[name] = reason
        if self.skipped_file is not None:
            self.skipped.update(_append_skipped(Path(self.skipped_file), self.root, name, reason))
        broken = sum(row.name in self.skipped for row in self.rows)
        if broken > self.max_broken_share * len(self.rows):
            raise RuntimeError(
                f"{broken} of {len(self.rows)} {self.media.noun} files in {self.root} are broken, more than "
                f"max_broken_share={self.max_broken_share}: "
                f"{self._examples()}. Replace or remove them (with their metadata rows), or raise max_broken_share."
            )

    def _first_good(self, start: int, read: Callable[[Row], dict]) -> dict:
        """What ``read`` makes of row ``start``, or of the first row after it that is not broken."""
        for step in range(len(self.rows)):
            row = self.rows[(start + step) % len(self.rows)]
            if row.name in self.skipped:
                continue
            try:
                return read(row)
            except VideoError as error:
                self.skip(row.name, str(error))
        raise RuntimeError(
            f"All {len(self.rows)} {self.media.noun} files in {self.root} are broken: {self._examples()}. Replace them."
        )

    def _resized(self, pixels: Tensor) -> Tensor:
        """uint8 (T, 3, H, W) to (T, 3, *image_size)."""
        if self.image_size is not None:
            how = resizing.crop if self.resize == "crop" else resizing.resize
            pixels = how(pixels, self.image_size, resample="fast", interpolation="bilinear")
        return pixels.contiguous()  # decoders give channels last

    def _said(self, row: Row) -> dict:
        """Caption and labels, where the row has them."""
        caption = {} if row.caption is None else {"caption": row.caption}
        return {**caption, "labels": dict(row.labels)} if row.labels else caption

    def _digest(self) -> str:
        """Of all rows, and of the size and modification time of their files."""
        digest = hashlib.sha256()
        for row in self.rows:
            stat = row.path.stat()
            digest.update(json.dumps([row.name, stat.st_size, stat.st_mtime_ns, row.caption, row.labels]).encode())
        return digest.hexdigest()

    def _examples(self) -> str:
        return "; ".join(f"{name}: {reason}" for name, reason in list(self.skipped.items())[:3])


def _append_skipped(path: Path, root: Path, name: str, reason: str) -> dict[str, str]:
    """Adds a row unless the file is listed already; returns what is listed of this root. Safe when several workers do
    it at once."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a+", newline="") as file:
        fcntl.flock(file, fcntl.LOCK_EX)  # released when the file is closed
        file.seek(0)
        text = file.read()
        listed = {row["file"]: row["reason"] for row in csv.DictReader(io.StringIO(text)) if row["root"] == str(root)}
        if name not in listed:
            writer = csv.writer(file)
            if not text:
                writer.writerow(["root", "file", "reason"])
            writer.writerow([str(root), name, reason])
    return {**listed, name: reason}
