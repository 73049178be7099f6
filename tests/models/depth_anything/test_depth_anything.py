"""DepthAnything: equal to transformers, conversions both ways, published sizes, and bad input."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from transformers import DepthAnythingConfig, DepthAnythingForDepthEstimation, Dinov2Config

from blueberry_video.models.depth_anything import DepthAnything
from blueberry_video.models.depth_anything.convert import convert_published, to_published
from blueberry_video.models.dinov2 import DINOv2

CHANNELS, FEATURES, TAPS = (4, 6, 8, 10), 8, (1, 2, 4, 5)


def peer(swiglu: bool = False, max_depth: int | None = None) -> DepthAnythingForDepthEstimation:
    torch.manual_seed(0)
    backbone = Dinov2Config(
        hidden_size=16,
        num_hidden_layers=6,
        num_attention_heads=2,
        image_size=56,
        patch_size=14,
        use_swiglu_ffn=swiglu,
        out_indices=[tap + 1 for tap in TAPS],
        apply_layernorm=True,
        reshape_hidden_states=False,
    )
    config = DepthAnythingConfig(
        backbone_config=backbone,
        reassemble_hidden_size=16,
        patch_size=14,
        neck_hidden_sizes=list(CHANNELS),
        fusion_hidden_size=FEATURES,
        head_hidden_size=32,
        depth_estimation_type="relative" if max_depth is None else "metric",
        max_depth=max_depth or 1,
    )
    network = DepthAnythingForDepthEstimation(config).eval()
    for name, parameter in network.named_parameters():  # large positions: otherwise their interpolation hardly matters
        torch.nn.init.normal_(parameter, std=1.0 if "position_embeddings" in name else 0.15)
    torch.nn.init.constant_(network.head.conv3.bias, 0.5)
    return network


def ours(swiglu: bool = False, max_depth: int | None = None, offset: float | None = 0.0) -> DepthAnything:
    encoder = DINOv2(56, 1, 14, 16, 6, 2, swiglu=swiglu, table_size=4, interpolate_offset=offset)
    return DepthAnything(encoder, TAPS, FEATURES, CHANNELS, max_depth).eval()


@pytest.mark.parametrize("swiglu", [False, True])
@pytest.mark.parametrize("size", [(56, 56), (28, 70), (84, 42)])
@pytest.mark.parametrize("max_depth", [None, 80])
def test_maps_and_gradients_equal_those_of_transformers(swiglu: bool, size: tuple[int, int], max_depth: int | None):
    network, model = peer(swiglu, max_depth), ours(swiglu, max_depth)
    model.load_state_dict(convert_published(network.state_dict(), "a test"))
    images = torch.randn(2, 3, *size)
    expected, found = network(images).predicted_depth, model(images)
    assert found.shape == (2, *size)
    scale = expected.abs().max()
    assert scale > 0
    assert (found - expected).abs().max() <= 1e-5 * scale
    weight = torch.randn_like(expected)
    for output in (expected, found):
        (output * weight).sum().backward()
    gradients = {name: parameter.grad for name, parameter in network.named_parameters()}
    gradients = convert_published(
        {name: torch.zeros(1) if value is None else value for name, value in gradients.items()}, "a test"
    )
    for name, parameter in model.named_parameters():
        if "refinenet4.resConfUnit1" in name:
            assert parameter.grad is None  # unused, as in the original
            continue
        reference = gradients[name]
        assert (parameter.grad - reference).abs().max() <= 1e-4 * reference.abs().max().clamp(min=1e-6), name


@pytest.mark.parametrize("huggingface", [False, True])
def test_conversion_is_a_round_trip(huggingface: bool):
    model = ours(swiglu=True)
    state = model.state_dict()
    again = convert_published(to_published(state, huggingface), "a test")
    assert again.keys() == state.keys()
    assert all(torch.equal(again[name], value) for name, value in state.items())
    if huggingface:
        published = set(peer(True).state_dict())
        mine = set(to_published(state, True))
        assert {name for name in mine if not name.startswith("backbone.")} == {
            name for name in published if not name.startswith("backbone.")
        }


@pytest.mark.parametrize(
    ("width", "depth", "heads", "features", "channels", "taps", "millions"),
    [
        (384, 12, 6, 64, (48, 96, 192, 384), (2, 5, 8, 11), 24.79),
        (768, 12, 12, 128, (96, 192, 384, 768), (2, 5, 8, 11), 97.47),
        (1024, 24, 16, 256, (256, 512, 1024, 1024), (4, 11, 17, 23), 335.32),
    ],
)
def test_published_sizes(width, depth, heads, features, channels, taps, millions):
    with torch.device("meta"):
        model = DepthAnything(DINOv2(518, 1, 14, width, depth, heads), taps, features, channels)
    mask_token = width  # of the published file, unused
    count = sum(parameter.numel() for parameter in model.parameters()) + mask_token
    assert count / 1e6 == pytest.approx(millions, abs=0.006)


@pytest.mark.parametrize("huggingface", [False, True])
def test_a_published_file_is_loaded(tmp_path: Path, huggingface: bool):
    model, other = ours(), ours()
    torch.nn.init.normal_(model.depth_head.projects[0].weight)
    file = tmp_path / "weights.safetensors"
    save_file({name: value.contiguous() for name, value in to_published(model.state_dict(), huggingface).items()}, file)
    assert str(file) in other.load_published(file)
    images = torch.randn(1, 3, 56, 56)
    assert torch.equal(other(images), model(images))
    with pytest.raises(ValueError, match=r"weights\.safetensors"):
        ours(swiglu=True).load_published(file)


def test_bad_input_raises():
    with pytest.raises(ValueError, match=r"taps=\[2, 1, 4, 5\]"):
        DepthAnything(DINOv2(56, 1, 14, 16, 6, 2, table_size=4), (2, 1, 4, 5), FEATURES, CHANNELS)
    with pytest.raises(ValueError, match=r"taps=\[1, 2, 4, 6\]"):
        DepthAnything(DINOv2(56, 1, 14, 16, 6, 2, table_size=4), (1, 2, 4, 6), FEATURES, CHANNELS)
    with pytest.raises(ValueError, match=r"\(2, 3, 1, 56, 56\)"):
        ours()(torch.zeros(2, 3, 1, 56, 56))
    with pytest.raises(ValueError, match=r"56 x 70"):
        ours()(torch.zeros(2, 3, 56, 65))
    with pytest.raises(ValueError, match=r"a test"):
        convert_published({"blocks.0.weight": torch.zeros(1)}, "a test")
    with pytest.raises(ValueError, match=r"neck\.other\.weight"):
        convert_published({"neck.other.weight": torch.zeros(1)} | peer().state_dict(), "a test")
