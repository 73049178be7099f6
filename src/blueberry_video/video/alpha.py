"""Alpha channels of VP8 and VP9 in WebM and Matroska: a second bitstream in the packets of the first.

Each packet has the alpha channel as the luma of a frame of the same codec in its BlockAdditional element of id 1.
FFmpeg returns it as side data, and its own decoders ignore it. Luma is alpha from 0 to 255, whatever range its
bitstream states.
"""

from collections.abc import Iterable
from typing import Final

import av
import numpy as np
from av.video.codeccontext import VideoCodecContext
from av.video.frame import VideoFrame
from av.video.stream import VideoStream

from blueberry_video.video.picture_info import has_alpha_stream

_ADDITIONAL: Final = "matroska_block_additional"
_ALPHA_ID = 1  # of BlockAddID, which FFmpeg puts before the data in 8 bytes


class AlphaDecoder:
    """Decoder of the alpha channel beside that of the colors. Does nothing for streams without a second bitstream.

    Args:
        stream: of PyAV.
    """

    def __init__(self, stream: VideoStream):
        self._stream = stream
        self._context: VideoCodecContext | None = None
        self._planes: dict[int, np.ndarray] = {}  # by timestamp, of frames that the color decoder still holds
        if has_alpha_stream(stream):
            context = VideoCodecContext.create(stream.codec_context.name, "r")
            assert isinstance(context, VideoCodecContext)
            self._context = context
            self._context.thread_count = 1  # returns each frame at once

    def feed(self, packet: av.Packet) -> None:
        """Decodes the alpha channel of a packet; call it before the colors are decoded.

        Raises:
            av.error.InvalidDataError: the alpha channel is damaged.
        """
        if self._context is None or packet.pts is None or not packet.has_sidedata(_ADDITIONAL):
            return
        data = bytes(packet.get_sidedata(_ADDITIONAL))
        if int.from_bytes(data[:8], "big") != _ALPHA_ID:
            return
        for frame in self._context.decode(av.Packet(data[8:])):
            if isinstance(frame, VideoFrame):
                self._planes[packet.pts] = _luma(frame)

    def attach(self, frames: Iterable[VideoFrame]) -> list[VideoFrame]:
        """Sets ``opaque`` of decoded frames to their alpha, uint8 (H, W), where they have one; returns the frames."""
        frames = list(frames)
        for frame in frames if self._planes else ():
            if frame.pts is not None:
                frame.opaque = self._planes.get(frame.pts)
                self._planes = {pts: plane for pts, plane in self._planes.items() if pts > frame.pts}
        return frames

    def flush(self) -> None:
        """Prepares for a seek."""
        self._planes.clear()
        if self._context is not None:
            self._context.flush_buffers()


def _luma(frame: VideoFrame) -> np.ndarray:
    plane, bits = frame.planes[0], frame.format.components[0].bits
    values = np.frombuffer(memoryview(plane), np.dtype(np.uint8 if bits == 8 else "<u2"))
    values = values.reshape(plane.height, -1)[:, : plane.width]
    if bits == 8:
        return values.copy()
    most = 2**bits - 1
    return ((values.astype(np.uint32) * 255 + most // 2) // most).astype(np.uint8)
