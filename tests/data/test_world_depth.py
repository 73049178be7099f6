"""Data for depth: the clips of conf/data/world_depth.yaml keep depth, cameras and poses in the cache."""

from pathlib import Path

import pytest
import torch
from hydra.utils import instantiate
from omegaconf import OmegaConf

from blueberry_video.data.datamodule import DataModule
from blueberry_video.evaluation.depth_metrics import temporal_alignment_error

CONF = Path(__file__).parents[2] / "conf" / "data" / "world_depth.yaml"


def data(folder: Path, num_frames: int) -> DataModule:
    encoder = {"image_size": 28, "num_frames": num_frames}
    config = OmegaConf.create({"data": OmegaConf.load(CONF), "seed": 0, "model": {"encoder": encoder}})
    for split in ("train", "val"):
        config.data[split].folder = str(folder)
        config.data[split].dataset.size = 8
    config.data.train.dataset.supersample, config.data.batch_size = 1, 4
    return instantiate(config.data)


@pytest.mark.parametrize("num_frames", [2, 5])
def test_the_cache_keeps_depth_and_cameras(tmp_path: Path, num_frames: int):
    module = data(tmp_path, num_frames)
    for _ in range(2):  # written, then read from the files
        for dataset in (module.train, module.val):
            for index in (0, 7):
                cached, clip = dataset[index], dataset.dataset[index]
                assert {"depth", "intrinsics", "poses", "seg"} <= set(cached)
                for key in ("video", "depth", "intrinsics", "poses", "seg"):
                    assert cached[key].dtype == clip[key].dtype
                    torch.testing.assert_close(cached[key], clip[key], rtol=0, atol=0)
        module = data(tmp_path, num_frames)
    batch = next(iter(module.val_dataloader()))
    assert batch["depth"].shape == (4, num_frames, 28, 28)
    assert (batch["depth"] > 0).float().mean() > 0.5
    found = temporal_alignment_error(batch["depth"], batch["depth"], batch["intrinsics"], batch["poses"], 0.05)
    assert (found < 2).all()


def test_clips_draw_their_camera_from_four(tmp_path: Path):
    module = data(tmp_path, 2)
    cameras = {module.train.dataset.classes["camera"][clip["labels"]["camera"]] for clip in module.train}
    assert cameras <= {"static", "orbit", "pan", "dolly"}
    assert len(cameras) > 2
