import json
import math
import subprocess
from pathlib import Path

import pytest
import torch
from omegaconf import OmegaConf

from blueberry_video.experiment.checkpoint import AtomicCheckpointIO
from blueberry_video.experiment.provenance import git_state
from blueberry_video.experiment.run_folder import RunFolder, list_runs

CONFIG = OmegaConf.create(
    {
        "name": "idea",
        "seed": 7,
        "model": {"depth": 4},
        "width": "${model.depth}",
        "expected": {"val/loss": {"at_most": 1}},
    }
)


@pytest.fixture
def run(tmp_path: Path) -> RunFolder:
    return RunFolder.create(CONFIG, tmp_path)


def add_checkpoint(run: RunFolder, step: int = 5) -> Path:
    path = run.path / "checkpoints" / f"step_{step:08d}.ckpt"
    AtomicCheckpointIO().save_checkpoint({"step": step}, path)
    return path


def test_new_run_has_its_config_and_record(run: RunFolder, tmp_path: Path) -> None:
    assert run.path.parent == tmp_path / "idea"
    assert "width: 4" in (run.path / "config.yaml").read_text()
    assert run.config.model.depth == 4
    record = run.record
    assert (record["status"], record["seed"], record["experiment"]) == ("running", 7, "idea")
    assert record["versions"]["torch"] == torch.__version__
    assert record["hardware"]["cores"] >= 1
    assert len(record["wandb"]["id"]) == 8
    assert run.checkpoint() is None


def test_two_runs_of_the_same_second_have_folders_of_their_own(tmp_path: Path) -> None:
    runs = [RunFolder.create(CONFIG, tmp_path) for _ in range(3)]
    assert list_runs(tmp_path / "idea") == [run.path for run in runs]
    assert len({run.record["wandb"]["id"] for run in runs}) == 3


def test_finish_records_metrics_and_verdicts(run: RunFolder) -> None:
    with run:
        verdicts = run.finish({"val/loss": torch.tensor(0.5), "val/motion": 1})
    assert [verdict.met for verdict in verdicts] == [True]
    record = run.record
    assert record["status"] == "finished"
    assert record["metrics"] == {"val/loss": 0.5, "val/motion": 1.0}
    assert record["expected"][0]["met"] is True
    assert record["wall_seconds"] > 0


def test_a_metric_that_was_not_reported_is_refused_with_the_nearest(run: RunFolder) -> None:
    run.finish({"val/motion": 0.5, "val/shape": math.nan})
    assert run.metric("val/motion") == 0.5
    assert run.metric("val/shape") is run.metric(None) is None
    assert run.metric("val/loss") is None, "the default, in a run without validation"
    with pytest.raises(ValueError, match=r"`optimized_metric` = val/moton is nothing .*`val/motion`"):
        run.metric("val/moton")


def test_json_stays_valid_where_a_metric_is_not_finite(run: RunFolder) -> None:
    (verdict,) = run.finish({"val/loss": math.nan})
    assert not verdict.met

    def refuse(constant: str) -> None:
        raise AssertionError(constant)

    record = json.loads((run.path / "run.json").read_text(), parse_constant=refuse)
    assert record["metrics"] == {"val/loss": None}


@pytest.mark.parametrize(
    ("error", "status"),
    [(ValueError("bad"), "failed"), (KeyboardInterrupt(), "interrupted"), (SystemExit(1), "interrupted")],
)
def test_exception_is_recorded_and_goes_on(run: RunFolder, error: BaseException, status: str) -> None:
    ended = []
    run.on_close.append(ended.append)
    with pytest.raises(type(error)), run:
        raise error
    assert run.record["status"] == status
    assert type(error).__name__ in run.record["error"]
    assert ended == [False]


def test_config_without_a_name_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no `name`"):
        RunFolder.create(OmegaConf.create({"seed": 1}), tmp_path)


