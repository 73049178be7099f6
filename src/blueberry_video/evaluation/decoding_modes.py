"""Comparison of the decodings of a frame generator of moving shapes, at the end of a run."""

import math
import time
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import torch
from lightning import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback

from blueberry_video.evaluation.end_of_run import evaluate_at_end
from blueberry_video.evaluation.generated_shapes import GeneratedShapes
from blueberry_video.evaluation.shape_metrics import accuracies, caption_labels, nearest_psnr


class Decoding(Protocol):
    """Settings of a decoding, such as :class:`blueberry_video.inference.frame_generation.FrameDecoding`."""

    def evaluations(self, tokens: int) -> int: ...


class Clips(Protocol):
    """Dataset of clips with ``video`` and ``caption``."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> dict: ...


class DecodingModes(Callback):
    """Generates clips of moving shapes for all captions with several decodings.

    Logs for each decoding ``decoding/<name>_colour``, ``_shape`` and ``_direction``, the shares of clips that match
    their caption; ``_psnr``, the mean PSNR in dB to the most similar real clip of the caption; ``_evaluations``, the
    number of token evaluations per frame; and ``_ms``, the CPU time per frame and clip in milliseconds, summed over
    threads. ``decoding/coded_psnr`` is the PSNR of real clips after the tokenizer, an upper limit.

    Args:
        decodings: settings by name; ``task.decoding`` is set to each, and restored.
        shapes: sampling of the clips.
        real: datasets of all real clips of 16 x 16 pixels; the last ones are those after the tokenizer.

    Raises:
        ValueError: for no decodings.
    """

    def __init__(self, decodings: Mapping[str, Decoding], shapes: GeneratedShapes, real: Sequence[Clips]):
        if not decodings:
            raise ValueError("callbacks.decoding.decodings is empty: name at least one decoding.")
        self.decodings, self.shapes, self.real = dict(decodings), shapes, list(real)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        evaluate_at_end(trainer, "decoding", lambda: self.measure(pl_module))

    @torch.no_grad()
    def measure(self, task: Any) -> dict[str, float]:
        """Returns the metrics without their prefix, of a task with ``decoding``, ``generate`` and ``tokenizer``."""
        clips = [dataset[index] for dataset in self.real for index in range(len(dataset))]
        real = torch.stack([clip["video"] for clip in clips]).transpose(1, 2).float() / 127.5 - 1
        captions = [clip["caption"] for clip in clips]
        last = real[-len(self.real[-1]) :]
        coded = torch.cat([task.tokenizer.decode_ids(task.tokenizer.encode_ids(part)) for part in last.split(64)])
        metrics = {"coded_psnr": nearest_psnr(coded, captions[-len(last) :], real, captions).mean().item()}
        before = task.decoding
        for name, decoding in self.decodings.items():
            task.decoding = decoding
            start = time.process_time()
            video, wanted = self.shapes.generate(task)
            frames = len(video) * task.tokenizer.grid(*video.shape[2:])[0]
            metrics[f"{name}_ms"] = 1e3 * (time.process_time() - start) / frames
            metrics |= {f"{name}_{label}": share for label, share in accuracies(video, caption_labels(wanted)).items()}
            metrics[f"{name}_psnr"] = nearest_psnr(video, wanted, real, captions).mean().item()
            metrics[f"{name}_evaluations"] = decoding.evaluations(math.prod(task.model.grid))
        task.decoding = before
        return metrics
