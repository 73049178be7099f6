"""Boundaries of datasets and batch samplers: least and largest values, unequal parts, ranks, open files."""

import itertools
import math
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from blueberry_video.data import clip_cache, latents
from blueberry_video.data.batches import (
    EvaluationBatches,
    MixedEvaluationBatches,
    MixedTrainBatches,
    TrainBatches,
    WeightedTrainBatches,
    apportion,
)
from blueberry_video.data.buckets import Buckets, VideoBuckets, nearest_shape, num_tokens
from blueberry_video.data.clip_cache import CachedClips
from blueberry_video.data.datamodule import DataModule
from blueberry_video.data.image_folder import ImageFolder
from blueberry_video.data.latents import LatentClips, LatentShards
from blueberry_video.data.mixture import Mixture
from blueberry_video.data.moving_shapes import MovingShapes
from blueberry_video.data.single_frames import SingleFrames
from blueberry_video.data.sprites import Sprites
from blueberry_video.data.video_folder import VideoFolder
from blueberry_video.data.world import Simulator, World
from blueberry_video.data.write import FolderWriter, write_video


def epoch_of(batches: TrainBatches, epoch: int = 0) -> list[list[int]]:
    batches.set_epoch(epoch)
    return [[index for _, index in batch] for batch in batches]


# ---- batch samplers --------------------------------------------------------------------------------------------------


def test_a_dataset_of_exactly_one_global_batch():
    found = [epoch_of(TrainBatches(6, 3, seed=0, rank=rank, world_size=2)) for rank in range(2)]
    assert [len(batches) for batches in found] == [1, 1]
    assert sorted(found[0][0] + found[1][0]) == list(range(6))
    with pytest.raises(ValueError, match=r"\b5 clips\b.*\b6\b"):
        TrainBatches(5, 3, seed=0, world_size=2)
    assert epoch_of(TrainBatches(1, 3, seed=0, drop_last=False)) == [[0]]
    with pytest.raises(ValueError, match=r"\b0 clips\b"):
        TrainBatches(0, 3, seed=0, drop_last=False)


def test_every_batch_names_its_epoch_and_only_the_resumed_epoch_is_cut():
    batches = TrainBatches(12, 4, seed=5)
    assert batches.running_epoch is None
    batches.resume_at = (3, 1)
    for epoch, length in ((2, 3), (3, 2), (4, 3)):
        batches.set_epoch(epoch)
        found = list(batches)
        assert batches.running_epoch == epoch
        assert len(found) == length
        assert {number for batch in found for number, _ in batch} == {epoch}
    batches.resume_at = (3, 3)
    assert epoch_of(batches, 3) == []


def test_the_last_batch_repeats_its_first_clips_for_the_other_ranks():
    """7 clips in global batches of 6: the last one has a single clip, which all three ranks show."""
    found = [epoch_of(TrainBatches(7, 2, seed=0, rank=rank, world_size=3, drop_last=False)) for rank in range(3)]
    assert [[len(batch) for batch in rank] for rank in found] == [[2, 1]] * 3
    assert len({rank[1][0] for rank in found}) == 1
    assert {i for rank in found for batch in rank for i in batch} == set(range(7))


@pytest.mark.parametrize("drop_last", [True, False])
def test_a_part_of_exactly_one_global_batch(drop_last: bool):
    batches = MixedTrainBatches({"a": 6, "b": 8}, {"a": 3, "b": 2}, 0, 0, 2, drop_last)
    assert len(batches) == 3
    assert batches.counts == [1, 2]


