"""Posed scenes: D-NeRF, Nerfies and Neu3D folders, the round trip of the world, and invalid scenes."""

import json
import math
from pathlib import Path

import av
import numpy as np
import pytest
import torch
from PIL import Image

from blueberry_video.data.batches import collate
from blueberry_video.data.scene_folder import SceneFolder
from blueberry_video.data.scene_views import natural_key, undistort
from blueberry_video.data.world import World
from blueberry_video.video.errors import BrokenVideoError
from posed_pictures import SIZE, picture, poses

OPENGL = np.diag([1.0, -1, -1, 1])


def write_json(path: Path, value: object) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value))


# D-NeRF


def dnerf(root: Path, count: int = 3, **changes) -> dict:
    """Folder with ``count`` views in each split; ``changes`` are those of frame 1 of train. Returns train's table."""
    tables = {}
    for split in ("train", "val", "test"):
        frames = [
            {"file_path": f"./{split}/r_{i}", "time": i / (count - 1), "transform_matrix": (pose @ OPENGL).tolist()}
            for i, pose in enumerate(poses(count))
        ]
        for i in range(count):
            picture(root / split / f"r_{i}.png", 10 * i)
        tables[split] = {"camera_angle_x": 0.7, "frames": frames}
    for key, value in changes.items():
        if value is None:
            del tables["train"]["frames"][1][key]
        else:
            tables["train"]["frames"][1][key] = value
    for split, table in tables.items():
        write_json(root / f"transforms_{split}.json", table)
    return tables["train"]


@pytest.mark.parametrize(("camera", "num_frames"), [("dnerf", 4), ("rig4", 3)])
def test_export_and_import_of_the_world_are_identical(tmp_path, camera, num_frames):
    world = World("train", 5, num_frames=num_frames, image_size=16, camera=camera)
    world.export_dnerf(1, tmp_path)
    sample, views = world.sample(1), SceneFolder(tmp_path)
    count = len(sample["K"]) * num_frames
    assert len(views) == count
    items = [views[i] for i in range(count)]
    assert torch.equal(torch.cat([item["video"] for item in items]), sample["video"].flatten(0, 1))
    assert torch.equal(torch.cat([item["poses"] for item in items]), sample["c2w"].flatten(0, 1))
    intrinsics = sample["K"].repeat_interleave(num_frames, 0)
    assert torch.equal(torch.stack([item["intrinsics"] for item in items]), intrinsics)
    times = torch.cat([item["time"] for item in items])
    torch.testing.assert_close(times, sample["time"].repeat(len(sample["K"])), rtol=0, atol=1e-7)
    assert torch.equal(views.poses, sample["c2w"].flatten(0, 1))
    assert torch.equal(views.times, times)
    for split in ("val", "test"):
        assert len(SceneFolder(tmp_path, split)) == num_frames


def test_transparent_pixels_show_the_background(tmp_path):
    dnerf(tmp_path)
    picture(tmp_path / "train" / "r_0.png", 100, mode="RGBA")
    shown = {}
    for background in ("white", "black", [0.2, 0.4, 0.6]):
        shown[str(background)] = SceneFolder(tmp_path, background=background)[0]["video"][0, :, 0, 0].tolist()
    alpha = 128 / 255
    expected = {
        "white": [round(v * alpha + 255 * (1 - alpha)) for v in (100, 50, 200)],
        "black": [round(v * alpha) for v in (100, 50, 200)],
        "[0.2, 0.4, 0.6]": [round(v * alpha + b * (1 - alpha)) for v, b in zip((100, 50, 200), (51, 102, 153))],
    }
    assert shown == expected


def test_items_are_clips_of_one_frame(tmp_path):
    dnerf(tmp_path)
    views = SceneFolder(tmp_path)
    batch = collate([views[0], views[2]])
    shapes = {key: tuple(value.shape) for key, value in batch.items() if isinstance(value, torch.Tensor)}
    assert shapes == {"video": (2, 1, 3, *SIZE), "intrinsics": (2, 3, 3), "poses": (2, 1, 4, 4), "time": (2, 1)}
    assert batch["id"] == ["train/r_0", "train/r_2"]
    focal = 0.5 * 8 / math.tan(0.35)
    assert batch["intrinsics"][0].tolist() == pytest.approx(np.array([[focal, 0, 4], [0, focal, 3], [0, 0, 1]]))
    with pytest.raises(IndexError, match=r"index 3\b"):
        views[3]
    assert "3 train views at 3 times (D-NeRF, no points)" in views.describe()


