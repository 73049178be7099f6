"""A config from elsewhere cannot run code, write files of its choice, read secrets or authorize itself."""

from pathlib import Path

import pytest
from omegaconf import OmegaConf

from blueberry_video.config import compose, load, resolve, trusted_targets

DEFAULTS = "override model: videomae/tiny, override task: masked_pixels, override data: sprites, _self_"
CALLBACK = "callbacks: {x: {_target_: %s, _args_: [a, b]}}"
JSON = "task: {input: {augment: {_target_: json.JSONEncoder, indent: 2}}}"


def write(folder: Path, values: str, before: str = "", other: dict[str, str] | None = None) -> Path:
    """Writes an experiment, with ``before`` among its defaults, and local group files."""
    files = {**(other or {}), "config.yaml": f"defaults: [train, {before} {DEFAULTS}]\nname: test\n{values}\n"}
    for name, text in files.items():
        file = folder / "test" / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
    return folder / "test" / "config.yaml"


@pytest.mark.parametrize(
    "target",
    [
        "blueberry_video.atomic.write_whole",
        "blueberry_video.video.source.open_source",
        "blueberry_video.video.process.VideoProcessor",
        "blueberry_video.experiment.run_folder.RunFolder",
        "blueberry_video.launch.dry_run.Findings",
        # functions and methods in packages of classes
        "blueberry_video.data.write.write_video",
        "blueberry_video.optim.parameter_groups",
        "blueberry_video.data.datamodule.DataModule.list_skipped_in",
        "torch.nn.functional.relu",
        "torch.nn.init.zeros_",
        "torch.profiler.tensorboard_trace_handler",
        "torch.utils.data.random_split",
        # imports
        "blueberry_video.data.clip_cache.Path",
        "lightning.pytorch.callbacks.model_checkpoint.get_filesystem",
    ],
)
def test_only_classes_and_listed_functions_are_targets(tmp_path: Path, target: str):
    with pytest.raises(ValueError, match=rf"`callbacks\.x\._target_` = {target}"[:80]):
        compose(write(tmp_path, CALLBACK % target))


@pytest.mark.parametrize("where", ["allow_targets: [json]", "hydra: {sweeper: {params: {allow_targets: '[json]'}}}"])
def test_a_file_does_not_authorize_itself(tmp_path: Path, where: str):
    with pytest.raises(ValueError, match=r"`(task\.input\.augment\._target_|hydra\.sweeper\.params\.allow_targets)` ="):
        compose(write(tmp_path, f"{where}\n{JSON}"))


def test_command_line_environment_and_ranks_allow_targets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    file = write(tmp_path, f"allow_targets: [json]\n{JSON}")
    config = compose(file, ["allow_targets=[json]"])
    saved = tmp_path / "saved.yaml"
    saved.write_text(OmegaConf.to_yaml(config))
    with pytest.raises(ValueError, match=r"JSONEncoder.*`allow_targets=\[json\]`.*BLUEBERRY_ALLOW_TARGETS=json"):
        load(saved)
    with pytest.raises(ValueError, match="JSONEncoder"):
        resolve(config)
    assert load(saved, ["allow_targets=[json]"]) == load(saved, trusted=True) == config
    assert resolve(config, allow=trusted_targets(["seed=1", "++allow_targets=[json]"])) == config
    monkeypatch.setenv("BLUEBERRY_ALLOW_TARGETS", "other, json")
    assert compose(file) == load(saved) == resolve(config, allow=trusted_targets([])) == config


@pytest.mark.parametrize(
    ("value", "word"),
    [
        ("!!binary aGVsbG8=", "!!binary"),
        ("!!python/object/apply:pathlib.PosixPath [a]", "pathlib.PosixPath"),
        ("!!timestamp 2020-01-01", "!!timestamp"),
        ("!!str 3", "!!str"),
    ],
)
def test_yaml_tags_raise(tmp_path: Path, value: str, word: str):
    file = write(tmp_path, f"output_dir: {value}")
    for read in (compose, load):
        with pytest.raises(ValueError, match=rf"config\.yaml, line 3.*{word}"):
            read(file)


