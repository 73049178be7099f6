"""An entry point: writes the diffusion transformer of a finished run as a folder that diffusers loads.

python -m blueberry_video.export outputs/<name>[/<run>] --out folder writes <folder>/transformer/, of the averaged
weights where the run has them; of a run with adapters (model.lora) pytorch_lora_weights.safetensors, or, with --merge,
the whole transformer. Training goes on from such a folder with init_from=<folder>.
"""

import argparse
import sys
from pathlib import Path

from blueberry_video.launch import command_line

DTYPES = ("float32", "bfloat16", "float16")


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m blueberry_video.export", allow_abbrev=False)
    parser.add_argument("run", help="a run folder, or that of an experiment: its newest run")
    parser.add_argument("--out", required=True, help="folder to write to")
    parser.add_argument("--dtype", choices=DTYPES, default="float32", help="in which weights are stored")
    parser.add_argument("--merge", action="store_true", help="add what adapters learned to the transformer's weights")
    known = parser.parse_args(sys.argv[1:])
    command_line.quiet_libraries()
    for path in run(Path(known.run), Path(known.out), known.dtype, known.merge):
        print(f"wrote {path}")


def run(source: Path, out: Path, dtype: str = "float32", merge: bool = False) -> list[Path]:
    """Writes what a run has learned.

    Args:
        source: a run folder, or the folder of an experiment's runs.
        out: folder to write to.
        dtype: one of ``DTYPES``.
        merge: whether adapters are added to the transformer.

    Returns:
        What was written.

    Raises:
        FileNotFoundError: there is no run, or it has no checkpoint.
        FileExistsError: the folder holds a transformer already, or is a file.
        ValueError: the run trained no text-to-video model, or one that float16 does not hold.
    """
    import torch
    from hydra.utils import instantiate

    from blueberry_video.config import load
    from blueberry_video.config.checks import HALF_OVERFLOWS
    from blueberry_video.diffusion.text_to_video import TextToVideo
    from blueberry_video.experiment.checkpoint import weights_file
    from blueberry_video.experiment.run_folder import RunFolder

    if (there := next(path for path in (out, *out.parents) if path.exists())).is_file():
        raise FileExistsError(f"{out} is to be a folder, and {there} is a file: choose another name.")
    try:
        folder = RunFolder.open(source).path
    except FileNotFoundError as error:
        raise FileNotFoundError(f"{error} `make train EXP=<experiment>` makes one.") from error
    model = instantiate(load(folder / "config.yaml").model)
    if not isinstance(model, TextToVideo):
        raise ValueError(f"{folder} trained a {type(model).__name__}: only diffusion transformers are exported.")
    places = getattr(model.transformer, "places", None)
    name = f"{type(model.transformer).__module__}.{type(model.transformer).__qualname__}"
    if dtype == "float16" and name in HALF_OVERFLOWS and (places is None or places.kind != "sincos"):
        raise ValueError(
            f"dtype=float16: {type(model.transformer).__name__} was trained in bfloat16, and overflows in float16, "
            "which gives black or NaN videos: write DTYPE=bfloat16."
        )
    if model.lora is not None and model.lora.base is not None:
        model.load_published(model.lora.base)
    model.load_published(weights_file(folder))  # a checkpoint holds the averaged weights under the trained ones' names
    return model.to(getattr(torch, dtype)).save_published(out, merge)


if __name__ == "__main__":
    with command_line.OneParagraphErrors():
        main()
