"""Errors in a config: reported within seconds, in one paragraph with the key, its value and the nearest valid one."""

import functools
import importlib
import inspect
import os
import random
import re
import resource
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from omegaconf import DictConfig, OmegaConf

from blueberry_video.config import check, check_classes, compose, expand_sweep, load, normalize
from blueberry_video.config.signatures import signature

ROOT = Path(__file__).resolve().parents[1]
EXPERIMENTS = sorted(ROOT.glob("experiments/*/config.yaml"))
DEFAULTS = (
    "defaults: [train, override model: videomae/tiny, override task: masked_pixels, override data: sprites, _self_]"
)
HYDRA_TERMS = (
    "struct",
    "Traceback",
    "hydra.errors",
    "ConfigComposition",
    "full_key",
    "object_type",
    "HYDRA_FULL_ERROR",
)
MAX_SECONDS = 6.0  # 2 on an idle core; next to other jobs the same work needs nearly twice the CPU time


@pytest.fixture
def experiment(tmp_path: Path) -> Path:
    return write(tmp_path, "name: test")


def write(folder: Path, values: str, defaults: str = DEFAULTS) -> Path:
    """Writes an experiment with these values."""
    file = folder / "test" / "config.yaml"
    file.parent.mkdir(exist_ok=True)
    file.write_text(f"# run: nothing, a test\n{defaults}\n{values}\n")
    return file


def error_message(file: Path, *overrides: str) -> str:
    """Message for an invalid config: one paragraph without terms of Hydra's internals."""
    with pytest.raises((ValueError, FileNotFoundError)) as caught:
        compose(file, overrides)
    message = str(caught.value)
    assert "\n" not in message
    assert not [word for word in HYDRA_TERMS if word in message]
    return message


# ---- mutated keys ----------------------------------------------------------------------------------------------------


def keys(node: object, path: str = "") -> Iterator[str]:
    """Full keys of a config, except those inside lists, names of metrics and names of labels."""
    if isinstance(node, DictConfig):
        for key, value in node.items():
            full = f"{path}.{key}" if path else str(key)
            yield full
            if key not in ("expected", "num_classes"):
                yield from keys(value, full)


def misspell(key: str, rng: random.Random) -> str:
    """The key with one letter of its last part swapped, doubled, dropped or replaced."""
    head, dot, word = key.rpartition(".")
    while True:
        index = rng.randrange(len(word) - 1)
        letters = list(word)
        match rng.choice(("swap", "double", "drop", "replace")):
            case "swap":
                letters[index], letters[index + 1] = letters[index + 1], letters[index]
            case "double":
                letters.insert(index, letters[index])
            case "drop":
                del letters[index]
            case "replace":
                letters[index] = "x"
        wrong = "".join(letters)
        if wrong != word and wrong.isidentifier():
            return head + dot + wrong


@functools.cache
def known_keys(file: Path) -> list[str]:
    return list(keys(compose(file)))


def mutations(count: int) -> list[tuple[Path, str, str]]:
    """(experiment, key, override with the key misspelled) for root and leaf keys, with zero, one and two pluses."""
    rng = random.Random(2)
    found = []
    for number in range(count):
        file = EXPERIMENTS[number * len(EXPERIMENTS) // count]
        known = known_keys(file)
        roots = [key for key in known if "." not in key]
        key = rng.choice(roots if number % 5 == 0 else known)
        plus = ("", "+", "++")[number % 3]
        found.append((file, key, f"{plus}{misspell(key, rng)}={rng.choice(('3', 'true', 'null', 'word', '{a: 1}'))}"))
    return found


def test_misspelled_keys_raise_with_the_right_key():
    for file, key, override in mutations(15):
        message = error_message(file, override)
        assert override.lstrip("+").partition("=")[0] in message, override
        assert key.rpartition(".")[2] in message, f"{override}: {message}"


@pytest.mark.parametrize("number", [0, 1, 2, 3])
def test_misspelled_key_is_reported_within_seconds(number: int):
    file, key, override = mutations(4)[number]
    command = [sys.executable, "-m", "blueberry_video.train", "--config-dir", str(file.parent), override]
    before, began = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    result = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=False)
    wall, after = time.perf_counter() - began, resource.getrusage(resource.RUSAGE_CHILDREN)
    cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    print(f"{override}: reported in {wall:.2f} s, {cpu:.2f} s of CPU time")
    assert result.returncode == 1
    assert key.rpartition(".")[2] in result.stderr
    assert "Traceback" not in result.stderr
    assert cpu < MAX_SECONDS, "CPU time is bounded, because other tests may occupy the processor"


