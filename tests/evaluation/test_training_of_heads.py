"""Training of probes and fine-tuned encoders: optimizer, schedule, order of clips, labels of different classes."""

import copy
from collections import Counter
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from blueberry_video.evaluation import supervised
from blueberry_video.evaluation.probes import FewLabels, Probe
from blueberry_video.evaluation.supervised import LabelledClips, Recipe, fine_tune, fit_probe


class Recorded(torch.optim.AdamW):
    """AdamW that records the settings of every step."""

    steps: list[tuple[float, float]] = []  # noqa: RUF012

    def step(self, *arguments, **options):
        self.steps.append((self.param_groups[0]["lr"], self.param_groups[0]["weight_decay"]))
        return super().step(*arguments, **options)


@pytest.fixture
def steps(monkeypatch: pytest.MonkeyPatch) -> list[tuple[float, float]]:
    monkeypatch.setattr(torch.optim, "AdamW", Recorded)
    monkeypatch.setattr(Recorded, "steps", [])
    return Recorded.steps


def test_the_rate_rises_over_a_tenth_of_the_steps_and_decays_to_zero(steps):
    labels = {"level": torch.tensor([0, 1, 0])}
    fit_probe(torch.randn(3, 2, 4), labels, {"level": 2}, "mean", Recipe(40, 2, lr=0.5, weight_decay=0.3))
    rates = [rate for rate, _ in steps]
    assert len(rates) == 40
    assert {decay for _, decay in steps} == {0.3}
    assert rates[3] == max(rates) == pytest.approx(0.5)
    assert rates[:4] == sorted(rates[:4])
    assert rates[3:] == sorted(rates[3:], reverse=True)
    assert rates[0] == pytest.approx(0.5 / 25)
    assert rates[-1] == pytest.approx(0, abs=1e-5)
    assert rates[21] == pytest.approx(0.25, abs=0.02)  # cosine


@pytest.mark.parametrize(("batch_size", "steps"), [(3, 7), (5, 6), (12, 2)])
def test_batches_span_epochs_so_that_clips_are_used_equally_often(batch_size: int, steps: int):
    drawn = []

    class Head(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.zeros(5, 2))

        def forward(self, index):
            drawn.append(index.tolist())
            return {"x": self.weight[index]}

    labels = {"x": torch.tensor([0, 1, 1, 0, 1])}
    for seed in (1, 1, 2):
        supervised._fit(Head(), lambda index: index, labels, Recipe(steps, batch_size, seed=seed))
    runs = [drawn[i * steps : (i + 1) * steps] for i in range(3)]
    assert runs[0] == runs[1] != runs[2]
    flat = [index for batch in runs[0] for index in batch]
    assert all(len(batch) == batch_size for batch in runs[0])
    for first in range(0, len(flat) - 4, 5):
        assert sorted(flat[first : first + 5]) == [0, 1, 2, 3, 4]
    assert len({tuple(flat[first : first + 5]) for first in range(0, 10, 5)}) == 2, "another order in every epoch"
    assert max(Counter(flat).values()) - min(Counter(flat).values()) <= 1


