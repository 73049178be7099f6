"""Clips of the videos in a list, in the formats of :mod:`~blueberry_video.data.list_formats`: UCF101, Kinetics,
Something-Something, ``path label`` as of VideoMAE and MMAction2, and CSV with a header.

    <root>/…/video.mp4      any container, in any sub-folder
    list_file               text, CSV or JSON; one row per video

Videos without a row are not read.
"""

import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Literal

from blueberry_video.data.list_formats import LABEL, Entry, read_list
from blueberry_video.data.metadata import VIDEOS, Row, in_order, read_classes, some
from blueberry_video.data.video_folder import VideoClips
from blueberry_video.video.decode import BACKENDS


class VideoList(VideoClips):
    """Map-style dataset of the videos of a list, with the label ``class``, and clips as of
    :class:`~blueberry_video.data.video_folder.VideoFolder`.

    Args:
        root: folder of the videos.
        list_file: one file, or several whose rows are joined; relative to root or absolute.
        num_frames, sampler, stride, fps, num_clips, num_crops, image_size, resize, pad: see ``VideoFolder``.
        list_format: ``ucf101``, ``kinetics``, ``indices``, ``ssv2`` or ``table``; None recognises it.
        split: use only the rows with this value in the column ``split`` of a table; None uses all.
        classes: class names; default to those of ``classes.json`` in root, then of ``classInd.txt`` or
            ``labels.json`` next to the list, then to the sorted names of the rows, or for ids to the numbers from 0.
        max_missing_share: share of the rows whose file may be absent, as videos that are no longer online: these rows
            are listed in ``skipped.csv``; above it, an error is raised.
        backends, max_broken_share, skipped_file, seed: see ``VideoFolder``.
        tone_map, square_pixels, deinterlace, antialias: see ``VideoFolder``.

    Attributes:
        missing: names of the rows without a file.

    Raises:
        FileNotFoundError: no list, or more rows without a file than ``max_missing_share``.
        ValueError: an invalid row, a class that is not among the classes, or an argument out of range.
        RuntimeError: (when reading a clip) more than ``max_broken_share`` of the files are broken.
    """

    repair = "Replace them, or remove their rows from the list"

    def __init__(
        self,
        root: str | Path,
        list_file: str | Sequence[str],
        num_frames: int,
        sampler: Literal["uniform", "random", "fixed_fps", "multi_clip", "segments"] = "uniform",
        stride: int = 1,
        fps: float | None = None,
        num_clips: int = 1,
        num_crops: Literal[1, 3] = 1,
        image_size: int | Sequence[int] | None = None,
        resize: Literal["crop", "stretch"] = "crop",
        pad: bool = False,
        list_format: Literal["ucf101", "kinetics", "indices", "ssv2", "table"] | None = None,
        split: str | None = None,
        classes: dict[str, Sequence[str]] | None = None,
        backends: Sequence[str] = BACKENDS,
        max_missing_share: float = 0.0,
        max_broken_share: float = 0.05,
        skipped_file: str | None = None,
        seed: int = 0,
        tone_map: Literal["none", "bt2390", "hable"] = "none",
        square_pixels: bool = False,
        deinterlace: Literal["none", "bwdif", "yadif"] = "none",
        antialias: bool = True,
    ):
        how = (sampler, stride, fps, num_clips, num_crops, image_size, resize, pad)
        rendering = (tone_map, square_pixels, deinterlace)
        super().__init__(root, num_frames, *how, backends, *rendering, max_broken_share, skipped_file, seed, antialias)
        if not 0 <= max_missing_share <= 1:
            raise ValueError(f"max_missing_share={max_missing_share} is outside 0 to 1: use a share, such as 0.05.")
        listed = [list_file] if isinstance(list_file, str | Path) else list(list_file)
        read = [read_list(self.root / name, list_format) for name in listed]
        if len({kind for kind, _, _ in read}) > 1:
            kinds = ", ".join(kind for kind, _, _ in read)
            raise ValueError(f"list_file={listed} are of the formats {kinds}: use files of one format.")
        entries = [entry for _, found, _ in read for entry in found]
        named, pairs = read_classes(self.root, classes)
        names = named.get(LABEL) or next((names for _, _, names in read if names), ())
        if unknown := sorted(set(named) - {LABEL}) if classes else []:
            raise ValueError(f"classes has the label {unknown[0]!r}, but a list has the label {LABEL!r}: rename it.")
        ids, self.classes = _numbered(entries, names, read[0][0])
        self.reversal_pairs = {label: found for label, found in pairs.items() if label in self.classes}
        kept = [number for number, entry in enumerate(entries) if split in (None, entry.split)]
        if not kept:
            splits = sorted({entry.split for entry in entries if entry.split})
            has = f"has only the splits {', '.join(splits)}" if splits else "has no column split"
            raise ValueError(f"split={split!r} selects no row of {listed}, which {has}: choose another, or null.")
        entries, ids = [entries[number] for number in kept], [ids[number] for number in kept]
        paths = _found(self.root, entries, by_stem=read[0][0] in ("kinetics", "ssv2"))
        self.missing = [entry.name for entry, path in zip(entries, paths) if path is None]
        self._check_missing(entries, paths, max_missing_share)
        rows: dict[str, tuple[Row, str]] = {}
        for entry, path, number in zip(entries, paths, ids):
            if path is None:
                self.skipped[entry.name] = f"{entry.where} names it, and there is no such file"
                continue
            name = path.relative_to(self.root).as_posix() if path.is_relative_to(self.root) else str(path)
            if name in rows:
                raise ValueError(f"{entry.where} names {name!r} a second time, after {rows[name][1]}: keep one row.")
            labels = {} if number is None else {LABEL: number}
            rows[name] = Row(name, path, entry.caption, labels), entry.where
        if not rows:
            raise FileNotFoundError(f"None of the {len(entries)} rows of {listed} has its file in {root}: correct it.")
        self.rows = [rows[name][0] for name in sorted(rows)]
        self.skipped_file = skipped_file  # lists the missing files

    def _check_missing(self, entries: Sequence[Entry], paths: Sequence[Path | None], share: float) -> None:
        if len(self.missing) <= share * len(entries):
            return
        first = next(entry for entry, path in zip(entries, paths) if path is None)
        label = "" if first.known is None else f" of the class {first.known!r}"
        raise FileNotFoundError(
            f"{first.where} names {first.name!r}{label}, but {self.root} has no such video, and so for "
            f"{len(self.missing)} of {len(entries)} rows: add the files, correct root, remove the rows, or set "
            f"max_missing_share={_up(len(self.missing) / len(entries))} to train without them."
        )


