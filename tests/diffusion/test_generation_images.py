"""Sampling with an image: inputs of the network, samples of an oracle network, errors."""

import re

import pytest
import torch
from torch import Tensor, nn

from blueberry_video.diffusion.generation import generate, generate_latents
from blueberry_video.diffusion.guidance import ConstantGuidance, NoGuidance
from blueberry_video.diffusion.image_noise import image_channels
from blueberry_video.diffusion.objectives import FlowMatching, VPrediction
from blueberry_video.diffusion.samplers import DDIM, FlowEuler
from blueberry_video.diffusion.text_to_video import TextToVideo
from blueberry_video.models.autoencoder.base import Pixels
from blueberry_video.models.cogvideox.model import CogVideoX
from blueberry_video.models.text_encoder.words import WordText

CHANNELS = {"channels": 6, "latent_concat": 7, "token_replace": 3}
NOISE = torch.randn(2, 3, 4, 8, 8, generator=torch.Generator().manual_seed(0))
IMAGES = torch.rand(2, 3, 1, 8, 8, generator=torch.Generator().manual_seed(1)) * 2 - 1


class Still(nn.Module):
    """Oracle network for static clips: predicts the flow from the image to the noise, and records its inputs."""

    out_channels, text_dim, pooled_dim, patch_size = 3, 8, 0, (1, 1, 1)
    embedded_guidance, causal_chunk = False, 0

    def __init__(self, image_condition: str):
        super().__init__()
        self.image_condition, self.in_channels = image_condition, CHANNELS[image_condition]
        self.unused = nn.Parameter(torch.zeros(1))
        self.inputs: list[Tensor] = []

    def forward(self, latents, time, text, mask, pooled, guidance, cache, first_frame):
        self.inputs.append(latents)
        noisy, t = latents[:, :3], (time / 1000).view(-1, 1, 1, 1, 1)
        clean = (noisy if self.image_condition == "token_replace" else latents[:, 3:6])[:, :, :1]
        return (noisy - clean) / t  # noise - clean, of noisy = (1 - t) clean + t noise


def network(image_condition: str) -> TextToVideo:
    return TextToVideo(Still(image_condition), WordText(8, 8, ["disc"]), Pixels())


@pytest.mark.parametrize("kind", CHANNELS)
def test_oracle_of_static_clips_samples_the_image(kind: str):
    model = network(kind)
    generator = torch.Generator().manual_seed(0)
    made = generate(
        model, ["disc", "disc"], (4, 2, 2), FlowEuler(4), ConstantGuidance(3.0), FlowMatching(), IMAGES, generator
    )
    assert made.shape == (2, 3, 4, 8, 8), "the size of the images"
    torch.testing.assert_close(made, IMAGES.expand_as(made), atol=1e-4, rtol=0)
    assert len(model.transformer.inputs) == 8, "with and without the caption in every step"
    for latents in model.transformer.inputs:
        given = latents if kind == "token_replace" else latents[:, 3:6]
        torch.testing.assert_close(given[:, :, :1], IMAGES)
        assert kind == "token_replace" or not given[:, :, 1:].any()


@pytest.mark.parametrize("scale", [1.0, 3.0])
def test_generate_equals_manual_image_conditioning(scale: float):
    torch.manual_seed(0)
    transformer = CogVideoX(
        num_heads=2, head_dim=16, depth=1, in_channels=6, out_channels=3, text_dim=8, text_len=8, time_dim=16,
        patch_size=4, num_frames=4, height=8, width=8, positions="rope", zero_init=False,
    )  # fmt: skip
    model = TextToVideo(transformer.eval(), WordText(8, 8, ["disc"]), Pixels())
    objective, sampler, guidance = VPrediction(), DDIM(3), ConstantGuidance(scale)
    captions, generator = ["disc", "disc"], torch.Generator().manual_seed(5)
    made = generate(model, captions, (4, 8, 8), sampler, guidance, objective, IMAGES, generator)

    def conditioned(text):
        given = image_channels(IMAGES, 4)
        return lambda noisy, t: transformer(torch.cat([noisy, given], 1), objective.network_timestep(t), text.tokens)

    conditional, base = conditioned(model.text(captions)), conditioned(model.text.unconditional(2))
    generator = torch.Generator().manual_seed(5)
    torch.randn(2, 3, 1, 8, 8, generator=generator)  # the draw of the image latents, with std 0
    noise = torch.randn(2, 3, 4, 8, 8, generator=generator)
    with torch.no_grad():
        expected = sampler(
            guidance(conditional, base if guidance.unconditional else None, objective, 3), noise, objective
        )
    torch.testing.assert_close(made, expected.clamp(-1, 1))
    negated = generate(model, captions, (4, 8, 8), sampler, guidance, objective, -IMAGES, generator.manual_seed(5))
    assert not torch.allclose(made, negated)


@pytest.mark.parametrize("image", [IMAGES[:1], IMAGES[..., :4]])
def test_mismatched_image_raises(image: Tensor):
    model = network("channels")
    text = model.text(["disc", "disc"])
    with pytest.raises(ValueError, match=rf"image.*{re.escape(str(tuple(image.shape)))}.*\(2, 3, 4, 8, 8\)"):
        generate_latents(model, text, None, NOISE, FlowEuler(2), NoGuidance(), FlowMatching(), image)


def test_missing_image_raises():
    with pytest.raises(ValueError, match=r"Still.*in_channels=6\b.*channels.*image"):
        generate(network("channels"), ["disc"], (4, 8, 8), FlowEuler(2), NoGuidance(), FlowMatching())
