"""Command line: parsing, and error messages without tracebacks."""

import errno
import os
import re
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch
from hydra.utils import instantiate
from lightning import Trainer
from torch.utils.data import DataLoader

from blueberry_video.data.sprites import Sprites
from blueberry_video.launch.command_line import Command, parse, quiet_libraries
from blueberry_video.launch.errors import OneParagraphErrors, paragraph


def test_experiment_with_overrides():
    command = parse(["--config-dir", "experiments/x", "seed=1", "--args", "name='two words' +a.b=[1,2]", "~c"])
    assert command == Command(
        Path("experiments/x/config.yaml"), False, ["seed=1", "~c", "name=two words", "+a.b=[1,2]"], False
    )


def test_config_of_a_run():
    command = parse(["outputs/x/run/config.yaml", "seed=1"])
    assert command == Command(Path("outputs/x/run/config.yaml"), True, ["seed=1"], False)


def experiment_in(folder: Path) -> Path:
    file = folder / "x" / "config.yaml"
    file.parent.mkdir()
    file.write_text(
        "defaults: [train, override model: videomae/tiny, override task: masked_pixels, override data: sprites,"
        " _self_]\nname: x\n"
    )
    return file


def test_every_point_of_a_sweep_is_checked(tmp_path: Path):
    arguments = ["--config-dir", str(experiment_in(tmp_path).parent), "--multirun", "seed=1,2"]
    points = parse(arguments).points()
    assert [(words, config.seed) for words, config in points.configs] == [(["seed=1"], 1), (["seed=2"], 2)]
    assert (points.folder.parent, points.sweeper, points.interval) == (Path("outputs/x/sweeps"), "basic", "")
    mine = parse([*arguments, "hydra.sweep.dir=mine", "hydra/launcher=basic", "schedule=glob(warmup*)"]).points()
    assert mine.folder == Path("mine")
    assert mine.configs[0][0][0] == "seed=1", "single runs have no settings of Hydra"
    assert not any("hydra" in word for words, _ in mine.configs for word in words)
    chosen = parse([*arguments, "optimizer.lr=interval(1e-4,1e-3)"]).points()
    assert chosen.interval == "optimizer.lr=interval(1e-4,1e-3)"
    with pytest.raises(ValueError, match=r"`resume=last`.*RESUME="):
        parse([*arguments, "resume=last"]).points()
    with pytest.raises(ValueError, match=r"`schedule=glob\(x\*\)`.*warmup_cosine"):
        parse([*arguments, "schedule=glob(x*)"]).points()
    for word in ("cluster=slurm", "cluster.hours=2"):
        with pytest.raises(ValueError, match=rf"`{word}`.*CLUSTER="):
            parse([*arguments, word]).points()
        with pytest.raises(ValueError, match=rf"`{word}`.*CLUSTER="):
            parse(["--config-dir", "x", word]).config()
    with pytest.raises(ValueError, match="num_heads=4"):  # the second job is invalid
        parse([*arguments, "model.encoder.num_heads=3,5"]).points()


def test_words_of_a_sweep_for_hydra():
    words = parse(["--config-dir", "x", "--multirun", "+hydra/launcher=basic", "seed=1,2"]).hydra_words(Path("a b"))
    expected = ["--multirun", "--config-dir", "x", "--config-name", "config", "+hydra/launcher=basic", "seed=1,2"]
    assert words == [*expected, "hydra.sweep.dir='a b'"]


