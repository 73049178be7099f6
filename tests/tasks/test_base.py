"""What all tasks share: the batch's way to the model, and the learning rate."""

import lightning
import pytest
import torch
from torch import Tensor, nn

from blueberry_video.data.datamodule import DataModule
from blueberry_video.data.sprites import Sprites
from blueberry_video.models.vit import VisionTransformer
from blueberry_video.optim import warmup_cosine
from blueberry_video.tasks.base import Task, repeat_clips


class Tiny(nn.Module):
    def __init__(self, depth: int = 0):
        super().__init__()
        self.encoder = VisionTransformer(16, 4, 8, 2, embed_dim=4, depth=depth, num_heads=1)


class Recorder(Task):
    """Keeps what it is given: (stage, video, learning rates) and the last batch of each stage."""

    def shared_step(self, batch: dict, stage: str) -> dict[str, Tensor]:
        rates = [group["lr"] for optimizer in self.trainer.optimizers for group in optimizer.param_groups]
        self.batches = {**getattr(self, "batches", {}), stage: batch}
        self.seen = [*getattr(self, "seen", []), (stage, batch["video"], rates)]
        return {"loss": self.model.encoder(self.normalize(batch["video"])).square().mean()}

    @property
    def rates(self) -> list[float]:
        return [rate for stage, _, rates in self.seen if stage == "train" for rate in rates]


class Negative(nn.Module):
    """An augmentation that cannot be overlooked."""

    def forward(self, video: Tensor) -> Tensor:
        return -video


class Noise(nn.Module):
    def forward(self, video: Tensor) -> Tensor:
        return torch.rand(video.shape)


def run(tmp_path, max_steps: int = 4, accumulate: int = 1, callbacks=None, depth: int = 0, **changes) -> Recorder:
    torch.manual_seed(0)
    options = {"optimizer": lambda groups: torch.optim.SGD(groups, lr=0.1), "schedule": warmup_cosine}
    task = Recorder(Tiny(depth), **{**options, **changes})
    sprites = {"num_frames": 4, "image_size": 16}
    data = DataModule(Sprites("train", 8, **sprites), Sprites("val", 2, **sprites), batch_size=2)
    trainer = lightning.Trainer(
        max_steps=max_steps,
        accumulate_grad_batches=accumulate,
        callbacks=callbacks,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
        default_root_dir=tmp_path,
    )
    trainer.fit(task, datamodule=data)
    return task


def test_clips_arrive_as_channels_first_floats_in_unit_range(tmp_path):
    task = run(tmp_path)
    stages = {stage: video for stage, video, _ in task.seen}
    assert stages["train"].shape == (2, 3, 4, 16, 16)
    assert stages["train"].dtype == torch.float32
    clips = Sprites("val", 2, num_frames=4, image_size=16)
    expected = torch.stack([clips[i]["video"] for i in range(2)]).float().permute(0, 2, 1, 3, 4) / 255
    torch.testing.assert_close(stages["val"], expected)


def test_augmentation_is_for_training_alone(tmp_path):
    for stage, video, _ in run(tmp_path, augment=Negative()).seen:
        assert (video.max() <= 0) == (stage == "train")
        assert (video.min() >= 0) == (stage == "val")


def test_augmentation_draws_after_the_step_was_seeded(tmp_path):
    """A callback may seed every step, so that a resumed run draws what an uninterrupted one would have drawn."""

    class Seed(lightning.Callback):
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            torch.manual_seed(batch_idx)

    drawn = [video for stage, video, _ in run(tmp_path, augment=Noise(), callbacks=[Seed()]).seen if stage == "train"]
    for batch_idx, video in enumerate(drawn):
        torch.manual_seed(batch_idx)
        assert torch.equal(video, torch.rand(2, 3, 4, 16, 16))


def test_normalize_takes_out_mean_and_standard_deviation_of_each_channel():
    options = {"optimizer": lambda groups: torch.optim.SGD(groups, lr=0.1), "schedule": warmup_cosine}
    task = Recorder(Tiny(), **options, mean=(0.1, 0.2, 0.3), std=(1.0, 2.0, 4.0))
    video = torch.rand(2, 3, 4, 5, 5)
    expected = torch.stack([(video[:, c] - 0.1 * (c + 1)) / 2**c for c in range(3)], dim=1)
    torch.testing.assert_close(task.normalize(video), expected)
    assert not any("pixel" in name for name in task.state_dict())


