"""Tar shards: the writer, and clips equal to those of the folder."""

import errno
import json
import multiprocessing
import os
import re
import shutil
import signal
import subprocess
import sys
import tarfile
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from shard_folders import RawShards, content, files_of, shards, write_files
from torch.utils.data import DataLoader

import blueberry_video.data.shards as writing
from blueberry_video.data.buckets import VideoBuckets
from blueberry_video.data.shards import ShardWriter, main
from blueberry_video.data.video_folder import VideoFolder
from blueberry_video.data.video_shards import VideoShards
from blueberry_video.data.write import write_video


def write_videos(root: Path, names: list[str], frames: int = 12) -> Path:
    for k, name in enumerate(names):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        levels = 10 * k + 8 * np.arange(frames)[:, None, None, None] + np.arange(48)[:, None]
        pixels = np.broadcast_to(levels, (frames, 32, 48, 3)).astype(np.uint8)
        write_video(root / name, np.ascontiguousarray(pixels), 10)
    return root


def with_metadata(root: Path) -> Path:
    write_videos(root, [f"videos/{'a/' if k % 2 else ''}{k}.x.mp4" for k in range(7)])
    rows = [
        {
            "file_name": f"{'a/' if k % 2 else ''}{k}.x.mp4",
            "caption": f"clip {k}, größer",
            "labels": {"motion": "cba"[k % 3], "speed": 10 - k},
            "split": "val" if k in (0, 4) else "train",
        }
        for k in range(7)
    ]
    (root / "metadata.json").write_text(json.dumps(rows))
    named = {"classes": {"motion": ["c", "d", "b", "a"]}, "reversal_pairs": {"motion": [[0, 3]]}}
    (root / "classes.json").write_text(json.dumps(named))
    return root


def test_without_antialias_clips_are_those_of_the_folder(tmp_path: Path):
    folder, options = with_metadata(tmp_path / "folder"), {"num_frames": 4, "image_size": 16}
    shards(folder, tmp_path / "shards")
    plain, smooth = (VideoShards(tmp_path / "shards", **options, antialias=choice) for choice in (False, True))
    assert torch.equal(plain[2]["video"], VideoFolder(folder, **options, antialias=False)[2]["video"])
    assert not torch.equal(plain[2]["video"], smooth[2]["video"])
    assert plain.cache_key != smooth.cache_key


def class_folders(root: Path) -> Path:
    return write_videos(
        root, [f"{split}/{name}.mp4" for split in ("train", "val") for name in ("jump/0", "run/0", "run/1")]
    )


def assert_same_clips(folder: VideoFolder, read: VideoShards) -> None:
    assert len(folder) == len(read)
    assert (folder.classes, folder.reversal_pairs) == (read.classes, read.reversal_pairs)
    for i in range(len(folder)):
        a, b = folder.sample(i, epoch=2), read.sample(i, epoch=2)
        assert torch.equal(a.pop("video"), b.pop("video"))
        assert a == b


@pytest.mark.parametrize("split", ["train", "val", None])
def test_metadata_folder_gives_the_same_clips(tmp_path: Path, split: str | None):
    root, out = with_metadata(tmp_path / "in"), tmp_path / "out"
    shards(root, out, 12_000)
    assert len(list(out.glob("train-*.tar"))) == 3
    for options in ({}, {"sampler": "random", "stride": 2}, {"sampler": "multi_clip", "num_clips": 2, "num_crops": 3}):
        size = {"image_size": 16} if "num_crops" in options else {}
        how = {"num_frames": 4, "split": split, **options, **size}
        assert_same_clips(VideoFolder(root, **how), VideoShards(out, **how))
    assert VideoShards(out, 4, split=split).cache_key != VideoShards(out, 5, split=split).cache_key


