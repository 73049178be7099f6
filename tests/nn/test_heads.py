"""Attentive pooling against its formula."""

import pytest
import torch

from blueberry_video.nn.heads import AttentivePool, ClassificationHead


def test_attentive_pool_equals_the_formula():
    torch.manual_seed(0)
    pool, tokens = AttentivePool(8, 2), torch.randn(3, 5, 8)
    for parameter in pool.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    x = pool.norm1(tokens)
    q = pool.query[0, 0] @ pool.q.weight.T + pool.q.bias
    k = x @ pool.kv.weight[:8].T + pool.kv.bias[:8]
    v = x @ pool.kv.weight[8:].T + pool.kv.bias[8:]
    heads = []
    for part in (slice(0, 4), slice(4, 8)):
        weights = (k[..., part] @ q[part] / 2).softmax(dim=1)  # (B, N)
        heads.append((weights[..., None] * v[..., part]).sum(dim=1))
    y = pool.query[0] + torch.cat(heads, dim=1)
    torch.testing.assert_close(pool(tokens), y + pool.mlp(pool.norm2(y)), atol=1e-5, rtol=1e-5)


def test_pooling_ignores_the_order_of_tokens():
    torch.manual_seed(0)
    tokens = torch.randn(2, 6, 8)
    for pooling in ("mean", "attentive"):
        head = ClassificationHead(8, {"a": 3}, pooling, num_heads=2, init_scale=50.0)
        torch.testing.assert_close(head(tokens)["a"], head(tokens[:, [4, 1, 0, 5, 3, 2]])["a"], atol=1e-5, rtol=1e-5)


def test_dropout_acts_in_training_alone():
    head, tokens = ClassificationHead(64, {"a": 3}, dropout=0.5, init_scale=50.0), torch.randn(2, 6, 64)
    assert not torch.equal(head.train()(tokens)["a"], head(tokens)["a"])
    assert torch.equal(head.eval()(tokens)["a"], head(tokens)["a"])


@pytest.mark.parametrize("num_heads", [3, 0])
def test_heads_must_divide_the_width(num_heads):
    with pytest.raises(ValueError, match=f"num_heads={num_heads} does not divide the width 8"):
        AttentivePool(8, num_heads)
