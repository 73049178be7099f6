"""Triton kernels under the interpreter, compared with the dense reference in float64; no GPU, small shapes."""

import os
import re
import subprocess
import sys
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from blueberry_video.ops import reference
from blueberry_video.ops.inputs import ScanInputs

pytest.importorskip("triton")

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"  # read when triton is imported, so set for the process
if INTERPRETED:
    from blueberry_video.ops import kernels

interpreted = pytest.mark.skipif(not INTERPRETED, reason="run by test_under_the_interpreter, in a separate process")
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")  # from numpy, for masked values outside a tile

PARAMETERS = ("dt_f", "a_f", "B_f", "C_f", "dt_b", "a_b", "B_b", "C_b")
TOLERANCE = {torch.float32: 2e-6, torch.float16: 2e-3}  # relative to the largest value; float16 rounds by 5e-4


@pytest.mark.skipif(INTERPRETED, reason="runs in the interpreter already")
def test_under_the_interpreter():
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-p", "no:xdist", __file__]
    run = subprocess.run(
        command, env={**os.environ, "TRITON_INTERPRET": "1", "PYTEST_ADDOPTS": ""}, capture_output=True, text=True
    )
    assert run.returncode == 0, run.stdout + run.stderr
    assert int(re.search(r"(\d+) passed", run.stdout).group(1)) > 20, run.stdout  # the other tests of this file


@dataclass(frozen=True)
class Case:
    lengths: tuple[tuple[int, ...], ...]
    heads: int = 2
    groups: int = 1
    channels: int = 16
    states: int = 16
    ragged: bool = False
    causal: bool = False
    carried: bool = True  # h0, and g0 if there is a backward direction
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
            made |= dict.fromkeys((*PARAMETERS[4:], "g0"))
        return made

    @property
    def layout(self) -> dict:
        lengths = torch.tensor(self.lengths)
        return {"lengths": lengths if self.ragged else None, "segment_len": int(lengths.max()), "chunk": self.chunk}

    def expected(self, inputs: dict[str, Tensor | None]) -> tuple[Tensor, Tensor]:
        """y and the frame states of the dense reference."""
        layout = self.layout | {"lengths": torch.tensor(self.lengths)}
        return reference.scan(ScanInputs(**inputs, **layout))


def double(inputs: dict[str, Tensor | None]) -> dict[str, Tensor | None]:
    return {name: None if value is None else value.double().requires_grad_() for name, value in inputs.items()}


def close(actual: Tensor, expected: Tensor, tolerance: float, name: str) -> None:
    difference, largest = (actual.double() - expected.detach()).abs().max(), expected.detach().abs().max()
    assert difference <= tolerance * largest + 1e-14, f"{name}: {difference:.1e}, the largest is {largest:.1e}"


def check(
    case: Case, inputs: dict[str, Tensor | None], dy: Tensor | None = None, tolerance: float | None = None
) -> None:
    """Compares outputs, states and all gradients with the reference."""
    tolerance = TOLERANCE[case.dtype] if tolerance is None else tolerance
    exact = double(inputs)
    y, states = case.expected(exact)
    actual_y, actual_states = kernels.forward(ScanInputs(**inputs, **case.layout))
    assert actual_y.dtype == case.dtype
    assert actual_states.dtype == torch.float32
    close(actual_y, y, tolerance, "y")
    close(actual_states, states, tolerance, "states")

    generator = torch.Generator().manual_seed(1)
    dy = torch.randn(y.shape, generator=generator).to(case.dtype) if dy is None else dy
    dstates = torch.randn(states.shape, generator=generator)
    present = {name: value for name, value in exact.items() if value is not None}
    expected = torch.autograd.grad((y * dy).sum() + (states * dstates).sum(), present.values())
    gradients = kernels.backward(dy, dstates, actual_states, ScanInputs(**inputs, **case.layout))
    actual = {name: getattr(gradients, name) for name in inputs}
    assert [gradient is None for gradient in actual.values()] == [value is None for value in inputs.values()]
    for name, gradient in zip(present, expected, strict=True):
        assert actual[name].dtype == inputs[name].dtype
        close(actual[name], gradient, tolerance, name)


