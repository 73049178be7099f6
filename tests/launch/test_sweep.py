"""Sweeps that were ended continue with what is missing; failed points are listed, and trained again alone."""

import json
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from omegaconf import DictConfig, OmegaConf

from blueberry_video.launch import points, pool, sweep
from blueberry_video.launch.command_line import Command, Points
from blueberry_video.launch.sweep_folder import SweepFolder

ROOT = Path(__file__).resolve().parents[2]
BASE = {"name": "x", "optimized_metric": "val/loss", "trainer": {"accelerator": "cpu"}, "resume": None}


class FakeCommand(Command):
    """Command of a sweep over seeds, without an experiment."""

    def points(self) -> Points:
        seeds = [word.removeprefix("seed=") for word in self.overrides]
        configs = [OmegaConf.create({**BASE, "seed": seed}) for seed in seeds]
        return Points([([f"seed={seed}"], config) for seed, config in zip(seeds, configs, strict=True)], *where())


def where() -> tuple[Path, str]:
    return Path("sweeps", "one"), "basic"


@pytest.fixture(autouse=True)
def in_temporary_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def run_folder(seed: str) -> Path:
    run = Path("runs", f"run-{seed}").absolute()
    run.mkdir(parents=True, exist_ok=True)
    (run / "run.json").write_text(json.dumps({"metrics": {"val/loss": float(seed)}}))
    return run


def run_seeds(count: int, end: Callable[[str], None] = lambda seed: None, **options) -> list[str]:
    """Runs a sweep over ``count`` seeds; ``end(seed)`` is called after each creates its run folder. Returns the seeds
    that were trained, of resumed ones with an R."""
    command = FakeCommand(Path("x/config.yaml"), False, [f"seed={seed}" for seed in range(count)], True, **options)
    trained = []

    def run(config: DictConfig, command: Command | None, created: points.Created) -> float:
        trained.append(f"{'R' if config.resume else ''}{config.seed}")
        assert (config.resume or f"run-{config.seed}") == f"run-{config.seed}"
        assert (command is None) == (config.resume is None)
        created(run_folder(config.seed))
        end(config.seed)
        return float(config.seed)

    def hydra_main() -> None:
        assert sys.argv[1] == "--multirun"
        folder = Path(sys.argv[-1].removeprefix("hydra.sweep.dir=").strip("'"))
        for number, (words, config) in enumerate(command.points().configs):
            objectives.append(sweep.run_resolved(folder, number, words, config, run))

    objectives: list[float | None] = []
    try:
        sweep.run(command, hydra_main)
    except SystemExit as ended:
        trained.append(f"exit {ended.code}")
    return trained


def folders() -> list[str]:
    return sorted(path.name for path in Path("sweeps").glob("*"))


def stop_at(*seeds: str, code: object = 143) -> Callable[[str], None]:
    def stop(seed: str) -> None:
        if seed in seeds:
            raise SystemExit(code) if isinstance(code, int | str) else code

    return stop


def test_interrupted_sweep_continues_in_its_folder(capsys):
    assert run_seeds(4, stop_at("1")) == ["0", "1", "exit 143"]
    table = capsys.readouterr().out
    assert "1 of 4 points finished" in table
    assert [state for state in ("finished", "interrupted", "pending") if state in table] == [
        "finished",
        "interrupted",
        "pending",
    ]
    assert run_seeds(4) == ["R1", "2", "3"]
    assert "continuing the sweep sweeps/one: 1 of 4 points finished" in capsys.readouterr().out
    assert folders() == ["one"]


def test_finished_sweep_starts_again():
    assert run_seeds(2) == ["0", "1"]
    assert run_seeds(2) == ["0", "1"]
    assert folders() == ["one", "one_2"]


def test_other_points_and_new_are_new_sweeps():
    run_seeds(3, stop_at("1"))
    assert run_seeds(2, stop_at("0")) == ["0", "exit 143"]
    assert run_seeds(3, new=True) == ["0", "1", "2"]
    assert folders() == ["one", "one_2", "one_3"]
    assert run_seeds(2) == ["R0", "1"]
    assert run_seeds(3) == ["0", "1", "2"], "the newest sweep of these points has ended"


def test_killed_sweep_of_12_trains_the_rest_and_nothing_twice(tmp_path: Path):
    code = "\n".join(
        [
            "import os, signal, sys; os.chdir(sys.argv[1]); killed = sys.argv[2]",
            "import test_sweep",
            "def end(seed):",
            "    open('trained.txt', 'a').write(seed + ' ')",
            "    if killed == seed: os.kill(os.getpid(), signal.SIGKILL)",
            "test_sweep.run_seeds(12, end)",
        ]
    )
    for seed, expected in (("5", -signal.SIGKILL), ("none", 0)):
        command = [sys.executable, "-c", code, str(tmp_path), seed]
        environment = {**os.environ, "PYTHONPATH": f"{ROOT / 'src'}:{ROOT / 'tests'}:{Path(__file__).parent}"}
        result = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
        assert result.returncode == expected, result.stderr
    trained = Path("trained.txt").read_text().split()
    assert trained == [*"01234", "5", "5", *"6789", "10", "11"], "the interrupted point continues in its run"
    assert "12 of 12 points finished" in result.stdout
    assert len([*Path("runs").iterdir()]) == 12


