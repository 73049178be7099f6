"""Conversion of published Depth Anything weights: the original layout and that of transformers, both ways."""

import re
from pathlib import Path

from torch import Tensor

from blueberry_video.models.dinov2 import published_weights, to_huggingface, to_original

STEMS = {"conv1": "output_conv1", "conv2": "output_conv2.0", "conv3": "output_conv2.2"}
UNITS = {"projection": "out_conv", "residual_layer1": "resConfUnit1", "residual_layer2": "resConfUnit2"}


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
