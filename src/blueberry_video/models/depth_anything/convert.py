"""Published weights of Depth Anything and Video Depth Anything: their settings, license and conversion.

Images: the original layout and that of transformers, both ways. Videos: the original layout, both ways.
"""

import json
import math
import re
from pathlib import Path
from typing import Any, Literal, NamedTuple

from torch import Tensor

from blueberry_video.models.dinov2 import published_weights, to_huggingface, to_original
from blueberry_video.nn.positions import sinusoid_table
from blueberry_video.weights.diffusers_folder import CONFIG, model_of_run, read_source
from blueberry_video.weights.files import num_blocks, read_weights, resolve

UNKNOWN: Literal["unknown"] = "unknown"  # no file states the setting
VIDEO_FILE = "video_depth_anything.pth"  # in a folder of a video model, next to config.json
TABLE = ".pos_encoder.pe"  # fixed positions, which only published files hold
V2_TAPS = {12: (2, 5, 8, 11), 24: (4, 11, 17, 23), 40: (9, 19, 29, 39)}  # by number of blocks
MODEL_SETTINGS = (  # arguments that no tensor determines
    "taps",
    "max_depth",
    "temporal",
    "norm_groups",
    "temporal_heads",
    "scan_head_dim",
    "scan_state_dim",
    "scan_conv_size",
)

STEMS = {"conv1": "output_conv1", "conv2": "output_conv2.0", "conv3": "output_conv2.2"}
UNITS = {"projection": "out_conv", "residual_layer1": "resConfUnit1", "residual_layer2": "resConfUnit2"}


class Published(NamedTuple):
    """Published weights and the settings that accompany them."""

    state: dict[str, Tensor]  # under the names of the file
    encoder: dict[str, Any]  # config of the encoder, under the names of transformers; empty if there is none
    settings: dict[str, Any]  # those of MODEL_SETTINGS that are known, under the names of the model's arguments

    @property
    def max_depth(self) -> float | Literal["unknown"] | None:
        """``None`` for relative disparity, the largest metric depth in meters, or ``"unknown"``."""
        return self.settings.get("max_depth", UNKNOWN)


def read_published(weights: str | Path) -> Published:
    """Reads weights and settings.

    Settings are read from ``config.json`` of a folder, from ``config.yaml`` of the run that wrote a checkpoint, or from
    the file name of the originals, such as ``depth_anything_v2_metric_hypersim_vits.pth``. A file with a different name
    states none.

    Args:
        weights: a file, a folder in the layout of transformers or of ``VideoDepthAnything.save_published``, or weights
            on a hub, see :func:`~blueberry_video.weights.diffusers_folder.read_source`.

    Raises:
        FileNotFoundError: there are no such weights.
        ValueError: a file is damaged.
    """
    path = resolve(weights)
    file = path / VIDEO_FILE if path.is_dir() else path
    if file.name == VIDEO_FILE and file.is_file() and (path.is_dir() or file.with_name(CONFIG).is_file()):
        try:
            config = json.loads(file.with_name(CONFIG).read_text())
            encoder, settings = config["encoder"], {key: config[key] for key in MODEL_SETTINGS}
        except (OSError, json.JSONDecodeError, KeyError, TypeError) as error:
            about = file.with_name(CONFIG)
            raise ValueError(f"{about} is missing or damaged ({error}): save the model again.") from error
        return Published(read_weights(file), encoder, settings)
    config, state = read_source(path)
    if "backbone_config" in config:
        return Published(state, config["backbone_config"], settings_of_transformers(config))
    settings = settings_of_run(path)
    if not settings:
        settings = settings_of_name(path.name, num_blocks(state, "pretrained.blocks"))
        heads = settings.pop("num_heads", None)
        width = state["pretrained.cls_token"].shape[-1] if "pretrained.cls_token" in state else 0
        if not config and heads is not None and width == 64 * heads:  # the width of this size
            config = {"num_attention_heads": heads}
    return Published(state, config, settings)


def settings_of_transformers(config: dict[str, Any]) -> dict[str, Any]:
    """Taps and ``max_depth`` of a config of ``DepthAnythingForDepthEstimation``."""
    backbone = config["backbone_config"]
    metric = config.get("depth_estimation_type", "relative") == "metric"
    settings = {"max_depth": float(config.get("max_depth") or 1) if metric else None}
    stages = backbone.get("out_indices") or [name.removeprefix("stage") for name in backbone.get("out_features") or ()]
    count = backbone.get("num_hidden_layers", 12) + 1  # with the patch embedding as stage 0
    return settings | ({"taps": tuple(int(stage) % count - 1 for stage in stages)} if stages else {})


def settings_of_run(file: Path) -> dict[str, Any]:
    """Settings in ``config.yaml`` of the run that wrote a checkpoint; empty for any other file."""
    model = model_of_run(file)
    return {key: model[key] for key in MODEL_SETTINGS if key in model} if "taps" in model else {}


