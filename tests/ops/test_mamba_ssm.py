"""``backend="mamba_ssm"`` compared with the chunked backend; its Triton kernels are interpreted on the CPU."""

import importlib.util
import os
import subprocess
import sys
from importlib.machinery import PathFinder
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
pytestmark = pytest.mark.skipif(
    PathFinder.find_spec("mamba_ssm") is None, reason="mamba_ssm is not installed: see benchmarks/video_scan.py"
)


@pytest.mark.skipif(INTERPRETED, reason="runs in the interpreter already")
def test_in_the_interpreter():
    """Runs this file in a separate process, because Triton reads TRITON_INTERPRET when it is imported."""
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(Path(__file__))]
    ran = subprocess.run(command, env=os.environ | {"TRITON_INTERPRET": "1"}, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stdout[-3000:]


@pytest.fixture
def mamba_ssm(monkeypatch: pytest.MonkeyPatch) -> None:
    """Imports the package without its ``__init__``, which loads CUDA extensions; one configuration per kernel."""
    spec = PathFinder.find_spec("mamba_ssm")
    assert spec is not None
    sys.modules.setdefault("mamba_ssm", importlib.util.module_from_spec(spec))
    import triton

    def first_config(configs, *args, **kwargs):
        return autotune(configs[:1], key=[])

    autotune = triton.autotune
    monkeypatch.setattr(triton, "autotune", first_config)
    properties = SimpleNamespace(multi_processor_count=1, major=9, minor=0, name="none")
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda *_: properties)
    monkeypatch.setattr(torch.cuda, "device", lambda *_: torch.autograd.profiler.record_function("no device"))


@pytest.mark.skipif(not INTERPRETED, reason="needs TRITON_INTERPRET=1 before triton is imported")
@pytest.mark.usefixtures("mamba_ssm")
def test_both_scans_equal_the_torch_backend():
    from blueberry_video.ops import ssd, video_ssd

    torch.manual_seed(0)
    B, T, S, H, G, P, N = 1, 2, 16, 2, 1, 16, 16
    x, D, h0 = torch.randn(B, T * S, H, P), torch.randn(H), torch.randn(B, H, P, N)
    dt_f, dt_b = (torch.rand(B, T * S, H) * 0.3 + 0.01 for _ in range(2))
    A_f, A_b = (-torch.rand(H) - 0.2 for _ in range(2))
    B_f, C_f, B_b, C_b = (torch.randn(B, T * S, G, N) for _ in range(4))
    arguments = (x, dt_f, dt_b, A_f, A_b, B_f, C_f, B_b, C_b, D, S)
    for shift in ("strict", "hydra"):
        found, expected = (video_ssd(*arguments, shift=shift, backend=name) for name in ("mamba_ssm", "torch"))
        assert (found - expected).norm() <= 1e-4 * expected.norm()
    pair = (
        ssd(x, dt_f, A_f, B_f, C_f, D, h0=h0, return_frame_states=True, backend=name) for name in ("mamba_ssm", "torch")
    )
    for found, expected in zip(*pair, strict=True):
        assert (found - expected).norm() <= 1e-4 * expected.norm()
    with pytest.raises(ValueError, match=r"segment_len=16\b.*backend='mamba_ssm'"):
        ssd(x, dt_f, A_f, B_f, C_f, D, segment_len=S, return_frame_states=True, backend="mamba_ssm")
