"""Chunked scans in PyTorch: batched matrix products without a loop over tokens. Backend where Triton is unavailable.

Within a chunk of Q tokens, the Q x Q pairs of tokens below the diagonal belong to the forward direction and those above
it to the backward direction: one matrix, one product. Between chunks, states are passed: over all frames in the forward
direction, from right to left within a frame in the backward direction. The gradients are written out, because
recomputing the matrix of a chunk is cheaper than what autograd would keep of it.

Shapes: B batch, T frames, K chunks of a frame, c = B T K, Q tokens of a chunk, G groups of h heads, H = G h, P channels
of a head, N state size. States are (N, P) here, so that one product serves all heads of a group.
"""

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from blueberry_video.ops.inputs import Direction, ScanInputs

CHUNK = 64  # the fastest of 32 … 256 on the CPU (benchmarks/video_scan.py): longer chunks compute more exponentials
PAIRS = (2**19, 2**28)  # heads times pairs of tokens processed at once, on the CPU (a core's cache) and on a GPU
LEAST_DT = 1e-20  # replaces 0, which has no logarithm
GREAT_SUM = -32.0  # below it, sums of log-decays have fractional digits that float32 does not hold
LEAST_LOG_DECAY = -60.0  # exp(-60) is negligible, and clamped sums keep their digits


class ChunkedDirection(NamedTuple):
    """Parameters of one scan direction, in chunks."""

    dt: Tensor  # (c, H, Q)
    sums: Tensor  # (c, H, Q) float64: inclusive sums of a from the chunk's start (its end in the backward direction)
    total: Tensor  # (c, H) float64: sum of a over the chunk
    B: Tensor  # (c, G, Q, N)
    C: Tensor  # (c, G, Q, N)

    @property
    def write(self) -> Tensor:
        """(c, Q, H, 1): weight of each token in the state that leaves the chunk."""
        return per_token((self.total[..., None] - self.sums).exp().to(self.dt.dtype) * self.dt)

    @property
    def read(self) -> Tensor:
        """(c, Q, H, 1): decay from the chunk's entry to each token."""
        return per_token(self.sums.exp().to(self.dt.dtype))

    @property
    def decay(self) -> Tensor:
        """(c, H): decay over the whole chunk."""
        return self.total.exp().to(self.dt.dtype)


