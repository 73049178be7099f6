"""Base class of text-to-video diffusion transformers: input checks, activation checkpointing, published weights."""

import warnings
from abc import ABC, abstractmethod
from pathlib import Path
from typing import Any, ClassVar, Self

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from blueberry_video.nn.joint_attention import KeyValueCache, Shared
from blueberry_video.nn.rope import Rotation
from blueberry_video.parallel.sequence import TokenShards, active_group
from blueberry_video.weights.diffusers_folder import read_published, write_folder
from blueberry_video.weights.load import different_settings, load_strictly

Grid = tuple[int, int, int]  # along (t, h, w)


class DiffusionTransformer(nn.Module, ABC):
    """Diffusion transformer: noisy latents (B, in_channels, T, H, W), timestep and text -> (B, out_channels, T, H, W).

    A subclass implements :meth:`convert`, :meth:`settings_of`, :meth:`config` and ``forward(latents, timestep, text,
    text_mask=None, pooled=None, guidance=None, cache=None, first_frame=0)``:

    - ``latents``: (B, in_channels, T, H, W), with the channels of the image conditioning appended.
    - ``timestep``: float in [0, 1000], 0 clean, 1000 noise: (B,), or one per frame (B, T) (Diffusion Forcing, arXiv
      2407.01392), which sets the timestep of the text to 0.
    - ``text``, ``text_mask``: tokens (B, L, text_dim), and bool (B, L), false at padding.
    - ``pooled``: (B, pooled_dim); ``None`` where ``pooled_dim`` is 0.
    - ``guidance``: guidance scale (B,), such as 6.0; ``None`` without ``embedded_guidance``.
    - ``cache``: KV cache of a causal model. Keys and values of the text and of earlier frames are read from it, and
      those of ``latents`` are written to it.
    - ``first_frame``: index of the first of ``latents`` in the clip. The cache is overwritten from this frame on.
      Unless it is 0, the text is also read from the cache.

    Under :func:`~blueberry_video.parallel.sequence.sequence_parallel`, the video tokens of each frame are split over
    the group, and every process has the text.

    It raises a ValueError, which names the expected value, for inputs that do not fit the model.

    Attributes:
        family: name of the architecture in :mod:`~blueberry_video.weights.diffusers_folder`.
        flexible: constructor arguments in which loaded weights may differ from the model.
        original_config: settings of the original code under the names of :meth:`config`, for weights in its layout.
        original_names: names of settings in configs of the original code -> names in :meth:`config`.
        assumed: keys of :meth:`config` that change the output and that no tensor determines.
        patch_size: (t, h, w).
        num_heads: attention heads.
        pooled_dim: width of the pooled text embedding; 0 for none.
        embedded_guidance: whether the guidance scale is an input.
        causal_chunk: latent frames per chunk. A frame then attends to the text and to the frames of the same and of
            earlier chunks, and the text attends to itself. 0: full attention, as published.
        checkpointing: recompute the activations of each block in the backward pass.
        trained_text_encoder: class of the text encoder that is trained with the transformer, empty for a published one.
            :meth:`save_published` records it, because the written folder lacks the text encoder.
    """

    family: ClassVar[str]
    splits_clips: ClassVar[bool] = True  # under sequence_parallel
    flexible: ClassVar[tuple[str, ...]] = ("causal_chunk", "image_condition")
    original_config: ClassVar[dict[str, Any]] = {}
    original_names: ClassVar[dict[str, str]] = {}
    assumed: ClassVar[tuple[str, ...]] = ()
    in_channels: int
    out_channels: int
    text_dim: int
    pooled_dim = 0
    embedded_guidance = False
    patch_size: Grid
    num_heads: int
    causal_chunk: int
    checkpointing: bool
    trained_text_encoder = ""

    @property
    def variant(self) -> str:
        """Name of the published model of this shape, or of the family."""
        return self.family

    def grid(self, latents: Tensor) -> Grid:
        """Patches (t, h, w) of latents (B, C, T, H, W)."""
        t, h, w = (size // patch for size, patch in zip(latents.shape[2:], self.patch_size, strict=True))
        return t, h, w

    def unpatchify(self, patches: Tensor, grid: Grid) -> Tensor:
        """(B, t * h * w, out_channels * patch) -> (B, out_channels, T, H, W)."""
        (t, h, w), (pt, ph, pw) = grid, self.patch_size
        pattern = "b (t h w) (c pt ph pw) -> b c (t pt) (h ph) (w pw)"
        return rearrange(patches, pattern, t=t, h=h, w=w, pt=pt, ph=ph, pw=pw)

    def run_block(self, block: nn.Module, *inputs: Any, shared: Shared, layer: int) -> Any:
        """Calls a block, with activation checkpointing where ``checkpointing`` is set."""
        if self.checkpointing and torch.is_grad_enabled() and shared.cache is None:
            return checkpoint(block, *inputs, shared, layer, use_reentrant=False)
        return block(*inputs, shared, layer)

    def shards(self, grid: Grid) -> TokenShards | None:
        """Split of the tokens of a patch grid over the group of
        :func:`~blueberry_video.parallel.sequence.sequence_parallel`; ``None`` outside of it.

        Raises:
            ValueError: the size of the group does not divide the heads or the tokens of a frame.
        """
        if (group := active_group()) is None:
            return None
        t, h, w = grid
        fix = f"data.image_size: a frame has {h} x {w} tokens of patch_size={self.patch_size}"
        return TokenShards(group, t, t * h * w, self.num_heads, "model.transformer.num_heads", fix)

    def unused_parts(self) -> list[nn.Module]:
        """Parts of the published model that a text-to-video model does not use, and therefore freezes.

        A parameter that is trainable and has no gradient raises an error under DDP.
        """
        return []

    def check_size(self, size: Grid, first_frame: int = 0) -> None:
        """Checks that latents of ``size`` (T, H, W) consist of whole patches.

        Raises:
            ValueError: they do not; the message names the nearest size.
        """
        patches = list(zip(size, self.patch_size, strict=True))
        if any(number < 1 or number % patch for number, patch in patches):
            nearest = tuple(max(round(number / patch), 1) * patch for number, patch in patches)
            raise ValueError(
                f"latents of (T, H, W) = {size} are not whole patches of patch_size={self.patch_size}: the nearest "
                f"size is {nearest}."
            )

    def check_inputs(
        self,
        latents: Tensor,
        timestep: Tensor,
        text: Tensor,
        text_mask: Tensor | None,
        cache: KeyValueCache | None,
        first_frame: int,
    ) -> None:
        """Checks the shapes of the inputs, and the use of the cache.

        Raises:
            ValueError: they do not fit the model; the message names the value, the argument and the expected value.
        """
        if latents.ndim != 5 or latents.shape[1] != self.in_channels:
            image = ", those of the image included" if self.in_channels > self.out_channels else ""
            raise ValueError(
                f"latents have the shape {tuple(latents.shape)}, expected (B, in_channels={self.in_channels}, T, H, W)"
                f"{image}: choose a model variant and an autoencoder with equal numbers of channels."
            )
        batch, _, num_frames, height, width = latents.shape
        self.check_size((num_frames, height, width), first_frame)
        check_tokens("text", text, text_mask, batch, "text_dim", self.text_dim)
        if timestep.shape not in ((batch,), (batch, num_frames)):
            raise ValueError(
                f"timestep has the shape {tuple(timestep.shape)}: expected {(batch,)}, one per clip, or "
                f"{(batch, num_frames)}, one per latent frame."
            )
        if self.causal_chunk and timestep.ndim == 1:
            raise ValueError(
                f"causal_chunk={self.causal_chunk} requires a timestep per frame, (B, T), because the text and earlier "
                "frames must not depend on the timestep of later ones: pass timestep[:, None].expand(-1, T)."
            )
        if (cache is not None or first_frame) and not self.causal_chunk:
            raise ValueError(
                f"a cache and first_frame={first_frame} require a causal model: set causal_chunk to the frames per "
                "chunk."
            )
        if first_frame and (cache is None or first_frame < 0 or first_frame % self.causal_chunk):
            raise ValueError(
                f"first_frame={first_frame} must be a multiple of causal_chunk={self.causal_chunk}, and requires the "
                "cache of the frames before it."
            )

    # ---- published weights ----

    @staticmethod
    @abstractmethod
    def convert(state: dict[str, Tensor]) -> dict[str, Tensor]:
        """Converts a state dict from the original layout to that of diffusers."""

    @classmethod
    @abstractmethod
    def settings_of(cls, state: dict[str, Tensor], config: dict[str, Any]) -> dict[str, Any]:
        """Constructor arguments for a state dict.

        Args:
            state: tensors under the names of diffusers; their shapes determine the sizes.
            config: ``config.json`` of diffusers for the other settings, which default to the published ones.

        Raises:
            KeyError: a tensor is missing.
        """

    @abstractmethod
    def config(self) -> dict[str, Any]:
        """Settings of this model as ``config.json`` of diffusers holds them.

        A causal model adds ``causal_chunk``, which diffusers ignores with a warning.
        """

    @classmethod
    def check_source(cls, config: dict[str, Any], state: dict[str, Tensor], source: str | Path) -> None:
        """Checks that published weights have no parts that this family lacks.

        Raises:
            ValueError: they do; the message names the setting.
        """

    @classmethod
    def complete(cls, arguments: dict[str, Any], source: str | Path) -> dict[str, Any]:
        """Completes constructor arguments for published weights by those of the published models, which it prints.

        Raises:
            ValueError: no published model has weights of this shape; the message names the argument to pass.
        """
        return arguments

    def check_config(self, config: dict[str, Any], source: str | Path) -> None:
        """Checks that the config of published weights describes this model, which was built for the weights.

        Raises:
            ValueError: settings differ.
        """

    @classmethod
    def from_published(cls, weights: str | Path, **settings: Any) -> Self:
        """Builds a model from published weights, in their dtype. Prints its name and size.

        Args:
            weights: a model or pipeline folder in the layout of diffusers, a file in the original layout or in that of
                diffusers, or a hub id. Settings that a file does not determine default to those of the published model
                with its shapes.
            settings: constructor arguments that replace those read from the weights, such as ``causal_chunk``. No
                tensor distinguishes HunyuanVideo's ``image_condition="token_replace"`` from text-to-video.

        Raises:
            FileNotFoundError: a file is missing.
            ValueError: the weights are damaged, of a different architecture, or do not match their config.
        """
        config, state, arguments = cls._read(weights)
        arguments = cls.complete({**arguments, "zero_init": False, **settings}, weights)
        with torch.device("meta"):
            model = cls(**arguments)
        model.check_config(config, weights)
        load_strictly(model, state, weights)
        print(f"{model.variant} from {weights}: {sum(p.numel() for p in model.parameters()) / 1e9:.3f}B parameters")
        return model

    def load_published(self, weights: str | Path) -> str:
        """Loads published weights, see :meth:`from_published`, into this model, in the model's dtype.

        Settings in ``flexible`` may differ: image-to-video training starts from text-to-video weights, for example.

        Returns:
            A sentence on what was loaded, with the flexible settings that differ.

        Raises:
            FileNotFoundError: a file is missing.
            ValueError: the weights are damaged, or of a different architecture or variant; the message names the
                settings that differ.
        """
        config, state, loaded = self._read(weights, self.config())
        own = self.settings_of(self.state_dict(), self.config())
        if found := different_settings({key: loaded[key] for key in loaded if key not in self.flexible}, own):
            with torch.device("meta"):
                variant = type(self)(**loaded).variant
            raise ValueError(
                f"{weights} holds a {variant}, but the model is a {self.variant}: {found}. Choose the "
                "model=text_to_video/… of these weights, or set model.transformer to these settings."
            )
        load_strictly(self, state, weights)
        trained = different_settings({key: loaded[key] for key in self.flexible if key in loaded}, own)
        unknown = ", ".join(f"{key}={self.config()[key]}" for key in self.assumed if key not in config)
        note = f", with {unknown} of this model, which no config of the weights verifies" if unknown else ""
        return f"loaded {self.variant} from {weights}{f', trained with {trained}' if trained else ''}{note}"

    def save_published(self, folder: str | Path) -> None:
        """Writes a folder that ``from_pretrained`` of diffusers loads.

        Raises:
            FileExistsError: the folder exists and is not empty.
            ValueError: diffusers has no such model.
        """
        write_folder(folder, self.config() | self.recorded, self.state_dict())

    @property
    def recorded(self) -> dict[str, Any]:
        """Settings of ``config.json`` that describe the training, not the model."""
        return {"trained_text_encoder": self.trained_text_encoder} if self.trained_text_encoder else {}

    @classmethod
    def _read(
        cls, weights: str | Path, defaults: dict[str, Any] | None = None
    ) -> tuple[dict[str, Any], dict[str, Tensor], dict[str, Any]]:
        """Config, state dict and constructor arguments; ``defaults`` completes the config."""
        config, state = read_published(weights, cls.family, cls.convert, cls.original_config)
        if text := config.get("trained_text_encoder"):
            warnings.warn(
                f"{weights} was trained with a {text}, which the folder lacks: the model does not follow captions "
                "until its text encoder is trained with it again. Use the checkpoint of the run (init_from=<run>) to "
                "keep both.",
                stacklevel=3,
            )
        config = {cls.original_names.get(key, key): value for key, value in config.items()}
        cls.check_source(config, state, weights)
        try:
            return config, state, cls.settings_of(state, (defaults or {}) | config)
        except KeyError as error:
            raise ValueError(f"{weights} lacks {error}: it is damaged or incomplete, download it again.") from error


def check_tokens(name: str, tokens: Tensor, mask: Tensor | None, batch: int, key: str, dim: int) -> None:
    """Checks that tokens are (batch, L, dim), and that their mask is bool (batch, L).

    Raises:
        ValueError: they are not; the message names both shapes.
    """
    if tokens.ndim != 3 or len(tokens) != batch or tokens.shape[2] != dim:
        raise ValueError(
            f"{name} has the shape {tuple(tokens.shape)}: expected (B={batch}, L, {key}={dim}). Set the model's {key} "
            "to the width of the encoder."
        )
    if mask is not None and (mask.shape != tokens.shape[:2] or mask.dtype != torch.bool):
        raise ValueError(
            f"{name}_mask is a {mask.dtype} tensor of shape {tuple(mask.shape)}: expected torch.bool of "
            f"{tuple(tokens.shape[:2])}, true at tokens and false at padding."
        )


def own_rotation(rotation: Rotation | None, text_len: int, shards: TokenShards) -> Rotation | None:
    """Rotation of the text and of the video tokens of this process, from that of [text, video], (L + N, …)."""
    if rotation is None:
        return None
    return Rotation(*(torch.cat([part[:text_len], shards.own(part[text_len:], 0)]) for part in rotation))


def text_timestep(timestep: Tensor) -> Tensor:
    """Timestep of the text (B,): that of the clip (B,), or 0 for timesteps per frame (B, T)."""
    return timestep if timestep.ndim == 1 else torch.zeros_like(timestep[:, 0])
