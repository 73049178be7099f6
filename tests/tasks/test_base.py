"""Task base class: preparation of batches, and learning rates."""

import os
from dataclasses import replace
from functools import partial
from types import SimpleNamespace

import lightning
import pytest
import torch
from torch import Tensor, nn

from blueberry_video.augmentation import repeat_clips
from blueberry_video.data.datamodule import DataModule
from blueberry_video.data.sprites import Sprites
from blueberry_video.models.classifier import VideoClassifier
from blueberry_video.models.vit import VisionTransformer
from blueberry_video.optim import warmup_cosine
from blueberry_video.tasks.base import Task
from blueberry_video.tasks.classification import Classification
from blueberry_video.tasks.settings import ClipInput, Optimization
from gloo_group import gloo_group

OPTIMIZATION = Optimization(partial(torch.optim.SGD, lr=0.1), warmup_cosine)


class Tiny(nn.Module):
    def __init__(self, depth: int = 0):
        super().__init__()
        self.encoder = VisionTransformer(16, 4, 8, 2, embed_dim=4, depth=depth, num_heads=1)


class Recorder(Task):
    """Task that records (stage, video, learning rates) of every step and the last batch of each stage."""

    def shared_step(self, batch: dict, stage: str) -> dict[str, Tensor]:
        rates = [group["lr"] for optimizer in self.trainer.optimizers for group in optimizer.param_groups]
        self.batches = {**getattr(self, "batches", {}), stage: batch}
        self.seen = [*getattr(self, "seen", []), (stage, batch["video"], rates)]
        features = self.model.encoder(self.normalize(batch["video"]))
        return {"loss": features[..., 0].square().mean()}  # over all channels the LayerNorm would make it 1

    @property
    def rates(self) -> list[float]:
        return [rate for stage, _, rates in self.seen if stage == "train" for rate in rates]


class Negative(nn.Module):
    """Augmentation that negates the video."""

    def forward(self, video: Tensor) -> Tensor:
        return -video


class Noise(nn.Module):
    def forward(self, video: Tensor) -> Tensor:
        return torch.rand(video.shape)


@pytest.fixture
def run(trainer):
    def fit(
        max_steps: int = 4, accumulate: int = 1, callbacks=(), depth: int = 0, input: ClipInput | None = None, **changes
    ) -> Recorder:
        torch.manual_seed(0)
        task = Recorder(Tiny(depth), replace(OPTIMIZATION, **changes), input)
        sprites = {"num_frames": 4, "image_size": 16}
        data = DataModule(Sprites("train", 8, **sprites), Sprites("val", 2, **sprites), batch_size=2)
        trainer(*callbacks, max_steps=max_steps, accumulate_grad_batches=accumulate).fit(task, datamodule=data)
        return task

    return fit


def test_clips_become_channels_first_floats_in_unit_range(run):
    task = run()
    stages = {stage: video for stage, video, _ in task.seen}
    assert stages["train"].shape == (2, 3, 4, 16, 16)
    assert stages["train"].dtype == torch.float32
    clips = Sprites("val", 2, num_frames=4, image_size=16)
    expected = torch.stack([clips[i]["video"] for i in range(2)]).float().permute(0, 2, 1, 3, 4) / 255
    torch.testing.assert_close(stages["val"], expected)


def test_augmentation_is_applied_in_training_only(run):
    for stage, video, _ in run(input=ClipInput(Negative())).seen:
        assert (video.max() <= 0) == (stage == "train")
        assert (video.min() >= 0) == (stage == "val")


def test_augmentation_draws_after_the_step_is_seeded(run):
    """A callback seeds every step, so that a resumed run draws the same numbers as an uninterrupted one."""

    class Seed(lightning.Callback):
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            torch.manual_seed(batch_idx)

    drawn = [video for stage, video, _ in run(input=ClipInput(Noise()), callbacks=[Seed()]).seen if stage == "train"]
    for batch_idx, video in enumerate(drawn):
        torch.manual_seed(batch_idx)
        assert torch.equal(video, torch.rand(2, 3, 4, 16, 16))


def test_normalize_uses_mean_and_std_of_each_channel():
    task = Recorder(Tiny(), OPTIMIZATION, ClipInput(mean=(0.1, 0.2, 0.3), std=(1.0, 2.0, 4.0)))
    video = torch.rand(2, 3, 4, 5, 5)
    expected = torch.stack([(video[:, c] - 0.1 * (c + 1)) / 2**c for c in range(3)], dim=1)
    torch.testing.assert_close(task.normalize(video), expected)
    assert not any("pixel" in name for name in task.state_dict())


