"""Files in the layout of Tencent: round trips of HunyuanVideo and HunyuanVideo-1.5."""

import json
import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from blueberry_video.models.hunyuan_video import model_15 as hunyuan_video15
from blueberry_video.models.hunyuan_video.model import HunyuanVideo
from blueberry_video.models.hunyuan_video.model_15 import HunyuanVideo15

# The positions are those of the published models, which cannot be inferred from weights, in heads of 32.
TINY = {"out_channels": 4, "num_heads": 2, "head_dim": 32, "depth": 2, "text_dim": 16, "rope_axes": (4, 14, 14)}


def to_tencent(model: HunyuanVideo | HunyuanVideo15) -> dict[str, Tensor]:
    """State dict in the layout of Tencent's files, as the inverse of the package's conversion."""
    state, dim = model.state_dict(), model.num_heads * model.head_dim
    file: dict[str, Tensor] = {}

    def put(name: str, *sources: str) -> None:
        for kind in ("weight", "bias"):
            if f"{sources[0]}.{kind}" in state:
                file[f"{name}.{kind}"] = torch.cat([state[f"{source}.{kind}"] for source in sources])

    def put_block(theirs: str, ours: str, names: dict[str, str]) -> None:
        for name, source in names.items():
            put(f"{theirs}.{name}", f"{ours}.{source}")

    is_15 = isinstance(model, HunyuanVideo15)
    put("img_in.proj", "x_embedder.proj")
    times = "time_embed" if is_15 else "time_text_embed"
    for theirs, ours in (
        ("time_in", f"{times}.timestep_embedder"),
        ("time_r_in", f"{times}.timestep_embedder_r"),
        ("guidance_in", f"{times}.guidance_embedder"),
        ("txt_in.t_embedder", "context_embedder.time_text_embed.timestep_embedder"),
    ):
        put(f"{theirs}.mlp.0", f"{ours}.linear_1")
        put(f"{theirs}.mlp.2", f"{ours}.linear_2")
    put("vector_in.in_layer", "time_text_embed.text_embedder.linear_1")
    put("vector_in.out_layer", "time_text_embed.text_embedder.linear_2")
    put("byt5_in.layernorm", "context_embedder_2.norm")
    for i in (1, 2, 3):
        put(f"byt5_in.fc{i}", f"context_embedder_2.linear_{i}")
    for i, name in ((0, "norm_in"), (1, "linear_1"), (3, "linear_2"), (4, "norm_out")):
        put(f"vision_in.proj.{i}", f"image_embedder.{name}")
    put("cond_type_embedding", "cond_type_embed")
    put("txt_in.input_embedder", "context_embedder.proj_in")
    for i in (1, 2):
        put(f"txt_in.c_embedder.linear_{i}", f"context_embedder.time_text_embed.text_embedder.linear_{i}")
    for i in range(2):
        theirs = f"txt_in.individual_token_refiner.blocks.{i}"
        ours = f"context_embedder.token_refiner.refiner_blocks.{i}"
        refiner = {"norm1": "norm1", "norm2": "norm2", "self_attn_proj": "attn.to_out.0", "mlp.fc1": "ff.net.0.proj"}
        put_block(theirs, ours, refiner | {"mlp.fc2": "ff.net.2", "adaLN_modulation.1": "norm_out.linear"})
        put(f"{theirs}.self_attn_qkv", *(f"{ours}.attn.to_{part}" for part in "qkv"))
        theirs, ours = f"double_blocks.{i}", f"transformer_blocks.{i}"
        for stream, norm, ff, out in (
            ("img", "norm1", "ff", "to_out.0"),
            ("txt", "norm1_context", "ff_context", "to_add_out"),
        ):
            names = {"mod.linear": f"{norm}.linear", "mlp.fc1": f"{ff}.net.0.proj", "mlp.fc2": f"{ff}.net.2"}
            added = "" if stream == "img" else "added_"
            names |= {f"attn_{part}_norm": f"attn.norm_{added}{part}" for part in "qk"} | {"attn_proj": f"attn.{out}"}
            for name, source in names.items():
                put(f"{theirs}.{stream}_{name}", f"{ours}.{source}")
            parts = [f"{ours}.attn.add_{part}_proj" if added else f"{ours}.attn.to_{part}" for part in "qkv"]
            if is_15:
                for part, source in zip("qkv", parts, strict=True):
                    put(f"{theirs}.{stream}_attn_{part}", source)
            else:
                put(f"{theirs}.{stream}_attn_qkv", *parts)
        theirs, ours = f"single_blocks.{i}", f"single_transformer_blocks.{i}"
        put(f"{theirs}.linear1", *(f"{ours}.attn.to_{part}" for part in "qkv"), f"{ours}.proj_mlp")
        single = {"linear2": "proj_out", "modulation.linear": "norm.linear"}
        put_block(theirs, ours, single | {f"{part}_norm": f"attn.norm_{part}" for part in "qk"})
    put("final_layer.linear", "proj_out")
    put("final_layer.adaLN_modulation.1", "norm_out.linear")
    for kind in ("weight", "bias"):
        file[f"final_layer.adaLN_modulation.1.{kind}"] = file[f"final_layer.adaLN_modulation.1.{kind}"].roll(dim, 0)
    return file


