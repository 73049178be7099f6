"""Composition of an experiment and its overrides into a resolved and validated config.

Errors of Hydra are converted to one paragraph that names the key, its value and the fix.
"""

import difflib
import functools
import itertools
import re
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any, cast

import yaml
from hydra import compose as hydra_compose
from hydra import initialize_config_dir
from hydra.core.config_store import ConfigStore
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Glob, IntervalSweep, Override
from hydra.errors import HydraException, MissingConfigException
from omegaconf import DictConfig, ListConfig, MissingMandatoryValue, OmegaConf, open_dict
from omegaconf.errors import ConfigKeyError, OmegaConfBaseException

from blueberry_video.config import advice, safety
from blueberry_video.config.checks import ROOT_KEYS, SPECIAL, check, check_groups, fix, targets
from blueberry_video.config.groups import choices_of, chosen, groups_of, is_group, misspelt_group
from blueberry_video.config.schema import CONF, Config
from blueberry_video.config.signatures import signature
from blueberry_video.config.text import did_you_mean, explain_yaml, first_line, short, shown
from blueberry_video.installation import start_command


def _default_steps(max_epochs: int | None, steps: int) -> int:
    """Resolver of ``${default_steps:…}``: -1, no limit, where ``trainer.max_epochs`` ends the run."""
    return steps if max_epochs in (None, -1) else -1


OmegaConf.register_new_resolver("default_steps", _default_steps, replace=True)


def register_schema() -> None:
    """Registers ``Config`` with Hydra as ``root``, the first default of conf/train.yaml."""
    ConfigStore.instance().store(name="root", node=Config)


def compose(file: str | Path, overrides: Sequence[str] = (), conf: Path = CONF) -> DictConfig:
    """Composes the config of an experiment with ``conf/`` and overrides, and returns it resolved and validated.

    Raises:
        FileNotFoundError: the experiment does not exist; the message names the nearest one.
        ValueError: for an error in a file or an override; the message is one paragraph with key, value and fix.
    """
    path = Path(file).resolve()
    if not path.is_file():
        folder = path.parent
        others = sorted(other.parent.name for other in folder.parent.glob(f"*/{path.name}"))
        hint = did_you_mean(folder.name, others) if others else f"`{start_command('new', folder.name)}` creates one."
        raise FileNotFoundError(f"there is no experiment {folder.name!r}: {shown(path)} does not exist. {hint}")
    return _compose(path, normalize(overrides), conf, saved=False)


def load(file: str | Path, overrides: Sequence[str] = (), trusted: bool = False) -> DictConfig:
    """Loads the config saved by a run, applies overrides and validates the result.

    Args:
        file: the config.yaml of a run folder.
        overrides: ``key=value``; additions and deletions that the run already had change nothing.
        trusted: whether ``allow_targets`` of the file applies, as for the ranks of a checked config.

    Raises:
        FileNotFoundError: the file does not exist.
        ValueError: as ``compose``.
    """
    path = Path(file).resolve()
    if not path.is_file():
        raise FileNotFoundError(f"there is no config file {path}: give the config.yaml of a run folder.")
    parsed = parse(normalize(overrides))
    _check_file(path, saved=True)
    saved = OmegaConf.load(path)
    check_saved(saved, path.parent)
    lines = []
    for override in parsed:
        key, line = override.key_or_group, override.input_line or ""
        if not (override.is_delete() and OmegaConf.select(saved, key) is None):
            lines.append(f"+{line}" if override.is_add() else line)
    own = saved.get("allow_targets") if trusted and isinstance(saved, DictConfig) else None
    config = _compose(path, lines, CONF, saved=True, allow=tuple(own or ()))
    return resolve(config, allow=(*safety.trusted_targets(parsed), *(own or ())))


