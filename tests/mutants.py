"""Mutation score of the tests of one folder of src/.

    python tests/mutants.py data --count 25 --seed 16
    python tests/mutants.py evaluation --tests tests/evaluation tests/tasks tests/test_callbacks.py

Plants seeded mutants, one at a time, in a temporary copy of the tree: a comparison or arithmetic operator replaced, an
integer changed by 1, `and` and `or` exchanged, a condition negated, two arguments swapped, or a statement removed.
Prints the score and the survivors. A survivor is a missing test or is equivalent to the original: read it.

The tests run once under coverage with one context per test. The map from tests to durations and executed lines is
cached in a file; only test files that changed are measured again, and all of them when src/ or conf/ changes. Of each
mutant only the tests that execute its line run, the shortest first, in growing batches until one fails. A mutant with
a line that no test executes survives at once. Coverage does not see lines that run in other processes: `--also` lists
test files to run after the covering tests have passed, and `--all` runs all files of `--tests`.

The tests run in forks of one process that has imported torch, with a time limit; a mutant that exceeds it counts as
detected.
"""

import argparse
import ast
import importlib
import random
import shutil
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from measured_tests import PACKAGE, measured, run_tests

ROOT = Path(__file__).resolve().parents[1]
COPIED = ("src", "tests", "conf", "experiments", "pyproject.toml", "README.md", "Makefile", "docs")
# in the parent, so that a fork starts at once
IMPORTED = ("coverage", "numpy", "torch", "lightning", "torchmetrics", "hydra", "diffusers", "av")
SWAPPED: dict[type, type] = {
    ast.Lt: ast.LtE,
    ast.LtE: ast.Lt,
    ast.Gt: ast.GtE,
    ast.GtE: ast.Gt,
    ast.Eq: ast.NotEq,
    ast.NotEq: ast.Eq,
    ast.In: ast.NotIn,
    ast.NotIn: ast.In,
    ast.Is: ast.IsNot,
    ast.IsNot: ast.Is,
    ast.And: ast.Or,
    ast.Or: ast.And,
    ast.Add: ast.Sub,
    ast.Sub: ast.Add,
    ast.Mult: ast.Div,
    ast.Div: ast.Mult,
    ast.FloorDiv: ast.Mult,
    ast.Mod: ast.Mult,
}


@dataclass(frozen=True)
class Mutant:
    """One change of a file: its line, the first line of its statement, a description and the source after it."""

    file: Path
    line: int
    statement: int
    change: str
    source: str

    def __str__(self) -> str:
        return f"{self.file}:{self.line}: {self.change}"


def mutants_of(file: Path, source: str) -> Iterator[Mutant]:
    """Yields every mutant of a file."""
    count = sum(1 for _ in _sites(ast.parse(source)))
    for number in range(count):
        tree = ast.parse(source)
        node, apply = next(site for i, site in enumerate(_sites(tree)) if i == number)
        line, before = node.lineno, ast.unparse(node)
        if isinstance(node, ast.Constant):
            before = source.splitlines()[line - 1]
        statement = max(n.lineno for n in ast.walk(tree) if isinstance(n, ast.stmt) and n.lineno <= line)
        change = apply()
        yield Mutant(file, line, statement, f"{change}: {' '.join(before.split())[:100]}", ast.unparse(tree))


def _sites(tree: ast.AST) -> Iterator:
    """Yields (node, function that changes the tree and describes the change) of all sites, without changing it."""
    for node in _executed(tree):
        if isinstance(node, ast.Compare):
            for i, operator in enumerate(node.ops):
                new = SWAPPED[type(operator)]
                yield node, lambda node=node, i=i, new=new: _set(node.ops, i, new())
        elif isinstance(node, ast.BinOp | ast.AugAssign | ast.BoolOp) and type(node.op) in SWAPPED:
            if not _is_text(node):
                yield node, lambda node=node: _operator(node)
        elif isinstance(node, ast.Constant) and type(node.value) is int:
            yield node, lambda node=node: _integer(node)
        elif isinstance(node, ast.Call) and _swappable(node.args[:2]):
            yield node, lambda node=node: _swap(node)
        if isinstance(node, ast.If | ast.While | ast.IfExp):
            yield node.test, lambda node=node: _negate(node)
        for body in (getattr(node, name, None) for name in ("body", "orelse", "finalbody")):
            for i, statement in enumerate(body if isinstance(body, list) else []):
                if _removable(statement):
                    yield statement, lambda body=body, i=i: _set(body, i, ast.Pass(), "statement removed")


