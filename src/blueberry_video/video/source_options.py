"""Limits and permissions for video sources."""

from dataclasses import dataclass

from blueberry_video.video.fetch import parse_networks
from blueberry_video.video.ranges import check_above_zero, check_between

MAX_FRAME_PIXELS = 8192 * 4352  # 8K


@dataclass(frozen=True)
class SourceOptions:
    """Limits and permissions for video sources.

    Attributes:
        max_bytes: maximum size of a file, a download, or all files of a list of frames; default 4 GiB.
        max_duration: maximum duration of a video in seconds; default one day.
        max_frame_pixels: maximum height × width of a frame; default 8192 · 4352.
        max_decoded_pixels: maximum frames × height × width decoded from one video; default 4e9.
        fetch_timeout: seconds for a whole download, from name resolution to the last byte.
        allowed_networks: CIDR blocks (``"10.0.0.0/8"``) that may be called in addition to public ones; default none.
        frames_fps: frame rate of lists and folders of frames; None where it is unknown.
    """

    max_bytes: int = 4 * 2**30
    max_duration: float = 86_400.0
    max_frame_pixels: int = MAX_FRAME_PIXELS
    max_decoded_pixels: int = 4_000_000_000
    fetch_timeout: float = 60.0
    allowed_networks: tuple[str, ...] = ()
    frames_fps: float | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "allowed_networks", tuple(self.allowed_networks))  # YAML has lists
        for key in ("max_bytes", "max_duration", "max_frame_pixels", "max_decoded_pixels", "fetch_timeout"):
            check_above_zero(True, **{key: getattr(self, key)})
        if self.frames_fps is not None:
            check_between(1e-4, 1e6, frames_fps=self.frames_fps)
        parse_networks(self.allowed_networks)
