"""Metadata files as spreadsheets, exporters and people write them: read right, or refused naming the row."""

import json
from pathlib import Path

import pytest

from blueberry_video.data.metadata import VIDEOS, Row, read_classes, read_metadata


def rows(root: Path, name: str, content: str | bytes, files: int = 2, split: str | None = None) -> list[Row]:
    """Writes empty videos 0.mp4, 1.mp4, … and a metadata file, and reads it."""
    (root / "videos").mkdir(exist_ok=True)
    for k in range(files):
        (root / "videos" / f"{k}.mp4").touch()
    (root / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    return read_metadata(root, name, split, {}, VIDEOS)[0]


def captions(*arguments, **options) -> list[str | None]:
    return [row.caption for row in rows(*arguments, **options)]


CSV = {
    "quoted line break": ('file_name,caption\n0.mp4,"a\nb"\n1.mp4,c\n', ["a\nb", "c"]),
    "quoted comma": ('file_name,caption\n0.mp4,"a, b"\n1.mp4,c\n', ["a, b", "c"]),
    "quoted quote": ('file_name,caption\n0.mp4,"a ""b"""\n1.mp4,c\n', ['a "b"', "c"]),
    "other line separators": (
        "file_name,caption\n0.mp4,a\u2028b\u0085c\x0bd\n1.mp4,c\n",
        ["a\u2028b\u0085c\x0bd", "c"],
    ),
    "spaces": ('file_name , caption\n0.mp4, a b \n1.mp4, "c, d"\n', ["a b", "c, d"]),
    "key text": ("file_name,text\n0.mp4,a\n1.mp4,b\n", ["a", "b"]),
    "key prompt": ("file_name,prompt\n0.mp4,a\n1.mp4,b\n", ["a", "b"]),
    "caption wins over text": ("file_name,text,caption\n0.mp4,x,a\n1.mp4,y,b\n", ["a", "b"]),
    "semicolons": ("file_name;caption\n0.mp4;a, b\n1.mp4;c\n", ["a, b", "c"]),
    "tabs": ("file_name\tcaption\n0.mp4\ta, b\n1.mp4\tc; d\n", ["a, b", "c; d"]),
    "Windows": ("file_name,caption\r\n0.mp4,a\r\n1.mp4,b\r\n", ["a", "b"]),
    "old Mac": ("file_name,caption\r0.mp4,a\r1.mp4,b\r", ["a", "b"]),
    "byte order mark": ("\ufefffile_name,caption\n0.mp4,a\n1.mp4,b\n", ["a", "b"]),
    "UTF-16": ("file_name\tcaption\r\n0.mp4\té\r\n1.mp4\tb\r\n".encode("utf-16"), ["é", "b"]),
    "UTF-16 big-endian": (b"\xfe\xff" + "file_name,caption\n0.mp4,é\n1.mp4,b\n".encode("utf-16-be"), ["é", "b"]),
    "index column": (",file_name,caption\n0,0.mp4,a\n1,1.mp4,b\n", ["a", "b"]),
    "empty rows": ("file_name,caption\n0.mp4,a\n\n,\n1.mp4,b\n,,\n".replace(",,", ","), ["a", "b"]),
    "path that contains a comma in the caption column": ('file_name,caption\n0.mp4,"x.mp4, y"\n1.mp4,b\n', None),
}


@pytest.mark.parametrize(("content", "expected"), CSV.values(), ids=CSV)
def test_csv_is_read(tmp_path: Path, content: str | bytes, expected: list[str] | None):
    assert captions(tmp_path, "metadata.csv", content) == (expected or ["x.mp4, y", "b"])


def test_tsv_is_found_and_read(tmp_path: Path):
    (tmp_path / "metadata.tsv").write_text("video\tcaption\tsplit\n0.mp4\ta\ttrain\n1.mp4\tb\tval\n")
    (tmp_path / "videos").mkdir()
    for k in range(2):
        (tmp_path / "videos" / f"{k}.mp4").touch()
    found, _ = read_metadata(tmp_path, None, "val", {}, VIDEOS)
    assert [(row.name, row.caption) for row in found] == [("1.mp4", "b")]


@pytest.mark.parametrize("separator", ["\u2028", "\u2029", "\u0085", "\\n", "\\u2028"])
def test_jsonl_lines_end_only_at_line_feeds(tmp_path: Path, separator: str):
    content = "".join(f'{{"file_name": "{k}.mp4", "text": "a{separator}b{k}"}}\r\n' for k in range(2))
    expected = json.loads(f'"a{separator}b"')
    assert captions(tmp_path, "metadata.jsonl", content) == [expected + "0", expected + "1"]


def test_integer_captions_are_text(tmp_path: Path):
    content = '{"file_name": "0.mp4", "caption": 7}\n{"file_name": "1.mp4", "caption": 8}\n'
    assert captions(tmp_path, "metadata.jsonl", content) == ["7", "8"]


BAD_CSV = {
    "unquoted comma": ("file_name,caption\n0.mp4,a\n1.mp4,a, b\n", r"line 3 has 3 values .* 2 columns.*quotes"),
    "missing value": ("file_name,caption,split\n0.mp4,a,val\n1.mp4,a\n", r"line 3 has 2 values .* 3 columns"),
    "row after a line break": ('file_name,caption\n0.mp4,"a\nb\nc"\n1.mp4,a,b\n', r"line 5 has 3 values"),
    "open quote": ('file_name,caption\n0.mp4,a\n1.mp4,"b\n', r"line 3 is not valid CSV"),
    "text after a quote": ('file_name,caption\n0.mp4,"a" b\n1.mp4,b\n', r"line 2 is not valid CSV"),
    "huge value": ("file_name,caption\n0.mp4,a\n1.mp4," + "b" * 200_000, r"line 3 is not valid CSV"),
    "no header": ("0.mp4,a\n1.mp4,b\n", r"line 1 is '0\.mp4,a'.*file_name"),
    "wrong delimiter": ("file_name|caption\n0.mp4|a\n1.mp4|b\n", r"line 1 is 'file_name\|caption'"),
    "repeated column": ("file_name,caption,caption\n0.mp4,a,b\n1.mp4,c,d\n", r"line 1 .*'caption' more than once"),
    "capital key": ("file_name,Caption\n0.mp4,a\n1.mp4,b\n", r"line 2 has the key 'Caption'.*'caption'"),
    "plural key": ("file_name,texts\n0.mp4,a\n1.mp4,b\n", r"line 2 has the key 'texts'.*'text'"),
    "singular prefix": ("file_name,label.motion\n0.mp4,a\n1.mp4,b\n", r"'label\.motion'.*'labels\.motion'"),
    "spaces as caption": ('file_name,caption\n0.mp4,a\n1.mp4,"  "\n', r"captions, but none for '1\.mp4'"),
    "two captions": ("file_name,text,prompt\n0.mp4,a,a\n1.mp4,a,b\n", r"line 3 .*text and prompt"),
    "empty": ("", r"line 1 is ''"),
    "header alone": ("file_name,caption\n", r"no rows"),
    "latin 1": (b"file_name,caption\n0.mp4,a\n1.mp4,\xe9\n", r"line 3 is not UTF-8"),
    "UTF-16 without a mark": ("file_name,caption\n0.mp4,a\n".encode("utf-16-le"), r"line 1 has NUL.*UTF-16"),
    "half a UTF-16 character": ("file_name,caption\n0.mp4,a\n".encode("utf-16") + b"x", r"line 3 is not UTF-16"),
    "two values of a label": (
        "file_name,label,labels.label\n0.mp4,a,a\n1.mp4,a,b\n",
        r"label of 1\.mp4 is 'b' and 'a'",
    ),
}


@pytest.mark.parametrize(("content", "message"), BAD_CSV.values(), ids=BAD_CSV)
def test_invalid_csv_raises(tmp_path: Path, content: str | bytes, message: str):
    with pytest.raises(ValueError, match=rf"(?s)metadata\.csv.*{message}"):
        rows(tmp_path, "metadata.csv", content)


BAD_JSON = {
    "list caption": ('"caption": ["a", "b"]', r"line 2 has caption=\['a', 'b'\].*list"),
    "dict caption": ('"text": {"en": "a"}', r"line 2 has text=\{'en': 'a'\}"),
    "bool caption": ('"caption": true', r"line 2 has caption=True"),
    "number caption": ('"caption": 1.5', r"line 2 has caption=1\.5"),
    "repeated key": ('"caption": "a", "caption": "b"', r"line 2 .*repeated key 'caption'"),
    "list split": ('"caption": "a", "split": ["train"]', r"line 2 has split=\['train'\]"),
    "line break": ('"caption": "a\nb"', r"line 2 is not valid JSON"),
    "NUL": ('"caption": "a\0b"', r"line 2 has NUL"),
    "deep": ('"caption": ' + "[" * 100_000, r"line 2 is not valid JSON"),
    "Split": ('"caption": "a", "Split": "x"', r"line 2 has the key 'Split'"),
}


@pytest.mark.parametrize(("second", "message"), BAD_JSON.values(), ids=BAD_JSON)
def test_invalid_jsonl_raises(tmp_path: Path, second: str, message: str):
    content = f'{{"file_name": "0.mp4", "caption": "a"}}\n{{"file_name": "1.mp4", {second}}}\n'
    with pytest.raises(ValueError, match=rf"metadata\.jsonl {message}"):
        rows(tmp_path, "metadata.jsonl", content)


@pytest.mark.parametrize("name", ['["0.mp4"]', '"."', "3"])
def test_invalid_file_names_raise(tmp_path: Path, name: str):
    with pytest.raises(ValueError, match=r"entry 0 has file_name="):
        rows(tmp_path, "metadata.json", f'[{{"file_name": {name}}}]', files=1)


def test_unknown_suffix_raises(tmp_path: Path):
    with pytest.raises(ValueError, match=r"metadata=captions\.txt .*\.jsonl, \.json, \.csv or \.tsv"):
        rows(tmp_path, "captions.txt", "0.mp4 a\n")


def test_equal_numbers_have_one_order(tmp_path: Path):
    content = "".join(f'{{"file_name": "{k}.mp4", "label": "{"0" * (3 - k)}1"}}\n' for k in range(4))
    (tmp_path / "videos").mkdir()
    for k in range(4):
        (tmp_path / "videos" / f"{k}.mp4").touch()
    (tmp_path / "metadata.jsonl").write_text(content)
    assert read_metadata(tmp_path, None, None, {}, VIDEOS)[1] == {"label": ("0001", "001", "01", "1")}


def classes(root: Path, content: object, given: dict | None = None):
    (root / "classes.json").write_text(json.dumps(content))
    return read_classes(root, given)


def test_reversal_pairs_follow_other_class_lists(tmp_path: Path):
    content = {"classes": {"motion": ["up", "down", "left", "right"]}, "reversal_pairs": {"motion": [[0, 1], [2, 3]]}}
    assert classes(tmp_path, content) == ({"motion": ("up", "down", "left", "right")}, {"motion": ((0, 1), (2, 3))})
    order = {"motion": ["right", "down", "up", "left"]}
    assert read_classes(tmp_path, order)[1] == {"motion": ((2, 1), (3, 0))}
    assert read_classes(tmp_path, {"motion": ["left", "up", "down"]})[1] == {"motion": ((1, 2),)}
    assert read_classes(tmp_path, {"shape": ["disc"]}) == ({"shape": ("disc",)}, {})


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"classes": {"motion": "ab"}}, r"motion='ab'"),
        ({"classes": {"motion": {"0": "a"}}}, r"motion=\{'0': 'a'\}"),
        ({"classes": {"motion": ["a", True]}}, r"motion .*True"),
        ({"classes": {"motion": ["a", None]}}, r"motion .*None"),
        ({"classes": {"motion": ["a", "b", "a"]}}, r"motion .*'a' more than once"),
        ({"classes": {"motion": ["1", 1]}}, r"motion .*'1' more than once"),
        ({"classes": {"motion": ["a", "b"]}, "reversal_pairs": {"motion": [[0, 2]]}}, r"\[0, 2\].*0 to 1"),
        ({"classes": {"motion": ["a", "b"]}, "reversal_pairs": {"motion": [[0, -1]]}}, r"\[0, -1\]"),
        ({"classes": {"motion": ["a", "b"]}, "reversal_pairs": {"motion": [[0, 1.0]]}}, r"\[0, 1\.0\]"),
        ({"classes": {"motion": ["a", "b"]}, "reversal_pairs": {"motion": [[0]]}}, r"missing 1"),
        ({"classes": {"motion": ["a", "b"]}, "reversal_pairs": {"speed": [[0, 1]]}}, r"speed"),
        ({"motion": ["a", "b"]}, r"classes"),
    ],
)
def test_invalid_classes_raise(tmp_path: Path, content: dict, message: str):
    with pytest.raises(ValueError, match=rf"classes\.json.*{message}"):
        classes(tmp_path, content)


@pytest.mark.parametrize("given", [{"motion": "ab"}, {"motion": ["a", False]}, {"motion": ["a", "a"]}])
def test_invalid_class_arguments_raise(tmp_path: Path, given: dict):
    with pytest.raises(ValueError, match="classes of motion"):
        read_classes(tmp_path, given)
