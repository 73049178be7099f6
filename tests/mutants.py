"""Mutation score of the tests of one folder of src/.

    python tests/mutants.py data --count 40 --seed 0
    python tests/mutants.py evaluation --tests tests/evaluation tests/tasks

Plants seeded mutants, one at a time, in a temporary copy of the tree: a comparison or arithmetic operator replaced, an
integer changed by 1, `and` and `or` exchanged, a condition negated, two arguments swapped, or a statement removed. Runs
the tests of each mutant, first the files named after its module, then all of the folder's, until one fails. Prints the
score and the survivors. A survivor is a missing test or is equivalent to the original: read it. The tests run in
forks of one process that has imported torch, with a time limit; a mutant that exceeds it counts as detected.
"""

import argparse
import ast
import contextlib
import importlib
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = Path("src/blueberry_video")
COPIED = ("src", "tests", "conf", "experiments", "pyproject.toml", "README.md", "Makefile", "docs")
IMPORTED = ("numpy", "torch", "lightning", "pytest")  # in the parent, so that a fork starts at once
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
    """One change of a file: its line, a description and the source after it."""

    file: Path
    line: int
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
        before = ast.unparse(node)
        line = node.lineno
        change = apply()
        yield Mutant(file, line, f"{change}: {' '.join(before.split())[:100]}", ast.unparse(tree))


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


def run_tests(tree: Path, paths: list[str], timeout: float) -> int | None:
    """Returns the exit code of pytest in a fork with the working directory ``tree``; None after ``timeout`` seconds."""
    pid = os.fork()
    if pid == 0:
        code = 1
        with contextlib.suppress(BaseException):
            os.setsid()
            os.chdir(tree)
            with (tree / "pytest.log").open("w") as log:
                os.dup2(log.fileno(), 1)
                os.dup2(log.fileno(), 2)
            sys.path.insert(0, str(tree / "src"))
            os.environ["PYTHONPATH"] = str(tree / "src")
            sys.dont_write_bytecode, os.environ["PYTHONDONTWRITEBYTECODE"] = True, "1"
            pytest = importlib.import_module("pytest")
            code = int(pytest.main(["-x", "-q", "-p", "no:cacheprovider", "-W", "ignore", *paths]))
        os._exit(code)
    end = time.monotonic() + timeout
    while time.monotonic() < end:
        done, status = os.waitpid(pid, os.WNOHANG)
        if done:
            break
        time.sleep(0.1)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(pid, signal.SIGKILL)
    if not done:
        os.waitpid(pid, 0)
        return None
    return os.waitstatus_to_exitcode(status)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", help="folder or file below src/blueberry_video")
    parser.add_argument("--tests", nargs="+", help="paths of tests; default tests/<folder>")
    parser.add_argument("--count", type=int, default=40)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--timeout", type=float, default=300.0, help="seconds for the tests of one mutant")
    parser.add_argument("--quick", action="store_true", help="only run the test files named after a mutant's module")
    options = parser.parse_args()
    source = ROOT / PACKAGE / options.folder
    files = sorted(source.rglob("*.py")) if source.is_dir() else [source]
    room = Path(options.folder) if source.is_dir() else Path(options.folder).parent
    tests = options.tests or [f"tests/{room}"]
    every = [m for file in files for m in mutants_of(file.relative_to(ROOT), file.read_text(encoding="utf-8"))]
    chosen = random.Random(options.seed).sample(every, min(options.count, len(every)))
    for name in IMPORTED:
        importlib.import_module(name)
    survivors = []
    with tempfile.TemporaryDirectory() as folder:
        tree = Path(folder)
        for name in COPIED:
            ignored = shutil.ignore_patterns("__pycache__", "outputs")
            if (ROOT / name).is_dir():
                shutil.copytree(ROOT / name, tree / name, ignore=ignored)
            elif (ROOT / name).exists():
                shutil.copy(ROOT / name, tree / name)
        if not options.quick and run_tests(tree, tests, 10 * options.timeout) != 0:
            log = (tree / "pytest.log").read_text(errors="replace")
            sys.exit(f"{log[-3000:]}\nthe tests {' '.join(tests)} fail without a mutant: repair them first.")
        print(f"{len(chosen)} of {len(every)} mutants of {options.folder}, tests {' '.join(tests)}", flush=True)
        for number, mutant in enumerate(chosen, start=1):
            original = (tree / mutant.file).read_text(encoding="utf-8")
            (tree / mutant.file).write_text(mutant.source, encoding="utf-8")
            start = time.monotonic()
            found = [str(p) for test in tests for p in Path(ROOT, test).rglob(f"test_*{mutant.file.stem}*.py")]
            first = [str(Path(path).relative_to(ROOT)) for path in found]
            code = run_tests(tree, first, options.timeout) if first else 0
            if code == 0 and not (options.quick and first):
                code = run_tests(tree, [*tests, *(f"--ignore={path}" for path in first)], options.timeout)
                code = 0 if code == 5 and first else code  # 5: all tests are ignored
            (tree / mutant.file).write_text(original, encoding="utf-8")
            if code == 0:
                survivors.append(mutant)
            outcome = {None: "timeout", 0: "SURVIVED", 1: "detected", 2: "detected"}.get(code, f"exit code {code}")
            print(f"{number:3} {time.monotonic() - start:4.0f} s {outcome}: {mutant}", flush=True)
    detected = len(chosen) - len(survivors)
    print(f"score: {detected} of {len(chosen)} detected, {detected / max(len(chosen), 1):.1%}; survivors:")
    for mutant in survivors:
        print(f"  {mutant}")


if __name__ == "__main__":
    main()
