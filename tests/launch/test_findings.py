"""Single findings of the dry run: sizes, units, limits, and which of them stop the run."""

import contextlib
import resource
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from omegaconf import OmegaConf

from blueberry_video.launch import dry_run as dry_runs

GIB = 2**30


class Findings(dry_runs.Findings):
    """Findings that are also collected, as (what, text, fix, fatal)."""

    def __init__(self) -> None:
        super().__init__()
        self.all: list[tuple[str, str, str, bool]] = []

    def add(self, what: str, text: str, fix: str = "", fatal: bool = True) -> None:
        super().add(what, text, fix, fatal)
        self.all.append((what, text, fix, fatal))


def test_only_fatal_findings_with_a_fix_are_counted(capsys: pytest.CaptureFixture):
    findings = dry_runs.Findings()
    findings.add("a", "fine")
    findings.add("b", "slow", "Use more.", fatal=False)
    findings.add("c", "bad", "Use less.")
    findings.add("d", "bad", "Use less.")
    assert findings.failed == 2
    marks = [line.split()[:2] for line in capsys.readouterr().out.splitlines()]
    assert marks == [["ok", "a"], ["note", "b"], ["FAIL", "c"], ["FAIL", "d"]]


@pytest.mark.parametrize(
    ("checkpoints", "free", "enough", "needed"),
    [
        (None, 3.3, True, "3.2"),  # two checkpoints, one more while writing, a quarter for media and logs
        (None, 3.2, False, "3.2"),
        ({"keep": 5}, 6.3, True, "6.2"),
        ({"keep": 5}, 6.2, False, "6.2"),
        ({}, 3.3, True, "3.2"),
    ],
)
def test_disk_has_space_for_all_checkpoints(checkpoints, free, enough, needed, tmp_path: Path, monkeypatch):
    usage = SimpleNamespace(free=free * GIB)
    asked = []
    monkeypatch.setattr(dry_runs.shutil, "disk_usage", lambda folder: asked.append(folder) or usage)
    config = OmegaConf.create({"output_dir": str(tmp_path / "new" / "runs"), "callbacks": {"checkpoints": checkpoints}})
    findings = Findings()
    dry_runs._check_disk(config, GIB, findings)
    [(what, text, fix, fatal)] = findings.all
    assert asked == [tmp_path]
    assert (what, fatal, fix == "") == ("disk", True, enough)
    assert f"a run needs about {needed}" in text


