"""Settings of the pipeline: one section per stage, validated before a video is opened.

Values are merged from three sources, later ones take precedence: conf/video/general.yaml, the file of a model (one of
conf/video, a YAML file elsewhere, or a processor config saved by HuggingFace), and overrides by field name. A section
is a frozen dataclass next to the code that reads it. Its fields are the keys of the YAML, and field names are unique
over all sections, so that an override needs no section.

Types are checked here: ``OmegaConf.structured`` silently converts wrong types ("3" to 3) and lacks tuple unions.
"""

import functools
import json
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, is_dataclass
from difflib import get_close_matches
from importlib.metadata import EntryPoint, entry_points
from math import ceil, isqrt
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, TypeVar, Union, get_args, get_origin, get_type_hints

import yaml
from omegaconf import DictConfig, OmegaConf

from blueberry_video.installation import shipped
from blueberry_video.video.budget import RunOptions
from blueberry_video.video.cache import CacheOptions
from blueberry_video.video.decode import DecodeOptions
from blueberry_video.video.formats import FormatOptions
from blueberry_video.video.model_files import ENCODERS, encoder_profile, hub_folder, run_profile
from blueberry_video.video.model_files import FAMILIES as BARE_FAMILIES
from blueberry_video.video.resize import ResizeOptions
from blueberry_video.video.sampling import SamplingOptions
from blueberry_video.video.source_options import SourceOptions
from blueberry_video.video.tokens import TokenOptions

CONF = shipped("conf") / "video"
GENERAL = "general"
MODEL_GROUP = "blueberry.video.models"  # entry points of other packages
DEFAULTS = [GENERAL, "_self_"]  # the only defaults list that a model's file may contain

SECRETS = ("token", "request_headers")  # never in messages
_COUNTS = ("fps", "num_frames", "indices")  # mutually exclusive
_EXCLUDED = {"all": _COUNTS, "duration": _COUNTS, "fps": ("num_frames",), "uniform": ("fps",)}  # per strategy

Settings = TypeVar("Settings")
Values = dict[str, dict[str, Any]]  # section → field → value


@dataclass(frozen=True)
class VideoSettings:
    """All sections; the field names are the names of the sections in conf/video."""

    source: SourceOptions = field(default_factory=SourceOptions)
    decode: DecodeOptions = field(default_factory=DecodeOptions)
    sampling: SamplingOptions = field(default_factory=SamplingOptions)
    resize: ResizeOptions = field(default_factory=ResizeOptions)
    tokens: TokenOptions = field(default_factory=TokenOptions)
    format: FormatOptions = field(default_factory=FormatOptions)
    cache: CacheOptions = field(default_factory=CacheOptions)
    run: RunOptions = field(default_factory=RunOptions)

    def __post_init__(self) -> None:
        patches = self.format.format == "huggingface" and self.format.huggingface_layout == "patches"
        if patches and self.tokens.count != "patches":
            raise ValueError(
                f"format=huggingface with huggingface_layout=patches requires count=patches, but count="
                f"{self.tokens.count}: use huggingface_layout=frames, or the format of this model's profile."
            )
        step, factor = self.tokens.size_step, self.resize.size_factor
        if self.resize.rule in ("smart", "fill") and factor % step:
            raise ValueError(
                f"size_factor={factor} must be a multiple of patch_size={self.tokens.patch_size} · "
                f"merge_size={self.tokens.merge_size}: also set size_factor={step}."
            )
        detail, counted = self.format.detail, self.tokens.tile_detail
        if self.tokens.count == "tiles" and detail not in ("auto", counted):
            problem = f"detail={detail} differs from tile_detail={counted}, which determines the token count"
            raise ValueError(f"{problem}: also set tile_detail={detail}.")


def models(conf: Path = CONF) -> list[str]:
    """Returns the sorted names of the models in conf/video, and of the entry points ``blueberry.video.models``
    of other packages, each the path of a YAML file."""
    return sorted({file.stem for file in conf.glob("*.yaml") if file.stem != GENERAL} | _registered().keys())


@functools.cache
def _registered() -> dict[str, EntryPoint]:
    return {point.name: point for point in entry_points(group=MODEL_GROUP)}


