"""Training of text- and image-to-video diffusion: CogVideoX (arXiv 2408.06072), HunyuanVideo (arXiv 2412.03603), and
Diffusion Forcing (arXiv 2407.01392), with a separate timestep for every frame.
"""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from lightning.pytorch.utilities import rank_zero_only
from torch import Tensor

from blueberry_video.diffusion import conditioning
from blueberry_video.diffusion.generation import conditioned, generate
from blueberry_video.diffusion.guidance import Guidance
from blueberry_video.diffusion.image_noise import ImageNoise
from blueberry_video.diffusion.objectives import Objective
from blueberry_video.diffusion.samplers import Sampler
from blueberry_video.diffusion.text_to_video import TextToVideo
from blueberry_video.diffusion.timesteps import TimestepSampler
from blueberry_video.evaluation.denoising import denoising_losses
from blueberry_video.evaluation.reference import ReferenceClips, seeded_generators
from blueberry_video.models.text_encoder.base import TextTokens
from blueberry_video.models.text_encoder.words import WordText
from blueberry_video.nn.noise import Generator, clip_generators, standard_normal
from blueberry_video.parallel.ranks import data_rank, data_world_size
from blueberry_video.tasks.base import Task
from blueberry_video.tasks.sampling_checks import check_sampling
from blueberry_video.tasks.settings import ClipInput, Optimization


