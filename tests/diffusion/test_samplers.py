"""Diffusion samplers: an oracle network recovers its clip, every step equals diffusers' schedulers, errors."""

import numpy as np
import pytest
import torch
from diffusers import CogVideoXDDIMScheduler, CogVideoXDPMScheduler, FlowMatchEulerDiscreteScheduler
from diffusers.schedulers import scheduling_dpm_cogvideox
from torch import Tensor

from blueberry_video.diffusion.objectives import FlowMatching, Objective, VPrediction, over_latents
from blueberry_video.diffusion.samplers import DDIM, DPMSolverSDE, FlowEuler, Network, Sampler

SHAPE = (2, 3, 4, 5, 6)  # B, C, T, H, W
PAIRS = [
    (DDIM, VPrediction()),
    (DPMSolverSDE, VPrediction()),
    (DDIM, FlowMatching()),
    (DPMSolverSDE, FlowMatching()),
    (FlowEuler, FlowMatching()),
]
PUBLISHED = {
    "prediction_type": "v_prediction",
    "timestep_spacing": "trailing",
    "rescale_betas_zero_snr": True,
    "clip_sample": False,
}


def oracle(clean: Tensor, objective: Objective) -> Network:
    """Network with the exact output for the clip ``clean``."""

    def denoise(noisy: Tensor, t: Tensor) -> Tensor:
        signal, level = objective.alpha_sigma(over_latents(t, noisy))
        return objective.target(clean, (noisy - signal * clean) / level, t)

    return denoise


def some_network(noisy: Tensor, t: Tensor) -> Tensor:
    """Smooth nonlinear network with an output that depends on timestep and position."""
    return torch.sin(2 * noisy + noisy.flip(4) + 3 * t.view(-1, 1, 1, 1, 1))


def trajectory(
    sampler: Sampler, noise: Tensor, objective: Objective, generator: torch.Generator | None = None
) -> list[Tensor]:
    """Inputs of the network in every step, followed by the sample: steps + 1 tensors."""
    inputs = []

    def network(noisy: Tensor, t: Tensor) -> Tensor:
        inputs.append(noisy)
        return some_network(noisy, t)

    sample = sampler(network, noise, objective, generator)
    return [*inputs, sample]


@pytest.mark.parametrize(("sampler", "objective"), PAIRS)
@pytest.mark.parametrize("steps", [1, 2, 7, 30, 50, 333])
def test_oracle_recovers_its_clip(sampler: type[Sampler], objective: Objective, steps: int):
    clean = torch.rand(SHAPE) * 2 - 1
    sample = sampler(steps)(oracle(clean, objective), torch.randn(SHAPE), objective)
    torch.testing.assert_close(sample, clean, rtol=0, atol=1e-4)


def test_oracle_recovers_its_clip_in_all_1000_steps():
    clean, objective = torch.rand(SHAPE) * 2 - 1, VPrediction(snr_shift=1.0)
    for sampler in (DDIM(1000), DPMSolverSDE(1000)):
        sample = sampler(oracle(clean, objective), torch.randn(SHAPE), objective)
        torch.testing.assert_close(sample, clean, rtol=0, atol=1e-4)


@pytest.mark.parametrize("steps", [1, 8, 50])
@pytest.mark.parametrize("snr_shift", [1.0, 3.0])
def test_ddim_steps_equal_diffusers(steps: int, snr_shift: float):
    scheduler = CogVideoXDDIMScheduler(snr_shift_scale=snr_shift, **PUBLISHED)
    scheduler.set_timesteps(steps)
    objective = VPrediction(snr_shift=snr_shift)
    timesteps = DDIM(steps).timesteps(objective)
    assert objective.network_timestep(timesteps[:-1]).tolist() == scheduler.timesteps.tolist()
    path = trajectory(DDIM(steps), torch.randn(SHAPE), objective)
    for i, step in enumerate(scheduler.timesteps):
        output = some_network(path[i], timesteps[i].expand(2))
        expected = scheduler.step(output, step, path[i], return_dict=False)[0]
        torch.testing.assert_close(path[i + 1], expected, rtol=0, atol=5e-6)


