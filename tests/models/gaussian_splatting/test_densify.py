"""Density control: statistics, selection, clones, splits, pruning, the optimizer state, and exact resumption."""

import copy
import io
import math

import pytest
import torch
from torch import Tensor

from blueberry_video.models.gaussian_splatting import Camera, Deformation, GaussianSplatting4D, HexPlane, Native, Static
from blueberry_video.models.gaussian_splatting.densify import (
    Densification,
    Statistics,
    camera_extent,
    densify,
    reset_opacities,
    select,
)

RATES = {"means": 1e-2, "sh_dc": 1e-2, "sh_rest": 1e-3, "opacity": 5e-2, "scale": 5e-3, "rotation": 1e-3}
DYNAMIC_RATES = {
    "static": {},
    "native": {"time": 1e-2, "velocity": 1e-2},
    "deformation": {"grid": 1e-2, "deformation": 1e-3},
}
SETTINGS = Densification(gradient_threshold=0.5, max_clone_scale=0.1)


def scene(kind: str = "native", number: int = 12) -> GaussianSplatting4D:
    torch.manual_seed(0)
    field = HexPlane(2, (3, 3, 3, 3), (1,))
    dynamics = {"native": Native, "static": Static, "deformation": lambda: Deformation(field, 4)}[kind]()
    return GaussianSplatting4D(dynamics, number, bounds=1.0, sh_degree=1)


def camera(number: int = 0, size: tuple[int, int] = (12, 16)) -> Camera:
    pose = torch.eye(4)
    pose[2, 3] = -4
    intrinsics = torch.tensor([[20.0, 0, size[1] / 2], [0, 20, size[0] / 2], [0, 0, 1]])
    if number:
        pose, intrinsics = pose.repeat(number, 1, 1), intrinsics.repeat(number, 1, 1)
    return Camera.from_pose(pose, intrinsics, size)


def optimizer_of(model: GaussianSplatting4D, kind: str) -> torch.optim.Adam:
    return torch.optim.Adam(model.optimizer_groups({**RATES, **DYNAMIC_RATES[kind]}), eps=1e-15)


def step(model: GaussianSplatting4D, statistics: Statistics, optimizer: torch.optim.Optimizer, number: int) -> None:
    times = torch.tensor([0.1, 0.8])
    rendered = model.render(camera(2), times + 0.01 * number)
    (rendered.color - 0.7).square().mean().backward()
    statistics.update(rendered)
    optimizer.step()
    optimizer.zero_grad()


def planned(gradients: list[float], scales: list[float], kind: str = "native"):
    """Scene with given mean gradients and isotropic scales, and an optimizer with a state."""
    model = scene(kind, len(gradients))
    optimizer, statistics = optimizer_of(model, kind), Statistics(len(gradients))
    step(model, statistics, optimizer, 0)
    with torch.no_grad():
        model.gaussians.log_scales.copy_(torch.tensor(scales).log()[:, None].expand(-1, 3))
    statistics.reset()
    statistics.gradient_sum += 3 * torch.tensor(gradients)
    statistics.views += 3
    return model, statistics, optimizer


