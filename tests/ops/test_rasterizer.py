"""Rasterizer: PyTorch backend against the dense reference, projection, image formation, gradients and errors."""

import doctest
import math
from dataclasses import dataclass, replace
from importlib.util import find_spec

import numpy as np
import pytest
import torch
from torch import Tensor

from blueberry_video.data.world import World
from blueberry_video.ops import Rasterized, rasterize
from blueberry_video.ops.rasterizer import function, projection, reference, tiles
from blueberry_video.ops.rasterizer.inputs import Splats

TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-5}  # relative to the largest value of a tensor
LEAST_SCALE = 1e-3  # of a tensor of tiny values
needs_gsplat = pytest.mark.skipif(
    find_spec("gsplat") is None, reason="gsplat is not installed: pip install gsplat==1.5.3 --no-deps"
)
GAUSSIANS = ("means", "scales", "quats", "opacities", "colors")


def poses(cameras: int) -> Tensor:
    """World-to-camera transforms of cameras around the origin at a distance of 4."""
    found = []
    for angle in torch.arange(cameras) * 0.7 + 0.3:
        turn = torch.linalg.matrix_exp(torch.tensor([[0, 0.1, angle], [-0.1, 0, -0.3], [-angle, 0.3, 0]]).double())
        found.append(torch.eye(4).double())
        found[-1][:3, :3], found[-1][:3, 3] = turn, torch.tensor([0.1, -0.2, 4])
    return torch.stack(found)


@dataclass(frozen=True)
class Case:
    number: int = 40
    size: tuple[int, int] = (19, 26)
    cameras: int = 0  # 0: one camera without the dimension C
    sh_degree: int | None = 3
    coefficients: int | None = None  # by default (sh_degree + 1)²
    channels: int = 3
    center: tuple[float, float] = (0.5, 0.5)  # principal point, as a fraction of the image
    spread: float = 1.0
    scale: float = 0.2
    stretch: float = 0.6  # of the logarithm of the scales
    opacity: float | None = None  # random by default
    per_camera: bool = False
    background: bool = True

    def inputs(self, dtype: torch.dtype = torch.float64) -> dict[str, Tensor]:
        generator = torch.Generator().manual_seed(self.number)
        leading = (self.cameras, self.number) if self.per_camera else (self.number,)

        def normal(*shape: int) -> Tensor:
            return torch.randn(*leading, *shape, generator=generator, dtype=torch.float64)

        made = {"means": normal(3) * self.spread, "scales": self.scale * (self.stretch * normal(3)).exp()}
        made |= {"quats": normal(4) * 3, "opacities": normal().sigmoid()}
        if self.opacity is not None:
            made["opacities"] = torch.full_like(made["opacities"], self.opacity)
        if self.sh_degree is None:
            made["colors"] = normal(self.channels)
        else:
            made["colors"] = normal(self.coefficients or (self.sh_degree + 1) ** 2, self.channels) / 2
        height, width = self.size
        x, y = self.center
        focal = 1.4 * max(height, width)
        made["intrinsics"] = torch.tensor([[focal, 0, x * width], [0, focal * 1.1, y * height], [0, 0, 1]]).double()
        made["world_to_camera"] = poses(max(self.cameras, 1))
        if self.cameras:
            made["intrinsics"] = made["intrinsics"].repeat(self.cameras, 1, 1)
        else:
            made["world_to_camera"] = made["world_to_camera"][0]
        if self.background:
            made["background"] = torch.rand(self.channels, generator=generator, dtype=torch.float64)
        return {name: tensor.to(dtype) for name, tensor in made.items()}


