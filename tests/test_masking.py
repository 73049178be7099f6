"""Token masks: counts, complement, order and random generators."""

import math
import re

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from blueberry_video.masking import (
    ByModality,
    CausalMasking,
    DualMasking,
    FrameMasking,
    Masks,
    MultiBlockMasking,
    RandomMasking,
    TubeMasking,
    evaluation_masks,
)

grids = st.tuples(st.integers(1, 5), st.integers(1, 6), st.integers(1, 6))
even_grids = st.tuples(
    st.integers(1, 9), st.integers(1, 4).map(lambda n: 2 * n), st.integers(1, 4).map(lambda n: 2 * n)
)
ratios = st.floats(0.05, 0.95)
seeds = st.integers(0, 2**31)
SIMPLE = [TubeMasking, RandomMasking]
EVERY = [
    TubeMasking(0.5),
    RandomMasking(0.5),
    DualMasking(TubeMasking(0.5)),
    DualMasking(RandomMasking(0.5), 0.25),
    ByModality(RandomMasking(0.25), DualMasking(TubeMasking(0.75), 0.75)),
    MultiBlockMasking(8, 0.15),
    MultiBlockMasking(2, 0.4, temporal_scale=0.5, truncate="random"),
]


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def same(a: Masks, b: Masks) -> bool:
    return all(x is y if x is None or y is None else torch.equal(x, y) for x, y in zip(a, b, strict=True))


def hidden_of(kind, ratio: float, grid: tuple[int, int, int]) -> tuple[int, int]:
    """Returns the expected number of hidden tokens, and the number of positions they are drawn from."""
    t, h, w = grid
    positions = h * w if kind is TubeMasking else t * h * w
    return int(ratio * positions) * (t if kind is TubeMasking else 1), positions


def assert_ascending_tokens(index: torch.Tensor, tokens: int) -> None:
    assert index.dtype == torch.long
    assert (index.diff(dim=1) > 0).all()
    assert index.min() >= 0
    assert index.max() < tokens


@pytest.mark.parametrize("kind", SIMPLE)
@settings(max_examples=60, deadline=None)
@given(grid=grids, ratio=ratios, batch=st.integers(1, 4), seed=seeds)
def test_masks_split_the_tokens_into_two_ascending_parts(kind, grid, ratio, batch, seed):
    expected, positions = hidden_of(kind, ratio, grid)
    assume(0 < int(ratio * positions) < positions)
    masks = kind(ratio)(batch, grid, generator(seed))
    tokens = grid[0] * grid[1] * grid[2]
    assert masks.target.shape == (batch, expected)
    assert masks.keep.shape == (batch, tokens - expected)
    assert masks.scored is None
    for index in (masks.keep, masks.target):
        assert_ascending_tokens(index, tokens)
    for b in range(batch):
        assert sorted(masks.keep[b].tolist() + masks.target[b].tolist()) == list(range(tokens))


def test_videomae_tube_keeps_160_of_1568_tokens():
    masks = TubeMasking(0.9)(3, (8, 14, 14))
    assert masks.keep.shape == (3, 160)
    assert masks.target.shape == (3, 1408)


# grids of ViT-B/16 and ViT-g/14: visible, decoded, scored
@pytest.mark.parametrize(("grid", "counts"), [((8, 14, 14), (160, 784, 704)), ((8, 16, 16), (208, 1024, 920))])
def test_videomae_v2_counts_are_exact_in_every_sample(grid, counts):
    masks = DualMasking()(16, grid, generator())
    assert (masks.keep.shape[1], masks.target.shape[1]) == counts[:2]
    assert masks.scored.sum(dim=1).tolist() == [counts[2]] * 16


def test_omnimae_masks_keep_49_tokens_of_an_image_and_157_of_a_clip():
    masking = ByModality(image=RandomMasking(0.75), clip=RandomMasking(0.9))
    assert [part.shape[1] for part in masking(2, (1, 14, 14))[:2]] == [49, 147]
    assert [part.shape[1] for part in masking(2, (8, 14, 14))[:2]] == [157, 1411]


def decoded_in_loops(grid: tuple[int, int, int], p: int, not_decoded: int = 2) -> list[int]:
    """Running cell token by token: a queue of four that shifts by one per frame."""
    queue = [1] * not_decoded + [0] * (4 - not_decoded)
    decoded = []
    for f in range(grid[0]):
        for i in range(grid[1]):
            for j in range(grid[2]):
                if queue[(2 * (i % 2) + (j % 2) + p + f + 1) % 4] == 0:
                    decoded.append((f * grid[1] + i) * grid[2] + j)
    return decoded


