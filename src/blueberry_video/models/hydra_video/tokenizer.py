"""Hydra Video tokenizer: encoder of Hydra Video blocks, quantizer, and mirrored decoder.

The first frame is encoded separately and later frames in groups, so a clip of 1 + k n frames has 1 + n frames of tokens
and an image is a clip of one frame. Encoder and decoder are causal across frames at every level: neither tokens nor
reconstructed frames depend on later ones, and a video of any length is encoded and decoded in constant memory.

Shapes: B clips, T x H x W pixels, t x h x w tokens, D width of a token at the current level, C width of a code.
"""

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import ClassVar, NamedTuple, cast

import torch
from einops import rearrange
from torch import Tensor, nn

from blueberry_video.models.autoencoder.base import Autoencoder
from blueberry_video.models.hydra_video.mixer import HydraVideoBlock, HydraVideoMixer
from blueberry_video.models.hydra_video.model import init_weights
from blueberry_video.models.hydra_video.quantizers import Quantizer
from blueberry_video.models.hydra_video.state_space import Layout, MixerState
from blueberry_video.nn.positions import PositionTables, sinusoid_table
from blueberry_video.weights.files import read_weights, resolve
from blueberry_video.weights.load import load_strictly

State = tuple[MixerState, ...]  # one per block of the encoder or decoder


class Tokens(NamedTuple):
    """Tokens of a video: ids long (B, t, h, w), code vectors (B, t, h, w, C) with gradients, loss of the quantizer."""

    ids: Tensor
    values: Tensor
    loss: Tensor


