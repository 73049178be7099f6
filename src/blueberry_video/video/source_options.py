"""Limits and permissions for video sources."""

from dataclasses import dataclass, field

from blueberry_video.video.fetch import Access, parse_networks
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
        fetch_timeout: seconds for a whole download, or for all frames of a list, from name resolution to the last byte.
        fetch_retries: further attempts if a server answers 429 or 503, within ``fetch_timeout``.
        request_headers: headers of downloads, such as a cookie.
        token: sent as ``Authorization: Bearer …``.
        token_hosts: the only hosts that receive ``token`` and ``request_headers``, before and after redirects, over
            https or in ``allowed_networks``: ``"videos.example.com"``, or with a port.
        allowed_networks: CIDR blocks (``"10.0.0.0/8"``) that may be called in addition to public ones; default none.
        frames_fps: frame rate of lists and folders of frames; None where it is unknown.
    """

    max_bytes: int = 4 * 2**30
    max_duration: float = 86_400.0
    max_frame_pixels: int = MAX_FRAME_PIXELS
    max_decoded_pixels: int = 4_000_000_000
    fetch_timeout: float = 60.0
    fetch_retries: int = 3
    request_headers: dict[str, str] = field(default_factory=dict, repr=False)
    token: str | None = field(default=None, repr=False)
    token_hosts: tuple[str, ...] = ()
    allowed_networks: tuple[str, ...] = ()
    frames_fps: float | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "allowed_networks", tuple(self.allowed_networks))  # YAML has lists
        for key in ("max_bytes", "max_duration", "max_frame_pixels", "max_decoded_pixels", "fetch_timeout"):
            check_above_zero(True, **{key: getattr(self, key)})
        if self.frames_fps is not None:
            check_between(1e-4, 1e6, frames_fps=self.frames_fps)
        check_between(0, 100, fetch_retries=self.fetch_retries)
        object.__setattr__(self, "token_hosts", tuple(self.token_hosts))
        parse_networks(self.allowed_networks)
        _ = self.access  # validates the headers

    @property
    def access(self) -> Access:
        """Request headers of downloads and the hosts that receive them."""
        token = {} if self.token is None else {"Authorization": f"Bearer {self.token}"}
        return Access({**self.request_headers, **token}, self.token_hosts)
