"""Metadata of a folder of videos or images: file name, caption, labels and split of each file.

A row is an object of ``metadata.jsonl`` (one per line) or ``metadata.json`` (a list), or a record of ``metadata.csv``
or ``metadata.tsv`` (separated by commas, semicolons or tabs), as UTF-8 or, with a byte order mark, UTF-16, with

- the file name, relative to the root or to its ``videos`` (or ``images``) folder, under ``file_name`` (alternatively
  ``filename``, ``file``, ``path``, and ``video`` or ``image``);
- ``caption`` (alternatively ``text`` or ``prompt``), optional text;
- ``labels``, an optional object {label: class}; in a CSV file one column ``labels.<label>`` each; ``label`` is short
  for {"label": …};
- ``split``, optional.

Other keys are ignored, but a misspelled one, such as ``Caption`` or ``captions``, raises. A class is a name or number.
Class ids follow the order of ``classes.json`` or of the argument ``classes``, otherwise the sorted order, with numbers
by value. Either every row has a caption (or a label) or none.

Files may also be in one folder per class, without metadata: see ``read_class_folders``.
"""

import codecs
import csv
import io
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from blueberry_video.installation import start_command

NAMES = ("metadata.jsonl", "metadata.json", "metadata.csv", "metadata.tsv")
CAPTION_KEYS = ("caption", "text", "prompt")


@dataclass(frozen=True)
class Media:
    """Kind of files in a folder: ``<root>/<noun>s/`` contains files with these ``extensions``."""

    noun: str
    extensions: frozenset[str]

    @property
    def folder(self) -> str:
        return f"{self.noun}s"

    @property
    def file_keys(self) -> tuple[str, ...]:
        """Keys of a row that may contain the file name."""
        return ("file_name", "filename", "file", self.noun, "path")


_VIDEO_FILES = ".mp4 .m4v .mov .mkv .webm .avi .mpg .mpeg .ts .m2ts .gif .flv .wmv .3gp .ogv .h264 .h265 .ivf"
_IMAGE_FILES = ".jpg .jpeg .png .webp .bmp .tif .tiff"
VIDEOS = Media("video", frozenset(_VIDEO_FILES.split(" ")))
IMAGES = Media("image", frozenset(_IMAGE_FILES.split(" ")))


@dataclass(frozen=True)
class Row:
    """Metadata of one file. ``name`` is the path below ``videos``, ``images`` or the split, with slashes; ``labels``
    are class ids; ``split`` is that of a metadata row."""

    name: str
    path: Path
    caption: str | None
    labels: dict[str, int]
    split: str | None = None

    @property
    def annotations(self) -> dict:
        """The entries ``caption`` and ``labels`` of a clip, if the row has them."""
        caption = {} if self.caption is None else {"caption": self.caption}
        return {**caption, "labels": dict(self.labels)} if self.labels else caption


def read_classes(
    root: Path, given: Mapping[str, Sequence[str]] | None = None
) -> tuple[dict[str, tuple[str, ...]], dict[str, tuple[tuple[int, int], ...]]]:
    """Returns the class names and reversal pairs of ``classes.json``; both are empty without the file.

    Args:
        root: the folder.
        given: class names that replace those of the file. Pairs refer to them; those of absent classes are dropped.

    Raises:
        ValueError: the file has another layout, or ``given`` is not a list of different names per label.
    """
    path = root / "classes.json"
    classes: dict[str, tuple[str, ...]] = {}
    pairs: dict[str, tuple[tuple[int, int], ...]] = {}
    if path.exists():
        content = _json(str(path), read_text(path))
        try:
            classes = {str(label): _class_names(label, names) for label, names in content["classes"].items()}
            listed = {str(label): found for label, found in content.get("reversal_pairs", {}).items()}
            pairs = {label: tuple(_pair(classes[label], *pair) for pair in found) for label, found in listed.items()}
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(
                f'{path} is not {{"classes": {{label: [names]}}, "reversal_pairs": {{label: [[i, j]]}}}} ({error!r}): '
                "correct it, or remove it to number the classes in sorted order."
            ) from error
    return renamed_classes(classes, pairs, given)


