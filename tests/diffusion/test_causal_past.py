"""Guided chunk-wise sampling: both networks receive the finished frames."""

import pytest
import torch
from torch import Tensor

from blueberry_video.diffusion.causal_sampling import generate_causally
from blueberry_video.diffusion.guidance import ConstantGuidance, NoGuidance
from blueberry_video.diffusion.objectives import FlowMatching
from blueberry_video.diffusion.samplers import DDIM, FlowEuler
from blueberry_video.models.cogvideox.model import CogVideoX

SHAPE = (2, 4, 5, 4, 6)  # B, C, T, H, W: chunks of 2, 2 and 1 frames


class Past:
    """Network that moves towards ``level`` plus the mean of the finished frames; records what it receives."""

    def __init__(self, level: float):
        self.level, self.finished = level, torch.zeros(1, 1, 0, 1, 1)
        self.calls: list[tuple[int, int, bool]] = []

    def __call__(self, latents: Tensor, time: Tensor, *, cache: object, first_frame: int) -> Tensor:
        is_past = not time.any()
        self.calls.append((first_frame, latents.shape[2], is_past))
        if is_past:
            assert first_frame == self.finished.shape[2]
            self.finished = torch.cat([self.finished, latents.mean((0, 1, 3, 4)).view(1, 1, -1, 1, 1)], dim=2)
            return torch.zeros_like(latents)
        mean = self.finished.mean() if self.finished.numel() else torch.tensor(0.0)
        return latents - self.level - mean


@pytest.mark.parametrize("history", [None, torch.full((1, 1, 2, 2, 2), 3.0)])
def test_both_networks_receive_every_finished_chunk(history: Tensor | None):
    with_text, without = Past(1.0), Past(0.0)
    noise = torch.zeros(1, 1, 5, 2, 2)
    made = generate_causally(
        with_text, without, noise, 2, FlowEuler(1, 1.0), ConstantGuidance(3.0), FlowMatching(), history
    )
    # one step from zero noise: the flow is -(level + past), guided -(3 level + past)
    past, expected = ([] if history is None else [3.0, 3.0]), []
    for size in (2, 2, 1):
        value = 3.0 + (sum(past) / len(past) if past else 0.0)
        expected += [value] * size
        past += [value] * size
    assert made[0, 0, :, 0, 0].tolist() == pytest.approx(expected)
    assert with_text.calls == without.calls
    assert with_text.finished.flatten().tolist() == without.finished.flatten().tolist() == pytest.approx(past[:-1])


@pytest.mark.parametrize("cached", [True, False])
@pytest.mark.parametrize("sampler", [DDIM(3), FlowEuler(3)])
def test_guidance_with_two_equal_networks_is_no_guidance(sampler, cached: bool):
    torch.manual_seed(0)
    sizes = {"num_heads": 2, "head_dim": 16, "depth": 2, "in_channels": 4, "out_channels": 4, "text_dim": 8}
    sizes |= {"text_len": 3, "time_dim": 8, "num_frames": 5, "height": 4, "width": 6, "causal_chunk": 2}
    model, text = CogVideoX(**sizes, positions="rope", zero_init=False).eval(), torch.randn(2, 3, 8)

    def network(*arguments, **options):
        return model(*arguments, text=text, **options)

    noise, history = torch.randn(SHAPE), torch.randn(2, 4, 2, 4, 6)
    guided, plain = (
        generate_causally(network, network, noise, 2, sampler, guidance, FlowMatching(), history, cached=cached)
        for guidance in (ConstantGuidance(7.0), NoGuidance())
    )
    torch.testing.assert_close(guided, plain, rtol=0, atol=1e-4)
    other = generate_causally(network, network, noise, 2, sampler, NoGuidance(), FlowMatching(), cached=cached)
    assert (plain - other).abs().amax() > 1e-3, "depends on the history"
