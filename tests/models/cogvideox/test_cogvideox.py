"""CogVideoX: parity with diffusers' CogVideoXTransformer3DModel, causal attention, weights and errors.

All models are tiny, with random values in **every** parameter and table: zero biases would hide a dropped one.
"""

import itertools
import json
import math
import re
from pathlib import Path

import pytest
import torch
from diffusers import CogVideoXTransformer3DModel
from diffusers.models.embeddings import get_3d_rotary_pos_embed
from diffusers.pipelines.cogvideo.pipeline_cogvideox import get_resize_crop_region_for_grid
from hydra.utils import instantiate
from omegaconf import OmegaConf
from safetensors.torch import load_file, save_file
from torch import Tensor

from blueberry_video.config import CONF
from blueberry_video.models.cogvideox import model as cogvideox
from blueberry_video.models.cogvideox.convert import convert_sat
from blueberry_video.models.cogvideox.model import CogVideoX
from blueberry_video.models.cogvideox.positions import read_sincos, sincos_positions
from blueberry_video.nn.joint_attention import KeyValueCache

TOLERANCE = {"atol": 1e-5, "rtol": 1e-5}  # fp32 round-off of two blocks; a dropped bias changes outputs by 1e-2

TINY = {
    "num_heads": 2,
    "head_dim": 16,
    "depth": 2,
    "in_channels": 4,
    "out_channels": 4,
    "text_dim": 12,
    "text_len": 6,
    "time_dim": 20,
    "num_frames": 3,
    "height": 8,
    "width": 12,
    "zero_init": False,
}
TUBELETS = {"tubelet_size": 2, "num_frames": 4, "positions": "rope"}
VARIANTS = {
    "2b": {},
    "2b-narrow-heads": {"num_heads": 4, "head_dim": 8},
    "5b": {"positions": "rope"},
    "5b_i2v": {"positions": "rope_and_table", "in_channels": 8},
    "1.5": TUBELETS,
    "1.5_i2v": {**TUBELETS, "in_channels": 8, "offset": True},
}
PUBLISHED = {
    "2b": ("CogVideoX-2B", 1.694),
    "5b": ("CogVideoX-5B", 5.570),
    "5b_i2v": ("CogVideoX-5B-I2V", 5.570),
    "1.5_5b": ("CogVideoX1.5-5B", 5.571),
    "1.5_5b_i2v": ("CogVideoX1.5-5B-I2V", 5.572),
}


def build(name: str = "2b", **changes) -> CogVideoX:
    """CogVideoX variant with random weights, scaled so that outputs are far from overflow and from zero."""
    model = CogVideoX(**{**TINY, **VARIANTS[name], **changes})
    with torch.no_grad():
        for value in (*model.parameters(), *model.buffers()):
            value.normal_(std=0.2)
    return model


def inputs(model: CogVideoX, *size: int) -> tuple[Tensor, Tensor, Tensor]:
    """Latents of size ``size`` (defaults to the training size), one timestep per clip, and text embeddings."""
    size = size or model.positions.latent_size
    text = torch.randn(2, model.text_len, model.text_dim)
    return torch.randn(2, model.in_channels, *size), torch.tensor([999.0, 17.0]), text


def diffusers_of(model: CogVideoX) -> CogVideoXTransformer3DModel:
    config = {key: value for key, value in model.config().items() if not key.startswith("_")}
    theirs = CogVideoXTransformer3DModel(**config)
    theirs.load_state_dict(model.state_dict())
    return theirs


