"""Image-to-video training: conditioning on the first frame in training, validation and media."""

from functools import partial
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
from blueberry_video.diffusion.timesteps import UniformTimesteps
from blueberry_video.models.autoencoder.base import Autoencoder, Pixels
from blueberry_video.models.cogvideox.model import CogVideoX
from blueberry_video.models.text_encoder.words import WordText
from blueberry_video.optim import constant
from blueberry_video.precompute import write_latents
from blueberry_video.tasks.diffusion import Diffusion
from blueberry_video.tasks.settings import Optimization

CHANNELS = {"channels": 6, "latent_concat": 7, "token_replace": 3, "optional": 7}
WORDS = ["a", "red", "green", "blue", "square", "disc", "triangle", "moves", "left", "right", "up", "down"]


class Recorder(nn.Module):
    """Network that records its inputs and predicts the exact flow of ``clip``, except in the first frame."""

    out_channels, text_dim, pooled_dim, patch_size = 3, 8, 0, (1, 4, 4)
    embedded_guidance, causal_chunk = False, 0

    def __init__(self, image_condition: str, clip: Tensor | None = None):
        super().__init__()
        self.image_condition, self.in_channels, self.clip = image_condition, CHANNELS[image_condition], clip
        self.image_dropout = {"channels": 0.05, "optional": 0.7}.get(image_condition, 0.0)
        self.weight = nn.Parameter(torch.zeros(1))
        self.seen: list[Tensor] = []

    def check_size(self, size: tuple[int, int, int]) -> None:
        """Accepts any size."""

    def forward(self, latents, time, text, mask, pooled, guidance, cache, first_frame):
        self.seen.append(latents.detach())
        if self.clip is None:
            return latents[:, :3] * self.weight
        flow = (latents[:, :3] - self.clip) / (time / 1000).view(-1, 1, 1, 1, 1)
        flow[:, :, 0] = 100.0
        return flow + self.weight


def recording(kind: str, clip: Tensor | None = None, **changes) -> tuple[Diffusion, Recorder]:
    recorder = Recorder(kind, clip)
    return task(TextToVideo(recorder, WordText(8, 8, WORDS), Pixels()), **changes), recorder


def cogvideox(seed: int = 0) -> TextToVideo:
    torch.manual_seed(seed)
    transformer = CogVideoX(
        num_heads=2, head_dim=16, depth=1, in_channels=6, out_channels=3, text_dim=8, text_len=8, time_dim=16,
        patch_size=8, num_frames=8, height=16, width=16, positions="rope",
    )  # fmt: skip
    return TextToVideo(transformer, WordText(8, 8), Pixels())


def task(network: TextToVideo, **changes) -> Diffusion:
    optimization = Optimization(partial(torch.optim.AdamW, lr=3e-3), constant)
    parts = {"objective": FlowMatching(), "timesteps": UniformTimesteps(), "sampler": DDIM(2), "guidance": NoGuidance()}
    module = Diffusion(network, optimization, **{**parts, **changes})
    module.trainer = lightning.Trainer(logger=False, accelerator="cpu", enable_checkpointing=False)
    return module


def data() -> DataModule:
    return DataModule(MovingShapes("train", 1, 12), MovingShapes("val", 1, 12), batch_size=12)


def batch(size: int = 4) -> dict:
    clips = [MovingShapes("train", 1)[index] for index in range(size)]
    video = torch.stack([clip["video"] for clip in clips]).transpose(1, 2).contiguous().float() / 255
    return {"video": video, "id": [clip["id"] for clip in clips], "caption": [clip["caption"] for clip in clips]}


def image_of(kind: str, latents: Tensor) -> Tensor:
    """Returns the first frame (B, 3, H, W) that a network was conditioned on."""
    return (latents if kind == "token_replace" else latents[:, 3:6])[:, :, 0]


