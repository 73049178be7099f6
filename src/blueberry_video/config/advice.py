"""Advice for overrides of groups and for deletions: each suggested override composes to a valid config."""

import difflib
import re
from collections.abc import Callable, Mapping, Sequence
from inspect import Parameter
from typing import Any

from hydra.core.override_parser.types import Override
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from blueberry_video.config.checks import SPECIAL
from blueberry_video.config.signatures import signature
from blueberry_video.config.text import short

Works = Callable[[str], bool]
"""Returns whether the config is valid with an override in place of the invalid one."""


def find(node: Any, key: str) -> Any:
    """Returns the value of a full key in nested mappings; None if it does not exist."""
    for part in key.split("."):
        node = node.get(part) if isinstance(node, Mapping) else None
    return node


def is_lost(config: Any, key: str) -> bool:
    """Returns whether a mapping with a target has become one without a target, but with other keys."""
    node = find(config, key)
    return isinstance(node, Mapping) and bool(node) and "_target_" not in node


def section(line: str, key: str, node: Mapping[str, Any], value: Any = None) -> str:
    """Message for an override of a section, with one of its keys: if possible one of the type of the value.

    Args:
        line: the override.
        key, node: the key and content of the section.
        value: the value that it was set to.
    """
    items = {str(name): item for name, item in node.items() if name not in SPECIAL}
    kinds = (int, float) if type(value) in (int, float) else (type(value),)
    fitting = {name: value for name, item in items.items() if type(item) in kinds and value is not None}
    plain = {name: item for name, item in items.items() if isinstance(item, bool | int | float) and item is not None}
    name, shown = next(iter((fitting or plain).items()), ("", ""))
    example = f": write for example `{key}.{name}={_typed(shown)}`" if name else ": set one of them"
    return f"`{line}`: `{key}` is a section, with the keys {', '.join(items)}{example}."


def link(override: Override, config: Any) -> str | None:
    """Message for an override of a key in a section to which an unresolved config refers; None for any other."""
    parts, node = override.key_or_group.split("."), config
    for depth, part in enumerate(parts[:-1], 1):
        if not isinstance(node, DictConfig) or part not in node.keys():  # noqa: SIM118, `in` resolves
            return None
        if OmegaConf.is_interpolation(node, part):
            key, rest = ".".join(parts[:depth]), ".".join(parts[depth:])
            value = str(OmegaConf.to_container(node, resolve=False)[part])  # type: ignore[index, call-overload]
            problem = f"`{override.input_line}`: `{key}` = {value} is a reference, without a key `{rest}` to set"
            source = re.fullmatch(r"\$\{(\w[\w.]*)\}", value)
            return f"{problem}: {_set_source(override, config, source[1], parts[depth:])}" if source else f"{problem}."
        node = node[part]
    return None


def _set_source(override: Override, config: DictConfig, source: str, rest: Sequence[str]) -> str:
    """Advice to set the key ``rest`` of the section ``source`` instead of that of a reference to it."""
    try:
        node = OmegaConf.select(config, source)
    except OmegaConfBaseException:
        node = None
    known = [str(name) for name in node] if isinstance(node, DictConfig) else []
    near = difflib.get_close_matches(rest[0], known, n=1, cutoff=0.6)
    if not near:
        return f"set one of the keys of `{source}`, {', '.join(known)}."
    line = ".".join((source, near[0], *rest[1:]))
    value = (override.input_line or "").partition("=")[2]
    return f"write `{line}={value}`, which changes both."


