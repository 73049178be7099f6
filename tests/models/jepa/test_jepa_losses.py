"""Losses of embeddings: parity with independent float64 references."""

import itertools
import math

import numpy as np
import pytest
import torch

from blueberry_video.models.jepa.losses import context_weight, latent_loss, sigreg


def epps_pulley(samples: np.ndarray, direction: np.ndarray) -> float:
    """Epps-Pulley statistic of samples (N, D) on one direction: N times the integral of 2 exp(-t²/2) |φ̂(t) - φ(t)|²."""
    projected = samples.astype(np.float64) @ (direction / math.sqrt(sum(x * x for x in direction)))
    heights = []
    for step in range(17):
        t = 3 * step / 16
        empirical = sum(complex(math.cos(t * x), math.sin(t * x)) for x in projected) / len(projected)
        heights.append(2 * math.exp(-t * t / 2) * abs(empirical - math.exp(-t * t / 2)) ** 2)
    return len(projected) * sum((a + b) / 2 * 3 / 16 for a, b in itertools.pairwise(heights))


def test_sigreg_is_the_mean_epps_pulley_statistic():
    generator = np.random.default_rng(0)
    samples, directions = generator.normal(0.3, 1.4, (2, 20, 5)), 3 * generator.normal(size=(5, 7))
    expected = np.mean([epps_pulley(group, column) for group in samples for column in directions.T])
    got = sigreg(torch.from_numpy(samples), torch.from_numpy(directions))
    assert got.item() == pytest.approx(expected, rel=1e-12)
    in_float32 = sigreg(torch.from_numpy(samples).float(), torch.from_numpy(directions).float())
    assert in_float32.item() == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("number", [64, 512])
def test_sigreg_separates_normal_from_collapsed_embeddings(number):
    normal, directions = torch.randn(number, 32), torch.randn(32, 128)
    assert 0.5 < sigreg(normal, directions) < 1.6  # 1.05 is expected
    assert sigreg(torch.zeros(number, 32), directions) > 0.3 * number
    assert sigreg(torch.randn(32).expand(number, -1), directions) > 0.3 * number
    one_dimension = normal[:, :1] * torch.nn.functional.normalize(torch.randn(32), dim=0) * 32**0.5
    assert sigreg(one_dimension, directions) > 0.05 * number
    assert sigreg(3 * normal, directions) > 0.05 * number


def test_sigreg_is_computed_per_position():
    """Embeddings that differ between positions but not between clips appear spread only if positions are pooled."""
    embeddings = torch.randn(64, 1, 16).expand(-1, 32, -1)  # (positions, clips, D)
    directions = torch.randn(16, 32)
    assert sigreg(embeddings, directions) > 0.3 * 32  # the statistic of 32 collapsed clips
    pooled = sigreg(embeddings.flatten(0, 1), directions) / 64  # scaled to 32 samples
    assert pooled < 0.1 * 32


def test_sigreg_gradient_spreads_collapsed_embeddings():
    embeddings = (1 + 0.01 * torch.randn(64, 8)).requires_grad_()
    optimizer = torch.optim.Adam([embeddings], lr=0.05)
    for _ in range(200):
        optimizer.zero_grad()
        sigreg(embeddings, torch.randn(8, 32)).backward()
        optimizer.step()
    assert embeddings.mean(dim=0).abs().max() < 0.3
    assert 0.8 < embeddings.std(dim=0).min() < embeddings.std(dim=0).max() < 1.2


def test_sigreg_runs_in_float32_under_autocast():
    embeddings, directions = torch.randn(64, 16), torch.randn(16, 32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        value = sigreg(embeddings.bfloat16(), directions)
    assert value.dtype == torch.float32
    assert torch.equal(value, sigreg(embeddings.bfloat16().float(), directions))


def test_latent_loss_equals_loops():
    predicted, latents, weight = torch.randn(2, 3, 4), torch.randn(2, 3, 4), torch.rand(2, 3)
    total = weighted = 0.0
    for b in range(2):
        for k in range(3):
            error = sum(abs(float(predicted[b, k, d]) - float(latents[b, k, d])) for d in range(4)) / 4
            total, weighted = total + error / 6, weighted + error * float(weight[b, k]) / 6
    assert latent_loss(predicted, latents).item() == pytest.approx(total, rel=1e-6)
    assert latent_loss(predicted, latents, weight).item() == pytest.approx(weighted, rel=1e-6)
    assert latent_loss(predicted.bfloat16(), latents).dtype == torch.float32


def test_context_weight_is_the_inverse_root_of_the_distance_to_the_nearest_hidden_token():
    """The reference uses the (t, h, w) position of each token on a grid of 2 x 2 x 3."""
    keep, target = torch.tensor([[0, 1, 8], [3, 4, 11]]), torch.tensor([[2, 5], [0, 1]])
    expected = []
    for row in range(2):
        positions = {index: (index // 6, index // 3 % 2, index % 3) for index in range(12)}
        for token in keep[row].tolist():
            nearest = min(math.dist(positions[token], positions[hidden]) for hidden in target[row].tolist())
            expected.append(1 / math.sqrt(nearest))
    assert context_weight(keep, target, (2, 2, 3)).flatten().tolist() == pytest.approx(expected)
    assert expected[1] == 1
    assert expected[0] == pytest.approx(2**-0.5)
