"""Cross-entropy planner: settings reach the optimization, random numbers without a generator, least arguments."""

import pytest
import torch

from blueberry_video.inference.planner import ActionDistribution, Box, CrossEntropyPlanner, Discrete, L1Ball
from blueberry_video.models.jepa.world_model import WorldModel
from blueberry_video.models.vit import VisionTransformer

CPU = torch.device("cpu")


def seeded(number: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(number)


@pytest.mark.parametrize("actions", [Box(2, 1.0), L1Ball(2), Discrete(2)], ids=["box", "ball", "discrete"])
def test_without_a_generator_samples_follow_the_global_seed(actions):
    start = actions.start(3, 2, CPU)
    torch.manual_seed(5)
    first = actions.sample(start, 40)
    assert first.shape == (3, 40, 2, 2)
    assert not torch.equal(first, actions.sample(start, 40))
    torch.manual_seed(5)
    assert torch.equal(first, actions.sample(start, 40))
    state = torch.get_rng_state()
    actions.sample(start, 40, seeded())
    assert torch.equal(torch.get_rng_state(), state)


class Spy(Box):
    """Box that records the momenta and the elites of every iteration."""

    def __init__(self):
        super().__init__(1, 1.0)
        self.calls: list[tuple] = []

    def refit(self, distribution, elites, mean_momentum, std_momentum):
        self.calls.append((elites, mean_momentum, std_momentum))
        return super().refit(distribution, elites, mean_momentum, std_momentum)


def test_settings_reach_every_iteration():
    """The energy is the action itself, so that the elites are the least actions, in batches with different optima."""
    actions, drawn = Spy(), []
    planner = CrossEntropyPlanner(actions, 9, 2, 3, 1, mean_momentum=0.25, std_momentum=0.5)
    sign = torch.tensor([1.0, -1.0])[:, None]

    def energy(sequences):
        drawn.append(sequences)
        return sign * sequences[:, :, 0, 0]

    planner.minimize(energy, 2, CPU, seeded())
    assert [call[1:] for call in actions.calls] == [(0.25, 0.5)] * 3
    for sequences, (elites, _, _) in zip(drawn, actions.calls, strict=True):
        assert sequences.shape == (2, 9, 1, 1)
        assert elites[0].flatten().tolist() == sequences[0].flatten().sort().values[:2].tolist()
        assert elites[1].flatten().tolist() == sequences[1].flatten().sort(descending=True).values[:2].tolist()


@pytest.mark.parametrize(("mean_momentum", "std_momentum"), [(1.0, 0.0), (0.0, 1.0)])
def test_a_momentum_of_one_keeps_the_mean_alone_or_the_std_alone(mean_momentum, std_momentum):
    kept = []

    class Recorded(Box):
        def sample(self, distribution, count, generator=None):
            kept.append(distribution)
            return super().sample(distribution, count, generator)

    planner = CrossEntropyPlanner(Recorded(1, 1.0), 30, 3, 4, mean_momentum=mean_momentum, std_momentum=std_momentum)
    planner.minimize(lambda a: (a[:, :, 0, 0] - 0.6).abs(), 1, CPU, seeded())
    assert [d.mean.item() == 0 for d in kept] == [True, *[bool(mean_momentum)] * 3]
    assert [d.std.item() == 1 for d in kept] == [True, *[bool(std_momentum)] * 3]


def test_the_initial_distribution_covers_the_valid_actions():
    for actions, std in ((Box(3, [0.1, 2.0, 0.5]), [0.1, 2.0, 0.5]), (L1Ball(3, 0.4), [0.4] * 3)):
        start = actions.start(2, 4, CPU)
        assert start.mean.shape == start.std.shape == (2, 4, 3)
        assert not start.mean.any()
        torch.testing.assert_close(start.std, torch.tensor(std).expand(2, 4, 3))
    start = Discrete(4).start(2, 3, CPU)
    assert torch.equal(start.mean, torch.full((2, 3, 4), 0.25))
    assert torch.equal(start.std, torch.zeros(2, 3, 4))


def test_samples_have_the_mean_and_std_of_each_step_and_channel():
    mean = torch.tensor([[[0.5, -1.0], [2.0, 0.0]], [[0.0, 3.0], [1.0, 1.0]]])
    std = torch.tensor([[[0.1, 0.2], [0.3, 0.4]], [[0.5, 0.1], [0.2, 0.3]]])
    samples = Box(2, 100.0).sample(ActionDistribution(mean, std), 4000, seeded())
    torch.testing.assert_close(samples.mean(dim=1), mean, atol=0.04, rtol=0)
    torch.testing.assert_close(samples.std(dim=1), std, atol=0.02, rtol=0)


def test_plans_of_continuous_actions_are_projected():
    ends = ActionDistribution(torch.tensor([[[3.0, -0.2]]]), torch.zeros(1, 1, 2))
    torch.testing.assert_close(Box(2, [0.5, 1.0]).choose(ends), torch.tensor([[[0.5, -0.2]]]))
    torch.testing.assert_close(L1Ball(2, 1.0).choose(ends), torch.tensor([[[1.0, 0.0]]]))


def test_the_plan_of_discrete_actions_is_the_most_probable_action_of_each_step():
    shares = torch.tensor([[[0.2, 0.5, 0.3], [0.6, 0.1, 0.3]], [[0.1, 0.1, 0.8], [0.3, 0.4, 0.3]]])
    plan = Discrete(3).choose(ActionDistribution(shares, torch.zeros_like(shares)))
    assert plan.argmax(dim=-1).tolist() == [[1, 0], [2, 1]]
    assert plan.sum(dim=-1).tolist() == [[1, 1], [1, 1]]


def test_states_along_a_plan_are_sums_of_the_displacements_before_each_action():
    """Three actions of two state dimensions, in a batch of two with different start states."""
    planner = CrossEntropyPlanner(Discrete(3), horizon=3, displacement=[[0.0, 0.0], [1.0, 0.0], [0.0, -2.0]])
    actions = torch.eye(3)[torch.tensor([[[1, 2, 1]], [[2, 2, 0]]])]
    along = planner.states_along(torch.tensor([[5.0, 7.0], [0.0, 1.0]]), actions)
    assert along.tolist() == [[[[5, 7], [6, 7], [6, 5]]], [[[0, 1], [0, -1], [0, -3]]]]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_a_plan_in_the_dtype_of_the_model(dtype):
    torch.manual_seed(0)
    model = WorldModel(VisionTransformer(16, 2, 8, 2, 12, 1, 2, images=True), 2, 1, 12, 1, 1).to(dtype).eval()
    planner = CrossEntropyPlanner(Box(2, 1.0), 6, 2, 2, 2, displacement=[[1.0], [-0.5]])
    images = torch.rand(2, 3, 16, 16)
    assert planner.plan(model, images, torch.zeros(2, 1), images, seeded()).shape == (2, 2, 2)


def test_defaults_and_least_arguments():
    planner = CrossEntropyPlanner(L1Ball(7))
    assert (planner.displacement, planner.batch_size) == (None, 1024)
    assert (L1Ball(1).width, Box(1, 1e-6).width, Discrete(2).width) == (1, 1, 2)
    one = CrossEntropyPlanner(Discrete(2), 1, 1, 1, 1, 0, 1, [[0.0], [0.0]], 1)
    assert one.minimize(lambda sequences: sequences.sum(dim=(2, 3)), 3, CPU, seeded()).shape == (3, 1, 2)
    CrossEntropyPlanner(Discrete(3), elites=5, samples=5)
