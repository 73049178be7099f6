"""Videos longer than in training, given frames and partial noise of networks with a timestep per frame."""

import pytest
import torch
from torch import Tensor

from blueberry_video.diffusion.causal_sampling import generate_causally
from blueberry_video.diffusion.generation import GivenVideo, generate, generate_latents
from blueberry_video.diffusion.guidance import ConstantGuidance, EmbeddedGuidance, NoGuidance
from blueberry_video.diffusion.objectives import FlowMatching
from blueberry_video.diffusion.samplers import FlowEuler
from blueberry_video.diffusion.text_to_video import TextToVideo
from blueberry_video.models.autoencoder.base import Pixels
from blueberry_video.models.cogvideox.model import CogVideoX
from blueberry_video.models.hunyuan_video.model import HunyuanVideo
from blueberry_video.models.text_encoder.words import WordText

SAMPLER, FLOW = FlowEuler(3, shift=3.0), FlowMatching()


def cogvideox(**changes) -> TextToVideo:
    sizes = {"num_heads": 2, "head_dim": 16, "depth": 2, "in_channels": 3, "out_channels": 3, "text_dim": 8}
    sizes |= {"text_len": 4, "time_dim": 16, "patch_size": 4, "num_frames": 6, "height": 8, "width": 8}
    torch.manual_seed(0)
    network = CogVideoX(**{**sizes, "positions": "rope", "causal_chunk": 2, "zero_init": False, **changes})
    return TextToVideo(network, WordText(8, 4, ["a", "disc"]), Pixels()).eval()


def hunyuan(**changes) -> TextToVideo:
    sizes = {"in_channels": 3, "out_channels": 3, "patch_size": (1, 4, 4), "num_heads": 2, "head_dim": 16, "depth": 1}
    sizes |= {"single_depth": 1, "refiner_depth": 1, "text_dim": 8, "pooled_dim": 8, "rope_axes": (4, 6, 6)}
    torch.manual_seed(0)
    network = HunyuanVideo(**{**sizes, "causal_chunk": 2, "zero_init": False, **changes})
    return TextToVideo(network, WordText(8, 4, ["a", "disc"], pooled_dim=8), Pixels()).eval()


def windowed(model: TextToVideo, noise: Tensor, kept: int, scale: float) -> Tensor:
    """Chunks of two frames, each a clip of its own: the last ``kept`` finished frames at timestep 0, then the chunk."""
    texts, finished = (model.text(["a disc"]), model.text.unconditional(1)), noise[:, :, :0]
    for chunk in noise.split(2, dim=2):
        past = finished[:, :, -kept:]

        def denoise(noisy: Tensor, t: Tensor, past: Tensor = past) -> Tensor:
            times = torch.cat([torch.zeros(1, past.shape[2]), 1000 * t.view(1, 1).expand(1, noisy.shape[2])], dim=1)
            clip = torch.cat([past, noisy], dim=2)
            output, base = (model(clip, times, text)[:, :, past.shape[2] :] for text in texts)
            return base + scale * (output - base)

        finished = torch.cat([finished, SAMPLER(denoise, chunk, FLOW)], dim=2)
    return finished


@pytest.mark.parametrize("build", [cogvideox, lambda: cogvideox(positions="sincos"), hunyuan])
def test_rolling_cache_equals_clips_of_the_last_frames(build):
    model, noise = build(), torch.randn(1, 3, 13, 8, 8, generator=torch.Generator().manual_seed(1))
    arguments = (model.text(["a disc"]), model.text.unconditional(1), noise, SAMPLER, ConstantGuidance(2.0), FLOW)
    rolled = generate_latents(model, *arguments, given=GivenVideo(window=6))
    expected = windowed(model, noise, 4, 2.0)
    torch.testing.assert_close(rolled, expected, rtol=0, atol=2e-5)
    torch.testing.assert_close(rolled[:, :, :6], generate_latents(model, *arguments)[:, :, :6], rtol=0, atol=1e-5)
    assert (rolled - windowed(model, noise, 2, 2.0))[:, :, 6:].abs().max() > 1e-3, "the window counts"


def test_rolling_cache_has_a_constant_size():
    held = []

    def network(latents: Tensor, times: Tensor, *, cache, first_frame: int) -> Tensor:
        held.append(first_frame + latents.shape[2])
        return latents

    noise = torch.randn(1, 3, 40, 2, 2)
    generate_causally(network, None, noise, 2, SAMPLER, NoGuidance(), FLOW, window=6)
    assert max(held) == 6
    assert len(held) == 20 * 3 + 19
    with pytest.raises(ValueError, match=r"window=3\b.*\b4\b"):
        generate_causally(network, None, noise, 2, SAMPLER, NoGuidance(), FLOW, window=3)


