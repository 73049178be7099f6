"""Mamba-2 mixer: parity with a recurrence in loops, with transformers and with the reference code of mamba-ssm."""

import importlib
import importlib.util
import inspect
import sys
from collections.abc import Callable
from types import ModuleType
from unittest.mock import Mock

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import Mamba2Config
from transformers.models.mamba2 import modeling_mamba2

from blueberry_video.models.hydra_video import mamba2
from blueberry_video.models.hydra_video.mamba2 import Mamba2Mixer
from blueberry_video.models.hydra_video.state_space import MixerState
from blueberry_video.optim import parameter_groups

SIZES = {"dim": 6, "expand": 2, "head_dim": 3, "state_dim": 5, "num_groups": 2}  # 4 heads


def randomized(dtype: torch.dtype = torch.float64, **sizes: int) -> Mamba2Mixer:
    """Mixer with random parameters, since the initial decays and steps barely decay the state within a few tokens."""
    torch.manual_seed(0)
    mixer = Mamba2Mixer(**{**SIZES, **sizes})
    for parameter in mixer.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    return mixer.to(dtype)


def literal(mixer: Mamba2Mixer, tokens: Tensor) -> Tensor:
    """Reference of the layer for one sequence (L, D), in loops over tokens and heads."""
    weights = mixer.state_dict()
    heads, channels, size, groups = 4, 3, 5, 2
    inner, shared = 12, 10
    state = torch.zeros(heads, channels, size, dtype=tokens.dtype)
    convolved_inputs: list[Tensor] = []
    out = []
    for token in tokens:
        row = weights["in_proj.weight"] @ token
        z, before, dt = row[:inner], row[inner : 2 * inner + 2 * shared], row[2 * inner + 2 * shared :]
        convolved_inputs.append(before)
        taps = weights["conv1d.weight"][:, 0]  # (channels, K), the newest token last
        conv = weights["conv1d.bias"].clone()
        for back in range(min(taps.shape[1], len(convolved_inputs))):
            conv += taps[:, -1 - back] * convolved_inputs[-1 - back]
        conv = conv * torch.sigmoid(conv)
        y = torch.empty(inner, dtype=tokens.dtype)
        for h in range(heads):
            x = conv[h * channels : (h + 1) * channels]
            g = h // (heads // groups)
            B = conv[inner + g * size : inner + (g + 1) * size]
            C = conv[inner + shared + g * size : inner + shared + (g + 1) * size]
            step = torch.log(1 + torch.exp(dt[h] + weights["dt_bias"][h]))
            decay = torch.exp(-step * torch.exp(weights["A_log"][h]))
            state[h] = decay * state[h] + step * torch.outer(x, B)
            y[h * channels : (h + 1) * channels] = state[h] @ C + weights["D"][h] * x
        y = y * z * torch.sigmoid(z)
        for g in range(groups):
            part = y[g * 6 : (g + 1) * 6]
            y[g * 6 : (g + 1) * 6] = part / torch.sqrt((part**2).mean() + 1e-5)
        out.append(weights["out_proj.weight"] @ (y * weights["norm.weight"]))
    return torch.stack(out)


@pytest.mark.parametrize("conv_size", [1, 2, 4])
@pytest.mark.parametrize("length", [1, 3, 11])
def test_equals_the_recurrence(conv_size, length):
    mixer, x = randomized(conv_size=conv_size), torch.randn(2, length, 6, dtype=torch.float64)
    expected = torch.stack([literal(mixer, sample) for sample in x])
    torch.testing.assert_close(mixer(x)[0], expected, atol=1e-11, rtol=1e-11)


@pytest.mark.parametrize("chunk", [1, 4, 16])
def test_chunk_is_passed_to_the_scan_and_does_not_change_the_output(chunk, monkeypatch):
    mixer, x = randomized(), torch.randn(2, 11, 6, dtype=torch.float64)
    expected, _ = mixer(x)
    mixer.chunk = chunk
    scan = Mock(wraps=mamba2.ssd)
    monkeypatch.setattr(mamba2, "ssd", scan)
    torch.testing.assert_close(mixer(x)[0], expected, atol=1e-12, rtol=1e-12)
    assert scan.call_args.kwargs["chunk"] == chunk


