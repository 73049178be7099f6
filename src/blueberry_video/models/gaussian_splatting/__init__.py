"""4D Gaussian Splatting: reconstruction and rendering of moving scenes."""

from blueberry_video.models.gaussian_splatting.deformation import Deformation
from blueberry_video.models.gaussian_splatting.dynamics import Native, Static
from blueberry_video.models.gaussian_splatting.gaussians import Gaussians
from blueberry_video.models.gaussian_splatting.hexplane import HexPlane
from blueberry_video.models.gaussian_splatting.model import Camera, GaussianSplatting4D
from blueberry_video.ops import Rasterized

__all__ = ["Camera", "Deformation", "GaussianSplatting4D", "Gaussians", "HexPlane", "Native", "Rasterized", "Static"]
