"""What a diffusion network is given of a batch: latents of its clips, of the first frame, and text.

Letters: B clips, C channels, T H W frames, rows and columns of latents.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from blueberry_video.diffusion.image_noise import ImageNoise, image_channels
from blueberry_video.diffusion.text_to_video import TextToVideo, repeated
from blueberry_video.diffusion.timesteps import TimestepSampler
from blueberry_video.models.autoencoder.base import fingerprint, sample
from blueberry_video.models.text_encoder.base import TextTokens


def takes_image(model: TextToVideo, dropout: float) -> bool:
    """Whether a network that is trained with this ``dropout`` is ever given an image."""
    how = model.shape.image_condition
    return how is not None and not (how == "optional" and dropout == 1)


def check_settings(
    model: TextToVideo, caption_dropout: float, image_dropout: float, frame_times: TimestepSampler | None
) -> None:
    """Judges how a network is to be trained.

    Args:
        caption_dropout, image_dropout: shares of the clips.
        frame_times: what draws a time for every frame; ``None`` where clips have one.

    Raises:
        ValueError: a share outside [0, 1]; a causal network without times of frames; stratified ones.
    """
    for key, share in (("caption", caption_dropout), ("image", image_dropout)):
        if not 0 <= share <= 1:
            raise ValueError(f"task.{key}_dropout={share} is a share of the clips: from 0 to 1.")
    if model.shape.causal_chunk and frame_times is None:
        raise ValueError(
            "model.transformer.causal_chunk goes on from clean frames, so frames must have times of their own in "
            "training, too: task.frame_times=true, or causal_chunk=0."
        )
    if frame_times is not None and frame_times.stratified:
        raise ValueError(
            "task.times.stratified=true spreads the times of clips evenly, and task.frame_times=true draws one for "
            "every frame: set one of them to false."
        )


def given_frames(model: TextToVideo, image: Tensor | None) -> int:
    """Latent frames at the front that the network is given and does not make: 1 with ``token_replace``, else 0."""
    return int(image is not None and model.shape.image_condition == "token_replace")


def with_first_frame(model: TextToVideo, noisy: Tensor, image: Tensor | None, shown: Tensor | None = None) -> Tensor:
    """What the network is given.

    Args:
        noisy: latents (B, C, T, H, W).
        image: latents (B, C, 1, H, W) of the first frame.
        shown: bool (B,), the clips whose image the network is told of; it sees zeros instead of the others', also in
            the channel that marks an image. ``None``: all.

    Returns:
        (B, in_channels, T, H, W).

    Raises:
        ValueError: if it takes an image and there is none, or the reverse.
    """
    how = model.shape.image_condition
    if how != "optional" and (how is None) != (image is None):
        raise ValueError(
            f"{type(model.transformer).__name__} with in_channels={model.shape.in_channels} and image condition {how} "
            f"was given {'no image' if image is None else 'an image'}: image-to-video needs an image and a network "
            "made for it."
        )
    if image is None:
        missing = model.shape.in_channels - noisy.shape[1]
        return torch.cat([noisy, noisy.new_zeros(len(noisy), missing, *noisy.shape[2:])], dim=1) if missing else noisy
    image = image.to(noisy)
    share = None if shown is None else shown.to(noisy).view(-1, 1, 1, 1, 1)
    if how == "token_replace":
        return replace_first(noisy, image if share is None else image * share)
    if how == "channels":
        told = image_channels(image, noisy.shape[2])
    else:
        told = concat_image(noisy, image)[:, noisy.shape[1] :]
    return torch.cat([noisy, told if share is None else told * share], dim=1)


def concat_image(latents: Tensor, image: Tensor) -> Tensor:
    """Input of a ``latent_concat`` model: noisy latents (B, C, T, H, W), the clean latent of the first frame
    (B, C, 1, H, W) zero-padded to T frames, and a mask channel, 1 in that frame: (B, 2 C + 1, T, H, W)."""
    given, known = torch.zeros_like(latents), torch.zeros_like(latents[:, :1])
    given[:, :, :1], known[:, :, :1] = image, 1
    return torch.cat([latents, given, known], dim=1)


def replace_first(latents: Tensor, image: Tensor) -> Tensor:
    """What a ``token_replace`` model sees: the clean latent (B, C, 1, H, W) as first frame of (B, C, T, H, W).

    The output at that frame means nothing: it is neither trained nor sampled.
    """
    return torch.cat([image.to(latents.dtype), latents[:, :, 1:]], dim=2)


def whole_patches(latents: Tensor, tubelet: int) -> Tensor:
    """Latents (B, C, T, H, W) with the first frame repeated in front until ``tubelet`` divides T, as CogVideoX 1.5 was
    trained; nothing is added where it does."""
    missing = -latents.shape[2] % tubelet
    return torch.cat([latents[:, :, :1].expand(-1, -1, missing, -1, -1), latents], dim=2) if missing else latents


def latents_of(
    model: TextToVideo,
    batch: dict,
    generator: torch.Generator | None,
    image_noise: ImageNoise | None = None,
    dropout: float = 0.0,
) -> tuple[Tensor, Tensor | None]:
    """What a network models of a batch.

    Args:
        model: with an autoencoder, unless the batch has ``moments``.
        batch: ``video`` float (B, 3, T, H, W) in [0, 1], or the ``moments`` (B, 2C, t, h, w) of its latents and, for
            the network to see, ``image_moments`` (B, 2C, 1, h, w), of the first frame encoded alone; ``id``.
        generator: of the draw from the distribution of the latents; ``None``: torch's global one.
        image_noise: put on the pixels of the first frame before it is encoded for the network to see.
        dropout: of images, see :func:`takes_image`.

    Returns:
        Latents (B, C, t, h, w), normalised for the network, t a multiple of its patches; and those of the first frame
        (B, C, 1, h, w), where the network is given one. A network that can do without is given none of clips of a
        single frame.

    Raises:
        ValueError: there is no autoencoder; latents are NaN (the message names the clips); see :func:`check_image`.
    """
    autoencoder = model.autoencoder
    if autoencoder is None and "moments" not in batch:
        raise ValueError("model.autoencoder=null requires stored latents: choose data=latents, or model/autoencoder=….")
    with torch.no_grad():
        stored = autoencoder is None or "moments" in batch
        moments = batch["moments"] if stored else autoencoder.encode(batch["video"] * 2 - 1)
        latents = (sample if autoencoder is None else autoencoder.latents)(moments, generator)
    if not (finite := latents.isfinite().flatten(1).all(dim=1)).all():
        names = ", ".join(str(name) for name, good in zip(batch["id"], finite.tolist()) if not good)
        raise ValueError(
            f"the latents of the clips {names} are NaN or infinite: check these clips, encode in float32 or bfloat16 "
            "rather than float16, and make stored latents again."
        )
    image = None
    if takes_image(model, dropout) and (latents.shape[2] > 1 or model.shape.image_condition != "optional"):
        check_image(model, latents.shape[2], batch, image_noise)
        with torch.no_grad():
            of_frame = _image_moments(model, batch, moments, image_noise)
            image = (sample if autoencoder is None else autoencoder.image_latents)(of_frame, generator)
    return whole_patches(latents, model.shape.patch_size[0]), image


def first_frames(model: TextToVideo, batch: dict, generator: torch.Generator | None = None) -> Tensor:
    """First frames (B, 3, 1, H, W) in [-1, 1] of a batch; decoded by the autoencoder where latents are stored.

    Raises:
        ValueError: there is no autoencoder for that.
    """
    if "moments" not in batch:
        return batch["video"][:, :, :1] * 2 - 1
    if model.autoencoder is None:
        raise ValueError(
            "model.autoencoder=null cannot decode stored latents: choose an autoencoder (model/autoencoder=…)."
        )
    of_frame = batch["image_moments"] if "image_moments" in batch else batch["moments"][:, :, :1]
    with torch.no_grad():
        return model.autoencoder.decode(model.autoencoder.latents(of_frame, generator))


def encoded_images(model: TextToVideo, images: Tensor, generator: torch.Generator | None = None) -> Tensor:
    """Latents (B, C, 1, h, w) of pictures (B, 3, 1, H, W) in [-1, 1], as the network is given them.

    Raises:
        ValueError: there is no autoencoder, or the pictures have another shape.
    """
    if model.autoencoder is None or images.ndim != 5 or images.shape[1:3] != (3, 1):
        raise ValueError(
            f"images of {tuple(images.shape)} with model.autoencoder={type(model.autoencoder).__name__} must be "
            "(B, 3, 1, H, W) in [-1, 1], clips of one frame, for an autoencoder to encode."
        )
    with torch.no_grad():
        return model.autoencoder.image_latents(model.autoencoder.encode(images), generator)


def check_image(model: TextToVideo, num_frames: int, clip: Mapping[str, Any], image_noise: ImageNoise | None) -> None:
    """Judges whether clips, of so many latent frames, can be shown to a network that takes an image.

    Args:
        clip: one of them, or a batch; those that come as latents have ``moments``.

    Raises:
        ValueError: the network is causal; there are no pixels that could be made noisy; nothing is left to be made; of
            stored latents, those of the first frame alone are missing.
    """
    stored = "moments" in clip
    if model.shape.causal_chunk:
        raise ValueError(
            "a causal network goes on from frames, not from an image: model.transformer.causal_chunk=0, or, of "
            "HunyuanVideo-1.5, task.image_dropout=1, which trains it on text alone."
        )
    if stored and image_noise is not None:
        raise ValueError(
            "task.image_noise goes onto the pixels of the first frame, and stored latents have none: write "
            "task.image_noise=null, or train on the clips themselves rather than data=latents."
        )
    if num_frames == 1 and model.shape.image_condition == "token_replace":
        raise ValueError(
            "model.transformer.image_condition=token_replace puts the image in place of the first latent frame, and "
            "the clips have no other: use longer clips."
        )
    is_exact = model.autoencoder is not None and model.autoencoder.first_frame_alone
    if stored and "image_moments" not in clip and not is_exact:
        raise ValueError(
            "the stored latents have no `image_moments`, those of the first frame encoded alone, which the network is "
            "given when it makes a video; those of a whole clip are others, as the autoencoder's norms span its "
            "frames. Run `make latents EXP=…` with this network again, into another folder (OUT=…)."
        )


def _image_moments(model: TextToVideo, batch: dict, moments: Tensor, image_noise: ImageNoise | None) -> Tensor:
    """Moments (B, 2C, 1, h, w) of the first frame alone, of a batch that :func:`check_image` has seen."""
    autoencoder = model.autoencoder
    if "image_moments" in batch:
        return batch["image_moments"]
    if "moments" in batch or autoencoder is None or (image_noise is None and autoencoder.first_frame_alone):
        return moments[:, :, :1]
    frames = batch["video"][:, :, :1] * 2 - 1
    return autoencoder.encode(frames if image_noise is None else image_noise(frames))


def text_of(model: TextToVideo, batch: dict) -> TextTokens:
    """The encoded captions of a batch: its ``text_tokens``, ``text_mask`` and ``text_pooled``, or its ``caption``s
    through the model's text encoder.

    Raises:
        ValueError: there is no text encoder, or clips have no caption: the message names them.
    """
    said = batch.get("caption", [""] * len(batch["id"]))
    if silent := [str(name) for name, caption in zip(batch["id"], said) if not caption]:
        raise ValueError(
            f"the clips {', '.join(silent)} have no caption, and a text-to-video model needs one for each: add them to "
            "the metadata of the dataset, or leave the clips out."
        )
    if "text_tokens" in batch:
        return TextTokens(batch["text_tokens"], batch["text_mask"], batch.get("text_pooled"))
    if model.text is None:
        raise ValueError("model.text is null, and the clips hold no encoded text: choose a model.text.")
    return model.text(list(said))


def without_some(model: TextToVideo, text: TextTokens, share: float) -> TextTokens:
    """Encoded captions, of which about ``share`` are replaced by what stands for none: zeros, where the model has no
    text encoder. Which, torch's global generator on the CPU says."""
    if not share or not (drawn := torch.rand(len(text.mask), dtype=torch.float32) < share).any():
        return text
    dropped = drawn.to(text.mask.device)
    if model.text is None:
        empty = None if text.pooled is None else torch.zeros_like(text.pooled)
        nothing = TextTokens(torch.zeros_like(text.tokens), torch.ones_like(text.mask), empty)
    else:
        nothing = model.unconditional(1)

    def chosen(own: Tensor, other: Tensor) -> Tensor:
        return torch.where(dropped.view(-1, *[1] * (own.ndim - 1)), other.to(own), own)

    pooled = None
    if text.pooled is not None and nothing.pooled is not None:
        pooled = chosen(text.pooled, nothing.pooled)
    return TextTokens(chosen(text.tokens, nothing.tokens), chosen(text.mask, nothing.mask), pooled)


