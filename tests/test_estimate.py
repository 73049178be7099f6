"""Estimated memory and FLOPs against real training steps and counts by hand."""

import sys
from pathlib import Path

import pytest
import torch
from hydra.utils import instantiate
from torch import nn
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

from blueberry_video import estimate
from blueberry_video.callbacks import PEAK_FLOPS
from blueberry_video.config import compose
from blueberry_video.launch import fitting
from blueberry_video.launch.trace import MemoryCounter, trace

ROOT = Path(__file__).resolve().parents[1]


class Blocks(nn.Module):
    def __init__(self, checkpointing: bool):
        super().__init__()
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(32, 128), nn.GELU(), nn.Linear(128, 32)) for _ in range(6))
        self.checkpointing = checkpointing

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for block in self.blocks:
            x = x + (checkpoint(block, x, use_reentrant=False) if self.checkpointing else block(x))
        return x.square().mean()


@pytest.mark.parametrize("checkpointing", [False, True])
def test_traced_peak_equals_that_of_a_real_step(checkpointing: bool):
    model, x = Blocks(checkpointing), torch.randn(1024, 32)
    optimizer = torch.optim.AdamW(model.parameters())
    counter = MemoryCounter()
    counter.collects = True
    with counter, FlopCounterMode(display=False) as flops:
        counter.add(x)
        for parameter in model.parameters():
            counter.add(parameter)
        for _ in range(2):
            model(x).backward()
            before = flops.get_total_flops() if not optimizer.state else before  # noqa: F821
            optimizer.step()
            optimizer.zero_grad()
    with torch.device("meta"):
        fake = Blocks(checkpointing)
    found = trace(fake, lambda batch: fake(batch["x"]), lambda: torch.optim.AdamW(fake.parameters()), {"x": x})
    assert found.flops == before
    assert found.peak == pytest.approx(counter.peak, rel=0.02)
    weights = sum(parameter.numel() for parameter in model.parameters()) * 4
    assert found.state["weights"] == found.state["gradients"] == weights
    assert found.state["AdamW"] == pytest.approx(2 * weights, rel=0.01)  # and the steps


def test_attention_is_traced_without_its_matrix():
    class Attention(nn.Linear):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return nn.functional.scaled_dot_product_attention(*super().forward(x).view(1, 1, 4096, 3, 8).unbind(3))

    with torch.device("meta"):
        model = Attention(8, 24)
    x = torch.zeros(4096, 8)
    found = trace(model, lambda b: model(b["x"]).sum(), lambda: torch.optim.SGD(model.parameters(), 0.1), {"x": x})
    assert found.peak < 4096 * 4096 * 4 / 10
    products = 2 * 4096 * 8 * 24 * 2 + 2 * 4096 * 4096 * 8 * (2 + 5)  # of attention: 2 forward, 5 backward
    assert found.flops == products


def test_precision_halves_the_state(tmp_path: Path):
    config = compose(ROOT / "experiments/template/config.yaml", [])
    full = estimate.estimate(config)[0]
    half = estimate.estimate(compose(ROOT / "experiments/template/config.yaml", ["trainer.precision=bf16-true"]))[0]
    model = instantiate(config.model)
    assert full.state["weights"] >= 4 * sum(parameter.numel() for parameter in model.parameters())
    assert half.state["gradients"] * 2 == full.state["gradients"]


def test_missing_data_are_replaced_by_blank_clips(capsys, monkeypatch):
    arguments = [
        "estimate",
        "--config-dir",
        str(ROOT / "experiments/videomae_k400"),
        "--gpus",
        "8",
        "data.batch_size=1",
    ]
    monkeypatch.setattr(sys, "argv", [*arguments, "model.encoder.depth=2"])
    estimate.main()
    printed = capsys.readouterr().out
    assert "data/kinetics400" in printed
    assert "DDP buckets" in printed
    assert "8 x H100" in printed


def test_too_large_model_names_what_would_fit(capsys, monkeypatch):
    arguments = ["estimate", "--config-dir", str(ROOT / "experiments/template"), "--device", "RTX 4090", "--gpus", "4"]
    monkeypatch.setattr(sys, "argv", [*arguments, "data.batch_size=64"])
    monkeypatch.setitem(fitting.MEMORY, "RTX 4090", 0.95 * 2**30)
    estimate.main()
    printed = capsys.readouterr().out
    assert "does not fit" in printed
    assert "data.batch_size=" in printed.split("to make it fit")[1]


@pytest.mark.parametrize("arguments", [["--gpus", "0"], ["--mfu", "0"], ["--mfu", "1.5"]])
def test_invalid_options_raise(arguments: list[str], monkeypatch):
    monkeypatch.setattr(sys, "argv", ["estimate", "--config-dir", str(ROOT / "experiments/template"), *arguments])
    with pytest.raises(ValueError, match=rf"{arguments[0]} {arguments[1]}"):
        estimate.main()


def test_devices_have_peak_rates():
    assert fitting.MEMORY.keys() == PEAK_FLOPS.keys()
