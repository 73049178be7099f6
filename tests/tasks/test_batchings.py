"""Validation metrics of every task are those of the set: they do not depend on the batch size."""

from pathlib import Path

import lightning
import pytest
import torch

from blueberry_video import train
from blueberry_video.config import compose
from blueberry_video.data.datamodule import DataModule
from blueberry_video.experiment.run_folder import RunFolder

pytestmark = pytest.mark.filterwarnings("ignore")

EXPERIMENTS = Path(__file__).parents[2] / "experiments"
SIZE = ["data.val.size=3"]
SETS = {
    "template": SIZE,
    "videomae_v2": SIZE,  # clips with different numbers of scored tokens
    "vjepa2": SIZE,
    "vjepa2_sigreg": SIZE,
    "hydra_video": SIZE,
    "omnimae": ["data.val.parts.clip.size=3"],
    "probe": SIZE,
    "spool_stream": SIZE,
    "anticipation": SIZE,
    "video_vae": SIZE,
    "world_model": ["data.val.dataset.size=3", "data.train.dataset.size=2"],
    "cogvideox": SIZE,
    "cogvideox_i2v": SIZE,
    "hunyuan": SIZE,
    "diffusion_forcing": SIZE,
}


@pytest.mark.parametrize("name", SETS)
def test_validation_metrics_do_not_depend_on_batches(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    config = compose(EXPERIMENTS / name / "config.yaml", [*SETS[name], "logger=csv", f"output_dir={tmp_path}"])
    monkeypatch.chdir(tmp_path)  # the folder of caches
    config.callbacks = {}
    with RunFolder.create(config, config.output_dir) as folder:
        data, _, task, _ = train.build(config, folder)
    generator = torch.Generator().manual_seed(1)
    for weight in task.parameters():  # outputs that are initialized to zero hide what they depend on
        weight.data.add_(0.2 * weight.std(correction=0).clamp(min=0.1) * torch.randn(weight.shape, generator=generator))
    found = {}
    for batch_size in (3, 1, 2):
        trainer = lightning.Trainer(
            accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False,
            use_distributed_sampler=False,
        )  # fmt: skip
        torch.manual_seed(batch_size)
        sets = DataModule(data.train, data.val, batch_size=1, val_batch_size=batch_size)
        trainer.validate(task, datamodule=sets, verbose=False)
        found[batch_size] = {key: value.item() for key, value in trainer.callback_metrics.items()}
    whole = found.pop(3)
    assert len(whole) > 1
    for batch_size, metrics in found.items():
        assert metrics == pytest.approx(whole, rel=1e-4, abs=1e-6), batch_size
