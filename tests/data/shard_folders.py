"""Folders of tiny files for the tests of shards."""

import json
import os
from pathlib import Path

import torch

from blueberry_video.data.metadata import Row
from blueberry_video.data.shards import ShardWriter
from blueberry_video.data.video_shards import VideoShards


def write_files(root: Path, count: int, splits: dict[str, int] | None = None, size: int = 200) -> Path:
    """Files with different bytes and sizes in place of videos; the last rows are those of ``splits``."""
    (root / "videos").mkdir(parents=True)
    parts = {"train": count - sum((splits or {}).values()), **(splits or {})}
    names = [split for split, number in parts.items() for _ in range(number)]
    with (root / "metadata.jsonl").open("w") as metadata:
        for k, split in enumerate(names):
            (root / "videos" / f"{k:05d}.mp4").write_bytes(content(k, size))
            os.utime(root / "videos" / f"{k:05d}.mp4", (k, k))
            row = {"file_name": f"{k:05d}.mp4", "caption": f"file {k}", "labels": {"odd": k % 2}, "split": split}
            metadata.write(json.dumps(row) + "\n")
    return root


def content(number: int, size: int = 200) -> bytes:
    return (b"%07d;" % number) * (size // 8 + number % 5)


def shards(root: Path, out: Path | str, shard_bytes: int = 30_000, **options) -> Path | str:
    ShardWriter(root, out, shard_bytes, **options)()
    return out


class RawShards(VideoShards):
    """Shards of files that are not videos: a clip has the number in its bytes and the epoch. The reader is real."""

    def _read(self, row: Row, clip: int, crop: int, epoch: int) -> dict:
        data = bytes(self.read(row))
        number = int(data[:7])
        assert data == content(number, 200)
        return {"video": torch.tensor([number]), "id": row.name, "epoch": epoch, **self._said(row)}


def files_of(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
