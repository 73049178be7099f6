"""Perceptual distance of images by the package lpips."""

from typing import Literal

from torch import Tensor, nn

from blueberry_video.weights.optional import import_extra


class LPIPS(nn.Module):
    """LPIPS (Zhang et al., arXiv 1801.03924): distances (N, 1, 1, 1) of images (N, 3, H, W) in [-1, 1], ≥ 0.

    Args:
        net: feature network: ``vgg``, ``alex`` or ``squeeze``.
        weights: ``"published"`` downloads the ImageNet weights of the feature network through torchvision;
            ``"random"`` leaves it untrained, for tests and machines without network.

    Raises:
        ImportError: if lpips is not installed.
        ValueError: for other weights.
    """

    def __init__(
        self, net: Literal["vgg", "alex", "squeeze"] = "vgg", weights: Literal["published", "random"] = "published"
    ):
        super().__init__()
        if weights not in ("published", "random"):
            raise ValueError(f"task.perceptual.weights={weights!r} is unknown: choose 'published' or 'random'.")
        lpips = import_extra("lpips", "perceptual")
        self.network = lpips.LPIPS(net=net, pnet_rand=weights == "random", verbose=False)

    def forward(self, first: Tensor, second: Tensor) -> Tensor:
        return self.network(first, second)
