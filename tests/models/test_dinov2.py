"""DINOv2: parity with transformers and with the original's position interpolation, round trips of weights, errors."""

import math
import re

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import Dinov2Config, Dinov2Model, Dinov2WithRegistersConfig, Dinov2WithRegistersModel

from blueberry_video.models import dinov2
from blueberry_video.models.dinov2 import DINOv2
from blueberry_video.nn.patches import gather_tokens

SIZES = {"patch_size": 4, "embed_dim": 16, "depth": 2, "num_heads": 2, "table_size": 3, "image_size": 12}
VARIANTS = [{}, {"num_registers": 3}, {"swiglu": True}, {"swiglu": True, "num_registers": 1}]


def tiny(**changes) -> DINOv2:
    """DINOv2 with random values in every parameter, so that a dropped bias or scale changes the output."""
    torch.manual_seed(0)
    model = DINOv2(**{**SIZES, **changes}).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.3)
    return model


def clips(frames: int = 2, size: tuple[int, int] = (12, 12), batch: int = 2) -> Tensor:
    return torch.randn(batch, 3, frames, *size)


def theirs(num_registers: int = 0, swiglu: bool = False) -> nn.Module:
    """transformers' model of the same size, with random weights."""
    sizes = {
        "hidden_size": 16,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "image_size": 12,
        "patch_size": 4,
        "use_swiglu_ffn": swiglu,
    }
    torch.manual_seed(1)
    if num_registers:
        model = Dinov2WithRegistersModel(Dinov2WithRegistersConfig(**sizes, num_register_tokens=num_registers))
    else:
        model = Dinov2Model(Dinov2Config(**sizes))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.3)
    return model.eval()


# ---- parity ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("variant", VARIANTS, ids=str)
@pytest.mark.parametrize("size", [(12, 12), (16, 24), (8, 12)], ids=str)
def test_equals_transformers_with_gradients(variant, size):
    other = theirs(**variant)
    model = tiny(**variant, interpolate_offset=0.0)
    model.load_state_dict(dinov2.convert_huggingface(other.state_dict()))
    images = clips(1, size)
    expected = other(images[:, :, 0]).last_hidden_state
    before = 1 + variant.get("num_registers", 0)
    ours = model(images)
    torch.testing.assert_close(ours, expected[:, before:], atol=1e-5, rtol=1e-5)
    [(patches, token)] = model.tokens_behind(images, (1,))
    torch.testing.assert_close(patches, ours)
    torch.testing.assert_close(token, expected[:, 0], atol=1e-5, rtol=1e-5)

    weights = torch.randn_like(ours)
    (ours * weights).sum().backward()
    (expected[:, before:] * weights).sum().backward()
    gradients = {name: parameter.grad for name, parameter in other.named_parameters() if parameter.grad is not None}
    converted = dinov2.convert_huggingface(gradients)
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, converted[name], atol=1e-4, rtol=1e-5, msg=name)


