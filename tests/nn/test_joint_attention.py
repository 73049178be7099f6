"""Chunk-causal joint attention of text and video: masks and KV cache."""

import pytest
import torch
from torch.nn.attention.flex_attention import create_block_mask

from blueberry_video.nn.joint_attention import KeyValueCache, _mask_mod, attend, block_causal, block_causal_mask

CLOSE = {"atol": 1e-5, "rtol": 1e-5}  # fp32 round-off; the order of summation differs


@pytest.mark.parametrize("text_first", [True, False])
@pytest.mark.parametrize("chunk", [1, 2, 3, 9])
def test_text_attends_to_text_and_video_to_text_and_no_later_chunk(text_first, chunk):
    text_len, num_frames, tokens = 3, 5, 2
    mask = block_causal_mask(text_len, num_frames, tokens, chunk, text_first)
    names = [("video", n // tokens) for n in range(num_frames * tokens)]
    text = [("text", 0)] * text_len
    names = text + names if text_first else names + text
    for (query, at), row in zip(names, mask.tolist()):
        for (key, of), seen in zip(names, row):
            assert seen == (key == "text" or (query == "video" and of // chunk <= at // chunk))


def test_mask_without_text():
    assert block_causal_mask(0, 4, 1, 2).int().tolist() == [[1, 1, 0, 0]] * 2 + [[1, 1, 1, 1]] * 2


def test_masks_with_a_cache_are_the_last_rows_of_the_whole_mask():
    whole = block_causal_mask(3, 6, 2, 2)
    assert torch.equal(block_causal(3, 6, 2, 2), whole)
    assert torch.equal(block_causal(3, 4, 2, 2, first_frame=2), whole[3 + 2 * 2 :])
    assert block_causal(3, 2, 2, 2, first_frame=4) is None  # the last chunk attends to all tokens
    assert whole[3 + 4 * 2 :].all()


def test_attend_is_masked_softmax_attention():
    q, k, v = torch.randn(3, 2, 2, 7, 4)
    mask = block_causal_mask(1, 3, 2, 1)
    for seen in (None, mask, mask & torch.tensor([True, False] + 5 * [True])[None]):
        scores = q @ k.transpose(-1, -2) / 2
        scores = scores if seen is None else scores.masked_fill(~seen, -torch.inf)
        torch.testing.assert_close(attend(q, k, v, seen), scores.softmax(-1) @ v, **CLOSE)


@pytest.mark.filterwarnings("ignore:flex_attention called without")
def test_block_mask_equals_the_dense_mask():
    """FlexAttention runs uncompiled on the CPU, with the mask function that is used on CUDA."""
    q, k, v = torch.randn(3, 1, 2, 11, 16)
    blocks = create_block_mask(_mask_mod(3, 4, 2, 2, True), None, None, 11, 11, device="cpu")
    expected = attend(q, k, v, block_causal_mask(3, 4, 2, 2))
    torch.testing.assert_close(attend(q, k, v, blocks), expected, **CLOSE)


@pytest.mark.parametrize("chunk", [0, -2])
def test_chunk_below_one_raises(chunk):
    with pytest.raises(ValueError, match=rf"chunk={chunk}\b"):
        block_causal_mask(1, 2, 3, chunk)


def test_cache_keeps_the_first_tokens_and_overwrites_the_rest():
    cache, keys, values = KeyValueCache(), torch.randn(2, 3, 10, 4), torch.randn(2, 3, 10, 4)
    cache.update(0, keys[:, :, :6], values[:, :, :6], kept=0)
    cache.update(0, torch.randn(2, 3, 5, 4), torch.randn(2, 3, 5, 4), kept=4)  # an earlier denoising step
    updated = cache.update(0, keys[:, :, 4:], values[:, :, 4:], kept=4)
    torch.testing.assert_close(updated, (keys, values), atol=0, rtol=0)
    assert cache.num_tokens() == 10
    assert cache.num_tokens(layer=1) == 0


def test_misuse_of_the_cache_raises():
    cache, x = KeyValueCache(), torch.zeros(2, 1, 3, 4)
    with pytest.raises(ValueError, match=r"cache.*\b0 tokens.*\b3\b"):
        cache.update(0, x, x, kept=3)
    cache.update(0, x, x, kept=0)
    with pytest.raises(ValueError, match=r"cache.*batch size 2\b.*\b1\b.*KeyValueCache"):
        cache.update(0, x[:1], x[:1], kept=3)
