"""HunyuanVideo: parity with diffusers on tiny models with random parameters; causal attention, KV cache and per-frame
timesteps, which diffusers does not have.
"""

import json
import re
from pathlib import Path

import pytest
import torch
from diffusers import CogVideoXTransformer3DModel, HunyuanVideoTransformer3DModel
from hydra.utils import instantiate
from omegaconf import OmegaConf
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn.attention.flex_attention import create_block_mask, create_mask

from blueberry_video.config import CONF
from blueberry_video.diffusion.conditioning import concat_image, replace_first
from blueberry_video.models.hunyuan_video.model import HunyuanVideo, thousandfold
from blueberry_video.models.hunyuan_video.transformer import without_padding
from blueberry_video.nn.joint_attention import KeyValueCache, block_causal_mask

TOLERANCE = {"atol": 1e-5, "rtol": 1e-5}  # fp32 round-off of a few layers; a dropped bias changes outputs by 1e-2

TINY = {
    "in_channels": 4,
    "out_channels": 4,
    "num_attention_heads": 2,
    "attention_head_dim": 10,
    "num_layers": 2,
    "num_single_layers": 2,
    "num_refiner_layers": 2,
    "patch_size": 1,
    "patch_size_t": 1,
    "guidance_embeds": False,
    "text_embed_dim": 16,
    "pooled_projection_dim": 8,
    "rope_axes_dim": (2, 4, 4),
}
VARIANTS = {
    "plain": {},
    "guidance": {"guidance_embeds": True},
    "patches": {"patch_size": 2, "mlp_ratio": 2.5, "num_refiner_layers": 1, "rope_theta": 100.0},
    "patches-in-time": {"patch_size": 2, "patch_size_t": 3, "num_attention_heads": 3, "rope_axes_dim": (4, 2, 4)},
    "concat": {"image_condition_type": "latent_concat", "in_channels": 9},
    "replace": {"image_condition_type": "token_replace"},
    "replace-guidance": {"image_condition_type": "token_replace", "guidance_embeds": True, "patch_size": 2},
}


