"""Collapse measures against naive loops, and CollapseMonitor in a trainer."""

import math
from functools import partial
from types import SimpleNamespace

import lightning
import pytest
import torch
from lightning.pytorch.loggers import CSVLogger
from torch import nn

from blueberry_video.data.datamodule import DataModule
from blueberry_video.evaluation.collapse import (
    CollapseMonitor,
    cross_clip_cosine,
    effective_rank,
    feature_std,
    parameter_distance,
)
from blueberry_video.masking import RandomMasking
from blueberry_video.models.jepa.model import JEPA
from blueberry_video.models.masked_autoencoder.model import MaskedAutoencoder
from blueberry_video.optim import constant, ramp
from blueberry_video.tasks.latent_prediction import LatentPrediction
from blueberry_video.tasks.masked_pixels import MaskedPixels
from blueberry_video.tasks.settings import Optimization


def test_std_is_over_clips_at_each_position():
    latents = torch.randn(5, 3, 4) + 100 * torch.randn(1, 3, 4)  # differences between positions must not count
    expected = []
    for d in range(4):
        deviations = []
        for n in range(3):
            column = [float(latents[b, n, d]) for b in range(5)]
            mean = sum(column) / 5
            deviations.append(math.sqrt(sum((x - mean) ** 2 for x in column) / 5))
        expected.append(sum(deviations) / 3)
    assert feature_std(latents).tolist() == pytest.approx(expected, rel=1e-3)


def test_effective_rank_is_the_dimension_of_the_differences_between_clips():
    basis = torch.linalg.qr(torch.randn(16, 16)).Q
    for rank in (1, 3, 16):
        weights = torch.linalg.qr(torch.randn(64, 17)).Q[:, :16]
        weights = torch.linalg.qr(weights - weights.mean(dim=0)).Q[:, :rank]  # equal singular values, no mean
        latents = (weights @ basis[:rank]).unsqueeze(1) + torch.randn(1, 1, 16)
        assert effective_rank(latents).item() == pytest.approx(rank, rel=1e-3)
    latents = torch.randn(6, 2, 3)
    centred = (latents - latents.mean(dim=0)).flatten(0, 1).double()
    values = torch.linalg.eigvalsh(centred.T @ centred).sqrt()
    shares = [float(value / values.sum()) for value in values]
    expected = math.exp(-sum(share * math.log(share) for share in shares))
    assert effective_rank(latents).item() == pytest.approx(expected, rel=1e-5)


def test_cosine_is_the_mean_over_pairs_of_clips_and_requires_two():
    latents, total = torch.randn(4, 2, 3), 0.0
    for first in range(4):
        for second in range(first):
            for n in range(2):
                a, b = latents[first, n].tolist(), latents[second, n].tolist()
                total += sum(x * y for x, y in zip(a, b, strict=True)) / math.hypot(*a) / math.hypot(*b)
    assert cross_clip_cosine(latents).item() == pytest.approx(total / 6 / 2, rel=1e-5)
    with pytest.raises(ValueError, match=r"data\.batch_size=2"):
        cross_clip_cosine(latents[:1])


def test_every_measure_detects_collapsed_embeddings_that_differ_between_positions():
    collapsed = torch.randn(1, 8, 16).expand(6, -1, -1)
    assert feature_std(collapsed).max() < 1e-6
    assert effective_rank(collapsed) == 0
    assert cross_clip_cosine(collapsed) == pytest.approx(1, abs=1e-5)


def test_parameter_distance_is_relative_to_the_norm_of_the_target():
    online, target = nn.Linear(1, 1), nn.Linear(1, 1)
    for module, weight, bias in ((online, 4.0, 8.0), (target, 4.0, 3.0)):
        module.weight.data.fill_(weight)
        module.bias.data.fill_(bias)
    assert parameter_distance(online, target).item() == pytest.approx(1.0)
    assert parameter_distance(target, target) == 0


def model(encoder: nn.Module, ema: bool) -> JEPA:
    return JEPA(
        encoder,
        predictor_dim=12,
        predictor_depth=1,
        predictor_num_heads=1,
        num_mask_tokens=1,
        ema=ema,
        predictor_positions="sincos_3d",
    )


