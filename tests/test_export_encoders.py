"""Export of encoders and classifiers: transformers' outputs, programs, names of classes, errors."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from blueberry_video import export, load_run
from trained_classifier import trained

transformers = pytest.importorskip("transformers")


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return trained(tmp_path_factory.mktemp("run"), "model.head_init_scale=0.5")


def clip() -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (4, 16, 16, 3), dtype=np.uint8)


def inputs(run: Path) -> torch.Tensor:
    model = load_run(run, "cpu")
    return model.task.normalize(model.batch(model.read(clip()), ["clip"])["video"])


def test_classifier_in_transformers(run: Path, tmp_path: Path):
    written = export.run(run, tmp_path / "published")
    assert {path.name for path in written} == {"published", "clips.json"}
    theirs = transformers.VideoMAEForVideoClassification.from_pretrained(tmp_path / "published").eval()
    assert theirs.config.id2label == {0: "bright", 1: "dark"}
    processor = transformers.VideoMAEImageProcessor.from_pretrained(tmp_path / "published")
    pixels = processor(list(clip()), return_tensors="pt")["pixel_values"]
    torch.testing.assert_close(pixels[0].transpose(0, 1), inputs(run)[0], atol=1e-5, rtol=0)
    with torch.no_grad():
        found = theirs(pixels).logits.softmax(-1)
    torch.testing.assert_close(found, load_run(run, "cpu")(clip())["class"], atol=1e-5, rtol=0)
    about = json.loads((tmp_path / "published" / "clips.json").read_text())
    assert (about["num_frames"], about["classes"]) == (4, {"class": ["bright", "dark"]})
    with pytest.raises(FileExistsError, match="published"):
        export.run(run, tmp_path / "published")


def test_program_of_pytorch(run: Path, tmp_path: Path):
    export.run(run, tmp_path / "program", format="torch")
    files = {"clips.json": ""}
    program = torch.export.load(tmp_path / "program" / "model.pt2", extra_files=files)
    [logits] = program.module()(inputs(run))
    torch.testing.assert_close(logits.softmax(-1), load_run(run, "cpu")(clip())["class"])
    assert json.loads(files["clips.json"])["classes"] == {"class": ["bright", "dark"]}


def test_onnx(run: Path, tmp_path: Path):
    runtime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    export.run(run, tmp_path / "onnx", format="onnx")
    session = runtime.InferenceSession(tmp_path / "onnx" / "model.onnx")
    [logits] = session.run(["class"], {"video": inputs(run).numpy()})
    torch.testing.assert_close(
        torch.from_numpy(logits).softmax(-1), load_run(run, "cpu")(clip())["class"], atol=1e-5, rtol=0
    )


def test_names_of_classes_must_fit(run: Path, tmp_path: Path):
    model = load_run(run, "cpu").task.model
    with pytest.raises(ValueError, match="class has 2 classes, not 3"):
        model.save_published(tmp_path / "x", "class", ["a", "b", "c"])
    with pytest.raises(ValueError, match="num_classes"):
        export.run(run, tmp_path / "y", label="other")
