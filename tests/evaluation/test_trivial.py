"""Baselines against naive loops."""

import itertools

import pytest
import torch

from blueberry_video.data.moving_shapes import MovingShapes
from blueberry_video.diffusion.objectives import FlowMatching, VPrediction
from blueberry_video.evaluation.trivial import (
    majority_share,
    trivial_denoising_losses,
    trivial_latent_losses,
    trivial_patch_losses,
)
from blueberry_video.masking import DualMasking, RandomMasking, TubeMasking


@pytest.mark.parametrize(
    "masking", [TubeMasking(0.75), RandomMasking(0.9), RandomMasking(0.3), DualMasking(RandomMasking(0.75))]
)
@pytest.mark.parametrize("grid", [(2, 2, 4), (4, 4, 6)])  # 16 and 96 positions: torch.cdist has two algorithms
def test_losses_equal_loops(masking, grid):
    generator = torch.Generator().manual_seed(0)
    keep, target, scored = masking(2, grid, generator)
    patches = torch.randn(2, grid[0] * grid[1] * grid[2], 5, generator=generator)
    index = list(itertools.product(*(range(n) for n in grid)))
    sums, count = {"zero": 0.0, "mean": 0.0, "nearest": 0.0}, 0
    for b in range(2):
        visible = keep[b].tolist()
        mean = sum(patches[b, n] for n in visible) / len(visible)
        for n, hidden in enumerate(target[b].tolist()):
            if scored is not None and not scored[b, n]:
                continue
            distances = [sum((p - q) ** 2 for p, q in zip(index[hidden], index[n], strict=True)) for n in visible]
            nearest = patches[b, visible[distances.index(min(distances))]]  # the first of several
            for name, prediction in (("zero", torch.zeros(5)), ("mean", mean), ("nearest", nearest)):
                sums[name] += (prediction - patches[b, hidden]).square().sum().item()
            count += 5
    losses = trivial_patch_losses(patches, keep, target, grid, scored)
    assert {name: value.item() for name, value in losses.items()} == pytest.approx(
        {name: value / count for name, value in sums.items()}, rel=1e-5
    )


def test_the_loss_of_zero_is_the_variance():
    """It is about 1 for normalized patches, the reference value of a loss curve."""
    patches = torch.randn(2, 8, 3000)
    patches = (patches - patches.mean(2, keepdim=True)) / patches.std(2, keepdim=True)
    keep, target, _ = TubeMasking(0.5)(2, (2, 2, 2))
    losses = trivial_patch_losses(patches, keep, target, (2, 2, 2))
    assert losses["zero"].item() == pytest.approx(1.0, abs=1e-3)
    assert losses["nearest"].item() == pytest.approx(2.0, abs=0.1)  # an unrelated patch: twice the variance


def test_majority_share():
    assert majority_share(torch.tensor([2, 0, 2, 1, 2])) == pytest.approx(0.6)
    assert majority_share(torch.tensor([5])) == 1.0


def test_latent_losses_equal_loops():
    latents, grid = torch.randn(3, 8, 4), (2, 2, 2)
    keep, target, _ = RandomMasking(0.5)(3, grid, torch.Generator().manual_seed(0))
    sums = {"mean": 0.0, "position": 0.0, "clip": 0.0}
    for b in range(3):
        for token in target[b].tolist():
            predictions = {
                "mean": sum(latents[c, n] for c in range(3) for n in range(8)) / 24,
                "position": sum(latents[c, token] for c in range(3)) / 3,
                "clip": sum(latents[b, n] for n in keep[b].tolist()) / 4,
            }
            for name, prediction in predictions.items():
                sums[name] += (latents[b, token] - prediction).abs().mean().item() / 12
    losses = {name: value.item() for name, value in trivial_latent_losses(latents, keep, target).items()}
    assert losses == pytest.approx(sums, rel=1e-5)


def test_denoising_losses_of_a_flow_have_known_values():
    """2,304 moving shapes: pixels of ±1 plus noise of variance 1 is 2; the variance around the mean is 0.16."""
    dataset = MovingShapes("train")
    clean = torch.stack([dataset[i]["video"] for i in range(len(dataset))]).transpose(1, 2) / 127.5 - 1
    losses = trivial_denoising_losses(FlowMatching(), clean, torch.randn_like(clean), torch.rand(len(clean)))
    assert losses["zero"].item() == pytest.approx(2.00, abs=0.01)
    assert losses["mean"].item() == pytest.approx(1.16, abs=0.01)


@pytest.mark.parametrize("shape", [(3,), (3, 2)])
def test_denoising_losses_equal_loops(shape):
    clean, noise, t = torch.randn(3, 2, 2, 4, 4), torch.randn(3, 2, 2, 4, 4), torch.rand(shape)
    objective = VPrediction()
    signal, level = objective.alpha_sigma(t)
    sums = {"zero": 0.0, "mean": 0.0}
    for b, f in itertools.product(range(3), range(2)):
        a, s = (x[b, f] if len(shape) == 2 else x[b] for x in (signal, level))
        truth = a * noise[b, :, f] - s * clean[b, :, f]
        average = sum(clean[c, :, f] for c in range(3)) / 3
        sums["zero"] += truth.square().mean().item() / 6
        sums["mean"] += (truth + s * average).square().mean().item() / 6
    losses = trivial_denoising_losses(objective, clean, noise, t)
    assert {name: value.item() for name, value in losses.items()} == pytest.approx(sums, rel=1e-4)