CASES = {
    "usual": Case(),
    "two cameras": Case(cameras=2),
    "one camera with its dimension": Case(cameras=1),
    "Gaussians per camera": Case(cameras=2, per_camera=True),
    "plain colors": Case(sh_degree=None),
    "one channel": Case(sh_degree=None, channels=1),
    "seven channels": Case(sh_degree=None, channels=7),
    "no background": Case(background=False),
    "degree 0": Case(sh_degree=0),
    "degree 1 of 3": Case(sh_degree=1, coefficients=16),
    "degree 2": Case(sh_degree=2),
    "off-center": Case(center=(-0.4, 1.2)),
    "behind the camera": Case(number=80, spread=3.0),
    "opaque": Case(number=150, opacity=0.999, scale=0.3),
    "faint": Case(number=100, opacity=0.02, scale=0.5),
    "invisible": Case(opacity=0.001),
    "long and thin": Case(stretch=2.5),
    "smaller than a pixel": Case(number=100, scale=1e-3),
    "wider than the image": Case(number=20, scale=1.5),
    "points": Case(scale=0.0),
    "one Gaussian": Case(number=1, spread=0.1),
    "no Gaussian": Case(number=0),
    "one pixel": Case(size=(1, 1), scale=0.5),
    "one row": Case(size=(1, 37)),
    "one column": Case(size=(33, 1)),
    "one tile": Case(size=(4, 4)),
}


def render(inputs: dict[str, Tensor], case: Case, backend: str | None) -> tuple[Rasterized, dict[str, Tensor]]:
    """Output, and the gradients of a random weighted sum of color, alpha and depth."""
    inputs = {name: tensor.clone().requires_grad_() for name, tensor in inputs.items()}
    out = rasterize(**inputs, image_size=case.size, sh_degree=case.sh_degree, backend=backend)
    generator = torch.Generator().manual_seed(0)
    images = (out.color, out.alpha, out.depth)
    weights = [torch.randn(image.shape, generator=generator, dtype=torch.float64) for image in images]
    sum((image * weight.to(image)).sum() for image, weight in zip(images, weights)).backward()
    gradients = {name: tensor.grad for name, tensor in inputs.items()} | {"means2d": out.means2d.grad}
    return out, gradients


def assert_close(found: Tensor, expected: Tensor, scale: float = 0.0) -> None:
    """Asserts that the difference is within the tolerance, relative to the largest value or a larger ``scale``."""
    assert found.shape == expected.shape
    if found.numel():
        scale = max(expected.abs().max().item(), LEAST_SCALE, scale)
        atol = TOLERANCE[found.dtype] * scale
        torch.testing.assert_close(found.double(), expected.double(), rtol=0, atol=atol)


def assert_gradients_close(found: dict[str, Tensor], expected: dict[str, Tensor], inputs: dict[str, Tensor]) -> None:
    """Gradients that are sums or differences of larger terms are compared relative to these terms."""
    terms = {}
    if inputs["means"].numel():
        summed = expected["means2d"].abs().max().item() * inputs["means"].shape[-2]
        terms = {"intrinsics": summed, "world_to_camera": summed}  # sums over Gaussians, each within the tolerance
        # Scales and rotations change the same matrix: the gradients of both are differences of its gradients.
        terms["quats"] = (expected["scales"] * inputs["scales"]).abs().max().item()
    for name, gradient in expected.items():
        assert_close(found[name], gradient, terms.get(name, 0.0))


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_values_and_gradients_match_the_dense_reference(case: Case, dtype: torch.dtype):
    inputs = case.inputs(dtype)
    found, gradients = render(inputs, case, "torch")
    expected, expected_gradients = render({name: v.double() for name, v in inputs.items()}, case, "reference")
    for name in ("color", "alpha", "depth"):
        assert getattr(found, name).dtype == dtype
        assert_close(getattr(found, name), getattr(expected, name))
    assert_close(found.means2d[found.radii > 0], expected.means2d[found.radii > 0])
    assert_gradients_close(gradients, expected_gradients, inputs)
    assert (found.radii - expected.radii).abs().sum() <= (dtype == torch.float32)
    leading = (case.cameras,) if case.cameras else ()
    assert found.color.shape == (*leading, case.channels, *case.size)
    assert found.radii.shape == (*leading, case.number)


