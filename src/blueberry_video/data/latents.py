"""Latents and text embeddings on disk, computed once by ``precompute.py``.

    <folder>/manifest.json           what the latents depend on; SHA-256 and latent shapes of every finished shard
    <folder>/00000.safetensors       consecutive clips; tensor names are <position in the shard>.<key>

Every file is written atomically, and a shard before its entry in the manifest. An interrupted run therefore leaves
complete shards, and the next run computes those that are not in the manifest. A clip is encoded independently of all
others, so that the files are identical to the byte.
"""

import fcntl
import hashlib
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, Self

import safetensors.torch
import torch
from torch import Tensor
from torch.utils.data import Dataset

from blueberry_video.atomic import write_bytes, write_text
from blueberry_video.data.clips import check_index
from blueberry_video.installation import start_command

MANIFEST = "manifest.json"
_FORMAT = 1
_MAX_OPEN = 256  # mapped shards per process: each uses a file descriptor


class LatentShards:
    """Writer of the shards of one dataset; a context manager that holds the lock of the folder.

    Args:
        folder: folder for this dataset only.
        made_of: what the latents depend on, such as fingerprints of autoencoder and text encoder and cache key of the
            data: JSON values by name.
        size: number of clips.
        shard_size: clips per file.
        classes, reversal_pairs: those of the dataset, see docs/architecture.md.

    Attributes:
        missing: numbers of the shards to be written; set on entering.

    Raises:
        ValueError: a size out of range; on entering: the folder contains shards with a different ``made_of``, or
            another process is writing to it.
    """

    key: ClassVar[str] = "moments"  # the tensor of every clip, of which the manifest has the shapes
    command: ClassVar[str] = start_command("latents", "…")
    missing: list[int]

    def __init__(
        self,
        folder: str | Path,
        made_of: Mapping[str, Any],
        size: int,
        shard_size: int = 64,
        classes: Mapping[str, Sequence[str]] | None = None,
        reversal_pairs: Mapping[str, Sequence[Sequence[int]]] | None = None,
    ):
        if size < 1 or shard_size < 1:
            raise ValueError(f"size={size} and shard_size={shard_size} must be at least 1.")
        self.folder, self.size, self.shard_size = Path(folder), size, shard_size
        self._manifest: dict[str, Any] = {
            "format": _FORMAT,
            "made_of": {**made_of, "size": size, "shard_size": shard_size},
            "classes": dict(classes or {}),
            "reversal_pairs": dict(reversal_pairs or {}),
            "shards": {},
        }

    def __enter__(self) -> Self:
        self.folder.mkdir(parents=True, exist_ok=True)
        self._lock = (self.folder / ".lock").open("w")
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)  # released when closed, also by a crash
        except BlockingIOError:
            self._lock.close()
            raise ValueError(
                f"another process is writing to {self.folder}: wait for it, or choose another folder (OUT=…)."
            ) from None
        try:
            self._resume()
        except BaseException:
            self._lock.close()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self._lock.close()

    def indices(self, number: int) -> range:
        """Returns the indices of the clips in a shard."""
        return range(number * self.shard_size, min((number + 1) * self.shard_size, self.size))

    def write(self, number: int, clips: Sequence[Mapping[str, Any]]) -> None:
        """Writes a shard.

        Args:
            number: index of the shard, from 0.
            clips: in order; the tensor ``key``, such as ``moments`` (2C, t, h, w), other tensors, and JSON values, such
                as ``id`` and ``caption``.

        Raises:
            ValueError: a wrong number of clips, NaN in a tensor or an infinite mean; the message names the clip.
        """
        if len(clips) != len(self.indices(number)):
            raise ValueError(f"shard {number} has {len(clips)} clips and must have {len(self.indices(number))}.")
        tensors, texts = {}, []
        for position, clip in enumerate(clips):
            own = {key: value.detach().cpu().contiguous() for key, value in clip.items() if isinstance(value, Tensor)}
            _check_finite(own, str(clip.get("id", self.indices(number)[position])))
            tensors.update({f"{position:05d}.{key}": value for key, value in own.items()})
            texts.append({key: value for key, value in clip.items() if key not in own})
        # one metadata entry: the order in which safetensors writes several differs between processes
        data = safetensors.torch.save(tensors, {"clips": json.dumps(texts)})
        name = _file_name(number)
        write_bytes(self.folder / name, data)
        self._manifest["shards"][name] = {
            "sha256": hashlib.sha256(data).hexdigest(),
            "shapes": [list(clip[self.key].shape) for clip in clips],
        }
        self._write_manifest()

    def _resume(self) -> None:
        for unfinished in self.folder.glob("*.tmp"):
            unfinished.unlink()
        if (self.folder / MANIFEST).exists():
            found = _read_manifest(self.folder, self.command)
            _check_same(self.folder, found["made_of"], self._manifest["made_of"])
            for name, shard in found["shards"].items():
                file = self.folder / name
                if file.is_file() and _sha256(file) == shard["sha256"]:
                    self._manifest["shards"][name] = shard
        self._write_manifest()
        numbers = range(-(-self.size // self.shard_size))
        self.missing = [number for number in numbers if _file_name(number) not in self._manifest["shards"]]

    def _write_manifest(self) -> None:
        self._manifest["shards"] = dict(sorted(self._manifest["shards"].items()))
        write_text(self.folder / MANIFEST, json.dumps(self._manifest, indent=1) + "\n")


class LatentClips(Dataset):
    """Map-style dataset of the files of ``LatentShards``.

    A clip has ``moments`` (2C, t, h, w), means and log-variances; for networks conditioned on an image
    ``image_moments`` (2C, 1, h, w), those of the first frame encoded separately; ``id``, ``caption`` and, if the data
    has them, ``labels`` and ``fps``; with a frozen text encoder also ``text_tokens`` (L, D), ``text_mask`` (L,) bool
    and ``text_pooled`` (P,). The task samples from the distribution at each step.

    Args:
        folder: contains ``manifest.json``.

    Attributes:
        made_of: what the latents depend on, by name; compare it before training with a different autoencoder.
        shapes: (2C, t, h, w) of every clip.
        classes, reversal_pairs: those of the encoded dataset.

    Raises:
        FileNotFoundError: there is no such folder.
        ValueError: shards are missing; when reading: a shard is damaged.
    """

    command: ClassVar[str] = LatentShards.command

    def __init__(self, folder: str | Path):
        self.folder = Path(folder)
        manifest = _read_manifest(self.folder, self.command)
        self.made_of: dict[str, Any] = manifest["made_of"]
        self.classes: dict[str, tuple[str, ...]] = {label: tuple(names) for label, names in manifest["classes"].items()}
        self.reversal_pairs: dict[str, tuple[tuple[int, int], ...]] = {
            label: tuple((a, b) for a, b in pairs) for label, pairs in manifest["reversal_pairs"].items()
        }
        self._shards: dict[str, dict] = manifest["shards"]
        wanted = math.ceil(self.made_of["size"] / self.made_of["shard_size"])
        if len(self._shards) < wanted:
            raise ValueError(
                f"{self.folder} contains {len(self._shards)} of {wanted} shards, because writing was interrupted: run "
                f"the same `{self.command}` again, which writes the missing ones."
            )
        self.shapes: list[tuple[int, ...]] = [
            tuple(shape) for shard in self._shards.values() for shape in shard["shapes"]
        ]
        self._open: dict[int, tuple[Any, list[dict]]] = {}

    @property
    def cache_key(self) -> str:
        """Everything that an item depends on except its index."""
        return f"latents-{_FORMAT}/{json.dumps(self.made_of, sort_keys=True)}"

    def __len__(self) -> int:
        return self.made_of["size"]

    def __getitem__(self, index: int) -> dict:
        check_index(index, len(self))
        number, position = divmod(index, self.made_of["shard_size"])
        tensors, texts = self._shard(number)
        prefix = f"{position:05d}."
        names = [name for name in tensors.keys() if name.startswith(prefix)]  # noqa: SIM118 - not a mapping
        return {**{name.removeprefix(prefix): tensors.get_tensor(name) for name in names}, **texts[position]}

    def __getstate__(self) -> dict:
        return {**self.__dict__, "_open": {}}  # memory maps cannot be pickled

    def captions(self) -> Iterator[str]:
        """Yields the caption of every clip, in order; checks the shards but reads no latents."""
        for number in range(len(self._shards)):
            yield from (text["caption"] for text in self._shard(number)[1])

    def _shard(self, number: int) -> tuple[Any, list[dict]]:
        if number not in self._open:
            path = self.folder / _file_name(number)
            if not path.is_file() or _sha256(path) != self._shards[path.name]["sha256"]:
                raise ValueError(
                    f"the shard {path} is missing or damaged (SHA-256): remove it, and run the same "
                    f"`{self.command}` again, which writes it again."
                )
            tensors = safetensors.safe_open(path, framework="pt")
            if len(self._open) >= _MAX_OPEN:
                self._open.pop(next(iter(self._open)))
            self._open[number] = tensors, json.loads(tensors.metadata()["clips"])
        return self._open[number]


def _read_manifest(folder: Path, command: str) -> dict[str, Any]:
    path = folder / MANIFEST
    if not path.is_file():
        raise FileNotFoundError(
            f"there is no {path}: write it with `{command}`, and set folder to the folder that it wrote for one "
            "split, as in data/latents/<experiment>/train."
        )
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(
            f"{path} is not valid JSON ({error}): remove the folder, and run `{command}` again."
        ) from error
    if manifest.get("format") != _FORMAT:
        raise ValueError(
            f"{path} has format={manifest.get('format')!r} and this version reads {_FORMAT}: run `{command}` again."
        )
    if missing := {"made_of", "classes", "reversal_pairs", "shards"} - set(manifest):
        raise ValueError(f"{path} has no {', '.join(sorted(missing))}: remove the folder, and run `{command}` again.")
    if "codec" in manifest["made_of"]:  # name of the key in folders written before it was renamed
        manifest["made_of"]["autoencoder"] = manifest["made_of"].pop("codec")
    return manifest


def _check_same(folder: Path, before: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    """Checks that the shards in a folder depend on the same values as the missing ones."""
    changed = [f"{key} was {before.get(key)} and is {now.get(key)}" for key in now if before.get(key) != now.get(key)]
    if changed:
        raise ValueError(
            f"{folder} was written with other settings: {'; '.join(changed)}. Choose another folder (OUT=…), or "
            "remove this one."
        )


def _check_finite(tensors: Mapping[str, Tensor], name: str) -> None:
    """Checks that nothing is NaN or infinite; log-variances may be -inf."""
    for key, value in tensors.items():
        if not value.is_floating_point():
            continue
        bounded = value[: len(value) // 2] if key in ("moments", "image_moments") else value
        if torch.isnan(value).any() or torch.isinf(bounded).any():
            raise ValueError(
                f"{key} of the clip {name!r} is NaN or infinite: check the clip, and encode in float32 or bfloat16 "
                "(published video autoencoders and text encoders overflow in float16)."
            )


def _file_name(number: int) -> str:
    return f"{number:05d}.safetensors"


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
