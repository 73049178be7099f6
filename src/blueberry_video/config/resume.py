"""Overrides of a resumed run: which keys may change, and what an override changes in the config of the run.

An override that repeats a value of the run changes nothing. One that differs takes effect from the first resumed step
if its key is in :data:`APPLIED`, and is otherwise refused.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, cast

from hydra.errors import HydraException
from omegaconf import MISSING, DictConfig, ListConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from blueberry_video.config.checks import FROM_DATA
from blueberry_video.config.compose import check_saved, compose_hydra, normalize, parse, resolve, trusted_targets
from blueberry_video.config.schema import CONF, Config
from blueberry_video.config.text import short

APPLIED = (  # keys, with everything below them; of several that match, here and in REFUSED, the longest applies
    "optimizer.lr",
    "optimizer.weight_decay",
    "optimizer.betas",
    "optimizer.eps",
    "optimizer.momentum",
    "schedule",
    "task.optimization.lr_batch_size",
    "task.sampler",
    "task.guidance",
    "task.prompts",
    "task.num_pictures",
    "trainer.max_steps",
    "trainer.max_epochs",
    "trainer.max_time",
    "trainer.min_steps",
    "trainer.min_epochs",
    "trainer.accumulate_grad_batches",  # at a position that it divides: experiment/checkpoint.py
    "trainer.precision",  # if the weights keep their dtype: _conflict
    "trainer.accelerator",
    "trainer.devices",  # if the global batch stays the same: _conflict
    "trainer.num_nodes",
    "trainer.strategy",  # a checkpoint depends on neither
    "trainer.gradient_clip_val",
    "trainer.gradient_clip_algorithm",
    "trainer.val_check_interval",
    "trainer.check_val_every_n_epoch",
    "trainer.limit_val_batches",
    "trainer.limit_test_batches",
    "trainer.log_every_n_steps",
    "trainer.num_sanity_val_steps",
    "trainer.enable_model_summary",
    "trainer.enable_progress_bar",
    "trainer.deterministic",
    "trainer.benchmark",
    "trainer.detect_anomaly",
    "trainer.profiler",
    "data.batch_size",  # if the global batch stays the same: _conflict
    "data.val_batch_size",
    "data.num_workers",
    "data.val",
    "data.test",
    "logger",
    "callbacks",
    "expected",
    "optimized_metric",
)
REFUSED = {  # key, with everything below it -> reason
    "name": "it is the folder of the run",
    "seed": "the order of the clips and all random numbers depend on it",
    "init_from": "the run started from other weights",
    "model": "the checkpoint contains the weights of this model",
    "task": "the checkpoint was trained with this objective",
    "data": "the position in the clips refers to this data",
    "optimizer": "the checkpoint contains the state of this optimizer",
    "trainer": "the checkpoint depends on it",
    "callbacks.step_seed": "the random numbers of the steps depend on it",
    "callbacks.ema": "the checkpoint contains averaged weights only if the run had the callback from its start",
    "callbacks.ema.decay": "",
    "callbacks.ema.warmup": "",
    "callbacks.checkpoints._target_": "this callback restores the position of the run",
}
MOVED = ("root", "folder", "cache", "cache_gb", "cache_fetch")  # of data: the number of clips is checked at the start
OF_A_CALL = ("resume", "check", "enforce_expected", "output_dir", "allow_targets")  # not part of a run


class Change(NamedTuple):
    """Key of a config with a different value in a resumed run.

    Attributes:
        key: the full key.
        old, new: its values; :data:`ABSENT` where the key does not exist.
    """

    key: tuple[str, ...]
    old: Any
    new: Any

    @property
    def name(self) -> str:
        return ".".join(map(str, self.key))

    def record(self, step: int) -> dict[str, Any]:
        """Returns the change as ``run.json`` stores it, see :func:`repeat`."""
        entry = {"key": self.name, "path": list(self.key), "old": _plain(self.old), "new": _plain(self.new)}
        return {**entry, "step": step, **({"removed": True} if self.new is ABSENT else {})}

    def __str__(self) -> str:
        return f"{self.name}: {_shown(self.old)} -> {_shown(self.new)}"


class _Absent:
    """Value of a key that does not exist."""

    def __repr__(self) -> str:
        return "absent"


ABSENT = _Absent()


def defaults(file: str | Path, conf: Path = CONF) -> dict[str, Any] | None:
    """Returns the values of an experiment, or of a config saved by a run, without overrides.

    Values that only overrides complete are :data:`MISSING`; the result is None if the file needs them to be composed.
    """
    path = Path(file).resolve()
    content = OmegaConf.load(path)
    try:
        config = compose_hydra(path, [], conf)[0] if "defaults" in content else content
        full = OmegaConf.merge(OmegaConf.structured(Config), config)
    except (HydraException, OmegaConfBaseException):
        return None
    return cast(dict[str, Any], _resolvable(full))


def _resolvable(node: Any) -> Any:
    """Converts a node to plain values; those that cannot be resolved become :data:`MISSING`."""
    if isinstance(node, ListConfig):
        try:
            return OmegaConf.to_container(node, resolve=True, throw_on_missing=True)
        except OmegaConfBaseException:
            return MISSING
    if not isinstance(node, DictConfig) or node._is_none():
        return None if isinstance(node, DictConfig) else node
    values = {}
    for key in node:
        try:
            values[key] = _resolvable(node[key])
        except OmegaConfBaseException:
            values[key] = MISSING
    return values


def override_paths(overrides: Sequence[str]) -> list[tuple[str, ...]]:
    """Returns the keys that overrides set or delete; for the choice of a group, the key of the group."""
    paths = []
    for override in parse(overrides):
        path = tuple((override.package or override.key_or_group).replace("/", ".").split("."))
        paths += [(*path, *below) for below in _leaf_paths(None if override.is_delete() else override.value())]
    return paths


def _leaf_paths(value: Any) -> list[tuple[str, ...]]:
    if not isinstance(value, dict) or not value:
        return [()]
    return [(str(key), *below) for key, item in value.items() for below in _leaf_paths(item)]


def resumed(
    saved: DictConfig,
    fresh: DictConfig,
    defaults: Mapping[str, Any] | None,
    overrides: Sequence[str],
    run: str | Path,
    has_weights: bool = True,
) -> tuple[DictConfig, list[Change]]:
    """Returns the config of a resumed run with the overrides of the command line, and what they change.

    Args:
        saved: the config of the run.
        fresh: the experiment with the overrides.
        defaults: the experiment without them, see :func:`defaults`. Keys with a
            different value in ``fresh`` were set by an override, directly or by a file that it chooses.
        overrides: the words of the command line.
        run: the folder of the run.
        has_weights: whether it has a checkpoint.

    Raises:
        ValueError: for a change of a key that must not change, or a config that is not valid in this version.
    """
    overrides = normalize(overrides)
    before: Any = OmegaConf.to_container(saved, resolve=True)
    old: Any = OmegaConf.to_container(saved, resolve=True)
    new: Any = OmegaConf.to_container(fresh, resolve=True)
    paths = [*override_paths(overrides), *(_differences(defaults, new) if defaults is not None else ())]
    changed: dict[tuple[str, ...], Change] = {}
    for path in paths:
        path = _existing(old, path)
        for key in _differences(_select(old, path), _select(new, path), path):
            of_data = key[-1] == FROM_DATA and _select(new, key) is None  # the run has the numbers of its data
            if key[0] not in OF_A_CALL and not of_data:
                changed[key] = Change(key, _select(old, key), _select(new, key))
    changes = [change for key, change in changed.items() if not any(key[:n] in changed for n in range(1, len(key)))]
    check_saved(saved, run)
    for change in changes:
        _set(old, change.key, change.new)
    start = f"start a new run from its weights, without resume and with init_from={run}"
    _refuse(changes, before, old, start if has_weights else "start a new run, without resume")
    mode = {key: new[key] for key in OF_A_CALL if key in new}
    return resolve(OmegaConf.create({**old, **mode}), allow=trusted_targets(overrides)), changes


def repeat(config: DictConfig, sessions: Sequence[Mapping[str, Any]]) -> DictConfig:
    """Returns the config of a run after the changes that its ``resumes`` in ``run.json`` record."""
    plain: Any = OmegaConf.to_container(config)
    for session in sessions:
        for entry in session.get("changed", ()):
            _set(plain, tuple(entry["path"]), ABSENT if entry.get("removed") else entry["new"])
    return OmegaConf.create(plain)


def _refuse(changes: Sequence[Change], old: Mapping[str, Any], new: Mapping[str, Any], fix: str) -> None:
    conflicts = [(change, reason) for change in changes if (reason := _conflict(change, old, new))]
    if not conflicts:
        return
    change, reason = conflicts[0]
    others = ", ".join(f"`{other}`" for other, _ in conflicts[1:4])
    more = f" The same applies to {others}{' and more' if len(conflicts) > 4 else ''}." if others else ""
    raise ValueError(
        f"`{change.name}` = {_shown(change.new)} cannot be applied to the resumed run, which has {change.name} = "
        f"{_shown(change.old)}: {reason}.{more} Leave the override out to continue the run, or {fix}."
    )


def _conflict(change: Change, old: Mapping[str, Any], new: Mapping[str, Any]) -> str:
    """Returns the reason why a key must not change; empty if it may."""
    name = change.name
    if name == "trainer.precision" and _weights(change.old) != _weights(change.new):
        return f"it changes the dtype of the weights and of the optimizer state from {_weights(change.old)} bits"
    if name in ("data.batch_size", "trainer.devices", "trainer.num_nodes"):
        clips = [_global_batch(config) for config in (old, new)]
        if None not in clips and clips[0] != clips[1]:
            return f"the position in the clips refers to global batches of {clips[0]} clips, not {clips[1]}"
        return ""
    if change.key[0] == "data" and change.key[-1] in MOVED:
        return ""
    applied = max((len(key) for key in APPLIED if _inside(name, key)), default=0)
    refused = max((key for key in REFUSED if _inside(name, key)), key=len, default="")
    return REFUSED[refused] if len(refused) > applied else ""


def _inside(name: str, key: str) -> bool:
    return name == key or name.startswith(f"{key}.")


def _weights(precision: Any) -> str:
    """Returns the format of the weights: "64", "32", "bf16" or "16"."""
    text = str(precision)
    return text.removesuffix("-true") if text.endswith("-true") else "64" if text == "64" else "32"


def _global_batch(config: Mapping[str, Any]) -> int | None:
    """Returns the clips of a batch of all processes; None if the number of devices is not in the config."""
    trainer, batch_size = config.get("trainer", {}), config.get("data", {}).get("batch_size")
    devices = trainer.get("devices", 1)
    number = len(devices) if isinstance(devices, list) else int(devices) if str(devices).isdigit() else None
    if number is None or not isinstance(batch_size, int):
        return None
    strategy = trainer.get("strategy")
    sharing = strategy.get("sequence_parallel", 1) if isinstance(strategy, Mapping) else 1  # processes with equal clips
    return batch_size * number * int(trainer.get("num_nodes") or 1) // sharing


def _differences(old: Any, new: Any, path: tuple[str, ...] = ()) -> list[tuple[str, ...]]:
    """Returns the keys with different values in nested mappings."""
    if not (isinstance(old, Mapping) and isinstance(new, Mapping)):
        return [] if old is new or old == new else [path]
    keys = dict.fromkeys([*old, *new])
    return [found for key in keys for found in _differences(old.get(key, ABSENT), new.get(key, ABSENT), (*path, key))]


def _existing(config: Any, path: tuple[str, ...]) -> tuple[str, ...]:
    """Returns the shortest beginning of a path that has no value or a value without keys; otherwise the path."""
    return next((path[:n] for n in range(1, len(path)) if not isinstance(_select(config, path[:n]), Mapping)), path)


def _select(config: Any, path: tuple[str, ...]) -> Any:
    for part in path:
        if not isinstance(config, Mapping):
            return ABSENT
        config = config.get(part, ABSENT)
    return config


def _set(config: dict, path: tuple[str, ...], value: Any) -> None:
    for part in path[:-1]:
        config = config[part]
    if value is ABSENT:
        config.pop(path[-1], None)
    else:
        config[path[-1]] = value


def _plain(value: Any) -> Any:
    return None if value is ABSENT else value


def _shown(value: Any) -> str:
    return "nothing" if value is ABSENT else short(value)
