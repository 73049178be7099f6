"""Draws docs/images/sources.png: clips of the two built-in data sources, one row per clip, every other frame.

python docs/images/sources.py
"""

from pathlib import Path

import torch
from PIL import Image
from torch.utils.data import Dataset

from blueberry_video.data.sprites import Sprites
from blueberry_video.data.world import World

SIDE = 96


def rows(dataset: Dataset, indices: list[int]) -> list[torch.Tensor]:
    """Returns one uint8 strip (3, SIDE, 8 SIDE) per clip, its frames concatenated along the width."""
    strips = []
    for index in indices:
        frames = dataset[index]["video"][::2]
        frames = torch.nn.functional.interpolate(frames, size=(SIDE, SIDE), mode="nearest")
        strips.append(torch.cat(list(frames), dim=2))
    return strips


if __name__ == "__main__":
    sources = [
        (Sprites("val", 100), [0, 3]),
        (Sprites("val", 100, background="texture", distractors=1), [5]),
        (World("val", 100, image_size=96, supersample=2), [0, 1, 5]),
    ]
    picture = torch.cat([strip for dataset, indices in sources for strip in rows(dataset, indices)], dim=1)
    Image.fromarray(picture.permute(1, 2, 0).numpy()).save(Path(__file__).with_name("sources.png"))
