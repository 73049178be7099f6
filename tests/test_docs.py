"""README and docs: snippets run, commands are parsed, and links, targets, choices, keys, files and names exist.

A fenced block that needs a GPU, a network, a cluster or minutes has a comment directly before it, such as ``<!-- not
run: needs a GPU -->``. Other Python blocks run in one namespace per page, in a folder with stand-ins for the files that
they read. A block after a paragraph that ends with a file name, ``path``:, is the content of that file.
"""

import argparse
import ast
import contextlib
import functools
import importlib
import importlib.util
import io
import json
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import lightning
import numpy as np
import pytest
import torch
import yaml
from hydra.utils import instantiate
from omegaconf import DictConfig

import blueberry_video
from blueberry_video import train
from blueberry_video.config import CONF, Config, compose, expand_sweep
from blueberry_video.config.signatures import signature
from blueberry_video.data import shards, write
from blueberry_video.data.metadata import read_metadata
from blueberry_video.launch.command_line import HYDRA
from blueberry_video.launch.new import NAME
from blueberry_video.models.depth_anything import DepthAnything
from blueberry_video.models.dinov2 import DINOv2
from blueberry_video.models.masked_autoencoder import MaskedAutoencoder
from blueberry_video.models.vit import VisionTransformer
from blueberry_video.video import command

ROOT = Path(__file__).resolve().parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
MAKEFILE = (ROOT / "Makefile").read_text()
TARGETS = set(re.findall(r"^([a-z][\w-]*):(?!=)", MAKEFILE, re.MULTILINE))
VARIABLES = set(re.findall(r"^(\w+) \?=", MAKEFILE, re.MULTILINE))
GROUPS = sorted(path.name for path in CONF.iterdir() if path.is_dir())
KEYED = [group for group in GROUPS if group not in ("debug", "logger", "video")]  # groups of which docs name keys
RUN, PRINT = ("train", "check", "gate", "sweep", "latents", "pseudo_labels"), ("help",)
PARSED = ("generate", "reconstruct", "plan", "export", "depth", "render", "predict", "evaluate", "features")
QUIET = ["logger=csv", "callbacks.progress=null", "trainer.max_steps=1", "trainer.check_val_every_n_epoch=1"]
PROGRAMS = ("apt-get", "docker", "apptainer", "pip")  # their blocks need a mark
EXPERIMENTS = sorted(path.parent.name for path in (ROOT / "experiments").glob("*/config.yaml"))
PLACEHOLDER = re.compile(r"[…<*]|\.\.\.")

page_by_page = pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)


class Block(NamedTuple):
    """Fenced block: line number, language, text, whether it is marked as not run, and the file that it defines."""

    line: int
    language: str
    text: str
    skipped: bool
    file: str | None


def blocks(page: Path) -> list[Block]:
    found, lines = [], page.read_text().split("\n")
    start = None
    for number, line in enumerate(lines):
        fence = re.match(r"( *)```(\w*)\s*$", line)
        if fence and start is None:
            start = number, fence
            # Markdown of the site: a block belongs to a list item with four spaces only
            assert len(fence[1]) % 4 == 0, f"{page.name} line {number + 1}: indent blocks of lists by 4 spaces"
        elif fence and start is not None:
            first, opening = start
            text = "\n".join(each[len(opening[1]) :] for each in lines[first + 1 : number])
            before = next((each for each in reversed(lines[:first]) if each.strip()), "")
            mark = re.fullmatch(r" *<!-- not run: \S.* -->", lines[first - 1])
            names = re.findall(r"`((?:src|conf|experiments)/[^`]+\.(?:py|yaml))`[^`]*:$", before)
            found.append(Block(first + 1, opening[2], text, mark is not None, names[-1] if names else None))
            start = None
    assert start is None, f"{page.name} line {start and start[0] + 1}: the block has no end"
    return found


def commands(text: str) -> Iterator[str]:
    """Command lines of a block, without comments, explanations after three spaces, and output after a prompt."""
    lines = [line for line in text.replace("\\\n", " ").split("\n") if line.strip()]
    if any(line.startswith("$ ") for line in lines):
        lines = [line[2:] for line in lines if line.startswith("$ ")]
    yield from filter(None, (re.split(r"\s{3,}|\s+# ", line)[0].strip() for line in lines))


