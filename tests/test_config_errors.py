"""A wrong config is refused within seconds, in one paragraph: the key, its value and the nearest right one."""

import functools
import importlib
import inspect
import os
import random
import resource
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from omegaconf import DictConfig, OmegaConf

from blueberry_video.config import check, compose, expand_sweep, load
from blueberry_video.config.signatures import signature

ROOT = Path(__file__).resolve().parents[1]
EXPERIMENTS = sorted(ROOT.glob("experiments/*/config.yaml"))
DEFAULTS = (
    "defaults: [train, override model: videomae/tiny, override task: masked_pixels, override data: sprites, _self_]"
)
HYDRA_SPEAK = (
    "struct",
    "Traceback",
    "hydra.errors",
    "ConfigComposition",
    "full_key",
    "object_type",
    "HYDRA_FULL_ERROR",
)
MAX_SECONDS = 3.0


@pytest.fixture
def experiment(tmp_path: Path) -> Path:
    return written(tmp_path, "name: test")


def written(folder: Path, values: str, defaults: str = DEFAULTS) -> Path:
    """An experiment with these values."""
    file = folder / "test" / "config.yaml"
    file.parent.mkdir(exist_ok=True)
    file.write_text(f"# run: nothing, a test\n{defaults}\n{values}\n")
    return file


def refusal(file: Path, *overrides: str) -> str:
    """What is said about a wrong config: one paragraph that does not speak of Hydra's insides."""
    with pytest.raises((ValueError, FileNotFoundError)) as caught:
        compose(file, overrides)
    said = str(caught.value)
    assert "\n" not in said
    assert not [word for word in HYDRA_SPEAK if word in said]
    return said


# ---- mutated keys ----------------------------------------------------------------------------------------------------


def keys(node: object, path: str = "") -> Iterator[str]:
    """Full keys of a config, but for those inside lists, the names of metrics and the names of labels."""
    if isinstance(node, DictConfig):
        for key, value in node.items():
            full = f"{path}.{key}" if path else str(key)
            yield full
            if key not in ("expected", "num_classes"):
                yield from keys(value, full)


def misspelt(key: str, dice: random.Random) -> str:
    """One letter of the last part swapped, doubled, dropped or replaced."""
    head, dot, word = key.rpartition(".")
    while True:
        place = dice.randrange(len(word) - 1)
        letters = list(word)
        match dice.choice(("swap", "double", "drop", "replace")):
            case "swap":
                letters[place], letters[place + 1] = letters[place + 1], letters[place]
            case "double":
                letters.insert(place, letters[place])
            case "drop":
                del letters[place]
            case "replace":
                letters[place] = "x"
        wrong = "".join(letters)
        if wrong != word and wrong.isidentifier():
            return head + dot + wrong


@functools.cache
def known_keys(file: Path) -> list[str]:
    return list(keys(compose(file)))


def mutations(count: int) -> list[tuple[Path, str, str]]:
    """Experiment, right key, override with the key misspelt: of root and leaf keys, with no, one and two pluses."""
    dice = random.Random(2)
    found = []
    for number in range(count):
        file = EXPERIMENTS[number % len(EXPERIMENTS)]
        known = known_keys(file)
        roots = [key for key in known if "." not in key]
        key = dice.choice(roots if number % 5 == 0 else known)
        plus = ("", "+", "++")[number % 3]
        found.append((file, key, f"{plus}{misspelt(key, dice)}={dice.choice(('3', 'true', 'null', 'word', '{a: 1}'))}"))
    return found


def test_every_mutated_key_is_refused_and_named():
    for file, key, override in mutations(51):
        said = refusal(file, override)
        assert override.lstrip("+").partition("=")[0] in said, override
        assert key.rpartition(".")[2] in said, f"{override}: the right key is not named in: {said}"


