"""blueberry-video: exact video models, one training loop, one experiment folder."""

from typing import Any

__version__ = "0.1.0"
__all__ = ["load_encoder", "load_run"]


def __getattr__(name: str) -> Any:
    if name == "load_run":  # imports torch
        from blueberry_video.trained_model import load_run

        return load_run
    if name == "load_encoder":
        from blueberry_video.pretrained_encoder import load_encoder

        return load_encoder
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
