"""The plain video vision transformer: the encoder of VideoMAE (arXiv 2203.12602; github.com/MCG-NJU/VideoMAE).

Unusual about it: the positions are a fixed 1-D sinusoid over the flattened token index, added to the tokens and
absent from the state dict; keys have no bias; there is no class token. Parameter names are those of the original
code.
"""

import argparse
import pickle
import re
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from blueberry_video.nn.blocks import Block
from blueberry_video.nn.embeddings import TubeletEmbed
from blueberry_video.nn.encoder import Encoder
from blueberry_video.nn.positions import sinusoid_table


class VisionTransformer(Encoder):
    """Encoder of video float (B, C, T, H, W), normalised with ImageNet mean and standard deviation -> tokens (B, N,
    D).

    Args:
        image_size, num_frames, patch_size, tubelet_size, embed_dim, in_channels: see
            :class:`~blueberry_video.nn.encoder.Encoder`.
        depth: number of blocks.
        num_heads: attention heads.
        mlp_ratio: hidden over outer width of the MLPs.
        qkv_bias: which projections have a bias, see :class:`~blueberry_video.nn.attention.Attention`.
        drop_path: stochastic depth of the last block; it grows linearly from 0 at the first.
        final_norm: LayerNorm after the last block. Published fine-tuned models have none: their classifier normalises
            the mean of the tokens.

    Raises:
        ValueError: for sizes the patches do not divide, and in ``forward`` for a video of another shape than built
            for.
    """

    positions: Tensor

    def __init__(
        self,
        image_size: int = 224,
        num_frames: int = 16,
        patch_size: int = 16,
        tubelet_size: int = 2,
        embed_dim: int = 768,
        depth: int = 12,
        num_heads: int = 12,
        mlp_ratio: float = 4.0,
        in_channels: int = 3,
        qkv_bias: str = "qv",
        drop_path: float = 0.0,
        final_norm: bool = True,
    ):
        super().__init__(image_size, num_frames, patch_size, tubelet_size, embed_dim, in_channels)
        self.patch_embed = TubeletEmbed(in_channels, embed_dim, self.patch_size)
        self.register_buffer("positions", sinusoid_table(self.num_tokens, embed_dim), persistent=False)
        rates = torch.linspace(0, drop_path, depth, device="cpu").tolist()
        self.blocks = nn.ModuleList(Block(embed_dim, num_heads, mlp_ratio, qkv_bias, rate) for rate in rates)
        self.norm = nn.LayerNorm(embed_dim, eps=1e-6) if final_norm else nn.Identity()
        self.blocks.apply(init_weights)

    def forward(self, video: Tensor, keep: Tensor | None = None) -> Tensor:
        """(B, C, T, H, W) and, optionally, indices (B, N_kept) of the visible tokens -> (B, N or N_kept, D)."""
        self.check_video(video)
        x = self.patch_embed(video, keep) + (self.positions if keep is None else self.positions[keep])
        for block in self.blocks:
            x = block(x)
        return self.norm(x)


def init_weights(module: nn.Module) -> None:
    """Xavier-uniform matrices, zero biases.

    LayerNorm (1, 0), the patch convolution and the q and v biases (0) keep the values they are made with.
    """
    if isinstance(module, nn.Linear):
        nn.init.xavier_uniform_(module.weight)
        if module.bias is not None:
            nn.init.zeros_(module.bias)