def test_resized_pictures_have_scaled_intrinsics(tmp_path):
    dnerf(tmp_path)
    views = SceneFolder(tmp_path, image_size=(3, 16), in_memory=True)
    item, original = views[1], SceneFolder(tmp_path)[1]
    assert item["video"].shape == (1, 3, 3, 16)
    assert torch.equal(item["intrinsics"], torch.tensor([[2.0], [0.5], [1]]) * original["intrinsics"])
    assert torch.equal(views[1]["video"], item["video"])
    assert views.cache_key != SceneFolder(tmp_path).cache_key


def test_focal_lengths_in_pixels_have_precedence(tmp_path):
    table = dnerf(tmp_path)
    table |= {"fl_x": 20.0, "fl_y": 22.0, "cx": 7.0, "cy": 5.0, "w": 16, "h": 12}
    write_json(tmp_path / "transforms_train.json", table)
    item = SceneFolder(tmp_path)[0]  # pictures have half the size of the camera
    assert item["intrinsics"].tolist() == [[10, 0, 3.5], [0, 11, 2.5], [0, 0, 1]]


def test_scene_without_times_is_static(tmp_path):
    table = dnerf(tmp_path)
    for frame in table["frames"]:
        del frame["time"]
    write_json(tmp_path / "transforms_train.json", table)
    for split in ("val", "test"):
        (tmp_path / f"transforms_{split}.json").unlink()
    assert SceneFolder(tmp_path).times.tolist() == [0, 0, 0]
    with pytest.raises(ValueError, match=r"split='val'.*train 3, val 0, test 0"):
        SceneFolder(tmp_path, "val")


STRETCHED = np.diag([1.1, 1, 1, 1]).tolist()
MIRRORED = np.diag([-1.0, 1, 1, 1]).tolist()
SHEARED = [[1, 0, 0, 0], [0, 1, 0, 0], [0, 0, 1, 0], [0, 0, 1, 1]]


@pytest.mark.parametrize(
    ("changes", "error", "expected"),
    [
        ({"time": 1.5}, ValueError, r"time=1\.5 of frames\[1\].*transforms_train\.json.*\[0, 1\]"),
        ({"time": -0.1}, ValueError, r"time=-0\.1 of frames\[1\]"),
        ({"time": float("nan")}, ValueError, r"time=nan of frames\[1\]"),
        ({"time": "soon"}, ValueError, r"frames\[1\] of .* has time='soon'.*\[0, 1\]"),
        ({"time": None}, ValueError, r"1 of the 9 frames.*no time"),
        ({"transform_matrix": STRETCHED}, ValueError, r"frames\[1\].*not rigid.*0\.21"),
        ({"transform_matrix": MIRRORED}, ValueError, r"frames\[1\].*not rigid.*det R = -1"),
        ({"transform_matrix": SHEARED}, ValueError, r"frames\[1\].*not rigid.*\[0\.0, 0\.0, -1\.0, 1\.0\]"),
        ({"transform_matrix": [[1, 0], [0, 1]]}, ValueError, r"transform_matrix=\[\[1, 0\].*frames\[1\].*4 x 4"),
        ({"transform_matrix": None}, ValueError, r"transforms_train\.json has no transform_matrix"),
        ({"file_path": "./train/lost"}, FileNotFoundError, r"1 of the 9 pictures.*lost\.png"),
        ({"k1": "0"}, ValueError, r"transforms_train\.json has k1='0'"),
        ({"fl_x": [1]}, ValueError, r"transforms_train\.json has fl_x=\[1\]"),
        ({"file_path": 7}, ValueError, r"transforms_train\.json has file_path=7"),
    ],
)
def test_invalid_frames_raise(tmp_path, changes, error, expected):
    dnerf(tmp_path, **changes)
    with pytest.raises(error, match=rf"(?s){expected}"):
        SceneFolder(tmp_path)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ('{"frames": [', r"transforms_train\.json is not JSON"),
        ('{"camera_angle_x": 0.7}', r"transforms_train\.json has no frames \(keys: camera_angle_x\)"),
        ('[{"id": 0, "img_name": "a"}]', r"transforms_train\.json has a list\b"),
        ("ply\nformat ascii", r"transforms_train\.json is not JSON"),
    ],
)
def test_camera_file_of_another_format_raises(tmp_path, text, expected):
    dnerf(tmp_path)
    (tmp_path / "transforms_train.json").write_text(text)
    with pytest.raises(ValueError, match=expected):
        SceneFolder(tmp_path)


