"""Hooks of the documentation site: pages from outside of docs/, links between pages, and roles in docstrings."""

import posixpath
import re
from pathlib import Path

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).resolve().parents[1]
TEXT = ("README.md", "CONTRIBUTING.md", "CHANGELOG.md")  # in the root
ROLE = re.compile(r":(?:class|func|meth|mod|data|attr|exc):<code>~?([\w.]+)</code>")


def _address(path: str) -> str | None:
    """Page of the site for a path in the repository; None if it is not on the site."""
    if path == "README.md":
        return "index.md"
    if path in TEXT:
        return path.lower()
    if path == "LICENSE":
        return "LICENSE.txt"
    if experiment := re.fullmatch(r"experiments/(\w+)/README\.md", path):
        return f"experiments/{experiment[1]}.md"
    return path.removeprefix("docs/") if path.startswith("docs/") else None


def _origins() -> dict[str, str]:
    """Page of the site -> path in the repository, of files outside of docs/."""
    paths = [*TEXT, "LICENSE", *(f"experiments/{file.parent.name}/README.md" for file in _experiments())]
    return {str(_address(path)): path for path in paths if (ROOT / path).is_file()}


def _experiments() -> list[Path]:
    return sorted((ROOT / "experiments").glob("*/README.md"))


def on_config(config):
    """Lists the experiments, and pages that exist only in some versions."""
    for section in config.nav:
        if section.get("Experiments") == "EXPERIMENTS":
            section["Experiments"] = [
                str(_address(f"experiments/{file.parent.name}/README.md")) for file in _experiments()
            ]
        elif "Use" in section and (ROOT / "docs" / "installation.md").is_file():
            section["Use"] = ["installation.md", *(page for page in section["Use"] if page != "installation.md")]
    if (ROOT / "CHANGELOG.md").is_file():
        config.nav[3]["Development"].append("changelog.md")
    return config


def on_files(files: Files, config) -> Files:
    """Adds the pages from outside of docs/."""
    for address, path in _origins().items():
        files.append(File.generated(config, address, content=(ROOT / path).read_text()))
    return files


def on_page_markdown(markdown: str, page, **_) -> str:
    """Rewrites links between files of the repository to links between pages; other files become plain text."""
    address = page.file.src_uri
    origin = _origins().get(address, f"docs/{address}")

    def rewrite(match: re.Match) -> str:
        image, text, target = match.groups()
        path, hash_, anchor = target.partition("#")
        if not path or re.match(r"[a-z]+:", target):
            return match[0]
        found = _address(posixpath.normpath(posixpath.join(posixpath.dirname(origin), path)))
        if found is None:
            return text
        return f"{image}[{text}]({posixpath.relpath(found, posixpath.dirname(address) or '.')}{hash_}{anchor})"

    return re.sub(r"(!?)\[([^\]]*)\]\(([^)\s]+)\)", rewrite, markdown)


def on_page_content(html: str, **_) -> str:
    """Replaces roles of docstrings, such as :class:`~a.B`, by the name."""
    html = ROLE.sub(lambda match: f"<code>{match[1].rpartition('.')[2]}</code>", html)
    return html.replace("Example::", "Example:")
