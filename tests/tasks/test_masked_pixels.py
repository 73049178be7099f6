"""Masked-pixel task: logged metrics, and values against the formulas."""

import zlib
from functools import partial

import pytest
import torch

from blueberry_video.augmentation import MultiScaleCrop
from blueberry_video.data.datamodule import DataModule
from blueberry_video.data.sprites import Sprites
from blueberry_video.evaluation.trivial import trivial_patch_losses
from blueberry_video.masking import ByModality, DualMasking, RandomMasking, TubeMasking
from blueberry_video.models.masked_autoencoder.model import MaskedAutoencoder, decoder_flops
from blueberry_video.models.vit import VisionTransformer
from blueberry_video.optim import warmup_cosine
from blueberry_video.tasks.masked_pixels import MaskedPixels, masked_pixel_loss, patch_targets
from blueberry_video.tasks.settings import ClipInput, Optimization

PATCH, GRID = (2, 8, 8), (2, 2, 2)


def model(images: bool = False) -> MaskedAutoencoder:
    torch.manual_seed(0)
    encoder = VisionTransformer(16, 4, 8, 2, embed_dim=16, depth=1, num_heads=2, images=images)
    return MaskedAutoencoder(encoder, decoder_dim=12, decoder_depth=1, decoder_num_heads=2)


def task(images: bool = False, **changes) -> MaskedPixels:
    optimization = Optimization(partial(torch.optim.AdamW, lr=1e-3), warmup_cosine)
    return MaskedPixels(model(images), optimization, **{"masking": TubeMasking(0.5), **changes})


def data(batch_size: int = 4, val: int = 6) -> DataModule:
    options = {"num_frames": 4, "image_size": 16, "background": "texture"}
    return DataModule(Sprites("train", 8, **options), Sprites("val", val, **options), batch_size=batch_size)


def batch(size: int = 3) -> dict:
    clips = Sprites("val", size, num_frames=4, image_size=16, background="texture")
    return {"video": torch.stack([clips[i]["video"] for i in range(size)]).transpose(1, 2).float() / 255}


def test_training_logs_documented_metrics_and_updates_every_weight(trainer):
    module, fit = task(input=ClipInput(MultiScaleCrop(16))), trainer(max_steps=3)
    before = {name: parameter.detach().clone() for name, parameter in module.named_parameters()}
    fit.fit(module, datamodule=data())
    logged = fit.logged_metrics.keys() | fit.callback_metrics.keys()
    names = ("loss", "loss_trivial_zero", "loss_trivial_mean", "loss_trivial_nearest", "loss_trivial", "loss_share")
    assert {"train/loss", "train/lr", *(f"val/{name}" for name in names)} <= logged
    for name, parameter in module.named_parameters():
        assert not torch.equal(parameter, before[name]), name