def test_the_cases_reach_all_branches():
    """The opaque case ends before all Gaussians are composited, and its alpha is limited."""
    case = CASES["opaque"]
    inputs = case.inputs()
    out = rasterize(**inputs, image_size=case.size, sh_degree=3)
    assert (1 - out.alpha).min() < 1.1e-2
    behind = rasterize(**CASES["behind the camera"].inputs(), image_size=case.size, sh_degree=3)
    assert (behind.radii == 0).any()
    assert (behind.radii > 0).any()


def test_gradcheck():
    case = Case(number=4, size=(5, 6), cameras=2, sh_degree=1, scale=0.5, opacity=0.6, spread=0.3)
    inputs = case.inputs()
    names = [*GAUSSIANS, "background"]

    def images(*tensors: Tensor) -> tuple[Tensor, ...]:
        changed = {**inputs, **dict(zip(names, tensors, strict=True))}
        return rasterize(**changed, image_size=case.size, sh_degree=1)[:3]

    assert torch.autograd.gradcheck(images, [inputs[name].requires_grad_() for name in names], atol=1e-6)


def test_gradient_of_the_principal_point_is_the_sum_over_means2d():
    case = Case(spread=0.2)  # no mean is beyond the margin, which depends on the principal point
    _, gradients = render(case.inputs(), case, "torch")
    torch.testing.assert_close(gradients["intrinsics"][:2, 2], gradients["means2d"].sum(0))


def one(**changed: object) -> dict:
    """Arguments of a round white Gaussian at depth 2 that projects to the center of pixel (row 3, column 4)."""
    intrinsics = torch.tensor([[8.0, 0, 4.5], [0, 8, 3.5], [0, 0, 1]]).double()
    arguments: dict = {"means": torch.tensor([[0.0, 0, 2]]), "scales": torch.full((1, 3), 0.25)}
    arguments |= {"quats": torch.tensor([[1.0, 0, 0, 0]]), "opacities": torch.tensor([0.5]), "colors": torch.ones(1, 3)}
    arguments |= {"intrinsics": intrinsics, "world_to_camera": torch.eye(4), "image_size": (8, 10)}
    arguments |= changed
    return {k: v.double() if isinstance(v, Tensor) else v for k, v in arguments.items()}


@pytest.mark.parametrize("backend", ["torch", "reference"])
def test_image_of_one_gaussian(backend: str):
    out = rasterize(**one(background=torch.tensor([0.2, 0.4, 0.6])), backend=backend)
    assert out.means2d.tolist() == [[4.5, 3.5]]
    variance = (0.25 * 8 / 2) ** 2 + 0.3
    dx, dy = torch.arange(10) - 4.0, torch.arange(8) - 3.0
    alpha = 0.5 * torch.exp(-(dx**2 + dy[:, None] ** 2) / (2 * variance)).double()
    alpha = torch.where(alpha >= 1 / 255, alpha, 0)
    torch.testing.assert_close(out.alpha, alpha)
    torch.testing.assert_close(out.depth, 2 * alpha)
    torch.testing.assert_close(out.color[2], alpha + 0.6 * (1 - alpha))
    assert out.radii.tolist() == [math.ceil(math.sqrt(2 * math.log(255 / 2) * variance))]


@pytest.mark.parametrize("backend", ["torch", "reference"])
def test_nearer_gaussians_occlude_farther_ones(backend: str):
    means = torch.tensor([[0.0, 0, 4], [0, 0, 2], [0, 0, -2], [0, 0, 3]])
    colors = torch.eye(4)
    three = one(
        means=means, scales=torch.full((4, 3), 0.1), quats=torch.tensor([[1.0, 0, 0, 0]] * 4), colors=colors,
        opacities=torch.tensor([0.5, 0.6, 1, 0.7]),
    )  # fmt: skip
    out = rasterize(**three, backend=backend)
    expected = torch.tensor([0.4 * 0.3 * 0.5, 0.6, 0, 0.4 * 0.7]).double()
    torch.testing.assert_close(out.color[:, 3, 4], expected)
    torch.testing.assert_close(out.depth[3, 4], (expected * torch.tensor([4, 2, 0, 3])).sum())
    assert (out.radii > 0).tolist() == [True, True, False, True]