def test_failed_points_are_listed_and_retried_alone(capsys):
    assert run_seeds(3, stop_at("1", code="bad weather")) == ["0", "1", "2", "exit 1"]
    output = capsys.readouterr()
    assert "Error in point 1: bad weather" in output.err
    assert "point 1 failed: bad weather. Log: " in output.out
    assert "RETRY=failed" in output.out
    assert run_seeds(3, stop_at("1", code="worse"), retry="failed") == ["R1", "exit 1"]
    assert run_seeds(3, retry="failed") == ["R1"]
    assert folders() == ["one"]
    with pytest.raises(ValueError, match=r"RETRY=failed.*sweeps/one.*no failed point"):
        run_seeds(3, retry="failed")
    with pytest.raises(ValueError, match=r"RETRY=failed.*no earlier sweep"):
        run_seeds(2, retry="failed")


def test_failed_point_of_an_interrupted_sweep_is_not_trained_again():
    def end(seed: str) -> None:
        stop_at("0", code="bad")(seed)
        stop_at("1")(seed)

    assert run_seeds(3, end) == ["0", "1", "exit 143"]
    assert run_seeds(3) == ["R1", "2", "exit 1"]


def test_fail_fast_ends_the_sweep_and_leaves_the_rest():
    assert run_seeds(3, stop_at("0", code="bad"), fail_fast=True) == ["0", "exit 1"]
    assert run_seeds(3, fail_fast=True) == ["1", "2", "exit 1"]
    assert run_seeds(3, fail_fast=True, retry="failed") == ["R0"]


def test_sweep_that_is_running_is_left_alone(capsys):
    other = multiprocessing.get_context("fork")
    locked, done = other.Event(), other.Event()

    def hold() -> None:
        folder = SweepFolder(Path("sweeps/one"))
        assert folder.lock()
        locked.set()
        done.wait(20)

    run_seeds(2, stop_at("0"))
    capsys.readouterr()
    process = other.Process(target=hold)
    process.start()
    assert locked.wait(10)
    assert SweepFolder(Path("sweeps/one")).is_running()
    assert run_seeds(2) == ["0", "1"]
    done.set()
    process.join()
    assert "sweeps/one of the same points is running" in capsys.readouterr().out
    assert folders() == ["one", "one_2"]


def test_points_that_a_sweeper_chooses_are_numbered_and_found_by_their_config():
    folder = SweepFolder.create(Path("sweeps/one"), [], file="x", overrides=[], keys=[]).path
    trained = []

    def run(config: DictConfig, command: Command | None, created: points.Created) -> float:
        trained.append(config.seed)
        created(run_folder(str(config.seed)))
        return config.seed

    for number, seed in ((0, 5), (1, 6), (0, 6), (1, 7)):  # a sweeper that starts again counts from 0
        config = OmegaConf.create({**BASE, "seed": seed})
        assert sweep.run_resolved(folder, number, [f"seed={seed}"], config, run) == seed
    assert trained == [5, 6, 7]
    assert [record["number"] for record in points.read(folder)] == [0, 1, 2]


def test_equal_points_are_both_trained():
    assert [seed for _ in range(2) for seed in run_seeds_of(["seed=1", "seed=1"])] == ["1", "1", "1", "1"]


def run_seeds_of(words: list[str]) -> list[str]:
    command, trained = FakeCommand(Path("x/config.yaml"), False, words, True), []

    def run(config: DictConfig, command: Command | None, created: points.Created) -> float:
        trained.append(config.seed)
        return 0.0

    def hydra_main() -> None:
        folder = Path(sys.argv[-1].removeprefix("hydra.sweep.dir=").strip("'"))
        for number, (overrides, config) in enumerate(command.points().configs):
            sweep.run_resolved(folder, number, overrides, config, run)

    sweep.run(command, hydra_main)
    return trained


TRAIN = """
import json, os, signal, sys, time
from pathlib import Path
sys.path.insert(0, os.environ["TESTS"])
from blueberry_video.launch import points, processes, signals
processes.end_with_parent()
seed = sys.argv[-1].removeprefix("seed=")
def train(created, resumed):
    print("training", seed, os.environ.get("OMP_NUM_THREADS"), resumed, flush=True)
    import test_sweep
    created(test_sweep.run_folder(seed))
    for _ in range(int(os.environ["POLLS"])): time.sleep(0.05)
    if seed == os.environ.get("FAIL"): raise SystemExit("bad")
    if seed == os.environ.get("KILL"): os.kill(os.getpid(), signal.SIGKILL)
    return float(seed)
with signals.handled():
    points.recorded(Path(os.environ["BLUEBERRY_VIDEO_POINT"]), train)
"""