def check_saved(saved: Any, run: str | Path) -> None:
    """Checks that the classes and their keys in the config of a run still exist.

    Args:
        saved: the config.
        run: the folder of the run.

    Raises:
        ValueError: some were renamed since, or the file was edited; the message says how to continue.
    """
    package = f"{__name__.partition('.')[0]}."
    for key, node in targets(saved, ""):
        if not node["_target_"].startswith(package):
            continue
        try:
            unknown = sorted({*map(str, node)} - {*signature(node["_target_"]).parameters, *SPECIAL})
        except (ImportError, AttributeError):
            unknown = ["_target_"]
        if unknown:
            name = f"{key}.{unknown[0]}".lstrip(".")
            raise ValueError(
                f"`{name}` = {short(node[unknown[0]])} in {run}/config.yaml is not valid in this version, "
                f"which may have moved or renamed it (the class is {node['_target_']}). To resume a run of an earlier "
                "version, check out the commit in its run.json (`git checkout <commit>`); to train from its weights, "
                f"compose the experiment anew with init_from={run}."
            )


def expand_sweep(overrides: Sequence[str], file: Path | None = None, conf: Path = CONF) -> list[list[str]]:
    """Returns the overrides of every job of a sweep: all combinations of ``key=a,b``, ``range(…)`` and ``glob(…)``.

    An interval, which only some sweepers support, is represented by its start.

    Args:
        overrides: overrides of the sweep.
        file: the config of the experiment; its folder may contain further choices of a group.
        conf: folder of the groups.

    Raises:
        ValueError: an override cannot be parsed, or a glob matches nothing.
    """
    choices = []
    for override in parse(overrides):
        assert override.input_line is not None
        key, value = override.get_key_element(), override.value()
        if isinstance(value, Glob):
            options = [name for name in choices_of(override.key_or_group, file or conf, conf) if "/" not in name]
            values = value.filter(options)
            if not values:
                raise ValueError(
                    f"`{override.input_line}` matches no choice of `{override.key_or_group}`: write the values, as in "
                    f"`{key}=a,b`. The choices are: {', '.join(options) or 'none'}."
                )
        elif isinstance(value, IntervalSweep):
            values = [str(value.start)]
        else:
            values = list(override.sweep_string_iterator()) if override.is_sweep_override() else []
        choices.append([f"{key}={value}" for value in values] or [override.input_line])
    return [list(job) for job in itertools.product(*choices)]


def normalize(overrides: Sequence[str]) -> list[str]:
    """Returns overrides that Hydra accepts and that mean what they say; idempotent.

    ``expected.val/loss.at_most=1`` becomes ``++expected={val/loss: {at_most: 1}}``, because a key of Hydra has no
    slash. ``trainer.max_epochs=3`` without ``trainer.max_steps`` removes the limit of steps.
    """
    lines = []
    for line in overrides:
        bound = re.fullmatch(r"\+{0,2}expected\.([\w/.@-]*/[\w/@-]+)\.(\w+)=([^,{}\[\]()]+)", line)
        lines.append(f"++expected={{{bound[1]}: {{{bound[2]}: {bound[3]}}}}}" if bound else line)
    values = dict(line.lstrip("+~").partition("=")[::2] for line in lines)
    if values.get("trainer.max_epochs", "-1") != "-1" and not values.keys() & {"trainer.max_steps", "debug"}:
        lines.append("++trainer.max_steps=-1")
    return lines


def sweep_settings(file: str | Path, overrides: Sequence[str], conf: Path = CONF) -> tuple[str, str]:
    """Returns ``hydra.sweep.dir`` and the name of the sweeper, given the overrides of the first job of a sweep,
    including those of Hydra."""
    config, settings = compose_hydra(Path(file).resolve(), overrides, conf)
    full = OmegaConf.create({**_plain(config), "hydra": _plain(settings)})
    return str(full.hydra.sweep.dir), str(full.hydra.runtime.choices["hydra/sweeper"])


