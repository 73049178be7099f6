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
    trainer.callback_metrics, trainer.datamodule, trainer.lightning_module = {}, "data", torch.nn.Module()
    probe.on_train_end(trainer, "task")
    assert calls == ([("task", "data")] if rank == 0 else [])
    assert list(trainer.callback_metrics) == (["own/level"] if rank == 0 else [])


def test_initial_weights_follow_the_seed(encoder, ramps):
    """At a learning rate of 0 the weights stay the initial ones."""
    clips = LabelledClips.of(ramps, 8, ("level",))
    tokens = torch.randn(8, 3, encoder.embed_dim)
    found: dict[str, list[torch.Tensor]] = {"probe": [], "few": []}
    for seed in (0, 0, 1):
        recipe = Recipe(1, 8, lr=0.0, weight_decay=0.0, seed=seed)
        heads = {
            "probe": fit_probe(tokens, clips.labels, {"level": 2}, "attentive", recipe),
            "few": fine_tune(encoder, clips, {"level": 2}, lambda x: x, recipe)[1],
        }
        for name, head in heads.items():
            found[name].append(torch.cat([value.flatten() for value in head.state_dict().values()]))
    for same, again, other in found.values():
        assert torch.equal(same, again)
        assert not torch.equal(same, other)


class Coded(nn.Module):
    """Head that answers each label from a table of the recipes; clips are coded by their first token."""

    def __init__(self, right: dict[str, float]):
        super().__init__()
        self.right = right

    def forward(self, tokens):
        index = tokens[:, 0, 0].long()
        truth = {"motion": index % 2, "level": index // 2 % 2}
        logits = {}
        for name, labels in truth.items():
            wrong = index >= 8 * self.right[name]
            logits[name] = nn.functional.one_hot(torch.where(wrong, 1 - labels, labels), 2).float()
        return logits


def test_the_best_rate_is_that_of_the_largest_sum_over_labels(ramps, monkeypatch: pytest.MonkeyPatch):
    """Rates 1, 2 and 3: the second is the best for neither label, but in the sum."""
    table = {
        1.0: {"motion": 1.0, "level": 0.0},
        2.0: {"motion": 0.75, "level": 0.75},
        3.0: {"motion": 0.0, "level": 1.0},
    }
    few = FewLabels(["motion", "level"], 8, val_clips=8, lrs=list(table))
    monkeypatch.setattr(few, "learn", lambda start, clips, classes, normalize, recipe: (start, Coded(table[recipe.lr])))
    module = "blueberry_video.evaluation.probes.encode"
    monkeypatch.setattr(module, lambda encoder, video, normalize: torch.arange(8.0)[:, None, None])
    few.untrained = nn.Identity()
    task = SimpleNamespace(model=SimpleNamespace(encoder="trained"), normalize=None, device=torch.device("cpu"))
    data = SimpleNamespace(train=ramps, val=ramps, classes=ramps.classes, reversal_pairs={})
    values = few.measure(task, data)
    assert (values["motion"], values["level"]) == (0.75, 0.75)


def test_the_shuffled_control_uses_the_trained_model_on_shuffled_validation_clips(ramps, monkeypatch):
    probe, scored = Probe(["motion", "level"], train_clips=8, val_clips=6, seed=7), []
    monkeypatch.setattr(probe, "learn", lambda start, *_: (start, f"head of {start}"))
    monkeypatch.setattr("blueberry_video.evaluation.probes.encode", lambda encoder, video, normalize: (encoder, video))

    def score(head, inputs, labels, pairs):
        scored.append((head, *inputs))
        return {"motion": len(scored) / 10, "motion_within_pairs": len(scored) / 100, "level": 0.5}

    monkeypatch.setattr("blueberry_video.evaluation.probes.score", score)

    class Untrained(str):
        def to(self, device):
            return self

    probe.untrained = Untrained("untrained")
    task = SimpleNamespace(model=SimpleNamespace(encoder="trained"), normalize=None, device=torch.device("cpu"))
    data = SimpleNamespace(train=ramps, val=ramps, classes=ramps.classes, reversal_pairs=ramps.reversal_pairs)
    values = probe.measure(task, data)
    val = LabelledClips.of(ramps, 6, ("motion", "level"))
    assert [(head, encoder) for head, encoder, _ in scored] == [
        ("head of trained", "trained"),
        ("head of untrained", "untrained"),
        ("head of trained", "trained"),
    ]
    for (_, _, video), expected in zip(scored, (val, val, val.shuffled(7)), strict=True):
        assert torch.equal(video, expected.video)
    assert (values["motion"], values["motion_random_init"], values["motion_shuffled"]) == (0.1, 0.2, 0.3)
    assert values["motion_within_pairs_shuffled"] == 0.03
    assert values["motion_gain"] == pytest.approx(-0.1)
    assert "level_shuffled" not in values
    assert "level_within_pairs_trivial" not in values
