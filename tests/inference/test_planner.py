"""Cross-entropy planner: projections, fit to the elites, problems with known optima, planning with a world model."""

import pytest
import torch
from torch import nn

from blueberry_video.inference.planner import ActionDistribution, Box, CrossEntropyPlanner, Discrete, L1Ball
from blueberry_video.models.jepa.world_model import WorldModel
from blueberry_video.models.vit import VisionTransformer

CPU = torch.device("cpu")


def seeded(number: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(number)


# ---- action spaces ---------------------------------------------------------------------------------------------------


def test_l1_projection_is_the_nearest_point():
    """No random point of the ball is nearer than the projection; points inside the ball do not move."""
    ball, points = L1Ball(4, radius=0.5), torch.randn(40, 4, dtype=torch.float64)
    projected = ball.project(points)
    assert (projected.abs().sum(dim=1) <= 0.5 + 1e-12).all()
    inside = points * (0.4 / points.abs().sum(dim=1, keepdim=True))
    torch.testing.assert_close(ball.project(inside), inside)
    candidates = torch.cat([torch.distributions.Dirichlet(torch.full((4,), 0.4)).sample((20000,)), torch.eye(4)])
    candidates = (0.5 * candidates * torch.randint(0, 2, candidates.shape).mul(2).sub(1)).double()
    nearest = torch.cdist(points, candidates).amin(dim=1)
    distance = (points - projected).norm(dim=1)
    assert (distance <= nearest + 1e-12).all()
    assert (distance >= nearest - 0.05).all()  # it is on the surface, which the random points cover densely


def test_box_clamps_every_channel_to_its_own_limit():
    box = Box(2, [0.1, 2.0])
    projected = box.project(torch.tensor([[0.5, 0.5], [-1.0, -3.0]]))
    torch.testing.assert_close(projected, torch.tensor([[0.1, 0.5], [-0.1, -2.0]]))
    torch.testing.assert_close(box.start(1, 1, CPU).std, torch.tensor([[[0.1, 2.0]]]))


@pytest.mark.parametrize("actions", [Box(3, 0.2), L1Ball(3, 0.2), Discrete(3)], ids=["box", "ball", "discrete"])
def test_samples_and_plans_are_valid_actions(actions):
    distribution = actions.start(2, 5, CPU)
    samples = actions.sample(distribution, 500, seeded())
    assert samples.shape == (2, 500, 5, 3)
    for found in (samples, actions.choose(distribution)):
        if isinstance(actions, Discrete):
            assert set(found.unique().tolist()) == {0.0, 1.0}
            assert (found.sum(dim=-1) == 1).all()
        else:
            sizes = found.abs()
            most = sizes.sum(dim=-1).max() if isinstance(actions, L1Ball) else sizes.max()
            assert most <= 0.2 + 1e-6
    assert not torch.equal(samples[0], samples[1])
    assert torch.equal(samples, actions.sample(distribution, 500, seeded()))


def test_discrete_samples_follow_the_probabilities():
    shares = torch.tensor([[[0.7, 0.2, 0.1], [0.0, 1.0, 0.0]]])
    samples = Discrete(3).sample(ActionDistribution(shares, torch.zeros_like(shares)), 5000, seeded())
    torch.testing.assert_close(samples.mean(dim=1), shares, atol=0.03, rtol=0)


# ---- fit to the elites -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("mean_momentum", "std_momentum"), [(0.0, 0.0), (0.15, 0.4), (1.0, 1.0)])
def test_momentum_mixes_the_old_and_new_distribution(mean_momentum, std_momentum):
    old = ActionDistribution(torch.full((1, 1, 2), 4.0), torch.full((1, 1, 2), 3.0))
    elites = torch.tensor([[[[1.0, 2.0]], [[3.0, 2.0]]]])  # mean (2, 2), unbiased std (sqrt 2, 0)
    new = Box(2, 9.0).refit(old, elites, mean_momentum, std_momentum)
    assert new.mean.flatten().tolist() == pytest.approx([2 * (1 - mean_momentum) + 4 * mean_momentum] * 2)
    spread = [2**0.5, 0.0]
    assert new.std.flatten().tolist() == pytest.approx([s * (1 - std_momentum) + 3 * std_momentum for s in spread])


def test_single_elite_has_zero_std():
    new = Box(1, 1.0).refit(Box(1, 1.0).start(1, 1, CPU), torch.full((1, 1, 1, 1), 0.5), 0.0, 0.0)
    assert (new.mean.item(), new.std.item()) == (0.5, 0.0)


def test_momentum_on_probabilities():
    actions = Discrete(4)
    elites = torch.eye(4)[torch.tensor([0, 0, 1])].view(1, 3, 1, 4)
    new = actions.refit(actions.start(1, 1, CPU), elites, 0.4, 0.9)
    assert new.mean.flatten().tolist() == pytest.approx([0.6 * p + 0.4 * 0.25 for p in (2 / 3, 1 / 3, 0, 0)])


# ---- problems with a known optimum -----------------------------------------------------------------------------------


def test_finds_the_optimum_of_summed_positions():
    """The energy is the L1 distance of the sum of all actions from the goal, in a batch of three."""
    goals = torch.tensor([[0.12, -0.05], [-0.15, 0.2], [0.0, 0.0]])
    planner = CrossEntropyPlanner(Box(2, 0.075), horizon=3, displacement=[[1.0, 0.0], [0.0, 1.0]])

    def energy(sequences: torch.Tensor) -> torch.Tensor:
        return (sequences.sum(dim=2) - goals[:, None]).abs().sum(dim=-1)

    plan = planner.minimize(energy, 3, CPU, seeded())
    assert plan.shape == (3, 3, 2)
    torch.testing.assert_close(plan.sum(dim=1), goals, atol=0.01, rtol=0)


def test_l1_ball_moves_along_the_steepest_axis():
    """The goal is out of reach along both axes, and the energy is twice as steep along the second."""
    planner, goal = CrossEntropyPlanner(L1Ball(2, 0.075)), torch.tensor([1.0, -1.0])
    plan = planner.minimize(
        lambda sequences: ((sequences[:, :, 0] - goal).abs() * torch.tensor([1.0, 2.0])).sum(dim=-1), 1, CPU, seeded()
    )
    torch.testing.assert_close(plan[0, 0], torch.tensor([0.0, -0.075]), atol=0.005, rtol=0)


def test_finds_a_unique_sequence_of_discrete_actions():
    """The energy counts the wrong actions of one of 5^4 sequences, which differs between the batch elements."""
    targets = torch.tensor([[3, 1, 4, 1], [0, 0, 2, 4]])
    planner = CrossEntropyPlanner(Discrete(5), samples=200, horizon=4, displacement=[[0.0]] * 5)
    plan = planner.minimize(
        lambda sequences: (sequences.argmax(dim=-1) != targets[:, None]).sum(dim=-1).float(), 2, CPU, seeded()
    )
    assert plan.argmax(dim=-1).tolist() == targets.tolist()


def test_error_decreases_with_iterations():
    def error(iterations: int) -> float:
        planner = CrossEntropyPlanner(Box(3, 1.0), samples=50, elites=5, iterations=iterations)
        goal = torch.tensor([0.3, -0.7, 0.55])
        plan = planner.minimize(lambda a: (a[:, :, 0] - goal).square().sum(dim=-1), 1, CPU, seeded())
        return (plan[0, 0] - goal).norm().item()

    assert error(8) < 0.3 * error(1)


# ---- with a world model ----------------------------------------------------------------------------------------------


class Painted(WorldModel):
    """World model with known dynamics: latents hold the brightness of a gray frame, each action adds its displacement
    of the state to it, and a wrong state adds a large error."""

    def __init__(self):
        super().__init__(VisionTransformer(16, 2, 8, 2, 12, 1, 2, images=True), 2, 1, 12, 1, 1)
        self.seen: list[int] = []

    def encode_frames(self, video):
        return video.mean(dim=(1, 3, 4))[:, :, None, None].expand(-1, -1, 4, 12)

    def rollout(self, latents, actions, states, extrinsics=None):
        self.seen.append(len(latents))
        moves = actions @ torch.tensor([[1.0], [-0.5]])
        along = states[:, :1] + torch.nn.functional.pad(moves.cumsum(1), (0, 0, 1, 0))[:, :-1]
        wrong = (along - states).abs().sum(dim=1, keepdim=True)
        return latents + moves.cumsum(1)[:, :, None] + 100 * wrong[:, :, None]


@pytest.mark.parametrize("batch_size", [7, 1000])
def test_plans_reach_a_goal_image(batch_size):
    model, moves = Painted(), [[1.0], [-0.5]]
    planner = CrossEntropyPlanner(Box(2, 1.0), 60, 6, horizon=2, displacement=moves, batch_size=batch_size)
    start, goal = torch.zeros(2, 3, 16, 16), torch.tensor([1.2, -0.9])[:, None, None, None].expand(-1, 3, 16, 16)
    plan = planner.plan(model, start, torch.tensor([[0.3], [-0.2]]), goal, seeded())
    assert plan.shape == (2, 2, 2)
    reached = (plan @ torch.tensor([[1.0], [-0.5]])).sum(dim=(1, 2))
    torch.testing.assert_close(reached, torch.tensor([1.2, -0.9]), atol=0.05, rtol=0)
    assert max(model.seen) == min(batch_size, 120)
    assert sum(model.seen) == 10 * 120


def test_energy_is_the_mean_l1_distance_to_the_goal_at_the_last_step():
    torch.manual_seed(1)
    model = WorldModel(VisionTransformer(16, 2, 8, 2, 12, 1, 2, images=True), 3, 2, 24, 1, 2)
    for parameter in model.predictor.parameters():
        nn.init.normal_(parameter, std=0.3)
    moves = [[0.5, 0.0], [0.0, 1.0], [-1.0, 2.0]]
    planner = CrossEntropyPlanner(Discrete(3), samples=4, elites=1, horizon=2, displacement=moves, batch_size=3)
    start, goal = model.encode_frames(torch.randn(1, 3, 2, 16, 16)).unbind(dim=1)
    state, chosen = torch.randn(1, 2), [[0, 1], [2, 2], [1, 0]]
    actions = torch.eye(3)[torch.tensor(chosen)][None]
    got = planner._distance(model, start, state, goal, actions)[0]
    for energy, (first, second) in zip(got, chosen, strict=True):
        states = torch.stack([state, state + torch.tensor(moves[first])], dim=1)
        ends = model.rollout(start[:, None], torch.eye(3)[[first, second]][None], states)[0, -1]
        assert energy.item() == pytest.approx((ends - goal[0]).abs().mean().item(), rel=1e-5)


@pytest.mark.parametrize("moving", [False, True])
def test_camera_poses_reach_every_step_of_the_energy(moving):
    """With ``use_extrinsics`` the energy is that of rollouts with the pose of each situation, fixed or per action."""
    torch.manual_seed(2)
    model = WorldModel(VisionTransformer(16, 2, 8, 2, 12, 1, 2, images=True), 3, 2, 24, 1, 2, use_extrinsics=True)
    for parameter in model.predictor.parameters():
        nn.init.normal_(parameter, std=0.3)
    planner = CrossEntropyPlanner(Discrete(3), 4, 1, horizon=2, displacement=[[0.0, 0.0]] * 3, batch_size=3)
    seen: list[torch.Tensor] = []
    planner.minimize = lambda energy, *_: seen.append(energy(actions))  # the energy of fixed sequences
    actions = torch.eye(3)[torch.randint(3, (2, 4, 2))]
    images, goals, states = torch.randn(2, 3, 16, 16), torch.randn(2, 3, 16, 16), torch.randn(2, 2)
    cameras = torch.randn(2, 2, 2) if moving else torch.randn(2, 2)
    planner.plan(model, images, states, goals, extrinsics=cameras)
    start, goal = model.encode_frames(torch.stack([images, goals], dim=2)).unbind(dim=1)
    for row in range(2):
        poses = cameras[row] if moving else cameras[row].expand(2, -1)
        for energy, sequence in zip(seen[0][row], actions[row], strict=True):
            where = states[row].expand(1, 2, -1)
            end = model.rollout(start[row][None, None], sequence[None], where, poses[None])[0, -1]
            assert energy.item() == pytest.approx((end - goal[row]).abs().mean().item(), rel=1e-5)


@pytest.mark.parametrize(
    ("use_extrinsics", "shape", "text"),
    [
        (True, None, r"model\.use_extrinsics=true.*not passed"),
        (False, (2, 2), r"model\.use_extrinsics=false.*were passed"),
        (True, (2, 3), r"extrinsics.*\(2, 3\).*\(2, 2\)"),
        (True, (1, 2), r"extrinsics.*\(1, 2\).*\(2, 2\)"),
        (True, (2, 3, 2), r"extrinsics.*\(2, 3, 2\).*\(2, 1, 2\)"),
    ],
)
def test_camera_poses_that_the_model_cannot_use_raise(use_extrinsics, shape, text):
    model = WorldModel(
        VisionTransformer(16, 2, 8, 2, 12, 1, 2, images=True), 3, 2, 24, 1, 2, 4.0, False, False, use_extrinsics
    )
    picture, poses = torch.zeros(2, 3, 16, 16), None if shape is None else torch.zeros(shape)
    with pytest.raises(ValueError, match=text):
        CrossEntropyPlanner(Discrete(3)).plan(model, picture, torch.zeros(2, 2), picture, extrinsics=poses)


def test_plan_for_a_reached_goal_has_no_displacement():
    still = CrossEntropyPlanner(Box(2, 1.0), displacement=[[1.0], [-0.5]])
    picture = torch.full((1, 3, 16, 16), 0.4)
    plan = still.plan(Painted(), picture, torch.zeros(1, 1), picture, seeded())
    assert (plan[0, 0] @ torch.tensor([1.0, -0.5])).abs() < 0.02


def test_without_displacement_the_state_is_constant():
    planner = CrossEntropyPlanner(Discrete(3))
    states = torch.randn(2, 4)
    assert torch.equal(planner.states_along(states, torch.zeros(2, 7, 1, 3)), states[:, None, None].expand(2, 7, 1, 4))


def test_published_settings_are_the_defaults():
    planner = CrossEntropyPlanner(L1Ball(7))
    assert (planner.samples, planner.elites, planner.iterations, planner.horizon) == (800, 10, 10, 1)
    assert (planner.mean_momentum, planner.std_momentum, planner.actions.radius) == (0.15, 0.15, 0.075)


def test_mismatched_action_width_raises():
    images = torch.zeros(1, 3, 16, 16)
    with pytest.raises(ValueError, match=r"planner\.actions\.width=5\b.*model\.action_dim=2\b"):
        CrossEntropyPlanner(Discrete(5)).plan(Painted(), images, torch.zeros(1, 1), images)


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"horizon": 0}, r"planner\.horizon=0\b"),
        ({"samples": 0}, r"planner\.samples=0\b"),
        ({"iterations": 0}, r"planner\.iterations=0\b"),
        ({"elites": 0}, r"planner\.elites=0\b"),
        ({"batch_size": 0}, r"planner\.batch_size=0\b"),
        ({"samples": 5}, r"planner\.elites=10\b.*planner\.samples=5\b"),
        ({"mean_momentum": 1.1}, r"planner\.mean_momentum=1\.1\b.*\[0, 1\]"),
        ({"std_momentum": -0.1}, r"planner\.std_momentum=-0\.1\b.*\[0, 1\]"),
        ({"std_momentum": float("nan")}, r"planner\.std_momentum=nan\b.*\[0, 1\]"),
        ({"horizon": 2}, r"planner\.horizon=2\b.*planner\.displacement.*horizon=1\b"),
        ({"displacement": [[1.0]]}, r"planner\.displacement\b.*\b1\b.*\b3\b"),
    ],
)
def test_bad_arguments_raise(changes, text):
    with pytest.raises(ValueError, match=text) as error:
        CrossEntropyPlanner(Discrete(3), **changes)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("make", "text"),
    [
        (lambda: Discrete(1), r"planner\.actions\.width=1\b.*\b2\b"),
        (lambda: L1Ball(2, 0.0), r"width=2\b.*\[0\.0, 0\.0\]"),
        (lambda: Box(2, -1.0), r"width=2\b.*\[-1\.0, -1\.0\]"),
        (lambda: Box(0, 1.0), r"width=0\b"),
        (lambda: Box(3, [1.0, 1.0]), r"planner\.actions\.limit=\[1\.0, 1\.0\].*\b2\b.*\b3\b"),
    ],
)
def test_bad_action_spaces_raise(make, text):
    with pytest.raises(ValueError, match=text):
        make()
