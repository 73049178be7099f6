"""Rendering entry point: files, their contents, continuing after a kill, other content, and errors."""

import json
import os
import subprocess
import sys
import types
from pathlib import Path

import numpy as np
import pytest
import torch

from blueberry_video import render as entry
from blueberry_video.data.scene_formats import OPENGL
from blueberry_video.inference.render import camera_path, render_frames
from blueberry_video.models.gaussian_splatting import Camera, Gaussians
from blueberry_video.models.gaussian_splatting.model import render
from blueberry_video.models.gaussian_splatting.ply import read_ply
from blueberry_video.render import render_scene
from blueberry_video.video import load_clip
from blueberry_video.video.sampling import SamplingOptions
from trained_scenes import trained_scene

OPTIONS = {"formats": ("mp4", "ply", "html"), "size": [32, 48], "frames": 3, "fps": 5.0}


@pytest.fixture
def scene(monkeypatch):
    """Scene that every run path opens."""
    scene = trained_scene("native", 60)
    monkeypatch.setattr(entry, "open_scene", lambda run, background=None: scene)
    return scene


def frames_of(file: Path) -> np.ndarray:
    return load_clip(file, SamplingOptions(sampling="all", max_frames=100, frame_factor=1)).pixels.numpy()


def test_all_formats(tmp_path, scene):
    files = render_scene("run", tmp_path / "out", **OPTIONS)
    names = ["render.mp4", "scene.html", *(f"ply/frame_{index:04d}.ply" for index in range(3))]
    assert files == [tmp_path / "out" / name for name in names]
    found = sorted(str(path.relative_to(tmp_path / "out")) for path in (tmp_path / "out").rglob("*") if path.is_file())
    assert found == sorted([*names, "render.json"])
    video = frames_of(files[0])
    assert video.shape == (3, 3, 32, 48)
    path = camera_path(scene, "turntable", (32, 48), 3)
    for made, frame in zip(video, render_frames(scene.model, path, scene.background)):
        assert np.abs(made.astype(float) / 255 - frame.numpy()).mean() < 0.03  # of H.264


def test_ply_files_of_each_time_render_the_same(tmp_path, scene):
    """Read by our reader and by plyfile."""
    plyfile = pytest.importorskip("plyfile")
    files = render_scene("run", tmp_path / "out", formats=("ply",), frames=3, path="fixed")
    pose = Camera.from_pose(scene.poses[1], scene.intrinsics, (64, 64))
    for file, time in zip(files, (0.0, 0.5, 1.0)):
        vertices = plyfile.PlyData.read(file)["vertex"]

        def columns(*names: str, vertices=vertices) -> torch.Tensor:
            return torch.from_numpy(np.stack([vertices[name] for name in names], 1))

        rest = [columns(*(f"f_rest_{15 * color + i}" for i in range(15))) for color in range(3)]
        harmonics = torch.cat([columns("f_dc_0", "f_dc_1", "f_dc_2")[:, None], torch.stack(rest, -1)], 1)
        scales, quats = columns(*(f"scale_{i}" for i in range(3))).exp(), columns(*(f"rot_{i}" for i in range(4)))
        foreign = Gaussians(columns("x", "y", "z"), scales, quats, columns("opacity")[:, 0].sigmoid(), harmonics)
        with torch.no_grad():
            expected = scene.model.render(pose, time, scene.background).color
            for gaussians in (foreign, read_ply(file)):
                found = render(gaussians, pose, scene.background).color
                torch.testing.assert_close(found, expected, atol=2e-5, rtol=0)


def test_repeated_command_writes_missing_files_only(tmp_path, scene):
    files = render_scene("run", tmp_path / "out", **OPTIONS)
    content = {file: file.read_bytes() for file in files}
    before = {file: file.stat().st_mtime_ns for file in files}
    for lost in (files[0], files[3]):
        lost.unlink()
    (tmp_path / "out" / ".render.mp4.tmp").write_bytes(b"left by a kill")
    assert render_scene("run", tmp_path / "out", **OPTIONS) == files
    assert {file: file.read_bytes() for file in files} == content
    assert [file.stat().st_mtime_ns != before[file] for file in files] == [True, False, False, True, False]
    assert not list((tmp_path / "out").rglob("*.tmp"))


def test_other_formats_are_added(tmp_path, scene):
    for formats in (("html",), ("mp4", "ply")):
        render_scene("run", tmp_path / "out", **{**OPTIONS, "formats": formats})
    assert len([path for path in (tmp_path / "out").rglob("*") if path.is_file()]) == 6


def test_interrupted_video_leaves_no_file(tmp_path, scene, monkeypatch):
    class Killed(BaseException): ...

    original, calls = type(scene.model).render, []

    def second_fails(*args, **options):
        calls.append(1)
        if len(calls) == 2:
            raise Killed
        return original(*args, **options)

    monkeypatch.setattr(type(scene.model), "render", second_fails)
    with pytest.raises(Killed):
        render_scene("run", tmp_path / "out", **{**OPTIONS, "formats": ("mp4",)})
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["render.json"]
    [file] = render_scene("run", tmp_path / "out", **{**OPTIONS, "formats": ("mp4",)})
    assert len(frames_of(file)) == 3