def test_mean_without_normalization_raises():
    class Unnormalized(Recorder):
        normalizes = False

    with pytest.raises(ValueError, match=r"task\.input\.mean=\(0\.5, 0\.5, 0\.5\)"):
        Unnormalized(Tiny(), OPTIMIZATION, ClipInput(mean=(0.5, 0.5, 0.5)))


def test_learning_rate_follows_the_schedule_over_all_steps(run):
    rates = run(max_steps=6).rates
    expected = [0.1 * warmup_cosine(step, 6) for step in range(6) for _ in range(2)]  # two parameter groups
    assert rates == pytest.approx(expected)
    assert rates[-1] == 0


@pytest.mark.parametrize(("accumulate", "scale"), [(1, 2 / 256), (2, 4 / 256)])
def test_learning_rate_scales_with_the_global_batch(run, accumulate, scale):
    task = run(max_steps=2, accumulate=accumulate, schedule=lambda step, total: 1.0, lr_batch_size=256)
    assert task.rates[:2] == pytest.approx([0.1 * scale, 0.1 * scale])


def test_learning_rate_scales_with_the_clips_of_a_step_in_short_epochs(run):
    """An epoch has 4 batches of 2 clips, so that no step accumulates more than 4 batches."""
    task = run(max_steps=1, accumulate=16, schedule=lambda step, total: 1.0, lr_batch_size=256)
    assert task.rates[0] == pytest.approx(0.1 * 8 / 256)


class Gradients(lightning.Callback):
    """Callback that records gradients and the logged loss of each optimizer step."""

    def __init__(self):
        self.gradients, self.losses = [], []

    def on_before_optimizer_step(self, trainer, pl_module, optimizer):
        self.gradients.append(torch.cat([p.grad.flatten() for p in pl_module.parameters() if p.grad is not None]))

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        if trainer.global_step > len(self.losses):
            self.losses.append(trainer.logged_metrics["train/loss"].item())


def test_every_accumulated_step_is_the_mean_over_its_batches(run):
    """4 batches an epoch: steps of 3 batches and of 1. At a learning rate of 0 weights stay the same."""
    frozen = {"optimizer": partial(torch.optim.SGD, lr=0.0)}
    single, accumulated = Gradients(), Gradients()
    run(max_steps=4, callbacks=[single], **frozen)
    assert len({round(loss, 3) for loss in single.losses}) == 4
    run(max_steps=2, accumulate=3, callbacks=[accumulated], **frozen)
    for values, expected in (("gradients", single.gradients), ("losses", [torch.tensor(x) for x in single.losses])):
        found = [torch.as_tensor(value) for value in getattr(accumulated, values)]
        torch.testing.assert_close(found[0], torch.stack(expected[:3]).mean(dim=0))
        torch.testing.assert_close(found[1], expected[3])


def evaluate(rank: int, world_size: int, folder: str) -> None:
    """Writes the metrics of one of ``world_size`` processes, rank 0."""
    torch.set_num_threads(1)
    os.environ.update(MASTER_ADDR="127.0.0.1", TORCHELASTIC_RUN_ID="test", RANK=str(rank), LOCAL_RANK=str(rank))
    os.environ.update(WORLD_SIZE=str(world_size), LOCAL_WORLD_SIZE=str(world_size))
    with gloo_group(folder, rank, world_size):
        save_metrics(world_size, f"{folder}/{world_size}" if rank == 0 else None, folder)


