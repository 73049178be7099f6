"""A classifier over any encoder: the network that is trained from scratch, fine-tuned, or (encoder frozen) probed."""

from pathlib import Path

from torch import Tensor, nn

from blueberry_video.models import vit
from blueberry_video.nn.encoder import Encoder
from blueberry_video.nn.heads import ClassificationHead


class VideoClassifier(nn.Module):
    """Video float (B, C, T, H, W), normalised as the encoder wants it -> logits {label: (B, classes)}.

    Args:
        encoder: any encoder of this package. VideoMAE is fine-tuned without its final norm.
        num_classes: number of classes of each label to predict, such as ``{motion: 8}``.
        pooling, num_heads, dropout, head_init_scale: see :class:`~blueberry_video.nn.heads.ClassificationHead`.
        freeze_encoder: train the head alone; the encoder then stays in evaluation mode.

    Raises:
        ValueError: for an unknown pooling, or no label.
    """

    def __init__(
        self,
        encoder: Encoder,
        num_classes: dict[str, int],
        pooling: str = "mean",
        num_heads: int = 1,
        dropout: float = 0.0,
        head_init_scale: float = 0.001,
        freeze_encoder: bool = False,
    ):
        super().__init__()
        self.encoder, self.freeze_encoder = encoder, freeze_encoder
        self.head = ClassificationHead(encoder.embed_dim, num_classes, pooling, num_heads, dropout, head_init_scale)
        if freeze_encoder:
            encoder.requires_grad_(False)

    def train(self, mode: bool = True) -> "VideoClassifier":
        super().train(mode)
        if self.freeze_encoder:
            self.encoder.eval()
        return self

    def forward(self, video: Tensor) -> dict[str, Tensor]:
        return self.head(self.encoder(video))


def convert_finetuned(state: dict[str, Tensor], label: str) -> dict[str, Tensor]:
    """The weights of a fine-tuned VideoMAE, original or transformers, under the names of :class:`VideoClassifier`."""
    converted = {f"encoder.{name}": value for name, value in vit.encoder_weights(state).items()}
    linear = f"head.linear.{label}."
    for theirs, ours in (("fc_norm.", "head.fc_norm."), ("head.", linear), ("classifier.", linear)):
        found = [name for name in state if name.startswith(theirs)]
        converted |= {ours + name.removeprefix(theirs): state[name] for name in found}
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
    if "fc_norm.weight" not in state or not {"head.weight", "classifier.weight"} & state.keys():
        raise ValueError(
            f"{path} holds no fine-tuned VideoMAE (fc_norm.weight or head.weight is missing): load a pre-trained "
            "one with blueberry_video.models.masked_autoencoder.from_published."
        )
    weights = convert_finetuned(state, label)
    own = {name.removeprefix("encoder."): value for name, value in weights.items() if name.startswith("encoder.")}
    encoder = vit.build_from_weights(own, num_frames, image_size, num_heads)
    model = VideoClassifier(encoder, num_classes={label: weights[f"head.linear.{label}.weight"].shape[0]})
    model.load_state_dict(weights)
    return model