def test_other_content_raises(tmp_path, scene):
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(FileExistsError, match=r"out=.*render\.json"):
        render_scene("run", tmp_path, **OPTIONS)
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]
    with pytest.raises(FileExistsError, match=r"out=.*notes\.txt is a file"):
        render_scene("run", tmp_path / "notes.txt", **OPTIONS)


def test_other_settings_or_weights_raise(tmp_path, scene):
    render_scene("run", tmp_path / "out", **{**OPTIONS, "formats": ("html",)})
    with pytest.raises(FileExistsError, match=r"fps was 5\.0 and is 6\.0"):
        render_scene("run", tmp_path / "out", **{**OPTIONS, "fps": 6.0})
    with torch.no_grad():
        scene.model.gaussians.means[0, 0] += 1
    with pytest.raises(FileExistsError, match="weights was"):
        render_scene("run", tmp_path / "out", **{**OPTIONS, "formats": ("html",)})


def test_file_of_cameras(tmp_path, scene):
    frames = [
        {"time": time, "transform_matrix": (scene.poses[index].double().numpy() @ OPENGL).tolist()}
        for index, time in ((2, 0.25), (5, 1.0))
    ]
    (tmp_path / "cameras.json").write_text(json.dumps({"camera_angle_x": 2 * np.arctan(0.5 / 1.4), "frames": frames}))
    [file] = render_scene("run", tmp_path / "out", path=str(tmp_path / "cameras.json"))
    centered = scene._replace(intrinsics=torch.tensor([[1.4 * 64, 0, 32], [0, 1.4 * 64, 32], [0, 0, 1]]))
    for made, (index, time) in zip(frames_of(file), ((2, 0.25), (5, 1.0)), strict=True):
        [expected] = render_frames(
            scene.model, camera_path(centered, "fixed", None, 1, (time,), index), scene.background
        )
        assert np.abs(made.astype(float) / 255 - expected.numpy()).mean() < 0.03


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"formats": ("avi",)}, r"format=avi.*mp4, ply, html"),
        ({"formats": ()}, "format="),
        ({"fps": 0.0}, r"fps=0\.0"),
        ({"size": "33x32"}, r"size=33x32.*34x32"),
        ({"path": "spiral"}, "path='spiral'"),
        ({"frames": -1}, "frames=-1"),
        ({"times": "0,2"}, "times=0,2"),
        ({"times": "soon"}, "times=soon"),
        ({"path": "fixed", "camera": 99}, "camera=99"),
    ],
)
def test_bad_values_raise_before_anything_is_written(tmp_path, scene, options, match):
    with pytest.raises(ValueError, match=match):
        render_scene("run", tmp_path / "out", **options)
    assert not (tmp_path / "out").exists()


def test_missing_camera_file_raises(tmp_path, scene):
    with pytest.raises(FileNotFoundError, match=r"path=.*none\.json"):
        render_scene("run", tmp_path / "out", path=tmp_path / "none.json")


def test_command_line(tmp_path, scene, monkeypatch, capsys):
    words = [
        "render",
        "run",
        "--out",
        str(tmp_path / "out"),
        "--format",
        "mp4, ply",
        "--size",
        "32x48",
        "--frames",
        "2",
    ]
    monkeypatch.setattr(sys, "argv", [*words, "--times", "0.5", "--background", "white"])
    entry.main()
    printed = capsys.readouterr().out
    assert f"wrote {tmp_path / 'out' / 'render.mp4'} (1 file, " in printed
    assert f"wrote {tmp_path / 'out' / 'ply'} (2 files, " in printed


def test_command_line_without_folder_raises(scene, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["render", "run"])
    with pytest.raises(ValueError, match="--out is missing"):
        entry.main()


def test_run_without_checkpoint_is_one_paragraph(tmp_path):
    command = [sys.executable, "-m", "blueberry_video.render", str(tmp_path / "none"), "--out", str(tmp_path / "out")]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ, timeout=300)
    assert done.returncode == 1
    assert "Traceback" not in done.stderr
    assert str(tmp_path / "none") in done.stderr.replace("\n", "")
    assert not (tmp_path / "out").exists()


def test_scene_of_a_run(monkeypatch, scene):
    """The views of a run give the cameras, and its task the model and background."""
    splatting = pytest.importorskip("blueberry_video.tasks.splatting")
    opened = []

    class Views:
        poses, times = scene.poses, scene.times

        def __getitem__(self, index: int) -> dict:
            return {"video": torch.zeros(1, 3, 64, 64, dtype=torch.uint8), "intrinsics": scene.intrinsics}

    task = types.SimpleNamespace(model=scene.model, background=torch.tensor([1.0, 0, 0]))
    run = types.SimpleNamespace(task=task, data=types.SimpleNamespace(train=Views()))
    monkeypatch.undo()
    monkeypatch.setattr("blueberry_video.experiment.trained.load_trained", lambda *a: (opened.append(a), run)[1])
    found = entry.open_scene("run")
    assert opened[0][:2] == ("run", [splatting.Splatting])
    assert found.model is scene.model
    assert found.image_size == (64, 64)
    assert found.background.tolist() == [1, 0, 0]
    assert entry.open_scene("run", "0,0.5,1").background.tolist() == [0, 0.5, 1]
