"""4D Gaussian Splatting: HexPlane, deformation, native dynamics, canonical Gaussians, rendering and state dicts."""

import copy
import itertools
import math

import pytest
import torch
from torch import Tensor, nn

from blueberry_video.models.gaussian_splatting import Camera, Deformation, GaussianSplatting4D, HexPlane, Native, Static
from blueberry_video.models.gaussian_splatting.gaussians import (
    HARMONIC_0,
    CanonicalGaussians,
    degree_at,
    nearest_spacing,
    random_points,
)

ROLES = {"means": 1e-3, "sh_dc": 1e-2, "sh_rest": 1e-3, "opacity": 5e-2, "scale": 5e-3, "rotation": 1e-3}
DYNAMIC_ROLES = {
    "static": {},
    "native": {"time": 1e-2, "velocity": 1e-2},
    "deformation": {"grid": 1e-2, "deformation": 1e-3},
}


def field(**options) -> HexPlane:
    defaults = {"features": 3, "resolution": (4, 5, 6, 7), "scales": (1, 2), "bounds": 1.5}
    return HexPlane(**{**defaults, **options})


def dynamics(kind: str, zero_init: bool = True) -> nn.Module:
    if kind == "deformation":
        return Deformation(field(), width=8, zero_init=zero_init)
    return {"static": Static, "native": Native}[kind]()


def scene(kind: str = "deformation", number: int = 30, **options) -> GaussianSplatting4D:
    torch.manual_seed(0)
    return GaussianSplatting4D(dynamics(kind), num_points=number, **{"bounds": 1.0, "sh_degree": 1, **options})


def cameras(number: int = 2, size: tuple[int, int] = (12, 16)) -> Camera:
    poses = torch.eye(4).repeat(number, 1, 1)
    poses[:, 2, 3] = -4 - torch.arange(number) / 4
    intrinsics = torch.tensor([[20.0, 0, size[1] / 2], [0, 20, size[0] / 2], [0, 0, 1]]).repeat(number, 1, 1)
    return Camera.from_pose(poses, intrinsics, size)


def one(camera: Camera, index: int = 0) -> Camera:
    return Camera(camera.intrinsics[index], camera.world_to_camera[index], camera.image_size)


def randomize(module: nn.Module) -> None:
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype))


# HexPlane


def interpolate(plane: Tensor, column: float, row: float) -> Tensor:
    """Bilinear interpolation at coordinates in [-1, 1], written out."""
    rows, columns = plane.shape[1:]
    x, y = ((min(max(c, -1), 1) + 1) / 2 * (n - 1) for c, n in ((column, columns), (row, rows)))
    left, top = min(int(x), columns - 2), min(int(y), rows - 2)
    dx, dy = x - left, y - top
    upper = plane[:, top, left] * (1 - dx) + plane[:, top, left + 1] * dx
    lower = plane[:, top + 1, left] * (1 - dx) + plane[:, top + 1, left + 1] * dx
    return upper * (1 - dy) + lower * dy


@pytest.mark.parametrize("full_time_range", [True, False])
def test_hexplane_is_the_product_of_interpolated_planes(full_time_range):
    planes = field(full_time_range=full_time_range, bounds=[[-1, -2, -3], [1.5, 2, 2]]).double()
    randomize(planes)
    generator = torch.Generator().manual_seed(2)
    positions = 4 * torch.rand(9, 3, generator=generator, dtype=torch.float64) - 2  # some are outside
    times = torch.tensor([0.0, 0.37, 1.0], dtype=torch.float64)
    found = planes(positions, times)
    low, high = planes.bounds
    for (i, t), (j, position) in itertools.product(enumerate(times), enumerate(positions)):
        point = dict(zip("xyz", (2 * (position - low) / (high - low) - 1).tolist()))
        point["t"] = 2 * t.item() - 1 if full_time_range else t.item()
        expected = []
        for scale in planes.planes:
            assert set(scale) == {"xy", "xz", "yz", "xt", "yt", "zt"}
            expected.append(torch.stack([interpolate(scale[a + b], point[a], point[b]) for a, b in scale]).prod(0))
        torch.testing.assert_close(found[i, j], torch.cat(expected), rtol=1e-10, atol=1e-12)


