"""Masked autoencoders of pixels: VideoMAE (arXiv 2203.12602; github.com/MCG-NJU/VideoMAE), VideoMAE V2 (arXiv
2303.16727; github.com/OpenGVLab/VideoMAEv2) and OmniMAE (arXiv 2206.08356; github.com/facebookresearch/omnivore).

The encoder runs on the visible tokens only. The input of the narrow decoder is the visible tokens followed by a mask
token for each target, *not* in raster order, since positions are added to both; it predicts the pixels of the targets.
V2 is the same network, with half of the hidden tokens as targets. In OmniMAE, the mask token and the positions have the
width of the encoder and are used *before* the projection to the decoder, which then has a bias.
"""

from pathlib import Path
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils.flop_counter import FlopCounterMode

from blueberry_video.models import vit
from blueberry_video.models.encoder import Encoder
from blueberry_video.models.masked_autoencoder.convert import convert_published, to_huggingface
from blueberry_video.nn.blocks import Block
from blueberry_video.nn.positions import PositionTables, sinusoid_table
from blueberry_video.parallel.sequence import TokenShards, active_group
from blueberry_video.weights.diffusers_folder import TRANSFORMERS, read_source, write_folder
from blueberry_video.weights.files import num_blocks
from blueberry_video.weights.load import check_config, check_layout, load_strictly, num_heads_of, origin_of_heads

PUBLISHED_HEADS = {192: "3", 384: "6", 512: "8", 640: "8"}  # width of published decoders -> heads


