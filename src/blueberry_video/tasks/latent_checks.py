"""Checks of the settings of latent prediction."""

from typing import Any


def check_settings(task: Any) -> None:
    """Checks the arguments of a :class:`~blueberry_video.tasks.latent_prediction.LatentPrediction`.

    Raises:
        ValueError: for arguments out of range or in contradiction about the target encoder.
    """
    if not task.maskings:
        raise ValueError("task.maskings=[] must have at least one masking; V-JEPA uses short- and long-range blocks.")
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
