"""Conditioning of a diffusion network on a batch: latents of clips and first frames, and encoded captions.

Shapes: B clips, C channels, T x H x W latent frames, rows and columns.
"""

import zlib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from blueberry_video.diffusion.image_noise import ImageNoise, image_channels
from blueberry_video.diffusion.text_to_video import TextToVideo, map_text
from blueberry_video.diffusion.timesteps import TimestepSampler
from blueberry_video.installation import start_command
from blueberry_video.models.autoencoder.base import fingerprint, sample
from blueberry_video.models.text_encoder.base import TextTokens
from blueberry_video.nn.noise import Generator


def takes_image(model: TextToVideo, dropout: float) -> bool:
    """Returns whether a network trained with this image ``dropout`` is ever conditioned on an image."""
    kind = model.shape.image_condition
    return kind is not None and not (kind == "optional" and dropout == 1)


def check_settings(
    model: TextToVideo, caption_dropout: float, image_dropout: float, frame_timesteps: TimestepSampler | None
) -> None:
    """Checks the training settings of a network.

    Args:
        caption_dropout, image_dropout: shares of the clips.
        frame_timesteps: timestep sampler if every frame has its own timestep; ``None`` for one timestep per clip.

    Raises:
        ValueError: for a share outside [0, 1], a causal network with one timestep per clip, or stratified timesteps of
            frames.
    """
    for key, share in (("caption", caption_dropout), ("image", image_dropout)):
        if not 0 <= share <= 1:
            raise ValueError(f"task.{key}_dropout={share} must be between 0 and 1.")
    if model.shape.causal_chunk and frame_timesteps is None:
        raise ValueError(
            f"model.transformer.causal_chunk={model.shape.causal_chunk} requires one timestep per frame in training, "
            "because sampling continues from clean frames: set task.frame_timesteps=true, or causal_chunk=0."
        )
    if frame_timesteps is not None and frame_timesteps.stratified:
        raise ValueError(
            "task.timesteps.stratified=true requires one timestep per clip, and task.frame_timesteps=true draws one "
            "per frame: set one of them to false."
        )


def num_conditioning_frames(model: TextToVideo, image: Tensor | None) -> int:
    """Returns the number of leading latent frames that are input, not prediction: 1 for ``token_replace``, else 0."""
    return int(image is not None and model.shape.image_condition == "token_replace")


def with_first_frame(
    model: TextToVideo, noisy: Tensor, image: Tensor | None, image_mask: Tensor | None = None
) -> Tensor:
    """Adds the image conditioning to noisy latents.

    Args:
        noisy: latents (B, C, T, H, W).
        image: latents (B, C, 1, H, W) of the first frame.
        image_mask: bool (B,), False to replace the image, and the channel that marks it, by zeros; ``None`` for all
            True.

    Returns:
        Network input (B, in_channels, T, H, W).

    Raises:
        ValueError: if the network requires an image and there is none, or the reverse.
    """
    kind = model.shape.image_condition
    if kind != "optional" and (kind is None) != (image is None):
        raise ValueError(
            f"{type(model.transformer).__name__} with in_channels={model.shape.in_channels} and image_condition={kind} "
            f"received {'no image' if image is None else 'an image'}: image-to-video requires an image and a network "
            "with image conditioning."
        )
    if image is None:
        return F.pad(noisy, (0, 0, 0, 0, 0, 0, 0, model.shape.in_channels - noisy.shape[1]))
    image = image.to(noisy)
    scale = 1 if image_mask is None else image_mask.to(noisy).view(-1, 1, 1, 1, 1)
    if kind == "token_replace":
        return replace_first(noisy, image * scale)
    if kind == "channels":
        condition = image_channels(image, noisy.shape[2])
    else:
        condition = concat_image(noisy, image)[:, noisy.shape[1] :]
    return torch.cat([noisy, condition * scale], dim=1)


def concat_image(latents: Tensor, image: Tensor) -> Tensor:
    """Concatenates the image conditioning of ``latent_concat`` networks along channels.

    Args:
        latents: noisy latents (B, C, T, H, W).
        image: clean latents (B, C, 1, H, W) of the first frame.

    Returns:
        (B, 2 C + 1, T, H, W): latents, image zero-padded to T frames, and a mask channel that is 1 in the first frame.
    """
    image = torch.cat([image.to(latents), torch.ones_like(latents[:, :1, :1])], dim=1)
    return torch.cat([latents, image_channels(image, latents.shape[2])], dim=1)


