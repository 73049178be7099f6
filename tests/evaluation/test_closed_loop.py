"""Closed-loop evaluation: success, distance and steps of an optimal, an inverted and a random policy."""

from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import lightning
import numpy as np
import pytest
import torch
from omegaconf import OmegaConf

from blueberry_video.data.world import SPLITS, Simulator, World
from blueberry_video.evaluation.closed_loop import ClosedLoop

MOVES = np.array([[0.0, 0.0], [-0.1, 0.0], [0.1, 0.0], [0.0, 0.1], [0.0, -0.1]])


@dataclass(frozen=True)
class Point:
    vector: np.ndarray


class Plane:
    """Environment of a point in an unbounded plane; its image encodes the coordinates as bytes."""

    state: Point | None = None

    def reset(self, seed):
        self.state = Point(np.random.default_rng(seed).integers(-8, 9, 2) / 10)
        return self.state

    def step(self, action):
        self.state = Point(self.state.vector + MOVES[action])
        return self.state

    def render(self, state):
        return torch.from_numpy(np.round(128 + 10 * state.vector)).byte()[:, None, None].expand(-1, 4, 4)


class Walker:
    """Planner that moves straight towards the goal shown in the image, or straight away from it."""

    def __init__(self, towards: bool = True):
        self.towards, self.actions, self.planned = towards, SimpleNamespace(width=5), []

    def plan(self, model, images, states, goals, generator=None):
        model(images, states)
        self.planned.append(len(images))
        gaps = goals[:, :, 0, 0] - images[:, :, 0, 0]
        gaps = gaps if self.towards else -gaps
        best = torch.tensor([int(np.argmax(MOVES @ gap.numpy())) for gap in gaps])
        return torch.nn.functional.one_hot(best, 5).float()[:, None]


class Model(torch.nn.Module):
    """World model that checks that the coordinates in images and states agree."""

    def forward(self, images, states):
        assert not self.training
        assert states.dtype == images.dtype == torch.float32
        torch.testing.assert_close(images[:, :, 0, 0], states, atol=0.06, rtol=0)


def task() -> SimpleNamespace:
    return SimpleNamespace(model=Model(), device=torch.device("cpu"), normalize=lambda video: (video * 255 - 128) / 10)


def test_an_optimal_policy_needs_the_number_of_steps_of_the_shortest_path():
    walker = Walker()
    loop = ClosedLoop(Plane(), walker, episodes=30)
    values = loop.measure(task())
    assert values["success"] == 1
    assert values["distance"] <= 0.075
    lengths = [np.abs(goal.vector - start.vector).sum() / 0.1 for start, goal in map(loop._episode, range(30))]
    assert values["steps"] == pytest.approx(np.mean(lengths))
    assert len(walker.planned) == round(max(lengths))
    assert walker.planned[0] == 30  # one batch, of unfinished episodes only
    assert walker.planned[-1] == sum(round(length) == round(max(lengths)) for length in lengths)


def test_an_inverted_policy_never_reaches_the_goal():
    values = ClosedLoop(Plane(), Walker(towards=False), episodes=10, max_steps=4).measure(task())
    assert values["success"] == 0
    assert values["distance"] > 0.6
    assert "steps" not in values


def test_random_policy_matches_a_simulation():
    """The expected value is the share of simulated random walks that reach the goal."""
    loop = ClosedLoop(Plane(), Walker(), episodes=20, random_tries=100, max_steps=12)
    values, rng, arrived, left = loop.measure(task()), np.random.default_rng(5), [], []
    for number in range(20):
        start, goal = loop._episode(number)
        for _ in range(200):
            walk = start.vector + MOVES[rng.integers(5, size=12)].cumsum(axis=0)
            gaps = np.linalg.norm(walk - goal.vector, axis=1)
            arrived.append((gaps <= 0.075).any())
            left.append(gaps[np.argmax(gaps <= 0.075)] if arrived[-1] else gaps[-1])
    assert values["success_trivial"] == pytest.approx(np.mean(arrived), abs=0.03)
    assert values["distance_trivial"] == pytest.approx(np.mean(left), abs=0.03)
    assert 0 < values["success_trivial"] < 0.5