def test_last_is_the_newest_run_and_starts_again_where_it_has_no_checkpoint(
    tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    finished, killed = (RunFolder.create(CONFIG, tmp_path) for _ in range(2))
    add_checkpoint(finished)
    finished.finish({})
    (killed.path / "metrics.csv").write_text("step,train/loss\n0,0.5\n")
    for name in ("last", killed.name):
        resumed = RunFolder.resume("idea", name, tmp_path)
        assert resumed.path == killed.path
        assert resumed.checkpoint() is None
        assert resumed.record["wandb"] == killed.record["wandb"]
        assert not (killed.path / "metrics.csv").exists()
        resumed.print_start(10)
        assert capsys.readouterr().out == f"resuming idea / {killed.name}: no checkpoint yet: from the start\n"


def test_run_whose_checkpoints_are_all_bad_is_refused_and_stays_as_it_was(run: RunFolder, tmp_path: Path) -> None:
    add_checkpoint(run).write_bytes(b"damaged")
    (run.path / "metrics.csv").write_text("step\n0\n")
    before = run.record
    for name in ("last", run.name):
        with pytest.raises(FileNotFoundError, match=r"its contents .* do not match"):
            RunFolder.resume("idea", name, tmp_path)
    assert run.record == before
    assert (run.path / "metrics.csv").exists()


def test_finished_run_without_checkpoints_is_not_started_again(run: RunFolder, tmp_path: Path) -> None:
    run.finish({"val/loss": 0.5})
    before = run.record
    with pytest.raises(FileNotFoundError, match="finished and has no checkpoint"):
        RunFolder.resume("idea", "last", tmp_path)
    assert run.record == before


@pytest.mark.parametrize(
    ("max_steps", "told"),
    [
        (8, "from step_00000005.ckpt (step 5 of 8)"),
        (-1, "from step_00000005.ckpt (step 5)"),
        (None, "from step_00000005.ckpt (step 5)"),
        (5, "already finished at step 5: raise trainer.max_steps to train on"),
    ],
)
def test_resuming_tells_from_where(
    run: RunFolder, tmp_path: Path, capsys: pytest.CaptureFixture, max_steps: int | None, told: str
) -> None:
    add_checkpoint(run)
    RunFolder.resume("idea", "last", tmp_path).print_start(max_steps)
    assert capsys.readouterr().out == f"resuming idea / {run.name}: {told}\n"


def test_what_was_asked_of_one_call_is_not_saved(tmp_path: Path) -> None:
    mode = {"enforce_expected": True, "check": True, "resume": "last"}
    run = RunFolder.create(OmegaConf.merge(CONFIG, mode), tmp_path)
    assert {key: run.config[key] for key in mode} == {"enforce_expected": False, "check": False, "resume": None}
    assert run.config.expected == CONFIG.expected


def test_skipped_files_are_counted_once(run: RunFolder) -> None:
    assert run.record["skipped"] == 0
    rows = ["root,file,reason", "a,1.mp4,bad", "a,2.mp4,bad", "b,1.mp4,bad", 'a,1.mp4,"bad, again"']
    (run.path / "skipped.csv").write_text("\n".join(rows) + "\n")
    run.finish({})
    assert run.record["skipped"] == 3


def test_resuming_is_recorded(run: RunFolder, tmp_path: Path) -> None:
    add_checkpoint(run)
    run.update(session_started=run.record["session_started"] - 100)  # it ran for 100 s and was killed
    resumed = RunFolder.resume("idea", run.name, tmp_path)
    assert resumed.record["status"] == "running"
    assert resumed.record["resumes"][0]["previous_status"] == "running"
    resumed.finish({"val/loss": 0.5})
    assert 100 <= resumed.record["wall_seconds"] < 110


def test_resumed_run_keeps_the_metrics_that_are_not_measured_again(run: RunFolder, tmp_path: Path) -> None:
    add_checkpoint(run)
    run.finish({"val/loss": 0.5, "probe/motion": 0.9})
    resumed = RunFolder.resume("idea", "last", tmp_path)
    resumed.finish({"val/loss": 0.25})
    assert resumed.record["metrics"] == {"val/loss": 0.25, "probe/motion": 0.9}


def test_unknown_run_is_refused_with_those_that_exist(run: RunFolder, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=f"resume=lst: .*Runs there: {run.name}"):
        RunFolder.resume("idea", "lst", tmp_path)
    with pytest.raises(FileNotFoundError, match="Runs there: none"):
        RunFolder.resume("other", "last", tmp_path)


def test_experiment_folder_opens_its_newest_run(tmp_path: Path) -> None:
    RunFolder.create(CONFIG, tmp_path)
    newest = RunFolder.create(CONFIG, tmp_path)
    assert RunFolder.open(tmp_path / "idea").path == newest.path
    assert RunFolder.open(newest.path).path == newest.path
    with pytest.raises(FileNotFoundError, match="holds no run"):
        RunFolder.open(tmp_path)


def test_git_state_tells_dirty_trees_apart(tmp_path: Path) -> None:
    assert git_state(tmp_path) == {"commit": None, "dirty": None, "diff_hash": None}

    def git(*arguments: str) -> None:
        identity = ["-c", "user.name=a", "-c", "user.email=a@b"]
        subprocess.run(["git", *identity, *arguments], cwd=tmp_path, check=True, capture_output=True)

    git("init")
    (tmp_path / "code.py").write_text("a = 1\n")
    git("add", ".")
    git("commit", "-m", "first")
    clean = git_state(tmp_path)
    assert len(clean["commit"]) == 40
    assert (clean["dirty"], clean["diff_hash"]) == (False, None)
    (tmp_path / "code.py").write_text("a = 2\n")
    changed = git_state(tmp_path)
    (tmp_path / "new.py").write_text("b = 1\n")
    untracked = git_state(tmp_path)
    (tmp_path / "new.py").write_text("b = 2\n")
    assert changed["dirty"]
    assert len({state["diff_hash"] for state in (changed, untracked, git_state(tmp_path))}) == 3