class Reader:
    """A reader of a page: a folder with the files that the page defines, and the commands that it can type."""

    def __init__(self, folder: Path, page: Path):
        self.folder, self.page = folder, page
        self.names: dict = {"__name__": "__main__"}
        self.conf = CONF
        shared = [ROOT / "docs" / "your_data.md"] if "my_videos" in page.read_text() else []  # its experiment
        for block in [block for each in (*shared, page) for block in blocks(each)]:
            if block.file:
                self._write(block.file, block.text)
            elif block.language == "yaml" and (name := re.search(r"^name: (\w+)", block.text, re.MULTILINE)):
                self._write(f"experiments/{name[1]}/config.yaml", block.text)

    def _write(self, name: str, text: str) -> None:
        if name.startswith("conf/") and self.conf == CONF:
            self.conf = shutil.copytree(CONF, self.folder / "conf")
        path = self.folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text + "\n")

    def compose(self, name: str, overrides: list[str]) -> DictConfig:
        """Config of an experiment of the page or the repository; a name of the reader's choice is the template."""
        file = self.folder / "experiments" / name / "config.yaml"
        if not file.is_file():
            known = "template" if name.startswith("my_") else name
            file = ROOT / "experiments" / known / "config.yaml"
        return compose(file, overrides, self.conf)

    def type(self, line: str) -> None:
        """Checks a command line, and runs it if it is cheap."""
        words = shlex.split(line)
        while words and re.match(r"[A-Z_0-9]+=", words[0]):
            words = words[1:]
        if words[0] == "make":
            self._make(words[1:])
        elif re.search(r"(^|/)python3?$", words[0]):
            self._python(words[1:])
        elif words[0] == "blueberry":
            self._blueberry(words[1:])
        else:
            raise AssertionError(f"`{line}` cannot be run here: mark its block with <!-- not run: reason -->")

    def _make(self, words: list[str]) -> None:
        given = dict(word.split("=", 1) for word in words if re.match(r"\w+=", word))
        targets = [word for word in words if not re.match(r"\w+=", word)]
        assert set(targets) <= TARGETS, f"the Makefile has no target {set(targets) - TARGETS}"
        assert set(given) <= VARIABLES | {"PYTHON", "PYTHON3"}, f"the Makefile has no {set(given) - VARIABLES}"
        dry = subprocess.run(["make", "-n", *words], cwd=ROOT, capture_output=True, text=True, check=False)
        assert dry.returncode == 0, dry.stderr
        args = shlex.split(given.get("ARGS", ""))
        for target in targets:
            self._target(target, given, args)

    def _target(self, target: str, given: dict[str, str], args: list[str]) -> None:
        name = given.get("EXP", "")
        if target in RUN:
            words = [*args, *shlex.split(given.get("SWEEP", ""))]
            assert "," in given.get("SWEEP", ",")
            for job in expand_sweep(words, None) if target == "sweep" else [words]:
                self.compose(name, [word for word in job if not HYDRA.match(word)])
        elif target in PARSED:
            options = {
                "generate": ("OUT", "PROMPT", "PROMPTS", "IMAGE", "VIDEO"),
                "plan": ("OUT", "STATE"),
                "depth": ("OUT", "WEIGHTS"),
                "render": ("OUT",),
            }
            firsts = {"depth": given.get("VIDEO", ""), "render": given.get("CHECKPOINT", "")}
            first = (firsts | {"features": given.get("WEIGHTS", f"outputs/{name}")}).get(target, f"outputs/{name}")
            chosen = options.get(target, ("OUT", "DTYPE"))
            words = [f"--{key.lower()}={given[key]}" for key in chosen if key in given]
            videos = dict.fromkeys(("reconstruct", "predict", "features"), ("VIDEO",))
            last = (videos | {"plan": ("START", "GOAL")}).get(target, ())
            parse(f"blueberry_video.{target}", [first, *words, *args, *(given[key] for key in last)])
        elif target == "new":
            assert NAME.fullmatch(name)
        elif target == "data" and args != ["--help"]:
            write.main(args)
        elif target == "shards":
            shards.main([given["DATA"], f"--out={given['OUT']}", *args])
        elif target == "process":
            words = [given["VIDEO"], *(["--out", given["OUT"]] if "OUT" in given else []), *args]
            assert command.main([*words, *(["--model", given["MODEL"]] if "MODEL" in given else [])]) == 0
        elif target == "test":
            assert all((ROOT / word).exists() for word in args if word.startswith("tests/"))
        elif target in PRINT:
            subprocess.run(["make", target], cwd=ROOT, check=True, capture_output=True)

    def _python(self, words: list[str]) -> None:
        if words[0] == "-m":
            assert importlib.util.find_spec(words[1]), words[1]
        else:
            assert (ROOT / words[0]).is_file(), words[0]

    def _blueberry(self, words: list[str]) -> None:
        if importlib.util.find_spec("blueberry_video.cli") is None:
            return
        module, *arguments = importlib.import_module("blueberry_video.cli").translate(words) or ["blueberry_video"]
        assert importlib.util.find_spec(module)
        if module == "blueberry_video.train" and arguments[0] == "--config-dir":
            overrides = [word for word in arguments[2:] if not word.startswith(("-", "resume="))]
            for job in expand_sweep(overrides, None):
                self.compose(Path(arguments[1]).name, [word for word in job if not HYDRA.match(word)])

    def run(self, block: Block) -> None:
        """Runs or checks a block."""
        kind, text = block.language, block.text
        if block.file:
            if kind == "python":
                compile(text, block.file, "exec")
        elif kind == "python":
            with contextlib.redirect_stdout(io.StringIO()):
                exec(compile("\n" * block.line + text, str(self.page), "exec"), self.names)
        elif kind == "yaml":
            content = yaml.safe_load(text)
            if "name" in content:
                self.compose(content["name"], [])
        elif kind in ("json", "csv"):
            self._metadata(kind, text)
        elif kind in ("", "bash", "sh"):
            for line in commands(text):
                if text.startswith("$ "):
                    self._refused(line, text)
                else:
                    self.type(line)
        else:
            assert kind == "text", f"the language {kind!r} of a block is none of python, yaml, json, csv, bash, text"

    def _refused(self, line: str, text: str) -> None:
        """A command with its output, which is an error."""
        with pytest.raises(ValueError, match="depht") as error:
            self.type(line)
        assert " ".join(text.partition("Error: ")[2].split()) in " ".join(str(error.value).split())

    def _metadata(self, kind: str, text: str) -> None:
        if kind == "json" and "file_name" not in text:
            json.loads(text)
            return
        root = self.folder / "rows" / str(len(text))
        (root / "videos").mkdir(parents=True)
        for name in re.findall(r"videos/([\w.]+)", text):
            (root / "videos" / name).touch()
        (root / ("metadata.csv" if kind == "csv" else "metadata.jsonl")).write_text(text)
        rows, classes = read_metadata(root, None, None, {})
        assert rows
        assert classes


