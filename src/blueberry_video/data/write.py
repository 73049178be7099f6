"""Writer of mp4 folders from a dataset of clips, in the layout of ``VideoFolder``.

    python -m blueberry_video.data.write source=sprites out=data/sprites train=4000 val=500 [num_frames=16
    image_size=32 …]

writes ``videos/*.mp4`` (H.264), ``metadata.jsonl`` with caption, class names and split, ``classes.json`` and a manifest
of the settings. The folder is renamed to its final name once complete; the same command does nothing if it exists.
"""

import contextlib
import fcntl
import inspect
import json
import signal
import sys
from collections.abc import Iterable, Iterator, Sequence
from fractions import Fraction
from pathlib import Path
from typing import BinaryIO

import av
import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from blueberry_video.atomic import atomic_file, atomic_folder, explained_errors
from blueberry_video.data.clips import KeyedClips
from blueberry_video.data.progress import Progress
from blueberry_video.data.sprites import Sprites
from blueberry_video.data.world import World

SOURCES = {"sprites": Sprites, "world": World}
MANIFEST = "manifest.json"
PRESETS = ("ultrafast", "superfast", "veryfast", "faster", "fast", "medium", "slow", "slower", "veryslow", "placebo")


class FolderWriter:
    """Writer of a folder of mp4 files; pass it as ``VideoFolder(make=…)`` to create the folder on first use.

    Args:
        sources: split -> dataset of clips with ``cache_key``, ``classes`` and ``reversal_pairs``.
        crf: H.264 quality, 0 (nearly lossless) to 51. Chroma is always stored at half resolution (yuv420p).
        preset: x264 preset. ``superfast`` is the fastest on small clips; ``ultrafast`` is slower and compresses worse.
        num_workers: processes; 0 writes in the current one.

    Raises:
        ValueError: no sources, sources with different classes, or a value out of range.
    """

    def __init__(self, sources: dict[str, KeyedClips], crf: int = 8, preset: str = "superfast", num_workers: int = 2):
        if not sources:
            raise ValueError("sources is empty: name at least one split and its dataset.")
        if not 0 <= crf <= 51:
            raise ValueError(f"crf={crf} must be 0 (nearly lossless) to 51.")
        if preset not in PRESETS:
            raise ValueError(f"preset={preset!r} must be a preset of x264: {', '.join(PRESETS)}.")
        self.sources = dict(sources)
        first = next(iter(self.sources.values()))
        self.classes: dict[str, tuple[str, ...]] = getattr(first, "classes", {})
        self.reversal_pairs: dict[str, tuple[tuple[int, int], ...]] = getattr(first, "reversal_pairs", {})
        for split, source in self.sources.items():
            if not hasattr(source, "cache_key"):
                raise ValueError(
                    f"sources.{split} ({type(source).__name__}) has no cache_key, which the manifest needs: give it "
                    "one that names everything that a clip depends on."
                )
            if getattr(source, "classes", {}) != self.classes:
                raise ValueError(
                    f"sources.{split} has different classes than the first split: write them to separate folders."
                )
        self.crf, self.preset, self.num_workers = crf, preset, num_workers

    def __call__(self, out: str | Path) -> None:
        """Writes the folder ``out`` unless it exists. Of several processes, one writes and the others wait.

        Raises:
            FileExistsError: ``out`` contains something else.
            ValueError: a clip with odd height or width, which H.264 cannot store in yuv420p.
        """
        out = Path(out).resolve()
        out.parent.mkdir(parents=True, exist_ok=True)
        with (out.parent / f".{out.name}.lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)  # released when closed, also by a crash
            if self._is_written(out):
                return
            with atomic_folder(out) as partial:
                self._write(partial)

    def manifest(self) -> dict:
        """Everything that the content of the folder depends on."""
        splits = {split: {"clips": len(d), "cache_key": d.cache_key} for split, d in self.sources.items()}
        return {"format": 1, "codec": "libx264", "preset": self.preset, "crf": self.crf, "splits": splits}

    def _is_written(self, out: Path) -> bool:
        if not out.exists() or (out.is_dir() and not any(out.iterdir())):
            return False
        found = json.loads((out / MANIFEST).read_text()) if (out / MANIFEST).is_file() else None
        wanted = self.manifest()
        if found == wanted:
            return True
        reason = f"has no {MANIFEST} of this writer"
        if isinstance(found, dict):
            changed = [
                f"{key} is {found.get(key)} and would be {wanted[key]}"
                for key in wanted
                if found.get(key) != wanted[key]
            ]
            reason = f"contains another dataset ({'; '.join(changed)})"
        raise FileExistsError(f"out={out} {reason}; nothing was changed: choose another out, or remove the folder.")

    def _write(self, folder: Path) -> None:
        (folder / "videos").mkdir()
        with (folder / "metadata.jsonl").open("w", encoding="utf-8") as metadata:
            for row in self._rows(folder / "videos"):
                metadata.write(json.dumps(row, ensure_ascii=False) + "\n")
        named = {"classes": self.classes, "reversal_pairs": self.reversal_pairs}
        (folder / "classes.json").write_text(json.dumps(named, indent=1))
        (folder / MANIFEST).write_text(json.dumps(self.manifest(), indent=1))

    def _rows(self, videos: Path) -> Iterator[dict]:
        progress = Progress("video folder", sum(len(source) for source in self.sources.values()))
        for split, source in self.sources.items():
            job = _Job(split, source, videos, self.crf, self.preset, self.classes)
            own = torch.Generator()  # the global one must not depend on whether the folder exists
            for rows in DataLoader(job, batch_size=None, num_workers=self.num_workers, generator=own):
                yield from rows
                progress.add(len(rows))


class VideoWriter:
    """Context manager that writes an mp4 file frame by frame, as H.264 in yuv420p, in memory that does not depend on
    the number of frames.

    Args:
        file: path, or a binary file open for writing, such as that of :func:`~blueberry_video.atomic.atomic_file`.
        size: (height, width) in pixels.
        fps: frames per second.
        crf: H.264 quality, 0 (nearly lossless) to 51.
        preset: x264 preset.

    Raises:
        ValueError: odd height or width.
    """

    def __init__(
        self, file: Path | BinaryIO, size: tuple[int, int], fps: float, crf: int = 8, preset: str = "superfast"
    ):
        height, width = size
        _check_even(size, Path(file if isinstance(file, Path) else file.name).name)
        self._container = av.open(str(file) if isinstance(file, Path) else file, "w", format="mp4")
        self._stream = self._container.add_stream(
            "libx264", rate=Fraction(fps).limit_denominator(1001), options={"crf": str(crf), "preset": preset}
        )
        self._stream.width, self._stream.height, self._stream.pix_fmt = width, height, "yuv420p"
        self._stream.codec_context.thread_count = 1

    def write(self, frame: np.ndarray) -> None:
        """Appends a frame (H, W, 3) uint8 RGB."""
        self._container.mux(self._stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))

    def __enter__(self) -> "VideoWriter":
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        try:
            if kind is None:
                self._container.mux(self._stream.encode())
        finally:
            self._container.close()


