"""The scans in Triton, for GPUs: the two functions of :mod:`blueberry_video.ops.chunked`, for all but float64.

The forward runs ``decay_sums``, which adds up the log-decays, ``walk``, which carries the state over the frames,
``products``, which multiplies what all heads of a group share, and ``outputs``. The backward recomputes all but the
states behind each frame: more walks carry the gradients of the states, ``pair_gradients`` gives those of the products,
``input_gradients`` those of x and D, ``shared_gradients`` those of B and C, and ``decay_gradients`` adds up what they
all leave for the log-decays and dt. Each number is written by one program, and partial sums are added in one order: two
runs agree to the bit.

Shapes: B batch, L tokens, T frames, c chunks of a sample, H heads in G groups, P channels of
a head, N of the state.
"""

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
import triton
from torch import Tensor

from blueberry_video.ops import kernels_backward, kernels_forward

CHUNK = 256  # a frame of no more tokens is one chunk: then no state is carried inside it
PRECISION = {torch.bfloat16: "bf16", torch.float16: "tf32"}  # float16: M may exceed its range; tf32 has all its digits
BLOCK = {"bf16": 64, "tf32": 32, "tf32x3": 32}  # rows and columns of a tile
HOPPER_BLOCK = 128  # of the forward in bf16: half the traffic of 64, and what the registers of sm_90 can hold
BLOCK_P = 32  # channels of a state in a program that walks
HEADS = 8  # at most, in a program that looks at single numbers of the tokens


class Leg(NamedTuple):
    """One direction."""

    B: Tensor  # (B, L, G, N), with the strides of C and of the other leg
    C: Tensor
    numbers: Tensor  # (3, B, H, L) float32, of each token: kernels_forward says which
    bases: Tensor  # (B, H, c, blocks + 1) float64: log-decays from the chunk's start to each block and to the end


class Entering(NamedTuple):
    """The states that enter the chunks, or the gradients of those that leave them."""

    states: Tensor | None  # (B, c, H, P, N); with ``shift`` those of the chunk before
    first: Tensor | None = None  # with ``shift``: (B, H, P, N), of the first chunk
    shift: int = 0


class PairGradients(NamedTuple):
    """What the kernel of that name writes; it says what it is."""

    pairs: Tensor  # (splits, B, c, G, Q, Q)
    columns: Tensor  # (blocks, B, H, L), like rows
    rows: Tensor
    own: Tensor  # (4, B, H, L)


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
    """As :func:`blueberry_video.ops.chunked.forward`; ``chunk`` is rounded up to a power of two from 16 to 256."""
    with torch.cuda.device_of(x):
        block = _block(x, HOPPER_BLOCK)
        scan = Scan(x, dt_f, a_f, B_f, C_f, dt_b, a_b, B_b, C_b, D, lengths, segment_len, h0, g0, chunk, block)
        states = scan.new_states(scan.batch, scan.frames)
        before = None if scan.per_frame == 1 else scan.new_states(scan.batch, scan.chunks)
        scan.walk(scan.x, 0, INITIAL=scan.h0, BEFORE=before, BEHIND=states)
        entering = Entering(states, scan.h0, 1) if before is None else Entering(before)
        return scan.outputs(entering, scan.entering_backward()), states


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
    """As :func:`blueberry_video.ops.chunked.backward`."""
    with torch.cuda.device_of(x):
        block = _block(x)
        scan = Scan(x, dt_f, a_f, B_f, C_f, dt_b, a_b, B_b, C_b, D, lengths, segment_len, h0, g0, chunk, block)
        dy, dstates, states = dy.contiguous(), dstates.float().contiguous(), states.contiguous()
        entering = [Entering(states, scan.h0, 1), scan.entering_backward()]
        if scan.per_frame > 1:
            first = torch.zeros_like(states[:, 0]) if scan.h0 is None else scan.h0
            before = scan.new_states(scan.batch, scan.chunks)
            of_frames = torch.cat([first[:, None], states[:, :-1]], 1)
            scan.walk(scan.x, 0, per_frame=True, INITIAL=of_frames, BEFORE=before)
            entering[0] = Entering(before)

        dh0, leaving = scan.new_states(scan.batch), [Entering(scan.new_states(scan.batch, scan.chunks)), Entering(None)]
        products = [scan.walk(dy, 0, entering[0], ADDED=dstates, BEFORE=leaving[0].states, LAST=dh0), None]
        dg0 = None
        if entering[1].states is not None:
            dg0, leaving[1] = scan.new_states(scan.batch, scan.frames), Entering(torch.empty_like(entering[1].states))
            products[1] = scan.walk(dy, 1, entering[1], per_frame=True, BEFORE=leaving[1].states, LAST=dg0)

        pairs = scan.products()
        of_pairs = scan.pair_gradients(dy, pairs)
        dx, dD, left = scan.input_gradients(dy, pairs, leaving)
        legs: list[Tensor | None] = []
        for leg, (dt, a) in enumerate(((dt_f, a_f), (dt_b, a_b))):
            if dt is None or a is None:
                legs += [None] * 4
                continue
            dB, _ = scan.shared_gradients(leg, scan.x, of_pairs, leaving[leg])
            dC, read = scan.shared_gradients(leg, dy, of_pairs, entering[leg], of_c=True)
            legs += [*scan.decay_gradients(leg, of_pairs, read, left[leg], products[leg], dt, a), dB, dC]
    return (
        dx,
        *legs,
        dD,
        None if h0 is None else dh0.to(h0.dtype),
        None if g0 is None or dg0 is None else dg0.to(g0.dtype),
    )


