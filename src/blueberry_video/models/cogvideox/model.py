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
from typing import Any

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
from blueberry_video.models.cogvideox.convert import convert_sat
from blueberry_video.models.cogvideox.positions import ExpertPositions, sincos_positions
from blueberry_video.nn.joint_attention import KeyValueCache, Shared, block_causal
from blueberry_video.nn.timestep_embedding import TimestepMLP, sinusoidal
from blueberry_video.weights.diffusers_folder import load_strictly, read_published, write_folder
from blueberry_video.weights.files import num_blocks

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


# ---- published weights -----------------------------------------------------------------------------------------------


def variant(model: CogVideoX) -> str:
    """Name of the published model that has this shape, such as ``CogVideoX1.5-5B-I2V``, or what it is else."""
    size = {(30, 30): "-2B", (42, 48): "-5B"}.get((len(model.transformer_blocks), model.num_heads))
    size = size or f" of {len(model.transformer_blocks)} blocks, {model.num_heads * model.head_dim} wide"
    version = "1.5" if model.patch_size[0] > 1 else ""
    return f"CogVideoX{version}{size}{'-I2V' if model.in_channels == 2 * model.out_channels else ''}"


def from_published(path: str | Path, causal_chunk: int | None = None, checkpointing: bool = False) -> CogVideoX:
    """A CogVideoX from a folder of diffusers or an original file, in the precision of its weights. Prints what it is.

    Args:
        path: a folder with ``config.json`` and safetensors, whole or in shards, or that of its pipeline; or a file:
            SAT's, or a state dict under diffusers' names. A file does not tell the size of the clips or the positions:
            they are taken to be those of the published model of its shape.
        causal_chunk: see :class:`CogVideoX`; by default what the folder says, and 0 for published models.
        checkpointing: see :class:`CogVideoX`.

    Raises:
        FileNotFoundError: if something is missing there.
        ValueError: if it is damaged, no CogVideoX, of another shape than its config says, or has settings that no
            published model has.
    """
    config, state = read_published(path, "CogVideoX", convert_sat)
    arguments = _shape(state, path, config) | _settings(state, config)
    if causal_chunk is not None:
        arguments["causal_chunk"] = causal_chunk
    with torch.device("meta"):
        model = CogVideoX(**arguments, zero_init=False, checkpointing=checkpointing)
    built = {key: value for key, value in to_config(model).items() if key not in ("sample_frames", "causal_chunk")}
    others = [f"{key}={config[key]} (not {built[key]})" for key in built if config.get(key, built[key]) != built[key]]
    if others:
        raise ValueError(
            f"{path}: the config does not describe these weights, those of a {variant(model)}, or asks for what no "
            f"published CogVideoX has: {', '.join(others)}. Put the config of these weights beside them."
        )
    load_strictly(model, state, str(path))
    print(f"{variant(model)} from {path}: {sum(p.numel() for p in model.parameters()) / 1e9:.3f}B parameters")
    return model


def load_published(model: CogVideoX, path: str | Path) -> None:
    """Puts published weights, see :func:`from_published`, into a model that must have their shape.

    Raises:
        FileNotFoundError: if something is missing there.
        ValueError: if they are of another variant, which is named, or damaged.
    """
    config, state = read_published(path, "CogVideoX", convert_sat)
    theirs = _shape(state, path, config or to_config(model))
    ours = _shape(model.state_dict(), path, to_config(model))
    others = ", ".join(f"{key}={theirs[key]} (here {ours[key]})" for key in theirs if theirs[key] != ours[key])
    if others:
        with torch.device("meta"):
            name = variant(CogVideoX(**theirs, zero_init=False))
        raise ValueError(
            f"{path} holds a {name}, but the model is a {variant(model)}: {others}. Choose the model=cogvideox/… of "
            "these weights."
        )
    precision = {name: value.dtype for name, value in model.state_dict().items()}
    load_strictly(model, {name: value.to(precision[name]) for name, value in state.items()}, str(path))


def save_published(model: CogVideoX, folder: str | Path) -> None:
    """Writes a folder that diffusers' ``CogVideoXTransformer3DModel.from_pretrained`` loads.

    Of a causal model it holds ``causal_chunk``, too; diffusers knows no such attention and warns that it ignores it.

    Raises:
        FileExistsError: if there are weights in the folder.
    """
    write_folder(folder, to_config(model), model.state_dict())