@pytest.mark.parametrize("backend", ["torch", "reference"])
def test_alpha_is_limited_and_opaque_pixels_end(backend: str):
    """With alpha 0.99 the transmittance is 1e-2 after one Gaussian and 1e-4 after two; 0.9 keeps the limit clear."""
    for opacities, counted in (((1.0, 0.9, 0.95, 0.5), 2), ((1.0, 0.995, 0.5, 0.5), 1)):
        means = torch.tensor([[0.0, 0, 2], [0, 0, 3], [0, 0, 4], [0, 0, 5]])
        four = one(
            means=means, scales=torch.full((4, 3), 0.1), quats=torch.tensor([[1.0, 0, 0, 0]] * 4),
            colors=torch.eye(4), opacities=torch.tensor(opacities),
        )  # fmt: skip
        color = rasterize(**four, backend=backend).color[:, 3, 4]
        assert color[0].item() == pytest.approx(0.99)
        if counted == 2:  # the third would leave 5e-5
            torch.testing.assert_close(color[1:], torch.tensor([0.01 * 0.9, 0, 0]).double())


def test_thousands_of_gaussians_on_one_pixel():
    number = 3000
    inputs = one(
        means=torch.rand(number, 3) * 0.02 + torch.tensor([0.0, 0, 2]), scales=torch.full((number, 3), 0.02),
        quats=torch.randn(number, 4), opacities=torch.full((number,), 0.01), colors=torch.rand(number, 3),
    )  # fmt: skip
    inputs["means"].requires_grad_()
    results = []
    for backend in ("torch", "reference"):
        out = rasterize(**inputs, backend=backend)
        gradient = torch.autograd.grad((out.color[0] * out.depth).sum(), inputs["means"])[0]
        results.append((out.color, gradient))
    for found, expected in zip(*results, strict=True):
        assert_close(found, expected)


def test_bands_and_steps_do_not_change_the_image(monkeypatch: pytest.MonkeyPatch):
    case = replace(CASES["two cameras"], number=60)
    expected, expected_gradients = render(case.inputs(), case, "torch")
    monkeypatch.setattr(tiles, "PAIRS_AT_ONCE", 50)
    monkeypatch.setattr(tiles, "PIXELS_AT_ONCE", 1)
    monkeypatch.setattr(tiles, "SLAB", 3)
    found, gradients = render(case.inputs(), case, "torch")
    torch.testing.assert_close(found.color, expected.color)
    for name, gradient in expected_gradients.items():
        torch.testing.assert_close(gradients[name], gradient)


def test_lists_are_bounded_and_tight():
    """No list of a band exceeds the bound by more than a row of tiles, and few listed pairs have no visible pixel."""
    case = Case(number=300, size=(40, 40), scale=0.1, stretch=1.0)
    inputs = case.inputs()
    tensors = [inputs[name][None] for name in (*GAUSSIANS[:4], "intrinsics", "world_to_camera")]
    projected = projection.project(*tensors, 40, 40, 0.01)
    opacities = inputs["opacities"][None]
    features = torch.ones(1, 300, 1, dtype=torch.float64)
    splats = Splats(*projected[:2], opacities, features, *projected[2:], 40, 40)
    scene = tiles.Scene(splats)
    steps = [step for lists in scene.parts() for step in scene.steps(lists)]
    listed = sum(len(lists.ids) for lists in scene.parts())
    seen = sum(int((step.alpha > 0).any(-1).sum()) for step in steps)
    assert seen > 0.8 * listed
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tiles, "PAIRS_AT_ONCE", 300)
        sizes = [len(lists.ids) for lists in scene.parts()]
    assert sum(sizes) == listed
    assert max(sizes) < 300 + listed / 4


def test_output_and_gradients_are_deterministic():
    case = Case(number=200, size=(40, 40))
    first, second = (render(case.inputs(torch.float32), case, "torch") for _ in range(2))
    assert torch.equal(first[0].color, second[0].color)
    assert all(torch.equal(first[1][name], second[1][name]) for name in first[1])


