"""Sprites: a procedural dataset of a 2-D shape that moves on a plain or textured background.

It is meant for training within minutes: no files, about a thousand 16 x 32 x 32 clips per second on one core. Motions
come in pairs that are exact time reversals of each other, so that one frame, or a set of frames without their order,
does not distinguish them: only a model that uses the order of frames tells left from right.
"""

import math
from typing import ClassVar

import numpy as np
import torch
from torch.utils.data import Dataset

from blueberry_video.data.clips import check_index

SHAPES = ("square", "disc", "triangle")
COLOURS = {
    "red": (0.9, 0.15, 0.15),
    "green": (0.15, 0.8, 0.2),
    "blue": (0.15, 0.25, 0.9),
    "yellow": (0.9, 0.85, 0.1),
    "magenta": (0.85, 0.15, 0.8),
    "cyan": (0.1, 0.8, 0.85),
}
SIZES = {"small": 3 / 32, "large": 5 / 32}  # radius as a fraction of the image width
MOTIONS = ("left", "right", "up", "down", "cw", "ccw", "grow", "shrink")
SPLITS = {"train": 0, "val": 1, "test": 2}
FPS = 8.0

_PHRASES = {"cw": "circles clockwise", "ccw": "circles counterclockwise", "grow": "grows", "shrink": "shrinks"}


