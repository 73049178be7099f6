"""Composition and validation of configs, without importing torch or lightning: an error is reported within a second.

Three layers report an error, each with the key, its value and the nearest valid one: the root keys (``Config``), the
keys of every node with a ``_target_`` (its constructor's parameters, ``check_node``), and rules between keys
(``validate``).
"""

from blueberry_video.config.checks import check, parse_expected, validate
from blueberry_video.config.classes import check_classes, with_classes
from blueberry_video.config.compose import (
    compose,
    expand_sweep,
    load,
    normalize,
    register_schema,
    resolve,
    sweep_settings,
    trusted_targets,
)
from blueberry_video.config.resume import Change, defaults, repeat, resumed
from blueberry_video.config.schema import CONF, NODES, Config
from blueberry_video.config.text import did_you_mean

__all__ = [
    "CONF",
    "NODES",
    "Change",
    "Config",
    "check",
    "check_classes",
    "compose",
    "defaults",
    "did_you_mean",
    "expand_sweep",
    "load",
    "normalize",
    "parse_expected",
    "register_schema",
    "repeat",
    "resolve",
    "resumed",
    "sweep_settings",
    "trusted_targets",
    "validate",
    "with_classes",
]
