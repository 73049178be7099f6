"""The Triton kernels under Triton's interpreter, against the dense definition in float64; no GPU, tiny shapes."""

import os
import re
import subprocess
import sys
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from blueberry_video.ops import reference

pytest.importorskip("triton")

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"  # read by triton when it is imported, so set for the process
if INTERPRETED:
    from blueberry_video.ops import kernels

interpreted = pytest.mark.skipif(not INTERPRETED, reason="test_under_the_interpreter runs it, in a process of its own")
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy's, of what lies outside a tile and is dropped

LEGS = ("dt_f", "a_f", "B_f", "C_f", "dt_b", "a_b", "B_b", "C_b")
TOLERANCE = {torch.float32: 2e-6, torch.float16: 2e-3}  # of the largest value; float16 itself has 5e-4


@pytest.mark.skipif(INTERPRETED, reason="is in it")
def test_under_the_interpreter():
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-p", "no:xdist", __file__]
    run = subprocess.run(
        command, env={**os.environ, "TRITON_INTERPRET": "1", "PYTEST_ADDOPTS": ""}, capture_output=True, text=True
    )
    assert run.returncode == 0, run.stdout + run.stderr
    assert int(re.search(r"(\d+) passed", run.stdout).group(1)) > 20, run.stdout  # the rest of this file