def _compose(file: Path, overrides: Sequence[str], conf: Path, saved: bool, allow: tuple[str, ...] = ()) -> DictConfig:
    parsed = parse(overrides)
    for override in parsed:
        line, key = override.input_line, override.key_or_group
        if override.is_sweep_override():
            single = f"`{key}=[…]` if it is a list, `\"{key}='…'\"` if it is text"
            if is_group(override, file, conf):
                single = f"one of its choices: {', '.join(choices_of(key, file, conf))}"
            raise ValueError(
                f"`{line}` sets several values in a single run: write {single}, or run every value "
                f"with `{start_command('sweep', '…', SWEEP=line or '')}`."
            )
        if override.value() is None and not override.is_delete() and is_group(override, file, conf):
            hint = " Single callbacks are disabled with `callbacks.media=null`." if key == "callbacks" else ""
            raise ValueError(
                f"`{line}`: null is not a choice of `{key}`: write one of {', '.join(choices_of(key, file, conf))}"
                f"{', as in `logger=csv` for metrics.csv only' if key == 'logger' else ''}.{hint}"
            )
        if isinstance(override.value(), bool | int | float) and is_group(override, file, conf):
            raise ValueError(
                f"`{line}`: `{key}` is a group, and {override.value()} is not one of its choices: "
                f"{', '.join(choices_of(key, file, conf))}. A key below it is set with `{key}.<key>=…`."
            )
        root, _, below = key.partition("/")
        if below and override.package == root and (conf / key).is_dir():
            raise ValueError(_one_choice(line or "", root, f"{below}/{override.value()}"))
        if below and root in ROOT_KEYS and not choices_of(key, file, conf):
            raise ValueError(_explain_group(override, file, parsed, conf, allow))
        if group := misspelt_group(override, conf):
            raise ValueError(f"`{line}`: conf/ has no group `{key}`. Did you mean `+{group}={override.value()}`?")
        if override.is_hydra_override():
            raise ValueError(
                f"`{line}`: a single run has no Hydra settings; set the folder of runs with `output_dir=…`."
            )
    _check_file(file, saved)
    try:
        config, settings = compose_hydra(file, overrides, conf)
    except (HydraException, OmegaConfBaseException) as error:
        message = _explain_deletion(file, parsed, conf, allow) or _explain_links(file, parsed, conf, saved)
        message = message or _explain_sections(file, parsed, conf, saved)
        raise ValueError(message or _explain(error, file, parsed, conf, saved)) from error
    except yaml.YAMLError as error:
        raise ValueError(explain_yaml(error)) from error
    adding = any("." in o.key_or_group and (o.is_add() or o.is_force_add()) for o in parsed)
    if adding and (found := _explain_links(file, parsed, conf, saved)):  # Hydra would replace the reference
        raise ValueError(found)
    if not saved:  # a saved config is a single run, which uses no settings of Hydra
        _check_hydra(settings, file, conf)
    try:
        resolved = resolve(config, shown(file), (*allow, *safety.trusted_targets(parsed)))
    except ValueError as error:  # also of interpolations into the section
        found = _explain_deletion(file, parsed, conf, allow) or _explain_sections(file, parsed, conf, saved)
        raise (ValueError(found) if found else error) from error
    if any(o.is_delete() for o in parsed) and (found := _explain_deletion(file, parsed, conf, allow, resolved)):
        raise ValueError(found)
    return resolved


def resolve(config: DictConfig, origin: str = "the config", allow: tuple[str, ...] = ()) -> DictConfig:
    """Resolves all interpolations of a composed config, adds the defaults of the schema, and validates the result.

    Args:
        config: the composed config.
        origin: name of the file in messages.
        allow: names that ``_target_`` may have in addition; see :func:`trusted_targets`.

    Raises:
        ValueError: as ``compose``.
    """
    known = all(key in ROOT_KEYS for key in config)  # for an unknown key, `check` has a better message than merge
    try:
        full = OmegaConf.merge(OmegaConf.structured(Config), config) if known else config
        if known:  # first, because other values may refer to a missing group
            check_groups(cast(DictConfig, full))
        plain = cast(dict[str, Any], OmegaConf.to_container(full, resolve=True, throw_on_missing=True))
    except MissingMandatoryValue as error:
        key = error.full_key or error.key
        raise ValueError(
            f"`{key}` has no value: write `{key}=…` on the command line, or `{key}: …` in {origin}."
        ) from error
    except OmegaConfBaseException as error:
        if "'model.encoder." in str(error) and (message := advice.encoder(full, str(error.full_key))):
            raise ValueError(message) from error
        raise ValueError(f"`{error.full_key}` in {origin} cannot be resolved: {first_line(error)}.") from error
    check(plain, allow)
    return OmegaConf.create(plain)


def trusted_targets(overrides: Sequence[str]) -> tuple[str, ...]:
    """Returns the names that the overrides or the environment add to the valid targets.

    Raises:
        ValueError: an override cannot be parsed.
    """
    return safety.trusted_targets(parse(overrides))


