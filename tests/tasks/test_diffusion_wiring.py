"""Diffusion task: every setting reaches the network, the noise and the samples; ranks draw different timesteps."""

from functools import partial
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn

from blueberry_video.data.moving_shapes import MovingShapes
from blueberry_video.diffusion.guidance import ConstantGuidance, EmbeddedGuidance, NoGuidance
from blueberry_video.diffusion.objectives import FlowMatching, VPrediction
from blueberry_video.diffusion.samplers import FlowEuler
from blueberry_video.diffusion.text_to_video import TextToVideo
from blueberry_video.diffusion.timesteps import LogitNormalTimesteps, TokenShift, UniformTimesteps
from blueberry_video.models.autoencoder.base import Pixels
from blueberry_video.models.text_encoder.words import WordText
from blueberry_video.optim import constant
from blueberry_video.tasks.diffusion import Diffusion
from blueberry_video.tasks.settings import Optimization

WORDS = ["a", "red", "green", "blue", "square", "disc", "triangle", "moves", "left", "right", "up", "down"]


class Recorder(nn.Module):
    """Network that records its inputs and predicts zero."""

    in_channels, out_channels, text_dim, pooled_dim, patch_size = 3, 3, 8, 0, (1, 4, 8)
    image_condition, image_dropout, embedded_guidance, causal_chunk = None, 0.0, False, 0

    def __init__(self, **shape):
        super().__init__()
        self.__dict__.update(shape)
        self.weight = nn.Parameter(torch.zeros(1))
        self.latents: list[Tensor] = []
        self.times: list[Tensor] = []
        self.texts: list[Tensor] = []

    def check_size(self, size: tuple[int, int, int]) -> None:
        """Accepts any size."""

    def forward(self, latents, time, text, mask, pooled, guidance, cache, first_frame):
        self.latents.append(latents.detach())
        self.times.append(time.detach())
        self.texts.append(text.detach())
        return latents * self.weight


def task(rank: int = 0, world_size: int = 1, shape: dict | None = None, **changes) -> tuple[Diffusion, Recorder]:
    torch.manual_seed(0)
    recorder = Recorder(**(shape or {}))
    parts = {"objective": FlowMatching(), "timesteps": UniformTimesteps(), "sampler": FlowEuler(2)}
    optimization = Optimization(partial(torch.optim.AdamW, lr=3e-3), constant)
    network = TextToVideo(recorder, WordText(8, 8, WORDS), Pixels())
    module = Diffusion(network, optimization, **{**parts, "guidance": NoGuidance(), **changes})
    module._trainer = SimpleNamespace(global_rank=rank, world_size=world_size)
    return module, recorder


def batch(size: int = 12) -> dict:
    clips = [MovingShapes("train", 1)[index] for index in range(size)]
    video = torch.stack([clip["video"] for clip in clips]).transpose(1, 2).contiguous().float() / 255
    return {"video": video, "id": [clip["id"] for clip in clips], "caption": [clip["caption"] for clip in clips]}


@pytest.mark.parametrize("share", [0.0, 0.3, 1.0])
def test_captions_are_dropped_in_training_alone_with_the_share_of_the_task(share: float):
    module, recorder = task(caption_dropout=share)
    clips = batch(36)
    own, empty = module.model.text(clips["caption"]).tokens, module.model.text.unconditional(36).tokens
    assert not torch.equal(own, empty)
    dropped = 0
    for _ in range(5):
        module.shared_step(clips, "train")
        tokens = recorder.texts.pop()
        is_own = (tokens == own).flatten(1).all(dim=1)
        is_empty = (tokens == empty).flatten(1).all(dim=1)
        assert (is_own ^ is_empty).all()
        dropped += int(is_empty.sum())
    assert abs(dropped / 180 - share) < 0.12
    assert (dropped in (0, 180)) == (share in (0.0, 1.0))
    for stage in ("val", "test"):
        module.shared_step(clips, stage)
        assert not any((tokens == empty).flatten(1).all(dim=1).any() for tokens in recorder.texts)


@pytest.mark.parametrize(("world_size", "batch_size"), [(1, 6), (2, 5), (3, 4)])
def test_stratified_timesteps_of_all_ranks_partition_the_unit_interval(world_size: int, batch_size: int):
    found = []
    for rank in range(world_size):
        module, _ = task(rank, world_size, timesteps=UniformTimesteps(stratified=True))
        found.append(module._timesteps_of(torch.zeros(batch_size, 3, 4, 16, 16)))
    strata = (torch.cat(found) * batch_size * world_size).long()
    assert strata.tolist() == list(range(batch_size * world_size))


