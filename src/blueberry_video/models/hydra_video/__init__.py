"""Hydra Video: state-space video backbone, bidirectional within frames and causal across frames."""

from blueberry_video.models.hydra_video.model import HydraVideo
from blueberry_video.models.hydra_video.tokenizer import HydraVideoTokenizer

__all__ = ["HydraVideo", "HydraVideoTokenizer"]
