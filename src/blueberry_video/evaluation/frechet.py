"""Fréchet distance between the features of real and reconstructed or generated clips.

The distance depends on the feature network, the number of clips, their frames, frame rate and size (stylegan-v #37,
cd-fvd): :meth:`FrechetDistance.protocol` states all of them, and numbers of different protocols are not comparable.
"""

import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from blueberry_video.models.encoder import Encoder


class Moments(NamedTuple):
    """Number of feature vectors, their sum (D,) and the sum of their outer products (D, D), float64."""

    size: Tensor
    total: Tensor
    outer: Tensor

    def gaussian(self) -> tuple[Tensor, Tensor]:
        """Returns mean (D,) and unbiased covariance (D, D)."""
        mean = self.total / self.size
        return mean, (self.outer - self.size * torch.outer(mean, mean)) / (self.size - 1)


def moments(features: Tensor) -> Moments:
    """Returns the moments of features (N, D)."""
    features = features.double()
    return Moments(features.new_tensor(len(features)), features.sum(dim=0), features.T @ features)


def frechet_distance(first: tuple[Tensor, Tensor], second: tuple[Tensor, Tensor]) -> Tensor:
    """Fréchet distance of two Gaussians, each a mean (D,) and a covariance (D, D), float64.

    |m1 - m2|² + tr(C1 + C2 - 2 (C1 C2)^½), by the eigenvalues of C1^½ C2 C1^½, which is symmetric.
    """
    (mean1, cov1), (mean2, cov2) = first, second
    values, vectors = torch.linalg.eigh(cov1)
    root = vectors * values.clamp(min=0).sqrt() @ vectors.T
    product = torch.linalg.eigvalsh(root @ cov2 @ root).clamp(min=0).sqrt().sum()
    return (mean1 - mean2).square().sum() + cov1.trace() + cov2.trace() - 2 * product


class FrechetDistance:
    """Fréchet distance of two sets of clips in the features of a frozen encoder, over batches and processes.

    The feature of a clip is the mean of its tokens. At least as many clips as features are needed for a full-rank
    covariance; with fewer, the distance is defined but biased upwards.

    Args:
        encoder: feature network. Clips have its frame count, or as many frames from their start as it takes.
        weights: published weights or a checkpoint; ``None`` for the random weights of ``seed``, which rank distortions
            (Heusel et al., arXiv 1706.08500, with an untrained network) but do not see content.
        seed: of random weights.
        fps: frame rate of the clips, for the protocol only.

    Raises:
        ValueError: in ``update`` for clips that the encoder rejects.
    """

    def __init__(
        self, encoder: Callable[[], Encoder], weights: str | Path | None = None, seed: int = 0, fps: float | None = None
    ):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            network = encoder()
        if weights is not None:
            network.load_published(weights)
        self.encoder = network.requires_grad_(False).eval()  # not a submodule of the task: frozen, not saved
        self.source = f"random weights of seed {seed}" if weights is None else str(weights)
        self.fps = fps
        self.count = 0  # clips of the last distance
        self._sets: dict[str, Moments] = {}
        self._shape: tuple[int, ...] = ()

    @torch.no_grad()
    def update(self, name: str, video: Tensor) -> None:
        """Adds clips (B, 3, T, H, W), normalized for the encoder, to the set ``name``: ``"real"`` or ``"made"``."""
        video = video[:, :, : self.encoder.video_size[1]].float()
        self._shape = tuple(video.shape[1:])
        added = moments(self.encoder.to(video.device)(video).mean(dim=1))
        known = self._sets.get(name)
        self._sets[name] = added if known is None else Moments(*(a + b for a, b in zip(known, added, strict=True)))

    def compute(self) -> Tensor:
        """Returns the distance over the clips of all processes, and resets; all processes must call it."""
        sets, self._sets = self._sets, {}
        if dist.is_available() and dist.is_initialized():
            for values in sets.values():
                for value in values:
                    dist.all_reduce(value)
        self.count = int(sets["real"].size)
        return frechet_distance(sets["real"].gaussian(), sets["made"].gaussian())

    def protocol(self) -> dict[str, str | int | float | None]:
        """Returns everything that the last distance depends on, to be stored with it."""
        digest = hashlib.sha256()
        for name, value in sorted(self.encoder.state_dict().items()):
            digest.update(name.encode() + value.float().cpu().contiguous().numpy().tobytes())
        _, frames, height, width = self._shape
        return {
            "network": type(self.encoder).__name__,
            "weights": self.source,
            "sha256": digest.hexdigest()[:16],
            "features": self.encoder.embed_dim,
            "clips": self.count,
            "frames": frames,
            "fps": self.fps,
            "height": height,
            "width": width,
            "resize": "none",
        }
