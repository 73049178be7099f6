"""Training on videos of several sizes, from the video files and from stored latents."""

import json
import re
import shlex
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from blueberry_video import precompute, train
from blueberry_video.data.latents import LatentClips
from blueberry_video.data.write import write_video

ROOT = Path(__file__).resolve().parents[2]
SIZES = [(9, 32, 48), (9, 48, 32), (5, 32, 48)]
SMALL = ["model.transformer.depth=1", "model.transformer.num_heads=1", "model.transformer.head_dim=16"]
RUN = ["logger=csv", "~callbacks.progress", "callbacks.sampling=null", "callbacks.ema=null"]
RUN += ["task.sampler.steps=1", "trainer.max_steps=4", "trainer.val_check_interval=2"]
EXPERIMENT = ["--config-dir", str(ROOT / "experiments" / "cogvideox"), *SMALL]
BUCKETS = ["data=captioned_buckets", "data.train.dataset.root=several", "data.num_workers=0"]
BUCKETS += ["data.train.shapes=[[9,16,24],[9,24,16],[5,16,24]]", "data.train.token_size=[1,4,4]"]
BUCKETS += ["data.train.token_budget=440", "data.val.token_budget=440"]


@pytest.fixture(autouse=True)
def videos(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Three training and two validation videos of each size, with captions."""
    monkeypatch.chdir(tmp_path)
    Path("several/videos").mkdir(parents=True)
    rows = []
    for k in range(15):
        frames, height, width = SIZES[k % 3]
        video = np.random.default_rng(k).integers(0, 255, (frames, height, width, 3)).astype(np.uint8)
        write_video(Path(f"several/videos/{k}.mp4"), video, fps=8)
        split = "train" if k < 9 else "val"
        rows.append({"file_name": f"videos/{k}.mp4", "caption": f"noise {'abc'[k % 3]}", "split": split})
    Path("several/metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))


@pytest.fixture
def call(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture):
    """Runs a command in this process and returns its stdout."""

    def run(main, *arguments: str) -> str:
        monkeypatch.setattr(sys, "argv", ["command", *arguments])
        main()
        return capsys.readouterr().out

    return run


def newest_run() -> dict:
    return json.loads(max(Path("outputs/cogvideox").glob("*/run.json")).read_text())


def sample_size() -> tuple[int, int]:
    """Height and width of the last sheet of samples."""
    gif = max(Path("outputs/cogvideox").glob("*/media/samples_*.gif"))
    with Image.open(gif) as picture:
        return picture.height, picture.width


def test_training_on_videos_and_on_stored_latents_is_the_same(call):
    output = call(train.main, *EXPERIMENT, *BUCKETS, *RUN)
    assert re.search(r"training: 9x16x24: 3 .*\b2; 9x24x16: 3 .*\b2; 5x16x24: 3 .*\b3\n", output)
    assert re.search(r"validation: 9x16x24: 2 .*\b2; 9x24x16: 2 ", output)
    of_videos = newest_run()
    height, width = sample_size()
    rows = 2  # the first validation batch is of the first bucket
    assert height / (rows * (16 + 1)) == width / (24 + 1), (
        "samples must have the size of the first bucket of validation"
    )

    output = call(precompute.main, *EXPERIMENT, *BUCKETS, "--out", "latents", "--shard-size", "4")
    shapes = {split: LatentClips(f"latents/{split}").shapes for split in ("train", "val")}
    assert shapes["train"] == [(6, 9, 16, 24)] * 3 + [(6, 9, 24, 16)] * 3 + [(6, 5, 16, 24)] * 3
    assert len(shapes["val"]) == 6
    printed = shlex.split(shlex.split(output.rpartition("ARGS=")[2])[0])  # overrides of the printed training command
    assert printed[:2] == ["data=latent_buckets", "data.train.patch_size=[1,4,4]"]
    assert printed[-len(SMALL) :] == SMALL

    call(train.main, *EXPERIMENT[:2], *printed, *RUN)
    stored = newest_run()
    assert stored["run"] != of_videos["run"]
    assert stored["metrics"]["val/loss"] == pytest.approx(of_videos["metrics"]["val/loss"], rel=1e-5)
    assert stored["metrics"]["train/loss"] == pytest.approx(of_videos["metrics"]["train/loss"], rel=1e-5)


def test_dry_run(call):
    output = call(train.main, *EXPERIMENT, *BUCKETS, *RUN, "~expected", "check=true")
    assert re.search(r"\b9 training and 6 validation clips, video \(2, 9, 3, 16, 24\)", output)


def test_bucket_that_the_patch_size_does_not_divide_raises_before_encoding(call):
    patch = ["model.transformer.patch_size=24", "model.transformer.height=24", "model.transformer.width=24"]
    with pytest.raises(ValueError, match=r"9x16x24.*height=16\b.*\b24\b"):
        call(precompute.main, *EXPERIMENT, *BUCKETS, *patch, "--out", "latents")
    assert not Path("latents/train").exists()


def test_bucket_outside_the_position_table_raises_before_training(call):
    table = ["model.transformer.positions=rope_and_table", "model.transformer.num_frames=9"]
    table += ["model.transformer.width=24", "model.transformer.text_len=8"]
    with pytest.raises(ValueError, match=r"9x24x16.*\b9 x 24 x 16\b"):
        call(train.main, *EXPERIMENT, *BUCKETS, *RUN, *table)
    assert not list(Path("outputs/cogvideox").glob("*/checkpoints/*"))
