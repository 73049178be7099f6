"""Advice of messages for choices of groups and deletions: it names the key, and the suggested override is accepted."""

import re
from pathlib import Path

import pytest
from omegaconf import OmegaConf

from blueberry_video.config import compose, load

EXPERIMENTS = Path(__file__).resolve().parents[1] / "experiments"


def advice(experiment: str, overrides: list[str], line: str) -> str:
    """Message for the override ``line`` among others."""
    with pytest.raises(ValueError, match=re.escape(f"`{line}`")) as caught:
        compose(EXPERIMENTS / experiment / "config.yaml", [*overrides, line])
    return str(caught.value)


@pytest.mark.parametrize(
    ("experiment", "line", "key", "fix"),
    [
        # a choice of a group that does not exist, for a section or a value of the config
        ("template", "task/masking=tube", "task.masking", "task.masking.ratio=0.9"),
        ("template", "+task/masking=tube", "task.masking", "task.masking.ratio=0.9"),
        ("template", "masking=tube", "task.masking", "task.masking.ratio=0.9"),
        ("template", "task/num_pictures=3", "task.num_pictures", "task.num_pictures=6"),
        ("videomae", "model/encoder=vit/tiny", "model/encoder", "model@model.encoder=vit/tiny"),
        ("videomae", "model/encoder=nonsense", "model/encoder", "model@model.encoder=vit/tiny"),
        # a choice of a group that the config has for a different task
        ("cogvideox", "task/masking=tube", "task.masking", "task/sampler=ddim"),
        ("cogvideox", "task/perceptual=lpips", "task.perceptual", "task/guidance=constant"),
        # deletions of keys that are required
        ("template", "~model.encoder", "model.encoder", "model@model.encoder=vit/tiny"),
        ("template", "~model@model.encoder", "model.encoder", "model@model.encoder=vit/tiny"),
        ("template", "model.encoder=null", "model.encoder", "model@model.encoder=vit/tiny"),
        ("template", "~model", "model", "model=videomae/tiny"),
        ("template", "~data.train", "data.train", "data.train.size=512"),
        ("template", "~task.masking", "task.masking", "task.masking.ratio=0.9"),
        ("template", "~name", "name", "name=template"),
        ("template", "~model.encoder._target_", "model.encoder._target_", "models.vit.VisionTransformer"),
        ("cogvideox", "~model.transformer", "model.transformer", "model/cogvideox@model.transformer=tiny"),
        ("cogvideox", "~task.sampler", "task.sampler", "task/sampler=ddim"),
        ("cogvideox", "~task/sampler", "task.sampler", "task/sampler=ddim"),
    ],
)
def test_suggested_override_is_accepted(experiment: str, line: str, key: str, fix: str):
    message = advice(experiment, [], line)
    assert f"`{key}`" in message
    [suggested] = [word for word in re.findall(r"`([^`]+)`", message) if word.endswith(fix)]
    compose(EXPERIMENTS / experiment / "config.yaml", [suggested])


@pytest.mark.parametrize("line", ["task/guidance=constant", "task/sampler=ddim", "task/sampler=nonsense"])
def test_group_of_a_different_task_is_to_be_left_out(line: str):
    key = line.partition("=")[0].replace("/", ".")
    assert re.search(rf"`{key}` .*MaskedPixels.*leave it out", advice("template", [], line))


@pytest.mark.parametrize(
    ("line", "argument"),
    [("task=guidance/constant", "model"), ("logger._target_=lightning.pytorch.loggers.CSVLogger", "run")],
)
def test_class_without_the_arguments_that_training_passes_raises(line: str, argument: str):
    root = re.split(r"[.=]", line)[0]
    with pytest.raises(ValueError, match=rf"`{root}\._target_` = .*`{argument}`.*conf/{root}/"):
        compose(EXPERIMENTS / "template" / "config.yaml", [line, "allow_targets=[lightning.pytorch.loggers]"])


def test_group_is_added_where_the_task_has_its_key():
    experiment, line = EXPERIMENTS / "hydra_tokenizer" / "config.yaml", "task/frechet=random"
    message = advice("hydra_tokenizer", [], line)
    assert f"`+{line}`" in message
    compose(experiment, [f"+{line}"])


def test_the_deletion_that_fails_is_named_among_valid_ones():
    message = advice("template", ["~optimizer.betas", "seed=3"], "~model.encoder")
    assert "~optimizer" not in message


def test_deletion_in_a_saved_config_raises(tmp_path: Path):
    saved = tmp_path / "config.yaml"
    saved.write_text(OmegaConf.to_yaml(compose(EXPERIMENTS / "template" / "config.yaml")))
    with pytest.raises(ValueError, match=r"`~model\.encoder`.*`model\.encoder\.\w+=\d+`"):
        load(saved, ["~model.encoder"])


def test_override_of_a_required_value_is_not_named_for_a_different_error():
    overrides = ["data=video_folder", "~data.train.size", "~data.val.size", "data.train.root=/videos"]
    message = advice("template", overrides, "data.train.pad=true")
    assert "`+data.train.pad=true`" in message


@pytest.mark.parametrize("plus", ["", "+", "++"])
@pytest.mark.parametrize("key", ["size", "sizee"])
def test_a_key_of_a_reference_is_set_in_its_source(plus: str, key: str):
    line = f"{plus}data.train.parts.image.dataset.{key}=48"
    file = EXPERIMENTS / "omnimae" / "config.yaml"
    with pytest.raises(ValueError, match=rf"data\.train\.parts\.image\.dataset\.{key}=48") as caught:
        compose(file, [line])
    assert "`data.train.parts.clip.size=48`" in str(caught.value)
    changed = compose(file, ["data.train.parts.clip.size=48"]).data.train.parts
    assert changed.image.dataset.size == changed.clip.size == 48
