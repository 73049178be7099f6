"""Files in the layout of Tencent: round trips of HunyuanVideo and HunyuanVideo-1.5."""

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
    assert_same(HunyuanVideo.from_published(path), model, *given, torch.ones(2) if guidance else None)
    assert HunyuanVideo.from_published(path, image_condition="token_replace").image_condition == "token_replace"


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
        HunyuanVideo15.from_published(tmp_path / "a.safetensors"), model, *given, timestep if meanflow else None
    )


def test_unknown_names_raise(tmp_path: Path):
    model = HunyuanVideo(**TINY, in_channels=4, single_depth=2, pooled_dim=8)
    file = {name: value.contiguous() for name, value in to_tencent(model).items()}
    save_file(file | {"new.weight": torch.ones(1)}, tmp_path / "a.safetensors")
    with pytest.raises(ValueError, match=r"(?s)a\.safetensors.*HunyuanVideo.*\b1\b.*new\.weight"):
        HunyuanVideo.from_published(tmp_path / "a.safetensors")