def renamed_classes(
    classes: dict[str, tuple[str, ...]],
    pairs: dict[str, tuple[tuple[int, int], ...]],
    given: Mapping[str, Sequence[str]] | None,
) -> tuple[dict[str, tuple[str, ...]], dict[str, tuple[tuple[int, int], ...]]]:
    """Replaces class names by ``given``; pairs refer to the new order, and those of absent classes are dropped."""
    if not given:
        return classes, pairs
    named = {str(label): _class_names(label, names) for label, names in given.items()}
    moved = {label: [[classes[label][i] for i in pair] for pair in found] for label, found in pairs.items()}
    return named, {
        label: tuple((names.index(a), names.index(b)) for a, b in moved.get(label, ()) if {a, b} <= set(names))
        for label, names in named.items()
        if moved.get(label)
    }


def _class_names(label: object, names: object) -> tuple[str, ...]:
    if isinstance(names, str | Mapping) or not isinstance(names, Sequence):
        raise ValueError(f"classes of {label}={names!r} must be a list of names: write [{label}_a, {label}_b].")
    wrong = [name for name in names if isinstance(name, bool) or not isinstance(name, str | int)]
    if wrong:
        raise ValueError(f"classes of {label} include {wrong[0]!r}, which must be a name or an integer: quote it.")
    found = tuple(map(str, names))
    if repeated := [name for name in dict.fromkeys(found) if found.count(name) > 1]:
        raise ValueError(f"classes of {label} list {some(repeated)} more than once: list each class once.")
    return found


def _pair(names: tuple[str, ...], a: int, b: int) -> tuple[int, int]:
    if not all(type(i) is int and 0 <= i < len(names) for i in (a, b)):
        raise ValueError(f"[{a}, {b}] must be two indices from 0 to {len(names) - 1}")
    return a, b


def read_metadata(
    root: Path, metadata: str | None, split: str | None, classes: dict[str, tuple[str, ...]], media: Media = VIDEOS
) -> tuple[list[Row], dict[str, tuple[str, ...]]]:
    """Returns the rows of a split, sorted by name, and the class names of every label.

    Args:
        root: the folder.
        metadata: file name below root; None finds it; ``"none"`` returns a row without annotations for every file.
        split: keeps only rows with this ``split``; None keeps all.
        classes: known class names; the classes of all other labels are numbered in sorted order.
        media: kind of files.

    Raises:
        FileNotFoundError: no folder, no files in it, no metadata, or rows without their files.
        ValueError: files without a row, or an invalid row.
    """
    files = _files(root, media)
    if metadata == "none":
        if split is not None:
            raise ValueError(
                f"split={split!r} with metadata='none': splits are defined by metadata rows. Set one of them to null."
            )
        return [Row(name, path, None, {}) for name, path in files.items()], {}
    source = _source(root, metadata, media)
    entries: dict[str, dict] = {}
    for where, entry in _entries(source, media):
        _check_keys(where, entry, media)
        name = _file_name(where, entry, media)
        if name in entries:
            raise ValueError(f"{where} names {name!r} a second time: keep one row per file.")
        entries[name] = {**entry, "caption": _caption(where, entry), "split": _split(where, entry)}
    _check_complete(root / media.folder, source, media, files, entries)
    captions = _captions(source, entries)
    labels, classes = _number(source, {name: _labels(source, name, entry) for name, entry in entries.items()}, classes)
    kept = _of_split(source, entries, split)
    return [
        Row(name, files[name], captions.get(name), labels[name], entries[name]["split"]) for name in sorted(kept)
    ], classes


def read_class_folders(
    root: Path, split: str | None, classes: dict[str, tuple[str, ...]], media: Media = IMAGES
) -> tuple[list[Row], dict[str, tuple[str, ...]]]:
    """Returns the rows of ``<root>/<split>/<class>/<file>`` (the layout of ImageNet), sorted by name, with the label
    ``class``.

    Args:
        root: the folder.
        split: its sub-folder; None if the class folders are in root.
        classes: known class names; otherwise the folders are numbered in sorted order, over all splits.
        media: kind of files.

    Raises:
        FileNotFoundError: no class folder with files in it.
        ValueError: a folder is not among the known classes.
    """
    top = root if split is None else root / split
    found = [path for folder in _class_folders(top, media) for path in folder.iterdir() if _is_media(path, media)]
    if not found:
        raise FileNotFoundError(
            f"The folder {root} has no {media.folder}/, and {top} has no class folder with {media.noun} files "
            f"({', '.join(sorted(media.extensions))}): correct root, or set split to the folder between root and the "
            "class folders (train), null if there is none."
        )
    splits = [root] if split is None else [path for path in root.iterdir() if path.is_dir()]
    names = in_order({folder.name for path in splits for folder in _class_folders(path, media)})
    files = dict(sorted((path.relative_to(top).as_posix(), path) for path in found))
    given: dict[str, dict[str, object]] = {name: {"class": path.parent.name} for name, path in files.items()}
    labels, numbered = _number(top, given, {"class": classes.get("class", tuple(names))})
    return [Row(name, path, None, labels[name]) for name, path in files.items()], numbered


