"""VideoMAE: a masked autoencoder for video (Tong et al., arXiv 2203.12602; github.com/MCG-NJU/VideoMAE).

Unusual about it: the encoder runs on the visible tokens only; the narrow decoder gets the visible tokens first and a
mask token for every hidden place after them, *not* put back in raster order (positions tell the places), and predicts
the last ones.
"""

from pathlib import Path

import torch
from torch import Tensor, nn

from blueberry_video.models import vit
from blueberry_video.nn.blocks import Block
from blueberry_video.nn.encoder import Encoder
from blueberry_video.nn.positions import sinusoid_table


class MaskedAutoencoder(nn.Module):
    """An encoder of visible tokens and a decoder that predicts the pixels of the hidden ones.

    Args:
        encoder: any encoder of this package.
        decoder_dim, decoder_depth, decoder_num_heads: width, blocks and heads of the decoder.
        mlp_ratio: hidden over outer width of the decoder's MLPs.
        qkv_bias: which projections of the decoder have a bias.
        in_channels: colour channels to predict.
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
    ):
        super().__init__()
        self.encoder = encoder
        self.encoder_to_decoder = nn.Linear(encoder.embed_dim, decoder_dim, bias=False)
        self.mask_token = nn.Parameter(torch.zeros(1, 1, decoder_dim))
        t, h, w = encoder.patch_size
        patch_dim = in_channels * t * h * w
        self.decoder = Decoder(decoder_dim, decoder_depth, decoder_num_heads, mlp_ratio, qkv_bias, patch_dim)
        self.register_buffer("decoder_positions", sinusoid_table(encoder.num_tokens, decoder_dim), persistent=False)
        nn.init.trunc_normal_(self.mask_token, std=0.02, a=-0.02, b=0.02)

    def forward(self, video: Tensor, keep: Tensor, target: Tensor) -> Tensor:
        """Predicts hidden patches.

        Args:
            video: (B, C, T, H, W), normalised as the encoder wants it.
            keep: (B, N_visible) indices of the tokens the encoder sees.
            target: (B, N_target) indices of the tokens to predict.

        Returns:
            (B, N_target, P * C): per-patch normalised pixels, the channel running fastest.
        """
        visible = self.encoder_to_decoder(self.encoder(video, keep)) + self.decoder_positions[keep]
        hidden = self.mask_token + self.decoder_positions[target]
        x = torch.cat([visible, hidden.to(visible.dtype)], dim=1)  # (B, N_visible + N_target, decoder_dim)
        return self.decoder(x, num_targets=target.shape[1])


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


def convert_huggingface(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The weights of transformers' ``VideoMAEForPreTraining`` under the names of :class:`MaskedAutoencoder`."""
    converted = {f"encoder.{name}": value for name, value in vit.convert_huggingface(state).items()}
    converted |= vit.convert_huggingface_blocks(state, "decoder.decoder_layers", "decoder.blocks")
    renamed = ("videomae.", "decoder.decoder_layers.")
    return converted | {name: value for name, value in state.items() if not name.startswith(renamed)}


def from_published(
    path: str | Path,
    num_frames: int = 16,
    image_size: int = 224,
    num_heads: int | None = None,
    decoder_num_heads: int | None = None,
) -> MaskedAutoencoder:
    """A pre-trained VideoMAE from an original or a transformers file; its variant is read off the shapes of the
    weights.

    Args:
        path: see :func:`~blueberry_video.models.vit.read_weights`.
        num_frames, image_size: of the clips; no weight tells them.
        num_heads, decoder_num_heads: of encoder and decoder; by default what the published models have.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if the file has no decoder, such as a fine-tuned model.
        RuntimeError: if a weight is missing, left over, or of another shape: each is named.
    """
    state = vit.read_weights(path)
    if "encoder_to_decoder.weight" not in state:
        raise ValueError(
            f"{path} holds no VideoMAE decoder (encoder_to_decoder.weight is missing), as fine-tuned models do: "
            "load it with blueberry_video.models.classifier.from_published, or give its path as init_from to take "
            "the encoder."
        )
    if any(name.startswith("videomae.") for name in state):
        state = convert_huggingface(state)
    encoder = vit.build_from_weights(vit.convert_original(state), num_frames, image_size, num_heads)
    decoder_dim = state["encoder_to_decoder.weight"].shape[0]
    model = MaskedAutoencoder(
        encoder,
        decoder_dim=decoder_dim,
        decoder_depth=vit.num_blocks(state, "decoder.blocks"),
        decoder_num_heads=decoder_num_heads or decoder_dim // vit.head_width(decoder_dim),
        mlp_ratio=state["decoder.blocks.0.mlp.fc1.weight"].shape[0] / decoder_dim,
        qkv_bias="qv" if "decoder.blocks.0.attn.q_bias" in state else "none",
        in_channels=encoder.video_size[0],
    )
    model.load_state_dict(state)
    return model
