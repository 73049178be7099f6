"""Predictor of V-JEPA (arXiv 2404.08471) and V-JEPA 2 (arXiv 2506.09985)."""

from typing import ClassVar

import torch
from torch import Tensor, nn

from blueberry_video.nn.blocks import Block, init_trunc_normal
from blueberry_video.nn.patches import gather_tokens
from blueberry_video.nn.positions import PositionTables, resize_table, sincos_3d_table
from blueberry_video.nn.rope import RotaryPositions

Grid = tuple[int, int, int]  # number of tokens along (t, h, w)


class Predictor(PositionTables):
    """Predicts the features of hidden tokens from the visible tokens and the positions of the hidden ones.

    Args:
        embed_dim: width D of the encoder's tokens.
        grid: patch grid (t, h, w) of the default clip size.
        dim, depth, num_heads: width, number of blocks and number of heads.
        mlp_ratio: hidden width of the MLPs over ``dim``.
        num_mask_tokens: number of kinds of masks; each has a mask token, initialized to zero.
        positions: ``"sincos_3d"`` (V-JEPA) or ``"rope_3d"`` (V-JEPA 2, which also sorts its tokens by position).
        rope_quirk: see :mod:`blueberry_video.nn.rope`.
        out_dim: width of the targets; defaults to ``embed_dim``.
        levels: number of encoder levels concatenated in its tokens; several are projected by a two-layer MLP (V-JEPA
            2.1, arXiv 2603.14482).
        context: add a separate projection for visible tokens, see :meth:`both` (V-JEPA 2.1).

    Raises:
        ValueError: ``positions`` is unknown, ``num_mask_tokens`` is below 1, or ``num_heads`` does not fit ``dim``.
    """

    block_lists: ClassVar[tuple[str, ...]] = ("blocks",)  # sharded one by one
    positions: Tensor

    def __init__(
        self,
        embed_dim: int,
        grid: Grid,
        dim: int = 384,
        depth: int = 12,
        num_heads: int = 12,
        mlp_ratio: float = 4.0,
        num_mask_tokens: int = 2,
        positions: str = "rope_3d",
        rope_quirk: bool = False,
        out_dim: int | None = None,
        levels: int = 1,
        context: bool = False,
    ):
        super().__init__()
        if positions not in ("sincos_3d", "rope_3d"):
            raise ValueError(f"positions={positions!r} of the predictor is unknown: choose 'sincos_3d' or 'rope_3d'.")
        if num_mask_tokens < 1:
            raise ValueError(f"num_mask_tokens={num_mask_tokens} must be at least 1, one per kind of mask.")
        self.grid = grid
        narrow = embed_dim // levels
        self.embed: nn.Module = nn.Linear(narrow, dim)
        if levels > 1:
            self.embed = nn.Sequential(nn.Linear(embed_dim, narrow), nn.GELU(), self.embed)
        self.mask_tokens = nn.Parameter(torch.zeros(num_mask_tokens, dim))
        self.blocks = nn.ModuleList(Block(dim, num_heads, mlp_ratio) for _ in range(depth))
        self.norm = nn.LayerNorm(dim, eps=1e-6)
        self.proj = nn.Linear(dim, out_dim or embed_dim)
        self.proj_context = nn.Linear(dim, out_dim or embed_dim) if context else None
        self.rope = RotaryPositions(grid, dim // num_heads, rope_quirk) if positions == "rope_3d" else None
        self.register_tables()
        init_trunc_normal(self)

    def tables(self) -> dict[str, Tensor]:
        return {"positions": sincos_3d_table(self.grid, self.proj.in_features)} if self.rope is None else {}

    def forward(
        self, context: Tensor, keep: Tensor, target: Tensor, mask_index: int = 0, grid: Grid | None = None
    ) -> Tensor:
        """Predicts features of hidden tokens.

        Args:
            context: (B, N_context, D), output of the encoder.
            keep: (B, N_context) indices of these tokens.
            target: (B, N_target) indices of the tokens to predict.
            mask_index: index of the mask token; 1 for the published weights of V-JEPA 2.
            grid: patch grid (t, h, w) of this clip; defaults to that of the constructor.

        Returns:
            (B, N_target, out_dim), in the order of ``target``.

        Raises:
            ValueError: the context is empty, or ``mask_index`` is out of range.
        """
        return self.both(context, keep, target, mask_index, grid)[0]

    def both(
        self, context: Tensor, keep: Tensor, target: Tensor, mask_index: int = 0, grid: Grid | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """Predicts features of hidden and visible tokens, see :meth:`forward`.

        Returns:
            (B, N_target, out_dim), and (B, N_context, out_dim) through a separate projection, or ``None`` without one.
        """
        x = self._run(context, keep, target, mask_index, grid)
        visible, hidden = x.tensor_split([keep.shape[1]], dim=1)
        context_output = None if self.proj_context is None else self.proj_context(self.norm(visible))
        return self.proj(self.norm(hidden)), context_output

    def ahead(self, tokens: Tensor, grid: Grid, skip: int | Tensor = 0, length: int = 1, mask_index: int = 0) -> Tensor:
        """Predicts the tokens after the end of a clip.

        Args:
            tokens: (B, t * h * w, D), all tokens of the encoder.
            grid: patch grid (t, h, w) of the clip.
            skip: number of steps between the end of the clip and the prediction, for all clips or per clip (B,).
            length: number of steps to predict.
            mask_index: index of the mask token.

        Returns:
            (B, length * h * w, out_dim).

        Raises:
            ValueError: the positions are sine-cosine, which end with the clip; ``skip`` is negative, not an integer or
                of a different batch size; or ``length`` is below 1.
        """
        if self.rope is None:
            raise ValueError("only a predictor with predictor_positions='rope_3d' has positions after a clip.")
        skips = torch.as_tensor(skip, device=tokens.device)
        if skips.shape not in ((), tokens.shape[:1]) or skips.dtype == torch.bool or skips.is_floating_point():
            raise ValueError(
                f"skip has the dtype {skips.dtype} and the shape {tuple(skips.shape)}: pass an integer number of "
                f"tubelets, or one for each of the {len(tokens)} clips."
            )
        skips = skips.expand(len(tokens))
        if length < 1 or skips.min() < 0:
            raise ValueError(f"skip={skip} must be at least 0, and length={length} at least 1 (in tubelets).")
        t, h, w = grid
        seen = torch.arange(t * h * w, device=tokens.device).expand(len(tokens), -1)
        first = (t + skips[:, None]) * h * w
        target = first + torch.arange(length * h * w, device=tokens.device)
        return self(tokens, seen, target, mask_index, (t + int(skips.max()) + length, h, w))

    def _run(self, context: Tensor, keep: Tensor, target: Tensor, mask_index: int, grid: Grid | None) -> Tensor:
        """Runs the blocks on visible and mask tokens: (B, N_context + N_target, dim), in the order given."""
        if keep.shape[1] == 0:
            raise ValueError("the mask leaves an empty context: lower its mask ratio.")
        kinds = len(self.mask_tokens)
        if not 0 <= mask_index < kinds:
            raise ValueError(f"mask_index={mask_index} must be in [0, {kinds}): increase model.num_mask_tokens.")
        grid, index = grid or self.grid, torch.cat([keep, target], dim=1)
        x = self.embed(context)
        mask_tokens = self.mask_tokens[mask_index].to(x.dtype).expand(*target.shape, -1)
        x = torch.cat([x, mask_tokens], dim=1)  # (B, N_context + N_target, dim)
        if self.rope is None:
            x = x + resize_table(self.positions, self.grid, grid)[index]
            for block in self.blocks:
                x = block(x)
        else:
            index, order = index.sort(dim=1)
            x, rotation = gather_tokens(x, order), self.rope(index, grid)
            for block in self.blocks:
                x = block(x, rotation)
            x = gather_tokens(x, order.argsort(dim=1))
        return x