class ChunkedScan:
    """Inputs of a scan in chunks, and the states that enter each chunk.

    Maps (B, T S, …) to (B T K, Q, …), where frames that are not a whole number of chunks are padded with zeros.
    """

    def __init__(self, inputs: ScanInputs, frame_states: Tensor | None = None):
        """``frame_states`` are the forward states at the end of each frame, if already known."""
        self.batch, self.frames, self.segment_len = len(inputs.x), inputs.num_frames, inputs.segment_len
        self.chunks, self.length = chunks_of(inputs)
        self.dtype = inputs.state_dtype
        self.groups = inputs.B_f.shape[2]
        self.x = self.fold(inputs.x)
        self.D = None if inputs.D is None else self.fold(inputs.D).transpose(1, 2)
        self.f, self.b = self.direction(inputs.forward), None
        self.written_f, self.written_b = self.f.write * self.x, None  # (c, Q, H, P): inputs of the state, decayed
        start = self.inward(inputs.h0)
        if frame_states is not None and self.chunks == 1:
            known = inward(frame_states, self.groups)
            first = torch.zeros_like(known[:, 0]) if start is None else start
            self.entering_f, self.last = torch.cat([first[:, None], known[:, :-1]], 1), known[:, -1]
        else:
            added = self.by_sample(outer(self.written_f, self.f.B))
            self.entering_f, self.last = pass_states(added, self.by_sample(self.f.decay), start)
        self.entering_b: Tensor | None = None
        if inputs.backward is not None:
            self.b = self.direction(inputs.backward, reverse=True)
            self.written_b = self.b.write * self.x
            if self.chunks > 1 or inputs.g0 is not None:
                added, decay = self.by_frame(outer(self.written_b, self.b.B)), self.by_frame(self.b.decay)
                start = self.inward(None if inputs.g0 is None else inputs.g0.flatten(0, 1))
                self.entering_b, _ = pass_states(added, decay, start, reverse=True)

    def fold(self, tensor: Tensor) -> Tensor:
        """(B, T S, …) -> (c, Q, …) in float32 (float64 if x is)."""
        missing = self.chunks * self.length - self.segment_len
        frames = tensor.to(self.dtype).unflatten(1, (self.frames, self.segment_len))
        if missing:
            frames = F.pad(frames, (0, 0) * (tensor.ndim - 2) + (0, missing))
        return frames.reshape(-1, self.length, *tensor.shape[2:])

    def unfold(self, folded: Tensor) -> Tensor:
        """(c, Q, …) -> (B, T S, …)."""
        frames = folded.reshape(self.batch, self.frames, self.chunks * self.length, *folded.shape[2:])
        return frames[:, :, : self.segment_len].flatten(1, 2)

    def direction(self, parameters: Direction, reverse: bool = False) -> ChunkedDirection:
        dt, a, B, C = (self.fold(tensor).transpose(1, 2) for tensor in parameters)
        a = a.clamp(min=LEAST_LOG_DECAY).double()
        sums = a.flip(-1).cumsum(-1).flip(-1) if reverse else a.cumsum(-1)
        return ChunkedDirection(dt.clamp(min=LEAST_DT), sums, a.sum(-1), B, C)

    def inward(self, states: Tensor | None) -> Tensor | None:
        return None if states is None else inward(states, self.groups).to(self.dtype)

    def by_sample(self, chunks: Tensor) -> Tensor:
        return chunks.unflatten(0, (self.batch, -1))

    def by_frame(self, chunks: Tensor) -> Tensor:
        return chunks.unflatten(0, (-1, self.chunks))

    def frame_states(self) -> Tensor:
        """Forward states (B, T, H, P, N) at the end of each frame."""
        before = self.entering_f[:, :: self.chunks]
        return outward(torch.cat([before[:, 1:], self.last[:, None]], 1))

    def pairs(self) -> tuple[Tensor, Tensor]:
        """Returns B_j · C_i (c, G, 1, Q, Q) of each pair (j, i), and its weight (c, G, h, Q, Q): dt_j and the decay.

        Both are of the direction that the pair belongs to: i reads the state that j is written into.
        """
        f, b = self.f, self.b
        earlier = torch.ones(self.length, self.length, dtype=torch.bool, device=f.dt.device)
        earlier = earlier.triu(0 if b is None else 1)  # j < i
        pairs, exponent = f.B @ f.C.mT, exponents(f)
        if b is None:
            weight = exponent.masked_fill_(~earlier, -torch.inf).exp_()
        else:
            pairs = torch.where(earlier, pairs, b.B @ b.C.mT)
            weight = torch.where(earlier, exponent, exponents(b)).exp_()
            weight.diagonal(dim1=-2, dim2=-1).zero_()
        return pairs[:, :, None], weight.unflatten(1, (self.groups, -1))

    def matrix(self, pairs: Tensor, weight: Tensor) -> Tensor:
        """Matrix (c, H, Q, Q) of each chunk, transposed, with D on the diagonal."""
        matrix = (pairs * weight).flatten(1, 2)
        if self.D is not None:
            matrix.diagonal(dim1=-2, dim2=-1).add_(self.D)
        return matrix


def chunks_of(inputs: ScanInputs) -> tuple[int, int]:
    """Returns the number of chunks of a frame and the tokens of a chunk."""
    chunks = math.ceil(inputs.segment_len / (inputs.chunk or CHUNK))
    return chunks, math.ceil(inputs.segment_len / chunks)


def exponents(direction: ChunkedDirection) -> Tensor:
    """(c, H, Q, Q): logarithm of dt_j times the decay from j to i."""
    sums, dt = direction.sums, direction.dt
    coarse, log_dt = sums.to(dt.dtype), dt.log()
    if sums.numel() == 0 or sums.min() > GREAT_SUM:
        return coarse[..., None, :] - (coarse - log_dt)[..., :, None]
    fine = (sums - coarse).to(dt.dtype)  # the digits that differences of large sums would lose
    difference = coarse[..., None, :] - coarse[..., :, None]
    return difference.add_(fine[..., None, :]).sub_((fine - log_dt)[..., :, None])


