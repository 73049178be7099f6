"""Tokenization task: losses, metrics of the codes, adversarial step, baselines and pictures."""

import json
import math
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import nn

from blueberry_video.data.datamodule import DataModule
from blueberry_video.data.sprites import Sprites
from blueberry_video.evaluation.frechet import FrechetDistance
from blueberry_video.models.hydra_video import HydraVideo, HydraVideoTokenizer
from blueberry_video.models.hydra_video.discriminator import PatchDiscriminator
from blueberry_video.models.hydra_video.quantizers import FSQ, VQ
from blueberry_video.optim import constant
from blueberry_video.tasks.settings import Optimization
from blueberry_video.tasks.tokenization import Adversarial, Tokenization

SETTINGS = {"image_size": 16, "patch_size": (2, 4), "dims": (8, 12), "depths": (0, 1), "pools": ((1, 2),)}
SMALL = {"expand": 1, "head_dim": 4, "state_dim": 4}


def task(quantizer=None, lr: float = 2e-3, **changes) -> Tokenization:
    torch.manual_seed(0)
    model = HydraVideoTokenizer(quantizer or FSQ((5, 4)), **SETTINGS, **SMALL)
    return Tokenization(model, Optimization(partial(torch.optim.AdamW, lr=lr), constant), **changes)


def data(val: int = 5) -> DataModule:
    options = {"num_frames": 3, "image_size": 16}
    return DataModule(Sprites("train", 8, **options), Sprites("val", val, **options), batch_size=4)


def adversarial(**changes) -> Adversarial:
    return Adversarial(partial(PatchDiscriminator, dims=(4, 4)), **{"after_steps": 0, **changes})


def clips(batch: int = 3) -> torch.Tensor:
    return torch.rand(batch, 3, 3, 16, 16, generator=torch.Generator().manual_seed(1))


class Difference(nn.Module):
    """Perceptual distance of known value, with a weight that must not be trained."""

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(3.0))

    def forward(self, first, second):
        assert first.ndim == 4 and first.shape[1] == 3  # noqa: PT018
        return self.scale * (first - second).abs().flatten(1).mean(dim=1)


def test_training_logs_documented_metrics_and_updates_every_weight(trainer):
    module, fit = task(VQ(16, 4)), trainer(max_steps=4)
    before = {name: value.detach().clone() for name, value in module.state_dict().items() if "pixel" not in name}
    fit.fit(module, datamodule=data())
    logged = fit.logged_metrics.keys() | fit.callback_metrics.keys()
    names = ("loss", "reconstruction", "quantizer", "psnr", "ssim", "bits_per_pixel", "codebook_usage", "perplexity")
    others = ("codebook_collapsed", "reconstruction_trivial", "psnr_trivial")
    assert {"train/loss", "train/reconstruction", *(f"val/{name}" for name in (*names, *others))} <= logged
    assert [name for name, value in before.items() if torch.equal(module.state_dict()[name], value)] == []


def test_validation_counts_the_codes_of_the_whole_set(trainer):
    module, sets, fit = task(), data(), trainer()
    fit.validate(module, sets, verbose=False)
    videos = [batch["video"].transpose(1, 2).float() / 127.5 - 1 for batch in sets.val_dataloader()]
    ids = torch.cat([module.model.encode_ids(video) for video in videos]).flatten()
    counts = ids.bincount(minlength=20).double()
    shares = counts[counts > 0] / counts.sum()
    metrics = {name: value.item() for name, value in fit.callback_metrics.items()}
    assert metrics["val/codebook_usage"] == pytest.approx((counts > 0).double().mean().item())
    assert metrics["val/perplexity"] == pytest.approx(math.exp(-(shares * shares.log()).sum()), rel=1e-5)
    assert metrics["val/bits_per_pixel"] == pytest.approx(2 * 2 * 2 * math.log2(20) / (3 * 16 * 16))
    fit.validate(module, sets, verbose=False)  # counts anew
    assert fit.callback_metrics["val/codebook_usage"].item() == metrics["val/codebook_usage"]


def test_a_collapsed_codebook_warns(trainer):
    module, fit = task(FSQ((5, 5, 5, 5))), trainer()
    with torch.no_grad():
        module.model.to_code.weight.zero_()
    with pytest.warns(UserWarning, match=r"1 of 625 codes"):
        fit.validate(module, data(9), verbose=False)
    assert fit.callback_metrics["val/codebook_collapsed"] == 1
    fit.validate(task(), data(), verbose=False)
    assert fit.callback_metrics["val/codebook_collapsed"] == 0


@pytest.mark.parametrize(("loss", "power"), [("l1", 1), ("l2", 2)])
def test_the_loss_is_the_sum_of_its_parts(loss, power):
    module = task(VQ(8, 3, commitment=0.5), loss=loss, perceptual=Difference(), perceptual_weight=0.25).eval()
    video = clips()
    values = module.shared_step({"video": video}, "val")
    made, tokens = module.model(video * 2 - 1)
    error = (made - (video * 2 - 1)).abs()
    assert values["reconstruction"].item() == pytest.approx((error**power).mean().item(), rel=1e-5)
    assert values["perceptual"].item() == pytest.approx(3 * error.mean().item(), rel=1e-5)
    expected = (error**power).mean() + tokens.loss + 0.25 * 3 * error.mean()
    assert values["loss"].item() == pytest.approx(expected.item(), rel=1e-5)
    assert not any("scale" in name for name, _ in module.named_parameters())
    assert "perceptual" not in " ".join(module.state_dict())


