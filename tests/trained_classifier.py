"""A classifier that is trained for two steps on a folder of dark and bright videos."""

from pathlib import Path

import numpy as np
import torch

from blueberry_video import train
from blueberry_video.config import compose
from blueberry_video.data.write import write_video
from blueberry_video.experiment.run_folder import RunFolder

CONFIG = """
defaults:
  - train
  - override model: classifier/tiny
  - override task: classification
  - override data: video_folder
  - _self_
name: lights
model:
  encoder: {num_frames: 4, image_size: 16, patch_size: 8, embed_dim: 16, depth: 1, num_heads: 2}
data: {batch_size: 2, num_workers: 0, train: {root: ROOT}}
trainer: {max_steps: 2}
"""
QUIET = ["logger=csv", "callbacks.progress=null", "callbacks.media=null"]


def trained(folder: Path, *overrides: str) -> Path:
    """Trains a classifier for two steps on a folder of dark and bright videos; returns the run folder."""
    rng = np.random.default_rng(0)
    for split in ("train", "val"):
        for number, name in enumerate(("bright", "dark") * 2):
            file = folder / "videos" / split / name / f"{number}.mp4"
            file.parent.mkdir(parents=True, exist_ok=True)
            level = 180 if name == "bright" else 20
            write_video(file, rng.integers(level, level + 60, (20, 24, 40, 3), dtype=np.uint8), 10.0)
    file = folder / "lights" / "config.yaml"
    file.parent.mkdir(parents=True)
    file.write_text(CONFIG.replace("ROOT", str(folder / "videos")))
    config = compose(file, [*QUIET, f"output_dir={folder / 'outputs'}", *overrides])
    train.run(config)
    torch.use_deterministic_algorithms(False)
    return RunFolder.open(folder / "outputs" / "lights").path
