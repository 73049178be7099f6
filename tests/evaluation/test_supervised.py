"""Probes and few-label fine-tuning: accuracy, controls and reproducibility."""

import copy

import pytest
import torch

from blueberry_video.evaluation.supervised import LabelledClips, Recipe, encode, fine_tune, fit_probe, score

PAIRS = {"motion": ((0, 1),)}


@pytest.fixture(scope="module")
def clips(ramps):
    return LabelledClips.of(ramps, 96, ("motion", "level"))


def normalize(video):
    return (video - 0.4) / 0.2


def test_clips_keep_order_and_labels(clips):
    assert clips.video.shape == (96, 4, 3, 8, 8)
    assert clips.video.dtype == torch.uint8
    assert clips.labels["motion"].tolist() == [i % 2 for i in range(96)]


def test_shuffled_clips_contain_the_same_frames(clips):
    shuffled = clips.shuffled(0)
    assert not torch.equal(shuffled.video, clips.video)
    torch.testing.assert_close(shuffled.video.float().mean(dim=1), clips.video.float().mean(dim=1))


@pytest.mark.parametrize("pooling", ["mean", "attentive"])
def test_probe_learns_real_labels_and_not_random_ones(encoder, clips, pooling):
    tokens = encode(encoder, clips.video, normalize)
    head = fit_probe(tokens[:64], {"level": clips.labels["level"][:64]}, {"level": 2}, pooling, Recipe(60, lr=1e-2))
    assert score(head, tokens[64:], {"level": clips.labels["level"][64:]}, {})["level"] > 0.95
    nonsense = torch.randint(2, (96,), generator=torch.Generator().manual_seed(1))
    head = fit_probe(tokens[:64], {"level": nonsense[:64]}, {"level": 2}, pooling, Recipe(60, lr=1e-2))
    assert score(head, tokens[64:], {"level": nonsense[64:]}, {})["level"] < 0.85


def test_fine_tuning_learns_motion_that_shuffled_frames_remove(encoder, clips):
    train = LabelledClips(clips.video[:64], {"motion": clips.labels["motion"][:64]})
    test = LabelledClips(clips.video[64:], {"motion": clips.labels["motion"][64:]})
    tuned, head = fine_tune(encoder, train, {"motion": 2}, normalize, Recipe(80, 32, lr=3e-3))
    right = score(head, encode(tuned, test.video, normalize), test.labels, PAIRS)
    shuffled = test.shuffled(0)
    undone = score(head, encode(tuned, shuffled.video, normalize), shuffled.labels, PAIRS)
    assert right["motion_within_pairs"] > 0.9
    assert undone["motion_within_pairs"] < 0.75


def test_encoder_and_global_generator_are_unchanged(encoder, clips):
    before, weights = torch.get_rng_state(), copy.deepcopy(encoder.state_dict())
    train = LabelledClips(clips.video[:32], {"motion": clips.labels["motion"][:32]})
    fine_tune(encoder, train, {"motion": 2}, normalize, Recipe(2, 8))
    fit_probe(encode(encoder, clips.video[:32], normalize), train.labels, {"motion": 2}, "attentive", Recipe(2, 8))
    assert torch.equal(torch.get_rng_state(), before)
    assert all(torch.equal(value, weights[name]) for name, value in encoder.state_dict().items())


def test_fine_tuning_is_deterministic(encoder, clips):
    train = LabelledClips(clips.video[:32], {"motion": clips.labels["motion"][:32]})
    first, second = (fine_tune(encoder, train, {"motion": 2}, normalize, Recipe(3, 8))[1] for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))


def test_too_few_clips_and_unknown_labels_raise(ramps):
    with pytest.raises(ValueError, match=r"count=97\b.*\b96\b"):
        LabelledClips.of(ramps, 97, ("motion",))
    with pytest.raises(ValueError, match=r"label='colour'.*motion, level"):
        LabelledClips.of(ramps, 4, ("colour",))
