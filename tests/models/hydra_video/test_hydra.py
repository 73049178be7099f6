"""Hydra mixer: parity with the published formula (flip, scan, shift) in loops over tokens and heads."""

from unittest.mock import Mock

import pytest
import torch
from torch import Tensor

from blueberry_video.models.hydra_video import state_space
from blueberry_video.models.hydra_video.hydra import HydraMixer
from blueberry_video.optim import parameter_groups

SIZES = {"dim": 6, "expand": 2, "head_dim": 3, "state_dim": 5, "num_groups": 2}  # 4 heads


def randomized(**options: int | str) -> HydraMixer:
    torch.manual_seed(0)
    mixer = HydraMixer(**{**SIZES, **options})
    for parameter in mixer.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    return mixer.double()


def literal(mixer: HydraMixer, tokens: Tensor, shift: str) -> Tensor:
    """Reference of the layer for one sequence (L, D)."""
    weights = mixer.state_dict()
    inner, shared, heads, length = 12, 10, 4, len(tokens)
    rows = tokens @ weights["in_proj.weight"].T
    z, before, dt = rows[:, :inner], rows[:, inner:-8], rows[:, -8:]
    dt_f, dt_b = (torch.log(1 + torch.exp(part + weights["dt_bias"])) for part in (dt[:, :heads], dt[:, heads:]))

    taps = weights["conv1d.weight"][:, 0]
    half = taps.shape[1] // 2
    conv = weights["conv1d.bias"].repeat(length, 1)
    for i in range(length):
        for k in range(-half, half + 1):
            if 0 <= i + k < length:
                conv[i] += taps[:, k + half] * before[i + k]
    conv = conv * torch.sigmoid(conv)
    x = conv[:, :inner]
    B_f, C_f, B_b, C_b = (conv[:, inner + part * shared :][:, :shared] for part in range(4))

    forward, backward = (x, dt_f, B_f, C_f), tuple(part.flip(0) for part in (x, dt_b, B_b, C_b))
    y_f, y_b = (scan(weights["A_log"], *leg, shift) for leg in (forward, backward))
    y = y_f + y_b.flip(0)
    for h in range(heads):
        own = slice(h * 3, h * 3 + 3)
        for i in range(length):
            y[i, own] += (weights["fc_D.weight"][h] @ x[i] + weights["D"][h]) * x[i, own]
    y = y / torch.sqrt((y**2).mean(dim=1, keepdim=True) + 1e-5) * weights["norm.weight"]
    return (y * z * torch.sigmoid(z)) @ weights["out_proj.weight"].T


