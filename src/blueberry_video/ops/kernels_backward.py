"""Backward Triton kernels of the scan: gradients of the products of pairs, of x, B and C, and of the log-decays.

Names and layouts are those of :mod:`blueberry_video.ops.kernels_forward`. The gradient of M_ij = C_i · B_j e_ij dt_j,
with the decay e_ij, is m_ij = dy_i · x_j; that of C_i · B_j is the sum of m_ij e_ij dt_j over the heads of a group. A
log-decay a_k is part of e_ij for all pairs with k between j and i, so its gradient is the sum of z_ij = m_ij M_ij over
these pairs. It is summed as such, tile by tile; differences of cumulative sums over the chunk would cancel.
"""

import triton
import triton.language as tl

from blueberry_video.ops.kernels_forward import (
    STEPS,
    WRITES,
    block_decay,
    chunk_span,
    configs,
    dot,
    edge_decay,
    load_rows,
    load_scalar,
    load_state,
    tile_decay,
)

CONFIGS = configs(*({"num_warps": warps, "num_stages": stages} for warps in (8, 4) for stages in (2, 3)))
STEPS_F, STEPS_B, DECAYS_F, DECAYS_B = (tl.constexpr(field) for field in range(4))  # fields of DIAGONAL


@triton.jit
def off_diagonal(
    PAIRS, DY, X, SCALARS, BASES, COLUMNS, ROWS, x_token, x_head, part, bases, tokens, heads, share, row_block,
    column_block, length, BACKWARD: tl.constexpr, P: tl.constexpr, Q: tl.constexpr, BLOCK: tl.constexpr,
    BLOCK_P: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Gradient of a tile's C_i · B_j, summed over ``share`` heads; sums by column and row go to COLUMNS and ROWS."""
    i, j = row_block * BLOCK + tl.arange(0, BLOCK), column_block * BLOCK + tl.arange(0, BLOCK)
    valid, valid_j = i < length, j < length
    pairs = tl.load(PAIRS + i[:, None] * Q + j[None, :]).to(tl.float32)
    d_pairs = tl.zeros([BLOCK, BLOCK], tl.float32)
    for h in range(share):
        head_tokens = tl.cast(h, tl.int64) * tokens
        dy = load_rows(DY + h * P, heads * P, i, valid, P, BLOCK_P)
        x = load_rows(X + tl.cast(h, tl.int64) * x_head, x_token, j, valid_j, P, BLOCK_P)
        to_i = edge_decay(SCALARS + head_tokens, part, i, valid, BASES + h * bases + row_block, not BACKWARD)
        to_i *= block_decay(BASES + h * bases, row_block, column_block, BACKWARD)
        leaves = edge_decay(SCALARS + head_tokens, part, j, valid_j, BASES + h * bases + column_block, BACKWARD)
        dt = load_scalar(SCALARS + head_tokens, STEPS, part, j, valid_j)
        slope = dot(dy, tl.trans(x), PRECISION) * to_i[:, None] * leaves[None, :]
        tl.store(COLUMNS + head_tokens + j, tl.sum(slope * pairs, 0), mask=valid_j)
        slope *= dt[None, :]
        tl.store(ROWS + head_tokens + i, tl.sum(slope * pairs, 1), mask=valid)
        d_pairs += slope
    return d_pairs


@triton.jit
def on_diagonal(
    PAIRS, DY, X, SCALARS_F, SCALARS_B, DIAGONAL, x_token, x_head, part, tokens, heads, share, block, length,
    CAUSAL: tl.constexpr, P: tl.constexpr, Q: tl.constexpr, BLOCK: tl.constexpr, BLOCK_P: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """As off_diagonal, for a tile on the diagonal; its part of ddt and da of both directions goes to DIAGONAL."""
    i = block * BLOCK + tl.arange(0, BLOCK)
    valid = i < length
    below = tl.arange(0, BLOCK)[:, None] > tl.arange(0, BLOCK)[None, :]
    above = tl.arange(0, BLOCK)[:, None] < tl.arange(0, BLOCK)[None, :]
    pairs = tl.load(PAIRS + i[:, None] * Q + i[None, :]).to(tl.float32)
    d_pairs = tl.zeros([BLOCK, BLOCK], tl.float32)
    part = tl.cast(part, tl.int64)
    for h in range(share):
        head_tokens = tl.cast(h, tl.int64) * tokens
        dy = load_rows(DY + h * P, heads * P, i, valid, P, BLOCK_P)
        x = load_rows(X + tl.cast(h, tl.int64) * x_head, x_token, i, valid, P, BLOCK_P)
        slope = dot(dy, tl.trans(x), PRECISION)
        dt = load_scalar(SCALARS_F + head_tokens, STEPS, part, i, valid)[None, :]
        if CAUSAL:
            slope *= tile_decay(SCALARS_F + head_tokens, None, part, i, valid, BLOCK)
            tl.store(DIAGONAL + STEPS_F * part + head_tokens + i, tl.sum(slope * pairs, 0), mask=valid)
            slope *= dt
        else:
            slope *= tile_decay(SCALARS_F + head_tokens, SCALARS_B + head_tokens, part, i, valid, BLOCK)
            steps = slope * pairs
            tl.store(DIAGONAL + STEPS_F * part + head_tokens + i, tl.sum(tl.where(below, steps, 0.0), 0), mask=valid)
            tl.store(DIAGONAL + STEPS_B * part + head_tokens + i, tl.sum(tl.where(above, steps, 0.0), 0), mask=valid)
            slope *= tl.where(below, dt, load_scalar(SCALARS_B + head_tokens, STEPS, part, i, valid)[None, :])
            until = tl.cumsum(tl.where(above, slope * pairs, 0.0), 0)  # (k, j): over all i ≤ k
            tl.store(DIAGONAL + DECAYS_B * part + head_tokens + i, tl.sum(tl.where(above, until, 0.0), 1), mask=valid)
        since = tl.cumsum(tl.where(below, slope * pairs, 0.0), 0, reverse=True)  # (k, j): over all i ≥ k
        tl.store(DIAGONAL + DECAYS_F * part + head_tokens + i, tl.sum(tl.where(below, since, 0.0), 1), mask=valid)
        d_pairs += slope
    keep = valid[:, None] & valid[None, :]
    if not CAUSAL:
        keep = keep & (below | above)
    return tl.where(keep, d_pairs, 0.0)


@triton.autotune(CONFIGS, key=["P", "Q", "BLOCK", "CAUSAL", "PRECISION"])
@triton.jit
def pair_gradients(
    X, DY, PAIRS, D_PAIRS, SCALARS_F, BASES_F, SCALARS_B, BASES_B, COLUMNS, ROWS, DIAGONAL, STARTS,
    x_sample, x_token, x_head, part, batch, splits, frames, per_frame, segment_len, tokens, heads, heads_of_group,
    CAUSAL: tl.constexpr, P: tl.constexpr, Q: tl.constexpr, BLOCK: tl.constexpr, BLOCK_P: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """D_PAIRS (splits, B, chunks, G, Q, Q): gradient of PAIRS for a split of the heads; also, each (B, H, L):

    COLUMNS[I], of j in a block other than I    sum over i in block I of m_ij e_ij C_i · B_j, which is z_ij / dt_j
    ROWS[J], of i in a block other than J       sum over j in block J of z_ij
    DIAGONAL                                    STEPS: as COLUMNS, over i in j's block; DECAYS: over pairs in k's block
    """
    chunks, blocks, groups = frames * per_frame, Q // BLOCK, heads // heads_of_group
    pid = tl.program_id(0).to(tl.int64)
    column_block, pid = (pid % blocks).to(tl.int32), pid // blocks
    row_block, chunk = (pid % blocks).to(tl.int32), pid // blocks
    pid = tl.program_id(1).to(tl.int64)
    split, pid = pid % splits, pid // splits
    sample, group = pid // groups, pid % groups
    first, length = chunk_span(STARTS, sample, chunk, frames, per_frame, segment_len, Q)
    if tl.maximum(row_block, column_block) * BLOCK >= length:
        return
    share = heads_of_group // splits
    head, bases = group * heads_of_group + split * share, chunks * (blocks + 1)
    head_tokens = (sample * heads + head) * tokens + first
    head_bases = ((sample * heads + head) * chunks + chunk) * (blocks + 1)
    group_pairs = ((sample * chunks + chunk) * groups + group) * Q * Q
    PAIRS += group_pairs
    X += sample * x_sample + first * x_token + head * x_head
    DY += ((sample * tokens + first) * heads + head) * P
    COLUMNS += row_block.to(tl.int64) * part + head_tokens
    ROWS += column_block.to(tl.int64) * part + head_tokens
    d_pairs = tl.zeros([BLOCK, BLOCK], tl.float32)
    if column_block < row_block:
        d_pairs = off_diagonal(
            PAIRS, DY, X, SCALARS_F + head_tokens, BASES_F + head_bases, COLUMNS, ROWS, x_token, x_head, part, bases,
            tokens, heads, share, row_block, column_block, length, False, P, Q, BLOCK, BLOCK_P, PRECISION
        )  # fmt: skip
    elif column_block == row_block:
        d_pairs = on_diagonal(
            PAIRS, DY, X, SCALARS_F + head_tokens, None if CAUSAL else SCALARS_B + head_tokens, DIAGONAL + head_tokens,
            x_token, x_head, part, tokens, heads, share, row_block, length, CAUSAL, P, Q, BLOCK, BLOCK_P, PRECISION
        )  # fmt: skip
    elif not CAUSAL:
        d_pairs = off_diagonal(
            PAIRS, DY, X, SCALARS_B + head_tokens, BASES_B + head_bases, COLUMNS, ROWS, x_token, x_head, part, bases,
            tokens, heads, share, row_block, column_block, length, True, P, Q, BLOCK, BLOCK_P, PRECISION
        )  # fmt: skip
    i, j = row_block * BLOCK + tl.arange(0, BLOCK), column_block * BLOCK + tl.arange(0, BLOCK)
    D_PAIRS += split * batch * chunks * groups * Q * Q + group_pairs
    tl.store(D_PAIRS + i[:, None] * Q + j[None, :], d_pairs.to(D_PAIRS.dtype.element_ty))


@triton.jit
def direction_input_gradient(
    B, D_STATES, PAIRS, DY, SCALARS, BASES, STATE_DDT, part, sample, chunk, head, chunks, heads, x, j, valid_j, b_token,
    block, begin, end, length, BACKWARD: tl.constexpr, P: tl.constexpr, N: tl.constexpr, Q: tl.constexpr,
    BLOCK: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_N: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dx of a block of columns from rows in blocks ``begin`` to ``end`` and the state that leaves the chunk."""
    dx = tl.zeros([BLOCK, BLOCK_P], tl.float32)
    if D_STATES is not None:
        state = load_state(D_STATES, None, sample, chunk, head, chunks, heads, P, N, BLOCK_P, BLOCK_N, 0)
        b = load_rows(B, b_token, j, valid_j, N, BLOCK_N)
        if BACKWARD:
            decay = tl.exp2(tl.load(BASES + block).to(tl.float32))
        else:
            decay = block_decay(BASES, Q // BLOCK, block, False)
        dx = dot(b, tl.trans(state), PRECISION) * decay
        leaves = edge_decay(SCALARS, part, j, valid_j, BASES + block, BACKWARD)
        tl.store(STATE_DDT + j, tl.sum(x * dx, 1) * leaves, mask=valid_j)
    for other in range(begin, end):
        i = other * BLOCK + tl.arange(0, BLOCK)
        to_i = edge_decay(SCALARS, part, i, i < length, BASES + other, not BACKWARD)
        to_i *= block_decay(BASES, other, block, BACKWARD)
        pairs = tl.load(PAIRS + i[:, None] * Q + j[None, :]).to(tl.float32) * to_i[:, None]
        dy = load_rows(DY, heads * P, i, i < length, P, BLOCK_P)
        dx += dot(tl.trans(pairs), dy, PRECISION)
    return dx * load_scalar(SCALARS, WRITES, part, j, valid_j)[:, None]


@triton.autotune(CONFIGS, key=["P", "N", "Q", "BLOCK", "CAUSAL", "PRECISION"])
@triton.jit
def input_gradients(
    X, B_F, B_B, D, PAIRS, SCALARS_F, BASES_F, SCALARS_B, BASES_B, DY, D_STATES, D_STATES_B, DX, DD, STATE_DDT_F,
    STATE_DDT_B, STARTS, x_sample, x_token, x_head, b_sample, b_token, b_head, d_sample, d_token, d_head,
    part, frames, per_frame, segment_len, tokens, heads, heads_of_group,
    CAUSAL: tl.constexpr, P: tl.constexpr, N: tl.constexpr, Q: tl.constexpr, BLOCK: tl.constexpr,
    BLOCK_P: tl.constexpr, BLOCK_N: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dx and dD of a block of tokens, for one head; STATE_DDT (B, H, L): ddt from the state that leaves the chunk."""
    chunks, blocks = frames * per_frame, Q // BLOCK
    pid = tl.program_id(0).to(tl.int64)
    head, pid = pid % heads, pid // heads
    block, chunk = (pid % blocks).to(tl.int32), pid // blocks
    sample = tl.program_id(1).to(tl.int64)
    first, length = chunk_span(STARTS, sample, chunk, frames, per_frame, segment_len, Q)
    if block * BLOCK >= length:
        return

    group = head // heads_of_group
    j, p = block * BLOCK + tl.arange(0, BLOCK), tl.arange(0, BLOCK_P)
    valid_j = j < length
    head_tokens = (sample * heads + head) * tokens + first
    head_bases = ((sample * heads + head) * chunks + chunk) * (blocks + 1)
    of_tokens = (sample * tokens + first) * heads + head
    shared = sample * b_sample + first * b_token + group * b_head
    PAIRS += ((sample * chunks + chunk) * (heads // heads_of_group) + group) * Q * Q
    DY += of_tokens * P
    x = load_rows(X + sample * x_sample + first * x_token + head * x_head, x_token, j, valid_j, P, BLOCK_P)
    dx = direction_input_gradient(
        B_F + shared, D_STATES, PAIRS, DY, SCALARS_F + head_tokens, BASES_F + head_bases, STATE_DDT_F + head_tokens,
        part, sample, chunk, head, chunks, heads, x, j, valid_j, b_token, block, block + 1, tl.cdiv(length, BLOCK),
        length, False, P, N, Q, BLOCK, BLOCK_P, BLOCK_N, PRECISION
    )  # fmt: skip
    if not CAUSAL:
        STATE_DDT = STATE_DDT_F
        if D_STATES_B is not None:
            STATE_DDT = STATE_DDT_B + head_tokens
        dx += direction_input_gradient(
            B_B + shared, D_STATES_B, PAIRS, DY, SCALARS_B + head_tokens, BASES_B + head_bases, STATE_DDT, part,
            sample, chunk, head, chunks, heads, x, j, valid_j, b_token, block, 0, block, length,
            True, P, N, Q, BLOCK, BLOCK_P, BLOCK_N, PRECISION
        )  # fmt: skip

    # The block on the diagonal.
    dy = load_rows(DY, heads * P, j, valid_j, P, BLOCK_P)
    weight = tl.trans(tl.load(PAIRS + j[:, None] * Q + j[None, :]).to(tl.float32))  # (j, i)
    dt = load_scalar(SCALARS_F + head_tokens, STEPS, part, j, valid_j)[:, None]
    if CAUSAL:
        weight *= tile_decay(None, SCALARS_F + head_tokens, part, j, valid_j, BLOCK) * dt
    else:
        before = tl.arange(0, BLOCK)[:, None] < tl.arange(0, BLOCK)[None, :]
        dt = tl.where(before, dt, load_scalar(SCALARS_B + head_tokens, STEPS, part, j, valid_j)[:, None])
        weight *= tile_decay(SCALARS_B + head_tokens, SCALARS_F + head_tokens, part, j, valid_j, BLOCK) * dt
    dx += dot(weight, dy, PRECISION)
    if D is not None:
        D += sample * d_sample + first * d_token + head * d_head
        diagonal = tl.load(D + j * d_token, mask=valid_j, other=0.0)
        dx += diagonal.to(tl.float32)[:, None] * dy
        own = tl.sum(x.to(tl.float32) * dy, 1)
        tl.store(DD + of_tokens + j * heads, own.to(DD.dtype.element_ty), mask=valid_j)
    at = of_tokens * P + j[:, None] * (heads * P) + p[None, :]
    tl.store(DX + at, dx.to(DX.dtype.element_ty), mask=valid_j[:, None] & (p < P)[None, :])


@triton.autotune(CONFIGS, key=["P", "N", "Q", "BLOCK", "OF_C", "PRECISION"])
@triton.jit
def shared_gradients(
    U, OWN, OTHER, D_PAIRS, SCALARS, BASES, STATES, INITIAL, GRADIENT, D_ENTRY, STARTS,
    u_sample, u_token, u_head, b_sample, b_token, b_head, part, batch, splits, frames, per_frame, segment_len, tokens,
    heads, heads_of_group,
    OF_C: tl.constexpr, BACKWARD: tl.constexpr, SHIFT: tl.constexpr, P: tl.constexpr, N: tl.constexpr, Q: tl.constexpr,
    BLOCK: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_N: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """GRADIENT (splits, B, L, G, N) of C (OF_C) or B, of a block of tokens and a split of the heads of its group.

    For C: OWN is C, OTHER B, U dy, and STATES enter the chunks; D_ENTRY (B, H, L) is the gradient of each token's
    log-decay from the chunk's entry. For B: OWN is B, OTHER C, U x, and STATES are gradients of those that leave.
    """
    chunks, blocks, groups = frames * per_frame, Q // BLOCK, heads // heads_of_group
    pid = tl.program_id(0).to(tl.int64)
    block, chunk = (pid % blocks).to(tl.int32), pid // blocks
    pid = tl.program_id(1).to(tl.int64)
    split, pid = pid % splits, pid // splits
    sample, group = pid // groups, pid % groups
    first, length = chunk_span(STARTS, sample, chunk, frames, per_frame, segment_len, Q)
    if block * BLOCK >= length:
        return

    rows, n = block * BLOCK + tl.arange(0, BLOCK), tl.arange(0, BLOCK_N)
    valid = rows < length
    shared = sample * b_sample + first * b_token + group * b_head
    share = heads_of_group // splits
    gradient = tl.zeros([BLOCK, BLOCK_N], tl.float32)
    if STATES is not None:
        own = load_rows(OWN + shared, b_token, rows, valid, N, BLOCK_N)
        for h in range(share):
            head = group * heads_of_group + split * share + h
            head_tokens = (sample * heads + head) * tokens + first
            HEAD_SCALARS = SCALARS + head_tokens
            HEAD_BASES = BASES + ((sample * heads + head) * chunks + chunk) * (blocks + 1)
            weight = edge_decay(HEAD_SCALARS, part, rows, valid, HEAD_BASES + block, OF_C != BACKWARD)
            if OF_C != BACKWARD:
                weight *= tl.exp2(tl.load(HEAD_BASES + block).to(tl.float32))
            else:
                weight *= block_decay(HEAD_BASES, blocks, block, False)
            if not OF_C:
                weight *= load_scalar(HEAD_SCALARS, STEPS, part, rows, valid)
            u = load_rows(U + sample * u_sample + first * u_token + head * u_head, u_token, rows, valid, P, BLOCK_P)
            state = load_state(STATES, INITIAL, sample, chunk, head, chunks, heads, P, N, BLOCK_P, BLOCK_N, SHIFT)
            added = dot(u, state, PRECISION) * weight[:, None]
            if OF_C:
                tl.store(D_ENTRY + head_tokens + rows, tl.sum(added * own, 1), mask=valid)
            gradient += added

    D_PAIRS += (((split * batch + sample) * chunks + chunk) * groups + group) * Q * Q
    begin, end = block, tl.cdiv(length, BLOCK)  # blocks paired with this one
    if OF_C != BACKWARD:
        begin, end = 0 * block, block + 1
    for other in range(begin, end):
        across = other * BLOCK + tl.arange(0, BLOCK)
        if OF_C:
            tile = tl.load(D_PAIRS + rows[:, None] * Q + across[None, :])
        else:
            tile = tl.trans(tl.load(D_PAIRS + across[:, None] * Q + rows[None, :]))
        if OF_C != BACKWARD:
            tile = tl.where(rows[:, None] >= across[None, :], tile, 0.0)
        else:
            tile = tl.where(rows[:, None] <= across[None, :], tile, 0.0)
        gradient += dot(tile, load_rows(OTHER + shared, b_token, across, across < length, N, BLOCK_N), PRECISION)

    at = (((split * batch + sample) * tokens + first) * groups + group) * N + rows[:, None] * (groups * N) + n[None, :]
    mask = valid[:, None] & (n < N)[None, :]
    tl.store(GRADIENT + at, gradient.to(GRADIENT.dtype.element_ty), mask=mask)


@triton.jit
def decay_gradients(
    COLUMNS, ROWS, DIAGONAL, SCALARS, D_ENTRY, STATE_DDT, D_DECAYS, DA, DDT, STARTS,
    part, tiles, frames, per_frame, segment_len, tokens, heads,
    BACKWARD: tl.constexpr, Q: tl.constexpr, BLOCK: tl.constexpr, HEADS: tl.constexpr,
):  # fmt: skip
    """da and ddt (B, L, H) of one direction, from the outputs of the other kernels."""
    chunks, part = frames * per_frame, tl.cast(part, tl.int64)
    pid = tl.program_id(0).to(tl.int64)
    sample, chunk = pid // chunks, pid % chunks
    first, length = chunk_span(STARTS, sample, chunk, frames, per_frame, segment_len, Q)
    k, h = tl.arange(0, Q)[:, None], (tl.program_id(1) * HEADS + tl.arange(0, HEADS)).to(tl.int64)
    inside = (k < length) & (h < heads)[None, :]
    at = (sample * heads + h[None, :]) * tokens + first + k
    step, steps, decays = -1, STEPS_F, DECAYS_F  # to the preceding token in scan order
    if BACKWARD:
        step, steps, decays = 1, STEPS_B, DECAYS_B
    nearer = (k + step >= 0) & (k + step < length) & inside
    dt_before = load_scalar(SCALARS, STEPS, part, at + step, nearer)

    ddt = tl.load(DIAGONAL + steps * part + at, mask=inside, other=0.0)
    da = tl.load(DIAGONAL + decays * part + at, mask=inside, other=0.0)
    if D_DECAYS is not None:  # whole chunk; entry to i at or after k; j before k to exit
        for tile in range(tiles):
            d_decay = D_DECAYS + ((sample * chunks + chunk) * heads + h) * tiles + tile
            da += tl.load(d_decay, mask=h < heads, other=0.0)[None, :]
        da += tl.cumsum(tl.load(D_ENTRY + at, mask=inside, other=0.0), 0, reverse=not BACKWARD)
        ddt += tl.load(STATE_DDT + at, mask=inside, other=0.0)
        da += tl.cumsum(tl.load(STATE_DDT + at + step, mask=nearer, other=0.0) * dt_before, 0, reverse=BACKWARD)
    blocks = tl.cdiv(length, BLOCK)
    for block in range(blocks):
        # All i in this block, with columns j before both the block and k.
        of_block = at + block * part
        before = k < block * BLOCK
        if BACKWARD:
            before = k >= (block + 1) * BLOCK
        ddt += tl.load(COLUMNS + of_block, mask=inside & before, other=0.0)
        sums = tl.load(COLUMNS + of_block + step, mask=nearer, other=0.0) * dt_before
        da += tl.where(before, tl.cumsum(sums, 0, reverse=BACKWARD), 0.0)
        # All k in this block, with rows i of the block at or after k and columns j in earlier blocks.
        here = inside & (k // BLOCK == block)
        begin, end = 0, block
        if BACKWARD:
            begin, end = block + 1, blocks
        sums = tl.zeros([Q, HEADS], tl.float32)
        for other in range(begin, end):
            sums += tl.load(ROWS + at + other * part, mask=here, other=0.0)
        da += tl.where(here, tl.cumsum(sums, 0, reverse=not BACKWARD), 0.0)
    at = (sample * tokens + first + k) * heads + h[None, :]
    tl.store(DA + at, da.to(DA.dtype.element_ty), mask=inside)
    tl.store(DDT + at, ddt.to(DDT.dtype.element_ty), mask=inside)
