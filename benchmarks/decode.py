"""Which decoder and how many threads this machine decodes fastest with: every backend that works here, side by side.

run: make decode-bench                    (or python benchmarks/decode.py FOLDER… to measure on videos of your own)

Sixteen frames spread over a clip, from the packet index to RGB: the clips are 10 s of H.264 with a keyframe every 250
frames, 1280x720 and 568x320, and with a keyframe every 15. Backends take turns; all must show the same frames, or the
benchmark fails. What it recommends goes into conf/video/general.yaml, or into a call: process_video(…, num_threads=…).
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

THREADS = (1, 2, 0)  # 0: FFmpeg chooses


def make_clip(path: Path, width: int, height: int, keyint: int = 250, seconds: int = 10) -> Path:
    """A textured picture that moves under a camera, with some noise: compresses about as real footage does."""
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
    """Seconds of each (backend, threads) on each clip; prints which backends do not work, and why."""
    working = []
    for name in READERS:
        if reason := backend_failure(name):
            print(f"{name} does not work here: {reason}")
        else:
            working.append(name)
    sides = [(name, threads) for name in working for threads in THREADS]
    seconds: dict[tuple[str, int], dict[Path, list[float]]] = {side: {} for side in sides}
    for clip in clips:
        shown: torch.Tensor | None = None
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
                shown = frames.pixels if shown is None else shown
                if (frames.pixels.short() - shown.short()).abs().max() > 2:
                    sys.exit(f"{backend} shows other frames of {clip.name}")
    return seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folders", nargs="*", type=Path, help="folders of videos to measure on instead")
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
    medians = {
        side: {clip: statistics.median(times) for clip, times in by_clip.items()} for side, by_clip in found.items()
    }
    names = {clip: clip.name[:24] for clip in clips}
    print(f"{'milliseconds':24}" + "".join(f"{names[clip]:>26}" for clip in clips))
    for (backend, threads), by_clip in medians.items():
        told = "".join(f"{by_clip[clip] * 1e3:26.1f}" if clip in by_clip else f"{'—':>26}" for clip in clips)
        print(f"{backend + (f', {threads} threads' if threads else ', FFmpeg chooses'):24}{told}")
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