class Diffusion(Task):
    """Trains a diffusion transformer on clips with captions.

    Clips are pixels, or stored moments of their latents (``data=latents``). Logs ``loss`` and, in validation, where
    timesteps and noise of a clip depend only on its id, the metrics of
    :func:`~blueberry_video.evaluation.denoising.denoising_losses`.

    Args:
        model, optimization, input: see :class:`~blueberry_video.tasks.base.Task`.
        objective: noising process and prediction target.
        timesteps: distribution of the training timesteps.
        sampler, guidance: of :meth:`generate`.
        caption_dropout: share of training clips without caption, for classifier-free guidance.
        image_noise: noise on the conditioning image in training, not in validation.
        image_dropout: share of training clips without conditioning image; validation always has it, except at 1, which
            trains HunyuanVideo-1.5 on text only. ``None``: as published.
        frame_timesteps: draw a separate timestep for every frame (Diffusion Forcing).
        prompts: prompts of :meth:`media`; ``None`` for the captions of the first validation clips.
        num_pictures: largest number of clips in :meth:`media`.

    Raises:
        ValueError: for a share outside [0, 1], a causal network without ``frame_timesteps``, or those with
            ``stratified`` timesteps; when a run begins: clips of a size that autoencoder or network reject, or stored
            latents of a different autoencoder, without those of the image, or with ``image_noise``, a sampler that
            does not fit the objective, prompts or captions that the text encoder rejects, or no pictures; in a step: a
            clip without caption, or with latents that are NaN.
    """

    trains = TextToVideo
    normalizes = False
    model: TextToVideo

    def __init__(
        self,
        model: TextToVideo,
        optimization: Optimization,
        objective: Objective,
        timesteps: TimestepSampler,
        sampler: Sampler,
        guidance: Guidance,
        input: ClipInput | None = None,
        caption_dropout: float = 0.1,
        image_noise: ImageNoise | None = None,
        image_dropout: float | None = None,
        frame_timesteps: bool = False,
        prompts: Sequence[str] | None = None,
        num_pictures: int = 6,
    ):
        super().__init__(model, optimization, input)
        image_dropout = model.shape.image_dropout if image_dropout is None else image_dropout
        conditioning.check_settings(model, caption_dropout, image_dropout, timesteps if frame_timesteps else None)
        self.objective, self.timesteps, self.sampler, self.guidance = objective, timesteps, sampler, guidance
        self.caption_dropout, self.image_dropout, self.image_noise = caption_dropout, image_dropout, image_noise
        self.frame_timesteps = frame_timesteps
        self.prompts, self.num_pictures = None if prompts is None else list(prompts), num_pictures
        self._latent_size: tuple[int, int, int] | None = None
        self._spare_captions: list[dict] = []
        self._reference_clips = ReferenceClips()  # of which the baselines predict the mean

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
        check_sampling(self, data)

    def on_fit_start(self) -> None:
        """Moves the frozen parts to the device of the run, which are no submodules."""
        self.model.prepare(self.trainer.strategy.root_device)

    on_validation_start = on_test_start = on_fit_start

    def on_after_batch_transfer(self, batch: dict, dataloader_idx: int) -> dict:
        """Converts pixels as in :class:`Task`; for stored latents, ``video`` is their moments (B, 2C, t, h, w)."""
        if "moments" in batch:
            return {**batch, "video": batch["moments"]}
        return super().on_after_batch_transfer(batch, dataloader_idx)

    def shared_step(self, batch: dict, stage: str) -> dict[str, Tensor]:
        generator = None if stage == "train" else seeded_generators(batch)
        clean, image = self._latents(batch, stage)
        image_mask = conditioning.draw_image_mask(image, self.image_dropout) if generator is None else None
        text, known = conditioning.text_of(self.model, batch), conditioning.num_conditioning_frames(self.model, image)

        def predict(noisy: Tensor, t: Tensor, text: TextTokens) -> Tensor:
            return conditioned(self.model, text, self.objective, image, self.guidance.embedded, image_mask)(noisy, t)

        def predict_rest(noisy: Tensor, t: Tensor, text: TextTokens) -> Tensor:
            return predict(F.pad(noisy, (0, 0, 0, 0, known, 0)), t, text)[:, :, known:]

        if generator is not None:  # conditioning frames have no noise and do not count
            mismatched = conditioning.mismatched_text(self.model, batch, text, self._spare_captions)
            average = self._reference_clips.mean(self, stage, clean, lambda clip: self._latents(clip, stage)[0])
            clean, average = clean[:, :, known:], average[:, known:]
            return denoising_losses(predict_rest, self.objective, clean, text, mismatched, generator, average)
        t, noise = self._timesteps_of(clean), standard_normal(clean.shape, None, clean.device)
        text = conditioning.drop_captions(self.model, text, self.caption_dropout)
        output = predict(self.objective.noisy(clean, noise, t), t, text).float()
        error = output - self.objective.target(clean, noise, t)
        return {"loss": error[:, :, known:].square().mean()}

    def generate(self, captions: Sequence[str], generator: Generator = None, images: Tensor | None = None) -> Tensor:
        """Generates videos (B, 3, T, H, W) in [-1, 1] of captions, with the frame count of the validation clips.

        Args:
            captions: B prompts.
            generator: generator that draws the seed of each clip, or one per clip: a clip does not depend on its batch.
            images: conditioning images (B, 3, 1, H, W) in [-1, 1], which determine the size of the videos; ``None``
                for the size of the validation clips.
        """
        assert self._latent_size is not None, "setup runs first"
        if isinstance(generator, torch.Generator):
            generator = clip_generators(generator, len(captions))
        was_training, model, size = self.model.training, self.model.eval(), self._latent_size
        try:
            return generate(model, captions, size, self.sampler, self.guidance, self.objective, images, generator)
        finally:
            model.train(was_training)

    def media(self, batch: dict) -> dict[str, Tensor]:
        """Samples of a fixed seed, one row per prompt: ``samples`` of text-to-video networks, ``samples_from_image``,
        with the first frames of the batch, of image-to-video networks, and both of HunyuanVideo-1.5."""
        model, videos = self.model, dict[str, Tensor]()
        if model.text is None or model.autoencoder is None:
            return videos
        prompts = (self.prompts or batch["caption"])[: self.num_pictures]
        if model.shape.image_condition in (None, "optional"):
            videos["samples"] = self.generate(prompts, torch.Generator().manual_seed(0))
        if conditioning.takes_image(model, self.image_dropout):
            seeds = clip_generators(torch.Generator().manual_seed(0), len(batch["id"]))
            images = conditioning.first_frames(model, batch, seeds)[: len(prompts)]
            generator = torch.Generator().manual_seed(0)
            videos["samples_from_image"] = self.generate(prompts[: len(images)], generator, images)
        return {name: self.panels([(video.float() + 1) / 2]) for name, video in videos.items()}

    def tokens_per_clip(self, batch: dict) -> int:
        """Number of video tokens of a clip, over all its repeats."""
        size, autoencoder = batch["video"].shape[2:], self.model.autoencoder
        if "moments" not in batch and autoencoder is not None:
            size = autoencoder.grid(*size)
        return math.prod(-(-n // patch) for n, patch in zip(size, self.model.shape.patch_size)) * self._times(batch)

    def load_weights(self, path: str | Path) -> str:
        return self.model.load_published(path)

    def _latents(self, batch: dict, stage: str) -> tuple[Tensor, Tensor | None]:
        generator, noise = (None, self.image_noise) if stage == "train" else (seeded_generators(batch), None)
        return conditioning.latents_of(self.model, batch, generator, noise, self.image_dropout)

    def _timesteps_of(self, clean: Tensor) -> Tensor:
        t, h, w = (size // patch for size, patch in zip(clean.shape[2:], self.model.shape.patch_size))
        frames, ranks = t if self.frame_timesteps else None, data_world_size(self.trainer)
        timesteps = self.timesteps(len(clean), frames, (t, h, w), rank=data_rank(self.trainer), world_size=ranks)
        if frames is not None:  # frames of a patch share a timestep
            timesteps = timesteps.repeat_interleave(self.model.shape.patch_size[0], dim=1)
        return timesteps.to(clean.device)
