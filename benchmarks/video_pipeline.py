"""Decoding, sampling and resizing 16 frames, against qwen-vl-utils' ``fetch_video`` with torchcodec, in one run.

run: python benchmarks/video_pipeline.py            (needs `pip install --no-deps qwen-vl-utils==0.0.14`; two minutes)

Clips of 10 s with a keyframe every 250 frames (x264's default) are made, 1280x720 and 568x320; folders given as
arguments add real ones. Every measurement is a process of its own, so that peak memory is its own too; the sides take
turns. All give 16 frames of the same numbers at the same size: the benchmark fails where these, or the pixels of our
exact mode by more than one level, differ. Peak memory is the most that a process had above what it had after imports.

qwen-vl-utils resizes through torchvision, which has no build for this PyTorch without CUDA: as in torchvision's own
function for tensors, uint8 is made float, interpolated (bicubic, antialias), clamped, rounded and made uint8 again.
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


def stand_in_for_torchvision() -> None:
    """What qwen-vl-utils imports of torchvision."""
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
    """One process: prints the seconds of each repeat and peak memory, and keeps the frames."""
    from blueberry_video.video.quality import peak_memory

    if side == "qwen-vl-utils":
        stand_in_for_torchvision()
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
                    told = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
                    seconds[side] += told["seconds"]
                    memory[side].append(told["memory"])
                    found[side] = (told["indices"], torch.load(save))
            theirs = statistics.median(seconds[SIDES[0]])
            print(f"\n{clip.name}: {tuple(found[SIDES[0]][1].shape)}")
            for side in SIDES:
                median = statistics.median(seconds[side])
                levels = (found[side][1].short() - found[SIDES[0]][1].short()).abs()
                print(
                    f"  {side:14} {median * 1e3:7.1f} ms   x{theirs / median:.2f}   peak memory "
                    f"{statistics.median(memory[side]) / 1e6:6.0f} MB   at most {levels.max()} levels off, "
                    f"{(levels > 0).float().mean():.1e} of the pixels at all"
                )
                failed |= found[side][0] != found[SIDES[0]][0]
                failed |= "fast" not in side and int(levels.max()) > 1
    if failed:
        sys.exit("frames, sizes or pixels differ")


if __name__ == "__main__":
    main()
