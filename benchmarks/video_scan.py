"""Video scan on the CPU, compared in one run with two calls of mamba-ssm's PyTorch scan.

run: python benchmarks/video_scan.py              (B=2, T=16, S=196, H=12, P=64, N=64, fp32: a minute or two)

The peer is ``mamba_ssm.modules.ssd_minimal``, run over all tokens and over each reversed frame, with the diagonal
counted once. It computes the same function, which is checked first. Its block length is an argument: all lengths that
divide a frame are timed, and the fastest is the baseline. Median times of forward and backward, in alternating order,
in wall-clock and in CPU seconds, summed over threads: use the latter, with --threads 1, on a machine that runs other
work. Also prints our time by chunk length, and time and peak memory by number of frames, each in a separate process.

The peer requires no GPU, but installing its package does unless the CUDA build is skipped:
MAMBA_SKIP_CUDA_BUILD=TRUE MAMBA_FORCE_BUILD=TRUE pip install --no-build-isolation --no-deps mamba-ssm==2.3.2.post1
"""

import argparse
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from importlib.machinery import PathFinder
from types import ModuleType

import torch
from einops import rearrange
from torch import Tensor

from blueberry_video.ops import video_ssd
from blueberry_video.video.quality import peak_memory

BATCH, FRAMES, TOKENS, HEADS, CHANNELS, STATES = 2, 16, 196, 12, 64, 64


def inputs(frames: int) -> list[Tensor]:
    """Returns x, dt_f, dt_b, A_f, A_b, B_f, C_f, B_b, C_b, D with one group, all requiring gradients."""
    torch.manual_seed(0)
    length = frames * TOKENS
    steps = [torch.rand(BATCH, length, HEADS) * 0.1 + 0.001 for _ in range(2)]
    decays = [-torch.rand(HEADS) - 0.5 for _ in range(2)]
    projections = [torch.randn(BATCH, length, 1, STATES) / STATES**0.5 for _ in range(4)]
    tensors = [torch.randn(BATCH, length, HEADS, CHANNELS), *steps, *decays, *projections, torch.ones(HEADS)]
    return [tensor.requires_grad_() for tensor in tensors]


def ours(chunk: int | None = None) -> Callable[..., Tensor]:
    return lambda *tensors: video_ssd(*tensors, segment_len=TOKENS, chunk=chunk, backend="torch")


def peer(block: int) -> Callable[..., Tensor]:
    minimal = ssd_minimal()

    def flipped(tensor: Tensor) -> Tensor:
        return rearrange(tensor, "b (t s) ... -> (b t) s ...", s=TOKENS).flip(1)

    def scan(x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor) -> Tensor:
        B, C = (tensor.expand(-1, -1, HEADS, -1) for tensor in (B, C))
        return minimal(x * dt[..., None], dt * A, B, C, block)[0]

    def both(
        x: Tensor,
        dt_f: Tensor,
        dt_b: Tensor,
        A_f: Tensor,
        A_b: Tensor,
        B_f: Tensor,
        C_f: Tensor,
        B_b: Tensor,
        C_b: Tensor,
        D: Tensor,
    ) -> Tensor:
        y = scan(x, dt_f, A_f, B_f, C_f)
        y_b = scan(flipped(x), flipped(dt_b), A_b, flipped(B_b), flipped(C_b)).flip(1)
        diagonal = (B_f * C_f).sum(-1) * dt_f + (B_b * C_b).sum(-1) * dt_b
        return y + rearrange(y_b, "(b t) s ... -> b (t s) ...", b=BATCH) + (D - diagonal)[..., None] * x

    return both


def ssd_minimal() -> Callable[..., tuple[Tensor, Tensor]]:
    """Imports the peer's function without its package's ``__init__``, which loads CUDA extensions."""
    spec = PathFinder.find_spec("mamba_ssm")
    if spec is None:
        sys.exit("mamba_ssm is not installed: see the docstring of this file for an installation without a GPU.")
    package = ModuleType("mamba_ssm")
    package.__path__ = list(spec.submodule_search_locations or ())
    sys.modules.setdefault("mamba_ssm", package)
    from mamba_ssm.modules.ssd_minimal import ssd_minimal_discrete

    return ssd_minimal_discrete


def step(scan: Callable[..., Tensor], tensors: list[Tensor], weights: Tensor) -> tuple[float, float]:
    """Returns wall-clock and CPU seconds of a forward and a backward pass."""
    start, cpu = time.perf_counter(), time.process_time()
    torch.autograd.grad((scan(*tensors) * weights).sum(), tensors)
    return time.perf_counter() - start, time.process_time() - cpu


def medians(sides: dict[str, Callable[..., Tensor]], repeats: int) -> dict[str, tuple[float, float]]:
    tensors = inputs(FRAMES)
    weights = torch.randn_like(tensors[0])
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in sides}
    for repeat in range(repeats + 1):
        for name in list(sides)[:: 1 if repeat % 2 else -1]:
            measured = step(sides[name], tensors, weights)
            if repeat:  # the first is a warm-up
                times[name].append(measured)
    return {name: tuple(map(statistics.median, zip(*measured))) for name, measured in times.items()}  # type: ignore[misc]


def print_growth() -> None:
    print(f"\n{'frames':>8} {'s':>8} {'MB':>8} {'MB / frame':>12}")
    for frames in (8, 16, 32, 64):
        command = [sys.executable, __file__, "--frames", str(frames), "--threads", str(torch.get_num_threads())]
        seconds, megabytes = map(
            float, subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()
        )
        print(f"{frames:8} {seconds:8.2f} {megabytes:8.0f} {megabytes / frames:12.2f}")


def one_step(frames: int) -> None:
    step(ours(), inputs(1), torch.ones(()))
    before = peak_memory()
    tensors = inputs(frames)
    seconds, _ = step(ours(), tensors, torch.ones(()))
    print(seconds, (peak_memory() - before) / 2**20)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=5, help="timed steps per implementation")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--frames", type=int, help="print only seconds and MB of our step on this number of frames")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    if arguments.frames:
        return one_step(arguments.frames)

    blocks = [block for block in (28, 49, 98, 196) if TOKENS % block == 0]
    tensors = inputs(FRAMES)
    with torch.no_grad():
        error = (ours()(*tensors) - peer(49)(*tensors)).abs().max() / ours()(*tensors).abs().max()
    print(f"largest difference of the outputs: {error:.1e}, relative to the largest output")
    sides = {f"mamba-ssm, blocks of {block}": peer(block) for block in blocks}
    sides |= {"ours": ours()} | {f"ours, chunks of {chunk}": ours(chunk) for chunk in (32, 98, 196)}
    found = medians(sides, arguments.repeats)
    for name, (wall, cpu) in found.items():
        print(f"{name:26} {wall * 1e3:8.0f} ms {cpu * 1e3:8.0f} ms CPU")
    best = min((wall, cpu) for name, (wall, cpu) in found.items() if name.startswith("mamba"))
    wall, cpu = found["ours"]
    print(f"ours is {best[0] / wall:.2f} times as fast as the peer's best blocks, {best[1] / cpu:.2f} in CPU time")
    print_growth()


if __name__ == "__main__":
    main()