@dataclass(frozen=True)
class Case:
    lengths: tuple[tuple[int, ...], ...]
    heads: int = 2
    groups: int = 1
    channels: int = 16
    states: int = 16
    ragged: bool = False
    causal: bool = False
    carried: bool = True  # h0, and g0 where there is a backward leg
    diagonal: bool = True
    chunk: int | None = None
    dtype: torch.dtype = torch.float32

    def inputs(self) -> dict[str, Tensor | None]:
        generator = torch.Generator().manual_seed(sum(map(sum, self.lengths)) + self.heads)
        batch, frames, length = len(self.lengths), len(self.lengths[0]), sum(self.lengths[0])

        def normal(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
            return torch.randn(shape, generator=generator).to(dtype)

        made: dict[str, Tensor | None] = {"x": normal(batch, length, self.heads, self.channels, dtype=self.dtype)}
        for leg in ("f", "b"):
            made[f"dt_{leg}"] = torch.rand(batch, length, self.heads, generator=generator) / 2 + 0.01
            made[f"a_{leg}"] = -torch.rand(batch, length, self.heads, generator=generator) / 2
            for name in ("B", "C"):
                shared = normal(batch, length, self.groups, self.states, dtype=self.dtype)
                made[f"{name}_{leg}"] = shared / self.states**0.5
        made["D"] = normal(batch, length, self.heads) if self.diagonal else None
        state = (self.heads, self.channels, self.states)
        made["h0"] = normal(batch, *state) if self.carried else None
        made["g0"] = normal(batch, frames, *state) if self.carried else None
        if self.causal:
            made |= dict.fromkeys((*LEGS[4:], "g0"))
        return made

    @property
    def layout(self) -> dict:
        lengths = torch.tensor(self.lengths)
        return {
            "lengths": lengths if self.ragged else None,
            "segment_len": int(lengths.max()),
            "chunk": self.chunk,
        }

    def expected(self, inputs: dict[str, Tensor | None]) -> tuple[Tensor, Tensor]:
        """The definition takes A, which here is a / dt: of every token its own."""
        x, dt_f, a_f, B_f, C_f, dt_b, a_b, B_b, C_b, D, h0, g0 = inputs.values()
        lengths = torch.tensor(self.lengths)
        if dt_b is None:
            return reference.ssd(x, dt_f, a_f / dt_f, B_f, C_f, D, lengths, h0)
        A_f, A_b = a_f / dt_f, a_b / dt_b
        return reference.video_ssd(x, dt_f, dt_b, A_f, A_b, B_f, C_f, B_b, C_b, D, lengths, h0, g0)


def double(inputs: dict[str, Tensor | None]) -> dict[str, Tensor | None]:
    return {name: None if value is None else value.double().requires_grad_() for name, value in inputs.items()}


def close(actual: Tensor, expected: Tensor, tolerance: float, name: str) -> None:
    difference, largest = (actual.double() - expected.detach()).abs().max(), expected.detach().abs().max()
    assert difference <= tolerance * largest + 1e-14, f"{name}: {difference:.1e}, the largest is {largest:.1e}"


def check(
    case: Case, inputs: dict[str, Tensor | None], dy: Tensor | None = None, tolerance: float | None = None
) -> None:
    """Outputs, states and all gradients."""
    tolerance = TOLERANCE[case.dtype] if tolerance is None else tolerance
    exact = double(inputs)
    y, states = case.expected(exact)
    actual_y, actual_states = kernels.forward(**inputs, **case.layout)
    assert actual_y.dtype == case.dtype
    assert actual_states.dtype == torch.float32
    close(actual_y, y, tolerance, "y")
    close(actual_states, states, tolerance, "states")

    generator = torch.Generator().manual_seed(1)
    dy = torch.randn(y.shape, generator=generator).to(case.dtype) if dy is None else dy
    dstates = torch.randn(states.shape, generator=generator)
    present = {name: value for name, value in exact.items() if value is not None}
    expected = torch.autograd.grad((y * dy).sum() + (states * dstates).sum(), present.values())
    gradients = kernels.backward(dy, dstates, actual_states, **inputs, **case.layout)
    assert [gradient is None for gradient in gradients] == [value is None for value in inputs.values()]
    actual = dict(zip(inputs, gradients, strict=True))
    for name, gradient in zip(present, expected, strict=True):
        assert actual[name].dtype == inputs[name].dtype
        close(actual[name], gradient, tolerance, name)


CASES = {
    "frames": Case(((5, 5, 5),)),
    "samples": Case(((3, 3), (3, 3))),
    "groups": Case(((6, 6),), heads=4, groups=2),
    "group_a_head": Case(((6, 6),), groups=2),
    "one_frame": Case(((7,),)),
    "one_token": Case(((1, 1, 1),)),
    "odd_channels": Case(((5, 5),), channels=20, states=24),
    "nothing_carried": Case(((9, 9),), carried=False, diagonal=False),
    "ragged": Case(((3, 0, 9), (0, 6, 6)), heads=1, ragged=True),
    "chunks": Case(((37, 37),), heads=1, chunk=16),
    "chunks_nothing_carried": Case(((20, 20),), heads=1, chunk=16, carried=False, diagonal=False),
    "blocks": Case(((70,),), heads=1),
    "ragged_blocks": Case(((70, 0, 33),), heads=1, ragged=True),
    "ragged_chunks": Case(((70, 0, 37),), heads=1, ragged=True, chunk=64),
    "causal": Case(((6, 6),), causal=True),
    "causal_chunks": Case(((37,),), heads=1, causal=True, chunk=16),
    "causal_blocks": Case(((40, 40),), heads=1, causal=True, carried=False),
    "float16": Case(((36,),), heads=1, dtype=torch.float16),
    "causal_float16": Case(((6, 6),), causal=True, dtype=torch.float16),
}


@interpreted
@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_values_and_gradients(case: Case):
    check(case, case.inputs())


@interpreted
def test_shares_of_a_group(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(kernels, "programs_wanted", lambda x: 4)
    case = Case(((6,),), heads=4)
    check(case, case.inputs())


@interpreted
def test_strides():
    case = Case(((5, 5),), groups=2)
    inputs = case.inputs()
    inputs["x"] = torch.cat([inputs["x"], inputs["x"]], 3)[..., : case.channels]  # as split off a projection
    check(case, inputs)
    inputs["x"] = inputs["x"].transpose(2, 3).contiguous().transpose(2, 3)
    inputs["B_f"] = inputs["B_f"].transpose(1, 2).contiguous().transpose(1, 2)
    inputs["dt_b"] = inputs["dt_b"].transpose(0, 2).contiguous().transpose(0, 2)
    inputs["D"] = torch.randn(2).expand(1, 10, 2)
    check(case, inputs, dy=torch.ones(()).expand(1, 10, 2, 16))  # what .sum().backward() gives


@interpreted
def test_strong_decays_between_weak_ones():
    """Where many tokens forget all, sums of log-decays are large; the others, and those not there, must not feel it."""
    case = Case(((64, 60),), heads=1, ragged=True)
    inputs = case.inputs()
    for leg in ("f", "b"):
        inputs[f"a_{leg}"][:, 8:56] = inputs[f"a_{leg}"][:, 72:112] = -1e4
    check(case, inputs, tolerance=1e-4)


@interpreted
def test_growth_where_dt_is_negative():
    case = Case(((20, 20),), heads=1, chunk=16)
    inputs = case.inputs()
    for name in ("dt_f", "a_f", "dt_b", "a_b"):
        inputs[name] = -inputs[name]
    check(case, inputs)


@interpreted
def test_tokens_that_write_nothing():
    """dt = 0: no decay and no write; also gradients of dt are there."""
    case = Case(((6, 6),), heads=1, carried=False)
    inputs = case.inputs()
    for leg in ("f", "b"):
        inputs[f"dt_{leg}"][:, ::2] = 1e-30
        inputs[f"a_{leg}"][:, ::2] = 0
    check(case, inputs)


@interpreted
@pytest.mark.parametrize("name", ["dt_f", "a_f", "dt_b", "a_b", "x"])
def test_nan_goes_on_but_not_back_in_time(name: str):
    case = Case(((4, 4, 4),), heads=1, carried=False, diagonal=False)
    inputs = case.inputs()
    inputs[name][:, 5] = torch.nan
    y, states = kernels.forward(**inputs, **case.layout)
    assert y[:, :4].isfinite().all()
    assert y[:, 4:8].isnan().any()
    assert states[:, 0].isfinite().all()
    if not name.endswith("_b"):
        assert y[:, 8:].isnan().all()
        assert states[:, 1:].isnan().all()


@interpreted
def test_float16_beyond_its_range_inside():
    """C_i · B_j is 90,000; the output is not."""
    case = Case(((2,),), heads=1, carried=False, diagonal=False, dtype=torch.float16)
    inputs = case.inputs()
    for name in ("B_f", "C_f", "B_b", "C_b"):
        inputs[name] = torch.full_like(inputs[name], 75.0)
    for name in ("dt_f", "dt_b"):
        inputs[name] = torch.full_like(inputs[name], 1e-3)
    y, _ = kernels.forward(**inputs, **case.layout)
    expected, _ = case.expected(double(inputs))
    close(y, expected, TOLERANCE[torch.float16], "y")
    inputs["x"] = torch.full_like(inputs["x"], 60000.0)
    y, _ = kernels.forward(**inputs, **case.layout)
    assert (y == torch.inf).all()  # 5.4e6 has no other float16


@interpreted
def test_lengths_that_do_not_add_up():
    """What is left out is NaN; what is beyond the last token is not read."""
    case = Case(((4, 4),), heads=1, ragged=True)
    inputs = case.inputs()
    y, _ = kernels.forward(**inputs, lengths=torch.tensor([[4, 2]]), segment_len=4)
    assert y[:, :6].isfinite().all()
    assert y[:, 6:].isnan().all()

    longer = Case(((4, 16),), heads=1, ragged=True).inputs()
    tokens = {name: None if value is None else value[:, :8] for name, value in longer.items()}
    inputs |= {name: tokens[name] for name in ("x", *LEGS, "D")}
    y, states = kernels.forward(**inputs, lengths=torch.tensor([[4, 12]]), segment_len=16)
    expected, expected_states = case.expected(double(inputs))
    close(y, expected, TOLERANCE[torch.float32], "y")
    close(states, expected_states, TOLERANCE[torch.float32], "states")


@interpreted
def test_twice_the_same():
    case = Case(((20, 20),), heads=2, chunk=16)
    inputs = case.inputs()
    y, states = kernels.forward(**inputs, **case.layout)
    again = kernels.forward(**inputs, **case.layout)
    assert torch.equal(y, again[0])
    assert torch.equal(states, again[1])
