"""Pseudo-label entry point: writes the disparity that a trained model of depth predicts for the clips of an experiment.

    python -m blueberry_video.pseudo_labels outputs/<teacher>[/<run>] --config-dir experiments/<name> [--out <folder>]
        [--dtype float16] [--shard-size 64] [key=value …]

Labels the training data of the experiment. If they are a ``PseudoLabelled`` (or have one part that is), its dataset is
labelled and its folder is the default of ``--out``. After a kill, the same command continues, and the files are
identical byte for byte.
"""

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from omegaconf import DictConfig

from blueberry_video.config.checks import targets
from blueberry_video.launch import command_line, signals
from blueberry_video.launch.errors import OneParagraphErrors

if TYPE_CHECKING:  # torch is imported after the config is checked
    from blueberry_video.data.pseudo_labels import PseudoLabelled


def main() -> None:
    parser = argparse.ArgumentParser(prog="blueberry pseudo-labels", allow_abbrev=False, add_help=False)
    parser.add_argument("teacher", help="run of a model of depth, or folder of an experiment: its newest run")
    parser.add_argument("--out", default=None, help="folder to write to; defaults to data/pseudo_labels/<name>")
    parser.add_argument("--dtype", choices=("float32", "float16"), default="float32", help="of the stored disparity")
    parser.add_argument("--shard-size", type=int, default=64, help="clips per file")
    if len(sys.argv) < 2 or sys.argv[1].startswith("-"):
        raise ValueError(
            f"the arguments {sys.argv[1:]} name no teacher: give its run first, as in `python -m "
            "blueberry_video.pseudo_labels outputs/depth_anything --config-dir experiments/<name>`."
        )
    known, rest = parser.parse_known_args(sys.argv[1:])
    config = command_line.parse(rest).config()
    command_line.quiet_libraries()
    labelled = run(known.teacher, config, known.out, known.dtype, known.shard_size)
    print(
        f"{len(labelled)} clips are labelled in {labelled.labels.folder}. Train on them with data.train._target_="
        "blueberry_video.data.pseudo_labels.PseudoLabelled, its dataset and this folder."
    )


def run(
    teacher: str | Path, config: DictConfig, out: str | Path | None = None, dtype: str = "float32", shard_size: int = 64
) -> "PseudoLabelled":
    """Writes the pseudo-labels of the training data of an experiment.

    Args:
        teacher: a run folder, or the folder of an experiment: its newest run.
        config: resolved config of the experiment with the clips.
        out: folder to write to; ``None``: that of the ``PseudoLabelled`` of the config, or data/pseudo_labels/<name>.
        dtype, shard_size: see :class:`~blueberry_video.data.pseudo_labels.PseudoLabelWriter`.

    Returns:
        The labelled clips.

    Raises:
        FileNotFoundError: if there is no run, or it has no valid checkpoint.
        ValueError: if the run is of a different task or predicts metric depth, or the data cannot be labelled.
    """
    import torch
    from hydra.utils import instantiate

    from blueberry_video.data.pseudo_labels import PseudoLabelWriter
    from blueberry_video.evaluation.student import pseudo_labeller
    from blueberry_video.experiment.trained import load_trained
    from blueberry_video.models.autoencoder.base import fingerprint
    from blueberry_video.tasks.depth import Depth

    found = [node for _, node in targets(config.data.train, "data.train") if _is_labelled(node)]
    if len(found) > 1:
        raise ValueError(
            f"data.train of name={config.name} has {len(found)} parts of class PseudoLabelled: label one at a time, "
            "with an experiment that has only its clips as data.train."
        )
    node = found[0]["dataset"] if found else config.data.train
    folder = Path(out or (found[0]["folder"] if found else f"data/pseudo_labels/{config.name}"))
    trained = load_trained(teacher, (Depth,), "cuda" if torch.cuda.is_available() else "cpu")
    label, model = pseudo_labeller(trained.task), trained.task.model
    dataset = instantiate(node)
    if hasattr(dataset, "skipped_file"):
        dataset.skipped_file = str(folder / "skipped.csv")
    writer = PseudoLabelWriter(shard_size, dtype, int(config.data.get("num_workers") or 0))  # type: ignore[arg-type]
    return writer(dataset, label, folder, f"{type(model).__name__}/{fingerprint(model)}")


def _is_labelled(node) -> bool:
    return str(node["_target_"]).endswith(".PseudoLabelled")


if __name__ == "__main__":
    with OneParagraphErrors(), signals.handled("The pseudo-labels are not complete: repeat the command."):
        main()