def test_class_folders_and_folders_without_metadata_give_the_same_clips(tmp_path: Path):
    root = class_folders(tmp_path / "in")
    shards(root, tmp_path / "out")
    for split in ("train", "val"):
        read = VideoShards(tmp_path / "out", 4, split=split)
        assert_same_clips(VideoFolder(root, 4, split=split), read)
        assert read[0]["id"] == "jump/0.mp4"
    with pytest.raises(ValueError, match=r"split=null.*train, val"):
        VideoShards(tmp_path / "out", 4)
    with pytest.raises(ValueError, match=r"split='test' .*train, val"):
        VideoShards(tmp_path / "out", 4, split="test")
    shards(root / "train", tmp_path / "train")
    assert_same_clips(VideoFolder(root / "train", 4), VideoShards(tmp_path / "train", 4))
    write_videos(tmp_path / "bare", ["videos/0.mp4", "videos/1.avi"])
    shards(tmp_path / "bare", tmp_path / "bare_out", metadata="none")
    assert_same_clips(VideoFolder(tmp_path / "bare", 4, metadata="none"), VideoShards(tmp_path / "bare_out", 4))


def test_other_class_names_and_buckets(tmp_path: Path):
    root = with_metadata(tmp_path / "in")
    shards(root, tmp_path / "out")
    classes = {"motion": ["a", "b", "c"], "speed": [str(k) for k in range(11)]}
    read = VideoShards(tmp_path / "out", 4, split="train", classes=classes)
    assert_same_clips(VideoFolder(root, 4, split="train", classes=classes), read)
    assert read.classes["motion"] == ("a", "b", "c")
    with pytest.raises(ValueError, match=r"label motion .*\bc\b.*a, b\b"):
        VideoShards(tmp_path / "out", 4, split="train", classes={"motion": ["a", "b"]})
    pair = [
        VideoBuckets(dataset, [[5, 16, 16], [9, 32, 32]], [4, 16, 16], 40)
        for dataset in (VideoFolder(root, 1), VideoShards(tmp_path / "out", 1))
    ]
    assert pair[0].part_sizes == pair[1].part_sizes
    assert list(pair[0].captions()) == list(pair[1].captions())
    assert all(torch.equal(pair[0][i]["video"], pair[1][i]["video"]) for i in range(len(pair[0])))


def test_shards_are_plain_tar_files(tmp_path: Path):
    shards(with_metadata(tmp_path / "in"), tmp_path / "out", 12_000)
    listed = subprocess.run(
        ["tar", "tf", tmp_path / "out" / "train-000001.tar"], capture_output=True, text=True, check=True
    ).stdout.split()
    assert listed == [f"{k:09d}.{suffix}" for k in (2, 3) for suffix in ("json", "mp4")]
    with tarfile.open(tmp_path / "out" / "train-000001.tar") as archive:
        rows = [json.load(archive.extractfile(name)) for name in listed[::2]]
        videos = [archive.extractfile(name).read() for name in listed[1::2]]
    for row, video in zip(rows, videos, strict=True):
        assert video == (tmp_path / "in" / "videos" / row["file_name"]).read_bytes()
    labels = {"motion": rows[0]["labels"]["motion"], "speed": rows[0]["labels"]["speed"]}
    print(rows[0])
    assert rows[0] == {"file_name": "a/1.x.mp4", "split": "train", "caption": "clip 1, größer", "labels": labels}
    assert all(path.stat().st_size <= 12_000 for path in (tmp_path / "out").glob("*.tar"))
    subprocess.run(["sha256sum", "-c", "--quiet", "SHA256SUMS"], cwd=tmp_path / "out", check=True)


def test_webdataset_reads_the_shards(tmp_path: Path):
    webdataset = pytest.importorskip("webdataset", reason="webdataset is not installed")
    root = with_metadata(tmp_path / "in")
    shards(root, tmp_path / "out", 10**6)
    samples = list(webdataset.WebDataset(str(tmp_path / "out" / "train-000000.tar"), shardshuffle=False))
    assert [json.loads(sample["json"])["file_name"] for sample in samples] == [
        row.name for row in VideoFolder(root, 4, split="train").rows
    ]
    assert samples[0]["mp4"] == (root / "videos" / json.loads(samples[0]["json"])["file_name"]).read_bytes()


