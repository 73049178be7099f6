"""Token counts against published examples and transformers' own functions; suggestions fit, and nothing larger does."""

import ast
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st

from blueberry_video.video.errors import LimitError
from blueberry_video.video.tokens import (
    PRECISIONS,
    TokenCount,
    TokenOptions,
    count_tokens,
    fit,
    memory_estimate,
    recommend_batch_size,
    validate,
)

QWEN = TokenOptions(patch_size=14, merge_size=2, temporal_patch_size=2)
QWEN3 = replace(QWEN, patch_size=16)
GPT = TokenOptions(count="tiles", temporal_patch_size=1)
SMALL = TokenOptions(hidden_size=64, num_layers=3, num_kv_heads=2, head_dim=8, num_parameters=1001, reserved_tokens=10)


@pytest.mark.parametrize(
    ("options", "num_frames", "height", "width", "tokens"),
    [
        (QWEN, 20, 560, 1008, 7200),
        (QWEN, 20, 308, 560, 2200),
        (QWEN, 768, 336, 644, 105984),
        (QWEN, 360, 504, 924, 106920),
        (QWEN, 4, 280, 392, 280),
        (QWEN3, 20, 640, 1152, 7200),
        (QWEN3, 20, 320, 576, 1800),
        (QWEN3, 768, 384, 736, 105984),
        (QWEN3, 360, 576, 1056, 106920),
        (QWEN3, 4, 320, 448, 280),
    ],
)
def test_golden_vectors(options: TokenOptions, num_frames: int, height: int, width: int, tokens: int):
    count = count_tokens(num_frames, height, width, options)
    assert count.total == count.visual == tokens
    assert count.grid_thw == (num_frames // 2, height // options.patch_size, width // options.patch_size)


@pytest.mark.parametrize(
    ("height", "width", "detail", "tokens"),
    [  # the first three are OpenAI's own examples
        (1024, 1024, "high", 765),
        (4096, 2048, "high", 1105),
        (8192, 4096, "low", 85),
        (512, 512, "high", 255),
        (513, 512, "high", 425),
        (100, 100, "high", 255),  # a small frame is not enlarged
        (720, 1280, "high", 85 + 170 * 6),
        (768 * 3, 768 * 4, "high", 765),  # exactly 1536 · 2048, then exactly 768 · 1024: two tiles wide, not three
    ],
)
def test_tiles(height: int, width: int, detail: str, tokens: int):
    assert count_tokens(1, height, width, replace(GPT, tile_detail=detail)).total == tokens
    assert count_tokens(7, width, height, replace(GPT, tile_detail=detail)).total == 7 * tokens


def test_a_constant_a_frame_and_a_separator():
    onevision = TokenOptions(count="per_frame", temporal_patch_size=1, tokens_per_frame=196, tokens_per_video=1)
    assert count_tokens(32, 384, 384, onevision) == TokenCount(grid_thw=None, visual=32 * 196, text=1)


def test_the_last_group_is_filled_up():
    assert count_tokens(1, 28, 28, QWEN).grid_thw == (1, 2, 2)
    assert count_tokens(3, 28, 28, QWEN).total == count_tokens(4, 28, 28, QWEN).total == 2


def test_marks_count_their_digits():
    seconds = replace(QWEN3, mark="seconds", tokens_per_mark=6)
    # <0.2 seconds> and <30.5 seconds>: the middles of the two groups
    assert count_tokens(4, 32, 32, seconds, timestamps=[0.0, 0.5, 30.0, 31.0]).text == (6 + 2) + (6 + 3)
    # a last group of one frame is marked with its own time: <12.0 seconds>
    assert count_tokens(3, 32, 32, seconds, timestamps=[0.0, 0.5, 12.0]).text == (6 + 2) + (6 + 3)
    clock = replace(GPT, mark="clock", tokens_per_mark=3)
    assert count_tokens(2, 48, 48, clock, timestamps=[59.9, 6000.0]).text == (3 + 4) + (3 + 5)  # 00:59, 100:00
    number = TokenOptions(count="per_frame", temporal_patch_size=1, mark="number", tokens_per_mark=5)
    assert count_tokens(101, 448, 448, number).text == 101 * 5 + sum(len(str(i)) for i in range(1, 102))


@given(st.lists(st.floats(0, 86400), min_size=1, max_size=20), st.sampled_from(["seconds", "clock"]), st.integers(1, 3))
@settings(deadline=None, max_examples=50)
def test_marks_of_unknown_times_are_never_too_few(times: list[float], mark: str, size: int):
    options = TokenOptions(count="per_frame", mark=mark, tokens_per_mark=2, temporal_patch_size=size)
    known = count_tokens(len(times), 8, 8, options, timestamps=sorted(times))
    assert known.text <= count_tokens(len(times), 8, 8, options).text


def _function(file: str, name: str):
    """One pure function of a transformers module that needs torchvision to be imported."""
    tree = ast.parse((Path(transformers.__file__).parent / "models" / file).read_text())
    node = next(node for node in tree.body if isinstance(node, ast.FunctionDef) and node.name == name)
    scope = {"math": math}
    exec(compile(ast.Module([node], []), file, "exec"), scope)
    return scope[name]


@given(st.integers(1, 9), st.integers(1, 9), st.integers(1, 9), st.sampled_from([14, 16]), st.integers(1, 3))
@settings(deadline=None, max_examples=30)
def test_grid_of_transformers_qwen_vl(num_frames: int, rows: int, columns: int, patch: int, temporal: int):
    """Its processor cuts real frames; merge_size² of its patches become one placeholder of its prompt."""
    from transformers.models.qwen3_vl.video_processing_qwen3_vl import Qwen3VLVideoProcessor

    height, width = rows * patch * 2, columns * patch * 2
    count = count_tokens(num_frames, height, width, TokenOptions(patch_size=patch, temporal_patch_size=temporal))
    video = torch.zeros(1, num_frames, 3, height, width)
    patches, *grid = Qwen3VLVideoProcessor().patchify(video, patch, 2, temporal)
    assert count.grid_thw == tuple(grid)
    assert count.visual == patches.shape[1] // 4


@given(st.integers(16, 4000), st.integers(16, 4000))
@settings(deadline=None, max_examples=100)
def test_tokens_of_transformers_gemma4(height: int, width: int):
    resize = _function("gemma4/video_processing_gemma4.py", "get_aspect_ratio_preserving_size")
    if max(height, width) / min(height, width) > 20:
        return
    target = resize(height, width, patch_size=16, max_patches=630, pooling_kernel_size=3)
    count = count_tokens(5, *target, TokenOptions(patch_size=16, merge_size=3, temporal_patch_size=1))
    assert count.visual == 5 * (target[0] // 16 * (target[1] // 16) // 9) <= 5 * 70


OPTIONS = st.builds(
    TokenOptions,
    count=st.sampled_from(["patches", "per_frame", "tiles"]),
    patch_size=st.sampled_from([14, 16]),
    merge_size=st.integers(1, 3),
    temporal_patch_size=st.integers(1, 4),
    tokens_per_frame=st.integers(1, 300),
    tokens_per_video=st.integers(0, 5),
    mark=st.sampled_from(["none", "number", "seconds", "clock"]),
    tokens_per_mark=st.integers(0, 9),
    tile_detail=st.sampled_from(["low", "high"]),
    context_length=st.integers(20, 200_000),
    reserved_tokens=st.integers(0, 19),
)


@given(OPTIONS, st.integers(1, 900), st.integers(1, 60), st.integers(1, 60))
@settings(deadline=None, max_examples=300)
def test_suggestions_fit_and_nothing_larger_does(options: TokenOptions, num_frames: int, rows: int, columns: int):
    step = options.size_step if options.count == "patches" else 37
    height, width = rows * step, columns * step
    found = fit(num_frames, height, width, options)
    assert found.tokens == count_tokens(num_frames, height, width, options)
    assert found.budget == options.context_length - options.reserved_tokens

    if found.max_frames:
        assert count_tokens(found.max_frames, height, width, options).total <= found.budget
    more = found.max_frames + options.temporal_patch_size
    assert count_tokens(more, height, width, options).total > found.budget
    assert found.fits == (num_frames <= found.max_frames)

    if found.fits:
        assert found.max_size == (height, width)
    elif found.max_size is None:
        smallest = options.size_step
        assert count_tokens(num_frames, smallest, smallest, options).total > found.budget
    else:
        assert found.max_size[0] <= height
        assert found.max_size[1] <= width
        assert count_tokens(num_frames, *found.max_size, options).total <= found.budget
        if options.count == "patches":
            assert _next_size(found.max_size, rows, columns, step, num_frames, options) > found.budget


def _next_size(
    size: tuple[int, int], rows: int, columns: int, step: int, num_frames: int, options: TokenOptions
) -> int:
    """Tokens of the next larger size of the shape, by trying every scale upward."""
    for k in range(1, rows * columns + 1):
        larger = max(1, k // columns) * step, max(1, k // rows) * step
        if larger[0] >= size[0] and larger[1] >= size[1] and larger != size:
            return count_tokens(num_frames, *larger, options).total
    raise AssertionError("there is no larger size, so that the given one should have fitted")


def test_a_suggested_size_keeps_the_shape():
    options = replace(QWEN, context_length=2000, reserved_tokens=0)
    found = fit(20, 560, 1008, options)
    assert found.max_size == (280, 532)  # 10 · 19 = 190 tokens a group of 200; 11 · 19 = 209 are too many
    assert found.max_frames == 4


def test_tiles_shrink_to_whole_tiles():
    found = fit(4, 1080, 1920, replace(GPT, context_length=1700, reserved_tokens=0))  # two tiles a frame: 425 tokens
    assert found.max_size == (512, 911)  # 911 is 512 · 1365 / 768, rounded down
    assert count_tokens(4, *found.max_size, GPT).total == 1700


def test_a_video_that_fits_is_counted():
    assert validate(20, 560, 1008, replace(QWEN, context_length=7200, reserved_tokens=0)).total == 7200
    assert validate(10**6, 560, 1008, QWEN).total == 360 * 10**6
    assert fit(10**6, 560, 1008, QWEN).max_frames is None


def test_a_video_that_is_too_long_is_refused_with_what_fits():
    options = replace(QWEN, context_length=3000, reserved_tokens=1000)
    with pytest.raises(LimitError, match=r"560x1008 .* 7200 tokens.*2000.*max_frames=4.*280x532"):
        validate(20, 560, 1008, options)
    with pytest.raises(LimitError, match=r"100.*2 frames"):
        validate(3, 8, 8, TokenOptions(count="per_frame", tokens_per_frame=60, context_length=100, reserved_tokens=0))
    with pytest.raises(LimitError, match="context_length=100"):
        validate(3, 8, 8, TokenOptions(count="per_frame", tokens_per_frame=101, context_length=100, reserved_tokens=0))


def test_memory_is_the_documented_formula():
    # 3 frames fill 4; 2 groups of 2 · 3 tokens; 12 + 10 tokens in the cache
    bf16 = memory_estimate(3, 56, 84, SMALL)["bf16"]
    assert bf16.pixels == 4 * 3 * 56 * 84 * 2
    assert bf16.embeddings == 12 * 64 * 2
    assert bf16.kv_cache == 2 * 3 * 2 * 8 * 22 * 2
    assert bf16.weights == 2002
    assert bf16.total == bf16.pixels + bf16.embeddings + bf16.kv_cache + bf16.weights


def test_precisions():
    estimates = memory_estimate(4, 56, 84, SMALL)
    assert list(estimates) == list(PRECISIONS) == ["fp32", "bf16", "int8", "int4"]
    assert [estimate.weights for estimate in estimates.values()] == [4004, 2002, 1001, 501]
    assert estimates["fp32"].kv_cache == 2 * estimates["bf16"].kv_cache
    assert estimates["int4"].kv_cache == estimates["int8"].kv_cache == estimates["bf16"].kv_cache


def test_unpublished_sizes_stay_unknown():
    estimate = memory_estimate(4, 720, 1280, GPT)["bf16"]
    assert (estimate.embeddings, estimate.kv_cache, estimate.weights, estimate.total) == (None, None, None, None)
    assert estimate.pixels == 4 * 3 * 720 * 1280 * 2
    with pytest.raises(ValueError, match=r"num_parameters.*overrides"):
        recommend_batch_size(10**9, 4, 720, 1280, GPT)


@given(st.integers(0, 10**7), st.sampled_from(list(PRECISIONS)), st.sampled_from([0.0, 0.25]))
@settings(deadline=None, max_examples=50)
def test_the_recommended_batch_fits_and_one_more_does_not(memory: int, precision: str, headroom: float):
    batch = recommend_batch_size(memory, 4, 56, 84, SMALL, precision, headroom)
    estimate = memory_estimate(4, 56, 84, SMALL)[precision]
    sample = estimate.total - estimate.weights
    free = memory * (1 - headroom)
    assert batch == 0 or estimate.weights + batch * sample <= free
    assert estimate.weights + (batch + 1) * sample > free


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"count": "pixels"}, "count='pixels'.*patches, per_frame, tiles"),
        ({"mark": "frame"}, "mark='frame'"),
        ({"tile_detail": "auto"}, "tile_detail='auto'"),
        ({"patch_size": 0}, "patch_size=0 .*at least 1"),
        ({"num_layers": 0}, "num_layers=0 .*at least 1"),
        ({"tokens_per_mark": -1}, "tokens_per_mark=-1 .*at least 0"),
        ({"context_length": 1024}, "reserved_tokens=1024 .*context_length=1024"),
    ],
)
def test_bad_options_are_refused(change: dict, message: str):
    with pytest.raises(ValueError, match=message):
        TokenOptions(**change)


def test_bad_arguments_are_refused():
    with pytest.raises(ValueError, match="at least 1"):
        count_tokens(0, 28, 28, QWEN)
    with pytest.raises(ValueError, match=r"561x1008 .*=14 .*=2 = 28.*560x1008.*size_factor=28"):
        count_tokens(2, 561, 1008, QWEN)
    with pytest.raises(ValueError, match=r"3 timestamps .*num_frames=2"):
        count_tokens(2, 32, 32, replace(QWEN3, mark="seconds"), timestamps=[0.0, 1.0, 2.0])
    with pytest.raises(ValueError, match="precision='fp8'"):
        recommend_batch_size(1, 2, 28, 28, SMALL, precision="fp8")
    with pytest.raises(ValueError, match="headroom=1"):
        recommend_batch_size(1, 2, 28, 28, SMALL, headroom=1)
