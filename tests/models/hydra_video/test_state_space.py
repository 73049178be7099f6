"""Parts shared by the state-space mixers: parity with formulas in loops."""

import math
import re

import pytest
import torch
import torch.nn.functional as F

from blueberry_video.models.hydra_video.state_space import (
    GatedRMSNorm,
    decay_rates,
    init_A_log,
    init_dt_bias,
    num_heads_of,
    step_sizes,
)


@pytest.mark.parametrize("norm_before_gate", [True, False])
@pytest.mark.parametrize("num_groups", [1, 3])
def test_gated_norm_equals_the_formula(norm_before_gate, num_groups):
    norm = GatedRMSNorm(12, 1e-2, norm_before_gate, num_groups).double()
    torch.nn.init.normal_(norm.weight)
    x, gate = torch.randn(2, 2, 5, 12, dtype=torch.float64)
    expected, width = torch.empty_like(x), 12 // num_groups
    for b in range(2):
        for i in range(5):
            silu = [g / (1 + math.exp(-g)) for g in gate[b, i].tolist()]
            values = x[b, i].tolist() if norm_before_gate else [v * s for v, s in zip(x[b, i].tolist(), silu)]
            for c in range(12):
                group = values[c // width * width :][:width]
                rms = math.sqrt(sum(v * v for v in group) / width + 1e-2)
                expected[b, i, c] = values[c] / rms * norm.weight[c].item() * (silu[c] if norm_before_gate else 1)
    torch.testing.assert_close(norm(x, gate), expected, atol=1e-12, rtol=1e-12)


@pytest.mark.parametrize("norm_before_gate", [True, False])
def test_gated_norm_computes_half_precision_in_fp32(norm_before_gate):
    norm = GatedRMSNorm(64, norm_before_gate=norm_before_gate)
    x, gate = torch.randn(2, 9, 64).to(torch.float16)
    x = 300 * x  # the squares overflow in fp16
    assert norm(x, gate).dtype == torch.float16
    torch.testing.assert_close(norm(x, gate), norm(x.float(), gate.float()).half(), atol=0, rtol=0)


def test_indivisible_groups_of_the_norm_raise():
    with pytest.raises(ValueError, match=r"num_groups=5\b.*\b12\b"):
        GatedRMSNorm(12, num_groups=5)


def test_initial_steps_are_log_uniform():
    steps = step_sizes(torch.zeros(20_000), init_dt_bias(20_000, 1e-3, 0.1))
    assert steps.min() > 0.999e-3
    assert steps.max() < 0.1001
    shares = (steps.log() - math.log(1e-3)) / math.log(100)
    torch.testing.assert_close(shares.quantile(torch.arange(1, 10) / 10), torch.arange(1, 10) / 10, atol=0.02, rtol=0)


def test_initial_steps_are_exact_and_at_least_the_floor():
    low = init_dt_bias(5, 1e-6, 1e-6, dt_floor=1e-5)  # a memory of 100,000 tokens
    torch.testing.assert_close(F.softplus(low), torch.full((5,), 1e-5), atol=0, rtol=1e-4)
    torch.testing.assert_close(F.softplus(init_dt_bias(5, 30.0, 30.0)), torch.full((5,), 30.0))


@pytest.mark.parametrize("steps", [(0.1, 1e-3, 1e-4), (0.0, 0.1, 1e-4), (1e-3, 0.1, 0.0), (math.nan, 0.1, 1e-4)])
def test_invalid_step_ranges_raise(steps):
    with pytest.raises(ValueError, match="dt_min={}.*dt_max={}.*dt_floor={}".format(*steps)):
        init_dt_bias(4, *steps)


def test_initial_decays_are_uniform():
    rates = decay_rates(init_A_log(20_000, 2.0, 6.0))
    torch.testing.assert_close(
        rates.quantile(torch.tensor([0.0, 0.25, 0.5, 1.0])), torch.tensor([-6.0, -5.0, -4.0, -2.0]), atol=0.06, rtol=0
    )
    assert torch.equal(decay_rates(init_A_log(3, 1.0, 1.0)), -torch.ones(3))


@pytest.mark.parametrize("bounds", [(0.0, 1.0), (4.0, 2.0)])
def test_invalid_decay_ranges_raise(bounds):
    with pytest.raises(ValueError, match=r"\bA\b.*" + re.escape(str(list(bounds)))):
        init_A_log(4, *bounds)


def test_steps_and_decays_of_half_precision_are_fp32():
    dt, bias = torch.randn(2, 9, 4).bfloat16(), init_dt_bias(4).bfloat16()
    torch.testing.assert_close(step_sizes(dt, bias), F.softplus(dt.float() + bias.float()), atol=0, rtol=0)
    torch.testing.assert_close(decay_rates(bias), -bias.float().exp(), atol=0, rtol=0)
    assert step_sizes(dt, bias.double()).dtype == torch.float64


def test_num_heads_of_a_mixer():
    assert num_heads_of(768, 2, 64, 8) == 24


@pytest.mark.parametrize(
    ("sizes", "text"),
    [
        ((96, 2, 80, 1), r"head_dim=80\b.*\b192\b"),
        ((96, 2, 0, 1), r"head_dim=0\b.*\b192\b"),
        ((96, 0, 64, 1), r"head_dim=64\b.*\b0\b"),
        ((96, 2, 64, 2), r"num_groups=2\b.*\b3\b"),
        ((96, 2, 64, 0), r"num_groups=0\b.*\b3\b"),
    ],
)
def test_indivisible_sizes_raise(sizes, text):
    with pytest.raises(ValueError, match=text):
        num_heads_of(*sizes)
