"""Image-to-video training: what the network is shown of the first frame in training, validation and pictures."""

from pathlib import Path

import lightning
import pytest
import torch
from torch import Tensor, nn

from blueberry_video.callbacks import Media
from blueberry_video.data.datamodule import DataModule
from blueberry_video.data.latents import LatentClips
from blueberry_video.data.moving_shapes import MovingShapes
from blueberry_video.diffusion.guidance import NoGuidance
from blueberry_video.diffusion.image_noise import ImageNoise
from blueberry_video.diffusion.objectives import FlowMatching
from blueberry_video.diffusion.samplers import DDIM
from blueberry_video.diffusion.text_to_video import TextToVideo
from blueberry_video.diffusion.timesteps import UniformTimes
from blueberry_video.models.autoencoder.base import Codec, Pixels
from blueberry_video.models.cogvideox.model import CogVideoX
from blueberry_video.models.text_encoder.words import WordText
from blueberry_video.optim import constant
from blueberry_video.precompute import write_latents
from blueberry_video.tasks.diffusion import Diffusion

CHANNELS = {"channels": 6, "latent_concat": 7, "token_replace": 3, "optional": 7}
WORDS = ["a", "red", "green", "blue", "square", "disc", "triangle", "moves", "left", "right", "up", "down"]


class Recorder(nn.Module):
    """Keeps what it is given; says the exact flow of the one clip that it knows, but nonsense of its first frame."""

    out_channels, text_dim, pooled_dim, patch_size = 3, 8, 0, (1, 4, 4)
    embedded_guidance, causal_chunk = False, 0

    def __init__(self, image_condition: str, knows: Tensor | None = None):
        super().__init__()
        self.image_condition, self.in_channels, self.knows = image_condition, CHANNELS[image_condition], knows
        self.weight = nn.Parameter(torch.zeros(1))
        self.seen: list[Tensor] = []

    def check_size(self, size: tuple[int, int, int]) -> None:
        """Takes any."""

    def forward(self, latents, time, text, mask, pooled, guidance, cache, first_frame):
        self.seen.append(latents.detach())
        if self.knows is None:
            return latents[:, :3] * self.weight
        flow = (latents[:, :3] - self.knows) / (time / 1000).view(-1, 1, 1, 1, 1)
        flow[:, :, 0] = 100.0
        return flow + self.weight


def recording(how: str, knows: Tensor | None = None, **changes) -> tuple[Diffusion, Recorder]:
    recorder = Recorder(how, knows)
    return task(TextToVideo(recorder, WordText(8, 8, WORDS), Pixels()), **changes), recorder


def cogvideox(seed: int = 0) -> TextToVideo:
    torch.manual_seed(seed)
    transformer = CogVideoX(
        num_heads=2, head_dim=16, depth=1, in_channels=6, out_channels=3, text_dim=8, text_len=8, time_dim=16,
        patch_size=8, num_frames=8, height=16, width=16, positions="rope",
    )  # fmt: skip
    return TextToVideo(transformer, WordText(8, 8), Pixels())


def task(network: TextToVideo, **changes) -> Diffusion:
    optimizer = lambda groups: torch.optim.AdamW(groups, lr=3e-3)  # noqa: E731
    parts = {"objective": FlowMatching(), "times": UniformTimes(), "sampler": DDIM(2), "guidance": NoGuidance()}
    module = Diffusion(network, optimizer, constant, **{**parts, **changes})
    module.trainer = lightning.Trainer(logger=False, accelerator="cpu", enable_checkpointing=False)
    return module


def trainer(tmp_path: Path, **changes) -> lightning.Trainer:
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "accelerator": "cpu"}
    options = {"max_steps": 2, "enable_model_summary": False, "use_distributed_sampler": False}
    return lightning.Trainer(**quiet, **{**options, "default_root_dir": tmp_path, **changes})


def data() -> DataModule:
    return DataModule(MovingShapes("train", 1, 12), MovingShapes("val", 1, 12), batch_size=12)


def batch(size: int = 4) -> dict:
    clips = [MovingShapes("train", 1)[index] for index in range(size)]
    video = torch.stack([clip["video"] for clip in clips]).transpose(1, 2).contiguous().float() / 255
    return {"video": video, "id": [clip["id"] for clip in clips], "caption": [clip["caption"] for clip in clips]}


