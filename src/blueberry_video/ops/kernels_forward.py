"""The video scan's forward in Triton: sums of log-decays, a walk that carries the state, and the outputs.

A sample is cut into chunks of Q tokens that begin where its frames begin: chunk k of a frame holds its tokens kQ, kQ+1,
… as far as they go, none if the frame ends before. Nothing is padded in memory. With the log-decays a of a chunk:

    forward leg    s_i = sum of a_k over k ≤ i    what j writes reaches i > j times exp(s_i - s_j)
    backward leg   s_i = sum of a_k over k < i    what j writes reaches i < j times exp(s_j - s_i)

A chunk is cut into blocks, and BLOCK x BLOCK pairs of tokens are a tile. The sums begin anew in each block, and BASES
has in float64 what they begin from: a difference of two is then exact to 1e-4 at the worst decays. Off the diagonal a
pair's decay is one number of its row times one of its column, to and from a token between the two blocks, none above 1
while dt ≥ 0: only tiles on the diagonal take an exponential a pair.

Pointers are upper case and None for what is absent; what has no strides is contiguous. What lies before a chunk is
counted in int64. A LEG (3, B, H, L), ``part`` numbers each, has SUMS, the s inside a block in powers of two, STEPS, dt,
and WRITES, dt_j times the decay to where j's block is left. PAIRS (B, chunks, G, Q, Q) has the products C_i · B_j.
PRECISION is of a product's operands: "bf16", "tf32", or "tf32x3", three products that make one of float32.
"""

import os
from typing import Any

import triton
import triton.language as tl

LOG2_E = tl.constexpr(1.4426950408889634)
LEAST = tl.constexpr(-30.0)  # of a log-decay: exp(-30) of a float32 is nothing beside it, and sums stay exact
SUMS, STEPS, WRITES = (tl.constexpr(field) for field in range(3))
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"


def configs(*choices: dict[str, int]) -> list[triton.Config]:
    """For the autotuner, which times them on a GPU; the interpreter, which cannot, takes the first."""
    options = ("num_warps", "num_stages")
    return [
        triton.Config({k: v for k, v in choice.items() if k not in options}, **{k: choice[k] for k in options})
        for choice in (choices[:1] if INTERPRETED else choices)
    ]


def wide_enough(candidates: list[triton.Config], arguments: dict[str, Any], **constants: Any) -> list[triton.Config]:
    """Those with a warp for each 16 rows of a tile at least: with fewer, 128 rows do not fit the registers."""
    block = {**arguments, **constants}["BLOCK"]
    return [candidate for candidate in candidates if candidate.num_warps * 16 >= block * (block > 64)]


@triton.jit
def chunk_span(STARTS, sample, chunk, frames, per_frame, segment_len, Q: tl.constexpr):
    """First token and number of tokens of a chunk; STARTS (B, T + 1) of ragged frames."""
    frame, within = chunk // per_frame, chunk % per_frame * Q
    if STARTS is None:
        start, length = frame * segment_len, segment_len
    else:
        start = tl.load(STARTS + sample * (frames + 1) + frame)
        length = tl.load(STARTS + sample * (frames + 1) + frame + 1) - start
    return start + within, tl.minimum(tl.maximum(length - within, 0), Q).to(tl.int32)


@triton.jit
def load_rows(ROWS, stride, rows, inside, WIDTH: tl.constexpr, BLOCK_W: tl.constexpr):
    """(rows, BLOCK_W) of a matrix, 0 outside."""
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
    """The state (P, N) that enters a chunk. With SHIFT = 1 STATES has what leaves each, INITIAL what enters the 1st."""
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
    """a b in float32."""
    if PRECISION == "bf16":
        product = tl.dot(a.to(tl.bfloat16), b.to(tl.bfloat16))
    else:
        product = tl.dot(a.to(tl.float32), b.to(tl.float32), input_precision=PRECISION)
    return product


