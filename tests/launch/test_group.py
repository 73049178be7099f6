"""Processes that torchrun starts: one run folder, the same result as one process, and errors of one of them."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from blueberry_video.config import compose
from blueberry_video.launch import group

ROOT = Path(__file__).resolve().parents[2]
EXPERIMENT = ROOT / "experiments" / "probe"
SMALL = [
    "model.freeze_encoder=false",
    "model.encoder.depth=1",
    "logger=csv",
    "data.num_workers=0",
    "data.train.size=32",
]
SMALL += ["data.val.size=8", "trainer.max_steps=2", "optimizer.lr=0.001", "trainer.log_every_n_steps=1"]
SMALL += ["++optimizer.eps=0.001"]  # otherwise AdamW amplifies the rounding of gradients near 0
CPUS = ["trainer=ddp", "trainer.accelerator=cpu", "trainer.precision=32-true"]


def free_port() -> int:
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        return server.getsockname()[1]


def in_one_process(folder: Path, seed: int) -> dict[str, torch.Tensor]:
    from blueberry_video import train

    words = [*SMALL, "data.batch_size=8", f"seed={seed}", f"output_dir={folder}"]
    train.run(compose(EXPERIMENT / "config.yaml", words))
    [file] = folder.glob("probe/*/checkpoints/step_00000002.ckpt")
    return torch.load(file, weights_only=True)["state_dict"]


@pytest.mark.slow
def test_sweep_on_two_nodes_of_torchrun_equals_one_process(tmp_path: Path):
    """Takes the time of two torchrun agents and two ranks, which is mostly that of importing PyTorch."""
    command = ["torchrun", "--nnodes=2", "--nproc-per-node=1", "--rdzv-backend=c10d", "--rdzv-id=test"]
    command += [f"--rdzv-endpoint=127.0.0.1:{free_port()}", "-m", "blueberry_video.train", "--multirun"]
    command += ["--config-dir", str(EXPERIMENT), *SMALL, *CPUS, "trainer.devices=1", "trainer.num_nodes=2"]
    command += ["data.batch_size=4", "seed=1,2"]
    variables = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT / "src")}
    command[0] = str(Path(sys.executable).with_name("torchrun"))
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    agents = [subprocess.Popen(command, cwd=tmp_path, env=variables, **pipes) for _ in range(2)]
    texts = [agent.communicate(timeout=400)[0] for agent in agents]
    assert [agent.returncode for agent in agents] == [0, 0], texts
    runs = {json.loads(file.read_text())["seed"]: file.parent for file in tmp_path.glob("outputs/probe/*/run.json")}
    assert set(runs) == {1, 2}
    assert len([*tmp_path.glob("outputs/probe/*/config.yaml")]) == 2
    assert "".join(texts).count("2 of 2 points finished") == 1
    for seed, run in runs.items():
        record = json.loads((run / "run.json").read_text())
        assert record["status"] == "finished"
        assert record["metrics"]["val/loss"] > 0
        assert (run / "report.html").is_file()
        weights = torch.load(run / "checkpoints" / "step_00000002.ckpt", weights_only=True)["state_dict"]
        expected = in_one_process(tmp_path / f"one{seed}", seed)
        for name, value in expected.items():
            torch.testing.assert_close(weights[name], value, rtol=1e-5, atol=1e-5)


RANK = """
import os, signal, sys, time
from contextlib import nullcontext
from pathlib import Path
from omegaconf import OmegaConf
from blueberry_video.launch import group, signals
group.STOPPED_SECONDS, group.SETTLE_SECONDS, group.GONE_SECONDS = 3.0, 2.0, 2.0
rank, what = int(os.environ["RANK"]), sys.argv[1]

def train(message):
    print(f"rank {rank} trains", message["config"], flush=True)
    Path(f"{message['folder']}/{rank}").write_text(str(os.getpid()))
    if what == "first" and message["config"]["point"] == 1 or what == f"raise{rank}":
        raise ArithmeticError("no clips")
    if what == "wait":
        time.sleep(60)