def test_each_adversarial_loss_reaches_its_own_network_only(trainer):
    module = task(adversarial=adversarial(weight=0.5))
    trainer().strategy.connect(module)
    module.trainer = trainer()
    values = module.shared_step({"video": clips()}, "train")
    video = clips() * 2 - 1
    made = module.model(video)[0]
    network = module.discriminator
    real, fake = network(video), network(made.detach())
    hinge = ((1 - real).relu().mean() + (1 + fake).relu().mean()) / 2
    assert values["discriminator"].item() == pytest.approx(hinge.item(), rel=1e-5)
    assert values["adversarial"].item() == pytest.approx(-network(made).mean().item(), rel=1e-5)
    values["loss"].backward()
    own = torch.autograd.grad(hinge, list(network.parameters()), retain_graph=True)
    for parameter, gradient in zip(network.parameters(), own, strict=True):
        torch.testing.assert_close(parameter.grad, gradient)
    total = (made - video).square().mean() - 0.5 * network(made).mean()
    weights = [parameter for parameter in module.model.parameters() if parameter.requires_grad]
    for parameter, gradient in zip(weights, torch.autograd.grad(total, weights), strict=True):
        torch.testing.assert_close(parameter.grad, gradient)


def test_the_adversarial_step_has_its_own_settings_and_start(trainer):
    settings = adversarial(after_steps=2, lr_scale=0.5, betas=(0.5, 0.9))
    module, fit = task(lr=1e-3, adversarial=settings), trainer(max_steps=2, limit_val_batches=0)
    before = [parameter.detach().clone() for parameter in module.discriminator.parameters()]
    fit.fit(module, datamodule=data())
    own = set(module.discriminator.parameters())
    for group in fit.optimizers[0].param_groups:
        if group["params"]:
            of_discriminator = all(parameter in own for parameter in group["params"])
            assert group["lr"] == pytest.approx(5e-4 if of_discriminator else 1e-3)
            assert group["betas"] == ((0.5, 0.9) if of_discriminator else (0.9, 0.999))
            assert of_discriminator or not any(parameter in own for parameter in group["params"])
    grouped = [parameter for group in fit.optimizers[0].param_groups for parameter in group["params"]]
    assert len(grouped) == len(list(module.parameters()))

    def changed(module: Tokenization) -> list[bool]:  # biases: weight decay changes matrices from the first step
        pairs = zip(module.discriminator.parameters(), before, strict=True)
        return [not torch.equal(after, value) for after, value in pairs if value.ndim == 1]

    assert not any(changed(module))
    longer = task(adversarial=settings)
    trainer(max_steps=3, limit_val_batches=0).fit(longer, datamodule=data())
    assert any(changed(longer))


def test_the_frechet_distance_is_recorded_with_its_protocol(trainer):
    encoder = partial(
        HydraVideo,
        image_size=16,
        num_frames=2,
        patch_size=8,
        tubelet_size=2,
        embed_dim=8,
        depth=1,
        head_dim=4,
        state_dim=4,
    )
    module, fit = task(frechet=FrechetDistance(encoder, fps=8.0)), trainer()
    fit.validate(module, data(12), verbose=False)
    record = json.loads(Path(fit.default_root_dir, "frechet.json").read_text())
    assert record["distance"] == pytest.approx(fit.callback_metrics["val/frechet"].item())
    assert record["distance"] > 0
    assert (record["clips"], record["frames"], record["fps"], record["height"]) == (12, 2, 8.0, 16)
    assert record["weights"] == "random weights of seed 0"
    assert not any("frechet" in name for name in module.state_dict())


def test_media_tokens_and_weights(tmp_path):
    module = task(num_pictures=2)
    assert module.media({"video": clips()})["reconstruction"].shape == (3, 3, 34, 34)
    assert module.tokens_per_clip({"video": clips()}) == 2 * 2 * 2
    torch.save({"state_dict": module.state_dict()}, tmp_path / "run.ckpt")
    other = task()
    with torch.no_grad():
        other.model.to_code.weight.zero_()
    other.load_weights(tmp_path / "run.ckpt")
    torch.testing.assert_close(other.model.state_dict(), module.model.state_dict())


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"loss": "huber"}, r"task\.loss='huber'"),
        ({"perceptual_weight": -1.0}, r"task\.perceptual_weight=-1"),
        ({"adversarial": adversarial(weight=-0.5)}, r"task\.adversarial\.weight=-0\.5"),
    ],
)
def test_settings_out_of_range_raise(changes, match):
    with pytest.raises(ValueError, match=match):
        task(**changes)
