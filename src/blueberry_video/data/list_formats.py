"""Rows of the lists that data sets of labelled videos are published with.

===========  ==================================================================  =====================================
format       a row                                                               class names
===========  ==================================================================  =====================================
``ucf101``   ``Class/v.avi 1``, or ``Class/v.avi`` (test lists); from 1          ``classInd.txt``, next to the list
``kinetics`` CSV with the header ``label,youtube_id,time_start,time_end,split``  the labels
``indices``  ``path label`` or ``path,label``; from 0, or names                  numbers, or the names
``ssv2``     JSON, ``[{"id", "label", "template"}]``                             ``labels.json``, next to the list
``table``    CSV or TSV with a header: a file name, a class, a caption           the classes
===========  ==================================================================  =====================================
"""

import csv
import io
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from blueberry_video.data.metadata import CAPTION_KEYS, VIDEOS, read_text

FORMATS = ("ucf101", "kinetics", "indices", "ssv2", "table")
LABEL = "class"
CLASS_KEYS = ("class", "label", "action", "category", "target")
_KINETICS = {"label", "youtube_id", "time_start", "time_end"}
_WITHOUT_LABEL = _KINETICS - {"label"}  # test lists


@dataclass(frozen=True)
class Entry:
    """Row of a list.

    Attributes:
        where: file and line, for messages.
        name: path below the root, or its last part without suffix for ``kinetics`` and ``ssv2``.
        known: name or id of the class as text; None in lists without classes.
        index: whether ``known`` is a class id from 0.
        caption: text of the video.
        folder: name of the class in the path of ``ucf101``, which the class must equal.
        split: value of the column ``split``.
    """

    where: str
    name: str
    known: str | None = None
    index: bool = False
    caption: str | None = None
    folder: str | None = None
    split: str | None = None


def read_list(file: Path, kind: str | None) -> tuple[str, list[Entry], tuple[str, ...]]:
    """Returns the format of a list, its rows, and the class names of a file next to it, which is empty without one.

    Args:
        file: the list.
        kind: a format of the module; None recognises it.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: an unknown format, an empty list, or an invalid row; the message has file and line.
    """
    if kind is not None and kind not in FORMATS:
        raise ValueError(f"list_format={kind!r} is not a format of lists: use one of {', '.join(FORMATS)}, or null.")
    if not file.is_file():
        raise FileNotFoundError(f"There is no list {file}: set list_file to a file, relative to root or absolute.")
    text = read_text(file)
    kind = kind or _recognised(file, text)
    if kind == "ssv2":
        entries = _ssv2(file, text)
    elif kind in ("kinetics", "table"):
        entries = (_kinetics if kind == "kinetics" else _table)(file, *_records(file, text))
    else:
        entries = [_line(f"{file}:{number}", line.strip(), kind) for number, line in _lines(text)]
    if not entries:
        raise ValueError(f"{file} has no rows: write one per video, or correct list_file.")
    return kind, entries, _names(file, kind)


def without_brackets(template: str) -> str:
    """Class of a template of Something-Something: ``Holding [something]`` -> ``Holding something``."""
    return re.sub(r"\[([^\[\]]*)\]", r"\1", template)


def _recognised(file: Path, text: str) -> str:
    if file.suffix.lower() == ".json":
        return "ssv2"
    lines = [line.strip() for _, line in _lines(text)]
    if not lines:
        raise ValueError(f"{file} has no rows: write one per video, or correct list_file.")
    header = {cell.strip() for cell in _cells(lines[0], _delimiter(lines[0]))}
    if header >= _KINETICS or header >= _WITHOUT_LABEL:
        return "kinetics"
    if header & {*VIDEOS.file_keys} and not _is_video(lines[0].split(",")[0]):
        return "table"
    if not all("," in line for line in lines) and all(_is_ucf(line) for line in lines):
        return "ucf101"
    return "indices"


def _is_ucf(line: str) -> bool:
    path, _, index = line.partition(" ")
    _, slash, name = path.partition("/")
    return bool(slash) and "/" not in name and name.startswith("v_") and (not index or index.strip().isdecimal())


def _is_video(name: str) -> bool:
    return Path(name.strip()).suffix.lower() in VIDEOS.extensions


def _lines(text: str) -> list[tuple[int, str]]:
    return [(number, line) for number, line in enumerate(text.splitlines(), start=1) if line.strip()]


def _delimiter(line: str) -> str:
    return next((mark for mark in ("\t", ";") if mark in line), ",")


def _cells(line: str, delimiter: str) -> list[str]:
    return next(csv.reader([line], delimiter=delimiter, skipinitialspace=True), [])


def _records(file: Path, text: str) -> tuple[list[str], list[tuple[str, dict[str, str]]]]:
    """Returns the header and (file:line, record) of a table."""
    delimiter = _delimiter(text.split("\n", 1)[0])
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, skipinitialspace=True, strict=True)
    header, found, line = list[str](), list[tuple[str, dict[str, str]]](), 0
    while True:
        try:
            row = [cell.strip() for cell in next(reader)]
        except StopIteration:
            return header, found
        except csv.Error as error:
            raise ValueError(f"{file}:{line + 1} is not valid CSV ({error}): close every quote.") from error
        where, line = f"{file}:{line + 1}", reader.line_num
        if not any(row):
            continue
        if not header:
            header = row
        elif len(row) != len(header):
            raise ValueError(
                f"{where} has {len(row)} values and the header {len(header)} columns: put values with {delimiter!r} "
                'in double quotes ("…"), and write every column.'
            )
        else:
            found.append((where, dict(zip(header, row, strict=True))))