def compose_hydra(file: Path, overrides: Sequence[str], conf: Path) -> tuple[DictConfig, DictConfig]:
    """Composes with Hydra, and returns the config and the settings of Hydra.

    Files in the experiment's folder take precedence over those of ``conf/``.
    """
    register_schema()
    searchpath = "hydra.searchpath=['file://{}']".format(str(conf).replace("'", "\\'"))
    with initialize_config_dir(str(file.parent), version_base="1.3"):
        config = hydra_compose(file.stem, overrides=[searchpath, *overrides], return_hydra_config=True)
    with open_dict(config):
        settings = config.pop("hydra")
    return config, settings


def _check_hydra(settings: DictConfig, file: Path, conf: Path) -> None:
    """Checks the settings of Hydra, from any file, against those of ``conf/`` with the same launcher, sweeper, …"""
    choices = {key: str(value) for key, value in settings.runtime.choices.items() if value is not None}
    chosen = tuple(sorted(f"{key}={value}" for key, value in choices.items() if key.startswith("hydra/")))
    try:
        trusted = _own_hydra(conf, chosen)
    except HydraException as error:
        raise ValueError(
            f"the settings of Hydra in {shown(file)} ({', '.join(chosen)}) cannot be composed without the experiment: "
            f"choose those of Hydra and its installed plugins ({first_line(error)})."
        ) from error
    safety.check_hydra(_plain(settings), trusted, f"{shown(file)} or a file that it includes")


@functools.lru_cache(maxsize=8)
def _own_hydra(conf: Path, chosen: tuple[str, ...]) -> dict[str, Any]:
    return _plain(compose_hydra(conf / "train.yaml", chosen, conf)[1])


def _plain(node: DictConfig) -> dict[str, Any]:
    return cast(dict[str, Any], OmegaConf.to_container(node, resolve=False))


def parse(overrides: Sequence[str]) -> list[Override]:
    parsed = []
    for line in overrides:
        if line.startswith("-"):
            raise ValueError(
                f"`{line}` is an option, and only overrides are taken here: write `key=value`, `+key=value` or `~key`. "
                f"A sweep is started with `{start_command('sweep')}`."
            )
        if bound := re.fullmatch(r"([~+]*)expected\.([^=\s]*/[^=\s]*)(=\S*)?", line):
            metric, value = bound[2].partition(".")[0], (bound[3] or "=…").removeprefix("=")
            raise ValueError(
                f"`{line}`: `expected.{metric}` has the bounds at_least and at_most: write "
                f"`expected.{metric}.at_most={value}`. The command line cannot delete a key with a slash; `~expected` "
                "deletes all of them."
            )
        if line.startswith(".") or ".." in line.partition("=")[0]:
            dotted = re.sub(r"\.+", ".", line.partition("=")[0]).strip(".")
            raise ValueError(f"`{line}`: a key has no dot at its ends and no two in a row: write `{dotted}=…`.")
        try:
            [override] = OverridesParser.create().parse_overrides([line])
        except HydraException as error:
            raise ValueError(
                f"`{line}` cannot be parsed: write `key=value` without spaces around `=`; close quotes and brackets; "
                "quote a value that contains spaces, commas, colons, `=`, brackets or quotes twice, because the shell "
                'and ARGS remove one pair: `"key=\'a, b\'"`, and `ARGS="\\"key=\'a, b\'\\""`.'
            ) from error
        key = override.get_key_element()
        if not override.key_or_group:
            raise ValueError(f"`{line}` has no key: write `key=value`.")
        if line.endswith("=") and not override.is_delete():
            raise ValueError(
                f"`{line}` has no value: write `{key}=…`; `{key}=null` is None, `{key}=''` an empty string."
            )
        parsed.append(override)
    return parsed