def moments(model: GaussianSplatting4D, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    return {
        f"{name}.{key}": value.clone()
        for name, parameter in model.named_parameters()
        for key, value in optimizer.state[parameter].items()
    }


# Statistics


def test_gradients_are_in_normalized_device_coordinates():
    """The norm is that of the gradient of the loss with respect to NDC, which a shift of all NDC positions measures."""
    model, size = scene("static", 1), (12, 16)
    with torch.no_grad():
        model.gaussians.means.zero_()
        model.gaussians.log_scales.fill_(math.log(0.3))
    target, statistics = torch.rand(3, *size), Statistics(1)
    rendered = model.render(camera(), 0.5)
    (rendered.color - target).square().mean().backward()
    statistics.update(rendered)
    pixel = rendered.means2d.grad[0]
    expected = math.hypot(pixel[0].item() * 16 / 2, pixel[1].item() * 12 / 2)
    assert statistics.gradient_sum.item() == pytest.approx(expected, rel=1e-5)
    assert statistics.views.item() == 1
    assert statistics.max_radius.item() == rendered.radii.item()


def test_statistics_of_a_batch_equal_those_of_its_images():
    model, times = scene(number=20), torch.tensor([0.1, 0.8])
    batch, single = Statistics(20), Statistics(20)
    rendered = model.render(camera(2), times)
    rendered.color.square().mean().backward()
    batch.update(rendered)
    for time in times:
        rendered = model.render(camera(), time)
        rendered.color.square().mean().backward()
        single.update(rendered)
    for name, value in batch.rows().items():
        torch.testing.assert_close(value, single.rows()[name])
    assert batch.views.max() == 2


def test_gaussians_out_of_view_are_not_counted():
    model, statistics = scene("static", 3), Statistics(3)
    with torch.no_grad():
        model.gaussians.means[1] = torch.tensor([0.0, 0, -9])  # behind the camera
    rendered = model.render(camera(), 0.5)
    rendered.color.square().mean().backward()
    statistics.update(rendered)
    assert statistics.views.tolist() == [1, 0, 1]
    assert statistics.mean_gradient[1] == 0


def test_statistics_without_gradients_raise():
    model = scene()
    rendered = model.render(camera(), 0.5)
    with pytest.raises(ValueError, match=r"means2d\.grad is None.*backward"):
        Statistics(12).update(rendered)
    rendered.color.sum().backward()
    with pytest.raises(ValueError, match=r"\b12 Gaussians.*\b5\b"):
        Statistics(5).update(rendered)


# Selection and counts


def test_small_gaussians_are_cloned_and_large_ones_split():
    gradients, scales = [0.1, 0.9, 0.5, 0.7, 0.49], [0.05, 0.05, 0.3, 0.2, 0.3]
    clones, splits = select(torch.tensor(gradients), torch.tensor(scales)[:, None].expand(-1, 3), SETTINGS, 2.0)
    assert clones.tolist() == [1, 3]  # 0.2 is 0.1 of the extent
    assert splits.tolist() == [2]


def test_limit_of_gaussians_prefers_large_gradients():
    gradients, scales = torch.tensor([0.6, 0.9, 0.8, 0.9, 0.1]), torch.full((5, 3), 0.05)
    scales[1] = 1
    for limit, expected in ((8, ([2, 3], [1])), (7, ([3], [1])), (6, ([], [1])), (5, ([], [])), (3, ([], []))):
        settings = Densification(gradient_threshold=0.5, max_clone_scale=0.1, max_gaussians=limit)
        assert tuple(indices.tolist() for indices in select(gradients, scales, settings, 1.0)) == expected


@pytest.mark.parametrize("kind", ["native", "deformation"])
def test_densified_rows_and_optimizer_state(kind):
    model, statistics, optimizer = planned([0.1, 0.9, 0.9, 0.2], [0.05, 0.05, 0.5, 0.5], kind)
    parameters = {name: value.detach().clone() for name, value in model.named_parameters()}
    before = moments(model, optimizer)
    counts = densify(model, statistics, SETTINGS, 1.0, optimizer, torch.Generator().manual_seed(1))
    assert counts == (1, 1, 0)
    assert model.number == statistics.number == 6
    source, kept = torch.tensor([0, 1, 3, 1, 2, 2]), 3
    listed = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    assert listed == {id(parameter) for parameter in model.parameters()} == {id(p) for p in optimizer.state}
    after = moments(model, optimizer)
    for name, value in model.named_parameters():
        if "gaussians" in name or (kind == "native" and "dynamics" in name):
            same = 4 if name in ("gaussians.means", "gaussians.log_scales") else 6
            assert torch.equal(value[:same], parameters[name][source[:same]]), name
            for key in ("exp_avg", "exp_avg_sq"):
                assert torch.equal(after[f"{name}.{key}"][:kept], before[f"{name}.{key}"][source[:kept]])
                assert not after[f"{name}.{key}"][kept:].any()
        else:
            assert torch.equal(value, parameters[name])
            assert torch.equal(after[f"{name}.exp_avg"], before[f"{name}.exp_avg"])
        assert after[f"{name}.step"] == 1
    torch.testing.assert_close(model.gaussians.log_scales[4:].exp(), torch.full((2, 3), 0.5 / 1.6))
    assert not any(tensor.any() for tensor in statistics.rows().values())
    step(model, statistics, optimizer, 1)
    assert all(parameter.isfinite().all() for parameter in model.parameters())


def test_children_are_drawn_from_the_gaussian():
    number = 4000
    model, statistics, optimizer = planned([1.0] * number, [1.0] * number, "static")
    turn = torch.tensor([math.cos(0.4), 0, 0, math.sin(0.4)])  # 0.8 rad about z
    with torch.no_grad():
        model.gaussians.means.copy_(torch.tensor([1.0, 2, 3]))
        model.gaussians.quats.copy_(2.5 * turn)
        model.gaussians.log_scales.copy_(torch.tensor([0.5, 0.2, 0.1]).log())
    assert densify(model, statistics, SETTINGS, 1.0, optimizer, torch.Generator().manual_seed(0)).split == number
    assert model.number == 2 * number
    c, s = math.cos(0.8), math.sin(0.8)
    rotation = torch.tensor([[c, -s, 0], [s, c, 0], [0, 0, 1]])
    expected = rotation @ torch.tensor([0.25, 0.04, 0.01]).diag() @ rotation.T
    torch.testing.assert_close(model.gaussians.means.mean(0), torch.tensor([1.0, 2, 3]), atol=0.02, rtol=0)
    torch.testing.assert_close(model.gaussians.means.T.cov().detach(), expected, atol=0.015, rtol=0)


@pytest.mark.parametrize("split_time", [False, True])
def test_children_of_native_gaussians_lie_on_the_trajectory_of_their_parent(split_time):
    model, statistics, optimizer = planned([1.0, 1.0], [1.0, 1.0])
    native = model.dynamics
    with torch.no_grad():
        model.gaussians.log_scales.fill_(-20)  # the only offset is that of the time
        native.velocities.fill_(0.7)
        native.is_static[1] = True
    settings = Densification(gradient_threshold=0.5, max_clone_scale=1e-12, split_time=split_time)
    before, durations = model(0.2).means, native.log_durations.detach().clone()
    densify(model, statistics, settings, 1.0, optimizer, torch.Generator().manual_seed(0))
    native = model.dynamics
    assert native.is_static.tolist() == [False, True] * 2
    torch.testing.assert_close(model(0.2).means, before.repeat(2, 1), atol=1e-5, rtol=1e-5)
    shrinkage = torch.tensor([math.log(1.6) * split_time, 0]).repeat(2)
    torch.testing.assert_close(native.log_durations, durations.repeat(2) - shrinkage)
    assert (native.time_means[0] != native.time_means[2]).item() is split_time


def test_transparent_and_large_gaussians_are_pruned():
    model, statistics, optimizer = planned([0.0] * 5, [0.05, 0.05, 0.3, 0.05, 0.05])
    with torch.no_grad():
        opacities = torch.tensor([0.5, 0.004, 0.5, 0.006, float("nan")])
        model.gaussians.opacity_logits.copy_((opacities / (1 - opacities)).log())
    statistics.max_radius[3] = 21
    settings = Densification(gradient_threshold=0.5, max_radius=20)
    kept = {}
    for prune_large in (False, True):
        twin, twin_statistics = copy.deepcopy((model, statistics))
        twin_optimizer = optimizer_of(twin, "native")
        twin_optimizer.load_state_dict(optimizer.state_dict())
        counts = densify(twin, twin_statistics, settings, 1.0, twin_optimizer, prune_large=prune_large)
        source = [0, 2, 3] if not prune_large else [0]
        assert counts == (0, 0, 5 - len(source))
        assert torch.equal(twin.gaussians.means, model.gaussians.means[source])
        found = moments(twin, twin_optimizer)
        for name, value in moments(model, optimizer).items():
            assert torch.equal(found[name], value[source] if value.ndim else value)
        kept[prune_large] = twin.number
    assert kept == {False: 3, True: 1}


def test_pruning_all_gaussians_raises():
    model, statistics, optimizer = planned([0.0] * 3, [0.05] * 3)
    with torch.no_grad():
        model.gaussians.opacity_logits.fill_(-9)
    with pytest.raises(ValueError, match=r"all 3 Gaussians.*min_opacity=0\.005"):
        densify(model, statistics, SETTINGS, 1.0, optimizer)
    assert model.number == 3


def test_opacity_reset():
    model, _, optimizer = planned([0.0] * 3, [0.05] * 3)
    with torch.no_grad():
        model.gaussians.opacity_logits.copy_(torch.tensor([-6.0, 0, 5]))
    before = moments(model, optimizer)
    reset_opacities(model, SETTINGS, optimizer)
    torch.testing.assert_close(model(0.5, use_dynamics=False).opacities, torch.tensor([0.00247262, 0.01, 0.01]))
    after = moments(model, optimizer)
    for name, value in before.items():
        if name.startswith("gaussians.opacity_logits.exp"):
            assert not after[name].any()
            assert value.any()
        else:
            assert torch.equal(after[name], value)


def test_densification_without_an_optimizer():
    model, statistics, _ = planned([1.0, 0.0], [1.0, 1.0])
    assert densify(model, statistics, SETTINGS, 1.0) == (0, 1, 0)
    assert model.number == 3


# Schedule and settings


def test_schedule():
    settings = Densification()
    assert [step for step in range(11_000) if settings.densifies_at(step)] == list(range(600, 10_000, 100))
    assert [step for step in range(11_000) if settings.resets_at(step)] == [3000, 6000, 9000]
    assert [settings.prunes_large_at(step) for step in (3000, 3001)] == [False, True]


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"interval": 0}, r"^interval=0\b"),
        ({"max_gaussians": 0}, r"max_gaussians=0\b"),
        ({"gradient_threshold": 0}, r"gradient_threshold=0\b"),
        ({"split_factor": 1}, r"split_factor=1\b.*1\.6"),
        ({"min_opacity": 0.01}, r"min_opacity=0\.01.*reset_opacity=0\.01"),
    ],
)
def test_invalid_settings_raise(options, expected):
    with pytest.raises(ValueError, match=expected):
        Densification(**options)


