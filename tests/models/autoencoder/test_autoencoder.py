"""Autoencoder contract: legal sizes, sampling from moments, pixels as latents, fingerprints."""

import pytest
import torch
from torch import nn

from blueberry_video.models.autoencoder.base import Autoencoder, Pixels, fingerprint, sample


class Coarse(Autoencoder):
    """Autoencoder with a stride of (4, 8, 8) that returns its input."""

    def __init__(self, frame_step: int | None = None):
        super().__init__(channels=2, stride=(4, 8, 8), frame_step=frame_step)

    def encode(self, video):
        return video

    def decode(self, latents):
        return latents


def legal_sizes(value: str, multiple: int, numbers: str) -> str:
    """Pattern of an error with ``value``, the multiple, the class name and, in order, the numbers of the fix."""
    return rf"{value}\b(?=.*\b{multiple}\b)(?=.*Coarse)" + "".join(rf".*\b{number}\b" for number in numbers.split())


@pytest.mark.parametrize(("num_frames", "near"), [(2, "1 5"), (8, "9 5"), (48, "49 45"), (0, "1"), (-3, "1")])
def test_illegal_num_frames_raises_with_the_nearest_legal_ones(num_frames: int, near: str):
    with pytest.raises(ValueError, match=legal_sizes(f"num_frames={num_frames}", 4, near)):
        Coarse().check(num_frames, 16, 16)


@pytest.mark.parametrize(("step", "frames", "near"), [(8, 50, "49 57"), (16, 85, "81 97"), (8, 8, "9 1")])
def test_frame_step_can_exceed_the_stride(step: int, frames: int, near: str):
    with pytest.raises(ValueError, match=legal_sizes(f"num_frames={frames}", step, near)):
        Coarse(step).check(frames, 16, 16)
    Coarse(step).check(1 + 5 * step, 16, 16)
    with pytest.raises(ValueError, match=r"frame_step=6\b.*\b4\b"):
        Coarse(6)


def test_illegal_sizes_raise_with_the_nearest_legal_ones():
    with pytest.raises(ValueError, match=legal_sizes("height=484", 8, "480 488")):
        Coarse().check(5, 484, 720)
    with pytest.raises(ValueError, match=legal_sizes("width=728", 16, "8 2 720 736")):
        Coarse().check(5, 480, 728, patch_size=(2, 2))
    with pytest.raises(ValueError, match=legal_sizes("height=0", 8, "8")):
        Coarse().check(5, 0, 8)
    Coarse().check(1, 8, 16)
    assert Coarse().grid(49, 480, 720) == (13, 60, 90)


def test_pixels_are_their_own_latents():
    video = torch.rand(2, 3, 8, 6, 4) * 2 - 1
    autoencoder = Pixels()
    moments = autoencoder.encode(video)
    assert moments.shape == (2, 6, 8, 6, 4)
    for latents in (autoencoder.latents(moments), autoencoder.image_latents(moments)):
        assert torch.equal(latents, video)
    assert torch.equal(autoencoder.decode(video * 2), (video * 2).clamp(-1, 1))
    autoencoder.check(7, 5, 3)
    assert autoencoder.grid(7, 5, 3) == (7, 5, 3)


def test_samples_have_the_mean_and_variance_of_the_moments():
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


def test_fingerprint_changes_with_every_weight():
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


def test_fingerprint_changes_with_every_setting():
    pixels = Pixels()
    before = fingerprint(pixels)
    assert fingerprint(pixels.train()) == fingerprint(pixels.eval()) == before
    for key, value in {"channels": 4, "stride": (2, 1, 1), "template": "a video of {}", "scale": 0.5}.items():
        changed = Pixels()
        setattr(changed, key, value)
        assert fingerprint(changed) != before
