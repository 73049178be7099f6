"""Live sources: cameras, RTSP and pipes as a bounded stream of the newest frames.

    with LiveStream("rtsp://camera.local/1", allowed_networks=("192.168.0.0/16",)) as live:
        for frame in live:
            frame.pixels, frame.seconds, live.dropped

A thread decodes as fast as frames arrive. The queue has a limit: if the reader is slower, the oldest frame in it is
dropped and counted, so that memory and delay are bounded. Frames are RGB at the size of the source or at ``size``.

FFmpeg connects to network sources itself. Their host is resolved once, checked as for downloads, and replaced by the
checked address. Open only servers that you trust: RTSP permits a server to choose the ports of its packets, which are
not checked.
"""

import os
import queue
import socket
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from ipaddress import ip_address
from pathlib import Path
from typing import Any, BinaryIO, cast
from urllib.parse import urlsplit

import av
from av.container import InputContainer
from torch import Tensor

from blueberry_video.video.errors import BrokenVideoError, FetchError, RefusedSourceError, one_line
from blueberry_video.video.fetch import is_public, parse_networks
from blueberry_video.video.picture import ToRGB
from blueberry_video.video.ranges import check_above_zero, check_at_least
from blueberry_video.video.source_options import MAX_FRAME_PIXELS

_SCHEMES = {"rtsp": "rtsp,rtp,udp,tcp", "rtp": "rtp,udp", "udp": "udp", "tcp": "tcp"}  # → protocols of FFmpeg
_CONTAINERS = ("mpegts", "matroska", "webm", "flv", "mjpeg", "h264", "hevc", "nut", "yuv4mpegpipe", "mp4", "mov", "avi")
_END = object()


@dataclass(frozen=True, eq=False)
class LiveFrame:
    """Frame of a live source: ``pixels`` uint8 (3, H, W) RGB, ``seconds`` of its timestamp, and its ``number`` among
    all decoded frames, in which gaps are dropped frames."""

    pixels: Tensor
    seconds: float
    number: int