@torch.no_grad()
def test_intermediate_tokens_are_the_normalized_hidden_states():
    other = theirs(num_registers=2)
    model = tiny(num_registers=2)
    model.load_state_dict(dinov2.convert_huggingface(other.state_dict()))
    images = clips(1)
    hidden = other(images[:, :, 0], output_hidden_states=True).hidden_states
    for (patches, token), state in zip(model.tokens_behind(images, (0, 1)), hidden[1:], strict=True):
        normed = other.layernorm(state)
        torch.testing.assert_close(patches, normed[:, 3:], atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(token, normed[:, 0], atol=1e-5, rtol=1e-5)
    for wrong in ((0, 2), (1, 0), (-1,)):
        with pytest.raises(ValueError, match=rf"{re.escape(str(wrong))}.*\b0\b.*\b1\b"):
            model.tokens_behind(images, wrong)
    with pytest.raises(ValueError, match=r"\(0,\).*\b2\b"):
        model.tokens_behind(clips(2), (0,))


def cubic(x: float, a: float = -0.75) -> float:
    x = abs(x)
    if x <= 1:
        return (a + 2) * x**3 - (a + 3) * x**2 + 1
    return a * x**3 - 5 * a * x**2 + 8 * a * x - 4 * a if x < 2 else 0.0


def resized(line: Tensor, size: int, scale: float) -> Tensor:
    """Bicubic interpolation of (M, D) to (size, D), from its definition."""
    out = []
    for i in range(size):
        centre = (i + 0.5) / scale - 0.5
        first = math.floor(centre) - 1
        taps = [(cubic(centre - j), line[min(max(j, 0), len(line) - 1)]) for j in range(first, first + 4)]
        out.append(sum(weight * row for weight, row in taps))
    return torch.stack(out)


@torch.no_grad()
@pytest.mark.parametrize(("offset", "changes"), [(0.1, {}), (0.0, {"interpolate_offset": 0.0})])
def test_position_interpolation_equals_the_original(offset, changes):
    model = tiny(**changes).double()
    table = model.pos_embed[0, 1:].unflatten(0, (3, 3))
    rows = resized(table.flatten(1), 5, (5 + offset) / 3).unflatten(1, (3, 16))
    both = resized(rows.transpose(0, 1).flatten(1), 2, (2 + offset) / 3).unflatten(1, (5, 16)).transpose(0, 1)
    torch.testing.assert_close(model._positions(5, 2), both.flatten(0, 1), atol=1e-5, rtol=1e-5)
    assert torch.equal(model._positions(3, 3), model.pos_embed[0, 1:])


def test_registers_default_to_antialiased_interpolation_without_offset():
    model = tiny(num_registers=1)
    table = model.pos_embed[0, 1:].unflatten(0, (3, 3)).permute(2, 0, 1)[None]
    expected = F.interpolate(table, size=(2, 2), mode="bicubic", antialias=True)[0].flatten(1).T
    torch.testing.assert_close(model._positions(2, 2), expected)
    assert not torch.allclose(tiny()._positions(2, 2), expected, atol=1e-2)


# ---- weights ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("variant", VARIANTS, ids=str)
def test_layouts_round_trip(variant, tmp_path):
    model = tiny(**variant)
    for to, back in (
        (dinov2.to_original, dinov2.convert_original),
        (dinov2.to_huggingface, dinov2.convert_huggingface),
    ):
        again = back(to(model.state_dict()))
        assert again.keys() == model.state_dict().keys()
        assert all(torch.equal(value, model.state_dict()[name]) for name, value in again.items())
    torch.save(dinov2.to_original(model.state_dict()), tmp_path / "original.pth")
    loaded = DINOv2.from_published(tmp_path / "original.pth", image_size=12, num_heads=2).eval()
    video = clips(1, (16, 8))
    assert torch.equal(loaded(video), model(video))
    initialized = DINOv2(**SIZES, **variant, weights=str(tmp_path / "original.pth")).eval()
    assert torch.equal(initialized(video), model(video))


@torch.no_grad()
@pytest.mark.parametrize("variant", VARIANTS, ids=str)
def test_saved_folders_round_trip_with_transformers(variant, tmp_path):
    other, model = theirs(**variant), tiny(**variant, interpolate_offset=0.0)
    other.config.save_pretrained(tmp_path)
    save_file(
        {name: value.contiguous() for name, value in dinov2.to_huggingface(model.state_dict()).items()},
        tmp_path / "model.safetensors",
        metadata={"format": "pt"},
    )
    again, found = type(other).from_pretrained(tmp_path, output_loading_info=True)
    assert not found["missing_keys"]
    assert not found["unexpected_keys"]
    images = clips(1, (16, 8))
    before = 1 + variant.get("num_registers", 0)
    theirs_now = again.eval()(images[:, :, 0]).last_hidden_state[:, before:]
    torch.testing.assert_close(theirs_now, model(images), atol=1e-5, rtol=1e-5)
    other.save_pretrained(tmp_path / "saved")
    loaded = DINOv2.from_published(tmp_path / "saved" / "model.safetensors", image_size=12, num_heads=2).eval()
    expected = other(images[:, :, 0]).last_hidden_state[:, before:]
    torch.testing.assert_close(loaded(images), expected, atol=1e-5, rtol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("variant", VARIANTS, ids=str)
def test_saved_folder_loads_here_and_in_transformers(variant, tmp_path):
    model = tiny(**variant, interpolate_offset=0.0)
    model.save_published(tmp_path)
    kind = type(theirs(**variant))
    other, found = kind.from_pretrained(tmp_path, output_loading_info=True)
    assert not found["missing_keys"]
    assert not found["unexpected_keys"]
    images = clips(1, (16, 8))
    expected = other.eval()(images[:, :, 0]).last_hidden_state[:, 1 + variant.get("num_registers", 0) :]
    torch.testing.assert_close(model(images), expected, atol=1e-5, rtol=1e-5)
    again = DINOv2.from_published(tmp_path).eval()
    assert again.config() == model.config()
    assert torch.equal(again(images), model(images))
    initialized = tiny(**variant, interpolate_offset=0.0, depth=2, weights=str(tmp_path))
    initialized.load_published(tmp_path)
    assert torch.equal(initialized(images), model(images))
    with pytest.raises(ValueError, match=r"num_attention_heads=2 \(here 4\)"):
        tiny(**variant, num_heads=4).load_published(tmp_path)


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"interpolate_offset": None}, r"interpolate_offset=0\.1\b.*\b0\.0\b"),
        ({"interpolate_antialias": True}, "interpolate_antialias=True.*False"),
        ({"num_registers": 1, "interpolate_antialias": False}, "interpolate_antialias=False.*WithRegisters.*True"),
        ({"final_norm": False}, "final_norm=False"),
        ({"mlp_ratio": 3.5}, r"mlp_ratio=3\.5\b"),
    ],
)
def test_settings_without_a_counterpart_in_transformers_raise(changes, expected, tmp_path):
    with pytest.raises(ValueError, match=expected):
        tiny(**{"interpolate_offset": 0.0, **changes}).save_published(tmp_path / "none")
    assert not (tmp_path / "none").exists()


