"""Encoders from published weights or from a trained run, with the preprocessing of their model.

    from blueberry_video import load_encoder
    encoder = load_encoder("MCG-NJU/videomae-base")
    encoder.features("clip.mp4")     # tokens (1, N, D)

Settings that no tensor determines are read from the config next to the weights, or given.
"""

import json
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from blueberry_video.data.clip_reader import ClipReader
from blueberry_video.models.depth_anything import DepthAnything, VideoDepthAnything
from blueberry_video.models.depth_anything.convert import is_video, read_published
from blueberry_video.models.dinov2 import DINOv2
from blueberry_video.models.encoder import Encoder
from blueberry_video.models.jepa.model import JEPA
from blueberry_video.models.vit import VisionTransformer
from blueberry_video.tasks.clip_format import UNIFORM, ClipFormat
from blueberry_video.trained_model import TrainedModel, load_run
from blueberry_video.video.decode import Frames
from blueberry_video.video.model_files import IMAGENET
from blueberry_video.weights import hub
from blueberry_video.weights.diffusers_folder import CONFIG, UNKNOWN_FAMILY, family, read_config
from blueberry_video.weights.files import read_content, resolve, without_prefixes

PIPELINE = "model_index.json"  # of a folder of diffusers with several models
PROCESSORS = ("preprocessor_config.json", "video_preprocessor_config.json")
FRAMES = 16  # of encoders that process frames independently
DINOV2_SIZE, DEPTH_SIZE = 224, 518  # pixels, where no processor states them


class Given(NamedTuple):
    """Arguments of :func:`load_encoder` that no tensor determines."""

    num_heads: int | None
    num_frames: int | None
    image_size: int | None
    which: str | None


class PretrainedEncoder(ClipReader):
    """Encoder of published weights that reads videos with the preprocessing of its model.

    Args:
        weights: origin of the weights.
        encoder: the encoder.
        clips: format of the clips.
        device: device of the encoder.

    Attributes:
        weights, encoder, clips: the arguments; the encoder is in evaluation mode.
    """

    def __init__(self, weights: str | Path, encoder: Encoder, clips: ClipFormat, device: torch.device | str):
        self.weights, self.clips = str(weights), clips
        self.sampling, self.resize = clips.sampling, clips.resize
        self.encoder = encoder.to(device).eval().requires_grad_(False)
        stats = torch.tensor([clips.mean or IMAGENET["mean"], clips.std or IMAGENET["std"]], device=device)
        self._mean, self._std = stats.view(2, 1, 3, 1, 1, 1)

    @property
    def origin(self) -> str:
        """Where the weights come from: the absolute path of files, or the id and commit of a repository on a hub."""
        path = resolve(self.weights)
        if Path(self.weights).exists():
            return str(path.resolve())
        return f"{self.weights} ({path.parts[path.parts.index('snapshots') + 1]})"

    @property
    def device(self) -> torch.device:
        return self._mean.device

    @torch.no_grad()
    def encode(self, clips: Sequence[Frames]) -> Tensor:
        video = self.batch(clips, ["clip"] * len(clips))["video"]
        return self.encoder((video - self._mean) / self._std)

    def patches(self, height: int, width: int) -> tuple[int, int]:
        return self.encoder.grid((self.encoder.patch_size[0], height, width))[1:]


