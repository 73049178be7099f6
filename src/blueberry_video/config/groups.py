"""Groups of conf/ and their choices."""

import difflib
from pathlib import Path

from hydra.core.override_parser.types import Override
from omegaconf import DictConfig

from blueberry_video.config.checks import ROOT_KEYS


def is_group(override: Override, file: Path, conf: Path) -> bool:
    if isinstance(override.value(), dict):
        return False
    return any((root / override.key_or_group).is_dir() for root in (conf, file.parent))


def misspelt_group(override: Override, conf: Path) -> str | None:
    """Group with a name similar to the key, if it is not a root key: ``debug`` for ``debgu``."""
    key = override.key_or_group
    if "." in key or not isinstance(override.value(), str) or key in (*ROOT_KEYS, *groups_of(conf)):
        return None
    near = difflib.get_close_matches(key, {*ROOT_KEYS, *groups_of(conf)}, n=1, cutoff=0.6)
    return near[0] if near and near[0] not in ROOT_KEYS else None


def choices_of(group: str, file: Path, conf: Path) -> list[str]:
    """Choices of a group, e.g. ``vit/tiny``."""
    folders = (conf / group, file.parent / group)
    return sorted(
        {str(path.relative_to(folder).with_suffix("")) for folder in folders for path in folder.rglob("*.yaml")}
    )


def groups_of(conf: Path) -> list[str]:
    return sorted(path.name for path in conf.iterdir() if path.is_dir())


def chosen(settings: DictConfig) -> dict[str, str]:
    """Returns the choice of each group of a composed config, by ``group`` or ``group@package``."""
    choices = settings.runtime.choices.items()
    return {str(key): str(value) for key, value in choices if value is not None and "hydra/" not in str(key)}
