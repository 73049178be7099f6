import json
import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import wandb
from lightning.pytorch.utilities import rank_zero_only
from omegaconf import OmegaConf

from blueberry_video.experiment import loggers
from blueberry_video.experiment.loggers import MetricsCSV, Wandb, environment_mode, last_wandb_step
from blueberry_video.experiment.metrics_table import read_steps
from blueberry_video.experiment.run_folder import RunFolder


class FakeRun:
    """Mock of a wandb run; tests/test_resume.py uses a real one."""

    step = 0
    url: str | None = None

    def __init__(self, folder: Path) -> None:
        self.dir = str(folder / "wandb" / "offline-run-1" / "files")
        self.rows: list[tuple[int, dict]] = []
        self.exit_code: int | None = None

    def log(self, row: dict, step: int) -> None:
        self.rows.append((step, row))

    def define_metric(self, *arguments: Any, **options: Any) -> None:
        pass

    def finish(self, exit_code: int) -> None:
        self.exit_code = exit_code


@pytest.fixture
def run(tmp_path: Path) -> RunFolder:
    return RunFolder.create(OmegaConf.create({"name": "idea", "seed": 1, "depth": 4}), tmp_path)


@pytest.fixture
def fake(run: RunFolder, monkeypatch: pytest.MonkeyPatch) -> FakeRun:
    fake = FakeRun(run.path)

    def init(**arguments: Any) -> FakeRun:
        fake.arguments = arguments
        return fake

    monkeypatch.setattr(wandb, "init", init)
    return fake


def test_csv_writes_metrics_without_a_step_to_the_newest_row(run: RunFolder) -> None:
    logger = MetricsCSV(run)
    logger.log_metrics({"train/loss": 0.5}, step=3)
    logger.log_metrics({"probe/motion": 0.25})
    assert read_steps(run.path / "metrics.csv") == {3: {"train/loss": 0.5, "probe/motion": 0.25}}
    assert (logger.save_dir, logger.name, logger.version) == (str(run.path), "idea", run.name)


def test_wandb_run_has_name_and_group(run: RunFolder, fake: FakeRun) -> None:
    Wandb(run, project="p", tags=["a"], mode="offline").log_metrics({"a": 1}, step=0)
    expected = {"project": "p", "group": "idea", "name": run.name, "id": run.record["wandb"]["id"], "mode": "offline"}
    assert {key: fake.arguments[key] for key in expected} == expected
    assert fake.arguments["config"] == {"name": "idea", "seed": 1, "depth": 4}
    assert Path(fake.arguments["dir"]) == run.path
    assert run.record["wandb"]["folder"] == "wandb/offline-run-1"


def test_wandb_receives_one_row_per_step(run: RunFolder, fake: FakeRun) -> None:
    logger = Wandb(run, mode="offline")
    logger.log_metrics({"a": 1}, step=0)
    logger.log_metrics({"b": 2}, step=0)
    assert fake.rows == []
    logger.log_metrics({"a": 3}, step=1)
    logger.log_metrics({"media/x": "a video"})
    with run:
        logger.finalize("success")
    assert fake.rows == [
        (0, {"a": 1, "b": 2, "trainer/global_step": 0}),
        (1, {"a": 3, "media/x": "a video", "trainer/global_step": 1}),
    ]
    assert fake.exit_code == 0


def test_failed_run_ends_as_failed_in_wandb(run: RunFolder, fake: FakeRun) -> None:
    Wandb(run, mode="offline").log_metrics({"a": 1}, step=0)
    with pytest.raises(ValueError, match="bad"), run:
        raise ValueError("bad")
    assert [step for step, _ in fake.rows] == [0]
    assert fake.exit_code == 1


