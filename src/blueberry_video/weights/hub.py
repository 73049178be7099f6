"""Repositories of weights on a hub (huggingface_hub), which are downloaded to its cache.

Environment variables of huggingface_hub apply: ``HF_ENDPOINT``, ``HF_HOME``, ``HF_HUB_CACHE``, ``HF_TOKEN``, and
``HF_HUB_OFFLINE=1``, with which only the cache is read.
"""

import re
from pathlib import Path
from typing import NamedTuple
from urllib.parse import unquote

from huggingface_hub import HfApi, constants, hf_hub_download, snapshot_download
from huggingface_hub.errors import (
    EntryNotFoundError,
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    HTTPError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

CONFIG = "config.json"
PATTERNS = ("*.json", "*.safetensors")  # of a repository that is downloaded whole
TORCH_SUFFIXES = (".bin", ".pth", ".pt", ".ckpt")
_REPOSITORY = r"(?P<id>[\w-][\w.-]*/[\w.-]+?)"
_REVISION = r"(?:@(?P<revision>refs/(?:pr|convert)/[^/@]+|[^/@]+))?"
_URI = re.compile(rf"hf:/+{_REPOSITORY}{_REVISION}(?:/(?P<file>.+))?")  # Path merges slashes
_ID = re.compile(rf"{_REPOSITORY}{_REVISION}")


class HubSource(NamedTuple):
    """Repository on a hub, or one file in it.

    Attributes:
        id: such as ``MCG-NJU/videomae-base``.
        revision: branch, tag or commit; ``None`` for ``main``.
        file: path in the repository; ``None`` for the whole repository.
    """

    id: str
    revision: str | None = None
    file: str | None = None

    def __str__(self) -> str:
        revision = f"@{self.revision}" if self.revision else ""
        return f"hf://{self.id}{revision}{f'/{self.file}' if self.file else ''}"


def parse(text: str) -> HubSource | None:
    """Returns the source that ``hf://org/name[@revision][/file]`` or ``org/name[@revision]`` names; else ``None``.

    A slash in a revision is written ``%2F``, except in ``refs/pr/<number>`` and ``refs/convert/<name>``.
    """
    found = _URI.fullmatch(text) or _ID.fullmatch(text)
    if found is None:
        return None
    named = found.groupdict()
    revision = named["revision"]
    return HubSource(named["id"], revision and unquote(revision), named.get("file"))


def fetch(source: HubSource) -> Path:
    """Returns the file, or the folder with the repository's JSON and safetensors files, in the cache.

    Pickled files (``.bin``, ``.pth``, …) are downloaded only if one is named; a ``config.json`` next to a named file is
    downloaded too.

    Raises:
        FileNotFoundError: the repository, revision or file does not exist, is not accessible, or the hub cannot be
            reached; or the repository has no safetensors file.
    """
    try:
        if source.file is None:
            folder = Path(snapshot_download(source.id, revision=source.revision, allow_patterns=list(PATTERNS)))
            if not any(folder.rglob("*.safetensors")):
                raise FileNotFoundError(_without_safetensors(source))
            return folder
        file = Path(hf_hub_download(source.id, source.file, revision=source.revision))
        _fetch_config(source, file)
        return file
    except (HfHubHTTPError, LocalEntryNotFoundError, EntryNotFoundError, HFValidationError, HTTPError) as error:
        raise FileNotFoundError(f"there are no weights at {source}: {_reason(source, error)}") from error


def _fetch_config(source: HubSource, file: Path) -> None:
    """Downloads the ``config.json`` in the folder of a file, if there is one, from the commit of the file."""
    assert source.file is not None
    commit = file.parts[-1 - len(Path(source.file).parts)]
    try:
        hf_hub_download(source.id, str(Path(source.file).with_name(CONFIG)), revision=commit)
    except EntryNotFoundError:  # the repository has none, or the cache of an earlier download
        return


def _reason(source: HubSource, error: Exception) -> str:
    """Returns why the hub did not provide a source, and the fix."""
    status = getattr(getattr(error, "response", None), "status_code", None)
    if isinstance(error, GatedRepoError) or status == 403:
        return (
            f"access to {source.id} is restricted ({status or 403}). Accept its terms at {constants.ENDPOINT}/"
            f"{source.id}, and log in with `hf auth login` or set HF_TOKEN."
        )
    if isinstance(error, RevisionNotFoundError):
        return f"{source.id} has no revision {source.revision!r} (404). Give a branch, tag or commit of the repository."
    if isinstance(error, RepositoryNotFoundError) or status == 401:
        return (
            f"it is not an existing path, and {constants.ENDPOINT} has no repository {source.id}, or it is private "
            f"({status or 404}). Correct the path or id; for a private repository log in with `hf auth login` or set "
            "HF_TOKEN."
        )
    if isinstance(error, LocalEntryNotFoundError):
        if constants.is_offline_mode():
            cause = "HF_HUB_OFFLINE is set, and it is not in the cache. Unset HF_HUB_OFFLINE"
        else:
            cause = f"it is not in the cache, and {constants.ENDPOINT} cannot be reached. Check network and HF_ENDPOINT"
        return f"{cause}, give the path of a copy, or set HF_HUB_CACHE to a cache that has it."
    if isinstance(error, EntryNotFoundError):
        return f"{source.id} has no file {source.file} (404). Give a file that the repository lists."
    if isinstance(error, HFValidationError):
        return f"{source.id!r} is no valid id. Give an existing file or folder, or an id such as MCG-NJU/videomae-base."
    text = str(error).strip().split("\n")[0] or type(error).__name__
    return f"the download from {constants.ENDPOINT} failed ({text}). Check the network, and try again."


def _without_safetensors(source: HubSource) -> str:
    """Returns the message for a repository that has no safetensors files."""
    found: list[str] = []
    if not constants.is_offline_mode():
        listed = HfApi().list_repo_files(source.id, revision=source.revision)
        found = [name for name in listed if Path(name).suffix in TORCH_SUFFIXES]
    return no_safetensors(str(source), found)


def no_safetensors(where: str, files: list[str]) -> str:
    """Returns the message for a repository or folder without safetensors files.

    Args:
        where: the repository or folder.
        files: its files in formats of torch.
    """
    if not files:
        return f"{where} holds no safetensors file: give a repository or folder with weights, or name the file of them."
    return (
        f"{where} holds no safetensors file, but {', '.join(files[:3])}{', …' if files[3:] else ''}: pickled files are "
        f"read only if they are named. Give {where.rstrip('/')}/{files[0]}, of which no code is executed."
    )
