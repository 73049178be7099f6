"""Camera path on a circle: center, radius, direction and rigid poses."""

import math

import torch

from blueberry_video.data.world_scene import WorldScene
from blueberry_video.inference.orbit import orbit


def test_poses_are_rigid_and_look_at_the_scene():
    poses = WorldScene("train", num_times=12, num_held_out=1, image_size=8).poses
    found = orbit(poses, 10)
    turns = found[:, :3, :3]
    torch.testing.assert_close(turns @ turns.mT, torch.eye(3).expand(10, 3, 3), atol=1e-5, rtol=0)
    torch.testing.assert_close(torch.linalg.det(turns), torch.ones(10))
    target = torch.tensor([0.0, 0, 0.3])  # the world's cameras look at this point
    to_target = target - found[:, :3, 3]
    across = to_target - (to_target * turns[:, :, 2]).sum(-1, keepdim=True) * turns[:, :, 2]
    assert across.norm(dim=-1).max() < 0.15
    assert (found[:, 2, 1] < -0.5).all(), "the y axis points down"


def test_circle_has_equal_steps_and_begins_near_the_first_camera():
    poses = WorldScene("train", num_times=12, num_held_out=1, image_size=8).poses
    centers = orbit(poses, 8)[:, :3, 3]
    chords = (centers - centers.roll(1, 0)).norm(dim=-1)
    torch.testing.assert_close(chords, chords[:1].expand(8), atol=1e-4, rtol=0)
    middle = centers.mean(0)
    first, start = poses[0, :3, 3] - middle, centers[0] - middle
    cosine = torch.dot(first[:2], start[:2]) / (first[:2].norm() * start[:2].norm())
    assert cosine > math.cos(math.radians(20))


def test_parallel_cameras_have_a_finite_path():
    poses = torch.eye(4).repeat(3, 1, 1)
    poses[:, 0, 3] = torch.tensor([0.0, 1, 2])
    assert orbit(poses, 4).isfinite().all()
