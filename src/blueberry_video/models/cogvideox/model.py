"""CogVideoX (arXiv 2408.06072; github.com/THUDM/CogVideo): the diffusion transformer of 2B, 5B, 1.5-5B and their
image-to-video variants.

Text and video are one sequence with shared weights, LayerNorms included; only shift, scale and gate, computed from the
timestep, are separate for each ("expert" adaptive LayerNorm). The text has no padding mask and no positions. Attention
normalizes each head. 2B adds sine-cosine position embeddings to the tokens; 5B rotates queries and keys, and stretches
grids of other sizes over the training grid, as diffusers does, or crops that grid, as SAT does; 1.5 rotates them on the
plain grid and has patches of two latent frames.
Parameter names are those of diffusers.

Letters: B clips, C channels, T latent frames, H W latent rows and columns; t h w the patch grid, S = h * w tokens per
frame of patches, N = t * S, L text tokens, D width, E width of the condition, K conditions per clip: 1, or t.
"""

from pathlib import Path
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from blueberry_video.models.cogvideox.blocks import AdaptiveNorm, CogVideoXBlock, Condition, ExpertNorm, PatchEmbedding
from blueberry_video.models.cogvideox.convert import (
    FREE_SETTINGS,
    PUBLISHED_SETTINGS,
    SAT_CONFIG,
    convert_sat,
    settings_of,
)
from blueberry_video.models.cogvideox.positions import CogVideoXPositions, sincos_positions
from blueberry_video.models.diffusion_transformer import DiffusionTransformer, Grid, own_rotation, text_timestep
from blueberry_video.nn.joint_attention import KeyValueCache, Shared, block_causal
from blueberry_video.nn.timestep_conditioning import TimestepMLP, sinusoidal
from blueberry_video.weights.load import different_settings

OFFSET = 2.0  # constant input of the offset embedding of 1.5-5B-I2V


