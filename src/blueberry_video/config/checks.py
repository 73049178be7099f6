"""Checks of a config: unknown keys, missing or invalid values, forbidden targets, conflicting keys."""

import ast
import difflib
import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import fields
from inspect import Parameter
from typing import Any

from omegaconf import DictConfig, OmegaConf

from blueberry_video.config.safety import ALLOW_VARIABLE, check_values
from blueberry_video.config.schema import CONF, NODES, Config
from blueberry_video.config.signatures import UNKNOWN, Signature, accepted, names, signature, takes_object
from blueberry_video.config.text import did_you_mean, short

SHARDED = "blueberry_video.parallel.strategy.FullyShardedStrategy"
# Dotted names, written in full. tests/test_configs.py imports each of them.
CLASSES = (  # packages, modules and classes; their public classes are valid `_target_`s
    "blueberry_video.models",
    "blueberry_video.nn",
    "blueberry_video.tasks",
    "blueberry_video.diffusion",
    "blueberry_video.data",
    "blueberry_video.evaluation",
    "blueberry_video.inference.frame_generation.FrameDecoding",
    "blueberry_video.inference.droid",
    "blueberry_video.inference.planner",
    "blueberry_video.inference.rollout.Rollout",
    "blueberry_video.masking",
    "blueberry_video.augmentation",
    "blueberry_video.rand_augment",
    "blueberry_video.callbacks",
    "blueberry_video.parallel.sequence_strategy",
    "blueberry_video.experiment.best.BestCheckpoint",
    "blueberry_video.experiment.checkpoint",
    "blueberry_video.experiment.loggers.Wandb",
    "torch.nn",
    "torch.optim",
    "torch.utils.data",
    "torch.profiler",
    SHARDED,
    "lightning.Trainer",
    "lightning.pytorch.callbacks",
    "lightning.pytorch.strategies",
    "lightning.pytorch.plugins",
    "lightning.pytorch.profilers",
    "lightning.pytorch.trainer.trainer",
    "lightning.fabric.plugins",
    "lightning.fabric.strategies",
)
FUNCTIONS = (  # the only functions that are valid `_target_`s: others write files, open addresses and unpickle
    "blueberry_video.optim.constant",
    "blueberry_video.optim.cosine_ramp",
    "blueberry_video.optim.exponential",
    "blueberry_video.optim.ramp",
    "blueberry_video.optim.warmup_cosine",
    "blueberry_video.optim.warmup_linear",
    "blueberry_video.optim.warmup_stable_decay",
    "torch.profiler.schedule",
)
REFUSED = ("torch.utils.data.datapipes",)  # classes of `CLASSES` that open files and addresses, and generate code
IMAGE_DATA = ("blueberry_video.data.image_folder.ImageFolder", "blueberry_video.data.single_frames.SingleFrames")
HALF_OVERFLOWS = (  # published in bfloat16; the activations exceed the range of float16
    "blueberry_video.models.hunyuan_video.HunyuanVideo",
    "blueberry_video.models.hunyuan_video.HunyuanVideo15",
    "blueberry_video.models.cogvideox.CogVideoX",
)
DOTTED_NAMES = (*CLASSES, *FUNCTIONS, *REFUSED, *IMAGE_DATA, *HALF_OVERFLOWS)

SUPPLIED = {  # arguments that train.py passes itself: a config must not set them
    "task": ("model",),
    "task.optimization": ("optimizer", "schedule", "init_from"),
    "trainer": ("callbacks", "logger", "default_root_dir"),
    "logger": ("run",),
}
COUNTS = {  # number → whether -1 is no limit
    "trainer.max_steps": True,
    "trainer.max_epochs": True,
    "trainer.accumulate_grad_batches": False,
    "trainer.log_every_n_steps": False,
    "trainer.num_nodes": False,
    "data.batch_size": False,
}
REQUIRED = ("model", "task", "data", "optimizer", "schedule", "trainer")
PARTIAL = ("optimizer", "schedule", "task.optimization")  # called later with further arguments
SPECIAL = ("_target_", "_partial_", "_args_", "_convert_", "_recursive_")
FROM_DATA = "num_classes"  # required argument that the data determines where it is null or absent
ROOT_KEYS = tuple(field.name for field in fields(Config))