def test_learning_rate_follows_the_schedule_over_the_whole_run(tmp_path):
    rates = run(tmp_path, max_steps=6).rates
    expected = [0.1 * warmup_cosine(step, 6) for step in range(6) for _ in range(2)]  # two parameter groups
    assert rates == pytest.approx(expected)
    assert rates[-1] == 0


@pytest.mark.parametrize(("accumulate", "scale"), [(1, 2 / 256), (2, 4 / 256)])
def test_learning_rate_scales_with_the_global_batch(tmp_path, accumulate, scale):
    task = run(tmp_path, max_steps=2, accumulate=accumulate, schedule=lambda step, total: 1.0, lr_batch_size=256)
    assert task.rates[:2] == pytest.approx([0.1 * scale, 0.1 * scale])


def test_layer_decay_lowers_each_rate_once_and_keeps_the_schedule(tmp_path):
    """Beside the scaling with the batch; what is logged is the head's rate."""

    class Logged(lightning.Callback):
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            self.rates = [*getattr(self, "rates", []), trainer.logged_metrics["train/lr"].item()]

    logged = Logged()
    task = run(tmp_path, max_steps=3, depth=2, layer_decay=0.5, lr_batch_size=1, callbacks=[logged])
    steps = [rates for stage, _, rates in task.seen if stage == "train"]
    for step, rates in enumerate(steps):
        head = 0.1 * 2 * warmup_cosine(step, 3)
        assert rates == pytest.approx([head * 0.5**layer for layer in range(4) for _ in range(2)])
    assert logged.rates == pytest.approx([0.2 * warmup_cosine(step, 3) for step in range(3)])


def test_a_layer_decay_of_one_changes_nothing(tmp_path):
    assert run(tmp_path, layer_decay=1.0).rates == run(tmp_path).rates


def test_clips_are_repeated_before_they_are_augmented_in_training_alone(tmp_path):
    task = run(tmp_path, repeats=3, augment=Noise(), max_steps=1)
    videos = {stage: video for stage, video, _ in task.seen}
    assert videos["val"].shape[0] == 2
    assert videos["train"].shape[0] == 6
    assert len(torch.unique(videos["train"].flatten(1), dim=0)) == 6  # each drawn anew


def test_all_that_a_batch_holds_is_repeated_alike(tmp_path):
    batch = run(tmp_path, repeats=2, max_steps=1).batches["train"]
    video, ids, labels = batch["video"], batch["id"], batch["labels"]
    assert len(video) == len(ids) == 4
    assert len(set(ids)) == 2
    assert torch.equal(video[::2], video[1::2])
    assert ids[::2] == ids[1::2]
    assert all(torch.equal(label[::2], label[1::2]) and len(label) == 4 for label in labels.values())


def test_repeating_keeps_what_belongs_together():
    batch = {"video": torch.arange(3), "id": ["a", "b", "c"], "labels": {"motion": torch.tensor([7, 8, 9])}}
    assert repeat_clips(batch, 1) is batch
    twice = repeat_clips(batch, 2)
    assert twice["video"].tolist() == [0, 0, 1, 1, 2, 2]
    assert twice["id"] == ["a", "a", "b", "b", "c", "c"]
    assert twice["labels"]["motion"].tolist() == [7, 7, 8, 8, 9, 9]


def test_images_have_a_repetition_of_their_own():
    options = {"optimizer": lambda groups: torch.optim.SGD(groups, lr=0.1), "schedule": warmup_cosine}
    task = Recorder(Tiny(), **options, repeats=4, image_repeats=2)
    sizes = []
    task._step = lambda batch, stage: sizes.append(len(batch["video"])) or {"loss": None}
    for frames in (4, 1):
        task.training_step({"video": torch.zeros(3, 3, frames, 16, 16)}, 0)
    assert sizes == [12, 6]


@pytest.mark.parametrize("key", ["repeats", "image_repeats"])
def test_repeating_less_than_once_is_refused(key):
    options = {"optimizer": lambda groups: torch.optim.SGD(groups, lr=0.1), "schedule": warmup_cosine}
    with pytest.raises(ValueError, match=rf"task\.{key}=0 must be 1 or more"):
        Recorder(Tiny(), **options, **{key: 0})


def test_tokens_per_clip_counts_the_grid():
    options = {"optimizer": lambda groups: torch.optim.SGD(groups, lr=0.1), "schedule": warmup_cosine}
    batch = {"video": torch.zeros(5, 3, 4, 16, 16)}
    assert Recorder(Tiny(), **options).tokens_per_clip(batch) == 8
    assert Recorder(Tiny(), **options, repeats=3).tokens_per_clip(batch) == 24
