"""Chunk by chunk with a cache is chunk by chunk with the whole mask, for every sampler."""

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
SHAPE = (2, 4, 5, 4, 6)  # B, C, T, H, W: the last chunk is half a one


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
def test_the_cache_changes_nothing(model: CogVideoX, sampler: Sampler, objective: Objective, guidance: Guidance):
    pair, noise = networks(model), torch.randn(SHAPE)
    with_cache, with_mask = (
        generate_causally(
            *pair, noise, CHUNK, sampler, guidance, objective, generator=torch.Generator().manual_seed(1), cached=cached
        )
        for cached in (True, False)
    )
    assert with_cache.shape == SHAPE
    torch.testing.assert_close(with_cache, with_mask, rtol=0, atol=1e-5)


def test_a_history_is_gone_on_from(model: CogVideoX):
    """As if its frames had been generated."""
    pair, noise = networks(model), torch.randn(SHAPE)
    settings = CHUNK, DDIM(3), ConstantGuidance(2.0), VPrediction()
    whole = generate_causally(*pair, noise, *settings)
    for cached in (True, False):
        rest = generate_causally(*pair, noise[:, :, 4:], *settings, history=whole[:, :, :4], cached=cached)
        torch.testing.assert_close(rest, whole[:, :, 4:], rtol=0, atol=1e-5)


def test_a_finished_chunk_is_seen_and_later_noise_is_not(model: CogVideoX):
    pair, noise = networks(model), torch.randn(SHAPE)
    settings = CHUNK, DDIM(3), NoGuidance(), VPrediction()
    sample = generate_causally(*pair, noise, *settings)
    for frame, changed in ((1, [True, True, True]), (3, [False, True, True]), (4, [False, False, True])):
        other = noise.clone()
        other[:, :, frame] += 1
        difference = (generate_causally(*pair, other, *settings) - sample).abs().amax(dim=(0, 1, 3, 4))
        assert [bool(part.max() > 1e-6) for part in difference.split(CHUNK)] == changed


def test_the_network_evaluates_one_chunk_at_a_time():
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
            (0, 2, [0.0, 0.0]),  # written
            *((2, 2, time) for time in noisy),
            (2, 2, [0.0, 0.0]),
            *((4, 1, time[:1]) for time in noisy),
        ]
    )


def test_bad_input_is_refused(model: CogVideoX):
    (network, _), noise = networks(model), torch.randn(SHAPE)
    settings = DDIM(2), NoGuidance(), VPrediction()
    with pytest.raises(ValueError, match="chunk=0: a chunk has 1 frame or more"):
        generate_causally(network, None, noise, 0, *settings)
    with pytest.raises(ValueError, match=r"noise of shape \(4, 5, 4, 6\)"):
        generate_causally(network, None, noise[0], CHUNK, *settings)
    with pytest.raises(ValueError, match="history of 3 frames ends within a chunk of 2"):
        generate_causally(network, None, noise, CHUNK, *settings, history=noise[:, :, :3])
    with pytest.raises(ValueError, match="only T may differ"):
        generate_causally(network, None, noise, CHUNK, *settings, history=noise[..., :2])
    with pytest.raises(ValueError, match="only T may differ"):
        generate_causally(network, None, noise, CHUNK, *settings, history=noise[0])
    with pytest.raises(ValueError, match="needs the network without a text as well"):
        generate_causally(network, None, noise, CHUNK, DDIM(2), ConstantGuidance(), VPrediction())
