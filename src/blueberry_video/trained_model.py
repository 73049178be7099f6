"""Trained runs as models, with the preprocessing of their run.

    from blueberry_video import load_run
    model = load_run("outputs/my_idea")
    model("clip.mp4")                # outputs of the task, such as {"motion": probabilities (1, classes)}
    model.predict("clip.mp4")        # {"motion": {"left": 0.98, "right": 0.02}}

Both read videos as the validation of the run did.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from blueberry_video.data.clip_reader import ClipReader, name_of
from blueberry_video.evaluation.reconstruction import psnr
from blueberry_video.experiment.trained import TrainedRun, load_trained
from blueberry_video.tasks import generation, prediction
from blueberry_video.tasks.clip_format import DEFAULT_FPS, ClipFormat
from blueberry_video.tasks.requests import Request
from blueberry_video.video.decode import Frames

Probabilities = dict[str, dict[str, float]]


class TrainedModel(ClipReader):
    """Model of a run that reads videos as the validation of the run did.

    Args:
        run: the opened run.

    Attributes:
        path: run folder.
        checkpoint: name of the file of the weights.
        task: the task, in evaluation mode; ``task.model`` is the network.
        clips: format of the clips.
        classes: label -> class names.
        device: device of the task.
    """

    def __init__(self, run: TrainedRun):
        self.path, self.task, self.checkpoint = run.path, run.task, run.checkpoint.name
        self.clips = ClipFormat.of_run(run)
        self.sampling, self.resize, self.decoding = self.clips.sampling, self.clips.resize, self.clips.decoding
        self.classes = self.clips.classes

    @property
    def origin(self) -> str:
        """Path of the run and name of the checkpoint."""
        return f"{self.path.resolve()} ({self.checkpoint})"

    @property
    def device(self) -> torch.device:
        return self.task.device

    @property
    def dtype(self) -> torch.dtype:
        return self.task.dtype

    @torch.no_grad()
    def encode(self, clips: Sequence[Frames]) -> Tensor:
        return prediction.features(self.task, self.batch(clips, ["clip"] * len(clips)))

    def patches(self, height: int, width: int) -> tuple[int, int]:
        encoder = prediction.encoder_of(self.task)
        return encoder.grid((encoder.patch_size[0], height, width))[1:]

    def __call__(self, *sources: Any) -> dict[str, Tensor]:
        """Returns the outputs of the task for one clip of each of B videos; see
        :func:`~blueberry_video.tasks.prediction.predict`.

        Args:
            sources: B videos, see :meth:`read`.
        """
        clips = [self.read(source)[0] for source in sources]
        return prediction.predict(self.task, self.batch(clips, [name_of(source) for source in sources]))

    def predict(self, source: Any, start: float | None = None, end: float | None = None) -> Probabilities:
        """Returns label -> class name -> probability, averaged over the views of validation, most probable first.

        Args:
            source, start, end: see :meth:`read`.

        Raises:
            ValueError: the run is not one of a classifier.
        """
        return self.over(source, lambda duration: [(start, end)], self.probabilities, views=None)[0]

    def probabilities(self, clips: Sequence[Frames]) -> Probabilities:
        """Returns label -> class name -> probability, the mean over clips and time steps, most probable first."""
        return self.named(prediction.predict(self.task, self.batch(clips, ["clip"] * len(clips))))

    def named(self, outputs: Mapping[str, Tensor]) -> Probabilities:
        """Returns :meth:`probabilities` of the outputs of clips."""
        heads: Mapping[str, int] = getattr(self.task.model, "num_classes", {})
        if not heads:
            raise ValueError(
                f"{self.path} trained a {type(self.task).__name__}, which predicts no labels: use model(video) for its "
                "outputs."
            )
        found = {}
        for label in heads:
            means = outputs[label].flatten(0, -2).double().mean(dim=0).tolist()
            names = self.classes.get(label) or [str(index) for index in range(len(means))]
            found[label] = dict(sorted(zip(names, means, strict=True), key=lambda pair: -pair[1]))
        return found

    def reconstruct(
        self, source: Any, start: float | None = None, end: float | None = None
    ) -> tuple[list[Tensor], float, dict[str, Any]]:
        """Reconstructs a clip of a video.

        Args:
            source, start, end: see :meth:`read`.

        Returns:
            The clip, for masked autoencoders its visible patches, and the reconstruction, each (1, 3, T, H, W) in
            [0, 1]; the frame rate; ``frames``, ``psnr`` in dB, and for masked autoencoders ``psnr_masked``, that of the
            masked patches.

        Raises:
            ValueError: the run does not reconstruct videos.
        """
        if not isinstance(self.task, prediction.RECONSTRUCTS):
            kinds = ", ".join(kind.__name__ for kind in prediction.RECONSTRUCTS)
            raise ValueError(f"{self.path} trained a {type(self.task).__name__}: reconstruction requires {kinds}.")
        clip = self.read(source, start, end)[0]
        batch = self.batch([clip], [name_of(source)])
        outputs, real = prediction.predict(self.task, batch), batch["video"]
        made, seconds = outputs["reconstruction"], float(clip.timestamps[-1] - clip.timestamps[0])
        row: dict[str, Any] = {"frames": real.shape[2], "psnr": float(psnr(made * 2 - 1, real * 2 - 1))}
        panels = [real, made]
        if (visible := outputs.get("visible")) is not None:
            hidden = visible == 0
            row["psnr_masked"] = float(psnr(*(part[hidden].view(1, 1, -1, 1, 1) * 2 - 1 for part in (made, real))))
            panels = [real, real * visible, made]
        return panels, (real.shape[2] - 1) / seconds if seconds > 0 else self.clips.fps or DEFAULT_FPS, row

    def generate(self, request: Request) -> Tensor:
        """Returns generated videos (B, 3, T, H, W) in [0, 1]."""
        return (torch.cat(list(generation.prepare(self.task, self.clips, request).parts), dim=2).float() + 1) / 2


def load_run(run: str | Path, device: torch.device | str | None = None, best: bool = False) -> TrainedModel:
    """Opens a trained run for inference, with the EMA weights if it has them.

    Args:
        run: a run folder, or the folder of an experiment: its newest run.
        device: ``None`` for the GPU if there is one.
        best: use the weights of the best validation, which a run saves with ``callbacks.best.monitor``.

    Raises:
        FileNotFoundError: there is no run, or it has no valid checkpoint.
        ValueError: its config or weights are not valid.
    """
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    return TrainedModel(load_trained(run, device=device, best=best))
