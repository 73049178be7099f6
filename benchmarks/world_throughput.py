"""Clips per second of the built-in data sources on one core: `python benchmarks/world_throughput.py`.

Generates clips of each preset in one process with one thread and prints the median of several rounds.
"""

import platform
import statistics
import time

import numpy as np
import torch

from blueberry_video.data.sprites import Sprites
from blueberry_video.data.world import World

ROUNDS = 5
PRESETS = {  # image size, frames
    "tiny": (32, 8),
    "small": (64, 16),
    "base": (128, 32),
}


def clips_per_second(dataset: torch.utils.data.Dataset, seconds: float = 1.0) -> float:
    """Returns the median over rounds; each generates new clips for about ``seconds`` of CPU time."""
    rates, index = [], 0
    for _ in range(ROUNDS):
        began, drawn = time.process_time(), 0
        while (passed := time.process_time() - began) < seconds:
            dataset[index]
            index, drawn = index + 1, drawn + 1
        rates.append(drawn / passed)
    return statistics.median(rates)


def main() -> None:
    torch.set_num_threads(1)
    print(
        f"{platform.processor() or platform.machine()}, one core, numpy {np.__version__}, clips/s (median of {ROUNDS})"
    )
    print(f"{'source':<34}{'static camera':>15}{'moving camera':>15}")
    sprites = clips_per_second(Sprites("train", 10**9))
    print(f"{'sprites 16 x 32²':<34}{sprites:>15.0f}{'-':>15}")
    for name, (size, frames) in PRESETS.items():
        for supersample in (1, 2):
            options = {"num_frames": frames, "image_size": size, "supersample": supersample}
            rates = [
                clips_per_second(World("train", 10**9, camera=camera, **options)) for camera in ("static", "orbit")
            ]
            label = f"world {name} {frames} x {size}²{', 2x supersampled' if supersample == 2 else ''}"
            print(f"{label:<34}{rates[0]:>15.1f}{rates[1]:>15.1f}")


if __name__ == "__main__":
    main()
