"""The classifier over an encoder; parity with transformers is in test_videomae_parity."""

import pytest
import torch

from blueberry_video.models import classifier
from blueberry_video.models.classifier import VideoClassifier
from blueberry_video.models.vit import VisionTransformer

VIDEO = torch.randn(2, 3, 4, 16, 16, generator=torch.Generator().manual_seed(0))


def tiny(**changes) -> VideoClassifier:
    torch.manual_seed(0)
    encoder = VisionTransformer(16, 4, 8, 2, embed_dim=16, depth=1, num_heads=2, final_norm=False, drop_path=0.5)
    return VideoClassifier(encoder, **{"num_classes": {"motion": 8, "shape": 3}, **changes})


@pytest.mark.parametrize("pooling", ["mean", "attentive"])
def test_every_parameter_receives_a_gradient(pooling):
    model = tiny(pooling=pooling, num_heads=2, head_init_scale=1.0).eval()
    logits = model(VIDEO)
    assert {name: tuple(value.shape) for name, value in logits.items()} == {"motion": (2, 8), "shape": (2, 3)}
    sum(torch.nn.functional.cross_entropy(value, torch.tensor([0, 2])) for value in logits.values()).backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.abs().max() > 0, name


def test_mean_pooling_is_the_normalised_mean_of_the_tokens():
    model = tiny(head_init_scale=100.0).eval()
    pooled = torch.stack([model.encoder(VIDEO)[:, n] for n in range(8)]).sum(0) / 8
    centred = pooled - pooled.mean(1, keepdim=True)
    normalised = centred / (centred.square().mean(1, keepdim=True) + 1e-6).sqrt()
    head = model.head.linear["shape"]
    torch.testing.assert_close(model(VIDEO)["shape"], normalised @ head.weight.T + head.bias, atol=1e-5, rtol=1e-5)


def test_a_frozen_encoder_stays_still():
    model = tiny(freeze_encoder=True).train()
    assert not model.encoder.training
    assert not model.encoder.blocks[0].training
    assert model.head.training
    assert not any(parameter.requires_grad for parameter in model.encoder.parameters())
    sum(value.square().sum() for value in model(VIDEO).values()).backward()
    assert all(parameter.grad is None for parameter in model.encoder.parameters())
    assert all(parameter.grad is not None for parameter in model.head.parameters())
    assert tiny().train().encoder.training


def test_head_starts_a_thousand_times_smaller():
    weight = tiny().head.linear["motion"].weight
    assert weight.std().item() == pytest.approx(0.02 / 1000, rel=0.25)
    assert not tiny().head.linear["motion"].bias.any()


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"pooling": "max"}, "pooling='max' is unknown"),
        ({"num_classes": {}}, "num_classes is empty"),
        ({"pooling": "attentive", "num_heads": 3}, "num_heads=3 does not divide the width 16"),
        ({"pooling": "attentive", "num_heads": 0}, "num_heads=0 does not divide the width 16"),
    ],
)
def test_bad_arguments_are_refused(changes, text):
    with pytest.raises(ValueError, match=text):
        tiny(**changes)


def published() -> dict[str, torch.Tensor]:
    """A fine-tuned file in the original's names."""
    state = dict(tiny().encoder.state_dict())
    ones = torch.ones(16)
    return state | {
        "fc_norm.weight": ones,
        "fc_norm.bias": ones,
        "head.weight": torch.ones(5, 16),
        "head.bias": ones[:5],
    }


def load(path) -> VideoClassifier:
    return classifier.from_published(path, num_frames=4, image_size=16, num_heads=2)


def test_published_head_takes_the_name_given(tmp_path):
    torch.save({"model": published()}, tmp_path / "ok.pth")
    assert load(tmp_path / "ok.pth")(VIDEO)["action"].shape == (2, 5)
    named = classifier.from_published(tmp_path / "ok.pth", "verb", num_frames=4, image_size=16, num_heads=2)
    assert set(named(VIDEO)) == {"verb"}


@pytest.mark.parametrize("absent", ["fc_norm.weight", "head.weight"])
def test_a_file_without_classifier_is_refused(absent, tmp_path):
    state = published()
    del state[absent]
    torch.save(state, tmp_path / "wrong.pth")
    with pytest.raises(ValueError, match=r"no fine-tuned VideoMAE.*masked_autoencoder\.from_published"):
        load(tmp_path / "wrong.pth")


@pytest.mark.parametrize("absent", ["fc_norm.bias", "head.bias", "blocks.0.norm1.bias"])
def test_a_missing_weight_is_named(absent, tmp_path):
    state = published()
    del state[absent]
    torch.save(state, tmp_path / "wrong.pth")
    with pytest.raises(RuntimeError, match=f"(?s)Missing key.*{absent.replace('head', 'head.linear.action')}"):
        load(tmp_path / "wrong.pth")


def test_learned_positions_are_not_dropped_in_silence(tmp_path):
    torch.save({**published(), "pos_embed": torch.zeros(1, 8, 16)}, tmp_path / "wrong.pth")
    with pytest.raises(RuntimeError, match=r"(?s)Unexpected key.*pos_embed"):
        load(tmp_path / "wrong.pth")
