"""Conversion of V-JEPA, V-JEPA 2 and V-JEPA 2-AC weights: original files (github.com/facebookresearch/jepa and
github.com/facebookresearch/vjepa2) and transformers' ``VJEPA2Model``, to and from the names of this package.
"""

import math
import re
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from blueberry_video.models.jepa.predictor import Grid
from blueberry_video.nn.positions import sincos_3d_table
from blueberry_video.weights import files
from blueberry_video.weights.diffusers_folder import read_folder
from blueberry_video.weights.load import different_settings

ENCODERS = ("encoder", "target_encoder")
CONSTANTS = {"hidden_act": "gelu", "layer_norm_eps": 1e-6, "qkv_bias": True}  # the same in all configs of VJEPA2Model
HUGGINGFACE = (  # parts of names: VJEPA2Model -> this package, except query, key and value, which are one matrix here
    ("encoder.embeddings.patch_embeddings.proj.", "encoder.patch_embed.proj."),
    ("predictor.embeddings.predictor_embeddings.", "predictor.embed."),
    ("predictor.embeddings.mask_tokens", "predictor.mask_tokens"),
    (".layernorm.", ".norm."),
    (".layer.", ".blocks."),
    (".attention.proj.", ".attn.proj."),
)
ORIGINAL_PROBE = (  # parts of names: probes of the original repositories -> this package
    ("pooler.query_tokens", "pool.query"),
    ("pooler.cross_attention_block.xattn.", "pool."),
    ("pooler.cross_attention_block.", "pool."),
    ("pooler.blocks.", "pool.blocks."),
)
UNUSED_PROJECTION = re.compile(r"pooler\.cross_attention_block\.(xattn\.)?proj\.")  # in files of V-JEPA; never called
HUGGINGFACE_PROBE = (  # parts of names: VJEPA2ForVideoClassification -> this package
    ("pooler.query_tokens", "pool.query"),
    ("pooler.cross_attention_layer.cross_attn.q_proj.", "pool.q."),
    ("pooler.cross_attention_layer.cross_attn.k_proj.", "pool.kv."),
    ("pooler.cross_attention_layer.", "pool."),
    ("pooler.self_attention_layers.", "pool.blocks."),
    (".self_attn.q_proj.", ".attn.qkv."),
    (".self_attn.out_proj.", ".attn.proj."),
    (".layer_norm", ".norm"),
)


class Published(NamedTuple):
    """Weights of a JEPA under the names of this package.

    Attributes:
        layout: ``"original"``, ``"huggingface"`` or ``"run"`` (a checkpoint of this package).
        state: ``encoder.…`` and, where the source has them, ``predictor.…``, ``target_encoder.…`` and ``head.…``.
        config: ``config.json`` of a transformers folder, otherwise empty.
        content: state dicts of an original file by name, otherwise empty.
    """

    layout: str
    state: dict[str, Tensor]
    config: dict[str, Any]
    content: dict[str, dict[str, Tensor]]

    @property
    def positions(self) -> str | None:
        """``predictor_positions`` of the weights; ``None`` if undetermined. V-JEPA 2 has 10 mask tokens."""
        if self.layout == "huggingface" or (self.content and len(self.state["predictor.mask_tokens"]) == 10):
            return "rope_3d"
        return "sincos_3d" if position_tables(self.content) else None


def read_published(weights: str | Path, which: str | None) -> Published:
    """Reads weights of either original repository, of transformers or of a run of this package.

    Args:
        weights: a file, a transformers folder or a hub id.
        which: ``"encoder"`` or ``"target_encoder"``: the encoder of the source that becomes ``encoder.…``. By default
            the target encoder, where there is one.

    Raises:
        FileNotFoundError: a file is missing.
        ValueError: a file is damaged, lacks the encoder, or its config has settings that no published model has.
    """
    path, layout = files.resolve(weights), "run"
    config: dict[str, Any] = {}
    content = {} if path.is_dir() or path.suffix == ".safetensors" else files.read_content(path)
    parts = {name for name, part in content.items() if isinstance(part, dict)} if isinstance(content, dict) else set()
    if isinstance(content, dict) and (held := parts & {*ENCODERS, "predictor"}):
        layout = "original"
    else:
        content = {}
        config, state = read_folder(path) if path.is_dir() else ({}, files.read_weights(path))
        if any("encoder.embeddings.patch_embeddings." in name for name in state):
            layout, state = "huggingface", convert_huggingface(state)
        held = {name.split(".")[0] for name in state}
    which = which or ("target_encoder" if "target_encoder" in held else "encoder")
    if which not in held:
        other = next((name for name in ENCODERS if name in held), None)
        fix = f"use which={other!r} (in a config task.weights_of={other})" if other else "give a file of V-JEPA"
        raise ValueError(
            f"{weights} holds no encoder which={which!r}: {fix}. It holds {', '.join(map(repr, sorted(held)))}."
        )
    if found := different_settings({key: config[key] for key in CONSTANTS if key in config}, CONSTANTS):
        raise ValueError(f"{weights}: its config.json has settings that no published V-JEPA 2 has: {found}.")
    if layout == "original":
        state = convert_original(content, which)
    elif which != "encoder":
        state = {name: value for name, value in state.items() if not name.startswith("encoder.")}
        state |= _prefixed(part(state, which), "encoder.")
    return Published(layout, state, config, content)