@pytest.fixture
def fake_training(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Module that stands in for ``blueberry_video.train`` in the processes of a pool."""
    (tmp_path / "fake_training.py").write_text(TRAIN)
    monkeypatch.setattr(pool, "MODULE", "fake_training")
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: range(4))
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}:{ROOT / 'src'}:{ROOT / 'tests'}")
    monkeypatch.setenv("TESTS", str(ROOT / "tests" / "launch"))
    monkeypatch.setenv("POLLS", "1")
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)


@pytest.mark.usefixtures("fake_training")
def test_parallel_points_share_the_cores(capsys, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("FAIL", "1")
    monkeypatch.setenv("KILL", "2")
    assert run_seeds(3, jobs=2) == ["exit 1"]
    output = capsys.readouterr()
    states = {record["number"]: record["state"] for record in points.read(Path("sweeps/one"))}
    assert states == {0: "finished", 1: "failed", 2: "failed"}
    assert Path("sweeps/one/logs/0.log").read_text() == "training 0 2 None\n"
    assert "Error in point 1: bad. Log: sweeps/one/logs/1.log" in output.err
    assert "Error in point 2: it was ended by SIGKILL" in output.err
    monkeypatch.delenv("FAIL")
    monkeypatch.delenv("KILL")
    assert run_seeds(3, jobs=2, retry="failed") == []
    assert Path("sweeps/one/logs/1.log").read_text().splitlines()[-1] == "training 1 2 run-1"
    assert "3 of 3 points finished" in capsys.readouterr().out


@pytest.mark.usefixtures("fake_training")
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_signal_ends_all_parallel_points(tmp_path: Path, number: signal.Signals, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("POLLS", "400")
    code = "\n".join(
        [
            "import os, sys; sys.path.insert(0, os.environ['TESTS'])",
            "from blueberry_video.launch import pool, signals",
            "import test_sweep",
            "pool.MODULE = 'fake_training'",
            "os.sched_getaffinity = lambda process: range(4)",
            "from blueberry_video.launch import sweep",
            "command = test_sweep.FakeCommand(test_sweep.Path('x/c.yaml'), False, ['seed=0', 'seed=1'], True, jobs=2)",
            "with signals.handled():",
            "    sweep.run(command, None)",
        ]
    )
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    wait_for(lambda: [record["state"] for record in points.read(Path("sweeps/one"))] == ["running"] * 2)
    wait_for(lambda: all(record["run"] for record in points.read(Path("sweeps/one"))))
    process.send_signal(number)
    output = process.communicate(timeout=30)[0]
    killed = number == signal.SIGKILL
    assert process.returncode == (-number if killed else 128 + number), output
    wait_for(lambda: not children("fake_training", tmp_path))
    states = [record["state"] for record in points.read(Path("sweeps/one"))]
    assert states == (["running"] * 2 if killed else ["interrupted"] * 2)


def children(module: str, folder: Path) -> list[int]:
    """Processes that run a module in a folder."""
    found = []
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            if module in (entry / "cmdline").read_text() and (entry / "cwd").resolve() == folder:
                found.append(int(entry.name))
        except OSError:
            continue
    return found


def wait_for(condition: Callable[[], bool], seconds: float = 30) -> None:
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        try:
            if condition():
                return
        except ValueError:  # a file that is being replaced
            continue
        time.sleep(0.05)
    raise AssertionError("the condition is not met in time")


@pytest.mark.parametrize(
    ("visible", "trainer", "jobs", "expected"),
    [
        (None, {"accelerator": "cpu"}, 2, [{"OMP_NUM_THREADS": "2"}] * 2),
        (None, {"accelerator": "cpu", "devices": 2}, 2, [{"OMP_NUM_THREADS": "1"}] * 2),
        ("0,1,2,3", {"accelerator": "gpu"}, 2, [{"CUDA_VISIBLE_DEVICES": "0"}, {"CUDA_VISIBLE_DEVICES": "1"}]),
        ("4,7,5,6", {"accelerator": "gpu", "devices": -1}, 2, [{"CUDA_VISIBLE_DEVICES": f} for f in ("4,7", "5,6")]),
        ("0,1", {"accelerator": "gpu"}, 3, r"JOBS=3.*3 GPUs.*2"),
        ("0,1,2", {"accelerator": "gpu", "devices": 2}, 2, r"JOBS=2.*4 GPUs.*at most 1"),
        (None, {"accelerator": "cpu"}, 5, r"JOBS=5.*4 cores"),
    ],
)
def test_share_of_each_process(monkeypatch: pytest.MonkeyPatch, visible, trainer, jobs, expected):
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: range(4))
    if visible:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    config = OmegaConf.create({"trainer": {"devices": 1, **trainer}})
    if isinstance(expected, str):
        with pytest.raises(ValueError, match=expected):
            pool.slots(jobs, config)
    else:
        assert pool.slots(jobs, config) == expected


def test_parallel_points_need_a_list_of_points():
    class Chosen(FakeCommand):
        def points(self) -> Points:
            return super().points()._replace(sweeper="optuna")

    command = Chosen(Path("x/config.yaml"), False, ["seed=1"], True, jobs=2)
    with pytest.raises(ValueError, match=r"JOBS=2.*optuna.*hydra/launcher=joblib"):
        sweep.run(command, lambda: None)
