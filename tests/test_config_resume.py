"""Overrides of a resumed run: repeated ones change nothing, different ones are applied or refused."""

from pathlib import Path

import pytest
from omegaconf import DictConfig, OmegaConf

from blueberry_video.config import compose, defaults, repeat, resumed

EXPERIMENTS = Path(__file__).resolve().parents[1] / "experiments"


def resume(name: str, first: list[str], second: list[str]) -> tuple[DictConfig, list[dict]]:
    """Returns the config and the recorded changes of a run started with ``first`` and resumed with ``second``."""
    file = EXPERIMENTS / name / "config.yaml"
    saved = OmegaConf.create(OmegaConf.to_yaml(compose(file, first)))
    config, changes = resumed(saved, compose(file, second), defaults(file), second, "outputs/idea/run")
    recorded = [change.record(7) for change in changes]
    assert repeat(saved, [{"changed": recorded}]) == config, "the record repeats the changes"
    return config, recorded


@pytest.mark.parametrize(
    ("name", "overrides"),
    [
        ("template", ["+debug=fast"]),
        ("template", ["+debug=overfit", "trainer.max_steps=9"]),
        ("template", ["callbacks=ema", "callbacks.ema.decay=.9"]),
        ("template", ["optimizer=finetune", "optimizer.lr=1e-4", "model.encoder.num_frames=8"]),
        ("template", ["model@model.encoder=vit/small"]),
        ("template", ["~callbacks.media", "logger=csv", "expected={val/loss: {at_most: 1}}"]),
        ("template", ["expected.val/loss.at_most=1", "seed=3", "data.batch_size=4", "trainer.max_epochs=3"]),
        ("cogvideox_lora", ["model.lora.rank=8"]),
        ("cogvideox", ["+model/lora=default", "model.lora.rank=8", "model.lora.base=null", "task/sampler=ddim"]),
    ],
)
def test_repeated_overrides_change_nothing(name: str, overrides: list[str]):
    config, changed = resume(name, overrides, overrides)
    assert changed == []
    assert config == compose(EXPERIMENTS / name / "config.yaml", overrides)


def test_a_run_keeps_the_values_of_overrides_that_are_left_out():
    first = ["optimizer.lr=1e-4", "+debug=fast", "model.encoder.depth=1"]
    config, changed = resume("template", first, ["trainer.max_steps=20"])
    assert (config.optimizer.lr, config.model.encoder.depth, config.trainer.limit_val_batches) == (1e-4, 1, 2)
    assert [(entry["key"], entry["old"], entry["new"], entry["step"]) for entry in changed] == [
        ("trainer.max_steps", 10, 20, 7)
    ]


@pytest.mark.parametrize(
    ("override", "key", "old", "new"),
    [
        ("optimizer.lr=1e-4", "optimizer.lr", 1e-3, 1e-4),
        ("optimizer.weight_decay=.5", "optimizer.weight_decay", 0.05, 0.5),
        ("optimizer.betas=[.8,.9]", "optimizer.betas", [0.9, 0.95], [0.8, 0.9]),
        ("schedule=constant", "schedule._target_", "blueberry_video.optim.warmup_cosine", None),
        ("trainer.accumulate_grad_batches=2", "trainer.accumulate_grad_batches", 1, 2),
        ("trainer.precision=bf16-mixed", "trainer.precision", "32-true", "bf16-mixed"),
        ("data.num_workers=3", "data.num_workers", 0, 3),
        ("+callbacks.checkpoints.keep=5", "callbacks.checkpoints.keep", 2, 5),
        ("callbacks.media=null", "callbacks.media", None, None),
        ("~callbacks.media", "callbacks.media", None, None),
        ("+trainer.max_time=00:01:00:00", "trainer.max_time", None, "00:01:00:00"),
        ("+debug=fast", "trainer.max_steps", 30, 10),
        ("expected.val/loss.at_most=1", "expected.val/loss.at_most", 0.25, 1),
        ("expected.val/acc.at_least=1", "expected.val/acc", None, {"at_least": 1}),
    ],
)
def test_applied_overrides_are_recorded(override: str, key: str, old: object, new: object):
    try:
        config, changed = resume("template", [], [override])
    except ValueError:  # `+` on a key that exists
        config, changed = resume("template", [], [override.removeprefix("+")])
    [entry] = [entry for entry in changed if entry["key"] == key]
    assert old is None or entry["old"] == old
    assert new is None or entry["new"] == new
    if new is not None:
        assert OmegaConf.select(config, key) == new


@pytest.mark.parametrize(
    ("override", "key", "old", "new"),
    [
        ("seed=1", "seed", "0", "1"),
        ("model.encoder.depth=3", "model.encoder.depth", "4", "3"),
        ("task.masking.ratio=.5", "task.masking.ratio", "0.9", "0.5"),
        ("optimizer._target_=torch.optim.Adam", "optimizer._target_", "torch.optim.AdamW", "torch.optim.Adam"),
        ("data.train.size=64", "data.train.size", "512", "64"),
        ("data.batch_size=8", "data.batch_size", "16", "8"),
        ("trainer.devices=2", "trainer.devices", "1", "2"),
        ("trainer.precision=bf16-true", "trainer.precision", "32-true", "bf16-true"),
        ("callbacks=ema", "callbacks.ema", "null", "_target_"),
        ("init_from=outputs/a", "init_from", "null", "outputs/a"),
        ("task.optimization.layer_decay=.5", "task.optimization.layer_decay", "1.0", "0.5"),
        ("+trainer.limit_train_batches=2", "trainer.limit_train_batches", "nothing", "2"),
    ],
)
def test_other_overrides_raise(override: str, key: str, old: str, new: str):
    with pytest.raises(ValueError, match=rf"`{key}` = .*{new}.* {key} = .*{old}.*init_from=outputs/idea/run"):
        resume("template", [], [override])


def test_batch_size_and_devices_may_change_together():
    config, changed = resume("template", [], ["trainer.devices=2", "data.batch_size=8"])
    assert (config.trainer.devices, config.data.batch_size) == (2, 8)
    assert {entry["key"] for entry in changed} == {"data.batch_size", "trainer.devices"}


def test_moved_data_may_be_named():
    first = ["data=video_folder", "data.train.root=a"]
    config, changed = resume("quickstart", first, ["data=video_folder", "data.train.root=b"])
    assert {entry["key"]: entry["new"] for entry in changed} == {"data.train.root": "b", "data.val.root": "b"}
    assert config.data.val.root == "b"
