"""Masked autoencoders of pixels: VideoMAE (arXiv 2203.12602; github.com/MCG-NJU/VideoMAE), VideoMAE V2 (arXiv
2303.16727; github.com/OpenGVLab/VideoMAEv2) and OmniMAE (arXiv 2206.08356; github.com/facebookresearch/omnivore).

Unusual about them: the encoder runs on the visible tokens only; the narrow decoder gets the visible tokens first and a
mask token for every place to predict after them, *not* put back in raster order (positions tell the places), and
predicts the last ones. V2 is the same network, asked for half of the places. OmniMAE's mask token and positions have
the width of the encoder and come in *before* the projection to the decoder, which then has a bias.
"""

from pathlib import Path

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils.flop_counter import FlopCounterMode

from blueberry_video.models import vit
from blueberry_video.models.encoder import Encoder
from blueberry_video.nn.blocks import Block
from blueberry_video.nn.positions import sinusoid_table
from blueberry_video.weights import files as weight_files
from blueberry_video.weights.load import load_strictly


class MaskedAutoencoder(nn.Module):
    """An encoder of visible tokens and a decoder that predicts the pixels of others.

    Args:
        encoder: any encoder of this package.
        decoder_dim, decoder_depth, decoder_num_heads: width, blocks and heads of the decoder.
        mlp_ratio: hidden over outer width of the decoder's MLPs.
        qkv_bias: which projections of the decoder have a bias.
        in_channels: colour channels to predict.
        mask_before_projection: OmniMAE's decoder: the mask token, zero at the start, and the positions are put in
            before the projection from encoder to decoder width, and the projection has a bias.
    """

    no_weight_decay = ("mask_token",)
    decoder_positions: Tensor

    def __init__(
        self,
        encoder: Encoder,
        decoder_dim: int = 384,
        decoder_depth: int = 4,
        decoder_num_heads: int = 6,
        mlp_ratio: float = 4.0,
        qkv_bias: str = "qv",
        in_channels: int = 3,
        mask_before_projection: bool = False,
    ):
        super().__init__()
        self.encoder, self.mask_before_projection = encoder, mask_before_projection
        self.encoder_to_decoder = nn.Linear(encoder.embed_dim, decoder_dim, bias=mask_before_projection)
        width = encoder.embed_dim if mask_before_projection else decoder_dim
        self.mask_token = nn.Parameter(torch.zeros(1, 1, width))
        t, h, w = encoder.patch_size
        patch_dim = in_channels * t * h * w
        self.decoder = Decoder(decoder_dim, decoder_depth, decoder_num_heads, mlp_ratio, qkv_bias, patch_dim)
        self.register_buffer("decoder_positions", sinusoid_table(encoder.num_tokens, width), persistent=False)
        self.init_weights()

    def init_weights(self) -> None:
        """What differs between the originals: VideoMAE leaves the projection as torch makes it."""
        if self.mask_before_projection:
            self.encoder_to_decoder.apply(vit.init_weights)
            nn.init.trunc_normal_(self.decoder.head.weight, std=0.02)
        else:
            nn.init.trunc_normal_(self.mask_token, std=0.02, a=-0.02, b=0.02)

    def forward(self, video: Tensor, keep: Tensor, target: Tensor) -> Tensor:
        """Predicts patches.

        Args:
            video: (B, C, T, H, W), normalised as the encoder wants it.
            keep: (B, N_visible) indices of the tokens the encoder sees.
            target: (B, N_target) indices of the tokens to predict, also such as the encoder sees.

        Returns:
            (B, N_target, P * C): per-patch normalised pixels, the channel running fastest.
        """
        return self.decode(self.encoder(video, keep), keep, target)

    def decode(self, visible: Tensor, keep: Tensor, target: Tensor) -> Tensor:
        """The decoder alone: the encoder's tokens (B, N_visible, D) -> (B, N_target, P * C), see :meth:`forward`."""
        visible = visible if self.mask_before_projection else self.encoder_to_decoder(visible)
        visible = visible + self.decoder_positions[keep]
        asked = self.mask_token + self.decoder_positions[target]
        x = torch.cat([visible, asked.to(visible.dtype)], dim=1)  # (B, N_visible + N_target, width)
        return self.decoder(self.encoder_to_decoder(x) if self.mask_before_projection else x, target.shape[1])


