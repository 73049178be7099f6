"""Points of a sweep: state, metrics and error of each, the table, and the exit codes that end the sweep."""

import json
from pathlib import Path

import pytest

from blueberry_video.launch import command_line, sweep

METRICS = {"val/loss": 0.5, "val/motion": 0.75, "train/loss": 2.0}


def finished(folder: Path, runs: list[Path]) -> float:
    """Records a run with ``METRICS``; returns the objective."""
    run = folder / "run"
    run.mkdir(exist_ok=True)
    (run / "run.json").write_text(json.dumps({"metrics": METRICS}))
    runs.append(run)
    return 0.25


def point(folder: Path, number: int) -> dict:
    return json.loads((folder / "points" / f"{number}.json").read_text())


def test_finished_point_is_recorded(tmp_path: Path):
    states = []

    def run(runs: list[Path]) -> float:
        states.append((point(tmp_path, 3)["state"], point(tmp_path, 3)["metrics"]))
        return finished(tmp_path, runs)

    names = ["val/motion", "val/loss", "val/unknown"]
    assert sweep.run_point(tmp_path, 3, ["seed=1", "depth=2"], names, run) == 0.25
    assert states == [("running", {})]
    assert point(tmp_path, 3) == {
        "number": 3,
        "overrides": ["seed=1", "depth=2"],
        "state": "finished",
        "metrics": {"val/motion": 0.75, "val/loss": 0.5},
        "error": "",
    }


def our_error(folder: Path, runs: list[Path]) -> None:
    finished(folder, runs)
    command_line.parse(["seed=1"])


def foreign_error(folder: Path, runs: list[Path]) -> None:
    raise ArithmeticError("first line\nsecond line")


def missed_gate(folder: Path, runs: list[Path]) -> None:
    finished(folder, runs)
    raise SystemExit("\nval/loss missed\n  all verdicts")


@pytest.mark.parametrize(
    ("fail", "error", "has_traceback"),
    [
        (our_error, "the arguments ['seed=1'] contain no experiment", False),
        (foreign_error, "ArithmeticError: first line", True),
        (missed_gate, "val/loss missed", False),
    ],
)
@pytest.mark.parametrize("verbose", [False, True])
def test_failed_point_does_not_end_the_sweep(tmp_path: Path, capsys, monkeypatch, fail, error, has_traceback, verbose):
    if verbose:
        monkeypatch.setenv("BLUEBERRY_TRACEBACK", "1")
    objective = sweep.run_point(tmp_path, 7, ["a=1"], ["val/loss"], lambda runs: fail(tmp_path, runs))
    assert objective != objective, "NaN"
    found = point(tmp_path, 7)
    assert found["state"] == "failed"
    assert found["error"].startswith(error)
    assert "\n" not in found["error"]
    assert found["metrics"] == ({} if fail is foreign_error else {"val/loss": 0.5})
    printed = capsys.readouterr().err
    assert f"Error in point 7: {error}" in printed
    assert ("Traceback" in printed) == (has_traceback or verbose)


@pytest.mark.parametrize(
    ("error", "ends"),
    [(SystemExit(143), True), (SystemExit(130), True), (KeyboardInterrupt(), True), (SystemExit(1), False)],
)
def test_signal_ends_the_sweep(tmp_path: Path, error: BaseException, ends: bool):
    def run(runs: list[Path]) -> None:
        raise error

    if ends:
        with pytest.raises(type(error)):
            sweep.run_point(tmp_path, 0, [], [], run)
    else:
        sweep.run_point(tmp_path, 0, [], [], run)
    assert point(tmp_path, 0)["state"] == ("interrupted" if ends else "failed")


def write_points(folder: Path, *points: tuple[list[str], str, dict, str]) -> None:
    (folder / "points").mkdir()
    for number, (overrides, state, metrics, error) in enumerate(points):
        values = {"number": number, "overrides": overrides, "state": state, "metrics": metrics, "error": error}
        (folder / "points" / f"{number}.json").write_text(json.dumps(values))


def test_table_has_one_row_per_point_in_their_order(tmp_path: Path):
    seeds = [
        (["depth=2", f"seed={seed}", "lr=0.1"], "finished", {"val/loss": 1.23456 * seed, "val/x": 7}, "")
        for seed in range(11)
    ]
    seeds[4] = (["depth=2", "seed=4", "lr=0.1"], "failed", {"val/y": 2}, "e" * 101)
    seeds[5] = (["depth=2", "seed=5", "lr=0.1"], "interrupted", {}, "e" * 100)
    write_points(tmp_path, *seeds)
    text, failed = sweep.table(tmp_path)
    assert failed == 2
    header, *rows, last = text.splitlines()
    assert header.split() == ["point", "state", "val/loss", "val/x", "val/y", "error"]
    assert [row.split()[0] for row in rows] == [f"seed={seed}" for seed in range(11)]
    assert rows[3].split() == ["seed=3", "finished", "3.704", "7", "-"]
    assert rows[4].split() == ["seed=4", "failed", "-", "-", "2", "e" * 99 + "…"]
    assert rows[5].split() == ["seed=5", "interrupted", "-", "-", "-", "e" * 100]
    assert {row.index("finished") for row in rows if "finished" in row} == {header.index("state")}
    assert last == f"9 of 11 points finished; sweep: {tmp_path}"


def test_overrides_of_a_single_point_are_all_shown(tmp_path: Path):
    write_points(tmp_path, (["depth=2", "seed=1"], "finished", {}, ""))
    text, failed = sweep.table(tmp_path)
    assert (failed, text.splitlines()[1].split()) == (0, ["depth=2", "seed=1", "finished"])


def test_equal_points_are_named_by_their_number(tmp_path: Path):
    write_points(tmp_path, *[(["seed=1"], "finished", {}, "")] * 2)
    assert [line.split()[0] for line in sweep.table(tmp_path)[0].splitlines()[1:3]] == ["0", "1"]


def test_sweep_prints_its_table_and_exits_with_1_if_a_point_failed(tmp_path: Path, capsys):
    sweep.run(lambda: None, tmp_path / "without points")
    assert capsys.readouterr().out == "\n"
    write_points(tmp_path, (["seed=1"], "finished", {}, ""), (["seed=2"], "failed", {}, "bad"))
    with pytest.raises(SystemExit) as ended:
        sweep.run(lambda: None, tmp_path)
    assert ended.value.code == 1
    assert capsys.readouterr().out == f"\n{sweep.table(tmp_path)[0]}\n"
    (tmp_path / "points" / "1.json").unlink()
    sweep.run(lambda: None, tmp_path)

    def stop() -> None:
        raise SystemExit(143)

    capsys.readouterr()
    with pytest.raises(SystemExit) as ended:
        sweep.run(stop, tmp_path)
    assert ended.value.code == 143
    assert "1 of 1 points finished" in capsys.readouterr().out