@pytest.mark.parametrize("steps", [1, 2, 8, 50])
def test_dpm_solver_steps_equal_diffusers(steps: int, monkeypatch: pytest.MonkeyPatch):
    scheduler = CogVideoXDPMScheduler(**PUBLISHED)
    scheduler.set_timesteps(steps)
    timesteps = DPMSolverSDE(steps).timesteps(VPrediction())
    path = trajectory(DPMSolverSDE(steps), torch.randn(SHAPE), VPrediction(), torch.Generator().manual_seed(3))
    generator, before = torch.Generator().manual_seed(3), None
    for i, step in enumerate(scheduler.timesteps):
        drawn = torch.randn(SHAPE, generator=generator)
        monkeypatch.setattr(scheduling_dpm_cogvideox, "randn_tensor", lambda *_, noise=drawn, **__: noise)
        output = some_network(path[i], timesteps[i].expand(2))
        back = scheduler.timesteps[i - 1] if i else None
        expected, before = scheduler.step(output, before, step, back, path[i], return_dict=False)
        torch.testing.assert_close(path[i + 1], expected, rtol=0, atol=5e-6)


@pytest.mark.parametrize("steps", [1, 7, 50])
@pytest.mark.parametrize("shift", [1.0, 7.0])
def test_flow_euler_steps_equal_diffusers(steps: int, shift: float):
    scheduler = FlowMatchEulerDiscreteScheduler(shift=shift)
    scheduler.set_timesteps(sigmas=np.linspace(1.0, 0.0, steps + 1)[:-1])
    timesteps = FlowEuler(steps, shift).timesteps(FlowMatching())
    torch.testing.assert_close(timesteps, scheduler.sigmas, rtol=0, atol=1e-6)
    torch.testing.assert_close(FlowMatching().network_timestep(timesteps[:-1]), scheduler.timesteps, rtol=1e-6, atol=0)
    path = trajectory(FlowEuler(steps, shift), torch.randn(SHAPE), FlowMatching())
    for i, step in enumerate(scheduler.timesteps):
        output = some_network(path[i], timesteps[i].expand(2))
        expected = scheduler.step(output, step, path[i], return_dict=False)[0]
        torch.testing.assert_close(path[i + 1], expected, rtol=0, atol=5e-6)


def test_the_shift_is_applied_once():
    assert FlowEuler(50, shift=7.0).timesteps(FlowMatching())[-2].item() == pytest.approx(0.125)
    twice = FlowMatchEulerDiscreteScheduler(shift=7.0)
    twice.set_timesteps(50)
    assert twice.sigmas[-2].item() < 0.06


def test_ddim_of_a_flow_equals_euler():
    noise = torch.randn(SHAPE)
    first, second = (
        sampler(some_network, noise, FlowMatching()) for sampler in (DDIM(9, shift=3.0), FlowEuler(9, shift=3.0))
    )
    torch.testing.assert_close(first, second, rtol=0, atol=1e-5)


@pytest.mark.parametrize("steps", [7, 30, 999])
def test_any_number_of_steps_ends_at_the_clean_latents(steps: int):
    """diffusers has the same timesteps if they do not divide 1000, but its last step may end at noisy latents."""
    scheduler = CogVideoXDDIMScheduler(**PUBLISHED)
    scheduler.set_timesteps(steps)
    timesteps = DDIM(steps).timesteps(VPrediction())
    assert VPrediction().network_timestep(timesteps[:-1]).tolist() == scheduler.timesteps.tolist()
    assert timesteps[-1] == 0


