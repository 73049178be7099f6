"""Baselines without parameters, which a trained loss or accuracy is compared with."""

import torch
from torch import Tensor

from blueberry_video.diffusion.objectives import Objective
from blueberry_video.nn.patches import gather_tokens, token_mse


def trivial_patch_losses(
    patches: Tensor,
    keep: Tensor,
    target: Tensor,
    grid: tuple[int, int, int],
    scored: Tensor | None = None,
    by_clip: bool = False,
) -> dict[str, Tensor]:
    """Mean squared error of three baselines that predict masked, normalized patches.

    Args:
        patches: (B, N, K) per-patch normalized pixels, flattened.
        keep: (B, N_visible) indices of the visible patches.
        target: (B, N_target) indices of the masked patches.
        grid: number of patches along (t, h, w).
        scored: (B, N_target) bool, which targets count; ``None`` for all.
        by_clip: see :func:`~blueberry_video.nn.patches.token_mse`.

    Returns:
        Scalars by name: ``zero`` predicts 0, the mean of every patch; ``mean`` the mean of the clip's visible
            patches; ``nearest`` a copy of the nearest visible patch (Euclidean in the grid; the first of several).
    """
    truth, visible = gather_tokens(patches, target), gather_tokens(patches, keep)
    positions = torch.cartesian_prod(*(torch.arange(n, device=patches.device) for n in grid)).float()  # (N, 3)
    nearest = torch.cdist(positions[target], positions[keep]).argmin(dim=2)  # (B, N_target) into keep
    predictions = {
        "zero": torch.zeros_like(truth),
        "mean": visible.mean(dim=1, keepdim=True).expand_as(truth),
        "nearest": gather_tokens(visible, nearest),
    }
    return {name: token_mse(prediction, truth, scored, by_clip) for name, prediction in predictions.items()}


def trivial_latent_losses(
    latents: Tensor, keep: Tensor, target: Tensor, average: Tensor | None = None, exponent: float = 1.0
) -> dict[str, Tensor]:
    """Error |difference| ** ``exponent`` / ``exponent`` of three baselines that predict masked embeddings from means.

    Args:
        latents: (B, N, D), embeddings of all tokens of the clips.
        keep: (B, N_visible) indices of the visible tokens.
        target: (B, N_target) indices of the masked tokens.
        average: (N, D), mean over clips of the embeddings; ``None``: over those of the batch.
        exponent: 1 for the mean absolute error.

    Returns:
        Scalars by name: ``mean`` predicts the mean of all embeddings; ``position`` the mean over clips at the same
            position; ``clip`` the mean of the clip's visible embeddings.
    """
    average = latents.mean(dim=0) if average is None else average
    predictions = {
        "mean": average.mean(dim=0).expand_as(latents),
        "position": average.expand_as(latents),
        "clip": gather_tokens(latents, keep).mean(dim=1, keepdim=True).expand_as(latents),
    }
    errors = {name: (latents - prediction).abs() for name, prediction in predictions.items()}
    return {name: (gather_tokens(e, target) ** exponent / exponent).mean() for name, e in errors.items()}


def trivial_denoising_losses(
    objective: Objective, clean: Tensor, noise: Tensor, t: Tensor, average: Tensor | None = None
) -> dict[str, Tensor]:
    """Mean squared error of two baselines that predict the target of a diffusion objective without the noisy latents.

    Args:
        objective: training objective.
        clean, noise: (B, C, T, H, W).
        t: times (B,) or (B, T) in [0, 1].
        average: mean latents (C, T, H, W); ``None``: of the batch.

    Returns:
        Scalars by name: ``zero`` predicts 0; ``mean`` the target of the mean latents and zero noise. ``mean`` of N
            clips is the best constant, up to 1 / N of the variance of the latents, since it includes the clip itself.
            For a flow it is 1 plus that variance.
    """
    truth = objective.target(clean, noise, t)
    average = (clean.mean(dim=0) if average is None else average).expand_as(clean)
    predictions = {"zero": torch.zeros_like(truth), "mean": objective.target(average, torch.zeros_like(noise), t)}
    return {name: (prediction - truth).square().mean() for name, prediction in predictions.items()}


def majority_share(labels: Tensor) -> float:
    """Accuracy of always predicting the most frequent class of ``labels``, long (N,)."""
    return labels.bincount().max().item() / len(labels)
