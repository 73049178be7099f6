"""Training step of V-JEPA 2, compared in one run with transformers' encoder, which drops no tokens.

run: python benchmarks/jepa_step.py               (ViT-B, 16 x 224², batch 1, fp32, forward and backward: a few minutes)

One step: features of the full clip from the target encoder, without gradient; encoder, predictor and L1 loss for short
and for long blocks; one backward pass. Ours encodes the visible tokens. transformers' VJEPA2Model encodes all tokens of
a clip with blanked masked patches, so that visible tokens cannot attend to the prediction targets, and passes the
visible ones to its predictor. It also runs one pass per mask; blanking is not timed. "ours, all tokens" does the same
with our encoder, which separates the effect of dropping tokens from that of the implementation.

All have the same weights, masks and clips, and their steps alternate. Before timing, targets and predictions from all
tokens are compared. Optimizer and momentum update are excluded: they are the same for all. CPU seconds, summed over
threads, are printed in addition to wall-clock time: use them, with --threads 1, on a machine that runs other work.
Exits with an error if transformers is missing or the two differ.
"""

import argparse
import os
import statistics
import sys
import time
from collections.abc import Callable

import torch
import transformers
from torch import Tensor
from transformers import VJEPA2Config, VJEPA2Model

from blueberry_video.inference.reconstruction import hide
from blueberry_video.masking import Masks, MultiBlockMasking
from blueberry_video.models.jepa.convert import convert_huggingface
from blueberry_video.models.jepa.losses import latent_loss
from blueberry_video.models.jepa.model import JEPA
from blueberry_video.models.vit import VisionTransformer
from blueberry_video.nn.patches import gather_tokens

MASKINGS = {"short": MultiBlockMasking(8, 0.15), "long": MultiBlockMasking(2, 0.7)}
Step = Callable[[], Tensor]  # returns the loss


def build(image_size: int, num_frames: int, depth: int) -> tuple[JEPA, VJEPA2Model]:
    """Returns ours and transformers' model with the same random weights; our target encoder has the encoder's."""
    config = VJEPA2Config(
        crop_size=image_size,
        frames_per_clip=num_frames,
        hidden_size=768,
        num_hidden_layers=depth,
        num_attention_heads=12,
        pred_num_mask_tokens=2,
    )
    theirs = VJEPA2Model(config).train()
    shape = {"embed_dim": 768, "depth": depth, "num_heads": 12, "qkv_bias": "qkv"}
    encoder = VisionTransformer(image_size, num_frames, **shape, positions="rope_3d", rope_quirk=True)
    ours = JEPA(encoder, rope_quirk=True).train()
    weights = convert_huggingface(theirs.state_dict())
    copied = {name.replace("encoder.", "target_encoder."): x for name, x in weights.items() if name.startswith("enc")}
    ours.load_state_dict(weights | copied)
    return ours, theirs


def steps(ours: JEPA, theirs: VJEPA2Model, video: Tensor, masks: dict[str, Masks]) -> dict[str, Step]:
    """Returns name -> forward pass of one step."""
    blank = {name: hide(ours.encoder, video, mask.keep) for name, mask in masks.items()}
    their_video = video.transpose(1, 2).contiguous()
    their_blank = {name: clip.transpose(1, 2).contiguous() for name, clip in blank.items()}

    def mean_loss(latents: Tensor, predict: Callable[[str, Masks], Tensor]) -> Tensor:
        parts = [latent_loss(predict(name, mask), gather_tokens(latents, mask.target)) for name, mask in masks.items()]
        return torch.stack(parts).mean()

    def with_theirs() -> Tensor:
        with torch.no_grad():
            tokens = theirs(their_video, skip_predictor=True).last_hidden_state
            latents = torch.nn.functional.layer_norm(tokens, tokens.shape[-1:])
        return mean_loss(latents, predict_theirs)

    def predict_theirs(name: str, mask: Masks) -> Tensor:
        output = theirs(their_blank[name], context_mask=[mask.keep], target_mask=[mask.target])
        return output.predictor_output.last_hidden_state

    def predict_from_all(name: str, mask: Masks) -> Tensor:
        context = gather_tokens(ours.encoder(blank[name]), mask.keep)
        return ours.predictor(context, mask.keep, mask.target, 1)  # transformers always uses the second mask token

    return {
        "transformers": with_theirs,
        "ours, all tokens": lambda: mean_loss(ours.targets(video), predict_from_all),
        "ours": lambda: mean_loss(ours.targets(video), lambda _, mask: ours(video, mask.keep, mask.target, 1)),
    }


