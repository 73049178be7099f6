"""Autoencoding task: logged metrics, trained weights and baselines."""

from functools import partial
from pathlib import Path

import pytest
import torch

from blueberry_video.data.datamodule import DataModule
from blueberry_video.data.sprites import Sprites
from blueberry_video.evaluation.reconstruction import TRIVIAL, psnr, trivial_reconstructions
from blueberry_video.models.autoencoder.causal_vae import CausalVideoVAE
from blueberry_video.optim import warmup_cosine
from blueberry_video.tasks.autoencoding import Autoencoding, kl_divergence
from blueberry_video.tasks.settings import Optimization


def task(lr: float = 4e-3, schedule=warmup_cosine, **changes) -> Autoencoding:
    torch.manual_seed(0)
    model = CausalVideoVAE(channels=4, dims=(8, 16), patch_size=4, time_stride=2)
    return Autoencoding(model, Optimization(partial(torch.optim.AdamW, lr=lr), schedule), **changes)


def data(val: int = 5) -> DataModule:
    options = {"num_frames": 5, "image_size": 16}
    return DataModule(Sprites("train", 8, **options), Sprites("val", val, **options), batch_size=4)


def test_training_logs_documented_metrics_and_updates_every_weight(trainer):
    module, fit = task(), trainer(max_steps=4)
    before = {name: value.detach().clone() for name, value in module.state_dict().items() if "pixel" not in name}
    fit.fit(module, datamodule=data())
    logged = fit.logged_metrics.keys() | fit.callback_metrics.keys()
    names = ("loss", "reconstruction", "kl", "psnr", "reconstruction_trivial", "reconstruction_share", "psnr_trivial")
    assert {"train/loss", "train/reconstruction", "train/kl", *(f"val/{name}" for name in names)} <= logged
    for name, value in before.items():  # including the scale of the latents
        assert not torch.equal(module.state_dict()[name], value), name


def test_validation_metrics_equal_the_formulas(trainer):
    module, clips = task(loss="mse", kl_weight=0.5).eval(), data()
    fit = trainer()
    fit.validate(module, clips, verbose=False)
    sums: dict[str, float] = {}
    for raw in clips.val_dataloader():
        video = raw["video"].transpose(1, 2).float() / 127.5 - 1
        with torch.no_grad():
            moments = module.model.encode(video)
            made = module.model.reconstruct(moments[:, :4])
        values = {"reconstruction": (made - video).square().mean(), "kl": kl_divergence(moments)}
        values["loss"] = values["reconstruction"] + 0.5 * values["kl"]
        values["psnr"] = psnr(made, video).mean()
        for name, trivial in trivial_reconstructions(video, (2, 8, 8)).items():
            values[name] = (trivial - video).square().mean()
        sums = {name: sums.get(name, 0) + value.item() * len(video) / 5 for name, value in values.items()}
    logged = {name: value.item() for name, value in fit.callback_metrics.items()}
    for name in ("loss", "reconstruction", "kl", "psnr"):
        assert logged[f"val/{name}"] == pytest.approx(sums[name], rel=1e-4)
    best = min(sums[name] for name in TRIVIAL)
    assert logged["val/reconstruction_trivial"] == pytest.approx(best, rel=1e-4)
    assert logged["val/reconstruction_share"] == pytest.approx(sums["reconstruction"] / best, rel=1e-4)
    assert module.model.latent_std.eq(1).all()  # not updated in validation


def test_reconstruction_beats_the_mean_of_each_clip(trainer):
    """200 steps on eight clips; a decoder that ignores the latents reaches at best one color per clip."""
    torch.manual_seed(0)
    module = task(loss="mse", lr=5e-3, schedule=lambda step, total: 1.0)
    clips = next(iter(data().train_dataloader()))
    batch = {"video": clips["video"].transpose(1, 2).float() / 255}
    before = module.shared_step(batch, "val")
    trainer(max_steps=200, limit_val_batches=0).fit(module, datamodule=data())
    after = module.eval().shared_step(batch, "val")
    assert after["reconstruction"] < 0.5 * before["reconstruction"]
    assert after["reconstruction"] < 0.85 * after["reconstruction_trivial_mean"]
    assert after["psnr"].mean() > before["psnr"].mean() + 3


def test_kl_divergence_has_known_values():
    moments = torch.cat([torch.full((1, 2, 1, 1, 1), 3.0), torch.full((1, 2, 1, 1, 1), 2.0)], dim=1)
    normal = torch.distributions.Normal(3.0, torch.tensor(1.0).exp())
    expected = torch.distributions.kl_divergence(normal, torch.distributions.Normal(0.0, 1.0))
    assert kl_divergence(moments).item() == pytest.approx(expected.item(), rel=1e-6)
    assert kl_divergence(torch.zeros(1, 2, 1, 1, 1)) == 0


def test_media_tokens_and_weights(tmp_path: Path):
    module = task(num_pictures=2)
    batch = {"video": torch.rand(3, 3, 5, 16, 16)}
    assert module.media(batch)["reconstruction"].shape == (5, 3, 34, 34)
    assert module.tokens_per_clip(batch) == 3 * 2 * 2
    file = tmp_path / "run.ckpt"
    torch.save({"state_dict": module.state_dict()}, file)
    other = task()
    torch.nn.init.zeros_(other.model.to_pixels.weight)
    assert str(file) in other.load_weights(file)
    assert torch.equal(other.model.to_pixels.weight, module.model.to_pixels.weight)


@pytest.mark.parametrize(
    ("changes", "pattern"), [({"loss": "l2"}, r"task\.loss='l2'"), ({"kl_weight": -1.0}, r"task\.kl_weight=-1\.0")]
)
def test_arguments_out_of_range_raise(changes: dict, pattern: str):
    with pytest.raises(ValueError, match=pattern):
        task(**changes)
