"""Triton backend of the rasterizer, for GPUs and float32. Same functions as in :mod:`.tiles`.

A program composites the pixels of one tile of TILE x TILE pixels, a group of Gaussians of its list at a time. Pairs of
tile and Gaussian are sorted by (tile << 32) | bits of the depth: the bits of positive floats have the order of floats.
The backward writes the gradients of each pair, and a second kernel adds those of each Gaussian in a fixed order:
results are deterministic.

Shapes: C cameras, N Gaussians, F channels, M pairs, P = TILE² pixels.
"""

import math
import os
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from blueberry_video.ops.rasterizer import inputs
from blueberry_video.ops.rasterizer.inputs import Splats

TILE = 16
GROUP = 16  # Gaussians at a time in the forward: the least size of a matrix product
BACKWARD_GROUP = 8  # half the registers of 16
WARPS = 8
PAIRS_AT_ONCE = 32  # pairs of a Gaussian added at a time
SHAPE_COLUMNS = 6  # gradients of a pair before those of the features: x, y, xx, xy, yy, opacity
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
PRECISION = tl.constexpr("ieee" if INTERPRETED else "tf32x3")

MAX_ALPHA = tl.constexpr(inputs.MAX_ALPHA)
MIN_ALPHA = tl.constexpr(inputs.MIN_ALPHA)
MIN_TRANSMITTANCE = tl.constexpr(inputs.MIN_TRANSMITTANCE)


class Lists(NamedTuple):
    """Pairs of tile and Gaussian."""

    ids: Tensor  # (M,) int32: Gaussians of all cameras, by tile and depth
    positions: Tensor  # (M,): position of the pair in the order of the Gaussians
    starts: Tensor  # (tiles + 1,): first pair of each tile
    offsets: Tensor  # (C N + 1,): first pair of each Gaussian, in the order of the Gaussians


def forward(splats: Splats) -> tuple[Tensor, Tensor]:
    """Returns the image (C, F, H, W) and the transmittance (C, H, W)."""
    with torch.cuda.device_of(splats.features):
        lists = pair_lists(splats)
        cameras, _, channels = splats.features.shape
        image = splats.features.new_empty(cameras, channels, splats.height, splats.width)
        transmittance = splats.features.new_empty(cameras, splats.height, splats.width)
        composite_forward[(len(lists.starts) - 1,)](
            IMAGE=image, TRANSMITTANCE=transmittance, BLOCK_F=max(triton.next_power_of_2(channels), 16), SIZE=GROUP,
            **common_arguments(splats, lists),
        )  # fmt: skip
    return image, transmittance


