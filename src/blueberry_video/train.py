"""Training entry point: composes a config, builds data, model, task and trainer, and fits.

    python -m blueberry_video.train --config-dir experiments/<name> [key=value …]
    python -m blueberry_video.train outputs/<name>/<run>/config.yaml [key=value …]

The second form repeats a run. ``resume=last`` (or the name of a run) continues a run in its folder; ``--multirun
key=a,b`` runs every combination.
"""

import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import hydra
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf

from blueberry_video import config as configs
from blueberry_video.launch import command_line, dry_run, environment, group, memory, processes, scheduler, signals
from blueberry_video.launch import sweep as sweeps
from blueberry_video.launch.errors import OneParagraphErrors

if TYPE_CHECKING:  # torch and lightning are imported after the config is checked
    from blueberry_video.experiment.run_folder import RunFolder


def main() -> None:
    processes.end_with_parent()
    follows = environment.recognize().follows
    with processes.reported(), signals.handled(quiet=follows), group.joined() as ranks, scheduler.requeued(follows):
        if ranks is not None and ranks.follows:
            ranks.follow(train_rank)
        command = command_line.parse(sys.argv[1:])
        if shared := processes.shared_folder():
            train_rank({"config": (config := command.config()), "folder": shared, "resumed": config.resume is not None})
        elif command.multirun:
            sweeps.run(command, sweep)
        else:
            sweeps.run_single(command, run)


@hydra.main(config_path=str(configs.CONF), config_name=None, version_base="1.3")
def sweep(config: DictConfig) -> float | None:
    return sweeps.run_point(config, run)


def run(
    config: DictConfig,
    command: command_line.Command | None = None,
    created: Callable[[Path], None] = lambda folder: None,
) -> float | None:
    """Executes one run, from creating its folder to writing its report; returns ``optimized_metric``.

    Args:
        config: the resolved and checked config.
        command: the command line, of which a resumed run applies the overrides to its own config.
        created: called with the run folder.
    """
    with signals.held():
        from blueberry_video.experiment import gate, report
        from blueberry_video.experiment.resumption import begun, resumption
        from blueberry_video.experiment.run_folder import RunFolder

    command_line.quiet_libraries()
    config = config if config.resume else configs.with_classes(config)  # a resumed run has its numbers
    if config.check:
        resumed = resumption(config, command.file, command.overrides, lock=False) if config.resume and command else None
        dry_run.dry_run(resumed.config if resumed else config, RunFolder.create, build, resumed)
        return None
    environment.check(config.trainer, environment.recognize(), " ".join(sys.argv[1:]))
    memory.announce(config)
    folder, config, _, complete = begun(config, command)
    created(folder.path)
    with signals.handled(signals.how_to_continue(config.name, folder.name, config.output_dir)), folder:
        if (number := 0 if complete else processes.count(config.trainer)) > 1:
            processes.start(config, folder.path, number)
        elif number:
            with group.shared(config, folder.path, folder.resumed, folder.fail):
                fit(config, folder)
    report.conclude(folder)
    if config.enforce_expected and not (verdict := gate.gate(folder))[0]:
        sys.exit(f"\n{verdict[1]}")
    return folder.metric(config.optimized_metric)


def train_rank(message: dict[str, Any]) -> None:
    """Trains in a process of the run that another one started: ``message`` has its config, folder and ``resumed``."""
    with signals.held():
        from blueberry_video.experiment.run_folder import RunFolder

    command_line.quiet_libraries()
    folder = RunFolder.open(message["folder"])
    folder.lock(rank=True)
    folder.resumed = message["resumed"]
    with processes.rank_of(folder):
        fit(OmegaConf.create(message["config"]), folder)


def fit(config: DictConfig, folder: "RunFolder") -> None:
    """Trains, then evaluates the final weights on the validation set and, if there is one, the test set."""
    from blueberry_video.evaluation.end_of_run import evaluate_sets
    from blueberry_video.experiment.checkpoint import why_training_ended

    data, _, task, trainer = build(config, folder)
    trainer.fit(task, datamodule=data, ckpt_path=folder.checkpoint(), weights_only=True)
    metrics = dict(trainer.callback_metrics)  # validate and test clear them
    ended = why_training_ended(trainer)
    folder.finish(metrics | evaluate_sets(trainer, task, data), ended, trainer.global_step)


def build(config: DictConfig, folder: "RunFolder") -> tuple[Any, Any, Any, Any]:
    """Seeds and builds DataModule, model, task and Trainer from a config."""
    from lightning import seed_everything

    from blueberry_video.experiment.checkpoint import weights_file
    from blueberry_video.experiment.loggers import MetricsCSV
    from blueberry_video.launch.cluster_environment import trainer_options
    from blueberry_video.tasks.clip_format import RecordClips

    seed_everything(config.seed, workers=True, verbose=False)
    data = instantiate(config.data)
    config = configs.with_classes(config, data)
    model = instantiate(config.model)
    configs.check_classes(config.model.get("num_classes"), data.classes)
    data.list_skipped_in(str(folder.path / "skipped.csv"))
    optimization = instantiate(config.task.optimization)(
        optimizer=instantiate(config.optimizer),
        schedule=instantiate(config.schedule),
        init_from=weights_file(config.init_from) if config.init_from and folder.checkpoint() is None else None,
    )
    task = instantiate(config.task, _partial_=True)(model=model, optimization=optimization)
    callbacks = [instantiate(callback) for callback in config.callbacks.values() if callback]
    callbacks.append(RecordClips(folder.update))
    loggers = [MetricsCSV(folder), *([instantiate(config.logger, run=folder)] if config.logger else [])]
    options: dict[str, Any] = {"callbacks": callbacks, "logger": loggers, "default_root_dir": folder.path}
    interval = config.trainer.get("val_check_interval")
    if isinstance(interval, int):  # Lightning counts batches
        options["val_check_interval"] = interval * config.trainer.get("accumulate_grad_batches", 1)
    partial = instantiate(config.trainer, _partial_=True)
    trainer = partial(**options, **trainer_options(partial.keywords))
    signals.save_first(trainer)
    return data, model, task, trainer


if __name__ == "__main__":
    with OneParagraphErrors():
        main()
