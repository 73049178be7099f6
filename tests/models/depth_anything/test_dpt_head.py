"""DPT head: equal to that of transformers, gradients, sizes, metric depth and temporal modules."""

import pytest
import torch
from transformers import DepthAnythingConfig, DepthAnythingForDepthEstimation, Dinov2Config

from blueberry_video.models.depth_anything.dpt import DPTHead

DIM, CHANNELS, FEATURES = 12, (4, 6, 8, 10), 8


def peer(max_depth: int | None = None) -> DepthAnythingForDepthEstimation:
    torch.manual_seed(0)
    backbone = Dinov2Config(
        hidden_size=DIM,
        num_hidden_layers=4,
        num_attention_heads=2,
        image_size=28,
        patch_size=14,
        out_indices=[1, 2, 3, 4],
        apply_layernorm=True,
        reshape_hidden_states=False,
    )
    config = DepthAnythingConfig(
        backbone_config=backbone,
        reassemble_hidden_size=DIM,
        patch_size=14,
        neck_hidden_sizes=list(CHANNELS),
        fusion_hidden_size=FEATURES,
        head_hidden_size=32,
        depth_estimation_type="relative" if max_depth is None else "metric",
        max_depth=max_depth or 1,
    )
    network = DepthAnythingForDepthEstimation(config).double().eval()
    for parameter in network.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return network


def ours(network: DepthAnythingForDepthEstimation, max_depth: float | None = None) -> DPTHead:
    """The head with the weights of the peer."""
    head = DPTHead(DIM, FEATURES, CHANNELS, max_depth=max_depth).double()
    weights = {}
    for name, value in network.state_dict().items():
        part, _, kind = name.rpartition(".")
        words = part.split(".")
        if part.startswith("neck.reassemble_stage"):
            target = f"{'projects' if words[4] == 'projection' else 'resize_layers'}.{words[3]}"
        elif part.startswith("neck.convs"):
            target = f"scratch.layer{int(words[2]) + 1}_rn"
        elif part.startswith("neck.fusion_stage"):
            inner = {"projection": "out_conv", "residual_layer1": "resConfUnit1", "residual_layer2": "resConfUnit2"}
            unit = f".{words[5].replace('convolution', 'conv')}" if len(words) > 5 else ""
            target = f"scratch.refinenet{4 - int(words[3])}.{inner[words[4]]}{unit}"
        elif part.startswith("head"):
            target = {"conv1": "output_conv1", "conv2": "output_conv2.0", "conv3": "output_conv2.2"}[words[1]]
            target = f"scratch.{target}"
        else:
            continue
        weights[f"{target}.{kind}"] = value
    head.load_state_dict(weights, strict=True)
    return head


@pytest.mark.parametrize("grid", [(2, 2), (3, 5)])
@pytest.mark.parametrize("max_depth", [None, 20])
def test_maps_and_gradients_equal_those_of_transformers(grid: tuple[int, int], max_depth: int | None):
    network = peer(max_depth)
    head = ours(network, max_depth)
    layers = [torch.randn(2, 1 + grid[0] * grid[1], DIM, dtype=torch.float64, requires_grad=True) for _ in range(4)]
    expected = network.head(network.neck(layers, *grid), *grid)
    found = head([layer[:, 1:] for layer in layers], grid)
    assert found.shape == (2, 14 * grid[0], 14 * grid[1])
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)
    weight = torch.randn_like(expected)
    for mine, theirs in zip(
        torch.autograd.grad((found * weight).sum(), layers, retain_graph=True),
        torch.autograd.grad((expected * weight).sum(), layers),
    ):
        torch.testing.assert_close(mine, theirs, rtol=1e-8, atol=1e-8)
        assert mine.abs().max() > 0


def test_temporal_modules_receive_the_coarse_maps():
    head, seen = DPTHead(DIM, FEATURES, CHANNELS), []
    layers = [torch.randn(2, 6, DIM) for _ in range(4)]

    def module(x: torch.Tensor) -> torch.Tensor:
        seen.append(tuple(x.shape))
        return x

    found = head(layers, (2, 3), [module] * 4)
    assert seen == [(2, 8, 2, 3), (2, 10, 1, 2), (2, FEATURES, 2, 3), (2, FEATURES, 4, 6)]
    assert torch.equal(found, head(layers, (2, 3)))


def test_numbers_of_parameters_are_those_of_the_published_sizes():
    """Totals of V2 less those of DINOv2: 24.79 M - 22.06 M, 97.47 M - 86.58 M, 335.32 M - 304.37 M."""
    sizes = {
        (384, 64, (48, 96, 192, 384)): 2.73,
        (768, 128, (96, 192, 384, 768)): 10.89,
        (1024, 256, (256, 512, 1024, 1024)): 30.95,
    }
    for (dim, features, channels), millions in sizes.items():
        with torch.device("meta"):
            head = DPTHead(dim, features, channels)
        assert sum(p.numel() for p in head.parameters()) / 1e6 == pytest.approx(millions, abs=0.01)


def test_bad_sizes_raise():
    with pytest.raises(ValueError, match=r"out_channels=\[4, 6, 8\]"):
        DPTHead(DIM, FEATURES, (4, 6, 8))
    with pytest.raises(ValueError, match=r"features=7"):
        DPTHead(DIM, 7, CHANNELS)
    with pytest.raises(ValueError, match=r"max_depth=0"):
        DPTHead(DIM, FEATURES, CHANNELS, max_depth=0)
    with pytest.raises(ValueError, match=r"\(2, 6, 12\).*\(3, 3\)"):
        DPTHead(DIM, FEATURES, CHANNELS)([torch.randn(2, 6, DIM)] * 4, (3, 3))
