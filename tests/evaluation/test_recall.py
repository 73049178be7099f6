"""Callback Recall on rollouts that remember, forget or confuse the object, and with a generator in a run."""

import json
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn

from blueberry_video.data.datamodule import DataModule
from blueberry_video.data.memory_world import MemoryWorld
from blueberry_video.evaluation.recall import Away, Recall
from blueberry_video.inference.frame_generation import FrameDecoding
from blueberry_video.inference.rollout import Rollout
from blueberry_video.models.hydra_video.generator import HydraVideoGenerator
from blueberry_video.optim import constant
from blueberry_video.tasks.frame_generation import FrameGeneration
from blueberry_video.tasks.settings import Optimization

COUNT = 12


class Pixels(nn.Module):
    """Tokenizer stand-in: every token is the colour of a pixel with 4 bits a channel, of every ``stride``-th frame."""

    vocabulary = 16**3

    def __init__(self, stride: int = 1):
        super().__init__()
        self.stride = stride

    def encode_ids(self, video: Tensor) -> Tensor:
        levels = ((video[:, :, :: self.stride] + 1) / 2 * 15).round().long()
        return (levels[:, 0] * 16 + levels[:, 1]) * 16 + levels[:, 2]

    def decode_ids(self, ids: Tensor) -> Tensor:
        video = torch.stack([ids // 256, ids // 16 % 16, ids % 16], dim=1) / 15 * 2 - 1
        return torch.cat([video[:, :, :1], video[:, :, 1:].repeat_interleave(self.stride, 2)], dim=2)


class Memory:
    """Rollout stand-in: repeats the first frame of the prompt, rolled by ``mistaken`` clips, or gray after a reset."""

    def __init__(self, mistaken: int = 0):
        self.mistaken, self.calls = mistaken, []

    def __call__(self, model, prompt_ids, actions, reset_at, generator):
        self.calls.append((prompt_ids.shape[1], tuple(actions.shape), reset_at, tuple(generator)))
        frame = prompt_ids[:, :1].roll(self.mistaken, 0)
        if reset_at is not None:
            frame = torch.full_like(frame, 8 * (256 + 16 + 1))
        return torch.cat([prompt_ids, frame.expand(-1, actions.shape[1] + 1 - prompt_ids.shape[1], -1, -1)], dim=1)


def task(stride: int = 1) -> SimpleNamespace:
    return SimpleNamespace(model=nn.Linear(1, 1), tokenizer=Pixels(stride), device=torch.device("cpu"))


def clips(unseen: int, size: int = COUNT, **changes) -> MemoryWorld:
    return MemoryWorld("val", size, unseen + 9, 32, unseen, **{"supersample": 1, **changes})


def test_a_rollout_that_remembers_scores_one_and_without_an_object_zero():
    module = task()
    found = Recall([clips(8), clips(16)], Memory(), count=COUNT, batch_size=5).measure(module)
    assert not module.model.training
    names = {"colour": 1 / 6, "size": 1 / 2, "shape": 1 / 3}
    kinds = {"", "_reset", "_trivial", "_coded", "_real"}
    expected = {f"{name}_{n}{kind}" for n in (8, 16) for name in (*names, "overlap", "found") for kind in kinds}
    absent = {name for n in (8, 16) for name in (f"overlap_{n}_real", f"found_{n}_trivial")}
    assert found.keys() == (expected - absent) | {"colour_8_gain", "colour_16_gain"}
    for n in (8, 16):
        for name, chance in names.items():
            assert found[f"{name}_{n}_trivial"] == chance
            assert found[f"{name}_{n}_reset"] == 0
        assert (found[f"found_{n}"], found[f"found_{n}_real"], found[f"found_{n}_reset"]) == (1, 1, 0)
        assert (found[f"colour_{n}"], found[f"colour_{n}_real"], found[f"colour_{n}_coded"]) == (1, 1, 1)
        assert found[f"colour_{n}_gain"] == pytest.approx(5 / 6)
        assert found[f"size_{n}"] == found[f"size_{n}_real"] == 1
        assert found[f"shape_{n}"] == found[f"shape_{n}_coded"] > 0.6
        assert found[f"overlap_{n}"] == found[f"overlap_{n}_coded"] > 0.9
        assert found[f"overlap_{n}_reset"] == 0
        assert found[f"overlap_{n}_trivial"] < 0.5


def test_a_rollout_that_returns_the_object_of_a_different_clip_scores_what_they_share():
    world = clips(8)
    found = Recall([world], Memory(mistaken=1), count=COUNT, batch_size=COUNT).measure(task())
    labels = torch.tensor([[world[i]["labels"][name] for i in range(COUNT)] for name in ("colour", "size")])
    shared = (labels == labels.roll(1, 1)).float().mean(1)
    assert (found["colour_8"], found["size_8"]) == (pytest.approx(shared[0].item()), pytest.approx(shared[1].item()))
    assert found["overlap_8"] == pytest.approx(found["overlap_8_trivial"], abs=0.03)


@pytest.mark.parametrize(
    ("stride", "prompt", "known", "reset_at"),
    [(1, "seen", 5, 9), (2, "seen", 3, 5), (4, "seen", 2, 3), (1, "away", 13, 9), (4, "away", 4, 3)],
)
def test_prompts_actions_and_resets_follow_the_stride_of_the_tokenizer(stride, prompt, known, reset_at):
    memory = Memory()
    Recall([clips(8)], memory, count=6, batch_size=4, prompt=prompt, seed=10).measure(task(stride))
    shape = (16 // stride, stride)
    assert memory.calls == [
        (known, (size, *shape), at, seeds)
        for size, seeds in ((4, (10, 11, 12, 13)), (2, (14, 15)))
        for at in (None, reset_at)
    ]


@pytest.mark.parametrize(
    ("seen", "unseen", "stride", "expected"),
    [
        (5, 8, 1, Away(5, 12, 5, 9, 13)),
        (5, 8, 4, Away(5, 12, 2, 3, 4)),
        (5, 4, 4, Away(5, 8, 2, 2, 3)),
        (4, 8, 4, Away(4, 11, 1, 2, 3)),  # frame 1 of the tokens contains frames 1 to 4, frame 2 contains 5 to 8
        (6, 7, 4, Away(6, 12, 2, 3, 4)),
    ],
)
def test_frames_of_tokens_without_the_object(seen: int, unseen: int, stride: int, expected: Away):
    visible = torch.tensor([True] * seen + [False] * unseen + [True] * 5)
    assert Away.of(visible, stride) == expected


@pytest.mark.parametrize(
    ("visible", "stride", "expected"),
    [
        ([1, 1, 1, 1], 1, "1, 1, 1, 1"),
        ([0, 1, 1, 1], 1, "0, 1, 1, 1"),
        ([1, 0, 1, 0, 1, 1], 1, "1, 0, 1, 0, 1, 1"),
        ([1, 0, 0, 1], 1, "1, 0, 0, 1"),
        ([1, 1, 0, 0, 0, 0, 1, 1, 1], 4, "unseen frames 2 to 5 .*stride 4.*unseen=8"),
    ],
)
def test_clips_without_whole_unseen_frames_raise(visible: list[int], stride: int, expected: str):
    with pytest.raises(ValueError, match=expected):
        Away.of(torch.tensor(visible).bool(), stride)


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"count": 0}, r"callbacks\.recall\.count: 0"),
        ({"batch_size": 0}, r"callbacks\.recall\.batch_size: 0"),
        ({"clips": []}, r"callbacks\.recall\.clips: 0"),
        ({"prompt": "all", "name": "memory"}, r"callbacks\.memory\.prompt='all'.*'seen'.*'away'"),
    ],
)
def test_settings_out_of_range_raise(options: dict, expected: str):
    with pytest.raises(ValueError, match=expected):
        Recall(**{"clips": [clips(8)], "rollout": Memory(), **options})


