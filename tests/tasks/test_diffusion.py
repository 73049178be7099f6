"""Diffusion task: loss, logged metrics, errors and reproducibility."""

import math
from functools import partial
from pathlib import Path

import lightning
import pytest
import torch

from blueberry_video.callbacks import EMA
from blueberry_video.data.datamodule import DataModule
from blueberry_video.data.latents import LatentClips
from blueberry_video.data.moving_shapes import MovingShapes
from blueberry_video.diffusion.conditioning import drop_captions, latents_of, text_of
from blueberry_video.diffusion.guidance import ConstantGuidance
from blueberry_video.diffusion.objectives import FlowMatching, VPrediction
from blueberry_video.diffusion.samplers import DDIM, DPMSolverSDE, FlowEuler, Sampler
from blueberry_video.diffusion.text_to_video import TextToVideo
from blueberry_video.diffusion.timesteps import UniformTimesteps
from blueberry_video.evaluation.generated_shapes import GeneratedShapes
from blueberry_video.models.autoencoder.base import Autoencoder, Pixels
from blueberry_video.models.autoencoder.causal_vae import CausalVideoVAE
from blueberry_video.models.cogvideox.model import CogVideoX
from blueberry_video.models.text_encoder.words import WordText
from blueberry_video.nn.noise import standard_normal
from blueberry_video.optim import constant
from blueberry_video.precompute import write_latents
from blueberry_video.tasks.diffusion import Diffusion
from blueberry_video.tasks.settings import Optimization


def model(autoencoder=None, vocabulary=None, **changes) -> TextToVideo:
    sizes = {"num_heads": 2, "head_dim": 16, "depth": 1, "in_channels": 3, "out_channels": 3, "text_dim": 8}
    sizes |= {"text_len": 8, "time_dim": 16, "patch_size": 8, "num_frames": 8, "height": 16, "width": 16}
    torch.manual_seed(0)
    transformer = CogVideoX(**{**sizes, "positions": "rope", **changes})
    return TextToVideo(transformer, WordText(8, 8, vocabulary), autoencoder or Pixels())


def task(network: TextToVideo | None = None, lr: float = 3e-3, **changes) -> Diffusion:
    parts = {
        "objective": FlowMatching(),
        "timesteps": UniformTimesteps(),
        "sampler": DDIM(2),
        "guidance": ConstantGuidance(2.0),
    }
    optimization = Optimization(partial(torch.optim.AdamW, lr=lr), constant)
    return Diffusion(network or model(), optimization, **{**parts, **changes})


def data(val: int = 12) -> DataModule:
    return DataModule(MovingShapes("train", 1), MovingShapes("val", 1, val), batch_size=12)


def batch(size: int = 4) -> dict:
    clips = [MovingShapes("train", 1)[index] for index in range(size)]
    video = torch.stack([clip["video"] for clip in clips]).transpose(1, 2).contiguous().float() / 255
    return {"video": video, "id": [clip["id"] for clip in clips], "caption": [clip["caption"] for clip in clips]}


def test_training_updates_every_weight_and_logs_documented_metrics(trainer):
    module, fit = task(objective=VPrediction()), trainer(EMA(), GeneratedShapes(36, 36), max_steps=6)
    before = {name: value.detach().clone() for name, value in module.named_parameters()}
    fit.fit(module, datamodule=data())
    unchanged = [name for name, value in module.named_parameters() if torch.equal(value, before[name])]
    assert unchanged == []
    logged = fit.callback_metrics.keys()
    bins = [f"t{i:02d}_{i + 10:02d}" for i in range(0, 100, 10)]
    kinds = ["", *(f"_{name}" for name in bins), "_t95", "_shuffled", "_t95_shuffled", "_trivial", "_t95_trivial"]
    assert {f"val/{unit}{kind}" for unit in ("loss", "flow_loss") for kind in kinds} <= logged
    sampling = {"colour", "shape", "direction", "colour_trivial", "direction_trivial", "direction_shuffled"}
    assert {f"sampling/{name}" for name in sampling} <= logged
    assert "train/loss" in fit.logged_metrics.keys() | logged
    assert module.model.text.vocabulary, "built from the training captions"


def test_the_training_loss_is_the_mean_squared_error_of_the_target(trainer):
    """The model has zero output, so the loss is the unweighted mean square of the target."""
    module = task(caption_dropout=0.0)
    module.trainer = trainer()
    module.model.text.learn(batch()["caption"])
    torch.manual_seed(3)
    loss = module.shared_step(batch(), "train")["loss"]
    torch.manual_seed(3)
    clean = batch()["video"] * 2 - 1
    torch.randn_like(clean), torch.rand(4)  # latent sampling (std 0) and times
    noise = torch.randn_like(clean)
    torch.testing.assert_close(loss, (noise - clean).square().mean())


