"""Deinterlacing with FFmpeg's filters, one frame per frame.

A deinterlaced frame depends on itself, the frame before and the frame after it only. So any frames of a file can be
deinterlaced without the others, and equal those of the whole file.
"""

from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from fractions import Fraction
from itertools import pairwise
from typing import TypeVar

import av
from av.filter import Graph
from av.video.frame import VideoFrame

FILTERS = ("bwdif", "yadif")
PROGRESSIVE_CODECS = ("vp8", "vp9", "av1", "gif", "apng", "webp")  # which have no interlaced frames
Key = TypeVar("Key")


def with_neighbors(wanted: Sequence[int], num_frames: int) -> list[int]:
    """Returns ascending indices of frames and of those before and after them."""
    near = {index + step for index in wanted for step in (-1, 0, 1)}
    return sorted(index for index in near if 0 <= index < num_frames)


def deinterlaced(frames: Iterable[tuple[Key, VideoFrame]], filter_name: str) -> Iterator[tuple[Key, VideoFrame]]:
    """Deinterlaces the frames that their decoder marks as interlaced, and passes on the others.

    Args:
        frames: (any key, frame) in display order. A frame is right if those before and after it in the file are also
            before and after it here; at the start and at the end of the file there are none.
        filter_name: ``bwdif`` or ``yadif``, with ``mode=send_frame:deint=interlaced``.

    Yields:
        The same keys with their frames.
    """
    waiting: deque[Key] = deque()
    graph, shape = None, None
    for key, frame in frames:
        if graph is not None and shape != _shape(frame):
            yield from _pulled(graph, waiting, None)
            graph = None
        if graph is None:
            graph, shape = _graph(frame, filter_name), _shape(frame)
        waiting.append(key)
        yield from _pulled(graph, waiting, frame)
    if graph is not None:
        yield from _pulled(graph, waiting, None)


def _pulled(graph: Graph, waiting: deque[Key], frame: VideoFrame | None) -> Iterator[tuple[Key, VideoFrame]]:
    graph.push(frame)
    while waiting:
        try:
            pulled = graph.pull()
        except (av.error.BlockingIOError, av.error.EOFError):
            return
        assert isinstance(pulled, VideoFrame)
        yield waiting.popleft(), pulled


def _shape(frame: VideoFrame) -> tuple[int, int, str]:
    return frame.width, frame.height, frame.format.name


def _graph(frame: VideoFrame, filter_name: str) -> Graph:
    graph = Graph()
    graph.threads = 1
    base = frame.time_base or Fraction(1, av.time_base)
    nodes = [
        graph.add_buffer(width=frame.width, height=frame.height, format=frame.format, time_base=base),
        graph.add(filter_name, "mode=send_frame:deint=interlaced"),
        graph.add("buffersink"),
    ]
    for node, after in pairwise(nodes):
        node.link_to(after)
    graph.configure()
    return graph
