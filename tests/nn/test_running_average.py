"""Running averages in 16, 32 and 64 bits: values, state dicts, casts, copies and devices."""

import copy
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from blueberry_video.nn.running_average import RunningAverages, update_averages

STEPS, MOMENTUM = 400, 0.999


class Averages(RunningAverages):
    """Average of a weight and of a buffer, next to a weight that is no average."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layer, self.average = nn.Linear(16, 16, bias=False), nn.Linear(16, 16, bias=False)
        self.average.requires_grad_(False)
        self.register_buffer("statistic", torch.randn(5))

    def averages(self) -> dict[str, Tensor]:
        return {"average.weight": self.average.weight, "statistic": self.statistic}

    def update(self, step: int) -> list[Tensor]:
        """Updates the averages with values of a seed and returns the values."""
        generator = torch.Generator().manual_seed(step)
        values = [torch.randn(value.shape, generator=generator) + 3 for value in self.averages().values()]
        values = [value.to(self.average.weight.dtype) for value in values]
        with self.wide_averages() as averages:
            update_averages(list(averages.values()), values, 1 - MOMENTUM)
        return values


def trained(module: Averages, first: int = 0, last: int = STEPS) -> Averages:
    for step in range(first, last):
        module.update(step)
    return module


def values(module: Averages) -> list[Tensor]:
    return [value.detach().clone() for value in module.averages().values()]


def equal(first: list[Tensor], second: list[Tensor]) -> bool:
    return all(torch.equal(a, b) and a.dtype == b.dtype for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_average_is_computed_in_at_least_32_bits_and_rounded_once(dtype):
    module = Averages().to(dtype)
    wide = torch.promote_types(dtype, torch.float32)
    start, expected = values(module), [value.to(wide) for value in values(module)]
    for step in range(STEPS):
        for average, value in zip(expected, module.update(step), strict=True):
            average.lerp_(value.to(wide), 1 - MOMENTUM)
    assert equal(values(module), [value.to(dtype) for value in expected])
    assert equal([module.state_dict()[name] for name in module.averages()], expected)
    assert all((now != before).all() for now, before in zip(values(module), start, strict=True))
    assert module.state_dict()["layer.weight"].dtype == dtype


def test_float32_updates_are_those_of_lerp_and_add_nothing_to_the_state_dict():
    module, names = Averages(), list(Averages().state_dict())
    expected = values(module)
    for step in range(3):
        for average, value in zip(expected, module.update(step), strict=True):
            average.lerp_(value, 1 - MOMENTUM)
    assert equal(values(module), expected)
    assert list(module.state_dict()) == names
    assert module._copies() == {}


@pytest.mark.parametrize("cast_first", [True, False])
def test_loaded_state_dict_continues_exactly(cast_first, tmp_path: Path):
    whole = trained(Averages().bfloat16())
    torch.save(trained(Averages().bfloat16(), last=STEPS // 2).state_dict(), tmp_path / "state")
    state = torch.load(tmp_path / "state", weights_only=True)
    resumed = Averages()
    for make in (lambda: resumed.bfloat16(), lambda: resumed.load_state_dict(state))[:: 1 if cast_first else -1]:
        make()
    assert resumed.average.weight.dtype == torch.bfloat16
    trained(resumed, first=STEPS // 2)
    assert equal(list(whole.state_dict().values()), list(resumed.state_dict().values()))


def test_copies_are_independent_and_continue_exactly():
    module = trained(Averages().bfloat16(), last=STEPS // 2)
    duplicate, before = copy.deepcopy(module), module.state_dict()
    trained(duplicate, first=STEPS // 2)
    assert equal(list(module.state_dict().values()), list(before.values()))
    trained(module, first=STEPS // 2)
    assert equal(list(module.state_dict().values()), list(duplicate.state_dict().values()))


def test_module_on_the_meta_device_is_assigned_and_continues_exactly():
    state = trained(Averages().bfloat16(), last=STEPS // 2).state_dict()
    assert {value.dtype for value in state.values()} == {torch.bfloat16, torch.float32}
    with torch.device("meta"):
        assigned = Averages().bfloat16()
    emptied = copy.deepcopy(assigned).to_empty(device="cpu")
    assigned.load_state_dict(state, assign=True)
    emptied.load_state_dict(state)
    whole = trained(Averages().bfloat16())
    for module in (assigned, emptied):
        assert {value.dtype for value in (*module.parameters(), *module.buffers())} == {torch.bfloat16}
        trained(module, first=STEPS // 2)
        assert equal(list(module.state_dict().values()), list(whole.state_dict().values()))


def test_float32_state_assigned_to_the_meta_device_keeps_its_dtype():
    with torch.device("meta"):
        module = Averages().bfloat16()
    module.load_state_dict(Averages().state_dict(), assign=True)
    assert {value.dtype for value in module.state_dict().values()} == {torch.float32}


def test_tensor_that_is_written_replaces_its_copy():
    module = trained(Averages().bfloat16(), last=50)
    copies = module.state_dict()
    with torch.no_grad():
        module.average.weight[0] = 7.0
    state = module.state_dict()["average.weight"]
    assert state[0].eq(7).all()
    assert torch.equal(state[1:], copies["average.weight"][1:])


def test_narrow_average_raises():
    with pytest.raises(ValueError, match=r"dtype=torch\.bfloat16.*float32"):
        update_averages([torch.zeros(2).bfloat16()], [torch.ones(2)], 0.1)


def test_sharded_average_equals_the_unsharded_one(tmp_path: Path):
    store = torch.distributed.FileStore(str(tmp_path / "store"), 1)
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        start = trained(Averages().bfloat16(), last=10).state_dict()
        module, expected = Averages().bfloat16(), Averages().bfloat16()
        for network in (module, expected):
            network.load_state_dict(start)
        fully_shard(module, mesh=init_device_mesh("cpu", (1,)))
        for weight in (0.001, 0.5):
            for network in (module, expected):
                with network.wide_averages() as averages:
                    update_averages([averages["average.weight"]], [network.layer.weight.to(torch.bfloat16)], weight)
        state = module.state_dict()["average.weight"]
        assert isinstance(module.average.weight, DTensor)
        assert state.dtype == torch.float32
        assert torch.equal(state.full_tensor(), expected.state_dict()["average.weight"])
        assert torch.equal(module.average.weight.full_tensor(), expected.average.weight)
    finally:
        torch.distributed.destroy_process_group()
