"""LoRA adapters of a frozen network (arXiv 2106.09685), by peft.

Adapter files are ``pytorch_lora_weights.safetensors`` in the format of diffusers. Frozen weights are left out of the
state dict, because the published file has them.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save
from torch import Tensor, nn

from blueberry_video.atomic import write_bytes
from blueberry_video.weights.optional import import_extra

FILE = "pytorch_lora_weights.safetensors"


class LoRA:
    """Settings of LoRA adapters.

    Args:
        base: frozen published weights, a diffusers folder or an original file; ``None`` keeps the random ones.
        rank: rank of the update of a weight matrix.
        alpha: the update is scaled by alpha / rank.
        targets: name suffixes of the linear layers to adapt; by default the attention of CogVideoX and HunyuanVideo.

    Raises:
        ValueError: for a rank below 1, an alpha not above 0, or no targets.
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
                f"lora.rank={rank} must be at least 1, lora.alpha={alpha} above 0 and lora.targets={list(targets)} not "
                "empty: CogVideoX is fine-tuned with rank 128 and alpha 64 to 128."
            )
        self.base, self.rank, self.alpha, self.targets = base, rank, alpha, tuple(targets)


def add_adapters(network: nn.Module, lora: LoRA) -> None:
    """Freezes a network and injects adapters, initialized to zero.

    Raises:
        ImportError: peft is not installed.
        ValueError: the network has no linear layer that matches a target.
    """
    peft = import_extra("peft")
    names = [f".{name}" for name, module in network.named_modules() if isinstance(module, nn.Linear)]
    for target in lora.targets:
        if not any(name.endswith(f".{target}") for name in names):
            raise ValueError(
                f"lora.targets={list(lora.targets)}: {type(network).__name__} has no linear layer {target!r}: use "
                "to_q, to_k, to_v, to_out.0."
            )
    network.requires_grad_(False)
    config = peft.LoraConfig(r=lora.rank, lora_alpha=lora.alpha, target_modules=list(lora.targets))
    peft.inject_adapter_in_model(config, network)


@contextmanager
def plain(network: nn.Module, merged: bool = False) -> Iterator[nn.Module]:
    """Context manager that removes the adapters, to load or save the frozen weights.

    Args:
        network: with or without adapters.
        merged: merge the adapters into the weights within the context.
    """
    layers: dict[str, Any] = {name: layer for name, layer in network.named_modules() if hasattr(layer, "lora_A")}
    for name, layer in layers.items():
        if merged:
            layer.merge()
        network.set_submodule(name, layer.base_layer)
    try:
        yield network
    finally:
        for name, layer in layers.items():
            network.set_submodule(name, layer)
            if merged:
                layer.unmerge()


def save_adapters(network: nn.Module, lora: LoRA, folder: str | Path) -> Path:
    """Writes a file for ``pipeline.load_lora_weights(folder)`` of diffusers.

    ``lora_B`` is multiplied by alpha / rank, so that readers do not need alpha.
    """
    scale = lora.alpha / lora.rank
    weights = import_extra("peft").get_peft_model_state_dict(network)
    state = {
        f"transformer.{name}": (value * scale if ".lora_B." in name else value).cpu().contiguous()
        for name, value in weights.items()
    }
    path = Path(folder) / FILE
    path.parent.mkdir(parents=True, exist_ok=True)
    write_bytes(path, save(state, metadata={"format": "pt"}))
    return path


def load_adapters(network: nn.Module, lora: LoRA, path: str | Path) -> None:
    """Loads a file of :func:`save_adapters` into the adapters of a network.

    Raises:
        ValueError: the file has adapters of different layers or of a different rank; nothing is loaded.
    """
    peft = import_extra("peft")
    weights = {name.removeprefix("transformer."): value for name, value in load_file(path).items()}
    found, expected = (
        {name: tuple(value.shape) for name, value in state.items()}
        for state in (weights, peft.get_peft_model_state_dict(network))
    )
    if found != expected:
        wrong = min(name for name, _ in found.items() ^ expected.items())
        raise ValueError(
            f"{path} has {len(found)} adapter tensors and model.lora has {len(expected)}; {wrong} has shape "
            f"{found.get(wrong)} in the file and {expected.get(wrong)} in the network: set lora.rank and lora.targets "
            "to the values of training."
        )
    scale = lora.alpha / lora.rank
    weights = {name: value / scale if ".lora_B." in name else value for name, value in weights.items()}
    peft.set_peft_model_state_dict(network, weights)


def exclude_frozen(module: nn.Module) -> None:
    """Excludes frozen parameters from the state dict of a module, and from the keys required to load one."""
    module._register_state_dict_hook(_drop_frozen)
    module.register_load_state_dict_post_hook(_ignore_frozen)


def _drop_frozen(module: nn.Module, state: dict[str, Tensor], prefix: str, _: object) -> None:
    for name, parameter in module.named_parameters():
        if not parameter.requires_grad:
            state.pop(f"{prefix}{name}", None)


def _ignore_frozen(module: nn.Module, keys: Any) -> None:
    frozen = {name for name, parameter in module.named_parameters() if not parameter.requires_grad}
    keys.missing_keys[:] = [name for name in keys.missing_keys if not any(name.endswith(own) for own in frozen)]
