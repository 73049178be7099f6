"""A classifier over any encoder: pooled tokens, one linear head a label.

With mean pooling it is the fine-tuning network of VideoMAE (encoder without a final norm, mean over tokens,
LayerNorm, linear head initialised a thousand times smaller); with attentive pooling and a frozen encoder it is the
probe of V-JEPA.
"""

from pathlib import Path

from torch import Tensor, nn

from blueberry_video.models import vit
from blueberry_video.nn.encoder import Encoder
from blueberry_video.nn.heads import AttentivePool


class VideoClassifier(nn.Module):
    """Video float (B, C, T, H, W), normalised as the encoder wants it -> logits {label: (B, classes)}.

    Args:
        encoder: any encoder of this package.
        num_classes: number of classes of each label to predict, such as ``{motion: 8}``.
        pooling: ``"mean"`` of the tokens, or ``"attentive"``: one learnable query.
        freeze_encoder: train the head alone; the encoder then stays in evaluation mode.
        head_init_scale: factor on the initial weights of the heads; VideoMAE fine-tunes with 0.001.
        dropout: on the pooled vector.
        num_heads: attention heads of the attentive pooling.

    Raises:
        ValueError: for an unknown pooling, or no label.
    """

    def __init__(
        self,
        encoder: Encoder,
        num_classes: dict[str, int],
        pooling: str = "mean",
        freeze_encoder: bool = False,
        head_init_scale: float = 0.001,
        dropout: float = 0.0,
        num_heads: int = 3,
    ):
        super().__init__()
        if pooling not in ("mean", "attentive"):
            raise ValueError(f"pooling={pooling!r} is unknown: choose 'mean' or 'attentive'.")
        if not num_classes:
            raise ValueError(
                "num_classes is empty: name at least one label with its number of classes, such as {motion: 8}."
            )
        self.encoder, self.freeze_encoder = encoder, freeze_encoder
        self.pool = AttentivePool(encoder.embed_dim, num_heads) if pooling == "attentive" else None
        self.fc_norm = nn.LayerNorm(encoder.embed_dim, eps=1e-6)
        self.dropout = nn.Dropout(dropout)
        self.heads = nn.ModuleDict()
        for name, count in num_classes.items():
            head = nn.Linear(encoder.embed_dim, count)
            nn.init.trunc_normal_(head.weight, std=0.02 * head_init_scale)
            nn.init.zeros_(head.bias)
            self.heads[name] = head
        if freeze_encoder:
            encoder.requires_grad_(False)

    def train(self, mode: bool = True) -> "VideoClassifier":
        super().train(mode)
        if self.freeze_encoder:
            self.encoder.eval()
        return self

    def forward(self, video: Tensor) -> dict[str, Tensor]:
        return self.classify(self.encoder(video))

    def classify(self, tokens: Tensor) -> dict[str, Tensor]:
        """Tokens (B, N, D) of the encoder -> logits {label: (B, classes)}."""
        pooled = self.pool(tokens) if self.pool is not None else tokens.mean(dim=1)
        pooled = self.dropout(self.fc_norm(pooled))
        return {name: head(pooled) for name, head in self.heads.items()}


def convert_finetuned(state: dict[str, Tensor], label: str) -> dict[str, Tensor]:
    """The weights of a fine-tuned VideoMAE, original or transformers, under the names of :class:`VideoClassifier`."""
    converted = {f"encoder.{name}": value for name, value in vit.encoder_weights(state).items()}
    for kind in ("weight", "bias"):
        converted[f"fc_norm.{kind}"] = state[f"fc_norm.{kind}"]
        converted[f"heads.{label}.{kind}"] = state[f"head.{kind}" if f"head.{kind}" in state else f"classifier.{kind}"]
    return converted


def from_published(
    path: str | Path, label: str = "action", num_frames: int = 16, image_size: int = 224, num_heads: int | None = None
) -> VideoClassifier:
    """A fine-tuned VideoMAE from an original or a transformers file; its variant is read off the shapes of the
    weights.

    Args:
        path: see :func:`~blueberry_video.models.vit.read_weights`.
        label: name to give to its one head.
        num_frames, image_size: of the clips; no weight tells them.
        num_heads: of the encoder; by default what the published models have.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if the file has no classifier, such as a pre-trained model.
        RuntimeError: if a weight is missing, left over, or of another shape: each is named.
    """
    state = vit.read_weights(path)
    if "fc_norm.weight" not in state:
        raise ValueError(
            f"{path} holds no fine-tuned VideoMAE (fc_norm.weight is missing): load a pre-trained one with "
            "blueberry_video.models.masked_autoencoder.from_published."
        )
    weights = convert_finetuned(state, label)
    own = {name.removeprefix("encoder."): value for name, value in weights.items() if name.startswith("encoder.")}
    encoder = vit.build_from_weights(own, num_frames, image_size, num_heads)
    model = VideoClassifier(encoder, num_classes={label: weights[f"heads.{label}.weight"].shape[0]})
    model.load_state_dict(weights)
    return model
