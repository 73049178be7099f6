"""Models built on the meta device: position tables outside the state dict are computed when weights are loaded."""

import copy

import pytest
import torch
from torch import nn

from blueberry_video.models.cogvideox.model import CogVideoX
from blueberry_video.models.dinov2 import DINOv2
from blueberry_video.models.hunyuan_video.model import HunyuanVideo
from blueberry_video.models.hunyuan_video.model_15 import HunyuanVideo15
from blueberry_video.models.hydra_video.model import HydraVideo
from blueberry_video.models.jepa.predictor import Predictor
from blueberry_video.models.masked_autoencoder.model import MaskedAutoencoder
from blueberry_video.models.vit import VisionTransformer
from blueberry_video.nn.rope import RotaryPositions

CLIP = {"image_size": 16, "num_frames": 4, "patch_size": 8, "embed_dim": 48}


def vit(positions: str = "sinusoid") -> VisionTransformer:
    return VisionTransformer(**CLIP, depth=1, num_heads=2, positions=positions)


def predictor(positions: str) -> Predictor:
    return Predictor(48, (2, 2, 2), 24, 1, 2, 1, positions=positions)


def cogvideox() -> CogVideoX:
    return CogVideoX(
        num_heads=2, head_dim=16, depth=1, in_channels=3, out_channels=3, text_dim=8, text_len=8, time_dim=16,
        patch_size=4, num_frames=4, height=8, width=8, positions="sincos", zero_init=False,
    )  # fmt: skip


VIDEO = torch.randn(2, 3, 4, 16, 16, generator=torch.Generator().manual_seed(0))
TOKENS, INDEX = torch.randn(2, 4, 48, generator=torch.Generator().manual_seed(1)), torch.arange(4).expand(2, -1)
LATENTS = (VIDEO[:, :, :, :8, :8], torch.tensor([10.0, 900.0]), torch.ones(2, 8, 8))
OPTIONAL = (torch.cat([VIDEO, VIDEO, VIDEO[:, :1]], dim=1)[..., :8, :8], *LATENTS[1:])
MODELS = {
    "vit_sinusoid": (vit, (VIDEO,)),
    "vit_sincos_3d": (lambda: vit("sincos_3d"), (VIDEO,)),
    "vit_rope_3d": (lambda: vit("rope_3d"), (VIDEO,)),
    "hydra_video": (lambda: HydraVideo(**CLIP, depth=1, head_dim=16, state_dim=8), (VIDEO,)),
    "masked_autoencoder": (lambda: MaskedAutoencoder(vit(), 24, 1, 2), (VIDEO, INDEX, INDEX + 4)),
    "omnimae": (lambda: MaskedAutoencoder(vit(), 24, 1, 2, mask_before_projection=True), (VIDEO, INDEX, INDEX + 4)),
    "predictor_sincos": (lambda: predictor("sincos_3d"), (TOKENS, INDEX, INDEX + 4)),
    "predictor_rope": (lambda: predictor("rope_3d"), (TOKENS, INDEX, INDEX + 4)),
    "dinov2": (lambda: DINOv2(image_size=28, embed_dim=48, depth=1, num_heads=2), (torch.ones(1, 3, 1, 28, 28),)),
    "cogvideox": (cogvideox, LATENTS),
    "hunyuan_video": (
        lambda: HunyuanVideo(3, 3, (1, 4, 4), 2, 16, 1, 1, 1, 2.0, 8, 0, rope_axes=(4, 6, 6), zero_init=False),
        LATENTS,
    ),
    "hunyuan_video_15": (
        lambda: HunyuanVideo15(7, 3, (1, 4, 4), 2, 16, 1, 1, 2.0, 8, 5, 6, rope_axes=(4, 6, 6), zero_init=False),
        OPTIONAL,
    ),
}


@pytest.fixture
def nan_memory(monkeypatch: pytest.MonkeyPatch):
    """Fills uninitialized memory with NaN."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


def loaded(build, state: dict, how: str) -> nn.Module:
    if how == "real_to_empty":
        return load(build().to_empty(device="cpu"), state)
    with torch.device("meta"):
        model = build()
        if how == "to_empty_on_meta":
            return load(model.to_empty(device="cpu"), state)
    if how == "to_empty":
        return load(model.to_empty(device="cpu"), state)
    wrapped = nn.ModuleDict({"model": model})  # as in a task
    wrapped.load_state_dict({f"model.{name}": value.clone() for name, value in state.items()}, assign=True)
    return model.eval()


def load(model: nn.Module, state: dict) -> nn.Module:
    model.load_state_dict(state)
    return model.eval()


@pytest.mark.parametrize("how", ["to_empty", "to_empty_on_meta", "real_to_empty", "assign"])
@pytest.mark.parametrize("name", MODELS)
def test_materialized_model_equals_the_original(name: str, how: str, nan_memory):
    build, inputs = MODELS[name]
    torch.manual_seed(0)
    model = build().eval()
    twin = loaded(build, model.state_dict(), how)
    with torch.no_grad():
        expected, found = model(*inputs), twin(*inputs)
    assert not any(buffer.is_meta for buffer in twin.buffers())
    torch.testing.assert_close(found, expected, rtol=0, atol=0)


def test_tables_follow_the_dtype_of_assigned_weights_and_of_conversions():
    state = vit().bfloat16().state_dict()
    with torch.device("meta"):
        model = vit()
    model.load_state_dict(state, assign=True)
    assert torch.equal(model.positions, vit().bfloat16().positions)
    assert torch.equal(model.double().positions, vit().positions.double())
    rope = RotaryPositions((2, 2, 2), 12)
    assert torch.equal(copy.deepcopy(rope).half().cos, rope.cos.half())


def test_tables_of_a_model_that_stays_on_the_meta_device_stay_there():
    with torch.device("meta"):
        model = vit()
        assert model(VIDEO.to("meta")).is_meta
    assert model.double().positions.is_meta
