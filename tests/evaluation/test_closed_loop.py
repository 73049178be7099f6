"""Episodes in a known world: success, distance and steps of policies that are right, wrong and random."""

from dataclasses import dataclass
from types import SimpleNamespace

import lightning
import numpy as np
import pytest
import torch

from blueberry_video.evaluation.closed_loop import ClosedLoop

WAYS = np.array([[0.0, 0.0], [-0.1, 0.0], [0.1, 0.0], [0.0, 0.1], [0.0, -0.1]])


@dataclass(frozen=True)
class Place:
    vector: np.ndarray


class Floor:
    """A point that moves over an endless floor; its picture is its place, as bytes."""

    state: Place | None = None

    def reset(self, seed):
        self.state = Place(np.random.default_rng(seed).integers(-8, 9, 2) / 10)
        return self.state

    def step(self, action):
        self.state = Place(self.state.vector + WAYS[action])
        return self.state

    def render(self, state):
        return torch.from_numpy(np.round(128 + 10 * state.vector)).byte()[:, None, None].expand(-1, 4, 4)


class Walker:
    """Goes straight to the goal that it reads off the picture, or always away from it."""

    def __init__(self, towards: bool = True):
        self.towards, self.actions, self.planned = towards, SimpleNamespace(width=5), []

    def plan(self, model, pictures, states, goals, generator=None):
        model(pictures, states)
        self.planned.append(len(pictures))
        gaps = goals[:, :, 0, 0] - pictures[:, :, 0, 0]
        gaps = gaps if self.towards else -gaps
        best = torch.tensor([int(np.argmax(WAYS @ gap.numpy())) for gap in gaps])
        return torch.nn.functional.one_hot(best, 5).float()[:, None]


class Model(torch.nn.Module):
    """Checks what it is given: places as pictures and as states agree."""

    def forward(self, pictures, states):
        assert not self.training
        assert states.dtype == pictures.dtype == torch.float32
        torch.testing.assert_close(pictures[:, :, 0, 0], states, atol=0.06, rtol=0)


def task() -> SimpleNamespace:
    return SimpleNamespace(model=Model(), device=torch.device("cpu"), normalize=lambda video: (video * 255 - 128) / 10)


def test_who_goes_straight_arrives_in_as_many_steps_as_it_is_far():
    walker = Walker()
    loop = ClosedLoop(Floor(), walker, episodes=30)
    values = loop.measure(task())
    assert values["success"] == 1
    assert values["distance"] <= 0.075
    ways = [np.abs(goal.vector - start.vector).sum() / 0.1 for start, goal in map(loop._episode, range(30))]
    assert values["steps"] == pytest.approx(np.mean(ways))
    assert len(walker.planned) == round(max(ways))
    assert walker.planned[0] == 30  # all side by side, and only those that go on
    assert walker.planned[-1] == sum(round(way) == round(max(ways)) for way in ways)


def test_who_goes_away_never_arrives():
    values = ClosedLoop(Floor(), Walker(towards=False), episodes=10, max_steps=4).measure(task())
    assert values["success"] == 0
    assert values["distance"] > 0.6
    assert "steps" not in values


def test_random_actions_are_measured_beside_it():
    """Against a simulation of its own: the share of random walks that come by the goal."""
    loop = ClosedLoop(Floor(), Walker(), episodes=20, random_tries=100, max_steps=12)
    values, rng, arrived, left = loop.measure(task()), np.random.default_rng(5), [], []
    for number in range(20):
        start, goal = loop._episode(number)
        for _ in range(200):
            walk = start.vector + WAYS[rng.integers(5, size=12)].cumsum(axis=0)
            gaps = np.linalg.norm(walk - goal.vector, axis=1)
            arrived.append((gaps <= 0.075).any())
            left.append(gaps[np.argmax(gaps <= 0.075)] if arrived[-1] else gaps[-1])
    assert values["success_trivial"] == pytest.approx(np.mean(arrived), abs=0.03)
    assert values["distance_trivial"] == pytest.approx(np.mean(left), abs=0.03)
    assert 0 < values["success_trivial"] < 0.5


def test_goals_are_as_far_as_asked_and_the_same_every_time():
    loop = ClosedLoop(Floor(), Walker(), goal_steps=5, min_distance=0.25)
    for number in range(20):
        start, goal = loop._episode(number)
        far = np.linalg.norm(goal.vector - start.vector)
        assert 0.25 <= far <= 0.5 + 1e-9
        assert np.array_equal(loop._episode(number)[1].vector, goal.vector)
    assert not np.array_equal(loop._episode(0)[1].vector, loop._episode(1)[1].vector)


def test_a_goal_that_no_walk_leads_to_is_refused():
    loop = ClosedLoop(Floor(), Walker(), goal_steps=2, min_distance=0.3)
    with pytest.raises(ValueError, match=r"2 random actions did not lead 0\.3 away .*raise callbacks"):
        loop.measure(task())


def test_it_logs_at_the_end_of_training(tmp_path):
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

    trainer = lightning.Trainer(
        max_steps=1,
        accelerator="cpu",
        callbacks=[ClosedLoop(Floor(), Walker(), name="act", episodes=3)],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=tmp_path,
    )
    trainer.fit(Trained(), train_dataloaders=[torch.zeros(1)])
    logged = trainer.callback_metrics
    assert logged["act/success"] == 1
    assert {"act/success_trivial", "act/distance", "act/distance_trivial", "act/steps"} <= logged.keys()


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"episodes": 0}, r"callbacks\.closed_loop\.episodes=0 must be at least 1"),
        ({"max_steps": 0}, r"callbacks\.closed_loop\.max_steps=0 must be at least 1"),
        ({"goal_steps": 0}, r"callbacks\.closed_loop\.goal_steps=0 must be at least 1"),
        ({"random_tries": 0}, r"callbacks\.closed_loop\.random_tries=0 must be at least 1"),
        ({"tolerance": 0.3}, r"tolerance=0\.3 and min_distance=0\.3: every goal"),
    ],
)
def test_bad_arguments_are_refused(changes, text):
    with pytest.raises(ValueError, match=text):
        ClosedLoop(Floor(), Walker(), **changes)
