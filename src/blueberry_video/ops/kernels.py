"""Triton backend of the scans, for GPUs and all dtypes but float64. Same functions as in :mod:`.chunked`.

Forward: ``chunk_cumsum`` sums the log-decays, ``state_passing`` carries the state from chunk to chunk,
``pair_products`` computes C_i · B_j once for all heads of a group, and ``chunk_scan`` the outputs. Backward: everything
but the states at frame ends is recomputed. ``state_passing`` also carries the gradients of the states,
``pair_gradients`` computes those of the products, ``input_gradients`` those of x and D, ``shared_gradients`` those of B
and C, and ``decay_gradients`` sums what the other kernels return for the log-decays and dt. Each value is written by
one program, and partial sums are added in a fixed order: results are deterministic.

Shapes: B batch, L tokens, T frames, c chunks of a sample, H heads in G groups, P channels of a head, N state size.
"""

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
import triton
from torch import Tensor

from blueberry_video.ops import kernels_backward, kernels_forward
from blueberry_video.ops.inputs import Direction, ScanInputs

CHUNK = 256  # a frame of at most this many tokens is one chunk: then no state is passed within it
PRECISION = {torch.bfloat16: "bf16", torch.float16: "tf32"}  # float16: M may exceed its range; tf32 has all its digits
BLOCK = {"bf16": 64, "tf32": 32, "tf32x3": 32}  # rows and columns of a tile
HOPPER_BLOCK = 128  # of the forward in bf16: half the traffic of 64, and it fits the registers of sm_90
BLOCK_P = 32  # channels of a state in a program of state_passing
HEADS = 8  # maximum number of heads in a program that reads scalars of the tokens


class DirectionTensors(NamedTuple):
    """Kernel arguments of one direction."""

    B: Tensor  # (B, L, G, N), with the strides of C and of the other direction
    C: Tensor
    scalars: Tensor  # (3, B, H, L) float32 per token: SCALARS in kernels_forward
    bases: Tensor  # (B, H, c, blocks + 1) float64: log-decay from the chunk's start to each block and to its end


class Entering(NamedTuple):
    """States that enter the chunks, or gradients of the states that leave them."""

    states: Tensor | None  # (B, c, H, P, N); with ``shift`` = 1 those of the previous chunk
    first: Tensor | None = None  # (B, H, P, N): with ``shift`` = 1, that of the first chunk
    shift: int = 0


class PairGradients(NamedTuple):
    """Outputs of the kernel ``pair_gradients``."""

    pairs: Tensor  # (splits, B, c, G, Q, Q)
    columns: Tensor  # (blocks, B, H, L), as rows
    rows: Tensor
    diagonal: Tensor  # (4, B, H, L)


def forward(inputs: ScanInputs) -> tuple[Tensor, Tensor]:
    """As :func:`blueberry_video.ops.chunked.forward`; ``chunk`` is rounded up to a power of two from 16 to 256."""
    with torch.cuda.device_of(inputs.x):
        scan = Scan(inputs, _block(inputs.x, HOPPER_BLOCK))
        states = scan.new_states(scan.batch, scan.frames)
        before = None if scan.per_frame == 1 else scan.new_states(scan.batch, scan.chunks)
        scan.state_passing(scan.x, 0, INITIAL=scan.h0, CHUNK_STATES=before, FRAME_STATES=states)
        entering = Entering(states, scan.h0, 1) if before is None else Entering(before)
        return scan.chunk_scan(entering, scan.entering_backward()), states


