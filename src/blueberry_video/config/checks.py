"""What makes a config wrong: an unknown key, a missing or impossible value, a forbidden target, keys that disagree."""

import difflib
import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import fields
from typing import Any

from omegaconf import DictConfig, OmegaConf

from blueberry_video.config.schema import CONF, NODES, Config
from blueberry_video.config.signatures import UNKNOWN, Parameter, Signature, names, signature

OWN = "blueberry_video"
ALLOWED = (  # what a config has reason to build; elsewhere torch and lightning download, unpickle and run commands
    OWN,
    "torch.nn",
    "torch.optim",
    "torch.utils.data",
    "torch.profiler",
    "torch.distributed.fsdp.wrap",
    "lightning.Trainer",
    *(
        f"lightning.pytorch.{part}"
        for part in ("callbacks", "loggers", "strategies", "plugins", "profilers", "trainer")
    ),
    *(f"lightning.fabric.{part}" for part in ("plugins", "strategies")),
)
REFUSED = (  # within these: what starts processes, and code generators
    *(f"{OWN}.{part}" for part in ("launch", "train", "precompute", "export", "config")),
    "torch.utils.data.datapipes",
)
SUPPLIED = {  # what train.py passes itself: a config neither needs it nor may give it
    "task": ("model", "optimizer", "schedule"),
    "trainer": ("callbacks", "logger", "default_root_dir"),
    "logger": ("run",),
}
REQUIRED = ("model", "task", "data", "optimizer", "schedule", "trainer")
IMAGE_DATA = (f"{OWN}.data.image_folder.ImageFolder", f"{OWN}.data.single_frames.SingleFrames")
HALF_OVERFLOWS = (  # published in bfloat16, and their activations leave the range of float16
    f"{OWN}.models.hunyuan_video.HunyuanVideo",
    f"{OWN}.models.hunyuan_video.HunyuanVideo15",
    f"{OWN}.models.cogvideox.CogVideoX",
)
PARTIAL = ("optimizer", "schedule")  # called by the task, with the parameters and the steps
SPECIAL = ("_target_", "_partial_", "_args_", "_convert_", "_recursive_")
ROOT_KEYS = tuple(field.name for field in fields(Config))


def check(config: Mapping[str, Any]) -> None:
    """All checks of a resolved config.

    Raises:
        ValueError: the first mistake: its key, its value and how to write it.
    """
    for key, value in config.items():
        if key not in ROOT_KEYS:
            raise ValueError(f"`{key}` = {short(value)} is not a root key. {fix(key, ROOT_KEYS, value, '', config)}")
    check_groups(config)
    _check_root_values(config)
    for root in NODES:
        check_node(config.get(root) or {}, root, root, tuple(config.get("allow_targets") or ()))
    validate(config)


def check_groups(config: Mapping[str, Any]) -> None:
    """Every group that a run needs has been chosen, else a ``ValueError``."""
    for key in REQUIRED:
        if not config.get(key):
            raise ValueError(
                f"`{key}` is not set: choose a file of conf/{key}/, with `- override {key}: …` in the `defaults:` of "
                f"the experiment or with `{key}=…` on the command line."
            )


def _check_root_values(config: Mapping[str, Any]) -> None:
    """What no constructor checks."""
    name = config.get("name")
    if not isinstance(name, str) or not name.strip(".") or "/" in name:
        raise ValueError(
            f"`name` = {short(name)} must name the experiment, and with it the folder of its runs: a word such as "
            "`name: my_idea`."
        )
    seed: Any = config.get("seed", 0)
    if not 0 <= seed < 2**32:
        raise ValueError(f"`seed` = {seed} is outside 0 to {2**32 - 1}, what random generators take: write `seed=0`.")
    for key in ("lr", "weight_decay"):
        value: Any = (config.get("optimizer") or {}).get(key)
        if type(value) in (int, float) and not 0 <= value < math.inf:
            raise ValueError(
                f"`optimizer.{key}` = {value} must be a finite number of at least 0: write for example "
                f"`optimizer.{key}={0.001 if key == 'lr' else 0.05}`."
            )
    devices = (config.get("trainer") or {}).get("devices", 1)
    number = int(devices) if isinstance(devices, str) and devices.removeprefix("-").isdecimal() else devices
    is_list = isinstance(devices, list | tuple) and devices and all(type(index) is int for index in devices)
    is_number = type(number) is int and (number == -1 or number > 0)
    if devices != "auto" and not is_list and not is_number:
        raise ValueError(
            f"`trainer.devices` = {short(devices)} names no devices: write their number (`trainer.devices=1`), -1 for "
            "all, or a list of their indices (`trainer.devices=[0,1]`)."
        )
    _check_expected(config.get("expected") or {})


