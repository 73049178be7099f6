"""Hub of model repositories on 127.0.0.1, with the endpoints that huggingface_hub calls to download files."""

import contextlib
import hashlib
import json
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from urllib.parse import unquote, urlsplit

import huggingface_hub
import pytest

ERRORS = {  # repository -> (status, code of the hub)
    "private": (401, "RepoNotFound"),
    "gated": (403, "GatedRepo"),
    "broken": (500, ""),
}


class Hub:
    """Repositories ``org/<folder name>`` of a folder.

    Each has the commit ``commit_of(name)`` as ``main`` and ``v1``. Repositories named as in ``ERRORS`` fail.

    Attributes:
        requests: paths of all requests, in their order.
        url: address, for ``HF_ENDPOINT``.
    """

    def __init__(self, root: Path):
        self.root, self.requests = root, []
        hub = self

        class Handler(BaseHTTPRequestHandler):
            def do_HEAD(self) -> None:
                hub.answer(self, body=False)

            def do_GET(self) -> None:
                hub.answer(self, body=True)

            def log_message(self, *arguments: object) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        self.thread = Thread(target=self.server.serve_forever, daemon=True)
        self.thread.start()

    def close(self) -> None:
        if not self.thread.is_alive():
            return
        self.server.shutdown()
        self.server.server_close()
        self.thread.join()

    def answer(self, request: BaseHTTPRequestHandler, body: bool) -> None:
        parts = [unquote(part) for part in urlsplit(request.path).path.strip("/").split("/")]
        self.requests.append("/".join(parts))
        is_api = parts[:2] == ["api", "models"]
        name, kind, revision, *file = (parts[2:] if is_api else parts)[1:]
        folder = self.root / name
        if name in ERRORS:
            return self.send(request, body, b"", ERRORS[name][0], {"X-Error-Code": ERRORS[name][1]})
        if not folder.is_dir():
            return self.send(request, body, b"", 404, {"X-Error-Code": "RepoNotFound"})
        if revision not in ("main", "v1", commit_of(name)):
            return self.send(request, body, b"", 404, {"X-Error-Code": "RevisionNotFound"})
        files = sorted(path for path in folder.rglob("*") if path.is_file())
        names = [path.relative_to(folder).as_posix() for path in files]
        if is_api and kind == "tree":
            tree = [
                {"type": "file", "path": n, "size": path.stat().st_size, "oid": etag(path)}
                for n, path in zip(names, files, strict=True)
            ]
            return self.send(request, body, json.dumps(tree).encode(), 200, {})
        if is_api:
            about = {"id": f"org/{name}", "sha": commit_of(name), "siblings": [{"rfilename": n} for n in names]}
            return self.send(request, body, json.dumps(about).encode(), 200, {})
        path = folder.joinpath(*file)
        commit = {"X-Repo-Commit": commit_of(name)}
        if not path.is_file():
            return self.send(request, body, b"", 404, {"X-Error-Code": "EntryNotFound", **commit})
        return self.send(request, body, path.read_bytes(), 200, {"ETag": f'"{etag(path)}"', **commit})

    @staticmethod
    def send(request: BaseHTTPRequestHandler, body: bool, data: bytes, status: int, headers: dict[str, str]) -> None:
        request.send_response(status)
        for name, value in {**headers, "Content-Length": str(len(data))}.items():
            request.send_header(name, value)
        request.end_headers()
        if body:
            request.wfile.write(data)


def commit_of(name: str) -> str:
    return hashlib.sha1(name.encode()).hexdigest()


def etag(path: Path) -> str:
    return hashlib.sha1(path.read_bytes()).hexdigest()


@contextlib.contextmanager
def loopback_hub(root: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """Serves the repositories of a folder to huggingface_hub in this process, with an own cache."""
    hub = Hub(root)
    constants = huggingface_hub.constants
    monkeypatch.setattr(constants, "ENDPOINT", hub.url)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", hub.url + "/{repo_id}/resolve/{revision}/{filename}")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(cache))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    try:
        yield hub
    finally:
        hub.close()
