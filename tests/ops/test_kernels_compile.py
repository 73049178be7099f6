"""Triton kernels compiled for absent GPUs; run as a script, it prints a table of their resources.

Kernels are called as on a GPU, with the same arguments, types and specializations; only the launch is skipped.
"""

import os
import re
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

triton = pytest.importorskip("triton")
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("TRITON_INTERPRET replaces the compiler", allow_module_level=True)

from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.runtime import Autotuner, JITFunction, driver  # noqa: E402

from blueberry_video.ops import kernels  # noqa: E402
from blueberry_video.ops.inputs import ScanInputs  # noqa: E402

SHARED_MEMORY = {80: 163 * 1024, 90: 227 * 1024}  # maximum bytes per program: A100; H100 and H200
FORWARD = ("chunk_cumsum", "state_passing", "pair_products", "chunk_scan")
BACKWARD = ("state_passing", "pair_gradients", "input_gradients", "shared_gradients", "decay_gradients")
BENCHMARK = {"batch": 1, "frames": 2, "tokens": 196, "heads": 24, "groups": 1, "channels": 64, "states": 128}


class AbsentGPU:
    """Stub of the driver that Triton queries at compile time."""

    def __init__(self, capability: int):
        self.capability = capability

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.capability, 32)

    def get_current_device(self) -> int:
        return self.capability  # Triton caches compiled kernels by device

    def get_current_stream(self, device: int) -> int:
        return 0


@contextmanager
def compiling(capability: int) -> Iterator[list[Any]]:
    """Compiles kernel calls into the returned list, with the first configuration, instead of launching them."""
    compiled: list[Any] = []
    run = JITFunction.run

    def compile_only(self: JITFunction, *args: Any, grid: Any, warmup: bool, **arguments: Any) -> None:
        compiled.append(run(self, *args, grid=grid, warmup=True, **arguments))

    def first(self: Autotuner, *args: Any, **arguments: Any) -> None:
        self.nargs = dict(zip(self.arg_names, args))
        self.fn.run(*args, **arguments, **self.prune_configs(arguments)[0].all_kwargs())

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(JITFunction, "run", compile_only)
        patch.setattr(Autotuner, "run", first)
        patch.setattr(driver, "_active", AbsentGPU(capability))  # set_active cannot be undone without a GPU
        yield compiled


def inputs(
    batch: int,
    frames: int,
    tokens: int,
    heads: int,
    groups: int,
    channels: int,
    states: int,
    dtype: torch.dtype = torch.bfloat16,
    causal: bool = False,
    ragged: bool = False,
    carried: bool = False,
    diagonal: bool = True,
    chunk: int | None = None,
) -> ScanInputs:
    """Uninitialized inputs: only shapes and dtypes matter."""
    length = frames * tokens
    x = torch.empty(batch, length, heads, channels, dtype=dtype)
    numbers = [torch.empty(batch, length, heads) for _ in range(2)]
    shared = [torch.empty(batch, length, groups, states, dtype=dtype) for _ in range(2)]
    backward: list[Tensor | None] = [None] * 4 if causal else [*numbers, *shared]
    D = torch.empty(batch, length, heads) if diagonal else None
    lengths = torch.full((batch, frames), tokens) if ragged else None
    h0 = torch.empty(batch, heads, channels, states) if carried else None
    g0 = torch.empty(batch, frames, heads, channels, states) if carried and not causal else None
    return ScanInputs(x, *numbers, *shared, *backward, D, lengths, tokens, h0, g0, chunk)


def resources(compiled: Any) -> dict[str, Any]:
    """Registers per thread, bytes of stack, which these kernels use for spilled registers only, and shared memory."""
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        listing = subprocess.run([tool, "-res-usage", file.name], capture_output=True, text=True, check=True)
    used = {name: int(re.search(rf"{name}:(\d+)", listing.stdout + listing.stderr)[1]) for name in ("REG", "STACK")}
    return {
        "kernel": compiled.metadata.name,
        "warps": compiled.metadata.num_warps,
        "registers": used["REG"],
        "spilled": used["STACK"],
        "shared": compiled.metadata.shared,
    }