def test_hexplane_initialization():
    planes = HexPlane(2, (8, 8, 8, 5), (1, 2))
    assert planes.planes[1]["xz"].shape == (2, 16, 16)
    assert planes.planes[1]["xt"].shape == (2, 5, 16)  # scales do not change the resolution of time
    assert planes.out_features == 4
    for scale in planes.planes:
        for name, plane in scale.items():
            assert (plane == 1).all() if "t" in name else 0.1 <= plane.min() < 0.15 < 0.45 < plane.max() <= 0.5
    found = planes(torch.rand(6, 3), torch.tensor([0.0, 0.4, 1.0]))
    torch.testing.assert_close(found[0], found[1])
    torch.testing.assert_close(found[0], found[2])


def test_original_time_range_never_reads_half_of_the_time_planes():
    reads = {}
    for full in (True, False):
        planes = field(full_time_range=full, resolution=(4, 4, 4, 9))
        planes(torch.rand(20, 3), torch.linspace(0, 1, 9)).sum().backward()
        gradient = planes.planes[0]["xt"].grad
        reads[full] = [bool(row.any()) for row in gradient.transpose(0, 1)]
    assert reads == {True: [True] * 9, False: [False] * 4 + [True] * 5}


def test_hexplane_losses():
    planes = field().double()
    randomize(planes)
    spatial = time = deviation = rows_only = 0
    for scale in planes.planes:
        for name in ("xy", "xz", "yz"):
            v = scale[name]
            down = (v[:, 2:] - 2 * v[:, 1:-1] + v[:, :-2]).pow(2).mean()
            right = (v[:, :, 2:] - 2 * v[:, :, 1:-1] + v[:, :, :-2]).pow(2).mean()
            spatial, rows_only = spatial + (down + right) / 2, rows_only + down
        for name in ("xt", "yt", "zt"):
            v = scale[name]
            time = time + (v[:, 2:] - 2 * v[:, 1:-1] + v[:, :-2]).pow(2).mean()
            deviation = deviation + (1 - v).abs().mean()
    expected = {"spatial_smoothness": spatial, "time_smoothness": time, "time_planes": deviation}
    torch.testing.assert_close(planes.losses(), expected)
    planes.smooth_both_axes = False
    torch.testing.assert_close(planes.losses()["spatial_smoothness"], rows_only)


def test_time_losses_are_zero_at_initialization():
    losses = field().losses()
    assert losses["time_smoothness"] == losses["time_planes"] == 0 < losses["spatial_smoothness"]
    assert field(resolution=(2, 2, 2, 2)).losses()["time_smoothness"] == 0


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"features": 0}, r"features=0\b.*\b1\b"),
        ({"resolution": (4, 4, 4)}, r"resolution=\[4, 4, 4\].*four"),
        ({"resolution": (4, 4, 4, 1)}, r"resolution=\[4, 4, 4, 1\].*≥ 2"),
        ({"scales": ()}, r"scales=\[\].*\[1, 2\]"),
        ({"bounds": -1}, r"bounds=-1\b.*> 0"),
        ({"bounds": [[0, 0, 0], [1, 1, 0]]}, r"bounds=\[\[0, 0, 0\], \[1, 1, 0\]\].*low < high"),
    ],
)
def test_invalid_hexplane_settings_raise(options, expected):
    with pytest.raises(ValueError, match=expected):
        field(**options)


# Dynamics


@pytest.mark.parametrize("kind", ["deformation", "static"])
def test_initial_scene_is_static(kind):
    model = scene(kind)
    for time in (0.0, 0.3, 1.0):
        for value, expected in zip(model(time), model(0, use_dynamics=False)):
            assert torch.equal(value, expected)


def test_xavier_heads_displace_the_initial_scene():
    model = scene()
    model.dynamics = dynamics("deformation", zero_init=False)
    assert (model(0.5).means - model.gaussians.means).abs().max() > 1e-3


def test_deformation_adds_offsets_to_stored_parameters():
    torch.manual_seed(0)
    model = GaussianSplatting4D(Deformation(field(), 8, depth=2, opacity=True, sh_degree=1), 11, sh_degree=1)
    randomize(model)
    own, net, times = model.gaussians, model.dynamics, torch.tensor([0.2, 0.9])
    found = model(times)
    hidden = net.trunk(net.field(own.means, times))
    offset = {name: head(hidden) for name, head in net.heads.items()}
    torch.testing.assert_close(found.means, own.means + offset["means"])
    torch.testing.assert_close(found.scales, (own.log_scales + offset["log_scales"]).exp())
    torch.testing.assert_close(found.quats, own.quats + offset["quats"])
    torch.testing.assert_close(found.opacities, (own.opacity_logits + offset["opacity_logits"][..., 0]).sigmoid())
    torch.testing.assert_close(found.harmonics, own.harmonics + offset["harmonics"].view(2, 11, 4, 3))
    assert set(Deformation(field()).heads) == {"means", "log_scales", "quats"}


