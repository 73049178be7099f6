"""Feed-forward layers: parity with their formula and parameter names."""

import pytest
import torch
import torch.nn.functional as F

from blueberry_video.nn.feed_forward import FeedForward, Mlp


def test_mlp_is_linear_gelu_linear():
    mlp, x = Mlp(4, 6), torch.randn(2, 3, 4)
    hidden = F.gelu(x @ mlp.fc1.weight.T + mlp.fc1.bias)
    torch.testing.assert_close(mlp(x), hidden @ mlp.fc2.weight.T + mlp.fc2.bias)


@pytest.mark.parametrize("activation", ["gelu", "silu"])
def test_feed_forward_equals_the_formula_with_the_names_of_diffusers(activation):
    layer, x = FeedForward(4, 6, activation), torch.randn(2, 3, 4)
    weights = layer.state_dict()
    assert list(weights) == ["net.0.proj.weight", "net.0.proj.bias", "net.2.weight", "net.2.bias"]
    hidden = x @ weights["net.0.proj.weight"].T + weights["net.0.proj.bias"]
    hidden = F.silu(hidden) if activation == "silu" else F.gelu(hidden, approximate="tanh")
    torch.testing.assert_close(layer(x), hidden @ weights["net.2.weight"].T + weights["net.2.bias"])