def check(config: Mapping[str, Any], allow: tuple[str, ...] = ()) -> None:
    """Runs all checks of a resolved config.

    Args:
        config: the resolved config. Its own ``allow_targets`` is a record and allows nothing.
        allow: packages, modules or full names that ``_target_`` may name in addition to ``CLASSES`` and ``FUNCTIONS``.

    Raises:
        ValueError: for the first error; the message names its key, its value and the fix.
    """
    for key, value in config.items():
        if key not in ROOT_KEYS:
            raise ValueError(f"`{key}` = {short(value)} is not a root key. {fix(key, ROOT_KEYS, value, '', config)}")
    check_groups(config)
    check_values(config)
    _check_root_values(config)
    for root in NODES:
        check_node(config.get(root) or {}, root, root, allow)
    validate(config)


def check_groups(config: Mapping[str, Any]) -> None:
    """Checks that every required group is set.

    Raises:
        ValueError: for the first group that is not set.
    """
    for key in REQUIRED:
        if not config.get(key):
            raise ValueError(
                f"`{key}` is not set: choose a file of conf/{key}/, with `- override {key}: …` in the `defaults:` of "
                f"the experiment or with `{key}=…` on the command line."
            )


def _check_root_values(config: Mapping[str, Any]) -> None:
    """Checks values that torch, lightning or the run folder would reject only after torch is imported."""
    name = config.get("name")
    if not isinstance(name, str) or not name.strip(".") or "/" in name:
        raise ValueError(
            f"`name` = {short(name)} must be the name of the experiment, which is also the folder of its runs: write "
            "for example `name: my_idea`."
        )
    seed: Any = config.get("seed", 0)
    if not 0 <= seed < 2**32:
        raise ValueError(f"`seed` = {seed} must be between 0 and {2**32 - 1}: write for example `seed=0`.")
    for key in ("lr", "weight_decay"):
        value: Any = (config.get("optimizer") or {}).get(key)
        if type(value) in (int, float) and not 0 <= value < math.inf:
            raise ValueError(
                f"`optimizer.{key}` = {value} must be a finite number of at least 0: write for example "
                f"`optimizer.{key}={0.001 if key == 'lr' else 0.05}`."
            )
    trainer = config.get("trainer") or {}
    for key, unlimited in COUNTS.items():
        value = OmegaConf.select(OmegaConf.create(dict(config)), key)
        if type(value) is int and value < 1 and not (unlimited and value == -1):
            least = "at least 1, or -1 for no limit" if unlimited else "at least 1"
            raise ValueError(f"`{key}` = {value} must be {least}: write for example `{key}=1`.")
    devices = trainer.get("devices", 1)
    number = int(devices) if isinstance(devices, str) and devices.removeprefix("-").isdecimal() else devices
    is_list = isinstance(devices, list | tuple) and devices and all(type(index) is int for index in devices)
    is_number = type(number) is int and (number == -1 or number > 0)
    if devices != "auto" and not is_list and not is_number:
        raise ValueError(
            f"`trainer.devices` = {short(devices)} must be a number of devices (`trainer.devices=1`), -1 for all, or a "
            "list of their indices (`trainer.devices=[0,1]`)."
        )
    parse_expected(config.get("expected"))


