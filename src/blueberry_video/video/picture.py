"""A decoded frame as the picture that a player shows: RGB, turned and mirrored as the file says.

Conversion goes through FFmpeg's filter graph, as in torchcodec and the ffmpeg program, and so equals theirs to the bit
also for 10-bit, odd-sized and interlaced video, for which a bare swscale call interpolates chroma otherwise.
"""

from fractions import Fraction
from itertools import pairwise

import av
import numpy as np
import torch
from av.filter import Graph
from av.sidedata.sidedata import SideData
from av.video.frame import VideoFrame
from torch import Tensor


class ToRGB:
    """Turns frames into uint8 (H, W, 3) RGB tensors of one size.

    Args:
        size: (height, width) after rotation; frames of another size are scaled to it (bicubic), which happens where
            the picture size changes inside a video. None keeps each frame's own.
    """

    def __init__(self, size: tuple[int, int] | None = None):
        self.size = size
        self._graphs: dict[tuple, Graph] = {}

    def __call__(self, frame: VideoFrame) -> Tensor:
        turns, mirrored = orientation(frame)
        height, width = self.size or (frame.height, frame.width)
        if self.size is not None and turns % 2:
            height, width = width, height
        graph = self._graph(frame, height, width)
        graph.push(frame)
        converted = graph.pull()
        assert isinstance(converted, VideoFrame)
        pixels = converted.to_ndarray()
        if mirrored:
            pixels = pixels[:, ::-1]
        return torch.from_numpy(np.ascontiguousarray(np.rot90(pixels, k=turns)))

    def _graph(self, frame: VideoFrame, height: int, width: int) -> Graph:
        key = (frame.width, frame.height, frame.format.name, height, width)
        if key not in self._graphs:
            graph = Graph()
            graph.threads = 1
            base = frame.time_base or Fraction(1, av.time_base)
            nodes = [
                graph.add_buffer(width=frame.width, height=frame.height, format=frame.format, time_base=base),
                *([graph.add("scale", f"{width}:{height}")] if (frame.height, frame.width) != (height, width) else []),
                graph.add("format", "rgb24"),
                graph.add("buffersink"),
            ]
            for node, after in pairwise(nodes):
                node.link_to(after)
            graph.configure()
            self._graphs[key] = graph
        return self._graphs[key]


def orientation(frame: VideoFrame) -> tuple[int, bool]:
    """How a decoded picture is to be turned to be shown: (quarter turns counter-clockwise, whether mirrored left-right
    before that).

    Read from the display matrix, which also knows the mirrored pictures of front cameras; angles are rounded to
    quarters.
    """
    try:
        data = frame.side_data.get("DISPLAYMATRIX")
    except ValueError:  # PyAV does not know all kinds of side data, such as EXIF, and stumbles over them
        return round(frame.rotation / 90) % 4, False
    if not isinstance(data, SideData):
        return 0, False
    a, b, _, c, d = np.frombuffer(bytes(data), np.int32)[:5].astype(float)  # x' = ax + cy, y' = bx + dy, y downwards
    mirrored = a * d - b * c < 0
    if mirrored:  # what is left after mirroring x first
        a, b = -a, -b
    return round(np.arctan2(-b, a) / (np.pi / 2)) % 4, bool(mirrored)