def load_settings(
    model: str | Path | None = None,
    overrides: Mapping[str, Any] | None = None,
    into: type[Settings] = VideoSettings,  # type: ignore[assignment]
    conf: Path = CONF,
) -> Settings:
    """Returns the settings of a model.

    Args:
        model: one of ``models()``; the path of a YAML file; the path of a folder or JSON file saved by HuggingFace, or
            a hub id in the local cache, see ``profile_from_huggingface``; a run of this project, for the input of its
            encoder; None: the general settings.
        overrides: field name → value, of any section: ``{"fps": 1.0, "max_frames": 32}``.
        into: a frozen dataclass with a section per field.
        conf: the folder of the YAML files.

    Raises:
        FileNotFoundError: a model name without a folder ``conf``, or a path that does not exist.
        ValueError: an unknown model, section or field (the message names the nearest valid one), a value of a wrong
            type, or a value that a section does not accept.
    """
    sections = sections_of(into)
    values: Values = {name: {} for name in sections}
    general = conf / f"{GENERAL}.yaml"
    if general.is_file():  # equal to the defaults of the sections
        _merge(values, _read_yaml(general), sections, str(general))
    if model is not None:
        file = _find(model, conf)
        content = _read_yaml(file) if file.suffix in (".yaml", ".yml") else profile_from_huggingface(file, conf)
        _merge(values, content, sections, str(file))
    return into(**_overridden(values, overrides or {}, sections))


def _overridden(values: Values, overrides: Mapping[str, Any], sections: Mapping[str, type]) -> dict[str, Any]:
    """Returns the sections with the overrides merged into their values."""
    section_of = _section_of(sections)
    given: Values = {name: {} for name in sections}
    for name, value in overrides.items():
        if name not in section_of:
            raise ValueError(_unknown(name, "is not a setting", section_of))
        hint = _hints(sections[section_of[name]])[name]
        shown = "…" if name in SECRETS else repr(value)
        given[section_of[name]][name] = _checked(value, hint, f"{name}={shown}")
    for section, chosen in given.items():
        if chosen.keys() & {"fps", "sampling"} and "frame_lists" in _hints(sections[section]):
            chosen.setdefault("frame_lists", "sampled")
    for section, chosen in given.items():
        _drop_excluded(values[section], chosen)
        values[section] |= chosen
    return {section: kind(**values[section]) for section, kind in sections.items()}


def with_overrides(settings: VideoSettings, overrides: Mapping[str, Any]) -> VideoSettings:
    """Returns settings with other values of some fields, as :func:`load_settings` merges and checks overrides."""
    sections = sections_of(type(settings))
    values = {name: dict(vars(getattr(settings, name))) for name in sections}
    return VideoSettings(**_overridden(values, overrides, sections))


def sections_of(settings: type) -> dict[str, type]:
    """Section name → dataclass of its options."""
    hints = get_type_hints(settings)
    return {part.name: hints[part.name] for part in fields(settings) if is_dataclass(hints[part.name])}


def _drop_excluded(values: dict[str, Any], chosen: Mapping[str, Any]) -> None:
    """Removes the values that an override excludes, in-place: ``num_frames=8`` replaces the ``fps`` of a model, and
    ``dtype="uint8"`` its ``mean``."""
    excluded: tuple[str, ...] = _EXCLUDED.get(chosen.get("sampling", ""), ())
    if chosen.get("dtype") == "uint8":
        excluded += ("rescale", "mean", "std")
    if chosen.keys() & set(_COUNTS):
        excluded += _COUNTS
        if "sampling" not in chosen and "num_frames" not in chosen and values.get("sampling") == "uniform":
            values["sampling"] = "fps"  # also evenly spaced, and requires no count
    for name in excluded:
        values.pop(name, None)


# ---- files -----------------------------------------------------------------------------------------------------------


