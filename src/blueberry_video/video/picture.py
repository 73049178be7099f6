"""Conversion of decoded frames to RGB, over white, rotated and mirrored by the display matrix of the file.

Conversion uses FFmpeg's filter graph, like torchcodec and the ffmpeg program, and is bit-identical to both, also for
10-bit, odd-sized and interlaced video, where a direct swscale call interpolates chroma differently.
"""

from dataclasses import dataclass
from fractions import Fraction
from itertools import pairwise

import av
import numpy as np
import torch
from av.filter import Graph
from av.sidedata.sidedata import SideData
from av.video.frame import VideoFrame
from PIL import Image
from torch import Tensor

from blueberry_video.video.hdr import ToneMap, rgb_signal
from blueberry_video.video.picture_info import PictureInfo, has_alpha

_FULL_RANGE = 2  # AVCOL_RANGE_JPEG
_SAME = ":in_color_matrix=bt709:out_color_matrix=bt709:in_range=tv:out_range=tv"  # between Y'CbCr: changes no values


@dataclass(frozen=True)
class Rendering:
    """Processing of the pictures of one video, which only PyAV does.

    Attributes:
        tone_map: curve for HDR video, see ``hdr``; ``none`` for other video.
        deinterlace: filter, see ``deinterlace``; ``none`` for codecs without interlaced frames.
    """

    tone_map: str = "none"
    deinterlace: str = "none"

    def converter(self, size: tuple[int, int], picture: PictureInfo) -> "ToRGB":
        """Returns the conversion of the frames of a video; raises ValueError for unsupported primaries."""
        if self.tone_map == "none" or picture.hdr is None:
            return ToRGB(size)
        return ToRGB(size, ToneMap(self.tone_map, picture.hdr, picture.primaries, picture.peak))


class ToRGB:
    """Converts frames to uint8 (H, W, 3) RGB tensors of one size, transparent pixels blended over white.

    Args:
        size: (height, width) after rotation. Frames of a different size are scaled to it (bicubic); this occurs where
            the frame size changes inside a video. None keeps the size of each frame.
        tone_map: applied to the signal of HDR video, which is read with 16 bits.
    """

    def __init__(self, size: tuple[int, int] | None = None, tone_map: ToneMap | None = None):
        self.size, self.tone_map = size, tone_map
        self._graphs: dict[tuple, Graph] = {}

    def __call__(self, frame: VideoFrame) -> Tensor:
        """Converts a frame; its alpha is that of its pixel format, or ``frame.opaque`` as of ``AlphaDecoder``.

        Raises:
            ValueError: Y'CbCr of HDR video that is not tone-mapped, such as ICtCp or that of constant luminance.
        """
        turns, mirrored = orientation(frame)
        height, width = self.size or (frame.height, frame.width)
        if self.size is not None and turns % 2:
            height, width = width, height
        if self.tone_map is None:
            pixels = self._converted(frame, height, width, "rgb24")
        else:
            pixels = self.tone_map(self._signal(frame, height, width))
        if has_alpha(frame):
            pixels = over_white(pixels, self._converted(frame, height, width, "rgba")[..., 3])
        elif isinstance(frame.opaque, np.ndarray):
            pixels = over_white(pixels, frame.opaque)
        if mirrored:
            pixels = pixels[:, ::-1]
        return torch.from_numpy(np.ascontiguousarray(np.rot90(pixels, k=turns)))

    def _signal(self, frame: VideoFrame, height: int, width: int) -> Tensor:
        """R'G'B' of an HDR frame, float32 (3, H, W). FFmpeg's conversion to RGB with 16 bits, which is up to a level of
        8 bits off, is used for no Y'CbCr."""
        if frame.format.is_rgb:
            return torch.from_numpy(self._converted(frame, height, width, "rgb48le") / np.float32(65535)).permute(
                2, 0, 1
            )
        samples, bits = self._converted(frame, height, width, "yuv444p16le", _SAME), frame.format.components[0].bits
        return rgb_signal(samples, bits, int(frame.colorspace), int(frame.color_range) == _FULL_RANGE)

    def _converted(
        self, frame: VideoFrame, height: int, width: int, pixel_format: str, scaling: str = ""
    ) -> np.ndarray:
        key = (frame.width, frame.height, frame.format.name, height, width, pixel_format)
        if key not in self._graphs:
            scales = scaling or (frame.height, frame.width) != (height, width)
            graph = Graph()
            graph.threads = 1
            base = frame.time_base or Fraction(1, av.time_base)
            nodes = [
                graph.add_buffer(width=frame.width, height=frame.height, format=frame.format, time_base=base),
                *([graph.add("scale", f"{width}:{height}{scaling}")] if scales else []),
                graph.add("format", pixel_format),
                graph.add("buffersink"),
            ]
            for node, after in pairwise(nodes):
                node.link_to(after)
            graph.configure()
            self._graphs[key] = graph
        graph = self._graphs[key]
        graph.push(frame)
        converted = graph.pull()
        assert isinstance(converted, VideoFrame)
        return converted.to_ndarray()


def over_white(pixels: np.ndarray, alpha: np.ndarray) -> np.ndarray:
    """Blends uint8 (H, W, 3) pixels of straight alpha, uint8 (h, w), over white, rounded as Pillow's ``paste``.

    Alpha of a different size is scaled (bicubic).
    """
    if alpha.shape != pixels.shape[:2]:
        alpha = np.asarray(Image.fromarray(alpha).resize(pixels.shape[1::-1], Image.Resampling.BICUBIC))
    if alpha.min() == 255:
        return pixels
    weight = alpha[..., None].astype(np.uint16)
    return ((pixels * weight + 255 * (255 - weight) + 127) // 255).astype(np.uint8)


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
