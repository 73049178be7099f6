"""The scans as users call them: arguments checked, a backend chosen, registered with torch.

Backends: ``reference`` (dense, any precision, for tests), ``torch`` (chunked, the default on the CPU and for float64),
``triton`` (the default on CUDA), ``mamba_ssm`` (that package's kernels, for the causal leg, where it is installed).

Shapes: B batch, L tokens, T segments (frames), H heads, G groups of heads that share B and C, P channels of a head, N
channels of the state.
"""

import os
from collections.abc import Callable
from importlib.util import find_spec
from typing import Literal

import torch
from einops import rearrange
from torch import Tensor
from torch.autograd import forward_ad

from blueberry_video.ops import chunked, reference

Backend = Literal["reference", "torch", "triton", "mamba_ssm"]


def ssd(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    segment_len: int | Tensor | None = None,
    h0: Tensor | None = None,
    chunk: int | None = None,
    return_frame_states: bool = False,
    *,
    max_segment: int | None = None,
    backend: Backend | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Mamba-2's causal scan (arXiv 2405.21060): h_t = exp(dt_t A) h_{t-1} + dt_t x_t ⊗ B_t, y_t = h_t C_t + D x_t.

    Args:
        x: (B, L, H, P) float; B and C have its type, the rest may be more precise.
        dt: (B, L, H), ≥ 0.
        A: (H,), < 0.
        B, C: (B, L, G, N); G divides H, and head h belongs to group h // (H / G).
        D: (H,) or (B, L, H); ``None`` for none.
        segment_len: where states are wanted: every so many tokens, or lengths (B, T) that add up to L; ``None``: at
            the end alone.
        h0: (B, H, P, N), the state before the first token; zero if ``None``.
        chunk: tokens of a tile; chosen if ``None``.
        return_frame_states: also return the states.
        max_segment: no length is greater; saves looking at them, which on a GPU waits for it.
        backend: see this module; chosen if ``None``.

    Returns:
        y (B, L, H, P) in the type of x; with ``return_frame_states`` also the states (B, T, H, P, N) behind each
        segment, in float32 or better. Both are differentiable.

    Raises:
        ValueError: for shapes that do not fit each other, an unknown backend, or, on the CPU, values of dt that are
            negative or not a number. (On a GPU, where looking would mean waiting, negative dt gives the growing
            state that the formula says, and NaN stays NaN.)
    """
    _check_leg("", x, dt, A, B, C, D, h0)
    lengths, longest = _segments(segment_len, max_segment, x)
    backend = _backend(backend, x, chunk)
    if backend == "mamba_ssm":
        y, states = _mamba_ssm(x, dt, A, B, C, D, h0, _count(lengths, longest, x))
    elif backend == "reference":
        if not x.is_cuda:
            _check_values(x, dt, None, lengths, longest)
        y, states = _exact(reference.ssd, x, dt, A, B, C, D, _explicit(lengths, longest, x), h0)
    else:
        a, d = dt * A, _per_token(D, x)
        y, states = torch.ops.blueberry_video.scan(
            x, dt, a, B, C, None, None, None, None, d, lengths, longest, h0, None, chunk or 0, backend
        )
    return (y, states) if return_frame_states else y


def ssd_step(
    x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None, state: Tensor
) -> tuple[Tensor, Tensor]:
    """One token of :func:`ssd`.

    Args:
        x: (B, H, P).
        dt: (B, H).
        A: (H,).
        B, C: (B, G, N).
        D: (H,), (B, H) or ``None``.
        state: (B, H, P, N).

    Returns:
        y (B, H, P) and the next state.
    """
    heads = x.shape[1] // B.shape[1]
    B, C = (tensor.repeat_interleave(heads, 1).to(state.dtype) for tensor in (B, C))
    added = (dt[..., None] * x)[..., None] * B[:, :, None]  # (B, H, P, N)
    state = (dt * A).exp()[..., None, None] * state + added
    y = (state * C[:, :, None]).sum(-1)
    y = y if D is None else y + D[..., None] * x
    return y.to(x.dtype), state


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
    segment_len: int | Tensor,
    h0: Tensor | None = None,
    g0: Tensor | None = None,
    chunk: int | None = None,
    shift: Literal["strict", "hydra"] = "strict",
    return_frame_states: bool = False,
    *,
    max_segment: int | None = None,
    backend: Backend | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """A scan that looks both ways inside a frame and only back across frames.

    y_i is the sum over j of M_ij x_j, with a_k = dt_k A: for j before i, in any frame,
    C^f_i · B^f_j exp(sum of a^f_k over j < k ≤ i) dt^f_j; for j behind i in the same frame,
    C^b_i · B^b_j exp(sum of a^b_k over i ≤ k < j) dt^b_j; for i itself D_i; and exactly 0 for every later frame. It is
    the quasiseparable matrix of Hydra (arXiv 2407.09941) inside each frame, and Mamba-2's scan across them.

    One frame with ``h0`` the state behind the frame before is the step of a stream, equal to the whole at once.

    Args:
        x: (B, L, H, P) float, frame after frame; B and C have its type, the rest may be more precise.
        dt_f, dt_b: (B, L, H), ≥ 0: of the forward and the backward leg.
        A_f, A_b: (H,), < 0.
        B_f, C_f, B_b, C_b: (B, L, G, N); G divides H, and head h belongs to group h // (H / G).
        D: the diagonal, (H,) or (B, L, H); ``None`` for zero.
        segment_len: tokens of a frame, or lengths (B, T) that add up to L where frames differ, as masks make them;
            0 is a length.
        h0: (B, H, P, N), the forward state before the first frame; zero if ``None``.
        g0: (B, T, H, P, N), the backward state that enters each frame from behind its end ((B, H, P, N) for one
            frame); zero if ``None``.
        chunk: tokens of a tile; chosen if ``None``.
        shift: ``"strict"`` as above; ``"hydra"`` as the code of Hydra has it, where token i reads with C_{i-1} what
            token i - 1 holds, itself included, and with C_{i+1} what token i + 1 holds: for its weights. It takes
            frames of one length, and no h0 or g0.
        return_frame_states: also return the forward states.
        max_segment: no length is greater; saves looking at them, which on a GPU waits for it.
        backend: see this module; chosen if ``None``.

    Returns:
        y (B, L, H, P) in the type of x; with ``return_frame_states`` also the forward states (B, T, H, P, N) behind
        each frame, in float32 or better. Both are differentiable.

    Raises:
        ValueError: as :func:`ssd`, or for arguments that ``shift`` or ``backend`` exclude.
    """
    _check_leg("_f", x, dt_f, A_f, B_f, C_f, D, h0)
    _check_leg("_b", x, dt_b, A_b, B_b, C_b, D, h0)
    if B_f.shape != B_b.shape:
        raise ValueError(f"B_f {tuple(B_f.shape)} and B_b {tuple(B_b.shape)} differ: both legs have the same G and N.")
    lengths, longest = _segments(segment_len, max_segment, x)
    frames = _count(lengths, longest, x)
    g0 = _check_g0(g0, x, frames, B_f.shape[-1])
    if shift not in ("strict", "hydra"):
        raise ValueError(f"shift={shift!r} is unknown: choose 'strict' or 'hydra'.")
    backend = _backend(backend, x, chunk)
    if shift == "hydra" or backend == "mamba_ssm":
        if lengths is not None or g0 is not None or (shift == "hydra" and h0 is not None):
            raise ValueError(
                f"shift={shift!r} with backend={backend!r} runs as two scans of their own, for frames of one length "
                "and without g0 (nor h0, with 'hydra'): use shift='strict' and backend 'torch' or 'triton'."
            )
        forward, backward = (dt_f, A_f, B_f, C_f), (dt_b, A_b, B_b, C_b)
        y, states = two_scans(x, forward, backward, D, longest, h0, shift, backend, chunk)
    elif backend == "reference":
        if not x.is_cuda:
            _check_values(x, dt_f, dt_b, lengths, longest)
        lengths = _explicit(lengths, longest, x)
        y, states = _exact(reference.video_ssd, x, dt_f, dt_b, A_f, A_b, B_f, C_f, B_b, C_b, D, lengths, h0, g0)
    else:
        a_f, a_b, d = dt_f * A_f, dt_b * A_b, _per_token(D, x)
        y, states = torch.ops.blueberry_video.scan(
            x, dt_f, a_f, B_f, C_f, dt_b, a_b, B_b, C_b, d, lengths, longest, h0, g0, chunk or 0, backend
        )
    return (y, states) if return_frame_states else y


_Leg = tuple[Tensor, Tensor, Tensor, Tensor]


def two_scans(
    x: Tensor,
    forward: _Leg,
    backward: _Leg,
    D: Tensor | None,
    segment_len: int,
    h0: Tensor | None = None,
    shift: str = "strict",
    backend: Backend | None = None,
    chunk: int | None = None,
) -> tuple[Tensor, Tensor]:
    """:func:`video_ssd` out of two causal scans: the frames in order, and each frame flipped; a leg is dt, A, B, C.

    What others compute it with, and the peer of the benchmarks.
    """

    def flipped(tensor: Tensor) -> Tensor:
        return rearrange(tensor, "b (t s) ... -> (b t) s ...", s=segment_len).flip(1)

    def diagonal(dt: Tensor, B: Tensor, C: Tensor) -> Tensor:
        own = (B.to(dt.dtype) * C.to(dt.dtype)).sum(-1).repeat_interleave(x.shape[2] // B.shape[2], 2) * dt
        return own[..., None] * x

    dt, A, B, C = backward
    u, dt_b, B_b, C_b = (flipped(tensor) for tensor in (x, dt, B, C))
    ahead, _ = ssd(u, dt_b, A, B_b, C_b, chunk=chunk, return_frame_states=True, backend=backend)
    every = None if backend == "mamba_ssm" else segment_len  # which returns the last state only
    behind, states = ssd(x, *forward, None, every, h0, chunk, return_frame_states=True, backend=backend)
    if shift == "hydra":
        behind = torch.cat([torch.zeros_like(behind[:, :1]), behind[:, :-1]], 1)
        ahead = torch.cat([torch.zeros_like(ahead[:, :1]), ahead[:, :-1]], 1)
    ahead = rearrange(ahead.flip(1), "(b t) s ... -> b (t s) ...", b=len(x))
    y = behind + ahead
    if shift == "strict":
        y = y - diagonal(forward[0], *forward[2:]) - diagonal(backward[0], *backward[2:])
    y = y if D is None else y + D[..., None] * x
    return y.to(x.dtype), states


# ---- arguments -------------------------------------------------------------------------------------------------------


def _check_leg(
    leg: str, x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None, h0: Tensor | None
) -> None:
    if x.ndim != 4 or 0 in x.shape or not x.is_floating_point():
        raise ValueError(
            f"x has the shape {tuple(x.shape)} and type {x.dtype}: it must be (B, L, H, P), with at least one of each, "
            "of floating point numbers."
        )
    _refuse_forward_mode()
    batch, length, heads, channels = x.shape
    groups, states = B.shape[-2:] if B.ndim == 4 else (1, 1)
    if not groups or heads % groups:
        raise ValueError(
            f"B{leg} has {groups} groups for the {heads} heads of x: their number must divide that of the heads."
        )
    expected = {
        f"dt{leg}": (dt, (batch, length, heads)),
        f"A{leg}": (A, (heads,)),
        f"B{leg}": (B, (batch, length, groups, states)),
        f"C{leg}": (C, (batch, length, groups, states)),
        "h0": (h0, (batch, heads, channels, states)),
        "D": (D, (heads,) if D is not None and D.ndim == 1 else (batch, length, heads)),
    }
    for name, (tensor, shape) in expected.items():
        if tensor is not None and tuple(tensor.shape) != shape:
            raise ValueError(
                f"{name} has the shape {tuple(tensor.shape)}, but x {tuple(x.shape)} and B{leg} {tuple(B.shape)} ask "
                f"for {shape}."
            )
    for name, tensor in ((f"B{leg}", B), (f"C{leg}", C)):
        if tensor.dtype != x.dtype:
            raise ValueError(f"{name} is {tensor.dtype} and x {x.dtype}: give both the same type.")


def _refuse_forward_mode() -> None:
    """Registered operations have no forward-mode derivative: torch would take it for 0, without a word."""
    if torch.compiler.is_compiling():
        return
    transform = torch._C._functorch.peek_interpreter_stack()
    is_jvp = transform is not None and transform.key() == torch._C._functorch.TransformType.Jvp
    if is_jvp or forward_ad._current_level >= 0:
        raise ValueError(
            "the scans have no forward-mode derivative (jvp, jacfwd): use reverse mode, such as "
            "torch.autograd.functional.jacobian(…, vectorize=False)."
        )


def _segments(segment_len: int | Tensor | None, max_segment: int | None, x: Tensor) -> tuple[Tensor | None, int]:
    """Lengths (B, T) or ``None``, and the length of the longest."""
    batch, length = x.shape[:2]
    if isinstance(segment_len, Tensor):
        if segment_len.ndim != 2 or len(segment_len) != batch or segment_len.is_floating_point():
            raise ValueError(
                f"segment_len is a {segment_len.dtype} tensor of shape {tuple(segment_len.shape)}: lengths are whole "
                f"numbers, (B, T) with B = {batch}."
            )
        if not segment_len.shape[1]:
            raise ValueError("segment_len has no lengths, (B, 0): give at least one frame.")
        return segment_len, int(segment_len.max()) if max_segment is None else int(max_segment)
    segment_len = length if segment_len is None else segment_len
    if isinstance(segment_len, bool) or not hasattr(segment_len, "__index__"):
        raise ValueError(f"segment_len={segment_len!r} is no whole number and no tensor of lengths (B, T).")
    segment_len = int(segment_len)
    if segment_len < 1 or length % segment_len:
        raise ValueError(
            f"x has L = {length} tokens, which are no whole number of frames of segment_len={segment_len}: L must be "
            "T * segment_len; where frames differ in length, give lengths (B, T)."
        )
    return None, segment_len


def _count(lengths: Tensor | None, longest: int, x: Tensor) -> int:
    return x.shape[1] // longest if lengths is None else lengths.shape[1]


def _explicit(lengths: Tensor | None, longest: int, x: Tensor) -> Tensor:
    if lengths is not None:
        return lengths
    return torch.full((len(x), x.shape[1] // longest), longest, device=x.device)


def _check_g0(g0: Tensor | None, x: Tensor, frames: int, states: int) -> Tensor | None:
    if g0 is None:
        return None
    batch, _, heads, channels = x.shape
    if frames == 1 and g0.ndim == 4:
        g0 = g0[:, None]
    if tuple(g0.shape) != (batch, frames, heads, channels, states):
        raise ValueError(
            f"g0 has the shape {tuple(g0.shape)}: it must be (B, T, H, P, N) = "
            f"{(batch, frames, heads, channels, states)}, one state a frame."
        )
    return g0


def _backend(backend: Backend | None, x: Tensor, chunk: int | None) -> Backend:
    if chunk is not None and (isinstance(chunk, bool) or not hasattr(chunk, "__index__") or chunk < 1):
        raise ValueError(f"chunk={chunk!r} is no number of tokens: give a whole number from 1 on, or None to choose.")
    if backend is None:
        return "triton" if x.is_cuda and x.dtype != torch.float64 and find_spec("triton") else "torch"
    if backend not in ("reference", "torch", "triton", "mamba_ssm"):
        raise ValueError(f"backend={backend!r} is unknown: choose 'reference', 'torch', 'triton' or 'mamba_ssm'.")
    interpreted = os.environ.get("TRITON_INTERPRET") == "1"
    if backend in ("triton", "mamba_ssm") and x.device.type == "cpu" and not interpreted:
        raise ValueError(f"backend={backend!r} runs on CUDA and x is on the CPU: use 'torch', or x.cuda().")
    if backend in ("triton", "mamba_ssm") and find_spec(backend) is None:
        raise ValueError(f"backend={backend!r} is not installed: pip install blueberry-video[cuda], or use 'torch'.")
    if backend == "triton" and x.dtype == torch.float64:
        raise ValueError("backend='triton' has no float64: use backend='torch', or x in float32.")
    return backend


def _exact(definition: Callable[..., tuple[Tensor, Tensor]], x: Tensor, *rest: Tensor | None) -> tuple[Tensor, Tensor]:
    """The definition in float64, its results in the types that the other backends give."""
    wide = (tensor.double() if tensor is not None and tensor.is_floating_point() else tensor for tensor in rest)
    y, states = definition(x.double(), *wide)
    return y.to(x.dtype), states.to(torch.promote_types(x.dtype, torch.float32))


def _per_token(D: Tensor | None, x: Tensor) -> Tensor | None:
    return None if D is None else D.expand(x.shape[:3])


def _mamba_ssm(
    x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None, h0: Tensor | None, segments: int
) -> tuple[Tensor, Tensor]:
    from mamba_ssm.ops.triton.ssd_combined import mamba_chunk_scan_combined

    if segments != 1:
        raise ValueError("backend='mamba_ssm' returns the last state only: use 'torch' or 'triton' for segments.")
    y, state = mamba_chunk_scan_combined(x, dt, A, B, C, 256, initial_states=h0, return_final_states=True)
    return y if D is None else y + (D[..., None] * x).to(y.dtype), state[:, None]


# ---- registration ----------------------------------------------------------------------------------------------------


@torch.library.custom_op("blueberry_video::scan", mutates_args=())
def _scan(
    x: Tensor,
    dt_f: Tensor,
    a_f: Tensor,
    B_f: Tensor,
    C_f: Tensor,
    dt_b: Tensor | None,
    a_b: Tensor | None,
    B_b: Tensor | None,
    C_b: Tensor | None,
    D: Tensor | None,
    lengths: Tensor | None,
    segment_len: int,
    h0: Tensor | None,
    g0: Tensor | None,
    chunk: int,
    backend: str,
) -> tuple[Tensor, Tensor]:
    if not x.is_cuda:  # where looking at values costs no waiting
        _check_values(x, dt_f, dt_b, lengths, segment_len)
    inputs = (x, dt_f, a_f, B_f, C_f, dt_b, a_b, B_b, C_b, D, lengths, segment_len, h0, g0, chunk or None)
    with torch.autocast(x.device.type, enabled=False):  # the op knows itself what must be precise
        y, states = _module(backend).forward(*inputs)
    return y.contiguous(), states.contiguous()


@_scan.register_fake
def _(x, dt_f, a_f, B_f, C_f, dt_b, a_b, B_b, C_b, D, lengths, segment_len, h0, g0, chunk, backend):  # type: ignore[no-untyped-def]
    states = (len(x), _count(lengths, segment_len, x), *x.shape[2:], B_f.shape[-1])
    return x.new_empty(x.shape), x.new_empty(states, dtype=torch.promote_types(x.dtype, torch.float32))


@torch.library.custom_op("blueberry_video::scan_backward", mutates_args=())
def _scan_backward(
    dy: Tensor,
    dstates: Tensor,
    states: Tensor,
    x: Tensor,
    dt_f: Tensor,
    a_f: Tensor,
    B_f: Tensor,
    C_f: Tensor,
    dt_b: Tensor | None,
    a_b: Tensor | None,
    B_b: Tensor | None,
    C_b: Tensor | None,
    D: Tensor | None,
    lengths: Tensor | None,
    segment_len: int,
    h0: Tensor | None,
    g0: Tensor | None,
    chunk: int,
    backend: str,
) -> list[Tensor]:
    """The gradients of those inputs that are tensors and are differentiated; for those that are absent, nothing."""
    inputs = (x, dt_f, a_f, B_f, C_f, dt_b, a_b, B_b, C_b, D, lengths, segment_len, h0, g0, chunk or None)
    with torch.autocast(x.device.type, enabled=False):
        gradients = _module(backend).backward(dy, dstates, states, *inputs)
    return [gradient.contiguous() for gradient in gradients if gradient is not None]


@_scan_backward.register_fake
def _(  # type: ignore[no-untyped-def]
    dy, dstates, states, x, dt_f, a_f, B_f, C_f, dt_b, a_b, B_b, C_b, D, lengths, segment_len, h0, g0, chunk, backend
):
    inputs = (x, dt_f, a_f, B_f, C_f, dt_b, a_b, B_b, C_b, D, h0, g0)
    return [tensor.new_empty(tensor.shape) for tensor in inputs if tensor is not None]


def _setup_context(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    ctx.save_for_backward(*(value for value in inputs if isinstance(value, Tensor)), output[1])
    ctx.layout = [None if isinstance(value, Tensor) else (value,) for value in inputs]


def _differentiate(ctx, dy, dstates):  # type: ignore[no-untyped-def]
    *saved, states = ctx.saved_tensors
    tensors = iter(saved)
    inputs = [next(tensors) if constant is None else constant[0] for constant in ctx.layout]
    gradients = iter(torch.ops.blueberry_video.scan_backward(dy, dstates, states, *inputs))
    lengths = 10  # the one tensor among the inputs without a gradient
    return tuple(
        next(gradients) if isinstance(value, Tensor) and index != lengths else None
        for index, value in enumerate(inputs)
    )


torch.library.register_autograd("blueberry_video::scan", _differentiate, setup_context=_setup_context)


def _module(backend: str):  # type: ignore[no-untyped-def]
    if backend == "torch":
        return chunked
    from blueberry_video.ops import kernels  # triton is imported where it is used

    return kernels


def _check_values(x: Tensor, dt_f: Tensor, dt_b: Tensor | None, lengths: Tensor | None, longest: int) -> None:
    for name, dt in (("dt", dt_f),) if dt_b is None else (("dt_f", dt_f), ("dt_b", dt_b)):
        if not ((dt >= 0) & (dt < torch.inf)).all():
            what = "not a number" if dt.isnan().any() else "infinite"
            what = f"negative, the least {dt.min():.3g}" if (dt < 0).any() else what
            raise ValueError(
                f"some values of {name} are {what}: a step of time is ≥ 0, as softplus makes it. NaN comes from what "
                "it was computed of: look for the first layer that gives one."
            )
    if lengths is None:
        return
    if (lengths < 0).any() or lengths.max() > longest or (lengths.sum(1) != x.shape[1]).any():
        raise ValueError(
            f"the lengths of segment_len add up to {lengths.sum(1).tolist()} a sample, each from {lengths.min()} to "
            f"{lengths.max()}: every sample's must add up to its L = {x.shape[1]} tokens, from 0 to {longest} each."
        )
