"""Positions of CogVideoX (arXiv 2408.06072): the additive sine-cosine embedding of 2B, the rotary embedding of 5B and
1.5, and the additional table over text and video of 5B-I2V.
"""

import math

import torch
from torch import Tensor

from blueberry_video.models.diffusion_transformer import Grid
from blueberry_video.nn.rope import Rotation, axes_rotation

POSITIONS = ("sincos", "rope", "rope_and_table")
GRIDS = ("stretch", "crop")
TABLE_ERROR = 1e-2  # largest rounding error of a table in bfloat16, its scale included


class CogVideoXPositions:
    """Positions of the tokens of a clip; see :class:`~blueberry_video.models.cogvideox.CogVideoX` for the arguments.

    Args:
        kind: one of ``POSITIONS``.
        num_heads, head_dim: attention heads.
        patch_size: (t, h, w); more than one frame requires ``"rope"``, which is then not stretched.
        latent_size: latent frames, rows and columns in training.
        spatial_scale: divisor of rows and columns for ``"sincos"``.
        rotary_grid: one of ``GRIDS``, or ``None`` for the published one.

    Raises:
        ValueError: for sizes that do not fit each other, or an unknown kind.
    """

    def __init__(
        self,
        kind: str,
        num_heads: int,
        head_dim: int,
        patch_size: Grid,
        latent_size: Grid,
        spatial_scale: float,
        rotary_grid: str | None = None,
    ):
        if kind not in POSITIONS:
            raise ValueError(f"positions={kind!r} is unknown: choose one of {', '.join(POSITIONS)}.")
        if (num_heads * head_dim if kind == "sincos" else head_dim) % 16:
            raise ValueError(
                f"num_heads={num_heads} of head_dim={head_dim} do not fit positions={kind!r}: time, rows and columns "
                "share 2, 3 and 3 eighths of the channels, in pairs. Make head_dim a multiple of 16."
            )
        if patch_size[0] > 1 and kind != "rope":
            raise ValueError(f"tubelet_size={patch_size[0]} requires positions='rope', not {kind!r}.")
        if latent_size[1] % patch_size[1] or latent_size[2] % patch_size[2]:
            raise ValueError(
                f"height={latent_size[1]} and width={latent_size[2]} must be multiples of patch_size={patch_size[1]}."
            )
        if rotary_grid not in (None, *GRIDS) or (rotary_grid == "stretch" and patch_size[0] > 1):
            raise ValueError(
                f"rotary_grid={rotary_grid!r} with tubelet_size={patch_size[0]} must be null (the published one), "
                "'crop' or, for a tubelet_size of 1 only, 'stretch'."
            )
        self.crop = rotary_grid == "crop" or (rotary_grid is None and patch_size[0] > 1)
        self.kind, self.dim, self.head_dim = kind, num_heads * head_dim, head_dim
        self.patch_size, self.latent_size, self.spatial_scale = patch_size, latent_size, spatial_scale

    def check(self, size: Grid, first_frame: int) -> None:
        """Checks that latents of ``size`` (T, H, W), starting at ``first_frame`` of the clip, have positions.

        Raises:
            ValueError: they do not; the message names the argument to change.
        """
        num_frames, height, width = self.latent_size
        if self.kind == "rope" and self.crop and (size[1] > height or size[2] > width):
            fix = "" if self.patch_size[0] > 1 else ", or set rotary_grid='stretch'"
            raise ValueError(
                f"latents of {size[1]} x {size[2]} are larger than the model's height={height} and width={width}: "
                f"increase these, no weight depends on them{fix}."
            )
        if self.kind == "rope_and_table" and (size[1:] != (height, width) or first_frame + size[0] > num_frames):
            raise ValueError(
                f"latents of {first_frame + size[0]} x {size[1]} x {size[2]} exceed the position table of the model: "
                f"use exactly height={height} and width={width}, and at most num_frames={num_frames}."
            )

    def joint_table(self, text_len: int) -> Tensor:
        """Initial position table over [text, video] (1, L + N, D): zeros for the text, sines and cosines for video."""
        video = sincos_positions(self._native(), self.dim, self.spatial_scale)
        return torch.cat([video.new_zeros(text_len, self.dim), video])[None]

    def rotation(self, grid: Grid, first: int, text_len: int, device: torch.device) -> Rotation | None:
        """Rotation of [text, video] (L + N, 1, head_dim), for queries and keys (B, L + N, heads, head_dim)."""
        if self.kind == "sincos":
            return None
        t, h, w = grid
        rows, columns = torch.arange(h, device=device).float(), torch.arange(w, device=device).float()
        if not self.crop:
            rows, columns = stretched_grid((h, w), self._native()[1:], device)
        frames = torch.arange(first, first + t, device=device).float()
        positions = torch.cat([rows.new_zeros(text_len, 3), torch.cartesian_prod(frames, rows, columns)])
        eighth = self.head_dim // 8
        turn = axes_rotation(positions, (2 * eighth, 3 * eighth, 3 * eighth))
        return Rotation(turn.cos[:, None], turn.sin[:, None])

    def _native(self) -> Grid:
        t, h, w = (size // patch for size, patch in zip(self.latent_size, self.patch_size, strict=True))
        return t, h, w


def sincos_positions(grid: Grid, dim: int, spatial_scale: float, first: int = 0) -> Tensor:
    """Sine-cosine position embedding of 2B: (t * h * w, dim), float32, in raster order.

    The first quarter of the channels encodes the frame, three eighths the column, the last three the row; each part has
    the sines of all frequencies before the cosines. Rows and columns are divided by ``spatial_scale``; frames start at
    ``first``.
    """
    t, h, w = grid

    def waves(positions: Tensor, channels: int) -> Tensor:
        frequency = 10000 ** (-torch.arange(0, channels, 2, dtype=torch.float64) / channels)
        angle = positions.double()[:, None] * frequency
        return torch.cat([angle.sin(), angle.cos()], dim=1).float()

    frame = waves(torch.arange(first, first + t), dim // 4)[:, None, None]
    row = waves(torch.arange(h, dtype=torch.float64) / spatial_scale, dim // 8 * 3)[None, :, None]
    column = waves(torch.arange(w, dtype=torch.float64) / spatial_scale, dim // 8 * 3)[None, None]
    return torch.cat([part.expand(t, h, w, -1) for part in (frame, column, row)], dim=-1).flatten(0, 2)


def read_sincos(table: Tensor) -> tuple[int, Grid, float]:
    """Text length, patch grid (t, h, w) and ``spatial_scale`` of the position table in an original (SAT) file of 2B.

    SAT saves the frozen sine-cosine embedding as a parameter over [text, video], zero for the text. All sizes follow
    from it: the frame, column and row of a token are angles of unit frequency.

    Args:
        table: (1, L + N, D), in any precision.

    Raises:
        ValueError: it is not a sine-cosine embedding with one scale of rows and columns, such as a trained table.
    """
    dim, rows = table.shape[2], table[0].float()
    text_len = int((rows == 0).all(dim=1).cumprod(0).sum())
    video, eighth = rows[text_len:], dim // 8
    frame, column, row = video.split((2 * eighth, 3 * eighth, 3 * eighth), dim=1)
    of_frame = _period(frame, same=False)
    w = _period(column[:of_frame], same=True)
    h = of_frame // w
    # the farthest position has the smallest relative error; its turns are counted with the first position
    along, count = (column, w) if w > 1 else (row, h)
    angles = torch.atan2(along[:count, 0], along[:count, 3 * eighth // 2]).double()
    scale = 1.0
    if count > 1:
        last = angles[-1] + 2 * math.pi * ((angles[1] * (count - 1) - angles[-1]) / (2 * math.pi)).round()
        scale = round(((count - 1) / last).item(), 3)
    grid = (len(video) // of_frame, h, w) if len(video) else (0, 0, 0)
    expected = sincos_positions(grid, dim, scale) if scale > 0 and math.prod(grid) == len(video) else rows[:0]
    if not len(video) or expected.shape != video.shape or (expected - video).abs().max() > TABLE_ERROR:
        raise ValueError(
            f"the weights have a position table, patch_embed.pos_embedding, of {tuple(table.shape)} and no image "
            "channels, as CogVideoX-2B in SAT's layout, but the table is not its sine-cosine embedding. A trained "
            "table is published for 5B-I2V only: use weights in the published layout."
        )
    return text_len, grid, scale


def _period(embedding: Tensor, same: bool) -> int:
    """First index above 0 at which an embedding (N, D) equals that of token 0, or differs from it; else N."""
    found = ((embedding[1:] - embedding[:1]).abs() < TABLE_ERROR).all(dim=1) == same
    return 1 + int(found.int().argmax()) if found.any() else max(len(embedding), 1)


def stretched_grid(size: tuple[int, int], native: tuple[int, int], device: torch.device) -> tuple[Tensor, Tensor]:
    """Row positions (h,) and column positions (w,) of 5B, in patches of the native grid, as published.

    The grid is scaled to fit into the native one and centered in it; but the last position is (h - 1) / h of the way
    from 0, rather than from the start of the scaled grid, to its end.
    """
    (h, w), (height, width) = size, native
    if h / w > height / width:
        scaled_height, scaled_width = height, round(height / h * w)
    else:
        scaled_height, scaled_width = round(width / w * h), width
    top, left = round((height - scaled_height) / 2), round((width - scaled_width) / 2)
    rows = torch.linspace(top, (top + scaled_height) * (h - 1) / h, h, dtype=torch.float32, device=device)
    return rows, torch.linspace(left, (left + scaled_width) * (w - 1) / w, w, dtype=torch.float32, device=device)
