"""Parity of V-JEPA 2 with transformers, and of V-JEPA with a reference written here from the paper's formulas.

The references are tiny and random in **every** parameter: zero biases and mask tokens would hide a dropped one.
"""

import json
import math
import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import VJEPA2Config, VJEPA2ForVideoClassification, VJEPA2Model

from blueberry_video.masking import MultiBlockMasking
from blueberry_video.models.jepa import convert
from blueberry_video.models.jepa.model import JEPA
from blueberry_video.models.vit import VisionTransformer
from blueberry_video.nn.heads import ClassificationHead
from blueberry_video.nn.patches import gather_tokens

TOLERANCE = {"atol": 1e-5, "rtol": 1e-5}  # fp32 round-off of a few layers; a dropped bias changes outputs by 1e-2

# name: sizes, tokens (t, h, w); heads of 16, 32 and 80 channels rotate 12, 30 and 78 of them
CONFIGS = {
    "heads-of-16": ({"hidden_size": 32, "num_attention_heads": 2, "crop_size": 32, "frames_per_clip": 4}, (2, 4, 4)),
    "heads-of-32": ({"hidden_size": 64, "num_attention_heads": 2, "crop_size": 24, "frames_per_clip": 8}, (4, 3, 3)),
    "heads-of-80": ({"hidden_size": 80, "num_attention_heads": 1, "crop_size": 24, "frames_per_clip": 4}, (2, 3, 3)),
    "other-widths": (
        {
            "hidden_size": 44,
            "num_attention_heads": 2,
            "mlp_ratio": 48 / 11,
            "crop_size": 20,
            "patch_size": 4,
            "tubelet_size": 1,
            "frames_per_clip": 3,
            "pred_hidden_size": 18,
            "pred_num_attention_heads": 3,
            "pred_num_mask_tokens": 3,
            "pred_mlp_ratio": 3.0,
            "num_pooler_layers": 1,
            "in_chans": 1,
        },
        (3, 5, 5),
    ),
}


def hf_config(name: str) -> VJEPA2Config:
    small = {
        "patch_size": 8,
        "num_hidden_layers": 2,
        "pred_hidden_size": 24,
        "pred_num_attention_heads": 2,
        "pred_num_hidden_layers": 2,
        "num_labels": 5,
        "attn_implementation": "eager",
    }
    return VJEPA2Config(**(small | CONFIGS[name][0]))


def randomized(module: nn.Module) -> nn.Module:
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            norm_scale = parameter.ndim == 1 and name.endswith("weight")
            parameter.copy_(1 + 0.3 * noise if norm_scale else 0.2 * noise)
    return module.eval()


def clips_and_masks(config: VJEPA2Config, name: str) -> tuple[Tensor, Tensor, Tensor]:
    """Video (B, C, T, H, W), and indices of context and targets that together omit some tokens."""
    generator = torch.Generator().manual_seed(1)
    shape = (2, config.in_chans, config.frames_per_clip, config.crop_size, config.crop_size)
    order = torch.rand(2, math.prod(CONFIGS[name][1]), generator=generator).argsort(dim=1)
    third = order.shape[1] // 3
    return torch.randn(shape, generator=generator), order[:, :third].sort().values, order[:, -third:].sort().values


def built(config: VJEPA2Config) -> JEPA:
    encoder = VisionTransformer(
        image_size=config.crop_size,
        num_frames=config.frames_per_clip,
        patch_size=config.patch_size,
        tubelet_size=config.tubelet_size,
        embed_dim=config.hidden_size,
        depth=config.num_hidden_layers,
        num_heads=config.num_attention_heads,
        mlp_ratio=config.mlp_ratio,
        in_channels=config.in_chans,
        qkv_bias="qkv",
        positions="rope_3d",
        rope_quirk=True,
    )
    return JEPA(
        encoder,
        predictor_dim=config.pred_hidden_size,
        predictor_depth=config.pred_num_hidden_layers,
        predictor_num_heads=config.pred_num_attention_heads,
        predictor_mlp_ratio=config.pred_mlp_ratio,
        num_mask_tokens=config.pred_num_mask_tokens,
        rope_quirk=True,
        ema=False,
    ).eval()


