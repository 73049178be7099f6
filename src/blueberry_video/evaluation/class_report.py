"""Confusion matrix, accuracy per class, top-5 accuracy and calibration of a classifier."""

import csv
import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from lightning import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.loggers import WandbLogger
from matplotlib.figure import Figure
from torch import Tensor

from blueberry_video.atomic import write_bytes, write_text

BINS = 15  # of the calibration error
SHOWN = 40  # classes up to which a picture of a confusion matrix names each


class ClassReport(NamedTuple):
    """Result of a classifier on a set of clips.

    Attributes:
        confusion: number of clips, long (classes, classes): true class, predicted class.
        top5: share of clips with the true class among the five most probable.
        calibration_error: expected calibration error (arXiv 1706.04599) with 15 bins of equal width: mean absolute
            difference between the probability of the predicted class and the accuracy, in [0, 1].
    """

    confusion: Tensor
    top5: float
    calibration_error: float

    @property
    def class_accuracy(self) -> Tensor:
        """Share of the clips of each class that are predicted correctly, float64 (classes,); NaN without clips."""
        return self.confusion.diagonal().double() / self.confusion.sum(dim=1)

    @property
    def mean_class_accuracy(self) -> float:
        """Mean of :attr:`class_accuracy` over the classes that occur."""
        return float(self.class_accuracy.nanmean())


class ClassScores:
    """Counts of predictions per label, over batches and processes."""

    def __init__(self) -> None:
        self._counts: dict[str, Tensor] = {}  # confusion, then top-5 hits, and for each bin clips, hits, confidences

    def add(self, logits: Mapping[str, Tensor], labels: Mapping[str, Tensor]) -> None:
        """Adds a batch: ``logits`` label -> (N, classes), ``labels`` label -> (N,)."""
        for name, scores in logits.items():
            truth, classes = labels[name], scores.shape[1]
            confidence, predicted = scores.double().softmax(dim=1).max(dim=1)
            pairs = (truth * classes + predicted).bincount(minlength=classes * classes)
            hits = predicted == truth
            among = (scores.topk(min(5, classes), dim=1).indices == truth[:, None]).any(dim=1)
            bins = (confidence * BINS).ceil().long().clamp(1, BINS) - 1
            sums = [torch.zeros(BINS, dtype=torch.double, device=scores.device) for _ in range(3)]
            for total, values in zip(sums, (torch.ones_like(confidence), hits.double(), confidence), strict=True):
                total.index_add_(0, bins, values)
            counts = torch.cat([pairs.double(), among.sum().double()[None], *sums]).cpu()
            self._counts[name] = self._counts[name] + counts if name in self._counts else counts

    def compute(self) -> dict[str, ClassReport]:
        """Returns label -> report over the clips of all processes, and resets; all processes must call it."""
        gathered, self._counts = [self._counts], {}
        if dist.is_available() and dist.is_initialized():
            gathered = gathered * dist.get_world_size()
            dist.all_gather_object(gathered, gathered[0])
        reports = {}
        for name in next((counts for counts in gathered if counts), {}):
            total = torch.stack([counts[name] for counts in gathered if name in counts]).sum(dim=0)
            classes = round((len(total) - 1 - 3 * BINS) ** 0.5)
            confusion = total[: classes * classes].view(classes, classes).long()
            clips, hits, confidences = total[classes * classes + 1 :].view(3, BINS)
            error = (hits - confidences).abs().sum() / clips.sum()
            reports[name] = ClassReport(confusion, float(total[classes * classes] / clips.sum()), float(error))
        return reports


class ClassReports(Callback):
    """Writes the confusion matrix and the accuracy per class of the final validation and test.

    Writes ``media/confusion_<label>_<stage>.png`` and ``media/classes_<label>_<stage>.csv``, with the number of clips
    and the accuracy of each class, and logs both to wandb. Tasks without class reports write nothing.
    """

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.state.fn == "validate":
            self._write(trainer, pl_module, "val")

    def on_test_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._write(trainer, pl_module, "test")

    def _write(self, trainer: Trainer, task: Any, stage: str) -> None:
        reports: Mapping[str, ClassReport] = getattr(task, "class_reports", {})
        if not trainer.is_global_zero or not reports:
            return
        classes = getattr(trainer, "datamodule").classes  # noqa: B009  an attribute that Lightning adds
        folder = Path(trainer.default_root_dir) / "media"
        folder.mkdir(exist_ok=True)
        for label, report in reports.items():
            names = class_names(classes.get(label, ()), report)
            picture = write_report(report, names, folder, f"{label}_{stage}")
            for logger in trainer.loggers:
                if isinstance(logger, WandbLogger):
                    logger.log_image(f"media/confusion_{label}_{stage}", [str(picture)])
                    rows = [list(row) for row in table(report, names)]
                    logger.log_table(f"classes_{label}_{stage}", columns=list(COLUMNS), data=rows)


COLUMNS = ("class", "clips", "accuracy", "confused_with")


def class_names(names: Sequence[str], report: ClassReport) -> list[str]:
    """Returns the names of the classes of a report; numbers for those without a name."""
    return [names[i] if i < len(names) else str(i) for i in range(len(report.confusion))]


def table(report: ClassReport, names: Sequence[str]) -> list[tuple[str, int, float | None, str]]:
    """Returns a row per class: name, clips, accuracy (``None`` without clips), and the most frequent wrong class."""
    rows = []
    for number, (counts, share) in enumerate(zip(report.confusion, report.class_accuracy.tolist(), strict=True)):
        wrong = counts.clone()
        wrong[number] = 0
        worst = names[int(wrong.argmax())] if wrong.any() else ""
        rows.append((names[number], int(counts.sum()), share if counts.any() else None, worst))
    return rows


def write_report(report: ClassReport, names: Sequence[str], folder: Path, stem: str) -> Path:
    """Writes ``classes_<stem>.csv`` and ``confusion_<stem>.png``; returns the path of the picture."""
    text = io.StringIO(newline="")
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(COLUMNS)
    writer.writerows(table(report, names))
    write_text(folder / f"classes_{stem}.csv", text.getvalue())
    file = folder / f"confusion_{stem}.png"
    write_bytes(file, confusion_picture(report, names))
    return file


def confusion_picture(report: ClassReport, names: Sequence[str]) -> bytes:
    """Draws a confusion matrix as PNG: shares of the clips of each true class, and counts where there is space."""
    count = len(report.confusion)
    side = max(4.0, min(14.0, 1.5 + 0.45 * count))
    figure = Figure(figsize=(side + 1, side), dpi=100, layout="constrained")
    axes = figure.add_subplot()
    shares = report.confusion.double() / report.confusion.sum(dim=1, keepdim=True).clamp(min=1)
    image = axes.imshow(shares.numpy(), vmin=0, vmax=1, cmap="Blues")
    figure.colorbar(image, ax=axes, fraction=0.045, label="share of the true class")
    axes.set(xlabel="predicted", ylabel="true", title=f"accuracy per class {report.mean_class_accuracy:.3f}")
    if count <= SHOWN:
        axes.set_xticks(range(count), names, rotation=90)
        axes.set_yticks(range(count), names)
    if count <= 20:
        for row in range(count):
            for column in range(count):
                color = "white" if shares[row, column] > 0.5 else "black"
                number = int(report.confusion[row, column])
                axes.text(column, row, str(number), ha="center", va="center", color=color, fontsize=8)
    data = io.BytesIO()
    figure.savefig(data, format="png")
    return data.getvalue()