@pytest.mark.parametrize("angle", [None, 40.0, "0.7"])
def test_invalid_field_of_view_raises(tmp_path, angle):
    table = dnerf(tmp_path) | {"camera_angle_x": angle}
    write_json(tmp_path / "transforms_train.json", table)
    with pytest.raises(ValueError, match=r"camera_angle_x.*radians"):
        SceneFolder(tmp_path)


def test_broken_pictures_raise(tmp_path):
    dnerf(tmp_path)
    (tmp_path / "train" / "r_1.png").write_bytes(b"no picture")
    picture(tmp_path / "train" / "r_2.png", size=(8, 8))
    views = SceneFolder(tmp_path)
    with pytest.raises(BrokenVideoError, match=r"r_1\.png"):
        views[1]
    with pytest.raises(BrokenVideoError, match=r"r_2\.png is 8 x 8 .*6 x 8"):
        views[2]


def test_unknown_folders_raise(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"root='.*nowhere'"):
        SceneFolder(tmp_path / "nowhere")
    write_json(tmp_path / "cameras.json", [])
    with pytest.raises(ValueError, match=r"cameras\.json.*transforms_train\.json.*poses_bounds\.npy"):
        SceneFolder(tmp_path)


def test_scene_without_views_raises(tmp_path):
    dnerf(tmp_path)
    for split in ("train", "val", "test"):
        write_json(tmp_path / f"transforms_{split}.json", {"camera_angle_x": 0.7, "frames": []})
    with pytest.raises(ValueError, match=r"D-NeRF and 0 views"):
        SceneFolder(tmp_path)


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"split": "valid"}, "split='valid'.*train, val, test"),
        ({"image_size": 0}, r"image_size=0\b"),
        ({"image_size": [3]}, r"image_size=\[3\]"),
        ({"background": "grey"}, "background='grey'.*'white'"),
        ({"background": [0, 0, 2]}, r"background=\[0, 0, 2\]"),
        ({"hold_out": 1}, r"hold_out=1\b.*\b2\b"),
        ({"max_frames": 0}, r"max_frames=0\b"),
    ],
)
def test_invalid_settings_raise(tmp_path, options, expected):
    dnerf(tmp_path)
    with pytest.raises(ValueError, match=expected):
        SceneFolder(tmp_path, **options)


# Nerfies


def nerfies(root: Path, count: int = 4, **camera) -> None:
    names = [f"{i:06d}" for i in range(count)]
    write_json(root / "dataset.json", {"ids": names, "train_ids": names[::2], "val_ids": names[1::2]})
    write_json(root / "metadata.json", {name: {"warp_id": 2 * i, "camera_id": 0} for i, name in enumerate(names)})
    write_json(root / "scene.json", {"scale": 0.5, "center": [1, 2, 3], "near": 0.1, "far": 2})
    for name, pose in zip(names, poses(count)):
        table = {
            "orientation": pose[:3, :3].T.tolist(),
            "position": (pose[:3, 3] / 0.5 + [1, 2, 3]).tolist(),
            "focal_length": 20.0,
            "principal_point": [8.5, 6.5],
            "skew": 0.0,
            "pixel_aspect_ratio": 1.1,
            "radial_distortion": [0, 0, 0],
            "tangential_distortion": [0, 0],
            "image_size": [16, 12],
        }
        write_json(root / "camera" / f"{name}.json", {**table, **camera})
        picture(root / "rgb" / "2x" / f"{name}.png", 60)
        picture(root / "rgb" / "4x" / f"{name}.png", 70, size=(3, 4))
    np.save(root / "points.npy", np.array([[1.0, 2, 3], [2, 2, 3]]))


