"""Conversion of losses between objectives: timesteps of noise shares, and the factor between the errors."""

import pytest
import torch

from blueberry_video.diffusion.objectives import AddedNoise, FlowMatching, VPrediction
from blueberry_video.nn.noise_share import flow_error_factor, times_of_shares

SHARES = torch.linspace(0.1, 1, 200)


@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_times_have_the_given_noise_shares(shift: float):
    objective = VPrediction(snr_shift=shift)
    signal, noise = objective.levels(times_of_shares(objective, SHARES))
    torch.testing.assert_close(noise / (signal + noise), SHARES, rtol=0, atol=4e-3)  # 1000 steps, coarse at the start


def test_shares_outside_the_schedule_are_clamped():
    objective = VPrediction()
    assert times_of_shares(objective, torch.tensor([0.0, 1.0])).tolist() == pytest.approx([0.001, 1.0])


def test_conversion_of_flow_matching_is_the_identity():
    assert torch.equal(times_of_shares(FlowMatching(), SHARES), SHARES)
    assert torch.equal(flow_error_factor(FlowMatching(), SHARES), torch.ones_like(SHARES))


def test_factor_converts_the_error_of_v_prediction_to_that_of_the_flow():
    """The flow error compares noise - clean, computed from the output for the same latents, with the true value."""
    objective, t = VPrediction(), torch.tensor([0.1, 0.5, 0.9, 1.0])
    clean, noise = torch.randn(2, 4, 3, 2, 2, 2, dtype=torch.float64)
    noisy = objective.noisy(clean, noise, t)
    output = objective.target(clean, noise, t) + torch.randn_like(clean)
    velocity = objective.to_noise(output, noisy, t) - objective.to_clean(output, noisy, t)
    error = (velocity - (noise - clean)).square().flatten(1).mean(1)
    own = (output - objective.target(clean, noise, t)).square().flatten(1).mean(1)
    torch.testing.assert_close(own * flow_error_factor(objective, t), error, rtol=1e-5, atol=1e-6)


def test_added_noise_ignores_the_time_and_inverts():
    objective, t = AddedNoise(), torch.tensor([0.2, 0.9])
    clean, noise = torch.randn(2, 2, 3, 2, 2, 2)
    noisy = objective.noisy(clean, noise, t)
    assert torch.equal(noisy, clean + noise)
    assert objective.network_time(t).tolist() == [0, 0]
    torch.testing.assert_close(objective.to_clean(noise, noisy, t), clean)
    assert torch.equal(objective.target(clean, noise, t), objective.to_noise(noise, noisy, t))
