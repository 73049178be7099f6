"""Scans over tokens that are split over processes: the state that enters the tokens of each process.

The state after n tokens is linear in the state before them. So every process computes the state that its own tokens add
to zero, and by how much they decay the state before them; one all-gather of both gives each process the state that
enters its tokens, with which it then runs the scan.

Shapes: B batch, L tokens of a process, H heads, G groups of heads that share B and C, P channels of a head, N state
size.
"""

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from blueberry_video.ops import ssd, video_ssd
from blueberry_video.parallel.sequence import SequenceGroup

Direction = tuple[Tensor, Tensor, Tensor, Tensor]  # dt, A, B, C


def entering_state(group: SequenceGroup, x: Tensor, dt: Tensor, A: Tensor, B: Tensor, reverse: bool = False) -> Tensor:
    """State that enters the tokens of this process, of all tokens before them, or with ``reverse`` after them.

    It is the ``h0`` of :func:`~blueberry_video.ops.ssd` and :func:`~blueberry_video.ops.video_ssd`, or with ``reverse``
    the ``g0``. All processes must call it.

    Args:
        group: processes that share the tokens; those of each are consecutive.
        x: (B, L, H, P).
        dt: (B, L, H).
        A: (H,).
        B: (B, L, G, N).
        reverse: The direction of the scan is from the last token to the first.

    Returns:
        (B, H, P, N), in float32 or higher precision; differentiable.
    """
    packed = group.gather_parts(checkpoint(_added, x, dt, A, B, reverse, use_reentrant=False, preserve_rng_state=False))
    states, decays = packed[..., :-1], packed[..., 0, -1]  # (size, B, H, P, N), (size, B, H)
    if reverse:
        states, decays = states[group.rank + 1 :], decays[group.rank + 1 :]
        between = torch.cat([torch.zeros_like(decays[:1]), decays[:-1]]).cumsum(0)
    else:
        states, decays = states[: group.rank], decays[: group.rank]
        between = torch.cat([decays[1:], torch.zeros_like(decays[:1])]).flip(0).cumsum(0).flip(0)
    return (between.exp()[..., None, None] * states).sum(0)


def _added(x: Tensor, dt: Tensor, A: Tensor, B: Tensor, reverse: bool) -> Tensor:
    """State (B, H, P, N) that the tokens add, with the sum of their log-decays appended to N."""
    dtype = torch.promote_types(x.dtype, torch.float32)
    with torch.autocast(x.device.type, enabled=False):
        a = (dt * A).double()
        sums = a.cumsum(1)
        weight = ((sums - a) if reverse else (sums[:, -1:] - sums)).exp().to(dtype) * dt.to(dtype)
        inputs = (x.to(dtype) * weight[..., None]).unflatten(2, (B.shape[2], -1)).flatten(3)  # (B, L, G, h P)
        states = inputs.permute(0, 2, 3, 1) @ B.to(dtype).transpose(1, 2)  # (B, G, h P, N)
        states = states.unflatten(2, (-1, x.shape[3])).flatten(1, 2)
        decay = sums[:, -1, :, None, None].to(dtype).expand(*states.shape[:-1], 1)
        return torch.cat([states, decay], dim=-1)


def bidirectional_ssd(
    group: SequenceGroup,
    x: Tensor,
    forward: Direction,
    backward: Direction,
    D: Tensor,
    shift: str = "strict",
    chunk: int | None = None,
) -> Tensor:
    """:func:`~blueberry_video.ops.video_ssd` of one frame that is split over a group: bidirectional over all tokens.

    Args:
        group: processes that share the tokens.
        x: (B, L, H, P).
        forward, backward: dt, A, B and C of each direction.
        D, shift, chunk: See :func:`~blueberry_video.ops.video_ssd`.

    Returns:
        y (B, L, H, P) in the dtype of x.
    """
    (dt_f, A_f, B_f, C_f), (dt_b, A_b, B_b, C_b) = forward, backward
    h0 = entering_state(group, x, dt_f, A_f, B_f)
    g0 = entering_state(group, x, dt_b, A_b, B_b, reverse=True)
    if shift == "strict":
        y = video_ssd(x, dt_f, dt_b, A_f, A_b, B_f, C_f, B_b, C_b, D, x.shape[1], h0, g0, chunk)
        assert isinstance(y, Tensor)
        return y
    y_f = ssd(x, dt_f, A_f, B_f, C_f, h0=h0, chunk=chunk)
    y_b = ssd(x.flip(1), dt_b.flip(1), A_b, B_b.flip(1), C_b.flip(1), h0=g0, chunk=chunk)
    assert isinstance(y_f, Tensor)
    assert isinstance(y_b, Tensor)
    y_b = y_b.flip(1)
    y = torch.cat([group.preceding(y_f, 1), y_f[:, :-1]], 1) + torch.cat([y_b[:, 1:], group.following(y_b, 1)], 1)
    return (y + D[..., None] * x).to(x.dtype)
