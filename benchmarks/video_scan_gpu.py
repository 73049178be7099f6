"""Triton kernels of the video scan on a GPU, compared with two calls of mamba-ssm in one run: `make bench-gpu`.

B=8, T=16, S=14 x 14, H=24, P=64, N=128, G=1, bf16 (dt and a float32): median times of forward, and of forward and
backward, then the time of each kernel. Results are written to benchmarks/results/video_scan_gpu.json with hardware and
versions. Without a CUDA device, prints a message and exits.

The peer computes less: the sum of a causal scan over B x (T S) tokens and one over the reversed frames as (B T) x S,
which counts the diagonal twice. It is skipped if mamba_ssm is not installed.

Traffic model: bytes per token that each kernel transfers if all data is read once; repeated reads by blocks of a chunk
or heads of a group hit L2. S tokens and one chunk of Q = 256 per frame; SCALARS has three float32 per head and
direction, states H P N float32 per frame, PAIRS Q x Q bf16 per chunk (`--traffic` computes them):

    forward    chunk_cumsum    960   dt and a -> SCALARS, of both directions
               state_passing 7,532   x, B_f, two of SCALARS -> states
               pair_products 1,693   B_f, C_f, B_b, C_b -> PAIRS
               chunk_scan   11,753   x, PAIRS, C_f, SCALARS of both, states, D -> y
    backward   chunk_cumsum    960
               state_passing 15,557  dy, C_f, two of SCALARS, states, their gradients -> gradients of leaving states
               pair_products 1,693
               pair_         9,209   dy, x, PAIRS, SCALARS of both -> D_PAIRS, sums over rows and columns of tiles
               input_       15,017   dy, x, PAIRS, B_f, SCALARS of both, gradients of states, D -> dx, dD
               shared_      19,276   four times D_PAIRS, B or C; dy and states, x and their gradients -> dB, dC
               decay_        2,112   the sums -> da, ddt                                              (…_gradients)

The forward transfers 21,938 bytes per token, 550 MB and 115 us at 4.8 TB/s, of which 37 % are the states, in float32
because they are an output. The lower bound of any implementation is x, y, B, C and dt once: 7,360 bytes per token,
38 us.
"""

import argparse
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from einops import rearrange
from torch import Tensor

from blueberry_video.experiment import provenance
from blueberry_video.ops import video_ssd

BATCH, FRAMES, TOKENS, HEADS, CHANNELS, STATES, CHUNK = 8, 16, 196, 24, 64, 128, 256
RESULTS = Path(__file__).parent / "results" / "video_scan_gpu.json"
PEAKS = {  # bytes/s of memory and bf16 FLOP/s, from data sheets; measured for the H200
    "H200": (4.8e12, 790e12),
    "H100": (3.35e12, 989e12),
    "A100": (2.04e12, 312e12),
}
NAMES = ("x", "dt_f", "dt_b", "A_f", "A_b", "B_f", "C_f", "B_b", "C_b", "D")


def traffic() -> dict[str, dict[str, float]]:
    """Returns bytes per token of each kernel, by the model above."""
    wide, shared, number = HEADS * CHANNELS * 2, STATES * 2, HEADS * 4  # x; B or C; one float32 per head
    state, pairs, blocks = HEADS * CHANNELS * STATES * 4 / TOKENS, CHUNK * CHUNK * 2 / TOKENS, CHUNK // 64
    sums, products = 2 * (2 * number + 3 * number), 4 * shared + pairs
    tiles = 2 * blocks * number + 4 * number  # COLUMNS and ROWS of each block, DIAGONAL
    return {
        "forward": {
            "chunk_cumsum": sums,
            "state_passing": wide + shared + 2 * number + state,
            "pair_products": products,
            "chunk_scan": wide + pairs + shared + 6 * number + state + number + wide,
        },
        "backward": {
            "chunk_cumsum": sums,
            "state_passing": wide + shared + 2 * number + 3 * state,
            "pair_products": products,
            "pair_gradients": 2 * wide + 2 * pairs + 6 * number + tiles,
            "input_gradients": 2 * wide + pairs + shared + 6 * number + state + number + wide + 2 * number,
            "shared_gradients": 2 * (wide + state) + 4 * (pairs + 2 * shared) + 4 * number,
            "decay_gradients": tiles + 2 * 3 * number + 2 * 2 * number,
        },
    }


def operations() -> dict[str, float]:
    """Returns FLOP per token of the matrix products, counting each pair of tokens of a frame once."""
    state, pair, product = 2 * HEADS * CHANNELS * STATES, 2 * TOKENS * HEADS * CHANNELS, 2 * TOKENS * STATES
    forward = 2 * state + pair + product
    backward = 4 * state + 2 * pair + product + 2 * product  # the states' gradients, dB, dC, dx; pairs; dB and dC
    return {"forward": forward, "forward+backward": forward + backward}


def inputs() -> dict[str, Tensor]:
    torch.manual_seed(0)
    length = FRAMES * TOKENS
    given = {"x": torch.randn(BATCH, length, HEADS, CHANNELS, device="cuda").bfloat16()}
    for leg in ("f", "b"):
        given[f"dt_{leg}"] = torch.rand(BATCH, length, HEADS, device="cuda") * 0.1 + 0.001
        given[f"A_{leg}"] = -torch.rand(HEADS, device="cuda") - 0.5
        for name in ("B", "C"):
            shared = torch.randn(BATCH, length, 1, STATES, device="cuda") / STATES**0.5
            given[f"{name}_{leg}"] = shared.bfloat16()
    given["D"] = torch.ones(HEADS, device="cuda")
    return {name: given[name].requires_grad_() for name in NAMES}