def run_diffusers(theirs: CogVideoXTransformer3DModel, latents: Tensor, timestep: Tensor, text: Tensor) -> Tensor:
    """Output of diffusers' model, with the rotary positions that its pipeline computes."""
    config, (t, h, w) = theirs.config, latents.shape[2:]
    rotary = None
    native = (config.sample_height // 2, config.sample_width // 2)
    if config.use_rotary_positional_embeddings and config.patch_size_t is None:
        region = get_resize_crop_region_for_grid((h // 2, w // 2), native[1], native[0])
        rotary = get_3d_rotary_pos_embed(config.attention_head_dim, region, (h // 2, w // 2), t)
    elif config.use_rotary_positional_embeddings:
        sizes = {"grid_size": (h // 2, w // 2), "temporal_size": t // 2, "max_size": native}
        rotary = get_3d_rotary_pos_embed(config.attention_head_dim, None, grid_type="slice", **sizes)
    offset = None if config.ofs_embed_dim is None else torch.full((1,), 2.0)
    frames_first = latents.transpose(1, 2)
    output = theirs(frames_first, text, timestep, ofs=offset, image_rotary_emb=rotary, return_dict=False)[0]
    return output.transpose(1, 2)


# ---- parity ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", VARIANTS)
def test_outputs_and_all_gradients_equal_diffusers(name: str):
    ours = build(name)
    theirs = diffusers_of(ours)
    latents, timestep, text = inputs(ours)
    leaves = [latents.requires_grad_(), text.requires_grad_()]
    output, expected = ours(latents, timestep, text), run_diffusers(theirs, latents, timestep, text)
    assert output.shape == (2, ours.out_channels, *ours.positions.latent_size)
    torch.testing.assert_close(output, expected, **TOLERANCE)

    weight = torch.randn_like(output)
    of_inputs = torch.autograd.grad((expected * weight).sum(), [*leaves, *theirs.parameters()])
    found = torch.autograd.grad((output * weight).sum(), [*leaves, *ours.parameters()])
    names = [name for name, _ in ours.named_parameters()]
    by_name = dict(zip((name for name, _ in theirs.named_parameters()), of_inputs[2:]))
    for mine, their in zip(found, [*of_inputs[:2], *(by_name[name] for name in names)], strict=True):
        torch.testing.assert_close(mine, their, atol=1e-5 * max(1.0, their.abs().max().item()), rtol=1e-5)
        assert mine.abs().max() > 0, "a parameter without a gradient"


@pytest.mark.parametrize("size", [(1, 8, 12), (5, 8, 12), (3, 4, 12), (3, 8, 4), (3, 12, 12), (3, 16, 28)])
@pytest.mark.parametrize("name", ["2b", "5b"])
def test_different_sizes_equal_diffusers(name: str, size: tuple[int, int, int]):
    ours = build(name)
    arguments = inputs(ours, *size)
    torch.testing.assert_close(ours(*arguments), run_diffusers(diffusers_of(ours), *arguments), **TOLERANCE)


@pytest.mark.parametrize("size", [(2, 8, 12), (6, 4, 12), (4, 8, 2)])
def test_positions_of_smaller_grids_of_1_5_are_not_interpolated(size: tuple[int, int, int]):
    ours = build("1.5_i2v")
    arguments = inputs(ours, *size)
    torch.testing.assert_close(ours(*arguments), run_diffusers(diffusers_of(ours), *arguments), **TOLERANCE)


def test_half_precision_weights_equal_diffusers():
    ours = build("5b")
    with torch.no_grad():
        for block in ours.transformer_blocks:
            for norm in (block.attn1.norm_q, block.attn1.norm_k):
                norm.weight.fill_(1.5)  # otherwise attention is nearly uniform and positions have no effect
    ours = ours.to(torch.bfloat16)
    latents, timestep, text = inputs(ours)
    output = ours(latents, timestep, text)
    expected = run_diffusers(diffusers_of(ours).to(torch.bfloat16), latents.bfloat16(), timestep, text.bfloat16())
    assert output.dtype == torch.bfloat16
    # The operations round in a different order; without rotation the difference is at least 0.03.
    torch.testing.assert_close(output, expected, atol=0.02, rtol=0)


@pytest.mark.parametrize("name", VARIANTS)
def test_saved_folders_round_trip_with_diffusers(name: str, tmp_path: Path, capsys):
    ours = build(name)
    arguments = inputs(ours)
    ours.save_published(tmp_path / "ours")
    theirs, info = CogVideoXTransformer3DModel.from_pretrained(tmp_path / "ours", output_loading_info=True)
    assert not any(info.values())
    torch.testing.assert_close(run_diffusers(theirs, *arguments), ours(*arguments), **TOLERANCE)

    theirs.save_pretrained(tmp_path / "theirs" / "transformer", max_shard_size="20KB")
    assert len(list((tmp_path / "theirs" / "transformer").glob("*.safetensors"))) > 2
    back = CogVideoX.from_published(tmp_path / "theirs")  # the folder of a pipeline
    torch.testing.assert_close(back(*arguments), ours(*arguments), atol=0, rtol=0)
    assert back.config() == ours.config()
    assert "CogVideoX" in capsys.readouterr().out


@pytest.mark.parametrize("name", PUBLISHED)
def test_configs_have_the_published_sizes(name: str):
    with torch.device("meta"):
        model = instantiate(OmegaConf.load(CONF / "model" / "cogvideox" / f"{name}.yaml"))
        config = model.config()
        theirs = CogVideoXTransformer3DModel(**{key: value for key, value in config.items() if key != "_class_name"})
    variant, billions = PUBLISHED[name]
    assert model.variant == variant
    assert round(sum(parameter.numel() for parameter in model.parameters()) / 1e9, 3) == billions
    shapes = {name: value.shape for name, value in theirs.state_dict().items()}
    assert {name: value.shape for name, value in model.state_dict().items()} == shapes


# ---- timesteps per frame, chunk-causal attention, KV cache -----------------------------------------------------------


@pytest.mark.parametrize("name", ["2b", "5b_i2v", "1.5"])
def test_equal_timesteps_per_frame_equal_one_timestep_per_clip(name: str):
    """Holds at timestep 0, and at other timesteps if the text of the clip is modulated at timestep 0."""
    model = build(name)
    latents, noisy, text = inputs(model)
    clean, num_frames = torch.zeros(2), latents.shape[2]
    by_frame = [model(latents, timestep[:, None].expand(-1, num_frames), text) for timestep in (clean, noisy)]
    torch.testing.assert_close(by_frame[0], model(latents, clean, text), **TOLERANCE)

    condition = model._condition
    model._condition = lambda timestep: condition(timestep)._replace(text=condition(clean).text)
    torch.testing.assert_close(by_frame[1], model(latents, noisy, text), **TOLERANCE)


def test_timestep_of_a_frame_applies_to_its_tokens():
    model = build("2b", depth=0)
    latents, _, text = inputs(model)
    timesteps = torch.tensor([[0.0, 500.0, 999.0], [20.0, 20.0, 700.0]])
    output = model(latents, timesteps, text)
    for frame in range(3):
        expected = model(latents, timesteps[:, frame], text)
        torch.testing.assert_close(output[:, :, frame], expected[:, :, frame], **TOLERANCE)


@pytest.mark.parametrize(("name", "chunk"), [("2b", 1), ("2b", 2), ("5b", 3), ("5b_i2v", 2), ("1.5", 2), ("1.5", 4)])
def test_no_leakage_from_later_chunks(name: str, chunk: int):
    model = build(name, causal_chunk=chunk, num_frames=6)
    latents, _, text = inputs(model)
    timestep = torch.rand(2, 6).mul(1000)
    if model.patch_size[0] == 2:
        timestep = timestep[:, ::2].repeat_interleave(2, dim=1)
    output = model(latents, timestep, text)
    for start in range(0, 6, chunk):
        changed, other_timestep = latents.clone(), timestep.clone()
        changed[:, :, start:] += 1
        other_timestep[:, start:] = 3.0
        result = model(changed, other_timestep, text)
        torch.testing.assert_close(result[:, :, :start], output[:, :, :start], **TOLERANCE)
        assert (result[:, :, start:] - output[:, :, start:]).abs().amax(dim=(0, 1, 3, 4)).min() > 1e-3
    earlier = latents.clone()
    earlier[:, :, 0] += 1
    assert (model(earlier, timestep, text) - output).abs().amax(dim=(0, 1, 3, 4)).min() > 1e-4, "no effect of the past"


@pytest.mark.parametrize(("name", "chunk", "calls"), [
    ("2b", 1, (1, 1, 1, 1, 1, 1)),
    ("2b", 2, (2, 2, 2)),
    ("5b", 2, (4, 2)),
    ("5b", 1, (2, 3, 1)),
    ("5b_i2v", 3, (3, 3)),
    ("1.5", 2, (2, 4)),
    ("5b", 4, (4, 2)),
])  # fmt: skip
@torch.no_grad()
def test_cached_chunks_equal_one_masked_pass(name: str, chunk: int, calls: tuple[int, ...]):
    model = build(name, causal_chunk=chunk, num_frames=6)
    latents, _, text = inputs(model)
    timestep = torch.rand(2, 6).mul(1000)[:, :1].expand(-1, 6) + torch.arange(6)[None] // 2
    expected = model(latents, timestep, text)
    cache, first, parts = KeyValueCache(), 0, []
    for length in calls:
        part = slice(first, first + length)
        # An earlier denoising step, which must leave no trace in the cache.
        model(torch.randn_like(latents[:, :, part]), timestep[:, part] * 0, text, cache=cache, first_frame=first)
        parts.append(model(latents[:, :, part], timestep[:, part], text, cache=cache, first_frame=first))
        first += length
    torch.testing.assert_close(torch.cat(parts, dim=2), expected, **TOLERANCE)


# ---- training --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("changes", [{}, {"causal_chunk": 1}])
def test_activation_checkpointing_recomputes_blocks_and_keeps_gradients(changes: dict):
    model, runs = build("5b", **changes), []
    model.transformer_blocks[0].register_forward_pre_hook(lambda *_: runs.append(model.checkpointing))
    latents, _, text = inputs(model)
    timestep = torch.rand(2, 3).mul(1000)
    gradients = []
    for model.checkpointing in (False, True):
        model.zero_grad()
        model(latents, timestep, text).square().mean().backward()
        gradients.append([parameter.grad for parameter in model.parameters()])
    torch.testing.assert_close(*gradients, atol=0, rtol=0)
    assert runs == [False, True, True]


def test_zero_init_starts_at_zero_and_trains():
    model = build("1.5_i2v", zero_init=True)
    cogvideox.init_weights(model)
    latents, timestep, text = inputs(model)
    target = torch.randn(2, 4, 4, 8, 12)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    losses = []
    for step in range(4):
        output = model(latents, timestep, text)
        assert step > 0 or output.abs().max() == 0
        loss = (output - target).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[3] < losses[2] < losses[0]
    assert all(parameter.grad.abs().max() > 0 for parameter in model.parameters())


def test_zero_initialized_blocks_are_the_identity():
    model = CogVideoX(**{**TINY, "zero_init": True})
    latents, timestep, text = inputs(model)
    with torch.no_grad():
        model.proj_out.weight.normal_()
    output = model(latents, timestep, text)
    model.transformer_blocks = model.transformer_blocks[:0]
    torch.testing.assert_close(model(latents, timestep, text), output, atol=0, rtol=0)
    assert output.abs().max() > 0.1


# ---- published files -------------------------------------------------------------------------------------------------


def sat_table(text_len: int, frames: int, height: int, width: int, dim: int, scale: float) -> Tensor:
    """Position table that SAT saves with 2B (Basic3DPositionEmbeddingMixin), one token and one channel at a time.

    It is zero for the text. A token at (t, y, x) has a quarter of the channels for t, three eighths for x / scale and
    three eighths for y / scale, each with the sines before the cosines of position / 10000^(i / half).
    """

    def waves(position: float, channels: int) -> list[float]:
        angles = [position / 10000 ** (i / (channels // 2)) for i in range(channels // 2)]
        return [math.sin(angle) for angle in angles] + [math.cos(angle) for angle in angles]

    rows = [[0.0] * dim for _ in range(text_len)]
    for t, y, x in itertools.product(range(frames), range(height), range(width)):
        rows.append(waves(t, dim // 4) + waves(x / scale, dim * 3 // 8) + waves(y / scale, dim * 3 // 8))
    return torch.tensor([rows], dtype=torch.float32)


def to_sat(state: dict[str, Tensor], depth: int, grid: tuple | None = None) -> dict[str, Tensor]:
    """State dict in the original (SAT) layout, with the tensors of the original files that are not loaded; ``grid``:
    the arguments of ``sat_table`` for 2B."""
    mixins, sat = "model.diffusion_model.mixins", {}
    for name, target in (
        ("time_embedding.linear_1", "model.diffusion_model.time_embed.0"),
        ("time_embedding.linear_2", "model.diffusion_model.time_embed.2"),
        ("ofs_embedding.linear_1", "model.diffusion_model.ofs_embed.0"),
        ("ofs_embedding.linear_2", "model.diffusion_model.ofs_embed.2"),
        ("patch_embed.proj", f"{mixins}.patch_embed.proj"),
        ("patch_embed.text_proj", f"{mixins}.patch_embed.text_proj"),
        ("norm_out.norm", f"{mixins}.final_layer.norm_final"),
        ("norm_out.linear", f"{mixins}.final_layer.adaLN_modulation.1"),
        ("proj_out", f"{mixins}.final_layer.linear"),
        ("norm_final", "model.diffusion_model.transformer.final_layernorm"),
    ):
        sat |= {f"{target}.{kind}": state[f"{name}.{kind}"] for kind in ("weight", "bias") if f"{name}.{kind}" in state}
    for i in range(depth):
        for kind in ("weight", "bias"):
            block = {name.split(".", 2)[2]: value for name, value in state.items() if f"_blocks.{i}." in name}
            (v1, t1), (v2, t2) = (block[f"norm{n}.linear.{kind}"].chunk(2) for n in (1, 2))
            sat[f"{mixins}.adaln_layer.adaLN_modulations.{i}.1.{kind}"] = torch.cat([v1, v2, t1, t2])
            sat[f"{mixins}.adaln_layer.query_layernorm_list.{i}.{kind}"] = block[f"attn1.norm_q.{kind}"]
            sat[f"{mixins}.adaln_layer.key_layernorm_list.{i}.{kind}"] = block[f"attn1.norm_k.{kind}"]
            layer, parts = (
                f"model.diffusion_model.transformer.layers.{i}",
                [block[f"attn1.to_{p}.{kind}"] for p in "qkv"],
            )
            sat[f"{layer}.attention.query_key_value.{kind}"] = torch.cat(parts)
            sat[f"{layer}.attention.dense.{kind}"] = block[f"attn1.to_out.0.{kind}"]
            sat[f"{layer}.input_layernorm.{kind}"] = block[f"norm1.norm.{kind}"]
            sat[f"{layer}.post_attention_layernorm.{kind}"] = block[f"norm2.norm.{kind}"]
            sat[f"{layer}.mlp.dense_h_to_4h.{kind}"] = block[f"ff.net.0.proj.{kind}"]
            sat[f"{layer}.mlp.dense_4h_to_h.{kind}"] = block[f"ff.net.2.{kind}"]
    if "patch_embed.pos_embedding" in state:
        sat[f"{mixins}.pos_embed.pos_embedding"] = state["patch_embed.pos_embedding"]
    elif "ofs_embedding.linear_1.weight" not in state and grid is not None:
        sat[f"{mixins}.pos_embed.pos_embedding"] = sat_table(*grid)
    return sat | {
        f"{mixins}.pos_embed.freqs_sin": torch.zeros(3, 4),
        f"{mixins}.pos_embed.freqs_cos": torch.zeros(3, 4),
        "model.diffusion_model.transformer.word_embeddings.weight": torch.zeros(1, 4),
    }


@pytest.mark.parametrize("name", VARIANTS)
def test_original_weights_round_trip(name: str):
    state = build(name).state_dict()
    converted = convert_sat(to_sat(state, depth=2))
    assert converted.keys() == state.keys()
    assert all(torch.equal(converted[key], state[key]) for key in state)
    assert "transformer.new" in convert_sat({"model.diffusion_model.transformer.new": torch.zeros(1)})


def sat_file(folder: Path, model: CogVideoX, grid: tuple | None = None) -> Path:
    torch.save({"module": to_sat(model.state_dict(), depth=2, grid=grid)}, folder / "mp_rank_00_model_states.pt")
    return folder / "mp_rank_00_model_states.pt"


@pytest.mark.parametrize(
    ("size", "scale"), [((3, 8, 12), 1.875), ((1, 4, 2), 1.875), ((2, 2, 30), 1.0), ((4, 26, 6), 2.5)]
)
def test_original_file_of_2b_is_not_taken_for_5b_i2v(size: tuple, scale: float, tmp_path: Path):
    """SAT saves the frozen table of 2B as a parameter, as the trained one of 5B-I2V."""
    frames, height, width = size
    sizes = {"num_frames": frames, "height": height, "width": width, "spatial_scale": scale}
    model = build("2b", norm_out_eps=1e-6, **sizes)
    path = sat_file(tmp_path, model, (6, frames, height // 2, width // 2, 32, scale))
    read = CogVideoX.from_published(path)
    assert read.positions.kind == "sincos"
    assert read.patch_embed.pos_embedding is None
    assert (read.text_len, read.positions.latent_size, read.positions.spatial_scale) == (6, size, scale)
    arguments = inputs(model)
    torch.testing.assert_close(read(*arguments), model(*arguments), atol=0, rtol=0)
    other = build("2b", norm_out_eps=1e-6, spatial_scale=scale)
    assert "rotary_grid" not in other.load_published(path)
    torch.testing.assert_close(other(*arguments), model(*arguments), atol=0, rtol=0)


def test_published_table_of_2b_is_recognized():
    """13 frames of 30 x 45 patches at a scale of 1.875; the columns go through several turns at unit frequency."""
    table = torch.cat([torch.zeros(226, 1920), sincos_positions((13, 30, 45), 1920, 1.875)])[None]
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        assert read_sincos(table.to(dtype)) == (226, (13, 30, 45), 1.875)


@pytest.mark.parametrize("change", ["trained", "two scales", "no video"])
def test_trained_table_without_image_channels_raises(change: str, tmp_path: Path):
    model = build("2b")
    path = sat_file(tmp_path, model, (6, 3, 4, 6, 32, 1.875))
    content = torch.load(path)
    table = content["module"]["model.diffusion_model.mixins.pos_embed.pos_embedding"]
    if change == "trained":
        table[0, 20, 3] += 0.05
    elif change == "two scales":
        table[0, 6:, 20:] = sat_table(0, 3, 4, 6, 32, 1.5)[0, :, 20:]
    else:
        table.zero_()
    torch.save(content, path)
    with pytest.raises(ValueError, match=r"pos_embedding.*\(1, 78, 32\).*2B.*5B-I2V"):
        CogVideoX.from_published(path)


def test_norm_of_the_output_has_the_eps_of_the_origin(tmp_path: Path):
    """1e-6 in SAT's FinalLayerMixin, 1e-5 in diffusers: they differ for tokens of small variance."""
    model = build("1.5")
    with torch.no_grad():
        for name in ("weight", "bias"):
            getattr(model.norm_final, name).mul_(0.003)
    arguments = inputs(model)
    outputs = {}
    for origin, path in (("sat", sat_file(tmp_path, model)), ("diffusers", tmp_path / "folder")):
        if origin == "diffusers":
            model.save_published(path)
        read = CogVideoX.from_published(path)
        normed: list[Tensor] = []
        hook = read.norm_out.norm.register_forward_hook(lambda _, args, out, seen=normed: seen.extend((args[0], out)))
        outputs[origin] = read(*arguments)
        hook.remove()
        eps = {"sat": 1e-6, "diffusers": 1e-5}[origin]
        mean, variance = normed[0].mean(-1, keepdim=True), normed[0].var(-1, unbiased=False, keepdim=True)
        expected = (normed[0] - mean) / (variance + eps).sqrt() * read.norm_out.norm.weight + read.norm_out.norm.bias
        torch.testing.assert_close(normed[1], expected, **TOLERANCE)
    assert (outputs["sat"] - outputs["diffusers"]).abs().max() > 1e-2
    with pytest.raises(ValueError, match=r"norm_out_eps=1e-06 \(here 1e-05\)"):
        model.load_published(sat_file(tmp_path, model))
    # the setting is kept in a folder, and can be chosen
    CogVideoX.from_published(sat_file(tmp_path, model)).save_published(tmp_path / "again")
    torch.testing.assert_close(CogVideoX.from_published(tmp_path / "again")(*arguments), outputs["sat"])
    chosen = CogVideoX.from_published(tmp_path / "again", norm_out_eps=1e-5)
    torch.testing.assert_close(chosen(*arguments), outputs["diffusers"])


def sat_rotation(model: CogVideoX, grid: tuple[int, int, int]) -> tuple[Tensor, Tensor]:
    """Cosines and sines (N, head_dim) of SAT's Rotary3DPositionEmbeddingMixin, one token at a time.

    The table of the training grid has integer positions; a clip takes its first frames, rows and columns.
    """
    size, angles = model.head_dim, []
    for position in itertools.product(*(range(length) for length in grid)):
        token = []
        for axis, channels in zip(position, (size // 4, size * 3 // 8, size * 3 // 8), strict=True):
            for i in range(channels // 2):
                token += [axis * 10000 ** (-2 * i / channels)] * 2
        angles.append(token)
    found = torch.tensor(angles, dtype=torch.float64)
    return found.cos().float(), found.sin().float()


@pytest.mark.parametrize("grid", [(3, 4, 6), (2, 2, 6), (3, 4, 1), (1, 1, 1)])
def test_original_file_of_5b_crops_the_rotary_table(grid: tuple[int, int, int], tmp_path: Path):
    model = build("5b")
    assert "rotary_grid=crop (here stretch)" in build("5b", norm_out_eps=1e-6).load_published(sat_file(tmp_path, model))
    cropped = build("5b", rotary_grid="crop")
    rotation = cropped.positions.rotation(grid, 0, 2, torch.device("cpu"))
    for found, expected in zip(rotation, sat_rotation(model, grid), strict=True):
        torch.testing.assert_close(found[2:, 0], expected, **TOLERANCE)
    is_native = grid[1:] == (4, 6)
    stretched = model.positions.rotation(grid, 0, 2, torch.device("cpu"))
    assert torch.equal(stretched.cos, rotation.cos) == is_native


def test_original_file_wider_than_2b_is_5b_with_the_settings_of_sat(tmp_path: Path):
    with torch.device("meta"):
        wide = CogVideoX(**{**TINY, "num_heads": 121, "depth": 1, "positions": "rope"})
    state = {name: torch.zeros(1).expand(value.shape) for name, value in wide.state_dict().items()}  # 4 bytes each
    torch.save({"module": to_sat(state, depth=1)}, tmp_path / "a.pt")
    read = CogVideoX.from_published(tmp_path / "a.pt")
    assert (read.positions.kind, read.positions.crop, read.norm_out.norm.eps) == ("rope", True, 1e-6)


def test_rotary_grid_is_a_setting_that_a_folder_keeps(tmp_path: Path):
    cropped = build("5b", rotary_grid="crop")
    arguments = inputs(cropped, 3, 4, 12)
    cropped.save_published(tmp_path / "crop")
    stretched = CogVideoX.from_published(tmp_path / "crop", rotary_grid="stretch")
    torch.testing.assert_close(stretched(*arguments), run_diffusers(diffusers_of(stretched), *arguments), **TOLERANCE)
    kept = CogVideoX.from_published(tmp_path / "crop")
    torch.testing.assert_close(kept(*arguments), cropped(*arguments), atol=0, rtol=0)
    assert (kept(*arguments) - stretched(*arguments)).abs().max() > 1e-4
    assert "rotary_grid=crop (here stretch)" in build("5b").load_published(tmp_path / "crop")


def test_original_file_loads(tmp_path: Path, capsys):
    model = build("1.5_i2v", norm_out_eps=1e-6)
    torch.save({"module": to_sat(model.state_dict(), depth=2)}, tmp_path / "mp_rank_00_model_states.pt")
    read = CogVideoX.from_published(tmp_path / "mp_rank_00_model_states.pt")
    assert read.positions.latent_size == (21, 300, 300)
    assert re.search(r"CogVideoX1\.5.*\b2\b.*\b32\b.*-I2V", capsys.readouterr().out)
    small = build("1.5_i2v", norm_out_eps=1e-6)
    small.load_published(tmp_path / "mp_rank_00_model_states.pt")
    arguments = inputs(model)
    torch.testing.assert_close(small(*arguments), model(*arguments), atol=0, rtol=0)


@pytest.mark.parametrize(
    ("other", "difference"),
    [
        ("5b", "positions=rope.*sincos"),
        ("5b_i2v", r"-I2V.*in_channels=8\b.*\b4\b"),
        ("1.5", r"CogVideoX1\.5.*tubelet_size=2\b.*\b1\b"),
        ("2b-narrow-heads", r"head_dim=8\b.*\b16\b"),
    ],
)
def test_weights_of_a_different_variant_raise_with_its_name(other: str, difference: str, tmp_path: Path):
    build(other).save_published(tmp_path)
    with pytest.raises(ValueError, match=f"(?s){difference}.*model=text_to_video/"):
        build("2b").load_published(tmp_path)


def test_a_file_of_a_different_version_raises_with_its_name(tmp_path: Path):
    save_file(build("1.5").state_dict(), tmp_path / "a.safetensors")  # without a config
    with pytest.raises(ValueError, match=r"CogVideoX1\.5.*tubelet_size=2\b.*\b1\b"):
        build("2b").load_published(tmp_path / "a.safetensors")


def test_weights_load_in_the_dtype_of_the_model(tmp_path: Path):
    model = build("5b_i2v")
    model.to(torch.bfloat16).save_published(tmp_path)
    fresh = build("5b_i2v")
    fresh.load_published(tmp_path)
    assert {value.dtype for value in fresh.state_dict().values()} == {torch.float32}
    torch.testing.assert_close(fresh.proj_out.weight, model.proj_out.weight.float(), atol=0, rtol=0)
    assert all(parameter.requires_grad for parameter in fresh.parameters())


def test_causal_chunk_round_trips_through_a_folder(tmp_path: Path):
    build("5b", causal_chunk=2).save_published(tmp_path)
    assert CogVideoX.from_published(tmp_path).causal_chunk == 2
    assert CogVideoX.from_published(tmp_path, causal_chunk=0).causal_chunk == 0


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_layers": 3}, r"num_layers=3\b.*\b2\b"),
        ({"norm_eps": 1e-6}, "norm_eps=1e-06.*1e-05"),
        ({"patch_size": 4}, r"patch_size=4\b.*\b2\b"),
        ({"temporal_interpolation_scale": 2.0}, r"temporal_interpolation_scale=2\.0.*1\.0"),
    ],
)
def test_config_that_contradicts_the_weights_raises(changes: dict, message: str, tmp_path: Path):
    build("2b").save_published(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | changes))
    with pytest.raises(ValueError, match=message):
        CogVideoX.from_published(tmp_path)


def test_files_of_other_models_and_incomplete_files_raise(tmp_path: Path):
    save_file({"context_embedder.proj_in.weight": torch.zeros(2)}, tmp_path / "other.safetensors")
    with pytest.raises(ValueError, match=r"(?s)other\.safetensors.*HunyuanVideo.*CogVideoX"):
        CogVideoX.from_published(tmp_path / "other.safetensors")
    build("2b").save_published(tmp_path / "model")
    file = tmp_path / "model" / "diffusion_pytorch_model.safetensors"
    state = load_file(file)
    for name in ("proj_out.bias", "transformer_blocks.1.ff.net.2.weight"):
        save_file({key: value for key, value in state.items() if key != name}, file)
        with pytest.raises(ValueError, match=re.escape(name)):
            CogVideoX.from_published(tmp_path / "model")
    with pytest.raises(FileNotFoundError, match="nowhere"):
        CogVideoX.from_published(tmp_path / "nowhere")


# ---- bad input -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"positions": "learned"}, "positions='learned'.*sincos.*rope.*rope_and_table"),
        ({"positions": "rope", "head_dim": 8}, r"head_dim=8\b.*positions='rope'.*\b16\b"),
        ({"num_heads": 3, "head_dim": 8}, r"num_heads=3\b.*head_dim=8\b.*positions='sincos'.*\b16\b"),
        ({"tubelet_size": 2}, "tubelet_size=2.*positions='rope'.*'sincos'"),
        ({"rotary_grid": "wrap"}, "rotary_grid='wrap'.*'crop'.*'stretch'"),
        ({**TUBELETS, "rotary_grid": "stretch"}, r"rotary_grid='stretch'.*tubelet_size=2\b.*'crop'"),
        ({"height": 9}, r"height=9\b.*width=12\b.*\b2\b"),
        ({"causal_chunk": 3, "tubelet_size": 2, "positions": "rope"}, r"causal_chunk=3\b.*\b2\b.*\b0\b"),
        ({"causal_chunk": -1}, r"causal_chunk=-1\b"),
    ],
)
def test_invalid_sizes_raise(changes: dict, message: str):
    with pytest.raises(ValueError, match=message):
        CogVideoX(**{**TINY, **changes})


@pytest.mark.parametrize(
    ("name", "shapes", "message"),
    [
        ("2b", {"latents": (2, 4, 3, 7, 12)}, r"\(3, 7, 12\).*\(1, 2, 2\).*\(3, 8, 12\)"),
        ("1.5", {"latents": (2, 4, 3, 8, 12)}, r"\(3, 8, 12\).*\(2, 2, 2\).*\(4, 8, 12\)"),
        ("1.5", {"latents": (2, 4, 4, 8, 14)}, r"8 x 14\b.*height=8\b.*width=12\b"),
        ("5b_i2v", {"latents": (2, 8, 3, 8, 10)}, r"3 x 8 x 10\b.*height=8\b.*width=12\b.*num_frames=3\b"),
        ("5b_i2v", {"latents": (2, 8, 4, 8, 12)}, r"4 x 8 x 12\b.*height=8\b.*width=12\b.*num_frames=3\b"),
        ("2b", {"latents": (2, 8, 3, 8, 12)}, r"\(2, 8, 3, 8, 12\).*in_channels=4\b"),
        ("5b_i2v", {"latents": (2, 4, 3, 8, 12)}, r"\(2, 4, 3, 8, 12\).*in_channels=8\b.*image"),
        ("2b", {"latents": (2, 4, 8, 12)}, r"\(2, 4, 8, 12\).*in_channels=4\b"),
        ("2b", {"text": (2, 5, 12)}, r"\b5\b.*text_len=6\b"),
        ("5b", {"text": (2, 7, 12)}, r"\b7\b.*text_len=6\b"),
        ("2b", {"text": (2, 6, 11)}, r"\(2, 6, 11\).*text_dim=12\b"),
        ("2b", {"text": (1, 6, 12)}, r"\(1, 6, 12\).*B=2\b"),
        ("2b", {"timestep": (2, 2)}, r"timestep\b.*\(2, 2\).*\(2,\).*\(2, 3\)"),
        ("2b", {"timestep": ()}, r"timestep\b.*\(\).*\(2,\).*\(2, 3\)"),
        ("1.5", {"timestep": (2, 4)}, r"\b2\b.*frames.*timestep"),
        ("2b", {"guidance": (2,)}, "CogVideoX.*guidance.*None"),
    ],
)
def test_invalid_input_raises_with_the_expected_value(name: str, shapes: dict, message: str):
    model = build(name)
    latents, timestep, text = inputs(model)
    arguments = {"latents": latents, "timestep": timestep, "text": text}
    with pytest.raises(ValueError, match=message):
        model(**arguments | {key: torch.rand(shape) for key, shape in shapes.items()})


def test_misuse_of_chunks_and_cache_raises():
    causal, full = build("5b", causal_chunk=2), build("5b")
    latents, timestep, text = inputs(causal)
    frames = timestep[:, None].expand(-1, 3)
    with pytest.raises(ValueError, match=r"causal.*\(B, T\)"):
        causal(latents, timestep, text)
    with pytest.raises(ValueError, match=r"cache.*causal_chunk"):
        full(latents, frames, text, cache=KeyValueCache())
    for first, cache in ((2, None), (1, KeyValueCache()), (-2, KeyValueCache())):
        with pytest.raises(ValueError, match=rf"first_frame={first}\b.*causal_chunk=2\b"):
            causal(latents, frames, text, cache=cache, first_frame=first)
    with pytest.raises(ValueError, match=r"cache.*\b0 tokens.*first_frame.*\b54\b"):
        causal(latents, frames, text, cache=KeyValueCache(), first_frame=2)