def test_equal_depths_are_composited_in_the_order_of_the_gaussians():
    pair = {"scales": torch.full((2, 3), 0.1), "quats": torch.tensor([[1.0, 0, 0, 0]] * 2)}
    pair |= {"means": torch.tensor([[0.0, 0, 2]] * 2), "opacities": torch.full((2,), 0.5), "colors": torch.eye(2)}
    for backend in ("torch", "reference"):
        assert rasterize(**one(**pair), backend=backend).color[:, 3, 4].tolist() == pytest.approx([0.5, 0.25])


def test_cameras_are_rendered_independently():
    case = Case(cameras=3)
    inputs = case.inputs()
    together = rasterize(**inputs, image_size=case.size, sh_degree=3)
    for index in range(3):
        single = {**inputs, **{name: inputs[name][index] for name in ("intrinsics", "world_to_camera")}}
        alone = rasterize(**single, image_size=case.size, sh_degree=3)
        for found, expected in zip(alone, together, strict=True):
            torch.testing.assert_close(found, expected[index])


def test_background_per_camera():
    inputs = Case(cameras=2, number=0, background=False).inputs()
    background = torch.rand(2, 3, dtype=torch.float64)
    out = rasterize(**inputs, image_size=(3, 5), background=background, sh_degree=3)
    torch.testing.assert_close(out.color, background[..., None, None].expand(2, 3, 3, 5))
    assert not out.alpha.any()
    assert not out.depth.any()


def test_culled_gaussians_have_finite_gradients():
    means = torch.tensor([[0.0, 0, 0], [0, 0, 0.01], [1, 1, -1], [0, 0, 2]]).double().requires_grad_()
    four = one(
        means=means, scales=torch.full((4, 3), 0.1), quats=torch.tensor([[1.0, 0, 0, 0]] * 4),
        colors=torch.ones(4, 3), opacities=torch.full((4,), 0.5),
    )  # fmt: skip
    rasterize(**four).color.sum().backward()
    assert means.grad.isfinite().all()
    assert not means.grad[:3].any()


def test_operator_registration():
    case = Case(number=5, size=(6, 7))
    inputs = case.inputs(torch.float32)
    tensors = [inputs[name][None] for name in (*GAUSSIANS[:4], "intrinsics", "world_to_camera")]
    projected = projection.project(*tensors, *case.size, 0.01)
    features = torch.rand(1, 5, 4)
    splats = Splats(*projected[:2], inputs["opacities"][None], features, *projected[2:], *case.size)
    differentiable = [tensor.detach().requires_grad_() for tensor in splats[:4]]
    torch.library.opcheck(torch.ops.blueberry_video.rasterize, (*differentiable, *splats[4:], "torch"))


def test_compiles_without_graph_breaks():
    case = Case(number=10, size=(9, 9))
    inputs = case.inputs(torch.float32)
    compiled = torch.compile(
        lambda **tensors: rasterize(**tensors, image_size=case.size, sh_degree=3), fullgraph=True, backend="aot_eager"
    )
    inputs["means"].requires_grad_()
    expected = rasterize(**inputs, image_size=case.size, sh_degree=3)
    out = compiled(**inputs)
    torch.testing.assert_close(out.color, expected.color)
    gradient = torch.autograd.grad(out.color.sum(), inputs["means"])[0]
    torch.testing.assert_close(gradient, torch.autograd.grad(expected.color.sum(), inputs["means"])[0])


def test_autocast_does_not_change_the_output():
    case = Case()
    inputs = case.inputs(torch.float32)
    expected = rasterize(**inputs, image_size=case.size, sh_degree=3)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(rasterize(**inputs, image_size=case.size, sh_degree=3).color, expected.color)


def test_forward_mode_raises():
    inputs = one()
    with pytest.raises(ValueError, match=r"rasterize.*jvp.*reverse mode"):
        torch.func.jvp(
            lambda means: rasterize(**{**inputs, "means": means}).color, (inputs["means"],), (inputs["means"],)
        )