def _check_expected(expected: Mapping[str, Any]) -> None:
    """Every bound can be kept: a run of days must not end with a verdict that cannot be given."""
    for metric, bounds in expected.items():
        if (
            not isinstance(bounds, Mapping)
            or not bounds
            or not all(type(limit) in (int, float) for limit in bounds.values())
        ):
            raise ValueError(
                f"`expected.{metric}` = {short(bounds)} is not a bound and a number. Write `expected: {{{metric}: "
                "{at_least: 0.5}}`, or at_most."
            )
        for bound in bounds:
            if bound not in ("at_least", "at_most"):
                raise ValueError(
                    f"`expected.{metric}.{bound}` = {short(bounds[bound])} is not a bound. "
                    f"{did_you_mean(bound, ('at_least', 'at_most'))} Write `expected: {{{metric}: {{at_least: 0.5}}}}`."
                )
            if not math.isfinite(bounds[bound]):
                raise ValueError(
                    f"`expected.{metric}.{bound}` = {bounds[bound]} is not a finite number: give the value to compare "
                    "with, or remove the bound."
                )
        least, most = bounds.get("at_least", -math.inf), bounds.get("at_most", math.inf)
        if least > most:
            raise ValueError(
                f"`expected.{metric}` = {short(dict(bounds))} asks for at least {least} and at most {most}, which no "
                "value can be: swap or remove one of the bounds."
            )


# ---- the keys of a node ----------------------------------------------------------------------------------------------


