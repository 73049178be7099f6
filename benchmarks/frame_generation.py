"""Generation of video tokens frame by frame: memory and time per frame, and the gain of states over recomputation.

run: python benchmarks/frame_generation.py     (tiny sizes at 64 x 64 pixels, fp32: ten minutes)

Memory: 16 and 512 frames of tokens are generated and decoded to pixels as a stream, each in a separate process; the
peak memory, and the median CPU time per frame of tokens early and late. Recomputation: the same frame after 64 frames,
decoded in mode ``"parallel"`` from the states after them and, with equal tokens, by evaluating all 65 frames in every
round. CPU times are summed over threads: other work on the machine hardly affects them.
"""

import argparse
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from hydra import compose, initialize_config_dir
from hydra.utils import instantiate
from torch import Tensor

from blueberry_video.inference.frame_generation import FrameDecoding, FrameStream, generate_frames
from blueberry_video.models.hydra_video import HydraVideoTokenizer
from blueberry_video.models.hydra_video.generator import HydraVideoGenerator
from blueberry_video.video.quality import peak_memory

FRAMES, PAST, WINDOW = (16, 512), 64, 16


class Recomputed(FrameStream):
    """Stream that evaluates all committed frames again in every round of a frame, from ``past`` (B, t, h, w)."""

    past: Tensor

    def _parallel(self, ids: Tensor, vectors: Tensor) -> Tensor:
        frames = torch.cat([self.past, ids.unflatten(1, (1, *self.model.grid))], dim=1)
        return self.model.evaluate(frames, self._clip[:, None])[0][:, -1].flatten(1, 2)


def built(name: str, *overrides: str) -> torch.nn.Module:
    with initialize_config_dir(str(Path(__file__).resolve().parents[1] / "conf"), version_base=None):
        return instantiate(compose(overrides=[f"+model={name}", *overrides]).model).eval()


def generator(vocabulary: int) -> HydraVideoGenerator:
    torch.manual_seed(0)
    model = built("hydra_generator/tiny", f"model.vocabulary={vocabulary}")
    assert isinstance(model, HydraVideoGenerator)
    for parameter in model.parameters():  # blocks of a new model are the identity
        if not parameter.any():
            torch.nn.init.normal_(parameter, std=0.02)
    return model


def stream(frames: int) -> None:
    tokenizer = built("hydra_tokenizer/tiny")
    assert isinstance(tokenizer, HydraVideoTokenizer)
    tokens, state, seconds, pixels = generate_frames(generator(tokenizer.vocabulary), generator=[0]), None, [], 0
    for _ in range(frames):
        start = time.process_time()
        video, state = tokenizer.decode_stream(next(tokens)[:, None], state)
        seconds.append(time.process_time() - start)
        pixels += video.shape[2]
    early, late = (1e3 * statistics.median(part) for part in (seconds[1 : WINDOW + 1], seconds[-WINDOW:]))
    print(
        f"{frames:4} frames of tokens, {pixels} of pixels: peak memory {peak_memory() / 2**20:.1f} MB, CPU time per "
        f"frame {early:.0f} ms early, {late:.0f} ms late",
        flush=True,
    )


def seconds(function: Callable[[], object], repeats: int = 5) -> float:
    times = []
    for _ in range(repeats):
        start = time.process_time()
        function()
        times.append(time.process_time() - start)
    return statistics.median(times)


@torch.no_grad()
def recompute() -> None:
    model = generator(1000)
    past, decoding = torch.randint(1000, (1, PAST, *model.grid)), FrameDecoding(mode="parallel", temperature=0)
    options = (model, None, None, decoding, None, None, None, [0], 1)
    kept, again = FrameStream(*options), Recomputed(*options)
    kept.commit(past)
    again.past = past
    equal = (kept._decoded(kept._vectors(None, 1)) == again._decoded(again._clip[:, None])).float().mean()
    fast, slow = seconds(kept.step), seconds(lambda: again._decoded(again._clip[:, None]))
    print(
        f"frame {PAST + 1}, {decoding.rounds} rounds: from states, with the commit, {fast * 1e3:.0f} ms of CPU; with "
        f"the past evaluated again {slow * 1e3:.0f} ms: {slow / fast:.1f} times; {equal:.0%} of the tokens are equal"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--stream", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    if arguments.stream:
        return stream(arguments.stream)
    recompute()
    for frames in FRAMES:
        command = [sys.executable, __file__, "--stream", str(frames), "--threads", str(arguments.threads)]
        subprocess.run(command, check=True)


if __name__ == "__main__":
    main()
