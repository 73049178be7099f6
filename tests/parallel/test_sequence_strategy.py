"""Training with ``trainer=sequence_parallel`` in two processes equals training in one.

Costs about 40 s of CPU: three processes import Lightning and train two models.
"""

import csv
import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed
import torch.multiprocessing

from blueberry_video import train
from blueberry_video.config import compose
from blueberry_video.experiment.run_folder import RunFolder
from blueberry_video.parallel import sequence
from blueberry_video.parallel.ranks import data_rank, data_world_size
from blueberry_video.parallel.sequence_strategy import SequenceParallelStrategy

EXPERIMENTS = Path(__file__).resolve().parents[2] / "experiments"
COMMON = ["trainer.max_steps=2", "trainer.log_every_n_steps=1", "trainer.precision=64-true", "logger=csv"]
COMMON += ["data.batch_size=2", "callbacks.media=null", "callbacks.progress=null"]
SPLIT = ["trainer=sequence_parallel", "trainer.accelerator=cpu", "trainer.devices=2"]
CASES = {  # experiment and overrides
    "masked_pixels": (
        "template",
        [
            *("data.train.size=8", "data.val.size=4", "model@model.encoder=hydra_video/tiny"),
            *("model.encoder.depth=2", "model.decoder_num_heads=2"),
        ],
    ),
    "diffusion": (
        "hunyuan",
        ["data.train.starts=2", "data.val.size=4", "callbacks.ema=null", "callbacks.sampling=null"],
    ),
}


def run(name: str, folder: Path, *overrides: str) -> int:
    """Trains one case; returns the number of exchanges between processes."""
    experiment, own = CASES[name]
    file = EXPERIMENTS / experiment / "config.yaml"
    config = compose(file, [*COMMON, *own, *overrides, f"output_dir={folder / name}"])
    calls, exchange = [], sequence._all_to_all
    sequence._all_to_all = lambda *arguments: calls.append(1) or exchange(*arguments)  # type: ignore[assignment]
    created = RunFolder.create(config, config.output_dir)
    data, _, task, trainer = train.build(config, created)
    trainer.fit(task, datamodule=data)
    created.close(True)
    sequence._all_to_all = exchange
    return len(calls)


def process(rank: int, folder: str, port: int) -> None:
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2", LOCAL_WORLD_SIZE="2", GROUP_RANK="0")
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), TORCHELASTIC_USE_AGENT_STORE="True")
    os.environ.update(TORCHELASTIC_RUN_ID="none", TORCHELASTIC_RESTART_COUNT="0")
    torch.set_num_threads(1)
    exchanges = {name: run(name, Path(folder, str(rank)), *SPLIT) for name in CASES}
    torch.save(exchanges, Path(folder, f"exchanges-{rank}"))
    torch.distributed.barrier()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder with the runs of one process, ``one``, and of two, ``0`` and ``1``."""
    folder = tmp_path_factory.mktemp("strategy")
    store = torch.distributed.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    torch.multiprocessing.spawn(process, (str(folder), store.port), nprocs=2)
    for name in CASES:
        assert run(name, folder / "one") == 0
    return folder


def metrics(folder: Path) -> list[dict[str, float]]:
    with next(folder.rglob("metrics.csv")).open() as file:
        rows = list(csv.DictReader(file))
    return [{key: float(value) for key, value in row.items() if value and "throughput" not in key} for row in rows]


def weights(folder: Path) -> dict[str, Any]:
    file = max(folder.rglob("*.ckpt"))
    return torch.load(file, weights_only=False)["state_dict"]


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_losses_and_weights_equal_those_of_one_process(folder: Path, name: str):
    expected, found = metrics(folder / "one" / name), metrics(folder / "0" / name)
    assert len(expected) >= 2
    for row, other in zip(expected, found, strict=True):
        assert other == pytest.approx(row, rel=1e-5, abs=1e-8)
    exchanges = [torch.load(folder / f"exchanges-{rank}", weights_only=False)[name] for rank in range(2)]
    assert exchanges[0] == exchanges[1] > 3, "the clips were not split"
    one, two = weights(folder / "one" / name), weights(folder / "0" / name)
    assert one.keys() == two.keys()
    for key, value in one.items():
        torch.testing.assert_close(two[key], value, rtol=1e-5, atol=1e-7, msg=key)


def test_data_rank_is_that_of_the_group():
    def trainer(rank: int, strategy: object) -> SimpleNamespace:
        return SimpleNamespace(global_rank=rank, world_size=6, strategy=strategy)

    split = SequenceParallelStrategy(sequence_parallel=2)
    assert [data_rank(trainer(rank, split)) for rank in range(6)] == [0, 0, 1, 1, 2, 2]
    assert [data_rank(trainer(rank, SimpleNamespace())) for rank in range(6)] == [*range(6)]
    assert (data_world_size(trainer(0, split)), data_world_size(trainer(0, SimpleNamespace()))) == (3, 6)


@pytest.mark.parametrize("size", [0, 4])
def test_sizes_that_do_not_divide_the_processes_raise(size: int):
    strategy = SequenceParallelStrategy(sequence_parallel=size)
    strategy.parallel_devices = [torch.device("cpu")] * 6
    with pytest.raises(ValueError, match=rf"sequence_parallel={size}\b.*\b6\b.*sequence_parallel=1 or 2 or 3 or 6,"):
        strategy.setup_environment()


def test_model_that_does_not_split_clips_raises():
    strategy = SequenceParallelStrategy(sequence_parallel=2)
    module = SimpleNamespace(model=torch.nn.Linear(1, 1), modules=lambda: [torch.nn.Linear(1, 1)])
    strategy._lightning_module = module  # type: ignore[assignment]
    with pytest.raises(ValueError, match=r"sequence_parallel=2\b.*\bLinear\b.*trainer=ddp"):
        strategy.setup(None)  # type: ignore[arg-type]