def test_network_with_full_attention_continues_given_frames():
    """One timestep per frame: 0 of the given frames, which keep their pixels."""
    model, generator = cogvideox(causal_chunk=0), torch.Generator().manual_seed(2)
    video = torch.rand(1, 3, 3, 8, 8, generator=torch.Generator().manual_seed(1)) * 2 - 1
    torch.randn(video.shape, generator=generator)  # of the sampled latents of the given frames
    noise, text = torch.randn(1, 3, 5, 8, 8, generator=generator), model.text(["a disc"])

    def denoise(noisy: Tensor, t: Tensor) -> Tensor:
        times = torch.cat([torch.zeros(1, 3), 1000 * t.view(1, 1).expand(1, 5)], dim=1)
        return model(torch.cat([video, noisy], dim=2), times, text)[:, :, 3:]

    expected = torch.cat([video, SAMPLER(denoise, noise, FLOW).clamp(-1, 1)], dim=2)
    made = generate(
        *(model, ["a disc"], (8, 8, 8), SAMPLER, NoGuidance(), FLOW),
        generator=[torch.Generator().manual_seed(2)],
        given=GivenVideo(history=video),
    )
    torch.testing.assert_close(made, expected, rtol=0, atol=1e-5)


def test_chunks_start_from_their_frames_of_the_video():
    model, starts = cogvideox(), []

    class Recorded(FlowEuler):
        def __call__(self, denoise, noise, objective, generator=None, start=None, strength=1.0):
            starts.append((start, strength))
            return super().__call__(denoise, noise, objective, generator, start, strength)

    video, noise = torch.rand(1, 3, 5, 8, 8), torch.randn(1, 3, 5, 8, 8)
    given = GivenVideo(start=video, strength=0.5)
    generate_latents(model, model.text(["a"]), None, noise, Recorded(4, 1.0), NoGuidance(), FLOW, given=given)
    assert torch.equal(torch.cat([start for start, _ in starts], dim=2), video)
    assert {strength for _, strength in starts} == {0.5}
    with pytest.raises(ValueError, match="start of"):
        generate_latents(model, model.text(["a"]), None, noise[:, :, :4], SAMPLER, NoGuidance(), FLOW, given=given)


def test_distilled_network_is_guided_with_a_negative_caption():
    """Both evaluations have the embedded scale, as with `true_cfg_scale` in diffusers."""
    model, noise = hunyuan(causal_chunk=0, embedded_guidance=True), torch.randn(1, 3, 4, 8, 8)
    texts = [model.text([caption]) for caption in ("a disc", "a")]

    def denoise(noisy: Tensor, t: Tensor) -> Tensor:
        output, negative = (model(noisy, 1000 * t, text, 6.0) for text in texts)
        return negative + 3.0 * (output - negative)

    expected = SAMPLER(denoise, noise, FLOW)
    made = generate_latents(model, *texts, noise, SAMPLER, EmbeddedGuidance(6.0, cfg_scale=3.0), FLOW)
    torch.testing.assert_close(made, expected, rtol=0, atol=1e-5)
    assert not EmbeddedGuidance(6.0).unconditional
    plain = generate_latents(model, texts[0], None, noise, SAMPLER, EmbeddedGuidance(6.0), FLOW)
    assert (made - plain).abs().max() > 1e-3


def test_negative_caption_replaces_the_unconditional_text():
    model, options = cogvideox(causal_chunk=0), {"generator": [torch.Generator().manual_seed(0)]}
    arguments = (model, ["a disc"], (4, 8, 8), SAMPLER, ConstantGuidance(3.0), FLOW)
    made = generate(*arguments, generator=[torch.Generator().manual_seed(0)], negative=["a"])
    noise = torch.randn(1, 3, 4, 8, 8, generator=options["generator"][0])
    texts = [model.text([caption]) for caption in ("a disc", "a")]

    def denoise(noisy: Tensor, t: Tensor) -> Tensor:
        output, negative = (model(noisy, 1000 * t, text) for text in texts)
        return negative + 3.0 * (output - negative)

    torch.testing.assert_close(made, SAMPLER(denoise, noise, FLOW).clamp(-1, 1), rtol=0, atol=1e-5)