def check_node(node: Any, path: str, root: str, allow: tuple[str, ...] = ()) -> None:
    """Checks a node and all below it: targets, keys, missing parameters, kinds of values.

    Args:
        node: a value of the config.
        path: its full key.
        root: the root key it lies under.
        allow: packages, modules or names that ``_target_`` may name beside ``ALLOWED``.

    Raises:
        ValueError: the first mistake.
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
    """A mapping that builds nothing by itself."""
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
        known = {str(key) for file in CONF.glob("callbacks/*.yaml") for key in OmegaConf.load(file)} - {"defaults"}
        for key, value in node.items():
            is_callback = isinstance(value, Mapping) and "_target_" in value
            is_switched_off = value is None and key in known
            if not is_callback and not is_switched_off:
                raise ValueError(
                    f"`callbacks.{key}` = {short(value)} is not a callback: give it a `_target_`, or null to switch "
                    f"off one of conf/callbacks/. {did_you_mean(str(key), (known | {*map(str, node)}) - {str(key)})}"
                )


def _check_target(node: Mapping[str, Any], path: str, root: str, allow: tuple[str, ...]) -> None:
    """A mapping that builds something."""
    target = node["_target_"]
    known = _signature(target, path, allow)
    supplied = SUPPLIED.get(root, ()) if path == root else ()
    for key, value in node.items():
        if key in SPECIAL:
            continue
        if key in supplied:
            where = key if key in ROOT_KEYS else "output_dir"
            raise ValueError(
                f"`{path}.{key}` = {short(value)}: train.py gives the {root} its `{key}`; set the "
                f"root key `{where}` instead."
            )
        if key in known.parameters:
            _check_kind(known.parameters[key], value, f"{path}.{key}", target)
        elif not known.open or difflib.get_close_matches(str(key), known.parameters, n=1, cutoff=0.8):
            options = [name for name in (*known.parameters, *SPECIAL) if name not in supplied]
            said = fix(str(key), options, value, path, node)
            raise ValueError(f"`{path}.{key}` = {short(value)} is not a parameter of {target}. {said}")
    if path == root and root in PARTIAL and node.get("_partial_") is not True:
        raise ValueError(f"`{path}` must have `_partial_: true`: the task calls {target}, with what only it knows.")
    if not node.get("_partial_"):
        given = {*node, *supplied, *known.positional[: len(node.get("_args_") or ())]}
        missing = [key for key, parameter in known.parameters.items() if parameter.required and key not in given]
        if missing:
            raise ValueError(
                f"`{path}.{missing[0]}` is missing, and {target} cannot do without it. Write `+{path}.{missing[0]}=…` "
                f"on the command line, or `{missing[0]}: …` under `{path}:` in YAML."
            )


def _signature(target: Any, path: str, allow: tuple[str, ...]) -> Signature:
    """Signature of a target, if it is allowed."""
    is_said = f"`{path}._target_` = {short(target)} is not allowed: "
    if not isinstance(target, str):
        raise ValueError(f"{is_said}it must be the dotted name of a class or function.")
    top = target.partition(".")[0]
    trusted = target if top in (OWN, "torch", "lightning") else top
    remedy = f"If you trust it, list it in the experiment: `allow_targets: [{trusted}]`."
    if not _inside(target, allow) and not _is_allowed(target):
        raise ValueError(
            f"{is_said}a target is a public name in {', '.join(ALLOWED)}, but not in {', '.join(REFUSED)}. {remedy}"
        )
    try:
        known = signature(target)
    except (ImportError, AttributeError, TypeError) as error:
        nearest = did_you_mean(target, names(target))
        raise ValueError(f"`{path}._target_` = {target} cannot be built: {error}. {nearest}".rstrip()) from error
    if target in allow:
        return known
    remedy = f"If you trust it, list it in the experiment: `allow_targets: [{target}]`."
    # `torch.nn.modules.module.torch.hub.load` leaves through a module that torch.nn imports: what counts is the home
    if not _inside(known.home, (*ALLOWED, *allow)) or (_inside(known.home, REFUSED) and not _inside(known.home, allow)):
        raise ValueError(f"{is_said}it is defined in {known.home}, where a config has nothing to build. {remedy}")
    if known.is_method and not _inside(target, allow):  # some methods read files that can run code
        raise ValueError(f"{is_said}it is a method: name a class or a function. {remedy}")
    return known


def _is_allowed(target: str) -> bool:
    is_private = any(part.startswith("_") for part in target.split("."))
    return _inside(target, ALLOWED) and not _inside(target, REFUSED) and not is_private


def _inside(name: str, packages: Iterable[str]) -> bool:
    return any(name == package or name.startswith(f"{package}.") for package in packages)


def _check_kind(parameter: Parameter, value: Any, key: str, target: str) -> None:
    """Refuses a value that a simple annotation rules out, such as ``depth: eight``."""
    if parameter.kinds is None or value in parameter.choices:
        return
    if isinstance(value, Mapping):
        kind = "object" if "_target_" in value else "dict"
    elif isinstance(value, list | tuple):
        kind = "list"
    else:
        kind = "None" if value is None else type(value).__name__
    accepted = parameter.kinds | ({"int"} if "float" in parameter.kinds else frozenset())
    if kind in accepted or (kind == "object" and accepted & {"list", "dict"}):
        return
    if parameter.choices and isinstance(value, str):
        nearest = did_you_mean(value, map(str, parameter.choices))
        raise ValueError(f"`{key}` = {short(value)} is not a choice of {target}. {nearest}")
    wanted = [
        *sorted(parameter.kinds - {"None"}),
        *map(repr, parameter.choices),
        *({"None"} & parameter.kinds and ["null"]),
    ]
    default = "" if parameter.default is UNKNOWN else f" (its default is {parameter.default!r})"
    raise ValueError(f"`{key}` = {short(value)} has the wrong kind: {target} takes {' or '.join(wanted)}{default}.")


# ---- what to write instead -------------------------------------------------------------------------------------------


def did_you_mean(word: str, options: Iterable[str]) -> str:
    """A sentence: the nearest of the options, or all of them where none is near; empty where the word is one itself."""
    known = sorted({str(option) for option in options})
    if word in known:
        return ""
    near = difflib.get_close_matches(word, known, n=1, cutoff=0.6)
    if near:
        return f"Did you mean `{near[0]}`?"
    return f"Choose one of: {', '.join(known)}." if known else "There is nothing to choose from."


def fix(word: str, options: Iterable[str], value: Any, path: str, node: Mapping[str, Any], rest: str = "") -> str:
    """The nearest key, here or further down, and how to write it on the command line and in YAML.

    Args:
        word: the wrong key.
        options: the right ones.
        value: what it was to be set to.
        path, node: full key and content of the mapping it stands in.
        rest: what follows the wrong key in the full key, such as ``.depth`` in ``modle.depth``.
    """
    options = [option for option in options if option != word]
    near = difflib.get_close_matches(word, options, n=1, cutoff=0.6)
    if not near and (deeper := _deeper(word, path, node)):
        path, node, key = deeper
    elif near:
        key = near[0]
    else:
        return did_you_mean(word, options)
    shown = short(value) if isinstance(value, bool | int | float | str) else "…"
    full = f"{path}.{key}{rest}" if path else f"{key}{rest}"
    plus = "+" if path and not rest and key not in node else ""
    in_yaml = f", or `{key}: {shown}`{f' under `{path}:`' if path else ''} in YAML" if not rest else ""
    return f"Did you mean `{full}`? Write `{plus}{full}={shown}` on the command line{in_yaml}."


def _deeper(word: str, path: str, node: Mapping[str, Any]) -> tuple[str, Mapping[str, Any], str] | None:
    """Where further down a key like ``word`` has its place: ``model.depth`` is meant for ``model.encoder``."""
    for place, below in targets(node, path):
        parameters = signature(below["_target_"]).parameters if place != path else {}
        near = difflib.get_close_matches(word, parameters, n=1, cutoff=0.75)
        if near:
            return place, below, near[0]
    return None


def short(value: Any) -> str:
    """A value as a message shows it."""
    text = "null" if value is None else value if isinstance(value, str) and value else repr(value)
    return text if len(text) <= 60 else f"{text[:57]}…"


# ---- what two keys must agree on -------------------------------------------------------------------------------------


def validate(config: Mapping[str, Any]) -> None:
    """Rules between keys; each message names the nearest legal values.

    Raises:
        ValueError: the first rule that is broken.
    """
    teacher = (config.get("task") or {}).get("teacher")
    networks = [*targets(config.get("model"), "model"), *targets(teacher, "task.teacher")]
    for path, node in networks:
        _divides(node, path, "image_size", "patch_size", "pixels cannot be cut into whole patches")
        if _value(node, "embed_dim") is not None:  # a diffusion transformer fills its frames up
            _divides(node, path, "num_frames", "tubelet_size", "frames cannot be cut into whole tubelets")
        _divides(node, path, "embed_dim", "num_heads", "channels cannot be shared by the heads")
        _divides(node, path, "decoder_dim", "decoder_num_heads", "channels cannot be shared by the heads")
    for path, node in networks:
        for place, precision in _precisions(config.get("trainer") or {}):
            _refuse_half(node, path, place, precision)
        _check_frame_steps(config, node, path)
    for path, encoder in networks:
        if _value(encoder, "patch_size") is None or _value(encoder, "embed_dim") is None:
            continue  # of a diffusion transformer, sizes are those of latents
        for place, node, key, same in _clip_sizes(config):
            wanted, given = _value(encoder, same), _value(node, key)
            if wanted is not None and given is not None and _pair(wanted) != _pair(given):
                plus = "" if key in node else "+"
                raise ValueError(
                    f"`{place}.{key}` = {given} and `{path}.{same}` = {wanted} disagree: the clips would not fit the "
                    f"model. Write `{plus}{place}.{key}={wanted}` or `{path}.{same}={given}`."
                )
        for place, node in targets(config.get("data"), "data"):
            takes_clips_alone = _value(encoder, "images") is False and _value(encoder, "num_frames") != 1
            if node["_target_"] in IMAGE_DATA and takes_clips_alone:
                raise ValueError(
                    f"`{place}._target_` = {node['_target_']} gives single frames, and `{path}.images` = False takes "
                    f"clips alone. Write `{'' if 'images' in encoder else '+'}{path}.images=true`, or choose a dataset "
                    "of clips."
                )


def _precisions(trainer: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """Every key that says a precision, and what it says: the trainer's, and those of its plugins."""
    yield "trainer.precision", trainer.get("precision")
    for path, node in targets(trainer.get("plugins"), "trainer.plugins"):
        yield f"{path}.precision", node.get("precision")


