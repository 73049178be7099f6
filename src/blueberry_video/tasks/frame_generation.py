"""Training of a token generator by complete teacher forcing (arXiv 2501.12389): masked frames after clean frames."""

import math
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from blueberry_video.diffusion.conditioning import captions_of
from blueberry_video.diffusion.frozen import Frozen
from blueberry_video.inference.frame_generation import FrameDecoding, Generators, generate_clips
from blueberry_video.masking import corrupt_frames
from blueberry_video.models.hydra_video.generator import Conditioning, HydraVideoGenerator
from blueberry_video.models.text_encoder.words import WordText
from blueberry_video.tasks.base import Task
from blueberry_video.tasks.frame_conditions import check_tokenizer, conditioning_of
from blueberry_video.tasks.settings import ClipInput, Optimization


class FrameGeneration(Task):
    """Trains a generator of video tokens.

    Clips are pixels, which a frozen tokenizer encodes, or stored ``tokens`` (t, h, w). Tokens are corrupted by
    :func:`~blueberry_video.masking.corrupt_frames`. Logs ``loss``, the cross-entropy in nats. In validation, where the
    corruption of a clip is the same in every epoch and run, also the accuracy on masked tokens, ``accuracy``, and after
    the first frame, ``accuracy_later``; the baselines ``accuracy_copy``, the token at the same position of the previous
    frame, for the same tokens as ``accuracy_later``, and ``accuracy_frequent``, the share of the most frequent code;
    and, with conditioning, ``loss_unconditional``.

    Args:
        model, optimization, input: see :class:`~blueberry_video.tasks.base.Task`.
        tokenizer: frozen tokenizer of videos with ``encode_ids``, ``decode_ids``, ``vocabulary`` and ``grid``, or a
            function that builds it, called when the run begins. ``None``: clips have ``tokens``, and :meth:`media` is
            empty.
        decoding: settings of :meth:`generate`; ``None`` for the defaults.
        substitute: share of visible tokens that are replaced by random codes.
        visible_weight: loss weight of each visible token; that of a masked token is 1.
        condition_dropout: share of training clips without conditioning, for classifier-free guidance.
        prompt_frames: frames of tokens that the continued clips of :meth:`media` begin with.
        num_pictures: largest number of clips in :meth:`media`.

    Raises:
        ValueError: for a share outside [0, 1] or a negative weight; when a run begins: a tokenizer of a different
            vocabulary or grid, or clips of a size that it rejects; in a step: clips without the tokens, labels,
            captions or actions of the model, or with a number of actions that does not fit.
    """

    trains = HydraVideoGenerator
    normalizes = False
    model: HydraVideoGenerator

    def __init__(
        self,
        model: HydraVideoGenerator,
        optimization: Optimization,
        input: ClipInput | None = None,
        tokenizer: nn.Module | Callable[[], nn.Module] | None = None,
        decoding: FrameDecoding | None = None,
        substitute: float = 0.1,
        visible_weight: float = 1.0,
        condition_dropout: float = 0.1,
        prompt_frames: int = 1,
        num_pictures: int = 6,
    ):
        super().__init__(model, optimization, input)
        for key, value in (("substitute", substitute), ("condition_dropout", condition_dropout)):
            if not 0 <= value <= 1:
                raise ValueError(f"task.{key}={value} must be in [0, 1].")
        for key, value, least in (("visible_weight", visible_weight, 0), ("prompt_frames", prompt_frames, 1)):
            if value < least:
                raise ValueError(f"task.{key}={value} must be at least {least}.")
        self._tokenizer = None if tokenizer is None else Frozen[nn.Module](tokenizer)
        self.decoding = decoding or FrameDecoding()
        self.substitute, self.visible_weight, self.condition_dropout = substitute, visible_weight, condition_dropout
        self.prompt_frames, self.num_pictures = prompt_frames, num_pictures
        self._code_counts = torch.zeros(model.vocabulary, dtype=torch.long)  # of the running validation epoch

    @property
    def tokenizer(self) -> Any:
        """The tokenizer, built on first use."""
        if self._tokenizer is None:
            raise ValueError("task.tokenizer=null requires clips with `tokens`: choose a tokenizer for pixels.")
        return self._tokenizer.get()

    def setup(self, stage: str) -> None:
        data: Any = self.trainer.datamodule  # type: ignore[attr-defined]
        if isinstance(text := self.model.text, WordText):
            text.learn(captions_of(data.train))
        if self._tokenizer is not None:
            check_tokenizer(self.tokenizer, self.model, data.val[0]["video"].shape)
        super().setup(stage)

    def on_fit_start(self) -> None:
        """Moves the tokenizer to the device of the run, which is no submodule."""
        if self._tokenizer is not None:
            self._tokenizer.get().to(self.trainer.strategy.root_device)

    on_validation_start = on_test_start = on_fit_start

    def on_after_batch_transfer(self, batch: dict, dataloader_idx: int) -> dict:
        """Converts pixels as in :class:`Task`; for stored tokens, ``video`` is the tokens (B, 1, t, h, w)."""
        if "tokens" in batch:
            return {**batch, "video": batch["tokens"][:, None]}
        return super().on_after_batch_transfer(batch, dataloader_idx)

    def shared_step(self, batch: dict, stage: str) -> dict[str, Tensor]:
        ids, train = self.tokens_of(batch), stage == "train"
        seeds = [] if train else [zlib.crc32(name.encode()) for name in batch["id"]]
        generators = None if train else [torch.Generator().manual_seed(seed) for seed in seeds]
        corrupted, masked = corrupt_frames(ids, self.model.vocabulary, self.substitute, generators)
        conditioning = conditioning_of(self.model, batch, ids.shape[1])
        if train:
            drop = torch.rand(len(ids)) < self.condition_dropout
            conditioning = conditioning._replace(drop=drop.to(ids.device))
        logits = self.model.teacher_forced(ids, corrupted, conditioning).float()
        values = {"loss": self._loss(logits, ids, masked)}
        if train:
            return values
        self._code_counts += ids.flatten().bincount(minlength=self.model.vocabulary).cpu()
        correct, later = logits.argmax(-1) == ids, masked[:, 1:]
        values["accuracy"] = correct[masked].float()
        if ids.shape[1] > 1:
            values["accuracy_later"] = correct[:, 1:][later].float()
            values["accuracy_copy"] = (ids[:, :-1] == ids[:, 1:])[later].float()
        if any(condition is not None for condition in conditioning):
            dropped = conditioning._replace(drop=torch.ones(len(ids), dtype=torch.bool, device=ids.device))
            unconditional = self.model.teacher_forced(ids, corrupted, dropped).float()
            values["loss_unconditional"] = self._loss(unconditional, ids, masked)
        return values

    def epoch_metrics(self, means: dict[str, Tensor]) -> dict[str, Tensor]:
        counts = self.trainer.strategy.reduce(self._code_counts.to(self.device), reduce_op="sum")
        self._code_counts = torch.zeros_like(self._code_counts)
        return {"accuracy_frequent": counts.max() / counts.sum()}

    def tokens_of(self, batch: dict) -> Tensor:
        """Tokens (B, t, h, w) of a batch: the stored ones, or those of the tokenizer."""
        return batch["tokens"] if "tokens" in batch else self.tokenizer.encode_ids(batch["video"] * 2 - 1)

    def generate(self, captions: Sequence[str], generator: Generators = None) -> Tensor:
        """Generates videos (B, 3, T, H, W) in [-1, 1] from captions, with as many frames as the validation clips."""
        video = self.trainer.datamodule.val[0]["video"]  # type: ignore[attr-defined]
        frames = self.tokenizer.grid(len(video), *video.shape[2:])[0]
        return self.tokenizer.decode_ids(self.generate_ids(Conditioning(text=list(captions)), frames, generator))

    def generate_ids(
        self,
        conditioning: Conditioning,
        num_frames: int,
        generator: Generators = None,
        prompt: Tensor | None = None,
        num_clips: int | None = None,
    ) -> Tensor:
        """Generates tokens (B, num_frames, h, w) with ``decoding``; see :func:`.generate_clips`."""
        return generate_clips(self.model, conditioning, num_frames, self.decoding, prompt, generator, num_clips)

    @torch.no_grad()
    def media(self, batch: dict) -> dict[str, Tensor]:
        """One row per clip, of a fixed seed: ``generated`` has the clip, its reconstruction by the tokenizer, and a
        clip generated with the same conditioning; ``continued`` the clip, and its first tokens continued."""
        if self._tokenizer is None or "tokens" in batch:
            return {}
        count = self.num_pictures
        real, ids = batch["video"][:count], self.tokens_of(batch)[:count]
        conditioning = conditioning_of(self.model, batch, ids.shape[1]).first(count)
        made = self.generate_ids(conditioning, ids.shape[1], torch.Generator().manual_seed(0), None, len(ids))
        columns = {"generated": [ids, made]}
        if ids.shape[1] > self.prompt_frames:
            prompt, generator = ids[:, : self.prompt_frames], torch.Generator().manual_seed(0)
            columns["continued"] = [self.generate_ids(conditioning, ids.shape[1], generator, prompt)]
        decode = self.tokenizer.decode_ids
        return {
            name: self.panels([real, *((decode(part).float() + 1) / 2 for part in parts)])
            for name, parts in columns.items()
        }

    def tokens_per_clip(self, batch: dict) -> int:
        """Number of tokens of a clip, over all its repeats; each is evaluated twice, clean and corrupted."""
        size = batch["video"].shape[2:]
        return math.prod(size if "tokens" in batch else self.tokenizer.grid(*size)) * self._times(batch)

    def load_weights(self, path: str | Path) -> str:
        return self.model.load_published(path)

    def _loss(self, logits: Tensor, ids: Tensor, masked: Tensor) -> Tensor:
        """Weighted mean of the cross-entropy of logits (B, t, h, w, V)."""
        weight = torch.where(masked, 1.0, self.visible_weight)
        losses = F.cross_entropy(logits.flatten(0, -2), ids.flatten(), reduction="none").view_as(weight)
        return (losses * weight).sum() / weight.sum()

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "FrameGeneration":
        super()._apply(fn, recurse)
        if self._tokenizer is not None:
            self._tokenizer.apply(fn)
        return self
