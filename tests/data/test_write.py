"""Writer of mp4 folders: round trip, atomicity, and the command line."""

import json
import multiprocessing
from pathlib import Path

import numpy as np
import pytest

from blueberry_video.data.sprites import Sprites
from blueberry_video.data.video_folder import VideoFolder
from blueberry_video.data.write import FolderWriter, main, write_video


def sources(train: int = 40, val: int = 5, **settings) -> dict[str, Sprites]:
    return {
        "train": Sprites("train", train, image_size=32, **settings),
        "val": Sprites("val", val, image_size=32, **settings),
    }


def test_round_trip(tmp_path: Path):
    written = sources()
    make = FolderWriter(written)
    for split in ("train", "val"):
        clips = VideoFolder(tmp_path / "d", 16, split=split, make=make)
        assert len(clips) == len(written[split])
        assert clips.classes == {name: tuple(values) for name, values in Sprites.classes.items()}
        assert clips.reversal_pairs == Sprites.reversal_pairs
        for i in (0, len(clips) - 1):
            read, drawn = clips[i], written[split][i]
            assert (read["caption"], read["labels"], read["fps"]) == (drawn["caption"], drawn["labels"], drawn["fps"])
            difference = (read["video"].float() - drawn["video"].float()).abs()
            assert difference.mean() < 3  # of 255: chroma is stored at half resolution
            assert difference.mean() < 0.5 * (drawn["video"].float() - drawn["video"].float().mean()).abs().mean()


def test_existing_folder_is_kept_and_different_settings_raise(tmp_path: Path, capfd):
    out = tmp_path / "d"
    FolderWriter(sources())(out)
    stamps = {path: path.stat().st_mtime_ns for path in out.rglob("*")}
    capfd.readouterr()
    FolderWriter(sources())(out)
    assert {path: path.stat().st_mtime_ns for path in out.rglob("*")} == stamps
    assert capfd.readouterr().err == ""
    for other in (
        FolderWriter(sources(train=41)),
        FolderWriter(sources(distractors=1)),
        FolderWriter(sources(), crf=30),
    ):
        with pytest.raises(FileExistsError, match=r"\bout=.*\b(splits|crf) is .* and would be "):
            other(out)
    assert {path: path.stat().st_mtime_ns for path in out.rglob("*")} == stamps
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("years of work")
    with pytest.raises(FileExistsError, match=r"\bout=.*/mine\b.*manifest\.json"):
        FolderWriter(sources())(tmp_path / "mine")
    (tmp_path / "empty").mkdir()
    FolderWriter(sources(4, 1))(tmp_path / "empty")
    assert len(list((tmp_path / "empty" / "videos").iterdir())) == 5


class Failing(Sprites):
    def __getitem__(self, index: int) -> dict:
        if index == 37:
            raise OSError("the disk is full")
        return super().__getitem__(index)


def test_interrupted_writing_leaves_no_folder(tmp_path: Path):
    with pytest.raises(OSError, match="the disk is full"):
        FolderWriter({"train": Failing("train", 40)}, num_workers=0)(tmp_path / "d")
    assert not (tmp_path / "d").exists()
    FolderWriter({"train": Sprites("train", 40)}, num_workers=0)(tmp_path / "d")
    assert len(list((tmp_path / "d" / "videos").iterdir())) == 40
    assert not list(tmp_path.glob(".*.tmp"))


def test_concurrent_processes_write_once(tmp_path: Path):
    context = multiprocessing.get_context("fork")
    writer = FolderWriter(sources(), num_workers=0)
    processes = [context.Process(target=writer, args=(tmp_path / "d",)) for _ in range(3)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [0, 0, 0]
    assert len(VideoFolder(tmp_path / "d", 16)) == 45


def test_result_does_not_depend_on_num_workers(tmp_path: Path):
    for workers in (0, 2):
        FolderWriter(sources(), num_workers=workers)(tmp_path / str(workers))
    files = [
        sorted(path.relative_to(tmp_path / w) for path in (tmp_path / w).rglob("*") if path.is_file()) for w in "02"
    ]
    assert files[0] == files[1]
    assert all((tmp_path / "0" / name).read_bytes() == (tmp_path / "2" / name).read_bytes() for name in files[0])


def test_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    out = tmp_path / "d"
    main(
        [
            "source=sprites",
            f"out={out}",
            "train=6",
            "val=2",
            "image_size=24",
            "num_frames=8",
            "background=texture",
            "crf=12",
        ]
    )
    assert f"8 videos in {out}" in capsys.readouterr().out
    rows = [json.loads(line) for line in (out / "metadata.jsonl").read_text().splitlines()]
    assert [row["split"] for row in rows] == ["train"] * 6 + ["val"] * 2
    assert rows[0]["file_name"] == "videos/train_0000000.mp4"
    assert "on a texture background" in rows[0]["caption"]
    assert VideoFolder(out, 8, split="val")[0]["video"].shape == (8, 3, 24, 24)


def test_command_with_the_world(tmp_path: Path):
    main(
        ["source=world", f"out={tmp_path / 'd'}", "train=2", "val=0", "image_size=32", "num_frames=4", "supersample=1"]
    )
    clip = VideoFolder(tmp_path / "d", 4)[0]
    assert clip["video"].shape == (4, 3, 32, 32)
    assert clip["caption"]


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["sprites"], "'sprites' .*key=value"),
        (["source=spirtes"], "source='spirtes' .*sprites, world"),
        (["imagesize=32"], r"imagesize=32\b.*\bimage_size\b"),
        (["train=many"], r"train='many' .*\btrain=1000\b"),
        (["crf=60"], r"crf=60\b.*\b0\b.*\b51\b"),
        (["crf=abc"], r"crf=abc\b.*integer.*\bcrf=8\b"),
        (["crf=8.5"], r"crf=8\.5\b.*integer"),
        (["num_workers=true"], r"num_workers=true\b.*integer"),
        (["drift=far"], r"drift=far\b.*number.*\bdrift=0\.0"),
        (["image_size=33"], r"image_size=33\b.*image_size=34\b"),
        (["preset=3"], r"preset='3' .*\bultrafast\b"),
        (["source=world", "camera=3"], "camera='3'"),
        (["sources=3"], r"sources=3\b.*\bsource\b"),
        (["train=0", "val=0"], r"\bsources\b"),
    ],
)
def test_invalid_command_exits(tmp_path: Path, arguments: list[str], expected: str):
    with pytest.raises(SystemExit, match=expected):
        main([f"out={tmp_path / 'd'}", *arguments])
    assert not (tmp_path / "d").exists()


def test_command_does_not_change_other_folders(tmp_path: Path):
    (tmp_path / "mine.txt").write_text("mine")
    with pytest.raises(SystemExit, match=r"\bout=.*manifest\.json"):
        main([f"out={tmp_path}", "train=2", "val=0"])
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]


def test_invalid_values_raise(tmp_path: Path):
    with pytest.raises(ValueError, match=r"crf=60\b.*\b0\b.*\b51\b"):
        FolderWriter(sources(), crf=60)
    with pytest.raises(ValueError, match=r"\bsources\b"):
        FolderWriter({})
    with pytest.raises(ValueError, match=r"\b15x16\b.*a\.mp4.*image_size.*\b16x16\b"):
        write_video(tmp_path / "a.mp4", np.zeros((2, 15, 16, 3), np.uint8), fps=8)