@pytest.mark.parametrize("number", [0, 1, 2, 3])
def test_a_mutated_key_is_refused_in_seconds(number: int):
    file, key, override = mutations(4)[number]
    command = [sys.executable, "-m", "blueberry_video.train", "--config-dir", str(file.parent), override]
    before, began = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    result = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=False)
    wall, after = time.perf_counter() - began, resource.getrusage(resource.RUSAGE_CHILDREN)
    cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    print(f"{override}: refused in {wall:.2f} s, {cpu:.2f} s of them computing")
    assert result.returncode == 1
    assert key.rpartition(".")[2] in result.stderr
    assert "Traceback" not in result.stderr
    assert cpu < MAX_SECONDS, "other tests may hold the processor, so it is the computing time that is bounded"


def test_neither_torch_nor_lightning_is_imported_to_check(experiment: Path):
    code = (
        "import sys; from blueberry_video.config import compose; compose(sys.argv[1]);"
        "assert not {'torch', 'lightning', 'wandb'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code, str(experiment)], check=True)


# ---- one by one ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("override", "words"),
    {
        # root keys
        "typo=1": ["`typo=1`", "trainer"],
        "+trianer=1": ["`trianer` = 1", "`trainer`"],
        "++sede=4": ["`sede` = 4", "Write `seed=4`"],
        "~typo": ["`~typo`", "no key `typo` to delete"],
        "modle=vit/tiny": ["`modle=vit/tiny`", "`model`"],
        "modle.depth=3": ["`modle.depth=3`", "Write `model.depth=3`"],
        # leaf keys
        "trainer.max_stepz=3": [
            "`trainer.max_stepz=3`",
            "Write `trainer.max_steps=3`",
            "`max_steps: 3` under `trainer:`",
        ],
        "+model.depht=8": ["`model.depht` = 8", "Write `model.encoder.depth=8`"],
        "model.depth=8": ["`model.depth=8`", "Write `model.encoder.depth=8`"],
        "++task.masking.ratoi=0.5": ["`task.masking.ratoi` = 0.5", "TubeMasking", "Write `task.masking.ratio=0.5`"],
        "+optimizer.momentun=0.9": ["`optimizer.momentun`", "torch.optim.AdamW"],
        "+trainer.min_step=3": ["Write `+trainer.min_steps=3`"],
        "+model.encoder._tarrget_=1": ["`model.encoder._tarrget_` = 1", "`model.encoder._target_`"],
        "++callbacks.medai=null": ["`callbacks.medai` = null", "`media`"],
        "+callbacks.medai.fps=3": ["`callbacks.medai`", "`media`"],
        "+trainer.logger=true": ["`trainer.logger` = True", "root key `logger`"],
        "trainer.barebones=true": ["right key that no file sets yet", "write `+trainer.barebones=true`"],
        "+trainer.max_steps=3": ["already set", "without the plus"],
        "optimizer.lr.x=1": ["`optimizer.lr` = 0.001 is a value and has no key `x`"],
        # choices of groups
        "model=videomae/tinny": ["there is no conf/model/videomae/tinny.yaml", "Write `model=videomae/tiny`"],
        "trainer=gpuu": ["conf/trainer/gpuu.yaml", "`gpu`"],
        "debug=fast": ["`+debug=fast`"],
        "+debgu=fast": ["`+debgu=fast`", "Did you mean `+debug=fast`?"],
        "debgu=fast": ["`debgu=fast`", "Did you mean `+debug=fast`?"],
        "+model=videomae/tiny": ["without the plus, `model=videomae/tiny`"],
        "+trainer=gpu": ["without the plus, `trainer=gpu`"],
        # values
        "seed=abc": ["`seed=abc`", "Integer"],
        "model.encoder.depth=eight": ["`model.encoder.depth` = eight", "takes int"],
        "model.encoder.depth=4.5": ["`model.encoder.depth` = 4.5", "takes int"],
        "model.encoder.depth=null": ["`model.encoder.depth` = null", "takes int"],
        "optimizer.weight_decay=true": ["takes float"],
        "logger.mode=ofline": ["`logger.mode` = ofline", "`offline`"],
        "name=a/b": ["`name` = a/b", "folder"],
        "seed=1,2": ["several values", "make sweep", "seed=[…]"],
        "data=video_folder": ["`data.train.root` has no value", "write `data.train.root=…`"],
        "~model": ["`model` is not set", "conf/model/"],
        "~task.masking": ["`task.masking` is missing", "MaskedPixels"],
        "~optimizer._partial_": ["`_partial_: true`"],
        "+expected.loss.at_leest=1": ["`expected.loss.at_leest` = 1", "`at_least`"],
        "+expected.loss=1": ["`expected.loss` = 1", "at_least: 0.5"],
        "expected={val/los:{at_most: 3}}": ["write `'+expected={val/los:{at_most: 3}}'`"],
        "expected.loss.at_most=3": ["write `+expected.loss.at_most=3`"],
        "+expected={loss: {}}": ["`expected.loss` = {}", "at_least: 0.5"],
        "+expected.loss.at_most=inf": ["`expected.loss.at_most` = inf", "finite"],
        "+expected.loss.at_least=nan": ["`expected.loss.at_least` = nan", "finite"],
        "+expected={loss: {at_least: 3, at_most: 2}}": ["`expected.loss`", "at least 3 and at most 2", "swap"],
        "optimizer.lr=-1": ["`optimizer.lr` = -1", "optimizer.lr=0.001"],
        "optimizer.weight_decay=-0.1": ["`optimizer.weight_decay` = -0.1", "optimizer.weight_decay=0.05"],
        "seed=-1": ["`seed` = -1", "seed=0"],
        "trainer.devices=foo": ["`trainer.devices` = foo", "trainer.devices=[0,1]"],
        "trainer.devices=0": ["`trainer.devices` = 0", "trainer.devices=1"],
        "trainer.devices='0,1'": ["`trainer.devices` = 0,1", "trainer.devices=[0,1]"],
        # syntax
        "model.encoder.depth=": ["`model.encoder.depth=` has no value"],
        "model.encoder.depth": ["`model.encoder.depth` cannot be read", "key=value"],
        "model.encoder.depth='8": ["cannot be read", "close every quote"],
        "model.encoder.depth=[1": ["cannot be read", "bracket"],
        "model.encoder.depth: 3": ["cannot be read", "key=value"],
        "=3": ["names no key"],
        "hydra.run.dir=x": ["output_dir"],
        # targets
        "model.encoder._target_=os.system": ["os.system is not allowed", "allow_targets: [os]"],
        "model.encoder._target_=torch.os.system": ["is not allowed", "torch.nn", "allow_targets: [torch.os.system]"],
        "model.encoder._target_=torchevil.x": ["torchevil.x is not allowed"],
        "model.encoder._target_=torch.hub.load": ["is not allowed", "allow_targets: [torch.hub.load]"],
        "model.encoder._target_=builtins.eval": ["is not allowed"],
        "task._target_=hydra.utils.get_method": ["is not allowed"],
        "model.encoder._target_=blueberry_video.models.vit.VisonTransformer": [
            "`blueberry_video.models.vit.VisionTransformer`"
        ],
        "model.encoder._target_=blueberry_video.models.vti.VisionTransformer": [
            "cannot be built",
            "blueberry_video.models.vit",
        ],
        # what two keys must agree on
        "model.encoder.image_size=33": ["33", "not divisible by `model.encoder.patch_size` = 8", "image_size=32"],
        "model.encoder.num_frames=15": ["tubelet_size", "num_frames=16"],
        "model.encoder.num_heads=5": ["embed_dim=95", "num_heads=4"],
        "model.encoder.patch_size=0": ["`model.encoder.patch_size` = 0 must be at least 1"],
        "data.val.num_frames=8": ["`data.val.num_frames` = 8", "`model.encoder.num_frames` = 16"],
        "data.train.image_size=64": ["`data.train.image_size` = 64", "Write `data.train.image_size=32`"],
    }.items(),
)
def test_a_wrong_override_is_refused(experiment: Path, override: str, words: list[str]):
    said = refusal(experiment, override)
    assert [word for word in words if word not in said] == [], said


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ("name: test\ntrianer: {max_steps: 3}", ["`trianer`", "`trainer`", "config.yaml"]),
        ("name: test\ntrainer: {max_stepz: 3}", ["`trainer.max_stepz` = 3", "`trainer.max_steps`"]),
        ("name: test\nmodel: {encoder: {depht: 3}}", ["`model.encoder.depht` = 3", "`model.encoder.depth`"]),
        ("name: test\nseed: abc", ["`seed`", "config.yaml", "Integer"]),
        ("name: test\nseed: -1", ["`seed` = -1", "`seed=0`"]),
        ("name: test\nseed: ${sead}", ["`seed`", "sead"]),
        ("seed: 3", ["`name` has no value"]),
        ("name: test\nseed: [1", ["config.yaml", "line", "not valid YAML"]),
        ("name: test\n  seed: 1", ["config.yaml", "line", "not valid YAML"]),
        ("name: test\nseed: 1\nseed: 2", ["config.yaml", "duplicate key"]),
    ],
)
def test_a_wrong_file_is_refused(tmp_path: Path, values: str, words: list[str]):
    said = refusal(written(tmp_path, values))
    assert [word for word in words if word not in said] == [], said


