"""Tests of video folders: complete, mislabeled and broken."""

import csv
import errno
import json
import multiprocessing
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

from blueberry_video.data.media_folder import _append_skipped
from blueberry_video.data.video_folder import VideoFolder
from blueberry_video.data.write import write_video
from blueberry_video.video.clip import load_clip

REAL = os.environ.get("BLUEBERRY_TEST_VIDEOS")


def make(root: Path, files: int = 4, frames: int = 12, rows: list[dict] | None = None, height: int = 32) -> Path:
    """Videos with gray level 10 · k + 8 · t in frame t of file k, and a metadata row for each."""
    (root / "videos").mkdir(parents=True)
    for k in range(files):
        levels = 10 * k + 8 * np.arange(frames)
        pixels = np.broadcast_to(levels[:, None, None, None].astype(np.uint8), (frames, height, 48, 3))
        write_video(root / "videos" / f"{k}.mp4", np.ascontiguousarray(pixels), fps=10)
    made = [
        {"file_name": f"videos/{k}.mp4", "caption": f"clip {k}", "labels": {"motion": "ba"[k % 2]}}
        for k in range(files)
    ]
    (root / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in (made if rows is None else rows)))
    return root


def frame_numbers(clip: dict, file: int = 0) -> list[int]:
    return [round((frame.float().mean().item() - 10 * file) / 8) for frame in clip["video"]]


def test_clip_matches_the_contract(tmp_path: Path):
    clips = VideoFolder(make(tmp_path), num_frames=4)
    clip = clips[1]
    assert (len(clips), clip["id"], clip["caption"], clip["labels"]) == (4, "1.mp4", "clip 1", {"motion": 0})
    assert clip["video"].dtype == torch.uint8
    assert clip["video"].shape == (4, 3, 32, 48)
    assert clip["fps"] == pytest.approx(3 / 1.1)  # frames 0, 4, 7 and 11 of a 10 fps video
    assert frame_numbers(clip, file=1) == [0, 4, 7, 11]
    assert clips.classes == {"motion": ("a", "b")}
    batch = next(iter(DataLoader(clips, batch_size=4)))
    assert batch["labels"]["motion"].tolist() == [1, 0, 1, 0]


def test_class_folders_with_and_without_split(tmp_path: Path):
    make(tmp_path / "made", files=3)
    for k, folder in enumerate(("train/jump", "train/run", "val/run")):
        (tmp_path / "data" / folder).mkdir(parents=True)
        (tmp_path / "made" / "videos" / f"{k}.mp4").rename(tmp_path / "data" / folder / f"{k}.mp4")
    train, val = (VideoFolder(tmp_path / "data", num_frames=2, split=split) for split in ("train", "val"))
    assert train.classes == val.classes == {"class": ("jump", "run")}
    assert [(clip["id"], clip["labels"]) for clip in train] == [
        ("jump/0.mp4", {"class": 0}),
        ("run/1.mp4", {"class": 1}),
    ]
    assert [(clip["id"], clip["labels"]) for clip in val] == [("run/2.mp4", {"class": 1})]
    assert VideoFolder(tmp_path / "data" / "train", num_frames=2).rows == train.rows


@pytest.mark.parametrize("form", ["json", "csv", "filename", "bare"])
def test_metadata_formats(tmp_path: Path, form: str):
    make(tmp_path, files=3)
    (tmp_path / "metadata.jsonl").unlink()
    rows = [
        {"file_name": f"{k}.mp4", "caption": f"c{k}", "labels": {"speed": 10 - k}, "split": "train"} for k in range(3)
    ]
    if form == "csv":
        lines = ["file_name,caption,labels.speed,split", *(f"videos/{k}.mp4,c{k},{10 - k},train" for k in range(3))]
        (tmp_path / "metadata.csv").write_text("\ufeff" + "\n".join(lines) + "\n", encoding="utf-8")
    elif form == "filename":
        listed = [{"filename" if key == "file_name" else key: value for key, value in row.items()} for row in rows]
        (tmp_path / "metadata.json").write_text(json.dumps(listed))
    elif form == "json":
        (tmp_path / "metadata.json").write_text(json.dumps(rows))
    else:
        clips = VideoFolder(tmp_path, 4, metadata="none")
        assert set(clips[2]) == {"video", "id", "fps"}
        return
    clips = VideoFolder(tmp_path, 4, split="train")
    assert clips.classes == {"speed": ("8", "9", "10")}  # numbers in order of value
    assert [clips[k]["labels"]["speed"] for k in range(3)] == [2, 1, 0]
    assert clips[1]["caption"] == "c1"


