"""The diffusion task through a trainer: what it trains on, logs and refuses, and that a run repeats."""

import math
from pathlib import Path

import lightning
import pytest
import torch

from blueberry_video.callbacks import EMA
from blueberry_video.data.datamodule import DataModule
from blueberry_video.data.latents import LatentClips
from blueberry_video.data.moving_shapes import MovingShapes
from blueberry_video.diffusion.conditioning import latents_of, text_of, without_some
from blueberry_video.diffusion.guidance import ConstantGuidance
from blueberry_video.diffusion.objectives import FlowMatching, VPrediction
from blueberry_video.diffusion.samplers import DDIM
from blueberry_video.diffusion.text_to_video import TextToVideo
from blueberry_video.diffusion.timesteps import UniformTimes
from blueberry_video.evaluation.generated_shapes import GeneratedShapes
from blueberry_video.models.autoencoder.base import Codec, Pixels
from blueberry_video.models.autoencoder.causal_vae import CausalVideoVAE
from blueberry_video.models.cogvideox.model import CogVideoX
from blueberry_video.models.text_encoder.words import WordText
from blueberry_video.optim import constant
from blueberry_video.precompute import write_latents
from blueberry_video.tasks.diffusion import Diffusion


def model(codec=None, vocabulary=None, **changes) -> TextToVideo:
    sizes = {"num_heads": 2, "head_dim": 16, "depth": 1, "in_channels": 3, "out_channels": 3, "text_dim": 8}
    sizes |= {"text_len": 8, "time_dim": 16, "patch_size": 8, "num_frames": 8, "height": 16, "width": 16}
    torch.manual_seed(0)
    transformer = CogVideoX(**{**sizes, "positions": "rope", **changes})
    return TextToVideo(transformer, WordText(8, 8, vocabulary), codec or Pixels())


def task(network: TextToVideo | None = None, lr: float = 3e-3, **changes) -> Diffusion:
    parts = {
        "objective": FlowMatching(),
        "times": UniformTimes(),
        "sampler": DDIM(2),
        "guidance": ConstantGuidance(2.0),
    }
    optimizer = lambda groups: torch.optim.AdamW(groups, lr=lr)  # noqa: E731
    return Diffusion(network or model(), optimizer, constant, **{**parts, **changes})


def data(val: int = 12) -> DataModule:
    return DataModule(MovingShapes("train", 1), MovingShapes("val", 1, val), batch_size=12)


def trainer(tmp_path: Path, **changes) -> lightning.Trainer:
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    options = {"max_steps": 2, "accelerator": "cpu", "enable_model_summary": False, "use_distributed_sampler": False}
    return lightning.Trainer(**quiet, **{**options, "default_root_dir": tmp_path, **changes})


def batch(size: int = 4) -> dict:
    clips = [MovingShapes("train", 1)[index] for index in range(size)]
    video = torch.stack([clip["video"] for clip in clips]).transpose(1, 2).contiguous().float() / 255
    return {"video": video, "id": [clip["id"] for clip in clips], "caption": [clip["caption"] for clip in clips]}


def test_training_moves_every_weight_and_logs_what_it_documents(tmp_path: Path):
    module, fit = (
        task(objective=VPrediction()),
        trainer(tmp_path, max_steps=6, callbacks=[EMA(), GeneratedShapes(36, 36)]),
    )
    before = {name: value.detach().clone() for name, value in module.named_parameters()}
    fit.fit(module, datamodule=data())
    still = [name for name, value in module.named_parameters() if torch.equal(value, before[name])]
    assert still == []
    logged = fit.callback_metrics.keys()
    bins = [f"t{i:02d}_{i + 10:02d}" for i in range(0, 100, 10)]
    kinds = ["", *(f"_{name}" for name in bins), "_t95", "_shuffled", "_t95_shuffled", "_trivial", "_t95_trivial"]
    assert {f"val/{unit}{kind}" for unit in ("loss", "flow_loss") for kind in kinds} <= logged
    sampling = {"colour", "shape", "direction", "colour_trivial", "direction_trivial", "direction_shuffled"}
    assert {f"sampling/{name}" for name in sampling} <= logged
    assert "train/loss" in fit.logged_metrics.keys() | logged
    assert module.model.text.vocabulary, "the words of the training captions"


