"""HTML viewer of a scene: embedded data, self-containment, and the picture that headless Chromium draws."""

import base64
import html
import json
import re
import shutil
import subprocess
import urllib.parse
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from blueberry_video.inference.render import camera_path, render_frames
from blueberry_video.inference.scene_viewer import TEMPLATE, times_to_store, write_viewer
from blueberry_video.models.gaussian_splatting import Camera, Deformation, Gaussians, HexPlane, Static
from blueberry_video.models.gaussian_splatting.model import render
from trained_scenes import KINDS, trained_scene

CHROMIUM = shutil.which("chromium")
FLAGS = [
    *("--headless", "--no-sandbox", "--use-gl=angle", "--use-angle=swiftshader", "--enable-unsafe-swiftshader"),
    *("--disable-quic", "--no-first-run", "--disable-background-networking", "--disable-component-update"),
    *("--disable-sync", "--disable-dev-shm-usage", "--hide-scrollbars", "--force-device-scale-factor=1"),
    "--virtual-time-budget=10000",
]


def read(page: Path) -> tuple[dict, dict[str, np.ndarray]]:
    """Header and arrays that are embedded in a page."""
    text = page.read_text()
    header, data = (
        re.search(rf'<script type="application/{kind}" id="{name}">(.*?)</script>', text, re.DOTALL).group(1)
        for kind, name in (("json", "header"), ("octet-stream", "data"))
    )
    header, data = json.loads(header), zlib.decompress(base64.b64decode(data))
    return header, {
        name: np.frombuffer(data, each["dtype"], int(np.prod(each["shape"])), each["offset"]).reshape(each["shape"])
        for name, each in header["arrays"].items()
    }


def gaussians_of(header: dict, arrays: dict[str, np.ndarray], time: float) -> Gaussians:
    """Gaussians at a time, as the page computes them."""
    values = {name: torch.from_numpy(array.astype(np.float32)) for name, array in arrays.items()}
    if header["dynamics"] == "native":
        elapsed = torch.where(values["is_static"] > 0, 0, time - values["time_means"])
        values["means"] = values["means"] + values["velocities"] * elapsed[:, None]
        values["opacities"] = values["opacities"] * torch.exp(-0.5 * (elapsed / values["log_durations"].exp()) ** 2)
    else:
        times = header["key_times"]
        low = max(0, min(sum(key <= time for key in times) - 1, len(times) - 2))
        weight = (time - times[low]) / (times[low + 1] - times[low]) if len(times) > 1 else 0
        for name in ("means", "log_scales", "quats", "opacities", "harmonics"):
            if (offsets := values.get(f"{name}_offsets")) is not None:
                values[name] = values[name] + (1 - weight) * offsets[low] + weight * offsets[low + 1]
    means, scales = values["means"], values["log_scales"].exp()
    return Gaussians(means, scales, values["quats"], values["opacities"], values["harmonics"])


@pytest.mark.parametrize("kind", [*KINDS, "static"])
@pytest.mark.parametrize("time", [0.0, 0.75, 1.0])
def test_embedded_data_are_the_gaussians(tmp_path, kind, time):
    scene = trained_scene(kind, number=50)
    size = write_viewer(scene, tmp_path / "scene.html", key_times=9)
    assert size == (tmp_path / "scene.html").stat().st_size
    header, arrays = read(tmp_path / "scene.html")
    with torch.no_grad():
        expected = scene.model(time)
        peak = torch.stack([scene.model(t).opacities for t in np.linspace(0, 1, 9)]).amax(0)
    drawn = (scene.model.gaussians().opacities if kind == "native" else peak) >= 1 / 255
    assert header["count"] == drawn.sum() < 50
    found = gaussians_of(header, arrays, time)
    for name, tolerance in (("means", 2e-4), ("scales", 1e-3), ("opacities", 3e-4), ("harmonics", 1e-3)):
        torch.testing.assert_close(getattr(found, name), getattr(expected, name)[drawn], rtol=1e-3, atol=tolerance)
    quats = torch.nn.functional.normalize(expected.quats[drawn], dim=-1)
    torch.testing.assert_close(torch.nn.functional.normalize(found.quats, dim=-1), quats, rtol=0, atol=2e-3)
    assert (header["sh_degree"], header["moves"]) == (3, kind != "static")
    assert header["background"] == pytest.approx([1.0, 0.9, 0.8])


def test_key_times_include_the_cells_of_the_field():
    field = HexPlane(2, (2, 2, 2, 5))
    assert times_to_store(Deformation(field), 5) == [0, 0.25, 0.5, 0.75, 1]
    assert times_to_store(Deformation(field), 6) == [i / 8 for i in range(9)]
    published = Deformation(HexPlane(2, (2, 2, 2, 6), full_time_range=False))  # cells at -1, -0.6, -0.2, 0.2, 0.6, 1
    assert times_to_store(published, 2) == pytest.approx([0, 0.2, 0.6, 1])
    assert times_to_store(Static(), 5) == [0]


