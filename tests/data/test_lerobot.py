"""Data sets of LeRobot: the frames of an episode in a file of several, and tables that do not fit."""

import json
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

from blueberry_video.data.lerobot import LeRobotEpisodes
from blueberry_video.data.lerobot_tables import parse_episodes
from blueberry_video.data.write import write_video

pa = pytest.importorskip("pyarrow")
parquet = pytest.importorskip("pyarrow.parquet")

FPS, CAMERA = 10.0, "observation.images.top"
LENGTHS = (7, 5, 9)  # of the episodes; the first two are in one file
FILES = {0: (0, 0.0), 1: (0, 0.7), 2: (1, 0.0)}  # episode -> file and start in it
STEP = 11  # gray levels between consecutive frames of the data set
FEATURES = {
    "action": {"dtype": "float32", "shape": [2]},
    "observation.state": {"dtype": "float32", "shape": [3]},
    CAMERA: {"dtype": "video", "shape": [32, 48, 3]},
}


def gray(frames: range) -> np.ndarray:
    """Frames whose gray level is their number in the data set."""
    return np.stack([np.full((32, 48, 3), 5 + STEP * i, np.uint8) for i in frames])


def table(path: Path, **columns: list) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    parquet.write_table(pa.table(columns), path)


def frames_of(episodes: range) -> dict[str, list]:
    """Columns of the frames of episodes."""
    total = [(e, i, sum(LENGTHS[:e]) + i) for e in episodes for i in range(LENGTHS[e])]
    return {
        "action": [[float(n), -float(n)] for _, _, n in total],
        "observation.state": [[n / 10, n / 5, float(e)] for e, _, n in total],
        "timestamp": pa.array([i / FPS for _, i, _ in total], pa.float32()),
        "frame_index": [i for _, i, _ in total],
        "episode_index": [e for e, _, _ in total],
        "index": [n for _, _, n in total],
        "task_index": [e % 2 for e, _, _ in total],
    }


def info(root: Path, **changes: object) -> None:
    content = {
        "codebase_version": "v3.0",
        "fps": 10,
        "features": FEATURES,
        "splits": {"train": "0:2"},
        "data_path": "data/chunk-{chunk_index:03d}/file-{file_index:03d}.parquet",
        "video_path": "videos/{video_key}/chunk-{chunk_index:03d}/file-{file_index:03d}.mp4",
    }
    (root / "meta").mkdir(parents=True, exist_ok=True)
    (root / "meta" / "info.json").write_text(json.dumps({**content, **changes}))


@pytest.fixture
def v3(tmp_path: Path) -> Path:
    root = tmp_path / "v3"
    info(root)
    videos = root / "videos" / CAMERA / "chunk-000"
    videos.mkdir(parents=True)
    write_video(videos / "file-000.mp4", gray(range(12)), FPS)
    write_video(videos / "file-001.mp4", gray(range(12, 21)), FPS)
    table(root / "data" / "chunk-000" / "file-000.parquet", **frames_of(range(2)))
    table(root / "data" / "chunk-000" / "file-001.parquet", **frames_of(range(2, 3)))
    table(root / "meta" / "tasks.parquet", task_index=[0, 1], __index_level_0__=["push", "lift"])
    episodes = {
        "episode_index": [0, 1, 2],
        "length": [*LENGTHS],
        f"videos/{CAMERA}/chunk_index": [0, 0, 0],
        f"videos/{CAMERA}/file_index": [FILES[e][0] for e in range(3)],
        f"videos/{CAMERA}/from_timestamp": [FILES[e][1] for e in range(3)],
        f"videos/{CAMERA}/to_timestamp": [0.7, 1.2, 0.9],
        "tasks": [["push"], ["lift"], ["push"]],
    }
    table(root / "meta" / "episodes" / "chunk-000" / "file-000.parquet", **episodes)
    return root


