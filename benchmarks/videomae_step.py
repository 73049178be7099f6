"""Training step of VideoMAE, forward and backward, compared with transformers' implementation in one run.

run: python benchmarks/videomae_step.py            (ViT-B, 16 x 224², batch 2, tube masks 0.9, fp32: a few minutes)

Both models have the same weights, masks, clips, loss and number of threads, and their steps alternate. Before timing,
losses and gradients are compared. The optimizer is excluded: it is the same for both. Our step includes normalizing the
pixels; transformers' model receives normalized ones. CPU seconds, summed over threads, are printed in addition to
wall-clock time: use them on a machine that runs other work. Exits with an error if transformers is missing or the two
differ.
"""

import argparse
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
import transformers
from torch import Tensor, nn
from transformers import VideoMAEConfig, VideoMAEForPreTraining

from blueberry_video.masking import TubeMasking
from blueberry_video.models.masked_autoencoder.convert import convert_huggingface
from blueberry_video.models.masked_autoencoder.model import MaskedAutoencoder
from blueberry_video.models.vit import VisionTransformer
from blueberry_video.tasks.base import IMAGENET_MEAN, IMAGENET_STD
from blueberry_video.tasks.masked_pixels import masked_pixel_loss

SIZES = {  # encoder width, depth, heads; decoder width, depth, heads
    "small": (384, 12, 6, 192, 4, 3),
    "base": (768, 12, 12, 384, 4, 6),
    "large": (1024, 24, 16, 512, 12, 8),
}


def build(size: str, attention: str) -> tuple[MaskedAutoencoder, VideoMAEForPreTraining]:
    """Returns ours and transformers' model with the same random weights, including q and v biases."""
    width, depth, heads, decoder_width, decoder_depth, decoder_heads = SIZES[size]
    config = VideoMAEConfig(
        hidden_size=width,
        num_hidden_layers=depth,
        num_attention_heads=heads,
        intermediate_size=4 * width,
        decoder_hidden_size=decoder_width,
        decoder_num_hidden_layers=decoder_depth,
        decoder_num_attention_heads=decoder_heads,
        decoder_intermediate_size=4 * decoder_width,
        use_mean_pooling=False,  # a LayerNorm after the encoder, as in the original
        layer_norm_eps=1e-6,
        attn_implementation=attention,
    )
    theirs = VideoMAEForPreTraining(config)
    theirs.decoder.norm.eps = 1e-6
    for parameter in theirs.parameters():
        if not parameter.any():  # biases and the mask token start at 0
            nn.init.normal_(parameter, std=0.02)
    encoder = VisionTransformer(embed_dim=width, depth=depth, num_heads=heads)
    ours = MaskedAutoencoder(encoder, decoder_width, decoder_depth, decoder_heads)
    ours.load_state_dict(convert_huggingface(theirs.state_dict()))
    return ours, theirs


def losses(ours: MaskedAutoencoder, theirs: VideoMAEForPreTraining, batch: int) -> dict[str, Callable[[], Tensor]]:
    """Returns name -> forward pass, on the same clips and masks."""
    video = torch.rand(batch, 3, 16, 224, 224)
    mean, std = (torch.tensor(x).view(3, 1, 1, 1) for x in (IMAGENET_MEAN, IMAGENET_STD))
    keep, target, _ = TubeMasking(0.9)(batch, ours.encoder.grid(video.shape))
    masked = torch.zeros(batch, ours.encoder.num_tokens, dtype=torch.bool).scatter(1, target, True)
    pixel_values = ((video - mean) / std).transpose(1, 2).contiguous()
    return {
        "transformers": lambda: theirs(pixel_values=pixel_values, bool_masked_pos=masked).loss,
        "ours": lambda: masked_pixel_loss(
            ours((video - mean) / std, keep, target), video, target, ours.encoder.patch_size
        ),
    }


def check_agreement(models: dict[str, nn.Module], forwards: dict[str, Callable[[], Tensor]]) -> None:
    """Exits unless loss and patch-embedding gradient, which depends on all layers, agree to a tolerance of 1e-4."""
    values = {name: forward() for name, forward in forwards.items()}
    gradients = {}
    for name, value in values.items():
        value.backward()
        gradients[name] = next(p for p in models[name].parameters() if p.ndim == 5).grad
    worst = (gradients["ours"] - gradients["transformers"]).abs().max() / gradients["transformers"].abs().max()
    print(
        f"loss: ours {values['ours']:.7f}, transformers {values['transformers']:.7f}; gradients differ by {worst:.1e}"
    )
    if abs(values["ours"] - values["transformers"]) > 1e-4 or worst > 1e-4:
        sys.exit("the models compute different results: their times cannot be compared.")


def timed_step(model: nn.Module, forward: Callable[[], Tensor]) -> tuple[float, float, float]:
    """Returns seconds of the forward and the backward pass, and CPU seconds of both."""
    model.zero_grad(set_to_none=True)
    start, cpu = time.perf_counter(), time.process_time()
    loss = forward()
    middle = time.perf_counter()
    loss.backward()
    return middle - start, time.perf_counter() - middle, time.process_time() - cpu


def cpu_name() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.processor()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--size", choices=SIZES, default="base")
    parser.add_argument("--batch", type=int, default=2, help="clips per step")
    parser.add_argument("--repeats", type=int, default=7, help="timed steps per model")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--attention", choices=("sdpa", "eager"), default="sdpa", help="transformers' attention")
    arguments = parser.parse_args()

    torch.set_num_threads(arguments.threads)
    torch.manual_seed(0)
    ours, theirs = build(arguments.size, arguments.attention)
    models: dict[str, nn.Module] = {"transformers": theirs.train(), "ours": ours.train()}
    forwards = losses(ours, theirs, arguments.batch)
    print(
        f"VideoMAE-{arguments.size}, batch {arguments.batch}, 16 x 224², tube 0.9, fp32, {arguments.threads} threads, "
        f"{cpu_name()}, load {os.getloadavg()[0]:.1f}\n"
        f"torch {torch.__version__}, transformers {transformers.__version__} ({theirs.config._attn_implementation})"
    )
    check_agreement(models, forwards)  # also warms up

    times: dict[str, list[tuple[float, float, float]]] = {name: [] for name in models}
    for repeat in range(arguments.repeats):
        for name in list(models) if repeat % 2 else list(models)[::-1]:
            times[name].append(timed_step(models[name], forwards[name]))

    print(f"\n{f'median of {arguments.repeats}':14} forward  backward      step  fastest  CPU seconds")
    medians = {}
    for name, rows in times.items():
        forward, backward, cpu = (statistics.median(column) for column in zip(*rows, strict=True))
        steps = [row[0] + row[1] for row in rows]
        medians[name] = statistics.median(steps), cpu
        print(f"{name:14} {forward:7.3f} {backward:9.3f} {medians[name][0]:9.3f} {min(steps):8.3f} {cpu:12.3f}")
    wall, cpu = (a / b for a, b in zip(medians["ours"], medians["transformers"], strict=True))
    print(f"\nours / transformers: {wall:.3f} in wall-clock time, {cpu:.3f} in CPU seconds (1 or less: not slower)")


if __name__ == "__main__":
    main()