def backward(dy: Tensor, dstates: Tensor, states: Tensor, inputs: ScanInputs) -> ScanInputs:
    """As :func:`blueberry_video.ops.chunked.backward`."""
    with torch.cuda.device_of(inputs.x):
        scan = Scan(inputs, _block(inputs.x))
        dy, dstates, states = dy.contiguous(), dstates.float().contiguous(), states.contiguous()
        entering = [Entering(states, scan.h0, 1), scan.entering_backward()]
        if scan.per_frame > 1:
            first = torch.zeros_like(states[:, 0]) if scan.h0 is None else scan.h0
            before = scan.new_states(scan.batch, scan.chunks)
            initial = torch.cat([first[:, None], states[:, :-1]], 1)
            scan.state_passing(scan.x, 0, per_frame=True, INITIAL=initial, CHUNK_STATES=before)
            entering[0] = Entering(before)

        dh0, leaving = scan.new_states(scan.batch), [Entering(scan.new_states(scan.batch, scan.chunks)), Entering(None)]
        gradient = {"D_FRAME_STATES": dstates, "CHUNK_STATES": leaving[0].states, "FINAL": dh0}
        d_decays = [scan.state_passing(dy, 0, entering[0], **gradient), None]  # type: ignore[arg-type]
        dg0 = None
        if entering[1].states is not None:
            dg0, leaving[1] = scan.new_states(scan.batch, scan.frames), Entering(torch.empty_like(entering[1].states))
            gradient = {"CHUNK_STATES": leaving[1].states, "FINAL": dg0}
            d_decays[1] = scan.state_passing(dy, 1, entering[1], per_frame=True, **gradient)

        pairs = scan.pair_products()
        d_pairs = scan.pair_gradients(dy, pairs)
        dx, dD, state_ddt = scan.input_gradients(dy, pairs, leaving)
        gradients: list[Tensor | None] = []
        for side, direction in enumerate((inputs.forward, inputs.backward)):
            if direction is None:
                gradients += [None] * 4
                continue
            dB, _ = scan.shared_gradients(side, scan.x, d_pairs, leaving[side])
            dC, d_entry = scan.shared_gradients(side, dy, d_pairs, entering[side], of_c=True)
            decays = scan.decay_gradients(side, d_pairs, d_entry, state_ddt[side], d_decays[side], direction)
            gradients += [*decays, dB, dC]
    h0, g0 = inputs.h0, inputs.g0
    dg0 = None if g0 is None or dg0 is None else dg0.to(g0.dtype)
    dh0 = None if h0 is None else dh0.to(h0.dtype)  # type: ignore[assignment]
    return ScanInputs._make([dx, *gradients, dD, None, inputs.segment_len, dh0, dg0, inputs.chunk])


