"""The mutation tool: what it changes, and the outcome of tests of a mutant."""

import ast
from pathlib import Path

from measured_tests import measured, run_tests
from mutants import covering, mutants_of

SOURCE = '''
def clip(values, low: int = 2):
    """A docstring with 3."""
    if low < 4 and values:
        values[0] = min(low, len(values))
    values.sort()
    if not values:
        raise ValueError(f"{low} of 5")
    return values[0] + 1
'''


def test_mutants_of_a_function():
    found = list(mutants_of(Path("a.py"), SOURCE))
    changes = [(mutant.line, mutant.change.split(":")[0]) for mutant in found]
    assert sorted(changes) == [
        (2, "2 -> 1"),
        (4, "4 -> 5"),
        (4, "And -> Or"),
        (4, "Lt -> LtE"),
        (4, "condition negated"),
        (5, "0 -> 1"),
        (5, "arguments swapped"),
        (5, "statement removed"),
        (6, "statement removed"),
        (7, "condition negated"),
        (8, "statement removed"),
        (9, "0 -> 1"),
        (9, "1 -> 0"),
        (9, "Add -> Sub"),
    ]
    original = ast.unparse(ast.parse(SOURCE))
    assert all(mutant.source != original for mutant in found)
    assert len({mutant.source for mutant in found}) == len(found)
    assert [str(mutant) for mutant in found] == [str(mutant) for mutant in mutants_of(Path("a.py"), SOURCE)]


def test_tests_of_a_tree_pass_fail_or_exceed_the_limit(tmp_path: Path):
    (tmp_path / "src").mkdir()
    test = tmp_path / "test_it.py"
    for content, code in (("assert True", 0), ("assert False", 1), ("while True: pass", None)):
        test.write_text(f"def test_it():\n    {content}\n")
        assert run_tests(tmp_path, ["test_it.py"], 300.0 if code is not None else 2.0) == code


SUMS = """LIMIT = 3


def add(a):
    return (
        a
        + 2
    )


def double(a):
    return 2 * a
"""

TESTS = """import sys

import pytest

sys.path.insert(0, "src/blueberry_video")
import sums_of_mutants as sums


@pytest.fixture(scope="module")
def six():
    return sums.double(3)


def test_add():
    assert sums.add(1) == 3


def test_fixture(six):
    assert six == 6


def test_both(six):
    assert sums.add(six) == 8


def test_nothing():
    pass
"""


def test_tests_that_execute_a_line_cover_its_mutants(tmp_path: Path):
    file, test = Path("src/blueberry_video/sums_of_mutants.py"), tmp_path / "tests/test_sums.py"
    for path, content in ((tmp_path / file, SUMS), (test, TESTS)):
        path.parent.mkdir(parents=True)
        path.write_text(content)
    first = measured(tmp_path, ["tests"], tmp_path / "map.json", 60.0)
    assert [name.split("::")[1] for name in first] == ["test_add", "test_fixture", "test_both", "test_nothing"]
    test.write_text(TESTS + "\n\ndef test_last():\n    assert sums.double(1) == 2\n")
    tests = measured(tmp_path, ["tests/test_sums.py"], tmp_path / "map.json", 60.0)
    found = {mutant.line: covering(tmp_path, mutant, SUMS, tests) for mutant in mutants_of(file, SUMS)}
    for names in found.values():
        assert names == sorted(names, key=lambda name: tests[name]["seconds"])
    covered = {line: [name.split("::")[1] for name in names] for line, names in found.items()}
    assert {line: set(names) for line, names in covered.items()} == {
        1: {"test_add", "test_fixture", "test_both", "test_last"},  # runs at import
        6: {"test_add", "test_both"},  # the operation, which starts at its first operand
        7: {"test_add", "test_both"},
        12: {"test_fixture", "test_both", "test_last"},  # test_both uses the fixture, which another test has set up
    }