@pytest.mark.parametrize("split", range(9))
def test_steps_after_a_prefill_equal_the_whole_sequence(split):
    mixer, x = randomized(), torch.randn(2, 8, 6, dtype=torch.float64)
    expected, last = mixer(x, return_state=True)
    outputs, state = [], None
    if split:
        first, state = mixer(x[:, :split], return_state=True)
        outputs = list(first.unbind(1))
    for token in x[:, split:].unbind(1):
        y, state = mixer.step(token, state)
        outputs.append(y)
    torch.testing.assert_close(torch.stack(outputs, dim=1), expected, atol=1e-12, rtol=1e-12)
    for kept, wanted in zip(state, last, strict=True):
        torch.testing.assert_close(kept, wanted, atol=1e-12, rtol=1e-12)


@pytest.mark.parametrize("split", [1, 2, 5])
def test_two_parts_equal_the_whole_with_gradients(split):
    mixer, x = randomized(), torch.randn(2, 8, 6, dtype=torch.float64)
    whole = torch.autograd.grad(mixer(x)[0].square().sum(), list(mixer.parameters()))
    first, state = mixer(x[:, :split], return_state=True)
    joined = torch.cat([first, mixer(x[:, split:], state=state)[0]], dim=1)
    torch.testing.assert_close(joined, mixer(x)[0], atol=1e-12, rtol=1e-12)
    parts = torch.autograd.grad(joined.square().sum(), list(mixer.parameters()))
    torch.testing.assert_close(parts, whole, atol=1e-10, rtol=1e-10)


def test_state_keeps_only_the_last_inputs_of_the_convolution():
    mixer, x = randomized(), torch.randn(2, 9, 6, dtype=torch.float64)
    projected = (x @ mixer.in_proj.weight.T)[..., 12:44]
    _, short = mixer(x[:, :2], return_state=True)
    assert torch.equal(short.conv[:, 0], torch.zeros(2, 32, dtype=torch.float64))  # zero padding before the first token
    torch.testing.assert_close(short.conv[:, 1:], projected[:, :2], atol=1e-14, rtol=0)
    _, state = mixer(x, return_state=True)
    torch.testing.assert_close(state.conv, projected[:, -3:], atol=1e-14, rtol=0)
    assert state.conv.untyped_storage().nbytes() == 2 * 3 * 32 * 8  # no view of all tokens
    _, state = mixer.step(x[:, 0], state)
    torch.testing.assert_close(state.conv, torch.cat([projected[:, -2:], projected[:, :1]], 1), atol=1e-14, rtol=0)


def test_no_future_leakage():
    mixer, x = randomized(), torch.randn(7, 6, dtype=torch.float64)
    jacobian = torch.autograd.functional.jacobian(lambda tokens: mixer(tokens[None])[0][0], x).abs().amax(dim=(1, 3))
    later = torch.ones(7, 7, dtype=torch.bool).triu(1)  # (output, input)
    assert (jacobian[later] == 0).all()
    assert (jacobian[~later] > 1e-8).all()  # also beyond the four tokens of the convolution


def test_every_parameter_receives_a_gradient():
    mixer = Mamba2Mixer(**SIZES)
    mixer(torch.randn(2, 7, 6))[0].square().sum().backward()
    for name, parameter in mixer.named_parameters():
        assert parameter.grad is not None, name
        assert (parameter.grad != 0).any(), name


def test_parameters_without_weight_decay():
    mixer = Mamba2Mixer(**SIZES)
    names = {parameter: name for name, parameter in mixer.named_parameters()}
    groups = parameter_groups(mixer)
    decayed = {names[p] for group in groups if "weight_decay" not in group for p in group["params"]}
    assert decayed == {"in_proj.weight", "conv1d.weight", "out_proj.weight"}
    assert set(mixer.no_weight_decay) <= set(names.values())


def test_initialization_equals_the_published_one():
    mixer = Mamba2Mixer(192, head_dim=8)  # 48 heads
    assert torch.equal(mixer.D, torch.ones(48))
    assert 1 <= mixer.A_log.exp().min() < 4 < 12 < mixer.A_log.exp().max() <= 16
    assert 0.99e-3 < F.softplus(mixer.dt_bias).min() < 3e-3 < 3e-2 < F.softplus(mixer.dt_bias).max() < 0.101


def test_shapes_of_the_published_layer():
    with torch.device("meta"):
        mixer = Mamba2Mixer(768)
    assert {name: tuple(value.shape) for name, value in mixer.state_dict().items()} == {
        "in_proj.weight": (2 * 1536 + 2 * 128 + 24, 768),
        "conv1d.weight": (1536 + 2 * 128, 1, 4),
        "conv1d.bias": (1536 + 2 * 128,),
        "A_log": (24,),
        "D": (24,),
        "dt_bias": (24,),
        "norm.weight": (1536,),
        "out_proj.weight": (768, 1536),
    }


