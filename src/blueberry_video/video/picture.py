"""Conversion of decoded frames to RGB, rotated and mirrored by the display matrix of the file.

Conversion uses FFmpeg's filter graph, like torchcodec and the ffmpeg program, and is bit-identical to both, also for
10-bit, odd-sized and interlaced video, where a direct swscale call interpolates chroma differently.
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
    """Converts frames to uint8 (H, W, 3) RGB tensors of one size.

    Args:
        size: (height, width) after rotation. Frames of a different size are scaled to it (bicubic); this occurs where
            the frame size changes inside a video. None keeps the size of each frame.
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
    """Returns the display orientation of a frame: (quarter turns counter-clockwise, mirrored left-right before them).

    Read from the display matrix, which also covers the mirrored video of front cameras. Angles are rounded to multiples
    of 90 degrees.
    """
    try:
        data = frame.side_data.get("DISPLAYMATRIX")
    except ValueError:  # PyAV raises on kinds of side data that it does not know, such as EXIF
        return round(frame.rotation / 90) % 4, False
    if not isinstance(data, SideData):
        return 0, False
    a, b, _, c, d = np.frombuffer(bytes(data), np.int32)[:5].astype(float)  # x' = ax + cy, y' = bx + dy, y downward
    mirrored = a * d - b * c < 0
    if mirrored:  # the rotation that remains after mirroring x first
        a, b = -a, -b
    return round(np.arctan2(-b, a) / (np.pi / 2)) % 4, bool(mirrored)
