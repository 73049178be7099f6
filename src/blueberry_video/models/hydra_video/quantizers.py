"""Quantizers of token vectors: finite scalar (FSQ), vector (VQ) and lookup-free (LFQ) quantization.

A quantizer maps vectors (..., dim) to the nearest of ``vocabulary`` code vectors, with straight-through gradients, and
identifies each by its id, an integer from 0 to ``vocabulary - 1``. Values are computed in at least float32.
"""

import itertools
import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from blueberry_video.nn.clustering import kmeans, nearest
from blueberry_video.nn.running_average import RunningAverages, update_averages

_MAX_TABLE_BITS = 10  # LFQ: bits of which the joint distribution over a batch is computed


class Quantized(NamedTuple):
    """Output of a quantizer."""

    values: Tensor  # (..., dim): code vectors, with the gradients of the input
    ids: Tensor  # (...): long
    loss: Tensor  # scalar: loss of the quantizer, 0 if it has none


class Quantizer(nn.Module, ABC):
    """Base class of quantizers.

    Args:
        dim: width of the vectors.
        vocabulary: number of codes.
    """

    def __init__(self, dim: int, vocabulary: int):
        super().__init__()
        self.dim, self.vocabulary = dim, vocabulary

    @abstractmethod
    def forward(self, vectors: Tensor) -> Quantized:
        """Quantizes vectors (..., dim). In training, some quantizers update their codebook."""

    @torch.no_grad()
    def nearest(self, vectors: Tensor) -> Tensor:
        """Returns the ids (...) of the code vectors nearest to vectors (..., dim); it never updates a codebook."""
        was_training = self.training
        try:
            return self.eval()(vectors).ids
        finally:
            self.train(was_training)

    @abstractmethod
    def _values(self, ids: Tensor) -> Tensor:
        """Returns the code vectors (..., dim) of ids in range."""

    def values(self, ids: Tensor) -> Tensor:
        """Returns the code vectors (..., dim) of ids (...).

        Raises:
            ValueError: if the ids are not integers, or, on the CPU, for an id that is not from 0 to vocabulary - 1.
        """
        if ids.is_floating_point() or ids.dtype == torch.bool:
            raise ValueError(f"ids are {ids.dtype}: token ids must be integers from 0 to {self.vocabulary - 1}.")
        if ids.device.type == "cpu" and ids.numel() and not (0 <= int(ids.min()) <= int(ids.max()) < self.vocabulary):
            raise ValueError(
                f"ids from {int(ids.min())} to {int(ids.max())} must be from 0 to {self.vocabulary - 1}: the quantizer "
                f"has vocabulary={self.vocabulary} codes."
            )
        return self._values(ids.long())


