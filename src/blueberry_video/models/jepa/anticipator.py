"""Action anticipation with V-JEPA 2 (arXiv 2506.09985; github.com/facebookresearch/vjepa2, evals/action_anticipation_
frozen): what will be done, told from what has been seen and from what the predictor expects to come.

Unusual about it: the encoder sees only the past. The predictor is asked for the tokens of a moment some time after it,
whose distance may differ from clip to clip, and a head with a query a label looks at both.
"""

from contextlib import nullcontext

import torch
from torch import Tensor, nn

from blueberry_video.models.encoder import Encoder
from blueberry_video.models.jepa.predictor import Predictor
from blueberry_video.nn.heads import AttentivePool
from blueberry_video.weights.load import load_strictly


class Anticipator(nn.Module):
    """Video float (B, C, T, H, W), normalised as the encoder wants it -> logits {label: (B, classes)} of what comes.

    Args:
        encoder: of any length of video: one with rotary positions, as V-JEPA 2's.
        num_classes: number of classes of each label, such as ``{verb: 97, noun: 300, action: 3806}``.
        predictor_dim, predictor_depth, predictor_num_heads, predictor_mlp_ratio, num_mask_tokens, rope_quirk: see
            :class:`~blueberry_video.models.jepa.JEPA`, whose weights fit.
        mask_index: which mask token the predictor uses; the published weights take 1.
        length: tubelets that are predicted.
        sees: what the head looks at: the tokens of the ``"past"``, those of the ``"future"``, or ``"both"``.
        num_heads, pool_depth: of the :class:`~blueberry_video.models.jepa.anticipator.AnticipationHead`.
        freeze: train the head alone; encoder and predictor then stay in evaluation mode.

    Attributes:
        num_classes: label -> number of its classes.
        predictor: ``None`` where the head sees the past alone.

    Raises:
        ValueError: for an unknown ``sees``, a length below 1, or a mask token that is not there.
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
    ):
        super().__init__()
        if sees not in ("past", "future", "both"):
            raise ValueError(f"sees={sees!r} is unknown: choose 'past', 'future' or 'both'.")
        if length < 1 or not 0 <= mask_index < num_mask_tokens:
            raise ValueError(
                f"length={length} must be 1 or more, and mask_index={mask_index} below num_mask_tokens="
                f"{num_mask_tokens}."
            )
        self.encoder, self.num_classes, self.freeze = encoder, dict(num_classes), freeze
        self.mask_index, self.length, self.sees = mask_index, length, sees
        self.predictor: Predictor | None = None
        if sees != "past":
            self.predictor = Predictor(
                encoder.embed_dim,
                encoder.grid(encoder.video_size),
                dim=predictor_dim,
                depth=predictor_depth,
                num_heads=predictor_num_heads,
                mlp_ratio=predictor_mlp_ratio,
                num_mask_tokens=num_mask_tokens,
                rope_quirk=rope_quirk,
            )
        self.head = AnticipationHead(encoder.embed_dim, num_classes, num_heads, pool_depth)
        if freeze:
            for part in self._frozen():
                part.requires_grad_(False)

    def train(self, mode: bool = True) -> "Anticipator":
        super().train(mode)
        for part in self._frozen():
            part.eval()
        return self

    def forward(self, video: Tensor, skip: int | Tensor = 0) -> dict[str, Tensor]:
        """Scores what comes ``skip`` tubelets after the video: the same for all, or one for each (B,)."""
        with torch.no_grad() if self.freeze else nullcontext():
            tokens = self._tokens(video, skip)
        return self.head(tokens)

    def _tokens(self, video: Tensor, skip: int | Tensor) -> Tensor:
        """(B, N, D): the past's, behind them the future's."""
        past = self.encoder(video)
        if self.predictor is None:
            return past
        future = self.predictor.ahead(past, self.encoder.grid(video.shape), skip, self.length, self.mask_index)
        return future if self.sees == "future" else torch.cat([past, future], dim=1)

    def _frozen(self) -> list[nn.Module]:
        return [part for part in (self.encoder, self.predictor) if part is not None and self.freeze]


def load_weights(model: Anticipator, weights: dict[str, Tensor]) -> str:
    """Puts encoder and predictor into a model, strictly, and the head where it is there, too, and fits.

    Args:
        model: the model to fill; without a predictor of its own it leaves out that of the weights, and always the
            predictor's projection of visible tokens.
        weights: ``encoder.…``, ``predictor.…`` and perhaps ``head.…``.

    Returns:
        One sentence on what was loaded, and on a head that was left out.

    Raises:
        ValueError: if weights of encoder or predictor are missing, left over, or of other shapes.
    """
    own = model.state_dict()
    unused = "predictor." if model.predictor is None else "predictor.proj_context."
    weights = {name: value for name, value in weights.items() if not name.startswith(unused)}
    theirs, ours = ({n: value.shape for n, value in state.items() if n.startswith("head.")} for state in (weights, own))
    head = "is theirs" if theirs == ours else "starts anew"
    if theirs and theirs != ours:
        weights = {name: value for name, value in weights.items() if name not in theirs}
        head += ": theirs was left out, since it has not this model's num_classes and pool_depth"
    kept = {name: value for name, value in own.items() if theirs != ours and name in ours}
    fix = "Give model the sizes of encoder and predictor (embed_dim, depth, num_mask_tokens, …) of the file."
    load_strictly(model, kept | weights, "the file", fix)
    return f"loaded {len(weights)} tensors; the head {head}"


class AnticipationHead(nn.Module):
    """Scores what comes next, such as verb, noun and action: the probe of V-JEPA 2 on EPIC-KITCHENS-100 (arXiv
    2506.09985). (B, N, D) -> {label: (B, classes)}.

    Each label has a query of its own in one attentive pooling, and one linear layer. The tokens are those of the
    encoder on what has been seen and, behind them, what the predictor expects of the future.

    Args:
        dim: width of the tokens.
        num_classes: number of classes of each label, such as ``{"verb": 97, "noun": 300, "action": 3806}``.
        num_heads, depth: of the :class:`AttentivePool`.

    Raises:
        ValueError: if there is no label, or ``num_heads`` does not divide ``dim``.
    """

    def __init__(self, dim: int, num_classes: dict[str, int], num_heads: int = 16, depth: int = 4):
        super().__init__()
        if not num_classes:
            raise ValueError("num_classes is empty: name at least one label with its number of classes: {verb: 97}.")
        self.pool = AttentivePool(dim, num_heads, depth=depth, num_queries=len(num_classes))
        self.linear = nn.ModuleDict({name: nn.Linear(dim, count) for name, count in num_classes.items()})

    def forward(self, tokens: Tensor) -> dict[str, Tensor]:
        answers = self.pool.ask(tokens)  # (B, labels, D)
        return {name: linear(answers[:, i]) for i, (name, linear) in enumerate(self.linear.items())}