def replace_first(latents: Tensor, image: Tensor) -> Tensor:
    """Replaces the first frame of (B, C, T, H, W) by clean latents (B, C, 1, H, W), for ``token_replace`` networks.

    The network output at that frame is ignored in training and sampling.
    """
    return torch.cat([image.to(latents.dtype), latents[:, :, 1:]], dim=2)


def pad_to_patches(latents: Tensor, tubelet: int) -> Tensor:
    """Prepends copies of the first frame to latents (B, C, T, H, W) until ``tubelet`` divides T, as in the training of
    CogVideoX 1.5."""
    missing = -latents.shape[2] % tubelet
    return torch.cat([latents[:, :, :1].expand(-1, -1, missing, -1, -1), latents], dim=2) if missing else latents


def latents_of(
    model: TextToVideo, batch: dict, generator: Generator, image_noise: ImageNoise | None = None, dropout: float = 0.0
) -> tuple[Tensor, Tensor | None]:
    """Returns the latents of a batch and of its first frames.

    Args:
        model: requires an autoencoder, unless the batch has ``moments``.
        batch: ``id``, and ``video`` float (B, 3, T, H, W) in [0, 1], or ``moments`` (B, 2C, t, h, w) of its latents
            and, for image conditioning, ``image_moments`` (B, 2C, 1, h, w) of the first frame encoded separately.
        generator: for sampling latents from their distribution, one or one per clip; ``None`` for torch's global one.
        image_noise: noise on the pixels of the first frame, added before encoding.
        dropout: image dropout, see :func:`takes_image`.

    Returns:
        Normalized latents (B, C, t, h, w), with t a multiple of the patch size, and those of the first frame
        (B, C, 1, h, w), or ``None`` without image conditioning. Networks with optional image conditioning receive no
        image for clips of a single frame.

    Raises:
        ValueError: if there is no autoencoder, or latents are NaN (the message names the clips); see
            :func:`check_image`.
    """
    autoencoder = model.autoencoder
    with torch.no_grad():
        if "moments" in batch:
            moments = batch["moments"]
        elif autoencoder is None:
            raise ValueError("model.autoencoder=null requires data=latents: choose that, or model/autoencoder=….")
        else:
            moments = autoencoder.encode(batch["video"] * 2 - 1)
        latents = (sample if autoencoder is None else autoencoder.latents)(moments, generator)
    if not (finite := latents.isfinite().flatten(1).all(dim=1)).all():
        names = ", ".join(str(name) for name, good in zip(batch["id"], finite.tolist()) if not good)
        raise ValueError(
            f"the latents of the clips {names} are NaN or infinite: check these clips, encode in float32 or bfloat16 "
            "rather than float16, and recompute stored latents."
        )
    image = None
    if takes_image(model, dropout) and (latents.shape[2] > 1 or model.shape.image_condition != "optional"):
        check_image(model, latents.shape[2], batch, image_noise)
        with torch.no_grad():
            image_moments = _image_moments(model, batch, moments, image_noise)
            image = (sample if autoencoder is None else autoencoder.image_latents)(image_moments, generator)
    return pad_to_patches(latents, model.shape.patch_size[0]), image


def first_frames(model: TextToVideo, batch: dict, generator: Generator = None) -> Tensor:
    """Returns the first frames (B, 3, 1, H, W) of a batch in [-1, 1], decoded if latents are stored.

    Raises:
        ValueError: if there is no autoencoder to decode with.
    """
    if "moments" not in batch:
        return batch["video"][:, :, :1] * 2 - 1
    if model.autoencoder is None:
        raise ValueError("model.autoencoder=null cannot decode stored latents: choose model/autoencoder=….")
    moments = batch["image_moments"] if "image_moments" in batch else batch["moments"][:, :, :1]
    with torch.no_grad():
        return model.autoencoder.decode(model.autoencoder.latents(moments, generator))


def encoded_images(model: TextToVideo, images: Tensor, generator: Generator = None) -> Tensor:
    """Encodes images (B, 3, 1, H, W) in [-1, 1] to latents (B, C, 1, h, w) for image conditioning.

    Raises:
        ValueError: if there is no autoencoder, or the images have a different shape.
    """
    if model.autoencoder is None or images.ndim != 5 or images.shape[1:3] != (3, 1):
        raise ValueError(
            f"images of {tuple(images.shape)} with model.autoencoder={type(model.autoencoder).__name__} must be "
            "(B, 3, 1, H, W) in [-1, 1], and require an autoencoder."
        )
    with torch.no_grad():
        return model.autoencoder.image_latents(model.autoencoder.encode(images), generator)