@pytest.mark.parametrize("kind", CHANNELS)
def test_image_noise_and_dropout_are_applied_in_training_only(kind: str):
    module, recorder = recording(kind, image_noise=ImageNoise(), image_dropout=0.5)
    clips = batch(36)
    clean = clips["video"][:, :, 0] * 2 - 1
    torch.manual_seed(0)
    module.shared_step(clips, "train")
    images = image_of(kind, recorder.seen.pop())
    dropped = (images == 0).flatten(1).all(dim=1)
    assert 8 <= int(dropped.sum()) <= 28, "some, within one batch"
    noise = (images - clean)[~dropped].flatten(1).std(dim=1)
    assert ((noise > 0.005) & (noise < 0.4)).all()
    assert noise.std() > 0.005, "independent for each clip"
    for stage in ("val", "test"):
        module.shared_step(clips, stage)
        assert all(torch.equal(image_of(kind, latents), clean) for latents in recorder.seen)


def test_the_mask_channel_is_dropped_with_the_image():
    module, recorder = recording("optional", image_dropout=0.5)
    torch.manual_seed(0)
    module.shared_step(batch(36), "train")
    seen = recorder.seen.pop()
    dropped = (image_of("optional", seen) == 0).flatten(1).all(dim=1)
    marks = seen[:, 6].flatten(2)
    assert (marks[~dropped, 0] == 1).all()
    assert not marks[:, 1:].any()
    assert not marks[dropped].any()
    assert 0 < int(dropped.sum()) < 36


@pytest.mark.parametrize(("dropout", "conditioned"), [(None, True), (1.0, False)])
def test_an_optional_image_is_used_unless_dropout_is_one(dropout: float | None, conditioned: bool):
    module, recorder = recording("optional", image_dropout=dropout)
    torch.manual_seed(0)
    for stage in ("train", "val"):
        module.shared_step(batch(36), stage)
        assert all(bool(latents[:, 3:].any()) == conditioned for latents in recorder.seen)
        recorder.seen.clear()


def test_image_settings_draw_no_random_numbers_without_an_image():
    losses = []
    for changes in ({}, {"image_noise": ImageNoise(), "image_dropout": 0.5}):
        recorder = Recorder("optional")
        recorder.image_condition, recorder.in_channels = None, 3
        module = task(TextToVideo(recorder, WordText(8, 8, WORDS), Pixels()), **changes)
        torch.manual_seed(0)
        losses.append(module.shared_step(batch(), "train")["loss"].item())
    assert losses[0] == losses[1]


@pytest.mark.parametrize("kind", ["token_replace", "channels"])
def test_only_token_replace_excludes_the_first_frame_from_losses(kind: str):
    """The network is exact except in the first frame."""
    clips = batch(1)
    module, _ = recording(kind, clips["video"] * 2 - 1, caption_dropout=0.0, image_dropout=0.0)
    torch.manual_seed(0)
    values = [module.shared_step(clips, "train")["loss"]]
    held_out = module.shared_step(clips, "val")
    values += [held_out[name] for name in held_out if "trivial" not in name]
    assert len(values) > 10
    for value in values:
        assert (value < 1e-6) == (kind == "token_replace")


def test_validation_losses_of_image_to_video_are_deterministic(trainer):
    module, found = task(cogvideox(), image_noise=ImageNoise()), []
    for seed in (1, 2):
        torch.manual_seed(seed)
        fit = trainer()
        fit.validate(module, data(), verbose=False)
        found.append({name: value.item() for name, value in fit.callback_metrics.items()})
    assert found[0] == found[1]
    assert found[0]["val/loss"] > 0


def test_image_to_video_trains_and_writes_media(tmp_path: Path, trainer):
    module = task(cogvideox(), image_noise=ImageNoise(), num_pictures=3)
    assert module.image_dropout == 0.05
    before = {name: value.detach().clone() for name, value in module.named_parameters()}
    trainer(Media(), max_steps=4).fit(module, datamodule=data())
    assert [name for name, value in module.named_parameters() if torch.equal(value, before[name])] == []
    assert list((tmp_path / "media").glob("samples_from_image_*.gif"))
    shown = module.media(batch())
    assert list(shown) == ["samples_from_image"]
    assert shown["samples_from_image"].shape == (8, 3, 3 * 17, 17)
    torch.rand(5)
    assert torch.equal(shown["samples_from_image"], module.media(batch())["samples_from_image"])
    flipped = {**batch(), "video": batch()["video"].flip(0)}
    assert not torch.equal(shown["samples_from_image"], module.media(flipped)["samples_from_image"])


