"""Export entry point: writes the model of a run for diffusers or transformers, as ONNX or as a program of PyTorch.

    python -m blueberry_video.export outputs/<name>[/<run>] --out <folder> [--dtype bfloat16] [--merge]
    python -m blueberry_video.export outputs/<name>[/<run>] --out <folder> [--format published|onnx|torch] [--label …]
    python -m blueberry_video.export outputs/<name>[/<run>] --out <folder> [--format onnx|torch] [--size 64 96]

Of a text-to-video model, writes <folder>/transformer/, with the EMA weights if the run has them; with adapters
(model.lora), writes pytorch_lora_weights.safetensors, or, with --merge, the transformer with the adapters merged.
Training continues from the folder with init_from=<folder>. A text encoder that was trained with the transformer is left
out, with a warning.

Of an encoder or classifier, see ``inference/export.py``. Of a model of depth, writes depth.onnx or depth.pt2 for images
of one size, in float32; of a video model, a streaming step and, as depth_first.…, its first frame.
"""

import argparse
import contextlib
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Literal

from blueberry_video.installation import start_command
from blueberry_video.launch import command_line, signals
from blueberry_video.launch.command_line import DTYPES
from blueberry_video.launch.errors import OneParagraphErrors

FORMATS = ("published", "onnx", "torch")


def main() -> None:
    parser = argparse.ArgumentParser(prog="blueberry export", allow_abbrev=False)
    parser.add_argument("run", help="a run folder, or the folder of an experiment: its newest run")
    parser.add_argument("--out", required=True, help="folder to write to")
    parser.add_argument("--dtype", choices=DTYPES, default="float32", help="of the written weights")
    parser.add_argument("--merge", action="store_true", help="merge the adapters into the transformer")
    parser.add_argument("--format", choices=FORMATS, help="default: onnx for models of depth, else published")
    parser.add_argument("--label", help="of a classifier with several labels: the one in a published folder")
    parser.add_argument(
        "--size", type=int, nargs=2, help="height and width of the images of depth; default: of training"
    )
    known = parser.parse_args(sys.argv[1:])
    command_line.quiet_libraries()
    size = None if known.size is None else (known.size[0], known.size[1])
    for path in run(Path(known.run), Path(known.out), known.dtype, known.merge, known.format, size, known.label):
        print(f"wrote {path}")


def run(
    source: Path,
    out: Path,
    dtype: str = "float32",
    merge: bool = False,
    format: Literal["published", "onnx", "torch"] | None = None,
    size: tuple[int, int] | None = None,
    label: str | None = None,
) -> list[Path]:
    """Writes the trained weights of a run.

    Args:
        source: a run folder, or the folder of an experiment's runs.
        out: folder to write to.
        dtype: one of ``DTYPES``.
        merge: whether to merge adapters into the transformer.
        format: ``published``, ``onnx`` or ``torch``; ``None``: ``onnx`` for models of depth, else ``published``.
        size: of models of depth, see :func:`~blueberry_video.models.depth_anything.export.export_depth`; ``None``: the
            size of training.
        label: of a classifier with several labels, the one in a published folder.

    Returns:
        The written folders or files.

    Raises:
        FileNotFoundError: if there is no run, or it has no checkpoint.
        FileExistsError: if the folder already contains a transformer, or is a file.
        ImportError: if ONNX is to be written and its packages are missing.
        ValueError: if the model has no such format, or overflows in float16.
    """
    import torch
    from hydra.utils import instantiate

    from blueberry_video.config import load
    from blueberry_video.config.checks import HALF_OVERFLOWS
    from blueberry_video.diffusion.lora import plain
    from blueberry_video.diffusion.text_to_video import TextToVideo
    from blueberry_video.experiment.checkpoint import weights_file
    from blueberry_video.experiment.run_folder import RunFolder
    from blueberry_video.experiment.trained import load_trained
    from blueberry_video.inference.export import export_model
    from blueberry_video.models.depth_anything import DepthAnything, VideoDepthAnything
    from blueberry_video.models.depth_anything.export import export_depth
    from blueberry_video.tasks.clip_format import ClipFormat

    if (existing := next(path for path in (out, *out.parents) if path.exists())).is_file():
        raise FileExistsError(f"--out={out} must be a folder, but {existing} is a file: choose another folder.")
    try:
        folder = RunFolder.open(source).path
    except FileNotFoundError as error:
        raise FileNotFoundError(f"{error} `{start_command('train', '<experiment>')}` creates one.") from error
    config = load(folder / "config.yaml")
    model = instantiate(config.model)
    if isinstance(model, DepthAnything | VideoDepthAnything):
        model.load_published(weights_file(folder))
        out.mkdir(parents=True, exist_ok=True)
        if format == "published":
            model.save_published(out)
            return [out]
        file = out / ("depth.pt2" if format == "torch" else "depth.onnx")
        side = model.pretrained.video_size[2]
        normalization = {
            key: list(value) for key in ("mean", "std") if (value := config.task.input.get(key)) is not None
        }
        step = isinstance(model, VideoDepthAnything)
        return export_depth(model.float(), file, format or "onnx", size or (side, side), step, **normalization)
    if not isinstance(model, TextToVideo):
        trained = load_trained(folder)
        clips = asdict(ClipFormat.of_run(trained))
        return export_model(trained.task.model, out, clips, format or "published", label)
    if format not in (None, "published"):
        raise ValueError(f"--format {format}: diffusion transformers are exported for diffusers. Leave it out.")
    overflowing = {name.rpartition(".")[2] for name in HALF_OVERFLOWS}
    positions = getattr(model.transformer, "positions", None)
    if (
        dtype == "float16"
        and type(model.transformer).__name__ in overflowing
        and (positions is None or positions.kind != "sincos")
    ):
        raise ValueError(
            f"dtype=float16 overflows in {type(model.transformer).__name__}, which was trained in bfloat16, and "
            "produces black or NaN videos: use DTYPE=bfloat16."
        )
    if model.lora is not None and model.lora.base is not None:
        model.load_published(model.lora.base)
    model.load_published(weights_file(folder))  # checkpoints hold EMA weights under the names of the trained ones
    if model.trained_text is not None:
        print(
            f"the exported weights lack the {type(model.trained_text).__name__} that was trained with them: they do "
            f"not follow captions without it. Use {folder} itself (init_from={folder}) to keep both.",
            file=sys.stderr,
        )
    # merged before the conversion, so that the weights are rounded once
    with plain(model.transformer, merged=True) if merge else contextlib.nullcontext():
        return model.to(getattr(torch, dtype)).save_published(out, merge)


if __name__ == "__main__":
    with OneParagraphErrors(), signals.handled("The export is not complete: repeat the command."):
        main()
