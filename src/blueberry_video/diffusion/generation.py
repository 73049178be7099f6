"""Generation of clips from captions and images: combines network, sampler, guidance and autoencoder.

Shapes: B clips, C channels, T x H x W latent frames, rows and columns.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from blueberry_video.diffusion.causal_sampling import generate_causally
from blueberry_video.diffusion.conditioning import encoded_images, pad_to_patches, replace_first, with_first_frame
from blueberry_video.diffusion.guidance import Guidance
from blueberry_video.diffusion.objectives import Objective
from blueberry_video.diffusion.samplers import Network, Sampler
from blueberry_video.diffusion.text_to_video import TextToVideo
from blueberry_video.models.text_encoder.base import TextTokens
from blueberry_video.nn.joint_attention import KeyValueCache
from blueberry_video.nn.noise import Generator, standard_normal


class GivenVideo(NamedTuple):
    """Frames that a sample depends on, besides the image condition.

    Attributes:
        history: clean first frames that the sample continues.
        start: clean frames to which noise is added, for sampling from partial noise (video-to-video).
        strength: share of the sampler's steps that are taken from ``start``.
        window: latent frames that a causal network receives at most, of videos that are longer than in training.
    """

    history: Tensor | None = None
    start: Tensor | None = None
    strength: float = 1.0
    window: int | None = None


def conditioned(
    model: TextToVideo,
    text: TextTokens,
    objective: Objective,
    image: Tensor | None,
    embedded: float | None,
    image_mask: Tensor | None = None,
) -> Network:
    """Binds text and image to a network: returns a function of latents and timesteps (B,) in [0, 1].

    Args:
        model, text, objective: see :func:`generate_latents`.
        image, image_mask: see :func:`~blueberry_video.diffusion.conditioning.with_first_frame`.
        embedded: scale of embedded guidance.
    """

    def network(latents: Tensor, t: Tensor) -> Tensor:
        latents = with_first_frame(model, latents, image, image_mask)
        return model(latents, objective.network_timestep(t), text, embedded)

    return network


def conditioned_causally(model: TextToVideo, text: TextTokens, embedded: float | None) -> Callable[..., Tensor]:
    """Binds text to a causal network, as a :class:`~blueberry_video.diffusion.causal_sampling.CausalNetwork`: returns a
    function of latents and timesteps (B, T) in [0, 1000]."""

    def network(latents: Tensor, timestep: Tensor, /, *, cache: KeyValueCache | None, first_frame: int) -> Tensor:
        latents = with_first_frame(model, latents, None)
        return model(latents, timestep, text, embedded, cache, first_frame)

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
    generator: Generator = None,
    given: GivenVideo | None = None,
) -> Tensor:
    """Samples clean latents for texts; with causal networks chunk by chunk, with a KV cache.

    Args:
        model: in evaluation mode.
        text, unconditional: encoded captions, and the unconditional text, or ``None`` if the guidance does not require
            it.
        noise: (B, C, T, H, W), standard normal.
        sampler, guidance, objective: the objective is that of training.
        image: latents (B, C, 1, H, W) of the first frame, for image-to-video networks.
        generator: generator, or one per clip, of the noise of a stochastic sampler, and of frames that are prepended to
            complete patches in time and removed after sampling.
        given: latents ``history`` (B, C, T0, H, W), for networks that are causal or were trained with a timestep per
            frame, and ``start`` (B, C, T, H, W).

    Returns:
        New frames (B, C, T, H, W).

    Raises:
        ValueError: if inputs or guidance do not match the network.
        FloatingPointError: if the network output is not finite.
    """
    if image is not None and (len(image), *image.shape[3:]) != (len(noise), *noise.shape[3:]):
        raise ValueError(
            f"image latents of {tuple(image.shape)} must match the batch, height and width of the noise, "
            f"{tuple(noise.shape)}."
        )
    if model.shape.embedded_guidance != (guidance.embedded is not None):
        raise ValueError(
            f"task.guidance is {type(guidance).__name__}, and the transformer has embedded_guidance="
            f"{model.shape.embedded_guidance}: use EmbeddedGuidance if and only if it is True."
        )
    given = given or GivenVideo()
    num_frames, chunk, scale = noise.shape[2], model.shape.causal_chunk, guidance.embedded
    start = given.start
    if missing := -num_frames % model.shape.patch_size[0]:
        if given.history is not None:
            raise ValueError(
                f"{num_frames} latent frames after the given ones are no whole patches of {model.shape.patch_size[0]} "
                f"frames: use {num_frames - num_frames % model.shape.patch_size[0]} or {num_frames + missing}."
            )
        front = standard_normal((*noise.shape[:2], missing, *noise.shape[3:]), generator, noise.device)
        noise = torch.cat([front.to(noise), noise], dim=2)
        start = None if start is None else pad_to_patches(start, model.shape.patch_size[0])
    if chunk or given.history is not None:
        if image is not None:
            raise ValueError(
                f"model.transformer.causal_chunk={chunk} with given frames does not support image conditioning: set "
                "causal_chunk=0, and pass the image alone."
            )
        causal = conditioned_causally(model, text, scale)
        base = None if unconditional is None else conditioned_causally(model, unconditional, scale)
        latents = generate_causally(
            *(causal, base, noise, chunk or None, sampler, guidance, objective, given.history, generator),
            window=given.window,
            start=start,
            strength=given.strength,
        )
    else:
        network = conditioned(model, text, objective, image, scale)
        without = None if unconditional is None else conditioned(model, unconditional, objective, image, scale)
        denoise = guidance(network, without, objective, sampler.steps)
        latents = sampler(denoise, noise, objective, generator, start, given.strength)
    if image is not None and model.shape.image_condition == "token_replace":
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
    generator: Generator = None,
    negative: Sequence[str] | None = None,
    given: GivenVideo | None = None,
) -> Tensor:
    """Generates videos (B, 3, T, H, W) in [-1, 1] from captions.

    Args:
        model: with text encoder and autoencoder, in evaluation mode.
        captions: B captions.
        shape: latent size (t, h, w) of a clip, with the given first frames; h and w are those of the images if there
            are any.
        sampler, guidance, objective: see :func:`generate_latents`.
        images: first frames (B, 3, 1, H, W) in [-1, 1]; ``None`` for text-to-video.
        generator: CPU generator of all noise, or one per clip, with which a clip does not depend on its batch.
        negative: B captions in place of the unconditional text of the guidance.
        given: pixels ``history`` (B, 3, T0, H, W) in [-1, 1], with which the videos begin, and ``start``
            (B, 3, T, H, W); see :func:`generate_latents`.

    Raises:
        ValueError, FloatingPointError: see :func:`generate_latents`; also if the model has no text encoder or no
            autoencoder.
    """
    if model.text is None or model.autoencoder is None:
        raise ValueError("model.text=null or model.autoencoder=null: generation of videos requires both.")
    like = next(model.transformer.parameters())
    image = None if images is None else encoded_images(model, images.to(like.device), generator)
    shape = shape if image is None else (shape[0], image.shape[3], image.shape[4])
    given = given or GivenVideo()
    history, start = (None if x is None else encoded(model, x, generator) for x in (given.history, given.start))
    num_frames = shape[0] - (0 if history is None else history.shape[2])
    noise = standard_normal((len(captions), model.shape.out_channels, num_frames, *shape[1:]), generator, like.device)
    text = model.text(list(captions))
    unconditional = None
    if guidance.unconditional:
        unconditional = model.unconditional(len(captions)) if negative is None else model.text(list(negative))
    given = given._replace(history=history, start=start)
    latents = generate_latents(model, text, unconditional, noise, sampler, guidance, objective, image, generator, given)
    return model.autoencoder.decode(latents if history is None else torch.cat([history.to(latents), latents], dim=2))


def encoded(model: TextToVideo, video: Tensor, generator: Generator = None) -> Tensor:
    """Encodes videos (B, 3, T, H, W) in [-1, 1] to latents (B, C, t, h, w).

    Raises:
        ValueError: if there is no autoencoder.
    """
    if model.autoencoder is None:
        raise ValueError("model.autoencoder=null cannot encode a video: choose model/autoencoder=….")
    like = next(model.transformer.parameters())
    with torch.no_grad():
        return model.autoencoder.latents(model.autoencoder.encode(video.to(like.device)), generator)
