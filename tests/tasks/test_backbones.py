"""Every task accepts any ``models.encoder.Encoder``, including one without blocks."""

from collections.abc import Callable
from functools import partial
from pathlib import Path

import lightning
import pytest
import torch
from lightning.pytorch.callbacks import Callback
from torch import Tensor, nn
from torch.utils.data import Dataset

from blueberry_video.data.datamodule import DataModule
from blueberry_video.data.mixture import Mixture
from blueberry_video.data.single_frames import SingleFrames
from blueberry_video.data.sprites import Sprites
from blueberry_video.evaluation.probes import FewLabels, Probe
from blueberry_video.masking import ByModality, DualMasking, RandomMasking, TubeMasking
from blueberry_video.models.classifier import VideoClassifier
from blueberry_video.models.encoder import Encoder
from blueberry_video.models.masked_autoencoder.model import MaskedAutoencoder
from blueberry_video.models.vit import VisionTransformer
from blueberry_video.nn.patches import gather_tokens, patchify
from blueberry_video.optim import constant
from blueberry_video.tasks.base import Task
from blueberry_video.tasks.classification import Classification
from blueberry_video.tasks.distillation import Distillation
from blueberry_video.tasks.masked_pixels import MaskedPixels
from blueberry_video.tasks.settings import Optimization


class Patches(Encoder):
    """Encoder that only projects patches: no attention, positions or blocks."""

    def __init__(self, images: bool = False):
        super().__init__(32, 4, 8, 2, embed_dim=12, images=images)
        self.project = nn.Linear(3 * 2 * 8 * 8, 12)

    def forward(self, video: Tensor, keep: Tensor | None = None) -> Tensor:
        tokens = self.project(patchify(self.as_clip(video), self.patch_size).flatten(2))
        return tokens if keep is None else gather_tokens(tokens, keep)


ADAM = Optimization(partial(torch.optim.AdamW, lr=0.01), constant)


def masked(masking: Callable) -> Task:
    return MaskedPixels(MaskedAutoencoder(Patches(), 8, 1, 2), ADAM, masking)


def omni() -> Task:
    network = MaskedAutoencoder(Patches(images=True), 8, 1, 2, mask_before_projection=True)
    return MaskedPixels(network, ADAM, ByModality(RandomMasking(0.75), RandomMasking(0.9)))


def classification() -> Task:
    return Classification(VideoClassifier(Patches(), {"motion": 8}), ADAM)


def probing() -> Task:
    return Classification(VideoClassifier(Patches(), {"motion": 8}, pooling="attentive", freeze_encoder=True), ADAM)


def distillation(folder: Path) -> Task:
    encoder = VisionTransformer(32, 4, 8, 2, embed_dim=16, depth=1, num_heads=2, final_norm=False)
    teacher = VideoClassifier(encoder, {"motion": 8})
    torch.save(
        {"model": {f"model.{name}": value for name, value in teacher.state_dict().items()}}, folder / "teacher.pt"
    )
    return Distillation(VideoClassifier(Patches(), {"motion": 8}), ADAM, teacher, folder / "teacher.pt")


@pytest.fixture
def fit(trainer: Callable) -> Callable:
    def run(task: Task, clips: Dataset, *callbacks: Callback) -> lightning.Trainer:
        fitted = trainer(*callbacks, max_steps=-1, max_epochs=1)
        fitted.fit(task, datamodule=DataModule(clips, clips, batch_size=4))
        return fitted

    return run


@pytest.mark.parametrize(
    "make",
    [
        pytest.param(lambda _: masked(TubeMasking(0.75)), id="videomae"),
        pytest.param(lambda _: masked(DualMasking(TubeMasking(0.75))), id="videomae_v2"),
        pytest.param(lambda _: omni(), id="omnimae"),
        pytest.param(lambda _: classification(), id="classification"),
        pytest.param(lambda _: probing(), id="probing"),
        distillation,
    ],
)
def test_every_task_trains_any_encoder(make: Callable[[Path], Task], tmp_path: Path, fit: Callable):
    task = make(tmp_path)
    clips: Dataset = Sprites("train", 8, num_frames=4)
    if task.model.encoder.images:
        clips = Mixture({"image": SingleFrames(clips), "clip": clips})
    before = {name: value.clone() for name, value in task.model.named_parameters()}
    fitted = fit(task, clips)
    moved = {name for name, value in task.model.named_parameters() if not torch.equal(value, before[name])}
    assert moved == {name for name, value in task.model.named_parameters() if value.requires_grad}
    assert ("encoder.project.weight" in moved) == task.model.encoder.project.weight.requires_grad
    assert fitted.callback_metrics["val/loss"].isfinite()


def test_any_encoder_is_probed_and_fine_tuned(fit: Callable):
    few_labels = FewLabels(["motion"], num_labelled=8, val_clips=8, steps=1, lrs=[1e-3])
    probe = Probe(["motion"], train_clips=8, val_clips=8, steps=1)
    task = masked(TubeMasking(0.75))
    metrics = fit(task, Sprites("train", 8, num_frames=4), few_labels, probe).callback_metrics
    assert {"few_labels/motion_gain", "probe/motion_gain"} <= metrics.keys()


def test_checkpoints_of_any_encoder_load(tmp_path: Path):
    trained, pretrained = VideoClassifier(Patches(), {"motion": 8}), MaskedAutoencoder(Patches(), 8, 1, 2)
    for name, network in (("classifier", trained), ("masked", pretrained)):
        state = {f"model.{key}": value for key, value in network.state_dict().items()}
        torch.save({"state_dict": state}, tmp_path / f"{name}.ckpt")
        fresh = VideoClassifier(Patches(), {"motion": 8})
        assert str(tmp_path / f"{name}.ckpt") in fresh.load_published(tmp_path / f"{name}.ckpt")
        assert torch.equal(fresh.encoder.project.weight, network.encoder.project.weight)
    fresh = VideoClassifier(Patches(), {"motion": 8})
    fresh.load_finetuned(tmp_path / "classifier.ckpt")
    torch.testing.assert_close(fresh.state_dict(), trained.state_dict())
    with pytest.raises(ValueError, match=r"masked\.ckpt|patch_embed\.proj\.weight"):
        fresh.load_finetuned(tmp_path / "masked.ckpt")
    more = {f"model.{key}": value for key, value in trained.state_dict().items()}
    torch.save({"state_dict": more | {"model.encoder.deeper.weight": torch.zeros(1)}}, tmp_path / "deeper.ckpt")
    with pytest.raises(ValueError, match=r"(?s)(?=.*deeper)(?=.*\b1\b)"):
        fresh.load_published(tmp_path / "deeper.ckpt")
