"""Clips of captions, and of images: what joins a trained network, a sampler, a guidance and an autoencoder.

Letters: B clips, C channels, T H W frames, rows and columns of latents.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from blueberry_video.diffusion.causal_sampling import generate_causally
from blueberry_video.diffusion.conditioning import (
    encoded_images,
    num_conditioning_frames,
    replace_first,
    with_first_frame,
)
from blueberry_video.diffusion.guidance import Guidance
from blueberry_video.diffusion.objectives import Objective
from blueberry_video.diffusion.samplers import Network, Sampler
from blueberry_video.diffusion.text_to_video import TextToVideo
from blueberry_video.models.text_encoder.base import TextTokens
from blueberry_video.nn.joint_attention import KeyValueCache
from blueberry_video.nn.noise import standard_normal


def conditioned(
    model: TextToVideo,
    text: TextTokens,
    objective: Objective,
    image: Tensor | None,
    embedded: float | None,
    shown: Tensor | None = None,
) -> Network:
    """The network with its text and image, as a sampler asks it: latents and times (B,) in [0, 1] -> output.

    Args:
        model, text, objective: as for :func:`generate_latents`.
        image, shown: see :func:`~blueberry_video.diffusion.conditioning.with_first_frame`.
        embedded: the scale that a network with embedded guidance is told.
    """

    def network(latents: Tensor, t: Tensor) -> Tensor:
        given = with_first_frame(model, latents, image, shown)
        return model(given, objective.network_timestep(t), text, _scales(embedded, latents))

    return network


def conditioned_causally(model: TextToVideo, text: TextTokens, embedded: float | None) -> Callable[..., Tensor]:
    """The causal network with its text, as :func:`~blueberry_video.diffusion.causal_sampling.generate_causally` asks
    it: latents and times (B, T) in [0, 1000] -> output."""

    def network(latents: Tensor, time: Tensor, /, *, cache: KeyValueCache | None, first_frame: int) -> Tensor:
        given = with_first_frame(model, latents, None)
        return model(given, time, text, _scales(embedded, latents), cache, first_frame)

    return network


@torch.no_grad()
def generate_latents(
    model: TextToVideo,
    text: TextTokens,
    unconditional: TextTokens | None,
    noise: Tensor,
    sampler: Sampler,
    guidance: Guidance,
    objective: Objective,
    image: Tensor | None = None,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Clean latents of texts.

    Args:
        model: in evaluation mode.
        text, unconditional: encoded captions, and what stands for none; ``None`` where the guidance does not need it.
        noise: (B, C, T, H, W), standard normal.
        sampler, guidance, objective: the last as in training.
        image: latents (B, C, 1, H, W) of the first frame, of an image-to-video network.
        generator: of the noise that a stochastic sampler adds, and of the frames that fill up patches of several: in
            front, as in training, and taken away again.

    Returns:
        (B, C, T, H, W). Of a causal network they are made chunk by chunk, with a cache.

    Raises:
        ValueError: if something does not fit the network.
        FloatingPointError: the sampler's, where the network gives NaN.
    """
    if image is not None and (len(image), *image.shape[3:]) != (len(noise), *noise.shape[3:]):
        raise ValueError(
            f"the image's latents are {tuple(image.shape)} and the noise is {tuple(noise.shape)}: give every clip one "
            "image, of its size."
        )
    if model.shape.embedded_guidance != (guidance.embedded is not None):
        raise ValueError(
            f"task.guidance is {type(guidance).__name__}, and the transformer has embedded_guidance="
            f"{model.shape.embedded_guidance}: such a network needs EmbeddedGuidance, and no other takes it."
        )
    num_frames, chunk, scale = noise.shape[2], model.shape.causal_chunk, guidance.embedded
    if missing := -num_frames % model.shape.patch_size[0]:
        front = standard_normal((*noise.shape[:2], missing, *noise.shape[3:]), generator, noise.device)
        noise = torch.cat([front.to(noise), noise], dim=2)
    if chunk:
        if image is not None:
            raise ValueError(
                "a causal network goes on from frames, not from an image: model.transformer.causal_chunk=0."
            )
        told = conditioned_causally(model, text, scale)
        base = None if unconditional is None else conditioned_causally(model, unconditional, scale)
        latents = generate_causally(told, base, noise, chunk, sampler, guidance, objective, generator=generator)
    else:
        told = conditioned(model, text, objective, image, scale)
        base = None if unconditional is None else conditioned(model, unconditional, objective, image, scale)
        latents = sampler(guidance(told, base, objective, sampler.steps), noise, objective, generator)
    if image is not None and num_conditioning_frames(model, image):
        latents = replace_first(latents, image)
    return latents[:, :, latents.shape[2] - num_frames :]


def generate(
    model: TextToVideo,
    captions: Sequence[str],
    shape: tuple[int, int, int],
    sampler: Sampler,
    guidance: Guidance,
    objective: Objective,
    images: Tensor | None = None,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Videos (B, 3, T, H, W) in [-1, 1] of captions.

    Args:
        model: with text encoder and autoencoder, in evaluation mode.
        captions: B of them.
        shape: latents (t, h, w) of a clip; with images, h and w are theirs.
        sampler, guidance, objective: as for :func:`generate_latents`.
        images: (B, 3, 1, H, W) in [-1, 1], with which the videos begin; ``None``: captions are all there is.
        generator: of all noise, on the CPU.

    Raises:
        ValueError: the model has no text encoder or no autoencoder.
        ValueError, FloatingPointError: what :func:`generate_latents` raises.
    """
    if model.text is None or model.autoencoder is None:
        raise ValueError("a model with text=null or autoencoder=null cannot make videos of captions: give it both.")
    like = next(model.transformer.parameters())
    image = None if images is None else encoded_images(model, images.to(like.device), generator)
    shape = shape if image is None else (shape[0], image.shape[3], image.shape[4])
    noise = standard_normal((len(captions), model.shape.out_channels, *shape), generator, like.device)
    text = model.text(list(captions))
    unconditional = model.unconditional(len(captions)) if guidance.unconditional else None
    made = generate_latents(model, text, unconditional, noise, sampler, guidance, objective, image, generator)
    return model.autoencoder.decode(made)


def _scales(embedded: float | None, latents: Tensor) -> Tensor | None:
    """The scale of the guidance for every clip (B,) of ``latents``."""
    if embedded is None:
        return None
    return torch.full((len(latents),), embedded, dtype=torch.float32, device=latents.device)
