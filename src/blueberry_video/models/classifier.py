"""Classifiers of clips and of frames over any encoder, for training from scratch, fine-tuning, and probing.

Published weights are those of fine-tuned VideoMAE (original, transformers) and OmniMAE, which have one head.
VideoMAE trained with ``use_mean_pooling=False`` (``--use_cls`` of the original) has the final norm of its encoder and
classifies the first token: ``pooling="first"`` with ``head_norm=False``. Its files have no ``fc_norm``.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Self, cast

from einops import rearrange
from torch import Tensor, nn

from blueberry_video.models import vit
from blueberry_video.models.encoder import Encoder
from blueberry_video.nn.heads import ClassificationHead
from blueberry_video.nn.positions import sincos
from blueberry_video.weights.diffusers_folder import TRANSFORMERS, read_source, write_folder
from blueberry_video.weights.load import check_config, check_layout, load_strictly, origin_of_heads


class VideoClassifier(nn.Module):
    """Clip classifier: video float (B, C, T, H, W), normalized as the encoder requires -> logits {label: (B, classes)}.

    Args:
        encoder: any encoder of this package. VideoMAE is fine-tuned without its final norm, except for
            ``pooling="first"``.
        num_classes: number of classes of each label to predict, such as ``{motion: 8}``.
        pooling: ``"mean"``, ``"attentive"`` or ``"first"`` of the tokens, see
            :class:`~blueberry_video.nn.heads.ClassificationHead`, or ``"context"``: the vector
            ``encoder.context(video)`` of an encoder such as :class:`~blueberry_video.models.spool.Spool`.
        num_heads, dropout, head_init_scale, pool_depth, head_norm, pool_eps, complete_block, published_pool: arguments
            of the head. V-JEPA is probed with ``attentive`` pooling of 1 block, V-JEPA 2 of 4, both without norm and
            with ``head_init_scale=None``; transformers' probes need ``pool_eps=1e-6``.
        freeze_encoder: train only the head; the encoder stays in evaluation mode.
        segments: number of windows that follow each other in a video; each is encoded alone, and the head receives the
            tokens of all. V-JEPA's probes have 8 on Kinetics-400 and 2 on Something-Something v2 (data:
            ``sampler=segments``).
        segment_positions: add a sine-cosine table at the index of the frame in its file to the tokens of each window.

    Attributes:
        num_classes: number of classes of each label.

    Raises:
        ValueError: ``pooling`` is unknown, or ``"context"`` with an encoder that has no context or several segments, or
            there is no label, or ``segments`` is below 1; in ``forward``, the number of frames is not a multiple of
            ``segments``, or their indices are missing.
    """

    def __init__(
        self,
        encoder: Encoder,
        num_classes: dict[str, int],
        pooling: str = "mean",
        num_heads: int = 1,
        dropout: float = 0.0,
        head_init_scale: float | None = 0.001,
        pool_depth: int = 1,
        head_norm: bool = True,
        freeze_encoder: bool = False,
        pool_eps: float = 1e-5,
        complete_block: bool = True,
        published_pool: bool = True,
        segments: int = 1,
        segment_positions: bool = False,
    ):
        super().__init__()
        if segments < 1 or (segments > 1 and pooling == "context"):
            raise ValueError(f"model.segments={segments} must be at least 1, and 1 with model.pooling=context.")
        self.encoder, self.freeze_encoder = encoder, freeze_encoder
        self.segments, self.segment_positions = segments, segment_positions
        self.num_classes = dict(num_classes)
        self.pooling, self.by_context, width = pooling, pooling == "context", encoder.embed_dim
        if self.by_context:
            pooling, width = "mean", getattr(encoder, "context_dim", 0)  # the mean of one vector
            if not width:
                raise ValueError(
                    f"model.pooling=context requires an encoder with a context, unlike this {type(encoder).__name__}: "
                    "use one of conf/model/spool/ with num_hidden_layers of at least 1, or 'mean', 'attentive' or "
                    "'first' pooling."
                )
        of_head = (dropout, head_init_scale, pool_depth, head_norm, pool_eps, complete_block, published_pool)
        self.head = ClassificationHead(width, num_classes, pooling, num_heads, *of_head)
        if freeze_encoder:
            encoder.requires_grad_(False)

    def train(self, mode: bool = True) -> "VideoClassifier":
        super().train(mode)
        if self.freeze_encoder:
            self.encoder.eval()
        return self

    def forward(self, video: Tensor, frames: Tensor | None = None) -> dict[str, Tensor]:
        """Classifies a video (B, C, T, H, W); ``frames`` (B, T) are the indices of its frames in the file."""
        if self.by_context:
            return self.head(cast(Any, self.encoder).context(video)[:, None])
        if video.shape[2] % self.segments:
            raise ValueError(
                f"the video has {video.shape[2]} frames, not a multiple of model.segments={self.segments}: set "
                f"sampler=segments and num_clips={self.segments} in data.train and data.val."
            )
        windows = rearrange(video, "b c (s t) h w -> (b s) c t h w", s=self.segments)
        tokens = self.encoder(windows)
        if self.segment_positions:
            if frames is None:
                raise ValueError(
                    "model.segment_positions=true requires clips with `frames`, their indices in the file: set "
                    "sampler=segments in data.train and data.val."
                )
            _, h, w = self.encoder.grid(windows.shape)
            rows = sincos(frames.reshape(len(windows), -1)[:, :: self.encoder.patch_size[0]], tokens.shape[-1])
            tokens = tokens + rows.to(tokens).repeat_interleave(h * w, dim=1)
        return self.head(rearrange(tokens, "(b s) n d -> b (s n) d", s=self.segments))

    def load_published(self, weights: str | Path) -> str:
        """Loads published weights or a checkpoint of a run: the encoder strictly, see
        :meth:`~blueberry_video.models.encoder.Encoder.load_published`, and the heads that fit.

        A head fits the head of the same label and number of classes, if pooling and width agree. Published weights have
        one head without a label, which fits the only head of this model. The LayerNorm before the linear layers is
        loaded even where no head fits, as in the original code.

        Returns:
            A report on what was loaded and which heads were ignored.

        Raises:
            FileNotFoundError, ValueError: see :meth:`~blueberry_video.models.encoder.Encoder.load_published`.
        """
        report = self.encoder.load_published(weights)
        state = read_source(weights)[1]
        found, own = convert_head(state, self._only_label), self.head.state_dict()
        if not found:
            return f"{report}; it holds no head: the head of this model keeps its initialization"
        stem, labels = _stem(found), dict.fromkeys(name.split(".")[1] for name in found if name.startswith("linear."))
        pools_alike = published_pooling(state) in (None, self.pooling)
        if stem != _stem(own) or not _widths(found) <= _widths(own) or not pools_alike:
            named = " ".join(["its head", ", ".join(map(repr, labels))]).strip()
            return (
                f"{report}; {named} was ignored, because its pooling or width differs from that of this model; the "
                "head of this model keeps its initialization"
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

    def load_finetuned(self, weights: str | Path) -> str:
        """Loads encoder and heads of fine-tuned weights, published or of a run, strictly.

        Returns:
            A sentence on what was loaded.

        Raises:
            FileNotFoundError: there are no such weights.
            ValueError: tensors are missing, unexpected or of a different shape, or the pooling is different.
        """
        (config, state), own = read_source(weights), self.state_dict()
        tensors = state if state.keys() == own.keys() else convert_finetuned(state, self._only_label, weights)
        fix = "Use fine-tuned weights, and the model variant and num_classes of these weights."
        check_config(self, config, self.encoder.published_settings, weights, fix)
        load_strictly(self, tensors, weights, fix)
        if (pooling := published_pooling(state)) not in (None, self.pooling):
            raise ValueError(f"{weights} has tensors of model.pooling={pooling!r} (here {self.pooling!r}). {fix}")
        return f"loaded {len(tensors)} tensors from {weights}{origin_of_heads(config, self.encoder.published_settings)}"

    @classmethod
    def from_published(
        cls,
        weights: str | Path,
        label: str = "action",
        num_frames: int | None = None,
        image_size: int | None = None,
        num_heads: int | None = None,
    ) -> Self:
        """Builds a fine-tuned VideoMAE or OmniMAE of the size of published weights.

        Args:
            label: label of the head.
            weights, num_frames, image_size, num_heads: see
                :meth:`blueberry_video.models.masked_autoencoder.MaskedAutoencoder.from_published`.

        Raises:
            FileNotFoundError: a file is missing.
            ValueError: the weights have no classifier, as pre-trained models.
        """
        config, state = read_source(weights)
        tensors = convert_finetuned(state, label, weights)
        norm = "encoder.norm.weight" if published_pooling(state) == "first" else "head.fc_norm.weight"
        if not {norm, f"head.linear.{label}.weight"} <= tensors.keys():
            raise ValueError(
                f"{weights} holds no fine-tuned VideoMAE (fc_norm.weight, norm.weight without mean pooling, or "
                "head.weight is missing): load a pre-trained one with "
                "blueberry_video.models.masked_autoencoder.MaskedAutoencoder.from_published."
            )
        own = {name.removeprefix("encoder."): value for name, value in tensors.items() if name.startswith("encoder.")}
        sizes = vit.settings_of_config(config, own, weights, num_frames, image_size, num_heads)
        encoder = vit.VisionTransformer.from_weights(own, weights, **sizes, images=is_omnimae(state))
        pooling = published_pooling(state) or "mean"
        classes = {label: len(tensors[f"head.linear.{label}.weight"])}
        model = cls(encoder, classes, pooling, head_norm=pooling == "mean")
        load_strictly(model, tensors, weights)
        return model

    def save_published(self, folder: str | Path, label: str | None = None, names: Sequence[str] = ()) -> None:
        """Writes a folder that transformers' ``VideoMAEForVideoClassification.from_pretrained`` loads.

        transformers computes the LayerNorm of the head with an eps of 1e-5 rather than 1e-6; with ``pooling="first"``
        (``use_mean_pooling=False``) there is none, and the logits are equal.

        Args:
            folder: must not exist, or be empty.
            label: label of the head to write; required if there are several.
            names: names of its classes, for ``id2label``; empty for numbers.

        Raises:
            FileExistsError: the folder exists and is not empty.
            ValueError: a setting has no counterpart in VideoMAE, or there are more or fewer names than classes; the
                message names key and value.
        """
        label = label or self._only_label
        write_folder(folder, self.config(label, names), to_huggingface(self.state_dict(), label), stem=TRANSFORMERS)

    def config(self, label: str | None = None, names: Sequence[str] = ()) -> dict[str, Any]:
        """Settings of this model, with the head of one label, as ``config.json`` of transformers holds them.

        Raises:
            ValueError: see :meth:`save_published`.
        """
        label = label or self._only_label
        if label not in self.num_classes:
            raise ValueError(
                f"model.num_classes={self.num_classes} must contain the label to save, because {vit.VIDEOMAE} has one "
                f"head: pass a label among {', '.join(self.num_classes)}."
            )
        config, first = vit.huggingface_config(self.encoder), self.pooling == "first"
        settings = {
            "model.encoder.final_norm": (not config["use_mean_pooling"], first),
            "model.pooling": (self.pooling, "first" if first else "mean"),
            "model.head_norm": ("fc_norm.weight" in self.head.state_dict(), not first),
        }
        check_layout(vit.VIDEOMAE, settings)
        names = list(names) or [f"LABEL_{index}" for index in range(self.num_classes[label])]
        if len(names) != self.num_classes[label]:
            raise ValueError(f"{label} has {self.num_classes[label]} classes, not {len(names)}: name each of them.")
        return config | {
            "architectures": ["VideoMAEForVideoClassification"],
            "id2label": {str(index): name for index, name in enumerate(names)},
            "label2id": {name: index for index, name in enumerate(names)},
        }

    @property
    def _only_label(self) -> str:
        """Label of the head of published weights, which have none."""
        return next(iter(self.num_classes)) if len(self.num_classes) == 1 else "without a label"


def is_omnimae(state: dict[str, Tensor]) -> bool:
    """Returns true for a state dict in the layout of OmniMAE."""
    return any(name.startswith("trunk.") for name in state)


def published_pooling(state: dict[str, Tensor]) -> str | None:
    """Pooling of a published fine-tuned state dict: ``"mean"``, or ``"first"`` where there is no ``fc_norm``; ``None``
    for a state dict of this package, whose names do not tell it, and for one without a head."""
    head = convert_head(state, "label")
    if not head or any(name.startswith("head.linear.") for name in state):
        return None
    return "mean" if "fc_norm.weight" in head else "first"


def convert_head(state: dict[str, Tensor], label: str) -> dict[str, Tensor]:
    """Extracts the head of a state dict in any layout, under the names of
    :class:`~blueberry_video.nn.heads.ClassificationHead`; empty if there is none, as in pre-trained models.

    The head of published weights, which has no name, becomes ``label``. In OmniMAE, its LayerNorm is ``trunk.norm``.
    """
    if any(name.startswith("head.linear.") for name in state):  # of this package
        return {name.removeprefix("head."): value for name, value in state.items() if name.startswith("head.")}
    if any(name.startswith(("trunk.decoder.", "trunk.mask_token")) for name in state):  # OmniMAE's pixel head
        return {}
    norm = "trunk.norm." if is_omnimae(state) else "fc_norm."
    converted: dict[str, Tensor] = {}
    for theirs, ours in ((norm, "fc_norm."), ("head.", f"linear.{label}."), ("classifier.", f"linear.{label}.")):
        converted |= {ours + name.removeprefix(theirs): state[name] for name in state if name.startswith(theirs)}
    return converted


def convert_finetuned(state: dict[str, Tensor], label: str, source: str | Path) -> dict[str, Tensor]:
    """Converts a fine-tuned VideoMAE (original or transformers) or OmniMAE to the names of :class:`VideoClassifier`.

    Raises:
        ValueError: see :func:`~blueberry_video.models.vit.encoder_weights`.
    """
    encoder = vit.encoder_weights(state, source)
    if is_omnimae(state):  # trunk.norm belongs to the head
        encoder = {name: value for name, value in encoder.items() if not name.startswith("norm.")}
    converted = {f"encoder.{name}": value for name, value in encoder.items()}
    return converted | {f"head.{name}": value for name, value in convert_head(state, label).items()}


def to_original(state: dict[str, Tensor], label: str) -> dict[str, Tensor]:
    """Inverse of :func:`convert_finetuned` for the original VideoMAE, with the head of one label.

    With ``pooling="first"``, the file is one of ``use_mean_pooling=False``.

    Raises:
        ValueError: see :func:`_one_head`.
    """
    encoder, norm, linear = _one_head(state, label)
    return encoder | _prefixed("fc_norm.", norm) | _prefixed("head.", linear)


def to_huggingface(state: dict[str, Tensor], label: str) -> dict[str, Tensor]:
    """See :func:`to_original`, for transformers' ``VideoMAEForVideoClassification``.

    Its config needs ``layer_norm_eps=1e-6``; the eps of ``fc_norm`` is always 1e-5 there.
    """
    encoder, norm, linear = _one_head(state, label)
    return vit.to_huggingface(encoder) | _prefixed("fc_norm.", norm) | _prefixed("classifier.", linear)


def to_omnimae(state: dict[str, Tensor], label: str, num_frames: int = 16, image_size: int = 224) -> dict[str, Tensor]:
    """See :func:`to_original`, for OmniMAE, with the position table for clips of this size."""
    encoder, norm, linear = _one_head(state, label)
    if not norm:
        raise ValueError(
            "encoder.norm.weight has no counterpart in fine-tuned OmniMAE, which requires final_norm=false and "
            "pooling=mean: use to_original or to_huggingface."
        )
    trunk = vit.to_omnimae(encoder | _prefixed("norm.", norm), num_frames, image_size)
    return trunk | _prefixed("head.", linear)


def _one_head(state: dict[str, Tensor], label: str) -> tuple[dict[str, Tensor], dict[str, Tensor], dict[str, Tensor]]:
    """Splits a state dict into encoder, LayerNorm and linear layer of one label, without their prefixes.

    Raises:
        ValueError: there is no such label, or published models have no counterpart of the final norm of the encoder or
            of attentive pooling.
    """
    if f"head.linear.{label}.weight" not in state:
        labels = sorted({name.split(".")[2] for name in state if name.startswith("head.linear.")})
        raise ValueError(f"this model has no head {label!r}: choose one of {', '.join(labels) or 'none'}.")
    norms = sum(name in state for name in ("encoder.norm.weight", "head.fc_norm.weight"))
    if norms != 1 or "head.pool.query" in state:
        name = "encoder.norm.weight" if norms else "a head without LayerNorm"
        name = "head.pool.query" if "head.pool.query" in state else name
        raise ValueError(
            f"{name} has no counterpart in published fine-tuned models, which require model.encoder.final_norm=false "
            "and model.pooling=mean, or model.encoder.final_norm=true, model.pooling=first and model.head_norm=false."
        )
    prefixes = ("encoder.", "head.fc_norm.", f"head.linear.{label}.")
    encoder, norm, linear = (
        {name.removeprefix(prefix): value for name, value in state.items() if name.startswith(prefix)}
        for prefix in prefixes
    )
    return encoder, norm, linear


def _prefixed(prefix: str, state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {prefix + name: value for name, value in state.items()}


def _stem(head: dict[str, Tensor]) -> dict[str, tuple[int, ...]]:
    """Shapes of the tensors before the linear layers."""
    return {name: tuple(value.shape) for name, value in head.items() if not name.startswith("linear.")}


def _widths(head: dict[str, Tensor]) -> set[int]:
    """Input widths of the linear layers."""
    return {value.shape[1] for name, value in head.items() if name.startswith("linear.") and name.endswith(".weight")}


class FrameClassifier(nn.Module):
    """Frame classifier: video float (B, C, T, H, W), normalized as the encoder requires -> logits {label: (B, t,
    classes)}, with t the number of tubelets.

    Args:
        encoder, num_classes, freeze_encoder: see :class:`VideoClassifier`.

    Attributes:
        num_classes: number of classes of each label.

    Raises:
        ValueError: there is no label.
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
        return self.head(self.encoder(video).unflatten(1, (self.encoder.grid(video.shape)[0], -1)))


class FrameHead(nn.Module):
    """Mean over the tokens of each frame, LayerNorm, and a linear layer per label. (B, T, S, D) -> {label: (B, T,
    classes)}.

    Args:
        dim: width of the tokens.
        num_classes: number of classes of each label, such as ``{"phase": 5}``.

    Raises:
        ValueError: there is no label; in ``forward``, the tokens are not four-dimensional.
    """

    def __init__(self, dim: int, num_classes: dict[str, int]):
        super().__init__()
        if not num_classes:
            raise ValueError("num_classes={} must have at least one label, such as {phase: 5}.")
        self.norm = nn.LayerNorm(dim, eps=1e-6)
        self.linear = nn.ModuleDict({name: nn.Linear(dim, count) for name, count in num_classes.items()})

    def forward(self, features: Tensor) -> dict[str, Tensor]:
        if features.ndim != 4:
            raise ValueError(
                f"the features have shape {tuple(features.shape)}, but must be (B, T, S, D): for a Spool, pass "
                "`features(video).features[:, 1:-1]`."
            )
        frames = self.norm(features.mean(dim=2))
        return {name: linear(frames) for name, linear in self.linear.items()}
