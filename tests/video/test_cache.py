"""Caches of processed videos: size limits, eviction order, damage, several processes."""

import contextlib
import errno
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import safetensors.torch
import torch

from blueberry_video.video import cache as cache_module
from blueberry_video.video.cache import Cache, CacheOptions, DiskCache, MemoryCache, cache_key


def entry(value: int, count: int = 100) -> dict[str, torch.Tensor]:
    return {"frames": torch.full((count,), value, dtype=torch.uint8)}


def value_of(found: tuple[dict[str, torch.Tensor], str] | None) -> int | None:
    return None if found is None else int(found[0]["frames"][0])


def aged(cache: DiskCache, *keys: str) -> None:
    """Sets ascending modification times in the past on the files of ``keys``."""
    for i, key in enumerate(keys):
        os.utime(cache.path(key), (1000 + i, 1000 + i))


# keys


def test_a_key_depends_on_content_settings_and_versions():
    settings = {"fps": 2.0, "size": [224, 224], "model": {"name": "a"}}
    key = cache_key("c0", settings, {"av": "18.1"})
    different = [
        cache_key("c1", settings, {"av": "18.1"}),
        cache_key("c0", {**settings, "fps": 1.0}, {"av": "18.1"}),
        cache_key("c0", {**settings, "model": {"name": "b"}}, {"av": "18.1"}),
        cache_key("c0", {**settings, "new": None}, {"av": "18.1"}),
        cache_key("c0", settings, {"av": "18.2"}),
        cache_key("c0", settings, {"av": "18.1", "torch": "2"}),
    ]
    assert len({key, *different}) == 7
    assert key == cache_key("c0", dict(reversed(settings.items())), {"av": "18.1"})
    assert len(key) == 64


def test_settings_that_are_not_json_raise():
    with pytest.raises(TypeError, match=r"settings .*JSON.*object"):
        cache_key("c", {"hook": object()}, {})


# options


@pytest.mark.parametrize(
    ("wrong", "expected"),
    [
        ({"cache_memory_bytes": -1}, "cache_memory_bytes=-1"),
        ({"cache_disk_bytes": 0}, "cache_disk_bytes=0"),
        ({"cache_folder": ""}, 'cache_folder=""'),
    ],
)
def test_invalid_options_raise(wrong: dict, expected: str):
    with pytest.raises(ValueError, match=expected):
        CacheOptions(**wrong)


# memory


def test_memory_evicts_the_least_recently_used():
    cache = MemoryCache(350)
    for number in range(3):
        cache.put(str(number), entry(number), "")
    assert value_of(cache.get("0")) == 0  # now 1 is the oldest
    cache.put("3", entry(3), "")
    assert [value_of(cache.get(key)) for key in "0123"] == [0, None, 2, 3]
    assert (len(cache), cache.used_bytes) == (3, 300)
    cache.put("0", entry(9, 50), "m" * 10)
    assert (value_of(cache.get("0")), cache.used_bytes) == (9, 260)
    cache.put("2", entry(0, 1000), "")  # larger than max_bytes: not stored, and the old entry is removed
    assert (cache.get("2"), cache.used_bytes) == (None, 160)


def test_entries_are_copies():
    cache = MemoryCache(1000)
    tensors = entry(1)
    cache.put("a", tensors, "")
    tensors["frames"][:] = 2
    found = cache.get("a")
    assert value_of(found) == 1
    found[0]["frames"][:] = 3
    found[0].clear()
    assert value_of(cache.get("a")) == 1


# disk


def test_disk_round_trip(tmp_path: Path):
    tensors = {
        "uint8": torch.arange(24, dtype=torch.uint8).reshape(2, 3, 4),
        "transposed": torch.arange(6.0).reshape(2, 3).T,
        "half": torch.tensor([1.5, -2.0], dtype=torch.bfloat16),
        "scalar": torch.tensor(7.0, dtype=torch.float64),
        "empty": torch.zeros(0, 3),
        "mask": torch.tensor([True, False]),
    }
    tensors["shared"] = tensors["uint8"][1]
    metadata = '{"title": "ü \\"crc32\\":\\"00000000\\""}'
    cache = DiskCache(tmp_path / "new" / "folder")
    cache.put('key "crc32":"00000000"', tensors, metadata)
    found, text = cache.get('key "crc32":"00000000"')
    assert text == metadata
    assert found.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert found[name].dtype == tensor.dtype
        assert torch.equal(found[name], tensor)
    assert safetensors.torch.load_file(cache.path('key "crc32":"00000000"')).keys() == tensors.keys()


def test_a_flipped_bit_or_a_truncated_file_is_a_miss(tmp_path: Path):
    cache = DiskCache(tmp_path)
    cache.put("a", entry(5, 40), "text")
    whole = cache.path("a").read_bytes()
    for position in range(len(whole)):
        damaged = bytearray(whole)
        damaged[position] ^= 1 << (position % 8)
        cache.path("a").write_bytes(damaged)
        assert cache.get("a") is None, f"byte {position}"
        assert not cache.path("a").exists()
    for length in (0, 4, 60, len(whole) - 1):
        cache.path("a").write_bytes(whole[:length])
        assert cache.get("a") is None
    cache.path("a").write_bytes(whole)
    assert value_of(cache.get("a")) == 5


