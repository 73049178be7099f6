"""Export of Depth Anything and of streaming steps of Video Depth Anything: ``torch.export`` programs and ONNX files."""

import json
from collections.abc import Callable, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from blueberry_video.models.depth_anything.model import DepthAnything
from blueberry_video.models.depth_anything.video import VideoDepthAnything
from blueberry_video.models.dinov2 import DINOv2
from blueberry_video.weights.programs import write_onnx, write_torch

METADATA = "depth.json"  # of torch programs an extra file, of ONNX files an entry of the metadata
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def export_depth(
    model: DepthAnything | VideoDepthAnything,
    path: str | Path,
    format: Literal["onnx", "torch"] = "onnx",
    image_size: int | tuple[int, int] = 518,
    step: bool = False,
    mean: Sequence[float] = MEAN,
    std: Sequence[float] = STD,
) -> list[Path]:
    """Exports the image model, or a streaming step of the video model, for images of one size.

    The image model becomes one file with the input ``images`` (1, 3, H, W), normalized with ``mean`` and ``std``, and
    the output ``maps`` (1, H, W). A stream needs two files: of the first frame, from ``images`` to ``maps`` and
    ``next_state_0``, ``next_state_1``, …; and of all other frames, with the inputs ``images`` and ``state_0``,
    ``state_1``, … and the same outputs. ``depth.json`` in the metadata holds the kind of the maps (disparity, or depth
    in meters), the size, mean and std.

    Args:
        model: its weights are exported as they are, in evaluation mode.
        path: the file to write, ending in ``.onnx`` or ``.pt2``, replaced if it exists; of a stream that of all frames
            but the first. The first is ``<stem>_first<suffix>``.
        format: ``"onnx"`` (requires the packages onnx and onnxscript), or ``"torch"``: a ``.pt2`` for
            ``torch.export.load``.
        image_size: H and W in pixels, multiples of the patch size; one number for both.
        step: export a streaming step of a video model, of any kind of temporal module.
        mean, std: normalization of ``images`` per channel, for the metadata.

    Returns:
        The written files; of a stream the step, then the first frame.

    Raises:
        ImportError: a package is missing; the message names the command that installs it.
        ValueError: ``format`` is unknown, ``path`` ends differently, the size is not in whole patches, or ``step`` does
            not fit the model.
    """
    size = (image_size, image_size) if isinstance(image_size, int) else tuple(image_size)
    if format not in ("onnx", "torch"):
        raise ValueError(f"format={format!r} is unknown: choose 'onnx' or 'torch'.")
    path, suffix = Path(path), ".onnx" if format == "onnx" else ".pt2"
    if path.suffix != suffix:
        raise ValueError(f"path={path} must end in {suffix} with format={format}, which its readers require.")
    if step != isinstance(model, VideoDepthAnything):
        fix = (
            "video models are exported as streaming steps: pass step=True" if not step else "pass a VideoDepthAnything"
        )
        raise ValueError(f"step={step} does not fit a {type(model).__name__}: {fix}.")
    if any(side < model.patch_size or side % model.patch_size for side in size):
        raise ValueError(f"image_size={image_size} must be in whole patches, multiples of {model.patch_size} pixels.")
    write = partial(write_onnx if format == "onnx" else write_torch, entry=METADATA)
    images = torch.randn(1, 3, *size).to(next(model.parameters()))
    metadata = json.dumps(
        {
            "kind": "disparity" if model.max_depth is None else "depth",
            "unit": None if model.max_depth is None else "m",
            "image_size": size,
            "mean": list(mean),
            "std": list(std),
        }
    )
    training = model.training
    model.eval()
    try:
        with torch.no_grad(), _constant_positions(model.pretrained, size):
            if not isinstance(model, VideoDepthAnything):
                write(_Function(model, model).eval(), (images,), ["images"], ["maps"], path, metadata)
                return [path]
            first = path.with_stem(f"{path.stem}_first")
            state = model.step(images)[1]
            outputs = ["maps", *(f"next_state_{i}" for i in range(len(state)))]
            names = ["images", *(f"state_{i}" for i in range(len(state)))]
            write(_Function(model, _step).eval(), (images, *state), names, outputs, path, metadata)
            write(_Function(model, _first).eval(), (images,), names[:1], outputs, first, metadata)
            return [path, first]
    finally:
        model.train(training)


class _Function(nn.Module):
    """Function of a model and its inputs as a module, which exporters require."""

    def __init__(self, model: nn.Module, function: Callable[..., Any]):
        super().__init__()
        self.model, self.function = model, None if function is model else function

    def forward(self, *inputs: Tensor) -> Any:
        return self.model(*inputs) if self.function is None else self.function(self.model, *inputs)


def _first(model: VideoDepthAnything, images: Tensor) -> tuple[Tensor, ...]:
    maps, state = model.step(images)
    return (maps, *state)


def _step(model: VideoDepthAnything, images: Tensor, *state: Tensor) -> tuple[Tensor, ...]:
    maps, after = model.step(images, state)
    return (maps, *after)


@contextmanager
def _constant_positions(encoder: DINOv2, size: tuple[int, ...]):
    """Replaces the interpolation of positions by its result: ONNX has no equal bicubic interpolation."""
    h, w = (side // encoder.patch_size[1] for side in size)
    table = encoder._positions(h, w).clone(memory_format=torch.contiguous_format)  # not a view of a larger tensor
    encoder._positions = lambda h, w: table  # type: ignore[method-assign]
    try:
        yield
    finally:
        del encoder._positions
