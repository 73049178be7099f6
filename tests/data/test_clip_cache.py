"""Clip cache: each clip is computed once, reads back identically, and damaged shards are rebuilt."""

import multiprocessing
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader, Dataset

from blueberry_video.data.clip_cache import CachedClips
from blueberry_video.data.sprites import Sprites
from blueberry_video.data.video_folder import VideoFolder
from blueberry_video.data.write import write_video


class Counted(Dataset):
    """Dataset with all kinds of values, which logs to a file (for other processes) the clips that it computes."""

    def __init__(self, log: Path, size: int = 10, key: str = "counted"):
        self.log, self.size, self.cache_key = log, size, key
        self.classes = {"motion": ("left", "right")}
        self.reversal_pairs = {"motion": ((0, 1),)}

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, index: int) -> dict:
        with self.log.open("a") as log:
            log.write(f"{index}\n")
        rng = torch.Generator().manual_seed(index)
        return {
            "video": torch.randint(256, (4, 3, 6 + index % 2, 8), dtype=torch.uint8, generator=rng),
            "depth": torch.rand(4, 6, 8, generator=rng),
            "mask": torch.tensor([True, False]),
            "actions": torch.arange(3) + index,
            "empty": torch.zeros(0, 2),
            "scalar": torch.tensor(1.5),
            "labels": {"motion": index % 2},
            "caption": f"clip “{index}”",
            "fps": 8.5,
            "id": str(index),
        }

    def computed(self) -> list[int]:
        return sorted(int(line) for line in self.log.read_text().split()) if self.log.exists() else []


def equal(a: dict, b: dict) -> bool:
    assert list(a) == list(b)
    for key, value in a.items():
        if isinstance(value, torch.Tensor):
            assert value.dtype == b[key].dtype
            assert torch.equal(value, b[key])
        else:
            assert value == b[key]
    return True


def test_clips_are_identical_and_computed_once(tmp_path: Path):
    source = Counted(tmp_path / "log")
    cached = CachedClips(source, tmp_path / "cache", shard_size=4)
    assert len(cached) == 10
    assert cached.classes == source.classes
    assert cached.reversal_pairs == source.reversal_pairs
    for clips in (cached, CachedClips(source, tmp_path / "cache", shard_size=4)):
        assert all(equal(clips[i], Counted(tmp_path / "other")[i]) for i in reversed(range(10)))
    assert source.computed() == list(range(10))
    first = cached[0]["video"]
    first.zero_()  # the returned tensors are copies
    assert cached[0]["video"].any()
    with pytest.raises(IndexError):
        cached[10]


def test_prepare_builds_missing_shards_in_parallel(tmp_path: Path, capfd: pytest.CaptureFixture[str]):
    source = Counted(tmp_path / "log")
    cached = CachedClips(source, tmp_path / "cache", shard_size=3)
    assert cached[4]["id"] == "4"
    assert source.computed() == [3, 4, 5]
    cached.prepare(num_workers=2)
    assert source.computed() == list(range(10))
    assert "7 of 7" in capfd.readouterr().err
    cached.prepare(num_workers=2)
    assert source.computed() == list(range(10))
    assert capfd.readouterr().err == ""


def test_different_keys_and_sizes_are_separate(tmp_path: Path):
    small = CachedClips(Counted(tmp_path / "log", size=6), tmp_path / "cache", shard_size=4)
    large = CachedClips(Counted(tmp_path / "log2", size=10), tmp_path / "cache", shard_size=4)
    other = CachedClips(Counted(tmp_path / "log3", key="other"), tmp_path / "cache", shard_size=4)
    for clips in (small, large, other):
        assert [clips[i]["id"] for i in range(len(clips))] == [str(i) for i in range(len(clips))]
    assert large.dataset.computed() == list(range(4, 10))  # the first shard is shared
    assert other.dataset.computed() == list(range(10))


