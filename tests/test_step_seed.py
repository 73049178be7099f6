"""StepSeed: every training step of every rank draws different random numbers, which are the same in every run."""

import random
from itertools import product
from types import SimpleNamespace

import numpy as np
import torch

from blueberry_video.callbacks import StepSeed


def draws(seed: int, rank: int, epoch: int, batch: int) -> tuple[float, float, float]:
    trainer = SimpleNamespace(global_rank=rank, current_epoch=epoch, global_step=7, world_size=4)
    StepSeed(seed).on_train_batch_start(trainer, None, None, batch)
    return random.random(), np.random.rand(), torch.rand(1).item()


def test_every_seed_rank_epoch_and_batch_has_other_numbers():
    positions = list(product((0, 1), (0, 1, 2), (0, 1, 5), (0, 1, 2)))
    found = [draws(*position) for position in positions]
    for number in range(3):  # of each generator
        assert len({numbers[number] for numbers in found}) == len(positions)
    assert found == [draws(*position) for position in positions]
