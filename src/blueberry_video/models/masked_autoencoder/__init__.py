"""VideoMAE (arXiv 2203.12602), VideoMAE V2 (arXiv 2303.16727) and OmniMAE (arXiv 2206.08356)."""

from blueberry_video.models.masked_autoencoder.model import MaskedAutoencoder

__all__ = ["MaskedAutoencoder"]
