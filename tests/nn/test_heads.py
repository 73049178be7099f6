"""Attentive pooling: parity with its formula; classification and anticipation heads."""

import math

import pytest
import torch

from blueberry_video.models.jepa.anticipator import AnticipationHead
from blueberry_video.nn.heads import AttentivePool, ClassificationHead
from blueberry_video.optim import decayed_names


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


def test_deeper_pooling_starts_with_self_attention():
    torch.manual_seed(0)
    pool, tokens = AttentivePool(8, 2, depth=4, published=False), torch.randn(3, 5, 8)
    assert len(pool.blocks) == 3
    one = AttentivePool(8, 2)
    one.load_state_dict({name: value for name, value in pool.state_dict().items() if not name.startswith("blocks.")})
    between = pool.blocks[2](pool.blocks[1](pool.blocks[0](tokens)))
    torch.testing.assert_close(pool(tokens), one(between))
    assert not torch.allclose(pool(tokens), one(tokens), atol=1e-3)


def test_norm_eps_applies_to_every_norm():
    norms = [module for module in AttentivePool(8, 2, norm_eps=1e-5, depth=2).modules() if hasattr(module, "eps")]
    assert [norm.eps for norm in norms] == [1e-5] * 4


def test_pooling_ignores_the_order_of_tokens():
    torch.manual_seed(0)
    tokens = torch.randn(2, 6, 8)
    for pooling in ("mean", "attentive"):
        head = ClassificationHead(8, {"a": 3}, pooling, num_heads=2, init_scale=50.0)
        torch.testing.assert_close(head(tokens)["a"], head(tokens[:, [4, 1, 0, 5, 3, 2]])["a"], atol=1e-5, rtol=1e-5)


def test_dropout_acts_only_in_training():
    head, tokens = ClassificationHead(64, {"a": 3}, dropout=0.5, init_scale=50.0), torch.randn(2, 6, 64)
    assert not torch.equal(head.train()(tokens)["a"], head(tokens)["a"])
    assert torch.equal(head.eval()(tokens)["a"], head(tokens)["a"])


def test_without_final_norm_the_pooled_vector_is_not_normalized():
    torch.manual_seed(0)
    head, tokens = ClassificationHead(8, {"a": 3}, "attentive", 2, pool_depth=2, final_norm=False), torch.randn(2, 6, 8)
    assert "fc_norm.weight" not in head.state_dict()
    assert len(head.pool.blocks) == 1
    torch.testing.assert_close(head(tokens)["a"], head.linear["a"](head.pool(tokens)))


def test_anticipation_has_one_query_per_label():
    torch.manual_seed(0)
    head, tokens = AnticipationHead(8, {"verb": 3, "noun": 4, "action": 5}, num_heads=2, depth=2), torch.randn(2, 6, 8)
    torch.nn.init.normal_(head.pool.query)
    logits = head(tokens)
    assert {name: tuple(scores.shape) for name, scores in logits.items()} == {
        "verb": (2, 3),
        "noun": (2, 4),
        "action": (2, 5),
    }
    alone = AttentivePool(8, 2, depth=2)
    for i, name in enumerate(logits):
        state = head.pool.state_dict()
        alone.load_state_dict(state | {"query": state["query"][:, i : i + 1]})
        torch.testing.assert_close(logits[name], head.linear[name](alone(tokens)), atol=1e-5, rtol=1e-5)
    with pytest.raises(ValueError, match="num_classes"):
        AnticipationHead(8, {}, num_heads=2)


@pytest.mark.parametrize(("key", "sizes"), [("depth", {"depth": 0}), ("num_queries", {"num_queries": 0})])
def test_zero_depth_or_queries_raise(key, sizes):
    with pytest.raises(ValueError, match=rf"{key}=0\b"):
        AttentivePool(8, 2, **sizes)


@pytest.mark.parametrize("num_heads", [3, 0])
def test_indivisible_num_heads_raises(num_heads):
    with pytest.raises(ValueError, match=rf"num_heads={num_heads}\b.*dim=8\b"):
        AttentivePool(8, num_heads)


@pytest.mark.parametrize("depth", [1, 4])
def test_published_probe_has_the_original_norms_initialization_and_weight_decay(depth):
    """Rule of V-JEPA and V-JEPA 2: eps 1e-5; truncated normal 0.02 and zero biases; output layers of block i over
    sqrt(2 i), the cross-attention with the number of the last self-attention; "bias" or 1-D has no weight decay."""
    torch.manual_seed(0)
    pool = AttentivePool(128, 4, depth=depth)
    assert {module.eps for module in pool.modules() if isinstance(module, torch.nn.LayerNorm)} == {1e-5}
    scales = {"mlp.fc2": math.sqrt(2 * max(depth - 1, 1))}
    for i in range(depth - 1):
        scales |= {f"blocks.{i}.{layer}": math.sqrt(2 * (i + 1)) for layer in ("attn.proj", "mlp.fc2")}
    for name, module in pool.named_modules():
        if isinstance(module, torch.nn.Linear):
            assert module.weight.std().item() == pytest.approx(0.02 / scales.get(name, 1.0), rel=0.03), name
            assert not module.bias.any(), name
    assert pool.query.std().item() == pytest.approx(0.02, rel=0.3)
    rule = {name for name, parameter in pool.named_parameters() if "bias" not in name and parameter.ndim != 1}
    assert decayed_names(pool) == rule
    assert "query" in rule
    assert decayed_names(AttentivePool(128, 4, published=False)) == decayed_names(AttentivePool(128, 4)) - {"query"}


def test_incomplete_block_is_the_cross_attention_alone():
    torch.manual_seed(0)
    pool, tokens = AttentivePool(8, 2, complete_block=False), torch.randn(3, 5, 8)
    for parameter in pool.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    assert pool.state_dict().keys() == {"query", "q.weight", "q.bias", "kv.weight", "kv.bias"}
    q = (pool.query[0] @ pool.q.weight.T + pool.q.bias).view(1, 2, 4)
    k, v = (tokens @ pool.kv.weight.T + pool.kv.bias).view(3, 5, 2, 2, 4).unbind(dim=2)
    weights = (torch.einsum("ohd,bnhd->bhn", q, k) / 2).softmax(dim=-1)
    expected = torch.einsum("bhn,bnhd->bhd", weights, v).flatten(1)
    torch.testing.assert_close(pool(tokens), expected, atol=1e-5, rtol=1e-5)


def test_without_init_scale_the_linear_layer_keeps_the_initialization_of_pytorch():
    torch.manual_seed(3)
    weights = ClassificationHead(64, {"a": 50}, init_scale=None).linear["a"].weight
    assert weights.abs().max().item() == pytest.approx(1 / 8, rel=0.01)  # uniform in +-1 / sqrt(64)
    assert weights.std().item() == pytest.approx(1 / 8 / math.sqrt(3), rel=0.05)


def test_first_pooling_takes_the_first_token():
    torch.manual_seed(0)
    head, tokens = ClassificationHead(8, {"a": 3}, "first", final_norm=False, init_scale=50.0), torch.randn(2, 6, 8)
    torch.testing.assert_close(head(tokens)["a"], head.linear["a"](tokens[:, 0]))
