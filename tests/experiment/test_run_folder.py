import errno
import json
import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from omegaconf import OmegaConf

from blueberry_video.experiment import record
from blueberry_video.experiment.checkpoint import AtomicCheckpointIO
from blueberry_video.experiment.git import git_state
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


def test_runs_of_the_same_second_have_separate_folders(tmp_path: Path) -> None:
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


def test_unknown_metric_raises_with_the_nearest(run: RunFolder) -> None:
    run.finish({"val/motion": 0.5, "val/shape": math.nan})
    assert run.metric("val/motion") == 0.5
    assert run.metric("val/shape") is run.metric(None) is None
    assert run.metric("val/loss") is None, "the default, of a run without validation"
    with pytest.raises(ValueError, match=r"optimized_metric=val/moton .*`val/motion`"):
        run.metric("val/moton")


def test_json_is_valid_if_a_metric_is_not_finite(run: RunFolder) -> None:
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
def test_exception_is_recorded_and_propagates(run: RunFolder, error: BaseException, status: str) -> None:
    ended = []
    run.on_close.append(ended.append)
    with pytest.raises(type(error)), run:
        raise error
    assert run.record["status"] == status
    assert type(error).__name__ in run.record["error"]
    assert ended == [False]


def test_config_without_a_name_raises(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"name=None .*`name: my_idea`"):
        RunFolder.create(OmegaConf.create({"seed": 1}), tmp_path)


