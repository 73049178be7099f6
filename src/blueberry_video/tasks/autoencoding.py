"""Training of a video autoencoder: reconstruction with a KL penalty on the latents."""

import math
from pathlib import Path
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from blueberry_video.evaluation.reconstruction import TRIVIAL, psnr, trivial_reconstructions
from blueberry_video.models.autoencoder.base import sample
from blueberry_video.models.autoencoder.causal_vae import CausalVideoVAE
from blueberry_video.tasks.base import Task
from blueberry_video.tasks.settings import ClipInput, Optimization


def kl_divergence(moments: Tensor) -> Tensor:
    """KL divergence from the standard normal distribution in nats, averaged over latents.

    ``moments`` (B, 2C, t, h, w): means, then log-variances.
    """
    mean, log_variance = moments.float().chunk(2, dim=1)
    return (mean.square() + log_variance.exp() - 1 - log_variance).mean() / 2


class Autoencoding(Task):
    """Trains a causal video autoencoder.

    Logs ``loss`` = ``reconstruction`` + ``kl_weight`` · ``kl``. In validation, where latents are the means, also
    ``psnr`` (dB); ``reconstruction_trivial`` and ``psnr_trivial`` of the best of :func:`trivial_reconstructions`; and
    the ratio ``reconstruction_share`` = ``reconstruction`` / ``reconstruction_trivial``.

    Args:
        model, optimization, input: see :class:`~blueberry_video.tasks.base.Task`.
        loss: ``l1`` or ``mse``, on pixels in [-1, 1].
        kl_weight: weight of :func:`kl_divergence`.
        num_pictures: number of clips in :meth:`media`.

    Raises:
        ValueError: for an unknown loss or a negative weight.
    """

    trains = CausalVideoVAE
    normalizes = False
    model: CausalVideoVAE

    def __init__(
        self,
        model: CausalVideoVAE,
        optimization: Optimization,
        input: ClipInput | None = None,
        loss: Literal["l1", "mse"] = "l1",
        kl_weight: float = 1e-4,
        num_pictures: int = 6,
    ):
        super().__init__(model, optimization, input)
        if loss not in ("l1", "mse"):
            raise ValueError(f"task.loss={loss!r} is unknown: choose 'l1' or 'mse'.")
        if kl_weight < 0:
            raise ValueError(f"task.kl_weight={kl_weight} is negative: use 0 or more, such as 0.0001.")
        self.distance = F.l1_loss if loss == "l1" else F.mse_loss
        self.kl_weight, self.num_pictures = kl_weight, num_pictures

    def shared_step(self, batch: dict, stage: str) -> dict[str, Tensor]:
        video = batch["video"] * 2 - 1
        moments = self.model.encode(video)
        training = stage == "train"
        latents = sample(moments) if training else moments.chunk(2, dim=1)[0]
        if training:
            self.model.track(latents)
        made = self.model.reconstruct(latents)
        reconstruction, kl = self.distance(made, video), kl_divergence(moments)
        values = {"loss": reconstruction + self.kl_weight * kl, "reconstruction": reconstruction, "kl": kl}
        if training:
            return values
        values["psnr"] = psnr(made, video)
        for name, trivial in trivial_reconstructions(video, self.model.stride).items():
            values[f"reconstruction_trivial_{name}"] = self.distance(trivial, video)
            values[f"psnr_trivial_{name}"] = psnr(trivial, video)
        return values

    def epoch_metrics(self, means: dict[str, Tensor]) -> dict[str, Tensor]:
        trivial = min(means[f"reconstruction_trivial_{name}"] for name in TRIVIAL)
        return {
            "reconstruction_trivial": trivial,
            "reconstruction_share": means["reconstruction"] / trivial,
            "psnr_trivial": max(means[f"psnr_trivial_{name}"] for name in TRIVIAL),
        }

    @torch.no_grad()
    def media(self, batch: dict) -> dict[str, Tensor]:
        """``reconstruction``: one row per clip: the clip, and its reconstruction from the mean latents."""
        video = batch["video"][: self.num_pictures]
        moments = self.model.encode(video * 2 - 1)
        made = self.model.reconstruct(moments.chunk(2, dim=1)[0]).float().clamp(-1, 1)
        return {"reconstruction": self.panels([video, (made + 1) / 2])}

    def tokens_per_clip(self, batch: dict) -> int:
        """Number of latent positions of a clip, over all its repeats."""
        return math.prod(self.model.grid(*batch["video"].shape[2:])) * self._times(batch)

    def load_weights(self, path: str | Path) -> str:
        """Loads the whole autoencoder from a checkpoint of this task."""
        return self.model.load_published(path)
