"""Limits on what a config file from elsewhere can do, in addition to the list of valid targets in ``checks``.

A file contains plain values only: no YAML tags, paths or bytes. It reads few environment variables, sets few keys of
Hydra, and its ``allow_targets`` allows nothing: that takes the command line or ``BLUEBERRY_ALLOW_TARGETS``.
"""

import os
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from hydra.core.override_parser.types import Override
from omegaconf import OmegaConf
from omegaconf.resolvers import oc

from blueberry_video.config.text import short
from blueberry_video.installation import start_command

ALLOW_VARIABLE = "BLUEBERRY_ALLOW_TARGETS"
ENVIRONMENT = ("HOME", "SCRATCH", "SLURM_JOB_ID", "SLURM_TMPDIR", "TMPDIR", "USER", "WORK")
"""Environment variables that a config may read with ``${oc.env:…}``; other ones may be secrets."""

HYDRA_KEYS = (  # of a sweep, in the file of an experiment; other keys run commands, load plugins or set variables
    "sweep.dir",
    "sweep.subdir",
    "sweeper.max_batch_size",
    *(
        f"launcher.{key}"
        for key in (
            *("account", "array_parallelism", "constraint", "cpus_per_gpu", "cpus_per_task", "gpus_per_node"),
            *("gpus_per_task", "max_num_timeout", "mem_gb", "mem_per_cpu", "mem_per_gpu", "n_jobs", "name", "nodes"),
            *("partition", "qos", "tasks_per_node", "timeout_min"),
        )
    ),
)
_RUNTIME = ("overrides", "runtime", "job.name", "job.config_name", "job.override_dirname", "job.num", "job.id")
_PLAIN = (bool, int, float, str, type(None))


def trusted_targets(overrides: Sequence[Override]) -> tuple[str, ...]:
    """Returns the names in ``allow_targets`` on the command line and in ``BLUEBERRY_ALLOW_TARGETS``."""
    found = re.split(r"[,\s]+", os.environ.get(ALLOW_VARIABLE, "").strip())
    for override in overrides:
        if override.key_or_group == "allow_targets" and isinstance(names := override.value(), list):
            found += map(str, names)
    return tuple(filter(None, found))


def check_values(node: Any, path: str = "") -> None:
    """Checks that a resolved config contains mappings, lists, text, numbers and null only.

    Raises:
        ValueError: for a path, bytes, or text that would be resolved once more.
    """
    if isinstance(node, Mapping):
        for key, value in node.items():
            if not isinstance(key, _PLAIN):
                raise ValueError(f"`{path}` has the key {short(key)} of type {type(key).__name__}: write it as text.")
            check_values(value, f"{path}.{key}".lstrip("."))
    elif isinstance(node, list | tuple):
        for index, item in enumerate(node):
            check_values(item, f"{path}[{index}]")
    elif not isinstance(node, _PLAIN):
        raise ValueError(
            f"`{path}` = {short(node)} is of type {type(node).__name__}, which comes from a YAML tag: write plain text "
            "or a number, without a tag."
        )
    elif isinstance(node, str) and "${" in node:
        raise ValueError(f"`{path}` = {short(node)} contains an escaped `${{`, which is not allowed: write the value.")


def check_tags(file: Path, shown: str) -> None:
    """Checks that a YAML file has no tags such as ``!!binary`` or ``!!python/…``.

    Raises:
        ValueError: for the first tag; ``shown`` is the name of the file in the message.
        yaml.YAMLError: if the file is not valid YAML.
    """
    with file.open("rb") as stream:
        for token in yaml.scan(stream):
            if isinstance(token, yaml.TagToken):
                tag, line = "".join(filter(None, token.value)), token.start_mark.line + 1
                raise ValueError(
                    f"{shown}, line {line}: the YAML tag `{tag}` is not allowed: write the plain value, without a tag."
                )


def check_hydra(settings: Mapping[str, Any], trusted: Mapping[str, Any], source: str) -> None:
    """Checks the ``hydra`` section of an experiment.

    Args:
        settings: the section.
        trusted: the section without the experiment: equal values are not checked.
        source: name of the file in the message.

    Raises:
        ValueError: for a key that is not in ``HYDRA_KEYS``, or a value that is not one word.
    """
    known = dict(_leaves(trusted))
    for key, value in _leaves(settings):
        if (key in known and known[key] == value) or any(
            key == name or key.startswith(f"{name}.") for name in _RUNTIME
        ):
            continue
        if key not in HYDRA_KEYS:
            raise ValueError(
                f"`hydra.{key}` = {short(value)} in {source} is not allowed: of `hydra`, a file may set "
                f"{', '.join(HYDRA_KEYS)}, because other keys run code. Values to sweep over are those of "
                f"`{start_command('sweep', SWEEP='key=a,b')}`. If you trust it, write it there, `hydra.{key}=… …`."
            )
        if not isinstance(value, _PLAIN) or not str(value).isprintable():
            raise ValueError(f"`hydra.{key}` = {short(value)} in {source} must be a number or one line of text.")


def _leaves(node: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """Yields the values in nested mappings and lists with their keys; an empty one is a value."""
    items = node.items() if isinstance(node, Mapping) else enumerate(node) if isinstance(node, list) else ()
    for key, value in items:
        full = f"{path}.{key}".lstrip(".")
        if isinstance(value, Mapping | list) and value:
            yield from _leaves(value, full)
        else:
            yield full, value


def _environment(name: str, *default: Any) -> str | None:
    """Resolver of ``${oc.env:…}``."""
    if name not in ENVIRONMENT:
        raise ValueError(
            f"${{oc.env:{name}}} is not allowed, because a config must not read secrets (allowed are "
            f"{', '.join(ENVIRONMENT)}): set the key on the command line, where the shell inserts the variable"
        )
    return oc.env(name, *default)


OmegaConf.register_new_resolver("oc.env", _environment, replace=True)
