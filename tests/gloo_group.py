"""Process group of the tests that start several processes."""

import gc
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
import torch.distributed
import torch.distributed.nn  # else a later import, as by torch._dynamo, keeps the group as default argument


@contextmanager
def gloo_group(folder: str | Path, rank: int, world_size: int) -> Iterator[None]:
    """Context manager of a gloo group of ``world_size`` processes that meet in ``folder``.

    Destroying a group joins its threads only if nothing else refers to it, and a module wrapped in FSDP or DDP refers
    to it in a reference cycle. A thread that runs while the interpreter ends may abort the process ("terminate called
    without an active exception"). So call a function in the block: its variables are released before the end.
    """
    store = torch.distributed.FileStore(str(Path(folder, "store")), world_size)
    torch.distributed.init_process_group("gloo", store=store, rank=rank, world_size=world_size)
    yield
    gc.collect()
    torch.distributed.barrier()  # gloo aborts a process with open connections to one that has ended
    torch.distributed.destroy_process_group()
    assert not gloo_threads(), "something refers to the group"


def gloo_threads() -> list[str]:
    """Returns the names of the threads of process groups in this process; empty where /proc does not exist."""
    tasks = Path("/proc/self/task")
    names = [(tasks / task / "comm").read_text().strip() for task in os.listdir(tasks)] if tasks.exists() else []
    return [name for name in names if "gloo" in name]