def test_goals_have_the_min_distance_and_are_deterministic():
    loop = ClosedLoop(Plane(), Walker(), goal_steps=5, min_distance=0.25)
    for number in range(20):
        start, goal = loop._episode(number)
        distance = np.linalg.norm(goal.vector - start.vector)
        assert 0.25 <= distance <= 0.5 + 1e-9
        assert np.array_equal(loop._episode(number)[1].vector, goal.vector)
    assert not np.array_equal(loop._episode(0)[1].vector, loop._episode(1)[1].vector)


class Recorded(Plane):
    """Plane that records the seeds of its resets."""

    def __init__(self):
        self.seeds = []

    def reset(self, seed):
        self.seeds.append(seed)
        return super().reset(seed)


@pytest.mark.parametrize(("changes", "split"), [({}, SPLITS["test"]), ({"split": 1, "seed": 7}, SPLITS["val"])])
def test_episodes_start_in_the_scenes_of_their_split(changes: dict, split: int):
    plane = Recorded()
    ClosedLoop(plane, Walker(), episodes=4, random_tries=2, **changes).measure(task())
    assert plane.seeds == [(split, number) for number in range(4)]


def test_default_episodes_start_in_test_scenes_of_the_world():
    world = {split: World(split, 3, num_frames=2, image_size=16, mode="agent") for split in SPLITS}
    loop = ClosedLoop(Simulator(image_size=16), Walker(), min_distance=0.1, goal_steps=4)
    for number in range(3):
        start, _ = loop._episode(number)
        assert np.allclose(start.vector, world["test"][number]["states"][0])
        for split in ("train", "val"):
            assert not np.allclose(start.vector, world[split][number]["states"][0])


def test_configs_evaluate_in_test_scenes():
    root = Path(__file__).parents[2]
    files = [*root.glob("conf/**/*.yaml"), *root.glob("experiments/*/config.yaml")]
    found = [OmegaConf.load(file).get("callbacks", OmegaConf.load(file)) for file in files]
    splits = [config.closed_loop.split for config in found if config and "split" in (config.get("closed_loop") or {})]
    assert splits
    assert set(splits) == {SPLITS["test"]}


def test_an_unreachable_goal_raises():
    loop = ClosedLoop(Plane(), Walker(), goal_steps=2, min_distance=0.3)
    with pytest.raises(ValueError, match=r"(?s)callbacks\.closed_loop\.goal_steps=2\b.*min_distance=0\.3\b"):
        loop.measure(task())


def test_metrics_are_logged_at_the_end_of_training(trainer):
    class Trained(lightning.LightningModule):
        def __init__(self):
            super().__init__()
            self.model, self.weight = Model(), torch.nn.Parameter(torch.zeros(1))

        def normalize(self, video):
            return (video * 255 - 128) / 10

        def training_step(self, batch, batch_idx):
            return self.weight.sum()

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=0.1)

    run = trainer(ClosedLoop(Plane(), Walker(), name="act", episodes=3), max_steps=1)
    run.fit(Trained(), train_dataloaders=[torch.zeros(1)])
    logged = run.callback_metrics
    assert logged["act/success"] == 1
    assert {"act/success_trivial", "act/distance", "act/distance_trivial", "act/steps"} <= logged.keys()


@pytest.mark.parametrize(
    ("changes", "pattern"),
    [
        ({"episodes": 0}, r"callbacks\.closed_loop\.episodes=0\b"),
        ({"max_steps": 0}, r"callbacks\.closed_loop\.max_steps=0\b"),
        ({"goal_steps": 0}, r"callbacks\.closed_loop\.goal_steps=0\b"),
        ({"random_tries": 0}, r"callbacks\.closed_loop\.random_tries=0\b"),
        ({"tolerance": 0.3}, r"(?s)callbacks\.closed_loop\.tolerance=0\.3\b.*min_distance=0\.3\b"),
    ],
)
def test_arguments_out_of_range_raise(changes, pattern):
    with pytest.raises(ValueError, match=pattern):
        ClosedLoop(Plane(), Walker(), **changes)


def test_the_least_numbers_are_accepted():
    numbers = {"episodes": 1, "goal_steps": 3, "max_steps": 1, "random_tries": 1}
    values = ClosedLoop(Plane(), Walker(), tolerance=0, **numbers).measure(task())
    assert 0 <= values["success"] <= 1
    ClosedLoop(Plane(), Walker(), **{**numbers, "goal_steps": 1})