def test_classes_and_reversal_pairs_can_be_set(tmp_path: Path):
    make(tmp_path)
    assert VideoFolder(tmp_path, 4, classes={"motion": ["b", "a"]})[0]["labels"] == {"motion": 0}
    (tmp_path / "classes.json").write_text(
        '{"classes": {"motion": ["c", "b", "a"]}, "reversal_pairs": {"motion": [[1, 2]]}}'
    )
    clips = VideoFolder(tmp_path, 4)
    assert clips.classes == {"motion": ("c", "b", "a")}
    assert clips.reversal_pairs == {"motion": ((1, 2),)}
    assert clips[0]["labels"] == {"motion": 1}
    with pytest.raises(ValueError, match=r"motion\b.*'b'.*\ba, c\b"):
        VideoFolder(tmp_path, 4, classes={"motion": ["a", "c"]})
    (tmp_path / "classes.json").write_text("[]")
    with pytest.raises(ValueError, match=r"classes\.json"):
        VideoFolder(tmp_path, 4)


def test_splits_share_classes(tmp_path: Path):
    rows = [{"file_name": f"{k}.mp4", "label": "xyz"[k], "split": "val" if k == 2 else "train"} for k in range(3)]
    make(tmp_path, files=3, rows=rows)
    train, val = VideoFolder(tmp_path, 4, split="train"), VideoFolder(tmp_path, 4, split="val")
    assert (len(train), len(val)) == (2, 1)
    assert val[0]["labels"] == {"label": 2}
    assert train.classes == val.classes == {"label": ("x", "y", "z")}
    with pytest.raises(ValueError, match=r"split='test'.*train, val"):
        VideoFolder(tmp_path, 4, split="test")


def test_random_windows_depend_only_on_seed_epoch_and_file(tmp_path: Path):
    clips = VideoFolder(make(tmp_path), num_frames=3, sampler="random", stride=2)
    shown = {epoch: tuple(frame_numbers(clips.sample(1, epoch), file=1)) for epoch in range(12)}
    assert {window[2] - window[0] for window in shown.values()} == {4}
    assert len(set(shown.values())) > 3
    assert frame_numbers(clips[1], file=1) == list(shown[0])
    again = VideoFolder(tmp_path, num_frames=3, sampler="random", stride=2)
    assert tuple(frame_numbers(again.sample(1, 7), file=1)) == shown[7]
    other = VideoFolder(tmp_path, num_frames=3, sampler="random", stride=2, seed=1)
    assert [frame_numbers(other.sample(1, e), file=1) for e in range(12)] != [list(shown[e]) for e in range(12)]


def test_fixed_fps_and_multi_clip(tmp_path: Path):
    make(tmp_path, files=2)
    clip = VideoFolder(tmp_path, num_frames=3, sampler="fixed_fps", fps=5)[0]
    assert frame_numbers(clip) == [3, 5, 7]
    assert clip["fps"] == 5
    clips = VideoFolder(tmp_path, num_frames=4, sampler="multi_clip", num_clips=3)
    assert len(clips) == 6
    assert [clips[i]["id"] for i in range(6)] == ["0.mp4#0", "0.mp4#1", "0.mp4#2", "1.mp4#0", "1.mp4#1", "1.mp4#2"]
    assert [frame_numbers(clips[i], file=1) for i in (3, 4, 5)] == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9, 10, 11]]


def test_segments_are_one_clip_with_the_indices_of_its_frames(tmp_path: Path):
    clips = VideoFolder(make(tmp_path, files=2, frames=24), num_frames=3, sampler="segments", num_clips=2, stride=2)
    assert len(clips) == 2
    first, later = clips.sample(0, epoch=0), clips.sample(0, epoch=1)
    assert first["video"].shape[0] == 6
    assert frame_numbers(first) == first["frames"].tolist()
    assert max(first["frames"][:3]) < 12 <= min(first["frames"][3:])
    assert "#" not in first["id"]
    assert clips.varies_by_epoch
    drawn = [clips.sample(0, epoch)["frames"].tolist() for epoch in range(8)]
    assert len({tuple(each) for each in drawn}) > 1
    assert drawn[1] == later["frames"].tolist()