def test_parts_are_offset_by_the_sizes_of_the_parts_before():
    sizes = {"a": 5, "b": 3, "c": 4}
    batches = MixedTrainBatches(sizes, {"a": 5, "b": 1, "c": 2}, seed=2)
    found = epoch_of(batches)
    assert sorted(sorted(batch) for batch in found if len(batch) == 5) == [[0, 1, 2, 3, 4]]
    assert sorted(batch for batch in found if len(batch) == 1) == [[5], [6], [7]]
    assert sorted(i for batch in found if len(batch) == 2 for i in batch) == [8, 9, 10, 11]
    evaluation = list(MixedEvaluationBatches(sizes, {"a": 4, "b": 3, "c": 1}))
    assert evaluation == [[0, 1, 2], [5, 6, 7], [8], [3, 4], [9], [10], [11]]
    assert len(MixedEvaluationBatches(sizes, {"a": 4, "b": 3, "c": 1})) == 7


def test_everything_that_determines_the_batches_is_in_the_order():
    sizes, shares = {"a": 40, "b": 20}, {"a": 0.25, "b": 0.75}
    plain = TrainBatches(60, 4, 3, world_size=2).order
    assert plain == {"clips": 60, "global_batch": 8, "seed": 3}
    mixed = MixedTrainBatches(sizes, {"a": 2, "b": 4}, 3, 1, 2, False).order
    expected = {"clips": 60, "seed": 3, "part_sizes": sizes, "batch_sizes": {"a": 2, "b": 4}}
    assert mixed == {**expected, "world_size": 2, "drop_last": False}
    weighted = WeightedTrainBatches(sizes, shares, 4, 3, 1, 2, True)
    own = {"part_sizes": sizes, "shares": shares, "drop_last": True}
    assert weighted.order == {"clips": 60, "global_batch": 8, "seed": 3, **own}
    assert weighted.clips_per_batch == 8


def test_clips_per_batch_of_unequal_parts_is_weighted_by_their_batches():
    weighted = WeightedTrainBatches({"a": 10, "b": 3}, {"a": 0.5, "b": 0.5}, 4, 0, drop_last=False)
    assert weighted.counts == [2, 2]  # one pass has 3 + 1
    assert weighted.clips_per_batch == pytest.approx((10 / 3 + 3) / 2)


def test_passes_over_a_small_part_differ_from_each_other_and_from_other_parts():
    """Both parts have 6 clips in batches of 3, and are passed over twice."""
    batches = WeightedTrainBatches({"a": 6, "b": 6}, {"a": 0.5, "b": 0.5}, 3, 7)
    batches.counts = [4, 4]
    first, second = (
        [i % 6 for batch in epoch_of(batches) if (batch[0] >= 6) == part for i in batch] for part in (0, 1)
    )
    passes = [tuple(part[k : k + 6]) for part in (first, second) for k in (0, 6)]
    assert all(sorted(one) == list(range(6)) for one in passes)
    assert len(set(passes)) == 4


@pytest.mark.parametrize(
    ("total", "shares", "counts"),
    [(3, [0.2, 0.5, 0.3], [1, 1, 1]), (7, [0.2, 0.5, 0.3], [1, 4, 2]), (1, [0.4, 0.6], [1, 1])],
)
def test_apportion_of_few_batches(total: int, shares: list[float], counts: list[int]):
    assert apportion(total, shares) == counts


def test_evaluation_sets_of_one_clip_per_rank():
    assert [list(EvaluationBatches(3, 8, rank, 3)) for rank in range(3)] == [[[0]], [[1]], [[2]]]
    assert len(EvaluationBatches(16, 4, world_size=2)) == 2
    assert len(EvaluationBatches(17, 4, world_size=2)) == 3