def group(override: Override, config: Mapping[str, Any], choices: Mapping[str, str], works: Works) -> str:
    """Message for the choice of a group that does not exist, or that the config has at a different key or not at all.

    Args:
        override: the override.
        config: the config without it.
        choices: choice of each group of this config, by ``group`` or ``group@package``.
        works: tries an override.
    """
    line, name, value = (override.input_line or "").lstrip("~+"), override.key_or_group, override.value()
    root, _, below = name.partition("/")
    key = override.package or name.replace("/", ".")
    given = override.input_line or ""
    same_key = [other for other in choices if other.rpartition("@")[2].replace("/", ".") == key and "@" in other]
    candidates = [f"+{line}", f"{root}={below}/{value}", *(f"{other}={value}" for other in same_key)]
    candidates += [f"{other}={choice}" for other, choice in choices.items() if other in same_key]
    candidates += [f"{other}={value}" for other in choices if other.startswith(f"{name}@")]
    if fix := next((candidate for candidate in candidates if candidate != given and works(candidate)), ""):
        return f"`{given}`: the config has no group `{name}` for this key: write `{fix}`."
    if isinstance(node := find(config, key), Mapping):
        return f"{section(given, key, node).removesuffix('.')}. It is no group of conf/."
    if node is not None:
        return f"`{given}`: `{key}` = {short(node)} is a value, not a group of conf/: write `{key}={_typed(node)}`."
    target = (find(config, root) or {}).get("_target_", "the config")
    rest = [f"`{other}={choice}`" for other, choice in choices.items() if other != root and other.startswith(root)]
    groups = f" Groups of `{root}` in this config: {', '.join(rest)}." if rest else ""
    return f"`{given}`: `{key}` is not a key of this config, because {target} has none: leave it out.{groups}"


def deletion(overrides: Sequence[Override], config: Mapping[str, Any], choices: Mapping[str, str], works: Works) -> str:
    """Message for the first deletion without which the config is valid; empty if there is none.

    Args:
        overrides: the deletions.
        config: the config without them.
        choices: choice of each group of this config, by ``group`` or ``group@package``.
        works: tries an override.
    """
    for override in overrides:
        line = override.input_line or ""
        key = (override.package or override.key_or_group).replace("/", ".")
        value = find(config, key)
        if value is None or not (override.is_delete() or isinstance(value, Mapping)) or works(line):
            continue
        parent, _, name = key.rpartition(".")
        target = (find(config, parent) or {}).get("_target_") if parent else None
        parameter = signature(target).parameters.get(name) if isinstance(target, str) else None
        needed = parameter is not None and parameter.default is Parameter.empty
        owner = f"{target} requires" if needed else "the config requires"
        chosen = [other for other in choices if other.rpartition("@")[2].replace("/", ".") == key]
        if chosen:
            fix = f"choose a different one of conf/{chosen[0].partition('@')[0]}/, as in "
            fix += f"`{chosen[0]}={choices[chosen[0]]}`"
        elif isinstance(value, Mapping):
            keys = {name: item for name, item in value.items() if isinstance(item, bool | int | float)}
            fix = (
                f"set its keys, as in `{key}.{next(iter(keys))}={next(iter(keys.values()))}`"
                if keys
                else "set its keys"
            )
        else:
            fix = f"set it, as in `{key}={_typed(value)}`"
        return f"`{line}` removes `{key}`, which {owner}: leave it out, or {fix}."
    return ""


def _typed(value: Any) -> str:
    """Returns a value as an override has it."""
    return str(value).lower() if isinstance(value, bool) else short(value)


def encoder(config: Any, key: str) -> str | None:
    """Message for a model without ``encoder``, to which ``key`` refers; None if it has one."""
    target = OmegaConf.select(config, "model._target_")
    if not isinstance(target, str) or OmegaConf.select(config, "model.encoder") is not None:
        return None
    if not re.search(r"\.(text_to_video|autoencoder)\.|Tokenizer$|Generator$", target):
        return (
            f"`model._target_` = {target} is an encoder, a part of a network: choose a network, and the encoder in it, "
            "for example `model=videomae/tiny model@model.encoder=vit/tiny`, or with the `task` classification "
            "`model=classifier/tiny model@model.encoder=vit/tiny`."
        )
    return (
        f"`{key}` refers to `model.encoder`, which `model._target_` = {target} does not have: choose `data=…` for this "
        "model, for example `data=moving_shapes` for text-to-video models, or set the key."
    )