class MaskedAutoencoder(PositionTables):
    """Encoder of the visible tokens and decoder that predicts the pixels of the target tokens.

    Args:
        encoder: any encoder of this package.
        decoder_dim, decoder_depth, decoder_num_heads: width, number of blocks and heads of the decoder.
        mlp_ratio: ratio of the hidden width of the decoder's MLPs to ``decoder_dim``.
        qkv_bias: projections of the decoder with a bias, see :class:`~blueberry_video.nn.attention.Attention`.
        in_channels: number of channels to predict.
        mask_before_projection: decoder of OmniMAE: the mask token (initialized to zero) and the positions are used
            before the projection from encoder to decoder width, which has a bias.
        decay_mask_token: apply weight decay to the mask token, as OmniMAE, but not VideoMAE, is pre-trained.
    """

    no_weight_decay: tuple[str, ...] = ("mask_token",)
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
        decay_mask_token: bool = False,
    ):
        super().__init__()
        if decay_mask_token:
            self.no_weight_decay = ()
        self.encoder, self.mask_before_projection = encoder, mask_before_projection
        self.decoder_num_heads, self.in_channels = decoder_num_heads, in_channels
        self.encoder_to_decoder = nn.Linear(encoder.embed_dim, decoder_dim, bias=mask_before_projection)
        width = encoder.embed_dim if mask_before_projection else decoder_dim
        self.mask_token = nn.Parameter(torch.zeros(1, 1, width))
        t, h, w = encoder.patch_size
        patch_dim = in_channels * t * h * w
        self.decoder = Decoder(decoder_dim, decoder_depth, decoder_num_heads, mlp_ratio, qkv_bias, patch_dim)
        self.register_tables()
        self.init_weights()

    def tables(self) -> dict[str, Tensor]:
        projection = self.encoder_to_decoder
        width = projection.in_features if self.mask_before_projection else projection.out_features
        return {"decoder_positions": sinusoid_table(self.encoder.num_tokens, width)}

    def init_weights(self) -> None:
        """Initializes the parts that differ: in VideoMAE, the projection keeps the initialization of PyTorch."""
        if self.mask_before_projection:
            self.encoder_to_decoder.apply(vit.init_weights)
            nn.init.trunc_normal_(self.decoder.head.weight, std=0.02)
        else:
            nn.init.trunc_normal_(self.mask_token, std=0.02, a=-0.02, b=0.02)

    def forward(self, video: Tensor, keep: Tensor, target: Tensor) -> Tensor:
        """Predicts patches.

        Args:
            video: (B, C, T, H, W), normalized as the encoder requires.
            keep: (B, N_visible) indices of the visible tokens.
            target: (B, N_target) indices of the tokens to predict, which may include visible ones.

        Returns:
            (B, N_target, P * C): per-patch normalized pixels, with the channel as the fastest index.
        """
        return self.decode(self.encoder(video, keep), keep, target)

    def decode(self, visible: Tensor, keep: Tensor, target: Tensor) -> Tensor:
        """Predicts patches from tokens of the encoder (B, N_visible, D), see :meth:`forward`."""
        visible = visible if self.mask_before_projection else self.encoder_to_decoder(visible)
        visible = visible + self.decoder_positions[keep]
        masked = self.mask_token + self.decoder_positions[target]
        x = torch.cat([visible, masked.to(visible.dtype)], dim=1)  # (B, N_visible + N_target, width)
        return self.decoder(self.encoder_to_decoder(x) if self.mask_before_projection else x, target.shape[1])

    # ---- published weights ----

    @classmethod
    def from_published(
        cls,
        weights: str | Path,
        num_frames: int | None = None,
        image_size: int | None = None,
        num_heads: int | None = None,
        decoder_num_heads: int | None = None,
    ) -> Self:
        """Builds a pre-trained VideoMAE, VideoMAE V2 or OmniMAE of the size of published weights.

        Args:
            weights: a file in the original layout, of transformers or of a run of this package, a folder in the layout
                of transformers, or a hub id, see :func:`~blueberry_video.weights.diffusers_folder.read_source`.
            num_frames, image_size: size of the clips. By default those in the folder's ``config.json``, or 16 and 224.
            num_heads, decoder_num_heads: heads of encoder and decoder. By default those in the folder's
                ``config.json`` or the run's ``config.yaml``; required for weights without one, except
                ``decoder_num_heads`` of OmniMAE: 16 in all its published models.

        Raises:
            FileNotFoundError: a file is missing.
            ValueError: the weights have no decoder, as fine-tuned models, or other positions than the computed ones; a
                number of heads is unknown, or contradicts the config.
        """
        config, state = read_source(weights)
        is_omnimae = any(name.startswith("trunk.") for name in state) or "encoder_to_decoder.bias" in state
        state = convert_published(state, weights)
        tensors = vit.convert_original(state)
        sizes = vit.settings_of_config(config, tensors, weights, num_frames, image_size, num_heads)
        encoder = vit.VisionTransformer.from_weights(tensors, weights, **sizes, images=is_omnimae)
        decoder_dim = state["encoder_to_decoder.weight"].shape[0]
        names = ("decoder_num_heads", "decoder_num_attention_heads")
        if is_omnimae and names[1] not in config:
            decoder_num_heads = decoder_num_heads or 16
        heads = num_heads_of(config, decoder_num_heads, decoder_dim, weights, PUBLISHED_HEADS, *names)
        model = cls(
            encoder,
            decoder_dim=decoder_dim,
            decoder_depth=num_blocks(state, "decoder.blocks"),
            decoder_num_heads=heads,
            mlp_ratio=state["decoder.blocks.0.mlp.fc1.weight"].shape[0] / decoder_dim,
            qkv_bias=vit.qkv_bias(state, "decoder.blocks.0"),
            in_channels=encoder.video_size[0],
            mask_before_projection=is_omnimae,
        )
        load_strictly(model, state, weights)
        return model

    def load_published(self, weights: str | Path) -> str:
        """Loads published weights or a checkpoint of a run, see :meth:`from_published`, into this model.

        Returns:
            A sentence on what was loaded.

        Raises:
            FileNotFoundError: a file is missing.
            ValueError: tensors are missing, unexpected or of a different shape, or a number of heads differs from that
                in the folder's ``config.json``; the message names them.
        """
        config, state = read_source(weights)
        fix = "Choose the model variant of the weights."
        settings = self.encoder.published_settings | {"decoder_num_attention_heads": self.decoder_num_heads}
        check_config(self, config, settings, weights, fix)
        load_strictly(self, convert_published(state, weights), weights, fix)
        return f"loaded {len(self.state_dict())} tensors from {weights}{origin_of_heads(config, settings)}"

    def save_published(self, folder: str | Path) -> None:
        """Writes a folder that transformers' ``VideoMAEForPreTraining.from_pretrained`` loads.

        transformers computes the last LayerNorm of the decoder with an eps of 1e-5 rather than 1e-6.

        Raises:
            FileExistsError: the folder exists and is not empty.
            ValueError: a setting has no counterpart in VideoMAE; the message names key and value.
        """
        write_folder(folder, self.config(), to_huggingface(self.state_dict()), stem=TRANSFORMERS)

    def config(self) -> dict[str, Any]:
        """Settings of this model as ``config.json`` of transformers holds them.

        Raises:
            ValueError: see :meth:`save_published`.
        """
        check_layout(vit.VIDEOMAE, {"model.mask_before_projection": (self.mask_before_projection, False)})
        config, state = vit.huggingface_config(self.encoder), self.decoder.state_dict()
        settings = {
            "model.in_channels": (self.in_channels, config["num_channels"]),
            "model.qkv_bias": (vit.qkv_bias(state, "blocks.0"), "qv" if config["qv_bias"] else "none"),
        }
        check_layout(vit.VIDEOMAE, settings)
        return config | {
            "architectures": ["VideoMAEForPreTraining"],
            "decoder_hidden_size": self.encoder_to_decoder.out_features,
            "decoder_num_hidden_layers": len(self.decoder.blocks),
            "decoder_num_attention_heads": self.decoder_num_heads,
            "decoder_intermediate_size": len(state["blocks.0.mlp.fc1.bias"]),
        }


