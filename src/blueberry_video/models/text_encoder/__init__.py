"""Text encoders of text-to-video models."""

from blueberry_video.models.text_encoder.base import TextEncoder, TextTokens
from blueberry_video.models.text_encoder.pretrained import HunyuanText, T5Text
from blueberry_video.models.text_encoder.words import WordText

__all__ = ["HunyuanText", "T5Text", "TextEncoder", "TextTokens", "WordText"]
