"""Chunk-wise causal sampling: a KV cache gives the same sample as the whole attention mask, for every sampler."""

from functools import partial

import pytest
import torch
from torch import Tensor

from blueberry_video.diffusion.causal_sampling import generate_causally
from blueberry_video.diffusion.guidance import ConstantGuidance, DynamicGuidance, Guidance, NoGuidance
from blueberry_video.diffusion.objectives import FlowMatching, Objective, VPrediction
from blueberry_video.diffusion.samplers import DDIM, DPMSolverSDE, FlowEuler, Sampler
from blueberry_video.models.cogvideox.model import CogVideoX

CHUNK = 2
SHAPE = (2, 4, 5, 4, 6)  # B, C, T, H, W: the last chunk is half full


@pytest.fixture(scope="module", params=["rope", "sincos"])
def model(request: pytest.FixtureRequest) -> CogVideoX:
    torch.manual_seed(0)
    return CogVideoX(
        num_heads=2,
        head_dim=16,
        depth=2,
        in_channels=4,
        out_channels=4,
        text_dim=8,
        text_len=3,
        time_dim=8,
        num_frames=5,
        height=4,
        width=6,
        positions=request.param,
        causal_chunk=CHUNK,
        zero_init=False,
    ).eval()


def networks(model: CogVideoX) -> tuple[partial, partial]:
    text = torch.randn(SHAPE[0], 3, 8)
    return partial(model, text=text), partial(model, text=torch.zeros_like(text))


@pytest.mark.parametrize(
    ("sampler", "objective"),
    [(DDIM(3), VPrediction()), (DPMSolverSDE(3), VPrediction()), (FlowEuler(3), FlowMatching())],
)
@pytest.mark.parametrize("guidance", [NoGuidance(), DynamicGuidance(2.0)])
def test_cache_does_not_change_the_sample(model: CogVideoX, sampler: Sampler, objective: Objective, guidance: Guidance):
    pair, noise = networks(model), torch.randn(SHAPE)
    with_cache, with_mask = (
        generate_causally(
            *pair, noise, CHUNK, sampler, guidance, objective, generator=torch.Generator().manual_seed(1), cached=cached
        )
        for cached in (True, False)
    )
    assert with_cache.shape == SHAPE
    torch.testing.assert_close(with_cache, with_mask, rtol=0, atol=1e-5)


def test_sampling_continues_from_a_history(model: CogVideoX):
    """The sample equals one in which the frames of the history are generated."""
    pair, noise = networks(model), torch.randn(SHAPE)
    settings = CHUNK, DDIM(3), ConstantGuidance(2.0), VPrediction()
    whole = generate_causally(*pair, noise, *settings)
    for cached in (True, False):
        rest = generate_causally(*pair, noise[:, :, 4:], *settings, history=whole[:, :, :4], cached=cached)
        torch.testing.assert_close(rest, whole[:, :, 4:], rtol=0, atol=1e-5)


def test_chunks_depend_on_finished_chunks_and_not_on_later_noise(model: CogVideoX):
    pair, noise = networks(model), torch.randn(SHAPE)
    settings = CHUNK, DDIM(3), NoGuidance(), VPrediction()
    sample = generate_causally(*pair, noise, *settings)
    for frame, changed in ((1, [True, True, True]), (3, [False, True, True]), (4, [False, False, True])):
        other = noise.clone()
        other[:, :, frame] += 1
        difference = (generate_causally(*pair, other, *settings) - sample).abs().amax(dim=(0, 1, 3, 4))
        assert [bool(part.max() > 1e-6) for part in difference.split(CHUNK)] == changed


def test_network_evaluates_one_chunk_at_a_time():
    calls = []

    def network(latents: Tensor, time: Tensor, *, cache: object, first_frame: int) -> Tensor:
        calls.append((first_frame, latents.shape[2], time[0].tolist()))
        return torch.zeros_like(latents)

    generate_causally(
        network, None, torch.randn(1, 1, 5, 2, 2), 2, FlowEuler(2, shift=1.0), NoGuidance(), FlowMatching()
    )
    noisy = [[1000.0, 1000.0], [500.0, 500.0]]
    assert (
        calls
        == [
            *((0, 2, time) for time in noisy),
            (0, 2, [0.0, 0.0]),  # fills the cache
            *((2, 2, time) for time in noisy),
            (2, 2, [0.0, 0.0]),
            *((4, 1, time[:1]) for time in noisy),
        ]
    )


def test_bad_input_raises(model: CogVideoX):
    (network, _), noise = networks(model), torch.randn(SHAPE)
    settings = DDIM(2), NoGuidance(), VPrediction()
    with pytest.raises(ValueError, match=r"chunk=0\b.*\b1\b"):
        generate_causally(network, None, noise, 0, *settings)
    with pytest.raises(ValueError, match=r"noise.*\(4, 5, 4, 6\).*\(B, C, T, H, W\)"):
        generate_causally(network, None, noise[0], CHUNK, *settings)
    with pytest.raises(ValueError, match=r"history.*\b3\b.*\b2\b"):
        generate_causally(network, None, noise, CHUNK, *settings, history=noise[:, :, :3])
    with pytest.raises(ValueError, match=r"history.*\(2, 4, 5, 4, 2\).*\(2, 4, 5, 4, 6\)"):
        generate_causally(network, None, noise, CHUNK, *settings, history=noise[..., :2])
    with pytest.raises(ValueError, match=r"history.*\(4, 5, 4, 6\).*\(2, 4, 5, 4, 6\)"):
        generate_causally(network, None, noise, CHUNK, *settings, history=noise[0])
    with pytest.raises(ValueError, match=r"ConstantGuidance.*unconditional"):
        generate_causally(network, None, noise, CHUNK, DDIM(2), ConstantGuidance(), VPrediction())