class LiveStream:
    """Iterator over the frames of a live source, and a context manager that ends it.

    Args:
        source: ``rtsp://``, ``rtp://``, ``udp://`` or ``tcp://``; the path of a camera (``/dev/video0``) or a named
            pipe; a binary stream, such as the output of a program.
        queue_frames: frames in the queue, at least 1; if it is full, the oldest is dropped.
        size: (height, width) of the frames; None: that of the source.
        container: FFmpeg's name of the container of a pipe or stream; detected if None.
        timeout: seconds without a frame after which the source has failed.
        allowed_networks: CIDR blocks of hosts in addition to public ones.
        max_frame_pixels: maximum height · width of a frame.

    Attributes:
        decoded: frames decoded so far.
        dropped: frames of them that were dropped.

    Raises:
        RefusedSourceError: another scheme, or a host that is neither public nor allowed.
        FetchError: no frame within ``timeout``, from the iterator.
        BrokenVideoError: a source that does not open or decode, from the iterator.
    """

    def __init__(
        self,
        source: str | Path | BinaryIO,
        queue_frames: int = 8,
        size: tuple[int, int] | None = None,
        container: str | None = None,
        timeout: float = 10.0,
        allowed_networks: tuple[str, ...] = (),
        max_frame_pixels: int = MAX_FRAME_PIXELS,
    ):
        check_at_least(1, queue_frames=queue_frames)
        check_above_zero(True, timeout=timeout, max_frame_pixels=max_frame_pixels)
        if container is not None and container not in _CONTAINERS:
            raise ValueError(f"container={container!r} is not supported: use one of {', '.join(_CONTAINERS)}.")
        self.name = source if isinstance(source, str) else str(getattr(source, "name", "the stream"))
        self.name = self.name.rpartition("@")[2] if "@" in self.name else self.name  # without a password
        self.decoded = self.dropped = 0
        self._timeout, self._most_pixels, self._container = timeout, max_frame_pixels, container
        self._opened = _opened_name(source, allowed_networks) if isinstance(source, str | os.PathLike) else None
        self._stream = source
        self._frames: queue.Queue[Any] = queue.Queue(queue_frames)
        self._to_rgb, self._stop = ToRGB(size), threading.Event()
        self._failure: Exception | None = None
        self._thread = threading.Thread(target=self._decode, daemon=True, name="live stream")
        self._thread.start()

    def __enter__(self) -> "LiveStream":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Ends the thread after its current read."""
        self._stop.set()
        self._thread.join(1.0)  # a read without data ends with the timeout of FFmpeg, or with the stream of the caller

    def __iter__(self) -> Iterator[LiveFrame]:
        while True:
            try:
                frame = self._frames.get(timeout=self._timeout)
            except queue.Empty:
                raise FetchError(
                    f"{self.name} sent no frame within timeout={self._timeout:g} s: check the source, or raise it."
                ) from None
            if frame is _END:
                if self._failure is not None:
                    raise BrokenVideoError(
                        f"{self.name} ended ({one_line(self._failure)}): check the source, or set container."
                    ) from self._failure
                return
            yield frame

    def _decode(self) -> None:
        try:
            self._read()
        except (av.error.FFmpegError, OSError, ValueError) as error:
            self._failure = error  # raised by the iterator
        self._put(_END)

    def _read(self) -> None:
        name, form, options = self._opened or (None, None, {"protocol_whitelist": ""})
        target = name if name is not None else cast(BinaryIO, self._stream)
        given: dict[str, Any] = {"format": form or self._container, "options": options, "timeout": self._timeout}
        with cast(InputContainer, av.open(target, "r", **given)) as container:
            form = container.format.name
            if self._opened is None and not set(form.split(",")) & set(_CONTAINERS):
                raise ValueError(f"the container {form} is not supported")
            if not container.streams.video:
                raise ValueError("it has no video")
            stream = container.streams.video[0]
            if stream.width * stream.height > self._most_pixels:
                raise ValueError(
                    f"{stream.width}x{stream.height} pixels are above max_frame_pixels={self._most_pixels}"
                )
            for frame in container.decode(stream):
                if self._stop.is_set():
                    return
                seconds = float(frame.time) if frame.time is not None else float("nan")
                self._put(LiveFrame(self._to_rgb(frame).permute(2, 0, 1), seconds, self.decoded))
                self.decoded += 1

    def _put(self, item: Any) -> None:
        while True:
            try:
                return self._frames.put_nowait(item)
            except queue.Full:
                if item is _END:  # the frames before it are still read
                    if self._stop.wait(0.01):
                        return
                    continue
            try:
                self._frames.get_nowait()
                self.dropped += 1
            except queue.Empty:
                continue


def _opened_name(
    source: str | os.PathLike, allowed_networks: tuple[str, ...]
) -> tuple[str, str | None, dict[str, str]]:
    """Name for FFmpeg with a checked address, its input format and options."""
    text = os.fspath(source)
    scheme = text.partition("://")[0].lower() if "://" in text else ""
    if not scheme:
        path = Path(os.path.realpath(text))
        if path.is_char_device() and str(path).startswith("/dev/video"):
            return str(path), "v4l2", {}
        if path.is_fifo():
            return str(path), None, {"protocol_whitelist": "file,pipe"}
        raise RefusedSourceError(f"{text} is no camera or named pipe: pass files to stream_video.")
    if scheme not in _SCHEMES:
        raise RefusedSourceError(f"A live source with the scheme {scheme!r} is not opened: use {', '.join(_SCHEMES)}.")
    parts = urlsplit(text)
    host, networks = parts.hostname, parse_networks(allowed_networks)
    if not host or "\\" in text or any(ord(letter) <= 32 for letter in text):
        raise RefusedSourceError(f"The {scheme} URL has no valid host: write {scheme}://host:port/path.")
    try:
        found = {answer[4][0] for answer in socket.getaddrinfo(host, parts.port, type=socket.SOCK_STREAM)}
    except OSError as error:
        raise FetchError(f"The host {host} does not resolve ({error}): check the URL and the network.") from error
    for address in found:
        if not is_public(str(address)) and not any(ip_address(address) in network for network in networks):
            raise RefusedSourceError(
                f"{host} resolves to {address}, which is not a public address: nothing was sent. Add its network to "
                "allowed_networks to use this source."
            )
    address = str(min(found, key=str))
    netloc = f"[{address}]" if ":" in address else address
    netloc = f"{parts.netloc.rpartition('@')[0]}@{netloc}" if "@" in parts.netloc else netloc
    netloc = f"{netloc}:{parts.port}" if parts.port else netloc
    transport = {"rtsp_transport": "tcp"} if scheme == "rtsp" else {}
    return parts._replace(netloc=netloc).geturl(), None, {"protocol_whitelist": _SCHEMES[scheme], **transport}
