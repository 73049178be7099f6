"""Preprocessing of models that come without a processor: hub folders, bare config.json, and this project's encoders."""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

IMAGENET = {"mean": [0.485, 0.456, 0.406], "std": [0.229, 0.224, 0.225]}
FAMILIES = {  # model_type of a config.json → model in conf/video with the same rules
    "qwen2_vl": "qwen2.5-vl",
    "qwen2_5_vl": "qwen2.5-vl",
    "qwen3_vl": "qwen3-vl",
    "llava_next_video": "llava-next-video",
    "llava_onevision": "llava-onevision",
    "internvl": "internvl",
    "gemma4": "gemma",
}
ENCODERS = ("videomae", "vjepa2")  # model_type of encoders


def hub_folder(name: str) -> Path | None:
    """Returns the folder of a hub id ``owner/name`` in the local cache of huggingface_hub; None if it is not there.

    Reads ``HF_HUB_CACHE``, ``HF_HOME`` or ``~/.cache/huggingface``, at the revision ``main``. Downloads nothing.
    """
    if len(Path(name).parts) != 2 or name.startswith((".", "/", "~")):
        return None
    home = os.environ.get("HF_HOME") or "~/.cache/huggingface"
    hub = Path(os.environ.get("HF_HUB_CACHE") or f"{home}/hub").expanduser()
    repository = hub / f"models--{name.replace('/', '--')}"
    revision = repository / "refs" / "main"
    if not revision.is_file():
        return None
    folder = repository / "snapshots" / revision.read_text().strip()
    return folder if folder.is_dir() else None


def encoder_profile(content: Mapping[str, Any], processor: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Returns the settings of a VideoMAE or V-JEPA 2 encoder from its config.json and its processor's, if any.

    The frames are float32 (3, T, H, W), an item of the video tensor of an encoder.
    """
    size = content.get("crop_size") or content.get("image_size") or 224
    return profile(
        num_frames=content.get("frames_per_clip") or content.get("num_frames") or 16,
        size=size if isinstance(size, int) else size[0],
        patch_size=content.get("patch_size", 16),
        tubelet_size=content.get("tubelet_size", 2),
        width=content.get("hidden_size"),
        mean=processor.get("image_mean") or IMAGENET["mean"],
        std=processor.get("image_std") or IMAGENET["std"],
    )


def run_profile(config: Mapping[str, Any], file: Path) -> dict[str, dict[str, Any]]:
    """Returns the settings of the encoder of a run from its resolved config.yaml.

    Raises:
        ValueError: the model of the run has no encoder of a fixed image size.
    """
    model: Mapping[str, Any] = config.get("model") or {}
    inner = model.get("encoder")
    encoder = inner if isinstance(inner, Mapping) else model
    if not {"image_size", "num_frames", "patch_size"} <= encoder.keys():
        raise ValueError(
            f"{file}: the model has no encoder with image_size, num_frames and patch_size, so that the size of its "
            "frames is unknown: write a YAML file as in conf/video."
        )
    given = (config.get("task") or {}).get("input") or {}
    size = encoder["image_size"]
    return profile(
        num_frames=encoder["num_frames"],
        size=size if isinstance(size, int) else list(size),
        patch_size=encoder["patch_size"],
        tubelet_size=encoder.get("tubelet_size") or 1,
        width=None,
        mean=given.get("mean") or IMAGENET["mean"],
        std=given.get("std") or IMAGENET["std"],
    )


def profile(
    num_frames: int, size: int | list[int], patch_size: int, tubelet_size: int, width: int | None, mean: Any, std: Any
) -> dict[str, dict[str, Any]]:
    """Returns the settings of an encoder of clips of a fixed size: center crop, frames spread over the video."""
    tokens = {"patch_size": patch_size, "merge_size": 1, "temporal_patch_size": tubelet_size, "count": "patches"}
    return {
        "sampling": {"sampling": "uniform", "num_frames": num_frames, "frame_factor": 1, "pad_frames": True},
        "resize": {"rule": "crop", "image_size": size, "interpolation": "bilinear"},
        "tokens": tokens | ({} if width is None else {"hidden_size": width}),
        "format": {"dtype": "float32", "layout": "cthw", "rescale": True, "mean": list(mean), "std": list(std)},
    }