class Sprites(Dataset):
    """Clips of one moving shape; clip ``i`` is a pure function of (split, i).

    Args:
        split: ``"train"``, ``"val"`` or ``"test"``: three disjoint random streams.
        size: number of clips.
        num_frames: frames per clip, at least 2.
        image_size: height and width in pixels, at least 8.
        distractors: number of static shapes, drawn below the moving one.
        background: ``"plain"`` grey, or ``"texture"``: smooth noise, so that no patch is constant.
        drift: speed of the texture in pixels per frame, in a random direction; 0 is static. With drift, the clips of a
            reversal pair are time reversals in distribution, not pixel for pixel.

    A clip has ``video`` uint8 (T, 3, H, W), ``labels`` {shape, colour, size, motion} of the moving shape,
    ``caption``, ``fps`` and ``id``.

    Raises:
        ValueError: an argument out of range.
    """

    classes: ClassVar = {"shape": SHAPES, "colour": tuple(COLOURS), "size": tuple(SIZES), "motion": MOTIONS}
    reversal_pairs: ClassVar = {"motion": ((0, 1), (2, 3), (4, 5), (6, 7))}

    def __init__(
        self,
        split: str,
        size: int,
        num_frames: int = 16,
        image_size: int = 32,
        distractors: int = 0,
        background: str = "plain",
        drift: float = 0.0,
    ):
        if split not in SPLITS:
            raise ValueError(f"split={split!r} must be one of {', '.join(SPLITS)}.")
        if background not in ("plain", "texture"):
            raise ValueError(f"background={background!r} must be 'plain' or 'texture'.")
        for key, value, least in (("size", size, 1), ("num_frames", num_frames, 2), ("image_size", image_size, 8)):
            if value < least:
                raise ValueError(f"{key}={value} must be at least {least}.")
        if distractors < 0 or drift < 0:
            raise ValueError(f"distractors={distractors} and drift={drift} must be at least 0.")
        self.split, self.size, self.num_frames, self.image_size = split, size, num_frames, image_size
        self.distractors, self.background, self.drift = distractors, background, drift
        axis = np.arange(image_size, dtype=np.float32) + 0.5
        self._y, self._x = np.meshgrid(axis, axis, indexing="ij")

    @property
    def cache_key(self) -> str:
        """Everything that a clip depends on except its index."""
        return (
            f"sprites-2/{self.split}/{self.num_frames}x{self.image_size}/distractors={self.distractors}"
            f"/{self.background}/drift={self.drift}"
        )

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, index: int) -> dict:
        check_index(index, self.size)
        rng = np.random.Generator(np.random.PCG64(np.random.SeedSequence([SPLITS[self.split], index])))
        labels = {name: int(rng.integers(len(values))) for name, values in self.classes.items()}
        video = self._background(rng)
        for _ in range(self.distractors):
            still = {name: int(rng.integers(len(self.classes[name]))) for name in ("shape", "colour", "size")}
            centre = rng.uniform(0.15, 0.85, 2) * self.image_size
            self._draw(video, still, np.tile(centre, (self.num_frames, 1)), np.ones(self.num_frames))
        self._draw(video, labels, *self._path(rng, labels["motion"]))
        return {
            "video": torch.from_numpy((video * 255 + 0.5).astype(np.uint8)),
            "labels": labels,
            "caption": self._caption(labels),
            "fps": FPS,
            "id": f"sprites-{self.split}-{index}",
        }

    def _background(self, rng: np.random.Generator) -> np.ndarray:
        """Background, float32 (T, 3, H, W) in [0, 1]."""
        shape = (self.num_frames, 3, self.image_size, self.image_size)
        level = rng.uniform(0.3, 0.6)
        if self.background == "plain":
            return np.full(shape, level, dtype=np.float32)
        frames = np.arange(self.num_frames)[:, None, None]
        direction = rng.uniform(0, 2 * math.pi)
        x = self._x - self.drift * math.cos(direction) * frames
        y = self._y - self.drift * math.sin(direction) * frames
        grey = np.full((self.num_frames, self.image_size, self.image_size), level, dtype=np.float32)
        for _ in range(4):  # plane waves with periods of a quarter to one image width
            period = rng.uniform(0.25, 1.0) * self.image_size
            angle, phase = rng.uniform(0, 2 * math.pi, 2)
            grey += 0.07 * np.sin(2 * math.pi / period * (math.cos(angle) * x + math.sin(angle) * y) + phase)
        return np.repeat(grey[:, None], 3, axis=1).astype(np.float32)

    def _path(self, rng: np.random.Generator, motion: int) -> tuple[np.ndarray, np.ndarray]:
        """Centres (T, 2) as (x, y) in pixels and scales (T,) of the moving shape."""
        width, name = self.image_size, MOTIONS[motion]
        s = np.linspace(-0.5, 0.5, self.num_frames)  # symmetric: negating s reverses the clip
        middle = rng.uniform(0.3, 0.7, 2) * width
        phase = rng.uniform(0, 2 * math.pi)
        scale = np.ones(self.num_frames)
        if name in ("cw", "ccw"):  # y points down, so a growing angle turns clockwise on the screen
            angle = phase + 2 * math.pi * s * (1 if name == "cw" else -1)
            return width / 2 + 0.28 * width * np.stack([np.cos(angle), np.sin(angle)], axis=1), scale
        if name in ("grow", "shrink"):
            return np.tile(middle, (self.num_frames, 1)), 1 + 0.6 * s * (1 if name == "grow" else -1)
        direction = {"left": (-1, 0), "right": (1, 0), "up": (0, -1), "down": (0, 1)}[name]
        return middle + 0.6 * width * s[:, None] * np.array(direction), scale

    def _draw(self, video: np.ndarray, labels: dict[str, int], centres: np.ndarray, scales: np.ndarray) -> None:
        """Draws one shape into ``video`` (T, 3, H, W) in place; antialiased, so that slow motion is visible."""
        radius = (list(SIZES.values())[labels["size"]] * self.image_size * scales)[:, None, None]
        x = self._x - centres[:, 0, None, None]
        y = self._y - centres[:, 1, None, None]
        shape = SHAPES[labels["shape"]]
        if shape == "square":
            distance = np.maximum(np.abs(x), np.abs(y)) - 0.89 * radius
        elif shape == "disc":
            distance = np.hypot(x, y) - radius
        else:  # equilateral, one corner up
            distance = np.maximum(0.866 * np.abs(x) - 0.5 * y - 0.6 * radius, y - 0.6 * radius)
        cover = np.clip(0.5 - distance, 0, 1).astype(np.float32)[:, None]  # (T, 1, H, W)
        colour = np.array(list(COLOURS.values())[labels["colour"]], dtype=np.float32)[:, None, None]
        video += cover * (colour - video)

    def _caption(self, labels: dict[str, int]) -> str:
        size, colour, shape = (self.classes[name][labels[name]] for name in ("size", "colour", "shape"))
        motion = MOTIONS[labels["motion"]]
        return f"a {size} {colour} {shape} {_PHRASES.get(motion, f'moves {motion}')} on a {self.background} background"