@needs_gsplat
@pytest.mark.filterwarnings("ignore:.torch.jit.script")  # used by gsplat
@pytest.mark.parametrize("name", ["usual", "two cameras"])
def test_arguments_of_gsplat(name: str, monkeypatch: pytest.MonkeyPatch):
    """Its PyTorch functions build the lists of tiles; a dense compositor checks them and replaces its CUDA kernel."""
    import gsplat
    from gsplat.cuda import _torch_impl

    case = CASES[name]
    inputs = case.inputs(torch.float32)
    expected = rasterize(**inputs, image_size=case.size, sh_degree=3)

    def rasterize_to_pixels(means2d, conics, colors, opacities, width, height, tile_size, offsets, ids, **_):
        cameras, number = opacities.shape
        assert offsets.shape == (cameras, -(-height // tile_size), -(-width // tile_size))
        bounds = [*offsets.flatten().tolist(), len(ids)]
        listed = {(tile, i) for tile in range(len(bounds) - 1) for i in ids[bounds[tile] : bounds[tile + 1]].tolist()}
        visible = torch.zeros(cameras * number)
        visible[[i for _, i in listed]] = 1
        assert torch.equal(visible.view(cameras, number) > 0, expected.radii.view(cameras, number) > 0)
        extents = visible.view(cameras, number, 1).expand(-1, -1, 2)
        image, after = reference.composite(
            Splats(means2d, conics, opacities, colors, colors[..., -1], extents, height, width)  # the last is the depth
        )
        return image.movedim(1, -1), (1 - after)[..., None]

    monkeypatch.setattr(gsplat, "isect_tiles", _torch_impl._isect_tiles)
    monkeypatch.setattr(gsplat, "isect_offset_encode", _torch_impl._isect_offset_encode)
    monkeypatch.setattr(gsplat, "rasterize_to_pixels", rasterize_to_pixels)
    monkeypatch.setattr(function, "_backend", lambda backend, means: backend)
    out = rasterize(**inputs, image_size=case.size, sh_degree=3, backend="gsplat")
    assert torch.equal(out.radii, expected.radii)
    for found, wanted in zip(out[:4], expected[:4], strict=True):
        assert_close(found, wanted)


# ---- projection and spherical harmonics ------------------------------------------------------------------------------


@needs_gsplat
@pytest.mark.filterwarnings("ignore:.torch.jit.script")  # used by gsplat
@pytest.mark.parametrize("name", ["usual", "off-center", "behind the camera", "wider than the image", "long and thin"])
def test_projection_matches_gsplat(name: str):
    from gsplat.cuda._torch_impl import _fully_fused_projection, _quat_scale_to_covar_preci

    case = CASES[name]
    inputs = case.inputs()
    height, width = case.size
    tensors = [inputs[name][None] for name in (*GAUSSIANS[:4], "intrinsics", "world_to_camera")]
    found = projection.project(*tensors, height, width, 0.01)
    normalized = torch.nn.functional.normalize(inputs["quats"], dim=-1)
    covariances, _ = _quat_scale_to_covar_preci(normalized, inputs["scales"], True, False)
    cameras = (inputs["world_to_camera"][None], inputs["intrinsics"][None])
    _, means2d, depths, conics, _ = _fully_fused_projection(inputs["means"], covariances, *cameras, width, height)
    front = depths > 0.01
    torch.testing.assert_close(found.depths, depths)
    torch.testing.assert_close(found.means2d[front], means2d[front])
    torch.testing.assert_close(found.conics[front], conics[front], rtol=1e-8, atol=1e-12)


@needs_gsplat
@pytest.mark.filterwarnings("ignore:.torch.jit.script")  # used by gsplat
def test_harmonics_match_gsplat():
    from gsplat.cuda._torch_impl import _spherical_harmonics

    directions = torch.nn.functional.normalize(torch.randn(20, 3, dtype=torch.float64), dim=-1)
    coefficients = torch.randn(20, 16, 3, dtype=torch.float64)
    for degree in range(4):
        expected = (_spherical_harmonics(degree, directions, coefficients) + 0.5).clamp(min=0)
        found = projection.harmonics_color(coefficients[None], directions[None], degree)[0]
        torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)  # gsplat rounds its constants


def test_harmonics_are_orthonormal():
    """Integrals over the sphere by Gauss-Legendre nodes in z and equidistant angles: exact to degree 6."""
    nodes, weights = (torch.from_numpy(v) for v in np.polynomial.legendre.leggauss(4))
    angles = torch.arange(8, dtype=torch.float64) * math.tau / 8
    radius = (1 - nodes**2).sqrt()[:, None]
    directions = torch.stack([radius * angles.cos(), radius * angles.sin(), nodes[:, None].expand(4, 8)], -1)
    basis = projection.harmonics(directions, 3)
    products = torch.einsum("ijk,ijl,i->kl", basis, basis, weights) * math.tau / 8
    torch.testing.assert_close(products, torch.eye(16, dtype=torch.float64))


def test_rotations_are_those_of_the_quaternions():
    half = 0.4
    matrix = projection.rotations(torch.tensor([2 * math.cos(half), 0, 0, 2 * math.sin(half)], dtype=torch.float64))
    cosine, sine = math.cos(2 * half), math.sin(2 * half)
    torch.testing.assert_close(matrix, torch.tensor([[cosine, -sine, 0], [sine, cosine, 0], [0, 0, 1]]).double())


def test_cameras_of_the_world_project_its_surfaces_to_their_pixels():
    clip = World("train", 1, num_frames=2, image_size=16, camera="orbit")[0]
    for depth, pose in zip(clip["depth"], clip["poses"]):
        rows, columns = torch.nonzero(depth > 0).unbind(1)
        pixels = torch.stack([columns + 0.5, rows + 0.5, torch.ones_like(rows)], 1)
        points = depth[rows, columns, None] * (pixels @ torch.linalg.inv(clip["intrinsics"]).T)
        means = (points @ pose[:3, :3].T + pose[:3, 3])[None]
        shared = [torch.ones_like(means), torch.ones(1, len(rows), 4), torch.ones(1, len(rows))]
        cameras = (clip["intrinsics"][None], torch.linalg.inv(pose)[None])
        found = projection.project(means, *shared, *cameras, 16, 16, 0.01)
        torch.testing.assert_close(found.means2d[0], pixels[:, :2], rtol=0, atol=1e-4)
        torch.testing.assert_close(found.depths[0], depth[rows, columns])


@pytest.mark.parametrize("x", [0.0, 3.0, 30.0])
def test_projection_matches_its_reference_beyond_the_margin(x: float):
    inputs = one(means=torch.tensor([[x, -x, 2.0]]), scales=torch.tensor([[2.0, 0.1, 0.4]]))
    tensors = [inputs[name][None] for name in (*GAUSSIANS[:4], "intrinsics", "world_to_camera")]
    for found, expected in zip(projection.project(*tensors, 8, 10, 0.01), reference.project(*tensors, 8, 10, 0.01)):
        torch.testing.assert_close(found, expected)


# ---- errors ----------------------------------------------------------------------------------------------------------

SCALED = torch.eye(4) * torch.tensor([2.0, 2, 2, 1])
MIRRORED = torch.diag(torch.tensor([1.0, 1, -1, 1]))
OPENGL_LAST_ROW = torch.eye(4).roll(1, 0)
SKEWED = torch.tensor([[8.0, 1, 4], [0, 8, 4], [0, 0, 1]])
WITHOUT_FOCAL = torch.tensor([[0.0, 0, 4], [0, 8, 4], [0, 0, 1]])


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"means": torch.zeros(3)}, r"means.*\(3,\).*\(N, 3\)"),
        ({"means": torch.zeros(2, 3)}, r"scales.*\(1, 3\).*\(2, 3\)"),
        ({"quats": torch.zeros(1, 3)}, r"quats.*\(1, 3\).*\(1, 4\)"),
        ({"opacities": torch.ones(1, 1)}, r"opacities.*\(1, 1\).*\(1,\)"),
        ({"colors": torch.ones(1, 4, 3)}, r"colors.*\(1, 4, 3\).*sh_degree=None"),
        ({"colors": torch.ones(1, 0)}, r"colors.*\(1, 0\).*channel"),
        ({"sh_degree": 1}, r"colors.*\(1, 3\).*sh_degree=1"),
        ({"sh_degree": 2, "colors": torch.ones(1, 4, 3)}, r"K=4.*sh_degree=2.*9"),
        ({"sh_degree": 4}, r"sh_degree=4.*0 to 3"),
        ({"sh_degree": True}, r"sh_degree=True.*0 to 3"),
        ({"intrinsics": torch.eye(4)}, r"intrinsics.*\(4, 4\).*\(3, 3\)"),
        ({"intrinsics": torch.eye(3)[None]}, r"world_to_camera.*\(4, 4\).*\(1, 4, 4\)"),
        ({"intrinsics": SKEWED}, r"intrinsics=.*camera 0"),
        ({"intrinsics": WITHOUT_FOCAL}, r"intrinsics=.*camera 0.*fx > 0"),
        ({"world_to_camera": torch.eye(3)}, r"world_to_camera.*\(3, 3\).*\(4, 4\)"),
        ({"world_to_camera": SCALED}, r"world_to_camera of camera 0.*rigid.*by 3\b"),
        ({"world_to_camera": MIRRORED}, r"world_to_camera of camera 0.*rigid.*-1\b"),
        ({"world_to_camera": OPENGL_LAST_ROW}, r"world_to_camera of camera 0.*rigid"),
        ({"background": torch.ones(4)}, r"background.*\(4,\).*\(3,\)"),
        ({"background": torch.full((3,), math.nan)}, r"background.*1? ?3 values.*NaN"),
        ({"means": torch.full((1, 3), math.nan)}, r"means.*3 values.*NaN"),
        ({"scales": torch.tensor([[0.1, -0.1, 1]])}, r"scales.*-0\.1\b"),
        ({"opacities": torch.tensor([1.5])}, r"opacities.*1\.5\b.*sigmoid"),
        ({"quats": torch.zeros(1, 4)}, r"quats.*0.*\(1, 0, 0, 0\)"),
        ({"image_size": (8, 0)}, r"image_size=\(8, 0\)"),
        ({"image_size": 8}, r"image_size=8\b"),
        ({"image_size": (8.0, 8)}, r"image_size=\(8\.0, 8\)"),
        ({"near": 0.0}, r"near=0\.0\b.*> 0"),
        ({"near": math.nan}, r"near=nan\b"),
        ({"backend": "cuda"}, r"backend='cuda'.*triton"),
        ({"backend": "gsplat"}, r"backend='gsplat'.*CPU"),
    ],
)
def test_wrong_arguments_raise(changed: dict, message: str):
    with pytest.raises(ValueError, match=f"(?s){message}") as error:
        rasterize(**one(**changed))
    assert "\n" not in str(error.value)


def test_wrong_dtypes_raise():
    half = {k: v.bfloat16() if isinstance(v, Tensor) else v for k, v in one().items()}
    with pytest.raises(ValueError, match=r"means.*bfloat16.*float32"):
        rasterize(**half)
    with pytest.raises(ValueError, match=r"opacities.*float32.*float64"):
        rasterize(**{**one(), "opacities": torch.ones(1)})
    cameras = {"intrinsics": torch.eye(3).repeat(2, 1, 1), "world_to_camera": torch.stack([torch.eye(4), SCALED])}
    with pytest.raises(ValueError, match=r"(?s)world_to_camera of camera 1\b"):
        rasterize(**one(**cameras))


def test_docstring_example():
    results = doctest.testmod(function)
    assert results.attempted > 0
    assert results.failed == 0