def test_published_names_and_shapes():
    """Names and shapes of the original repository's file of ViT-g with registers."""
    with torch.device("meta"):
        model = DINOv2(embed_dim=1536, depth=40, num_heads=24, swiglu=True, num_registers=4)
    state = {name: tuple(value.shape) for name, value in dinov2.to_original(model.state_dict()).items()}
    assert state["pos_embed"] == (1, 1370, 1536)
    assert state["cls_token"] == (1, 1, 1536)
    assert state["mask_token"] == (1, 1536)
    assert state["register_tokens"] == (1, 4, 1536)
    assert state["patch_embed.proj.weight"] == (1536, 3, 14, 14)
    assert state["blocks.39.mlp.w12.weight"] == (8192, 1536)
    assert state["blocks.39.mlp.w3.weight"] == (1536, 4096)
    assert state["blocks.39.ls2.gamma"] == (1536,)
    assert len(state) == 4 + 2 + 2 + 40 * 14
    assert sum(math.prod(shape) for shape in state.values()) == pytest.approx(1.136e9, rel=2e-3)


def test_missing_weight_raises_with_its_name(tmp_path):
    state = dinov2.to_original(tiny().state_dict())
    del state["blocks.1.ls2.gamma"]
    torch.save(state, tmp_path / "wrong.pth")
    with pytest.raises(ValueError, match=r"(?si)missing.*blocks\.1\.ls2\.gamma"):
        DINOv2.from_published(tmp_path / "wrong.pth", num_heads=2)
    torch.save({name: value for name, value in state.items() if "ls1" not in name}, tmp_path / "wrong.pth")
    with pytest.raises(ValueError, match=r"(?s)wrong\.pth.*DINOv2.*blocks\.0\.ls1\.gamma"):
        DINOv2.from_published(tmp_path / "wrong.pth", num_heads=2)