@pytest.mark.parametrize("kind", ["plain", "mixture", "buckets"])
def test_rank_seed_and_sizes_of_the_data_module_reach_the_samplers(kind: str):
    parts = {"a": range(24), "b": range(12)}
    dataset = {
        "plain": range(36),
        "mixture": Mixture(parts, {"a": 1, "b": 1}),
        "buckets": Buckets(parts, dict.fromkeys("ab", (1, 2, 3)), {"a": 3, "b": 6}, 12),
    }[kind]
    orders = {}
    for seed, rank in itertools.product((0, 4), (0, 1)):
        data = DataModule(dataset, dataset, 4, seed=seed, val_batch_size=3, test=dataset, drop_last=False)
        data.trainer = SimpleNamespace(global_rank=rank, world_size=2)
        train = data.train_dataloader().batch_sampler
        assert (train.seed, train.rank, train.world_size, train.drop_last) == (seed, rank, 2, False)
        orders[seed, rank] = epoch_of(train)
        for loader in (data.val_dataloader(), data.test_dataloader()):
            shown = list(loader.batch_sampler)
            assert max(map(len, shown)) <= {"plain": 3, "mixture": 3, "buckets": 4}[kind]
            orders.setdefault(("val", rank), shown)
    assert orders[0, 0] != orders[4, 0]
    for whole in (orders[0, 0] + orders[0, 1], orders["val", 0] + orders["val", 1]):
        assert set(itertools.chain.from_iterable(whole)) == set(range(36)) or kind == "mixture"
    assert not set(map(tuple, orders["val", 0])) & set(map(tuple, orders["val", 1]))


# ---- buckets ---------------------------------------------------------------------------------------------------------


def test_a_budget_of_exactly_one_clip_and_of_almost_two():
    parts = {"a": range(4), "b": range(5)}
    found = Buckets(parts, dict.fromkeys("ab", (1, 2, 3)), {"a": 18, "b": 7}, 18)
    assert found.batch_sizes == {"a": 1, "b": 2}
    assert Buckets(parts, dict.fromkeys("ab", (1, 2, 3)), {"a": 18, "b": 7}, 35).batch_sizes == {"a": 1, "b": 5}
    with pytest.raises(ValueError, match=r"token_budget=17\b.*\b18\b.*bucket a\b"):
        Buckets(parts, dict.fromkeys("ab", (1, 2, 3)), {"a": 18, "b": 7}, 17)


def test_a_video_of_exactly_the_size_of_a_bucket_fits():
    shapes = [(5, 32, 48)]
    assert nearest_shape(5, 32, 48, shapes) == (5, 32, 48)
    for smaller in ((4, 32, 48), (5, 31, 48), (5, 32, 47)):
        assert nearest_shape(*smaller, shapes) is None
    wide, narrow = (1, 20, 40), (1, 40, 20)
    assert nearest_shape(1, 60, 100, [narrow, wide]) == wide
    assert nearest_shape(1, 100, 60, [wide, narrow]) == narrow


@pytest.mark.parametrize(("frames", "tokens"), [(1, 1), (2, 2), (5, 2), (6, 3)])
def test_tokens_of_frames_at_a_stride_of_four(frames: int, tokens: int):
    assert num_tokens((frames, 16, 32), (4, 16, 16)) == 2 * tokens
    assert num_tokens((frames, 17, 33), (4, 16, 16)) == 2 * 3 * tokens


@pytest.mark.parametrize(
    ("options", "frames"),
    [
        ({"sampler": "uniform"}, 7),
        ({"sampler": "random"}, 7),
        ({"sampler": "random", "stride": 2}, 4),  # frames 0, 2, 4 and 6
        ({"sampler": "random", "stride": 3}, 3),
        ({"sampler": "random", "stride": 7}, 1),
        ({"sampler": "fixed_fps", "fps": 8.0}, 7),
        ({"sampler": "fixed_fps", "fps": 4.0}, 4),
        ({"sampler": "random", "stride": 3, "pad": True}, 99),
    ],
)
def test_frames_of_a_video_with_every_sampler_decide_on_its_bucket(tmp_path: Path, options: dict, frames: int):
    """A video of 7 frames at 8 frames per second."""
    (tmp_path / "videos").mkdir()
    write_video(tmp_path / "videos" / "0.mp4", np.zeros((7, 16, 16, 3), np.uint8), fps=8)
    dataset = VideoFolder(tmp_path, 1, metadata="none", **options)
    for shape, fits in (((frames, 16, 16), True), ((frames + 1, 16, 16), options.get("pad", False))):
        if fits:
            data = VideoBuckets(dataset, [shape], (4, 16, 16), 99, captions=False)
            assert data[0]["video"].shape[0] == shape[0]
        else:
            with pytest.raises(ValueError, match=rf"shapes .*{shape[0]}x16x16"):
                VideoBuckets(dataset, [shape], (4, 16, 16), 99, captions=False)


