"""Generation entry point: writes videos of a trained token generator or video diffusion network as mp4 files.

    python -m blueberry_video.generate outputs/<name>[/<run>] --out clip.mp4 [--prompt "a red disc moves left"]
        [--label motion=left] [--actions left,left,stay] [--video start.mp4] [--frames 33] [--num 4] [--seed 1] …

Uses the EMA weights if the run has them. A token generator generates, decodes and writes one frame of tokens at a time,
in memory that does not depend on the number of frames.
"""

import argparse
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from blueberry_video.launch import command_line, signals
from blueberry_video.launch.errors import OneParagraphErrors

if TYPE_CHECKING:  # torch is imported after the command line is checked
    from torch import Tensor

DECODING = {"temperature": float, "rounds": int, "granularity": str, "mode": str, "guidance": float}
DEFAULT_FPS = 8.0  # of clips without a frame rate


class Videos(NamedTuple):
    """Videos that are generated on iteration: size in pixels, frame rate, and parts (B, 3, n, H, W) in [0, 1]."""

    height: int
    width: int
    fps: float
    parts: "Iterator[Tensor]"


def main() -> None:
    parser = argparse.ArgumentParser(prog="blueberry generate", allow_abbrev=False)
    parser.add_argument("run", help="a run folder, or the folder of an experiment: its newest run")
    parser.add_argument("--out", required=True, help="mp4 file to write; with --num, <name>_0.mp4, <name>_1.mp4, …")
    parser.add_argument("--prompt", help="caption")
    parser.add_argument("--label", action="append", default=[], help="label=class, by name or index; repeatable")
    parser.add_argument("--actions", help="names or indices of the actions between frames, separated by commas")
    parser.add_argument("--video", help="video to continue, or of which the first frame is the image condition")
    parser.add_argument("--frames", type=int, help="frames to write, those of --video included")
    parser.add_argument("--num", type=int, help="number of videos, in one file each")
    parser.add_argument("--seed", type=int, default=0, help="seed of all noise")
    for key, kind in DECODING.items():
        parser.add_argument(f"--{key}", type=kind, help=f"replaces {key} of the run's task.decoding")
    parser.add_argument("--overwrite", action="store_true", help="replace existing files")
    known = parser.parse_args(sys.argv[1:])
    command_line.quiet_libraries()
    if wrong := [text for text in known.label if "=" not in text]:
        raise ValueError(f"--label {wrong[0]} must be label=class, as in --label motion=left.")
    files = files_of(Path(known.out), known.num, known.overwrite)
    options = {"labels": dict(text.split("=", 1) for text in known.label), "video": known.video, "seed": known.seed}
    options |= {"prompt": known.prompt, "num_frames": known.frames, "num_clips": len(files)}
    options["actions"] = None if known.actions is None else [each.strip() for each in known.actions.split(",") if each]
    decoding = {key: value for key in DECODING if (value := getattr(known, key)) is not None}
    if (size := decoding.get("granularity")) and size.replace(",", "").isdecimal():
        rows = [int(part) for part in size.split(",")]
        decoding["granularity"] = rows[0] if len(rows) == 1 else tuple(rows)
    videos = open_videos(known.run, **options, decoding=decoding)
    from blueberry_video.data.write import write_videos

    write_videos(videos.parts, files, (videos.height, videos.width), videos.fps)
    for file in files:
        print(f"wrote {file}")


def generate(run: str | Path, **options: Any) -> "Tensor":
    """Generates videos with a trained run; the arguments are those of :func:`open_videos`.

    Returns:
        Videos (B, 3, T, H, W) in [0, 1].
    """
    import torch

    return torch.cat(list(open_videos(run, **options).parts), dim=2)


def open_videos(
    run: str | Path,
    prompt: str | None = None,
    labels: Mapping[str, str | int] | None = None,
    actions: Sequence[str | int] | None = None,
    num_frames: int | None = None,
    num_clips: int = 1,
    seed: int = 0,
    video: str | Path | None = None,
    decoding: Mapping[str, Any] | None = None,
) -> Videos:
    """Opens a trained run to generate videos, part by part; on a GPU if there is one.

    Args:
        run: a run folder, or the folder of an experiment: its newest run.
        video: file of a video or image, which is cropped to the size of the run.
        prompt, labels, actions, num_frames, num_clips, seed, decoding: see
            :class:`~blueberry_video.tasks.requests.Request`.

    Raises:
        FileNotFoundError: if there is no run, no valid checkpoint, or no such video.
        ValueError: if the run does not generate videos, or an argument does not fit its model.
    """
    import torch

    from blueberry_video.experiment.trained import load_trained
    from blueberry_video.tasks.clip_format import ClipFormat
    from blueberry_video.tasks.generation import KINDS, stream
    from blueberry_video.tasks.requests import Request
    from blueberry_video.video import load_clip
    from blueberry_video.video.resize import ResizeOptions
    from blueberry_video.video.sampling import SamplingOptions
    from blueberry_video.video.source import open_source

    if video is not None and not Path(video).exists():
        raise FileNotFoundError(f"video={video} does not exist: use the path of a video or image file.")
    trained = load_trained(run, KINDS, "cuda" if torch.cuda.is_available() else "cpu")
    clips, given = ClipFormat.of_run(trained), None
    if video is not None:
        all_frames = SamplingOptions(sampling="all", max_frames=sys.maxsize, frame_factor=1)
        with open_source(Path(video)) as source:
            size = ResizeOptions("crop", image_size=(clips.height, clips.width), interpolation="bilinear")
            given = load_clip(source, all_frames, size).pixels
    request = Request(prompt, labels or {}, actions, num_frames, num_clips, seed, given, decoding or {})
    parts = ((part.float() + 1) / 2 for part in stream(trained.task, clips, request))
    return Videos(clips.height, clips.width, clips.fps or DEFAULT_FPS, parts)


def files_of(out: Path, num: int | None = None, overwrite: bool = False) -> list[Path]:
    """Returns the files to write: ``out``, or for ``num`` videos <name>_0.mp4, <name>_1.mp4, …

    Raises:
        ValueError: for a number below 1, or a name that does not end in .mp4.
        FileExistsError: if a file exists, unless ``overwrite``.
    """
    if out.suffix.lower() != ".mp4":
        raise ValueError(f"--out={out} must end in .mp4, the format that is written: use {out.with_suffix('.mp4')}.")
    if num is not None and num < 1:
        raise ValueError(f"--num={num} must be at least 1.")
    files = [out] if num is None else [out.with_name(f"{out.stem}_{index}{out.suffix}") for index in range(num)]
    if found := [file for file in files if file.is_dir() or (file.exists() and not overwrite)]:
        raise FileExistsError(f"--out={found[0]} exists: choose another name, or pass --overwrite to replace a file.")
    return files


if __name__ == "__main__":
    with OneParagraphErrors(), signals.handled("No file was written: repeat the command."):
        main()
