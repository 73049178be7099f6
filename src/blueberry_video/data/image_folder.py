"""Dataset of image files, in one of two layouts:

    <root>/images/**.jpg                     JPEG, PNG, WebP, BMP or TIFF; sub-folders allowed
    <root>/metadata.{jsonl,json,csv}         one row per file, see ``read_metadata``

    <root>/<split>/<class>/*.jpg             layout of ImageNet, also without split; sets the label ``class``

and optionally <root>/classes.json: {"classes": {label: [names]}}.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from blueberry_video.data.clips import check_index
from blueberry_video.data.media_folder import MediaFolder
from blueberry_video.data.metadata import IMAGES, Row, read_class_folders, read_classes, read_metadata
from blueberry_video.video.frame_list import Pictures
from blueberry_video.video.source_options import SourceOptions


class ImageFolder(MediaFolder):
    """Map-style dataset of images as clips of one frame: ``video`` uint8 (1, 3, H, W) RGB, rotated according to EXIF
    and blended over white where transparent, ``id`` and, if known, ``caption`` and ``labels``.

    Args:
        root: folder with one of the layouts above.
        image_size: pixels, one number for a square or (height, width); None keeps the size of each file, which must
            then be the same within a batch.
        split: keeps only rows with this ``split``, None keeps all; or the folder between root and the class folders.
        metadata: file name below root; None finds it; ``"none"`` reads ``images/`` without captions and labels.
        classes: class names of each label; defaults to ``classes.json``, then to the sorted values found (over all
            splits).
        resize: ``crop`` scales the picture to cover ``image_size`` and crops the center; ``stretch`` changes the
            aspect ratio.
        max_broken_share: a file that is not a readable image is replaced by the next readable one and listed; above
            this share of broken files an error is raised.
        skipped_file: CSV file in which skipped files are listed, shared by all processes of a run; may be assigned
            later.
        antialias: widen the bilinear kernel when downscaling. False: each pixel mixes its nearest 2 x 2, as in the
            published recipes of VideoMAE's fine-tuning and of V-JEPA.

    Raises:
        FileNotFoundError: no folder, no images in it, no metadata, or a row without its file.
        ValueError: a file without a row, an invalid row, or an argument out of range.
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
        antialias: bool = True,
    ):
        super().__init__(root, image_size, resize, max_broken_share, skipped_file, antialias)
        self.reversal_pairs: dict[str, tuple[tuple[int, int], ...]] = {}
        named, _ = read_classes(self.root, classes)
        if metadata is not None or (self.root / self.media.folder).is_dir():
            self.rows, self.classes = read_metadata(self.root, metadata, split, named, self.media)
        else:
            self.rows, self.classes = read_class_folders(self.root, split, named, self.media)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict:
        check_index(index, len(self))
        return self._first_good(index, self._read)

    @property
    def cache_key(self) -> str:
        """Everything that an image depends on except its index: settings, files with sizes and modification times,
        labels and captions."""
        return f"image-folder-2/{json.dumps([self.image_size, self.resize, *self._resampling])}/{self._digest()}"

    def _read(self, row: Row) -> dict:
        pixels = Pictures([row.path], str(row.path), SourceOptions()).read([0])
        return {"video": self._resized(pixels), "id": row.name, **row.annotations}