def test_a_typo_is_told_also_where_a_mandatory_value_is_open(tmp_path: Path):
    folder = written(tmp_path, "name: test", DEFAULTS.replace("sprites", "video_folder"))
    said = refusal(folder, "modle.encoder.depth=3")
    assert "`model.encoder.depth`" in said, said
    assert "no key `typo`" in refusal(folder, "typo=1")


@pytest.mark.parametrize(
    ("defaults", "words"),
    [
        (DEFAULTS.replace("videomae/tiny", "videomae/tinny"), ["`model=videomae/tinny`", "`videomae/tiny`"]),
        (DEFAULTS.replace("override model", "override modle"), ["config.yaml", "modle", "`model`"]),
        (DEFAULTS.replace(", _self_", ""), ["`- _self_`"]),
        (DEFAULTS.replace("train, ", ""), ["`- train`"]),
        (DEFAULTS.replace("train,", "trian,"), ["`- train`"]),
        ("", ["`defaults`"]),
    ],
)
def test_wrong_defaults_are_refused(tmp_path: Path, defaults: str, words: list[str]):
    said = refusal(written(tmp_path, "name: test", defaults))
    assert [word for word in words if word not in said] == [], said


def test_a_misspelt_experiment_names_the_nearest():
    said = refusal(ROOT / "experiments" / "templaet" / "config.yaml")
    assert "'templaet'" in said
    assert "`template`" in said


