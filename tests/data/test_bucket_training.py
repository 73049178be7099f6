"""Videos of several sizes, from their folder to a trained network: by themselves, and through stored latents."""

import json
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
    """Three to train on and two to validate on of each size, with captions."""
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
    """Runs a command in this process; returns what it prints."""

    def run(main, *arguments: str) -> str:
        monkeypatch.setattr(sys, "argv", ["command", *arguments])
        main()
        return capsys.readouterr().out

    return run


def newest_run() -> dict:
    return json.loads(max(Path("outputs/cogvideox").glob("*/run.json")).read_text())


def sample_size() -> tuple[int, int]:
    """Rows and columns of one sample in the last picture, from a sheet of frames beside each other."""
    gif = max(Path("outputs/cogvideox").glob("*/media/samples_*.gif"))
    with Image.open(gif) as picture:
        return picture.height, picture.width


def test_stored_or_not_they_are_trained_on_alike(call):
    said = call(train.main, *EXPERIMENT, *BUCKETS, *RUN)
    assert "training: 9x16x24: 3 clips, 2 a batch; 9x24x16: 3 clips, 2 a batch; 5x16x24: 3 clips, 3 a batch" in said
    assert "validation: 9x16x24: 2 clips, 2 a batch; 9x24x16: 2 clips" in said
    of_videos = newest_run()
    height, width = sample_size()
    rows = 2  # the first validation batch is of the first bucket
    assert height / (rows * (16 + 1)) == width / (24 + 1), "samples are as large as the first bucket of validation"

    said = call(precompute.main, *EXPERIMENT, *BUCKETS, "--out", "latents", "--shard-size", "4")
    shapes = {split: LatentClips(f"latents/{split}").shapes for split in ("train", "val")}
    assert shapes["train"] == [(6, 9, 16, 24)] * 3 + [(6, 9, 24, 16)] * 3 + [(6, 5, 16, 24)] * 3
    assert len(shapes["val"]) == 6
    told = shlex.split(shlex.split(said.rpartition("ARGS=")[2])[0])  # the command that it says to train with
    assert told[:2] == ["data=latent_buckets", "data.train.patch_size=[1,4,4]"]
    assert told[-len(SMALL) :] == SMALL

    call(train.main, *EXPERIMENT[:2], *told, *RUN)
    stored = newest_run()
    assert stored["run"] != of_videos["run"]
    assert stored["metrics"]["val/loss"] == pytest.approx(of_videos["metrics"]["val/loss"], rel=1e-5)
    assert stored["metrics"]["train/loss"] == pytest.approx(of_videos["metrics"]["train/loss"], rel=1e-5)


def test_the_dry_run_takes_them(call):
    said = call(train.main, *EXPERIMENT, *BUCKETS, *RUN, "check=true")
    assert "9 training and 6 validation clips, video (2, 9, 3, 16, 24)" in said
    assert "nothing stops this run" in said


def test_a_bucket_that_does_not_fit_is_named_before_anything_is_encoded(call):
    patch = ["model.transformer.patch_size=24", "model.transformer.height=24", "model.transformer.width=24"]
    with pytest.raises(ValueError, match=r"the bucket 9x16x24 does not fit: height=16 is no multiple of 24, .* patch"):
        call(precompute.main, *EXPERIMENT, *BUCKETS, *patch, "--out", "latents")
    assert not Path("latents/train").exists()


def test_a_bucket_that_the_network_has_no_positions_for_is_named_before_training(call):
    table = ["model.transformer.positions=rope_and_table", "model.transformer.num_frames=9"]
    table += ["model.transformer.width=24", "model.transformer.text_len=8"]
    message = "the bucket 9x24x16 does not fit the model: latents of 9 x 24 x 16 have no places in the model's table"
    with pytest.raises(ValueError, match=message):
        call(train.main, *EXPERIMENT, *BUCKETS, *RUN, *table)
    assert not list(Path("outputs/cogvideox").glob("*/checkpoints/*"))
