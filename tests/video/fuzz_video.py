"""Thousands of damaged videos through the pipeline, each in a process that can be killed. Not collected by pytest.

    python tests/video/fuzz_video.py --runs 10000
    python tests/video/fuzz_video.py --only 1234        # repeats one run and keeps its file

Small base videos of many containers and codecs, and real clips where there are any, are damaged in ways that follow
from the seed and the number of the run. Exit status 1: an error that is not a VideoError, a hang, memory or files left
behind. Crashes inside a decoder end only their worker; they are counted, and named so that they can be repeated.
"""

import argparse
import contextlib
import faulthandler
import gc
import math
import os
import random
import re
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import psutil

from blueberry_video.video.errors import KilledError, VideoError
from blueberry_video.video.pool import Outcome, run_in_processes

REAL_CLIP_BYTES = 300_000
ALLOWED_GROWTH = 1.05  # of the parent's memory, from a tenth of the runs to the end
HANG_SECONDS = 400.0  # without any outcome

# encoder, container, extension, pixel format, options of the encoder, options of the container
RECIPES: list[tuple[str, str, str, str, dict[str, str], dict[str, str]]] = [
    ("libx264", "mp4", "mp4", "yuv420p", {"bf": "2"}, {}),
    ("libx264", "mp4", "mp4", "yuv420p", {}, {"movflags": "+faststart"}),
    ("libx264", "mp4", "mp4", "yuv444p", {}, {"movflags": "frag_keyframe+empty_moov"}),
    ("libx264", "mov", "mov", "yuv420p", {"bf": "0"}, {}),
    ("libx264", "matroska", "mkv", "yuv420p10le", {}, {}),
    ("libx264", "avi", "avi", "yuv420p", {"bf": "0"}, {}),
    ("libx264", "flv", "flv", "yuv420p", {}, {}),
    ("libx264", "mpegts", "ts", "yuv420p", {}, {}),
    ("libx264", "h264", "h264", "yuv420p", {}, {}),
    ("libx265", "mp4", "mp4", "yuv420p", {"x265-params": "log-level=none"}, {}),
    ("libx265", "matroska", "mkv", "yuv420p10le", {"x265-params": "log-level=none"}, {}),
    ("libx265", "hevc", "hevc", "yuv420p", {"x265-params": "log-level=none"}, {}),
    ("libvpx", "webm", "webm", "yuv420p", {"deadline": "realtime", "cpu-used": "8"}, {}),
    ("libvpx", "ogg", "ogg", "yuv420p", {"deadline": "realtime", "cpu-used": "8"}, {}),
    ("libvpx-vp9", "webm", "webm", "yuv420p", {"deadline": "realtime", "cpu-used": "8"}, {}),
    ("libvpx-vp9", "mp4", "mp4", "yuv420p", {"deadline": "realtime", "cpu-used": "8"}, {}),
    ("libvpx-vp9", "ivf", "ivf", "yuv420p", {"deadline": "realtime", "cpu-used": "8"}, {}),
    ("libsvtav1", "mp4", "mp4", "yuv420p", {"preset": "12"}, {}),
    ("libsvtav1", "matroska", "mkv", "yuv420p", {"preset": "12"}, {}),
    ("libsvtav1", "ivf", "ivf", "yuv420p", {"preset": "12"}, {}),
    ("mpeg4", "avi", "avi", "yuv420p", {}, {}),
    ("mpeg4", "mp4", "mp4", "yuv420p", {"bf": "2"}, {}),
    ("mpeg4", "m4v", "m4v", "yuv420p", {}, {}),
    ("msmpeg4v3", "avi", "avi", "yuv420p", {}, {}),
    ("mjpeg", "avi", "avi", "yuvj420p", {}, {}),
    ("mjpeg", "mov", "mov", "yuvj422p", {}, {}),
    ("mjpeg", "mjpeg", "mjpeg", "yuvj420p", {}, {}),
    ("mpeg1video", "mpeg", "mpg", "yuv420p", {}, {}),
    ("mpeg2video", "mpegts", "ts", "yuv420p", {"bf": "2"}, {}),
    ("mpeg2video", "mpeg2video", "m2v", "yuv420p", {}, {}),
    ("flv", "flv", "flv", "yuv420p", {}, {}),
    ("wmv2", "asf", "wmv", "yuv420p", {}, {}),
    ("ffv1", "matroska", "mkv", "yuv420p", {}, {}),
    ("png", "mov", "mov", "rgb24", {}, {}),
    ("rawvideo", "avi", "avi", "yuv420p", {}, {}),
    ("rawvideo", "yuv4mpegpipe", "y4m", "yuv420p", {}, {}),
    ("gif", "gif", "gif", "rgb8", {}, {}),
]


