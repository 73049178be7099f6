"""Tests of settings: the files of conf/video, overrides, HuggingFace configs, and errors that name the key."""

import json
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import pytest
from omegaconf import OmegaConf
from transformers import Qwen2_5_VLConfig

from blueberry_video.video.resize import video_size
from blueberry_video.video.settings import (
    CONF,
    VideoSettings,
    load_settings,
    models,
    profile_from_huggingface,
    sections_of,
)
from blueberry_video.video.tokens import TokenOptions, count_tokens, memory_estimate, validate

SECTIONS = sections_of(VideoSettings)
CLIP = (0.48145466, 0.4578275, 0.40821073)


@dataclass(frozen=True)
class Shelf:
    width: int = 3
    scale: float | None = 1.0
    label: str = "a"
    sizes: tuple[int, ...] = (1, 2)
    pair: tuple[int, int] = (1, 2)
    weights: dict[str, float] = field(default_factory=dict)
    deep: bool = False
    either: int | float | str | None = None


@dataclass(frozen=True)
class Room:
    shelf: Shelf = field(default_factory=Shelf)
    tokens: TokenOptions = field(default_factory=TokenOptions)


def load(**overrides: Any) -> Shelf:
    return load_settings(None, overrides, Room, conf=Path("nowhere")).shelf


def tokens_of(settings: VideoSettings, num_frames: int, height: int, width: int) -> int:
    size = video_size(height, width, num_frames, settings.resize)
    return count_tokens(num_frames, *size, settings.tokens).visual


# ---- conf/video ------------------------------------------------------------------------------------------------------


def test_models_in_conf():
    assert models() == sorted(
        {"qwen2.5-vl", "qwen3-vl", "llava-next-video", "llava-onevision", "internvl", "gemma"}
        | {"gpt-4v", "gpt-4o", "gemini"}
    )


def test_field_names_are_unique_over_all_sections():
    names = [part.name for kind in SECTIONS.values() for part in fields(kind)]
    assert sorted(names) == sorted(set(names))
    assert not set(names) & set(SECTIONS) - {"format", "sampling"}  # the main field of a section may have its name


def test_general_lists_all_settings_with_their_defaults():
    general = OmegaConf.to_container(OmegaConf.load(CONF / "general.yaml"))
    assert {section: list(settings) for section, settings in general.items()} == {
        section: [part.name for part in fields(kind)] for section, kind in SECTIONS.items()
    }
    assert load_settings() == VideoSettings()


@pytest.mark.parametrize("model", models())
def test_files_compose_with_hydra(model: str):
    content = OmegaConf.to_container(OmegaConf.load(CONF / f"{model}.yaml"))
    assert content.pop("defaults") == ["general", "_self_"]
    assert set(content) <= set(SECTIONS)


@pytest.mark.parametrize(
    ("model", "num_frames", "height", "width", "tokens"),
    [
        ("qwen2.5-vl", 20, 720, 1280, 7200),
        ("qwen2.5-vl", 768, 1080, 1920, 105984),
        ("qwen2.5-vl", 4, 240, 320, 280),
        ("qwen3-vl", 20, 720, 1280, 7200),
        ("qwen3-vl", 360, 1080, 1920, 106920),
        ("llava-next-video", 8, 720, 1280, 8 * 144),
        ("llava-onevision", 32, 720, 1280, 32 * 196),
        ("internvl", 8, 720, 1280, 8 * 256),
        ("gemma", 32, 1080, 1920, 32 * 66),  # 6 · 11 of at most 70
        ("gpt-4v", 1, 1024, 1024, 765),
        ("gpt-4o", 1, 4096, 2048, 1105),
        ("gemini", 60, 720, 1280, 60 * 258),
    ],
)
def test_token_counts_equal_published_numbers(model: str, num_frames: int, height: int, width: int, tokens: int):
    assert tokens_of(load_settings(model), num_frames, height, width) == tokens


@pytest.mark.parametrize("model", models())
def test_default_number_of_frames_fits_the_context(model: str):
    settings = load_settings(model)
    num_frames = settings.sampling.num_frames or settings.sampling.max_frames
    size = video_size(1080, 1920, num_frames, settings.resize)
    count = validate(num_frames, *size, settings.tokens)
    assert count.total >= count.visual >= 66 * num_frames // settings.tokens.temporal_patch_size
    estimate = memory_estimate(num_frames, *size, settings.tokens)["bf16"]
    if settings.tokens.num_parameters is None:
        assert model.startswith(("gpt", "gemini"))
    else:
        assert 14e9 < estimate.weights < 18e9  # the 7B and 8B models


