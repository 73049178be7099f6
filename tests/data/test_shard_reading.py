"""Order, cache and remote reads of tar shards, with the real sampler, DataModule and reader."""

import itertools
import multiprocessing
import os
import pickle
import random
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from shard_folders import RawShards, content, files_of, shards, write_files
from torch.utils.data import DataLoader

import blueberry_video.data.shard_store as stores
from blueberry_video.data.batches import WindowedTrainBatches
from blueberry_video.data.datamodule import DataModule
from blueberry_video.data.shard_cache import locked
from blueberry_video.data.shard_store import Store
from blueberry_video.data.shards import ShardWriter
from blueberry_video.data.video_shards import VideoShards

CLIPS = 10_000


@pytest.fixture(scope="module")
def many(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """10,000 clips in 51 shards."""
    folder = tmp_path_factory.mktemp("many")
    return Path(shards(write_files(folder / "in", CLIPS), folder / "out", 600_000))


def rank_data(clips: RawShards, rank: int, world_size: int, num_workers: int) -> DataModule:
    """DataModule of one rank, with a global batch of 100 clips."""
    data = DataModule(clips, clips, 100 // world_size, num_workers, seed=7)
    progress = SimpleNamespace(current=SimpleNamespace(processed=0))
    loop = SimpleNamespace(epoch_loop=SimpleNamespace(batch_progress=progress))
    data.trainer = SimpleNamespace(  # what the DataModule reads of the Trainer
        global_rank=rank, world_size=world_size, num_training_batches=len(clips) // 100, fit_loop=loop
    )
    return data


def read(data: DataModule, epoch: int, count: int | None = None) -> list[list[int]]:
    """Numbers in the clips of the next ``count`` batches of an epoch, or of all that remain."""
    loader = data.train_dataloader()
    loader.batch_sampler.set_epoch(epoch)
    shown = []
    for batch in itertools.islice(loader, count):
        assert batch["epoch"].unique().tolist() == [epoch]
        assert batch["labels"]["odd"].tolist() == [int(n) % 2 for n in batch["video"]]
        shown.append(batch["video"].flatten().tolist())
    data.trainer.fit_loop.epoch_loop.batch_progress.current.processed = len(shown)
    return shown


def joined(ranks: list[list[list[int]]]) -> list[list[int]]:
    """Global batches: the batches of all ranks at the same step."""
    return [list(itertools.chain(*batches)) for batches in zip(*ranks, strict=True)]


@pytest.mark.parametrize(("size", "window"), [(CLIPS, None), (1000, 3)])
def test_stopped_on_four_ranks_and_resumed_on_two_shows_every_clip_once(
    request: pytest.FixtureRequest, tmp_path: Path, size: int, window: int | None
):
    """4 ranks x 2 workers, stopped at a random step of epoch 1, continued by 2 ranks x 1 worker into epoch 2.

    The cache holds a quarter of the clips, so that files are removed while other processes read them.
    """
    if size == CLIPS:
        out = request.getfixturevalue("many")
    else:
        out = shards(write_files(tmp_path / "in", size), tmp_path / "out", 200_000)
    steps = size // 100
    step = random.Random(size).randrange(1, steps)
    how = {"cache": str(tmp_path / "cache"), "cache_gb": size / 1e6, "seed": 7, "shuffle_window": window}
    states, parts = [], []
    for rank in range(4):
        data = rank_data(RawShards(out, 4, **how), rank, 4, num_workers=2)
        parts.append(read(data, 1, step))
        states.append(data.state_dict())
    assert states[0] == states[1] == states[2] == states[3]
    assert (states[0]["epoch"], states[0]["batches"]) == (1, step)
    after, following = [], []
    for rank in range(2):
        data = rank_data(RawShards(out, 4, **how), rank, 2, num_workers=1)
        data.load_state_dict(pickle.loads(pickle.dumps(states[0])))
        after.append(read(data, 1))
        following.append(read(data, 2, 3))
    shown = joined(parts) + joined(after)
    assert len(shown) == steps
    assert sorted(itertools.chain(*shown)) == list(range(size))
    expected = RawShards(out, 4, **how).train_batches(100, seed=7)  # one process has the same global batches
    assert shown == [batch.tolist() for batch in expected.global_batches(1)]
    assert joined(following) == [batch.tolist() for batch in expected.global_batches(2)][:3]


def test_shuffle_window_reads_few_shards_at_a_time(many: Path):
    clips = RawShards(many, 4, shuffle_window=3)
    batches = clips.train_batches(100, seed=0)
    shard_of = np.searchsorted(clips.index.starts, np.arange(CLIPS), "right") - 1
    epochs = [list(batches.global_batches(epoch)) for epoch in (0, 0, 1)]
    assert all((a == b).all() for a, b in zip(epochs[0], epochs[1], strict=True))
    assert sorted(np.concatenate(epochs[0])) == list(range(CLIPS))
    assert not all((a == b).all() for a, b in zip(epochs[0], epochs[2], strict=True))
    assert max(len(set(shard_of[batch])) for batch in epochs[0]) <= 6
    full = RawShards(many, 4).train_batches(100, seed=0)
    assert min(len(set(shard_of[batch])) for batch in full.global_batches(0)) > 25
    assert "shuffle_window" not in full.order  # as in checkpoints of folders
    assert batches.order["shuffle_window"] == 3


def test_windows_with_and_without_a_last_batch():
    clips, counts = np.arange(20, 43), np.array([5, 9, 9])
    for drop_last, expected in ((True, [4] * 5), (False, [4] * 5 + [3])):
        batches = WindowedTrainBatches(clips, counts, 2, 2, seed=1, world_size=2, drop_last=drop_last)
        shown = list(batches.global_batches(3))
        assert [len(batch) for batch in shown] == expected
        assert len(batches) == len(expected)
        assert len(set(np.concatenate(shown))) == sum(expected)


def test_split_and_multi_clip_indices_follow_the_shards(tmp_path: Path):
    out = shards(write_files(tmp_path / "in", 40, {"val": 17}), tmp_path / "out")
    for split, size in (("train", 23), ("val", 17), (None, 40)):
        clips = RawShards(out, 4, split=split, sampler="multi_clip", num_clips=2, shuffle_window=1)
        batches = clips.train_batches(4, seed=0, drop_last=False)
        shown = [[clips.rows[i // 2].shard for i in batch] for batch in batches.global_batches(0)]
        assert sum(map(len, shown)) == 2 * size
        changes = [a != b for a, b in itertools.pairwise(itertools.chain(*shown))]
        assert sum(changes) == len({row.shard for row in clips.rows}) - 1  # each shard is read once
        assert clips.describe().startswith(f"{2 * size} clips of {out} (")


def use_cache(out: Path, cache: Path, fetch: str, seed: int, largest) -> None:
    clips = RawShards(out, 4, cache=str(cache), cache_gb=CAPACITY / 1e9, cache_fetch=fetch)
    for number in np.random.default_rng(seed).permutation(len(clips)):
        assert clips[int(number)]["video"].item() == number
        if number % 4 == 0:
            with locked(clips._cache.top / ".used"):  # no file is added or removed meanwhile
                largest.value = max(largest.value, clips._cache.used())


CAPACITY = 200_000


@pytest.mark.parametrize("fetch", ["clip", "shard"])
def test_processes_share_a_cache_within_its_limit(tmp_path: Path, fetch: str):
    out = Path(shards(write_files(tmp_path / "in", 160), tmp_path / "out"))
    context = multiprocessing.get_context("fork")
    largest = context.Value("q", 0)
    processes = [
        context.Process(target=use_cache, args=(out, tmp_path / "cache", fetch, seed, largest)) for seed in range(3)
    ]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [0] * 3
    assert CAPACITY / 2 < largest.value <= 1.05 * CAPACITY  # blocks of metadata


@pytest.mark.parametrize("fetch", ["clip", "shard"])
def test_cached_clips_are_read_from_the_cache(tmp_path: Path, fetch: str, monkeypatch: pytest.MonkeyPatch):
    out = Path(shards(write_files(tmp_path / "in", 40), tmp_path / "out"))
    requests: list[tuple] = []
    for name in ("read", "download"):
        original = getattr(Store, name)

        def counted(self, file, *arguments, original=original, name=name):
            requests.append((name, file))
            return original(self, file, *arguments)

        monkeypatch.setattr(Store, name, counted)
    how = {"cache": str(tmp_path / "cache"), "cache_fetch": fetch, "split": "train"}
    clips = RawShards(out, 4, **how)
    assert requests == [("read", "manifest.json"), ("download", "index.safetensors")]
    requests.clear()
    for _ in range(2):
        assert [clips[i]["video"].item() for i in range(40)] == list(range(40))
    assert len(requests) == (40 if fetch == "clip" else 5)
    requests.clear()
    again = pickle.loads(pickle.dumps(RawShards(out, 4, **how)))
    assert [again[i]["video"].item() for i in range(40)] == list(range(40))
    assert requests == [("read", "manifest.json")]
    for cached in (tmp_path / "cache").glob("*/*.tar"):  # half written, damaged and emptied files are read again
        data = cached.read_bytes()
        cached.write_bytes(data.replace(content(12), content(12)[:-4] + bytes(4))[: len(data) // 2])
    assert [again[i]["video"].item() for i in range(40)] == list(range(40))
    assert 5 < len(requests) < 40


def test_a_full_disk_of_the_cache_is_reported_once(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    out = Path(shards(write_files(tmp_path / "in", 20), tmp_path / "out"))
    clips = RawShards(out, 4, cache=str(tmp_path / "cache"))
    capsys.readouterr()

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "pwrite", full)
    assert [clips[i]["video"].item() for i in range(20)] == list(range(20))
    assert capsys.readouterr().err.count("cache_gb=100") == 1


def test_memory_of_the_index(tmp_path: Path):
    """The columns of an index, without names and captions, have 28 bytes a clip and 4 a label."""
    clips = RawShards(shards(write_files(tmp_path / "in", 100), tmp_path / "out"), 4)
    texts = sum(len(f"{k:05d}.mp4") + len(f"file {k}") for k in range(100))
    assert clips.index.nbytes == 100 * (8 + 8 + 4 + 8 + 8 + 4) + texts
    assert len(pickle.dumps(clips)) < 5000  # a worker that is not forked maps the file again


# ---- remote stores ---------------------------------------------------------------------------------------------------


def test_memory_store(tmp_path: Path):
    root = write_files(tmp_path / "in", 60, {"val": 10})
    whole = files_of(Path(shards(root, tmp_path / "whole")))
    del whole[".lock"]
    url = str(shards(root, "memory://bucket/set"))
    store = Store(url)
    assert {name: store.read(name) for name in store.sizes()} == whole
    assert not ShardWriter(root, url, 30_000)()
    clips = RawShards(url, 4, split="val")
    assert [clip["video"].item() for clip in DataLoader(clips, batch_size=None, num_workers=1)] == list(range(50, 60))
    store.remove("train-000001.tar")
    with pytest.raises(FileNotFoundError, match=r"memory://bucket/set/train-000001\.tar"):
        RawShards(url, 4)
    assert ShardWriter(root, url, 30_000)()
    assert {name: store.read(name) for name in store.sizes()} == whole
    other = write_files(tmp_path / "other", 61)
    with pytest.raises(FileExistsError, match=r"out=memory://bucket/set .*num_clips was 60 and is 61"):
        ShardWriter(other, url, 30_000)()


def test_failed_requests_are_repeated(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    url = str(shards(write_files(tmp_path / "in", 10), "memory://repeated"))
    clips = RawShards(url, 4)
    waits: list[float] = []
    monkeypatch.setattr(stores.time, "sleep", waits.append)
    fails = iter([TimeoutError("slow"), ConnectionResetError("reset"), OSError("503 slow down")] * 9)
    left = 3
    filesystem = clips.store._remote()
    original = type(filesystem).cat_file

    def failing(self, *arguments, **options):
        nonlocal left
        left -= 1
        if left >= 0:
            raise next(fails)
        return original(self, *arguments, **options)

    monkeypatch.setattr(type(filesystem), "cat_file", failing)
    assert clips[2]["video"].item() == 2
    assert len(waits) == 3
    assert waits[0] < waits[1] < waits[2]
    assert "trying again" in capsys.readouterr().err
    left = 100
    with pytest.raises(ConnectionError, match=r"memory://repeated/train-000000\.tar failed 7 times .*resume=last"):
        clips[3]
    assert not clips.skipped


@pytest.fixture
def s3(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """URL of a bucket of an S3 server on loopback."""
    why = "the S3 server needs moto, flask and s3fs"
    pytest.importorskip("flask", reason=why)
    pytest.importorskip("flask_cors", reason=why)
    s3fs = pytest.importorskip("s3fs", reason=why)
    pytest.importorskip("moto", reason=why)
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer("127.0.0.1", 0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://{host}:{port}")
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.setenv(name, "test")
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    s3fs.S3FileSystem.clear_instance_cache()
    Store("s3://videos")._remote().mkdir("videos")
    yield "s3://videos/set"
    server.stop()
    s3fs.S3FileSystem.clear_instance_cache()


def test_s3(s3: str, tmp_path: Path):
    root = write_files(tmp_path / "in", 60, {"val": 10})
    whole = files_of(Path(shards(root, tmp_path / "whole")))
    del whole[".lock"]
    shards(root, s3)
    store = Store(s3)
    assert {name: store.read(name) for name in store.sizes()} == whole
    for options in ({}, {"cache": str(tmp_path / "clip")}, {"cache": str(tmp_path / "shard"), "cache_fetch": "shard"}):
        clips = RawShards(s3, 4, split="train", **options)
        for workers in (0, 2):
            loader = DataLoader(clips, batch_size=None, num_workers=workers)
            assert [clip["video"].item() for clip in loader] == list(range(50))
    store._remote().rm(f"{s3}/train-000000.tar")
    with pytest.raises(RuntimeError, match=r"s3://videos/set/train-000000\.tar .*restore the shard"):
        RawShards.__getitem__(clips := VideoShardsWithoutCheck(s3, 4, split="train"), 0)
    assert not clips.skipped
    with pytest.raises(FileNotFoundError, match=r"s3://videos/set/train-000000\.tar, which manifest\.json lists"):
        RawShards(s3, 4)
    with pytest.raises(FileNotFoundError, match=r"there is no s3://videos/other/manifest\.json"):
        RawShards("s3://videos/other", 4)


class VideoShardsWithoutCheck(RawShards):
    """Shards that vanish after the start."""

    def _check_shards(self) -> None: ...


def test_a_store_without_its_package_raises(monkeypatch: pytest.MonkeyPatch):
    def missing(protocol: str):
        raise ImportError("Install s3fs to access S3")

    monkeypatch.setattr(stores.fsspec, "filesystem", missing)
    with pytest.raises(ImportError, match=r"s3://bucket/set .*pip install.*s3"):
        VideoShards("s3://bucket/set", 4)
