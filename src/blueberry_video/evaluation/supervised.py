"""Supervised training of small heads: probes of a frozen encoder and fine-tuning on few labels.

Clips are held in memory. Each training uses its own generator and leaves the given encoder unchanged, so a run is
bit-identical with and without it.
"""

import copy
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import Dataset

from blueberry_video.evaluation.metrics import accuracy, shuffle_frames, within_pair_correct
from blueberry_video.models.encoder import Encoder
from blueberry_video.nn.heads import ClassificationHead

Normalize = Callable[[Tensor], Tensor]
Pairs = dict[str, tuple[tuple[int, int], ...]]


@dataclass
class LabelledClips:
    """Clips in memory: ``video`` uint8 (N, T, C, H, W), ``labels`` name -> long (N,)."""

    video: Tensor
    labels: dict[str, Tensor]

    @classmethod
    def of(cls, dataset: Dataset, count: int, names: tuple[str, ...]) -> "LabelledClips":
        """Returns the first ``count`` clips of a dataset, with the labels ``names``.

        Raises:
            ValueError: if the dataset has fewer clips, or its clips lack a label.
        """
        size = len(dataset)  # type: ignore[arg-type]
        if size < count:
            raise ValueError(f"count={count} labeled clips exceed the {size} clips of the dataset: use at most {size}.")
        clips = [dataset[i] for i in range(count)]
        missing = [name for name in names if name not in clips[0].get("labels", {})]
        if missing:
            known = ", ".join(clips[0].get("labels", {})) or "none"
            raise ValueError(f"label={missing[0]!r} is not a label of the clips: use one of theirs ({known}).")
        labels = {name: torch.tensor([clip["labels"][name] for clip in clips]) for name in names}
        return cls(torch.stack([clip["video"] for clip in clips]), labels)

    def shuffled(self, seed: int) -> "LabelledClips":
        """Returns the clips with the frames of each in a random order."""
        generator = torch.Generator().manual_seed(seed)
        return LabelledClips(shuffle_frames(self.video.transpose(1, 2), generator).transpose(1, 2), self.labels)


@dataclass
class Recipe:
    """Training settings: AdamW with warm-up over the first tenth of the steps, then cosine decay to 0.

    Args:
        steps, batch_size: number of steps and clips per step.
        lr, weight_decay: settings of AdamW.
        seed: seed of the initial weights and the sample order.
    """

    steps: int
    batch_size: int = 64
    lr: float = 1e-3
    weight_decay: float = 0.05
    seed: int = 0


@torch.no_grad()
def encode(encoder: Encoder, video: Tensor, normalize: Normalize, batch_size: int = 64) -> Tensor:
    """Encodes clips uint8 (N, T, C, H, W) to tokens (N, tokens, D) on the CPU, without augmentation."""
    like = next(encoder.parameters())
    encoder.eval()
    return torch.cat([encoder(_inputs(part, normalize, like)).float().cpu() for part in video.split(batch_size)])


def fit_probe(
    tokens: Tensor, labels: dict[str, Tensor], num_classes: dict[str, int], pooling: str, recipe: Recipe
) -> ClassificationHead:
    """Trains a :class:`ClassificationHead` with ``pooling`` on the tokens (N, tokens, D) of a frozen encoder."""
    with torch.random.fork_rng():
        torch.manual_seed(recipe.seed)
        # not the published probe: the scores of the experiments were measured with these settings
        head = ClassificationHead(tokens.shape[-1], num_classes, pooling, pool_eps=1e-6, published_pool=False)
        _fit(head, lambda index: tokens[index], labels, recipe)
        return head


def fine_tune(
    encoder: Encoder, clips: LabelledClips, num_classes: dict[str, int], normalize: Normalize, recipe: Recipe
) -> tuple[Encoder, ClassificationHead]:
    """Trains a copy of the encoder and a mean-pooling head end to end, in float32 whatever the dtype of the encoder;
    returns the copy and the head (on the CPU)."""
    like = next(encoder.parameters()).float()
    with torch.random.fork_rng():
        torch.manual_seed(recipe.seed)
        head = ClassificationHead(encoder.embed_dim, num_classes).to(like.device)
        tuned = copy.deepcopy(encoder).float()
        model = nn.Sequential(tuned, head)
        _fit(model, lambda index: _inputs(clips.video[index], normalize, like), clips.labels, recipe)
        return tuned, head.cpu()


def _fit(model: nn.Module, inputs: Callable[[Tensor], Tensor], labels: dict[str, Tensor], recipe: Recipe) -> None:
    """Trains ``model`` in-place on ``inputs(indices)``, cross-entropy averaged over labels; leaves it in eval mode."""
    size = len(next(iter(labels.values())))
    device = next(model.parameters()).device
    generator = torch.Generator().manual_seed(recipe.seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=recipe.lr, weight_decay=recipe.weight_decay)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, max_lr=recipe.lr, total_steps=recipe.steps, pct_start=0.1, cycle_momentum=False
    )
    model.train()
    order = torch.empty(0, dtype=torch.long)
    with torch.enable_grad():
        for _ in range(recipe.steps):
            while len(order) < recipe.batch_size:  # batches span epochs, so every clip is used equally often
                order = torch.cat([order, torch.randperm(size, generator=generator)])
            index, order = order[: recipe.batch_size], order[recipe.batch_size :]
            logits = model(inputs(index))
            losses = [F.cross_entropy(logits[name].float(), labels[name][index].to(device)) for name in labels]
            optimizer.zero_grad()
            torch.stack(losses).mean().backward()
            optimizer.step()
            schedule.step()
    model.eval()


@torch.no_grad()
def score(
    predict: Callable[[Tensor], dict[str, Tensor]], inputs: Tensor, labels: dict[str, Tensor], pairs: Pairs
) -> dict[str, float]:
    """Returns label -> accuracy and, for labels with reversal pairs, ``<label>_within_pairs``.

    Args:
        predict: maps a batch of ``inputs`` to logits by label.
        inputs: (N, …), processed in batches of 64.
        labels: label -> true classes (N,).
        pairs: label -> reversal pairs.
    """
    parts = [predict(part) for part in inputs.split(64)]
    values = {}
    for name, truth in labels.items():
        logits = torch.cat([part[name].cpu() for part in parts])
        values[name] = accuracy(logits, truth).item()
        correct = within_pair_correct(logits, truth, pairs.get(name, ()))
        if len(correct):
            values[f"{name}_within_pairs"] = correct.float().mean().item()
    return values


def _inputs(video: Tensor, normalize: Normalize, like: Tensor) -> Tensor:
    """Converts clips uint8 (N, T, C, H, W) to the input (N, C, T, H, W) of an encoder, on the device and in the dtype
    of ``like``."""
    return normalize(video.to(like.device).transpose(1, 2).float().div(255)).to(like.dtype)