def _check_file(file: Path, saved: bool) -> None:
    """Checks that the file is valid YAML, and that the defaults of an experiment contain ``train`` and ``_self_``."""
    try:
        safety.check_tags(file, shown(file))
        content = OmegaConf.load(file)
    except yaml.YAMLError as error:
        raise ValueError(explain_yaml(error, file)) from error
    if not isinstance(content, DictConfig):
        raise ValueError(f"{shown(file)} must be a YAML mapping of keys to values.")
    if isinstance(own := content.get("hydra"), DictConfig):  # before Hydra reads `searchpath` from it
        safety.check_hydra(_plain(own), {}, shown(file))
    if saved:
        return
    defaults = content.get("defaults")
    if not isinstance(defaults, ListConfig) or "train" not in defaults or "_self_" not in defaults:
        raise ValueError(
            f"`defaults` in {shown(file)} must be a list that begins with `- train` and ends with `- _self_`: without "
            "the first, the config is incomplete; without the last, the values of conf/ override those of the "
            "experiment. See experiments/template/config.yaml."
        )


# ---- messages for errors of Hydra ------------------------------------------------------------------------------------


def _explain(error: Exception, file: Path, overrides: Sequence[Override], conf: Path, saved: bool) -> str:
    """Message for a failed composition, in one paragraph."""
    if isinstance(error, MissingConfigException):
        return _explain_choice(error, file, overrides, conf)
    groups = [override for override in overrides if is_group(override, file, conf)]
    if groups and saved:
        line, key = groups[0].input_line, groups[0].key_or_group
        return f"`{line}`: a saved config has no groups. Set single keys: `{key}.<key>=<value>`."
    try:
        base, _ = compose_hydra(file, [override.input_line or "" for override in groups], conf)
    except (HydraException, OmegaConfBaseException) as deeper:  # the error is in a file or in the choice of a group
        return _explain_file(deeper, file, groups, conf)
    for override in overrides:
        if override not in groups and (message := _explain_override(override, base)):
            return message
    return _explain_value(error, overrides)


def _explain_choice(error: MissingConfigException, file: Path, overrides: Sequence[Override], conf: Path) -> str:
    """Message for a choice that is not a file of conf/."""
    missing = str(error.missing_cfg_file)
    chosen = ((override.key_or_group, str(override.value())) for override in overrides)
    default = (missing.partition("/")[0], missing.partition("/")[2])
    group, choice = next((pair for pair in chosen if missing.endswith("/".join(pair))), default)
    if not choice:
        known = did_you_mean(group, (path.stem for path in conf.glob("*.yaml")))
        return f"`{group}` in the `defaults` of {shown(file)} is not a file of conf/. {known}"
    choices = choices_of(group, file, conf)
    if not choices:
        return f"`{group}={choice}`: conf/ has no group `{group}`. {did_you_mean(group, groups_of(conf))}"
    near = difflib.get_close_matches(choice, choices, n=1, cutoff=0.5)
    hint = f"Did you mean `{near[0]}`? Write `{group}={near[0]}`, or `{group}: {near[0]}` in YAML. " if near else ""
    return f"`{group}={choice}`: there is no conf/{group}/{choice}.yaml. {hint}The choices are: {', '.join(choices)}."


def _explain_override(override: Override, base: DictConfig) -> str | None:
    """Message for an invalid override of a config that composes without it; None if the override is valid."""
    line, full = override.input_line, override.key_or_group
    parts = full.split(".")
    value = None if override.is_delete() else override.value()
    node: Any = base
    for depth, part in enumerate(parts):
        if isinstance(node, DictConfig) and part in list(node):  # `in node` is False for `???`
            node = None if OmegaConf.is_missing(node, part) else node[part]
            continue
        if isinstance(node, ListConfig) and part.isdigit() and int(part) < len(node):
            node = node[int(part)]
            continue
        if override.is_add() or override.is_force_add():
            return None
        path = ".".join(parts[:depth])
        options = _options(node, path)
        if override.is_delete():
            return f"`{line}`: the config has no key `{full}` to delete. {did_you_mean(part, options)}"
        if parts[0] == "expected" and parts[1:]:
            return f"`{line}`: `expected` has no key `{parts[1]}` yet: write `+{line}` to add it."
        if part in options:
            return f"`{line}`: no file sets `{'.'.join(parts[: depth + 1])}`: write `+{line}` to add it."
        if not isinstance(node, DictConfig):
            added = f" Write `+{line}` to set it." if node is None and path.endswith(".num_classes") else ""
            return f"`{line}`: `{path}` = {short(node)} is a value and has no key `{part}`.{added}"
        rest = "".join(f".{later}" for later in parts[depth + 1 :])
        return f"`{line}`: the config has no key `{full}`. {fix(part, options, value, path, node, rest)}"
    if override.is_add() and not isinstance(value, dict | list):
        return f"`{line}`: `{full}` is already set: write it without the plus."
    return None


