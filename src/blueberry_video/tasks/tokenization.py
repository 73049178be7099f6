"""Training of a video tokenizer: reconstruction, the loss of the quantizer, and optional perceptual and adversarial
losses.
"""

import json
import math
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

from blueberry_video.atomic import write_text
from blueberry_video.diffusion.frozen import Frozen
from blueberry_video.evaluation.frechet import FrechetDistance
from blueberry_video.evaluation.metrics import CodeCounts
from blueberry_video.evaluation.reconstruction import TRIVIAL, psnr, ssim, trivial_reconstructions
from blueberry_video.models.hydra_video.tokenizer import HydraVideoTokenizer
from blueberry_video.tasks.base import Task
from blueberry_video.tasks.settings import ClipInput, Optimization


@dataclass(frozen=True)
class Adversarial:
    """Settings of the adversarial loss (hinge loss, as in VQGAN, arXiv 2012.09841).

    Args:
        discriminator: builds the network; it scores patches of videos (B, 3, T, H, W) in [-1, 1].
        weight: weight of the loss of the tokenizer.
        after_steps: steps without it; the discriminator trains from this step too.
        lr_scale: learning rate of the discriminator relative to that of the tokenizer.
        betas: of its Adam.
    """

    discriminator: Callable[[], nn.Module]
    weight: float = 0.1
    after_steps: int = 1000
    lr_scale: float = 1.0
    betas: tuple[float, float] = (0.5, 0.9)