def has_class_folders(root: Path, split: str | None, media: Media = VIDEOS) -> bool:
    """Returns true for a folder without ``videos/`` (or ``images/``) that has the layout of ``read_class_folders``."""
    return not (root / media.folder).is_dir() and bool(_class_folders(root if split is None else root / split, media))


def _class_folders(folder: Path, media: Media) -> list[Path]:
    """Returns the sub-folders that directly contain a file."""
    if not folder.is_dir():
        return []
    folders = (path for path in folder.iterdir() if path.is_dir())
    return [path for path in folders if any(_is_media(file, media) for file in path.iterdir())]


def _is_media(path: Path, media: Media) -> bool:
    return path.suffix.lower() in media.extensions and not path.name.startswith(".") and path.is_file()


def _raise(error: OSError) -> None:
    """Raises the error of a folder that cannot be listed, which ``os.walk`` and ``rglob`` ignore."""
    raise error


def _files(root: Path, media: Media) -> dict[str, Path]:
    folder = root / media.folder
    if not folder.is_dir():
        writes = f" (`{start_command('data')}` writes one)" if media is VIDEOS else ""
        raise FileNotFoundError(
            f"There is no folder {folder}: set root to a folder with {media.folder}/ and metadata.jsonl{writes}, or "
            f"with <split>/<class>/ folders of {media.noun} files."
        )
    paths = (Path(parent, name) for parent, _, names in os.walk(folder, onerror=_raise) for name in names)
    files = {path.relative_to(folder).as_posix(): path for path in paths if _is_media(path, media)}
    if not files:
        raise FileNotFoundError(
            f"The folder {folder} holds no {media.noun} file ({', '.join(sorted(media.extensions))}): put "
            f"{media.folder} there, or correct root."
        )
    return dict(sorted(files.items()))


def _source(root: Path, metadata: str | None, media: Media) -> Path:
    found = [root / name for name in ([metadata] if metadata else NAMES) if (root / name).is_file()]
    if not found:
        raise FileNotFoundError(
            f"The folder {root} holds no {metadata or ' or '.join(NAMES)}: write one row per {media.noun} "
            f'({{"file_name": "{media.folder}/…", "caption": "…", "labels": {{…}}}}), or set metadata=none for '
            f"{media.folder} without labels."
        )
    if len(found) > 1:
        raise ValueError(
            f"The folder {root} holds {' and '.join(p.name for p in found)}: set metadata to the one to read."
        )
    return found[0]


def read_text(path: Path) -> str:
    """Reads a UTF-8 or, with a byte order mark, UTF-16 text file."""
    data = path.read_bytes()
    wide = data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE))
    encoding = "utf-16" if wide else "utf-8-sig"
    try:
        text = data.decode(encoding)
    except UnicodeDecodeError as error:
        line = data[: error.start].decode(encoding, "ignore").count("\n") + 1
        raise ValueError(
            f"{path} line {line} is not {encoding.removesuffix('-sig').upper()} text (byte {error.start}: "
            f"{error.reason}): save it as UTF-8, for example with `iconv -f latin1 -t utf-8`."
        ) from error
    if "\0" in text:
        line = text[: text.index("\0")].count("\n") + 1
        raise ValueError(
            f"{path} line {line} has NUL characters, as UTF-16 without a byte order mark or a damaged file has: "
            "save it as UTF-8, for example with `iconv -f utf-16le -t utf-8`."
        )
    return text


def _entries(source: Path, media: Media) -> list[tuple[str, dict]]:
    """Returns (location for messages, row) pairs."""
    text, suffix = read_text(source), source.suffix.lower()
    listed: list[tuple[str, dict]]
    if suffix in (".csv", ".tsv"):
        listed = _records(source, text, media)
    elif suffix == ".jsonl":
        lines = [(f"{source} line {i}", line) for i, line in enumerate(text.split("\n"), start=1) if line.strip()]
        listed = [(where, _json(where, line)) for where, line in lines]
    elif suffix == ".json":
        content = _json(str(source), text)
        if not isinstance(content, list):
            raise ValueError(
                f"{source} holds {type(content).__name__}, not a list: write a list with one object per {media.noun}."
            )
        listed = [(f"{source} entry {i}", row) for i, row in enumerate(content)]
    else:
        raise ValueError(f"metadata={source.name} must end in .jsonl, .json, .csv or .tsv: rename the file.")
    for where, row in listed:
        if not isinstance(row, dict):
            raise ValueError(f'{where} is {row!r}, not an object: write {{"file_name": "{media.folder}/…", …}}.')
    if not listed:
        raise ValueError(f"{source} has no rows: write one per {media.noun}.")
    return listed


