"""A classifier over any encoder: the network that is trained from scratch, fine-tuned, or (encoder frozen) probed.

Its published files are those of fine-tuned VideoMAE (original, transformers) and OmniMAE; they hold one head.
"""

from pathlib import Path
from typing import Any, cast

from torch import Tensor, nn

from blueberry_video.models import vit
from blueberry_video.models.encoder import Encoder
from blueberry_video.nn.heads import ClassificationHead
from blueberry_video.weights import files as weight_files
from blueberry_video.weights.load import load_strictly


class VideoClassifier(nn.Module):
    """Video float (B, C, T, H, W), normalised as the encoder wants it -> logits {label: (B, classes)}.

    Args:
        encoder: any encoder of this package. VideoMAE is fine-tuned without its final norm.
        num_classes: number of classes of each label to predict, such as ``{motion: 8}``.
        pooling: ``"mean"`` or ``"attentive"`` over the tokens, see
            :class:`~blueberry_video.nn.heads.ClassificationHead`, or ``"context"``: the vector that an encoder such as
            :class:`~blueberry_video.models.spool.Spool` gives of a video by itself, ``encoder.context(video)``.
        num_heads, dropout, head_init_scale, pool_depth, head_norm: of the head; V-JEPA 2 is probed with ``attentive``
            pooling of 4 blocks and no norm.
        freeze_encoder: train the head alone; the encoder then stays in evaluation mode.

    Attributes:
        num_classes: label -> number of its classes.

    Raises:
        ValueError: for an unknown pooling, one by the context of an encoder that has none, or no label.
    """

    def __init__(
        self,
        encoder: Encoder,
        num_classes: dict[str, int],
        pooling: str = "mean",
        num_heads: int = 1,
        dropout: float = 0.0,
        head_init_scale: float = 0.001,
        pool_depth: int = 1,
        head_norm: bool = True,
        freeze_encoder: bool = False,
    ):
        super().__init__()
        self.encoder, self.freeze_encoder = encoder, freeze_encoder
        self.num_classes = dict(num_classes)
        self.by_context, width = pooling == "context", encoder.embed_dim
        if self.by_context:
            pooling, width = "mean", getattr(encoder, "context_dim", 0)  # the mean of one
            if not width:
                raise ValueError(
                    f"model.pooling=context, but this {type(encoder).__name__} gives no context: choose an encoder of "
                    "conf/model/spool/ with num_hidden_layers of 1 or more, or 'mean' or 'attentive' pooling."
                )
        self.head = ClassificationHead(
            width, num_classes, pooling, num_heads, dropout, head_init_scale, pool_depth, head_norm
        )
        if freeze_encoder:
            encoder.requires_grad_(False)

    def train(self, mode: bool = True) -> "VideoClassifier":
        super().train(mode)
        if self.freeze_encoder:
            self.encoder.eval()
        return self

    def forward(self, video: Tensor) -> dict[str, Tensor]:
        if self.by_context:
            return self.head(cast(Any, self.encoder).context(video)[:, None])
        return self.head(self.encoder(video))

    def load_published(self, source: str | Path) -> str:
        """Loads a published file or a checkpoint of a run: the encoder strictly, see
        :meth:`~blueberry_video.models.encoder.Encoder.load_published`, and the heads that fit.

        A head fits the head of the same label and number of classes, if both pool vectors of the same width in the same
        way. A published file has one head without a label, which fits the only head of this model. The LayerNorm before
        the linear layers is loaded even where no head fits, as in the original code.

        Returns:
            A report on what was loaded and which heads were ignored.

        Raises:
            FileNotFoundError: there is no such file.
            ValueError: encoder tensors are missing, unexpected or of another shape; the message names them.
        """
        report = self.encoder.load_published(source)
        found, own = convert_head(weight_files.read_weights(source), self._only_label), self.head.state_dict()
        if not found:
            return f"{report}; it holds no head: the head of this model keeps its initialization"
        stem, labels = _stem(found), dict.fromkeys(name.split(".")[1] for name in found if name.startswith("linear."))
        if stem != _stem(own) or not _widths(found) <= _widths(own):
            named = " ".join(["its head", ", ".join(map(repr, labels))]).strip()
            return (
                f"{report}; {named} was ignored, because its pooling or its width differs from that of this model: its "
                "head keeps its initialization"
            )
        fitting, ignored = set(stem), ""
        for label in labels:
            classes = len(found[f"linear.{label}.weight"])
            if self.num_classes.get(label) == classes:
                fitting |= {f"linear.{label}.{kind}" for kind in ("weight", "bias")}
                report += f", and the head {label!r} ({classes} classes)"
            else:
                ours = ", ".join(f"{name!r} ({count} classes)" for name, count in self.num_classes.items())
                ignored += f"; its head {label!r} ({classes} classes) was ignored, since this model has {ours}"
        self.head.load_state_dict(own | {name: found[name] for name in fitting})
        return report + ignored

    def load_finetuned(self, source: str | Path) -> str:
        """Loads a fine-tuned file, published or of a run, strictly: encoder and heads.

        Returns:
            A sentence on what was loaded.

        Raises:
            FileNotFoundError: there is no such file.
            ValueError: tensors are missing, unexpected or of another shape.
        """
        state = weight_files.read_weights(source)
        own = self.state_dict()
        weights = state if state.keys() == own.keys() else convert_finetuned(state, self._only_label, source)
        fix = "Give a fine-tuned file, and the model variant and num_classes that it was made with."
        load_strictly(self, weights, source, fix)
        return f"loaded {len(weights)} tensors from {source}"

    @property
    def _only_label(self) -> str:
        """Label for the head of a published file, which has none."""
        return next(iter(self.num_classes)) if len(self.num_classes) == 1 else "without a label"


