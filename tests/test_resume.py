"""Resuming: a killed and resumed run ends with bit-identical weights, in the same folder and wandb run."""

import contextlib
import copy
import functools
import json
import multiprocessing
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import lightning
import pytest
import torch
from lightning.pytorch.callbacks import Callback, EarlyStopping
from omegaconf import OmegaConf
from torch import nn

from blueberry_video.callbacks import EMA, Media, NaNGuard, StepSeed
from blueberry_video.data.datamodule import DataModule
from blueberry_video.data.sprites import Sprites
from blueberry_video.experiment.checkpoint import AtomicCheckpointIO, Checkpoints, checkpoint_files, why_training_ended
from blueberry_video.experiment.loggers import MetricsCSV, Wandb
from blueberry_video.experiment.metrics_table import read_steps
from blueberry_video.experiment.run_folder import RunFolder
from blueberry_video.launch import signals
from blueberry_video.masking import TubeMasking
from blueberry_video.models.masked_autoencoder.model import MaskedAutoencoder
from blueberry_video.models.vit import VisionTransformer
from blueberry_video.optim import warmup_cosine
from blueberry_video.tasks.masked_pixels import MaskedPixels
from blueberry_video.tasks.settings import ClipInput, Optimization

STEPS, BATCHES_AN_EPOCH = 12, 5
KILLABLE_STEPS = 60
# Children are forked from a process without threads that has imported the slow modules.
PROCESSES = multiprocessing.get_context("forkserver")
PROCESSES.set_forkserver_preload(
    ["lightning", "wandb", "blueberry_video.callbacks", "blueberry_video.experiment.loggers"]
)

pytestmark = pytest.mark.filterwarnings("ignore")


def train(
    run: RunFolder,
    *callbacks: Callback,
    num_workers: int = 0,
    augment: bool = False,
    wandb: bool = False,
    keep: int = 1000,
    every_n_steps: int = 1,
    max_steps: int = STEPS,
    checkpoints: Checkpoints | None = None,
    evaluate: bool = False,
    **trainer_options,
) -> dict[str, torch.Tensor]:
    """Trains a tiny VideoMAE with random masks, stochastic depth and EMA; returns the averaged weights."""
    torch.set_num_threads(1)
    lightning.seed_everything(run.record["seed"], verbose=False)
    encoder = VisionTransformer(16, 4, 8, 2, embed_dim=24, depth=2, num_heads=2, drop_path=0.3)
    task = MaskedPixels(
        MaskedAutoencoder(encoder, 24, 1, 2),
        Optimization(functools.partial(torch.optim.AdamW, lr=1e-3), warmup_cosine),
        TubeMasking(0.75),
        ClipInput(nn.Dropout(0.2) if augment else None),
    )
    sprites = functools.partial(Sprites, num_frames=4, image_size=16)
    data = DataModule(sprites("train", 4 * BATCHES_AN_EPOCH), sprites("val", 4), 4, num_workers, seed=1)
    trainer = lightning.Trainer(
        max_steps=max_steps,
        accelerator="cpu",
        logger=[MetricsCSV(run), *([Wandb(run, mode="offline")] if wandb else [])],
        callbacks=[StepSeed(1), EMA(0.9), NaNGuard(), *callbacks, checkpoints or Checkpoints(every_n_steps, keep)],
        plugins=[AtomicCheckpointIO()],
        default_root_dir=run.path,
        num_sanity_val_steps=0,
        log_every_n_steps=1,
        use_distributed_sampler=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        **trainer_options,
    )
    with run:
        trainer.fit(task, datamodule=data, ckpt_path=run.checkpoint())
        metrics = dict(trainer.callback_metrics)
        if evaluate:
            trainer.validate(task, datamodule=data, verbose=False)
        run.finish(metrics, why_training_ended(trainer), trainer.global_step)
    return task.state_dict()


class StopAfter(Callback):
    """Sets ``trainer.should_stop`` after a number of batches."""

    stop_reason = "StopAfter"

    def __init__(self, batches: int) -> None:
        self.left = batches

    def on_train_batch_end(self, trainer: lightning.Trainer, *arguments: object) -> None:
        self.left -= 1
        trainer.should_stop |= self.left == 0


def patience(**options) -> EarlyStopping:
    """Early stopping at the second check: the loss never improves by a million."""
    return EarlyStopping("val/loss", min_delta=1e6, patience=1, **options)


def create(root: Path) -> RunFolder:
    return RunFolder.create(OmegaConf.create({"name": "tiny", "seed": 3}), root)