class FSQ(Quantizer):
    """Finite scalar quantization (Mentzer et al., arXiv 2309.15505): each channel is rounded to a number of levels.

    Channel values of a code are in [-1, 1]. There is no codebook to learn, and no loss.

    Args:
        levels: number of levels of each channel; the vocabulary is their product. [8, 8, 8, 5, 5, 5] are 64,000 codes.

    Raises:
        ValueError: for no channel, or a channel of fewer than 3 levels.
    """

    def __init__(self, levels: Sequence[int] = (8, 8, 8, 5, 5, 5)):
        if not levels or min(levels) < 3:
            raise ValueError(
                f"levels={list(levels)} must contain at least one number, each at least 3, such as 8; LFQ has 2 levels."
            )
        super().__init__(len(levels), math.prod(levels))
        self.levels = tuple(levels)

    def forward(self, vectors: Tensor) -> Quantized:
        wide, levels = _wide(vectors), vectors.new_tensor(self.levels, dtype=torch.float32)
        half = (levels - 1) * (1 + 1e-3) / 2  # the outermost levels are reached by finite values
        offset = torch.where(levels % 2 == 0, 0.5, 0.0)  # an even number of levels has none in the middle
        bounded = (wide + (offset / half).atanh()).tanh() * half - offset
        rounded = bounded + (bounded.round() - bounded).detach()
        middle = levels // 2
        digits = rounded.detach() + middle
        ids = (digits.round().long() * self._place_values(digits.device)).sum(-1)
        return Quantized((rounded / middle).to(vectors.dtype), ids, wide.new_zeros(()))

    def nearest(self, vectors: Tensor) -> Tensor:
        levels = torch.tensor(self.levels, device=vectors.device)
        digits = (_wide(vectors) * (levels // 2)).round().long() + levels // 2
        return (digits.clamp(min=0).minimum(levels - 1) * self._place_values(vectors.device)).sum(-1)

    def _values(self, ids: Tensor) -> Tensor:
        levels = torch.tensor(self.levels, device=ids.device)
        digits = ids[..., None] // self._place_values(ids.device) % levels
        return (digits - levels // 2) / (levels // 2).float()

    def _place_values(self, device: torch.device) -> Tensor:
        """Place values of the digits of an id, the first channel lowest."""
        return torch.tensor([1, *itertools.accumulate(self.levels[:-1], lambda a, b: a * b)], device=device)


class VQ(RunningAverages, Quantizer):
    """Vector quantization with a codebook of running averages (van den Oord et al., arXiv 1711.00937, appendix A).

    In training, every code becomes the running average of the vectors that are assigned to it, over all processes. The
    first batch initializes the codebook, by k-means. Codes that are hardly used are replaced by vectors of the batch,
    drawn in proportion to their squared distance to the nearest code.
    The loss is ``commitment`` times the squared distance of the vectors to their codes.

    Args:
        vocabulary: number of codes K.
        dim: width of a code.
        decay: of the running averages.
        commitment: weight of the commitment loss.
        restart_below: a code is replaced when its running average of assigned vectors is below this share of the mean
            over codes; 0 never replaces codes.

    Raises:
        ValueError: for ``decay`` or ``restart_below`` outside [0, 1), or a codebook of fewer than 2 codes or no width.
    """

    codebook: Tensor
    counts: Tensor
    sums: Tensor
    initialized: Tensor

    def __init__(
        self,
        vocabulary: int = 2048,
        dim: int = 256,
        decay: float = 0.99,
        commitment: float = 0.25,
        restart_below: float = 0.03,
    ):
        if vocabulary < 2 or dim < 1:
            raise ValueError(f"vocabulary={vocabulary} and dim={dim} must be at least 2 and 1.")
        if not (0 <= decay < 1 and 0 <= restart_below < 1):
            raise ValueError(
                f"decay={decay} and restart_below={restart_below} must be in [0, 1), such as 0.99 and 0.03."
            )
        super().__init__(dim, vocabulary)
        self.decay, self.commitment, self.restart_below = decay, commitment, restart_below
        self.register_buffer("codebook", torch.randn(vocabulary, dim) / math.sqrt(dim))
        self.register_buffer("counts", torch.zeros(vocabulary))  # vectors of a batch per code, running average
        self.register_buffer("sums", torch.zeros(vocabulary, dim))  # of the vectors, running average
        self.register_buffer("initialized", torch.tensor(False))

    def averages(self) -> dict[str, Tensor]:
        return {"codebook": self.codebook, "counts": self.counts, "sums": self.sums}

    def forward(self, vectors: Tensor) -> Quantized:
        flat = _wide(vectors).flatten(0, -2)
        if self.training:
            self._update(flat.detach())
        codebook = self.codebook.to(flat.dtype)
        ids = nearest(flat, codebook)
        codes = codebook[ids]
        loss = self.commitment * F.mse_loss(flat, codes)
        values = flat + (codes - flat).detach()
        return Quantized(values.view(vectors.shape).to(vectors.dtype), ids.view(vectors.shape[:-1]), loss)

    def _values(self, ids: Tensor) -> Tensor:
        return self.codebook[ids]

    def _update(self, vectors: Tensor) -> None:
        """Updates the codebook with vectors (N, dim) of this process and those of all others."""
        with self.wide_averages() as averages:
            codebook, counts, sums = averages["codebook"], averages["counts"], averages["sums"]
            vectors = vectors.to(codebook.dtype)
            if not self.initialized:
                everywhere = _gather(vectors)
                codebook.copy_(kmeans(everywhere, _draw(everywhere.unique(dim=0), self.vocabulary)))
                found = torch.bincount(nearest(everywhere, codebook), minlength=self.vocabulary).to(counts.dtype)
                counts.copy_(found)
                sums.copy_(codebook * counts[:, None])
                self.initialized.fill_(True)
            ids = nearest(vectors, codebook)
            found = torch.bincount(ids, minlength=self.vocabulary).to(counts.dtype)
            total = torch.zeros_like(sums).index_add_(0, ids, vectors)
            for value in (found, total):
                if dist.is_available() and dist.is_initialized():
                    dist.all_reduce(value)
            update_averages([counts, sums], [found, total], 1 - self.decay)
            used = counts > 0
            codebook[used] = sums[used] / counts[used, None]
            self._restart(codebook, counts, sums, vectors)

    def _restart(self, codebook: Tensor, counts: Tensor, sums: Tensor, vectors: Tensor) -> None:
        dead = (counts < self.restart_below * counts.mean()).nonzero()[:, 0]
        if not len(dead):
            return
        # in proportion to the squared distance, as in k-means++: drawn uniformly, most would be of the most frequent
        # content, which would then have many equal codes
        errors = (vectors - codebook[nearest(vectors, codebook)]).square().sum(1).nan_to_num(0, 0, 0)
        count = min(len(dead), int((errors > 0).sum()))
        candidates = _gather(vectors[errors.multinomial(count)] if count else vectors[:0])
        dead = dead[: len(candidates)]
        if not len(dead):
            return
        drawn = _draw(candidates, len(dead))
        codebook[dead] = drawn
        counts[dead] = counts.mean()
        sums[dead] = drawn * counts[dead, None]


class LFQ(Quantizer):
    """Lookup-free quantization (Yu et al., arXiv 2310.05737): the sign of each channel is one bit of the id.

    Channel values of a code are -1 or 1. The loss is ``commitment`` times the squared distance to the code plus
    ``entropy`` times the difference of two entropies in nats: of the code of a vector, which becomes certain, and of
    the codes of a batch, which become uniform. The probabilities of the codes are softmax(-distance² ·
    ``inverse_temperature``).
    Above 10 bits, the entropy over the batch is the sum of those of groups of bits, an upper bound.

    Args:
        bits: channels; the vocabulary has 2^bits codes.
        commitment, entropy: weights of the losses.
        inverse_temperature: of the probabilities of the codes.

    Raises:
        ValueError: unless ``bits`` is from 1 to 24.
    """

    def __init__(
        self, bits: int = 10, commitment: float = 0.25, entropy: float = 0.1, inverse_temperature: float = 10.0
    ):
        if not 1 <= bits <= 24:
            raise ValueError(f"bits={bits} must be from 1 to 24: the vocabulary has 2^bits codes.")
        super().__init__(bits, 2**bits)
        self.commitment, self.entropy, self.inverse_temperature = commitment, entropy, inverse_temperature

    def forward(self, vectors: Tensor) -> Quantized:
        wide = _wide(vectors)
        codes = torch.where(wide > 0, 1.0, -1.0).to(wide.dtype)
        ids = ((codes > 0) * self._powers(codes.device)).sum(-1)
        loss = self.commitment * F.mse_loss(wide, codes)
        if self.training and self.entropy:
            certain, uniform = self._entropies(wide.flatten(0, -2))
            loss = loss + self.entropy * (certain - uniform)
        return Quantized((wide + (codes - wide).detach()).to(vectors.dtype), ids, loss)

    def _entropies(self, vectors: Tensor) -> tuple[Tensor, Tensor]:
        """Returns the mean entropy of the code of a vector, and that of the codes of all vectors, of this process."""
        # |v - c|² of the two values of a channel differ by 4 v, and channels are independent
        one = torch.sigmoid(4 * self.inverse_temperature * vectors)  # (N, bits)
        pairs = torch.stack([1 - one, one], dim=-1)
        certain = -torch.xlogy(pairs, pairs).sum(dim=(1, 2)).mean()
        uniform = vectors.new_zeros(())
        for group in pairs.split(_MAX_TABLE_BITS, dim=1):
            joint = group[:, 0]
            for bit in group.unbind(1)[1:]:
                joint = (joint[:, :, None] * bit[:, None]).flatten(1)
            mean = joint.mean(dim=0)
            uniform = uniform - torch.xlogy(mean, mean).sum()
        return certain, uniform

    def _values(self, ids: Tensor) -> Tensor:
        return ((ids[..., None] // self._powers(ids.device)) % 2 * 2 - 1).float()

    def _powers(self, device: torch.device) -> Tensor:
        return 2 ** torch.arange(self.dim - 1, -1, -1, device=device)  # the first channel is the highest bit


def _wide(vectors: Tensor) -> Tensor:
    return vectors.to(torch.promote_types(vectors.dtype, torch.float32))


def _gather(vectors: Tensor) -> Tensor:
    """Concatenates vectors (N, dim) of all processes; N may differ. Every process gets the same result."""
    if not (dist.is_available() and dist.is_initialized()):
        return vectors
    sizes: list = [None] * dist.get_world_size()
    dist.all_gather_object(sizes, len(vectors))
    parts = [vectors.new_empty(max(sizes), vectors.shape[1]) for _ in sizes]
    dist.all_gather(parts, F.pad(vectors, (0, 0, 0, max(sizes) - len(vectors))))
    return torch.cat([part[:size] for part, size in zip(parts, sizes, strict=True)])


def _draw(vectors: Tensor, count: int) -> Tensor:
    """Draws vectors, without repetition where there are enough; the draw of the first process is that of all."""
    rows = torch.cat([torch.randperm(len(vectors)) for _ in range(-(-count // len(vectors)))])[:count]
    rows = rows.to(vectors.device)
    if dist.is_available() and dist.is_initialized():
        dist.broadcast(rows, 0)
    return vectors[rows]