def _executed(node: ast.AST) -> Iterator[ast.AST]:
    """Walks the code that runs when functions are called: no annotations, decorators or messages."""
    yield node
    for name, value in ast.iter_fields(node):
        if name in ("annotation", "returns", "decorator_list", "type_comment"):
            continue
        if isinstance(node, ast.Raise) or (isinstance(node, ast.Assert) and name == "msg"):
            continue
        for child in value if isinstance(value, list) else [value]:
            if isinstance(child, ast.AST) and not isinstance(child, ast.JoinedStr):
                yield from _executed(child)


def _removable(statement: ast.stmt) -> bool:
    if isinstance(statement, ast.Expr):
        return isinstance(statement.value, ast.Call | ast.Yield | ast.YieldFrom)
    if isinstance(statement, ast.Assign):
        return all(isinstance(target, ast.Attribute | ast.Subscript) for target in statement.targets)
    return isinstance(statement, ast.AugAssign | ast.Raise | ast.Continue | ast.Break | ast.Delete)


def _swappable(arguments: list[ast.expr]) -> bool:
    starred = any(isinstance(argument, ast.Starred) for argument in arguments)
    return len(arguments) == 2 and not starred and ast.dump(arguments[0]) != ast.dump(arguments[1])


def _is_text(node: ast.AST) -> bool:
    return any(isinstance(child, ast.JoinedStr) for child in ast.iter_child_nodes(node))


def _set(items: list, index: int, new: ast.AST, change: str = "") -> str:
    change = change or f"{type(items[index]).__name__} -> {type(new).__name__}"
    items[index] = new
    return change


def _operator(node) -> str:
    old, node.op = node.op, SWAPPED[type(node.op)]()
    return f"{type(old).__name__} -> {type(node.op).__name__}"


def _integer(node: ast.Constant) -> str:
    old, node.value = node.value, node.value + (1 if (node.lineno + node.col_offset) % 2 or node.value == 0 else -1)
    return f"{old} -> {node.value}"


def _swap(call: ast.Call) -> str:
    call.args[:2] = call.args[1::-1]
    return "arguments swapped"


def _negate(node: ast.If | ast.While | ast.IfExp) -> str:
    node.test = ast.UnaryOp(ast.Not(), node.test)
    return "condition negated"


def covering(root: Path, mutant: Mutant, source: str, tests: dict[str, dict]) -> list[str]:
    """Returns the tests that execute the line of a mutant, the shortest first.

    For a line without bytecode these are the tests that execute a previous line of the statement. For a line that
    runs at import (a constant, a default value), they are all tests that execute a line of the file, and all tests of
    the files that import the module.
    """
    lines = {test: set(entry["lines"].get(str(mutant.file), ())) for test, entry in tests.items()}
    functions = [node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.FunctionDef)]
    if any(node.body[0].lineno <= mutant.line <= (node.end_lineno or 0) for node in functions):
        tried = range(mutant.line, mutant.statement - 1, -1)
        found = next((found for line in tried if (found := [test for test in tests if line in lines[test]])), [])
    else:
        name = ".".join(mutant.file.with_suffix("").parts[1:])
        imports = {
            file: name in (root / file).read_text(encoding="utf-8") for file in {t.split("::")[0] for t in tests}
        }
        found = [test for test in tests if lines[test] or imports[test.split("::")[0]]]
    return sorted(found, key=lambda test: tests[test]["seconds"])


