"""Prediction entry point: writes the labels of videos that a trained classifier predicts.

    python -m blueberry_video.predict outputs/<name>[/<run>] VIDEO … --out labels.csv [--window 10] [--step 5] [--top 5]

VIDEO is a file, a URL, a folder or a .txt list. Uses the EMA weights if the run has them, and samples frames as its
validation does. A killed command continues when it is repeated; a video that cannot be read gets a row with the reason.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from blueberry_video.launch import command_line, signals
from blueberry_video.launch.errors import OneParagraphErrors

if TYPE_CHECKING:  # torch is imported after the command line is checked
    from blueberry_video.inference.label_table import Window
    from blueberry_video.trained_model import TrainedModel


def main() -> None:
    parser = argparse.ArgumentParser(prog="blueberry predict", allow_abbrev=False)
    parser.add_argument("run", help="a run folder, or the folder of an experiment: its newest run")
    parser.add_argument(
        "videos", nargs="+", metavar="VIDEO", help="file, URL, folder, or .txt file with a path per line"
    )
    parser.add_argument("--out", required=True, help="file to write: .csv or .jsonl")
    parser.add_argument("--window", type=float, help="seconds of a window; default: one clip of the whole video")
    parser.add_argument("--step", type=float, help="seconds between the starts of windows; default: --window")
    parser.add_argument("--top", type=int, help="most probable classes per label; default: all")
    parser.add_argument("--best", action="store_true", help="weights of the best validation, not the newest")
    parser.add_argument("--overwrite", action="store_true", help="replace an existing file")
    known = parser.parse_args(sys.argv[1:])
    command_line.quiet_libraries()
    failed, total = predict(
        known.run, known.videos, known.out, known.window, known.step, known.top, known.overwrite, known.best
    )
    print(f"wrote {known.out}")
    if failed:
        raise ValueError(
            f"{len(failed)} of {total} videos have no labels, such as {failed[0][0]}: {failed[0][1]} The rows of the "
            f"others are in {known.out}."
        )


def predict(
    run: str | Path,
    videos: Sequence[str | Path],
    out: str | Path,
    window: float | None = None,
    step: float | None = None,
    top: int | None = None,
    overwrite: bool = False,
    best: bool = False,
) -> tuple[list[tuple[str, str]], int]:
    """Writes the labels that a trained classifier predicts for videos.

    Args:
        run: a run folder, or the folder of an experiment: its newest run.
        videos: see :func:`~blueberry_video.inference.video_files.video_files`.
        out: ``.csv`` or ``.jsonl`` file, see :class:`~blueberry_video.inference.label_table.LabelTable`.
        window, step: seconds of the windows of a video, and between their starts; ``None``: one window of the whole
            video, and windows that follow each other.
        top: most probable classes per label; ``None`` for all.
        overwrite: replace an existing file.
        best: use the weights of the best validation.

    Returns:
        (video, reason) of the videos that failed in this call, and the number of all videos.

    Raises:
        FileNotFoundError: there is no run, no valid checkpoint, or no such video.
        FileExistsError: the file was written with other settings.
        ValueError: the run is not one of a classifier, or a number is out of range.
    """
    for key, value in (("window", window), ("step", step), ("top", top)):
        if value is not None and not value > 0:
            raise ValueError(f"--{key}={value} must be above 0.")
    if step is not None and window is None:
        raise ValueError(f"--step={step} requires --window, the seconds of a window.")
    from blueberry_video.data.progress import Progress
    from blueberry_video.inference.label_table import LabelTable
    from blueberry_video.inference.video_files import video_files
    from blueberry_video.trained_model import load_run
    from blueberry_video.video.errors import VideoError

    files, model, failed = video_files(videos), load_run(run, best=best), []
    if not getattr(model.task.model, "num_classes", None):
        raise ValueError(f"{model.path} trained a {type(model.task).__name__}: this command requires a classifier.")
    settings = {"run": str(model.path.resolve()), "checkpoint": model.checkpoint, "window": window, "step": step}
    with LabelTable(out, settings, top, overwrite) as table:
        progress = Progress("predict", len(files), "videos")
        for file in files:
            if file not in table.done:
                try:
                    table.add(file, labels(model, file, window, step))
                except (VideoError, OSError) as error:
                    failed.append((file, " ".join(str(error).split())))
                    table.fail(*failed[-1])
            progress.add(1)
    return failed, len(files)


def labels(model: "TrainedModel", video: str, window: float | None = None, step: float | None = None) -> "list[Window]":
    """Returns the labels of each window of a video; see :func:`predict`."""
    from blueberry_video.inference.label_table import Window

    ranges: list[tuple[float, float]] = []

    def split(duration: float) -> Sequence[tuple[float | None, float | None]]:
        ranges[:] = windows(duration, window, step)
        return [(None, None)] if window is None else ranges

    found = model.over(
        video, split, lambda clips: (sum(int(c.missing.sum()) for c in clips), model.probabilities(clips)), views=None
    )
    return [Window(*seconds, *values) for seconds, values in zip(ranges, found, strict=True)]


def windows(duration: float, window: float | None = None, step: float | None = None) -> list[tuple[float, float]]:
    """Returns (start, end) in seconds of windows that cover a video; the last one ends with it.

    Args:
        duration: of the video.
        window: seconds; ``None``, or more than the duration: one window.
        step: seconds between starts; ``None`` for ``window``.
    """
    if window is None or window >= duration:
        return [(0.0, duration)]
    step = step or window
    starts = [i * step for i in range(int((duration - window) / step + 1e-9) + 1)]
    last = duration - window
    return [(start, start + window) for start in ([*starts, last] if last - starts[-1] > 1e-6 else starts)]


if __name__ == "__main__":
    with OneParagraphErrors(), signals.handled("The table is not complete: repeat the command to continue."):
        main()