@pytest.mark.parametrize(("ratio", "not_decoded"), [(0.25, 1), (0.5, 2), (0.75, 3)])
@settings(max_examples=40, deadline=None)
@given(grid=even_grids, seed=seeds, hidden=st.floats(0.8, 0.95))
def test_dual_masking_equals_the_running_cell_in_loops(ratio, not_decoded, grid, seed, hidden):
    tokens = grid[0] * grid[1] * grid[2]
    assume(tokens - int(hidden * tokens) < (1 - ratio) * tokens)  # else all decoded tokens might be visible
    batch = 6
    masks = DualMasking(RandomMasking(hidden), ratio)(batch, grid, generator(seed))
    encoder_mask = RandomMasking(hidden)(batch, grid, generator(seed))
    assert torch.equal(masks.keep, encoder_mask.keep)  # the encoder's mask is drawn first, unchanged
    assert masks.target.shape == (batch, tokens * (4 - not_decoded) // 4)
    assert masks.scored.shape == masks.target.shape
    assert_ascending_tokens(masks.target, tokens)
    patterns = [decoded_in_loops(grid, p, not_decoded) for p in range(4)]
    for b in range(batch):
        visible, target = set(masks.keep[b].tolist()), masks.target[b].tolist()
        assert target in patterns
        assert masks.scored[b].tolist() == [token not in visible for token in target]


def test_all_four_starts_of_the_running_cell_are_equally_likely():
    grid = (1, 2, 2)
    targets = DualMasking(TubeMasking(0.75))(4000, grid, generator()).target.tolist()
    shares = [targets.count(decoded_in_loops(grid, p)) / 4000 for p in range(4)]
    assert sum(shares) == 1
    assert shares == pytest.approx([0.25] * 4, abs=0.03)  # more than 4 standard deviations


@pytest.mark.parametrize("ratio", [0.25, 0.5, 0.75])
def test_four_frames_of_the_running_cell_decode_each_position_equally_often(ratio):
    target = DualMasking(decoder_ratio=ratio)(1, (4, 4, 6), generator()).target[0]
    assert (target % 24).bincount(minlength=24).tolist() == [round(4 * (1 - ratio))] * 24


def test_scored_counts_vary_by_sample_if_frames_are_no_multiple_of_four():
    scored = DualMasking(TubeMasking(0.5))(32, (2, 2, 4), generator()).scored.sum(dim=1)
    assert len(set(scored.tolist())) > 1


def test_a_tube_hides_the_same_positions_in_every_frame_and_different_ones_per_sample():
    keep, target, _ = TubeMasking(0.75)(4, (5, 6, 7), generator())
    for tokens in (keep, target):
        positions = tokens.view(4, 5, -1) - 42 * torch.arange(5)[:, None]
        assert torch.equal(positions, positions[:, :1].expand_as(positions))
    assert len(torch.unique(keep, dim=0)) == 4


def test_random_masks_differ_between_frames():
    keep = RandomMasking(0.5)(1, (4, 6, 6), generator()).keep
    frames = [frozenset((keep[0][keep[0] // 36 == t] % 36).tolist()) for t in range(4)]
    assert len(set(frames)) == 4


@pytest.mark.parametrize("kind", SIMPLE)
def test_every_position_is_hidden_equally_often(kind):
    target = kind(0.25)(4000, (1, 2, 4), generator()).target
    share = target.flatten().bincount(minlength=8) / 4000
    assert (share - 0.25).abs().max() < 0.03  # more than 4 standard deviations


@settings(max_examples=30, deadline=None)
@given(grid=grids, seed=seeds, batch=st.integers(1, 3))
def test_by_modality_selects_by_the_number_of_frames(grid, seed, batch):
    assume(grid[1] * grid[2] >= 4)
    image, clip = TubeMasking(0.25), RandomMasking(0.75)
    masks = ByModality(image, clip)(batch, grid, generator(seed))
    assert same(masks, (image if grid[0] == 1 else clip)(batch, grid, generator(seed)))


@pytest.mark.parametrize("masking", EVERY)
@settings(max_examples=15, deadline=None)
@given(frames=st.sampled_from([1, 2, 4]), seed=seeds)
def test_masks_depend_only_on_the_generator_and_do_not_change_the_global_one(masking, frames, seed):
    grid = (frames, 6, 8)
    torch.manual_seed(1)
    before = torch.get_rng_state()
    first = masking(2, grid, generator(seed))
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(2)
    assert same(masking(2, grid, generator(seed)), first)
    assert not torch.equal(masking(2, grid, generator(seed + 1)).keep, first.keep)


@pytest.mark.parametrize("masking", EVERY)
def test_without_a_generator_masks_depend_on_the_global_seed(masking):
    torch.manual_seed(3)
    first, other = masking(8, (2, 4, 4)), masking(8, (2, 4, 4))
    torch.manual_seed(3)
    assert same(masking(8, (2, 4, 4)), first)
    assert not same(other, first)


@pytest.mark.parametrize("masking", EVERY)
def test_masks_move_to_a_device_with_scored(masking):
    masks = masking(2, (2, 4, 4))
    moved = masks.to(torch.device("meta"))
    assert [None if x is None else (x.device.type, x.shape, x.dtype) for x in moved] == [
        None if x is None else ("meta", x.shape, x.dtype) for x in masks
    ]
    assert same(masks.to(torch.device("cpu")), masks)


@pytest.mark.parametrize("kind", SIMPLE)
@pytest.mark.parametrize("ratio", [0.0, 1.0, -0.1, 1.5])
def test_ratio_out_of_range_raises(kind, ratio):
    with pytest.raises(ValueError, match=rf"masking ratio={ratio} .*\(0, 1\)"):
        kind(ratio)


@pytest.mark.parametrize(
    ("ratio", "nearest"), [(0.0, 0.25), (1.0, 0.75), (-2.0, 0.25), (1.5, 0.75), (0.3, 0.25), (0.6, 0.5), (0.7, 0.75)]
)
def test_invalid_decoder_ratio_raises_with_the_nearest_valid_one(ratio, nearest):
    with pytest.raises(ValueError, match=rf"decoder_ratio={ratio} .*{nearest}\.$"):
        DualMasking(decoder_ratio=ratio)


@pytest.mark.parametrize(("kind", "positions"), [(TubeMasking, 4), (RandomMasking, 8)])
def test_a_grid_too_coarse_for_the_ratio_raises(kind, positions):
    for masking in (kind(0.1), DualMasking(kind(0.1)), ByModality(RandomMasking(0.5), kind(0.1))):
        with pytest.raises(ValueError, match=rf"masking ratio=0\.1 .*\b0 of {positions}\b"):
            masking(1, (2, 2, 2))


@pytest.mark.parametrize(
    ("grid", "even"), [((4, 7, 8), "8 x 8"), ((4, 8, 5), "8 x 6"), ((4, 1, 1), "2 x 2"), ((1, 7, 7), "8 x 8")]
)
def test_dual_masking_raises_for_odd_grids_with_the_nearest_even_one(grid, even):
    t, h, w = grid
    with pytest.raises(ValueError, match=rf"{t} x {h} x {w}\b.*\b{even}\b.*image_size"):
        DualMasking(TubeMasking(0.5))(2, grid)


def test_masks_without_scored_tokens_raise():
    grid, everything = (4, 2, 2), torch.arange(16).expand(4, -1)
    with pytest.raises(ValueError, match=r"decoder_ratio=0\.5 .*\b8\b.*4 x 2 x 2"):
        DualMasking(lambda *_: Masks(everything, everything[:, :0]))(4, grid)
    one_pattern = torch.tensor([decoded_in_loops(grid, 0)] * 16)
    scored = DualMasking(lambda *_: Masks(one_pattern, one_pattern))(16, grid, generator()).scored
    assert not scored.any(dim=1).all()  # a sample without scored tokens is valid if a different one has some
    assert scored.any()


SHORT, LONG = (8, 0.15), (2, 0.7)  # number of blocks, share of the frame


def block_sizes(spatial_scale: float, h: int, w: int, steps: int = 20000) -> dict[tuple[int, int], float]:
    """Returns (rows, columns) -> probability of V-JEPA's blocks, over evenly spaced aspect ratios."""
    sizes: dict[tuple[int, int], float] = {}
    area = int(h * w * spatial_scale)
    for step in range(steps):
        ratio = 0.75 + 0.75 * (step + 0.5) / steps
        size = (min(round(math.sqrt(area * ratio)), h), min(round(math.sqrt(area / ratio)), w))
        sizes[size] = sizes.get(size, 0) + 1 / steps
    return sizes


def expected_union(num_blocks: int, spatial_scale: float, h: int, w: int) -> float:
    """Returns the expected share of a frame under the union of the blocks: the mean probability of each position.

    Draws that cover everything are repeated; these are two full-length blocks at opposite ends of the frame.
    """
    expected = 0.0
    for (rows, columns), likely in block_sizes(spatial_scale, h, w).items():
        union, starts = 0.0, (h - rows + 1, w - columns + 1)
        for i in range(h):
            for j in range(w):
                row = sum(start <= i < start + rows for start in range(starts[0])) / starts[0]
                column = sum(start <= j < start + columns for start in range(starts[1])) / starts[1]
                union += (1 - (1 - row * column) ** num_blocks) / (h * w)
        full = 2 / max(starts) ** 2 if num_blocks == 2 and min(starts) == 1 else 0.0
        expected += likely * (union - full) / (1 - full)
    return expected


@pytest.mark.parametrize(("blocks", "published"), [(SHORT, 0.627), (LONG, 0.815)])
def test_v_jepa_blocks_hide_the_published_share_of_the_clip(blocks, published):
    masking, g = MultiBlockMasking(*blocks), generator()
    shares = [masking.draw(16, (1, 14, 14), g).float().mean().item() for _ in range(1000)]
    measured = sum(shares) / len(shares)
    assert measured == pytest.approx(published, abs=0.005)
    assert measured == pytest.approx(expected_union(*blocks, 14, 14), abs=0.003)  # 3 standard deviations


block_maskings = st.builds(
    MultiBlockMasking,
    st.integers(1, 8),
    st.floats(0.02, 0.6),
    st.floats(0.1, 1.0),
    st.tuples(st.floats(0.3, 1.0), st.floats(1.0, 3.0)),
    st.sampled_from(["prefix", "random"]),
)
block_grids = st.tuples(st.integers(1, 5), st.integers(3, 8), st.integers(3, 8))


def masks_or_none(masking: MultiBlockMasking, batch: int, grid: tuple[int, int, int], seed: int) -> Masks | None:
    """Returns the masks, or ``None`` if the blocks cover everything in all draws."""
    try:
        return masking(batch, grid, generator(seed))
    except ValueError as error:
        assert re.search(r"num_blocks=\d.*spatial_scale=\d", str(error))  # noqa: PT017
        return None


@settings(max_examples=120, deadline=None)
@given(masking=block_maskings, grid=block_grids, batch=st.integers(1, 5), seed=seeds)
def test_context_is_the_complement_of_the_blocks_and_both_are_truncated(masking, grid, batch, seed):
    masks = masks_or_none(masking, batch, grid, seed)
    assume(masks is not None)
    hidden, tokens = masking.draw(batch, grid, generator(seed)), math.prod(grid)
    counts = hidden.sum(dim=1)
    assert masks.target.shape == (batch, counts.min())
    assert masks.keep.shape == (batch, tokens - counts.max())
    assert masks.keep.shape[1] > 0
    assert masks.target.shape[1] > 0
    assert masks.scored is None
    for index, chosen in ((masks.keep, ~hidden), (masks.target, hidden)):
        assert_ascending_tokens(index, tokens)
        for b in range(batch):
            candidates, kept = chosen[b].nonzero().flatten().tolist(), index[b].tolist()
            assert set(kept) <= set(candidates)
            if masking.truncate == "prefix":
                assert kept == candidates[: len(kept)]
    again = masking(batch, grid, generator(seed))
    assert same(again, masks)


@settings(max_examples=60, deadline=None)
@given(masking=block_maskings, grid=block_grids, seed=seeds)
def test_blocks_of_a_batch_have_one_size_given_by_the_formula(masking, grid, seed):
    assume(masks_or_none(masking, 1, grid, seed) is not None)
    size = masking.block_size(grid, generator(seed))
    assert masking.block_size(grid, generator(seed)) == size
    (t, h, w), (frames, rows, columns) = grid, size
    assert frames == max(1, int(masking.temporal_scale * t))
    area, (low, high) = int(h * w * masking.spatial_scale), masking.aspect_ratio
    assert min(h, round(math.sqrt(area * low))) <= rows <= max(1, round(math.sqrt(area * high)))
    assert min(w, round(math.sqrt(area / high))) <= columns <= max(1, round(math.sqrt(area / low)))
    one = MultiBlockMasking(1, masking.spatial_scale, masking.temporal_scale, masking.aspect_ratio)
    for hidden in one.draw(6, grid, generator(seed)).view(-1, t, h, w):
        assert hidden.sum() == math.prod(size)  # a box of this size:
        assert [int(hidden.flatten(1).any(dim=1).sum()), int(hidden.any(dim=0).any(dim=1).sum())] == [frames, rows]
        assert int(hidden.any(dim=0).any(dim=0).sum()) == columns


def test_block_size_is_drawn_per_batch_and_positions_per_sample():
    masking, g = MultiBlockMasking(1, 0.15), generator()
    seen = [masking.block_size((8, 14, 14), g) for _ in range(300)]
    assert {size[1:] for size in seen} == set(block_sizes(0.15, 14, 14))
    assert {size[0] for size in seen} == {8}
    assert len(torch.unique(masking.draw(16, (8, 14, 14), g), dim=0)) > 8


def test_all_block_starts_are_equally_likely_in_space_and_time():
    hidden = MultiBlockMasking(1, 0.25, temporal_scale=0.5, aspect_ratio=(1, 1)).draw(4000, (4, 4, 4), generator())
    starts = hidden.float().argmax(dim=1).bincount(minlength=64).view(4, 4, 4)  # blocks of 2 x 2 x 2
    assert starts[3:].sum() == starts[:, 3:].sum() == starts[:, :, 3:].sum() == 0
    assert (starts[:3, :3, :3] / 4000 - 1 / 27).abs().max() < 0.015  # 5 standard deviations


def test_prefix_truncation_drops_the_last_frames_and_random_truncation_does_not():
    grid, last = (8, 14, 14), {}
    for truncate in ("prefix", "random"):
        target = MultiBlockMasking(*SHORT, truncate=truncate)(32, grid, generator()).target
        last[truncate] = (target // 196).flatten().bincount(minlength=8)
    assert last["prefix"][7] < 0.6 * last["prefix"][0]
    assert last["random"][7] == pytest.approx(last["random"][0].item(), rel=0.1)


def test_samples_with_all_tokens_covered_are_drawn_again():
    masking = MultiBlockMasking(2, 0.7)  # 3 x 4 or 4 x 3 of 4 x 4 positions: two cover all in half of the draws
    for seed in range(20):
        assert not masking.draw(32, (2, 4, 4), generator(seed)).all(dim=1).any()


@pytest.mark.parametrize("masking", [MultiBlockMasking(1, 1.0, aspect_ratio=(1, 1)), MultiBlockMasking(400, 0.5)])
def test_blocks_without_context_raise(masking):
    with pytest.raises(ValueError, match=rf"num_blocks={masking.num_blocks}\b.*2 x 4 x 4\b"):
        masking(2, (2, 4, 4), generator())


@pytest.mark.parametrize(
    ("changes", "pattern"),
    [
        ({"num_blocks": 0}, r"num_blocks=0\b"),
        ({"spatial_scale": 0.0}, r"spatial_scale=0\.0\b"),
        ({"spatial_scale": 1.5}, r"spatial_scale=1\.5\b"),
        ({"temporal_scale": -1.0}, r"temporal_scale=-1\.0\b"),
        ({"aspect_ratio": (1.5, 0.75)}, r"aspect_ratio=\[1\.5, 0\.75\]"),
        ({"aspect_ratio": (0.0, 1.0)}, r"aspect_ratio=\[0\.0, 1\.0\]"),
        ({"truncate": "suffix"}, r"truncate='suffix'"),
    ],
)
def test_block_arguments_out_of_range_raise(changes, pattern):
    with pytest.raises(ValueError, match=pattern):
        MultiBlockMasking(**changes)


@pytest.mark.parametrize("masking", [TubeMasking(0.5), DualMasking(TubeMasking(0.75)), MultiBlockMasking(2, 0.4)])
def test_evaluation_masks_depend_on_the_seed_of_the_clip_only(masking):
    before = torch.get_rng_state()
    whole = evaluation_masks(masking, [7, 2**31 + 5, 40], (2, 4, 4))
    assert torch.equal(torch.get_rng_state(), before)
    for row, seed in enumerate((7, 2**31 + 5, 40)):
        alone = evaluation_masks(masking, [seed], (2, 4, 4))
        for part, other in zip(whole, alone, strict=True):
            assert (part is None and other is None) or torch.equal(part[row : row + 1], other)
    assert not torch.equal(whole.keep[0], whole.keep[1])
    assert not torch.equal(whole.keep, evaluation_masks(masking, [7, 2**31 + 5, 40], (2, 4, 4), seed=1).keep)


def test_v_jepa_2_options_of_block_masks():
    """Rules of V-JEPA 2: ``max_keep`` truncates the context; a full complement is taken after truncation, of the
    context or of the targets; an inverse mask swaps the two."""
    grid, tokens = (4, 6, 6), 144
    plain = MultiBlockMasking(2, 0.5)(5, grid, generator(3))
    assert plain.keep.shape[1] + plain.target.shape[1] < tokens  # truncation left some tokens in neither
    few = MultiBlockMasking(2, 0.5, max_keep=7)(5, grid, generator(3))
    assert torch.equal(few.keep, plain.keep[:, :7])
    assert torch.equal(few.target, plain.target)
    for complement, kept, filled in (("target", "keep", "target"), ("context", "target", "keep")):
        masks = MultiBlockMasking(2, 0.5, complement=complement)(5, grid, generator(3))
        assert torch.equal(getattr(masks, kept), getattr(plain, kept))
        for row, other in zip(getattr(masks, kept).tolist(), getattr(masks, filled).tolist(), strict=True):
            assert other == sorted(set(range(tokens)) - set(row))
    swapped = MultiBlockMasking(2, 0.5, inverse=True)(5, grid, generator(3))
    assert torch.equal(swapped.keep, plain.target)
    assert torch.equal(swapped.target, plain.keep)


def test_frames_after_max_temporal_keep_are_hidden():
    hidden = MultiBlockMasking(1, 0.2, max_temporal_keep=0.6).draw(8, (4, 6, 6), generator()).view(8, 4, 36)
    assert hidden[:, 2:].all()
    assert torch.equal(hidden[:, 0].sum(dim=1), hidden[:, 1].sum(dim=1))
    assert not hidden[:, :2].all()


@pytest.mark.parametrize("changes", [{"complement": "all"}, {"max_keep": 0}, {"max_temporal_keep": 0.0}])
def test_invalid_options_of_block_masks_raise(changes):
    [(key, value)] = changes.items()
    with pytest.raises(ValueError, match=rf"{key}={value!r}"):
        MultiBlockMasking(**changes)


def test_frame_masks_hide_whole_frames_and_causal_masks_the_last():
    grid = (8, 3, 3)
    frames = FrameMasking(0.75)(40, grid, generator())
    visible = torch.zeros(40, 72, dtype=torch.bool).scatter_(1, frames.keep, True).view(40, 8, 9)
    assert torch.equal(visible.all(dim=2), visible.any(dim=2))
    assert (visible.any(dim=2).sum(dim=1) == 2).all()
    assert (visible.any(dim=2).float().mean(dim=0) > 0).all()  # every frame is visible in some sample
    causal = CausalMasking(0.8)(2, grid, generator())  # 57 of 72 tokens: the first hidden frame is visible in part
    assert causal.keep.tolist() == [list(range(15))] * 2
    assert causal.target.tolist() == [list(range(15, 72))] * 2
    for masks in (frames, causal):
        assert_ascending_tokens(masks.keep, 72)
        assert masks.keep.shape[1] + masks.target.shape[1] == 72
    with pytest.raises(ValueError, match=r"ratio=0\.01\b"):
        CausalMasking(0.01)(1, grid)


@pytest.mark.parametrize("ratio", [0.25, 0.5, 0.6, 0.7, 0.75, 0.8, 0.9, 0.95])
@pytest.mark.parametrize("grid", [(1, 14, 14), (8, 14, 14), (8, 16, 16), (4, 6, 6), (16, 14, 14)])
def test_omnimae_hides_as_many_tokens_as_the_original(ratio, grid):
    """Rules of omnivore's mask generators: ``high`` = ratio * t * h * w tokens. Random masks hide int(high) of them,
    causal masks the last int(high), tubes int(high / t) positions of every frame, and frame masks floor(t * high /
    (t * h * w)) frames."""
    t, h, w = grid
    high = ratio * t * h * w
    assert RandomMasking(ratio)(2, grid, generator()).target.shape[1] == int(high)
    assert TubeMasking(ratio)(2, grid, generator()).target.shape[1] == t * int(high / t)
    causal = CausalMasking(ratio)(2, grid, generator())
    assert causal.target.tolist() == [list(range(t * h * w))[t * h * w - int(high) :]] * 2
    frames = math.floor(t * (high * 1.0 / (t * h * w)))
    if frames:
        assert FrameMasking(ratio)(2, grid, generator()).target.shape[1] == frames * h * w
    else:
        with pytest.raises(ValueError, match=f"ratio={ratio}"):
            FrameMasking(ratio)(2, grid, generator())