def test_the_training_loss_is_the_plain_error_of_the_target(tmp_path: Path):
    """The model has zero output, so the loss is the mean square of the target, and of no weighted or wrong one."""
    module = task(caption_dropout=0.0)
    module.trainer = trainer(tmp_path)
    module.model.text.learn(batch()["caption"])
    torch.manual_seed(3)
    loss = module.shared_step(batch(), "train")["loss"]
    torch.manual_seed(3)
    clean = batch()["video"] * 2 - 1
    torch.randn_like(clean), torch.rand(4)  # the draw of the latents, of width 0, and the times
    noise = torch.randn_like(clean)
    torch.testing.assert_close(loss, (noise - clean).square().mean())


def test_validation_is_the_same_in_every_epoch_and_whatever_ran_before(tmp_path: Path):
    module, clips = task(), data()
    module.model.text.learn(["a red green blue square disc triangle moves left right up down"])
    found = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        fit = trainer(tmp_path)
        fit.validate(module, clips, verbose=False)
        found.append({name: value.item() for name, value in fit.callback_metrics.items()})
    assert found[0] == found[1]
    assert math.isclose(found[0]["val/loss"], 2.0, rel_tol=0.1)  # of an output of zero, §: noise 1, pixels 1
    assert found[0]["val/loss"] == found[0]["val/loss_shuffled"]
    assert 1.0 < found[0]["val/loss_trivial"] < 1.25


def test_frames_have_times_of_their_own_where_asked(tmp_path: Path):
    module = task(model(causal_chunk=2), frame_times=True)
    module.trainer = trainer(tmp_path)
    assert module._times_of(torch.zeros(4, 3, 8, 16, 16)).shape == (4, 8)
    assert task()._latent_size is None
    with pytest.raises(ValueError, match=r"frame_times=true"):
        task(model(causal_chunk=2))


def test_the_frames_of_a_patch_have_the_same_time(tmp_path: Path):
    """Of an odd number of frames, which are filled up."""
    network = model(tubelet_size=2, causal_chunk=4, num_frames=8)
    module = task(network, frame_times=True)
    module.trainer = trainer(tmp_path)
    times = module._times_of(torch.zeros(4, 3, 8, 16, 16))
    assert times.shape == (4, 8)
    assert torch.equal(times[:, ::2], times[:, 1::2])
    assert times.unique().numel() == 16
    network.text.learn(batch()["caption"])
    odd = {**batch(), "video": batch()["video"][:, :, :7]}
    assert module.shared_step(odd, "train")["loss"].isfinite()
    module._latent_size = (7, 16, 16)
    assert module.generate(batch()["caption"]).shape == (4, 3, 7, 16, 16)


def test_times_of_frames_are_not_spread_evenly():
    with pytest.raises(ValueError, match=r"stratified=true .*frame_times=true .*: set one of them to false"):
        task(frame_times=True, times=UniformTimes(stratified=True))
    task(times=UniformTimes(stratified=True))


def test_a_causal_network_is_trained_validated_and_sampled(tmp_path: Path):
    module, fit = task(model(causal_chunk=2), frame_times=True), trainer(tmp_path, max_steps=3)
    fit.fit(module, datamodule=data())
    made = module.generate(["a red disc moves up"], torch.Generator().manual_seed(0))
    assert made.shape == (1, 3, 8, 16, 16)
    assert made.abs().max() <= 1
    assert math.isfinite(fit.callback_metrics["val/loss"])