def test_data_that_do_not_fit_raise():
    with pytest.raises(ValueError, match=r"count=12 .*11 clips"):
        Recall([clips(8, 11)], Memory(), count=12).measure(task())
    with pytest.raises(ValueError, match=r"two datasets measure colour_8"):
        Recall([clips(8, 2), clips(8, 2)], Memory(), count=2).measure(task())
    mixed = MemoryWorld("val", 20, 25, 16, [4, 16], supersample=1)
    for batch_size in (1, 20):
        with pytest.raises(ValueError, match="the same unseen frames"):
            Recall([mixed], Memory(), count=20, batch_size=batch_size).measure(task())


class Coarse(Pixels):
    """The same with one token a frame, the mean colour of 1 bit a channel."""

    vocabulary = 8

    def check(self, *size: int) -> None:
        pass

    def grid(self, num_frames: int, height: int, width: int) -> tuple[int, int, int]:
        return num_frames, 1, 1

    def encode_ids(self, video: Tensor) -> Tensor:
        bits = (video.mean((3, 4), keepdim=True) > 0).long()
        return (bits[:, 0] * 2 + bits[:, 1]) * 2 + bits[:, 2]

    def decode_ids(self, ids: Tensor) -> Tensor:
        return (torch.stack([ids // 4, ids // 2 % 2, ids % 2], dim=1) * 2.0 - 1).expand(-1, -1, -1, 16, 16)


def test_a_run_logs_the_recall_of_its_generator(trainer, tmp_path):
    model = HydraVideoGenerator(8, (1, 1), 8, 1, 1.0, head_dim=8, state_dim=2, num_actions=3)
    optimization = Optimization(partial(torch.optim.AdamW, lr=1e-3), constant)
    module = FrameGeneration(model, optimization, tokenizer=Coarse(), num_pictures=1)
    options = {"num_frames": 8, "image_size": 16, "unseen": 2, "seen": 2, "supersample": 1}
    data = DataModule(MemoryWorld("train", 4, **options), MemoryWorld("val", 2, **options), batch_size=2)
    recall = Recall([MemoryWorld("val", 3, **options)], Rollout(FrameDecoding(1, "frame")), count=3, batch_size=2)
    fit = trainer(recall, max_steps=1)
    fit.fit(module, datamodule=data)
    assert fit.callback_metrics["recall/colour_2_real"] == 1
    names = {"recall/colour_2", "recall/colour_2_reset", "recall/overlap_2_reset", "recall/shape_2_trivial"}
    assert names <= fit.callback_metrics.keys()
    recorded = json.loads((tmp_path / "end_of_run.json").read_text())["results"]["recall"]
    assert recorded["colour_2"] == fit.callback_metrics["recall/colour_2"]
