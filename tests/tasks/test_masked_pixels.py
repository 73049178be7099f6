"""The masked-pixel task through a trainer: what it logs, and that its numbers are those of the formulas."""

import lightning
import pytest
import torch

from blueberry_video.data.datamodule import DataModule
from blueberry_video.data.sprites import Sprites
from blueberry_video.evaluation.trivial import trivial_patch_losses
from blueberry_video.masking import TubeMasking
from blueberry_video.models import masked_autoencoder
from blueberry_video.models.masked_autoencoder import MaskedAutoencoder
from blueberry_video.models.vit import VisionTransformer, load_encoder
from blueberry_video.nn.augment import MultiScaleCrop
from blueberry_video.optim import warmup_cosine
from blueberry_video.tasks.masked_pixels import MaskedPixels, masked_pixel_loss, patch_targets

PATCH, GRID = (2, 8, 8), (2, 2, 2)


def model() -> MaskedAutoencoder:
    torch.manual_seed(0)
    encoder = VisionTransformer(16, 4, 8, 2, embed_dim=16, depth=1, num_heads=2)
    return MaskedAutoencoder(encoder, decoder_dim=12, decoder_depth=1, decoder_num_heads=2)


def task(**changes) -> MaskedPixels:
    options = {"optimizer": lambda groups: torch.optim.AdamW(groups, lr=1e-3), "schedule": warmup_cosine}
    return MaskedPixels(model(), **options, **{"masking": TubeMasking(0.5), **changes})


def data(batch_size: int = 4, val: int = 6) -> DataModule:
    options = {"num_frames": 4, "image_size": 16, "background": "texture"}
    return DataModule(Sprites("train", 8, **options), Sprites("val", val, **options), batch_size=batch_size)


def trainer(tmp_path, **changes) -> lightning.Trainer:
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    options = {"max_steps": 2, "accelerator": "cpu", "enable_model_summary": False, "use_distributed_sampler": False}
    return lightning.Trainer(**quiet, **{**options, "default_root_dir": tmp_path, **changes})


def batch(size: int = 3) -> dict:
    clips = Sprites("val", size, num_frames=4, image_size=16, background="texture")
    return {"video": torch.stack([clips[i]["video"] for i in range(size)]).transpose(1, 2).float() / 255}


def test_training_logs_what_it_documents_and_moves_every_weight(tmp_path):
    module, fit = task(augment=MultiScaleCrop(16)), trainer(tmp_path, max_steps=3)
    before = {name: parameter.detach().clone() for name, parameter in module.named_parameters()}
    fit.fit(module, datamodule=data())
    logged = fit.logged_metrics.keys() | fit.callback_metrics.keys()
    names = ("loss", "loss_trivial_zero", "loss_trivial_mean", "loss_trivial_nearest", "loss_trivial", "loss_share")
    assert {"train/loss", "train/lr", *(f"val/{name}" for name in names)} <= logged
    for name, parameter in module.named_parameters():
        assert not torch.equal(parameter, before[name]), name


def test_validation_numbers_are_those_of_the_formulas(tmp_path):
    """Over batches of unequal size: every clip counts once."""
    module, clips = task().eval(), data(batch_size=4, val=5)
    fit = trainer(tmp_path)
    fit.validate(module, clips, verbose=False)
    sums = {"zero": 0.0, "mean": 0.0, "nearest": 0.0, "loss": 0.0}
    sizes = []
    for raw in clips.val_dataloader():
        video = raw["video"].transpose(1, 2).float() / 255
        keep, target = TubeMasking(0.5)(len(video), GRID, torch.Generator().manual_seed(0))
        losses = trivial_patch_losses(patch_targets(video, PATCH), keep, target, GRID)
        mean, std = (torch.tensor(x).view(3, 1, 1, 1) for x in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
        losses["loss"] = masked_pixel_loss(module.model((video - mean) / std, keep, target), video, target, PATCH)
        sums = {name: value + losses[name].item() * len(video) / 5 for name, value in sums.items()}
        sizes.append(len(video))
    assert sorted(sizes) == [2, 3]
    logged = {name: value.item() for name, value in fit.callback_metrics.items()}
    for name in ("zero", "mean", "nearest"):
        assert logged[f"val/loss_trivial_{name}"] == pytest.approx(sums[name], rel=1e-5)
    best = min(sums["zero"], sums["mean"], sums["nearest"])
    assert logged["val/loss"] == pytest.approx(sums["loss"], rel=1e-5)
    assert logged["val/loss_trivial"] == pytest.approx(best, rel=1e-5)
    assert logged["val/loss_share"] == pytest.approx(sums["loss"] / best, rel=1e-5)


def test_training_masks_change_and_validation_masks_do_not():
    module, clips = task(), batch()
    torch.manual_seed(0)
    assert module.shared_step(clips, "train")["loss"] != module.shared_step(clips, "train")["loss"]
    before = torch.get_rng_state()
    first = module.shared_step(clips, "val")["loss"]
    assert torch.equal(torch.get_rng_state(), before)
    assert module.shared_step(clips, "val")["loss"] == first


def test_it_learns_a_batch_by_heart():
    """Far below what the best trivial predictor gets: gradients flow where the loss says."""
    torch.manual_seed(0)
    module, clips = task(), batch(2)
    optimizer = torch.optim.AdamW(module.parameters(), lr=1e-2)
    for _ in range(150):
        optimizer.zero_grad()
        values = module.shared_step(clips, "val")  # always the same masks
        values["loss"].backward()
        optimizer.step()
    assert values["loss"] < 0.3 * min(value for name, value in values.items() if "trivial" in name)


def test_pictures_show_clip_hidden_and_filled():
    module, clips = task(num_pictures=2).eval(), batch(3)
    picture = module.media(clips)["reconstruction"]
    assert picture.dtype == torch.uint8
    assert picture.shape == (4, 3, 2 * 17, 3 * 17)
    assert (picture[:, :, 16::17] == 255).all()  # white lines between
    assert (picture[:, :, :, 16::17] == 255).all()
    original = (clips["video"][:2] * 255).round().byte()
    assert torch.equal(picture[:, :, 17:33, :16], original[1].transpose(0, 1))
    seen, filled = picture[:, :, :16, 17:33], picture[:, :, :16, 34:50]
    visible = (seen != 0).any(dim=1, keepdim=True).expand_as(seen)
    assert 0.4 < visible.float().mean() < 0.6
    assert torch.equal(seen[visible], original[0].transpose(0, 1)[visible])
    assert torch.equal(filled[visible], seen[visible])


def test_a_runs_own_checkpoint_gives_the_model_and_the_encoder_back(tmp_path):
    module, fit = task(), trainer(tmp_path)
    fit.fit(module, datamodule=data())
    fit.save_checkpoint(tmp_path / "own.ckpt")
    again = masked_autoencoder.from_published(tmp_path / "own.ckpt", 4, 16, num_heads=2, decoder_num_heads=2)
    for name, value in module.model.state_dict().items():
        assert torch.equal(again.state_dict()[name], value), name
    encoder = model().encoder
    load_encoder(encoder, tmp_path / "own.ckpt")
    assert torch.equal(encoder.blocks[0].attn.qkv.weight, module.model.encoder.blocks[0].attn.qkv.weight)
