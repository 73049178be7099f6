"""Fine-tuning of few weights: low-rank adapters beside frozen matrices (LoRA, arXiv 2106.09685), made by peft.

A network with adapters keeps its frozen weights out of its state dict: they are those of the published file it began
with. Adapters are saved as diffusers loads them, ``pytorch_lora_weights.safetensors``.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import torch
from safetensors.torch import load_file, save
from torch import Tensor, nn

from blueberry_video.atomic import write_bytes
from blueberry_video.weights.optional import import_extra

FILE = "pytorch_lora_weights.safetensors"
_ADAPTER = "default"


class LoRA:
    """Settings of adapters.

    Args:
        base: the published weights that stay frozen, a folder of diffusers or an original file; ``None``: the
            transformer's random ones.
        rank: of the two matrices whose product is added to a frozen one.
        alpha: the product is multiplied by alpha / rank.
        targets: ends of the names of the linear layers that get one; CogVideoX's and HunyuanVideo's attention.

    Raises:
        ValueError: for a rank below 1, an alpha that is not above 0, or no targets.
    """

    def __init__(
        self,
        base: str | None = None,
        rank: int = 128,
        alpha: float = 128.0,
        targets: Sequence[str] = ("to_q", "to_k", "to_v", "to_out.0"),
    ):
        if rank < 1 or alpha <= 0 or not targets:
            raise ValueError(
                f"lora.rank={rank}, lora.alpha={alpha}, lora.targets={list(targets)}: a rank is 1 or more, alpha above "
                "0, and something must get an adapter. CogVideoX is tuned with rank 128 and alpha 64 to 128."
            )
        self.base, self.rank, self.alpha, self.targets = base, rank, alpha, tuple(targets)


def add_adapters(network: nn.Module, lora: LoRA) -> None:
    """Freezes a network and puts adapters into it, which at first add nothing.

    Raises:
        ImportError: peft is not installed.
        ValueError: the network has no layer of such a name.
    """
    peft = import_extra("peft")
    names = [name for name, module in network.named_modules() if isinstance(module, nn.Linear)]
    for target in lora.targets:
        if not any(name == target or name.endswith(f".{target}") for name in names):
            raise ValueError(
                f"lora.targets names {target!r}, and {type(network).__name__} has no linear layer of that name: use "
                "to_q, to_k, to_v, to_out.0."
            )
    settings = peft.LoraConfig(r=lora.rank, lora_alpha=lora.alpha, target_modules=list(lora.targets))
    network.requires_grad_(False)
    peft.inject_adapter_in_model(settings, network)


@contextmanager
def plain(network: nn.Module, merged: bool = False) -> Iterator[nn.Module]:
    """The network as it was before :func:`add_adapters`: to load or save its frozen weights.

    Args:
        network: with adapters or without.
        merged: add what the adapters have learned to the weights, meanwhile.
    """
    found = [
        (parent, name, child)
        for parent in list(network.modules())
        for name, child in parent.named_children()
        if hasattr(child, "base_layer") and hasattr(child, "lora_A")
    ]
    for parent, name, child in found:
        if merged:
            cast(Any, child).merge()
        setattr(parent, name, child.base_layer)
    try:
        yield network
    finally:
        for parent, name, child in found:
            setattr(parent, name, child)
            if merged:
                cast(Any, child).unmerge()


def save_adapters(network: nn.Module, lora: LoRA, folder: str | Path) -> Path:
    """Writes the file that ``pipeline.load_lora_weights(folder)`` of diffusers takes: ``<layer>.lora_A.weight`` and
    ``<layer>.lora_B.weight``, the latter times alpha / rank, so that nobody has to know alpha.

    Raises:
        ValueError: the network has no adapters.
    """
    scale = lora.alpha / lora.rank
    weights = {
        f"transformer.{name}": (value * scale if ".lora_B." in name else value).cpu().contiguous()
        for name, value in _adapters(network).items()
    }
    if not weights:
        raise ValueError(f"{type(network).__name__} has no adapters to save: train it with model.lora.")
    path = Path(folder) / FILE
    path.parent.mkdir(parents=True, exist_ok=True)
    write_bytes(path, save(weights, metadata={"format": "pt"}))
    return path


def load_adapters(network: nn.Module, lora: LoRA, path: str | Path) -> None:
    """Puts a file of :func:`save_adapters` into the adapters of a network.

    Raises:
        ValueError: they are of other layers, or of another rank.
    """
    weights = {name.removeprefix("transformer."): value for name, value in load_file(path).items()}
    own = _adapters(network)
    if {name: value.shape for name, value in own.items()} != {name: value.shape for name, value in weights.items()}:
        raise ValueError(
            f"the adapters in {path} are {len(weights)} tensors and the network's {len(own)}, or of another rank: set "
            "lora.rank and lora.targets to those it was trained with."
        )
    scale = lora.alpha / lora.rank
    with torch.no_grad():
        for name, value in weights.items():
            own[name].copy_(value / scale if ".lora_B." in name else value)


def _adapters(network: nn.Module) -> dict[str, Tensor]:
    """The adapters' weights, by the names that diffusers has for them."""
    state = network.state_dict()
    return {name.replace(f".{_ADAPTER}.", "."): value for name, value in state.items() if ".lora_" in name}


def drop_frozen(module: nn.Module, state: dict[str, Tensor], prefix: str, _: object) -> None:
    """A hook of ``state_dict``: leaves out what is not trained."""
    for name, parameter in module.named_parameters():
        if not parameter.requires_grad:
            state.pop(f"{prefix}{name}", None)


def forgive_frozen(module: nn.Module, keys: Any) -> None:
    """A hook of ``load_state_dict``: what is not trained is not missing."""
    frozen = {name for name, parameter in module.named_parameters() if not parameter.requires_grad}
    keys.missing_keys[:] = [name for name in keys.missing_keys if not any(name.endswith(own) for own in frozen)]
