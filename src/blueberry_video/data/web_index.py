"""Index of tar files in the layout of WebDataset, of which each clip is a group of files with the same key.

    000000.tar: 0001.mp4 0001.json 0002.mp4 0002.txt 0002.cls …

The key of a file is its path up to the first dot of the last part. A clip has one video, and optionally ``json``
(``caption``, ``labels`` or ``label``), ``txt`` (caption) and ``cls`` (class name or id).
"""

import fnmatch
import hashlib
import io
import itertools
import json
import re
import tarfile
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath

import numpy as np

from blueberry_video.data.metadata import CAPTION_KEYS, VIDEOS, in_order, some
from blueberry_video.data.shard_index import Manifest, Shard, joined, write_columns
from blueberry_video.data.shard_store import Store

LABEL = "class"
INDEXED = ("class ids",)  # class names of a label whose values are ids, until the data set has names
_ANNOTATIONS = ("json", "txt", "cls")
_READ = 1 << 16  # bytes of a request for headers
_MAX_ANNOTATION = 1 << 24
_SHARDS_AT_ONCE = 8


def expand_braces(text: str) -> list[str]:
    """Returns the names that a pattern stands for, as a shell does: ``{000..012}``, with the digits of its bounds, and
    ``{a,b}``; several braces are combined, the last one fastest.

    Raises:
        ValueError: an opening without a closing brace.
    """
    parts = re.split(r"(\{[^{}]*\})", text)
    if any(mark in part for part in parts[::2] for mark in "{}"):
        raise ValueError(f"root={text!r} has unbalanced braces: write for example {{000000..000012}}.tar.")
    choices = [_choices(part) if number % 2 else [part] for number, part in enumerate(parts)]
    return ["".join(chosen) for chosen in itertools.product(*choices)]


def _choices(braces: str) -> list[str]:
    inside = braces[1:-1]
    if bounds := re.fullmatch(r"(\d+)\.\.(\d+)", inside):
        first, last = int(bounds[1]), int(bounds[2])
        digits = max(map(len, bounds.groups())) if any(b[0] == "0" and len(b) > 1 for b in bounds.groups()) else 0
        step = 1 if first <= last else -1
        return [f"{number:0{digits}d}" for number in range(first, last + step, step)]
    return inside.split(",") if "," in inside else [braces]


def list_shards(root: str) -> tuple[Store, dict[str, int]]:
    """Returns the store and name -> bytes of the tar files of a folder, or of a pattern with braces or ``*``.

    Raises:
        FileNotFoundError: no tar file, or one of the pattern is missing.
        ValueError: braces outside of the file name.
    """
    text = str(root)
    folder, _, pattern = text.rpartition("/") if text.endswith(".tar") else (text.rstrip("/"), "", "*.tar")
    if any(mark in folder for mark in "{}*"):
        raise ValueError(f"root={text!r} has a pattern in its folder: write it in the file name only.")
    store = Store(folder or ("/" if text.startswith("/") else "."))
    found = {name: size for name, size in store.sizes().items() if name.endswith(".tar")}
    names = [one for part in expand_braces(pattern) for one in _matching(part, found)]
    if missing := [name for name in names if name not in found]:
        raise FileNotFoundError(
            f"There is no {store.path(missing[0])}, and {len(missing) - 1} more of the {len(names)} shards of "
            f"root={text!r} are missing: correct the range, or copy them."
        )
    if not names:
        raise FileNotFoundError(f"There is no tar file {store.path(pattern)}: set root to a folder or name.tar files.")
    return store, {name: found[name] for name in dict.fromkeys(names)}


def _matching(pattern: str, found: dict[str, int]) -> list[str]:
    return sorted(fnmatch.filter(found, pattern)) if "*" in pattern else [pattern]


@dataclass
class _Clip:
    """Files of one key: the video, and the content of the others by suffix."""

    key: str
    suffix: str = ""
    offset: int = 0
    size: int = 0
    texts: dict[str, str] = field(default_factory=dict)


class _Ranges(io.RawIOBase):
    """Seekable file over the byte ranges of a store."""

    def __init__(self, store: Store, name: str, size: int):
        self.store, self.name, self.size, self.position = store, name, size, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = 0) -> int:
        self.position = offset + (0, self.position, self.size)[whence]
        return self.position

    def tell(self) -> int:
        return self.position

    def readinto(self, buffer) -> int:  # type: ignore[no-untyped-def]
        end = min(self.position + len(buffer), self.size)
        data = self.store.read(self.name, self.position, end) if end > self.position else b""
        buffer[: len(data)] = data
        self.position += len(data)
        return len(data)


