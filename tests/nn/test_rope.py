"""Rotary position embedding over (t, h, w), with and without the quirk: parity with a float64 formula in loops."""

import math

import pytest
import torch
from torch import Tensor

from blueberry_video.nn.rope import RotaryPositions, axes_rotation, channels_per_axis, grid_positions, rotate, rotation

DOUBLE = {"atol": 1e-12, "rtol": 1e-12}
SINGLE = {"atol": 1e-6, "rtol": 1e-6}  # the tables' round-off


def rotated_in_loops(vector: list[float], position: tuple[float, float, float], quirk: bool) -> list[float]:
    """Rotates one query or key. Only the quirk rotates the two channels of a pair by different angles."""
    dim = 2 * ((len(vector) // 3) // 2)
    rotated = list(vector)
    for axis in range(3):
        for pair in range(dim // 2):
            first, second = axis * dim + 2 * pair, axis * dim + 2 * pair + 1
            exponents = ((2 * pair) % (dim // 2), (2 * pair + 1) % (dim // 2)) if quirk else (pair, pair)
            a, b = (position[axis] / 10000 ** (exponent / (dim / 2)) for exponent in exponents)
            rotated[first] = vector[first] * math.cos(a) - vector[second] * math.sin(a)
            rotated[second] = vector[second] * math.cos(b) + vector[first] * math.sin(b)
    return rotated


def rotated(x: Tensor, positions: list[tuple[float, float, float]], quirk: bool) -> Tensor:
    """Rotated queries or keys (heads, N, head_dim) of one sample."""
    heads = [[rotated_in_loops(row, position, quirk) for row, position in zip(head, positions)] for head in x.tolist()]
    return torch.tensor(heads, dtype=torch.float64)


@pytest.mark.parametrize("quirk", [False, True])
@pytest.mark.parametrize("head_dim", [6, 32, 64, 80])
def test_equals_the_formula_in_double_precision(head_dim, quirk):
    positions = [(0.0, 0.0, 0.0), (1.0, 0.0, 0.0), (0.0, 5.0, 0.0), (0.0, 0.0, 7.0), (31.0, 23.0, 11.0)]
    positions.append((2.5, 0.25, -3.0))
    x = torch.randn(2, 3, len(positions), head_dim, dtype=torch.float64)
    turn = rotation(torch.tensor(positions, dtype=torch.float64), head_dim, quirk)
    assert turn.cos.dtype == torch.float64
    for sample, result in zip(x, rotate(x, turn)):
        torch.testing.assert_close(result, rotated(sample, positions, quirk), **DOUBLE)


@pytest.mark.parametrize("quirk", [False, True])
def test_tables_of_a_clip_equal_the_formula_at_token_indices(quirk):
    (t, h, w), x = (3, 2, 5), torch.randn(2, 2, 4, 32)
    index = torch.tensor([[0, 9, 10, 29], [29, 3, 17, 8]])
    result = rotate(x, RotaryPositions((t, h, w), 32, quirk)(index))
    assert result.dtype == torch.float32
    for sample in range(2):
        positions = [(i // (h * w), i % (h * w) // w, i % w) for i in index[sample].tolist()]
        torch.testing.assert_close(result[sample].double(), rotated(x[sample].double(), positions, quirk), **SINGLE)


@pytest.mark.parametrize(("head_dim", "channels"), [(6, 2), (16, 4), (32, 10), (64, 20), (80, 26), (88, 28)])
def test_each_axis_rotates_a_third_of_the_channels(head_dim, channels):
    assert channels_per_axis(head_dim) == channels
    for axis in range(3):
        position = torch.zeros(1, 3)
        position[0, axis] = 2.0
        x = torch.randn(1, 1, 1, head_dim)
        changed = (rotate(x, rotation(position, head_dim)) != x).flatten().nonzero().flatten().tolist()
        assert changed == list(range(axis * channels, (axis + 1) * channels))


def scores(shift: int, quirk: bool) -> Tensor:
    """Attention scores of four queries and keys at positions that are shifted by ``shift`` on every axis."""
    generator = torch.Generator().manual_seed(0)
    q, k = torch.randn(2, 1, 1, 4, 32, dtype=torch.float64, generator=generator)
    turn = rotation(grid_positions((1, 2, 2)) + shift, 32, quirk)
    return rotate(q, turn) @ rotate(k, turn).transpose(2, 3)


def test_scores_depend_on_relative_positions_only_without_the_quirk():
    torch.testing.assert_close(scores(5, quirk=False), scores(0, quirk=False), **DOUBLE)
    assert (scores(5, quirk=True) - scores(0, quirk=True)).abs().max() > 0.1


def test_rotation_is_the_identity_at_the_origin_and_keeps_norms():
    x, turn = torch.randn(2, 2, 30, 16, dtype=torch.float64), rotation(grid_positions((3, 2, 5)), 16)
    assert torch.equal(rotate(x, turn)[:, :, 0], x[:, :, 0])
    torch.testing.assert_close(rotate(x, turn).norm(dim=-1), x.norm(dim=-1), **DOUBLE)


def test_grid_positions_are_in_raster_order():
    assert grid_positions((2, 1, 2)).tolist() == [[0, 0, 0], [0, 0, 1], [1, 0, 0], [1, 0, 1]]


def test_tables_of_different_grids_are_computed_and_the_default_is_cached():
    rope = RotaryPositions((2, 3, 4), 12)
    assert rope()[0] is rope.cos
    assert rope(grid=(2, 3, 4))[0] is rope.cos
    for part, expected in zip(rope(grid=(4, 2, 5)), RotaryPositions((4, 2, 5), 12)()):
        assert torch.equal(part, expected)
    index = torch.tensor([[39, 7]])
    assert torch.equal(rope(index, (4, 2, 5)).sin[0, 0], RotaryPositions((4, 2, 5), 12).sin[index[0]])
    assert rope.state_dict() == {}


def test_shorter_clip_is_a_view_of_the_cached_table(monkeypatch):
    rope, expected = RotaryPositions((4, 2, 3), 12), RotaryPositions((2, 2, 3), 12)
    monkeypatch.setattr(rope, "_table", lambda grid: pytest.fail("the table is recomputed"))
    index = torch.tensor([[11, 3, 6]])
    for got, wanted in ((rope(grid=(2, 2, 3)), expected()), (rope(index, (2, 2, 3)), expected(index))):
        assert all(torch.equal(*parts) for parts in zip(got, wanted, strict=True))
    assert rope(grid=(2, 2, 3)).cos.data_ptr() == rope.cos.data_ptr()


def test_half_precision_is_rotated_in_float32():
    x, turn = torch.randn(1, 1, 24, 12), RotaryPositions((2, 3, 4), 12)()
    result = rotate(x.bfloat16(), turn)
    assert result.dtype == torch.bfloat16
    assert torch.equal(result, rotate(x.bfloat16().float(), turn).bfloat16())


@pytest.mark.parametrize("head_dim", [4, 5, 7, 33])
def test_head_dim_without_a_pair_per_axis_raises(head_dim):
    with pytest.raises(ValueError, match=rf"\b6\b.*head_dim={head_dim}\b.*embed_dim.*num_heads"):
        RotaryPositions((2, 2, 2), head_dim)


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


def test_scores_with_axis_dims_depend_on_relative_positions_only():
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