@pytest.mark.parametrize(
    ("steps", "snr_shift", "largest"), [(50, 3.0, 1.02e-3), (10, 3.0, 5.68e-3), (50, 1.0, 6.2e-4), (10, 1.0, 3.9e-3)]
)
def test_signal_of_sat_is_larger_by_the_documented_difference(steps: int, snr_shift: float, largest: float):
    """SAT takes every k-th step of the schedule first, and then rescales to zero terminal SNR; here, as in diffusers,
    the training schedule is rescaled once."""
    betas = np.linspace(0.00085**0.5, 0.012**0.5, 1000) ** 2
    power = np.cumprod(1 - betas)
    signal = np.sqrt(power / (snr_shift + (1 - snr_shift) * power))
    chosen = signal[np.linspace(999, 0, steps, endpoint=False).astype(int)]  # from noise to the last step
    sat = (chosen - chosen[0]) * chosen[-1] / (chosen[-1] - chosen[0])

    objective = VPrediction(snr_shift=snr_shift)
    alpha, _ = objective.alpha_sigma(DDIM(steps).timesteps(objective)[:-1])
    difference = sat - alpha.double().numpy()
    assert difference.max() == pytest.approx(largest, rel=0.01)
    assert difference.argmax() == steps - 1
    assert difference.min() > -1e-6


def test_dpm_solver_draws_from_the_generator():
    noise = torch.randn(SHAPE)
    first, second, other = (
        DPMSolverSDE(5)(some_network, noise, VPrediction(), torch.Generator().manual_seed(seed)) for seed in (1, 1, 2)
    )
    assert torch.equal(first, second)
    assert not torch.equal(first, other)


@pytest.mark.parametrize(("sampler", "objective"), PAIRS)
def test_latents_and_network_inputs_keep_their_dtype(sampler: type[Sampler], objective: Objective):
    inputs = set()

    def network(noisy: Tensor, t: Tensor) -> Tensor:
        inputs.add((noisy.dtype, t.dtype, tuple(t.shape)))
        return some_network(noisy, t).to(noisy.dtype)

    sample = sampler(4)(network, torch.randn(SHAPE).bfloat16(), objective)
    assert sample.dtype == torch.bfloat16
    assert inputs == {(torch.bfloat16, torch.float32, (2,))}


@pytest.mark.parametrize("sampler", [DDIM, DPMSolverSDE, FlowEuler])
def test_invalid_settings_raise(sampler: type[Sampler]):
    with pytest.raises(ValueError, match=r"steps=0\b"):
        sampler(steps=0)
    with pytest.raises(ValueError, match=r"shift=-1\.0\b"):
        sampler(shift=-1.0)


@pytest.mark.parametrize(("sampler", "objective"), PAIRS)
def test_bad_input_raises(sampler: type[Sampler], objective: Objective):
    noise = torch.randn(SHAPE)
    with pytest.raises(ValueError, match=r"noise.*\(3, 4, 5, 6\).*\(B, C, T, H, W\)"):
        sampler(3)(some_network, noise[0], objective)
    with pytest.raises(ValueError, match=r"noise.*\(2, 3, 4, 5, 6\).*finite"):
        sampler(3)(some_network, noise / 0, objective)
    with pytest.raises(ValueError, match=r"network.*\(2, 3, 1, 5, 6\).*\(2, 3, 4, 5, 6\)"):
        sampler(3)(lambda noisy, t: noisy[:, :, :1], noise, objective)
    with pytest.raises(FloatingPointError, match=r"bf16.*fp32"):
        sampler(3)(lambda noisy, t: noisy * torch.nan, noise, objective)


def test_incompatible_objective_or_steps_raise():
    with pytest.raises(ValueError, match=r"FlowEuler.*VPrediction.*DDIM.*DPMSolverSDE"):
        FlowEuler(3)(some_network, torch.randn(SHAPE), VPrediction())
    with pytest.raises(ValueError, match=r"steps=1001\b.*shift=1\.0"):
        DDIM(1001)(some_network, torch.randn(SHAPE), VPrediction())
