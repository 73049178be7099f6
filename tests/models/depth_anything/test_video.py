"""VideoDepthAnything: equal to the image model at initialization, streams, causality, gradients and bad input."""

import pickle

import pytest
import torch
from torch import nn

from blueberry_video.models.depth_anything import DepthAnything, VideoDepthAnything
from blueberry_video.models.dinov2 import DINOv2

SIZES = {"taps": (0, 1, 2, 3), "features": 16, "out_channels": (4, 6, 16, 16)}
KINDS = ("attention", "scan", "none")


def encoder() -> DINOv2:
    return DINOv2(32, 1, 8, 12, 4, 2, table_size=4, layer_scale_init=1.0)


def video_model(temporal: str, trained: bool = False, **options) -> VideoDepthAnything:
    """Model with random weights; ``trained``: with temporal modules that change the maps."""
    torch.manual_seed(0)
    scan = {"scan_head_dim": 4, "scan_state_dim": 4}
    model = VideoDepthAnything(
        encoder(), **SIZES, temporal=temporal, norm_groups=4, temporal_heads=2, **scan, **options
    )
    nn.init.constant_(model.head.scratch.output_conv2[2].bias, 0.5)
    nn.init.normal_(model.head.scratch.output_conv2[2].weight, std=0.5)
    for module in model.head.motion_modules if trained else ():
        nn.init.normal_(module.temporal_transformer.proj_out.weight, std=0.5)
    return model.eval()


def streamed(model: VideoDepthAnything, video: torch.Tensor) -> torch.Tensor:
    maps, state = [], None
    for frame in video.unbind(2):
        found, state = model.step(frame, state)
        maps.append(found)
    return torch.stack(maps, 1)


