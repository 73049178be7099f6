"""Anticipator: inputs of its head, trainable parts, and loading the weights of a JEPA."""

import re

import pytest
import torch
from torch import Tensor

from blueberry_video.models.jepa import convert
from blueberry_video.models.jepa.anticipator import AnticipationHead, Anticipator
from blueberry_video.models.jepa.model import JEPA
from blueberry_video.models.vit import VisionTransformer

CLASSES = {"verb": 3, "noun": 4}
PREDICTOR = {"predictor_dim": 12, "predictor_depth": 2, "predictor_num_heads": 2, "num_mask_tokens": 3}
TOLERANCE = {"atol": 1e-5, "rtol": 1e-5}


def encoder() -> VisionTransformer:
    sizes = {"image_size": 16, "num_frames": 8, "patch_size": 8, "tubelet_size": 2}
    return VisionTransformer(**sizes, embed_dim=24, depth=2, num_heads=2, positions="rope_3d", qkv_bias="qkv")


def model(**changes) -> Anticipator:
    torch.manual_seed(0)
    network = Anticipator(encoder(), CLASSES, **PREDICTOR, **{"num_heads": 2, "pool_depth": 2, **changes}).eval()
    with torch.no_grad():
        for parameter in network.parameters():
            torch.nn.init.normal_(parameter, std=0.3)
    return network


def video(batch: int = 2, frames: int = 4) -> Tensor:
    return torch.randn(batch, 3, frames, 16, 16)


@pytest.mark.parametrize("sees", ["past", "future", "both"])
def test_head_receives_past_tokens_and_predicted_future_tokens(sees):
    network, clip, skip = model(sees=sees, length=2), video(), torch.tensor([1, 4])
    past = network.encoder(clip)  # 2 steps of 2 x 2 tokens
    tokens = [past]
    if network.predictor is not None:
        first = (2 + skip) * 4
        positions = first[:, None] + torch.arange(8)
        future = network.predictor(past, torch.arange(8).expand(2, -1), positions, 1, (99, 2, 2))
        tokens = [future] if sees == "future" else [past, future]
    expected = network.head(torch.cat(tokens, dim=1))
    assert {name: tuple(scores.shape) for name, scores in expected.items()} == {"verb": (2, 3), "noun": (2, 4)}
    torch.testing.assert_close(network(clip, skip), expected, **TOLERANCE)


def test_skip_affects_only_the_predicted_future():
    clip = video()
    for sees, differs in (("past", False), ("both", True)):
        network = model(sees=sees)
        near, far = (network(clip, skip)["verb"] for skip in (0, 5))
        assert torch.equal(near, far) != differs


def test_freeze_leaves_only_the_head_trainable():
    for freeze in (True, False):
        network = model(freeze=freeze).train()
        modes = [part.training for part in (network.encoder, network.predictor, network.head)]
        assert modes == [not freeze, not freeze, True]
        sum(scores.square().sum() for scores in network(video()).values()).backward()
        trained = {name for name, parameter in network.named_parameters() if parameter.grad is not None}
        assert trained == {name for name, _ in network.named_parameters() if name.startswith("head.") or not freeze}


@pytest.mark.parametrize("which", ["encoder", "target_encoder"])
@pytest.mark.parametrize("layout", ["own", "original"])
def test_loads_encoder_and_predictor_of_a_jepa(which, layout, tmp_path):
    trained = JEPA(encoder(), **PREDICTOR)
    for parameter in trained.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    state = trained.state_dict()
    own = {"state_dict": {f"model.{name}": value for name, value in state.items()}}
    torch.save(own if layout == "own" else convert.to_original(state), tmp_path / "jepa.pt")
    network = model()
    network.load_published(tmp_path / "jepa.pt", which)
    torch.testing.assert_close(network.encoder.state_dict(), getattr(trained, which).state_dict())
    torch.testing.assert_close(network.predictor.state_dict(), trained.predictor.state_dict())
    without_predictor = model(sees="past")
    without_predictor.load_published(tmp_path / "jepa.pt", which)
    torch.testing.assert_close(without_predictor.encoder.state_dict(), getattr(trained, which).state_dict())


def test_own_weights_load_with_the_head(tmp_path):
    trained, network = model(), model()
    torch.nn.init.normal_(trained.head.pool.query)
    torch.save(trained.state_dict(), tmp_path / "own.pt")
    network.load_published(tmp_path / "own.pt", "encoder")
    torch.testing.assert_close(network.state_dict(), trained.state_dict())


