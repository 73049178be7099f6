"""Exported programs and ONNX files: equal to PyTorch, over a stream of frames."""

import json
import sys

import pytest
import torch
from torch import Tensor, nn

from blueberry_video.models.depth_anything import DepthAnything, VideoDepthAnything
from blueberry_video.models.depth_anything.export import export_depth
from blueberry_video.models.dinov2 import DINOv2

SIZES = {"taps": (0, 1, 2, 3), "features": 16, "out_channels": (4, 6, 16, 16)}
SIZE = (32, 24)
SUFFIX = {"onnx": ".onnx", "torch": ".pt2"}


def depth_model(temporal: str | None) -> DepthAnything | VideoDepthAnything:
    torch.manual_seed(0)
    encoder = DINOv2(32, 1, 8, 12, 4, 2, table_size=5, layer_scale_init=1.0)
    nn.init.normal_(encoder.pos_embed)
    if temporal is None:
        model = DepthAnything(encoder, **SIZES)
    else:
        scan = {"scan_head_dim": 4, "scan_state_dim": 4}
        model = VideoDepthAnything(encoder, **SIZES, temporal=temporal, norm_groups=4, temporal_heads=2, **scan)
        for module in model.head.motion_modules:
            nn.init.normal_(module.temporal_transformer.proj_out.weight, std=0.5)
    head = model.depth_head if temporal is None else model.head
    nn.init.normal_(head.scratch.output_conv2[2].weight, std=0.5)
    nn.init.constant_(head.scratch.output_conv2[2].bias, 0.5)
    return model.eval()


def runner(path, format: str):
    """Function of tensors to a list of tensors."""
    if format == "torch":
        program = torch.export.load(path).module()

        @torch.no_grad()  # as the model: attention has other kernels for training
        def run(*inputs: Tensor) -> list[Tensor]:
            outputs = program(*inputs)
            return [outputs] if isinstance(outputs, Tensor) else list(outputs)

        return run
    onnxruntime = pytest.importorskip("onnxruntime")
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    names = [each.name for each in session.get_inputs()]
    assert names == ["images", *(f"state_{i}" for i in range(len(names) - 1))]
    outputs = [each.name for each in session.get_outputs()]
    assert outputs == ["maps", *(f"next_state_{i}" for i in range(len(outputs) - 1))]
    return lambda *inputs: [
        torch.from_numpy(each)
        for each in session.run(None, {name: each.numpy() for name, each in zip(names, inputs, strict=True)})
    ]


def skip_without_packages(format: str) -> None:
    for package in ("onnx", "onnxscript", "onnxruntime") if format == "onnx" else ():
        pytest.importorskip(package)


@pytest.mark.parametrize(("format", "tolerance"), [("torch", 1e-6), ("onnx", 1e-4)])
def test_the_exported_image_model_equals_pytorch(format: str, tolerance: float, tmp_path):
    skip_without_packages(format)
    model, images = depth_model(None).train(), torch.randn(1, 3, *SIZE)
    (path,) = export_depth(model, tmp_path / f"model{SUFFIX[format]}", format, SIZE)
    assert model.training
    with torch.no_grad():
        expected = model.eval()(images)
    assert expected.std() > 1e-3
    (found,) = runner(path, format)(images)
    assert (found - expected).abs().max() <= tolerance * expected.abs().max()
    if format == "torch":
        extra = {"depth.json": ""}
        torch.export.load(path, extra_files=extra)
        metadata = extra["depth.json"]
    else:
        import onnx

        metadata = {each.key: each.value for each in onnx.load(path).metadata_props}["depth.json"]
    facts = json.loads(metadata)
    assert (facts["kind"], facts["unit"], facts["image_size"]) == ("disparity", None, list(SIZE))


@pytest.mark.parametrize(
    ("temporal", "format", "tolerance"),
    [
        ("scan", "torch", 1e-6),
        pytest.param("attention", "torch", 1e-6, marks=pytest.mark.slow),
        pytest.param("scan", "onnx", 1e-4, marks=pytest.mark.slow),
        pytest.param("attention", "onnx", 1e-4, marks=pytest.mark.slow),
    ],
)
def test_exported_steps_equal_pytorch(temporal: str, format: str, tolerance: float, tmp_path):
    skip_without_packages(format)
    model = depth_model(temporal)
    step, first = (
        runner(path, format) for path in export_depth(model, tmp_path / f"m{SUFFIX[format]}", format, SIZE, step=True)
    )
    maps, expected_state, state = [], None, None
    for frame in torch.randn(4, 1, 3, *SIZE):
        with torch.no_grad():
            expected, expected_state = model.step(frame, expected_state)
        found, *state = first(frame) if state is None else step(frame, *state)
        maps.append(found)
        for mine, theirs in zip((found, *state), (expected, *expected_state), strict=True):
            assert (mine - theirs).abs().max() <= tolerance * theirs.abs().max()
    assert (maps[3] - maps[2]).abs().max() > 1e-2


def test_bad_arguments_raise(tmp_path, monkeypatch: pytest.MonkeyPatch):
    with pytest.raises(ValueError, match=r"format='tflite'"):
        export_depth(depth_model(None), tmp_path / "m", "tflite")
    with pytest.raises(ValueError, match=r"m\.onnx must end in \.pt2\b"):
        export_depth(depth_model(None), tmp_path / "m.onnx", "torch", SIZE)
    with pytest.raises(ValueError, match=r"image_size=\(32, 25\).*\b8\b"):
        export_depth(depth_model(None), tmp_path / "m.onnx", image_size=(32, 25))
    with pytest.raises(ValueError, match=r"step=False.*VideoDepthAnything.*step=True"):
        export_depth(depth_model("scan"), tmp_path / "m.onnx", image_size=SIZE)
    with pytest.raises(ValueError, match=r"step=True.* DepthAnything\b"):
        export_depth(depth_model(None), tmp_path / "m.onnx", image_size=SIZE, step=True)
    monkeypatch.setitem(sys.modules, "onnxscript", None)
    with pytest.raises(ImportError, match=r"onnxscript.*pip install -e '\.\[onnx\]'.*format=torch"):
        export_depth(depth_model(None), tmp_path / "m.onnx", image_size=SIZE)
    assert not list(tmp_path.iterdir())
