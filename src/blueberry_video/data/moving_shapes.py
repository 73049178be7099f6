"""Moving shapes: a minimal text-to-video dataset with 3 shapes x 3 colours x 4 directions.

Everything is exact: pixels are 0 or 255, a shape moves one pixel per frame, and there are 36 x 64 = 2,304 clips. The
lowest reachable loss, with and without text, is therefore known in advance, and a rule classifies generated clips
(``evaluation/``).
"""

from typing import ClassVar

import numpy as np
import torch
from torch.utils.data import Dataset

from blueberry_video.data.clips import check_index

SHAPES = ("square", "disc", "triangle")
COLOURS = ("red", "green", "blue")
DIRECTIONS = {"left": (0, -1), "right": (0, 1), "up": (-1, 0), "down": (1, 0)}  # (row, column) per frame
NUM_FRAMES, SIZE, FPS = 8, 16, 8.0
CENTRES = range(4, 12)  # rows and columns of the start centers

_CLASSES = [(s, c, d) for s in range(len(SHAPES)) for c in range(len(COLOURS)) for d in range(len(DIRECTIONS))]
_Y, _X = np.mgrid[:SIZE, :SIZE]


class MovingShapes(Dataset):
    """Clips of 8 frames of 16 x 16 pixels, in which one shape of one colour moves on black by one pixel per frame.

    For each of the 36 classes, ``train`` draws ``starts`` of the 64 start centers, uniformly with replacement: 1 gives
    36 fixed clips; 64 gives the 2,304 clips to which the known losses refer (on average 41 distinct centers per class).
    ``val`` contains the centers that ``train`` did not draw, each once, with the same number for every class: held-out
    clips. The loss to compare with the known ones is that on ``train`` itself, with new noise.

    Clip i is of class i mod 36, so that the first 36 k clips contain k of each class; it is a pure function of the
    arguments.

    Args:
        split: ``"train"`` or ``"val"``.
        starts: start centers per class in training, for either split.
        size: number of clips; None: all.

    A clip has ``video`` uint8 (8, 3, 16, 16), ``labels`` {shape, colour, direction}, ``caption``, ``fps`` and ``id``.
    A shape is cut off at the border, and its center wraps around. There are no ``reversal_pairs``, because the position
    of a shape in a single frame correlates with its direction.

    Raises:
        ValueError: an unknown split, ``starts`` below 1 or too high to hold clips out, or a size out of range.
    """

    classes: ClassVar = {"shape": SHAPES, "colour": COLOURS, "direction": tuple(DIRECTIONS)}

    def __init__(self, split: str, starts: int = 64, size: int | None = None):
        if split not in ("train", "val"):
            raise ValueError(f"split={split!r} must be 'train' or 'val'.")
        if starts < 1:
            raise ValueError(f"starts={starts} must be at least 1.")
        drawn = [_draw(number, starts) for number in range(len(_CLASSES))]
        if split == "train":
            starts_drawn = np.stack([train for train, _ in drawn])
        else:
            fewest = min(len(held_out) for _, held_out in drawn)
            starts_drawn = np.stack([held_out[:fewest] for _, held_out in drawn])
        self._starts = starts_drawn  # (36, clips per class): index of the start center
        if not starts_drawn.size:
            raise ValueError(
                f"starts={starts} covers all 64 start centers of some class, so that split='val' is empty: use fewer, "
                "such as 64."
            )
        if size is not None and not 1 <= size <= starts_drawn.size:
            raise ValueError(f"size={size} must be 1 to {starts_drawn.size} for split={split!r} and starts={starts}.")
        self.split, self.starts, self.size = split, starts, starts_drawn.size if size is None else size

    @property
    def cache_key(self) -> str:
        """Everything that a clip depends on except its index."""
        return f"moving-shapes-1/{self.split}/starts={self.starts}"

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, index: int) -> dict:
        check_index(index, self.size)
        shape, colour, direction = _CLASSES[index % len(_CLASSES)]
        row, column = divmod(int(self._starts[index % len(_CLASSES), index // len(_CLASSES)]), len(CENTRES))
        names = SHAPES[shape], COLOURS[colour], list(DIRECTIONS)[direction]
        start = CENTRES[row], CENTRES[column]
        video = np.zeros((NUM_FRAMES, len(COLOURS), SIZE, SIZE), dtype=np.uint8)
        video[:, colour] = 255 * _masks(names[0], start, DIRECTIONS[names[2]])
        return {
            "video": torch.from_numpy(video),
            "labels": {"shape": shape, "colour": colour, "direction": direction},
            "caption": f"a {names[1]} {names[0]} moves {names[2]}",
            "fps": FPS,
            "id": f"moving-shapes-{'-'.join(names)}-{start[0]}-{start[1]}",
        }


def _draw(number: int, starts: int) -> tuple[np.ndarray, np.ndarray]:
    """Returns the start centers, 0 … 63, of one class: those of train, and all others in random order."""
    rng = np.random.Generator(np.random.PCG64(np.random.SeedSequence([number])))
    shuffled = rng.permutation(len(CENTRES) ** 2)
    train = rng.integers(len(shuffled), size=starts)
    return train, shuffled[~np.isin(shuffled, train)]


def _masks(shape: str, start: tuple[int, int], step: tuple[int, int]) -> np.ndarray:
    """Mask of the shape, (T, H, W) bool."""
    frames = np.arange(NUM_FRAMES)[:, None, None]
    dy, dx = (axis - (first + frames * by) % SIZE for axis, first, by in zip((_Y, _X), start, step))
    if shape == "disc":
        return dy**2 + dx**2 <= 10
    return (abs(dy) <= 3) & (abs(dx) <= (3 if shape == "square" else (dy + 3) / 2))
