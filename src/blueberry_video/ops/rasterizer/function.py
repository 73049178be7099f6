"""Public rasterizer: argument checks, choice of a backend, and registration with ``torch.library``.

Backends: ``reference`` (dense, float64, for tests), ``torch`` (lists of Gaussians per tile; the default on the CPU and
for float64), ``triton`` (the default on CUDA), ``gsplat`` (that package's CUDA kernels, where it is installed).

Shapes: C cameras, N Gaussians, D color channels, K spherical harmonics, H x W pixels.
"""

import os
from importlib.util import find_spec
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import forward_ad

from blueberry_video.installation import install_command
from blueberry_video.ops.rasterizer import projection, reference, tiles
from blueberry_video.ops.rasterizer.inputs import Splats

Backend = Literal["reference", "torch", "triton", "gsplat"]
MAX_DEGREE = 3
RIGID_TOLERANCE = 1e-3  # of the entries of R Rᵀ


class Rasterized(NamedTuple):
    """Output of :func:`rasterize`; without the dimension C for one camera (3, 3)."""

    color: Tensor  # (C, D, H, W), with the background
    alpha: Tensor  # (C, H, W): 1 - transmittance of all Gaussians, in [0, 1]
    depth: Tensor  # (C, H, W): depths weighted as the colors; divided by alpha, the mean depth
    means2d: Tensor  # (C, N, 2): means in pixels, where radii > 0; its ``grad`` is retained, for densification
    radii: Tensor  # (C, N) int32: radius in pixels of the region with alpha ≥ 1/255; 0 if no pixel is in it


def rasterize(
    means: Tensor,
    scales: Tensor,
    quats: Tensor,
    opacities: Tensor,
    colors: Tensor,
    intrinsics: Tensor,
    world_to_camera: Tensor,
    image_size: tuple[int, int],
    background: Tensor | None = None,
    sh_degree: int | None = None,
    *,
    near: float = 0.01,
    backend: Backend | None = None,
) -> Rasterized:
    """Renders 3-D Gaussians with pinhole cameras (3D Gaussian Splatting, arXiv 2308.04079).

    Each Gaussian is projected to the image as a 2-D Gaussian, dilated by 0.3 px². At a pixel center with exponent σ its
    alpha is min(0.99, opacity · exp(-σ)); an alpha below 1/255 is skipped. Gaussians are blended in the order of the
    depths of their means, from front to back, until the transmittance would fall below 1e-4.

    All tensors have the same dtype, float32 or float64. Tensors of Gaussians may have a leading dimension C, for
    Gaussians that differ between the cameras, such as those of a scene at different times.

    Args:
        means: (N, 3) in world coordinates.
        scales: (N, 3) standard deviations along the axes, ≥ 0.
        quats: (N, 4) rotations (w, x, y, z); they are normalized.
        opacities: (N,) from 0 to 1.
        colors: (N, D), or with ``sh_degree`` coefficients (N, K, D) of spherical harmonics with K ≥ (sh_degree + 1)²,
            of which the first (sh_degree + 1)² are used; their color is max(0, 0.5 + sum).
        intrinsics: (C, 3, 3), or (3, 3) for one camera, in pixels; pixel centers are at 0.5, 1.5, …
        world_to_camera: (C, 4, 4) or (4, 4) rigid transforms to OpenCV cameras (x right, y down, z forward).
        image_size: Height and width.
        background: (D,) or (C, D); zero if ``None``.
        sh_degree: 0 to 3; ``None`` if ``colors`` are colors.
        near: Gaussians at this depth or closer are culled; > 0.
        backend: One of the backends of this module; chosen by device and dtype if ``None``. ``gsplat`` limits alpha at
            0.999.

    Returns:
        Color, alpha, depth, means2d and radii. Color, alpha and depth are differentiable with respect to all tensors.

    Raises:
        ValueError: For inconsistent shapes or dtypes, invalid cameras, an unknown backend, or, on the CPU, values that
            are not finite or out of range. (Checking values on a GPU would synchronize.) In forward-mode AD.

    Example::

        >>> import torch
        >>> from blueberry_video.ops import rasterize
        >>> means, scales, quats = torch.randn(100, 3), torch.full((100, 3), 0.1), torch.randn(100, 4)
        >>> opacities, colors = torch.rand(100), torch.rand(100, 3)
        >>> intrinsics = torch.tensor([[50.0, 0, 24], [0, 50, 16], [0, 0, 1]])
        >>> world_to_camera = torch.eye(4)
        >>> world_to_camera[2, 3] = 4
        >>> out = rasterize(means, scales, quats, opacities, colors, intrinsics, world_to_camera, (32, 48))
        >>> out.color.shape, out.alpha.shape, out.depth.shape
        (torch.Size([3, 32, 48]), torch.Size([32, 48]), torch.Size([32, 48]))
    """
    gaussians = {"means": means, "scales": scales, "quats": quats, "opacities": opacities, "colors": colors}
    _check_shapes(gaussians, intrinsics, world_to_camera, background, sh_degree)
    height, width = _check_settings(image_size, near)
    if not means.is_cuda and not torch.compiler.is_compiling():
        _check_values({**gaussians, "background": background}, intrinsics, world_to_camera)
    _refuse_forward_mode()
    backend = _backend(backend, means)
    dtype, single = means.dtype, intrinsics.ndim == 2
    tensors = [*gaussians.values(), intrinsics, world_to_camera]
    if backend == "reference":
        tensors = [tensor.double() for tensor in tensors]
    dimensions = (3, 3, 3, 2, 3 if sh_degree is None else 4, 3, 3)
    tensors = [tensor if tensor.ndim == n else tensor[None] for tensor, n in zip(tensors, dimensions, strict=True)]
    with torch.autocast(means.device.type, enabled=False):
        image, transmittance, means2d, radii = _render(tensors, height, width, sh_degree, near, backend, single)
        image, transmittance = image.to(dtype), transmittance.to(dtype)
        color, depth, alpha = image[:, :-1], image[:, -1], 1 - transmittance
        if background is not None:
            color = color + transmittance[:, None] * background.view(-1, background.shape[-1], 1, 1)
    if single:
        color, alpha, depth = color[0], alpha[0], depth[0]
    return Rasterized(color, alpha, depth, means2d, radii)


