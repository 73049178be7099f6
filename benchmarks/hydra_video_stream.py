"""Streaming of 10,000 frames through Hydra Video: equality with a full forward pass, memory, and time per frame.

run: python benchmarks/hydra_video_stream.py             (4 layers of width 192 at 64², fp32: two minutes)

A frame is one tubelet. First, 64 frames are streamed and processed at once, and the largest difference of the features
is printed. Then a long stream of new frames runs with batch size 1: the memory of the process and the median time per
frame should stay constant. CPU time, which other work on the machine does not affect, is printed in addition to
wall-clock time.
"""

import argparse
import statistics
import time

import psutil
import torch

from blueberry_video.models.hydra_video.model import HydraVideo

WINDOW = 250  # frames per median


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--frames", type=int, default=10_000)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(0)
    model = HydraVideo(image_size=64, num_frames=16, embed_dim=192, depth=4, state_dim=64).eval()
    tubelet = model.patch_size[0]

    video = torch.randn(1, 3, 64 * tubelet, 64, 64)
    with torch.no_grad():
        whole, state, parts = model(video), None, []
        for frame in video.split(tubelet, dim=2):
            features, state = model.stream(frame, state)
            parts.append(features)
    error = (torch.cat(parts, 1) - whole).abs().max() / whole.abs().max()
    print(f"64 frames streamed and at once: largest difference {error:.1e}, relative to the largest feature")

    process, state = psutil.Process(), None
    wall: list[float] = []
    cpu: list[float] = []
    marks = {10, 100, 1_000} | set(range(2_000, arguments.frames + 1, 2_000)) | {arguments.frames}
    print(f"{'frame':>8} {'MB':>8} {'ms':>8} {'CPU ms':>8}")
    for index in range(1, arguments.frames + 1):
        frame = torch.randn(1, 3, tubelet, 64, 64)
        start, used = time.perf_counter(), time.process_time()
        _, state = model.stream(frame, state)
        wall.append(time.perf_counter() - start)
        cpu.append(time.process_time() - used)
        if index in marks:
            times = (statistics.median(kept[-WINDOW:]) * 1e3 for kept in (wall, cpu))
            print(
                f"{index:8} {process.memory_info().rss / 2**20:8.1f} {next(times):8.2f} {next(times):8.2f}", flush=True
            )


if __name__ == "__main__":
    main()
