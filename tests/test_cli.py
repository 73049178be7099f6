"""Console command: translation of its arguments to those of the entry points."""

import os
import re
import shlex
import subprocess
import sys
import time
from importlib.util import find_spec
from pathlib import Path

import pytest

from blueberry_video import __version__, cli
from blueberry_video.cli import translate
from blueberry_video.launch.commands import COMMANDS


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("train x seed=1 +debug=fast", "train --config-dir experiments/x seed=1 +debug=fast"),
        ("train x --resume last a=1", "train --config-dir experiments/x a=1 resume=last"),
        ("train x a=1 --resume=2026", "train --config-dir experiments/x a=1 resume=2026"),
        ("train outputs/x/run/config.yaml a=1", "train outputs/x/run/config.yaml a=1"),
        ("train ../other/x", "train --config-dir ../other/x"),
        ("train x --args=a=1", "train --config-dir experiments/x --args=a=1"),
        ("check x a=1", "train --config-dir experiments/x a=1 check=true"),
        ("gate x", "train --config-dir experiments/x enforce_expected=true"),
        ("sweep x seed=1,2", "train --config-dir experiments/x seed=1,2 --multirun"),
        ("submit x seed=1,2 --cluster a", "submit --config-dir experiments/x seed=1,2 --cluster a"),
        ("submit x --resume last", "submit --config-dir experiments/x --resume last"),
        ("runs x", "runs x"),
        ("report x", "experiment.report outputs/x"),
        ("export x --out o --args=--merge", "export outputs/x --out o --merge"),
        ("export mine/run --out o", "export mine/run --out o"),
        ("generate x --args='a b' --out o", "generate outputs/x --out o a b"),
        ("predict x --out=o --args='--window 10' -- v.mp4", "predict outputs/x --out=o --window 10 -- v.mp4"),
        ("plan x --state=-1 --args='--horizon 2' -- a b", "plan outputs/x --state=-1 --horizon 2 -- a b"),
        ("render x --out o", "render outputs/x --out o"),
        ("latents x --out o a=1", "precompute --config-dir experiments/x --out o a=1"),
        ("pseudo-labels x --checkpoint outputs/t a=1", "pseudo_labels outputs/t --config-dir experiments/x a=1"),
        ("pseudo_labels x --checkpoint=outputs/t", "pseudo_labels outputs/t --config-dir experiments/x"),
        ("data out=o", "data.write out=o"),
        ("data --help", "data.write --help"),
        ("process v.mp4 --args fps=1", "video.command v.mp4 fps=1"),
        ("depth v.mp4 --out o", "depth v.mp4 --out o"),
        ("export --help", "export --help"),
        ("new my_idea", "launch.new my_idea"),
        ("doctor", "launch.doctor"),
    ],
)
def test_arguments_of_the_entry_point(line: str, expected: str):
    module, _, rest = expected.partition(" ")
    assert translate(shlex.split(line)) == [f"blueberry_video.{module}", *rest.split()]


def test_a_file_that_looks_like_an_option(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    Path("-x.mp4").touch()
    assert translate(["process", "-x.mp4", "--model", "m"])[1:] == ["./-x.mp4", "--model", "m"]
    assert translate(["depth", "-x.mp4", "--out=o"])[1:] == ["./-x.mp4", "--out=o"]


def test_run_folder_as_the_first_argument(tmp_path: Path):
    (tmp_path / "run.json").touch()
    assert translate(["train", str(tmp_path), "seed=1"])[1:] == [f"{tmp_path}/config.yaml", "seed=1"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["trian", "x"], r"'trian'.*`blueberry train`"),
        (["zzz"], r"'zzz'.*train.*doctor"),
        (["train"], r"`blueberry train` .*EXPERIMENT"),
        (["train", "seed=1"], r"`blueberry train` .*`seed=1`"),
        (["train", "--resume", "last"], r"`blueberry train` .*`--resume`"),
        (["report"], r"`blueberry report` "),
        (["pseudo-labels", "x"], r"--checkpoint .*pseudo-labels x --checkpoint"),
        (["data", "--args=out='a"], r"ARGS=`out='a`"),
    ],
)
def test_invalid_arguments_raise(words: list[str], message: str):
    with pytest.raises(ValueError, match=message):
        translate(words)


def test_missing_experiment_lists_those_of_the_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match="`blueberry new my_idea`"):
        translate(["train"])
    (tmp_path / "experiments" / "mine").mkdir(parents=True)
    (tmp_path / "experiments" / "mine" / "config.yaml").touch()
    with pytest.raises(ValueError, match=r": mine\."):
        translate(["train"])


def test_help(capsys: pytest.CaptureFixture):
    assert translate([]) is None
    listed = re.findall(r"^  (\S+)  ", capsys.readouterr().out, re.MULTILINE)
    assert listed == list(COMMANDS)
    assert translate(["--version"]) is None
    assert __version__ in capsys.readouterr().out
    for words in (["sweep", "-h"], ["train", "x", "--help"], ["doctor", "--help"], ["new", "--help"]):
        assert translate(words) is None
        assert f"usage: blueberry {words[0]} " in capsys.readouterr().out


def test_modules_of_the_commands_exist():
    assert all(find_spec(f"blueberry_video.{command.module}") for command in COMMANDS.values())


def test_process_is_replaced(monkeypatch: pytest.MonkeyPatch):
    called = []
    monkeypatch.setattr(cli.os, "execv", lambda *arguments: called.append(arguments))
    monkeypatch.setattr("sys.argv", ["blueberry", "doctor"])
    cli.main()
    assert called == [(sys.executable, [sys.executable, "-m", "blueberry_video.launch.doctor"])]


def test_help_imports_no_library():
    code = "import sys; from blueberry_video.cli import main; sys.argv[1:] = ['--help']; main(); print(*sys.modules)"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    modules = {name.partition(".")[0] for name in result.stdout.splitlines()[-1].split()}
    assert modules & {"torch", "numpy", "omegaconf", "hydra", "yaml", "lightning"} == set()
    times = []
    for _ in range(3):
        start = time.perf_counter()
        subprocess.run([sys.executable, "-m", "blueberry_video.cli", "--help"], capture_output=True, check=True)
        times.append(time.perf_counter() - start)
    assert min(times) < 2  # 0.1 s on an idle machine


def test_exit_code_and_paragraph(tmp_path: Path):
    command = [sys.executable, "-m", "blueberry_video.cli", "trian"]
    result = subprocess.run(command, cwd=tmp_path, env=dict(os.environ), capture_output=True, text=True, check=False)
    assert result.returncode == 1
    assert result.stderr.strip().startswith("Error: `blueberry trian`")
    assert "Traceback" not in result.stderr
