"""The rules name every true clip rightly, and nothing where there is nothing."""

import pytest
import torch
from torch import Tensor
from torch.utils.data import default_collate

from blueberry_video.data.moving_shapes import MovingShapes
from blueberry_video.evaluation.metrics import shuffle_frames
from blueberry_video.evaluation.shape_metrics import (
    COLOURS,
    DIRECTIONS,
    SHAPES,
    accuracies,
    caption_labels,
    classify,
)

ALL_RIGHT = {"shape": 1.0, "colour": 1.0, "direction": 1.0}


@pytest.fixture(scope="module")
def clips() -> dict:
    """720 clips; every shape, direction and a good part of the places, with the captions."""
    dataset = MovingShapes("train")
    return default_collate([dataset[i] for i in range(720)])


@pytest.fixture(scope="module")
def video(clips: dict) -> Tensor:
    return clips["video"].transpose(1, 2).float() / 127.5 - 1


def test_names_are_those_of_the_data():
    assert MovingShapes.classes == {"shape": SHAPES, "colour": COLOURS, "direction": DIRECTIONS}


def test_true_clips_are_named_rightly(clips: dict, video: Tensor):
    assert accuracies(video, clips["labels"]) == ALL_RIGHT


@pytest.mark.parametrize("sigma", [0.2, 0.5])
def test_noise_does_not_confuse(clips: dict, video: Tensor, sigma: float):
    assert accuracies(video + sigma * torch.randn(video.shape), clips["labels"]) == ALL_RIGHT


def test_a_dim_picture_is_named_rightly(clips: dict, video: Tensor):
    assert accuracies(0.6 * video - 0.2, clips["labels"]) == ALL_RIGHT


def test_shuffled_frames_have_a_shape_and_a_colour_but_no_direction(clips: dict, video: Tensor):
    """An eighth of the orders happen to lead the right way, and as many the wrong one."""
    shares = accuracies(shuffle_frames(video), clips["labels"])
    assert (shares["shape"], shares["colour"]) == (1, 1)
    assert 0.05 < shares["direction"] < 0.25


def test_a_clip_played_backwards_goes_the_opposite_way(clips: dict, video: Tensor):
    opposite = torch.tensor([1, 0, 3, 2])
    assert torch.equal(classify(video.flip(2))["direction"], opposite[clips["labels"]["direction"]])


def test_a_clip_with_another_label_is_wrong(clips: dict, video: Tensor):
    wrong = {label: values.roll(1) for label, values in clips["labels"].items()}
    expected = {label: (values == clips["labels"][label]).float().mean().item() for label, values in wrong.items()}
    assert accuracies(video, wrong) == pytest.approx(expected)


def test_clips_without_a_shape_have_none():
    for nothing in (torch.randn(50, 3, 8, 16, 16), torch.full((50, 3, 8, 16, 16), -1.0), torch.ones(50, 3, 8, 16, 16)):
        told = classify(nothing)
        assert (told["shape"] == -1).all()
        assert (told["direction"] == -1).all()


def test_a_shape_that_stands_still_has_no_direction(video: Tensor):
    still = video[:36, :, :1].expand(-1, -1, 8, -1, -1)
    assert (classify(still)["direction"] == -1).all()
    assert torch.equal(classify(still)["shape"], classify(video[:36])["shape"])


def test_captions_say_the_labels(clips: dict):
    labels = caption_labels(clips["caption"])
    assert labels.keys() == clips["labels"].keys()
    assert all(torch.equal(labels[name], clips["labels"][name]) for name in labels)


@pytest.mark.parametrize("caption", ["a red square", "a red square disc moves up", "a pink square moves up", ""])
def test_a_caption_of_something_else_is_refused(caption: str):
    with pytest.raises(ValueError, match=f"the caption '{caption}' does not name one"):
        caption_labels(["a red square moves up", caption])


@pytest.mark.parametrize("shape", [(3, 8, 16, 16), (2, 1, 8, 16, 16), (2, 3, 1, 16, 16)])
def test_other_shapes_are_refused(shape: tuple[int, ...]):
    with pytest.raises(ValueError, match="clips of shape"):
        classify(torch.zeros(shape))
