"""Cached readout of the Hydra Video mixer against full evaluation of the frame, and states before frames."""

import pytest
import torch
from torch import Tensor

from blueberry_video.models.hydra_video.chunks import Chunks
from blueberry_video.models.hydra_video.mixer import HydraVideoMixer
from blueberry_video.models.hydra_video.state_space import Layout

H, W, DIM = 4, 4, 8
FRAME, TOKENS = (H, W), H * W
GRANULARITIES = ["token", "row", "frame", 2, (1, 2), (2, 4)]
BLOCKS = [None, (2, 2), (4, 2), (2, 4), (1, 1)]
LEGAL = [
    (granularity, block)
    for granularity in [*GRANULARITIES, (2, 2), (4, 2)]
    for block in BLOCKS
    if granularity not in ((2, 2), (4, 2)) or (block is not None and block[1] <= 2)
]
EXACT = {"rtol": 0, "atol": 1e-10}


def mixer(**changes) -> HydraVideoMixer:
    torch.manual_seed(0)
    options = {"head_dim": 4, "state_dim": 4, "num_groups": 2, "dt_range": (0.05, 0.5), "conv_size": (3, 1, 1)}
    layer = HydraVideoMixer(DIM, **{**options, **changes})
    for parameter in layer.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    return layer.double().eval()


def frames(count: int = 1, batch: int = 2) -> Tensor:
    return torch.randn(batch, count * TOKENS, DIM, dtype=torch.float64)


def past(layer: HydraVideoMixer):
    return layer(frames(2), Layout((2, H, W)), return_state=True)[1]


@pytest.mark.parametrize(("granularity", "block"), LEGAL, ids=str)
def test_updates_equal_full_evaluation_of_the_changed_frame(granularity, block):
    layer, chunks = mixer(block=block), Chunks.of(granularity, FRAME)
    state, old, new, layout = past(layer), frames(), frames(), Layout((1, H, W))
    expected, final = layer(new, layout, state, return_state=True)
    y, cache = layer.cache_frame(old, chunks, state)
    torch.testing.assert_close(y, layer(old, layout, state)[0], **EXACT)
    current = old.clone()
    for index, positions in enumerate(chunks.positions()):
        current[:, positions] = new[:, positions]
        full, _ = layer(current, layout, state)  # new tokens up to this chunk, old tokens to its right
        y = layer.update_chunk(new[:, positions], index, cache)
        torch.testing.assert_close(y, full[:, positions], **EXACT)
    torch.testing.assert_close(y, expected[:, positions], **EXACT)
    torch.testing.assert_close(cache.left.flatten(0, 2), final.scan, **EXACT)


@pytest.mark.parametrize("granularity", GRANULARITIES, ids=str)
@pytest.mark.parametrize("block", BLOCKS, ids=str)
def test_a_larger_convolution_is_exact_if_tokens_do_not_change(granularity, block):
    layer, chunks = mixer(block=block, conv_size=(2, 3, 5)), Chunks.of(granularity, FRAME)
    state, x = past(layer), frames()
    expected, cache = layer.cache_frame(x, chunks, state)
    for index, positions in enumerate(chunks.positions()):
        y = layer.update_chunk(x[:, positions], index, cache)
        torch.testing.assert_close(y, expected[:, positions], **EXACT)


def test_the_cache_reads_the_first_frame_and_leaves_the_state_unchanged():
    layer, x, chunks = mixer(), frames(), Chunks.of("row", FRAME)
    torch.testing.assert_close(layer.cache_frame(x, chunks)[0], layer(x, Layout((1, H, W)))[0], **EXACT)
    state = past(layer)
    before = [part.clone() for part in state]
    _, cache = layer.cache_frame(x, chunks, state)
    layer.update_chunk(x[:, :W], 0, cache)
    assert all(torch.equal(a, b) for a, b in zip(before, state))


def test_without_advancing_an_update_can_be_repeated():
    layer, x, chunks = mixer(), frames(), Chunks.of("row", FRAME)
    _, cache = layer.cache_frame(x, chunks, past(layer))
    layer.update_chunk(frames()[:, :W], 0, cache, advance=False)
    first = layer.update_chunk(x[:, :W], 0, cache, advance=False)
    torch.testing.assert_close(layer.update_chunk(x[:, :W], 0, cache), first, **EXACT)
    assert not torch.allclose(layer.update_chunk(x[:, :W], 0, cache), first)


@pytest.mark.parametrize("block", [None, (2, 2)], ids=str)
@pytest.mark.parametrize("kt", [1, 2, 3])
def test_states_before_frames_continue_the_video(block, kt):
    layer, x, state = mixer(block=block, conv_size=(kt, 3, 3)), frames(3), None
    masked = frames(3).unflatten(1, (3, TOKENS))
    _, before = layer(x, Layout((3, H, W)), return_state="before_frames")
    y, _ = layer(masked.flatten(0, 1), Layout((1, H, W)), before)
    y = y.unflatten(0, (2, 3))
    for frame in range(3):
        torch.testing.assert_close(y[:, frame], layer(masked[:, frame], Layout((1, H, W)), state)[0], **EXACT)
        step = x[:, frame * TOKENS : (frame + 1) * TOKENS]
        _, state = layer(step, Layout((1, H, W)), state, return_state=True)


def test_states_before_frames_have_gradients_and_start_from_the_given_state():
    layer, x = mixer(), frames(3).requires_grad_()
    state = past(layer)
    _, before = layer(x, Layout((3, H, W)), state, return_state="before_frames")
    torch.testing.assert_close(before.scan.unflatten(0, (2, 3))[:, 0], state.scan, **EXACT)
    torch.testing.assert_close(before.conv.unflatten(0, (2, 3))[:, 0], state.conv, **EXACT)
    before.scan.square().sum().backward()
    gradient = x.grad.unflatten(1, (3, TOKENS)).abs().sum((0, 2, 3))
    assert (gradient > 0).tolist() == [True, True, False]  # no state before a frame depends on the last


def test_column_order_raises():
    with pytest.raises(ValueError, match=r"order='w'.*order='h'"):
        mixer(order="w").cache_frame(frames(), Chunks.of("row", FRAME))


@pytest.mark.parametrize(
    ("granularity", "message"),
    [
        ("column", r"granularity='column'.*'row'"),
        (True, r"granularity=True"),
        (3, r"rows=3 must divide 4, use 2\b"),
        ((1, 3), r"columns=3 must divide 4, use 2\b"),
        (0, r"rows=0 must divide 4, use 1\b"),
        ((1, 2, 1), r"granularity=\(1, 2, 1\)"),
    ],
)
def test_unknown_granularities_raise(granularity, message):
    with pytest.raises(ValueError, match=rf"(?s){message}"):
        Chunks.of(granularity, FRAME)


@pytest.mark.parametrize(("granularity", "block"), [((2, 2), None), ((2, 2), (2, 4)), ((4, 2), (4, 4))])
def test_chunks_that_are_no_range_of_a_block_raise(granularity, block):
    with pytest.raises(ValueError, match=rf"granularity.*{granularity[0]} x {granularity[1]}.*scan_blocks=.*4"):
        mixer(block=block).cache_frame(frames(), Chunks.of(granularity, FRAME))
    with pytest.raises(ValueError, match="scan_blocks=3 x 6"):
        Chunks.of(2, (6, 6)).check_block((3, 6))


def test_an_index_out_of_range_raises():
    with pytest.raises(IndexError, match=r"index=4.*3"):
        Chunks.of("row", FRAME).rectangle(4)