def test_composition_imports_neither_torch_nor_lightning(experiment: Path):
    code = (
        "import sys; from blueberry_video.config import compose; compose(sys.argv[1]);"
        "assert not {'torch', 'lightning', 'wandb'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code, str(experiment)], check=True)


# ---- single errors ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("override", "words"),
    {
        # root keys
        "typo=1": ["`typo=1`", "Choose one of: ", "trainer"],
        "+trianer=1": ["`trianer` = 1", "`trainer`"],
        "++sede=4": ["`sede` = 4", "Write `seed=4`"],
        "~typo": ["`~typo`", "delete"],
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
        "+trainer.logger=true": ["`trainer.logger` = True", "`logger`"],
        "trainer.barebones=true": ["`trainer.barebones=true`", "write `+trainer.barebones=true`"],
        "+trainer.max_steps=3": ["`+trainer.max_steps=3`", "`trainer.max_steps`", "plus"],
        "optimizer.lr.x=1": ["`optimizer.lr.x=1`", "`optimizer.lr` = 0.001", "`x`"],
        # choices of groups
        "model=videomae/tinny": ["conf/model/videomae/tinny.yaml", "Write `model=videomae/tiny`"],
        "trainer=gpuu": ["conf/trainer/gpuu.yaml", "`gpu`"],
        "debug=fast": ["`+debug=fast`"],
        "+debgu=fast": ["`+debgu=fast`", "`+debug=fast`"],
        "debgu=fast": ["`debgu=fast`", "`+debug=fast`"],
        "+model=videomae/tiny": ["`+model=videomae/tiny`", " `model=videomae/tiny`"],
        "+trainer=gpu": ["`+trainer=gpu`", " `trainer=gpu`"],
        # values
        "seed=abc": ["`seed=abc`", "Integer"],
        "model.encoder.depth=eight": ["`model.encoder.depth` = eight", " int"],
        "model.encoder.depth=4.5": ["`model.encoder.depth` = 4.5", " int"],
        "model.encoder.depth=null": ["`model.encoder.depth` = null", " int"],
        "optimizer.weight_decay=true": ["`optimizer.weight_decay` = True", " float"],
        "logger.mode=ofline": ["`logger.mode` = ofline", "`offline`"],
        "name=a/b": ["`name` = a/b", "`name: my_idea`"],
        "seed=1,2": ["`seed=1,2`", "make sweep", "seed=[…]"],
        "data=video_folder": ["`data.train.root`", "`data.train.root=…`"],
        "~model": ["`model`", "conf/model/"],
        "~task.masking": ["`task.masking`", "MaskedPixels", "`task.masking.ratio=0.9`"],
        "~optimizer._partial_": ["`optimizer._partial_`", "`optimizer._partial_=true`"],
        "+expected.loss.at_leest=1": ["`expected.loss.at_leest` = 1", "`at_least`"],
        "+expected.loss=1": ["`expected.loss` = 1", "at_least: "],
        "expected={val/los:{at_most: 3}}": ["`val/los`", "`'+expected={val/los:{at_most: 3}}'`"],
        "expected.loss.at_most=3": ["`loss`", "`+expected.loss.at_most=3`"],
        "+expected={loss: {}}": ["`expected.loss` = {}", "at_least: "],
        "+expected.loss.at_most=inf": ["`expected.loss.at_most` = inf", "finite"],
        "+expected.loss.at_least=nan": ["`expected.loss.at_least` = nan", "finite"],
        "+expected={loss: {at_least: 3, at_most: 2}}": ["`expected.loss` = {'at_least': 3, 'at_most': 2}"],
        "optimizer.lr=-1": ["`optimizer.lr` = -1", "optimizer.lr=0.001"],
        "optimizer.weight_decay=-0.1": ["`optimizer.weight_decay` = -0.1", "optimizer.weight_decay=0.05"],
        "seed=-1": ["`seed` = -1", "seed=0"],
        "trainer.devices=foo": ["`trainer.devices` = foo", "trainer.devices=[0,1]"],
        "trainer.devices=0": ["`trainer.devices` = 0", "trainer.devices=1"],
        "trainer.devices='0,1'": ["`trainer.devices` = 0,1", "trainer.devices=[0,1]"],
        "task.masking_ratio=.75": ["`task.masking_ratio=.75`", "Write `task.masking.ratio=0.75`"],
        "logger=null": ["`logger=null`", "`logger=csv`"],
        "callbacks=null": ["`callbacks=null`", "`callbacks.media=null`"],
        "trainer.max_steps=0": ["`trainer.max_steps` = 0", "-1", "`trainer.max_steps=1`"],
        "trainer.max_steps=1e3": ["`trainer.max_steps` = 1000.0", "`trainer.max_steps=1000`"],
        "trainer.accumulate_grad_batches=0": ["`trainer.accumulate_grad_batches` = 0", "at least 1"],
        "data.batch_size=0": ["`data.batch_size` = 0", "`data.batch_size=1`"],
        "model=vit/tiny": ["`model._target_` = ", "`model=videomae/tiny model@model.encoder=vit/tiny`"],
        "model=text_to_video/cogvideox_tiny": ["`model._target_` = ", "`data=moving_shapes`"],
        "schedule=glob(*)": ["`schedule=glob(*)`", "warmup_cosine", 'SWEEP="schedule=glob(*)"'],
        "init_from=a,b": ["`init_from=a,b`", "`\"init_from='…'\"`"],
        # syntax
        "-x=3": ["`-x=3`", "`key=value`"],
        "--multirun": ["`--multirun`", "make sweep"],
        "model.encoder.depth=": ["`model.encoder.depth=`", "`model.encoder.depth=null`"],
        "model.encoder.depth": ["`model.encoder.depth`", "`key=value`"],
        "model.encoder.depth='8": ["`model.encoder.depth='8`", "quote"],
        "model.encoder.depth=[1": ["`model.encoder.depth=[1`", "bracket"],
        "model.encoder.depth: 3": ["`model.encoder.depth: 3`", "`key=value`"],
        "=3": ["`=3`", "`key=value`"],
        "hydra.run.dir=x": ["`hydra.run.dir=x`", "`output_dir=…`"],
        # targets
        "model.encoder._target_=os.system": ["= os.system ", "allow_targets=[os]"],
        "model.encoder._target_=torch.os.system": ["= torch.os.system ", "allow_targets=[torch.os.system]"],
        "model.encoder._target_=torchevil.x": ["= torchevil.x ", "allow_targets=[torchevil]"],
        "model.encoder._target_=torch.hub.load": ["= torch.hub.load ", "allow_targets=[torch.hub.load]"],
        "model.encoder._target_=builtins.eval": ["`model.encoder._target_` = builtins.eval ", "[builtins]"],
        "task._target_=hydra.utils.get_method": ["`task._target_` = hydra.utils.get_method ", "[hydra]"],
        "model.encoder._target_=blueberry_video.models.vit.VisonTransformer": [
            "`blueberry_video.models.vit.VisionTransformer`"
        ],
        "model.encoder._target_=blueberry_video.models.vti.VisionTransformer": [
            "= blueberry_video.models.vti.VisionTransformer ",
            "`blueberry_video.models.vit.VisionTransformer`",
        ],
        # rules between keys
        "model.encoder.image_size=33": [
            "`model.encoder.image_size` = 33",
            "`model.encoder.patch_size` = 8",
            "image_size=32",
        ],
        "model.encoder.num_frames=15": ["`model.encoder.num_frames` = 15", "tubelet_size", "num_frames=16"],
        "model.encoder.num_heads=5": ["embed_dim=95", "num_heads=4"],
        "model.decoder_num_heads=5": ["`model.decoder_num_heads` = 5", "`model.decoder_dim` = "],
        "model.encoder.patch_size=0": ["`model.encoder.patch_size` = 0 ", "`model.encoder.patch_size=1`"],
        "data.val.num_frames=8": ["`data.val.num_frames` = 8", "`model.encoder.num_frames` = 16"],
        "data.train.image_size=64": ["`data.train.image_size` = 64", "Write `data.train.image_size=32`"],
    }.items(),
)
def test_invalid_override_raises(experiment: Path, override: str, words: list[str]):
    message = error_message(experiment, override)
    assert [word for word in words if word not in message] == [], message


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ("name: test\ntrianer: {max_steps: 3}", ["`trianer`", "`trainer`", "config.yaml"]),
        ("name: test\ntrainer: {max_stepz: 3}", ["`trainer.max_stepz` = 3", "`trainer.max_steps`"]),
        ("name: test\nmodel: {encoder: {depht: 3}}", ["`model.encoder.depht` = 3", "`model.encoder.depth`"]),
        ("name: test\nseed: abc", ["`seed`", "config.yaml", "Integer"]),
        ("name: test\nseed: -1", ["`seed` = -1", "`seed=0`"]),
        ("name: test\nseed: ${sead}", ["`seed`", "sead"]),
        ("seed: 3", ["`name`", "`name=…`"]),
        ("name: test\nseed: [1", ["config.yaml, line 5, column "]),
        ("name: test\n  seed: 1", ["config.yaml, line 4, column "]),
        ("name: test\nseed: 1\nseed: 2", ["config.yaml, line 5, column 1", "duplicate key seed"]),
    ],
)
def test_invalid_file_raises(tmp_path: Path, values: str, words: list[str]):
    message = error_message(write(tmp_path, values))
    assert [word for word in words if word not in message] == [], message