def settings_of_name(name: str, blocks: int) -> dict[str, Any]:
    """Taps, ``max_depth`` and number of heads of an original file by its name; empty for any other name."""
    found = re.fullmatch(
        r"(metric_)?(video_)?depth_anything_(v2_)?(metric_(hypersim|vkitti)_)?vit([sblg])(14)?\.\w+", name
    )
    ranges, sizes = {"hypersim": 20.0, "vkitti": 80.0}, {"s": 6, "b": 12, "l": 16, "g": 24}
    if found is None:
        return next(({"max_depth": value} for data, value in ranges.items() if f"metric_{data}" in name), {})
    metric_video, video, second, _, data, size, first = found.groups()
    metric = ranges[data] if data else math.inf if metric_video else None
    taps = V2_TAPS.get(blocks) if video or second else tuple(range(blocks - 4, blocks)) if first else None
    return {"max_depth": metric, "num_heads": sizes[size]} | ({} if taps is None else {"taps": taps})


def check_settings(published: Published, taps: tuple[int, ...], max_depth: float | None, source: str | Path) -> None:
    """Checks that the settings of a model, which no tensor determines, are those of published weights, where known.

    Raises:
        ValueError: they differ; the message names key and value.
    """
    theirs = published.max_depth
    if theirs != UNKNOWN and theirs != max_depth:
        kinds = [
            "relative disparity" if each is None else f"metric depth up to {each} m" for each in (theirs, max_depth)
        ]
        raise ValueError(
            f"model.max_depth={max_depth} does not fit {source}, which has max_depth={theirs}: the weights predict "
            f"{kinds[0]}, the model {kinds[1]}. Set model.max_depth={'null' if theirs is None else theirs}; for "
            "fine-tuning to metric depth load the encoder alone, with encoder_only=True."
        )
    known = published.settings.get("taps")
    if known is not None and tuple(known) != tuple(taps):
        raise ValueError(
            f"model.taps={list(taps)} does not fit {source}: its head reads the blocks {list(known)}. Set "
            f"model.taps={list(known)}."
        )


def published_taps(published: Published, blocks: int, source: str | Path) -> tuple[int, ...]:
    """Returns the taps of published weights.

    Raises:
        ValueError: they are unknown; the message names those of V1 and V2.
    """
    if (taps := published.settings.get("taps")) is not None:
        return tuple(taps)
    second = f"{V2_TAPS[blocks]} in V2, " if blocks in V2_TAPS else ""
    raise ValueError(
        f"{source} does not state the blocks that the head reads: pass taps=…, four indices ({second}"
        f"{tuple(range(blocks - 4, blocks))} in V1), or use the file name of the original, such as "
        "depth_anything_v2_vits.pth."
    )


def is_video(state: dict[str, Tensor]) -> bool:
    """Whether published weights are those of a video model with temporal modules."""
    return any("motion_modules." in name for name in state)


def license_text(embed_dim: int, taps: tuple[int, ...], depth: int, video: bool = False) -> str:
    """License of the published weights of a size, as the end of a sentence.

    V1, which reads the last four blocks, is Apache-2.0 in all sizes; of V2 and of Video Depth Anything only Small is.
    """
    names = {384: "Small", 768: "Base", 1024: "Large", 1536: "Giant"}
    if embed_dim not in names:
        return f"license: check the model card (no published model has width {embed_dim})"
    is_first = not video and tuple(taps) == tuple(range(depth - 4, depth))
    family = "Video Depth Anything" if video else "Depth Anything V1" if is_first else "Depth Anything V2"
    free = is_first or embed_dim == 384
    terms = "Apache-2.0" if free else "CC-BY-NC-4.0, which excludes commercial use"
    return f"license of {family} {names[embed_dim]}: {terms}"


# ---- tensors ---------------------------------------------------------------------------------------------------------


def convert_published(state: dict[str, Tensor], source: str | Path) -> dict[str, Tensor]:
    """Converts a state dict in the layout of the original or of transformers to the names of the original.

    Raises:
        ValueError: if it is of neither layout.
    """
    theirs = any(name.startswith("neck.") for name in state)
    encoder, head = ("backbone.", ("neck.", "head.")) if theirs else ("pretrained.", ("depth_head.",))
    rest = {name: value for name, value in state.items() if name.startswith(head)}
    # read_weights removes `backbone.`
    inside = {name.removeprefix(encoder): value for name, value in state.items() if name not in rest}
    if any(name.startswith("head.scratch.") for name in state):
        raise ValueError(f"{source} holds a Video Depth Anything: load it into a VideoDepthAnything.")
    if not inside or not rest:
        raise ValueError(
            f"{source} holds no Depth Anything: there are no {encoder}… and {head[0]}… among names such as "
            f"{', '.join(list(state)[:3])}. Use a file of github.com/DepthAnything or a folder of transformers."
        )
    converted = {f"pretrained.{name}": value for name, value in published_weights(inside, source).items()}
    return converted | {(head_from_huggingface(name) if theirs else name): value for name, value in rest.items()}