CASES = {
    "frames": Case(((5, 5, 5),), heads=1),
    "samples": Case(((3, 3), (3, 3)), heads=1),
    "groups": Case(((6, 6),), heads=4, groups=2),
    "group_a_head": Case(((6, 6),), groups=2),
    "one_frame": Case(((7,),)),
    "one_token": Case(((1, 1, 1),)),
    "odd_channels": Case(((5, 5),), heads=1, channels=20, states=24),
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
def test_splits_of_a_group(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(kernels, "programs_wanted", lambda x: 4)
    case = Case(((6,),), heads=4)
    check(case, case.inputs())


@interpreted
def test_strides():
    case = Case(((5, 5),), groups=2)
    inputs = case.inputs()
    inputs["x"] = torch.cat([inputs["x"], inputs["x"]], 3)[..., : case.channels]  # a slice, as of a projection
    check(case, inputs)
    inputs["x"] = inputs["x"].transpose(2, 3).contiguous().transpose(2, 3)
    inputs["B_f"] = inputs["B_f"].transpose(1, 2).contiguous().transpose(1, 2)
    inputs["dt_b"] = inputs["dt_b"].transpose(0, 2).contiguous().transpose(0, 2)
    inputs["D"] = torch.randn(2).expand(1, 10, 2)
    check(case, inputs, dy=torch.ones(()).expand(1, 10, 2, 16))  # the gradient of .sum()


@interpreted
def test_strong_decays_between_weak_ones():
    """Large cumulative log-decays of some tokens leave other tokens, and masked ones, unaffected."""
    case = Case(((64, 60),), heads=1, ragged=True)
    inputs = case.inputs()
    for leg in ("f", "b"):
        inputs[f"a_{leg}"][:, 8:56] = inputs[f"a_{leg}"][:, 72:112] = -1e4
    check(case, inputs, tolerance=1e-4)


@interpreted
def test_negative_dt_grows_the_state():
    case = Case(((20, 20),), heads=1, chunk=16)
    inputs = case.inputs()
    for name in ("dt_f", "a_f", "dt_b", "a_b"):
        inputs[name] = -inputs[name]
    check(case, inputs)


@interpreted
def test_zero_dt():
    """No decay and no write; gradients of dt are still correct."""
    case = Case(((6, 6),), heads=1, carried=False)
    inputs = case.inputs()
    for leg in ("f", "b"):
        inputs[f"dt_{leg}"][:, ::2] = 1e-30
        inputs[f"a_{leg}"][:, ::2] = 0
    check(case, inputs)


@interpreted
@pytest.mark.parametrize("name", ["dt_f", "a_f", "dt_b", "a_b", "x"])
def test_nan_propagates_forward_in_time_only(name: str):
    case = Case(((4, 4, 4),), heads=1, carried=False, diagonal=False)
    inputs = case.inputs()
    inputs[name][:, 5] = torch.nan
    y, states = kernels.forward(ScanInputs(**inputs, **case.layout))
    assert y[:, :4].isfinite().all()
    assert y[:, 4:8].isnan().any()
    assert states[:, 0].isfinite().all()
    if not name.endswith("_b"):
        assert y[:, 8:].isnan().all()
        assert states[:, 1:].isnan().all()


@interpreted
def test_float16_intermediate_overflow():
    """C_i · B_j is 90,000, beyond float16; the output is in range."""
    case = Case(((2,),), heads=1, carried=False, diagonal=False, dtype=torch.float16)
    inputs = case.inputs()
    for name in ("B_f", "C_f", "B_b", "C_b"):
        inputs[name] = torch.full_like(inputs[name], 75.0)
    for name in ("dt_f", "dt_b"):
        inputs[name] = torch.full_like(inputs[name], 1e-3)
    y, _ = kernels.forward(ScanInputs(**inputs, **case.layout))
    expected, _ = case.expected(double(inputs))
    close(y, expected, TOLERANCE[torch.float16], "y")
    inputs["x"] = torch.full_like(inputs["x"], 60000.0)
    y, _ = kernels.forward(ScanInputs(**inputs, **case.layout))
    assert (y == torch.inf).all()  # 5.4e6 overflows float16


@interpreted
def test_lengths_that_do_not_sum_to_L():
    """Tokens that are left out are NaN; positions after the last token are not read."""
    case = Case(((4, 4),), heads=1, ragged=True)
    inputs = case.inputs()
    y, _ = kernels.forward(ScanInputs(**inputs, lengths=torch.tensor([[4, 2]]), segment_len=4))
    assert y[:, :6].isfinite().all()
    assert y[:, 6:].isnan().all()

    longer = Case(((4, 16),), heads=1, ragged=True).inputs()
    tokens = {name: None if value is None else value[:, :8] for name, value in longer.items()}
    inputs |= {name: tokens[name] for name in ("x", *PARAMETERS, "D")}
    y, states = kernels.forward(ScanInputs(**inputs, lengths=torch.tensor([[4, 12]]), segment_len=16))
    expected, expected_states = case.expected(double(inputs))
    close(y, expected, TOLERANCE[torch.float32], "y")
    close(states, expected_states, TOLERANCE[torch.float32], "states")


@interpreted
def test_deterministic():
    case = Case(((20, 20),), heads=2, chunk=16)
    inputs = case.inputs()
    y, states = kernels.forward(ScanInputs(**inputs, **case.layout))
    again = kernels.forward(ScanInputs(**inputs, **case.layout))
    assert torch.equal(y, again[0])
    assert torch.equal(states, again[1])