def test_half_precision_keeps_the_state_in_fp32():
    mixer, x = randomized(torch.bfloat16), torch.randn(2, 5, 6)
    y, state = mixer(x.bfloat16(), return_state=True)
    assert (y.dtype, state.scan.dtype) == (torch.bfloat16, torch.float32)
    token, state = mixer.step(x[:, 0].bfloat16())
    assert (token.dtype, state.scan.dtype) == (torch.bfloat16, torch.float32)
    torch.testing.assert_close(y.float(), mixer.float()(x)[0], atol=0.1, rtol=0.1)


@pytest.mark.parametrize(
    ("sizes", "text"),
    [
        ({"head_dim": 5}, r"head_dim=5\b.*\b12\b"),
        ({"num_groups": 3}, r"num_groups=3\b.*\b4\b"),
        ({"conv_size": 0}, r"conv_size=0\b"),
        ({"dt_range": (0.1, 0.01)}, r"dt_min=0\.1\b.*dt_max=0\.01\b"),
        ({"A_range": (0.0, 1.0)}, r"\bA\b.*\[0\.0, 1\.0\]"),
    ],
)
def test_invalid_sizes_raise(sizes, text):
    with pytest.raises(ValueError, match=text):
        Mamba2Mixer(**{**SIZES, **sizes})


@pytest.mark.parametrize("num_groups", [1, 2])
def test_transformers_computes_the_same_from_the_same_weights(num_groups, monkeypatch):
    for kernel in ("causal_conv1d_fn", "mamba2_chunk_scan"):  # CUDA kernels, called if they are installed
        monkeypatch.setattr(modeling_mamba2, kernel, inspect.unwrap(getattr(modeling_mamba2, kernel)))
    config = Mamba2Config(
        num_heads=4, head_dim=3, hidden_size=6, state_size=5, n_groups=num_groups, num_hidden_layers=1, chunk_size=4
    )
    reference = modeling_mamba2.Mamba2Mixer(config, layer_idx=0).eval()
    for parameter in reference.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    mixer = Mamba2Mixer(**{**SIZES, "num_groups": num_groups})
    mixer.load_state_dict(reference.state_dict())  # strict: the names are the same
    x = torch.randn(2, 11, 6)
    torch.testing.assert_close(mixer(x)[0], reference(x), atol=1e-5, rtol=1e-5)


def test_mamba_ssm_computes_the_same_from_the_same_weights(monkeypatch):
    module, norm = mamba_ssm(monkeypatch)
    mixer, x = randomized(torch.float32), torch.randn(2, 12, 6)
    z, xbc, dt = (x @ mixer.in_proj.weight.T).split([12, 32, 4], dim=-1)
    xbc = F.silu(F.conv1d(F.pad(xbc.mT, (3, 0)), mixer.conv1d.weight, mixer.conv1d.bias, groups=32).mT)
    u, B, C = xbc.split([12, 10, 10], dim=-1)
    u = u.unflatten(-1, (4, 3))
    B, C = (part.unflatten(-1, (2, 5)).repeat_interleave(2, dim=2) for part in (B, C))
    dt = F.softplus(dt + mixer.dt_bias)
    y, last = module.ssd_minimal_discrete(u * dt[..., None], -mixer.A_log.exp() * dt, B, C, block_len=4)
    y = (y + mixer.D[:, None] * u).flatten(-2)
    y = norm(y, mixer.norm.weight, None, z=z, eps=1e-5, group_size=6, norm_before_gate=False)
    found, state = mixer(x, return_state=True)
    torch.testing.assert_close(found, y @ mixer.out_proj.weight.T, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(state, MixerState(last, state.conv), atol=1e-5, rtol=1e-5)


def mamba_ssm(monkeypatch: pytest.MonkeyPatch) -> tuple[ModuleType, Callable[..., Tensor]]:
    """Module with the minimal scan, and the reference of the gated norm; both run without CUDA, unlike the package."""
    pytest.importorskip("triton", reason="mamba-ssm's modules import Triton")
    if "mamba_ssm" not in sys.modules:
        spec = importlib.util.find_spec("mamba_ssm")
        if spec is None:
            pytest.skip("mamba-ssm is not installed; without CUDA, put its source on PYTHONPATH")
        # The package without its own imports, which are CUDA extensions.
        monkeypatch.setitem(sys.modules, "mamba_ssm", importlib.util.module_from_spec(spec))
    minimal = importlib.import_module("mamba_ssm.modules.ssd_minimal")
    return minimal, importlib.import_module("mamba_ssm.ops.triton.layernorm_gated").rms_norm_ref
