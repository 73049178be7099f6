"""Requests of videos of a trained run, and videos that are ready to be generated.

Shapes: B clips of T x H x W pixels.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

from blueberry_video.nn.noise import clip_generators


class Prepared(NamedTuple):
    """Videos of a checked request.

    Attributes:
        parts: iterator over consecutive parts (B, 3, n, H, W) in [-1, 1], which generates them.
        size: (H, W).
        settings: all settings of the videos that are no files, as JSON values.
    """

    parts: Iterator[Tensor]
    size: tuple[int, int]
    settings: dict[str, Any]


@dataclass(frozen=True)
class Request:
    """Videos to generate.

    Attributes:
        prompt: caption.
        labels: class by label, as name or index.
        actions: names or indices of the actions that lead to each generated frame; without ``video``, no action leads
            to the first.
        num_frames: T, the frames of ``video`` included; ``None`` for as many as there are actions, or for the length of
            the clips of the run, by which, less one, ``video`` is continued.
        num_clips: B.
        seed: of all noise: clip i has the seed ``seed + i``, so that it does not depend on B.
        video: frames uint8 (T, 3, H, W): a token generator, or a causal network, continues as many of these as it
            encodes; an image-to-video network uses the first; with ``strength``, the video that is changed.
        decoding: values that replace fields of ``task.decoding`` of a token generator.
        negative: caption in place of the unconditional one, of diffusion with classifier-free guidance.
        guidance: scale of classifier-free guidance; ``None`` for that of the run.
        embedded_guidance: scale that a distilled network receives as input; ``None`` for that of the run.
        steps: of the sampler; ``None`` for those of the run.
        size: (H, W) of a diffusion network; ``None`` for that of the run.
        strength: video-to-video: share of the steps that are taken from ``video`` with noise, in (0, 1]; ``None``
            starts from pure noise.

    Raises:
        ValueError: for numbers out of range.
    """

    prompt: str | None = None
    labels: Mapping[str, str | int] = field(default_factory=dict)
    actions: Sequence[str | int] | None = None
    num_frames: int | None = None
    num_clips: int = 1
    seed: int = 0
    video: Tensor | None = None
    decoding: Mapping[str, Any] = field(default_factory=dict)
    negative: str | None = None
    guidance: float | None = None
    embedded_guidance: float | None = None
    steps: int | None = None
    size: tuple[int, int] | None = None
    strength: float | None = None

    def __post_init__(self) -> None:
        if self.num_clips < 1:
            raise ValueError(f"num_clips={self.num_clips} must be at least 1.")
        if self.seed < 0 or self.seed + self.num_clips > 2**63:
            raise ValueError(f"seed={self.seed} must be from 0 to 2^63 - 1.")
        for key in ("guidance", "embedded_guidance"):
            if (scale := getattr(self, key)) is not None and not 0 <= scale < math.inf:
                raise ValueError(f"{key}={scale} must be finite and at least 0; 1 is no guidance.")
        if self.strength is not None and self.video is None:
            raise ValueError(f"strength={self.strength} is the share of noise in a given video: pass video.")

    def generators(self) -> list[torch.Generator]:
        """Returns a generator for each clip."""
        seeds = range(self.seed, self.seed + self.num_clips)
        return [clip_generators(torch.Generator().manual_seed(seed), 1)[0] for seed in seeds]

    def pixels(self, device: torch.device | str = "cpu") -> Tensor:
        """Returns ``video`` for each clip: (B, 3, T, H, W) in [-1, 1]."""
        assert self.video is not None
        video = self.video.transpose(0, 1)[None].to(device).float().div(255) * 2 - 1
        return video.expand(self.num_clips, -1, -1, -1, -1)

    def check_prompt(self, captioned: bool, encoder: Any) -> None:
        """Checks that there is a prompt if and only if the model is conditioned on captions, which it encodes."""
        if not captioned and self.prompt is not None:
            raise ValueError(
                f"prompt={self.prompt!r} has no effect: the model of the run is not conditioned on captions. Leave it "
                "out."
            )
        if captioned and encoder is None:
            raise ValueError(
                "model.text=null: the run was trained on stored text embeddings, and encodes no prompt. Set model.text "
                "in its config.yaml to the text encoder of the embeddings."
            )
        if captioned and self.prompt is None:
            raise ValueError(
                "prompt is missing: the model of the run is conditioned on captions. Pass one like those of its data, "
                "as in PROMPT='a red disc moves left'."
            )