def write_until(root: Path, out: Path, place: str, count: int, workers: int) -> None:
    """Writes shards in a child process that kills itself at the given call of a method."""

    def child() -> None:
        original, calls = getattr(ShardWriter, place), 0

        def killed(self, *arguments):
            nonlocal calls
            calls += 1
            if calls == count:
                os.kill(os.getpid(), signal.SIGKILL)
            return original(self, *arguments)

        setattr(ShardWriter, place, killed)
        ShardWriter(root, out, 30_000, num_workers=workers)()

    process = multiprocessing.get_context("fork").Process(target=child)
    process.start()
    process.join()
    assert process.exitcode == -signal.SIGKILL


def test_a_killed_writer_continues_to_the_same_bytes(tmp_path: Path):
    root = write_files(tmp_path / "in", 100, {"val": 20})
    whole = files_of(Path(shards(root, tmp_path / "whole")))
    assert len([name for name in whole if name.endswith(".tar")]) == 12
    out = tmp_path / "out"
    kills = [("_append", 1, 1), ("_append", 30, 1), ("_put_part", 2, 1), ("_append", 17, 2), ("_write_index", 1, 2)]
    for place, count, workers in kills:
        write_until(root, out, place, count, workers)
        with pytest.raises(ValueError, match=r"\d+ of 12 shards.*index\.safetensors.*make shards"):
            VideoShards(out, 4)
        assert all(path.read_bytes() == whole[path.name] for path in out.glob("*.tar"))  # none is cut off
    stamps = {path.stem: (out / f"{path.stem}.tar").stat().st_mtime_ns for path in (out / "parts").glob("*")}
    assert len(stamps) == 12
    assert ShardWriter(root, out, 30_000)()
    assert files_of(out) == whole
    assert {name: (out / f"{name}.tar").stat().st_mtime_ns for name in stamps} == stamps  # none was written again
    assert not ShardWriter(root, out, 30_000)()


def test_a_removed_or_truncated_shard_is_written_again(tmp_path: Path):
    root = write_files(tmp_path / "in", 60)
    out = Path(shards(root, tmp_path / "out"))
    whole = files_of(out)
    (out / "train-000001.tar").unlink()
    os.truncate(out / "train-000003.tar", 1000)
    kept = (out / "train-000000.tar").stat().st_mtime_ns
    assert ShardWriter(root, out, 30_000)()
    assert files_of(out) == whole
    assert (out / "train-000000.tar").stat().st_mtime_ns == kept


def test_an_existing_folder_of_another_source_is_refused(tmp_path: Path):
    root = write_files(tmp_path / "in", 20)
    out = Path(shards(root, tmp_path / "out"))
    before = files_of(out)
    changed = write_files(tmp_path / "other", 20)
    os.utime(changed / "videos" / "00003.mp4", (5, 5))
    for source, shard_bytes, expected in (
        (changed, 30_000, "digest was"),
        (write_files(tmp_path / "third", 21), 30_000, "num_clips was 20 and is 21"),
        (root, 40_000, "shard_bytes was 30000 and is 40000"),
    ):
        with pytest.raises(FileExistsError, match=rf"out=.*/out\b.*{expected}"):
            ShardWriter(source, out, shard_bytes)()
    assert files_of(out) == before
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / ".thesis.tmp").write_text("years of work")
    with pytest.raises(FileExistsError, match=r"out=.*/mine\b.*thesis.*manifest\.json"):
        ShardWriter(root, tmp_path / "mine")()
    assert [path.name for path in (tmp_path / "mine").iterdir()] == [".thesis.tmp"]
    with pytest.raises(ValueError, match=r"out=.*/in\b"):
        ShardWriter(root, root)