def test_resumed_wandb_run_receives_lost_steps_and_no_step_twice(
    run: RunFolder, fake: FakeRun, monkeypatch: pytest.MonkeyPatch
) -> None:
    table = MetricsCSV(run)
    for step in range(6):  # the checkpoint is of step 5; wandb wrote rows up to step 2 before the kill
        table.log_metrics({"a": step}, step=step)
    monkeypatch.setattr(loggers, "last_wandb_step", lambda folder: 2)
    run.resumed = True
    logger = Wandb(run, mode="offline")
    for step in (5, 6):
        for each in (table, logger):
            each.log_metrics({"b": step}, step=step)
    logger.finalize("success")
    assert [(step, row.get("a"), row.get("b")) for step, row in fake.rows] == [
        (3, 3, None),
        (4, 4, None),
        (5, 5, 5),
        (6, None, 6),
    ]


def test_repeated_steps_are_not_sent_again(run: RunFolder, fake: FakeRun, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loggers, "last_wandb_step", lambda folder: 7)
    run.resumed = True
    table, logger = MetricsCSV(run), Wandb(run, mode="offline")
    for step in range(5, 10):
        for each in (table, logger):
            each.log_metrics({"a": step}, step=step)
    logger.finalize("success")
    assert [step for step, _ in fake.rows] == [8, 9]


@pytest.mark.parametrize("modes", [["offline"], ["offline", "disabled"]])
@pytest.mark.parametrize(
    "error",
    [
        wandb.errors.CommError("run ID abc is in use"),
        wandb.errors.UsageError("api_key not configured"),
        wandb.errors.AuthenticationError("invalid key"),
        TimeoutError("no answer"),
        OSError("no space left"),
        ValueError("entity not found"),
    ],
    ids=lambda error: type(error).__name__,
)
def test_no_error_of_wandb_ends_a_run(
    run: RunFolder, fake: FakeRun, monkeypatch: pytest.MonkeyPatch, error: Exception, modes: list[str]
) -> None:
    works = wandb.init

    def init(**arguments: Any) -> FakeRun:
        if arguments["mode"] != modes[-1]:
            raise error
        return works(**arguments)

    monkeypatch.setattr(wandb, "init", init)
    logger = Wandb(run, mode="online")
    with pytest.warns(UserWarning, match=rf"wandb .*{type(error).__name__}: {error}"):
        logger.log_metrics({"a": 1}, step=0)
    logger.finalize("success")
    assert [row["a"] for _, row in fake.rows] == [1]
    assert fake.arguments["mode"] == run.record["wandb"]["mode"] == modes[-1]


def test_id_of_an_agent_is_recorded(run: RunFolder, fake: FakeRun) -> None:
    fake.id = "agent123"
    before = run.record["wandb"]["id"]
    Wandb(run, mode="offline").log_metrics({"a": 1}, step=0)
    assert before != run.record["wandb"]["id"] == "agent123"


