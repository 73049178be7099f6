"""The documentation site builds without warnings, and each of its links exists."""

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path
from urllib.parse import unquote

import pytest

ROOT = Path(__file__).resolve().parents[1]
INSTALLED = all(importlib.util.find_spec(name) for name in ("mkdocs", "material", "mkdocstrings_handlers"))


@pytest.mark.slow
@pytest.mark.skipif(not INSTALLED, reason="mkdocs-material and mkdocstrings are not installed")
def test_site_builds_without_warnings(tmp_path: Path):
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path)]
    environment = {**os.environ, "NO_MKDOCS_2_WARNING": "1"}  # an advertisement
    result = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    assert "WARNING" not in result.stderr
    pages = {file: file.read_text() for file in tmp_path.rglob("*.html") if file.name != "404.html"}
    assert {"index.html", "your_data.html", "api/ops.html", "experiments/quickstart.html"} <= {
        file.relative_to(tmp_path).as_posix() for file in pages
    }
    for file, text in pages.items():
        for target in re.findall(r'(?:href|src)="([^"#?]+)', text):
            if not re.match(r"[a-z]+:|//", target):
                assert (file.parent / unquote(target)).exists(), f"{file.relative_to(tmp_path)}: {target}"
        external = re.findall(r'<(?:link|script|img)[^>]+(?:href|src)="(https?://[^"]+)', text)
        assert external == [], f"{file.name} loads files from the network"
        assert not re.search(r":(class|func|meth|mod):", re.sub(r"<pre>.*?</pre>", "", text, flags=re.DOTALL)), file
