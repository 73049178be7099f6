"""Decoding speed of all available video backends by number of threads, with a recommendation for this machine.

run: make decode-bench                    (or python benchmarks/decode.py FOLDER… to measure on your own videos)

Decodes 16 uniformly spaced frames of a clip to RGB, including the packet index. The clips are 10 s of H.264, 1280x720
and 568x320 with a keyframe every 250 frames, and 568x320 with a keyframe every 15. Backends alternate; the benchmark
fails if their frames differ. Set the recommendation in conf/video/general.yaml or in a call: process_video(…,
num_threads=…).
"""

import argparse
import statistics
import sys
import tempfile
import time
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import torch

from blueberry_video.video.backends import READERS, backend_failure
from blueberry_video.video.decode import DecodeOptions, decode
from blueberry_video.video.errors import VideoError
from blueberry_video.video.sampling import uniform

THREADS = (1, 2, 0)  # 0: chosen by FFmpeg


def make_clip(path: Path, width: int, height: int, keyint: int = 250, seconds: int = 10) -> Path:
    """Writes a clip of a moving textured image with noise, which compresses about as well as real footage."""
    rng = np.random.default_rng(0)
    coarse = rng.integers(0, 255, (height // 20 + 24, width // 20 + 24, 3), dtype=np.uint8)
    canvas = coarse.repeat(20, axis=0).repeat(20, axis=1)
    with av.open(str(path), "w") as output:
        stream = output.add_stream("libx264", rate=30)
        stream.width, stream.height, stream.pix_fmt, stream.gop_size = width, height, "yuv420p", keyint
        stream.codec_context.time_base = Fraction(1, 30)
        for i in range(30 * seconds):
            top, left = round(100 + 90 * np.sin(i / 20)), round(100 + 90 * np.cos(i / 31))
            frame = canvas[top : top + height, left : left + width].astype(np.int16)
            frame = (frame + rng.integers(-6, 7, (height, width, 1))).clip(0, 255).astype(np.uint8)
            output.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        output.mux(stream.encode())
    return path


def measure(clips: list[Path], repeats: int) -> dict[tuple[str, int], dict[Path, list[float]]]:
    """Returns seconds of each (backend, threads) on each clip; prints why unavailable backends fail."""
    working = []
    for name in READERS:
        if reason := backend_failure(name):
            print(f"{name} does not work here: {reason}")
        else:
            working.append(name)
    sides = [(name, threads) for name in working for threads in THREADS]
    seconds: dict[tuple[str, int], dict[Path, list[float]]] = {side: {} for side in sides}
    for clip in clips:
        expected: torch.Tensor | None = None
        for _ in range(repeats):
            for backend, threads in sides:
                options = DecodeOptions(backends=(backend,), num_threads=threads, salvage=False)
                begin = time.perf_counter()
                try:
                    frames = decode(clip, lambda info: uniform(info.num_frames, 16, pad=True), options)
                except VideoError as error:
                    print(f"{clip.name}: {error}")
                    continue
                seconds[backend, threads].setdefault(clip, []).append(time.perf_counter() - begin)
                expected = frames.pixels if expected is None else expected
                if (frames.pixels.short() - expected.short()).abs().max() > 2:
                    sys.exit(f"{backend} decodes different frames of {clip.name}")
    return seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folders", nargs="*", type=Path, help="folders of videos to measure instead")
    parser.add_argument("--repeats", type=int, default=5)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        clips = [file for given in arguments.folders for file in sorted(given.iterdir()) if file.is_file()]
        clips = clips or [
            make_clip(Path(folder, "720p.mp4"), 1280, 720),
            make_clip(Path(folder, "320p.mp4"), 568, 320),
            make_clip(Path(folder, "320p-short-groups.mp4"), 568, 320, keyint=15),
        ]
        found = measure(clips, arguments.repeats)
    for clip in clips:
        if not any(clip in by_clip for by_clip in found.values()):
            print(f"{clip.name} is left out: no backend decodes it")
    clips = [clip for clip in clips if any(clip in by_clip for by_clip in found.values())]
    if not clips:
        sys.exit("no backend decodes any of these clips")
    found = {side: by_clip for side, by_clip in found.items() if by_clip}
    medians = {
        side: {clip: statistics.median(times) for clip, times in by_clip.items()} for side, by_clip in found.items()
    }
    names = {clip: clip.name[:24] for clip in clips}
    print(f"{'milliseconds':24}" + "".join(f"{names[clip]:>26}" for clip in clips))
    for (backend, threads), by_clip in medians.items():
        row = "".join(f"{by_clip[clip] * 1e3:26.1f}" if clip in by_clip else f"{'—':>26}" for clip in clips)
        print(f"{backend + (f', {threads} threads' if threads else ', chosen by FFmpeg'):24}{row}")
    everywhere = {side: by_clip for side, by_clip in medians.items() if len(by_clip) == len(clips)}
    if not everywhere:
        sys.exit("no backend decodes all of these clips")
    total = {side: statistics.geometric_mean(by_clip.values()) for side, by_clip in everywhere.items()}
    best, threads = min(total, key=lambda side: total[side])
    order = sorted({side[0] for side in total}, key=lambda name: min(t for side, t in total.items() if side[0] == name))
    print(f"\nrecommended here: backends: [{', '.join(order)}], num_threads: {threads} ({best} is the fastest)")
    print("in loader workers, of which there are several, keep num_threads: 1")


if __name__ == "__main__":
    main()
