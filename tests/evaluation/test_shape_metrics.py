"""Rule-based classification of moving shapes: exact on real clips, -1 on clips without a shape or motion."""

import re

import pytest
import torch
from torch import Tensor
from torch.utils.data import default_collate

from blueberry_video.data.moving_shapes import MovingShapes
from blueberry_video.evaluation.metrics import shuffle_frames
from blueberry_video.evaluation.shape_metrics import COLOURS, DIRECTIONS, SHAPES, accuracies, caption_labels, classify

ALL_RIGHT = {"shape": 1.0, "colour": 1.0, "direction": 1.0}


@pytest.fixture(scope="module")
def clips() -> dict:
    """720 clips with captions: every shape and direction, and many positions."""
    dataset = MovingShapes("train")
    return default_collate([dataset[i] for i in range(720)])


@pytest.fixture(scope="module")
def video(clips: dict) -> Tensor:
    return clips["video"].transpose(1, 2).float() / 127.5 - 1


def test_class_names_equal_those_of_the_dataset():
    assert MovingShapes.classes == {"shape": SHAPES, "colour": COLOURS, "direction": DIRECTIONS}


def test_real_clips_are_classified_correctly(clips: dict, video: Tensor):
    assert accuracies(video, clips["labels"]) == ALL_RIGHT


@pytest.mark.parametrize("sigma", [0.2, 0.5])
def test_noisy_clips_are_classified_correctly(clips: dict, video: Tensor, sigma: float):
    assert accuracies(video + sigma * torch.randn(video.shape), clips["labels"]) == ALL_RIGHT


def test_dim_clips_are_classified_correctly(clips: dict, video: Tensor):
    assert accuracies(0.6 * video - 0.2, clips["labels"]) == ALL_RIGHT


def test_shuffled_frames_keep_shape_and_color_and_lose_direction(clips: dict, video: Tensor):
    """About an eighth of the frame orders yield the correct direction by chance, and as many the opposite."""
    shares = accuracies(shuffle_frames(video), clips["labels"])
    assert (shares["shape"], shares["colour"]) == (1, 1)
    assert 0.05 < shares["direction"] < 0.25


def test_a_reversed_clip_has_the_opposite_direction(clips: dict, video: Tensor):
    opposite = torch.tensor([1, 0, 3, 2])
    assert torch.equal(classify(video.flip(2))["direction"], opposite[clips["labels"]["direction"]])


def test_clips_with_wrong_labels_count_as_wrong(clips: dict, video: Tensor):
    wrong = {label: values.roll(1) for label, values in clips["labels"].items()}
    expected = {label: (values == clips["labels"][label]).float().mean().item() for label, values in wrong.items()}
    assert accuracies(video, wrong) == pytest.approx(expected)


def test_clips_without_a_shape_get_minus_one():
    for empty in (torch.randn(50, 3, 8, 16, 16), torch.full((50, 3, 8, 16, 16), -1.0), torch.ones(50, 3, 8, 16, 16)):
        found = classify(empty)
        assert (found["shape"] == -1).all()
        assert (found["direction"] == -1).all()


def test_a_static_shape_has_no_direction(video: Tensor):
    still = video[:36, :, :1].expand(-1, -1, 8, -1, -1)
    assert (classify(still)["direction"] == -1).all()
    assert torch.equal(classify(still)["shape"], classify(video[:36])["shape"])


def test_caption_labels_equal_those_of_the_clips(clips: dict):
    labels = caption_labels(clips["caption"])
    assert labels.keys() == clips["labels"].keys()
    assert all(torch.equal(labels[name], clips["labels"][name]) for name in labels)


@pytest.mark.parametrize("caption", ["a red square", "a red square disc moves up", "a pink square moves up", ""])
def test_captions_without_exactly_one_class_per_label_raise(caption: str):
    with pytest.raises(ValueError, match=f"caption='{caption}'"):
        caption_labels(["a red square moves up", caption])


@pytest.mark.parametrize("shape", [(3, 8, 16, 16), (2, 1, 8, 16, 16), (2, 3, 1, 16, 16)])
def test_a_tensor_of_the_wrong_shape_raises(shape: tuple[int, ...]):
    with pytest.raises(ValueError, match=rf"{re.escape(str(shape))}.*\(N, 3, T, H, W\)"):
        classify(torch.zeros(shape))