def outcome(tree: Path, names: list[str], tests: dict[str, dict], options: argparse.Namespace) -> str:
    """Runs the tests in batches and returns ``SURVIVED``, ``NOT EXECUTED`` or how they fail."""
    seconds = [tests[name]["seconds"] for name in names]
    names = [name for i, name in enumerate(names) if sum(seconds[:i]) < options.budget]
    batches, size = [], 10
    while names:
        batches.append(names[:size])
        names, size = names[size:], size * 4
    executed = bool(batches)
    batches += [list(paths) for paths in (options.also, options.tests if options.all else []) if paths]
    for batch in batches:
        expected = sum(tests[name]["seconds"] if name in tests else options.timeout for name in batch)
        code = run_tests(tree, batch, min(options.timeout, 60 + 10 * expected))
        if code == 4:  # a parameter of a test depends on the mutant
            code = run_tests(tree, sorted({name.split("::")[0] for name in batch}), options.timeout)
        if code != 0:
            return {None: "timeout", 1: "detected", 2: "detected"}.get(code, f"exit code {code}")
    return "SURVIVED" if executed else "NOT EXECUTED"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", help="folder or file below src/blueberry_video")
    parser.add_argument("--tests", nargs="+", help="paths of tests; default tests/<folder>")
    parser.add_argument("--also", nargs="+", default=[], help="test files to run after the covering tests have passed")
    parser.add_argument("--all", action="store_true", help="run all of --tests after the covering tests have passed")
    parser.add_argument("--count", type=int, default=40)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", nargs="+", type=int, help="numbers of the mutants to run, from 1; default all")
    parser.add_argument("--list", action="store_true", help="print the mutants and run nothing")
    parser.add_argument("--map", type=Path, help="file of durations and lines; default in the temporary folder")
    parser.add_argument("--timeout", type=float, default=300.0, help="seconds for one batch of tests, at most")
    parser.add_argument("--budget", type=float, default=200.0, help="seconds of covering tests of one mutant")
    options = parser.parse_args()
    folder = ROOT / PACKAGE / options.folder
    files = sorted(folder.rglob("*.py")) if folder.is_dir() else [folder]
    options.tests = options.tests or [f"tests/{Path(options.folder).parts[0]}"]
    sources = {file.relative_to(ROOT): file.read_text(encoding="utf-8") for file in files}
    every = [mutant for file, source in sources.items() for mutant in mutants_of(file, source)]
    chosen = list(enumerate(random.Random(options.seed).sample(every, min(options.count, len(every))), start=1))
    chosen = [(number, mutant) for number, mutant in chosen if not options.only or number in options.only]
    print(f"{len(chosen)} of {len(every)} mutants of {options.folder}, tests {' '.join(options.tests)}", flush=True)
    if options.list:
        return print("\n".join(f"{number:3} {mutant}" for number, mutant in chosen))
    for name in IMPORTED:
        importlib.import_module(name)
    survivors = []
    with tempfile.TemporaryDirectory() as temporary:
        tree = Path(temporary).resolve()
        for name in COPIED:
            ignored = shutil.ignore_patterns("__pycache__", "outputs")
            if (ROOT / name).is_dir():
                shutil.copytree(ROOT / name, tree / name, ignore=ignored)
            elif (ROOT / name).exists():
                shutil.copy(ROOT / name, tree / name)
        tests = measured(tree, options.tests, options.map, 100 * options.timeout)
        for number, mutant in chosen:
            names = covering(tree, mutant, sources[mutant.file], tests)
            (tree / mutant.file).write_text(mutant.source, encoding="utf-8")
            start = time.monotonic()
            result = outcome(tree, names, tests, options)
            (tree / mutant.file).write_text(sources[mutant.file], encoding="utf-8")
            if result in ("SURVIVED", "NOT EXECUTED"):
                survivors.append((number, mutant))
            took = time.monotonic() - start
            print(f"{number:3} {took:4.0f} s of {len(names):3} tests {result}: {mutant}", flush=True)
    detected = len(chosen) - len(survivors)
    print(f"score: {detected} of {len(chosen)} detected, {detected / max(len(chosen), 1):.1%}; survivors:")
    for number, mutant in survivors:
        print(f"{number:3} {mutant}")


if __name__ == "__main__":
    main()
