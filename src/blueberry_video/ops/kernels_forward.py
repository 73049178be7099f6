"""Forward Triton kernels of the scan: cumulative log-decays, state passing, products of pairs, and outputs.

A sample is split into chunks of Q tokens that start where its frames start: chunk k of a frame holds its tokens kQ,
kQ+1, …, and none if the frame ends earlier. Nothing is padded in memory. With the log-decays a of a chunk:

    forward direction    s_i = sum of a_k over k ≤ i    decay from j to i > j: exp(s_i - s_j)
    backward direction   s_i = sum of a_k over k < i    decay from j to i < j: exp(s_j - s_i)

A chunk is split into blocks; BLOCK x BLOCK pairs of tokens are a tile. The sums restart in each block, and BASES holds
their starting values in float64: a difference of two is exact to 1e-4 even at extreme decays. Off the diagonal, the
decay of a pair is the product of a factor per row and a factor per column, to and from a token between the two blocks,
neither above 1 while dt ≥ 0: only tiles on the diagonal require an exponential per pair.

Pointer arguments are upper case, and None if absent; tensors without stride arguments are contiguous. Offsets of a
chunk are int64. SCALARS (3, B, H, L), with ``part`` values each, holds SUMS, the s within a block in units of log 2;
STEPS, dt; and WRITES, dt_j times the decay from j to the exit of its block. PAIRS (B, chunks, G, Q, Q) holds the
products C_i · B_j. PRECISION is that of a product's operands: "bf16", "tf32", or "tf32x3", three TF32 products for one
in float32.
"""

import os
from typing import Any

import triton
import triton.language as tl

LOG2_E = tl.constexpr(1.4426950408889634)
LEAST = tl.constexpr(-30.0)  # lower bound of a log-decay: exp(-30) is negligible in float32, and sums stay exact
SUMS, STEPS, WRITES = (tl.constexpr(field) for field in range(3))
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"


def configs(*choices: dict[str, int]) -> list[triton.Config]:
    """Configurations for the autotuner; only the first one under the interpreter, which cannot time them."""
    options = ("num_warps", "num_stages")
    return [
        triton.Config({k: v for k, v in choice.items() if k not in options}, **{k: choice[k] for k in options})
        for choice in (choices[:1] if INTERPRETED else choices)
    ]


def wide_enough(candidates: list[triton.Config], arguments: dict[str, Any], **constants: Any) -> list[triton.Config]:
    """Configurations with at least one warp per 16 rows of a tile: with fewer, 128 rows do not fit the registers."""
    block = {**arguments, **constants}["BLOCK"]
    return [candidate for candidate in candidates if candidate.num_warps * 16 >= block * (block > 64)]


@triton.jit
def chunk_span(STARTS, sample, chunk, frames, per_frame, segment_len, Q: tl.constexpr):
    """First token and number of tokens of a chunk; STARTS (B, T + 1) are the first tokens of ragged frames."""
    frame, within = chunk // per_frame, chunk % per_frame * Q
    if STARTS is None:
        start, length = frame * segment_len, segment_len
    else:
        start = tl.load(STARTS + sample * (frames + 1) + frame)
        length = tl.load(STARTS + sample * (frames + 1) + frame + 1) - start
    return start + within, tl.minimum(tl.maximum(length - within, 0), Q).to(tl.int32)


@triton.jit
def load_rows(ROWS, stride, rows, inside, WIDTH: tl.constexpr, BLOCK_W: tl.constexpr):
    """Rows (rows, BLOCK_W) of a matrix, 0 outside."""
    columns = tl.arange(0, BLOCK_W)
    mask = inside[:, None]
    if WIDTH != BLOCK_W:
        mask = mask & (columns < WIDTH)[None, :]
    return tl.load(ROWS + rows[:, None] * stride + columns[None, :], mask=mask, other=0.0)


@triton.jit
def load_state(
    STATES, INITIAL, sample, chunk, head, chunks, heads, P: tl.constexpr, N: tl.constexpr,
    BLOCK_P: tl.constexpr, BLOCK_N: tl.constexpr, SHIFT: tl.constexpr,
):  # fmt: skip
    """State (P, N) that enters a chunk. With SHIFT = 1, STATES leave the chunks, and INITIAL enters the first."""
    p = tl.arange(0, BLOCK_P)
    at = (sample * chunks + chunk - SHIFT) * heads + head
    if SHIFT == 0:
        state = load_rows(STATES + at * P * N, N, p, p < P, N, BLOCK_N)
    else:
        state = tl.zeros([BLOCK_P, BLOCK_N], tl.float32)
        if chunk > 0:
            state = load_rows(STATES + at * P * N, N, p, p < P, N, BLOCK_N)
        elif INITIAL is not None:
            state = load_rows(INITIAL + (sample * heads + head) * P * N, N, p, p < P, N, BLOCK_N)
    return state


