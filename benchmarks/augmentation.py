"""Augmentations for fine-tuning classifiers, on batches of clips, compared with kornia in one run.

run: python benchmarks/augmentation.py              (8 clips of 16 x 256², fp32, on the CPU or a GPU: a minute)

Crop and resize to 224², flip, erase, separately and together; the crop is the same for all frames of a clip. Median
milliseconds per clip, in alternating order. kornia (pip install --no-deps kornia kornia_rs) is skipped if it is not
installed.
"""

import argparse
import statistics
import time
from collections.abc import Callable
from importlib.util import find_spec

import torch
from torch import Tensor, nn

from blueberry_video.augmentation import HorizontalFlip, Mixing, RandomErasing, RandomResizedCrop


def ours() -> dict[str, Callable[[Tensor], object]]:
    parts = {"crop": RandomResizedCrop(224), "flip": HorizontalFlip(0.5), "erase": RandomErasing(0.25)}
    return {**parts, "all": nn.Sequential(*parts.values()), "mix": Mixing()}


def kornia() -> dict[str, Callable[[Tensor], object]]:
    import kornia.augmentation as K

    def of_clips(*augmentations: nn.Module) -> Callable[[Tensor], Tensor]:
        sequence = K.VideoSequential(*augmentations, data_format="BCTHW", same_on_frame=True)
        return lambda video: sequence(video)

    def crop() -> nn.Module:
        return K.RandomResizedCrop((224, 224), (0.08, 1.0), (3 / 4, 4 / 3))

    def erase() -> nn.Module:
        return K.RandomErasing(p=0.25, scale=(0.02, 1 / 3), ratio=(0.3, 10 / 3))

    return {
        "crop": of_clips(crop()),
        "flip": of_clips(K.RandomHorizontalFlip(p=0.5)),
        "erase": of_clips(erase()),
        "all": of_clips(crop(), K.RandomHorizontalFlip(p=0.5), erase()),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--clips", type=int, default=8)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(0)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    video = torch.rand(arguments.clips, 3, 16, 256, 256, device=device)

    sides = {"ours": ours()} | ({"kornia": kornia()} if find_spec("kornia") else {})
    times: dict[tuple[str, str], list[float]] = {}
    for _ in range(arguments.repeats + 1):
        for side, parts in sides.items():
            for name, augment in parts.items():
                start = time.perf_counter()
                augment(video)
                if device == "cuda":
                    torch.cuda.synchronize()
                times.setdefault((name, side), []).append((time.perf_counter() - start) / arguments.clips * 1e3)
    print(f"{device}, {arguments.threads} threads{'':10}" + "".join(f"{side:>10}" for side in sides) + "   ms per clip")
    for name in ours():
        row = [statistics.median(times[name, side][1:]) if (name, side) in times else None for side in sides]
        print(f"{name:24}" + "".join("         -" if value is None else f"{value:10.2f}" for value in row))


if __name__ == "__main__":
    main()
