"""Triton kernels of the rasterizer under the interpreter, compared with the dense reference in float64; no GPU."""

import os
import re
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from test_rasterizer import CASES, Case, assert_close, assert_gradients_close, render

from blueberry_video.ops import rasterize

pytest.importorskip("triton")

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"  # read when triton is imported, so set for the process
if INTERPRETED:
    from blueberry_video.ops.rasterizer import kernels

NAMES = (  # of CASES that reach other code in the kernels
    "usual", "two cameras", "Gaussians per camera", "one channel", "seven channels", "off-center", "behind the camera",
    "opaque", "invisible", "long and thin", "smaller than a pixel", "wider than the image", "no Gaussian", "one pixel",
    "one row", "one column",
)  # fmt: skip

interpreted = pytest.mark.skipif(not INTERPRETED, reason="run by test_under_the_interpreter, in a separate process")


@pytest.mark.skipif(INTERPRETED, reason="runs in the interpreter already")
def test_under_the_interpreter():
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-p", "no:xdist", __file__]
    run = subprocess.run(
        command, env={**os.environ, "TRITON_INTERPRET": "1", "PYTEST_ADDOPTS": ""}, capture_output=True, text=True
    )
    assert run.returncode == 0, run.stdout + run.stderr
    assert int(re.search(r"(\d+) passed", run.stdout).group(1)) > 15, run.stdout  # the other tests of this file


@interpreted
@pytest.mark.parametrize("name", NAMES)
def test_values_and_gradients_match_the_dense_reference(name: str):
    case = CASES[name]
    inputs = case.inputs(torch.float32)
    found, gradients = render(inputs, case, "triton")
    expected, expected_gradients = render({name: v.double() for name, v in inputs.items()}, case, "reference")
    for name in ("color", "alpha", "depth"):
        assert_close(getattr(found, name), getattr(expected, name))
    assert_gradients_close(gradients, expected_gradients, inputs)


@interpreted
def test_lists_longer_than_a_group_and_tiles_cut_by_the_border():
    case = Case(number=120, size=(18, 35), scale=0.6, opacity=0.05)
    inputs = case.inputs(torch.float32)
    found, gradients = render(inputs, case, "triton")
    expected, expected_gradients = render({name: v.double() for name, v in inputs.items()}, case, "reference")
    assert_close(found.color, expected.color)
    assert_close(gradients["means"], expected_gradients["means"])


@interpreted
def test_output_and_gradients_are_deterministic():
    case = replace(CASES["two cameras"], number=20)
    first, second = (render(case.inputs(torch.float32), case, "triton") for _ in range(2))
    assert torch.equal(first[0].color, second[0].color)
    assert all(torch.equal(first[1][name], second[1][name]) for name in first[1])


@interpreted
def test_pairs_are_sorted_by_tile_and_depth():
    from blueberry_video.ops.rasterizer import projection
    from blueberry_video.ops.rasterizer.inputs import Splats

    case = Case(number=50, size=(40, 50), cameras=2)
    inputs = case.inputs(torch.float32)
    tensors = [inputs[name][None] for name in ("means", "scales", "quats", "opacities")]
    projected = projection.project(*tensors, inputs["intrinsics"], inputs["world_to_camera"], *case.size, 0.01)
    opacities = inputs["opacities"].expand(2, -1)
    splats = Splats(*projected[:2], opacities, torch.ones(2, 50, 1), *projected[2:], *case.size)
    lists = kernels.pair_lists(splats)
    assert len(lists.starts) == 2 * 3 * 4 + 1
    assert lists.starts[-1] == len(lists.ids) == lists.offsets[-1]
    depths = projected.depths.flatten()
    for start, end in zip(lists.starts[:-1].tolist(), lists.starts[1:].tolist(), strict=True):
        listed = depths[lists.ids[start:end].long()]
        assert (listed.diff() >= 0).all()
    assert sorted(lists.positions.tolist()) == list(range(len(lists.ids)))


@interpreted
def test_float64_raises():
    case = CASES["one Gaussian"]
    with pytest.raises(ValueError, match=r"backend='triton'.*float64.*'torch'"):
        rasterize(**case.inputs(), image_size=case.size, sh_degree=3, backend="triton")


@pytest.mark.skipif(INTERPRETED, reason="the interpreter runs on the CPU")
def test_cpu_tensors_raise():
    case = CASES["one Gaussian"]
    with pytest.raises(ValueError, match=r"backend='triton'.*CPU.*'torch'"):
        rasterize(**case.inputs(torch.float32), image_size=case.size, sh_degree=3, backend="triton")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize(
    "name", ["usual", "two cameras", "Gaussians per camera", "opaque", "seven channels", "no Gaussian"]
)
@pytest.mark.parametrize("backend", ["triton", "torch", "gsplat"])
def test_backends_on_a_gpu_match_the_dense_reference(name: str, backend: str):
    case = CASES[name]
    if backend == "gsplat":
        pytest.importorskip("gsplat")
        if name in ("opaque", "no Gaussian"):
            pytest.skip("gsplat limits alpha at 0.999 and requires a Gaussian")
    inputs = {name: tensor.cuda() for name, tensor in case.inputs(torch.float32).items()}
    found, gradients = render(inputs, case, backend)
    double = {name: tensor.double().cpu() for name, tensor in inputs.items()}
    expected, expected_gradients = render(double, case, "reference")
    for image in ("color", "alpha", "depth"):
        assert_close(getattr(found, image).cpu(), getattr(expected, image))
    assert_gradients_close({name: v.cpu() for name, v in gradients.items()}, expected_gradients, double)