def to_config(model: CogVideoX) -> dict[str, Any]:
    """The ``config.json`` of diffusers for a model."""
    tubelet, patch, _ = model.patch_size
    num_frames, height, width = model.places.latent_size
    config = FIXED | {
        "_class_name": "CogVideoXTransformer3DModel",
        "num_attention_heads": model.num_heads,
        "attention_head_dim": model.head_dim,
        "num_layers": len(model.transformer_blocks),
        "in_channels": model.in_channels,
        "out_channels": model.out_channels,
        "text_embed_dim": model.text_dim,
        "max_text_seq_length": model.text_len,
        "time_embed_dim": model.time_dim,
        "ofs_embed_dim": None if model.ofs_embedding is None else model.time_dim,
        "patch_size": patch,
        "patch_size_t": None if tubelet == 1 else tubelet,
        "patch_bias": tubelet == 1,
        "sample_frames": 4 * (num_frames - 1) + 1,
        "sample_height": height,
        "sample_width": width,
        "spatial_interpolation_scale": model.places.spatial_scale,
        "use_rotary_positional_embeddings": model.places.kind != "sincos",
        "use_learned_positional_embeddings": model.places.kind == "rope_and_table",
    }
    return config | ({"causal_chunk": model.causal_chunk} if model.causal_chunk else {})


FIXED = {  # of diffusers' config: settings that all published models share, and this one has built in
    "activation_fn": "gelu-approximate",
    "attention_bias": True,
    "dropout": 0.0,
    "flip_sin_to_cos": True,
    "freq_shift": 0,
    "norm_elementwise_affine": True,
    "norm_eps": 1e-5,
    "temporal_compression_ratio": 4,
    "temporal_interpolation_scale": 1.0,
    "timestep_activation_fn": "silu",
}


def _shape(state: dict[str, Tensor], path: str | Path, config: dict[str, Any]) -> dict[str, Any]:
    """The arguments of :class:`CogVideoX` that weights tell, and those that follow from them in published models.

    A linear patch embedding tells only the pixels of a patch: its patches are the config's, or those of 1.5. Without a
    config positions are rotary in 1.5 and in models wider than 2B.
    """
    try:
        patches, dim = state["patch_embed.proj.weight"], len(state["patch_embed.proj.bias"])
        head_dim = len(state["transformer_blocks.0.attn1.norm_q.weight"])
        time_dim, out_pixels = len(state["time_embedding.linear_2.bias"]), len(state["proj_out.bias"])
    except KeyError as error:
        raise ValueError(f"{path} lacks {error}: it is damaged, or not the whole transformer.") from error
    tubelet, patch = (
        (1, patches.shape[2]) if patches.ndim == 4 else (config.get("patch_size_t", 2), config.get("patch_size", 2))
    )
    rotary = config.get("use_rotary_positional_embeddings", tubelet > 1 or dim > 1920)
    return {
        "num_heads": dim // head_dim,
        "head_dim": head_dim,
        "depth": num_blocks(state, "transformer_blocks"),
        "in_channels": patches.shape[1] if patches.ndim == 4 else patches.shape[1] // (tubelet * patch**2),
        "out_channels": out_pixels // (tubelet * patch**2),
        "text_dim": state["patch_embed.text_proj.weight"].shape[1],
        "time_dim": time_dim,
        "patch_size": patch,
        "tubelet_size": tubelet,
        "offset": "ofs_embedding.linear_1.weight" in state,
        "positions": "rope_and_table" if "patch_embed.pos_embedding" in state else "rope" if rotary else "sincos",
    }


def _settings(state: dict[str, Tensor], config: dict[str, Any]) -> dict[str, Any]:
    """The arguments of :class:`CogVideoX` that no weight tells: the config's, or those of the published models."""
    native, frames = (60, 49) if state["patch_embed.proj.weight"].ndim == 4 else (300, 81)
    return {
        "text_len": config.get("max_text_seq_length", 226),
        "num_frames": (config.get("sample_frames", frames) - 1) // 4 + 1,
        "height": config.get("sample_height", native),
        "width": config.get("sample_width", 90 if native == 60 else native),
        "spatial_scale": config.get("spatial_interpolation_scale", 1.875),
        "causal_chunk": config.get("causal_chunk", 0),
    }