def parse_expected(expected: Mapping[str, Any] | None) -> dict[str, dict[str, float]]:
    """Checks an ``expected:`` section and returns it as plain numbers.

    Args:
        expected: metric → ``{at_least: x}``, ``{at_most: x}`` or both; ``None`` is an empty section.

    Raises:
        ValueError: for any other structure, and for a bound that no value can meet.
    """
    example = "write `expected: {val/motion: {at_least: 0.5}}`, or at_most"
    if not isinstance(expected, Mapping | None):
        raise ValueError(f"`expected` = {short(expected)} must map metrics to bounds: {example}.")
    for metric, bounds in (expected or {}).items():
        key = f"expected.{metric}"
        if not isinstance(bounds, Mapping) or not bounds:
            raise ValueError(f"`{key}` = {short(bounds)} must map bounds to numbers: {example}.")
        for bound, limit in bounds.items():
            if bound not in ("at_least", "at_most"):
                nearest = did_you_mean(str(bound), ("at_least", "at_most"))
                raise ValueError(f"`{key}.{bound}` = {short(limit)} is not a bound. {nearest}")
            if type(limit) not in (int, float) or not math.isfinite(limit):
                raise ValueError(f"`{key}.{bound}` = {short(limit)} must be a finite number: {example}.")
        if bounds.get("at_least", -math.inf) > bounds.get("at_most", math.inf):
            raise ValueError(
                f"`{key}` = {short(dict(bounds))}: no value is at least {bounds['at_least']} and at most "
                f"{bounds['at_most']}: swap or remove one of the bounds."
            )
    return {str(m): {str(b): float(limit) for b, limit in bounds.items()} for m, bounds in (expected or {}).items()}


# ---- the keys of a node ----------------------------------------------------------------------------------------------


def check_node(node: Any, path: str, root: str, allow: tuple[str, ...] = ()) -> None:
    """Checks targets, keys, missing parameters and types of values of a node and its children.

    Args:
        node: a value of the config.
        path: its full key.
        root: the root key that contains it.
        allow: see :func:`check`.

    Raises:
        ValueError: for the first error.
    """
    if isinstance(node, list | tuple):
        for index, item in enumerate(node):
            check_node(item, f"{path}[{index}]", root, allow)
    elif isinstance(node, Mapping):
        if "_target_" in node:
            _check_target(node, path, root, allow)
        else:
            _check_plain(node, path, root)
        for key, value in node.items():
            check_node(value, f"{path}.{key}", root, allow)


def _check_plain(node: Mapping[str, Any], path: str, root: str) -> None:
    """Checks a mapping without ``_target_``."""
    for key, value in node.items():
        if str(key).startswith("_"):
            raise ValueError(
                f"`{path}.{key}` = {short(value)} is not a key. {fix(str(key), SPECIAL, value, path, node)}"
            )
    if path == root and root != "callbacks" and node:
        raise ValueError(
            f"`{path}` has no `_target_`: it must name the class or function to build, as the files of conf/{root}/ do."
        )
    if path == "callbacks":
        for key, value in node.items():
            if isinstance(value, Mapping) and "_target_" in value:
                continue
            known = {str(key) for file in CONF.glob("callbacks/*.yaml") for key in OmegaConf.load(file)} - {"defaults"}
            if value is not None or key not in known:
                raise ValueError(
                    f"`callbacks.{key}` = {short(value)} is not a callback: give it a `_target_`, or null to disable "
                    f"a callback of conf/callbacks/. {did_you_mean(str(key), (known | {*map(str, node)}) - {str(key)})}"
                )


