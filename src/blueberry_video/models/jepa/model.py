"""Joint-embedding predictive architectures for video: V-JEPA (arXiv 2404.08471; github.com/facebookresearch/jepa) and
V-JEPA 2 (arXiv 2506.09985; github.com/facebookresearch/vjepa2).

Unusual about them: no pixels are reconstructed. The encoder runs on the visible tokens only; a narrow predictor
receives the positions of hidden tokens and predicts their features, which the target encoder, an EMA of the encoder,
computes from the whole clip. Each kind of mask has a separate mask token. V-JEPA adds sine-cosine positions also in the
predictor; V-JEPA 2 uses rotary positions and sorts visible and mask tokens by position.
"""

import copy
from pathlib import Path
from typing import Any, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from blueberry_video.models import vit
from blueberry_video.models.encoder import Encoder
from blueberry_video.models.jepa import convert
from blueberry_video.models.jepa.predictor import Predictor
from blueberry_video.nn.running_average import RunningAverages, update_averages
from blueberry_video.weights.diffusers_folder import TRANSFORMERS, write_folder
from blueberry_video.weights.load import check_layout, different_settings, load_strictly, num_heads_of, origin_of_heads

PUBLISHED_HEADS = {1024: "16", 1280: "16", 1408: "22 in V-JEPA 2"}  # width -> heads


