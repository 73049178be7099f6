"""Depth Anything: depth of images and videos."""

from blueberry_video.models.depth_anything.model import DepthAnything

__all__ = ["DepthAnything"]