def ours(**given: Tensor) -> Tensor:
    return video_ssd(**given, segment_len=TOKENS, backend="triton")


def peer() -> Callable[..., Tensor] | None:
    try:
        from mamba_ssm.ops.triton.ssd_combined import mamba_chunk_scan_combined as scan
    except ImportError as missing:
        print(f"mamba-ssm is skipped because it cannot be imported: {missing}")
        return None

    def flipped(tensor: Tensor) -> Tensor:
        return rearrange(tensor, "b (t s) ... -> (b t) s ...", s=TOKENS).flip(1)

    def two_calls(
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
        y = scan(x, dt_f, A_f, B_f, C_f, CHUNK, D=D)
        y_b = scan(flipped(x), flipped(dt_b), A_b, flipped(B_b), flipped(C_b), CHUNK).flip(1)
        return y + rearrange(y_b, "(b t) s ... -> b (t s) ...", b=BATCH)

    return two_calls


def medians(scan: Callable[..., Tensor]) -> dict[str, float]:
    """Returns median seconds of forward, and of forward and backward."""
    from triton.testing import do_bench

    given = inputs()
    weights = torch.randn_like(given["x"])
    leaves = list(given.values())

    def forward() -> None:
        with torch.no_grad():
            scan(**given)

    def both() -> None:
        scan(**given).backward(weights)

    return {
        "forward": do_bench(forward, warmup=100, rep=500, return_mode="median") / 1e3,
        "forward+backward": do_bench(both, warmup=100, rep=500, grad_to_none=leaves, return_mode="median") / 1e3,
    }


def kernels(scan: Callable[..., Tensor], repeats: int = 20) -> dict[str, float]:
    """Returns profiled seconds of each kernel in one forward and backward pass, longest first."""
    given = inputs()
    weights = torch.randn_like(given["x"])
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        for _ in range(repeats):
            scan(**given).backward(weights)
        torch.cuda.synchronize()
    spent = {event.key: event.self_device_time_total / repeats / 1e6 for event in profile.key_averages()}
    return dict(sorted(((name, time) for name, time in spent.items() if time), key=lambda item: -item[1]))


def peaks(device: str) -> tuple[float, float] | None:
    return next((peak for name, peak in PEAKS.items() if name in device), None)


def report(found: dict[str, dict[str, float]], device: str) -> list[dict[str, Any]]:
    """Prints and returns a row per side and pass."""
    model, tokens, best = traffic(), BATCH * FRAMES * TOKENS, peaks(device)
    moved = {"forward": sum(model["forward"].values()) * tokens}
    moved["forward+backward"] = moved["forward"] + sum(model["backward"].values()) * tokens
    rows = []
    print(f"{'':<28}{'us':>10}{'TB/s':>8}{'of peak':>9}{'TFLOP/s':>9}{'of peak':>9}")
    for side, times in found.items():
        for step, seconds in times.items():
            flops = operations()[step] * tokens
            row: dict[str, Any] = {"side": side, "pass": step, "seconds": seconds}
            line = f"{side + ', ' + step:<28}{seconds * 1e6:>10.0f}"
            if side != "mamba-ssm":  # the model does not cover its traffic
                row |= {"bytes": moved[step], "bytes_per_second": moved[step] / seconds}
                row |= {"flop": flops, "flop_per_second": flops / seconds}
                shares = (moved[step] / seconds / best[0], flops / seconds / best[1]) if best else (float("nan"),) * 2
                row |= {"of_peak_bytes": shares[0], "of_peak_flop": shares[1]} if best else {}
                line += f"{moved[step] / seconds / 1e12:>8.2f}{shares[0]:>9.0%}"
                line += f"{flops / seconds / 1e12:>9.0f}{shares[1]:>9.0%}"
            print(line)
            rows.append(row)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--traffic", action="store_true", help="print only the traffic model, which requires no GPU")
    if parser.parse_args().traffic:
        for step, of_kernels in traffic().items():
            for name, size in of_kernels.items():
                print(f"{step:<10}{name:<18}{size:>8,.0f} bytes per token")
        return
    if not torch.cuda.is_available():
        print("video_scan_gpu requires a CUDA device: nothing is measured")
        return
    device = torch.cuda.get_device_name()
    print(f"{device}, torch {torch.__version__}")
    sides = {"ours": ours}
    two_calls = peer()
    if two_calls is not None:
        sides["mamba-ssm"] = two_calls
    found = {name: medians(side) for name, side in sides.items()}
    rows = report(found, device)
    if two_calls is not None:
        for step in found["ours"]:
            print(
                f"{step}: {found['mamba-ssm'][step] / found['ours'][step]:.2f} times as fast as two calls of mamba-ssm"
            )
    spent = kernels(ours)
    print("\nkernels of one forward and backward pass")
    for name, seconds in spent.items():
        print(f"{seconds * 1e6:>10.1f} us  {name[:80]}")
    RESULTS.parent.mkdir(exist_ok=True)
    written = {
        "shape": {"B": BATCH, "T": FRAMES, "S": TOKENS, "H": HEADS, "P": CHANNELS, "N": STATES, "G": 1, "type": "bf16"},
        "device": device,
        "capability": torch.cuda.get_device_capability(),
        "versions": provenance.versions() | {"triton": sys.modules["triton"].__version__, "cuda": torch.version.cuda},
        "git": provenance.git_state(),
        "least_bytes": 7_360 * BATCH * FRAMES * TOKENS,
        "traffic": traffic(),
        "rows": rows,
        "kernels": spent,
    }
    RESULTS.write_text(json.dumps(written, indent=2) + "\n")
    print(f"\nwritten to {RESULTS}")


if __name__ == "__main__":
    main()
