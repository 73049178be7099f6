"""Base class of HunyuanVideo and HunyuanVideo-1.5: patches, rotary positions, attention masks, blocks and output.

Letters: B clips, C latent channels, T latent frames, H W latent rows and columns, N video tokens, L text tokens, D
width, K conditions: 1, or T.
"""

from pathlib import Path
from typing import Any, ClassVar, NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention.flex_attention import BlockMask, create_block_mask

from blueberry_video.models.diffusion_transformer import DiffusionTransformer, Grid, own_rotation
from blueberry_video.models.hunyuan_video.blocks import DualStreamBlock, Modulation, SingleStreamBlock, normalize
from blueberry_video.models.hunyuan_video.convert import (
    ORIGINAL_NAMES,
    check_parts,
    complete_rotation,
    convert_tencent,
    settings_of_weights,
)
from blueberry_video.models.hunyuan_video.token_refiner import TokenRefiner
from blueberry_video.nn.embeddings import TubeletEmbed
from blueberry_video.nn.joint_attention import KeyValueCache, Shared, block_causal
from blueberry_video.nn.rope import Rotation, axes_rotation
from blueberry_video.nn.timestep_conditioning import TimestepMLP


class Condition(NamedTuple):
    """Inputs of the adaLN modulation."""

    video: Tensor  # (B, K, D)
    text: Tensor | None  # (B, 1, D); ``None``: that of the video, with K = 1
    output: Tensor  # (B, K, D)