def _up(share: float) -> float:
    """Rounds up to two digits."""
    return min(1.0, -(-share * 100 // 1) / 100)


def _numbered(
    entries: Sequence[Entry], names: Sequence[str], kind: str
) -> tuple[list[int | None], dict[str, tuple[str, ...]]]:
    """Returns the class id of each row, and the classes of the label ``class``."""
    texts = [entry.known if entry.known is not None else entry.folder for entry in entries]
    if all(text is None for text in texts):
        return [None] * len(entries), {}
    for entry, text in zip(entries, texts):
        if text is None:
            raise ValueError(f"{entry.where} has no class, and other rows have one: write it, or remove the row.")
    indices = [entry.index for entry in entries]
    if not names:
        names = _derived(entries, kind)
    ids = {name: i for i, name in enumerate(names)}
    found = []
    for entry, text, is_index in zip(entries, texts, indices):
        assert text is not None
        number = int(text) if is_index and not (kind == "table" and text in ids) else ids.get(text)
        first = 1 if kind == "ucf101" else 0
        if number is None or not 0 <= number < len(names):
            what = f"the class index {number + first}" if number is not None else f"the class {text!r}"
            valid = f"the indices {first} to {len(names) - 1 + first}" if number is not None else "the classes"
            from_one = number == len(names) and not first
            off = " If the list counts from 1, subtract 1 from its indices." if from_one else ""
            raise ValueError(
                f"{entry.where} ({entry.name}) has {what}, which is not among {valid} ({some(names)}): correct the "
                f"row, or the list in classes.json or classes.{LABEL}.{off}"
            )
        if entry.folder is not None and entry.folder in ids and ids[entry.folder] != number:
            raise ValueError(
                f"{entry.where} has the class index {number + first}, which is {names[number]!r}, but the folder of "
                f"{entry.name} is {entry.folder!r}, class {ids[entry.folder] + first}: its indices and classInd.txt "
                f"(or classes.{LABEL}) count differently; correct one of them."
            )
        found.append(number)
    return list(found), {LABEL: tuple(names)}


def _derived(entries: Sequence[Entry], kind: str) -> tuple[str, ...]:
    """Class names of a list without a file of names."""
    if kind == "ucf101":  # by the folders, of which the published order is the sorted one
        return tuple(in_order({entry.folder for entry in entries if entry.folder is not None}))
    if not all(entry.index for entry in entries):
        if mixed := next((entry for entry in entries if entry.index), None):
            raise ValueError(
                f"{mixed.where} ({mixed.name}) has the class {mixed.known!r}, a number, and other rows have names: "
                "write one kind, or set list_format."
            )
        return tuple(in_order({str(entry.known) for entry in entries}))
    numbers = {int(entry.known or 0) for entry in entries}
    if numbers == {*range(1, len(numbers) + 1)} and len(numbers) > 1:
        first = next(entry for entry in entries if entry.known == "1")
        raise ValueError(
            f"{first.where} ({first.name}) has the class index 1, and the indices of the list are 1 to {max(numbers)}, "
            f"without 0: class ids count from 0. Subtract 1 from each, or name the classes in classes.{LABEL} "
            "if class 0 has no videos here."
        )
    return tuple(map(str, range(max(numbers) + 1)))


def _found(root: Path, entries: Sequence[Entry], by_stem: bool) -> list[Path | None]:
    """Returns the file of each row, or None."""
    if not root.is_dir():
        raise FileNotFoundError(f"There is no folder {root}: set root to the folder of the videos.")
    if by_stem:
        stems = _by_stem(root)
        return [stems.get(entry.name) for entry in entries]
    paths: Iterable[Path] = (root / entry.name for entry in entries)
    return [path if path.is_file() else None for path in paths]


def _by_stem(root: Path) -> Mapping[str, Path]:
    """Returns the videos in all sub-folders by name without suffix.

    Raises:
        ValueError: two videos have the same name.
    """
    found: dict[str, Path] = {}
    for parent, _, names in os.walk(root):
        for name in names:
            stem, suffix = os.path.splitext(name)
            if suffix.lower() in VIDEOS.extensions and not name.startswith("."):
                path = Path(parent, name)
                if stem in found:
                    raise ValueError(f"{found[stem]} and {path} have the same name: remove one, or correct root.")
                found[stem] = path
    return found
