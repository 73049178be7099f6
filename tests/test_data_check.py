"""Data check: what it recognizes, and the faults that it reports."""

import csv
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import webdataset
from hydra.utils import instantiate
from PIL import Image

from blueberry_video.config import compose
from blueberry_video.data.inspection import inspect, recognize
from blueberry_video.data.shards import ShardWriter
from blueberry_video.data.write import write_video
from blueberry_video.data_check import data_check

CONFIG = """
defaults:
  - train
  - override model: classifier/tiny
  - override task: classification
  - override data: DATA
  - _self_
name: own
"""


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("clip") / "clip.mp4"
    write_video(file, np.random.default_rng(0).integers(0, 255, (20, 32, 48, 3), dtype=np.uint8), 10.0)
    return file


def lay(clip: Path, root: Path, *names: str) -> Path:
    """Copies a video to files; the bytes after its end differ, so that no two files are the same."""
    for number, name in enumerate(names):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(clip.read_bytes() + bytes(number + 1))
    return root


@pytest.fixture
def folders(tmp_path: Path, clip: Path) -> Path:
    names = [f"train/{kind}/{i}.mp4" for kind, count in (("jump", 6), ("run", 2)) for i in range(count)]
    return lay(clip, tmp_path / "videos", *names, "val/jump/9.mp4")


def check(capsys: pytest.CaptureFixture, *arguments: object, **options: object) -> tuple[bool, str]:
    ok = data_check(*map(str, arguments), **options)
    return ok, capsys.readouterr().out


def test_class_folders(folders: Path, tmp_path: Path, capsys: pytest.CaptureFixture):
    ok, output = check(capsys, folders, out=tmp_path / "out")
    assert ok
    for line in (
        "  ok    train: 8 videos, VideoFolder of ",
        "  ok    train: class has 2 classes (jump 6, run 2)",
        "  note  train: class has few videos of run (2)",
        "  note  val: class has no video of run",
        "  ok    durations: 2 to 2 s, median 2",
        "  ok    rates: 10 to 10 frames per second, median 10",
        "  ok    sizes: 48x32 (9)",
        "  ok    9 videos were read, 0 are broken or missing",
    ):
        assert line in output
    written = json.loads((tmp_path / "out" / "data-check.json").read_text())
    assert written["classes"]["train"] == {"class": {"jump": 6, "run": 2}}
    assert (written["videos"], written["read"], written["broken"]) == ({"train": 8, "val": 1}, 9, {})
    assert written["config"] in output
    with Image.open(tmp_path / "out" / "contact-sheet.png") as sheet:
        assert sheet.width >= 640
        assert len(sheet.convert("RGB").getcolors(2**24)) > 50  # pictures, not an empty sheet


