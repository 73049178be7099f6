"""Depth Anything on the CPU, compared with transformers: time of a forward pass with the same weights.

run: python benchmarks/depth.py                       (ViT-S at 518 x 518, 5 repeats)

Both have the same random weights and receive the same image; the largest difference of their maps is printed. They
alternate in one process, so that other work on the machine affects both; medians of CPU seconds are compared.
"""

import argparse
import statistics
import time

import torch
from transformers import DepthAnythingConfig, DepthAnythingForDepthEstimation, Dinov2Config

from blueberry_video.models.depth_anything import DepthAnything
from blueberry_video.models.depth_anything.convert import convert_published
from blueberry_video.models.dinov2 import DINOv2

SIZES = {  # width, blocks, heads, features, out_channels, taps
    "small": (384, 12, 6, 64, (48, 96, 192, 384), (2, 5, 8, 11)),
    "base": (768, 12, 12, 128, (96, 192, 384, 768), (2, 5, 8, 11)),
    "large": (1024, 24, 16, 256, (256, 512, 1024, 1024), (4, 11, 17, 23)),
}


def pair(size: str) -> tuple[DepthAnything, DepthAnythingForDepthEstimation]:
    """The model of this package and that of transformers with equal random weights."""
    width, blocks, heads, features, channels, taps = SIZES[size]
    torch.manual_seed(0)
    backbone = Dinov2Config(
        hidden_size=width,
        num_hidden_layers=blocks,
        num_attention_heads=heads,
        image_size=518,
        patch_size=14,
        out_indices=[tap + 1 for tap in taps],
        apply_layernorm=True,
        reshape_hidden_states=False,
    )
    config = DepthAnythingConfig(
        backbone_config=backbone,
        reassemble_hidden_size=width,
        neck_hidden_sizes=list(channels),
        fusion_hidden_size=features,
    )
    peer = DepthAnythingForDepthEstimation(config).eval()
    torch.nn.init.constant_(peer.head.conv3.bias, 0.5)  # maps above 0
    model = DepthAnything(DINOv2(518, 1, 14, width, blocks, heads, interpolate_offset=0.0), taps, features, channels)
    model.load_state_dict(convert_published(peer.state_dict(), "the peer"))
    return model.eval(), peer


@torch.inference_mode()
def compare(size: str, pixels: int, repeats: int) -> None:
    """Prints the median CPU time of both and the largest difference of their maps."""
    model, peer = pair(size)
    image = torch.randn(1, 3, pixels, pixels)
    forward = {"transformers": lambda: peer(image).predicted_depth, "blueberry": lambda: model(image)}
    maps = {name: run() for name, run in forward.items()}  # also warms up
    taken: dict[str, list[float]] = {name: [] for name in forward}
    for _ in range(repeats):
        for name, run in forward.items():
            start = time.process_time()
            run()
            taken[name].append(time.process_time() - start)
    theirs, ours = (statistics.median(taken[name]) for name in ("transformers", "blueberry"))
    error = (maps["blueberry"] - maps["transformers"]).abs().max() / maps["transformers"].abs().max()
    print(f"{size}, {pixels} x {pixels}, {repeats} repeats, {torch.get_num_threads()} threads, CPU seconds")
    print(f"transformers {theirs:.2f} s    blueberry {ours:.2f} s    {theirs / ours:.2f} x as fast")
    print(f"largest relative difference of the maps: {error:.1e}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--size", choices=SIZES, default="small")
    parser.add_argument("--pixels", type=int, default=518)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    known = parser.parse_args()
    torch.set_num_threads(known.threads)
    compare(known.size, known.pixels, known.repeats)