def test_weights_that_do_not_fit_raise(tmp_path):
    torch.save(JEPA(encoder(), **PREDICTOR | {"predictor_depth": 3}).state_dict(), tmp_path / "deeper.pt")
    with pytest.raises(ValueError, match=r"(?s)\b12 unexpected.*predictor\.blocks\.2"):
        model().load_published(tmp_path / "deeper.pt", "encoder")
    torch.save(model().state_dict(), tmp_path / "own.pt")
    with pytest.raises(ValueError, match=r"(?s)(?=.*own\.pt).*'target_encoder'.*task\.weights_of=encoder"):
        convert.read_published(tmp_path / "own.pt", "target_encoder")
    with pytest.raises(ValueError, match=r"(?s)(?=.*own\.pt).*'teacher'.*task\.weights_of=encoder"):
        convert.read_published(tmp_path / "own.pt", "teacher")


def test_context_projection_of_the_predictor_is_ignored(tmp_path):
    trained, network = JEPA(encoder(), **PREDICTOR, predictor_context=True), model()
    torch.save(trained.state_dict(), tmp_path / "dense.pt")
    network.load_published(tmp_path / "dense.pt", "encoder")
    torch.testing.assert_close(network.predictor.mask_tokens, trained.predictor.mask_tokens)


@pytest.mark.parametrize("classes", [{"verb": 3, "noun": 5}, {"verb": 3}, {"verb": 3, "noun": 4, "action": 9}], ids=str)
def test_head_with_different_classes_is_ignored_and_reported(classes, tmp_path):
    trained, network = model(), Anticipator(encoder(), classes, **PREDICTOR, num_heads=2, pool_depth=2)
    before = {name: value.clone() for name, value in network.head.state_dict().items()}
    torch.save(trained.state_dict(), tmp_path / "own.pt")
    report = network.load_published(tmp_path / "own.pt", "encoder")
    assert re.search(r"head.*num_classes", report)
    torch.testing.assert_close(network.head.state_dict(), before, rtol=0, atol=0)
    torch.testing.assert_close(network.encoder.state_dict(), trained.encoder.state_dict())


def test_original_probe_converts_to_the_head():
    """The original names are pooler, and one classifier each for verb, noun and action."""
    head = AnticipationHead(8, {"verb": 3, "noun": 4, "action": 5}, num_heads=2, depth=3)
    renamed = {}
    for name, value in head.state_dict().items():
        for theirs, ours in convert.ORIGINAL_PROBE[:2] + convert.ORIGINAL_PROBE[3:]:
            if name.startswith(ours) and (ours != "pool." or not name.startswith(("pool.blocks", "pool.query"))):
                name = theirs + name.removeprefix(ours)
        name = name.replace("cross_attention_block.xattn.norm", "cross_attention_block.norm")
        name = name.replace("cross_attention_block.xattn.mlp", "cross_attention_block.mlp")
        parts = name.split(".")
        name = ".".join([f"{parts[1]}_classifier", *parts[2:]]) if parts[0] == "linear" else name
        renamed[f"module.{name}"] = value
    converted = convert.convert_probe(renamed, "action")
    assert converted.keys() == head.state_dict().keys()
    head.load_state_dict(converted)


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"sees": "all"}, "sees='all'.*'past'.*'future'.*'both'"),
        ({"length": 0}, r"length=0\b"),
        ({"mask_index": 3}, r"mask_index=3\b.*num_mask_tokens=3\b"),
    ],
)
def test_bad_arguments_raise(changes, expected):
    with pytest.raises(ValueError, match=expected):
        model(**changes)


@pytest.mark.parametrize("sees", ["future", "both"])
def test_further_steps_predict_from_the_predictions(sees):
    """V-JEPA 2: the context moves on by the predicted tokens, at unchanged positions of context and targets."""
    network, clip = model(sees=sees, num_steps=3), video()
    context = network.encoder(clip)  # 2 steps of 2 x 2 tokens
    tokens = [] if sees == "future" else [context]
    positions, targets = torch.arange(8).expand(2, -1), (2 + 1) * 4 + torch.arange(4).expand(2, -1)
    for _ in range(3):
        tokens.append(network.predictor(context, positions, targets, 1, (99, 2, 2)))
        context = torch.cat([context[:, 4:], tokens[-1]], dim=1)
    torch.testing.assert_close(network(clip, 1), network.head(torch.cat(tokens, dim=1)), **TOLERANCE)
    with pytest.raises(ValueError, match=r"num_steps=0\b"):
        model(num_steps=0)
