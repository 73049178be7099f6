"""Memory estimate: units, shards, and the limit of a device."""

from types import SimpleNamespace

import pytest
import torch
from omegaconf import OmegaConf

from blueberry_video.launch import machine, memory

GIB = 2**30
FSDP = {"_target_": "blueberry_video.parallel.strategy.FullyShardedStrategy"}


@pytest.mark.parametrize(
    ("trainer", "tasks", "shards"),
    [
        ({"devices": 4}, None, 1),
        ({"devices": 4, "strategy": None}, None, 1),
        ({"devices": 4, "strategy": "ddp", "num_nodes": 2}, "8", 1),
        ({"devices": 4, "strategy": "fsdp"}, None, 4),
        ({"devices": 4, "strategy": "FSDP", "num_nodes": 3}, None, 12),
        ({"devices": [0, 2], "strategy": FSDP, "num_nodes": 3}, None, 6),
        ({"devices": 4, "strategy": FSDP}, "16", 16),
        ({"devices": 4, "strategy": FSDP, "num_nodes": 3}, "1", 12),
        ({"devices": 4, "strategy": {}}, "16", 1),
    ],
)
def test_number_of_shards(trainer: dict, tasks: str | None, shards: int, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delenv("SLURM_NTASKS", raising=False)
    if tasks:
        monkeypatch.setenv("SLURM_NTASKS", tasks)
    assert memory.num_shards(trainer) == shards


@pytest.mark.parametrize(
    ("precision", "width"), [("bf16-true", 2), ("16-true", 2), ("32-true", 4), (None, 4), ("bf16-mixed", 4)]
)
@pytest.mark.parametrize("ema", [False, True])
def test_bytes_of_a_partly_frozen_model(precision: str | None, width: int, ema: bool):
    model = torch.nn.Sequential(torch.nn.Linear(3, 5, bias=False), torch.nn.Linear(7, 11, bias=False))  # 15 and 77
    model[0].requires_grad_(False)
    trainer = {"precision": precision} if precision else {}
    config = OmegaConf.create({"trainer": trainer, "callbacks": {"ema": {"decay": 0.9} if ema else None}})
    expected = {"weights": 92 * width, "gradients": 77 * width, "AdamW": 2 * 77 * width}
    assert memory.of_model(config, model) == (expected | {"average": 92 * width} if ema else expected)


def test_estimate_is_described_per_device():
    parts = {"weights": 6 * GIB, "AdamW": GIB // 2}
    assert memory.describe(parts, 1) == (
        "6.5 GiB per device, plus activations and frozen encoders: weights 6.0 GiB + AdamW 0.5 GiB"
    )
    assert memory.describe(parts, 8) == (
        "0.8 GiB per device, in 8 shards, plus activations and frozen encoders: weights 0.8 GiB + AdamW 64.0 MiB"
    )


@pytest.mark.parametrize(("size", "text"), [(GIB / 10, "0.1 GiB"), (GIB / 10 - 1, "102.4 MiB"), (3 * 2**20, "3.0 MiB")])
def test_units(size: float, text: str):
    assert memory._bytes(size) == text


def config_of(**trainer: str):
    return OmegaConf.create({"trainer": trainer})


def test_shortage_compares_the_share_of_a_device_with_its_memory(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    monkeypatch.setattr(memory, "available_memory", lambda: 4 * GIB)
    parts = {"weights": 6 * GIB, "gradients": 3 * GIB}
    assert memory.shortage(config_of(), parts, 3) == ""
    message = memory.shortage(config_of(), parts, 2)
    assert "needs 4.5 GiB per device, and 4.0 GiB are available" in message
    assert "trainer=fsdp" in message
    assert memory.shortage(config_of(), {"weights": 4 * GIB}, 1) != "", "equal is too little"
    monkeypatch.setattr(memory, "available_memory", lambda: None)
    assert memory.shortage(config_of(), parts, 1) == "", "unknown"


def test_shortage_on_a_gpu_reads_the_memory_of_the_gpu_in_total(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.mem_get_info", lambda: (1 * GIB, 8 * GIB))
    monkeypatch.setattr(memory, "available_memory", lambda: 2 * GIB)
    parts = {"weights": 5 * GIB}
    for trainer in ({}, {"accelerator": "auto"}, {"accelerator": "gpu"}):
        assert memory.shortage(config_of(**trainer), parts, 1) == "", trainer
    assert "2.0 GiB are available" in memory.shortage(config_of(accelerator="cpu"), parts, 1)


def test_rank_and_small_model_print_no_estimate(monkeypatch: pytest.MonkeyPatch, capsys, tmp_path):
    monkeypatch.setattr(memory, "estimate", lambda config: ({"weights": GIB}, 1))
    monkeypatch.setattr(memory, "shortage", lambda *_: "")
    small, large = OmegaConf.create({"model": {}}), OmegaConf.create({"model": {"transformer": {"depth": 1}}})
    memory.announce(small)
    assert capsys.readouterr().out == ""
    memory.announce(large)
    assert capsys.readouterr().out.startswith("memory: 1.0 GiB per device")
    monkeypatch.setenv(memory.processes.FOLDER_VARIABLE, str(tmp_path))
    memory.announce(large)
    assert capsys.readouterr().out == ""


def test_available_memory_is_in_bytes(monkeypatch: pytest.MonkeyPatch):
    text = "MemTotal:       9000 kB\nMemFree:        1000 kB\nMemAvailable:   3000 kB\n"
    file = SimpleNamespace(is_file=lambda: True, read_text=lambda: text)
    monkeypatch.setattr(machine, "Path", lambda path: file)
    assert machine.available_memory() == 3000 * 1024
    file.is_file = lambda: False
    assert machine.available_memory() is None


@pytest.mark.parametrize(
    ("environment", "mode", "has_key", "expected"),
    [
        ({}, "auto", True, "online"),
        ({}, "auto", False, "offline"),
        ({}, "online", False, "online"),
        ({"WANDB_MODE": "run"}, "auto", False, "online"),
        ({"WANDB_MODE": "dryrun"}, "auto", True, "offline"),
        ({"WANDB_MODE": " disabled "}, "auto", True, "disabled"),
        ({"WANDB_MODE": "online", "WANDB_DISABLED": "Yes"}, "auto", True, "disabled"),
        ({"WANDB_MODE": "online", "WANDB_DISABLED": "0"}, "auto", False, "online"),
        ({"WANDB_DISABLED": "on"}, "offline", True, "offline"),
        ({"WANDB_MODE": "other"}, "offline", True, None),
        ({"WANDB_MODE": "  "}, "auto", True, "online"),
    ],
)
def test_mode_of_wandb(environment: dict, mode: str, has_key: bool, expected: str | None, monkeypatch):
    for name in ("WANDB_MODE", "WANDB_DISABLED"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert machine.wandb_mode(mode, has_key) == expected
