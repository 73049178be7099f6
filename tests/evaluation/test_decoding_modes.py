"""DecodingModes callback: metrics of each decoding on perfect and constant generators."""

import math
from types import SimpleNamespace

import pytest
import torch

from blueberry_video.data.moving_shapes import MovingShapes
from blueberry_video.evaluation.decoding_modes import DecodingModes
from blueberry_video.evaluation.generated_shapes import GeneratedShapes
from blueberry_video.evaluation.shape_metrics import nearest_psnr
from blueberry_video.inference.frame_generation import FrameDecoding

REAL = [MovingShapes("train", 1), MovingShapes("val", 1, 72)]
CLIPS = {
    clip["caption"]: clip["video"].transpose(0, 1).float() / 127.5 - 1 for clip in map(REAL[0].__getitem__, range(36))
}
DECODINGS = {"cached": FrameDecoding(2, "row"), "parallel": FrameDecoding(4, mode="parallel")}


class Tokenizer:
    """Darkens clips by 0.5 of the range."""

    def grid(self, frames: int, height: int, width: int) -> tuple[int, int, int]:
        return frames, 4, 4

    def encode_ids(self, video: torch.Tensor) -> torch.Tensor:
        return video

    def decode_ids(self, video: torch.Tensor) -> torch.Tensor:
        return video - 1


def task():
    """A task that is right in mode ``parallel``, and ignores the caption otherwise."""
    made = SimpleNamespace(tokenizer=Tokenizer(), model=SimpleNamespace(grid=(4, 4)), decoding="unchanged")

    def generate(captions, generator):
        same = next(iter(CLIPS.values()))
        right = made.decoding is DECODINGS["parallel"]
        return torch.stack([CLIPS[caption] if right else same for caption in captions])

    made.generate = generate
    return made


def test_metrics_are_those_of_each_decoding():
    module = task()
    found = DecodingModes(DECODINGS, GeneratedShapes(36, 36), REAL).measure(module)
    assert [found[f"parallel_{label}"] for label in ("colour", "shape", "direction")] == [1, 1, 1]
    assert [found[f"cached_{label}"] for label in ("colour", "shape", "direction")] == pytest.approx(
        [1 / 3, 1 / 3, 1 / 4]
    )
    assert (found["cached_evaluations"], found["parallel_evaluations"]) == (5 * 16, 5 * 16)
    assert found["coded_psnr"] == pytest.approx(10 * math.log10(4))
    assert found["parallel_psnr"] == pytest.approx(10 * math.log10(4 / 1e-10))
    assert found["cached_psnr"] < 25
    assert found["cached_ms"] >= 0
    assert module.decoding == "unchanged"


def test_the_nearest_clip_has_the_same_caption():
    real = torch.stack([torch.zeros(3, 2, 4, 4), torch.ones(3, 2, 4, 4), torch.full((3, 2, 4, 4), -1.0)])
    found = nearest_psnr(torch.zeros(2, 3, 2, 4, 4), ["a", "b"], real, ["a", "b", "b"])
    assert found.tolist() == pytest.approx([10 * math.log10(4 / 1e-10), 10 * math.log10(4)])
    with pytest.raises(ValueError, match=r"captions\b.*'c'"):
        nearest_psnr(torch.zeros(1, 3, 2, 4, 4), ["c"], real, ["a", "b", "b"])


def test_no_decodings_raise():
    with pytest.raises(ValueError, match=r"callbacks\.decoding\.decodings\b"):
        DecodingModes({}, GeneratedShapes(36, 36), REAL)
