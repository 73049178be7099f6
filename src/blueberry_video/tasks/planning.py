"""Planning with a trained world model, outside an environment."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from hydra.utils import instantiate
from torch import Tensor

from blueberry_video.inference.droid import DroidActions
from blueberry_video.inference.planner import Box, CrossEntropyPlanner, Discrete
from blueberry_video.tasks.action_prediction import ActionPrediction


@torch.no_grad()
def plan_actions(
    task: ActionPrediction,
    planner: CrossEntropyPlanner,
    frames: Tensor,
    state: Sequence[float],
    seed: int = 0,
    names: Sequence[str] = (),
) -> dict[str, Any]:
    """Plans the actions from an image to a goal image.

    Args:
        task: in evaluation mode, on its device.
        planner: see :func:`planner_of`.
        frames: uint8 (3, 2, H, W), the image and the goal.
        state: K numbers, the state at the image.
        seed: of the sampled actions.
        names: names of discrete actions, in the order of their indices.

    Returns:
        ``actions``: names, or indices, of discrete actions, otherwise vectors; ``distance``: mean L1 of the features
        that are predicted after them to those of the goal; ``distance_start``: that of the image, as a reference.

    Raises:
        ValueError: a state of a different width, or a planner of a different ``action_dim``.
    """
    model = task.model
    if len(state) != model.state_dim:
        raise ValueError(f"state has {len(state)} numbers: pass {model.state_dim}, as model.state_dim of the run.")
    pixels = task.normalize(frames[None].to(task.device).to(task.dtype).div(255))  # (1, 3, 2, H, W)
    states = torch.tensor([list(state)], device=task.device, dtype=torch.float32)
    generator = torch.Generator().manual_seed(seed)
    actions = planner.plan(model, pixels[:, :, 0], states, pixels[:, :, 1], generator)  # (1, H, A)
    here, there = model.encode_frames(pixels).unbind(dim=1)
    along = planner.states_along(states, actions[:, None])[:, 0].to(here)
    end = model.rollout(here[:, None], actions.to(here), along)[:, -1]
    chosen: list[Any] = actions[0].tolist()
    if isinstance(planner.actions, Discrete):
        known = dict(enumerate(names))
        chosen = [known.get(index, index) for index in actions[0].argmax(dim=-1).tolist()]
    distance, before = (float((features - there).abs().mean()) for features in (end, here))
    return {"actions": chosen, "distance": distance, "distance_start": before}


def planner_of(
    config: Any, width: int, names: Sequence[str], settings: Mapping[str, Any], limit: float | None = None
) -> CrossEntropyPlanner:
    """Returns the planner of a run: that of its closed-loop callback, or one that fits the actions of its model.

    Args:
        config: resolved config of the run.
        width: A, the ``action_dim`` of its model.
        names: names of discrete actions; empty for continuous ones.
        settings: arguments of the planner that replace those of the callback.
        limit: largest value of each number of continuous actions; ``None`` for those of the callback or of DROID.

    Raises:
        ValueError: a setting is out of range, or the limit is missing.
    """
    found = [callback.planner for callback in (config.get("callbacks") or {}).values() if "planner" in (callback or {})]
    if limit is not None:
        return CrossEntropyPlanner(Box(width, limit), **settings)
    if found:
        return instantiate(found[0], _partial_=True)(**settings)
    if names:
        return CrossEntropyPlanner(Discrete(width), **settings)
    if width == DroidActions.width:  # as the published example
        return CrossEntropyPlanner(DroidActions(), mean_momentum=0.15, std_momentum=0.75, **settings)
    raise ValueError(f"limit is missing: the run has continuous actions of {width} numbers. Pass their largest value.")