def check_agreement(forwards: dict[str, Step]) -> None:
    """Exits unless the two that encode all tokens have equal losses."""
    with torch.no_grad():
        values = {name: forward().item() for name, forward in forwards.items()}
    print("loss: " + ", ".join(f"{name} {value:.6f}" for name, value in values.items()))
    if abs(values["transformers"] - values["ours, all tokens"]) > 1e-4:
        sys.exit("the models compute different results: their times cannot be compared.")


def timed(forward: Step, model: torch.nn.Module) -> tuple[float, float]:
    """Returns wall-clock and CPU seconds of a step."""
    model.zero_grad(set_to_none=True)
    start, cpu = time.perf_counter(), time.process_time()
    forward().backward()
    return time.perf_counter() - start, time.process_time() - cpu


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--image-size", type=int, default=224)
    parser.add_argument("--frames", type=int, default=16)
    parser.add_argument("--depth", type=int, default=12, help="encoder blocks")
    parser.add_argument("--batch", type=int, default=1, help="clips per step")
    parser.add_argument("--repeats", type=int, default=3, help="timed steps per implementation")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    arguments = parser.parse_args()

    torch.set_num_threads(arguments.threads)
    torch.manual_seed(0)
    ours, theirs = build(arguments.image_size, arguments.frames, arguments.depth)
    video = torch.rand(arguments.batch, *ours.encoder.video_size)
    grid, generator = ours.encoder.grid(video.shape), torch.Generator().manual_seed(0)
    masks = {name: masking(arguments.batch, grid, generator) for name, masking in MASKINGS.items()}
    seen = ", ".join(f"{name} {mask.keep.shape[1]} + {mask.target.shape[1]}" for name, mask in masks.items())
    print(
        f"ViT, width 768, depth {arguments.depth}, batch {arguments.batch}, {arguments.frames} x "
        f"{arguments.image_size}², fp32, {arguments.threads} threads, load {os.getloadavg()[0]:.1f}\n"
        f"torch {torch.__version__}, transformers {transformers.__version__}\n"
        f"visible + predicted of {ours.encoder.num_tokens} tokens: {seen}"
    )
    forwards = steps(ours, theirs, video, masks)
    check_agreement(forwards)

    times: dict[str, list[tuple[float, float]]] = {name: [] for name in forwards}
    for repeat in range(arguments.repeats):
        for name in list(forwards) if repeat % 2 else list(forwards)[::-1]:
            times[name].append(timed(forwards[name], theirs if name == "transformers" else ours))

    print(f"\n{f'median of {arguments.repeats}':18} step s  fastest s  CPU s")
    medians = {}
    for name, rows in times.items():
        wall, cpu = (statistics.median(column) for column in zip(*rows, strict=True))
        medians[name] = wall, cpu
        print(f"{name:18} {wall:6.2f} {min(rows)[0]:10.2f} {cpu:6.2f}")
    for name in ("transformers", "ours, all tokens"):
        wall, cpu = (a / b for a, b in zip(medians[name], medians["ours"], strict=True))
        print(f"{name} / ours: {wall:.2f} in wall-clock time, {cpu:.2f} in CPU seconds (more than 1: ours is faster)")


if __name__ == "__main__":
    main()
