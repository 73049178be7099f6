"""Running averages of training in every precision: EMA of the weights, target encoder of V-JEPA, latent statistics."""

from collections.abc import Callable
from functools import partial
from pathlib import Path

import lightning
import pytest
import torch
from lightning.pytorch.callbacks import Callback
from torch import Tensor

from blueberry_video.callbacks import EMA, StepSeed
from blueberry_video.data.datamodule import DataModule
from blueberry_video.data.sprites import Sprites
from blueberry_video.experiment.checkpoint import AtomicCheckpointIO
from blueberry_video.masking import RandomMasking
from blueberry_video.models.autoencoder.causal_vae import CausalVideoVAE
from blueberry_video.models.jepa.model import JEPA
from blueberry_video.models.vit import VisionTransformer
from blueberry_video.optim import constant, ramp
from blueberry_video.tasks.autoencoding import Autoencoding
from blueberry_video.tasks.base import Task
from blueberry_video.tasks.latent_prediction import LatentPrediction
from blueberry_video.tasks.settings import Optimization

pytestmark = pytest.mark.filterwarnings("ignore")

STEPS, DECAY = 12, 0.9
PRECISIONS = {"bf16-true": torch.bfloat16, "32-true": torch.float32, "64-true": torch.float64}


def jepa() -> LatentPrediction:
    encoder = VisionTransformer(16, 4, 8, 2, embed_dim=24, depth=1, num_heads=2, positions="rope_3d", qkv_bias="qkv")
    network = JEPA(encoder, predictor_dim=12, predictor_depth=1, predictor_num_heads=2)
    momentum = partial(ramp, start=DECAY, end=DECAY)
    return LatentPrediction(network, optimization(), [RandomMasking(0.5)], momentum)


def vae() -> Autoencoding:
    return Autoencoding(CausalVideoVAE(4, (8, 12), time_stride=2), optimization())


def optimization() -> Optimization:
    return Optimization(partial(torch.optim.AdamW, lr=1e-2), constant)


class Record(Callback):
    """Records the trained weights, the latents that were tracked, and the averages, after every step."""

    def __init__(self) -> None:
        self.trained: list[list[Tensor]] = []
        self.start: list[Tensor] = []
        self.latents: list[Tensor] = []

    def on_train_start(self, trainer, pl_module) -> None:
        if isinstance(pl_module, LatentPrediction):
            self.start = [weight.detach().clone() for weight in pl_module.model.target_encoder.parameters()]
        elif isinstance(pl_module.model, CausalVideoVAE):
            track = pl_module.model.track
            pl_module.model.track = lambda latents: self.latents.append(latents.detach().clone()) or track(latents)

    def on_train_batch_end(self, trainer, pl_module, *arguments) -> None:
        self.trained.append([weight.detach().clone() for weight in pl_module.parameters()])


def fit(
    make: Callable[[], Task],
    precision: str,
    *callbacks: Callback,
    steps: int = STEPS,
    start: Path | None = None,
    **options,
) -> tuple[Task, lightning.Trainer]:
    lightning.seed_everything(0, verbose=False)
    task = make()
    size = {"num_frames": 4 if make is jepa else 5, "image_size": 16}
    data = DataModule(Sprites("train", 16, **size), Sprites("val", 2, **size), batch_size=4)
    trainer = lightning.Trainer(
        accelerator="cpu", precision=precision, max_steps=steps, callbacks=[StepSeed(0), *callbacks], logger=False,
        enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False, num_sanity_val_steps=0,
        use_distributed_sampler=False, plugins=[AtomicCheckpointIO()], **options,
    )  # fmt: skip
    trainer.fit(task, datamodule=data, ckpt_path=start)
    return task, trainer


@pytest.mark.parametrize("precision", PRECISIONS)
def test_target_encoder_is_the_average_of_the_encoder_rounded_once(precision: str):
    record, wide = Record(), torch.promote_types(PRECISIONS[precision], torch.float32)
    task, _ = fit(jepa, precision, record)
    names = [name for name, _ in task.model.named_parameters()]
    online = [i for i, name in enumerate(names) if name.startswith("encoder.")]
    average = [weight.to(wide) for weight in record.start]
    for trained in record.trained:
        for value, i in zip(average, online, strict=True):
            value.lerp_(trained[i].to(wide), 1 - DECAY)
    for value, weight in zip(average, task.model.target_encoder.parameters(), strict=True):
        assert weight.dtype == PRECISIONS[precision]
        assert torch.equal(weight, value.to(weight.dtype))
    video = torch.rand(1, 3, 4, 16, 16).to(PRECISIONS[precision])
    assert task.model.targets(video).dtype == PRECISIONS[precision]
    assert set(task.state_dict()) == {f"model.{name}" for name in names}


