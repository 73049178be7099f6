"""Video Depth Anything (arXiv 2501.12375; github.com/DepthAnything/Video-Depth-Anything): depth of videos.

The encoder and the DPT head are those of Depth Anything V2 and process every frame separately. Four temporal modules in
the head mix the frames: the published ones with attention over 32 frames, or causal ones with a selective scan, which
give the same maps frame by frame as for the whole video at once.

Shapes: B videos of T frames of H x W pixels.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar, Literal, Self

import torch
from torch import Tensor, nn

from blueberry_video.atomic import atomic_file, atomic_folder
from blueberry_video.models.depth_anything.convert import (
    MODEL_SETTINGS,
    VIDEO_FILE,
    Published,
    check_settings,
    convert_published_video,
    license_text,
    read_published,
    to_published_video,
)
from blueberry_video.models.depth_anything.dpt import DPTHead
from blueberry_video.models.depth_anything.model import check_encoder, checked_taps, load_encoder, published_sizes
from blueberry_video.models.depth_anything.temporal import (
    WINDOW,
    State,
    TemporalAttention,
    TemporalModule,
    TemporalScan,
)
from blueberry_video.models.dinov2 import DINOv2
from blueberry_video.weights.diffusers_folder import CONFIG
from blueberry_video.weights.load import load_strictly

MODULES = "head.motion_modules."


class VideoDepthAnything(nn.Module):
    """DINOv2 and a DPT head with temporal modules: video (B, 3, T, H, W) to maps (B, T, H, W).

    Videos are normalized with ImageNet mean and std; H and W are multiples of the patch size. Maps are affine-invariant
    disparity, at least 0 and larger for nearer pixels; with ``max_depth``, depth in meters. At initialization the maps
    equal those of :class:`~blueberry_video.models.depth_anything.model.DepthAnything` with the same weights.

    Args:
        encoder: image transformer, ``pretrained`` in the original.
        taps: see :class:`~blueberry_video.models.depth_anything.model.DepthAnything`.
        features, out_channels, max_depth: see :class:`~blueberry_video.models.depth_anything.dpt.DPTHead`.
        temporal: ``"attention"`` over up to 32 frames as published, ``"scan"`` (causal, any number of frames), or
            ``"none"``: every frame separately.
        norm_groups: groups of the GroupNorm of the temporal modules; divides ``features`` and the last two of
            ``out_channels``.
        temporal_heads: heads of the attention.
        scan_head_dim, scan_state_dim, scan_conv_size: see
            :class:`~blueberry_video.models.depth_anything.temporal.TemporalScan`.
        freeze_encoder: train only the head, as published; the encoder stays in evaluation mode.

    Raises:
        ValueError: ``temporal`` is unknown, or a size does not divide; in ``forward`` and ``step``, the shape of the
            video is invalid, or it has more than 32 frames with attention.
    """

    def __init__(
        self,
        encoder: DINOv2,
        taps: Sequence[int] = (2, 5, 8, 11),
        features: int = 64,
        out_channels: Sequence[int] = (48, 96, 192, 384),
        max_depth: float | None = None,
        temporal: Literal["attention", "scan", "none"] = "attention",
        norm_groups: int = 32,
        temporal_heads: int = 8,
        scan_head_dim: int = 16,
        scan_state_dim: int = 16,
        scan_conv_size: int = 3,
        freeze_encoder: bool = True,
    ):
        super().__init__()
        if temporal not in ("attention", "scan", "none"):
            raise ValueError(f"temporal={temporal!r} is unknown: choose 'attention', 'scan' or 'none'.")
        self.taps = checked_taps(taps, len(encoder.blocks))
        self.temporal, self.freeze_encoder, self.max_depth = temporal, freeze_encoder, max_depth
        self.norm_groups, self.temporal_heads = norm_groups, temporal_heads
        self.scan_head_dim, self.scan_state_dim, self.scan_conv_size = scan_head_dim, scan_state_dim, scan_conv_size
        self.patch_size = encoder.patch_size[1]
        self.pretrained = encoder
        self.head = TemporalDPTHead(encoder.embed_dim, features, out_channels, self.patch_size, max_depth)
        if temporal != "none":
            for channels in (*out_channels[2:], features, features):
                mixers: list[TemporalAttention | TemporalScan] = [
                    TemporalAttention(channels, temporal_heads)
                    if temporal == "attention"
                    else TemporalScan(channels, scan_head_dim, scan_state_dim, scan_conv_size)
                    for _ in range(2)
                ]
                self.head.motion_modules.append(TemporalModule(channels, mixers, norm_groups))
        if freeze_encoder:
            encoder.requires_grad_(False)

    @property
    def streams_exactly(self) -> bool:
        """Whether the maps of :meth:`step` equal those of :meth:`forward`."""
        return self.temporal != "attention"

    def train(self, mode: bool = True) -> "VideoDepthAnything":
        super().train(mode)
        if self.freeze_encoder:
            self.pretrained.eval()
        return self

    def forward(self, video: Tensor) -> Tensor:
        """Predicts maps (B, T, H, W) of all frames at once."""
        if video.ndim != 5:
            raise ValueError(f"video has shape {tuple(video.shape)}: it must be (B, 3, T, H, W).")
        frames = video.shape[2]
        if self.temporal == "attention" and frames > WINDOW:
            raise ValueError(
                f"video has T={frames} frames, but the attention of temporal=attention has {WINDOW} positions: predict "
                "long videos in overlapping windows (inference/depth.py), or frame by frame with step."
            )
        images = video.transpose(1, 2).flatten(0, 1)
        return self.head(self._layers(images), self._grid(images), frames).unflatten(0, (len(video), frames))

    def step(self, frame: Tensor, state: State | None = None) -> tuple[Tensor, State]:
        """Predicts the map of the next frame of a stream.

        With a scan, and without temporal modules, the maps equal those of :meth:`forward`. With attention they are
        those of the published streaming mode.

        Args:
            frame: (B, 3, H, W).
            state: the state after the preceding frame, ``None`` before the first.

        Returns:
            The map (B, H, W), and the state after the frame: tensors of a size that does not depend on the number of
            frames.

        Raises:
            ValueError: the state is that of a different batch, size or model.
        """
        if frame.ndim != 4:
            raise ValueError(f"frame has shape {tuple(frame.shape)}: it must be (B, 3, H, W).")
        return self.head.step(self._layers(frame), self._grid(frame), state)

    def load_published(self, weights: str | Path, encoder_only: bool = False) -> str:
        """Loads published weights of a video or an image model, or a checkpoint of a run, strictly.

        Weights without temporal modules, as of an image model, leave those of this model as they are: at
        initialization they do not change the maps.

        Args:
            weights: a file, or a folder of :meth:`save_published`; of image models see
                :meth:`.model.DepthAnything.load_published`.
            encoder_only: load the encoder of the weights and keep the head.

        Returns:
            A sentence on what was loaded and on the license of the published weights.

        Raises:
            FileNotFoundError: there are no such weights.
            ValueError: the weights are of a different size or kind of temporal module, or of different taps,
                ``max_depth`` or number of heads where the source states them; the message names key and value.
        """
        published = read_published(weights)
        return self._load(published, convert_published_video(published.state, weights), weights, encoder_only)

    def _load(
        self, published: Published, weights: dict[str, Tensor], source: str | Path, encoder_only: bool = False
    ) -> str:
        kind = kind_of(weights)
        published_video = kind == "attention"  # scans are trained with the encoder of Depth Anything
        terms = license_text(self.pretrained.embed_dim, self.taps, len(self.pretrained.blocks), published_video)
        if encoder_only:
            return f"{load_encoder(self.pretrained, published, weights, source)}; {terms}"
        check_settings(published, self.taps, self.max_depth, source)
        check_encoder(self.pretrained, published, source)
        check_temporal(self, kind, published.settings, source)
        count, kept = len(weights), ""
        if kind == "none" and self.temporal != "none":
            weights |= {name: value for name, value in self.state_dict().items() if name.startswith(MODULES)}
            kept = "; it has no temporal modules, those of the model are kept"
        load_strictly(self, weights, source, "Build the model in the size of the weights.")
        return f"loaded {count} tensors from {source}{kept}; {terms}"

    @classmethod
    def from_published(
        cls,
        weights: str | Path,
        image_size: int = 518,
        taps: Sequence[int] | None = None,
        max_depth: float | Literal["published"] | None = "published",
        num_heads: int | None = None,
        **options: Any,
    ) -> Self:
        """Builds a Video Depth Anything of the size of published weights, and prints their license.

        Args:
            weights, image_size, taps, max_depth, num_heads: see :meth:`.model.DepthAnything.from_published`.
            options: further arguments of the constructor. By default those of the source; where it states none, the
                kind of temporal module is that of the weights, and sizes are those of the published models.

        Raises:
            FileNotFoundError, ValueError: see :meth:`load_published`.
        """
        published = read_published(weights)
        tensors = convert_published_video(published.state, weights)
        encoder, sizes = published_sizes(published, tensors, weights, image_size, taps, max_depth, num_heads)
        known = {key: value for key, value in published.settings.items() if key not in sizes}
        if (found := kind_of(tensors)) != "none":
            known["temporal"] = found
        model = cls(encoder, **(sizes | known | options))
        print(model._load(published, tensors, weights))
        return model

    def save_published(self, path: str | Path) -> None:
        """Writes the weights in the layout of the original, which has no folders and no counterpart in transformers.

        Args:
            path: a file ``….pth``; otherwise a folder with ``video_depth_anything.pth`` and the settings of this model
                in ``config.json``.

        Raises:
            FileExistsError: the folder exists and is not empty.
        """
        path = Path(path)
        if path.suffix == ".pth":
            with atomic_file(path) as file:
                torch.save(to_published_video(self.state_dict()), file)
            return
        if path.is_file() or (path.is_dir() and any(path.iterdir())):
            raise FileExistsError(f"{path} exists and is not an empty folder: choose a different folder.")
        settings = {key: getattr(self, key) for key in MODEL_SETTINGS}
        encoder = self.pretrained.published_settings | {"interpolate_offset": self.pretrained.offset}
        config = {"architectures": [type(self).__name__], "encoder": encoder, **settings}
        with atomic_folder(path) as partial:
            (partial / CONFIG).write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
            torch.save(to_published_video(self.state_dict()), partial / VIDEO_FILE)

    def _layers(self, images: Tensor) -> list[Tensor]:
        """Tokens of the tapped blocks of images (n, 3, H, W)."""
        if self.freeze_encoder and torch.is_grad_enabled():
            with torch.no_grad():
                return self._layers(images)
        return [tokens for tokens, _ in self.pretrained.tokens_behind(images[:, :, None], self.taps)]

    def _grid(self, images: Tensor) -> tuple[int, int]:
        return images.shape[2] // self.patch_size, images.shape[3] // self.patch_size


class TemporalDPTHead(DPTHead):
    """DPT head with modules over time, four or none, in the order of the original. Arguments: see :class:`DPTHead`."""

    block_lists: ClassVar[tuple[str, ...]] = ("motion_modules",)  # sharded one by one

    def __init__(
        self, embed_dim: int, features: int, out_channels: Sequence[int], patch_size: int, max_depth: float | None
    ):
        super().__init__(embed_dim, features, out_channels, patch_size, max_depth)
        self.motion_modules: Any = nn.ModuleList()

    def forward(self, layers: Sequence[Tensor], grid: tuple[int, int], frames: int = 1) -> Tensor:  # type: ignore[override]
        """Tokens of four layers (B T, h w, D) of videos of T = ``frames`` frames -> maps (B T, P h, P w)."""
        modules = [lambda x, module=module: module(x, frames) for module in self.motion_modules]
        return super().forward(layers, grid, modules or None)

    def step(self, layers: Sequence[Tensor], grid: tuple[int, int], state: State | None) -> tuple[Tensor, State]:
        """Tokens of four layers (B, h w, D) of the next frame -> maps (B, P h, P w) and the state after it."""
        expected = sum(module.num_states for module in self.motion_modules)
        if state is not None and len(state) != expected:
            raise ValueError(
                f"the state has {len(state)} tensors, expected {expected}: pass the state that step of this model "
                "returned for the preceding frame."
            )
        after: list[Tensor] = []

        def advance(x: Tensor, module: TemporalModule) -> Tensor:
            before = None if state is None else state[len(after) : len(after) + module.num_states]
            x, new = module.step(x, before)
            after.extend(new)
            return x

        modules = [lambda x, module=module: advance(x, module) for module in self.motion_modules]
        return super().forward(layers, grid, modules or None), tuple(after)


def kind_of(weights: dict[str, Tensor]) -> str:
    """Kind of the temporal modules of converted weights."""
    if any(name.startswith(MODULES) and name.endswith(".to_q.weight") for name in weights):
        return "attention"
    return "scan" if any(name.startswith(MODULES) for name in weights) else "none"


def check_temporal(model: VideoDepthAnything, kind: str, settings: dict[str, Any], source: str | Path) -> None:
    """Checks that temporal modules of weights are of the kind of those of a model and have the same known settings.

    Weights of kind ``"none"`` fit every model.

    Raises:
        ValueError: they differ; the message names key and value.
    """
    if kind == "none":
        return
    if kind != model.temporal:
        raise ValueError(
            f"model.temporal={model.temporal} does not fit {source}, which has temporal modules of kind {kind}: set "
            f"model.temporal={kind}, or load an image model."
        )
    for key in ("norm_groups", "temporal_heads") if kind == "attention" else ("norm_groups",):
        if key in settings and settings[key] != getattr(model, key):
            raise ValueError(
                f"model.{key}={getattr(model, key)} does not fit {source}: set model.{key}={settings[key]}."
            )
