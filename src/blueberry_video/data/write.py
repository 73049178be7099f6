"""Real mp4 files from a dataset of clips: what a video folder looks like, made by the project itself.

    python -m blueberry_video.data.write source=sprites out=data/sprites train=4000 val=500 [num_frames=16
    image_size=32 …]

writes ``videos/*.mp4`` (H.264), ``metadata.jsonl`` with caption, class names and split, ``classes.json`` and a
manifest of what made it. The folder appears under its name when it is complete; asked again for the same, it is left
alone.
"""

import contextlib
import fcntl
import inspect
import json
import sys
import time
from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from blueberry_video.atomic import atomic_folder
from blueberry_video.data.clip_cache import KeyedClips
from blueberry_video.data.sprites import Sprites
from blueberry_video.data.world import World

SOURCES = {"sprites": Sprites, "world": World}
MANIFEST = "manifest.json"
PRESETS = ("ultrafast", "superfast", "veryfast", "faster", "fast", "medium", "slow", "slower", "veryslow", "placebo")


class FolderWriter:
    """Writes a folder of mp4 files once; give it to ``VideoFolder(make=…)`` to have the folder made on first use.

    Args:
        sources: split -> dataset of clips with ``cache_key``, ``classes`` and ``reversal_pairs``.
        crf: H.264 quality, 0 (nearly lossless) to 51. Colour is stored at half resolution (yuv420p) whatever it is.
        preset: x264 speed. ``superfast`` is the fastest on tiny clips; ``ultrafast`` codes them worse and slower.
        num_workers: processes; 0 writes in this one.

    Raises:
        ValueError: no sources, sources with other classes than the first's, or a value out of range.
    """

    def __init__(self, sources: dict[str, KeyedClips], crf: int = 8, preset: str = "superfast", num_workers: int = 2):
        if not sources:
            raise ValueError("sources is empty, so there is nothing to write: name at least one split and its dataset.")
        if not 0 <= crf <= 51:
            raise ValueError(f"crf={crf} is outside 0 (nearly lossless) to 51: choose a value between.")
        if preset not in PRESETS:
            raise ValueError(f"preset={preset!r} is no speed of x264: choose from {', '.join(PRESETS)}.")
        self.sources = dict(sources)
        first = next(iter(self.sources.values()))
        self.classes: dict[str, tuple[str, ...]] = getattr(first, "classes", {})
        self.reversal_pairs: dict[str, tuple[tuple[int, int], ...]] = getattr(first, "reversal_pairs", {})
        for split, source in self.sources.items():
            if not hasattr(source, "cache_key"):
                raise ValueError(
                    f"sources.{split}, a {type(source).__name__}, has no cache_key, so a folder made from it could "
                    "not be told from another: give it one that names everything a clip depends on."
                )
            if getattr(source, "classes", {}) != self.classes:
                raise ValueError(
                    f"sources.{split} has other classes than the first split: write them to separate folders."
                )
        self.crf, self.preset, self.num_workers = crf, preset, num_workers

    def __call__(self, out: str | Path) -> None:
        """Writes the folder ``out``, unless it is there already. Of several processes at once, one writes and the
        others wait.

        Raises:
            FileExistsError: ``out`` holds something else.
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
        """What determines the content of the folder."""
        splits = {split: {"clips": len(d), "cache_key": d.cache_key} for split, d in self.sources.items()}
        return {"format": 1, "codec": "libx264", "preset": self.preset, "crf": self.crf, "splits": splits}

    def _is_written(self, out: Path) -> bool:
        if not out.exists() or (out.is_dir() and not any(out.iterdir())):
            return False
        there = json.loads((out / MANIFEST).read_text()) if (out / MANIFEST).is_file() else None
        wanted = self.manifest()
        if there == wanted:
            return True
        why = "was not written by this tool"
        if isinstance(there, dict):
            changed = [
                f"{key}: {there.get(key)} there, {wanted[key]} asked" for key in wanted if there.get(key) != wanted[key]
            ]
            why = f"holds another data set ({'; '.join(changed)})"
        raise FileExistsError(f"out={out} {why}: nothing was changed. Choose another out, or remove the folder first.")

    def _write(self, folder: Path) -> None:
        (folder / "videos").mkdir()
        with (folder / "metadata.jsonl").open("w", encoding="utf-8") as metadata:
            for row in self._rows(folder / "videos"):
                metadata.write(json.dumps(row, ensure_ascii=False) + "\n")
        named = {"classes": self.classes, "reversal_pairs": self.reversal_pairs}
        (folder / "classes.json").write_text(json.dumps(named, indent=1))
        (folder / MANIFEST).write_text(json.dumps(self.manifest(), indent=1))

    def _rows(self, videos: Path) -> Iterator[dict]:
        total = sum(len(source) for source in self.sources.values())
        start = shown = time.monotonic()
        done = 0
        for split, source in self.sources.items():
            job = _Job(split, source, videos, self.crf, self.preset, self.classes)
            own = torch.Generator()  # the global one must not tell whether the folder was there
            for rows in DataLoader(job, batch_size=None, num_workers=self.num_workers, generator=own):
                yield from rows
                done += len(rows)
                now = time.monotonic()
                if done == total or now - shown > 2:
                    shown = now
                    rate = done / max(now - start, 1e-9)
                    print(
                        f"video folder: {done:,} of {total:,} clips, {rate:,.0f} a second", file=sys.stderr, flush=True
                    )


def write_video(path: Path, frames: np.ndarray, fps: float, crf: int = 8, preset: str = "superfast") -> None:
    """Writes uint8 RGB ``frames`` (T, H, W, 3) as H.264 in yuv420p.

    Raises:
        ValueError: odd height or width.
    """
    height, width = frames.shape[1:3]
    if height % 2 or width % 2:
        raise ValueError(
            f"Frames of {height}x{width} pixels cannot be written to {path.name}: yuv420p needs even sizes. Set "
            f"image_size to {height + height % 2}x{width + width % 2}."
        )
    with av.open(str(path), "w", format="mp4") as container:
        stream = container.add_stream(
            "libx264", rate=Fraction(fps).limit_denominator(1001), options={"crf": str(crf), "preset": preset}
        )
        stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
        stream.codec_context.thread_count = 1
        for frame in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode())


class _Job(Dataset):
    """Item k writes a run of clips and returns their metadata rows: so that a DataLoader's processes write them."""

    RUN = 32

    def __init__(
        self, split: str, source: KeyedClips, videos: Path, crf: int, preset: str, classes: dict[str, tuple[str, ...]]
    ):
        self.split, self.source, self.videos = split, source, videos
        self.crf, self.preset, self.classes = crf, preset, classes

    def __len__(self) -> int:
        return -(-len(self.source) // self.RUN)

    def __getitem__(self, k: int) -> list[dict]:
        return [self._write(i) for i in range(k * self.RUN, min((k + 1) * self.RUN, len(self.source)))]

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
    """Runs the command of the module's docstring.

    Raises:
        SystemExit: with a message, for a word that is not ``key=value``, a key or value that does not exist or is out
            of range, or a folder that holds something else.
    """
    options = {}
    for word in arguments:
        key, equals, value = word.partition("=")
        if not equals:
            raise SystemExit(
                f"{word!r} is not key=value: write for example source=sprites out=data/sprites train=4000 val=500."
            )
        options[key] = value
    source = options.pop("source", "sprites")
    if source not in SOURCES:
        raise SystemExit(f"source={source!r} does not exist: choose from {', '.join(SOURCES)}.")
    out = options.pop("out", f"data/{source}")
    sizes = {}
    for split, default in (("train", "1000"), ("val", "100"), ("test", "0")):
        count = options.pop(split, default)
        if not count.isdecimal():
            raise SystemExit(f"{split}={count!r} is not a number of clips: write for example {split}={default}.")
        sizes[split] = int(count)
    known = {
        name: p for name, p in inspect.signature(SOURCES[source]).parameters.items() if name not in ("split", "size")
    }
    own = {name: p for name, p in inspect.signature(FolderWriter).parameters.items() if name != "sources"}
    settings: dict = {}
    writing: dict = {}
    for key, value in options.items():
        if key not in known and key not in own:
            there = sorted({"source", "out", "train", "val", "test", "crf", "preset", "num_workers", *known})
            raise SystemExit(f"{key}={value} does not exist: choose from {', '.join(there)}.")
        (settings if key in known else writing)[key] = _parsed(key, value, (known | own)[key].default)
    if (side := settings.get("image_size", 2)) % 2:  # else a worker would find it out, with a traceback
        raise SystemExit(f"image_size={side} is odd, which H.264 cannot store: write image_size={side + 1}.")
    try:
        datasets = {split: SOURCES[source](split, size, **settings) for split, size in sizes.items() if size}
        FolderWriter(datasets, **writing)(out)
    except (FileExistsError, ValueError) as error:  # how this package refuses a value: the text names it and the fix
        raise SystemExit(f"Error: {error}") from error
    print(f"{sum(sizes.values()):,} videos in {out}")


def _parsed(key: str, value: str, default: object) -> object:
    """A number where the default is one, else a list written as JSON or the word itself."""
    parsed: object = value
    with contextlib.suppress(json.JSONDecodeError):
        parsed = json.loads(value)
    if not isinstance(default, int | float):
        return parsed if isinstance(parsed, list) else value
    if type(parsed) not in {int, type(default)}:
        number = "whole number" if isinstance(default, int) else "number"
        raise SystemExit(f"{key}={value} is no {number}: write for example {key}={default}.")
    return parsed


if __name__ == "__main__":
    main(sys.argv[1:])
