"""Camera paths: turntable, exact interpolation of rotations, times, sizes; rendering frame by frame."""

import math

import pytest
import torch

from blueberry_video.inference import camera_paths as paths
from blueberry_video.inference.render import camera_path, color_of, path_of_cameras, render_frames, size_of
from blueberry_video.ops.rasterizer.projection import rotations
from trained_scenes import trained_scene


@pytest.fixture(scope="module")
def scene():
    return trained_scene("native")


def random_rotations(count: int, seed: int = 0) -> torch.Tensor:
    axes = torch.randn(count, 3, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return torch.stack([rotation(axis) for axis in axes])


def rotation(vector: torch.Tensor) -> torch.Tensor:
    x, y, z = vector.double().tolist()
    return torch.linalg.matrix_exp(torch.tensor([[0, -z, y], [z, 0, -x], [-y, x, 0]], dtype=torch.float64))


def posed(turn: torch.Tensor) -> torch.Tensor:
    pose = torch.eye(4, dtype=torch.float64)
    pose[:3, :3] = turn
    return pose


def test_turntable_circles_the_point_that_the_cameras_look_at(scene):
    poses = paths.turntable(scene.poses, 12).double()
    target = torch.tensor([0.1, 0, 0.2]).double()
    offsets = poses[:, :3, 3] - target
    torch.testing.assert_close(offsets.norm(dim=1), torch.full((12,), 4.0).double(), rtol=2e-3, atol=0)
    torch.testing.assert_close(
        torch.asin(offsets[:, 2] / offsets.norm(dim=1)), torch.full((12,), 0.4).double(), atol=2e-3, rtol=0
    )
    torch.testing.assert_close(poses[0], scene.poses[0].double(), atol=1e-2, rtol=0)  # begins at the first camera
    steps = torch.linalg.vecdot(offsets[:, :2], offsets.roll(-1, 0)[:, :2]) / offsets[:, :2].square().sum(1)
    torch.testing.assert_close(steps, torch.full((12,), math.cos(math.pi / 6)).double(), atol=1e-5, rtol=0)
    turn = poses[:, :3, :3]
    torch.testing.assert_close(turn @ turn.mT, torch.eye(3).double().expand(12, 3, 3), atol=1e-6, rtol=0)
    assert (torch.linalg.det(turn) > 0).all()
    assert (poses[:, 2, 1] < 0).all()  # the y axis of the cameras points down


@pytest.mark.parametrize("case", ["one", "parallel", "above"])
def test_turntable_of_degenerate_cameras_is_finite(case):
    poses = torch.eye(4).repeat(1 if case == "one" else 3, 1, 1)
    if case == "parallel":
        poses[:, 0, 3] = torch.arange(3.0)
    if case == "above":  # all look along the vertical axis in turned directions
        poses[:, :3, :3] = torch.stack([rotation(torch.tensor([0, 0, 2 * math.pi * k / 3])) for k in range(3)]).float()
    found = paths.turntable(poses, 5)
    assert found.isfinite().all()
    torch.testing.assert_close(found[:, :3, :3] @ found[:, :3, :3].mT, torch.eye(3).expand(5, 3, 3), atol=1e-5, rtol=0)


def test_quaternions_of_all_rotations():
    turns = torch.cat([random_rotations(50), torch.stack([rotation(math.pi * axis) for axis in torch.eye(3)])])
    torch.testing.assert_close(rotations(paths.quaternions(turns)), turns, atol=1e-12, rtol=0)


@pytest.mark.parametrize("angle", [1e-9, 1e-4, 0.5, 3.0, 3.14159])
def test_slerp_turns_at_constant_speed_about_one_axis(angle):
    axis = torch.nn.functional.normalize(torch.tensor([1.0, -2, 0.5]).double(), dim=0)
    first = random_rotations(1)[0]
    ends = torch.stack([posed(first), posed(rotation(angle * axis) @ first)])
    found = paths.interpolate_poses(ends, 5).double()
    for index, pose in enumerate(found):
        expected = rotation(angle * axis * index / 4) @ first
        torch.testing.assert_close(pose[:3, :3], expected, atol=1e-6, rtol=0)


def test_interpolation_passes_through_the_cameras():
    poses = torch.stack([posed(turn) for turn in random_rotations(4)])
    poses[:, :3, 3] = torch.arange(12.0).view(4, 3)
    found = paths.interpolate_poses(poses, 10)
    torch.testing.assert_close(found[::3].double(), poses, atol=1e-6, rtol=0)
    torch.testing.assert_close(found[1, :3, 3], torch.tensor([1.0, 2, 3]))
    torch.testing.assert_close(
        paths.interpolate_poses(poses[:1], 3).double(), poses[:1].expand(3, 4, 4), atol=1e-6, rtol=0
    )


def test_cameras_of_a_rig_are_distinct():
    rig = torch.stack([posed(turn) for turn in random_rotations(2)]).repeat_interleave(3, 0)
    found = paths.distinct(rig, torch.tensor([0, 0.5, 1, 0, 0.5, 1]))
    assert torch.equal(found, rig[[0, 3]])


def test_train_path_is_in_the_order_of_times(scene):
    shuffled = torch.tensor([3, 1, 0, 2, 7, 6, 5, 4])
    mixed = scene._replace(poses=scene.poses[shuffled], times=scene.times[shuffled])
    path = camera_path(mixed, "train", frames=8)
    torch.testing.assert_close(path.poses, scene.poses, atol=1e-6, rtol=0)
    assert path.times.tolist() == pytest.approx([i / 7 for i in range(8)])


def test_fixed_path_and_times(scene):
    path = camera_path(scene, "fixed", frames=5, times=(0.0, 1.0, 0.0), camera=3)
    assert path.times.tolist() == [0, 0.5, 1, 0.5, 0]
    assert torch.equal(path.poses, scene.poses[3].expand(5, 4, 4))
    assert camera_path(scene, "fixed", frames=3, times=(0.25,)).times.tolist() == [0.25] * 3
    assert len(camera_path(scene).poses) == 120


def test_sizes_scale_the_camera(scene):
    path = camera_path(scene, image_size=(128, 192), frames=1)
    expected = torch.tensor([[2 * 1.4 * 64, 0, 96 + 3], [0, 2 * 1.4 * 64, 64], [0, 0, 1]])
    torch.testing.assert_close(path.intrinsics[0], expected)


def test_frames_are_those_of_the_model(scene):
    path = camera_path(scene, "turntable", (20, 24), 3)
    frames = list(render_frames(scene.model, path, scene.background))
    assert [tuple(frame.shape) for frame in frames] == [(3, 20, 24)] * 3
    assert not torch.equal(frames[0], frames[1])
    assert all(0 <= frame.min() <= frame.max() <= 1 and frame.std() > 0.02 for frame in frames)
    assert not frames[0].requires_grad


def test_frames_are_rendered_one_by_one(scene, monkeypatch):
    rendered = []
    original = type(scene.model).render
    monkeypatch.setattr(type(scene.model), "render", lambda *a, **k: (rendered.append(1), original(*a, **k))[1])
    frames = render_frames(scene.model, camera_path(scene, "turntable", (8, 8), 10_000), scene.background)
    next(frames)
    next(frames)
    assert len(rendered) == 2


def test_given_cameras_are_resampled(scene):
    given = (scene.poses[:2], scene.intrinsics.expand(2, 3, 3), torch.tensor([0.2, 0.4]), (64, 64))
    assert torch.equal(path_of_cameras(*given).poses, scene.poses[:2])
    path = path_of_cameras(*given, frames=3)
    assert path.times.tolist() == pytest.approx([0.2, 0.3, 0.4])
    assert path_of_cameras(*given, frames=3, key_times=[1.0]).times.tolist() == [1, 1, 1]


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"path": "spiral"}, r"path='spiral'.*turntable"),
        ({"frames": 0}, r"frames=0"),
        ({"path": "fixed", "camera": 8}, r"camera=8.*0 to 7"),
        ({"times": [1.5]}, r"times=\[1.5\].*\[0, 1\]"),
        ({"times": []}, r"times=\[\]"),
        ({"times": [float("nan")]}, r"times=\[nan\]"),
    ],
)
def test_bad_paths_raise(scene, options, match):
    with pytest.raises(ValueError, match=match):
        camera_path(scene, **options)


def test_sizes():
    assert size_of(None, (64, 96), True) == (64, 96)
    assert size_of("32", (64, 96), True) == (32, 48)
    assert size_of([33], (64, 96), False) == (33, 50)
    assert size_of("32x20", (64, 96), True) == (32, 20)
    for size, match in [
        ("a", "size=a"),
        ("0", "size=0"),
        ("1x2x3", "size=1x2x3"),
        ("-4x4", "size=-4x4"),
        ("33x20", "size=33x20.*34x20"),
    ]:
        with pytest.raises(ValueError, match=match):
            size_of(size, (64, 96), True)


def test_colors():
    assert color_of("white").tolist() == [1, 1, 1]
    assert color_of("0,0.5,1").tolist() == [0, 0.5, 1]
    assert color_of((0, 1, 0)).tolist() == [0, 1, 0]
    for color in ("green", "0,1", (0, 0, 2), "0,0,nan"):
        with pytest.raises(ValueError, match="background="):
            color_of(color)
