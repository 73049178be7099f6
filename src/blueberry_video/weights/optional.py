"""Optional packages, imported when what needs them is built."""

import importlib
from typing import Any


def import_extra(package: str, extra: str = "pretrained") -> Any:
    """The package.

    Raises:
        ImportError: it is not installed; the message names the extra that holds it.
    """
    try:
        return importlib.import_module(package)
    except ImportError as error:
        raise ImportError(
            f"{package} cannot be imported ({error}), and published weights need it: "
            f"pip install 'blueberry-video[{extra}]'."
        ) from error


def load_part(loader: Any, path: str, subfolder: str | None, what: str, **options: Any) -> Any:
    """``loader.from_pretrained`` of a local folder or hub id.

    Args:
        loader: a class of transformers or diffusers.
        path: the folder or id.
        subfolder: of it; None where the files lie in it.
        what: for the message.
        options: what else ``from_pretrained`` is given.

    Raises:
        FileNotFoundError: there is no such folder or id, or what it holds is of an unknown kind.
    """
    where = {} if subfolder is None else {"subfolder": subfolder}
    try:
        return loader.from_pretrained(path, **where, **options)
    except (OSError, ValueError) as error:  # what the libraries raise for missing or foreign files
        reason = str(error).strip().split("\n")[0]
        raise FileNotFoundError(
            f"no {what} could be loaded from {'/'.join(filter(None, (path, subfolder)))} ({reason}): give a folder as "
            "diffusers writes it (with text_encoder/, tokenizer/, vae/, …) or the id of one on the hub, and the right "
            "subfolder."
        ) from error