def test_typo_is_reported_before_a_missing_mandatory_value(tmp_path: Path):
    folder = write(tmp_path, "name: test", DEFAULTS.replace("sprites", "video_folder"))
    message = error_message(folder, "modle.encoder.depth=3")
    assert "`model.encoder.depth`" in message, message
    assert "`typo`" in error_message(folder, "typo=1")


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
def test_invalid_defaults_raise(tmp_path: Path, defaults: str, words: list[str]):
    message = error_message(write(tmp_path, "name: test", defaults))
    assert [word for word in words if word not in message] == [], message


def test_misspelled_experiment_suggests_the_nearest():
    message = error_message(ROOT / "experiments" / "templaet" / "config.yaml")
    assert "'templaet'" in message
    assert "`template`" in message


# ---- valid configs ---------------------------------------------------------------------------------------------------


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
def test_valid_override_is_applied(experiment: Path, override: str, key: str, value: object):
    node: object = compose(experiment, [override])
    for part in key.split("."):
        node = node.get(part)  # type: ignore[attr-defined]
    assert node == value


def test_allow_targets_allows_one_package(experiment: Path):
    target = "task.input.augment={_target_: json.JSONEncoder, indent: 2}"
    assert "allow_targets=[json]" in error_message(experiment, target)
    assert compose(experiment, [target, "allow_targets=[json]"]).task.input.augment.indent == 2
    assert "indnet" in error_message(experiment, target.replace("indent", "indnet"), "allow_targets=[json]")


