"""Sequence parallelism on two processes: outputs and gradients equal those of one process."""

import os
import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.distributed
import torch.multiprocessing
from torch import Tensor, nn

from blueberry_video.masking import RandomMasking, TubeMasking
from blueberry_video.models.classifier import VideoClassifier
from blueberry_video.models.cogvideox import CogVideoX
from blueberry_video.models.hunyuan_video import HunyuanVideo, HunyuanVideo15
from blueberry_video.models.hydra_video import HydraVideo
from blueberry_video.models.jepa.multi_level import MultiLevelEncoder
from blueberry_video.models.masked_autoencoder import MaskedAutoencoder
from blueberry_video.models.vit import VisionTransformer
from blueberry_video.nn.joint_attention import KeyValueCache
from blueberry_video.parallel.sequence import SequenceGroup, TokenShards, active_group, sequence_parallel
from gloo_group import gloo_group

SIZE = 2
Call = Callable[[], Tensor]  # output of a model on fixed inputs
Case = Callable[[], tuple[nn.Module, Call]]


# ---- models on fixed inputs ------------------------------------------------------------------------------------------


def randomized(model: nn.Module) -> nn.Module:
    """The model in float64, with random values added to all parameters, so that none is zero or one."""
    model = model.double()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return model


def hydra(num_frames: int = 8, keep: str = "", **options: object) -> tuple[nn.Module, Call]:
    sizes = {"patch_size": 4, "tubelet_size": 2, "embed_dim": 16, "depth": 2, "head_dim": 8, "state_dim": 4}
    model = randomized(HydraVideo(16, num_frames, **sizes, memory_frames=4, **options))  # type: ignore[arg-type]
    video, index = torch.randn(2, 3, num_frames, 16, 16).double().requires_grad_(), None
    if keep:
        index = TubeMasking(0.5)(2, (num_frames // 2, 4, 4)).keep
        index = index[:, torch.randperm(index.shape[1])] if keep == "shuffled" else index
    return model, lambda: model(video, index)


def vit(positions: str, masked: bool) -> tuple[nn.Module, Call]:
    model = randomized(VisionTransformer(16, 6, 4, 2, 24, depth=2, num_heads=4, positions=positions))
    video = torch.randn(2, 3, 6, 16, 16).double().requires_grad_()
    keep = RandomMasking(0.5)(2, (3, 4, 4)).keep if masked else None
    return model, lambda: model(video, keep)


def autoencoder() -> tuple[nn.Module, Call]:
    encoder, _ = hydra()
    model = randomized(MaskedAutoencoder(encoder, decoder_dim=16, decoder_depth=2, decoder_num_heads=2))
    video, masks = torch.randn(2, 3, 8, 16, 16).double(), TubeMasking(0.75)(2, (4, 4, 4))
    return model, lambda: model(video, masks.keep, masks.target)


def classifier() -> tuple[nn.Module, Call]:
    encoder, _ = hydra()
    model = randomized(VideoClassifier(encoder, {"motion": 5}, pooling="attentive", num_heads=2, pool_depth=2))
    video = torch.randn(2, 3, 8, 16, 16).double()
    return model, lambda: model(video)["motion"]


def multi_level() -> tuple[nn.Module, Call]:
    model, _ = vit("sincos_3d", masked=False)
    levels = randomized(MultiLevelEncoder(model, 2))
    video = torch.randn(2, 3, 6, 16, 16).double()
    return levels, lambda: levels(video)


def cogvideox(frame_timesteps: bool = False, text_len: int = 5, **options: object) -> tuple[nn.Module, Call]:
    sizes = {"num_heads": 2, "head_dim": 16, "depth": 2, "in_channels": 4, "out_channels": 4, "text_dim": 6}
    sizes |= {"text_len": 5, "time_dim": 8, "num_frames": 4, "height": 4, "width": 12, "zero_init": False}
    model = randomized(CogVideoX(**(sizes | options)))  # type: ignore[arg-type]
    latents = torch.randn(2, 4, 4, 4, 12).double().requires_grad_()
    text, timestep = torch.randn(2, text_len, 6).double().requires_grad_(), torch.tensor([3.0, 700.0])
    if frame_timesteps:
        timestep = torch.rand(2, 4) * 1000
    return model, lambda: model(latents, timestep, text)


def padded(batch: int, length: int) -> Tensor:
    """Padding mask with a text of every length, and one without tokens."""
    return torch.arange(length) < torch.arange(batch)[:, None] * 2


def hunyuan(frame_timesteps: bool = False, masked: bool = True, **options: object) -> tuple[nn.Module, Call]:
    sizes = {"in_channels": 4, "out_channels": 4, "num_heads": 2, "head_dim": 12, "depth": 1, "single_depth": 2}
    sizes |= {"refiner_depth": 1, "text_dim": 6, "pooled_dim": 5, "embedded_guidance": True, "rope_axes": (4, 4, 4)}
    model = randomized(HunyuanVideo(**(sizes | {"zero_init": False} | options)))  # type: ignore[arg-type]
    latents = torch.randn(3, 4, 3, 4, 12).double().requires_grad_()
    text, pooled = torch.randn(3, 5, 6).double().requires_grad_(), torch.randn(3, 5).double()
    timestep = torch.rand(3, 3) * 1000 if frame_timesteps else torch.tensor([3.0, 700.0, 1000.0])
    mask, guidance = padded(3, 5) if masked else None, torch.tensor([1.0, 6.0, 2.0])
    return model, lambda: model(latents, timestep, text, mask, pooled, guidance)


def hunyuan15() -> tuple[nn.Module, Call]:
    sizes = {"in_channels": 9, "out_channels": 4, "num_heads": 2, "head_dim": 12, "depth": 2, "refiner_depth": 1}
    sizes |= {"text_dim": 6, "letters_dim": 7, "image_dim": 8, "rope_axes": (4, 4, 4), "zero_init": False}
    model = randomized(HunyuanVideo15(**sizes))  # type: ignore[arg-type]
    latents, timestep = torch.randn(3, 9, 3, 2, 5).double().requires_grad_(), torch.tensor([3.0, 700.0, 1000.0])
    text, letters, image = (torch.randn(3, 4, width).double() for width in (6, 7, 8))
    masks = {"text_mask": padded(3, 4), "letters": letters, "letters_mask": padded(3, 4), "image": image}
    return model, lambda: model(latents, timestep, text, **masks)


def causal_chunks() -> tuple[nn.Module, Call]:
    """Two chunks of frames, the second with the KV cache of the first."""
    model, _ = hunyuan(causal_chunk=1)
    latents, text = torch.randn(2, 4, 2, 4, 4).double(), torch.randn(2, 5, 6).double()
    pooled, guidance, timestep = torch.randn(2, 5).double(), torch.tensor([1.0, 6.0]), torch.rand(2, 1) * 1000

    def call() -> Tensor:
        cache, mask = KeyValueCache(), padded(2, 5)
        found = [model(latents[:, :, i : i + 1], timestep, text, mask, pooled, guidance, cache, i) for i in range(2)]
        return torch.cat(found, dim=2)

    return model, call


CASES: dict[str, Case] = {
    "hydra_video": hydra,
    "hydra_video, one frame per process": lambda: hydra(4),
    "hydra_video, blocks": lambda: hydra(scan_blocks=((2, 2), None), scan_orders=("w", "h")),
    "hydra_video, no convolution over frames": lambda: hydra(conv_size=(1, 3, 3)),
    "hydra_video, visible tokens": lambda: hydra(keep="ordered", scan_blocks=(None, (2, 2))),
    "hydra_video, visible tokens in any order": lambda: hydra(keep="shuffled", num_groups=2, scan_orders=("w",)),
    "hydra": lambda: hydra(mixer="hydra"),
    "hydra, visible tokens in any order": lambda: hydra(mixer="hydra", keep="shuffled"),
    "mamba2": lambda: hydra(mixer="mamba2", num_groups=2),
    "vit, sinusoid": lambda: vit("sinusoid", masked=False),
    "vit, sinusoid, visible tokens": lambda: vit("sinusoid", masked=True),
    "vit, rotary positions": lambda: vit("rope_3d", masked=False),
    "vit, rotary positions, visible tokens": lambda: vit("rope_3d", masked=True),
    "masked autoencoder": autoencoder,
    "classifier": classifier,
    "multi-level encoder, not split": multi_level,
    "cogvideox 2b": cogvideox,
    "cogvideox 5b": lambda: cogvideox(positions="rope", text_len=3),
    "cogvideox 5b-i2v positions": lambda: cogvideox(positions="rope_and_table"),
    "cogvideox 1.5": lambda: cogvideox(positions="rope", tubelet_size=2, offset=True),
    "cogvideox, timesteps of frames": lambda: cogvideox(True, positions="rope"),
    "cogvideox, causal, checkpointing": lambda: cogvideox(True, causal_chunk=2, checkpointing=True),
    "hunyuan": hunyuan,
    "hunyuan, no padding": lambda: hunyuan(masked=False, embedded_guidance=True),
    "hunyuan, image": lambda: hunyuan(image_condition="token_replace"),
    "hunyuan, timesteps of frames, causal": lambda: hunyuan(True, causal_chunk=2),
    "hunyuan 1.5": hunyuan15,
    "hunyuan, KV cache": causal_chunks,
}


# ---- two processes ---------------------------------------------------------------------------------------------------


def results(model: nn.Module, call: Call, group: SequenceGroup | None = None) -> dict[str, Tensor]:
    """Output, loss and gradients; those of a split model are averaged over the group, as DDP does."""
    inputs = [cell.cell_contents for cell in call.__closure__ or () if isinstance(cell.cell_contents, Tensor)]
    leaves = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    leaves |= {f"input {i}": tensor for i, tensor in enumerate(inputs) if tensor.requires_grad}
    with sequence_parallel(group):
        output = call()
    weights = torch.linspace(-1, 1, output.numel(), dtype=output.dtype).view_as(output)
    gradients = torch.autograd.grad((weights * output.square()).sum(), list(leaves.values()), allow_unused=True)
    found = {"output": output.detach()}
    for name, gradient in zip(leaves, gradients, strict=True):
        if gradient is not None:
            if group is not None:
                torch.distributed.all_reduce(gradient)
                gradient = gradient / group.size
            found[f"gradient of {name}"] = gradient
    return found


def largest_difference(found: dict[str, Tensor], expected: dict[str, Tensor]) -> tuple[float, str]:
    """Largest difference relative to the largest value of a tensor, and the tensor.

    Gradients that are zero but for rounding, as of a bias on keys, are compared with the largest of all.
    """
    assert found.keys() == expected.keys()
    sizes = {name: float(tensor.abs().max()) for name, tensor in expected.items()}
    least = 1e-6 * max(sizes.values())
    return max((float((found[name] - expected[name]).abs().max()) / max(sizes[name], least), name) for name in expected)


def errors_of(group: SequenceGroup) -> dict[str, str]:
    """Messages of errors by name."""
    random_keep = torch.stack([torch.arange(32) * 2, torch.arange(32)])
    tube_model, video = hydra()[0], torch.randn(2, 3, 8, 16, 16).double()
    calls: dict[str, Callable[[], object]] = {
        "frames": hydra(6)[1],
        "keep": lambda: tube_model(video, random_keep),
        "image": lambda: hydra(images=True)[0](video[:, :, :1]),
        "state": lambda: tube_model.stream(video[:, :, :4]),
        "heads": cogvideox(num_heads=3)[1],
        "tokens": lambda: hunyuan15()[0](torch.randn(1, 9, 2, 3, 5).double(), torch.ones(1), torch.ones(1, 2, 6)),
        "vit tokens": lambda: VisionTransformer(4, 6, 4, 2, 24, 1, 4)(torch.randn(1, 3, 6, 4, 4)),
    }
    found = {}
    for name, call in calls.items():
        with sequence_parallel(group), pytest.raises(ValueError, match="sequence_parallel=2") as error:
            call()
        found[name] = str(error.value)
    return found


def shards_are_inverse(group: SequenceGroup) -> bool:
    shards, tokens = TokenShards(group, 3, 12, 4), torch.arange(2.0 * 12 * 4 * 5).view(2, 12, 4, 5)
    text = -tokens[:, :2]
    own = torch.cat([text, shards.own(tokens)], dim=1)
    [heads] = shards.to_heads(own, text_len=2)
    expected = torch.cat([text, tokens], dim=1)[:, :, group.rank * 2 : group.rank * 2 + 2]
    same = torch.equal(heads, expected) and torch.equal(shards.to_tokens(heads, 2), own)
    return same and torch.equal(shards.gather(shards.own(tokens)), tokens)


def neighbors_are_right(group: SequenceGroup) -> bool:
    whole, own = torch.arange(1.0, 9).view(1, 8, 1), torch.arange(1.0, 9).view(2, 1, 4, 1)[group.rank]
    padded = nn.functional.pad(whole, (0, 0, 8, 8))
    start = 8 + 4 * group.rank
    return all(
        torch.equal(group.preceding(own, n), padded[:, start - n : start])
        and torch.equal(group.following(own, n), padded[:, start + 4 : start + 4 + n])
        for n in (0, 1, 3, 4, 6)
    )


def saved_elements(call: Call, group: SequenceGroup | None) -> int:
    """Elements of the tensors that are saved for the backward pass, without parameters."""
    found: dict[int, int] = {}

    def save(tensor: Tensor) -> Tensor:
        if not (tensor.is_leaf and tensor.requires_grad):
            found[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes() // tensor.itemsize
        return tensor.detach()  # the tensor itself would refer to its own graph

    kept = []
    with sequence_parallel(group), torch.autograd.graph.saved_tensors_hooks(save, lambda tensor: tensor):
        kept.append(call())
    return sum(found.values())


def process(rank: int, folder: str) -> None:
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT="0")
    torch.set_num_threads(1)
    with gloo_group(folder, rank, SIZE):
        measure(rank, folder)


def measure(rank: int, folder: str) -> None:
    group = SequenceGroup(torch.distributed.group.WORLD)
    found: dict[str, object] = {"active outside": active_group() is not None}
    for name, case in CASES.items():
        torch.manual_seed(0)
        model, call = case()
        expected = results(model, call)
        found[name] = largest_difference(results(model, call, group), expected)
    found |= {"errors": errors_of(group), "shards": shards_are_inverse(group), "neighbors": neighbors_are_right(group)}
    for name, big in (
        ("saved hydra", hydra(32)[1]),
        ("saved hunyuan", hunyuan(masked=False)[1]),
        ("saved vit", vit("rope_3d", masked=False)[1]),
    ):
        found[name] = saved_elements(big, group) / saved_elements(big, None)
    torch.save(found, Path(folder, f"found-{rank}"))


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> list[dict]:
    folder = tmp_path_factory.mktemp("sequence")
    torch.multiprocessing.spawn(process, (str(folder),), nprocs=SIZE)
    return [torch.load(folder / f"found-{rank}", weights_only=False) for rank in range(SIZE)]


@pytest.mark.parametrize("name", CASES)
def test_outputs_and_gradients_equal_those_of_one_process(found: list[dict], name: str):
    for rank in range(SIZE):
        difference, tensor = found[rank][name]
        limit = 1e-6 if name.startswith("hunyuan") else 1e-10  # its mean of the text is float32
        assert difference < limit, f"{tensor} on rank {rank}"


def test_exchanges_are_inverse(found: list[dict]):
    assert all(one["shards"] and one["neighbors"] and not one["active outside"] for one in found)


@pytest.mark.parametrize(
    ("name", "values"),
    [
        ("frames", r"sequence_parallel=2\b.* frames .*=3\b.*sequence_parallel=1\b.*num_frames"),
        ("image", r"sequence_parallel=2\b.* frames .*=1\b"),
        ("keep", r"keep has from 0 to 32 .*sequence_parallel=2\b.*TubeMasking"),
        ("state", r"sequence_parallel=2\b"),
        ("heads", r"sequence_parallel=2\b.*model\.transformer\.num_heads=3\b.*sequence_parallel=1\b"),
        ("tokens", r"sequence_parallel=2\b.*tokens_per_frame=15\b.*image_size.* 3 x 5 tokens"),
        ("vit tokens", r"sequence_parallel=2\b.* tokens=3\b.*num_frames"),
    ],
)
def test_sizes_that_do_not_divide_raise(found: list[dict], name: str, values: str):
    assert all(re.search(values, one["errors"][name]) for one in found), found[0]["errors"][name]


@pytest.mark.parametrize("name", ["hydra", "vit", "hunyuan"])
def test_a_process_saves_half_of_the_activations(found: list[dict], name: str):
    """The rest are the text, the states of the scan that enter a process, and what the exchanges copy."""
    limit = 0.7 if name == "hunyuan" else 0.6  # 5 tokens of text and 12 of video, which only one process has
    assert all(one[f"saved {name}"] < limit for one in found)
