"""Sampling from partial noise: timesteps, noise and steps of the video-to-video pipeline of diffusers, errors."""

from types import SimpleNamespace

import pytest
import torch
from diffusers import CogVideoXDDIMScheduler, CogVideoXVideoToVideoPipeline
from torch import Tensor

from blueberry_video.diffusion.objectives import FlowMatching, Objective, VPrediction
from blueberry_video.diffusion.samplers import DDIM, DPMSolverSDE, FlowEuler, Sampler

SHAPE = (2, 3, 4, 5, 6)  # B, C, T, H, W


def network(noisy: Tensor, t: Tensor) -> Tensor:
    return torch.sin(2 * noisy + noisy.flip(4) + 3 * t.view(-1, 1, 1, 1, 1))


@pytest.mark.parametrize(
    ("steps", "strength"), [(50, 0.8), (20, 0.5), (100, 0.29), (50, 0.75), (10, 0.7), (25, 1.0), (25, 0.04)]
)
def test_samples_equal_those_of_diffusers_video_to_video(steps: int, strength: float):
    """The pipeline's own rule of timesteps, its scheduler's noise, and its DDIM steps."""
    scheduler = CogVideoXDDIMScheduler(
        prediction_type="v_prediction",
        timestep_spacing="trailing",
        rescale_betas_zero_snr=True,
        clip_sample=False,
        snr_shift_scale=3.0,
    )
    scheduler.set_timesteps(steps)
    pipeline = SimpleNamespace(scheduler=scheduler)
    rule = CogVideoXVideoToVideoPipeline.get_timesteps
    timesteps, taken = rule(pipeline, steps, scheduler.timesteps, strength, "cpu")
    generator = torch.Generator().manual_seed(0)
    clean, noise = torch.randn(SHAPE, generator=generator), torch.randn(SHAPE, generator=generator)
    latents = scheduler.add_noise(clean, noise, timesteps[:1].repeat(2))
    for timestep in timesteps:
        t = torch.full((2,), (int(timestep) + 1) / 1000)
        latents = scheduler.step(network(latents, t), timestep, latents, return_dict=False)[0]
    sampler, seen = DDIM(steps), []

    def counted(noisy: Tensor, t: Tensor) -> Tensor:
        seen.append(t)
        return network(noisy, t)

    sample = sampler(counted, noise, VPrediction(snr_shift=3.0), None, clean, strength)
    assert len(seen) == taken == steps - sampler.skipped_steps(strength)
    torch.testing.assert_close(sample, latents, rtol=2e-4, atol=2e-4)


@pytest.mark.parametrize(
    ("sampler", "objective"),
    [(DDIM(8), VPrediction()), (DPMSolverSDE(8), VPrediction()), (FlowEuler(8, 7.0), FlowMatching())],
)
def test_full_strength_is_pure_noise_and_a_small_one_stays_near_the_video(sampler: Sampler, objective: Objective):
    generator = torch.Generator().manual_seed(0)
    clean, noise = torch.randn(SHAPE, generator=generator), torch.randn(SHAPE, generator=generator)

    def sample(*start) -> Tensor:
        return sampler(network, noise, objective, torch.Generator().manual_seed(1), *start)

    torch.testing.assert_close(sample(clean, 1.0), sample(), rtol=0, atol=1e-5)
    inputs = []

    def recorded(noisy: Tensor, t: Tensor) -> Tensor:
        inputs.append((noisy, t))
        return network(noisy, t)

    sampler(recorded, noise, objective, torch.Generator().manual_seed(1), clean, 0.25)
    noisy, t = inputs[0]
    assert len(inputs) == 2
    alpha, sigma = (float(part) for part in objective.alpha_sigma(t[0]))
    assert 0 < sigma < 1
    torch.testing.assert_close(noisy, alpha * clean + sigma * noise, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("strength", "message"),
    [(0.0, r"strength=0\.0\b"), (1.1, r"strength=1\.1\b"), (0.09, r"strength=0\.09 of steps=10\b.*\b0\.1\b")],
)
def test_strength_out_of_range_raises(strength: float, message: str):
    noise = torch.zeros(SHAPE)
    with pytest.raises(ValueError, match=message):
        DDIM(10)(network, noise, FlowMatching(), None, noise, strength)
