"""Latent prediction: logged metrics, updated weights, EMA target, and values against the formulas."""

import copy
import zlib
from functools import partial

import lightning
import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch.callbacks import Callback

from blueberry_video.callbacks import StepSeed
from blueberry_video.data.datamodule import DataModule
from blueberry_video.data.sprites import Sprites
from blueberry_video.evaluation.trivial import trivial_latent_losses
from blueberry_video.masking import MultiBlockMasking, RandomMasking
from blueberry_video.models.jepa.losses import context_weight, latent_loss, sigreg
from blueberry_video.models.jepa.model import JEPA
from blueberry_video.models.jepa.multi_level import MultiLevelEncoder
from blueberry_video.models.vit import VisionTransformer
from blueberry_video.optim import constant, cosine_ramp, ramp
from blueberry_video.tasks.latent_prediction import LatentPrediction
from blueberry_video.tasks.settings import Optimization

GRID = (2, 2, 2)
MASKINGS = [RandomMasking(0.5), RandomMasking(0.75)]
FIXED = partial(ramp, start=0.9, end=0.9)


def encoder(**changes) -> VisionTransformer:
    sizes = {"image_size": 16, "num_frames": 4, "patch_size": 8, "tubelet_size": 2}
    shape = {"embed_dim": 24, "depth": 2, "num_heads": 2, "positions": "rope_3d", "qkv_bias": "qkv"}
    return VisionTransformer(**{**sizes, **shape, **changes})


def model(wrap=lambda vit: vit, **changes) -> JEPA:
    torch.manual_seed(0)
    return JEPA(wrap(encoder()), predictor_dim=12, predictor_depth=1, predictor_num_heads=2, **changes)


def dense(**changes) -> LatentPrediction:
    """Task with a loss on visible tokens."""
    return task(model(predictor_context=True), visible_weight=0.5, **changes)


def task(network: JEPA | None = None, **changes) -> LatentPrediction:
    options = {"optimization": Optimization(partial(torch.optim.AdamW, lr=1e-2, weight_decay=0.1), constant)}
    options |= {"model": network or model(), "maskings": MASKINGS, "momentum": FIXED}
    return LatentPrediction(**{**options, **changes})


def without_target(**changes) -> LatentPrediction:
    """Task without a target encoder."""
    return task(model(ema=False), momentum=None, **changes)


def data(batch_size: int = 4, val: int = 6) -> DataModule:
    options = {"num_frames": 4, "image_size": 16, "background": "texture"}
    return DataModule(Sprites("train", 8, **options), Sprites("val", val, **options), batch_size=batch_size)


def batch(size: int = 3) -> dict:
    clips = Sprites("val", size, num_frames=4, image_size=16, background="texture")
    return {"video": torch.stack([clips[i]["video"] for i in range(size)]).transpose(1, 2).float() / 255}


class EachStep(Callback):
    """Callback that records ``read(task)`` after every training batch."""

    def __init__(self, read):
        self.read, self.values = read, []

    def on_train_batch_end(self, trainer, pl_module, *arguments) -> None:
        self.values.append(self.read(pl_module))


def weights(module: torch.nn.Module) -> list[torch.Tensor]:
    return [parameter.detach().clone() for parameter in module.parameters()]


def test_training_logs_documented_metrics_and_updates_every_weight(trainer):
    module, fit = dense(sigreg_weight=0.1), trainer(max_steps=3)
    before = {name: parameter.detach().clone() for name, parameter in module.named_parameters()}
    fit.fit(module, datamodule=data())
    logged = fit.logged_metrics.keys() | fit.callback_metrics.keys()
    names = {"loss", "loss_prediction", "loss_context", "loss_sigreg"}
    trivial = {f"loss_prediction_trivial{kind}" for kind in ("", "_mean", "_position", "_clip")}
    assert {f"train/{name}" for name in names} <= logged
    assert {f"val/{name}" for name in (*names, *trivial, "loss_share")} <= logged
    assert not any(name.startswith("train/loss_prediction_trivial") for name in logged)
    for name, parameter in module.named_parameters():
        assert not torch.equal(parameter, before[name]), name


