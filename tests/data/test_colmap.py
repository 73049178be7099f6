"""COLMAP models: text and binary files, scenes, parity with pycolmap, and invalid files."""

import math
import struct
from pathlib import Path

import numpy as np
import pytest
import torch

from blueberry_video.data.colmap import MODELS, PARAMETERS, read_colmap_model
from blueberry_video.data.scene_folder import SceneFolder
from posed_pictures import picture, poses


def quaternion(turn: np.ndarray) -> list[float]:
    w = math.sqrt(1 + np.trace(turn)) / 2
    axis = np.array([turn[2, 1] - turn[1, 2], turn[0, 2] - turn[2, 0], turn[1, 0] - turn[0, 1]]) / (4 * w)
    return [w, *axis.tolist()]


CAMERAS = {
    1: ("SIMPLE_PINHOLE", 16, 12, [20.0, 8, 6]),
    2: ("OPENCV", 16, 12, [20.0, 21, 8, 6, 0.01, 0.02, 0.001, 0.002]),
    3: ("SIMPLE_RADIAL", 16, 12, [20.0, 8, 6, 0.01]),
}
POINTS = [([0.0, 0.1, 0.2], [255, 0, 51], 0.5, [(2, 0), (4, 0)]), ([0.5, 0, 0], [1, 2, 3], 0.1, [])]


def colmap_images(count: int = 10) -> list[tuple[int, list[float], list[float], int, str, list[tuple]]]:
    found = []
    for i, pose in enumerate(poses(count)):
        turn = pose[:3, :3].T
        observed = [(1.5, 2.5, 1 if i in (1, 3) else -1), (3.0, 4.0, -1)] if i % 2 else []
        shift = (-turn @ pose[:3, 3]).tolist()
        found.append((i + 1, quaternion(turn), shift, 1 + i % 3, f"frame_{i}.png", observed))
    return found


def colmap_text(folder: Path, cameras=CAMERAS, images=None) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    lines = [f"{n} {m} {w} {h} {' '.join(map(repr, p))}" for n, (m, w, h, p) in cameras.items()]
    (folder / "cameras.txt").write_text("\n".join(["# Camera list", *lines]) + "\n")
    lines = ["# Image list"]
    for number, quat, shift, camera, name, observed in images or colmap_images():
        lines.append(" ".join(map(str, [number, *quat, *shift, camera, name])))
        lines.append(" ".join(str(value) for point in observed for value in point))
    (folder / "images.txt").write_text("\n".join(lines) + "\n")
    lines = [" ".join(map(str, [i + 1, *xyz, *rgb, error])) for i, (xyz, rgb, error, _) in enumerate(POINTS)]
    (folder / "points3D.txt").write_text("\n".join(lines) + "\n")


def colmap_binary(folder: Path, cameras=CAMERAS, images=None) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    data = struct.pack("<Q", len(cameras))
    for number, (model, width, height, values) in cameras.items():
        data += struct.pack(f"<iiQQ{len(values)}d", number, MODELS.index(model), width, height, *values)
    (folder / "cameras.bin").write_bytes(data)
    images = images or colmap_images()
    data = struct.pack("<Q", len(images))
    for number, quat, shift, camera, name, observed in images:
        data += struct.pack("<i7di", number, *quat, *shift, camera) + name.encode() + b"\0"
        data += struct.pack("<Q", len(observed)) + b"".join(struct.pack("<ddq", *point) for point in observed)
    (folder / "images.bin").write_bytes(data)
    data = struct.pack("<Q", len(POINTS))
    for i, (xyz, rgb, error, track) in enumerate(POINTS):
        data += struct.pack("<Q3d3Bd", i + 1, *xyz, *rgb, error)
        data += struct.pack("<Q", len(track)) + b"".join(struct.pack("<ii", *pair) for pair in track)
    (folder / "points3D.bin").write_bytes(data)


WRITERS = {"text": colmap_text, "binary": colmap_binary}


@pytest.mark.parametrize("kind", WRITERS)
@pytest.mark.parametrize("folder", ["sparse/0", "sparse", "."])
def test_colmap(tmp_path, kind, folder):
    WRITERS[kind](tmp_path / folder)
    for i in range(10):
        picture(tmp_path / "images" / f"frame_{i}.png", 20 * i)
    views = SceneFolder(tmp_path, hold_out=4)
    held_out = SceneFolder(tmp_path, "val", hold_out=4)
    assert [view.name for view in held_out.views] == ["frame_2.png", "frame_6.png"]
    assert held_out.times.tolist() == pytest.approx([2 / 9, 6 / 9])
    assert len(views) == 8
    kept = [i for i in range(10) if i not in (2, 6)]
    torch.testing.assert_close(views.poses, torch.tensor(np.stack(poses(10))[kept]).float())
    assert views[0]["intrinsics"].tolist() == [[10, 0, 4], [0, 10, 3], [0, 0, 1]]
    assert views.views[1].distortion == (0.01, 0.02, 0.001, 0.002, 0)
    assert views[1]["intrinsics"].tolist() == [[10, 0, 4], [0, 10.5, 3], [0, 0, 1]]
    torch.testing.assert_close(views.points, torch.tensor([[0, 0.1, 0.2], [0.5, 0, 0]]))
    torch.testing.assert_close(views.colors, torch.tensor([[255.0, 0, 51], [1, 2, 3]]) / 255)
    assert SceneFolder(tmp_path, static=True).times.unique().tolist() == [0]


