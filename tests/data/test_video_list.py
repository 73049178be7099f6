"""Lists of videos: the published formats, and rows that do not fit."""

import csv
import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from blueberry_video.data.datamodule import DataModule
from blueberry_video.data.list_formats import read_list, without_brackets
from blueberry_video.data.video_list import VideoList
from blueberry_video.data.write import write_video


@pytest.fixture(scope="module")
def video(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("clip") / "clip.mp4"
    write_video(file, np.random.default_rng(0).integers(0, 255, (6, 16, 24, 3), dtype=np.uint8), 10.0)
    return file


def lay(video: Path, root: Path, *names: str) -> None:
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(video, root / name)


def labels(data: VideoList) -> dict[str, str | None]:
    """Name -> class of every row, and the format of a clip."""
    clip = data[0]
    assert clip["video"].shape[:2] == (4, 3)
    assert clip["id"] == data.rows[0].name
    return {row.name: data.classes["class"][row.labels["class"]] if row.labels else None for row in data.rows}


UCF = ("Archery/v_Archery_g01_c01.avi", "Basketball/v_Basketball_g01_c01.avi", "Archery/v_Archery_g02_c01.avi")


@pytest.fixture
def ucf(tmp_path: Path, video: Path) -> Path:
    lay(video, tmp_path, *UCF)
    (tmp_path / "classInd.txt").write_text("1 Archery\r\n2 Basketball\r\n3 Biking\r\n")
    (tmp_path / "trainlist01.txt").write_text(f"{UCF[0]} 1\r\n{UCF[1]} 2\r\n")
    (tmp_path / "testlist01.txt").write_text(f"{UCF[2]}\r\n")
    return tmp_path


def test_ucf101_counts_from_one_and_test_lists_have_no_index(ucf: Path):
    train, test = VideoList(ucf, "trainlist01.txt", 4), VideoList(ucf, "testlist01.txt", 4)
    assert train.classes == test.classes == {"class": ("Archery", "Basketball", "Biking")}
    assert labels(train) == {UCF[0]: "Archery", UCF[1]: "Basketball"}
    assert labels(test) == {UCF[2]: "Archery"}
    (ucf / "classInd.txt").unlink()  # the sorted folders
    assert VideoList(ucf, "trainlist01.txt", 4).classes == {"class": ("Archery", "Basketball")}
    both = VideoList(ucf, ["trainlist01.txt", "testlist01.txt"], 4)
    assert len(both) == 3


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (f"{UCF[1]} 1", r"trainlist01.txt:2 .*class index 1.*'Archery'.*'Basketball', class 2"),
        (f"{UCF[1]} 4", r"trainlist01.txt:2 .*class index 4.*1 to 3.*classes.class"),
        (f"{UCF[1]} x", r"trainlist01.txt:2 is "),
        ("Basketball/v_absent.avi 2", r"trainlist01.txt:2 names 'Basketball/v_absent.avi' of the class '1'.*root"),
        (f"{UCF[0]} 1", r"trainlist01.txt:2 names .* second time, after .*:1"),
    ],
)
def test_rows_of_ucf101_that_do_not_fit(ucf: Path, row: str, message: str):
    (ucf / "trainlist01.txt").write_text(f"{UCF[0]} 1\n{row}\n")
    with pytest.raises((ValueError, FileNotFoundError), match=message) as caught:
        VideoList(ucf, "trainlist01.txt", 4, list_format="ucf101")
    assert "\n" not in str(caught.value)


def test_kinetics_names_files_by_id_and_seconds(tmp_path: Path, video: Path):
    lay(video, tmp_path, "train/playing harp/-3B32lodo2M_000059_000069.mp4", "train/abseiling/ab_cd_000000_000010.mkv")
    rows = [["playing harp", "-3B32lodo2M", 59, 69, "train"], ["abseiling", "ab_cd", 0, 10, "train"]]
    rows.append(["abseiling", "gone", 7, 17, "validate"])
    with (tmp_path / "k400.csv").open("w") as file:
        csv.writer(file).writerows([["label", "youtube_id", "time_start", "time_end", "split"], *rows])
    with pytest.raises(FileNotFoundError, match=r"k400.csv:4 names 'gone_000007_000017' of the class 'abseiling'"):
        VideoList(tmp_path, "k400.csv", 4)
    with pytest.raises(FileNotFoundError, match=r"1 of 3 rows.*max_missing_share=0.34"):
        VideoList(tmp_path, "k400.csv", 4, max_missing_share=0.33)
    data = VideoList(tmp_path, "k400.csv", 4, max_missing_share=0.34)
    assert data.missing == ["gone_000007_000017"]
    data.skipped_file = str(tmp_path / "skipped.csv")
    assert "k400.csv:4" in (tmp_path / "skipped.csv").read_text()
    assert data.classes == {"class": ("abseiling", "playing harp")}
    assert {Path(name).name: known for name, known in labels(data).items()} == {
        "-3B32lodo2M_000059_000069.mp4": "playing harp",
        "ab_cd_000000_000010.mkv": "abseiling",
    }
    assert len(VideoList(tmp_path, "k400.csv", 4, split="train")) == 2
    with pytest.raises(ValueError, match=r"split='test'.*train, validate"):
        VideoList(tmp_path, "k400.csv", 4, split="test")


