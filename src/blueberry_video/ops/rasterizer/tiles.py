"""PyTorch backend of the rasterizer, with its own backward: lists of Gaussians per small tile, on any device and dtype.

A tile is TILE x TILE pixels. Its list holds the Gaussians with alpha ≥ MIN_ALPHA at one of its pixels, by depth. Lists
are built with one sort of (tile, rank by depth). The tiles are then composited together, SLAB Gaussians of each list at
a time, until the list ends or all pixels of the tile are opaque. Within a tile, log-alpha is a polynomial of degree 2
in the pixel coordinates, so that log-alpha, colors and the gradients of all parameters are matrix products with the
pixels of a tile.

The backward repeats the forward pass and needs no stored activations: what is behind a Gaussian is the final value of
the pixel minus what is in front of it. On the CPU all sums have a fixed order: results are deterministic.

Shapes: C cameras, N Gaussians, n visible ones of all cameras, F channels, M pairs of tile and Gaussian, B tiles at
once, S Gaussians of a list at once, P = TILE² pixels.
"""

import math
from collections.abc import Iterator
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from blueberry_video.ops.rasterizer.inputs import MAX_ALPHA, MIN_ALPHA, MIN_TRANSMITTANCE, Splats

TILE = 4
SLAB = 32
PIXELS_AT_ONCE = 1 << 17  # B · S · P: the arrays of a step fit the cache of a core
PAIRS_AT_ONCE = 1 << 22  # bound of M, except that a row of tiles is not split
MARGIN = 1e-3  # pixels added to the extents, so that rounding loses no pixel
LEAST_LOG_ALPHA = -20.0  # lower bound, far below log(MIN_ALPHA): exp would otherwise return denormals, which are slow


def forward(splats: Splats) -> tuple[Tensor, Tensor]:
    """Returns the image (C, F, H, W) and the transmittance (C, H, W)."""
    scene = Scene(splats)
    output = scene.table.new_zeros(scene.num_tiles, TILE**2, scene.channels)
    transmittance = torch.ones_like(output[..., 0])
    for lists in scene.parts():
        for step in scene.steps(lists):
            output[step.tiles] += step.weights.mT @ step.features
            transmittance[step.tiles] = step.final_transmittance(transmittance[step.tiles])
    output[..., -1] = transmittance
    return scene.to_image(output)