class DualStreamTransformer(DiffusionTransformer):
    """Dual-stream, then single-stream blocks, between patches and latents; a subclass embeds text and conditioning.

    Args:
        in_channels, out_channels: channels of the input latents and of the output.
        patch_size: latent frames, rows and columns per token, (t, h, w).
        num_heads, head_dim: attention heads; the width D is their product.
        depth, single_depth: dual-stream and single-stream blocks.
        refiner_depth: blocks of the token refiner.
        mlp_ratio: hidden over outer width of the MLPs.
        text_dim: width of the (first) text encoder's tokens.
        rope_axes: channels of a head that rotate by time, row and column; their sum is ``head_dim``.
        rope_theta: base of the rotary frequencies.
        causal_chunk, checkpointing: see :class:`~blueberry_video.models.diffusion_transformer.DiffusionTransformer`.

    Attributes:
        diffusers_class: class of diffusers with this architecture.

    Raises:
        ValueError: for axes that do not fill a head.
    """

    block_lists: ClassVar[tuple[str, ...]] = ("transformer_blocks", "single_transformer_blocks")  # sharded one by one
    convert = staticmethod(convert_tencent)
    check_source = staticmethod(check_parts)
    complete = staticmethod(complete_rotation)
    original_names = ORIGINAL_NAMES
    assumed = ("rope_axes_dim", "rope_theta")
    diffusers_class: ClassVar[str]

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        patch_size: tuple[int, int, int],
        num_heads: int,
        head_dim: int,
        depth: int,
        single_depth: int,
        refiner_depth: int,
        mlp_ratio: float,
        text_dim: int,
        rope_axes: tuple[int, int, int],
        rope_theta: float,
        causal_chunk: int,
        checkpointing: bool,
    ):
        super().__init__()
        if len(rope_axes) != 3 or sum(rope_axes) != head_dim or any(dim % 2 or dim < 0 for dim in rope_axes):
            raise ValueError(
                f"rope_axes={tuple(rope_axes)} must be three even numbers that sum to head_dim={head_dim}, such as "
                "(16, 56, 56) for 128."
            )
        t, h, w = patch_size
        if causal_chunk < 0 or (causal_chunk and t > 1):
            raise ValueError(
                f"causal_chunk={causal_chunk} must be a number of frames, which requires patches of one frame "
                f"(patch_size={tuple(patch_size)}), or 0 for full attention."
            )
        dim = num_heads * head_dim
        self.in_channels, self.out_channels, self.text_dim = in_channels, out_channels, text_dim
        self.patch_size: Grid = (t, h, w)
        self.num_heads, self.head_dim, self.mlp_ratio = num_heads, head_dim, mlp_ratio
        self.rope_axes: tuple[int, int, int] = (rope_axes[0], rope_axes[1], rope_axes[2])
        self.rope_theta, self.causal_chunk, self.checkpointing = rope_theta, causal_chunk, checkpointing
        self.x_embedder = TubeletEmbed(in_channels, dim, self.patch_size)
        self.context_embedder = TokenRefiner(text_dim, dim, num_heads, refiner_depth)
        self.transformer_blocks = nn.ModuleList(DualStreamBlock(dim, num_heads, mlp_ratio) for _ in range(depth))
        self.single_transformer_blocks = nn.ModuleList(
            SingleStreamBlock(dim, num_heads, mlp_ratio) for _ in range(single_depth)
        )
        self.norm_out = Modulation(dim, 2)
        self.proj_out = nn.Linear(dim, t * h * w * out_channels)

    def init_weights(self, zero_init: bool) -> None:
        """Initializes as DiT does (Peebles and Xie, arXiv 2212.09748), for training from scratch.

        Matrices and the patch convolution (as a matrix) are Xavier-uniform; MLPs of timesteps and conditions and
        embedding tables are normal (std 0.02); biases are 0; norms are (1, 0). With ``zero_init`` modulation and output
        projection are 0: blocks are the identity, and the output is 0.
        """
        for module in self.modules():
            if isinstance(module, nn.Linear | nn.Conv3d):
                nn.init.xavier_uniform_(module.weight.flatten(1) if isinstance(module, nn.Conv3d) else module.weight)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
            elif isinstance(module, nn.Embedding):
                nn.init.normal_(module.weight, std=0.02)
        for module in self.modules():
            if isinstance(module, TimestepMLP):
                nn.init.normal_(module.linear_1.weight, std=0.02)
                nn.init.normal_(module.linear_2.weight, std=0.02)
            elif isinstance(module, Modulation) and zero_init:
                nn.init.zeros_(module.linear.weight)
        if zero_init:
            nn.init.zeros_(self.proj_out.weight)

    def unused_parts(self) -> list[nn.Module]:
        """The text output of the last dual-stream block, if no single-stream block follows."""
        if not len(self.transformer_blocks) or len(self.single_transformer_blocks):
            return []
        last = cast(DualStreamBlock, self.transformer_blocks[-1])
        return [last.attn.to_add_out, last.ff_context]

    def check_inputs(self, latents: Tensor, timestep: Tensor, *inputs: Any) -> None:
        super().check_inputs(latents, timestep, *inputs)
        if timestep.ndim == 2 and self.patch_size[0] > 1:
            raise ValueError(f"timesteps per frame require patches of one frame, not patch_size={self.patch_size}.")

    def run(
        self,
        latents: Tensor,
        text: Tensor | None,
        text_len: int,
        text_mask: Tensor | None,
        condition: Condition,
        cache: KeyValueCache | None = None,
        first_frame: int = 0,
    ) -> Tensor:
        """Latents (B, C, T, H, W) and embedded text -> output (B, out_channels, T, H, W).

        Args:
            latents: frames from ``first_frame`` on.
            text: (B, L, D); ``None`` where the cache holds it.
            text_len: L in either case.
            text_mask: bool (B, L), false at padding, or ``None``.
            condition: see :class:`Condition`.
            cache, first_frame: of causal models: the cache holds the text and the frames before ``first_frame``.
        """
        t, h, w = grid = self.grid(latents)
        text_queries = 0 if text is None else text_len
        rotation: Rotation | None = self._rotation(grid, first_frame, text_queries, latents.device)
        x, (video_condition, text_condition, output_condition) = self.x_embedder(latents), condition
        shards = self.shards(grid)
        if shards is not None:
            x, rotation = shards.own(x), own_rotation(rotation, text_queries, shards)
        shared = Shared(
            text_queries,
            rotation,
            self._mask(text_len, text_mask, first_frame, t, h * w, latents.device),
            cache,
            text_len + first_frame * h * w if first_frame else 0,
            shards,
        )
        for layer, block in enumerate(self.transformer_blocks):
            of_text = video_condition if text_condition is None else text_condition
            x, text = self.run_block(block, x, text, video_condition, of_text, shared=shared, layer=layer)
        if len(self.single_transformer_blocks):
            x = x if text is None else torch.cat([text, x], dim=1)
            for layer, block in enumerate(self.single_transformer_blocks, len(self.transformer_blocks)):
                x = self.run_block(block, x, video_condition, text_condition, shared=shared, layer=layer)
            x = x[:, text_queries:]
        scale, shift = self.norm_out(output_condition)
        patches = self.proj_out(normalize(x, shift, scale))
        return self.unpatchify(patches if shards is None else shards.gather(patches), grid)

    # ---- published weights ----

    def save_published(self, folder: str | Path) -> None:
        """See :meth:`.DiffusionTransformer.save_published`; patches must be square."""
        self.check_square_patches()
        super().save_published(folder)

    def check_square_patches(self) -> None:
        """Checks that the config of diffusers can hold the patch size.

        Raises:
            ValueError: the rows and columns of a patch differ.
        """
        if self.patch_size[1] != self.patch_size[2]:
            raise ValueError(f"diffusers has no model with patch_size={self.patch_size}: use square patches.")

    @classmethod
    def settings_of(cls, state: dict[str, Tensor], config: dict[str, Any]) -> dict[str, Any]:
        return settings_of_weights(state, config)

    def config(self) -> dict[str, Any]:
        t, h, _ = self.patch_size
        config = {
            "_class_name": self.diffusers_class,
            "in_channels": self.in_channels,
            "out_channels": self.out_channels,
            "num_attention_heads": self.num_heads,
            "attention_head_dim": self.head_dim,
            "num_layers": len(self.transformer_blocks),
            "num_refiner_layers": self.context_embedder.depth,
            "mlp_ratio": self.mlp_ratio,
            "patch_size": h,
            "patch_size_t": t,
            "qk_norm": "rms_norm",
            "text_embed_dim": self.text_dim,
            "rope_theta": self.rope_theta,
            "rope_axes_dim": list(self.rope_axes),
        }
        return config | ({"causal_chunk": self.causal_chunk} if self.causal_chunk else {})

    def _rotation(self, grid: Grid, first: int, text_len: int, device: torch.device) -> Rotation:
        """Rotation of [text, video], (L + N, 1, head_dim); the text, at (0, 0, 0), is not rotated."""
        axes = [torch.arange(size, dtype=torch.float32, device=device) for size in grid]
        positions = torch.cartesian_prod(axes[0] + first, *axes[1:])  # (N, 3)
        positions = torch.cat([positions.new_zeros(text_len, 3), positions])
        return Rotation(*(part[:, None] for part in axes_rotation(positions, self.rope_axes, self.rope_theta)))

    def _mask(
        self, text_len: int, text_mask: Tensor | None, first: int, t: int, tokens_per_frame: int, device: torch.device
    ) -> Tensor | BlockMask | None:
        """Attention mask of the queries over the keys, [text, frames from 0 on]; ``None``: full attention."""
        mask: Tensor | BlockMask | None = None
        if self.causal_chunk:
            mask = block_causal(text_len, t, tokens_per_frame, self.causal_chunk, first, device)
        if text_mask is None:
            return mask
        if isinstance(mask, BlockMask):
            return without_padding(mask, text_mask)
        keys = F.pad(text_mask, (0, (first + t) * tokens_per_frame), value=True)[:, None, None]  # (B, 1, 1, M)
        if mask is None:
            return keys
        if first:
            return mask & keys
        itself = torch.eye(len(mask), dtype=torch.bool, device=device)  # no row is empty, even of a fully padded text
        return mask & keys | itself


def without_padding(mask: BlockMask, text_mask: Tensor) -> BlockMask:
    """Adds the padding mask of the prepended text, bool (B, L); each padding token still attends to itself."""
    batch, text_len = text_mask.shape
    mask_mod = mask.mask_mod

    def visible(sample: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        is_text = (key >= text_len) | text_mask[sample, key.clamp(max=text_len - 1)]
        return (mask_mod(sample, head, query, key) & is_text) | (query == key)

    return create_block_mask(visible, batch, None, *mask.seq_lengths, device=text_mask.device)


def padding_mask(mask: Tensor | None) -> Tensor | None:
    """The padding mask (B, L), or ``None`` without padding, since attention without a mask is faster."""
    if mask is None or torch.compiler.is_compiling() or not bool(mask.all()):
        return mask
    return None
