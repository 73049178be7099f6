"""Labels of a classifier and of its data: numbers that the data determines, and checks that both agree."""

import copy
from collections.abc import Iterator, Mapping, Sequence
from inspect import Parameter
from typing import Any

from hydra.errors import InstantiationException
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf

from blueberry_video.config.checks import FROM_DATA
from blueberry_video.config.signatures import signature


def with_classes(config: DictConfig, data: Any = None) -> DictConfig:
    """Returns a config in which the number of classes is set everywhere.

    A class that requires ``num_classes``, in ``model`` or ``task``, has the labels of the data if the key is null or
    absent. Where numbers are set already, the config is returned unchanged and no data is read.

    Args:
        config: the resolved config.
        data: the DataModule of the config; built from it if None.

    Raises:
        ValueError: the data has no labels.
        FileNotFoundError: the data is not on this machine.
    """
    if not any(_open_heads(config.get(root), root) for root in ("model", "task")):
        return config
    classes = (data if data is not None else _data(config)).classes
    if not classes:
        raise ValueError(
            f"`model.{FROM_DATA}` = null takes the labels of the data, but the clips of `data.train` "
            f"({config.data.train.get('_target_', 'data')}) have no labels: choose data with labels, or another "
            "`task` and `model`."
        )
    filled = copy.deepcopy(config)
    for root in ("model", "task"):
        for key in _open_heads(filled.get(root), root):
            OmegaConf.update(filled, key, {label: len(names) for label, names in classes.items()}, force_add=True)
    return filled


def _data(config: DictConfig) -> Any:
    try:
        return instantiate(config.data)
    except InstantiationException as error:
        if not isinstance(error.__cause__, FileNotFoundError):
            raise
        raise FileNotFoundError(
            f"{error.__cause__} (`model.{FROM_DATA}` = null takes the labels of the data; without the data, write the "
            f"numbers, as in `'model.{FROM_DATA}={{class: 10}}'`.)"
        ) from error


def _open_heads(node: Any, path: str) -> list[str]:
    """Returns the keys of the numbers of classes that the data determines."""
    return list(_find_open(node, path))


def _find_open(node: Any, path: str) -> Iterator[str]:
    if not OmegaConf.is_dict(node):
        return
    if "_target_" in node and node.get(FROM_DATA) is None:
        parameter = signature(node["_target_"]).parameters.get(FROM_DATA)
        if parameter is not None and parameter.default is Parameter.empty:
            yield f"{path}.{FROM_DATA}"
    for key, value in node.items():
        yield from _find_open(value, f"{path}.{key}")


def check_classes(heads: Mapping[str, int | None] | None, classes: Mapping[str, Sequence[str]]) -> None:
    """Checks that the data has every label that the model predicts, with at most as many classes.

    Args:
        heads: ``model.num_classes``, label → number of classes, None for an unused label; None for a model without
            labels.
        classes: label → names of the classes in the training set.

    Raises:
        ValueError: for the first label.
    """
    fitting = ", ".join(f"{label}: {len(names)}" for label, names in classes.items())
    for label, number in (heads or {}).items():
        if number is None:
            continue
        if label not in classes:
            removed = f"remove it with `~model.num_classes.{label}`, write `num_classes: null` for all labels of the "
            removed += f"data, or in YAML replace all labels, `num_classes: ${{oc.create:{{{fitting}}}}}`, because a "
            removed += "mapping is merged with that of conf/"
            raise ValueError(
                f"`model.num_classes.{label}` = {number}: the data has no label `{label}`, only "
                f"{', '.join(classes) or 'clips without labels'}: {removed if classes else 'choose data with labels'}."
            )
        if number < len(classes[label]):
            raise ValueError(
                f"`model.num_classes.{label}` = {number} is less than the {len(classes[label])} classes of `{label}` "
                f"in the data: write `model.num_classes.{label}={len(classes[label])}`."
            )