class JEPA(RunningAverages):
    """Encoder of visible tokens, predictor of hidden ones, and the encoder that computes the prediction targets.

    Args:
        encoder: any encoder of this package.
        predictor_dim, predictor_depth, predictor_num_heads, predictor_mlp_ratio, num_mask_tokens: see
            :class:`~blueberry_video.models.jepa.predictor.Predictor`.
        predictor_positions: ``"sincos_3d"`` (V-JEPA) or ``"rope_3d"`` (V-JEPA 2).
        predictor_context: also predict the features of visible tokens, with a separate projection (V-JEPA 2.1).
        rope_quirk: of the predictor; the encoder has a separate argument.
        ema: compute the targets with an EMA of the encoder (see :meth:`update_target`); if false and without
            ``teacher``, with the encoder itself.
        teacher: frozen encoder with the same patches that computes the targets; requires ``ema=False``.

    Attributes:
        target_encoder: the EMA or the teacher, in evaluation mode and without gradients; otherwise ``None``.

    Raises:
        ValueError: ``ema`` with a teacher, or a teacher with a different patch size.
    """

    def __init__(
        self,
        encoder: Encoder,
        predictor_dim: int = 384,
        predictor_depth: int = 12,
        predictor_num_heads: int = 12,
        predictor_mlp_ratio: float = 4.0,
        num_mask_tokens: int = 2,
        predictor_positions: str = "rope_3d",
        predictor_context: bool = False,
        rope_quirk: bool = False,
        ema: bool = True,
        teacher: Encoder | None = None,
    ):
        super().__init__()
        if ema and teacher is not None:
            raise ValueError("model.ema=true and model.teacher exclude each other: set model.ema=false.")
        if teacher is not None and teacher.patch_size != encoder.patch_size:
            raise ValueError(
                f"the patch size of the teacher, {teacher.patch_size}, must be that of the encoder, "
                f"{encoder.patch_size}, so that their tokens cover the same pixels."
            )
        self.encoder = encoder
        self.target_encoder: Encoder | None = copy.deepcopy(encoder) if ema else teacher
        self.follows = ema
        sizes = (predictor_dim, predictor_depth, predictor_num_heads, predictor_mlp_ratio, num_mask_tokens)
        self.predictor = Predictor(
            encoder.embed_dim,
            encoder.grid(encoder.video_size),
            *sizes,
            positions=predictor_positions,
            rope_quirk=rope_quirk,
            out_dim=None if teacher is None else teacher.embed_dim,
            levels=encoder.levels,
            context=predictor_context,
        )
        if self.target_encoder is not None:
            self.target_encoder.requires_grad_(False).eval()

    def train(self, mode: bool = True) -> "JEPA":
        super().train(mode)
        if self.target_encoder is not None:
            self.target_encoder.eval()
        return self

    def forward(self, video: Tensor, keep: Tensor, target: Tensor, mask_index: int = 0) -> Tensor:
        """Predicts the features of hidden tokens.

        Args:
            video: (B, C, T, H, W), normalized as the encoder requires.
            keep, target: indices (B, N_context) of visible tokens and (B, N_target) of tokens to predict.
            mask_index: kind of mask, which selects the mask token.

        Returns:
            (B, N_target, D), to be compared with :meth:`targets` at ``target``.
        """
        return self.predictor(self.encoder(video, keep), keep, target, mask_index, self.encoder.grid(video.shape))

    def targets(self, video: Tensor, gradient: bool = False) -> Tensor:
        """Prediction targets: features (B, N, D) of all tokens of the whole clip, after a LayerNorm without affine.

        Args:
            video: (B, C, T, H, W), normalized as the encoder requires.
            gradient: without a target encoder, backpropagate to the encoder. Only the loss can then prevent collapse.
        """
        encoder = self.encoder if self.target_encoder is None else self.target_encoder
        with torch.set_grad_enabled(gradient and torch.is_grad_enabled()):
            tokens = encoder(video)
            return F.layer_norm(tokens, tokens.shape[-1:])

    def averages(self) -> dict[str, Tensor]:
        if self.target_encoder is None or not self.follows:
            return {}
        return {f"target_encoder.{name}": value for name, value in self.target_encoder.named_parameters()}

    def update_target(self, momentum: float) -> None:
        """Updates the target encoder: target = momentum * target + (1 - momentum) * encoder, in at least 32 bits.

        Args:
            momentum: in [0, 1]; from 0.998 to 1 in V-JEPA, 0.99925 in V-JEPA 2. 0 copies the encoder.

        Raises:
            ValueError: ``momentum`` is out of range, or the target encoder is not an EMA.
        """
        if not 0 <= momentum <= 1:
            raise ValueError(f"an EMA momentum of {momentum} is outside [0, 1]: V-JEPA 2 uses 0.99925.")
        if self.target_encoder is None or not self.follows:
            raise ValueError("there is no EMA of the encoder to update: set model.ema=true.")
        with self.wide_averages() as targets:
            update_averages(list(targets.values()), list(self.encoder.parameters()), 1 - momentum)

    # ---- published weights ----

    @classmethod
    def from_published(
        cls,
        weights: str | Path,
        which: str,
        num_frames: int | None = None,
        image_size: int | None = None,
        positions: str | None = None,
        num_heads: int | None = None,
        predictor_num_heads: int | None = None,
    ) -> Self:
        """Builds V-JEPA from an original file, or V-JEPA 2 from an original file or transformers. Prints a report.

        Args:
            weights: an original file with ``encoder``, ``predictor`` and ``target_encoder``, a transformers file or
                folder, or a hub id.
            which: encoder of the source that becomes :attr:`encoder`: ``"target_encoder"``, which the papers evaluate,
                or ``"encoder"``, which training continues from. transformers has only an ``"encoder"``.
            num_frames, image_size, positions, num_heads: see :func:`encoder_of`.
            predictor_num_heads: that of ``config.json``; without one, 12 for V-JEPA 2, as in all its published models,
                and that of the encoder for V-JEPA, as its code has it.

        Returns:
            The model. Without a target encoder in the source, its target encoder is a copy of :attr:`encoder`.

        Raises:
            FileNotFoundError: a file is missing.
            ValueError: the weights are damaged, lack the encoder, or have position tables that cannot be computed; see
                also :func:`encoder_of`.
        """
        published = convert.read_published(weights, which)
        if published.layout == "run":
            raise ValueError(
                f"{weights} holds weights of a run, which do not determine the model: build it from the config of the "
                "run and call load_published."
            )
        settings = convert.settings_of_weights(published.state, weights)
        encoder = encoder_of(published, weights, num_frames, image_size, positions, num_heads)
        is_rope = encoder.position_kind == "rope_3d"
        key = "pred_num_attention_heads"
        if key not in published.config:
            predictor_num_heads = predictor_num_heads or (12 if is_rope else encoder.num_heads)
        names = ("predictor_num_heads", key)
        predictor_heads = num_heads_of(
            published.config, predictor_num_heads, settings["pred_hidden_size"], weights, {}, *names
        )
        model = cls(
            encoder,
            predictor_dim=settings["pred_hidden_size"],
            predictor_depth=settings["pred_num_hidden_layers"],
            predictor_num_heads=predictor_heads,
            predictor_mlp_ratio=settings["pred_mlp_ratio"],
            num_mask_tokens=settings["pred_num_mask_tokens"],
            predictor_positions=encoder.position_kind,
            rope_quirk=is_rope,
        )
        kind = encoder.position_kind
        print(f"{model._load(published, weights, which)}; positions {kind}; predictor_num_heads={predictor_heads}")
        return model

    @staticmethod
    def published_encoder(
        weights: str | Path,
        which: str | None = None,
        num_frames: int | None = None,
        image_size: int | None = None,
        positions: str | None = None,
        num_heads: int | None = None,
    ) -> vit.VisionTransformer:
        """Builds the encoder of V-JEPA or V-JEPA 2 alone, see :meth:`from_published`.

        Args:
            weights, which: see :meth:`from_published`; by default the target encoder, where the weights have one.
            num_frames, image_size, positions, num_heads: see :func:`encoder_of`.

        Raises:
            FileNotFoundError, ValueError: see :meth:`from_published`.
        """
        published = convert.read_published(weights, which)
        encoder = encoder_of(published, weights, num_frames, image_size, positions, num_heads)
        if encoder.position_kind == "sincos_3d":
            convert.check_positions(published.content, encoder.grid(encoder.video_size))
        return encoder

    def load_published(self, weights: str | Path, which: str) -> str:
        """Loads weights, see :meth:`from_published`, or those of a run, into this model. A teacher keeps its weights.

        Returns:
            A sentence on what was loaded.

        Raises:
            FileNotFoundError: a file is missing.
            ValueError: the weights are damaged, lack the encoder, or are of a different model; the message names the
                tensors or settings that differ.
        """
        published = convert.read_published(weights, which)
        positions = "sincos_3d" if self.predictor.rope is None else "rope_3d"
        if published.positions not in (None, positions):
            raise ValueError(
                f"{weights} has weights of predictor_positions={published.positions!r}, but the model has "
                f"predictor_positions={positions!r}: choose the model=vjepa/… or model=vjepa2/… of these weights."
            )
        if published.layout == "huggingface":
            heads = {key: value for key, value in published.config.items() if key.endswith("num_attention_heads")}
            if found := different_settings(heads, self.config):
                raise ValueError(f"{weights} has different settings: {found}. Choose the model of these weights.")
        report = self._load(published, weights, which)
        return f"{report}{origin_of_heads(published.config, self.encoder.published_settings)}"

    def _load(self, published: convert.Published, source: str | Path, which: str) -> str:
        """Loads weights strictly and returns a sentence on what was loaded."""
        if self.predictor.rope is None:
            convert.check_positions(published.content, self.encoder.grid(self.encoder.video_size))
        weights = {n: value for n, value in published.state.items() if n.startswith(("encoder.", "predictor."))}
        target = "target_encoder" if any(n.startswith("target_encoder.") for n in published.state) else which
        if self.follows:
            targets = convert.part(published.state, "encoder" if target == which else target)
        else:
            targets = {} if self.target_encoder is None else self.target_encoder.state_dict()
        state = weights | {f"target_encoder.{name}": value for name, value in targets.items()}
        load_strictly(self, state, source, "Choose the model with the sizes of these weights.")
        note = f", the target encoder its {target!r}" if self.follows else ""
        return f"loaded {len(weights)} tensors from {source}: the encoder is its {which!r}{note}"

    def save_published(self, folder: str | Path, which: str = "encoder") -> None:
        """Writes a folder that transformers' ``VJEPA2Model.from_pretrained`` loads.

        Args:
            folder: must not exist, or be empty.
            which: ``"encoder"`` or ``"target_encoder"``: ``VJEPA2Model`` has one encoder.

        Raises:
            FileExistsError: the folder is a file, or not empty.
            ValueError: ``VJEPA2Model`` cannot represent the model; the message names the setting.
        """
        write_folder(folder, self.config, convert.to_huggingface(self.state_dict(), which), stem=TRANSFORMERS)

    @property
    def config(self) -> dict[str, Any]:
        """Settings of this model as ``config.json`` of transformers' ``VJEPA2Model`` holds them.

        Raises:
            ValueError: ``VJEPA2Model`` cannot represent the model; the message names the setting.
        """
        encoder, predictor, state = self.encoder, self.predictor, self.state_dict()
        if not isinstance(encoder, vit.VisionTransformer):
            raise ValueError(f"model.encoder={type(encoder).__name__} must be a VisionTransformer for VJEPA2Model.")
        turn, predictor_turn = encoder.rope, predictor.rope
        settings = {
            "encoder.positions": (encoder.position_kind, "rope_3d"),
            "predictor_positions": ("sincos_3d" if predictor_turn is None else "rope_3d", "rope_3d"),
            "encoder.rope_quirk": (turn is not None and turn.quirk, True),
            "rope_quirk": (predictor_turn is not None and predictor_turn.quirk, True),
            "encoder.qkv_bias": (vit.qkv_bias(state, "encoder.blocks.0"), "qkv"),
            "encoder.final_norm": (isinstance(encoder.norm, nn.LayerNorm), True),
            "predictor_context": (predictor.proj_context is not None, False),
            "teacher.embed_dim": (predictor.proj.out_features, encoder.embed_dim),
        }
        check_layout("VJEPA2Model", {f"model.{key}": values for key, values in settings.items()})
        assert turn is not None
        assert predictor_turn is not None
        sizes = convert.settings_of_weights(state, "the model")
        return convert.CONSTANTS | {
            **sizes,
            "architectures": ["VJEPA2Model"],
            "model_type": "vjepa2",
            "frames_per_clip": encoder.video_size[1],
            "crop_size": encoder.video_size[2],
            "num_attention_heads": sizes["hidden_size"] // turn.head_dim,
            "pred_num_attention_heads": sizes["pred_hidden_size"] // predictor_turn.head_dim,
        }


