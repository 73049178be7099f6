"""Forward and backward time of the rasterizer on a CPU: `python benchmarks/rasterize.py`.

Compares the `torch` backend with dense compositing of 16 x 16 tiles by autograd (the usual PyTorch port of a CUDA
rasterizer) in one run, in alternation, and fits how its time grows with the number of Gaussians and of pixels. Both
render the same random scene: Gaussians in a cube of side 2.6 with the size of the distance to their neighbors, seen
from a distance of 4.
"""

import argparse
import math
import platform
import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor

from blueberry_video.ops import rasterize
from blueberry_video.ops.rasterizer import projection
from blueberry_video.ops.rasterizer.inputs import MAX_ALPHA, MIN_ALPHA, MIN_TRANSMITTANCE

FOV = 0.6911
SIZES = ((2000, 64), (5000, 128))  # Gaussians, side of the image
GROWTH = ((500, 64), (1000, 64), (2000, 64), (4000, 64), (8000, 64)), ((2000, 32), (2000, 64), (2000, 128), (2000, 256))


def scene(number: int, size: int) -> list[Tensor]:
    """Means, scales, quaternions, opacities, coefficients of degree 3, intrinsics and world-to-camera."""
    generator = torch.Generator().manual_seed(0)
    means = torch.rand(number, 3, generator=generator) * 2.6 - 1.3
    distance = torch.cdist(means, means).topk(4, largest=False).values[:, 1:].mean(1)
    scales = 0.6 * distance[:, None] * (0.3 * torch.randn(number, 3, generator=generator)).exp()
    quats, opacities = torch.randn(number, 4, generator=generator), torch.rand(number, generator=generator)
    coefficients = 0.3 * torch.randn(number, 16, 3, generator=generator)
    focal = size / 2 / math.tan(FOV / 2)
    intrinsics = torch.tensor([[focal, 0, size / 2], [0, focal, size / 2], [0, 0, 1]])
    world_to_camera = torch.eye(4)
    world_to_camera[2, 3] = 4
    return [means, scales, quats, opacities, coefficients, intrinsics, world_to_camera]


def ours(*tensors: Tensor, size: int) -> tuple[Tensor, Tensor, Tensor]:
    out = rasterize(*tensors, (size, size), sh_degree=3, backend="torch")
    return out.color, out.alpha, out.depth


def dense_tiles(
    means: Tensor,
    scales: Tensor,
    quats: Tensor,
    opacities: Tensor,
    coefficients: Tensor,
    intrinsics: Tensor,
    world_to_camera: Tensor,
    size: int,
    tile: int = 16,
) -> tuple[Tensor, Tensor, Tensor]:
    """The same image with autograd: for each tile, all Gaussians that overlap it at all of its pixels."""
    batched = [tensor[None] for tensor in (means, scales, quats, opacities, intrinsics, world_to_camera)]
    projected = projection.project(*batched, size, size, 0.01)
    directions = torch.nn.functional.normalize(means[None] + world_to_camera[:3, :3].T @ world_to_camera[:3, 3], dim=-1)
    colors = projection.harmonics_color(coefficients[None], directions, 3)[0]
    depths = projected.depths[0]
    features = torch.cat([colors, depths[:, None], torch.ones_like(depths)[:, None]], 1)
    means2d, conics, extents = projected.means2d[0], projected.conics[0], projected.extents[0]
    low, high = means2d.detach() - extents, means2d.detach() + extents
    order = depths.detach().argsort()
    order = order[extents[order, 0] > 0]
    rows = []
    for top in range(0, size, tile):
        row = []
        for left in range(0, size, tile):
            corner = torch.tensor([left, top])
            overlap = (high[order] > corner + 0.5) & (low[order] < corner + tile - 0.5)
            ids = order[overlap.all(1)]
            y, x = torch.meshgrid(torch.arange(tile) + top + 0.5, torch.arange(tile) + left + 0.5, indexing="ij")
            dx, dy = x.flatten()[:, None] - means2d[ids, 0], y.flatten()[:, None] - means2d[ids, 1]
            xx, xy, yy = conics[ids].unbind(1)
            alpha = opacities[ids] * torch.exp(-0.5 * (xx * dx * dx + yy * dy * dy) - xy * dx * dy)
            alpha = alpha.clamp(max=MAX_ALPHA)
            alpha = alpha * (alpha >= MIN_ALPHA)
            after = torch.cumprod(1 - alpha, 1)
            before = torch.cat([torch.ones_like(after[:, :1]), after[:, :-1]], 1)
            weights = alpha * before * (after >= MIN_TRANSMITTANCE)
            row.append((weights @ features[ids]).T.unflatten(1, (tile, tile)))
        rows.append(torch.cat(row, 2))
    image = torch.cat(rows, 1)
    return image[:3], image[4], image[3]


def seconds(renderer: Callable[..., tuple[Tensor, ...]], tensors: list[Tensor], size: int) -> float:
    """Time of one forward and backward pass with gradients of all tensors of Gaussians."""
    leaves = [tensor.clone().requires_grad_() for tensor in tensors[:5]]
    began = time.perf_counter()
    images = renderer(*leaves, *tensors[5:], size=size)
    sum(image.square().mean() for image in images).backward()
    return time.perf_counter() - began


def exponent(x: list[float], y: list[float]) -> float:
    """Slope of log y over log x by least squares."""
    x, y = [math.log(v) for v in x], [math.log(v) for v in y]
    return statistics.linear_regression(x, y).slope


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=7)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    print(
        f"{platform.processor() or platform.machine()}, {arguments.threads} thread(s), torch {torch.__version__}, "
        f"forward + backward in ms: median (minimum) of {arguments.rounds}"
    )
    print(f"{'Gaussians':>10}{'image':>8}{'torch backend':>18}{'16 px tiles':>18}{'speedup':>10}{'difference':>12}")
    for number, size in SIZES:
        tensors = scene(number, size)
        with torch.no_grad():
            pairs = zip(ours(*tensors, size=size), dense_tiles(*tensors, size=size), strict=True)
            difference = max((found - expected).abs().max().item() for found, expected in pairs)
        times: list[list[float]] = [[], []]
        for index in range(arguments.rounds + 1):
            for renderer, found in zip((ours, dense_tiles), times, strict=True):
                passed = seconds(renderer, tensors, size)
                found += [passed] * (index > 0)  # the first round warms up
        medians = [statistics.median(found) for found in times]
        cells = [f"{1e3 * median:.0f} ({1e3 * min(found):.0f})" for median, found in zip(medians, times)]
        ratio = f"{medians[1] / medians[0]:.1f}x"
        print(f"{number:>10}{f'{size}²':>8}{cells[0]:>18}{cells[1]:>18}{ratio:>10}{difference:>12.1e}")
    for name, cases in zip(("Gaussians", "pixels"), GROWTH, strict=True):
        found = []
        for number, size in cases:
            tensors = scene(number, size)
            seconds(ours, tensors, size)
            found.append(min(seconds(ours, tensors, size) for _ in range(arguments.rounds)))
        sizes = [float(number if name == "Gaussians" else size**2) for number, size in cases]
        listed = ", ".join(f"{int(n)}: {1e3 * t:.0f} ms" for n, t in zip(sizes, found))
        print(f"time ~ {name}^{exponent(sizes, found):.2f} ({listed})")


if __name__ == "__main__":
    main()
