"""HunyuanVideo-1.5: parity with diffusers, on tiny models with random parameters.

diffusers represents absent conditioning by padding and zeros, and moves padding to the end. This package omits it, or
masks it in place. The output for the video is the same.
"""

from pathlib import Path

import pytest
import torch
from diffusers import HunyuanVideo15Transformer3DModel
from diffusers.models.transformers import transformer_hunyuan_video15
from hydra.utils import instantiate
from omegaconf import OmegaConf
from safetensors.torch import save_file
from torch import Tensor, nn

from blueberry_video.config import CONF
from blueberry_video.models.hunyuan_video import model_15 as hunyuan_video15
from blueberry_video.models.hunyuan_video.model_15 import HunyuanVideo15
from blueberry_video.nn.joint_attention import KeyValueCache

TOLERANCE = {"atol": 1e-5, "rtol": 1e-5}  # fp32 round-off of a few layers; a dropped bias changes outputs by 1e-2

TINY = {
    "in_channels": 9,
    "out_channels": 4,
    "num_attention_heads": 2,
    "attention_head_dim": 10,
    "num_layers": 2,
    "num_refiner_layers": 2,
    "text_embed_dim": 16,
    "text_embed_2_dim": 12,
    "image_embed_dim": 6,
    "rope_axes_dim": (2, 4, 4),
}
VARIANTS = {
    "plain": {},
    "patches": {"patch_size": 2, "mlp_ratio": 2.5, "num_refiner_layers": 1, "rope_theta": 100.0},
    "meanflow": {"use_meanflow": True},
}


@pytest.fixture(autouse=True)
def narrow_projection(monkeypatch: pytest.MonkeyPatch) -> None:
    """Reduces the projection of ByT5 from 2,048 to 24 channels in both models, which would dominate a tiny model."""
    theirs = transformer_hunyuan_video15.HunyuanVideo15ByT5TextProjection
    narrow = lambda in_features, _, out_features: theirs(in_features, 24, out_features)  # noqa: E731
    monkeypatch.setattr(transformer_hunyuan_video15, "HunyuanVideo15ByT5TextProjection", narrow)
    monkeypatch.setattr(hunyuan_video15, "LETTERS_HIDDEN", 24)


def randomize(model: nn.Module) -> None:
    """Draws every parameter at random, including norms and biases."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.15)
            if parameter.ndim == 1:
                parameter += 0.5


def pair(variant: str = "plain") -> tuple[HunyuanVideo15Transformer3DModel, HunyuanVideo15]:
    """Models of diffusers and of this package with the same weights."""
    theirs = HunyuanVideo15Transformer3DModel(**(TINY | VARIANTS[variant]))
    randomize(theirs)
    ours = HunyuanVideo15(**HunyuanVideo15.settings_of(theirs.state_dict(), dict(theirs.config)))
    ours.load_state_dict(theirs.state_dict())
    return theirs, ours


def causal(chunk: int) -> HunyuanVideo15:
    model = HunyuanVideo15(
        **HunyuanVideo15.settings_of(pair()[1].state_dict(), {}) | SETTINGS | {"causal_chunk": chunk}
    )
    randomize(model)
    return model


SETTINGS = {"rope_axes": (2, 4, 4)}  # cannot be inferred from tensor shapes


def inputs(model: HunyuanVideo15, letters: bool = True, image: bool = True, frames: int = 3) -> dict[str, Tensor]:
    """Batch of two clips, with texts and letters of different lengths."""
    given = {
        "latents": torch.randn(2, model.in_channels, frames, 4, 6),
        "timestep": torch.tensor([500.25, 13.5]),
        "text": torch.randn(2, 5, model.text_dim),
        "text_mask": torch.arange(5) < torch.tensor([[3], [5]]),
    }
    if letters:
        mask = torch.arange(4) < torch.tensor([[4], [1]])
        given |= {"letters": torch.randn(2, 4, model.letters_dim), "letters_mask": mask}
    if image:
        given["image"] = torch.randn(2, 3, model.image_dim)
    if model.meanflow:
        given["end_timestep"] = torch.tensor([400.5, 0.0])
    return given


def causal_inputs(model: HunyuanVideo15, frames: int) -> dict[str, Tensor]:
    return inputs(model, frames=frames) | {"timestep": torch.rand(2, frames) * 1000}


def their_output(model: HunyuanVideo15Transformer3DModel, given: dict[str, Tensor]) -> Tensor:
    """Output of diffusers' model; as in its pipelines, absent inputs are zeros, and absent letters are also masked."""
    return model(
        given["latents"],
        given["timestep"],
        given["text"],
        given["text_mask"],
        given.get("end_timestep"),
        given.get("letters", torch.zeros(2, 4, model.config.text_embed_2_dim)),
        given.get("letters_mask", torch.zeros(2, 4, dtype=torch.bool)),
        given.get("image", torch.zeros(2, 3, model.config.image_embed_dim)),
    ).sample


