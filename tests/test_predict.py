"""Labels of videos: tables, windows, folders and lists, broken files, killed commands, command line."""

import csv
import json
import sys
from pathlib import Path

import pytest

from blueberry_video import load_run
from blueberry_video import predict as entry
from blueberry_video.inference.label_table import LabelTable, Window
from blueberry_video.inference.video_files import video_files
from blueberry_video.predict import predict, windows
from trained_classifier import trained


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return trained(tmp_path_factory.mktemp("run"))


def test_labels_of_a_folder(run: Path, tmp_path: Path):
    videos, model = run.parents[2] / "videos" / "val", load_run(run)
    failed, total = predict(run, [videos], tmp_path / "labels.csv")
    assert (failed, total) == ([], 4)
    rows = list(csv.DictReader((tmp_path / "labels.csv").open()))
    assert len(rows) == 8  # two classes
    for file in sorted(videos.rglob("*.mp4")):
        own = {row["class"]: float(row["probability"]) for row in rows if row["video"] == str(file)}
        assert own == pytest.approx(model.predict(file)["class"], abs=1e-5)
    assert {(row["label"], row["start"], row["end"], row["error"]) for row in rows} == {("class", "0.000", "2.000", "")}


def test_windows_cover_a_video(run: Path, tmp_path: Path):
    assert windows(10.0) == [(0.0, 10.0)]
    assert windows(10.0, 20.0) == [(0.0, 10.0)]
    assert windows(10.0, 4.0) == [(0.0, 4.0), (4.0, 8.0), (6.0, 10.0)]
    assert windows(10.0, 5.0) == [(0.0, 5.0), (5.0, 10.0)]
    assert windows(10.0, 4.0, 3.0) == [(0.0, 4.0), (3.0, 7.0), (6.0, 10.0)]
    assert [start for start, _ in windows(0.3, 0.1)] == pytest.approx([0.0, 0.1, 0.2])
    file, model = run.parents[2] / "videos" / "val" / "dark" / "1.mp4", load_run(run)
    predict(run, [file], tmp_path / "labels.jsonl", window=0.8, top=1)
    rows = [json.loads(line) for line in (tmp_path / "labels.jsonl").read_text().splitlines()]
    assert [row["start"] for row in rows] == pytest.approx([0.0, 0.8, 1.2])
    assert [row["end"] for row in rows] == pytest.approx([0.8, 1.6, 2.0])
    for row in rows:
        name, value = next(iter(model.predict(file, row["start"], row["end"])["class"].items()))
        assert row["labels"] == {"class": {name: pytest.approx(value)}}


def test_broken_videos_are_reported_and_the_others_done(run: Path, tmp_path: Path, monkeypatch, capsys):
    good = run.parents[2] / "videos" / "val" / "dark" / "1.mp4"
    (tmp_path / "b_empty.mp4").write_bytes(b"")
    (tmp_path / "a_cut.mp4").write_bytes(good.read_bytes()[:-2000])
    (tmp_path / "list.txt").write_text(f"# mine\n\n{good}\nb_empty.mp4\n")
    monkeypatch.setattr(
        sys, "argv", ["predict", str(run), str(tmp_path / "list.txt"), "--out", str(tmp_path / "o.csv")]
    )
    with pytest.raises(ValueError, match=r"1 of 2 videos.*b_empty\.mp4"):
        entry.main()
    rows = list(csv.DictReader((tmp_path / "o.csv").open()))
    assert [row["class"] for row in rows if row["video"] == str(good)] != []
    [broken] = [row for row in rows if row["video"].endswith("b_empty.mp4")]
    assert "b_empty.mp4" in broken["error"]
    with pytest.raises(FileNotFoundError, match=r"VIDEO=.*nothing\.mp4"):
        predict(run, [tmp_path / "nothing.mp4"], tmp_path / "x.csv")


@pytest.mark.parametrize("ending", ["csv", "jsonl"])
@pytest.mark.parametrize("share", [0.0, 0.3, 0.61, 0.99])
def test_a_killed_command_continues_to_the_same_rows(run: Path, tmp_path: Path, ending: str, share: float):
    videos, out = run.parents[2] / "videos", tmp_path / f"labels.{ending}"
    predict(run, [videos], out, window=0.5)
    whole = out.read_bytes()
    out.write_bytes(whole[: int(len(whole) * share)])  # a kill, also in the middle of a row
    table = LabelTable(out, json.loads((tmp_path / f"labels.{ending}.json").read_text()))
    assert len(table.done) == pytest.approx(8 * share, abs=1.1)
    predict(run, [videos], out, window=0.5)
    assert out.read_bytes() == whole
    with pytest.raises(FileExistsError, match=r"labels.*window=0\.5.*overwrite"):
        predict(run, [videos], out, window=0.6)
    predict(run, [videos / "val"], out, window=0.6, overwrite=True)
    assert out.stat().st_size < len(whole)


def test_a_table_quotes_names(tmp_path: Path):
    windows_ = [Window(0.0, 1.0, 2, {"a, b": {'say "no"': 0.25, "line\nbreak": 0.75}})]
    with LabelTable(tmp_path / "t.csv", {}) as table:
        table.add("v,1.mp4", windows_)
        table.fail("v2.mp4", "broken")
    rows = list(csv.DictReader((tmp_path / "t.csv").open(newline="")))
    assert [row["class"] for row in rows] == ['say "no"', "line\nbreak", ""]
    assert rows[0]["error"] == "2 frames do not decode"
    with LabelTable(tmp_path / "t.csv", {}) as table:
        assert table.done == {"v,1.mp4"}
        table.fail("v2.mp4", "broken")
    assert list(csv.DictReader((tmp_path / "t.csv").open(newline=""))) == rows


def test_video_files(tmp_path: Path):
    for name in ("b/2.mp4", "b/10.MKV", "a.webm", "b/.hidden.mp4", "b/notes.md"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"x")
    found = [str(tmp_path / name) for name in ("a.webm", "b/10.MKV", "b/2.mp4")]
    assert video_files([tmp_path]) == found
    assert video_files([tmp_path / "b" / "2.mp4", tmp_path, "https://x.org/a.mp4"]) == [
        found[2],
        *found[:2],
        "https://x.org/a.mp4",
    ]
    (tmp_path / "c").mkdir()
    with pytest.raises(FileNotFoundError, match="names no video"):
        video_files([tmp_path / "c"])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"out": "labels.txt"}, r"OUT=.*labels\.txt.*\.csv or \.jsonl"),
        ({"window": 0.0}, "window=0.0"),
        ({"step": 1.0}, "step=1.0 requires --window"),
        ({"top": 0}, "top=0"),
    ],
)
def test_wrong_arguments_raise(run: Path, tmp_path: Path, arguments, message):
    out = tmp_path / arguments.pop("out", "labels.csv")
    with pytest.raises(ValueError, match=message):
        predict(run, [run.parents[2] / "videos"], out, **arguments)
    assert not out.exists()