def is_omnimae(state: dict[str, Tensor]) -> bool:
    return any(name.startswith("trunk.") for name in state)


def convert_head(state: dict[str, Tensor], label: str) -> dict[str, Tensor]:
    """The head in a state dict of any layout, under the names of :class:`~blueberry_video.nn.heads.ClassificationHead`.

    Published files have one head and no name for it: here it is called ``label``. OmniMAE keeps the LayerNorm after
    the mean as ``trunk.norm``. Files of pre-trained models have no head, and give an empty dict.
    """
    if any(name.startswith("head.linear.") for name in state):  # one of this package
        return {name.removeprefix("head."): value for name, value in state.items() if name.startswith("head.")}
    if any(name.startswith(("trunk.decoder.", "trunk.mask_token")) for name in state):  # OmniMAE's head of pixels
        return {}
    norm = "trunk.norm." if is_omnimae(state) else "fc_norm."
    converted: dict[str, Tensor] = {}
    for theirs, ours in ((norm, "fc_norm."), ("head.", f"linear.{label}."), ("classifier.", f"linear.{label}.")):
        converted |= {ours + name.removeprefix(theirs): state[name] for name in state if name.startswith(theirs)}
    return converted


def convert_finetuned(state: dict[str, Tensor], label: str, source: str | Path) -> dict[str, Tensor]:
    """The weights of a fine-tuned VideoMAE (original or transformers) or OmniMAE, under the names of
    :class:`VideoClassifier`.

    Raises:
        ValueError: if there is no encoder in it, or one with other positions.
    """
    encoder = vit.encoder_weights(state, source)
    if is_omnimae(state):  # its norm is the head's
        encoder = {name: value for name, value in encoder.items() if not name.startswith("norm.")}
    converted = {f"encoder.{name}": value for name, value in encoder.items()}
    return converted | {f"head.{name}": value for name, value in convert_head(state, label).items()}


def to_original(state: dict[str, Tensor], label: str) -> dict[str, Tensor]:
    """The weights of a :class:`VideoClassifier`, with the head of one label, as a fine-tuned file of the original
    VideoMAE has them: the inverse of :func:`convert_finetuned`.

    Raises:
        ValueError: if the model cannot be told in that layout: see :func:`_one_head`.
    """
    encoder, norm, linear = _one_head(state, label)
    return encoder | _prefixed("fc_norm.", norm) | _prefixed("head.", linear)


def to_huggingface(state: dict[str, Tensor], label: str) -> dict[str, Tensor]:
    """As :func:`to_original`, for transformers' ``VideoMAEForVideoClassification`` (with ``use_mean_pooling``).

    Its epsilons are in its config and code: set ``layer_norm_eps=1e-6``; that of ``fc_norm`` stays 1e-5 there.
    """
    encoder, norm, linear = _one_head(state, label)
    return vit.to_huggingface(encoder) | _prefixed("fc_norm.", norm) | _prefixed("classifier.", linear)


def to_omnimae(state: dict[str, Tensor], label: str, num_frames: int = 16, image_size: int = 224) -> dict[str, Tensor]:
    """As :func:`to_original`, for a fine-tuned OmniMAE; its file holds the positions of clips of this size, too."""
    encoder, norm, linear = _one_head(state, label)
    trunk = vit.to_omnimae(encoder | _prefixed("norm.", norm), num_frames, image_size)
    return trunk | _prefixed("head.", linear)


def _one_head(state: dict[str, Tensor], label: str) -> tuple[dict[str, Tensor], dict[str, Tensor], dict[str, Tensor]]:
    """Encoder, LayerNorm and linear layer of one label, by their own names.

    Raises:
        ValueError: if there is no such label, or what published models do not have: a norm in the encoder, attentive
            pooling.
    """
    if f"head.linear.{label}.weight" not in state:
        labels = sorted({name.split(".")[2] for name in state if name.startswith("head.linear.")})
        raise ValueError(f"this model has no head of {label!r}: choose one of {', '.join(labels) or 'none'}.")
    for name in ("encoder.norm.weight", "head.pool.query"):
        if name in state:
            raise ValueError(
                f"published fine-tuned models have no {name}: only one made with model.encoder.final_norm=false and "
                "model.pooling=mean can be written in their layout."
            )
    prefixes = ("encoder.", "head.fc_norm.", f"head.linear.{label}.")
    encoder, norm, linear = (
        {name.removeprefix(prefix): value for name, value in state.items() if name.startswith(prefix)}
        for prefix in prefixes
    )
    return encoder, norm, linear