def test_validation_is_independent_of_the_global_generator(trainer):
    module, clips = task(), data()
    module.model.text.learn(["a red green blue square disc triangle moves left right up down"])
    found = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        fit = trainer()
        fit.validate(module, clips, verbose=False)
        found.append({name: value.item() for name, value in fit.callback_metrics.items()})
    assert found[0] == found[1]
    assert math.isclose(found[0]["val/loss"], 2.0, rel_tol=0.1)  # zero output: noise 1 + pixels 1
    assert found[0]["val/loss"] == found[0]["val/loss_shuffled"]
    assert 1.0 < found[0]["val/loss_trivial"] < 1.25


@pytest.mark.parametrize("sampler", [DDIM(3), DPMSolverSDE(3)])
@pytest.mark.parametrize("changes", [{}, {"causal_chunk": 2}, {"tubelet_size": 2}])
def test_sample_depends_on_its_seed_and_not_on_its_batch(sampler: Sampler, changes: dict):
    captions = ["a red disc moves up", "a blue square moves left", "a green disc moves down"]
    network = model(zero_init=False, **changes)
    module = task(network, sampler=sampler, frame_timesteps=bool(network.shape.causal_chunk))
    network.text.learn(captions)
    module._latent_size = (5, 16, 16) if "tubelet_size" in changes else (4, 16, 16)
    generator = torch.Generator().manual_seed(1)
    together = module.generate(captions, torch.Generator().manual_seed(1))
    apart = torch.cat([module.generate(part, generator) for part in (captions[:1], captions[1:])])
    torch.testing.assert_close(together, apart, rtol=0, atol=1e-4)
    seeds = [torch.Generator().manual_seed(seed) for seed in (7, 8)]
    pair = module.generate(captions[:2], seeds)
    alone = module.generate(captions[1:2], [torch.Generator().manual_seed(8)])
    torch.testing.assert_close(pair[1:], alone, rtol=0, atol=1e-4)
    assert (pair[0] - pair[1]).abs().mean() > 0.05


def test_validation_noise_of_a_clip_does_not_depend_on_its_batch(monkeypatch: pytest.MonkeyPatch):
    module, clips = task(), batch()
    module.model.text.learn(clips["caption"])
    drawn = []
    monkeypatch.setattr(
        "blueberry_video.evaluation.denoising.standard_normal",
        lambda *arguments: drawn.append(standard_normal(*arguments)) or drawn[-1],
    )
    noise = {}
    for indices in ([0, 1, 2, 3], [3, 0], [2]):
        part = {"video": clips["video"][indices]} | {key: [clips[key][i] for i in indices] for key in ("id", "caption")}
        drawn.clear()
        module.shared_step(part, "val")
        for row, index in enumerate(indices):
            noise.setdefault(index, drawn[0][row])
            assert torch.equal(drawn[0][row], noise[index])
    assert not torch.equal(noise[0], noise[1])


def test_frames_have_separate_timesteps_with_frame_timesteps(trainer):
    module = task(model(causal_chunk=2), frame_timesteps=True)
    module.trainer = trainer()
    assert module._timesteps_of(torch.zeros(4, 3, 8, 16, 16)).shape == (4, 8)
    assert task()._latent_size is None
    with pytest.raises(ValueError, match=r"task\.frame_timesteps=true"):
        task(model(causal_chunk=2))


def test_frames_of_one_patch_share_a_timestep(trainer):
    """Also with an odd number of frames, which is padded."""
    network = model(tubelet_size=2, causal_chunk=4, num_frames=8)
    module = task(network, frame_timesteps=True)
    module.trainer = trainer()
    times = module._timesteps_of(torch.zeros(4, 3, 8, 16, 16))
    assert times.shape == (4, 8)
    assert torch.equal(times[:, ::2], times[:, 1::2])
    assert times.unique().numel() == 16
    network.text.learn(batch()["caption"])
    odd = {**batch(), "video": batch()["video"][:, :, :7]}
    assert module.shared_step(odd, "train")["loss"].isfinite()
    module._latent_size = (7, 16, 16)
    assert module.generate(batch()["caption"]).shape == (4, 3, 7, 16, 16)


def test_stratified_frame_timesteps_raise():
    with pytest.raises(ValueError, match=r"(?s)(?=.*task\.timesteps\.stratified=true)(?=.*task\.frame_timesteps=true)"):
        task(frame_timesteps=True, timesteps=UniformTimesteps(stratified=True))
    task(timesteps=UniformTimesteps(stratified=True))


