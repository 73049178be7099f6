"""The scans in chunks, in PyTorch: batched matrix products and no loop over tokens; what runs where Triton does not.

A chunk is a tile of Q x Q pairs of tokens, in which the pairs below the diagonal belong to the forward leg and those
above it to the backward leg: one matrix, one product. From chunk to chunk a state is carried: the forward leg's over
all frames, the backward leg's from right to left within a frame. The gradients are written out: recomputing the tile
is cheaper than what autograd would keep of it.

Shapes: B batch, T frames, K chunks of a frame, c = B T K, Q tokens of a chunk, G groups of h heads, H = G h, P channels
of a head, N channels of the state, which is kept as (N, P) in here: one product serves all heads of a group.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

CHUNK = 64  # on the CPU the best of 32 … 256 (benchmarks/video_scan.py): longer tiles compute more exponentials
PAIRS = (2**19, 2**28)  # heads times pairs of tokens at a time, on the CPU (a core's cache) and on a GPU
LEAST_DT = 1e-20  # as good as 0, and has a logarithm
GREAT_SUM = -32.0  # sums of log-decays below it have digits behind the point that float32 does not hold
LEAST_LOG_DECAY = -60.0  # exp(-60) is as good as 0, and sums that stay small keep their digits


class Leg(NamedTuple):
    """One direction, folded into chunks. ``sums`` are of a from a chunk's start (its end, in the backward leg)."""

    dt: Tensor  # (c, H, Q)
    sums: Tensor  # (c, H, Q) float64, as the next: inclusive
    total: Tensor  # (c, H): of the whole chunk
    B: Tensor  # (c, G, Q, N)
    C: Tensor  # (c, G, Q, N)

    @property
    def write(self) -> Tensor:
        """(c, Q, H, 1): how much of a token is in the state that leaves the chunk."""
        return per_token((self.total[..., None] - self.sums).exp().to(self.dt.dtype) * self.dt)

    @property
    def read(self) -> Tensor:
        """(c, Q, H, 1): how much of the state that enters the chunk reaches a token."""
        return per_token(self.sums.exp().to(self.dt.dtype))

    @property
    def through(self) -> Tensor:
        """(c, H): how much of the state that enters the chunk leaves it."""
        return self.total.exp().to(self.dt.dtype)


class Folding:
    """(B, T S, …) <-> (B T K, Q, …), where a frame that is no whole number of chunks ends in zeros."""

    def __init__(self, x: Tensor, segment_len: int, chunk: int | None):
        self.batch, self.segment_len = len(x), segment_len
        self.frames = x.shape[1] // segment_len
        self.chunks = math.ceil(segment_len / (chunk or CHUNK))
        self.length = math.ceil(segment_len / self.chunks)
        self.dtype = torch.promote_types(x.dtype, torch.float32)

    def fold(self, tensor: Tensor) -> Tensor:
        """(B, T S, …) -> (c, Q, …) in fp32 (fp64, if x has it)."""
        missing = self.chunks * self.length - self.segment_len
        frames = tensor.to(self.dtype).unflatten(1, (self.frames, self.segment_len))
        if missing:
            frames = F.pad(frames, (0, 0) * (tensor.ndim - 2) + (0, missing))
        return frames.reshape(-1, self.length, *tensor.shape[2:])

    def unfold(self, folded: Tensor) -> Tensor:
        """(c, Q, …) -> (B, T S, …)."""
        frames = folded.reshape(self.batch, self.frames, self.chunks * self.length, *folded.shape[2:])
        return frames[:, :, : self.segment_len].flatten(1, 2)

    def leg(self, tokens: "LegTokens", backward: bool = False) -> Leg:
        dt, a, B, C = (self.fold(tensor).transpose(1, 2) for tensor in tokens)
        a = a.clamp(min=LEAST_LOG_DECAY).double()
        sums = a.flip(-1).cumsum(-1).flip(-1) if backward else a.cumsum(-1)
        return Leg(dt.clamp(min=LEAST_DT), sums, a.sum(-1), B, C)


