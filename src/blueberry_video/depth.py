"""Depth entry point: writes the depth of a video of any length, at constant memory.

    python -m blueberry_video.depth clip.mp4 --out maps --weights outputs/<name>[/<run>] [--format npz,png,mp4]
        [--mode auto|frames|stream|windows|sliding] [--input-size 518] [--range 0 20] …

The weights are a run of the task ``depth``, or published: a folder, a file or a hub id. A killed command continues when
it is repeated, and writes the same files. Of a video that breaks in the middle, everything before is written.
"""

import argparse
import hashlib
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from blueberry_video.launch import command_line, signals
from blueberry_video.launch.errors import OneParagraphErrors

if TYPE_CHECKING:  # torch is imported after the command line is checked
    from blueberry_video.models.depth_anything import DepthAnything, VideoDepthAnything


def main() -> None:
    parser = argparse.ArgumentParser(prog="blueberry depth", allow_abbrev=False)
    parser.add_argument("video", help="video file")
    parser.add_argument("--out", required=True, help="folder to write")
    parser.add_argument("--weights", "--checkpoint", required=True, help="folder of a run, or published weights")
    parser.add_argument(
        "--format", default="npz,mp4", help="npz, png (16 bit), exr, mp4 (colored), separated by commas"
    )
    parser.add_argument("--mode", default="auto", help="auto, frames, stream, windows or sliding")
    parser.add_argument("--latency", type=int, default=4, help="new frames of a window in mode sliding")
    parser.add_argument(
        "--input-size", type=int, help="shorter side of the frames at the network; default: of training"
    )
    parser.add_argument("--range", type=float, nargs=2, help="values of the darkest and brightest level of png and mp4")
    known = parser.parse_args(sys.argv[1:])
    command_line.quiet_libraries()
    formats = [each.strip() for each in known.format.split(",") if each.strip()]
    options = {"mode": known.mode, "latency": known.latency, "input_size": known.input_size, "range": known.range}
    about = estimate_depth(known.video, known.out, known.weights, formats, **options)
    print(f"wrote {about['frames']} maps to {known.out}")
    if about.get("error"):
        raise ValueError(
            f"{known.video} breaks after {about['frames']} frames, of which the maps are in {known.out}: "
            f"{about['error']}"
        )


def estimate_depth(
    video: str | Path,
    out: str | Path,
    weights: str | Path,
    formats: Sequence[str] = ("npz", "mp4"),
    mode: str = "auto",
    latency: int = 4,
    input_size: int | None = None,
    range: Sequence[float] | None = None,
) -> dict[str, Any]:
    """Writes the depth of a video into a folder, see :class:`~blueberry_video.data.depth_writer.DepthWriter`.

    Args:
        video: video file.
        out: folder. If a killed call has left one, it is continued, to the same files byte for byte.
        weights: run folder, folder of an experiment (its newest run), or published weights.
        formats: of ``npz``, ``png``, ``exr``, ``mp4``.
        mode, latency: see :func:`~blueberry_video.inference.depth.depth_stream`.
        input_size: shorter side of frames at the network; ``None``: that of training.
        range: values of the darkest and brightest level of ``png`` and ``mp4``; ``None``: extremes of the video.

    Returns:
        Content of ``depth.json``; the key ``error`` exists if the video breaks in the middle.

    Raises:
        FileNotFoundError: without video or weights.
        FileExistsError: for a folder with other content.
        ValueError: for arguments that do not fit, and for a video without any frame that decodes.
    """
    from blueberry_video.data.depth_writer import DepthWriter, write_maps
    from blueberry_video.inference.depth import depth_stream
    from blueberry_video.video.container import OpenVideo
    from blueberry_video.video.decode import DecodeOptions, with_fallbacks

    if not Path(video).is_file():
        raise FileNotFoundError(f"video={video} does not exist: use the path of a video file.")
    model, fingerprint, mean, std = open_model(weights)
    side = input_size or min(model.pretrained.video_size[2:])
    settings = {"video": digest(video), "weights": fingerprint, "mode": mode, "latency": latency, "input_size": side}
    settings |= {"mean": mean, "std": std}

    def work(opened: OpenVideo, decoding: DecodeOptions) -> dict[str, Any]:
        size = (opened.info.height, opened.info.width)
        stream = depth_stream(model, size, side, mode, latency)  # type: ignore[arg-type]
        stream.mean, stream.std = tuple(mean), tuple(std)
        writer = DepthWriter(out, formats, settings, "disparity" if model.max_depth is None else "depth", range)
        return writer.about if writer.done else write_maps(opened, decoding, stream, writer)

    return with_fallbacks(video, DecodeOptions(salvage=False, chunk_frames=1), work)


class Opened(NamedTuple):
    """Model of depth on its device, a fingerprint of its weights, and the normalization of its input, per channel."""

    model: "DepthAnything | VideoDepthAnything"
    fingerprint: str
    mean: list[float]
    std: list[float]


def open_model(weights: str | Path) -> Opened:
    """Opens a model, on the GPU if there is one.

    Raises:
        FileNotFoundError: without weights.
        ValueError: for a run of a different task, or weights of a different model.
    """
    import torch

    from blueberry_video.experiment.trained import load_trained
    from blueberry_video.inference.depth import IMAGENET_MEAN, IMAGENET_STD
    from blueberry_video.models.depth_anything import DepthAnything, VideoDepthAnything
    from blueberry_video.models.depth_anything.convert import is_video, read_published
    from blueberry_video.tasks.depth import Depth

    device = "cuda" if torch.cuda.is_available() else "cpu"
    path = Path(weights)
    if path.is_dir() and not (path / "config.json").is_file():
        task = load_trained(path, [Depth], device).task
        model, mean, std = task.model, task.pixel_mean.flatten().tolist(), task.pixel_std.flatten().tolist()
    else:
        kind = VideoDepthAnything if is_video(read_published(weights).state) else DepthAnything
        model = kind.from_published(weights).to(device).eval()
        mean, std = list(IMAGENET_MEAN), list(IMAGENET_STD)
    found = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        found.update(name.encode() + tensor.cpu().contiguous().view(torch.uint8).numpy().tobytes())
    return Opened(model, found.hexdigest()[:16], mean, std)


def digest(video: str | Path) -> str:
    """SHA-256 of a file."""
    with Path(video).open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()[:16]


if __name__ == "__main__":
    with OneParagraphErrors(), signals.handled("Repeat the command to continue."):
        main()