def load_encoder(
    weights: str | Path,
    num_heads: int | None = None,
    num_frames: int | None = None,
    image_size: int | None = None,
    which: str | None = None,
    device: torch.device | str | None = None,
) -> PretrainedEncoder | TrainedModel:
    """Opens an encoder for inference: VideoMAE, VideoMAE V2, OmniMAE, V-JEPA, V-JEPA 2, DINOv2, that of Depth Anything
    and Video Depth Anything, or that of a run.

    Args:
        weights: a run folder or the folder of an experiment (its newest run); a folder in the layout of transformers,
            an original file, or weights on a hub, see :func:`~blueberry_video.weights.files.resolve`.
        num_heads: attention heads, required for weights without a config.
        num_frames, image_size: size of the clips; by default that of the config and the processor in the folder. See
            the ``from_published`` of the model for weights without them; DINOv2 and Depth Anything, which encode frames
            independently, default to 16 frames of 224 and 518 pixels.
        which: encoder of V-JEPA, ``"target_encoder"`` or ``"encoder"``; by default the target encoder, which the papers
            evaluate, where the weights have one.
        device: ``None`` for the GPU if there is one.

    Returns:
        An object with ``read``, ``over``, ``batch``, ``encode`` and ``features``.

    Raises:
        FileNotFoundError: there are no such weights, or the hub cannot be reached.
        ValueError: the weights are of a different architecture, a setting is unknown, or contradicts the config.
    """
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    given = Given(num_heads, num_frames, image_size, which)
    if is_run(weights):
        if known := [f"{key}={value}" for key, value in given._asdict().items() if value is not None]:
            raise ValueError(f"{weights} is a run, whose config has all settings: leave {', '.join(known)} out.")
        return load_run(weights, device)
    refuse_other_repositories(weights)
    path = resolve(weights)
    if (run := path.absolute().parent.parent / "run.json").is_file() and path.parent.name == "checkpoints":
        raise ValueError(f"{weights} is a checkpoint of a run: give the run folder, {run.parent}.")
    folder = path if path.is_dir() else path.parent
    kind = kind_of_folder(path, weights) if path.is_dir() else kind_of_file(path, weights)
    processor = processor_of(folder) if (folder / CONFIG).is_file() else {}
    encoder = LOADERS[kind](path, given, processor)
    _, frames, height, width = encoder.video_size
    clips = ClipFormat(
        num_frames=frames,
        height=height,
        width=width,
        sampling={**UNIFORM, "num_frames": frames},
        resize={"rule": "crop", "image_size": [height, width], "resample": "fast", "interpolation": "bilinear"},
        mean=processor.get("image_mean") or IMAGENET["mean"],
        std=processor.get("image_std") or IMAGENET["std"],
    )
    return PretrainedEncoder(weights, encoder, clips, device)


def is_run(weights: str | Path) -> bool:
    """Whether a path is a run folder, or a folder of runs."""
    path = Path(weights)
    return (path / "run.json").is_file() or (path.is_dir() and any(path.glob("*/run.json")))


def refuse_other_repositories(weights: str | Path) -> None:
    """Raises for a repository on a hub whose config states a different architecture, before its weights are downloaded.

    Raises:
        ValueError: see :func:`kind_of_folder`.
    """
    source = None if Path(weights).exists() else hub.parse(str(weights))
    if source is None or source.file is not None:
        return
    for name in (CONFIG, PIPELINE):
        try:
            file = hub.fetch(source._replace(file=name))
        except FileNotFoundError:  # `resolve` says why, if it is not the file alone that is missing
            continue
        kind_of_folder(file.parent, weights)
        return


def kind_of_folder(folder: Path, weights: str | Path) -> str:
    """Returns the architecture of a folder, a key of ``LOADERS``, from its config.

    Raises:
        FileNotFoundError: there is no config.
        ValueError: it is of a different architecture; the message names it.
    """
    if not (folder / CONFIG).is_file():
        if (folder / PIPELINE).is_file():
            found = json.loads((folder / PIPELINE).read_text()).get("_class_name", "pipeline of diffusers")
            raise ValueError(wrong_family(weights, found))
        raise FileNotFoundError(
            f"{weights} holds no {CONFIG} and no run: give a run folder, a folder of transformers, or a weight file."
        )
    config = read_config(folder)
    kind = config.get("model_type") or (config.get("architectures") or [config.get("_class_name")])[0]
    if kind not in LOADERS:
        names = config.get("architectures") or [config.get("_class_name") or "an unknown architecture"]
        raise ValueError(wrong_family(weights, f"{names[0]} ({CONFIG}: {kind or 'no model_type'})"))
    return kind


