"""Per-frame classification: labels per clip and per frame, loss and accuracy."""

from functools import partial

import pytest
import torch
import torch.nn.functional as F

from blueberry_video.models.classifier import FrameClassifier
from blueberry_video.models.vit import VisionTransformer
from blueberry_video.optim import constant
from blueberry_video.tasks.frame_classification import FrameClassification, labels_of_moments
from blueberry_video.tasks.settings import Optimization


def task() -> FrameClassification:
    encoder = VisionTransformer(
        image_size=16, num_frames=6, patch_size=8, tubelet_size=2, embed_dim=12, depth=1, num_heads=2
    )
    optimization = Optimization(partial(torch.optim.AdamW, lr=1e-2), constant)
    return FrameClassification(FrameClassifier(encoder, {"motion": 3}), optimization)


def test_clip_labels_are_repeated_and_frame_labels_are_sampled_per_tubelet():
    assert labels_of_moments(torch.tensor([4, 7]), 3).tolist() == [[4, 4, 4], [7, 7, 7]]
    assert labels_of_moments(torch.tensor([[0, 1, 2, 3, 4, 5]]), 3).tolist() == [[1, 3, 5]]
    with pytest.raises(ValueError, match=r"(?s)(?=.*\(2, 5\))(?=.*\b3\b)"):
        labels_of_moments(torch.zeros(2, 5, dtype=torch.long), 3)


def test_loss_and_accuracies_equal_loops():
    module = task().eval()
    batch = {"video": torch.rand(4, 3, 6, 16, 16), "labels": {"motion": torch.tensor([[0, 0, 1, 1, 2, 2]] * 4)}}
    values = module.shared_step(batch, "val")
    scores = module.model(module.normalize(batch["video"]))["motion"]
    losses = [F.cross_entropy(scores[b, t : t + 1], torch.tensor([t])) for b in range(4) for t in range(3)]
    right = torch.tensor([[scores[b, t].argmax() == t for t in range(3)] for b in range(4)]).float()
    torch.testing.assert_close(values["loss"], torch.stack(losses).mean())
    torch.testing.assert_close(values["motion"], right.mean())
    torch.testing.assert_close(values["motion_first"], right[:, 0].mean())
    torch.testing.assert_close(values["motion_last"], right[:, -1].mean())
    assert module.epoch_metrics({})["motion_trivial"] == pytest.approx(1 / 3)


def test_training_learns_frame_labels():
    torch.manual_seed(0)
    module = task()
    video = torch.rand(4, 3, 6, 16, 16) * 0.1
    video[:, 0, 2:4] += 1
    video[:, 1, 4:6] += 1
    batch = {"video": video, "labels": {"motion": torch.tensor([[0, 0, 1, 1, 2, 2]] * 4)}}
    optimizer = torch.optim.AdamW(module.parameters(), lr=1e-2)
    for _ in range(30):
        optimizer.zero_grad()
        module.shared_step(batch, "train")["loss"].backward()
        optimizer.step()
    assert module.shared_step(batch, "val")["motion"] == 1
