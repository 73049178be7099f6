"""Files of Gaussians: round trip, the layout that plyfile reads, sequences, and files of another format."""

import math

import numpy as np
import pytest
import torch

from blueberry_video.models.gaussian_splatting import Camera, Gaussians, GaussianSplatting4D, Native, Static
from blueberry_video.models.gaussian_splatting.model import render
from blueberry_video.models.gaussian_splatting.ply import read_ply, write_ply, write_sequence

NAMES = (
    ["x", "y", "z", "nx", "ny", "nz", "f_dc_0", "f_dc_1", "f_dc_2"]
    + [f"f_rest_{i}" for i in range(45)]
    + ["opacity", "scale_0", "scale_1", "scale_2", "rot_0", "rot_1", "rot_2", "rot_3"]
)


def scene(degree: int = 3, number: int = 40, native: bool = False) -> GaussianSplatting4D:
    model = GaussianSplatting4D(Native() if native else Static(), number, bounds=1.0, sh_degree=degree)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.4 * torch.randn(parameter.shape, generator=generator))
    return model


def camera() -> Camera:
    pose = torch.eye(4)
    pose[2, 3] = -4
    return Camera.from_pose(pose, torch.tensor([[30.0, 0, 12], [0, 30, 10], [0, 0, 1]]), (20, 24))


def image(gaussians: Gaussians) -> torch.Tensor:
    with torch.no_grad():
        return render(gaussians, camera(), torch.ones(3)).color