def pass_states(added: Tensor, decay: Tensor, start: Tensor | None, reverse: bool = False) -> tuple[Tensor, Tensor]:
    """Returns the states before each chunk and after the last one, by the recurrence s -> decay s + added.

    Args:
        added: (b, chunks, G, N, h, P).
        decay: (b, chunks, H).
        start: (b, G, N, h, P); zero if ``None``.
        reverse: Runs from the last chunk to the first.
    """
    decay = rearrange(decay, "b c (g h) -> b c g 1 h 1", g=added.shape[2])
    before, last = torch.empty_like(added), torch.empty_like(added[:, 0])
    order = list(range(added.shape[1]))[:: -1 if reverse else 1]
    before[:, order[0]] = 0 if start is None else start
    for index, following in zip(order, [before[:, index] for index in order[1:]] + [last], strict=True):
        torch.addcmul(added[:, index], decay[:, index], before[:, index], out=following)
    return before, last


def inward(states: Tensor, groups: int) -> Tensor:
    return rearrange(states, "... (g h) p n -> ... g n h p", g=groups)


def outward(states: Tensor) -> Tensor:
    return rearrange(states, "... g n h p -> ... (g h) p n")


def by_group(u: Tensor, groups: int) -> Tensor:
    """(c, Q, H, P) -> (c, G, Q, h P), for one product over all heads of a group."""
    return u.reshape(*u.shape[:2], groups, -1).transpose(1, 2)


def outer(u: Tensor, v: Tensor) -> Tensor:
    """Sum over tokens of u (c, Q, H, P) ⊗ v (c, G, Q, N) -> (c, G, N, h, P)."""
    return (v.mT @ by_group(u, v.shape[1])).unflatten(-1, (-1, u.shape[-1]))


def inner(v: Tensor, states: Tensor) -> Tensor:
    """v (c, G, Q, N) times states (c, G, N, h, P) -> (c, Q, H, P)."""
    product = (v @ states.flatten(-2)).transpose(1, 2)  # (c, Q, G, h P)
    return product.reshape(*product.shape[:2], -1, states.shape[-1])


def per_token(weight: Tensor) -> Tensor:
    """(c, H, Q) -> (c, Q, H, 1), contiguous, so that products with it keep the layout of the other factor."""
    return weight.transpose(1, 2).contiguous()[..., None]


def forward(inputs: ScanInputs) -> tuple[Tensor, Tensor]:
    """Returns y (B, L, H, P) and the forward states (B, T, H, P, N) at the end of each frame.

    Without a backward direction, the scan is causal and the diagonal belongs to the forward direction.
    """
    padding = Padding(inputs.lengths, inputs.segment_len)
    inputs = padding.pad_inputs(inputs)
    x = inputs.x
    y = torch.empty_like(x, memory_format=torch.contiguous_format)
    size = len(x), inputs.num_frames, *x.shape[2:], inputs.B_f.shape[-1]
    states = x.new_empty(size, dtype=inputs.state_dtype)
    for part in parts(inputs):
        y[part.tokens], states[part.frames] = forward_part(part.inputs(inputs, states))
    return padding.unpad(y), states


def backward(dy: Tensor, dstates: Tensor, states: Tensor, inputs: ScanInputs) -> ScanInputs:
    """Returns the gradients of all inputs, ``None`` where an input is ``None``.

    ``states`` and ``dstates`` are the second output of :func:`forward` and its gradient.
    """
    padding = Padding(inputs.lengths, inputs.segment_len)
    dy, inputs = padding.pad(dy), padding.pad_inputs(inputs)
    h0, g0 = inputs.h0, inputs.g0
    gradients = inputs.map_tokens(torch.empty_like)
    dg0, dh0 = None if g0 is None else torch.empty_like(g0), torch.empty_like(states[:, 0])
    for part in reversed(parts(inputs)):
        samples, frames = part.frames
        d_frame_states = dstates[part.frames].to(states.dtype, copy=True)
        if frames.stop < states.shape[1]:
            d_frame_states[:, -1] += dh0[samples]
        found = backward_part(dy[part.tokens], d_frame_states, states[part.frames], part.inputs(inputs, states))
        for gradient, value in zip(gradients.per_token, found.per_token, strict=True):
            if gradient is not None and value is not None:
                gradient[part.tokens] = value
        if found.h0 is not None:
            dh0[samples] = found.h0
        if dg0 is not None and found.g0 is not None:
            dg0[part.frames] = found.g0
    return gradients.map_tokens(padding.unpad)._replace(h0=None if h0 is None else dh0.to(h0.dtype), g0=dg0)


