"""Comparison with codecs: bits and quality of H.264, patch codebooks, and the callback."""

import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

from blueberry_video.data.sprites import Sprites
from blueberry_video.evaluation import codecs
from blueberry_video.evaluation.codecs import CodecBaselines, h264, h264_at, patch_codebook_psnr
from blueberry_video.evaluation.reconstruction import psnr


def clips(count: int, split: str = "val", size: int = 32) -> torch.Tensor:
    sprites = Sprites(split, count, num_frames=5, image_size=size, background="texture")
    return torch.stack([sprites[i]["video"] for i in range(count)])


def test_h264_trades_bits_for_quality():
    video = clips(1)[0].permute(0, 2, 3, 1).numpy()
    good, bad = h264(video, 18), h264(video, 45)
    assert good.video.shape == bad.video.shape == video.shape
    error = [np.square(made.video.astype(float) - video).mean() for made in (good, bad)]
    assert good.bits > 2 * bad.bits and error[0] < error[1] / 2  # noqa: PT018
    assert bad.bits % 8 == 0


@pytest.mark.parametrize("target", [2500.0, 5000.0])
def test_h264_at_interpolates_to_the_bits(target):
    videos = clips(3)
    quality, bits = h264_at(videos, target)
    assert bits == target
    points = []
    for pixel_format in codecs.FORMATS:
        for crf in codecs.QUALITIES:
            made = [h264(clip.permute(0, 2, 3, 1).contiguous().numpy(), crf, pixel_format) for clip in videos]
            decoded = torch.stack([torch.from_numpy(clip.video).permute(0, 3, 1, 2) for clip in made])
            mean = sum(clip.bits for clip in made) / 3
            points.append((mean, psnr(decoded / 127.5 - 1, videos / 127.5 - 1).mean().item()))
    assert max(q for b, q in points if b <= target) <= quality <= max(q for b, q in points if b <= 1.5 * target)


def test_h264_below_its_smallest_size_keeps_its_smallest_size():
    quality, bits = h264_at(clips(2), 10.0)
    assert bits > 100
    assert 10 < quality < 40


def test_a_codebook_of_all_patches_is_exact():
    colours = torch.tensor([0, 85, 170, 255], dtype=torch.uint8)
    torch.manual_seed(0)
    video = colours[torch.randint(4, (6, 1, 1, 4, 4))].expand(6, 5, 3, 4, 4).contiguous()
    video = video.repeat_interleave(2, 3).repeat_interleave(2, 4)  # patches of 2 x 2 pixels, constant in time
    assert patch_codebook_psnr(video, video, (4, 2, 2), 4, seed=1) > 60
    assert patch_codebook_psnr(video, video, (4, 2, 2), 1) < 15


def test_psnr_of_a_codebook_is_that_of_its_reconstruction():
    train, test = clips(6, "train", 16), clips(1, size=16)
    value = patch_codebook_psnr(train, test, (2, 4, 4), 5, seed=3)
    generator = torch.Generator().manual_seed(3)
    patches = codecs._patches(train, (2, 4, 4))
    patches = patches[torch.randperm(len(patches), generator=generator)]
    different = patches.unique(dim=0)
    centers = codecs.kmeans(patches, different[torch.randperm(len(different), generator=generator)[:5]])
    padded = torch.cat([test[:, :1], test], dim=1)[0] / 127.5 - 1  # (6, 3, 16, 16)
    error = []
    for t in range(0, 6, 2):
        for y in range(0, 16, 4):
            for x in range(0, 16, 4):
                block = padded[t : t + 2, :, y : y + 4, x : x + 4]
                nearest = centers[(centers - block.flatten()).square().sum(1).argmin()].view_as(block).clamp(-1, 1)
                each = (nearest - block).square().mean(dim=(1, 2, 3))
                error += [each.mean().view(1)] if t == 0 else [each]
    assert value == pytest.approx(10 * math.log10(4 / torch.cat(error).mean().item()), abs=1e-3)


class Identity(nn.Module):
    """Tokenizer of one code with a known error."""

    stride, vocabulary = (1, 8, 8), 16

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(1))

    def grid(self, frames, height, width):
        return frames, height // 8, width // 8

    def encode_ids(self, video):
        self.video = video
        return video

    def decode_ids(self, ids):
        return ids * 0.5


def test_the_callback_measures_model_and_baselines_on_the_same_clips(monkeypatch):
    seen = {}
    monkeypatch.setattr(codecs, "h264_at", lambda videos, bits: seen.update(h264=(len(videos), bits)) or (20.0, bits))
    monkeypatch.setattr(
        codecs,
        "patch_codebook_psnr",
        lambda train, test, stride, size: seen.update(patches=(len(train), len(test), stride, size)) or 18.0,
    )
    monkeypatch.setattr(codecs, "evaluate_at_end", lambda trainer, prefix, measure: seen.update({prefix: measure()}))
    sets = SimpleNamespace(val=Sprites("val", 4, 5, 16), train=Sprites("train", 7, 5, 16))
    task = SimpleNamespace(model=Identity(), device=torch.device("cpu"), dtype=torch.float32)
    CodecBaselines(clips=3, train_clips=5).on_fit_end(SimpleNamespace(datamodule=sets), task)
    video = torch.stack([sets.val[i]["video"] for i in range(3)]) / 127.5 - 1
    expected = psnr(video * 0.5, video).mean().item()
    assert seen["codecs"] == {
        "psnr": pytest.approx(expected),
        "bits": 5 * 4 * 4,
        "psnr_h264": 20.0,
        "bits_h264": 80,
        "psnr_patches": 18.0,
        "gain_h264": pytest.approx(expected - 20),
        "gain_patches": pytest.approx(expected - 18),
    }
    assert seen["h264"] == (3, 80) and seen["patches"] == (5, 3, (1, 8, 8), 16)  # noqa: PT018


def test_other_models_and_numbers_raise():
    with pytest.raises(ValueError, match=r"clips=0"):
        CodecBaselines(clips=0)
    task = SimpleNamespace(model=nn.Linear(1, 1))
    with pytest.raises(ValueError, match=r"callbacks\.codecs.*Linear"):
        CodecBaselines().setup(SimpleNamespace(), task, "fit")
