"""Inspection of a data set of videos before a run: its kind, classes, durations, sizes, broken and repeated files."""

import hashlib
import os
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from blueberry_video.data.lerobot import LeRobotEpisodes
from blueberry_video.data.list_formats import read_list
from blueberry_video.data.media_folder import broken_reason
from blueberry_video.data.metadata import NAMES, VIDEOS, Row, has_class_folders
from blueberry_video.data.shard_index import MANIFEST, Manifest, ShardRow
from blueberry_video.data.shard_store import Store
from blueberry_video.data.video_folder import VideoClips, VideoFolder
from blueberry_video.data.video_list import VideoList
from blueberry_video.data.video_shards import VideoShards
from blueberry_video.data.web_shards import WebShards
from blueberry_video.video.errors import VideoError

FEW = 5  # videos of a class that are named as few
MAX_BROKEN_SHARE = 0.05  # of the videos that are read
SHOWN = 8  # names, or lines of a kind of fault, in a report
HEAD = 1 << 16  # bytes of a file that are compared
_FRAMES = 8  # of a video that are decoded, from the first to the last one
_LISTS = (".txt", ".csv", ".tsv", ".json")
_TEXTS = {"train": ("train",), "val": ("val", "valid", "test", "dev")}


@dataclass(frozen=True)
class Recognized:
    """Kind of a data set.

    Attributes:
        data: name in ``conf/data/``.
        parts: split -> function that builds its data set.
        settings: split -> keys of the config that read it.
    """

    data: str
    parts: Mapping[str, Callable[[], VideoClips]]
    settings: Mapping[str, Mapping[str, Any]]

    def config(self) -> str:
        """Lines of a config that read the data set."""
        lines = ["defaults:", f"  - override data: {self.data}", "data:"]
        for split, keys in self.settings.items():
            lines.append(f"  {split}: {{{', '.join(f'{key}: {_yaml(value)}' for key, value in keys.items())}}}")
        return "\n".join(lines)


@dataclass
class Inspection:
    """Result of :func:`inspect`.

    Attributes:
        videos: split -> number of videos.
        classes: split -> label -> class -> number of videos.
        read: number of videos that were opened and decoded.
        durations, rates, sizes: seconds, frames per second, and (height, width) of each of them.
        broken: file -> reason.
        repeated: files with the same content in two splits.
        pictures: a frame of each of them, uint8 (n, 3, H, W), and their titles.
    """

    videos: dict[str, int] = field(default_factory=dict)
    classes: dict[str, dict[str, dict[str, int]]] = field(default_factory=dict)
    read: int = 0
    durations: list[float] = field(default_factory=list)
    rates: list[float] = field(default_factory=list)
    sizes: list[tuple[int, int]] = field(default_factory=list)
    broken: dict[str, str] = field(default_factory=dict)
    repeated: list[tuple[str, str]] = field(default_factory=list)
    pictures: tuple[Tensor, list[str]] = (torch.zeros(0, 3, 1, 1, dtype=torch.uint8), [])

    def empty(self, split: str, label: str) -> list[str]:
        """Classes without a video in a split."""
        return [name for name, count in self.classes[split][label].items() if not count]

    def few(self, split: str, label: str) -> list[str]:
        """Classes with fewer videos than ``FEW`` in a split."""
        return [f"{name} ({count})" for name, count in self.classes[split][label].items() if 0 < count < FEW]

    def to_json(self) -> dict[str, Any]:
        """Everything except the pictures."""
        numbers = {"durations": self.durations, "rates": self.rates}
        return {
            "videos": self.videos,
            "classes": self.classes,
            "read": self.read,
            **{key: _spread(values) for key, values in numbers.items()},
            "sizes": {f"{w}x{h}": count for (h, w), count in Counter(self.sizes).most_common()},
            "broken": self.broken,
            "repeated": [list(pair) for pair in self.repeated],
        }