def test_last_is_the_newest_run_and_starts_again_without_a_checkpoint(
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
        assert capsys.readouterr().out == f"resuming idea / {killed.name}: no checkpoint: starts at step 0\n"


def test_resuming_without_a_valid_checkpoint_raises_and_changes_nothing(run: RunFolder, tmp_path: Path) -> None:
    add_checkpoint(run).write_bytes(b"damaged")
    (run.path / "metrics.csv").write_text("step\n0\n")
    before = run.record
    for name in ("last", run.name):
        with pytest.raises(FileNotFoundError, match=r"step_00000005\.ckpt: "):
            RunFolder.resume("idea", name, tmp_path)
    assert run.record == before
    assert (run.path / "metrics.csv").exists()


def test_resuming_a_finished_run_without_checkpoints_raises(run: RunFolder, tmp_path: Path) -> None:
    run.finish({"val/loss": 0.5})
    before = run.record
    with pytest.raises(FileNotFoundError, match=rf"resume=last: .*{run.name} .*finished"):
        RunFolder.resume("idea", "last", tmp_path)
    assert run.record == before


@pytest.mark.parametrize(
    ("max_steps", "expected"),
    [
        (8, "from step_00000005.ckpt (step 5 of 8)"),
        (-1, "from step_00000005.ckpt (step 5)"),
        (None, "from step_00000005.ckpt (step 5)"),
        (5, "already finished at step 5: raise trainer.max_steps to continue"),
    ],
)
def test_resuming_prints_the_step(
    run: RunFolder, tmp_path: Path, capsys: pytest.CaptureFixture, max_steps: int | None, expected: str
) -> None:
    add_checkpoint(run)
    RunFolder.resume("idea", "last", tmp_path).print_start(max_steps)
    assert capsys.readouterr().out == f"resuming idea / {run.name}: {expected}\n"


def test_keys_of_a_single_call_are_not_saved(tmp_path: Path) -> None:
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


def test_resumed_run_keeps_metrics_that_are_not_measured_again(run: RunFolder, tmp_path: Path) -> None:
    add_checkpoint(run)
    run.finish({"val/loss": 0.5, "probe/motion": 0.9})
    resumed = RunFolder.resume("idea", "last", tmp_path)
    resumed.finish({"val/loss": 0.25})
    assert resumed.record["metrics"] == {"val/loss": 0.25, "probe/motion": 0.9}


def test_unknown_run_raises_with_the_existing_ones(run: RunFolder, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=f"resume=lst .*{run.name}"):
        RunFolder.resume("idea", "lst", tmp_path)
    with pytest.raises(FileNotFoundError, match=r"resume=last .*none"):
        RunFolder.resume("other", "last", tmp_path)


def test_experiment_folder_opens_its_newest_run(tmp_path: Path) -> None:
    RunFolder.create(CONFIG, tmp_path)
    newest = RunFolder.create(CONFIG, tmp_path)
    assert RunFolder.open(tmp_path / "idea").path == newest.path
    assert RunFolder.open(newest.path).path == newest.path
    with pytest.raises(FileNotFoundError, match=rf"{tmp_path} .*run\.json"):
        RunFolder.open(tmp_path)


def test_git_state_distinguishes_dirty_trees(tmp_path: Path) -> None:
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


HOLDER = """
import sys, time
from blueberry_video.experiment.lock import RunLock
from pathlib import Path
lock = RunLock(Path(sys.argv[1]), rank=sys.argv[2] == "rank")
print("locked", flush=True)
sys.stdin.read()
"""


@pytest.mark.parametrize("holder", ["process", "rank"])
def test_run_in_use_cannot_be_resumed_until_its_process_ends(run: RunFolder, tmp_path: Path, holder: str) -> None:
    add_checkpoint(run)
    (run.path / "metrics.csv").write_text("step,a\n0,1\n")
    with run:
        pass  # releases the lock of this process
    before = run.record, (run.path / "metrics.csv").read_text()
    command = [sys.executable, "-c", HOLDER, str(run.path), holder]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout.readline() == "locked\n"
        owner = process.pid if holder == "process" else r"\d+"  # a rank is named by the process that started it
        with pytest.raises(BlockingIOError, match=rf"{run.name} .*process {owner} on \S+ since"):
            RunFolder.resume("idea", "last", tmp_path)
        assert (run.record, (run.path / "metrics.csv").read_text()) == before
        process.kill()
        process.wait()
    assert RunFolder.resume("idea", "last", tmp_path).path == run.path


def test_lock_is_released_at_the_end_of_a_run(run: RunFolder) -> None:
    command = [sys.executable, "-c", HOLDER, str(run.path), "process"]
    locked = subprocess.run(command, input="", capture_output=True, text=True, check=False)
    assert "BlockingIOError" in locked.stderr
    with run:
        run.finish({})
    assert subprocess.run(command, input="", capture_output=True, check=False).returncode == 0


@pytest.mark.parametrize("content", [b"", b"{", b"\xff\x00", b"[]", b"{}"])
def test_damaged_run_json_blocks_no_other_run(run: RunFolder, tmp_path: Path, content: bytes) -> None:
    add_checkpoint(run)
    broken = RunFolder.create(CONFIG, tmp_path)
    (broken.path / "run.json").write_bytes(content)
    with pytest.warns(UserWarning, match=rf"{broken.name}/run\.json"):
        assert RunFolder.resume("idea", run.name, tmp_path).path == run.path
    with (
        pytest.warns(UserWarning, match=rf"{broken.name}/run\.json"),
        pytest.raises(ValueError, match=rf"{broken.name}/run\.json \(\d+ bytes\).*init_from"),
    ):
        RunFolder.resume("idea", "last", tmp_path)


def test_full_disk_does_not_prevent_the_record_of_a_failure(run: RunFolder, monkeypatch) -> None:
    def full(path: Path, text: str) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(record, "write_text", full)
    with pytest.raises(OSError, match="No space"), run:
        raise OSError(errno.ENOSPC, "No space left on device")
    assert run.record["status"] == "failed"
    assert "No space" in run.record["error"]


@pytest.mark.parametrize("name", ["outputs", "outputs/idea"])
def test_output_folder_that_is_a_file_raises(tmp_path: Path, name: str) -> None:
    file = tmp_path / name
    file.parent.mkdir(exist_ok=True)
    file.touch()
    with pytest.raises(OSError, match=r"outputs/idea\b.*another folder"):
        RunFolder.create(CONFIG, tmp_path / "outputs")


@pytest.mark.parametrize("content", [b"", b"a: [", b"\xff\xfe\x00"])
def test_damaged_config_raises_before_anything_changes(run: RunFolder, tmp_path: Path, content: bytes) -> None:
    add_checkpoint(run)
    (run.path / "config.yaml").write_bytes(content)
    before = run.record
    with pytest.raises(ValueError, match=r"config\.yaml .*estore"):
        RunFolder.resume("idea", "last", tmp_path)
    assert run.record == before
