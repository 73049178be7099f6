"""Training step of VideoMAE V2 (ViT-B/16) with dual masking, compared with decoding all masked tokens.

run: python benchmarks/dual_masking.py             (16 x 224², batch 2, fp32, forward and backward: a few minutes)

One model with the same clips and visible tokens; the steps of the two masks alternate. The optimizer is excluded: it is
the same for both. Targets are normalized within the step. CPU seconds, summed over threads, are printed in addition to
wall-clock time: use them, with --threads 1, on a machine that runs other work, because time spent waiting for other
threads counts. FLOPs are of the decoder's forward pass on one clip; ViT-g/14 is counted but not timed.
"""

import argparse
import os
import statistics
import time

import torch
from torch import Tensor

from blueberry_video.masking import DualMasking, Masks, TubeMasking
from blueberry_video.models.masked_autoencoder.model import MaskedAutoencoder, decoder_flops
from blueberry_video.models.vit import VisionTransformer
from blueberry_video.tasks.masked_pixels import masked_pixel_loss

SIDES = {"single": TubeMasking(0.9), "dual": DualMasking(TubeMasking(0.9))}


def base() -> MaskedAutoencoder:
    return MaskedAutoencoder(VisionTransformer(), decoder_dim=384, decoder_depth=4, decoder_num_heads=6)


def giant() -> MaskedAutoencoder:
    encoder = VisionTransformer(patch_size=14, embed_dim=1408, depth=40, num_heads=16, mlp_ratio=48 / 11)
    return MaskedAutoencoder(encoder, decoder_dim=512, decoder_depth=4, decoder_num_heads=8, mlp_ratio=48 / 11)


def draw(model: MaskedAutoencoder, batch: int) -> dict[str, Masks]:
    """Draws the masks of both sides from one seed, so that the encoder receives the same tokens."""
    grid = model.encoder.grid(model.encoder.video_size)
    return {name: masking(batch, grid, torch.Generator().manual_seed(0)) for name, masking in SIDES.items()}


def print_operations(name: str, model: MaskedAutoencoder) -> None:
    flops = {}
    for side, masks in draw(model, 1).items():
        scored = masks.target.shape[1] if masks.scored is None else int(masks.scored.sum())
        visible, targets = masks.keep.shape[1], masks.target.shape[1]
        flops[side] = decoder_flops(model, visible, targets)
        print(
            f"{name:9} {side:7} {visible:4} visible, {targets:4} predicted, {scored:4} scored: "
            f"{flops[side] / 1e9:7.2f} GFLOPs"
        )
    print(f"{name:9} single / dual: {flops['single'] / flops['dual']:.3f}\n")


def timed_step(model: MaskedAutoencoder, video: Tensor, masks: Masks) -> tuple[float, float, float]:
    """Returns seconds of the forward and the backward pass, and CPU seconds of both."""
    model.zero_grad(set_to_none=True)
    start, cpu = time.perf_counter(), time.process_time()
    predicted = model(video, masks.keep, masks.target)
    loss = masked_pixel_loss(predicted, video, masks.target, model.encoder.patch_size, masks.scored)
    middle = time.perf_counter()
    loss.backward()
    return middle - start, time.perf_counter() - middle, time.process_time() - cpu


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--batch", type=int, default=2, help="clips per step")
    parser.add_argument("--repeats", type=int, default=5, help="timed steps per side")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    arguments = parser.parse_args()

    torch.set_num_threads(arguments.threads)
    torch.manual_seed(0)
    model = base().train()
    print_operations("ViT-B/16", model)
    with torch.device("meta"):
        large = giant()
    print_operations("ViT-g/14", large)

    video, masks = torch.rand(arguments.batch, *model.encoder.video_size), draw(model, arguments.batch)
    assert torch.equal(masks["single"].keep, masks["dual"].keep)
    for side in SIDES:
        timed_step(model, video, masks[side])  # warms up
    times: dict[str, list[tuple[float, float, float]]] = {side: [] for side in SIDES}
    for repeat in range(arguments.repeats):
        for side in list(SIDES) if repeat % 2 else list(SIDES)[::-1]:
            times[side].append(timed_step(model, video, masks[side]))

    print(f"ViT-B/16, batch {arguments.batch}, {arguments.threads} threads, load {os.getloadavg()[0]:.1f}")
    print(f"{f'median of {arguments.repeats}':14} forward ms  backward ms  step ms  fastest ms  CPU ms")
    medians = {}
    for side, rows in times.items():
        forward, backward, cpu = (1000 * statistics.median(column) for column in zip(*rows, strict=True))
        steps = [1000 * (row[0] + row[1]) for row in rows]
        medians[side] = statistics.median(steps), cpu
        print(f"{side:14} {forward:10.0f} {backward:12.0f} {medians[side][0]:8.0f} {min(steps):11.0f} {cpu:7.0f}")
    wall, cpu = (a / b for a, b in zip(medians["single"], medians["dual"], strict=True))
    print(f"\nsingle / dual: {wall:.3f} in wall-clock time, {cpu:.3f} in CPU seconds (more than 1: dual is faster)")


if __name__ == "__main__":
    main()