# ---- procedural datasets ---------------------------------------------------------------------------------------------


def test_least_arguments_of_the_procedural_datasets():
    clip = World("test", 1, 2, 8, 1, 1, supersample=8)[0]
    assert clip["video"].shape == (2, 3, 8, 8)
    World(max_objects=3, min_objects=3, size=1)
    Simulator(8, 3, 3, 8)
    assert Sprites("test", 1, 2, 8)[0]["video"].shape == (2, 3, 8, 8)
    assert len(MovingShapes("train", 1, 1)) == len(MovingShapes("val", 1, 1)) == 1
    assert len(MovingShapes("train", 2, 72)) == 72
    with pytest.raises(ValueError, match=r"size=73\b.*\b72\b"):
        MovingShapes("train", 2, 73)


def test_splits_are_different_clips():
    for make in (lambda split: Sprites(split, 3, 2, 8), lambda split: World(split, 3, 2, 8, mode="agent")):
        clips = [
            make(split)[index]["video"].flatten().tolist() for split in ("train", "val", "test") for index in range(3)
        ]
        assert len(set(map(tuple, clips))) == 9


# Index -> labels (shape, color, size, motion), centers (x, y) of the shape in the first and the last frame, and mean
# brightness. A changed number changes the clips of every seeded run.
SPRITES = {
    0: ((2, 3, 1, 2), [9.8, 29.2, 9.8, 10.4, 83.5]),
    1: ((1, 5, 1, 4), [15.2, 7.1, 15.2, 7.1, 138.8]),
    2: ((2, 0, 0, 3), [11.5, 1.9, 11.5, 20.7, 121.7]),
    3: ((1, 5, 1, 6), [13.6, 13.4, 13.6, 13.4, 104.8]),
    4: ((1, 5, 0, 1), [5.7, 19.5, 24.9, 19.5, 109.1]),
    9: ((0, 3, 0, 7), [18.2, 21.4, 18.1, 21.4, 95.9]),
    12: ((2, 2, 0, 5), [7.3, 18.1, 7.3, 18.1, 99.2]),
    13: ((2, 3, 1, 0), [24.3, 17.1, 5.1, 17.1, 111.2]),
}
TEXTURED = {  # with four pixels of the last frame
    0: ((1, 3, 1, 7), [17.8, 19.2, 14.4, 17.2, 96.1], [62, 73, 118, 108]),
    1: ((1, 1, 0, 4), [21.8, 18.0, 21.8, 18.0, 118.0], [62, 101, 115, 132]),
    2: ((1, 2, 1, 3), [14.7, 11.6, 14.9, 18.3, 114.9], [110, 102, 114, 54]),
}


def measured(video: torch.Tensor) -> list[float]:
    """Centers (x, y) of the colored pixels of the first and the last frame, and the mean of all pixels."""
    frames = video.float()
    weight = frames.amax(dim=1) - frames.amin(dim=1)
    axis, found = torch.arange(frames.shape[3]) + 0.5, []
    for frame in (weight[0], weight[-1]):
        found += [(frame * axis).sum() / frame.sum(), (frame * axis[:, None]).sum() / frame.sum()]
    return [value.item() for value in (*found, frames.mean())]


