"""Frame attention with lookback and lookahead heads: parity of every backend with loops over tokens."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from blueberry_video.models.spool.attention import (
    MODES,
    FrameAttention,
    FrameBlock,
    FrameLayout,
    Heads,
    dense_mask,
    frame_attention,
)


def allowed(f_q: int, f_k: int, head: int, last: int, heads: Heads) -> bool:
    """Independent implementation of the attention mask for one pair of frames."""
    is_lookback = head < heads.lookback
    near = 0 <= (f_q - f_k if is_lookback else f_k - f_q) <= heads.reach
    if heads.mode == "causal":
        return near or f_k == 0
    if heads.mode == "both":
        return near or f_q in (0, last) or f_k in (0, last)
    return near or f_q in (0, last) or f_k == (0 if is_lookback else last)


def originally_allowed(q: int, k: int, head: int, num_tokens: int, tokens: int, heads: Heads) -> bool:
    """Mask of the original code for one pair of tokens, with context frames of ``tokens`` tokens as all frames."""
    if head < heads.lookback:
        is_global = num_tokens - tokens - 1  # not - tokens: an off-by-one error, the last patch of the last frame
        return q >= is_global or k >= is_global or k // tokens <= q // tokens <= k // tokens + heads.reach
    return q < tokens or k < tokens or q // tokens < k // tokens <= q // tokens + heads.reach


def brute_force(layout: FrameLayout, heads: Heads, num_heads: int) -> Tensor:
    if heads.mode == "original":
        assert layout.context == layout.tokens
        n = sum(layout.sizes)
        found = [
            [originally_allowed(q, k, h, n, layout.tokens, heads) for k in range(n)]
            for h in range(num_heads)
            for q in range(n)
        ]
        return torch.tensor(found).view(num_heads, n, n)
    frames = [0] * layout.context
    frames += [1 + n // layout.tokens for n in range(layout.frames * layout.tokens)]
    frames += [layout.frames + 1] * layout.context
    return torch.tensor(
        [[[allowed(q, k, h, layout.frames + 1, heads) for k in frames] for q in frames] for h in range(num_heads)]
    )


def tensors(layout: FrameLayout, num_heads: int, batch: int = 2) -> list[Tensor]:
    return [
        torch.randn(batch, num_heads, sum(layout.sizes), 4, dtype=torch.float64, requires_grad=True) for _ in range(3)
    ]


def modes_of(lookback: int, num_heads: int, layout: FrameLayout) -> list[str]:
    """Valid modes; without context tokens, lookahead heads of the original have empty rows."""
    unfit = set() if lookback == num_heads else {"causal"}
    return [mode for mode in MODES if mode not in (unfit if layout.context else unfit | {"original"})]


SIZES = [(1, 1, 1), (1, 4, 4), (4, 2, 0), (2, 3, 3), (5, 2, 2), (9, 1, 1), (7, 3, 2), (40, 2, 2), (3, 70, 2)]
REACHES = (0, 1, 2, 5, 100)


@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize(("lookback", "num_heads"), [(12, 12), (0, 12), (3, 12), (1, 2)])
def test_dense_mask_equals_the_reference(size, lookback, num_heads):
    layout = FrameLayout(*size)
    for reach in REACHES:
        for mode in modes_of(lookback, num_heads, layout):
            heads = Heads(lookback, reach, mode)
            if sum(layout.sizes) <= 30 and (mode != "original" or layout.context == layout.tokens):
                assert torch.equal(dense_mask(layout, heads, num_heads)[0], brute_force(layout, heads, num_heads))
            assert dense_mask(layout, heads, num_heads).any(-1).all(), "an empty row"


@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize(("lookback", "num_heads"), [(2, 2), (0, 2), (1, 4)])
def test_banded_equals_the_reference_with_gradients(size, lookback, num_heads):
    layout = FrameLayout(*size)
    for reach in REACHES:
        for mode in modes_of(lookback, num_heads, layout):
            heads, qkv = Heads(lookback, reach, mode), tensors(layout, num_heads)
            outs = [frame_attention(*qkv, layout, heads, backend=backend) for backend in (None, "reference")]
            torch.testing.assert_close(*outs, rtol=1e-9, atol=1e-9)
            weights = torch.randn_like(outs[0])
            gradients = [torch.autograd.grad((out * weights).sum(), qkv) for out in outs]
            torch.testing.assert_close(*gradients, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("size", [(1, 1, 1), (5, 3, 2), (40, 2, 2)], ids=str)
@pytest.mark.parametrize("lookback", [0, 1, 4])
def test_padding_tokens_are_masked(size, lookback):
    layout = FrameLayout(*size)
    valid = torch.rand(2, layout.frames, layout.tokens) < 0.6
    ragged = layout._replace(valid=valid)
    mask = F.pad(valid.flatten(1), (layout.context, layout.context), value=True)
    for mode in modes_of(lookback, 4, layout):
        heads, qkv = Heads(lookback, 2, mode), tensors(layout, 4)
        banded, dense = (frame_attention(*qkv, ragged, heads, backend) for backend in ("banded", "reference"))
        flat = [out.transpose(1, 2)[mask] for out in (banded, dense)]
        torch.testing.assert_close(*flat, rtol=1e-9, atol=1e-9)
        gradients = torch.autograd.grad(flat[0].square().sum(), qkv)
        for gradient in gradients:
            assert gradient.isfinite().all()
            assert (gradient.transpose(1, 2)[~mask] == 0).all()


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@torch.no_grad()  # on the CPU FlexAttention has no backward pass; tests/gpu/ compares gradients
@pytest.mark.parametrize(("lookback", "mode"), [(1, "both"), (1, "split"), (4, "causal"), (1, "original")])
def test_flex_equals_the_reference(lookback, mode):
    layout, heads = FrameLayout(5, 3, 2), Heads(lookback, 1, mode)
    qkv = [x.float() for x in tensors(layout, 4)]
    ragged = layout._replace(valid=torch.rand(2, 5, 3) < 0.6)
    for given in (layout, ragged) if mode in ("both", "original") else (layout,):
        mask = torch.ones(2, 19, dtype=torch.bool)
        if given.valid is not None:
            mask = F.pad(given.valid.flatten(1), (2, 2), value=True)
        flex, dense = (frame_attention(*qkv, given, heads, backend) for backend in ("flex", "reference"))
        pairs = [out.transpose(1, 2)[mask] for out in (flex, dense)]
        torch.testing.assert_close(*pairs, rtol=1e-5, atol=1e-5)


def test_mask_of_the_original_written_out():
    """Two frames of two tokens, reach 1: rows are queries, columns keys; S start, 1 and 2 frames, E end frame."""
    expected = {
        "lookback": """
            11000111 11000111
            11110111 11110111
            00111111 11111111
            11111111 11111111
        """,  # S S, 1 1, 2 2, E E: the end frame and the last token of frame 2 are keys and queries of everything
        "lookahead": """
            11111111 11111111
            11001100 11001100
            11000011 11000011
            11000000 11000000
        """,  # the start frame is key and query of everything; no token sees its own frame
    }
    rows = [[[digit == "1" for digit in row] for row in text.split()] for text in expected.values()]
    mask = dense_mask(FrameLayout(2, 2, 2), Heads(1, 1, "original"), 2)
    assert torch.equal(mask[0], torch.tensor(rows))


@pytest.mark.parametrize("mode", ["both", "original"])
def test_largest_tensor_grows_linearly_with_the_video(mode: str):
    """Measures the largest tensor of the forward and backward pass; no dense mask of all pairs is built."""
    largest = {}
    for frames in (32, 64, 128):
        layout = FrameLayout(frames, 4, 4)
        qkv = [torch.randn(1, 2, sum(layout.sizes), 8, requires_grad=True) for _ in range(3)]
        sizes: list[int] = []

        class Watch(torch.utils._python_dispatch.TorchDispatchMode):
            def __torch_dispatch__(self, func, types, args=(), kwargs=None, sizes=sizes):
                out = func(*args, **(kwargs or {}))
                sizes.extend(x.numel() for x in torch.utils._pytree.tree_leaves(out) if isinstance(x, Tensor))
                return out

        with Watch():
            frame_attention(*qkv, layout, Heads(1, 4, mode)).sum().backward()
        largest[frames] = max(sizes)
    assert largest[128] <= 2.1 * largest[64] <= 4.5 * largest[32]
    assert largest[128] < (128 * 4) ** 2 / 20


def test_receptive_field_of_one_block():
    frames, reach = 9, 2
    for lookback, mode in ((4, "both"), (0, "both"), (4, "split"), (0, "split"), (4, "causal")):
        block = FrameBlock(FrameAttention(8, 4, lookback, 4 - lookback, reach, mode), 8).double()
        layout = FrameLayout(frames, 2, 2)
        x = torch.randn(1, sum(layout.sizes), 8, dtype=torch.float64, requires_grad=True)
        out, _ = block(x, layout)
        for query in range(1, frames + 1):
            rows = out[:, 2 * query : 2 * query + 2]
            gradient = torch.autograd.grad((rows * torch.randn_like(rows)).sum(), x, retain_graph=True)[0]
            reached = gradient[0].unflatten(0, (-1, 2)).abs().amax(dim=(1, 2)) > 0
            near = range(query - reach, query + 1) if lookback else range(query, query + reach + 1)
            seen = {frame for frame in near if 1 <= frame <= frames}
            seen |= {0} if mode != "split" or lookback else set()
            seen |= {frames + 1} if mode == "both" or (mode == "split" and not lookback) else set()
            assert {int(frame) for frame in reached.nonzero()} == seen


def test_receptive_field_of_two_blocks_spans_the_video():
    layout = FrameLayout(12, 1, 1)
    for mode in ("both", "split"):
        blocks = [FrameBlock(FrameAttention(8, 4, 2, 2, 1, mode), 8).double() for _ in range(2)]
        x = torch.randn(1, 14, 8, dtype=torch.float64, requires_grad=True)
        once, _ = blocks[0](x, layout)
        twice, _ = blocks[1](once, layout)
        first, second = (torch.autograd.grad(y[0, 1].square().sum(), x, retain_graph=True)[0] for y in (once, twice))
        assert (first[0, 3:13] == 0).all()
        assert first[0, :3].abs().amax(dim=1).min() > 0
        assert second[0].abs().amax(dim=1).min() > 1e-9


@torch.no_grad()
@pytest.mark.parametrize("reach", [0, 1, 3, 100])
def test_extend_equals_the_whole_sequence(reach):
    attention, layout = FrameAttention(8, 2, 2, 0, reach, "causal").double(), FrameLayout(10, 3, 3)
    x = torch.randn(2, 36, 8, dtype=torch.float64)
    whole = attention(x, layout)
    parts, past = [], None
    for part in x.split([3, 3, 3, 12, 6, 6, 3], dim=1):  # the start frame, one or several frames, the end frame
        out, past = attention.extend(part, 3, past)
        parts.append(out)
        assert past.recent[0].shape[2] <= 3 * reach
    torch.testing.assert_close(torch.cat(parts, dim=1), whole, rtol=1e-9, atol=1e-9)


def test_gradients_reach_every_parameter():
    block, layout = FrameBlock(FrameAttention(8, 4, 3, 1, 1), 8), FrameLayout(4, 2, 2)
    block(torch.randn(1, 12, 8), layout)[0].square().sum().backward()
    assert all(parameter.grad.abs().max() > 0 for parameter in block.parameters())


def test_compiles_to_one_graph():
    block, layout = FrameBlock(FrameAttention(8, 2, 1, 1, 1), 8), FrameLayout(3, 30, 2)
    x = torch.randn(1, 94, 8)
    expected, _ = block(x, layout)
    compiled, _ = torch.compile(block, fullgraph=True, backend="eager")(x, layout)
    torch.testing.assert_close(compiled, expected)


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ((8, 3, 2, 1, 1), r"num_attention_heads=3\b.*=8\b"),
        (
            (8, 4, 2, 1, 1),
            r"num_lookback_heads=2\b.*num_lookahead_heads=1\b.*num_attention_heads=4\b.*num_lookahead_heads=2\b",
        ),
        ((8, 4, 5, -1, 1), r"num_lookback_heads=5\b.*num_lookahead_heads=-1\b.*num_attention_heads=4\b"),
        ((8, 4, 2, 2, -1), r"local_frame_range=-1\b"),
        ((8, 4, 2, 2, 1, "all"), "context_mode='all'.*'both'.*'split'.*'causal'.*'original'"),
        ((8, 4, 2, 2, 1, "causal"), r"context_mode=causal\b.*num_lookback_heads=4\b.*num_lookahead_heads=0\b"),
        ((8, 4, 2, 0, 1, "causal"), r"context_mode=causal\b.*num_lookback_heads=4\b.*num_lookahead_heads=0\b"),
    ],
)
def test_bad_arguments_raise(arguments, expected):
    with pytest.raises(ValueError, match=expected):
        FrameAttention(*arguments)


def test_wrong_layout_or_backend_raises():
    qkv = [torch.zeros(1, 1, 7, 4)] * 3
    with pytest.raises(ValueError, match=r"q has 7\b.*\[1, 4, 1\]"):
        frame_attention(*qkv, FrameLayout(4, 1, 1), Heads(1, 1, "both"))
    with pytest.raises(ValueError, match=r"backend='fast'.*'banded'.*'flex'.*'reference'"):
        frame_attention(*qkv, FrameLayout(5, 1, 1), Heads(1, 1, "both"), backend="fast")