@pytest.mark.parametrize("masking", [TubeMasking(0.5), DualMasking(TubeMasking(0.5))])
def test_validation_metrics_equal_the_formulas(masking, trainer):
    """Every clip has equal weight, also in batches of different sizes."""
    module, clips = task(masking=masking).eval(), data(batch_size=4, val=5)
    fit = trainer()
    fit.validate(module, clips, verbose=False)
    sums = {"zero": 0.0, "mean": 0.0, "nearest": 0.0, "loss": 0.0}
    sizes = []
    for raw in clips.val_dataloader():
        video = raw["video"].transpose(1, 2).float() / 255
        rows = [zlib.crc32(name.encode()) % 32 for name in raw["id"]]
        keep, target, scored = (
            part if part is None else part[rows] for part in masking(32, GRID, torch.Generator().manual_seed(0))
        )
        mean, std = (torch.tensor(x).view(3, 1, 1, 1) for x in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
        predicted, patches = module.model((video - mean) / std, keep, target), patch_targets(video, PATCH)
        for i in range(len(video)):  # clips may have different numbers of scored tokens
            part = slice(i, i + 1)
            chosen = None if scored is None else scored[part]
            losses = trivial_patch_losses(patches[part], keep[part], target[part], GRID, chosen)
            losses["loss"] = masked_pixel_loss(predicted[part], video[part], target[part], PATCH, chosen)
            sums = {name: value + losses[name].item() / 5 for name, value in sums.items()}
        sizes.append(len(video))
    assert sorted(sizes) == [2, 3]
    logged = {name: value.item() for name, value in fit.callback_metrics.items()}
    for name in ("zero", "mean", "nearest"):
        assert logged[f"val/loss_trivial_{name}"] == pytest.approx(sums[name], rel=1e-5)
    best = min(sums["zero"], sums["mean"], sums["nearest"])
    assert logged["val/loss"] == pytest.approx(sums["loss"], rel=1e-5)
    assert logged["val/loss_trivial"] == pytest.approx(best, rel=1e-5)
    assert logged["val/loss_share"] == pytest.approx(sums["loss"] / best, rel=1e-5)


def test_unscored_tokens_do_not_affect_the_loss():
    video, masks = batch(2)["video"], DualMasking(TubeMasking(0.5))(2, GRID, torch.Generator().manual_seed(0))
    predicted = torch.randn(2, 4, 384, requires_grad=True)
    loss = masked_pixel_loss(predicted, video, masks.target, PATCH, masks.scored)
    loss.backward()
    assert 0 < masks.scored.sum() < 8
    assert not predicted.grad[~masks.scored].any()
    assert (predicted.grad[masks.scored] != 0).any(dim=1).all()
    changed, other = video.clone(), predicted.detach().clone()
    other[~masks.scored] = 100.0
    for b in range(2):
        for token in masks.target[b][~masks.scored[b]].tolist():
            t, i, j = token // 4, token // 2 % 2, token % 2
            changed[b, :, 2 * t : 2 * t + 2, 8 * i : 8 * i + 8, 8 * j : 8 * j + 8] = torch.rand(3, 2, 8, 8)
    assert not torch.equal(changed, video)
    assert masked_pixel_loss(other, changed, masks.target, PATCH, masks.scored) == loss


def test_images_and_clips_have_separate_metrics(trainer):
    """The metrics of images have a suffix."""
    masking = ByModality(image=RandomMasking(0.5), clip=RandomMasking(0.75))
    module, fit = task(images=True, masking=masking, eps_under_root=True), trainer()
    generator = torch.Generator().manual_seed(0)
    batches = [
        {"video": torch.randint(256, (size, frames, 3, 16, 16), generator=generator, dtype=torch.uint8)}
        for size, frames in ((2, 1), (3, 4), (1, 1))
    ]
    fit.validate(module, torch.utils.data.DataLoader(batches, batch_size=None), verbose=False)
    logged = {name: value.item() for name, value in fit.callback_metrics.items()}
    names = ("loss", "loss_trivial_zero", "loss_trivial_mean", "loss_trivial_nearest", "loss_trivial", "loss_share")
    costs = {"val/decoder_mflops", "val/decoder_mflops_full"}
    assert logged.keys() == {f"val/{name}{suffix}" for name in names for suffix in ("", "_image")} | costs
    with torch.no_grad():
        steps = [module.shared_step({"video": raw["video"].transpose(1, 2).float() / 255}, "val") for raw in batches]
    for name in names[:4]:
        expected = (2 * steps[0][f"{name}_image"] + steps[2][f"{name}_image"]) / 3
        assert logged[f"val/{name}_image"] == pytest.approx(expected.item(), rel=1e-5)
        assert logged[f"val/{name}"] == pytest.approx(steps[1][name].item(), rel=1e-5)
    for suffix in ("", "_image"):
        trivial = min(logged[f"val/{name}{suffix}"] for name in names[1:4])
        assert logged[f"val/loss_trivial{suffix}"] == trivial
        assert logged[f"val/loss_share{suffix}"] == pytest.approx(logged[f"val/loss{suffix}"] / trivial)
    assert list(module.shared_step({"video": torch.rand(2, 3, 1, 16, 16)}, "train")) == ["loss"]


def test_flops_of_the_decoder_and_of_the_full_decoder_are_logged(trainer):
    for masking, targets in ((TubeMasking(0.5), 4), (DualMasking(TubeMasking(0.5), 0.75), 2)):
        module, fit = task(masking=masking), trainer()
        fit.validate(module, data(), verbose=False)
        logged = {name: value.item() for name, value in fit.callback_metrics.items()}
        assert logged["val/decoder_mflops"] == pytest.approx(decoder_flops(module.model, 4, targets) / 1e6)
        assert logged["val/decoder_mflops_full"] == pytest.approx(decoder_flops(module.model, 4, 4) / 1e6)


def test_the_loss_of_an_image_is_that_of_a_static_clip():
    module = task(images=True, masking=RandomMasking(0.5))
    picture = batch(2)["video"][:, :, :1]
    values = module.shared_step({"video": picture}, "val")
    keep, target, _ = RandomMasking(0.5)(2, (1, 2, 2), torch.Generator().manual_seed(0))
    still = picture.repeat(1, 1, 4, 1, 1)
    predicted = module.model(module.normalize(still), keep, target)
    torch.testing.assert_close(values["loss_image"], masked_pixel_loss(predicted, still, target, PATCH))
    assert module.media({"video": picture})["reconstruction"].shape == (1, 3, 2 * 17, 3 * 17)


def test_metrics_of_a_single_frame_encoder_have_no_suffix():
    network = MaskedAutoencoder(VisionTransformer(16, 1, 8, 1, 16, 1, 2), 12, 1, 2)
    module = MaskedPixels(network, Optimization(torch.optim.SGD, warmup_cosine), RandomMasking(0.5))
    assert "loss" in module.shared_step({"video": torch.rand(2, 3, 1, 16, 16)}, "val")


def test_images_raise_with_an_encoder_of_clips():
    with pytest.raises(ValueError, match=r"model\.encoder\.images=true"):
        task().shared_step({"video": torch.rand(2, 3, 1, 16, 16)}, "train")


def test_eps_under_root_changes_the_normalization_of_targets():
    """At a contrast of 0.0002, the 1e-6 under the root dominates the divisor."""
    faint = {"video": 0.5 + 0.002 * batch(2)["video"]}
    outside, under = (task(eps_under_root=choice).shared_step(faint, "val") for choice in (False, True))
    assert 0.9 < outside["loss_trivial_zero"] < 1
    assert under["loss_trivial_zero"] < 0.1
    assert under["loss"] != outside["loss"]


def test_training_masks_change_and_validation_masks_do_not():
    module, clips = task(), batch()
    torch.manual_seed(0)
    assert module.shared_step(clips, "train")["loss"] != module.shared_step(clips, "train")["loss"]
    before = torch.get_rng_state()
    first = module.shared_step(clips, "val")["loss"]
    assert torch.equal(torch.get_rng_state(), before)
    assert module.shared_step(clips, "val")["loss"] == first


def test_training_overfits_a_batch():
    """The loss falls far below the best baseline."""
    torch.manual_seed(0)
    module, clips = task(), batch(2)
    optimizer = torch.optim.AdamW(module.parameters(), lr=1e-2)
    for _ in range(150):
        optimizer.zero_grad()
        values = module.shared_step(clips, "val")  # fixed masks
        values["loss"].backward()
        optimizer.step()
    assert values["loss"] < 0.3 * min(value for name, value in values.items() if "trivial" in name)


def test_media_shows_the_clip_its_masked_and_its_reconstructed_form():
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


def test_model_and_encoder_load_from_the_checkpoint_of_a_run(tmp_path, trainer):
    module, fit = task(), trainer()
    fit.fit(module, datamodule=data())
    fit.save_checkpoint(tmp_path / "own.ckpt")
    again = MaskedAutoencoder.from_published(tmp_path / "own.ckpt", 4, 16, num_heads=2, decoder_num_heads=2)
    for name, value in module.model.state_dict().items():
        assert torch.equal(again.state_dict()[name], value), name
    encoder = model().encoder
    encoder.load_published(tmp_path / "own.ckpt")
    assert torch.equal(encoder.blocks[0].attn.qkv.weight, module.model.encoder.blocks[0].attn.qkv.weight)


@pytest.mark.parametrize("over", ["patch", "none"])
def test_targets_follow_normalize_over(over):
    """The loss is the squared error of the pixels, normalized over the whole patch or not at all."""
    module, clips = task(normalize_over=over).eval(), batch()
    video = clips["video"]
    pixels = video.unfold(2, 2, 2).unfold(3, 8, 8).unfold(4, 8, 8)  # (B, C, t, h, w, 2, 8, 8)
    patches = pixels.permute(0, 2, 3, 4, 5, 6, 7, 1).reshape(3, 8, -1)  # channels last
    if over == "patch":
        patches = (patches - patches.mean(dim=2, keepdim=True)) / (patches.std(dim=2, keepdim=True) + 1e-6)
    masks = module._validation_masks(clips, GRID)
    rows = torch.arange(3)[:, None]
    with torch.no_grad():
        predicted = module.model(module.normalize(video), masks.keep, masks.target)
        found = module.shared_step(clips, "val")["loss"]
    torch.testing.assert_close(found, (predicted - patches[rows, masks.target]).square().mean())
    assert module.media(clips)["reconstruction"].dtype == torch.uint8
    with pytest.raises(ValueError, match=r"task\.normalize_over='clip'"):
        task(normalize_over="clip")
