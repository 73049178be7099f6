"""Plans of a trained world model: the actions of the planner, start and goal files, settings, errors."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from blueberry_video import plan as entry
from blueberry_video import train
from blueberry_video.config import compose
from blueberry_video.data.world import Simulator
from blueberry_video.data.write import write_video
from blueberry_video.experiment import trained
from blueberry_video.experiment.run_folder import RunFolder
from blueberry_video.generated_videos import read_last_frame
from blueberry_video.inference.droid import DroidActions
from blueberry_video.inference.planner import Box, CrossEntropyPlanner, Discrete
from blueberry_video.plan import plan
from blueberry_video.tasks.planning import planner_of

FILE = Path(__file__).resolve().parents[1] / "experiments" / "world_model" / "config.yaml"
TINY = ["logger=csv", "callbacks.progress=null", "callbacks.media=null", "trainer.max_steps=1", "data.batch_size=2"]
TINY += ["schedule=constant", "data.num_workers=0", "callbacks.closed_loop.episodes=1"]
TINY += ["callbacks.closed_loop.max_steps=1", "callbacks.closed_loop.random_tries=1"]
TINY += [f"data.{split}.dataset.{key}" for split in ("train", "val") for key in ("size=4", "supersample=1")]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A world model of the procedural world, of one step; its predictor starts as a copy of the last frame."""
    folder = tmp_path_factory.mktemp("run")
    caches = [f"data.{split}.folder={folder / 'cache'}" for split in ("train", "val")]
    train.run(compose(FILE, [*TINY, *caches, f"output_dir={folder}"]))
    torch.use_deterministic_algorithms(False)
    return RunFolder.open(folder / "world_model").path


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, list[float]]:
    """A start and a goal, two steps to the left, as files, and the state at the start."""
    folder, world = tmp_path_factory.mktemp("images"), Simulator(8, supersample=2)
    state = world.reset((2, 0))
    goal = [world.step(1) for _ in range(2)][-1]
    for name, each in (("start", state), ("goal", goal)):
        Image.fromarray(world.render(each).permute(1, 2, 0).numpy()).save(folder / f"{name}.png")
    return folder / "start.png", folder / "goal.png", state.vector.tolist()


def test_plan_is_that_of_the_planner_of_the_run(run: Path, images):
    start, goal, state = images
    found = plan(run, start, goal, state, seed=3, settings={"horizon": 2})
    opened = trained.load_trained(run)
    pixels = [torch.from_numpy(np.array(Image.open(file))).permute(2, 0, 1) / 255 for file in (start, goal)]
    pair = opened.task.normalize(torch.stack(pixels, dim=1)[None])
    displacement = [[0.0, 0.0], [-0.1, 0.0], [0.1, 0.0], [0.0, 0.1], [0.0, -0.1]]
    planner = CrossEntropyPlanner(Discrete(5), 32, 4, 2, horizon=2, displacement=displacement)
    generator = torch.Generator().manual_seed(3)
    states = torch.tensor([state], dtype=torch.float32)
    chosen = planner.plan(opened.task.model, pair[:, :, 0], states, pair[:, :, 1], generator)
    names = ("noop", "left", "right", "away", "towards")
    assert found["actions"] == [names[i] for i in chosen[0].argmax(dim=-1).tolist()]
    here, there = opened.task.model.encode_frames(pair).unbind(dim=1)
    assert found["distance_start"] == pytest.approx(float((here - there).abs().mean()), rel=1e-4)
    assert found["distance"] > 0
    assert (found["samples"], found["elites"], found["iterations"], found["horizon"]) == (32, 4, 2, 2)
    assert plan(run, start, goal, state, seed=3, settings={"horizon": 2}) == found
    assert plan(run, start, start, state)["distance_start"] == 0


def test_command_writes_the_plan_from_the_last_frame_of_a_video(run: Path, images, tmp_path: Path, monkeypatch, capsys):
    start, goal, state = images
    frames = np.stack([np.full((8, 8, 3), 255, np.uint8), np.array(Image.open(start))])
    write_video(tmp_path / "start.mp4", frames, 8.0, crf=0)
    words = [str(run), str(tmp_path / "start.mp4"), str(goal), "--state", ",".join(map(str, state))]
    words += ["--out", str(tmp_path / "plan.json"), "--samples", "20", "--seed", "1"]
    monkeypatch.setattr(sys, "argv", ["plan", *words])
    entry.main()
    written = json.loads((tmp_path / "plan.json").read_text())
    assert json.loads(capsys.readouterr().out) == written["actions"]
    last = read_last_frame(tmp_path / "start.mp4", (8, 8)).permute(1, 2, 0).float().numpy()
    assert np.abs(last - np.array(Image.open(start))).mean() < 20 < np.abs(255 - last).mean()
    assert written["samples"] == 20
    with pytest.raises(FileExistsError, match=r"plan\.json exists.*--overwrite"):
        entry.main()
    monkeypatch.setattr(sys, "argv", ["plan", *words[:4], "left", "--out", str(tmp_path / "b.json")])
    with pytest.raises(ValueError, match=r"--state=left must be numbers"):
        entry.main()


def test_bad_arguments_raise(run: Path, images, tmp_path: Path):
    start, goal, state = images
    for arguments, kind, message in (
        ((start, goal, [0.0]), ValueError, r"state has 1 numbers: pass 2\b"),
        ((tmp_path / "none.png", goal, state), FileNotFoundError, r"START=.*none\.png"),
        ((start, tmp_path / "none.png", state), FileNotFoundError, r"GOAL=.*none\.png"),
        ((start, goal, state, 0, {"elites": 40}), ValueError, r"planner\.elites=40\b.*32\b"),
    ):
        with pytest.raises(kind, match=message):
            plan(run, *arguments)


def test_planner_without_a_callback_fits_the_actions():
    assert isinstance(planner_of({}, 5, ["a"] * 5, {}).actions, Discrete)
    assert isinstance(planner_of({}, 5, [], {}, 0.5).actions, Box)
    with pytest.raises(ValueError, match=r"limit is missing.*\b5 numbers"):
        planner_of({}, 5, [], {})
    droid = planner_of({}, 7, [], {"samples": 30})
    assert isinstance(droid.actions, DroidActions)
    assert (droid.mean_momentum, droid.std_momentum, droid.samples) == (0.15, 0.75, 30)