class Decoder(nn.Module):
    """Transformer blocks, LayerNorm and a linear head on the last ``num_targets`` tokens.

    Under :func:`~blueberry_video.parallel.sequence.sequence_parallel`, the tokens of the blocks are split.
    """

    block_lists: ClassVar[tuple[str, ...]] = ("blocks",)  # sharded one by one

    def __init__(self, dim: int, depth: int, num_heads: int, mlp_ratio: float, qkv_bias: str, patch_dim: int):
        super().__init__()
        self.num_heads = num_heads
        self.blocks = nn.ModuleList(Block(dim, num_heads, mlp_ratio, qkv_bias) for _ in range(depth))
        self.norm = nn.LayerNorm(dim, eps=1e-6)
        self.head = nn.Linear(dim, patch_dim)
        self.apply(vit.init_weights)

    def forward(self, x: Tensor, num_targets: int) -> Tensor:
        shards = None
        if (group := active_group()) is not None:
            key, fix = "model.decoder_num_heads", "the ratio of task.masking, for the tokens of the decoder"
            shards = TokenShards(group, 1, x.shape[1], self.num_heads, key, fix)
            x = shards.own(x)
        for block in self.blocks:
            x = block(x, shards=shards)
        x = x if shards is None else shards.gather(x)
        return self.head(self.norm(x[:, -num_targets:]))


class _Decoding(nn.Module):
    """Module that calls :meth:`MaskedAutoencoder.decode`."""

    def __init__(self, model: MaskedAutoencoder):
        super().__init__()
        self.model = model

    def forward(self, visible: Tensor, keep: Tensor, target: Tensor) -> Tensor:
        return self.model.decode(visible, keep, target)


def decoder_flops(model: MaskedAutoencoder, num_visible: int, num_targets: int) -> int:
    """Floating-point operations of a forward pass of projection and decoder on one clip; a multiply-add counts as two.

    They are counted on the meta device: on the CPU, PyTorch's counter misses the attention.
    """
    decoding = _Decoding(model)
    tensors = {name: x.to("meta") for name, x in (*decoding.named_parameters(), *decoding.named_buffers())}
    visible = torch.empty(1, num_visible, model.encoder.embed_dim, device="meta")
    keep, target = (torch.empty(1, count, dtype=torch.long, device="meta") for count in (num_visible, num_targets))
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        functional_call(decoding, tensors, (visible, keep, target))
    return counter.get_total_flops()
