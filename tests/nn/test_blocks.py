"""Blocks: residuals, stochastic depth, widths."""

import pytest
import torch

from blueberry_video.nn.blocks import Block, DropPath


def test_block_is_pre_norm_with_two_residuals():
    torch.manual_seed(0)
    block, x = Block(8, 2), torch.randn(2, 5, 8)
    y = x + block.attn(block.norm1(x))
    z = y + block.mlp.fc2(torch.nn.functional.gelu(block.mlp.fc1(block.norm2(y))))
    torch.testing.assert_close(block(x), z)
    assert block.norm1.eps == block.norm2.eps == 1e-6


@pytest.mark.parametrize(("dim", "hidden"), [(47, 61), (47, 62), (49, 55), (55, 28), (768, 3072), (1408, 6144)])
def test_a_width_ratio_read_off_weights_gives_their_width_back(dim, hidden):
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
def test_drop_path_refuses_what_is_no_rate(rate):
    with pytest.raises(ValueError, match=f"drop_path={rate} is not a rate"):
        DropPath(rate)


def test_both_branches_are_dropped_on_their_own():
    torch.manual_seed(0)
    block, x = Block(4, 1, drop_path=0.5).train(), torch.randn(1, 3, 4).expand(200, 3, 4)
    torch.nn.init.normal_(block.attn.proj.bias)
    outcomes = torch.unique((block(x) - x)[:, 0].round(decimals=4), dim=0)
    assert len(outcomes) == 4  # neither, attention, MLP, both