# ---- what is right is let through ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("override", "key", "value"),
    [
        ("model.encoder.depth=2", "model.encoder.depth", 2),
        ("+trainer.max_time=00:01:00:00", "trainer.max_time", "00:01:00:00"),
        ("++trainer.max_steps=5", "trainer.max_steps", 5),
        ("optimizer.lr=1", "optimizer.lr", 1),
        ("optimizer=videomae", "optimizer.lr", 0.00015),
        ("~callbacks.media", "callbacks.media", None),
        ("callbacks.media=null", "callbacks.media", None),
        ("+callbacks.few_labels_image=null", "callbacks.few_labels_image", None),
        (
            "+callbacks.lr={_target_: lightning.pytorch.callbacks.LearningRateMonitor}",
            "callbacks.lr.logging_interval",
            None,
        ),
        ("name='two words'", "name", "two words"),
    ],
)
def test_a_right_override_is_applied(experiment: Path, override: str, key: str, value: object):
    node: object = compose(experiment, [override])
    for part in key.split("."):
        node = node.get(part)  # type: ignore[attr-defined]
    assert node == value


def test_allow_targets_opens_one_package(experiment: Path):
    target = "task.augment={_target_: json.JSONEncoder, indent: 2}"
    assert "allow_targets: [json]" in refusal(experiment, target)
    assert compose(experiment, [target, "allow_targets=[json]"]).task.augment.indent == 2
    assert "indnet" in refusal(experiment, target.replace("indent", "indnet"), "allow_targets=[json]")


