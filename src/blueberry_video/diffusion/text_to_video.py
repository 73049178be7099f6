"""A diffusion transformer with what it needs around it: a text encoder, and the autoencoder whose latents it models.

Any transformer of this package goes with any autoencoder and text encoder that have its sizes. Published ones
are frozen: they are used by the network, but are no part of its parameters or its checkpoints.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol, cast

import torch
from torch import Tensor, nn

from blueberry_video.diffusion.frozen import Frozen
from blueberry_video.diffusion.lora import (
    FILE,
    LoRA,
    add_adapters,
    drop_frozen,
    ignore_frozen,
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
    """Interface of a diffusion transformer, besides its ``forward``.

    Attributes:
        in_channels, out_channels: channels of the input and of the latents it predicts.
        text_dim, pooled_dim: widths of text tokens and of the pooled text embedding, 0 for none.
        patch_size: (t, h, w).
        embedded_guidance: whether the guidance scale is an input.
        causal_chunk: latent frames of a chunk of causal attention; 0 for full attention.
        image_condition: how the first frame is given: ``"channels"`` (CogVideoX: its latents, zero-padded to all
            frames, along the channels), ``"latent_concat"`` (HunyuanVideo: the same, with a channel that marks the
            frame), ``"token_replace"`` (HunyuanVideo: instead of the first latent frame), ``"optional"``
            (HunyuanVideo-1.5: as ``latent_concat``, zeros without an image), or ``None`` for text-to-video.
        image_dropout: share of training clips without image conditioning, as in published training.
    """

    in_channels: int
    out_channels: int
    text_dim: int
    pooled_dim: int
    patch_size: tuple[int, int, int]
    embedded_guidance: bool
    causal_chunk: int
    image_condition: str | None

    @property
    def image_dropout(self) -> float: ...

    def load_published(self, source: str | Path) -> str: ...

    def save_published(self, folder: str | Path) -> None: ...

    def check_size(self, size: tuple[int, int, int]) -> None: ...


class TextToVideo(nn.Module):
    """Transformer, text encoder and autoencoder.

    Args:
        transformer: such as :class:`~blueberry_video.models.cogvideox.CogVideoX`: from noisy latents, a time and text
            to what the objective wants.
        text: a text encoder; one that is not ``frozen`` is trained along. Or what builds a frozen one (in a config,
            ``_partial_: true``): it is not loaded before :meth:`prepare`. ``None``: the text comes with the clips.
        autoencoder: of videos and latents, never trained here; or what builds it. ``None``: clips come as latents, and
            nothing can be shown.
        lora: freeze the transformer and train low-rank adapters beside some of its matrices; ``None`` trains it all.

    Raises:
        ValueError: if the parts do not fit each other.
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
        self._unconditional: TextTokens | None = None  # of a frozen encoder
        if lora is not None:
            add_adapters(transformer, lora)
            self._register_state_dict_hook(drop_frozen)
            self.register_load_state_dict_post_hook(ignore_frozen)
        self._check()

    @property
    def text(self) -> TextEncoder | None:
        """The text encoder, loaded where it has not been."""
        if self.trained_text is not None:
            return cast(TextEncoder, self.trained_text)
        return None if self._text is None else self._text.get()

    @property
    def autoencoder(self) -> Autoencoder | None:
        """The autoencoder, loaded where it has not been."""
        return None if self._autoencoder is None else self._autoencoder.get()

    @property
    def shape(self) -> Transformer:
        """The transformer, as something with sizes."""
        return cast(Transformer, self.transformer)

    def unconditional(self, batch_size: int) -> TextTokens:
        """What stands for no caption. A frozen encoder says it once: it is as slow as it is large.

        Raises:
            ValueError: there is no text encoder.
        """
        if self.text is None:
            raise ValueError("model.text is null, so nothing says what stands for no caption: choose a model.text.")
        if self.trained_text is not None:
            return self.text.unconditional(batch_size)
        like = next(self.text.parameters())
        if self._unconditional is None or self._unconditional.tokens.device != like.device:
            with torch.inference_mode(False), torch.no_grad():  # it is kept for later, also for training
                self._unconditional = self.text.unconditional(1)
        return repeated(self._unconditional, batch_size)

    def prepare(self, device: torch.device | None = None) -> None:
        """Loads the parts that were to be built later, and moves what is frozen to a device.

        Args:
            device: by default that of the transformer.

        Raises:
            ValueError: if they do not fit the transformer; what loading them raises.
        """
        device = next(self.transformer.parameters()).device if device is None else device
        for part in self._beside():
            part.get().to(device)
        self._check()

    def forward(
        self,
        latents: Tensor,
        time: Tensor,
        text: TextTokens,
        guidance: Tensor | None = None,
        cache: KeyValueCache | None = None,
        first_frame: int = 0,
    ) -> Tensor:
        """
        Args:
            latents: (B, in_channels, T, H, W), noisy; with what an image-to-video transformer is told of the image.
            time: (B,) or (B, T) in [0, 1000]. Of a causal transformer, (B,) is the time of every frame.
            text: encoded captions.
            guidance: (B,), of a transformer with embedded guidance.
            cache, first_frame: of a causal transformer.

        Returns:
            (B, out_channels, T, H, W).
        """
        if time.ndim == 1 and self.shape.causal_chunk:
            time = time[:, None].expand(-1, latents.shape[2])
        pooled = text.pooled if self.shape.pooled_dim else None
        return self.transformer(latents, time, text.tokens, text.mask, pooled, guidance, cache, first_frame)

    def check_clip(self, num_frames: int, height: int, width: int) -> tuple[int, int, int]:
        """Latents (t, h, w) of a clip of that size in pixels.

        Raises:
            ValueError: autoencoder or transformer cannot take it; the message names the nearest legal values.
        """
        if self.autoencoder is None:
            raise ValueError("model.autoencoder=null requires stored latents: choose data=latents, or an autoencoder.")
        self.autoencoder.check(num_frames, height, width, self.shape.patch_size[1:])
        size = self.autoencoder.grid(num_frames, height, width)
        self.check_latents(size)
        return size

    def check_latents(self, size: tuple[int, int, int]) -> None:
        """The transformer can take latents (t, h, w), its frames filled up to whole patches.

        Raises:
            ValueError: if not; the message names the nearest size, or the argument to change.
        """
        frames, height, width = size
        self.shape.check_size((frames + -frames % self.shape.patch_size[0], height, width))

    def load_published(self, source: str | Path) -> str:
        """Loads weights into the model or a part of it.

        Args:
            source: a Lightning checkpoint of a run (all weights), an adapter file ``pytorch_lora_weights.safetensors``
                (the adapters), or published weights of the transformer: a folder, a file or a hub id.

        Returns:
            A sentence on what was loaded.

        Raises:
            FileNotFoundError: there are no such weights.
            ValueError: the weights do not fit the model; the message names what differs.
        """
        path = Path(source)
        if path.suffix == ".ckpt":
            load_strictly(self, read_checkpoint(path), path, "Choose the model of the run that wrote it.")
            return f"loaded {len(self.state_dict())} tensors from {path}"
        if path.name == FILE:
            if self.lora is None:
                raise ValueError(
                    f"{path} holds adapters, and model.lora is null: set model.lora, with the rank and targets of the "
                    "file."
                )
            load_adapters(self.transformer, self.lora, path)
            return f"loaded the adapters from {path}"
        with plain(self.transformer):
            return self.shape.load_published(source)

    def save_published(self, folder: str | Path, merge: bool = False) -> list[Path]:
        """Writes the transformer to ``folder/transformer`` in the layout of diffusers; of a model with adapters only
        the adapter file ``folder/pytorch_lora_weights.safetensors``.

        Args:
            folder: created if it does not exist.
            merge: add the adapters to the weights of the transformer, and write the transformer.

        Returns:
            The folder or file that was written.

        Raises:
            FileExistsError: it exists.
            ValueError: diffusers has no such transformer.
        """
        folder = Path(folder)
        if self.lora is not None and not merge:
            if (folder / FILE).exists():
                raise FileExistsError(f"{folder / FILE} exists: choose another folder, or remove it.")
            return [save_adapters(self.transformer, self.lora, folder)]
        with plain(self.transformer, merged=True):
            self.shape.save_published(folder / "transformer")
        return [folder / "transformer"]

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "TextToVideo":
        super()._apply(fn, recurse)
        self._unconditional = None
        for part in self._beside():
            if part.is_built:
                part.get()._apply(fn)
        return self

    def _beside(self) -> list[Frozen]:
        return [part for part in (self._text, self._autoencoder) if part is not None]

    def _check(self) -> None:
        """The parts that are there have the same sizes."""
        wanted = self.shape
        text = self.trained_text or (self._text.get() if self._text is not None and self._text.is_built else None)
        faults: list[tuple[str, Any, str, Any]] = []
        if isinstance(text, TextEncoder):
            faults.append(("transformer.text_dim", wanted.text_dim, "text.text_dim", text.text_dim))
            if wanted.pooled_dim:
                faults.append(("transformer.pooled_dim", wanted.pooled_dim, "text.pooled_dim", text.pooled_dim))
            if text is not self.trained_text and not text.frozen:
                raise ValueError(
                    f"model.text is a {type(text).__name__}, which is trained: give it without `_partial_: true`."
                )
        if self._autoencoder is not None and self._autoencoder.is_built:
            channels = self._autoencoder.get().channels
            faults.append(("transformer.out_channels", wanted.out_channels, "autoencoder.channels", channels))
        for key, value, other, theirs in faults:
            if value != theirs:
                raise ValueError(
                    f"model.{key}={value} and model.{other}={theirs} disagree: write model.{key}={theirs}, or choose "
                    f"another model.{other.partition('.')[0]}."
                )


def map_text(function: Callable[..., Tensor], *texts: TextTokens) -> TextTokens:
    """Applies a function to tokens, masks and, unless one is ``None``, pooled embeddings."""
    tokens, mask, pooled = (None if any(x is None for x in parts) else function(*parts) for parts in zip(*texts))
    return TextTokens(cast(Tensor, tokens), cast(Tensor, mask), pooled)


def repeated(text: TextTokens, batch_size: int) -> TextTokens:
    """Expands one encoded caption to a batch."""
    return map_text(lambda part: part.expand(batch_size, *part.shape[1:]), text)
