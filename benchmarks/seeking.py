"""Time of 8 frames from a 30-minute video in each container, relative to mp4.

run: python benchmarks/seeking.py [--folder FOLDER]     (encodes once with ffmpeg, a minute; about 500 MB)

160x120 at 30 frames per second: H.264 with three B-frames and a keyframe every 250, and MPEG-2 with two and one every
15, the same packets in every container. Transport and program streams seek by decoding times. Containers alternate; the
benchmark fails if the median of one is more than three times that of the mp4 file of its codec.
"""

import argparse
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from blueberry_video.video.decode import DecodeOptions, decode
from blueberry_video.video.sampling import uniform

CODECS = {"h264": "libx264 -preset veryfast -bf 3 -g 250", "mpeg2": "mpeg2video -bf 2 -g 15 -b:v 300k"}
CONTAINERS = {"h264": ("mp4", "mkv", "ts", "m2ts"), "mpeg2": ("mp4", "mkv", "ts", "m2ts", "mpg", "vob")}
MOST = 3.0


def make(folder: Path, codec: str, container: str, seconds: int) -> Path:
    """Writes a file, unless it exists; other containers receive the packets of the first."""
    path = folder / f"{codec}_{seconds}.{container}"
    if path.is_file():
        return path
    first = "mp4" if codec == "h264" else "mpg"  # MPEG-2 in mp4 has no timestamps that a program stream accepts
    source = f"-f lavfi -i testsrc2=size=160x120:rate=30:duration={seconds} -pix_fmt yuv420p -c:v {CODECS[codec]}"
    if container != first:
        source = f"-fflags +genpts -i {make(folder, codec, first, seconds)} -c copy"
    part = path.with_stem(f"part_{path.stem}")
    subprocess.run(["ffmpeg", "-v", "error", "-y", *source.split(), str(part)], check=True)
    return part.rename(path)


def measure(path: Path) -> float:
    begin = time.perf_counter()
    decode(path, lambda info: uniform(info.num_frames, 8), DecodeOptions(num_threads=1, salvage=False))
    return time.perf_counter() - begin


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--folder", type=Path, help="keeps the files, for further runs")
    parser.add_argument("--seconds", type=int, default=1800)
    parser.add_argument("--repeats", type=int, default=5)
    arguments = parser.parse_args()
    slowest = 0.0
    with tempfile.TemporaryDirectory() as temporary:
        folder = arguments.folder or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        for codec, containers in CONTAINERS.items():
            paths = {container: make(folder, codec, container, arguments.seconds) for container in containers}
            times: dict[str, list[float]] = {container: [] for container in containers}
            for _ in range(arguments.repeats):
                for container, path in paths.items():
                    times[container].append(measure(path))
            medians = {container: statistics.median(seconds) for container, seconds in times.items()}
            for container, seconds in medians.items():
                ratio = seconds / medians["mp4"]
                slowest = max(slowest, ratio)
                print(f"{codec:6} {container:5} {seconds:6.2f} s   {ratio:5.2f} x mp4", flush=True)
    if slowest > MOST:
        sys.exit(f"a container takes {slowest:.1f} times as long as mp4")


if __name__ == "__main__":
    main()