def backward(
    d_image: Tensor, d_transmittance: Tensor, image: Tensor, transmittance: Tensor, splats: Splats
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Returns the gradients of means2d, conics, opacities and features."""
    with torch.cuda.device_of(splats.features):
        lists = pair_lists(splats)
        cameras, number, channels = splats.features.shape
        columns = SHAPE_COLUMNS + channels
        pairs = splats.features.new_zeros(len(lists.ids), columns)  # pairs of ended tiles are not written
        composite_backward[(len(lists.starts) - 1,)](
            POSITIONS=lists.positions, IMAGE=image, TRANSMITTANCE=transmittance, D_IMAGE=d_image.contiguous(),
            D_TRANSMITTANCE=d_transmittance.contiguous(), GRADIENTS=pairs, SIZE=BACKWARD_GROUP,
            **common_arguments(splats, lists),
        )  # fmt: skip
        total = splats.features.new_empty(cameras * number, columns)
        if len(total):
            add_pairs[(len(total),)](
                pairs, lists.offsets, total, COLUMNS=columns, BLOCK_COLUMNS=triton.next_power_of_2(columns),
                ROWS=PAIRS_AT_ONCE, num_warps=1,
            )  # fmt: skip
        total = total.view(cameras, number, columns)
    means2d, conics, opacities, features = total.split([2, 3, 1, channels], -1)
    return means2d.clone(), conics.clone(), opacities[..., 0].clone(), features.clone()


def common_arguments(splats: Splats, lists: Lists) -> dict[str, Any]:
    """Arguments of both compositing kernels."""
    channels = splats.features.shape[-1]
    rows, columns = math.ceil(splats.height / TILE), math.ceil(splats.width / TILE)
    return {
        "MEANS": splats.means2d.contiguous(),
        "CONICS": splats.conics.contiguous(),
        "OPACITIES": splats.opacities.contiguous(),
        "FEATURES": splats.features.contiguous(),
        "IDS": lists.ids,
        "STARTS": lists.starts,
        "height": splats.height,
        "width": splats.width,
        "rows": rows,
        "columns": columns,
        "CHANNELS": channels,
        "SIDE": TILE,
        "num_warps": WARPS,
    }


def pair_lists(splats: Splats) -> Lists:
    """Builds the lists of all tiles; reads the number of pairs, which synchronizes with the GPU."""
    rows, columns = math.ceil(splats.height / TILE), math.ceil(splats.width / TILE)
    cameras, number = splats.depths.shape
    first_x, count_x = tiles_between(splats.means2d[..., 0], splats.extents[..., 0], columns)
    first_y, count_y = tiles_between(splats.means2d[..., 1], splats.extents[..., 1], rows)
    counts = count_x * count_y
    offsets = torch.nn.functional.pad(counts.flatten().cumsum(0), (1, 0))
    pairs = int(offsets[-1])
    ids = torch.repeat_interleave(counts.flatten(), output_size=pairs)
    inside = torch.arange(pairs, device=ids.device) - offsets[ids]  # index of the tile among those of the Gaussian
    width = count_x.flatten()[ids]
    row = first_y.flatten()[ids] + inside // width
    tile = (ids // max(number, 1) * rows + row) * columns + first_x.flatten()[ids] + inside % width
    bits = splats.depths.contiguous().view(torch.int32).flatten()[ids].long()
    keys, positions = torch.sort((tile << 32) | bits, stable=True)
    tiles = torch.arange(cameras * rows * columns + 1, device=ids.device)
    return Lists(ids[positions].int(), positions, torch.searchsorted(keys >> 32, tiles), offsets)


def tiles_between(center: Tensor, extent: Tensor, tiles: int) -> tuple[Tensor, Tensor]:
    """First tile and number of tiles along an axis that contain a pixel center of the extent; 0 if it is 0."""
    last_pixel = tiles * TILE - 1
    first = (center - extent - 0.5).ceil().clamp(0, last_pixel + 1).long()
    last = (center + extent - 0.5).floor().clamp(-1, last_pixel).long()
    tile = first // TILE
    return tile, torch.where((last >= first) & (extent > 0), last // TILE - tile + 1, 0)


# ---- kernels ---------------------------------------------------------------------------------------------------------


@triton.jit
def pixels_of_tile(height, width, rows, columns, CHANNELS: tl.constexpr, SIDE: tl.constexpr):
    """Row, column and validity of the pixels (P,) of this program, and their offset in an image of one channel.

    The offset in an image with CHANNELS channels is that of the first channel.
    """
    tile = tl.program_id(0)
    camera, inside = tile // (rows * columns), tile % (rows * columns)
    p = tl.arange(0, SIDE * SIDE)
    y, x = inside // columns * SIDE + p // SIDE, inside % columns * SIDE + p % SIDE
    single = camera.to(tl.int64) * height * width + y * width + x
    many = camera.to(tl.int64) * CHANNELS * height * width + y * width + x
    return y, x, (y < height) & (x < width), single, many


@triton.jit
def load_group(MEANS, CONICS, OPACITIES, IDS, at, end, y, x, SIZE: tl.constexpr):
    """Of the next Gaussians: indices, offsets to the mean and alpha without limits (SIZE, P), conics and opacities."""
    index = at + tl.arange(0, SIZE)
    listed = index < end
    ids = tl.load(IDS + index, mask=listed, other=0).to(tl.int64)
    dx = (x + 0.5)[None, :] - tl.load(MEANS + 2 * ids, mask=listed, other=0.0)[:, None]
    dy = (y + 0.5)[None, :] - tl.load(MEANS + 2 * ids + 1, mask=listed, other=0.0)[:, None]
    xx = tl.load(CONICS + 3 * ids, mask=listed, other=0.0)
    xy = tl.load(CONICS + 3 * ids + 1, mask=listed, other=0.0)
    yy = tl.load(CONICS + 3 * ids + 2, mask=listed, other=0.0)
    opacity = tl.load(OPACITIES + ids, mask=listed, other=0.0)
    exponent = 0.5 * (xx[:, None] * dx * dx + yy[:, None] * dy * dy) + xy[:, None] * dx * dy
    return ids, dx, dy, opacity[:, None] * tl.exp(-exponent), xx, xy, yy, opacity


@triton.jit
def blend(raw, before_group):
    """Limited alpha, transmittance after each Gaussian (SIZE, P) as if no pixel ended, and weights.

    Args:
        raw: (SIZE, P) alpha without limits.
        before_group: (P,) transmittance before the first of them.
    """
    alpha = tl.minimum(raw, MAX_ALPHA)
    alpha = tl.where(alpha >= MIN_ALPHA, alpha, 0.0)
    after = tl.cumprod(1 - alpha, axis=0) * before_group[None, :]
    weights = tl.where(after >= MIN_TRANSMITTANCE, after * (alpha / (1 - alpha)), 0.0)
    return alpha, after, weights


@triton.jit
def composite_forward(
    MEANS, CONICS, OPACITIES, FEATURES, IDS, STARTS, IMAGE, TRANSMITTANCE, height, width, rows, columns,
    CHANNELS: tl.constexpr, BLOCK_F: tl.constexpr, SIDE: tl.constexpr, SIZE: tl.constexpr,
):  # fmt: skip
    """Image and transmittance of a tile."""
    y, x, valid, single, many = pixels_of_tile(height, width, rows, columns, CHANNELS, SIDE)
    at, end = tl.load(STARTS + tl.program_id(0)), tl.load(STARTS + tl.program_id(0) + 1)
    before = tl.where(valid, 1.0, 0.0)
    final = tl.full([SIDE * SIDE], 1.0, tl.float32)
    image = tl.zeros([SIDE * SIDE, BLOCK_F], tl.float32)
    f = tl.arange(0, BLOCK_F)
    going = 1
    while (at < end) & (going > 0):
        ids, _, _, raw, _, _, _, _ = load_group(MEANS, CONICS, OPACITIES, IDS, at, end, y, x, SIZE)
        _, after, weights = blend(raw, before)
        features = tl.load(FEATURES + ids[:, None] * CHANNELS + f[None, :], mask=(f < CHANNELS)[None, :], other=0.0)
        image += tl.dot(tl.trans(weights), features, input_precision=PRECISION)
        final = tl.minimum(final, tl.min(tl.where(after >= MIN_TRANSMITTANCE, after, 1.0), axis=0))
        before = tl.min(after, axis=0)
        going = (tl.max(before, axis=0) >= MIN_TRANSMITTANCE).to(tl.int32)
        at += SIZE
    pixels = height * width
    tl.store(IMAGE + many[:, None] + f[None, :] * pixels, image, mask=valid[:, None] & (f < CHANNELS)[None, :])
    tl.store(TRANSMITTANCE + single, final, mask=valid)


@triton.jit
def composite_backward(
    MEANS, CONICS, OPACITIES, FEATURES, IDS, POSITIONS, STARTS, IMAGE, TRANSMITTANCE, D_IMAGE, D_TRANSMITTANCE,
    GRADIENTS, height, width, rows, columns,
    CHANNELS: tl.constexpr, SIDE: tl.constexpr, SIZE: tl.constexpr,
):  # fmt: skip
    """Gradients of the pairs of a tile: x, y, xx, xy, yy, opacity and features, in the rows POSITIONS of GRADIENTS.

    The derivative of alpha needs the part of the image behind a Gaussian: the whole minus what is in front of it.
    """
    y, x, valid, single, many = pixels_of_tile(height, width, rows, columns, CHANNELS, SIDE)
    at, end = tl.load(STARTS + tl.program_id(0)), tl.load(STARTS + tl.program_id(0) + 1)
    pixels = height * width
    d_alpha = -tl.load(D_TRANSMITTANCE + single, mask=valid, other=0.0)  # of the sum of the weights
    behind = d_alpha * (1 - tl.load(TRANSMITTANCE + single, mask=valid, other=1.0))
    for f in range(CHANNELS):
        d_image = tl.load(D_IMAGE + many + f * pixels, mask=valid, other=0.0)
        behind += d_image * tl.load(IMAGE + many + f * pixels, mask=valid, other=0.0)
    before = tl.where(valid, 1.0, 0.0)
    going = 1
    while (at < end) & (going > 0):
        ids, dx, dy, raw, xx, xy, yy, opacity = load_group(MEANS, CONICS, OPACITIES, IDS, at, end, y, x, SIZE)
        alpha, after, weights = blend(raw, before)
        index = at + tl.arange(0, SIZE)
        listed = index < end
        row = GRADIENTS + tl.load(POSITIONS + index, mask=listed, other=0).to(tl.int64) * (6 + CHANNELS)
        d_weights = tl.zeros_like(weights) + d_alpha[None, :]
        for f in range(CHANNELS):
            d_image = tl.load(D_IMAGE + many + f * pixels, mask=valid, other=0.0)
            d_weights += tl.load(FEATURES + ids * CHANNELS + f)[:, None] * d_image[None, :]
            tl.store(row + 6 + f, tl.sum(weights * d_image[None, :], axis=1), mask=listed)
        in_front = weights * d_weights
        left = behind[None, :] - tl.cumsum(in_front, axis=0)
        counted = (after >= MIN_TRANSMITTANCE) & (raw < MAX_ALPHA)
        d_log = tl.where(counted, in_front - alpha / (1 - alpha) * left, 0.0)  # of the logarithm of alpha

        along_x, along_y = tl.sum(d_log * dx, axis=1), tl.sum(d_log * dy, axis=1)
        tl.store(row, xx * along_x + xy * along_y, mask=listed)
        tl.store(row + 1, xy * along_x + yy * along_y, mask=listed)
        tl.store(row + 2, -0.5 * tl.sum(d_log * dx * dx, axis=1), mask=listed)
        tl.store(row + 3, -tl.sum(d_log * dx * dy, axis=1), mask=listed)
        tl.store(row + 4, -0.5 * tl.sum(d_log * dy * dy, axis=1), mask=listed)
        tl.store(row + 5, tl.sum(d_log, axis=1) / tl.maximum(opacity, MIN_ALPHA), mask=listed)
        behind -= tl.sum(in_front, axis=0)
        before = tl.min(after, axis=0)
        going = (tl.max(before, axis=0) >= MIN_TRANSMITTANCE).to(tl.int32)
        at += SIZE


@triton.jit
def add_pairs(GRADIENTS, OFFSETS, TOTAL, COLUMNS: tl.constexpr, BLOCK_COLUMNS: tl.constexpr, ROWS: tl.constexpr):
    """Sum of the rows of GRADIENTS that belong to a Gaussian."""
    gaussian = tl.program_id(0).to(tl.int64)
    start, end = tl.load(OFFSETS + gaussian), tl.load(OFFSETS + gaussian + 1)
    column = tl.arange(0, BLOCK_COLUMNS)
    total = tl.zeros([BLOCK_COLUMNS], tl.float32)
    while start < end:
        row = start + tl.arange(0, ROWS)
        mask = (row < end)[:, None] & (column < COLUMNS)[None, :]
        total += tl.sum(tl.load(GRADIENTS + row[:, None] * COLUMNS + column[None, :], mask=mask, other=0.0), axis=0)
        start += ROWS
    tl.store(TOTAL + gaussian * COLUMNS + column, total, mask=column < COLUMNS)