def assert_same_gradients(ours: nn.Module, theirs: dict[str, Tensor]) -> None:
    """Compares gradients, converted like weights, to 1e-5, relative to the largest entry if that is above 1."""
    for name, parameter in ours.named_parameters():
        if name not in theirs:
            continue
        scale = max(1.0, theirs[name].abs().max().item())
        torch.testing.assert_close(parameter.grad / scale, theirs[name] / scale, atol=1e-5, rtol=1e-5, msg=name)


@pytest.mark.parametrize("name", CONFIGS)
def test_encoder_and_predictor_equal_transformers_in_features_and_gradients(name):
    config = hf_config(name)
    reference, model = randomized(VJEPA2Model(config)), built(config)
    model.load_state_dict(convert.convert_huggingface(reference.state_dict()))
    video, keep, target = clips_and_masks(config, name)
    theirs = reference(video.transpose(1, 2), context_mask=[keep], target_mask=[target])

    # transformers drops no token: its encoder receives all tokens, and its predictor those of the context
    tokens = model.encoder(video)
    predicted = model.predictor(gather_tokens(tokens, keep), keep, target, mask_index=1)
    torch.testing.assert_close(tokens, theirs.last_hidden_state, **TOLERANCE)
    torch.testing.assert_close(predicted, theirs.predictor_output.last_hidden_state, **TOLERANCE)

    weights = torch.randn(predicted.shape, generator=torch.Generator().manual_seed(2))
    (predicted * weights).sum().backward()
    (theirs.predictor_output.last_hidden_state * weights).sum().backward()
    gradients = {n: torch.zeros_like(p) if p.grad is None else p.grad for n, p in reference.named_parameters()}
    converted = convert.convert_huggingface(gradients)
    assert converted.keys() == dict(model.named_parameters()).keys()
    assert_same_gradients(model, converted)
    assert converted["predictor.mask_tokens"][1].abs().max() > 1e-5


def test_without_masks_all_tokens_are_predicted_from_all_tokens():
    config = hf_config("heads-of-16")
    reference, model = randomized(VJEPA2Model(config)), built(config)
    model.load_state_dict(convert.convert_huggingface(reference.state_dict()))
    video = clips_and_masks(config, "heads-of-16")[0]
    every = torch.arange(32).expand(2, -1)
    predicted = model.predictor(model.encoder(video), every, every, mask_index=1)
    expected = reference(video.transpose(1, 2)).predictor_output.last_hidden_state
    torch.testing.assert_close(predicted, expected, **TOLERANCE)


def test_predictions_have_the_order_of_the_targets():
    config = hf_config("heads-of-32")
    model = randomized(built(config))
    video, keep, target = clips_and_masks(config, "heads-of-32")
    shuffle = torch.randperm(target.shape[1])
    context = model.encoder(video, keep)
    first, other = (model.predictor(context, keep, index) for index in (target, target[:, shuffle]))
    torch.testing.assert_close(other, first[:, shuffle], **TOLERANCE)


def test_visible_tokens_keep_their_positions():
    encoder = VisionTransformer(32, 4, 8, 2, 32, 1, 2, positions="rope_3d", rope_quirk=True, qkv_bias="qkv").eval()
    video, keep = torch.randn(2, 3, 4, 32, 32), torch.tensor([[1, 5, 6, 30], [0, 17, 18, 31]])
    turn = encoder.rope(keep)
    x = encoder.patch_embed(video, keep)
    torch.testing.assert_close(encoder(video, keep), encoder.norm(encoder.blocks[0](x, turn)), **TOLERANCE)
    for b in range(2):
        torch.testing.assert_close(turn.cos[b, 0], encoder.rope().cos[keep[b]])
        torch.testing.assert_close(turn.sin[b, 0], encoder.rope().sin[keep[b]])