def test_nerfies(tmp_path):
    nerfies(tmp_path)
    views = SceneFolder(tmp_path)
    assert views.times.tolist() == pytest.approx([0, 2 / 3])
    assert SceneFolder(tmp_path, "val").times.tolist() == pytest.approx([1 / 3, 1])
    torch.testing.assert_close(views.poses, torch.tensor(np.stack(poses(4)[::2])).float())
    item = views[0]
    assert item["video"].shape == (1, 3, 6, 8)
    assert item["video"][0, 0, 0, 0] == 60
    torch.testing.assert_close(item["intrinsics"], torch.tensor([[10, 0, 4.25], [0, 11, 3.25], [0, 0, 1]]))
    assert views.points.tolist() == [[0, 0, 0], [0.5, 0, 0]]
    assert SceneFolder(tmp_path, images="rgb/4x")[0]["video"].shape == (1, 3, 3, 4)


def test_nerfies_without_held_out_views(tmp_path):
    nerfies(tmp_path, count=9)
    write_json(tmp_path / "dataset.json", {"ids": [f"{i:06d}" for i in range(9)]})
    assert [view.name for view in SceneFolder(tmp_path, "test", hold_out=4).views] == ["000002", "000006"]
    assert len(SceneFolder(tmp_path, hold_out=4)) == 7


@pytest.mark.parametrize(
    ("camera", "expected"),
    [
        ({"skew": 0.1}, r"intrinsics=.*000000\.json.*no skew"),
        ({"focal_length": None}, r"000000\.json has no focal_length"),
        ({"principal_point": [1, 2, 3]}, r"principal_point=\[1, 2, 3\].*2 numbers"),
        ({"position": [1e4, 1e4, 1e4]}, r"none of the 2 points.*2 training cameras"),
    ],
)
def test_invalid_nerfies_cameras_raise(tmp_path, camera, expected):
    nerfies(tmp_path, **camera)
    with pytest.raises(ValueError, match=expected):
        SceneFolder(tmp_path)


