"""Rotary position embedding with axes of any width: parity with the formula in loops."""

import math

import pytest
import torch

from blueberry_video.nn.rope import axes_rotation, rotate


@pytest.mark.parametrize("axis_dims", [(4, 6, 6), (2, 4, 4), (16, 24, 24)])
@pytest.mark.parametrize("theta", [10000.0, 256.0])
def test_pairs_are_rotated_by_the_position_on_their_axis(axis_dims, theta):
    positions = torch.tensor([[0, 0, 0], [1, 0, 0], [0, 5, 0], [0, 0, 7], [31, 23, 2.5]], dtype=torch.float64)
    x = torch.randn(1, 2, len(positions), sum(axis_dims), dtype=torch.float64)
    turn = axes_rotation(positions, axis_dims, theta)
    assert turn.cos.dtype == torch.float64
    result = rotate(x, turn)
    for n, position in enumerate(positions.tolist()):
        channel = 0
        for coordinate, dim in zip(position, axis_dims):
            for pair in range(dim // 2):
                angle = coordinate * theta ** (-2 * pair / dim)
                a, b = x[0, :, n, channel], x[0, :, n, channel + 1]
                rotated = torch.stack(
                    [a * math.cos(angle) - b * math.sin(angle), b * math.cos(angle) + a * math.sin(angle)]
                )
                torch.testing.assert_close(result[0, :, n, channel : channel + 2], rotated.T, atol=1e-12, rtol=1e-12)
                channel += 2


def test_scores_depend_on_relative_positions_only():
    q, k = torch.randn(2, 1, 1, 1, 16, dtype=torch.float64)
    positions = torch.tensor([[1.0, 2, 3], [4, 1, 9]], dtype=torch.float64)

    def product(shift: float) -> torch.Tensor:
        at_q, at_k = (axes_rotation(position[None] + shift, (4, 6, 6)) for position in positions)
        return (rotate(q, at_q) * rotate(k, at_k)).sum()

    torch.testing.assert_close(product(0), product(11.0))
    assert (product(0) - (q * k).sum()).abs() > 1e-3


def test_odd_axis_dims_raise():
    with pytest.raises(ValueError, match=r"axis_dims=\(2, 3, 3\)"):
        axes_rotation(torch.zeros(1, 3), (2, 3, 3))
