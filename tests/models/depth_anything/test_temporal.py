"""Temporal modules: published values against an independent form, streams, causality, and bad sizes."""

import math
import pickle

import pytest
import torch
from torch import Tensor, nn

from blueberry_video.models.depth_anything import VideoDepthAnything
from blueberry_video.models.depth_anything.temporal import TemporalAttention, TemporalModule, TemporalScan
from blueberry_video.models.dinov2 import DINOv2

C, HEADS = 16, 2


def module(kind: str, seed: int = 0) -> TemporalModule:
    """Module with random parameters, also of the last layer."""
    torch.manual_seed(seed)
    mixers = [TemporalAttention(C, HEADS) if kind == "attention" else TemporalScan(C, 4, 4) for _ in range(2)]
    made = TemporalModule(C, mixers, norm_groups=4)
    nn.init.normal_(made.temporal_transformer.proj_out.weight, std=0.3)
    if kind == "attention":
        for parameter in made.parameters():
            nn.init.normal_(parameter, std=0.3)
    return made.double()


def streamed(made: TemporalModule, x: Tensor, frames: int) -> Tensor:
    """Applies ``step`` to every frame of maps (B T, C, h, w)."""
    state, out = None, []
    for frame in x.unflatten(0, (-1, frames)).unbind(1):
        y, state = made.step(frame, state)
        out.append(y)
    return torch.stack(out, 1).flatten(0, 1)


# ---- published attention, pixel by pixel -----------------------------------------------------------------------------


def table(dim: int) -> Tensor:
    pe = torch.zeros(32, dim, dtype=torch.float64)
    for position in range(32):
        for i in range(0, dim, 2):
            angle = position * math.exp(-math.log(10000.0) * i / dim)
            pe[position, i], pe[position, i + 1] = math.sin(angle), math.cos(angle)
    return pe