@pytest.mark.parametrize("mark", [" ", ","])
def test_paths_with_indices(tmp_path: Path, video: Path, mark: str):
    lay(video, tmp_path, "a b/one.mp4", "two.mp4", "deep/er/three.mp4")
    absolute = tmp_path / "deep" / "er" / "three.mp4"
    (tmp_path / "val.csv").write_text(f"a b/one.mp4{mark}0\ntwo.mp4{mark}2\n\n{absolute}{mark}2\n")
    data = VideoList(tmp_path, "val.csv", 4)
    assert data.classes == {"class": ("0", "1", "2")}
    assert labels(data) == {"a b/one.mp4": "0", "two.mp4": "2", "deep/er/three.mp4": "2"}
    named = VideoList(tmp_path, "val.csv", 4, classes={"class": ["x", "y", "z"]})
    assert labels(named) == {"a b/one.mp4": "x", "two.mp4": "z", "deep/er/three.mp4": "z"}
    with pytest.raises(ValueError, match=r"val.csv:2 \(two.mp4\).*class index 2.*0 to 1.*classes.class.*subtract 1"):
        VideoList(tmp_path, "val.csv", 4, classes={"class": ["x", "y"]})


def test_lists_that_count_from_one_raise(tmp_path: Path, video: Path):
    lay(video, tmp_path, "a.mp4", "b.mp4", "c.mp4")
    (tmp_path / "list.txt").write_text("b.mp4 2\na.mp4 1\nc.mp4 2\n")
    with pytest.raises(ValueError, match=r"list.txt:2 \(a.mp4\) has the class index 1.*1 to 2.*count from 0"):
        VideoList(tmp_path, "list.txt", 4)


def test_names_numbers_and_frame_folders_in_lists_of_paths(tmp_path: Path, video: Path):
    lay(video, tmp_path, "a.mp4", "my clip.mp4")
    (tmp_path / "list.txt").write_text("a.mp4 jump\nmy clip.mp4 run\n")
    assert labels(VideoList(tmp_path, "list.txt", 4)) == {"a.mp4": "jump", "my clip.mp4": "run"}
    (tmp_path / "list.txt").write_text("a.mp4\nmy clip.mp4\n")
    assert labels(VideoList(tmp_path, "list.txt", 4)) == {"a.mp4": None, "my clip.mp4": None}
    for text, message in (
        ("a.mp4 jump\nmy clip.mp4 1\n", r"list.txt:2 .*'1', a number"),
        ("a.mp4 jump\nmy clip.mp4\n", r"list.txt:2 has no class"),
        ("a 120 5\n", r"list.txt:1 .*number of frames"),
        ("nothing\n", r"list.txt:1 is 'nothing'"),
        ("\n", r"no rows"),
    ):
        (tmp_path / "list.txt").write_text(text)
        with pytest.raises(ValueError, match=message):
            VideoList(tmp_path, "list.txt", 4)


def test_something_something(tmp_path: Path, video: Path):
    lay(video, tmp_path, "videos/78687.webm", "videos/42.webm")
    template = "Holding [something] next to [something]"
    rows = [{"id": "78687", "label": "holding potato next to box", "template": template, "placeholders": ["potato"]}]
    rows.append({"id": "42", "label": "closing a box", "template": "Closing [something]"})
    (tmp_path / "train.json").write_text(json.dumps(rows))
    derived = VideoList(tmp_path, "train.json", 4)
    assert derived.classes == {"class": ("Closing something", "Holding something next to something")}
    ids = {"Holding something next to something": "0", "Closing something": "1", "Opening something": "2"}
    (tmp_path / "labels.json").write_text(json.dumps(ids))
    data = VideoList(tmp_path, "train.json", 4)
    assert data.classes == {"class": tuple(ids)}
    assert labels(data) == {"videos/42.webm": "Closing something", "videos/78687.webm": next(iter(ids))}
    assert {row.name: row.caption for row in data.rows}["videos/42.webm"] == "closing a box"
    rows[1]["template"] = "Throwing [something]"
    (tmp_path / "train.json").write_text(json.dumps(rows))
    with pytest.raises(ValueError, match=r"train.json:\[1\] \(42\) has the class 'Throwing something'"):
        VideoList(tmp_path, "train.json", 4)
    (tmp_path / "labels.json").write_text(json.dumps({"a": "1", "b": "2"}))
    with pytest.raises(ValueError, match=r"labels.json numbers 2 classes, and not from 0 to 1"):
        VideoList(tmp_path, "train.json", 4)
    assert without_brackets("Pretending to put [something] [somewhere]") == "Pretending to put something somewhere"


