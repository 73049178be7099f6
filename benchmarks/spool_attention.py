"""Spool's attention on the CPU, compared with dense masked attention: time at one size, memory by video length.

run: python benchmarks/spool_attention.py             (12 heads of 32 channels, 64 tokens a frame, reach 8: a minute)

Both receive the same queries, keys and values and compute equal outputs and gradients. They alternate in one process,
so that other work on the machine affects both; medians are compared. The dense mask is built once and not timed. Memory
is the peak increase of a separate process, for videos of doubling length: at a fixed reach it should grow linearly,
that of the dense form quadratically.
"""

import argparse
import statistics
import subprocess
import sys
import threading
import time

import psutil
import torch
import torch.nn.functional as F
from torch import Tensor

from blueberry_video.models.spool.attention import FrameLayout, Heads, dense_mask, frame_attention

HEADS, CHANNELS = 12, 32


def inputs(layout: FrameLayout) -> list[Tensor]:
    torch.manual_seed(0)
    return [torch.randn(1, HEADS, sum(layout.sizes), CHANNELS, requires_grad=True) for _ in range(3)]


def step(qkv: list[Tensor], layout: FrameLayout, heads: Heads, mask: Tensor | None) -> Tensor:
    """Runs forward and backward, dense with a mask and banded without, and returns the output."""
    if mask is None:
        out = frame_attention(*qkv, layout, heads, backend="banded")
    else:
        out = F.scaled_dot_product_attention(*qkv, attn_mask=mask)
    out.square().mean().backward()
    return out.detach()


def seconds(layout: FrameLayout, heads: Heads, repeats: int) -> None:
    """Prints the median time of a step of each backend."""
    qkv, mask = inputs(layout), dense_mask(layout, heads, HEADS)
    outs = {name: step(qkv, layout, heads, given) for name, given in (("dense", mask), ("banded", None))}
    error = (outs["dense"] - outs["banded"]).abs().max()
    taken: dict[str, list[float]] = {"dense": [], "banded": []}
    for _ in range(repeats):
        for name, given in (("dense", mask), ("banded", None)):
            start = time.perf_counter()
            step(qkv, layout, heads, given)
            taken[name].append(time.perf_counter() - start)
    dense, banded = (statistics.median(taken[name]) for name in ("dense", "banded"))
    print(f"T = {layout.frames}, S = {layout.tokens}, reach {heads.reach}, forward and backward, {repeats} repeats")
    print(f"dense {dense * 1e3:8.1f} ms    banded {banded * 1e3:8.1f} ms    {dense / banded:.2f} x as fast")
    print(f"largest difference of the outputs: {error:.1e}")


def peak(layout: FrameLayout, heads: Heads, dense: bool) -> None:
    """Prints the peak memory of a step in MB, above that of the process before it."""
    step(
        inputs(FrameLayout(2, layout.tokens, layout.context)),
        FrameLayout(2, layout.tokens, layout.context),
        heads,
        None,
    )
    qkv, process = inputs(layout), psutil.Process()
    before = most = process.memory_info().rss
    running = True

    def watch() -> None:
        nonlocal most
        while running:
            most = max(most, process.memory_info().rss)
            time.sleep(0.0005)

    watcher = threading.Thread(target=watch)
    watcher.start()
    step(qkv, layout, heads, dense_mask(layout, heads, HEADS) if dense else None)
    running = False
    watcher.join()
    print((most - before) / 2**20)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--frames", type=int, default=64)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--reach", type=int, default=8)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--peak", choices=("dense", "banded"), help="print only the peak memory of one step, in MB")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    layout = FrameLayout(arguments.frames, arguments.tokens, arguments.tokens)
    heads = Heads(HEADS // 2, arguments.reach, "both")
    if arguments.peak:
        peak(layout, heads, arguments.peak == "dense")
        return
    seconds(layout, heads, arguments.repeats)
    print(f"\n{'T':>5} {'banded MB':>10} {'dense MB':>10}")
    for frames in (arguments.frames // 4, arguments.frames // 2, arguments.frames, 2 * arguments.frames):
        held = [
            _peak_elsewhere(arguments, frames, form) for form in ("banded", "dense") if form == "banded" or frames <= 64
        ]
        print(f"{frames:5} " + " ".join(f"{value:10.1f}" for value in held), flush=True)


def _peak_elsewhere(arguments: argparse.Namespace, frames: int, form: str) -> float:
    command = [sys.executable, __file__, "--peak", form, "--frames", str(frames), "--tokens", str(arguments.tokens)]
    command += ["--reach", str(arguments.reach), "--threads", str(arguments.threads)]
    return float(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


if __name__ == "__main__":
    main()