@pytest.mark.parametrize(
    "target",
    [
        # outside of what is listed
        "torch.utils.collect_env.run",
        "torch.utils.model_zoo.load_url",
        "torch.jit.load",
        "torch.package.PackageImporter",
        "torch.builtins.eval",
        "lightning.fabric.utilities.cloud_io._load",
        "lightning.pytorch.utilities.migration.utils.migrate_checkpoint",
        "blueberry_video.train.main",
        "blueberry_video.launch.processes.start",
        "blueberry_video.config.compose",
        "torch.utils.data.datapipes.gen_pyi.gen_from_template",
        "lightning.pytorch.strategies.launchers.subprocess_script._SubprocessScriptLauncher",
        # out of it by a detour
        "torch.nn.modules.module.torch.hub.load",
        "torch.nn.modules.module.torch.builtins.eval",
        "blueberry_video.experiment.provenance.subprocess.run",
        # methods that unpickle
        "lightning.fabric.plugins.TorchCheckpointIO.load_checkpoint",
        "blueberry_video.experiment.checkpoint.AtomicCheckpointIO.load_checkpoint",
    ],
)
def test_a_target_that_could_run_anything_is_refused(experiment: Path, target: str):
    said = refusal(experiment, f"+callbacks.x={{_target_: {target}, _args_: [x, y, z, x, y]}}")
    assert "`callbacks.x._target_`" in said
    assert "is not allowed" in said
    assert f"allow_targets: [{target}]" in said


def test_allow_targets_opens_one_name(experiment: Path):
    target = "task.augment={_target_: torch.jit.load, f: x}"
    assert compose(experiment, [target, "allow_targets=[torch.jit.load]"]).task.augment.f == "x"
    assert "is not allowed" in refusal(experiment, target, "allow_targets=[torch.jit.save]")


@pytest.mark.parametrize(
    "override",
    [
        "model.encoder._target_=blueberry_video.models.vit.pickle.loads",
        "task.augment={_partial_: true}",
    ],
)
def test_what_was_typed_is_not_suggested(experiment: Path, override: str):
    typed = override.rpartition("=")[2] if "_target_" in override else "task.augment._partial_"
    assert f"mean `{typed}`" not in refusal(experiment, override)


def test_a_suggested_bound_is_accepted(experiment: Path):
    said = refusal(experiment, "expected={val/los:{at_most: 3}}")
    suggested = said.rpartition("write `'")[2].removesuffix("'`.")
    assert compose(experiment, [suggested]).expected["val/los"].at_most == 3


def test_a_saved_config_is_checked_like_any_other(experiment: Path, tmp_path: Path):
    saved = tmp_path / "saved.yaml"
    saved.write_text(OmegaConf.to_yaml(compose(experiment)))
    assert load(saved, ["trainer.max_steps=2"]).trainer.max_steps == 2
    for override, word in (("trainer.max_stepz=2", "max_steps"), ("trainer=gpu", "no groups left")):
        with pytest.raises(ValueError, match=word):
            load(saved, [override])
    with pytest.raises(FileNotFoundError, match="no config file"):
        load(tmp_path / "other.yaml")


def test_a_sweep_is_expanded():
    assert expand_sweep(["seed=1,2", "name=a", "trainer.max_steps=range(3,5)"]) == [
        ["seed=1", "name=a", "trainer.max_steps=3"],
        ["seed=1", "name=a", "trainer.max_steps=4"],
        ["seed=2", "name=a", "trainer.max_steps=3"],
        ["seed=2", "name=a", "trainer.max_steps=4"],
    ]


# ---- signatures ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "target",
    [
        "lightning.Trainer",
        "lightning.pytorch.callbacks.ModelCheckpoint",
        "lightning.pytorch.strategies.FSDPStrategy",
        "torch.optim.AdamW",
        "torch.nn.Linear",
        "torch.nn.ReLU",
        "torch.utils.data.DataLoader",
        "blueberry_video.models.vit.VisionTransformer",
        "blueberry_video.data.datamodule.DataModule",
        "blueberry_video.experiment.checkpoint.AtomicCheckpointIO",
        "blueberry_video.optim.warmup_cosine",
    ],
)
def test_a_signature_read_from_the_source_is_the_real_one(target: str):
    module, _, name = target.rpartition(".")
    real = inspect.signature(getattr(importlib.import_module(module), name)).parameters
    named = {key: p for key, p in real.items() if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)}
    read = signature(target)
    assert list(read.parameters) == list(named)
    assert [p.required for p in read.parameters.values()] == [p.default is p.empty for p in named.values()]
    assert read.open == any(p.kind is p.VAR_KEYWORD for p in real.values())


