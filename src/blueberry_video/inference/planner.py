"""Planning with a world model: the cross-entropy method of V-JEPA 2-AC (arXiv 2506.09985;
github.com/facebookresearch/vjepa2).

Action sequences are drawn from a distribution, the world model plays each out, and the distribution is fitted to those
that end nearest to the goal, a picture; after a few rounds its centre is the plan. Only the first action is carried
out, then all is planned again from the new picture (receding horizon).

Unusual about it: a momentum m keeps the share m of the old distribution, so that with 0 it is the plain method; and
several situations are planned for at once.

Letters: B situations, N samples, H horizon, A width of an action, K of a state, S patches, D the encoder's width.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from blueberry_video.models.jepa.world_model import WorldModel

Energy = Callable[[Tensor], Tensor]  # action sequences (B, N, H, A) -> how bad each is, (B, N)


class Belief(NamedTuple):
    """A distribution over action sequences, independent in every step: (B, H, A) each."""

    mean: Tensor  # of discrete actions the probability of each
    std: Tensor  # of discrete actions 0


class Actions(ABC):
    """What a planner chooses from.

    Attributes:
        width: A, the width of an action vector.
    """

    width: int

    @abstractmethod
    def start(self, situations: int, horizon: int, device: torch.device) -> Belief:
        """What is believed before the first round."""

    @abstractmethod
    def sample(self, belief: Belief, count: int, generator: torch.Generator | None = None) -> Tensor:
        """Draws ``count`` sequences for each situation, (B, N, H, A)."""

    def refit(self, belief: Belief, elites: Tensor, mean_momentum: float, std_momentum: float) -> Belief:
        """The belief that the sequences ``elites`` (B, M, H, A) lead to; ``momentum`` is the share of the old one."""
        spread = elites.std(dim=1, correction=min(1, elites.shape[1] - 1))
        return Belief(
            torch.lerp(elites.mean(dim=1), belief.mean, mean_momentum), torch.lerp(spread, belief.std, std_momentum)
        )

    @abstractmethod
    def choose(self, belief: Belief) -> Tensor:
        """The plan: one sequence a situation, (B, H, A)."""


class _Continuous(Actions):
    """Vectors from normal distributions that begin around 0, each brought into what is allowed."""

    def __init__(self, width: int, std: Sequence[float]):
        if width < 1 or any(size <= 0 for size in std):
            raise ValueError(
                f"the planner's actions have width={width} and sizes {list(std)}: give at least one channel, and sizes "
                "above 0."
            )
        self.width, self._std = width, tuple(std)

    @abstractmethod
    def project(self, actions: Tensor) -> Tensor:
        """The nearest allowed actions to (..., A)."""

    def start(self, situations: int, horizon: int, device: torch.device) -> Belief:
        std = torch.tensor(self._std, device=device).expand(situations, horizon, self.width)
        return Belief(torch.zeros_like(std), std)

    def sample(self, belief: Belief, count: int, generator: torch.Generator | None = None) -> Tensor:
        mean, std = belief.mean[:, None], belief.std[:, None]
        source = mean.device if generator is None else generator.device
        noise = torch.randn(len(mean), count, *mean.shape[2:], generator=generator, device=source)
        return self.project(mean + std * noise.to(mean))

    def choose(self, belief: Belief) -> Tensor:
        return self.project(belief.mean)


class Box(_Continuous):
    """Vectors whose channels lie within ±``limit``, one for all or one each.

    Args:
        width: A.
        limit: above 0; also the standard deviation of the first round.

    Raises:
        ValueError: for a limit of 0 or below, or as many limits as there are not channels.
    """

    def __init__(self, width: int, limit: float | list[float]):
        limits = [limit] * width if isinstance(limit, int | float) else list(limit)
        if len(limits) != width:
            raise ValueError(f"planner.actions.limit={limits} has {len(limits)} values for {width} channels: give one.")
        super().__init__(width, limits)

    def project(self, actions: Tensor) -> Tensor:
        limit = actions.new_tensor(self._std)
        return actions.clamp(-limit, limit)


class L1Ball(_Continuous):
    """Vectors whose absolute values add up to ``radius`` at most; others go to the nearest such point.

    Args:
        width: A.
        radius: above 0; also the standard deviation of the first round. V-JEPA 2-AC: 0.075 (metres).

    Raises:
        ValueError: for a radius of 0 or below.
    """

    def __init__(self, width: int, radius: float = 0.075):
        super().__init__(width, [radius] * width)
        self.radius = radius

    def project(self, actions: Tensor) -> Tensor:
        """Duchi et al., ICML 2008: every channel comes nearer to 0 by the same amount, but not past it."""
        sizes = actions.abs().sort(dim=-1, descending=True).values
        excess = sizes.cumsum(dim=-1) - self.radius
        shrink = (excess / torch.arange(1, self.width + 1, device=actions.device)).amax(dim=-1, keepdim=True)
        return actions.sign() * (actions.abs() - shrink.clamp(min=0)).clamp(min=0)


class Discrete(Actions):
    """One of ``width`` actions in every step, as a one-hot vector. The plan takes the most probable of each step.

    Raises:
        ValueError: for less than two.
    """

    def __init__(self, width: int):
        if width < 2:
            raise ValueError(f"planner.actions.width={width} leaves nothing to choose: give at least 2 actions.")
        self.width = width

    def start(self, situations: int, horizon: int, device: torch.device) -> Belief:
        even = torch.full((situations, horizon, self.width), 1 / self.width, device=device)
        return Belief(even, torch.zeros_like(even))

    def sample(self, belief: Belief, count: int, generator: torch.Generator | None = None) -> Tensor:
        source = belief.mean.device if generator is None else generator.device
        rows = belief.mean.flatten(0, 1).to(source)  # (B * H, A)
        drawn = torch.multinomial(rows, count, replacement=True, generator=generator).to(belief.mean.device)
        return F.one_hot(drawn, self.width).to(belief.mean).unflatten(0, belief.mean.shape[:2]).transpose(1, 2)

    def refit(self, belief: Belief, elites: Tensor, mean_momentum: float, std_momentum: float) -> Belief:
        return Belief(torch.lerp(elites.mean(dim=1), belief.mean, mean_momentum), belief.std)

    def choose(self, belief: Belief) -> Tensor:
        return F.one_hot(belief.mean.argmax(dim=-1), self.width).to(belief.mean)


class CrossEntropyPlanner:
    """Finds the actions that lead to a goal. The defaults are V-JEPA 2-AC's.

    Args:
        actions: what to choose from, of the world model's ``action_dim``.
        samples: N, sequences drawn a round.
        elites: how many of these, those of least energy, the next round is fitted to.
        iterations: rounds.
        horizon: H, actions a sequence.
        mean_momentum, std_momentum: share of the old mean and standard deviation that is kept, in [0, 1]; the
            probabilities of discrete actions are a mean.
        displacement: what an action adds to the state: A rows of K numbers, for the states of the later steps. ``None``
            will do for a horizon of 1, in which there are none.
        batch_size: most sequences the model plays out at once.

    Raises:
        ValueError: for a value out of range, or a longer horizon without ``displacement``.
    """

    def __init__(
        self,
        actions: Actions,
        samples: int = 800,
        elites: int = 10,
        iterations: int = 10,
        horizon: int = 1,
        mean_momentum: float = 0.15,
        std_momentum: float = 0.15,
        displacement: list[list[float]] | None = None,
        batch_size: int = 1024,
    ):
        for key, number in (
            ("samples", samples),
            ("elites", elites),
            ("iterations", iterations),
            ("horizon", horizon),
            ("batch_size", batch_size),
        ):
            if number < 1:
                raise ValueError(f"planner.{key}={number} must be at least 1.")
        if elites > samples:
            raise ValueError(
                f"planner.elites={elites} are to be chosen from planner.samples={samples}, which are fewer: lower the "
                "one or raise the other."
            )
        for key, momentum in (("mean_momentum", mean_momentum), ("std_momentum", std_momentum)):
            if not 0 <= momentum <= 1:
                raise ValueError(
                    f"planner.{key}={momentum} is the share of the old distribution that is kept: use a number in [0, "
                    "1], such as 0.15."
                )
        if displacement is None and horizon > 1:
            raise ValueError(
                f"planner.horizon={horizon} needs planner.displacement, what each action adds to the state: the model "
                "is told the state in which a later action is taken. Give it, or use horizon=1."
            )
        if displacement is not None and len(displacement) != actions.width:
            raise ValueError(
                f"planner.displacement has {len(displacement)} rows for actions of width {actions.width}: give what "
                "each adds to the state."
            )
        self.actions, self.samples, self.elites, self.iterations = actions, samples, elites, iterations
        self.horizon, self.mean_momentum, self.std_momentum = horizon, mean_momentum, std_momentum
        self.displacement, self.batch_size = displacement, batch_size

    @torch.no_grad()
    def plan(
        self,
        model: WorldModel,
        pictures: Tensor,
        states: Tensor,
        goals: Tensor,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """The actions after which the world is to look like the goals.

        Args:
            model: in evaluation mode, as all it has is.
            pictures: (B, C, H, W) of the situations, normalised as the encoder wants it, on the model's device.
            states: (B, K) in them.
            goals: (B, C, H, W), normalised likewise.
            generator: of the draws, on any device; ``None`` takes the device's own.

        Returns:
            (B, H, A), of which the first action is to be carried out.

        Raises:
            ValueError: if the actions are not the model's.
        """
        if self.actions.width != model.action_dim:
            raise ValueError(
                f"planner.actions.width={self.actions.width} and model.action_dim={model.action_dim} disagree: the "
                "model must have been trained with the actions it plans."
            )
        start, goal = model.encode_frames(torch.stack([pictures, goals], dim=2)).unbind(dim=1)
        return self.minimize(
            lambda actions: self._distance(model, start, states, goal, actions), len(start), start.device, generator
        )

    @torch.no_grad()
    def minimize(
        self, energy: Energy, situations: int, device: torch.device, generator: torch.Generator | None = None
    ) -> Tensor:
        """The method alone: action sequences of low energy, (B, H, A), for each of B situations."""
        belief = self.actions.start(situations, self.horizon, device)
        for _ in range(self.iterations):
            sequences = self.actions.sample(belief, self.samples, generator)
            best = energy(sequences).topk(self.elites, dim=1, largest=False).indices  # (B, elites)
            elites = sequences[torch.arange(situations, device=device)[:, None], best]
            belief = self.actions.refit(belief, elites, self.mean_momentum, self.std_momentum)
        return self.actions.choose(belief)

    def _distance(self, model: WorldModel, start: Tensor, states: Tensor, goal: Tensor, actions: Tensor) -> Tensor:
        """Mean L1 between what a sequence leads to and the goal.

        start, goal (B, S, D), states (B, K), actions (B, N, H, A) -> (B, N).
        """
        count = actions.shape[1]
        passed = self.states_along(states, actions).flatten(0, 1)  # (B * N, H, K)
        situation = torch.arange(len(start), device=start.device).repeat_interleave(count)
        distances = []
        for rows in torch.arange(len(situation), device=start.device).split(self.batch_size):
            here = situation[rows]
            reached = model.rollout(start[here, None], actions.flatten(0, 1)[rows], passed[rows])[:, -1]
            distances.append((reached - goal[here]).abs().mean(dim=(1, 2)))
        return torch.cat(distances).view(-1, count)

    def states_along(self, states: Tensor, actions: Tensor) -> Tensor:
        """In which state each action of a sequence is taken: (B, K) and (B, N, H, A) -> (B, N, H, K)."""
        along = states[:, None, None].expand(-1, *actions.shape[1:3], -1)
        if self.displacement is None:
            return along
        moves = actions @ actions.new_tensor(self.displacement)  # (B, N, H, K)
        return along + F.pad(moves.cumsum(dim=2), (0, 0, 1, 0))[:, :, :-1]