def thirds(root: Path, height: int, width: int, frames: int = 8) -> Path:
    """Video with a black, a gray and a white third along its longer side, 2 levels brighter in each frame."""
    (root / "videos").mkdir(parents=True)
    across = np.repeat([0, 100, 200], max(height, width) // 3)
    picture = np.broadcast_to(across[None, :] if width > height else across[:, None], (height, width))
    levels = picture[None, :, :, None] + 2 * np.arange(frames)[:, None, None, None]
    pixels = np.broadcast_to(levels.astype(np.uint8), (frames, height, width, 3))
    write_video(root / "videos" / "a.mp4", np.ascontiguousarray(pixels), fps=10)
    return root


@pytest.mark.parametrize(("height", "width"), [(32, 96), (96, 32)])
def test_three_crops_along_the_longer_side(tmp_path: Path, height: int, width: int):
    how = {"sampler": "multi_clip", "metadata": "none", "image_size": 16}
    clips = VideoFolder(thirds(tmp_path, height, width), 2, num_clips=2, num_crops=3, **how)
    items = [clips[i] for i in range(len(clips))]
    assert [item["id"] for item in items] == [f"a.mp4#{clip}.{crop}" for clip in range(2) for crop in range(3)]
    assert {tuple(item["video"].shape) for item in items} == {(2, 3, 16, 16)}
    for item, level in zip(items, [0, 100, 200, 12, 112, 212], strict=True):  # the second window is frames 6 and 7
        assert abs(item["video"][0].float().mean() - level) < 6
        assert item["video"][0].float().std() < 12
        assert item["video"].is_contiguous()
    assert torch.equal(clips[5]["video"], items[5]["video"])
    centre = VideoFolder(tmp_path, 2, num_clips=2, **how)
    assert torch.equal(items[4]["video"], centre[1]["video"])
    assert [centre[i]["id"] for i in range(2)] == ["a.mp4#0", "a.mp4#1"]
    assert clips.cache_key != centre.cache_key


def test_crops_of_one_window_share_one_decoding(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    make(tmp_path, files=2)
    decoded = []

    def counting(path: Path, *arguments):
        decoded.append(path.name)
        return load_clip(path, *arguments)

    monkeypatch.setattr("blueberry_video.data.video_folder.load_clip", counting)
    clips = VideoFolder(tmp_path, 4, sampler="multi_clip", num_clips=2, num_crops=3, image_size=16)
    in_order = [clips[i] for i in range(len(clips))]
    assert decoded == ["0.mp4"] * 2 + ["1.mp4"] * 2
    for i in (7, 0, 11, 4):  # independent of the order
        assert torch.equal(clips[i]["video"], in_order[i]["video"])
        assert clips[i]["fps"] == in_order[i]["fps"]


def test_broken_file_is_replaced_with_crops(tmp_path: Path):
    make(tmp_path, files=3)
    break_file(tmp_path, 0)
    how = {"sampler": "multi_clip", "num_crops": 3, "image_size": 16}
    clips = VideoFolder(tmp_path, 4, max_broken_share=0.5, **how)
    assert [clips[i]["id"] for i in range(4)] == ["1.mp4#0.0", "1.mp4#0.1", "1.mp4#0.2", "1.mp4#0.0"]


def test_resizing(tmp_path: Path):
    make(tmp_path, files=1)
    assert VideoFolder(tmp_path, 2, image_size=16)[0]["video"].shape == (2, 3, 16, 16)
    assert VideoFolder(tmp_path, 2, image_size=(20, 60))[0]["video"].shape == (2, 3, 20, 60)
    assert VideoFolder(tmp_path, 2, image_size=(64, 8), resize="stretch")[0]["video"].shape == (2, 3, 64, 8)
    stripes = np.zeros((2, 32, 64, 3), np.uint8)
    stripes[:, :, 16:48] = 255  # the center square is white
    write_video(tmp_path / "videos" / "0.mp4", stripes, fps=10)
    assert VideoFolder(tmp_path, 2, image_size=16)[0]["video"].min() > 200
    assert VideoFolder(tmp_path, 2, image_size=16, resize="stretch")[0]["video"].min() < 50


@pytest.mark.parametrize("crops", [1, 3])
def test_without_antialias_frames_are_plain_bilinear(tmp_path: Path, crops: int):
    make(tmp_path, files=1)
    noise = np.random.default_rng(0).integers(0, 256, (4, 48, 96, 3)).astype(np.uint8)
    write_video(tmp_path / "videos" / "0.mp4", noise, fps=10)
    options = {"num_frames": 4, "sampler": "multi_clip"}
    whole = VideoFolder(tmp_path, **options)[0]["video"].float()
    plain = VideoFolder(tmp_path, **options, image_size=16, num_crops=crops, antialias=False)
    smooth = VideoFolder(tmp_path, **options, image_size=16, num_crops=crops)
    expected = whole[:, :, 1::3, 1::3]  # the centers of 3 x 3 pixels
    for item, left in enumerate([8] if crops == 1 else [0, 8, 16]):
        cut = expected[..., left : left + 16]
        assert (plain[item]["video"].float() - cut).abs().max() <= 1
        assert (smooth[item]["video"].float() - cut).abs().mean() > 10
    assert plain.cache_key != smooth.cache_key


def test_too_few_frames_raise_and_are_not_listed_as_broken(tmp_path: Path):
    make(tmp_path)
    clips = VideoFolder(tmp_path, num_frames=16)
    with pytest.raises(ValueError, match=r"0\.mp4: num_frames=16 with stride=1 .*\b12\b.*data\.train\.pad=true"):
        clips[0]
    assert not clips.skipped
    padded = VideoFolder(tmp_path, num_frames=16, pad=True)[0]
    assert frame_numbers(padded) == [*range(12), 11, 11, 11, 11]
    assert padded["fps"] == pytest.approx(10)


def test_folder_errors_name_the_path_and_the_fix(tmp_path: Path):
    with pytest.raises(FileNotFoundError, match=r"videos\b.*\broot\b"):
        VideoFolder(tmp_path, 4)
    (tmp_path / "videos").mkdir()
    (tmp_path / "videos" / "notes.txt").write_text("none yet")
    with pytest.raises(FileNotFoundError, match=r"videos\b.*\.mp4"):
        VideoFolder(tmp_path, 4)
    write_video(tmp_path / "videos" / "a.mp4", np.zeros((4, 16, 16, 3), np.uint8), fps=10)
    with pytest.raises(FileNotFoundError, match=r"metadata\.jsonl.*metadata\.json.*metadata\.csv.*metadata=none"):
        VideoFolder(tmp_path, 4)
    with pytest.raises(FileNotFoundError, match=r"other\.csv"):
        VideoFolder(tmp_path, 4, metadata="other.csv")
    for name in ("metadata.json", "metadata.csv"):
        (tmp_path / name).write_text("[]")
    with pytest.raises(ValueError, match=r"metadata\.json and metadata\.csv"):
        VideoFolder(tmp_path, 4)


ROW = {"file_name": "0.mp4", "caption": "a", "labels": {"motion": "a"}}


@pytest.mark.parametrize(
    ("rows", "error", "message"),
    [
        ([ROW], ValueError, r"'1\.mp4'.*metadata\.jsonl"),
        ([ROW, {**ROW, "file_name": "1.mp4"}, {**ROW, "file_name": "videos/x.mp4"}], FileNotFoundError, r"'x\.mp4'"),
        ([ROW, ROW], ValueError, r"line 2\b.*'0\.mp4'"),
        ([ROW, {"caption": "a"}], ValueError, r"line 2\b.*'caption'.*file_name"),
        ([ROW, {**ROW, "file_name": "../1.mp4"}], ValueError, r"file_name='\.\./1\.mp4'"),
        ([ROW, {**ROW, "file_name": "/etc/1.mp4"}], ValueError, "file_name='/etc/1.mp4'"),
        ([ROW, {**ROW, "file_name": "1.mp4", "caption": ""}], ValueError, r"caption.*'1\.mp4'"),
        ([ROW, {**ROW, "file_name": "1.mp4", "labels": {}}], ValueError, r"motion\b.*'1\.mp4'"),
        ([ROW, {**ROW, "file_name": "1.mp4", "labels": "a"}], ValueError, r"labels='a' of 1\.mp4"),
        ([ROW, {**ROW, "file_name": "1.mp4", "labels": {"motion": 0.5}}], ValueError, r"motion=0\.5 of 1\.mp4"),
        ([ROW, 3], ValueError, r"line 2\b.*\b3\b"),
    ],
)
def test_invalid_rows_raise(tmp_path: Path, rows: list, error: type[Exception], message: str):
    make(tmp_path, files=2, rows=rows)
    with pytest.raises(error, match=message):
        VideoFolder(tmp_path, 4)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"sampler": "uniformly"}, "sampler='uniformly' .*uniform, random"),
        ({"resize": "pad"}, "resize='pad'"),
        ({"sampler": "fixed_fps"}, "fps=None with sampler='fixed_fps'"),
        ({"fps": 4}, "fps=4 with sampler='uniform'"),
        ({"stride": 2}, "stride=2 with sampler='uniform'"),
        ({"num_clips": 3}, "num_clips=3 with sampler='uniform'"),
        ({"num_crops": 2}, "num_crops=2 .*1 .*3"),
        ({"num_crops": 3, "image_size": 16}, "num_crops=3 with sampler='uniform'.*sampler=multi_clip"),
        ({"num_crops": 3, "sampler": "multi_clip"}, "num_crops=3 .*image_size=None and resize='crop'"),
        (
            {"num_crops": 3, "sampler": "multi_clip", "image_size": 16, "resize": "stretch"},
            "num_crops=3 .*resize='stretch'.*resize=crop",
        ),
        ({"metadata": "none", "split": "train"}, "split='train' with metadata='none'"),
        ({"image_size": 0}, "image_size=0 "),
        ({"image_size": -1}, "image_size=-1 "),
        ({"image_size": [32, 0]}, r"image_size=\[32, 0\] "),
        ({"max_broken_share": 1.5}, r"max_broken_share=1\.5 .*0 to 1"),
        ({"max_broken_share": -0.1}, r"max_broken_share=-0\.1 .*0 to 1"),
    ],
)
def test_invalid_arguments_raise(tmp_path: Path, arguments: dict, message: str):
    with pytest.raises(ValueError, match=message):
        VideoFolder(make(tmp_path), 4, **arguments)


