"""Tar files of WebDataset: the clips, and shards and annotations that do not fit."""

import io
import json
import pickle
import tarfile
from pathlib import Path

import fsspec
import numpy as np
import pytest
import torch
import webdataset

from blueberry_video.data import web_shards
from blueberry_video.data.video_list import VideoList
from blueberry_video.data.web_index import expand_braces
from blueberry_video.data.web_shards import WebShards
from blueberry_video.data.write import write_video


@pytest.fixture(scope="module")
def videos(tmp_path_factory: pytest.TempPathFactory) -> list[bytes]:
    folder, rng = tmp_path_factory.mktemp("clips"), np.random.default_rng(0)
    for i in range(4):
        write_video(folder / f"{i}.mp4", rng.integers(0, 255, (6, 16, 24, 3), dtype=np.uint8), 10.0)
    return [(folder / f"{i}.mp4").read_bytes() for i in range(4)]


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "user"))
    return tmp_path / "user"


def write(path: Path, *samples: dict) -> None:
    path.parent.mkdir(exist_ok=True)
    with webdataset.TarWriter(str(path)) as sink:
        for sample in samples:
            sink.write(sample)


def known(data: WebShards, label: str = "class") -> list[str]:
    return [data.classes[label][row.labels[label]] for row in data.rows]


def test_clips_of_shards_that_webdataset_wrote(tmp_path: Path, videos: list[bytes]):
    root = tmp_path / "shards"
    write(
        root / "000000.tar", {"__key__": "b", "mp4": videos[0], "cls": 2}, {"__key__": "a", "mp4": videos[1], "cls": 0}
    )
    write(root / "000001.tar", {"__key__": "sub/b", "mp4": videos[2], "cls": 2, "extra.npy": np.zeros(3)})
    data = WebShards(root, 4)
    assert [row.name for row in data.rows] == ["000000/a.mp4", "000000/b.mp4", "000001/sub/b.mp4"]
    assert (known(data), data.classes) == (["0", "2", "2"], {"class": ("0", "1", "2")})
    for number, video in enumerate((videos[1], videos[0], videos[2])):
        file = tmp_path / f"{number}.mp4"
        file.write_bytes(video)
        (tmp_path / "one.txt").write_text(file.name)
        assert torch.equal(data[number]["video"], VideoList(tmp_path, "one.txt", 4)[0]["video"])
    assert torch.equal(pickle.loads(pickle.dumps(data))[1]["video"], data[1]["video"])
    windows = WebShards(root, 4, shuffle_window=1, cache=str(tmp_path / "cache"), cache_fetch="shard")
    assert torch.equal(windows[2]["video"], data[2]["video"])
    batches = list(windows.train_batches(1, seed=0))
    assert sorted(index for [(_, index)] in batches) == [0, 1, 2]
    named = WebShards(root, 4, classes={"class": ["x", "y", "z"]})
    assert known(named) == ["x", "z", "z"]
    with pytest.raises(ValueError, match=r"000000.tar \(b\) has the class '2' of class.*classes.class"):
        WebShards(root, 4, classes={"class": ["x", "y"]})


def test_annotations(tmp_path: Path, videos: list[bytes]):
    root = tmp_path / "s"
    first = {"__key__": "0", "mp4": videos[0], "json": {"caption": "one", "labels": {"motion": "up", "speed": 3}}}
    second = {"__key__": "1", "avi": videos[1], "txt": "two", "json": {"labels": {"motion": "down", "speed": 1}}}
    failed = {"__key__": "2", "json": {"status": "failed"}}
    write(root / "0.tar", first, second, failed)
    data = WebShards(root, 4)
    assert [row.caption for row in data.rows] == ["one", "two"]
    assert data[1]["caption"] == "two"
    assert data.classes == {"motion": ("down", "up"), "speed": ("0", "1", "2", "3")}
    assert known(data, "motion") == ["up", "down"]
    turned = WebShards(root, 4, classes={"motion": ["up", "down"]})
    assert (known(turned, "motion"), [row.labels["motion"] for row in turned.rows]) == (["up", "down"], [0, 1])
    with pytest.raises(ValueError, match=r"0.tar \(1\) has the class 'down' of motion"):
        WebShards(root, 4, classes={"motion": ["up"]})


def test_the_index_is_built_once_and_again_for_changed_shards(
    tmp_path: Path, videos: list[bytes], cache: Path, monkeypatch: pytest.MonkeyPatch
):
    root = tmp_path / "s"
    write(root / "0.tar", {"__key__": "0", "mp4": videos[0]})
    built, build = [], web_shards.build_index
    monkeypatch.setattr(web_shards, "build_index", lambda *given: built.append(1) or build(*given))
    assert len(WebShards(root, 4)) == len(WebShards(root, 4)) == 1
    assert (len(built), len(list(cache.rglob("*.safetensors")))) == (1, 1)
    write(root / "0.tar", {"__key__": "0", "mp4": videos[0]}, {"__key__": "1", "mp4": videos[1]})
    assert len(WebShards(root, 4, index=str(tmp_path / "own"))) == 2
    assert len(list((tmp_path / "own").glob("*.safetensors"))) == 1
    data = WebShards(root, 4)
    write(root / "0.tar", {"__key__": "7", "mp4": videos[1]}, {"__key__": "8", "mp4": videos[1]})
    with pytest.raises(RuntimeError, match=r"0.tar.*start the command again"):
        data[1]