def _refuse_half(node: Mapping[str, Any], path: str, place: str, precision: Any) -> None:
    """float16 for a network whose activations it cannot hold: black or NaN videos. CogVideoX-2B alone, with sine-cosine
    positions, was published in it."""
    overflows = node["_target_"] in HALF_OVERFLOWS and _value(node, "positions") != "sincos"
    if overflows and precision in (16, "16", "16-mixed", "16-true"):
        raise ValueError(
            f"`{place}` = {precision} and `{path}._target_` = {node['_target_']}: this family was trained in "
            f"bfloat16, and overflows in float16, which gives black or NaN videos. Write `{place}=bf16-mixed`."
        )


def _check_frame_steps(config: Mapping[str, Any], codec: Mapping[str, Any], path: str) -> None:
    """A codec that takes the first frame alone and then ``frame_step`` at a time gets 1 + a multiple of it."""
    step = _value(codec, "frame_step")
    for place, node in targets(config.get("data"), "data") if isinstance(step, int) and step > 0 else ():
        given = _value(node, "num_frames")
        if isinstance(given, int) and (given - 1) % step:
            below = (given - 1) // step * step + 1
            raise ValueError(
                f"`{place}.num_frames` = {given} is not 1 + a multiple of `{path}.frame_step` = {step}: it codes "
                f"the first frame alone, then {step} at a time. The nearest legal values are "
                f"`{place}.num_frames={below}` and `{place}.num_frames={below + step}`."
            )


