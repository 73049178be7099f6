"""Data check entry point: the kind, classes, sizes and faults of a data set, before it is trained on.

    python -m blueberry_video.data_check FOLDER|TARS [--out FOLDER] [--sample 200]
    python -m blueberry_video.data_check EXPERIMENT [key=value …]

The first form recognizes the layout of the folder and prints the lines of a config that read it; the second one
inspects the data of an experiment. Exits with status 1 if a part cannot be read, or too many files are broken.
"""

import argparse
import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from blueberry_video.launch import command_line, signals
from blueberry_video.launch.errors import OneParagraphErrors

if TYPE_CHECKING:  # torch is imported after the command line is checked
    from blueberry_video.data.inspection import Inspection
    from blueberry_video.data.video_folder import VideoClips

PIXELS = 160  # of the pictures of the contact sheet


def main() -> None:
    parser = argparse.ArgumentParser(prog="blueberry data-check", allow_abbrev=False)
    parser.add_argument("data", help="folder of videos, tar files such as {000..012}.tar, or an experiment")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="changes of the config of an experiment")
    parser.add_argument("--out", help="folder for data-check.json and contact-sheet.png")
    parser.add_argument("--sample", type=int, default=200, help="videos to decode; 0 for all (200)")
    parser.add_argument("--workers", type=int, default=4, help="videos that are decoded at a time (4)")
    known = parser.parse_args(sys.argv[1:])
    if known.sample < 0 or known.workers < 1:
        raise ValueError(f"--sample {known.sample} must be at least 0, and --workers {known.workers} at least 1.")
    command_line.quiet_libraries()
    ok = data_check(known.data, known.overrides, known.out, known.sample, known.workers)
    sys.exit(0 if ok else 1)


def data_check(
    data: str, overrides: Sequence[str] = (), out: str | Path | None = None, sample: int = 200, workers: int = 4
) -> bool:
    """Prints what a data set contains, and its faults.

    Args:
        data: a folder, tar files, or an experiment.
        overrides: of the config of an experiment.
        out: folder for ``data-check.json`` and ``contact-sheet.png``; None writes no files.
        sample: videos to decode; 0 for all.
        workers: videos that are decoded at a time.

    Returns:
        Whether every part can be read and at most 5 % of the videos are broken.

    Raises:
        FileNotFoundError: there is no such data, or its layout is unknown.
        ValueError: the config is not valid, or no part of the data can be read.
    """
    from blueberry_video.data.inspection import inspect, recognize, report, too_many_broken

    failed: dict[str, str] = {}
    parts: dict[str, VideoClips] = {}
    recognized = None
    if experiment := _experiment(data):
        parts = dict(_of_config(experiment, overrides))
    else:
        recognized = recognize(data, PIXELS)
        for split, build in recognized.parts.items():
            try:
                parts[split] = build()
            except (ValueError, OSError) as error:  # the other parts are inspected
                failed[split] = str(error)
    if not parts:
        raise ValueError("; ".join(failed.values()) or f"{data} has no data sets of video files to inspect.")
    found = inspect(parts, sample, workers)
    print("\n".join(report(found, parts, failed)))
    if recognized is not None:
        print(f"\nconfig of this data set:\n\n{recognized.config()}")
    if out is not None:
        _write(Path(out), found, failed, recognized.config() if recognized else None)
    return not failed and not too_many_broken(found)


def _experiment(data: str) -> Path | None:
    """Returns the config of an experiment, by its name or folder."""
    file = Path("experiments", data, "config.yaml")
    own = Path(data, "config.yaml")
    return own if own.is_file() else file if "/" not in data and file.is_file() and not Path(data).is_dir() else None


def _of_config(file: Path, overrides: Sequence[str]) -> Iterator[tuple[str, "VideoClips"]]:
    """Yields the data sets of video files in the config of an experiment."""
    from hydra.utils import instantiate

    from blueberry_video import config as configs
    from blueberry_video.data.video_folder import VideoClips

    config = configs.compose(file, overrides).data
    for split in ("train", "val", "test"):
        built = instantiate(config[split]) if config.get(split) else None
        waiting = [(split, built)]
        while waiting:
            name, dataset = waiting.pop(0)
            if isinstance(dataset, VideoClips):
                yield name, dataset
            parts: Mapping[str, Any] = getattr(dataset, "parts", {})
            waiting += [(f"{name}.{key}", part) for key, part in parts.items()]
            waiting += [(name, source) for source in (getattr(dataset, "sources", ()) if not parts else ())]


def _write(folder: Path, found: "Inspection", failed: Mapping[str, str], config: str | None) -> None:
    import torch

    from blueberry_video.atomic import explained_errors, write_text
    from blueberry_video.video.contact_sheet import contact_sheet

    with explained_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
        text = json.dumps({**found.to_json(), "failed": dict(failed), "config": config}, indent=2, ensure_ascii=False)
        write_text(folder / "data-check.json", text + "\n")
        pictures, titles = found.pictures
        if titles:
            sheet = contact_sheet(pictures, torch.zeros(len(titles)), labels=titles)
            sheet.save(folder / "contact-sheet.png")
    print(f"\nwrote {folder}/data-check.json{' and contact-sheet.png' if found.pictures[1] else ''}")


if __name__ == "__main__":
    with OneParagraphErrors(), signals.handled("No file was written: repeat the command."):
        main()