def test_metadata_not_in_utf8_raises(tmp_path: Path):
    make(tmp_path, files=1)
    row = '{"file_name": "0.mp4", "caption": "caf\u00e9"}'
    (tmp_path / "metadata.jsonl").write_bytes(row.encode("latin1"))
    with pytest.raises(ValueError, match=r"metadata\.jsonl.*UTF-8"):
        VideoFolder(tmp_path, 4)


def break_file(root: Path, number: int) -> None:
    (root / "videos" / f"{number}.mp4").write_bytes(b"damaged" * 99)


def test_a_broken_file_is_replaced_listed_and_counted(tmp_path: Path):
    make(tmp_path, files=6)
    break_file(tmp_path, 2)
    break_file(tmp_path, 3)
    listing = tmp_path / "run" / "skipped.csv"
    clips = VideoFolder(tmp_path, 4, max_broken_share=0.4, skipped_file=str(listing))
    for loaded in (clips, clips):  # the second pass reads the list
        assert [loaded[i]["id"] for i in range(6)] == ["0.mp4", "1.mp4", "4.mp4", "4.mp4", "4.mp4", "5.mp4"]
    with listing.open() as file:
        rows = list(csv.DictReader(file))
    assert [row["file"] for row in rows] == ["2.mp4", "3.mp4"]
    assert "2.mp4" in rows[0]["reason"]
    assert set(clips.skipped) == {"2.mp4", "3.mp4"}