@triton.jit
def load_number(LEG, FIELD: tl.constexpr, part, rows, inside):
    return tl.load(LEG + tl.cast(part, tl.int64) * FIELD + rows, mask=inside, other=0.0)


@triton.jit
def growth(exponent, inside):
    """exp of log-decays; 0 outside, where no exponential is taken."""
    return tl.exp2(tl.where(inside, exponent.to(tl.float32), float("-inf")))


@triton.jit
def edge_decay(LEG, part, rows, inside, BASES, BEGINNING: tl.constexpr):
    """Between tokens of a block and where it begins or ends; BASES points to the block's."""
    exponent = load_number(LEG, SUMS, part, rows, inside)
    if not BEGINNING:
        exponent = (tl.load(BASES + 1) - tl.load(BASES)).to(tl.float32) - exponent
    return growth(exponent, inside)


@triton.jit
def block_decay(BASES, row_block, column_block, BACKWARD: tl.constexpr):
    """Of all blocks between two: from where the columns' is left to where the rows' is entered."""
    if BACKWARD:
        exponent = tl.load(BASES + column_block) - tl.load(BASES + row_block + 1)
    else:
        exponent = tl.load(BASES + row_block) - tl.load(BASES + column_block + 1)
    return tl.exp2(exponent.to(tl.float32))


@triton.jit
def differences(LEG, part, rows, inside):
    """(p, q): s_p - s_q of the tokens of a block, where tokens that are not there lie behind all others, at -inf."""
    sums = tl.load(LEG + tl.cast(part, tl.int64) * SUMS + rows, mask=inside, other=float("-inf"))
    return sums[:, None] - sums[None, :]