def test_the_same_prompts_and_seeds_give_the_same_pictures(tmp_path: Path):
    module, fit = task(prompts=["a red disc moves up", "a blue square moves left"]), trainer(tmp_path, max_steps=1)
    fit.fit(module, datamodule=data())
    first = module.media(batch())
    torch.rand(5)
    again = module.media(batch())
    assert first["samples"].shape == (8, 3, 2 * 17, 17)
    assert first["samples"].dtype == torch.uint8
    assert torch.equal(first["samples"], again["samples"])
    assert module.tokens_per_clip(batch()) == 8 * 2 * 2
    smaller = {**batch(), "video": batch()["video"][:, :, :4, :8]}
    assert module.tokens_per_clip(smaller) == 4 * 1 * 2, "of the batch, not of the validation clips"


def test_training_goes_on_after_pictures_that_failed(tmp_path: Path):
    module = task()
    module._latent_size = (8, 16, 16)
    module.model.text.learn(["a red disc"])
    module.train()
    with pytest.raises(ValueError, match="'yellow'"):
        module.generate(["a yellow disc"])
    assert module.model.training
    module.model.eval()
    module.generate(["a red disc"])
    assert not module.model.training


@pytest.mark.parametrize("hook", ["on_fit_start", "on_validation_start", "on_test_start"])
def test_the_frozen_codec_goes_to_the_device_of_the_run_under_any_strategy(tmp_path: Path, monkeypatch, hook: str):
    module, fit = task(model(CausalVideoVAE(3, (4, 8), time_stride=1))), trainer(tmp_path)
    module.trainer = fit
    monkeypatch.setattr(fit.strategy, "_accelerator", None)
    monkeypatch.setattr(type(fit.strategy), "root_device", torch.device("meta"))
    getattr(module, hook)()
    assert all(parameter.is_meta for parameter in module.model.codec.parameters())
    assert not any(parameter.is_meta for parameter in module.parameters())


class Captioned(MovingShapes):
    """Says of its clips what one asks it to."""

    def __init__(self, captions: list[str]):
        super().__init__("val", 1, len(captions))
        self.said = captions

    def __getitem__(self, index: int) -> dict:
        return {**super().__getitem__(index), "caption": self.said[index]}


@pytest.mark.parametrize("size", [1, 2])
def test_shuffled_captions_are_never_a_clips_own(tmp_path: Path, size: int):
    """A network that is wrong by what it is told: 1 of "red", 2 of "blue"."""
    network = model(vocabulary=["blue", "red"])
    told = torch.zeros_like(network.text.embed.weight)
    told[2:4] = torch.tensor([[2.0], [1.0]])
    network.text.embed.weight.data = told
    network.text.position.data.zero_()
    network.forward = lambda latents, time, text, *_: (
        torch.zeros_like(latents) + 1000 * text.tokens.sum(dim=1)[:, 0].view(-1, 1, 1, 1, 1)
    )
    losses = []
    for captions in (["red", "red", "blue", "red"], ["red"] * 4):
        clips, fit = (
            DataModule(MovingShapes("train", 1), Captioned(captions), size, val_batch_size=size),
            trainer(tmp_path),
        )
        fit.validate(task(network), clips, verbose=False)
        losses.append({name: value.item() for name, value in fit.callback_metrics.items()})
    expected = (3 * 1 + 4) / 4, (3 * 4 + 1) / 4  # of its own captions, and of the others'
    assert losses[0]["val/loss"] == pytest.approx(expected[0] * 1e6, rel=0.01)
    assert losses[0]["val/loss_shuffled"] == pytest.approx(expected[1] * 1e6, rel=0.01)
    assert losses[0]["val/loss_t95_shuffled"] == pytest.approx(expected[1] * 1e6, rel=0.01)
    assert losses[1]["val/loss"] == pytest.approx(1e6, rel=0.01)
    assert not [name for name in losses[1] if "shuffled" in name]