def check_image(model: TextToVideo, num_frames: int, clip: Mapping[str, Any], image_noise: ImageNoise | None) -> None:
    """Checks that clips with ``num_frames`` latent frames support image conditioning.

    Args:
        clip: a clip or a batch; stored latents have ``moments``.

    Raises:
        ValueError: if the network is causal, ``image_noise`` is set but there are no pixels, no frame is left to
            predict, or stored latents lack those of the first frame encoded separately.
    """
    stored = "moments" in clip
    if model.shape.causal_chunk:
        raise ValueError(
            f"model.transformer.causal_chunk={model.shape.causal_chunk} does not support image conditioning: set "
            "causal_chunk=0, or for HunyuanVideo-1.5 task.image_dropout=1, which trains on text alone."
        )
    if stored and image_noise is not None:
        raise ValueError(
            "task.image_noise is added to pixels, which stored latents do not have: set task.image_noise=null, or "
            "train on clips instead of data=latents."
        )
    if num_frames == 1 and model.shape.image_condition == "token_replace":
        raise ValueError(
            "model.transformer.image_condition=token_replace replaces the first latent frame by the image, and the "
            "clips have only num_frames=1: use longer clips."
        )
    exact = model.autoencoder is not None and model.autoencoder.first_frame_alone
    if stored and "image_moments" not in clip and not exact:
        raise ValueError(
            "the stored latents have no `image_moments`, the first frame encoded separately, which image conditioning "
            "requires; they differ from the latents of a whole clip, because the norms of the autoencoder span frames. "
            f"Run `{start_command('latents', '…', OUT='<new folder>')}` with this network again."
        )


def _image_moments(model: TextToVideo, batch: dict, moments: Tensor, image_noise: ImageNoise | None) -> Tensor:
    """Returns moments (B, 2C, 1, h, w) of the first frames of a batch that passed :func:`check_image`."""
    autoencoder = model.autoencoder
    if "image_moments" in batch:
        return batch["image_moments"]
    if "moments" in batch or autoencoder is None or (image_noise is None and autoencoder.first_frame_alone):
        return moments[:, :, :1]
    frames = batch["video"][:, :, :1] * 2 - 1
    return autoencoder.encode(frames if image_noise is None else image_noise(frames))


def text_of(model: TextToVideo, batch: dict) -> TextTokens:
    """Returns the encoded captions of a batch.

    They are ``text_tokens``, ``text_mask`` and ``text_pooled`` if stored, else ``caption`` encoded by the model.

    Raises:
        ValueError: if there is no text encoder, or clips have no caption (the message names them).
    """
    captions = batch.get("caption", [""] * len(batch["id"]))
    if missing := [str(name) for name, caption in zip(batch["id"], captions) if not caption]:
        raise ValueError(
            f"the clips {', '.join(missing)} have no caption, which text-to-video models require: add it to the "
            "metadata of the dataset, or remove the clips."
        )
    if "text_tokens" in batch:
        return TextTokens(batch["text_tokens"], batch["text_mask"], batch.get("text_pooled"))
    if model.text is None:
        raise ValueError("model.text=null requires clips with encoded text: choose a model.text.")
    return model.text(list(captions))


def drop_captions(model: TextToVideo, text: TextTokens, dropout: float) -> TextTokens:
    """Replaces a share ``dropout`` of the captions, drawn by torch's global CPU generator, by the unconditional text.

    Without a text encoder, the unconditional text is zeros.
    """
    if not dropout or not (drawn := torch.rand(len(text.mask), dtype=torch.float32) < dropout).any():
        return text
    dropped = drawn.to(text.mask.device)
    if model.text is None:
        zeros = map_text(torch.zeros_like, text)
        empty = zeros._replace(mask=torch.ones_like(text.mask))
    else:
        empty = model.unconditional(1)
    return map_text(lambda a, b: torch.where(dropped.view(-1, *[1] * (a.ndim - 1)), b.to(a), a), text, empty)


def draw_image_mask(image: Tensor | None, dropout: float) -> Tensor | None:
    """Draws a bool mask (B,) that is False for a share ``dropout`` of the images (B, C, 1, H, W); ``None`` for all
    True."""
    if image is None or not dropout:
        return None
    return torch.rand(len(image), device=image.device, dtype=torch.float32) >= dropout