class Parsed(Exception):
    """The arguments were parsed."""


def parse(module: str, words: list[str]) -> None:
    """Parses arguments as the entry point does, and stops there."""
    original = argparse.ArgumentParser.parse_args

    def parse_args(parser, *arguments):
        try:
            original(parser, *arguments)
        except SystemExit as end:  # code 0: --help
            if end.code:
                raise
        raise Parsed

    main = importlib.import_module(module).main
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(argparse.ArgumentParser, "parse_args", parse_args)
        patch.setattr(sys, "argv", [module, *words])
        with pytest.raises(Parsed):
            main()


def write_clip(file: Path, frames: int) -> None:
    levels = (np.arange(frames)[:, None, None, None] * 5 + np.arange(64)[:, None, None]).astype(np.uint8)
    write.write_video(file, np.ascontiguousarray(np.broadcast_to(levels, (frames, 64, 96, 3))), fps=10)


@pytest.fixture
def reader(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, page: Path) -> Reader:
    """Folder with a video and tiny models under the names that the pages use; the Trainer stops after one step."""
    monkeypatch.chdir(tmp_path)
    made = Reader(tmp_path, page)
    source = tmp_path / "src" / "blueberry_video"
    if source.is_dir():
        monkeypatch.setattr(blueberry_video, "__path__", [*blueberry_video.__path__, str(source)])
        monkeypatch.setattr(blueberry_video.__spec__, "submodule_search_locations", [*blueberry_video.__path__])
        for room in ("models", "tasks"):
            package = importlib.import_module(f"blueberry_video.{room}")
            monkeypatch.setattr(package, "__path__", [*package.__path__, str(source / room)])
    write_clip(tmp_path / "clip.mp4", 40)
    monkeypatch.setattr(write.FolderWriter, "__call__", lambda self, out: None)
    quick = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "max_steps": 1}
    quick |= {"limit_val_batches": 1, "enable_model_summary": False, "accelerator": "cpu"}
    monkeypatch.setattr(lightning, "Trainer", functools.partial(_trainer, quick=quick, original=lightning.Trainer))
    return made


