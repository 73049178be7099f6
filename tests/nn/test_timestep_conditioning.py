"""Timestep conditioning: sinusoid against its formula, MLP, and adaLN modulation."""

import math

import pytest
import torch
import torch.nn.functional as F

from blueberry_video.nn.timestep_conditioning import TimestepMLP, gated, modulate, sinusoidal


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


def by_token(values: torch.Tensor, num_tokens: int) -> torch.Tensor:
    return values.repeat_interleave(num_tokens // values.shape[1], dim=1)


def test_tokens_of_a_frame_are_modulated_by_its_vector():
    x, branch = torch.randn(2, 2, 12, 5)
    for num_conditions in (1, 3):
        shift, scale, gate = torch.randn(3, 2, num_conditions, 5)
        expected = x * (1 + by_token(scale, 12)) + by_token(shift, 12)
        torch.testing.assert_close(modulate(x, shift, scale), expected)
        torch.testing.assert_close(gated(x, gate, branch), x + by_token(gate, 12) * branch)


def test_equal_vectors_per_frame_equal_one_vector_per_clip():
    x, shift, scale = torch.randn(2, 12, 5), torch.randn(2, 1, 5), torch.randn(2, 1, 5)
    spread = modulate(x, shift.expand(-1, 4, -1), scale.expand(-1, 4, -1))
    torch.testing.assert_close(spread, modulate(x, shift, scale), atol=0, rtol=0)


def test_empty_sequences_keep_their_shape():
    empty, value = torch.zeros(2, 0, 5), torch.ones(2, 1, 5)
    assert modulate(empty, value, value).shape == gated(empty, value, empty).shape == (2, 0, 5)


def test_gradients_equal_finite_differences():
    leaves = [torch.randn(2, 6, 3), torch.randn(2, 2, 3), torch.randn(2, 2, 3)]
    leaves = [leaf.double().requires_grad_() for leaf in leaves]
    assert torch.autograd.gradcheck(modulate, leaves)
    assert torch.autograd.gradcheck(gated, [leaves[0], leaves[1], leaves[0].detach().clone().requires_grad_()])
