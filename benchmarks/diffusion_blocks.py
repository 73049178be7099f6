"""Training step of video diffusion transformer blocks at full width, compared with diffusers in one run, fp32.

run: python benchmarks/diffusion_blocks.py --threads 1                         (two blocks of CogVideoX-2B: 2 minutes)
     python benchmarks/diffusion_blocks.py --threads 1 --model hunyuan_video   (one dual and one single block)
     python benchmarks/diffusion_blocks.py --threads 1 --compile               (also with torch.compile)

Both have the same weights and inputs, and their steps alternate. Before timing, outputs and gradients are compared; the
benchmark exits with an error if they differ. CPU seconds, summed over threads, are printed in addition to wall-clock
time: use them, with --threads 1, on a machine that runs other work.
"""

import argparse
import os
import statistics
import sys
import time
from collections.abc import Callable
from typing import NamedTuple

import diffusers
import torch
from diffusers.models.transformers.cogvideox_transformer_3d import CogVideoXBlock as TheirCogVideoXBlock
from diffusers.models.transformers.transformer_hunyuan_video import (
    HunyuanVideoSingleTransformerBlock,
    HunyuanVideoTransformerBlock,
)
from torch import Tensor, nn

from blueberry_video.models.cogvideox import blocks as expert_blocks
from blueberry_video.models.hunyuan_video import blocks as dual_stream
from blueberry_video.nn.joint_attention import Shared
from blueberry_video.nn.rope import Rotation, axes_rotation, grid_positions

Forward = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]  # text (1, L, D), video (1, N, D) -> the same


TEXT = {"cogvideox": 226, "hunyuan_video": 256}  # text tokens, as published


class Side(NamedTuple):
    """One implementation: its blocks and their forward pass."""

    blocks: nn.ModuleList
    forward: Forward