def test_real_wandb_under_an_agent_has_the_recorded_id(run: RunFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_SWEEP_ID", "sweep1")
    monkeypatch.setenv("WANDB_RUN_ID", "agent123")
    wandb.teardown()  # so that the environment is read again
    with run:
        logger = Wandb(run, mode="offline")
        logger.log_metrics({"a": 1}, step=0)
        used = logger.experiment.id
    wandb.teardown()
    assert run.record["wandb"]["id"] == used
    assert list(run.path.glob(f"wandb/*/run-{used}.wandb"))


def test_mode_depends_on_the_key(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("WANDB_MODE", "WANDB_API_KEY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    monkeypatch.setenv("WANDB_BASE_URL", "https://wandb.example.org")
    wandb.teardown()  # so that the next call reads the environment again
    assert environment_mode("auto") == "offline"
    (tmp_path / "netrc").write_text(f"machine wandb.example.org login user password {'k' * 40}\n")
    assert environment_mode("auto") == "online"
    monkeypatch.setenv("WANDB_MODE", "offline")
    assert environment_mode("auto") == "offline"
    monkeypatch.delenv("WANDB_MODE")
    (tmp_path / "netrc").unlink()
    monkeypatch.setenv("WANDB_API_KEY", "k" * 40)
    wandb.teardown()
    assert environment_mode("auto") == "online"
    wandb.teardown()


@pytest.mark.parametrize(
    ("variable", "value", "mode"),
    [("WANDB_MODE", "disabled", "disabled"), ("WANDB_MODE", "", "offline"), ("WANDB_DISABLED", "true", "disabled")],
)
def test_a_run_logs_under_any_wandb_environment(run: RunFolder, variable: str, value: str, mode: str, monkeypatch):
    for name in ("WANDB_MODE", "WANDB_DISABLED"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv(variable, value)
    logger = Wandb(run)
    logger.log_metrics({"a": 1}, step=0)
    logger.close(succeeded=True)
    assert run.record["wandb"]["mode"] == mode


def test_invalid_wandb_mode_raises(run: RunFolder, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "sometimes")
    with pytest.raises(ValueError, match=r"WANDB_MODE='sometimes'.*offline"):
        Wandb(run)


def test_closed_run_is_finished_once_and_a_new_one_starts(run: RunFolder, fake: FakeRun) -> None:
    logger = Wandb(run, mode="offline")
    logger.close(succeeded=True)
    assert fake.exit_code is None, "nothing was logged"
    logger.log_metrics({"a": 1}, step=4)
    logger.close(succeeded=False)
    assert (fake.exit_code, [step for step, _ in fake.rows]) == (1, [4])
    fake.exit_code = None
    logger.close(succeeded=True)
    assert fake.exit_code is None
    logger.log_metrics({"a": 2}, step=5)
    logger.close(succeeded=True)
    assert (fake.exit_code, [step for step, _ in fake.rows]) == (0, [4, 5])


@pytest.mark.parametrize(("mode", "url"), [("online", "https://w/x"), ("offline", None)])
@pytest.mark.parametrize("resumed", [False, True])
def test_record_names_the_wandb_run(run: RunFolder, fake: FakeRun, mode: str, url: str | None, resumed: bool) -> None:
    fake.url, run.resumed = "https://w/x", resumed
    known = run.record["wandb"]["id"]
    Wandb(run, mode=mode, entity="team", tags=("a", "b")).log_metrics({"a": 1}, step=0)
    folder = "wandb" if resumed else "wandb/offline-run-1"
    assert run.record["wandb"] == {"id": known, "mode": mode, "url": url, "folder": folder}
    assert {key: fake.arguments[key] for key in ("entity", "tags")} == {"entity": "team", "tags": ["a", "b"]}


def test_steps_that_the_server_has_are_not_sent(run: RunFolder, fake: FakeRun) -> None:
    fake.step = 3  # the next one
    logger = Wandb(run, mode="offline")
    for step in range(1, 5):
        logger.log_metrics({"a": step}, step=step)
    logger.log_metrics({"b": 1}, step=2)  # before the current row: part of it
    logger.finalize("success")
    assert [(step, row["a"], row.get("b")) for step, row in fake.rows] == [(3, 3, None), (4, 4, 1)]


def test_other_ranks_log_nothing(run: RunFolder, fake: FakeRun, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rank_zero_only, "rank", 1, raising=False)
    for logger in (MetricsCSV(run), Wandb(run, mode="offline")):
        logger.log_metrics({"a": 1}, step=0)
        logger.finalize("success")
    assert (fake.rows, (run.path / "metrics.csv").exists()) == ([], False)


def test_last_step_is_that_of_the_newest_readable_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    outputs = {"old": {"_step": 9, "step": 9}, "new": None, "middle": {"_step": 6}, "empty": {}}
    for age, name in enumerate(("new", "empty", "middle", "old")):
        file = tmp_path / f"offline-run-{name}" / f"{name}.wandb"
        file.parent.mkdir()
        file.touch()
        os.utime(file, (1000 - age,) * 2)
    asked = []

    def inspect(command: list[str], **options: Any) -> SimpleNamespace:
        name = Path(command[-1]).stem
        asked.append(name)
        content = json.dumps({"summary": outputs[name] or {}, "step": 5})
        return SimpleNamespace(returncode=1 if outputs[name] is None else 0, stdout=content)

    monkeypatch.setattr(loggers.subprocess, "run", inspect)
    assert last_wandb_step(tmp_path) == 5
    assert asked == ["new", "empty", "middle"]


def test_last_step_without_wandb_files_is_minus_one(tmp_path: Path) -> None:
    assert last_wandb_step(tmp_path) == -1


def fail(*arguments: Any, **options: Any) -> None:
    raise OSError(28, "No space left on device")


def use(method: str, logger: Wandb) -> None:
    """Calls a method of the logger as training does."""
    arguments = {"log_video": ("media/two", ["two.gif"]), "log_image": ("media/two", ["two.png"])}
    getattr(logger, method)(*arguments.get(method, ({"a": 1},)))


@pytest.mark.parametrize("method", ["log_metrics", "log_video", "log_image", "log_hyperparams"])
def test_error_of_wandb_while_logging_is_one_warning(run: RunFolder, fake: FakeRun, monkeypatch, method: str) -> None:
    logger = Wandb(run, mode="offline")
    logger.log_metrics({"a": 1}, step=0)
    monkeypatch.setattr(fake, "log", fail)
    monkeypatch.setattr(wandb, "Video", fail)
    monkeypatch.setattr(wandb, "Image", fail)
    fake.config = SimpleNamespace(update=fail)

    def train() -> None:
        for step in range(3):
            logger.log_metrics({"a": step}, step=step)
            use(method, logger)

    with pytest.warns(UserWarning, match=r"wandb .*`log_.*No space left.*logger=csv") as warned:
        train()
    assert len(warned) == (1 if method == "log_metrics" else 2), "one for each method"


@pytest.mark.parametrize("error", [OSError("full"), TimeoutError("no network"), wandb.errors.CommError("lost")])
def test_error_of_wandb_at_the_end_leaves_the_run_finished(
    run: RunFolder, fake: FakeRun, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    def finish(exit_code: int) -> None:
        raise error

    monkeypatch.setattr(fake, "finish", finish)
    torn_down = []
    monkeypatch.setattr(wandb, "teardown", lambda: torn_down.append(True) or fail())
    logger = Wandb(run, mode="offline")
    logger.log_metrics({"a": 1}, step=0)
    with pytest.warns(UserWarning, match=rf"`finish` \({type(error).__name__}: {error}"), run:
        run.finish({"a": 1.0})
    assert run.record["status"] == "finished"
    assert run.record["metrics"] == {"a": 1.0}
    assert [row["a"] for _, row in fake.rows] == [1], "the last row is sent"
    assert torn_down, "otherwise wandb waits when the process exits"


def test_row_that_cannot_be_sent_does_not_keep_wandb_from_finishing(run: RunFolder, fake: FakeRun, monkeypatch) -> None:
    logger = Wandb(run, mode="offline")
    logger.log_metrics({"a": 1}, step=0)
    monkeypatch.setattr(fake, "log", fail)
    with pytest.warns(UserWarning, match="`finalize`"):
        logger.close(True)
    assert fake.exit_code == 0


def test_uploads_at_the_end_have_a_limit(run: RunFolder, fake: FakeRun) -> None:
    Wandb(run, mode="offline").log_metrics({"a": 1}, step=0)
    settings = fake.arguments["settings"]
    assert (settings.finish_timeout, settings.finish_timeout_raises) == (loggers.FINISH_SECONDS, True)


def test_any_logger_that_cannot_be_closed_leaves_the_run_finished(run: RunFolder) -> None:
    closed = []
    run.on_close += [fail, closed.append]
    with pytest.warns(UserWarning, match=rf"{run.path} .*No space left"), run:
        run.finish({})
    assert run.record["status"] == "finished"
    assert closed == [True]
    run.lock()  # released before
