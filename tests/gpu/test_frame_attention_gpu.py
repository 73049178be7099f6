"""Spool's attention on a GPU: FlexAttention with block masks, compared with the dense reference."""

import pytest
import torch

from blueberry_video.models.spool.attention import FrameLayout, Heads, frame_attention

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]


@pytest.mark.parametrize(("lookback", "mode"), [(2, "both"), (1, "split"), (4, "causal"), (0, "both")])
@pytest.mark.parametrize("size", [(1, 4, 4), (9, 50, 64), (40, 16, 16)], ids=str)
@pytest.mark.parametrize("ragged", [False, True])
def test_flex_equals_reference_with_gradients(lookback, mode, size, ragged):
    torch.manual_seed(0)
    layout = FrameLayout(*size)
    mask = torch.ones(2, sum(layout.sizes), dtype=torch.bool, device="cuda")
    if ragged:
        valid = torch.rand(2, layout.frames, layout.tokens, device="cuda") < 0.6
        layout = layout._replace(valid=valid)
        mask = torch.nn.functional.pad(valid.flatten(1), (layout.context, layout.context), value=True)
    qkv = [torch.randn(2, 4, sum(layout.sizes), 32, device="cuda", requires_grad=True) for _ in range(3)]
    weights = torch.randn_like(qkv[0]) * mask[:, None, :, None]
    found = []
    for backend in (None, "reference"):
        out = frame_attention(*qkv, layout, Heads(lookback, 3, mode), backend=backend)
        found.append([out * mask[:, None, :, None], *torch.autograd.grad((out * weights).sum(), qkv)])
    for flex, dense in zip(*found, strict=True):
        torch.testing.assert_close(flex, dense, atol=5e-3, rtol=5e-3)  # TF32 products


def test_memory_is_linear_in_frames():
    used = {}
    for frames in (128, 256):
        layout = FrameLayout(frames, 64, 64)
        qkv = [torch.randn(1, 4, sum(layout.sizes), 64, device="cuda", requires_grad=True) for _ in range(3)]
        for _ in range(2):  # the first call compiles
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
            frame_attention(*qkv, layout, Heads(2, 8, "both")).square().mean().backward()
            used[frames] = torch.cuda.max_memory_allocated() - before
    assert used[256] < 2.5 * used[128]
