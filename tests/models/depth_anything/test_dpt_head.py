"""DPT head: published sizes, temporal modules and bad sizes; its values are compared in test_depth_anything.py."""

import pytest
import torch

from blueberry_video.models.depth_anything.dpt import DPTHead

DIM, CHANNELS, FEATURES = 12, (4, 6, 8, 10), 8


def test_temporal_modules_receive_the_coarse_maps():
    head, seen = DPTHead(DIM, FEATURES, CHANNELS), []
    layers = [torch.randn(2, 6, DIM) for _ in range(4)]

    def module(x: torch.Tensor) -> torch.Tensor:
        seen.append(tuple(x.shape))
        return x

    found = head(layers, (2, 3), [module] * 4)
    assert seen == [(2, 8, 2, 3), (2, 10, 1, 2), (2, FEATURES, 2, 3), (2, FEATURES, 4, 6)]
    assert torch.equal(found, head(layers, (2, 3)))


def test_numbers_of_parameters_are_those_of_the_published_sizes():
    """Totals of V2 less those of DINOv2: 24.79 M - 22.06 M, 97.47 M - 86.58 M, 335.32 M - 304.37 M."""
    sizes = {
        (384, 64, (48, 96, 192, 384)): 2.73,
        (768, 128, (96, 192, 384, 768)): 10.89,
        (1024, 256, (256, 512, 1024, 1024)): 30.95,
    }
    for (dim, features, channels), millions in sizes.items():
        with torch.device("meta"):
            head = DPTHead(dim, features, channels)
        assert sum(p.numel() for p in head.parameters()) / 1e6 == pytest.approx(millions, abs=0.01)


def test_bad_sizes_raise():
    with pytest.raises(ValueError, match=r"out_channels=\[4, 6, 8\]"):
        DPTHead(DIM, FEATURES, (4, 6, 8))
    with pytest.raises(ValueError, match=r"features=7"):
        DPTHead(DIM, 7, CHANNELS)
    with pytest.raises(ValueError, match=r"max_depth=0"):
        DPTHead(DIM, FEATURES, CHANNELS, max_depth=0)
    with pytest.raises(ValueError, match=r"\(2, 6, 12\).*\(3, 3\)"):
        DPTHead(DIM, FEATURES, CHANNELS)([torch.randn(2, 6, DIM)] * 4, (3, 3))