def _trainer(quick: dict, original: type, **options) -> lightning.Trainer:
    return original(**(options | quick))


def check_imports(text: str) -> None:
    """Checks the names that a block imports from this package."""
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("blueberry_video"):
            assert all(_is_name(f"{node.module}.{each.name}") for each in node.names), node.module


def stand_ins(reader: Reader) -> None:
    """Writes the runs and weights that the Python blocks of a page read."""
    text = "\n".join(block.text for block in blocks(reader.page) if block.language == "python")
    if "MCG-NJU/videomae-base" in text:
        encoder = VisionTransformer(image_size=32, patch_size=16, embed_dim=384, depth=1, num_heads=6)
        MaskedAutoencoder(encoder, 384, 1, 6).save_published("MCG-NJU/videomae-base")
    if "facebook/dinov2-base" in text:
        sizes = {"embed_dim": 48, "depth": 1, "num_heads": 2, "table_size": 4, "interpolate_offset": 0.0}
        DINOv2(image_size=56, **sizes).save_published("facebook/dinov2-base")
    if "outputs/video_depth" in text:
        sizes = [f"model.encoder.{value}" for value in ("interpolate_offset=0.0", "patch_size=14", "image_size=56")]
        config = reader.compose("depth_anything", sizes)
        tiny: DepthAnything = instantiate(config.model)
        tiny.save_published("outputs/video_depth")
        write_clip(Path("clip.mp4"), 2)  # a frame has at least 518 pixels in the network
        reader.names["frames"] = iter(torch.zeros(1, 3, 64, 96, dtype=torch.uint8))
    if "outputs/my_videos" in text:
        _class_folders(Path("data/my_videos"))
        train_quickly(reader, "my_videos")


def _class_folders(root: Path) -> None:
    for name in ("train/jump", "train/run", "val/jump", "val/run"):
        (root / name).mkdir(parents=True)
        for k in range(4):
            shutil.copy("clip.mp4", root / name / f"{k:04}.mp4")


def train_quickly(reader: Reader, name: str, *overrides: str) -> Path:
    """Trains an experiment for one step; returns the folder of its runs."""
    if name == "my_videos":
        overrides = (*overrides, "data.num_workers=0")
    config = reader.compose(name, [*QUIET, "callbacks.media=null", "schedule=constant", *overrides])
    config.trainer.val_check_interval = None
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(lightning, "Trainer", lightning.Trainer.keywords["original"])
        train.run(config)
    torch.use_deterministic_algorithms(False)
    return Path("outputs", config.name)


@page_by_page
def test_snippets_run_and_commands_are_valid(page: Path, reader: Reader):
    stand_ins(reader)
    for block in blocks(page):
        try:
            if not block.skipped:
                reader.run(block)
            elif block.language == "python":
                check_imports(block.text)
        except BaseException as error:
            error.add_note(f"{page.relative_to(ROOT)} line {block.line}")
            raise


@pytest.mark.parametrize("page", [ROOT / "docs" / "extending.md"], ids=["extending"])
def test_the_example_of_a_model_and_a_task_trains(page: Path, reader: Reader):
    parts = [block for block in blocks(page) if block.file]
    assert sum(len(list(filter(str.strip, block.text.split("\n")))) for block in parts) <= 60
    runs = train_quickly(reader, "frame_order", "data.train.size=16", "data.val.size=8", "data.batch_size=8")
    [run] = runs.glob("*/run.json")
    metrics = json.loads(run.read_text())["metrics"]
    assert metrics["val/accuracy_trivial"] == 0.5
    assert 0 <= metrics["val/accuracy"] <= 1


@page_by_page
def test_commands_in_the_text_are_valid(page: Path, reader: Reader):
    for code in inline(page):
        if re.match(r"(make|blueberry) [a-z]", code) and not PLACEHOLDER.search(code):
            _typed(reader, code)