def test_a_file_with_a_different_key_is_a_miss(tmp_path: Path):
    cache = DiskCache(tmp_path)
    cache.put("a", entry(5), "")
    cache.path("a").rename(cache.path("b"))
    assert cache.get("b") is None


def test_disk_evicts_the_least_recently_used(tmp_path: Path):
    size = DiskCache(tmp_path / "one")
    size.put("0", entry(0), "")
    cache = DiskCache(tmp_path / "all", max_bytes=int(3.5 * size.path("0").stat().st_size))
    for number in range(3):
        cache.put(str(number), entry(number), "")
    aged(cache, "0", "1", "2")
    assert value_of(cache.get("0")) == 0  # now 1 is the oldest
    abandoned, fresh = tmp_path / "all" / "old.tmp", tmp_path / "all" / "new.tmp"
    for file in (abandoned, fresh):
        file.write_bytes(b"half")
    os.utime(abandoned, (1000, 1000))
    cache.put("3", entry(3), "")
    assert [value_of(cache.get(key)) for key in "0123"] == [0, None, 2, 3]
    assert fresh.exists()
    assert not abandoned.exists()
    cache.put("2", entry(0, 10_000), "")  # larger than max_bytes: not stored, and the old entry is removed
    assert [value_of(cache.get(key)) for key in "0123"] == [0, None, None, 3]


def test_a_full_disk_raises_and_leaves_no_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(cache_module.os, "fsync", full)
    cache = Cache(CacheOptions(cache_memory_bytes=1000, cache_folder=str(tmp_path)))
    with pytest.raises(
        OSError, match=rf"cache_folder={re.escape(str(tmp_path))} .*disk is full.*cache_disk_bytes"
    ) as raised:
        cache.put("a", entry(1), "")
    assert raised.value.errno == errno.ENOSPC
    assert list(tmp_path.iterdir()) == []
    assert value_of(cache.get("a")) == 1  # from memory


def test_an_invalid_folder_raises_on_put_and_is_a_miss_on_get(tmp_path: Path):
    (tmp_path / "file").write_text("")
    cache = DiskCache(tmp_path / "file" / "folder")
    assert cache.get("a") is None
    with pytest.raises(OSError, match=r"cache_folder=.*file/folder "):
        cache.put("a", entry(1), "")


WRITER = """
import sys, torch
from blueberry_video.video.cache import DiskCache
cache = DiskCache(sys.argv[1], int(sys.argv[3]))
print("ready", flush=True)
for round in range(int(sys.argv[2])):
    cache.put("same", {"frames": torch.full((200_000,), round % 200, dtype=torch.uint8)}, "")
    cache.put(f"other {round % 5}", {"frames": torch.zeros(200_000, dtype=torch.uint8)}, "")
"""


def writer(folder: Path, rounds: int) -> subprocess.Popen:
    command = [sys.executable, "-c", WRITER, str(folder), str(rounds), "700000"]
    started = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert started.stdout.readline() == "ready\n"
    return started


def test_processes_share_a_folder_without_partial_files(tmp_path: Path):
    cache = DiskCache(tmp_path)
    writers = [writer(tmp_path, 60) for _ in range(2)]
    read = 0
    while any(process.poll() is None for process in writers) or not read:
        with contextlib.suppress(FileNotFoundError):  # not yet written, or evicted
            assert cache_module._verified(cache.path("same").read_bytes()) is not None
            read += 1
        found = cache.get("same")
        assert found is None or bool((found[0]["frames"] == found[0]["frames"][0]).all())
    for process in writers:
        process.stdout.close()
        assert process.wait() == 0
    assert sum(file.stat().st_size for file in tmp_path.glob("*.safetensors")) <= 700_000


STUCK_WRITER = """
import os, sys, time, torch
from blueberry_video.video.cache import DiskCache
def stuck(descriptor):
    print("writing", flush=True)
    time.sleep(60)
os.fsync = stuck
DiskCache(sys.argv[1]).put("a", {"frames": torch.zeros(1000)}, "")
"""


def test_a_killed_writer_leaves_the_previous_entry(tmp_path: Path):
    cache = DiskCache(tmp_path)
    cache.put("a", entry(1), "")
    process = subprocess.Popen([sys.executable, "-c", STUCK_WRITER, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "writing\n"
    process.kill()
    process.wait()
    process.stdout.close()
    assert value_of(cache.get("a")) == 1
    cache.path("a").unlink()
    assert [file.suffix for file in tmp_path.iterdir()] == [".tmp"]
    assert cache.get("a") is None


# two levels


def test_entries_found_on_disk_are_stored_in_memory(tmp_path: Path):
    options = CacheOptions(cache_memory_bytes=1000, cache_folder=str(tmp_path))
    Cache(options).put("a", entry(4), "text")
    cache = Cache(options)
    found = cache.get("a")
    assert (value_of(found), found[1]) == (4, "text")
    found[0]["frames"][:] = 9
    cache.disk.path("a").unlink()
    assert value_of(cache.get("a")) == 4
    assert Cache(options).get("a") is None


def test_a_disabled_cache_stores_nothing(tmp_path: Path):
    cache = Cache(CacheOptions(cache_memory_bytes=0))
    cache.put("a", entry(4), "text")
    assert cache.get("a") is None