@pytest.mark.parametrize("model", models())
def test_frames_of_any_shape_resize_to_whole_tokens(model: str):
    settings = load_settings(model)
    for height, width in [(240, 320), (1280, 720), (97, 1313), (3000, 200)]:
        assert tokens_of(settings, 2, height, width) > 0


def test_low_detail_and_low_resolution():
    low = load_settings("gpt-4o", {"detail": "low", "tile_detail": "low"})
    assert tokens_of(low, 10, 720, 1280) == 850
    assert tokens_of(load_settings("gemini", {"tokens_per_frame": 66}), 10, 720, 1280) == 660


# ---- overrides -------------------------------------------------------------------------------------------------------


def test_override_is_assigned_to_its_section():
    settings = load_settings("qwen2.5-vl", {"fps": 1, "max_frames": 32, "mean": [0, 0.5, 1], "backends": ["pyav"]})
    assert (settings.sampling.fps, settings.sampling.max_frames) == (1.0, 32)
    assert isinstance(settings.sampling.fps, float)
    assert settings.format.mean == (0.0, 0.5, 1.0)
    assert settings.decode.backends == ("pyav",)
    assert settings.tokens == load_settings("qwen2.5-vl").tokens


def test_override_replaces_excluded_values():
    assert load_settings("qwen2.5-vl", {"num_frames": 8}).sampling.fps is None
    sampling = load_settings("llava-next-video", {"fps": 0.5}).sampling
    assert (sampling.sampling, sampling.fps, sampling.num_frames) == ("fps", 0.5, None)
    assert load_settings("llava-next-video", {"indices": [1, 5]}).sampling.num_frames is None
    assert load_settings("qwen2.5-vl", {"sampling": "all"}).sampling.fps is None
    assert load_settings("llava-next-video", {"sampling": "adaptive"}).sampling.num_frames == 8
    raw = load_settings("qwen2.5-vl", {"dtype": "uint8"}).format
    assert (raw.rescale, raw.mean, raw.std) == (False, None, None)
    assert load_settings("qwen2.5-vl", {"dtype": "float16"}).format.mean == CLIP
    with pytest.raises(ValueError, match=r"fps=1\.0 and num_frames=8 "):
        load_settings("qwen2.5-vl", {"fps": 1.0, "num_frames": 8})


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("fsp", r"`fsp` .*`fps` \(section `sampling`\)"),
        ("max_frame", r"`max_frame` .*`max_frames` \(section `sampling`\)"),
        ("patchsize", r"`patchsize` .*`patch_size` \(section `tokens`\)"),
        ("resize", r"`resize` .*\bsection\b"),
        ("zzzzzzzz", r"`zzzzzzzz` .*allowed_networks, antialias, backends, "),
    ],
)
def test_unknown_overrides_raise(name: str, message: str):
    with pytest.raises(ValueError, match=message):
        load_settings("qwen2.5-vl", {name: 1})


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("width", "3", r"width='3' .*\bstr\b.*integer"),
        ("width", 3.0, r"width=3.0 .*\bfloat\b.*integer"),
        ("width", True, r"width=True .*\bbool\b.*integer"),
        ("width", None, r"width=None .*\bNoneType\b"),
        ("scale", "1.0", "scale='1.0' .*number or null"),
        ("scale", True, r"scale=True .*\bbool\b.*number or null"),
        ("label", 1, "label=1 .*string"),
        ("deep", 1, "deep=1 .*true or false"),
        ("sizes", 3, "sizes=3 .*list.*integer"),
        ("sizes", [1, "2"], r"sizes=\[1, '2'\] .*list.*integer"),
        ("pair", [1, 2, 3], r"pair=\[1, 2, 3\] .*\b2\b.*integer"),
        ("weights", {"a": "b"}, "weights={'a': 'b'} .*mapping.*number"),
        ("weights", [1], r"weights=\[1\] .*mapping.*number"),
        ("either", [1], r"either=\[1\] .*integer or a number or a string or null"),
    ],
)
def test_wrong_types_raise(name: str, value: object, message: str):
    with pytest.raises(ValueError, match=message):
        load(**{name: value})


def test_compatible_types_are_converted():
    shelf = load(scale=2, sizes=[4, 5, 6], pair=[7, 8], weights={"a": 1}, deep=True, either=3)
    assert shelf == Shelf(3, 2.0, "a", (4, 5, 6), (7, 8), {"a": 1.0}, True, 3)
    assert isinstance(shelf.scale, float)
    assert isinstance(load(either=3).either, int)
    assert load(either=2.5).either == 2.5
    assert load(scale=None).scale is None