def failed(error):
    print(f"recorded {error}", flush=True)

with signals.handled(quiet=rank > 0), group.joined() as ranks:
    if rank:
        ranks.follow(train)
    codes = []
    for point in (1, 2):
        config = OmegaConf.create({"point": point})
        try:
            with group.shared(config, Path(sys.argv[2]), False, failed):
                train({"config": config, "folder": sys.argv[2]})
        except Exception as error:
            print(f"point {point}: {type(error).__name__}: {error}", flush=True)
            codes.append(1)
    raise SystemExit(max(codes, default=0))
"""


@pytest.fixture
def start(tmp_path: Path) -> Callable:
    """Returns a function that starts two ranks, as torchrun does, without Lightning."""
    started: list[subprocess.Popen] = []

    def ranks(what: str) -> list[subprocess.Popen]:
        port = str(free_port())
        for rank in "01":
            variables = {**os.environ, "PYTHONPATH": str(ROOT / "src"), "OMP_NUM_THREADS": "1", "RANK": rank}
            variables |= {"LOCAL_RANK": rank, "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1"}
            pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
            command = [sys.executable, "-c", RANK, what, str(tmp_path)]
            started.append(subprocess.Popen(command, env={**variables, "MASTER_PORT": port}, **pipes))
        return started

    yield ranks
    for process in started:
        process.kill()
        process.communicate()


def wait_until_training(folder: Path) -> None:
    for _ in range(1200):
        if (folder / "0").is_file() and (folder / "1").is_file():
            return
        time.sleep(0.1)
    raise TimeoutError("the ranks do not train")


def ended(ranks: list[subprocess.Popen]) -> tuple[list[int], list[str]]:
    texts = [process.communicate(timeout=60)[0] for process in ranks]
    return [process.returncode for process in ranks], texts


def test_error_of_all_ranks_fails_one_point(start: Callable):
    codes, texts = ended(start("first"))
    assert codes == [1, 1]
    assert "point 1: ArithmeticError: no clips" in texts[0]
    assert "point 2" not in texts[0]
    assert texts[1].count("trains") == 2
    assert "no clips" not in texts[1]


def test_error_of_one_rank_is_raised_in_rank_0(start: Callable):
    codes, texts = ended(start("raise1"))
    assert codes == [1, 1]
    assert "point 1: LostRankError: rank 1 of the 2 processes" in texts[0]
    assert "ArithmeticError: no clips" in texts[0]
    assert "no clips" not in texts[1]


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="needs /proc")
@pytest.mark.parametrize(("rank", "number"), [(1, signal.SIGKILL), (1, signal.SIGSTOP), (0, signal.SIGSTOP)])
def test_lost_rank_ends_the_others(start: Callable, tmp_path: Path, rank: int, number: signal.Signals):
    ranks = start("wait")
    wait_until_training(tmp_path)
    began = time.monotonic()
    ranks[rank].send_signal(number)
    codes, texts = ended(ranks)
    assert time.monotonic() - began < 30
    assert codes[rank] == -signal.SIGKILL
    assert codes[1 - rank] == 1
    assert f"Error: rank {rank} failed first: process {ranks[rank].pid} on " in texts[1 - rank]
    assert (f"recorded rank {rank} failed first" in texts[0]) == (rank == 1)


def test_signal_of_one_rank_ends_all(start: Callable, tmp_path: Path):
    ranks = start("wait")
    wait_until_training(tmp_path)
    ranks[1].send_signal(signal.SIGUSR1)
    codes, texts = ended(ranks)
    assert codes == [143, 143]
    assert ("Stopped by SIGUSR1" in texts[0], "Stopped" in texts[1]) == (True, False)


def test_a_process_alone_has_no_group(monkeypatch: pytest.MonkeyPatch):
    with group.joined() as ranks:
        assert ranks is None