class HydraVideoTokenizer(Autoencoder):
    """Video tokenizer: videos (B, 3, T, H, W) in [-1, 1] to token ids (B, t, h, w) and back.

    As an :class:`~blueberry_video.models.autoencoder.base.Autoencoder`, its latents are the code vectors, without
    noise; ``decode`` quantizes the latents that it receives.

    Args:
        quantizer: see :mod:`.quantizers`.
        image_size: H = W in pixels; a multiple of the stride.
        patch_size: frames and pixels (t, p) that a token of the first level covers.
        dims: width of each level, finest first.
        depths: blocks of each level, in the encoder and in the decoder.
        pools: factors (t, p) by which frames, and rows and columns, are merged from each level to the next.
        mlp_ratio, expand, head_dim, state_dim, num_groups, conv_size, scan_orders, memory_frames: see
            :class:`~blueberry_video.models.hydra_video.HydraVideo`.
        weights: checkpoint of the task ``tokenization`` to load; ``None`` for random weights.

    Raises:
        ValueError: for lists of different lengths, numbers below 1, an image size that is not a multiple of the stride,
            or weights that do not match; when used: for a video of a different size (the message names the nearest
            legal one) or ids out of range.
    """

    first_frame_alone = True

    def __init__(
        self,
        quantizer: Quantizer,
        image_size: int = 64,
        patch_size: tuple[int, int] = (1, 4),
        dims: Sequence[int] = (128, 256, 512),
        depths: Sequence[int] = (2, 2, 4),
        pools: Sequence[tuple[int, int]] = ((2, 2), (2, 1)),
        mlp_ratio: float = 2.5,
        expand: int = 2,
        head_dim: int = 64,
        state_dim: int = 64,
        num_groups: int = 1,
        conv_size: tuple[int, int, int] = (3, 3, 3),
        scan_orders: Sequence[str] = ("h", "w"),
        memory_frames: int = 100,
        weights: str | Path | None = None,
    ):
        if not (len(dims) == len(depths) == len(pools) + 1):
            raise ValueError(
                f"dims={list(dims)} and depths={list(depths)} must have one number per level, and pools="
                f"{[tuple(pool) for pool in pools]} one pair between two levels: there are {len(dims)}, {len(depths)} "
                f"and {len(pools)}."
            )
        if min(*patch_size, *dims, *(factor for pool in pools for factor in pool)) < 1 or min(depths) < 0:
            raise ValueError(
                f"patch_size={tuple(patch_size)}, dims={list(dims)} and pools={[tuple(pool) for pool in pools]} must "
                f"be at least 1, and depths={list(depths)} at least 0."
            )
        factors = [(patch_size[0], patch_size[1]), *((pool[0], pool[1]) for pool in pools)]
        strides = [1, 1]
        for time, space in factors:
            strides = [strides[0] * time, strides[1] * space]
        super().__init__(quantizer.dim, (strides[0], strides[1], strides[1]))
        if image_size < strides[1] or image_size % strides[1]:
            near = max(1, round(image_size / strides[1])) * strides[1]
            raise ValueError(f"image_size={image_size} must be a multiple of the stride {strides[1]}: use {near}.")
        self.image_size, self.quantizer = image_size, quantizer
        self.encoder, self.decoder = nn.ModuleList(), nn.ModuleList()
        width, side, layer = 3, image_size, 0

        def blocks(dim: int, count: int) -> list[HydraVideoBlock]:
            nonlocal layer
            made = []
            for _ in range(count):
                steps = (min(1 / (memory_frames * side * side), 0.1), 0.1)
                order = scan_orders[layer % len(scan_orders)]
                options = (expand, head_dim, state_dim, num_groups, conv_size, steps)
                made.append(HydraVideoBlock(HydraVideoMixer(dim, *options, order=order), dim, mlp_ratio))
                layer += 1
            return made

        for dim, depth, factor in zip(dims, depths, factors, strict=True):
            side //= factor[1]
            self.encoder.append(Level(Merge(width, dim, *factor), blocks(dim, depth), None))
            width = dim
        self.to_code = nn.Linear(width, quantizer.dim)
        self.from_code = FrameTokens(quantizer.dim, width, side)
        for level in reversed(range(len(dims))):
            narrow = dims[level - 1] if level else 3
            split = Split(dims[level], narrow, *factors[level])
            self.decoder.append(Level(None, blocks(dims[level], depths[level]), split))
            side *= factors[level][1]
        self.apply(init_weights)
        if weights is not None:
            self.load_published(weights)

    @property
    def vocabulary(self) -> int:
        """Number of token ids."""
        return self.quantizer.vocabulary

    def forward(self, video: Tensor) -> tuple[Tensor, Tokens]:
        """(B, 3, T, H, W) in [-1, 1] -> reconstruction (B, 3, T, H, W), not clamped, and its tokens."""
        tokens = self.tokens(video)
        return self.reconstruct(tokens.values), tokens

    def tokens(self, video: Tensor) -> Tokens:
        """Encodes a video (B, 3, T, H, W) in [-1, 1], with gradients."""
        self._check_video(video, first=True)
        return self._quantized(self._encode(video, None, False)[0])

    def reconstruct(self, values: Tensor) -> Tensor:
        """Decodes code vectors (B, t, h, w, C) to a video (B, 3, T, H, W), not clamped, with gradients."""
        return self._decode(values, None, False)[0]

    @torch.no_grad()
    def encode_ids(self, video: Tensor) -> Tensor:
        """(B, 3, T, H, W) in [-1, 1] -> ids, long (B, t, h, w)."""
        return self.tokens(video).ids

    @torch.no_grad()
    def decode_ids(self, ids: Tensor) -> Tensor:
        """Ids, long (B, t, h, w) -> video (B, 3, T, H, W) in [-1, 1]."""
        return self.reconstruct(self._values(ids)).clamp(-1, 1)

    @torch.no_grad()
    def encode_stream(self, frames: Tensor, state: State | None = None) -> tuple[Tensor, State]:
        """Encodes the next frames of a stream, in memory that does not depend on the preceding ones.

        Args:
            frames: (B, 3, T, H, W) in [-1, 1]: 1 + k n frames at the start of a video, k n later.
            state: state returned for the preceding frames; ``None`` at the start.

        Returns:
            Ids (B, t, h, w), equal to those of the whole video, and the next state.
        """
        self._check_video(frames, first=state is None)
        x, state = self._encode(frames, state, True)
        return self._quantized(x).ids, state

    @torch.no_grad()
    def decode_stream(self, ids: Tensor, state: State | None = None) -> tuple[Tensor, State]:
        """Decodes the next ids (B, t, h, w) of a stream to frames (B, 3, T, H, W) in [-1, 1]; see `encode_stream`."""
        video, state = self._decode(self._values(ids), state, True)
        return video.clamp(-1, 1), state

    def encode(self, video: Tensor) -> Tensor:
        values = rearrange(self.tokens(video).values, "b t h w c -> b c t h w")
        return torch.cat([values, torch.full_like(values, -torch.inf)], dim=1)

    def decode(self, latents: Tensor) -> Tensor:
        vectors = rearrange(latents, "b c t h w -> b t h w c")
        return self.decode_ids(self.quantizer.nearest(vectors))

    def load_published(self, weights: str | Path) -> str:
        """Loads a checkpoint of this package strictly and returns a message that names it."""
        load_strictly(self, read_weights(resolve(weights)), weights)
        return f"Loaded the tokenizer of {weights}."

    def _check_video(self, video: Tensor, first: bool) -> None:
        if video.ndim != 5 or video.shape[1] != 3:
            raise ValueError(f"the video has shape {tuple(video.shape)}: it must be (B, 3, T, H, W).")
        num_frames, height, width = video.shape[2:]
        self.check(num_frames if first else num_frames + 1, height, width)
        if (height, width) != (self.image_size, self.image_size):
            raise ValueError(
                f"the video has (H, W) = {(height, width)}, but the tokenizer was built for image_size="
                f"{self.image_size}: set the same image_size for the data and the model."
            )

    def _values(self, ids: Tensor) -> Tensor:
        side = self.image_size // self.stride[1]
        if ids.ndim != 4 or ids.shape[2:] != (side, side) or not ids.shape[1]:
            raise ValueError(f"ids have shape {tuple(ids.shape)}: they must be (B, t, {side}, {side}), t at least 1.")
        return self.quantizer.values(ids).to(self.from_code.project.weight.dtype)

    def _quantized(self, x: Tensor) -> Tokens:
        vectors = self.to_code(x)
        with torch.autocast(vectors.device.type, enabled=False):
            values, ids, loss = self.quantizer(vectors)
        return Tokens(ids, values, loss)

    def _encode(self, video: Tensor, state: State | None, return_state: bool) -> tuple[Tensor, State]:
        return _run(
            cast(Iterable[Level], self.encoder), rearrange(video, "b c t h w -> b t h w c"), state, return_state
        )

    def _decode(self, values: Tensor, state: State | None, return_state: bool) -> tuple[Tensor, State]:
        x, state = _run(cast(Iterable[Level], self.decoder), self.from_code(values), state, return_state)
        return rearrange(x, "b t h w c -> b c t h w"), state