def test_patterns_and_remote_shards(tmp_path: Path, videos: list[bytes]):
    for number in range(3):
        write(tmp_path / "s" / f"x-{number:03d}.tar", {"__key__": f"{number}", "mp4": videos[number], "cls": number})
    assert len(WebShards(f"{tmp_path}/s/x-{{000..001}}.tar", 4)) == 2
    assert len(WebShards(f"{tmp_path}/s/x-*.tar", 4)) == 3
    with pytest.raises(FileNotFoundError, match=r"x-003.tar.*1 more of the 5 shards"):
        WebShards(f"{tmp_path}/s/x-{{000..004}}.tar", 4)
    with pytest.raises(FileNotFoundError, match=r"no tar file"):
        WebShards(tmp_path, 4)
    with pytest.raises(ValueError, match=r"pattern in its folder"):
        WebShards(f"{tmp_path}/{{s,t}}/x.tar", 4)
    memory = fsspec.filesystem("memory")
    for file in (tmp_path / "s").glob("*.tar"):
        memory.pipe_file(f"/web/{file.name}", file.read_bytes())
    remote = WebShards("memory://web/x-{000..002}.tar", 4)
    assert torch.equal(remote[2]["video"], WebShards(tmp_path / "s", 4)[2]["video"])
    memory.rm("/web", recursive=True)


@pytest.mark.parametrize("text", ["a{0..3}.tar", "{000000..000012}.tar", "{a,b}-{08..11}.tar", "plain.tar", "x{1,3}y"])
def test_braces_stand_for_what_webdataset_reads(text: str):
    assert expand_braces(text) == webdataset.shardlists.expand_urls(text)


def test_unbalanced_braces_raise():
    with pytest.raises(ValueError, match="unbalanced"):
        expand_braces("{0..3.tar")


def test_long_and_other_names(tmp_path: Path, videos: list[bytes]):
    root = tmp_path / "s"
    keys = ["k" * 150, "clip-é", "./plain"]
    write(root / "0.tar", *({"__key__": key, "mp4": video} for key, video in zip(keys, videos)))
    data = WebShards(root, 4)
    assert {row.name for row in data.rows} == {f"0/{'k' * 150}.mp4", "0/clip-é.mp4", "0/plain.mp4"}
    assert all(len(data[i]["video"]) == 4 for i in range(3))


def tar(path: Path, *files: tuple[str, bytes]) -> None:
    path.parent.mkdir(exist_ok=True)
    with tarfile.open(path, "w") as out:
        for name, content in files:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            out.addfile(info, io.BytesIO(content))


def test_shards_that_do_not_fit(tmp_path: Path, videos: list[bytes]):
    root, file = tmp_path / "s", tmp_path / "s" / "0.tar"
    video = videos[0]
    for files, message in (
        ([("a.mp4", video), ("a.json", b"{")], r"0.tar \(a.json\) is not valid JSON"),
        ([("a.mp4", video), ("a.webm", video)], r"two videos with the key 'a'"),
        ([("a.mp4", video), ("a.txt", b"x"), ("b.mp4", video)], r"0.tar \(b\) has no value of a caption"),
        ([("a.mp4", video), ("a.cls", b"x"), ("b.mp4", video)], r"0.tar \(b\) has no value of the label 'class'"),
        ([("a.mp4", video), ("a.json", json.dumps({"labels": {"m": [1]}}).encode())], r"\(a\) has m=\[1\]"),
        ([("a.mp4", video), ("a.cls", b"1"), ("b.mp4", video), ("b.cls", b"2")], r"class id 1 .*count from 0"),
        ([("a.txt", b"x")], r"no video in its 1 tar files"),
    ):
        tar(file, *files)
        with pytest.raises(ValueError, match=message) as caught:
            WebShards(root, 4)
        assert "\n" not in str(caught.value)
    tar(file, ("a.mp4", video), ("b.mp4", video))
    whole = file.read_bytes()
    file.write_bytes(whole[: 1024 + len(video) + 700])
    with pytest.raises(ValueError, match=r"0.tar is truncated"):
        WebShards(root, 4)
    file.write_bytes(b"no tar" * 1000)
    with pytest.raises(ValueError, match=r"0.tar is truncated or no tar file"):
        WebShards(root, 4)


def test_a_broken_video_is_skipped_and_listed(tmp_path: Path, videos: list[bytes]):
    root = tmp_path / "s"
    tar(root / "0.tar", ("a.mp4", bytes(2000)), ("b.mp4", videos[0]))
    data = WebShards(root, 4, max_broken_share=0.5, skipped_file=str(tmp_path / "skipped.csv"))
    assert data[0]["id"] == "0/b.mp4"
    assert "0/a.mp4" in (tmp_path / "skipped.csv").read_text()
