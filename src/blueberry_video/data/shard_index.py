"""Manifest and index of tar shards.

    <root>/manifest.json          format, source, classes, and the shards with their splits, clips and bytes
    <root>/index.safetensors      columns of the clips, in the order of the shards; written last
    <root>/train-000000.tar       <number>.json and <number>.mp4 (or the suffix of the file) of consecutive clips
    <root>/SHA256SUMS             for `sha256sum -c`

The index has per clip its byte offset, size, CRC, name, label ids and caption. A local index is mapped into memory, so
that all processes of a machine share it.
"""

import json
import struct
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, overload

import numpy as np
from safetensors.numpy import save

from blueberry_video.data.metadata import Row
from blueberry_video.installation import start_command

MANIFEST, INDEX, SUMS, PARTS = "manifest.json", "index.safetensors", "SHA256SUMS", "parts"
FORMAT = 1
BLOCK = 512  # bytes of a tar header; files are padded to a multiple of it
RECORD = 10_240  # an archive is padded to a multiple of it
_DTYPES = {"I64": np.int64, "U32": np.uint32, "I32": np.int32, "U8": np.uint8}
COMMAND = start_command("shards", DATA="<folder>", OUT="<shards>")


@dataclass(frozen=True)
class ShardRow(Row):
    """Row of a clip in a shard.

    Attributes:
        shard: name of the tar file.
        key: name of the clip in it, without suffix.
        offset, size: bytes of the video in the tar file, without its header.
        crc: CRC-32 of the video; None if the index has none.
    """

    shard: str = ""
    key: str = ""
    offset: int = 0
    size: int = 0
    crc: int | None = None


@dataclass(frozen=True)
class Shard:
    """Tar file: its name, the split of its clips, their number, and its size in bytes."""

    name: str
    split: str | None
    clips: int
    bytes: int


@dataclass(frozen=True)
class Manifest:
    """Content of ``manifest.json``.

    Attributes:
        digest: SHA-256 of names, sizes, modification times, splits, captions and labels of the source.
        shard_bytes: size limit of a shard.
        folders: True if the splits are folders, which are never read together.
        classes, reversal_pairs: those of the source, over all splits.
        shards: in the order of the index.
    """

    digest: str
    shard_bytes: int
    folders: bool
    classes: dict[str, tuple[str, ...]]
    reversal_pairs: dict[str, tuple[tuple[int, int], ...]]
    shards: tuple[Shard, ...]

    @property
    def num_clips(self) -> int:
        return sum(shard.clips for shard in self.shards)

    @property
    def splits(self) -> list[str]:
        return list(dict.fromkeys(shard.split for shard in self.shards if shard.split is not None))

    def to_bytes(self) -> bytes:
        content = {
            "format": FORMAT,
            "digest": self.digest,
            "shard_bytes": self.shard_bytes,
            "folders": self.folders,
            "classes": self.classes,
            "reversal_pairs": self.reversal_pairs,
            "shards": [[shard.name, shard.split, shard.clips, shard.bytes] for shard in self.shards],
        }
        return (json.dumps(content, ensure_ascii=False, separators=(",", ":")) + "\n").encode()

    @classmethod
    def from_bytes(cls, data: bytes, where: str) -> "Manifest":
        """Reads a manifest. ``where`` is its path in messages.

        Raises:
            ValueError: another format, or a damaged file.
        """
        try:
            content = json.loads(data)
            if content["format"] != FORMAT:
                raise ValueError(
                    f"{where} has format={content['format']!r} and this version reads {FORMAT}: run `{COMMAND}` again, "
                    "into another folder."
                )
            pairs = content["reversal_pairs"].items()
            return cls(
                content["digest"],
                content["shard_bytes"],
                content["folders"],
                {label: tuple(names) for label, names in content["classes"].items()},
                {label: tuple((a, b) for a, b in found) for label, found in pairs},
                tuple(Shard(*shard) for shard in content["shards"]),
            )
        except (json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError) as error:
            raise ValueError(
                f"{where} is not a manifest of shards ({error!r}): set root to the folder that `{COMMAND}` wrote, or "
                "write it again."
            ) from error


