"""Small moving scenes with cameras, for tests of rendering."""

import math

import torch

from blueberry_video.inference.camera_paths import look_at
from blueberry_video.inference.render import TrainedScene
from blueberry_video.models.gaussian_splatting import Deformation, GaussianSplatting4D, HexPlane, Native, Static

KINDS = ("native", "deformation")


def moving_model(kind: str, number: int = 300, sh_degree: int = 3) -> GaussianSplatting4D:
    """Random Gaussians, some almost opaque, thin, fast or transparent."""
    torch.manual_seed(0)
    dynamics = {
        "native": lambda: Native(),
        "deformation": lambda: Deformation(HexPlane(4, (8, 8, 8, 5), bounds=1.6), 16, opacity=True, zero_init=False),
        "static": lambda: Static(),
    }[kind]()
    model = GaussianSplatting4D(dynamics, number, bounds=0.8, sh_degree=sh_degree)
    generator = torch.Generator().manual_seed(0)

    def noise(like: torch.Tensor) -> torch.Tensor:
        return torch.randn(like.shape, generator=generator)

    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * noise(parameter))
        model.gaussians.log_scales.copy_(-2.5 + 0.5 * noise(model.gaussians.log_scales))
        model.gaussians.opacity_logits.copy_(3 * noise(model.gaussians.opacity_logits))
        if isinstance(dynamics, Deformation):
            for name, plane in dynamics.field.named_parameters():
                plane.add_(0.8 * noise(plane) if "t" in name.rsplit(".")[-1] else 0)
        if isinstance(dynamics, Native):
            dynamics.is_static[::4] = True
    return model


def trained_scene(kind: str, number: int = 300, size: tuple[int, int] = (64, 64)) -> TrainedScene:
    """Scene with eight cameras on a circle at the elevation 0.4, at a distance of 4, which look at (0.1, 0, 0.2)."""
    angles = 2 * math.pi * torch.arange(8, dtype=torch.float64) / 8
    target, up = torch.tensor([0.1, 0, 0.2]).double(), torch.tensor([0, 0, 1.0]).double()
    level, height = math.cos(0.4), torch.full_like(angles, math.sin(0.4))
    centers = target + 4 * torch.stack([level * angles.cos(), level * angles.sin(), height], -1)
    focal = 1.4 * size[0]
    intrinsics = torch.tensor([[focal, 0, size[1] / 2 + 1.5], [0, focal, size[0] / 2], [0, 0, 1]])
    times = torch.linspace(0, 1, 8)
    model = moving_model(kind, number).eval()
    return TrainedScene(model, look_at(centers, target, up), times, intrinsics, size, torch.tensor([1.0, 0.9, 0.8]))