@pytest.mark.parametrize("name", ["heads-of-16", "other-widths"])
def test_probe_equals_transformers_in_logits_and_gradients(name):
    config = hf_config(name)
    reference, model = randomized(VJEPA2ForVideoClassification(config)), built(config)
    model.load_state_dict(convert.convert_huggingface(reference.state_dict()))
    head = ClassificationHead(
        config.hidden_size,
        {"action": 5},
        "attentive",
        config.num_attention_heads,
        pool_depth=1 + config.num_pooler_layers,
        final_norm=False,
        pool_eps=1e-6,
    )
    head.load_state_dict(convert.convert_probe(reference.state_dict(), "action"))
    video = clips_and_masks(config, name)[0]
    logits, expected = head(model.encoder(video))["action"], reference(video.transpose(1, 2)).logits
    torch.testing.assert_close(logits, expected, **TOLERANCE)
    logits.square().sum().backward()
    expected.square().sum().backward()
    gradients = {name: p.grad for name, p in reference.named_parameters() if p.grad is not None}
    probe = {name: value for name, value in gradients.items() if name.startswith(("pooler.", "classifier."))}
    converted = convert.convert_probe(probe, "action")
    assert converted.keys() == dict(head.named_parameters()).keys()
    assert_same_gradients(head, converted)
    converted = convert.convert_huggingface(gradients)
    assert_same_gradients(model.encoder, {name.removeprefix("encoder."): value for name, value in converted.items()})


def test_weights_round_trip_with_transformers():
    config = hf_config("other-widths")
    reference, model = VJEPA2Model(config), randomized(built(config))
    state = convert.to_huggingface(model.state_dict())
    reference.load_state_dict(state)  # strict
    back = convert.convert_huggingface(reference.state_dict())
    assert back.keys() == model.state_dict().keys()
    assert all(torch.equal(value, model.state_dict()[name]) for name, value in back.items())
    with pytest.raises(ValueError, match=r"'target_encoder'.*'encoder'.*'predictor'"):
        convert.to_huggingface(model.state_dict(), "target_encoder")


def test_target_encoder_converts_to_transformers():
    config = hf_config("heads-of-16")
    model = JEPA(built(config).encoder, 24, 2, 2, num_mask_tokens=10)
    with torch.no_grad():
        model.target_encoder.norm.bias.fill_(3.0)
    name = "encoder.layernorm.bias"
    assert convert.to_huggingface(model.state_dict(), "target_encoder")[name].tolist() == [3.0] * 32
    assert not convert.to_huggingface(model.state_dict())[name].any()


def test_transformers_file_loads(tmp_path: Path, capsys: pytest.CaptureFixture):
    config = hf_config("other-widths")
    reference = randomized(VJEPA2ForVideoClassification(config))
    save_file(reference.state_dict(), tmp_path / "model.safetensors")
    model = JEPA.from_published(
        tmp_path / "model.safetensors", "encoder", num_frames=3, image_size=20, num_heads=2, predictor_num_heads=3
    )
    assert "'encoder'" in capsys.readouterr().out
    video, keep, target = clips_and_masks(config, "other-widths")
    expected = reference.vjepa2(video.transpose(1, 2), context_mask=[keep], target_mask=[target])
    torch.testing.assert_close(model.encoder(video), expected.last_hidden_state, **TOLERANCE)
    predicted = model.predictor(gather_tokens(model.encoder(video), keep), keep, target, mask_index=1)
    torch.testing.assert_close(predicted, expected.predictor_output.last_hidden_state, **TOLERANCE)
    with pytest.raises(ValueError, match=r"(?s)model\.safetensors.*which='target_encoder'.*'encoder'"):
        JEPA.from_published(tmp_path / "model.safetensors", "target_encoder")


@pytest.mark.parametrize("name", CONFIGS)
def test_saved_folder_loads_in_transformers_and_back(tmp_path, name):
    config = hf_config(name)
    model = randomized(built(config))
    model.save_published(tmp_path / "saved")
    reference, report = VJEPA2Model.from_pretrained(tmp_path / "saved", output_loading_info=True)
    assert not any(report.values()), report
    for key, value in model.config.items():
        assert getattr(reference.config, key) == value
    video, keep, target = clips_and_masks(config, name)
    expected = reference.eval()(video.transpose(1, 2), context_mask=[keep], target_mask=[target])
    back = JEPA.from_published(tmp_path / "saved", "encoder").eval()
    assert back.config == model.config  # clip size and heads are read from config.json
    fresh = built(config)
    assert "'encoder'" in fresh.load_published(tmp_path / "saved", "encoder")
    for read in (model, back, fresh):
        tokens = read.encoder(video)
        torch.testing.assert_close(tokens, expected.last_hidden_state, **TOLERANCE)
        predicted = read.predictor(gather_tokens(tokens, keep), keep, target, mask_index=1)
        torch.testing.assert_close(predicted, expected.predictor_output.last_hidden_state, **TOLERANCE)
    with pytest.raises(FileExistsError, match="saved"):
        model.save_published(tmp_path / "saved")


