"""Video autoencoders of latent diffusion."""

from blueberry_video.models.autoencoder.base import Autoencoder, Pixels
from blueberry_video.models.autoencoder.causal_vae import CausalVideoVAE
from blueberry_video.models.autoencoder.pretrained import PretrainedVAE

__all__ = ["Autoencoder", "CausalVideoVAE", "Pixels", "PretrainedVAE"]
