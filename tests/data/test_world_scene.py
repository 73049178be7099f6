"""Views of one scene of the world: times and poses of the splits, agreement with the world, and bad input."""

import pytest
import torch

from blueberry_video.data.scene_folder import SceneFolder
from blueberry_video.data.world import World
from blueberry_video.data.world_scene import WorldScene

SIZES = {"num_times": 6, "num_held_out": 5, "image_size": 16, "supersample": 1}


def test_held_out_times_are_half_way_between_training_times():
    train, val, test = (WorldScene(split, **SIZES) for split in ("train", "val", "test"))
    torch.testing.assert_close(train.times, torch.linspace(0, 1, 6))
    torch.testing.assert_close(val.times, torch.linspace(0, 1, 11)[1::2])
    torch.testing.assert_close(test.times, val.times)
    poses = torch.cat([train.poses, val.poses, test.poses])
    distances = torch.cdist(poses.flatten(1), poses.flatten(1)) + torch.eye(len(poses))
    assert distances.min() > 1e-3, "no pose is in two splits"


def test_training_views_are_those_of_the_world():
    """Scene 0 is the first clip of the world in which an object moves."""
    world = World("train", 20, 6, 16, 2, 3, "dnerf", supersample=1)
    index = next(i for i in range(20) if world.scene(i).motion != "still")
    clip, views = world[index], WorldScene("train", **SIZES)
    assert torch.equal(torch.cat([views[i]["video"] for i in range(6)]), clip["video"])
    torch.testing.assert_close(torch.cat([views[i]["poses"] for i in range(6)]), clip["poses"])
    torch.testing.assert_close(views[0]["intrinsics"], clip["intrinsics"])


def test_scenes_move_and_differ():
    scenes = [WorldScene("train", number, **SIZES).scene for number in range(8)]
    assert "still" not in {scene.motion for scene in scenes}
    assert len({scene.seed for scene in scenes}) == 8


def test_rig_has_four_static_cameras():
    views = WorldScene("train", camera="rig4", **SIZES)
    assert len(views) == 24
    poses = views.poses.unflatten(0, (4, 6))
    assert torch.equal(poses, poses[:, :1].expand_as(poses))
    torch.testing.assert_close(views.times.view(4, 6), torch.linspace(0, 1, 6).expand(4, 6))
    assert not torch.equal(views[0]["video"], views[6]["video"])


def test_items_are_those_of_a_scene_folder(tmp_path):
    World("train", 3, 3, 16, 2, 2, "dnerf", supersample=1).export_dnerf(0, tmp_path)
    folder, views = SceneFolder(tmp_path), WorldScene("train", **SIZES)
    for index in (0, 1):
        first, second = folder[index], views[index]
        assert first.keys() == second.keys()
        for key, value in first.items():
            if key != "id":
                assert (value.dtype, value.shape) == (second[key].dtype, second[key].shape), key
    assert (views.points, views.colors, views.background) == (None, None, folder.background)
    assert torch.equal(views[2]["video"], WorldScene("train", **SIZES)[2]["video"]), "a pure function of the index"
    assert "6 train views at 6 times" in views.describe()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"split": "all"}, "split='all'.*train"),
        ({"camera": "orbit"}, "camera='orbit'.*dnerf"),
        ({"scene": -1}, "scene=-1"),
        ({"num_times": 2, "num_held_out": 1}, "num_times=2"),
        ({"num_held_out": 6}, r"num_held_out=6.*5"),
        ({"image_size": 4}, "image_size=4"),
    ],
)
def test_bad_arguments_raise(arguments: dict, message: str):
    with pytest.raises(ValueError, match=message):
        WorldScene(**SIZES | arguments)


def test_index_out_of_range_raises():
    with pytest.raises(IndexError):
        WorldScene(**SIZES)[6]
