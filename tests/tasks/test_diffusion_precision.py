"""Diffusion under bfloat16 as torch's default dtype: times, levels and positions stay exact."""

import pytest
import torch

from blueberry_video.diffusion.objectives import FlowMatching, VPrediction
from blueberry_video.diffusion.samplers import FlowEuler
from blueberry_video.diffusion.timesteps import LogitNormalTimesteps, UniformTimesteps
from blueberry_video.evaluation.noise_fraction import timesteps_at_noise_fraction
from blueberry_video.models.autoencoder.base import sample
from blueberry_video.models.cogvideox import CogVideoX
from blueberry_video.models.hunyuan_video import HunyuanVideo


@pytest.fixture
def half():
    torch.set_default_dtype(torch.bfloat16)
    yield
    torch.set_default_dtype(torch.float32)


def drawn() -> list[torch.Tensor]:
    """Returns everything that depends on times or random numbers, from fixed seeds."""
    seeded = torch.Generator().manual_seed
    shares = torch.linspace(0, 1, 7, dtype=torch.float32)
    return [
        UniformTimesteps()(64, generator=seeded(0)),
        UniformTimesteps(stratified=True)(64, generator=seeded(0)),
        UniformTimesteps()(64, 3, generator=seeded(0)),
        LogitNormalTimesteps()(64, generator=seeded(0)),
        FlowEuler(50, 7.0).timesteps(FlowMatching()),
        timesteps_at_noise_fraction(VPrediction(), shares),
        *VPrediction().alpha_sigma(shares),
        sample(torch.ones(1, 4, 1, 2, 2, dtype=torch.float32), seeded(0)),
    ]


def test_times_and_levels_are_bit_identical(half):
    found = drawn()
    torch.set_default_dtype(torch.float32)
    for value, expected in zip(found, drawn(), strict=True):
        assert value.dtype == torch.float32
        assert torch.equal(value, expected)


@pytest.mark.parametrize("positions", ["sincos", "rope"])
def test_cogvideox_built_in_half_precision_equals_one_converted_to_it(half, positions: str):
    settings = {"num_heads": 2, "head_dim": 16, "depth": 1, "in_channels": 4, "out_channels": 4, "text_dim": 8}
    settings |= {"text_len": 4, "time_dim": 16, "height": 8, "width": 8, "num_frames": 3, "positions": positions}
    model = CogVideoX(**settings, zero_init=False)  # type: ignore[arg-type]
    check(model, settings, torch.randn(1, 4, 2, 6, 8), torch.randn(1, 4, 8), None)


def test_hunyuan_built_in_half_precision_equals_one_converted_to_it(half):
    settings = {"in_channels": 4, "out_channels": 4, "num_heads": 2, "head_dim": 16, "depth": 1, "single_depth": 1}
    settings |= {"refiner_depth": 1, "text_dim": 8, "pooled_dim": 8, "rope_axes": (4, 6, 6)}
    model = HunyuanVideo(**settings, zero_init=False)  # type: ignore[arg-type]
    check(model, settings, torch.randn(1, 4, 2, 6, 8), torch.randn(1, 4, 8), torch.randn(1, 8))


def check(model, settings: dict, latents, text, pooled) -> None:
    time = torch.tensor([700.0], dtype=torch.float32)
    conditions = () if pooled is None else (None, pooled)
    output = model(latents, time, text, *conditions)
    torch.set_default_dtype(torch.float32)
    other = type(model)(**settings).to(torch.bfloat16)
    other.load_state_dict(model.state_dict())
    assert output.dtype == torch.bfloat16
    torch.testing.assert_close(output, other(latents, time, text, *conditions), atol=0, rtol=0)