def test_tables_with_a_header(tmp_path: Path, video: Path):
    lay(video, tmp_path, "a.mp4", "b.mp4")
    (tmp_path / "list.csv").write_text('path,label,caption,split\na.mp4,jump,"one, two",train\nb.mp4,run,three,val\n')
    data = VideoList(tmp_path, "list.csv", 4, split="train")
    assert (labels(data), data.rows[0].caption) == ({"a.mp4": "jump"}, "one, two")
    assert data.classes == VideoList(tmp_path, "list.csv", 4, split="val").classes == {"class": ("jump", "run")}
    (tmp_path / "list.csv").write_text("file_name;class\na.mp4;7\nb.mp4;jump\n")
    assert VideoList(tmp_path, "list.csv", 4).classes == {"class": ("7", "jump")}
    with pytest.raises(ValueError, match=r"list.csv:3 \(b.mp4\) has the class 'jump', which is not among"):
        VideoList(tmp_path, "list.csv", 4, classes={"class": ["7"]})
    (tmp_path / "list.csv").write_text("file_name,class\na.mp4\n")
    with pytest.raises(ValueError, match=r"list.csv:2 has 1 values and the header 2"):
        VideoList(tmp_path, "list.csv", 4)


@pytest.mark.parametrize(
    ("text", "kind"),
    [
        ("Archery/v_a.avi 1\n", "ucf101"),
        ("Archery/v_a.avi\n", "ucf101"),
        ("label,youtube_id,time_start,time_end,split\na,b,1,2,train\n", "kinetics"),
        ("youtube_id,time_start,time_end,split\nb,1,2,test\n", "kinetics"),
        ("a/b.mp4 0\n", "indices"),
        ("a/b.mp4,0\n", "indices"),
        ("path,label\na/b.mp4,0\n", "table"),
    ],
)
def test_formats_are_recognized(tmp_path: Path, text: str, kind: str):
    file = tmp_path / "list.csv"
    file.write_text(text)
    assert read_list(file, None)[0] == kind


def test_sets_with_classes_in_another_order_raise(tmp_path: Path, video: Path):
    lay(video, tmp_path, "a.mp4", "b.mp4", "c.mp4")
    (tmp_path / "train.txt").write_text("a.mp4 jump\nb.mp4 run\n")
    (tmp_path / "val.txt").write_text("c.mp4 run\n")
    train, val = VideoList(tmp_path, "train.txt", 4), VideoList(tmp_path, "val.txt", 4)
    with pytest.raises(ValueError, match=r"data.val has 'run' as class 0 of class, which is 'jump'.*data.val.classes"):
        DataModule(train, val, batch_size=1)
    same = VideoList(tmp_path, "val.txt", 4, classes=dict(train.classes))
    assert DataModule(train, same, batch_size=1).classes == train.classes


def test_arguments_out_of_range(tmp_path: Path, video: Path):
    lay(video, tmp_path, "a.mp4", "x/a.mp4")
    (tmp_path / "l.json").write_text('[{"id": "a"}]')
    with pytest.raises(ValueError, match=r"a.mp4 have the same name"):
        VideoList(tmp_path, "l.json", 4)
    (tmp_path / "l.txt").write_text("a.mp4 0\n")
    for arguments, message in (
        ({"max_missing_share": 2}, "max_missing_share=2"),
        ({"list_format": "csv"}, "list_format='csv'"),
        ({"classes": {"label": ["x"]}}, "'label'"),
    ):
        with pytest.raises(ValueError, match=message):
            VideoList(tmp_path, "l.txt", 4, **arguments)
    with pytest.raises(FileNotFoundError, match=r"none.txt"):
        VideoList(tmp_path, "none.txt", 4)