def test_deformation_of_another_degree_raises():
    model = GaussianSplatting4D(Deformation(field(), 8, sh_degree=2), 5, sh_degree=1)
    with pytest.raises(ValueError, match=r"sh_degree.*\b27\b.*\b12\b"):
        model(0.5)


@pytest.mark.parametrize(("options", "expected"), [({"width": 0}, "width=0"), ({"sh_degree": 4}, "sh_degree=4")])
def test_invalid_deformation_settings_raise(options, expected):
    with pytest.raises(ValueError, match=expected):
        Deformation(field(), **options)


def test_native_is_the_conditional_of_a_4d_gaussian():
    model = scene("native").double()
    randomize(model)
    own, native = model.gaussians, model.dynamics
    time = 0.3
    found = model(time)
    for i in range(5):
        spread = torch.diag(own.log_scales[i].exp().square())  # any spatial covariance: it does not depend on time
        variance, velocity = native.log_durations[i].exp().square(), native.velocities[i]
        covariance = torch.zeros(4, 4, dtype=torch.float64)
        covariance[:3, :3] = spread + variance * torch.outer(velocity, velocity)
        covariance[:3, 3] = covariance[3, :3] = variance * velocity
        covariance[3, 3] = variance
        gain = covariance[:3, 3] / covariance[3, 3]
        torch.testing.assert_close(found.means[i], own.means[i] + gain * (time - native.time_means[i]))
        torch.testing.assert_close(covariance[:3, :3] - torch.outer(gain, covariance[3, :3]), spread)
        density = torch.distributions.Normal(native.time_means[i], variance.sqrt())
        relative = (density.log_prob(torch.tensor(time)) - density.log_prob(native.time_means[i])).exp()
        torch.testing.assert_close(found.opacities[i], own.opacity_logits[i].sigmoid() * relative)
    torch.testing.assert_close(found.scales, own.log_scales.exp())


def test_static_gaussians_of_native_dynamics():
    model = scene("native")
    randomize(model)
    native, before = model.dynamics, model(0.5)
    long = native.log_durations >= math.log(0.6)
    assert native.mark_static(model.gaussians, 0.6) == long.sum() > 0
    assert native.mark_static(model.gaussians, 0.6) == 0
    assert torch.equal(native.is_static, long)
    found = model(torch.tensor([0.0, 0.5, 1.0]))
    assert (found.means[0, long] == found.means[2, long]).all()
    assert (found.opacities[0, long] == found.opacities[2, long]).all()
    assert (found.means[0, ~long] != found.means[2, ~long]).any(-1).all()
    torch.testing.assert_close(found.means[1], before.means)  # at the time 0.5 positions are unchanged


def test_initial_times_of_native_dynamics():
    assert scene("native", 500).dynamics.time_means.min() < 0.05
    assert scene("native", 500).dynamics.time_means.max() > 0.95
    assert (GaussianSplatting4D(Native(all_time_centers=False), 5).dynamics.time_means == 0.5).all()
    durations = scene("native", 500).dynamics.log_durations.exp()
    assert 0.15 <= durations.min() < 0.17
    assert 1.8 < durations.max() <= 2.0
    assert 0.4 < durations.median() < 0.7  # log-uniform
    for durations in ((0, 1), (2, 1), (1,)):
        with pytest.raises(ValueError, match=rf"initial_durations=\[{durations[0]}"):
            Native(initial_durations=durations)
    with pytest.raises(ValueError, match=r"static_duration=0\b"):
        Native(static_duration=0)


def test_speed_of_native_dynamics_is_the_mean_l1_norm_of_velocities():
    native = scene("native", 3).dynamics
    with torch.no_grad():
        native.velocities.copy_(torch.tensor([[1.0, -2, 0], [0, 0, 0], [0, 3, 0]]))
    assert native.losses()["speed"] == 2


def test_long_gaussians_become_static_after_a_densification():
    model = scene("native", 4)
    with torch.no_grad():
        model.dynamics.log_durations.copy_(torch.tensor([1.0, 2.9, 3.1, 5.0]).log())
    model.dynamics.after_densification(model.gaussians)
    assert model.dynamics.is_static.tolist() == [False, False, True, True]


@pytest.mark.parametrize("kind", ["deformation", "native", "static"])
def test_every_parameter_has_a_gradient(kind):
    model = scene(kind)
    randomize(model.dynamics)
    model.render(cameras(), torch.tensor([0.2, 0.7])).color.square().sum().backward()
    gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
    assert [name for name, gradient in gradients.items() if gradient is None or not gradient.any()] == []


