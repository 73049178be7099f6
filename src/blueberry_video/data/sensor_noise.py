"""Clips of a bad camera: noise of every pixel, exposure of every frame, and lost blocks."""

import hashlib

import torch

from blueberry_video.data.clips import Clips, Wrapper, at_epoch

GRAY = 128.0  # of lost blocks


class SensorNoise(Wrapper):
    """Map-style dataset that adds noise to the videos of a dataset and loses blocks; everything else of a clip stays.

    Noise and losses are independent between frames, so that a single frame does not suffice to undo them. They differ
    between training epochs, and are the same in every validation: a pure function of (seed, epoch, id of the clip).

    Args:
        dataset: clips with uint8 ``video`` and ``id``, usually cached.
        sigma: standard deviation of the noise of a pixel, as a share of white, 0 to 1.
        exposure: standard deviation of the relative brightness of a frame, 0 to 1.
        lost: share of the blocks of each frame that are gray, as after transmission errors, 0 to 1.
        block: side of a block in pixels.
        seed: of the noise.

    Raises:
        ValueError: for values out of range.
    """

    def __init__(
        self,
        dataset: Clips,
        sigma: float = 0.1,
        exposure: float = 0.0,
        seed: int = 0,
        lost: float = 0.0,
        block: int = 8,
    ):
        for key, value in (("sigma", sigma), ("exposure", exposure), ("lost", lost)):
            if not 0 <= value <= 1:
                raise ValueError(f"{key}={value} must be in [0, 1], a share of white, such as 0.1.")
        if block < 1:
            raise ValueError(f"block={block} must be at least 1 pixel.")
        self.dataset, self.sources, self.sigma, self.exposure, self.seed = dataset, [dataset], sigma, exposure, seed
        self.lost, self.block = lost, block
        self.classes: dict[str, tuple[str, ...]] = getattr(dataset, "classes", {})
        self.reversal_pairs: dict[str, tuple[tuple[int, int], ...]] = getattr(dataset, "reversal_pairs", {})
        self.action_names: tuple[str, ...] = getattr(dataset, "action_names", ())
        self.varies_by_epoch = True

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> dict:
        return self.sample(index, epoch=0)

    def sample(self, index: int, epoch: int) -> dict:
        """Clip ``index`` in epoch ``epoch``."""
        clip = at_epoch(self.dataset, index, epoch)
        name = hashlib.sha256(f"{self.seed}/{epoch}/{clip['id']}".encode()).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(name[:8], "little"))
        video = clip["video"].float()
        gain = 1 + self.exposure * torch.randn(len(video), 1, 1, 1, generator=generator)
        noise = 255 * self.sigma * torch.randn(video.shape, generator=generator)
        noisy = gain * video + noise
        if self.lost:
            frames, _, height, width = video.shape
            rows, columns = (-(-side // self.block) for side in (height, width))
            grid = torch.rand(frames, 1, rows, columns, generator=generator) < self.lost
            blocks = grid.repeat_interleave(self.block, 2).repeat_interleave(self.block, 3)[:, :, :height, :width]
            noisy = torch.where(blocks, GRAY, noisy)
        return {**clip, "video": noisy.round().clamp(0, 255).byte()}