def test_times_between_key_times_are_close(tmp_path):
    scene = trained_scene("deformation")
    write_viewer(scene, tmp_path / "scene.html", key_times=24)
    header, arrays = read(tmp_path / "scene.html")
    camera = Camera.from_pose(scene.poses[0], scene.intrinsics, (64, 64))
    with torch.no_grad():
        expected = scene.model.render(camera, 0.435).color
        found = render(gaussians_of(header, arrays, 0.435), camera).color
        still = render(gaussians_of(header, arrays, 0.75), camera).color
    error, motion = (float((each - expected).square().mean()) for each in (found, still))
    assert error < 1e-5 < motion / 100


def test_values_that_do_not_depend_on_time_are_stored_once(tmp_path):
    sizes = [write_viewer(trained_scene("deformation"), tmp_path / "a.html", key_times=n) for n in (2, 12)]
    _, arrays = read(tmp_path / "a.html")
    assert arrays["means_offsets"].shape[0] == 13
    assert "harmonics_offsets" not in arrays
    assert sizes[1] < 4 * sizes[0]


def test_page_is_self_contained(tmp_path):
    write_viewer(trained_scene("native", 20), tmp_path / "scene.html", title="</script> & <b>")
    text = (tmp_path / "scene.html").read_text()
    assert f"<title>{html.escape('</script> & <b>')}</title>" in text
    assert "__" not in re.sub(r'id="data">.*?</script>', "", text, flags=re.DOTALL)
    code = TEMPLATE.read_text()
    assert "default-src 'none'" in code
    assert not re.findall(r"https?:|\bfetch\(|XMLHttp|import\(|\bsrc=|\bhref=|@import|url\(", code)


@pytest.mark.parametrize(
    ("options", "match"), [({"key_times": 1}, "key_times=1"), ({"fps": 0.0}, r"fps=0\.0"), ({"frames": 0}, "frames=0")]
)
def test_bad_values_raise(tmp_path, options, match):
    with pytest.raises(ValueError, match=match):
        write_viewer(trained_scene("native", 20), tmp_path / "scene.html", **options)
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize("kind", KINDS)
def test_values_that_are_not_finite_raise(tmp_path, kind):
    scene = trained_scene(kind, 20)
    with torch.no_grad():
        scene.model.gaussians.means[3, 0] = torch.nan
    with pytest.raises(ValueError, match=r"means\w* of the Gaussians has NaN"):
        write_viewer(scene, tmp_path / "scene.html")
    assert not any(tmp_path.iterdir())


@pytest.mark.slow
@pytest.mark.skipif(CHROMIUM is None, reason="the viewer is drawn by chromium, which is not installed")
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("camera", "time", "size"), [(0, 0.0, (64, 64)), (3, 0.75, (150, 200))])
def test_chromium_draws_what_the_rasterizer_renders(tmp_path, kind, camera, time, size):
    scene = trained_scene(kind)
    write_viewer(scene, tmp_path / "scene.html", key_times=9)
    path = camera_path(scene, "fixed", size, 1, (time,), camera)
    [own] = render_frames(scene.model, path, scene.background)
    pixels = screenshot(tmp_path / "scene.html", path.poses[0], path.intrinsics[0], time, size, tmp_path)
    expected = (own * 255).permute(1, 2, 0)
    error = (torch.from_numpy(pixels).float() - expected).square().mean() / 255**2
    assert expected.std() > 20  # of 255: the picture is not empty
    psnr = float(-10 * error.log10())
    print(f"{kind}, camera {camera}, time {time}: {psnr:.1f} dB")
    assert psnr > 54  # measured: 58 to 59, where rounding to 8 bits alone is 59


def screenshot(page: Path, pose, intrinsics, time: float, size: tuple[int, int], folder: Path) -> np.ndarray:
    """Pixels uint8 (H, W, 3) that Chromium draws for one camera."""
    view = {"pose": pose.tolist(), "intrinsics": intrinsics.tolist(), "time": time, "width": size[1], "height": size[0]}
    address = f"{page.as_uri()}#view={urllib.parse.quote(json.dumps(view))}"
    picture = folder / "screenshot.png"
    command = [CHROMIUM, *FLAGS, f"--user-data-dir={folder / 'user'}", f"--screenshot={picture}"]
    done = subprocess.run([*command, "--window-size=600,500", address], capture_output=True, text=True, timeout=180)
    assert picture.is_file(), done.stderr[-2000:]
    return np.array(Image.open(picture).convert("RGB"))[: size[0], : size[1]]