def test_errors_of_a_section_are_raised():
    with pytest.raises(ValueError, match="patch_size=0"):
        load_settings("qwen2.5-vl", {"patch_size": 0})


def test_contradicting_sections_raise():
    with pytest.raises(ValueError, match=r"size_factor=28 .*patch_size=16 .*size_factor=32"):
        load_settings("qwen2.5-vl", {"patch_size": 16})
    with pytest.raises(ValueError, match=r"detail=low .*tile_detail=high.*tile_detail=low"):
        load_settings("gpt-4o", {"detail": "low"})


# ---- files -----------------------------------------------------------------------------------------------------------


def test_new_model_is_a_new_file(tmp_path: Path):
    (tmp_path / "general.yaml").write_text("shelf: {width: 4, label: general}\n")
    (tmp_path / "mine-1.5.yaml").write_text("defaults: [general, _self_]\nshelf: {width: 5}\ntokens:\n")
    assert models(tmp_path) == ["mine-1.5"]
    room = load_settings("mine-1.5", {"deep": True}, Room, conf=tmp_path)
    assert room.shelf == Shelf(width=5, label="general", deep=True)


def test_file_outside_conf_overrides_the_general_settings(tmp_path: Path):
    file = tmp_path / "mine.yaml"
    file.write_text("sampling: {fps: 3}\n")
    for model in (file, str(file)):
        assert load_settings(model, {"max_frames": 9}).sampling.fps == 3.0
    assert load_settings(file, conf=tmp_path / "missing").sampling.fps == 3.0


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("samplng: {fps: 1.0}", r"mine.yaml: `samplng` .*source, .*`sampling`"),
        ("fps: 1.0", r"mine.yaml: `fps` .*`sampling:`"),
        ("sampling: {fsp: 1.0}", r"mine.yaml: `fsp` .*section `sampling`.*`fps`"),
        ("tokens: {fps: 1.0}", r"mine.yaml: `fps` .*section `tokens`.*section `sampling`"),
        ("sampling: {max_frames: '8'}", r"mine.yaml: sampling.max_frames='8' .*\bstr\b"),
        ("sampling: {max_frames: 1e3}", r"mine.yaml: sampling.max_frames=1000.0 .*\bfloat\b"),
        ("sampling: 3", r"mine.yaml: section `sampling` .*mapping.*\b3\b"),
        ("defaults: [qwen2.5-vl, _self_]", r"mine.yaml .*qwen2.5-vl.*defaults: \[general, _self_\]"),
        ("- 1", r"mine.yaml .*mapping of sections"),
        ("a: [", r"mine.yaml .*YAML"),
        ("tokens: {count: tiles}\ntokens: {mark: none}", r"mine.yaml .*YAML: .*duplicate key"),
    ],
)
def test_invalid_files_raise(tmp_path: Path, text: str, message: str):
    file = tmp_path / "mine.yaml"
    file.write_text(text)
    with pytest.raises(ValueError, match=message):
        load_settings(file)


def test_unknown_models_raise(tmp_path: Path):
    with pytest.raises(ValueError, match=r"model='qwen2-vl' .*gemini, .*'qwen2.5-vl'"):
        load_settings("qwen2-vl")
    with pytest.raises(FileNotFoundError, match=r"model='nowhere.yaml' .*gemini"):
        load_settings("nowhere.yaml")
    with pytest.raises(FileNotFoundError, match=r"model=.*qwen2-vl' .*gemini"):
        load_settings(tmp_path / "qwen2-vl")
    with pytest.raises(FileNotFoundError, match=r"model='qwen2.5-vl' .*missing .*YAML"):
        load_settings("qwen2.5-vl", conf=tmp_path / "missing")


# ---- HuggingFace -----------------------------------------------------------------------------------------------------


def saved(folder: Path, content: dict[str, Any], name: str = "preprocessor_config.json") -> Path:
    folder.mkdir(exist_ok=True)
    (folder / name).write_text(json.dumps(content))
    return folder


