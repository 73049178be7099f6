"""Export of encoders and classifiers: model folders of transformers, ``torch.export`` programs and ONNX files."""

import copy
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from blueberry_video.atomic import write_text
from blueberry_video.models.classifier import VideoClassifier
from blueberry_video.models.jepa import JEPA, WorldModel
from blueberry_video.models.masked_autoencoder import MaskedAutoencoder
from blueberry_video.weights.programs import write_onnx, write_torch

CLIPS = "clips.json"  # format of the clips, in each export
Format = Literal["published", "onnx", "torch"]


def export_model(
    model: nn.Module, out: Path, clips: Mapping[str, Any], format: Format = "published", label: str | None = None
) -> list[Path]:
    """Exports a trained encoder or classifier.

    ``published`` writes a folder that transformers loads, with ``preprocessor_config.json``; of a classifier, with the
    names of the classes; of a world model, the torch file of V-JEPA 2-AC. ``onnx`` and ``torch`` write ``model.onnx``
    or ``model.pt2`` with the input ``video`` (1, 3, T, H, W), normalized, and the outputs ``features`` (1, N, D), or of
    a classifier ``<label>`` (1, classes), the logits. Each export has ``clips.json``: class names, number, sampling and
    size of frames, and normalization.

    Args:
        model: in evaluation mode.
        out: folder that does not exist or is empty.
        clips: fields of :class:`~blueberry_video.tasks.clip_format.ClipFormat`.
        format: see above.
        label: of a classifier with several labels, the one in a published folder, which holds one head.

    Returns:
        The written files and folders.

    Raises:
        FileExistsError: the folder is not empty.
        ImportError: a package for ONNX is missing.
        ValueError: the model has no published layout, or a setting has no counterpart in it.
    """
    text = json.dumps(dict(clips), indent=2) + "\n"
    if format == "published":
        written = _publish(model, out, clips, label)
    else:
        if out.exists() and any(out.iterdir()):
            raise FileExistsError(f"--out={out} exists and is not empty: choose another folder.")
        out.mkdir(parents=True, exist_ok=True)
        written = [out / ("model.onnx" if format == "onnx" else "model.pt2")]
        _write_program(model, written[0], clips, format, text)
    write_text(out / CLIPS, text)
    return [*written, out / CLIPS]


def no_layout(model: nn.Module) -> str | None:
    """Returns why a model has no folder of transformers; ``None`` if it has one."""
    if isinstance(model, VideoClassifier) and len(model.num_classes) > 1:
        return f"a folder holds one head, and the model has {', '.join(model.num_classes)}"
    if not isinstance(model, VideoClassifier | JEPA | MaskedAutoencoder):
        return f"{type(model).__name__} has none"
    try:
        _ = model.config if isinstance(model, JEPA) else model.config()
    except ValueError as error:
        return str(error)
    return None


def _publish(model: nn.Module, out: Path, clips: Mapping[str, Any], label: str | None) -> list[Path]:
    if isinstance(model, WorldModel):
        out.mkdir(parents=True, exist_ok=True)
        model.save_published(out / "world_model.pt")
        return [out / "world_model.pt"]
    if isinstance(model, VideoClassifier):
        label = label or (next(iter(model.num_classes)) if len(model.num_classes) == 1 else label)
        names = list(clips.get("classes", {}).get(label, ()))
        names += [f"LABEL_{index}" for index in range(len(names), model.num_classes.get(label or "", 0))]
        model.save_published(out, label, names)
    elif isinstance(model, JEPA):
        model.save_published(out, "encoder" if model.target_encoder is None else "target_encoder")
    elif isinstance(model, MaskedAutoencoder):
        model.save_published(out)
    else:
        raise ValueError(
            f"{type(model).__name__} has no layout of transformers or diffusers: use --format torch or onnx, or the "
            "run itself."
        )
    write_text(out / "preprocessor_config.json", json.dumps(_preprocessor(model, clips), indent=2) + "\n")
    return [out]


def _preprocessor(model: nn.Module, clips: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the settings of transformers' processor with the same frames, except for its resampling."""
    size, is_jepa = {"height": clips["height"], "width": clips["width"]}, isinstance(model, JEPA)
    kind = {"video_processor_type": "VJEPA2VideoProcessor"} if is_jepa else {}
    return kind | {
        "image_processor_type": "VideoMAEImageProcessor",
        "do_resize": True,
        "size": {"shortest_edge": min(size.values())},
        "do_center_crop": True,
        "crop_size": size,
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": clips["mean"],
        "image_std": clips["std"],
        "resample": 2,  # bilinear
    }


class _Logits(nn.Module):
    """Classifier with a tuple of logits, in the order of its labels, which exporters require."""

    def __init__(self, model: VideoClassifier):
        super().__init__()
        self.model = copy.deepcopy(model)
        heads = (
            self.model.head.linear.items()
        )  # labels such as `class` are no names of Python, which torch.export writes
        self.model.head.linear = nn.ModuleDict({f"label_{i}": head for i, (_, head) in enumerate(heads)})

    def forward(self, video: Tensor) -> tuple[Tensor, ...]:
        return tuple(self.model(video).values())


def _write_program(model: nn.Module, path: Path, clips: Mapping[str, Any], format: Format, metadata: str) -> None:
    outputs: Sequence[str]
    if isinstance(model, VideoClassifier):
        if model.segments > 1:
            raise ValueError(f"model.segments={model.segments}: programs read one window. Use the run itself.")
        module, outputs = _Logits(model), list(model.num_classes)
    else:
        encoder = getattr(model, "target_encoder", None) or getattr(model, "encoder", None)
        if encoder is None:
            raise ValueError(f"{type(model).__name__} has no encoder to export.")
        module, outputs = encoder, ["features"]
    frames = clips["num_frames"]
    video = torch.randn(1, 3, frames, clips["height"], clips["width"]).to(next(model.parameters()))
    write = write_onnx if format == "onnx" else write_torch
    with torch.no_grad():
        write(module.eval(), (video,), ["video"], outputs, path, metadata, CLIPS)