class Scan:
    """Inputs, geometry and cumulative log-decays of one call, with a method for each kernel that needs them.

    ``arguments`` are kernel arguments by name, for those that several kernels share.
    """

    def __init__(self, inputs: ScanInputs, block: int):
        x, D, lengths, segment_len = inputs.x, inputs.D, inputs.lengths, inputs.segment_len
        self.batch, self.tokens, self.heads, self.channels = x.shape
        self.groups, self.state_size = inputs.B_f.shape[2:]
        self.frames = inputs.num_frames
        self.chunk = _power_of_two(min(segment_len, inputs.chunk or CHUNK), 16, 256)
        self.per_frame = triton.cdiv(segment_len, self.chunk)
        self.chunks = self.frames * self.per_frame
        block = min(block, self.chunk)
        self.blocks = self.chunk // block

        starts = None
        if lengths is not None:  # clamped: lengths that do not sum to L must not cause out-of-bounds accesses
            ends = lengths.to(torch.int64).clamp(min=0).cumsum(1).clamp(max=self.tokens)
            starts = F.pad(ends, (1, 0)).contiguous()
        self.ragged = lengths is not None
        self.x, self.D = _with_strides(x)[0], D
        self.h0, self.g0 = (None if state is None else state.float().contiguous() for state in (inputs.h0, inputs.g0))
        directions = [inputs.forward] if inputs.backward is None else [inputs.forward, inputs.backward]
        shared = _with_strides(*(tensor for direction in directions for tensor in direction[2:]))
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
            "CAUSAL": inputs.backward is None,
            "P": self.channels,
            "N": self.state_size,
            "Q": self.chunk,
            "BLOCK": block,
            "BLOCK_P": _power_of_two(self.channels, 16),
            "BLOCK_N": _power_of_two(self.state_size, 16),
            "PRECISION": _precision(x),
            "X": self.x,
            "D": D,
            **_strides("x", self.x),
            **_strides("b", shared[0]),
            **_strides("d", D),
        }
        self.directions = [
            self._direction(direction, *shared[2 * side : 2 * side + 2], backward=side == 1)  # type: ignore[misc, arg-type]
            for side, direction in enumerate(directions)
        ]
        names = ("B", "C", "SCALARS", "BASES")
        for suffix, tensors in zip("FB", [*self.directions, [None] * len(names)]):
            self.arguments |= {f"{name}_{suffix}": tensor for name, tensor in zip(names, tensors, strict=True)}

    def launch(self, kernel: Any, *grid: int, **own: Any) -> None:
        """Launches ``kernel`` with its own arguments and those of ``arguments`` that it names."""
        common = {name: self.arguments[name] for name in kernel.arg_names if name in self.arguments}
        kernel[grid](**{**common, **own})

    def _direction(self, direction: Direction, B: Tensor, C: Tensor, backward: bool) -> DirectionTensors:
        dt, a = direction.dt, direction.a
        scalars = self.x.new_empty(3, self.batch, self.heads, self.tokens, dtype=torch.float32)
        bases = self.x.new_empty(self.batch, self.heads, self.chunks, self.blocks + 1, dtype=torch.float64)
        at_once = min(_power_of_two(self.heads), HEADS)
        self.launch(
            kernels_forward.chunk_cumsum, self.batch * self.chunks, triton.cdiv(self.heads, at_once),
            DT=dt, A=a, SCALARS=scalars, BASES=bases, BACKWARD=backward, HEADS=at_once,
            **_strides("dt", dt), **_strides("a", a),
        )  # fmt: skip
        return DirectionTensors(B, C, scalars, bases)

    def _splits(self) -> int:
        """Splits of a group's heads: no more than occupy the GPU, because each split writes partial sums."""
        available, programs = self.heads // self.groups, self.chunks * self.blocks * self.batch * self.groups
        enough = (n for n in range(1, available) if available % n == 0 and n * programs >= programs_wanted(self.x))
        return next(enough, available)

    def new_states(self, *many: int) -> Tensor:
        """(…, H, P, N)."""
        return self.x.new_empty(*many, self.heads, self.channels, self.state_size, dtype=torch.float32)

    def new_scalars(self, *many: int) -> Tensor:
        """(…, B, H, L)."""
        return self.x.new_empty(*many, self.batch, self.heads, self.tokens, dtype=torch.float32)

    def new_pairs(self, *many: int) -> Tensor:
        """(…, B, c, G, Q, Q), in the precision of a product's operands."""
        kind = torch.bfloat16 if self.arguments["PRECISION"] == "bf16" else torch.float32
        return self.x.new_empty(*many, self.batch, self.chunks, self.groups, self.chunk, self.chunk, dtype=kind)

    def new_like(self, tensor: Tensor) -> Tensor:
        """Per-token output: NaN for tokens that ragged lengths leave out because they do not sum to L."""
        new = torch.empty(tensor.shape, dtype=tensor.dtype, device=tensor.device)
        return new.fill_(torch.nan) if self.ragged else new

    def state_passing(
        self, u: Tensor, side: int, entering: Entering | None = None, per_frame: bool = False, **states: Tensor | None
    ) -> Tensor | None:
        """Passes states, or with ``entering`` their gradients, and then returns the kernel's D_DECAYS.

        ``states`` are arguments of the kernel; ``side`` is 0 for the forward and 1 for the backward direction.
        """
        gradient, direction = entering is not None, self.directions[side]
        v = direction.C if gradient else direction.B
        block = min(self.arguments["BLOCK_P"], BLOCK_P)
        tiles, sequences = triton.cdiv(self.channels, block), self.batch * (self.frames if per_frame else 1)
        entering = entering or Entering(None)
        d_decays = None
        if gradient:
            d_decays = self.x.new_empty(self.batch, self.chunks, self.heads, tiles, dtype=torch.float32)
        absent = dict.fromkeys(("INITIAL", "D_FRAME_STATES", "CHUNK_STATES", "FRAME_STATES", "FINAL"))
        self.launch(
            kernels_forward.state_passing, sequences * self.heads * tiles,
            U=u, V=v, SCALARS=direction.scalars, BASES=direction.bases, **{**absent, **states},
            ENTERING=entering.states, ENTERING_FIRST=entering.first, SHIFT=entering.shift, D_DECAYS=d_decays,
            BACKWARD=side == 1, GRADIENT=gradient, PER_FRAME=per_frame, BLOCK_P=block,
            **_strides("u", u), **_strides("v", v),
        )  # fmt: skip
        return d_decays

    def entering_backward(self) -> Entering:
        """Backward states that enter the chunks; none if a frame is one chunk and there is no g0."""
        if len(self.directions) == 1:
            return Entering(None)
        if self.per_frame == 1:  # (B, T, H, P, N)
            return Entering(self.g0)
        before = self.new_states(self.batch, self.chunks)
        self.state_passing(self.x, 1, per_frame=True, INITIAL=self.g0, CHUNK_STATES=before)
        return Entering(before)

    def pair_products(self) -> Tensor:
        """C_i · B_j of the direction that the pair (i, j) of tokens of a chunk belongs to."""
        pairs, grid = self.new_pairs(), (self.chunks * self.blocks**2, self.batch * self.groups)
        self.launch(kernels_forward.pair_products, *grid, PAIRS=pairs)
        return pairs

    def chunk_scan(self, entering: Entering, entering_b: Entering) -> Tensor:
        y = self.new_like(self.x)
        self.launch(
            kernels_forward.chunk_scan, self.chunks * self.blocks * self.heads, self.batch,
            PAIRS=self.pair_products(), STATES=entering.states, INITIAL=entering.first, SHIFT=entering.shift,
            STATES_B=entering_b.states, Y=y,
        )  # fmt: skip
        return y

    def pair_gradients(self, dy: Tensor, pairs: Tensor) -> PairGradients:
        splits, blocks = self.arguments["splits"], self.blocks
        new = PairGradients(
            self.new_pairs(splits), self.new_scalars(blocks), self.new_scalars(blocks), self.new_scalars(4)
        )
        self.launch(
            kernels_backward.pair_gradients, self.chunks * blocks**2, self.batch * self.groups * splits,
            DY=dy, PAIRS=pairs, D_PAIRS=new.pairs, COLUMNS=new.columns, ROWS=new.rows, DIAGONAL=new.diagonal,
        )  # fmt: skip
        return new

    def input_gradients(
        self, dy: Tensor, pairs: Tensor, leaving: list[Entering]
    ) -> tuple[Tensor, Tensor | None, list[Tensor]]:
        """dx, dD, and for each direction the part (B, H, L) of ddt that comes from the states that leave the chunks."""
        dx, dD = self.new_like(self.x), None if self.D is None else self.new_like(self.D)
        state_ddt = [self.new_scalars(), self.new_scalars()]
        self.launch(
            kernels_backward.input_gradients, self.chunks * self.blocks * self.heads, self.batch,
            DY=dy, PAIRS=pairs, D_STATES=leaving[0].states, D_STATES_B=leaving[1].states, DX=dx, DD=dD,
            STATE_DDT_F=state_ddt[0], STATE_DDT_B=state_ddt[1],
        )  # fmt: skip
        return dx, dD, state_ddt

    def shared_gradients(
        self, side: int, u: Tensor, d_pairs: PairGradients, states: Entering, of_c: bool = False
    ) -> tuple[Tensor, Tensor]:
        """dB or dC; with dC also the gradient (B, H, L) of each token's log-decay from the chunk's entry."""
        direction, splits = self.directions[side], self.arguments["splits"]
        kind = torch.float32 if splits > 1 else self.x.dtype
        B, C = direction.B, direction.C
        shares = self.new_like(B.new_empty(splits, *B.shape, dtype=kind))
        d_entry = self.new_scalars()
        self.launch(
            kernels_backward.shared_gradients, self.chunks * self.blocks, self.batch * self.groups * splits,
            U=u, OWN=C if of_c else B, OTHER=B if of_c else C, D_PAIRS=d_pairs.pairs, SCALARS=direction.scalars,
            BASES=direction.bases, STATES=states.states, INITIAL=states.first, SHIFT=states.shift, GRADIENT=shares,
            D_ENTRY=d_entry, OF_C=of_c, BACKWARD=side == 1, **_strides("u", u),
        )  # fmt: skip
        return shares[0] if splits == 1 else shares.sum(0).to(self.x.dtype), d_entry

    def decay_gradients(
        self,
        side: int,
        d_pairs: PairGradients,
        d_entry: Tensor,
        state_ddt: Tensor,
        d_decays: Tensor | None,
        direction: Direction,
    ) -> tuple[Tensor, Tensor]:
        """ddt and da; ``d_decays`` is ``None`` if no state enters the chunks."""
        ddt, da = self.new_like(direction.dt), self.new_like(direction.a)
        at_once = min(_power_of_two(self.heads), HEADS)
        self.launch(
            kernels_backward.decay_gradients, self.batch * self.chunks, triton.cdiv(self.heads, at_once),
            COLUMNS=d_pairs.columns, ROWS=d_pairs.rows, DIAGONAL=d_pairs.diagonal, D_ENTRY=d_entry, STATE_DDT=state_ddt,
            SCALARS=self.directions[side].scalars, D_DECAYS=d_decays,
            tiles=0 if d_decays is None else d_decays.shape[-1], DA=da, DDT=ddt, BACKWARD=side == 1, HEADS=at_once,
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
    """Returns tensors of equal strides, last stride 1, and int32 offsets within a chunk; copies where necessary."""
    strides = tensors[0].stride()
    if strides[-1] == 1 and strides[1] < 2**22 and all(tensor.stride() == strides for tensor in tensors):
        return list(tensors)
    return [tensor.contiguous() for tensor in tensors]


def _strides(name: str, tensor: Tensor | None) -> dict[str, int]:
    """Strides of (B, L, H or G, …) as kernel arguments."""
    strides = (0, 0, 0) if tensor is None else tensor.stride()
    return {f"{name}_sample": strides[0], f"{name}_token": strides[1], f"{name}_head": strides[2]}