@triton.jit
def dot(a, b, PRECISION: tl.constexpr):
    """Matrix product a b, accumulated in float32."""
    if PRECISION == "bf16":
        product = tl.dot(a.to(tl.bfloat16), b.to(tl.bfloat16))
    else:
        product = tl.dot(a.to(tl.float32), b.to(tl.float32), input_precision=PRECISION)
    return product


@triton.jit
def load_scalar(SCALARS, FIELD: tl.constexpr, part, rows, inside):
    return tl.load(SCALARS + tl.cast(part, tl.int64) * FIELD + rows, mask=inside, other=0.0)


@triton.jit
def masked_exp(exponent, inside):
    """2 to the power of ``exponent``; 0 outside."""
    return tl.exp2(tl.where(inside, exponent.to(tl.float32), float("-inf")))


@triton.jit
def edge_decay(SCALARS, part, rows, inside, BASES, BEGINNING: tl.constexpr):
    """Decay between tokens of a block and its beginning or end; BASES points to the block's entry."""
    exponent = load_scalar(SCALARS, SUMS, part, rows, inside)
    if not BEGINNING:
        exponent = (tl.load(BASES + 1) - tl.load(BASES)).to(tl.float32) - exponent
    return masked_exp(exponent, inside)


@triton.jit
def block_decay(BASES, row_block, column_block, BACKWARD: tl.constexpr):
    """Decay over all blocks between two: from the exit of the columns' block to the entry of the rows'."""
    if BACKWARD:
        exponent = tl.load(BASES + column_block) - tl.load(BASES + row_block + 1)
    else:
        exponent = tl.load(BASES + row_block) - tl.load(BASES + column_block + 1)
    return tl.exp2(exponent.to(tl.float32))


@triton.jit
def differences(SCALARS, part, rows, inside):
    """(p, q): s_p - s_q of the tokens of a block; tokens outside have s = -inf."""
    sums = tl.load(SCALARS + tl.cast(part, tl.int64) * SUMS + rows, mask=inside, other=float("-inf"))
    return sums[:, None] - sums[None, :]


@triton.jit
def tile_decay(BELOW, ABOVE, part, rows, inside, BLOCK: tl.constexpr):
    """(p, q) of one block: exp(s_p - s_q) of BELOW for p > q, exp(s_q - s_p) of ABOVE for p < q, and 1 for p = q.

    0 in the half of a direction that is None. May be NaN where neither p nor q is inside.
    """
    below = tl.arange(0, BLOCK)[:, None] > tl.arange(0, BLOCK)[None, :]
    above = tl.arange(0, BLOCK)[:, None] < tl.arange(0, BLOCK)[None, :]
    if ABOVE is None:
        exponent = tl.where(above, float("-inf"), differences(BELOW, part, rows, inside))
    elif BELOW is None:
        exponent = tl.where(below, float("-inf"), -differences(ABOVE, part, rows, inside))
    else:
        exponent = tl.where(below, differences(BELOW, part, rows, inside), -differences(ABOVE, part, rows, inside))
    return tl.exp2(exponent)