def _explain_links(file: Path, overrides: Sequence[Override], conf: Path, saved: bool) -> str | None:
    """Message for the first override of a key in a section that a valid config refers to, as ``${…}``."""
    keys = [o for o in overrides if not is_group(o, file, conf)]
    try:
        rest = [o.input_line or "" for o in overrides if o not in keys]
        base = compose_hydra(file, rest, conf)[0] if not saved else OmegaConf.load(file)
    except (HydraException, OmegaConfBaseException):
        return None
    return next(filter(None, (advice.link(override, base) for override in keys)), None)


def _explain_sections(file: Path, overrides: Sequence[Override], conf: Path, saved: bool) -> str | None:
    """Message for the first override that replaces a section of a valid config with a number or text."""
    scalars = [o for o in overrides if not o.is_delete() and isinstance(o.value(), bool | int | float | str)]
    single = [o for o in scalars if not is_group(o, file, conf)]
    if not single:
        return None
    rest = [o.input_line or "" for o in overrides if o not in single]
    try:
        base = compose_hydra(file, rest, conf)[0] if not saved else OmegaConf.load(file)
    except (HydraException, OmegaConfBaseException):
        return None
    for override in single:
        node: Any = base
        for part in override.key_or_group.split("."):
            node = dict(node.items_ex(resolve=False)).get(part) if isinstance(node, DictConfig) else None
        if isinstance(node, DictConfig) and not node._is_none() and len(node):
            items = {str(name): item for name, item in node.items_ex(resolve=False)}
            return advice.section(override.input_line or "", override.key_or_group, items, override.value())
    return None


def _explain_group(
    override: Override, file: Path, overrides: Sequence[Override], conf: Path, allow: tuple[str, ...]
) -> str:
    """Message for the choice of a group that this config does not have."""
    rest = [other.input_line or "" for other in overrides if other is not override]
    try:
        config, settings = compose_hydra(file, rest, conf)
    except (HydraException, OmegaConfBaseException):
        return f"`{override.input_line}`: the config has no group `{override.key_or_group}`, and other overrides fail."
    choices = chosen(settings)
    works = partial(_is_valid, file, rest, conf, allow)
    return advice.group(override, cast(dict[str, Any], OmegaConf.to_container(config)), choices, works)


def _explain_deletion(
    file: Path, overrides: Sequence[Override], conf: Path, allow: tuple[str, ...], config: DictConfig | None = None
) -> str:
    """Message for the deletion of a key that the config requires; empty if there is none.

    Args:
        file, overrides, conf, allow: see :func:`_compose`.
        config: the config, if it is valid: then only the deletion of the target of an object is an error.
    """
    deletions = [override for override in overrides if override.is_delete() or override.value() is None]
    rest = [override.input_line or "" for override in overrides if override not in deletions]
    if not deletions or not _is_valid(file, rest, conf, allow):
        return ""
    base, settings = compose_hydra(file, rest, conf)
    before = cast(dict[str, Any], OmegaConf.to_container(base))
    works: advice.Works = partial(_is_valid, file, rest, conf, allow)
    if config is not None:
        lost = {key.lstrip(".") for key, _ in targets(before, "") if advice.is_lost(config, key.lstrip("."))}
        deletions = [o for o in deletions if {(o.package or o.key_or_group).replace("/", "."), _parent(o)} & lost]
        works = lambda line: False  # noqa: E731
    return advice.deletion(deletions, before, chosen(settings), works)


def _parent(override: Override) -> str:
    return override.key_or_group.rpartition(".")[0]


def _is_valid(file: Path, rest: Sequence[str], conf: Path, allow: tuple[str, ...], line: str = "") -> bool:
    """Returns whether overrides, and one more, compose to a valid config."""
    lines = [*rest, *([line] if line else [])]
    try:
        config, _ = compose_hydra(file, lines, conf)
        resolve(config, allow=(*allow, *safety.trusted_targets(parse(lines))))
    except (HydraException, OmegaConfBaseException, ValueError):
        return False
    return True