def test_captions_are_dropped_as_often_as_asked_and_become_the_unconditional_text():
    network = model()
    many = {**batch(36), "caption": batch(36)["caption"]}
    network.text.learn(many["caption"])
    text = text_of(network, many)
    torch.manual_seed(0)
    kept, none, some = (without_some(network, text, share) for share in (0.0, 1.0, 0.5))
    assert torch.equal(kept.tokens, text.tokens)
    assert torch.equal(none.tokens, network.text.unconditional(36).tokens)
    assert torch.equal(none.mask, network.text.unconditional(36).mask)
    dropped = (some.tokens == 0).all(dim=2).all(dim=1)
    assert 8 <= int(dropped.sum()) <= 28
    assert torch.equal(some.tokens[~dropped], text.tokens[~dropped])


def test_stored_latents_train_as_pixels_do(tmp_path: Path):
    network = model()
    for split in ("train", "val"):
        clips = MovingShapes(split, 1, 36 if split == "train" else 12)
        write_latents(clips, network.codec, None, tmp_path / split, shard_size=6)
    stored = DataModule(LatentClips(tmp_path / "train"), LatentClips(tmp_path / "val"), 12)
    losses = []
    for clips in (data(), stored):
        module, fit = task(model()), trainer(tmp_path, max_steps=3)
        lightning.seed_everything(0, verbose=False)
        fit.fit(module, datamodule=clips)
        losses.append(fit.callback_metrics["val/loss"].item())
    assert losses[0] == losses[1]


# ---- bad input -------------------------------------------------------------------------------------------------------


def test_a_missing_caption_names_the_clip():
    silent = {**batch(), "caption": ["a red disc moves up", "", "a", "a"]}
    with pytest.raises(ValueError, match=f"{silent['id'][1]} have no caption"):
        text_of(model(), silent)
    with pytest.raises(ValueError, match="have no caption"):
        text_of(model(), {key: value for key, value in batch().items() if key != "caption"})


@pytest.mark.parametrize("stored", [False, True])
def test_latents_that_are_nan_name_the_clip(stored: bool):
    broken = batch()
    broken["video"][2, 0, 3, 4, 5] = torch.nan
    if stored:
        broken["moments"] = Pixels().encode(broken["video"])
    with pytest.raises(ValueError, match=rf"clips {broken['id'][2]} are NaN"):
        latents_of(model(), broken, None)


class Blocks(Codec):
    """A codec with a step in time and space."""

    def __init__(self) -> None:
        super().__init__(channels=3, stride=(4, 2, 2))

    def encode(self, video):
        return torch.cat([video, video], dim=1)[:, :, ::4, ::2, ::2]

    def decode(self, latents):
        return latents


def test_an_illegal_number_of_frames_is_refused_before_the_first_step(tmp_path: Path):
    with pytest.raises(ValueError, match=r"num_frames=8 is not 1 \+ a multiple of 4.*use 9 or 5"):
        trainer(tmp_path).fit(task(model(Blocks())), datamodule=data())


def test_latents_of_another_codec_are_refused(tmp_path: Path):
    for split in ("train", "val"):
        write_latents(MovingShapes(split, 1, 12), Pixels(), None, tmp_path / split, shard_size=12)
    stored = DataModule(LatentClips(tmp_path / "train"), LatentClips(tmp_path / "val"), 4)
    with pytest.raises(ValueError, match=r"what Pixels/\w+ made, and model.codec is Blocks/"):
        trainer(tmp_path).fit(task(model(Blocks())), datamodule=stored)


def test_a_word_that_training_never_showed_is_named(tmp_path: Path):
    module = task()
    module.model.text.learn(["a red disc moves up"])
    with pytest.raises(ValueError, match=r"'yellow'.*not among"):
        text_of(module.model, {"id": ["one"], "caption": ["a yellow disc moves up"]})


def test_a_share_out_of_range():
    with pytest.raises(ValueError, match=r"caption_dropout=1.5"):
        task(caption_dropout=1.5)