def to_published(state: dict[str, Tensor], huggingface: bool) -> dict[str, Tensor]:
    """Inverse of :func:`convert_published`, with a mask token of zeros."""
    inside = {name.removeprefix("pretrained."): v for name, v in state.items() if name.startswith("pretrained.")}
    rest = {name: value for name, value in state.items() if not name.startswith("pretrained.")}
    if huggingface:
        encoder = {f"backbone.{name}": value for name, value in to_huggingface(inside).items()}
        return encoder | {head_to_huggingface(name): value for name, value in rest.items()}
    return {f"pretrained.{name}": value for name, value in to_original(inside).items()} | rest


def head_from_huggingface(name: str) -> str:
    """Name of a parameter of the head in the original layout.

    Raises:
        ValueError: for a name that the layout of transformers does not have.
    """
    if found := re.fullmatch(r"neck\.reassemble_stage\.layers\.(\d)\.(projection|resize)\.(\w+)", name):
        part = "projects" if found[2] == "projection" else "resize_layers"
        return f"depth_head.{part}.{found[1]}.{found[3]}"
    if found := re.fullmatch(r"neck\.convs\.(\d)\.weight", name):
        return f"depth_head.scratch.layer{int(found[1]) + 1}_rn.weight"
    fusion = r"neck\.fusion_stage\.layers\.(\d)\.(\w+?)(?:\.convolution(\d))?\.(\w+)"
    if (found := re.fullmatch(fusion, name)) and found[2] in UNITS:
        unit = f".conv{found[3]}" if found[3] else ""
        return f"depth_head.scratch.refinenet{4 - int(found[1])}.{UNITS[found[2]]}{unit}.{found[4]}"
    if (found := re.fullmatch(r"head\.(conv\d)\.(\w+)", name)) and found[1] in STEMS:
        return f"depth_head.scratch.{STEMS[found[1]]}.{found[2]}"
    raise ValueError(f"{name} is not a weight of DepthAnythingForDepthEstimation of transformers.")


def head_to_huggingface(name: str) -> str:
    """Inverse of :func:`head_from_huggingface`."""
    inner = name.removeprefix("depth_head.").removeprefix("scratch.")
    stem, _, kind = inner.rpartition(".")
    if found := re.fullmatch(r"(projects|resize_layers)\.(\d)", stem):
        part = "projection" if found[1] == "projects" else "resize"
        return f"neck.reassemble_stage.layers.{found[2]}.{part}.{kind}"
    if found := re.fullmatch(r"layer(\d)_rn", stem):
        return f"neck.convs.{int(found[1]) - 1}.{kind}"
    if found := re.fullmatch(r"refinenet(\d)\.(\w+)(?:\.conv(\d))?", stem):
        unit = {ours: their for their, ours in UNITS.items()}[found[2]]
        inside = f".convolution{found[3]}" if found[3] else ""
        return f"neck.fusion_stage.layers.{4 - int(found[1])}.{unit}{inside}.{kind}"
    theirs = {ours: their for their, ours in STEMS.items()}
    return f"head.{theirs[stem]}.{kind}"


def convert_published_video(state: dict[str, Tensor], source: str | Path) -> dict[str, Tensor]:
    """Converts a state dict of Video Depth Anything, or of Depth Anything in any layout, to the names of the video
    model. That of an image model has no temporal modules.

    Raises:
        ValueError: it is of neither model, or its table of positions is not the published one.
    """
    if not any(name.startswith("head.scratch.") for name in state):
        converted = convert_published(state, source)
        return {re.sub(r"^depth_head\.", "head.", name): value for name, value in converted.items()}
    inside = {name.removeprefix("pretrained."): v for name, v in state.items() if name.startswith("pretrained.")}
    converted = {f"pretrained.{name}": value for name, value in published_weights(inside, source).items()}
    for name, value in state.items():
        if name.endswith(TABLE):
            expected = sinusoid_table(32, value.shape[-1])[None]
            if value.shape != expected.shape or (value.cpu().float() - expected).abs().max() > 1e-2:  # half precision
                raise ValueError(
                    f"{name} in {source}, of shape {tuple(value.shape)}, is not the sinusoidal table of shape "
                    f"{tuple(expected.shape)} of Video Depth Anything: use a published file."
                )
        elif not name.startswith("pretrained."):
            converted[name] = value
    return converted


def to_published_video(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Inverse of :func:`convert_published_video`: the original layout, with tables of positions and a mask token."""
    converted = to_published(state, huggingface=False)
    for name in [name for name in converted if name.endswith(".to_q.weight")]:
        table = sinusoid_table(32, converted[name].shape[1])[None]
        converted[name.replace(".to_q.weight", TABLE)] = table.to(converted[name])
    return converted