def _find(model: str | Path, conf: Path) -> Path:
    """Returns the file or folder of a model; a name takes precedence over a file in the working directory."""
    known = models(conf)
    if model in known:
        file = conf / f"{model}.yaml"
        return file if file.is_file() else Path(_registered()[str(model)].load())
    path = Path(model)
    if path.exists():
        return path
    if (cached := hub_folder(str(model))) is not None:
        return cached
    if isinstance(model, Path) or path.suffix in (".yaml", ".yml", ".json") or len(path.parts) > 1:
        raise FileNotFoundError(
            f"model={str(path)!r} does not exist: use an existing YAML file, a folder with HuggingFace's "
            "preprocessor_config.json, a hub id in the local cache (nothing is downloaded), or one of the models "
            f"{', '.join(known) or '(none)'}."
        )
    if not known:
        problem = f"model={model!r} cannot be found, because the folder {conf} of model files does not exist"
        raise FileNotFoundError(f"{problem}: set model to the path of a YAML file.")
    near = get_close_matches(str(model), known, n=1, cutoff=0.4)
    hint = f" Did you mean {near[0]!r}?" if near else ""
    raise ValueError(
        f"model={model!r} does not exist: choose from {', '.join(known)}.{hint} To add a model, create "
        f"{conf / f'{model}.yaml'}, or pass the path of a YAML file."
    )


def _read_yaml(file: Path) -> dict[str, Any]:
    try:
        content = OmegaConf.load(file)
    except yaml.YAMLError as error:
        raise ValueError(f"{file} is not valid YAML: {' '.join(str(error).split())}") from error
    if not isinstance(content, DictConfig):
        raise ValueError(f"{file} must be a YAML mapping of sections to their settings.")
    plain = OmegaConf.to_container(content, resolve=False)
    assert isinstance(plain, dict)
    defaults = plain.pop("defaults", DEFAULTS)
    if defaults != DEFAULTS:
        raise ValueError(f"{file} has defaults: {defaults}: remove them, or write defaults: [{', '.join(DEFAULTS)}].")
    return {str(key): value for key, value in plain.items()}


def _merge(values: Values, content: Mapping[str, Any], sections: Mapping[str, type], file: str) -> None:
    """Merges the content of a file into ``values`` in-place, after checking all names and types."""
    section_of = _section_of(sections)
    for section, settings in content.items():
        if section not in sections:
            if section in section_of:
                raise ValueError(f"{file}: `{section}` belongs under `{section_of[section]}:`.")
            near = get_close_matches(section, sections, n=1)
            hint = f" Did you mean `{near[0]}`?" if near else ""
            raise ValueError(f"{file}: `{section}` is not a section: choose from {', '.join(sections)}.{hint}")
        if settings is None:
            continue
        if not isinstance(settings, Mapping):
            raise ValueError(f"{file}: section `{section}` must be a mapping of names to values, not {settings!r}.")
        hints = _hints(sections[section])
        for name, value in settings.items():
            if name not in hints:
                problem = _unknown(str(name), f"is not a setting of section `{section}`", section_of)
                raise ValueError(f"{file}: {problem}")
            values[section][name] = _checked(value, hints[name], f"{file}: {section}.{name}={value!r}")


# ---- names and types -------------------------------------------------------------------------------------------------


def _hints(kind: type) -> dict[str, Any]:
    """Field name → type hint of a section."""
    hints = get_type_hints(kind)
    return {part.name: hints[part.name] for part in fields(kind)}


def _section_of(sections: Mapping[str, type]) -> dict[str, str]:
    """Field name → section name."""
    return {part.name: section for section, kind in sections.items() for part in fields(kind)}


def _unknown(name: str, problem: str, section_of: Mapping[str, str]) -> str:
    if name in section_of:
        return f"`{name}` {problem}; it belongs to section `{section_of[name]}`."
    if name in section_of.values():
        return f"`{name}` {problem} but a section: pass its settings by name."
    near = get_close_matches(name, section_of, n=1, cutoff=0.5)
    if near:
        return f"`{name}` {problem}. Did you mean `{near[0]}` (section `{section_of[near[0]]}`)?"
    return f"`{name}` {problem}. Available: {', '.join(sorted(section_of))}."


class _WrongTypeError(Exception):
    pass


def _checked(value: Any, hint: Any, setting: str) -> Any:
    try:
        return _converted(value, hint)
    except _WrongTypeError:
        raise ValueError(f"{setting} has type {type(value).__name__}, but must be {_described(hint)}.") from None