def cogvideox(num_video: int) -> tuple[Side, Side, int]:
    """Returns ours, theirs and the width: two blocks of CogVideoX-2B, which has no rotary position embedding."""
    width, heads, condition_dim = 1920, 30, 512
    theirs = nn.ModuleList(
        TheirCogVideoXBlock(width, heads, width // heads, condition_dim, attention_bias=True) for _ in range(2)
    )
    ours = nn.ModuleList(expert_blocks.CogVideoXBlock(width, heads, condition_dim) for _ in range(2))
    embedded = torch.randn(1, condition_dim)

    def our_forward(text: Tensor, video: Tensor) -> tuple[Tensor, Tensor]:
        activated = nn.functional.silu(embedded)[:, None]
        for block in ours:
            text, video = block(text, video, expert_blocks.Condition(activated, activated), Shared(text.shape[1]))
        return text, video

    def their_forward(text: Tensor, video: Tensor) -> tuple[Tensor, Tensor]:
        for block in theirs:
            video, text = block(video, text, embedded)
        return text, video

    return Side(ours, our_forward), Side(theirs, their_forward), width


def hunyuan_video(num_video: int) -> tuple[Side, Side, int]:
    """Returns ours, theirs and the width: a dual- and a single-stream block of HunyuanVideo, text without padding."""
    width, heads, text_len = 3072, 24, TEXT["hunyuan_video"]
    theirs = nn.ModuleList(
        [
            HunyuanVideoTransformerBlock(heads, width // heads, mlp_ratio=4.0),
            HunyuanVideoSingleTransformerBlock(heads, width // heads, mlp_ratio=4.0),
        ]
    )
    ours = nn.ModuleList([dual_stream.DualStreamBlock(width, heads), dual_stream.SingleStreamBlock(width, heads)])
    condition = torch.randn(1, width)
    turn = axes_rotation(grid_positions((1, 1, num_video)).float(), (16, 56, 56), 256.0)
    of_text = torch.zeros(text_len, width // heads)
    rotation = Rotation(torch.cat([of_text + 1, turn.cos])[:, None], torch.cat([of_text, turn.sin])[:, None])

    def our_forward(text: Tensor, video: Tensor) -> tuple[Tensor, Tensor]:
        shared = Shared(text_len, rotation)
        video, text = ours[0](video, text, condition[:, None], condition[:, None], shared)
        both = ours[1](torch.cat([text, video], dim=1), condition[:, None], None, shared)
        return both[:, :text_len], both[:, text_len:]

    def their_forward(text: Tensor, video: Tensor) -> tuple[Tensor, Tensor]:
        video, text = theirs[0](video, text, condition, None, (turn.cos, turn.sin))
        video, text = theirs[1](video, text, condition, None, (turn.cos, turn.sin))
        return text, video

    return Side(ours, our_forward), Side(theirs, their_forward), width


BUILD = {"cogvideox": cogvideox, "hunyuan_video": hunyuan_video}


def step(side: Side, inputs: tuple[Tensor, Tensor]) -> Tensor:
    """Runs forward and backward and returns the output [text, video]. The loss weights channels unequally."""
    side.blocks.zero_grad(set_to_none=True)
    for x in inputs:
        x.grad = None
    output = torch.cat(side.forward(*inputs), dim=1)
    (output * torch.linspace(-1, 1, output.shape[-1])).mean().backward()
    return output.detach()


def check_agreement(ours: Side, theirs: Side, inputs: tuple[Tensor, Tensor]) -> None:
    """Exits unless outputs and gradients agree up to fp32 round-off.

    Excludes the bias of normalized keys: it shifts all scores of a query equally, so its gradient is only round-off.
    """
    found = []
    for side in (ours, theirs):
        output = step(side, inputs)
        gradients = {name: parameter.grad for name, parameter in side.blocks.named_parameters()}
        gradients = {name: gradient for name, gradient in gradients.items() if not name.endswith("norm_k.bias")}
        found.append({"output": output, "text": inputs[0].grad, "video": inputs[1].grad} | gradients)
    mine, other = found
    worst = max(((mine[name] - other[name]).abs().max() / other[name].abs().max()).item() for name in other)
    print(f"largest difference of outputs and {len(other) - 1} gradients: {worst:.1e} of the largest value")
    if worst > 1e-4:
        sys.exit("the implementations compute different results: their times cannot be compared.")


def compare(sides: dict[str, Side], inputs: tuple[Tensor, Tensor], repeats: int, what: str) -> None:
    """Times steps in alternating order and prints medians and their ratio."""
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in sides}
    for repeat in range(repeats):
        for name in list(sides) if repeat % 2 else list(sides)[::-1]:
            start, cpu = time.perf_counter(), time.process_time()
            step(sides[name], inputs)
            times[name].append((time.perf_counter() - start, time.process_time() - cpu))
    print(f"\n{what}, median of {repeats}    step s  fastest s   CPU s")
    medians = []
    for name, rows in times.items():
        wall, cpu = (statistics.median(column) for column in zip(*rows, strict=True))
        medians.append((wall, cpu))
        print(f"  {name:20} {wall:13.3f} {min(rows)[0]:10.3f} {cpu:7.3f}")
    wall, cpu = (a / b for a, b in zip(medians[0], medians[1], strict=True))
    print(f"  diffusers / ours: {wall:.3f} in wall-clock time, {cpu:.3f} in CPU seconds (more than 1: ours is faster)")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", choices=list(BUILD), default="cogvideox")
    parser.add_argument("--tokens", type=int, default=1500, help="tokens of text and video")
    parser.add_argument("--repeats", type=int, default=5, help="timed steps per implementation")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--compile", action="store_true", help="also time both with torch.compile")
    arguments = parser.parse_args()

    torch.set_num_threads(arguments.threads)
    torch.manual_seed(0)
    text_len = TEXT[arguments.model]
    num_video = arguments.tokens - text_len
    ours, theirs, width = BUILD[arguments.model](num_video)
    ours.blocks.load_state_dict(theirs.blocks.state_dict())
    inputs = tuple(torch.randn(1, n, width).requires_grad_() for n in (text_len, num_video))
    print(
        f"{arguments.model}: {len(ours.blocks)} blocks, {width} wide, "
        f"{sum(parameter.numel() for parameter in ours.blocks.parameters()) / 1e6:.0f}M parameters, {text_len} + "
        f"{num_video} tokens, fp32, {arguments.threads} threads, load {os.getloadavg()[0]:.1f}\n"
        f"torch {torch.__version__}, diffusers {diffusers.__version__}"
    )
    check_agreement(ours, theirs, inputs)
    compare({"diffusers": theirs, "ours": ours}, inputs, arguments.repeats, "eager")
    if arguments.compile:
        sides = {
            name: Side(side.blocks, torch.compile(side.forward))
            for name, side in (("diffusers", theirs), ("ours", ours))
        }
        for side in sides.values():
            step(side, inputs)  # compiles
        compare(sides, inputs, arguments.repeats, "compiled")


if __name__ == "__main__":
    main()
