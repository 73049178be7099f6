"""Configs of Depth Anything and Video Depth Anything: published sizes, on the meta device."""

import pytest
import torch
from hydra import compose, initialize_config_dir
from hydra.utils import instantiate
from torch import nn

from blueberry_video.config import CONF
from blueberry_video.models.depth_anything import DepthAnything, VideoDepthAnything

FILES = [f"{group}/{file.stem}" for group in ("depth_anything", "video_depth_anything")
         for file in sorted((CONF / "model" / group).glob("*.yaml"))]  # fmt: skip
PUBLISHED = {  # millions of parameters; of videos without the encoder's positions and unused parameters
    "depth_anything/small": 24.79,
    "depth_anything/base": 97.47,
    "depth_anything/large": 335.32,
    "depth_anything/giant": 1300,
    "video_depth_anything/small": 28.4,
    "video_depth_anything/base": 113.1,
    "video_depth_anything/large": 381.8,
}


def build(name: str):
    with initialize_config_dir(str(CONF), version_base=None):
        config = compose(overrides=[f"+model={name}"])
    with torch.device("meta"):
        return instantiate(config.model), config.model


def millions(module: nn.Module | nn.Parameter) -> float:
    parameters = module.parameters() if isinstance(module, nn.Module) else [module]
    return sum(parameter.numel() for parameter in parameters) / 1e6


@pytest.mark.parametrize("name", FILES)
def test_models_build_as_configured(name: str):
    model, config = build(name)
    video = name.startswith("video")
    assert type(model) is (VideoDepthAnything if video else DepthAnything)
    assert {parameter.device.type for parameter in model.parameters()} == {"meta"}
    assert (list(model.taps), model.max_depth) == (list(config.taps), config.max_depth)
    size, tiny = model.pretrained.video_size[-1], "tiny" in name
    assert (size, model.patch_size, model.pretrained.offset, model.pretrained.antialias) == (
        (64, 8, 0.1, False) if tiny else (518, 14, 0.1, False)
    )
    blocks = len(model.pretrained.blocks)
    assert not name.split("/")[1].startswith("v1") or list(model.taps) == list(range(blocks - 4, blocks))
    assert model.max_depth == (20.0 if "metric" in name else None)
    assert (model.pretrained.table_size, model.pretrained.layer_scale_init) == (8 if tiny else 37, 1.0)
    images = torch.zeros(1, 3, size, size, device="meta")
    assert model(images[:, :, None] if video else images).shape[-2:] == (size, size)


@pytest.mark.parametrize("name", PUBLISHED)
def test_numbers_of_parameters_are_the_published_ones(name: str):
    model, _ = build(name)
    found = millions(model)
    if name.startswith("video"):  # the published numbers leave out positions and unused parameters
        found -= millions(model.pretrained.pos_embed) + millions(model.head.scratch.refinenet4.resConfUnit1)
    assert found == pytest.approx(PUBLISHED[name], abs=50 if "giant" in name else 0.05 if "video" in name else 0.01)


def test_variants_of_a_size_differ_only_in_what_their_names_say():
    for size in ("small", "base", "large"):
        second = build(f"depth_anything/{size}")[1]
        for variant, keys in (("v1", {"taps"}), ("metric", {"max_depth"})):
            other = build(f"depth_anything/{variant}_{size}")[1]
            assert {key for key in second if second[key] != other[key]} == keys
    small, scan = (build(f"video_depth_anything/{name}")[1] for name in ("small", "small_scan"))
    assert {key for key in small if small[key] != scan[key]} == {"temporal"}
    tiny, *others = (build(f"video_depth_anything/{name}")[1] for name in ("tiny", "tiny_scan", "tiny_none"))
    assert all({key for key in tiny if tiny[key] != other[key]} == {"temporal"} for other in others)