def write_video(path: Path, frames: np.ndarray, fps: float, crf: int = 8, preset: str = "superfast") -> None:
    """Writes uint8 RGB ``frames`` (T, H, W, 3) as H.264 in yuv420p, see :class:`VideoWriter`.

    Raises:
        ValueError: odd height or width.
    """
    height, width = frames.shape[1:3]
    with VideoWriter(path, (height, width), fps, crf, preset) as writer:
        for frame in frames:
            writer.write(frame)


def write_videos(parts: Iterable[Tensor], files: Sequence[Path], size: tuple[int, int], fps: float) -> None:
    """Writes several videos at once as mp4, in memory that does not depend on their length.

    Each file appears, or is replaced, when it is complete.

    Args:
        parts: consecutive parts (B, 3, n, H, W) in [0, 1] of the videos.
        files: B files; missing folders are created.
        size: (H, W).
        fps: frames per second.

    Raises:
        ValueError: odd height or width.
        OSError: a folder or file cannot be written.
    """
    with contextlib.ExitStack() as stack:
        writers = []
        for file in files:
            _check_even(size, file.name)
            with explained_errors(file):
                file.parent.mkdir(parents=True, exist_ok=True)
            opened = stack.enter_context(atomic_file(file))
            writers.append(stack.enter_context(VideoWriter(opened, size, fps)))
        for part in parts:
            videos = part.mul(255).round().byte().permute(0, 2, 3, 4, 1).cpu().numpy()  # (B, n, H, W, 3)
            for writer, frames in zip(writers, np.ascontiguousarray(videos), strict=True):
                for frame in frames:
                    writer.write(frame)


def _check_even(size: tuple[int, int], name: str) -> None:
    height, width = size
    if height % 2 or width % 2:
        raise ValueError(
            f"frames of {height}x{width} pixels cannot be written to {name}: yuv420p requires even sizes, so set "
            f"image_size to {height + height % 2}x{width + width % 2}."
        )


