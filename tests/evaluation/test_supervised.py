"""Probes and few-label fine-tuning: they find what is there, find nothing where nothing is, and disturb no one."""

import copy

import pytest
import torch
from torch.utils.data import Dataset

from blueberry_video.evaluation.supervised import LabelledClips, Recipe, encode, fine_tune, fit_probe, score
from blueberry_video.models.vit import VisionTransformer

PAIRS = {"motion": ((0, 1),)}


class Ramps(Dataset):
    """Clips that brighten (motion 0) or darken (motion 1), each the other backwards; any frame tells the ``level``."""

    def __len__(self):
        return 96

    def __getitem__(self, index):
        generator = torch.Generator().manual_seed(index)
        motion, level = index % 2, (index // 2) % 2
        ramp = torch.linspace(0, 60, 4) if motion == 0 else torch.linspace(60, 0, 4)
        noise = torch.rand(4, 3, 8, 8, generator=generator) * 20
        video = (20 + 120 * level + ramp[:, None, None, None] + noise).byte()
        return {"video": video, "labels": {"motion": motion, "level": level}}


@pytest.fixture
def encoder():
    torch.manual_seed(0)
    return VisionTransformer(
        image_size=8, num_frames=4, patch_size=4, tubelet_size=2, embed_dim=24, depth=1, num_heads=2
    )


@pytest.fixture(scope="module")
def clips():
    return LabelledClips.of(Ramps(), 96, ("motion", "level"))


def normalize(video):
    return (video - 0.4) / 0.2


def test_clips_keep_order_and_labels(clips):
    assert clips.video.shape == (96, 4, 3, 8, 8)
    assert clips.video.dtype == torch.uint8
    assert clips.labels["motion"].tolist() == [i % 2 for i in range(96)]


def test_shuffled_clips_hold_the_same_frames(clips):
    shuffled = clips.shuffled(0)
    assert not torch.equal(shuffled.video, clips.video)
    torch.testing.assert_close(shuffled.video.float().mean(dim=1), clips.video.float().mean(dim=1))


@pytest.mark.parametrize("pooling", ["mean", "attentive"])
def test_probe_reads_what_the_tokens_hold_and_not_random_labels(encoder, clips, pooling):
    tokens = encode(encoder, clips.video, normalize)
    head = fit_probe(tokens[:64], {"level": clips.labels["level"][:64]}, {"level": 2}, pooling, Recipe(60, lr=1e-2))
    assert score(head, tokens[64:], {"level": clips.labels["level"][64:]}, {})["level"] > 0.95
    nonsense = torch.randint(2, (96,), generator=torch.Generator().manual_seed(1))
    head = fit_probe(tokens[:64], {"level": nonsense[:64]}, {"level": 2}, pooling, Recipe(60, lr=1e-2))
    assert score(head, tokens[64:], {"level": nonsense[64:]}, {})["level"] < 0.85


def test_fine_tuning_learns_motion_and_shuffled_frames_undo_it(encoder, clips):
    train = LabelledClips(clips.video[:64], {"motion": clips.labels["motion"][:64]})
    test = LabelledClips(clips.video[64:], {"motion": clips.labels["motion"][64:]})
    tuned, head = fine_tune(encoder, train, {"motion": 2}, normalize, Recipe(80, 32, lr=3e-3))
    right = score(head, encode(tuned, test.video, normalize), test.labels, PAIRS)
    shuffled = test.shuffled(0)
    undone = score(head, encode(tuned, shuffled.video, normalize), shuffled.labels, PAIRS)
    assert right["motion_within_pairs"] > 0.9
    assert undone["motion_within_pairs"] < 0.75


def test_neither_the_encoder_nor_the_random_numbers_are_touched(encoder, clips):
    before, weights = torch.get_rng_state(), copy.deepcopy(encoder.state_dict())
    train = LabelledClips(clips.video[:32], {"motion": clips.labels["motion"][:32]})
    fine_tune(encoder, train, {"motion": 2}, normalize, Recipe(2, 8))
    fit_probe(encode(encoder, clips.video[:32], normalize), train.labels, {"motion": 2}, "attentive", Recipe(2, 8))
    assert torch.equal(torch.get_rng_state(), before)
    assert all(torch.equal(value, weights[name]) for name, value in encoder.state_dict().items())


def test_same_seed_same_result(encoder, clips):
    train = LabelledClips(clips.video[:32], {"motion": clips.labels["motion"][:32]})
    first, second = (fine_tune(encoder, train, {"motion": 2}, normalize, Recipe(3, 8))[1] for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))


def test_too_few_clips_and_unknown_labels_are_told():
    with pytest.raises(ValueError, match="97 labelled clips were asked for but the dataset has 96"):
        LabelledClips.of(Ramps(), 97, ("motion",))
    with pytest.raises(ValueError, match=r"no label 'colour'.*motion, level"):
        LabelledClips.of(Ramps(), 4, ("colour",))