def image_of(how: str, latents: Tensor) -> Tensor:
    """The first frame (B, 3, H, W) that a network was told."""
    return (latents if how == "token_replace" else latents[:, 3:6])[:, :, 0]


@pytest.mark.parametrize("how", CHANNELS)
def test_training_shows_noisy_images_and_withholds_some_and_validation_neither(how: str):
    module, recorder = recording(how, image_noise=ImageNoise(), image_dropout=0.5)
    clips = batch(36)
    clean = clips["video"][:, :, 0] * 2 - 1
    torch.manual_seed(0)
    module.shared_step(clips, "train")
    told = image_of(how, recorder.seen.pop())
    withheld = (told == 0).flatten(1).all(dim=1)
    assert 8 <= int(withheld.sum()) <= 28, "some, within one batch"
    noise = (told - clean)[~withheld].flatten(1).std(dim=1)
    assert ((noise > 0.005) & (noise < 0.4)).all()
    assert noise.std() > 0.005, "of every clip its own"
    for stage in ("val", "test"):
        module.shared_step(clips, stage)
        assert all(torch.equal(image_of(how, latents), clean) for latents in recorder.seen)


def test_the_mark_of_an_image_is_withheld_with_it():
    module, recorder = recording("optional", image_dropout=0.5)
    torch.manual_seed(0)
    module.shared_step(batch(36), "train")
    seen = recorder.seen.pop()
    withheld = (image_of("optional", seen) == 0).flatten(1).all(dim=1)
    marks = seen[:, 6].flatten(2)
    assert (marks[~withheld, 0] == 1).all()
    assert not marks[:, 1:].any()
    assert not marks[withheld].any()
    assert 0 < int(withheld.sum()) < 36


@pytest.mark.parametrize(("dropout", "told"), [(None, True), (1.0, False)])
def test_a_network_that_can_do_without_is_shown_images_unless_told_not_to(dropout: float | None, told: bool):
    module, recorder = recording("optional", image_dropout=dropout)
    torch.manual_seed(0)
    for stage in ("train", "val"):
        module.shared_step(batch(36), stage)
        assert all(bool(latents[:, 3:].any()) == told for latents in recorder.seen)
        recorder.seen.clear()


def test_a_run_that_needs_no_image_draws_what_it_always_drew():
    """Neither noise nor dropout costs a random number where they do nothing."""
    losses = []
    for changes in ({}, {"image_noise": ImageNoise(), "image_dropout": 0.5}):
        recorder = Recorder("optional")
        recorder.image_condition, recorder.in_channels = None, 3
        module = task(TextToVideo(recorder, WordText(8, 8, WORDS), Pixels()), **changes)
        torch.manual_seed(0)
        losses.append(module.shared_step(batch(), "train")["loss"].item())
    assert losses[0] == losses[1]


@pytest.mark.parametrize("how", ["token_replace", "channels"])
def test_a_frame_that_is_given_counts_neither_in_training_nor_in_validation(how: str):
    """The network is exact but for the first frame, where ``token_replace`` makes nothing that is used."""
    clips = batch(1)
    module, _ = recording(how, clips["video"] * 2 - 1, caption_dropout=0.0, image_dropout=0.0)
    torch.manual_seed(0)
    values = [module.shared_step(clips, "train")["loss"]]
    held_out = module.shared_step(clips, "val")
    values += [held_out[name] for name in held_out if "trivial" not in name]
    assert len(values) > 10
    for value in values:
        assert (value < 1e-6) == (how == "token_replace")


def test_held_out_losses_of_image_to_video_repeat(tmp_path: Path):
    module, found = task(cogvideox(), image_noise=ImageNoise()), []
    for seed in (1, 2):
        torch.manual_seed(seed)
        fit = trainer(tmp_path)
        fit.validate(module, data(), verbose=False)
        found.append({name: value.item() for name, value in fit.callback_metrics.items()})
    assert found[0] == found[1]
    assert found[0]["val/loss"] > 0