def _kinetics(file: Path, header: Sequence[str], records: Sequence[tuple[str, dict[str, str]]]) -> list[Entry]:
    if lacking := sorted(_WITHOUT_LABEL - {*header}):
        raise ValueError(
            f"{file}:1 has no column {lacking[0]!r}, which a list of Kinetics has: correct list_format, or the header."
        )
    found = []
    for where, record in records:
        try:
            start, end = (int(float(record[key])) for key in ("time_start", "time_end"))
        except ValueError as error:
            raise ValueError(f"{where}: time_start and time_end must be seconds ({error}): correct the row.") from error
        name = f"{record['youtube_id']}_{start:06d}_{end:06d}"
        found.append(Entry(where, name, record.get("label") or None, split=record.get("split")))
    return found


def _table(file: Path, header: Sequence[str], records: Sequence[tuple[str, dict[str, str]]]) -> list[Entry]:
    names = [key for key in VIDEOS.file_keys if key in header]
    if not names:
        raise ValueError(
            f"{file}:1 has the columns {', '.join(header)}, and none of {', '.join(VIDEOS.file_keys)}: name the column "
            "of the paths file_name, or correct list_format."
        )
    classes = [key for key in CLASS_KEYS if key in header]
    if len(classes) > 1:
        raise ValueError(f"{file}:1 has the columns {' and '.join(classes)} of classes: keep the one to read.")
    caption = next((key for key in CAPTION_KEYS if key in header), None)
    found = []
    for where, record in records:
        known = record[classes[0]] if classes else None
        index = known is not None and known.isdecimal()
        if not record[names[0]]:
            raise ValueError(f"{where} has no {names[0]}: write the path of the video.")
        text = (record[caption] or None) if caption else None
        found.append(Entry(where, record[names[0]], known or None, index, text, split=record.get("split")))
    return _all_or_none_indices(found)


def _line(where: str, line: str, kind: str) -> Entry:
    if kind == "ucf101":
        path, _, index = line.partition(" ")
        if index and not index.strip().isdecimal():
            raise ValueError(f"{where} is {line!r}, not `Class/video.avi 1`: correct the row, or list_format.")
        return Entry(where, path, str(int(index) - 1) if index else None, bool(index), folder=Path(path).parent.name)
    mark = "," if re.search(r",[^,/]*$", line) else " "
    path, found, known = line.rpartition(mark)
    if not found or not path.strip():
        if not _is_video(line):
            raise ValueError(f"{where} is {line!r}, not `path label` or `path,label`: correct the row, or list_format.")
        path, known = line, ""
    elif not known.strip().lstrip("-").isdecimal() and _is_video(line):  # a path with spaces, without a label
        path, known = line, ""
    fields = path.split(mark)
    if len(fields) == 2 and fields[1].isdecimal() and not _is_video(path):  # `folder frames label` of frame folders
        raise ValueError(
            f"{where} is {line!r}, with a number of frames between path and label, as in lists of folders of frames: "
            "use the list of the video files."
        )
    known = known.strip()
    return Entry(where, path.strip().strip('"'), known or None, known.isdecimal())


def _ssv2(file: Path, text: str) -> list[Entry]:
    try:
        content = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{file} is not valid JSON ({error}): correct it, or list_file.") from error
    if not isinstance(content, list):
        raise ValueError(f'{file} holds {type(content).__name__}, not a list of {{"id", "label", "template"}}.')
    found = []
    for number, row in enumerate(content):
        where = f"{file}:[{number}]"
        if not isinstance(row, dict) or not isinstance(row.get("id"), str | int):
            raise ValueError(f'{where} is {str(row)[:80]}, not {{"id": …, "label": …, "template": …}}: correct it.')
        template = row.get("template")
        known = without_brackets(template) if isinstance(template, str) else None
        found.append(Entry(where, str(row["id"]), known, caption=row.get("label") or None))
    return found


def _all_or_none_indices(entries: list[Entry]) -> list[Entry]:
    """Reads numbers as names where other rows have names."""
    if all(entry.index for entry in entries if entry.known is not None):
        return entries
    return [replace(entry, index=False) for entry in entries]


def _names(file: Path, kind: str) -> tuple[str, ...]:
    """Returns the class names in the file that is published next to a list."""
    if kind == "ucf101" and (source := file.parent / "classInd.txt").is_file():
        numbered = [(number, line.split(maxsplit=1)) for number, line in _lines(read_text(source))]
        for position, (number, cells) in enumerate(numbered):
            if len(cells) != 2 or cells[0] != str(position + 1):
                raise ValueError(f"{source}:{number} must be `{position + 1} <class>`: the classes count from 1.")
        return tuple(cells[1].strip() for _, cells in numbered)
    if kind == "ssv2":
        for name in ("labels.json", "something-something-v2-labels.json"):
            if (source := file.parent / name).is_file():
                try:
                    ids = {without_brackets(key): int(value) for key, value in json.loads(read_text(source)).items()}
                except (ValueError, AttributeError, TypeError) as error:
                    raise ValueError(f'{source} is not {{"class": "0", …}} ({error}): correct it.') from error
                if sorted(ids.values()) != [*range(len(ids))]:
                    raise ValueError(
                        f"{source} numbers {len(ids)} classes, and not from 0 to {len(ids) - 1}: correct it."
                    )
                return tuple(sorted(ids, key=ids.__getitem__))
    return ()
