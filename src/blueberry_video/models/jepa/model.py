"""Joint-embedding predictive architectures of video: V-JEPA (arXiv 2404.08471; github.com/facebookresearch/jepa) and
V-JEPA 2 (arXiv 2506.09985; github.com/facebookresearch/vjepa2).

Unusual about them: nothing is reconstructed. A narrow predictor, told the places of hidden tokens, guesses the features
that a slow copy of the encoder gives them when it sees the whole clip. The encoder runs on the visible tokens alone.
Each kind of mask has a mask token of its own. V-JEPA adds sine-cosine positions in the predictor, too; V-JEPA 2 turns
queries and keys, and puts visible and mask tokens in the order of their places.
"""

import copy
import re
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from blueberry_video.models import vit
from blueberry_video.models.encoder import Encoder
from blueberry_video.models.jepa.predictor import Predictor
from blueberry_video.nn.positions import sincos_3d_table
from blueberry_video.weights import files as weight_files
from blueberry_video.weights.load import load_strictly

Grid = tuple[int, int, int]  # tokens along (t, h, w)


class JEPA(nn.Module):
    """An encoder of visible tokens, a predictor, and what gives the features to predict.

    Args:
        encoder: any encoder of this package.
        predictor_dim, predictor_depth, predictor_num_heads, predictor_mlp_ratio: see
            :class:`~blueberry_video.models.jepa.predictor.Predictor`.
        num_mask_tokens: kinds of masks it is trained with.
        predictor_positions: ``"sincos_3d"`` (V-JEPA) or ``"rope_3d"`` (V-JEPA 2).
        predictor_context: predict the features of visible tokens, too, with a projection of their own (V-JEPA 2.1).
        rope_quirk: of the predictor; the encoder has its own.
        ema: take the targets from a copy of the encoder that follows it slowly (see :meth:`update_target`); without it
            and without ``teacher``, they come from the encoder itself.
        teacher: another encoder, with its patches, that gives the targets and is never trained; then ``ema`` must be
            false.

    Attributes:
        target_encoder: the copy or the teacher, in evaluation mode and without gradients; ``None`` if there is none.

    Raises:
        ValueError: for ``ema`` with a teacher, or a teacher of other patches.
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
            raise ValueError("model.ema=true copies the encoder, but model.teacher is given, too: set model.ema=false.")
        if teacher is not None and teacher.patch_size != encoder.patch_size:
            raise ValueError(
                f"the teacher's patches, {teacher.patch_size}, are not those of the encoder, {encoder.patch_size}: "
                "their tokens would not stand for the same pixels."
            )
        self.encoder = encoder
        self.target_encoder: Encoder | None = copy.deepcopy(encoder) if ema else teacher
        self.follows = ema
        self.predictor = Predictor(
            encoder.embed_dim,
            encoder.grid(encoder.video_size),
            dim=predictor_dim,
            depth=predictor_depth,
            num_heads=predictor_num_heads,
            mlp_ratio=predictor_mlp_ratio,
            num_mask_tokens=num_mask_tokens,
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
            video: (B, C, T, H, W), normalised as the encoder wants it.
            keep, target: (B, N_context) and (B, N_target), indices of the tokens to see and to predict.
            mask_index: which kind of mask this is.

        Returns:
            (B, N_target, D), to be compared with :meth:`targets` at ``target``.
        """
        return self.predictor(self.encoder(video, keep), keep, target, mask_index, self.encoder.grid(video.shape))

    def targets(self, video: Tensor, gradient: bool = False) -> Tensor:
        """What to predict: the features (B, N, D) of every token, the encoder having seen them all; LayerNorm'ed
        without affine.

        Args:
            video: (B, C, T, H, W), normalised as the encoder wants it.
            gradient: let gradients through to the encoder, where there is no other. Nothing then keeps the encoder from
                making all features alike, unless the loss does.
        """
        encoder = self.encoder if self.target_encoder is None else self.target_encoder
        with torch.set_grad_enabled(gradient and torch.is_grad_enabled()):
            tokens = encoder(video)
            return F.layer_norm(tokens, tokens.shape[-1:])

    @torch.no_grad()
    def update_target(self, momentum: float) -> None:
        """Moves the target encoder towards the encoder: target = momentum * target + (1 - momentum) * encoder.

        Args:
            momentum: in [0, 1]; V-JEPA's goes from 0.998 to 1, V-JEPA 2's is 0.99925. 0 makes the target an exact copy.

        Raises:
            ValueError: for another momentum, or if the target does not follow the encoder.
        """
        if not 0 <= momentum <= 1:
            raise ValueError(f"an EMA momentum of {momentum} is outside [0, 1]: V-JEPA 2 uses 0.99925.")
        if self.target_encoder is None or not self.follows:
            raise ValueError("there is no target encoder that follows the encoder: set model.ema=true.")
        for target, online in zip(self.target_encoder.parameters(), self.encoder.parameters(), strict=True):
            target.lerp_(online, 1 - momentum)


