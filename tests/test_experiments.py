"""Every experiment composes, builds on the meta device, and has the expected files, name and README sections."""

import re
from pathlib import Path

import pytest
import torch
from hydra.utils import instantiate
from omegaconf import OmegaConf

from blueberry_video.config import compose, load
from blueberry_video.evaluation.depth_metrics import aligned_depth, depth_accuracy
from blueberry_video.inference.depth import IMAGENET_MEAN, IMAGENET_STD

FOLDER = Path(__file__).resolve().parents[1] / "experiments"
CONFIGS = sorted(FOLDER.glob("*/config.yaml"))
SECTIONS = ("question", "command", "expected", "result")
MAX_DIFFERENCES = 30
RULES = "The rules for files of experiments/ and conf/ are in CONTRIBUTING.md, section Experiments."

shipped = pytest.mark.parametrize("file", CONFIGS, ids=lambda file: file.parent.name)


@shipped
def test_composes_to_itself_and_builds_on_the_meta_device(file: Path, tmp_path: Path):
    config = compose(file)
    assert config.name == file.parent.name
    saved = tmp_path / "config.yaml"
    saved.write_text(OmegaConf.to_yaml(config))
    assert load(saved) == config
    assert load(saved, ["seed=7"]).seed == 7
    with torch.device("meta"):
        model = instantiate(config.model)
        optimization = instantiate(config.task.optimization)(
            optimizer=instantiate(config.optimizer), schedule=instantiate(config.schedule)
        )
        task = instantiate(config.task, _partial_=True)(model=model, optimization=optimization)
    assert task.model is model
    for callback in filter(None, config.callbacks.values()):
        instantiate(callback)


@shipped
def test_has_a_run_command(file: Path):
    assert re.match(rf"# run: (make [\w-]+ EXP=|blueberry [\w-]+ ){file.parent.name}\b", file.read_text()), RULES


@shipped
def test_readme_has_every_section(file: Path):
    readme = (file.parent / "README.md").read_text().lower()
    assert [section for section in SECTIONS if not re.search(rf"^(#+ |\*\*){section}", readme, re.MULTILINE)] == [], (
        RULES
    )


@shipped
def test_config_contains_differences_only(file: Path):
    lines = [line for line in file.read_text().splitlines() if line.strip() and not line.lstrip().startswith("#")]
    assert len(lines) <= MAX_DIFFERENCES, RULES


WEIGHTS = sorted(FOLDER.glob("*/weights.safetensors"))


@pytest.mark.parametrize(
    "file", [file for file in WEIGHTS if "tokenizer" in file.parent.name], ids=lambda file: file.parent.name
)
def test_committed_weights_are_those_of_a_tokenizer_as_good_as_expected(file: Path):
    config = compose(file.with_name("config.yaml"))
    tokenizer = instantiate(config.model, weights=file).eval()
    source = config.data.val.get("dataset", config.data.val)  # without the cache
    clips = [instantiate(source)[index] for index in range(24)]
    video = torch.stack([clip["video"] for clip in clips]).transpose(1, 2) / 127.5 - 1
    errors = (tokenizer.decode_ids(tokenizer.encode_ids(video)) - video).square().flatten(1).mean(1)
    assert (10 * (4 / errors).log10()).mean() > config.expected["val/psnr"].at_least


@pytest.mark.parametrize(
    "file", [file for file in WEIGHTS if "depth" in file.parent.name], ids=lambda file: file.parent.name
)
def test_committed_weights_are_those_of_a_model_of_depth_as_good_as_expected(file: Path):
    config = compose(file.with_name("config.yaml"))
    model = instantiate(config.model).eval()
    model.load_published(file)
    noisy = instantiate(config.data.val)
    noisy.dataset = noisy.dataset.dataset  # without the cache
    clips = [noisy[index] for index in range(24)]
    mean, std = (torch.tensor(each).view(3, 1, 1) for each in (IMAGENET_MEAN, IMAGENET_STD))
    images = (torch.cat([clip["video"] for clip in clips]) / 255 - mean) / std
    depth = torch.cat([clip["depth"] for clip in clips])[:, None]
    with torch.no_grad():
        found = aligned_depth(model(images)[:, None], depth)
        constant = aligned_depth(torch.ones_like(depth), depth)
    error, trivial = (depth_accuracy(each, depth).abs_rel.mean() for each in (found, constant))
    assert error < config.expected["val/abs_rel"].at_most
    assert trivial > 3 * error