@pytest.mark.parametrize("temporal", KINDS)
@pytest.mark.parametrize("max_depth", [None, 20.0])
def test_at_initialization_the_maps_are_those_of_the_image_model(temporal: str, max_depth: float | None):
    model = video_model(temporal, max_depth=max_depth)
    image = DepthAnything(encoder(), **SIZES, max_depth=max_depth).eval()
    state = {name.replace("head.", "depth_head.", 1): value for name, value in model.state_dict().items()}
    image.load_state_dict({name: value for name, value in state.items() if "motion_modules" not in name})
    video = torch.randn(2, 3, 3, 32, 24)
    found = model(video)
    assert found.shape == (2, 3, 32, 24)
    assert found.std() > 1e-3
    for t in range(3):
        torch.testing.assert_close(found[:, t], image(video[:, :, t]), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("temporal", KINDS)
def test_a_stream_of_one_frame_equals_forward(temporal: str):
    model, video = video_model(temporal, trained=True), torch.randn(2, 3, 1, 32, 24)
    torch.testing.assert_close(streamed(model, video), model(video), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("temporal", KINDS)
def test_streams_exactly_is_true_for_scan_and_none(temporal: str):
    model, video = video_model(temporal, trained=True), torch.randn(2, 3, 6, 32, 24)
    with torch.no_grad():
        difference = (streamed(model, video) - model(video)).abs().max()
    assert model.streams_exactly == (temporal != "attention")
    assert (difference < 1e-5) == model.streams_exactly
    assert model.streams_exactly or difference > 1e-3


@pytest.mark.parametrize("temporal", KINDS)
def test_frames_that_influence_a_map(temporal: str):
    """Attention: all frames; scan: all up to the frame itself; none: the frame only."""
    model = video_model(temporal, trained=True, freeze_encoder=False).double()
    video = torch.randn(1, 3, 4, 32, 24, dtype=torch.float64, requires_grad=True)
    maps = model(video)
    for t in range(4):
        (gradient,) = torch.autograd.grad(maps[:, t].square().sum(), video, retain_graph=True)
        seen = (gradient.abs().amax((0, 1, 3, 4)) > 0).tolist()
        assert seen == [{"attention": True, "scan": s <= t, "none": s == t}[temporal] for s in range(4)]


@pytest.mark.parametrize("temporal", KINDS)
@pytest.mark.parametrize("frozen", [True, False])
def test_gradients_reach_every_trainable_parameter(temporal: str, frozen: bool):
    model = video_model(temporal, trained=True, freeze_encoder=frozen).train()
    assert model.pretrained.training != frozen
    (model(torch.randn(1, 3, 3, 32, 24)) * torch.randn(1, 3, 32, 24)).sum().backward()
    missing = {name for name, p in model.named_parameters() if p.requires_grad and (p.grad is None or not p.grad.any())}
    assert missing == set()
    kept = {name for name, p in model.named_parameters() if not p.requires_grad}
    of_encoder = {f"pretrained.{name}" for name, _ in model.pretrained.named_parameters()}
    unused = {name for name, _ in model.named_parameters() if "refinenet4.resConfUnit1" in name}
    assert kept == (unused | of_encoder if frozen else unused)
    assert len(unused) == 4


def test_at_initialization_the_last_layers_of_the_temporal_modules_receive_gradients():
    for temporal in ("attention", "scan"):
        model = video_model(temporal)
        model(torch.randn(1, 3, 3, 32, 24)).square().sum().backward()
        assert all(module.temporal_transformer.proj_out.weight.grad.any() for module in model.head.motion_modules)


def test_unbounded_metric_depth():
    bounded, free = (video_model("none", max_depth=value) for value in (2.0, float("inf")))
    for model in (bounded, free):
        nn.init.constant_(model.head.scratch.output_conv2[2].bias, 5.0)
    video = torch.randn(1, 3, 1, 32, 24)
    assert bounded(video).max() <= 2
    assert free(video).max() > 2
    assert free.max_depth == float("inf")


@pytest.mark.parametrize("temporal", KINDS)
def test_the_state_has_a_constant_size_and_can_be_pickled(temporal: str):
    model, state, sizes = video_model(temporal, trained=True), None, []
    frames = torch.randn(3, 1, 3, 32, 24)
    with torch.no_grad():
        for frame in frames:
            found, state = model.step(frame, state)
            sizes.append([tuple(each.shape) for each in state])
        assert len(state) == {"attention": 8, "scan": 24, "none": 0}[temporal]
        assert sizes[0] == sizes[1] == sizes[2]
        again = model.step(frame, pickle.loads(pickle.dumps(state)))[0]
    assert torch.equal(again, model.step(frame, state)[0])
    assert (temporal == "none") == torch.equal(again, found)


def test_bad_input_raises():
    with pytest.raises(ValueError, match=r"T=33\b.*\b32\b.*inference/depth"):
        video_model("attention")(torch.zeros(1, 3, 33, 32, 24))
    with torch.no_grad():
        assert video_model("scan")(torch.zeros(1, 3, 33, 32, 24)).shape == (1, 33, 32, 24)
    with pytest.raises(ValueError, match=r"temporal='lstm'"):
        video_model("lstm")
    with pytest.raises(ValueError, match=r"video has shape \(1, 3, 32, 24\)"):
        video_model("scan")(torch.zeros(1, 3, 32, 24))
    with pytest.raises(ValueError, match=r"frame has shape \(1, 3, 1, 32, 24\)"):
        video_model("scan").step(torch.zeros(1, 3, 1, 32, 24))
    with pytest.raises(ValueError, match=r"32 x 24"):
        video_model("scan")(torch.zeros(1, 3, 2, 32, 25))
    with pytest.raises(ValueError, match=r"taps=\[0, 1, 2, 4\]"):
        VideoDepthAnything(encoder(), taps=(0, 1, 2, 4))
    _, state = video_model("scan").step(torch.zeros(1, 3, 32, 24))
    with pytest.raises(ValueError, match=r"\(12, 4, 4, 4\), expected \(16, 4, 4, 4\)"):
        video_model("scan").step(torch.zeros(1, 3, 32, 32), state)
    with pytest.raises(ValueError, match=r"24 tensors, expected 8"):
        video_model("attention").step(torch.zeros(1, 3, 32, 24), state)


@pytest.mark.parametrize("temporal", KINDS)
def test_reduced_precision_streams_and_trains(temporal: str):
    model, video = video_model(temporal, trained=True), torch.randn(1, 3, 5, 32, 24)
    with torch.no_grad():
        expected = streamed(model, video)
        with torch.autocast("cpu", torch.bfloat16):
            found = streamed(model, video)
    assert expected.std() > 0.02
    assert (found - expected).std() < 0.1 * expected.std()
    assert (found - expected).abs().max() < 0.03
    with torch.autocast("cpu", torch.bfloat16):
        loss = model.train()(video).float().square().mean()
    loss.backward()
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.requires_grad)


@pytest.mark.parametrize("temporal", KINDS)
def test_a_model_built_on_the_meta_device_equals_the_original(temporal: str):
    model, video = video_model(temporal, trained=True), torch.randn(1, 3, 3, 32, 24)
    with torch.device("meta"):
        twin = video_model(temporal)
    wrapped = nn.ModuleDict({"model": twin})  # as in a task
    wrapped.load_state_dict({f"model.{name}": value for name, value in model.state_dict().items()}, assign=True)
    assert torch.equal(twin(video), model(video))
