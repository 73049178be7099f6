"""Generation from trained runs: token generators and diffusion, command line and Python call, errors, files."""

import functools
import itertools
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import yaml
from omegaconf import OmegaConf

from blueberry_video import __version__, train
from blueberry_video import generate as entry
from blueberry_video.config import compose
from blueberry_video.data.write import write_video, write_videos
from blueberry_video.experiment import trained as loading
from blueberry_video.experiment.checkpoint import latest_good_checkpoint
from blueberry_video.experiment.trained import load_trained
from blueberry_video.generate import generate
from blueberry_video.generated_videos import generate_files, open_videos, read_frames
from blueberry_video.inference import clip_files
from blueberry_video.inference.frame_generation import generate_clips
from blueberry_video.inference.prompt_files import read_prompts
from blueberry_video.models.hydra_video.generator import Conditioning
from blueberry_video.nn.noise import clip_generators
from blueberry_video.tasks.clip_format import ClipFormat
from blueberry_video.tasks.generation import KINDS
from blueberry_video.video import load_clip
from blueberry_video.video.sampling import SamplingOptions

ROOT = Path(__file__).resolve().parents[1]
TOKENS = """
defaults:
  - train
  - /model/text@model.text: words
  - /model/hydra_tokenizer@task.tokenizer: tiny
  - override model: hydra_generator/tiny
  - override task: frame_generation
  - override data: world_agent
  - override callbacks: ema
  - _self_
name: tokens
model:
  {grid: [2, 2], embed_dim: 16, depth: 1, head_dim: 8, state_dim: 4, vocabulary: 1024, num_actions: 5,
   actions_per_frame: 4, num_classes: {colour: 6, shape: 3}, text: {pooled_dim: 8, text_dim: 8, length: 32}}
task:
  tokenizer: {image_size: 16, dims: [8, 8], head_dim: 8, state_dim: 4}
  decoding: {rounds: 1}
data:
  batch_size: 2
  train: {dataset: {num_frames: 9, image_size: 16, size: 8}}
  val: {dataset: {num_frames: 9, image_size: 16, size: 2}}
"""
PROMPT, MOVES = "a object is pushed around", "a red disc moves left"
QUIET = ["logger=csv", "callbacks.progress=null", "callbacks.media=null"]
DIFFUSION = ["data.train.size=72", "data.val.size=2", "data.batch_size=2", "model.transformer.depth=1"]
DIFFUSION += ["task.sampler.steps=2", "trainer.val_check_interval=3"]


def trained(folder: Path, file: Path, *overrides: str) -> Path:
    """Trains an experiment for three steps; returns the folder of its runs."""
    config = compose(
        file, [*QUIET, "schedule=constant", "trainer.max_steps=3", f"output_dir={folder / 'outputs'}", *overrides]
    )
    train.run(config)
    torch.use_deterministic_algorithms(False)
    return folder / "outputs" / config.name


@pytest.fixture(scope="module", autouse=True)
def runs_loaded_once() -> Iterator[None]:
    """Loads each run once, because most of the time of a call is the check of its config."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loading, "load_trained", functools.cache(load_trained))
        yield


@pytest.fixture(scope="module")
def tokens(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Runs of a token generator with classes, captions and actions: clips of 9 frames of 16 x 16 pixels, stride 4."""
    folder = tmp_path_factory.mktemp("tokens")
    (folder / "tokens").mkdir()
    (folder / "tokens" / "config.yaml").write_text(TOKENS)
    caches = [f"data.{split}.folder={folder / 'cache'}" for split in ("train", "val")]
    return trained(folder, folder / "tokens" / "config.yaml", *caches)


