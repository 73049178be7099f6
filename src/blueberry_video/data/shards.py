"""Writer of tar shards from a folder of videos, for :class:`~blueberry_video.data.video_shards.VideoShards`.

    python -m blueberry_video.data.shards data/my_videos --out data/my_shards [--shard-size 1GB]

The folder is one that ``VideoFolder`` reads. The shards are plain tar files, which webdataset reads too. They depend
only on the folder and the shard size. Each appears when it is complete, so that after a kill the same command continues
and the result is identical byte for byte. The destination may be ``s3://bucket/folder`` or ``gs://bucket/folder``.
"""

import argparse
import errno
import fcntl
import hashlib
import json
import os
import re
import shutil
import signal
import sys
import tarfile
import tempfile
import zlib
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np

from blueberry_video.atomic import atomic_file, write_bytes
from blueberry_video.data.metadata import (
    VIDEOS,
    Row,
    has_class_folders,
    read_class_folders,
    read_classes,
    read_metadata,
)
from blueberry_video.data.progress import Progress
from blueberry_video.data.shard_index import (
    BLOCK,
    INDEX,
    MANIFEST,
    PARTS,
    RECORD,
    SUMS,
    Manifest,
    Shard,
    clip_key,
    joined,
    read_columns,
    write_columns,
)
from blueberry_video.data.shard_store import Store

_PIECE = 1 << 22  # bytes copied at a time
_UNITS = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9}
_MAX_CLIP = 8 * 2**30 - 1  # bytes of a file in the ustar format
NO_SPLIT = "clips"  # prefix of the shards of clips without a split


@dataclass(frozen=True)
class _Clip:
    """Clip to be written: its number, row, size and modification time of its file, and JSON text."""

    number: int
    row: Row
    size: int
    time: int
    text: bytes

    @property
    def space(self) -> int:
        """Bytes in the tar file."""
        return 2 * BLOCK + _padded(len(self.text)) + _padded(self.size)


