"""Folder of features of videos: a file per video, and ``features.json`` with their settings.

A file has a row per window of the video (level ``clip``), per step of the patch grid in time (``frame``), or per token
(``token``), in the order of time and raster order, as arrays of the same length:

- ``features`` float32 (rows, D);
- ``start``, ``end`` float64: the window, in seconds after the first frame;
- ``missing`` int32: frames of the window that could not be decoded, and are replaced by their neighbors;
- ``seconds`` float64, from level ``frame``: mean time of the frames of the step;
- ``t``, ``h``, ``w`` int32, of level ``token``: position in the patch grid.
"""

import io
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import save

from blueberry_video.atomic import explained_errors, write_bytes, write_text
from blueberry_video.installation import install_command

LEVELS = ("clip", "frame", "token")
FORMATS = ("safetensors", "npz", "parquet")
ABOUT = "features.json"

Rows = Mapping[str, NDArray[Any]]


class FeatureFolder:
    """Writer of a folder of features, which a killed command continues: a file appears when it is complete.

    Args:
        folder: may hold features with the same settings.
        settings: JSON values that the features depend on.
        file_format: ``"safetensors"``, ``"npz"`` or ``"parquet"``, which requires pyarrow.
        overwrite: remove the features of other settings.

    Raises:
        ValueError: the format is unknown.
        ImportError: pyarrow is missing.
        FileExistsError: the folder has features of other settings.
    """

    def __init__(
        self, folder: str | Path, settings: Mapping[str, Any], file_format: str = "safetensors", overwrite: bool = False
    ):
        self.folder, self.format = Path(folder), file_format
        if file_format not in FORMATS:
            raise ValueError(f"--format={file_format} is unknown: use one of {', '.join(FORMATS)}.")
        if file_format == "parquet":
            _pyarrow()
        settings, about = {**settings, "format": file_format}, self.folder / ABOUT
        with explained_errors(about):
            self.folder.mkdir(parents=True, exist_ok=True)
        if about.is_file():
            self._continue(about, settings, overwrite)
        write_text(about, json.dumps(settings, indent=2) + "\n")

    def path(self, name: str) -> Path:
        """Returns the file of a video with a relative path."""
        return (self.folder / name).with_suffix(f".{self.format}")

    def write(self, name: str, rows: Rows) -> None:
        """Writes the file of a video; the same rows give the same bytes."""
        file = self.path(name)
        with explained_errors(file):
            file.parent.mkdir(parents=True, exist_ok=True)
        write_bytes(file, _encoded(rows, self.format))

    def _continue(self, about: Path, settings: Mapping[str, Any], overwrite: bool) -> None:
        """Checks the settings of a folder; with ``overwrite`` removes its features."""
        try:
            found = json.loads(about.read_text())
        except ValueError:
            found = {}
        differing = sorted(key for key in settings.keys() | found.keys() if settings.get(key) != found.get(key))
        if differing and not overwrite:
            key = differing[0]
            raise FileExistsError(
                f"--out={self.folder} has features with {key}={found.get(key)} instead of {settings.get(key)}: choose "
                "another folder, or pass --overwrite to replace them."
            )
        if overwrite:
            for file in sorted(self.folder.rglob(f"*.{found.get('format', self.format)}")):
                file.unlink()


def check_distinct(names: Mapping[str, str]) -> None:
    """Raises a ValueError if two videos have the same file of features."""
    seen: dict[Path, str] = {}
    for video, name in names.items():
        stem = Path(name).with_suffix("")
        if stem in seen:
            raise ValueError(f"{seen[stem]} and {video} would have the same file: write them to different folders.")
        seen[stem] = video


def rows_of_window(
    tokens: NDArray[np.float32], patches: tuple[int, int], timestamps: NDArray[np.float64], level: str
) -> dict[str, NDArray[Any]]:
    """Returns the rows of a window.

    Args:
        tokens: (N, D) of its clip, in (t, h, w) raster order.
        patches: number of tokens (h, w) of a frame.
        timestamps: seconds (T,) of the frames of the clip.
        level: one of :data:`LEVELS`.
    """
    h, w = patches
    grid = tokens.reshape(-1, h, w, tokens.shape[-1])
    if level == "clip":
        return {"features": tokens.mean(axis=0, keepdims=True)}
    steps = len(grid)
    times = timestamps[: steps * max(len(timestamps) // steps, 1)].reshape(steps, -1).mean(axis=1)
    if level == "frame":
        return {"features": grid.mean(axis=(1, 2)), "seconds": times}
    positions = np.indices((steps, h, w), dtype=np.int32).reshape(3, -1)
    return {"features": tokens, "seconds": times.repeat(h * w), **dict(zip("thw", positions, strict=True))}


def read_features(file: str | Path) -> dict[str, NDArray[Any]]:
    """Returns the arrays of a file of features.

    Raises:
        FileNotFoundError: there is no such file.
        ImportError: pyarrow is missing for a ``.parquet`` file.
    """
    file = Path(file)
    if not file.is_file():
        raise FileNotFoundError(f"there are no features at {file}: give a file that `blueberry features` has written.")
    if file.suffix == ".parquet":
        _pyarrow()
        from pyarrow import parquet

        table = parquet.read_table(file)
        arrays = {name: table[name].to_numpy() for name in table.column_names if name != "features"}
        return {"features": np.stack(table["features"].to_numpy()), **arrays}
    if file.suffix == ".npz":
        with np.load(file) as arrays:
            return dict(arrays)
    from safetensors.numpy import load_file

    return load_file(file)


def _encoded(rows: Rows, file_format: str) -> bytes:
    if file_format == "safetensors":
        return save({name: np.ascontiguousarray(values) for name, values in rows.items()})
    file = io.BytesIO()
    if file_format == "npz":
        np.savez(file, **rows)  # type: ignore[arg-type]
        return file.getvalue()
    import pyarrow
    from pyarrow import parquet

    features = rows["features"]
    columns = {name: pyarrow.array(values) for name, values in rows.items() if name != "features"}
    flat = pyarrow.array(features.reshape(-1))
    columns["features"] = pyarrow.FixedSizeListArray.from_arrays(flat, features.shape[1])
    parquet.write_table(pyarrow.table(columns), file)
    return file.getvalue()


def _pyarrow() -> None:
    try:
        import pyarrow  # noqa: F401
    except ImportError as error:
        raise ImportError(
            f"--format=parquet requires pyarrow ({error}): run `{install_command('parquet', 'pyarrow')}`, or use "
            "safetensors or npz."
        ) from error
