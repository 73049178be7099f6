"""Acting with a world model: from a start, with a picture of the goal, until it is reached."""

from collections.abc import Callable, Sequence
from typing import Any, Protocol

import numpy as np
import torch
from lightning import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback
from torch import Tensor

from blueberry_video.evaluation.end_of_run import log_end_of_run

GOAL_DRAWS = 1000  # before a goal is held to be out of reach


class State(Protocol):
    """A moment of an environment; ``vector`` (K,) is what a world model is told of it."""

    @property
    def vector(self) -> np.ndarray: ...


class Environment(Protocol):
    """A world with discrete actions, such as :class:`blueberry_video.data.world.Simulator`."""

    state: Any

    def reset(self, seed: tuple[int, ...]) -> State: ...

    def step(self, action: int) -> State: ...

    def render(self, state: Any) -> Tensor: ...


class Planner(Protocol):
    """Such as :class:`blueberry_video.inference.planner.CrossEntropyPlanner`, with discrete actions."""

    actions: Any

    def plan(
        self, model: Any, pictures: Tensor, states: Tensor, goals: Tensor, generator: torch.Generator | None = None
    ) -> Tensor: ...


class ClosedLoop(Callback):
    """Plays episodes at the end of a run: the planner acts until it reaches the goal or has no steps left.

    Logs ``<name>/success``, the share of episodes in which it was reached, ``<name>/distance``, the mean distance from
    the goal at their end, both with ``_trivial``, what uniformly random actions get in the same episodes with as many
    steps, and ``<name>/steps``, the mean number of steps of the successful ones (not logged where there are none).

    Episode i starts where the environment's ``reset((split, i))`` does. Its goal is where random actions lead from
    there; the model sees it only as a picture. Distances are those of state vectors.

    Args:
        environment: to act in, with pictures of the size that the model's encoder takes.
        planner: with the environment's actions, as one-hot vectors.
        name: prefix of the metrics.
        episodes: how many.
        goal_steps: random actions from the start to the goal; drawn anew until it is ``min_distance`` away.
        min_distance, tolerance: at the start, and to count as reached; in the unit of the states.
        max_steps: of an episode.
        random_tries: how often the random policy plays each episode; its rate is the mean.
        split: first number of the environment's seeds: 2 are the procedural world's test scenes.
        seed: of the goals, the planner and the random policy.

    Raises:
        ValueError: for numbers below 1, a goal that counts as reached from the start or, at the end of training, one
            that so few steps do not lead to.
    """

    def __init__(
        self,
        environment: Environment,
        planner: Planner,
        name: str = "closed_loop",
        episodes: int = 50,
        goal_steps: int = 6,
        min_distance: float = 0.3,
        tolerance: float = 0.075,
        max_steps: int = 15,
        random_tries: int = 20,
        split: int = 2,
        seed: int = 0,
    ):
        for key, number in (
            ("episodes", episodes),
            ("goal_steps", goal_steps),
            ("max_steps", max_steps),
            ("random_tries", random_tries),
        ):
            if number < 1:
                raise ValueError(f"callbacks.{name}.{key}={number} must be at least 1.")
        if not 0 <= tolerance < min_distance:
            raise ValueError(
                f"callbacks.{name}.tolerance={tolerance} and min_distance={min_distance}: every goal would be reached "
                "before the first step, or none at all. Use 0 <= tolerance < min_distance."
            )
        self.environment, self.planner, self.name = environment, planner, name
        self.episodes, self.goal_steps, self.max_steps, self.random_tries = (
            episodes,
            goal_steps,
            max_steps,
            random_tries,
        )
        self.min_distance, self.tolerance, self.split, self.seed = min_distance, tolerance, split, seed

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.is_global_zero:
            log_end_of_run(trainer, self.name, self.measure(pl_module))

    @torch.no_grad()
    def measure(self, task: Any) -> dict[str, float]:
        """Metrics without their prefix.

        Args:
            task: has ``model``, a world model, ``normalize`` and ``device``.
        """
        task.model.eval()
        starts, goals = zip(*(self._episode(number) for number in range(self.episodes)))
        generator = torch.Generator().manual_seed(self.seed)
        pictures = self._pictures(task, goals)

        def planned(states: list[State], going: list[int]) -> list[int]:
            vectors = torch.tensor(np.stack([state.vector for state in states]), device=task.device).float()
            seen = self._pictures(task, states)
            actions = self.planner.plan(task.model, seen, vectors, pictures[going], generator)
            return actions[:, 0].argmax(dim=-1).tolist()

        reached, distance = self._play(starts, goals, planned)
        rng = np.random.default_rng((self.seed, 1))
        count = self.planner.actions.width
        tries = [
            self._play(starts, goals, lambda states, _: rng.integers(count, size=len(states)).tolist())
            for _ in range(self.random_tries)
        ]
        steps = reached[reached >= 0]
        return {
            "success": float((reached >= 0).mean()),
            "success_trivial": float(np.mean([(found >= 0).mean() for found, _ in tries])),
            "distance": float(distance.mean()),
            "distance_trivial": float(np.mean([left.mean() for _, left in tries])),
            **({"steps": float(steps.mean())} if len(steps) else {}),
        }

    def _episode(self, number: int) -> tuple[State, State]:
        """Start and goal."""
        rng = np.random.default_rng((self.seed, number))
        start = self.environment.reset((self.split, number))
        for _ in range(GOAL_DRAWS):
            self.environment.state = goal = start
            for action in rng.integers(self.planner.actions.width, size=self.goal_steps):
                goal = self.environment.step(int(action))
            if _distance(start, goal) >= self.min_distance:
                return start, goal
        raise ValueError(
            f"{GOAL_DRAWS} times, {self.goal_steps} random actions did not lead {self.min_distance} away from the "
            f"start of episode {number}: raise callbacks.{self.name}.goal_steps, or lower min_distance."
        )

    def _play(
        self, starts: tuple[State, ...], goals: tuple[State, ...], policy: Callable[[list[State], list[int]], list[int]]
    ) -> tuple[np.ndarray, np.ndarray]:
        """Plays all episodes side by side.

        Args:
            starts, goals: of the episodes.
            policy: the states of the episodes that go on, and which these are -> an action for each.

        Returns:
            (episodes,) each: the number of steps in which the goal was reached, or -1; the distance from it at the end.
        """
        states, reached = list(starts), np.full(len(starts), -1)
        for step in range(1, self.max_steps + 1):
            going = np.flatnonzero(reached < 0).tolist()
            if not going:
                break
            for number, action in zip(going, policy([states[i] for i in going], going), strict=True):
                self.environment.state = states[number]
                states[number] = self.environment.step(action)
                if _distance(states[number], goals[number]) <= self.tolerance:
                    reached[number] = step
        return reached, np.array([_distance(state, goal) for state, goal in zip(states, goals, strict=True)])

    def _pictures(self, task: Any, states: Sequence[State]) -> Tensor:
        """What the model is shown of states: (B, C, H, W)."""
        video = torch.stack([self.environment.render(state) for state in states]).to(task.device)[:, :, None]
        return task.normalize(video.float().div(255))[:, :, 0]


def _distance(one: State, other: State) -> float:
    return float(np.linalg.norm(one.vector - other.vector))