def test_the_loss_is_the_mean_over_labels_with_different_numbers_of_classes():
    """The gradient of the first step, on one batch with all clips."""
    labels, logits = {"a": torch.tensor([0, 2, 1, 2]), "b": torch.tensor([1, 1, 0, 1])}, {"a": 3, "b": 2}
    gradients = {}

    class Head(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = (nn.Parameter(torch.zeros(4, size)) for size in logits.values())

        def forward(self, index):
            return {"a": self.a[index], "b": self.b[index]}

    head = Head()
    for name, value in head.named_parameters():
        value.register_hook(lambda gradient, name=name: gradients.__setitem__(name, gradient))
    supervised._fit(head, lambda index: index, labels, Recipe(1, 4))
    for name, size in logits.items():
        expected = (torch.full((4, size), 1 / size) - nn.functional.one_hot(labels[name], size)) / 4 / 2
        torch.testing.assert_close(gradients[name], expected)
    assert not head.training


def test_the_settings_of_the_callbacks_reach_the_training(encoder, ramps, steps, monkeypatch: pytest.MonkeyPatch):
    """Of both networks: the trained and the untrained one."""
    recipes, sizes = [], []
    fit = supervised._fit
    monkeypatch.setattr(
        supervised,
        "_fit",
        lambda model, inputs, labels, recipe: (
            recipes.append(recipe),
            sizes.append(len(labels["level"])),
            fit(model, inputs, labels, recipe),
        ),
    )
    settings = {"val_clips": 9, "steps": 2, "batch_size": 5, "weight_decay": 0.25, "seed": 3}
    probe = Probe(["level"], "linear", "probe", 14, lr=0.125, **settings)
    few = FewLabels(["level"], 12, "few", lrs=[0.5, 0.0625], **settings)
    task = SimpleNamespace(model=SimpleNamespace(encoder=encoder), normalize=lambda x: x, device=torch.device("cpu"))
    data = SimpleNamespace(train=ramps, val=ramps, classes=ramps.classes, reversal_pairs=ramps.reversal_pairs)
    for callback in (probe, few):
        callback.untrained = copy.deepcopy(encoder)
        callback.measure(task, data)
    assert recipes == [Recipe(2, 5, lr, 0.25, 3) for lr in (0.125, 0.125, 0.5, 0.0625, 0.5, 0.0625)]
    assert sizes == [14] * 2 + [12] * 4


def test_the_pooling_of_a_probe_reaches_its_head(encoder, ramps):
    clips = LabelledClips.of(ramps, 8, ("level",))
    names = {}
    for pooling in ("linear", "attentive"):
        probe = Probe(["level"], pooling, train_clips=8, val_clips=8, steps=1)
        same, head = probe.learn(encoder, clips, {"level": 2}, lambda x: x, probe.recipes[0])
        assert same is encoder
        names[pooling] = set(head.state_dict())
    assert names["linear"] < names["attentive"]


def test_fine_tuning_changes_a_copy_of_the_encoder(encoder, ramps):
    clips = LabelledClips.of(ramps, 16, ("level",))
    before = copy.deepcopy(encoder.state_dict())
    tuned, _ = fine_tune(encoder, clips, {"level": 2}, lambda x: x, Recipe(2, 8, lr=1e-2))
    changed = [name for name, value in tuned.state_dict().items() if not torch.equal(value, before[name])]
    assert {name for name, _ in encoder.named_parameters()} <= set(changed)
    assert all(torch.equal(value, before[name]) for name, value in encoder.state_dict().items())
    assert not tuned.training


def test_shuffled_clips_keep_their_labels_and_differ_in_their_orders(ramps):
    clips = LabelledClips.of(ramps, 30, ("motion", "level"))
    shuffled = clips.shuffled(4)
    assert shuffled.labels is clips.labels
    orders = set()
    for clip, original in zip(shuffled.video, clips.video, strict=True):
        order = tuple(next(s for s in range(4) if torch.equal(clip[t], original[s])) for t in range(4))
        assert sorted(order) == [0, 1, 2, 3]
        orders.add(order)
    assert len(orders) > 10
    assert torch.equal(shuffled.video, clips.shuffled(4).video)
    assert not torch.equal(shuffled.video, clips.shuffled(5).video)


@pytest.mark.parametrize("stage", ["fit", "validate", "test"])
def test_the_untrained_encoder_is_copied_before_training_alone(encoder, stage: str):
    probe = Probe(["level"])
    trainer, module = SimpleNamespace(strategy=None), SimpleNamespace(model=SimpleNamespace(encoder=encoder))
    probe.setup(trainer, module, stage)
    assert (probe.untrained is None) == (stage != "fit")
    if stage == "fit":
        assert probe.untrained is not encoder
        assert all(torch.equal(a, b) for a, b in zip(probe.untrained.parameters(), encoder.parameters(), strict=True))


@pytest.mark.parametrize("rank", [0, 1])
def test_only_rank_zero_evaluates_at_the_end(encoder, rank: int, tmp_path, monkeypatch: pytest.MonkeyPatch):
    probe, calls = Probe(["level"], name="own"), []
    monkeypatch.setattr(probe, "measure", lambda task, data: calls.append((task, data)) or {"level": 0.5})
    trainer = SimpleNamespace(is_global_zero=rank == 0, global_step=3, default_root_dir=tmp_path, loggers=[])
    trainer.callback_metrics, trainer.datamodule = {}, "data"
    probe.on_train_end(trainer, "task")
    assert calls == ([("task", "data")] if rank == 0 else [])
    assert list(trainer.callback_metrics) == (["own/level"] if rank == 0 else [])