class Scan:
    """The inputs, the geometry and the sums of log-decays of one call, and a method for each kernel that needs them.

    ``arguments`` are those that several kernels have, by the names that they give them.
    """

    def __init__(
        self,
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
        chunk: int | None,
        block: int,
    ):
        self.batch, self.tokens, self.heads, self.channels = x.shape
        self.groups, self.state_channels = B_f.shape[2:]
        self.frames = self.tokens // segment_len if lengths is None else lengths.shape[1]
        self.chunk = _power_of_two(min(segment_len, chunk or CHUNK), 16, 256)
        self.per_frame = triton.cdiv(segment_len, self.chunk)
        self.chunks = self.frames * self.per_frame
        block = min(block, self.chunk)
        self.blocks = self.chunk // block

        starts = None
        if lengths is not None:  # clamped: lengths that do not add up to L must not lead out of the memory
            ends = lengths.to(torch.int64).clamp(min=0).cumsum(1).clamp(max=self.tokens)
            starts = F.pad(ends, (1, 0)).contiguous()
        self.ragged = lengths is not None
        self.x, self.D = _with_strides(x)[0], D
        self.h0, self.g0 = (None if state is None else state.float().contiguous() for state in (h0, g0))
        shared = _with_strides(*(tensor for tensor in (B_f, C_f, B_b, C_b) if tensor is not None))
        self.arguments: dict[str, Any] = {
            "STARTS": starts,
            "frames": self.frames,
            "per_frame": self.per_frame,
            "segment_len": segment_len,
            "tokens": self.tokens,
            "heads": self.heads,
            "groups": self.groups,
            "heads_of_group": self.heads // self.groups,
            "batch": self.batch,
            "splits": self._splits(),
            "part": self.batch * self.heads * self.tokens,
            "CAUSAL": dt_b is None,
            "P": self.channels,
            "N": self.state_channels,
            "Q": self.chunk,
            "BLOCK": block,
            "BLOCK_P": _power_of_two(self.channels, 16),
            "BLOCK_N": _power_of_two(self.state_channels, 16),
            "PRECISION": _precision(x),
            "X": self.x,
            "D": D,
            **_strides("x", self.x),
            **_strides("b", shared[0]),
            **_strides("d", D),
        }
        self.legs = [self._leg(dt_f, a_f, shared[0], shared[1])]
        if dt_b is not None and a_b is not None:
            self.legs.append(self._leg(dt_b, a_b, shared[2], shared[3], backward=True))
        names = ("B", "C", "LEG", "BASES")
        for side, leg in (("F", self.legs[0]), ("B", self.legs[1] if len(self.legs) == 2 else [None] * len(names))):
            self.arguments |= {f"{name}_{side}": tensor for name, tensor in zip(names, leg, strict=True)}

    def launch(self, kernel: Any, *grid: int, **own: Any) -> None:
        """Passes the kernel its own arguments, and of the common ones those that it names."""
        common = {name: self.arguments[name] for name in kernel.arg_names if name in self.arguments}
        kernel[grid](**{**common, **own})

    def _leg(self, dt: Tensor, a: Tensor, B: Tensor, C: Tensor, backward: bool = False) -> Leg:
        numbers = self.x.new_empty(3, self.batch, self.heads, self.tokens, dtype=torch.float32)
        bases = self.x.new_empty(self.batch, self.heads, self.chunks, self.blocks + 1, dtype=torch.float64)
        at_once = min(_power_of_two(self.heads), HEADS)
        self.launch(
            kernels_forward.decay_sums, self.batch * self.chunks, triton.cdiv(self.heads, at_once),
            DT=dt, A=a, LEG=numbers, BASES=bases, BACKWARD=backward, HEADS=at_once,
            **_strides("dt", dt), **_strides("a", a),
        )  # fmt: skip
        return Leg(B, C, numbers, bases)

    def _splits(self) -> int:
        """In how many shares the heads of a group are: no more than keep the GPU busy, as each leaves sums."""
        available, programs = self.heads // self.groups, self.chunks * self.blocks * self.batch * self.groups
        enough = (n for n in range(1, available) if available % n == 0 and n * programs >= programs_wanted(self.x))
        return next(enough, available)

    def new_states(self, *many: int) -> Tensor:
        """(…, H, P, N)."""
        return self.x.new_empty(*many, self.heads, self.channels, self.state_channels, dtype=torch.float32)

    def new_numbers(self, *many: int) -> Tensor:
        """(…, B, H, L)."""
        return self.x.new_empty(*many, self.batch, self.heads, self.tokens, dtype=torch.float32)

    def new_pairs(self, *many: int) -> Tensor:
        """(…, B, c, G, Q, Q), as exact as the operands of a product are."""
        kind = torch.bfloat16 if self.arguments["PRECISION"] == "bf16" else torch.float32
        return self.x.new_empty(*many, self.batch, self.chunks, self.groups, self.chunk, self.chunk, dtype=kind)

    def new_like(self, tensor: Tensor) -> Tensor:
        """Of tokens: NaN where the lengths of frames do not add up to L and leave some out."""
        new = torch.empty(tensor.shape, dtype=tensor.dtype, device=tensor.device)
        return new.fill_(torch.nan) if self.ragged else new

    def walk(
        self, u: Tensor, leg: int, entering: Entering | None = None, per_frame: bool = False, **states: Tensor | None
    ) -> Tensor | None:
        """``states`` are the kernel's. With ``entering`` it walks the gradient, and returns the kernel's PRODUCTS."""
        gradient, of = entering is not None, self.legs[leg]
        v = of.C if gradient else of.B
        block = min(self.arguments["BLOCK_P"], BLOCK_P)
        tiles, walks = triton.cdiv(self.channels, block), self.batch * (self.frames if per_frame else 1)
        entering = entering or Entering(None)
        products = None
        if gradient:
            products = self.x.new_empty(self.batch, self.chunks, self.heads, tiles, dtype=torch.float32)
        absent = dict.fromkeys(("INITIAL", "ADDED", "BEFORE", "BEHIND", "LAST"))
        self.launch(
            kernels_forward.walk, walks * self.heads * tiles,
            U=u, V=v, LEG=of.numbers, BASES=of.bases, **{**absent, **states},
            ENTERING=entering.states, ENTERING_FIRST=entering.first, SHIFT=entering.shift, PRODUCTS=products,
            BACKWARD=leg == 1, GRADIENT=gradient, PER_FRAME=per_frame, BLOCK_P=block,
            **_strides("u", u), **_strides("v", v),
        )  # fmt: skip
        return products

    def entering_backward(self) -> Entering:
        """What enters the chunks from behind: nothing, if a frame is one chunk and there is no g0."""
        if len(self.legs) == 1:
            return Entering(None)
        if self.per_frame == 1:  # (B, T, H, P, N)
            return Entering(self.g0)
        before = self.new_states(self.batch, self.chunks)
        self.walk(self.x, 1, per_frame=True, INITIAL=self.g0, BEFORE=before)
        return Entering(before)

    def products(self) -> Tensor:
        """C_i · B_j of the leg that the pair (i, j) of tokens of a chunk belongs to."""
        pairs = self.new_pairs()
        self.launch(
            kernels_forward.products, self.chunks * self.blocks**2, self.batch * self.groups, PAIRS=pairs
        )  # fmt: skip
        return pairs

    def outputs(self, entering: Entering, entering_b: Entering) -> Tensor:
        y = self.new_like(self.x)
        self.launch(
            kernels_forward.outputs, self.chunks * self.blocks * self.heads, self.batch,
            PAIRS=self.products(), STATES=entering.states, INITIAL=entering.first, SHIFT=entering.shift,
            STATES_B=entering_b.states, Y=y,
        )  # fmt: skip
        return y

    def pair_gradients(self, dy: Tensor, pairs: Tensor) -> PairGradients:
        splits, blocks = self.arguments["splits"], self.blocks
        new = PairGradients(
            self.new_pairs(splits), self.new_numbers(blocks), self.new_numbers(blocks), self.new_numbers(4)
        )
        self.launch(
            kernels_backward.pair_gradients, self.chunks * blocks**2, self.batch * self.groups * splits,
            DY=dy, PAIRS=pairs, D_PAIRS=new.pairs, COLUMNS=new.columns, ROWS=new.rows, OWN=new.own,
        )  # fmt: skip
        return new

    def input_gradients(
        self, dy: Tensor, pairs: Tensor, leaving: list[Entering]
    ) -> tuple[Tensor, Tensor | None, list[Tensor]]:
        """dx, dD, and of each leg (B, H, L) what the states that leave the chunks give to ddt."""
        dx, dD = self.new_like(self.x), None if self.D is None else self.new_like(self.D)
        left = [self.new_numbers(), self.new_numbers()]
        self.launch(
            kernels_backward.input_gradients, self.chunks * self.blocks * self.heads, self.batch,
            DY=dy, PAIRS=pairs, D_STATES=leaving[0].states, D_STATES_B=leaving[1].states, DX=dx, DD=dD,
            LEFT_F=left[0], LEFT_B=left[1],
        )  # fmt: skip
        return dx, dD, left

    def shared_gradients(
        self, leg: int, u: Tensor, of_pairs: PairGradients, states: Entering, of_c: bool = False
    ) -> tuple[Tensor, Tensor]:
        """dB or dC; and with dC (B, H, L), of the decays from where a chunk is entered."""
        of, splits = self.legs[leg], self.arguments["splits"]
        kind = torch.float32 if splits > 1 else self.x.dtype
        shares = self.new_like(of.B.new_empty(splits, *of.B.shape, dtype=kind))
        read = self.new_numbers()
        self.launch(
            kernels_backward.shared_gradients, self.chunks * self.blocks, self.batch * self.groups * splits,
            U=u, OWN=of.C if of_c else of.B, OTHER=of.B if of_c else of.C, D_PAIRS=of_pairs.pairs, LEG=of.numbers,
            BASES=of.bases, STATES=states.states, INITIAL=states.first, SHIFT=states.shift, GRADIENT=shares, READ=read,
            OF_C=of_c, BACKWARD=leg == 1, **_strides("u", u),
        )  # fmt: skip
        return shares[0] if splits == 1 else shares.sum(0).to(self.x.dtype), read

    def decay_gradients(
        self,
        leg: int,
        of_pairs: PairGradients,
        read: Tensor,
        left: Tensor,
        products: Tensor | None,
        dt: Tensor,
        a: Tensor,
    ) -> tuple[Tensor, Tensor]:
        """ddt and da; ``products`` of the walk are ``None`` if no state enters the chunks."""
        ddt, da = self.new_like(dt), self.new_like(a)
        at_once = min(_power_of_two(self.heads), HEADS)
        self.launch(
            kernels_backward.decay_gradients, self.batch * self.chunks, triton.cdiv(self.heads, at_once),
            COLUMNS=of_pairs.columns, ROWS=of_pairs.rows, OWN=of_pairs.own, LEG=self.legs[leg].numbers, READ=read,
            LEFT=left, PRODUCTS=products, tiles=0 if products is None else products.shape[-1], DA=da, DDT=ddt,
            BACKWARD=leg == 1, HEADS=at_once,
        )  # fmt: skip
        return ddt, da


