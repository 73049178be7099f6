"""Spool: video encoder with frame-local temporal attention and learned context frames."""

from blueberry_video.models.spool.model import Spool

__all__ = ["Spool"]
