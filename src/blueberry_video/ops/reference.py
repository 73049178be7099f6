"""Dense reference of the scans: a matrix per head, differentiable, in any precision, O(L²) in memory.

Shapes: B batch, L tokens, T frames, H heads, G groups of heads that share B and C, P channels of a head, N state size.
a = dt * A is the log-decay of a token.
"""

import torch
from torch import Tensor

from blueberry_video.ops.inputs import ScanInputs


def scan(inputs: ScanInputs) -> tuple[Tensor, Tensor]:
    """Returns y (B, L, H, P) and the forward states (B, T, H, P, N) at the end of each frame.

    y is M x plus the contribution of the initial states. Causal (no backward direction), with h_t = exp(a_t) h_{t-1} +
    dt_t x_t ⊗ B_t and y_t = h_t C_t + D x_t: M_ij = C_i · B_j exp(sum of a_k over j < k ≤ i) dt_j for i ≥ j, plus D_i
    on the diagonal. Bidirectional within a frame and causal across frames: M_ij = C^f_i · B^f_j exp(sum of a^f_k over
    j < k ≤ i) dt^f_j for i > j; C^b_i · B^b_j exp(sum of a^b_k over i ≤ k < j) dt^b_j for i < j in the same frame; D_i
    for i = j; 0 for every later frame.
    """
    x, lengths = inputs.x, inputs.lengths
    if lengths is None:
        lengths = torch.full((len(x), inputs.num_frames), inputs.segment_len, device=x.device)
    forward, h0 = _Direction(*inputs.forward), inputs.h0
    matrix = forward.matrix * _tril(forward.matrix, 0 if inputs.backward is None else -1)
    if inputs.backward is not None:
        frame = frames_of(lengths, x.shape[1])  # (B, L)
        same = (frame[:, :, None] == frame[:, None, :])[:, None]  # (B, 1, L, L)
        backward = _Direction(*inputs.backward)
        matrix = matrix + backward.matrix_backward * (same & ~_tril(same, 0))
    y = torch.einsum("bhij,bjhp->bihp", matrix, x)
    if inputs.D is not None:
        y = y + inputs.D[..., None] * x
    if h0 is not None:  # reaches token i through the decays of tokens 0 to i
        y = y + torch.einsum("blh,blhn,bhpn->blhp", forward.a.cumsum(1).exp(), forward.C, h0)
    if inputs.backward is not None and inputs.g0 is not None:  # reaches token i through those of i to the frame's end
        later = (same & ~_tril(same, -1)).to(backward.a.dtype)  # (B, 1, i, k): k ≥ i in the same frame
        decay = torch.einsum("bhik,bkh->bih", later.expand(-1, x.shape[2], -1, -1), backward.a).exp()
        entering = inputs.g0[torch.arange(len(frame), device=frame.device)[:, None], frame]  # (B, L, H, P, N)
        y = y + torch.einsum("blh,blhn,blhpn->blhp", decay, backward.C, entering)
    return y, forward.frame_states(x, lengths, h0)


def frames_of(lengths: Tensor, num_tokens: int) -> Tensor:
    """Returns the frame index (B, L) of each of ``num_tokens`` tokens, given frame lengths (B, T)."""
    ends = lengths.cumsum(1)  # an empty frame ends where the previous one does
    tokens = torch.arange(num_tokens, device=ends.device).repeat(len(ends), 1)
    return torch.searchsorted(ends, tokens, right=True)


class _Direction:
    """One scan direction: a (B, L, H), B and C per head (B, L, H, N), and the products of all pairs of tokens."""

    def __init__(self, dt: Tensor, a: Tensor, B: Tensor, C: Tensor):
        heads = dt.shape[2] // B.shape[2]
        self.dt, self.a = dt, a
        self.B, self.C = B.repeat_interleave(heads, 2), C.repeat_interleave(heads, 2)
        self.pairs = torch.einsum("bihn,bjhn->bhij", self.C, self.B) * dt.transpose(1, 2)[:, :, None]  # C_i·B_j dt_j

    @property
    def matrix(self) -> Tensor:
        """(B, H, L, L), valid on and below the diagonal."""
        return self.pairs * _exp_sums(self.a)

    @property
    def matrix_backward(self) -> Tensor:
        """(B, H, L, L), valid above the diagonal: sums over i ≤ k < j are those over i < k ≤ j of a shifted by one."""
        return self.pairs * _exp_sums(self.a.roll(1, 1)).transpose(2, 3)

    def frame_states(self, x: Tensor, lengths: Tensor, h0: Tensor | None) -> Tensor:
        """States (B, T, H, P, N) after the last token of each frame."""
        rows = torch.arange(x.shape[1], device=x.device)
        inside = (rows < lengths.cumsum(1)[..., None]).to(x.dtype)  # (B, T, L): in the frame or in an earlier one
        # log-decay from token l to the end of frame t: sum over the tokens after l that are inside
        tail = torch.einsum("btk,kl,bkh->bthl", inside, _tril(inside, -1, len(rows)).to(x.dtype), self.a)
        weight = tail.exp() * inside[:, :, None] * self.dt.transpose(1, 2)[:, None]  # (B, T, H, L)
        states = torch.einsum("bthl,blhp,blhn->bthpn", weight, x, self.B)
        if h0 is not None:
            states = states + torch.einsum("btl,blh->bth", inside, self.a).exp()[..., None, None] * h0[:, None]
        return states


def _exp_sums(a: Tensor) -> Tensor:
    """(B, L, H) -> (B, H, i, j): exp of the sum of a_k over j < k ≤ i; 1 on and above the diagonal."""
    length = a.shape[1]
    k = torch.arange(length, device=a.device)
    between = (k <= k[:, None, None]) & (k > k[None, :, None])  # (i, j, k): j < k ≤ i
    return torch.einsum("ijk,bkh->bhij", between.to(a.dtype), a).exp()


def _tril(like: Tensor, diagonal: int, size: int | None = None) -> Tensor:
    size = like.shape[-1] if size is None else size
    return torch.ones(size, size, dtype=torch.bool, device=like.device).tril(diagonal)