def test_check_takes_plain_dictionaries():
    with pytest.raises(ValueError, match="`sede` = 3 is not a root key"):
        check({"sede": 3})


def test_the_environment_shows_a_traceback_on_request(experiment: Path):
    command = [sys.executable, "-m", "blueberry_video.train", "--config-dir", str(experiment.parent), "sede=3"]
    result = subprocess.run(
        command, capture_output=True, text=True, check=False, env={**os.environ, "BLUEBERRY_TRACEBACK": "1"}
    )
    assert result.returncode == 1
    assert "Traceback" in result.stderr


def test_an_augmentation_sets_the_size_of_training_clips():
    experiment = ROOT / "experiments" / "videomae_k400" / "config.yaml"
    assert compose(experiment).data.train.image_size == 256  # cropped to the model's 224
    said = refusal(experiment, "task.augment.size=192")
    assert "`task.augment.size` = 192 and `model.encoder.image_size` = 224 disagree" in said
    assert "`data.val.image_size` = 256" in refusal(experiment, "data.val.image_size=256")


def test_of_several_augmentations_the_last_that_crops_sets_the_size(experiment: Path):
    file = ROOT / "experiments" / "videomae_finetune_k400" / "config.yaml"
    said = refusal(file, "task.augment._args_.0.size=192")
    assert "Write `task.augment._args_.0.size=224` or `model.encoder.image_size=192`" in said  # Hydra takes it
    sequence, larger = "task.augment={_target_: torch.nn.Sequential, _args_: [%s]}", "data.train.image_size=64"
    crop = "{_target_: blueberry_video.augmentation.RandomResizedCrop, size: %s}"
    flip, foreign = "{_target_: blueberry_video.augmentation.HorizontalFlip}", "{_target_: json.JSONEncoder}"
    compose(experiment, [sequence % f"{crop % 24}, {crop % 32}, {flip}", larger])
    assert "_args_.1.size` = 24" in refusal(experiment, sequence % f"{crop % 32}, {crop % 24}")
    assert "`data.train.image_size` = 64" in refusal(experiment, sequence % flip, larger)
    compose(experiment, [sequence % f"{flip}, {foreign}", larger, "allow_targets=[json]"])  # it might crop, who knows


FOLDER = ["data=image_folder", "data.train.root=somewhere"]


@pytest.mark.parametrize(("data", "part"), [(FOLDER, ""), (["data=omni"], ".parts.image")])
def test_single_frames_need_an_encoder_that_takes_them(experiment: Path, data: list[str], part: str):
    said = refusal(experiment, *data)
    assert f"`data.train{part}._target_` = blueberry_video.data." in said
    assert "`model.encoder.images` = False takes clips alone. Write `model.encoder.images=true`" in said
    compose(experiment, [*data, "model.encoder.images=true"])


def test_single_frames_have_the_size_of_the_model_and_come_from_clips_of_any_length(experiment: Path):
    compose(experiment, [*FOLDER, "model.encoder.num_frames=1", "model.encoder.tubelet_size=1"])
    said = refusal(experiment, *FOLDER, "model.encoder.images=true", "data.train.image_size=64")
    assert "`data.train.image_size` = 64" in said
    source = (
        "data.train.parts.image.dataset={_target_: blueberry_video.data.sprites.Sprites, split: train, size: 8, %s}"
    )
    mixture = ["data=omni", "model=omnimae/tiny"]
    compose(experiment, [*mixture, source % "num_frames: 4"])
    said = refusal(experiment, *mixture, source % "image_size: 16")
    assert "`data.train.parts.image.dataset.image_size` = 16" in said


def test_a_teacher_must_take_the_clips_too(experiment: Path):
    distil = ["model=classifier/tiny", "task=distillation", "task.teacher_from=somewhere"]
    assert "`task.teacher.encoder.image_size` = 224 disagree" in refusal(experiment, *distil)
    small = [*distil, "model@task.teacher=classifier/tiny"]
    compose(experiment, small)
    assert "`task.teacher.encoder.num_heads=4`" in refusal(experiment, *small, "task.teacher.encoder.num_heads=5")
