"""Objectives: parity of schedules with diffusers, equality with the published loss, precision with bfloat16."""

import re

import pytest
import torch
from diffusers import CogVideoXDDIMScheduler, FlowMatchEulerDiscreteScheduler
from torch import Tensor

from blueberry_video.diffusion.objectives import FlowMatching, Objective, VPrediction

STEPS = (torch.arange(1000) + 1) / 1000  # the timesteps of the published steps
OBJECTIVES = [VPrediction(), VPrediction(snr_shift=1.0), FlowMatching()]
SHAPE = (3, 2, 4, 5, 6)  # B, C, T, H, W


def scheduler(snr_shift: float = 3.0, zero: bool = True) -> CogVideoXDDIMScheduler:
    return CogVideoXDDIMScheduler(
        snr_shift_scale=snr_shift,
        rescale_betas_zero_snr=zero,
        prediction_type="v_prediction",
        timestep_spacing="trailing",
        clip_sample=False,
    )


def draw(dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    return torch.randn(SHAPE).to(dtype), torch.randn(SHAPE).to(dtype)


@pytest.mark.parametrize("snr_shift", [1.0, 3.0])
@pytest.mark.parametrize("zero", [True, False])
def test_noise_levels_equal_diffusers(snr_shift: float, zero: bool):
    signal, noise = VPrediction(snr_shift=snr_shift, zero_terminal_snr=zero).alpha_sigma(STEPS)
    power = scheduler(snr_shift, zero).alphas_cumprod
    assert signal.dtype == noise.dtype == torch.float32
    torch.testing.assert_close(signal, power.sqrt().float(), rtol=1e-6, atol=0)
    torch.testing.assert_close(noise, (1 - power).sqrt().float(), rtol=1e-6, atol=0)
    assert (signal[-1] == 0) == zero


def test_noisy_latents_and_velocities_equal_diffusers():
    (clean, noise), steps = draw(), torch.tensor([0, 500, 999])
    objective, t = VPrediction(), STEPS[steps]
    torch.testing.assert_close(objective.noisy(clean, noise, t), scheduler().add_noise(clean, noise, steps))
    torch.testing.assert_close(objective.target(clean, noise, t), scheduler().get_velocity(clean, noise, steps))
    assert objective.network_timestep(t).tolist() == steps.tolist()


def test_flow_equals_diffusers():
    clean, noise = draw()
    peer = FlowMatchEulerDiscreteScheduler(shift=7.0)
    t = peer.sigmas[[10, 500, 990]]
    expected = peer.scale_noise(clean, peer.timesteps[[10, 500, 990]], noise)
    torch.testing.assert_close(FlowMatching().noisy(clean, noise, t), expected)
    torch.testing.assert_close(FlowMatching().network_timestep(t), peer.timesteps[[10, 500, 990]])


def test_timestep_of_a_flow_is_not_rounded():
    assert FlowMatching().network_timestep(torch.tensor([0.12345])).item() == pytest.approx(123.45)


@pytest.mark.parametrize("t", [0.001, 0.02, 0.5, 0.999, 1.0])
def test_published_loss_equals_the_error_of_the_velocity(t: float):
    (clean, noise), objective, timesteps = draw(torch.float64), VPrediction(), torch.full((3,), t)
    noisy, output = objective.noisy(clean, noise, timesteps), torch.randn(SHAPE, dtype=torch.float64)
    published = (objective.to_clean(output, noisy, timesteps) - clean).square() / (
        1 - objective.alpha_sigma(timesteps)[0][0] ** 2
    )
    velocity = (output - objective.target(clean, noise, timesteps)).square()
    torch.testing.assert_close(published, velocity, rtol=1e-3, atol=1e-3)
    assert published.mean().item() == pytest.approx(velocity.mean().item(), rel=1e-3 if t < 0.01 else 1e-5)


@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize("shape", [(3,), (3, 4)])
def test_target_recovers_clean_latents_and_noise(objective: Objective, shape: tuple[int, ...]):
    (clean, noise), t = draw(), torch.rand(shape)
    noisy, target = objective.noisy(clean, noise, t), objective.target(clean, noise, t)
    torch.testing.assert_close(objective.to_clean(target, noisy, t), clean, rtol=0, atol=1e-5)
    torch.testing.assert_close(objective.to_noise(target, noisy, t), noise, rtol=0, atol=1e-5)


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_timestep_0_is_clean_and_timestep_1_is_noise(objective: Objective):
    (clean, noise), (zero, one) = draw(), (torch.zeros(3), torch.ones(3))
    assert torch.equal(objective.noisy(clean, noise, zero), clean)
    assert torch.equal(objective.noisy(clean, noise, one), noise)
    assert objective.network_timestep(zero).tolist() == [0.0] * 3


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_timesteps_per_frame(objective: Objective):
    (clean, noise), t = draw(), torch.rand(3, 4)
    for name in ("noisy", "target", "to_clean", "to_noise"):
        whole = getattr(objective, name)(clean, noise, t)
        frames = [getattr(objective, name)(clean[:, :, [f]], noise[:, :, [f]], t[:, f]) for f in range(4)]
        assert torch.equal(whole, torch.cat(frames, dim=2))
    assert objective.network_timestep(t).shape == (3, 4)


def test_uniform_timesteps_are_uniform_over_steps():
    counts = VPrediction().network_timestep((torch.arange(10_000) + 0.5) / 10_000).long().bincount()
    assert counts.tolist() == [10] * 1000


@pytest.mark.parametrize("step", [1, 5, 20, 99])
def test_bfloat16_latents_lose_no_variance(step: int):
    clean, noise = torch.zeros(1, 1, 1, 100, 100, dtype=torch.bfloat16), torch.randn(1, 1, 1, 100, 100).bfloat16()
    expected = noise.float().var() * (1 - scheduler(snr_shift=1.0).alphas_cumprod[step])
    noisy = VPrediction(snr_shift=1.0).noisy(clean, noise, STEPS[[step]])
    assert noisy.dtype == torch.bfloat16
    wide = VPrediction(snr_shift=1.0).noisy(clean.float(), noise.float(), STEPS[[step]])
    assert torch.equal(noisy, wide.bfloat16()), "rounded more than once"
    assert (noisy.float().var() / expected).item() == pytest.approx(1, abs=0.01)
    if step == 5:  # noise levels that are rounded to bfloat16 change the variance
        theirs = scheduler(snr_shift=1.0).add_noise(clean, noise, torch.tensor([step])).float().var()
        assert abs((theirs / expected).item() - 1) > 0.1


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_targets_and_estimates_are_float32(objective: Objective):
    (clean, noise), t = draw(torch.bfloat16), torch.rand(3)
    for name in ("target", "to_clean", "to_noise"):
        assert getattr(objective, name)(clean, noise, t).dtype == torch.float32
        assert getattr(objective, name)(clean.double(), noise.double(), t).dtype == torch.float64


@pytest.mark.parametrize("shape", [(), (2,), (3, 5), (3, 4, 1)])
def test_timesteps_of_invalid_shape_raise(shape: tuple[int, ...]):
    clean, noise = draw()
    with pytest.raises(ValueError, match=rf"{re.escape(str(shape))}.*\(3, 2, 4, 5, 6\).*\(B,\).*\(B, T\)"):
        FlowMatching().noisy(clean, noise, torch.rand(shape))


def test_noise_of_mismatched_shape_raises():
    clean, noise = draw()
    with pytest.raises(ValueError, match=r"noise.*\(3, 2, 1, 5, 6\).*\(3, 2, 4, 5, 6\)"):
        FlowMatching().noisy(clean, noise[:, :, :1], torch.rand(3))


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"num_steps": 1}, r"num_steps=1\b"),
        ({"beta_start": 0.0}, r"beta_start=0\.0\b.*beta_end=0\.012\b"),
        ({"beta_end": 0.0001}, r"beta_start=0\.00085\b.*beta_end=0\.0001\b"),
        ({"snr_shift": 0.0}, r"snr_shift=0\.0\b"),
    ],
)
def test_invalid_schedules_raise(options: dict, text: str):
    with pytest.raises(ValueError, match=text):
        VPrediction(**options)


def test_the_schedule_has_values_if_it_is_built_under_the_meta_device():
    with torch.device("meta"):
        built = VPrediction()
    t = torch.linspace(0, 1, 11)
    for made, expected in zip(built.alpha_sigma(t), VPrediction().alpha_sigma(t), strict=True):
        assert torch.equal(made, expected)