def _converted(value: Any, hint: Any) -> Any:
    """Converts a value to its type hint: integers to floats and lists to tuples; anything else must match."""
    origin, inner = get_origin(hint), get_args(hint)
    if origin in (Union, UnionType):
        for choice in sorted(inner, key=lambda kind: kind is float):  # 3 stays an integer for `float | int`
            try:
                return _converted(value, choice)
            except _WrongTypeError:
                continue
    elif origin is tuple and isinstance(value, list | tuple):
        kinds = [inner[0]] * len(value) if inner[-1] is Ellipsis else inner
        if len(kinds) == len(value):
            return tuple(_converted(part, kind) for part, kind in zip(value, kinds))
    elif origin is dict and isinstance(value, Mapping):
        return {_converted(key, inner[0]): _converted(part, inner[1]) for key, part in value.items()}
    elif hint is float and isinstance(value, int | float) and not isinstance(value, bool):
        return float(value)
    elif origin is None and type(value) is hint:  # excludes bool for int
        return value
    raise _WrongTypeError


def _described(hint: Any) -> str:
    """Describes a type in the terms of YAML."""
    words = {int: "an integer", float: "a number", bool: "true or false", str: "a string", NoneType: "null"}
    origin, inner = get_origin(hint), get_args(hint)
    if origin in (Union, UnionType):
        return " or ".join(_described(kind) for kind in inner)
    if origin is tuple:
        length = "" if inner[-1] is Ellipsis else f" of length {len(inner)}"
        return f"a list{length}, each {_described(inner[0])}"
    if origin is dict:
        return f"a mapping, each value {_described(inner[1])}"
    return words.get(hint, str(hint))


# ---- HuggingFace processor configs -----------------------------------------------------------------------------------

_FAMILIES = {  # prefix of a HuggingFace processor class → model in conf/video with the same rules
    "Qwen2VL": "qwen2.5-vl",
    "Qwen2_5_VL": "qwen2.5-vl",
    "Qwen3VL": "qwen3-vl",
    "LlavaNextVideo": "llava-next-video",
    "LlavaOnevision": "llava-onevision",
    "InternVL": "internvl",
    "Gemma4": "gemma",
}
_IN_TRANSFORMERS: dict[str, Values] = {  # differences from the models' original code, which conf/video follows
    "qwen2.5-vl": {
        "sampling": {"spacing": "arange"},
        "resize": {"list_factor": 1, "total_pixels": 2**40},
    },  # no budget per video
    "qwen3-vl": {
        "sampling": {"spacing": "linspace", "frame_factor": 1},
        "resize": {"list_factor": 1, "pixel_budget": "video"},
    },
}
_SIZE_SPECIFIC = ("context_length", "hidden_size", "num_layers", "num_kv_heads", "head_dim", "num_parameters")
_INTEGERS = (  # keys used in arithmetic
    *("patch_size", "merge_size", "temporal_patch_size", "pooling_kernel_size", "max_soft_tokens"),
    *("image_seq_length", "num_image_tokens", "hidden_size", "num_attention_heads"),
)
_INTERPOLATIONS = {2: "bilinear", 3: "bicubic"}