def _options(node: Any, path: str) -> list[str]:
    """Valid keys of a node: the keys that it has and the parameters of its target."""
    if not path:
        return list(ROOT_KEYS)
    if not isinstance(node, DictConfig):
        return []
    target = node.get("_target_")
    return sorted({*map(str, node), *(signature(target).parameters if isinstance(target, str) else ())})


def _one_choice(line: str, root: str, choice: str) -> str:
    return f"`{line}`: `{root}` has one choice, of all files below conf/{root}/: write `{root}={choice}`."


def _explain_file(error: Exception, file: Path, groups: Sequence[Override], conf: Path) -> str:
    """Message for an error in a YAML file (root key, type, default), or for a group that is not in the defaults."""
    cause = _omegaconf_cause(error)
    if cause is not None and cause.full_key:
        source = f"in {shown(file)}, or in a file of conf/ that it includes"
        root = str(cause.full_key).partition(".")[0]
        if root not in (*ROOT_KEYS, "hydra"):
            return f"`{root}` {source}, is not a root key. {did_you_mean(root, ROOT_KEYS)}"
        return f"`{cause.full_key}` {source}, is invalid: {first_line(cause)}."
    for override in groups:
        line, key = override.input_line or "", override.get_key_element()
        root, _, below = override.key_or_group.partition("/")
        renamed = f"{below}/{override.value()}"
        is_part = root == "task"  # its folders contain parts of tasks
        if below and override.package is None and not is_part and renamed in choices_of(root, file, conf):
            return _one_choice(line, root, renamed)
        if override.is_add() and ("Multiple values" in str(error) or "more than once" in str(error)):
            return f"`{line}`: the config already has a `{key[1:]}`: write it without the plus, `{line[1:]}`."
        meant = re.search(r"Did you mean to override ([^\s?]+)", str(error))
        if meant and (len(groups) == 1 or f"'{key.lstrip('+')}'" in str(error)):
            return (
                f"`{line}`: this group has the name `{meant[1]}` in the config: write `{meant[1]}={override.value()}`."
            )
        if not key.startswith("+") and f"'{key}'" in str(error) and below:
            return _explain_group(override, file, groups, conf, ())
        if not key.startswith("+") and f"'{key}'" in str(error):
            return f"`{line}`: the group `{override.key_or_group}` is not in the defaults: write `+{line}` to add it."
    words = [word for word in re.findall(r"'([^']+)'", str(error)) if word != file.stem and word not in groups_of(conf)]
    hint = did_you_mean(words[0], groups_of(conf)) if words else ""
    return f"the `defaults` of {shown(file)} cannot be composed: {first_line(error)}. {hint}".strip()


def _explain_value(error: Exception, overrides: Sequence[Override]) -> str:
    """Message for a value that the schema rejects, e.g. ``seed=abc``."""
    cause = _omegaconf_cause(error)
    if cause is None:
        return f"the overrides cannot be applied: {first_line(error)}."
    key = str(cause.full_key)
    line = next((override.input_line for override in overrides if key.startswith(override.key_or_group)), key)
    if isinstance(cause, ConfigKeyError) and isinstance(cause.parent_node, DictConfig):
        parent, _, word = key.rpartition(".")
        if parent.partition(".")[0] == "expected" and line != key:
            return f"`{line}`: `expected` has no key `{word}` yet: write `'+{line}'` to add it."
        if parent == "model.num_classes":
            others = " ".join(f"~{parent}.{label!s}" for label in cause.parent_node)
            return (
                f"`{line}`: `{parent}` has the labels {', '.join(map(str, cause.parent_node))}, with which it is "
                f"merged: to replace them, write `{others} +{key}=8`, with the number of classes of `{word}`."
            )
        hint = fix(word, _options(cause.parent_node, parent), None, parent, cause.parent_node)
        return f"`{line}`: the config has no key `{key}`. {hint}"
    return f"`{line}` is invalid: {first_line(cause)}."


def _omegaconf_cause(error: BaseException | None) -> OmegaConfBaseException | None:
    while error is not None and not isinstance(error, OmegaConfBaseException):
        error = error.__cause__ or error.__context__
    return error
