"""Points of a sweep: record of state, metrics and error, identity, and the table."""

import json
from pathlib import Path

import pytest
from omegaconf import OmegaConf

from blueberry_video.launch import command_line, points

METRICS = {"val/loss": 0.5, "val/motion": 0.75, "train/loss": 2.0}
CONFIG = {
    "name": "x",
    "seed": 1,
    "trainer": {"max_steps": 2},
    "optimized_metric": "val/loss",
    "expected": {"val/motion": {"at_least": 0.5}},
    "output_dir": "outputs",
    "resume": None,
    "check": False,
    "enforce_expected": False,
    "allow_targets": [],
}


def new_point(folder: Path, number: int = 3, **values) -> Path:
    file = points.file_of(folder, number)
    points.write(file, points.describe(number, ["seed=1", "depth=2"], OmegaConf.create({**CONFIG, **values})))
    return file


def finish(folder: Path, created: points.Created) -> None:
    """Records a run with ``METRICS``."""
    run = folder / "run"
    run.mkdir(exist_ok=True)
    (run / "run.json").write_text(json.dumps({"metrics": METRICS}))
    created(run)


def test_identity_is_the_config_without_the_keys_of_a_call():
    key = points.key(OmegaConf.create(CONFIG))
    for same in ({"output_dir": "elsewhere"}, {"resume": "last"}, {"check": True}, {"allow_targets": ["a"]}):
        assert points.key(OmegaConf.create({**CONFIG, **same})) == key
    for other in ({"seed": 2}, {"trainer": {"max_steps": 3}}, {"name": "y"}):
        assert points.key(OmegaConf.create({**CONFIG, **other})) != key
    assert points.key(OmegaConf.create(dict(reversed(CONFIG.items())))) == key


def test_finished_point_is_recorded(tmp_path: Path):
    file, states = new_point(tmp_path), []

    def train(created: points.Created, resumed: str | None) -> float:
        states.append((resumed, json.loads(file.read_text())["state"]))
        finish(tmp_path, created)
        states.append(json.loads(file.read_text())["run"])
        return 0.25

    assert points.recorded(file, train) == 0.25
    assert states == [(None, "running"), str(tmp_path / "run")]
    assert points.read(tmp_path) == [
        {
            "number": 3,
            "overrides": ["seed=1", "depth=2"],
            "key": points.key(OmegaConf.create(CONFIG)),
            "names": ["val/loss", "val/motion"],
            "state": "finished",
            "run": str(tmp_path / "run"),
            "metrics": {"val/loss": 0.5, "val/motion": 0.75},
            "objective": 0.25,
            "error": "",
            "log": None,
        }
    ]


def our_error(folder: Path, created: points.Created) -> None:
    finish(folder, created)
    command_line.parse(["seed=1"])


def foreign_error(folder: Path, created: points.Created) -> None:
    raise ArithmeticError("first line\nsecond line")


def missed_gate(folder: Path, created: points.Created) -> None:
    finish(folder, created)
    raise SystemExit("\nval/loss missed\n  all verdicts")


@pytest.mark.parametrize(
    ("fail", "error"),
    [
        (our_error, "the arguments ['seed=1'] contain no experiment"),
        (foreign_error, "ArithmeticError: first line"),
        (missed_gate, "val/loss missed"),
    ],
)
def test_failed_point_is_recorded(tmp_path: Path, fail, error: str):
    file = new_point(tmp_path)
    with pytest.raises((Exception, SystemExit)):
        points.recorded(file, lambda created, resumed: fail(tmp_path, created))
    [found] = points.read(tmp_path)
    assert found["state"] == "failed"
    assert found["error"].startswith(error)
    assert "\n" not in found["error"]
    assert found["metrics"] == ({} if fail is foreign_error else {"val/loss": 0.5, "val/motion": 0.75})


@pytest.mark.parametrize(
    ("error", "state"),
    [
        (SystemExit(143), "interrupted"),
        (SystemExit(130), "interrupted"),
        (KeyboardInterrupt(), "interrupted"),
        (SystemExit(1), "failed"),
        (BlockingIOError("alive"), "running"),
    ],
)
def test_state_after_an_exit(tmp_path: Path, error: BaseException, state: str):
    def train(created: points.Created, resumed: str | None) -> None:
        raise error

    file = new_point(tmp_path)
    with pytest.raises(type(error)):
        points.recorded(file, train)
    assert points.read(tmp_path)[0]["state"] == state


def test_begun_run_is_resumed_while_it_exists(tmp_path: Path):
    file, resumed_runs = new_point(tmp_path), []

    def train(created: points.Created, resumed: str | None) -> None:
        resumed_runs.append(resumed)
        if resumed is None:
            finish(tmp_path, created)
        raise SystemExit(143)

    for _ in range(2):
        with pytest.raises(SystemExit):
            points.recorded(file, train)
    (tmp_path / "run" / "run.json").unlink()
    with pytest.raises(SystemExit):
        points.recorded(file, train)
    assert resumed_runs == [None, "run", None]


def test_a_foreign_error_prints_one_paragraph_and_keeps_its_traceback_in_a_file(
    tmp_path: Path, capsys, monkeypatch: pytest.MonkeyPatch
):
    new_point(tmp_path)
    try:
        foreign_error(tmp_path, lambda run: None)
    except ArithmeticError as error:
        found = error
    monkeypatch.delenv("BLUEBERRY_TRACEBACK", raising=False)
    log = tmp_path / "logs" / "3_traceback.txt"
    assert points.report(found, 3, tmp_path) == (
        f"ArithmeticError: first line\nsecond line. The traceback is in {log}."
    )
    assert "raise ArithmeticError" in log.read_text()
    assert points.read(tmp_path)[0]["log"] == str(log)
    assert capsys.readouterr().err == ""
    monkeypatch.setenv("BLUEBERRY_TRACEBACK", "1")
    points.report(found, 3, tmp_path)
    assert "raise ArithmeticError" in capsys.readouterr().err


def write_points(folder: Path, *records: tuple[list[str], str, dict, str]) -> None:
    for number, (overrides, state, metrics, error) in enumerate(records):
        values = {"number": number, "overrides": overrides, "state": state, "metrics": metrics, "error": error}
        points.write(points.file_of(folder, number), values)


def test_table_has_one_row_per_point_in_their_order(tmp_path: Path):
    seeds = [
        (["depth=2", f"seed={seed}", "lr=0.1"], "finished", {"val/loss": 1.23456 * seed, "val/x": 7}, "")
        for seed in range(11)
    ]
    seeds[4] = (["depth=2", "seed=4", "lr=0.1"], "failed", {"val/y": 2}, "e" * 101)
    seeds[5] = (["depth=2", "seed=5", "lr=0.1"], "interrupted", {}, "e" * 100)
    write_points(tmp_path, *seeds)
    text, failed = points.table(tmp_path)
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
    text, failed = points.table(tmp_path)
    assert (failed, text.splitlines()[1].split()) == (0, ["depth=2", "seed=1", "finished"])


def test_equal_points_are_named_by_their_number(tmp_path: Path):
    write_points(tmp_path, *[(["seed=1"], "finished", {}, "")] * 2)
    assert [line.split()[0] for line in points.table(tmp_path)[0].splitlines()[1:3]] == ["0", "1"]
