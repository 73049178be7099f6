"""Actions of a robot arm: limits, separate momentum of the gripper, composed rotations, against the published rule."""

import pytest
import torch
from torch import Tensor

from blueberry_video.inference.droid import DroidActions, euler_angles, rotation_matrices
from blueberry_video.inference.planner import ActionDistribution, CrossEntropyPlanner

CPU = torch.device("cpu")


def seeded(number: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(number)


def exponential(angles: Tensor) -> Tensor:
    """Rotation about x, then y, then z, as a product of matrix exponentials."""
    generators = torch.zeros(3, 3, 3, dtype=angles.dtype)
    for axis, (i, j) in enumerate([(1, 2), (2, 0), (0, 1)]):
        generators[axis, j, i], generators[axis, i, j] = 1.0, -1.0
    x, y, z = (torch.linalg.matrix_exp(angle * generator) for angle, generator in zip(angles, generators))
    return z @ y @ x


def test_euler_angles_are_extrinsic_and_invert():
    angles = (torch.rand(50, 3, dtype=torch.float64, generator=seeded()) - 0.5) * torch.tensor([6.2, 3.1, 6.2])
    matrices = rotation_matrices(angles)
    torch.testing.assert_close(matrices, torch.stack([exponential(each) for each in angles]))
    torch.testing.assert_close(euler_angles(matrices), angles)
    locked = torch.tensor([[0.3, torch.pi / 2, 0.2], [0.3, -torch.pi / 2, 0.2]], dtype=torch.float64)
    found = euler_angles(rotation_matrices(locked))
    assert (found[:, 2] == 0).all()
    torch.testing.assert_close(rotation_matrices(found), rotation_matrices(locked), atol=1e-7, rtol=0)


def test_samples_are_clipped_per_axis_and_do_not_rotate():
    """Positions within +-0.075 each, not in an L1 ball; gripper within +-0.75 of a unit normal; rotations 0."""
    actions = DroidActions()
    start = actions.start(2, 3, CPU)
    assert start.std[0, 0].tolist() == pytest.approx([0.075] * 3 + [0.0] * 3 + [1.0])
    samples = actions.sample(start, 4000, seeded())
    assert samples.shape == (2, 4000, 3, 7)
    assert samples[..., :3].abs().max().item() == pytest.approx(0.075)
    assert samples[..., :3].abs().sum(dim=-1).max() > 0.2
    assert (samples[..., 3:6] == 0).all()
    assert samples[..., 6].abs().max().item() == pytest.approx(0.75)
    # shares at the limits: P(|z| > 1) and P(|z| > 0.75)
    assert (samples[..., :3].abs() > 0.0749).float().mean().item() == pytest.approx(0.317, abs=0.01)
    assert (samples[..., 6].abs() > 0.749).float().mean().item() == pytest.approx(0.453, abs=0.02)


def test_fixed_channels_and_a_closing_gripper():
    actions = DroidActions(fixed={1: 0.02}, close_gripper=1)
    samples = actions.sample(actions.start(1, 3, CPU), 50, seeded())
    assert (samples[..., 1] == 0.02).all()
    assert (samples[:, :, 1:, 6] == 1.0).all()
    assert (samples[:, :, 0, 6] != 1.0).all()
    assert actions.start(1, 3, CPU).mean[0, 0].tolist() == pytest.approx([0.0, 0.02, 0, 0, 0, 0, 0])


def test_the_gripper_has_a_separate_momentum():
    actions = DroidActions(gripper_mean_momentum=0.5, gripper_std_momentum=0.25)
    old = ActionDistribution(torch.full((1, 1, 7), 4.0), torch.full((1, 1, 7), 3.0))
    elites = torch.tensor([1.0, 3.0]).view(1, 2, 1, 1).expand(1, 2, 1, 7)  # mean 2, unbiased std sqrt 2
    new = actions.refit(old, elites, 0.15, 0.75)
    assert new.mean.flatten()[:3].tolist() == pytest.approx([0.85 * 2 + 0.15 * 4] * 3)
    assert new.std.flatten()[:3].tolist() == pytest.approx([0.25 * 2**0.5 + 0.75 * 3] * 3)
    assert (new.mean[0, 0, 6].item(), new.std[0, 0, 6].item()) == pytest.approx((3.0, 0.75 * 2**0.5 + 0.25 * 3))


def test_small_changes_of_the_gripper_are_zero_in_the_plan():
    mean = torch.zeros(1, 3, 7)
    mean[0, :, 6], mean[0, :, 0] = torch.tensor([0.24, 0.26, -0.3]), 0.01
    plan = DroidActions().choose(ActionDistribution(mean, torch.zeros_like(mean)))
    assert plan[0, :, 6].tolist() == pytest.approx([0.0, 0.26, -0.3])
    assert plan[0, :, 0].tolist() == pytest.approx([0.01] * 3)


def test_states_are_composed_along_a_sequence():
    planner = CrossEntropyPlanner(DroidActions(), horizon=3)
    state = torch.tensor([[0.4, -0.1, 0.3, 0.5, -0.4, 1.2, 0.9]], dtype=torch.float64)
    actions = torch.zeros(1, 1, 3, 7, dtype=torch.float64)
    actions[0, 0, 0] = torch.tensor([0.05, 0.0, -0.02, 0.1, 0.2, -0.3, 0.5])
    actions[0, 0, 1] = torch.tensor([0.01, 0.0, 0.0, 0.0, 0.0, 0.4, -1.5])
    along = planner.states_along(state, actions)[0, 0]
    torch.testing.assert_close(along[0], state[0])
    torch.testing.assert_close(along[1, :3], torch.tensor([0.45, -0.1, 0.28], dtype=torch.float64))
    first = exponential(actions[0, 0, 0, 3:6]) @ exponential(state[0, 3:6])
    torch.testing.assert_close(exponential(along[1, 3:6]), first)
    torch.testing.assert_close(exponential(along[2, 3:6]), exponential(actions[0, 0, 1, 3:6]) @ first)
    assert along[:, 6].tolist() == pytest.approx([0.9, 1.0, 0.0])  # clamped to [0, 1] at every step


def test_finds_the_optimum():
    goal = torch.tensor([0.05, -0.03, 0.07])
    planner = CrossEntropyPlanner(DroidActions(), std_momentum=0.15)
    plan = planner.minimize(lambda a: (a[:, :, 0, :3] - goal).abs().sum(dim=-1), 1, CPU, seeded())
    torch.testing.assert_close(plan[0, 0, :3], goal, atol=0.01, rtol=0)


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"max_norm": 0.0}, r"max_norm=0\.0\b"),
        ({"gripper_std_momentum": 1.5}, r"gripper_std_momentum=1\.5\b"),
        ({"fixed": {4: 0.1}}, r"fixed=\{4: 0\.1\}"),
    ],
)
def test_invalid_arguments_raise(changes, text):
    with pytest.raises(ValueError, match=text):
        DroidActions(**changes)


def test_displacement_contradicts_composed_states():
    with pytest.raises(ValueError, match=r"planner\.displacement.*DroidActions"):
        CrossEntropyPlanner(DroidActions(), displacement=[[0.0] * 7] * 7)