def test_folder_of_transformers_loads_with_its_settings_unless_arguments_replace_them(tmp_path):
    config = hf_config("other-widths")
    randomized(VJEPA2ForVideoClassification(config)).save_pretrained(tmp_path)
    model = JEPA.from_published(tmp_path, "encoder")
    assert model.encoder.video_size == (1, 3, 20, 20)
    assert (model.encoder.blocks[0].attn.num_heads, model.predictor.blocks[0].attn.num_heads) == (2, 3)
    model = JEPA.from_published(tmp_path, "encoder", num_frames=5, image_size=24)
    assert model.encoder.video_size == (1, 5, 24, 24)
    for name, key in (("num_heads", "num_attention_heads=2"), ("predictor_num_heads", "pred_num_attention_heads=3")):
        with pytest.raises(ValueError, match=rf"{name}=1 contradicts {key}"):
            JEPA.from_published(tmp_path, "encoder", **{name: 1})
    settings = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(settings | {"layer_norm_eps": 1e-5}))
    with pytest.raises(ValueError, match=r"layer_norm_eps=1e-05 \(here 1e-06\)"):
        JEPA.from_published(tmp_path, "encoder")


@pytest.mark.parametrize(
    ("encoder_changes", "changes", "pattern"),
    [
        ({"rope_quirk": False}, {}, r"model\.encoder\.rope_quirk=False\b.*=True\b"),
        ({}, {"rope_quirk": False}, r"model\.rope_quirk=False\b.*=True\b"),
        ({"positions": "sincos_3d"}, {}, r"model\.encoder\.positions='sincos_3d'.*='rope_3d'"),
        ({}, {"predictor_positions": "sincos_3d"}, r"model\.predictor_positions='sincos_3d'.*='rope_3d'"),
        ({"qkv_bias": "qv"}, {}, r"model\.encoder\.qkv_bias='qv'.*='qkv'"),
        ({"final_norm": False}, {}, r"model\.encoder\.final_norm=False\b.*=True\b"),
        ({}, {"predictor_context": True}, r"model\.predictor_context=True\b.*=False\b"),
    ],
)
def test_models_that_transformers_cannot_represent_raise(tmp_path, encoder_changes, changes, pattern):
    options = {"positions": "rope_3d", "rope_quirk": True, "qkv_bias": "qkv", **encoder_changes}
    encoder = VisionTransformer(32, 4, 8, 2, 32, 1, 2, **options)
    model = JEPA(encoder, 24, 1, 2, **{"rope_quirk": True, **changes})
    with pytest.raises(ValueError, match=pattern):
        model.save_published(tmp_path / "saved")
    assert not (tmp_path / "saved").exists()


# ---- reference of V-JEPA ---------------------------------------------------------------------------------------------

GRID, SIZES = (2, 4, 4), {"image_size": 32, "num_frames": 4, "patch_size": 8, "tubelet_size": 2}


def position_of(index: int) -> tuple[int, int, int]:
    return index // 16, index % 16 // 4, index % 4


def sincos(index: Tensor, dim: int) -> Tensor:
    """Position embeddings (B, N, dim) of token indices (B, N)."""
    half = math.ceil(dim / 6)
    rows = []
    for token in index.flatten().tolist():
        row = []
        for position in position_of(token):
            angles = [position / 10000 ** (i / half) for i in range(half)]
            row += [math.sin(a) for a in angles] + [math.cos(a) for a in angles]
        rows.append(row[:dim])
    return torch.tensor(rows).view(*index.shape, dim)


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float = 1e-6) -> Tensor:
    mean = x.mean(dim=-1, keepdim=True)
    variance = (x - mean).square().mean(dim=-1, keepdim=True)
    return (x - mean) / (variance + eps).sqrt() * weight + bias