@pytest.mark.parametrize(
    "target",
    [
        # outside the allowed packages
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
        # reached through an allowed package
        "torch.nn.modules.module.torch.hub.load",
        "torch.nn.modules.module.torch.builtins.eval",
        "blueberry_video.experiment.provenance.subprocess.run",
        # methods that unpickle
        "lightning.fabric.plugins.TorchCheckpointIO.load_checkpoint",
        "blueberry_video.experiment.checkpoint.AtomicCheckpointIO.load_checkpoint",
    ],
)
def test_unsafe_target_raises(experiment: Path, target: str):
    message = error_message(experiment, f"+callbacks.x={{_target_: {target}, _args_: [x, y, z, x, y]}}")
    assert f"`callbacks.x._target_` = {target}"[:80] in message
    assert f"allow_targets=[{target}]" in message


def test_allow_targets_allows_one_name(experiment: Path):
    target = "task.input.augment={_target_: torch.jit.load, f: x}"
    assert compose(experiment, [target, "allow_targets=[torch.jit.load]"]).task.input.augment.f == "x"
    assert "allow_targets=[torch.jit.load]" in error_message(experiment, target, "allow_targets=[torch.jit.save]")


@pytest.mark.parametrize(
    "override",
    ["model.encoder._target_=blueberry_video.models.vit.pickle.loads", "task.input.augment={_partial_: true}"],
)
def test_input_itself_is_not_suggested(experiment: Path, override: str):
    typed = override.rpartition("=")[2] if "_target_" in override else "task.input.augment._partial_"
    assert f"mean `{typed}`" not in error_message(experiment, override)


