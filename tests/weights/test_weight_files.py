"""Reading weight files: errors, safety and the number of blocks."""

import re

import pytest
import torch
from safetensors.torch import save_file

from blueberry_video.weights import files as weight_files
from blueberry_video.weights.diffusers_folder import read_source


def test_files_without_weights_raise(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"none\.pth"):
        weight_files.read_weights(tmp_path / "none.pth")
    for content in (b"", b"no weights at all", b"PK\x03\x04 a truncated archive"):
        for name in ("broken.pth", "broken.safetensors"):
            (tmp_path / name).write_bytes(content)
            with pytest.raises(ValueError, match=re.escape(name)):
                weight_files.read_weights(tmp_path / name)
    torch.save({"epoch": 3, "model": {}}, tmp_path / "empty.pth")
    with pytest.raises(ValueError, match=r"(?s)empty\.pth.*'model'.*'module'.*'state_dict'"):
        weight_files.read_weights(tmp_path / "empty.pth")


@pytest.mark.parametrize("suffix", [".pth", ".safetensors", ".ckpt", ".bin"])
@pytest.mark.parametrize(
    ("content", "cause"),
    [
        (b"", r"empty \(0 bytes\)"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:ab\nsize 9\n", "`git lfs pull`"),
        (b"\n<!DOCTYPE html><html><head></head></html>", "HTML"),
        (b"<html>" + b" " * 2000, "HTML"),
        (b'{"error": "Repository not found"}', "JSON"),
        (bytes(4096), "zeros"),
        (b"no weights at all", "damaged"),
    ],
)
def test_files_that_are_no_weights_are_told_apart_from_damage(tmp_path, suffix: str, content: bytes, cause: str):
    file = tmp_path / f"weights{suffix}"
    file.write_bytes(content)
    for read in (weight_files.read_weights, weight_files.read_checkpoint):
        with pytest.raises(ValueError, match=rf"weights\{suffix} cannot be read: .*{cause}"):
            read(file)


@pytest.mark.parametrize("prefix", ["_orig_mod.", "module._orig_mod.", "model._orig_mod.", "_orig_mod.module."])
def test_names_of_compiled_models_load(tmp_path, prefix: str):
    torch.save({"model": {f"{prefix}blocks.0._orig_mod.weight": torch.ones(2)}}, tmp_path / "compiled.pth")
    assert list(weight_files.read_weights(tmp_path / "compiled.pth")) == ["blocks.0.weight"]


def test_checkpoint_of_a_compiled_task_loads(tmp_path):
    state = {"model._orig_mod.head.weight": torch.ones(2), "_orig_mod.model.norm.weight": torch.ones(2)}
    torch.save({"state_dict": state}, tmp_path / "compiled.ckpt")
    assert sorted(weight_files.read_checkpoint(tmp_path / "compiled.ckpt")) == ["head.weight", "norm.weight"]


class Planted:
    """Object that calls ``print`` when it is unpickled, as a malicious file would run code."""

    def __reduce__(self):
        return print, ("not printed",)


def test_file_that_would_run_code_raises(tmp_path, capsys):
    torch.save({"model": {"a": torch.ones(1)}, "args": Planted()}, tmp_path / "planted.pth")
    with pytest.raises(ValueError, match=r"(?s)planted\.pth.*code"):
        weight_files.read_weights(tmp_path / "planted.pth")
    assert not capsys.readouterr().out


def test_num_blocks_is_the_last_index_plus_one():
    state = {f"blocks.{index}.weight": torch.ones(1) for index in range(11)} | {"blocks_of_another.40.w": torch.ones(1)}
    assert weight_files.num_blocks(state, "blocks") == 11
    assert weight_files.num_blocks(state, "decoder") == 0


@pytest.mark.parametrize("stem", ["model", "diffusion_pytorch_model"])
def test_source_is_a_file_or_a_folder_with_a_config(stem, tmp_path):
    file = tmp_path / f"{stem}.safetensors"
    save_file({"model.weight": torch.ones(2)}, file)
    with pytest.raises(FileNotFoundError, match=r"config\.json"):
        read_source(tmp_path)
    (tmp_path / "config.json").write_text('{"num_frames": 8}')
    for source in (file, tmp_path):
        config, state = read_source(source)
        assert config == {"num_frames": 8}
        assert torch.equal(state.pop("weight"), torch.ones(2))
        assert not state
