"""Tables of a data set in the formats v3.0 and v2.1 of LeRobot: episodes, tasks, and the numbers of every frame.

meta/info.json                    version, frame rate, features, and the patterns of the paths
meta/episodes/**.parquet          (v3.0) per episode: rows of its frames, files, and seconds in the file of a camera
meta/tasks.parquet                (v3.0) task_index and task
meta/episodes.jsonl, tasks.jsonl  (v2.1)
data/**.parquet                   per frame: action, observation.state, timestamp, episode_index, task_index
videos/**.mp4                     per camera: one (v2.1) or several (v3.0) episodes in a file
"""

import importlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from blueberry_video.data.metadata import some
from blueberry_video.installation import install_command

VERSIONS = ("v3.0", "v2.1")


@dataclass(frozen=True)
class Episode:
    """Episode of a data set.

    Attributes:
        number: ``episode_index``.
        start, length: its rows in the tables of frames.
        path: video file of the camera.
        seconds: its start in this file.
    """

    number: int
    start: int
    length: int
    path: Path
    seconds: float


class LeRobotTables:
    """Episodes, tasks and numbers of a data set.

    Args:
        root: the folder.
        camera: feature of the videos; None for the only one.
        columns: names of the features to read of every frame.

    Attributes:
        fps: frames per second.
        camera: feature of the videos.
        episodes: by number.
        values: feature -> float32 (frames, width), in the order of the frames.
        timestamps: float64 (frames,), seconds after the start of the episode.
        tasks: text of the task of every frame.
        splits: name -> (first, last + 1) episode.

    Raises:
        FileNotFoundError: no ``meta/info.json``, or a file that it refers to.
        ImportError: pyarrow is not installed.
        ValueError: another version, no such feature, or tables that do not agree.
    """

    def __init__(self, root: Path, camera: str | None, columns: Sequence[str]):
        self.root, self.info = root, _info(root)
        self.fps = float(self.info["fps"])
        features = self.info["features"]
        self.camera = _camera(root, features, camera)
        for name in columns:
            if name not in features:
                has = ", ".join(key for key in features if features[key].get("dtype") not in ("video", "image"))
                raise ValueError(f"{root} has no feature {name!r}, only {has}: set actions and states to one, or null.")
        self.splits = {name: _range(text) for name, text in self.info.get("splits", {}).items()}
        frames = _concatenated(sorted((root / "data").rglob("*.parquet")), root, [*columns, *_FRAME_COLUMNS])
        order = np.argsort(frames["index"], kind="stable")
        self.values = {name: _matrix(name, frames[name])[order] for name in columns}
        self.timestamps = frames["timestamp"].astype(np.float64)[order]
        self._texts = _tasks(root)
        self._task_ids = frames["task_index"][order]
        self.episodes = self._episodes(frames["episode_index"][order])

    def task(self, row: int) -> str:
        """Text of the task of a frame."""
        number = int(self._task_ids[row])
        if number not in self._texts:
            raise ValueError(f"{self.root}: frame {row} has task_index={number}, which meta/tasks does not list.")
        return self._texts[number]

    def _episodes(self, owners: np.ndarray) -> dict[int, Episode]:
        numbers, starts, lengths = np.unique(owners, return_index=True, return_counts=True)
        if (np.diff(owners) < 0).any():
            raise ValueError(f"{self.root}: the frames in data/ are not sorted by episode_index: convert it again.")
        places = _places(self.root, self.info, self.camera)
        found = {}
        for number, start, length in zip(numbers.tolist(), starts.tolist(), lengths.tolist()):
            if number not in places:
                raise ValueError(f"{self.root}: episode {number} is in data/, but not in meta/episodes: copy it again.")
            path, seconds, listed = places[number]
            if listed != length:
                raise ValueError(
                    f"{self.root}: episode {number} has {length} frames in data/ and length={listed} in meta/episodes: "
                    "copy or convert the data set again."
                )
            found[number] = Episode(number, start, length, path, seconds)
        return found


_FRAME_COLUMNS = ("index", "episode_index", "timestamp", "task_index")


def _info(root: Path) -> dict[str, Any]:
    path = root / "meta" / "info.json"
    if not path.is_file():
        raise FileNotFoundError(
            f"There is no {path}: set root to a data set of LeRobot, with meta/, data/ and videos/."
        )
    try:
        info = json.loads(path.read_text())
        version = info["codebase_version"]
        _ = info["fps"], info["features"], info["data_path"]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is not the description of a data set of LeRobot ({error!r}).") from error
    if version not in VERSIONS:
        raise ValueError(
            f"{path} has codebase_version={version!r}, and {' and '.join(VERSIONS)} are read: convert it with the "
            "scripts of LeRobot."
        )
    return info


def _camera(root: Path, features: Mapping[str, Mapping[str, Any]], camera: str | None) -> str:
    cameras = [name for name, feature in features.items() if feature.get("dtype") == "video"]
    if not cameras:
        raise ValueError(f"{root} has no feature of the dtype 'video': data sets of single images are not read.")
    if camera is None and len(cameras) > 1:
        raise ValueError(f"{root} has the cameras {', '.join(cameras)}: set camera to one of them.")
    if camera is not None and camera not in cameras:
        raise ValueError(f"camera={camera!r} is not a camera of {root}: use one of {', '.join(cameras)}.")
    return camera or cameras[0]


def _range(text: str) -> tuple[int, int]:
    first, _, last = text.partition(":")
    return int(first or 0), int(last) if last else 2**62