@triton.jit
def tile_decay(BELOW, ABOVE, part, rows, inside, BLOCK: tl.constexpr):
    """(p, q) of one block: exp(s_p - s_q) of BELOW for p > q, exp(s_q - s_p) of ABOVE for p < q, and 1 for p = q.

    0 for the half of a leg that is None. NaN may stand where neither p nor q is inside.
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
def decay_sums(
    DT, A, LEG, BASES, STARTS,
    dt_sample, dt_token, dt_head, a_sample, a_token, a_head,
    part, frames, per_frame, segment_len, tokens, heads,
    BACKWARD: tl.constexpr, Q: tl.constexpr, BLOCK: tl.constexpr, HEADS: tl.constexpr,
):  # fmt: skip
    """LEG of one direction, and BASES (B, H, chunks, blocks + 1) with the sum of the whole chunk at the end."""
    chunks, blocks = frames * per_frame, Q // BLOCK
    pid = tl.program_id(0).to(tl.int64)
    sample, chunk = pid // chunks, pid % chunks
    first, length = chunk_span(STARTS, sample, chunk, frames, per_frame, segment_len, Q)
    h = (tl.program_id(1) * HEADS + tl.arange(0, HEADS)).to(tl.int64)[None, :]
    there = h < heads
    BASES += ((sample * heads + h) * chunks + chunk) * (blocks + 1)
    base, part = tl.zeros([1, HEADS], tl.float64), tl.cast(part, tl.int64)
    for block in range(blocks):
        i = block * BLOCK + tl.arange(0, BLOCK)[:, None]
        rows, inside = first + i, (i < length) & there
        a = tl.load(A + sample * a_sample + rows * a_token + h * a_head, mask=inside, other=0.0).to(tl.float64)
        dt = tl.load(DT + sample * dt_sample + rows * dt_token + h * dt_head, mask=inside, other=0.0).to(tl.float32)
        a = tl.where(a < LEAST, LEAST, a) * LOG2_E  # written so that NaN stays NaN
        sums, total = tl.cumsum(a, 0), tl.sum(a, 0)[None, :]
        if BACKWARD:
            sums -= a
            leaves = growth(sums, inside)
        else:
            leaves = growth(total - sums, inside)
        at = (sample * heads + h) * tokens + rows
        tl.store(LEG + part * SUMS + at, sums.to(tl.float32), mask=inside)
        tl.store(LEG + part * STEPS + at, dt, mask=inside)
        tl.store(LEG + part * WRITES + at, leaves * dt, mask=inside)
        tl.store(BASES + block, base, mask=there)
        base += total
    tl.store(BASES + blocks, base, mask=there)


@triton.autotune(
    configs(
        {"STRIP": 32, "num_warps": 8, "num_stages": 2},  # the one whose float32 fits the registers
        {"STRIP": 64, "num_warps": 4, "num_stages": 3},
        {"STRIP": 64, "num_warps": 8, "num_stages": 3},
        {"STRIP": 128, "num_warps": 8, "num_stages": 3},
    ),
    key=["P", "N", "Q", "GRADIENT", "PER_FRAME", "PRECISION"],
)
@triton.jit
def walk(
    U, V, LEG, BASES, INITIAL, ADDED, ENTERING, ENTERING_FIRST, BEFORE, BEHIND, LAST, PRODUCTS, STARTS,
    u_sample, u_token, u_head, v_sample, v_token, v_head,
    part, frames, per_frame, segment_len, tokens, heads, heads_of_group,
    BACKWARD: tl.constexpr, GRADIENT: tl.constexpr, PER_FRAME: tl.constexpr, SHIFT: tl.constexpr,
    P: tl.constexpr, N: tl.constexpr, Q: tl.constexpr, BLOCK: tl.constexpr, STRIP: tl.constexpr,
    BLOCK_P: tl.constexpr, BLOCK_N: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Carries a state from chunk to chunk: s becomes exp(sum of a) s + sum over the tokens of weight u ⊗ v.

    It is the state itself with u = x, v = B and the weight dt times the decay to where the chunk is left; and with
    GRADIENT, against the leg's direction, its gradient with u = dy, v = C and the decay from where it is entered. Over
    all chunks of a sample, or over those of each frame (PER_FRAME). What is None is not asked for:

        INITIAL (B, T or 1, H, P, N)    the state to begin with, zero if None
        ADDED (B, T, H, P, N)           enters behind each frame
        BEFORE (B, chunks, H, P, N)     the state before each chunk, in the walk's order
        BEHIND (B, T, H, P, N)          the state behind each frame
        LAST (B, T or 1, H, P, N)       the state at the end
        PRODUCTS (B, chunks, H, tiles)  exp(sum of a) <state before, ENTERING>: with GRADIENT, that sum's gradient
    """
    chunks, blocks = frames * per_frame, Q // BLOCK
    tiles = tl.cdiv(P, BLOCK_P)
    pid = tl.program_id(0).to(tl.int64)
    tile, pid = pid % tiles, pid // tiles
    head, pid = pid % heads, pid // heads
    walks, steps = 1, chunks
    if PER_FRAME:
        walks, steps = frames, per_frame
    sample, frame = pid // walks, pid % walks
    group = head // heads_of_group

    p, n = tile * BLOCK_P + tl.arange(0, BLOCK_P), tl.arange(0, BLOCK_N)
    cells = p[None, :] * N + n[:, None]  # (N, P): so the longer side is the one that tensor cores take whole
    inside = (p < P)[None, :] & (n < N)[:, None]
    state = tl.zeros([BLOCK_N, BLOCK_P], tl.float32)
    if INITIAL is not None:
        state += tl.load(INITIAL + (pid * heads + head) * P * N + cells, mask=inside, other=0.0)
    U += sample * u_sample + head * u_head + tile * BLOCK_P
    V += sample * v_sample + group * v_head
    LEG += (sample * heads + head) * tokens
    BASES += (sample * heads + head) * chunks * (blocks + 1)

    for step in range(steps):
        chunk = frame * steps + step
        if BACKWARD != GRADIENT:
            chunk = frame * steps + steps - 1 - step
        first, length = chunk_span(STARTS, sample, chunk, frames, per_frame, segment_len, Q)
        of_chunk = ((sample * chunks + chunk) * heads + head) * P * N + cells
        of_frame = ((sample * frames + chunk // per_frame) * heads + head) * P * N + cells
        ends_frame = chunk % per_frame == per_frame - 1
        if ADDED is not None:  # noqa: SIM102 (this is known when compiling, the other is not)
            if ends_frame:
                state += tl.load(ADDED + of_frame, mask=inside, other=0.0)
        if BEFORE is not None:
            tl.store(BEFORE + of_chunk, state, mask=inside)
        total = tl.load(BASES + chunk * (blocks + 1) + blocks)
        decay = tl.exp2(total.to(tl.float32))
        if PRODUCTS is not None:
            entering = tl.zeros([BLOCK_N, BLOCK_P], tl.float32)
            if chunk >= SHIFT:
                entering = tl.load(ENTERING + of_chunk - SHIFT * heads * P * N, mask=inside, other=0.0)
            elif ENTERING_FIRST is not None:
                entering = tl.load(ENTERING_FIRST + (sample * heads + head) * P * N + cells, mask=inside, other=0.0)
            product = decay * tl.sum(tl.sum(entering * state, 1), 0)
            tl.store(PRODUCTS + ((sample * chunks + chunk) * heads + head) * tiles + tile, product)
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
            sums = base + load_number(LEG + first, SUMS, part, i, valid)
            if BACKWARD == GRADIENT:
                sums = total - sums
            weight = growth(sums, valid)
            if not GRADIENT:
                weight *= load_number(LEG + first, STEPS, part, i, valid)
            state += dot(tl.trans(v), u * weight[:, None], PRECISION)
        if BEHIND is not None:  # noqa: SIM102
            if ends_frame:
                tl.store(BEHIND + of_frame, state, mask=inside)
    if LAST is not None:
        tl.store(LAST + (pid * heads + head) * P * N + cells, state, mask=inside)


@triton.jit
def inner_products(
    C, B, stride, i, j, length, N: tl.constexpr, BLOCK: tl.constexpr, BLOCK_N: tl.constexpr, PRECISION: tl.constexpr
):
    """Tile of C_i · B_j, a slice of N after the other: whole rows of float32 would not fit the registers."""
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
def products(
    B_F, C_F, B_B, C_B, PAIRS, STARTS, b_sample, b_token, b_head, frames, per_frame, segment_len, groups,
    CAUSAL: tl.constexpr, N: tl.constexpr, Q: tl.constexpr, BLOCK: tl.constexpr, BLOCK_N: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """PAIRS (B, chunks, G, Q, Q): C_i · B_j of the leg that (i, j) belongs to, once for all heads of a group.

    Without CAUSAL the diagonal is 0; with it what is above stays unwritten or undefined.
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
def outputs(
    X, C_F, C_B, D, PAIRS, LEG_F, BASES_F, LEG_B, BASES_B, STATES, INITIAL, STATES_B, Y, STARTS,
    x_sample, x_token, x_head, b_sample, b_token, b_head, d_sample, d_token, d_head,
    part, frames, per_frame, segment_len, tokens, heads, heads_of_group,
    CAUSAL: tl.constexpr, SHIFT: tl.constexpr, P: tl.constexpr, N: tl.constexpr, Q: tl.constexpr, BLOCK: tl.constexpr,
    BLOCK_P: tl.constexpr, BLOCK_N: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """y of a block of a chunk's tokens, for one head.

    The chunk's tokens before the block reach it by the forward leg, those behind it by the backward leg, its own by
    both in one tile; all frames before through STATES, and what enters from behind the frame's end through STATES_B.
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
    LEG_F += (sample * heads + head) * tokens + first
    BASES_F += ((sample * heads + head) * chunks + chunk) * (blocks + 1)
    PAIRS += ((sample * chunks + chunk) * (heads // heads_of_group) + group) * Q * Q
    PAIRS += i[:, None] * Q + tl.arange(0, BLOCK)[None, :]

    # What enters the chunk, and the blocks before this one.
    state = load_state(STATES, INITIAL, sample, chunk, head, chunks, heads, P, N, BLOCK_P, BLOCK_N, SHIFT)
    c = load_rows(C_F + shared, b_token, i, valid, N, BLOCK_N)
    y = dot(c, tl.trans(state), PRECISION) * tl.exp2(tl.load(BASES_F + block).to(tl.float32))
    for other in range(0, block):
        y += from_block(
            PAIRS, X, x_token, LEG_F, BASES_F, part, block, other, length, False, P, BLOCK, BLOCK_P, PRECISION
        )
    y *= edge_decay(LEG_F, part, i, valid, BASES_F, True)[:, None]

    # The block itself.
    below = tl.arange(0, BLOCK)[:, None] > tl.arange(0, BLOCK)[None, :]
    weight = tl.load(PAIRS + block * BLOCK).to(tl.float32)
    dt = load_number(LEG_F, STEPS, part, i, valid)[None, :]
    if CAUSAL:
        weight *= tile_decay(LEG_F, None, part, i, valid, BLOCK) * dt
    else:
        LEG_B += (sample * heads + head) * tokens + first
        BASES_B += ((sample * heads + head) * chunks + chunk) * (blocks + 1)
        dt = tl.where(below, dt, load_number(LEG_B, STEPS, part, i, valid)[None, :])
        weight *= tile_decay(LEG_F, LEG_B, part, i, valid, BLOCK) * dt
    x = load_rows(X, x_token, i, valid, P, BLOCK_P)
    y += dot(weight, x, PRECISION)
    if D is not None:
        diagonal = tl.load(D + sample * d_sample + first * d_token + head * d_head + i * d_token, mask=valid, other=0.0)
        y += diagonal.to(tl.float32)[:, None] * x

    # The blocks behind it, and what enters from behind the frame's end.
    if not CAUSAL:
        behind = tl.zeros([BLOCK, BLOCK_P], tl.float32)
        if STATES_B is not None:
            state = load_state(STATES_B, None, sample, chunk, head, chunks, heads, P, N, BLOCK_P, BLOCK_N, 0)
            c = load_rows(C_B + shared, b_token, i, valid, N, BLOCK_N)
            behind = dot(c, tl.trans(state), PRECISION) * block_decay(BASES_B, block, blocks, True)
        for other in range(block + 1, tl.cdiv(length, BLOCK)):
            behind += from_block(
                PAIRS, X, x_token, LEG_B, BASES_B, part, block, other, length, True, P, BLOCK, BLOCK_P, PRECISION
            )
        y += behind * edge_decay(LEG_B, part, i, valid, BASES_B + block, False)[:, None]

    Y += ((sample * tokens + first) * heads + head) * P
    mask = valid[:, None] & (p < P)[None, :]
    tl.store(Y + i[:, None] * (heads * P) + p[None, :], y.to(Y.dtype.element_ty), mask=mask)


@triton.jit
def from_block(
    PAIRS, X, x_token, LEG, BASES, part, row_block, column_block, length, BACKWARD: tl.constexpr,
    P: tl.constexpr, BLOCK: tl.constexpr, BLOCK_P: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """What a block of columns gives to one of rows, but for the rows' decay since its edge."""
    j = column_block * BLOCK + tl.arange(0, BLOCK)
    there = j < length
    weight = load_number(LEG, WRITES, part, j, there) * block_decay(BASES, row_block, column_block, BACKWARD)
    weight = tl.load(PAIRS + column_block * BLOCK).to(tl.float32) * weight[None, :]
    return dot(weight, load_rows(X, x_token, j, there, P, BLOCK_P), PRECISION)