def encoder_of(
    published: convert.Published,
    weights: str | Path,
    num_frames: int | None = None,
    image_size: int | None = None,
    positions: str | None = None,
    num_heads: int | None = None,
) -> vit.VisionTransformer:
    """Builds and loads the encoder of published weights.

    Args:
        published: the weights.
        weights: their origin, for error messages.
        num_frames, image_size: size of the clips. By default that in ``config.json``; without one, 16 frames of the
            size of the position table for V-JEPA, and 64 frames for V-JEPA 2, of which ``image_size`` is required.
        positions: ``"sincos_3d"`` (V-JEPA) or ``"rope_3d"`` (V-JEPA 2). By default ``"rope_3d"`` for transformers and
            for 10 mask tokens, and ``"sincos_3d"`` for files with position tables; required otherwise. Position tables
            in files of V-JEPA 2 are ignored, as in the original.
        num_heads: that in ``config.json``; required for weights without one.

    Raises:
        ValueError: the number of heads, positions or image size is unknown, or the number of heads contradicts the
            config.
    """
    config, tensors = published.config, convert.part(published.state, "encoder")
    if (positions := positions or published.positions) is None:
        raise ValueError(
            f"{weights} has no position tables and not the 10 mask tokens of V-JEPA 2, so that its positions are "
            "unknown: pass positions='sincos_3d' (V-JEPA) or 'rope_3d' (V-JEPA 2)."
        )
    is_rope = positions == "rope_3d"
    num_frames = num_frames or config.get("frames_per_clip") or (64 if is_rope else 16)
    image_size = image_size or config.get("crop_size")
    if image_size is None and not is_rope:
        image_size = convert.image_size_of_tables(published.content, tensors["patch_embed.proj.weight"], num_frames)
    if image_size is None:
        raise ValueError(
            f"{weights} has no config.json, and its tensors do not determine the size of the frames: pass "
            "image_size=…: 256 or 384 for the published V-JEPA 2, 224 or 384 for V-JEPA."
        )
    width = len(tensors["patch_embed.proj.weight"])
    heads = num_heads_of(config, num_heads, width, weights, PUBLISHED_HEADS)
    return vit.VisionTransformer.from_weights(
        tensors, weights, heads, num_frames, image_size, positions=positions, rope_quirk=is_rope
    )
