"""State-space scans: a public function each, its dense definition, its PyTorch and its Triton form."""

from blueberry_video.ops.scan import ssd, ssd_step, video_ssd

__all__ = ["ssd", "ssd_step", "video_ssd"]