class Tile(NamedTuple):
    """All pairs of tokens of each chunk, (j, i): j the one that is read, i the one that reads it."""

    pairs: Tensor  # (c, G, 1, Q, Q): B_j · C_i, of the leg that the pair belongs to
    weight: Tensor  # (c, G, h, Q, Q): dt_j and all decay between, of the same leg

    def matrix(self, D: Tensor | None) -> Tensor:
        """(c, H, Q, Q), with D (c, H, Q) on the diagonal: transposed and times x, what the chunk gives itself."""
        matrix = (self.pairs * self.weight).flatten(1, 2)
        if D is not None:
            matrix.diagonal(dim1=-2, dim2=-1).add_(D)
        return matrix


def tile(f: Leg, b: Leg | None) -> Tile:
    length, groups = f.dt.shape[-1], f.B.shape[1]
    earlier = torch.ones(length, length, dtype=torch.bool, device=f.dt.device).triu(0 if b is None else 1)  # j < i
    pairs, exponent = f.B @ f.C.mT, exponents(f)
    if b is None:
        weight = exponent.masked_fill_(~earlier, -torch.inf).exp_()
    else:
        pairs = torch.where(earlier, pairs, b.B @ b.C.mT)
        weight = torch.where(earlier, exponent, exponents(b)).exp_()
        weight.diagonal(dim1=-2, dim2=-1).zero_()
    return Tile(pairs[:, :, None], weight.unflatten(1, (groups, -1)))


def exponents(leg: Leg) -> Tensor:
    """(c, H, Q, Q): the logarithm of dt_j and the decay from j to i."""
    coarse, log_dt = leg.sums.to(leg.dt.dtype), leg.dt.log()
    if leg.sums.numel() == 0 or leg.sums.min() > GREAT_SUM:
        return coarse[..., None, :] - (coarse - log_dt)[..., :, None]
    fine = (leg.sums - coarse).to(leg.dt.dtype)  # what differences of great sums would lose
    difference = coarse[..., None, :] - coarse[..., :, None]
    return difference.add_(fine[..., None, :]).sub_((fine - log_dt)[..., :, None])


def carry(added: Tensor, through: Tensor, start: Tensor | None, reverse: bool = False) -> tuple[Tensor, Tensor]:
    """The state before each chunk and behind the last, of s -> through s + added.

    Args:
        added: (b, chunks, G, N, h, P).
        through: (b, chunks, H).
        start: (b, G, N, h, P), zero if ``None``.
        reverse: from the last chunk to the first.
    """
    decay = rearrange(through, "b c (g h) -> b c g 1 h 1", g=added.shape[2])
    before, last = torch.empty_like(added), torch.empty_like(added[:, 0])
    order = list(range(added.shape[1]))[:: -1 if reverse else 1]
    before[:, order[0]] = 0 if start is None else start
    for index, following in zip(order, [before[:, index] for index in order[1:]] + [last], strict=True):
        torch.addcmul(added[:, index], decay[:, index], before[:, index], out=following)
    return before, last