class Tokenization(Task):
    """Trains a video tokenizer.

    Logs ``loss``, the sum of ``reconstruction``, ``quantizer`` (commitment and entropy), and, if they are used,
    ``perceptual`` and ``adversarial`` with their weights; with a discriminator also its loss, ``discriminator``. In
    validation also ``psnr`` (dB), ``ssim``, ``bits_per_pixel``, ``codebook_usage`` (share of the codes that occur),
    ``perplexity`` (exponential of the entropy of the codes), ``codebook_collapsed`` (1 for a usage of less than 5 % of
    what the number of tokens allows, with a warning), ``frechet`` if it is measured, and the metrics of the best of
    :func:`~blueberry_video.evaluation.reconstruction.trivial_reconstructions`.

    The discriminator has separate parameter groups. The gradient of each loss reaches only its own parameters, so one
    optimizer step is one step of either network, and accumulation, several processes and resumes need nothing special.

    Args:
        model, optimization, input: see :class:`~blueberry_video.tasks.base.Task`.
        loss: ``l1`` or ``l2``, on pixels in [-1, 1].
        perceptual: distance (B, …) of two videos folded to images (B T, 3, H, W) in [-1, 1], such as ``lpips.LPIPS``;
            frozen. ``None`` for none.
        perceptual_weight: weight of its mean.
        adversarial: settings of the adversarial loss; ``None`` for none.
        frechet: measures ``frechet`` in validation and writes its protocol to ``frechet.json`` in the run folder.
        num_pictures: number of clips in :meth:`media`.

    Raises:
        ValueError: for an unknown loss or a negative weight.
    """

    trains = HydraVideoTokenizer
    normalizes = False
    model: HydraVideoTokenizer

    def __init__(
        self,
        model: HydraVideoTokenizer,
        optimization: Optimization,
        input: ClipInput | None = None,
        loss: Literal["l1", "l2"] = "l2",
        perceptual: nn.Module | None = None,
        perceptual_weight: float = 1.0,
        adversarial: Adversarial | None = None,
        frechet: FrechetDistance | None = None,
        num_pictures: int = 6,
    ):
        super().__init__(model, optimization, input)
        if loss not in ("l1", "l2"):
            raise ValueError(f"task.loss={loss!r} is unknown: choose 'l1' or 'l2'.")
        weights = {
            "perceptual_weight": perceptual_weight,
            "adversarial.weight": adversarial.weight if adversarial else 0,
        }
        for key, weight in weights.items():
            if weight < 0:
                raise ValueError(f"task.{key}={weight} is negative: use 0 or more.")
        self.distance = F.l1_loss if loss == "l1" else F.mse_loss
        self.perceptual = None if perceptual is None else Frozen(perceptual)
        self.perceptual_weight, self.adversarial, self.num_pictures = perceptual_weight, adversarial, num_pictures
        self.discriminator = None if adversarial is None else adversarial.discriminator()
        self.frechet = frechet
        self._codes = CodeCounts(model.vocabulary)

    def shared_step(self, batch: dict, stage: str) -> dict[str, Tensor]:
        video = batch["video"] * 2 - 1
        made, tokens = self.model(video)
        values = {"reconstruction": self.distance(made, video), "quantizer": tokens.loss}
        loss = values["reconstruction"] + values["quantizer"]
        if self.perceptual is not None:
            frames = (clip.transpose(1, 2).flatten(0, 1).float() for clip in (made, video))
            values["perceptual"] = self.perceptual.get().to(self.device)(*frames).mean()
            loss = loss + self.perceptual_weight * values["perceptual"]
        if stage == "train":
            return {"loss": loss + self._adversarial_loss(made, video, values), **values}
        self._codes.add(tokens.ids)
        values |= {"loss": loss, "psnr": psnr(made, video), "ssim": ssim(made, video)}
        values["bits_per_pixel"] = loss.new_tensor(self._bits(video) / video[0, 0].numel())
        for name, trivial in trivial_reconstructions(video, self.model.stride).items():
            values[f"reconstruction_trivial_{name}"] = self.distance(trivial, video)
            values[f"psnr_trivial_{name}"] = psnr(trivial, video)
        if self.frechet is not None:
            for name, clips in (("real", video), ("made", made.clamp(-1, 1))):
                self.frechet.update(name, self.normalize((clips + 1) / 2))
        return values

    def epoch_metrics(self, means: dict[str, Tensor]) -> dict[str, Tensor]:
        counts = self._codes.compute()
        shares = counts / counts.sum()
        usage = (counts > 0).double().mean()
        possible = min(1.0, float(counts.sum()) / len(counts))
        collapsed = float(usage) < 0.05 * possible
        if collapsed and not self.trainer.sanity_checking:
            warnings.warn(
                f"codebook collapse at step {self.trainer.global_step}: {int((counts > 0).sum())} of {len(counts)} "
                f"codes occur in {int(counts.sum())} tokens of validation. Lower optimizer.lr, or use "
                "model/quantizer=fsq.",
                stacklevel=2,
            )
        metrics = {
            "codebook_usage": usage,
            "perplexity": torch.special.entr(shares).sum().exp(),
            "codebook_collapsed": usage.new_tensor(float(collapsed)),
            "reconstruction_trivial": min(means[f"reconstruction_trivial_{name}"] for name in TRIVIAL),
            "psnr_trivial": max(means[f"psnr_trivial_{name}"] for name in TRIVIAL),
        }
        if self.frechet is not None:
            metrics["frechet"] = self.frechet.compute()
            if self.trainer.is_global_zero:
                record = {"distance": float(metrics["frechet"]), **self.frechet.protocol()}
                write_text(Path(self.trainer.default_root_dir) / "frechet.json", json.dumps(record, indent=2) + "\n")
        return metrics

    @torch.no_grad()
    def media(self, batch: dict) -> dict[str, Tensor]:
        """``reconstruction``: one row per clip: the clip, and its reconstruction."""
        video = batch["video"][: self.num_pictures]
        made = self.model(video * 2 - 1)[0].float().clamp(-1, 1)
        return {"reconstruction": self.panels([video, (made + 1) / 2])}

    def tokens_per_clip(self, batch: dict) -> int:
        """Number of tokens of a clip, over all its repeats."""
        return math.prod(self.model.grid(*batch["video"].shape[2:])) * self._times(batch)

    def load_weights(self, path: str | Path) -> str:
        return self.model.load_published(path)

    def parameter_groups(self) -> list[dict]:
        """Parameter groups of the tokenizer and, with their own learning rate and betas, of the discriminator."""
        groups, settings = super().parameter_groups(), self.adversarial
        if settings is None or self.discriminator is None:
            return groups
        own = set(self.discriminator.parameters())
        split = []
        for group in groups:
            split.append({**group, "params": [p for p in group["params"] if p not in own]})
        for group in groups:
            options = {"lr_scale": settings.lr_scale, "betas": tuple(settings.betas)}
            split.append({**group, **options, "params": [p for p in group["params"] if p in own]})
        return split

    def _bits(self, video: Tensor) -> float:
        return math.prod(self.model.grid(*video.shape[2:])) * math.log2(self.model.vocabulary)

    def _adversarial_loss(self, made: Tensor, video: Tensor, values: dict[str, Tensor]) -> Tensor:
        """Loss of both networks: the gradient of each part reaches only its own network."""
        settings, network = self.adversarial, self.discriminator
        if settings is None or network is None:
            return made.new_zeros(())
        frozen = {name: parameter.detach() for name, parameter in network.named_parameters()}
        values["adversarial"] = -functional_call(network, frozen, (made,)).mean()
        real, fake = network(video), network(made.detach())
        values["discriminator"] = (F.relu(1 - real).mean() + F.relu(1 + fake).mean()) / 2
        begun = float(self.trainer.global_step >= settings.after_steps)  # times 0, so that every weight has a gradient
        return begun * (settings.weight * values["adversarial"] + values["discriminator"])