def randomize(model: nn.Module) -> None:
    """Draws every parameter at random, including norms and biases."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.15)
            if parameter.ndim == 1:
                parameter += 0.5


def diffusers_model(variant: str = "plain") -> HunyuanVideoTransformer3DModel:
    model = HunyuanVideoTransformer3DModel(**(TINY | VARIANTS[variant]))
    randomize(model)
    return model


def pair(variant: str = "plain") -> tuple[HunyuanVideoTransformer3DModel, HunyuanVideo]:
    """Models of diffusers and of this package with the same weights."""
    theirs = diffusers_model(variant)
    ours = HunyuanVideo(**HunyuanVideo.settings_of(theirs.state_dict(), dict(theirs.config)))
    ours.load_state_dict(theirs.state_dict())
    return theirs, ours


def inputs(model: HunyuanVideo, padded: bool = False, frames: int = 3, length: int = 5) -> dict[str, Tensor]:
    """Batch of two clips, with texts of different lengths if ``padded``."""
    given = {
        "latents": torch.randn(2, model.in_channels, frames, 4, 6),
        "timestep": torch.tensor([500.25, 13.5]),
        "text": torch.randn(2, length, model.text_dim),
        "pooled": torch.randn(2, model.pooled_dim),
    }
    if padded:
        given["text_mask"] = torch.arange(length) < torch.tensor([[length - 2], [length]])
    if model.embedded_guidance:
        given["guidance"] = torch.tensor([6.0, 1.5])
    return given


def their_output(model: HunyuanVideoTransformer3DModel, given: dict[str, Tensor]) -> Tensor:
    mask = given.get("text_mask", torch.ones(given["text"].shape[:2], dtype=torch.bool))
    guidance = given["guidance"].bfloat16() * 1000 if "guidance" in given else None  # as the pipelines, in bfloat16
    return model(given["latents"], given["timestep"], given["text"], mask, given["pooled"], guidance).sample


def test_guidance_is_rounded_as_in_the_published_pipelines(tmp_path: Path):
    """They compute ``tensor([6.0]).to(bfloat16) * 1000``, which is 6016."""
    theirs, ours = pair("guidance")
    given = inputs(ours) | {"guidance": torch.tensor([6.0, 6.0])}

    def expected(value: float) -> Tensor:
        mask, scales = torch.ones(2, 5, dtype=torch.bool), torch.full((2,), value)
        return theirs(given["latents"], given["timestep"], given["text"], mask, given["pooled"], scales).sample

    torch.testing.assert_close(ours(**given), expected(6016.0), **TOLERANCE)
    assert (expected(6016.0) - expected(6000.0)).norm() / expected(6000.0).norm() > 1e-2
    ours.save_published(tmp_path / "bfloat16")
    assert "guidance_dtype" not in json.loads((tmp_path / "bfloat16" / "config.json").read_text())
    exact = HunyuanVideo.from_published(tmp_path / "bfloat16", guidance_dtype="float32")
    torch.testing.assert_close(exact(**given), expected(6000.0), **TOLERANCE)
    exact.save_published(tmp_path / "float32")
    torch.testing.assert_close(HunyuanVideo.from_published(tmp_path / "float32")(**given), exact(**given))
    with pytest.raises(ValueError, match=r"guidance_dtype=float32 \(here bfloat16\)"):
        ours.load_published(tmp_path / "float32")
    with pytest.raises(ValueError, match=r"guidance_dtype='float16'.*bfloat16.*float32"):
        HunyuanVideo.from_published(tmp_path / "float32", guidance_dtype="float16")


@pytest.mark.parametrize("compiled", [False, True])
def test_thousandfold_guidance_equals_bfloat16_arithmetic(compiled: bool):
    """Also compiled: torch.compile would drop the conversions, and embed 6000."""
    scales = torch.cat([torch.tensor([6.0, 0.0, 1.0, 1.5, 7.5]), 20 * torch.rand(500)])
    function = torch.compile(thousandfold, fullgraph=True) if compiled else thousandfold
    rounded = function(scales, "bfloat16")
    assert rounded.dtype == torch.float32
    assert rounded[:5].tolist() == [6016.0, 0.0, 1000.0, 1504.0, 7488.0]
    assert torch.equal(rounded, (scales.to(torch.bfloat16) * 1000).float())
    assert torch.equal(thousandfold(scales, "float32"), 1000 * scales)


def causal(chunk: int = 1, **changes) -> HunyuanVideo:
    settings = {
        "in_channels": 4,
        "out_channels": 4,
        "num_heads": 2,
        "head_dim": 10,
        "depth": 2,
        "single_depth": 2,
        "refiner_depth": 1,
        "text_dim": 16,
        "pooled_dim": 8,
        "rope_axes": (2, 4, 4),
        "causal_chunk": chunk,
    }
    model = HunyuanVideo(**(settings | changes))
    randomize(model)
    return model


def causal_inputs(model: HunyuanVideo, frames: int, padded: bool = True) -> dict[str, Tensor]:
    return inputs(model, padded, frames) | {"timestep": torch.rand(2, frames) * 1000}


@pytest.mark.parametrize("padded", [False, True], ids=["whole-text", "padded-text"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_outputs_and_all_gradients_equal_diffusers(variant: str, padded: bool):
    theirs, ours = pair(variant)
    given = inputs(ours, padded)
    inner = [given[name].requires_grad_() for name in ("latents", "text", "pooled")]
    expected, output = their_output(theirs, given), ours(**given)
    torch.testing.assert_close(output, expected, **TOLERANCE)
    weight = torch.randn_like(expected) / expected.numel() ** 0.5  # gradients of the order of 1
    expected_inner = torch.autograd.grad((expected * weight).sum(), [*inner, *theirs.parameters()])
    own = dict(ours.named_parameters())
    names = [name for name, _ in theirs.named_parameters()]
    assert own.keys() == set(names)
    grads = torch.autograd.grad((output * weight).sum(), [*inner, *(own[name] for name in names)])
    for name, grad, expected_grad in zip(["latents", "text", "pooled", *names], grads, expected_inner, strict=True):
        torch.testing.assert_close(grad, expected_grad, **TOLERANCE, msg=lambda text, name=name: f"{name}: {text}")


def test_guidance_scale_is_not_multiplied_by_1000():
    theirs, ours = pair("guidance")
    given = inputs(ours)
    wrong = ours(**given | {"guidance": given["guidance"] / 1000})
    assert (wrong - their_output(theirs, given)).abs().max() > 1e-2


@pytest.mark.parametrize("where", ["after", "before", "between"])
@pytest.mark.parametrize("chunk", [0, 2])
def test_text_padding_changes_nothing(chunk: int, where: str):
    model = causal(chunk)
    given = causal_inputs(model, 4, padded=False) if chunk else inputs(model)
    padding = 100 * torch.randn(2, 3, 16)
    text = given["text"]
    parts = {"after": (text, padding), "before": (padding, text), "between": (text[:, :2], padding, text[:, 2:])}[where]
    mask = torch.cat([torch.full(part.shape[:2], part is not padding) for part in parts], dim=1)
    padded = given | {"text": torch.cat(parts, dim=1), "text_mask": mask}
    torch.testing.assert_close(model(**padded), model(**given), **TOLERANCE)
    assert (model(**padded | {"text_mask": None}) - model(**given)).abs().max() > 1e-3, "the mask has no effect"


@pytest.mark.parametrize("chunk", [0, 2])
def test_fully_padded_text_gives_finite_outputs_and_gradients(chunk: int):
    model = causal(chunk)
    given = causal_inputs(model, 4) if chunk else inputs(model, padded=True)
    given["text_mask"][0] = False
    output = model(**given)
    output.square().mean().backward()
    assert output.isfinite().all()
    assert all(parameter.grad.isfinite().all() for parameter in model.parameters())
    other = given | {"text": torch.randn_like(given["text"])}
    torch.testing.assert_close(model(**other)[0], output[0], **TOLERANCE)


def test_no_row_of_an_attention_mask_is_empty():
    text_mask = torch.tensor([[False, False], [True, False]])  # attention over nothing is NaN in some kernels
    seen = []
    for chunk in (0, 2):
        model = causal(chunk)
        seen.append(model._mask(2, text_mask, 0, 3, 4, torch.device("cpu")))
        refiner = model.context_embedder
        refiner.token_refiner.refiner_blocks[0].register_forward_pre_hook(lambda _, given: seen.append(given[2]))
        refiner(torch.randn(2, 2, 16), torch.zeros(2), text_mask)
    assert len(seen) == 4
    assert all(mask.any(dim=-1).all() for mask in seen)


def test_text_does_not_depend_on_the_timesteps_of_frames():
    model, texts = causal(1), []
    model.transformer_blocks[-1].register_forward_hook(lambda block, given, result: texts.append(result[1]))
    given = causal_inputs(model, 3)
    for timestep in (given["timestep"], given["timestep"] / 3):
        model(**given | {"timestep": timestep})
    assert torch.equal(*texts)


@pytest.mark.parametrize("chunk", [1, 2, 3])
def test_no_leakage_from_later_chunks(chunk: int):
    model, frames = causal(chunk), 5
    given = causal_inputs(model, frames)
    output = model(**given)
    for changed in range(frames):
        latents, timestep = given["latents"].clone(), given["timestep"].clone()
        latents[:, :, changed] += 1
        timestep[:, changed] = 3
        difference = (model(**given | {"latents": latents, "timestep": timestep}) - output).abs().amax(dim=(0, 1, 3, 4))
        first_seen = changed // chunk * chunk
        assert (difference[:first_seen] == 0).all()
        assert (difference[first_seen:] > 1e-4).all(), "its own chunk and all later ones depend on it"


@pytest.mark.parametrize("padded", [False, True], ids=["whole-text", "padded-text"])
@pytest.mark.parametrize(("chunk", "parts"), [(1, (1, 1, 1, 2)), (2, (2, 2, 1)), (2, (4, 1)), (2, (2, 3)), (3, (5,))])
def test_cached_chunks_equal_one_masked_pass(chunk: int, parts: tuple[int, ...], padded: bool):
    model = causal(chunk)
    given = causal_inputs(model, 5, padded)
    whole, cache, first = model(**given), KeyValueCache(), 0
    for part in parts:
        here = slice(first, first + part)
        piece = given | {"latents": given["latents"][:, :, here], "timestep": given["timestep"][:, here]}
        noise = torch.randn_like(piece["latents"])
        model(**piece | {"latents": noise}, cache=cache, first_frame=first)  # an earlier denoising step, overwritten
        output = model(**piece, cache=cache, first_frame=first)
        torch.testing.assert_close(output, whole[:, :, here], **TOLERANCE)
        first += part


def test_zero_timesteps_per_frame_equal_a_zero_timestep_per_clip():
    _, model = pair("guidance")
    given = inputs(model, padded=True) | {"timestep": torch.zeros(2)}
    torch.testing.assert_close(model(**given | {"timestep": torch.zeros(2, 3)}), model(**given), **TOLERANCE)


def test_timestep_of_a_frame_modulates_this_frame():
    model = causal(1)  # the last frame attends to all frames, and no other frame attends to it
    given = causal_inputs(model, 3)
    later = given["timestep"].clone()
    later[:, 2] /= 2
    difference = (model(**given | {"timestep": later}) - model(**given)).abs().amax(dim=(0, 1, 3, 4))
    assert (difference[:2] == 0).all()
    assert difference[2] > 1e-3


def test_padding_mask_is_the_same_in_flex_attention_and_dense_masks():
    text_mask = torch.tensor([[True, False, True], [False, False, False]])
    dense = block_causal_mask(3, 2, 2, 1)
    blocks = create_block_mask(lambda b, h, q, k: dense[q, k], None, None, 7, 7, device="cpu")
    visible = create_mask(without_padding(blocks, text_mask).mask_mod, 2, 1, 7, 7, device="cpu")
    keys = torch.cat([text_mask, torch.ones(2, 4, dtype=torch.bool)], dim=1)[:, None, None]
    assert torch.equal(visible, dense & keys | torch.eye(7, dtype=torch.bool))


@pytest.mark.parametrize("chunk", [0, 2])
def test_activation_checkpointing_changes_no_output_or_gradient(chunk: int):
    model = causal(chunk)
    given = causal_inputs(model, 4) if chunk else inputs(model)
    results = []
    for model.checkpointing in (False, True):
        model.zero_grad()
        output = model(**given)
        output.square().mean().backward()
        results.append([output, *(parameter.grad.clone() for parameter in model.parameters())])
    torch.testing.assert_close(results[1], results[0], atol=0, rtol=0)


@pytest.mark.parametrize("changes", [{}, {"causal_chunk": 2}, {"pooled_dim": 0}, {"embedded_guidance": True}], ids=str)
def test_every_parameter_receives_a_gradient(changes: dict):
    model = causal(**{"chunk": changes.pop("causal_chunk", 0)} | changes)
    given = causal_inputs(model, 4) if model.causal_chunk else inputs(model)
    if not model.pooled_dim:
        given["pooled"] = None
    model(**given).square().mean().backward()
    assert [name for name, value in model.named_parameters() if value.grad is None or not value.grad.any()] == []


def test_zero_init_gives_zero_output_and_identity_blocks():
    model = HunyuanVideo(4, 4, (1, 2, 2), 2, 10, 1, 1, 1, text_dim=16, pooled_dim=8, rope_axes=(2, 4, 4))
    passed = []
    for block in (model.transformer_blocks[0], model.single_transformer_blocks[0]):
        block.register_forward_hook(lambda block, given, result: passed.append((given[0], result)))
    assert not model(**inputs(model)).any()
    (video, (video_after, _)), (joint, joint_after) = passed
    assert video.any()
    torch.testing.assert_close([video_after, joint_after], [video, joint], atol=0, rtol=0)


def test_without_zero_init_no_weight_is_zero():
    model = HunyuanVideo(4, 4, (1, 2, 2), 2, 10, 1, 1, 1, rope_axes=(2, 4, 4), text_dim=16, zero_init=False)
    assert all(value.any() for name, value in model.named_parameters() if name.endswith("weight"))


def test_output_has_the_dtype_of_the_weights():
    model = causal(0).bfloat16()
    assert model(**inputs(model, padded=True)).dtype == torch.bfloat16


# ---- published weights -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("variant", VARIANTS)
def test_diffusers_loads_a_saved_folder(variant: str, tmp_path: Path):
    theirs, ours = pair(variant)
    ours.save_published(tmp_path / "saved")
    loaded = HunyuanVideoTransformer3DModel.from_pretrained(tmp_path / "saved", low_cpu_mem_usage=False)
    for key, value in (TINY | VARIANTS[variant]).items():
        assert loaded.config[key] == (list(value) if isinstance(value, tuple) else value)
    given = inputs(ours, padded=True)
    torch.testing.assert_close(their_output(loaded, given), their_output(theirs, given), atol=0, rtol=0)


@pytest.mark.parametrize("shard", ["5GB", "20KB"], ids=["one-file", "sharded"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_loads_a_folder_of_diffusers(variant: str, shard: str, tmp_path: Path):
    theirs = diffusers_model(variant)
    theirs.save_pretrained(tmp_path / "transformer", max_shard_size=shard)
    assert (len(list((tmp_path / "transformer").glob("*.safetensors"))) > 1) == (shard == "20KB")
    ours = HunyuanVideo.from_published(tmp_path)  # the folder of a pipeline
    assert all(parameter.requires_grad for parameter in ours.parameters())
    given = inputs(ours, padded=True)
    torch.testing.assert_close(ours(**given), their_output(theirs, given), **TOLERANCE)


def test_diffusers_loads_a_saved_folder_in_shards(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    theirs, ours = pair("guidance")
    monkeypatch.setattr("blueberry_video.weights.diffusers_folder.write_folder.__defaults__", (20_000,))
    ours.save_published(tmp_path)
    assert len(list(tmp_path.glob("*.safetensors"))) > 2
    assert all(file.stat().st_size < 40_000 for file in tmp_path.glob("*.safetensors"))
    loaded = HunyuanVideoTransformer3DModel.from_pretrained(tmp_path, low_cpu_mem_usage=False)
    torch.testing.assert_close(loaded.state_dict(), theirs.state_dict(), atol=0, rtol=0)


def test_causal_chunk_round_trips_through_a_folder(tmp_path: Path):
    model = causal(2)
    model.save_published(tmp_path)
    given = causal_inputs(model, 4)
    torch.testing.assert_close(HunyuanVideo.from_published(tmp_path)(**given), model(**given), atol=0, rtol=0)
    assert HunyuanVideo.from_published(tmp_path, causal_chunk=0).causal_chunk == 0


def test_weights_of_a_different_variant_raise_with_its_name(tmp_path: Path):
    _, guided = pair("guidance")
    _, plain = pair("plain")
    guided.save_published(tmp_path)
    with pytest.raises(ValueError, match=r"HunyuanVideo.*embedded_guidance=True.*False.*model=\w+/"):
        plain.load_published(tmp_path)
    report = pair("guidance")[1].load_published(tmp_path)
    config = tmp_path / "config.json"
    config.write_text(config.read_text().replace('"rope_theta": 256.0', '"rope_theta": 10000.0'))
    with pytest.raises(ValueError, match=r"(?s)rope_theta=10000\.0.*256\.0"):
        pair("guidance")[1].load_published(tmp_path)
    settings = json.loads(config.read_text()) | {"rope_theta": 256.0, "image_condition_type": "token_replace"}
    config.write_text(json.dumps(settings))
    replaced = pair("guidance")[1].load_published(tmp_path)
    assert re.search(r"image_condition=token_replace\b.*\bNone\b", replaced)
    assert re.search(r"HunyuanVideo\b", report)


def test_published_weights_load_in_the_dtype_of_the_model(tmp_path: Path):
    theirs, ours = pair()
    theirs.bfloat16().save_pretrained(tmp_path)
    assert HunyuanVideo.from_published(tmp_path).proj_out.weight.dtype == torch.bfloat16
    ours.load_published(tmp_path)
    assert ours.proj_out.weight.dtype == torch.float32


def test_weights_of_a_different_architecture_raise_with_its_name(tmp_path: Path):
    tiny = {"num_attention_heads": 1, "attention_head_dim": 16, "num_layers": 1, "text_embed_dim": 8}
    CogVideoXTransformer3DModel(**tiny, in_channels=4, sample_height=4, sample_width=4).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"(?s)CogVideoX.*HunyuanVideo"):
        HunyuanVideo.from_published(tmp_path)
    save_file({"some.weight": torch.zeros(1)}, tmp_path / "other.safetensors")
    with pytest.raises(ValueError, match=r"(?s)other\.safetensors.*some\.weight.*HunyuanVideo"):
        HunyuanVideo.from_published(tmp_path / "other.safetensors")


def test_incomplete_folders_raise(tmp_path: Path):
    with pytest.raises(FileNotFoundError, match=r"config\.json"):
        HunyuanVideo.from_published(tmp_path)
    diffusers_model().save_pretrained(tmp_path, max_shard_size="20KB")
    shard = min(tmp_path.glob("*.safetensors"))
    index = json.loads((tmp_path / "diffusion_pytorch_model.safetensors.index.json").read_text())
    shard.write_bytes(shard.read_bytes()[:-8])
    with pytest.raises(ValueError, match=re.escape(shard.name)):
        HunyuanVideo.from_published(tmp_path)
    shard.unlink()
    with pytest.raises(FileNotFoundError, match=re.escape(shard.name)):
        HunyuanVideo.from_published(tmp_path)
    for part in index["weight_map"].values():
        (tmp_path / part).unlink(missing_ok=True)
    (tmp_path / "diffusion_pytorch_model.safetensors.index.json").unlink()
    state = diffusers_model().state_dict()
    del state["transformer_blocks.1.norm1.linear.bias"]
    save_file(state, tmp_path / "diffusion_pytorch_model.safetensors")
    with pytest.raises(ValueError, match=r"(?s)HunyuanVideo.*\b1\b.*transformer_blocks\.1\.norm1\.linear\.bias"):
        HunyuanVideo.from_published(tmp_path)


def test_saving_into_a_folder_with_weights_raises(tmp_path: Path):
    _, ours = pair()
    ours.save_published(tmp_path)
    with pytest.raises(FileExistsError, match=re.escape(str(tmp_path))):
        ours.save_published(tmp_path)
    with pytest.raises(ValueError, match=r"pooled_dim=0\b"):
        causal(pooled_dim=0).save_published(tmp_path / "another")


@pytest.mark.parametrize(
    ("config", "billions"), [("t2v_guidance", 12.821), ("t2v", 12.811), ("i2v_concat", 12.811), ("i2v_replace", 12.821)]
)
def test_published_models_have_the_published_number_of_parameters(config: str, billions: float):
    with torch.device("meta"):
        model = instantiate(OmegaConf.load(CONF / "model" / "hunyuan_video" / f"{config}.yaml"))
        settings = {"guidance_embeds": model.embedded_guidance, "in_channels": model.in_channels}
        theirs = HunyuanVideoTransformer3DModel(**settings)
    assert round(sum(parameter.numel() for parameter in model.parameters()) / 1e9, 3) == billions
    shapes = {name: value.shape for name, value in model.state_dict().items()}
    assert shapes == {name: value.shape for name, value in theirs.state_dict().items()}


# ---- image-to-video and errors ---------------------------------------------------------------------------------------


def test_image_is_concatenated_along_channels_or_replaces_the_first_frame():
    latents, image = torch.randn(2, 4, 3, 2, 2), torch.randn(2, 4, 1, 2, 2)
    noisy, given, known = concat_image(latents, image).split((4, 4, 1), dim=1)
    assert torch.equal(noisy, latents)
    assert torch.equal(given[:, :, :1], image)
    assert not given[:, :, 1:].any()
    assert torch.equal(known, torch.tensor([1.0, 0.0, 0.0]).view(1, 1, 3, 1, 1).expand_as(known))
    replaced = replace_first(latents, image)
    assert torch.equal(replaced[:, :, :1], image)
    assert torch.equal(replaced[:, :, 1:], latents[:, :, 1:])


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"rope_axes": (2, 4, 6)}, r"rope_axes=\(2, 4, 6\).*head_dim=10\b"),
        ({"rope_axes": (4, 3, 3)}, r"rope_axes=\(4, 3, 3\).*head_dim=10\b"),
        ({"image_condition": "concat"}, "image_condition='concat'.*'latent_concat'.*'token_replace'"),
        ({"image_condition": "latent_concat"}, r"in_channels=4\b.*image_condition='latent_concat'.*in_channels=9\b"),
        ({"in_channels": 8}, r"in_channels=8\b.*out_channels=4\b.*in_channels=4\b"),
        ({"chunk": -1}, r"causal_chunk=-1\b"),
        ({"chunk": 2, "patch_size": (2, 1, 1)}, r"causal_chunk=2\b.*patch_size=\(2, 1, 1\)"),
    ],
    ids=str,
)
def test_invalid_settings_raise(changes: dict, expected: str):
    with pytest.raises(ValueError, match=expected):
        causal(**changes)


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"latents": torch.zeros(2, 16, 3, 4, 6)}, r"latents.*\(2, 16, 3, 4, 6\).*in_channels ?= ?4\b"),
        ({"latents": torch.zeros(2, 4, 3, 5, 6)}, r"\b5\b.*patch_size=\(1, 2, 2\).*\b4\b"),
        ({"latents": torch.zeros(2, 4, 3, 4, 7)}, r"\b7\b.*patch_size=\(1, 2, 2\).*\b8\b"),
        ({"latents": torch.zeros(2, 4, 0, 4, 6)}, r"\b0\b.*patch_size=\(1, 2, 2\).*\b1\b"),
        ({"timestep": torch.zeros(2, 4)}, r"timestep.*\(2, 4\).*\(2,\).*\(2, 3\)"),
        ({"timestep": torch.zeros(())}, r"timestep.*\(\).*\(2,\).*\(2, 3\)"),
        ({"text": torch.zeros(2, 5, 8)}, r"text.*\(2, 5, 8\).*text_dim ?= ?16\b"),
        ({"text": torch.zeros(1, 5, 16)}, r"text.*\(1, 5, 16\).*B ?= ?2\b"),
        ({"text_mask": torch.ones(2, 4, dtype=torch.bool)}, r"text_mask.*\(2, 4\).*\(2, 5\)"),
        ({"text_mask": torch.ones(2, 5)}, r"text_mask.*torch\.float32.*torch\.bool"),
        ({"pooled": None}, r"pooled.*None.*pooled_dim=8\b.*\(2, 8\)"),
        ({"pooled": torch.zeros(2, 9)}, r"pooled.*\(2, 9\).*pooled_dim=8\b.*\(2, 8\)"),
        ({"guidance": torch.ones(2)}, r"guidance.*\(2,\).*embedded_guidance=False.*None"),
        ({"cache": KeyValueCache()}, r"cache.*first_frame=0\b.*causal_chunk"),
        ({"first_frame": 2}, r"first_frame=2\b.*causal_chunk"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_invalid_inputs_raise(changes: dict, expected: str):
    model = causal(0, patch_size=(1, 2, 2))
    given = inputs(model)
    model(**given)
    with pytest.raises(ValueError, match=expected):
        model(**given | changes)


def test_guidance_distilled_model_requires_one_scale_per_clip():
    _, model = pair("guidance")
    for wrong, shape in ((None, "None"), (torch.ones(1), r"\(1,\)")):
        with pytest.raises(ValueError, match=rf"guidance.*{shape}.*embedded_guidance=True.*\(2,\)"):
            model(**inputs(model) | {"guidance": wrong})


def test_invalid_timesteps_or_cache_of_a_causal_model_raise():
    model = causal(2)
    given = causal_inputs(model, 2)
    with pytest.raises(ValueError, match=r"causal_chunk=2\b.*\(B, T\)"):
        model(**given | {"timestep": torch.zeros(2)})
    for first in (1, -2):
        with pytest.raises(ValueError, match=rf"first_frame={first}\b.*causal_chunk=2\b"):
            model(**given, cache=KeyValueCache(), first_frame=first)
    with pytest.raises(ValueError, match=r"first_frame=2\b.*cache"):
        model(**given, first_frame=2)
    with pytest.raises(ValueError, match=r"cache.*\b0 tokens.*first_frame.*\b17\b"):
        model(**given, cache=KeyValueCache(), first_frame=2)
    with pytest.raises(ValueError, match=r"patch_size=\(3, 2, 2\)"):
        pair("patches-in-time")[1](**inputs(pair("patches-in-time")[1]) | {"timestep": torch.zeros(2, 3)})


def test_weights_with_rectangular_patches_load_but_are_not_written_for_diffusers(tmp_path: Path):
    source, target = causal(patch_size=(1, 1, 2)), causal(patch_size=(1, 1, 2))
    with torch.no_grad():
        source.proj_out.weight.fill_(0.5)
    save_file(source.state_dict(), tmp_path / "weights.safetensors")
    target.load_published(tmp_path / "weights.safetensors")
    assert torch.equal(target.proj_out.weight, source.proj_out.weight)
    with pytest.raises(ValueError, match=r"patch_size=\(1, 1, 2\)"):
        source.save_published(tmp_path / "saved")
