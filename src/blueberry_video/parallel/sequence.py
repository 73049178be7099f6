"""Sequence parallelism: the processes of a group share the tokens of each clip, and so its activations.

All processes of a group receive the same batch and compute the same loss. A model that supports it splits the tokens
after its input, and gathers its output; in between each process has its own part. A process needs tokens of another one
in three places:

- in attention, all tokens: an all-to-all exchanges the split over tokens for a split over heads (Ulysses,
  arXiv 2309.14509), see :class:`TokenShards`;
- in convolutions over frames, the last frames of the preceding process, see :meth:`SequenceGroup.preceding`;
- in scans, the state after the preceding frames, see :mod:`.scan`.

Gradients are those of the mean of the losses of all processes. Every collective is the adjoint of its backward pass, so
averaging the gradients of the parameters over all processes, as DDP and FSDP do, equals training in one process.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from einops import rearrange
from torch import Tensor

KEY = "trainer.strategy.sequence_parallel"

_active: "SequenceGroup | None" = None


class SequenceGroup:
    """Processes that share the tokens of each clip.

    Args:
        group: process group; its ranks have consecutive parts of the tokens.

    Attributes:
        rank: index of this process in the group.
        size: number of processes.
    """

    def __init__(self, group: dist.ProcessGroup):
        self.group, self.rank, self.size = group, dist.get_rank(group), dist.get_world_size(group)

    def part(self, number: int, name: str, fix: str) -> int:
        """Returns ``number / size``, the items of each process.

        Args:
            number: number of items to divide.
            name: what the items are, for the error.
            fix: setting that changes the number.

        Raises:
            ValueError: if the size does not divide ``number``.
        """
        if number % self.size:
            divisors = [str(size) for size in range(1, self.size + 1) if number % size == 0]
            raise ValueError(
                f"{KEY}={self.size} must divide {name}={number}, which it splits over {self.size} processes: use "
                f"{KEY}={' or '.join(divisors)}, or change {fix}."
            )
        return number // self.size

    def own(self, tensor: Tensor, dim: int = 1) -> Tensor:
        """Returns the part of this process of a tensor that all processes have, as a copy: a view would keep the whole
        tensor in memory. The size of ``dim`` is a multiple of :attr:`size`."""
        length = tensor.shape[dim] // self.size
        return tensor.narrow(dim, self.rank * length, length).clone()

    def gather(self, tensor: Tensor, dim: int = 1) -> Tensor:
        """Concatenates the tensors of all processes along ``dim``; the inverse of :meth:`own`."""
        return torch.cat(self.gather_parts(tensor).unbind(0), dim)

    def gather_parts(self, tensor: Tensor) -> Tensor:
        """Stacks the tensors of all processes: (…) -> (size, …)."""
        return _AllGather.apply(tensor, self)

    def exchange(self, parts: Tensor) -> Tensor:
        """Sends part i of (size, …) to process i; part i of the result is that of process i for this one."""
        counts = [1] * self.size
        return _AllToAll.apply(parts, self.group, counts, counts)

    def preceding(self, tensor: Tensor, count: int) -> Tensor:
        """Returns the ``count`` items before the first of this process along dimension 1, zeros before the first of
        all: (B, n, …) -> (B, count, …). All processes have n items."""
        return self._neighbors(tensor, -count, 0)

    def following(self, tensor: Tensor, count: int) -> Tensor:
        """Returns the ``count`` items after the last of this process along dimension 1, zeros after the last of all:
        (B, n, …) -> (B, count, …). All processes have n items."""
        return self._neighbors(tensor, tensor.shape[1], tensor.shape[1] + count)

    def _neighbors(self, tensor: Tensor, start: int, end: int) -> Tensor:
        """Items ``start`` to ``end`` along dimension 1, counted from the first of this process."""
        length, first, total = tensor.shape[1], self.rank * tensor.shape[1], self.size * tensor.shape[1]

        def common(receiver: int, sender: int) -> range:
            """Items of ``sender`` that ``receiver`` needs."""
            return range(
                max(receiver * length + start, sender * length), min(receiver * length + end, (sender + 1) * length)
            )

        sent = [common(rank, self.rank) for rank in range(self.size)]
        received = [len(common(self.rank, rank)) for rank in range(self.size)]
        slices = [tensor[:, items.start - first : items.start - first + len(items)] for items in sent if len(items)]
        outgoing = torch.cat([tensor[:, :0], *slices], dim=1).transpose(0, 1)
        items = _AllToAll.apply(outgoing, self.group, received, [len(items) for items in sent]).transpose(0, 1)
        before = min(max(-(first + start), 0), end - start)
        after = min(max(first + end - total, 0), end - start)
        zeros = [tensor.new_zeros(len(tensor), count, *tensor.shape[2:]) for count in (before, after)]
        return torch.cat([zeros[0], items, zeros[1]], dim=1)


@dataclass(frozen=True)
class TokenShards:
    """Split of video tokens (B, N, …) over a group: an equal part of the tokens of each frame.

    So a process has tokens of all frames, with the modulation of each frame.

    Args:
        group: processes that share the tokens.
        frames: number t of frames of N / t consecutive tokens each; 1 splits the sequence into consecutive parts.
        tokens: number N of tokens of all processes.
        num_heads: attention heads.
        heads_key: key of ``num_heads``, for errors.
        fix: settings that change the tokens of a frame, for errors.

    Raises:
        ValueError: if the size of the group does not divide the heads or the tokens of a frame.
    """

    group: SequenceGroup
    frames: int
    tokens: int
    num_heads: int
    heads_key: str = "num_heads"
    fix: str = "the size of the videos"

    def __post_init__(self) -> None:
        self.group.part(self.num_heads, self.heads_key, self.heads_key)
        name = "tokens" if self.frames == 1 else "tokens_per_frame"
        self.group.part(self.tokens // self.frames, name, self.fix)

    def own(self, tokens: Tensor, dim: int = 1) -> Tensor:
        """Returns the tokens of this process: (B, N, …) -> (B, N / size, …)."""
        return self.group.own(tokens.unflatten(dim, (self.frames, -1)), dim + 1).flatten(dim, dim + 1)

    def gather(self, tokens: Tensor) -> Tensor:
        """Inverse of :meth:`own` along dimension 1: (B, N / size, …) -> (B, N, …)."""
        return self.group.gather(tokens.unflatten(1, (self.frames, -1)), dim=2).flatten(1, 2)

    def to_heads(self, *tensors: Tensor, text_len: int = 0) -> tuple[Tensor, ...]:
        """Exchanges tokens for heads: each (B, L + N / size, heads, d) -> (B, L + N, heads / size, d), in raster order.

        All processes have the L tokens of the text, which come first.
        """
        joined = torch.cat(tensors, dim=-1)
        own = self.group.own(joined[:, :text_len], dim=2)
        parts = rearrange(joined[:, text_len:], "b (t s) (r h) d -> r b t s h d", t=self.frames, r=self.group.size)
        video = rearrange(self.group.exchange(parts), "r b t s h d -> b (t r s) h d")
        return torch.cat([own, video], dim=1).chunk(len(tensors), dim=-1)

    def to_tokens(self, x: Tensor, text_len: int = 0) -> Tensor:
        """Inverse of :meth:`to_heads` for one tensor."""
        parts = rearrange(x[:, text_len:], "b (t r s) h d -> r b t s h d", t=self.frames, r=self.group.size)
        video = rearrange(self.group.exchange(parts), "r b t s h d -> b (t s) (r h) d")
        return torch.cat([self.group.gather(x[:, :text_len], dim=2), video], dim=1) if text_len else video


@contextmanager
def sequence_parallel(group: SequenceGroup | None) -> Iterator[None]:
    """Context manager in which models split the tokens of their input over ``group``; ``None`` has no effect.

    All processes of the group call the model with the same input, and each gets the whole output. Models that do not
    support it compute everything in every process. Call ``backward`` in all processes, with the same loss, and average
    the gradients over the group.

    Example::

        >>> import torch.distributed as dist
        >>> from blueberry_video.parallel.sequence import SequenceGroup, sequence_parallel
        >>> with sequence_parallel(SequenceGroup(dist.group.WORLD)):  # doctest: +SKIP
        ...     tokens = encoder(video)
    """
    global _active
    before, _active = _active, None if group is None or group.size == 1 else group
    try:
        yield
    finally:
        _active = before


def active_group() -> SequenceGroup | None:
    """Returns the group of :func:`sequence_parallel`; ``None`` outside of it."""
    return _active


class _AllToAll(torch.autograd.Function):
    """all_to_all_single along dimension 0, with the number of items received from and sent to each process."""

    @staticmethod
    def forward(ctx: Any, sent: Tensor, group: dist.ProcessGroup, received: list[int], counts: list[int]) -> Tensor:
        ctx.group, ctx.received, ctx.counts = group, received, counts
        return _all_to_all(sent, group, received, counts)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None, None]:
        return _all_to_all(gradients[0], ctx.group, ctx.counts, ctx.received), None, None, None


class _AllGather(torch.autograd.Function):
    """Stacks the tensors of all processes; the gradients of a tensor are summed over the processes."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor, group: SequenceGroup) -> Tensor:
        ctx.group = group
        gathered = tensor.new_empty(group.size, *tensor.shape)
        dist.all_gather(list(gathered.unbind(0)), tensor.contiguous(), group=group.group)
        return gathered

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        counts = [1] * ctx.group.size
        return _all_to_all(gradients[0], ctx.group.group, counts, counts).sum(0), None  # gloo has no reduce_scatter


def _all_to_all(sent: Tensor, group: dist.ProcessGroup, received: list[int], counts: list[int]) -> Tensor:
    output = sent.new_empty(sum(received), *sent.shape[1:])
    dist.all_to_all_single(output, sent.contiguous(), received, counts, group=group)
    return output
