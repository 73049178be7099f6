"""Runs pytest in a fork, and measures the duration and the executed lines of each test."""

import contextlib
import hashlib
import importlib
import json
import os
import signal
import sys
import tempfile
import time
from pathlib import Path

import pytest

PACKAGE = Path("src/blueberry_video")


def run_tests(tree: Path, paths: list[str], timeout: float, measure: bool = False) -> int | None:
    """Returns the exit code of pytest in a fork with the working directory ``tree``; None after ``timeout`` seconds.

    With ``measure``, it runs all tests and writes the result of :class:`Recorder` to ``tree / "lines.json"``.
    """
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
            recorder = Recorder(tree) if measure else None
            options = [
                f"--rootdir={tree}",
                "-q",
                "-p",
                "no:cacheprovider",
                "-W",
                "ignore",
                *([] if measure else ["-x"]),
                *paths,
            ]
            code = int(pytest.main([*options, *paths], plugins=[recorder] if recorder else []))
            if recorder:
                (tree / "lines.json").write_text(json.dumps(recorder.result()))
        os._exit(code)
    end = time.monotonic() + timeout
    while time.monotonic() < end:
        done, status = os.waitpid(pid, os.WNOHANG)
        if done:
            break
        time.sleep(0.05)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(pid, signal.SIGKILL)
    if not done:
        os.waitpid(pid, 0)
        return None
    return os.waitstatus_to_exitcode(status)


class Recorder:
    """pytest plugin that measures the duration of each test and the lines of the package that it executes.

    The lines of a fixture of a wider scope count for all tests that use it.
    """

    def __init__(self, tree: Path):
        self.tree, self.test = tree, ""
        self.seconds: dict[str, float] = {}
        self.fixtures: dict[str, list[str]] = {}
        self.coverage = importlib.import_module("coverage").Coverage(
            data_file=None, config_file=False, include=[f"{tree / PACKAGE}/*"]
        )
        self.coverage.start()

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_protocol(self, item):
        start, self.test, self.fixtures[item.nodeid] = time.monotonic(), item.nodeid, item.fixturenames
        self.coverage.switch_context(item.nodeid)
        result = yield
        self.coverage.switch_context("")
        self.seconds[item.nodeid] = round(time.monotonic() - start, 3)
        return result

    @pytest.hookimpl(wrapper=True)
    def pytest_fixture_setup(self, fixturedef, request):
        if fixturedef.scope != "function":
            self.coverage.switch_context(f"{request.node.nodeid}*{fixturedef.argname}")
        result = yield
        self.coverage.switch_context(self.test)
        return result

    def result(self) -> dict[str, dict]:
        """Returns test -> ``{"seconds": duration, "lines": {file: executed lines}}``."""
        self.coverage.stop()
        tests: dict[str, dict] = {test: {"seconds": seconds, "lines": {}} for test, seconds in self.seconds.items()}
        data = self.coverage.get_data()
        for path in data.measured_files():
            file = str(Path(path).relative_to(self.tree))
            for line, contexts in data.contexts_by_lineno(path).items():
                wider = [context.rsplit("*", 1) for context in contexts if "*" in context and context not in tests]
                for test in tests:
                    used = any(test.startswith(scope) and name in self.fixtures[test] for scope, name in wider)
                    if test in contexts or used:
                        tests[test]["lines"].setdefault(file, []).append(line)
        return tests


def measured(tree: Path, paths: list[str], cache: Path | None, timeout: float) -> dict[str, dict]:
    """Returns the durations and lines of the tests in ``paths``, from the cache where it is current."""
    found = [path for name in paths for path in (tree / name).rglob("test_*.py")] + [
        tree / name for name in paths if (tree / name).is_file()
    ]
    files = {str(path.relative_to(tree)): _digest(tree, [path]) for path in sorted(found)}
    sources = [path for name in ("src", "conf") for path in (tree / name).rglob("*.*") if path.is_file()]
    source = _digest(tree, sorted([*sources, *(tree / "tests").rglob("conftest.py")]))
    cache = cache or Path(tempfile.gettempdir(), f"mutants-{source}.json")
    known = json.loads(cache.read_text()) if cache.exists() else {}
    if known.get("source") != source:
        known = {"source": source, "files": {}}
    changed = [file for file in files if known["files"].get(file, {}).get("digest") != files[file]]
    if changed:
        print(f"measuring {len(changed)} of {len(files)} test files", flush=True)
        if run_tests(tree, changed, timeout, measure=True) != 0:
            log = (tree / "pytest.log").read_text(errors="replace")
            sys.exit(f"{log[-3000:]}\nthe tests {' '.join(paths)} fail without a mutant: repair them first.")
        tests = json.loads((tree / "lines.json").read_text())
        for file in changed:
            own = {test: entry for test, entry in tests.items() if test.split("::")[0] == file}
            known["files"][file] = {"digest": files[file], "tests": own}
        cache.write_text(json.dumps(known))
    return {test: entry for file in files for test, entry in known["files"][file]["tests"].items()}


def _digest(tree: Path, files: list[Path]) -> str:
    parts = (str(file.relative_to(tree)).encode() + file.read_bytes() for file in files)
    return hashlib.sha256(b"".join(parts)).hexdigest()[:16]