class ShardIndex:
    """Columns of all clips of a folder of shards.

    Args:
        source: the file, mapped into memory, or its content.
        manifest: the manifest of the folder.
        where: path of the file in messages.

    Raises:
        ValueError: a truncated index, or one of another folder.
    """

    def __init__(self, source: Path | bytes, manifest: Manifest, where: str):
        self.manifest, self.where = manifest, where
        self.path = source if isinstance(source, Path) else None
        if isinstance(source, Path) and source.stat().st_size:  # an empty file cannot be mapped
            data = np.memmap(source, np.uint8, "r").view(np.ndarray)  # indexing a memmap object is slow
        else:
            data = np.frombuffer(b"" if isinstance(source, Path) else source, np.uint8)
        self.columns, found = read_columns(data, where)
        self.starts = np.cumsum([0, *(shard.clips for shard in manifest.shards)])  # first clip of every shard
        sizes = {name: len(column) for name, column in self.columns.items()}
        own = "key_end" if "key_end" in sizes else "crc"  # keys of shards that another program wrote, without CRCs
        rows = {sizes.get(name) for name in ("offset", "size", own, "name_end")}
        if found.get("digest") != manifest.digest or rows != {manifest.num_clips}:
            raise ValueError(
                f"{where} is the index of other shards (digest={found.get('digest')}, {sizes.get('offset')} clips) "
                f"than {MANIFEST} next to it (digest={manifest.digest}, {manifest.num_clips} clips): copy the whole "
                f"folder again, or run `{COMMAND}` into another folder."
            )

    def __getstate__(self) -> dict[str, Any]:
        if self.path is None:
            return self.__dict__
        return {"source": self.path, "manifest": self.manifest, "where": self.where}  # a memory map would be copied

    def __setstate__(self, state: dict[str, Any]) -> None:
        if "source" in state:
            self.__init__(state["source"], state["manifest"], state["where"])  # type: ignore[misc]
        else:
            self.__dict__.update(state)

    def __len__(self) -> int:
        return self.manifest.num_clips

    @property
    def labels(self) -> list[str]:
        return [name.removeprefix("label.") for name in self.columns if name.startswith("label.")]

    @property
    def nbytes(self) -> int:
        """Bytes of all columns."""
        return sum(column.nbytes for column in self.columns.values())

    def select(self, split: str | None) -> np.ndarray | range:
        """Returns the clips of a split, or of all, in the order of their names.

        Raises:
            ValueError: there is no such split, or the splits are folders and ``split`` is None.
        """
        splits = self.manifest.splits
        if split is None:
            if self.manifest.folders and splits:
                raise ValueError(f"split=null: the shards have the splits {', '.join(splits)}: choose one of them.")
            return self.columns["by_name"] if "by_name" in self.columns else range(len(self))
        numbers = [number for number, shard in enumerate(self.manifest.shards) if shard.split == split]
        if not numbers:
            has = f"have only the splits {', '.join(splits)}" if splits else "have no splits"
            raise ValueError(
                f"split={split!r} selects no shard of {self.where.rpartition('/')[0]}, which {has}: choose another, or "
                "split=null for all clips."
            )
        return range(int(self.starts[numbers[0]]), int(self.starts[numbers[-1] + 1]))

    def name(self, clip: int) -> str:
        return self._text("name", clip)

    def row(self, clip: int) -> ShardRow:
        """Returns the row of a clip."""
        shard = self.manifest.shards[int(np.searchsorted(self.starts, clip, "right")) - 1]
        name = self.name(clip)
        return ShardRow(
            name=name,
            path=Path(shard.name, name),
            caption=self._text("caption", clip) if "caption_end" in self.columns else None,
            labels={label: int(self.columns[f"label.{label}"][clip]) for label in self.labels},
            split=shard.split,
            shard=shard.name,
            key=self._text("key", clip) if "key_end" in self.columns else clip_key(clip),
            offset=int(self.columns["offset"][clip]),
            size=int(self.columns["size"][clip]),
            crc=int(self.columns["crc"][clip]) if "crc" in self.columns else None,
        )

    def _text(self, column: str, clip: int) -> str:
        ends = self.columns[f"{column}_end"]
        return self.columns[column][int(ends[clip - 1]) if clip else 0 : int(ends[clip])].tobytes().decode()


