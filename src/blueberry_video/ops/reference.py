"""The scans as the matrices they are: readable, differentiable, any precision; O(L²), for tests and for reading.

Shapes: B batch, L tokens, T segments (frames), S tokens of a segment, H heads, G groups of heads that share B and C, P
channels of a head, N channels of the state. a = dt * A is the logarithm of a token's decay.
"""

import torch
from torch import Tensor


def ssd(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    lengths: Tensor,
    h0: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Mamba-2's causal scan, h_t = exp(a_t) h_{t-1} + dt_t x_t ⊗ B_t and y_t = h_t C_t + D x_t: its y and states.

    M_ij = C_i · B_j exp(sum of a_k over j < k ≤ i) dt_j for i ≥ j. Arguments as :func:`blueberry_video.ops.ssd`, but
    ``lengths`` (B, T) of all segments; the states are (B, T, H, P, N), at the end of each.
    """
    forward = _Leg(dt, A, B, C)
    matrix = forward.matrix * _tril(forward.matrix, 0)
    states = forward.states_after(x, lengths, h0)
    return _output(matrix, x, D) + _readout(forward, h0), states


def video_ssd(
    x: Tensor,
    dt_f: Tensor,
    dt_b: Tensor,
    A_f: Tensor,
    A_b: Tensor,
    B_f: Tensor,
    C_f: Tensor,
    B_b: Tensor,
    C_b: Tensor,
    D: Tensor | None,
    lengths: Tensor,
    h0: Tensor | None,
    g0: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Bidirectional inside a frame, causal across frames: its y and the forward states at the end of each frame.

    M_ij = C^f_i · B^f_j exp(sum of a^f_k over j < k ≤ i) dt^f_j for i > j; C^b_i · B^b_j exp(sum of a^b_k over i ≤ k <
    j) dt^b_j for i < j in the same frame; D_i for i = j; 0 for every later frame. Arguments as
    :func:`blueberry_video.ops.video_ssd`, but ``lengths`` (B, T) of all frames and ``g0`` (B, T, H, P, N).
    """
    frame = frames_of(lengths, x.shape[1])  # (B, L)
    same = (frame[:, :, None] == frame[:, None, :])[:, None]  # (B, 1, L, L)
    forward, backward = _Leg(dt_f, A_f, B_f, C_f), _Leg(dt_b, A_b, B_b, C_b)
    matrix = forward.matrix * _tril(forward.matrix, -1) + backward.matrix_backward * (same & ~_tril(same, 0))
    y = _output(matrix, x, D) + _readout(forward, h0)
    if g0 is not None:  # reaches token i of a frame through every token from i to the frame's end
        later = (same & ~_tril(same, -1)).to(backward.a.dtype)  # (B, 1, i, k): k ≥ i in the same frame
        decay = torch.einsum("bhik,bkh->bih", later.expand(-1, x.shape[2], -1, -1), backward.a).exp()
        entering = g0[torch.arange(len(frame), device=frame.device)[:, None], frame]  # (B, L, H, P, N)
        y = y + torch.einsum("blh,blhn,blhpn->blhp", decay, backward.C, entering)
    return y, forward.states_after(x, lengths, h0)


def frames_of(lengths: Tensor, num_tokens: int) -> Tensor:
    """Lengths (B, T) of the frames -> the frame (B, L) that each of ``num_tokens`` tokens belongs to."""
    ends = lengths.cumsum(1)  # a frame without tokens ends where the one before it does
    tokens = torch.arange(num_tokens, device=ends.device).repeat(len(ends), 1)
    return torch.searchsorted(ends, tokens, right=True)


class _Leg:
    """One direction: its a (B, L, H), B and C a head (B, L, H, N), and all pairs of tokens."""

    def __init__(self, dt: Tensor, A: Tensor, B: Tensor, C: Tensor):
        heads = dt.shape[2] // B.shape[2]
        self.dt, self.a = dt, dt * A
        self.B, self.C = B.repeat_interleave(heads, 2), C.repeat_interleave(heads, 2)
        self.pairs = torch.einsum("bihn,bjhn->bhij", self.C, self.B) * dt.transpose(1, 2)[:, :, None]  # C_i·B_j dt_j

    @property
    def matrix(self) -> Tensor:
        """(B, H, L, L): valid on and below the diagonal."""
        return self.pairs * _exp_sums(self.a)

    @property
    def matrix_backward(self) -> Tensor:
        """(B, H, L, L): valid above the diagonal: sums over i ≤ k < j are those over i < k ≤ j of a one step later."""
        return self.pairs * _exp_sums(self.a.roll(1, 1)).transpose(2, 3)

    def states_after(self, x: Tensor, lengths: Tensor, h0: Tensor | None) -> Tensor:
        """The state (B, T, H, P, N) behind the last token of each segment."""
        rows = torch.arange(x.shape[1], device=x.device)
        inside = (rows < lengths.cumsum(1)[..., None]).to(x.dtype)  # (B, T, L): the segment or one before it
        # log-decay from behind token l to the end of segment t: the sum over the tokens after l that are inside
        tail = torch.einsum("btk,kl,bkh->bthl", inside, _tril(inside, -1, len(rows)).to(x.dtype), self.a)
        weight = tail.exp() * inside[:, :, None] * self.dt.transpose(1, 2)[:, None]  # (B, T, H, L)
        states = torch.einsum("bthl,blhp,blhn->bthpn", weight, x, self.B)
        if h0 is not None:
            states = states + torch.einsum("btl,blh->bth", inside, self.a).exp()[..., None, None] * h0[:, None]
        return states


def _exp_sums(a: Tensor) -> Tensor:
    """(B, L, H) -> (B, H, i, j): exp of the sum of a_k over j < k ≤ i; 1 on the diagonal, 1 above it."""
    length = a.shape[1]
    k = torch.arange(length, device=a.device)
    between = (k <= k[:, None, None]) & (k > k[None, :, None])  # (i, j, k): j < k ≤ i
    return torch.einsum("ijk,bkh->bhij", between.to(a.dtype), a).exp()


def _tril(like: Tensor, diagonal: int, size: int | None = None) -> Tensor:
    size = like.shape[-1] if size is None else size
    return torch.ones(size, size, dtype=torch.bool, device=like.device).tril(diagonal)


def _output(matrix: Tensor, x: Tensor, D: Tensor | None) -> Tensor:
    y = torch.einsum("bhij,bjhp->bihp", matrix, x)
    return y if D is None else y + D[..., None] * x


def _readout(leg: _Leg, h0: Tensor | None) -> Tensor | float:
    """What is left of the initial state: C_i · exp(sum of a_k over k ≤ i) h0, (B, L, H, P)."""
    if h0 is None:
        return 0.0
    return torch.einsum("blh,blhn,bhpn->blhp", leg.a.cumsum(1).exp(), leg.C, h0)