def _check_target(node: Mapping[str, Any], path: str, root: str, allow: tuple[str, ...]) -> None:
    """Checks a mapping with ``_target_``."""
    target = node["_target_"]
    known = _signature(target, path, allow)
    supplied = SUPPLIED.get(path, ())
    if lacking := [name for name in supplied if name not in known.parameters and not known.open]:
        raise ValueError(
            f"`{path}._target_` = {target} has no parameter `{lacking[0]}`, which train.py passes: choose a file of "
            f"conf/{path}/, not of a folder in it, or a class with this parameter."
        )
    for key, value in node.items():
        if key in SPECIAL:
            continue
        if key in supplied:
            root_key = key if key in ROOT_KEYS else "output_dir"
            raise ValueError(
                f"`{path}.{key}` = {short(value)}: train.py passes `{key}` to `{path}`; set the root key "
                f"`{root_key}` instead."
            )
        if key in known.parameters:
            _check_kind(known.parameters[key], value, f"{path}.{key}", target)
        elif not known.open or difflib.get_close_matches(str(key), known.parameters, n=1, cutoff=0.8):
            options = [name for name in (*known.parameters, *SPECIAL) if name not in supplied]
            hint = fix(str(key), options, value, path, node)
            raise ValueError(f"`{path}.{key}` = {short(value)} is not a parameter of {target}. {hint}")
    if path in PARTIAL and node.get("_partial_") is not True:
        raise ValueError(f"`{path}` must have `_partial_: true`: {target} is called later with further arguments.")
    if not node.get("_partial_"):
        positional = [name for name, p in known.parameters.items() if p.kind is not Parameter.KEYWORD_ONLY]
        given = {*node, *supplied, *positional[: len(node.get("_args_") or ())]}
        missing = [name for name, p in known.parameters.items() if p.default is Parameter.empty and name not in given]
        missing = [name for name in missing if name != FROM_DATA]
        if missing:
            raise ValueError(
                f"`{path}.{missing[0]}` is missing: {target} requires it. Write `+{path}.{missing[0]}=…` on the "
                f"command line, or `{missing[0]}: …` under `{path}:` in YAML."
            )


def _signature(target: Any, path: str, allow: tuple[str, ...]) -> Signature:
    """Signature of a target, if it is allowed."""
    refusal = f"`{path}._target_` = {short(target)} is not allowed: "
    if not isinstance(target, str):
        raise ValueError(f"{refusal}it must be the dotted name of a class or function.")
    top = target.partition(".")[0]
    known_top = _inside(top, {name.partition(".")[0] for name in CLASSES})
    remedy = _trust(target if known_top else top)
    is_public = not any(part.startswith("_") for part in target.split("."))
    is_listed = target in FUNCTIONS or (_inside(target, CLASSES) and not _inside(target, REFUSED))
    if not _inside(target, allow) and not (is_public and is_listed):
        raise ValueError(
            f"{refusal}a target is a public class in {', '.join(CLASSES)}, or one of the functions "
            f"{', '.join(FUNCTIONS)}. {remedy}"
        )
    try:
        known = signature(target)
    except (ImportError, AttributeError, TypeError, ValueError) as error:
        nearest = did_you_mean(target, names(target))
        raise ValueError(f"`{path}._target_` = {target} cannot be built: {error}. {nearest}".rstrip()) from error
    if target in allow or target in FUNCTIONS:
        return known
    remedy = _trust(target)
    # `torch.nn.modules.module.torch.hub.load` is reached through an import of torch.nn: its home decides
    is_home_allowed = _inside(known.home, allow) or (_inside(known.home, CLASSES) and not _inside(known.home, REFUSED))
    if target not in CLASSES and not is_home_allowed:
        raise ValueError(f"{refusal}it is defined in {known.home}. {remedy}")
    if not known.is_class and not _inside(target, allow):
        kind = "method" if known.is_method else "function that is not in the list"
        raise ValueError(f"{refusal}it is a {kind}: name a class, or one of {', '.join(FUNCTIONS)}. {remedy}")
    return known


def _trust(name: str) -> str:
    """Sentence on how to allow a target: outside of the file, because a file must not authorize itself."""
    return (
        f"If you trust it, allow it on the command line, `allow_targets=[{name}]`, or in the environment, "
        f"{ALLOW_VARIABLE}={name}; `allow_targets` in a file allows nothing."
    )


def _inside(name: str, packages: Iterable[str]) -> bool:
    return any(name == package or name.startswith(f"{package}.") for package in packages)


