"""Attention: parity with a formula in loops over heads, biases and errors."""

import pytest
import torch

from blueberry_video.nn.attention import Attention
from blueberry_video.nn.rope import grid_positions, rotate, rotation


def randomized(qkv_bias: str) -> Attention:
    torch.manual_seed(0)
    attention = Attention(12, 3, qkv_bias)
    for parameter in attention.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    return attention


@pytest.mark.parametrize("qkv_bias", ["qkv", "qv", "none"])
def test_equals_the_formula(qkv_bias):
    attention, x = randomized(qkv_bias), torch.randn(2, 5, 12)
    zero = torch.zeros(12)
    biases = {
        "qkv": lambda: attention.qkv.bias.split(12),
        "qv": lambda: (attention.q_bias, zero, attention.v_bias),
        "none": lambda: (zero, zero, zero),
    }[qkv_bias]()
    q, k, v = (x @ w.T + b for w, b in zip(attention.qkv.weight.split(12), biases, strict=True))
    heads = []
    for h in range(3):
        part = slice(4 * h, 4 * h + 4)
        scores = q[..., part] @ k[..., part].transpose(1, 2) / 4**0.5
        heads.append(scores.softmax(dim=-1) @ v[..., part])
    expected = torch.cat(heads, dim=-1) @ attention.proj.weight.T + attention.proj.bias
    torch.testing.assert_close(attention(x), expected, atol=1e-5, rtol=1e-5)


def test_rotation_applies_to_queries_and_keys_only():
    attention, x = randomized("qkv"), torch.randn(2, 5, 12)
    attention.num_heads = 2  # of 6 channels
    turn = rotation(grid_positions((5, 1, 1)).float(), 6)
    q, k, v = (part.unflatten(2, (2, 6)).transpose(1, 2) for part in attention.qkv(x).chunk(3, dim=2))
    scores = rotate(q, turn) @ rotate(k, turn).transpose(2, 3) / 6**0.5
    expected = attention.proj((scores.softmax(dim=-1) @ v).transpose(1, 2).flatten(2))
    torch.testing.assert_close(attention(x, turn), expected, atol=1e-5, rtol=1e-5)
    assert (attention(x, turn) - attention(x)).abs().max() > 1e-2


def test_key_bias_cancels():
    attention, x = randomized("qkv"), torch.randn(2, 5, 12)
    expected = attention(x)
    with torch.no_grad():
        attention.qkv.bias[12:24] += 3.0
    torch.testing.assert_close(attention(x), expected, atol=1e-5, rtol=1e-5)


def test_biases_of_each_mode():
    assert {name for name, _ in Attention(4, 1, "qv").named_parameters()} >= {"q_bias", "v_bias"}
    assert "qkv.bias" not in dict(Attention(4, 1, "qv").named_parameters())
    assert "qkv.bias" in dict(Attention(4, 1).named_parameters())
    assert set(dict(Attention(4, 1, "none").named_parameters())) == {"qkv.weight", "proj.weight", "proj.bias"}


@pytest.mark.parametrize(("dim", "heads"), [(12, 5), (12, 0), (12, -3)])
def test_indivisible_num_heads_raises(dim, heads):
    with pytest.raises(ValueError, match=rf"num_heads={heads}\b.*dim=12\b"):
        Attention(dim, heads)


def test_unknown_qkv_bias_raises():
    with pytest.raises(ValueError, match=r"qkv_bias='kv'.*'qkv'.*'qv'.*'none'"):
        Attention(12, 3, "kv")
