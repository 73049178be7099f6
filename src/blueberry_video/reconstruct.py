"""Reconstruction entry point: videos as a masked autoencoder, an autoencoder or a tokenizer reconstructs them.

    python -m blueberry_video.reconstruct outputs/<name>[/<run>] VIDEO … --out FOLDER [--start 2 --end 4] [--only]

VIDEO is a file, a URL, a folder or a .txt list, of which one clip is sampled as in the validation of the run. Each mp4
has the clip, for a masked autoencoder its visible patches, and the reconstruction side by side; quality.json has the
PSNR of each. Uses the EMA weights if the run has them. A killed command continues when it is repeated.
"""

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from blueberry_video.atomic import explained_errors, write_text
from blueberry_video.launch import command_line, signals
from blueberry_video.launch.errors import OneParagraphErrors

if TYPE_CHECKING:  # torch is imported after the command line is checked
    from torch import Tensor


FILE = "quality.json"


def main() -> None:
    parser = argparse.ArgumentParser(prog="blueberry reconstruct", allow_abbrev=False)
    parser.add_argument("run", help="a run folder, or the folder of an experiment: its newest run")
    parser.add_argument(
        "videos", nargs="+", metavar="VIDEO", help="file, URL, folder, or .txt file with a path per line"
    )
    parser.add_argument("--out", required=True, help="folder to write")
    parser.add_argument("--start", type=float, help="seconds; default: the start of the video")
    parser.add_argument("--end", type=float, help="seconds; default: the end of the video")
    parser.add_argument("--only", action="store_true", help="write the reconstruction alone")
    parser.add_argument("--overwrite", action="store_true", help="replace existing files")
    known = parser.parse_args(sys.argv[1:])
    command_line.quiet_libraries()
    found = reconstruct(known.run, known.videos, known.out, known.start, known.end, known.only, known.overwrite)
    failed = {video: row["error"] for video, row in found.items() if "error" in row}
    print(f"wrote {len(found) - len(failed)} videos and {Path(known.out) / FILE}")
    if failed:
        video, reason = next(iter(failed.items()))
        raise ValueError(f"{len(failed)} of {len(found)} videos have no reconstruction, such as {video}: {reason}")


def reconstruct(
    run: str | Path,
    videos: Sequence[str | Path],
    out: str | Path,
    start: float | None = None,
    end: float | None = None,
    only: bool = False,
    overwrite: bool = False,
) -> dict[str, dict[str, Any]]:
    """Writes reconstructions of videos as mp4 files.

    Args:
        run: a run folder, or the folder of an experiment: its newest run.
        videos: see :func:`~blueberry_video.inference.video_files.video_files`.
        out: folder, of files <number>_<name>.mp4 and ``quality.json``.
        start, end: seconds between which the frames of the clip are sampled; ``None``: of the whole video.
        only: write the reconstruction without the clip next to it.
        overwrite: replace an existing folder's files.

    Returns:
        For each video, as in ``quality.json``: ``file``, ``frames``, ``psnr`` in dB, and for masked autoencoders
        ``psnr_masked`` of the masked patches; or ``error``.

    Raises:
        FileNotFoundError: there is no run, no valid checkpoint, or no such video.
        FileExistsError: the folder has reconstructions of other settings.
        ValueError: the run does not reconstruct videos.
    """
    from blueberry_video.data.progress import Progress
    from blueberry_video.data.write import write_videos
    from blueberry_video.inference.video_files import video_files
    from blueberry_video.tasks.prediction import RECONSTRUCTS
    from blueberry_video.trained_model import load_run
    from blueberry_video.video.errors import VideoError

    files, model, folder = video_files(videos), load_run(run), Path(out)
    if not isinstance(model.task, RECONSTRUCTS):
        kinds = ", ".join(kind.__name__ for kind in RECONSTRUCTS)
        raise ValueError(f"{model.path} trained a {type(model.task).__name__}: this command requires one of {kinds}.")
    settings = {"run": str(model.path.resolve()), "checkpoint": model.checkpoint, "start": start, "end": end}
    found = _found(folder / FILE, settings | {"only": only}, overwrite)
    with explained_errors(folder / FILE):
        folder.mkdir(parents=True, exist_ok=True)
    progress, digits = Progress("reconstruct", len(files), "videos"), max(4, len(str(len(files) - 1)))
    for number, file in enumerate(files):
        name = f"{number:0{digits}d}_{Path(file).stem}.mp4"
        if found.get(file, {}).get("file") != name or not (folder / name).is_file():
            try:
                panels, fps, row = model.reconstruct(file, start, end)
                shown = panels[-1:] if only else panels
                write_videos([_beside(shown)], [folder / name], (shown[0].shape[3], _width(shown)), fps)
                found[file] = {"file": name, **row}
            except (VideoError, OSError) as error:
                found[file] = {"error": " ".join(str(error).split())}
            content = {**settings, "only": only, "videos": found}
            write_text(folder / FILE, json.dumps(content, indent=2, ensure_ascii=False) + "\n")
        progress.add(1)
    return {file: found[file] for file in files}


def _beside(panels: "Sequence[Tensor]") -> "Tensor":
    import torch

    return torch.cat([panel.float() for panel in panels], dim=4)


def _width(panels: "Sequence[Tensor]") -> int:
    return sum(panel.shape[4] for panel in panels)


def _found(file: Path, settings: dict[str, Any], overwrite: bool) -> dict[str, dict[str, Any]]:
    """Returns the rows of a file of the same settings."""
    if overwrite or not file.exists():
        return {}
    content = json.loads(file.read_text())
    rows = content.pop("videos", {})
    if content != settings:
        changed = [
            f"{key} is {content.get(key)} and would be {settings[key]}"
            for key in settings
            if content.get(key) != settings[key]
        ]
        raise FileExistsError(
            f"{file} is of other settings ({'; '.join(changed)}): choose another --out, or --overwrite."
        )
    return rows


if __name__ == "__main__":
    with OneParagraphErrors(), signals.handled("Not all videos are written: repeat the command to continue."):
        main()