def save_metrics(world_size: int, file: str | None, folder: str) -> None:
    """Validates and tests a classifier on 5 clips, and saves the metrics."""
    torch.manual_seed(0)
    clips = Sprites("val", 5, num_frames=4, image_size=16)
    task = Classification(
        VideoClassifier(Tiny().encoder, {name: len(names) for name, names in clips.classes.items()}), OPTIMIZATION
    )
    data = DataModule(Sprites("train", 8, num_frames=4, image_size=16), clips, batch_size=2, test=clips)
    silent = dict.fromkeys(("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False)
    trainer = lightning.Trainer(
        accelerator="cpu", devices=world_size, strategy="ddp" if world_size > 1 else "auto",
        use_distributed_sampler=False, default_root_dir=folder, **silent,
    )  # fmt: skip
    metrics = trainer.validate(task, datamodule=data, verbose=False)[0]
    metrics |= trainer.test(task, datamodule=data, verbose=False)[0]
    if file:
        torch.save(metrics, file)


def test_metrics_are_the_same_on_any_number_of_processes(tmp_path):
    """5 clips: batches of 2, 2 and 1 on one process; of 2 and 1, then of 1 and 1 on two."""
    save_metrics(1, f"{tmp_path}/1", str(tmp_path))
    torch.multiprocessing.spawn(evaluate, (2, str(tmp_path)), nprocs=2)
    one, two = (torch.load(tmp_path / str(number)) for number in (1, 2))
    assert one == pytest.approx(two, rel=1e-5)
    assert {"val/loss", "val/motion", "val/motion_trivial", "val/motion_within_pairs", "test/loss"} <= one.keys()


def test_layer_decay_scales_each_rate_once_and_keeps_the_schedule(run):
    """In addition to the scaling with the batch size; the logged rate is that of the head."""

    class Logged(lightning.Callback):
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            self.rates = [*getattr(self, "rates", []), trainer.logged_metrics["train/lr"].item()]

    logged = Logged()
    task = run(max_steps=3, depth=2, layer_decay=0.5, lr_batch_size=1, callbacks=[logged])
    steps = [rates for stage, _, rates in task.seen if stage == "train"]
    for step, rates in enumerate(steps):
        head = 0.1 * 2 * warmup_cosine(step, 3)
        assert rates == pytest.approx([head * 0.5**layer for layer in range(4) for _ in range(2)])
    assert logged.rates == pytest.approx([0.2 * warmup_cosine(step, 3) for step in range(3)])


def test_a_layer_decay_of_one_changes_nothing(run):
    assert run(layer_decay=1.0).rates == run().rates


def test_clips_are_repeated_before_augmentation_in_training_only(run):
    task = run(input=ClipInput(Noise(), repeats=3), max_steps=1)
    videos = {stage: video for stage, video, _ in task.seen}
    assert videos["val"].shape[0] == 2
    assert videos["train"].shape[0] == 6
    assert len(torch.unique(videos["train"].flatten(1), dim=0)) == 6  # each augmented independently


def test_all_values_of_a_batch_are_repeated_alike(run):
    batch = run(input=ClipInput(repeats=2), max_steps=1).batches["train"]
    video, ids, labels = batch["video"], batch["id"], batch["labels"]
    assert len(video) == len(ids) == 4
    assert len(set(ids)) == 2
    assert torch.equal(video[::2], video[1::2])
    assert ids[::2] == ids[1::2]
    assert all(torch.equal(label[::2], label[1::2]) and len(label) == 4 for label in labels.values())


def test_repeat_clips_keeps_values_aligned():
    batch = {"video": torch.arange(3), "id": ["a", "b", "c"], "labels": {"motion": torch.tensor([7, 8, 9])}}
    assert repeat_clips(batch, 1) is batch
    twice = repeat_clips(batch, 2)
    assert twice["video"].tolist() == [0, 0, 1, 1, 2, 2]
    assert twice["id"] == ["a", "a", "b", "b", "c", "c"]
    assert twice["labels"]["motion"].tolist() == [7, 7, 8, 8, 9, 9]


def test_images_have_a_separate_number_of_repeats():
    task = Recorder(Tiny(), OPTIMIZATION, ClipInput(repeats=4, image_repeats=2))
    sizes = []
    task.shared_step = lambda batch, stage: sizes.append(len(batch["video"])) or {"loss": torch.zeros(())}
    task.log = task.log_dict = lambda *_, **options: None
    optimizer = torch.optim.SGD(task.parameters(), lr=0.1)
    task._trainer = SimpleNamespace(accumulate_grad_batches=1, num_training_batches=2, optimizers=[optimizer])
    for frames in (4, 1):
        task.training_step({"video": torch.zeros(3, 3, frames, 16, 16)}, 0)
    assert sizes == [12, 6]


@pytest.mark.parametrize("key", ["repeats", "image_repeats"])
def test_repeats_below_one_raise(key):
    with pytest.raises(ValueError, match=rf"task\.input\.{key}=0\b"):
        ClipInput(**{key: 0})


def test_tokens_per_clip_counts_the_grid():
    batch = {"video": torch.zeros(5, 3, 4, 16, 16)}
    assert Recorder(Tiny(), OPTIMIZATION).tokens_per_clip(batch) == 8
    assert Recorder(Tiny(), OPTIMIZATION, ClipInput(repeats=3)).tokens_per_clip(batch) == 24
