"""Lines about skipped tests at the end of a run."""

import subprocess
import sys
from pathlib import Path

from skipped_reasons import skipped_lines

TESTS = """
import pytest

@pytest.mark.parametrize("number", range(3))
@pytest.mark.skipif(True, reason="the files are written by ffmpeg, which is not installed")
def test_odd(number): ...

def test_moon():
    pytest.skip("no moon tonight")

def test_passes(): ...
"""


def test_skipped_tests_are_listed_with_their_fix(tmp_path: Path):
    for name in ("conftest.py", "skipped_reasons.py"):
        (tmp_path / name).write_text((Path(__file__).parent / name).read_text())
    (tmp_path / "test_it.py").write_text(TESTS)
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-n", "1", "--rootdir=.", "test_it.py"]
    lines = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, timeout=300).stdout.splitlines()
    [ffmpeg] = [line for line in lines if "written by ffmpeg" in line]
    assert ffmpeg.startswith("skipped: 3 in test_it.py: ")
    assert "apt-get install ffmpeg" in ffmpeg
    assert "skipped: 1 in test_it.py: no moon tonight" in lines


def test_no_lines_without_skipped_tests():
    assert skipped_lines([]) == []
