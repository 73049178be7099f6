"""Images from a folder of pictures, in one of two layouts:

    <root>/images/**.jpg                     any of JPEG, PNG, WebP, BMP and TIFF; sub-folders allowed
    <root>/metadata.{jsonl,json,csv}         one row a file, see ``read_metadata``

    <root>/<split>/<class>/*.jpg             ImageNet's, or without split; gives the label ``class``

and optionally <root>/classes.json: {"classes": {label: [names]}}.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from blueberry_video.data.media_folder import MediaFolder
from blueberry_video.data.metadata import IMAGES, Row, read_class_folders, read_classes, read_metadata
from blueberry_video.video.frame_list import Pictures
from blueberry_video.video.source_options import SourceOptions


class ImageFolder(MediaFolder):
    """Map-style dataset of images as clips of one frame: ``video`` uint8 (1, 3, H, W) RGB, upright as EXIF says,
    ``id`` and, where they are known, ``caption`` and ``labels``.

    Args:
        root: the folder laid out as above.
        image_size: pixels, one number for a square or (height, width); None keeps each file's size, which must then be
            the same within a batch.
        split: only rows whose ``split`` says so, None serves all; or the folder between root and the classes.
        metadata: file name below root; None finds the one there is; ``"none"`` serves ``images/`` without caption and
            labels.
        classes: class names of each label; else those of ``classes.json``; else the sorted values found (over all
            splits).
        resize: ``crop`` scales until the picture covers ``image_size`` and cuts out the centre; ``stretch`` changes
            the aspect.
        max_broken_share: a file that is no readable image is replaced by the next good one and listed; above this
            share of broken files the run stops.
        skipped_file: csv in which skipped files are listed, shared by all processes of a run; may also be set later.

    Raises:
        FileNotFoundError: no folder, no images in it, no metadata, or a row without its file.
        ValueError: a file without row, a faulty row, or an argument out of range.
        RuntimeError: (when reading an image) more than ``max_broken_share`` of the files are broken.
    """

    media = IMAGES

    def __init__(
        self,
        root: str | Path,
        image_size: int | Sequence[int] | None,
        split: str | None = None,
        metadata: str | None = None,
        classes: dict[str, Sequence[str]] | None = None,
        resize: Literal["crop", "stretch"] = "crop",
        max_broken_share: float = 0.05,
        skipped_file: str | None = None,
    ):
        super().__init__(root, image_size, resize, max_broken_share, skipped_file)
        self.reversal_pairs: dict[str, tuple[tuple[int, int], ...]] = {}
        named = {name: tuple(values) for name, values in (classes or read_classes(self.root)[0]).items()}
        if metadata is not None or (self.root / self.media.folder).is_dir():
            self.rows, self.classes = read_metadata(self.root, metadata, split, named, self.media)
        else:
            self.rows, self.classes = read_class_folders(self.root, split, named, self.media)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict:
        if not 0 <= index < len(self):
            raise IndexError(f"index {index} is outside this dataset of {len(self)} images.")
        return self._first_good(index, self._read)

    @property
    def cache_key(self) -> str:
        """Everything an image depends on but its index: settings, files with size and modification time, labels and
        captions."""
        return f"image-folder-1/{json.dumps([self.image_size, self.resize])}/{self._digest()}"

    def _read(self, row: Row) -> dict:
        pixels = Pictures([row.path], str(row.path), SourceOptions()).read([0])
        return {"video": self._resized(pixels), "id": row.name, **self._said(row)}
