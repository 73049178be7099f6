"""Conditioning of a token generator from a batch of clips, and the check of its tokenizer."""

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from blueberry_video.models.hydra_video.generator import Conditioning, HydraVideoGenerator


def conditioning_of(model: HydraVideoGenerator, batch: dict, frames: int) -> Conditioning:
    """Returns the conditioning of a batch of clips.

    Args:
        model: its labels, text and actions are those that the clips must have.
        batch: ``labels``, ``caption`` or ``text_pooled`` (B, P), and ``actions`` (B, T - 1) between T frames of pixels.
        frames: frames of tokens.

    Raises:
        ValueError: for clips without these, or with a different number of actions.
    """
    captioned = "text_pooled" if "text_pooled" in batch else "caption"
    needed = [label for label in model.labels if label not in batch.get("labels", {})]
    needed += ["caption"] if model.text_proj is not None and captioned not in batch else []
    needed += ["actions"] if model.num_actions and "actions" not in batch else []
    if needed:
        raise ValueError(
            f"the clips have no {', '.join(needed)}, on which the model is conditioned: choose different data, or "
            "remove it from model.num_classes, model.text or model.num_actions."
        )
    labels = {label: batch["labels"][label] for label in model.labels}
    text = batch[captioned] if model.text_proj is not None else None
    actions: Tensor | None = None
    if model.num_actions:
        actions = batch["actions"]
        if actions.shape[1] != (expected := (frames - 1) * model.actions_per_frame):
            raise ValueError(
                f"the clips have {actions.shape[1]} actions, but {frames} frames of tokens with "
                f"model.actions_per_frame={model.actions_per_frame} require {expected}: set it to the temporal stride "
                "of the tokenizer."
            )
        actions = actions.reshape(len(actions), frames - 1, model.actions_per_frame)
    return Conditioning(labels or None, text, actions)


def check_tokenizer(tokenizer: Any, model: HydraVideoGenerator, shape: Sequence[int]) -> None:
    """Checks that a tokenizer accepts clips (T, C, H, W), and that the model has its vocabulary and grid.

    Raises:
        ValueError: otherwise; the message names the values to set.
    """
    frames, _, height, width = shape
    tokenizer.check(frames, height, width)
    grid = tuple(tokenizer.grid(frames, height, width)[1:])
    if (tokenizer.vocabulary, grid) != (model.vocabulary, model.grid):
        raise ValueError(
            f"model.vocabulary={model.vocabulary} and model.grid={list(model.grid)} must equal those of the tokenizer "
            f"for clips of {height} x {width} pixels: set model.vocabulary={tokenizer.vocabulary} "
            f"model.grid={list(grid)}."
        )