def read_weights(path: str | Path) -> dict[str, Tensor]:
    """The state dict in a published or own checkpoint file, without its wrapping.

    Args:
        path: a ``.safetensors`` file, or a torch file: bare, or wrapped in ``model`` (VideoMAE), ``module``
            (DeepSpeed) or ``state_dict`` (Lightning).

    Returns:
        Tensors by name; names without the prefixes ``module.``, ``model.`` and ``backbone.``.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if the file is damaged, holds no state dict, or objects that only running code would restore.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"there are no weights at {path}: give the path of an existing file.")
    content = _read(path)
    for wrapping in ("model", "module", "state_dict"):
        if isinstance(content, dict) and isinstance(content.get(wrapping), dict):
            content = content[wrapping]
            break
    if not isinstance(content, dict) or not any(isinstance(value, Tensor) for value in content.values()):
        raise ValueError(
            f"{path} holds no state dict: expected tensors by name, bare or in 'model', 'module', 'state_dict'."
        )
    prefix = re.compile(r"^(module\.|model\.|backbone\.)+")
    return {prefix.sub("", name): value for name, value in content.items() if isinstance(value, Tensor)}


def _read(path: Path) -> object:
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        # Beside the weights, the original files keep the arguments of their run: an argparse namespace, plain data.
        with torch.serialization.safe_globals([argparse.Namespace]):
            return torch.load(path, map_location="cpu", weights_only=True)
    except (SafetensorError, pickle.UnpicklingError, EOFError, RuntimeError) as error:
        raise ValueError(
            f"{path} cannot be read: it is damaged, or holds objects that would have to run code. Give a whole file, "
            "or save its state dict alone with torch.save, in a session that trusts it."
        ) from error


def convert_huggingface_blocks(state: dict[str, Tensor], source: str, target: str) -> dict[str, Tensor]:
    """Transformer blocks of transformers' VideoMAE, ``<source>.<i>.…``, under the names of this package,
    ``<target>.<i>.…``.

    Query, key and value become one matrix. Keys have no bias; a query or value bias is read by its name in either
    layout (``query.bias`` from transformers 5, ``q_bias`` before). Unknown names stay, for a strict load to report.
    """
    ours = {
        "attention.attention.query.weight": "attn.qkv.weight",
        "attention.attention.query.bias": "attn.q_bias",
        "attention.attention.q_bias": "attn.q_bias",
        "attention.attention.value.bias": "attn.v_bias",
        "attention.attention.v_bias": "attn.v_bias",
    }
    for theirs, our in (
        ("attention.output.dense", "attn.proj"),
        ("intermediate.dense", "mlp.fc1"),
        ("output.dense", "mlp.fc2"),
        ("layernorm_before", "norm1"),
        ("layernorm_after", "norm2"),
    ):
        ours |= {f"{theirs}.{kind}": f"{our}.{kind}" for kind in ("weight", "bias")}
    converted = {}
    for name, value in state.items():
        if not name.startswith(f"{source}.") or name.endswith((".key.weight", ".value.weight")):
            continue
        index, inner = name.removeprefix(f"{source}.").split(".", 1)
        if inner == "attention.attention.query.weight":
            parts = [name.replace(".query.", f".{part}.") for part in ("query", "key", "value")]
            value = torch.cat([state[part] for part in parts if part in state])
        converted[f"{target}.{index}.{ours.get(inner, inner)}"] = value
    return converted


def convert_huggingface(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The encoder of transformers' ``VideoMAE…`` models (keys ``videomae.…`` or bare) as :class:`VisionTransformer`."""
    prefix = "videomae." if any(name.startswith("videomae.") for name in state) else ""
    state = {name.removeprefix(prefix): value for name, value in state.items() if name.startswith(prefix)}
    converted = convert_huggingface_blocks(state, "encoder.layer", "blocks")
    for name, value in state.items():
        if not name.startswith("encoder.layer."):
            name = name.replace("embeddings.patch_embeddings.projection.", "patch_embed.proj.")
            converted[re.sub("^layernorm", "norm", name)] = value
    return converted


