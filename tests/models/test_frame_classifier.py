"""Classifier of time steps: the scores of a time step depend on its own tokens."""

import pytest
import torch

from blueberry_video.models.classifier import FrameClassifier
from blueberry_video.models.vit import VisionTransformer


def model(**changes) -> FrameClassifier:
    encoder = VisionTransformer(
        image_size=16, num_frames=6, patch_size=8, tubelet_size=2, embed_dim=12, depth=1, num_heads=2
    )
    return FrameClassifier(encoder, **{"num_classes": {"motion": 8, "size": 2}, **changes})


def test_time_step_is_scored_from_its_own_tokens():
    built, video = model().eval(), torch.randn(2, 3, 6, 16, 16)
    scores = built(video)
    assert {name: tuple(value.shape) for name, value in scores.items()} == {"motion": (2, 3, 8), "size": (2, 3, 2)}
    tokens = built.encoder(video)
    for step in range(3):
        own = built.head.norm(tokens[:, 4 * step : 4 * step + 4].mean(dim=1))
        torch.testing.assert_close(scores["motion"][:, step], built.head.linear["motion"](own))


def test_every_parameter_receives_a_gradient():
    built = model()
    sum(value.square().sum() for value in built(torch.randn(2, 3, 6, 16, 16)).values()).backward()
    assert all((parameter.grad != 0).any() for parameter in built.parameters() if parameter.requires_grad)


def test_frozen_encoder_stays_in_eval_mode_without_gradients():
    built = model(freeze_encoder=True).train()
    assert not built.encoder.training
    assert {name.split(".")[0] for name, value in built.named_parameters() if value.requires_grad} == {"head"}


def test_empty_num_classes_raises():
    with pytest.raises(ValueError, match="num_classes"):
        model(num_classes={})