# Canonical Gaussians


def test_initialization_from_points():
    points, colors = random_points(40, 1.0, torch.Generator().manual_seed(3)), torch.rand(40, 3)
    own = CanonicalGaussians(points, colors, sh_degree=2)
    distances = (points[:, None] - points).norm(dim=-1).sort(1).values[:, 1:4]
    torch.testing.assert_close(own().scales, distances.square().mean(1).sqrt()[:, None].expand(-1, 3))
    torch.testing.assert_close(0.5 + HARMONIC_0 * own.sh_dc[:, 0], colors)
    torch.testing.assert_close(own().opacities, torch.full((40,), 0.1))
    assert own.harmonics.shape == (40, 9, 3)
    assert not own.sh_rest.any()
    torch.testing.assert_close(nearest_spacing(points), nearest_spacing(points, max_distances=100))


def test_random_points_fill_the_box():
    points = random_points(500, [[-4, -4, 0], [4, 2, 1]], torch.Generator().manual_seed(0))
    assert points.amin(0).tolist() == pytest.approx([-4, -4, 0], abs=0.1)
    assert points.amax(0).tolist() == pytest.approx([4, 2, 1], abs=0.1)
    assert random_points(500, 2.0).abs().max() <= 2
    for number, bounds, expected in ((0, 1.0, "number=0"), (1, 0.0, r"bounds=0\.0"), (1, [[0, 0, 0]], "bounds=")):
        with pytest.raises(ValueError, match=expected):
            random_points(number, bounds)


def test_initial_scales_of_coinciding_points_are_finite():
    assert CanonicalGaussians(torch.zeros(5, 3)).log_scales.isfinite().all()
    assert CanonicalGaussians(torch.zeros(1, 3)).log_scales.eq(0).all()


@pytest.mark.parametrize(
    ("points", "colors", "options", "expected"),
    [
        (torch.zeros(4, 2), None, {}, r"points has shape \(4, 2\)"),
        (torch.zeros(4, 3), torch.zeros(3, 3), {}, r"colors has shape \(3, 3\)"),
        (torch.full((4, 3), float("nan")), None, {}, r"points has 4 rows"),
        (torch.zeros(0, 3), None, {}, r"points has shape \(0, 3\).*random_points"),
        (torch.zeros(4, 3), None, {"sh_degree": 4}, r"sh_degree=4\b.*\b3\b"),
    ],
)
def test_invalid_points_raise(points, colors, options, expected):
    with pytest.raises(ValueError, match=expected):
        CanonicalGaussians(points, colors, **options)


def test_degree_increases_every_interval():
    assert [degree_at(step) for step in (0, 999, 1000, 2999, 3000, 99_999)] == [0, 0, 1, 2, 3, 3]
    assert degree_at(5, interval=2, max_degree=1) == 1


def test_initial_scene_depends_on_the_seed_only():
    states = [scene("native", seed=seed).state_dict() for seed in (4, 4, 5)]
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])
    assert not torch.equal(states[0]["gaussians.means"], states[2]["gaussians.means"])


# Rendering


@pytest.mark.parametrize("kind", ["deformation", "native", "static"])
def test_a_batch_of_cameras_and_times_equals_single_renders(kind):
    model = scene(kind)
    randomize(model.dynamics)
    camera, times = cameras(3), torch.tensor([0.1, 0.5, 1.0])
    batch = model.render(camera, times, torch.ones(3))
    for i, time in enumerate(times):
        single = model.render(one(camera, i), time, torch.ones(3))
        assert single.color.shape == (3, 12, 16)
        for name in ("color", "alpha", "depth", "means2d"):
            torch.testing.assert_close(getattr(batch, name)[i], getattr(single, name), rtol=1e-5, atol=1e-5)
    same_time = model.render(camera, 0.5)
    torch.testing.assert_close(same_time.color[1], model.render(one(camera, 1), 0.5).color, rtol=1e-5, atol=1e-5)


def test_degree_limits_the_harmonics():
    model = scene("static")
    with torch.no_grad():
        model.gaussians.sh_rest.add_(1)
    camera = one(cameras())
    assert not torch.allclose(model.render(camera, 0).color, model.render(camera, 0, sh_degree=0).color)
    assert torch.equal(model.render(camera, 0).color, model.render(camera, 0, sh_degree=3).color)