def shown_images(image: Tensor | None, dropout: float) -> Tensor | None:
    """Bool (B,): the clips whose image, of (B, C, 1, H, W), a network is shown, all but a share ``dropout``; ``None``
    where that is all of them."""
    if image is None or not dropout:
        return None
    return torch.rand(len(image), device=image.device, dtype=torch.float32) >= dropout


def of_others(model: TextToVideo, batch: dict, text: TextTokens, spare: Sequence[dict]) -> TextTokens | None:
    """To every clip another caption than its own.

    It is that of the clip before it in the batch, or the nearest before that which has another, the last being before
    the first. Where all have the same it is one of the spare ones.

    Args:
        model: with a text encoder, unless ``spare`` is encoded.
        batch, text: its ``caption``s, and these encoded.
        spare: see :func:`different_captions`.

    Returns:
        ``None`` if there is no other.
    """
    said = batch["caption"]
    size, device = len(said), text.mask.device
    if len(set(said)) > 1:
        nearest = [next(i - k for k in range(1, size) if said[i - k] != said[i]) for i in range(size)]
        places = torch.tensor(nearest, device=device) % size
        return TextTokens(text.tokens[places], text.mask[places], None if text.pooled is None else text.pooled[places])
    for clip in spare:
        if clip["caption"] != said[:1]:
            one = {key: value.to(device) if isinstance(value, Tensor) else value for key, value in clip.items()}
            return repeated(text_of(model, one), size)
    return None


