"""Action-conditioned prediction in the space of a frozen encoder (V-JEPA 2-AC, arXiv 2506.09985)."""

import torch.nn.functional as F
from torch import Tensor

from blueberry_video.models.jepa.world_model import WorldModel
from blueberry_video.tasks.base import Task
from blueberry_video.tasks.settings import ClipInput, Optimization


def action_vectors(actions: Tensor, width: int) -> Tensor:
    """Converts actions to vectors (B, T-1, A): discrete actions, long (B, T-1), become one-hot, vectors are unchanged.

    Raises:
        ValueError: for discrete actions outside [0, ``width``), or vectors of a different width.
    """
    if actions.ndim == 2:
        lowest, highest = int(actions.min()), int(actions.max())
        if actions.is_floating_point() or lowest < 0 or highest >= width:
            raise ValueError(
                f"the clips' actions run from {lowest} to {highest} ({actions.dtype}), but model.action_dim={width} "
                f"takes the integers 0 to {width - 1}, or vectors (T-1, {width}): set model.action_dim to the number "
                "of actions."
            )
        return F.one_hot(actions, width)
    if actions.ndim != 3 or actions.shape[-1] != width:
        raise ValueError(
            f"the clips' actions have the shape {tuple(actions.shape)}, but model.action_dim={width} takes (B, T-1, "
            f"{width}): set model.action_dim to the width of the data's actions."
        )
    return actions


def prediction_loss(predicted: Tensor, latents: Tensor) -> Tensor:
    """L1 loss between predictions (B, T', S, D) and the latents (B, T, S, D) of frames 1 to T', where T' < T."""
    return F.l1_loss(predicted, latents[:, 1 : predicted.shape[1] + 1])


class ActionPrediction(Task):
    """Trains the predictor of a world model on clips with ``actions`` and ``states``.

    Logs ``loss``, the sum of ``loss_one_step`` (teacher forcing: each frame from the true frames before it) and
    ``loss_rollout`` (autoregressive, from the first frame). In validation also ``rollout``, the mean L1 over longer
    rollouts; the baselines ``loss_one_step_trivial`` and ``rollout_trivial``, which copy the last true frame; and the
    ratio ``rollout_share`` = ``rollout`` / ``rollout_trivial``. Losses of different encoders are not comparable,
    because their embedding spaces differ.

    Args:
        model, optimization, input: see :class:`~blueberry_video.tasks.base.Task`. Augmentation changes the
            video only, not actions and states.
        rollout_steps: autoregressive steps of the loss, at least 1; 2 in V-JEPA 2-AC.
        val_rollout_steps: steps of the validation rollouts. Clips must have more frames than either.

    Raises:
        ValueError: for rollouts of less than one step; in a step, for clips without actions and states, shorter than
            the rollouts, or with actions of a different width than the model's.
    """

    trains = WorldModel
    model: WorldModel

    def __init__(
        self,
        model: WorldModel,
        optimization: Optimization,
        input: ClipInput | None = None,
        rollout_steps: int = 2,
        val_rollout_steps: int = 4,
    ):
        super().__init__(model, optimization, input)
        for key, steps in (("rollout_steps", rollout_steps), ("val_rollout_steps", val_rollout_steps)):
            if steps < 1:
                raise ValueError(f"task.{key}={steps} must be at least 1: V-JEPA 2-AC trains with 2.")
        self.rollout_steps, self.val_rollout_steps = rollout_steps, val_rollout_steps

    def shared_step(self, batch: dict, stage: str) -> dict[str, Tensor]:
        conditions = self._conditions(batch)
        latents = self.model.encode_frames(self.normalize(batch["video"]))
        one_step = prediction_loss(self.model(latents, *conditions), latents)
        rollout = prediction_loss(self._rollout(latents, *conditions, steps=self.rollout_steps), latents)
        values = {"loss": one_step + rollout, "loss_one_step": one_step, "loss_rollout": rollout}
        if stage == "train":
            return values
        steps = self.val_rollout_steps
        return {
            **values,
            "loss_one_step_trivial": prediction_loss(latents[:, :-1], latents),
            "rollout": prediction_loss(self._rollout(latents, *conditions, steps=steps), latents),
            "rollout_trivial": prediction_loss(latents[:, :1].expand(-1, steps, -1, -1), latents),
        }

    def epoch_metrics(self, means: dict[str, Tensor]) -> dict[str, Tensor]:
        return {"rollout_share": means["rollout"] / means["rollout_trivial"]}

    def tokens_per_clip(self, batch: dict) -> int:
        """Tokens of the predictor's sequence for a clip, including its last frame."""
        _, _, frames, *size = batch["video"].shape
        _, height, width = self.model.encoder.grid((1, *size))
        return (frames * (height * width + self.model.predictor.num_conditions)) * self._times(batch)

    def _rollout(
        self, latents: Tensor, actions: Tensor, states: Tensor, extrinsics: Tensor | None, steps: int
    ) -> Tensor:
        return self.model.rollout(latents[:, :1], actions[:, :steps], states[:, :steps], extrinsics)

    def _conditions(self, batch: dict) -> tuple[Tensor, Tensor, Tensor | None]:
        """Actions (B, T-1, A), states (B, T, K) and, if the model uses them, extrinsics (B, T, A - 1) of a batch."""
        uses_extrinsics = self.model.use_extrinsics
        required = ("actions", "states", *(["extrinsics"] if uses_extrinsics else []))
        missing = [key for key in required if key not in batch]
        if missing:
            raise ValueError(
                f"the clips have no {' and no '.join(missing)}: action_prediction needs clips of an agent, such as "
                "data=world_agent."
            )
        longest = max(self.rollout_steps, self.val_rollout_steps)
        if batch["video"].shape[2] <= longest:
            raise ValueError(
                f"the clips have {batch['video'].shape[2]} frames, too few to predict {longest} after the first: give "
                f"data.train and data.val num_frames={longest + 1} or more, or lower task.rollout_steps and "
                "task.val_rollout_steps."
            )
        actions = action_vectors(batch["actions"], self.model.action_dim)
        extrinsics = batch["extrinsics"].to(batch["video"]) if uses_extrinsics else None
        return actions.to(batch["video"]), batch["states"].to(batch["video"]), extrinsics