def scan(A_log: Tensor, x: Tensor, dt: Tensor, B: Tensor, C: Tensor, shift: str) -> Tensor:
    """Scan of one direction, (L, 12): shifted by one token as published, or without the token itself."""
    y = torch.zeros_like(x)
    for h in range(4):
        own, group = slice(h * 3, h * 3 + 3), slice(h // 2 * 5, h // 2 * 5 + 5)
        state = torch.zeros(3, 5, dtype=x.dtype)
        for i in range(len(x)):
            new = dt[i, h] * torch.outer(x[i, own], B[i, group])
            state = torch.exp(-dt[i, h] * torch.exp(A_log[h])) * state + new
            if shift == "strict":
                y[i, own] = (state - new) @ C[i, group]
            elif i + 1 < len(x):
                y[i + 1, own] = state @ C[i, group]
    return y


@pytest.mark.parametrize("shift", ["hydra", "strict"])
@pytest.mark.parametrize(("conv_size", "length"), [(7, 11), (3, 5), (1, 4), (7, 2), (7, 1)])
def test_equals_the_formula(shift, conv_size, length):
    mixer, x = randomized(shift=shift, conv_size=conv_size), torch.randn(2, length, 6, dtype=torch.float64)
    expected = torch.stack([literal(mixer, sample, shift) for sample in x])
    torch.testing.assert_close(mixer(x)[0], expected, atol=1e-11, rtol=1e-11)


def test_shifts_differ_for_two_tokens_and_agree_for_one():
    x = torch.randn(2, 2, 6, dtype=torch.float64)
    strict, published = randomized(shift="strict"), randomized(shift="hydra")
    assert not torch.allclose(strict(x)[0], published(x)[0], atol=1e-3)
    torch.testing.assert_close(strict(x[:, :1]), published(x[:, :1]))


@pytest.mark.parametrize("chunk", [1, 4, 16])
def test_chunk_is_passed_to_the_scan_and_does_not_change_the_output(chunk, monkeypatch):
    mixer, x = randomized(), torch.randn(2, 11, 6, dtype=torch.float64)
    expected, _ = mixer(x)
    mixer.chunk = chunk
    scan = Mock(wraps=state_space.video_ssd)
    monkeypatch.setattr(state_space, "video_ssd", scan)
    torch.testing.assert_close(mixer(x)[0], expected, atol=1e-12, rtol=1e-12)
    assert scan.call_args.kwargs["chunk"] == chunk


@pytest.mark.parametrize("shift", ["hydra", "strict"])
def test_every_token_depends_on_every_token(shift):
    mixer, x = randomized(shift=shift, conv_size=1), torch.randn(6, 6, dtype=torch.float64)  # without the convolution
    jacobian = torch.autograd.functional.jacobian(lambda tokens: mixer(tokens[None])[0][0], x)
    assert (jacobian.abs().amax(dim=(1, 3)) > 1e-8).all()


@pytest.mark.parametrize("shift", ["hydra", "strict"])
def test_every_parameter_receives_a_gradient(shift):
    mixer = HydraMixer(**SIZES, shift=shift)
    mixer(torch.randn(2, 9, 6))[0].square().sum().backward()
    for name, parameter in mixer.named_parameters():
        assert parameter.grad is not None, name
        assert (parameter.grad != 0).any(), name


def test_parameters_without_weight_decay():
    mixer = HydraMixer(**SIZES)
    names = {parameter: name for name, parameter in mixer.named_parameters()}
    groups = parameter_groups(mixer)
    decayed = {names[p] for group in groups if "weight_decay" not in group for p in group["params"]}
    assert decayed == {"in_proj.weight", "conv1d.weight", "fc_D.weight", "out_proj.weight"}
    assert set(mixer.no_weight_decay) <= set(names.values())


def test_initialization_equals_the_published_one():
    mixer = HydraMixer(192, head_dim=8)  # 48 heads
    assert torch.equal(mixer.D, torch.ones(48))
    assert torch.equal(mixer.A_log, torch.zeros(48))
    steps = torch.nn.functional.softplus(mixer.dt_bias)
    assert 0.99e-3 < steps.min() < 3e-3 < 3e-2 < steps.max() < 0.101


def test_shapes_of_the_published_layer():
    with torch.device("meta"):
        mixer = HydraMixer(768)
    assert {name: tuple(value.shape) for name, value in mixer.state_dict().items()} == {
        "in_proj.weight": (2 * 1536 + 4 * 64 + 2 * 24, 768),
        "conv1d.weight": (1536 + 4 * 64, 1, 7),
        "conv1d.bias": (1536 + 4 * 64,),
        "A_log": (24,),
        "D": (24,),
        "fc_D.weight": (24, 1536),
        "dt_bias": (24,),
        "norm.weight": (1536,),
        "out_proj.weight": (768, 1536),
    }


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"head_dim": 5}, r"head_dim=5\b.*\b12\b"),
        ({"num_groups": 3}, r"num_groups=3\b.*\b4\b"),
        ({"conv_size": 6}, r"conv_size=6\b.*\b7\b"),
        ({"conv_size": 0}, r"conv_size=0\b.*\b1\b"),
        ({"shift": "roll"}, "shift='roll'.*'hydra'.*'strict'"),
        ({"dt_range": (0.1, 0.01)}, r"dt_min=0\.1\b.*dt_max=0\.01\b"),
    ],
)
def test_invalid_options_raise(options, text):
    with pytest.raises(ValueError, match=text):
        HydraMixer(**{**SIZES, **options})
