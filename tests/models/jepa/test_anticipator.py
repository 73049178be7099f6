"""The anticipator: what its head is shown, what is trained, and that it takes the weights of a JEPA."""

import pytest
import torch
from torch import Tensor

from blueberry_video.models.jepa import model as jepa
from blueberry_video.models.jepa.anticipator import AnticipationHead, Anticipator, load_weights
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
def test_the_head_looks_at_the_past_and_at_what_is_predicted_behind_it(sees):
    network, clip, skip = model(sees=sees, length=2), video(), torch.tensor([1, 4])
    past = network.encoder(clip)  # 2 steps of 2 x 2 tokens
    shown = [past]
    if network.predictor is not None:
        first = (2 + skip) * 4
        places = first[:, None] + torch.arange(8)
        future = network.predictor(past, torch.arange(8).expand(2, -1), places, 1, (99, 2, 2))
        shown = [future] if sees == "future" else [past, future]
    expected = network.head(torch.cat(shown, dim=1))
    assert {name: tuple(scores.shape) for name, scores in expected.items()} == {"verb": (2, 3), "noun": (2, 4)}
    torch.testing.assert_close(network(clip, skip), expected, **TOLERANCE)


def test_how_far_ahead_matters_to_the_future_alone():
    clip = video()
    for sees, differs in (("past", False), ("both", True)):
        network = model(sees=sees)
        near, far = (network(clip, skip)["verb"] for skip in (0, 5))
        assert torch.equal(near, far) != differs


def test_frozen_it_trains_its_head_alone():
    for freeze in (True, False):
        network = model(freeze=freeze).train()
        modes = [part.training for part in (network.encoder, network.predictor, network.head)]
        assert modes == [not freeze, not freeze, True]
        sum(scores.square().sum() for scores in network(video()).values()).backward()
        trained = {name for name, parameter in network.named_parameters() if parameter.grad is not None}
        assert trained == {name for name, _ in network.named_parameters() if name.startswith("head.") or not freeze}


@pytest.mark.parametrize("which", ["encoder", "target_encoder"])
@pytest.mark.parametrize("layout", ["own", "original"])
def test_it_takes_encoder_and_predictor_of_a_jepa(which, layout, tmp_path):
    trained = JEPA(encoder(), **PREDICTOR)
    for parameter in trained.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    state = trained.state_dict()
    own = {"state_dict": {f"model.{name}": value for name, value in state.items()}}
    torch.save(own if layout == "own" else jepa.to_original(state), tmp_path / "jepa.pt")
    network = model()
    assert "the head starts anew" in load_weights(network, jepa.read_weights(tmp_path / "jepa.pt", which))
    torch.testing.assert_close(network.encoder.state_dict(), getattr(trained, which).state_dict())
    torch.testing.assert_close(network.predictor.state_dict(), trained.predictor.state_dict())
    blind = model(sees="past")
    load_weights(blind, jepa.read_weights(tmp_path / "jepa.pt", which))
    torch.testing.assert_close(blind.encoder.state_dict(), getattr(trained, which).state_dict())


def test_it_takes_its_own_weights_with_the_head(tmp_path):
    trained, network = model(), model()
    torch.nn.init.normal_(trained.head.pool.query)
    torch.save(trained.state_dict(), tmp_path / "own.pt")
    said = load_weights(network, jepa.read_weights(tmp_path / "own.pt", "encoder"))
    assert "the head is theirs" in said
    torch.testing.assert_close(network.state_dict(), trained.state_dict())


def test_weights_that_do_not_fit_are_refused(tmp_path):
    torch.save(JEPA(encoder(), **PREDICTOR | {"predictor_depth": 3}).state_dict(), tmp_path / "deeper.pt")
    with pytest.raises(ValueError, match=r"12 weights are missing, left over.*predictor\.blocks\.2"):
        load_weights(model(), jepa.read_weights(tmp_path / "deeper.pt", "encoder"))
    torch.save(model().state_dict(), tmp_path / "own.pt")
    with pytest.raises(ValueError, match=r"'target_encoder' among the weights in .*own\.pt.*task\.weights_of=encoder"):
        jepa.read_weights(tmp_path / "own.pt", "target_encoder")
    with pytest.raises(ValueError, match=r"no 'teacher' among the weights in .*own\.pt"):
        jepa.read_weights(tmp_path / "own.pt", "teacher")


def test_what_anticipation_never_needs_is_left_out(tmp_path):
    trained, network = JEPA(encoder(), **PREDICTOR, predictor_context=True), model()
    torch.save(trained.state_dict(), tmp_path / "dense.pt")
    assert "the head starts anew" in load_weights(network, jepa.read_weights(tmp_path / "dense.pt", "encoder"))
    torch.testing.assert_close(network.predictor.mask_tokens, trained.predictor.mask_tokens)


@pytest.mark.parametrize("classes", [{"verb": 3, "noun": 5}, {"verb": 3}, {"verb": 3, "noun": 4, "action": 9}], ids=str)
def test_a_head_of_other_classes_is_left_out_and_said(classes, tmp_path):
    trained, network = model(), Anticipator(encoder(), classes, **PREDICTOR, num_heads=2, pool_depth=2)
    before = {name: value.clone() for name, value in network.head.state_dict().items()}
    torch.save(trained.state_dict(), tmp_path / "own.pt")
    said = load_weights(network, jepa.read_weights(tmp_path / "own.pt", "encoder"))
    assert "the head starts anew: theirs was left out, since it has not this model's num_classes" in said
    torch.testing.assert_close(network.head.state_dict(), before, rtol=0, atol=0)
    torch.testing.assert_close(network.encoder.state_dict(), trained.encoder.state_dict())


def test_the_probe_of_an_original_file_fits_the_head():
    """Its names: pooler, and a classifier for each of verb, noun and action."""
    head = AnticipationHead(8, {"verb": 3, "noun": 4, "action": 5}, num_heads=2, depth=3)
    renamed = {}
    for name, value in head.state_dict().items():
        for theirs, ours in jepa.ORIGINAL_PROBE[:2] + jepa.ORIGINAL_PROBE[3:]:
            if name.startswith(ours) and (ours != "pool." or not name.startswith(("pool.blocks", "pool.query"))):
                name = theirs + name.removeprefix(ours)
        name = name.replace("cross_attention_block.xattn.norm", "cross_attention_block.norm")
        name = name.replace("cross_attention_block.xattn.mlp", "cross_attention_block.mlp")
        parts = name.split(".")
        name = ".".join([f"{parts[1]}_classifier", *parts[2:]]) if parts[0] == "linear" else name
        renamed[f"module.{name}"] = value
    converted = jepa.convert_probe(renamed, "action")
    assert converted.keys() == head.state_dict().keys()
    head.load_state_dict(converted)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"sees": "all"}, "sees='all' is unknown"),
        ({"length": 0}, "length=0 must be 1 or more"),
        ({"mask_index": 3}, "mask_index=3 below num_mask_tokens=3"),
    ],
)
def test_bad_arguments_are_refused(changes, said):
    with pytest.raises(ValueError, match=said):
        model(**changes)
