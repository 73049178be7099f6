"""Encoding of clips for training on stored latents: moments of the latents, and encoded captions."""

from typing import Any

import torch

from blueberry_video.diffusion.text_to_video import Transformer
from blueberry_video.models.autoencoder.base import Autoencoder
from blueberry_video.models.text_encoder.base import TextEncoder


@torch.no_grad()
def encode(
    clip: dict[str, Any],
    autoencoder: Autoencoder,
    text: TextEncoder | None,
    dtype: torch.dtype,
    patch_size: tuple[int, int] = (1, 1),
    image: bool = False,
) -> dict[str, Any]:
    """Encodes one clip for ``data.latents.LatentClips``, independently of all other clips.

    Args:
        clip: ``video`` uint8 (T, 3, H, W) and ``caption``; ``id``, ``labels`` and ``fps`` are kept.
        autoencoder, text: in evaluation mode; without a text encoder only the caption is stored.
        dtype: dtype of moments and text.
        patch_size: rows and columns of latents per patch of the network.
        image: also encode the first frame separately, as ``image_moments`` (2C, 1, h, w).

    Raises:
        ValueError: if it has no caption, or an unsupported size; the message names the clip.
    """
    name = clip.get("id", "a clip")
    if not clip.get("caption"):
        raise ValueError(
            f"the clip {name!r} has no caption, which text-to-video models require: add it to the metadata of the "
            "dataset, or remove the clip."
        )
    frames, _, height, width = clip["video"].shape
    check_size(f"the clip {name!r}", (frames, height, width), autoencoder, patch_size)
    like = next(autoencoder.parameters(), torch.empty(0))
    video = clip["video"].transpose(0, 1)[None].to(like.device).float() / 127.5 - 1  # (1, 3, T, H, W)
    encoded: dict[str, Any] = {key: clip[key] for key in ("id", "caption", "labels", "fps") if key in clip}
    encoded["moments"] = autoencoder.encode(video.to(like.dtype))[0].to(dtype)
    if image:
        encoded["image_moments"] = autoencoder.encode(video[:, :, :1].to(like.dtype))[0].to(dtype)
    if text is not None:
        tokens, mask, pooled = text([clip["caption"]])
        encoded |= {"text_tokens": tokens[0].to(dtype), "text_mask": mask[0]}
        encoded |= {} if pooled is None else {"text_pooled": pooled[0].to(dtype)}
    return encoded


def encodes_image(network: Transformer, autoencoder: Autoencoder) -> bool:
    """Returns whether image conditioning requires latents that differ from the first latent frame of the clip."""
    return network.image_condition is not None and not autoencoder.first_frame_alone


def check_size(name: str, size: tuple[int, int, int], autoencoder: Autoencoder, patch_size: tuple[int, int]) -> None:
    """Checks that autoencoder and network support clips of (frames, height, width) in pixels; errors begin with
    ``name``."""
    try:
        autoencoder.check(*size, patch_size)
    except ValueError as error:
        raise ValueError(f"{name} has an unsupported size: {error}") from error