def test_vanished_files_count_as_broken(tmp_path: Path):
    clips = VideoFolder(make(tmp_path, files=6), 4, max_broken_share=0.4, skipped_file=str(tmp_path / "skipped.csv"))
    assert clips[2]["id"] == "2.mp4"
    (tmp_path / "videos" / "2.mp4").unlink()
    (tmp_path / "videos" / "3.mp4").rename(tmp_path / "videos" / "3.old")
    (tmp_path / "videos" / "3.mp4").mkdir()
    assert [clip["id"] for clip in DataLoader(clips, batch_size=None, num_workers=1)][2:4] == ["4.mp4", "4.mp4"]
    assert [clips[i]["id"] for i in range(6)] == ["0.mp4", "1.mp4", "4.mp4", "4.mp4", "4.mp4", "5.mp4"]
    with (tmp_path / "skipped.csv").open() as file:
        assert {row["file"] for row in csv.DictReader(file)} == {"2.mp4", "3.mp4"}
    assert isinstance(clips.cache_key, str)
    for number in (0, 1):
        (tmp_path / "videos" / f"{number}.mp4").unlink()
    with pytest.raises(RuntimeError, match=r"3 of 6 video files .*max_broken_share=0\.4.*2\.mp4"):
        clips[0]


def test_errors_of_the_process_are_not_broken_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def failing(*_):
        raise OSError(errno.ENOMEM, "out of memory")

    monkeypatch.setattr("blueberry_video.data.video_folder.load_clip", failing)
    clips = VideoFolder(make(tmp_path), 4, max_broken_share=1)
    with pytest.raises(OSError, match="out of memory"):
        clips[0]
    assert clips.skipped == {}


