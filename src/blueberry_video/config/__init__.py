"""What a config may contain. Composing and checking one imports neither torch nor lightning: a typo costs a second.

Three layers refuse a mistake, each naming the key, its value and the nearest right one: the root keys (``Config``),
the keys of every node with a ``_target_`` (the parameters of what it names, ``check_node``), and what two keys must
agree on (``validate``).
"""

from blueberry_video.config.checks import check, did_you_mean, validate
from blueberry_video.config.compose import compose, expand_sweep, load, register_schema, resolve
from blueberry_video.config.schema import CONF, NODES, Config

__all__ = [
    "CONF",
    "NODES",
    "Config",
    "check",
    "compose",
    "did_you_mean",
    "expand_sweep",
    "load",
    "register_schema",
    "resolve",
    "validate",
]
