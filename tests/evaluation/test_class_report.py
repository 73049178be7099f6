"""Class reports against their definitions, torchmetrics, and files of a run."""

import csv
from pathlib import Path

import pytest
import torch
from PIL import Image
from torchmetrics.classification import MulticlassCalibrationError, MulticlassConfusionMatrix

from blueberry_video.evaluation.class_report import ClassReports, ClassScores, class_names, table, write_report


def scores(classes: int = 7, clips: int = 200) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(0, classes - 1, (clips,), generator=generator)  # the last class does not occur
    logits = 2 * torch.randn(clips, classes, generator=generator)
    logits[torch.arange(clips), labels] += 2
    return logits, labels


def test_report_is_that_of_all_clips_in_one_batch():
    logits, labels = scores()
    counts = ClassScores()
    for start in range(0, 200, 33):
        part = slice(start, start + 33)
        counts.add({"action": logits[part]}, {"action": labels[part]})
    report = counts.compute()["action"]
    expected = MulticlassConfusionMatrix(7)(logits, labels)
    assert torch.equal(report.confusion, expected)
    top5 = (logits.argsort(dim=1, descending=True)[:, :5] == labels[:, None]).any(dim=1).double().mean()
    assert report.top5 == pytest.approx(float(top5))
    error = MulticlassCalibrationError(7, n_bins=15, norm="l1")(logits.softmax(dim=1), labels)
    assert report.calibration_error == pytest.approx(float(error), abs=1e-5)
    assert report.class_accuracy[:6].tolist() == pytest.approx((expected.diagonal() / expected.sum(1))[:6].tolist())
    assert torch.isnan(report.class_accuracy[6])
    assert report.mean_class_accuracy == pytest.approx(float(report.class_accuracy[:6].mean()))
    assert counts.compute() == {}


def test_perfect_and_certain_predictions():
    counts = ClassScores()
    counts.add({"a": 100 * torch.eye(3)}, {"a": torch.arange(3)})
    report = counts.compute()["a"]
    assert (report.top5, report.calibration_error, report.mean_class_accuracy) == (1.0, 0.0, 1.0)
    counts.add({"a": torch.zeros(4, 2)}, {"a": torch.tensor([0, 0, 1, 1])})
    assert counts.compute()["a"].calibration_error == pytest.approx(0.0)  # confidence one half, accuracy one half


def test_files_name_the_classes(tmp_path: Path):
    logits, labels = scores()
    counts = ClassScores()
    counts.add({"action": logits}, {"action": labels})
    report = counts.compute()["action"]
    names = class_names(["run", "say, hi", "c", "d", "e", "f"], report)
    assert names[5:] == ["f", "6"]
    picture = write_report(report, names, tmp_path, "action_val")
    assert min(Image.open(picture).size) >= 400
    rows = list(csv.DictReader((tmp_path / "classes_action_val.csv").open(newline="")))
    assert [row["class"] for row in rows] == names
    assert sum(int(row["clips"]) for row in rows) == 200
    assert float(rows[0]["accuracy"]) == pytest.approx(float(report.class_accuracy[0]))
    assert rows[6]["accuracy"] == ""
    wrong = report.confusion[1].clone()
    wrong[1] = 0
    assert table(report, names)[1][3] == names[int(wrong.argmax())]


def test_many_classes_are_drawn(tmp_path: Path):
    counts = ClassScores()
    counts.add({"a": torch.randn(500, 400)}, {"a": torch.randint(0, 400, (500,))})
    report = counts.compute()["a"]
    assert write_report(report, class_names((), report), tmp_path, "a").is_file()


def test_a_run_has_the_files_of_its_final_validation(tmp_path: Path):
    from trained_classifier import trained

    run = trained(tmp_path)
    assert {file.name for file in (run / "media").iterdir()} >= {"confusion_class_val.png", "classes_class_val.csv"}
    rows = list(csv.DictReader((run / "media" / "classes_class_val.csv").open(newline="")))
    assert [(row["class"], row["clips"]) for row in rows] == [("bright", "2"), ("dark", "2")]
    assert "<figcaption>confusion_class_val</figcaption>" in (run / "report.html").read_text()


def test_other_tasks_write_nothing(tmp_path: Path):
    class Other:
        is_global_zero, default_root_dir = True, tmp_path

    ClassReports()._write(Other(), Other(), "val")
    assert list(tmp_path.iterdir()) == []
