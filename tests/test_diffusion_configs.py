"""Errors in text-to-video configs, and the memory estimate of `make check`."""

import re
from pathlib import Path

import pytest

from blueberry_video.config import compose
from blueberry_video.launch import memory

EXPERIMENTS = Path(__file__).resolve().parents[1] / "experiments"


def composed(name: str, *overrides: str):
    return compose(EXPERIMENTS / name / "config.yaml", list(overrides))


@pytest.mark.parametrize("name", ["hunyuan", "cogvideox"])
@pytest.mark.parametrize("precision", ["16-mixed", "16-true", "16"])
def test_float16_raises_for_models_that_overflow(name: str, precision: str):
    with pytest.raises(ValueError, match=r"`trainer\.precision` = 16.*`trainer\.precision=bf16-mixed`"):
        composed(name, f"trainer.precision={precision}")
    assert composed(name, "trainer.precision=bf16-mixed").trainer.precision == "bf16-mixed"


def test_float16_raises_in_a_plugin():
    plugin = "{_target_: lightning.pytorch.plugins.MixedPrecision, precision: 16-mixed, device: cpu}"
    with pytest.raises(
        ValueError, match=r"`trainer\.plugins\.0\.precision` = 16-mixed.*`trainer\.plugins\.0\.precision=bf16-mixed`"
    ):
        composed("hunyuan", "trainer.precision=null", f"trainer.plugins=[{plugin}]")


def test_float16_is_valid_for_cogvideox_2b():
    assert composed("cogvideox_lora", "trainer.precision=16-mixed").model.transformer.positions == "sincos"


def test_part_of_a_model_is_chosen_by_the_suggested_name():
    for wrong in ("model/autoencoder@model.autoencoder=video_vae", "model/autoencoder=video_vaes"):
        with pytest.raises(ValueError, match=r"`model/autoencoder\S*=video_vaes?`.*`model/autoencoder=video_vae`"):
            composed("cogvideox", wrong)
    chosen = composed("cogvideox", "model/autoencoder=video_vae", "model.autoencoder.weights=outputs/video_vae/x.ckpt")
    assert chosen.model.autoencoder.time_stride == 4


def test_invalid_number_of_frames_suggests_the_nearest_valid_ones():
    with pytest.raises(
        ValueError, match=r"`data\.train\.num_frames` = 48 .*`model\.autoencoder\.frame_step` = 8.*=41`.*=49`"
    ):
        composed("cogvideox_lora", "data.train.num_frames=48")
    assert composed("cogvideox_lora", "data.train.num_frames=17").data.val.num_frames == 17


def test_training_memory_depends_on_the_precision():
    """CogVideoX-2B has 1.694e9 parameters: 27 GB in float32 with AdamW and no EMA, 3.4 GB of weights in bfloat16."""
    full = memory.of_training(1_694_000_000, 1_694_000_000, "bf16-mixed", ema=True)
    assert {name: round(size / 1e9, 1) for name, size in full.items()} == {
        "weights": 6.8,
        "gradients": 6.8,
        "AdamW": 13.6,
        "average": 6.8,
    }
    lora = memory.of_training(1_694_000_000, 10_000_000, "bf16-true", ema=False)
    assert {name: round(size / 1e9, 2) for name, size in lora.items()} == {
        "weights": 3.39,
        "gradients": 0.02,
        "AdamW": 0.04,
    }


def test_memory_is_printed_and_checked_before_a_model_is_built(monkeypatch, capsys):
    config = composed("hunyuan_finetune")  # 12.811B parameters in shards
    monkeypatch.setattr(memory.processes, "count", lambda trainer: 8)
    parts, shards = memory.estimate(config)
    assert shards == 8
    assert parts["weights"] == pytest.approx(4 * 12.811e9, rel=1e-4)
    assert parts["AdamW"] == 2 * parts["gradients"] == 2 * parts["weights"]
    assert "8 shards" in memory.describe(parts, shards)
    monkeypatch.setattr(memory, "available_memory", lambda: 10 * 2**30)
    with pytest.raises(ValueError, match=r"\d GiB\b.*\b10\.0 GiB.*`trainer=fsdp`"):
        memory.announce(config)
    assert "GiB" in capsys.readouterr().out
    memory.announce(composed("hunyuan"))
    assert re.search(r"\d MiB\b", capsys.readouterr().out)