class CogVideoX(DiffusionTransformer):
    """CogVideoX transformer: predicts the target of the objective from noisy latents, timestep and text.

    Args:
        num_heads, head_dim: attention heads; the width is their product.
        depth: blocks.
        in_channels: channels of the latents, including the appended image latents for image-to-video.
        out_channels: channels of the output.
        text_dim: width of a text token.
        text_len: text tokens; the exact number with ``sincos`` and ``rope_and_table``, otherwise the maximum.
        time_dim: width E of the condition.
        patch_size: rows and columns of a patch.
        tubelet_size: latent frames of a patch: 1, or 2 in CogVideoX 1.5.
        num_frames, height, width: size of the latents in training, see ``rotary_grid``; a table takes no other rows and
            columns, and no more frames. Ignored for ``"sincos"``.
        positions: ``"sincos"`` (2B), ``"rope"`` (5B, 1.5) or ``"rope_and_table"`` (5B-I2V).
        spatial_scale: divisor of rows and columns for ``"sincos"``.
        rotary_grid: rotary positions of other rows and columns than in training: ``"stretch"`` (diffusers' 5B) scales
            them to fit into the training grid; ``"crop"`` (1.5, and 5B in SAT) counts them from 0, up to ``height`` and
            ``width``. ``None``: ``"crop"`` with ``tubelet_size`` above 1, which has no other, else ``"stretch"``.
        norm_out_eps: eps of the LayerNorm before the output: 1e-5 in diffusers, 1e-6 in SAT. Weights in SAT's layout
            are read with SAT's settings.
        offset: add the embedding of a constant to that of the timestep (1.5-5B-I2V).
        causal_chunk, checkpointing: see :class:`~blueberry_video.models.diffusion_transformer.DiffusionTransformer`.
        zero_init: initialize as DiT does, see :func:`init_weights`; otherwise as PyTorch does.

    Attributes:
        image_condition: ``"channels"`` for image-to-video: the latents of the first frame, zero-padded to all frames,
            are concatenated to the noisy latents along the channels; else ``None``.
        image_dropout: share of training clips without image conditioning in published training: 0.05
            (``noised_image_dropout`` in sat/configs/cogvideox_5b_i2v.yaml of THUDM/CogVideo).

    Raises:
        ValueError: for sizes that do not fit each other, or an unknown ``positions`` or ``rotary_grid``.
    """

    block_lists: ClassVar[tuple[str, ...]] = ("transformer_blocks",)  # sharded one by one
    family = "CogVideoX"
    convert = staticmethod(convert_sat)
    settings_of = staticmethod(settings_of)
    flexible = FREE_SETTINGS
    original_config = SAT_CONFIG

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
        rotary_grid: str | None = None,
        norm_out_eps: float = 1e-5,
        offset: bool = False,
        causal_chunk: int = 0,
        zero_init: bool = True,
        checkpointing: bool = False,
    ):
        super().__init__()
        dim = num_heads * head_dim
        if causal_chunk < 0 or causal_chunk % tubelet_size:
            raise ValueError(
                f"causal_chunk={causal_chunk} must be a multiple of tubelet_size={tubelet_size}, or 0 for full "
                "attention."
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
        self.positions = CogVideoXPositions(
            positions, num_heads, head_dim, self.patch_size, latent_size, spatial_scale, rotary_grid
        )

        table = self.positions.joint_table(text_len) if positions == "rope_and_table" else None
        self.patch_embed = PatchEmbedding(in_channels, self.patch_size, text_dim, dim, table)
        self.time_embedding = TimestepMLP(dim, time_dim, time_dim)
        self.ofs_embedding = TimestepMLP(time_dim, time_dim, time_dim) if offset else None
        self.transformer_blocks = nn.ModuleList(CogVideoXBlock(dim, num_heads, time_dim) for _ in range(depth))
        self.norm_final = nn.LayerNorm(dim)
        self.norm_out = AdaptiveNorm(dim, time_dim, norm_out_eps)
        self.proj_out = nn.Linear(dim, out_channels * tubelet_size * patch_size**2)
        if zero_init:
            init_weights(self)

    def forward(
        self,
        latents: Tensor,
        timestep: Tensor,
        text: Tensor,
        text_mask: Tensor | None = None,
        pooled: Tensor | None = None,
        guidance: Tensor | None = None,
        cache: KeyValueCache | None = None,
        first_frame: int = 0,
    ) -> Tensor:
        """See :class:`~blueberry_video.models.diffusion_transformer.DiffusionTransformer`.

        The frames of a patch must have equal timesteps. ``text_mask`` and ``pooled`` are ignored: the published models
        attend to padding. ``guidance`` must be ``None``.
        """
        self.check_inputs(latents, timestep, text, None, cache, first_frame)
        self._check_more(timestep, text, guidance)
        first = first_frame // self.patch_size[0]
        t, h, w = grid = self.grid(latents)
        weight = self.proj_out.weight
        x, text = self.patch_embed(latents.to(weight.dtype)), self.patch_embed.text_proj(text.to(weight.dtype))
        x, text = self._with_positions(x, text, grid, first)
        condition = self._condition(timestep)

        text_len, chunk = text.shape[1], self.causal_chunk // self.patch_size[0]
        kept = text_len + first * h * w if first else 0
        if first:
            text = text[:, :0]
        mask = block_causal(text_len, t, h * w, chunk, first, x.device) if chunk else None
        rotation = self.positions.rotation(grid, first, text.shape[1], x.device)
        shards = self.shards(grid)
        if shards is not None:
            x, rotation = shards.own(x), own_rotation(rotation, text.shape[1], shards)
        shared = Shared(text.shape[1], rotation, mask, cache, kept, shards)
        for layer, block in enumerate(self.transformer_blocks):
            text, x = self.run_block(block, text, x, condition, shared=shared, layer=layer)
        patches = self.proj_out(self.norm_out(self.norm_final(x), condition.video))
        return self.unpatchify(patches if shards is None else shards.gather(patches), grid)

    def check_size(self, size: Grid, first_frame: int = 0) -> None:
        """Checks that latents of ``size`` (T, H, W) consist of whole patches and have positions.

        Raises:
            ValueError: they do not; the message names the nearest size, or the argument to change.
        """
        super().check_size(size)
        self.positions.check(size, first_frame)

    def _condition(self, timestep: Tensor) -> Condition:
        """One condition for text and video from (B,); from (B, T), one per patch frame, and timestep 0 for text."""
        frames = timestep[:, None] if timestep.ndim == 1 else timestep[:, :: self.patch_size[0]]
        video = self._embedded(frames)
        return Condition(video if timestep.ndim == 1 else self._embedded(text_timestep(frames)[:, None]), video)

    def _embedded(self, timesteps: Tensor) -> Tensor:
        """(B, K) -> (B, K, E)."""
        embedded = self.time_embedding(sinusoidal(timesteps, self.num_heads * self.head_dim))
        if self.ofs_embedding is not None:
            offset = torch.full_like(timesteps[:1, :1], OFFSET, dtype=torch.float32)
            embedded = embedded + self.ofs_embedding(sinusoidal(offset, self.time_dim))
        return F.silu(embedded)

    def _with_positions(self, x: Tensor, text: Tensor, grid: Grid, first: int) -> tuple[Tensor, Tensor]:
        """Video (B, N, D) and text (B, L, D), with additive position embeddings where the model has them."""
        if self.positions.kind == "sincos":
            x = x + sincos_positions(grid, x.shape[-1], self.positions.spatial_scale, first).to(x)
        elif self.patch_embed.pos_embedding is not None:
            table = self.patch_embed.pos_embedding.to(x)
            before = self.text_len + first * grid[1] * grid[2]
            x, text = x + table[:, before : before + x.shape[1]], text + table[:, : self.text_len]
        return x, text

    def _check_more(self, timestep: Tensor, text: Tensor, guidance: Tensor | None) -> None:
        """Checks what the other families do not restrict, or restrict differently."""
        fixed = self.positions.kind != "rope"
        if text.shape[1] > self.text_len or (fixed and text.shape[1] != self.text_len):
            raise ValueError(
                f"text has {text.shape[1]} tokens, but text_len={self.text_len} is the "
                f"{'required' if fixed else 'maximum'} number: pad or truncate the captions to it, as in training."
            )
        if timestep.ndim == 2 and self.patch_size[0] > 1 and not torch.compiler.is_compiling():
            of_patches = timestep.unflatten(1, (-1, self.patch_size[0]))
            if not torch.equal(of_patches, of_patches[..., :1].expand_as(of_patches)):
                raise ValueError(
                    f"the {self.patch_size[0]} frames of a patch must have equal values in timestep, which differ: "
                    f"repeat one value over the frames of each patch (patch_size={self.patch_size})."
                )
        if guidance is not None:
            raise ValueError("CogVideoX has no embedded guidance: guidance must be None.")

    # ---- published weights ----

    @classmethod
    def _read(
        cls, weights: str | Path, defaults: dict[str, Any] | None = None
    ) -> tuple[dict[str, Any], dict[str, Tensor], dict[str, Any]]:
        config, state, settings = super()._read(weights, defaults)
        if settings["positions"] == "sincos":  # SAT saves the table, which is computed here
            state = {name: value for name, value in state.items() if name != "patch_embed.pos_embedding"}
        return config, state, settings

    def check_config(self, config: dict[str, Any], source: str | Path) -> None:
        free = ("sample_frames", "causal_chunk", "norm_out_eps", "rotary_grid")  # may be replaced by an argument
        own = {key: value for key, value in self.config().items() if key not in free}
        if found := different_settings({key: config[key] for key in own if key in config}, own):
            raise ValueError(
                f"{source}: its config does not describe these weights, of a {self.variant}, or has settings "
                f"that no published CogVideoX has: {found}. Use the config that belongs to the weights."
            )

    def config(self) -> dict[str, Any]:
        tubelet, patch, _ = self.patch_size
        num_frames, height, width = self.positions.latent_size
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
            "spatial_interpolation_scale": self.positions.spatial_scale,
            "use_rotary_positional_embeddings": self.positions.kind != "sincos",
            "use_learned_positional_embeddings": self.positions.kind == "rope_and_table",
        }
        # diffusers has no such settings, and ignores them with a warning
        own: dict[str, Any] = {"causal_chunk": self.causal_chunk} if self.causal_chunk else {}
        if self.norm_out.norm.eps != PUBLISHED_SETTINGS["norm_eps"]:
            own["norm_out_eps"] = self.norm_out.norm.eps
        if self.positions.kind == "rope" and self.positions.crop and tubelet == 1:
            own["rotary_grid"] = "crop"
        return config | own

    @property
    def variant(self) -> str:
        """Name of the published model of this shape, such as ``CogVideoX1.5-5B-I2V``, or a description of the shape."""
        blocks, width = len(self.transformer_blocks), self.num_heads * self.head_dim
        size = {(30, 30): "-2B", (42, 48): "-5B"}.get((blocks, self.num_heads), f" of {blocks} blocks, {width} wide")
        version = "1.5" if self.patch_size[0] > 1 else ""
        return f"CogVideoX{version}{size}{'-I2V' if self.image_condition else ''}"


def init_weights(model: CogVideoX) -> None:
    """Initializes as DiT does (arXiv 2212.09748): Xavier-uniform matrices and patch projection, zero biases, and normal
    weights (std 0.02) in the timestep MLPs.

    Modulation and output projection start at zero, so that blocks are the identity and the output is zero. LayerNorms
    keep PyTorch's initialization (1, 0).
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