def test_suggested_bound_is_accepted(experiment: Path):
    message = error_message(experiment, "expected={val/los:{at_most: 3}}")
    suggested = re.findall(r"`'(.*?)'`", message)[-1]
    assert compose(experiment, [suggested]).expected["val/los"].at_most == 3


@pytest.mark.parametrize("plus", ["", "+", "++"])
def test_bound_of_a_metric_with_a_slash_is_accepted(experiment: Path, plus: str):
    bounds = [f"{plus}expected.val/loss.at_most=1.5", f"{plus}expected.val/motion.at_least=0.5"]
    expected = {"val/loss": {"at_most": 1.5}, "val/motion": {"at_least": 0.5}}
    config = compose(experiment, bounds)
    assert config.expected == expected
    assert normalize(normalize(bounds)) == normalize(bounds)
    saved = experiment.parent / "saved.yaml"
    saved.write_text(OmegaConf.to_yaml(config))
    assert load(saved, [bounds[0].replace("1.5", "2")]).expected == {**expected, "val/loss": {"at_most": 2}}


def test_number_of_epochs_alone_removes_the_limit_of_steps(experiment: Path):
    for overrides, steps in (
        (["trainer.max_epochs=3"], -1),
        (["trainer.max_epochs=3", "trainer.max_steps=20"], 20),
        (["trainer.max_epochs=3", "+debug=fast"], 10),
        ([], 1000),
    ):
        assert compose(experiment, overrides).trainer.max_steps == steps


def test_labels_of_the_model_file_are_replaced_as_the_message_says(experiment: Path):
    classify = ["model=classifier/vjepa_probe", "task=classification"]
    message = error_message(experiment, *classify, "model.num_classes={label: 8}")
    suggested = re.findall(r"`([^`]*)`", message)[-2].split()
    assert compose(experiment, [*classify, *suggested]).model.num_classes == {"label": 8}


def test_labels_are_added_to_a_null_number_of_classes_as_the_message_says(experiment: Path):
    classify = ["model=classifier/tiny", "task=classification"]
    message = error_message(experiment, *classify, "model.num_classes.label=8")
    suggested = re.findall(r"`([^`]*)`", message)[-1]
    for added in (suggested, "model.num_classes={label: 8}"):
        assert compose(experiment, [*classify, added]).model.num_classes == {"label": 8}


@pytest.mark.parametrize(
    ("heads", "message"),
    [
        (
            {"motion": 3, "label": 8},
            r"`model\.num_classes\.label` = 8.*~model\.num_classes\.label.*oc\.create:\{motion: 3",
        ),
        ({"motion": 2}, r"`model\.num_classes\.motion` = 2 .* 3 classes.*`model\.num_classes\.motion=3`"),
    ],
)
def test_labels_that_the_data_lacks_raise(heads: dict[str, int], message: str):
    classes = {"motion": ("up", "down", "left"), "shape": ("disc", "square")}
    with pytest.raises(ValueError, match=message):
        check_classes(heads, classes)
    check_classes({"motion": 3}, classes)
    check_classes({"motion": 400}, classes)  # the head of published weights
    check_classes(None, {})


def test_saved_config_is_checked(experiment: Path, tmp_path: Path):
    saved = tmp_path / "saved.yaml"
    saved.write_text(OmegaConf.to_yaml(compose(experiment)))
    assert load(saved, ["trainer.max_steps=2"]).trainer.max_steps == 2
    for override, word in (
        ("trainer.max_stepz=2", r"`trainer\.max_steps=2`"),
        ("trainer=gpu", r"`trainer\.<key>=<value>`"),
    ):
        with pytest.raises(ValueError, match=word):
            load(saved, [override])
    with pytest.raises(FileNotFoundError, match=r"other\.yaml"):
        load(tmp_path / "other.yaml")


