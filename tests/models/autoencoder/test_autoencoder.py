"""The codec contract: sizes, sampling, pixels as latents."""

import pytest
import torch
from torch import nn

from blueberry_video.models.autoencoder.base import Codec, Pixels, fingerprint, sample


class Coarse(Codec):
    """Only sizes."""

    def __init__(self, frame_step: int | None = None):
        super().__init__(channels=2, stride=(4, 8, 8), frame_step=frame_step)

    def encode(self, video):
        return video

    def decode(self, latents):
        return latents


@pytest.mark.parametrize(("num_frames", "near"), [(2, "1 or 5"), (8, "9 or 5"), (48, "49 or 45"), (0, "1"), (-3, "1")])
def test_illegal_frame_counts_are_told_the_nearest_legal_ones(num_frames: int, near: str):
    with pytest.raises(ValueError, match=rf"num_frames={num_frames} is not 1 \+ a multiple of 4, .* use {near}\.$"):
        Coarse().check(num_frames, 16, 16)


@pytest.mark.parametrize(("step", "frames", "near"), [(8, 50, "49 or 57"), (16, 85, "81 or 97"), (8, 8, "9 or 1")])
def test_a_published_network_may_count_in_larger_steps(step: int, frames: int, near: str):
    with pytest.raises(ValueError, match=f"multiple of {step}, .* use {near}"):
        Coarse(step).check(frames, 16, 16)
    Coarse(step).check(1 + 5 * step, 16, 16)
    with pytest.raises(ValueError, match="frame_step=6 is no multiple of the codec's stride in time: use 4"):
        Coarse(6)


def test_illegal_sizes_are_told_the_nearest_legal_ones():
    with pytest.raises(ValueError, match=r"height=484 is no multiple of 8, what a latent of Coarse covers: use 480 or"):
        Coarse().check(5, 484, 720)
    with pytest.raises(
        ValueError, match=r"width=728 is no multiple of 16, .* \(8 pixels\) times the patch .* \(2\): use 720 or 736"
    ):
        Coarse().check(5, 480, 728, patch_size=(2, 2))
    with pytest.raises(ValueError, match=r"height=0 is no multiple of 8, .* use 8\."):
        Coarse().check(5, 0, 8)
    Coarse().check(1, 8, 16)
    assert Coarse().grid(49, 480, 720) == (13, 60, 90)


def test_pixels_are_their_own_latents():
    video = torch.rand(2, 3, 8, 6, 4) * 2 - 1
    codec = Pixels()
    moments = codec.encode(video)
    assert moments.shape == (2, 6, 8, 6, 4)
    for latents in (codec.latents(moments), codec.image_latents(moments)):
        assert torch.equal(latents, video)
    assert torch.equal(codec.decode(video * 2), (video * 2).clamp(-1, 1))
    codec.check(7, 5, 3)
    assert codec.grid(7, 5, 3) == (7, 5, 3)


def test_samples_have_the_mean_and_the_variance_that_the_moments_say():
    moments = torch.cat([torch.full((1, 1, 10, 50, 50), 3.0), torch.full((1, 1, 10, 50, 50), 4.0).log()], dim=1)
    drawn = sample(moments)
    assert drawn.mean().item() == pytest.approx(3, abs=0.05)  # 3 deviations: 0.04
    assert drawn.std().item() == pytest.approx(2, abs=0.04)
    seeds = [torch.Generator().manual_seed(seed) for seed in (1, 1, 2)]
    first, again, other = (sample(moments, generator) for generator in seeds)
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert sample(moments.bfloat16()).dtype == torch.bfloat16
    assert torch.isfinite(sample(torch.full((1, 2, 1, 1, 1), 1e4))).all()


def test_a_fingerprint_changes_with_every_weight():
    module = nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2))
    before = fingerprint(module)
    assert before == fingerprint(module)
    assert len(before) == 16
    for value in module.state_dict().values():
        original = value.clone()
        value.view(-1)[0] += 1
        assert fingerprint(module) != before
        value.copy_(original)
    assert fingerprint(module) == before
    assert fingerprint(module.bfloat16()) != before


def test_a_fingerprint_changes_with_every_setting():
    pixels = Pixels()
    before = fingerprint(pixels)
    assert fingerprint(pixels.train()) == fingerprint(pixels.eval()) == before
    for key, value in {"channels": 4, "stride": (2, 1, 1), "template": "a video of {}", "scale": 0.5}.items():
        changed = Pixels()
        setattr(changed, key, value)
        assert fingerprint(changed) != before
