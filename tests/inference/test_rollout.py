"""Rollouts of token videos along actions: equal to generated clips, and independent of what comes before a reset."""

import pytest
import torch
from torch import Tensor

from blueberry_video.inference.frame_generation import FrameDecoding, generate_clips
from blueberry_video.inference.rollout import Rollout
from blueberry_video.models.hydra_video.generator import Conditioning, HydraVideoGenerator

V, GRID, FRAMES, SEEDS = 5, (2, 4), 7, [3, 4]
STACKS = {"hydra": {}, "attention": {"mixer": "attention"}}


def model(**changes) -> HydraVideoGenerator:
    torch.manual_seed(0)
    options = {"embed_dim": 16, "depth": 2, "head_dim": 8, "state_dim": 4, "mlp_ratio": 1.0, "memory_frames": 4}
    options |= {"num_actions": 3, "actions_per_frame": 2, "attention_frames": 9, "num_classes": {"colour": 2}}
    network = HydraVideoGenerator(V, GRID, **{**options, **changes})
    for parameter in network.parameters():
        parameter.data += 0.3 * torch.randn_like(parameter)
    return network.double().eval()


def inputs(known: int = 3) -> tuple[Tensor, Tensor]:
    draw = torch.Generator().manual_seed(1)
    ids = torch.randint(V, (2, known, *GRID), generator=draw)
    return ids, torch.randint(3, (2, FRAMES - 1, 2), generator=draw)


def changed(ids: Tensor, frame: int) -> Tensor:
    """Returns ids with different tokens in one frame."""
    ids = ids.clone()
    ids[:, frame] = (ids[:, frame] + 1) % V
    return ids


@pytest.mark.parametrize("guidance", [1.0, 2.0])
@pytest.mark.parametrize("stack", STACKS)
def test_a_rollout_without_reset_equals_generated_clips(stack: str, guidance: float):
    network, (ids, actions) = model(**STACKS[stack]), inputs()
    decoding = FrameDecoding(1, "frame", guidance=guidance)
    made = Rollout(decoding)(network, ids, actions, generator=SEEDS)
    expected = generate_clips(network, Conditioning(actions=actions), FRAMES, decoding, ids, SEEDS)
    assert torch.equal(made, expected)
    assert torch.equal(made[:, :3], ids)
    assert not torch.equal(Rollout(decoding)(network, changed(ids, 0), actions, generator=SEEDS)[:, 3:], made[:, 3:])


@pytest.mark.parametrize("guidance", [1.0, 2.0])
@pytest.mark.parametrize("reset_at", [3, 5])
@pytest.mark.parametrize("stack", STACKS)
def test_frames_after_a_reset_do_not_depend_on_those_before(stack: str, reset_at: int, guidance: float):
    network, (ids, actions) = model(**STACKS[stack]), inputs()
    rollout = Rollout(FrameDecoding(1, "frame", guidance=guidance))
    first, second = (rollout(network, each, actions, reset_at, SEEDS) for each in (ids, changed(ids, 2)))
    assert torch.equal(first[:, reset_at:], second[:, reset_at:])
    if reset_at == 5:
        assert not torch.equal(first[:, 3:reset_at], second[:, 3:reset_at])
        assert torch.equal(first[:, :reset_at], rollout(network, ids, actions, None, SEEDS)[:, :reset_at])
    other = actions.clone()
    other[:, reset_at - 1] = (other[:, reset_at - 1] + 1) % 3  # those that lead to the first frame after the reset
    assert not torch.equal(rollout(network, ids, other, reset_at, SEEDS)[:, reset_at:], first[:, reset_at:])


@pytest.mark.parametrize("stack", STACKS)
def test_a_reset_within_the_prompt_keeps_the_frames_after_it(stack: str):
    network, (ids, actions), rollout = model(**STACKS[stack]), inputs(4), Rollout(FrameDecoding(1, "frame"))
    made = [rollout(network, each, actions, 2, SEEDS)[:, 4:] for each in (ids, changed(ids, 1), changed(ids, 2))]
    assert torch.equal(made[0], made[1])
    assert not torch.equal(made[0], made[2])


@pytest.mark.parametrize(
    ("known", "reset_at", "expected"),
    [(FRAMES, None, "prompt has 7 frames.*6 actions"), (3, 0, "reset_at=0 .*1 to 6"), (3, 7, "reset_at=7 .*1 to 6")],
)
def test_values_out_of_range_raise(known: int, reset_at: int | None, expected: str):
    ids, actions = inputs(known)
    with pytest.raises(ValueError, match=expected):
        Rollout()(model(), ids, actions, reset_at)


def test_a_model_without_actions_raises():
    ids, actions = inputs()
    with pytest.raises(ValueError, match="num_actions=0"):
        Rollout()(model(num_actions=0), ids, actions)
