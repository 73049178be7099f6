"""All that the pipeline can be told: one section a stage, checked before a video is opened.

Values come from three places, the later ones win: conf/video/general.yaml, the file of a model (one of conf/video, a
YAML file elsewhere, or what HuggingFace saved beside a model), and overrides by the name of a field. A section is a
frozen dataclass beside the code that reads it; its fields are the keys of the YAML, and every name is unique over all
sections, so that an override need not name its section.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, is_dataclass
from difflib import get_close_matches
from math import ceil, isqrt
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, TypeVar, Union, get_args, get_origin, get_type_hints

import yaml
from omegaconf import DictConfig, OmegaConf

from blueberry_video.video.budget import RunOptions
from blueberry_video.video.cache import CacheOptions
from blueberry_video.video.decode import DecodeOptions
from blueberry_video.video.formats import FormatOptions
from blueberry_video.video.resize import ResizeOptions
from blueberry_video.video.sampling import SamplingOptions
from blueberry_video.video.source_options import SourceOptions
from blueberry_video.video.tokens import TokenOptions

CONF = Path(__file__).resolve().parents[3] / "conf" / "video"
GENERAL = "general"
DEFAULTS = [GENERAL, "_self_"]  # what Hydra needs at the top of a model's file, and all of Hydra that is understood

_COUNTS = ("fps", "num_frames", "indices")  # of which a video can follow one
_EXCLUDED = {"all": _COUNTS, "duration": _COUNTS, "fps": ("num_frames",), "uniform": ("fps",)}  # by a way of sampling

Settings = TypeVar("Settings")
Values = dict[str, dict[str, Any]]  # section → field → value


@dataclass(frozen=True)
class VideoSettings:
    """Every section; the name of a field here is the name of a section in conf/video."""

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
                f"format=huggingface with huggingface_layout=patches needs a model that counts patches, but "
                f"count={self.tokens.count}: use huggingface_layout=frames, or the format of this model's profile."
            )
        step, factor = self.tokens.size_step, self.resize.size_factor
        if self.resize.rule in ("smart", "fill") and factor % step:
            raise ValueError(
                f"size_factor={factor} gives sizes that are no multiple of patch_size={self.tokens.patch_size} · "
                f"merge_size={self.tokens.merge_size}: set size_factor={step} too."
            )
        asked, counted = self.format.detail, self.tokens.tile_detail
        if self.tokens.count == "tiles" and asked != "auto" and asked != counted:
            raise ValueError(
                f"detail={asked} asks the model for another detail than tile_detail={counted}, by which tokens are "
                f"counted: set tile_detail={asked} too."
            )


def models(conf: Path = CONF) -> list[str]:
    """Names of the models that have a file in conf/video, sorted."""
    return sorted(file.stem for file in conf.glob("*.yaml") if file.stem != GENERAL)


def load_settings(
    model: str | Path | None = None,
    overrides: Mapping[str, Any] | None = None,
    into: type[Settings] = VideoSettings,  # type: ignore[assignment]
    conf: Path = CONF,
) -> Settings:
    """The settings for a model.

    Args:
        model: one of ``models()``; or the path of a YAML file; or of a folder or JSON file that HuggingFace saved, see
            ``profile_from_huggingface``; None: the general settings.
        overrides: field name → value, over every section: ``{"fps": 1.0, "max_frames": 32}``.
        into: a frozen dataclass whose fields are sections.
        conf: the folder of the YAML files.

    Raises:
        FileNotFoundError: a model by name where there is no folder ``conf``, or a path where there is nothing.
        ValueError: an unknown model, section or name (the message names the nearest right one), a value of the wrong
            type, or one that a section refuses.
    """
    sections = sections_of(into)
    values: Values = {name: {} for name in sections}
    general = conf / f"{GENERAL}.yaml"
    if general.is_file():  # without it, the sections' own defaults are the same
        _merge(values, _read_yaml(general), sections, str(general))
    if model is not None:
        file = _find(model, conf)
        if file.suffix in (".yaml", ".yml"):
            _merge(values, _read_yaml(file), sections, str(file))
        else:
            _merge(values, profile_from_huggingface(file, conf), sections, str(file))
    places = {name: section for section, kind in sections.items() for name in _hints(kind)}
    given: Values = {name: {} for name in sections}
    for name, value in (overrides or {}).items():
        if name not in places:
            raise ValueError(_unknown(name, "is no setting", places))
        kind = sections[places[name]]
        given[places[name]][name] = _checked(value, _hints(kind)[name], f"{name}={value!r}")
    for section, chosen in given.items():
        _give_way(values[section], chosen)
        values[section] |= chosen
    return into(**{section: kind(**values[section]) for section, kind in sections.items()})


def sections_of(settings: type) -> dict[str, type]:
    """Section name → dataclass of its options."""
    hints = get_type_hints(settings)
    return {part.name: hints[part.name] for part in fields(settings) if is_dataclass(hints[part.name])}


def _give_way(said: dict[str, Any], chosen: Mapping[str, Any]) -> None:
    """Takes out of what files say of a section that which an override excludes: ``num_frames=8`` need not be told to
    switch a model's own ``fps`` off, nor ``dtype="uint8"`` its ``mean``."""
    if chosen.get("dtype") == "uint8":
        for name in ("rescale", "mean", "std"):
            said.pop(name, None)
    for name in _EXCLUDED.get(chosen.get("sampling", ""), ()):
        said.pop(name, None)
    if chosen.keys() & set(_COUNTS):
        for name in _COUNTS:
            said.pop(name, None)
        if "sampling" not in chosen and "num_frames" not in chosen and said.get("sampling") == "uniform":
            said["sampling"] = "fps"  # also evenly spread, and needs no count