def settings_of_weights(state: dict[str, Tensor], source: str | Path) -> dict[str, Any]:
    """Settings that the shapes of a state dict determine, under the keys of transformers' ``VJEPA2Config``.

    Raises:
        ValueError: a tensor is missing.
    """
    try:
        patches, dim = state["encoder.patch_embed.proj.weight"], len(state["predictor.embed.bias"])
        hidden, predictor_hidden = (len(state[f"{part}.blocks.0.mlp.fc1.bias"]) for part in ("encoder", "predictor"))
        mask_tokens = state["predictor.mask_tokens"]
    except KeyError as error:
        raise ValueError(f"{source} lacks {error}: it is damaged, or not the whole model.") from error
    return {
        "hidden_size": patches.shape[0],
        "in_chans": patches.shape[1],
        "tubelet_size": patches.shape[2],
        "patch_size": patches.shape[3],
        "num_hidden_layers": files.num_blocks(state, "encoder.blocks"),
        "mlp_ratio": _ratio(hidden, patches.shape[0]),
        "pred_hidden_size": dim,
        "pred_num_hidden_layers": files.num_blocks(state, "predictor.blocks"),
        "pred_mlp_ratio": _ratio(predictor_hidden, dim),
        "pred_num_mask_tokens": len(mask_tokens),
    }


def _ratio(hidden: int, dim: int) -> float:
    """MLP ratio for which transformers' ``int(dim * ratio)`` is exactly ``hidden``."""
    ratio = hidden / dim
    return ratio if int(dim * ratio) == hidden else math.nextafter(ratio, math.inf)


def part(state: dict[str, Tensor], name: str) -> dict[str, Tensor]:
    """Tensors ``<name>.…`` of a state dict, without that prefix.

    Raises:
        ValueError: there are none.
    """
    found = {key.removeprefix(f"{name}."): value for key, value in state.items() if key.startswith(f"{name}.")}
    if not found:
        raise ValueError(f"the weights hold no {name!r}, only {sorted({key.split('.')[0] for key in state})}.")
    return found


# ---- transformers ----------------------------------------------------------------------------------------------------