@pytest.mark.parametrize(("free", "fits"), [(GIB // 2, True), (GIB // 2 - 1, False), (None, True), (9 * GIB, True)])
def test_little_memory_is_noted(free: int | None, fits: bool, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    monkeypatch.setattr(dry_runs, "available_memory", lambda: free)
    usage = SimpleNamespace(ru_maxrss=3 * 2**20)  # KiB
    monkeypatch.setattr(resource, "getrusage", lambda who: usage if who == resource.RUSAGE_SELF else None)
    findings = Findings()
    dry_runs._check_memory(findings)
    available = "" if free is None else f", {free / GIB:.1f} GiB available"
    fix = "" if fits else "Lower `data.batch_size` or `data.num_workers`."
    assert findings.all == [("memory", f"3.0 GiB used{available}", fix, False)]


@pytest.mark.parametrize(("used", "fits"), [(9, True), (9.01, False), (0, None)])
def test_nearly_full_gpu_is_noted(used: float, fits: bool | None, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.max_memory_allocated", lambda: used * GIB)
    monkeypatch.setattr("torch.cuda.mem_get_info", lambda: (4 * GIB, 10 * GIB))
    findings = Findings()
    dry_runs._check_memory(findings)
    expected = ("GPU memory", f"{used:.1f} of 10.0 GiB used", "" if fits else "Lower `data.batch_size`.", False)
    assert findings.all[1:] == ([] if fits is None else [expected])


class Mixture(list):
    """Dataset of several parts."""

    parts: dict[str, range]


def test_evaluations_may_use_all_clips_of_their_part_and_no_more():
    train = Mixture(range(12))
    train.parts = {"image": range(7), "video": range(5)}
    data = SimpleNamespace(train=train, val=range(3))
    callbacks = {
        "off": None,
        "whole": {"train_clips": 12, "val_clips": 3, "num_labelled": 12},
        "part": {"train_clips": 5, "part": "video"},
        "more": {"train_clips": 13, "val_clips": 4},
        "small": {"num_labelled": 6, "part": "video"},
    }
    config = OmegaConf.create({"callbacks": callbacks})
    findings = Findings()
    assert not dry_runs._check_clip_counts(config, data, findings)
    assert [(text.partition(" ")[0], fix) for _, text, fix, _ in findings.all] == [
        ("callbacks.more.train_clips=13", "Use `callbacks.more.train_clips=12` or less."),
        ("callbacks.more.val_clips=4", "Use `callbacks.more.val_clips=3` or less."),
        ("callbacks.small.num_labelled=6", "Use `callbacks.small.num_labelled=5` or less."),
    ]
    for name in ("more", "small"):
        config.callbacks[name] = None
    findings.failed = 3  # of earlier checks
    assert dry_runs._check_clip_counts(config, data, findings)


class Evaluated:
    """The parts of a trainer that evaluate."""

    def __init__(self) -> None:
        self.callback_metrics = {"train/loss": 1.0}
        self.calls: list[str] = []

    def validate(self, task: Any, datamodule: Any, verbose: bool) -> None:
        self.calls.append("validate")
        self.callback_metrics = {"val/loss": 1.0, "probe/motion": 0.5}

    def test(self, task: Any, datamodule: Any, verbose: bool) -> None:
        self.calls.append("test")
        self.callback_metrics = {"test/loss": 1.0}


@pytest.mark.parametrize("has_test", [False, True])
@pytest.mark.parametrize("is_mixture", [False, True])
def test_expected_metrics_of_the_evaluations(has_test: bool, is_mixture: bool):
    data = SimpleNamespace(test=[] if has_test else None, val=SimpleNamespace(parts={}) if is_mixture else [])
    names = ("train/loss", "val/loss", "probe/motion", "val/los", "probe/shape", "other/x")
    config = OmegaConf.create({"expected": {name: {} for name in names}})
    findings, trainer = Findings(), Evaluated()
    dry_runs._evaluate(config, data, None, trainer, findings)
    assert trainer.calls == (["validate", "test"] if has_test else ["validate"])
    first, *others = findings.all
    metrics = ["probe/motion", *(["test/loss"] if has_test else []), "train/loss", "val/loss"]
    assert first[1] == f"{len(metrics)} metrics: {', '.join(metrics)}"
    fatal = {text.split()[0]: is_fatal for _, text, fix, is_fatal in others if fix}
    assert fatal == {"expected.val/los": not is_mixture, "expected.probe/shape": False, "expected.other/x": True}


def test_sizes_are_lowered_and_never_raised():
    node = OmegaConf.create(
        {
            "probe": {"train_clips": 400, "val_clips": 3, "lrs": [0.1, 0.2, 0.3], "part": "clips", "depth": 400},
            "plan": {"inner": {"episodes": 50, "samples": 500, "elites": 50, "iterations": 9, "max_steps": 40}},
            "sample": {"clips": 100, "steps": 50, "random_tries": 7, "every_n_steps": 1000, "num_labelled": 99},
            "few": {"val_clips": 400},
        }
    )
    dry_runs._limit(node, dry_runs.LARGEST)
    assert node == {
        "probe": {"train_clips": 8, "val_clips": 3, "lrs": [0.1], "part": "clips", "depth": 400},
        "plan": {"inner": {"episodes": 1, "samples": 16, "elites": 4, "iterations": 1, "max_steps": 2}},
        "sample": {"clips": 36, "steps": 2, "random_tries": 1, "every_n_steps": 4, "num_labelled": 8},
        "few": {"val_clips": 8},
    }


def test_limits_of_the_short_run(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("WANDB_API_KEY", "k")
    for name in ("WANDB_MODE", "WANDB_DISABLED"):
        monkeypatch.delenv(name, raising=False)
    trainer = {
        **{"max_steps": 1000, "max_epochs": 7, "limit_train_batches": 0.5, "limit_val_batches": 20},
        **{"limit_test_batches": 30, "val_check_interval": 200, "check_val_every_n_epoch": 5},
        **{
            "accumulate_grad_batches": 8,
            "log_every_n_steps": 50,
            "devices": 4,
            "strategy": "ddp",
            "profiler": "simple",
        },
        **{"enable_progress_bar": True, "enable_model_summary": True, "precision": "bf16-mixed"},
    }
    callbacks = {"progress": {}, "checkpoints": {}, "media": {"every_n_steps": 100, "fps": 8}}
    config = OmegaConf.create({"trainer": trainer, "callbacks": callbacks, "logger": {"mode": "online"}})
    short = dry_runs._short_run(config)
    assert short.trainer == {
        **{"max_steps": 4, "max_epochs": -1, "limit_train_batches": 4, "limit_val_batches": 1},
        **{"limit_test_batches": 1, "val_check_interval": None, "check_val_every_n_epoch": 1},
        **{"accumulate_grad_batches": 1, "log_every_n_steps": 1, "devices": 1, "strategy": "auto", "profiler": None},
        "num_nodes": 1,
        **{"enable_progress_bar": False, "enable_model_summary": False, "precision": "bf16-mixed"},
    }
    assert short.callbacks == {"progress": None, "checkpoints": None, "media": {"every_n_steps": 4, "fps": 8}}
    assert short.logger.mode == "offline"
    config.logger = {"mode": "auto"}
    monkeypatch.setenv("WANDB_MODE", "disabled")
    assert dry_runs._short_run(config).logger.mode == "auto", "it is not online"


@pytest.mark.parametrize(("devices", "two"), [(3, 2), ([5, 1, 4], [5, 1])])
def test_run_of_two_processes_uses_the_first_devices(devices: Any, two: Any, tmp_path: Path, monkeypatch):
    config = OmegaConf.create(
        {
            "trainer": {"devices": devices, "strategy": "fsdp"},
            "callbacks": {},
            "logger": {},
            "check": True,
            "task": {"sampler": {"steps": 50, "guidance": 6}},
        }
    )
    started = []
    monkeypatch.setattr(dry_runs.processes, "start", lambda *arguments: started.append(arguments))
    folder = contextlib.nullcontext(SimpleNamespace(path=tmp_path / "run"))
    findings = Findings()
    dry_runs._try_two_processes(config, 3, lambda short, root: folder, findings)
    [(short, run, number)] = started
    assert (run, number, short.trainer.devices, short.trainer.strategy) == (tmp_path / "run", 2, two, "fsdp")
    assert short.task.sampler == {"steps": 2, "guidance": 6}
    assert short.check is False
    assert findings.all[0][:2] == ("processes", "2 of 3 processes: trained, validated and evaluated")


def test_frozen_model_fails():
    model = torch.nn.Sequential(torch.nn.Linear(1000, 2000, bias=False), torch.nn.Linear(1000, 500, bias=False))
    model[1].requires_grad_(False)
    findings = Findings()
    dry_runs._describe_model(model, findings)
    assert findings.all == [("model", "Sequential, 2.50 M parameters, 2.00 M trained", "", True)]
    model.requires_grad_(False)
    dry_runs._describe_model(model, findings)
    assert "`model.freeze_encoder=false`" in findings.all[1][2]
    assert findings.failed == 1


def test_only_trainable_parameters_without_gradient_are_idle():
    model = torch.nn.ModuleDict({name: torch.nn.Linear(2, 2, bias=False) for name in ("used", "idle", "frozen")})
    model["frozen"].requires_grad_(False)
    model["used"](torch.ones(1, 2)).sum().backward()
    assert dry_runs._without_gradient(model) == {"idle.weight"}


@pytest.mark.parametrize("differs", [False, True])
def test_state_that_is_not_saved_fails(differs: bool, tmp_path: Path):
    task, fresh = torch.nn.Linear(3, 2), torch.nn.Linear(3, 2)
    if differs:
        fresh.load_state_dict = lambda state: None  # type: ignore[method-assign, assignment]
    saved = {"state_dict": task.state_dict()}
    trainer = SimpleNamespace(save_checkpoint=lambda file: torch.save(saved, file))
    findings = Findings()
    file = tmp_path / "x.ckpt"
    assert dry_runs._save_and_reload(trainer, task, fresh, file, findings) == file.stat().st_size
    [(what, text, fix, fatal)] = findings.all
    assert (what, fatal) == ("checkpoint", True)
    assert text == f"{file.stat().st_size / 2**20:.1f} MiB, saved and reloaded"
    assert fix == ("weight differs after loading: store it in a parameter or a buffer." if differs else "")


def test_leaves_are_all_values_in_lists_and_mappings():
    config = OmegaConf.create({"a": 1, "b": {"c": None, "d": [2, {"e": "text"}], "f": {}}})
    assert list(dry_runs._leaves(config)) == [1, None, 2, "text"]


def test_memory_is_estimated_only_for_models_with_a_transformer(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(dry_runs.memory, "estimate", lambda config: ({"weights": 3 * GIB}, 2))
    for fix in ("", "Use `trainer=fsdp`."):
        monkeypatch.setattr(dry_runs.memory, "shortage", lambda config, parts, shards, fix=fix: fix)
        findings = Findings()
        assert dry_runs._estimate_memory(OmegaConf.create({"model": {}}), findings)
        assert findings.all == []
        assert dry_runs._estimate_memory(OmegaConf.create({"model": {"transformer": {"a": 1}}}), findings) == (not fix)
        [(what, text, found, _)] = findings.all
        assert (what, found) == ("state", fix)
        assert text.startswith("1.5 GiB per device, in 2 shards")


def test_time_of_steps_excludes_validation_and_other_callbacks(monkeypatch: pytest.MonkeyPatch):
    now = iter([10.0, 11.0, 11.5, 20.0, 22.0, 22.5])
    monkeypatch.setattr(dry_runs.time, "perf_counter", lambda: next(now))
    seconds: list[float] = []
    model = torch.nn.Linear(1, 1)
    idle: set[str] = set()
    task = SimpleNamespace(sampler=SimpleNamespace(steps=50))
    watch = dry_runs._watch(task, model, idle, seconds)
    watch.on_fit_start()
    assert task.sampler.steps == 2
    watch.on_train_start()  # at 10.0
    watch.on_train_batch_end()  # at 11.0, next from 11.5
    watch.on_validation_end()  # next from 20.0
    watch.on_train_batch_end()  # at 22.0
    assert seconds == [1.0, 2.0]
    watch.on_after_backward()
    assert idle == {"weight", "bias"}
    dry_runs._watch(SimpleNamespace(), model, idle, seconds).on_fit_start()  # a task without sampler


def test_callbacks_are_built_except_for_disabled_ones():
    target = "lightning.pytorch.callbacks.LearningRateMonitor"
    config = OmegaConf.create(
        {"callbacks": {"rate": {"_target_": target}, "media": None, "other": {"_target_": target}}}
    )
    findings = Findings()
    dry_runs._build_callbacks(config, findings)
    assert findings.all == [("callbacks", "rate, other", "", True)]
    dry_runs._build_callbacks(OmegaConf.create({"callbacks": {"media": None}}), findings)
    assert findings.all[1][1] == "none"
    config.callbacks.rate._target_ = "lightning.pytorch.callbacks.Timer"
    config.callbacks.rate.duration = "never"
    with pytest.raises(Exception, match=r"callbacks\.rate|never"):
        dry_runs._build_callbacks(config, findings)


class Fitted:
    """The parts of a trainer that train: four steps of 1, 2, 3 and 4 s."""

    def __init__(self, loss: float) -> None:
        self.callbacks: list[Any] = ["other"]
        self.callback_metrics = {"train/loss": torch.tensor(loss)}

    def fit(self, task: torch.nn.Module, datamodule: Any) -> None:
        watch = self.callbacks[0]
        watch.on_fit_start()
        watch.on_train_start()
        for _ in range(4):
            watch.on_after_backward()
            watch.on_train_batch_end()


@pytest.mark.parametrize("key", ["video", "moments"])
@pytest.mark.parametrize(("loss", "is_finite"), [(0.123456, True), (float("nan"), False)])
def test_steps_of_the_dry_run(key: str, loss: float, is_finite: bool, monkeypatch: pytest.MonkeyPatch):
    now = iter([0.0, 1.0, 1.0, 3.0, 3.0, 6.0, 6.0, 10.0, 10.0])
    monkeypatch.setattr(dry_runs.time, "perf_counter", lambda: next(now))
    batch = {key: torch.zeros(2, 4, 3, 8, 6), **({"video": torch.zeros(1)} if key == "moments" else {})}
    data = SimpleNamespace(train=range(7), val=range(5), val_dataloader=lambda: [batch, None])
    model = torch.nn.ModuleDict({"idle": torch.nn.Linear(1, 1)})
    findings, trainer = Findings(), Fitted(loss)
    assert dry_runs._fit(data, model, torch.nn.Module(), trainer, findings) == 2.5
    assert trainer.callbacks[1] == "other"
    (first, second, third) = findings.all
    assert first == ("data", "7 training and 5 validation clips, video (2, 4, 3, 8, 6) torch.float32", "", True)
    assert second[:2] == ("step", f"train/loss {loss:.4g} after 4 steps")
    assert (second[2] == "") == is_finite
    assert third[:2] == ("gradients", "2 parameters without gradient: model.idle.bias, …")
    assert (third[3], "ddp_find_unused_parameters_true" in third[2]) == (False, True)