@pytest.fixture(scope="module")
def diffusion(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Runs of text-to-video diffusion: clips of 8 frames of 16 x 16 pixels."""
    folder, file = tmp_path_factory.mktemp("diffusion"), ROOT / "experiments" / "cogvideox" / "config.yaml"
    return trained(folder, file, *DIFFUSION, "callbacks.sampling=null")


@pytest.fixture(scope="module")
def words(tokens: Path) -> str:
    """A caption of the words that the token generator learned."""
    return " ".join(load_trained(tokens, KINDS).task.model.text.vocabulary[:3])


def video_file(folder: Path, frames: int, height: int = 24, width: int = 32) -> Path:
    pixels = np.random.default_rng(0).integers(0, 256, (frames, height, width, 3), dtype=np.uint8)
    write_video(folder / "start.mp4", pixels, 8.0)
    return folder / "start.mp4"


def read(file: Path):
    return load_clip(file, SamplingOptions(sampling="all", frame_factor=1))


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch):
    """Returns a function that calls the command line."""

    def call(*arguments: object) -> None:
        monkeypatch.setattr(sys, "argv", ["generate", *map(str, arguments)])
        entry.main()

    return call


def test_run_is_loaded_with_ema_weights_and_vocabulary(tokens: Path):
    state = torch.get_rng_state()
    run = load_trained(tokens, KINDS)
    assert torch.equal(torch.get_rng_state(), state)
    assert not run.task.training
    saved = torch.load(latest_good_checkpoint(run.path / "checkpoints"), weights_only=True)
    weights = run.task.state_dict()
    assert all(torch.equal(weights[name], value) for name, value in saved["state_dict"].items())
    trained = {f"model.{name}" for name in dict(run.task.model.named_parameters())}
    assert any(not torch.equal(saved["state_dict"][name], saved["current_model_state"][name]) for name in trained)
    assert len(run.task.model.text.vocabulary) > 5


def test_python_call_equals_decoding_the_tokens_of_the_run(tokens: Path, words: str):
    video = generate(
        tokens, prompt=words, labels={"colour": "blue", "shape": 1}, actions=["left"] * 4 + [0] * 4, num_frames=9,
        num_clips=2, seed=3,
    )  # fmt: skip
    assert video.shape == (2, 3, 9, 16, 16)
    assert video.min() >= 0
    assert video.max() <= 1
    task = load_trained(tokens, KINDS).task
    actions = torch.tensor([[1] * 4, [0] * 4]).expand(2, -1, -1)
    labels = {"colour": torch.tensor([2, 2]), "shape": torch.tensor([1, 1])}
    generators = [clip_generators(torch.Generator().manual_seed(seed), 1)[0] for seed in (3, 4)]
    ids = generate_clips(task.model, Conditioning(labels, [words] * 2, actions), 3, task.decoding, generator=generators)
    torch.testing.assert_close(video, (task.tokenizer.decode_ids(ids) + 1) / 2, rtol=1e-5, atol=1e-5)


def test_clips_are_reproducible_and_do_not_depend_on_their_number(tokens: Path, diffusion: Path, words: str):
    for run, prompt in ((tokens, words), (diffusion, MOVES)):
        pair, alone, other = (
            generate(run, prompt=prompt, num_clips=count, seed=seed) for count, seed in ((2, 1), (1, 1), (1, 2))
        )
        torch.testing.assert_close(pair[:1], alone, rtol=1e-4, atol=1e-4)
        assert not torch.allclose(pair[1], alone[0], atol=1e-3)
        assert not torch.allclose(other, alone, atol=1e-3)


def test_length_of_a_clip(tokens: Path, diffusion: Path, words: str):
    assert generate(tokens, prompt=words).shape[2] == 9  # that of the clips of the run
    assert generate(tokens, prompt=words, num_frames=33).shape[2] == 33
    assert generate(tokens, prompt=words, actions=["away"] * 12).shape[2] == 13
    assert generate(tokens, prompt=words, actions=[]).shape[2] == 1
    assert generate(diffusion, prompt=MOVES).shape == (1, 3, 8, 16, 16)
    assert generate(diffusion, prompt=MOVES, num_frames=4).shape == (1, 3, 4, 16, 16)


def test_video_is_continued(tokens: Path, words: str, tmp_path: Path):
    file = video_file(tmp_path, 7)  # of which 5 are used
    video = generate(tokens, prompt=words, video=file, actions=["left"] * 4)
    assert video.shape[2] == 9
    assert generate(tokens, prompt=words, video=file).shape[2] == 13
    assert generate(tokens, prompt=words, video=file, num_frames=9).shape[2] == 9
    task, given = load_trained(tokens, KINDS).task, read(file).pixels[:5]
    small = torch.nn.functional.interpolate(given.float(), scale_factor=2 / 3, mode="bilinear", antialias=True)
    cropped = small[..., small.shape[3] // 2 - 8 : small.shape[3] // 2 + 8].round().clamp(0, 255)
    decoded = task.tokenizer.decode_ids(task.tokenizer.encode_ids(cropped.transpose(0, 1)[None] / 127.5 - 1))
    assert (video[:, :, :5] - (decoded + 1) / 2).abs().mean() < 0.05
    for start, expected in ((9, r"num_frames=9\b.*\b9 frames of the video\b.*\b13\b"), (6, r"\b5 frames\b.*\b9\b")):
        with pytest.raises(ValueError, match=expected):
            generate(tokens, prompt=words, video=video_file(tmp_path, start), num_frames=9 if start == 9 else 5)
    with pytest.raises(FileNotFoundError, match=r"video=.*/none\.mp4"):
        generate(tokens, prompt=words, video=tmp_path / "none.mp4")


def test_first_frame_conditions_image_to_video(tmp_path: Path):
    file = ROOT / "experiments" / "cogvideox_i2v" / "config.yaml"
    run = trained(tmp_path, file, *DIFFUSION)
    start = video_file(tmp_path, 1)
    video = generate(run, prompt=MOVES, video=start, num_clips=2)
    assert video.shape == (2, 3, 8, 16, 16)
    assert not torch.allclose(video[0], generate(run, prompt=MOVES, video=video_file(tmp_path, 1, 16, 64))[0])
    with pytest.raises(ValueError, match="video is missing"):
        generate(run, prompt=MOVES)


def test_causal_diffusion_continues_and_exceeds_the_trained_length(tmp_path: Path):
    """Chunks of two frames, clips of eight."""
    file = ROOT / "experiments" / "diffusion_forcing" / "config.yaml"
    run = trained(tmp_path, file, *DIFFUSION, "callbacks.sampling=null")
    assert generate(run, prompt=MOVES).shape == (1, 3, 8, 16, 16)
    long = open_videos(run, prompt=MOVES, num_frames=20)
    assert long.settings["window"] == 8
    video = torch.cat(list(long.parts), dim=2)
    assert video.shape == (1, 3, 20, 16, 16)
    start = video_file(tmp_path, 5)  # of which 4 are used
    videos = open_videos(run, prompt=MOVES, video=start)
    assert (videos.settings["num_frames"], videos.settings["given_frames"]) == (11, 4)
    made = torch.cat(list(videos.parts), dim=2)
    given = read_frames(start, (16, 16), 4).transpose(0, 1) / 255
    torch.testing.assert_close(made[0, :, :4], given, rtol=0, atol=1e-6)
    assert generate(run, prompt=MOVES, video=start, num_frames=6).shape[2] == 6
    for options, message in (
        ({"video": start, "num_frames": 4}, r"num_frames=4 includes the 4 frames\b.*\b5\b"),
        ({"image": start}, r"video has 1 frames.*\b2 frames"),
        ({"image": start, "video": start}, r"image=.* and video=.* exclude"),
    ):
        with pytest.raises(ValueError, match=message):
            open_videos(run, prompt=MOVES, **options)


def test_video_is_changed_by_partial_noise(diffusion: Path, tmp_path: Path):
    start = video_file(tmp_path, 12)
    given = read_frames(start, (16, 16), 8).transpose(0, 1)[None] / 255
    videos = open_videos(diffusion, prompt=MOVES, video=start, strength=0.25, steps=8, size=(16, 16))
    assert (videos.settings["num_frames"], videos.settings["steps"], videos.settings["strength"]) == (8, 8, 0.25)
    near = torch.cat(list(videos.parts), dim=2)
    far = generate(diffusion, prompt=MOVES, video=start, strength=1.0, steps=8)
    assert (near - given).abs().mean() < 0.7 * (far - given).abs().mean()
    assert generate(diffusion, prompt=MOVES, video=start, strength=0.25, steps=8, num_frames=12).shape[2] == 12
    assert generate(diffusion, prompt=MOVES, size=(16, 24), num_frames=4).shape == (1, 3, 4, 16, 24)


def test_guidance_of_a_request(diffusion: Path):
    """Without guidance the negative caption is refused; with it, the caption changes the clip, as does the scale."""
    options = {"prompt": MOVES, "seed": 5}
    plain, scaled, negative = (
        generate(diffusion, **options, **own)
        for own in ({}, {"guidance": 7.0}, {"guidance": 7.0, "negative": "a blue square moves up"})
    )
    assert not torch.equal(plain, scaled)
    assert not torch.equal(scaled, negative)
    torch.testing.assert_close(generate(diffusion, **options, guidance=2.0), plain)
    task = loading.load_trained(diffusion, KINDS, "cuda" if torch.cuda.is_available() else "cpu").task  # the cached one
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(task, "caption_dropout", 0.0)
        with pytest.raises(ValueError, match=r"guidance=7\.0\b.*task\.caption_dropout=0\b.*negative.*guidance=1\b"):
            open_videos(diffusion, prompt=MOVES, guidance=7.0)
        open_videos(diffusion, prompt=MOVES, guidance=7.0, negative="a blue square moves up")


@pytest.fixture
def captions(tmp_path: Path) -> Path:
    rows = [{"prompt": MOVES}, {"prompt": "a blue square moves up", "seed": 70, "frames": 4}]
    file = tmp_path / "captions.jsonl"
    file.write_text("\n".join(json.dumps(row) for row in rows))
    return file


NAMES = ["0000_a-red-disc-moves-left", "0001_a-red-disc-moves-left", "0002_a-blue-square-moves-up"]
NAMES += ["0003_a-blue-square-moves-up"]


def test_files_of_many_prompts_have_sidecars(diffusion: Path, tmp_path: Path, captions: Path, command, capsys):
    out = tmp_path / "clips"
    command(diffusion, "--out", out, "--prompts", captions, "--per-prompt", 2, "--seed", 5, "--guidance", 3)
    assert sorted(file.stem for file in out.glob("*.mp4")) == NAMES
    assert "generate: 24 of 24 frames" in capsys.readouterr().err
    settings = [json.loads((out / f"{name}.json").read_text()) for name in NAMES]
    assert [each["seed"] for each in settings] == [5, 6, 70, 71]
    assert [each["num_frames"] for each in settings] == [8, 8, 4, 4]
    assert settings[0]["run"] == str(load_trained(diffusion, KINDS).path.resolve())
    assert settings[0]["guidance"] == {"type": "ConstantGuidance", "scale": 3.0, "embedded": None}
    assert (settings[0]["checkpoint"], settings[0]["version"]) == ("step_00000003.ckpt", __version__)
    alone = tmp_path / "alone.mp4"
    command(diffusion, "--out", alone, "--prompt", MOVES, "--seed", 6, "--guidance", 3)
    assert alone.read_bytes() == (out / f"{NAMES[1]}.mp4").read_bytes(), "the same seed gives the same bytes"
    assert json.loads(alone.with_suffix(".json").read_text()) == settings[1]
    assert alone.read_bytes() != (out / f"{NAMES[0]}.mp4").read_bytes()


def test_killed_job_goes_on(diffusion: Path, tmp_path: Path, captions: Path, monkeypatch: pytest.MonkeyPatch):
    prompts, whole, out = read_prompts(captions), tmp_path / "whole", tmp_path / "out"
    generate_files(diffusion, whole, prompts, per_prompt=2)
    count, write = itertools.count(), clip_files.write_videos

    def killed(parts, files, size, fps):
        def some():
            yield from parts
            if next(count) == 2:
                raise KeyboardInterrupt

        write(some(), files, size, fps)

    monkeypatch.setattr(clip_files, "write_videos", killed)
    with pytest.raises(KeyboardInterrupt):
        generate_files(diffusion, out, prompts, per_prompt=2)
    assert [file.name for file in sorted(out.glob("*.mp4"))] == [f"{name}.mp4" for name in NAMES[:2]]
    times = {file: file.stat().st_mtime_ns for file in out.glob("*.mp4")}
    assert generate_files(diffusion, out, prompts, per_prompt=2) == [out / f"{name}.mp4" for name in NAMES]
    assert all(file.stat().st_mtime_ns == before for file, before in times.items()), "complete files are kept"
    for file in whole.iterdir():
        assert file.read_bytes() == (out / file.name).read_bytes()
    with pytest.raises(
        FileExistsError, match=r"0000_.*\.json is of another clip \(steps is 2 and would be 3\).*--overwrite"
    ):
        generate_files(diffusion, out, prompts, per_prompt=2, steps=3)
    generate_files(diffusion, out, prompts, per_prompt=2, steps=3, overwrite=True)
    assert json.loads((out / f"{NAMES[0]}.json").read_text())["steps"] == 3


def test_a_bad_line_is_found_before_anything_is_generated(diffusion: Path, tmp_path: Path):
    with pytest.raises(ValueError, match="zebra"):
        generate_files(diffusion, tmp_path / "out", [{"prompt": MOVES}, {"prompt": "a zebra"}])
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"prompt": "a"}\n{"prompt": 3}', r"line 2: prompt=3 must be of type str"),
        ('{"promt": "a"}', r"line 1: promt='a' is unknown.*prompt, negative, seed"),
        ("[1]", r"line 1 must be an object"),
        ("{", r"line 1 is no JSON"),
        ('{"seed": true}', r"seed=True must be of type int"),
        ("", r"has no captions"),
    ],
)
def test_bad_files_of_prompts_raise(tmp_path: Path, text: str, message: str):
    (tmp_path / "a.jsonl").write_text(text)
    with pytest.raises(ValueError, match=message):
        read_prompts(tmp_path / "a.jsonl")


def test_text_file_of_captions(tmp_path: Path):
    (tmp_path / "a.txt").write_text("# comment\n\n a red disc \nb\n")
    assert read_prompts(tmp_path / "a.txt") == [{"prompt": "a red disc"}, {"prompt": "b"}]
    (tmp_path / "a.jsonl").write_text('{"image": "first.png", "strength": 1}\n')
    assert read_prompts(tmp_path / "a.jsonl") == [{"image": str(tmp_path / "first.png"), "strength": 1}]


def test_names_of_files(tmp_path: Path):
    names = clip_files.clip_files(tmp_path, ["A Big, red disc!", None, "été " * 40])
    assert [file.name for file in names[:2]] == ["0000_a-big-red-disc.mp4", "0001_clip.mp4"]
    assert len(names[2].stem) <= 5 + 48
    with pytest.raises(ValueError, match=r"--out=a\.mp4 is one file for 2 prompts.*folder"):
        clip_files.clip_files("a.mp4", ["a", "b"])


def test_command_writes_the_video_of_the_python_call(tokens: Path, words: str, tmp_path: Path, command, capsys):
    out, start = tmp_path / "new" / "clip.mp4", video_file(tmp_path, 5)
    command(
        *(tokens, "--out", out, "--prompt", words, "--label", "colour=red", "--label", "shape=0", "--seed", 4),
        *("--actions", "left, 0,away,noop", "--video", start, "--frames", 9, "--temperature", 0, "--rounds", 2),
        *("--granularity", "1,2", "--mode", "autoregressive", "--guidance", 2),
    )
    assert f"wrote {out}" in capsys.readouterr().out
    video = generate(
        tokens, prompt=words, labels={"colour": "red", "shape": "0"}, actions=["left", "noop", "away", 0], seed=4,
        video=start,
        decoding={"temperature": 0.0, "rounds": 2, "granularity": (1, 2), "mode": "autoregressive", "guidance": 2.0},
    )  # fmt: skip
    written = read(out)
    assert written.pixels.shape == (9, 3, 16, 16)
    assert np.diff(written.timestamps.numpy()).tolist() == pytest.approx([1 / 8] * 8)  # the rate of the data
    assert (written.pixels.transpose(0, 1) / 255 - video[0]).abs().mean() < 0.06  # chroma is at half resolution
    assert {file.name for file in out.parent.iterdir()} == {"clip.mp4", "clip.json"}


def test_several_clips_are_several_files(diffusion: Path, tmp_path: Path, command):
    command(diffusion, "--out", tmp_path / "clip.mp4", "--prompt", MOVES, "--num", 2, "--guidance", 3.5)
    assert sorted(file.name for file in tmp_path.glob("*.mp4")) == ["clip_0.mp4", "clip_1.mp4"]
    assert (read(tmp_path / "clip_0.mp4").pixels != read(tmp_path / "clip_1.mp4").pixels).any()


def test_existing_file_is_kept_unless_overwrite(diffusion: Path, tmp_path: Path, command):
    out = tmp_path / "clip.mp4"
    out.write_text("mine")
    with pytest.raises(FileExistsError, match=r"--out=.*/clip\.mp4 exists\b.*--overwrite"):
        command(diffusion, "--out", out, "--prompt", MOVES)
    assert out.read_text() == "mine"
    with pytest.raises(ValueError, match="zebra"):
        command(diffusion, "--out", out, "--prompt", "a zebra moves left", "--overwrite")
    assert out.read_text() == "mine"
    command(diffusion, "--out", out, "--prompt", MOVES, "--overwrite")
    assert read(out).pixels.shape == (8, 3, 16, 16)
    assert {file.name for file in tmp_path.iterdir()} == {"clip.mp4", "clip.json"}


def test_interrupted_generation_leaves_no_file(tmp_path: Path):
    (tmp_path / "b.mp4").write_text("mine")

    def parts():
        yield torch.rand(2, 3, 1, 16, 16)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_videos(parts(), [tmp_path / "a.mp4", tmp_path / "b.mp4"], (16, 16), 8.0)
    assert [file.name for file in tmp_path.iterdir()] == ["b.mp4"]
    assert (tmp_path / "b.mp4").read_text() == "mine"


def test_frames_are_written_while_they_are_generated(tokens: Path, words: str, tmp_path: Path):
    written, videos = [], open_videos(tokens, prompt=words, num_frames=41)

    def parts():
        for part in videos.parts:
            written.append((tmp_path / ".clip.mp4.tmp").exists())
            yield part
            assert part.shape[2] in (1, 4)

    write_videos(parts(), [tmp_path / "clip.mp4"], (videos.height, videos.width), videos.fps)
    assert written == [True] * 11
    assert read(tmp_path / "clip.mp4").pixels.shape[0] == 41


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"prompt": None}, "prompt is missing"),
        ({"prompt": "a zebra"}, r"'a zebra'.*'zebra'"),
        ({"labels": {"size": "small"}}, r"size=small\b.*colour, shape"),
        ({"labels": {"colour": "pink"}}, r"colour=pink\b.*red, green, blue, yellow, magenta, cyan or 0 to 5"),
        ({"labels": {"colour": 6}}, r"colour=6\b.*0 to 5"),
        ({"actions": ["jump"] * 8}, r"'jump'.*noop, left, right, away, towards or 0 to 4"),
        ({"actions": [5] * 8}, r"action 5\b.*0 to 4"),
        ({"actions": [0] * 7}, r"actions has 7\b.*pass 4 or 8\b"),
        ({"actions": [0] * 4, "num_frames": 9}, r"actions has 4\b.*num_frames=9 requires 8\b.*num_frames=5\b"),
        ({"num_frames": 10}, r"num_frames=10\b.*\b9 or 13\b"),
        ({"num_frames": 0}, r"num_frames=0\b.*\b1\b"),
        ({"num_clips": 0}, r"num_clips=0\b"),
        ({"seed": -1}, r"seed=-1\b"),
        ({"decoding": {"rounds": 0}}, r"rounds=0\b"),
        ({"decoding": {"granularity": 3}}, r"rows=3 must divide 2\b"),
        ({"decoding": {"heat": 3}}, r"decoding\.heat\b.*temperature"),
        ({"negative": "a"}, r"negative='a' has no effect"),
        ({"steps": 3}, r"steps=3 has no effect.*decoding\.rounds"),
        ({"size": (32, 32)}, r"size=\(32, 32\) must be 16 16"),
        ({"guidance": -2.0}, r"guidance=-2\.0\b"),
    ],
)
def test_arguments_that_do_not_fit_a_token_generator_raise(tokens: Path, words: str, options: dict, message: str):
    with pytest.raises(ValueError, match=message):
        open_videos(tokens, **{"prompt": words, **options})  # before the first frame is generated


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"prompt": None}, "prompt is missing"),
        ({"prompt": "a zebra"}, r"'a zebra'.*'zebra'"),
        ({"labels": {"colour": "red"}}, r"labels=.*'red'"),
        ({"actions": ["left"]}, r"actions=\['left'\]"),
        ({"num_frames": 0}, r"num_frames=0\b"),
        ({"decoding": {"rounds": 2}}, r"decoding\.rounds=2\b.*task\.decoding"),
        ({"guidance": -1.0}, r"guidance=-1\.0\b"),
        ({"video": "start.mp4"}, r"video has no effect.*task\.frame_timesteps=true.*strength"),
        ({"image": "start.mp4"}, r"image or video has no effect"),
        ({"embedded_guidance": 6.0}, r"embedded_guidance=6\.0 has no effect.*guidance"),
        ({"steps": 0}, r"steps=0\b"),
        ({"steps": 2000}, r"steps=2000\b"),
        ({"size": (18, 16)}, r"height=18\b.*\b16 or 20\b"),
        ({"negative": "a red disc", "guidance": 1.0}, r"negative='a red disc' has no effect.*guidance"),
        ({"negative": "a zebra"}, r"'a zebra'.*'zebra'"),
        ({"strength": 0.5}, r"strength=0\.5.*video"),
        ({"video": "start.mp4", "strength": 0.0}, r"strength=0\.0\b.*above 0"),
        ({"video": "start.mp4", "strength": 0.4}, r"strength=0\.4 of steps=2\b.*\b0\.5\b"),
        ({"video": "start.mp4", "strength": 0.5, "num_frames": 3}, r"num_frames=3\b.*\b2\b"),
    ],
)
def test_arguments_that_do_not_fit_diffusion_raise(diffusion: Path, tmp_path: Path, options: dict, message: str):
    for key in ("video", "image"):
        if key in options:
            options = {**options, key: video_file(tmp_path, 2)}
    with pytest.raises(ValueError, match=message):
        generate(diffusion, **{"prompt": MOVES, **options})


def test_conditions_that_a_model_lacks_raise(tokens: Path, tmp_path: Path, words: str):
    """A run without captions, labels and actions."""
    folder = tmp_path / "plain"
    folder.mkdir()
    (folder / "config.yaml").write_text(TOKENS)
    plain = ["model.text=null", "~model.num_classes", "model.num_actions=0", "name=plain"]
    run = trained(
        tmp_path, folder / "config.yaml", *plain, f"data.train.folder={tmp_path}", f"data.val.folder={tmp_path}"
    )
    assert generate(run, num_frames=5).shape == (1, 3, 5, 16, 16)
    for options, message in (
        ({"prompt": words}, r"prompt='.*' has no effect"),
        ({"labels": {"colour": 0}}, r"colour=0\b.*not conditioned on labels"),
        ({"actions": [0] * 8}, r"actions=\[.*num_actions=0"),
    ):
        with pytest.raises(ValueError, match=message):
            open_videos(run, **options)


@pytest.mark.parametrize(
    ("arguments", "kind", "message"),
    [
        (["--out", "clip.webm"], ValueError, r"--out=clip\.webm\b.*\.mp4.*clip\.mp4"),
        (["--out", "clip.mp4", "--num", "0"], ValueError, r"--per-prompt=0\b"),
        (["--out", "clip.mp4", "--prompts", "a.md"], ValueError, r"--prompts=a\.md\b.*\.txt.*\.jsonl"),
        (["--out", "clip.mp4", "--prompts", "a.txt"], FileNotFoundError, r"--prompts=a\.txt\b"),
        (["--out", "clip.mp4", "--prompts", "a.txt", "--prompt", "x"], ValueError, r"--prompt='x'.*--prompts=a\.txt"),
        (["--out", "clip.mp4", "--label", "left"], ValueError, r"--label left\b.*label=class"),
        (["--out", "clip.mp4"], FileNotFoundError, r"nowhere\b.*`make train EXP=<experiment>`"),
    ],
)
def test_command_line_is_checked(command, tmp_path: Path, monkeypatch, arguments: list[str], kind: type, message: str):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(kind, match=message):
        command("nowhere", *arguments)


def copied(run: Path, folder: Path) -> Path:
    """Copies the newest run without its checkpoints."""
    newest = load_trained(run, KINDS).path
    copy = folder / "outputs" / "copy" / newest.name
    copy.mkdir(parents=True)
    for name in ("config.yaml", "run.json"):
        (copy / name).write_bytes((newest / name).read_bytes())
    return copy


def test_run_without_a_valid_checkpoint_raises(diffusion: Path, tmp_path: Path):
    run = copied(diffusion, tmp_path)
    with pytest.raises(FileNotFoundError, match=rf"{run}\b.*no step_\*\.ckpt.*`make train EXP=copy`"):
        generate(run, prompt=MOVES)
    (run / "checkpoints").mkdir()
    (run / "checkpoints" / "step_00000003.ckpt").write_text("damaged")
    with pytest.raises(FileNotFoundError, match=r"step_00000003\.ckpt: .*checksum.*`make train EXP=copy`"):
        generate(run, prompt=MOVES)


def test_changes_of_resumed_sessions_apply(diffusion: Path, tmp_path: Path):
    newest = load_trained(diffusion, KINDS)
    assert newest.task.guidance.scale == 2.0
    run = shutil.copytree(newest.path, tmp_path / "run")
    record = json.loads((run / "run.json").read_text())
    record["resumes"] = [{"changed": [{"path": ["task", "guidance", "scale"], "old": 2.0, "new": 5.0}]}]
    (run / "run.json").write_text(json.dumps(record))
    assert load_trained(run, KINDS).task.guidance.scale == 5.0


def test_run_that_is_not_generative_raises(diffusion: Path, tmp_path: Path):
    run = copied(diffusion, tmp_path)
    other = compose(ROOT / "experiments" / "template" / "config.yaml", ["logger=csv"])
    (run / "config.yaml").write_text(yaml.safe_dump(OmegaConf.to_container(other)))
    with pytest.raises(ValueError, match=rf"{run}\b.*task\._target_=.*MaskedPixels.*FrameGeneration or Diffusion"):
        generate(run, prompt=MOVES)


def test_clips_of_stored_latents_have_the_size_of_their_pixels(tokens: Path, diffusion: Path):
    task = load_trained(diffusion, KINDS).task
    stored = {"moments": torch.zeros(6, 8, 16, 24)}
    clips = ClipFormat.of(task, SimpleNamespace(val=[stored]))
    assert (clips.num_frames, clips.height, clips.width) == (8, 16, 24)
    with pytest.raises(ValueError, match=r"task\.tokenizer=null.*config\.yaml"):
        ClipFormat.of(load_trained(tokens, KINDS).task, SimpleNamespace(val=[{"tokens": torch.zeros(3, 2, 2)}]))
    task.model._autoencoder = None
    with pytest.raises(ValueError, match=r"model\.autoencoder=null.*config\.yaml"):
        ClipFormat.of(task, SimpleNamespace(val=[stored]))


def test_odd_sizes_raise_and_leave_no_file(tmp_path: Path):
    with pytest.raises(ValueError, match=r"15x16 pixels.*clip\.mp4.*16x16"):
        write_videos(iter([torch.rand(1, 3, 1, 15, 16)]), [tmp_path / "clip.mp4"], (15, 16), 8.0)
    assert list(tmp_path.iterdir()) == []


def test_error_of_the_command_is_one_paragraph(tmp_path: Path):
    command = [
        sys.executable,
        "-m",
        "blueberry_video.generate",
        str(tmp_path / "idea" / "run"),
        "--out",
        str(tmp_path / "a.mp4"),
    ]
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "src")}
    result = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert result.returncode == 1
    assert re.match(r"(?s)\nError: .*run\.json", result.stderr)  # lines break at a width
    assert "Traceback" not in result.stderr