def _typed(reader: Reader, code: str) -> None:
    target = code.split(" ")[1]
    if len(code.split(" ")) == 2:  # the name of a command
        assert not code.startswith("make") or target in TARGETS, code
        return
    try:
        reader.type(code)
    except BaseException as error:
        error.add_note(f"`{code}`")
        raise


def inline(page: Path) -> list[str]:
    """Code in backticks outside of fenced blocks."""
    text = re.sub(r"^ *```.*?^ *```", "", page.read_text(), flags=re.MULTILINE | re.DOTALL)
    return [" ".join(code.split()) for code in re.findall(r"(?<!`)`([^`]+)`(?!`)", text)]


def slug(heading: str) -> str:
    """Anchor of a heading, as on GitHub and on the site."""
    return re.sub(r"[^\w\- ]", "", heading.strip().lower()).replace(" ", "-")


def anchors(page: Path) -> set[str]:
    return {slug(heading) for heading in re.findall(r"^#+ (.+)$", page.read_text(), re.MULTILINE)}


LINKED = [*PAGES, *sorted((ROOT / "experiments").glob("*/README.md"))]


@pytest.mark.parametrize("page", LINKED, ids=lambda page: f"{page.parent.name}-{page.stem}")
def test_links_and_anchors_exist(page: Path):
    for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text()):
        path, _, anchor = target.partition("#")
        if re.match(r"[a-z]+:", target):
            continue
        file = (page.parent / path).resolve() if path else page
        assert file.exists(), f"{page.name}: {target}"
        if anchor:
            assert anchor in anchors(file), f"{page.name}: {target}"


@functools.cache
def known_keys() -> frozenset[str]:
    """Keys in conf/ and experiments/, and parameters of the classes that they name."""
    found: set[str] = set()
    for file in [*CONF.rglob("*.yaml"), *(ROOT / "experiments").glob("*/config.yaml")]:
        nodes = [yaml.safe_load(file.read_text())]
        while nodes:
            node = nodes.pop()
            if isinstance(node, dict):
                found |= {str(key) for key in node}
                nodes += node.values()
                if isinstance(target := node.get("_target_"), str) and target.startswith("blueberry_video"):
                    found |= set(signature(target).parameters)
            elif isinstance(node, list):
                nodes += node
    return frozenset(found | {*Config.__dataclass_fields__})


@page_by_page
def test_choices_keys_files_and_names_exist(page: Path, tmp_path: Path):
    own = Reader(tmp_path, page)
    for code in inline(page):
        if PLACEHOLDER.search(code):
            continue
        for group, choice in re.findall(rf"(?<![\w.@/])({'|'.join(GROUPS)})=([a-z][\w/.]*)", code):
            assert (own.conf / group / f"{choice}.yaml").is_file(), f"{page.name}: {group}={choice}"
        for key in re.findall(rf"(?<![\w./])(?:{'|'.join(KEYED)})((?:\.[a-z]\w*)+)(?![\w/(-]|\.\w)", code):
            parts = [part for part in key.split(".") if part]
            known = known_keys() | {"_args_", "class", "action"}
            assert code.endswith((".yaml", ".py", ".md")) or set(parts) <= known or _is_name(code), (
                f"{page.name}: {code}"
            )
        if re.fullmatch(r"(src|conf|docs|experiments|tests|benchmarks)/[\w./-]+\.\w+", code):
            assert (ROOT / code).exists() or (own.folder / code).exists(), f"{page.name}: {code}"
        if re.fullmatch(r"(blueberry_video|models|ops|tasks|evaluation|inference)(\.\w+)+", code):
            assert _is_name(code), f"{page.name}: {code}"


def _is_name(code: str) -> bool:
    """Whether a module, or a name in one, exists."""
    full = code if code.startswith("blueberry_video") else f"blueberry_video.{code}"
    parts, names = full.split("."), []
    while parts:
        try:
            found = importlib.import_module(".".join(parts))
        except ImportError:
            names.insert(0, parts.pop())
            continue
        for name in names:
            if not hasattr(found, name):
                return False
            found = getattr(found, name)
        return True
    return False


def test_readme_lists_every_experiment():
    linked = re.findall(r"\(experiments/(\w+)/README\.md\)", (ROOT / "README.md").read_text())
    assert set(EXPERIMENTS) - set(linked) == set()
