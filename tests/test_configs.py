"""Every file of conf/ composes, is valid, and instantiates its target, with models on the meta device."""

import ast
import inspect
import pkgutil
import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import yaml
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf
from torch import nn

from blueberry_video.config import CONF, checks, compose, load, with_classes
from blueberry_video.data.sprites import Sprites

FILES = sorted(
    str(path.relative_to(CONF).with_suffix(""))
    for path in CONF.rglob("*.yaml")
    if path.parent not in (CONF, CONF / "video", CONF / "cluster") and path != CONF / "task/base.yaml"
)  # video/: settings of the video pipeline; cluster/: profiles of `submit`; task/base: a part of every task
ENCODERS = ("model/vit", "model/hydra_video/", "model/spool/", "model/dinov2/")  # parts of a network
PARTS = {  # parts of a text-to-video model or of its task: group → key in the config
    "model/cogvideox/": "model.transformer",
    "model/hunyuan_video/": "model.transformer",
    "model/text/": "model.text",
    "model/autoencoder/": "model.autoencoder",
    "model/lora/": "model.lora",
    "task/sampler/": "task.sampler",
    "task/guidance/": "task.guidance",
    "model/quantizer/": "model.quantizer",
    "task/adversarial/": "task.adversarial",
    "task/frechet/": "task.frechet",
    "task/perceptual/": "task.perceptual",
}
TOKENIZER_PARTS = ("model/quantizer", "task/adversarial", "task/frechet", "task/perceptual")
DEPTH = ("model/depth_anything/", "model/video_depth_anything/")  # tests/models/depth_anything/test_depth_configs.py
SPLATTING = ["task=splatting", "data=world_scene", "optimizer=splatting", "schedule=exponential"]
NO_ENCODER = (
    "model/gaussian_splatting/",
    "model/text_to_video/",
    "model/video_vae/",
    "model/hydra_generator/",
    "model/hydra_tokenizer/",
)
OTHER = (*ENCODERS, *PARTS, *NO_ENCODER, *DEPTH)
MODELS = [name for name in FILES if name.startswith("model/") and not name.startswith(OTHER)]
EXPERIMENT = """
# run: nothing, a test
defaults: [train, override model: videomae/tiny, override task: masked_pixels, override data: sprites, _self_]
name: test
"""


@pytest.fixture
def experiment(tmp_path: Path) -> Path:
    file = tmp_path / "experiment" / "config.yaml"
    file.parent.mkdir()
    file.write_text(EXPERIMENT)
    return file