def recognize(location: str, image_size: int | None = None) -> Recognized:
    """Returns the kind of a data set by its files.

    Args:
        location: a folder, or tar files such as ``s3://bucket/{000..012}.tar``.
        image_size: pixels of the clips.

    Raises:
        FileNotFoundError: no such folder, or no known layout in it.
    """
    how: dict[str, Any] = {"num_frames": _FRAMES, "image_size": image_size, "sampler": "uniform", "pad": True}
    root = Path(location)
    if location.endswith(".tar") or ("://" not in location and root.is_dir() and _tars(root)):
        both = {"train": {"root": location}, "val": {"root": location}}
        return Recognized("web_shards", {"train": partial(WebShards, location, **how)}, both)
    if "://" in location or (root / MANIFEST).is_file():
        store = Store(location)
        splits = Manifest.from_bytes(store.read(MANIFEST), store.path(MANIFEST)).splits
        return _by_split("video_shards", VideoShards, location, splits or [None], how)
    if not root.is_dir():
        raise FileNotFoundError(f"There is no folder {location}: give a folder of videos, tar files, or an experiment.")
    if (root / "meta" / "info.json").is_file():
        range_of = {"train": {"root": location, "episodes": "0:…"}, "val": {"episodes": "…:"}}
        return Recognized("lerobot", {"train": partial(LeRobotEpisodes, location, **how)}, range_of)
    if (root / VIDEOS.folder).is_dir():
        if not any((root / name).is_file() for name in NAMES):
            part = partial(VideoFolder, location, **how, metadata="none")
            keys = {"root": location, "metadata": "none", "split": None}
            return Recognized(
                "video_folder", {"train": part}, {"train": keys, "val": {"metadata": "none", "split": None}}
            )
        found = sorted({row.split for row in VideoFolder(location, **how).rows}, key=str)
        return _by_split("video_folder", VideoFolder, location, found, how)
    if lists := _lists(root):
        return _of_lists(location, lists, how)
    if has_class_folders(root, None):
        return _by_split("video_folder", VideoFolder, location, [None], how)
    if splits := sorted(path.name for path in root.iterdir() if path.is_dir() and has_class_folders(root, path.name)):
        return _by_split("video_folder", VideoFolder, location, splits, how)
    raise FileNotFoundError(
        f"The folder {location} has no known layout: class folders (<split>/<class>/video.mp4), {VIDEOS.folder}/ with "
        "or without metadata, a list of videos, tar files, or meta/info.json of LeRobot. Move single files to "
        f"{root / VIDEOS.folder}, and use metadata: none."
    )


def _tars(root: Path) -> bool:
    return not (root / MANIFEST).exists() and any(root.glob("*.tar"))


def _by_split(
    data: str, kind: Callable[..., VideoClips], location: str, splits: Sequence[str | None], how: Mapping[str, Any]
) -> Recognized:
    parts = {split or "all": partial(kind, location, **how, split=split) for split in splits}
    train = next((split for split in splits if split and split.startswith("train")), splits[0])
    others = [split for split in splits if split != train]
    val = next(
        (split for split in others if split and split.startswith(("val", "dev"))), others[0] if others else train
    )
    settings = {"train": {"root": location, "split": train}, "val": {"split": val}}
    if val == train:  # there is one folder only
        settings["val"]["root"] = "…"
    return Recognized(data, parts, settings)


def _lists(root: Path) -> dict[str, str]:
    """Returns split -> list of videos, from the names of files in the folder or next to it."""
    found: dict[str, str] = {}
    for folder in (root, root / "annotations", root / "labels", root.parent):
        names = sorted(path for path in folder.glob("*") if path.suffix.lower() in _LISTS and path.is_file())
        for split, words in _TEXTS.items():
            for path in names:
                if split not in found and any(word in path.stem.lower() for word in words) and _is_list(path, root):
                    found[split] = str(path.relative_to(root)) if path.is_relative_to(root) else str(path.resolve())
        if found:
            return found
    return found


def _is_list(path: Path, root: Path) -> bool:
    """Whether a file is a list of the videos of a folder."""
    by_name = path.parent != root.parent  # rows without paths, of a file in the folder
    try:
        kind, entries, _ = read_list(path, None)
    except ValueError:  # of a row of Kinetics, which is reported; other files may be anything
        return by_name and "youtube_id" in path.read_bytes()[:200].decode("utf-8", "replace").split("\n", 1)[0]
    return by_name if kind in ("kinetics", "ssv2") else any((root / entry.name).is_file() for entry in entries[:50])


def _of_lists(location: str, lists: Mapping[str, str], how: Mapping[str, Any]) -> Recognized:
    parts = {split: partial(VideoList, location, name, **how, max_missing_share=1.0) for split, name in lists.items()}
    settings: dict[str, dict[str, Any]] = {"train": {"root": location}, "val": {}}
    for split in settings:
        settings[split]["list_file"] = lists.get(split, "…")
    return Recognized("video_list", parts, settings)


def inspect(parts: Mapping[str, VideoClips], sample: int, workers: int = 4, seed: int = 0) -> Inspection:
    """Counts the videos of all parts, and decodes a sample of them.

    Args:
        parts: split -> data set.
        sample: videos to decode, over all parts; 0 for all.
        workers: videos that are decoded at a time.
        seed: seed of the sample.
    """
    found = Inspection(videos={split: len(data.rows) for split, data in parts.items()})
    for split, data in parts.items():
        found.classes[split] = _counted(data)
        found.broken |= {name: reason for name, reason in data.skipped.items() if reason}
    found.repeated = _repeated(parts)
    everything = [(split, number) for split, data in parts.items() for number in range(len(data.rows))]
    if sample and sample < len(everything):
        chosen = np.random.default_rng(seed).permutation(len(everything))[:sample]
        everything = [everything[i] for i in sorted(chosen.tolist())]
    with ThreadPoolExecutor(workers) as pool:
        results = list(pool.map(lambda item: _read(parts[item[0]], item[1]), everything))
    pictures, titles = list[Tensor](), list[str]()
    for (split, number), result in zip(everything, results):
        row = parts[split].rows[number]
        if isinstance(result, str):
            found.broken[f"{split}: {row.name}"] = result
            continue
        seconds, rate, size, picture = result
        found.durations.append(seconds)
        found.rates.append(rate)
        found.sizes.append(size)
        pictures.append(picture)
        names = [parts[split].classes[label][i] for label, i in row.labels.items()]
        titles.append(", ".join(names) or Path(row.name).name)
    found.read = len(everything)
    if pictures:
        found.pictures = torch.stack(pictures), titles
    return found


