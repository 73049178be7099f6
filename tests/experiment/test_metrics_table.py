from pathlib import Path

import pytest

from blueberry_video.experiment.metrics_table import MetricsTable, read_curves, read_steps


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "metrics.csv"


def test_metrics_of_a_step_share_a_row(path: Path) -> None:
    table = MetricsTable(path)
    table.write({"train/loss": 0.5}, 0)
    table.write({"val/loss": 0.25, "epoch": 0}, 0)
    table.write({"train/loss": 0.1}, 1)
    table.write({"val/loss": 0.1234567}, 1)
    table.write({"val/loss": 8.0}, 1)
    assert path.read_text() == "step,train/loss,val/loss,epoch\n0,0.5,0.25,0\n1,0.1,8,\n"


def test_every_write_is_readable_at_once(path: Path) -> None:
    table = MetricsTable(path)
    for step in range(5):
        table.write({"a": step}, step)
        table.write({"b" * (1 + step % 2): step}, step)
        assert read_steps(path)[step] == {"a": step, "b" * (1 + step % 2): step}
        assert list(read_steps(path)) == list(range(step + 1))


def test_numbers_keep_all_digits(path: Path) -> None:
    table = MetricsTable(path)
    table.write({"a": 0.1 + 0.2, "b": float("nan"), "c": 1e300}, 0)
    (row,) = read_steps(path).values()
    assert row["a"] == 0.1 + 0.2
    assert row["b"] != row["b"]
    assert row["c"] == 1e300


def test_step_before_the_newest_raises(path: Path) -> None:
    table = MetricsTable(path)
    table.write({"a": 1}, 3)
    with pytest.raises(ValueError, match=r"step=2 .*\ba\b.* 3\b"):
        table.write({"a": 1}, 2)


def test_incomplete_last_line_is_dropped(path: Path) -> None:
    table = MetricsTable(path)
    table.write({"a": 1, "b": 1}, 0)
    table.write({"a": 2, "b": 2}, 1)
    path.write_text(path.read_text() + "2,3")
    assert list(read_steps(path)) == [0, 1]
    again = MetricsTable(path)
    again.write({"b": 5}, 1)
    again.write({"a": 4}, 2)
    assert read_curves(path) == {"a": [(0, 1), (1, 2), (2, 4)], "b": [(0, 1), (1, 5)]}


def test_rows_after_a_step_are_dropped(path: Path) -> None:
    table = MetricsTable(path)
    for step in range(6):
        table.write({"a": step}, step)
    table.drop_after(3)
    table.write({"a": 30}, 3)
    table.write({"a": 40}, 4)
    assert read_curves(path)["a"] == [(0, 0), (1, 1), (2, 2), (3, 30), (4, 40)]


def test_missing_file_has_no_curves(path: Path) -> None:
    assert read_curves(path) == {}


@pytest.mark.parametrize("damage", [b"\0\0\0", b"2,\0", b"2,text", b"abc,1", b"2,1,1", b"0,7", b"\xff\xfe"])
def test_damaged_rows_are_dropped_with_a_warning(path: Path, damage: bytes) -> None:
    path.write_bytes(b"step,a\n0,1\n1,2\n" + damage + b"\n3,4\n")
    with pytest.warns(UserWarning, match=rf"{path}: 1 damaged lines .*: 4\b"):
        table = MetricsTable(path)
    table.write({"a": 5}, 4)
    assert read_curves(path) == {"a": [(0, 1), (1, 2), (3, 4), (4, 5)]}


def test_damaged_header_is_dropped_with_a_warning(path: Path) -> None:
    path.write_bytes(b"\0\0\0\n0,1\n")
    with pytest.warns(UserWarning, match=rf"{path} .*`step"):
        MetricsTable(path).write({"a": 1}, 2)
    assert read_curves(path) == {"a": [(2, 1)]}
