"""Timestep samplers: stratification, independence of frames, and the published shifts."""

import math

import pytest
import torch

from blueberry_video.config.signatures import signature
from blueberry_video.diffusion.timesteps import (
    LogitNormalTimesteps,
    TimestepSampler,
    TokenShift,
    UniformTimesteps,
    shift_timesteps,
)

SAMPLERS = [
    UniformTimesteps(),
    UniformTimesteps(shift=3.0),
    LogitNormalTimesteps(),
    LogitNormalTimesteps(0.5, 2.0, shift=7.0),
]


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_timesteps_have_the_given_shape_and_are_in_0_1(sampler: TimestepSampler):
    for timesteps, shape in ((sampler(7), (7,)), (sampler(7, 5), (7, 5))):
        assert timesteps.shape == shape
        assert timesteps.dtype == torch.float32
        assert timesteps.min() >= 0
        assert timesteps.max() <= 1


@pytest.mark.parametrize("world_size", [1, 3, 8])
@pytest.mark.parametrize("batch_size", [1, 5])
def test_strata_of_all_ranks_partition_0_1(world_size: int, batch_size: int):
    sampler, count = UniformTimesteps(stratified=True), world_size * batch_size
    drawn = [sampler(batch_size, rank=rank, world_size=world_size) for rank in range(world_size)]
    for rank, timesteps in enumerate(drawn):
        assert ((timesteps * world_size).floor() == rank).all(), "outside the slice of the rank"
    assert (torch.cat(drawn) * count).floor().tolist() == list(range(count))


def test_timesteps_within_a_slice_are_uniform():
    sampler = UniformTimesteps(stratified=True)
    within = torch.cat([sampler(4, rank=1, world_size=2) * 8 for _ in range(1000)]) % 1
    assert within.mean().item() == pytest.approx(0.5, abs=0.02)
    assert within.std().item() == pytest.approx(12**-0.5, abs=0.02)


def test_strata_of_a_logit_normal_have_equal_probability():
    normal = torch.distributions.Normal(0.3, 0.7)
    shares = normal.cdf(LogitNormalTimesteps(0.3, 0.7, stratified=True)(100).logit())
    assert (shares * 100 + 1e-3).floor().tolist() == pytest.approx(list(range(100)), abs=1)
    assert shares.diff().min() > 0


def test_logits_are_normal():
    logits = LogitNormalTimesteps(0.5, 2.0)(20_000).logit()
    assert logits.mean().item() == pytest.approx(0.5, abs=0.05)
    assert logits.std().item() == pytest.approx(2.0, abs=0.05)


def test_uniform_timesteps_are_uniform():
    timesteps = UniformTimesteps()(20_000).sort().values
    assert (timesteps - torch.linspace(0, 1, 20_000)).abs().max() < 0.02  # Kolmogorov-Smirnov


@pytest.mark.parametrize("sampler", [UniformTimesteps(), LogitNormalTimesteps()])
def test_timesteps_per_frame_are_independent(sampler: TimestepSampler):
    correlation = torch.corrcoef(sampler(5000, 4).T) - torch.eye(4)
    assert correlation.abs().max() < 0.06


@pytest.mark.parametrize("shift", [1.0, 3.0, 7.0])
def test_shift_divides_the_signal_to_noise_ratio_of_a_flow(shift: float):
    t = torch.linspace(0, 1, 11)
    shifted = shift_timesteps(t, shift)
    torch.testing.assert_close(shifted, torch.tensor([shift * u / (1 + (shift - 1) * u) for u in t.tolist()]))
    assert (shifted[0], shifted[-1]) == (0, 1)
    ratio = (1 / t[1:-1] - 1).square() / (1 / shifted[1:-1] - 1).square()
    torch.testing.assert_close(ratio, torch.full((9,), shift**2), rtol=1e-4, atol=0)
    generators = [torch.Generator().manual_seed(1) for _ in range(2)]
    plain, moved = (UniformTimesteps(shift=s)(50, generator=g) for s, g in zip((1.0, shift), generators))
    torch.testing.assert_close(moved, shift_timesteps(plain, shift))


def test_token_shift_grows_with_tokens_and_the_root_of_frames():
    shift = TokenShift()
    assert shift((1, 16, 16)) == pytest.approx(1)
    assert shift((1, 64, 64)) == pytest.approx(3)
    assert shift((9, 64, 64)) == pytest.approx(9)
    assert shift((4, 34, 64)) == pytest.approx(2 * (1 + 2 * (34 * 64 - 256) / 3840))
    generators = [torch.Generator().manual_seed(1) for _ in range(2)]
    by_tokens = UniformTimesteps(shift=shift)(50, grid=(9, 64, 64), generator=generators[0])
    assert torch.equal(by_tokens, UniformTimesteps(shift=shift((9, 64, 64)))(50, generator=generators[1]))


def test_timesteps_are_drawn_from_the_generator():
    first, second, other = (UniformTimesteps()(4, generator=torch.Generator().manual_seed(seed)) for seed in (1, 1, 2))
    assert torch.equal(first, second)
    assert not torch.equal(first, other)
    before = torch.get_rng_state()
    LogitNormalTimesteps()(4, 3, generator=torch.Generator())
    assert torch.equal(before, torch.get_rng_state())


def test_signature_of_a_sampler_lists_its_arguments():
    assert set(signature("blueberry_video.diffusion.timesteps.UniformTimesteps").parameters) == {"shift", "stratified"}


def test_bad_arguments_raise():
    with pytest.raises(ValueError, match=r"stratified=true.*false"):
        UniformTimesteps(stratified=True)(2, 3)
    with pytest.raises(ValueError, match=r"TokenShift.*grid"):
        UniformTimesteps(shift=TokenShift())(2)
    with pytest.raises(ValueError, match=r"shift=0\b"):
        UniformTimesteps(shift=0)
    with pytest.raises(ValueError, match=r"std=0\.0\b"):
        LogitNormalTimesteps(std=0.0)
    with pytest.raises(ValueError, match=r"low_tokens=4096\b.*high_tokens=4096\b"):
        TokenShift(low_tokens=4096)
    with pytest.raises(ValueError, match=r"shift=-0\.796\b.*2 x 2\b.*low_shift"):
        TokenShift(low_tokens=1000, low_shift=0.1, high_tokens=2000, high_shift=1.0)((1, 2, 2))
    assert math.isfinite(TokenShift()((1, 1, 1)))
