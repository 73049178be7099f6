"""Speed of resizing frames, compared with PyTorch's interpolation: `python benchmarks/resize.py`.

Four frames of noise, uint8 in and out, bicubic with antialias; milliseconds per frame, best of several rounds. Float
and uint8 interpolation are PyTorch's; "last" is channels-last memory, as returned by decoders. "unequal" is the
fraction of pixels in which the exact mode differs, by one level, from clamped and rounded float interpolation.
"""

import functools
import os
import platform
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from blueberry_video.video.resize import resize

FRAMES, ROUNDS = 4, 7
SIZES = (((720, 1280), (560, 1008)), ((1080, 1920), (336, 644)), ((320, 568), (308, 560)))


def milliseconds(work: Callable[[], Tensor]) -> float:
    best = float("inf")
    for _ in range(ROUNDS + 1):
        began = time.perf_counter()
        work()
        best = min(best, time.perf_counter() - began)
    return 1000 * best / FRAMES


def in_float(frames: Tensor, size: tuple[int, int]) -> Tensor:
    return F.interpolate(frames.float(), size, mode="bicubic", antialias=True).clamp_(0, 255).round_().to(torch.uint8)


def in_uint8(frames: Tensor, size: tuple[int, int]) -> Tensor:
    return F.interpolate(frames, size, mode="bicubic", antialias=True)


def main() -> None:
    print(f"{platform.processor() or platform.machine()}, torch {torch.__version__}, ms per frame")
    print(f"{'':<34}{'float':>8}{'exact':>8}{'last':>8}{'uint8':>8}{'last':>8}{'unequal':>11}")
    for threads in sorted({1, min(2, os.cpu_count() or 1)}):
        torch.set_num_threads(threads)
        for old, new in SIZES:
            frames = torch.randint(0, 256, (FRAMES, 3, *old), generator=torch.Generator().manual_seed(0)).byte()
            last = frames.contiguous(memory_format=torch.channels_last)
            ways = [(in_float, frames), (resize, frames), (resize, last), (in_uint8, frames), (in_uint8, last)]
            times = "".join(f"{milliseconds(functools.partial(way, given, new)):>8.1f}" for way, given in ways)
            unequal = (resize(frames, new) != in_float(frames, new)).float().mean()
            label = f"{old[0]}x{old[1]} to {new[0]}x{new[1]}, {threads} thread{'s' * (threads > 1)}"
            print(f"{label:<34}{times}{unequal:>11.1e}")


if __name__ == "__main__":
    main()