@pytest.mark.parametrize("momentum", [0.999])
def test_every_weight_of_the_target_encoder_moves_in_16_bits(momentum: float):
    model = jepa().model.bfloat16()
    online, target = list(model.encoder.parameters()), list(model.target_encoder.parameters())
    with torch.no_grad():
        for weight in online:
            weight.add_(torch.where(torch.rand_like(weight) < 0.5, -0.5, 0.5))
    before = [weight.clone() for weight in target]
    for _ in range(400):
        model.update_target(momentum)
    assert all((weight != old).all() for weight, old in zip(target, before, strict=True))
    expected = [old.float() + (new.float() - old.float()) * (1 - momentum**400) for old, new in zip(before, online)]
    torch.testing.assert_close([weight.float() for weight in target], expected, rtol=2**-8, atol=1e-4)


@pytest.mark.parametrize("precision", PRECISIONS)
def test_ema_is_the_average_of_the_weights_and_validations_do_not_round_it(precision: str):
    record, ema, wide = Record(), EMA(DECAY, warmup=False), torch.promote_types(PRECISIONS[precision], torch.float32)
    task, _ = fit(vae, precision, ema, record, val_check_interval=2)
    average = [weight.to(wide) for weight in record.trained[0]]
    for trained in record.trained[1:]:
        torch._foreach_lerp_(average, [weight.to(wide) for weight in trained], 1 - DECAY)
    kept, weights = list(ema._average_model.module.parameters()), list(task.parameters())
    assert all(a.dtype == wide and torch.equal(a, b) for a, b in zip(kept, average, strict=True))
    assert all(torch.equal(weight, value.to(weight.dtype)) for weight, value in zip(weights, average, strict=True))


def test_ema_of_a_model_built_in_16_bits_has_32_bits():
    def narrow() -> Autoencoding:
        task = vae()
        task.model.bfloat16()
        return task

    ema = EMA(DECAY)
    fit(narrow, "bf16-true", ema, steps=2)
    assert {weight.dtype for weight in ema._average_model.module.parameters()} == {torch.float32}


@pytest.mark.parametrize("precision", PRECISIONS)
def test_latent_statistics_are_averaged_in_at_least_32_bits(precision: str):
    record, wide = Record(), torch.promote_types(PRECISIONS[precision], torch.float32)
    task, _ = fit(vae, precision, record)
    mean, std = torch.zeros(4, dtype=wide), torch.ones(4, dtype=wide)
    for latents in record.latents:
        found = latents.to(wide).mean(dim=(0, 2, 3, 4)), latents.to(wide).square().mean(dim=(0, 2, 3, 4))
        square = (std.square() + mean.square()).lerp(found[1], 0.01)
        mean = mean.lerp(found[0], 0.01)
        std = (square - mean.square()).sqrt()
    model, state = task.model, task.state_dict()
    assert model.latent_mean.dtype == PRECISIONS[precision]
    for name, value in (("latent_mean", mean), ("latent_std", std)):
        assert torch.equal(state[f"model.{name}"], value)
        assert torch.equal(getattr(model, name), value.to(PRECISIONS[precision]))


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("make", [jepa, vae])
def test_resumed_run_has_the_same_averages(make: Callable[[], Task], precision: str, tmp_path: Path):
    for name, steps, start in (("whole", STEPS, None), ("part", 5, None), ("resumed", STEPS, tmp_path / "part")):
        fit(make, precision, EMA(DECAY), SaveLast(tmp_path / name), steps=steps, start=start)
    whole, resumed = (torch.load(tmp_path / name, weights_only=True) for name in ("whole", "resumed"))
    for part in ("state_dict", "current_model_state"):
        assert whole[part].keys() == resumed[part].keys()
        assert [key for key, value in whole[part].items() if not torch.equal(value, resumed[part][key])] == []
        assert [key for key, value in whole[part].items() if value.dtype != resumed[part][key].dtype] == []
    if precision == "bf16-true":
        wide = {key for key, value in whole["current_model_state"].items() if value.dtype == torch.float32}
        names = make().model.averages()
        assert wide == {f"model.{name}" for name in names}


class SaveLast(Callback):
    """Saves a checkpoint after the last step, before the averages are copied into the model."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def on_train_batch_end(self, trainer, *arguments) -> None:
        if trainer.global_step == trainer.max_steps:
            trainer.save_checkpoint(self.path)
