"""Losses of one objective in the unit of another: shares of noise, and the factor between the errors."""

import pytest
import torch

from blueberry_video.evaluation.noise_fraction import flow_error_factor, times_at_noise_fraction
from blueberry_video.nn.added_noise import AddedNoise
from blueberry_video.nn.objectives import FlowMatching, VPrediction

SHARES = torch.linspace(0.1, 1, 200)


@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_the_time_has_the_share_that_was_asked_for(shift: float):
    objective = VPrediction(snr_shift=shift)
    signal, noise = objective.levels(times_at_noise_fraction(objective, SHARES))
    torch.testing.assert_close(noise / (signal + noise), SHARES, rtol=0, atol=4e-3)  # 1000 steps, coarse at the first


def test_shares_that_the_schedule_does_not_have_become_its_first_and_last_step():
    objective = VPrediction()
    assert times_at_noise_fraction(objective, torch.tensor([0.0, 1.0])).tolist() == pytest.approx([0.001, 1.0])


def test_a_flow_needs_no_conversion():
    assert torch.equal(times_at_noise_fraction(FlowMatching(), SHARES), SHARES)
    assert torch.equal(flow_error_factor(FlowMatching(), SHARES), torch.ones_like(SHARES))


def test_the_factor_turns_the_error_of_v_into_that_of_the_flow():
    """Of the same noisy latents, up to their scale: noise - clean as the outputs say, against the true one."""
    objective, t = VPrediction(), torch.tensor([0.1, 0.5, 0.9, 1.0])
    clean, noise = torch.randn(2, 4, 3, 2, 2, 2, dtype=torch.float64)
    noisy = objective.noisy(clean, noise, t)
    output = objective.target(clean, noise, t) + torch.randn_like(clean)
    velocity = objective.to_noise(output, noisy, t) - objective.to_clean(output, noisy, t)
    error = (velocity - (noise - clean)).square().flatten(1).mean(1)
    own = (output - objective.target(clean, noise, t)).square().flatten(1).mean(1)
    torch.testing.assert_close(own * flow_error_factor(objective, t), error, rtol=1e-5, atol=1e-6)


def test_the_wrong_objective_knows_no_time_and_can_be_undone_where_noise_was_added():
    objective, t = AddedNoise(), torch.tensor([0.2, 0.9])
    clean, noise = torch.randn(2, 2, 3, 2, 2, 2)
    noisy = objective.noisy(clean, noise, t)
    assert torch.equal(noisy, clean + noise)
    assert objective.network_time(t).tolist() == [0, 0]
    torch.testing.assert_close(objective.to_clean(noise, noisy, t), clean)
    assert torch.equal(objective.target(clean, noise, t), objective.to_noise(noise, noisy, t))