class ShardRows(Sequence[Row]):
    """Rows of selected clips of an index, built when they are accessed.

    Args:
        index: the index.
        clips: numbers of the clips, in the order of their names.
        ids: label -> class id for every class id of the index.
    """

    def __init__(self, index: ShardIndex, clips: np.ndarray | range, ids: Mapping[str, np.ndarray]):
        self.source, self.clips, self.ids = index, clips, dict(ids)

    def __len__(self) -> int:
        return len(self.clips)

    @overload
    def __getitem__(self, position: int) -> ShardRow: ...
    @overload
    def __getitem__(self, position: slice) -> "list[ShardRow]": ...
    def __getitem__(self, position: int | slice) -> "ShardRow | list[ShardRow]":
        if isinstance(position, slice):
            return [self[each] for each in range(*position.indices(len(self)))]
        row = self.source.row(int(self.clips[position]))
        for label, ids in self.ids.items():
            row.labels[label] = int(ids[row.labels[label]])
        return row

    def __iter__(self) -> Iterator[ShardRow]:
        return (self[position] for position in range(len(self)))

    def has(self, name: str) -> bool:
        """Returns whether a clip has this name, by binary search."""
        low, high = 0, len(self)
        while low < high:
            middle = (low + high) // 2
            found = self.source.name(int(self.clips[middle]))
            if found == name:
                return True
            low, high = (middle + 1, high) if found < name else (low, middle)
        return False


def clip_key(clip: int) -> str:
    """Name of a clip in its tar file, without suffix: webdataset groups files by the part before the first dot."""
    return f"{clip:09d}"


def write_columns(columns: Mapping[str, np.ndarray], **metadata: str) -> bytes:
    """Returns a safetensors file; all values of ``metadata`` are in one entry, so that the bytes are deterministic."""
    return save(dict(columns), {"blueberry_video": json.dumps(metadata, sort_keys=True)})


def read_columns(data: np.ndarray, where: str) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    """Returns views of the columns in the bytes of a safetensors file, and its metadata.

    Raises:
        ValueError: the file is truncated or has another format.
    """
    try:
        (length,) = struct.unpack("<Q", data[:8].tobytes())
        if length > len(data):
            raise ValueError(f"a header of {length} bytes in a file of {len(data)}")
        header = json.loads(data[8 : 8 + length].tobytes())
        metadata = json.loads(header.pop("__metadata__")["blueberry_video"])
        columns = {}
        for name, entry in header.items():
            start, end = (8 + length + offset for offset in entry["data_offsets"])
            if end > len(data):
                raise ValueError(f"{len(data)} bytes instead of {end}")
            columns[name] = data[start:end].view(_DTYPES[entry["dtype"]])
    except (ValueError, KeyError, TypeError, struct.error) as error:
        raise ValueError(
            f"{where} is truncated or is not an index ({error}): copy it again, or run `{COMMAND}` again."
        ) from error
    return columns, metadata


def joined(texts: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
    """Returns the UTF-8 bytes of all texts, and the end of each."""
    encoded = [text.encode() for text in texts]
    return np.frombuffer(b"".join(encoded), np.uint8), np.cumsum([len(text) for text in encoded], dtype=np.int64)