def too_many_broken(found: Inspection) -> bool:
    """Whether more than ``MAX_BROKEN_SHARE`` of the videos are broken, with which a run would stop."""
    return len(found.broken) > MAX_BROKEN_SHARE * max(found.read, 1)


def report(found: Inspection, parts: Mapping[str, VideoClips], failed: Mapping[str, str]) -> Iterator[str]:
    """Yields the lines of a report, each with ``ok``, ``note`` or ``FAIL``.

    Args:
        found: the result of :func:`inspect`.
        parts: split -> data set.
        failed: split -> why its data set cannot be built.
    """
    for split, reason in failed.items():
        yield f"  FAIL  {split}: {reason}"
    for split, data in parts.items():
        yield f"  ok    {split}: {found.videos[split]} videos, {type(data).__name__} of {data.location}"
        for label, counts in found.classes[split].items():
            largest = _some([f"{name} {count}" for name, count in Counter(counts).most_common()])
            yield f"  ok    {split}: {label} has {len(counts)} classes ({largest})"
            for names, what in ((found.empty(split, label), "no video"), (found.few(split, label), "few videos")):
                if names:
                    yield f"  note  {split}: {label} has {what} of {_some(names)}"
    numbers = found.to_json()
    for key, unit in (("durations", "s"), ("rates", "frames per second")):
        if spread := numbers[key]:
            yield f"  ok    {key}: {spread['min']:.4g} to {spread['max']:.4g} {unit}, median {spread['median']:.4g}"
    if found.sizes:
        yield f"  ok    sizes: {_some([f'{size} ({count})' for size, count in numbers['sizes'].items()])}"
    for first, second in found.repeated[:SHOWN]:
        yield f"  note  {first} and {second} have the same size and the same first bytes: keep one of them"
    if len(found.repeated) > SHOWN:
        yield f"  note  {len(found.repeated) - SHOWN} more files are in two splits"
    mark = "FAIL" if too_many_broken(found) else "note" if found.broken else "ok  "
    for name, reason in list(found.broken.items())[:SHOWN]:
        yield f"  {mark}  {name}: {reason}"
    yield f"  {mark}  {found.read} videos were read, {len(found.broken)} are broken or missing"


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:SHOWN]) + (f" and {len(names) - SHOWN} more" if len(names) > SHOWN else "")


def _counted(data: VideoClips) -> dict[str, dict[str, int]]:
    counts = {label: Counter[int]() for label in data.classes}
    for row in data.rows:
        for label, number in row.labels.items():
            counts[label][number] += 1
    return {
        label: {name: counts[label][number] for number, name in enumerate(names)}
        for label, names in data.classes.items()
    }


def _read(data: VideoClips, number: int) -> tuple[float, float, tuple[int, int], Tensor] | str:
    """Returns seconds, frames per second, (height, width) and a frame of a video, or the reason why it is broken."""
    row = data.rows[number]
    try:
        info = data.probe(row)
        frames = data.frames(row)
    except (VideoError, OSError) as error:
        return broken_reason(error)
    seconds = info.duration if not isinstance(data, LeRobotEpisodes) else getattr(row, "length", 0) / data.tables.fps
    return float(seconds), float(info.fps), (info.height, info.width), frames.pixels[len(frames.pixels) // 2]


def _repeated(parts: Mapping[str, VideoClips]) -> list[tuple[str, str]]:
    """Returns pairs of files of different splits with the same size and the same first bytes."""
    by_size = defaultdict[int, list[tuple[str, Row]]](list)
    for split, data in parts.items():
        for row in data.rows if not isinstance(data, LeRobotEpisodes) else ():
            if not isinstance(row, ShardRow) and row.path.is_file():
                by_size[os.stat(row.path).st_size].append((split, row))
    by_head = defaultdict[tuple[int, bytes], list[tuple[str, Row]]](list)
    for size, rows in by_size.items():
        for split, row in rows if len({split for split, _ in rows}) > 1 else ():
            with row.path.open("rb") as file:
                by_head[size, hashlib.sha256(file.read(HEAD)).digest()].append((split, row))
    pairs = []
    for same in by_head.values():
        first = same[0]
        pairs += [(f"{first[0]}: {first[1].name}", f"{s}: {row.name}") for s, row in same[1:] if s != first[0]]
    return sorted(pairs)


def _spread(values: Sequence[float]) -> dict[str, float]:
    """Smallest, median and largest value."""
    return dict(zip(("min", "median", "max"), np.quantile(values, (0, 0.5, 1)).tolist())) if values else {}


def _yaml(value: Any) -> str:
    return "null" if value is None else f"'{value}'" if any(mark in str(value) for mark in ":{},") else str(value)