@pytest.mark.parametrize("value", ["!!binary aGVsbG8=", "!!python/object/apply:pathlib.PosixPath [a]"])
def test_path_and_bytes_of_an_included_file_raise(tmp_path: Path, value: str):
    group = {"extra/x.yaml": f"# @package _global_\ntask: {{input: {{augment: {value}}}}}\n"}
    with pytest.raises(ValueError, match=r"`task\.input\.augment` = .* (bytes|PosixPath)\b"):
        compose(write(tmp_path, "", "/extra: x,", group))


@pytest.mark.parametrize(
    "value", ["${oc.env:BLUEBERRY_SECRET}", "'x${oc.env:BLUEBERRY_SECRET,none}'", "${oc.env:${name}}"]
)
def test_secrets_are_not_read(tmp_path: Path, value: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("BLUEBERRY_SECRET", "hunter2")
    with pytest.raises(ValueError, match=r"`init_from`.*oc\.env:(BLUEBERRY_SECRET|test)\b") as caught:
        compose(write(tmp_path, f"init_from: {value}"))
    assert "hunter2" not in str(caught.value)


def test_listed_environment_variables_are_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("SCRATCH", "/scratch/me")
    assert compose(write(tmp_path, "init_from: ${oc.env:SCRATCH}/a")).init_from == "/scratch/me/a"


def test_text_that_becomes_an_interpolation_raises(tmp_path: Path):
    value = "'\\${oc.create:{_target_:os.system,command:ls}}'"
    with pytest.raises(ValueError, match=r"`task\.input\.augment` = .*os\.system"):
        compose(write(tmp_path, f"task: {{input: {{augment: {value}}}}}"))


COPY = "{_target_: shutil.copy, src: a, dst: b}"


@pytest.mark.parametrize(
    ("values", "before", "group", "key"),
    [
        (f"hydra: {{callbacks: {{x: {COPY}}}}}", "", {}, r"hydra\.callbacks\.x\._target_"),
        ("hydra: {searchpath: ['pkg://os']}", "", {}, r"hydra\.searchpath\.0"),
        ("hydra: {job: {env_set: {LD_PRELOAD: x}}}", "", {}, r"hydra\.job\.env_set\.LD_PRELOAD"),
        (f"hydra: {{launcher: {COPY}}}", "", {}, r"hydra\.launcher\._target_"),
        ("hydra: {launcher: {setup: [touch x]}}", "", {}, r"hydra\.launcher\.setup\.0"),
        ('hydra: {launcher: {partition: "a\\ntouch x"}}', "", {}, r"hydra\.launcher\.partition"),
        (f"hydra: {{launcher: {{name: {COPY}}}}}", "", {}, r"hydra\.launcher\.name\._target_"),
        (f"hydra: {{job_logging: {{handlers: {{x: {COPY}}}}}}}", "", {}, r"hydra\.job_logging\.handlers\.x\._target_"),
        ("", "evil@hydra.callbacks: x,", {"evil/x.yaml": f"x: {COPY}"}, r"hydra\.callbacks\.x\._target_"),
        ("", "/extra: x,", {"extra/x.yaml": "# @package hydra.job.env_set\nA: b"}, r"hydra\.job\.env_set\.A"),
        ("", "override hydra/launcher: x,", {"hydra/launcher/x.yaml": COPY}, r"hydra/launcher=x"),
        ("", "override hydra/launcher: basic,", {"hydra/job_logging/none.yaml": f"root: {COPY}"}, None),  # not read
    ],
)
def test_hydra_settings_of_a_file_raise(tmp_path: Path, values: str, before: str, group: dict, key: str | None):
    file = write(tmp_path, values, before if not before.startswith("override") else "", group)
    if before.startswith("override"):
        file.write_text(file.read_text().replace("_self_", f"{before.rstrip(',')}, _self_"))
    if key is None:
        compose(file)
        return
    with pytest.raises(ValueError, match=key):
        compose(file)


def test_resources_of_a_sweep_may_be_set(tmp_path: Path):
    compose(write(tmp_path, "hydra: {sweep: {dir: outputs/sweep}, sweeper: {max_batch_size: 2}}"))
    with pytest.raises(ValueError, match=r"`hydra\.launcher\.timeout_min`"):  # a key of the Slurm launcher
        compose(write(tmp_path, "hydra: {launcher: {timeout_min: 3}}"))
