import pytest
import torch
from torch.utils.data import Dataset

from blueberry_video.models.vit import VisionTransformer


class Ramps(Dataset):
    """Clips that brighten (motion 0) or darken (motion 1), reversals of each other; each frame shows the ``level``."""

    classes = {"motion": ("up", "down"), "level": ("dark", "light")}  # noqa: RUF012
    reversal_pairs = {"motion": ((0, 1),)}  # noqa: RUF012

    def __len__(self):
        return 96

    def __getitem__(self, index):
        generator = torch.Generator().manual_seed(index)
        motion, level = index % 2, (index // 2) % 2
        ramp = torch.linspace(0, 60, 4) if motion == 0 else torch.linspace(60, 0, 4)
        noise = torch.rand(4, 3, 8, 8, generator=generator) * 20
        video = (20 + 120 * level + ramp[:, None, None, None] + noise).byte()
        return {"video": video, "labels": {"motion": motion, "level": level}, "id": f"ramp-{index}"}


@pytest.fixture(scope="session")
def ramps():
    return Ramps()


@pytest.fixture
def encoder():
    torch.manual_seed(0)
    return VisionTransformer(
        image_size=8, num_frames=4, patch_size=4, tubelet_size=2, embed_dim=24, depth=1, num_heads=2
    )
