"""Fine-tuning with LoRA adapters: trained and saved weights, EMA and resuming."""

from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import torch

from blueberry_video.callbacks import EMA, StepSeed
from blueberry_video.data.datamodule import DataModule
from blueberry_video.data.moving_shapes import MovingShapes
from blueberry_video.diffusion.guidance import NoGuidance
from blueberry_video.diffusion.lora import LoRA
from blueberry_video.diffusion.objectives import FlowMatching
from blueberry_video.diffusion.samplers import DDIM
from blueberry_video.diffusion.text_to_video import TextToVideo
from blueberry_video.diffusion.timesteps import UniformTimesteps
from blueberry_video.models.autoencoder.base import Pixels
from blueberry_video.models.cogvideox.model import CogVideoX
from blueberry_video.models.text_encoder.words import WordText
from blueberry_video.optim import constant
from blueberry_video.tasks.diffusion import Diffusion
from blueberry_video.tasks.settings import Optimization

SIZES = {"num_heads": 2, "head_dim": 16, "depth": 1, "in_channels": 3, "out_channels": 3, "text_dim": 8, "text_len": 8}
SIZES |= {"time_dim": 16, "patch_size": 8, "num_frames": 8, "height": 16, "width": 16, "positions": "sincos"}


def network(seed: int, lora: LoRA | None = None) -> TextToVideo:
    torch.manual_seed(seed)
    return TextToVideo(CogVideoX(**SIZES, zero_init=False), WordText(8, 8), Pixels(), lora)


@pytest.fixture
def published(tmp_path: Path) -> Path:
    network(7).save_published(tmp_path / "base")
    return tmp_path / "base"


@pytest.fixture
def fit(published: Path, tmp_path: Path, trainer) -> Callable[..., tuple[TextToVideo, EMA, Path]]:
    def run(steps: int, resume: Path | None = None) -> tuple[TextToVideo, EMA, Path]:
        model = network(steps, LoRA(base=str(published), rank=2, targets=["to_q", "to_v"]))
        optimization = Optimization(partial(torch.optim.AdamW, lr=0.01), constant)
        task = Diffusion(model, optimization, FlowMatching(), UniformTimesteps(), DDIM(2), NoGuidance())
        ema = EMA(decay=0.5, warmup=False)
        fitted = trainer(StepSeed(0), ema, max_steps=steps, limit_val_batches=1)
        clips = DataModule(MovingShapes("train", 1, 12), MovingShapes("val", 1, 12), 4)
        fitted.fit(task, datamodule=clips, ckpt_path=resume, weights_only=False)
        fitted.save_checkpoint(tmp_path / f"{steps}.ckpt")
        return model, ema, tmp_path / f"{steps}.ckpt"

    return run


def test_only_adapters_are_trained_and_saved(fit):
    model, _, file = fit(2)
    state = torch.load(file, weights_only=False)["state_dict"]
    names = {name for name in state if name.startswith("model.transformer.")}
    assert names
    assert all(".lora_" in name for name in names)
    expected = network(7).transformer.state_dict()
    for name, value in model.transformer.named_parameters():
        if ".lora_" not in name:
            torch.testing.assert_close(value, expected[name.replace(".base_layer", "")], rtol=0, atol=0)
    assert any(value.abs().sum() > 0 for name, value in state.items() if ".lora_B." in name)


def test_frozen_weights_are_unchanged_in_a_resumed_run_and_its_ema(fit):
    _, _, file = fit(2)
    model, ema, _ = fit(4, resume=file)
    expected = network(7).transformer.state_dict()
    for twin in (model.transformer, ema._average_model.module.model.transformer):
        for name, value in twin.named_parameters():
            if ".lora_" not in name:
                torch.testing.assert_close(value, expected[name.replace(".base_layer", "")], rtol=0, atol=0)