class States:
    """What enters every chunk: the forward leg's state from all frames before, the backward leg's from its frame."""

    def __init__(
        self,
        fold: Folding,
        x: Tensor,
        f: Leg,
        b: Leg | None,
        h0: Tensor | None,
        g0: Tensor | None,
        behind: Tensor | None = None,
    ):
        """``behind`` are the forward states behind each frame, where they are known already."""
        self.fold, groups = fold, f.B.shape[1]
        start = None if h0 is None else inward(h0, groups).to(x.dtype)
        self.written_f = f.write * x  # (c, Q, H, P): what of each token is in the state that leaves its chunk
        self.written_b = None if b is None else b.write * x
        if behind is not None and fold.chunks == 1:
            known = inward(behind, groups)
            first = torch.zeros_like(known[:, 0]) if start is None else start
            self.forward, self.last = torch.cat([first[:, None], known[:, :-1]], 1), known[:, -1]
        else:
            self.forward, self.last = carry(
                self.by_sample(outer(self.written_f, f.B)), self.by_sample(f.through), start
            )
        self.backward: Tensor | None = None
        if b is not None and self.written_b is not None and (fold.chunks > 1 or g0 is not None):
            start = None if g0 is None else inward(g0.flatten(0, 1), groups).to(x.dtype)
            self.backward, _ = carry(
                self.by_frame(outer(self.written_b, b.B)), self.by_frame(b.through), start, reverse=True
            )

    def by_sample(self, states: Tensor) -> Tensor:
        return states.unflatten(0, (self.fold.batch, -1))

    def by_frame(self, states: Tensor) -> Tensor:
        return states.unflatten(0, (-1, self.fold.chunks))

    def behind_frames(self) -> Tensor:
        """(B, T, H, P, N)."""
        before = self.forward[:, :: self.fold.chunks]
        return outward(torch.cat([before[:, 1:], self.last[:, None]], 1))


def inward(states: Tensor, groups: int) -> Tensor:
    return rearrange(states, "... (g h) p n -> ... g n h p", g=groups)


def outward(states: Tensor) -> Tensor:
    return rearrange(states, "... g n h p -> ... (g h) p n")


def by_group(u: Tensor, groups: int) -> Tensor:
    """(c, Q, H, P) -> (c, G, Q, h P), for one product over all heads of a group."""
    return u.reshape(*u.shape[:2], groups, -1).transpose(1, 2)


def outer(u: Tensor, v: Tensor) -> Tensor:
    """Sum over the tokens of u (c, Q, H, P) ⊗ v (c, G, Q, N) -> (c, G, N, h, P)."""
    return (v.mT @ by_group(u, v.shape[1])).unflatten(-1, (-1, u.shape[-1]))


def inner(v: Tensor, states: Tensor) -> Tensor:
    """v (c, G, Q, N) times states (c, G, N, h, P) -> (c, Q, H, P)."""
    product = (v @ states.flatten(-2)).transpose(1, 2)  # (c, Q, G, h P)
    return product.reshape(*product.shape[:2], -1, states.shape[-1])


def per_token(weight: Tensor) -> Tensor:
    """(c, H, Q) -> (c, Q, H, 1), laid out so: what it is multiplied with keeps its own layout."""
    return weight.transpose(1, 2).contiguous()[..., None]


def forward(
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
    chunk: int | None = None,
) -> tuple[Tensor, Tensor]:
    """y (B, L, H, P) and the forward states (B, T, H, P, N) behind each frame.

    Without a backward leg the diagonal is the forward leg's. D is (B, L, H); lengths (B, T), or ``None`` if all
    frames have ``segment_len`` tokens; else that is the most a frame can have.
    """
    padding = Padding(lengths, segment_len)
    tokens = Tokens.of(x, dt_f, a_f, B_f, C_f, dt_b, a_b, B_b, C_b, D).map(padding.pad)
    y = torch.empty_like(tokens.x, memory_format=torch.contiguous_format)
    frames = y.shape[1] // segment_len
    dtype = torch.promote_types(x.dtype, torch.float32)
    states = x.new_empty(len(x), frames, *x.shape[2:], B_f.shape[-1], dtype=dtype)
    for part in parts(y, segment_len, chunk):
        y[part.tokens], states[part.frames] = forward_part(
            tokens.map(part.of), segment_len, part.entering(states, h0), None if g0 is None else g0[part.frames], chunk
        )
    return padding.unpad(y), states