@pytest.mark.parametrize("kind", WRITERS)
def test_pycolmap_reads_the_same_model(tmp_path, kind):
    pycolmap = pytest.importorskip("pycolmap")
    WRITERS[kind](tmp_path)
    model, reference = read_colmap_model(tmp_path), pycolmap.Reconstruction(str(tmp_path))
    for image in model.images:
        [other] = [other for other in reference.images.values() if other.name == image.name]
        inverse = other.cam_from_world().inverse().matrix()
        assert np.allclose(inverse, image.pose[:3], atol=1e-9)
        camera = reference.cameras[other.camera_id]
        assert np.allclose(camera.calibration_matrix(), model.cameras[image.camera_id].intrinsics)
    points = np.stack([point.xyz for point in reference.points3D.values()])
    assert sorted(points.tolist()) == sorted(model.points.tolist())


@pytest.mark.parametrize("kind", WRITERS)
def test_models_written_by_pycolmap(tmp_path, kind):
    pycolmap = pytest.importorskip("pycolmap")
    colmap_binary(tmp_path / "ours")
    (tmp_path / "theirs").mkdir()
    reference = pycolmap.Reconstruction(str(tmp_path / "ours"))
    (reference.write_text if kind == "text" else reference.write_binary)(str(tmp_path / "theirs"))
    ours, theirs = read_colmap_model(tmp_path / "ours"), read_colmap_model(tmp_path / "theirs")
    assert ours.cameras.keys() == theirs.cameras.keys()
    images = {image.name: image for image in theirs.images}
    for image in ours.images:
        assert np.allclose(image.pose, images[image.name].pose, atol=1e-9)
    assert sorted(theirs.points.tolist()) == sorted(ours.points.tolist())


def test_each_folder_of_a_colmap_model_is_a_camera(tmp_path):
    images = colmap_images(6)
    names = [f"cam {'ab'[i % 2]}/{i // 2}.png" for i in range(6)]
    images = [(*image[:4], name, []) for image, name in zip(images, names)]
    colmap_text(tmp_path / "sparse" / "0", images=images)
    for name in names:
        picture(tmp_path / "images" / name)
    views = SceneFolder(tmp_path)
    assert dict(zip([view.name for view in views.views], views.times.tolist())) == {
        f"cam {camera}/{i}.png": i / 2 for camera in "ab" for i in range(3)
    }


def test_unsupported_colmap_camera_raises(tmp_path):
    for kind, writer in WRITERS.items():
        writer(tmp_path / kind, cameras={**CAMERAS, 3: ("OPENCV_FISHEYE", 16, 12, [20.0] * 8)})
        with pytest.raises(ValueError, match=r"model=OPENCV_FISHEYE of camera 3.*image_undistorter"):
            read_colmap_model(tmp_path / kind)


@pytest.mark.parametrize("name", ["cameras", "images", "points3D"])
def test_truncated_colmap_files_raise(tmp_path, name):
    colmap_binary(tmp_path)
    path = tmp_path / f"{name}.bin"
    data = path.read_bytes()
    for end in (0, 5, len(data) // 2, len(data) - 1):
        path.write_bytes(data[:end])
        with pytest.raises(ValueError, match=rf"{name}\.bin is truncated.*model_converter"):
            read_colmap_model(tmp_path)
    path.write_bytes(data + b"\0")
    with pytest.raises(ValueError, match=rf"{name}\.bin is truncated.*1 bytes after"):
        read_colmap_model(tmp_path)


def test_colmap_files_of_another_format_raise(tmp_path):
    colmap_text(tmp_path)
    text = (tmp_path / "images.txt").read_text()
    (tmp_path / "images.txt").write_text("".join(line + "\n" for line in text.splitlines() if line))  # no empty lines
    with pytest.raises(ValueError, match=r"images\.txt is truncated"):
        read_colmap_model(tmp_path)
    (tmp_path / "images.txt").write_bytes(b"\xff\x00\xfe")
    with pytest.raises(ValueError, match=r"images\.txt is truncated"):
        read_colmap_model(tmp_path)
    colmap_text(tmp_path, images=[(1, [2.0, 0, 0, 0], [0.0, 0, 0], 1, "a.png", [])])
    with pytest.raises(ValueError, match=r"images\.txt.*a\.png has norm 2"):
        read_colmap_model(tmp_path)
    colmap_text(tmp_path, images=[(1, [1.0, 0, 0, 0], [0.0, 0, 0], 9, "a.png", [])])
    with pytest.raises(ValueError, match=r"camera_id=9 of a\.png"):
        read_colmap_model(tmp_path)
    with pytest.raises(FileNotFoundError, match=r"cameras\.bin"):
        read_colmap_model(tmp_path / "nothing")


def test_number_of_parameters_of_every_colmap_model():
    pycolmap = pytest.importorskip("pycolmap")
    for number, (name, count) in enumerate(PARAMETERS.items()):
        camera = pycolmap.Camera.create_from_model_name(1, name, 10.0, 20, 20)
        assert (int(camera.model), len(camera.params)) == (number, count)