def test_extent_of_cameras():
    poses = torch.eye(4).repeat(4, 1, 1)
    poses[:, :3, 3] = torch.tensor([[1.0, 0, 5], [-1, 0, 5], [0, 2, 5], [0, -2, 5]])
    assert camera_extent(poses) == pytest.approx(2.2)
    with pytest.raises(ValueError, match=r"extent=0\.0.*\b3 cameras"):
        camera_extent(torch.eye(4).repeat(3, 1, 1))


# Resumption


def train(model, statistics, optimizer, generator, steps: range) -> None:
    settings = Densification(start=1, interval=3, gradient_threshold=1e-4, max_clone_scale=0.2, max_gaussians=60)
    for number in steps:
        step(model, statistics, optimizer, number)
        if settings.densifies_at(number + 1):
            densify(model, statistics, settings, 1.0, optimizer, generator)
        if number == 4:
            reset_opacities(model, settings, optimizer)


@pytest.mark.parametrize("kind", ["native", "deformation"])
@pytest.mark.parametrize("stop", [4, 6])  # between two densifications, and right after one
def test_training_resumes_bit_for_bit(kind, stop):
    model, statistics, generator = scene(kind), Statistics(12), torch.Generator().manual_seed(2)
    optimizer = optimizer_of(model, kind)
    train(model, statistics, optimizer, generator, range(stop))
    file = io.BytesIO()
    torch.save([part.state_dict() for part in (model, statistics, optimizer)] + [generator.get_state()], file)
    train(model, statistics, optimizer, generator, range(stop, 10))
    assert model.number > 12

    file.seek(0)
    *states, random_state = torch.load(file)
    resumed, resumed_statistics, resumed_generator = scene(kind), Statistics(12), torch.Generator()
    resumed_optimizer = optimizer_of(resumed, kind)
    for part, state in zip((resumed, resumed_statistics, resumed_optimizer), states):
        part.load_state_dict(state)
    resumed_generator.set_state(random_state)
    train(resumed, resumed_statistics, resumed_optimizer, resumed_generator, range(stop, 10))
    found, expected = resumed.state_dict(), model.state_dict()
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    after = moments(resumed, resumed_optimizer)
    assert all(torch.equal(after[name], value) for name, value in moments(model, optimizer).items())
