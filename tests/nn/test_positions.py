"""The position table against its formula."""

import math

import torch

from blueberry_video.nn.positions import sinusoid_table


def test_sinusoid_is_interleaved():
    table = sinusoid_table(1568, 6)
    assert table.shape == (1568, 6)
    assert table.dtype == torch.float32
    for position in (0, 1, 7, 1567):
        for channel in range(6):
            angle = position / 10000 ** (2 * (channel // 2) / 6)
            expected = math.cos(angle) if channel % 2 else math.sin(angle)
            assert abs(table[position, channel].item() - expected) < 1e-6