def test_samples_in_media_start_with_the_first_frames_of_the_batch():
    module, _ = recording("token_replace", prompts=["a red disc moves up"] * 9)
    module._latent_size = (8, 16, 16)
    shown = module.media(batch(2))["samples_from_image"]
    assert shown.shape == (8, 3, 2 * 17, 17), "one image per clip"
    first = shown[0].unflatten(1, (2, 17))[:, :, :16, :16].transpose(0, 1).float() / 255
    torch.testing.assert_close(first, batch(2)["video"][:, :, 0])


def test_media_of_an_optional_image_has_both_modes():
    module, recorder = recording("optional")
    module._latent_size = (8, 16, 16)
    assert list(module.media(batch())) == ["samples", "samples_from_image"]
    marks = [bool(latents[:, 6].any()) for latents in recorder.seen]
    assert marks == [False] * 2 + [True] * 2
    module, _ = recording("optional", image_dropout=1.0)
    module._latent_size = (8, 16, 16)
    assert list(module.media(batch())) == ["samples"]


def stored(folder: Path, autoencoder: Autoencoder | None = None) -> DataModule:
    for split in ("train", "val"):
        write_latents(MovingShapes(split, 1, 12), autoencoder or Pixels(), None, folder / split, shard_size=12)
    return DataModule(LatentClips(folder / "train"), LatentClips(folder / "val"), 4)


def test_image_noise_on_stored_latents_raises_before_training(tmp_path: Path, trainer):
    clips = stored(tmp_path)
    module, recorder = recording("channels", image_noise=ImageNoise())
    with pytest.raises(ValueError, match=r"(?s)(?=.*task\.image_noise=null)(?=.*data=latents)"):
        trainer().fit(module, datamodule=clips)
    assert recorder.seen == []
    module, recorder = recording("channels", num_pictures=2)
    trainer(max_steps=1).fit(module, datamodule=clips)
    assert recorder.seen
    moments = torch.stack([clips.val[index]["moments"] for index in range(2)])
    shown = module.media({"video": moments, "moments": moments, "id": ["a", "b"], "caption": ["a disc"] * 2})
    assert shown["samples_from_image"].shape == (8, 3, 2 * 17, 17)


class Spanning(Pixels):
    """Autoencoder with norms over all frames of a clip."""

    first_frame_alone = False


class WithImages(LatentClips):
    """Stored latents with the latents of the first frame encoded separately."""

    def __getitem__(self, index: int) -> dict:
        return {**super().__getitem__(index), "image_moments": torch.full((6, 1, 16, 16), -0.5)}


def test_stored_latents_without_image_moments_raise_before_training(tmp_path: Path, trainer):
    stored(tmp_path, Spanning())
    recorder = Recorder("channels")
    module = task(TextToVideo(recorder, WordText(8, 8, WORDS), Spanning()), image_dropout=0.0, num_pictures=2)
    for clips, raises in ((LatentClips, True), (WithImages, False)):
        data = DataModule(clips(tmp_path / "train"), clips(tmp_path / "val"), 4)
        fit = trainer(max_steps=1)
        if raises:
            with pytest.raises(ValueError, match=r"(?s)image_moments\b.*make latents"):
                fit.fit(module, datamodule=data)
            assert recorder.seen == []
        else:
            fit.fit(module, datamodule=data)
    assert recorder.seen
    assert all(abs(image_of("channels", latents).mean() + 0.5) < 0.1 for latents in recorder.seen)


@pytest.mark.parametrize("share", [-0.1, 1.5])
def test_image_dropout_out_of_range_raises(share: float):
    with pytest.raises(ValueError, match=rf"task\.image_dropout={share}"):
        recording("channels", image_dropout=share)