def test_validation_metrics_equal_the_formulas(trainer):
    module, clips = dense().eval(), data(batch_size=6, val=6)
    for parameter in module.model.target_encoder.parameters():
        parameter.data.add_(0.1 * torch.randn_like(parameter))  # differs from the encoder
    fit = trainer()
    fit.validate(module, clips, verbose=False)
    [raw] = clips.val_dataloader()
    video = raw["video"].transpose(1, 2).float() / 255
    mean, std = (torch.tensor(x).view(3, 1, 1, 1) for x in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
    inputs, losses = (video - mean) / std, {}
    with torch.no_grad():
        latents = F.layer_norm(module.model.target_encoder(inputs), (24,))
        for number, masking in enumerate(MASKINGS):
            rows = [zlib.crc32(name.encode()) % 32 for name in raw["id"]]
            drawn = masking(32, GRID, torch.Generator().manual_seed(number))
            keep, target = drawn.keep[rows], drawn.target[rows]
            context = module.model.encoder(inputs, keep)
            predicted = module.model.predictor.both(context, keep, target, 0)
            truth = [torch.stack([latents[b, row[b]] for b in range(6)]) for row in (target, keep)]
            error = [(a - b).abs() for a, b in zip(predicted, truth)]
            weight = context_weight(keep, target, GRID)[..., None]
            found = {"prediction": error[0].mean(), "context": (error[1] * weight).mean()}
            found |= {f"prediction_trivial_{k}": v for k, v in trivial_latent_losses(latents, keep, target).items()}
            losses = {name: losses.get(name, 0) + value.item() / 2 for name, value in found.items()}
    logged = {name: value.item() for name, value in fit.callback_metrics.items()}
    for name, value in losses.items():
        assert logged[f"val/loss_{name}"] == pytest.approx(value, rel=1e-5), name
    assert logged["val/loss"] == pytest.approx(losses["prediction"] + 0.5 * losses["context"], rel=1e-5)
    trivial = min(losses[f"prediction_trivial_{name}"] for name in ("mean", "position", "clip"))
    assert logged["val/loss_prediction_trivial"] == pytest.approx(trivial, rel=1e-5)
    assert logged["val/loss_share"] == pytest.approx(losses["prediction"] / trivial, rel=1e-5)


def test_the_loss_averages_over_tokens_and_then_over_masks():
    """Masks with 4 and 6 hidden tokens have equal weight."""
    module, clips = task(), batch()
    whole = module.shared_step(clips, "val")["loss"]
    single = []
    for number in range(2):
        keep, target, _ = MASKINGS[number](3, GRID, torch.Generator().manual_seed(number))
        inputs = module.normalize(clips["video"])
        truth = module.latents(clips["video"]).gather(1, target[..., None].expand(-1, -1, 24))
        single.append(latent_loss(module.model(inputs, keep, target, 0), truth))
    torch.testing.assert_close(whole, (single[0] + single[1]) / 2)
    assert single[0] != single[1]


def test_the_target_encoder_has_no_gradient_and_is_not_optimized(trainer):
    module, fit = task(momentum=partial(ramp, start=1.0, end=1.0)), trainer()
    before = weights(module.model.target_encoder)
    fit.fit(module, datamodule=data())
    assert all(map(torch.equal, before, module.model.target_encoder.parameters()))
    assert all(parameter.grad is None for parameter in module.model.target_encoder.parameters())
    optimized = {id(parameter) for group in fit.optimizers[0].param_groups for parameter in group["params"]}
    assert not optimized & {id(parameter) for parameter in module.model.target_encoder.parameters()}


def test_the_target_is_updated_after_every_optimizer_step_with_its_momentum(trainer):
    """With gradient accumulation there is one optimizer step per two batches."""
    momentum = partial(ramp, start=0.5, end=0.9, stretch=1.25)
    steps = EachStep(lambda t: (weights(t.model.encoder), weights(t.model.target_encoder)))
    module = task(momentum=momentum)
    start = weights(module.model.target_encoder)
    trainer(steps, max_steps=4, accumulate_grad_batches=2).fit(module, datamodule=data(batch_size=2))
    assert len(steps.values) == 8
    expected = start
    for step in range(4):
        online, unchanged = steps.values[2 * step + 1][0], steps.values[2 * step][1]
        for got, wanted in zip(unchanged, expected, strict=True):
            torch.testing.assert_close(got, wanted)
        m = momentum(step, 4)
        expected = [m * old + (1 - m) * new for old, new in zip(expected, online, strict=True)]
        for got, wanted in zip(steps.values[2 * step + 1][1], expected, strict=True):
            torch.testing.assert_close(got, wanted)


def test_weight_decay_follows_its_schedule(trainer):
    schedule = partial(cosine_ramp, start=0.04, end=0.4, stretch=1.25)
    steps = EachStep(lambda t: [group["weight_decay"] for group in t.trainer.optimizers[0].param_groups])
    trainer(steps, max_steps=4).fit(task(weight_decay=schedule), datamodule=data())
    assert steps.values == [[schedule(step, 4), 0.0] for step in range(4)]
    assert 0.04 == steps.values[0][0] < steps.values[3][0] < 0.4


def test_gradients_are_clipped_only_after_the_warm_up(trainer):
    def norm(module: LatentPrediction) -> float:
        gradients = [parameter.grad for parameter in module.parameters() if parameter.grad is not None]
        return torch.nn.utils.get_total_norm(gradients).item()

    steps = EachStep(norm)
    fit = trainer(steps, max_steps=4, gradient_clip_val=1e-3)
    fit.fit(task(clip_after=0.5), datamodule=data())
    assert min(steps.values[:2]) > 1e-2
    assert max(steps.values[2:]) < 1.1e-3


def test_encoder_and_predictor_are_clipped_to_separate_norms(trainer):
    """As V-JEPA: each part has the norm of trainer.gradient_clip_val, and their directions do not change."""

    def norms(module: LatentPrediction) -> tuple[float, float]:
        parts = (module.model.encoder, module.model.predictor)
        grads = [[p.grad for p in part.parameters() if p.grad is not None] for part in parts]
        return tuple(torch.nn.utils.get_total_norm(part).item() for part in grads)

    steps = EachStep(norms)
    trainer(steps, max_steps=2, gradient_clip_val=1e-3).fit(task(clip_separately=True), datamodule=data())
    assert steps.values == [pytest.approx((1e-3, 1e-3), rel=1e-3)] * 2
    steps = EachStep(norms)
    trainer(steps, max_steps=1, gradient_clip_val=1e-3).fit(task(), datamodule=data())
    [(encoder_norm, predictor_norm)] = steps.values
    assert (encoder_norm**2 + predictor_norm**2) ** 0.5 == pytest.approx(1e-3, rel=1e-3)
    fit = trainer(max_steps=1, gradient_clip_val=1e-3, gradient_clip_algorithm="value")
    with pytest.raises(ValueError, match=r"(?i)gradient_clip_algorithm=.*value.*clip_separately=true"):
        fit.fit(task(clip_separately=True), datamodule=data())


def mask_tokens_with_gradients(module: LatentPrediction, clips: dict) -> set[int]:
    module.zero_grad()
    module.shared_step(clips, "train")["loss"].backward()
    return set(module.model.predictor.mask_tokens.grad.abs().sum(dim=1).nonzero().flatten().tolist())


def test_the_mask_token_follows_the_clip_length_or_the_masking():
    """V-JEPA 2 selects it by the clip length, so that with one length both maskings share token 0; V-JEPA by the
    masking."""
    long = {**batch(), "video": batch()["video"].repeat_interleave(2, dim=2)}  # 8 frames
    assert mask_tokens_with_gradients(task(), batch()) == {0}
    assert mask_tokens_with_gradients(task(mask_token="masking"), batch()) == {0, 1}
    mixed = task(clip_lengths=[4, 8])
    assert mask_tokens_with_gradients(mixed, batch()) == {0}
    assert mask_tokens_with_gradients(mixed, long) == {1}
    with pytest.raises(ValueError, match=r"8 frames.*task\.clip_lengths=None.*num_frames=4\b"):
        task().shared_step(long, "train")


def test_the_loss_is_the_power_of_the_error_over_the_exponent():
    module, clips = task(maskings=MASKINGS[:1], loss_exponent=2.0), batch()
    keep, target, _ = MASKINGS[0](3, GRID, torch.Generator().manual_seed(0))
    error = module.model(module.normalize(clips["video"]), keep, target, 0) - module.latents(clips["video"]).gather(
        1, target[..., None].expand(-1, -1, 24)
    )
    found = module.shared_step(clips, "val")
    torch.testing.assert_close(found["loss"], error.square().mean() / 2)
    zero = trivial_latent_losses(torch.full((1, 8, 2), 3.0), keep[:1], target[:1], torch.zeros(8, 2), 2.0)
    assert zero["mean"].item() == pytest.approx(4.5)


def test_without_a_target_encoder_gradients_reach_the_targets():
    module, clips = without_target(), batch()
    both = torch.autograd.grad(module.shared_step(clips, "val")["loss"], list(module.model.encoder.parameters()))
    with torch.no_grad():
        latents = module.latents(clips["video"])
    module.latents = lambda video: latents
    stopped = torch.autograd.grad(module.shared_step(clips, "val")["loss"], list(module.model.encoder.parameters()))
    assert not torch.allclose(both[0], stopped[0])


def test_sigreg_is_computed_over_the_clips_at_each_position():
    module, clips = without_target(sigreg_weight=0.25, sigreg_directions=8), batch()
    values = module.shared_step(clips, "val")
    directions = torch.randn(24, 8, generator=torch.Generator().manual_seed(0))
    latents = module.latents(clips["video"])
    expected = torch.stack([sigreg(latents[:, n], directions) for n in range(8)]).mean()
    torch.testing.assert_close(values["loss_sigreg"], expected)
    torch.testing.assert_close(values["loss"], 0.75 * values["loss_prediction"] + 0.25 * expected)


@pytest.mark.parametrize("ema", [True, False])
def test_deep_supervision_normalizes_every_level_separately(ema, trainer):
    module = task(model(lambda vit: MultiLevelEncoder(copy.deepcopy(vit), 2), ema=ema), momentum=FIXED if ema else None)
    for encoder in filter(None, (module.model.encoder, module.model.target_encoder)):
        for scale, norm in enumerate(encoder.norms):
            torch.nn.init.normal_(norm.weight, 1.0 + scale)
            torch.nn.init.normal_(norm.bias)
    latents = module.latents(batch()["video"])
    assert latents.shape == (3, 8, 48)
    for level in latents.split(24, dim=-1):
        torch.testing.assert_close(level.mean(-1), torch.zeros(3, 8), atol=1e-5, rtol=0)
        torch.testing.assert_close(level.square().mean(-1), torch.ones(3, 8), atol=1e-3, rtol=0)
    trainer().fit(module, datamodule=data())


def test_a_teacher_is_loaded_from_its_file_and_frozen(tmp_path, capsys, trainer):
    teacher = encoder(embed_dim=36, positions="sinusoid")
    torch.save(teacher.state_dict(), tmp_path / "teacher.pt")
    network = model(ema=False, teacher=encoder(embed_dim=36, positions="sinusoid"))
    module = task(network, momentum=None, teacher_from=tmp_path / "teacher.pt")
    trainer().fit(module, datamodule=data())
    for name, value in teacher.state_dict().items():
        assert torch.equal(network.target_encoder.state_dict()[name], value), name
    assert module.latents(batch()["video"]).shape == (3, 8, 36)
    assert str(tmp_path / "teacher.pt") in capsys.readouterr().out


def test_weights_load_from_a_whole_model_or_from_an_encoder(tmp_path, trainer):
    """Also for longer clips, since with rotary positions no weight depends on the length."""
    first, fit = task(), trainer()
    fit.fit(first, datamodule=data())
    fit.save_checkpoint(tmp_path / "run.ckpt")
    longer = JEPA(encoder(num_frames=8), predictor_dim=12, predictor_depth=1, predictor_num_heads=2)
    second = task(longer)
    assert str(tmp_path / "run.ckpt") in second.load_weights(tmp_path / "run.ckpt")
    for name, value in first.model.state_dict().items():
        assert torch.equal(longer.state_dict()[name], value), name
    torch.save(first.model.encoder.state_dict(), tmp_path / "encoder.pt")
    third = task(model())
    third.load_weights(tmp_path / "encoder.pt")
    for name, value in first.model.encoder.state_dict().items():
        assert torch.equal(third.model.encoder.state_dict()[name], value), name
        assert torch.equal(third.model.target_encoder.state_dict()[name], value), name


def test_a_resumed_run_is_bit_identical(tmp_path, trainer):
    def save(module: LatentPrediction) -> None:
        if module.trainer.global_step == 3:
            module.trainer.save_checkpoint(tmp_path / "half.ckpt")

    def fit(seed: int, *callbacks: Callback, checkpoint=None) -> dict[str, torch.Tensor]:
        lightning.seed_everything(seed, verbose=False)
        options = {"momentum": partial(ramp, start=0.5, end=1), "weight_decay": partial(cosine_ramp, start=0.1, end=1)}
        module = task(**options, sigreg_weight=0.1)
        run = trainer(StepSeed(0), *callbacks, max_steps=6, limit_val_batches=0)
        run.fit(module, datamodule=data(), ckpt_path=checkpoint)
        return module.state_dict()

    whole = fit(0, EachStep(save))
    resumed = fit(1, checkpoint=tmp_path / "half.ckpt")
    assert any(name.startswith("model.target_encoder.") for name in whole)
    for name, value in whole.items():
        assert torch.equal(resumed[name], value), name


def test_training_masks_change_and_validation_masks_do_not():
    module, clips = task(sigreg_weight=0.1), batch()
    assert module.shared_step(clips, "train")["loss"] != module.shared_step(clips, "train")["loss"]
    before = torch.get_rng_state()
    first = module.shared_step(clips, "val")["loss"]
    assert torch.equal(torch.get_rng_state(), before)
    assert module.shared_step(clips, "val")["loss"] == first


def test_training_overfits_a_batch():
    """Against a fixed target, the loss falls below half of the best baseline."""
    torch.manual_seed(0)
    module, clips = task(maskings=[RandomMasking(0.5)]), batch()
    torch.nn.init.normal_(module.model.target_encoder.patch_embed.proj.weight, std=0.1)  # distinct embeddings
    optimizer = torch.optim.AdamW([p for p in module.parameters() if p.requires_grad], lr=1e-2)
    for _ in range(150):
        optimizer.zero_grad()
        values = module.shared_step(clips, "val")
        values["loss"].backward()
        optimizer.step()
    assert values["loss"] < 0.5 * min(value for name, value in values.items() if "trivial" in name)


@pytest.mark.parametrize("lengths", [[4, 2], [2, 4]])
def test_media_has_the_mask_token_of_the_clips(lengths):
    """The pictures' predictions are those of the loss: with the mask token of the clip length."""
    network = model(num_mask_tokens=2)
    torch.nn.init.normal_(network.predictor.mask_tokens, std=1.0)
    module, used = task(model=network, clip_lengths=lengths).eval(), []
    run = network.predictor.both
    network.predictor.both = lambda *arguments: used.append(arguments[3]) or run(*arguments)
    clips = batch(3)
    module.media(clips)
    module.shared_step(clips, "val")
    assert set(used) == {lengths.index(4)}


def test_media_shows_clips_masks_targets_and_predictions():
    picture = task(num_pictures=2).eval().media(batch(3))["latents"]
    assert picture.dtype == torch.uint8
    assert picture.shape == (4, 3, 2 * 17, 4 * 17)
    assert len(picture.unique()) > 10


@pytest.mark.parametrize(
    ("changes", "pattern"),
    [
        ({"maskings": []}, r"task\.maskings\b"),
        ({"sigreg_weight": 1.0}, r"task\.sigreg_weight=1\.0\b"),
        ({"visible_weight": 0.5}, r"(?s)task\.visible_weight=0\.5\b.*model\.predictor_context"),
        ({"model": model(predictor_context=True)}, r"(?s)task\.visible_weight=0\.0\b.*model\.predictor_context"),
        ({"visible_weight": -0.5}, r"(?s)task\.sigreg_weight.*task\.visible_weight=-0\.5\b"),
        ({"clip_after": 2.0}, r"task\.clip_after=2\.0\b"),
        ({"mask_token": "none"}, r"task\.mask_token='none'"),
        ({"mask_token": "masking", "clip_lengths": [4]}, r"task\.clip_lengths=\[4\].*mask_token"),
        ({"clip_lengths": [4, 4]}, r"task\.clip_lengths=\[4, 4\]"),
        ({"loss_exponent": 0.0}, r"task\.loss_exponent=0\.0\b"),
        ({"momentum": partial(ramp, start=0.998, end=1.5)}, r"(?s)task\.momentum\b.*\b1\.5\b"),
        ({"momentum": None}, r"(?s)model\.ema=true\b.*task\.momentum=None"),
        ({"teacher_from": "x.pt"}, r"(?s)model\.ema=true\b.*task\.teacher_from=x\.pt"),
        ({"model": model(ema=False)}, r"(?s)model\.ema=false\b.*task\.momentum=func"),
        (
            {"model": model(ema=False, teacher=encoder()), "momentum": None},
            r"(?s)model\.ema=false\b.*model\.teacher\b.*task\.teacher_from=None",
        ),
    ],
)
def test_invalid_arguments_raise(changes, pattern):
    with pytest.raises(ValueError, match=pattern):
        task(changes.pop("model", None), **changes)


def test_masks_without_context_raise():
    with pytest.raises(ValueError, match=r"(?s)num_blocks=1\b.*spatial_scale=1\.0\b"):
        task(maskings=[MultiBlockMasking(1, 1.0)]).shared_step(batch(), "train")


def test_more_maskings_than_mask_tokens_raise():
    with pytest.raises(ValueError, match=r"mask_index=2\b"):
        task(maskings=[RandomMasking(0.5)] * 3, mask_token="masking").shared_step(batch(), "train")
