"""HunyuanVideo against diffusers, on tiny models that are random in every parameter; and what diffusers has not: causal
attention, its cache, a time a frame.
"""

import json
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
from blueberry_video.models.hunyuan_video import model as hunyuan_video
from blueberry_video.models.hunyuan_video.model import HunyuanVideo, from_published, save_published
from blueberry_video.diffusion.conditioning import concat_image
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


def randomise(model: nn.Module) -> None:
    """Every parameter, norms and biases included."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.15)
            if parameter.ndim == 1:
                parameter += 0.5


def diffusers_model(variant: str = "plain") -> HunyuanVideoTransformer3DModel:
    model = HunyuanVideoTransformer3DModel(**(TINY | VARIANTS[variant]))
    randomise(model)
    return model


def pair(variant: str = "plain") -> tuple[HunyuanVideoTransformer3DModel, HunyuanVideo]:
    """The same weights in both."""
    theirs = diffusers_model(variant)
    ours = HunyuanVideo(**hunyuan_video.settings_of(theirs.state_dict(), dict(theirs.config)))
    ours.load_state_dict(theirs.state_dict())
    return theirs, ours


def inputs(model: HunyuanVideo, padded: bool = False, frames: int = 3, length: int = 5) -> dict[str, Tensor]:
    """A batch of two clips; the texts are of two lengths if ``padded``."""
    given = {
        "latents": torch.randn(2, model.in_channels, frames, 4, 6),
        "time": torch.tensor([500.25, 13.5]),
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
    guidance = given["guidance"] * 1000 if "guidance" in given else None
    return model(given["latents"], given["time"], given["text"], mask, given["pooled"], guidance).sample


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
    randomise(model)
    return model


def causal_inputs(model: HunyuanVideo, frames: int, padded: bool = True) -> dict[str, Tensor]:
    return inputs(model, padded, frames) | {"time": torch.rand(2, frames) * 1000}


@pytest.mark.parametrize("padded", [False, True], ids=["whole-text", "padded-text"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_outputs_and_all_gradients_are_those_of_diffusers(variant: str, padded: bool):
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


def test_the_guidance_scale_is_told_in_thousandths():
    theirs, ours = pair("guidance")
    given = inputs(ours)
    wrong = ours(**given | {"guidance": given["guidance"] / 1000})
    assert (wrong - their_output(theirs, given)).abs().max() > 1e-2


@pytest.mark.parametrize("where", ["behind", "before", "between"])
@pytest.mark.parametrize("chunk", [0, 2])
def test_text_padding_changes_nothing(chunk: int, where: str):
    model = causal(chunk)
    given = causal_inputs(model, 4, padded=False) if chunk else inputs(model)
    padding = 100 * torch.randn(2, 3, 16)
    text = given["text"]
    parts = {
        "behind": (text, padding),
        "before": (padding, text),
        "between": (text[:, :2], padding, text[:, 2:]),
    }[where]
    mask = torch.cat([torch.full(part.shape[:2], part is not padding) for part in parts], dim=1)
    padded = given | {"text": torch.cat(parts, dim=1), "text_mask": mask}
    torch.testing.assert_close(model(**padded), model(**given), **TOLERANCE)
    assert (model(**padded | {"text_mask": None}) - model(**given)).abs().max() > 1e-3, "the mask does nothing"


@pytest.mark.parametrize("chunk", [0, 2])
def test_a_text_of_padding_alone_gives_finite_outputs_and_gradients(chunk: int):
    model = causal(chunk)
    given = causal_inputs(model, 4) if chunk else inputs(model, padded=True)
    given["text_mask"][0] = False
    output = model(**given)
    output.square().mean().backward()
    assert output.isfinite().all()
    assert all(parameter.grad.isfinite().all() for parameter in model.parameters())
    other = given | {"text": torch.randn_like(given["text"])}
    torch.testing.assert_close(model(**other)[0], output[0], **TOLERANCE)


def test_no_row_of_a_mask_is_empty():
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


def test_the_text_does_not_depend_on_the_times_of_frames():
    model, texts = causal(1), []
    model.transformer_blocks[-1].register_forward_hook(lambda block, given, result: texts.append(result[1]))
    given = causal_inputs(model, 3)
    for time in (given["time"], given["time"] / 3):
        model(**given | {"time": time})
    assert torch.equal(*texts)


@pytest.mark.parametrize("chunk", [1, 2, 3])
def test_no_leakage_from_later_chunks(chunk: int):
    model, frames = causal(chunk), 5
    given = causal_inputs(model, frames)
    output = model(**given)
    for changed in range(frames):
        latents, time = given["latents"].clone(), given["time"].clone()
        latents[:, :, changed] += 1
        time[:, changed] = 3
        difference = (model(**given | {"latents": latents, "time": time}) - output).abs().amax(dim=(0, 1, 3, 4))
        first_seen = changed // chunk * chunk
        assert (difference[:first_seen] == 0).all()
        assert (difference[first_seen:] > 1e-4).all(), "all of its own and of later chunks see it"


@pytest.mark.parametrize("padded", [False, True], ids=["whole-text", "padded-text"])
@pytest.mark.parametrize(("chunk", "parts"), [(1, (1, 1, 1, 2)), (2, (2, 2, 1)), (2, (4, 1)), (2, (2, 3)), (3, (5,))])
def test_the_cache_gives_what_the_whole_mask_gives(chunk: int, parts: tuple[int, ...], padded: bool):
    model = causal(chunk)
    given = causal_inputs(model, 5, padded)
    whole, cache, first = model(**given), KeyValueCache(), 0
    for part in parts:
        here = slice(first, first + part)
        piece = given | {"latents": given["latents"][:, :, here], "time": given["time"][:, here]}
        noise = torch.randn_like(piece["latents"])
        model(**piece | {"latents": noise}, cache=cache, first_frame=first)  # an earlier step, which is to be forgotten
        output = model(**piece, cache=cache, first_frame=first)
        torch.testing.assert_close(output, whole[:, :, here], **TOLERANCE)
        first += part


def test_a_time_a_frame_is_a_time_a_clip_where_all_are_zero():
    _, model = pair("guidance")
    given = inputs(model, padded=True) | {"time": torch.zeros(2)}
    torch.testing.assert_close(model(**given | {"time": torch.zeros(2, 3)}), model(**given), **TOLERANCE)


def test_a_time_a_frame_modulates_this_frame():
    model = causal(1)  # the last frame sees all, and nobody sees it
    given = causal_inputs(model, 3)
    later = given["time"].clone()
    later[:, 2] /= 2
    difference = (model(**given | {"time": later}) - model(**given)).abs().amax(dim=(0, 1, 3, 4))
    assert (difference[:2] == 0).all()
    assert difference[2] > 1e-3


def test_padding_is_hidden_from_flex_attention_as_from_a_dense_mask():
    text_mask = torch.tensor([[True, False, True], [False, False, False]])
    dense = block_causal_mask(3, 2, 2, 1)
    blocks = create_block_mask(lambda b, h, q, k: dense[q, k], None, None, 7, 7, device="cpu")
    visible = create_mask(without_padding(blocks, text_mask).mask_mod, 2, 1, 7, 7, device="cpu")
    keys = torch.cat([text_mask, torch.ones(2, 4, dtype=torch.bool)], dim=1)[:, None, None]
    assert torch.equal(visible, dense & keys | torch.eye(7, dtype=torch.bool))


@pytest.mark.parametrize("chunk", [0, 2])
def test_checkpointing_changes_nothing(chunk: int):
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


def test_zero_initialised_it_is_zero_and_its_blocks_pass_on_their_input():
    model = HunyuanVideo(4, 4, (1, 2, 2), 2, 10, 1, 1, 1, text_dim=16, pooled_dim=8, rope_axes=(2, 4, 4))
    passed = []
    for block in (model.transformer_blocks[0], model.single_transformer_blocks[0]):
        block.register_forward_hook(lambda block, given, result: passed.append((given[0], result)))
    assert not model(**inputs(model)).any()
    (video, (video_after, _)), (joint, joint_after) = passed
    assert video.any()
    torch.testing.assert_close([video_after, joint_after], [video, joint], atol=0, rtol=0)


def test_without_zero_init_nothing_is_zero_but_biases():
    model = HunyuanVideo(4, 4, (1, 2, 2), 2, 10, 1, 1, 1, rope_axes=(2, 4, 4), text_dim=16, zero_init=False)
    assert all(value.any() for name, value in model.named_parameters() if name.endswith("weight"))


def test_it_runs_in_the_precision_of_its_weights():
    model = causal(0).bfloat16()
    assert model(**inputs(model, padded=True)).dtype == torch.bfloat16


# ---- published weights -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_saved_folder_is_loaded_by_diffusers(variant: str, tmp_path: Path):
    theirs, ours = pair(variant)
    save_published(ours, tmp_path / "saved")
    loaded = HunyuanVideoTransformer3DModel.from_pretrained(tmp_path / "saved", low_cpu_mem_usage=False)
    for key, value in (TINY | VARIANTS[variant]).items():
        assert loaded.config[key] == (list(value) if isinstance(value, tuple) else value)
    given = inputs(ours, padded=True)
    torch.testing.assert_close(their_output(loaded, given), their_output(theirs, given), atol=0, rtol=0)


@pytest.mark.parametrize("shard", ["5GB", "20KB"], ids=["one-file", "sharded"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_a_folder_of_diffusers_is_loaded(variant: str, shard: str, tmp_path: Path):
    theirs = diffusers_model(variant)
    theirs.save_pretrained(tmp_path / "transformer", max_shard_size=shard)
    assert (len(list((tmp_path / "transformer").glob("*.safetensors"))) > 1) == (shard == "20KB")
    ours = from_published(tmp_path)  # the folder of a pipeline
    assert all(parameter.requires_grad for parameter in ours.parameters())
    given = inputs(ours, padded=True)
    torch.testing.assert_close(ours(**given), their_output(theirs, given), **TOLERANCE)


def test_a_folder_in_shards_is_written_as_diffusers_reads_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    theirs, ours = pair("guidance")
    monkeypatch.setattr("blueberry_video.weights.diffusers_folder.write_folder.__defaults__", (20_000,))
    save_published(ours, tmp_path)
    assert len(list(tmp_path.glob("*.safetensors"))) > 2
    assert all(file.stat().st_size < 40_000 for file in tmp_path.glob("*.safetensors"))
    loaded = HunyuanVideoTransformer3DModel.from_pretrained(tmp_path, low_cpu_mem_usage=False)
    torch.testing.assert_close(loaded.state_dict(), theirs.state_dict(), atol=0, rtol=0)


def test_what_a_causal_model_was_saved_with_is_read_again(tmp_path: Path):
    model = causal(2)
    save_published(model, tmp_path)
    given = causal_inputs(model, 4)
    torch.testing.assert_close(from_published(tmp_path)(**given), model(**given), atol=0, rtol=0)
    assert from_published(tmp_path, causal_chunk=0).causal_chunk == 0


def test_weights_of_another_variant_are_refused_by_name(tmp_path: Path):
    _, guided = pair("guidance")
    _, plain = pair("plain")
    save_published(guided, tmp_path)
    with pytest.raises(
        ValueError, match=r"guidance-distilled.*, but the model is .*without embedded guidance"
    ) as error:
        hunyuan_video.load_published(plain, tmp_path)
    assert "choose the model=text_to_video/…" in str(error.value)
    said = hunyuan_video.load_published(pair("guidance")[1], tmp_path)
    config = tmp_path / "config.json"
    config.write_text(config.read_text().replace('"rope_theta": 256.0', '"rope_theta": 10000.0'))
    with pytest.raises(ValueError, match=r"was trained with rope_theta=10000.0 \(here 256.0\), which no weight tells"):
        hunyuan_video.load_published(pair("guidance")[1], tmp_path)
    settings = json.loads(config.read_text()) | {"rope_theta": 256.0, "image_condition_type": "token_replace"}
    config.write_text(json.dumps(settings))
    other = hunyuan_video.load_published(pair("guidance")[1], tmp_path)
    assert other.endswith("trained with image_condition_type=token_replace (here None)")
    assert said.startswith("loaded HunyuanVideo text-to-video or token_replace, guidance-distilled (2 + 2 blocks")


def test_published_weights_take_the_precision_of_the_model_they_are_put_into(tmp_path: Path):
    theirs, ours = pair()
    theirs.bfloat16().save_pretrained(tmp_path)
    assert from_published(tmp_path).proj_out.weight.dtype == torch.bfloat16
    hunyuan_video.load_published(ours, tmp_path)
    assert ours.proj_out.weight.dtype == torch.float32


def test_weights_of_another_architecture_are_refused_by_name(tmp_path: Path):
    tiny = {"num_attention_heads": 1, "attention_head_dim": 16, "num_layers": 1, "text_embed_dim": 8}
    CogVideoXTransformer3DModel(**tiny, in_channels=4, sample_height=4, sample_width=4).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="holds CogVideoX, not HunyuanVideo: choose the model"):
        from_published(tmp_path)
    save_file({"some.weight": torch.zeros(1)}, tmp_path / "other.safetensors")
    with pytest.raises(ValueError, match=r"holds an unknown architecture \(some.weight, …\)"):
        from_published(tmp_path / "other.safetensors")


def test_incomplete_folders_are_refused(tmp_path: Path):
    with pytest.raises(FileNotFoundError, match=r"holds no config\.json"):
        from_published(tmp_path)
    diffusers_model().save_pretrained(tmp_path, max_shard_size="20KB")
    shard = min(tmp_path.glob("*.safetensors"))
    index = json.loads((tmp_path / "diffusion_pytorch_model.safetensors.index.json").read_text())
    shard.write_bytes(shard.read_bytes()[:-8])
    with pytest.raises(ValueError, match=r"cannot be read: it is damaged"):
        from_published(tmp_path)
    shard.unlink()
    with pytest.raises(FileNotFoundError, match=f"lacks {shard.name}"):
        from_published(tmp_path)
    for part in index["weight_map"].values():
        (tmp_path / part).unlink(missing_ok=True)
    (tmp_path / "diffusion_pytorch_model.safetensors.index.json").unlink()
    state = diffusers_model().state_dict()
    del state["transformer_blocks.1.norm1.linear.bias"]
    save_file(state, tmp_path / "diffusion_pytorch_model.safetensors")
    with pytest.raises(ValueError, match=r"1 missing, such as transformer_blocks\.1\.norm1\.linear\.bias"):
        from_published(tmp_path)


def test_a_folder_with_weights_is_not_written_over(tmp_path: Path):
    _, ours = pair()
    save_published(ours, tmp_path)
    with pytest.raises(FileExistsError, match="choose another folder"):
        save_published(ours, tmp_path)
    with pytest.raises(ValueError, match="pooled_dim=0"):
        save_published(causal(pooled_dim=0), tmp_path / "another")


@pytest.mark.parametrize(
    ("config", "billions"), [("t2v_guidance", 12.821), ("t2v", 12.811), ("i2v_concat", 12.811), ("i2v_replace", 12.821)]
)
def test_the_published_models_have_their_number_of_parameters(config: str, billions: float):
    with torch.device("meta"):
        model = instantiate(OmegaConf.load(CONF / "model" / "hunyuan_video" / f"{config}.yaml"))
        settings = {"guidance_embeds": model.embedded_guidance, "in_channels": model.in_channels}
        theirs = HunyuanVideoTransformer3DModel(**settings)
    assert round(sum(parameter.numel() for parameter in model.parameters()) / 1e9, 3) == billions
    shapes = {name: value.shape for name, value in model.state_dict().items()}
    assert shapes == {name: value.shape for name, value in theirs.state_dict().items()}


# ---- image-to-video, and what is refused -----------------------------------------------------------------------------


def test_an_image_stands_beside_or_in_place_of_the_first_frame():
    latents, image = torch.randn(2, 4, 3, 2, 2), torch.randn(2, 4, 1, 2, 2)
    noisy, given, known = concat_image(latents, image).split((4, 4, 1), dim=1)
    assert torch.equal(noisy, latents)
    assert torch.equal(given[:, :, :1], image)
    assert not given[:, :, 1:].any()
    assert torch.equal(known, torch.tensor([1.0, 0.0, 0.0]).view(1, 1, 3, 1, 1).expand_as(known))
    replaced = hunyuan_video.replace_first(latents, image)
    assert torch.equal(replaced[:, :, :1], image)
    assert torch.equal(replaced[:, :, 1:], latents[:, :, 1:])


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"rope_axes": (2, 4, 6)}, r"rope_axes=\(2, 4, 6\) .* head_dim=10"),
        ({"rope_axes": (4, 3, 3)}, "three even numbers"),
        ({"image_condition": "concat"}, "image_condition='concat' is unknown: choose null, 'latent_concat'"),
        ({"image_condition": "latent_concat"}, "needs in_channels=9"),
        ({"in_channels": 8}, "in_channels=8 with out_channels=4"),
        ({"chunk": -1}, "causal_chunk=-1"),
        ({"chunk": 2, "patch_size": (2, 1, 1)}, r"causal_chunk=2 .*patch_size=\(2, 1, 1\)"),
    ],
    ids=str,
)
def test_settings_that_do_not_fit_are_refused(changes: dict, said: str):
    with pytest.raises(ValueError, match=said):
        causal(**changes)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"latents": torch.zeros(2, 16, 3, 4, 6)}, r"in_channels = 4"),
        ({"latents": torch.zeros(2, 4, 3, 5, 6)}, "5 rows, no multiple of .*: the nearest is 4"),
        ({"latents": torch.zeros(2, 4, 3, 4, 7)}, "7 columns, .* nearest is 8"),
        ({"latents": torch.zeros(2, 4, 0, 4, 6)}, "0 frames"),
        ({"time": torch.zeros(2, 4)}, r"time has the shape \(2, 4\): expected \(2,\).*\(2, 3\)"),
        ({"time": torch.zeros(())}, r"time has the shape \(\)"),
        ({"text": torch.zeros(2, 5, 8)}, "text_dim = 16"),
        ({"text": torch.zeros(1, 5, 16)}, "B = 2"),
        ({"text_mask": torch.ones(2, 4, dtype=torch.bool)}, r"text_mask is a torch.bool tensor of shape \(2, 4\)"),
        ({"text_mask": torch.ones(2, 5)}, "text_mask is a torch.float32 tensor"),
        ({"pooled": None}, "pooled has the shape None: with pooled_dim=8"),
        ({"pooled": torch.zeros(2, 9)}, r"pooled has the shape \(2, 9\)"),
        ({"guidance": torch.ones(2)}, r"guidance has the shape \(2,\): with embedded_guidance=False it must be None"),
        ({"cache": KeyValueCache()}, "set causal_chunk"),
        ({"first_frame": 2}, "set causal_chunk"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_inputs_that_do_not_fit_are_refused(changes: dict, said: str):
    model = causal(0, patch_size=(1, 2, 2))
    given = inputs(model)
    model(**given)
    with pytest.raises(ValueError, match=said):
        model(**given | changes)


def test_a_guided_model_needs_a_scale():
    _, model = pair("guidance")
    for wrong in (None, torch.ones(1)):
        with pytest.raises(ValueError, match="a scale a clip"):
            model(**inputs(model) | {"guidance": wrong})


def test_what_a_causal_model_cannot_know_is_refused():
    model = causal(2)
    given = causal_inputs(model, 2)
    with pytest.raises(ValueError, match="causal_chunk=2 needs a time a frame"):
        model(**given | {"time": torch.zeros(2)})
    for first in (1, -2):
        with pytest.raises(ValueError, match=f"first_frame={first} must be a multiple of causal_chunk=2"):
            model(**given, cache=KeyValueCache(), first_frame=first)
    with pytest.raises(ValueError, match=r"first_frame=2 must be .* with the cache"):
        model(**given, first_frame=2)
    with pytest.raises(ValueError, match="the cache holds 0 tokens"):
        model(**given, cache=KeyValueCache(), first_frame=2)
    with pytest.raises(ValueError, match="a time a frame needs tokens of one frame"):
        pair("patches-in-time")[1](**inputs(pair("patches-in-time")[1]) | {"time": torch.zeros(2, 3)})
