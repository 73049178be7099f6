"""Reading files of weights."""

import pytest
import torch

from blueberry_video.weights import files as weight_files


def test_files_that_are_no_weights_are_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"none\.pth"):
        weight_files.read_weights(tmp_path / "none.pth")
    for content in (b"", b"no weights at all", b"PK\x03\x04 a truncated archive"):
        for name in ("broken.pth", "broken.safetensors"):
            (tmp_path / name).write_bytes(content)
            with pytest.raises(ValueError, match=rf"{name} cannot be read: it is damaged"):
                weight_files.read_weights(tmp_path / name)
    torch.save({"epoch": 3, "model": {}}, tmp_path / "empty.pth")
    with pytest.raises(ValueError, match=r"empty\.pth holds no state dict"):
        weight_files.read_weights(tmp_path / "empty.pth")


class Planted:
    """Reading it back calls ``print``: stands for a file that runs code."""

    def __reduce__(self):
        return print, ("this must never be printed",)


def test_a_file_that_would_run_code_is_refused(tmp_path, capsys):
    torch.save({"model": {"a": torch.ones(1)}, "args": Planted()}, tmp_path / "planted.pth")
    with pytest.raises(ValueError, match="would have to run code"):
        weight_files.read_weights(tmp_path / "planted.pth")
    assert not capsys.readouterr().out


def test_blocks_are_counted_by_the_last_of_them():
    state = {f"blocks.{index}.weight": torch.ones(1) for index in range(11)} | {"blocks_of_another.40.w": torch.ones(1)}
    assert weight_files.num_blocks(state, "blocks") == 11
    assert weight_files.num_blocks(state, "decoder") == 0
