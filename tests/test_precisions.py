"""Every kind of task trains three steps, validates and evaluates its end in every precision."""

import math
from pathlib import Path

import pytest

from blueberry_video import train
from blueberry_video.config import compose
from blueberry_video.experiment.run_folder import RunFolder

EXPERIMENTS = Path(__file__).parents[1] / "experiments"
COMMON = ["logger=csv", "data.num_workers=0", "data.batch_size=2", "trainer.max_steps=3", "trainer.log_every_n_steps=1"]
COMMON += ["trainer.check_val_every_n_epoch=null", "trainer.val_check_interval=3", "callbacks.media.every_n_steps=2"]
SPRITES = ["data.train.size=8", "data.val.size=4"]
SHAPES = ["data.train.size=24", "data.val.size=4", "task.num_pictures=1", "task.sampler.steps=2"]
PROBE = [f"callbacks.probe.{value}" for value in ("train_clips=8", "val_clips=4", "steps=2", "batch_size=4")]
FEW = [f"callbacks.few_labels.{v}" for v in ("num_labelled=4", "val_clips=4", "steps=2", "batch_size=4", "lrs=[0.001]")]
NO_PROBE = ["callbacks.probe_linear=null"]
RUNS = {
    "videomae": [*SPRITES, "model.encoder.depth=1", *PROBE, *FEW, *NO_PROBE],
    "vjepa2": [*SPRITES, *PROBE],
    "probe": SPRITES,
    "spool_stream": SPRITES,
    "anticipation": SPRITES,
    "video_vae": SPRITES,
    "world_model": ["data.train.dataset.size=8", "data.val.dataset.size=4", "callbacks.closed_loop.episodes=2"],
    "cogvideox": [*SHAPES, "callbacks.sampling=null", "model.transformer.depth=1"],
    "hunyuan": [*SHAPES, "callbacks.sampling=null"],
}


@pytest.mark.parametrize("precision", ["bf16-mixed", "bf16-true", "64-true"])
@pytest.mark.parametrize("name", RUNS)
def test_trains_and_evaluates(name: str, precision: str, tmp_path: Path):
    overrides = [*COMMON, *RUNS[name], f"output_dir={tmp_path}", f"trainer.precision={precision}"]
    config = compose(EXPERIMENTS / name / "config.yaml", overrides)
    with RunFolder.create(config, config.output_dir) as folder:
        train.fit(config, folder)
    assert math.isfinite(folder.metric("val/loss"))
