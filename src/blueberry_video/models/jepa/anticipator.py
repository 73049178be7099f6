"""Action anticipation with V-JEPA 2 (arXiv 2506.09985; github.com/facebookresearch/vjepa2,
evals/action_anticipation_frozen): classification of a future action.

Unusual about it: the encoder receives only past frames. The predictor predicts the tokens of a later time, at a
distance that may differ between clips, and a head with one query per label attends to both.
"""

from contextlib import nullcontext
from pathlib import Path

import torch
from torch import Tensor, nn

from blueberry_video.models.encoder import Encoder
from blueberry_video.models.jepa.convert import read_published
from blueberry_video.models.jepa.predictor import Predictor
from blueberry_video.nn.heads import AttentivePool
from blueberry_video.weights.load import load_strictly, mismatches


class Anticipator(nn.Module):
    """Classifier of future actions: video (B, C, T, H, W), normalized as the encoder requires -> logits
    {label: (B, classes)}.

    Args:
        encoder: accepts clips of any length, with rotary positions as in V-JEPA 2.
        num_classes: number of classes of each label, such as ``{verb: 97, noun: 300, action: 3806}``.
        predictor_dim, predictor_depth, predictor_num_heads, predictor_mlp_ratio, num_mask_tokens, rope_quirk: see
            :class:`~blueberry_video.models.jepa.JEPA`, which has compatible weights.
        mask_index: index of the mask token; 1 for the published weights.
        length: number of tubelets to predict.
        num_steps: number of predictions; each further one is made from the tokens of the last, appended to those of the
            past without its first ``length`` tubelets, and the head receives all.
        sees: input of the head: tokens of the ``"past"``, of the ``"future"``, or ``"both"``.
        num_heads, pool_depth, pool_eps, published_pool: see :class:`AnticipationHead`.
        freeze: train only the head; encoder and predictor then stay in evaluation mode.

    Attributes:
        num_classes: number of classes by label.
        predictor: ``None`` with ``sees="past"``.

    Raises:
        ValueError: ``sees`` is unknown, ``length`` is below 1, or ``mask_index`` is out of range.
    """

    def __init__(
        self,
        encoder: Encoder,
        num_classes: dict[str, int],
        predictor_dim: int = 384,
        predictor_depth: int = 12,
        predictor_num_heads: int = 12,
        predictor_mlp_ratio: float = 4.0,
        num_mask_tokens: int = 10,
        rope_quirk: bool = False,
        mask_index: int = 1,
        length: int = 1,
        sees: str = "both",
        num_heads: int = 16,
        pool_depth: int = 4,
        freeze: bool = True,
        pool_eps: float = 1e-5,
        published_pool: bool = True,
        num_steps: int = 1,
    ):
        super().__init__()
        if num_steps < 1 or (num_steps > 1 and sees == "past"):
            raise ValueError(f"num_steps={num_steps} must be at least 1, and 1 with sees='past'.")
        if sees not in ("past", "future", "both"):
            raise ValueError(f"sees={sees!r} is unknown: choose 'past', 'future' or 'both'.")
        if length < 1 or not 0 <= mask_index < num_mask_tokens:
            raise ValueError(
                f"length={length} must be at least 1, and mask_index={mask_index} in [0, num_mask_tokens="
                f"{num_mask_tokens})."
            )
        self.encoder, self.num_classes, self.freeze = encoder, dict(num_classes), freeze
        self.mask_index, self.length, self.sees, self.num_steps = mask_index, length, sees, num_steps
        self.predictor: Predictor | None = None
        if sees != "past":
            sizes = (predictor_dim, predictor_depth, predictor_num_heads, predictor_mlp_ratio, num_mask_tokens)
            grid = encoder.grid(encoder.video_size)
            self.predictor = Predictor(encoder.embed_dim, grid, *sizes, rope_quirk=rope_quirk)
        of_pool = (num_heads, pool_depth, pool_eps, published_pool)
        self.head = AnticipationHead(encoder.embed_dim, num_classes, *of_pool)
        if freeze:
            for part in self._frozen():
                part.requires_grad_(False)

    def train(self, mode: bool = True) -> "Anticipator":
        super().train(mode)
        for part in self._frozen():
            part.eval()
        return self

    def forward(self, video: Tensor, skip: int | Tensor = 0) -> dict[str, Tensor]:
        """Predicts logits at ``skip`` tubelets after the video; ``skip`` is one number, or one per clip (B,)."""
        with torch.no_grad() if self.freeze else nullcontext():
            tokens = self.encoder(video)
            if self.predictor is not None:
                grid, past = self.encoder.grid(video.shape), tokens
                found = [] if self.sees == "future" else [tokens]
                for _ in range(self.num_steps):
                    found.append(self.predictor.ahead(past, grid, skip, self.length, self.mask_index))
                    past = torch.cat([past[:, found[-1].shape[1] :], found[-1]], dim=1)
                tokens = torch.cat(found, dim=1)
        return self.head(tokens)

    def _frozen(self) -> list[nn.Module]:
        return [part for part in (self.encoder, self.predictor) if part is not None and self.freeze]

    def load_published(self, weights: str | Path, which: str) -> str:
        """Loads encoder and predictor strictly, and the head if the source has one of the same shape.

        The projection of visible tokens is ignored, and with ``sees="past"`` the whole predictor.

        Args:
            weights: weights of a :class:`~blueberry_video.models.jepa.JEPA`, published or of a run, or of a run of this
                model.
            which: encoder of the source to load: ``"encoder"`` or ``"target_encoder"``.

        Returns:
            A sentence on what was loaded, and on a head that was ignored.

        Raises:
            FileNotFoundError: a file is missing.
            ValueError: tensors of encoder or predictor are missing, unexpected or of a different shape.
        """
        unused = ("target_encoder.", "predictor." if self.predictor is None else "predictor.proj_context.")
        tensors = {n: v for n, v in read_published(weights, which).state.items() if not n.startswith(unused)}
        own = {name: value for name, value in self.state_dict().items() if name.startswith("head.")}
        loaded = {name: value for name, value in tensors.items() if name.startswith("head.")}
        report = "the head is loaded"
        if mismatches(own, loaded):
            report = "the head is not loaded" + (": num_classes or pool_depth differ" if loaded else "")
            tensors = {name: value for name, value in tensors.items() if name not in loaded}
        fix = "Give the model the sizes of encoder and predictor (embed_dim, depth, num_mask_tokens, …) of the weights."
        load_strictly(self, own | tensors, weights, fix)
        return f"loaded {len(tensors)} tensors from {weights}, with its {which!r}; {report}"


