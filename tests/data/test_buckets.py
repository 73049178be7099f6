"""Buckets: assignment of clips, batches of one size within the token budget, resuming and ranks."""

import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from blueberry_video.data.batches import MixedEvaluationBatches, MixedTrainBatches
from blueberry_video.data.buckets import Buckets, LatentBuckets, VideoBuckets, nearest_shape, num_tokens, reading
from blueberry_video.data.latents import LatentClips, LatentShards
from blueberry_video.data.video_folder import VideoFolder
from blueberry_video.data.write import write_video

SIZES, BATCHES = {"long": 20, "wide": 9, "still": 31}, [2, 3, 8]


def batches(batch_sizes: list[int] = BATCHES, seed: int = 0, **changes) -> MixedTrainBatches:
    return MixedTrainBatches(SIZES, dict(zip(SIZES, batch_sizes)), seed, **changes)


def epoch_of(loader: MixedTrainBatches, epoch: int) -> list[list[int]]:
    loader.set_epoch(epoch)
    return [[index for _, index in batch] for batch in loader]


def bucket_of(index: int) -> int:
    return (index >= 20) + (index >= 29)


def test_batches_are_from_one_bucket_with_its_batch_size():
    loader = batches()
    assert len(loader) == 10 + 3 + 3
    orders = set()
    for epoch in range(5):
        shown = epoch_of(loader, epoch)
        assert len(shown) == len(loader)
        assert all(len({bucket_of(i) for i in batch}) == 1 for batch in shown)
        assert all(len(batch) == BATCHES[bucket_of(batch[0])] for batch in shown)
        clips = [i for batch in shown for i in batch]
        assert len(set(clips)) == len(clips)
        assert set(range(29)) <= set(clips)
        orders.add(tuple(bucket_of(batch[0]) for batch in shown))
    assert len(orders) == 5


def test_order_depends_only_on_seed_and_epoch():
    assert epoch_of(batches(), 3) == epoch_of(batches(), 3)
    assert epoch_of(batches(), 3) != epoch_of(batches(), 4)
    assert epoch_of(batches(), 3) != epoch_of(batches(seed=1), 3)


def test_two_ranks_share_global_batches_and_resume_at_the_same_position():
    whole = epoch_of(batches(batch_sizes=[4, 4, 8]), 2)
    ranks = [batches(batch_sizes=[2, 2, 4], rank=rank, world_size=2) for rank in range(2)]
    for loader in ranks:
        loader.resume_at = (2, 5)
    first, second = (epoch_of(loader, 2) for loader in ranks)
    assert [a + b for a, b in zip(first, second, strict=True)] == whole[5:]


def test_drop_last_false_keeps_the_last_batches():
    ranks = [batches(batch_sizes=[3, 3, 8], rank=rank, world_size=2, drop_last=False) for rank in range(2)]
    first, second = (epoch_of(loader, 0) for loader in ranks)
    assert [len(batch) for batch in first] == [len(batch) for batch in second]
    assert all(bucket_of(a[0]) == bucket_of(b[0]) for a, b in zip(first, second))
    assert {i for batch in first + second for i in batch} == set(range(60))


def test_bucket_smaller_than_a_batch_raises():
    with pytest.raises(
        ValueError, match=r"'wide'.*\b9\b.*\b10\b.*\b5\b.*\b2 ranks.*token_budget.*data\.drop_last=false"
    ):
        batches(batch_sizes=[2, 5, 8], world_size=2)


def test_evaluation_shows_every_clip_once_within_the_budget():
    ranks = [list(MixedEvaluationBatches(SIZES, dict(zip(SIZES, BATCHES)), rank, 2)) for rank in range(2)]
    assert sorted(i for shown in ranks for batch in shown for i in batch) == list(range(60))
    assert len(ranks[0]) == len(ranks[1])
    for shown in ranks:
        assert all(len({bucket_of(i) for i in batch}) == 1 for batch in shown)
        assert all(len(batch) <= BATCHES[bucket_of(batch[0])] for batch in shown)


SHAPES = [(49, 480, 720), (17, 480, 720), (49, 720, 480), (1, 240, 240)]


