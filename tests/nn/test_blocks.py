"""Transformer blocks: residuals, stochastic depth, widths and initialization."""

import pytest
import torch

from blueberry_video.nn.blocks import Block, DropPath, init_trunc_normal
from blueberry_video.nn.rope import RotaryPositions


def test_block_is_pre_norm_with_two_residuals():
    torch.manual_seed(0)
    block, x = Block(8, 2), torch.randn(2, 5, 8)
    y = x + block.attn(block.norm1(x))
    z = y + block.mlp.fc2(torch.nn.functional.gelu(block.mlp.fc1(block.norm2(y))))
    torch.testing.assert_close(block(x), z)
    assert block.norm1.eps == block.norm2.eps == 1e-6


def test_rotation_is_passed_to_the_attention():
    block, x, turn = Block(12, 2), torch.randn(2, 4, 12), RotaryPositions((4, 1, 1), 6)()
    y = x + block.attn(block.norm1(x), turn)
    torch.testing.assert_close(block(x, turn), y + block.mlp(block.norm2(y)))
    assert not torch.allclose(block(x, turn), block(x), atol=1e-4)


def test_init_trunc_normal_scales_output_layers_by_depth():
    torch.manual_seed(0)
    model = torch.nn.Module()
    model.embed, model.blocks = torch.nn.Conv3d(3, 64, 4), torch.nn.ModuleList(Block(64, 2) for _ in range(3))
    init_trunc_normal(model)
    assert model.embed.weight.std().item() == pytest.approx(0.02, rel=0.05)
    assert not model.embed.bias.any()
    for i, block in enumerate(model.blocks, start=1):
        for layer, std in (
            (block.attn.qkv, 0.02),
            (block.attn.proj, 0.02 / (2 * i) ** 0.5),
            (block.mlp.fc1, 0.02),
            (block.mlp.fc2, 0.02 / (2 * i) ** 0.5),
        ):
            assert layer.weight.std().item() == pytest.approx(std, rel=0.05)
            assert not layer.bias.any()
        assert torch.equal(block.norm1.weight, torch.ones(64))


@pytest.mark.parametrize(("dim", "hidden"), [(47, 61), (47, 62), (49, 55), (55, 28), (768, 3072), (1408, 6144)])
def test_mlp_ratio_computed_from_a_width_round_trips(dim, hidden):
    assert Block(dim, 1, mlp_ratio=hidden / dim).mlp.fc1.out_features == hidden


@pytest.mark.parametrize("rate", [0.25, 0.75])
def test_drop_path_drops_whole_samples_and_keeps_the_expectation(rate):
    torch.manual_seed(0)
    drop, x = DropPath(rate).train(), torch.rand(4000, 3, 2) + 0.5
    y = drop(x)
    kept = y[:, 0, 0] != 0
    assert torch.equal(y[~kept], torch.zeros_like(y[~kept]))
    torch.testing.assert_close(y[kept], x[kept] / (1 - rate))
    assert kept.float().mean().item() == pytest.approx(1 - rate, abs=0.03)  # 4 standard deviations
    assert torch.equal(drop.eval()(x), x)


@pytest.mark.parametrize("rate", [-0.1, 1.0, 1.5])
def test_drop_path_rate_out_of_range_raises(rate):
    with pytest.raises(ValueError, match=rf"drop_path={rate}\b"):
        DropPath(rate)


def test_branches_are_dropped_independently():
    torch.manual_seed(0)
    block, x = Block(4, 1, drop_path=0.5).train(), torch.randn(1, 3, 4).expand(200, 3, 4)
    torch.nn.init.normal_(block.attn.proj.bias)
    outcomes = torch.unique((block(x) - x)[:, 0].round(decimals=4), dim=0)
    assert len(outcomes) == 4  # neither, attention, MLP, both