@pytest.mark.parametrize("image", [False, True], ids=["text-to-video", "image-to-video"])
@pytest.mark.parametrize("letters", [False, True], ids=["no-letters", "letters"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_outputs_and_all_gradients_equal_diffusers(variant: str, letters: bool, image: bool):
    theirs, ours = pair(variant)
    given = inputs(ours, letters, image)
    inner = {name: value.requires_grad_() for name, value in given.items() if name in ("latents", "text", "letters")}
    expected, output = their_output(theirs, given), ours(**given)
    torch.testing.assert_close(output, expected, **TOLERANCE)
    weight = torch.randn_like(expected) / expected.numel() ** 0.5  # gradients of the order of 1
    names = [name for name, _ in theirs.named_parameters()]
    own = dict(ours.named_parameters())
    assert own.keys() == set(names)
    wanted = [[*inner.values(), *theirs.parameters()], [*inner.values(), *(own[name] for name in names)]]
    expected_grads, grads = (
        torch.autograd.grad((out * weight).sum(), leaves, allow_unused=True, materialize_grads=True)
        for out, leaves in zip((expected, output), wanted, strict=True)
    )
    for name, grad, expected_grad in zip([*inner, *names], grads, expected_grads, strict=True):
        torch.testing.assert_close(grad, expected_grad, **TOLERANCE, msg=lambda text, name=name: f"{name}: {text}")


def test_padding_of_text_and_letters_is_masked():
    _, model = pair()
    given = inputs(model)
    for tokens, mask in (("text", "text_mask"), ("letters", "letters_mask")):
        longer = torch.cat([given[tokens], 100 * torch.randn_like(given[tokens])], dim=1)
        padded = {tokens: longer, mask: torch.cat([given[mask], torch.zeros_like(given[mask])], dim=1)}
        torch.testing.assert_close(model(**given | padded), model(**given), **TOLERANCE)
        assert (model(**given | padded | {mask: None}) - model(**given)).abs().max() > 1e-3, "the mask has no effect"


@pytest.mark.parametrize("parts", [(1, 1, 1, 1), (2, 2), (1, 3)], ids=str)
def test_cached_chunks_equal_one_masked_pass(parts: tuple[int, ...]):
    model = causal(1 if 1 in parts else 2)
    given = causal_inputs(model, 4)
    whole, cache, first = model(**given), KeyValueCache(), 0
    for part in parts:
        here = slice(first, first + part)
        piece = given | {"latents": given["latents"][:, :, here], "timestep": given["timestep"][:, here]}
        torch.testing.assert_close(model(**piece, cache=cache, first_frame=first), whole[:, :, here], **TOLERANCE)
        first += part


def test_no_leakage_from_later_chunks():
    model = causal(2)
    given = causal_inputs(model, 4)
    latents, timestep = given["latents"].clone(), given["timestep"].clone()
    latents[:, :, 2:] += 1
    timestep[:, 2:] = 3
    difference = (
        (model(**given | {"latents": latents, "timestep": timestep}) - model(**given)).abs().amax(dim=(0, 1, 3, 4))
    )
    assert (difference[:2] == 0).all()
    assert (difference[2:] > 1e-3).all()


def test_activation_checkpointing_changes_no_output_or_gradient():
    _, model = pair()
    given = inputs(model)
    results = []
    for model.checkpointing in (False, True):
        model.zero_grad()
        output = model(**given)
        output.square().mean().backward()
        results.append([output, *(value.grad.clone() for value in model.parameters() if value.grad is not None)])
    torch.testing.assert_close(results[1], results[0], atol=0, rtol=0)


@pytest.mark.parametrize("variant", ["plain", "meanflow"])
def test_every_parameter_except_the_last_text_layers_receives_a_gradient(variant: str):
    _, model = pair(variant)
    model(**inputs(model)).square().mean().backward()
    idle = [name for name, value in model.named_parameters() if value.grad is None or not value.grad.any()]
    # As published: the text tokens after the last block are unused.
    assert {name.removeprefix("transformer_blocks.1.").split(".")[0] for name in idle} == {"attn", "ff_context"}
    assert all(
        ".to_add_out." in name or ".ff_context." in name or ".add_q_" in name or "added_q" in name for name in idle
    )


def test_zero_init_gives_zero_output():
    settings = HunyuanVideo15.settings_of(pair()[1].state_dict(), {}) | SETTINGS
    model = HunyuanVideo15(**settings)
    assert not model(**inputs(model)).any()
    assert HunyuanVideo15(**settings, zero_init=False)(**inputs(model)).any()


# ---- published weights -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("variant", VARIANTS)
def test_saved_folders_round_trip_with_diffusers(variant: str, tmp_path: Path):
    theirs, ours = pair(variant)
    ours.save_published(tmp_path / "ours", "i2v", 960)
    loaded = HunyuanVideo15Transformer3DModel.from_pretrained(tmp_path / "ours", low_cpu_mem_usage=False)
    for key, value in (TINY | VARIANTS[variant] | {"task_type": "i2v", "target_size": 960}).items():
        assert loaded.config[key] == (list(value) if isinstance(value, tuple) else value)
    given = inputs(ours)
    expected = their_output(theirs, given)
    torch.testing.assert_close(their_output(loaded, given), expected, atol=0, rtol=0)
    theirs.save_pretrained(tmp_path / "theirs", max_shard_size="20KB")
    torch.testing.assert_close(HunyuanVideo15.from_published(tmp_path / "theirs")(**given), expected, **TOLERANCE)


def test_causal_chunk_round_trips_through_a_folder(tmp_path: Path):
    model = causal(2)
    model.save_published(tmp_path)
    given = causal_inputs(model, 4)
    torch.testing.assert_close(HunyuanVideo15.from_published(tmp_path)(**given), model(**given), atol=0, rtol=0)


def test_weights_of_a_different_variant_or_version_raise_with_its_name(tmp_path: Path):
    _, plain = pair("plain")
    pair("meanflow")[1].save_published(tmp_path / "meanflow")
    with pytest.raises(ValueError, match=r"HunyuanVideo-1\.5.*meanflow=True.*False.*model=\w+/"):
        plain.load_published(tmp_path / "meanflow")
    plain.save_published(tmp_path / "plain")
    report = pair()[1].load_published(tmp_path / "plain")
    assert "HunyuanVideo-1.5" in report
    assert "(meanflow)" not in report
    first = {"context_embedder.proj_in.weight": torch.zeros(1)}
    save_file(first, tmp_path / "first.safetensors")
    with pytest.raises(ValueError, match=r"(?s)first\.safetensors.*HunyuanVideo\b(?!-).*HunyuanVideo-1\.5"):
        HunyuanVideo15.from_published(tmp_path / "first.safetensors")


def test_published_model_has_the_published_number_of_parameters(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.undo()  # restores the width of the projection
    with torch.device("meta"):
        model = instantiate(OmegaConf.load(CONF / "model" / "hunyuan_video" / "v1_5.yaml"))
        theirs = HunyuanVideo15Transformer3DModel()
    assert round(sum(parameter.numel() for parameter in model.parameters()) / 1e9, 3) == 8.327
    shapes = {name: value.shape for name, value in model.state_dict().items()}
    assert shapes == {name: value.shape for name, value in theirs.state_dict().items()}


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"pooled": torch.zeros(2, 8)}, r"HunyuanVideo-1\.5.*pooled.*None"),
        ({"guidance": torch.zeros(2)}, r"HunyuanVideo-1\.5.*guidance.*None"),
        ({"end_timestep": torch.zeros(2)}, r"end_timestep.*\(2,\).*meanflow=False.*None"),
        ({"letters": torch.zeros(2, 4, 3)}, r"letters.*\(2, 4, 3\).*letters_dim ?= ?12\b"),
        ({"letters_mask": torch.ones(2, 4)}, r"letters_mask.*torch\.float32.*torch\.bool"),
        ({"image": torch.zeros(1, 3, 6)}, r"image.*\(1, 3, 6\).*B ?= ?2\b"),
        ({"latents": torch.zeros(2, 4, 3, 4, 6)}, r"latents.*\(2, 4, 3, 4, 6\).*in_channels ?= ?9\b"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_invalid_inputs_raise(changes: dict, expected: str):
    _, model = pair()
    with pytest.raises(ValueError, match=expected):
        model(**inputs(model) | changes)


def test_meanflow_requires_end_timestep():
    _, model = pair("meanflow")
    with pytest.raises(ValueError, match=r"end_timestep.*None.*meanflow=True.*\(2,\)"):
        model(**inputs(model) | {"end_timestep": None})