def numbers(video: torch.Tensor) -> list[int]:
    """Numbers of the frames of a clip, from their gray levels."""
    levels = (video.float().mean(dim=(1, 2, 3)) - 5) / STEP
    assert (levels - levels.round()).abs().max() < 0.3
    return levels.round().int().tolist()


def check(clip: dict, expected: list[int]) -> None:
    assert numbers(clip["video"]) == expected
    assert clip["actions"].tolist() == [[n, -n] for n in expected[:-1]]
    assert clip["states"][:, 0].tolist() == pytest.approx([n / 10 for n in expected])
    assert (clip["actions"].dtype, clip["states"].dtype) == (torch.float32, torch.float32)


def test_clips_have_the_frames_of_their_episode(v3: Path):
    data = LeRobotEpisodes(v3, 5, sampler="multi_clip", num_clips=2, pad=True)
    assert len(data) == 6
    check(data[0], [0, 1, 2, 3, 4])
    check(data[1], [2, 3, 4, 5, 6])
    check(data[2], [7, 8, 9, 10, 11])  # the second episode of the file
    check(data[4], [12, 13, 14, 15, 16])
    check(data[5], [16, 17, 18, 19, 20])
    assert [data[i]["caption"] for i in (0, 2, 4)] == ["push", "lift", "push"]
    assert data[2]["fps"] == pytest.approx(FPS)
    assert data[2]["id"].startswith("episode_000001")
    assert data[4]["states"][:, 2].tolist() == [2.0] * 5


def test_strides_random_windows_and_workers(v3: Path):
    strided = LeRobotEpisodes(v3, 3, sampler="multi_clip", stride=2)
    check(strided[0], [1, 3, 5])
    assert strided[0]["fps"] == pytest.approx(FPS / 2)
    data = LeRobotEpisodes(v3, 4, image_size=16)
    for epoch in range(4):
        for episode in range(3):
            clip = data.sample(episode, epoch)
            first = int(clip["actions"][0, 0])
            check(clip, [*range(first, first + 4)])
            assert sum(LENGTHS[:episode]) <= first <= sum(LENGTHS[: episode + 1]) - 4
    assert len({int(data.sample(2, epoch)["actions"][0, 0]) for epoch in range(8)}) > 1
    check(pickle.loads(pickle.dumps(data))[0], numbers(data[0]["video"]))
    batch = next(iter(DataLoader(data, batch_size=3, num_workers=1)))
    assert (batch["actions"].shape, batch["states"].shape) == ((3, 3, 2), (3, 4, 3))
    assert torch.equal(batch["video"][2], data[2]["video"])


def test_padding_repeats_the_last_frame_of_the_episode(v3: Path):
    check(LeRobotEpisodes(v3, 8, pad=True, episodes="1:2")[0], [7, 8, 9, 10, 11, 11, 11, 11])
    with pytest.raises(ValueError, match="pad"):
        LeRobotEpisodes(v3, 8, episodes="1:2")[0]


def test_selection_of_episodes_and_features(v3: Path):
    assert [row.name for row in LeRobotEpisodes(v3, 2, split="train").rows] == ["episode_000000", "episode_000001"]
    assert [row.name for row in LeRobotEpisodes(v3, 2, episodes="2:").rows] == ["episode_000002"]
    clip = LeRobotEpisodes(v3, 2, actions=None, states="action")[0]
    assert "actions" not in clip
    assert clip["states"].shape == (2, 2)
    assert parse_episodes(":45") == (0, 45)
    for arguments, message in (
        ({"split": "val"}, r"split='val'.*'train'"),
        ({"episodes": "3:"}, r"episodes='3:'.*0 to 2"),
        ({"episodes": "3"}, r"episodes='3' must be a range"),
        ({"split": "train", "episodes": "0:1"}, r"set one of them to null"),
        ({"states": "state"}, r"no feature 'state', only action, observation.state"),
        ({"camera": "top"}, rf"camera='top'.*{CAMERA}"),
    ):
        with pytest.raises(ValueError, match=message):
            LeRobotEpisodes(v3, 2, **arguments)
    info(v3, features={**FEATURES, "observation.images.wrist": {"dtype": "video"}})
    with pytest.raises(ValueError, match=r"has the cameras .*set camera"):
        LeRobotEpisodes(v3, 2)
    check(LeRobotEpisodes(v3, 2, camera=CAMERA, sampler="multi_clip", episodes="1:2")[0], [8, 9])


