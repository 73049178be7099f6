"""The mutation tool: what it changes, and the outcome of tests of a mutant."""

import ast
from pathlib import Path

from mutants import mutants_of, run_tests

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
        assert run_tests(tmp_path, ["test_it.py"], 60.0 if code is not None else 5.0) == code