def overrides_for(name: str) -> list[str]:
    """Overrides that add a file of conf/ to an experiment that can run."""
    group, _, choice = name.partition("/")
    if name.startswith(tuple(PARTS)):
        return part_overrides(*name.rsplit("/", 1))
    match group:
        case "model" if choice.startswith("text_to_video/"):
            paths = [] if choice.endswith("tiny") else ["model.text.path=somewhere", "model.autoencoder.path=somewhere"]
            return [f"model={choice}", "task=diffusion", "data=moving_shapes", *paths]
        case "task" if choice.startswith("diffusion"):
            return [f"task={choice}", "model=text_to_video/cogvideox_tiny", "data=moving_shapes"]
        case "model" if choice.startswith("gaussian_splatting/"):
            return [f"model={choice}", *SPLATTING]
        case "task" | "optimizer" if choice == "splatting":
            return ["model=gaussian_splatting/tiny_deformation", *SPLATTING]
        case "data" if choice in ("world_scene", "scene_folder"):
            root = ["data.train.root=somewhere"] if choice == "scene_folder" else []
            return ["model=gaussian_splatting/tiny_deformation", *SPLATTING, f"data={choice}", *root]
        case "callbacks" if choice == "static_control":
            return ["callbacks=static_control", "model=gaussian_splatting/tiny_deformation", *SPLATTING]
        case "model" if choice.startswith("video_vae/"):
            return [f"model={choice}", "task=autoencoding", "data=moving_shapes"]
        case "task" if choice == "autoencoding":
            return ["task=autoencoding", "model=video_vae/tiny", "data=moving_shapes"]
        case "model" if choice.startswith("hydra_generator/"):
            return [f"model={choice}", "task=frame_generation", "data=moving_shapes"]
        case "task" if choice == "frame_generation":
            return ["task=frame_generation", "model=hydra_generator/tiny", "data=moving_shapes"]
        case "model" if choice.startswith("hydra_tokenizer/"):
            return [f"model={choice}", "task=tokenization", "data=moving_shapes"]
        case "task" if choice == "tokenization":
            return ["task=tokenization", "model=hydra_tokenizer/tiny", "data=moving_shapes"]
        case "callbacks" if choice == "codecs":
            return ["callbacks=codecs", "task=tokenization", "model=hydra_tokenizer/tiny", "data=moving_shapes"]
        case "data" if choice == "world_memory":
            return ["data=world_memory", "task=frame_generation", "model=hydra_generator/tiny"]
        case "callbacks" if choice == "memory":
            return ["callbacks=memory", "task=frame_generation", "model=hydra_generator/tiny", "data=world_memory"]
        case "data" if choice.startswith(("moving_shapes", "latent", "captioned")):
            return ["task=diffusion", "model=text_to_video/cogvideox_tiny", f"data={choice}"]
        case "model" if choice.startswith("vit/"):
            return [f"model={choice.replace('vit/', 'videomae_v2/')}"]
        case "model" if choice.startswith("world_model/"):
            return [f"model={choice}", "task=action_prediction"]
        case "task" if choice == "action_prediction":
            return ["task=action_prediction", "model=world_model/tiny"]
        case "model" if f"model/{choice}".startswith(ENCODERS):
            return ["model=videomae/tiny", f"model@model.encoder={choice}"]
        case "model" if choice.startswith("classifier/"):
            return [f"model={choice}", "task=classification"]
        case "model" if choice.startswith("frame_classifier/"):
            return [f"model={choice}", "task=frame_classification"]
        case "task" if choice == "frame_classification":
            return ["task=frame_classification", "model=frame_classifier/tiny"]
        case "model" if choice.startswith("anticipator/"):
            return [f"model={choice}", "task=anticipation"]
        case "task" if choice == "anticipation":
            return ["task=anticipation", "model=anticipator/tiny"]
        case "model" if choice.startswith(("vjepa/", "vjepa2/")):
            return [f"model={choice}", "task=latent_prediction"]
        case "task" if choice.startswith("latent_prediction"):
            teacher = ["task.teacher_from=somewhere"] if choice.endswith("teacher") else []
            dense = ["model.predictor_context=true"] if choice.endswith("dense") else []
            return [f"task={choice}", "model=vjepa2/tiny", *teacher, *dense]
        case "callbacks" if choice == "latent":
            return ["callbacks=latent", "task=latent_prediction", "model=vjepa2/tiny"]
        case "task" if choice in ("classification", "finetuning"):
            return [f"task={choice}", "model=classifier/tiny"]
        case "task" if choice == "distillation":
            return [
                "task=distillation",
                "model=classifier/tiny",
                "task.teacher_from=somewhere",
                "model@task.teacher=classifier/tiny",
            ]
        case "debug":
            return [f"+debug={choice}"]
        case "data" if choice in ("video_folder", "video_folder_tested", "video_shards", "depth_folder"):
            return [f"data={choice}", "data.train.root=somewhere"]
        case "data" if choice == "web_shards":
            return [f"data={choice}", "data.train.root=somewhere", "data.val.root=elsewhere"]
        case "data" if choice == "lerobot":
            return [f"data={choice}", "data.train.root=somewhere", "task=action_prediction", "model=world_model/tiny"]
        case "data" if choice == "video_list":
            lists = ["data.train.list_file=train.txt", "data.val.list_file=val.txt"]
            return [f"data={choice}", "data.train.root=somewhere", *lists]
        case "data" if choice == "image_folder":
            return ["data=image_folder", "data.train.root=somewhere", "model.encoder.images=true"]
        case "data" if choice == "omni":
            return ["data=omni", "model.encoder.images=true"]
    return [f"{group}={choice}"]


def part_overrides(group: str, choice: str) -> list[str]:
    """Overrides that add a part to a model of its family, or to the task."""
    if group in TOKENIZER_PARTS:
        added = group if group == "model/quantizer" else f"+{group}"
        return ["model=hydra_tokenizer/tiny", "task=tokenization", "data=moving_shapes", f"{added}={choice}"]
    is_small = choice in ("tiny", "v1_5_tiny", "words", "pixels", "video_vae")
    family = "hunyuan" if "hunyuan" in (choice, group.removesuffix("_video").removeprefix("model/")) else "cogvideox"
    model = (
        f"{family}_tiny" if is_small or group.startswith("task/") else {"cogvideox": "cogvideox_2b"}.get(family, family)
    )
    paths = [] if model.endswith("tiny") else ["model.text.path=somewhere", "model.autoencoder.path=somewhere"]
    chosen = {
        "task/sampler": [f"task/sampler={choice}"],
        "task/guidance": [f"task/guidance={choice}"],
        "model/lora": [f"+model/lora={choice}", "model.lora.base=somewhere"],
        "model/text": [f"model/text={choice}"],
        "model/autoencoder": [
            f"model/autoencoder={choice}",
            *(["model.autoencoder.weights=somewhere"] if choice == "video_vae" else []),
        ],
    }.get(group, [f"{group}@{PARTS[f'{group}/']}={choice}"])
    return [f"model=text_to_video/{model}", "task=diffusion", "data=moving_shapes", *paths, *chosen]