def block(x: Tensor, w: dict[str, Tensor], prefix: str, num_heads: int) -> Tensor:
    def linear(value: Tensor, name: str) -> Tensor:
        return value @ w[f"{prefix}.{name}.weight"].T + w[f"{prefix}.{name}.bias"]

    def norm(value: Tensor, name: str) -> Tensor:
        return layer_norm(value, w[f"{prefix}.{name}.weight"], w[f"{prefix}.{name}.bias"])

    dim = x.shape[-1]
    qkv, width, heads = linear(norm(x, "norm1"), "attn.qkv"), dim // num_heads, []
    for h in range(num_heads):
        q, k, v = (qkv[..., part * dim + h * width : part * dim + (h + 1) * width] for part in range(3))
        heads.append((q @ k.transpose(1, 2) / width**0.5).softmax(dim=-1) @ v)
    x = x + linear(torch.cat(heads, dim=-1), "attn.proj")
    hidden = linear(norm(x, "norm2"), "mlp.fc1")
    return x + linear(hidden * 0.5 * (1 + torch.erf(hidden / 2**0.5)), "mlp.fc2")


def literal_encoder(w: dict[str, Tensor], video: Tensor, keep: Tensor, num_heads: int, depth: int) -> Tensor:
    kernel, rows = w["patch_embed.proj.weight"], []
    for b in range(len(video)):
        for token in keep[b].tolist():
            t, i, j = position_of(token)
            patch = video[b, :, 2 * t : 2 * t + 2, 8 * i : 8 * i + 8, 8 * j : 8 * j + 8]
            rows.append((kernel * patch).sum(dim=(1, 2, 3, 4)) + w["patch_embed.proj.bias"])
    x = torch.stack(rows).view(*keep.shape, -1)
    x = x + sincos(keep, x.shape[-1])
    for layer in range(depth):
        x = block(x, w, f"blocks.{layer}", num_heads)
    return layer_norm(x, w["norm.weight"], w["norm.bias"])


def literal_predictor(
    w: dict[str, Tensor], context: Tensor, keep: Tensor, target: Tensor, mask_index: int, num_heads: int, depth: int
) -> Tensor:
    """Predictor under the original's parameter names."""
    seen = context @ w["predictor_embed.weight"].T + w["predictor_embed.bias"]
    seen = seen + sincos(keep, seen.shape[-1])
    masked = w[f"mask_tokens.{mask_index}"] + sincos(target, seen.shape[-1])
    x = torch.cat([seen, masked], dim=1)
    for layer in range(depth):
        x = block(x, w, f"predictor_blocks.{layer}", num_heads)
    x = layer_norm(x, w["predictor_norm.weight"], w["predictor_norm.bias"])
    return x[:, keep.shape[1] :] @ w["predictor_proj.weight"].T + w["predictor_proj.bias"]


def vjepa(embed_dim: int = 32, num_heads: int = 2) -> JEPA:
    encoder = VisionTransformer(
        **SIZES, embed_dim=embed_dim, depth=2, num_heads=num_heads, qkv_bias="qkv", positions="sincos_3d"
    )
    return randomized(JEPA(encoder, 18, 2, 3, num_mask_tokens=2, predictor_positions="sincos_3d"))


def original_weights(model: JEPA) -> dict[str, dict[str, Tensor]]:
    content = convert.to_original(dict(model.named_parameters()), tables=GRID)
    return {part: {n.removeprefix("module.backbone."): w for n, w in ws.items()} for part, ws in content.items()}