def test_clips_of_sprites_match_pinned_numbers():
    plain = Sprites("train", 60, 8, 32)
    for index, (labels, numbers) in SPRITES.items():
        assert tuple(plain[index]["labels"].values()) == labels
        assert measured(plain[index]["video"]) == pytest.approx(numbers, abs=0.1)
    textured = Sprites("val", 9, 8, 32, distractors=2, background="texture", drift=1.5)
    for index, (labels, numbers, pixels) in TEXTURED.items():
        clip = textured[index]
        assert tuple(clip["labels"].values()) == labels
        assert measured(clip["video"]) == pytest.approx(numbers, abs=0.1)
        assert clip["video"][-1, 0, ::16, ::16].flatten().tolist() == pytest.approx(pixels, abs=1)


def test_start_centers_of_moving_shapes_match_pinned_ones():
    train, val = MovingShapes("train", 3), MovingShapes("val", 3)
    found = [train[i]["id"] for i in (0, 37, 75, 107)] + [val[i]["id"] for i in (0, 37, 1000)]
    assert [name.removeprefix("moving-shapes-") for name in found] == [
        "square-red-left-5-11",
        "square-red-right-10-10",
        "square-red-down-10-9",
        "triangle-blue-down-8-10",
        "square-red-left-6-4",
        "square-red-right-7-4",
        "triangle-green-left-11-11",
    ]


# ---- files -----------------------------------------------------------------------------------------------------------


class Numbers:
    """Dataset of clips with one number each."""

    cache_key = "numbers"

    def __len__(self):
        return 7

    def __getitem__(self, index):
        if not 0 <= index < 7:
            raise IndexError
        return {
            "video": torch.full((1, 3, 2, 2), index, dtype=torch.uint8),
            "id": str(index),
            "depth": torch.tensor(0.5 * index),
        }