def test_sweep_is_expanded():
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
        "blueberry_video.parallel.strategy.FullyShardedStrategy",
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
def test_signature_from_source_equals_inspect_signature(target: str):
    module, _, name = target.rpartition(".")
    real = inspect.signature(getattr(importlib.import_module(module), name)).parameters
    named = {key: p for key, p in real.items() if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)}
    read = signature(target)
    assert list(read.parameters) == list(named)
    assert [p.default is p.empty for p in read.parameters.values()] == [p.default is p.empty for p in named.values()]
    assert read.open == any(p.kind is p.VAR_KEYWORD for p in real.values())


def test_check_accepts_plain_dictionaries():
    with pytest.raises(ValueError, match=r"`sede` = 3 .*`seed`"):
        check({"sede": 3})


def test_environment_variable_shows_the_traceback(experiment: Path):
    command = [sys.executable, "-m", "blueberry_video.train", "--config-dir", str(experiment.parent), "sede=3"]
    result = subprocess.run(
        command, capture_output=True, text=True, check=False, env={**os.environ, "BLUEBERRY_TRACEBACK": "1"}
    )
    assert result.returncode == 1
    assert "Traceback" in result.stderr


def test_augmentation_sets_the_size_of_training_clips():
    experiment = ROOT / "experiments" / "videomae_k400" / "config.yaml"
    assert compose(experiment).data.train.image_size == 256  # cropped to the model's 224
    message = error_message(experiment, "task.input.augment.size=192")
    assert "`task.input.augment.size` = 192" in message
    assert "`model.encoder.image_size` = 224" in message
    assert "`data.val.image_size` = 256" in error_message(experiment, "data.val.image_size=256")


def test_last_crop_of_several_augmentations_sets_the_size(experiment: Path):
    file = ROOT / "experiments" / "videomae_finetune_k400" / "config.yaml"
    message = error_message(file, "task.input.augment._args_.1.size=192")
    assert "`task.input.augment._args_.1.size=224`" in message  # an override that Hydra accepts
    assert "`model.encoder.image_size=192`" in message
    sequence, larger = "task.input.augment={_target_: torch.nn.Sequential, _args_: [%s]}", "data.train.image_size=64"
    crop = "{_target_: blueberry_video.augmentation.RandomResizedCrop, size: %s}"
    flip, foreign = "{_target_: blueberry_video.augmentation.HorizontalFlip}", "{_target_: json.JSONEncoder}"
    compose(experiment, [sequence % f"{crop % 24}, {crop % 32}, {flip}", larger])
    assert "_args_.1.size` = 24" in error_message(experiment, sequence % f"{crop % 32}, {crop % 24}")
    assert "`data.train.image_size` = 64" in error_message(experiment, sequence % flip, larger)
    compose(experiment, [sequence % f"{flip}, {foreign}", larger, "allow_targets=[json]"])  # it may crop


FOLDER = ["data=image_folder", "data.train.root=somewhere"]


@pytest.mark.parametrize(("data", "part"), [(FOLDER, ""), (["data=omni"], ".parts.image")])
def test_single_frames_require_an_encoder_of_images(experiment: Path, data: list[str], part: str):
    message = error_message(experiment, *data)
    assert f"`data.train{part}._target_` = blueberry_video.data." in message
    assert "`model.encoder.images` = False" in message
    assert "`model.encoder.images=true`" in message
    compose(experiment, [*data, "model.encoder.images=true"])


def test_single_frames_have_the_size_of_the_model_and_any_clip_length(experiment: Path):
    compose(experiment, [*FOLDER, "model.encoder.num_frames=1", "model.encoder.tubelet_size=1"])
    message = error_message(experiment, *FOLDER, "model.encoder.images=true", "data.train.image_size=64")
    assert "`data.train.image_size` = 64" in message
    source = (
        "data.train.parts.image.dataset={_target_: blueberry_video.data.sprites.Sprites, split: train, size: 8, %s}"
    )
    mixture = ["data=omni", "model=omnimae/tiny"]
    compose(experiment, [*mixture, source % "num_frames: 4"])
    message = error_message(experiment, *mixture, source % "image_size: 16")
    assert "`data.train.parts.image.dataset.image_size` = 16" in message