def mismatched_text(model: TextToVideo, batch: dict, text: TextTokens, spare: Sequence[dict]) -> TextTokens | None:
    """Returns a different caption for every clip, as a control.

    It is one of ``spare`` that the id of the clip selects; without ``spare``, the nearest different caption before the
    clip in the batch, cyclically.

    Args:
        model: requires a text encoder, unless ``spare`` is encoded.
        batch, text: batch with ``caption``, and the encoded captions.
        spare: see :func:`different_captions`.

    Returns:
        ``None`` if there is no different caption.
    """
    captions = batch["caption"]
    size, device = len(captions), text.mask.device
    if spare:
        chosen = []
        for name, caption in zip(batch.get("id", captions), captions, strict=True):
            first = zlib.crc32(str(name).encode()) % len(spare)
            chosen.append(next(clip for clip in (*spare[first:], *spare) if clip["caption"] != [caption]))
        clips = {key: [clip[key][0] for clip in chosen] for key in chosen[0]}
        encoded = {key: torch.stack(values).to(device) for key, values in clips.items() if key.startswith("text_")}
        return text_of(model, {**clips, **encoded})
    if len(set(captions)) == 1:
        return None
    nearest = [next(i - k for k in range(1, size) if captions[i - k] != captions[i]) for i in range(size)]
    indices = torch.tensor(nearest, device=device) % size
    return map_text(lambda part: part[indices], text)


def different_captions(dataset: Any) -> list[dict]:
    """Returns up to 16 clips with different captions, each as a batch of one for :func:`text_of`.

    At least one of them differs from the caption of any clip; the list is empty if all captions are equal. If two are
    found, the search ends after 256 clips.
    """
    captions = iter(captions_of(dataset))
    first = next(captions)
    if all(caption == first for caption in captions):
        return []
    found: dict[str, dict] = {}
    if hasattr(dataset, "made_of"):  # stored text may be encoded
        clips: Iterable[dict] = map(dataset.__getitem__, range(len(dataset)))
    else:
        clips = ({"id": caption, "caption": caption} for caption in captions_of(dataset))
    for number, clip in enumerate(clips):
        if len(found) == 16 or (len(found) > 1 and number >= 256):
            break
        encoded = {key: value[None] for key, value in clip.items() if key.startswith("text_")}
        found.setdefault(clip["caption"], {"id": [clip["id"]], "caption": [clip["caption"]], **encoded})
    return list(found.values())


def captions_of(dataset: Any) -> Iterable[str]:
    """Returns the captions of all clips of a dataset, without loading clips where possible."""
    if hasattr(dataset, "captions"):
        return dataset.captions()
    if hasattr(dataset, "rows"):
        return (row.caption or "" for row in dataset.rows)
    return (dataset[index].get("caption", "") for index in range(len(dataset)))


def latent_size(data: Any, clip: dict, model: TextToVideo) -> tuple[int, int, int]:
    """Returns the latent size (t, h, w) of a validation clip, the size of samples, and checks all datasets.

    Args:
        data: data module with ``train``, ``val`` and ``test``.
        clip: first clip of ``val``.

    Raises:
        ValueError: if the model does not support the size of the clip or of a bucket (which is named), or stored
            latents or text are of a different autoencoder or text encoder.
    """
    for dataset in filter(None, (data.train, data.val, data.test)):
        for name, size in getattr(dataset, "sizes", {}).items():
            try:
                if hasattr(dataset, "made_of"):  # stored latents
                    model.check_latents(size)
                else:
                    model.check_clip(*size)
            except ValueError as error:
                raise ValueError(f"the bucket {name} does not match the model: {error}") from error
    if "moments" not in clip:
        frames, _, height, width = clip["video"].shape
        return model.check_clip(frames, height, width)
    for key, part in (("autoencoder", model.autoencoder), ("text", model.text)):
        writer = data.train.made_of[key]
        own = None if part is None else f"{type(part).__name__}/{fingerprint(part)}"
        if None not in (writer, own) and writer != own:
            raise ValueError(
                f"{data.train.folder} was written by {writer}, and model.{key} is {own}: choose the {key} that wrote "
                f"it, or run `{start_command('latents', '…', OUT='<new folder>')}` again."
            )
    t, h, w = clip["moments"].shape[1:]
    model.check_latents((t, h, w))
    return t, h, w