def backward(
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
    chunk: int | None = None,
) -> tuple[Tensor | None, ...]:
    """Gradients of x, dt_f, a_f, B_f, C_f, dt_b, a_b, B_b, C_b, D, h0, g0; ``None`` for what is ``None``.

    ``states`` and ``dstates`` are the second output of :func:`forward` and its gradient.
    """
    padding = Padding(lengths, segment_len)
    dy, tokens = padding.pad(dy), Tokens.of(x, dt_f, a_f, B_f, C_f, dt_b, a_b, B_b, C_b, D).map(padding.pad)
    gradients = tokens.map(torch.empty_like)
    dg0, dh0 = None if g0 is None else torch.empty_like(g0), torch.empty_like(states[:, 0])
    for part in reversed(parts(dy, segment_len, chunk)):
        samples, frames = part.frames
        d_behind = dstates[part.frames].to(states.dtype, copy=True)
        if frames.stop < states.shape[1]:
            d_behind[:, -1] += dh0[samples]
        found, dh0[samples], dg = backward_part(
            dy[part.tokens],
            d_behind,
            states[part.frames],
            tokens.map(part.of),
            segment_len,
            part.entering(states, h0),
            None if g0 is None else g0[part.frames],
            chunk,
        )
        for gradient, value in zip(gradients.flat(), found.flat(), strict=True):
            if gradient is not None and value is not None:
                gradient[part.tokens] = value
        if dg0 is not None and dg is not None:
            dg0[part.frames] = dg
    return *gradients.map(padding.unpad).flat(), None if h0 is None else dh0.to(h0.dtype), dg0


class LegTokens(NamedTuple):
    dt: Tensor  # (B, L, H)
    a: Tensor  # (B, L, H)
    B: Tensor  # (B, L, G, N)
    C: Tensor  # (B, L, G, N)


class Tokens(NamedTuple):
    """All inputs that are given token by token, or their gradients."""

    x: Tensor
    forward: LegTokens
    backward: LegTokens | None
    D: Tensor | None

    @classmethod
    def of(cls, x: Tensor, *rest: Tensor | None) -> "Tokens":
        """From the order of the arguments of :func:`forward`."""
        forward, backward = LegTokens(*rest[:4]), LegTokens(*rest[4:8])  # type: ignore[arg-type]
        return cls(x, forward, backward if rest[4] is not None else None, rest[8])

    def flat(self) -> list[Tensor | None]:
        """The inverse of :meth:`of`."""
        return [self.x, *self.forward, *(self.backward or [None] * 4), self.D]

    def map(self, function: Callable[[Tensor], Tensor]) -> "Tokens":
        x, *rest = (None if tensor is None else function(tensor) for tensor in self.flat())
        assert x is not None
        return Tokens.of(x, *rest)


class Padding:
    """Frames of different lengths, packed, <-> frames of one length, that end in tokens which do nothing: dt = 0."""

    def __init__(self, lengths: Tensor | None, longest: int):
        self.lengths = lengths
        if lengths is not None:
            self.valid = (torch.arange(longest, device=lengths.device) < lengths[..., None]).flatten(1)  # (B, T S)

    def pad(self, packed: Tensor) -> Tensor:
        """(B, L, …) -> (B, T S, …)."""
        if self.lengths is None:
            return packed
        padded = packed.new_zeros(*self.valid.shape, *packed.shape[2:])
        padded[self.valid] = packed.flatten(0, 1)  # packed tokens are in the order of the valid places
        return padded

    def unpad(self, padded: Tensor) -> Tensor:
        """(B, T S, …) -> (B, L, …)."""
        if self.lengths is None:
            return padded
        return padded[self.valid].unflatten(0, (len(padded), -1))


class Part(NamedTuple):
    """Some samples and some of their frames."""

    tokens: tuple[slice, slice]
    frames: tuple[slice, slice]

    def of(self, tensor: Tensor) -> Tensor:
        """(B, T S, …) -> the part's tokens."""
        return tensor[self.tokens]

    def entering(self, states: Tensor, h0: Tensor | None) -> Tensor | None:
        """The forward state before the first of the frames, when those behind all frames before are known."""
        samples, frames = self.frames
        if frames.start:
            return states[samples, frames.start - 1]
        return None if h0 is None else h0[samples]