def _records(source: Path, text: str, media: Media) -> list[tuple[str, dict]]:
    """Returns the records of a CSV or TSV file; the delimiter is the one that separates a file key in the header."""
    for delimiter in ",;\t":
        rows = _csv_rows(source, text, delimiter)
        _, header = next(rows, ("", []))
        if any(name in media.file_keys for name in header):
            break
    else:
        first = text.split("\n", 1)[0].strip()
        raise ValueError(
            f"{source} line 1 is {first[:80]!r}, which has no column file_name: begin the file with a header such as "
            "file_name,caption,split."
        )
    named = [name for name in header if name]  # a column without a name is an index that a program wrote
    if repeated := [name for name in dict.fromkeys(named) if named.count(name) > 1]:
        raise ValueError(f"{source} line 1 has the column {some(repeated)} more than once: keep one of them.")
    listed = []
    for where, row in rows:
        if len(row) != len(header):
            raise ValueError(
                f"{where} has {len(row)} values and the header {len(header)} columns: put values with {delimiter!r} "
                'in double quotes ("…"), and write every column.'
            )
        listed.append((where, {name: value for name, value in zip(header, row, strict=True) if name}))
    return listed


def _csv_rows(source: Path, text: str, delimiter: str) -> Iterator[tuple[str, list[str]]]:
    """Yields (location of its first line, stripped values) of each record that is not empty."""
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, skipinitialspace=True, strict=True)
    while True:
        where = f"{source} line {reader.line_num + 1}"
        try:
            row = [value.strip() for value in next(reader)]
        except StopIteration:
            return
        except csv.Error as error:
            raise ValueError(
                f"{where} is not valid CSV ({error}): close every quote, and double the quotes inside a quoted value "
                '("a ""quoted"" word").'
            ) from error
        if any(row):
            yield where, row


def _json(where: str, text: str):
    try:
        return json.loads(text, object_pairs_hook=_object)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{where} is not valid JSON ({error}): correct it.") from error


def _object(pairs: list[tuple[str, object]]) -> dict:
    found = dict(pairs)
    if len(found) < len(pairs):
        keys = [key for key, _ in pairs]
        raise ValueError(f"repeated key {next(key for key in keys if keys.count(key) > 1)!r}")
    return found


def _check_keys(where: str, entry: dict, media: Media) -> None:
    """Checks that no key is a known one in another spelling."""
    known = {key.rstrip("s"): key for key in (*media.file_keys, *CAPTION_KEYS, "split", "label")}
    for key in entry:
        plain = key.strip().lower().replace(" ", "_")
        meant = known.get(plain.rstrip("s"))
        if plain.startswith(("label.", "labels.")) and not key.startswith("labels."):
            meant = "labels." + key.split(".", 1)[1]
        if meant and key not in (*known.values(), "labels"):
            raise ValueError(f"{where} has the key {key!r}, which is not read: rename it to {meant!r}.")


def _caption(where: str, entry: dict) -> str | None:
    given = {key: entry[key] for key in CAPTION_KEYS if entry.get(key) not in (None, "")}
    for key, value in given.items():
        if isinstance(value, bool) or not isinstance(value, str | int):
            raise ValueError(
                f"{where} has {key}={value!r}, which is {type(value).__name__} and must be text: write one caption."
            )
    if "caption" not in given and len(set(given.values())) > 1:
        raise ValueError(f"{where} has different captions under {' and '.join(given)}: write one, under caption.")
    return next((str(value) for value in given.values() if str(value).strip()), None)


def _split(where: str, entry: dict) -> str | None:
    split = entry.get("split")
    if split is not None and not isinstance(split, str):
        raise ValueError(f"{where} has split={split!r}, which must be text: write one name, such as 'train'.")
    return split or None