def table(capability: int, dtype: torch.dtype, backward: bool, block: int | None = None) -> list[dict[str, Any]]:
    """Prints and returns the resources of each kernel of the forward or backward pass at the benchmark's sizes."""
    given = inputs(**BENCHMARK, dtype=dtype)
    with pytest.MonkeyPatch.context() as patch, compiling(capability) as compiled:
        if block is not None:
            patch.setitem(kernels.BLOCK, "bf16", block)
        if backward:
            states = torch.empty(1, 2, 24, 64, 128)
            kernels.backward(given.x, states, states, given)
        else:
            kernels.forward(given)
    rows = [resources(each) for each in compiled]
    for row in rows:
        numbers = "".join(f"{row[name]:>10,}" for name in ("warps", "registers", "spilled", "shared"))
        print(f"sm_{capability} {str(dtype).removeprefix('torch.'):<10}{row['kernel']:<18}{numbers}", flush=True)
    return rows


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=["bf16", "fp32"])
@pytest.mark.parametrize("capability", SHARED_MEMORY)
def test_forward_fits_registers_and_shared_memory(capability: int, dtype: torch.dtype):
    rows = table(capability, dtype, backward=False)
    assert {row["kernel"] for row in rows} == set(FORWARD)
    assert [row for row in rows if row["spilled"]] == []
    assert max(row["shared"] for row in rows) <= SHARED_MEMORY[capability]


@pytest.mark.slow
def test_forward_fits_hopper_with_larger_blocks():
    rows = table(90, torch.bfloat16, backward=False, block=kernels.HOPPER_BLOCK)
    assert [row for row in rows if row["spilled"]] == []
    assert max(row["shared"] for row in rows) <= SHARED_MEMORY[90]


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=["bf16", "fp32"])
@pytest.mark.parametrize("capability", SHARED_MEMORY)
def test_backward_fits_shared_memory(capability: int, dtype: torch.dtype):
    rows = table(capability, dtype, backward=True)
    assert {row["kernel"] for row in rows} >= set(BACKWARD)
    assert max(row["shared"] for row in rows) <= SHARED_MEMORY[capability]


CALLS: dict[str, dict[str, Any]] = {  # small: a second per kernel
    "everything": {"batch": 2, "frames": 3, "tokens": 20, "heads": 4, "groups": 2, "carried": True, "chunk": 16},
    "ones": {"batch": 1, "frames": 1, "tokens": 1, "heads": 1, "groups": 1},  # Triton specializes on 1
    "causal": {
        "batch": 1,
        "frames": 2,
        "tokens": 40,
        "heads": 2,
        "groups": 1,
        "causal": True,
        "ragged": True,
        "chunk": 16,
    },
    "nothing": {"batch": 2, "frames": 2, "tokens": 20, "heads": 2, "groups": 1, "diagonal": False, "channels": 20},
    "float16": {"batch": 1, "frames": 2, "tokens": 16, "heads": 2, "groups": 1, "dtype": torch.float16},
}


@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS.keys())
def test_every_call_compiles(call: dict[str, Any]):
    """The compiler checks types; the interpreter does not."""
    call = {"channels": 16, "states": 16, **call}
    given = inputs(**call)
    with compiling(90) as compiled:
        y, states = kernels.forward(given)
        kernels.backward(y, states, states, given)
    assert {each.metadata.name for each in compiled} == {*FORWARD, *BACKWARD}


@pytest.mark.slow
@pytest.mark.parametrize("capability", SHARED_MEMORY)
def test_widest_heads_fit_shared_memory(capability: int):
    given = inputs(1, 1, 300, 1, 1, 128, 256)
    with compiling(capability) as compiled:
        y, states = kernels.forward(given)
        kernels.backward(y, states, states, given)
    assert max(each.metadata.shared for each in compiled) <= SHARED_MEMORY[capability]


def main() -> None:
    print(f"{'':<34}{'warps':>10}{'registers':>10}{'spilled':>10}{'shared':>10}")
    for capability in SHARED_MEMORY:
        for dtype in (torch.bfloat16, torch.float32):
            for backward in (False, True):
                table(capability, dtype, backward)
    table(90, torch.bfloat16, False, kernels.HOPPER_BLOCK)


if __name__ == "__main__":
    main()
