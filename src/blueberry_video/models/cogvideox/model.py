"""CogVideoX (arXiv 2408.06072; github.com/THUDM/CogVideo): the diffusion transformer of 2B, 5B and 1.5-5B and of their
image-to-video variants.

Unusual about it: text and video are one sequence with the same weights, also in the LayerNorms; only shift, scale and
gate, computed from the time, are others for each (expert adaptive LayerNorm). The text is not masked, padding included,
and has no positions. Attention normalises each head. 2B adds sine-cosine positions to the tokens; 5B turns queries and
keys, on a grid stretched over that of its training where the size is another; 1.5 turns them on the plain grid and has
patches of two latent frames. Names are diffusers', so that loading and saving rename nothing.

Letters: B clips, C channels, T latent frames, H W latent rows and columns; t h w the grid of patches, S = h * w tokens
a frame of patches, N = t * S, L text tokens, D width, E width of the condition, K conditions of a clip: 1, or t.
"""

from pathlib import Path
from typing import Any, Self

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from blueberry_video.models.cogvideox.blocks import (
    AdaptiveNorm,
    CogVideoXBlock,
    Condition,
    ExpertNorm,
    PatchEmbedding,
)
from blueberry_video.models.cogvideox.convert import (
    FAMILY,
    PUBLISHED_SETTINGS,
    convert_sat,
    settings_of_config,
    settings_of_weights,
)
from blueberry_video.models.cogvideox.positions import ExpertPositions, sincos_positions
from blueberry_video.nn.joint_attention import KeyValueCache, Shared, block_causal
from blueberry_video.nn.timestep_embedding import TimestepMLP, sinusoidal
from blueberry_video.weights.diffusers_folder import read_published, write_folder
from blueberry_video.weights.load import different_settings, load_strictly

Grid = tuple[int, int, int]  # patches along (t, h, w)
OFFSET = 2.0  # what 1.5-5B-I2V is always told beside the time


