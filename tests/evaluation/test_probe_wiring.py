"""Probe and FewLabels callbacks on unbalanced classes, different training and validation clips and several rates."""

import copy
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.utils.data import Dataset, Subset

from blueberry_video.evaluation import probes
from blueberry_video.evaluation.probes import FewLabels, Probe
from blueberry_video.evaluation.supervised import LabelledClips, Recipe, encode, score


def task(encoder):
    return SimpleNamespace(
        model=SimpleNamespace(encoder=encoder), normalize=lambda video: (video - 0.4) / 0.2, device=torch.device("cpu")
    )


def data(train: Dataset, val: Dataset, ramps) -> SimpleNamespace:
    return SimpleNamespace(train=train, val=val, classes=ramps.classes, reversal_pairs=ramps.reversal_pairs)


class Swapped(Dataset):
    """Clips with the two levels exchanged, so that a head that learned the levels is always wrong."""

    def __init__(self, clips):
        self.clips = clips

    def __len__(self):
        return len(self.clips)

    def __getitem__(self, index):
        clip = self.clips[index]
        return {**clip, "labels": {**clip["labels"], "level": 1 - clip["labels"]["level"]}}


def measured(callback, encoder, train, val, ramps) -> dict[str, float]:
    callback.untrained = copy.deepcopy(encoder)
    return callback.measure(task(encoder), data(train, val, ramps))


def test_the_trivial_baseline_is_the_majority_share_of_the_validation_clips(encoder, ramps):
    train = Subset(ramps, [0, 1, 4, 5, 2, 8, 9, 12])  # one light clip of eight
    val = Subset(ramps, [2, 3, 6, 7, 10, 0, 4, 8])  # five light clips of eight, six of eight brighten
    values = measured(Probe(["motion", "level"], train_clips=8, val_clips=8, steps=1), encoder, train, val, ramps)
    assert values["level_trivial"] == 5 / 8
    assert values["motion_trivial"] == 6 / 8
    assert values["motion_within_pairs_trivial"] == 0.5


@pytest.mark.parametrize("evaluation", ["probe", "few_labels"])
def test_heads_are_trained_on_training_and_scored_on_validation_clips(encoder, ramps, evaluation):
    train, val = Subset(ramps, range(48)), Swapped(Subset(ramps, range(48, 72)))
    if evaluation == "probe":
        callback = Probe(["level"], train_clips=48, val_clips=24, steps=40, lr=1e-2)
    else:
        callback = FewLabels(["level"], num_labelled=48, val_clips=24, steps=40, lrs=[3e-3])
    values = measured(callback, encoder, train, val, ramps)
    assert values["level"] < 0.1
    assert measured(callback, encoder, train, Subset(ramps, range(48, 72)), ramps)["level"] > 0.9


@pytest.mark.parametrize("lrs", [[1e-9, 3e-3], [3e-3, 1e-9]])
def test_both_networks_take_their_best_learning_rate(encoder, ramps, lrs, monkeypatch: pytest.MonkeyPatch):
    """A stub of the fine-tuning: the trained encoder is right at the first rate, the untrained one at the second."""
    untrained = copy.deepcopy(encoder)
    seen = []

    def tuned(start, clips, num_classes, normalize, recipe):
        seen.append((start is untrained, recipe.lr, recipe.steps, recipe.seed, len(clips.video)))
        right = (recipe.lr == 3e-3) != (start is untrained)

        def head(tokens):
            logits = torch.zeros(len(tokens), 2)
            bright = tokens.mean((1, 2)) > tokens.mean()
            logits[:, 1] = torch.where(bright == right, 1.0, -1.0)
            return {"level": logits}

        return (lambda video: video.mean((1, 2)).flatten(1)[..., None]), head

    monkeypatch.setattr(probes, "fine_tune", tuned)
    monkeypatch.setattr(probes, "encode", lambda encoder, video, normalize: video.float().mean((2, 3, 4))[..., None])
    few = FewLabels(["level"], num_labelled=20, val_clips=40, steps=7, seed=5, lrs=lrs)
    few.untrained = untrained
    values = few.measure(task(encoder), data(ramps, ramps, ramps))
    assert sorted(seen) == sorted((start, lr, 7, 5, 20) for start in (False, True) for lr in lrs)
    assert values["level"] == values["level_scratch"] == 1
    assert values["level_gain"] == 0


class Dropped(nn.Module):
    """Encoder with dropout and batch statistics: its output is deterministic in eval mode only."""

    embed_dim = 12

    def __init__(self):
        super().__init__()
        self.norm, self.dropout = nn.BatchNorm3d(3), nn.Dropout(0.5)

    def forward(self, video):
        return self.dropout(self.norm(video)).flatten(3).mean(3).transpose(1, 2).repeat(1, 1, 4)


def test_encoders_are_in_eval_mode_while_they_are_probed(ramps):
    clips = LabelledClips.of(ramps, 80, ("level",))
    encoder = Dropped().train()
    before = copy.deepcopy(encoder.state_dict())
    tokens = encode(encoder, clips.video, lambda video: video)
    assert torch.equal(tokens, encode(encoder.train(), clips.video, lambda video: video))
    assert torch.equal(tokens[:5], encode(encoder, clips.video[:5], lambda video: video))
    assert all(torch.equal(value, before[name]) for name, value in encoder.state_dict().items())


def test_normalization_reaches_the_encoder(ramps):
    clips = LabelledClips.of(ramps, 4, ("level",))
    seen = []
    encode(Dropped(), clips.video, lambda video: seen.append(video) or video)
    assert seen[0].shape == (4, 3, 4, 8, 8)
    torch.testing.assert_close(seen[0], clips.video.transpose(1, 2).float() / 255)


def test_scores_of_several_batches_and_pairs():
    """150 clips in batches of 64: three of four right, and among the pair (0, 1) two of three."""
    truth = torch.tensor([0, 1, 2, 1, 2, 2] * 25)
    guess = torch.tensor([0, 0, 2, 1, 2, 0] * 25)
    logits = torch.nn.functional.one_hot(guess, 3).float()
    values = score(lambda part: {"motion": part, "other": part}, logits, {"motion": truth}, {"motion": ((0, 1),)})
    assert values == {"motion": pytest.approx(4 / 6), "motion_within_pairs": pytest.approx(2 / 3)}
    unknown = score(lambda part: {"motion": part}, logits[2:3], {"motion": truth[2:3]}, {"motion": ((0, 1),)})
    assert unknown == {"motion": 1}


def test_recipes_differ_in_seed_and_rate(encoder, ramps):
    clips = LabelledClips.of(ramps, 32, ("level",))
    tokens = encode(encoder, clips.video, lambda video: video)
    heads = [
        probes.fit_probe(tokens, clips.labels, {"level": 2}, "mean", recipe).state_dict()
        for recipe in (Recipe(3, 8), Recipe(3, 8), Recipe(3, 8, seed=1), Recipe(3, 8, lr=1e-2), Recipe(4, 8))
    ]
    values = [torch.cat([value.flatten() for value in head.values()]) for head in heads]
    assert torch.equal(values[0], values[1])
    assert all(not torch.equal(values[0], value) for value in values[2:])
