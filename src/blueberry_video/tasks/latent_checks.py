"""Checks of the settings of latent prediction, and what follows from them: mask token and gradient clipping."""

from collections.abc import Sequence
from typing import Any

from torch import nn


def check_settings(task: Any) -> None:
    """Checks the arguments of a :class:`~blueberry_video.tasks.latent_prediction.LatentPrediction`.

    Raises:
        ValueError: for arguments out of range or in contradiction about the target encoder.
    """
    if not task.maskings:
        raise ValueError("task.maskings=[] must have at least one masking; V-JEPA uses short- and long-range blocks.")
    if task.mask_token not in ("clip_length", "masking"):
        raise ValueError(f"task.mask_token={task.mask_token!r} is unknown: choose 'clip_length' or 'masking'.")
    lengths = task.clip_lengths
    if lengths is not None and (task.mask_token == "masking" or len(set(lengths)) != len(lengths) or not lengths):
        raise ValueError(
            f"task.clip_lengths={lengths} must be different numbers of frames and requires task.mask_token=clip_length."
        )
    if task.loss_exponent <= 0:
        raise ValueError(f"task.loss_exponent={task.loss_exponent} must be above 0: V-JEPA uses 1.")
    if not 0 <= task.sigreg_weight < 1 or task.visible_weight < 0 or not 0 <= task.clip_after <= 1:
        raise ValueError(
            f"task.sigreg_weight={task.sigreg_weight} must be in [0, 1), task.visible_weight={task.visible_weight} "
            f"at least 0 and task.clip_after={task.clip_after} in [0, 1]."
        )
    if bool(task.visible_weight) != (task.model.predictor.proj_context is not None):
        raise ValueError(
            f"task.visible_weight={task.visible_weight} and model.predictor_context="
            f"{str(task.model.predictor.proj_context is not None).lower()} contradict each other: set both or none."
        )
    has_teacher = task.model.target_encoder is not None and not task.model.follows
    if (task.momentum is not None, task.teacher_from is not None) != (task.model.follows, has_teacher):
        raise ValueError(
            f"model.ema={str(task.model.follows).lower()}, model.teacher={'…' if has_teacher else 'null'}, "
            f"task.momentum={task.momentum} and task.teacher_from={task.teacher_from} contradict each other: set "
            "model.ema=true and task.momentum; or model.teacher and task.teacher_from; or none of the four."
        )
    for step in (0, 999):
        if task.momentum is not None and not 0 <= (value := task.momentum(step, 1000)) <= 1:
            raise ValueError(f"task.momentum={value} at step {step} of 1000 must be in [0, 1], such as 0.998.")


def mask_index(task: Any, number: int, frames: int) -> int:
    """Index of the mask token of masking ``number`` for clips of ``frames`` frames, as ``task.mask_token`` selects it.

    Raises:
        ValueError: see :func:`token_of_length`.
    """
    if task.mask_token == "masking":
        return number
    return token_of_length(task.clip_lengths, frames, task.model.encoder.video_size[1])


def token_of_length(lengths: Sequence[int] | None, frames: int, default: int) -> int:
    """Index of the mask token of clips of ``frames`` frames: their position in ``lengths``.

    Without ``lengths`` all clips must have ``default`` frames, and the index is 0.

    Raises:
        ValueError: the clips have a different number of frames.
    """
    expected = [default] if lengths is None else list(lengths)
    if frames not in expected:
        raise ValueError(
            f"the clips have {frames} frames, but task.clip_lengths={lengths} with model.encoder.num_frames={default} "
            f"selects mask tokens for {expected}: list every clip length of the data in task.clip_lengths, or set "
            "task.mask_token=masking."
        )
    return expected.index(frames)


def clip_each(
    parts: Sequence[nn.Module], gradient_clip_val: float | None, gradient_clip_algorithm: str | None = None
) -> None:
    """Clips the gradients of each module to the norm ``gradient_clip_val``, separately; ``None`` clips nothing.

    Raises:
        ValueError: ``gradient_clip_algorithm`` is not the norm.
    """
    if gradient_clip_val is None:
        return
    if gradient_clip_algorithm not in (None, "norm"):
        raise ValueError(
            f"trainer.gradient_clip_algorithm={gradient_clip_algorithm} contradicts task.clip_separately=true: use "
            "norm."
        )
    for module in parts:
        nn.utils.clip_grad_norm_(module.parameters(), gradient_clip_val)