def kind_of_file(file: Path, weights: str | Path) -> str:
    """Returns the architecture of a weight file, a key of ``LOADERS``, from the names of its tensors.

    Raises:
        ValueError: it is of a different architecture; the message names it.
    """
    content: Any = read_content(file)
    if isinstance(content, Mapping) and {"encoder", "target_encoder"} & {
        name for name, value in content.items() if isinstance(value, Mapping)
    }:
        return "vjepa2"
    for wrapping in ("model", "module", "state_dict"):
        if isinstance(content, Mapping) and isinstance(content.get(wrapping), Mapping):
            content = content[wrapping]
            break
    state = without_prefixes(content) if isinstance(content, dict) else {}
    found = family(state)
    for kind, pattern in NAMES.items() if found.startswith(UNKNOWN_FAMILY) else ():
        if any(re.search(pattern, name) for name in state):
            return kind
    raise ValueError(wrong_family(weights, found))


def wrong_family(weights: str | Path, found: str) -> str:
    return (
        f"{weights} holds {found}, not an encoder of videos: give weights of VideoMAE, OmniMAE, V-JEPA, V-JEPA 2, "
        "DINOv2 or Depth Anything, or a run."
    )


def processor_of(folder: Path) -> dict[str, Any]:
    """Returns the content of the processor's config in a folder; empty if there is none."""
    file = next((folder / name for name in PROCESSORS if (folder / name).is_file()), None)
    return {} if file is None else json.loads(file.read_text())


def _side(processor: Mapping[str, Any], *keys: str) -> int | None:
    """Returns the smaller side of a size of a processor, in pixels."""
    for key in keys:
        value = processor.get(key)
        if isinstance(value, Mapping):
            value = min(value.values(), default=None)
        if value:
            return int(value)
    return None


def _videomae(path: Path, given: Given, processor: Mapping[str, Any]) -> Encoder:
    return VisionTransformer.from_published(path, given.num_frames, given.image_size, given.num_heads)


def _vjepa(path: Path, given: Given, processor: Mapping[str, Any]) -> Encoder:
    return JEPA.published_encoder(path, given.which, given.num_frames, given.image_size, num_heads=given.num_heads)


def _dinov2(path: Path, given: Given, processor: Mapping[str, Any]) -> Encoder:
    size = given.image_size or _side(processor, "crop_size") or DINOV2_SIZE
    return DINOv2.from_published(path, size, given.num_frames or FRAMES, given.num_heads)


def _depth(path: Path, given: Given, processor: Mapping[str, Any]) -> Encoder:
    video = is_video(read_published(path).state)
    size = given.image_size or _side(processor, "size") or DEPTH_SIZE
    kind = VideoDepthAnything if video else DepthAnything
    encoder = kind.from_published(path, size, num_heads=given.num_heads).pretrained
    channels, _, height, width = encoder.video_size
    encoder.video_size = (channels, given.num_frames or FRAMES, height, width)  # any number is accepted
    return encoder


LOADERS: dict[str, Callable[[Path, Given, Mapping[str, Any]], Encoder]] = {
    "videomae": _videomae,
    "vjepa2": _vjepa,
    "dinov2": _dinov2,
    "dinov2_with_registers": _dinov2,
    "depth_anything": _depth,
    "VideoDepthAnything": _depth,
}
NAMES = {  # architecture -> pattern of a name that its files have; the first that matches counts
    "depth_anything": r"^(pretrained\.|neck\.)",
    "vjepa2": r"embeddings\.patch_embeddings\.proj\.",
    "dinov2": r"(^|\.)(cls_token|embeddings\.cls_token)$",
    "videomae": r"(^|^encoder\.|^trunk\.)patch_embed\.proj\.|embeddings\.patch_embeddings\.projection\.",
}