def randomized(model: torch.nn.Module) -> torch.nn.Module:
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.15)
    return model


def assert_same(loaded: torch.nn.Module, model: torch.nn.Module, *given: Tensor) -> None:
    torch.testing.assert_close(loaded.state_dict(), model.state_dict(), atol=0, rtol=0)
    torch.testing.assert_close(loaded(*given), model(*given), atol=0, rtol=0)  # compares positions, too


@pytest.mark.parametrize("guidance", [False, True])
def test_hunyuan_video_file_loads(guidance: bool, tmp_path: Path):
    settings = TINY | {"in_channels": 4, "single_depth": 2, "pooled_dim": 8, "embedded_guidance": guidance}
    model = randomized(HunyuanVideo(**settings))
    file = to_tencent(model)
    assert sum(value.numel() for value in file.values()) == sum(value.numel() for value in model.state_dict().values())
    path = tmp_path / "mp_rank_00_model_states.pt"
    torch.save({"module": file}, path)
    given = (torch.randn(2, 4, 2, 4, 4), torch.tensor([500.0, 3.5]), torch.randn(2, 3, 16), None, torch.randn(2, 8))
    read = HunyuanVideo.from_published(path, rope_axes=(4, 14, 14))
    assert_same(read, model, *given, torch.ones(2) if guidance else None)
    read = HunyuanVideo.from_published(path, rope_axes=(4, 14, 14), image_condition="token_replace")
    assert read.image_condition == "token_replace"


