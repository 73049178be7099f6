"""The classifier of moments: every moment from its own tokens."""

import pytest
import torch

from blueberry_video.models.classifier import FrameClassifier
from blueberry_video.models.vit import VisionTransformer


def model(**changes) -> FrameClassifier:
    encoder = VisionTransformer(
        image_size=16, num_frames=6, patch_size=8, tubelet_size=2, embed_dim=12, depth=1, num_heads=2
    )
    return FrameClassifier(encoder, **{"num_classes": {"motion": 8, "size": 2}, **changes})


def test_a_moment_is_scored_from_its_own_tokens():
    built, video = model().eval(), torch.randn(2, 3, 6, 16, 16)
    scores = built(video)
    assert {name: tuple(value.shape) for name, value in scores.items()} == {"motion": (2, 3, 8), "size": (2, 3, 2)}
    tokens = built.encoder(video)
    for moment in range(3):
        own = built.head.norm(tokens[:, 4 * moment : 4 * moment + 4].mean(dim=1))
        torch.testing.assert_close(scores["motion"][:, moment], built.head.linear["motion"](own))


def test_every_parameter_receives_a_gradient():
    built = model()
    sum(value.square().sum() for value in built(torch.randn(2, 3, 6, 16, 16)).values()).backward()
    assert all((parameter.grad != 0).any() for parameter in built.parameters() if parameter.requires_grad)


def test_a_frozen_encoder_stays_as_it_is():
    built = model(freeze_encoder=True).train()
    assert not built.encoder.training
    assert {name.split(".")[0] for name, value in built.named_parameters() if value.requires_grad} == {"head"}


def test_no_label_is_refused():
    with pytest.raises(ValueError, match="num_classes is empty"):
        model(num_classes={})