def backward(
    d_image: Tensor, d_transmittance: Tensor, image: Tensor, transmittance: Tensor, splats: Splats
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Returns the gradients of means2d, conics, opacities and features."""
    scene = Scene(splats)
    d_output = scene.to_tiles(d_image, -d_transmittance)  # (tiles, P, F + 1)
    output = scene.to_tiles(image, 1 - transmittance)
    behind = (d_output * output).sum(-1)  # (tiles, P): d_output times the output of the Gaussians still to come
    total = torch.zeros_like(scene.table)
    for lists in scene.parts():
        for step in scene.steps(lists):
            gradient = d_output[step.tiles]
            in_front = (step.features @ gradient.mT).mul_(step.weights)  # (B, S, P)
            left = behind[step.tiles, None] - in_front.cumsum(1)
            behind[step.tiles] = left[:, -1]
            free = torch.lt(step.alpha, MAX_ALPHA, out=torch.empty_like(step.alpha))
            ratio = step.alpha.div_(1 - step.alpha).mul_(step.counts)
            d_log_alpha = in_front.sub_(left.mul_(ratio)).mul_(free)
            rows = torch.cat([step.shape_gradients(d_log_alpha), step.weights @ gradient], -1)
            total.index_add_(0, step.ids, rows.flatten(0, 1))
    return scene.to_gaussians(total)


class Lists(NamedTuple):
    """Gaussians of each tile of a band of the image, in the order of their depth."""

    ids: Tensor  # (M,): rows of the table
    tiles: Tensor  # tiles with a Gaussian
    starts: Tensor  # position of the list of each of these tiles
    ends: Tensor


class Step:
    """Gaussians of a part of the list of some tiles, with alpha and the weight in the image at each pixel.

    Attributes:
        tiles: (B,).
        ids: (B S,) rows of the table.
        features: (B, S, F + 1).
        alpha: (B, S, P), 0 where skipped.
        counts: (B, S, P): 1 before the pixel is opaque, 0 after.
        weights: (B, S, P): alpha times the transmittance before the Gaussian, or 0.
        chain: (B, S + 1, P): transmittance before each Gaussian and after the last, as if no pixel ended.
    """

    def __init__(
        self, tiles: Tensor, ids: Tensor, padding: Tensor, rows: Tensor, centers: Tensor, basis: Tensor, before: Tensor
    ):
        self.tiles, self.ids, self.features = tiles, ids, rows[..., 6:]
        x, y, xx, xy, yy, log_opacity = rows[..., :6].unbind(-1)
        self.u, self.v = x - centers[:, :1], y - centers[:, 1:]
        self.xx, self.xy, self.yy = xx, xy, yy
        self.basis = basis
        p, q = xx * self.u + xy * self.v, xy * self.u + yy * self.v
        constant = log_opacity - 0.5 * (self.u * p + self.v * q)
        constant = constant.masked_fill_(padding, -math.inf)
        coefficients = torch.stack([constant, p, q, -0.5 * xx, -xy, -0.5 * yy], -1)
        alpha = (coefficients @ self.basis).clamp_(min=LEAST_LOG_ALPHA).exp_()
        self.alpha = zero_below_(alpha.clamp_(max=MAX_ALPHA), MIN_ALPHA)
        chain = alpha.new_empty(len(tiles), alpha.shape[1] + 1, TILE**2)
        chain[:, 0] = before
        torch.sub(1, self.alpha, out=chain[:, 1:])
        chain.cumprod_(1)
        after = chain[:, 1:]
        self.chain = chain
        self.counts = torch.ge(after, MIN_TRANSMITTANCE, out=torch.empty_like(alpha))  # a bool mask multiplies slowly
        self.weights = (self.alpha * chain[:, :-1]).mul_(self.counts)

    def final_transmittance(self, previous: Tensor) -> Tensor:
        """Transmittance (B, P) after the last Gaussian that counts; ``previous`` where the pixel had ended."""
        last = self.counts.sum(1, keepdim=True).long()
        return torch.where(self.chain[:, 0] < MIN_TRANSMITTANCE, previous, self.chain.gather(1, last)[:, 0])

    def shape_gradients(self, gradient: Tensor) -> Tensor:
        """Gradients (B, S, 6) of means, conics and log-opacity, from that of log-alpha (B, S, P)."""
        one, x, y, xx, xy, yy = (gradient @ self.basis.mT).unbind(-1)  # moments about the center of the tile
        u, v = self.u, self.v
        dx, dy = x - u * one, y - v * one  # moments about the mean
        return torch.stack(
            [
                self.xx * dx + self.xy * dy,
                self.xy * dx + self.yy * dy,
                -0.5 * (xx - u * (x + dx)),
                v * x + u * dy - xy,
                -0.5 * (yy - v * (y + dy)),
                one,
            ],
            -1,
        )


def zero_below_(values: Tensor, least: float) -> Tensor:
    """Sets values < least to 0, in-place; ``torch.threshold_`` is fast, but keeps values > its argument only."""
    return torch.threshold_(values, least * (1 - torch.finfo(values.dtype).eps), 0)


def polynomials(like: Tensor) -> Tensor:
    """1, x, y, x², xy and y² (6, P) at the pixels of a tile, with the origin at its center."""
    offsets = torch.arange(TILE).to(like) - (TILE - 1) / 2
    y, x = (axis.flatten() for axis in torch.meshgrid(offsets, offsets, indexing="ij"))
    return torch.stack([torch.ones_like(x), x, y, x * x, x * y, y * y])


class Scene:
    """Visible Gaussians as rows of a table, by camera and depth, and the geometry of the tiles.

    ``table`` (n, 6 + F + 1) has the columns x, y, xx, xy, yy, log-opacity, features and 1, which stands for alpha as a
    channel of the image.
    """

    def __init__(self, splats: Splats):
        self.splats = splats
        self.height, self.width = splats.height, splats.width
        self.cameras, number = splats.depths.shape
        self.rows, self.columns = math.ceil(self.height / TILE), math.ceil(self.width / TILE)
        self.num_tiles = self.cameras * self.rows * self.columns
        self.channels = splats.features.shape[-1] + 1
        visible = splats.extents[..., 0] > 0
        order = splats.depths.masked_fill(~visible, math.inf).argsort(dim=1, stable=True)
        order = (order + number * torch.arange(self.cameras, device=order.device)[:, None]).flatten()
        self.order = order[visible.flatten()[order]]  # (n,): indices into the Gaussians of all cameras
        opacities = splats.opacities.reshape(-1)[self.order]
        gaussians = (splats.means2d, splats.conics, splats.features)
        means2d, conics, features = (tensor.flatten(0, 1)[self.order] for tensor in gaussians)
        self.opacities = opacities[:, None]
        self.table = torch.cat([means2d, conics, self.opacities.log(), features, torch.ones_like(self.opacities)], 1)
        self.camera = self.order // max(number, 1)

    def parts(self) -> Iterator[Lists]:
        """Lists of all tiles, in bands of rows of tiles with a bounded number of pairs."""
        entry, row, first, count = self.spans()
        per_row = torch.bincount(row, count, minlength=self.cameras * self.rows).cumsum(0)
        band = ((per_row - 1).clamp(min=0) / PAIRS_AT_ONCE).floor().long()[row]
        for index in range(int(band.max()) + 1 if len(band) else 0):
            chosen = slice(None) if not band.any() else band == index
            yield self.lists(entry[chosen], row[chosen], first[chosen], count[chosen])

    def spans(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Tiles that the Gaussians overlap, by rows of tiles.

        Returns:
            Of each span: row of the table, row of tiles (of all cameras), first column and number of tiles.
        """
        x, y, xx, xy, yy, log_opacity = self.table[:, :6].double().unbind(1)
        reach = (2 * (log_opacity - math.log(MIN_ALPHA))).clamp(min=0)
        determinant = xx * yy - xy * xy
        half_width, half_height = (reach * yy / determinant).sqrt(), (reach * xx / determinant).sqrt()
        top, number = tiles_between(y - half_height, y + half_height, self.height)
        entry = torch.repeat_interleave(number)
        row = top[entry] + ordinal(number)
        # The ellipse is widest to the right at height -xy / yy · half_width, and to the left at the opposite height.
        x, half_width, half_height, xx, xy, yy, reach = (
            column[entry] for column in (x, half_width, half_height, xx, xy, yy, reach)
        )
        low = torch.maximum(row * TILE + 0.5 - MARGIN - y[entry], -half_height)
        high = torch.minimum(row * TILE + TILE - 0.5 + MARGIN - y[entry], half_height)
        widest = -xy / yy * half_width
        edges = []
        for side in (-1, 1):
            at = torch.minimum(torch.maximum(side * widest, low), high)
            root = ((xy * at) ** 2 - xx * (yy * at * at - reach)).clamp(min=0).sqrt()
            edges.append(x + (side * root - xy * at) / xx)
        first, count = tiles_between(edges[0], edges[1], self.width)
        return entry, row + self.camera[entry] * self.rows, first, count

    def lists(self, entry: Tensor, row: Tensor, first: Tensor, count: Tensor) -> Lists:
        span = torch.repeat_interleave(count)
        bits = len(self.table).bit_length()
        keys = ((row * self.columns + first)[span] + ordinal(count)) << bits | entry[span]
        sort_(keys)
        tiles, counts = torch.unique_consecutive(keys >> bits, return_counts=True)
        ends = counts.cumsum(0)
        return Lists(keys & ((1 << bits) - 1), tiles, ends - counts, ends)

    def steps(self, lists: Lists) -> Iterator[Step]:
        """Composites the lists of all tiles from front to back."""
        tiles, position, ends = lists.tiles, lists.starts, lists.ends
        transmittance = self.table.new_ones(len(tiles), TILE**2)
        slab = torch.arange(SLAB, device=tiles.device)
        basis = polynomials(self.table)
        in_row = tiles % (self.rows * self.columns)
        centers = torch.stack([in_row % self.columns, in_row // self.columns], 1) * TILE + TILE / 2
        centers = centers.to(self.table)
        at_once = max(PIXELS_AT_ONCE // (SLAB * TILE**2), 1)
        while len(tiles):
            left = []
            for start in range(0, len(tiles), at_once):
                part = slice(start, start + at_once)
                at = position[part, None] + slab
                padding = at >= ends[part, None]
                ids = lists.ids.index_select(0, at.clamp_(max=len(lists.ids) - 1).flatten())
                rows = self.table.index_select(0, ids).view(*at.shape, -1)
                step = Step(tiles[part], ids, padding, rows, centers[part], basis, transmittance[part])
                left.append(step.chain[:, -1])
                yield step
            transmittance = zero_below_(torch.cat(left), MIN_TRANSMITTANCE)  # no denormals, which are slow
            position = position + SLAB
            going = (position < ends) & transmittance.any(1)
            tiles, position, ends, centers = tiles[going], position[going], ends[going], centers[going]
            transmittance = transmittance[going]

    def to_image(self, tiles: Tensor) -> tuple[Tensor, Tensor]:
        """(tiles, P, F + 1) -> (C, F, H, W) and (C, H, W)."""
        grid = tiles.view(self.cameras, self.rows, self.columns, TILE, TILE, self.channels)
        image = grid.permute(0, 5, 1, 3, 2, 4).reshape(self.cameras, self.channels, self.rows * TILE, -1)
        image = image[..., : self.height, : self.width]
        image, alpha = image[:, :-1], image[:, -1]
        return image.clone(memory_format=torch.contiguous_format), alpha.clone(memory_format=torch.contiguous_format)

    def to_tiles(self, image: Tensor, alpha: Tensor) -> Tensor:
        """Inverse of :meth:`to_image`; 0 outside the image."""
        image = torch.cat([image, alpha[:, None]], 1)
        padded = F.pad(image, (0, self.columns * TILE - self.width, 0, self.rows * TILE - self.height))
        grid = padded.view(self.cameras, self.channels, self.rows, TILE, self.columns, TILE)
        return grid.permute(0, 2, 4, 3, 5, 1).reshape(self.num_tiles, TILE**2, self.channels)

    def to_gaussians(self, table: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Gradients of the table -> gradients of means2d, conics, opacities and features."""
        splats = self.splats
        columns = [table[:, :2], table[:, 2:5], table[:, 5:6] / self.opacities, table[:, 6:-1]]
        targets = (splats.means2d, splats.conics, splats.opacities, splats.features)
        found = []
        for target, gradient in zip(targets, columns, strict=True):
            whole = gradient.new_zeros(target.shape)
            whole.view(-1, gradient.shape[1])[self.order] = gradient
            found.append(whole)
        return found[0], found[1], found[2], found[3]


def tiles_between(low: Tensor, high: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """First tile and number of tiles with pixel centers from ``low`` to ``high`` along an axis of ``size`` pixels."""
    first = (low - 0.5 - MARGIN).ceil().clamp(0, size).long()
    last = (high - 0.5 + MARGIN).floor().clamp(-1, size - 1).long()
    tile = first // TILE
    return tile, torch.where(last >= first, last // TILE - tile + 1, 0)


def ordinal(counts: Tensor) -> Tensor:
    """0, 1, …, counts[0] - 1, 0, 1, …, counts[1] - 1, …"""
    starts = torch.repeat_interleave(counts.cumsum(0) - counts, counts)
    return torch.arange(len(starts), device=counts.device) - starts


def sort_(keys: Tensor) -> None:
    """Sorts unique keys in-place; on the CPU with numpy, which is several times as fast as torch."""
    if keys.is_cuda:
        keys.copy_(keys.sort().values)
    else:
        keys.numpy().sort()
