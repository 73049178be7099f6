"""Copying the nearest training view: distances in pose and time, and the best of several weights."""

import torch
from torch import Tensor
from torch.utils.data import Dataset

from blueberry_video.evaluation.nearest_view import NearestViews


class Views(Dataset):
    """Uniform gray views of cameras along the x axis; brightness is given."""

    def __init__(self, positions: list[float], times: list[float], levels: list[int], size: int = 4):
        self.poses = torch.eye(4).repeat(len(positions), 1, 1)
        self.poses[:, 0, 3] = torch.tensor(positions)
        self.times, self.levels, self.size = torch.tensor(times), levels, size
        self.reads: list[int] = []

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        self.reads.append(index)
        return {"video": torch.full((1, 3, self.size, self.size), self.levels[index], dtype=torch.uint8)}


def query(position: float, time: float, level: float, size: int = 4) -> dict[str, Tensor]:
    pose = torch.eye(4)[None, None].clone()
    pose[..., 0, 3] = position
    video = torch.full((1, 3, 1, size, size), level / 255)
    return {"video": video, "poses": pose, "time": torch.tensor([[time]])}


def test_candidates_are_nearest_in_pose_and_in_time():
    views = Views([0.0, 1.0, 5.0], [0.9, 0.5, 0.0], [0, 0, 0])
    assert NearestViews(views, 1.0).candidates(query(0.0, 0.0, 0)["poses"][0, 0], torch.tensor(0.0)) == [0, 1, 2]
    same_time = Views([0.0, 1.0, 5.0], [0.0, 0.0, 0.0], [0, 0, 0])
    assert NearestViews(same_time, 1.0).candidates(torch.eye(4), torch.tensor(0.0)) == [0]


def test_turned_cameras_are_farther():
    views = Views([0.0, 0.3], [0.0, 0.0], [0, 0])
    views.poses[0, :3, :3] = torch.diag(torch.tensor([-1.0, 1, -1]))  # looks backwards
    assert NearestViews(views, 1.0).candidates(torch.eye(4), torch.tensor(0.0)) == [1]


def test_psnr_is_that_of_the_best_candidate():
    views = Views([0.0, 5.0], [1.0, 0.0], [100, 151])
    nearest = NearestViews(views, 1.0)
    first, second = query(0.0, 0.0, 100), query(0.01, 0.0, 150)
    found = nearest.psnr({key: torch.cat([first[key], second[key]]) for key in first})
    assert found[0] > 100, "the pictures are equal"
    torch.testing.assert_close(found[1], 20 * torch.tensor(255.0).log10(), atol=1e-3, rtol=0)


def test_views_are_read_once_and_resized():
    views = Views([0.0], [0.0], [80], size=8)
    nearest = NearestViews(views, 1.0)
    values = [nearest.psnr(query(0.0, 0.0, 81)) for _ in range(3)]
    assert views.reads == [0]
    assert torch.equal(values[0], values[2])
    assert 40 < values[0] < 50
