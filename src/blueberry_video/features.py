"""Features entry point: writes the features that an encoder computes from videos.

    python -m blueberry_video.features RUN|WEIGHTS VIDEO … --out FOLDER [--level clip|frame|token]
        [--format safetensors|npz|parquet] [--window 10] [--step 5] [--num-heads 12] …

RUN is a run folder; WEIGHTS a folder, a file, or a hub id. VIDEO is a file, a URL, a folder or a .txt list. Each video
has a file of the same relative name in FOLDER. A killed command continues when it is repeated, to the same bytes.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from blueberry_video.launch import command_line, signals
from blueberry_video.launch.errors import OneParagraphErrors

if TYPE_CHECKING:  # torch is imported after the command line is checked
    from blueberry_video.data.clip_reader import ClipReader
    from blueberry_video.video.decode import Frames


def main() -> None:
    parser = argparse.ArgumentParser(prog="blueberry features", allow_abbrev=False)
    parser.add_argument("weights", help="a run folder or that of an experiment; a folder, file or hub id of weights")
    parser.add_argument("videos", nargs="+", metavar="VIDEO", help="file, URL, folder, or .txt file with a path a line")
    parser.add_argument("--out", required=True, help="folder to write")
    parser.add_argument("--level", default="clip", help="row of a file: clip, frame or token")
    parser.add_argument("--format", default="safetensors", help="safetensors, npz or parquet")
    parser.add_argument("--window", type=float, help="seconds of a window; default: one clip of the whole video")
    parser.add_argument("--step", type=float, help="seconds between the starts of windows; default: --window")
    parser.add_argument("--num-heads", type=int, help="attention heads, of weights without a config")
    parser.add_argument("--num-frames", type=int, help="frames of a clip; default: of the config of the weights")
    parser.add_argument("--image-size", type=int, help="height and width of a clip; default: of the config")
    parser.add_argument("--which", help="encoder of V-JEPA: target_encoder (default) or encoder")
    parser.add_argument("--overwrite", action="store_true", help="replace the features in the folder")
    known = vars(parser.parse_args(sys.argv[1:]))
    command_line.quiet_libraries()
    failed, total = features(**known)
    print(f"wrote the features of {total - len(failed)} videos to {known['out']}")
    if failed:
        reasons = " ".join(f"{video}: {reason}" for video, reason in failed[:5])
        raise ValueError(
            f"{len(failed)} of {total} videos have no features; those of the others are written. {reasons}"
        )


def features(
    weights: str | Path,
    videos: Sequence[str | Path],
    out: str | Path,
    level: str = "clip",
    format: str = "safetensors",
    window: float | None = None,
    step: float | None = None,
    num_heads: int | None = None,
    num_frames: int | None = None,
    image_size: int | None = None,
    which: str | None = None,
    overwrite: bool = False,
) -> tuple[list[tuple[str, str]], int]:
    """Writes the features that an encoder computes from videos, see
    :class:`~blueberry_video.inference.feature_files.FeatureFolder`.

    Args:
        weights, num_heads, num_frames, image_size, which: see :func:`~blueberry_video.load_encoder`.
        videos: see :func:`~blueberry_video.inference.video_files.video_files`.
        out: folder.
        level: row of a file: ``"clip"``, the mean of the tokens of a window; ``"frame"``, the mean over space at each
            step of the patch grid in time; ``"token"``.
        format: ``"safetensors"``, ``"npz"`` or ``"parquet"``.
        window, step: seconds of the windows of a video, and between their starts; ``None``: one window of the whole
            video, and windows that follow each other.
        overwrite: replace the features in the folder.

    Returns:
        (video, reason) of the videos that failed, and the number of all videos.

    Raises:
        FileNotFoundError: there are no such weights or videos.
        FileExistsError: the folder has features of other settings.
        ValueError: the weights are not those of an encoder, or an argument is out of range.
    """
    from blueberry_video.data.progress import Progress
    from blueberry_video.inference.feature_files import LEVELS, FeatureFolder, check_distinct
    from blueberry_video.inference.video_files import video_names
    from blueberry_video.pretrained_encoder import load_encoder
    from blueberry_video.video.errors import VideoError

    for key, value in (("window", window), ("step", step)):
        if value is not None and (not value > 0 or window is None):
            raise ValueError(f"--{key}={value} must be above 0 seconds, and --step requires --window.")
    if level not in LEVELS:
        raise ValueError(f"--level={level} is unknown: use one of {', '.join(LEVELS)}.")
    names, failed = video_names(videos), []
    check_distinct(names)
    model = load_encoder(weights, num_heads, num_frames, image_size, which)
    settings: dict[str, Any] = {"weights": model.origin, "level": level, "window": window, "step": step}
    settings |= {
        "num_heads": num_heads,
        "num_frames": model.clips.num_frames,
        "image_size": [model.clips.height, model.clips.width],
    }
    folder = FeatureFolder(out, settings | {"which": which}, format, overwrite)
    progress = Progress("features", len(names), "videos")
    for video, name in names.items():
        if not folder.path(name).is_file():
            try:
                rows = rows_of(model, video, level, window, step)
            except (VideoError, OSError) as error:
                failed.append((video, " ".join(str(error).split())))
            else:
                folder.write(name, rows)
        progress.add(1)
    return failed, len(names)


def rows_of(
    model: "ClipReader", video: str, level: str, window: float | None = None, step: float | None = None
) -> dict[str, Any]:
    """Returns the arrays of the features of a video; see :func:`features`."""
    import numpy as np

    from blueberry_video.inference.feature_files import rows_of_window
    from blueberry_video.predict import windows

    ranges: list[tuple[float, float]] = []

    def split(duration: float) -> Sequence[tuple[float | None, float | None]]:
        ranges[:] = windows(duration, window, step)
        return [(None, None)] if window is None else ranges

    def encode(clips: "list[Frames]") -> dict[str, Any]:
        tokens, [clip] = model.encode(clips)[0].float().cpu().numpy(), clips
        patches = model.patches(*clip.pixels.shape[-2:])
        return {**rows_of_window(tokens, patches, clip.timestamps.numpy(), level), "missing": int(clip.missing.sum())}

    found = model.over(video, split, encode)
    for rows, (start, end) in zip(found, ranges, strict=True):
        count = len(rows["features"])
        values = {"start": float(start), "end": float(end), "missing": np.int32(rows["missing"])}
        rows |= {key: np.full(count, value) for key, value in values.items()}
    return {key: np.concatenate([rows[key] for rows in found]) for key in found[0]}


if __name__ == "__main__":
    with OneParagraphErrors(), signals.handled("The features are not complete: repeat the command to continue."):
        main()