def test_a_causal_network_trains_validates_and_samples(trainer):
    module, fit = task(model(causal_chunk=2), frame_timesteps=True), trainer(max_steps=3)
    fit.fit(module, datamodule=data())
    made = module.generate(["a red disc moves up"], torch.Generator().manual_seed(0))
    assert made.shape == (1, 3, 8, 16, 16)
    assert made.abs().max() <= 1
    assert math.isfinite(fit.callback_metrics["val/loss"])


def test_samples_in_media_are_deterministic(trainer):
    module, fit = task(prompts=["a red disc moves up", "a blue square moves left"]), trainer(max_steps=1)
    fit.fit(module, datamodule=data())
    first = module.media(batch())
    torch.rand(5)
    again = module.media(batch())
    assert first["samples"].shape == (8, 3, 2 * 17, 17)
    assert first["samples"].dtype == torch.uint8
    assert torch.equal(first["samples"], again["samples"])
    assert module.tokens_per_clip(batch()) == 8 * 2 * 2
    smaller = {**batch(), "video": batch()["video"][:, :, :4, :8]}
    assert module.tokens_per_clip(smaller) == 4 * 1 * 2, "size of the batch, not of the validation clips"


def test_generate_restores_the_training_mode_also_after_an_error(tmp_path: Path):
    module = task()
    module._latent_size = (8, 16, 16)
    module.model.text.learn(["a red disc"])
    module.train()
    with pytest.raises(ValueError, match=r"'yellow'"):
        module.generate(["a yellow disc"])
    assert module.model.training
    module.model.eval()
    module.generate(["a red disc"])
    assert not module.model.training


@pytest.mark.parametrize("hook", ["on_fit_start", "on_validation_start", "on_test_start"])
def test_the_frozen_autoencoder_is_moved_to_the_device_under_any_strategy(monkeypatch, hook: str, trainer):
    module, fit = task(model(CausalVideoVAE(3, (4, 8), time_stride=1))), trainer()
    module.trainer = fit
    monkeypatch.setattr(fit.strategy, "_accelerator", None)
    monkeypatch.setattr(type(fit.strategy), "root_device", torch.device("meta"))
    getattr(module, hook)()
    assert all(parameter.is_meta for parameter in module.model.autoencoder.parameters())
    assert not any(parameter.is_meta for parameter in module.parameters())


class Captioned(MovingShapes):
    """Dataset with the given captions."""

    def __init__(self, captions: list[str]):
        super().__init__("val", 1, len(captions))
        self.texts = captions

    def __getitem__(self, index: int) -> dict:
        return {**super().__getitem__(index), "caption": self.texts[index]}


@pytest.mark.parametrize("size", [1, 2])
def test_shuffled_captions_differ_from_the_caption_of_the_clip(size: int, trainer):
    """The output error of the network depends on the caption: 1 for "red", 2 for "blue"."""
    network = model(vocabulary=["blue", "red"])
    embedding = torch.zeros_like(network.text.embed.weight)
    embedding[2:4] = torch.tensor([[2.0], [1.0]])
    network.text.embed.weight.data = embedding
    network.text.position.data.zero_()
    network.forward = lambda latents, time, text, *_: (
        torch.zeros_like(latents) + 1000 * text.tokens.sum(dim=1)[:, 0].view(-1, 1, 1, 1, 1)
    )
    losses = []
    for captions in (["red", "red", "blue", "red"], ["red"] * 4):
        clips, fit = (DataModule(MovingShapes("train", 1), Captioned(captions), size, val_batch_size=size), trainer())
        fit.validate(task(network), clips, verbose=False)
        losses.append({name: value.item() for name, value in fit.callback_metrics.items()})
    expected = (3 * 1 + 4) / 4, (3 * 4 + 1) / 4  # own captions, shuffled captions
    assert losses[0]["val/loss"] == pytest.approx(expected[0] * 1e6, rel=0.01)
    assert losses[0]["val/loss_shuffled"] == pytest.approx(expected[1] * 1e6, rel=0.01)
    assert losses[0]["val/loss_t95_shuffled"] == pytest.approx(expected[1] * 1e6, rel=0.01)
    assert losses[1]["val/loss"] == pytest.approx(1e6, rel=0.01)
    assert not [name for name in losses[1] if "shuffled" in name]


def test_caption_dropout_has_the_given_share_and_uses_the_unconditional_text():
    network = model()
    many = {**batch(36), "caption": batch(36)["caption"]}
    network.text.learn(many["caption"])
    text = text_of(network, many)
    torch.manual_seed(0)
    kept, none, some = (drop_captions(network, text, share) for share in (0.0, 1.0, 0.5))
    assert torch.equal(kept.tokens, text.tokens)
    assert torch.equal(none.tokens, network.text.unconditional(36).tokens)
    assert torch.equal(none.mask, network.text.unconditional(36).mask)
    dropped = (some.tokens == 0).all(dim=2).all(dim=1)
    assert 8 <= int(dropped.sum()) <= 28
    assert torch.equal(some.tokens[~dropped], text.tokens[~dropped])