class Decoder(nn.Module):
    """Transformer blocks, LayerNorm and a linear head that reads the last ``num_targets`` tokens."""

    def __init__(self, dim: int, depth: int, num_heads: int, mlp_ratio: float, qkv_bias: str, patch_dim: int):
        super().__init__()
        self.blocks = nn.ModuleList(Block(dim, num_heads, mlp_ratio, qkv_bias) for _ in range(depth))
        self.norm = nn.LayerNorm(dim, eps=1e-6)
        self.head = nn.Linear(dim, patch_dim)
        self.apply(vit.init_weights)

    def forward(self, x: Tensor, num_targets: int) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x[:, -num_targets:]))


class _Decoding(nn.Module):
    """A masked autoencoder of which only the decoder is called."""

    def __init__(self, model: MaskedAutoencoder):
        super().__init__()
        self.model = model

    def forward(self, visible: Tensor, keep: Tensor, target: Tensor) -> Tensor:
        return self.model.decode(visible, keep, target)


def decoder_flops(model: MaskedAutoencoder, num_visible: int, num_targets: int) -> int:
    """Floating-point operations of projection and decoder on one clip, forward; a multiply-add is two.

    Counted on shapes alone, which takes no time: on the CPU, torch's counter would miss the attention.
    """
    decoding = _Decoding(model)
    tensors = {name: x.to("meta") for name, x in (*decoding.named_parameters(), *decoding.named_buffers())}
    visible = torch.empty(1, num_visible, model.encoder.embed_dim, device="meta")
    keep, target = (torch.empty(1, count, dtype=torch.long, device="meta") for count in (num_visible, num_targets))
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        functional_call(decoding, tensors, (visible, keep, target))
    return counter.get_total_flops()