def process(path: Path) -> str:
    """The function under test: raises, or says in a few words what came out."""
    from blueberry_video.video.process import process_video

    video = process_video(path, model="qwen2.5-vl", num_frames=8, pad_frames=True, salvage=True)
    return "ok with missing frames" if video.missing.any() else "ok"


@dataclass(frozen=True)
class Run:
    """One damaged video, fully determined: the base's file, the seed, the number of the run."""

    base: Path
    seed: int
    number: int


def process_damaged(run: Run) -> str:
    """Writes a damaged copy of the base to a new folder, and processes it."""
    _, data = damaged(run)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, f"damaged{run.base.suffix}")
        path.write_bytes(data)
        return process(path)


# bases


def make_base(number: int, seed: int, folder: Path) -> Path | None:
    """Writes a video of 10 to 40 frames of a moving picture; None where its encoder is missing."""
    import av
    import numpy as np

    codec, container, extension, pixels, options, container_options = RECIPES[number % len(RECIPES)]
    if codec not in av.codecs_available:
        return None
    rng = random.Random(f"base {seed} {number}")
    width, height = (rng.randrange(64, 162, 2) for _ in range(2))
    count, rate = rng.randint(10, 40), rng.choice([24, 25, 30])
    path = folder / f"{number:04d}_{codec}.{extension}"
    rows, columns = np.mgrid[:height, :width]
    noise = np.random.default_rng(number).integers(0, 40, (height, width, 3))
    with av.open(str(path), "w", format=container, options=container_options) as output:
        stream = output.add_stream(codec, rate=rate, options={"g": str(rng.choice([1, 5, 12, 250])), **options})
        stream.width, stream.height, stream.pix_fmt = width, height, pixels
        stream.codec_context.thread_count = 1
        for t in range(count):
            ramp = np.stack([rows + 5 * t, columns + 3 * t, rows + columns], axis=-1) % 216 + np.roll(noise, t, axis=1)
            frame = av.VideoFrame.from_ndarray(ramp.astype(np.uint8), format="rgb24").reformat(format=pixels)
            frame.pts = t
            output.mux(stream.encode(frame))
        output.mux(stream.encode(None))
    return path


def real_clips(folders: list[Path], folder: Path) -> list[Path]:
    """Copies of the files of ``folders``, cut to a size at which thousands of runs stay quick."""
    copies = []
    for number, file in enumerate(sorted(file for given in folders for file in given.iterdir())):
        if file.suffix in {".mp4", ".mov", ".mkv", ".webm", ".avi", ".gif", ".ts"}:
            copies.append(folder / f"real{number:02d}_{file.name}")
            with file.open("rb") as source:
                copies[-1].write_bytes(source.read(REAL_CLIP_BYTES))
    return copies


# damage: each changes ``data`` in place and says in a few words how


def cut(data: bytearray, rng: random.Random) -> str:
    length = rng.randrange(len(data))
    del data[length:]
    return f"cut to {length} bytes"


def flip(data: bytearray, rng: random.Random) -> str:
    count = round(10 ** rng.uniform(0, 3))
    for _ in range(count):
        data[rng.randrange(len(data))] ^= rng.randrange(1, 256)
    return f"{count} bytes flipped"


def flip_header(data: bytearray, rng: random.Random) -> str:
    count, end = rng.randint(1, 16), min(len(data), rng.choice([64, 512, 2048]))
    for _ in range(count):
        data[rng.randrange(end)] = rng.randrange(256)
    return f"{count} of the first {end} bytes set"


def zero(data: bytearray, rng: random.Random) -> str:
    start, end = block(data, rng)
    data[start:end] = bytes(end - start)
    return f"bytes {start} to {end} zeroed"


