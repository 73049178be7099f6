"""A diffusion transformer with what it needs around it: a text encoder, and the codec whose latents it models.

Any transformer of this package goes with any codec and text encoder that have its sizes. Published encoders and codecs
are frozen: they are used by the network, but are no part of its parameters or its checkpoints.
"""

from collections.abc import Callable
from typing import Any, Protocol, cast

import torch
from torch import Tensor, nn

from blueberry_video.diffusion.frozen import Aside
from blueberry_video.diffusion.lora import LoRA, add_adapters, drop_frozen, forgive_frozen
from blueberry_video.models.autoencoder.base import Codec
from blueberry_video.models.text_encoder.base import TextEncoder, TextTokens
from blueberry_video.nn.joint_attention import KeyValueCache


class Transformer(Protocol):
    """What :class:`TextToVideo` needs of a transformer beside its ``forward``."""

    in_channels: int
    out_channels: int
    text_dim: int
    pooled_dim: int
    patch_size: tuple[int, int, int]
    embedded_guidance: bool
    causal_chunk: int

    def check_size(self, size: tuple[int, int, int]) -> None: ...


class TextToVideo(nn.Module):
    """Transformer, text encoder and codec.

    Args:
        transformer: such as :class:`~blueberry_video.models.cogvideox.CogVideoX`: from noisy latents, a time and text
            to what the objective wants.
        text: a text encoder; one that is not ``frozen`` is trained along. Or what builds a frozen one (in a config,
            ``_partial_: true``): it is not loaded before :meth:`prepare`. ``None``: the text comes with the clips.
        codec: of videos and latents, never trained here; or what builds it. ``None``: clips come as latents, and
            nothing can be shown.
        lora: freeze the transformer and train low-rank adapters beside some of its matrices; ``None`` trains it all.

    Raises:
        ValueError: if the parts do not fit each other.
    """

    def __init__(
        self,
        transformer: nn.Module,
        text: TextEncoder | Callable[[], TextEncoder] | None = None,
        codec: Codec | Callable[[], Codec] | None = None,
        lora: LoRA | None = None,
    ):
        super().__init__()
        self.transformer, self.lora = transformer, lora
        is_trained = isinstance(text, TextEncoder) and not text.frozen
        self.trained_text = text if is_trained else None
        self._text = None if text is None or is_trained else Aside[TextEncoder](text)
        self._codec = None if codec is None else Aside[Codec](codec)
        self._unconditional: TextTokens | None = None  # of a frozen encoder
        if lora is not None:
            add_adapters(transformer, lora)
            self._register_state_dict_hook(drop_frozen)
            self.register_load_state_dict_post_hook(forgive_frozen)
        self._check()

    @property
    def text(self) -> TextEncoder | None:
        """The text encoder, loaded where it has not been."""
        if self.trained_text is not None:
            return cast(TextEncoder, self.trained_text)
        return None if self._text is None else self._text.get()

    @property
    def codec(self) -> Codec | None:
        """The codec, loaded where it has not been."""
        return None if self._codec is None else self._codec.get()

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
            ValueError: codec or transformer cannot take it; the message names the nearest legal values.
        """
        if self.codec is None:
            raise ValueError("model.codec is null, so clips must come as latents: data=latents, or choose a codec.")
        self.codec.check(num_frames, height, width, self.shape.patch_size[1:])
        size = self.codec.grid(num_frames, height, width)
        self.check_latents(size)
        return size

    def check_latents(self, size: tuple[int, int, int]) -> None:
        """The transformer can take latents (t, h, w), its frames filled up to whole patches.

        Raises:
            ValueError: if not; the message names the nearest size, or the argument to change.
        """
        frames, height, width = size
        self.shape.check_size((frames + -frames % self.shape.patch_size[0], height, width))

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "TextToVideo":
        super()._apply(fn, recurse)
        self._unconditional = None
        for part in self._beside():
            if part.is_built:
                part.get()._apply(fn)
        return self

    def _beside(self) -> list[Aside]:
        return [part for part in (self._text, self._codec) if part is not None]

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
        if self._codec is not None and self._codec.is_built:
            channels = self._codec.get().channels
            faults.append(("transformer.out_channels", wanted.out_channels, "codec.channels", channels))
        for key, value, other, theirs in faults:
            if value != theirs:
                raise ValueError(
                    f"model.{key}={value} and model.{other}={theirs} disagree: write model.{key}={theirs}, or choose "
                    f"another model.{other.partition('.')[0]}."
                )


def repeated(text: TextTokens, batch_size: int) -> TextTokens:
    """One encoded caption, ``batch_size`` times."""
    tokens, mask, pooled = (None if part is None else part.expand(batch_size, *part.shape[1:]) for part in text)
    return TextTokens(cast(Tensor, tokens), cast(Tensor, mask), pooled)
