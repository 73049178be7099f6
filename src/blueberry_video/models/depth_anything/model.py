"""Depth Anything (arXiv 2401.10891, 2406.09414; github.com/DepthAnything): depth of single images.

Shapes: B images of H x W pixels.
"""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, Self

import torch
from torch import Tensor, nn

from blueberry_video.atomic import atomic_file
from blueberry_video.models.depth_anything.convert import (
    UNKNOWN,
    Published,
    check_settings,
    convert_published,
    license_text,
    published_taps,
    read_published,
    to_published,
)
from blueberry_video.models.depth_anything.dpt import DPTHead
from blueberry_video.models.dinov2 import DINOv2
from blueberry_video.weights.diffusers_folder import TRANSFORMERS, write_folder
from blueberry_video.weights.load import check_config, check_layout, load_strictly

HEADS = ("depth_head.", "neck.", "head.")  # prefixes of heads in all layouts


class DepthAnything(nn.Module):
    """DINOv2 and a DPT head: images (B, 3, H, W), normalized with ImageNet mean and std, to maps (B, H, W).

    H and W are multiples of the patch size. Maps are affine-invariant disparity, at least 0 and larger for nearer
    pixels; with ``max_depth`` of the head, depth in meters. Parameter names are those of the original.

    Args:
        encoder: image transformer, ``pretrained`` in the original.
        taps: indices of the four blocks, ascending, from which the head reads: 2, 5, 8, 11 in V2 S and B; the last four
            in V1.
        features, out_channels, max_depth: see :class:`~blueberry_video.models.depth_anything.dpt.DPTHead`.

    Raises:
        ValueError: for taps that are not four ascending indices of blocks; in ``forward``, for images that are not
            (B, 3, H, W) with H and W in whole patches (the message names the nearest size).
    """

    def __init__(
        self,
        encoder: DINOv2,
        taps: Sequence[int] = (2, 5, 8, 11),
        features: int = 64,
        out_channels: Sequence[int] = (48, 96, 192, 384),
        max_depth: float | None = None,
    ):
        super().__init__()
        self.taps = checked_taps(taps, len(encoder.blocks))
        self.max_depth, self.patch_size = max_depth, encoder.patch_size[1]
        self.pretrained = encoder
        self.depth_head = DPTHead(encoder.embed_dim, features, out_channels, self.patch_size, max_depth)

    def forward(self, images: Tensor) -> Tensor:
        """Predicts maps (B, H, W)."""
        if images.ndim != 4:
            raise ValueError(f"images has shape {tuple(images.shape)}: it must be (B, 3, H, W).")
        layers = [tokens for tokens, _ in self.pretrained.tokens_behind(images[:, :, None], self.taps)]
        return self.depth_head(layers, (images.shape[2] // self.patch_size, images.shape[3] // self.patch_size))

    def load_published(self, weights: str | Path, encoder_only: bool = False) -> str:
        """Loads published weights, or a checkpoint of a run, strictly.

        Args:
            weights: see :func:`~blueberry_video.models.depth_anything.convert.read_published`.
            encoder_only: load the encoder of the weights and keep the head, as for fine-tuning to metric depth.

        Returns:
            A sentence on what was loaded and on the license of the published weights.

        Raises:
            FileNotFoundError: there are no such weights.
            ValueError: the weights are of a different size, or of different taps, ``max_depth`` or number of heads
                where the source states them; the message names key and value.
        """
        published = read_published(weights)
        return self._load(published, convert_published(published.state, weights), weights, encoder_only)

    def _load(
        self, published: Published, weights: dict[str, Tensor], source: str | Path, encoder_only: bool = False
    ) -> str:
        terms = license_text(self.pretrained.embed_dim, self.taps, len(self.pretrained.blocks))
        if encoder_only:
            return f"{load_encoder(self.pretrained, published, weights, source)}; {terms}"
        check_settings(published, self.taps, self.max_depth, source)
        check_encoder(self.pretrained, published, source)
        load_strictly(self, weights, source, "Build the model in the size of the weights.")
        return f"loaded {len(weights)} tensors from {source}; {terms}"

    @classmethod
    def from_published(
        cls,
        weights: str | Path,
        image_size: int = 518,
        taps: Sequence[int] | None = None,
        max_depth: float | Literal["published"] | None = "published",
        num_heads: int | None = None,
    ) -> Self:
        """Builds a Depth Anything of the size of published weights, and prints their license.

        Positions are interpolated as by the library of the layout, the original or transformers.

        Args:
            weights: see :func:`~blueberry_video.models.depth_anything.convert.read_published`.
            image_size: nominal size; any multiple of the patch size is accepted.
            taps: those of the source; required if it states none.
            max_depth: ``"published"`` is that of the source; if it states none, ``None`` for relative disparity or the
                largest depth in meters is required.
            num_heads: attention heads, see :meth:`.dinov2.DINOv2.from_published`; the file names of the originals
                state them.

        Raises:
            FileNotFoundError, ValueError: see :meth:`load_published`.
        """
        published = read_published(weights)
        tensors = convert_published(published.state, weights)
        encoder, sizes = published_sizes(published, tensors, weights, image_size, taps, max_depth, num_heads)
        model = cls(encoder, **sizes)
        print(model._load(published, tensors, weights))
        return model

    def save_published(self, path: str | Path) -> None:
        """Writes the weights.

        Args:
            path: a file ``….pth`` for the original layout; otherwise a folder that ``from_pretrained`` of transformers'
                ``DepthAnythingForDepthEstimation`` loads.

        Raises:
            FileExistsError: the folder exists and is not empty.
            ValueError: a setting has no counterpart in transformers, such as the original's ``interpolate_offset`` of
                0.1 of the encoder; the message names key and value.
        """
        if Path(path).suffix == ".pth":
            with atomic_file(Path(path)) as file:
                torch.save(to_published(self.state_dict(), huggingface=False), file)
            return
        write_folder(path, self.config(), to_published(self.state_dict(), huggingface=True), stem=TRANSFORMERS)

    def config(self) -> dict[str, Any]:
        """Settings of this model as ``config.json`` of transformers holds them.

        Raises:
            ValueError: see :meth:`save_published`.
        """
        name = "DepthAnythingForDepthEstimation"
        max_depth = self.max_depth  # an integer there
        if max_depth is not None:
            max_depth = max(round(max_depth), 1) if math.isfinite(max_depth) else 80
        check_layout(f"the layout of transformers' {name}", {"model.max_depth": (self.max_depth, max_depth)})
        scratch = self.depth_head.scratch
        stages = [tap + 1 for tap in self.taps]
        return {
            "architectures": [name],
            "model_type": "depth_anything",
            "backbone_config": self.pretrained.config()
            | {
                "out_indices": stages,
                "out_features": [f"stage{stage}" for stage in stages],
                "apply_layernorm": True,
                "reshape_hidden_states": False,
            },
            "patch_size": self.patch_size,
            "reassemble_hidden_size": self.pretrained.embed_dim,
            "reassemble_factors": [4, 2, 1, 0.5],
            "neck_hidden_sizes": [project.out_channels for project in self.depth_head.projects],
            "fusion_hidden_size": scratch.output_conv1.in_channels,
            "head_hidden_size": scratch.output_conv2[0].out_channels,
            "head_in_index": -1,
            "depth_estimation_type": "relative" if self.max_depth is None else "metric",
            "max_depth": max_depth or 1,  # a factor there, also of disparity
        }


def checked_taps(taps: Sequence[int], blocks: int) -> tuple[int, ...]:
    """Returns ``taps`` if they are four ascending indices of ``blocks`` blocks; raises ``ValueError`` otherwise."""
    if len(taps) != 4 or list(taps) != sorted(set(taps)) or not 0 <= taps[0] <= taps[-1] < blocks:
        raise ValueError(f"taps={list(taps)} must be four ascending indices of the blocks, 0 to {blocks - 1}.")
    return tuple(taps)


def check_encoder(encoder: DINOv2, published: Published, source: str | Path) -> None:
    """Raises ``ValueError`` if the number of heads differs from that in the config of the weights."""
    fix = "Choose the model.encoder of the weights."
    check_config(encoder, published.encoder, encoder.published_settings, source, fix)


def load_encoder(encoder: DINOv2, published: Published, weights: dict[str, Tensor], source: str | Path) -> str:
    """Loads the encoder of converted weights; returns a sentence on it."""
    check_encoder(encoder, published, source)
    prefix = "pretrained."
    inside = {name.removeprefix(prefix): value for name, value in weights.items() if name.startswith(prefix)}
    load_strictly(encoder, inside, source, "Choose the model.encoder of the weights.")
    return f"loaded {len(inside)} tensors of the encoder from {source}; the head keeps its weights"


def published_sizes(
    published: Published,
    weights: dict[str, Tensor],
    source: str | Path,
    image_size: int,
    taps: Sequence[int] | None,
    max_depth: float | Literal["published"] | None,
    num_heads: int | None,
) -> tuple[DINOv2, dict[str, Any]]:
    """Encoder with its weights, and the other arguments of a model, from converted weights; see
    :meth:`DepthAnything.from_published`."""
    encoder_state = {name: value for name, value in published.state.items() if not name.startswith(HEADS)}
    encoder_state = {name.removeprefix("pretrained."): value for name, value in encoder_state.items()}
    encoder = DINOv2.from_state(published.encoder, encoder_state, source, image_size, 1, num_heads)
    encoder.offset = published.encoder.get("interpolate_offset", encoder.offset)  # of save_published of a video model
    if max_depth == "published":
        if published.max_depth == UNKNOWN:
            raise ValueError(
                f"{source} does not state whether it predicts metric depth: pass max_depth=None for relative "
                "disparity, or the largest depth in meters (20 for Hypersim, 80 for Virtual KITTI), or use the file "
                "name of the original, such as depth_anything_v2_vits.pth."
            )
        max_depth = published.max_depth
    head = {name.partition(".")[2]: value for name, value in weights.items() if name.startswith(HEADS)}
    sizes = ["scratch.layer1_rn.weight", *(f"projects.{i}.weight" for i in range(4))]
    if missing := [name for name in sizes if name not in head]:
        raise ValueError(f"{source} is not a complete Depth Anything: {missing[0]} of the head is missing.")
    features, *out_channels = (len(head[name]) for name in sizes)
    return encoder, {
        "taps": published_taps(published, len(encoder.blocks), source) if taps is None else tuple(taps),
        "features": features,
        "out_channels": out_channels,
        "max_depth": max_depth,
    }