def build(config: DictConfig) -> tuple[nn.Module, nn.Module]:
    """Model and task on the meta device; a classifier has the labels of the data."""
    config = with_classes(config)
    with torch.device("meta"):
        model = instantiate(config.model)
        optimization = instantiate(config.task.optimization)(
            optimizer=instantiate(config.optimizer), schedule=instantiate(config.schedule)
        )
        return model, instantiate(config.task, _partial_=True)(model=model, optimization=optimization)


@pytest.mark.parametrize("name", FILES)
def test_composes_and_builds(experiment: Path, name: str):
    config = compose(experiment, overrides_for(name))
    if not name.startswith("debug/"):
        chosen = OmegaConf.load(CONF / f"{name}.yaml")
        plain = OmegaConf.to_container(chosen, resolve=False)
        given = {key: value for key, value in plain.items() if isinstance(value, int | float)}
        part = next((key for prefix, key in PARTS.items() if name.startswith(prefix)), name.partition("/")[0])
        node = OmegaConf.select(config, "model.encoder" if name.startswith(ENCODERS) else part)
        assert given.items() <= dict(node).items(), "the composed config must contain the values of the file"
    for prefixes, check_build in BUILDS.items():
        if name.startswith(prefixes) and (check_build is not model_builds or name in MODELS):
            check_build(config, name)


def model_builds(config: DictConfig, name: str) -> None:
    model, _ = build(config)
    assert {parameter.device.type for parameter in model.parameters()} == {"meta"}
    assert model.encoder.embed_dim == config.model.encoder.embed_dim


def generative_model_builds(config: DictConfig, name: str) -> None:
    model, task = build(config)
    assert {parameter.device.type for parameter in model.parameters()} == {"meta"}
    assert task.model is model


def transformer_builds(config: DictConfig, name: str) -> None:
    with torch.device("meta"):
        model = instantiate(config.model.transformer)
    assert {parameter.device.type for parameter in model.parameters()} == {"meta"}
    assert model.out_channels == config.model.transformer.out_channels


def sampler_or_guidance_builds(config: DictConfig, name: str) -> None:
    node = OmegaConf.select(config, PARTS[f"{name.rpartition('/')[0]}/"])
    assert type(instantiate(node)).__name__ == node["_target_"].rpartition(".")[2]


def optimizer_and_schedule_are_callable(config: DictConfig, name: str) -> None:
    optimizer = instantiate(config.optimizer)([{"params": [nn.Parameter(torch.zeros(2))]}])
    assert optimizer.param_groups[0]["lr"] == config.optimizer.lr
    schedule = instantiate(config.schedule)
    assert all(0 <= schedule(step, 100) <= 1 for step in range(100))


def callbacks_build(config: DictConfig, name: str) -> None:
    for callback in config.callbacks.values():
        if callback is not None:
            assert type(instantiate(callback)).__name__ == callback["_target_"].rpartition(".")[2]


BUILDS: dict[tuple[str, ...], Callable[[DictConfig, str], None]] = {  # prefixes of files → check of their build
    ("model/",): model_builds,  # of MODELS
    NO_ENCODER: generative_model_builds,
    ("model/cogvideox/", "model/hunyuan_video/"): transformer_builds,
    ("task/sampler/", "task/guidance/"): sampler_or_guidance_builds,
    ("optimizer/", "schedule/"): optimizer_and_schedule_are_callable,
    ("callbacks/",): callbacks_build,
}


@pytest.mark.parametrize("backbone", ["dinov2/small", "vit_frame/small", "hydra_video/small"])
def test_spool_accepts_any_frame_encoder_as_backbone(experiment: Path, backbone: str):
    chosen = ["model@model.encoder=spool/small", f"model@model.encoder.backbone={backbone}"]
    images = ["model.encoder.backbone.images=true"] if backbone.startswith("hydra") else []
    config = compose(
        experiment,
        [
            "model=classifier/tiny",
            "task=classification",
            "model.pooling=context",
            *chosen,
            *images,
            "model.encoder.in_channels=4",
        ],
    )
    model, _ = build(config)
    assert (model.encoder.backbone.video_size, model.encoder.embed_dim) == ((4, 16, 224, 224), 384)
    assert model.head.fc_norm.normalized_shape == (768,)