def remove(data: bytearray, rng: random.Random) -> str:
    start, end = block(data, rng)
    del data[start:end]
    return f"bytes {start} to {end} removed"


def duplicate(data: bytearray, rng: random.Random) -> str:
    start, end = block(data, rng)
    data[end:end] = data[start:end]
    return f"bytes {start} to {end} doubled"


def swap(data: bytearray, rng: random.Random) -> str:
    size = max(1, min(len(data) // 4, round(10 ** rng.uniform(1, 4))))
    a, b = (rng.randrange(len(data) - size + 1) for _ in range(2))
    data[a : a + size], data[b : b + size] = data[b : b + size], data[a : a + size]
    return f"{size} bytes at {a} and {b} swapped"


def resize_box(data: bytearray, rng: random.Random) -> str:
    """The sizes and counts of an mp4's boxes; in a file without any, four bytes anywhere."""
    names = rb"moov|trak|mdia|minf|stbl|stsd|stsz|stts|ctts|stsc|stco|stss|mdat|ftyp|moof|traf|trun|avc1|mvhd|tkhd|elst"
    starts = [match.start() for match in re.finditer(names, data)]
    at = rng.choice(starts) + rng.choice([-4, 4, 8, 12]) if starts else rng.randrange(len(data))
    value = rng.choice([0, 1, 7, 0xFF, 0xFFFF, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFF, rng.getrandbits(32)])
    at = max(0, min(at, len(data) - 4))
    data[at : at + 4] = value.to_bytes(4, "big")
    return f"four bytes at {at} set to {value:#x}"


def block(data: bytearray, rng: random.Random) -> tuple[int, int]:
    start = rng.randrange(len(data))
    return start, min(len(data), start + round(10 ** rng.uniform(0, math.log10(len(data) + 1))))


DAMAGES = [cut, flip, flip, flip_header, zero, remove, duplicate, swap, resize_box]


def damaged(run: Run) -> tuple[str, bytes]:
    """What was done to the base of a run, and the bytes that it left; one kind of damage, at times two."""
    rng = random.Random(f"damage {run.seed} {run.number}")
    data = bytearray(run.base.read_bytes())
    applied = []
    for _ in range(rng.choice([1, 1, 1, 2])):
        if data:
            applied.append(rng.choice(DAMAGES)(data, rng))
    return ", ".join(applied), bytes(data)


# the campaign


def kind(outcome: Outcome[Run, str]) -> str:
    """The line under which an outcome is counted."""
    error = outcome.error
    if error is None:
        return outcome.value or ""
    if not isinstance(error, KilledError):
        return type(error).__name__ if isinstance(error, VideoError) else f"UNCLEAR {type(error).__name__}"
    for sign, name in (("timeout=", "timeout"), ("memory_bytes=", "memory")):
        if sign in str(error):
            return f"killed: {name}"
    return f"killed: {match[0]}" if (match := re.search(r"SIG\w+|code \d+", str(error))) else "killed"


def left_behind(folder: Path, known: set[str]) -> list[str]:
    """Temporary files of the workers, and shared memory that stays (other programs' comes and goes)."""
    files = [str(path) for path in folder.iterdir()]
    shared = set(os.listdir("/dev/shm")) - known
    if shared:
        time.sleep(3)
    return files + [f"/dev/shm/{name}" for name in sorted(shared & set(os.listdir("/dev/shm")))]


def campaign(arguments: argparse.Namespace, bases: list[Path], temporary: Path) -> bool:
    """Runs all, prints what became of them, and returns whether everything is as it must be."""
    parent, shared = psutil.Process(), set(os.listdir("/dev/shm"))
    counts: Counter[str] = Counter()
    shown: Counter[str] = Counter()
    slowest, largest, first_memory, start = (0.0, -1), (0, -1), 0, time.monotonic()
    runs = (Run(bases[i % len(bases)], arguments.seed, i) for i in range(arguments.runs))
    for outcome in in_pool(process_damaged, runs, arguments):
        faulthandler.dump_traceback_later(HANG_SECONDS, exit=True)
        name, done = kind(outcome), counts.total() + 1
        counts[name] += 1
        slowest = max(slowest, (outcome.seconds, outcome.item.number))
        largest = max(largest, (outcome.peak_memory, outcome.item.number))
        if name.startswith(("killed", "UNCLEAR")) and shown[name] < 20:
            shown[name] += 1
            print(f"{name}: --only {outcome.item.number} ({outcome.item.base.name}, {damaged(outcome.item)[0]})")
            if name.startswith("UNCLEAR"):
                print(f"    {outcome.error}")
        if done == max(1, arguments.runs // 10):
            gc.collect()
            first_memory = parent.memory_info().rss
        if done % 500 == 0:
            print(f"{done:,} of {arguments.runs:,}, {done / (time.monotonic() - start):.1f} a second", flush=True)
    faulthandler.cancel_dump_traceback_later()
    gc.collect()
    seconds, last_memory = time.monotonic() - start, parent.memory_info().rss
    left = left_behind(temporary, shared)
    for name, count in counts.most_common():
        print(f"{count:7,}  {name}")
    print(f"{arguments.runs:,} runs in {seconds:.0f} s: {arguments.runs / seconds:.1f} a second")
    print(f"slowest {slowest[0]:.1f} s (--only {slowest[1]}), largest {largest[0] >> 20} MB (--only {largest[1]})")
    print(f"memory of the parent: {first_memory / 2**20:.1f} MB at a tenth, {last_memory / 2**20:.1f} MB at the end")
    print(f"files left behind: {len(left)} {' '.join(left[:5])}")
    unclear = sum(count for name, count in counts.items() if name.startswith("UNCLEAR"))
    return not unclear and not left and last_memory <= ALLOWED_GROWTH * first_memory


def in_pool(function, items, arguments: argparse.Namespace) -> Iterator[Outcome]:
    limit = arguments.memory_mb * 2**20
    options = {"workers": arguments.workers, "timeout": arguments.timeout, "memory_bytes": limit, "ordered": False}
    return run_in_processes(function, items, **options)


def one_run(arguments: argparse.Namespace, base: Path) -> bool:
    run = Run(base, arguments.seed, arguments.only)
    applied, data = damaged(run)
    kept = Path.cwd() / f"damaged_{run.seed}_{run.number}{base.suffix}"
    kept.write_bytes(data)
    [outcome] = in_pool(process_damaged, [run], arguments)
    print(f"{base.name}: {applied}; kept as {kept}\n{kind(outcome)} in {outcome.seconds:.2f} s")
    if outcome.error is not None:
        print(outcome.error, *getattr(outcome.error, "__notes__", []), sep="\n")
    return outcome.error is None or isinstance(outcome.error, VideoError)


def main() -> int:
    parser = argparse.ArgumentParser(description="Damaged videos through the pipeline, in killable processes.")
    parser.add_argument("--runs", type=int, default=10_000)
    parser.add_argument("--bases", type=int, default=200)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--timeout", type=float, default=20, help="seconds a run")
    parser.add_argument("--memory-mb", type=int, default=1500, help="that a worker may take")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", type=int, help="repeat the run of this number alone, and keep its file")
    given = os.environ.get("BLUEBERRY_TEST_VIDEOS")
    parser.add_argument("--videos", type=Path, nargs="*", default=[Path(given)] if given else [], help="real clips")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="fuzz_bases_") as folder, tempfile.TemporaryDirectory() as temporary:
        os.environ["TMPDIR"] = tempfile.tempdir = temporary  # what is left in it afterwards was left by the workers
        os.environ["SVT_LOG"] = "0"
        real = real_clips(arguments.videos, Path(folder))
        start = time.monotonic()
        made = in_pool(partial(make_base, seed=arguments.seed, folder=Path(folder)), range(arguments.bases), arguments)
        with contextlib.closing(made):
            outcomes = sorted(made, key=lambda outcome: outcome.index)
        for outcome in outcomes:
            if outcome.error is not None:
                raise outcome.error
        bases = real + [outcome.value for outcome in outcomes if outcome.value is not None]
        bases = bases[: arguments.bases]
        print(f"{len(bases)} bases ({len(real)} real clips) in {time.monotonic() - start:.0f} s")
        if arguments.only is not None:
            return 0 if one_run(arguments, bases[arguments.only % len(bases)]) else 1
        return 0 if campaign(arguments, bases, Path(temporary)) else 1


if __name__ == "__main__":
    sys.exit(main())
