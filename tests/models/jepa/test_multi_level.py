"""Multi-level encoder: tokens of several depths, concatenated along channels."""

import copy

import pytest
import torch
import torch.nn.functional as F

from blueberry_video.models.dinov2 import DINOv2
from blueberry_video.models.hydra_video.model import HydraVideo
from blueberry_video.models.jepa.multi_level import MultiLevelEncoder, normalize_levels
from blueberry_video.models.spool.model import Spool
from blueberry_video.models.vit import VisionTransformer


def encoder(depth: int) -> VisionTransformer:
    return VisionTransformer(16, 4, 8, 2, embed_dim=12, depth=depth, num_heads=2, final_norm=False)


def test_each_level_equals_the_normalized_shallower_encoder():
    deep = encoder(5)
    levels = MultiLevelEncoder(deep, 2)
    with torch.no_grad():
        for norm in levels.norms:
            norm.weight.uniform_(0.5, 2)
            norm.bias.normal_()
    video, keep = torch.randn(2, 3, 4, 16, 16), torch.tensor([[0, 3, 5], [1, 2, 7]])
    got = levels(video, keep)
    assert got.shape == (2, 3, 24)
    for number, depth in enumerate((2, 5)):
        shallow = copy.deepcopy(deep)
        shallow.blocks = shallow.blocks[:depth]
        torch.testing.assert_close(got[..., 12 * number :][..., :12], levels.norms[number](shallow(video, keep)))
    assert levels(video).shape == (2, 8, 24)


def test_removes_its_hooks_and_fulfills_the_encoder_contract():
    levels = MultiLevelEncoder(encoder(4), 4)
    levels(torch.randn(1, 3, 4, 16, 16))
    with pytest.raises(ValueError, match=r"\(3, 4, 16, 20\).*\(3, 4, 16, 16\)"):
        levels(torch.randn(1, 3, 4, 16, 20))
    assert not any(block._forward_hooks for block in levels.encoder.blocks)
    assert (levels.embed_dim, levels.patch_size, levels.num_tokens) == (48, (2, 8, 8), 8)
    levels(torch.randn(1, 3, 4, 16, 16)).sum().backward()
    assert all(parameter.grad is not None for parameter in levels.parameters())


def test_depths_equal_the_published_ones():
    for depth, expected in ((12, [2, 5, 8, 11]), (24, [5, 11, 17, 23]), (40, [9, 19, 29, 39])):
        with torch.device("meta"):
            assert MultiLevelEncoder(encoder(depth)).depths == expected


def test_more_levels_than_blocks_raise():
    with pytest.raises(ValueError, match=r"levels=3\b.*\b2\b"):
        MultiLevelEncoder(encoder(2), 3)


SMALL = {"image_size": 16, "num_frames": 4, "patch_size": 8, "embed_dim": 16, "num_heads": 2}


def frame_vit() -> VisionTransformer:
    return VisionTransformer(**SMALL, tubelet_size=1, depth=1, images=True)


@pytest.mark.parametrize("keep", [None, torch.tensor([[0, 1, 5]])])
@pytest.mark.parametrize(
    "make",
    [
        lambda: DINOv2(**SMALL, depth=2, table_size=2),
        lambda: Spool(frame_vit(), 2, 2, 1, 1, image_size=16, num_frames=4),
        lambda: HydraVideo(16, 4, 8, 1, embed_dim=16, depth=2, head_dim=8, state_dim=8),
    ],
    ids=["DINOv2", "Spool", "HydraVideo"],
)
def test_encoders_with_different_tokens_in_their_blocks_raise(make, keep, request):
    with pytest.raises(ValueError, match=rf"{request.node.callspec.id.split('-')[0]}\b.*\(1, (16|3)\)"):
        MultiLevelEncoder(make(), 2)(torch.randn(1, 3, 4, 16, 16), keep)


def test_levels_are_normalized_separately():
    tokens = torch.randn(2, 3, 12) * torch.tensor([1.0, 100.0]).repeat_interleave(6)
    got = normalize_levels(tokens, 2)
    torch.testing.assert_close(got[..., :6], F.layer_norm(tokens[..., :6], (6,)))
    torch.testing.assert_close(got[..., 6:], F.layer_norm(tokens[..., 6:], (6,)))