class Padding:
    """Maps packed frames of different lengths to frames of equal length, padded with tokens without effect (dt = 0)."""

    def __init__(self, lengths: Tensor | None, longest: int):
        self.lengths = lengths
        if lengths is not None:
            self.valid = (torch.arange(longest, device=lengths.device) < lengths[..., None]).flatten(1)  # (B, T S)

    def pad(self, packed: Tensor) -> Tensor:
        """(B, L, …) -> (B, T S, …)."""
        if self.lengths is None:
            return packed
        padded = packed.new_zeros(*self.valid.shape, *packed.shape[2:])
        padded[self.valid] = packed.flatten(0, 1)  # packed tokens are in the order of the valid positions
        return padded

    def pad_inputs(self, inputs: ScanInputs) -> ScanInputs:
        return inputs.map_tokens(self.pad)._replace(lengths=None)

    def unpad(self, padded: Tensor) -> Tensor:
        """(B, T S, …) -> (B, L, …)."""
        if self.lengths is None:
            return padded
        return padded[self.valid].unflatten(0, (len(padded), -1))


class Part(NamedTuple):
    """Slices of samples and of their frames, processed at once."""

    tokens: tuple[slice, slice]
    frames: tuple[slice, slice]

    def inputs(self, inputs: ScanInputs, states: Tensor) -> ScanInputs:
        """Inputs of this part; ``states`` are the forward states, known for all earlier frames."""
        samples, frames = self.frames
        if frames.start:
            h0: Tensor | None = states[samples, frames.start - 1]
        else:
            h0 = None if inputs.h0 is None else inputs.h0[samples]
        g0 = None if inputs.g0 is None else inputs.g0[self.frames]
        return inputs.map_tokens(lambda tensor: tensor[self.tokens])._replace(h0=h0, g0=g0)


