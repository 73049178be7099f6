"""Evaluation entry point: measures a trained run on a data set, and writes the numbers to a file of their own.

    python -m blueberry_video.evaluate outputs/<name>[/<run>] [--split test] [--out numbers.json] [data.val.root=… …]

Overrides change ``data`` only. Uses the EMA weights if the run has them. The files of the run do not change.
"""

import argparse
import json
import math
import sys
import tempfile
from collections.abc import Sequence
from datetime import datetime
from inspect import signature
from pathlib import Path
from typing import Any

from hydra.errors import InstantiationException
from hydra.utils import get_class, instantiate

from blueberry_video.launch import command_line, signals
from blueberry_video.launch.errors import OneParagraphErrors


def main() -> None:
    parser = argparse.ArgumentParser(prog="blueberry evaluate", allow_abbrev=False)
    parser.add_argument("run", help="a run folder, or the folder of an experiment: its newest run")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="changes of data, as data.val.root=…")
    parser.add_argument("--split", help="test: the test set of the run; else the value of data.val.split")
    parser.add_argument("--out", help="JSON file to write; default: evaluations/<time>.json in the run folder")
    parser.add_argument("--best", action="store_true", help="weights of the best validation, not the newest")
    parser.add_argument("--overwrite", action="store_true", help="replace an existing file")
    known = parser.parse_args(sys.argv[1:])
    command_line.quiet_libraries()
    record, file = evaluate(known.run, known.overrides, known.split, known.out, known.overwrite, known.best)
    width = max(map(len, record["metrics"]))
    print("\n".join(f"{name:{width}}  {value:.4g}" for name, value in record["metrics"].items()))
    print(f"wrote {file}")


def evaluate(
    run: str | Path,
    overrides: Sequence[str] = (),
    split: str | None = None,
    out: str | Path | None = None,
    overwrite: bool = False,
    best: bool = False,
) -> tuple[dict[str, Any], Path]:
    """Measures the metrics of validation, or of the test set, of a trained run.

    Args:
        run: a run folder, or the folder of an experiment: its newest run.
        overrides: ``data.key=value``.
        split: ``test`` for the test set of the run, if it has one; otherwise the value of ``data.val.split``.
        out: JSON file; ``None``: ``evaluations/<time>.json`` in the run folder.
        overwrite: replace an existing file.
        best: use the weights of the best validation.

    Returns:
        The content of the file, and its path. Of a classifier, ``confusion_<label>_<name>.png`` and
        ``classes_<label>_<name>.csv`` are written beside it.

    Raises:
        FileNotFoundError: there is no run, or no valid checkpoint.
        InstantiationException: the data cannot be built, as when there is no such folder.
        FileExistsError: the file exists.
        ValueError: an override of another key, or data that does not fit the model.
    """
    if wrong := [text for text in overrides if not text.lstrip("+~").startswith("data.")]:
        raise ValueError(f"{wrong[0]} is no key of data, which alone an evaluation changes: use data.val.….")
    if out is not None and Path(out).exists() and not overwrite:
        raise FileExistsError(f"--out={out} exists: choose another name, or pass --overwrite to replace it.")
    import torch
    from lightning import Trainer

    from blueberry_video import config as configs
    from blueberry_video.atomic import explained_errors, write_text
    from blueberry_video.data.clips import check_same_order
    from blueberry_video.evaluation.class_report import class_names, write_report
    from blueberry_video.experiment.trained import load_trained
    from blueberry_video.launch.cluster_environment import trainer_options
    from blueberry_video.tasks.clip_format import ClipFormat

    trained = load_trained(run, best=best)
    config, changes = trained.config, list(overrides)
    tested = split == "test" and config.data.get("test") is not None
    if split is not None and not tested:
        if "split" not in config.data.val:
            raise ValueError(
                f"--split={split}: data.val of the run is a {config.data.val._target_.rpartition('.')[2]} without "
                "splits, and there is no data.test: change data.val with overrides."
            )
        changes.append(f"data.val.split={split}")
    if changes:
        config = configs.load(trained.path / "config.yaml", changes)
    clips = ClipFormat.of_run(trained)
    classes = {label: list(names) for label, names in clips.classes.items()}  # of which other data may have fewer
    part = config.data.test if tested else config.data.val
    takes = "classes" in signature(get_class(part._target_)).parameters and part.get("classes") is None
    dataset = instantiate(part, **({"classes": classes} if classes and takes else {}))
    loading = {key: value for key, value in config.data.items() if key not in ("train", "val", "test", "_target_")}
    data = get_class(config.data._target_)(_train(config.data.train, dataset), dataset, **loading)
    check_same_order(clips.classes, getattr(dataset, "classes", {}), "test" if tested else "val")
    with tempfile.TemporaryDirectory() as folder:  # of what a task writes beside its metrics
        trainer = Trainer(
            accelerator="gpu" if torch.cuda.is_available() else "cpu",
            devices=1,  # numbers do not depend on the processes of a job
            precision=config.trainer.get("precision", "32-true"),
            logger=False,
            enable_checkpointing=False,
            enable_model_summary=False,
            use_distributed_sampler=False,
            default_root_dir=folder,
            **trainer_options({"devices": 1}),
        )
        trainer.validate(trained.task, datamodule=data, verbose=False)
    name = "test" if tested else "val"
    values = {key.removeprefix("val/"): float(value) for key, value in trainer.callback_metrics.items()}
    metrics = {f"{name}/{key}": value for key, value in values.items() if math.isfinite(value)}
    now = datetime.now().astimezone()
    record: dict[str, Any] = {"run": str(trained.path), "checkpoint": trained.checkpoint.name, "clips": len(dataset)}
    record |= {"time": now.isoformat(), "overrides": list(overrides), "split": split, "metrics": metrics}
    file = Path(out or trained.path / "evaluations" / f"{now:%Y-%m-%d_%H-%M-%S}.json")
    with explained_errors(file):
        file.parent.mkdir(parents=True, exist_ok=True)
        write_text(file, json.dumps(record, indent=2) + "\n")
        for label, report in getattr(trained.task, "class_reports", {}).items():
            write_report(report, class_names(clips.classes.get(label, ()), report), file.parent, f"{label}_{file.stem}")
    return record, file


def _train(config: Any, otherwise: Any) -> Any:
    """Returns the training set, of which some baselines are computed, or ``otherwise`` if it is on another machine."""
    try:
        dataset = instantiate(config)
    except InstantiationException as error:
        if not isinstance(error.__cause__, FileNotFoundError):
            raise
        reason = f"data.train is missing ({error.__cause__})"
        print(f"{reason}: baselines are computed from the evaluated clips", file=sys.stderr)
        return otherwise
    return getattr(dataset, "uncached", dataset)  # few clips are read: no cache is built


if __name__ == "__main__":
    with OneParagraphErrors(), signals.handled("No file was written: repeat the command."):
        main()
