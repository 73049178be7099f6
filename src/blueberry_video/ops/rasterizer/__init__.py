"""Rasterizer of 3-D Gaussians: public function, dense reference, tile-list PyTorch form and Triton kernels."""

from blueberry_video.ops.rasterizer.function import Rasterized, rasterize

__all__ = ["Rasterized", "rasterize"]
