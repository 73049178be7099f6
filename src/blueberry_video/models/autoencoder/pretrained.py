"""Published video autoencoders of CogVideoX, HunyuanVideo and HunyuanVideo-1.5, run by diffusers."""

from typing import Any, Literal

import torch
from torch import Tensor

from blueberry_video.models.autoencoder.base import Autoencoder, sample
from blueberry_video.nn.noise import Generator
from blueberry_video.weights.optional import import_extra, load_part

FRAME_STEPS = {"AutoencoderKLCogVideoX": 8, "AutoencoderKLHunyuanVideo": 4, "AutoencoderKLHunyuanVideo15": 4}


class PretrainedVAE(Autoencoder):
    """Frozen autoencoder of a diffusers folder.

    Args:
        path: local folder or hub id, such as ``THUDM/CogVideoX-2b``.
        subfolder: subfolder of the autoencoder; None for the folder itself.
        frame_step: see :class:`.base.Autoencoder`; defaults to 8 for CogVideoX, of which version 1.5 requires 16, and
            to 4 for HunyuanVideo.
        dtype: dtype of weights and latents. All of them overflow in float16.
        tiling: encode and decode in overlapping tiles: less memory, slightly different latents.

    Attributes:
        scale: scaling factor of the latents.

    Raises:
        ImportError: if diffusers is not installed.
        FileNotFoundError: if there is no autoencoder in the folder.
        ValueError: if it is of an unsupported class, or shifts its latents.
    """

    def __init__(
        self,
        path: str,
        subfolder: str | None = "vae",
        frame_step: int | None = None,
        dtype: Literal["float32", "bfloat16"] = "float32",
        tiling: bool = False,
    ):
        diffusers = import_extra("diffusers")
        vae = load_part(diffusers.AutoModel, path, subfolder, "autoencoder", torch_dtype=getattr(torch, dtype))
        kind, known = type(vae).__name__, vae.config
        if kind not in FRAME_STEPS:
            raise ValueError(f"{path} is a {kind}, which is not supported: choose one of {', '.join(FRAME_STEPS)}.")
        if known.get("shift_factor") or known.get("latents_mean"):
            raise ValueError(
                f"the {kind} in {path} shifts its latents, which is not supported: use a published autoencoder."
            )
        space = int(known.get("spatial_compression_ratio") or 2 ** (len(known.block_out_channels) - 1))
        time = int(known.temporal_compression_ratio)
        super().__init__(known.latent_channels, (time, space, space), frame_step or FRAME_STEPS[kind])
        self.scale, self.tiling = float(known.scaling_factor), tiling
        self.image_scale = 1 / self.scale if known.get("invert_scale_latents") else self.scale
        self.vae = vae.requires_grad_(False).eval()
        if kind == "AutoencoderKLHunyuanVideo15":  # diffusers 0.42 supports only one clip at a time
            self.vae.enable_slicing()
        if tiling:
            self.vae.enable_tiling()
            align_tiles(self.vae, space)

    def train(self, mode: bool = True) -> "PretrainedVAE":
        """Keeps evaluation mode, because the autoencoder is frozen."""
        return super().train(False)

    def encode(self, video: Tensor) -> Tensor:
        self.check(*video.shape[2:])
        with torch.no_grad():
            return self.vae.encode(video.to(self.vae.dtype)).latent_dist.parameters

    def decode(self, latents: Tensor) -> Tensor:
        with torch.no_grad():
            return self.vae.decode(latents.to(self.vae.dtype) / self.scale).sample.clamp(-1, 1)

    def normalize(self, latents: Tensor) -> Tensor:
        return latents * self.scale

    def image_latents(self, moments: Tensor, generator: Generator = None) -> Tensor:
        """Samples latents of images, which for CogVideoX-1.5-I2V are **divided** by the scale."""
        return sample(moments, generator) * self.image_scale


def align_tiles(vae: Any, stride: int) -> None:
    """Makes the tiles of an autoencoder of diffusers and their overlap the same in pixels and in latents.

    diffusers rounds both separately: if they differ, tiled videos have a different size than their latents stand for.

    Args:
        vae: has ``tile_sample_min_height``, ``tile_latent_min_height`` and ``tile_overlap_factor_height``, and the same
            for the width; otherwise it is not changed.
        stride: pixels per latent.
    """
    for axis in ("height", "width"):
        overlap = f"tile_overlap_factor_{axis}"
        if not hasattr(vae, overlap):
            continue
        factor, pixels = getattr(vae, overlap), getattr(vae, f"tile_sample_min_{axis}")
        latents = getattr(vae, f"tile_latent_min_{axis}")
        kept = int(latents * (1 - factor)), latents - int(latents * factor)
        kept_pixels = int(pixels * (1 - factor)), pixels - int(pixels * factor)
        if latents * stride == pixels and {*kept_pixels} == {kept[0] * stride} and kept[0] == kept[1]:
            continue
        latents = max(latents // 4, 1) * 4
        setattr(vae, f"tile_latent_min_{axis}", latents)
        setattr(vae, f"tile_sample_min_{axis}", latents * stride)
        setattr(vae, overlap, 0.25)  # exact in both
