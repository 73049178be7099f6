"""Actions of a robot arm in the planner of V-JEPA 2-AC (arXiv 2506.09985; github.com/facebookresearch/vjepa2).

Unusual about them: rotations are never sampled, the gripper has a separate momentum, and poses are composed: a state is
a position, three Euler angles about fixed axes (x, then y, then z; radians) and the closedness of the gripper, and the
rotation of an action is applied after that of the state.
"""

from collections.abc import Mapping
from typing import ClassVar

import torch
from torch import Tensor

from blueberry_video.inference.planner import ActionDistribution, Actions

POSITION, ROTATION, GRIPPER = slice(0, 3), slice(3, 6), slice(6, 7)


class DroidActions(Actions):
    """Changes of position (meters), Euler angles (always 0) and gripper, of the published planner of V-JEPA 2-AC.

    The published example plans with ``CrossEntropyPlanner(DroidActions(), mean_momentum=0.15, std_momentum=0.75)``.

    Args:
        max_norm: limit of each of x, y and z, above 0; also their initial standard deviation.
        gripper_limit: limit of the gripper, above 0; its initial standard deviation is 1.
        gripper_threshold: smaller changes of the gripper are 0 in the plan.
        gripper_mean_momentum, gripper_std_momentum: shares of the old distribution of the gripper, in [0, 1].
        fixed: channel (0, 1, 2: x, y, z; 6: gripper) -> value that all actions have.
        close_gripper: number of the action from which on the gripper closes with 1; ``None``: planned.

    Raises:
        ValueError: a value is out of range.
    """

    width = 7
    moves_states: ClassVar[bool] = True

    def __init__(
        self,
        max_norm: float = 0.075,
        gripper_limit: float = 0.75,
        gripper_threshold: float = 0.25,
        gripper_mean_momentum: float = 0.15,
        gripper_std_momentum: float = 0.15,
        fixed: Mapping[int, float] | None = None,
        close_gripper: int | None = None,
    ):
        if min(max_norm, gripper_limit) <= 0 or gripper_threshold < 0:
            raise ValueError(
                f"planner.actions.max_norm={max_norm} and planner.actions.gripper_limit={gripper_limit} must be above "
                f"0, and planner.actions.gripper_threshold={gripper_threshold} at least 0."
            )
        momenta = {"gripper_mean_momentum": gripper_mean_momentum, "gripper_std_momentum": gripper_std_momentum}
        for key, momentum in momenta.items():
            if not 0 <= momentum <= 1:
                raise ValueError(f"planner.actions.{key}={momentum}, the share of the old values, must be in [0, 1].")
        self.fixed = {int(channel): float(value) for channel, value in (fixed or {}).items()}
        if not self.fixed.keys() <= {0, 1, 2, 6}:
            raise ValueError(
                f"planner.actions.fixed={self.fixed} has channels other than 0, 1, 2 (x, y, z) and 6 (gripper): "
                "rotations are always 0."
            )
        self.max_norm, self.gripper_limit, self.gripper_threshold = max_norm, gripper_limit, gripper_threshold
        self.momenta, self.close_gripper = (gripper_mean_momentum, gripper_std_momentum), close_gripper

    def start(self, batch: int, horizon: int, device: torch.device) -> ActionDistribution:
        std = torch.tensor([self.max_norm] * 3 + [0.0] * 3 + [1.0], device=device)
        mean = torch.zeros_like(std)
        for channel, value in self.fixed.items():
            mean[channel] = value
        return ActionDistribution(*(part.expand(batch, horizon, self.width) for part in (mean, std)))

    def sample(self, distribution: ActionDistribution, count: int, generator: torch.Generator | None = None) -> Tensor:
        mean, std = distribution.mean[:, None], distribution.std[:, None]
        source = mean.device if generator is None else generator.device
        noise = torch.randn(len(mean), count, *mean.shape[2:], generator=generator, device=source)
        actions = mean + std * noise.to(mean)
        actions[..., POSITION] = actions[..., POSITION].clamp(-self.max_norm, self.max_norm)
        actions[..., ROTATION] = 0.0
        actions[..., GRIPPER] = actions[..., GRIPPER].clamp(-self.gripper_limit, self.gripper_limit)
        for channel, value in self.fixed.items():
            actions[..., channel] = value
        if self.close_gripper is not None:
            actions[:, :, self.close_gripper :, GRIPPER] = 1.0
        return actions

    def refit(
        self, distribution: ActionDistribution, elites: Tensor, mean_momentum: float, std_momentum: float
    ) -> ActionDistribution:
        arm = super().refit(distribution, elites, mean_momentum, std_momentum)
        gripper = super().refit(distribution, elites, *self.momenta)
        whole = (torch.cat([a[..., :6], g[..., GRIPPER]], dim=-1) for a, g in zip(arm, gripper, strict=True))
        return ActionDistribution(*whole)

    def choose(self, distribution: ActionDistribution) -> Tensor:
        plan = distribution.mean.clone()
        plan[..., ROTATION] = 0.0
        gripper = plan[..., GRIPPER]
        plan[..., GRIPPER] = gripper.masked_fill(gripper.abs() < self.gripper_threshold, 0.0)
        return plan

    def moved(self, states: Tensor, actions: Tensor) -> Tensor:
        """States (..., 7) after actions (..., 7): positions add up, rotations compose, the gripper stays in [0, 1]."""
        turned = rotation_matrices(actions[..., ROTATION]) @ rotation_matrices(states[..., ROTATION])
        gripper = (states[..., GRIPPER] + actions[..., GRIPPER]).clamp(0, 1)
        return torch.cat([states[..., POSITION] + actions[..., POSITION], euler_angles(turned), gripper], dim=-1)


def rotation_matrices(angles: Tensor) -> Tensor:
    """Rotations by Euler angles (..., 3) in radians about the fixed axes x, then y, then z: (..., 3, 3)."""
    (sx, sy, sz), (cx, cy, cz) = angles.sin().unbind(dim=-1), angles.cos().unbind(dim=-1)
    rows = (
        torch.stack([cz * cy, cz * sy * sx - sz * cx, cz * sy * cx + sz * sx], dim=-1),
        torch.stack([sz * cy, sz * sy * sx + cz * cx, sz * sy * cx - cz * sx], dim=-1),
        torch.stack([-sy, cy * sx, cy * cx], dim=-1),
    )
    return torch.stack(rows, dim=-2)


def euler_angles(matrices: Tensor) -> Tensor:
    """Inverse of :func:`rotation_matrices`; where y is a right angle, the angle about z is 0."""
    cosine = torch.hypot(matrices[..., 0, 0], matrices[..., 1, 0])
    locked = cosine < 1e-6
    x = torch.atan2(matrices[..., 2, 1], matrices[..., 2, 2])
    x = torch.where(locked, torch.atan2(-matrices[..., 1, 2], matrices[..., 1, 1]), x)
    z = torch.atan2(matrices[..., 1, 0], matrices[..., 0, 0]).masked_fill(locked, 0.0)
    return torch.stack([x, torch.atan2(-matrices[..., 2, 0], cosine), z], dim=-1)