class ShardWriter:
    """Writer of tar shards from a folder of videos.

    Args:
        root: folder that ``VideoFolder`` reads; the files of all splits are written.
        out: destination: a local folder, or ``s3://bucket/folder``, ``gs://bucket/folder``.
        shard_bytes: size limit of a shard; a larger clip has a shard for itself.
        metadata: see ``VideoFolder``.
        num_workers: shards written at the same time; a remote destination needs local disk space for them.

    Raises:
        FileNotFoundError, ValueError: see ``VideoFolder``; also for a value out of range.
    """

    def __init__(
        self,
        root: str | Path,
        out: str | Path,
        shard_bytes: int = 10**9,
        metadata: str | None = None,
        num_workers: int = 2,
    ):
        if shard_bytes < RECORD:
            raise ValueError(f"shard_size={shard_bytes} bytes must be at least {RECORD}, as in 1GB.")
        if num_workers < 1:
            raise ValueError(f"workers={num_workers} must be at least 1.")
        self.root, self.store, self.num_workers = Path(root), Store(out), num_workers
        if self.store.local is not None and self.store.local.resolve() == self.root.resolve():
            raise ValueError(f"out={out} is the folder of the videos: choose another out.")
        rows, classes, pairs, folders = _read(self.root, metadata)
        prefixes = _prefixes({row.split for row in rows})
        clips = [_clip(number, row, classes) for number, row in enumerate(rows)]
        digest = hashlib.sha256(json.dumps([1, shard_bytes, classes, pairs]).encode())
        for clip in clips:
            digest.update(clip.text + b"%d %d\n" % (clip.size, clip.time))
        self._shards = list(_shards(clips, shard_bytes, prefixes))
        self.manifest = Manifest(
            digest.hexdigest(), shard_bytes, folders, classes, pairs, tuple(shard for shard, _ in self._shards)
        )

    def __call__(self) -> bool:
        """Writes the shards that are missing; returns False if all were there.

        Raises:
            FileExistsError: the destination contains something else.
            ValueError: another process is writing to it, or a file changed while it was written.
            OSError: the disk is full; the finished shards are kept.
        """
        self._check_unused()
        with self._locked(), self._explained():
            found = self.store.sizes()
            done = self._finished(found)
            if INDEX in found and len(done) == len(self._shards):
                return False
            missing = [number for number, (shard, _) in enumerate(self._shards) if shard.name not in done]
            self._check_space(missing)
            self._put(MANIFEST, self.manifest.to_bytes())
            progress = Progress(self.store.url, sum(self._shards[number][0].clips for number in missing))
            with ThreadPoolExecutor(self.num_workers) as pool:
                running = {pool.submit(self._write, number): number for number in missing}
                try:
                    for future in as_completed(running):
                        future.result()
                        progress.add(self._shards[running[future]][0].clips)
                except BaseException:
                    pool.shutdown(cancel_futures=True)
                    raise
            self._write_index()
        return True

    def _check_unused(self) -> None:
        """Raises FileExistsError if the destination has files of other programs. Changes nothing."""
        local = self.store.local
        found = sorted(os.listdir(local)) if local is not None and local.exists() else list(self.store.sizes())
        other = [name for name in found if name not in (".lock", f".{MANIFEST}.tmp")]
        if other and MANIFEST not in other:
            raise FileExistsError(
                f"out={self.store.url} contains {other[0]} and no {MANIFEST} of this writer; nothing was changed: "
                "choose another out."
            )

    def _finished(self, found: dict[str, int]) -> set[str]:
        """Returns the finished shards in the destination.

        Raises:
            FileExistsError: it contains the shards of another source.
        """
        if MANIFEST not in found:
            return set()
        before = Manifest.from_bytes(self.store.read(MANIFEST), self.store.path(MANIFEST))
        if before != self.manifest:
            changed = [
                f"{key} was {getattr(before, key)} and is {getattr(self.manifest, key)}"
                for key in ("shard_bytes", "num_clips", "splits", "classes", "digest")
                if getattr(before, key) != getattr(self.manifest, key)
            ]
            raise FileExistsError(
                f"out={self.store.url} contains shards of another folder, or {self.root} has changed since "
                f"({'; '.join(changed)}); nothing was changed: choose another out, or remove this one."
            )
        whole = {shard.name for shard, _ in self._shards if found.get(shard.name) == shard.bytes}
        if INDEX in found:
            if len(whole) < len(self._shards):  # a shard was removed or truncated later
                self._restore_parts(whole)
            return whole
        parts = self.store.sizes(PARTS)
        return {shard.name for shard, _ in self._shards if shard.name in whole and _part(shard) in parts}

    def _restore_parts(self, names: set[str]) -> None:
        """Writes the parts of the index of these shards again, from the index."""
        columns, _ = read_columns(np.frombuffer(self.store.read(INDEX), np.uint8), self.store.path(INDEX))
        lines = [line.split("  ", 1) for line in self.store.read(SUMS).decode().splitlines()]
        sums = {name: found for found, name in lines}
        first = 0
        for shard, clips in self._shards:
            if shard.name in names:
                self._put_part(shard, columns["crc"][first : first + len(clips)], sums[shard.name])
            first += len(clips)

    def _check_space(self, missing: Sequence[int]) -> None:
        """Checks that the shards fit on the disk, before the first is written."""
        if (local := self.store.local) is None:
            return
        needed, free = sum(self._shards[number][0].bytes for number in missing), shutil.disk_usage(local).free
        if needed > free:
            raise OSError(errno.ENOSPC, f"{needed} bytes are needed and {free} are free")

    def _write(self, number: int) -> None:
        """Writes one shard, and then its part of the index, which marks it as finished."""
        shard, clips = self._shards[number]
        with self._file(shard.name, shard.bytes) as file:
            hashed = _Hashed(file)
            crcs = [self._append(hashed, clip) for clip in clips]
            hashed.write(bytes(shard.bytes - hashed.size))
        self._put_part(shard, np.array(crcs, np.uint32), hashed.digest.hexdigest())

    def _put_part(self, shard: Shard, crcs: np.ndarray, sha256: str) -> None:
        self._put(f"{PARTS}/{_part(shard)}", write_columns({"crc": crcs}, sha256=sha256))

    def _append(self, file: "_Hashed", clip: _Clip) -> int:
        """Appends the two files of a clip; returns the CRC-32 of the video."""
        file.write(_header(f"{clip_key(clip.number)}.json", len(clip.text)) + clip.text)
        file.write(bytes(_padded(len(clip.text)) - len(clip.text)))
        file.write(_header(clip_key(clip.number) + clip.row.path.suffix.lower(), clip.size))
        crc, size = 0, 0
        with clip.row.path.open("rb") as source:
            while piece := source.read(_PIECE):
                crc, size = zlib.crc32(piece, crc), size + len(piece)
                file.write(piece)
            changed = size != clip.size or os.fstat(source.fileno()).st_mtime_ns != clip.time
        if changed:
            raise ValueError(
                f"{clip.row.path} changed while the shards were written ({clip.size} bytes before, {size} now): write "
                "them into another out when the folder no longer changes."
            )
        file.write(bytes(_padded(size) - size))
        return crc

    def _write_index(self) -> None:
        crcs, sums = [], []
        for shard, _ in self._shards:
            name = f"{PARTS}/{_part(shard)}"
            columns, found = read_columns(np.frombuffer(self.store.read(name), np.uint8), self.store.path(name))
            crcs.append(columns["crc"])
            sums.append(f"{found['sha256']}  {shard.name}\n")
        clips = [clip for _, found in self._shards for clip in found]
        columns = {"crc": np.concatenate(crcs), "size": np.array([clip.size for clip in clips], np.int64)}
        columns["offset"] = np.concatenate([_offsets(found) for _, found in self._shards])
        columns["name"], columns["name_end"] = joined([clip.row.name for clip in clips])
        if any(clip.row.caption is not None for clip in clips):
            columns["caption"], columns["caption_end"] = joined([clip.row.caption or "" for clip in clips])
        for label in clips[0].row.labels:
            columns[f"label.{label}"] = np.array([clip.row.labels[label] for clip in clips], np.int32)
        if len({shard.split for shard, _ in self._shards}) > 1 and not self.manifest.folders:
            columns["by_name"] = np.array(sorted(range(len(clips)), key=lambda i: clips[i].row.name), np.int64)
        index = write_columns(columns, digest=self.manifest.digest)
        sums.append(f"{hashlib.sha256(index).hexdigest()}  {INDEX}\n")
        self._put(SUMS, "".join(sums).encode())
        self._put(INDEX, index)  # marks the folder as complete
        if self.store.local is not None:
            shutil.rmtree(self.store.local / PARTS)
        else:
            self.store.remove(PARTS)

    @contextmanager
    def _file(self, name: str, size: int) -> Iterator[BinaryIO]:
        """Opens a file of the destination, which appears when it is complete."""
        if self.store.local is not None:
            with atomic_file(self.store.local / name, needed=size) as file:
                yield file
            return
        with tempfile.NamedTemporaryFile(prefix="blueberry-shard-", suffix=".tar") as temporary:
            yield temporary  # type: ignore[misc]
            temporary.flush()
            self.store.upload(Path(temporary.name), name)

    def _put(self, name: str, data: bytes) -> None:
        if self.store.local is None:
            self.store.write(name, data)
            return
        (self.store.local / name).parent.mkdir(exist_ok=True)
        write_bytes(self.store.local / name, data)

    @contextmanager
    def _locked(self) -> Iterator[None]:
        """Holds the lock of a local destination, and removes the temporary files that a killed writer left."""
        if (local := self.store.local) is None:
            yield
            return
        local.mkdir(parents=True, exist_ok=True)
        with (local / ".lock").open("w") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)  # released when closed, also by a crash
            except BlockingIOError:
                raise ValueError(
                    f"another process is writing to out={local}: wait for it, or choose another out."
                ) from None
            for unfinished in (*local.glob(".*.tmp"), *(local / PARTS).glob(".*.tmp")):
                unfinished.unlink()
            yield

    @contextmanager
    def _explained(self) -> Iterator[None]:
        """Names the fix for a full disk."""
        try:
            yield
        except OSError as error:
            if error.errno not in (errno.ENOSPC, errno.EDQUOT):
                raise
            where = self.store.url if self.store.local is not None else f"{tempfile.gettempdir()} (TMPDIR)"
            size = sum(shard.bytes for shard, _ in self._shards)
            full = OSError(
                f"the disk of {where} is full: all shards of out={self.store.url} have {size} bytes ({error}). The "
                "finished shards are kept: free some space and repeat the command, or choose another out."
            )
            full.errno = error.errno
            raise full from error


