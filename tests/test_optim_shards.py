"""Parameter groups under FSDP, which flattens parameters, on two processes."""

import functools
import os
from pathlib import Path

import torch
import torch.distributed
import torch.multiprocessing
from torch import nn
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.distributed.fsdp.wrap import size_based_auto_wrap_policy

from blueberry_video.models.classifier import VideoClassifier
from blueberry_video.models.vit import VisionTransformer
from blueberry_video.optim import decayed_names, parameter_groups
from gloo_group import gloo_group


def tiny() -> nn.Module:
    encoder = VisionTransformer(16, 4, 8, 2, embed_dim=16, depth=2, num_heads=2)
    return VideoClassifier(encoder, {"motion": 4})


def numbers(module: nn.Module, decayed: set[str] | None) -> dict[tuple[float, bool], float]:
    """Returns (learning-rate scale, has weight decay) -> number of elements of the group over all processes."""
    found = torch.zeros(8)
    keys = []
    for index, group in enumerate(parameter_groups(module, 0.5, decayed)):
        keys.append((group["lr_scale"], "weight_decay" not in group))
        found[index] = sum(parameter.numel() for parameter in group["params"])
    if torch.distributed.is_initialized():
        torch.distributed.all_reduce(found)
    return dict(zip(keys, found.tolist()))


def shard(rank: int, folder: str) -> None:
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT="0")
    torch.set_num_threads(1)
    with gloo_group(folder, rank, 2):
        save_groups(f"{folder}/out" if rank == 0 else None)


def save_groups(file: str | None) -> None:
    """Saves the numbers of elements, and the names, of the parameters of a sharded model."""
    model = tiny()
    decayed = decayed_names(model)
    policy = functools.partial(size_based_auto_wrap_policy, min_num_params=500)
    sharded = FullyShardedDataParallel(
        model, use_orig_params=True, auto_wrap_policy=policy, device_id=torch.device("cpu")
    )
    found = numbers(sharded.module, decayed)
    if file:
        torch.save({"found": found, "names": [name for name, _ in sharded.module.named_parameters()]}, file)


def test_groups_of_sharded_parameters_equal_the_unsharded_ones(tmp_path: Path):
    expected = numbers(tiny(), None)
    assert len(expected) == 8
    torch.multiprocessing.spawn(shard, (str(tmp_path),), nprocs=2)
    result = torch.load(tmp_path / "out", weights_only=False)
    assert any("_fsdp_wrapped_module" in name for name in result["names"])
    assert result["found"] == expected