def test_camera_of_a_pose_is_its_inverse():
    turn = torch.linalg.matrix_exp(torch.tensor([[0, 0.1, 0.4], [-0.1, 0, -0.3], [-0.4, 0.3, 0]]).double())
    pose = torch.eye(4, dtype=torch.float64)
    pose[:3, :3], pose[:3, 3] = turn, torch.tensor([1.0, 2, 3])
    camera = Camera.from_pose(pose, torch.eye(3), (4, 4))
    torch.testing.assert_close(camera.world_to_camera, torch.linalg.inv(pose))


@pytest.mark.parametrize("time", [-0.1, 1.01, float("nan"), torch.tensor([0.5, 2.0])])
def test_times_out_of_range_raise(time):
    with pytest.raises(ValueError, match=r"time=.*\[0, 1\]"):
        scene("static")(time)


def test_time_of_a_wrong_shape_raises():
    with pytest.raises(ValueError, match=r"time has shape \(2, 1\)"):
        scene("static")(torch.zeros(2, 1))


# State dicts and optimizer groups


@pytest.mark.parametrize("kind", ["deformation", "native"])
def test_state_dict_with_another_number_of_gaussians_loads_strictly(kind):
    source, target = scene(kind, 23), scene(kind, 9)
    randomize(source)
    optimizer = torch.optim.Adam(target.optimizer_groups({**ROLES, **DYNAMIC_ROLES[kind]}))
    parameters = list(target.parameters())
    target.load_state_dict(source.state_dict())
    assert target.number == 23
    assert all(a is b for a, b in zip(parameters, target.parameters()))
    camera = one(cameras())
    assert torch.equal(target.render(camera, 0.4).color, source.render(camera, 0.4).color)
    target.render(camera, 0.4).color.sum().backward()
    optimizer.step()
    assert not torch.equal(target.gaussians.means, source.gaussians.means)


def test_inconsistent_state_dict_raises():
    source, target = scene("native", 23), scene("native", 9)
    state = source.state_dict()
    state["gaussians.means"] = state["gaussians.means"][:4]
    with pytest.raises(RuntimeError, match=r"gaussians\.means.*4, 3"):
        target.load_state_dict(state)
    del state["gaussians.means"]
    with pytest.raises(RuntimeError, match=r"gaussians\.means"):
        target.load_state_dict(state)


@pytest.mark.parametrize("kind", ["deformation", "native", "static"])
def test_every_parameter_is_in_one_group(kind):
    model = scene(kind)
    groups = model.optimizer_groups({**ROLES, **DYNAMIC_ROLES[kind]})
    listed = [id(parameter) for group in groups for parameter in group["params"]]
    assert sorted(listed) == sorted(map(id, model.parameters()))
    assert {group["name"]: group["lr"] for group in groups} == {**ROLES, **DYNAMIC_ROLES[kind]}


def test_missing_learning_rates_raise():
    with pytest.raises(ValueError, match=r"learning_rates.*Deformation.*grid"):
        scene().optimizer_groups(ROLES)


def test_initialize_replaces_the_gaussians():
    model = scene("native")
    model.initialize(torch.rand(7, 3), torch.rand(7, 3))
    assert model.number == model.dynamics.number == 7
    assert model.render(one(cameras()), 0.5).color.isfinite().all()


@pytest.mark.parametrize("kind", ["deformation", "native"])
def test_training_fits_a_moving_gaussian_better_than_a_static_scene(kind):
    torch.manual_seed(0)
    target = GaussianSplatting4D(Native(initial_durations=(100.0, 100.0)), 1, sh_degree=0)
    with torch.no_grad():
        target.gaussians.means.zero_()
        target.gaussians.log_scales.fill_(math.log(0.3))
        target.gaussians.opacity_logits.fill_(3)
        target.gaussians.sh_dc.fill_(1.5)
        target.dynamics.velocities[:, 0] = 1.5
        target.dynamics.time_means.fill_(0.5)
    camera, times = cameras(4), torch.linspace(0, 1, 4)
    wanted = target.render(camera, times).color.detach()
    losses = {}
    for name in (kind, "static"):
        model = scene(name, 60, sh_degree=0)
        rates = {role: 10 * rate for role, rate in {**ROLES, **DYNAMIC_ROLES[name]}.items()}
        optimizer = torch.optim.Adam(model.optimizer_groups(rates), eps=1e-15)
        for _ in range(60):
            loss = (model.render(camera, times).color - wanted).square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        losses[name] = loss.item()
    assert losses[kind] < 0.5 * losses["static"]


def test_copies_are_independent():
    model = scene("native")
    twin = copy.deepcopy(model)
    twin.gaussians.resize(3)
    assert model.number == 30
