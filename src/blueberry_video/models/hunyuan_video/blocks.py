"""Blocks of HunyuanVideo (arXiv 2412.03603): dual-stream blocks, in which text and video interact only in attention,
and single-stream blocks over both.

The text has no positions; queries and keys of the video are rotated by time, row and column. Queries and keys are
normalized per head. Each stream is modulated by one condition per frame, (B, T, D), or per clip, (B, 1, D). Parameter
names are those of diffusers.

Letters: B clips, N video tokens, L text tokens, D width, K conditions: 1, or the number T of frames.
"""

import functools

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from blueberry_video.nn.feed_forward import FeedForward
from blueberry_video.nn.joint_attention import HeadNormAttention, HeadNormProjections, Shared
from blueberry_video.nn.rope import Rotation
from blueberry_video.nn.timestep_conditioning import gated, modulate

EPS = 1e-6  # of all norms
HEAD_NORM = functools.partial(nn.RMSNorm, eps=EPS)


class Modulation(nn.Module):
    """adaLN modulation, Linear(SiLU(condition)): (B, K, D) -> ``parts`` tensors (B, K, D)."""

    def __init__(self, dim: int, parts: int):
        super().__init__()
        self.parts = parts
        self.linear = nn.Linear(dim, parts * dim)

    def forward(self, condition: Tensor) -> tuple[Tensor, ...]:
        return self.linear(F.silu(condition)).chunk(self.parts, dim=-1)


def normalize(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """Adaptive LayerNorm with shift and scale (B, K, D): (B, N, D) -> (B, N, D)."""
    return modulate(F.layer_norm(x, x.shape[-1:], eps=EPS), shift, scale)


class JointAttention(HeadNormProjections):
    """Joint attention of two streams with separate projections; only the video has rotary positions.

    (video (B, N, D), text (B, L, D) or ``None``) -> the same shapes.
    """

    def __init__(self, dim: int, num_heads: int):
        super().__init__(dim, num_heads, HEAD_NORM)
        self.add_q_proj, self.add_k_proj, self.add_v_proj = (nn.Linear(dim, dim) for _ in range(3))
        self.norm_added_q, self.norm_added_k = (HEAD_NORM(dim // num_heads) for _ in range(2))
        self.to_add_out = nn.Linear(dim, dim)

    def forward(
        self, video: Tensor, text: Tensor | None, shared: Shared, layer: int = 0
    ) -> tuple[Tensor, Tensor | None]:
        assert self.to_out is not None
        assert shared.rotation is not None
        q, k, v = self.heads(video, Rotation(*(part[shared.text_len :] for part in shared.rotation)))
        if text is None:
            return self.to_out[0](shared.attend(q, k, v, layer)), None
        projections = (self.add_q_proj, self.add_k_proj, self.add_v_proj)
        text_q, text_k, text_v = (project(text).unflatten(-1, (self.num_heads, -1)) for project in projections)
        text_q, text_k = self.norm_added_q(text_q), self.norm_added_k(text_k)
        q, k, v = (torch.cat(pair, dim=1) for pair in ((text_q, q), (text_k, k), (text_v, v)))
        out = shared.attend(q, k, v, layer)
        of_text, of_video = out.split((text.shape[1], video.shape[1]), dim=1)
        return self.to_out[0](of_video), self.to_add_out(of_text)


class DualStreamBlock(nn.Module):
    """Dual-stream block: video and text with separate weights and joint attention.

    (video (B, N, D), text (B, L, D)) -> the same shapes.

    Args:
        dim: D; a multiple of ``num_heads``.
        num_heads: attention heads.
        mlp_ratio: hidden over outer width of the MLPs.
    """

    def __init__(self, dim: int, num_heads: int, mlp_ratio: float = 4.0):
        super().__init__()
        self.norm1, self.norm1_context = Modulation(dim, 6), Modulation(dim, 6)
        self.attn = JointAttention(dim, num_heads)
        self.ff, self.ff_context = (FeedForward(dim, int(dim * mlp_ratio)) for _ in range(2))

    def forward(
        self,
        video: Tensor,
        text: Tensor | None,
        condition: Tensor,
        text_condition: Tensor,
        shared: Shared,
        layer: int = 0,
    ) -> tuple[Tensor, Tensor | None]:
        """
        Args:
            video: (B, N, D).
            text: (B, L, D); ``None`` where the cache holds it.
            condition: (B, K, D) of the video.
            text_condition: (B, 1, D).
            shared: see :class:`Shared`.
            layer: index of the block in the cache.
        """
        shift, scale, gate, mlp_shift, mlp_scale, mlp_gate = self.norm1(condition)
        normed = normalize(video, shift, scale)
        if text is None:
            attended, _ = self.attn(normed, None, shared, layer)
        else:
            text_shift, text_scale, text_gate, *text_mlp = self.norm1_context(text_condition)
            attended, update = self.attn(normed, normalize(text, text_shift, text_scale), shared, layer)
            text = gated(text, text_gate, update)
            text = gated(text, text_mlp[2], self.ff_context(normalize(text, text_mlp[0], text_mlp[1])))
        video = gated(video, gate, attended)
        return gated(video, mlp_gate, self.ff(normalize(video, mlp_shift, mlp_scale))), text


class SingleStreamBlock(nn.Module):
    """Single-stream block: parallel attention and MLP over [text, video], (B, L + N, D) -> (B, L + N, D).

    Args:
        dim: D; a multiple of ``num_heads``.
        num_heads: attention heads.
        mlp_ratio: hidden over outer width of the MLP.
    """

    def __init__(self, dim: int, num_heads: int, mlp_ratio: float = 4.0):
        super().__init__()
        hidden_dim = int(dim * mlp_ratio)
        self.norm = Modulation(dim, 3)
        self.attn = HeadNormAttention(dim, num_heads, HEAD_NORM, project_out=False)
        self.proj_mlp = nn.Linear(dim, hidden_dim)
        self.act_mlp = nn.GELU(approximate="tanh")
        self.proj_out = nn.Linear(dim + hidden_dim, dim)

    def forward(
        self, x: Tensor, condition: Tensor, text_condition: Tensor | None, shared: Shared, layer: int = 0
    ) -> Tensor:
        """
        Args:
            x: [text, video], or only the video where the cache holds the text.
            condition: (B, K, D) of the video.
            text_condition: (B, 1, D); ``None``: ``condition``, with K = 1, applies to all tokens.
            shared: see :class:`Shared`.
            layer: index of the block in the cache.
        """
        parts: tuple[Tensor, ...] = (x,)
        conditions: tuple[Tensor, ...] = (condition,)
        if text_condition is not None and shared.text_len:
            parts = x.split((shared.text_len, x.shape[1] - shared.text_len), dim=1)
            conditions = (text_condition, condition)
        shifts, scales, gates = zip(*(self.norm(each) for each in conditions), strict=True)
        normed = _joined([normalize(*each) for each in zip(parts, shifts, scales, strict=True)])
        attended = self.attn(normed, shared, layer)
        update = self.proj_out(torch.cat([attended, self.act_mlp(self.proj_mlp(normed))], dim=-1))
        updates = update.split([part.shape[1] for part in parts], dim=1)
        return _joined([gated(*each) for each in zip(parts, gates, updates, strict=True)])


def _joined(parts: list[Tensor]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)