def parts(x: Tensor, segment_len: int, chunk: int | None) -> list[Part]:
    """Cuts (B, T S, H, P) so that the pairs of tokens of a part fit a core's cache: in there it is twice as fast."""
    batch, frames, heads = len(x), x.shape[1] // segment_len, x.shape[2]
    fold = Folding(x, segment_len, chunk)
    fit = PAIRS[x.device.type == "cuda"] // (heads * fold.chunks * fold.length**2)  # so many frames of one sample
    at_once = min(max(fit, 1), frames)  # rather all frames of one sample: they are side by side in memory
    samples = min(max(fit // at_once, 1), batch)
    found = []
    for i in range(0, batch, samples):
        for t in range(0, frames, at_once):
            sample, end = slice(i, i + samples), min(t + at_once, frames)
            found.append(Part((sample, slice(t * segment_len, end * segment_len)), (sample, slice(t, end))))
    return found


def forward_part(
    tokens: Tokens, segment_len: int, h0: Tensor | None, g0: Tensor | None, chunk: int | None
) -> tuple[Tensor, Tensor]:
    """:func:`forward` of frames of one length, all at once."""
    fold, D = Folding(tokens.x, segment_len, chunk), tokens.D
    u, f = fold.fold(tokens.x), fold.leg(tokens.forward)
    b = None if tokens.backward is None else fold.leg(tokens.backward, backward=True)
    states = States(fold, u, f, b, h0, g0)
    matrix = tile(f, b).matrix(None if D is None else fold.fold(D).transpose(1, 2))
    y = inner(f.C, states.forward.flatten(0, 1)).mul_(f.read)  # (c, Q, H, P)
    if b is not None and states.backward is not None:
        y.addcmul_(b.read, inner(b.C, states.backward.flatten(0, 1)))
    y += (matrix.mT @ u.transpose(1, 2)).transpose(1, 2)
    return fold.unfold(y), states.behind_frames()


def backward_part(
    dy: Tensor,
    dstates: Tensor,
    states: Tensor,
    tokens: Tokens,
    segment_len: int,
    h0: Tensor | None,
    g0: Tensor | None,
    chunk: int | None,
) -> tuple[Tokens, Tensor, Tensor | None]:
    """:func:`backward` of frames of one length, all at once: of the tokens, of h0 even where it is zero, and of g0."""
    fold, D = Folding(tokens.x, segment_len, chunk), tokens.D
    u, v, f = fold.fold(tokens.x), fold.fold(dy), fold.leg(tokens.forward)
    b = None if tokens.backward is None else fold.leg(tokens.backward, backward=True)
    groups = f.B.shape[1]
    entered = States(fold, u, f, b, h0, g0, states)

    t = tile(f, b)
    u_heads, v_heads = (tensor.transpose(1, 2).contiguous() for tensor in (u, v))  # (c, H, Q, P)
    matrix = t.matrix(None if D is None else fold.fold(D).transpose(1, 2))
    dx = (matrix @ v_heads).transpose(1, 2).contiguous()  # (c, Q, H, P)
    d_matrix = u_heads @ v_heads.mT
    dD = None if D is None else fold.unfold(d_matrix.diagonal(dim1=-2, dim2=-1).transpose(1, 2).clone())
    d_matrix = d_matrix.unflatten(1, (groups, -1)).mul_(t.weight)  # (c, G, h, Q, Q)
    d_pairs = d_matrix.sum(2)
    d_log = d_matrix.mul_(t.pairs).flatten(1, 2)  # of the logarithm of dt_j and of the decay from j to i

    # Gradients of the states that leave each chunk, from the last to the first; a caller's enter behind a frame.
    read = f.read * v
    added = entered.by_sample(outer(read, f.C))
    behind = inward(dstates, groups)  # (B, T, G, N, h, P)
    added[:, fold.chunks :: fold.chunks] += behind[:, :-1]
    d_forward, d_h0 = carry(added, entered.by_sample(f.through), behind[:, -1], reverse=True)
    through = Through(entered.forward.flatten(0, 1), read, entered.written_f, d_forward.flatten(0, 1))
    forward_leg = leg_gradients(f, dx, d_pairs, d_log, through, inclusive=b is None)
    backward_leg, d_g0 = forward_leg, None
    if b is not None:
        through_b = None
        if entered.backward is not None and entered.written_b is not None:
            read = b.read * v
            d_backward, d_g0 = carry(entered.by_frame(outer(read, b.C)), entered.by_frame(b.through), None)
            through_b = Through(entered.backward.flatten(0, 1), read, entered.written_b, d_backward.flatten(0, 1))
        backward_leg = leg_gradients(b, dx, d_pairs, d_log, through_b, backward=True)

    def unfolded(leg: LegTokens) -> LegTokens:
        return LegTokens(*(fold.unfold(gradient.transpose(1, 2)) for gradient in leg))

    found = Tokens(fold.unfold(dx), unfolded(forward_leg), None if b is None else unfolded(backward_leg), dD)
    return found, outward(d_h0), None if g0 is None or d_g0 is None else outward(d_g0).view_as(g0)


class Through(NamedTuple):
    """What a chunk has to do with the states around it."""

    entering: Tensor  # (c, G, N, h, P)
    read: Tensor  # (c, Q, H, P): dy, by how much of that state reaches the token
    written: Tensor  # (c, Q, H, P): x, by how much of it is in the state that leaves
    d_leaving: Tensor  # (c, G, N, h, P): gradient of the state that leaves


def leg_gradients(
    leg: Leg,
    dx: Tensor,
    d_pairs: Tensor,
    d_log: Tensor,
    through: Through | None,
    backward: bool = False,
    inclusive: bool = False,
) -> LegTokens:
    """Of one direction, each (c, H or G, Q, …); what the states give dx is added to it.

    The log-decay a_k lies between all j < k ≤ i. The gradients of these pairs are added up, never taken as
    differences of sums over the whole chunk, which would cancel.

    Args:
        d_pairs: (c, G, Q, Q), (j, i): gradient of B_j · C_i.
        d_log: (c, H, Q, Q), (j, i): gradient of the logarithm of what that is multiplied by.
        inclusive: whether the diagonal belongs to this leg.
    """
    ones = torch.ones_like(d_pairs[0, 0])
    before, since = (ones.tril(-1), ones.triu()) if backward else (ones.triu(1), ones.tril())
    # before[j, k]: j comes before k in the leg's direction; since[i, k]: i is k or comes behind it
    own = d_pairs * (before + torch.eye(len(ones), dtype=ones.dtype, device=ones.device) * inclusive)
    dB, dC = own @ leg.C, own.mT @ leg.B
    sums = d_log @ since  # (j, k): over all i that are k or behind it
    edge = sums.diagonal(0 if inclusive else -1 if backward else 1, dim1=-2, dim2=-1)  # k next to j: all pairs of j
    d_log_dt = F.pad(edge, (0, 0) if inclusive else (1, 0) if backward else (0, 1)).clone()
    da = sums.mul_(before).sum(-2)
    if through is not None:
        entering, read, written, d_leaving = through
        dC += by_group(read, dC.shape[1]) @ entering.flatten(-2).mT
        da += inner(leg.C, entering).mul_(read).sum(-1).transpose(1, 2) @ since
        at = inner(leg.B, d_leaving)
        dx.addcmul_(leg.write, at)
        dB += by_group(written, dB.shape[1]) @ d_leaving.flatten(-2).mT
        d_written = at.mul_(written).sum(-1).transpose(1, 2)  # (c, H, Q)
        d_log_dt = d_log_dt + d_written
        da += d_written @ before
        da += (leg.through * (entering * d_leaving).sum((2, 4)).flatten(1))[..., None]
    return LegTokens(d_log_dt / leg.dt, da, dB, dC)