class _Hashed:
    """File that counts and hashes the bytes written to it."""

    def __init__(self, file: BinaryIO):
        self.file, self.size, self.digest = file, 0, hashlib.sha256()

    def write(self, data: bytes) -> None:
        self.file.write(data)
        self.size += len(data)
        self.digest.update(data)


def _read(root: Path, metadata: str | None) -> tuple[list[Row], dict, dict, bool]:
    """Returns the rows of all splits, split by split and in the order of their names, the classes, the reversal pairs,
    and whether the splits are folders."""
    named, pairs = read_classes(root)
    if metadata is None and not (root / VIDEOS.folder).is_dir() and root.is_dir():
        if has_class_folders(root, None):
            rows, classes = read_class_folders(root, None, named, VIDEOS)
            return rows, {**named, **classes}, pairs, True
        splits = sorted(path.name for path in root.iterdir() if path.is_dir() and has_class_folders(root, path.name))
        if splits:
            rows = []
            for split in splits:
                found, classes = read_class_folders(root, split, named, VIDEOS)
                rows += [Row(row.name, row.path, row.caption, row.labels, split) for row in found]
            return rows, {**named, **classes}, pairs, True
    rows, classes = read_metadata(root, metadata, None, named, VIDEOS)
    rows.sort(key=lambda row: (row.split is not None, row.split or ""))  # stable: sorted by name within a split
    return rows, {**named, **classes}, pairs, False