def test_training_on_stored_latents_equals_training_on_pixels(tmp_path: Path, trainer):
    network = model()
    for split in ("train", "val"):
        clips = MovingShapes(split, 1, 36 if split == "train" else 12)
        write_latents(clips, network.autoencoder, None, tmp_path / split, shard_size=6)
    stored = DataModule(LatentClips(tmp_path / "train"), LatentClips(tmp_path / "val"), 12)
    losses = []
    for clips in (data(), stored):
        module, fit = task(model()), trainer(max_steps=3)
        lightning.seed_everything(0, verbose=False)
        fit.fit(module, datamodule=clips)
        losses.append(fit.callback_metrics["val/loss"].item())
    assert losses[0] == losses[1]


# ---- bad input -------------------------------------------------------------------------------------------------------


def test_a_missing_caption_names_the_clip():
    uncaptioned = {**batch(), "caption": ["a red disc moves up", "", "a", "a"]}
    with pytest.raises(ValueError, match=rf"(?s)(?=.*{uncaptioned['id'][1]})(?=.*caption)"):
        text_of(model(), uncaptioned)
    with pytest.raises(ValueError, match=r"caption.*metadata"):
        text_of(model(), {key: value for key, value in batch().items() if key != "caption"})


@pytest.mark.parametrize("stored", [False, True])
def test_latents_that_are_nan_name_the_clip(stored: bool):
    broken = batch()
    broken["video"][2, 0, 3, 4, 5] = torch.nan
    if stored:
        broken["moments"] = Pixels().encode(broken["video"])
    with pytest.raises(ValueError, match=rf"(?s)(?=.*{broken['id'][2]})(?=.*NaN)"):
        latents_of(model(), broken, None)


class Blocks(Autoencoder):
    """Autoencoder with strides 4 in time and 2 in space."""

    def __init__(self) -> None:
        super().__init__(channels=3, stride=(4, 2, 2))

    def encode(self, video):
        return torch.cat([video, video], dim=1)[:, :, ::4, ::2, ::2]

    def decode(self, latents):
        return latents


def test_an_invalid_number_of_frames_raises_before_the_first_step(trainer):
    with pytest.raises(ValueError, match=r"(?s)num_frames=8\b(?=.*\b9\b)(?=.*\b5\b)"):
        trainer().fit(task(model(Blocks())), datamodule=data())


def test_latents_of_a_different_autoencoder_raise(tmp_path: Path, trainer):
    for split in ("train", "val"):
        write_latents(MovingShapes(split, 1, 12), Pixels(), None, tmp_path / split, shard_size=12)
    stored = DataModule(LatentClips(tmp_path / "train"), LatentClips(tmp_path / "val"), 4)
    with pytest.raises(ValueError, match=r"(?s)(?=.*Pixels/)(?=.*model\.autoencoder\b)(?=.*Blocks/)"):
        trainer().fit(task(model(Blocks())), datamodule=stored)


def test_an_unknown_word_in_a_caption_raises(tmp_path: Path):
    module = task()
    module.model.text.learn(["a red disc moves up"])
    with pytest.raises(ValueError, match=r"(?s)'yellow'.*vocabulary"):
        text_of(module.model, {"id": ["one"], "caption": ["a yellow disc moves up"]})


def test_caption_dropout_out_of_range_raises():
    with pytest.raises(ValueError, match=r"task\.caption_dropout=1\.5"):
        task(caption_dropout=1.5)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"sampler": FlowEuler(2), "objective": VPrediction()}, r"task\.sampler=FlowEuler .*VPrediction"),
        ({"sampler": DDIM(11), "objective": VPrediction(10)}, r"task\.sampler=DDIM .*steps=11\b"),
        ({"prompts": ["a red zebra moves left"]}, r"task\.prompts: .*'zebra'"),
        ({"prompts": ["a red red red red square moves left"]}, r"task\.prompts: .*length=8\b"),
        ({"num_pictures": 0}, r"task\.num_pictures=0\b.*callbacks\.media=null"),
    ],
)
def test_settings_that_sampling_rejects_raise_before_training(changes: dict, message: str, trainer):
    with pytest.raises(ValueError, match=message):
        trainer(limit_train_batches=0, limit_val_batches=0).fit(task(**changes), datamodule=data())


def test_validation_caption_with_an_unknown_word_raises_before_training(trainer):
    clips = data()
    clips.val.captions = lambda: iter(["a red zebra moves left"])
    with pytest.raises(ValueError, match=r"data\.val: .*'zebra'"):
        trainer().fit(task(), datamodule=clips)