@pytest.mark.parametrize("damage", ["torn", "flipped", "empty", "foreign", "header"])
def test_damaged_shard_is_rebuilt(tmp_path: Path, damage: str):
    source = Counted(tmp_path / "log")
    cached = CachedClips(source, tmp_path / "cache", shard_size=4)
    cached.prepare()
    shard = sorted(cached.folder.glob("*.clips"))[1]
    whole = shard.read_bytes()
    middle = len(whole) // 2
    shard.write_bytes(
        {
            "torn": whole[:middle],
            "flipped": whole[:middle] + bytes([whole[middle] ^ 1]) + whole[middle + 1 :],
            "empty": b"",
            "foreign": b"\xff" * 5000,
            "header": whole[:8] + b"\xff" * 8 + whole[16:],
        }[damage]
    )
    assert equal(CachedClips(source, tmp_path / "cache", shard_size=4)[5], Counted(tmp_path / "other")[5])
    assert source.computed() == sorted([*range(10), *range(4, 8)])
    assert shard.read_bytes() == whole


def _read_all(cached: CachedClips, order: list[int], results) -> None:
    torch.set_num_threads(1)
    results.put(all(equal(cached[i], Counted(Path("/dev/null"))[i]) for i in order))


def test_processes_build_concurrently(tmp_path: Path):
    source = Counted(tmp_path / "log")
    cached = CachedClips(source, tmp_path / "cache", shard_size=2)
    context = multiprocessing.get_context("fork")
    results = context.Queue()
    orders = [np.random.default_rng(seed).permutation(10).tolist() for seed in range(4)]
    processes = [context.Process(target=_read_all, args=(cached, order, results)) for order in orders]
    for process in processes:
        process.start()
    assert all(results.get(timeout=60) for _ in processes)
    for process in processes:
        process.join()
    assert source.computed() == list(range(10))  # one process builds a shard, the others wait
    assert not list(cached.folder.glob("*.tmp"))


def test_dataloader_workers_read_the_cache(tmp_path: Path):
    cached = CachedClips(Sprites("train", 40, image_size=16), tmp_path, shard_size=16)
    batches = list(DataLoader(cached, batch_size=8, num_workers=2))
    direct = list(DataLoader(cached.dataset, batch_size=8))
    assert all(torch.equal(a["video"], b["video"]) and a["id"] == b["id"] for a, b in zip(batches, direct, strict=True))


def test_skipped_files_are_listed_from_a_complete_cache(tmp_path: Path):
    (tmp_path / "videos").mkdir()
    for k in range(4):
        write_video(tmp_path / "videos" / f"{k}.mp4", np.full((4, 16, 16, 3), 9 * k, np.uint8), fps=4)
    (tmp_path / "videos" / "2.mp4").write_bytes(b"damaged")

    def cached(run: str, share: float = 0.5) -> CachedClips:
        folder = VideoFolder(tmp_path, 2, metadata="none", max_broken_share=share)
        clips = CachedClips(folder, tmp_path / "cache", shard_size=2)
        clips.skipped_file = str(tmp_path / run)
        return clips

    cached("first.csv").prepare()
    clips = cached("second.csv")
    assert [clips[i]["id"] for i in range(4)] == ["0.mp4", "1.mp4", "3.mp4", "3.mp4"]
    assert clips.skipped_file == str(tmp_path / "second.csv")
    assert "2.mp4" in (tmp_path / "second.csv").read_text()
    with pytest.raises(RuntimeError, match=r"\b1 of 4\b.*max_broken_share=0\.1"):
        cached("third.csv", share=0.1)[3]


def test_datasets_that_cannot_be_cached_raise(tmp_path: Path):
    source = Counted(tmp_path / "log")
    del source.cache_key
    with pytest.raises(ValueError, match=r"Counted.*cache_key"):
        CachedClips(source, tmp_path)
    source.cache_key, source.varies_by_epoch = "key", True
    with pytest.raises(ValueError, match=r"Counted.*varies_by_epoch=True"):
        CachedClips(source, tmp_path)
    with pytest.raises(ValueError, match="shard_size=0"):
        CachedClips(Sprites("train", 4), tmp_path, shard_size=0)