@pytest.mark.parametrize("data", ["sprites", "world"])
def test_generated_data_fits_the_model(experiment: Path, data: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    monkeypatch.chdir(tmp_path)  # the clip cache
    config = compose(experiment, [f"data={data}"])
    encoder = config.model.encoder
    video = instantiate(config.data).val[0]["video"]
    assert video.shape == (encoder.num_frames, 3, encoder.image_size, encoder.image_size)


def test_cpu_trainer_builds(experiment: Path, tmp_path: Path):
    config = compose(experiment, ["trainer.max_steps=3"])
    trainer = instantiate(config.trainer, _partial_=True)(callbacks=[], logger=False, default_root_dir=tmp_path)
    assert (trainer.max_steps, trainer.world_size) == (3, 1)


def test_video_folder_clips_fit_into_the_videos_of_make_data(experiment: Path):
    config = compose(experiment, ["data=video_folder", "data.train.root=somewhere"])
    span = (config.data.train.num_frames - 1) * config.data.train.stride + 1
    assert span <= inspect.signature(Sprites).parameters["num_frames"].default


@pytest.mark.parametrize("file", sorted(CONF.rglob("*.yaml")), ids=lambda file: str(file.relative_to(CONF)))
def test_first_comment_is_a_description(file: Path):
    comments = [line for line in file.read_text().splitlines() if not line.startswith("# @package")]
    rule = f"{file} must begin with a comment that describes it: see CONTRIBUTING.md, section Experiments."
    assert comments[0].startswith("# "), rule
    assert len(comments[0]) > 15, rule


def test_debug_overrides_the_experiment(experiment: Path):
    experiment.write_text(EXPERIMENT + "trainer: {max_steps: 777}\n")
    assert compose(experiment).trainer.max_steps == 777
    assert compose(experiment, ["+debug=fast"]).trainer.max_steps == 10


def test_no_config_shadows_an_experiment():
    assert not (CONF / "config.yaml").exists()


@pytest.mark.parametrize("name", checks.DOTTED_NAMES)
def test_dotted_names_of_the_checks_exist(name: str):
    pkgutil.resolve_name(name)


def test_all_dotted_names_of_the_checks_are_tested():
    used = re.findall(r"\b(?:blueberry_video|torch|lightning)(?:\.\w+)+\b", strings_of(Path(checks.__file__)))
    assert set(used) <= set(checks.DOTTED_NAMES)


def strings_of(file: Path) -> str:
    """All string literals of a source file, without docstrings, comments and imports."""
    nodes = list(ast.walk(ast.parse(file.read_text())))
    docstrings = {id(node.value) for node in nodes if isinstance(node, ast.Expr)}
    return "\n".join(
        node.value
        for node in nodes
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in docstrings
    )


@pytest.mark.parametrize(("key", "value"), [("_target_", "blueberry_video.models.old_name.Network"), ("old_key", 3)])
def test_a_saved_config_with_a_renamed_class_or_key_raises_with_both_ways_on(key: str, value: object, tmp_path: Path):
    file = tmp_path / "config.yaml"
    saved = OmegaConf.to_container(compose(Path(__file__).parents[1] / "experiments/template/config.yaml"))
    saved["model"][key] = value
    file.write_text(yaml.safe_dump(saved))
    with pytest.raises(ValueError, match=rf"(?s)`model\.{key}` = '?{value}\b.*git checkout.*init_from="):
        load(file)


@pytest.mark.parametrize(
    ("experiment", "antialias"),
    [
        ("videomae_finetune_k400", False),
        ("videomae_v2_intermediate", False),
        ("videomae_v2_finetune", False),
        ("videomae_v2_distill", False),
        ("vjepa_k400", False),
        ("vjepa2_pretrain", False),
        ("vjepa2_cooldown", False),
        ("vjepa2_anticipation", False),
        ("videomae_k400", True),  # the pre-training of VideoMAE resizes pictures of PIL
        ("videomae_v2_pretrain", True),
    ],
)
def test_published_recipes_resize_as_the_originals(experiment, antialias):
    """In the data sets as in the crops."""
    config = compose(Path(__file__).parents[1] / "experiments" / experiment / "config.yaml")
    sets = [config.data[name] for name in ("train", "val", "test") if config.data.get(name) is not None]
    assert [each.antialias for each in sets] == [antialias] * len(sets)
    augment = config.task.input.augment
    crops = [step for step in augment.get("_args_", [augment]) if "Crop" in step._target_]
    assert [step.get("antialias", True) for step in crops] == [antialias]