def convert_huggingface(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Weights of ``VJEPA2Model`` or ``VJEPA2ForVideoClassification`` as ``encoder.…`` and ``predictor.…``.

    Unknown names are kept, so that the strict loader reports them.
    """
    prefix = "vjepa2." if any(name.startswith("vjepa2.") for name in state) else ""
    state = {name.removeprefix(prefix): value for name, value in state.items() if name.startswith(prefix)}
    converted = {}
    for name, value in state.items():
        if re.search(r"\.attention\.(key|value)\.", name):
            continue
        if ".attention.query." in name:
            parts = [name.replace(".query.", f".{part}.") for part in ("query", "key", "value")]
            name, value = name.replace(".attention.query.", ".attn.qkv."), torch.cat([state[part] for part in parts])
        for theirs, ours in HUGGINGFACE:
            name = name.replace(theirs, ours)
        converted[name] = value.flatten(0, 2) if name == "predictor.mask_tokens" else value  # (M, 1, 1, D) there
    return converted


def to_huggingface(state: dict[str, Tensor], which: str = "encoder") -> dict[str, Tensor]:
    """Inverse of :func:`convert_huggingface`: weights that ``VJEPA2Model`` loads strictly.

    Args:
        state: state dict of a :class:`~blueberry_video.models.jepa.JEPA`; with ``rope_quirk``, as in ``VJEPA2Model``.
        which: ``"encoder"`` or ``"target_encoder"``: ``VJEPA2Model`` has one encoder.

    Raises:
        ValueError: there is no such encoder.
    """
    renamed = _prefixed(part(state, which), "encoder.")
    renamed |= {name: value for name, value in state.items() if name.startswith("predictor.")}
    converted = {}
    for name, value in renamed.items():
        for theirs, ours in HUGGINGFACE:
            name = name.replace(ours, theirs)
        if ".attn.qkv." in name:
            for kind, matrix in zip(("query", "key", "value"), value.chunk(3), strict=True):
                converted[name.replace(".attn.qkv.", f".attention.{kind}.")] = matrix.clone()  # safetensors: no views
        else:
            converted[name] = value[:, None, None] if name.endswith("mask_tokens") else value
    return converted


# ---- original files --------------------------------------------------------------------------------------------------


def convert_original(content: dict[str, dict[str, Tensor]], which: str) -> dict[str, Tensor]:
    """Weights of an original file of V-JEPA or V-JEPA 2, as in :class:`Published`, without its position tables.

    Args:
        content: state dicts of the file by name.
        which: ``"encoder"`` or ``"target_encoder"``: the encoder of the file that becomes ``encoder.…``.

    Raises:
        ValueError: the file has no such encoder, or no predictor.
    """
    sources = {"encoder": which} | ({"target_encoder": "target_encoder"} if "target_encoder" in content else {})
    encoders = {ours: _network(content, theirs) for ours, theirs in sources.items()}
    predictor = _network(content, "predictor")
    tokens = sorted((name for name in predictor if name.startswith("mask_tokens.")), key=lambda name: int(name[12:]))
    converted = _flat(encoders)
    converted["predictor.mask_tokens"] = torch.cat([predictor.pop(name).flatten(0, 1) for name in tokens])
    return converted | _flat({"predictor": predictor})


def to_original(state: dict[str, Tensor], tables: Grid | None = None) -> dict[str, dict[str, Tensor]]:
    """Inverse of :func:`convert_original`, to be saved with ``torch.save``.

    Args:
        state: state dict of a :class:`~blueberry_video.models.jepa.JEPA`.
        tables: patch grid (t, h, w) of the position tables to add, as in files of V-JEPA.
    """
    predictor: dict[str, Tensor] = {}
    for name, value in part(state, "predictor").items():
        if name == "mask_tokens":
            predictor |= {f"mask_tokens.{i}": token.view(1, 1, -1) for i, token in enumerate(value)}
        else:
            predictor[f"predictor_{name}"] = value
    encoders = [name for name in ENCODERS if any(key.startswith(f"{name}.") for key in state)]
    content = {name: part(state, name) for name in encoders} | {"predictor": predictor}
    if tables is not None:
        for name in encoders:
            content[name]["pos_embed"] = sincos_3d_table(tables, len(content[name]["patch_embed.proj.bias"]))[None]
        predictor["predictor_pos_embed"] = sincos_3d_table(tables, len(predictor["predictor_embed.bias"]))[None]
    return {name: _prefixed(weights, "module.backbone.") for name, weights in content.items()}


def position_tables(content: dict[str, dict[str, Tensor]]) -> dict[str, Tensor]:
    """Position tables (1, N, D) of an original file by name, such as ``encoder.pos_embed``."""
    return {
        f"{network}.{name}": table
        for network in (*ENCODERS, "predictor")
        for name, table in files.without_prefixes(content.get(network) or {}).items()
        if name.endswith("pos_embed")
    }


def image_size_of_tables(content: dict[str, dict[str, Tensor]], patches: Tensor, num_frames: int) -> int | None:
    """Image size of the square clips for which the position tables of an original file are made; ``None`` without
    tables.

    Args:
        content: state dicts of the file by name.
        patches: (D, C, t, p, p), weight of the patch embedding.
        num_frames: frames per clip.
    """
    tubelet, patch_size = patches.shape[2:4]
    lengths = {table.shape[1] for table in position_tables(content).values()}
    if not lengths or num_frames % tubelet:
        return None
    return math.isqrt(min(lengths) // (num_frames // tubelet)) * patch_size


def check_positions(content: dict[str, dict[str, Tensor]], grid: Grid) -> None:
    """Checks that the position tables of an original file, if any, are the sine-cosine tables of a patch grid.

    Raises:
        ValueError: a table differs: the computed positions would not be those that the weights were trained with.
    """
    for name, table in position_tables(content).items():
        expected = sincos_3d_table(grid, table.shape[-1])
        if table.shape[1:] != expected.shape or (table[0].float() - expected).abs().max() > 1e-5:
            raise ValueError(
                f"{name} in the file, {tuple(table.shape)}, is not the 3-D sine-cosine table of the patch grid {grid}: "
                "set num_frames and image_size to those of the weights. The model also accepts clips of other sizes."
            )


def read_world_model(weights: str | Path, use_extrinsics: bool = False) -> dict[str, Tensor]:
    """Reads V-JEPA 2-AC from an original file, under the names of :class:`~blueberry_video.models.jepa.WorldModel`.

    Every file has an encoder of camera extrinsics, which the published model does not use; without ``use_extrinsics``
    it is dropped.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is damaged, lacks ``encoder`` or ``predictor``, or has a predictor without actions.
    """
    content = files.read_content(files.resolve(weights))
    if not isinstance(content, dict):
        raise ValueError(f"{weights} holds no state dicts: give a file of V-JEPA 2-AC.")
    networks = {name: _network(content, name) for name in ("encoder", "predictor")}
    if "action_encoder.weight" not in networks["predictor"]:
        raise ValueError(
            "the predictor in the file has no action_encoder, so it is not conditioned on actions: read V-JEPA and "
            "V-JEPA 2 with blueberry_video.models.jepa.JEPA.from_published."
        )
    unused = () if use_extrinsics else ("predictor.extrinsics_encoder.",)
    return {name: value for name, value in _flat(networks).items() if not name.startswith(unused)}


def world_model_to_original(state: dict[str, Tensor]) -> dict[str, dict[str, Tensor]]:
    """Inverse of :func:`read_world_model`, to be saved with ``torch.save``.

    The encoder of camera extrinsics, which the original loads strictly, is zero if the model has none.
    """
    dim, action_dim = state["predictor.action_encoder.weight"].shape
    shapes = {"extrinsics_encoder.weight": (dim, action_dim - 1), "extrinsics_encoder.bias": (dim,)}
    predictor = {name: torch.zeros(shape) for name, shape in shapes.items()}
    for name, value in part(state, "predictor").items():
        unprefixed = ("action_encoder.", "state_encoder.", "extrinsics_encoder.")
        predictor[name if name.startswith(unprefixed) else f"predictor_{name}"] = value
    encoder = _prefixed(part(state, "encoder"), "module.backbone.")
    return {"encoder": encoder, "predictor": _prefixed(predictor, "module.")}


def _prefixed(state: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {f"{prefix}{name}": value for name, value in state.items()}


def _network(content: dict[str, dict[str, Tensor]], name: str) -> dict[str, Tensor]:
    """State dict ``name`` of an original file, without the prefixes of its names."""
    if not isinstance(content.get(name), dict):
        found = ", ".join(repr(key) for key, value in content.items() if isinstance(value, dict))
        raise ValueError(f"the file holds no {name!r}, only {found}: give a file with 'encoder' and 'predictor'.")
    return files.without_prefixes(content[name])


def _flat(networks: dict[str, dict[str, Tensor]]) -> dict[str, Tensor]:
    """Merges state dicts, without position tables and without ``predictor_`` in the names."""
    return {
        f"{network}.{name.removeprefix('predictor_')}": value
        for network, weights in networks.items()
        for name, value in weights.items()
        if name not in ("pos_embed", "predictor_pos_embed")
    }


# ---- probes ----------------------------------------------------------------------------------------------------------


def convert_probe(state: dict[str, Tensor], label: str) -> dict[str, Tensor]:
    """Attentive probe of an original file or of ``VJEPA2ForVideoClassification`` under the names of a
    :class:`~blueberry_video.nn.heads.ClassificationHead` with attentive pooling and no final norm, or of an
    :class:`~blueberry_video.models.jepa.anticipator.AnticipationHead`.

    Args:
        state: state dict; other tensors are ignored. Original files hold a list of probes, one per learning rate.
        label: name of the head in these files; probes of anticipation have three: verb, noun and action.
    """
    state = files.without_prefixes(state)
    converted: dict[str, Tensor] = {}
    names = HUGGINGFACE_PROBE if "classifier.weight" in state else ORIGINAL_PROBE
    for name, value in state.items():
        is_merged = re.search(r"\.(self_attn\.[kv]|cross_attn\.v)_proj\.", name)  # concatenated below
        if is_merged or not re.match(r"pooler\.|linear\.|((verb|noun|action)_)?classifier\.", name):
            continue
        if UNUSED_PROJECTION.match(name):
            continue
        if ".self_attn.q_proj." in name:
            value = torch.cat([state[name.replace(".q_proj.", f".{part}_proj.")] for part in "qkv"])
        elif ".cross_attn.k_proj." in name:
            value = torch.cat([state[name.replace(".k_proj.", f".{part}_proj.")] for part in "kv"])
        for theirs, ours in names:
            name = name.replace(theirs, ours)
        name = re.sub(r"^(verb|noun|action)_classifier", r"linear.\1", name)
        converted[re.sub(r"^(linear\b(?=\.(weight|bias)$)|classifier)", f"linear.{label}", name)] = value
    return converted