@pytest.mark.parametrize(("embed_dim", "num_heads"), [(32, 2), (20, 4)])
def test_v_jepa_equals_the_reference_in_features_and_gradients(embed_dim, num_heads):
    model = vjepa(embed_dim, num_heads)
    weights = original_weights(model)
    video = torch.randn(2, 3, 4, 32, 32)
    keep, target, _ = MultiBlockMasking(2, 0.4)(2, GRID, torch.Generator().manual_seed(0))
    for mask_index in range(2):
        context = literal_encoder(weights["encoder"], video, keep, num_heads, depth=2)
        torch.testing.assert_close(model.encoder(video, keep), context, **TOLERANCE)
        expected = literal_predictor(weights["predictor"], context, keep, target, mask_index, 3, depth=2)
        predicted = model(video, keep, target, mask_index)
        torch.testing.assert_close(predicted, expected, **TOLERANCE)

        every = torch.arange(32).expand(2, -1)
        tokens = literal_encoder(weights["target_encoder"], video, every, num_heads, depth=2)
        truth = layer_norm(tokens, torch.ones(embed_dim), torch.zeros(embed_dim), eps=1e-5)  # torch's own eps
        torch.testing.assert_close(model.targets(video), truth, **TOLERANCE)

        trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
        ours, theirs = (
            torch.autograd.grad((value - gather_tokens(truth, target)).abs().sum(), list(trained.values()))
            for value in (predicted, expected)
        )
        for name, value, literal in zip(trained, ours, theirs):
            scale = max(1.0, literal.abs().max().item())
            torch.testing.assert_close(value / scale, literal / scale, **TOLERANCE, msg=name)


# ---- files of the originals ------------------------------------------------------------------------------------------


def saved(content: dict, path: Path, prefix: str = "module.backbone.") -> Path:
    renamed = {
        part: {name.replace("module.backbone.", prefix): value for name, value in weights.items()}
        for part, weights in content.items()
    }
    torch.save({**renamed, "opt": {"state": {}}, "scaler": None, "epoch": 300, "lr": 1e-3}, path)
    return path


@pytest.mark.parametrize("prefix", ["module.backbone.", "module.", "backbone.", ""])
@pytest.mark.parametrize("which", ["encoder", "target_encoder"])
def test_v_jepa_file_loads_with_the_chosen_encoder(tmp_path, capsys, which, prefix):
    model = vjepa()
    with torch.no_grad():
        model.target_encoder.norm.bias += 1.0
    path = saved(convert.to_original(model.state_dict(), GRID), tmp_path / "vjepa.pth.tar", prefix)
    read = JEPA.from_published(path, which, num_frames=4, image_size=32, num_heads=2, predictor_num_heads=3)
    assert re.search(f"'{which}'.*'target_encoder'", capsys.readouterr().out)
    assert read.encoder.position_kind == "sincos_3d"
    for part, source in (("encoder", which), ("target_encoder", "target_encoder"), ("predictor", "predictor")):
        ours, theirs = read.get_submodule(part).state_dict(), model.get_submodule(source).state_dict()
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(value, theirs[name]) for name, value in ours.items())
    video, keep, target = torch.randn(1, 3, 4, 32, 32), torch.tensor([[0, 9, 20]]), torch.tensor([[5, 31]])
    if which == "encoder":
        assert torch.equal(read.eval()(video, keep, target, 1), model(video, keep, target, 1))


def test_v_jepa_2_file_loads_and_its_position_tables_are_ignored(tmp_path):
    encoder = VisionTransformer(
        **SIZES, embed_dim=128, depth=1, num_heads=2, qkv_bias="qkv", positions="rope_3d", rope_quirk=True
    )
    model = randomized(JEPA(encoder, 72, 1, 12, num_mask_tokens=10, rope_quirk=True))
    content = convert.to_original(model.state_dict())
    content["encoder"]["module.backbone.pos_embed"] = torch.randn(1, 99, 128)  # published files hold this unused table
    content["predictor"]["module.backbone.predictor_pos_embed"] = torch.randn(1, 99, 72)
    file, size = saved(content, tmp_path / "vitl.pt"), {"num_frames": 4, "image_size": 32}
    with pytest.raises(ValueError, match=r"width=128\b.*num_heads=…"):
        JEPA.from_published(file, "encoder", **size)
    read = JEPA.from_published(file, "encoder", **size, num_heads=2).eval()
    assert read.encoder.position_kind == "rope_3d"
    video, keep, target = torch.randn(1, 3, 4, 32, 32), torch.tensor([[0, 9, 20]]), torch.tensor([[5, 31]])
    assert torch.equal(read(video, keep, target, 1), model(video, keep, target, 1))