def _check_kind(parameter: Parameter, value: Any, key: str, target: str) -> None:
    """Refuses a value that a simple annotation excludes, e.g. ``depth: eight``."""
    kinds, choices = accepted(parameter)
    if kinds is None and takes_object(parameter) and _inside(target, ("blueberry_video",)):
        optional = any(isinstance(part, ast.Constant) and part.value is None for part in ast.walk(parameter.annotation))
        if value is None and not optional and parameter.default is not None:
            raise ValueError(f"`{key}` = null is not valid: {target} requires it. Write a section with a `_target_`.")
        if type(value) in (bool, int, float, str):
            raise ValueError(
                f"`{key}` = {short(value)} replaces a section: it needs a `_target_`, the class to build, and its "
                f"arguments, `{key}.<key>=…`."
            )
    if kinds is None or value in choices:
        return
    if value is None and parameter.name == FROM_DATA and parameter.default is Parameter.empty:
        return
    if isinstance(value, Mapping):
        kind = "object" if "_target_" in value else "dict"
    elif isinstance(value, list | tuple):
        kind = "list"
    else:
        kind = "None" if value is None else type(value).__name__
    valid = kinds | ({"int"} if "float" in kinds else frozenset())
    if kind in valid or (kind == "object" and valid & {"list", "dict"}):
        return
    if choices and isinstance(value, str):
        nearest = did_you_mean(value, map(str, choices))
        raise ValueError(f"`{key}` = {short(value)} is not a choice of {target}. {nearest}")
    if kind == "float" and "int" in valid and float(value).is_integer():
        raise ValueError(f"`{key}` = {value} must be an integer: write `{key}={int(value)}`.")
    wanted = [*sorted(kinds - {"None"}), *map(repr, choices), *({"None"} & kinds and ["null"])]
    default = "" if parameter.default in (UNKNOWN, Parameter.empty) else f" (its default is {parameter.default!r})"
    raise ValueError(f"`{key}` = {short(value)} has the wrong type: {target} takes {' or '.join(wanted)}{default}.")


# ---- suggestions -----------------------------------------------------------------------------------------------------


def fix(word: str, options: Iterable[str], value: Any, path: str, node: Mapping[str, Any], rest: str = "") -> str:
    """Returns a sentence with the nearest key, in this node or its children, for the command line and for YAML.

    Args:
        word: the wrong key.
        options: the valid keys.
        value: the value that it was set to.
        path, node: full key and content of the mapping that contains it.
        rest: the rest of the full key, e.g. ``.depth`` in ``modle.depth``.
    """
    options = [option for option in options if option != word]
    near = difflib.get_close_matches(word, options, n=1, cutoff=0.6)
    if not near and (deeper := _deeper(word, path, node)):
        path, node, key = deeper
    elif near:
        key = near[0]
    else:
        return did_you_mean(word, options)
    if near or key == word:
        section = node.get(key) if path and not rest and key in node else None
        if isinstance(section, Mapping) and not isinstance(value, Mapping):  # a value would replace the section
            inside = _deeper(word.removeprefix(f"{key}_"), f"{path}.{key}".lstrip("."), section, own=True)
            if inside is None:
                keys = sorted(str(name) for name in section if name not in SPECIAL)
                plain = next((name for name in keys if isinstance(section[name], bool | int | float | str)), "")
                example = f", as in `{path}.{key}.{plain}={short(section[plain])}`" if plain else ""
                return f"`{path}.{key}` is a section, with the keys {', '.join(keys)}: set one of them{example}."
            path, node, key = inside
    shown = short(value) if isinstance(value, bool | int | float | str) else "…"
    full = f"{path}.{key}{rest}" if path else f"{key}{rest}"
    plus = "+" if path and not rest and key not in node else ""
    in_yaml = f", or `{key}: {shown}`{f' under `{path}:`' if path else ''} in YAML" if not rest else ""
    return f"Did you mean `{full}`? Write `{plus}{full}={shown}` on the command line{in_yaml}."


def _deeper(
    word: str, path: str, node: Mapping[str, Any], own: bool = False
) -> tuple[str, Mapping[str, Any], str] | None:
    """Child node, or with ``own`` this one, with a key similar to ``word``, as (path, node, key)."""
    for child_path, child in targets(node, path):
        child_path = child_path.lstrip(".")  # of a root key
        parameters = signature(child["_target_"]).parameters if own or child_path != path else {}
        near = difflib.get_close_matches(word, parameters, n=1, cutoff=0.75)
        if near:
            return child_path, child, near[0]
    return None