class Merge(nn.Module):
    """Causal pooling: (B, T, H, W, D) -> (B, t, h, w, D'), by a linear map of groups of frames, rows and columns.

    The first frame of a video is repeated to fill a separate group. There is no norm, which would
    remove the brightness of a uniform patch: tokens and pixels are connected by linear maps and residual blocks.
    """

    def __init__(self, dim: int, out_dim: int, time: int, space: int):
        super().__init__()
        self.time, self.space = time, space
        self.project = nn.Linear(dim * time * space**2, out_dim)

    def forward(self, x: Tensor, first: bool) -> Tensor:
        if first and self.time > 1:
            x = torch.cat([x[:, :1].expand(-1, self.time - 1, -1, -1, -1), x], dim=1)
        groups = "b (t i) (h j) (w k) d -> b t h w (i j k d)"
        return self.project(rearrange(x, groups, i=self.time, j=self.space, k=self.space))


class Split(nn.Module):
    """Inverse of :class:`Merge`: (B, t, h, w, D) -> (B, T, H, W, D'); the first frame of a video remains one frame."""

    def __init__(self, dim: int, out_dim: int, time: int, space: int):
        super().__init__()
        self.time, self.space = time, space
        self.project = nn.Linear(dim, out_dim * time * space**2)

    def forward(self, x: Tensor, first: bool) -> Tensor:
        groups = "b t h w (i j k d) -> b (t i) (h j) (w k) d"
        x = rearrange(self.project(x), groups, i=self.time, j=self.space, k=self.space)
        return x[:, self.time - 1 :] if first else x


class FrameTokens(PositionTables):
    """Projection of codes (B, t, h, w, C) to tokens (B, t, h, w, D), with positions within the frame."""

    positions: Tensor

    def __init__(self, dim: int, out_dim: int, side: int):
        super().__init__()
        self.side, self.project = side, nn.Linear(dim, out_dim)
        self.register_tables()

    def tables(self) -> dict[str, Tensor]:
        return {
            "positions": sinusoid_table(self.side**2, self.project.out_features).unflatten(0, (self.side, self.side))
        }

    def forward(self, values: Tensor) -> Tensor:
        return self.project(values) + self.positions


class Level(nn.Module):
    """Blocks of one resolution, after a pooling (encoder) or before an upsampling (decoder)."""

    block_lists: ClassVar[tuple[str, ...]] = ("blocks",)  # sharded one by one

    def __init__(self, merge: Merge | None, blocks: Sequence[HydraVideoBlock], split: Split | None):
        super().__init__()
        self.merge, self.blocks, self.split = merge, nn.ModuleList(blocks), split

    def forward(
        self, x: Tensor, first: bool, states: Sequence[MixerState | None], return_state: bool
    ) -> tuple[Tensor, list[MixerState]]:
        if self.merge is not None:
            x = self.merge(x, first)
        _, t, h, w, _ = x.shape
        x, new_states = x.flatten(1, 3), []
        for block, state in zip(self.blocks, states, strict=True):
            x, new = block(x, Layout((t, h, w)), state, return_state)
            new_states += [new] if return_state else []
        x = x.unflatten(1, (t, h, w))
        return (x if self.split is None else self.split(x, first)), new_states


def _run(levels: Iterable[Level], x: Tensor, state: State | None, return_state: bool) -> tuple[Tensor, State]:
    """Applies the levels of an encoder or decoder; ``state`` is that after the preceding frames."""
    levels = list(levels)
    count = sum(len(level.blocks) for level in levels)
    if state is not None and len(state) != count:
        raise ValueError(f"state has {len(state)} layers, but there are {count}: pass the state of the same direction.")
    states: Sequence[MixerState | None] = state or [None] * count
    new_states: list[MixerState] = []
    for level in levels:
        size = len(level.blocks)
        x, new = level(x, state is None, states[:size], return_state)
        states, new_states = states[size:], new_states + new
    return x, tuple(new_states)