def _file_name(where: str, entry: dict, media: Media) -> str:
    given = [key for key in media.file_keys if entry.get(key)]
    if len(given) != 1 and given[:1] != ["file_name"]:
        has = (
            f"has the file name under {' and '.join(given)}"
            if given
            else f"has only the keys {', '.join(map(repr, entry))}"
        )
        raise ValueError(f"{where} {has}: give the file under file_name.")
    if not isinstance(entry[given[0]], str):
        raise ValueError(f"{where} has {given[0]}={entry[given[0]]!r}, which must be text: write the path of one file.")
    path = PurePosixPath(entry[given[0]])
    if not path.parts or path.is_absolute() or ".." in path.parts:
        raise ValueError(
            f"{where} has {given[0]}={str(path)!r}, which may lie outside the folder: make it relative to "
            f"{media.folder}/."
        )
    return path.relative_to(media.folder).as_posix() if path.parts[0] == media.folder else path.as_posix()


def _check_complete(folder: Path, source: Path, media: Media, files: dict[str, Path], entries: dict[str, dict]) -> None:
    if missing := [name for name in entries if name not in files]:
        raise FileNotFoundError(
            f"{source} names {some(missing)}, but {folder} holds no such {media.noun}: add the file or remove the row."
        )
    if missing := [name for name in files if name not in entries]:
        raise ValueError(
            f"{folder} holds {some(missing)}, but {source} has no row for it: add a row or remove the file."
        )


def _captions(source: Path, entries: dict[str, dict]) -> dict[str, str]:
    captions = {name: entry["caption"] for name, entry in entries.items() if entry["caption"] is not None}
    missing = [name for name in entries if name not in captions]
    if captions and missing:
        raise ValueError(f"{source} has captions, but none for {some(missing)}: caption every file or none.")
    return captions


def _labels(source: Path, name: str, entry: dict) -> dict[str, object]:
    labels = entry.get("labels") or {}
    if not isinstance(labels, dict):
        raise ValueError(f'{source}: labels={labels!r} of {name} must be an object: use {{"label": "class"}}.')
    named = [(key.removeprefix("labels."), value) for key, value in entry.items() if key.startswith("labels.")]
    found = dict(labels)
    for label, value in named + ([("label", entry["label"])] if "label" in entry else []):
        if found.setdefault(label, value) != value:
            raise ValueError(f"{source}: label {label} of {name} is {found[label]!r} and {value!r}: write one of them.")
    return found


def _number(
    source: Path, given: dict[str, dict[str, object]], known: dict[str, tuple[str, ...]]
) -> tuple[dict[str, dict[str, int]], dict[str, tuple[str, ...]]]:
    """Returns the class ids of every file and the class names of every label."""
    names = {label for labels in given.values() for label in labels}
    classes = {}
    for label in sorted(names):
        values = {file: labels.get(label) for file, labels in given.items()}
        if missing := [file for file, value in values.items() if value in (None, "")]:
            raise ValueError(
                f"{source} has the label {label!r}, but no value of it for {some(missing)}: give one in every row."
            )
        for file, value in values.items():
            if isinstance(value, bool) or not isinstance(value, str | int):
                raise ValueError(
                    f"{source}: label {label}={value!r} of {file} is neither a name nor an integer: use one of these."
                )
        found = {str(value) for value in values.values()}
        classes[label] = known.get(label) or tuple(in_order(found))
        if unknown := sorted(found - set(classes[label])):
            raise ValueError(
                f"{source}: label {label} has the classes {some(unknown)}, which are not among "
                f"{', '.join(classes[label])}: correct the rows, or the list in classes.json or the argument classes."
            )
    ids = {label: {name: i for i, name in enumerate(values)} for label, values in classes.items()}
    return {
        file: {label: ids[label][str(labels[label])] for label in classes} for file, labels in given.items()
    }, classes


def in_order(values: set[str]) -> list[str]:
    numbers = all(value.removeprefix("-").isdecimal() for value in values)
    return sorted(values, key=lambda value: (int(value), value)) if numbers else sorted(values)


def _of_split(source: Path, entries: dict[str, dict], split: str | None) -> list[str]:
    if split is None:
        return list(entries)
    kept = [name for name, entry in entries.items() if entry.get("split") == split]
    if not kept:
        found = sorted({str(entry["split"]) for entry in entries.values() if entry.get("split")})
        has = f"has only the splits {', '.join(found)}" if found else "has no key 'split'"
        raise ValueError(
            f"split={split!r} selects no row of {source}, which {has}: choose another, or split=null for all rows."
        )
    return kept


def some(names: Sequence[str]) -> str:
    shown = ", ".join(repr(name) for name in names[:5])
    return shown if len(names) <= 5 else f"{shown} and {len(names) - 5} more"
