"""The entry point: compose a config, build what it names, pass the parts to each other in the open, fit.

python -m blueberry_video.train --config-dir experiments/<name>, or <run folder>/config.yaml to repeat a run; then
key=value …; resume=last (or a run's name) trains it on in its own folder; --multirun key=a,b runs every combination.
"""

import sys
from typing import TYPE_CHECKING, Any

import hydra
from hydra.utils import instantiate
from omegaconf import DictConfig

from blueberry_video import config as configs
from blueberry_video.launch import check, command_line, memory, processes

if TYPE_CHECKING:  # torch and lightning are imported once the config is known to be right
    from blueberry_video.experiment.run_folder import RunFolder


def main() -> None:
    command = command_line.parse(sys.argv[1:])
    if command.multirun:
        sys.argv[1:] = command.for_hydra()
        sweep()
    else:
        run(command.config(), command.overrides)


@hydra.main(config_path=str(configs.CONF), config_name=None, version_base="1.3")
def sweep(config: DictConfig) -> float | None:
    return run(configs.resolve(config))


def run(config: DictConfig, overrides: list[str] | None = None) -> float | None:
    """One run, from its folder to its report. Returns the metric that a sweep optimises."""
    from blueberry_video.experiment import gate, report, summary
    from blueberry_video.experiment.run_folder import RunFolder

    command_line.quiet_libraries()
    if config.check:
        check.dry_run(config, RunFolder.create, build)
        return None
    memory.announce(config)
    if shared := processes.shared_folder():  # one rank of several
        folder = RunFolder.open(shared)
        folder.resumed = config.resume is not None
    elif config.resume:
        folder = RunFolder.resume(config.name, config.resume, config.output_dir)
        config = configs.load(folder.path / "config.yaml", [*(overrides or ()), f"++resume={folder.name}"], config)
        folder.print_start(config.trainer.get("max_steps"))
    else:
        folder = RunFolder.create(config, config.output_dir)
    with folder:
        if (number := processes.count(config.trainer)) > 1:
            processes.start(config, folder.path, number)
        else:
            fit(config, folder)
    if shared:  # the process that started the ranks does the rest
        return None
    report.write_report(folder)
    print(f"\n{summary.summary(folder)}")
    if config.enforce_expected and not (verdict := gate.gate(folder))[0]:
        sys.exit(f"\n{verdict[1]}")
    return folder.metric(config.optimized_metric)


def fit(config: DictConfig, folder: "RunFolder") -> None:
    """Trains, measures the final weights on the validation set and, where the data has one, the test set."""
    data, _, task, trainer = build(config, folder)
    trainer.fit(task, datamodule=data, ckpt_path=folder.checkpoint(), weights_only=False)
    metrics = dict(trainer.callback_metrics)  # evaluating starts them anew
    for evaluate in (trainer.validate, trainer.test) if data.test is not None else (trainer.validate,):
        evaluate(task, datamodule=data, verbose=False)
        metrics |= trainer.callback_metrics
    folder.finish(metrics)


def build(config: DictConfig, folder: "RunFolder") -> tuple[Any, Any, Any, Any]:
    """Everything the config names, seeded: DataModule, model, task, Trainer."""
    from lightning import seed_everything

    from blueberry_video.experiment.checkpoint import weights_file
    from blueberry_video.experiment.loggers import MetricsCSV

    seed_everything(config.seed, workers=True, verbose=False)
    data, model, optimizer, schedule = map(instantiate, (config.data, config.model, config.optimizer, config.schedule))
    data.list_skipped_in(str(folder.path / "skipped.csv"))
    task = instantiate(config.task, _partial_=True)(model=model, optimizer=optimizer, schedule=schedule)
    if config.init_from and folder.checkpoint() is None:
        task.init_from = weights_file(config.init_from)
    callbacks = [instantiate(callback) for callback in config.callbacks.values() if callback]
    logger = [MetricsCSV(folder), *([instantiate(config.logger, run=folder)] if config.logger else [])]
    trainer = instantiate(config.trainer, _partial_=True)
    return data, model, task, trainer(callbacks=callbacks, logger=logger, default_root_dir=folder.path)


if __name__ == "__main__":
    with command_line.OneParagraphErrors():
        main()
