"""Fixtures of model tests: a training step of a task on sprites."""

from collections.abc import Callable
from functools import partial

import pytest
import torch
from torch.utils.data import default_collate

from blueberry_video.data.sprites import Sprites
from blueberry_video.optim import warmup_cosine
from blueberry_video.tasks.settings import Optimization


@pytest.fixture
def options() -> dict:
    """Optimization settings of a task."""
    return {"optimization": Optimization(partial(torch.optim.AdamW, lr=1e-3), warmup_cosine)}


@pytest.fixture
def check_training() -> Callable[..., None]:
    """Function that checks for a finite loss and a gradient of every parameter, or of every trainable one."""

    def check(module, frozen_parameters: bool = False) -> None:
        clips = Sprites("train", 4, num_frames=4, image_size=16, background="texture")
        batch = module.train().on_after_batch_transfer(default_collate([clips[i] for i in range(4)]), 0)
        loss = module.shared_step(batch, "train")["loss"]
        assert torch.isfinite(loss)
        loss.backward()
        for name, parameter in module.named_parameters():
            if parameter.requires_grad or not frozen_parameters:
                assert parameter.grad is not None, name
                assert parameter.grad.abs().max() > 0, name

    return check
