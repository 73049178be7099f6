"""Training of text- and image-to-video diffusion: CogVideoX (arXiv 2408.06072), HunyuanVideo (arXiv 2412.03603), and
Diffusion Forcing (arXiv 2407.01392), which gives every frame a time of its own.
"""

import math
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from lightning.pytorch.utilities import rank_zero_only
from torch import Tensor, nn
from torch.optim import Optimizer

from blueberry_video.diffusion import conditioning
from blueberry_video.diffusion.generation import conditioned, generate
from blueberry_video.diffusion.guidance import Guidance
from blueberry_video.diffusion.image_noise import ImageNoise
from blueberry_video.diffusion.objectives import Objective
from blueberry_video.diffusion.samplers import Sampler
from blueberry_video.diffusion.text_to_video import TextToVideo
from blueberry_video.diffusion.timesteps import TimestepSampler
from blueberry_video.evaluation.denoising import denoising_losses
from blueberry_video.models.text_encoder.base import TextTokens
from blueberry_video.models.text_encoder.words import WordText
from blueberry_video.nn.noise import standard_normal
from blueberry_video.tasks.base import Task


class Diffusion(Task):
    """Trains a transformer to tell noise from clips.

    Clips come with pixels, or as the moments of their latents (``data=latents``), and each has a caption. Logs ``loss``
    and, in validation, where times and noise are the same in every epoch and run, everything that
    :func:`~blueberry_video.evaluation.denoising.denoising_losses` tells.

    Args:
        model, optimizer, schedule, augment, lr_batch_size, repeats, image_repeats: see
            :class:`~blueberry_video.tasks.base.Task`.
        objective: what noise is added, and what the network says of it.
        times: draws the times of training.
        sampler, guidance: for :meth:`generate`.
        caption_dropout: share of the clips that are trained without their caption, for guidance.
        image_noise: put on the first frame that an image-to-video network is given in training, not in validation.
        image_dropout: share of the training clips that it is not given; validation has all, but with 1, which trains
            HunyuanVideo-1.5 on text alone. ``None``: as published.
        frame_times: every frame has a time of its own: Diffusion Forcing.
        prompts: captions of the clips that :meth:`media` shows; ``None`` for those of the first validation clips.
        num_pictures: the largest number of clips it shows.

    Raises:
        ValueError: for a share outside [0, 1], a causal network without ``frame_times``, or those and ``stratified``
            times; when a run begins: clips of a size that autoencoder or network cannot take, latents of a different
            autoencoder or without that of the image, or those and ``image_noise``; in a step: a clip without caption,
            or with latents that are NaN.
    """

    trains = TextToVideo
    model: TextToVideo

    def __init__(
        self,
        model: TextToVideo,
        optimizer: Callable[[list[dict]], Optimizer],
        schedule: Callable[[int, int], float],
        objective: Objective,
        times: TimestepSampler,
        sampler: Sampler,
        guidance: Guidance,
        augment: nn.Module | None = None,
        lr_batch_size: int | None = None,
        repeats: int = 1,
        image_repeats: int = 1,
        caption_dropout: float = 0.1,
        image_noise: ImageNoise | None = None,
        image_dropout: float | None = None,
        frame_times: bool = False,
        prompts: Sequence[str] | None = None,
        num_pictures: int = 6,
    ):
        super().__init__(
            model,
            optimizer,
            schedule,
            augment,
            lr_batch_size=lr_batch_size,
            repeats=repeats,
            image_repeats=image_repeats,
        )
        image_dropout = model.shape.image_dropout if image_dropout is None else image_dropout
        conditioning.check_settings(model, caption_dropout, image_dropout, times if frame_times else None)
        self.objective, self.times, self.sampler, self.guidance = objective, times, sampler, guidance
        self.caption_dropout, self.image_dropout, self.image_noise = caption_dropout, image_dropout, image_noise
        self.frame_times = frame_times
        self.prompts, self.num_pictures = None if prompts is None else list(prompts), num_pictures
        self._latent_size: tuple[int, int, int] | None = None
        self._spare_captions: list[dict] = []

    def setup(self, stage: str) -> None:
        self.model.prepare()
        data: Any = self.trainer.datamodule  # type: ignore[attr-defined]
        if isinstance(text := self.model.text, WordText):
            text.learn(conditioning.captions_of(data.train))
        clip = data.val[0]
        self._latent_size = conditioning.latent_size(data, clip, self.model)
        if conditioning.takes_image(self.model, self.image_dropout):
            conditioning.check_image(self.model, self._latent_size[0], clip, self.image_noise)
        self._spare_captions = conditioning.different_captions(data.val)
        if stage == "fit" and self.model.lora is not None and self.model.lora.base is not None:
            rank_zero_only(print)(self.load_weights(self.model.lora.base))  # before init_from: adapters of another run
        super().setup(stage)

    def on_fit_start(self) -> None:
        """Moves what is frozen to the device of the run: not all strategies do, as FSDP moves the network alone."""
        self.model.prepare(self.trainer.strategy.root_device)

    on_validation_start = on_test_start = on_fit_start

    def on_after_batch_transfer(self, batch: dict, dataloader_idx: int) -> dict:
        """As other tasks; of stored latents, ``video`` is their moments (B, 2C, t, h, w)."""
        if "moments" in batch:
            return {**batch, "video": batch["moments"]}
        return super().on_after_batch_transfer(batch, dataloader_idx)

    def shared_step(self, batch: dict, stage: str) -> dict[str, Tensor]:
        seed = zlib.crc32("/".join(batch["id"]).encode())
        train = stage == "train"
        generator = None if train else torch.Generator().manual_seed(seed)  # validation is always the same
        noise_on_image = self.image_noise if train else None
        clean, image = conditioning.latents_of(self.model, batch, generator, noise_on_image, self.image_dropout)
        shown = conditioning.draw_image_mask(image, self.image_dropout) if train else None
        text, given = conditioning.text_of(self.model, batch), conditioning.num_conditioning_frames(self.model, image)

        def ask(noisy: Tensor, t: Tensor, told: TextTokens) -> Tensor:
            return conditioned(self.model, told, self.objective, image, self.guidance.embedded, shown)(noisy, t)

        def ask_rest(noisy: Tensor, t: Tensor, told: TextTokens) -> Tensor:
            return ask(F.pad(noisy, (0, 0, 0, 0, given, 0)), t, told)[:, :, given:]

        if generator is not None:  # frames that are given are neither noised nor judged
            others = conditioning.mismatched_text(self.model, batch, text, self._spare_captions)
            return denoising_losses(ask_rest, self.objective, clean[:, :, given:], text, others, generator)
        t, noise = self._times_of(clean), standard_normal(clean.shape, None, clean.device)
        text = conditioning.drop_captions(self.model, text, self.caption_dropout)
        output = ask(self.objective.noisy(clean, noise, t), t, text).float()
        error = output - self.objective.target(clean, noise, t)
        return {"loss": error[:, :, given:].square().mean()}

    def generate(
        self, captions: Sequence[str], generator: torch.Generator | None = None, images: Tensor | None = None
    ) -> Tensor:
        """Videos (B, 3, T, H, W) in [-1, 1] of captions, as long as the validation clips, in evaluation mode.

        ``generator``: of all noise, on the CPU. ``images``: (B, 3, 1, H, W) in [-1, 1], with which videos of their
        size begin, of an image-to-video network; without them videos are as large as the validation clips.
        """
        assert self._latent_size is not None, "setup runs first"
        was_training, model, size = self.model.training, self.model.eval(), self._latent_size
        try:
            return generate(model, captions, size, self.sampler, self.guidance, self.objective, images, generator)
        finally:
            model.train(was_training)

    def media(self, batch: dict) -> dict[str, Tensor]:
        """A row a prompt, always of the same noise: ``samples`` of the prompts alone, and ``samples_from_image`` that
        begin as the clips of the batch; a network has the one or the other, and HunyuanVideo-1.5 both."""
        model, made = self.model, dict[str, Tensor]()
        if model.text is None or model.autoencoder is None:
            return made
        prompts = (self.prompts or batch["caption"])[: self.num_pictures]
        if model.shape.image_condition in (None, "optional"):
            made["samples"] = self.generate(prompts, torch.Generator().manual_seed(0))
        if conditioning.takes_image(model, self.image_dropout):
            images = conditioning.first_frames(model, batch, torch.Generator().manual_seed(0))[: len(prompts)]
            generator = torch.Generator().manual_seed(0)
            made["samples_from_image"] = self.generate(prompts[: len(images)], generator, images)
        return {name: self.panels([(video.float() + 1) / 2]) for name, video in made.items()}

    def tokens_per_clip(self, batch: dict) -> int:
        """Tokens of the video; those of the text do not count."""
        size, autoencoder = batch["video"].shape[2:], self.model.autoencoder
        if "moments" not in batch and autoencoder is not None:
            size = autoencoder.grid(*size)
        return math.prod(-(-n // patch) for n, patch in zip(size, self.model.shape.patch_size)) * self._times(batch)

    def load_weights(self, path: str | Path) -> str:
        return self.model.load_published(path)

    def _times_of(self, clean: Tensor) -> Tensor:
        t, h, w = (size // patch for size, patch in zip(clean.shape[2:], self.model.shape.patch_size))
        frames, ranks = t if self.frame_times else None, self.trainer.world_size
        times = self.times(len(clean), frames, (t, h, w), rank=self.global_rank, world_size=ranks)
        if frames is not None:  # those of a patch have the same
            times = times.repeat_interleave(self.model.shape.patch_size[0], dim=1)
        return times.to(clean.device)
