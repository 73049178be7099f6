"""Live viewer: frames of its cameras, a server without a browser, and a client that changes."""

import math
import types
import urllib.error
import urllib.request

import pytest
import torch

from blueberry_video.inference import live_viewer
from blueberry_video.inference.camera_paths import quaternions
from blueberry_video.inference.live_viewer import LiveViewer
from blueberry_video.inference.render import camera_path, render_frames
from trained_scenes import trained_scene


@pytest.fixture
def viewer():
    pytest.importorskip("viser", reason="viser is not installed")
    viewer = LiveViewer(trained_scene("native", 50), port=18080, height=32)
    yield viewer
    viewer.close()


def client_of(scene, index: int = 2):
    """Client with the camera of a training view, with the interface of viser's clients."""
    images = []
    pose = scene.poses[index].double()
    fov = 2 * math.atan(0.5 / 1.4)
    camera = types.SimpleNamespace(
        wxyz=quaternions(pose[:3, :3]).numpy(), position=pose[:3, 3].numpy(), fov=fov, aspect=1.0
    )
    show = types.SimpleNamespace(set_background_image=lambda image, format: images.append(image))
    return types.SimpleNamespace(camera=camera, scene=show), images


def test_server_starts_and_stops(viewer):
    with urllib.request.urlopen(viewer.url, timeout=30) as answer:
        assert answer.status == 200
    viewer.close()
    assert not viewer._thread.is_alive()
    with pytest.raises(urllib.error.URLError, match="refused"):
        urllib.request.urlopen(viewer.url, timeout=5)


def test_play_advances_the_time(viewer):
    assert viewer.time.value == 0
    viewer.play.value = True
    for _ in range(100):
        if viewer.time.value > 0:
            break
        viewer._stop.wait(0.1)
    assert 0 < viewer.time.value < 1


def test_frames_are_those_of_the_rasterizer_and_follow_the_client(viewer, monkeypatch):
    scene = viewer.scene._replace(intrinsics=torch.tensor([[1.4 * 64, 0, 32], [0, 1.4 * 64, 32], [0, 0, 1]]))
    client, images = client_of(scene)
    viewer._stop.set()  # update() is called here instead
    viewer._thread.join()
    monkeypatch.setattr(viewer.server, "get_clients", lambda: {7: client})
    viewer.update()
    [own] = render_frames(scene.model, camera_path(scene, "fixed", (32, 32), 1, (0.0,), 2), scene.background)
    expected = (own * 255).permute(1, 2, 0)
    torch.testing.assert_close(torch.from_numpy(images[0]).float(), expected, atol=1.0, rtol=0)
    viewer.update()
    assert len(images) == 1  # nothing changed
    viewer.time.value = 1.0
    viewer.update()
    assert (images[0] != images[1]).any()


def test_moving_camera_has_few_rows_first(viewer, monkeypatch):
    client, images = client_of(viewer.scene)
    viewer._stop.set()
    viewer._thread.join()
    viewer.height = 200
    monkeypatch.setattr(viewer.server, "get_clients", lambda: {7: client})
    for _ in range(3):
        viewer.update()
    assert [len(image) for image in images] == [live_viewer.MOVING_HEIGHT, 200]


def test_missing_package_names_the_command(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "viser", None)
    with pytest.raises(ImportError, match=r"viser.*pip install -e '\.\[viewer\]'"):
        LiveViewer(trained_scene("static", 5))


@pytest.mark.parametrize(("options", "match"), [({"port": 0}, "port=0"), ({"height": 0}, "height=0")])
def test_bad_values_raise(options, match):
    with pytest.raises(ValueError, match=match):
        LiveViewer(trained_scene("static", 5), **options)
