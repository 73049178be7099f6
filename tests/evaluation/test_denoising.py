"""The loss by share of noise: right on a network whose errors are known."""

import pytest
import torch

from blueberry_video.diffusion.objectives import FlowMatching, Objective, VPrediction
from blueberry_video.evaluation.denoising import NUM_BINS, denoising_losses
from blueberry_video.models.text_encoder.base import TextTokens

OWN, OTHERS = (TextTokens(torch.full((8, 1, 1), value), torch.ones(8, 1, dtype=torch.bool)) for value in (0.0, 1.0))


def measure(ask, objective: Objective, clips: int = 8, seed: int = 0) -> dict[str, float]:
    clean = torch.full((clips, 1, 2, 4, 4), 0.5)
    text, others = (TextTokens(part.tokens[:clips], part.mask[:clips]) for part in (OWN, OTHERS))
    found = denoising_losses(ask, objective, clean, text, others, torch.Generator().manual_seed(seed))
    return {name: value.item() for name, value in found.items()}


def oracle(objective: Objective, error_at):
    """Knows that all clips are 0.5 everywhere; is wrong by ``error_at(t, text)``."""

    def ask(noisy, t, told):
        clean = torch.full_like(noisy, 0.5)
        signal, level = (value.view(-1, 1, 1, 1, 1) for value in objective.levels(t))
        noise = (noisy - signal * clean) / level
        return objective.target(clean, noise, t) + error_at(t, told).view(-1, 1, 1, 1, 1)

    return ask


def test_every_bin_holds_the_errors_of_its_own_times():
    found = measure(oracle(FlowMatching(), lambda t, told: t + told.tokens.mean((1, 2))), FlowMatching())
    for i in range(NUM_BINS):
        low, high = i / NUM_BINS, (i + 1) / NUM_BINS
        assert low**2 <= found[f"loss_t{10 * i:02d}_{10 * (i + 1):02d}"] <= high**2
    assert found["loss"] == pytest.approx(1 / 3, abs=0.01)
    assert found["loss_shuffled"] == pytest.approx(7 / 3, abs=0.02)  # of (1 + t)²
    assert 0.95**2 <= found["loss_t95"] <= 1
    assert 1.95**2 <= found["loss_t95_shuffled"] <= 4
    assert "flow_loss" not in found


def test_v_prediction_is_told_in_the_unit_of_a_flow_too():
    found = measure(oracle(VPrediction(snr_shift=1.0), lambda t, told: torch.ones_like(t)), VPrediction(snr_shift=1.0))
    assert found["loss"] == pytest.approx(1, abs=1e-4)
    assert found["flow_loss_t95"] == pytest.approx(1.05, abs=0.06)  # (signal + noise)² near pure noise
    assert found["flow_loss_t50_60"] == pytest.approx(2, abs=0.05)  # and where both are equal
    assert found["flow_loss_trivial"] == pytest.approx(1, abs=0.1)  # all clips are their mean: the noise is left


def test_noise_and_times_depend_on_the_generator_alone():
    def silent(noisy, t, told):
        return torch.zeros_like(noisy)

    torch.manual_seed(1)
    first = measure(silent, FlowMatching())
    torch.manual_seed(2)
    assert measure(silent, FlowMatching()) == first
    assert measure(silent, FlowMatching(), seed=1) != first
    assert first["loss"] == pytest.approx(1.25, abs=0.1)  # noise and 0.5²
    assert first["loss_trivial"] == pytest.approx(1.0, abs=0.1)


@pytest.mark.parametrize("objective", [FlowMatching(), VPrediction()])
def test_a_small_batch_fills_all_bins(objective: Objective):
    found = measure(lambda noisy, t, told: torch.zeros_like(noisy), objective, clips=1)
    assert all(value == value for value in found.values())
    assert "loss_t50_60" in found
    of_two = measure(lambda noisy, t, told: torch.zeros_like(noisy), FlowMatching(), clips=2)
    assert of_two["loss_trivial"] == pytest.approx(1.0, abs=0.1), "which are equal, and so their mean"


def test_a_single_clip_is_not_told_from_itself():
    """Its mean would be the clip: the line to be below would be that of an oracle."""
    found = measure(lambda noisy, t, told: torch.zeros_like(noisy), FlowMatching(), clips=1)
    for name in ("loss", "loss_t95"):
        assert found[f"{name}_trivial"] == pytest.approx(found[name])
    assert found["loss_trivial"] == pytest.approx(1.25, abs=0.1)  # noise and 0.5²


def test_without_other_captions_nothing_is_said_of_them():
    clean, text = torch.zeros(4, 1, 2, 4, 4), TextTokens(OWN.tokens[:4], OWN.mask[:4])
    silent = lambda noisy, t, told: torch.zeros_like(noisy)  # noqa: E731
    for objective in (FlowMatching(), VPrediction()):
        found = denoising_losses(silent, objective, clean, text, None, torch.Generator())
        others = denoising_losses(silent, objective, clean, text, text, torch.Generator())
        assert {name for name in others if "shuffled" not in name} == found.keys() < others.keys()
        assert all(torch.equal(found[name], others[name]) for name in found)