def test_incomplete_nerfies_scenes_raise(tmp_path):
    nerfies(tmp_path)
    (tmp_path / "camera" / "000001.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"000001\.json"):
        SceneFolder(tmp_path)
    for metadata, expected in (({}, "000000"), ({"000000": {"camera_id": 0}}, "time_id.*000000")):
        write_json(tmp_path / "metadata.json", metadata)
        with pytest.raises(ValueError, match=rf"metadata\.json has no {expected}"):
            SceneFolder(tmp_path)


# Distortion


def test_undistortion_reads_the_distorted_coordinates():
    height, width, focal = 24, 32, 30.0
    columns, rows = np.meshgrid(np.arange(width) + 0.5, np.arange(height) + 0.5)
    intrinsics = np.array([[focal, 0, 16.5], [0, focal, 11.5], [0, 0, 1]])
    source = torch.from_numpy(np.stack([8 * columns, 8 * rows, 0 * rows]).round().astype(np.uint8))
    k1, k2, p1, p2, k3 = distortion = (-0.2, 0.05, 0.004, -0.003, 0.01)
    x, y = (columns - 16.5) / focal, (rows - 11.5) / focal
    r = x**2 + y**2
    radial = 1 + k1 * r + k2 * r**2 + k3 * r**3
    across = focal * (x * radial + 2 * p1 * x * y + p2 * (r + 2 * x**2)) + 16.5
    down = focal * (y * radial + p1 * (r + 2 * y**2) + 2 * p2 * x * y) + 11.5
    found = undistort(source, intrinsics, distortion).numpy()
    inner = (across > 0.5) & (across < width - 0.5) & (down > 0.5) & (down < height - 0.5)
    assert inner.mean() > 0.9
    assert np.abs(found[0] - 8 * across)[inner].max() <= 1
    assert np.abs(found[1] - 8 * down)[inner].max() <= 1
    assert np.abs(across - columns).max() > 0.3
    assert torch.equal(undistort(source, intrinsics, (0, 0, 0, 0, 0)), source)


def test_distorted_pictures_are_undistorted(tmp_path):
    nerfies(tmp_path, radial_distortion=[-0.3, 0, 0])
    ramp = np.repeat(np.arange(0, 240, 30, dtype=np.uint8)[None, :, None], 6, 0).repeat(3, 2)
    Image.fromarray(ramp).save(tmp_path / "rgb" / "2x" / "000000.png")
    found = SceneFolder(tmp_path)[0]["video"][0, 0]
    assert found[0, 0] > 0  # barrel distortion: corners are read from further inside
    assert abs(int(found[3, 4]) - 120) <= 1


# Neu3D


def neu3d(root: Path, cameras: int = 3, frames: int = 4, videos: bool = True, counts: dict[int, int] | None = None):
    height, width = (32, 48)
    rows = []
    for pose in poses(cameras):
        right, down, forward, position = pose[:3].T
        rows.append(np.column_stack([down, right, -forward, position, [2 * height, 2 * width, 80.0]]).ravel())
    np.save(root / "poses_bounds.npy", np.column_stack([np.stack(rows), np.tile([1.0, 9], (cameras, 1))]))
    for camera in range(cameras):
        count = (counts or {}).get(camera, frames)
        grays = [40 * i + 10 * camera for i in range(count)]
        if not videos:
            for i, gray in enumerate(grays):
                picture(root / f"cam{camera}" / "images" / f"{i}.png", gray, (height, width), "L")
            continue
        with av.open(str(root / f"cam{camera:02d}.mp4"), "w") as container:
            stream = container.add_stream("h264", rate=30, options={"crf": "1"})
            stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
            for gray in grays:
                frame = av.VideoFrame.from_ndarray(np.full((height, width, 3), gray, np.uint8), format="rgb24")
                container.mux(stream.encode(frame))
            container.mux(stream.encode())


@pytest.mark.parametrize("videos", [True, False])
def test_neu3d(tmp_path, videos):
    neu3d(tmp_path, videos=videos)
    views = SceneFolder(tmp_path)
    assert len(views) == 8
    assert views.times.tolist() == pytest.approx([0, 1 / 3, 2 / 3, 1] * 2)
    torch.testing.assert_close(views.poses, torch.tensor(np.repeat(np.stack(poses(3)[1:]), 4, 0)).float())
    item = views[6]
    assert item["video"].shape == (1, 3, 32, 48)
    assert abs(item["video"].float().mean().item() - 100) <= 3
    torch.testing.assert_close(item["intrinsics"], torch.tensor([[40.0, 0, 24], [0, 40, 16], [0, 0, 1]]))
    assert len(SceneFolder(tmp_path, "test")) == 4
    assert len(SceneFolder(tmp_path, max_frames=2, held_out_cameras=[])) == 6
    assert SceneFolder(tmp_path, max_frames=2).times.tolist() == [0, 1] * 2


def test_invalid_neu3d_scenes_raise(tmp_path):
    neu3d(tmp_path, counts={2: 2}, videos=False)
    with pytest.raises(ValueError, match=r"2 to 4 frames.*cam2.*max_frames=2"):
        SceneFolder(tmp_path)
    with pytest.raises(ValueError, match=r"held_out_cameras=\[3\].*\b2\b"):
        SceneFolder(tmp_path, max_frames=2, held_out_cameras=[3])
    np.save(tmp_path / "poses_bounds.npy", np.zeros((2, 17)))
    with pytest.raises(ValueError, match=r"3 videos or folders.*2 rows"):
        SceneFolder(tmp_path)
    np.save(tmp_path / "poses_bounds.npy", np.zeros((3, 12)))
    with pytest.raises(ValueError, match=r"poses_bounds\.npy has shape \(3, 12\)"):
        SceneFolder(tmp_path)
    (tmp_path / "poses_bounds.npy").write_text("no array")
    with pytest.raises(ValueError, match=r"poses_bounds\.npy cannot be read"):
        SceneFolder(tmp_path)


# Names


def test_names_are_sorted_by_their_numbers():
    names = ["b1", "a10", "a2", "a", "2", "10", "a2b"]
    assert sorted(names, key=natural_key) == ["2", "10", "a", "a2", "a2b", "a10", "b1"]