def task(network: JEPA, lr: float = 1e-3, **changes) -> LatentPrediction:
    momentum = partial(ramp, start=0.99, end=0.99) if network.follows else None
    optimization = Optimization(partial(torch.optim.AdamW, lr=lr), constant)
    return LatentPrediction(network, optimization, [RandomMasking(0.5)], momentum, num_pictures=1, **changes)


@pytest.fixture
def fit(trainer, ramps):
    def run(module, *callbacks, steps: int) -> lightning.Trainer:
        fitted = trainer(*callbacks, max_steps=steps, max_epochs=-1, limit_val_batches=0)
        fitted.fit(module, datamodule=DataModule(ramps, ramps, batch_size=16))
        return fitted

    return run


def test_documented_metrics_are_logged(encoder, fit):
    monitor, module = CollapseMonitor(every_n_steps=2, after_steps=0), task(model(encoder, ema=True))
    logged = {k: v.item() for k, v in fit(module, monitor, steps=2).logged_metrics.items()}
    names = ("target_std", "target_std_min", "effective_rank", "cross_clip_cosine", "ema_distance", "alarm")
    assert {f"collapse/{name}" for name in names} <= logged.keys()
    assert 0 < logged["collapse/target_std_min"] < logged["collapse/target_std"] < 1
    assert 1 < logged["collapse/effective_rank"] < 24
    assert logged["collapse/ema_distance"] > 0
    assert module.training


def test_without_target_encoder_and_stop_gradient_the_alarm_stops_the_run(encoder, fit):
    """Negative control. Layer-normalized embeddings cannot shrink, so they collapse onto a line."""
    options = {"every_n_steps": 5, "after_steps": 20, "min_rank": 2.0, "stop": True}
    monitor, module = CollapseMonitor(**options), task(model(encoder, ema=False), lr=1e-2)
    with pytest.warns(UserWarning, match=r"collapse at step \d+"):
        trainer = fit(module, monitor, steps=400)
    assert monitor.alarm
    assert trainer.global_step < 400
    assert trainer.logged_metrics["collapse/alarm"] == 1
    assert trainer.logged_metrics["collapse/effective_rank"] < 2
    assert "collapse/ema_distance" not in trainer.logged_metrics


def test_sigreg_without_a_target_encoder_raises_no_alarm(encoder, fit):
    options = {"every_n_steps": 5, "after_steps": 20, "min_rank": 2.0}  # the clips differ in two factors only
    monitor, module = (
        CollapseMonitor(**options),
        task(model(encoder, ema=False), lr=1e-2, sigreg_weight=0.5, sigreg_directions=32),
    )
    trainer = fit(module, monitor, steps=60)
    assert trainer.logged_metrics["collapse/alarm"] == 0
    assert trainer.logged_metrics["collapse/target_std"] > 0.1


def test_values_are_logged_in_the_row_of_their_step_alone(encoder, trainer, ramps, tmp_path):
    class Rows(CSVLogger):
        def log_metrics(self, metrics: dict, step: int | None = None) -> None:
            rows.setdefault(step, set()).update(metrics)

    rows: dict[int, set[str]] = {}
    fitted = trainer(
        CollapseMonitor(every_n_steps=3, after_steps=0),
        max_steps=8,
        max_epochs=-1,
        limit_val_batches=0,
        log_every_n_steps=1,
        logger=Rows(tmp_path),
    )
    fitted.fit(task(model(encoder, ema=True)), datamodule=DataModule(ramps, ramps, batch_size=16))
    assert [step for step, names in rows.items() if "collapse/effective_rank" in names] == [2, 5]
    assert all("train/loss" in names for names in rows.values())
    assert fitted.callback_metrics["collapse/alarm"] in (0, 1)


class Scripted(CollapseMonitor):
    """Monitor that receives the measured values as arguments."""

    def check(self, step: int, std: float = 1.0, rank: float = 9.0, cosine: float = 0.5) -> bool:
        trainer = SimpleNamespace(global_step=step, should_stop=False)
        values = {"target_std": std, "effective_rank": rank, "cross_clip_cosine": cosine}
        self._update_alarm(trainer, {name: torch.tensor(value) for name, value in values.items()})
        return trainer.should_stop