def convert_original(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The weights of an original VideoMAE or VideoMAE V2 under the names of :class:`MaskedAutoencoder`: the same."""
    return dict(state)


def to_original(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The weights of a :class:`MaskedAutoencoder` as the original VideoMAE and VideoMAE V2 name them.

    Raises:
        ValueError: if they are OmniMAE's.
    """
    _check_is_videomae(state)
    return dict(state)


def convert_huggingface(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The weights of transformers' ``VideoMAEForPreTraining`` under the names of :class:`MaskedAutoencoder`."""
    converted = {f"encoder.{name}": value for name, value in vit.convert_huggingface(state).items()}
    converted |= vit.convert_huggingface_blocks(state, "decoder.decoder_layers", "decoder.blocks")
    renamed = ("videomae.", "decoder.decoder_layers.")
    return converted | {name: value for name, value in state.items() if not name.startswith(renamed)}


def to_huggingface(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The inverse of :func:`convert_huggingface`, as ``VideoMAEForPreTraining`` of transformers 5 loads it strictly.

    Its ``config.use_mean_pooling`` must be false, which is its name for a LayerNorm after the encoder.

    Raises:
        ValueError: if the weights are OmniMAE's.
    """
    _check_is_videomae(state)
    converted = vit.to_huggingface(vit.convert_original(state))
    converted |= vit.to_huggingface_blocks(state, "decoder.blocks", "decoder.decoder_layers")
    renamed = ("encoder.", "decoder.blocks.")
    return converted | {name: value for name, value in state.items() if not name.startswith(renamed)}


def _check_is_videomae(state: dict[str, Tensor]) -> None:
    if "encoder_to_decoder.bias" in state or "encoder.blocks.0.attn.qkv.bias" in state:
        raise ValueError(
            "these weights are of OmniMAE's kind (encoder_to_decoder.bias, or a bias on the keys), which VideoMAE "
            "cannot hold: use to_omnimae."
        )


OMNIMAE = {  # the prefixes of all that is not the encoder: theirs -> ours
    "trunk.decoder.decoder_embed.": "encoder_to_decoder.",
    "trunk.decoder.decoder_blocks.": "decoder.blocks.",
    "trunk.decoder.norm.": "decoder.norm.",
    "head.": "decoder.head.",
}


def convert_omnimae(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The weights of a pre-trained OmniMAE (``trunk.…``, ``head.…``) under the names of :class:`MaskedAutoencoder`.

    Raises:
        ValueError: if its positions are not the sinusoids that this package computes.
    """
    vit.check_positions(state, "trunk.decoder.pos_embed")
    converted = {f"encoder.{name}": value for name, value in vit.convert_omnimae(state).items()}
    for name, value in state.items():
        if name == "trunk.mask_token":
            converted["mask_token"] = value.view(1, 1, -1)  # (1, D) there
        elif name.startswith(("trunk.decoder.", "head.")) and name != "trunk.decoder.pos_embed":
            converted[_renamed(name.replace("head.projector.", "head."), OMNIMAE)] = value
    return converted


def to_omnimae(state: dict[str, Tensor], num_frames: int = 16, image_size: int = 224) -> dict[str, Tensor]:
    """The inverse of :func:`convert_omnimae`, with the two position tables, as the original's model loads it strictly.

    Args:
        state: the weights of a :class:`MaskedAutoencoder`.
        num_frames, image_size: of its clips, which tell the length of the tables.

    Raises:
        ValueError: if the weights are VideoMAE's.
    """
    if "encoder_to_decoder.bias" not in state:
        raise ValueError(
            "encoder_to_decoder.bias is missing: OmniMAE's decoder is made with mask_before_projection=true, this one "
            "was not. Use to_original or to_huggingface."
        )
    converted = vit.to_omnimae(vit.convert_original(state), num_frames, image_size)
    converted["trunk.decoder.pos_embed"] = converted["trunk.pos_embed"].clone()
    converted["trunk.mask_token"] = state["mask_token"].view(1, -1)
    theirs = {ours: their for their, ours in OMNIMAE.items()}
    rest = [name for name in state if name != "mask_token" and not name.startswith("encoder.")]
    return converted | {_renamed(name, theirs): state[name] for name in rest}


def _renamed(name: str, prefixes: dict[str, str]) -> str:
    """``name`` with its prefix replaced; as it is, if it has none of them."""
    found = next((prefix for prefix in prefixes if name.startswith(prefix)), "")
    return prefixes.get(found, "") + name.removeprefix(found)


def from_published(
    path: str | Path,
    num_frames: int = 16,
    image_size: int = 224,
    num_heads: int | None = None,
    decoder_num_heads: int | None = None,
) -> MaskedAutoencoder:
    """A pre-trained VideoMAE, VideoMAE V2 or OmniMAE from an original or a transformers file, or from a run of this
    package; its variant is read off the shapes of the weights.

    Args:
        path: see :func:`~blueberry_video.weights.files.read_weights`.
        num_frames, image_size: of the clips; no weight tells them.
        num_heads, decoder_num_heads: of encoder and decoder; by default what the published models have.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if the file has no decoder, such as a fine-tuned model, or other positions than computed ones.
    """
    state = weight_files.read_weights(path)
    is_omnimae = any(name.startswith("trunk.") for name in state) or "encoder_to_decoder.bias" in state  # or ours
    if any(name.startswith("trunk.") for name in state):
        state = convert_omnimae(state)
    elif any(name.startswith("videomae.") for name in state):
        state = convert_huggingface(state)
    if "encoder_to_decoder.weight" not in state:
        raise ValueError(
            f"{path} holds no VideoMAE decoder (encoder_to_decoder.weight is missing) and none of OmniMAE "
            "(trunk.decoder.decoder_embed.weight), as fine-tuned models do: load it with "
            "blueberry_video.models.classifier.from_published, or give its path as init_from to take the encoder."
        )
    encoder = vit.VisionTransformer.from_weights(
        vit.convert_original(state), path, num_frames, image_size, num_heads, is_omnimae
    )
    decoder_dim = state["encoder_to_decoder.weight"].shape[0]
    published_heads = 16 if is_omnimae else decoder_dim // vit.head_width(decoder_dim)
    model = MaskedAutoencoder(
        encoder,
        decoder_dim=decoder_dim,
        decoder_depth=weight_files.num_blocks(state, "decoder.blocks"),
        decoder_num_heads=decoder_num_heads or published_heads,
        mlp_ratio=state["decoder.blocks.0.mlp.fc1.weight"].shape[0] / decoder_dim,
        qkv_bias=vit.qkv_bias(state, "decoder.blocks.0"),
        in_channels=encoder.video_size[0],
        mask_before_projection=is_omnimae,
    )
    load_strictly(model, state, path)
    return model