QWEN = {  # as saved with Qwen2.5-VL
    "min_pixels": 3136,
    "max_pixels": 12845056,
    "patch_size": 14,
    "temporal_patch_size": 2,
    "merge_size": 2,
    "image_mean": list(CLIP),
    "image_std": [0.26862954, 0.26130258, 0.27577711],
    "image_processor_type": "Qwen2VLImageProcessor",
    "processor_class": "Qwen2_5_VLProcessor",
}
QWEN3 = {  # as saved with Qwen3-VL
    "size": {"longest_edge": 25165824, "shortest_edge": 4096},
    "patch_size": 16,
    "temporal_patch_size": 2,
    "merge_size": 2,
    "image_mean": [0.5, 0.5, 0.5],
    "image_std": [0.5, 0.5, 0.5],
    "processor_class": "Qwen3VLProcessor",
    "video_processor_type": "Qwen3VLVideoProcessor",
}


def test_qwen2_5_vl_from_image_processor(tmp_path: Path):
    for model in (saved(tmp_path, QWEN), tmp_path / "preprocessor_config.json"):
        settings = load_settings(model, {"fps": 1.0})
        assert (settings.resize.min_pixels, settings.resize.max_pixels) == (3136, 12845056)
        assert (settings.resize.rule, settings.resize.size_factor) == ("smart", 28)
        assert settings.resize.pixel_budget == "frame"
        tokens = settings.tokens
        assert (tokens.patch_size, tokens.merge_size, tokens.temporal_patch_size) == (14, 2, 2)
        assert tokens.num_parameters is None
        assert settings.format.mean == CLIP
        assert (settings.sampling.fps, settings.sampling.spacing) == (1.0, "arange")


def test_video_processor_files_take_precedence(tmp_path: Path):
    saved(tmp_path, QWEN | {"patch_size": 7})
    saved(tmp_path, {"image_processor": {"size": 1}, "processor_class": "Qwen2_5_VLProcessor"}, "processor_config.json")
    assert profile_from_huggingface(tmp_path)["tokens"]["patch_size"] == 7
    nested = {"processor_class": "Qwen3VLProcessor", "video_processor": QWEN3 | {"patch_size": 8}}
    saved(tmp_path, nested, "processor_config.json")
    assert profile_from_huggingface(tmp_path)["tokens"]["patch_size"] == 8
    saved(tmp_path, QWEN3, "video_preprocessor_config.json")
    assert profile_from_huggingface(tmp_path)["tokens"]["patch_size"] == 16


def test_qwen3_vl_budget_applies_to_the_whole_video(tmp_path: Path):
    from transformers.models.qwen3_vl.video_processing_qwen3_vl import smart_resize

    settings = load_settings(saved(tmp_path, QWEN3, "video_preprocessor_config.json"))
    assert settings.tokens.mark == "seconds"
    for num_frames, height, width in [(20, 720, 1280), (768, 1080, 1920), (4, 240, 320), (5, 30, 900)]:
        theirs = smart_resize(num_frames, height, width, 2, 32, 4096, 25165824)
        assert video_size(height, width, num_frames, settings.resize) == theirs