def published_attention(p: dict[str, Tensor], query: Tensor, context: Tensor) -> Tensor:
    """Queries at the last positions of the context (m, C), at positions 0 … m - 1."""
    context = context + table(C)[: len(context)]
    out = []
    q, k, v = (context @ p[f"to_{name}.weight"].T for name in "qkv")
    for head in range(HEADS):
        part = slice(head * C // HEADS, (head + 1) * C // HEADS)
        logits = q[-len(query) :, part] @ k[:, part].T / math.sqrt(C // HEADS)
        out.append(logits.softmax(-1) @ v[:, part])
    return torch.cat(out, -1) @ p["to_out.0.weight"].T + p["to_out.0.bias"]


def layer_norm(x: Tensor, p: dict[str, Tensor], name: str) -> Tensor:
    return nn.functional.layer_norm(x, (C,), p[f"{name}.weight"], p[f"{name}.bias"], 1e-5)


def geglu(x: Tensor, p: dict[str, Tensor]) -> Tensor:
    value, gate = (x @ p["ff.net.0.proj.weight"].T + p["ff.net.0.proj.bias"]).chunk(2, -1)
    return (value * nn.functional.gelu(gate)) @ p["ff.net.2.weight"].T + p["ff.net.2.bias"]


def inside(p: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): value for name, value in p.items() if name.startswith(prefix)}


def published(made: TemporalModule, x: Tensor, frames: int, stream: bool) -> Tensor:
    """Output of the published module for one video, x (T, C, h, w): at once, or with the published lists of caches."""
    p = inside(dict(made.state_dict()), "temporal_transformer.")
    block = inside(p, "transformer_blocks.0.")
    normed = nn.functional.group_norm(x, 4, p["norm.weight"], p["norm.bias"], 1e-6)
    out = x.clone()
    for row in range(x.shape[2]):
        for column in range(x.shape[3]):
            h = normed[:, :, row, column] @ p["proj_in.weight"].T + p["proj_in.bias"]
            if stream:
                h = published_stream(h, block)
            else:
                for i in (0, 1):
                    states = layer_norm(h, block, f"norms.{i}")
                    h = h + published_attention(inside(block, f"attention_blocks.{i}."), states, states)
                h = h + geglu(layer_norm(h, block, "ff_norm"), block)
            out[:, :, row, column] += h @ p["proj_out.weight"].T + p["proj_out.bias"]
    return out


def published_stream(frames: Tensor, block: dict[str, Tensor]) -> Tensor:
    """Policy of ``video_depth_stream.py``: 32 copies of the cache of frame 0; the first two and the last 29 are read;
    the second is deleted once frame 11 has been added."""
    caches: list[list[Tensor]] = []
    out = []
    for index, frame in enumerate(frames):
        read = caches[:2] + caches[-29:]
        assert len(read) in (0, 31)
        h, own = frame[None], []
        for i in (0, 1):
            states = layer_norm(h, block, f"norms.{i}")
            own.append(states)
            context = torch.cat([cache[i] for cache in read] + [states])
            h = h + published_attention(inside(block, f"attention_blocks.{i}."), states, context)
        h = h + geglu(layer_norm(h, block, "ff_norm"), block)
        caches += [own] * (1 if index else 32)
        if index + 32 > 42:
            del caches[1]
        out.append(h)
    return torch.cat(out)


@pytest.mark.parametrize("frames", [1, 7, 32])
def test_attention_equals_the_published_module(frames: int):
    made, x = module("attention"), torch.randn(frames, C, 2, 3, dtype=torch.float64)
    expected = published(made, x, frames, stream=False)
    assert (expected - x).abs().max() > 0.1
    torch.testing.assert_close(made(x, frames), expected, rtol=1e-6, atol=1e-6)


def test_attention_streams_as_published():
    frames = 47  # frame 1 leaves the cache at frame 43
    made, x = module("attention"), torch.randn(frames, C, 1, 2, dtype=torch.float64)
    expected, found = published(made, x, frames, stream=True), streamed(made, x, frames)
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(found[:1], made(x[:1], 1), rtol=1e-9, atol=1e-9)
    assert (found[:20] - made(x[:20], 20)).abs().max() > 1e-3  # a stream is not the window at once


def test_names_are_those_of_the_published_checkpoint():
    prefix = "temporal_transformer.transformer_blocks.0."
    attention = [f"attention_blocks.{i}.{name}" for i in (0, 1) for name in ("to_q", "to_k", "to_v", "to_out.0")]
    expected = {f"{prefix}{name}.weight" for name in attention}
    expected |= {f"{prefix}attention_blocks.{i}.to_out.0.bias" for i in (0, 1)}
    affine = [f"{prefix}{name}" for name in ("norms.0", "norms.1", "ff.net.0.proj", "ff.net.2", "ff_norm")]
    affine += [f"temporal_transformer.{name}" for name in ("norm", "proj_in", "proj_out")]
    expected |= {f"{name}.{kind}" for name in affine for kind in ("weight", "bias")}
    assert set(module("attention").state_dict()) == expected


# ---- scan ------------------------------------------------------------------------------------------------------------


def test_scan_streamed_equals_the_scan_at_once():
    made, frames = module("scan"), 70  # more than a chunk
    x = torch.randn(2 * frames, C, 2, 3, dtype=torch.float64)
    torch.testing.assert_close(streamed(made, x, frames), made(x, frames), rtol=1e-9, atol=1e-9)


def test_scan_is_causal_and_reads_all_past_frames():
    made, frames = module("scan"), 6
    x = torch.randn(frames, C, 1, 1, dtype=torch.float64, requires_grad=True)
    out = made(x, frames)
    for t in range(frames):
        (gradient,) = torch.autograd.grad(out[t].square().sum(), x, retain_graph=True)
        size = gradient.abs().amax((1, 2, 3))
        assert (size[t + 1 :] == 0).all()
        assert (size[: t + 1] > 1e-6).all()


def test_scan_does_not_change_with_time_in_a_still_video():
    made = module("scan")
    x = torch.randn(1, C, 2, 2, dtype=torch.float64).expand(50, -1, -1, -1)
    out = made(x, 50)
    torch.testing.assert_close(out, out[:1].expand_as(out), rtol=1e-9, atol=1e-9)
    moving = made(torch.randn(50, C, 2, 2, dtype=torch.float64), 50)
    assert (moving - moving[:1]).abs().max() > 0.1


def averages(scan: TemporalScan, inputs: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Weighted averages of the values (N, T, H, P) from the definition, and dt."""
    u, b, c, dt = scan._scanned(inputs)
    frames = u.shape[1]
    rows = []
    for t in range(frames):
        decay = torch.stack([(scan._decay() * dt[:, s + 1 : t + 1].sum(1)).exp() for s in range(t + 1)], 1)
        weights = decay * dt[:, : t + 1]  # (N, t + 1, H)
        values = (c[:, t : t + 1] * b[:, : t + 1]).sum(-1)[..., None] * u[:, : t + 1]
        rows.append((weights[..., None] * values).sum(1) / weights.sum(1)[..., None])
    return torch.stack(rows, 1), dt


def test_scan_is_a_gated_average_of_the_past_by_weights_that_decay():
    torch.manual_seed(0)
    scan = TemporalScan(C, 4, 4).double()
    with torch.no_grad():
        for parameter in scan.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    x = torch.randn(2, 7, C, dtype=torch.float64)
    gate, inputs = scan.in_proj(x).split([C, sum(scan.sizes)], -1)
    padded = torch.cat([inputs[:, :1].expand(-1, scan.conv_size - 1, -1), inputs], 1)
    mean, _ = averages(scan, padded)
    y = mean + scan.D[:, None] * scan._scanned(padded)[0]
    expected = scan.out_proj(scan.norm(y.flatten(-2)) * torch.nn.functional.silu(gate))
    torch.testing.assert_close(scan(x), expected, rtol=1e-9, atol=1e-9)


def test_scan_starts_with_heads_that_smooth_and_heads_that_follow():
    """Heads average about 1 / dt frames, from 1 to 32; the slowest is nearly the mean of all frames from the start."""
    torch.manual_seed(0)
    scan = TemporalScan(64, 16, 16).double()
    inputs = torch.zeros(4, 302, sum(scan.sizes), dtype=torch.float64)  # B, C and steps from the biases alone
    inputs[..., :64] = torch.randn(4, 302, 64, dtype=torch.float64)
    mean, dt = averages(scan, inputs)
    expected = torch.tensor([1, 32 ** (1 / 3), 32 ** (2 / 3), 32]).double()
    torch.testing.assert_close(1 / dt[0, 0], expected, rtol=1e-5, atol=0)
    deviation = mean[:, 60:].square().mean((0, 1, 3)).sqrt()
    decay = (-1 / expected).exp()
    torch.testing.assert_close(deviation, ((1 - decay) / (1 + decay)).sqrt(), rtol=0.2, atol=0)  # of white noise
    torch.testing.assert_close(mean[0, 3, 3], inputs[0, 2:6, 48:64].mean(0), rtol=0, atol=0.1)


def test_states_have_a_constant_size_and_can_be_pickled():
    for kind, expected in (("attention", [(6, 42, C)] * 2), ("scan", [(6, 4, 4, 4), (6, 4, 1, 1), (6, 2, 28)] * 2)):
        made, state, x = module(kind), None, torch.randn(3, 1, C, 2, 3, dtype=torch.float64)
        for frame in x:
            _, state = made.step(frame, state)
            assert [tuple(each.shape) for each in state] == expected
            assert all(each.untyped_storage().nbytes() == each.nbytes for each in state)  # no view of a larger tensor
        again, _ = made.step(frame, pickle.loads(pickle.dumps(state)))
        assert torch.equal(again, made.step(frame, state)[0])


@pytest.mark.parametrize("kind", ["attention", "scan"])
def test_module_is_the_identity_at_initialization(kind: str):
    mixers = [TemporalAttention(C, HEADS) if kind == "attention" else TemporalScan(C, 4, 4) for _ in range(2)]
    made, x = TemporalModule(C, mixers, 4), torch.randn(6, C, 2, 3)
    assert torch.equal(made(x, 3), x)
    assert torch.equal(made.step(x, None)[0], x)


def test_bad_sizes_raise():
    with pytest.raises(ValueError, match=r"norm_groups=3\b.*\b16 channels"):
        TemporalModule(C, [TemporalScan(C)], 3)
    with pytest.raises(ValueError, match=r"temporal_heads=3\b.*\b16 channels"):
        TemporalAttention(C, 3)
    with pytest.raises(ValueError, match=r"scan_head_dim=5\b.*\b16 channels"):
        TemporalScan(C, 5)
    for kind in ("attention", "scan"):
        made = module(kind)
        _, state = made.step(torch.randn(1, C, 2, 3, dtype=torch.float64), None)
        with pytest.raises(ValueError, match=r"\(6, \d+.*expected \(9, "):
            made.step(torch.randn(1, C, 3, 3, dtype=torch.float64), state)


@pytest.mark.parametrize("temporal", ["attention", "scan"])
def test_only_the_temporal_modules_can_be_trained(temporal: str):
    sizes = {"taps": (0, 1, 2, 3), "features": 8, "out_channels": (8, 8, 8, 8), "norm_groups": 4}
    sizes |= {"temporal_heads": 2, "scan_head_dim": 4}
    encoder = DINOv2(image_size=16, num_frames=1, patch_size=8, embed_dim=16, depth=4, num_heads=2)
    model = VideoDepthAnything(encoder, temporal=temporal, **sizes).requires_grad_(False)
    model.head.motion_modules.requires_grad_(True)
    model(torch.randn(1, 3, 3, 16, 16)).sum().backward()  # crashed for channels-last inputs without gradients
    zero_initialized = [module.temporal_transformer.proj_out.weight.grad for module in model.head.motion_modules]
    assert all(each is not None and each.abs().sum() > 0 for each in zero_initialized)