@pytest.mark.parametrize("collapse", [{"std": 0.04}, {"rank": 2.9}, {"cosine": 0.9995}])
def test_each_measure_raises_the_alarm_after_patience_consecutive_checks(collapse):
    monitor = Scripted(patience=2, stop=True)
    assert not monitor.check(1)
    assert not monitor.check(2, **collapse)
    assert not monitor.check(3)  # resets the count
    assert not monitor.check(4, **collapse)
    with pytest.warns(UserWarning, match="collapse at step 5"):
        assert monitor.check(5, **collapse)
    assert monitor.alarm
    assert not Scripted(stop=False).check(1, **collapse)


@pytest.mark.parametrize(("after_steps", "patience", "alarm"), [(0, 1, 2), (6, 1, 8), (5, 1, 6), (6, 2, 10)])
def test_the_alarm_waits_for_after_steps(after_steps: int, patience: int, alarm: int):
    """Every check finds a collapse, at every second step; batches of accumulated gradients repeat a step."""
    logged = []
    trainer = SimpleNamespace(global_step=0, should_stop=False, callback_metrics={}, logged_metrics={})
    trainer.strategy = SimpleNamespace(reduce=lambda value, **_: value)
    trainer.fit_loop = SimpleNamespace(epoch_loop=SimpleNamespace(_batches_that_stepped=0))
    network = SimpleNamespace(target_encoder=None)
    module = SimpleNamespace(model=network, training=True, train=lambda mode: None, latents=lambda video: video)
    module.eval, module.modules = lambda: module, lambda: ()
    log = lambda values, step: logged.append((trainer.global_step, values["collapse/alarm"]))  # noqa: E731
    trainer.loggers = [SimpleNamespace(log_metrics=log)]
    monitor = CollapseMonitor(every_n_steps=2, after_steps=after_steps, patience=patience, stop=True)

    def train() -> None:
        for trainer.global_step in (1, 2, 2, 3, 4, 4, 5, 6, 7, 8, 8, 9, 10):
            monitor.on_train_batch_end(trainer, module, None, {"video": torch.ones(4, 3, 5)}, 0)
            assert trainer.should_stop == (trainer.global_step >= alarm)

    with pytest.warns(UserWarning, match=rf"collapse at step {alarm}\b"):
        train()
    assert logged == [(step, float(step >= alarm)) for step in (2, 4, 6, 8, 10)]


def test_alarm_and_count_are_restored_from_a_checkpoint():
    monitor, resumed = Scripted(patience=2), Scripted(patience=2)
    monitor.check(1, std=0.0)
    resumed.load_state_dict(monitor.state_dict())
    with pytest.warns(UserWarning, match="collapse at step 2"):
        resumed.check(2, std=0.0)
    again = Scripted()
    again.load_state_dict(resumed.state_dict())
    assert again.alarm


def test_training_is_bit_identical_with_the_monitor(encoder, fit):
    weights = []
    for callbacks in ([], [CollapseMonitor(every_n_steps=1, after_steps=0)]):
        lightning.seed_everything(0, verbose=False)
        module = task(model(encoder, ema=True))
        start = {name: value.clone() for name, value in module.state_dict().items()}
        fit(module, *callbacks, steps=3)
        weights.append(module.state_dict())
        encoder.load_state_dict({k.removeprefix("model.encoder."): v for k, v in start.items() if ".encoder." in k})
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])


def test_a_task_without_latents_raises(encoder, fit):
    pixels = MaskedPixels(
        MaskedAutoencoder(encoder, 12, 1, 1), Optimization(torch.optim.SGD, constant), RandomMasking(0.5)
    )
    with pytest.raises(ValueError, match=r"(?s)MaskedPixels\b.*callbacks\.collapse=null"):
        fit(pixels, CollapseMonitor(), steps=1)


@pytest.mark.parametrize("changes", [{"every_n_steps": 0}, {"patience": 0}])
def test_arguments_out_of_range_raise(changes):
    with pytest.raises(ValueError, match=rf"\b{next(iter(changes))}=0\b"):
        CollapseMonitor(**changes)


def test_batches_of_one_clip_raise_before_training():
    trainer = SimpleNamespace(datamodule=SimpleNamespace(batch_size=1))
    with pytest.raises(ValueError, match=r"callbacks\.collapse\b.*data\.batch_size=1\b.*data\.batch_size=2"):
        CollapseMonitor().setup(trainer, SimpleNamespace(latents=None), "fit")
