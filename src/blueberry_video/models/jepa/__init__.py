"""V-JEPA (arXiv 2404.08471), V-JEPA 2 and V-JEPA 2-AC (arXiv 2506.09985)."""

from blueberry_video.models.jepa.anticipator import Anticipator
from blueberry_video.models.jepa.model import JEPA
from blueberry_video.models.jepa.multi_level import MultiLevelEncoder
from blueberry_video.models.jepa.world_model import WorldModel

__all__ = ["JEPA", "Anticipator", "MultiLevelEncoder", "WorldModel"]
