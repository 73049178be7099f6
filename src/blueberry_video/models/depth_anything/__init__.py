"""Depth Anything: depth of images and videos."""

from blueberry_video.models.depth_anything.model import DepthAnything
from blueberry_video.models.depth_anything.video import VideoDepthAnything

__all__ = ["DepthAnything", "VideoDepthAnything"]
