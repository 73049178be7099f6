"""Chunk-wise sampling of every trainable causal network: the KV cache does not change the sample."""

from collections.abc import Callable

import pytest
import torch
from torch import nn

from blueberry_video.diffusion.causal_sampling import generate_causally
from blueberry_video.diffusion.generation import conditioned_causally, generate_latents
from blueberry_video.diffusion.guidance import ConstantGuidance, EmbeddedGuidance, Guidance
from blueberry_video.diffusion.objectives import FlowMatching
from blueberry_video.diffusion.samplers import FlowEuler
from blueberry_video.diffusion.text_to_video import TextToVideo
from blueberry_video.models.cogvideox.model import CogVideoX
from blueberry_video.models.hunyuan_video.model import HunyuanVideo
from blueberry_video.models.hunyuan_video.model_15 import HunyuanVideo15
from blueberry_video.models.text_encoder.words import WordText

SHAPE = (2, 3, 5, 8, 8)  # B, C, T, H, W: frames are no multiple of patches or chunks


def cogvideox(**changes) -> nn.Module:
    sizes = {"num_heads": 2, "head_dim": 16, "depth": 2, "in_channels": 3, "out_channels": 3, "text_dim": 8}
    sizes |= {"text_len": 4, "time_dim": 16, "patch_size": 4, "num_frames": 6, "height": 8, "width": 8}
    return CogVideoX(**{**sizes, "positions": "rope", "causal_chunk": 2, "zero_init": False, **changes})


def hunyuan(**changes) -> nn.Module:
    sizes = {"in_channels": 3, "out_channels": 3, "patch_size": (1, 4, 4), "num_heads": 2, "head_dim": 16, "depth": 1}
    sizes |= {"single_depth": 1, "refiner_depth": 1, "text_dim": 8, "pooled_dim": 8, "rope_axes": (4, 6, 6)}
    return HunyuanVideo(**{**sizes, "causal_chunk": 3, "zero_init": False, **changes})


def hunyuan15() -> nn.Module:
    sizes = {"in_channels": 7, "out_channels": 3, "patch_size": (1, 4, 4), "num_heads": 2, "head_dim": 16, "depth": 2}
    sizes |= {"refiner_depth": 1, "text_dim": 8, "letters_dim": 8, "image_dim": 8, "rope_axes": (4, 6, 6)}
    return HunyuanVideo15(**sizes, causal_chunk=2, zero_init=False)


NETWORKS: dict[str, tuple[Callable[[], nn.Module], Guidance]] = {
    "2B": (lambda: cogvideox(positions="sincos"), ConstantGuidance(2.0)),
    "5B": (cogvideox, ConstantGuidance(2.0)),
    "table": (lambda: cogvideox(positions="rope_and_table"), ConstantGuidance(2.0)),
    "1.5, patches of two frames": (lambda: cogvideox(tubelet_size=2, causal_chunk=4), ConstantGuidance(2.0)),
    "HunyuanVideo": (hunyuan, ConstantGuidance(2.0)),
    "HunyuanVideo, distilled": (lambda: hunyuan(embedded_guidance=True), EmbeddedGuidance(6.0)),
    "HunyuanVideo-1.5": (hunyuan15, ConstantGuidance(2.0)),
}


@pytest.mark.parametrize("name", NETWORKS)
def test_cache_does_not_change_the_sample_of_any_causal_network(name: str):
    build, guidance = NETWORKS[name]
    transformer = build()
    model = TextToVideo(transformer, WordText(8, 4, ["a", "disc"], pooled_dim=transformer.pooled_dim)).eval()
    text, without = model.text(["a disc", "a"]), model.text.unconditional(2)
    noise, objective, sampler = torch.randn(SHAPE), FlowMatching(), FlowEuler(3, shift=3.0)
    sample = generate_latents(
        model, text, without, noise, sampler, guidance, objective, generator=torch.Generator().manual_seed(1)
    )
    assert sample.shape == SHAPE
    front = torch.randn(2, 3, 1, 8, 8, generator=torch.Generator().manual_seed(1))
    whole = torch.cat([front, noise], dim=2) if transformer.patch_size[0] == 2 else noise
    pair = [conditioned_causally(model, part, guidance.embedded) for part in (text, without)]
    settings = whole, transformer.causal_chunk, sampler, guidance, objective
    uncached = generate_causally(*pair, *settings, cached=False)
    torch.testing.assert_close(sample, uncached[:, :, -5:], rtol=0, atol=1e-5)
    assert sample.std() > 0.1


def test_sample_of_a_causal_network_depends_on_the_guidance_scale():
    model = TextToVideo(hunyuan(embedded_guidance=True, pooled_dim=0), WordText(8, 4, ["a"])).eval()
    text, noise = model.text(["a"] * 2), torch.randn(SHAPE)
    weak, strong = (
        generate_latents(model, text, None, noise, FlowEuler(2, 3.0), EmbeddedGuidance(scale), FlowMatching())
        for scale in (1.0, 6.0)
    )
    assert not torch.allclose(weak, strong)