def profile_from_huggingface(path: str | Path, conf: Path = CONF) -> Values:
    """Returns the settings equivalent to a processor saved by transformers: section → field → value.

    Rules that depend on the processor class (resizing and token counts) are those of its family in conf/video; other
    values are read from the file. Budgets of Qwen3-VL apply to the whole video, as in transformers; budgets of Qwen2-VL
    and Qwen2.5-VL without a video_preprocessor_config.json are those of the image processor, also as in transformers.
    The sizes of the language model are read from a config.json in the same folder. Reads local files only.

    Args:
        path: a folder with video_preprocessor_config.json, processor_config.json or preprocessor_config.json (the
            first one that describes a video processor), or one of these files; without them a config.json, from which
            family, patch sizes and the language model are read; the folder of a VideoMAE, a V-JEPA 2 or a run.
        conf: the folder of the models' YAML files.

    Raises:
        FileNotFoundError: the file does not exist, or the folder has none of these files.
        ValueError: invalid JSON, an unknown processor class, or a value without an equivalent setting.
    """
    file = path = Path(path)
    if (path / "config.yaml").is_file():  # a run
        return run_profile(_read_yaml(path / "config.yaml"), path / "config.yaml")
    if path.is_file() and path.suffix != ".json":
        raise ValueError(
            f"model={str(path)!r} is not a settings file: use a YAML file, or a folder or JSON file of transformers."
        )
    if path.is_dir():
        names = ("video_preprocessor_config.json", "processor_config.json", "preprocessor_config.json")
        found = [path / name for name in names if (path / name).is_file()]
        bare = path / "config.json"
        config = _read_json(bare) if bare.is_file() else {}
        if config.get("model_type") in ENCODERS:
            return encoder_profile(config, _read_json(found[0], "video_processor") if found else {})
        if not found and config:
            return _bare_profile(config, bare, conf)
        if not found:
            raise FileNotFoundError(f"{path} has none of {', '.join(names)}: save the processor there first.")
        of_videos = [file for file in found if file.name != names[1] or "video_processor" in _read_json(file)]
        file = (of_videos or found)[0]
    content = _read_json(file, "video_processor")
    if content.get("model_type") in ENCODERS:
        return encoder_profile(content, {})
    if "model_type" in content:
        return _bare_profile(content, file, conf)
    processor = _read_json(path / "processor_config.json") if (path / "processor_config.json").is_file() else content
    family = _family(content, file)
    profile = _read_yaml(_find(family, conf))
    tokens, size, frames, pixels = (dict(profile[section]) for section in ("tokens", "resize", "sampling", "format"))
    for name in _SIZE_SPECIFIC:
        tokens.pop(name, None)
    tokens |= _renamed(content, "patch_size", "merge_size", "temporal_patch_size")
    tokens |= _renamed(content, merge_size="pooling_kernel_size")  # the name in Gemma's config
    tokens |= _language_model(path / "config.json")
    if "image_seq_length" in processor and family == "internvl":
        tokens["tokens_per_frame"] = processor["image_seq_length"]
    if "num_image_tokens" in processor and family == "llava-onevision":
        tokens["tokens_per_frame"] = ceil(isqrt(processor["num_image_tokens"]) / 2) ** 2
    frames |= _IN_TRANSFORMERS.get(family, {}).get("sampling", {})
    size |= _IN_TRANSFORMERS.get(family, {}).get("resize", {})
    size |= _size(content, tokens, size["rule"], file)
    for name, strategy in (("fps", "fps"), ("num_frames", "uniform")):
        if content.get(name) is not None:
            _drop_excluded(frames, {name: content[name]})
            frames |= {"sampling": strategy, name: content[name]}
    frames |= _renamed(content, "min_frames", "max_frames")
    pixels |= _pixels(content, file)
    return {"tokens": tokens, "resize": size, "sampling": frames, "format": pixels}


def _bare_profile(content: Mapping[str, Any], file: Path, conf: Path) -> Values:
    """Returns the settings of the family in conf/video with the sizes of a config.json alone."""
    kind = content.get("model_type")
    if kind not in BARE_FAMILIES:
        known = ", ".join((*BARE_FAMILIES, *ENCODERS))
        raise ValueError(f"{file} has model_type={kind!r}: supported are {known}. Write a YAML file as in conf/video.")
    family = BARE_FAMILIES[kind]
    profile = _read_yaml(_find(family, conf))
    tokens = {key: value for key, value in profile["tokens"].items() if key not in _SIZE_SPECIFIC}
    vision = content.get("vision_config") or {}
    if profile["resize"]["rule"] == "smart":
        tokens |= _renamed(vision, "patch_size", "temporal_patch_size", merge_size="spatial_merge_size")
        factor = tokens["patch_size"] * tokens["merge_size"]
        profile["resize"] |= {"size_factor": factor, "temporal_factor": tokens["temporal_patch_size"]}
    return {**profile, "tokens": tokens | _language_model(file)}


def _family(content: Mapping[str, Any], file: Path) -> str:
    keys = ("video_processor_type", "processor_class", "image_processor_type")
    classes = [str(content[key]) for key in keys if content.get(key)]
    for name in classes:
        for start, model in _FAMILIES.items():
            if name.startswith(start):
                return model
    raise ValueError(
        f"{file} has the processor class {', '.join(classes) or 'null'}: supported prefixes are "
        f"{', '.join(_FAMILIES)}. For a different model, write a YAML file as in conf/video."
    )