def test_options_of_a_sweep():
    sweep = ["--config-dir", "x", "--multirun", "seed=1,2", "--retry", "failed", "--jobs=2", "--fail-fast", "--new"]
    found = parse(sweep)
    assert (found.retry, found.jobs, found.fail_fast, found.new) == ("failed", 2, True, True)
    assert not parse(["--config-dir", "x", "--multirun", "--fail-fast=false"]).fail_fast
    assert 'SWEEP="seed=1,2" RETRY=failed' in found.again(RETRY="failed")
    with pytest.raises(ValueError, match=r"--jobs 0.*at least 1"):
        parse(["--config-dir", "x", "--multirun", "--jobs", "0"])
    with pytest.raises(ValueError, match=r"--fail-fast .*sweep"):
        parse(["--config-dir", "x", "--fail-fast"])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--config-dir", "x", "--args", "name='a"], r"ARGS=`name='a`.*quote"),
        ([], r"\[\].*--config-dir"),
        (["seed=1"], r"\['seed=1'\].*--config-dir"),
        (["outputs/run/config.yaml", "--multirun"], r"'--multirun'\].*--config-dir"),
    ],
)
def test_invalid_command_line_raises(arguments: list[str], message: str):
    with pytest.raises(ValueError, match=message):
        parse(arguments)


def error_of(function) -> Exception:
    with pytest.raises(Exception) as caught:  # noqa: PT011 - the tests below check which one
        function()
    return caught.value


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT])
@pytest.mark.parametrize("file", [None, "run.json"])
def test_full_disk_has_a_paragraph(number: int, file: str | None):
    text = str(paragraph(OSError(number, os.strerror(number), file)))
    assert os.strerror(number) in text
    assert "output_dir=" in text
    assert ("run.json" in text) == (file is not None)


def test_error_of_this_package_has_a_paragraph():
    assert "split" in str(paragraph(error_of(lambda: Sprites("trian", 4))))


def test_error_of_other_code_has_none():
    assert paragraph(error_of(lambda: torch.zeros(2) @ torch.zeros(3))) is None
    assert paragraph(error_of(lambda: 1 / 0)) is None


def test_error_in_a_constructor_is_unwrapped():
    target = {"_target_": "blueberry_video.data.sprites.Sprites", "split": "trian", "size": 4}
    error = error_of(lambda: instantiate({"data": {"train": target}}))
    assert re.match(r"`data\.train` .*trian", str(paragraph(error)))
    library = error_of(
        lambda: instantiate({"model": {"_target_": "torch.nn.Linear", "in_features": -1, "out_features": 1}})
    )
    assert re.match("`model` .*RuntimeError", str(paragraph(library)))


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"precision": 17}, "`trainer` .*17"),
        ({"accelerator": "gpu"}, "`trainer` .*`trainer=cpu`"),
        ({"accelerator": "cuda"}, "`trainer` .*`trainer=cpu`"),
        ({"gradient_clip_val": 1.0, "gradient_clip_algorithm": "x"}, "`trainer` "),
    ],
)
def test_invalid_trainer_argument_has_a_paragraph(values: dict, message: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("torch.cuda.device_count", lambda: 0)
    monkeypatch.setattr("lightning.fabric.accelerators.cuda.num_cuda_devices", lambda: 0)
    trainer = instantiate({"_target_": "lightning.Trainer", "_partial_": True, "logger": False, **values})
    assert re.match(message, str(paragraph(error_of(trainer))), re.DOTALL)


def test_other_errors_of_a_trainer_have_none(tmp_path: Path):
    trainer = Trainer(accelerator="cpu", logger=False, default_root_dir=tmp_path)
    assert paragraph(error_of(lambda: trainer.fit(3))) is None


def test_warning_about_a_short_epoch_is_suppressed():
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        quiet_libraries()
        warnings.warn(
            "The number of training batches (3) is smaller than the logging interval Trainer(…)", stacklevel=1
        )
        warnings.warn("another", stacklevel=1)
    assert [str(warning.message) for warning in caught] == ["another"]


class Broken(torch.utils.data.Dataset):
    """Dataset where item 0 raises in this package's code and item 1 in the test's."""

    def __len__(self) -> int:
        return 2

    def __getitem__(self, index: int) -> int:
        return parse([]) if index == 0 else int("x")


@pytest.mark.parametrize(("index", "ours"), [(0, True), (1, False)])
def test_error_in_a_worker_of_a_data_loader_is_unwrapped(index: int, ours: bool):
    loader = DataLoader(Broken(), num_workers=1, sampler=[index])
    message = paragraph(error_of(lambda: list(loader)))
    assert (message is not None and "--config-dir" in message) == ours


def test_process_ends_with_the_paragraph_and_code_1():
    command = [sys.executable, "-m", "blueberry_video.train", "--config-dir", "experiments/nowhere"]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 1
    assert re.match("Error: .*nowhere", result.stderr.strip())
    assert "Traceback" not in result.stderr


@pytest.mark.parametrize("verbose", [False, True])
def test_only_errors_of_this_package_become_a_paragraph(verbose: bool, capsys, monkeypatch: pytest.MonkeyPatch):
    if verbose:
        monkeypatch.setenv("BLUEBERRY_TRACEBACK", "1")
    with OneParagraphErrors():
        pass
    with pytest.raises(ZeroDivisionError), OneParagraphErrors():
        _ = 1 / 0
    assert capsys.readouterr().err == ""
    with pytest.raises(ValueError if verbose else SystemExit) as ended, OneParagraphErrors():
        parse(["seed=1"])
    printed = capsys.readouterr().err
    if verbose:
        assert printed == ""
    else:
        assert ended.value.code == 1
        assert printed.startswith("\nError: the arguments ['seed=1'] contain no experiment")
        assert max(map(len, printed.splitlines())) <= 118
