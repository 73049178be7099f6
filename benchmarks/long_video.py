"""Time and memory for a one-hour video: sampling 32 frames, and streaming all 108,000.

run: python benchmarks/long_video.py            (writes and reads about 100 MB in a temporary folder; two minutes)

The clip is 320x240 at 30 frames per second with a keyframe every 250 frames. Each measurement runs in a separate
process. The stream prints its resident memory, which must not grow.
"""

import argparse
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import av
import psutil
from decode import make_clip

from blueberry_video.video import process_video, stream_video
from blueberry_video.video.quality import peak_memory


def repeat(short: Path, long: Path, times: int) -> None:
    """Repeats the packets of a clip, which avoids encoding an hour of video."""
    with av.open(str(short)) as clip, av.open(str(long), "w") as output:
        stream = clip.streams.video[0]
        packets = [
            (bytes(packet), packet.pts, packet.dts, packet.is_keyframe) for packet in clip.demux(stream) if packet.size
        ]
        base, length = stream.time_base, len(packets) * stream.time_base.denominator // 30
        target = output.add_stream_from_template(stream)
        for turn in range(times):
            for data, pts, dts, is_keyframe in packets:
                packet = av.Packet(data)
                packet.pts, packet.dts, packet.time_base = pts + turn * length, dts + turn * length, base
                packet.is_keyframe, packet.stream = is_keyframe, target
                output.mux(packet)


def sample(path: str) -> None:
    begin = time.perf_counter()
    video = process_video(path, num_frames=32)
    seconds = time.perf_counter() - begin
    stages = ", ".join(f"{name} {value:.2f}" for name, value in video.timing.items())
    memory = peak_memory() / 1e6
    print(f"32 of {video.metadata.total_frames} frames: {seconds:.2f} s ({stages}), peak memory {memory:.0f} MB")


def stream(path: str) -> None:
    begin, frames, process = time.perf_counter(), 0, psutil.Process()
    early = 0.0
    for chunk in stream_video(path, format="tensor", dtype="uint8", resized_height=56, resized_width=84):
        frames += len(chunk.indices)
        memory = process.memory_info().rss / 1e6
        if frames % 20_000 < len(chunk.indices):
            print(f"{frames} frames: resident memory {memory:.0f} MB")
        early = memory if frames < 5_000 else early
    grown = memory / early - 1
    print(f"{frames} frames in {time.perf_counter() - begin:.0f} s; memory since frame 5,000: {grown:+.1%}")
    if grown > 0.05:
        sys.exit("memory grows with the length of the video")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--measure", nargs=2, help=argparse.SUPPRESS)
    parser.add_argument("--hours", type=float, default=1.0)
    arguments = parser.parse_args()
    if arguments.measure:
        name, path = arguments.measure
        return {"sample": sample, "stream": stream}[name](path)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "long.mp4")
        repeat(make_clip(Path(folder, "short.mp4"), 320, 240), path, times=round(360 * arguments.hours))
        print(f"{arguments.hours:g} hours, {path.stat().st_size / 1e6:.0f} MB", flush=True)
        for name in ("sample", "sample", "stream"):
            subprocess.run([sys.executable, __file__, "--measure", name, str(path)], check=True)


if __name__ == "__main__":
    main()
