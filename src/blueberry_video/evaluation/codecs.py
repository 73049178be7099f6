"""Comparison of a tokenizer with H.264 and with a codebook of patches at the same number of bits."""

import io
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from lightning import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback
from torch import Tensor

from blueberry_video.evaluation.end_of_run import evaluate_at_end
from blueberry_video.evaluation.reconstruction import psnr
from blueberry_video.nn.clustering import kmeans, nearest

QUALITIES = range(51, 9, -3)  # constant rate factors of x264, worst first
FORMATS = ("yuv420p", "yuv444p")
SLICES = (1, 2, 3, 4, 5)  # types of the units that hold pictures; parameters and user data do not count


class Encoded(NamedTuple):
    """A clip after H.264: bits of its pictures, and the decoded video uint8 (T, H, W, 3)."""

    bits: int
    video: np.ndarray


def h264(video: np.ndarray, crf: int, pixel_format: str = "yuv420p") -> Encoded:
    """Encodes and decodes a video with x264, preset veryslow, tuned for PSNR, one intra frame.

    Args:
        video: uint8 (T, H, W, 3), H and W even.
        crf: constant rate factor, 0 to 51.
        pixel_format: ``yuv420p`` or ``yuv444p``.

    Raises:
        ImportError: if PyAV is not installed.
    """
    import av  # loads FFmpeg

    buffer = io.BytesIO()
    with av.open(buffer, "w", format="h264") as container:
        stream: Any = container.add_stream("libx264", rate=8)
        stream.height, stream.width, stream.pix_fmt = *video.shape[1:3], pixel_format
        stream.options = {"crf": str(crf), "preset": "veryslow", "tune": "psnr", "x264-params": "keyint=9999"}
        for frame in video:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode(None))
    units = buffer.getvalue().split(b"\0\0\1")[1:]
    bits = sum(8 * (len(unit) + 3) for unit in units if unit[0] & 31 in SLICES)
    buffer.seek(0)
    with av.open(buffer, "r", format="h264") as coded:
        decoded = np.stack([frame.to_ndarray(format="rgb24") for frame in coded.decode(video=0)])
    return Encoded(bits, decoded)


def h264_at(videos: Tensor, bits: float) -> tuple[float, float]:
    """Returns mean PSNR in dB and mean bits per clip of H.264 on clips uint8 (N, T, 3, H, W), at ``bits`` a clip.

    All clips have one rate factor, so their bits differ, and the PSNR is interpolated between two factors. Of the
    chroma formats, the better one counts. Where H.264 does not reach ``bits``, its smallest number of bits counts.
    """
    best: tuple[float, float] | None = None
    for pixel_format in FORMATS:
        points: list[tuple[float, float]] = []  # (bits, PSNR) of rising quality
        for crf in QUALITIES:
            made = [h264(clip.permute(0, 2, 3, 1).contiguous().numpy(), crf, pixel_format) for clip in videos]
            decoded = torch.stack([torch.from_numpy(clip.video).permute(0, 3, 1, 2) for clip in made])
            quality = psnr(decoded / 127.5 - 1, videos / 127.5 - 1).mean().item()
            points.append((sum(clip.bits for clip in made) / len(made), quality))
            if points[-1][0] >= bits:
                break
        found = points[-1] if points[-1][0] < bits or len(points) == 1 else _between(points[-2], points[-1], bits)
        best = found if best is None or found[0] < best[0] - 1 or found[1] > best[1] else best
    assert best is not None
    return best[1], best[0]


def patch_codebook_psnr(
    train: Tensor, test: Tensor, stride: tuple[int, int, int], size: int, seed: int = 0, vectors: int = 50_000
) -> float:
    """Mean PSNR in dB of replacing every patch by the nearest of ``size`` k-means centers.

    Args:
        train, test: clips uint8 (N, T, 3, H, W), to find the centers and to reconstruct.
        stride: frames and pixels (t, h, w) of a patch; the first frame is repeated to fill a separate patch.
        size: number of centers.
        seed: of the initial centers.
        vectors: largest number of training patches.
    """
    generator = torch.Generator().manual_seed(seed)
    found = _patches(train, stride)
    found = found[torch.randperm(len(found), generator=generator)[:vectors]]
    different = found.unique(dim=0)
    centers = kmeans(found, different[torch.randperm(len(different), generator=generator)[:size]])
    total = []
    for clip in test:
        patches = _patches(clip[None], stride)
        first = len(patches) // (1 + (clip.shape[0] - 1) // stride[0])  # patches of the first frame, each t copies
        error = (centers[nearest(patches, centers)].clamp(-1, 1) - patches).square()
        error = torch.cat([error[:first].mean(dim=1) / stride[0], error[first:].mean(dim=1)]).sum()
        frames = 1 / stride[0] + (clip.shape[0] - 1) // stride[0]
        total.append(10 * math.log10(4 / max(float(error) / (first * frames), 1e-10)))
    return sum(total) / len(total)


