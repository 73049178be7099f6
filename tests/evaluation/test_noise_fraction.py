"""Noise fractions of objectives, and the error factor between an objective and a flow."""

import pytest
import torch

from blueberry_video.diffusion.objectives import AddedNoise, FlowMatching, VPrediction
from blueberry_video.evaluation.noise_fraction import flow_error_factor, timesteps_at_noise_fraction

FRACTIONS = torch.linspace(0.1, 1, 200)


@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_times_have_the_requested_noise_fraction(shift: float):
    objective = VPrediction(snr_shift=shift)
    signal, noise = objective.alpha_sigma(timesteps_at_noise_fraction(objective, FRACTIONS))
    torch.testing.assert_close(noise / (signal + noise), FRACTIONS, rtol=0, atol=4e-3)  # 1000 timesteps, coarse near 0


def test_fractions_outside_the_schedule_map_to_its_first_and_last_timestep():
    objective = VPrediction()
    assert timesteps_at_noise_fraction(objective, torch.tensor([0.0, 1.0])).tolist() == pytest.approx([0.001, 1.0])


def test_a_flow_is_not_converted():
    assert torch.equal(timesteps_at_noise_fraction(FlowMatching(), FRACTIONS), FRACTIONS)
    assert torch.equal(flow_error_factor(FlowMatching(), FRACTIONS), torch.ones_like(FRACTIONS))


def test_the_factor_converts_the_error_of_v_to_that_of_a_flow():
    """Compares the noise - clean implied by the output with the true one, on the same noisy latents up to scale."""
    objective, t = VPrediction(), torch.tensor([0.1, 0.5, 0.9, 1.0])
    clean, noise = torch.randn(2, 4, 3, 2, 2, 2, dtype=torch.float64)
    noisy = objective.noisy(clean, noise, t)
    output = objective.target(clean, noise, t) + torch.randn_like(clean)
    velocity = objective.to_noise(output, noisy, t) - objective.to_clean(output, noisy, t)
    error = (velocity - (noise - clean)).square().flatten(1).mean(1)
    own = (output - objective.target(clean, noise, t)).square().flatten(1).mean(1)
    torch.testing.assert_close(own * flow_error_factor(objective, t), error, rtol=1e-5, atol=1e-6)


def test_added_noise_ignores_time_and_inverts_its_noising():
    objective, t = AddedNoise(), torch.tensor([0.2, 0.9])
    clean, noise = torch.randn(2, 2, 3, 2, 2, 2)
    noisy = objective.noisy(clean, noise, t)
    assert torch.equal(noisy, clean + noise)
    assert objective.network_timestep(t).tolist() == [0, 0]
    torch.testing.assert_close(objective.to_clean(noise, noisy, t), clean)
    assert torch.equal(objective.target(clean, noise, t), objective.to_noise(noise, noisy, t))