def differing(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> list[str]:
    assert first.keys() == second.keys()
    return [name for name in first if not torch.equal(first[name], second[name])]


@pytest.mark.parametrize(
    ("steps", "options"),
    [
        (range(1, STEPS), {"val_check_interval": 3}),
        ((2, 5, 6), {"limit_val_batches": 0, "num_workers": 1}),
        ((2, 5, 7), {"val_check_interval": 4, "check_val_every_n_epoch": None, "accumulate_grad_batches": 2}),
        ((2, 5, 6), {"augment": True}),
    ],
    ids=["every-step", "worker-no-validation", "accumulation", "augmentation"],
)
def test_resumed_run_ends_with_the_same_weights(tmp_path: Path, steps: Iterable[int], options: dict) -> None:
    run = create(tmp_path)
    expected = train(run, **options)
    metrics = (run.path / "metrics.csv").read_text()
    for step in steps:
        root = tmp_path / f"until_{step}"
        shutil.copytree(run.path, root / "tiny" / run.name)
        for newer in checkpoint_files(root / "tiny" / run.name / "checkpoints")[: STEPS - step]:
            newer.unlink()
        resumed = RunFolder.resume("tiny", "last", root)
        assert differing(expected, train(resumed, **options)) == [], f"resumed at step {step}"
        assert (resumed.path / "metrics.csv").read_text() == metrics, f"resumed at step {step}"


class SignalInValidation(Callback):
    """Sends SIGTERM to this process in the validation after a step."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_validation_batch_start(self, trainer: lightning.Trainer, *arguments: object) -> None:
        if trainer.global_step == self.step and trainer.state.fn == "fit":
            os.kill(os.getpid(), signal.SIGTERM)


@pytest.mark.parametrize(
    ("step", "options"), [(3, {"val_check_interval": 3}), (5, {}), (STEPS, {"val_check_interval": 2})]
)
def test_validation_that_a_signal_interrupts_is_repeated(tmp_path: Path, step: int, options: dict) -> None:
    options = {**options, "every_n_steps": 100}
    expected = train(create(tmp_path / "whole"), **options)
    run, checkpoints = create(tmp_path / "part"), Checkpoints(100)
    checkpoints.signal_delay = signals.Delay()
    with pytest.raises(SystemExit) as error, signals.handled():
        train(run, SignalInValidation(step), checkpoints=checkpoints, **options)
    assert error.value.code == 143
    assert [file.name for file in checkpoint_files(run.path / "checkpoints")] == [f"step_{step:08d}.ckpt"]
    resumed = RunFolder.resume("tiny", "last", tmp_path / "part")
    assert differing(expected, train(resumed, **options)) == []
    [whole] = (tmp_path / "whole").glob("tiny/*/metrics.csv")
    assert (resumed.path / "metrics.csv").read_text() == whole.read_text()


def child(root: Path, resume: bool) -> None:
    """Trains in a separate process, long enough to be killed."""
    warnings.simplefilter("ignore")
    run = RunFolder.resume("tiny", "last", root) if resume else create(root)
    train(run, wandb=True, keep=2, every_n_steps=7, max_steps=KILLABLE_STEPS, val_check_interval=3)


def start(root: Path, resume: bool = False) -> multiprocessing.Process:
    process = PROCESSES.Process(target=child, args=(root, resume))
    process.start()
    return process


def final_checkpoint(run: RunFolder) -> dict:
    path = checkpoint_files(run.path / "checkpoints")[0]
    assert path.name == f"step_{KILLABLE_STEPS:08d}.ckpt"
    return AtomicCheckpointIO().load_checkpoint(path)


def wandb_steps(run: RunFolder) -> list[int]:
    """Returns the steps in the wandb files of all processes of a run, in the order in which they are synced."""
    steps = []
    for file in sorted(run.path.glob("wandb/offline-run-*/*.wandb"), key=lambda file: file.parent.name):
        assert file.name == f"run-{run.record['wandb']['id']}.wandb"
        command = [sys.executable, "-m", "wandb", "leet", "inspect", "--json", str(file)]
        lines = subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()
        records = [json.loads(line) for line in lines]
        steps += [record["history"]["item"]["_step"] for record in records if record["type"] == "history"]
    return steps


def test_killed_and_resumed_run_equals_an_uninterrupted_one(tmp_path: Path) -> None:
    kill_after = random.randint(15, KILLABLE_STEPS - 15)
    unbroken, broken = tmp_path / "unbroken", tmp_path / "broken"
    start(unbroken).join()
    process = start(broken)
    while not any(max(read_steps(file), default=0) >= kill_after for file in broken.glob("tiny/*/metrics.csv")):
        assert process.is_alive(), f"ended before step {kill_after}"
        time.sleep(0.001)
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    start(broken, resume=True).join()

    expected, run = RunFolder.open(unbroken / "tiny"), RunFolder.open(broken / "tiny")
    assert [path.name for path in (broken / "tiny").iterdir()] == [run.name], "the run continued in a different folder"
    assert run.record["status"] == expected.record["status"] == "finished"
    assert len(run.record["resumes"]) == 1
    assert run.record["metrics"] == expected.record["metrics"]
    wanted, got = final_checkpoint(expected), final_checkpoint(run)
    for weights in ("state_dict", "current_model_state"):  # averaged and trained weights
        assert differing(wanted[weights], got[weights]) == [], f"killed after step {kill_after}"
    assert wanted["optimizer_states"][0]["state"].keys() == got["optimizer_states"][0]["state"].keys()
    assert read_steps(run.path / "metrics.csv") == read_steps(expected.path / "metrics.csv")
    assert len(list(run.path.glob("wandb/offline-run-*"))) == 2
    assert wandb_steps(run) == wandb_steps(expected) == list(range(KILLABLE_STEPS))


def test_damaged_newest_checkpoint_falls_back_to_the_previous_one(tmp_path: Path) -> None:
    run = create(tmp_path)
    expected = train(run, every_n_steps=4, keep=2)
    newest, before = checkpoint_files(run.path / "checkpoints")
    newest.write_bytes(newest.read_bytes()[:-100])
    resumed = RunFolder.resume("tiny", run.name, tmp_path)
    with pytest.warns(UserWarning, match=rf"{before.name}: {newest.name}: "):
        assert resumed.checkpoint() == before
    assert differing(expected, train(resumed, every_n_steps=4, keep=2)) == []


def test_finished_run_continues_with_more_steps(tmp_path: Path) -> None:
    run = create(tmp_path)
    train(run, every_n_steps=100, max_steps=6)
    train(RunFolder.resume("tiny", "last", tmp_path), every_n_steps=100, max_steps=8)
    assert list(read_steps(run.path / "metrics.csv")) == list(range(8))
    assert checkpoint_files(run.path / "checkpoints")[0].name == "step_00000008.ckpt"


def test_interrupted_validation_is_repeated(tmp_path: Path) -> None:
    class CutOff(Callback):
        def on_validation_start(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
            if trainer.global_step == 8 and not trainer.ckpt_path:
                raise RuntimeError("cut off")

    whole, run = create(tmp_path / "whole"), create(tmp_path / "cut")
    train(whole, every_n_steps=4, val_check_interval=3)
    with pytest.raises(RuntimeError, match="cut off"):
        train(run, CutOff(), every_n_steps=4, val_check_interval=3)
    train(RunFolder.resume("tiny", "last", tmp_path / "cut"), CutOff(), every_n_steps=4, val_check_interval=3)
    assert read_steps(run.path / "metrics.csv") == read_steps(whole.path / "metrics.csv")


@pytest.mark.parametrize(
    ("stop", "step", "options"),
    [
        (lambda: StopAfter(7), 7, {}),
        (lambda: StopAfter(7), 7, {"limit_val_batches": 0}),
        (lambda: StopAfter(7), 3, {"limit_val_batches": 0, "accumulate_grad_batches": 3}),
        (patience, 10, {"max_steps": 17}),
        (lambda: patience(check_on_train_epoch_end=False), 8, {"val_check_interval": 3}),
    ],
    ids=["batch", "no-validation", "accumulation", "epoch", "validation"],
)
def test_run_that_stops_early_saves_its_weights_and_can_be_resumed(
    tmp_path: Path, stop: Callable[[], Callback], step: int, options: dict
) -> None:
    options = {"every_n_steps": 100, **options}
    whole, run = create(tmp_path / "whole"), create(tmp_path / "stopped")
    expected = train(whole, **options)
    weights = train(run, stop(), **options)
    [final] = checkpoint_files(run.path / "checkpoints")
    assert final.name == f"step_{step:08d}.ckpt"
    assert differing(AtomicCheckpointIO().load_checkpoint(final)["state_dict"], weights) == []
    assert re.search(rf"step {step} of \d+: (StopAfter|EarlyStopping)", run.record["ended_because"])
    resumed = RunFolder.resume("tiny", "last", tmp_path / "stopped")
    assert differing(expected, train(resumed, **options)) == []
    losses = [{k: v["train/loss"] for k, v in read_steps(r.path / "metrics.csv").items()} for r in (whole, run)]
    assert losses[0] == losses[1]
    assert "max_steps" in resumed.record["ended_because"]


class FailsAtTheEnd(Callback):
    """Records ``probe/motion`` after training; fails in the first session of a run."""

    def on_train_end(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        if not trainer.ckpt_path:
            raise RuntimeError("out of memory")
        trainer.callback_metrics["probe/motion"] = torch.tensor(0.5)


@pytest.mark.parametrize(
    ("callbacks", "options"),
    [
        ((), {}),
        ((), {"max_steps": 10}),
        ((), {"max_steps": 10, "limit_val_batches": 0}),
        ((), {"max_steps": -1, "max_epochs": 2, "limit_val_batches": 0}),
        ((), {"max_steps": -1, "max_epochs": 2}),
        ((StopAfter(7),), {}),
        ((StopAfter(7),), {"limit_val_batches": 0}),
        ((patience(),), {"max_steps": 30}),
    ],
    ids=[
        "steps",
        "whole-epochs",
        "whole-epochs-no-validation",
        "epochs-no-validation",
        "epochs",
        "stopped",
        "stopped-no-validation",
        "early-stopping",
    ],
)
def test_run_that_fails_in_its_final_evaluations_repeats_only_them(
    tmp_path: Path, callbacks: tuple[Callback, ...], options: dict
) -> None:
    options = {"every_n_steps": 8, "evaluate": True, **options}
    whole, run, steps = create(tmp_path / "whole"), create(tmp_path / "failed"), Steps()
    expected = train(whole, *copy.deepcopy(callbacks), **options)
    with pytest.raises(RuntimeError, match="out of memory"):
        train(run, FailsAtTheEnd(), *copy.deepcopy(callbacks), **options)
    assert run.record["status"] == "failed"
    resumed = RunFolder.resume("tiny", "last", tmp_path / "failed")
    assert differing(expected, train(resumed, FailsAtTheEnd(), steps, *callbacks, **options)) == []
    assert steps.trained == 0
    for name, value in whole.record["metrics"].items():
        assert name.startswith("val/") or run.record["metrics"][name] == value  # train.fit validates again
    assert run.record["metrics"]["probe/motion"] == 0.5
    assert run.record["ended_because"] == whole.record["ended_because"]
    assert (run.path / "metrics.csv").read_text() == (whole.path / "metrics.csv").read_text()


class Steps(Callback):
    """Counts the training batches."""

    trained = 0

    def on_train_batch_start(self, *arguments: object) -> None:
        self.trained += 1


class KilledAfterSaving(Checkpoints):
    """Ends the process at the moment at which a checkpoint is complete, before Lightning logs the step."""

    def _prune(self, trainer: lightning.Trainer) -> None:
        super()._prune(trainer)
        if trainer.global_step == 6 and not trainer.ckpt_path:
            raise Killed


class Pictures(Media):
    """Lists the steps of the pictures without drawing them."""

    def __init__(self, steps: list[int]) -> None:
        super().__init__(every_n_steps=5)
        self.steps = steps

    def _make(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, kind: str) -> None:
        self._made_step = trainer.global_step
        self.steps.append(trainer.global_step)


@pytest.mark.parametrize("wandb", [False, True])
def test_kill_just_after_a_checkpoint_loses_no_row_and_no_picture(tmp_path: Path, wandb: bool) -> None:
    whole, run, steps, parts = create(tmp_path / "whole"), create(tmp_path / "killed"), [], []
    options = {"val_check_interval": 2, "check_val_every_n_epoch": None, "every_n_steps": 3, "wandb": wandb}
    train(whole, Pictures(steps), max_steps=11, **options)
    with pytest.raises(Killed):
        train(run, Pictures(parts), max_steps=11, checkpoints=KilledAfterSaving(3), **options)
    assert 5 in read_steps(run.path / "metrics.csv")
    train(RunFolder.resume("tiny", "last", tmp_path / "killed"), Pictures(parts), max_steps=11, **options)
    assert read_steps(run.path / "metrics.csv") == read_steps(whole.path / "metrics.csv")
    assert steps == parts == [2, 8, 11]
    if wandb:
        assert wandb_steps(run) == wandb_steps(whole)


class Drawn(Media):
    """Lists the steps of the pictures that are drawn; ``killed`` ends the process before those of the last step."""

    def __init__(self, steps: list[int], killed: bool = False, **options: Any) -> None:
        super().__init__(**options)
        self.steps, self.killed = steps, killed

    def _make(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, kind: str) -> None:
        if self.killed and trainer.global_step == trainer.max_steps:
            raise Killed
        super()._make(trainer, pl_module, kind)
        self.steps.append(trainer.global_step)


class KilledLater(Callback):
    """Ends the process in the evaluations at the end."""

    def on_train_end(self, *arguments: object) -> None:
        raise Killed


def pictures(run: RunFolder) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in (run.path / "media").glob("*.png")}


@pytest.mark.parametrize("wandb", [False, True])
@pytest.mark.parametrize("later", [False, True], ids=["before", "after"])
def test_kill_around_the_last_pictures_leaves_them_once(tmp_path: Path, later: bool, wandb: bool) -> None:
    options = {"val_check_interval": 2, "check_val_every_n_epoch": None, "max_steps": 5, "wandb": wandb}
    whole, run, steps, parts = create(tmp_path / "whole"), create(tmp_path / "killed"), [], []
    train(whole, Drawn(steps), **options)
    assert steps == [2, 5]
    with pytest.raises(Killed):
        train(run, Drawn(parts, killed=not later), *([KilledLater()] if later else []), **options)
    train(RunFolder.resume("tiny", "last", tmp_path / "killed"), Drawn(parts), **options)
    assert parts == steps
    assert pictures(run) == pictures(whole)
    assert sorted(pictures(run)) == [f"reconstruction_{step:08d}.png" for step in steps]
    if wandb:
        assert wandb_steps(run) == wandb_steps(whole)


def test_pictures_of_the_last_step_after_a_resume_after_the_last_validation(tmp_path: Path) -> None:
    options = {"val_check_interval": 2, "check_val_every_n_epoch": None}
    steps: list[int] = []
    train(create(tmp_path), Drawn([]), max_steps=4, **options)
    train(RunFolder.resume("tiny", "last", tmp_path), Drawn(steps), max_steps=5, **options)
    assert steps == [5]


def test_pictures_of_a_validation_at_the_last_step_are_drawn_once(tmp_path: Path) -> None:
    steps: list[int] = []
    train(
        create(tmp_path), Drawn(steps, every_n_steps=2), max_steps=4, val_check_interval=2, check_val_every_n_epoch=None
    )
    assert steps == [2, 4]


class Killed(Exception):
    pass


class KilledAfter(Callback):
    """Records the clips of every step, and ends the training after ``steps``."""

    def __init__(self, steps: int = 1000) -> None:
        self.steps = steps
        self.clips: dict[int, list[int]] = {}

    def on_train_batch_start(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, batch: dict, batch_idx: int
    ) -> None:
        if len(self.clips) == self.steps:
            raise Killed
        self.clips[trainer.global_step] = list(batch["id"])


@pytest.mark.parametrize("options", [{"check_val_every_n_epoch": 2}, {"limit_val_batches": 0}, {}], ids=str)
@pytest.mark.parametrize(("killed_after", "every_n_steps"), [(1, 1), (5, 5), (7, 5)])
def test_repeatedly_killed_run_reads_the_same_clips(
    tmp_path: Path, killed_after: int, every_n_steps: int, options: dict
) -> None:
    options = {**options, "every_n_steps": every_n_steps, "max_steps": 17}
    unbroken, broken = create(tmp_path / "unbroken"), create(tmp_path / "broken")
    whole, clips = KilledAfter(), {}
    expected = train(unbroken, whole, **options)
    for _ in range(17):
        part = KilledAfter(killed_after)
        with contextlib.suppress(Killed):
            got = train(broken, part, **options)
        clips |= part.clips
        if broken.record["status"] == "finished":
            break
        broken = RunFolder.resume("tiny", "last", tmp_path / "broken")
    assert clips == whole.clips
    assert differing(expected, got) == []
    assert read_steps(broken.path / "metrics.csv") == read_steps(unbroken.path / "metrics.csv")


@pytest.mark.parametrize("name", ["last", "name"])
def test_run_killed_before_its_first_checkpoint_starts_again(tmp_path: Path, name: str) -> None:
    unbroken, older, broken = create(tmp_path), create(tmp_path / "broken"), create(tmp_path / "broken")
    expected = train(unbroken, every_n_steps=5)
    train(older, every_n_steps=5, max_steps=5)
    with pytest.raises(Killed):
        train(broken, KilledAfter(3), every_n_steps=5)
    before = broken.record["wandb"]
    resumed = RunFolder.resume("tiny", name if name == "last" else broken.name, tmp_path / "broken")
    assert (resumed.path, resumed.record["wandb"]) == (broken.path, before)
    assert differing(expected, train(resumed, every_n_steps=5)) == []
    assert (resumed.path / "metrics.csv").read_text() == (unbroken.path / "metrics.csv").read_text()