def test_a_list_of_skipped_files_that_was_cut_off_is_continued(tmp_path: Path):
    listing = tmp_path / "skipped.csv"
    for number, text in enumerate(["root,fi", "root,file,reason\r\na,0.mp4,damag", "root,file,reason\r\na,0.mp4"]):
        listing.write_text(text)
        expected = {"1.mp4": "gone\nfor good"} | ({"0.mp4": "damag"} if number == 1 else {})
        assert _append_skipped(listing, Path("a"), "1.mp4", "gone\nfor good") == expected
        assert _append_skipped(listing, Path("a"), "2.mp4", "x") == expected | {"2.mp4": "x"}
        assert _append_skipped(listing, Path("b"), "2.mp4", "y") == {"2.mp4": "y"}


def test_workers_share_the_skipped_file(tmp_path: Path):
    make(tmp_path, files=12)
    for number in (1, 5, 6, 10):
        break_file(tmp_path, number)
    listing = tmp_path / "skipped.csv"
    clips = VideoFolder(tmp_path, 4, max_broken_share=0.5, skipped_file=str(listing))
    for _ in range(2):
        shown = [clip["id"] for clip in DataLoader(clips, batch_size=None, num_workers=3)]
    assert shown == [clips[i]["id"] for i in range(12)]
    with listing.open() as file:
        assert sorted(row["file"] for row in csv.DictReader(file)) == ["1.mp4", "10.mp4", "5.mp4", "6.mp4"]
    strict = VideoFolder(tmp_path, 4, max_broken_share=0.3, skipped_file=str(listing))
    with pytest.raises(RuntimeError, match="4 of 12"):  # one found here, the others read from the list
        strict[1]


def _list_many(path: Path, start) -> None:
    start.wait(timeout=60)
    for number in range(60):
        _append_skipped(path, Path("root"), f"{number}.mp4", "damaged")


def test_concurrent_processes_list_each_file_once(tmp_path: Path):
    context = multiprocessing.get_context("fork")
    start = context.Barrier(4)
    processes = [context.Process(target=_list_many, args=(tmp_path / "s.csv", start)) for _ in range(4)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    with (tmp_path / "s.csv").open() as file:
        assert [row["file"] for row in csv.DictReader(file)] == [f"{number}.mp4" for number in range(60)]


def test_too_many_broken_files_raise(tmp_path: Path):
    make(tmp_path, files=4)
    break_file(tmp_path, 1)
    break_file(tmp_path, 2)
    message = r"2 of 4 video files .*max_broken_share=0\.25.*1\.mp4.*2\.mp4"
    with pytest.raises(RuntimeError, match=message):
        [clip["id"] for clip in DataLoader(VideoFolder(tmp_path, 4, max_broken_share=0.25), batch_size=None)]
    for number in (0, 3):
        break_file(tmp_path, number)
    with pytest.raises(RuntimeError, match="4 video files"):
        VideoFolder(tmp_path, 4, max_broken_share=1.0)[0]


def test_cache_key_depends_on_everything_that_determines_a_clip(tmp_path: Path):
    make(tmp_path)
    keys = [VideoFolder(tmp_path, 4).cache_key, VideoFolder(tmp_path, 5).cache_key]
    keys += [VideoFolder(tmp_path, 4, image_size=16).cache_key, VideoFolder(tmp_path, 4, backends=["pyav"]).cache_key]
    assert VideoFolder(tmp_path, 4).cache_key == keys[0]
    (tmp_path / "metadata.jsonl").write_text((tmp_path / "metadata.jsonl").read_text().replace("clip 0", "clip zero"))
    keys.append(VideoFolder(tmp_path, 4).cache_key)
    os.utime(tmp_path / "videos" / "0.mp4", (1, 1))
    keys.append(VideoFolder(tmp_path, 4).cache_key)
    assert len(set(keys)) == 6


@pytest.mark.skipif(REAL is None, reason="BLUEBERRY_TEST_VIDEOS names no folder of real clips")
def test_real_files_of_many_formats(tmp_path: Path):
    (tmp_path / "videos").symlink_to(Path(REAL or ""))
    clips = VideoFolder(tmp_path, 8, image_size=64, metadata="none", max_broken_share=0)
    batch = next(iter(DataLoader(clips, batch_size=len(clips), num_workers=1)))
    assert batch["video"].shape == (7, 8, 3, 64, 64)
    assert (batch["video"].float().flatten(1).std(1) > 5).all()  # not blank frames