def test_a_full_disk_keeps_the_finished_shards(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    root, out = write_files(tmp_path / "in", 60), tmp_path / "out"
    original, calls = ShardWriter._append, []

    def full(self, *arguments):
        calls.append(0)
        if len(calls) == 25:
            raise OSError(errno.ENOSPC, "No space left on device")
        return original(self, *arguments)

    monkeypatch.setattr(ShardWriter, "_append", full)
    with pytest.raises(OSError, match=r"out=.*/out\b.*free some space and repeat") as error:
        ShardWriter(root, out, 30_000, num_workers=1)()
    assert error.value.errno == errno.ENOSPC
    assert not list(out.glob(".*.tmp"))
    assert (out / "train-000000.tar").exists()
    monkeypatch.setattr(ShardWriter, "_append", original)
    monkeypatch.setattr(writing.shutil, "disk_usage", lambda _: SimpleNamespace(free=1))
    with pytest.raises(OSError, match=r"\bare needed and 1 are free"):
        ShardWriter(root, out, 30_000)()
    monkeypatch.undo()
    assert ShardWriter(root, out, 30_000)()
    assert files_of(out) == files_of(Path(shards(root, tmp_path / "whole")))


def test_a_file_that_changes_while_it_is_written_raises(tmp_path: Path):
    root = write_files(tmp_path / "in", 5)
    writer = ShardWriter(root, tmp_path / "out")
    (root / "videos" / "00002.mp4").write_bytes(b"shorter")
    with pytest.raises(ValueError, match=r"00002\.mp4 changed.*\b7 now"):
        writer()


def test_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    root = write_files(tmp_path / "in", 40)
    arguments = [str(root), "--out", str(tmp_path / "out"), "--shard-size", "30KB", "--workers", "1"]
    main(arguments)
    shown = capsys.readouterr()
    assert "40 clips in 5 shards" in shown.out
    assert "40 of 40 clips" in shown.err
    main(arguments)
    assert "there already" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--shard-size", "1GiB"], "'1GIB' .*500MB or 1GB|'1GiB' .*500MB or 1GB"),
        (["--shard-size", "1KB"], r"shard_size=1000\b.*10240"),
        (["--workers", "0"], r"workers=0\b.*1\b"),
        (["--metadata", "rows.csv"], r"rows\.csv"),
        (["--out", "http://host/x"], r"'http'.*s3://"),
        (["--out", "simplecache::s3://host/x"], r"s3://"),
    ],
)
def test_invalid_command_exits(tmp_path: Path, arguments: list[str], expected: str, capsys: pytest.CaptureFixture[str]):
    root = write_files(tmp_path / "in", 2)
    with pytest.raises(SystemExit) as error:
        main([str(root), "--out", str(tmp_path / "out"), *arguments])
    assert re.search(expected, f"{error.value} {capsys.readouterr().err}")
    assert not (tmp_path / "out").exists()


def damaged(tmp_path: Path) -> Path:
    return Path(shards(write_files(tmp_path / "in", 40), tmp_path / "out"))


