"""Lazy import of optional packages."""

import importlib
from pathlib import Path
from typing import Any

from blueberry_video.installation import install_command
from blueberry_video.weights import hub


def import_extra(package: str, extra: str = "pretrained") -> Any:
    """Imports an optional package.

    Raises:
        ImportError: it is not installed; the message names the extra to install.
    """
    try:
        return importlib.import_module(package)
    except ImportError as error:
        raise ImportError(
            f"{package} cannot be imported ({error}), and published weights need it: "
            f"run `{install_command(extra, package)}`."
        ) from error


def load_part(loader: Any, path: str, subfolder: str | None, what: str, **options: Any) -> Any:
    """Calls ``loader.from_pretrained`` for a local folder or hub id.

    Args:
        loader: a class of transformers or diffusers.
        path: the folder, or the id with an optional revision, see :func:`~blueberry_video.weights.files.resolve`.
        subfolder: subfolder with the files, or ``None``.
        what: name of the part, for the message.
        options: further arguments of ``from_pretrained``.

    Raises:
        FileNotFoundError: the folder or id does not exist, or the class cannot read its files.
    """
    where = {} if subfolder is None else {"subfolder": subfolder}
    source = None if Path(path).exists() else hub.parse(path)
    if source is not None and source.revision is not None:
        where["revision"] = source.revision
    try:
        return loader.from_pretrained(path if source is None else source.id, **where, **options)
    except (OSError, ValueError) as error:  # raised by the libraries for missing or foreign files
        reason = str(error).strip().split("\n")[0]
        raise FileNotFoundError(
            f"no {what} could be loaded from {'/'.join(filter(None, (path, subfolder)))} ({reason}): use a folder in "
            "the layout of diffusers (with text_encoder/, tokenizer/, vae/, …) or a hub id, and the right subfolder."
        ) from error
