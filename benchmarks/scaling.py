"""Cost as processes, clips and tokens grow: measured with 1 and 2 processes on CPUs, traced and modelled beyond.

    python benchmarks/scaling.py

Prints the tables of docs/scaling.md. The communication model is that of a ring: every GPU sends and receives
2 (N - 1) / N times the gradients in a step, without overlap with the backward pass, so it is an upper bound.
"""

import csv
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np

from blueberry_video.callbacks import PEAK_FLOPS
from blueberry_video.config import compose
from blueberry_video.estimate import estimate
from blueberry_video.launch.command_line import quiet_libraries

ROOT = Path(__file__).resolve().parents[1]
MFU = 0.4
NVLINK, NETWORK = (
    450e9,
    50e9,
)  # bytes/s per GPU: NVLink 4 in a node of H100; 400 Gbit/s InfiniBand per GPU between nodes
PER_NODE = 8
RUN = (
    *("logger=csv", "trainer.max_steps=60", "trainer.log_every_n_steps=10", "data.train.size=4096", "data.val.size=16"),
    *("trainer.check_val_every_n_epoch=100", "expected={}"),
)


def measured(processes: int, repeats: int = 3) -> list[float]:
    """Clips per second of the template, with one thread per process and 16 clips each."""
    rates = []
    for _ in range(repeats):
        with tempfile.TemporaryDirectory() as folder:
            several = [
                "trainer=ddp",
                "trainer.accelerator=cpu",
                "trainer.precision=32-true",
                f"trainer.devices={processes}",
            ]
            command = [
                sys.executable,
                "-m",
                "blueberry_video.train",
                "--config-dir",
                str(ROOT / "experiments/template"),
            ]
            command += [*RUN, f"output_dir={folder}", *(several if processes > 1 else ())]
            subprocess.run(command, env={**os.environ, "OMP_NUM_THREADS": "1"}, check=True, capture_output=True)
            with next(Path(folder).glob("*/*/metrics.csv")).open(newline="") as lines:
                found = [
                    float(row["throughput/clips_per_s"])
                    for row in csv.DictReader(lines)
                    if row["throughput/clips_per_s"]
                ]
            rates.append(statistics.median(found))
    return rates


def traced(name: str, frames: tuple[int, ...], *overrides: str) -> None:
    """Prints GFLOP and activations per clip as frames grow, with fitted exponents."""
    rows = []
    for count in frames:
        words = [*overrides, "data.batch_size=2", f"model.encoder.num_frames={count}"]
        cost = estimate(compose(ROOT / f"experiments/{name}/config.yaml", words))[0]
        rows.append((count, cost.flops / 2e9, cost.activations / 2 / 2**20))
        print(f"| {name} | {count} | {rows[-1][1]:.3g} | {rows[-1][2]:.3g} |", flush=True)
    counts, flops, bytes_ = np.log(np.array(rows).T)
    print(f"| exponent | | {np.polyfit(counts, flops, 1)[0]:.2f} | {np.polyfit(counts, bytes_, 1)[0]:.2f} |")


def modelled() -> None:
    """Prints the step time of VideoMAE-B on H100s as devices grow, 32 clips each."""
    cost = estimate(compose(ROOT / "experiments/videomae_k400/config.yaml", []))[0]
    compute = cost.flops / (MFU * PEAK_FLOPS["H100"])
    for devices in (1, 8, 16, 64, 256):
        slowest = NVLINK if devices <= PER_NODE else NETWORK
        exchange = 2 * (devices - 1) / devices * cost.state["gradients"] / slowest
        rate = 32 * devices / (compute + exchange)
        efficiency = compute / (compute + exchange)
        print(f"| {devices} | {1e3 * compute:.1f} | {1e3 * exchange:.1f} | {rate:,.0f} | {efficiency:.0%} |")


if __name__ == "__main__":
    quiet_libraries()
    print("| processes | clips/s (median of 3 runs) |")
    for processes in (1, 2):
        print(f"| {processes} | {', '.join(f'{rate:.0f}' for rate in measured(processes))} |", flush=True)
    traced("videomae_k400", (16, 32, 64))
    traced("hydra_video", (16, 32, 64))
    modelled()