# ---- files -----------------------------------------------------------------------------------------------------------


def _find(model: str | Path, conf: Path) -> Path:
    """The file or folder that a model's name or path means; a name wins over a file in the working directory."""
    known = models(conf)
    if model in known:
        return conf / f"{model}.yaml"
    path = Path(model)
    if path.exists():
        return path
    if isinstance(model, Path) or path.suffix in (".yaml", ".yml", ".json") or len(path.parts) > 1:
        raise FileNotFoundError(
            f"there is no model settings file {path}: give an existing YAML file, or a folder with HuggingFace's "
            f"preprocessor_config.json (nothing is downloaded), or one of the models {', '.join(known) or '(none)'}."
        )
    if not known:
        raise FileNotFoundError(
            f"model={model!r} cannot be looked up, for there is no folder {conf} with a file a model, as where the "
            "package was installed without its repository: give the path of a YAML file as model."
        )
    near = get_close_matches(str(model), known, n=1, cutoff=0.4)
    raise ValueError(
        f"model={model!r} is none of {', '.join(known)}.{f' Did you mean {near[0]!r}?' if near else ''} A new model is "
        f"a new file {conf / f'{model}.yaml'}, or any YAML file given by its path."
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
        raise ValueError(
            f"{file} has defaults: {defaults}: leave them out, or write defaults: [{', '.join(DEFAULTS)}]; every model "
            "starts from the general settings and from nothing else."
        )
    return {str(key): value for key, value in plain.items()}


def _merge(values: Values, content: Mapping[str, Any], sections: Mapping[str, type], file: str) -> None:
    """Lays the content of a file over ``values``, after checking every name and type in it."""
    places = {name: section for section, kind in sections.items() for name in _hints(kind)}
    for section, settings in content.items():
        if section not in sections:
            if section in places:
                raise ValueError(f"{file}: `{section}` belongs under `{places[section]}:`.")
            near = get_close_matches(section, sections, n=1)
            raise ValueError(
                f"{file}: `{section}` is none of the sections {', '.join(sections)}."
                f"{f' Did you mean `{near[0]}`?' if near else ''}"
            )
        if settings is None:
            continue
        if not isinstance(settings, Mapping):
            raise ValueError(f"{file}: section `{section}` must be a mapping of names to values, not {settings!r}.")
        hints = _hints(sections[section])
        for name, value in settings.items():
            if name not in hints:
                raise ValueError(f"{file}: {_unknown(str(name), f'is no setting of section `{section}`', places)}")
            values[section][name] = _checked(value, hints[name], f"{file}: {section}.{name}={value!r}")


# ---- names and types -------------------------------------------------------------------------------------------------


def _hints(kind: type) -> dict[str, Any]:
    """Field name → type; class attributes that are no fields are no settings."""
    hints = get_type_hints(kind)
    return {part.name: hints[part.name] for part in fields(kind)}


def _unknown(name: str, what: str, places: Mapping[str, str]) -> str:
    if name in places:
        return f"`{name}` {what}; it belongs to section `{places[name]}`."
    if name in places.values():
        return f"`{name}` {what} but a section: give its settings by their own names."
    near = get_close_matches(name, places, n=1, cutoff=0.5)
    if near:
        return f"`{name}` {what}. Did you mean `{near[0]}` (section `{places[near[0]]}`)?"
    return f"`{name}` {what}. There are: {', '.join(sorted(places))}."


class _WrongTypeError(Exception):
    pass


def _checked(value: Any, hint: Any, place: str) -> Any:
    try:
        return _converted(value, hint)
    except _WrongTypeError:
        raise ValueError(f"{place} is of type {type(value).__name__}, but must be {_told(hint)}.") from None


def _converted(value: Any, hint: Any) -> Any:
    """The value as its type hint wants it: whole numbers do for floats and lists for tuples, and nothing else."""
    origin, inner = get_origin(hint), get_args(hint)
    if origin in (Union, UnionType):
        for choice in sorted(inner, key=lambda kind: kind is float):  # 3 for `float | int` stays whole
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
    elif origin is None and type(value) is hint:  # a bool is an int only to Python
        return value
    raise _WrongTypeError


def _told(hint: Any) -> str:
    """A type in words."""
    words = {int: "a whole number", float: "a number", bool: "true or false", str: "text", NoneType: "null"}
    origin, inner = get_origin(hint), get_args(hint)
    if origin in (Union, UnionType):
        return " or ".join(_told(kind) for kind in inner)
    if origin is tuple:
        length = "" if inner[-1] is Ellipsis else f"{len(inner)} times "
        return f"a list of {length}{_told(inner[0])}"
    if origin is dict:
        return f"a mapping to {_told(inner[1])}"
    return words.get(hint, str(hint))


# ---- what HuggingFace saves beside a model ---------------------------------------------------------------------------

_FAMILIES = {  # how the names of HuggingFace's processors begin → the model whose rules they follow
    "Qwen2VL": "qwen2.5-vl",
    "Qwen2_5_VL": "qwen2.5-vl",
    "Qwen3VL": "qwen3-vl",
    "LlavaNextVideo": "llava-next-video",
    "LlavaOnevision": "llava-onevision",
    "InternVL": "internvl",
    "Gemma4": "gemma",
}
_IN_TRANSFORMERS: dict[str, Values] = {  # where it departs from the models' own code, which conf/video follows
    "qwen2.5-vl": {"sampling": {"spacing": "arange"}, "resize": {"total_pixels": 2**40}},  # no budget of the video
    "qwen3-vl": {"sampling": {"spacing": "linspace", "frame_factor": 1}, "resize": {"pixel_budget": "video"}},
}
_OF_ONE_SIZE = ("context_length", "hidden_size", "num_layers", "num_kv_heads", "head_dim", "num_parameters")
_WHOLE = (  # keys of theirs that are reckoned with
    *("patch_size", "merge_size", "temporal_patch_size", "pooling_kernel_size", "max_soft_tokens"),
    *("image_seq_length", "num_image_tokens", "hidden_size", "num_attention_heads"),
)
_INTERPOLATIONS = {2: "bilinear", 3: "bicubic"}


def profile_from_huggingface(path: str | Path, conf: Path = CONF) -> Values:
    """The settings that a processor saved by transformers stands for: section → field → value.

    What its class decides (how frames are resized and counted) is taken from the model of its family in conf/video,
    what the file says from the file. Qwen3-VL's budgets are those of the whole video, as in transformers; of Qwen2-VL
    and Qwen2.5-VL without a video_preprocessor_config.json they are the image processor's, which transformers uses too.
    The sizes of the language model come from a config.json beside it. Reads local files alone, downloads nothing.

    Args:
        path: a folder with video_preprocessor_config.json, processor_config.json or preprocessor_config.json (the
            first one that describes a processor of videos), or one of these files.
        conf: the folder of the models' YAML files.

    Raises:
        FileNotFoundError: there is no such file, or none in the folder.
        ValueError: not JSON, an unknown class of processor, or something no setting stands for.
    """
    file = path = Path(path)
    if path.is_file() and path.suffix != ".json":
        raise ValueError(f"{path} holds no settings: give a YAML file, or a folder or JSON file saved by transformers.")
    if path.is_dir():
        names = ("video_preprocessor_config.json", "processor_config.json", "preprocessor_config.json")
        found = [path / name for name in names if (path / name).is_file()]
        if not found:
            raise FileNotFoundError(f"{path} has none of {', '.join(names)}: save the processor there first.")
        of_videos = [file for file in found if file.name != names[1] or "video_processor" in _read_json(file)]
        file = (of_videos or found)[0]
    content = _read_json(file, "video_processor")
    beside = _read_json(path / "processor_config.json") if (path / "processor_config.json").is_file() else content
    family = _family(content, file)
    profile = _read_yaml(_find(family, conf))
    tokens, size, frames, pixels = (dict(profile[section]) for section in ("tokens", "resize", "sampling", "format"))
    for name in _OF_ONE_SIZE:
        tokens.pop(name, None)
    tokens |= _said(content, "patch_size", "merge_size", "temporal_patch_size")
    tokens |= _said(content, merge_size="pooling_kernel_size")  # Gemma's name for it
    tokens |= _language_model(path / "config.json")
    if "image_seq_length" in beside and family == "internvl":
        tokens["tokens_per_frame"] = beside["image_seq_length"]
    if "num_image_tokens" in beside and family == "llava-onevision":
        tokens["tokens_per_frame"] = ceil(isqrt(beside["num_image_tokens"]) / 2) ** 2
    frames |= _IN_TRANSFORMERS.get(family, {}).get("sampling", {})
    size |= _IN_TRANSFORMERS.get(family, {}).get("resize", {})
    size |= _size(content, tokens, size["rule"], file)
    for name, strategy in (("fps", "fps"), ("num_frames", "uniform")):
        if content.get(name) is not None:
            _give_way(frames, {name: content[name]})
            frames |= {"sampling": strategy, name: content[name]}
    frames |= _said(content, "min_frames", "max_frames")
    pixels |= _pixels(content, file)
    return {"tokens": tokens, "resize": size, "sampling": frames, "format": pixels}


def _family(content: Mapping[str, Any], file: Path) -> str:
    keys = ("video_processor_type", "processor_class", "image_processor_type")
    classes = [str(content[key]) for key in keys if content.get(key)]
    for name in classes:
        for start, model in _FAMILIES.items():
            if name.startswith(start):
                return model
    raise ValueError(
        f"{file} is of {', '.join(classes) or 'no named class'}: understood are HuggingFace processors whose class "
        f"begins with {', '.join(_FAMILIES)}. For another model, write its settings into a YAML file as in conf/video."
    )


def _size(content: Mapping[str, Any], tokens: Mapping[str, Any], rule: str, file: Path) -> dict[str, Any]:
    """Of the section ``resize``."""
    if content.get("do_resize") is False:
        return {"rule": "none"}
    found: dict[str, Any] = {}
    if (resample := content.get("resample")) is not None:
        if resample not in _INTERPOLATIONS:
            raise ValueError(f"{file}: resample={resample} is none of 2 (bilinear) and 3 (bicubic), which there are.")
        found["interpolation"] = _INTERPOLATIONS[resample]
    size = content.get("size") or {}
    if rule in ("smart", "fill"):
        factor = tokens["patch_size"] * tokens["merge_size"]
        found |= {"size_factor": factor, "temporal_factor": tokens["temporal_patch_size"]}
    if rule == "fill":
        return found | ({"max_pixels": content["max_soft_tokens"] * factor**2} if "max_soft_tokens" in content else {})
    if rule == "smart":
        if not isinstance(size, Mapping):
            raise ValueError(f"{file}: size={size!r} is no mapping of shortest_edge and longest_edge.")
        for budget, edge in (("min_pixels", "shortest_edge"), ("max_pixels", "longest_edge")):
            if value := content.get(budget) or size.get(budget) or size.get(edge):
                found[budget] = value
        return found
    crop = content.get("crop_size")
    if crop and content.get("do_center_crop") is not False:
        sides = _sides(crop, file)
        if isinstance(size, Mapping) and size.get("shortest_edge", min(sides)) != min(sides):
            raise ValueError(f"{file}: size={size} scales to another size than crop_size={crop} covers: no rule does.")
        return found | {"rule": "crop", "image_size": sides}
    return found | ({"rule": "stretch", "image_size": _sides(size, file)} if size else {})


def _sides(size: Any, file: Path) -> list[int]:
    if isinstance(size, int):
        return [size, size]
    if not isinstance(size, Mapping) or not {"height", "width"} <= size.keys():
        raise ValueError(f"{file}: size={size} leaves frames of any aspect: give height and width, or crop_size.")
    return [size["height"], size["width"]]


def _pixels(content: Mapping[str, Any], file: Path) -> dict[str, Any]:
    """Of the section ``format``."""
    factor = content.get("rescale_factor", 1 / 255)
    if abs(factor * 255 - 1) > 1e-6:
        raise ValueError(f"{file}: rescale_factor={factor}: pixels are divided by 255 or left as they are.")
    found: dict[str, Any] = {}
    if "do_rescale" in content:
        found["rescale"] = content["do_rescale"]
    if content.get("do_normalize") is False:
        return found | {"mean": None, "std": None}
    return found | _said(content, mean="image_mean", std="image_std")


def _language_model(file: Path) -> dict[str, int]:
    """What a config.json says of the language model, of the section ``tokens``; nothing where there is no such file."""
    if not file.is_file():
        return {}
    content = _read_json(file, "text_config")
    found = _said(content, "hidden_size", context_length="max_position_embeddings")
    if set(content.get("layer_types") or ()) - {"full_attention"}:
        return found  # layers that keep a window of tokens: the cache is no product of sizes
    found |= _said(content, "head_dim", num_layers="num_hidden_layers", num_kv_heads="num_key_value_heads")
    if "head_dim" not in found and "num_attention_heads" in content and "hidden_size" in content:
        found["head_dim"] = content["hidden_size"] // content["num_attention_heads"]
    return found


def _said(content: Mapping[str, Any], *same: str, **renamed: str) -> dict[str, Any]:
    """Our name → what a file says under its own; null is nothing said."""
    names = {name: name for name in same} | renamed
    return {ours: content[theirs] for ours, theirs in names.items() if content.get(theirs) is not None}


def _read_json(file: Path, inner: str = "") -> dict[str, Any]:
    """A JSON object, with what its key ``inner`` holds laid over it; what is reckoned with has the right type."""
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{file} is not JSON: {error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{file} must be a JSON object, as transformers' save_pretrained writes it.")
    if isinstance(content.get(inner), dict):
        content |= content[inner]
    for names, kind in ((_WHOLE, int), (("rescale_factor",), float)):
        for name in names:
            if content.get(name) is not None:
                _checked(content[name], kind, f"{file}: {name}={content[name]!r}")
    return content
