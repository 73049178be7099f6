"""Limits and permissions of what may be handed in, for everything that takes input."""

from dataclasses import dataclass

from blueberry_video.video.fetch import parse_networks


@dataclass(frozen=True)
class SourceOptions:
    """Limits and permissions of what may be handed in.

    Attributes:
        max_bytes: of a file, a download, or all files of a list of frames; default 4 GiB.
        max_duration: seconds of a video; default a day.
        max_frame_pixels: height × width of one frame; default 8192 · 4352.
        max_decoded_pixels: frames × height × width of what is decoded of one video; default 4e9.
        fetch_timeout: seconds for a whole download, from looking up its name to its last byte.
        allowed_networks: CIDR blocks (``"10.0.0.0/8"``) that may be called besides public addresses; default none.
        frames_fps: frames a second of lists and folders of frames; None where it is not known.
    """

    max_bytes: int = 4 * 2**30
    max_duration: float = 86_400.0
    max_frame_pixels: int = 8192 * 4352
    max_decoded_pixels: int = 4_000_000_000
    fetch_timeout: float = 60.0
    allowed_networks: tuple[str, ...] = ()
    frames_fps: float | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "allowed_networks", tuple(self.allowed_networks))  # lists, where read from YAML
        for key, value in vars(self).items():
            unknown = value is None and key == "frames_fps"
            if key != "allowed_networks" and not unknown and not 0 < value < float("inf"):
                raise ValueError(f"{key}={value} must be a number above 0: raise it.")
        if self.frames_fps is not None and not 1e-4 <= self.frames_fps <= 1e6:
            raise ValueError(f"frames_fps={self.frames_fps:g} is no frame rate: use 0.0001 to 1,000,000.")
        parse_networks(self.allowed_networks)