def _render(
    tensors: list[Tensor], height: int, width: int, sh_degree: int | None, near: float, backend: Backend, single: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Returns the image (C, D + 1, H, W) of colors and depth, transmittance, means2d and radii.

    ``tensors`` are those of Gaussians, with a leading dimension of C or 1, intrinsics and world_to_camera.
    """
    means, scales, quats, opacities, colors, intrinsics, world_to_camera = tensors
    project = reference.project if backend == "reference" else projection.project
    projected = project(means, scales, quats, opacities, intrinsics, world_to_camera, height, width, near)
    means2d = projected.means2d[0] if single else projected.means2d
    if means2d.requires_grad and not torch.compiler.is_compiling():
        means2d.retain_grad()
    if sh_degree is not None:
        turn, shift = world_to_camera[:, :3, :3], world_to_camera[:, :3, 3]
        centers = -(shift[:, None] @ turn)  # (C, 1, 3): camera centers in world coordinates
        colors = projection.harmonics_color(colors, F.normalize(means - centers, dim=-1), sh_degree)
    many = projected.depths.shape
    features = torch.cat([colors.expand(*many, -1), projected.depths[..., None]], -1)
    splats = Splats(
        means2d[None] if single else means2d, projected.conics, opacities.expand(many), features,
        projected.depths.detach(), projected.extents, height, width,
    )  # fmt: skip
    image, transmittance = _composite(splats, backend)
    radii = projected.extents.amax(-1).ceil().to(torch.int32)
    return image, transmittance, means2d, radii[0] if single else radii


def _composite(splats: Splats, backend: Backend) -> tuple[Tensor, Tensor]:
    """Returns the image (C, F, H, W) and the transmittance (C, H, W)."""
    if backend == "reference":
        return reference.composite(splats)
    if backend == "gsplat":
        return _composite_gsplat(splats)
    return torch.ops.blueberry_video.rasterize(*splats, backend)


def _composite_gsplat(splats: Splats) -> tuple[Tensor, Tensor]:
    from gsplat import isect_offset_encode, isect_tiles, rasterize_to_pixels

    size, rows, columns = 16, -(-splats.height // 16), -(-splats.width // 16)
    extents = splats.extents.ceil().to(torch.int32)
    _, keys, ids = isect_tiles(splats.means2d.detach(), extents, splats.depths, size, columns, rows)
    offsets = isect_offset_encode(keys, len(extents), columns, rows)
    image, alpha = rasterize_to_pixels(
        splats.means2d.contiguous(), splats.conics.contiguous(), splats.features.contiguous(),
        splats.opacities.contiguous(), splats.width, splats.height, size, offsets, ids,
    )  # fmt: skip
    return image.movedim(-1, 1), 1 - alpha[..., 0]


# ---- arguments -------------------------------------------------------------------------------------------------------


def _check_shapes(
    gaussians: dict[str, Tensor],
    intrinsics: Tensor,
    world_to_camera: Tensor,
    background: Tensor | None,
    sh_degree: int | None,
) -> None:
    means, colors = gaussians["means"], gaussians["colors"]
    if means.ndim not in (2, 3) or means.shape[-1] != 3:
        raise ValueError(f"means has shape {tuple(means.shape)}: it must be (N, 3) or (C, N, 3).")
    if means.dtype not in (torch.float32, torch.float64):
        raise ValueError(f"means is {means.dtype}: the rasterizer requires float32 or float64, so convert all tensors.")
    if sh_degree is not None and (isinstance(sh_degree, bool) or sh_degree not in range(MAX_DEGREE + 1)):
        raise ValueError(
            f"sh_degree={sh_degree!r} must be an integer from 0 to {MAX_DEGREE}, or None for plain colors."
        )
    if intrinsics.ndim not in (2, 3) or intrinsics.shape[-2:] != (3, 3) or intrinsics.shape[:1] == (0,):
        raise ValueError(f"intrinsics has shape {tuple(intrinsics.shape)}: it must be (3, 3) or (C, 3, 3) with C ≥ 1.")
    if world_to_camera.shape != (*intrinsics.shape[:-2], 4, 4):
        raise ValueError(
            f"world_to_camera has shape {tuple(world_to_camera.shape)}: intrinsics {tuple(intrinsics.shape)} require "
            f"{(*intrinsics.shape[:-2], 4, 4)}."
        )
    number, cameras = means.shape[-2], 1 if intrinsics.ndim == 2 else len(intrinsics)
    width = colors.shape[-1] if colors.ndim else 0
    enough = 0 if sh_degree is None else (sh_degree + 1) ** 2
    harmonics = () if sh_degree is None else colors.shape[-2:-1]
    trailing = {"means": (3,), "scales": (3,), "quats": (4,), "opacities": (), "colors": (*harmonics, width)}
    for name, tensor in gaussians.items():
        allowed = [(number, *trailing[name])]
        if intrinsics.ndim == 3:
            allowed.append((cameras, number, *trailing[name]))
        if tuple(tensor.shape) not in allowed:
            layout = {"colors": f"(N, D) with sh_degree=None, else (N, K, D), N = {number}"}.get(name, str(allowed[0]))
            raise ValueError(
                f"{name} has shape {tuple(tensor.shape)}: means {tuple(means.shape)}, sh_degree={sh_degree} and "
                f"intrinsics {tuple(intrinsics.shape)} require {layout}, and optionally a leading C."
            )
    if not width:
        raise ValueError(f"colors has shape {tuple(colors.shape)}: it must have at least one channel.")
    if sh_degree is not None and colors.shape[-2] < enough:
        raise ValueError(
            f"colors has K={colors.shape[-2]} spherical harmonics: sh_degree={sh_degree} requires at least {enough}."
        )
    if background is not None and tuple(background.shape) not in {(width,), (*intrinsics.shape[:-2], width)}:
        raise ValueError(
            f"background has shape {tuple(background.shape)}: colors with D={width} channels require ({width},), or "
            f"(C, {width}) for C cameras."
        )
    others = {**gaussians, "intrinsics": intrinsics, "world_to_camera": world_to_camera, "background": background}
    for name, other in others.items():
        if other is not None and (other.dtype != means.dtype or other.device != means.device):
            raise ValueError(
                f"{name} is {other.dtype} on {other.device} and means is {means.dtype} on {means.device}: all tensors "
                f"must have the same dtype and device, so pass {name}.to(means)."
            )


def _check_settings(image_size: tuple[int, int], near: float) -> tuple[int, int]:
    """Returns height and width."""
    sizes = tuple(image_size) if isinstance(image_size, tuple | list) else ()
    if len(sizes) != 2 or not all(isinstance(size, int) and size >= 1 for size in sizes):
        raise ValueError(f"image_size={image_size!r} must be (height, width), two integers ≥ 1.")
    if not 0 < near < float("inf"):
        raise ValueError(f"near={near!r} must be a finite depth > 0, such as 0.01.")
    return sizes[0], sizes[1]


def _check_values(tensors: dict[str, Tensor | None], intrinsics: Tensor, world_to_camera: Tensor) -> None:
    for name, tensor in {**tensors, "intrinsics": intrinsics, "world_to_camera": world_to_camera}.items():
        if tensor is not None and not tensor.isfinite().all():
            number = int((~tensor.isfinite()).sum())
            raise ValueError(
                f"{name} has {number} values that are NaN or infinite, of {tensor.numel()}: look for the first layer "
                "or optimizer step that returns them, or lower the learning rate."
            )
    scales, quats, opacities = tensors["scales"], tensors["quats"], tensors["opacities"]
    if scales is not None and scales.numel() and scales.min() < 0:
        raise ValueError(
            f"scales has a minimum of {scales.min():.3g}: standard deviations must be ≥ 0, such as exp(x)."
        )
    if opacities is not None and opacities.numel() and (opacities.min() < 0 or opacities.max() > 1):
        raise ValueError(
            f"opacities has values from {opacities.min():.3g} to {opacities.max():.3g}: they must be from 0 to 1, such "
            "as sigmoid(x)."
        )
    if quats is not None and not quats.any(-1).all():
        raise ValueError("quats has a quaternion 0, which is no rotation: initialize with (1, 0, 0, 0).")
    for index, matrix in enumerate(intrinsics.reshape(-1, 3, 3).tolist()):
        (fx, skew, _), (tilt, fy, _), last = matrix
        if fx <= 0 or fy <= 0 or skew or tilt or last != [0, 0, 1]:
            raise ValueError(
                f"intrinsics={matrix} of camera {index} must be [[fx, 0, cx], [0, fy, cy], [0, 0, 1]] in pixels with "
                "fx > 0 and fy > 0: rectify images with skew or distortion first."
            )
    turns = world_to_camera[..., :3, :3].reshape(-1, 3, 3)
    with torch.autocast(turns.device.type, enabled=False):
        errors = (turns @ turns.mT - torch.eye(3).to(turns)).abs().amax((1, 2)).tolist()
    determinants = torch.linalg.det(turns).tolist()
    last_rows = world_to_camera[..., 3, :].reshape(-1, 4).tolist()
    for index, (error, determinant, last) in enumerate(zip(errors, determinants, last_rows, strict=True)):
        if error > RIGID_TOLERANCE or determinant < 0 or last != [0, 0, 0, 1]:
            raise ValueError(
                f"world_to_camera of camera {index} is not rigid: R Rᵀ differs from I by {error:.3g}, det R = "
                f"{determinant:.3g}, last row {last}. It must be [[R, t], [0, 0, 0, 1]] with a rotation R: remove "
                "scaling and mirroring from the pose."
            )


def _refuse_forward_mode() -> None:
    """Raises in forward-mode AD, where torch silently takes the derivative of a custom operator as 0."""
    if torch.compiler.is_compiling():
        return
    transform = torch._C._functorch.peek_interpreter_stack()
    is_jvp = transform is not None and transform.key() == torch._C._functorch.TransformType.Jvp
    if is_jvp or forward_ad._current_level >= 0:
        raise ValueError(
            "rasterize has no forward-mode derivative (jvp, jacfwd): use reverse mode, such as backward()."
        )


def _backend(backend: Backend | None, means: Tensor) -> Backend:
    if backend is None:
        return "triton" if means.is_cuda and means.dtype == torch.float32 and find_spec("triton") else "torch"
    if backend not in ("reference", "torch", "triton", "gsplat"):
        raise ValueError(f"backend={backend!r} is unknown: choose 'reference', 'torch', 'triton' or 'gsplat'.")
    interpreted = os.environ.get("TRITON_INTERPRET") == "1" and backend == "triton"
    if backend in ("triton", "gsplat") and not means.is_cuda and not interpreted:
        raise ValueError(f"backend={backend!r} requires CUDA, but means is on the CPU: use backend='torch'.")
    if backend in ("triton", "gsplat") and find_spec(backend) is None:
        command = install_command("cuda", backend)
        raise ValueError(f"backend={backend!r} is not installed: run `{command}`, or use 'torch'.")
    if backend in ("triton", "gsplat") and means.dtype == torch.float64:
        raise ValueError(f"backend={backend!r} does not support float64: use backend='torch', or float32.")
    return backend


# ---- registration ----------------------------------------------------------------------------------------------------

_SCHEMA = (  # the fields of Splats, and the backend
    "Tensor means2d, Tensor conics, Tensor opacities, Tensor features, Tensor depths, Tensor extents, SymInt height, "
    "SymInt width, str backend"
)


@torch.library.custom_op("blueberry_video::rasterize", mutates_args=(), schema=f"({_SCHEMA}) -> (Tensor, Tensor)")
def _rasterize(*arguments: Any) -> tuple[Tensor, Tensor]:
    """Returns the image (C, F, H, W) and the transmittance (C, H, W)."""
    return _module(arguments[-1]).forward(Splats(*arguments[:-1]))


@_rasterize.register_fake
def _(*arguments: Any) -> tuple[Tensor, Tensor]:
    features, height, width = arguments[3], arguments[6], arguments[7]
    cameras, _, channels = features.shape
    return features.new_empty(cameras, channels, height, width), features.new_empty(cameras, height, width)


@torch.library.custom_op(
    "blueberry_video::rasterize_backward",
    mutates_args=(),
    schema=f"(Tensor d_image, Tensor d_transmittance, Tensor image, Tensor transmittance, {_SCHEMA}) -> "
    "(Tensor, Tensor, Tensor, Tensor)",
)
def _rasterize_backward(
    d_image: Tensor, d_transmittance: Tensor, image: Tensor, transmittance: Tensor, *arguments: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Returns the gradients of means2d, conics, opacities and features."""
    return _module(arguments[-1]).backward(d_image, d_transmittance, image, transmittance, Splats(*arguments[:-1]))


@_rasterize_backward.register_fake
def _(
    d_image: Tensor, d_transmittance: Tensor, image: Tensor, transmittance: Tensor, *arguments: Any
) -> tuple[Tensor, ...]:
    return tuple(tensor.new_empty(tensor.shape) for tensor in arguments[:4])


def _setup_context(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    ctx.save_for_backward(*inputs[:6], *output)
    ctx.settings = inputs[6:]


def _differentiate(ctx, d_image, d_transmittance):  # type: ignore[no-untyped-def]
    *splats, image, transmittance = ctx.saved_tensors
    backward = torch.ops.blueberry_video.rasterize_backward
    return (*backward(d_image, d_transmittance, image, transmittance, *splats, *ctx.settings), *[None] * 5)


torch.library.register_autograd("blueberry_video::rasterize", _differentiate, setup_context=_setup_context)


def _module(backend: str):  # type: ignore[no-untyped-def]
    if backend == "torch":
        return tiles
    from blueberry_video.ops.rasterizer import kernels  # imports triton, which is optional

    return kernels
