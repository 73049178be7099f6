"""Files of cameras in the format of D-NeRF, without pictures."""

import json
import math

import numpy as np
import pytest

from blueberry_video.data.camera_file import read_camera_file
from blueberry_video.data.scene_formats import OPENGL
from blueberry_video.data.world import World
from posed_pictures import poses


def table(count: int = 3, **settings) -> dict:
    frames = [{"transform_matrix": (pose @ OPENGL).tolist()} for pose in poses(count)]
    return {"camera_angle_x": 0.8, "frames": frames, **settings}


def write(path, value):
    path.write_text(json.dumps(value))
    return path


def test_cameras_are_read(tmp_path):
    found = read_camera_file(write(tmp_path / "a.json", table()), (64, 96))
    np.testing.assert_allclose(found.poses, np.stack(poses(3)), atol=1e-12)
    focal = 48 / math.tan(0.4)
    np.testing.assert_allclose(found.intrinsics, np.tile([[focal, 0, 48], [0, focal, 32], [0, 0, 1]], (3, 1, 1)))
    assert found.times.tolist() == [0, 0.5, 1]


def test_times_and_pixels_of_the_file(tmp_path):
    cameras = table(2, fl_x=100, cx=70, w=128, h=64)
    for frame, time in zip(cameras["frames"], (0.3, 0.1)):
        frame["time"] = time
    found = read_camera_file(write(tmp_path / "a.json", cameras), (32, 64))
    np.testing.assert_allclose(found.intrinsics[0], [[50, 0, 35], [0, 50, 16], [0, 0, 1]])
    assert found.times.tolist() == [0.3, 0.1]


def test_exported_scene_is_a_file_of_cameras(tmp_path):
    World("train", 1, 4, 16, camera="orbit").export_dnerf(0, tmp_path)
    found = read_camera_file(tmp_path / "transforms_train.json", (16, 16))
    assert found.poses.shape == (4, 4, 4)
    np.testing.assert_allclose(found.times, [0, 1 / 3, 2 / 3, 1])


def changed(key, value, count=3):
    cameras = table(count)
    cameras["frames"][1][key] = value
    return cameras


@pytest.mark.parametrize(
    ("cameras", "match"),
    [
        ([1], r"a\.json has a list"),
        ({"cameras": []}, r"a\.json has no frames.*keys: cameras"),
        (table(0), r"frames=\[\]"),
        ({"frames": table()["frames"]}, "camera_angle_x"),
        (table(camera_angle_x=40), "camera_angle_x=40"),
        (changed("transform_matrix", [[1, 0], [0, 1]]), r"(?s)transform_matrix=.*frames\[1\]"),
        (changed("transform_matrix", (2 * np.eye(4)).tolist()), r"frames\[1\] of .*not rigid"),
        (changed("time", 0.5), "2 of the 3 frames .* have no time"),
        (
            changed("time", 1.5, 2) | {"frames": [{**f, "time": 1.5} for f in table(2)["frames"]]},
            r"time=1\.5.*\[0, 1\]",
        ),
        (table(fl_x=100), "has no h"),
        (table(fl_x=100, w=100, h=100), r"size=64x96.*100x100"),
    ],
)
def test_files_of_another_format_raise(tmp_path, cameras, match):
    with pytest.raises(ValueError, match=match):
        read_camera_file(write(tmp_path / "a.json", cameras), (64, 96))


def test_missing_file_raises(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"path=.*none\.json"):
        read_camera_file(tmp_path / "none.json", (64, 96))
