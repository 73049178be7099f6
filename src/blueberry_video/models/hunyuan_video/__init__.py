"""HunyuanVideo and HunyuanVideo-1.5: text-to-video and image-to-video diffusion transformers (arXiv 2412.03603)."""

from blueberry_video.models.hunyuan_video.model import HunyuanVideo
from blueberry_video.models.hunyuan_video.model_15 import HunyuanVideo15

__all__ = ["HunyuanVideo", "HunyuanVideo15"]