def parse_episodes(text: str) -> tuple[int, int]:
    """Returns the first and last + 1 of a range such as ``0:45``, ``:45`` or ``45:``.

    Raises:
        ValueError: another form.
    """
    first, colon, last = text.partition(":")
    if not colon or not all(part.isdecimal() or not part for part in (first.strip(), last.strip())):
        raise ValueError(f"episodes={text!r} must be a range such as '0:45', '45:' or ':45', without its last number.")
    return _range(text.replace(" ", ""))


def _parquet() -> Any:
    try:
        return importlib.import_module("pyarrow.parquet")
    except ImportError as error:
        raise ImportError(
            f"pyarrow cannot be imported ({error}), and the tables of LeRobot need it: run "
            f"`{install_command('lerobot', 'pyarrow')}`."
        ) from error


def _concatenated(files: Sequence[Path], root: Path, columns: Sequence[str]) -> dict[str, np.ndarray]:
    """Returns the columns of parquet files, one after the other."""
    if not files:
        raise FileNotFoundError(f"{root} has no parquet file in data/: copy the data set again.")
    parquet, parts = _parquet(), []
    for file in files:
        known = set(parquet.read_schema(file).names)
        if lacking := [name for name in columns if name not in known]:
            raise ValueError(f"{file} has no column {lacking[0]!r}, which meta/info.json lists: convert it again.")
        parts.append(parquet.read_table(file, columns=list(columns)))
    return {name: np.concatenate([_column(part[name]) for part in parts]) for name in columns}


def _column(column: Any) -> np.ndarray:
    """Returns a column of numbers (n,), or of lists of numbers of one length (n, width)."""
    if str(column.type).startswith(("list", "fixed_size_list", "large_list")):
        lists = column.to_pylist()
        if len(widths := {len(values) for values in lists}) > 1:
            raise ValueError(f"a column has lists of {sorted(widths)} numbers, where each frame must have as many.")
        return np.array(lists, np.float32)
    return column.to_numpy()


def _matrix(name: str, values: np.ndarray) -> np.ndarray:
    matrix = values.astype(np.float32)
    return matrix[:, None] if matrix.ndim == 1 else matrix


def _tasks(root: Path) -> dict[int, str]:
    """Returns task_index -> text."""
    table, lines = root / "meta" / "tasks.parquet", root / "meta" / "tasks.jsonl"
    if table.is_file():
        content = _parquet().read_table(table).to_pydict()
        text = next((name for name in content if name != "task_index"), None)  # the index of pandas has its own name
        if text is None or "task_index" not in content:
            raise ValueError(
                f"{table} has the columns {', '.join(content)}, not task_index and task: convert it again."
            )
        return {int(number): str(words) for number, words in zip(content["task_index"], content[text], strict=True)}
    if lines.is_file():
        return {int(row["task_index"]): str(row["task"]) for row in _json_lines(lines)}
    raise FileNotFoundError(f"There is no {table}, nor {lines.name}: copy the data set again.")


def _places(root: Path, info: Mapping[str, Any], camera: str) -> dict[int, tuple[Path, float, int]]:
    """Returns episode -> video file, start in seconds, and number of frames."""
    pattern = str(info["video_path"])
    if info["codebase_version"] == "v2.1":
        found, size = {}, int(info.get("chunks_size", 1000))
        for row in _json_lines(root / "meta" / "episodes.jsonl"):
            number = int(row["episode_index"])
            name = pattern.format(episode_chunk=number // size, video_key=camera, episode_index=number)
            found[number] = (root / name, 0.0, int(row["length"]))
        return found
    places = {}
    for file in sorted((root / "meta" / "episodes").rglob("*.parquet")):
        keys = [f"videos/{camera}/{key}" for key in ("chunk_index", "file_index", "from_timestamp")]
        columns = _parquet().read_table(file, columns=["episode_index", "length", *keys]).to_pydict()
        if lacking := [key for key in ("episode_index", "length", *keys) if key not in columns]:
            raise ValueError(f"{file} has no column {lacking[0]!r}: copy or convert the data set again.")
        for number, length, chunk, index, start in zip(*(columns[key] for key in ("episode_index", "length", *keys))):
            name = pattern.format(video_key=camera, chunk_index=chunk, file_index=index)
            places[int(number)] = (root / name, float(start), int(length))
    if not places:
        raise FileNotFoundError(f"{root} has no parquet file in meta/episodes/: copy the data set again.")
    return places


def _json_lines(path: Path) -> list[dict[str, Any]]:
    if not path.is_file():
        raise FileNotFoundError(f"There is no {path}: copy the data set again.")
    return [json.loads(line) for line in path.read_text().splitlines() if line.strip()]


def episodes_of(tables: LeRobotTables, split: str | None, episodes: str | None) -> list[Episode]:
    """Returns the episodes of a split, or of a range.

    Raises:
        ValueError: no such split, or no episode in the range.
    """
    if split is not None and episodes is not None:
        raise ValueError(f"split={split!r} and episodes={episodes!r} both select episodes: set one of them to null.")
    if split is not None and split not in tables.splits:
        raise ValueError(
            f"split={split!r} is not in meta/info.json, which has {some(list(tables.splits))}: use one of them, or a "
            "range of episodes, as in episodes='0:45'."
        )
    first, last = tables.splits[split] if split is not None else parse_episodes(episodes or ":")
    found = [episode for number, episode in sorted(tables.episodes.items()) if first <= number < last]
    if not found:
        raise ValueError(
            f"episodes={episodes!r} (split={split!r}) selects none of the episodes 0 to {max(tables.episodes)} of "
            f"{tables.root}: choose a range within them."
        )
    return found