@triton.jit
def chunk_cumsum(
    DT, A, SCALARS, BASES, STARTS,
    dt_sample, dt_token, dt_head, a_sample, a_token, a_head,
    part, frames, per_frame, segment_len, tokens, heads,
    BACKWARD: tl.constexpr, Q: tl.constexpr, BLOCK: tl.constexpr, HEADS: tl.constexpr,
):  # fmt: skip
    """SCALARS of one direction, and BASES (B, H, chunks, blocks + 1), which end with the sum of the whole chunk."""
    chunks, blocks = frames * per_frame, Q // BLOCK
    pid = tl.program_id(0).to(tl.int64)
    sample, chunk = pid // chunks, pid % chunks
    first, length = chunk_span(STARTS, sample, chunk, frames, per_frame, segment_len, Q)
    h = (tl.program_id(1) * HEADS + tl.arange(0, HEADS)).to(tl.int64)[None, :]
    valid_head = h < heads
    BASES += ((sample * heads + h) * chunks + chunk) * (blocks + 1)
    base, part = tl.zeros([1, HEADS], tl.float64), tl.cast(part, tl.int64)
    for block in range(blocks):
        i = block * BLOCK + tl.arange(0, BLOCK)[:, None]
        rows, inside = first + i, (i < length) & valid_head
        a = tl.load(A + sample * a_sample + rows * a_token + h * a_head, mask=inside, other=0.0).to(tl.float64)
        dt = tl.load(DT + sample * dt_sample + rows * dt_token + h * dt_head, mask=inside, other=0.0).to(tl.float32)
        a = tl.where(a < LEAST, LEAST, a) * LOG2_E  # keeps NaN
        sums, total = tl.cumsum(a, 0), tl.sum(a, 0)[None, :]
        if BACKWARD:
            sums -= a
            leaves = masked_exp(sums, inside)
        else:
            leaves = masked_exp(total - sums, inside)
        at = (sample * heads + h) * tokens + rows
        tl.store(SCALARS + part * SUMS + at, sums.to(tl.float32), mask=inside)
        tl.store(SCALARS + part * STEPS + at, dt, mask=inside)
        tl.store(SCALARS + part * WRITES + at, leaves * dt, mask=inside)
        tl.store(BASES + block, base, mask=valid_head)
        base += total
    tl.store(BASES + blocks, base, mask=valid_head)