# ---- encoder contract ------------------------------------------------------------------------------------------------


@torch.no_grad()
@pytest.mark.parametrize("variant", VARIANTS[:2], ids=str)
def test_frames_are_encoded_independently(variant):
    model, video = tiny(**variant), clips(3)
    alone = torch.cat([model(video[:, :, t : t + 1]) for t in range(3)], dim=1)
    torch.testing.assert_close(model(video), alone, atol=1e-5, rtol=1e-5)
    assert model.grid(video.shape) == (3, 3, 3)


@torch.no_grad()
def test_output_depends_on_visible_tokens_only():
    model, video, keep = tiny(num_registers=1), clips(2, batch=1), torch.tensor([[9, 0, 4, 3, 1]])
    expected = model(video, keep)
    changed = video.clone()
    changed[:, :, 0, :4, 8:] += 1.0  # token 2: hidden
    assert torch.equal(model(changed, keep), expected)
    changed[:, :, 0, :4, 4:8] += 1.0  # token 1: visible
    moved = (model(changed, keep) - expected).abs().amax(dim=2)[0] > 1e-6
    assert moved.tolist() == [False, True, True, True, True]


@torch.no_grad()
def test_keeping_all_tokens_equals_no_mask():
    model, video, order = tiny(), clips(2), torch.randperm(18).expand(2, 18)
    torch.testing.assert_close(model(video, order), gather_tokens(model(video), order), atol=1e-5, rtol=1e-5)


def test_every_parameter_receives_a_gradient():
    for variant in VARIANTS:
        model = tiny(**variant)
        model(clips(1, (8, 8))).square().sum().backward()
        for name, parameter in model.named_parameters():
            assert parameter.grad.abs().max() > 0, name


@pytest.mark.parametrize(
    ("shape", "expected"),
    [
        ((1, 3, 1, 13, 12), r"\(1, 3, 1, 13, 12\).*\b4\b.*12 x 12\b"),
        ((1, 1, 1, 12, 12), r"\(1, 1, 1, 12, 12\).*C ?= ?3\b.*in_channels"),
        ((1, 3, 0, 12, 12), r"\(1, 3, 0, 12, 12\).*C ?= ?3\b.*in_channels"),
        ((3, 1, 12, 12), r"\(3, 1, 12, 12\).*C ?= ?3\b.*in_channels"),
    ],
)
def test_invalid_video_shapes_raise(shape, expected):
    with pytest.raises(ValueError, match=expected):
        tiny()(torch.zeros(shape))
    with pytest.raises(ValueError, match=r"image_size=13\b.*patch_size=4\b.*\b12\b"):
        tiny(image_size=13)


@pytest.mark.parametrize("frames", [1, 2])
@pytest.mark.parametrize(("keep", "expected"), [([[3, 3]], "keep"), ([[3, 18]], r"keep.*\b3\b.*\b18\b")])
def test_invalid_keep_raises(frames, keep, expected):
    with pytest.raises(ValueError, match=expected):
        tiny()(clips(frames, batch=1), torch.tensor(keep))


@pytest.mark.parametrize("changes", [{"table_size": 0}, {"num_registers": -1}], ids=str)
def test_bad_arguments_raise(changes):
    with pytest.raises(ValueError, match=r"table_size=\d.*num_registers=-?\d"):
        tiny(**changes)


def test_num_heads_is_required_for_a_narrow_file(tmp_path):
    torch.save(dinov2.to_original(tiny().state_dict()), tmp_path / "narrow.pth")
    with pytest.raises(ValueError, match=r"(?s)narrow\.pth.*width=16\b.*num_heads=…"):
        DINOv2.from_published(tmp_path / "narrow.pth", image_size=12)