class _Job(Dataset):
    """Dataset in which item k writes consecutive clips and returns their metadata rows, so that DataLoader workers
    write them in parallel."""

    CLIPS = 32  # per item

    def __init__(
        self, split: str, source: KeyedClips, videos: Path, crf: int, preset: str, classes: dict[str, tuple[str, ...]]
    ):
        self.split, self.source, self.videos = split, source, videos
        self.crf, self.preset, self.classes = crf, preset, classes

    def __len__(self) -> int:
        return -(-len(self.source) // self.CLIPS)

    def __getitem__(self, k: int) -> list[dict]:
        return [self._write(i) for i in range(k * self.CLIPS, min((k + 1) * self.CLIPS, len(self.source)))]

    def _write(self, index: int) -> dict:
        clip = self.source[index]
        name = f"{self.split}_{index:07d}.mp4"
        frames = clip["video"].permute(0, 2, 3, 1).contiguous().numpy()
        write_video(self.videos / name, frames, clip["fps"], self.crf, self.preset)
        row = {"file_name": f"videos/{name}", "split": self.split}
        if "caption" in clip:
            row["caption"] = clip["caption"]
        labels = {label: self.classes[label][i] for label, i in clip.get("labels", {}).items() if label in self.classes}
        return {**row, "labels": labels} if labels else row


def main(arguments: list[str]) -> None:
    """Runs the command in the docstring of the module.

    Raises:
        SystemExit: with a message, for an argument that is not ``key=value``, an unknown key, a value out of range, or
            a folder that contains something else.
    """
    if {"-h", "--help"} & {*arguments}:
        print(_help())
        return
    options = {}
    for word in arguments:
        key, equals, value = word.partition("=")
        if not equals:
            raise SystemExit(f"{word!r} must be key=value, as in source=sprites out=data/sprites train=4000 val=500.")
        options[key] = value
    source = options.pop("source", "sprites")
    if source not in SOURCES:
        raise SystemExit(f"source={source!r} must be one of {', '.join(SOURCES)}.")
    out = options.pop("out", f"data/{source}")
    sizes = {}
    for split, default in (("train", "1000"), ("val", "100"), ("test", "0")):
        count = options.pop(split, default)
        if not count.isdecimal():
            raise SystemExit(f"{split}={count!r} must be a number of clips, as in {split}={default}.")
        sizes[split] = int(count)
    known = {
        name: p for name, p in inspect.signature(SOURCES[source]).parameters.items() if name not in ("split", "size")
    }
    own = {name: p for name, p in inspect.signature(FolderWriter).parameters.items() if name != "sources"}
    settings: dict = {}
    writing: dict = {}
    for key, value in options.items():
        if key not in known and key not in own:
            keys = sorted({"source", "out", "train", "val", "test", "crf", "preset", "num_workers", *known})
            raise SystemExit(f"{key}={value} is an unknown argument: use one of {', '.join(keys)}.")
        (settings if key in known else writing)[key] = _parsed(key, value, (known | own)[key].default)
    if (side := settings.get("image_size", 2)) % 2:  # otherwise a worker raises, with a traceback
        raise SystemExit(f"image_size={side} is odd, which H.264 cannot store: use image_size={side + 1}.")
    try:
        datasets = {split: SOURCES[source](split, size, **settings) for split, size in sizes.items() if size}
        FolderWriter(datasets, **writing)(out)
    except (FileExistsError, ValueError) as error:  # the message names the value and the fix
        raise SystemExit(f"Error: {error}") from error
    print(f"{sum(sizes.values()):,} videos in {out}")


def _help() -> str:
    """Returns the arguments of the command line and their defaults."""
    lines = [
        "usage: blueberry data [source=sprites] [out=data/sprites] [key=value …]",
        "",
        "  train=1000 val=100 test=0",
    ]
    for name, function in (("all sources", FolderWriter), *SOURCES.items()):
        values = inspect.signature(function).parameters.values()
        own = [f"{p.name}={p.default}" for p in values if p.name not in ("split", "size", "sources")]
        lines += [f"  {'source=' if name in SOURCES else ''}{name}: {' '.join(own)}"]
    return "\n".join(lines)


def _parsed(key: str, value: str, default: object) -> object:
    """Parses a number if the default is one, otherwise a JSON list or a string."""
    parsed: object = value
    with contextlib.suppress(json.JSONDecodeError):
        parsed = json.loads(value)
    if not isinstance(default, int | float):
        return parsed if isinstance(parsed, list) else value
    if type(parsed) not in {int, type(default)}:
        number = "an integer" if isinstance(default, int) else "a number"
        raise SystemExit(f"{key}={value} must be {number}, as in {key}={default}.")
    return parsed


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))  # removes the unfinished folder
    try:
        main(sys.argv[1:])
    except KeyboardInterrupt:
        print("\nStopped: the unfinished folder is removed. Repeat the command.", file=sys.stderr)
        sys.exit(128 + signal.SIGINT)
