"""Decoding, sampling and resizing of 16 frames, compared with ``fetch_video`` of qwen-vl-utils (torchcodec).

run: python benchmarks/video_pipeline.py            (needs `pip install --no-deps qwen-vl-utils==0.0.14`; two minutes)

Generates clips of 10 s with a keyframe every 250 frames (x264's default), 1280x720 and 568x320; folders passed as
arguments add real clips. Each measurement runs in a separate process, which isolates peak memory; the sides alternate.
All return 16 frames: the benchmark fails if frame indices or sizes differ, or if pixels of our exact mode differ by
more than one level. Peak memory is measured above the memory after imports.

qwen-vl-utils resizes with torchvision, which has no CPU build for this PyTorch version. A stub does the same as
torchvision's function for tensors: uint8 is converted to float, interpolated (bicubic, antialias), clamped, rounded and
converted back.
"""

import argparse
import json
import platform
import statistics
import subprocess
import sys
import tempfile
import time
import types
from enum import Enum
from pathlib import Path

import torch
import torch.nn.functional as F
from decode import make_clip

SIDES = ("qwen-vl-utils", "ours exact", "ours fast")
ROUNDS, REPEATS = 3, 5


def stub_torchvision() -> None:
    """Registers a stub of the parts of torchvision that qwen-vl-utils imports."""
    mode = Enum("InterpolationMode", {"BICUBIC": "bicubic"})

    def resize(video: torch.Tensor, size: list[int], interpolation: Enum, antialias: bool) -> torch.Tensor:
        resized = F.interpolate(video.float(), size, mode=interpolation.value, antialias=antialias)
        return resized.clamp_(0, 255).round_().to(torch.uint8)

    functional = types.SimpleNamespace(resize=resize)
    transforms = types.ModuleType("torchvision.transforms")
    transforms.functional, transforms.InterpolationMode = functional, mode  # type: ignore[attr-defined]
    torchvision = types.ModuleType("torchvision")
    torchvision.io, torchvision.transforms = types.ModuleType("torchvision.io"), transforms  # type: ignore[attr-defined]
    torchvision.__version__ = "0.0"  # type: ignore[attr-defined]
    sys.modules |= {"torchvision": torchvision, "torchvision.io": torchvision.io, "torchvision.transforms": transforms}


def measure(side: str, path: str, save: str) -> None:
    """Runs in a separate process: prints the seconds of each repeat and peak memory, and saves the frames."""
    from blueberry_video.video.quality import peak_memory

    if side == "qwen-vl-utils":
        stub_torchvision()
        from qwen_vl_utils.vision_process import fetch_video

        def run() -> tuple[torch.Tensor, list[int]]:
            video, known = fetch_video({"video": path, "nframes": 16}, return_video_metadata=True)
            return video, known["frames_indices"]
    else:
        from blueberry_video.video import process_video

        def run() -> tuple[torch.Tensor, list[int]]:
            same = {"dtype": "float32", "rescale": False, "mean": None, "std": None, "measure_quality": False}
            video = process_video(path, num_frames=16, resample=side.split()[1], **same)
            return video.frames, list(video.metadata.frame_indices)

    start = peak_memory()
    seconds = []
    for _ in range(REPEATS):
        begin = time.perf_counter()
        frames, indices = run()
        seconds.append(time.perf_counter() - begin)
    print(json.dumps({"seconds": seconds, "memory": peak_memory() - start, "indices": indices}))
    torch.save(frames.to(torch.uint8).contiguous(), save)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folders", nargs="*", type=Path, help="folders of real clips")
    parser.add_argument("--measure", nargs=3, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.measure:
        return measure(*arguments.measure)
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads, {platform.processor() or platform.machine()}")
    failed = False
    with tempfile.TemporaryDirectory() as folder:
        clips = [make_clip(Path(folder, f"{h}p.mp4"), w, h) for w, h in ((1280, 720), (568, 320))]
        clips += [clip for given in arguments.folders for clip in sorted(given.glob("*.mp4"))]
        for clip in clips:
            seconds: dict[str, list[float]] = {side: [] for side in SIDES}
            memory: dict[str, list[int]] = {side: [] for side in SIDES}
            found = {}
            for _ in range(ROUNDS):
                for side in SIDES:
                    save = Path(folder, "frames.pt")
                    command = [sys.executable, __file__, "--measure", side, str(clip), str(save)]
                    measured = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
                    seconds[side] += measured["seconds"]
                    memory[side].append(measured["memory"])
                    found[side] = (measured["indices"], torch.load(save))
            theirs = statistics.median(seconds[SIDES[0]])
            print(f"\n{clip.name}: {tuple(found[SIDES[0]][1].shape)}")
            for side in SIDES:
                median = statistics.median(seconds[side])
                levels = (found[side][1].short() - found[SIDES[0]][1].short()).abs()
                print(
                    f"  {side:14} {median * 1e3:7.1f} ms   x{theirs / median:.2f}   peak memory "
                    f"{statistics.median(memory[side]) / 1e6:6.0f} MB   largest difference {levels.max()} levels, in "
                    f"{(levels > 0).float().mean():.1e} of the pixels"
                )
                failed |= found[side][0] != found[SIDES[0]][0]
                failed |= "fast" not in side and int(levels.max()) > 1
    if failed:
        sys.exit("frames, sizes or pixels differ")


if __name__ == "__main__":
    main()