def _clip(number: int, row: Row, classes: dict[str, tuple[str, ...]]) -> _Clip:
    stat = row.path.stat()
    if stat.st_size > _MAX_CLIP:
        raise ValueError(
            f"{row.path} has {stat.st_size} bytes, more than the {_MAX_CLIP} of a file in a shard: cut it."
        )
    content: dict = {"file_name": row.name}
    content |= {} if row.split is None else {"split": row.split}
    content |= {} if row.caption is None else {"caption": row.caption}
    if row.labels:
        content["labels"] = {label: classes[label][i] for label, i in row.labels.items()}
    return _Clip(number, row, stat.st_size, stat.st_mtime_ns, json.dumps(content, ensure_ascii=False).encode())


def _prefixes(splits: set[str | None]) -> dict[str | None, str]:
    """Returns the first part of the names of the shards of every split."""
    prefixes = {split: NO_SPLIT if split is None else re.sub(r"[^A-Za-z0-9_-]", "_", split) for split in splits}
    for split, prefix in prefixes.items():
        same = [other for other, found in prefixes.items() if found == prefix and other != split]
        if same:
            raise ValueError(
                f"split={split!r} and split={same[0]!r} would both have shards with the name {prefix}-….tar: rename "
                "one of them."
            )
    return prefixes


def _shards(
    clips: Sequence[_Clip], shard_bytes: int, prefixes: dict[str | None, str]
) -> Iterator[tuple[Shard, list[_Clip]]]:
    """Divides the clips into shards: consecutive clips of one split, up to the size limit."""
    found: list[_Clip] = []
    space = 0
    numbers = dict.fromkeys(prefixes, 0)

    def finished() -> tuple[Shard, list[_Clip]]:
        split = found[0].row.split
        name = f"{prefixes[split]}-{numbers[split]:06d}.tar"
        numbers[split] += 1
        return Shard(name, split, len(found), _tar_size(sum(clip.space for clip in found))), found

    for clip in clips:
        if found and (clip.row.split != found[0].row.split or _tar_size(space + clip.space) > shard_bytes):
            yield finished()
            found, space = [], 0
        found.append(clip)
        space += clip.space
    yield finished()


def _tar_size(used: int) -> int:
    """Returns the size of a tar file: two empty blocks mark its end."""
    return -(-(used + 2 * BLOCK) // RECORD) * RECORD


def _offsets(clips: Sequence[_Clip]) -> np.ndarray:
    """Returns the offset of the video of each clip in its shard."""
    starts = np.cumsum([0, *(clip.space for clip in clips)])[:-1]
    return starts + np.array([2 * BLOCK + _padded(len(clip.text)) for clip in clips])


def _header(name: str, size: int) -> bytes:
    """Returns a tar header without owner and time, so that the same clips make the same bytes."""
    header = tarfile.TarInfo(name)
    header.size, header.mode = size, 0o644
    return header.tobuf(tarfile.USTAR_FORMAT)


def _padded(size: int) -> int:
    return -(-size // BLOCK) * BLOCK


def _part(shard: Shard) -> str:
    return f"{shard.name.removesuffix('.tar')}.safetensors"


def _size(text: str) -> int:
    """Parses a size such as 500MB or 1.5GB."""
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMG]B|)", text.strip().upper())
    if not found:
        raise argparse.ArgumentTypeError(f"{text!r} must be a size, as in 500MB or 1GB")
    return int(float(found[1]) * _UNITS[found[2]])


def main(arguments: list[str]) -> None:
    """Runs the command in the docstring of the module.

    Raises:
        SystemExit: with a message, for invalid arguments, or a folder that cannot be read or written.
    """
    parser = argparse.ArgumentParser(prog="blueberry shards", allow_abbrev=False)
    parser.add_argument("root", help="folder of videos, with metadata or class folders")
    parser.add_argument("--out", required=True, help="folder, s3://bucket/folder or gs://bucket/folder")
    parser.add_argument("--shard-size", type=_size, default=10**9, metavar="SIZE", help="limit of a shard (1GB)")
    parser.add_argument("--metadata", default=None, help="file below the folder, or none for videos without metadata")
    parser.add_argument("--workers", type=int, default=2, help="shards written at the same time (2)")
    given = parser.parse_args(arguments)
    try:
        writer = ShardWriter(given.root, given.out, given.shard_size, given.metadata, given.workers)
        written = writer()
    except (OSError, ValueError, ImportError) as error:  # the message names the value and the fix
        raise SystemExit(f"Error: {error}") from error
    manifest = writer.manifest
    size = sum(shard.bytes for shard in manifest.shards)
    text = f"{manifest.num_clips:,} clips in {len(manifest.shards):,} shards ({size / 1e9:.3g} GB) in {given.out}"
    print(text if written else f"{text}, which were there already")


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))  # finishes the shards being written
    try:
        main(sys.argv[1:])
    except KeyboardInterrupt:
        print("\nStopped: the finished shards are kept. Repeat the command to continue.", file=sys.stderr)
        sys.exit(128 + signal.SIGINT)
