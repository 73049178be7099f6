"""LoRA adapters of a frozen network (arXiv 2106.09685), by peft.

Adapter files are ``pytorch_lora_weights.safetensors`` in the format of diffusers. Frozen weights are left out of the
state dict, because the published file has them.
"""

import copy
import json
import re
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple, cast

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn

from blueberry_video.atomic import write_bytes
from blueberry_video.weights.files import read_content
from blueberry_video.weights.optional import import_extra

FILE, PEFT_FILE = "pytorch_lora_weights.safetensors", "adapter_model.safetensors"
TENSOR = re.compile(
    r"(?P<layer>.+?)\.(?P<kind>lora_A|lora_B|lora_down|lora_up|lora\.down|lora\.up|alpha)(\.default)?(\.weight)?"
)
KINDS = {"lora_A": "down", "lora_down": "down", "lora.down": "down"}
KINDS |= {"lora_B": "up", "lora_up": "up", "lora.up": "up", "alpha": "alpha"}
PREFIXES = r"^((base_model\.model|transformer|diffusion_model|model)\.|lora_(unet|transformer)_)+"


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
        merged: within the context, the layers have new weights with merged adapters, computed in 32 bits and rounded
            once. The weights of the network are not changed.
    """
    layers: dict[str, Any] = {name: layer for name, layer in network.named_modules() if hasattr(layer, "lora_A")}
    for name, layer in layers.items():
        updates = [
            layer.scaling[key] * (_wide(layer.lora_B[key].weight) @ _wide(layer.lora_A[key].weight))
            for key in (layer.lora_A if merged else ())
        ]
        network.set_submodule(name, _merged(layer.base_layer, updates) if merged else layer.base_layer)
    try:
        yield network
    finally:
        for name, layer in layers.items():
            network.set_submodule(name, layer)


@torch.no_grad()
def _merged(layer: nn.Linear, updates: Iterable[Tensor]) -> nn.Linear:
    """Returns the layer with a new weight, the sum of its weight and of the updates."""
    merged = copy.copy(layer)
    wide = _wide(layer.weight)
    weight = sum((update.to(wide) for update in updates), wide).to(layer.weight.dtype, copy=True)
    merged._parameters = {**layer._parameters, "weight": nn.Parameter(weight, layer.weight.requires_grad)}
    return merged


def _wide(tensor: Tensor) -> Tensor:
    """Returns the tensor in at least 32 bits, without gradient."""
    return tensor.detach().to(torch.promote_types(tensor.dtype, torch.float32))


class Adapter(NamedTuple):
    """Adapter of one linear layer: its weight changes by ``scale * up @ down``."""

    down: Tensor  # (rank, in_features)
    up: Tensor  # (out_features, rank)
    scale: float  # alpha / rank


def read_adapters(path: str | Path, layers: Mapping[str, Any]) -> dict[str, Adapter]:
    """Reads an adapter file of diffusers, peft or kohya.

    Rank and alpha are those of the tensors ``alpha``, else of the file's metadata (diffusers), else of
    ``adapter_config.json`` in the same folder (peft). Without alpha, the scale is 1.

    Args:
        path: a file, or the folder of a file ``pytorch_lora_weights.safetensors`` or ``adapter_model.safetensors``.
        layers: linear layers of the network by name, see :func:`linear_layers`.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is damaged, or has adapters of different layers, of a text encoder, or not LoRA.
    """
    path = next((file for name in (FILE, PEFT_FILE) if (file := Path(path) / name).is_file()), Path(path))
    state = read_content(path)
    if not isinstance(state, dict) or not is_adapter(state):
        raise ValueError(f"{path} has no LoRA adapters: use a file of diffusers, peft or kohya.")
    config = _settings(path)
    flat = {name.replace(".", "_"): name for name in layers}
    found: dict[str, dict[str, Tensor]] = {}
    for key, value in state.items():
        match = TENSOR.fullmatch(key)
        if match is None or value.ndim not in (0, 1, 2) or (value.ndim != 2 and not key.endswith("alpha")):
            raise ValueError(
                f"{path} has {key} of shape {tuple(value.shape)}, which is not a matrix of a LoRA adapter: DoRA, LoHa, "
                "LoKr, biases and convolutions are not supported. Merge it into the weights with the tool that wrote "
                "it, and use these as model.lora.base."
            )
        name = re.sub(PREFIXES, "", match["layer"])
        if (layer := name if name in layers else flat.get(name.replace(".", "_"))) is None:
            raise ValueError(
                f"{path} has an adapter of {match['layer']!r}, which is not a linear layer of the network: choose the "
                "model that it was trained with. If it has names of the original code, load it with "
                "load_lora_weights of a diffusers pipeline, and save it with pipeline.transformer.save_lora_adapter."
            )
        found.setdefault(layer, {})[KINDS[match["kind"]]] = value
    adapters = {}
    for layer, parts in found.items():
        shapes = {kind: tuple(value.shape) for kind, value in parts.items() if kind != "alpha"}
        rows, columns = layers[layer].out_features, layers[layer].in_features
        if shapes.keys() != {"down", "up"} or shapes != {"down": (r := len(parts["down"]), columns), "up": (rows, r)}:
            raise ValueError(
                f"{path}: the adapter of {layer} has shapes {shapes} and must be down (rank, {columns}) and up "
                f"({rows}, rank): choose the model that it was trained with, or download it again."
            )
        rank = len(parts["down"])
        alpha = parts["alpha"].item() if "alpha" in parts else config.alpha(layer, rank)
        adapters[layer] = Adapter(parts["down"], parts["up"], alpha / (rank**0.5 if config.rslora else rank))
    return adapters


def is_adapter(names: Iterable[str]) -> bool:
    """Returns whether tensor names are those of adapters."""
    return any(".lora" in name or name.startswith("lora_") for name in names)


def is_adapter_file(path: Path) -> bool:
    """Returns whether a path is a safetensors file with adapters, or its folder."""
    if path.name in (FILE, PEFT_FILE) or any((path / name).is_file() for name in (FILE, PEFT_FILE)):
        return True
    try:
        with safe_open(path, "pt") as file:
            return is_adapter(file.keys())
    except (OSError, SafetensorError):
        return False


class _Settings(NamedTuple):
    """LoRA settings of a file, under their names in peft."""

    values: dict[str, Any]

    @property
    def rslora(self) -> bool:
        return bool(self.values.get("use_rslora"))

    def alpha(self, layer: str, rank: int) -> float:
        """Returns alpha of a layer, defaulting to a scale of 1."""
        for pattern, alpha in (self.values.get("alpha_pattern") or {}).items():
            if re.fullmatch(rf"(.*\.)?({pattern.removeprefix('^').removeprefix('transformer.')})$", layer):
                return float(alpha)
        default = rank**0.5 if self.rslora else rank
        return float(self.values["lora_alpha"]) if self.values.get("lora_alpha") is not None else default


def _settings(path: Path) -> _Settings:
    """Reads the LoRA settings of an adapter file: its metadata, or ``adapter_config.json`` next to it."""
    metadata: dict[str, str] = {}
    if path.suffix == ".safetensors":
        with safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
    if text := metadata.get("trained_text_encoder"):
        warnings.warn(
            f"{path} was trained with a {text}, which the file lacks: the model does not follow captions until its "
            "text encoder is trained with it again. Use the checkpoint of the run (init_from=<run>) to keep both.",
            stacklevel=4,
        )
    try:
        if "lora_adapter_metadata" in metadata:
            values = json.loads(metadata["lora_adapter_metadata"])
            return _Settings({key.removeprefix("transformer."): value for key, value in values.items()})
        if path.name == PEFT_FILE and (config := path.with_name("adapter_config.json")).is_file():
            return _Settings(json.loads(config.read_text()))
    except (json.JSONDecodeError, AttributeError) as error:
        raise ValueError(f"the LoRA settings of {path} are damaged ({error}): download it again.") from error
    alpha = metadata.get("ss_network_alpha")
    return _Settings({} if alpha in (None, "None") else {"lora_alpha": float(alpha)})


def save_adapters(network: nn.Module, lora: LoRA, folder: str | Path, trained_text_encoder: str = "") -> Path:
    """Writes a file for ``pipeline.load_lora_weights(folder)`` of diffusers.

    ``lora_B`` is multiplied by alpha / rank, so that readers do not need alpha. The metadata of the file names a text
    encoder that is trained with the adapters and that the file lacks.
    """
    scale = lora.alpha / lora.rank
    weights = import_extra("peft").get_peft_model_state_dict(network)
    state = {
        f"transformer.{name}": (value * scale if ".lora_B." in name else value).cpu().contiguous()
        for name, value in weights.items()
    }
    path = Path(folder) / FILE
    path.parent.mkdir(parents=True, exist_ok=True)
    recorded = {"trained_text_encoder": trained_text_encoder} if trained_text_encoder else {}
    write_bytes(path, save(state, metadata={"format": "pt", **recorded}))
    return path


def linear_layers(network: nn.Module) -> dict[str, nn.Module]:
    """Returns the linear layers of a network by name; those with adapters under the name without adapters."""
    layers = {name: layer for name, layer in network.named_modules() if isinstance(layer, nn.Linear)}
    return {
        name.removesuffix(".base_layer"): layer
        for name, layer in layers.items()
        if not re.search(r"\.lora_[AB]\.", name)
    }


@torch.no_grad()
def load_adapters(network: nn.Module, lora: LoRA, path: str | Path, strength: float = 1.0) -> None:
    """Loads a file, see :func:`read_adapters`, into the adapters of a network.

    The update of a layer is that of the file, for any ``lora.alpha``. Layers that the file does not have get no update.

    Args:
        network: with adapters.
        lora: settings of the adapters.
        path: the file.
        strength: factor of the update.

    Raises:
        ValueError: see :func:`read_adapters`; also if the file has adapters of a different rank, or of layers without
            adapters. Nothing is loaded.
    """
    own: dict[str, Any] = {name: layer for name, layer in network.named_modules() if hasattr(layer, "lora_A")}
    adapters = read_adapters(path, linear_layers(network))
    rank, extra = max(len(adapter.down) for adapter in adapters.values()), min(adapters.keys() - own.keys(), default="")
    if rank != lora.rank or extra:
        name = extra or next(name for name in adapters if len(adapters[name].down) == rank)
        shape = tuple(own[name].lora_A["default"].weight.shape) if name in own else None
        suffixes = sorted({re.sub(r"^.*blocks\.\d+\.", "", layer) for layer in adapters})
        raise ValueError(
            f"{path} has {2 * len(adapters)} adapter tensors and model.lora has {2 * len(own)}; {name}.lora_A has "
            f"shape {tuple(adapters[name].down.shape)} in the file and {shape} in the network: set "
            f"model.lora.rank={rank} and model.lora.targets=[{','.join(suffixes)}]."
        )
    for name, layer in own.items():
        down, up = layer.lora_A["default"].weight, layer.lora_B["default"].weight
        up.zero_()
        if name in adapters:
            adapter, count = adapters[name], len(adapters[name].down)
            down[:count].copy_(adapter.down)
            up[:, :count].copy_(adapter.up.float() * (strength * adapter.scale) / layer.scaling["default"])


def merge_adapters(network: nn.Module, adapters: Mapping[str | Path, float]) -> nn.Module:
    """Returns a copy of a network with merged adapters, for sampling with several adapters.

    The updates of all files are added in 32 bits, and the weights are rounded once.

    Args:
        network: without adapters; it is not changed.
        adapters: file (see :func:`read_adapters`) -> strength, the factor of its update.

    Raises:
        ValueError: see :func:`read_adapters`; also if the network has adapters.
    """
    if any(hasattr(layer, "lora_A") for layer in network.modules()):
        raise ValueError("the network has adapters: use model.lora=null, or merge them first with plain(merged=True).")
    layers: dict[str, Any] = linear_layers(network)
    updates: dict[str, list[Tensor]] = {}
    for path, strength in adapters.items():
        for name, adapter in read_adapters(path, layers).items():
            down, up = (_wide(part.to(layers[name].weight.device)) for part in (adapter.down, adapter.up))
            updates.setdefault(name, []).append(strength * adapter.scale * (up @ down))
    merged = copy.deepcopy(network)
    for name, parts in updates.items():
        merged.set_submodule(name, _merged(cast(nn.Linear, merged.get_submodule(name)), parts))
    return merged


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