def test_what_no_tensor_determines_is_asked_for(tmp_path):
    """Tables of V-JEPA determine positions and image size; of a file without them, they are unknown."""
    heads = {"num_heads": 2, "predictor_num_heads": 3}
    path = saved(convert.to_original(vjepa().state_dict(), GRID), tmp_path / "tables.pt")
    read = JEPA.from_published(path, "encoder", num_frames=4, **heads)
    assert (read.encoder.video_size, read.encoder.position_kind) == ((3, 4, 32, 32), "sincos_3d")
    bare = saved(convert.to_original(vjepa().state_dict()), tmp_path / "bare.pt")
    with pytest.raises(ValueError, match=r"bare\.pt.*positions='sincos_3d'.*'rope_3d'"):
        JEPA.from_published(bare, "encoder", 4, 32, **heads)
    for positions in ("sincos_3d", "rope_3d"):
        with pytest.raises(ValueError, match=r"bare\.pt.*image_size=…"):
            JEPA.from_published(bare, "encoder", 4, positions=positions, **heads)
    assert JEPA.from_published(bare, "encoder", 4, 32, "sincos_3d", **heads).encoder.num_tokens == 32


@pytest.mark.parametrize("which", ["encoder", "target_encoder"])
@pytest.mark.parametrize("layout", ["original", "run"])
def test_weights_load_into_a_model(tmp_path, layout, which):
    trained, model, path = vjepa(), vjepa(), tmp_path / "weights.pt"
    with torch.no_grad():
        trained.target_encoder.norm.bias += 1.0
        for parameter in model.parameters():
            parameter.zero_()
    state = trained.state_dict()
    run = {"state_dict": {f"model.{name}": value for name, value in state.items()}}
    torch.save(run if layout == "run" else convert.to_original(state, GRID), path)
    assert re.search(rf"weights\.pt.*'{which}'.*'target_encoder'", model.load_published(path, which))
    for part, source in (("encoder", which), ("target_encoder", "target_encoder"), ("predictor", "predictor")):
        loaded, expected = model.get_submodule(part).state_dict(), trained.get_submodule(source).state_dict()
        torch.testing.assert_close(loaded, expected, rtol=0, atol=0)


def test_weights_of_a_different_model_raise(tmp_path):
    model = vjepa()
    torch.save(convert.to_original(model.state_dict(), GRID), tmp_path / "vjepa.pt")
    encoder = VisionTransformer(**SIZES, embed_dim=32, depth=2, num_heads=2, qkv_bias="qkv", positions="rope_3d")
    rotary = JEPA(encoder, 18, 2, 3)
    with pytest.raises(ValueError, match=r"predictor_positions='sincos_3d'.*predictor_positions='rope_3d'"):
        rotary.load_published(tmp_path / "vjepa.pt", "encoder")
    torch.save(model.state_dict(), tmp_path / "run.pt")
    with pytest.raises(ValueError, match=r"run\.pt.*predictor\.blocks\.0\..*18.*instead of.*24"):
        JEPA(model.encoder, 24, 2, 3, predictor_positions="sincos_3d").load_published(tmp_path / "run.pt", "encoder")
    with pytest.raises(ValueError, match=r"run\.pt.*config.*load_published"):
        JEPA.from_published(tmp_path / "run.pt", "encoder")


def test_a_teacher_keeps_its_weights(tmp_path):
    encoder, teacher = vjepa().encoder, vjepa().encoder
    model = JEPA(encoder, 18, 2, 3, predictor_positions="sincos_3d", ema=False, teacher=teacher)
    torch.nn.init.constant_(teacher.norm.bias, 7.0)
    torch.save(vjepa().state_dict(), tmp_path / "run.pt")
    assert "target encoder" not in model.load_published(tmp_path / "run.pt", "encoder")
    assert model.target_encoder.norm.bias.unique().tolist() == [7.0]


def test_without_a_target_encoder_in_the_file_the_encoder_is_copied(tmp_path, capsys):
    content = convert.to_original(vjepa().state_dict(), GRID)
    del content["target_encoder"]
    sizes = {"num_frames": 4, "image_size": 32, "num_heads": 2, "predictor_num_heads": 3}
    path = saved(content, tmp_path / "vjepa.pt")
    read = JEPA.from_published(path, "encoder", **sizes)
    assert torch.equal(read.target_encoder.norm.bias, read.encoder.norm.bias)
    assert re.search("'encoder'.*'encoder'", capsys.readouterr().out)
    with pytest.raises(ValueError, match=r"'target_encoder'.*which='encoder'.*'encoder', 'predictor'"):
        JEPA.from_published(path, "target_encoder", **sizes)


