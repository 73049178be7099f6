"""Text-to-video model: diffusion transformer, text encoder and autoencoder of matching sizes.

Published autoencoders and text encoders are frozen, and are not part of the model's parameters or checkpoints.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Protocol, cast

import torch
from torch import Tensor, nn

from blueberry_video.diffusion.frozen import Frozen
from blueberry_video.diffusion.lora import (
    FILE,
    LoRA,
    add_adapters,
    exclude_frozen,
    is_adapter_file,
    load_adapters,
    plain,
    save_adapters,
)
from blueberry_video.models.autoencoder.base import Autoencoder
from blueberry_video.models.text_encoder.base import TextEncoder, TextTokens
from blueberry_video.nn.joint_attention import KeyValueCache
from blueberry_video.weights.files import read_checkpoint
from blueberry_video.weights.load import load_strictly


class Transformer(Protocol):
    """Attributes and methods of a diffusion transformer, except ``forward``.

    Attributes:
        in_channels, out_channels: channels of the input and of the predicted latents.
        text_dim, pooled_dim: widths of text tokens and of the pooled text embedding, 0 for none.
        patch_size: (t, h, w).
        embedded_guidance: whether the guidance scale is an input.
        causal_chunk: latent frames per chunk of causal attention; 0 for full attention.
        image_condition: image conditioning: ``"channels"`` (CogVideoX: latents of the first frame, zero-padded to all
            frames, concatenated along channels), ``"latent_concat"`` (HunyuanVideo: the same, with a mask channel),
            ``"token_replace"`` (HunyuanVideo: the first latent frame is replaced), ``"optional"`` (HunyuanVideo-1.5: as
            ``latent_concat``, zeros without an image), or ``None`` for text-to-video.
        image_dropout: share of training clips without image conditioning, as in published training.
        trained_text_encoder: class of a text encoder that is trained with the transformer, recorded when it is saved.
    """

    in_channels: int
    out_channels: int
    text_dim: int
    pooled_dim: int
    patch_size: tuple[int, int, int]
    embedded_guidance: bool
    causal_chunk: int
    image_condition: str | None
    trained_text_encoder: str

    @property
    def image_dropout(self) -> float: ...

    def load_published(self, weights: str | Path) -> str: ...

    def save_published(self, folder: str | Path) -> None: ...

    def check_size(self, size: tuple[int, int, int]) -> None: ...


class TextToVideo(nn.Module):
    """Text-to-video model.

    Args:
        transformer: diffusion transformer, such as :class:`~blueberry_video.models.cogvideox.CogVideoX`.
        text: text encoder, trained unless it is ``frozen``; or a function that builds a frozen one (in a config,
            ``_partial_: true``), called by :meth:`prepare`. ``None``: clips have encoded text.
        autoencoder: frozen autoencoder of videos, or a function that builds it. ``None``: clips are stored latents, and
            are not decoded.
        lora: settings of LoRA adapters, with the transformer frozen; ``None`` trains the whole transformer.

    Raises:
        ValueError: if the sizes of the parts do not match.
    """

    def __init__(
        self,
        transformer: nn.Module,
        text: TextEncoder | Callable[[], TextEncoder] | None = None,
        autoencoder: Autoencoder | Callable[[], Autoencoder] | None = None,
        lora: LoRA | None = None,
    ):
        super().__init__()
        self.transformer, self.lora = transformer, lora
        is_trained = isinstance(text, TextEncoder) and not text.frozen
        self.trained_text = text if is_trained else None
        self._text = None if text is None or is_trained else Frozen[TextEncoder](text)
        self._autoencoder = None if autoencoder is None else Frozen[Autoencoder](autoencoder)
        self._unconditional: TextTokens | None = None  # cache, for frozen encoders
        if lora is not None:
            add_adapters(transformer, lora)
            exclude_frozen(self)
        self._freeze_unused()
        self._check()

    @property
    def text(self) -> TextEncoder | None:
        """Text encoder, built on first use."""
        if self.trained_text is not None:
            return cast(TextEncoder, self.trained_text)
        return None if self._text is None else self._text.get()

    @property
    def autoencoder(self) -> Autoencoder | None:
        """Autoencoder, built on first use."""
        return None if self._autoencoder is None else self._autoencoder.get()

    @property
    def shape(self) -> Transformer:
        """The transformer, typed as :class:`Transformer`."""
        return cast(Transformer, self.transformer)

    def unconditional(self, batch_size: int) -> TextTokens:
        """Returns the unconditional text, cached for frozen encoders.

        Raises:
            ValueError: if there is no text encoder.
        """
        if self.text is None:
            raise ValueError("model.text=null has no unconditional text: choose a model.text.")
        if self.trained_text is not None:
            return self.text.unconditional(batch_size)
        like = next(self.text.parameters())
        if self._unconditional is None or self._unconditional.tokens.device != like.device:
            with torch.inference_mode(False), torch.no_grad():  # cached, also for training
                self._unconditional = self.text.unconditional(1)
        return repeated(self._unconditional, batch_size)

    def prepare(self, device: torch.device | None = None) -> None:
        """Builds the frozen parts and moves them to a device.

        Args:
            device: defaults to the device of the transformer.

        Raises:
            ValueError: if their sizes do not match the transformer; also the errors of building them.
        """
        device = next(self.transformer.parameters()).device if device is None else device
        for part in self._frozen_parts():
            part.get().to(device)
        self._check()

    def forward(
        self,
        latents: Tensor,
        timestep: Tensor,
        text: TextTokens,
        guidance: float | None = None,
        cache: KeyValueCache | None = None,
        first_frame: int = 0,
    ) -> Tensor:
        """Returns the output (B, out_channels, T, H, W) of the transformer.

        Args:
            latents: (B, in_channels, T, H, W), noisy, with the image conditioning.
            timestep: (B,), one per clip, or (B, T), one per frame, in [0, 1000].
            text: encoded captions.
            guidance: scale of embedded guidance.
            cache, first_frame: KV cache and index of the first frame, for causal transformers.
        """
        if timestep.ndim == 1 and self.shape.causal_chunk:
            timestep = timestep[:, None].expand(-1, latents.shape[2])
        pooled = text.pooled if self.shape.pooled_dim else None
        scale = guidance if guidance is None else latents.new_full((len(latents),), guidance, dtype=torch.float32)
        return self.transformer(latents, timestep, text.tokens, text.mask, pooled, scale, cache, first_frame)

    def check_clip(self, num_frames: int, height: int, width: int) -> tuple[int, int, int]:
        """Returns the latent size (t, h, w) of a clip with the given size in pixels.

        Raises:
            ValueError: if autoencoder or transformer do not support it; the message names the nearest legal values.
        """
        if self.autoencoder is None:
            raise ValueError("model.autoencoder=null requires stored latents: choose data=latents, or an autoencoder.")
        self.autoencoder.check(num_frames, height, width, self.shape.patch_size[1:])
        size = self.autoencoder.grid(num_frames, height, width)
        self.check_latents(size)
        return size

    def check_latents(self, size: tuple[int, int, int]) -> None:
        """Checks that the transformer supports latents (t, h, w), with t padded to the patch size.

        Raises:
            ValueError: if not; the message names the nearest size, or the argument to change.
        """
        frames, height, width = size
        self.shape.check_size((frames + -frames % self.shape.patch_size[0], height, width))

    def load_published(self, weights: str | Path) -> str:
        """Loads weights into the model or a part of it.

        Args:
            weights: a Lightning checkpoint of a run (all weights), an adapter file of diffusers, peft or kohya (the
                adapters), or published weights of the transformer: a folder, a file or a hub id.

        Returns:
            A message that names the loaded weights.

        Raises:
            FileNotFoundError: if there are no such weights.
            ValueError: if the weights do not match the model; the message names the difference.
        """
        path = Path(weights)
        if path.suffix == ".ckpt":
            load_strictly(self, read_checkpoint(path), path, "Choose the model of the run that wrote it.")
            return f"loaded {len(self.state_dict())} tensors from {path}"
        if is_adapter_file(path):
            if self.lora is None:
                raise ValueError(
                    f"{path} has adapters, but model.lora=null: use `+model/lora=default model.lora.base=<folder of "
                    "the published weights>`, with the rank and targets of training."
                )
            load_adapters(self.transformer, self.lora, path)
            return f"loaded the adapters from {path}"
        with plain(self.transformer):
            return self.shape.load_published(weights)

    def save_published(self, folder: str | Path, merge: bool = False) -> list[Path]:
        """Writes the transformer to ``folder/transformer`` in the layout of diffusers; for a model with adapters only
        ``folder/pytorch_lora_weights.safetensors``.

        A trained text encoder is left out, because diffusers has none such; the written config names it, and loading
        the folder warns.

        Args:
            folder: created if it does not exist.
            merge: write the transformer with merged adapters.

        Returns:
            The written folder or file.

        Raises:
            FileExistsError: if it exists.
            ValueError: if diffusers has no such transformer.
        """
        folder, text = Path(folder), "" if self.trained_text is None else type(self.trained_text).__name__
        if self.lora is not None and not merge:
            if (folder / FILE).exists():
                raise FileExistsError(f"{folder / FILE} exists: choose another folder, or remove it.")
            return [save_adapters(self.transformer, self.lora, folder, text)]
        self.shape.trained_text_encoder = text
        with plain(self.transformer, merged=True):
            self.shape.save_published(folder / "transformer")
        return [folder / "transformer"]

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "TextToVideo":
        super()._apply(fn, recurse)
        self._unconditional = None
        for part in self._frozen_parts():
            part.apply(fn)
        return self

    def _freeze_unused(self) -> None:
        """Freezes the parts of the transformer and of the text encoder that :meth:`forward` does not use."""
        unused: list[nn.Module] = getattr(self.transformer, "unused_parts", list)()
        if not self.shape.pooled_dim and isinstance(pool := getattr(self.trained_text, "pool", None), nn.Module):
            unused.append(pool)
        for part in unused:
            part.requires_grad_(False)

    def _frozen_parts(self) -> list[Frozen]:
        return [part for part in (self._text, self._autoencoder) if part is not None]

    def _check(self) -> None:
        """Checks that the sizes of the parts that are built match."""
        sizes = self.shape
        text = self.trained_text or (self._text.get() if self._text is not None and self._text.is_built else None)
        pairs: list[tuple[str, int, str, int]] = []
        if isinstance(text, TextEncoder):
            pairs.append(("transformer.text_dim", sizes.text_dim, "text.text_dim", text.text_dim))
            if sizes.pooled_dim:
                pairs.append(("transformer.pooled_dim", sizes.pooled_dim, "text.pooled_dim", text.pooled_dim))
            if text is not self.trained_text and not text.frozen:
                raise ValueError(f"model.text={type(text).__name__} is trainable: remove `_partial_: true`.")
        if self._autoencoder is not None and self._autoencoder.is_built:
            channels = self._autoencoder.get().channels
            pairs.append(("transformer.out_channels", sizes.out_channels, "autoencoder.channels", channels))
        for key, value, other_key, other in pairs:
            if value != other:
                raise ValueError(
                    f"model.{key}={value} must equal model.{other_key}={other}: set model.{key}={other}, or choose a "
                    f"different model.{other_key.partition('.')[0]}."
                )


def map_text(function: Callable[..., Tensor], *texts: TextTokens) -> TextTokens:
    """Applies a function to tokens, masks and, unless one is ``None``, pooled embeddings."""
    tokens, mask, pooled = (None if any(x is None for x in parts) else function(*parts) for parts in zip(*texts))
    return TextTokens(cast(Tensor, tokens), cast(Tensor, mask), pooled)


def repeated(text: TextTokens, batch_size: int) -> TextTokens:
    """Expands one encoded caption to a batch."""
    return map_text(lambda part: part.expand(batch_size, *part.shape[1:]), text)