def test_one_file_per_episode_of_version_2(tmp_path: Path):
    root = tmp_path / "v2"
    pattern = "chunk-{episode_chunk:03d}/episode_{episode_index:06d}.parquet"
    video = "videos/chunk-{episode_chunk:03d}/{video_key}/episode_{episode_index:06d}.mp4"
    info(root, codebase_version="v2.1", chunks_size=2, data_path=f"data/{pattern}", video_path=video)
    lines = [{"episode_index": e, "tasks": ["push"], "length": n} for e, n in enumerate(LENGTHS)]
    (root / "meta" / "episodes.jsonl").write_text("\n".join(map(json.dumps, lines)))
    (root / "meta" / "tasks.jsonl").write_text('{"task_index": 0, "task": "push"}\n{"task_index": 1, "task": "lift"}\n')
    for e, length in enumerate(LENGTHS):
        table(root / "data" / pattern.format(episode_chunk=e // 2, episode_index=e), **frames_of(range(e, e + 1)))
        file = root / video.format(episode_chunk=e // 2, video_key=CAMERA, episode_index=e)
        file.parent.mkdir(parents=True, exist_ok=True)
        write_video(file, gray(range(sum(LENGTHS[:e]), sum(LENGTHS[:e]) + length)), FPS)
    data = LeRobotEpisodes(root, 5, sampler="multi_clip")
    check(data[1], [7, 8, 9, 10, 11])
    check(data[2], [14, 15, 16, 17, 18])
    assert data[1]["caption"] == "lift"


def test_cut_and_shifted_videos_are_skipped_with_the_frame(v3: Path, tmp_path: Path):
    write_video(v3 / "videos" / CAMERA / "chunk-000" / "file-000.mp4", gray(range(9)), FPS)
    data = LeRobotEpisodes(v3, 4, max_broken_share=0.5, sampler="multi_clip")
    check(data[0], [1, 2, 3, 4])
    check(data[1], [14, 15, 16, 17])  # the next good episode
    assert "no frame at 0.9" in data.skipped["episode_000001"]
    with pytest.raises(RuntimeError, match=r"1 of 3 video files.*no frame at"):
        LeRobotEpisodes(v3, 4)[1]


def test_data_sets_that_do_not_fit(v3: Path, tmp_path: Path):
    with pytest.raises(FileNotFoundError, match=r"no .*meta/info.json"):
        LeRobotEpisodes(tmp_path, 4)
    info(v3, codebase_version="v1.6")
    with pytest.raises(ValueError, match=r"codebase_version='v1.6'.*v3.0 and v2.1"):
        LeRobotEpisodes(v3, 4)
    info(v3, features={**FEATURES, "reward": {"dtype": "float32"}})
    with pytest.raises(ValueError, match=r"no column 'reward'"):
        LeRobotEpisodes(v3, 4, states="reward")
    info(v3)
    frames = {name: values[:-1] for name, values in frames_of(range(2, 3)).items()}
    table(v3 / "data" / "chunk-000" / "file-001.parquet", **frames)
    with pytest.raises(ValueError, match=r"episode 2 has 8 frames in data/ and length=9"):
        LeRobotEpisodes(v3, 4)
    table(v3 / "data" / "chunk-000" / "file-001.parquet", **frames_of(range(2, 3)))
    table(v3 / "meta" / "tasks.parquet", task_index=[0], task=["push"])
    with pytest.raises(ValueError, match=r"task_index=1"):
        LeRobotEpisodes(v3, 4)