def test_teacher_sizes_are_checked(experiment: Path):
    distil = ["model=classifier/tiny", "task=distillation", "task.teacher_from=somewhere"]
    assert "`task.teacher.encoder.image_size` = 224" in error_message(experiment, *distil)
    small = [*distil, "model@task.teacher=classifier/tiny"]
    compose(experiment, small)
    assert "`task.teacher.encoder.num_heads=4`" in error_message(experiment, *small, "task.teacher.encoder.num_heads=5")


@pytest.mark.parametrize(
    ("own", "overrides", "steps"),
    [
        ("{max_epochs: 3}", [], -1),
        ("{max_epochs: 3, max_steps: 50}", [], 50),
        ("{max_epochs: 3}", ["trainer.max_steps=7"], 7),
        ("{max_epochs: 3}", ["+debug=fast"], 10),
        ("{max_epochs: 3}", ["trainer.max_epochs=-1"], 1000),
        ("{log_every_n_steps: 1}", [], 1000),
        ("{log_every_n_steps: 1}", ["trainer.max_epochs=3"], -1),
    ],
)
def test_number_of_epochs_in_a_file_removes_the_default_limit_of_steps(tmp_path, own, overrides, steps):
    file = tmp_path / "epochs" / "config.yaml"
    file.parent.mkdir()
    text = (ROOT / "experiments" / "template" / "config.yaml").read_text()
    file.write_text(text.replace("trainer: {max_steps: 30}", f"trainer: {own}"))
    assert compose(file, overrides).trainer.max_steps == steps


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("task.masking=.75", ["task.masking=.75", "`task.masking.ratio=0.75`"]),
        ("data.train=5", ["`data.train.size=5`"]),
        ("model.encoder=8", ["`model.encoder` is a section"]),
        ("task.optimization=1", ["`task.optimization` is a section", "layer_decay"]),
        ("task.masking=tube", ["`task.masking` is a section", "ratio"]),
        ("data.val=null", ["`data.val=null`", "`data.val`", "`data.val.size=64`"]),
        ("expected=3", ["`expected` is a section"]),
        ("expected.val/loss=3", ["`expected.val/loss.at_most=3`"]),
        ("~expected.val/loss", ["`expected.val/loss.at_most=…`", "`~expected`"]),
        ("optimizer=0.1", ["`optimizer=0.1`", "adamw", "`optimizer.<key>=…`"]),
        (".optimizer.lr=1", ["`optimizer.lr=…`"]),
        ("optimizer..lr=1", ["`optimizer.lr=…`"]),
        ("model/text_to_video@model=cogvideox_tiny", ["`model=text_to_video/cogvideox_tiny`"]),
        ("+model/text_to_video@model=cogvideox_tiny", ["`model=text_to_video/cogvideox_tiny`"]),
        ("model/text_to_video=cogvideox_tiny", ["`model=text_to_video/cogvideox_tiny`"]),
    ],
)
def test_wrong_kinds_of_overrides_raise_with_the_right_one(override: str, words: list[str]):
    with pytest.raises(ValueError, match=".*".join(map(re.escape, words))):
        compose(ROOT / "experiments" / "template" / "config.yaml", [override])


def test_number_in_place_of_a_section_in_a_file_raises(tmp_path):
    file = tmp_path / "own" / "config.yaml"
    file.parent.mkdir()
    text = (ROOT / "experiments" / "template" / "config.yaml").read_text()
    file.write_text(f"{text}\ntask: {{masking: 0.75}}\n")
    with pytest.raises(ValueError, match=r"`task\.masking` = 0\.75 .*_target_"):
        compose(file)


def test_the_override_with_the_wrong_group_is_named_among_others():
    others = ["task=tokenization", "data=moving_shapes", "model=hydra_tokenizer/tiny"]
    with pytest.raises(ValueError, match=r"`model/quantizer@model\.quantizer=vq`.*`model/quantizer=vq`"):
        compose(ROOT / "experiments" / "template" / "config.yaml", [*others, "model/quantizer@model.quantizer=vq"])
