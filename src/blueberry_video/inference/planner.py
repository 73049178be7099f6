"""Planning with a world model: the cross-entropy method of V-JEPA 2-AC (arXiv 2506.09985;
github.com/facebookresearch/vjepa2).

Action sequences are sampled from a distribution, the world model predicts the outcome of each, and the distribution is
fitted to the elites, the sequences with the predictions nearest to a goal image. After several iterations the mean is
the plan. Only its first action is executed before planning again from the new image (receding horizon).

Unusual about it: a momentum m keeps the share m of the old distribution, so 0 is the plain method; and plans are
computed for a batch of situations.

Letters: B batch of situations, N samples, H horizon, A width of an action, K width of a state, S patches, D width of
the encoder.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import ClassVar, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from blueberry_video.models.jepa.world_model import WorldModel

Energy = Callable[[Tensor], Tensor]  # action sequences (B, N, H, A) -> cost of each (B, N)


class ActionDistribution(NamedTuple):
    """Distribution of action sequences, independent in each step: (B, H, A) each."""

    mean: Tensor  # of discrete actions: the probabilities
    std: Tensor  # of discrete actions: 0


class Actions(ABC):
    """Action space of a planner.

    Attributes:
        width: A, the width of an action vector.
        moves_states: :meth:`moved` computes the states of later steps.
    """

    width: int
    moves_states: ClassVar[bool] = False

    @abstractmethod
    def start(self, batch: int, horizon: int, device: torch.device) -> ActionDistribution:
        """Initial distribution for each of ``batch`` situations."""

    @abstractmethod
    def sample(self, distribution: ActionDistribution, count: int, generator: torch.Generator | None = None) -> Tensor:
        """Samples ``count`` sequences per situation: (B, N, H, A)."""

    def refit(
        self, distribution: ActionDistribution, elites: Tensor, mean_momentum: float, std_momentum: float
    ) -> ActionDistribution:
        """Fits the distribution to ``elites`` (B, M, H, A); the momenta are the shares of the old one."""
        spread = elites.std(dim=1, correction=min(1, elites.shape[1] - 1))
        return ActionDistribution(
            torch.lerp(elites.mean(dim=1), distribution.mean, mean_momentum),
            torch.lerp(spread, distribution.std, std_momentum),
        )

    @abstractmethod
    def choose(self, distribution: ActionDistribution) -> Tensor:
        """Most likely valid sequence per situation, the plan: (B, H, A)."""

    def moved(self, states: Tensor, actions: Tensor) -> Tensor:
        """States (..., K) after actions (..., A), if ``moves_states``."""
        raise NotImplementedError(f"{type(self).__name__} does not compute states: use planner.displacement.")


class _Continuous(Actions):
    """Vectors with normal distributions of initial mean 0, projected onto the valid actions."""

    def __init__(self, width: int, std: Sequence[float]):
        if width < 1 or any(size <= 0 for size in std):
            raise ValueError(
                f"planner.actions.width={width} must be at least 1, and the limit or radius, {list(std)}, above 0."
            )
        self.width, self._std = width, tuple(std)

    @abstractmethod
    def project(self, actions: Tensor) -> Tensor:
        """Nearest valid actions to (..., A)."""

    def start(self, batch: int, horizon: int, device: torch.device) -> ActionDistribution:
        std = torch.tensor(self._std, device=device).expand(batch, horizon, self.width)
        return ActionDistribution(torch.zeros_like(std), std)

    def sample(self, distribution: ActionDistribution, count: int, generator: torch.Generator | None = None) -> Tensor:
        mean, std = distribution.mean[:, None], distribution.std[:, None]
        source = mean.device if generator is None else generator.device
        noise = torch.randn(len(mean), count, *mean.shape[2:], generator=generator, device=source)
        return self.project(mean + std * noise.to(mean))

    def choose(self, distribution: ActionDistribution) -> Tensor:
        return self.project(distribution.mean)


class Box(_Continuous):
    """Vectors with each channel in [-limit, limit].

    Args:
        width: A.
        limit: above 0, one for all channels or one per channel; also the initial standard deviation.

    Raises:
        ValueError: a limit is 0 or below, or the number of limits is not ``width``.
    """

    def __init__(self, width: int, limit: float | list[float]):
        limits = [limit] * width if isinstance(limit, int | float) else list(limit)
        if len(limits) != width:
            raise ValueError(f"planner.actions.limit={limits} has {len(limits)} values for {width} channels: set one.")
        super().__init__(width, limits)

    def project(self, actions: Tensor) -> Tensor:
        limit = actions.new_tensor(self._std)
        return actions.clamp(-limit, limit)


class L1Ball(_Continuous):
    """Vectors in an L1 ball: the absolute values sum to at most ``radius``.

    Args:
        width: A.
        radius: above 0; also the initial standard deviation. V-JEPA 2-AC: 0.075 (meters).

    Raises:
        ValueError: the radius is 0 or below.
    """

    def __init__(self, width: int, radius: float = 0.075):
        super().__init__(width, [radius] * width)
        self.radius = radius

    def project(self, actions: Tensor) -> Tensor:
        """Projects by soft thresholding: all channels shrink by the same amount, at most to 0 (Duchi et al., 2008)."""
        sizes = actions.abs().sort(dim=-1, descending=True).values
        excess = sizes.cumsum(dim=-1) - self.radius
        shrink = (excess / torch.arange(1, self.width + 1, device=actions.device)).amax(dim=-1, keepdim=True)
        return actions.sign() * (actions.abs() - shrink.clamp(min=0)).clamp(min=0)


class Discrete(Actions):
    """One of ``width`` actions per step, as a one-hot vector. The plan holds the most probable action of each step.

    Raises:
        ValueError: ``width`` is below 2.
    """

    def __init__(self, width: int):
        if width < 2:
            raise ValueError(f"planner.actions.width={width} must be at least 2 for discrete actions.")
        self.width = width

    def start(self, batch: int, horizon: int, device: torch.device) -> ActionDistribution:
        even = torch.full((batch, horizon, self.width), 1 / self.width, device=device)
        return ActionDistribution(even, torch.zeros_like(even))

    def sample(self, distribution: ActionDistribution, count: int, generator: torch.Generator | None = None) -> Tensor:
        source = distribution.mean.device if generator is None else generator.device
        rows = distribution.mean.flatten(0, 1).to(source)  # (B * H, A)
        drawn = torch.multinomial(rows, count, replacement=True, generator=generator).to(distribution.mean.device)
        return (
            F.one_hot(drawn, self.width).to(distribution.mean).unflatten(0, distribution.mean.shape[:2]).transpose(1, 2)
        )

    def refit(
        self, distribution: ActionDistribution, elites: Tensor, mean_momentum: float, std_momentum: float
    ) -> ActionDistribution:
        return ActionDistribution(torch.lerp(elites.mean(dim=1), distribution.mean, mean_momentum), distribution.std)

    def choose(self, distribution: ActionDistribution) -> Tensor:
        return F.one_hot(distribution.mean.argmax(dim=-1), self.width).to(distribution.mean)


class CrossEntropyPlanner:
    """Finds the actions that lead to a goal. The defaults are those of the paper of V-JEPA 2-AC; the published code
    plans for a robot arm with :class:`~blueberry_video.inference.droid.DroidActions`.

    Args:
        actions: action space, of the ``action_dim`` of the world model.
        samples: N, sequences sampled per iteration.
        elites: number of samples of lowest energy to which the distribution is fitted.
        iterations: number of iterations.
        horizon: H, actions per sequence.
        mean_momentum, std_momentum: shares of the old mean and standard deviation that are kept, in [0, 1]; the
            probabilities of discrete actions are a mean.
        displacement: change of the state by each action: A rows of K numbers, from which the states of later steps are
            computed. Required for a horizon above 1, unless ``actions`` compute states.
        batch_size: maximum number of sequences per forward pass of the model.

    Raises:
        ValueError: a value is out of range, or ``displacement`` is missing.
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
            raise ValueError(f"planner.elites={elites} must be at most planner.samples={samples}.")
        for key, momentum in (("mean_momentum", mean_momentum), ("std_momentum", std_momentum)):
            if not 0 <= momentum <= 1:
                raise ValueError(f"planner.{key}={momentum}, the share of the old distribution, must be in [0, 1].")
        if displacement is not None and actions.moves_states:
            raise ValueError(
                f"planner.displacement contradicts planner.actions={type(actions).__name__}, which computes the "
                "states: leave planner.displacement null."
            )
        if displacement is None and horizon > 1 and not actions.moves_states:
            raise ValueError(
                f"planner.horizon={horizon} requires planner.displacement, the change of the state by each action, as "
                "the model is conditioned on the state of each step: set it, or use planner.horizon=1."
            )
        if displacement is not None and len(displacement) != actions.width:
            raise ValueError(
                f"planner.displacement has {len(displacement)} rows for actions of width {actions.width}: set one row "
                "per action channel, the change of the state by it."
            )
        self.actions, self.samples, self.elites, self.iterations = actions, samples, elites, iterations
        self.horizon, self.mean_momentum, self.std_momentum = horizon, mean_momentum, std_momentum
        self.displacement, self.batch_size = displacement, batch_size

    @torch.no_grad()
    def plan(
        self,
        model: WorldModel,
        images: Tensor,
        states: Tensor,
        goals: Tensor,
        generator: torch.Generator | None = None,
        extrinsics: Tensor | None = None,
    ) -> Tensor:
        """Plans the actions that lead from the images to the goals.

        Args:
            model: in evaluation mode.
            images: (B, C, H, W), normalized as the encoder requires, on the device of the model.
            states: (B, K) at the images.
            goals: (B, C, H, W), normalized likewise.
            generator: random generator on any device; defaults to that of the device of the model.
            extrinsics: pose of the camera (B, A - 1), which does not move while the actions are executed, or
                (B, H, A - 1) at each of them; required by models with ``use_extrinsics``.

        Returns:
            (B, H, A), of which the first action is to be executed.

        Raises:
            ValueError: the actions do not have the ``action_dim`` of the model, or ``extrinsics`` are missing, not an
                input of the model, or of a different shape.
        """
        if self.actions.width != model.action_dim:
            raise ValueError(
                f"planner.actions.width={self.actions.width} must equal model.action_dim={model.action_dim}, the width "
                "of the actions that the model was trained with."
            )
        cameras = self._cameras(model, len(images), extrinsics)
        dtype = next(model.parameters()).dtype
        start, goal = model.encode_frames(torch.stack([images, goals], dim=2).to(dtype)).unbind(dim=1)
        return self.minimize(
            lambda actions: self._distance(model, start, states, goal, actions, cameras),
            len(start),
            start.device,
            generator,
        )

    @torch.no_grad()
    def minimize(
        self, energy: Energy, batch: int, device: torch.device, generator: torch.Generator | None = None
    ) -> Tensor:
        """Minimizes an energy over action sequences: (B, H, A) for ``batch`` situations."""
        distribution = self.actions.start(batch, self.horizon, device)
        for _ in range(self.iterations):
            sequences = self.actions.sample(distribution, self.samples, generator)
            best = energy(sequences).topk(self.elites, dim=1, largest=False).indices  # (B, elites)
            elites = sequences[torch.arange(batch, device=device)[:, None], best]
            distribution = self.actions.refit(distribution, elites, self.mean_momentum, self.std_momentum)
        return self.actions.choose(distribution)

    def _cameras(self, model: WorldModel, batch: int, extrinsics: Tensor | None) -> Tensor | None:
        """Poses of the camera (B, H, A - 1) at the actions of a plan, or None without ``use_extrinsics``."""
        width = self.actions.width - 1
        if (extrinsics is not None) != model.use_extrinsics:
            raise ValueError(
                f"model.use_extrinsics={str(model.use_extrinsics).lower()}, but extrinsics were "
                f"{'not passed' if extrinsics is None else 'passed'} to plan: the pose of the camera (B, {width}) is "
                "an input of models with model.use_extrinsics=true only."
            )
        if extrinsics is None:
            return None
        if tuple(extrinsics.shape) not in ((batch, width), (batch, self.horizon, width)):
            raise ValueError(
                f"extrinsics have the shape {tuple(extrinsics.shape)}, but {(batch, width)}, one pose per situation, "
                f"or {(batch, self.horizon, width)}, one per action, is required (model.action_dim="
                f"{self.actions.width} less the gripper)."
            )
        return extrinsics if extrinsics.ndim == 3 else extrinsics[:, None].expand(-1, self.horizon, -1)

    def _distance(
        self,
        model: WorldModel,
        start: Tensor,
        states: Tensor,
        goal: Tensor,
        actions: Tensor,
        cameras: Tensor | None = None,
    ) -> Tensor:
        """Mean L1 distance (B, N) of the last prediction to the goal, for each sequence of ``actions`` (B, N, H, A).

        start and goal are (B, S, D), states (B, K), cameras (B, H, A - 1).
        """
        count = actions.shape[1]
        along = self.states_along(states, actions).flatten(0, 1)  # (B * N, H, K)
        situation = torch.arange(len(start), device=start.device).repeat_interleave(count)
        distances = []
        for rows in torch.arange(len(situation), device=start.device).split(self.batch_size):
            here = situation[rows]
            chosen, states_before = actions.flatten(0, 1)[rows].to(start.dtype), along[rows].to(start.dtype)
            poses = None if cameras is None else cameras[here].to(start.dtype)
            reached = model.rollout(start[here, None], chosen, states_before, poses)[:, -1]
            distances.append((reached - goal[here]).abs().mean(dim=(1, 2)))
        return torch.cat(distances).view(-1, count)

    def states_along(self, states: Tensor, actions: Tensor) -> Tensor:
        """State before each action of a sequence: (B, K) and (B, N, H, A) -> (B, N, H, K)."""
        if self.actions.moves_states:
            steps = [states[:, None].expand(-1, actions.shape[1], -1)]
            for action in actions.unbind(dim=2)[:-1]:
                steps.append(self.actions.moved(steps[-1], action.to(states.dtype)))
            return torch.stack(steps, dim=2)
        along = states[:, None, None].expand(-1, *actions.shape[1:3], -1)
        if self.displacement is None:
            return along
        moves = actions @ actions.new_tensor(self.displacement)  # (B, N, H, K)
        return along + F.pad(moves.cumsum(dim=2), (0, 0, 1, 0))[:, :, :-1]
