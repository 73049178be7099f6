"""Timestep embedding: sinusoid against its formula, and MLP."""

import math

import pytest
import torch
import torch.nn.functional as F

from blueberry_video.nn.timestep_embedding import TimestepMLP, sinusoidal


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.int64])
def test_cosines_come_before_sines(dtype):
    times = torch.tensor([[0, 1, 17], [500, 999, 1000]]).to(dtype)
    result = sinusoidal(times, 8)
    assert result.shape == (2, 3, 8)
    assert result.dtype == torch.float32
    angles = [[[t * 10000 ** (-i / 4) for i in range(4)] for t in row] for row in times.tolist()]
    expected = [[[*map(math.cos, angle), *map(math.sin, angle)] for angle in row] for row in angles]
    torch.testing.assert_close(result, torch.tensor(expected), atol=1e-4, rtol=0)  # round-off of an angle of 1000: 6e-5


def test_fractional_timesteps_are_not_rounded():
    low, middle, high = sinusoidal(torch.tensor([1.0, 1.5, 2.0]), 2)
    assert low[0] > middle[0] > high[0]


def test_half_precision_times_are_not_rounded_further():
    assert sinusoidal(torch.tensor(0.5, dtype=torch.bfloat16), 2).tolist() == pytest.approx(
        [math.cos(0.5), math.sin(0.5)]
    )


@pytest.mark.parametrize("dim", [0, 7])
def test_odd_or_zero_width_raises(dim):
    with pytest.raises(ValueError, match=rf"dim={dim}\b.*sinusoid"):
        sinusoidal(torch.zeros(1), dim)


def test_mlp_is_linear_silu_linear_in_the_dtype_of_its_weights():
    mlp = TimestepMLP(4, 6, 3)
    x = torch.randn(2, 5, 4)
    hidden = F.silu(x @ mlp.linear_1.weight.T + mlp.linear_1.bias)
    torch.testing.assert_close(mlp(x), hidden @ mlp.linear_2.weight.T + mlp.linear_2.bias)
    assert mlp.to(torch.bfloat16)(x).dtype == torch.bfloat16
