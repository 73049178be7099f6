"""What HunyuanVideo and HunyuanVideo-1.5 share: patches, rotary positions, masks, the walk through the blocks, the
output and the initial weights.

Letters: B clips, C latent channels, T latent frames, H W latent rows and columns, N video tokens, L text tokens, D
width, K conditions: 1, or T.
"""

from pathlib import Path
from typing import Any, ClassVar, Self

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn
from torch.nn.attention.flex_attention import BlockMask, create_block_mask
from torch.utils.checkpoint import checkpoint

from blueberry_video.models.hunyuan_video.blocks import DualStreamBlock, Modulation, SingleStreamBlock, normalize
from blueberry_video.models.hunyuan_video.convert import convert_tencent, settings_of_weights
from blueberry_video.models.hunyuan_video.token_refiner import TokenRefiner
from blueberry_video.nn.embeddings import TubeletEmbed
from blueberry_video.nn.joint_attention import KeyValueCache, Shared, block_causal
from blueberry_video.nn.rope import Rotation, axes_rotation
from blueberry_video.nn.timestep_embedding import TimestepMLP
from blueberry_video.weights.diffusers_folder import read_published, write_folder
from blueberry_video.weights.load import different_settings, load_strictly


class DualStreamTransformer(nn.Module):
    """Blocks of two streams, then of one, between patches and latents; a subclass embeds text and conditions.

    Args:
        in_channels, out_channels: of the latents given, and of the output.
        patch_size: latent frames, rows and columns a token, (t, h, w).
        num_heads, head_dim: of the attention; the width D is their product.
        depth, single_depth: blocks of two streams, and of one.
        refiner_depth: blocks of the token refiner.
        mlp_ratio: hidden over outer width of the MLPs.
        text_dim: width of the (first) text encoder's tokens.
        rope_axes: channels of a head that time, row and column turn; their sum is ``head_dim``.
        rope_theta: base of their frequencies.
        causal_chunk: frames a chunk that see each other, the text and earlier chunks; 0: all see all.
        checkpointing: recompute the inside of every block in the backward pass rather than keep it.

    Attributes:
        family: name of the architecture in :mod:`~blueberry_video.weights.diffusers_folder`.
        diffusers_class: the class of diffusers that has this architecture.

    Raises:
        ValueError: for axes that do not fill a head.
    """

    family: ClassVar[str]
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
                f"rope_axes={tuple(rope_axes)} must be three even numbers whose sum is head_dim={head_dim}, such as "
                "(16, 56, 56) for 128."
            )
        t, h, w = patch_size
        if causal_chunk < 0 or (causal_chunk and t > 1):
            raise ValueError(
                f"causal_chunk={causal_chunk} must be a number of frames, with tokens of one frame "
                f"(patch_size={tuple(patch_size)}), or 0 for full attention."
            )
        dim = num_heads * head_dim
        self.in_channels, self.out_channels, self.text_dim = in_channels, out_channels, text_dim
        self.patch_size: tuple[int, int, int] = (t, h, w)
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

    def grid(self, latents: Tensor) -> tuple[int, int, int]:
        """Tokens of latents (B, C, T, H, W) along (t, h, w)."""
        t, h, w = (size // patch for size, patch in zip(latents.shape[2:], self.patch_size))
        return t, h, w

    def check_size(self, size: tuple[int, int, int]) -> None:
        """Latents of ``size`` (T, H, W) can be cut into patches, else a ValueError."""
        for name, number, patch in zip(("frames", "rows", "columns"), size, self.patch_size):
            if not number or number % patch:
                nearest = max(round(number / patch), 1) * patch
                raise ValueError(
                    f"the latents have {number} {name}, no multiple of patch_size={self.patch_size}: the nearest is "
                    f"{nearest}."
                )

    def check(
        self,
        latents: Tensor,
        time: Tensor,
        text: Tensor,
        text_mask: Tensor | None,
        cache: KeyValueCache | None,
        first_frame: int,
    ) -> None:
        """Refuses what does not fit together.

        Raises:
            ValueError: naming the value, the argument or key, and what would be right.
        """
        if latents.ndim != 5 or latents.shape[1] != self.in_channels:
            raise ValueError(
                f"latents have the shape {tuple(latents.shape)}: expected (B, C, T, H, W) with C = in_channels = "
                f"{self.in_channels}. Choose a model variant or an autoencoder with equal numbers of channels."
            )
        batch, _, num_frames, height, width = latents.shape
        self.check_size((num_frames, height, width))
        if time.shape not in ((batch,), (batch, num_frames)):
            raise ValueError(
                f"time has the shape {tuple(time.shape)}: expected {(batch,)}, a time a clip, or "
                f"{(batch, num_frames)}, a time a latent frame."
            )
        if time.ndim == 2 and self.patch_size[0] > 1:
            raise ValueError(f"a time a frame needs tokens of one frame: patch_size={self.patch_size} has more.")
        if self.causal_chunk and time.ndim == 1:
            raise ValueError(
                f"causal_chunk={self.causal_chunk} needs a time a frame, (B, T), so that the text and earlier frames "
                "do not depend on the time of later ones: write time[:, None].expand(-1, T)."
            )
        check_text("text", text, "text_mask", text_mask, batch, "text_dim", self.text_dim)
        if (cache is not None or first_frame) and not self.causal_chunk:
            raise ValueError(
                f"a cache and first_frame={first_frame} need a causal model: set causal_chunk, the frames a chunk."
            )
        if first_frame and (cache is None or first_frame < 0 or first_frame % self.causal_chunk):
            raise ValueError(
                f"first_frame={first_frame} must be a multiple of causal_chunk={self.causal_chunk}, with the cache "
                "that the frames before it were evaluated with."
            )

    def run(
        self,
        latents: Tensor,
        text: Tensor | None,
        text_len: int,
        text_mask: Tensor | None,
        condition: Tensor,
        text_condition: Tensor | None,
        out_condition: Tensor,
        cache: KeyValueCache | None = None,
        first_frame: int = 0,
    ) -> Tensor:
        """Latents (B, C, T, H, W) and embedded text -> output (B, out_channels, T, H, W).

        Args:
            latents: from ``first_frame`` on.
            text: (B, L, D); ``None`` where the cache holds it.
            text_len: L in either case.
            text_mask: bool (B, L), false at padding, or ``None``.
            condition: (B, K, D) of the video.
            text_condition: (B, 1, D); ``None``: that of the video, with K = 1.
            out_condition: (B, K, D) before the output.
            cache, first_frame: of causal models: the text and the frames before it are in the cache.
        """
        t, h, w = grid = self.grid(latents)
        text_queries = 0 if text is None else text_len
        shared = Shared(
            text_queries,
            self._rotation(grid, first_frame, text_queries, latents.device),
            self._mask(text_len, text_mask, first_frame, t, h * w, latents.device),
            cache,
            text_len + first_frame * h * w if first_frame else 0,
        )
        x = self.x_embedder(latents)
        layer = 0
        for block in self.transformer_blocks:
            x, text = self._call(block, x, text, condition, _first_of(text_condition, condition), shared, layer)
            layer += 1
        if len(self.single_transformer_blocks):
            x = x if text is None else torch.cat([text, x], dim=1)
            for block in self.single_transformer_blocks:
                x = self._call(block, x, condition, text_condition, shared, layer)
                layer += 1
            x = x[:, text_queries:]
        scale, shift = self.norm_out(out_condition)
        pt, ph, pw = self.patch_size
        pattern = "b (t h w) (c pt ph pw) -> b c (t pt) (h ph) (w pw)"
        return rearrange(self.proj_out(normalize(x, shift, scale)), pattern, t=t, h=h, w=w, pt=pt, ph=ph, pw=pw)

    # ---- published weights ----

    @classmethod
    def from_published(cls, source: str | Path, **settings: Any) -> Self:
        """Builds a model from published weights, in their dtype.

        Args:
            source: a model or pipeline folder in the layout of diffusers, a file in the layout of Tencent or of
                diffusers, or a hub id.
            settings: constructor arguments that replace those read from the weights, such as ``causal_chunk``. No
                tensor of a Tencent file tells ``image_condition="token_replace"`` from text-to-video.

        Raises:
            FileNotFoundError: a file is missing.
            ValueError: the weights are damaged, of another architecture, or do not fit their config.
        """
        config, state = read_published(source, cls.family, convert_tencent)
        with torch.device("meta"):
            model = cls(**{**cls.settings_of(state, config), **settings})
        load_strictly(model, state, source)
        return model

    def load_published(self, source: str | Path) -> str:
        """Loads published weights, see :meth:`from_published`, into this model, in the model's dtype.

        Weights of another image conditioning are accepted where all shapes fit, since image-to-video training starts
        from text-to-video weights.

        Returns:
            A sentence on what was loaded.

        Raises:
            FileNotFoundError: a file is missing.
            ValueError: the weights are damaged, of another architecture, or of another variant; the message names the
                settings that differ.
        """
        config, state = read_published(source, self.family, convert_tencent)
        loaded = self.settings_of(state, self.config() | config) | {"causal_chunk": self.causal_chunk}
        own = self.settings_of(self.state_dict(), self.config())
        condition = {key: loaded.pop(key) for key in ("image_condition",) if key in loaded}
        if found := different_settings(loaded, own):
            raise ValueError(
                f"{source} holds a {self.family} with {found}: choose the model=text_to_video/… of these "
                "weights, or set model.transformer to these settings."
            )
        load_strictly(self, state, source)
        trained = different_settings(condition, own)
        return f"loaded {self.family} from {source}{f', trained with {trained}' if trained else ''}"

    def save_published(self, folder: str | Path) -> None:
        """Writes a folder that ``from_pretrained`` of diffusers loads.

        For a causal model the config also holds ``causal_chunk``, which diffusers ignores with a warning.

        Raises:
            FileExistsError: the folder exists and is not empty.
            ValueError: diffusers has no such model.
        """
        self.check_square_patches()
        write_folder(folder, self.config(), self.state_dict())

    def check_square_patches(self) -> None:
        """Checks that the config of diffusers can hold the patch size.

        Raises:
            ValueError: the rows and columns of a patch differ.
        """
        if self.patch_size[1] != self.patch_size[2]:
            raise ValueError(f"diffusers has no model with patch_size={self.patch_size}: use square patches.")

    @classmethod
    def settings_of(cls, state: dict[str, Tensor], config: dict | None = None) -> dict[str, Any]:
        """Constructor arguments for a state dict: sizes from its shapes, other settings from a config.

        Args:
            state: under diffusers' names.
            config: of diffusers; without it, positions are as published.
        """
        return settings_of_weights(state, config or {})

    def config(self) -> dict[str, Any]:
        """Settings of this model as ``config.json`` of diffusers holds them."""
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

    def _call(self, block: nn.Module, *arguments):
        if self.checkpointing and torch.is_grad_enabled():
            return checkpoint(block, *arguments, use_reentrant=False)
        return block(*arguments)

    def _rotation(self, grid: tuple[int, int, int], first: int, text_len: int, device: torch.device) -> Rotation:
        """Of [text, video], (L + N, 1, head_dim): text at (0, 0, 0) is not turned."""
        axes = [torch.arange(size, dtype=torch.float32, device=device) for size in grid]
        positions = torch.cartesian_prod(axes[0] + first, *axes[1:])  # (N, 3)
        positions = torch.cat([positions.new_zeros(text_len, 3), positions])
        return Rotation(*(part[:, None] for part in axes_rotation(positions, self.rope_axes, self.rope_theta)))

    def _mask(
        self, text_len: int, text_mask: Tensor | None, first: int, t: int, tokens_per_frame: int, device: torch.device
    ) -> Tensor | BlockMask | None:
        """Which keys, [text, frames from 0 on], the tokens evaluated may see; ``None``: all."""
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
        itself = torch.eye(len(mask), dtype=torch.bool, device=device)  # of a text of padding alone no row is empty
        return mask & keys | itself


def without_padding(mask: BlockMask, text_mask: Tensor) -> BlockMask:
    """Hides the padding of a text in front, bool (B, L), from all tokens but itself."""
    batch, text_len = text_mask.shape
    seen = mask.mask_mod

    def visible(sample: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        is_text = (key >= text_len) | text_mask[sample, key.clamp(max=text_len - 1)]
        return (seen(sample, head, query, key) & is_text) | (query == key)

    return create_block_mask(visible, batch, None, *mask.seq_lengths, device=text_mask.device)


def check_text(name: str, text: Tensor, mask_name: str, mask: Tensor | None, batch: int, key: str, dim: int) -> None:
    """Refuses text that is not (batch, L, dim), and a mask that is not bool (batch, L).

    Raises:
        ValueError: naming both shapes.
    """
    if text.ndim != 3 or len(text) != batch or text.shape[2] != dim:
        raise ValueError(
            f"{name} has the shape {tuple(text.shape)}: expected (B, L, {key}) with B = {batch} and {key} = {dim}. "
            f"Give the model the {key} of the text encoder."
        )
    if mask is not None and (mask.shape != text.shape[:2] or mask.dtype != torch.bool):
        raise ValueError(
            f"{mask_name} is a {mask.dtype} tensor of shape {tuple(mask.shape)}: expected torch.bool of "
            f"{tuple(text.shape[:2])}, true at tokens and false at padding."
        )


def padding_of(mask: Tensor | None) -> Tensor | None:
    """The mask (B, L), or ``None`` if nothing is padding: attention without a mask is faster."""
    if mask is None or torch.compiler.is_compiling() or not bool(mask.all()):
        return mask
    return None


def _first_of(tensor: Tensor | None, otherwise: Tensor) -> Tensor:
    return otherwise if tensor is None else tensor


def init_weights(model: nn.Module, zero_init: bool) -> None:
    """DiT's (Peebles and Xie, arXiv 2212.09748), for training from scratch.

    Matrices and the patch convolution, as a matrix, Xavier-uniform; MLPs of times and conditions and embedding tables
    normal with a deviation of 0.02; biases 0; norms (1, 0). With ``zero_init`` what modulates and gates, and the last
    projection, begin at 0: every block then passes on its input, and the output is 0.
    """
    for module in model.modules():
        if isinstance(module, nn.Linear | nn.Conv3d):
            nn.init.xavier_uniform_(module.weight.flatten(1) if isinstance(module, nn.Conv3d) else module.weight)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
        elif isinstance(module, nn.Embedding):
            nn.init.normal_(module.weight, std=0.02)
    for module in model.modules():
        if isinstance(module, TimestepMLP):
            nn.init.normal_(module.linear_1.weight, std=0.02)
            nn.init.normal_(module.linear_2.weight, std=0.02)
        elif isinstance(module, Modulation) and zero_init:
            nn.init.zeros_(module.linear.weight)
    if zero_init and isinstance(model, DualStreamTransformer):
        nn.init.zeros_(model.proj_out.weight)