@pytest.mark.parametrize("part", ["encoder.pos_embed", "predictor.predictor_pos_embed"])
def test_position_tables_that_differ_from_the_computed_ones_raise(tmp_path, part):
    content, (part, name) = convert.to_original(vjepa().state_dict(), GRID), part.split(".")
    content[part][f"module.backbone.{name}"] = content[part][f"module.backbone.{name}"] + 1e-3
    path, sizes = saved(content, tmp_path / "vjepa.pt"), {"num_heads": 2, "predictor_num_heads": 3}
    with pytest.raises(ValueError, match=rf"{part}\.{name}.*\(1, 32, \d+\).*\(2, 4, 4\).*num_frames.*image_size"):
        JEPA.from_published(path, "encoder", num_frames=4, image_size=32, **sizes)


def test_sizes_that_differ_from_the_file_raise(tmp_path):
    path = saved(convert.to_original(vjepa().state_dict(), GRID), tmp_path / "vjepa.pt")
    with pytest.raises(ValueError, match=r"encoder\.pos_embed.*\(1, 32, 32\).*\(4, 4, 4\).*num_frames.*image_size"):
        JEPA.from_published(path, "encoder", num_frames=8, image_size=32, num_heads=2, predictor_num_heads=3)


def test_missing_weight_raises_with_its_name(tmp_path):
    content = convert.to_original(vjepa().state_dict(), GRID)
    del content["predictor"]["module.backbone.predictor_norm.bias"]
    path = saved(content, tmp_path / "vjepa.pt")
    with pytest.raises(ValueError, match=r"predictor\.norm\.bias"):
        JEPA.from_published(path, "encoder", num_frames=4, image_size=32, num_heads=2, predictor_num_heads=3)


def test_probe_of_an_original_file_converts():
    head = randomized(ClassificationHead(16, {"action": 3}, "attentive", 2, pool_depth=3, final_norm=False))
    cross = "module.pooler.cross_attention_block"
    names = {"pool.query": "module.pooler.query_tokens"}
    names |= {f"linear.action.{kind}": f"module.linear.{kind}" for kind in ("weight", "bias")}
    for kind in ("weight", "bias"):
        names |= {f"pool.{part}.{kind}": f"{cross}.xattn.{part}.{kind}" for part in ("q", "kv")}
        names |= {f"pool.{part}.{kind}": f"{cross}.{part}.{kind}" for part in ("norm1", "norm2", "mlp.fc1", "mlp.fc2")}
    original = {names.get(name, f"module.pooler.{name[5:]}"): value for name, value in head.state_dict().items()}
    assert "module.pooler.blocks.1.attn.qkv.weight" in original
    # files of V-JEPA also hold an output projection of the cross-attention, which the original never calls
    original |= {f"{cross}.xattn.proj.weight": torch.randn(16, 16), f"{cross}.xattn.proj.bias": torch.randn(16)}
    converted = convert.convert_probe(original, "action")
    assert converted.keys() == head.state_dict().keys()
    assert all(torch.equal(value, head.state_dict()[name]) for name, value in converted.items())


def test_probe_of_v_jepa_without_complete_block_converts():
    """There, the cross-attention has no block around it, and its output projection is not called either."""
    options = {"final_norm": False, "complete_block": False}
    head = randomized(ClassificationHead(16, {"action": 3}, "attentive", 2, **options))
    original = {
        name.replace("pool.query", "pooler.query_tokens")
        .replace("pool.q.", "pooler.cross_attention_block.q.")
        .replace("pool.kv.", "pooler.cross_attention_block.kv.")
        .replace("linear.action", "linear"): value
        for name, value in head.state_dict().items()
    }
    original |= {f"pooler.cross_attention_block.proj.{kind}": torch.randn(16) for kind in ("weight", "bias")}
    head.load_state_dict(convert.convert_probe(original, "action"))