@pytest.mark.parametrize("shard_size", [1, 3, 7, 8])
def test_a_cache_keeps_few_files_open(tmp_path: Path, shard_size: int, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(clip_cache, "_MAX_OPEN", 2)
    cached = CachedClips(Numbers(), tmp_path, shard_size)
    for index in [*range(7), *reversed(range(7)), 3, 0, 6]:
        assert cached[index]["id"] == str(index)
        assert cached[index]["depth"].item() == 0.5 * index
        assert len(cached._shards) <= 2
    assert len(list(cached.folder.glob("*.clips"))) == math.ceil(7 / shard_size)
    assert (cached.folder / "key.txt").read_text() == "numbers"
    for index in (-1, 7):
        with pytest.raises(IndexError):
            cached[index]
    with pytest.raises(ValueError, match="shard_size=0"):
        CachedClips(Numbers(), tmp_path, 0)


@pytest.mark.parametrize("shard_size", [1, 3, 7, 8])
def test_stored_latents_keep_few_files_open(tmp_path: Path, shard_size: int, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(latents, "_MAX_OPEN", 2)
    with LatentShards(tmp_path, {"autoencoder": "x"}, 7, shard_size) as shards:
        assert shards.missing == list(range(math.ceil(7 / shard_size)))
        for number in shards.missing:
            clips = [
                {"moments": torch.full((2, 1 + i, 1, 1), float(i)), "caption": str(i)} for i in shards.indices(number)
            ]
            shards.write(number, clips)
    data = LatentClips(tmp_path)
    assert data.shapes == [(2, 1 + i, 1, 1) for i in range(7)]
    assert list(data.captions()) == [str(i) for i in range(7)]
    for index in [*reversed(range(7)), 3, 0, 6]:
        assert data[index]["moments"].unique().tolist() == [index]
        assert data[index]["caption"] == str(index)
        assert len(data._open) <= 2
    for index in (-1, 7):
        with pytest.raises(IndexError):
            data[index]
    for changes in ({"size": 0}, {"shard_size": 0}):
        with pytest.raises(ValueError, match=rf"\b{next(iter(changes))}=0\b"):
            LatentShards(tmp_path, {}, **{"size": 1, "shard_size": 1, **changes})


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    from PIL import Image

    for name in ("a", "b"):
        (tmp_path / name).mkdir()
    for number in range(5):
        Image.new("RGB", (6, 4), (40 * number, 0, 0)).save(tmp_path / ("a" if number < 2 else "b") / f"{number}.png")
    return tmp_path


def test_a_share_of_broken_files_equal_to_the_limit_is_allowed(pictures: Path):
    for name in ("a/1.png", "b/2.png"):
        (pictures / name).write_bytes(b"no picture")
    data = ImageFolder(pictures, 4, max_broken_share=0.4)
    assert [data[i]["id"] for i in range(5)] == ["a/0.png", "b/3.png", "b/3.png", "b/3.png", "b/4.png"]
    strict = ImageFolder(pictures, 4, max_broken_share=0.39)
    with pytest.raises(RuntimeError, match=r"\b2 of 5\b.*max_broken_share=0\.39"):
        strict[1]
    ImageFolder(pictures, 4, max_broken_share=0.0)
    ImageFolder(pictures, 1, max_broken_share=1.0)
    for changes in ({"max_broken_share": 1.01}, {"max_broken_share": -0.01}):
        with pytest.raises(ValueError, match=rf"max_broken_share={changes['max_broken_share']}"):
            ImageFolder(pictures, 4, **changes)
    for size in (0, [4, 0], [4], [4, 4, 4]):
        with pytest.raises(ValueError, match="image_size="):
            ImageFolder(pictures, size)


def test_a_listed_file_is_not_read_again_and_the_last_file_continues_at_the_first(pictures: Path):
    data, read = ImageFolder(pictures, 4, max_broken_share=0.4), []
    plain = data._read
    data._read = lambda row: read.append(row.name) or plain(row)
    (pictures / "b" / "4.png").unlink()
    assert data[4]["id"] == "a/0.png"
    assert read == ["b/4.png", "a/0.png"]
    assert data[4]["id"] == "a/0.png"
    assert read == ["b/4.png", "a/0.png", "a/0.png"]
    assert list(data.skipped) == ["b/4.png"]


def test_frames_and_indices_at_the_ends():
    clips = Sprites("val", 3, num_frames=5, image_size=8)
    last = SingleFrames(clips, frame=4)[2]
    assert torch.equal(last["video"][0], clips[2]["video"][4])
    assert SingleFrames(clips, "middle")[0]["id"] == "sprites-val-0@2"
    assert SingleFrames(clips, 0)[0]["id"] == "sprites-val-0@0"
    for dataset in (clips, SingleFrames(clips, 0), Mixture({"a": clips, "b": clips})):
        assert dataset[len(dataset) - 1]["id"].startswith("sprites-val-2")
        for index in (-1, len(dataset)):
            with pytest.raises(IndexError):
                dataset[index]


def test_random_frames_are_uniform_over_the_clip():
    frames = SingleFrames(Sprites("val", 3, num_frames=4, image_size=8), seed=2)
    counts = Counter(frames._number(4, index, epoch) for index in range(3) for epoch in range(200))
    assert sorted(counts) == [0, 1, 2, 3]
    assert min(counts.values()) > 110  # 150 expected, standard deviation 11
    assert frames._number(4, 0, 1) == SingleFrames(frames.dataset, seed=2)._number(4, 0, 1)


@pytest.mark.parametrize(
    ("frames", "num_frames", "pad", "fps"),
    [(9, 9, False, 8.0), (9, 5, False, 4.0), (1, 1, False, 0.0), (3, 9, True, 8.0)],
)
def test_the_frame_rate_of_a_clip_is_that_of_its_frames(
    tmp_path: Path, frames: int, num_frames: int, pad: bool, fps: float
):
    (tmp_path / "videos").mkdir()
    write_video(tmp_path / "videos" / "0.mp4", np.zeros((frames, 16, 16, 3), np.uint8), fps=8)
    sampler = {"sampler": "random"} if pad else {}
    clip = VideoFolder(tmp_path, num_frames, metadata="none", pad=pad, **sampler)[0]
    assert clip["fps"] == pytest.approx(fps)
    assert clip["video"].shape[0] == num_frames


@pytest.mark.parametrize("crf", [0, 51])
def test_qualities_at_the_ends_and_several_jobs_are_written(tmp_path: Path, crf: int):
    """33 clips: one more than a job."""
    count = 33 if crf else 1
    sources = {"train": Sprites("train", count, 2, 8), "val": Sprites("val", 2, 2, 8)}
    FolderWriter(sources, crf, num_workers=0)(tmp_path / "out")
    data = VideoFolder(tmp_path / "out", 2, split="train")
    assert len(data) == count
    assert data[count - 1]["caption"] == sources["train"][count - 1]["caption"]
    assert len(VideoFolder(tmp_path / "out", 2, split="val")) == 2
    for wrong in (-1, 52):
        with pytest.raises(ValueError, match=f"crf={wrong}"):
            FolderWriter(sources, wrong)


@pytest.mark.parametrize(("height", "width"), [(15, 16), (16, 15), (9, 8), (8, 9)])
def test_odd_sides_cannot_be_written(tmp_path: Path, height: int, width: int):
    fix = rf"\b{height}x{width}\b.*\b{height + height % 2}x{width + width % 2}\b"
    with pytest.raises(ValueError, match=fix):
        write_video(tmp_path / "odd.mp4", np.zeros((2, height, width, 3), np.uint8), fps=8)
    write_video(tmp_path / "even.mp4", np.zeros((2, 8, 10, 3), np.uint8), fps=8)
    write_video(tmp_path / "even.mp4", np.zeros((2, 10, 8, 3), np.uint8), fps=8)


def renamed(monkeypatch: pytest.MonkeyPatch, fail: bool = True) -> list[str]:
    """Makes every rename of a file fail, or records the names; returns the list of names."""
    names, replace = [], Path.replace

    def replaced(path: Path, target: Path) -> Path:
        names.append(Path(target).name)
        if fail:
            raise OSError("no rename")
        return replace(path, target)

    monkeypatch.setattr(Path, "replace", replaced)
    return names


def test_a_shard_of_the_cache_appears_only_when_it_is_complete(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    cached = CachedClips(Numbers(), tmp_path, 3)
    with monkeypatch.context() as patch:
        names = renamed(patch)
        with pytest.raises(OSError, match="no rename"):
            cached[4]
    assert names == ["000001-3.clips"]
    assert not list(cached.folder.glob("*.clips"))
    assert cached[4]["id"] == "4"
    assert [path.name for path in cached.folder.glob("*.clips")] == names


def test_a_shard_of_latents_is_renamed_before_the_manifest(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    clips = [{"moments": torch.zeros(2, 1, 1, 1), "caption": str(i)} for i in range(2)]
    with LatentShards(tmp_path, {}, 4, 2) as shards:
        names = renamed(monkeypatch, fail=False)
        for number in (1, 0):
            shards.write(number, clips)
    assert names == ["00001.safetensors", "manifest.json", "00000.safetensors", "manifest.json"]


def test_quality_preset_and_random_numbers_of_written_videos(tmp_path: Path):
    source, sizes = {"train": Sprites("train", 2, 8, 32, background="texture")}, {}
    before = torch.get_rng_state()
    for name, options in {"0": {"crf": 0}, "8": {}, "40": {"crf": 40}, "slow": {"preset": "slow"}}.items():
        FolderWriter(source, num_workers=0, **options)(tmp_path / name)
        sizes[name] = sum(path.stat().st_size for path in (tmp_path / name / "videos").iterdir())
    assert sizes["40"] < sizes["8"] < sizes["0"]
    assert sizes["slow"] != sizes["8"]
    assert torch.equal(torch.get_rng_state(), before)
