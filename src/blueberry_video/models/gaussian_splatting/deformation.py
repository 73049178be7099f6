"""Deformation of canonical Gaussians over time: HexPlane features, an MLP and heads (4D-GS, arXiv 2310.08528).

Shapes: N Gaussians, T times, K spherical harmonics.
"""

from torch import Tensor, nn

from blueberry_video.models.gaussian_splatting.dynamics import Dynamics
from blueberry_video.models.gaussian_splatting.gaussians import CanonicalGaussians, Gaussians, activate
from blueberry_video.models.gaussian_splatting.hexplane import HexPlane


class Deformation(Dynamics):
    """Predicts offsets of position, log-scale and quaternion, optionally of opacity logit and harmonics.

    Offsets are added to the stored parameters: scales are activated and quaternions normalized after the addition.

    Args:
        field: features of a position and a time.
        width: hidden features of the MLP.
        depth: linear layers of the shared MLP, at least 1.
        opacity: predicts an offset of the opacity logit.
        sh_degree: degree of the harmonics of the scene, to predict offsets of all coefficients; ``None`` for none.
        zero_init: initializes the last layer of each head with zeros, so that a trained static scene is unchanged at
            first. False as in the published code: Xavier-uniform weights, which displace every Gaussian at the start of
            the second stage.

    Raises:
        ValueError: for a width, depth or degree out of range.
    """

    def __init__(
        self,
        field: HexPlane,
        width: int = 64,
        depth: int = 1,
        opacity: bool = False,
        sh_degree: int | None = None,
        zero_init: bool = True,
    ):
        super().__init__()
        for name, value in (("width", width), ("depth", depth)):
            if value < 1:
                raise ValueError(f"{name}={value} must be at least 1.")
        if sh_degree is not None and sh_degree not in range(4):
            raise ValueError(f"sh_degree={sh_degree} must be 0 to 3, the degree of the scene, or None.")
        self.field = field
        layers: list[nn.Module] = [nn.Linear(field.out_features, width)]
        for _ in range(depth - 1):
            layers += [nn.ReLU(), nn.Linear(width, width)]
        self.trunk = nn.Sequential(*layers)
        sizes = {"means": 3, "log_scales": 3, "quats": 4}
        if opacity:
            sizes["opacity_logits"] = 1
        if sh_degree is not None:
            sizes["harmonics"] = 3 * (sh_degree + 1) ** 2
        self.heads = nn.ModuleDict({name: _head(width, size) for name, size in sizes.items()})
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
        if zero_init:
            for head in self.heads.values():
                nn.init.zeros_(head[-1].weight)  # type: ignore[index]
                nn.init.zeros_(head[-1].bias)  # type: ignore[index]

    def forward(self, canonical: CanonicalGaussians, times: Tensor) -> Gaussians:
        hidden = self.trunk(self.field(canonical.means, times))
        stored = {
            "means": canonical.means,
            "log_scales": canonical.log_scales,
            "quats": canonical.quats,
            "opacity_logits": canonical.opacity_logits,
            "harmonics": canonical.harmonics,
        }
        for name, head in self.heads.items():
            offset: Tensor = head(hidden)
            if name == "harmonics" and offset.shape[-1] != stored[name][0].numel():
                raise ValueError(
                    f"sh_degree of the deformation predicts {offset.shape[-1]} coefficients, but the scene has "
                    f"{stored[name][0].numel()}: set both to the same degree."
                )
            stored[name] = stored[name] + offset.reshape(len(times), *stored[name].shape)
        return activate(**stored)

    def losses(self) -> dict[str, Tensor]:
        """Losses of the planes: ``spatial_smoothness``, ``time_smoothness`` and ``time_planes``."""
        return self.field.losses()

    def parameter_roles(self) -> dict[str, list[nn.Parameter]]:
        return {
            "grid": list(self.field.parameters()),
            "deformation": [*self.trunk.parameters(), *self.heads.parameters()],
        }


def _head(width: int, size: int) -> nn.Sequential:
    return nn.Sequential(nn.ReLU(), nn.Linear(width, width), nn.ReLU(), nn.Linear(width, size))
