"""Clips with the noise of a camera: every pixel of every frame, and the exposure of every frame."""

import hashlib

import torch

from blueberry_video.data.clips import Clips, Wrapper, at_epoch


class SensorNoise(Wrapper):
    """Map-style dataset that adds noise to the videos of a dataset; everything else of a clip stays.

    Noise is independent between pixels and frames, so that a single frame does not suffice to remove it. It differs
    between training epochs, and is the same in every validation: a pure function of (seed, epoch, id of the clip).

    Args:
        dataset: clips with uint8 ``video`` and ``id``, usually cached.
        sigma: standard deviation of the noise of a pixel, as a share of white, 0 to 1.
        exposure: standard deviation of the relative brightness of a frame, 0 to 1.
        seed: of the noise.

    Raises:
        ValueError: for values out of range.
    """

    def __init__(self, dataset: Clips, sigma: float = 0.1, exposure: float = 0.0, seed: int = 0):
        for key, value in (("sigma", sigma), ("exposure", exposure)):
            if not 0 <= value <= 1:
                raise ValueError(f"{key}={value} must be in [0, 1], a share of white, such as 0.1.")
        self.dataset, self.sources, self.sigma, self.exposure, self.seed = dataset, [dataset], sigma, exposure, seed
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
        return {**clip, "video": (gain * video + noise).round().clamp(0, 255).byte()}
