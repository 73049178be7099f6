"""Latent shards: round trip, resuming to identical bytes, damaged files and changed settings."""

import errno
import hashlib
import json
import math
import multiprocessing
import re
import signal
import time
from pathlib import Path

import pytest
import torch
from torch.utils.data import DataLoader

from blueberry_video.atomic import write_text
from blueberry_video.data import latents
from blueberry_video.data.latents import LatentClips, LatentShards
from blueberry_video.data.sprites import Sprites
from blueberry_video.models.autoencoder.causal_vae import CausalVideoVAE
from blueberry_video.precompute import write_latents

MADE_OF = {"autoencoder": "Pixels/0123", "text": None, "data": "numbers", "dtype": "float32"}


def clip(index: int) -> dict:
    rng = torch.Generator().manual_seed(index)
    moments = torch.randn(4, 2, 3, 3 + index % 2, generator=rng)
    moments[2:] = -torch.inf  # log-variances of a deterministic autoencoder
    return {
        "moments": moments,
        "text_tokens": torch.randn(5, 6, generator=rng).bfloat16(),
        "text_mask": torch.arange(5) < 3,
        "id": f"clip {index}",
        "caption": f"“{index}”",
        "labels": {"motion": index % 2},
        "fps": 8.5,
    }


def write(folder: Path, size: int = 10, numbers: list[int] | None = None, **changes) -> list[int]:
    """Writes the missing shards, or only those in ``numbers``; returns all that were missing."""
    pairs = {"motion": [(0, 1)]}
    with LatentShards(folder, {**MADE_OF, **changes}, size, 4, {"motion": ("left", "right")}, pairs) as shards:
        for number in shards.missing:
            if numbers is None or number in numbers:
                shards.write(number, [clip(i) for i in shards.indices(number)])
        return shards.missing


def contents(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in folder.iterdir() if file.name != ".lock"}


def test_round_trip(tmp_path: Path):
    write(tmp_path)
    clips = LatentClips(tmp_path)
    assert len(clips) == 10
    assert clips.classes == {"motion": ("left", "right")}
    assert clips.reversal_pairs == {"motion": ((0, 1),)}
    assert clips.made_of["autoencoder"] == "Pixels/0123"
    assert clips.shapes == [(4, 2, 3, 3 + i % 2) for i in range(10)]
    assert list(clips.captions()) == [f"“{i}”" for i in range(10)]
    for i in reversed(range(10)):
        read, written = clips[i], clip(i)
        assert read.keys() == written.keys()
        for key, value in written.items():
            if isinstance(value, torch.Tensor):
                assert read[key].dtype == value.dtype
                assert torch.equal(read[key], value)
            else:
                assert read[key] == value
    with pytest.raises(IndexError):
        clips[10]
    loader = DataLoader(clips, batch_size=None, num_workers=1)
    assert [item["id"] for item in loader] == [f"clip {i}" for i in range(10)]


def test_folders_with_the_former_name_of_the_autoencoder_are_read_and_continued(tmp_path: Path):
    write(tmp_path, numbers=[0])
    manifest = tmp_path / "manifest.json"
    manifest.write_text(manifest.read_text().replace('"autoencoder"', '"codec"'))
    assert write(tmp_path) == [1, 2]
    manifest.write_text(manifest.read_text().replace('"autoencoder"', '"codec"'))
    assert LatentClips(tmp_path).made_of["autoencoder"] == "Pixels/0123"


def test_interrupted_writing_resumes_to_the_same_bytes(tmp_path: Path):
    write(tmp_path / "whole")
    assert write(tmp_path / "parts", numbers=[1]) == [0, 1, 2]
    with pytest.raises(ValueError, match=r"\b1 of 3 shards.*`make latents EXP=…`"):
        LatentClips(tmp_path / "parts")
    (tmp_path / "parts" / "00002.safetensors.77.tmp").write_bytes(b"half of a sh")
    (tmp_path / "parts" / "00002.safetensors").write_bytes(b"complete, but not in the manifest")
    assert write(tmp_path / "parts") == [0, 2]
    assert contents(tmp_path / "parts") == contents(tmp_path / "whole")
    assert write(tmp_path / "parts") == []
    damaged = tmp_path / "parts" / "00001.safetensors"
    damaged.write_bytes(damaged.read_bytes()[:-1] + b"?")  # same length
    assert write(tmp_path / "parts") == [1]
    assert contents(tmp_path / "parts") == contents(tmp_path / "whole")


def test_shards_are_complete_before_the_manifest_lists_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    listed = []

    def checked(path: Path, text: str) -> None:
        shards = json.loads(text)["shards"]
        for name, shard in shards.items():
            assert hashlib.sha256((tmp_path / name).read_bytes()).hexdigest() == shard["sha256"]
        listed.append(len(shards))
        write_text(path, text)

    monkeypatch.setattr(latents, "write_text", checked)
    write(tmp_path)
    assert listed == [0, 1, 2, 3]