def different_captions(dataset: Any) -> list[dict]:
    """Two clips of a dataset whose captions are not the same, each as a batch of one that :func:`text_of` takes; none
    if all have the same. So whatever a clip's caption is, there is another."""
    captions = iter(captions_of(dataset))
    first = next(captions)
    other = next((caption for caption in captions if caption != first), None)
    if other is None:
        return []
    if not hasattr(dataset, "made_of"):
        return [{"id": [caption], "caption": [caption]} for caption in (first, other)]
    found = []
    for caption in (first, other):  # stored: the text may be encoded; clips may be in another order than captions
        clip = next(clip for clip in map(dataset.__getitem__, range(len(dataset))) if clip["caption"] == caption)
        encoded = {key: value[None] for key, value in clip.items() if key.startswith("text_")}
        found.append({"id": [clip["id"]], "caption": [caption], **encoded})
    return found


def captions_of(dataset: Any) -> Iterable[str]:
    """The captions of all clips of a dataset, as cheaply as it gives them."""
    if hasattr(dataset, "captions"):
        return dataset.captions()
    if hasattr(dataset, "rows"):
        return (row.caption or "" for row in dataset.rows)
    return (dataset[index].get("caption", "") for index in range(len(dataset)))


def check_buckets(dataset: Any, model: TextToVideo) -> None:
    """Checks that autoencoder and network accept the clips of every bucket; a ValueError names the bucket."""
    for name, size in getattr(dataset, "sizes", {}).items():
        try:
            if hasattr(dataset, "made_of"):  # stored latents
                model.check_latents(size)
            else:
                model.check_clip(*size)
        except ValueError as error:
            raise ValueError(f"the bucket {name} does not fit the model: {error}") from error