class AnticipationHead(nn.Module):
    """Classification head for several labels, such as verb, noun and action: (B, N, D) -> {label: (B, classes)}.

    The probe of V-JEPA 2 on EPIC-KITCHENS-100: each label has a query in one attentive pooling, and a linear layer.

    Args:
        dim: width of the tokens.
        num_classes: number of classes of each label.
        num_heads, depth: see :class:`~blueberry_video.nn.heads.AttentivePool`.
        pool_eps, published_pool: its ``norm_eps`` and ``published``.

    Raises:
        ValueError: ``num_classes`` is empty, or ``num_heads`` does not divide ``dim``.
    """

    def __init__(
        self,
        dim: int,
        num_classes: dict[str, int],
        num_heads: int = 16,
        depth: int = 4,
        pool_eps: float = 1e-5,
        published_pool: bool = True,
    ):
        super().__init__()
        if not num_classes:
            raise ValueError("num_classes is empty: give at least one label with its classes, such as {verb: 97}.")
        queries = len(num_classes)
        self.pool = AttentivePool(dim, num_heads, 4.0, pool_eps, depth, queries, published=published_pool)
        self.linear = nn.ModuleDict({name: nn.Linear(dim, count) for name, count in num_classes.items()})

    def forward(self, tokens: Tensor) -> dict[str, Tensor]:
        pooled = self.pool.pool_queries(tokens)  # (B, labels, D)
        return {name: linear(pooled[:, i]) for i, (name, linear) in enumerate(self.linear.items())}