def _size(content: Mapping[str, Any], tokens: Mapping[str, Any], rule: str, file: Path) -> dict[str, Any]:
    """Returns the values of the section ``resize``."""
    if content.get("do_resize") is False:
        return {"rule": "none"}
    found: dict[str, Any] = {}
    if (resample := content.get("resample")) is not None:
        if resample not in _INTERPOLATIONS:
            raise ValueError(f"{file}: resample={resample} must be 2 (bilinear) or 3 (bicubic).")
        found["interpolation"] = _INTERPOLATIONS[resample]
    size = content.get("size") or {}
    if rule in ("smart", "fill"):
        factor = tokens["patch_size"] * tokens["merge_size"]
        found |= {"size_factor": factor, "temporal_factor": tokens["temporal_patch_size"]}
    if rule == "fill":
        return found | ({"max_pixels": content["max_soft_tokens"] * factor**2} if "max_soft_tokens" in content else {})
    if rule == "smart":
        if not isinstance(size, Mapping):
            raise ValueError(f"{file}: size={size!r} must be a mapping of shortest_edge and longest_edge.")
        for budget, edge in (("min_pixels", "shortest_edge"), ("max_pixels", "longest_edge")):
            if value := content.get(budget) or size.get(budget) or size.get(edge):
                found[budget] = value
        return found
    crop = content.get("crop_size")
    if crop and content.get("do_center_crop") is not False:
        sides = _sides(crop, file)
        if isinstance(size, Mapping) and size.get("shortest_edge", min(sides)) != min(sides):
            raise ValueError(f"{file}: size={size} must equal the shorter side of crop_size={crop}: set them alike.")
        return found | {"rule": "crop", "image_size": sides}
    return found | ({"rule": "stretch", "image_size": _sides(size, file)} if size else {})


def _sides(size: Any, file: Path) -> list[int]:
    if isinstance(size, int):
        return [size, size]
    if not isinstance(size, Mapping) or not {"height", "width"} <= size.keys():
        raise ValueError(f"{file}: size={size} does not fix the aspect ratio: set height and width, or crop_size.")
    return [size["height"], size["width"]]


def _pixels(content: Mapping[str, Any], file: Path) -> dict[str, Any]:
    """Returns the values of the section ``format``."""
    factor = content.get("rescale_factor", 1 / 255)
    if abs(factor * 255 - 1) > 1e-6:
        raise ValueError(f"{file}: rescale_factor={factor} must be 1/255.")
    found: dict[str, Any] = {}
    if "do_rescale" in content:
        found["rescale"] = content["do_rescale"]
    if content.get("do_normalize") is False:
        return found | {"mean": None, "std": None}
    return found | _renamed(content, mean="image_mean", std="image_std")


def _language_model(file: Path) -> dict[str, int]:
    """Returns the language model sizes of a config.json for the section ``tokens``; empty without such a file."""
    if not file.is_file():
        return {}
    content = _read_json(file, "text_config")
    found = _renamed(content, "hidden_size", context_length="max_position_embeddings")
    if set(content.get("layer_types") or ()) - {"full_attention"}:
        return found  # sliding-window layers: the KV cache is not a product of the sizes
    found |= _renamed(content, "head_dim", num_layers="num_hidden_layers", num_kv_heads="num_key_value_heads")
    if "head_dim" not in found and "num_attention_heads" in content and "hidden_size" in content:
        found["head_dim"] = content["hidden_size"] // content["num_attention_heads"]
    return found


def _renamed(content: Mapping[str, Any], *same: str, **renamed: str) -> dict[str, Any]:
    """Selects keys of a config and renames them (new name=old name); omits null values."""
    names = {name: name for name in same} | renamed
    return {new: content[old] for new, old in names.items() if content.get(old) is not None}


def _read_json(file: Path, inner: str = "") -> dict[str, Any]:
    """Reads a JSON object, merges the object under its key ``inner`` into it, and checks the types of numbers."""
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{file} is not valid JSON: {error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{file} must be a JSON object, as transformers' save_pretrained writes it.")
    if isinstance(content.get(inner), dict):
        content |= content[inner]
    for names, kind in ((_INTEGERS, int), (("rescale_factor",), float)):
        for name in names:
            if content.get(name) is not None:
                _checked(content[name], kind, f"{file}: {name}={content[name]!r}")
    return content