# ---- rules between keys ----------------------------------------------------------------------------------------------


def validate(config: Mapping[str, Any]) -> None:
    """Checks rules between keys; each message names the nearest valid values.

    Raises:
        ValueError: for the first rule that is broken.
    """
    _check_sharding(config.get("trainer") or {})
    teacher = (config.get("task") or {}).get("teacher")
    networks = [*targets(config.get("model"), "model"), *targets(teacher, "task.teacher")]
    data = list(targets(config.get("data"), "data"))
    for path, node in networks:
        _check_divisible(node, path, "image_size", "patch_size")
        if _value(node, "embed_dim") is not None:  # a diffusion transformer pads its frames
            _check_divisible(node, path, "num_frames", "tubelet_size")
        _check_divisible(node, path, "embed_dim", "num_heads")
        _check_divisible(node, path, "decoder_dim", "decoder_num_heads")
        _check_half(config.get("trainer") or {}, node, path)
        _check_frame_step(data, node, path)
    for path, encoder in networks:
        if _value(encoder, "patch_size") is None or _value(encoder, "embed_dim") is None:
            continue  # the sizes of a diffusion transformer are those of latents
        for source, node, key, encoder_key in _clip_sizes(config, data):
            wanted, given = _value(encoder, encoder_key), _value(node, key)
            if wanted is not None and given is not None and _pair(wanted) != _pair(given):
                plus = "" if key in node else "+"
                raise ValueError(
                    f"`{source}.{key}` = {given} must be equal to `{path}.{encoder_key}` = {wanted}. Write "
                    f"`{plus}{source}.{key}={wanted}` or `{path}.{encoder_key}={given}`."
                )
        clips_only = _value(encoder, "images") is False and _value(encoder, "num_frames") != 1
        for source, node in data:
            if clips_only and node["_target_"] in IMAGE_DATA:
                raise ValueError(
                    f"`{source}._target_` = {node['_target_']} returns single frames, which the model does not accept "
                    f"with `{path}.images` = False. Write `{'' if 'images' in encoder else '+'}{path}.images=true`, or "
                    "choose a dataset of clips."
                )


def _check_sharding(trainer: Mapping[str, Any]) -> None:
    """Refuses FSDP1 of Lightning, and precisions that FSDP2 does not have."""
    strategy, precision = trainer.get("strategy"), trainer.get("precision")
    name = strategy.get("_target_") if isinstance(strategy, Mapping) else strategy
    if str(name).startswith("fsdp") or str(name).endswith("FSDPStrategy"):
        raise ValueError(
            f"`trainer.strategy` = {name} is FSDP1, which cannot clip gradients by their norm: write `trainer=fsdp`."
        )
    if name == SHARDED and precision in (16, "16", "16-mixed", 64, "64", "64-true"):
        raise ValueError(
            f"`trainer.precision` = {precision} is not supported by trainer=fsdp: write "
            "`trainer.precision=bf16-mixed`, or `trainer=ddp`."
        )


def _check_half(trainer: Mapping[str, Any], node: Mapping[str, Any], path: str) -> None:
    """Refuses float16 for a network that overflows in it, which gives black or NaN videos.

    Of CogVideoX, only the 2B model, which has sine-cosine positions, was published in float16.
    """
    if node["_target_"] not in HALF_OVERFLOWS or _value(node, "positions") == "sincos":
        return
    for source, setting in (("trainer", trainer), *targets(trainer.get("plugins"), "trainer.plugins")):
        precision = setting.get("precision")
        if precision in (16, "16", "16-mixed", "16-true"):
            raise ValueError(
                f"`{source}.precision` = {precision} and `{path}._target_` = {node['_target_']}: this model was "
                "trained in bfloat16 and overflows in float16, which gives black or NaN videos. Write "
                f"`{source}.precision=bf16-mixed`."
            )


