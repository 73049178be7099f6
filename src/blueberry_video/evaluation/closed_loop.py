"""Closed-loop evaluation of a world model: episodes from a start state to a goal image."""

from collections.abc import Callable, Sequence
from typing import Any, Protocol

import numpy as np
import torch
from lightning import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback
from torch import Tensor

from blueberry_video.evaluation.end_of_run import evaluate_at_end

GOAL_DRAWS = 1000  # draws of a goal before it counts as unreachable


class State(Protocol):
    """State of an environment; ``vector`` (K,) is the state input of the world model."""

    @property
    def vector(self) -> np.ndarray: ...


class Environment(Protocol):
    """Environment with discrete actions, such as :class:`blueberry_video.data.world.Simulator`."""

    state: Any

    def reset(self, seed: tuple[int, ...]) -> State: ...

    def step(self, action: int) -> State: ...

    def render(self, state: Any) -> Tensor: ...


class Planner(Protocol):
    """Planner such as :class:`blueberry_video.inference.planner.CrossEntropyPlanner`, with discrete actions."""

    actions: Any

    def plan(
        self, model: Any, pictures: Tensor, states: Tensor, goals: Tensor, generator: torch.Generator | None = None
    ) -> Tensor: ...


class ClosedLoop(Callback):
    """Runs episodes at the end of training: the planner acts until it reaches the goal or the step limit.

    Logs ``<name>/success``, the share of episodes that reach the goal, ``<name>/distance``, the mean final distance
    from the goal, both with ``_trivial``, the values of uniformly random actions on the same episodes with the same
    step limit, and ``<name>/steps``, the mean number of steps of the successful episodes (not logged if there are
    none).

    Episode i starts at ``environment.reset((split, i))``. Its goal is the state that random actions lead to from
    there; the model receives it only as an image. Distances are Euclidean distances of state vectors.

    Args:
        environment: environment that renders images of the size of the model's encoder.
        planner: planner over the environment's actions, as one-hot vectors.
        name: prefix of the metrics.
        episodes: number of episodes.
        goal_steps: random actions from the start to the goal; drawn again until the goal is ``min_distance`` away.
        min_distance: least distance of a goal from the start, in the unit of the states.
        tolerance: distance at which a goal counts as reached, in the unit of the states.
        max_steps: step limit of an episode.
        random_tries: runs of the random policy per episode; its metrics are means over them.
        split: first number of the environment's seeds; 2 selects the test scenes of the procedural world.
        seed: seed of the goals, the planner and the random policy.

    Raises:
        ValueError: for numbers below 1, for a goal that counts as reached at the start and, at the end of training, if
            ``goal_steps`` actions never lead ``min_distance`` away.
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
        counts = {"episodes": episodes, "goal_steps": goal_steps, "max_steps": max_steps, "random_tries": random_tries}
        for key, number in counts.items():
            if number < 1:
                raise ValueError(f"callbacks.{name}.{key}={number} must be at least 1.")
        if not 0 <= tolerance < min_distance:
            raise ValueError(
                f"callbacks.{name}.tolerance={tolerance} must be at least 0 and below callbacks.{name}.min_distance="
                f"{min_distance}, or every goal is reached before the first step or none ever is."
            )
        self.environment, self.planner, self.name = environment, planner, name
        self.episodes, self.goal_steps = episodes, goal_steps
        self.max_steps, self.random_tries = max_steps, random_tries
        self.min_distance, self.tolerance, self.split, self.seed = min_distance, tolerance, split, seed

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        evaluate_at_end(trainer, self.name, lambda: self.measure(pl_module))

    @torch.no_grad()
    def measure(self, task: Any) -> dict[str, float]:
        """Returns the metrics without their prefix.

        Args:
            task: task with ``model`` (a world model), ``normalize`` and ``device``.
        """
        task.model.eval()
        starts, goals = zip(*(self._episode(number) for number in range(self.episodes)))
        generator = torch.Generator().manual_seed(self.seed)
        goal_images = self._images(task, goals)

        def plan(states: list[State], active: list[int]) -> list[int]:
            vectors = torch.tensor(np.stack([state.vector for state in states]), device=task.device).float()
            images = self._images(task, states)
            actions = self.planner.plan(task.model, images, vectors, goal_images[active], generator)
            return actions[:, 0].argmax(dim=-1).tolist()

        reached, distance = self._play(starts, goals, plan)
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
        """Returns the start and the goal state of an episode."""
        rng = np.random.default_rng((self.seed, number))
        start = self.environment.reset((self.split, number))
        for _ in range(GOAL_DRAWS):
            self.environment.state = goal = start
            for action in rng.integers(self.planner.actions.width, size=self.goal_steps):
                goal = self.environment.step(int(action))
            if _distance(start, goal) >= self.min_distance:
                return start, goal
        raise ValueError(
            f"callbacks.{self.name}.goal_steps={self.goal_steps} random actions did not lead min_distance="
            f"{self.min_distance} away from the start of episode {number} in {GOAL_DRAWS} draws: raise goal_steps or "
            "lower min_distance."
        )

    def _play(
        self, starts: tuple[State, ...], goals: tuple[State, ...], policy: Callable[[list[State], list[int]], list[int]]
    ) -> tuple[np.ndarray, np.ndarray]:
        """Runs all episodes in one batch.

        Args:
            starts, goals: states of each episode.
            policy: maps the states and the indices of the unfinished episodes to one action each.

        Returns:
            Two arrays (episodes,): the step at which the goal was reached, or -1; the final distance from it.
        """
        states, reached = list(starts), np.full(len(starts), -1)
        for step in range(1, self.max_steps + 1):
            active = np.flatnonzero(reached < 0).tolist()
            if not active:
                break
            for number, action in zip(active, policy([states[i] for i in active], active), strict=True):
                self.environment.state = states[number]
                states[number] = self.environment.step(action)
                if _distance(states[number], goals[number]) <= self.tolerance:
                    reached[number] = step
        return reached, np.array([_distance(state, goal) for state, goal in zip(states, goals, strict=True)])

    def _images(self, task: Any, states: Sequence[State]) -> Tensor:
        """Returns the normalized images (B, C, H, W) of states."""
        video = torch.stack([self.environment.render(state) for state in states]).to(task.device)[:, :, None]
        return task.normalize(video.float().div(255))[:, :, 0]


def _distance(a: State, b: State) -> float:
    return float(np.linalg.norm(a.vector - b.vector))
