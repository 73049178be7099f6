"""Strict loading of state dicts into modules, and comparison of model settings."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor, nn


def mismatches(own: Mapping[str, Tensor], loaded: Mapping[str, Tensor]) -> str:
    """Describes the differences between two state dicts in names and shapes; empty if there are none.

    Args:
        own: the state dict of the module.
        loaded: the state dict to load into it.
    """
    shapes = {name for name in own.keys() & loaded.keys() if own[name].shape != loaded[name].shape}
    found = []
    for names, kind in ((own.keys() - loaded.keys(), "missing"), (loaded.keys() - own.keys(), "unexpected")):
        if names:
            found.append(f"{len(names)} {kind}, such as {min(names)}")
    if shapes:
        name = min(shapes)
        sizes = f"{tuple(loaded[name].shape)} instead of {tuple(own[name].shape)}"
        found.append(f"{len(shapes)} of a different shape, such as {name} {sizes}")
    return "; ".join(found)


def load_strictly(module: nn.Module, state: Mapping[str, Tensor], source: str | Path, fix: str = "") -> None:
    """Loads a state dict with exactly the names and shapes of the module.

    Values are converted to the dtype and device of the module. A module on the meta device is assigned the tensors
    themselves, in their dtype.

    Args:
        module: the module to load into.
        state: tensors by name.
        source: origin of the weights, for the error message.
        fix: a sentence for the error message on what to change.

    Raises:
        ValueError: tensors are missing, unexpected or of a different shape; the message names one of each kind.
    """
    own = module.state_dict()
    if found := mismatches(own, state):
        raise ValueError(f"the weights in {source} do not fit {type(module).__name__}: {found}. {fix}".rstrip())
    if not any(value.is_meta for value in own.values()):
        module.load_state_dict(state)
        return
    trainable = {name: parameter.requires_grad for name, parameter in module.named_parameters()}
    module.load_state_dict(state, assign=True)
    for name, parameter in module.named_parameters():
        parameter.requires_grad_(trainable[name])


def check_layout(layout: str, settings: Mapping[str, tuple[Any, Any]]) -> None:
    """Checks that a model can be saved in a published layout.

    Args:
        layout: name of the layout, for the error message.
        settings: key -> (value of the model, value that the layout requires).

    Raises:
        ValueError: a setting has no counterpart in the layout; the message names key and value.
    """
    for key, (value, required) in settings.items():
        if value != required:
            raise ValueError(f"{key}={value!r} has no counterpart in {layout}, which requires {key}={required!r}.")


def check_config(
    module: nn.Module, config: Mapping[str, Any], settings: Mapping[str, Any], source: str | Path, fix: str = ""
) -> None:
    """Checks that settings of a module, which no tensor determines, equal those of a published config.

    Raises:
        ValueError: settings differ; the message names them.
    """
    if found := different_settings(config, settings):
        raise ValueError(f"the config of {source} does not fit {type(module).__name__}: {found}. {fix}".rstrip())


def different_settings(loaded: Mapping[str, Any], own: Mapping[str, Any]) -> str:
    """Lists the settings that differ, as ``key=theirs (here ours)``; empty if all shared keys agree."""
    shared = [key for key in loaded if key in own and loaded[key] != own[key]]
    return ", ".join(f"{key}={loaded[key]} (here {own[key]})" for key in shared)


def num_heads_of(
    config: Mapping[str, Any],
    given: int | None,
    width: int,
    source: str | Path,
    published: Mapping[int, str],
    argument: str = "num_heads",
    key: str = "num_attention_heads",
) -> int:
    """Returns the number of attention heads of weights, which no tensor determines: that of their config, or the given
    one.

    Args:
        config: the config of the weights; empty if there is none.
        given: the argument, or ``None``.
        width: width of the attention layers.
        source: origin of the weights, for the messages.
        published: width of the published models of this architecture -> their numbers of heads, for the message.
        argument: name of the argument.
        key: key of ``config``.

    Raises:
        ValueError: neither states the number, or they differ.
    """
    known = config.get(key)
    if known is not None and given not in (None, known):
        raise ValueError(
            f"{argument}={given} contradicts {key}={known} in the config of {source}: leave {argument} out."
        )
    if (found := known or given) is None:
        hint = f"the published model of this width has {published[width]}" if width in published else ""
        raise ValueError(
            f"{source} has attention layers of width={width}, and neither its tensors nor a config determine their "
            f"number of heads: pass {argument}=…{f' ({hint})' if hint else ''}, or the folder with its config.json."
        )
    return int(found)


def origin_of_heads(config: Mapping[str, Any], settings: Mapping[str, Any]) -> str:
    """Returns where the numbers of attention heads of loaded weights come from, as the end of a sentence.

    Args:
        config: the config of the weights; empty if there is none.
        settings: the settings of the model, under the names of ``config.json``.
    """
    text = ""
    for key, value in settings.items():
        if key.endswith("num_attention_heads"):
            known = key in config
            text += (
                f"; {key}={value} {'as in its config' if known else 'of this model, which no config of it verifies'}"
            )
    return text