class CodecBaselines(Callback):
    """Measures PSNR in dB on validation clips at the end of training, next to that of codecs with equal bits.

    Logs ``codecs/psnr``, ``codecs/psnr_h264`` (:func:`h264_at`), ``codecs/psnr_patches``
    (:func:`patch_codebook_psnr` with the vocabulary of the model as number of centers), the bits of a clip,
    ``codecs/bits`` and ``codecs/bits_h264``, and the differences ``codecs/gain_h264`` and ``codecs/gain_patches``.

    Args:
        clips: number of validation clips.
        train_clips: number of training clips of the patch codebook.

    Raises:
        ValueError: for numbers below 1; when training begins, if the model is not a tokenizer.
    """

    def __init__(self, clips: int = 64, train_clips: int = 200):
        if min(clips, train_clips) < 1:
            raise ValueError(f"callbacks.codecs.clips={clips} and train_clips={train_clips} must be at least 1.")
        self.clips, self.train_clips = clips, train_clips

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if not hasattr(pl_module.model, "encode_ids"):
            raise ValueError(
                f"callbacks.codecs requires a tokenizer, but model._target_ is {type(pl_module.model).__name__}: set "
                "callbacks.codecs=null, or use model=hydra_tokenizer/tiny."
            )

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        evaluate_at_end(trainer, "codecs", lambda: self._measure(trainer, pl_module))

    def _measure(self, trainer: Trainer, task: LightningModule) -> dict[str, float]:
        model: Any = task.model
        data: Any = trainer.datamodule  # type: ignore[attr-defined]
        test, train = _first(data.val, self.clips), _first(data.train, self.train_clips)
        was_training = model.training
        like = next(model.parameters())
        made = [_reconstructed(model.eval(), clip[None].to(like.device), like.dtype) for clip in test]
        model.train(was_training)
        quality = psnr(torch.cat(made), test.transpose(1, 2) / 127.5 - 1).mean().item()
        positions = math.prod(model.grid(test.shape[1], *test.shape[3:]))
        bits = positions * math.log2(model.vocabulary)
        h264_quality, h264_bits = h264_at(test, bits)
        patches = patch_codebook_psnr(train, test, model.stride, model.vocabulary)
        return {
            "psnr": quality,
            "bits": bits,
            "psnr_h264": h264_quality,
            "bits_h264": h264_bits,
            "psnr_patches": patches,
            "gain_h264": quality - h264_quality,
            "gain_patches": quality - patches,
        }


def _first(dataset: Sequence, count: int) -> Tensor:
    return torch.stack([dataset[i]["video"] for i in range(min(count, len(dataset)))])


@torch.no_grad()
def _reconstructed(model: Any, clip: Tensor, dtype: torch.dtype) -> Tensor:
    video = clip.transpose(1, 2).to(dtype) / 127.5 - 1
    return model.decode_ids(model.encode_ids(video)).float().cpu()


def _between(low: tuple[float, float], high: tuple[float, float], bits: float) -> tuple[float, float]:
    share = (bits - low[0]) / (high[0] - low[0])
    return bits, low[1] + share * (high[1] - low[1])


def _patches(clips: Tensor, stride: tuple[int, int, int]) -> Tensor:
    """Clips uint8 (N, T, 3, H, W) -> patches (patches, values) in [-1, 1], per clip in (t, h, w) order."""
    time, height, width = stride
    clips = torch.cat([clips[:, :1].expand(-1, time - 1, -1, -1, -1), clips], dim=1)
    shape = (-1, time, 3, clips.shape[3] // height, height, clips.shape[4] // width, width)
    split = clips.reshape(len(clips), *shape).permute(0, 1, 4, 6, 2, 3, 5, 7)
    return split.reshape(-1, time * 3 * height * width).float() / 127.5 - 1