def build_index(store: Store, sizes: dict[str, int], digest: str) -> bytes:
    """Reads the headers and annotations of all shards, and returns the index, with the manifest in its metadata.

    Raises:
        ValueError: a damaged shard or annotation, or clips of which only some have a caption or a label.
    """
    with ThreadPoolExecutor(1 if store.local is not None else _SHARDS_AT_ONCE) as pool:
        scanned = list(pool.map(lambda item: list(_clips(store, *item)), sizes.items()))
    found = [(name, clip) for name, clips in zip(sizes, scanned) for clip in clips if clip.suffix]
    if not found:
        raise ValueError(
            f"{store.url} has no video in its {len(sizes)} tar files: a clip is a group such as 0001.mp4 and 0001.json."
        )
    shards = [
        Shard(name, None, sum(bool(clip.suffix) for clip in clips), sizes[name]) for name, clips in zip(sizes, scanned)
    ]
    annotations = [_annotation(store.path(name), clip) for name, clip in found]
    where = [f"{store.path(name)} ({clip.key})" for name, clip in found]
    columns = {
        "offset": np.array([clip.offset for _, clip in found], np.int64),
        "size": np.array([clip.size for _, clip in found], np.int64),
    }
    names = [f"{name.removesuffix('.tar')}/{clip.key}{clip.suffix}" for name, clip in found]
    columns["name"], columns["name_end"] = joined(names)
    columns["key"], columns["key_end"] = joined([clip.key for _, clip in found])
    captions = [caption for caption, _ in annotations]
    if any(caption is not None for caption in captions):
        _check_all(where, captions, "a caption")
        columns["caption"], columns["caption_end"] = joined([caption or "" for caption in captions])
    classes = {}
    for label in sorted({label for _, labels in annotations for label in labels}):
        values = [labels.get(label) for _, labels in annotations]
        _check_all(where, values, f"the label {label!r}")
        classes[label], columns[f"label.{label}"] = _ids(where, label, values)
    if names != sorted(names):
        columns["by_name"] = np.array(sorted(range(len(names)), key=names.__getitem__), np.int64)
    manifest = Manifest(digest, 0, False, classes, {}, tuple(shards))
    return write_columns(columns, digest=digest, manifest=manifest.to_bytes().decode())


def _clips(store: Store, name: str, size: int) -> Iterator[_Clip]:
    """Yields the clips of a tar file, of which it reads the headers and annotations."""
    where, clip = store.path(name), _Clip("")
    source = io.BufferedReader(_Ranges(store, name, size), _READ)
    try:
        with tarfile.open(fileobj=source, mode="r:", encoding="utf-8") as tar:
            for member in tar:
                path = PurePosixPath(member.name)
                key, _, suffix = path.name.partition(".")
                key = (path.parent / key).as_posix()
                if not member.isfile() or not key or path.name.startswith("."):
                    continue
                if member.offset_data + member.size > size:
                    raise tarfile.ReadError(f"{member.name} ends after {size} bytes")
                if key != clip.key:
                    if clip.key:
                        yield clip
                    clip = _Clip(key)
                last = "." + suffix.lower().rpartition(".")[2]
                if last in VIDEOS.extensions:
                    if clip.suffix:
                        raise ValueError(f"{where} has two videos with the key {key!r}: give each a key of its own.")
                    clip.suffix, clip.offset, clip.size = last, member.offset_data, member.size
                elif suffix.lower() in _ANNOTATIONS and member.size <= _MAX_ANNOTATION:
                    content = tar.extractfile(member)
                    assert content is not None
                    clip.texts[suffix.lower()] = content.read().decode("utf-8-sig", "replace")
    except tarfile.TarError as error:
        raise ValueError(
            f"{where} is truncated or no tar file ({error}): copy it again, or leave it out of root."
        ) from error
    if clip.key:
        yield clip


def _annotation(shard: str, clip: _Clip) -> tuple[str | None, dict[str, str | int]]:
    """Returns the caption and the labels of a clip."""
    caption, labels = clip.texts.get("txt", "").strip() or None, dict[str, str | int]()
    if "json" in clip.texts:
        try:
            content = json.loads(clip.texts["json"])
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{shard} ({clip.key}.json) is not valid JSON ({error}): correct it.") from error
        content = content if isinstance(content, dict) else {}
        texts = [content[key] for key in CAPTION_KEYS if isinstance(content.get(key), str) and content[key].strip()]
        caption = texts[0].strip() if texts else caption
        listed = content.get("labels")
        given: dict = listed if isinstance(listed, dict) else {}
        labels |= {str(label): value for label, value in given.items()}
        for key in ("label", LABEL):
            if not given and type(content.get(key)) in (str, int):
                labels[LABEL] = content[key]
    if text := clip.texts.get("cls", "").strip():
        labels[LABEL] = int(text) if text.isdecimal() else text
    return caption, labels


def _check_all(where: Sequence[str], values: Sequence[object], what: str) -> None:
    for place, value in zip(where, values):
        if value is None:
            raise ValueError(
                f"{place} has no value of {what}, which other clips have: add it to every clip, or to none."
            )


def _ids(where: Sequence[str], label: str, values: Sequence[object]) -> tuple[tuple[str, ...], np.ndarray]:
    """Returns the class names, or ``INDEXED`` for ids, and the class id of every clip."""
    for place, value in zip(where, values):
        if isinstance(value, bool) or not isinstance(value, str | int):
            raise ValueError(f"{place} has {label}={value!r}, neither a name nor an integer: use one of these.")
    if all(isinstance(value, int) and value >= 0 for value in values):
        return INDEXED, np.array(values, np.int32)
    names = tuple(in_order({str(value) for value in values}))
    ids = {name: i for i, name in enumerate(names)}
    return names, np.array([ids[str(value)] for value in values], np.int32)


def digest_of(store: Store, sizes: dict[str, int]) -> str:
    """SHA-256 of the address, names and sizes of shards, and of their modification times on a local disk."""
    times = [] if store.local is None else [Path(store.local, name).stat().st_mtime_ns for name in sizes]
    return hashlib.sha256(json.dumps([store.url, sizes, times]).encode()).hexdigest()


def unknown_classes(label: str, used: Sequence[str], names: Sequence[str], where: str) -> ValueError:
    """Error for classes of a clip that are not among the names of the data set."""
    return ValueError(
        f"{where} has the class {used[0]!r} of {label}, which is not among {some(names)}: correct "
        f"classes.{label}, which lists the names of all classes in the order of their ids."
    )
