"""Model cards, and uploads to a hub on 127.0.0.1, of which a download is a run and a model of transformers."""

import base64
import contextlib
import json
import shutil
import sys
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread

import numpy as np
import pytest
import torch
import yaml

from blueberry_video import load_run
from blueberry_video import push as entry
from blueberry_video.experiment.card import license_of, model_card
from blueberry_video.experiment.run_folder import RunFolder
from blueberry_video.push import push, stage
from trained_classifier import trained


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return trained(tmp_path_factory.mktemp("run"), "model.head_init_scale=0.5")


@contextlib.contextmanager
def hub(folder: Path, monkeypatch: pytest.MonkeyPatch, status: int = 200) -> Iterator[list[str]]:
    """Stand-in for a hub that writes the files of each commit into a folder; yields the paths of the requests."""
    requests: list[str] = []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            requests.append(self.path)
            body = self.rfile.read(int(self.headers.get("Content-Length", 0))).decode()
            answer: dict = {"errors": [], "warnings": []}
            if "/preupload/" in self.path:
                files = json.loads(body)["files"]
                answer = {"files": [{"path": f["path"], "uploadMode": "regular", "shouldIgnore": False} for f in files]}
            elif "/commit/" in self.path:
                for line in body.splitlines():
                    part = json.loads(line)
                    if part["key"] == "file":
                        target = folder / part["value"]["path"]
                        target.parent.mkdir(parents=True, exist_ok=True)
                        target.write_bytes(base64.b64decode(part["value"]["content"]))
                answer = {"commitUrl": f"{url}/org/lights/commit/abc", "commitOid": "abc"}
            elif self.path.endswith("/create"):
                answer = {"url": f"{url}/org/lights", "name": "lights", "id": "org/lights"}
            self.send_response(status)
            data = json.dumps(answer).encode()
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        def do_GET(self) -> None:
            requests.append(self.path)
            self.send_response(404)
            self.send_header("Content-Length", "0")
            self.end_headers()

        def log_message(self, *arguments: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    Thread(target=server.serve_forever, daemon=True).start()
    url = f"http://127.0.0.1:{server.server_port}"
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", url)
    monkeypatch.setattr("huggingface_hub.hf_api.constants.ENDPOINT", url)
    monkeypatch.setenv("HF_TOKEN", "hf_stand_in")
    try:
        yield requests
    finally:
        server.shutdown()
        server.server_close()


def test_a_download_is_a_run_and_a_model_of_transformers(run: Path, tmp_path: Path, monkeypatch):
    with hub(tmp_path / "lights", monkeypatch):
        assert push(run, "org/lights", license="apache-2.0").endswith("/commit/abc")
    clip = np.random.default_rng(0).integers(0, 256, (4, 16, 16, 3), dtype=np.uint8)
    ours, theirs = load_run(run, "cpu"), load_run(tmp_path / "lights", "cpu")
    torch.testing.assert_close(theirs(clip)["class"], ours(clip)["class"])
    assert theirs.classes == {"class": ("bright", "dark")}
    transformers = pytest.importorskip("transformers")
    model = transformers.VideoMAEForVideoClassification.from_pretrained(tmp_path / "lights")
    assert model.config.id2label == {0: "bright", 1: "dark"}
    about = yaml.safe_load((tmp_path / "lights" / "README.md").read_text().split("---")[1])
    assert (about["license"], about["pipeline_tag"]) == ("apache-2.0", "video-classification")
    record = json.loads((tmp_path / "lights" / "run.json").read_text())
    assert "hardware" not in record
    assert record["clips"]["classes"] == {"class": ["bright", "dark"]}


def test_card_has_numbers_with_baselines_and_provenance(run: Path):
    text, record = model_card(RunFolder.open(run)), json.loads((run / "run.json").read_text())
    row = next(line for line in text.splitlines() if line.startswith("| val/class |"))
    assert f"{record['metrics']['val/class']:.4g}" in row
    assert "0.5" in row  # of the most frequent class
    for part in ("bright, dark", "4 frames of 16 x 16", "seed ", "torch 2", "VideoClassifier", "load_run"):
        assert part in text
    assert "license" not in yaml.safe_load(text.split("---")[1])


def test_licence_of_the_initial_weights_is_inherited(run: Path, tmp_path: Path):
    weights = tmp_path / "weights"
    weights.mkdir()
    (weights / "README.md").write_text("---\nlicense: cc-by-nc-4.0\n---\n# Weights\n")
    assert license_of(str(weights)) == "cc-by-nc-4.0"
    copy = shutil.copytree(run, tmp_path / "run")
    config = yaml.safe_load((copy / "config.yaml").read_text())
    (copy / "config.yaml").write_text(yaml.safe_dump(config | {"init_from": str(weights)}))
    text = model_card(RunFolder.open(copy))
    assert yaml.safe_load(text.split("---")[1])["license"] == "cc-by-nc-4.0"
    assert f"`init_from`: {weights}" in text
    assert license_of(str(tmp_path)) is None


def test_a_refused_upload_raises(run: Path, tmp_path: Path, monkeypatch):
    with hub(tmp_path / "x", monkeypatch, status=403), pytest.raises(ConnectionError, match=r"org/lights.*HF_TOKEN"):
        push(run, "org/lights")
    with pytest.raises(ValueError, match="repo=lights"):
        push(run, "lights")


def test_command_writes_a_card(run: Path, tmp_path: Path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["push", str(run), "--card", str(tmp_path / "card.md")])
    entry.main()
    assert "# lights" in (tmp_path / "card.md").read_text()
    with pytest.raises(FileExistsError, match=r"card\.md.*overwrite"):
        entry.main()


def test_staged_files(run: Path, tmp_path: Path):
    stage(run, tmp_path)
    found = {path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*") if path.is_file()}
    assert {"README.md", "config.yaml", "run.json", "config.json", "model.safetensors", "clips.json"} <= found
    assert "checkpoints/step_00000002.ckpt" in found
