"""Denoising loss by noise fraction, on networks with known errors."""

import pytest
import torch

from blueberry_video.diffusion.objectives import FlowMatching, Objective, VPrediction
from blueberry_video.evaluation.denoising import NUM_BINS, denoising_losses
from blueberry_video.models.text_encoder.base import TextTokens

TEXT, SHUFFLED = (TextTokens(torch.full((8, 1, 1), value), torch.ones(8, 1, dtype=torch.bool)) for value in (0.0, 1.0))


def measure(denoise, objective: Objective, clips: int = 8, seed: int = 0) -> dict[str, float]:
    clean = torch.full((clips, 1, 2, 4, 4), 0.5)
    text, shuffled = (TextTokens(part.tokens[:clips], part.mask[:clips]) for part in (TEXT, SHUFFLED))
    found = denoising_losses(denoise, objective, clean, text, shuffled, torch.Generator().manual_seed(seed))
    return {name: value.item() for name, value in found.items()}


def zero(noisy, t, text):
    return torch.zeros_like(noisy)


def oracle(objective: Objective, error_at):
    """Exact denoiser of clips that are 0.5 everywhere, plus the error ``error_at(t, text)``."""

    def denoise(noisy, t, text):
        clean = torch.full_like(noisy, 0.5)
        signal, level = (value.view(-1, 1, 1, 1, 1) for value in objective.alpha_sigma(t))
        noise = (noisy - signal * clean) / level
        return objective.target(clean, noise, t) + error_at(t, text).view(-1, 1, 1, 1, 1)

    return denoise


def test_every_bin_averages_the_errors_of_its_times():
    found = measure(oracle(FlowMatching(), lambda t, text: t + text.tokens.mean((1, 2))), FlowMatching())
    for i in range(NUM_BINS):
        low, high = i / NUM_BINS, (i + 1) / NUM_BINS
        assert low**2 <= found[f"loss_t{10 * i:02d}_{10 * (i + 1):02d}"] <= high**2
    assert found["loss"] == pytest.approx(1 / 3, abs=0.01)
    assert found["loss_shuffled"] == pytest.approx(7 / 3, abs=0.02)  # of (1 + t)²
    assert 0.95**2 <= found["loss_t95"] <= 1
    assert 1.95**2 <= found["loss_t95_shuffled"] <= 4
    assert "flow_loss" not in found


def test_v_prediction_is_also_reported_in_the_unit_of_a_flow():
    found = measure(oracle(VPrediction(snr_shift=1.0), lambda t, text: torch.ones_like(t)), VPrediction(snr_shift=1.0))
    assert found["loss"] == pytest.approx(1, abs=1e-4)
    assert found["flow_loss_t95"] == pytest.approx(1.05, abs=0.06)  # (signal + noise)² near pure noise
    assert found["flow_loss_t50_60"] == pytest.approx(2, abs=0.05)  # signal = noise
    assert found["flow_loss_trivial"] == pytest.approx(1, abs=0.1)  # clips equal their mean: only noise remains


def test_noise_and_times_depend_only_on_the_generator():
    torch.manual_seed(1)
    first = measure(zero, FlowMatching())
    torch.manual_seed(2)
    assert measure(zero, FlowMatching()) == first
    assert measure(zero, FlowMatching(), seed=1) != first
    assert first["loss"] == pytest.approx(1.25, abs=0.1)  # noise and 0.5²
    assert first["loss_trivial"] == pytest.approx(1.0, abs=0.1)


@pytest.mark.parametrize("objective", [FlowMatching(), VPrediction()])
def test_a_small_batch_fills_all_bins(objective: Objective):
    found = measure(zero, objective, clips=1)
    assert all(value == value for value in found.values())
    assert "loss_t50_60" in found
    of_two = measure(zero, FlowMatching(), clips=2)
    assert of_two["loss_trivial"] == pytest.approx(1.0, abs=0.1), "equal clips are their mean"


def test_the_baseline_of_a_single_clip_predicts_zero():
    """The mean of the batch would be the clip itself, an oracle."""
    found = measure(zero, FlowMatching(), clips=1)
    for name in ("loss", "loss_t95"):
        assert found[f"{name}_trivial"] == pytest.approx(found[name])
    assert found["loss_trivial"] == pytest.approx(1.25, abs=0.1)  # noise and 0.5²


def test_without_shuffled_captions_no_shuffled_losses_are_returned():
    clean, text = torch.zeros(4, 1, 2, 4, 4), TextTokens(TEXT.tokens[:4], TEXT.mask[:4])
    for objective in (FlowMatching(), VPrediction()):
        found = denoising_losses(zero, objective, clean, text, None, torch.Generator())
        more = denoising_losses(zero, objective, clean, text, text, torch.Generator())
        assert {name for name in more if "shuffled" not in name} == found.keys() < more.keys()
        assert all(torch.equal(found[name], more[name]) for name in found)