# ---- published weights -----------------------------------------------------------------------------------------------

HUGGINGFACE = (  # parts of names: transformers' VJEPA2Model -> ours, beside query, key and value: one matrix here
    ("encoder.embeddings.patch_embeddings.proj.", "encoder.patch_embed.proj."),
    ("predictor.embeddings.predictor_embeddings.", "predictor.embed."),
    ("predictor.embeddings.mask_tokens", "predictor.mask_tokens"),
    (".layernorm.", ".norm."),
    (".layer.", ".blocks."),
    (".attention.proj.", ".attn.proj."),
)


def convert_huggingface(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The weights of transformers' ``VJEPA2Model``, or of that in a ``VJEPA2ForVideoClassification``, as ``encoder.…``
    and ``predictor.…`` of a :class:`JEPA`. Unknown names stay, for a strict load to report.
    """
    prefix = "vjepa2." if any(name.startswith("vjepa2.") for name in state) else ""
    state = {name.removeprefix(prefix): value for name, value in state.items() if name.startswith(prefix)}
    converted = {}
    for name, value in state.items():
        if re.search(r"\.attention\.(key|value)\.", name):
            continue
        if ".attention.query." in name:
            parts = [name.replace(".query.", f".{part}.") for part in ("query", "key", "value")]
            name, value = name.replace(".attention.query.", ".attn.qkv."), torch.cat([state[part] for part in parts])
        for theirs, ours in HUGGINGFACE:
            name = name.replace(theirs, ours)
        converted[name] = value.flatten(0, 2) if name == "predictor.mask_tokens" else value  # (M, 1, 1, D) there
    return converted


def to_huggingface(state: dict[str, Tensor], which: str = "encoder") -> dict[str, Tensor]:
    """The inverse of :func:`convert_huggingface`: a :class:`JEPA`'s weights as ``VJEPA2Model`` loads them strictly.

    Its positions are always those with the quirk: a model trained without gives other features there.

    Args:
        state: the weights of a :class:`JEPA`.
        which: ``"encoder"`` or ``"target_encoder"``: it has room for one.

    Raises:
        ValueError: if there is no such encoder.
    """
    encoder = _part(state, which)
    renamed = {f"encoder.{name}": value for name, value in encoder.items()}
    renamed |= {name: value for name, value in state.items() if name.startswith("predictor.")}
    converted = {}
    for name, value in renamed.items():
        for theirs, ours in HUGGINGFACE:
            name = name.replace(ours, theirs)
        if ".attn.qkv." in name:
            for part, matrix in zip(("query", "key", "value"), value.chunk(3), strict=True):
                converted[name.replace(".attn.qkv.", f".attention.{part}.")] = matrix
        else:
            converted[name] = value[:, None, None] if name.endswith("mask_tokens") else value
    return converted


def convert_original(content: dict[str, dict[str, Tensor]], which: str) -> dict[str, Tensor]:
    """The weights in a file of the jepa or the vjepa2 repository under the names of a :class:`JEPA`.

    Position tables are left out: see :func:`check_positions`.

    Args:
        content: all that the file holds: state dicts by name.
        which: ``"encoder"``, the trained one, or ``"target_encoder"``, its average, which the papers evaluate: what
            becomes ``encoder.…``.

    Returns:
        ``encoder.…``, ``predictor.…`` and, where the file has it, ``target_encoder.…``.

    Raises:
        ValueError: if the file has no such encoder, or no predictor.
    """
    for name in (which, "predictor"):
        if not isinstance(content.get(name), dict):
            found = ", ".join(repr(key) for key, value in content.items() if isinstance(value, dict))
            raise ValueError(f"the file holds no {name!r}: choose which='encoder' or 'target_encoder'; it has {found}.")
    sources = {"encoder": which} | ({"target_encoder": "target_encoder"} if "target_encoder" in content else {})
    converted: dict[str, Tensor] = {}
    for ours, theirs in sources.items():
        weights = weight_files.without_prefixes(content[theirs])
        converted |= {f"{ours}.{name}": value for name, value in weights.items() if name != "pos_embed"}
    predictor = weight_files.without_prefixes(content["predictor"])
    tokens = sorted((name for name in predictor if name.startswith("mask_tokens.")), key=lambda name: int(name[12:]))
    converted["predictor.mask_tokens"] = torch.cat([predictor[name].flatten(0, 1) for name in tokens])
    for name, value in predictor.items():
        if name not in tokens and name != "predictor_pos_embed":
            converted[f"predictor.{name.removeprefix('predictor_')}"] = value
    return converted


def to_original(state: dict[str, Tensor], tables: Grid | None = None) -> dict[str, dict[str, Tensor]]:
    """The inverse of :func:`convert_original`, to be saved with ``torch.save``.

    Args:
        state: the weights of a :class:`JEPA`.
        tables: tokens (t, h, w) of the clips of a model with sine-cosine positions, whose tables V-JEPA's files hold.
    """
    predictor: dict[str, Tensor] = {}
    for name, value in _part(state, "predictor").items():
        if name == "mask_tokens":
            predictor |= {f"mask_tokens.{i}": token.view(1, 1, -1) for i, token in enumerate(value)}
        else:
            predictor[f"predictor_{name}"] = value
    encoders = [part for part in ("encoder", "target_encoder") if any(name.startswith(f"{part}.") for name in state)]
    content = {part: _part(state, part) for part in encoders} | {"predictor": predictor}
    if tables is not None:
        for part in encoders:
            content[part]["pos_embed"] = sincos_3d_table(tables, len(content[part]["patch_embed.proj.bias"]))[None]
        predictor["predictor_pos_embed"] = sincos_3d_table(tables, len(predictor["predictor_embed.bias"]))[None]
    return {
        part: {f"module.backbone.{name}": value for name, value in weights.items()} for part, weights in content.items()
    }


def check_positions(content: dict[str, dict[str, Tensor]], grid: Grid) -> None:
    """The position tables in an original file are the sine-cosine of this package; that one is missing does no harm.

    Args:
        content: all that the file holds.
        grid: tokens (t, h, w) of the clips that the model is built for.

    Raises:
        ValueError: for another table: computed positions would not be those the weights were trained with.
    """
    for part in ("encoder", "target_encoder", "predictor"):
        for name, table in weight_files.without_prefixes(content.get(part) or {}).items():
            if not name.endswith("pos_embed"):
                continue
            expected = sincos_3d_table(grid, table.shape[-1])
            if table.shape[1:] != expected.shape or (table[0].float() - expected).abs().max() > 1e-5:
                raise ValueError(
                    f"{part}.{name} in the file, {tuple(table.shape)}, is not the 3-D sine-cosine of a grid of {grid} "
                    "tokens: give the num_frames and image_size the weights were trained with. The model then takes "
                    "clips of other sizes, too."
                )


def read_weights(path: str | Path, which: str) -> dict[str, Tensor]:
    """``encoder.…`` and ``predictor.…`` in a file of either repository, of transformers, or of a run of this package;
    of a run that anticipates also ``head.…``.

    Args:
        path: the file.
        which: ``"encoder"`` or ``"target_encoder"``: what becomes ``encoder.…``.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if it is damaged, or has no such encoder.
    """
    content = weight_files.read_content(path)
    original = content if isinstance(content, dict) and isinstance(content.get("predictor"), dict) else None
    if original is not None:
        held = {name for name, part in original.items() if isinstance(part, dict)}
    else:
        state = weight_files.read_weights(path)
        if any("embeddings.patch_embeddings." in name for name in state):
            state = convert_huggingface(state)
        held = {name.split(".")[0] for name in state}
    if which not in held:
        others = (f"say task.weights_of={name}" for name in ("encoder", "target_encoder") if name in held)
        fix = next(others, "give a file of V-JEPA or V-JEPA 2")
        raise ValueError(f"there is no {which!r} among the weights in {path}, but {sorted(held)}: {fix}.")
    if original is not None:
        state, which = convert_original(original, which), "encoder"
    rest = {name: value for name, value in state.items() if name.startswith(("predictor.", "head."))}
    return {f"encoder.{name}": value for name, value in _part(state, which).items()} | rest


def from_published(
    path: str | Path,
    which: str,
    num_frames: int = 16,
    image_size: int = 224,
    positions: str | None = None,
    num_heads: int | None = None,
    predictor_num_heads: int | None = None,
) -> JEPA:
    """A V-JEPA or V-JEPA 2 from a file of its repository, or a V-JEPA 2 from one of transformers. Prints what it took.

    Args:
        path: a torch file with ``encoder``, ``predictor`` and ``target_encoder``, or a transformers file.
        which: ``"encoder"`` or ``"target_encoder"``: which of the file's encoders becomes :attr:`JEPA.encoder`. The
            papers evaluate the target encoder; training goes on from the encoder. A transformers file has only an
            ``"encoder"``.
        num_frames, image_size: of the clips; no weight tells them.
        positions: ``"sincos_3d"`` (V-JEPA) or ``"rope_3d"`` (V-JEPA 2). By default what the number of mask tokens
            tells: V-JEPA 2 has 10. Its files may hold position tables, too, which its models do not use.
        num_heads, predictor_num_heads: no weight tells them either; by default what the published models have.

    Returns:
        The model; its target encoder has the file's weights, or if it has none those of :attr:`JEPA.encoder`.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if it is damaged, has no such encoder, or other positions than computed ones.
    """
    content = weight_files.read_content(path)
    if not isinstance(content, dict):
        raise ValueError(f"{path} holds no state dicts: give a file of V-JEPA, or of transformers' VJEPA2Model.")
    is_huggingface = any("embeddings.patch_embeddings." in name for name in content)
    if is_huggingface and which != "encoder":
        raise ValueError(f"{path} is a transformers file, which has one encoder: which={which!r} must be 'encoder'.")
    state = convert_huggingface(content) if is_huggingface else convert_original(content, which)
    positions = positions or ("rope_3d" if len(state["predictor.mask_tokens"]) == 10 or is_huggingface else "sincos_3d")
    encoder_weights, width = _part(state, "encoder"), len(state["encoder.patch_embed.proj.bias"])
    num_heads = num_heads or width // (80 if width == 1280 else 64)
    encoder = vit.VisionTransformer.from_weights(
        encoder_weights, path, num_frames, image_size, num_heads, positions=positions, rope_quirk=positions == "rope_3d"
    )
    if positions == "sincos_3d":
        check_positions(content, encoder.grid(encoder.video_size))
    dim = len(state["predictor.embed.bias"])
    model = JEPA(
        encoder,
        predictor_dim=dim,
        predictor_depth=weight_files.num_blocks(state, "predictor.blocks"),
        predictor_num_heads=predictor_num_heads or (12 if positions == "rope_3d" else num_heads),
        predictor_mlp_ratio=len(state["predictor.blocks.0.mlp.fc1.bias"]) / dim,
        num_mask_tokens=len(state["predictor.mask_tokens"]),
        predictor_positions=positions,
        rope_quirk=positions == "rope_3d",
    )
    has_target = any(name.startswith("target_encoder.") for name in state)
    copied = {} if has_target else {f"target_encoder.{name}": value for name, value in encoder_weights.items()}
    load_strictly(model, state | copied, path)
    print(
        f"V-JEPA weights from {path}: the encoder is the file's {which!r}, the target encoder its "
        f"{'target_encoder' if has_target else which!r}; positions {positions}"
    )
    return model


def _part(state: dict[str, Tensor], part: str) -> dict[str, Tensor]:
    """The weights ``<part>.…``, without that prefix.

    Raises:
        ValueError: if there are none.
    """
    found = {name.removeprefix(f"{part}."): value for name, value in state.items() if name.startswith(f"{part}.")}
    if not found:
        raise ValueError(f"there is no {part!r} among these weights, but {sorted({n.split('.')[0] for n in state})}.")
    return found


ORIGINAL_PROBE = (  # parts of names: V-JEPA's and V-JEPA 2's probes -> ours
    ("pooler.query_tokens", "pool.query"),
    ("pooler.cross_attention_block.xattn.", "pool."),
    ("pooler.cross_attention_block.", "pool."),
    ("pooler.blocks.", "pool.blocks."),
)
HUGGINGFACE_PROBE = (  # the same of VJEPA2ForVideoClassification
    ("pooler.query_tokens", "pool.query"),
    ("pooler.cross_attention_layer.cross_attn.q_proj.", "pool.q."),
    ("pooler.cross_attention_layer.cross_attn.k_proj.", "pool.kv."),
    ("pooler.cross_attention_layer.", "pool."),
    ("pooler.self_attention_layers.", "pool.blocks."),
    (".self_attn.q_proj.", ".attn.qkv."),
    (".self_attn.out_proj.", ".attn.proj."),
    (".layer_norm", ".norm"),
)


def convert_probe(state: dict[str, Tensor], label: str) -> dict[str, Tensor]:
    """The attentive probe of an original file, or of transformers' ``VJEPA2ForVideoClassification``, under the names of
    a :class:`~blueberry_video.nn.heads.ClassificationHead` with attentive pooling and no final norm, or of an
    :class:`~blueberry_video.models.jepa.anticipator.AnticipationHead`.

    Args:
        state: its weights; what does not belong to the probe is passed over. Original files hold a list of probes, one
            a learning rate: give one of them.
        label: name for the one head of these files; those of anticipation have three: verb, noun and action.
    """
    state = weight_files.without_prefixes(state)
    converted: dict[str, Tensor] = {}
    names = HUGGINGFACE_PROBE if "classifier.weight" in state else ORIGINAL_PROBE
    for name, value in state.items():
        is_merged = re.search(r"\.(self_attn\.[kv]|cross_attn\.v)_proj\.", name)  # into one matrix, below
        if is_merged or not re.match(r"pooler\.|linear\.|((verb|noun|action)_)?classifier\.", name):
            continue
        if ".self_attn.q_proj." in name:
            value = torch.cat([state[name.replace(".q_proj.", f".{part}_proj.")] for part in "qkv"])
        elif ".cross_attn.k_proj." in name:
            value = torch.cat([state[name.replace(".k_proj.", f".{part}_proj.")] for part in "kv"])
        for theirs, ours in names:
            name = name.replace(theirs, ours)
        name = re.sub(r"^(verb|noun|action)_classifier", r"linear.\1", name)
        converted[re.sub(r"^(linear\b(?=\.(weight|bias)$)|classifier)", f"linear.{label}", name)] = value
    return converted