def test_processors_saved_by_transformers(tmp_path: Path):
    from transformers.models.llava_next_video.video_processing_llava_next_video import LlavaNextVideoVideoProcessor
    from transformers.models.llava_onevision.video_processing_llava_onevision import LlavaOnevisionVideoProcessor
    from transformers.models.qwen3_vl.video_processing_qwen3_vl import Qwen3VLVideoProcessor

    found = {}
    for processor in (LlavaNextVideoVideoProcessor, LlavaOnevisionVideoProcessor, Qwen3VLVideoProcessor):
        folder = tmp_path / processor.__name__
        processor().save_pretrained(folder)
        found[processor] = load_settings(folder)
    llava, onevision, qwen = found.values()
    assert (llava.resize.rule, llava.resize.image_size, llava.format.mean) == ("crop", (224, 224), CLIP)
    assert tokens_of(llava, 3, 480, 640) == 3 * (224 // 14) ** 2 // 4
    assert (onevision.resize.rule, onevision.resize.image_size) == ("stretch", (384, 384))
    assert tokens_of(onevision, 3, 480, 640) == 3 * 196
    assert (qwen.sampling.fps, qwen.sampling.min_frames, qwen.sampling.max_frames) == (2.0, 4, 768)
    assert (qwen.resize.min_pixels, qwen.resize.max_pixels) == (128 * 32 * 32, 32 * 32 * 768)


def test_llava_onevision_internvl_and_gemma(tmp_path: Path):
    onevision = {"video_processor_type": "LlavaOnevisionVideoProcessor", "size": {"height": 336, "width": 336}}
    saved(tmp_path / "a", onevision | {"resample": 2, "do_normalize": False}, "video_preprocessor_config.json")
    settings = load_settings(saved(tmp_path / "a", {"num_image_tokens": 576}, "processor_config.json"))
    assert settings.tokens.tokens_per_frame == 144
    assert (settings.resize.image_size, settings.resize.interpolation) == ((336, 336), "bilinear")
    assert settings.format.mean is None

    internvl = {
        "video_processor_type": "InternVLVideoProcessor",
        "size": {"height": 448, "width": 448},
        "num_frames": 16,
    }
    nested = {"image_seq_length": 128, "processor_class": "InternVLProcessor", "video_processor": internvl}
    settings = load_settings(saved(tmp_path / "b", nested, "processor_config.json"))
    assert (settings.tokens.tokens_per_frame, settings.sampling.num_frames) == (128, 16)

    gemma = {"video_processor_type": "Gemma4VideoProcessor", "max_soft_tokens": 140, "pooling_kernel_size": 2}
    settings = load_settings(saved(tmp_path / "c", gemma | {"patch_size": 14, "fps": 1}))
    assert (settings.resize.rule, settings.resize.size_factor, settings.resize.max_pixels) == ("fill", 28, 140 * 28**2)
    assert (settings.tokens.merge_size, settings.sampling.sampling, settings.sampling.fps) == (2, "fps", 1.0)
    assert tokens_of(settings, 1, 500, 500) == 121


def test_language_model_config_in_the_same_folder(tmp_path: Path):
    saved(tmp_path, QWEN)
    sizes = {"hidden_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 2}
    Qwen2_5_VLConfig(text_config=sizes | {"max_position_embeddings": 5000}).save_pretrained(tmp_path)
    tokens = load_settings(tmp_path).tokens
    assert (tokens.context_length, tokens.hidden_size, tokens.num_layers) == (5000, 64, 3)
    assert (tokens.num_kv_heads, tokens.head_dim) == (2, 16)
    saved(tmp_path, {"text_config": sizes | {"layer_types": ["sliding_attention", "full_attention"]}}, "config.json")
    assert load_settings(tmp_path).tokens.num_layers is None
    (tmp_path / "config.json").unlink()
    assert load_settings(tmp_path).tokens.context_length is None


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (
            {"image_processor_type": "CLIPImageProcessor"},
            r"preprocessor_config.json .*CLIPImageProcessor.*Qwen2VL, .*Gemma4",
        ),
        ({"size": 3}, r"preprocessor_config.json .*processor class.*Qwen2VL"),
        (QWEN | {"resample": 1}, r"resample=1 .*2 \(bilinear\).*3"),
        (QWEN | {"rescale_factor": 0.5}, r"rescale_factor=0.5"),
        (QWEN | {"patch_size": "14"}, r"preprocessor_config.json: patch_size='14' .*\bstr\b"),
        (QWEN | {"rescale_factor": "1/255"}, r"rescale_factor='1/255' .*\bstr\b"),
        (QWEN | {"size": 448, "max_pixels": None}, r"size=448 .*shortest_edge and longest_edge"),
        ({"processor_class": "LlavaNextVideoProcessor", "size": {"shortest_edge": 224}}, r"size=.*224.*crop_size"),
        (
            {"processor_class": "LlavaNextVideoProcessor", "size": {"shortest_edge": 256}, "crop_size": 224},
            r"size=.*256.*crop_size=224",
        ),
        ([1], r"preprocessor_config.json .*JSON object"),
    ],
)
def test_unsupported_processors_raise(tmp_path: Path, content: Any, message: str):
    with pytest.raises(ValueError, match=message):
        load_settings(saved(tmp_path, content))


def test_missing_or_invalid_processor_raises(tmp_path: Path):
    with pytest.raises(FileNotFoundError, match=r"video_preprocessor_config.json, processor_config.json"):
        load_settings(tmp_path)
    (tmp_path / "preprocessor_config.json").write_text("{")
    with pytest.raises(ValueError, match=r"preprocessor_config.json .*JSON"):
        load_settings(tmp_path)


def test_file_without_settings_raises(tmp_path: Path):
    (tmp_path / "model.safetensors").write_bytes(b"\x00\xff")
    with pytest.raises(ValueError, match=r"model.safetensors' .*YAML"):
        load_settings(tmp_path / "model.safetensors")


def test_processor_without_resizing(tmp_path: Path):
    assert load_settings(saved(tmp_path, QWEN | {"do_resize": False})).resize.rule == "none"
