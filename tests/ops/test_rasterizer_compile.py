"""Triton kernels of the rasterizer compiled for absent GPUs; run as a script, it prints a table of their resources."""

import pytest
import torch

pytest.importorskip("triton")

from test_kernels_compile import SHARED_MEMORY, compiling, resources

from blueberry_video.ops.rasterizer import kernels
from blueberry_video.ops.rasterizer.inputs import Splats

KERNELS = {"composite_forward", "composite_backward", "add_pairs"}


def splats(cameras: int = 1, number: int = 4, channels: int = 4, size: tuple[int, int] = (20, 33)) -> Splats:
    """Gaussians that overlap the whole image."""
    height, width = size
    means2d = torch.tensor([width / 2, height / 2]).expand(cameras, number, 2)
    extents = torch.full((cameras, number, 2), 100.0)
    conics, features = torch.ones(cameras, number, 3), torch.ones(cameras, number, channels)
    return Splats(means2d, conics, *torch.ones(1, cameras, number), features, extents[..., 0], extents, *size)


def table(capability: int, given: Splats) -> list[dict]:
    """Prints and returns the resources of each kernel."""
    with compiling(capability) as compiled:
        image, transmittance = kernels.forward(given)
        kernels.backward(image, transmittance, image, transmittance, given)
    rows = [resources(each) for each in compiled]
    for row in rows:
        numbers = "".join(f"{row[name]:>10,}" for name in ("warps", "registers", "spilled", "shared"))
        print(f"sm_{capability} {given.features.shape[-1]:>3} channels {row['kernel']:<20}{numbers}", flush=True)
    return rows


@pytest.mark.parametrize("capability", SHARED_MEMORY)
def test_kernels_fit_registers_and_shared_memory(capability: int):
    rows = table(capability, splats())
    assert {row["kernel"] for row in rows} == KERNELS
    assert [row for row in rows if row["spilled"]] == []
    assert max(row["shared"] for row in rows) <= SHARED_MEMORY[capability]


@pytest.mark.parametrize(
    "given",
    [splats(cameras=2, channels=17), splats(number=1, channels=1, size=(1, 1)), splats(number=0)],
    ids=["17 channels", "ones", "no Gaussian"],  # Triton specializes on 1
)
def test_every_call_compiles(given: Splats):
    """The compiler checks types; the interpreter does not."""
    expected = KERNELS if given.features.shape[1] else KERNELS - {"add_pairs"}
    assert {row["kernel"] for row in table(90, given)} == expected


if __name__ == "__main__":
    for capability in SHARED_MEMORY:
        for channels in (2, 4, 17):
            table(capability, splats(channels=channels))
