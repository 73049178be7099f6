"""Weights on a hub: ids, revisions, files, cache, offline use and errors, from a hub on 127.0.0.1."""

import shutil
from collections.abc import Iterator
from pathlib import Path

import huggingface_hub
import pytest
import torch
from safetensors.torch import save_file

from blueberry_video.weights import hub as hubs
from blueberry_video.weights.diffusers_folder import read_source
from blueberry_video.weights.files import resolve
from blueberry_video.weights.optional import load_part
from loopback_hub import Hub, commit_of, loopback_hub


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    root = tmp_path / "repositories"
    for name in ("model", "pickled", "text"):
        (root / name).mkdir(parents=True)
        (root / name / "config.json").write_text('{"hidden_size": 3}')
    save_file({"weight": torch.arange(3.0)}, root / "model" / "model.safetensors")
    for file in ("model/pytorch_model.bin", "pickled/pytorch_model.bin"):
        torch.save({"weight": torch.arange(3.0) + 1}, root / file)
    torch.save({"weight": torch.arange(3.0) + 2}, root / "pickled" / "a.pth")
    with loopback_hub(root, tmp_path / "cache", monkeypatch) as served:
        yield served


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("hf://org/name", ("org/name", None, None)),
        ("hf:/org/name", ("org/name", None, None)),  # a Path merges slashes
        ("hf://org/name@v1.0", ("org/name", "v1.0", None)),
        ("hf://org/name/a/b.pth", ("org/name", None, "a/b.pth")),
        ("hf://org/name@v1/a/b.pth", ("org/name", "v1", "a/b.pth")),
        ("hf://org/name@refs/pr/3/b.pth", ("org/name", "refs/pr/3", "b.pth")),
        ("hf://org/name@feature%2Fx", ("org/name", "feature/x", None)),
        ("org/V-1.5_b@main", ("org/V-1.5_b", "main", None)),
        ("org/name/file.pth", None),
        ("hf://name", None),
        ("/org/name", None),
        ("./name", None),
    ],
)
def test_names_of_sources(text: str, expected):
    assert hubs.parse(text) == (expected and hubs.HubSource(*expected))


@pytest.mark.parametrize(
    "weights", ["org/model", "hf://org/model", "hf://org/model@v1", f"org/model@{commit_of('model')}"]
)
def test_a_repository_is_a_folder_of_safetensors(hub: Hub, weights: str):
    config, state = read_source(weights)
    assert config == {"hidden_size": 3}
    assert state["weight"].tolist() == [0, 1, 2]
    assert not [request for request in hub.requests if request.endswith(".bin")]
    assert resolve(weights).name == commit_of("model")


def test_a_named_file_is_read_with_the_config_next_to_it(hub: Hub):
    for weights in ("hf://org/pickled/pytorch_model.bin", "hf://org/pickled@v1/pytorch_model.bin"):
        config, state = read_source(Path(weights))
        assert config == {"hidden_size": 3}
        assert state["weight"].tolist() == [1, 2, 3]
    (hub.root / "pickled" / "config.json").unlink()
    (hub.root / "bare").mkdir()
    shutil.copy(hub.root / "pickled" / "a.pth", hub.root / "bare" / "a.pth")
    config, state = read_source("hf://org/bare/a.pth")
    assert (config, state["weight"].tolist()) == ({}, [2, 3, 4])


def test_the_cache_serves_without_a_network(hub: Hub, monkeypatch: pytest.MonkeyPatch):
    online = [resolve(weights) for weights in ("org/model", "hf://org/pickled/a.pth")]
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    asked = len(hub.requests)
    assert [resolve(weights) for weights in ("org/model", "hf://org/pickled/a.pth")] == online
    assert len(hub.requests) == asked
    with pytest.raises(FileNotFoundError, match=r"hf://org/model@v1.*HF_HUB_OFFLINE"):
        resolve("hf://org/model@v1")
    with pytest.raises(FileNotFoundError, match=r"hf://org/other/a\.pth.*HF_HUB_OFFLINE"):
        resolve("hf://org/other/a.pth")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    hub.close()
    assert resolve("org/model") == online[0]
    with pytest.raises(FileNotFoundError, match=rf"hf://org/other: .*{hub.url} cannot be reached.*HF_ENDPOINT"):
        resolve("org/other")


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        ("org/nothing", r"hf://org/nothing: .*no repository org/nothing.*404"),
        ("org/private", r"hf://org/private: .*private \(401\).*HF_TOKEN"),
        ("org/gated", r"hf://org/gated: .*restricted \(403\).*terms at .*org/gated.*HF_TOKEN"),
        ("org/broken", r"hf://org/broken: "),
        ("hf://org/gated/a.pth", r"restricted \(403\)"),
        ("hf://org/private/a.pth", r"private \(401\)"),
        ("hf://org/model@v9", r"hf://org/model@v9: .*no revision 'v9'"),
        ("hf://org/model@v9/a.pth", r"no revision 'v9'"),
        ("hf://org/model/a.pth", r"hf://org/model/a\.pth: .*no file a\.pth"),
        ("hf://model", r"hf://model: .*hf://org/name@revision"),
        ("org/pickled", r"hf://org/pickled holds no safetensors.*hf://org/pickled/a\.pth"),
        ("hf://org/pickled@v1", r"hf://org/pickled@v1/a\.pth"),
        ("org/text", r"hf://org/text holds no safetensors"),
    ],
)
def test_what_the_hub_refuses_is_one_paragraph(hub: Hub, weights: str, message: str):
    with pytest.raises(FileNotFoundError, match=message) as raised:
        resolve(weights)
    assert "\n" not in str(raised.value)


def test_pickled_files_of_a_repository_are_not_downloaded(hub: Hub):
    with pytest.raises(FileNotFoundError, match="safetensors"):
        resolve("org/pickled")
    assert not [request for request in hub.requests if "/resolve/" in request and not request.endswith(".json")]


def test_a_local_folder_of_pickled_files_is_refused(hub: Hub):
    folder = hub.root / "pickled"
    with pytest.raises(FileNotFoundError, match=rf"{folder} holds no safetensors.*{folder}/a\.pth"):
        read_source(folder)
    assert read_source(folder / "pytorch_model.bin")[0] == {"hidden_size": 3}


def test_parts_of_pipelines_have_revisions(tmp_path: Path):
    class Loader:
        @staticmethod
        def from_pretrained(*path: str, **options: object):
            return path, options

    assert load_part(Loader, "hf://org/name@v1", "vae", "autoencoder") == (
        ("org/name",),
        {"subfolder": "vae", "revision": "v1"},
    )
    assert load_part(Loader, "org/name", None, "autoencoder", dtype=1) == (("org/name",), {"dtype": 1})
    assert load_part(Loader, str(tmp_path), None, "autoencoder") == ((str(tmp_path),), {})