def test_a_shard_that_cannot_be_written_is_not_listed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def full(path: Path, data: bytes) -> None:
        raise OSError(errno.ENOSPC, "no space left on device")

    write(tmp_path, numbers=[0])
    with monkeypatch.context() as patch:
        patch.setattr(latents, "write_bytes", full)
        with pytest.raises(OSError, match="no space left"):
            write(tmp_path)
    assert list(json.loads((tmp_path / "manifest.json").read_text())["shards"]) == ["00000.safetensors"]
    assert write(tmp_path) == [1, 2]  # the lock is free again
    assert len(LatentClips(tmp_path)) == 10


def test_changed_settings_raise_and_change_nothing(tmp_path: Path):
    write(tmp_path)
    before = contents(tmp_path)
    with pytest.raises(ValueError, match=r"autoencoder was Pixels/0123 and is VAE/9\b.*OUT=…"):
        write(tmp_path, autoencoder="VAE/9")
    with pytest.raises(ValueError, match=r"\bsize was 10 and is 11\b"):
        write(tmp_path, size=11)
    assert contents(tmp_path) == before
    (tmp_path / "manifest.json").write_text(json.dumps({"format": 9}))
    with pytest.raises(ValueError, match=r"format=9\b.*\b1\b"):
        write(tmp_path)
    (tmp_path / "manifest.json").write_text(json.dumps({"format": 1, "shards": {}}))
    with pytest.raises(ValueError, match=r"manifest\.json .*\bclasses, made_of, reversal_pairs\b"):
        LatentClips(tmp_path)


@pytest.mark.parametrize("damage", ["torn", "flipped", "gone"])
def test_damaged_shard_raises_and_is_rewritten_after_removal(tmp_path: Path, damage: str):
    write(tmp_path)
    before, shard = contents(tmp_path), tmp_path / "00001.safetensors"
    whole = shard.read_bytes()
    if damage == "gone":
        shard.unlink()
    else:
        shard.write_bytes(whole[:-9] if damage == "torn" else whole[:-1] + bytes([whole[-1] ^ 1]))
    clips = LatentClips(tmp_path)
    assert clips[0]["id"] == "clip 0"
    with pytest.raises(ValueError, match=r"00001\.safetensors\b.*SHA-256.*`make latents EXP=…`"):
        clips[5]
    shard.unlink(missing_ok=True)
    assert write(tmp_path) == [1]
    assert contents(tmp_path) == before


@pytest.mark.parametrize(
    ("key", "channel", "value"),
    [("moments", 0, math.nan), ("moments", 0, math.inf), ("moments", 3, math.nan), ("text_tokens", 0, math.nan)],
)
def test_nan_and_infinite_latents_raise(tmp_path: Path, key: str, channel: int, value: float):
    clips = [clip(i) for i in range(4)]
    clips[2][key][channel].view(-1)[0] = value
    with LatentShards(tmp_path, MADE_OF, 4, 4) as shards, pytest.raises(ValueError, match=f"{key} .*'clip 2'"):
        shards.write(0, clips)
    assert set(contents(tmp_path)) == {"manifest.json"}


def test_second_writer_raises(tmp_path: Path):
    with (
        LatentShards(tmp_path, MADE_OF, 4),
        pytest.raises(ValueError, match=rf"another process.*{re.escape(str(tmp_path))}"),
    ):
        write(tmp_path)
    assert write(tmp_path / "after", size=4) == [0]


def test_missing_folder_raises(tmp_path: Path):
    with pytest.raises(FileNotFoundError, match=r"nowhere/manifest\.json\b.*`make latents EXP=…`"):
        LatentClips(tmp_path / "nowhere")


class Slow(Sprites):
    """Slow dataset, so that the process is killed while it encodes."""

    def __getitem__(self, index: int) -> dict:
        time.sleep(0.05)
        return super().__getitem__(index)


def encode_sprites(folder: Path, sprites: type[Sprites] = Sprites) -> None:
    torch.manual_seed(0)
    autoencoder = CausalVideoVAE(4, (8, 8), patch_size=4, time_stride=2).eval()
    write_latents(sprites("train", 12, num_frames=5, image_size=16), autoencoder, None, folder, shard_size=2)


def test_shards_are_identical_after_sigkill_and_restart(tmp_path: Path):
    process = multiprocessing.get_context("fork").Process(target=encode_sprites, args=(tmp_path / "killed", Slow))
    process.start()
    deadline = time.monotonic() + 60
    while not (tmp_path / "killed" / "00001.safetensors").exists() and time.monotonic() < deadline:
        time.sleep(0.01)
    process.kill()
    process.join(timeout=60)
    assert process.exitcode == -signal.SIGKILL
    left = contents(tmp_path / "killed")
    assert "00001.safetensors" in left
    assert "00005.safetensors" not in left
    encode_sprites(tmp_path / "killed")
    encode_sprites(tmp_path / "whole")
    assert contents(tmp_path / "killed") == contents(tmp_path / "whole")
    assert len(LatentClips(tmp_path / "killed")) == 12