def latent_size(data: Any, clip: dict, model: TextToVideo) -> tuple[int, int, int]:
    """Latents (t, h, w) of a validation clip, in whose size samples are made, once all data are known to fit.

    Args:
        data: with ``train``, ``val`` and ``test``.
        clip: the first of ``val``; of buckets, one of the first.

    Raises:
        ValueError: autoencoder or network cannot take it, or a bucket, which is named; latents of another autoencoder.
    """
    for dataset in filter(None, (data.train, data.val, data.test)):
        check_buckets(dataset, model)
    if "moments" not in clip:
        frames, _, height, width = clip["video"].shape
        return model.check_clip(frames, height, width)
    check_latents(data.train, model)
    t, h, w = clip["moments"].shape[1:]
    model.check_latents((t, h, w))
    return t, h, w


def check_latents(dataset: Any, model: TextToVideo) -> None:
    """Stored latents and text are those of the model's autoencoder and text encoder, else a ValueError."""
    for key, part in (("autoencoder", model.autoencoder), ("text", model.text)):
        made_with = dataset.made_of[key]
        own = None if part is None else f"{type(part).__name__}/{fingerprint(part)}"
        if None not in (made_with, own) and made_with != own:
            raise ValueError(
                f"{dataset.folder} holds what {made_with} made, and model.{key} is {own}: choose the {key} that made "
                "it, or run `make latents EXP=…` again into another folder (OUT=…)."
            )