def _prefixed(prefix: str, state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {prefix + name: value for name, value in state.items()}


def from_published(
    path: str | Path, label: str = "action", num_frames: int = 16, image_size: int = 224, num_heads: int | None = None
) -> VideoClassifier:
    """A fine-tuned VideoMAE from an original or a transformers file, or a fine-tuned OmniMAE; its variant is read off
    the shapes of the weights.

    Args:
        path: see :func:`~blueberry_video.weights.files.read_weights`.
        label: name to give to its one head.
        num_frames, image_size: of the clips; no weight tells them.
        num_heads: of the encoder; by default what the published models have.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if the file has no classifier, such as a pre-trained model.
    """
    state = weight_files.read_weights(path)
    if not {"fc_norm.weight", f"linear.{label}.weight"} <= convert_head(state, label).keys():
        raise ValueError(
            f"{path} holds no fine-tuned VideoMAE (fc_norm.weight or head.weight is missing): load a pre-trained "
            "one with blueberry_video.models.masked_autoencoder.model.from_published."
        )
    weights = convert_finetuned(state, label, path)
    own = {name.removeprefix("encoder."): value for name, value in weights.items() if name.startswith("encoder.")}
    encoder = vit.VisionTransformer.from_weights(own, path, num_frames, image_size, num_heads, images=is_omnimae(state))
    model = VideoClassifier(encoder, num_classes={label: weights[f"head.linear.{label}.weight"].shape[0]})
    load_strictly(model, weights, path)
    return model


def _stem(head: dict[str, Tensor]) -> dict[str, tuple[int, ...]]:
    """The shapes of what stands before the linear layers, by name."""
    return {name: tuple(value.shape) for name, value in head.items() if not name.startswith("linear.")}


def _widths(head: dict[str, Tensor]) -> set[int]:
    """Of the vectors that the linear layers take."""
    return {value.shape[1] for name, value in head.items() if name.startswith("linear.") and name.endswith(".weight")}


class FrameClassifier(nn.Module):
    """Video float (B, C, T, H, W), normalised as the encoder wants it -> logits {label: (B, t, classes)}, where t is T
    over the encoder's tubelet.

    Args:
        encoder: any encoder of this package.
        num_classes: number of classes of each label to predict, such as ``{motion: 8}``.
        freeze_encoder: train the head alone; the encoder then stays in evaluation mode.

    Attributes:
        num_classes: label -> number of its classes.

    Raises:
        ValueError: if there is no label.
    """

    def __init__(self, encoder: Encoder, num_classes: dict[str, int], freeze_encoder: bool = False):
        super().__init__()
        self.encoder, self.freeze_encoder = encoder, freeze_encoder
        self.num_classes = dict(num_classes)
        self.head = FrameHead(encoder.embed_dim, self.num_classes)
        if freeze_encoder:
            encoder.requires_grad_(False)

    def train(self, mode: bool = True) -> "FrameClassifier":
        super().train(mode)
        if self.freeze_encoder:
            self.encoder.eval()
        return self

    def forward(self, video: Tensor) -> dict[str, Tensor]:
        moments = self.encoder.grid(video.shape)[0]
        return self.head(self.encoder(video).unflatten(1, (moments, -1)))


class FrameHead(nn.Module):
    """Scores the classes of every frame: the mean of its tokens, LayerNorm, one linear layer a label. (B, T, S, D) ->
    {label: (B, T, classes)}.

    Args:
        dim: width of the tokens.
        num_classes: number of classes of each label, such as ``{"phase": 5}``.

    Raises:
        ValueError: if there is no label; in ``forward`` for tokens that are not four-dimensional.
    """

    def __init__(self, dim: int, num_classes: dict[str, int]):
        super().__init__()
        if not num_classes:
            raise ValueError("num_classes is empty: name at least one label with its number of classes: {phase: 5}.")
        self.norm = nn.LayerNorm(dim, eps=1e-6)
        self.linear = nn.ModuleDict({name: nn.Linear(dim, count) for name, count in num_classes.items()})

    def forward(self, features: Tensor) -> dict[str, Tensor]:
        if features.ndim != 4:
            raise ValueError(
                f"the features have shape {tuple(features.shape)} but must be (B, T, S, D), frame by frame: of a "
                "Spool, give `features(video).features[:, 1:-1]`."
            )
        frames = self.norm(features.mean(dim=2))
        return {name: linear(frames) for name, linear in self.linear.items()}
