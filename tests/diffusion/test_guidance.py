"""Classifier-free guidance: parity of scales and mixture with diffusers' CogVideoX pipeline, precision, errors."""

import math

import pytest
import torch
from hydra.utils import instantiate
from omegaconf import OmegaConf
from torch import Tensor

from blueberry_video.config import CONF
from blueberry_video.diffusion.guidance import ConstantGuidance, DynamicGuidance, EmbeddedGuidance, Guidance, NoGuidance
from blueberry_video.diffusion.objectives import FlowMatching, VPrediction
from blueberry_video.diffusion.samplers import DDIM

SHAPE = (3, 2, 2, 4, 4)


def with_text(latents: Tensor, t: Tensor) -> Tensor:
    return latents.sin() + t.view(-1, 1, 1, 1, 1)


def without_text(latents: Tensor, t: Tensor) -> Tensor:
    return latents.cos()


@pytest.mark.parametrize("scale", [0.0, 1.0, 6.0])
def test_constant_scale_mixes_the_two_outputs(scale: float):
    latents, t = torch.randn(SHAPE), torch.rand(3)
    guided = ConstantGuidance(scale)(with_text, without_text, VPrediction(), 50)
    conditional, base = with_text(latents, t), without_text(latents, t)
    torch.testing.assert_close(guided(latents, t), base + scale * (conditional - base))


@pytest.mark.parametrize("guidance", [ConstantGuidance(6.3), DynamicGuidance(6.3), DynamicGuidance(6.3, "cosine")])
def test_guidance_of_a_float64_network_is_float64(guidance: Guidance):
    latents, t = torch.randn(SHAPE, dtype=torch.float64), torch.tensor([0.1, 0.5, 0.9])
    base, output = without_text(latents, t.double()), with_text(latents, t.double())
    found = guidance(with_text, without_text, FlowMatching(), 50)(latents, t.double())
    assert found.dtype == torch.float64
    scale = torch.tensor(guidance.scale_at(t.double(), FlowMatching(), 50).tolist(), dtype=torch.float64)
    if isinstance(guidance, ConstantGuidance):
        scale = torch.full((3,), 6.3, dtype=torch.float64)
    expected = base + scale.view(3, 1, 1, 1, 1) * (output - base)
    torch.testing.assert_close(found, expected, rtol=1e-14, atol=1e-14)


def test_guidance_of_a_bfloat16_network_is_float32():
    latents, t = torch.randn(SHAPE).bfloat16(), torch.rand(3)
    half = lambda network: lambda x, time: network(x.float(), time).bfloat16()  # noqa: E731
    found = ConstantGuidance(6.3)(half(with_text), half(without_text), FlowMatching(), 50)(latents, t)
    base, output = half(without_text)(latents, t).float(), half(with_text)(latents, t).float()
    assert torch.equal(found, base + torch.tensor(6.3) * (output - base))


@pytest.mark.parametrize("steps", [10, 50])
def test_published_scale_is_the_default(steps: int):
    """SAT's sampler passes ``num_steps - timestep`` as the index of its step, and so does diffusers' pipeline: with the
    network's timestep, 999 … 19, in place of the index of the sampler's step."""
    timesteps = DDIM(steps).timesteps(VPrediction())[:-1]
    scales = DynamicGuidance().scale_at(timesteps, VPrediction(), steps)
    expected = [
        1 + 6.0 * ((1 - math.cos(math.pi * ((steps - step) / steps) ** 5.0)) / 2)
        for step in VPrediction().network_timestep(timesteps).long().tolist()
    ]
    assert scales.tolist() == pytest.approx(expected, abs=1e-5)
    assert scales.diff().min() < 0, "the published scale is not monotonic"


def test_config_of_dynamic_guidance_is_the_published_one():
    config = OmegaConf.load(CONF / "task" / "guidance" / "dynamic.yaml")
    assert vars(instantiate(config)) == vars(DynamicGuidance()) == {"scale": 6.0, "mode": "legacy", "exponent": 5.0}


@pytest.mark.parametrize("objective", [VPrediction(), FlowMatching()])
def test_cosine_scale_rises_from_1_to_the_full_scale(objective):
    timesteps = DDIM(50).timesteps(objective)
    scales = DynamicGuidance(6.0, "cosine").scale_at(timesteps, objective, 50)
    expected = [1 + 6.0 * (1 - math.cos(math.pi * (done / 50) ** 5)) / 2 for done in range(51)]
    assert scales.tolist() == pytest.approx(expected, abs=1e-4)
    assert scales[0] == 1
    assert scales[-1] == pytest.approx(7)
    assert scales.diff().min() >= 0


def test_every_clip_has_the_scale_of_its_own_timestep():
    latents, t = torch.randn(SHAPE), torch.tensor([0.1, 0.5, 0.9])
    guidance = DynamicGuidance(4.0)
    together = guidance(with_text, without_text, FlowMatching(), 50)(latents, t)
    for clip in range(3):
        alone = guidance(with_text, without_text, FlowMatching(), 50)(latents[[clip]], t[[clip]])
        torch.testing.assert_close(together[[clip]], alone)


@pytest.mark.parametrize("guidance", [NoGuidance(), EmbeddedGuidance(6.0)])
def test_guidance_without_an_unconditional_output_returns_the_network(guidance: Guidance):
    assert guidance(with_text, None, FlowMatching(), 50) is with_text
    assert not guidance.unconditional


def test_only_embedded_guidance_passes_the_scale_to_the_network():
    assert EmbeddedGuidance(6.0).embedded == 6.0
    assert [each.embedded for each in (NoGuidance(), ConstantGuidance(), DynamicGuidance())] == [None] * 3


def test_bfloat16_outputs_are_mixed_in_float32():
    """The difference of two large bfloat16 outputs would round the guidance away."""
    guided = ConstantGuidance(6.0)(
        lambda x, t: torch.full_like(x, 100.5), lambda x, t: torch.full_like(x, 100.0), FlowMatching(), 50
    )
    output = guided(torch.zeros(SHAPE, dtype=torch.bfloat16), torch.ones(3))
    assert output.dtype == torch.float32
    assert (output == 103).all()


@pytest.mark.parametrize("guidance", [ConstantGuidance(), DynamicGuidance()])
def test_missing_unconditional_network_raises(guidance: Guidance):
    with pytest.raises(ValueError, match=rf"{type(guidance).__name__}.*unconditional"):
        guidance(with_text, None, FlowMatching(), 50)


def test_invalid_settings_raise():
    for guidance in (ConstantGuidance, DynamicGuidance, EmbeddedGuidance):
        with pytest.raises(ValueError, match=r"scale=-0\.5\b"):
            guidance(-0.5)
    with pytest.raises(ValueError, match=r"mode='linear'.*'cosine'.*'legacy'"):
        DynamicGuidance(mode="linear")
    with pytest.raises(ValueError, match=r"exponent=0\.0\b"):
        DynamicGuidance(exponent=0.0)
