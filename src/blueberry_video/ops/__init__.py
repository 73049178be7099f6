"""State-space scans and the rasterizer of 3-D Gaussians: public functions, dense references, PyTorch backends for the
CPU and Triton kernels."""

from blueberry_video.ops.rasterizer import Rasterized, rasterize
from blueberry_video.ops.scan import ssd, ssd_step, video_ssd

__all__ = ["Rasterized", "rasterize", "ssd", "ssd_step", "video_ssd"]
