"""Public scan functions: argument checks, choice of a backend, and registration with ``torch.library``.

Backends: ``reference`` (dense, float64, for tests), ``torch`` (chunked; the default on the CPU and for float64),
``triton`` (the default on CUDA), ``mamba_ssm`` (that package's kernels, causal direction only, where it is installed).

Shapes: B batch, L tokens, T segments (frames), H heads, G groups of heads that share B and C, P channels of a head, N
state size.
"""

import os
from importlib.util import find_spec
from typing import Any, Literal

import torch
from einops import rearrange
from torch import Tensor
from torch.autograd import forward_ad

from blueberry_video.installation import install_command
from blueberry_video.ops import chunked, reference
from blueberry_video.ops.inputs import ScanInputs

Backend = Literal["reference", "torch", "triton", "mamba_ssm"]
_Parameters = tuple[Tensor, Tensor, Tensor, Tensor]  # dt, A, B, C of one direction


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
    """Causal selective scan of Mamba-2 (SSD, arXiv 2405.21060).

    The recurrence is h_t = exp(dt_t A) h_{t-1} + dt_t x_t ⊗ B_t, y_t = h_t C_t + D x_t.

    Args:
        x: (B, L, H, P) floating-point. B and C have the same dtype; the other tensors may have a higher precision.
        dt: (B, L, H), ≥ 0.
        A: (H,), < 0.
        B, C: (B, L, G, N). G divides H; head h belongs to group h // (H / G).
        D: (H,) or (B, L, H) skip connection; ``None`` for no skip.
        segment_len: Segments at the end of which states are returned: an int for segments of equal length, a tensor of
            lengths (B, T) that sum to L, or ``None`` for one segment.
        h0: Initial state (B, H, P, N); zero if ``None``.
        chunk: Tokens of a chunk; chosen by the backend if ``None``.
        return_frame_states: Also returns the states.
        max_segment: Upper bound of the lengths. Avoids reading them, which synchronizes with the GPU.
        backend: One of the backends of this module; chosen by device and dtype if ``None``.

    Returns:
        y (B, L, H, P) in the dtype of x; with ``return_frame_states`` also the states (B, T, H, P, N) at the end of
        each segment, in float32 or higher precision. Both are differentiable.

    Raises:
        ValueError: For inconsistent shapes, an unknown backend, or, on the CPU, negative or non-finite dt. (Checking
            values on a GPU would synchronize: there, negative dt grows the state as the formula does, and NaN
            propagates.)

    Example::

        >>> import torch
        >>> from blueberry_video.ops import ssd
        >>> x, dt, A = torch.randn(2, 12, 4, 8), torch.rand(2, 12, 4), -torch.ones(4)
        >>> B, C = torch.randn(2, 2, 12, 1, 16)
        >>> y, states = ssd(x, dt, A, B, C, segment_len=6, return_frame_states=True)
        >>> y.shape, states.shape
        (torch.Size([2, 12, 4, 8]), torch.Size([2, 2, 4, 8, 16]))
    """
    _check_direction("", x, dt, A, B, C, D, h0)
    lengths, longest = _segments(segment_len, max_segment, x)
    backend = _backend(backend, x, chunk)
    if backend == "mamba_ssm":
        if (x.shape[1] // longest if lengths is None else lengths.shape[1]) != 1:
            raise ValueError(
                f"segment_len={segment_len!r} with backend='mamba_ssm', which returns the last state only: use "
                "segment_len=None, or backend 'torch' or 'triton'."
            )
        y, states = _mamba_ssm(x, dt, A, B, C, D, h0)
    else:
        inputs = ScanInputs(x, dt, A, B, C, None, None, None, None, D, lengths, longest, h0, None, chunk or 0)
        y, states = _run(inputs, backend)
    return (y, states) if return_frame_states else y


def ssd_step(
    x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None, state: Tensor
) -> tuple[Tensor, Tensor]:
    """One step of the recurrence of :func:`ssd`.

    Args:
        x: (B, H, P).
        dt: (B, H).
        A: (H,).
        B, C: (B, G, N).
        D: (H,), (B, H) or ``None``.
        state: (B, H, P, N).

    Returns:
        y (B, H, P) and the next state.

    Example::

        >>> import torch
        >>> from blueberry_video.ops import ssd_step
        >>> x, dt, A, state = torch.randn(2, 4, 8), torch.rand(2, 4), -torch.ones(4), torch.zeros(2, 4, 8, 16)
        >>> B, C = torch.randn(2, 2, 1, 16)
        >>> y, state = ssd_step(x, dt, A, B, C, None, state)
        >>> y.shape, state.shape
        (torch.Size([2, 4, 8]), torch.Size([2, 4, 8, 16]))
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
    """Selective scan that is bidirectional within a frame and causal across frames.

    y_i is the sum over j of M_ij x_j, with log-decays a_k = dt_k A. For j before i, in any frame, M_ij is C^f_i · B^f_j
    exp(sum of a^f_k over j < k ≤ i) dt^f_j; for j after i in the same frame, C^b_i · B^b_j exp(sum of a^b_k over
    i ≤ k < j) dt^b_j; for j = i, D_i; for j in a later frame, exactly 0. Within a frame this is the quasi-separable
    matrix of Hydra (arXiv 2407.09941), across frames the semiseparable matrix of Mamba-2.

    A call with one frame and the state of the previous frame as ``h0`` is one step of a stream. It equals the scan of
    the whole video.

    Args:
        x: (B, L, H, P) floating-point, frame after frame. B and C have the same dtype; the other tensors may have a
            higher precision.
        dt_f, dt_b: (B, L, H), ≥ 0, of the forward and the backward direction.
        A_f, A_b: (H,), < 0.
        B_f, C_f, B_b, C_b: (B, L, G, N). G divides H; head h belongs to group h // (H / G).
        D: Diagonal, (H,) or (B, L, H); zero if ``None``.
        segment_len: Tokens of a frame, or lengths (B, T) that sum to L where frames differ, as with masked tokens. A
            length may be 0.
        h0: Initial forward state (B, H, P, N) before the first frame; zero if ``None``.
        g0: Initial backward state (B, T, H, P, N) after the last token of each frame, or (B, H, P, N) for one frame;
            zero if ``None``.
        shift: ``"strict"`` as above. ``"hydra"`` matches Hydra's code, for its weights: C_{i-1} reads the forward state
            at i - 1, which includes token i - 1, and C_{i+1} the backward state at i + 1. It requires frames of equal
            length and no h0 or g0.
        return_frame_states: Also returns the forward states.
        chunk, max_segment, backend: See :func:`ssd`.

    Returns:
        y (B, L, H, P) in the dtype of x; with ``return_frame_states`` also the forward states (B, T, H, P, N) at the
        end of each frame, in float32 or higher precision. Both are differentiable.

    Raises:
        ValueError: As in :func:`ssd`, or for arguments that ``shift`` or ``backend`` do not support.

    Example::

        >>> import torch
        >>> from blueberry_video.ops import video_ssd
        >>> x, A = torch.randn(2, 3 * 16, 4, 8), -torch.ones(4)  # 3 frames of 16 tokens
        >>> dt_f, dt_b = torch.rand(2, 2, 48, 4)
        >>> B_f, C_f, B_b, C_b = torch.randn(4, 2, 48, 1, 16)
        >>> y, states = video_ssd(
        ...     x, dt_f, dt_b, A, A, B_f, C_f, B_b, C_b, torch.ones(4), segment_len=16, return_frame_states=True
        ... )
        >>> y.shape, states.shape
        (torch.Size([2, 48, 4, 8]), torch.Size([2, 3, 4, 8, 16]))
    """
    _check_direction("_f", x, dt_f, A_f, B_f, C_f, D, h0)
    _check_direction("_b", x, dt_b, A_b, B_b, C_b, D, h0)
    if B_f.shape != B_b.shape:
        raise ValueError(
            f"B_f {tuple(B_f.shape)} and B_b {tuple(B_b.shape)} differ: both directions must have the same G and N."
        )
    lengths, longest = _segments(segment_len, max_segment, x)
    g0 = _check_g0(g0, x, x.shape[1] // longest if lengths is None else lengths.shape[1], B_f.shape[-1])
    if shift not in ("strict", "hydra"):
        raise ValueError(f"shift={shift!r} is unknown: choose 'strict' or 'hydra'.")
    backend = _backend(backend, x, chunk)
    forward, backward = (dt_f, A_f, B_f, C_f), (dt_b, A_b, B_b, C_b)
    if shift == "hydra" or backend == "mamba_ssm":
        if lengths is not None or g0 is not None or (shift == "hydra" and h0 is not None):
            raise ValueError(
                f"shift={shift!r} with backend={backend!r} requires frames of equal length and no g0 (nor h0, with "
                "'hydra'), because it runs as two separate scans: use shift='strict' and backend 'torch' or 'triton'."
            )
        y, states = two_scans(x, forward, backward, D, longest, h0, shift, backend, chunk)
    else:
        inputs = ScanInputs(x, *forward, *backward, D, lengths, longest, h0, g0, chunk or 0)
        y, states = _run(inputs, backend)
    return (y, states) if return_frame_states else y


def two_scans(
    x: Tensor,
    forward: _Parameters,
    backward: _Parameters,
    D: Tensor | None,
    segment_len: int,
    h0: Tensor | None = None,
    shift: str = "strict",
    backend: Backend | None = None,
    chunk: int | None = None,
) -> tuple[Tensor, Tensor]:
    """:func:`video_ssd` as two causal scans: over all frames in order, and over each frame reversed.

    ``forward`` and ``backward`` are dt, A, B, C. Other implementations compute it like this.
    """

    def flipped(tensor: Tensor) -> Tensor:
        return rearrange(tensor, "b (t s) ... -> (b t) s ...", s=segment_len).flip(1)

    def diagonal(dt: Tensor, A: Tensor, B: Tensor, C: Tensor) -> Tensor:
        own = (B.to(dt.dtype) * C.to(dt.dtype)).sum(-1).repeat_interleave(x.shape[2] // B.shape[2], 2) * dt
        return own[..., None] * x

    dt, A, B, C = backward
    u, dt_b, B_b, C_b = (flipped(tensor) for tensor in (x, dt, B, C))
    y_b, _ = ssd(u, dt_b, A, B_b, C_b, chunk=chunk, return_frame_states=True, backend=backend)
    every = None if backend == "mamba_ssm" else segment_len  # mamba_ssm returns the last state only
    y_f, states = ssd(x, *forward, None, every, h0, chunk, return_frame_states=True, backend=backend)
    if shift == "hydra":
        y_f = torch.cat([torch.zeros_like(y_f[:, :1]), y_f[:, :-1]], 1)
        y_b = torch.cat([torch.zeros_like(y_b[:, :1]), y_b[:, :-1]], 1)
    y = y_f + rearrange(y_b.flip(1), "(b t) s ... -> b (t s) ...", b=len(x))
    if shift == "strict":
        y = y - diagonal(*forward) - diagonal(*backward)
    y = y if D is None else y + D[..., None] * x
    return y.to(x.dtype), states


# ---- arguments -------------------------------------------------------------------------------------------------------


def _check_direction(
    suffix: str, x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None, h0: Tensor | None
) -> None:
    if x.ndim != 4 or 0 in x.shape or not x.is_floating_point():
        raise ValueError(
            f"x has shape {tuple(x.shape)} and dtype {x.dtype}: it must be a non-empty floating-point tensor "
            "(B, L, H, P)."
        )
    _refuse_forward_mode()
    batch, length, heads, channels = x.shape
    groups, states = B.shape[-2:] if B.ndim == 4 else (1, 1)
    if not groups or heads % groups:
        raise ValueError(
            f"B{suffix} has {groups} groups for the {heads} heads of x: the number of groups must divide the number of "
            "heads."
        )
    expected = {
        f"dt{suffix}": (dt, (batch, length, heads)),
        f"A{suffix}": (A, (heads,)),
        f"B{suffix}": (B, (batch, length, groups, states)),
        f"C{suffix}": (C, (batch, length, groups, states)),
        "h0": (h0, (batch, heads, channels, states)),
        "D": (D, (heads,) if D is not None and D.ndim == 1 else (batch, length, heads)),
    }
    for name, (tensor, shape) in expected.items():
        if tensor is not None and tuple(tensor.shape) != shape:
            raise ValueError(
                f"{name} has shape {tuple(tensor.shape)}: x {tuple(x.shape)} and B{suffix} {tuple(B.shape)} require "
                f"{shape}."
            )
    for name, tensor in ((f"B{suffix}", B), (f"C{suffix}", C)):
        if tensor.dtype != x.dtype:
            raise ValueError(f"{name} is {tensor.dtype} and x is {x.dtype}: both must have the same dtype.")


def _refuse_forward_mode() -> None:
    """Raises in forward-mode AD, where torch silently takes the derivative of a custom operator as 0."""
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
    """Returns the lengths (B, T), or ``None`` for equal lengths, and the longest length."""
    batch, length = x.shape[:2]
    if isinstance(segment_len, Tensor):
        if segment_len.ndim != 2 or len(segment_len) != batch or segment_len.is_floating_point():
            raise ValueError(
                f"segment_len is a {segment_len.dtype} tensor of shape {tuple(segment_len.shape)}: lengths must be "
                f"integers of shape (B, T) with B = {batch}."
            )
        if not segment_len.shape[1]:
            raise ValueError(f"segment_len has shape ({batch}, 0): at least one frame is required.")
        return segment_len, int(segment_len.max()) if max_segment is None else int(max_segment)
    segment_len = length if segment_len is None else segment_len
    if isinstance(segment_len, bool) or not hasattr(segment_len, "__index__"):
        raise ValueError(f"segment_len={segment_len!r} must be an integer or a tensor of lengths (B, T).")
    segment_len = int(segment_len)
    if segment_len < 1 or length % segment_len:
        raise ValueError(
            f"segment_len={segment_len} must be at least 1 and divide L={length}, the number of tokens of x: pass "
            "lengths (B, T) if frames differ in length."
        )
    return None, segment_len


def _check_g0(g0: Tensor | None, x: Tensor, frames: int, states: int) -> Tensor | None:
    if g0 is None:
        return None
    batch, _, heads, channels = x.shape
    if frames == 1 and g0.ndim == 4:
        g0 = g0[:, None]
    if tuple(g0.shape) != (batch, frames, heads, channels, states):
        raise ValueError(
            f"g0 has shape {tuple(g0.shape)}: it must be (B, T, H, P, N) = {(batch, frames, heads, channels, states)}, "
            "one state per frame."
        )
    return g0


def _backend(backend: Backend | None, x: Tensor, chunk: int | None) -> Backend:
    if chunk is not None and (isinstance(chunk, bool) or not hasattr(chunk, "__index__") or chunk < 1):
        raise ValueError(f"chunk={chunk!r} must be an integer ≥ 1, or None for the backend's default.")
    if backend is None:
        return "triton" if x.is_cuda and x.dtype != torch.float64 and find_spec("triton") else "torch"
    if backend not in ("reference", "torch", "triton", "mamba_ssm"):
        raise ValueError(f"backend={backend!r} is unknown: choose 'reference', 'torch', 'triton' or 'mamba_ssm'.")
    interpreted = os.environ.get("TRITON_INTERPRET") == "1"
    if backend in ("triton", "mamba_ssm") and x.device.type == "cpu" and not interpreted:
        raise ValueError(f"backend={backend!r} requires CUDA, but x is on the CPU: use backend='torch', or x.cuda().")
    if backend in ("triton", "mamba_ssm") and find_spec(backend) is None:
        command = install_command("cuda", backend)
        raise ValueError(f"backend={backend!r} is not installed: run `{command}`, or use 'torch'.")
    if backend == "triton" and x.dtype == torch.float64:
        raise ValueError("backend='triton' does not support float64: use backend='torch', or x in float32.")
    return backend


def _run(inputs: ScanInputs, backend: Backend) -> tuple[Tensor, Tensor]:
    """Runs the dense reference in float64, or the registered operator. ``inputs`` has A (H,) in the fields of a."""
    x = inputs.x
    if backend == "reference":
        wide = (v.double() if isinstance(v, Tensor) and v.is_floating_point() else v for v in inputs)
        inputs = ScanInputs._make(wide)
    a_b = None if inputs.dt_b is None or inputs.a_b is None else inputs.dt_b * inputs.a_b
    D = None if inputs.D is None else inputs.D.expand(x.shape[:3])
    inputs = inputs._replace(a_f=inputs.dt_f * inputs.a_f, a_b=a_b, D=D)
    if backend != "reference":
        return torch.ops.blueberry_video.scan(*inputs, backend)
    if not x.is_cuda:
        _check_values(inputs)
    y, states = reference.scan(inputs)
    return y.to(x.dtype), states.to(torch.promote_types(x.dtype, torch.float32))


def _mamba_ssm(
    x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None, h0: Tensor | None
) -> tuple[Tensor, Tensor]:
    from mamba_ssm.ops.triton.ssd_combined import mamba_chunk_scan_combined

    y, state = mamba_chunk_scan_combined(x, dt, A, B, C, 256, initial_states=h0, return_final_states=True)
    return y if D is None else y + (D[..., None] * x).to(y.dtype), state[:, None]


# ---- registration ----------------------------------------------------------------------------------------------------

_SCHEMA = (  # the fields of ScanInputs, and the backend
    "Tensor x, Tensor dt_f, Tensor a_f, Tensor B_f, Tensor C_f, Tensor? dt_b, Tensor? a_b, Tensor? B_b, Tensor? C_b, "
    "Tensor? D, Tensor? lengths, SymInt segment_len, Tensor? h0, Tensor? g0, SymInt chunk, str backend"
)


@torch.library.custom_op("blueberry_video::scan", mutates_args=(), schema=f"({_SCHEMA}) -> (Tensor, Tensor)")
def _scan(*arguments: Any) -> tuple[Tensor, Tensor]:
    inputs, backend = ScanInputs(*arguments[:-1]), arguments[-1]
    if not inputs.x.is_cuda:  # on a GPU this would synchronize
        _check_values(inputs)
    with torch.autocast(inputs.x.device.type, enabled=False):  # the backends choose the precision of each product
        y, states = _module(backend).forward(inputs)
    return y.contiguous(), states.contiguous()


@_scan.register_fake
def _(*arguments: Any) -> tuple[Tensor, Tensor]:
    inputs = ScanInputs(*arguments[:-1])
    x = inputs.x
    states = (len(x), inputs.num_frames, *x.shape[2:], inputs.B_f.shape[-1])
    return x.new_empty(x.shape), x.new_empty(states, dtype=inputs.state_dtype)


@torch.library.custom_op(
    "blueberry_video::scan_backward",
    mutates_args=(),
    schema=f"(Tensor dy, Tensor dstates, Tensor states, {_SCHEMA}) -> Tensor[]",
)
def _scan_backward(dy: Tensor, dstates: Tensor, states: Tensor, *arguments: Any) -> list[Tensor]:
    """Gradients of the tensor inputs but lengths, without those that are ``None``."""
    inputs, backend = ScanInputs(*arguments[:-1]), arguments[-1]
    with torch.autocast(inputs.x.device.type, enabled=False):
        gradients = _module(backend).backward(dy, dstates, states, inputs)
    return [value.contiguous() for value in gradients._replace(lengths=None) if isinstance(value, Tensor)]


@_scan_backward.register_fake
def _(dy: Tensor, dstates: Tensor, states: Tensor, *arguments: Any) -> list[Tensor]:
    inputs = ScanInputs(*arguments[:-1])._replace(lengths=None)
    return [value.new_empty(value.shape) for value in inputs if isinstance(value, Tensor)]


def _setup_context(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    ctx.save_for_backward(*(value for value in inputs if isinstance(value, Tensor)), output[1])
    ctx.layout = [None if isinstance(value, Tensor) else (value,) for value in inputs]


def _differentiate(ctx, dy, dstates):  # type: ignore[no-untyped-def]
    *saved, states = ctx.saved_tensors
    tensors = iter(saved)
    inputs = [next(tensors) if constant is None else constant[0] for constant in ctx.layout]
    gradients = iter(torch.ops.blueberry_video.scan_backward(dy, dstates, states, *inputs))
    lengths = ScanInputs._fields.index("lengths")  # the only tensor input without a gradient
    return tuple(
        next(gradients) if isinstance(value, Tensor) and index != lengths else None
        for index, value in enumerate(inputs)
    )


torch.library.register_autograd("blueberry_video::scan", _differentiate, setup_context=_setup_context)


def _module(backend: str):  # type: ignore[no-untyped-def]
    if backend == "torch":
        return chunked
    from blueberry_video.ops import kernels  # imports triton, which is optional

    return kernels


def _check_values(inputs: ScanInputs) -> None:
    dts = {"dt": inputs.dt_f} if inputs.dt_b is None else {"dt_f": inputs.dt_f, "dt_b": inputs.dt_b}
    for name, dt in dts.items():
        if not ((dt >= 0) & (dt < torch.inf)).all():
            value = "NaN" if dt.isnan().any() else "infinite values"
            value = f"negative values, minimum {dt.min():.3g}" if (dt < 0).any() else value
            raise ValueError(
                f"{name} has {value}: it must be finite and ≥ 0, such as the output of softplus. For NaN, look for the "
                "first layer that returns it."
            )
    lengths, longest, length = inputs.lengths, inputs.segment_len, inputs.x.shape[1]
    if lengths is None:
        return
    if (lengths < 0).any() or lengths.max() > longest or (lengths.sum(1) != length).any():
        raise ValueError(
            f"segment_len has lengths from {lengths.min()} to {lengths.max()} with sums {lengths.sum(1).tolist()}: the "
            f"lengths must be from 0 to {longest}, and those of each sample must sum to L={length}."
        )
