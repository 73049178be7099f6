"""Requests of videos of a trained run.

Shapes: B clips of T x H x W pixels.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from blueberry_video.nn.noise import clip_generators


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
        seed: of all noise; a clip does not depend on B.
        video: first frames uint8 (T, 3, H, W): a token generator continues as many of these as its tokenizer encodes,
            1 + a multiple of its stride; an image-to-video network uses the first.
        decoding: values that replace fields of ``task.decoding``; for diffusion, ``guidance`` is the scale.

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

    def __post_init__(self) -> None:
        if self.num_clips < 1:
            raise ValueError(f"num_clips={self.num_clips} must be at least 1.")
        if not 0 <= self.seed < 2**63:
            raise ValueError(f"seed={self.seed} must be from 0 to 2^63 - 1.")

    def generators(self) -> list[torch.Generator]:
        """Returns a generator for each clip."""
        return clip_generators(torch.Generator().manual_seed(self.seed), self.num_clips)

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