def test_image_to_video_is_trained_and_shown(tmp_path: Path):
    module = task(cogvideox(), image_noise=ImageNoise(), num_pictures=3)
    assert module.image_dropout == 0.05
    before = {name: value.detach().clone() for name, value in module.named_parameters()}
    trainer(tmp_path, max_steps=4, callbacks=[Media()]).fit(module, datamodule=data())
    assert [name for name, value in module.named_parameters() if torch.equal(value, before[name])] == []
    assert list((tmp_path / "media").glob("samples_from_image_*.gif"))
    shown = module.media(batch())
    assert list(shown) == ["samples_from_image"]
    assert shown["samples_from_image"].shape == (8, 3, 3 * 17, 17)
    torch.rand(5)
    assert torch.equal(shown["samples_from_image"], module.media(batch())["samples_from_image"])
    others = {**batch(), "video": batch()["video"].flip(0)}
    assert not torch.equal(shown["samples_from_image"], module.media(others)["samples_from_image"])


def test_pictures_begin_as_the_clips_of_the_batch():
    module, _ = recording("token_replace", prompts=["a red disc moves up"] * 9)
    module._latent_size = (8, 16, 16)
    shown = module.media(batch(2))["samples_from_image"]
    assert shown.shape == (8, 3, 2 * 17, 17), "a clip has one image"
    first = shown[0].unflatten(1, (2, 17))[:, :, :16, :16].transpose(0, 1).float() / 255
    torch.testing.assert_close(first, batch(2)["video"][:, :, 0])


def test_a_network_that_can_do_without_is_shown_both_ways():
    module, recorder = recording("optional")
    module._latent_size = (8, 16, 16)
    assert list(module.media(batch())) == ["samples", "samples_from_image"]
    marks = [bool(latents[:, 6].any()) for latents in recorder.seen]
    assert marks == [False] * 2 + [True] * 2
    module, _ = recording("optional", image_dropout=1.0)
    module._latent_size = (8, 16, 16)
    assert list(module.media(batch())) == ["samples"]


def stored(folder: Path, codec: Codec | None = None) -> DataModule:
    for split in ("train", "val"):
        write_latents(MovingShapes(split, 1, 12), codec or Pixels(), None, folder / split, shard_size=12)
    return DataModule(LatentClips(folder / "train"), LatentClips(folder / "val"), 4)


def test_noise_on_images_of_stored_latents_is_refused_when_a_run_begins(tmp_path: Path):
    clips = stored(tmp_path)
    module, recorder = recording("channels", image_noise=ImageNoise())
    with pytest.raises(ValueError, match=r"task.image_noise=null, or train on the clips themselves"):
        trainer(tmp_path).fit(module, datamodule=clips)
    assert recorder.seen == []
    module, recorder = recording("channels", num_pictures=2)
    trainer(tmp_path, max_steps=1).fit(module, datamodule=clips)
    assert recorder.seen
    moments = torch.stack([clips.val[index]["moments"] for index in range(2)])
    shown = module.media({"video": moments, "moments": moments, "id": ["a", "b"], "caption": ["a disc"] * 2})
    assert shown["samples_from_image"].shape == (8, 3, 2 * 17, 17)


class Spanning(Pixels):
    """As if its norms spanned the frames of a clip."""

    first_frame_alone = False


class WithImages(LatentClips):
    """Stored latents with those of the first frame alone."""

    def __getitem__(self, index: int) -> dict:
        return {**super().__getitem__(index), "image_moments": torch.full((6, 1, 16, 16), -0.5)}


def test_stored_latents_without_those_of_the_image_are_refused_when_a_run_begins(tmp_path: Path):
    stored(tmp_path, Spanning())
    recorder = Recorder("channels")
    module = task(TextToVideo(recorder, WordText(8, 8, WORDS), Spanning()), image_dropout=0.0, num_pictures=2)
    for clips, refused in ((LatentClips, True), (WithImages, False)):
        data = DataModule(clips(tmp_path / "train"), clips(tmp_path / "val"), 4)
        fit = trainer(tmp_path, max_steps=1)
        if refused:
            with pytest.raises(ValueError, match=r"no `image_moments`.*`make latents EXP=…`"):
                fit.fit(module, datamodule=data)
            assert recorder.seen == []
        else:
            fit.fit(module, datamodule=data)
    assert recorder.seen
    assert all(abs(image_of("channels", latents).mean() + 0.5) < 0.1 for latents in recorder.seen)


@pytest.mark.parametrize("share", [-0.1, 1.5])
def test_a_share_of_images_out_of_range(share: float):
    with pytest.raises(ValueError, match=rf"task.image_dropout={share} is a share"):
        recording("channels", image_dropout=share)