def _check_frame_step(data: Iterable[tuple[str, Mapping[str, Any]]], autoencoder: Mapping[str, Any], path: str) -> None:
    """Checks that clips have 1 + a multiple of ``frame_step`` frames, the groups that a causal autoencoder encodes."""
    step = _value(autoencoder, "frame_step")
    for source, node in data if isinstance(step, int) and step > 0 else ():
        given = _value(node, "num_frames")
        if isinstance(given, int) and (given - 1) % step:
            below = (given - 1) // step * step + 1
            raise ValueError(
                f"`{source}.num_frames` = {given} must be 1 + a multiple of `{path}.frame_step` = {step}: the "
                f"autoencoder "
                f"encodes the first frame separately and then {step} frames at a time. The nearest valid values are "
                f"`{source}.num_frames={below}` and `{source}.num_frames={below + step}`."
            )


def _clip_sizes(
    config: Mapping[str, Any], data: Iterable[tuple[str, Mapping[str, Any]]]
) -> Iterator[tuple[str, Mapping[str, Any], str, str]]:
    """Settings of the size of clips that reach the model: path, node, key, corresponding key of the encoder."""
    augment = targets(((config.get("task") or {}).get("input") or {}).get("augment"), "task.input.augment")
    crops = [  # a target of a third-party package may also change the size
        (path, node)
        for path, node in augment
        if _value(node, "size") is not None or not _inside(node["_target_"], ("blueberry_video", "torch.nn"))
    ]
    images = [path for path, node in data if node["_target_"] in IMAGE_DATA]
    for path, node in data:
        if not any(path.startswith(f"{image}.") for image in images):  # single frames come from clips of any length
            yield path, node, "num_frames", "num_frames"
        if crops and path.startswith("data.train"):
            yield *crops[-1], "size", "image_size"  # the last crop determines the size
        else:
            yield path, node, "image_size", "image_size"


def targets(node: Any, path: str) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """Yields every mapping with a ``_target_`` in a node, with its full key."""
    if isinstance(node, Mapping):
        if isinstance(node.get("_target_"), str):
            yield path, node
        # a composed config may contain `???`, so it is not resolved
        for key, value in node.items_ex(resolve=False) if isinstance(node, DictConfig) else node.items():
            yield from targets(value, f"{path}.{key!s}")
    elif isinstance(node, list | tuple):
        for index, item in enumerate(node):
            yield from targets(item, f"{path}.{index}")


def _value(node: Mapping[str, Any], key: str) -> Any:
    """Value of a key; if it is not set, its default in the constructor; otherwise None."""
    parameter = signature(node["_target_"]).parameters.get(key)
    default = None if parameter is None or parameter.default in (UNKNOWN, Parameter.empty) else parameter.default
    return node.get(key, default)


def _pair(value: Any) -> Any:
    """Converts the size of a square, a single number, to a pair."""
    return tuple(value) if isinstance(value, list | tuple) else (value, value)


def _check_divisible(node: Mapping[str, Any], path: str, whole: str, part: str) -> None:
    """Checks that ``whole`` is a multiple of ``part``."""
    for total, unit in zip(_pair(_value(node, whole)), _pair(_value(node, part))):
        if not isinstance(total, int) or not isinstance(unit, int):
            return
        for key, value in ((whole, total), (part, unit)):
            if value < 1:
                raise ValueError(f"`{path}.{key}` = {value} must be at least 1: write `{path}.{key}=1` or more.")
        if total % unit:
            multiple = max(1, round(total / unit)) * unit
            divisor = min((d for d in range(1, total + 1) if total % d == 0), key=lambda d: abs(d - unit))
            raise ValueError(
                f"`{path}.{whole}` = {_value(node, whole)} must be divisible by `{path}.{part}` = "
                f"{_value(node, part)}. The nearest valid values are `{path}.{whole}={multiple}` and "
                f"`{path}.{part}={divisor}`."
            )
