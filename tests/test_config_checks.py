"""Rules of single nodes and keys, called directly: targets, kinds of values, suggestions, sizes and environment."""

import ast
import textwrap
from inspect import Parameter
from pathlib import Path
from typing import Any

import pytest
from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import OmegaConf

from blueberry_video.config import checks, compose, expand_sweep, load, safety, signatures, sweep_settings, validate
from blueberry_video.config.compose import normalize
from blueberry_video.config.text import did_you_mean, short

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = {
    "__init__.py": "from .shelf import Tool, Box as Crate\nfrom .cellar import Rope, Lamp\nfrom .stars import *\n",
    "shelf.py": """
        import json
        from dataclasses import dataclass
        from shop.cellar import Lamp as Light
        from typing import Literal

        class Base:
            def __init__(self, width: int, depth: int = 3, *, color: Literal["red", "blue", 5] = "red", **rest):
                pass
            def method(self, a):
                pass

        class Tool(Base):
            class Handle:
                def __init__(self, grip: float):
                    pass

        @dataclass
        class Box:
            side: int
            lid: bool = True

        @dataclass
        class Chest(Box):
            lid: bool = False
            lock: str | None = None

        class Bare:
            pass

        class Odd(unknown.Thing):
            pass

        if True:
            Alias = Tool
        try:
            import missing
        except ImportError:
            def fallback(a, /, b: int = -1, *args, c=None):
                pass
    """,
    "cellar/__init__.py": """
        from .deep.er import Rope
        from ..shelf import Bare as Naked
        class Lamp:
            def __init__(self, volts: float = 1.5):
                pass
    """,
    "cellar/deep/__init__.py": "",
    "cellar/deep/er.py": "from ... import shelf\nfrom .. import Lamp as Above\nclass Rope:\n    pass\n",
    "stars.py": "from .more import *\nfirst = 1\n",
    "more.py": "class Starred:\n    def __init__(self, x):\n        pass\n",
}