def test_broken_and_cut_files_are_named_with_the_reason(folders: Path, clip: Path, capsys: pytest.CaptureFixture):
    (folders / "train" / "jump" / "0.mp4").write_bytes(b"no video" * 100)
    whole = clip.read_bytes()
    (folders / "train" / "jump" / "1.mp4").write_bytes(whole[: len(whole) // 2])
    (folders / "val" / "jump" / "9.mp4").write_bytes(b"")
    ok, output = check(capsys, folders)
    assert not ok
    for name in ("train: jump/0.mp4", "train: jump/1.mp4", "val: jump/9.mp4"):
        [line] = [line for line in output.splitlines() if name in line and "same size" not in line]
        assert re.match(rf"  FAIL  {name}: .{{20,}}", line)
    assert "  FAIL  9 videos were read, 3 are broken or missing" in output


def test_damage_in_the_middle_of_a_file_is_found(folders: Path, capsys: pytest.CaptureFixture):
    file = folders / "train" / "jump" / "2.mp4"
    data = bytearray(file.read_bytes())
    start = data.index(b"mdat") + 4
    data[start + 3000 : start + 6000] = bytes(3000)
    file.write_bytes(data)
    assert "train: jump/2.mp4: " in check(capsys, folders)[1]


def test_files_in_two_splits(folders: Path, capsys: pytest.CaptureFixture):
    shutil.copyfile(folders / "train" / "run" / "1.mp4", folders / "val" / "jump" / "copy.mp4")
    shutil.copyfile(folders / "train" / "run" / "1.mp4", folders / "train" / "run" / "same_split.mp4")
    ok, output = check(capsys, folders)
    assert ok
    assert "  note  train: run/1.mp4 and val: jump/copy.mp4 have the same size" in output
    assert output.count("have the same size") == 1


def test_a_sample_is_read_and_everything_is_counted(folders: Path):
    parts = {split: build() for split, build in recognize(str(folders)).parts.items()}
    found = inspect(parts, sample=3)
    assert (found.read, len(found.durations), sum(found.videos.values())) == (3, 3, 9)
    assert inspect(parts, sample=0).read == 9


def own(tmp_path: Path, config: str):
    """Data of an experiment with the printed lines."""
    name, body = re.search(r"override data: (\w+)\n(data:.*)", config, re.DOTALL).groups()
    file = tmp_path / "own" / "config.yaml"
    file.parent.mkdir(exist_ok=True)
    file.write_text(CONFIG.replace("DATA", name) + body)
    return instantiate(compose(file).data)


def test_the_printed_config_reads_every_kind(folders: Path, clip: Path, tmp_path: Path):
    def kind(location: object) -> tuple[str, int]:
        found = recognize(str(location))
        data = own(tmp_path, found.config())
        assert data.train[0]["video"].shape[1] == 3
        return found.data, len(data.train)

    assert kind(folders) == ("video_folder", 8)
    listed = lay(clip, tmp_path / "metadata", "videos/a.mp4", "videos/b.mp4")
    rows = [
        {"file_name": f"{name}.mp4", "label": name, "split": split} for name, split in (("a", "train"), ("b", "val"))
    ]
    (listed / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    assert kind(listed) == ("video_folder", 1)
    ShardWriter(str(folders), str(tmp_path / "shards"))()
    assert kind(tmp_path / "shards") == ("video_shards", 8)
    with webdataset.TarWriter(str(tmp_path / "web.tar")) as sink:
        sink.write({"__key__": "0", "mp4": clip.read_bytes(), "cls": 0})
    assert kind(tmp_path / "web.tar") == ("web_shards", 1)
    ucf = lay(clip, tmp_path / "ucf", "Archery/v_a.avi", "Biking/v_b.avi")
    (ucf / "trainlist01.txt").write_text("Archery/v_a.avi 1\n")
    (ucf / "testlist01.txt").write_text("Biking/v_b.avi\n")
    (ucf / "classInd.txt").write_text("1 Archery\n2 Biking\n")
    assert kind(ucf) == ("video_list", 1)
    kinetics = lay(clip, tmp_path / "k400", "x/ab_000001_000011.mp4", "x/cd_000001_000011.mp4")
    for split, name in (("train", "ab"), ("val", "cd")):
        with (kinetics / f"{split}.csv").open("w") as file:
            rows = [["label", "youtube_id", "time_start", "time_end"], ["jump", name, 1, 11]]
            csv.writer(file).writerows(rows)
    assert kind(kinetics) == ("video_list", 1)


def test_lists_with_missing_files_and_parts_that_fail(clip: Path, tmp_path: Path, capsys: pytest.CaptureFixture):
    root = lay(clip, tmp_path / "k", "a/ab_000001_000011.mp4")
    header = "label,youtube_id,time_start,time_end\n"
    (root / "train.csv").write_text(f"{header}jump,ab,1,11\nrun,gone,1,11\n")
    (root / "val.csv").write_text(f"{header}jump,ab,x,11\n")
    ok, output = check(capsys, root)
    assert not ok
    assert re.search(r"FAIL  gone_000001_000011: .*train.csv:3", output)
    assert re.search(r"FAIL  val: .*val.csv:2: time_start and time_end must be seconds", output)
    assert "train: 1 videos" in output


def test_data_of_an_experiment(folders: Path, tmp_path: Path, capsys: pytest.CaptureFixture):
    file = tmp_path / "own" / "config.yaml"
    file.parent.mkdir()
    file.write_text(CONFIG.replace("DATA", "video_folder") + "data: {train: {root: nowhere}}\n")
    ok, output = check(capsys, file.parent, overrides=[f"data.train.root={folders}"])
    assert ok
    assert "train: 8 videos" in output
    assert "val: 1 videos" in output
    file.write_text(CONFIG.replace("DATA", "sprites"))
    with pytest.raises(ValueError, match="no data sets of video files"):
        data_check(str(file.parent))


def test_folders_of_no_known_kind(tmp_path: Path, clip: Path):
    with pytest.raises(FileNotFoundError, match=r"no folder .*/none"):
        data_check(str(tmp_path / "none"))
    with pytest.raises(FileNotFoundError, match=r"no known layout.*metadata: none"):
        data_check(str(lay(clip, tmp_path / "flat", "a.mp4")))


def test_command(folders: Path, tmp_path: Path):
    words = ["data-check", str(folders), "--sample=2", f"--out={tmp_path / 'out'}"]
    done = subprocess.run([sys.executable, "-m", "blueberry_video.cli", *words], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "2 videos were read" in done.stdout
    assert (tmp_path / "out" / "contact-sheet.png").is_file()
    words[1] = str(tmp_path / "none")
    done = subprocess.run([sys.executable, "-m", "blueberry_video.cli", *words], capture_output=True, text=True)
    assert done.returncode == 1
    assert "Traceback" not in done.stderr
    assert "There is no folder" in done.stderr
