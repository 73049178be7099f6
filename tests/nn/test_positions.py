"""Position tables: parity with their formulas."""

import math

import pytest
import torch
from torch.nn.functional import interpolate

from blueberry_video.nn.positions import resize_table, sincos_3d_table, sinusoid, sinusoid_table


def test_sinusoid_is_interleaved():
    table = sinusoid_table(1568, 6)
    assert table.shape == (1568, 6)
    assert table.dtype == torch.float32
    for position in (0, 1, 7, 1567):
        for channel in range(6):
            angle = position / 10000 ** (2 * (channel // 2) / 6)
            expected = math.cos(angle) if channel % 2 else math.sin(angle)
            assert abs(table[position, channel].item() - expected) < 1e-6


def test_sinusoid_accepts_any_positions():
    rows = sinusoid(torch.tensor([7, 3, 900]), 6)
    assert rows.dtype == torch.float64
    assert torch.equal(rows.float(), sinusoid_table(901, 6)[[7, 3, 900]])
    assert sinusoid(torch.tensor([0.5]), 6)[0, :2].tolist() == pytest.approx([math.sin(0.5), math.cos(0.5)], abs=1e-15)


@pytest.mark.parametrize("dim", [6, 16, 384, 1024])  # 384 is divisible by 6; the other tables are truncated
def test_sincos_3d_is_sine_then_cosine_of_time_row_and_column(dim):
    t, h, w = 3, 2, 4
    table = sincos_3d_table((t, h, w), dim)
    assert table.shape == (t * h * w, dim)
    assert table.dtype == torch.float32
    half = math.ceil(dim / 6)
    for token in range(t * h * w):
        positions = (token // (h * w), token // w % h, token % w)
        row = []
        for position in positions:
            angles = [position / 10000 ** (i / half) for i in range(half)]
            row += [math.sin(angle) for angle in angles] + [math.cos(angle) for angle in angles]
        torch.testing.assert_close(table[token], torch.tensor(row[:dim]), atol=1e-6, rtol=0)


def test_resize_table_interpolates_trilinearly():
    grid, table = (2, 3, 3), torch.randn(18, 5)
    assert resize_table(table, grid, grid) is table
    larger = resize_table(table, grid, (4, 6, 3))
    expected = interpolate(
        table.reshape(1, *grid, 5).permute(0, 4, 1, 2, 3), scale_factor=(2.0, 2.0, 1.0), mode="trilinear"
    )
    torch.testing.assert_close(larger, expected.permute(0, 2, 3, 4, 1).reshape(-1, 5))
    steady = torch.ones(18, 5) * torch.arange(5.0)
    torch.testing.assert_close(resize_table(steady, grid, (1, 2, 5)), steady[:10])
