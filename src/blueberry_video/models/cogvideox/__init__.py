"""CogVideoX: text-to-video and image-to-video diffusion transformer (arXiv 2408.06072)."""

from blueberry_video.models.cogvideox.model import CogVideoX

__all__ = ["CogVideoX"]
