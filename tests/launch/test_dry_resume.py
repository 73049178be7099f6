"""Dry run of a resumed run: it checks what the resume will do, and changes nothing in the run folder."""

import hashlib
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from blueberry_video import train
from blueberry_video.experiment.run_folder import RunFolder
from blueberry_video.launch import command_line

ROOT = Path(__file__).resolve().parents[2]
TINY = ["data.train.size=16", "data.val.size=4", "data.batch_size=4", "model.encoder.depth=1", "logger=csv"]
TINY += ["callbacks.media=null", "trainer.max_steps=3"]


def start(*overrides: str) -> None:
    command = command_line.parse(["--config-dir", str(ROOT / "experiments" / "template"), *overrides])
    train.run(command.config(), command)


@pytest.fixture(scope="module")
def outputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("outputs")
    start(*TINY, f"output_dir={folder}")
    return folder


def contents(folder: Path) -> dict[str, str]:
    files = [file for file in sorted(folder.rglob("*")) if file.is_file()]
    return {str(file): f"{file.stat().st_mtime_ns} {hashlib.sha256(file.read_bytes()).hexdigest()}" for file in files}


def check(outputs: Path, *overrides: str) -> None:
    """Dry run of a resume; asserts that no file changes."""
    before = contents(outputs)
    try:
        start(*TINY, f"output_dir={outputs}", "resume=last", "check=true", *overrides)
    finally:
        assert contents(outputs) == before


def test_resume_is_tried_with_the_config_and_weights_of_the_run(outputs: Path, capsys, monkeypatch):
    seen = {}
    fit = train.dry_run._fit

    def watch(data, model, task, trainer, findings):
        seen.update(depth=len(model.encoder.blocks), decay=task.optimization.optimizer.keywords["weight_decay"])
        seen["weights"] = {name: value.clone() for name, value in task.state_dict().items()}
        return fit(data, model, task, trainer, findings)

    monkeypatch.setattr(train.dry_run, "_fit", watch)
    [run] = (outputs / "template").iterdir()
    before = contents(outputs)
    start(f"output_dir={outputs}", "resume=last", "check=true", "trainer.max_steps=9", "optimizer.weight_decay=.25")
    assert contents(outputs) == before
    assert (seen["depth"], seen["decay"]) == (1, 0.25), "depth of the run, not of the experiment"
    saved = torch.load(run / "checkpoints" / "step_00000003.ckpt", weights_only=True)["state_dict"]
    assert all(torch.equal(saved[name], value) for name, value in seen["weights"].items())
    printed = capsys.readouterr().out
    for words in ("step_00000003.ckpt (step 3 of 9)", "trainer.max_steps: 3 -> 9", "for 6 steps", "nothing stops"):
        assert words in printed


def test_complete_run_has_nothing_to_try(outputs: Path, capsys):
    check(outputs)
    assert "nothing is left to train" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["model.encoder.depth=2", "trainer.max_steps=9"], r"`model\.encoder\.depth` = 2 .*init_from="),
        (["seed=5", "trainer.max_steps=9"], r"`seed` = 5 "),
        (["data.val.size=3"], r"step 3, and data\.val\.size=3 .*init_from="),
        (
            ["trainer.max_steps=9", "trainer.accumulate_grad_batches=2"],
            r"trainer\.accumulate_grad_batches=2 .*\(1, 3\)",
        ),
    ],
)
def test_override_that_the_resume_refuses_raises(outputs: Path, overrides: list[str], message: str):
    with pytest.raises(ValueError, match=message):
        check(outputs, *overrides)


def test_run_that_does_not_exist_raises(outputs: Path):
    with pytest.raises(FileNotFoundError, match=r"resume=yesterday .*one of: \d{4}-"):
        start(*TINY, f"output_dir={outputs}", "check=true", "resume=yesterday")


def test_run_in_use_raises(outputs: Path):
    [run] = (outputs / "template").iterdir()
    code = "import sys; from blueberry_video.experiment.lock import RunLock; from pathlib import Path;"
    code += "lock = RunLock(Path(sys.argv[1])); print('locked', flush=True); sys.stdin.read()"
    command = [sys.executable, "-c", code, str(run)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as owner:
        assert owner.stdout.readline() == "locked\n"
        with pytest.raises(BlockingIOError, match=rf"{run} is in use by process {owner.pid} "):
            check(outputs, "trainer.max_steps=9")
        owner.communicate("")
    assert RunFolder.find("template", "last", outputs, lock=False).path == run


def test_run_without_a_valid_checkpoint_raises(outputs: Path, tmp_path: Path):
    copy = tmp_path / "outputs"
    shutil.copytree(outputs, copy)
    [file] = copy.rglob("*.ckpt")
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(FileNotFoundError, match=r"step_00000003\.ckpt: .*checksum"):
        check(copy, "trainer.max_steps=9")
