"""Students of a model of depth: the same network, trained from scratch on pseudo-labels of the trained one."""

import copy
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from lightning import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.strategies import ModelParallelStrategy
from torch import Tensor
from torch.utils.data import Dataset, default_collate

from blueberry_video.evaluation.end_of_run import evaluate_at_end
from blueberry_video.evaluation.metrics import Means

FOLDER = "pseudo_labels"  # in the run folder


class StudentOfPseudoLabels(Callback):
    """Trains a student on pseudo-labels alone at the end of the run, and compares it with its teacher, the final model.

    The teacher labels clips, and its labels are written to disk. The student has the initial weights of the run, before
    ``init_from``, and the optimizer, schedule and student objective of the task. Logs, on the validation set,
    ``<name>/abs_rel_student``, ``<name>/abs_rel_teacher`` and ``<name>/abs_rel_student_ratio``, student / teacher.

    Args:
        writer: writes labels to a folder and returns the labelled clips, a
            :class:`~blueberry_video.data.pseudo_labels.PseudoLabelWriter`.
        clips: unlabelled clips; their ``depth`` is not read. ``None``: those of ``data.train``.
        num_clips: number of clips that are labelled, from the start; ``None`` for all.
        steps, batch_size: number of optimizer steps and clips per step.
        lr_scale: learning rate relative to that of the task, such as 1.
        name: prefix of the metrics.
        seed: seed of the order of the clips and of the augmentation.

    Raises:
        ValueError: a number out of range; when training begins: weights that are sharded over processes, or too few
            clips.
    """

    def __init__(
        self,
        writer: Callable[..., Any],
        clips: Any = None,
        num_clips: int | None = None,
        steps: int = 500,
        batch_size: int = 16,
        lr_scale: float = 1.0,
        name: str = "student",
        seed: int = 0,
    ):
        for key, value in (("steps", steps), ("batch_size", batch_size), ("num_clips", num_clips)):
            if value is not None and value < 1:
                raise ValueError(f"callbacks.{name}.{key}={value} must be at least 1.")
        if not lr_scale > 0:
            raise ValueError(f"callbacks.{name}.lr_scale={lr_scale} must be above 0.")
        self.writer, self.clips, self.num_clips = writer, clips, num_clips
        self.steps, self.batch_size, self.lr_scale, self.name, self.seed = steps, batch_size, lr_scale, name, seed
        self.untrained: Any = None  # model with the initial weights

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Copies the initial weights, before ``init_from`` or a checkpoint is loaded."""
        if stage != "fit":
            return
        if isinstance(trainer.strategy, ModelParallelStrategy):
            raise ValueError(
                f"callbacks.{self.name} copies the model, but trainer.strategy shards its weights over processes: set "
                f"callbacks.{self.name}=null, or use trainer=ddp."
            )
        pseudo_labeller(pl_module)  # raises before hours of training
        clips = self._unlabelled(trainer.datamodule)  # type: ignore[attr-defined]
        if getattr(clips, "cache_key", None) is None or getattr(clips, "varies_by_epoch", False):
            raise ValueError(
                f"callbacks.{self.name}.clips={self.clips} cannot be labelled, because {type(clips).__name__} has no "
                "cache_key or shows other frames in each epoch: choose sampler=uniform, or a dataset such as World."
            )
        if len(clips) < self.batch_size:
            raise ValueError(
                f"callbacks.{self.name}.batch_size={self.batch_size} exceeds the {len(clips)} clips to label: lower it."
            )
        if self.untrained is None:
            self.untrained = copy.deepcopy(pl_module.model).cpu()  # type: ignore[union-attr, operator]

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        evaluate_at_end(trainer, self.name, lambda: self.measure(trainer, pl_module))

    def measure(self, trainer: Trainer, task: Any) -> dict[str, float]:
        """Returns the metrics without their prefix."""
        assert self.untrained is not None, "setup runs first"
        folder = Path(trainer.default_root_dir) / FOLDER
        training = task.training
        task.eval()
        val = trainer.datamodule.val  # type: ignore[attr-defined]
        teacher = f"{type(task.model).__name__}/step-{trainer.global_step}"
        clips = self._unlabelled(trainer.datamodule)  # type: ignore[attr-defined]
        labelled = self.writer(clips, pseudo_labeller(task), folder, teacher)
        found = {"abs_rel_teacher": validated(task, val, self.batch_size)}
        student = self.train(task, labelled)
        found["abs_rel_student"] = validated(student, val, self.batch_size)
        found["abs_rel_student_ratio"] = found["abs_rel_student"] / found["abs_rel_teacher"]
        task.train(training)
        shutil.rmtree(folder)
        return found

    def train(self, task: Any, labelled: Dataset) -> Any:
        """Returns a copy of the task with a student that was trained on labelled clips."""
        student = copy.copy(task)
        student._modules = {**task._modules, "model": copy.deepcopy(self.untrained).to(task.device, task.dtype)}
        student.train()
        settings = task.optimization
        optimizer = settings.optimizer(student.parameter_groups())
        rates = [group["lr"] * group["lr_scale"] * self.lr_scale for group in optimizer.param_groups]
        generator, order = torch.Generator().manual_seed(self.seed), torch.empty(0, dtype=torch.long)
        with torch.random.fork_rng(), torch.enable_grad():
            torch.manual_seed(self.seed)
            for step in range(self.steps):
                for group, rate in zip(optimizer.param_groups, rates, strict=True):
                    group["lr"] = rate * settings.schedule(step, self.steps)
                while len(order) < self.batch_size:  # batches span epochs, so every clip is used equally often
                    order = torch.cat([order, torch.randperm(len(labelled), generator=generator)])  # type: ignore[arg-type]
                index, order = order[: self.batch_size].tolist(), order[self.batch_size :]
                batch = _on_device(student, default_collate([_inputs(labelled[i]) for i in index]))
                optimizer.zero_grad()
                student.shared_step(batch, "train")["loss"].backward()
                optimizer.step()
        return student.eval()

    def _unlabelled(self, data: Any) -> Any:
        clips = data.train if self.clips is None else self.clips
        return clips if self.num_clips is None or self.num_clips >= len(clips) else FirstClips(clips, self.num_clips)


class FirstClips(Dataset):
    """The first ``count`` clips of a dataset with a ``cache_key``."""

    def __init__(self, dataset: Any, count: int):
        self.dataset, self.count = dataset, count
        self.varies_by_epoch = getattr(dataset, "varies_by_epoch", False)

    @property
    def cache_key(self) -> str | None:
        if getattr(self.dataset, "cache_key", None) is None:
            return None
        return f"first-{self.count}/{self.dataset.cache_key}"

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> dict:
        return self.dataset[index]


def pseudo_labeller(task: Any) -> Callable[[Tensor], Tensor]:
    """Returns a function video uint8 (T, 3, H, W) -> disparity (T, H, W) on the CPU that predicts with a task of depth.

    Raises:
        ValueError: the model predicts metric depth.
    """
    if getattr(task.model, "max_depth", None) is not None:
        raise ValueError(
            f"the teacher has model.max_depth={task.model.max_depth} and predicts metric depth: use a run of a model "
            "with max_depth=null, which predicts disparity."
        )

    @torch.no_grad()
    def label(video: Tensor) -> Tensor:
        return task.predict(_on_device(task, {"video": video[None]})["video"])[0].float().cpu()

    return label


@torch.no_grad()
def validated(task: Any, dataset: Any, batch_size: int) -> float:
    """Returns the mean ``abs_rel`` of a task over the clips of a dataset with depth."""
    means = Means()
    for start in range(0, len(dataset), batch_size):
        clips = [dataset[i] for i in range(start, min(start + batch_size, len(dataset)))]
        batch = _on_device(task, default_collate(clips))
        scores = task.scores(task.predict(batch["video"]), batch, task.metric)
        means.add("abs_rel", scores["abs_rel"], 0)
    return float(means.compute()["abs_rel"])


def _inputs(clip: dict) -> dict:
    return {key: clip[key] for key in ("video", "disparity")}


def _on_device(task: Any, batch: dict) -> dict:
    """Moves tensors to the device of the task and converts the video as in training."""
    moved = {key: value.to(task.device) if isinstance(value, Tensor) else value for key, value in batch.items()}
    return task.on_after_batch_transfer(moved, 0)