@pytest.mark.parametrize(
    ("video", "shape"),
    [
        ((60, 480, 720), (49, 480, 720)),  # of equal aspect ratios the one with the most pixels
        ((48, 960, 1440), (17, 480, 720)),  # too few frames for 49
        ((60, 1280, 720), (49, 720, 480)),
        ((60, 480, 700), (1, 240, 240)),  # no upscaling
        ((60, 800, 800), (1, 240, 240)),  # the aspect ratio takes precedence over the number of pixels
        ((60, 100, 100), None),
    ],
)
def test_nearest_shape(video: tuple[int, int, int], shape: tuple[int, int, int] | None):
    assert nearest_shape(*video, SHAPES) == shape


def test_num_tokens():
    assert num_tokens((49, 480, 720), (4, 16, 16)) == 17550  # CogVideoX-2B
    assert num_tokens((129, 720, 1280), (4, 16, 16)) == 118800  # HunyuanVideo
    assert num_tokens((8, 16, 16), (1, 4, 4)) == 128


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Six videos of three sizes with captions."""
    (tmp_path / "videos").mkdir()
    rows = []
    for k, (frames, height, width) in enumerate([(9, 32, 48), (9, 48, 32), (5, 32, 48)] * 2):
        write_video(tmp_path / "videos" / f"{k}.mp4", np.full((frames, height, width, 3), 20 * k, np.uint8), fps=8)
        rows.append({"file_name": f"videos/{k}.mp4", "caption": f"number {k}"})
    (tmp_path / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return tmp_path


def buckets(folder: Path, **changes) -> VideoBuckets:
    dataset = VideoFolder(folder, num_frames=1, sampler=changes.pop("sampler", "uniform"))
    shapes = [(9, 32, 48), (9, 48, 32), (5, 16, 24)]
    return VideoBuckets(dataset, **{"shapes": shapes, "token_size": (4, 16, 16), "token_budget": 36, **changes})


def test_videos_have_the_size_of_their_bucket(folder: Path):
    data = buckets(folder, sampler="random")
    assert data.part_sizes == {"9x32x48": 2, "9x48x32": 2, "5x16x24": 2}
    assert data.batch_sizes == {"9x32x48": 2, "9x48x32": 2, "5x16x24": 9}
    assert data.varies_by_epoch
    found = [data.sample(i, epoch=1) for i in range(6)]
    assert [item["video"].shape for item in found[::2]] == [(9, 3, 32, 48), (9, 3, 48, 32), (5, 3, 16, 24)]
    assert [item["caption"] for item in found] == [f"number {k}" for k in (0, 3, 1, 4, 2, 5)]


def test_videos_that_fit_no_bucket_raise_or_are_dropped(folder: Path):
    with pytest.raises(ValueError, match=r"'2\.mp4'.*\b5 frames of 32 x 48\b.*9x32x48, 9x48x32.*leave_out_small=true"):
        buckets(folder, shapes=[(9, 32, 48), (9, 48, 32)])
    assert len(buckets(folder, shapes=[(9, 32, 48), (9, 48, 32)], leave_out_small=True)) == 4
    with pytest.raises(ValueError, match=r"token_budget=17\b.*\b18\b.*9x32x48"):
        buckets(folder, token_budget=17)
    with pytest.raises(ValueError, match=r"\b6 videos in .*49x64x64"):
        buckets(folder, shapes=[(49, 64, 64)], leave_out_small=True)
    with pytest.raises(ValueError, match=r"shapes.*\[9, 32\]"):
        buckets(folder, shapes=[(9, 32)])
    with pytest.raises(ValueError, match=r"token_size.*\[16, 16\]"):
        buckets(folder, token_size=(16, 16))


def test_captions_are_read_without_decoding(folder: Path):
    data = buckets(folder)
    in_order = [data[i]["caption"] for i in range(6)]
    shutil.rmtree(folder / "videos")
    assert list(data.captions()) == in_order


def test_files_skipped_before_skipped_file_is_assigned_are_listed(folder: Path, tmp_path: Path):
    (folder / "videos" / "1.mp4").write_bytes(b"no video")
    dataset = VideoFolder(folder, num_frames=1, max_broken_share=0.5)
    data = VideoBuckets(dataset, [(9, 32, 48), (9, 48, 32), (5, 16, 24)], (4, 16, 16), 36)
    assert data.part_sizes == {"9x32x48": 2, "9x48x32": 1, "5x16x24": 2}
    data.skipped_file = str(tmp_path / "skipped.csv")
    assert [row.split(",")[1] for row in (tmp_path / "skipped.csv").read_text().splitlines()] == ["file", "1.mp4"]
    assert {part.skipped_file for part in data.parts.values()} == {data.skipped_file}


def test_vanished_files_are_a_share_of_all_buckets(folder: Path):
    dataset = VideoFolder(folder, num_frames=1, max_broken_share=0.34)
    (folder / "videos" / "5.mp4").unlink()  # before its size is read
    data = VideoBuckets(dataset, [(9, 32, 48), (9, 48, 32), (5, 16, 24)], (4, 16, 16), 36)
    assert data.part_sizes == {"9x32x48": 2, "9x48x32": 2, "5x16x24": 1}
    (folder / "videos" / "0.mp4").unlink()  # half of its bucket, and the second of six files
    assert [data[i]["caption"] for i in range(5)] == [f"number {k}" for k in (3, 3, 1, 4, 2)]
    (folder / "videos" / "1.mp4").unlink()
    with pytest.raises(RuntimeError, match=r"3 of 6 video files .*max_broken_share=0\.34"):
        data[2]


def test_videos_without_captions_raise(folder: Path):
    (folder / "metadata.jsonl").unlink()
    dataset = VideoFolder(folder, num_frames=1, metadata="none")
    options = {"shapes": [(5, 32, 32)], "token_size": (4, 16, 16), "token_budget": 99}
    with pytest.raises(ValueError, match=r"\b6 of 6\b.*caption.*'0\.mp4'.*captions=false"):
        VideoBuckets(dataset, **options)
    assert len(VideoBuckets(dataset, **options, captions=False)) == 6


def test_stored_latents_are_in_buckets_by_shape(tmp_path: Path):
    shapes = [(2, 4, 4), (1, 4, 4), (2, 4, 4), (1, 2, 6), (2, 4, 4)]
    with LatentShards(tmp_path, {"autoencoder": "x"}, len(shapes), shard_size=2) as shards:
        for number in shards.missing:
            clips = [
                {"moments": torch.full((2, *shapes[i]), float(i)), "caption": str(i)} for i in shards.indices(number)
            ]
            shards.write(number, clips)
    data = LatentBuckets(LatentClips(tmp_path), patch_size=(1, 2, 2), token_budget=16)
    assert isinstance(data, Buckets)
    assert data.batch_sizes == {"2x4x4": 2, "1x4x4": 4, "1x2x6": 5}
    assert [data[i]["caption"] for i in range(5)] == ["0", "2", "4", "1", "3"]
    assert data.sizes == {"2x4x4": (2, 4, 4), "1x4x4": (1, 4, 4), "1x2x6": (1, 2, 6)}
    numbers = r"2x4x4: 3 .*\b2; 1x4x4: 1 .*\b4; 1x2x6: 1 .*\b5"  # clips and batch size of each bucket
    assert re.fullmatch(numbers, data.describe())
    assert sorted(data.captions()) == sorted("01234")
    assert (data.folder, data.made_of["autoencoder"]) == (tmp_path, "x")
    with pytest.raises(ValueError, match=r"patch_size.*\[2, 2\]"):
        LatentBuckets(LatentClips(tmp_path), patch_size=(2, 2), token_budget=16)


def test_overrides_that_read_stored_latents(tmp_path: Path):
    for split, shapes in (("train", [(2, 4, 4)]), ("val", [(1, 4, 4), (1, 2, 2)])):
        with LatentShards(tmp_path / split, {"autoencoder": "x"}, len(shapes)) as shards:
            shards.write(0, [{"moments": torch.zeros(2, *shape), "caption": "a"} for shape in shapes])
    plain = {"train": LatentClips(tmp_path / "train")}
    read = reading(tmp_path, plain, (1, 2, 2), {"batch_size": 3})
    assert read == ["data=latents", f"data.train.folder={tmp_path}/train", "data.batch_size=3"]
    bucketed = {**plain, "val": LatentBuckets(LatentClips(tmp_path / "val"), (1, 1, 1), 16)}
    assert reading(tmp_path, bucketed, (1, 2, 2), {"batch_size": 3}) == [
        "data=latent_buckets",
        "data.train.patch_size=[1,2,2]",
        f"data.train.dataset.folder={tmp_path}/train",
        f"data.val.dataset.folder={tmp_path}/val",
        "data.val.token_budget=16",
    ]