@pytest.mark.parametrize("meanflow", [False, True])
def test_hunyuan_video_15_file_loads(meanflow: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(hunyuan_video15, "LETTERS_HIDDEN", 24)
    settings = TINY | {"in_channels": 9, "letters_dim": 12, "image_dim": 6, "meanflow": meanflow}
    model = randomized(HunyuanVideo15(**settings))
    file = to_tencent(model)
    assert sum(value.numel() for value in file.values()) == sum(value.numel() for value in model.state_dict().values())
    file = {f"model.diffusion_model.{name}": value.contiguous() for name, value in file.items()}  # ComfyUI's prefix
    save_file(file, tmp_path / "a.safetensors")
    latents, timestep = torch.randn(2, 9, 2, 2, 2), torch.tensor([500.0, 3.5])
    letters, image = torch.randn(2, 3, 12), torch.randn(2, 2, 6)
    given = (latents, timestep, torch.randn(2, 3, 16), None, None, None, None, 0, letters, None, image)
    assert_same(
        HunyuanVideo15.from_published(tmp_path / "a.safetensors", rope_axes=(4, 14, 14)),
        model,
        *given,
        timestep if meanflow else None,
    )


def tencent_file(folder: Path, **changes) -> tuple[HunyuanVideo, Path]:
    model = randomized(HunyuanVideo(**(TINY | {"in_channels": 4, "single_depth": 2, "pooled_dim": 8} | changes)))
    torch.save({"module": to_tencent(model)}, folder / "a.pt")
    return model, folder / "a.pt"


@pytest.mark.parametrize("axes", [(4, 14, 14), (8, 12, 12), (16, 8, 8)])
def test_axes_of_rotation_are_never_guessed(axes: tuple[int, int, int], tmp_path: Path):
    """A file does not hold ``rope_dim_list``; it must be passed unless the heads are as wide as published ones."""
    model, path = tencent_file(tmp_path, rope_axes=axes)
    with pytest.raises(ValueError, match=r"a\.pt.*head_dim=32\b.*rope_dim_list.*rope_axes=.*\b32\b"):
        HunyuanVideo.from_published(path)
    given = (torch.randn(2, 4, 2, 4, 4), torch.tensor([500.0, 3.5]), torch.randn(2, 3, 16), None, torch.randn(2, 8))
    assert_same(HunyuanVideo.from_published(path, rope_axes=axes), model, *given)
    fresh = HunyuanVideo(**TINY | {"in_channels": 4, "single_depth": 2, "pooled_dim": 8, "rope_axes": axes})
    assert f"rope_axes_dim={list(axes)}, rope_theta=256.0 of this model" in fresh.load_published(path)
    assert_same(fresh, model, *given)


def test_axes_of_published_heads_are_printed(tmp_path: Path, capsys: pytest.CaptureFixture):
    model, path = tencent_file(tmp_path, num_heads=1, head_dim=128, rope_axes=(16, 56, 56))
    assert HunyuanVideo.from_published(path).rope_axes == (16, 56, 56)
    assert re.search(r"rope_axes=\(16, 56, 56\).*rope_theta=256\.0.*a\.pt", capsys.readouterr().out)
    model.save_published(tmp_path / "folder")
    assert HunyuanVideo.from_published(tmp_path / "folder").rope_axes == (16, 56, 56)
    assert "assumed" not in capsys.readouterr().out
    assert "no config" not in model.load_published(tmp_path / "folder")


@pytest.mark.parametrize("axes", [(8, 12, 12), (4, 14, 14)])
def test_config_of_tencent_gives_the_axes(axes: tuple[int, int, int], tmp_path: Path):
    """A folder of HunyuanVideo-1.5 has a config.json with Tencent's names."""
    model, _ = tencent_file(tmp_path, rope_axes=axes)
    file = {name: value.contiguous() for name, value in to_tencent(model).items()}
    save_file(file, tmp_path / "diffusion_pytorch_model.safetensors")
    config = {"rope_dim_list": list(axes), "rope_theta": 100.0, "text_projection": "single_refiner"}
    (tmp_path / "config.json").write_text(json.dumps(config))
    read = HunyuanVideo.from_published(tmp_path)
    assert (read.rope_axes, read.rope_theta) == (axes, 100.0)
    with pytest.raises(
        ValueError, match=r"rope_axes=\((8, 12, 12|4, 14, 14)\) \(here \(16, 8, 8\)\).*rope_theta=100\.0"
    ):
        HunyuanVideo(
            **TINY | {"in_channels": 4, "single_depth": 2, "pooled_dim": 8, "rope_axes": (16, 8, 8)}
        ).load_published(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(config | {"text_projection": "linear"}))
    with pytest.raises(ValueError, match=r"text_projection='linear'.*'single_refiner'"):
        HunyuanVideo.from_published(tmp_path)


def test_text_projection_without_a_refiner_raises(tmp_path: Path):
    """Tencent's ``text_projection="linear"`` is an MLP of two layers, ``txt_in.linear_1`` and ``txt_in.linear_2``."""
    model, path = tencent_file(tmp_path)
    file = {name: value for name, value in to_tencent(model).items() if not name.startswith("txt_in.")}
    file |= {f"txt_in.linear_{i}.weight": torch.zeros(64, 16 if i == 1 else 64) for i in (1, 2)}
    torch.save({"module": file}, path)
    for load in (HunyuanVideo.from_published, model.load_published):
        with pytest.raises(ValueError, match=r"a\.pt.*text_projection='linear'.*text_projection='single_refiner'"):
            load(path)


def test_converted_file_can_be_saved_as_a_folder(tmp_path: Path):
    model, path = tencent_file(tmp_path)
    HunyuanVideo.from_published(path, rope_axes=(4, 14, 14)).save_published(tmp_path / "folder")
    torch.testing.assert_close(HunyuanVideo.from_published(tmp_path / "folder").state_dict(), model.state_dict())


def test_unknown_names_raise(tmp_path: Path):
    model = HunyuanVideo(**TINY, in_channels=4, single_depth=2, pooled_dim=8)
    file = {name: value.contiguous() for name, value in to_tencent(model).items()}
    save_file(file | {"new.weight": torch.ones(1)}, tmp_path / "a.safetensors")
    with pytest.raises(ValueError, match=r"(?s)a\.safetensors.*HunyuanVideo.*\b1\b.*new\.weight"):
        HunyuanVideo.from_published(tmp_path / "a.safetensors", rope_axes=(4, 14, 14))
