"""Triton kernels of the scans on a GPU, compared with the chunked backend in float64: `make test-gpu`."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from blueberry_video.ops import ssd, video_ssd

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]

NAMES = ("x", "dt_f", "dt_b", "A_f", "A_b", "B_f", "C_f", "B_b", "C_b", "D", "h0", "g0")
LOW = ("x", "B_f", "C_f", "B_b", "C_b")  # in the dtype of the test; the rest is float32


def inputs(
    batch: int = 2,
    frames: int = 4,
    tokens: int = 196,
    heads: int = 8,
    groups: int = 1,
    channels: int = 64,
    states: int = 128,
    dtype: torch.dtype = torch.bfloat16,
) -> dict[str, Tensor]:
    torch.manual_seed(0)
    length = frames * tokens

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, device="cuda")

    made = {"x": normal(batch, length, heads, channels)}
    for leg in ("f", "b"):
        made[f"dt_{leg}"] = torch.rand(batch, length, heads, device="cuda") * 0.1 + 1e-3
    for leg in ("f", "b"):
        made[f"A_{leg}"] = -torch.rand(heads, device="cuda") - 0.5
    for name in ("B_f", "C_f", "B_b", "C_b"):
        made[name] = normal(batch, length, groups, states) / states**0.5
    made["D"] = normal(batch, length, heads)
    made["h0"] = normal(batch, heads, channels, states)
    made["g0"] = normal(batch, frames, heads, channels, states)
    return {name: made[name].to(dtype) if name in LOW else made[name] for name in NAMES}


def run(given: dict[str, Tensor], segment_len: int | Tensor, backend: str, dtype: torch.dtype | None = None) -> dict:
    """Returns y, states and gradients of all inputs, with the same random dy and dstates for every backend."""
    leaves = {name: value.to(dtype or value.dtype).detach().requires_grad_() for name, value in given.items()}
    arguments = {name: leaves[name] for name in NAMES if name in leaves}
    y, states = video_ssd(**arguments, segment_len=segment_len, return_frame_states=True, backend=backend)
    generator = torch.Generator("cuda").manual_seed(1)
    dy = torch.randn(y.shape, generator=generator, device="cuda").to(given["x"].dtype).to(y.dtype)
    dstates = torch.randn(states.shape, generator=generator, device="cuda").to(states.dtype)
    gradients = torch.autograd.grad([y, states], list(leaves.values()), [dy, dstates])
    return {"y": y.detach(), "states": states.detach(), **dict(zip(leaves, gradients, strict=True))}


def error(actual: Tensor, exact: Tensor) -> float:
    return float((actual.double() - exact.double()).norm() / exact.double().norm())


def compare(given: dict[str, Tensor], segment_len: int | Tensor, factor: float = 2.0) -> None:
    """Checks that errors with respect to float64 are at most ``factor`` times those of the PyTorch backend."""
    exact = run(given, segment_len, "torch", torch.float64)
    ours, peer = run(given, segment_len, "triton"), run(given, segment_len, "torch")
    found = {name: (error(ours[name], exact[name]), error(peer[name], exact[name])) for name in exact}
    print("\n".join(f"{name:>8}: triton {mine:.2e}, torch {other:.2e}" for name, (mine, other) in found.items()))
    unit = {torch.bfloat16: 2**-9, torch.float16: 2**-12, torch.float32: 2**-20}[given["x"].dtype]
    for name, (mine, other) in found.items():
        assert mine <= factor * max(other, unit), f"{name}: triton {mine:.2e}, torch {other:.2e}"


SHAPES: dict[str, dict] = {
    "one_chunk": {},
    "groups": {"heads": 8, "groups": 2},
    "group_a_head": {"heads": 4, "groups": 4},
    "chunks": {"frames": 2, "tokens": 600},
    "one_frame": {"frames": 1, "tokens": 100},
    "one_token": {"frames": 5, "tokens": 1},
    "odd_channels": {"channels": 80, "states": 48},
    "small": {"channels": 16, "states": 16},
    "wide_state": {"channels": 64, "states": 256, "heads": 2},
    "wide_head": {"channels": 128, "states": 64, "heads": 2},
}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=["bf16", "fp16", "fp32"])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())
def test_as_accurate_as_torch_backend(shape: dict, dtype: torch.dtype):
    compare(inputs(**shape, dtype=dtype), shape.get("tokens", 196))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=["bf16", "fp32"])
def test_ragged_frames(dtype: torch.dtype):
    lengths = torch.tensor([[3, 0, 580, 201], [196, 196, 391, 1]], device="cuda")
    compare(inputs(dtype=dtype), lengths)


def test_causal_scan():
    given = inputs()
    arguments = (given["x"], given["dt_f"], given["A_f"], given["B_f"], given["C_f"], given["D"], None, given["h0"])
    doubles = (None if value is None else value.double() for value in arguments)
    exact = ssd(*doubles, backend="torch")
    assert error(ssd(*arguments, backend="triton"), exact) < 2 * error(ssd(*arguments, backend="torch"), exact)


def test_large_dt():
    """The state decays fully at every token."""
    given = inputs()
    for name in ("dt_f", "dt_b"):
        given[name] = given[name] * 1e4
    compare(given, 196)


def test_strong_decays_between_weak_ones():
    given = inputs(dtype=torch.float32)
    for name in ("dt_f", "dt_b"):
        given[name][:, 10:50] = 1e3
    exact = video_ssd(**{name: value.double() for name, value in given.items()}, segment_len=196, backend="torch")
    actual = video_ssd(**given, segment_len=196, backend="triton")
    assert (actual - exact).abs().max() / exact.abs().max() < 1e-4


def test_dt_near_zero():
    given = inputs()
    for name in ("dt_f", "dt_b"):
        given[name] = given[name] * 1e-6
    compare(given, 196)


def test_fp32_to_1e_minus_4():
    given = inputs(dtype=torch.float32)
    exact, ours = run(given, 196, "torch", torch.float64), run(given, 196, "triton")
    for name in exact:
        largest = (ours[name] - exact[name]).abs().max() / exact[name].abs().max()
        assert largest < 1e-4, f"{name}: {largest:.1e}"


def test_stride_0_gradients():
    given = {name: value.requires_grad_() for name, value in inputs().items()}
    y = video_ssd(**given, segment_len=196, backend="triton")
    summed = torch.autograd.grad(y.sum(), given.values(), retain_graph=True)
    ones = torch.autograd.grad(y, given.values(), torch.ones_like(y))
    assert all(torch.equal(*pair) for pair in zip(summed, ones, strict=True))


def test_views():
    """x, B and C are slices of one projection."""
    given = inputs()
    parts = [given[name].flatten(2) for name in LOW]
    split = torch.cat(parts, -1).split([part.shape[-1] for part in parts], -1)
    views = {name: view.unflatten(-1, given[name].shape[2:]) for name, view in zip(LOW, split, strict=True)}
    assert not views["x"].is_contiguous()
    expected = video_ssd(**given, segment_len=196, backend="triton")
    assert torch.equal(video_ssd(**{**given, **views}, segment_len=196, backend="triton"), expected)


def test_deterministic():
    given = inputs()
    first, second = run(given, 196, "triton"), run(given, 196, "triton")
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_no_future_leakage():
    given = inputs(frames=3)
    changed = {**given, "x": given["x"].clone()}
    changed["x"][:, 392:] += 1
    scan: Callable[..., Tensor] = lambda values: video_ssd(**values, segment_len=196, backend="triton")  # noqa: E731
    y, later = scan(given), scan(changed)
    assert torch.equal(y[:, :392], later[:, :392])
    assert not torch.equal(y[:, 392:], later[:, 392:])


def test_compiles_fullgraph():
    given = inputs()

    def scan(values: dict[str, Tensor]) -> Tensor:
        return video_ssd(**values, segment_len=196, backend="triton") * 2

    compiled = torch.compile(scan, fullgraph=True)
    assert torch.equal(compiled(given), scan(given))
    leaves = {name: value.requires_grad_() for name, value in given.items()}
    expected = torch.autograd.grad(scan(leaves).float().square().mean(), leaves.values())
    actual = torch.autograd.grad(compiled(leaves).float().square().mean(), leaves.values())
    assert all(error(*pair) < 1e-2 for pair in zip(actual, expected, strict=True))


def test_offsets_beyond_int32():
    """The last frame of 2.3e9 elements equals that of a scan over the last two frames."""
    free, _ = torch.cuda.mem_get_info()
    if free < 40 * 2**30:
        pytest.skip("needs 40 GB of GPU memory")
    heads, channels, states, tokens, frames = 8, 64, 16, 256, 17_600
    length = tokens * frames
    assert length * heads * channels > 2**31
    x = torch.randn(1, length, heads, channels, device="cuda", dtype=torch.bfloat16)
    dt = torch.full((1, length, heads), 0.5, device="cuda")
    A = -torch.ones(heads, device="cuda")
    shared = torch.randn(1, length, 1, states, device="cuda", dtype=torch.bfloat16)

    def scan(part: slice) -> Tensor:
        given = (x[:, part], dt[:, part], dt[:, part], A, A, *(shared[:, part],) * 4, None)
        return video_ssd(*given, segment_len=tokens, backend="triton")

    last = slice(length - 2 * tokens, length)
    expected = scan(last)[:, tokens:]  # after 256 tokens of exp(-0.5) no earlier state remains
    assert torch.equal(scan(slice(0, length))[:, -tokens:], expected)