def _clip_sizes(config: Mapping[str, Any]) -> Iterator[tuple[str, Mapping[str, Any], str, str]]:
    """What sets the size of the clips that reach the model: a node with its full key, its key, and the encoder's."""
    augment = targets((config.get("task") or {}).get("augment"), "task.augment")
    crops = [  # and what another package may do to the size
        (path, node)
        for path, node in augment
        if _value(node, "size") is not None or not _inside(node["_target_"], (OWN, "torch.nn"))
    ]
    data = list(targets(config.get("data"), "data"))
    images = [path for path, node in data if node["_target_"] in IMAGE_DATA]
    for path, node in data:
        if not any(path.startswith(f"{image}.") for image in images):  # of any number of frames, one is taken
            yield path, node, "num_frames", "num_frames"
        if crops and path.startswith("data.train"):
            yield *crops[-1], "size", "image_size"  # the last one gives the clips their size
        else:
            yield path, node, "image_size", "image_size"


def targets(node: Any, path: str) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """Every mapping with a ``_target_`` in a node, with its full key."""
    if isinstance(node, Mapping):
        if isinstance(node.get("_target_"), str):
            yield path, node
        # A composed config may still hold `???`: it is looked at as it stands
        for key, value in node.items_ex(resolve=False) if isinstance(node, DictConfig) else node.items():
            yield from targets(value, f"{path}.{key!s}")
    elif isinstance(node, list | tuple):
        for index, item in enumerate(node):
            yield from targets(item, f"{path}.{index}")


def _value(node: Mapping[str, Any], key: str) -> Any:
    """The value of a key, else its default in the constructor, else None."""
    if key in node:
        return node[key]
    parameter = signature(node["_target_"]).parameters.get(key)
    return None if parameter is None or parameter.default is UNKNOWN else parameter.default


def _pair(value: Any) -> Any:
    """A square written as one number equals the pair."""
    return tuple(value) if isinstance(value, list | tuple) else (value, value)


def _divides(node: Mapping[str, Any], path: str, whole: str, part: str, consequence: str) -> None:
    """``whole`` must be a multiple of ``part``."""
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
                f"`{path}.{whole}` = {_value(node, whole)} is not divisible by `{path}.{part}` = {_value(node, part)}: "
                f"{total} {consequence}. The nearest legal values are `{path}.{whole}={multiple}` or "
                f"`{path}.{part}={divisor}`."
            )
