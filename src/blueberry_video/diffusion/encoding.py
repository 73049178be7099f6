"""A clip as what a diffusion network is trained on: the moments of its latents, and its encoded caption."""

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
    """A clip as ``data.latents.LatentClips`` gives it back: its moments, its text, and all that is no picture of it.

    One at a time, so that no other clip has a part in what it becomes.

    Args:
        clip: with ``video`` uint8 (T, 3, H, W) and ``caption``.
        autoencoder, text: in evaluation mode; of no text encoder the caption alone is kept.
        dtype: of moments and text.
        patch_size: rows and columns of latents that the network takes together.
        image: also encode the first frame alone, as ``image_moments`` (2C, 1, h, w).

    Raises:
        ValueError: it has no caption, or is of a size that autoencoder or network cannot take; the message names it.
    """
    name = clip.get("id", "a clip")
    if not clip.get("caption"):
        raise ValueError(
            f"the clip {name!r} has no caption, and a text-to-video model needs one for each: add it to the metadata "
            "of the dataset, or leave the clip out."
        )
    frames, _, height, width = clip["video"].shape
    check_size(f"the clip {name!r}", (frames, height, width), autoencoder, patch_size)
    like = next(autoencoder.parameters(), torch.empty(0))
    video = clip["video"].transpose(0, 1)[None].to(like.device).float() / 127.5 - 1  # (1, 3, T, H, W)
    kept: dict[str, Any] = {key: clip[key] for key in ("id", "caption", "labels", "fps") if key in clip}
    kept["moments"] = autoencoder.encode(video.to(like.dtype))[0].to(dtype)
    if image:
        kept["image_moments"] = autoencoder.encode(video[:, :, :1].to(like.dtype))[0].to(dtype)
    if text is not None:
        tokens, mask, pooled = text([clip["caption"]])
        kept |= {"text_tokens": tokens[0].to(dtype), "text_mask": mask[0]}
        kept |= {} if pooled is None else {"text_pooled": pooled[0].to(dtype)}
    return kept


def encodes_image(network: Transformer, autoencoder: Autoencoder) -> bool:
    """Whether a network is given a first frame whose latents are others than the first of the clip's."""
    return network.image_condition is not None and not autoencoder.first_frame_alone


def check_size(what: str, size: tuple[int, int, int], autoencoder: Autoencoder, patch_size: tuple[int, int]) -> None:
    """Checks that autoencoder and network accept clips of a size (frames, height, width) in pixels; the error begins
    with ``what``."""
    try:
        autoencoder.check(*size, patch_size)
    except ValueError as error:
        raise ValueError(f"{what} does not fit: {error}") from error