@pytest.fixture
def shop(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Package of classes in ``shop``, of which ``shop.cellar`` is refused."""
    for name, text in PACKAGE.items():
        file = tmp_path / "shop" / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(textwrap.dedent(text))
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(checks, "CLASSES", ("shop",))
    monkeypatch.setattr(checks, "REFUSED", ("shop.cellar",))
    monkeypatch.setattr(checks, "FUNCTIONS", ("shop.shelf.fallback",))
    for cached in (signatures.signature, signatures._file, signatures._bindings):
        cached.cache_clear()
    yield tmp_path
    for cached in (signatures.signature, signatures._file, signatures._bindings):
        cached.cache_clear()


# ---- signatures ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("target", "home", "parameters", "is_open"),
    [
        ("shop.Tool", "shop.shelf", ["width", "depth", "color"], True),
        ("shop.shelf.Alias", "shop.shelf", ["width", "depth", "color"], True),
        ("shop.Crate", "shop.shelf", ["side", "lid"], False),
        ("shop.shelf.Chest", "shop.shelf", ["side", "lid", "lock"], False),
        ("shop.shelf.Bare", "shop.shelf", [], False),
        ("shop.shelf.Light", "shop.cellar", ["volts"], False),
        ("shop.shelf.Tool.Handle", "shop.shelf", ["grip"], False),
        ("shop.Lamp", "shop.cellar", ["volts"], False),
        ("shop.Rope", "shop.cellar.deep.er", [], False),
        ("shop.cellar.deep.er.Above", "shop.cellar", ["volts"], False),
        ("shop.cellar.deep.er.shelf.Tool", "shop.shelf", ["width", "depth", "color"], True),
        ("shop.Starred", "shop.more", ["x"], False),
        ("shop.cellar.Naked", "shop.shelf", [], False),
        ("shop.shelf.fallback", "shop.shelf", ["a", "b", "c"], False),
        ("shop.shelf.Base.method", "shop.shelf", ["a"], False),
        ("shop.shelf.Tool.method", "shop.shelf", ["a"], False),
    ],
)
def test_signature_is_found_through_re_exports(shop, target: str, home: str, parameters: list[str], is_open: bool):
    found = signatures.signature(target)
    assert (found.home, list(found.parameters), found.open) == (home, parameters, is_open)
    assert found.is_method == target.endswith(".method")
    assert found.is_class == (target.rpartition(".")[2] not in ("method", "fallback"))


def test_defaults_and_kinds_of_parameters(shop):
    found = signatures.signature("shop.Tool").parameters
    assert [p.default for p in found.values()] == [Parameter.empty, 3, "red"]
    assert [p.kind is Parameter.KEYWORD_ONLY for p in found.values()] == [False, False, True]
    assert [p.default for p in signatures.signature("shop.shelf.Chest").parameters.values()] == [
        Parameter.empty,
        False,
        None,
    ]
    found = signatures.signature("shop.shelf.fallback").parameters
    assert [p.default for p in found.values()] == [Parameter.empty, -1, None]


@pytest.mark.parametrize(
    ("target", "error"),
    [
        ("shop.shelf", TypeError),
        ("shop.nothing", (AttributeError, ImportError)),
        ("no_such_package.X", ImportError),
        ("blueberry_video.models.vit.Nothing", AttributeError),
    ],
)
def test_target_without_signature_raises(shop, target: str, error: Any):
    with pytest.raises(error):
        signatures.signature(target)


def test_existing_alternatives_of_a_name(shop):
    assert set(signatures.names("shop.shlef.Tool")) >= {"shop.shelf.Tool", "shop.cellar.Tool", "shop.more.Tool"}
    assert "shop.shelf.Base" in signatures.names("shop.shelf.Bass")
    assert signatures.names("no_such_package.X") == []


@pytest.mark.parametrize(
    ("annotation", "kinds", "choices"),
    [
        ("int", {"int"}, ()),
        ("'float | None'", {"float", "None"}, ()),
        ("Optional[str]", {"str", "None"}, ()),
        ("Union[int, Sequence[int]]", {"int", "list"}, ()),
        ("dict[str, int] | bool", {"dict", "bool"}, ()),
        ("Literal['a', 3] | int", {"int"}, ("a", 3)),
        ("float | Tensor", {"float"}, ()),
        ("Callable", None, ()),
        ("int | Callable", None, ()),
        ("nn.Module", None, ()),
    ],
)
def test_kinds_of_an_annotation(annotation: str, kinds: set | None, choices: tuple):
    tree = ast.parse(annotation, mode="eval").body
    found = signatures.accepted(Parameter("x", Parameter.KEYWORD_ONLY, annotation=tree))
    assert found == (None if kinds is None else frozenset(kinds), choices)
    optional = Parameter("x", Parameter.KEYWORD_ONLY, annotation=tree, default=None)
    assert signatures.accepted(optional)[0] == (None if kinds is None else frozenset(kinds | {"None"}))


# ---- targets ---------------------------------------------------------------------------------------------------------


def refused(node: dict, allow: tuple[str, ...] = (), path: str = "model.x", root: str = "model") -> str:
    with pytest.raises(ValueError, match=r"`[\w.\[\]]+`") as caught:
        checks.check_node(node, path, root, allow)
    return str(caught.value)


@pytest.mark.parametrize(
    "target", ["shop.Rope", "shop.Lamp", "shop.shelf.Light", "shop.cellar.Lamp", "shop.cellar.Naked"]
)
def test_class_re_exported_from_a_refused_module_is_refused(shop, target: str):
    assert f"`model.x._target_` = {target} is not allowed" in refused({"_target_": target})
    for allow in ((target,), ("shop.cellar",) if target.startswith("shop.cellar") else (target, "shop.cellar")):
        checks.check_node({"_target_": target}, "model.x", "model", allow)


@pytest.mark.parametrize("name", ["IterDataPipe", "MapDataPipe", "DFIterDataPipe", "functional_datapipe"])
def test_data_pipes_of_torch_are_refused(name: str):
    assert f"torch.utils.data.{name} is not allowed" in refused({"_target_": f"torch.utils.data.{name}"})


@pytest.mark.parametrize(
    ("target", "is_valid"),
    [
        ("shop.shelf.Bare", True),
        ("shop.shelf.fallback", True),
        ("shop.shelf.Tool.method", False),
        ("shop.shelf._Private", False),
        ("shop._hidden.Bare", False),
        ("shopping.Bare", False),
        ("shop.shelf.json.loads", False),
    ],
)
def test_public_classes_and_listed_functions_are_valid(shop, target: str, is_valid: bool):
    node = {"_target_": target, **dict.fromkeys(("width",) if target.endswith("method") else (), 1)}
    if "fallback" in target:
        node["a"] = 1
    if is_valid:
        checks.check_node(node, "model.x", "model")
    else:
        assert target in refused(node)


def test_parameters_of_a_node(shop):
    tool = {"_target_": "shop.Tool", "width": 4}
    checks.check_node(tool, "model.x", "model")
    checks.check_node({**tool, "anything": 1}, "model.x", "model")  # `**rest` takes it
    assert "`model.x.widht` = 5" in refused({**tool, "widht": 5}), "a typo, although `**rest` takes it"
    assert "`model.x.width` is missing" in refused({"_target_": "shop.Tool", "depth": 4})
    checks.check_node({"_target_": "shop.Tool", "_args_": [4]}, "model.x", "model")
    checks.check_node({"_target_": "shop.Tool", "_partial_": True}, "model.x", "model")
    box = {"_target_": "shop.Crate", "side": 1}
    checks.check_node(box, "model.x", "model")
    message = refused({**box, "unrelated": 1})  # no near name
    assert "`model.x.unrelated` = 1 is not a parameter of shop.Crate" in message
    assert "`model.x[1].side` is missing" in refused([box, {"_target_": "shop.Crate"}], path="model.x")
    assert "`model.x.inner.lid` = 3 " in refused({**tool, "inner": {**box, "lid": 3}})


@pytest.mark.parametrize(
    ("key", "value", "words"),
    [
        ("width", 4.0, ["`model.x.width` = 4.0", "`model.x.width=4`"]),
        ("width", 4.5, ["`model.x.width` = 4.5", "takes int."]),
        ("width", True, ["`model.x.width` = True", "takes int."]),
        ("width", None, ["`model.x.width` = null", "takes int."]),
        ("width", [1], ["`model.x.width` = [1]", "takes int."]),
        ("depth", "deep", ["`model.x.depth` = deep", "takes int (its default is 3)."]),
        ("color", "blu", ["`model.x.color` = blu", "`blue`"]),
        ("color", 6, ["`model.x.color` = 6", "takes 'red' or 'blue' or 5 (its default is 'red')."]),
    ],
)
def test_wrong_kind_of_a_value(shop, key: str, value: Any, words: list[str]):
    message = refused({"_target_": "shop.Tool", "width": 1, key: value})
    assert [word for word in words if word not in message] == [], message
    checks.check_node({"_target_": "shop.Tool", "width": 1, "color": 5}, "model.x", "model")


def test_integer_is_a_float_and_a_float_is_no_integer(shop):
    checks.check_node({"_target_": "shop.Lamp", "volts": 3}, "model.x", "model", ("shop.cellar", "shop.Lamp"))
    assert "= high has the wrong type: shop.Lamp takes float (its default is 1.5)" in refused(
        {"_target_": "shop.Lamp", "volts": "high"}, ("shop.cellar", "shop.Lamp")
    )


# ---- rules between keys ----------------------------------------------------------------------------------------------

VIT = {"_target_": "blueberry_video.models.vit.VisionTransformer", "image_size": 32, "patch_size": 8, "num_frames": 16}
VIT |= {"tubelet_size": 2, "embed_dim": 24, "depth": 2, "num_heads": 3}
SPRITES = {"_target_": "blueberry_video.data.sprites.Sprites", "num_frames": 16, "image_size": 32}


def invalid(config: dict) -> str:
    with pytest.raises(ValueError, match="`") as caught:
        validate(config)
    return str(caught.value)


@pytest.mark.parametrize(
    ("key", "value", "near", "other"),
    [
        ("image_size", 33, "image_size=32", "patch_size=11"),
        ("image_size", [32, 44], "image_size=48", "patch_size=11"),
        ("image_size", 3, "image_size=8", "patch_size=3"),
        ("num_frames", 15, "num_frames=16", "tubelet_size=1"),
        ("embed_dim", 25, "embed_dim=24", "num_heads=1"),
        ("embed_dim", 35, "embed_dim=36", "num_heads=1"),
    ],
)
def test_sizes_that_do_not_divide_name_the_nearest(key: str, value: Any, near: str, other: str):
    message = invalid({"model": {"encoder": {**VIT, key: value}}})
    assert f"`model.encoder.{key}` = {value} " in message
    assert f"`model.encoder.{near}`" in message
    assert f"`model.encoder.{other}`" in message


def test_clips_have_the_size_of_the_encoder():
    def config(**sprites: Any) -> dict:
        return {"model": {"encoder": VIT}, "data": {"train": SPRITES, "val": {**SPRITES, **sprites}}}

    validate(config())
    validate(config(image_size=[32, 32]))
    message = invalid(config(image_size=[32, 48]))
    assert "`data.val.image_size=32`" in message
    assert "`model.encoder.image_size=[32, 48]`" in message
    message = invalid(config(num_frames=8))
    assert "`data.val.num_frames` = 8" in message
    assert "`model.encoder.num_frames=8`" in message
    short_clips = {key: value for key, value in SPRITES.items() if key != "num_frames"}
    wide = {**VIT, "num_frames": 64}
    message = invalid({"model": {"encoder": wide}, "data": {"train": short_clips}})
    assert "Write `+data.train.num_frames=64`" in message, "the key is not set"


@pytest.mark.parametrize(
    ("frames", "near"), [(1, None), (2, (1, 5)), (4, (1, 5)), (5, None), (6, (5, 9)), (16, (13, 17))]
)
def test_clips_of_a_causal_autoencoder(frames: int, near: tuple[int, int] | None):
    data = [("data.train", {**SPRITES, "num_frames": frames})]
    autoencoder = {"_target_": SPRITES["_target_"], "frame_step": 4}
    if near is None:
        checks._check_frame_step(data, autoencoder, "model.autoencoder")
    else:
        with pytest.raises(ValueError, match=rf"`data\.train\.num_frames` = {frames} .*={near[0]}`.*={near[1]}`"):
            checks._check_frame_step(data, autoencoder, "model.autoencoder")
    for step in (0, None, "4"):
        checks._check_frame_step(data, {**autoencoder, "frame_step": step}, "model.autoencoder")


@pytest.mark.parametrize("precision", [16, "16", "16-mixed", "16-true", "bf16-mixed", "bf16-true", "32-true", None])
@pytest.mark.parametrize("where", ["trainer", "plugin"])
def test_float16_of_a_model_that_overflows(precision: Any, where: str):
    plugin = {"_target_": "lightning.pytorch.plugins.MixedPrecision", "precision": precision}
    trainer = {"precision": precision} if where == "trainer" else {"plugins": [plugin]}
    for target in checks.HALF_OVERFLOWS:
        node = {"_target_": target, "positions": "rotary"}
        if str(precision).startswith("16"):
            with pytest.raises(ValueError, match=rf"precision` = {precision} and `model\.x\._target_` = {target}"):
                checks._check_half(trainer, node, "model.x")
        else:
            checks._check_half(trainer, node, "model.x")
    checks._check_half({"precision": "16-mixed"}, VIT, "model.x")
    checks._check_half({"precision": "16-mixed"}, {"_target_": target, "positions": "sincos"}, "model.x")


def test_float16_is_checked_in_a_whole_config():
    config = {"model": {"transformer": {"_target_": checks.HALF_OVERFLOWS[0]}}, "trainer": {"precision": "16-true"}}
    assert "`trainer.precision=bf16-mixed`" in invalid(config)
    validate({**config, "trainer": {}})


@pytest.mark.parametrize(
    ("key", "value", "is_valid"),
    [
        ("seed", 2**32 - 1, True),
        ("seed", 2**32, False),
        ("seed", 0, True),
        ("optimizer.lr", 0, True),
        ("optimizer.lr", float("inf"), False),
        ("trainer.max_steps", -1, True),
        ("trainer.max_steps", -2, False),
        ("trainer.max_steps", 1, True),
        ("trainer.max_epochs", 0, False),
        ("trainer.max_epochs", -1, True),
        ("trainer.accumulate_grad_batches", -1, False),
        ("trainer.log_every_n_steps", -1, False),
        ("data.batch_size", -1, False),
        ("data.batch_size", 1, True),
        ("trainer.devices", "auto", True),
        ("trainer.devices", -1, True),
        ("trainer.devices", "-1", True),
        ("trainer.devices", "3", True),
        ("trainer.devices", -2, False),
        ("trainer.devices", [0, 3], True),
        ("trainer.devices", [], False),
        ("trainer.devices", ["0"], False),
        ("name", "...", False),
        ("name", "a.b", True),
    ],
)
def test_ranges_of_root_values(key: str, value: Any, is_valid: bool):
    config = OmegaConf.create({"name": "x", "seed": 1, "trainer": {}, "optimizer": {}, "data": {}})
    OmegaConf.update(config, key, value)
    plain: Any = OmegaConf.to_container(config)
    if is_valid:
        checks._check_root_values(plain)
    else:
        with pytest.raises(ValueError, match=rf"`{key}` = "):
            checks._check_root_values(plain)


# ---- text ------------------------------------------------------------------------------------------------------------


def test_nearest_option():
    assert did_you_mean("dpeth", ["width", "depth"]) == "Did you mean `depth`?"
    assert did_you_mean("zzz", ["width", "depth"]) == "Choose one of: depth, width."
    assert did_you_mean("depth", ["width", "depth"]) == ""
    assert did_you_mean("zzz", []) == "There are no options."


@pytest.mark.parametrize(
    ("value", "text"),
    [(None, "null"), ("", "''"), ("a", "a"), (3, "3"), ("x" * 60, "x" * 60), ("x" * 61, "x" * 57 + "…"), ([1], "[1]")],
)
def test_short_values(value: Any, text: str):
    assert short(value) == text


# ---- environment and overrides ---------------------------------------------------------------------------------------


def test_names_in_the_environment_and_on_the_command_line_are_trusted(monkeypatch: pytest.MonkeyPatch):
    parse = OverridesParser.create().parse_overrides
    monkeypatch.delenv(safety.ALLOW_VARIABLE, raising=False)
    assert safety.trusted_targets([]) == ()
    monkeypatch.setenv(safety.ALLOW_VARIABLE, " a.b, c  d ")
    overrides = parse(["seed=1", "allow_targets=[e,f]", "name=[g]"])
    assert safety.trusted_targets(overrides) == ("a.b", "c", "d", "e", "f")


def test_other_environment_variables_are_not_read(monkeypatch: pytest.MonkeyPatch):
    for name in (*safety.ENVIRONMENT, "SECRET"):
        monkeypatch.setenv(name, f"value of {name}")
    read = {name: OmegaConf.create({"x": f"${{oc.env:{name}}}"}).x for name in safety.ENVIRONMENT}
    assert read == {name: f"value of {name}" for name in safety.ENVIRONMENT}
    with pytest.raises(Exception, match="SECRET"):
        _ = OmegaConf.create({"x": "${oc.env:SECRET}"}).x
    monkeypatch.delenv("SCRATCH")
    assert OmegaConf.create({"x": "${oc.env:SCRATCH,none}"}).x == "none"


def test_hydra_settings_equal_to_the_trusted_ones_are_valid():
    trusted = {"launcher": {"_target_": "a", "list": [1, 2]}, "run": {"dir": "x"}, "empty": {}}
    safety.check_hydra({**trusted, "runtime": {"cwd": "/"}, "job": {"name": "n", "num": 3}}, trusted, "f")
    for settings, key in (
        ({"launcher": {"_target_": "b"}}, "launcher._target_"),
        ({"launcher": {"list": [1, 3]}}, "launcher.list.1"),
        ({"run": {"dir": "y"}}, "run.dir"),
        ({"job": {"env_set": {"A": "b"}}}, "job.env_set.A"),
        ({"job": {"names": 1}}, "job.names"),
    ):
        with pytest.raises(ValueError, match=rf"`hydra\.{key}`"):
            safety.check_hydra(settings, trusted, "f")
    safety.check_hydra({"launcher": {"timeout_min": 3}, "sweep": {"dir": "x"}}, trusted, "f")
    with pytest.raises(ValueError, match=r"`hydra\.sweep\.dir`"):
        safety.check_hydra({"sweep": {"dir": "a\nb"}}, trusted, "f")


def test_values_are_text_numbers_and_null():
    safety.check_values({"a": [1, 2.5, None, True, {"b": "$x {y}"}], 3: "x"})
    invalid_values = (({"a": {"b": [b"x"]}}, r"a\.b\[0\]"), ({"a": ["x", "${y}"]}, r"a\[1\]"), ({"a": Path("x")}, "a"))
    for value, key in invalid_values:
        with pytest.raises(ValueError, match=rf"`{key}` = "):
            safety.check_values(value)
    with pytest.raises(ValueError, match=r"`a` has the key .*bytes"):
        safety.check_values({"a": {b"k": 1}})


def test_normalized_overrides():
    assert normalize(["seed=1", "~trainer.max_epochs"]) == ["seed=1", "~trainer.max_epochs", "++trainer.max_steps=-1"]
    assert normalize(["+trainer.max_epochs=3", "trainer.max_steps=5"])[-1] == "trainer.max_steps=5"
    assert normalize(["expected.loss.at_most=1"]) == ["expected.loss.at_most=1"]


@pytest.fixture
def experiment(tmp_path: Path) -> Path:
    file = tmp_path / "test" / "config.yaml"
    file.parent.mkdir()
    file.write_text(
        "defaults: [train, override model: videomae/tiny, override task: masked_pixels, override data: sprites, _self_]"
        "\nname: test\n"
    )
    return file


def test_glob_of_a_sweep_is_expanded_and_matches_a_choice(experiment: Path):
    (experiment.parent / "schedule").mkdir()
    (experiment.parent / "schedule" / "warmup_mine.yaml").write_text("a: 1\n")
    jobs = expand_sweep(["schedule=glob(warmup*)", "seed=interval(3,9)"], experiment)
    assert [job[0] for job in jobs] == sorted(job[0] for job in jobs)
    assert "schedule=warmup_mine" in [job[0] for job in jobs]
    assert {float(job[1].removeprefix("seed=")) for job in jobs} == {3.0}
    with pytest.raises(ValueError, match=r"`schedule=glob\(nothing\*\)`.*`schedule=a,b`.*warmup_mine"):
        expand_sweep(["schedule=glob(nothing*)"], experiment)


def test_folder_of_a_sweep(experiment: Path):
    assert sweep_settings(experiment, ["hydra.sweep.dir=mine/${name}", "name=x"]) == ("mine/x", "basic")


def test_saved_config_takes_additions_and_deletions_once_or_twice(experiment: Path, tmp_path: Path):
    saved = tmp_path / "saved.yaml"
    words = ["+trainer.max_time=00:01:00:00", "~callbacks.media"]
    saved.write_text(OmegaConf.to_yaml(compose(experiment)))
    once = load(saved, words)
    assert (once.trainer.max_time, "media" in once.callbacks) == ("00:01:00:00", False)
    assert "media" in load(saved).callbacks
    saved.write_text(OmegaConf.to_yaml(once))
    assert load(saved, words) == once


def test_saved_config_of_an_earlier_version_raises(experiment: Path, tmp_path: Path):
    config = compose(experiment)
    run = tmp_path / "run"
    run.mkdir()
    for key in ("model.encoder.old_key", "task._target_"):
        changed = config.copy()
        OmegaConf.set_struct(changed, False)
        OmegaConf.update(changed, key, "blueberry_video.gone.Away", force_add=True)
        (run / "config.yaml").write_text(OmegaConf.to_yaml(changed))
        with pytest.raises(ValueError, match=rf"`{key}` = blueberry_video\.gone\.Away .*git checkout.*init_from="):
            load(run / "config.yaml")


@pytest.mark.parametrize("root", ["model", "trainer", "schedule"])
def test_component_has_a_target(root: str):
    assert f"`{root}` has no `_target_`" in refused({"depth": 3}, path=root, root=root)
    checks.check_node({}, root, root)
    checks.check_node({"depth": {"a": 3}}, f"{root}.options", root)
    assert f"`{root}.options._partail_` = 3 is not a key. Did you mean `{root}.options._partial_`" in refused(
        {"_partail_": 3}, path=f"{root}.options", root=root
    )


def test_callbacks_are_nodes_or_disabled():
    callback = {"_target_": "lightning.pytorch.callbacks.LearningRateMonitor"}
    checks.check_node({"mine": callback, "media": None}, "callbacks", "callbacks")
    for value, key in ((None, "meda"), (3, "media"), ({"every_n_steps": 3}, "media")):
        message = refused({"mine": callback, key: value}, path="callbacks", root="callbacks")
        assert f"`callbacks.{key}` = " in message
    assert "`media`" in refused({"meda": None}, path="callbacks", root="callbacks")


@pytest.mark.parametrize(
    ("path", "key", "instead"),
    [
        ("task", "model", "model"),
        ("task.optimization", "optimizer", "optimizer"),
        ("task.optimization", "init_from", "init_from"),
        ("trainer", "callbacks", "callbacks"),
        ("trainer", "default_root_dir", "output_dir"),
        ("logger", "run", "output_dir"),
    ],
)
def test_arguments_that_train_passes_are_refused(path: str, key: str, instead: str):
    targets = {"task": "blueberry_video.tasks.masked_pixels.MaskedPixels", "trainer": "lightning.Trainer"}
    targets |= {"logger": "blueberry_video.experiment.loggers.Wandb"}
    targets |= {"task.optimization": "blueberry_video.tasks.settings.Optimization"}
    message = refused({"_target_": targets[path], key: "x"}, path=path, root=path.partition(".")[0])
    assert f"`{path}.{key}` = x: " in message
    assert f"the root key `{instead}` instead" in message


@pytest.mark.parametrize("path", ["optimizer", "schedule", "task.optimization"])
@pytest.mark.parametrize("partial", [None, False, True])
def test_factories_are_partial(path: str, partial: bool | None):
    targets = {"optimizer": "torch.optim.AdamW", "schedule": "blueberry_video.optim.warmup_cosine"}
    node = {"_target_": targets.get(path, "blueberry_video.tasks.settings.Optimization"), "_partial_": partial}
    if partial:
        checks.check_node(node, path, path.partition(".")[0])
    else:
        message = refused({key: value for key, value in node.items() if value is not None}, path=path, root="x")
        assert f"`{path}` must have `_partial_: true`" in message


@pytest.mark.parametrize("strategy", ["fsdp", "fsdp_cpu_offload", "lightning.pytorch.strategies.FSDPStrategy"])
def test_fsdp1_raises(strategy):
    node = {"_target_": strategy} if "." in strategy else strategy
    with pytest.raises(ValueError, match=rf"`trainer\.strategy` = {strategy}.*`trainer=fsdp`"):
        validate({"trainer": {"strategy": node}})


@pytest.mark.parametrize("precision", ["16-mixed", "64-true"])
def test_precisions_that_fsdp2_does_not_have_raise(precision):
    with pytest.raises(ValueError, match=rf"`trainer\.precision` = {precision}.*`trainer\.precision=bf16-mixed`"):
        validate({"trainer": {"strategy": {"_target_": checks.SHARDED}, "precision": precision}})
    validate({"trainer": {"strategy": "ddp", "precision": precision}})