def test_the_shift_of_timesteps_depends_on_the_patch_grid():
    """Patches of 1 x 4 x 8 in clips of 9 x 16 x 16: 4 x 2 tokens a frame; a shift of 2 for 8 tokens, times 3."""
    shift = TokenShift(4, 1.0, 12, 3.0)
    found = []
    for timesteps in (UniformTimesteps(shift), UniformTimesteps()):
        module, _ = task(timesteps=timesteps)
        torch.manual_seed(2)
        found.append(module._timesteps_of(torch.zeros(5, 3, 9, 16, 16)))
    torch.testing.assert_close(found[0], 6 * found[1] / (1 + 5 * found[1]))


@pytest.mark.parametrize("objective", [FlowMatching(), VPrediction()])
def test_the_network_receives_noisy_latents_at_their_timesteps(objective):
    """Logits of 2, so that timesteps are 0.88; the loss is that of the target."""
    module, recorder = task(objective=objective, timesteps=LogitNormalTimesteps(2.0, 1e-4), caption_dropout=0.0)
    clips = batch(4)
    torch.manual_seed(1)
    loss = module.shared_step(clips, "train")["loss"]
    torch.manual_seed(1)
    clean = clips["video"] * 2 - 1
    torch.randn_like(clean)  # the latents' distribution of std 0
    t = module._timesteps_of(clean)
    noise = torch.randn_like(clean)
    torch.testing.assert_close(t, torch.full((4,), 0.8808), atol=1e-3, rtol=0)
    torch.testing.assert_close(recorder.times[0], objective.network_timestep(t))
    torch.testing.assert_close(recorder.latents[0], objective.noisy(clean, noise, t))
    torch.testing.assert_close(loss, objective.target(clean, noise, t).square().mean())


def test_the_scale_and_the_steps_of_sampling_reach_the_network():
    module, recorder = task(sampler=FlowEuler(3, 1.0), guidance=ConstantGuidance(4.0))
    module._latent_size = (5, 16, 8)
    made = module.generate(batch(2)["caption"], torch.Generator().manual_seed(0))
    assert made.shape == (2, 3, 5, 16, 8)
    expected = [time for time in (1000, 2000 / 3, 1000 / 3) for _ in range(2)]
    assert [time[0].item() for time in recorder.times] == pytest.approx(expected)
    own, empty = module.model.text(batch(2)["caption"]).tokens, module.model.text.unconditional(2).tokens
    for tokens, expected in zip(recorder.texts, [empty, own] * 3, strict=True):
        assert torch.equal(tokens, expected)


def test_tokens_per_clip_of_unequal_patches_and_sizes():
    module, _ = task()
    assert module.tokens_per_clip({"video": torch.zeros(7, 3, 9, 16, 24)}) == 9 * 4 * 3
    assert module.tokens_per_clip({"video": torch.zeros(7, 3, 5, 18, 20)}) == 5 * 5 * 3  # the last patches are padded


def test_pictures_show_num_pictures_prompts_or_captions():
    for prompts, expected in ((None, 2), (["a red disc", "a blue square", "a red square"], 2), (["a red disc"], 1)):
        module, recorder = task(prompts=prompts, num_pictures=2, sampler=FlowEuler(1, 1.0))
        module._latent_size = (4, 8, 16)
        clips = batch(3)
        picture = module.media(clips)["samples"]
        assert picture.shape == (4, 3, expected * 9, 17)
        texts = module.model.text((prompts or clips["caption"])[:expected]).tokens
        assert torch.equal(recorder.texts[0], texts)


@pytest.mark.parametrize("scale", [1.5, 6.0])
def test_the_embedded_guidance_scale_reaches_training_and_validation(scale: float):
    module, recorder = task(shape={"embedded_guidance": True}, guidance=EmbeddedGuidance(scale))
    seen, forward = [], recorder.forward

    def recorded(*given):
        seen.append(given[5])
        return forward(*given)

    recorder.forward = recorded
    for stage in ("train", "val"):
        module.shared_step(batch(3), stage)
    assert len(seen) > 2
    assert {float(torch.as_tensor(value).flatten()[0]) for value in seen} in ({scale}, {1000 * scale})