def parts(inputs: ScanInputs) -> list[Part]:
    """Splits the inputs into parts. On the CPU the pairs of tokens of a part fit a core's cache: twice as fast."""
    x, segment_len, frames = inputs.x, inputs.segment_len, inputs.num_frames
    batch, heads, (chunks, length) = len(x), x.shape[2], chunks_of(inputs)
    fit = PAIRS[x.device.type == "cuda"] // (heads * chunks * length**2)  # frames that fit
    at_once = min(max(fit, 1), frames)  # frames of one sample first: they are adjacent in memory
    samples = min(max(fit // at_once, 1), batch)
    found = []
    for i in range(0, batch, samples):
        for t in range(0, frames, at_once):
            sample, end = slice(i, i + samples), min(t + at_once, frames)
            found.append(Part((sample, slice(t * segment_len, end * segment_len)), (sample, slice(t, end))))
    return found


def forward_part(inputs: ScanInputs) -> tuple[Tensor, Tensor]:
    """:func:`forward` of frames of equal length, all at once."""
    scan = ChunkedScan(inputs)
    matrix = scan.matrix(*scan.pairs())
    y = inner(scan.f.C, scan.entering_f.flatten(0, 1)).mul_(scan.f.read)  # (c, Q, H, P)
    if scan.b is not None and scan.entering_b is not None:
        y.addcmul_(scan.b.read, inner(scan.b.C, scan.entering_b.flatten(0, 1)))
    y += (matrix.mT @ scan.x.transpose(1, 2)).transpose(1, 2)
    return scan.unfold(y), scan.frame_states()


def backward_part(dy: Tensor, dstates: Tensor, states: Tensor, inputs: ScanInputs) -> ScanInputs:
    """:func:`backward` of frames of equal length, all at once; returns dh0 even if h0 is ``None``."""
    scan = ChunkedScan(inputs, states)
    f, b, v = scan.f, scan.b, scan.fold(dy)
    pairs, weight = scan.pairs()
    x_heads, v_heads = (tensor.transpose(1, 2).contiguous() for tensor in (scan.x, v))  # (c, H, Q, P)
    dx = (scan.matrix(pairs, weight) @ v_heads).transpose(1, 2).contiguous()  # (c, Q, H, P)
    d_matrix = x_heads @ v_heads.mT
    dD = None if scan.D is None else scan.unfold(d_matrix.diagonal(dim1=-2, dim2=-1).transpose(1, 2).clone())
    d_matrix = d_matrix.unflatten(1, (scan.groups, -1)).mul_(weight)  # (c, G, h, Q, Q)
    d_pairs = d_matrix.sum(2)
    d_log = d_matrix.mul_(pairs).flatten(1, 2)  # of the logarithm of dt_j and of the decay from j to i

    # Gradients of the states that leave each chunk, from the last to the first. dstates adds to those at frame ends.
    read = f.read * v
    added = scan.by_sample(outer(read, f.C))
    d_frame_states = inward(dstates, scan.groups)  # (B, T, G, N, h, P)
    added[:, scan.chunks :: scan.chunks] += d_frame_states[:, :-1]
    d_leaving, dh0 = pass_states(added, scan.by_sample(f.decay), d_frame_states[:, -1], reverse=True)
    passing = Passing(scan.entering_f.flatten(0, 1), read, scan.written_f, d_leaving.flatten(0, 1))
    gradients = [*direction_gradients(f, dx, d_pairs, d_log, passing, inclusive=b is None)]
    dg0: Tensor | None = None
    if b is not None:
        passing_b = None
        if scan.entering_b is not None and scan.written_b is not None:
            read = b.read * v
            d_leaving, dg0 = pass_states(scan.by_frame(outer(read, b.C)), scan.by_frame(b.decay), None)
            passing_b = Passing(scan.entering_b.flatten(0, 1), read, scan.written_b, d_leaving.flatten(0, 1))
        gradients += direction_gradients(b, dx, d_pairs, d_log, passing_b, reverse=True)

    unfolded = [scan.unfold(gradient.transpose(1, 2)) for gradient in gradients]
    tokens = [scan.unfold(dx), *unfolded, *([None] * 4 if b is None else []), dD]
    g0 = inputs.g0
    dg0 = None if g0 is None or dg0 is None else outward(dg0).view_as(g0)
    return ScanInputs._make([*tokens, None, inputs.segment_len, outward(dh0), dg0, inputs.chunk])


class Passing(NamedTuple):
    """States that a chunk reads and writes, for the gradients of one direction."""

    entering: Tensor  # (c, G, N, h, P): state that enters the chunk
    read: Tensor  # (c, Q, H, P): dy times the decay from the chunk's entry
    written: Tensor  # (c, Q, H, P): x times its weight in the state that leaves the chunk
    d_leaving: Tensor  # (c, G, N, h, P): gradient of the state that leaves the chunk


def direction_gradients(
    direction: ChunkedDirection,
    dx: Tensor,
    d_pairs: Tensor,
    d_log: Tensor,
    passing: Passing | None,
    reverse: bool = False,
    inclusive: bool = False,
) -> Direction:
    """Gradients of one direction, each (c, H or G, Q, …); adds the contribution of the states to ``dx`` in-place.

    The log-decay a_k is part of all pairs with j < k ≤ i. The gradients of these pairs are summed as such, because
    differences of cumulative sums over the chunk would cancel.

    Args:
        d_pairs: (c, G, Q, Q), (j, i): gradient of B_j · C_i.
        d_log: (c, H, Q, Q), (j, i): gradient of the logarithm of its weight.
        inclusive: The diagonal belongs to this direction.
    """
    ones = torch.ones_like(d_pairs[0, 0])
    before, since = (ones.tril(-1), ones.triu()) if reverse else (ones.triu(1), ones.tril())
    # before[j, k]: j precedes k in scan order; since[i, k]: i is k or follows it
    own = d_pairs * (before + torch.eye(len(ones), dtype=ones.dtype, device=ones.device) * inclusive)
    dB, dC = own @ direction.C, own.mT @ direction.B
    sums = d_log @ since  # (j, k): over all i that are k or follow it
    edge = sums.diagonal(0 if inclusive else -1 if reverse else 1, dim1=-2, dim2=-1)  # k next to j: all pairs of j
    d_log_dt = F.pad(edge, (0, 0) if inclusive else (1, 0) if reverse else (0, 1)).clone()
    da = sums.mul_(before).sum(-2)
    if passing is not None:
        entering, read, written, d_leaving = passing
        dC += by_group(read, dC.shape[1]) @ entering.flatten(-2).mT
        da += inner(direction.C, entering).mul_(read).sum(-1).transpose(1, 2) @ since
        d_inputs = inner(direction.B, d_leaving)
        dx.addcmul_(direction.write, d_inputs)
        dB += by_group(written, dB.shape[1]) @ d_leaving.flatten(-2).mT
        d_written = d_inputs.mul_(written).sum(-1).transpose(1, 2)  # (c, H, Q)
        d_log_dt = d_log_dt + d_written
        da += d_written @ before
        da += (direction.decay * (entering * d_leaving).sum((2, 4)).flatten(1))[..., None]
    return Direction(d_log_dt / direction.dt, da, dB, dC)