def test_missing_and_truncated_shards_raise_at_the_start(tmp_path: Path):
    out = damaged(tmp_path)
    size = (out / "train-000001.tar").stat().st_size
    os.truncate(out / "train-000001.tar", size - 512)
    with pytest.raises(ValueError, match=rf"train-000001\.tar has {size - 512} bytes instead of {size}\b.*make shards"):
        RawShards(out, 4)
    (out / "train-000001.tar").unlink()
    with pytest.raises(FileNotFoundError, match=r"train-000001\.tar.*\b9 clips.*make shards"):
        RawShards(out, 4)
    (out / "index.safetensors").unlink()
    with pytest.raises(ValueError, match=r"4 of 5 shards.*index\.safetensors.*make shards"):
        RawShards(out, 4)
    (out / "manifest.json").write_text("[]")
    with pytest.raises(ValueError, match=r"manifest\.json.*make shards"):
        RawShards(out, 4)
    (out / "manifest.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"manifest\.json.*make shards.*data=video_folder"):
        RawShards(out, 4)


def test_another_or_truncated_index_raises(tmp_path: Path):
    out = damaged(tmp_path)
    other = Path(shards(write_files(tmp_path / "in2", 41), tmp_path / "out2"))
    good = (out / "index.safetensors").read_bytes()
    shutil.copy(other / "index.safetensors", out)
    with pytest.raises(ValueError, match=r"index\.safetensors .*41 clips.*40 clips.*make shards"):
        RawShards(out, 4)
    for length in (0, 5, 100, len(good) - 1):
        (out / "index.safetensors").write_bytes(good[:length])
        with pytest.raises(ValueError, match=r"index\.safetensors is truncated.*make shards"):
            RawShards(out, 4)


def test_shards_that_change_after_the_start_raise_and_are_not_skipped(tmp_path: Path):
    out = damaged(tmp_path)
    for change, expected in (
        (lambda path: path.unlink(), "restore the shard"),
        (lambda path: os.truncate(path, 5000), r"ends after \d+ of"),
        (lambda path: path.write_bytes(bytes(path.stat().st_size)), "no tar header"),
        (lambda path: shutil.copy(out / "train-000000.tar", path), r"000000000\.mp4 of .* there instead of 000000009"),
    ):
        clips = RawShards(out, 4, max_broken_share=1.0)
        path = out / "train-000001.tar"
        before = path.read_bytes()
        change(path)
        with pytest.raises(RuntimeError, match=rf"train-000001\.tar \(clip .*{expected}.*make shards"):
            [clips[i] for i in range(9, 18)]
        assert not clips.skipped
        path.unlink(missing_ok=True)
        path.write_bytes(before)


def flip(out: Path, number: int) -> None:
    """Changes a byte of a clip in its shard."""
    path = next(path for path in out.glob("*.tar") if content(number) in path.read_bytes())
    data = path.read_bytes()
    path.write_bytes(data.replace(content(number), content(number)[:-1] + b"?"))


def test_a_damaged_clip_is_replaced_listed_and_counted(tmp_path: Path):
    out = damaged(tmp_path)
    listing = tmp_path / "run" / "skipped.csv"
    flip(out, 3)
    flip(out, 17)
    clips = RawShards(out, 4, split="train", skipped_file=str(listing))
    shown = [clip["id"] for clip in DataLoader(clips, batch_size=None, num_workers=1)]
    assert shown[3] == shown[4] == "00004.mp4"
    assert shown[17] == "00018.mp4"
    assert [line.split(",")[1] for line in listing.read_text().splitlines()] == ["file", "00003.mp4", "00017.mp4"]
    assert "CRC-32" in listing.read_text()
    flip(out, 30)
    with pytest.raises(RuntimeError, match=r"3 of 40 video files .*max_broken_share=0\.05.*write the shards again"):
        [clips[i] for i in range(40)]


def test_a_broken_video_is_skipped_as_in_the_folder(tmp_path: Path):
    root = write_videos(tmp_path / "in", [f"videos/{k}.mp4" for k in range(4)])
    (root / "videos" / "1.mp4").write_bytes(b"damaged" * 99)
    (root / "videos" / "2.mp4").write_bytes(b"")
    shards(root, tmp_path / "out", metadata="none")
    folder = VideoFolder(root, 4, metadata="none", max_broken_share=0.5)
    read = VideoShards(tmp_path / "out", 4, max_broken_share=0.5)
    assert_same_clips(folder, read)
    assert set(read.skipped) == set(folder.skipped) == {"1.mp4", "2.mp4"}
    with pytest.raises(ValueError, match=r"0\.mp4: num_frames=16 .*data\.train\.pad=true"):
        VideoShards(tmp_path / "out", 16)[0]


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"shuffle_window": 0}, "shuffle_window=0 "),
        ({"cache": "c", "cache_gb": 0}, "cache_gb=0 .*cache=null"),
        ({"cache": "c", "cache_fetch": "all"}, "cache_fetch='all' "),
        ({"sampler": "fixed_fps"}, "fps=None"),
        ({"root": "https://host/folder"}, "'https'.*s3://, gs://"),
    ],
)
def test_invalid_arguments_raise(tmp_path: Path, options: dict, expected: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    shards(write_files(tmp_path / "in", 2), tmp_path / "out")
    with pytest.raises(ValueError, match=expected):
        VideoShards(**{"root": tmp_path / "out", "num_frames": 4, **options})


def test_the_command_starts(tmp_path: Path):
    help_text = subprocess.run(
        [sys.executable, "-m", "blueberry_video.data.shards", "--help"], capture_output=True, text=True, check=True
    ).stdout
    assert "--shard-size" in help_text