@triton.autotune(
    configs(
        {"STRIP": 32, "num_warps": 8, "num_stages": 2},  # fits the registers in float32
        {"STRIP": 64, "num_warps": 4, "num_stages": 3},
        {"STRIP": 64, "num_warps": 8, "num_stages": 3},
        {"STRIP": 128, "num_warps": 8, "num_stages": 3},
    ),
    key=["P", "N", "Q", "GRADIENT", "PER_FRAME", "PRECISION"],
)
@triton.jit
def state_passing(
    U, V, SCALARS, BASES, INITIAL, D_FRAME_STATES, ENTERING, ENTERING_FIRST, CHUNK_STATES, FRAME_STATES, FINAL,
    D_DECAYS, STARTS,
    u_sample, u_token, u_head, v_sample, v_token, v_head,
    part, frames, per_frame, segment_len, tokens, heads, heads_of_group,
    BACKWARD: tl.constexpr, GRADIENT: tl.constexpr, PER_FRAME: tl.constexpr, SHIFT: tl.constexpr,
    P: tl.constexpr, N: tl.constexpr, Q: tl.constexpr, BLOCK: tl.constexpr, STRIP: tl.constexpr,
    BLOCK_P: tl.constexpr, BLOCK_N: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Passes a state from chunk to chunk: s becomes exp(sum of a) s + sum over the tokens of weight u ⊗ v.

    Without GRADIENT, s is the state: u = x, v = B, and the weight is dt times the decay to the chunk's exit. With
    GRADIENT, s is the gradient of the state, in the opposite order: u = dy, v = C, and the weight is the decay from the
    chunk's entry. Runs over all chunks of a sample, or of each frame (PER_FRAME). Arguments that may be None:

        INITIAL (B, T or 1, H, P, N)    initial s, zero if None
        D_FRAME_STATES (B, T, H, P, N)  added to s at the end of each frame
        CHUNK_STATES (B, chunks, H, P, N) output: s before each chunk, in the order of processing
        FRAME_STATES (B, T, H, P, N)    output: s after each frame
        FINAL (B, T or 1, H, P, N)      output: s after the last chunk
        D_DECAYS (B, chunks, H, tiles)  output: exp(sum of a) <s, ENTERING>, with GRADIENT the gradient of the sum of a
    """
    chunks, blocks = frames * per_frame, Q // BLOCK
    tiles = tl.cdiv(P, BLOCK_P)
    pid = tl.program_id(0).to(tl.int64)
    tile, pid = pid % tiles, pid // tiles
    head, pid = pid % heads, pid // heads
    sequences, steps = 1, chunks
    if PER_FRAME:
        sequences, steps = frames, per_frame
    sample, frame = pid // sequences, pid % sequences
    group = head // heads_of_group

    p, n = tile * BLOCK_P + tl.arange(0, BLOCK_P), tl.arange(0, BLOCK_N)
    cells = p[None, :] * N + n[:, None]  # (N, P): tensor cores take the longer side whole
    inside = (p < P)[None, :] & (n < N)[:, None]
    state = tl.zeros([BLOCK_N, BLOCK_P], tl.float32)
    if INITIAL is not None:
        state += tl.load(INITIAL + (pid * heads + head) * P * N + cells, mask=inside, other=0.0)
    U += sample * u_sample + head * u_head + tile * BLOCK_P
    V += sample * v_sample + group * v_head
    SCALARS += (sample * heads + head) * tokens
    BASES += (sample * heads + head) * chunks * (blocks + 1)

    for step in range(steps):
        chunk = frame * steps + step
        if BACKWARD != GRADIENT:
            chunk = frame * steps + steps - 1 - step
        first, length = chunk_span(STARTS, sample, chunk, frames, per_frame, segment_len, Q)
        of_chunk = ((sample * chunks + chunk) * heads + head) * P * N + cells
        of_frame = ((sample * frames + chunk // per_frame) * heads + head) * P * N + cells
        ends_frame = chunk % per_frame == per_frame - 1
        if D_FRAME_STATES is not None:  # noqa: SIM102 (a compile-time condition, unlike the inner one)
            if ends_frame:
                state += tl.load(D_FRAME_STATES + of_frame, mask=inside, other=0.0)
        if CHUNK_STATES is not None:
            tl.store(CHUNK_STATES + of_chunk, state, mask=inside)
        total = tl.load(BASES + chunk * (blocks + 1) + blocks)
        decay = tl.exp2(total.to(tl.float32))
        if D_DECAYS is not None:
            entering = tl.zeros([BLOCK_N, BLOCK_P], tl.float32)
            if chunk >= SHIFT:
                entering = tl.load(ENTERING + of_chunk - SHIFT * heads * P * N, mask=inside, other=0.0)
            elif ENTERING_FIRST is not None:
                entering = tl.load(ENTERING_FIRST + (sample * heads + head) * P * N + cells, mask=inside, other=0.0)
            d_decay = decay * tl.sum(tl.sum(entering * state, 1), 0)
            tl.store(D_DECAYS + ((sample * chunks + chunk) * heads + head) * tiles + tile, d_decay)
        state *= decay
        for strip in range(tl.cdiv(length, STRIP)):
            i = strip * STRIP + tl.arange(0, STRIP)
            valid = i < length
            u = tl.load(
                U + first * u_token + i[:, None] * u_token + tl.arange(0, BLOCK_P)[None, :],
                mask=valid[:, None] & (p < P)[None, :],
                other=0.0,
            )
            v = load_rows(V + first * v_token, v_token, i, valid, N, BLOCK_N)
            base = tl.load(BASES + chunk * (blocks + 1) + i // BLOCK, mask=valid, other=0.0)
            sums = base + load_scalar(SCALARS + first, SUMS, part, i, valid)
            if BACKWARD == GRADIENT:
                sums = total - sums
            weight = masked_exp(sums, valid)
            if not GRADIENT:
                weight *= load_scalar(SCALARS + first, STEPS, part, i, valid)
            state += dot(tl.trans(v), u * weight[:, None], PRECISION)
        if FRAME_STATES is not None:  # noqa: SIM102
            if ends_frame:
                tl.store(FRAME_STATES + of_frame, state, mask=inside)
    if FINAL is not None:
        tl.store(FINAL + (pid * heads + head) * P * N + cells, state, mask=inside)


@triton.jit
def inner_products(
    C, B, stride, i, j, length, N: tl.constexpr, BLOCK: tl.constexpr, BLOCK_N: tl.constexpr, PRECISION: tl.constexpr
):
    """Tile of C_i · B_j, one slice of N at a time: whole rows in float32 would not fit the registers."""
    SLICE: tl.constexpr = min(BLOCK_N, 64 if PRECISION == "bf16" else 32)
    pairs = tl.zeros([BLOCK, BLOCK], tl.float32)
    for begin in range(0, N, SLICE):
        n = begin + tl.arange(0, SLICE)
        c = tl.load(C + i[:, None] * stride + n[None, :], mask=(i < length)[:, None] & (n < N)[None, :], other=0.0)
        b = tl.load(B + j[:, None] * stride + n[None, :], mask=(j < length)[:, None] & (n < N)[None, :], other=0.0)
        pairs += dot(c, tl.trans(b), PRECISION)
    return pairs


@triton.autotune(
    configs(*({"num_warps": warps, "num_stages": 3} for warps in (4, 8))),
    key=["N", "Q", "BLOCK", "CAUSAL", "PRECISION"],
    prune_configs_by={"early_config_prune": wide_enough},
)
@triton.jit
def pair_products(
    B_F, C_F, B_B, C_B, PAIRS, STARTS, b_sample, b_token, b_head, frames, per_frame, segment_len, groups,
    CAUSAL: tl.constexpr, N: tl.constexpr, Q: tl.constexpr, BLOCK: tl.constexpr, BLOCK_N: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """PAIRS (B, chunks, G, Q, Q): C_i · B_j of the direction that (i, j) belongs to, once for all heads of a group.

    Without CAUSAL, the diagonal is 0. With CAUSAL, values above the diagonal are undefined.
    """
    chunks, blocks = frames * per_frame, Q // BLOCK
    pid = tl.program_id(0).to(tl.int64)
    column_block, pid = (pid % blocks).to(tl.int32), pid // blocks
    row_block, chunk = (pid % blocks).to(tl.int32), pid // blocks
    pid = tl.program_id(1).to(tl.int64)
    sample, group = pid // groups, pid % groups
    first, length = chunk_span(STARTS, sample, chunk, frames, per_frame, segment_len, Q)
    if tl.maximum(row_block, column_block) * BLOCK >= length:
        return
    p, q = tl.arange(0, BLOCK), tl.arange(0, BLOCK)
    i, j = row_block * BLOCK + p, column_block * BLOCK + q
    shared = sample * b_sample + first * b_token + group * b_head
    pairs = tl.zeros([BLOCK, BLOCK], tl.float32)
    if column_block <= row_block:
        pairs = inner_products(C_F + shared, B_F + shared, b_token, i, j, length, N, BLOCK, BLOCK_N, PRECISION)
    if not CAUSAL:
        if column_block >= row_block:
            above = inner_products(C_B + shared, B_B + shared, b_token, i, j, length, N, BLOCK, BLOCK_N, PRECISION)
            pairs = tl.where(i[:, None] < j[None, :], above, pairs)
        pairs = tl.where(i[:, None] == j[None, :], 0.0, pairs)
    PAIRS += ((sample * chunks + chunk) * groups + group) * Q * Q
    tl.store(PAIRS + i[:, None] * Q + j[None, :], pairs.to(PAIRS.dtype.element_ty))


@triton.autotune(
    configs(*({"num_warps": warps, "num_stages": stages} for warps in (4, 8) for stages in (2, 3))),
    key=["P", "N", "Q", "BLOCK", "CAUSAL", "PRECISION"],
    prune_configs_by={"early_config_prune": wide_enough},
)
@triton.jit
def chunk_scan(
    X, C_F, C_B, D, PAIRS, SCALARS_F, BASES_F, SCALARS_B, BASES_B, STATES, INITIAL, STATES_B, Y, STARTS,
    x_sample, x_token, x_head, b_sample, b_token, b_head, d_sample, d_token, d_head,
    part, frames, per_frame, segment_len, tokens, heads, heads_of_group,
    CAUSAL: tl.constexpr, SHIFT: tl.constexpr, P: tl.constexpr, N: tl.constexpr, Q: tl.constexpr, BLOCK: tl.constexpr,
    BLOCK_P: tl.constexpr, BLOCK_N: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Output y of a block of a chunk's tokens, for one head.

    Earlier tokens of the chunk contribute by the forward direction, later ones by the backward direction, and the
    block's tokens by both, in one tile. Everything before the chunk contributes through STATES, everything after it in
    the backward direction through STATES_B.
    """
    chunks, blocks = frames * per_frame, Q // BLOCK
    pid = tl.program_id(0).to(tl.int64)
    head, pid = pid % heads, pid // heads
    block, chunk = (pid % blocks).to(tl.int32), pid // blocks
    sample = tl.program_id(1).to(tl.int64)
    first, length = chunk_span(STARTS, sample, chunk, frames, per_frame, segment_len, Q)
    if block * BLOCK >= length:
        return

    group = head // heads_of_group
    i, p = block * BLOCK + tl.arange(0, BLOCK), tl.arange(0, BLOCK_P)
    valid = i < length
    shared = sample * b_sample + first * b_token + group * b_head
    X += sample * x_sample + first * x_token + head * x_head
    SCALARS_F += (sample * heads + head) * tokens + first
    BASES_F += ((sample * heads + head) * chunks + chunk) * (blocks + 1)
    PAIRS += ((sample * chunks + chunk) * (heads // heads_of_group) + group) * Q * Q
    PAIRS += i[:, None] * Q + tl.arange(0, BLOCK)[None, :]

    # State that enters the chunk, and earlier blocks.
    state = load_state(STATES, INITIAL, sample, chunk, head, chunks, heads, P, N, BLOCK_P, BLOCK_N, SHIFT)
    c = load_rows(C_F + shared, b_token, i, valid, N, BLOCK_N)
    y = dot(c, tl.trans(state), PRECISION) * tl.exp2(tl.load(BASES_F + block).to(tl.float32))
    for other in range(0, block):
        y += block_output(
            PAIRS, X, x_token, SCALARS_F, BASES_F, part, block, other, length, False, P, BLOCK, BLOCK_P, PRECISION
        )
    y *= edge_decay(SCALARS_F, part, i, valid, BASES_F, True)[:, None]

    # The block on the diagonal.
    below = tl.arange(0, BLOCK)[:, None] > tl.arange(0, BLOCK)[None, :]
    weight = tl.load(PAIRS + block * BLOCK).to(tl.float32)
    dt = load_scalar(SCALARS_F, STEPS, part, i, valid)[None, :]
    if CAUSAL:
        weight *= tile_decay(SCALARS_F, None, part, i, valid, BLOCK) * dt
    else:
        SCALARS_B += (sample * heads + head) * tokens + first
        BASES_B += ((sample * heads + head) * chunks + chunk) * (blocks + 1)
        dt = tl.where(below, dt, load_scalar(SCALARS_B, STEPS, part, i, valid)[None, :])
        weight *= tile_decay(SCALARS_F, SCALARS_B, part, i, valid, BLOCK) * dt
    x = load_rows(X, x_token, i, valid, P, BLOCK_P)
    y += dot(weight, x, PRECISION)
    if D is not None:
        diagonal = tl.load(D + sample * d_sample + first * d_token + head * d_head + i * d_token, mask=valid, other=0.0)
        y += diagonal.to(tl.float32)[:, None] * x

    # Later blocks, and the backward state.
    if not CAUSAL:
        later = tl.zeros([BLOCK, BLOCK_P], tl.float32)
        if STATES_B is not None:
            state = load_state(STATES_B, None, sample, chunk, head, chunks, heads, P, N, BLOCK_P, BLOCK_N, 0)
            c = load_rows(C_B + shared, b_token, i, valid, N, BLOCK_N)
            later = dot(c, tl.trans(state), PRECISION) * block_decay(BASES_B, block, blocks, True)
        for other in range(block + 1, tl.cdiv(length, BLOCK)):
            later += block_output(
                PAIRS, X, x_token, SCALARS_B, BASES_B, part, block, other, length, True, P, BLOCK, BLOCK_P, PRECISION
            )
        y += later * edge_decay(SCALARS_B, part, i, valid, BASES_B + block, False)[:, None]

    Y += ((sample * tokens + first) * heads + head) * P
    mask = valid[:, None] & (p < P)[None, :]
    tl.store(Y + i[:, None] * (heads * P) + p[None, :], y.to(Y.dtype.element_ty), mask=mask)


@triton.jit
def block_output(
    PAIRS, X, x_token, SCALARS, BASES, part, row_block, column_block, length, BACKWARD: tl.constexpr,
    P: tl.constexpr, BLOCK: tl.constexpr, BLOCK_P: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Contribution of a block of columns to a block of rows, without the decay within the row block."""
    j = column_block * BLOCK + tl.arange(0, BLOCK)
    valid_j = j < length
    weight = load_scalar(SCALARS, WRITES, part, j, valid_j) * block_decay(BASES, row_block, column_block, BACKWARD)
    weight = tl.load(PAIRS + column_block * BLOCK).to(tl.float32) * weight[None, :]
    return dot(weight, load_rows(X, x_token, j, valid_j, P, BLOCK_P), PRECISION)
