"""Hydra Video mixer: parity with a dense reference, receptive field, streaming in any partition, errors."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from blueberry_video.models.hydra_video.mixer import CausalConv3d, HydraVideoBlock, HydraVideoMixer
from blueberry_video.models.hydra_video.state_space import Layout, MixerState, decay_rates, step_sizes

T, H, W, DIM = 3, 2, 4, 8
GRID, TOKENS = (T, H, W), T * H * W
FOLDS = [(None, "h"), (None, "w"), ((2, 2), "h"), ((2, 2), "w"), ((1, 1), "h"), ((1, 4), "h")]


def mixer(**changes) -> HydraVideoMixer:
    torch.manual_seed(0)
    options = {"expand": 2, "head_dim": 4, "state_dim": 4, "num_groups": 2, "dt_range": (0.05, 0.5)}
    return noisy(HydraVideoMixer(DIM, **{**options, **changes}))


def noisy(module: torch.nn.Module) -> torch.nn.Module:
    """Module in which no weight is 0 or 1, so that a dropped or misplaced weight changes the output."""
    for parameter in module.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    return module.double().eval()


def tokens(batch: int = 2, count: int = TOKENS) -> Tensor:
    return torch.randn(batch, count, DIM, dtype=torch.float64)


def some(batch: int = 2, count: int = 13) -> Tensor:
    """Indices of kept tokens, different in each sample; no token of the middle frame of the first sample is kept."""
    keep = torch.stack([torch.randperm(TOKENS)[:count] for _ in range(batch)])
    outside = torch.cat([torch.arange(H * W), torch.arange(2 * H * W, TOKENS)])
    keep[0] = outside[torch.randperm(len(outside))[:count]]
    return keep.sort(dim=1).values


# ---- reference -------------------------------------------------------------------------------------------------------


def dense(layer: HydraVideoMixer, x: Tensor, present: Tensor) -> Tensor:
    """Reference of the mixer in loops over tokens: x (L, D) on the whole grid, ``present`` (L,) the kept tokens."""
    inner, shared = layer.num_heads * layer.head_dim, layer.num_groups * layer.state_dim
    z, xbc, dt = (x @ layer.in_proj.weight.T).split([inner, inner + 4 * shared, 2 * layer.num_heads], dim=1)
    volume = F.pad((xbc * present[:, None]).view(T, H, W, -1).permute(3, 0, 1, 2), (1, 1, 1, 1, 2, 0))
    weight, bias = layer.conv.weight, layer.conv.bias
    xbc = F.silu(F.conv3d(volume[None], weight, bias, groups=len(bias))[0].permute(1, 2, 3, 0).flatten(0, 2))
    u, B_f, C_f, B_b, C_b = xbc.split([inner, shared, shared, shared, shared], dim=1)
    dt = step_sizes(dt.view(-1, 2, layer.num_heads), layer.dt_bias) * present[:, None, None]
    a = dt * decay_rates(layer.A_log)
    bh, bw = layer.block or (H, W)

    def position(i: int) -> tuple[int, int, int]:
        return i // (H * W), i // W % H, i % W

    def key(i: int) -> tuple[int, int, int]:
        t, row, column = position(i)
        return (t, row, column) if layer.order == "h" else (t, column, row)

    def block(i: int) -> tuple[int, int]:
        return position(i)[1] // bh, position(i)[2] // bw

    y = torch.zeros(TOKENS, layer.num_heads, layer.head_dim, dtype=x.dtype)
    for h in range(layer.num_heads):
        group = slice(h // (layer.num_heads // layer.num_groups) * layer.state_dim, None)
        part = slice(group.start, group.start + layer.state_dim)
        values = u.view(TOKENS, layer.num_heads, -1)[:, h]
        delta = u @ layer.fc_D.weight[h] + layer.D[h]
        for i in range(TOKENS):
            y[i, h] = delta[i] * values[i]
            for j in range(TOKENS):
                if i == j or block(i) != block(j) or position(j)[0] > position(i)[0]:
                    continue
                same = [k for k in range(TOKENS) if block(k) == block(i)]
                if key(j) < key(i):
                    between = sum(a[k, 0, h] for k in same if key(j) < key(k) <= key(i))
                    weight_ij = (C_f[i, part] @ B_f[j, part]) * math.exp(between) * dt[j, 0, h]
                else:
                    between = sum(a[k, 1, h] for k in same if key(i) <= key(k) < key(j))
                    weight_ij = (C_b[i, part] @ B_b[j, part]) * math.exp(between) * dt[j, 1, h]
                y[i, h] += weight_ij * values[j]
    y = y.flatten(1)
    y = y * torch.rsqrt(y.square().mean(1, keepdim=True) + 1e-5) * layer.norm.weight * F.silu(z)
    return y @ layer.out_proj.weight.T


@torch.no_grad()
@pytest.mark.parametrize("dropped", [False, True])
@pytest.mark.parametrize(("block", "order"), FOLDS)
def test_equals_the_reference(block, order, dropped):
    layer, x = mixer(block=block, order=order), tokens(batch=1)
    keep = some(batch=1) if dropped else None
    present = (
        torch.ones(TOKENS, dtype=torch.bool) if keep is None else torch.zeros(TOKENS).scatter(0, keep[0], 1).bool()
    )
    given = x[:, present]
    expected = dense(layer, x[0], present)[present]
    torch.testing.assert_close(layer(given, Layout(GRID, keep))[0][0], expected, atol=1e-10, rtol=1e-10)


@pytest.mark.parametrize(("block", "order"), FOLDS)
def test_keeping_all_tokens_equals_no_mask(block, order):
    layer, x = mixer(block=block, order=order), tokens()
    everything = Layout(GRID, torch.arange(TOKENS).expand(2, TOKENS))
    torch.testing.assert_close(layer(x, everything)[0], layer(x, Layout(GRID))[0], atol=1e-12, rtol=0)


@pytest.mark.parametrize("block", [None, (2, 2)])
def test_output_has_the_order_of_keep(block):
    layer, keep, shuffle = mixer(block=block, order="w"), some(), torch.randperm(13)
    x = tokens(count=13)
    y = layer(x, Layout(GRID, keep))[0]
    torch.testing.assert_close(layer(x[:, shuffle], Layout(GRID, keep[:, shuffle]))[0], y[:, shuffle])


# ---- receptive field -------------------------------------------------------------------------------------------------


def reach(function, x: Tensor) -> Tensor:
    """Largest derivative (L, L) of a random projection of each output token by each input token of x (1, L, D)."""
    x = x.requires_grad_()
    mixed = (function(x)[0] * torch.randn(DIM, dtype=x.dtype)).sum(1)
    rows = [torch.autograd.grad(value, x, retain_graph=True)[0][0] for value in mixed]
    return torch.stack(rows).abs().amax(dim=2)


@pytest.mark.parametrize("module", ["mixer", "block"])
@pytest.mark.parametrize("order", ["h", "w"])
def test_no_future_leakage_and_bidirectional_within_a_frame(module, order):
    layer = mixer(order=order)
    layer = layer if module == "mixer" else noisy(HydraVideoBlock(layer, DIM, mlp_ratio=2.0))
    jacobian = reach(lambda x: layer(x, Layout(GRID))[0], tokens(1))
    frame = torch.arange(TOKENS) // (H * W)
    later = frame[None, :] > frame[:, None]
    assert (jacobian[later] == 0).all()
    assert jacobian[~later].min() > 1e-7  # the whole past, and both directions of the present


def test_no_future_leakage_among_kept_tokens():
    layer, keep = mixer(), some(batch=1)
    jacobian = reach(lambda x: layer(x, Layout(GRID, keep))[0], tokens(1, 13))
    frame = keep[0] // (H * W)
    later = frame[None, :] > frame[:, None]
    assert (jacobian[later] == 0).all()
    assert jacobian[~later].min() > 1e-7


def test_blocks_are_independent_without_a_spatial_convolution():
    layer = mixer(block=(1, 2), conv_size=(3, 1, 1))
    jacobian = reach(lambda x: layer(x, Layout(GRID))[0], tokens(1))
    t, row, column = torch.arange(T)[:, None, None], torch.arange(H)[:, None], torch.arange(W)
    frame, block = (part.expand(GRID).flatten() for part in (t, 2 * row + column // 2))
    reached = (block[:, None] == block) & (frame[:, None] >= frame)
    assert torch.equal(jacobian != 0, reached)


# ---- streaming -------------------------------------------------------------------------------------------------------


@torch.no_grad()
@pytest.mark.parametrize("conv_size", [(3, 3, 3), (1, 3, 1), (4, 1, 3)])
@pytest.mark.parametrize(("block", "order"), FOLDS)
def test_video_in_parts_equals_the_whole(block, order, conv_size):
    layer = mixer(block=block, order=order, conv_size=conv_size)
    t, frame = 7, H * W
    x = tokens(count=t * frame)
    whole, last = layer(x, Layout((t, H, W)), return_state=True)
    for cuts in ([1] * t, [3, 4], [1, 5, 1]):
        state, parts = None, []
        for part in x.split([cut * frame for cut in cuts], dim=1):
            y, state = layer(part, Layout((part.shape[1] // frame, H, W)), state, return_state=True)
            parts.append(y)
        torch.testing.assert_close(torch.cat(parts, 1), whole, atol=1e-12, rtol=0)
        torch.testing.assert_close(state, last, atol=1e-12, rtol=0)


@torch.no_grad()
@pytest.mark.parametrize("block", [None, (2, 2)])
def test_masked_video_in_parts_equals_the_whole(block):
    layer, frame = mixer(block=block), H * W
    keep = torch.stack([torch.randperm(frame)[:3].sort().values + i * frame for i in range(2 * T)]).view(2, T, 3)
    keep[1] -= T * frame
    x = tokens(count=3 * T)
    whole, last = layer(x, Layout(GRID, keep.flatten(1)), return_state=True)
    first, state = layer(x[:, :3], Layout((1, H, W), keep[:, 0]), return_state=True)
    rest, state = layer(x[:, 3:], Layout((T - 1, H, W), keep[:, 1:].flatten(1) - frame), state, return_state=True)
    torch.testing.assert_close(torch.cat([first, rest], 1), whole, atol=1e-12, rtol=0)
    torch.testing.assert_close(state, last, atol=1e-12, rtol=0)


@torch.no_grad()
def test_state_is_no_view_of_a_larger_tensor():
    layer = mixer()
    state = None
    for t in (1, 1, 9, 2):
        _, state = layer(tokens(count=t * H * W), Layout((t, H, W)), state, return_state=True)
        assert isinstance(state, MixerState)
        assert state.scan.shape == (2, 4, 4, 4)
        assert state.conv.shape == (2, 2, H, W, 16 + 4 * 8)
        for part in state:  # a view would keep its base alive
            assert part.untyped_storage().nbytes() == part.numel() * part.element_size()


def test_gradients_flow_through_the_state():
    layer = mixer()
    first = tokens(count=H * W).requires_grad_()
    _, state = layer(first, Layout((1, H, W)), return_state=True)
    layer(tokens(count=H * W), Layout((1, H, W)), state)[0].sum().backward()
    assert first.grad.abs().amin(dim=1).min() > 0


# ---- weights ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("keep", [None, some()])
@pytest.mark.parametrize("block", [None, (1, 2)])
def test_every_parameter_receives_a_gradient(keep, block):
    layer = noisy(HydraVideoBlock(mixer(block=block), DIM, mlp_ratio=2.0))
    layer(tokens(count=TOKENS if keep is None else 13), Layout(GRID, keep))[0].square().sum().backward()
    for name, parameter in layer.named_parameters():
        assert parameter.grad.abs().max() > 0, name


def test_step_sizes_are_initialized_in_a_separate_range_per_direction():
    layer = HydraVideoMixer(512, head_dim=2, state_dim=2, dt_range=(1e-5, 1e-2))
    forward, backward = step_sizes(torch.zeros(2, 512), layer.dt_bias)
    assert 1e-5 * 0.999 <= forward.min() < 2e-5
    assert 5e-3 < forward.max() <= 1e-2 * 1.001
    assert 1e-3 * 0.999 <= backward.min() < 2e-3
    assert 5e-2 < backward.max() <= 0.1 * 1.001
    torch.testing.assert_close(forward.log().mean().exp().item(), 10**-3.5, rtol=0.3, atol=0)
    assert torch.equal(decay_rates(layer.A_log), -torch.ones(2, 512))
    assert torch.equal(layer.D, torch.ones(512))


def test_without_an_mlp_the_block_is_the_mixer():
    layer = mixer()
    block = HydraVideoBlock(layer, DIM, mlp_ratio=0).double()
    assert {name.split(".")[0] for name, _ in block.named_parameters()} == {"norm1", "mixer"}
    x = tokens()
    torch.testing.assert_close(block(x, Layout(GRID))[0], x + layer(block.norm1(x), Layout(GRID))[0])


@pytest.mark.parametrize("size", [(3, 3, 3), (1, 1, 1), (2, 5, 3)])
def test_causal_conv_equals_conv3d(size):
    conv, x = CausalConv3d(6, size).double(), torch.randn(2, 4, 3, 5, 6, dtype=torch.float64)
    kt, kh, kw = size
    padded = F.pad(x.permute(0, 4, 1, 2, 3), (kw // 2, kw // 2, kh // 2, kh // 2, kt - 1, 0))
    expected = F.conv3d(padded, conv.weight, conv.bias, groups=6).permute(0, 2, 3, 4, 1)
    torch.testing.assert_close(conv(conv.extend(x, None)), expected, atol=1e-12, rtol=0)


# ---- errors ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"order": "t"}, "order='t'.*'h'.*'w'"),
        ({"block": (0, 2)}, r"block=\(0, 2\)"),
        ({"conv_size": (3, 2, 3)}, r"conv_size=\(3, 2, 3\).*\(3, 3, 3\)"),
        ({"conv_size": (0, 3, 3)}, r"conv_size=\(0, 3, 3\).*\(3, 3, 3\)"),
        ({"head_dim": 5}, r"head_dim=5\b.*\b16\b"),
        ({"dt_range": (0.1, 0.01)}, r"dt_min=0\.1\b.*dt_max=0\.01\b"),
    ],
)
def test_bad_arguments_raise(changes, text):
    with pytest.raises(ValueError, match=text):
        mixer(**changes)


def test_bad_inputs_raise():
    layer, x = mixer(), tokens()
    with pytest.raises(ValueError, match=r"x\b.*\b24 tokens.*4 x 2 x 4\b"):
        layer(x, Layout((4, H, W)))
    with pytest.raises(ValueError, match=r"x\b.*\b24 tokens.*\b13\b"):
        layer(x, Layout(GRID, some()))
    with pytest.raises(ValueError, match=r"2 x 3\b.*2 x 4\b"):
        mixer(block=(2, 3))(x, Layout(GRID))
    _, state = layer(x, Layout(GRID), return_state=True)
    with pytest.raises(ValueError, match=r"state.*\(2, 4, 4, 4\).*\(1, 4, 4, 4\)"):
        layer(x[:1], Layout(GRID), state)


def test_convolution_of_one_row_and_column_does_not_depend_on_the_number_of_tokens():
    """Few tokens are multiplied, many convolved: both must round equally, since a stream has fewer than a clip."""
    torch.manual_seed(0)
    conv, frames = CausalConv3d(8, (3, 1, 1)), torch.randn(1, 3, 32, 32, 8)
    whole = conv(conv.extend(frames, None))
    rows = [conv(conv.extend(frames[:, :, row : row + 1], None)) for row in range(32)]
    assert torch.equal(torch.cat(rows, dim=2), whole)