def programs_wanted(x: Tensor) -> int:
    return 2 * torch.cuda.get_device_properties(x.device).multi_processor_count if x.is_cuda else 1


def _precision(x: Tensor) -> str:
    return PRECISION.get(x.dtype, "tf32x3")


def _block(x: Tensor, hopper: int = 0) -> int:
    on_hopper = x.dtype == torch.bfloat16 and x.is_cuda and torch.cuda.get_device_capability(x.device) >= (9, 0)
    return max(BLOCK[_precision(x)], hopper if on_hopper else 0)


def _power_of_two(size: int, least: int = 1, most: int = 256) -> int:
    return min(max(triton.next_power_of_2(size), least), most)


def _with_strides(*tensors: Tensor) -> list[Tensor]:
    """With the same strides, the last 1, and offsets inside a chunk that int32 holds: copied, if they are not so."""
    strides = tensors[0].stride()
    if strides[-1] == 1 and strides[1] < 2**22 and all(tensor.stride() == strides for tensor in tensors):
        return list(tensors)
    return [tensor.contiguous() for tensor in tensors]


def _strides(name: str, tensor: Tensor | None) -> dict[str, int]:
    """Of (B, L, H or G, …)."""
    strides = (0, 0, 0) if tensor is None else tensor.stride()
    return {f"{name}_sample": strides[0], f"{name}_token": strides[1], f"{name}_head": strides[2]}
