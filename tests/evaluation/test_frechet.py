"""Fréchet distance: formula, batches and protocol."""

from functools import partial

import pytest
import torch

from blueberry_video.evaluation.frechet import FrechetDistance, frechet_distance, moments
from blueberry_video.models.hydra_video import HydraVideo

ENCODER = partial(
    HydraVideo, image_size=8, num_frames=2, patch_size=4, tubelet_size=2, embed_dim=4, depth=1, head_dim=4, state_dim=4
)


def test_moments_are_mean_and_covariance_over_batches():
    torch.manual_seed(0)
    features = torch.randn(50, 3)
    parts = [moments(part) for part in features.split([20, 30])]
    total = type(parts[0])(*(a + b for a, b in zip(*parts, strict=True)))
    mean, covariance = total.gaussian()
    torch.testing.assert_close(mean, features.double().mean(dim=0))
    torch.testing.assert_close(covariance, features.double().T.cov())


def test_the_distance_of_gaussians_has_known_values():
    torch.manual_seed(0)
    root = torch.randn(3, 3, dtype=torch.double)
    covariance, mean = root @ root.T, torch.randn(3, dtype=torch.double)
    assert frechet_distance((mean, covariance), (mean, covariance)).item() == pytest.approx(0, abs=1e-6)
    assert frechet_distance((mean, covariance), (mean + 2, covariance)).item() == pytest.approx(12)
    # commuting covariances: sum of (sqrt(a) - sqrt(b))²
    first, second = torch.diag(torch.tensor([1.0, 4.0])).double(), torch.diag(torch.tensor([9.0, 16.0])).double()
    zero = torch.zeros(2).double()
    assert frechet_distance((zero, first), (zero, second)).item() == pytest.approx(4 + 4)
    # in general: the trace of a square root of the product, by its eigenvalues
    other = torch.randn(3, 3, dtype=torch.double)
    other = other @ other.T
    expected = covariance.trace() + other.trace() - 2 * torch.linalg.eigvals(covariance @ other).real.sqrt().sum()
    assert frechet_distance((mean, covariance), (mean, other)).item() == pytest.approx(expected.item())


def test_sets_of_clips_are_compared_and_reset():
    torch.manual_seed(0)
    real = torch.rand(12, 3, 4, 8, 8)
    distances = []
    for made in (real, real + 0.1 * torch.randn_like(real), torch.rand_like(real) * 0.2):
        distance = FrechetDistance(ENCODER)
        for part, other in zip(real.split(5), made.split(5), strict=True):
            distance.update("real", part)
            distance.update("made", other)
        distances.append(distance.compute().item())
        assert distance.protocol()["clips"] == 12
        assert distance.protocol()["frames"] == 2  # of the encoder
    assert distances[0] == pytest.approx(0, abs=1e-8)
    assert distances[0] < distances[1] < distances[2]


def test_the_protocol_names_the_feature_network():
    first, same, other = FrechetDistance(ENCODER), FrechetDistance(ENCODER), FrechetDistance(ENCODER, seed=1)
    for distance in (first, same, other):
        distance.update("real", torch.rand(2, 3, 2, 8, 8))
    hashes = [distance.protocol()["sha256"] for distance in (first, same, other)]
    assert hashes[0] == hashes[1] != hashes[2]
    assert other.protocol()["weights"] == "random weights of seed 1"