class CogVideoX(nn.Module):
    """CogVideoX's transformer: from noisy latents, time and text to what the objective wants.

    Args:
        num_heads, head_dim: heads of the attention; the width is their product.
        depth: blocks.
        in_channels: of the latents; for image-to-video those of the image's latents, behind, included.
        out_channels: of the output.
        text_dim: width of a text token.
        text_len: text tokens. Exactly as many with ``sincos`` and ``rope_and_table``, at most so many otherwise.
        time_dim: width E of the condition.
        patch_size: rows and columns of a patch.
        tubelet_size: latent frames of a patch: 1, or 2 in CogVideoX 1.5.
        num_frames, height, width: of the latents in training. Rotary positions of other rows and columns are stretched
            over these; a table takes no other rows and columns, and no more frames; with ``tubelet_size`` above 1
            rows and columns can be fewer, and are not stretched. To ``"sincos"`` they are nothing.
        positions: ``"sincos"`` (2B), ``"rope"`` (5B, 1.5) or ``"rope_and_table"`` (5B-I2V).
        spatial_scale: by which rows and columns are divided, of ``"sincos"``.
        offset: tell it a constant beside the time (1.5-5B-I2V).
        causal_chunk: latent frames of a chunk: a frame then sees the text and the frames of its own and of earlier
            chunks, and the text sees itself. 0: all see all, as published.
        zero_init: begin as DiT does, every block adding nothing and the output zero; otherwise as PyTorch does.
        checkpointing: keep no activations within blocks while training, but compute them twice.

    Attributes:
        patch_size: (t, h, w).
        pooled_dim: 0: it takes no pooled text.
        embedded_guidance: ``False``.
        image_condition: ``"channels"`` for image-to-video: the latents of the first frame, zero-padded to all frames,
            are concatenated to the noisy latents along the channels; else ``None``.
        image_dropout: share of training clips without image conditioning in published training: 0.05
            (``noised_image_dropout`` in sat/configs/cogvideox_5b_i2v.yaml of THUDM/CogVideo).

    Raises:
        ValueError: for sizes that do not fit each other, or an unknown ``positions``.
    """

    pooled_dim = 0
    embedded_guidance = False

    def __init__(
        self,
        num_heads: int = 30,
        head_dim: int = 64,
        depth: int = 30,
        in_channels: int = 16,
        out_channels: int = 16,
        text_dim: int = 4096,
        text_len: int = 226,
        time_dim: int = 512,
        patch_size: int = 2,
        tubelet_size: int = 1,
        num_frames: int = 13,
        height: int = 60,
        width: int = 90,
        positions: str = "sincos",
        spatial_scale: float = 1.875,
        offset: bool = False,
        causal_chunk: int = 0,
        zero_init: bool = True,
        checkpointing: bool = False,
    ):
        super().__init__()
        dim = num_heads * head_dim
        if causal_chunk < 0 or causal_chunk % tubelet_size:
            raise ValueError(
                f"causal_chunk={causal_chunk} latent frames are no whole number of patches of {tubelet_size}: choose a "
                f"multiple of {tubelet_size}, or 0 for attention without a mask."
            )
        if in_channels not in (out_channels, 2 * out_channels):
            raise ValueError(
                f"in_channels={in_channels} with out_channels={out_channels}: use in_channels={out_channels}, or "
                f"{2 * out_channels} for image-to-video, where the latents of the image are concatenated."
            )
        self.image_condition = None if in_channels == out_channels else "channels"
        self.image_dropout = 0.0 if self.image_condition is None else 0.05
        self.num_heads, self.head_dim, self.time_dim, self.text_len = num_heads, head_dim, time_dim, text_len
        self.in_channels, self.out_channels, self.text_dim = in_channels, out_channels, text_dim
        self.patch_size: Grid = (tubelet_size, patch_size, patch_size)
        self.causal_chunk, self.checkpointing = causal_chunk, checkpointing
        latent_size = (num_frames, height, width)
        self.places = ExpertPositions(positions, num_heads, head_dim, self.patch_size, latent_size, spatial_scale)

        table = self.places.joint_table(text_len) if positions == "rope_and_table" else None
        self.patch_embed = PatchEmbedding(in_channels, self.patch_size, text_dim, dim, table)
        self.time_embedding = TimestepMLP(dim, time_dim, time_dim)
        self.ofs_embedding = TimestepMLP(time_dim, time_dim, time_dim) if offset else None
        self.transformer_blocks = nn.ModuleList(CogVideoXBlock(dim, num_heads, time_dim) for _ in range(depth))
        self.norm_final = nn.LayerNorm(dim)
        self.norm_out = AdaptiveNorm(dim, time_dim)
        self.proj_out = nn.Linear(dim, out_channels * tubelet_size * patch_size**2)
        if zero_init:
            init_weights(self)

    def forward(
        self,
        latents: Tensor,
        time: Tensor,
        text: Tensor,
        text_mask: Tensor | None = None,
        pooled: Tensor | None = None,
        guidance: Tensor | None = None,
        cache: KeyValueCache | None = None,
        first_frame: int = 0,
    ) -> Tensor:
        """
        Args:
            latents: (B, C, T, H, W), noisy; for image-to-video with the image's behind them along C.
            time: (B,), or one a frame (B, T), in [0, 1000]: 0 clean, 1000 noise. With one a frame the text is modulated
                at time 0. The frames of a patch must have the same.
            text: (B, L, text_dim).
            text_mask, pooled: not used: the published models see padding, and have no pooled text.
            guidance: must be ``None``.
            cache: of a causal model: keys and values of the text and of earlier frames are taken from it, those of
                these frames are put into it.
            first_frame: place of the first of ``latents`` in the clip; from it on the cache is overwritten. Unless it
                is 0, the text comes from the cache, too.

        Returns:
            (B, out_channels, T, H, W).

        Raises:
            ValueError: if something does not fit the model; the message says what would.
        """
        self._check(latents, time, text, guidance, cache, first_frame)
        first = first_frame // self.patch_size[0]
        t, h, w = grid = self.grid(latents.shape)
        weight = self.proj_out.weight
        x, text = self.patch_embed(latents.to(weight.dtype)), self.patch_embed.text_proj(text.to(weight.dtype))
        x, text = self._with_positions(x, text, grid, first)
        condition = self._condition(time)

        text_len, chunk = text.shape[1], self.causal_chunk // self.patch_size[0]
        kept = text_len + first * h * w if first else 0
        if first:
            text = text[:, :0]
        mask = block_causal(text_len, t, h * w, chunk, first, x.device) if chunk else None
        shared = Shared(text.shape[1], self.places.rotation(grid, first, text.shape[1], x.device), mask, cache, kept)
        for layer, block in enumerate(self.transformer_blocks):
            if self.checkpointing and torch.is_grad_enabled() and cache is None:
                text, x = checkpoint(block, text, x, condition, shared, layer, use_reentrant=False)
            else:
                text, x = block(text, x, condition, shared, layer)
        patches = self.proj_out(self.norm_out(self.norm_final(x), condition.video))
        pt, ph, pw = self.patch_size
        pattern = "b (t h w) (c pt ph pw) -> b c (t pt) (h ph) (w pw)"
        return rearrange(patches, pattern, t=t, h=h, w=w, pt=pt, ph=ph, pw=pw)

    def check_size(self, size: Grid) -> None:
        """Latents of ``size`` (T, H, W) can be cut into patches and have positions, else a ValueError."""
        self.places.check(size, 0)

    def grid(self, latents_shape: torch.Size | tuple[int, ...]) -> Grid:
        """Patches (t, h, w) of latents (B, C, T, H, W)."""
        t, h, w = (size // patch for size, patch in zip(latents_shape[2:], self.patch_size, strict=True))
        return t, h, w

    def _condition(self, time: Tensor) -> Condition:
        """Of (B,): the same for text and video; of (B, T): the text's at time 0, the video's by frame of patches."""
        frames = time[:, None] if time.ndim == 1 else time[:, :: self.patch_size[0]]
        video = self._embedded(frames)
        return Condition(video if time.ndim == 1 else self._embedded(torch.zeros_like(frames[:, :1])), video)

    def _embedded(self, time: Tensor) -> Tensor:
        """(B, K) -> (B, K, E)."""
        embedded = self.time_embedding(sinusoidal(time, self.num_heads * self.head_dim))
        if self.ofs_embedding is not None:
            offset = torch.full_like(time[:1, :1], OFFSET, dtype=torch.float32)
            embedded = embedded + self.ofs_embedding(sinusoidal(offset, self.time_dim))
        return F.silu(embedded)

    def _with_positions(self, x: Tensor, text: Tensor, grid: Grid, first: int) -> tuple[Tensor, Tensor]:
        """Video (B, N, D) and text (B, L, D) with the positions that are added to them."""
        if self.places.kind == "sincos":
            x = x + sincos_positions(grid, x.shape[-1], self.places.spatial_scale, first).to(x)
        elif self.patch_embed.pos_embedding is not None:
            table = self.patch_embed.pos_embedding.to(x)
            before = self.text_len + first * grid[1] * grid[2]
            x, text = x + table[:, before : before + x.shape[1]], text + table[:, : self.text_len]
        return x, text

    def _check(
        self,
        latents: Tensor,
        time: Tensor,
        text: Tensor,
        guidance: Tensor | None,
        cache: KeyValueCache | None,
        first_frame: int,
    ) -> None:
        """Raises a ValueError for what :meth:`forward` cannot take."""
        if latents.ndim != 5 or latents.shape[1] != self.in_channels:
            raise ValueError(
                f"latents are {tuple(latents.shape)}, but this model takes (B, in_channels={self.in_channels}, T, H, W)"
                f"{': noisy ones and behind them the image' if self.in_channels == 2 * self.out_channels else ''}."
            )
        num_frames, height, width = latents.shape[2:]
        self.places.check((num_frames, height, width), first_frame)
        if text.ndim != 3 or len(text) != len(latents) or text.shape[2] != self.text_dim:
            raise ValueError(
                f"text is {tuple(text.shape)}, but this model takes (B={len(latents)}, L, text_dim={self.text_dim})."
            )
        fixed = self.places.kind != "rope"
        if text.shape[1] > self.text_len or (fixed and text.shape[1] != self.text_len):
            raise ValueError(
                f"{text.shape[1]} text tokens, but text_len={self.text_len}{'' if fixed else ' at most'}: pad or cut "
                "the captions to that length, as in training."
            )
        if tuple(time.shape) not in ((len(latents),), (len(latents), num_frames)):
            raise ValueError(
                f"time is {tuple(time.shape)}: give one a clip, ({len(latents)},), or one a frame, "
                f"({len(latents)}, {num_frames})."
            )
        if time.ndim == 2 and self.patch_size[0] > 1 and not torch.compiler.is_compiling():
            of_patches = time.unflatten(1, (-1, self.patch_size[0]))
            if not torch.equal(of_patches, of_patches[..., :1].expand_as(of_patches)):
                raise ValueError(f"the {self.patch_size[0]} frames of a patch must have the same time.")
        if guidance is not None:
            raise ValueError("CogVideoX has no embedded guidance: guidance must be None.")
        if self.causal_chunk and time.ndim == 1:
            raise ValueError(
                "a causal model takes a time a frame, (B, T), since the text must not depend on that of frames to "
                "come: repeat the time over the frames."
            )
        if cache is not None and not self.causal_chunk:
            raise ValueError("only a causal model can use a cache: set causal_chunk to the frames of a chunk.")
        if first_frame and (cache is None or first_frame < 0 or first_frame % self.causal_chunk):
            raise ValueError(
                f"first_frame={first_frame} needs a cache, and must be a multiple of causal_chunk={self.causal_chunk}."
            )

    # ---- published weights ----

    @classmethod
    def from_published(cls, source: str | Path, **settings: Any) -> Self:
        """Builds a model from published weights, in their dtype. Prints its name and size.

        Args:
            source: a model or pipeline folder in the layout of diffusers, a file in the layout of SAT or of diffusers,
                or a hub id. A file holds neither the clip size nor the positions: those of the published model with
                its shapes are used.
            settings: constructor arguments that replace those read from the weights, such as ``causal_chunk``.

        Raises:
            FileNotFoundError: a file is missing.
            ValueError: the weights are damaged, of another architecture, do not match their config, or their config has
                settings that no published model has.
        """
        config, state = read_published(source, FAMILY, convert_sat)
        arguments = settings_of_weights(state, source, config) | settings_of_config(state, config)
        with torch.device("meta"):
            model = cls(**{**arguments, "zero_init": False, **settings})
        own = {key: value for key, value in model.config().items() if key not in ("sample_frames", "causal_chunk")}
        if found := different_settings({key: config[key] for key in own if key in config}, own):
            raise ValueError(
                f"{source}: its config does not describe these weights, of a {model.variant}, or has settings "
                f"that no published CogVideoX has: {found}. Use the config that belongs to the weights."
            )
        load_strictly(model, state, source)
        print(f"{model.variant} from {source}: {sum(p.numel() for p in model.parameters()) / 1e9:.3f}B parameters")
        return model

    def load_published(self, source: str | Path) -> str:
        """Loads published weights, see :meth:`from_published`, into this model.

        Returns:
            A sentence on what was loaded.

        Raises:
            FileNotFoundError: a file is missing.
            ValueError: the weights are damaged, or of another variant; the message names the settings that differ.
        """
        config, state = read_published(source, FAMILY, convert_sat)
        loaded = settings_of_weights(state, source, config or self.config())
        own = settings_of_weights(self.state_dict(), source, self.config())
        if found := different_settings(loaded, own):
            with torch.device("meta"):
                name = type(self)(**loaded, zero_init=False).variant
            raise ValueError(
                f"{source} holds a {name}, but the model is a {self.variant}: {found}. Choose the model=cogvideox/… of "
                "these weights."
            )
        load_strictly(self, state, source)
        return f"loaded {self.variant} from {source}"

    def save_published(self, folder: str | Path) -> None:
        """Writes a folder that diffusers' ``CogVideoXTransformer3DModel.from_pretrained`` loads.

        For a causal model the config also holds ``causal_chunk``, which diffusers ignores with a warning.

        Raises:
            FileExistsError: the folder exists and is not empty.
        """
        write_folder(folder, self.config(), self.state_dict())

    def config(self) -> dict[str, Any]:
        """Settings of this model as ``config.json`` of diffusers holds them."""
        tubelet, patch, _ = self.patch_size
        num_frames, height, width = self.places.latent_size
        config = PUBLISHED_SETTINGS | {
            "_class_name": "CogVideoXTransformer3DModel",
            "num_attention_heads": self.num_heads,
            "attention_head_dim": self.head_dim,
            "num_layers": len(self.transformer_blocks),
            "in_channels": self.in_channels,
            "out_channels": self.out_channels,
            "text_embed_dim": self.text_dim,
            "max_text_seq_length": self.text_len,
            "time_embed_dim": self.time_dim,
            "ofs_embed_dim": None if self.ofs_embedding is None else self.time_dim,
            "patch_size": patch,
            "patch_size_t": None if tubelet == 1 else tubelet,
            "patch_bias": tubelet == 1,
            "sample_frames": 4 * (num_frames - 1) + 1,
            "sample_height": height,
            "sample_width": width,
            "spatial_interpolation_scale": self.places.spatial_scale,
            "use_rotary_positional_embeddings": self.places.kind != "sincos",
            "use_learned_positional_embeddings": self.places.kind == "rope_and_table",
        }
        return config | ({"causal_chunk": self.causal_chunk} if self.causal_chunk else {})

    @property
    def variant(self) -> str:
        """Name of the published model of this shape, such as ``CogVideoX1.5-5B-I2V``, or a description of the shape."""
        blocks, width = len(self.transformer_blocks), self.num_heads * self.head_dim
        size = {(30, 30): "-2B", (42, 48): "-5B"}.get((blocks, self.num_heads), f" of {blocks} blocks, {width} wide")
        version = "1.5" if self.patch_size[0] > 1 else ""
        return f"CogVideoX{version}{size}{'-I2V' if self.image_condition else ''}"


def init_weights(model: CogVideoX) -> None:
    """DiT's (arXiv 2212.09748): Xavier-uniform matrices and patches, zero biases, the MLP of the time normal with 0.02.

    What modulates and what puts out begins at zero: every block adds nothing, and the output is zero. LayerNorms (1, 0)
    keep the values they are made with.
    """
    for module in model.modules():
        if isinstance(module, nn.Linear | nn.Conv2d):
            nn.init.xavier_uniform_(module.weight.flatten(1))  # a view; a patch counts as one row
            if module.bias is not None:
                nn.init.zeros_(module.bias)
    for mlp in (model.time_embedding, model.ofs_embedding):
        if mlp is not None:
            nn.init.normal_(mlp.linear_1.weight, std=0.02)
            nn.init.normal_(mlp.linear_2.weight, std=0.02)
    for module in model.modules():
        if isinstance(module, ExpertNorm | AdaptiveNorm):
            nn.init.zeros_(module.linear.weight)
    nn.init.zeros_(model.proj_out.weight)
