"""State-space scans: public functions, a dense reference, a chunked PyTorch backend and Triton kernels."""

from blueberry_video.ops.scan import ssd, ssd_step, video_ssd

__all__ = ["ssd", "ssd_step", "video_ssd"]
