"""Checks of the sampling settings and the texts of a diffusion task, before training."""

from typing import Any

import torch

from blueberry_video.diffusion import conditioning
from blueberry_video.models.text_encoder.words import WordText


@torch.no_grad()
def check_sampling(task: Any, data: Any) -> None:
    """Checks that pictures can be sampled, and that the text encoder accepts the prompts and the captions.

    Args:
        task: a :class:`~blueberry_video.tasks.diffusion.Diffusion` with its final vocabulary.
        data: data module with ``train``, ``val`` and ``test``.

    Raises:
        ValueError: for no pictures, a sampler that does not fit the objective, or a text that is rejected.
    """
    if task.num_pictures < 1:
        raise ValueError(
            f"task.num_pictures={task.num_pictures} must be at least 1; `callbacks.media=null` makes no pictures."
        )
    try:
        task.sampler.timesteps(task.objective)
    except ValueError as error:
        name = type(task.sampler).__name__
        raise ValueError(f"task.sampler={name} does not fit task.objective: {error}") from error
    if not isinstance(text := task.model.text, WordText):
        return
    texts = {"task.prompts": task.prompts or ()}
    for split in ("train", "val", "test"):
        dataset = getattr(data, split)
        if hasattr(dataset, "captions") or hasattr(dataset, "rows"):  # others would load every clip
            texts[f"data.{split}"] = conditioning.captions_of(dataset)
    for key, captions in texts.items():
        found = sorted(set(captions))
        try:
            for first in range(0, len(found), 256):
                text(found[first : first + 256])
        except ValueError as error:
            raise ValueError(f"{key}: {error}") from error