@pytest.mark.parametrize("degree", [0, 1, 2, 3])
def test_round_trip(tmp_path, degree):
    gaussians = scene(degree)(0.5)
    write_ply(gaussians, tmp_path / "a.ply")
    read = read_ply(tmp_path / "a.ply")
    for name, value, expected in zip(Gaussians._fields, read, gaussians):
        expected = torch.nn.functional.normalize(expected, dim=-1) if name == "quats" else expected
        torch.testing.assert_close(value, expected.detach(), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(image(read), image(gaussians), rtol=0, atol=1e-5)
    assert image(read).std() > 0.05


def test_plyfile_reads_the_same_render(tmp_path):
    plyfile = pytest.importorskip("plyfile")
    gaussians = scene()(0.5)
    write_ply(gaussians, tmp_path / "a.ply")
    file = plyfile.PlyData.read(tmp_path / "a.ply")
    assert (file.text, file.byte_order, [element.name for element in file.elements]) == (False, "<", ["vertex"])
    vertices = file["vertex"]
    assert [(p.name, p.val_dtype) for p in vertices.properties] == [(name, "f4") for name in NAMES]

    def columns(*names: str) -> torch.Tensor:
        return torch.from_numpy(np.stack([vertices[name] for name in names], 1))

    # red coefficients first: f_rest_0 to f_rest_14
    rest = torch.stack([columns(*(f"f_rest_{15 * color + i}" for i in range(15))) for color in range(3)], -1)
    read = Gaussians(
        columns("x", "y", "z"),
        columns("scale_0", "scale_1", "scale_2").exp(),
        columns("rot_0", "rot_1", "rot_2", "rot_3"),
        columns("opacity")[:, 0].sigmoid(),
        torch.cat([columns("f_dc_0", "f_dc_1", "f_dc_2")[:, None], rest], 1),
    )
    assert torch.equal(image(read), image(read_ply(tmp_path / "a.ply")))
    torch.testing.assert_close(image(read), image(gaussians), rtol=0, atol=1e-5)


def test_files_of_plyfile_are_read(tmp_path):
    """With properties of different types and order, additional ones, and an element after the vertices."""
    plyfile = pytest.importorskip("plyfile")
    write_ply(scene()(0.5), tmp_path / "a.ply")
    vertices = plyfile.PlyData.read(tmp_path / "a.ply")["vertex"].data
    order = [("red", "u1"), *((name, "f8") for name in reversed(NAMES))]
    table = np.zeros(len(vertices), order)
    for name in NAMES:
        table[name] = vertices[name]
    elements = [plyfile.PlyElement.describe(table, "vertex"), plyfile.PlyElement.describe(table[:2], "other")]
    plyfile.PlyData(elements, byte_order="<").write(tmp_path / "b.ply")
    for value, expected in zip(read_ply(tmp_path / "b.ply"), read_ply(tmp_path / "a.ply")):
        assert torch.equal(value, expected)
    plyfile.PlyData(elements, text=True).write(tmp_path / "text.ply")
    with pytest.raises(ValueError, match=r"format=ascii of .*text\.ply.*binary_little_endian"):
        read_ply(tmp_path / "text.ply")


def test_sequence_renders_as_the_model(tmp_path):
    model, times = scene(native=True), [0, 0.5, 1]
    with torch.no_grad():
        model.dynamics.log_durations.fill_(math.log(0.1))
    paths = write_sequence(model, tmp_path, times)
    assert [path.name for path in paths] == ["frame_0000.ply", "frame_0001.ply", "frame_0002.ply"]
    assert sorted(tmp_path.iterdir()) == paths
    numbers = []
    for path, time in zip(paths, times):
        gaussians, expected = read_ply(path), model(time)
        torch.testing.assert_close(image(gaussians), image(expected), rtol=0, atol=1e-5)
        numbers.append(len(gaussians.means))
        assert numbers[-1] == (expected.opacities >= 1 / 255).sum()
    assert max(numbers) < model.number
    assert not torch.allclose(image(read_ply(paths[0])), image(read_ply(paths[2])), atol=0.05)


def test_opaque_and_thin_gaussians_are_written(tmp_path):
    gaussians = scene(0, 2)(0.5)
    gaussians = gaussians._replace(opacities=torch.tensor([0.0, 1.0]), scales=torch.zeros(2, 3))
    write_ply(gaussians, tmp_path / "a.ply")
    read = read_ply(tmp_path / "a.ply")
    torch.testing.assert_close(read.opacities, torch.tensor([0.0, 1]), rtol=0, atol=2e-6)
    assert read.scales.max() < 1e-19


def test_no_gaussians(tmp_path):
    empty = Gaussians(*(value[:0] for value in scene()(0.5)))
    write_ply(empty, tmp_path / "a.ply")
    assert [tuple(value.shape) for value in read_ply(tmp_path / "a.ply")] == [(0, 3), (0, 3), (0, 4), (0,), (0, 16, 3)]


def test_gaussians_that_cannot_be_written_raise(tmp_path):
    model = scene(native=True)
    with pytest.raises(ValueError, match=r"means has shape \(2, 40, 3\).*write_sequence"):
        write_ply(model(torch.tensor([0.0, 1])), tmp_path / "a.ply")
    with torch.no_grad():
        model.gaussians.means[3] = float("nan")
    with pytest.raises(ValueError, match=r"1 of the 40 Gaussians.*NaN"):
        write_ply(model(0.5), tmp_path / "a.ply")
    with pytest.raises(ValueError, match=r"times=\[\]"):
        write_sequence(model, tmp_path, [])
    assert list(tmp_path.iterdir()) == []


def changed(data: bytes, old: str, new: str) -> bytes:
    assert old.encode() in data
    return data.replace(old.encode(), new.encode(), 1)


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (lambda data: data[:-1], r"a\.ply has \d+ bytes.*40 vertices require.*truncated"),
        (lambda data: data[:100], r"no PLY file"),
        (lambda data: b"\x89PNG\r\n" + data, r"PNG.*no PLY file"),
        (lambda data: b"", r"b''.*no PLY file"),
        (lambda data: changed(data, "binary_little", "binary_big"), r"format=binary_big_endian"),
        (lambda data: changed(data, "float opacity", "float alpha"), r"no property opacity.*x, y, z"),
        (lambda data: changed(data, "float f_rest_44", "float g_rest_44"), r"44 properties f_rest_.*\b45\b"),
        (lambda data: changed(data, "float f_rest_3\n", "float f_rest_99\n"), r"45 properties f_rest_"),
        (lambda data: changed(data, "float nx", "list nx"), r"'property list nx'"),
        (lambda data: changed(data, "element vertex", "element chunk"), r"'element chunk 40'.*uncompressed"),
        (lambda data: data[:-4] + b"\xff\xff\xff\xff", r"1 Gaussians with NaN.*\b40\b"),
    ],
)
def test_files_of_another_format_raise(tmp_path, change, expected):
    path = tmp_path / "a.ply"
    write_ply(scene()(0.5), path)
    path.write_bytes(change(path.read_bytes()))
    with pytest.raises(ValueError, match=rf"(?s){expected}"):
        read_ply(path)


def test_missing_file_raises(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"lost\.ply"):
        read_ply(tmp_path / "lost.ply")