def convert_original(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The encoder of an original VideoMAE file, or of one of this package, as a :class:`VisionTransformer`'s.

    Pre-training files keep it under ``encoder.``, fine-tuning files at the top, beside ``fc_norm.`` and ``head.``.
    """
    if "encoder.patch_embed.proj.weight" in state:
        return {name.removeprefix("encoder."): value for name, value in state.items() if name.startswith("encoder.")}
    return {name: value for name, value in state.items() if not name.startswith(("fc_norm.", "head."))}


def encoder_weights(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The encoder in a published state dict of either layout, under the names of :class:`VisionTransformer`.

    Raises:
        ValueError: if there is no VideoMAE encoder in it.
    """
    if any("embeddings.patch_embeddings" in name for name in state):
        return convert_huggingface(state)
    converted = convert_original(state)
    if "patch_embed.proj.weight" not in converted:
        some = ", ".join(list(state)[:3])
        raise ValueError(
            f"there is no VideoMAE encoder among these weights ({some}, …): expected patch_embed.proj.weight."
        )
    return converted


def head_width(width: int) -> int:
    """Published VideoMAE models have heads of 64 channels, the encoder and decoder of ViT-H of 80."""
    return 80 if width in (640, 1280) else 64


def num_blocks(state: dict[str, Tensor], prefix: str) -> int:
    """How many blocks ``<prefix>.<i>.…`` a state dict has."""
    return 1 + max(int(name[len(prefix) + 1 :].split(".")[0]) for name in state if name.startswith(f"{prefix}."))


def build_from_weights(
    weights: dict[str, Tensor], num_frames: int = 16, image_size: int = 224, num_heads: int | None = None
) -> VisionTransformer:
    """A :class:`VisionTransformer` of the size the weights have, loaded strictly.

    Args:
        weights: as :func:`encoder_weights` gives them.
        num_frames, image_size: of the clips; no weight tells them, as positions are computed.
        num_heads: no weight tells this either; by default what the published models have.

    Raises:
        RuntimeError: if a weight is missing, left over, or of another shape: each is named.
    """
    embed_dim, in_channels, tubelet_size, patch_size = weights["patch_embed.proj.weight"].shape[:4]
    encoder = VisionTransformer(
        image_size=image_size,
        num_frames=num_frames,
        patch_size=patch_size,
        tubelet_size=tubelet_size,
        embed_dim=embed_dim,
        depth=num_blocks(weights, "blocks"),
        num_heads=num_heads or embed_dim // head_width(embed_dim),
        mlp_ratio=weights["blocks.0.mlp.fc1.weight"].shape[0] / embed_dim,
        in_channels=in_channels,
        qkv_bias="qv" if "blocks.0.attn.q_bias" in weights else "none",
        final_norm="norm.weight" in weights,
    )
    encoder.load_state_dict(weights)
    return encoder


def load_encoder(encoder: nn.Module, path: str | Path) -> str:
    """Puts the encoder of a published file, or of an own run's checkpoint, into ``encoder``.

    Strict, but for one thing: a final norm that only one side has is left as it is, since fine-tuning takes the
    encoder of a pre-trained model without it.

    Returns:
        One sentence on what was loaded.

    Raises:
        ValueError: if weights are missing, left over, or of other shapes; the message names them.
    """
    weights = encoder_weights(read_weights(path))
    own = encoder.state_dict()
    norm = {name for name in weights.keys() ^ own.keys() if name.startswith("norm.")}
    missing, extra = own.keys() - weights.keys() - norm, weights.keys() - own.keys() - norm
    shapes = {name for name in own.keys() & weights.keys() if own[name].shape != weights[name].shape}
    if missing or extra or shapes:
        parts = (("missing", missing), ("left over", extra), ("of another shape", shapes))
        found = "; ".join(f"{len(names)} {what}, such as {min(names)}" for what, names in parts if names)
        raise ValueError(
            f"the weights in {path} do not fit model.encoder: {found}. Choose the model variant the file was made "
            "with, or another init_from."
        )
    encoder.load_state_dict({name: weights.get(name, value) for name, value in own.items()})
    note = f" (the final norm was left out: {', '.join(sorted(norm))})" if norm else ""
    return f"loaded {len(own)} encoder tensors from {path}{note}"
