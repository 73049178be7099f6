"""Generation entry point: writes videos of a trained token generator or video diffusion network as mp4 files.

    python -m blueberry_video.generate outputs/<name>[/<run>] --out clip.mp4 [--prompt "a red disc moves left"]
        [--negative "…"] [--guidance 6] [--steps 50] [--size 480 720] [--frames 49] [--image start.png]
        [--video start.mp4] [--strength 0.6] [--label motion=left] [--actions left,left,stay] [--seed 1] …
    python -m blueberry_video.generate outputs/<name> --out clips/ --prompts captions.txt --per-prompt 4

Uses the EMA weights if the run has them. Each file has a sidecar .json of its settings. A killed command continues when
it is repeated. A token generator generates, decodes and writes one frame of tokens at a time, in memory that does not
depend on the number of frames.
"""

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from blueberry_video.launch import command_line, signals
from blueberry_video.launch.errors import OneParagraphErrors

if TYPE_CHECKING:  # torch is imported after the command line is checked
    from torch import Tensor

DECODING = {"temperature": float, "rounds": int, "granularity": str, "mode": str}
SHARED = ("prompt", "negative", "guidance", "embedded_guidance", "steps", "size", "image", "video", "strength")


def main() -> None:
    parser = argparse.ArgumentParser(prog="blueberry generate", allow_abbrev=False)
    parser.add_argument("run", help="a run folder, or the folder of an experiment: its newest run")
    parser.add_argument("--out", required=True, help="mp4 file, or a folder for several prompts")
    parser.add_argument("--prompt", help="caption")
    parser.add_argument(
        "--prompts", help=".txt with a caption per line, or .jsonl with prompt, seed, frames, … per line"
    )
    parser.add_argument("--per-prompt", "--num", type=int, default=1, help="videos per prompt, in one file each")
    parser.add_argument("--seed", type=int, default=0, help="seed of all noise; video i has this seed + i")
    parser.add_argument("--negative", help="caption that classifier-free guidance leads away from")
    parser.add_argument("--guidance", type=float, help="scale of classifier-free guidance; 1 for none")
    parser.add_argument("--embedded-guidance", type=float, help="scale that a distilled network receives as input")
    parser.add_argument("--steps", type=int, help="steps of the sampler")
    parser.add_argument("--size", type=int, nargs=2, metavar=("H", "W"), help="height and width in pixels")
    parser.add_argument("--frames", type=int, help="frames to write, those that are continued included")
    parser.add_argument("--image", help="image, the first frame")
    parser.add_argument(
        "--video", help="video to continue, of which the first frame is used, or, with --strength, to change"
    )
    parser.add_argument("--strength", type=float, help="share of noise that is added to --video, in (0, 1]")
    parser.add_argument("--label", action="append", default=[], help="label=class, by name or index; repeatable")
    parser.add_argument("--actions", help="names or indices of the actions between frames, separated by commas")
    for key, kind in DECODING.items():
        parser.add_argument(f"--{key}", type=kind, help=f"replaces {key} of the run's task.decoding")
    parser.add_argument("--overwrite", action="store_true", help="replace existing files")
    known = parser.parse_args(sys.argv[1:])
    command_line.quiet_libraries()
    if wrong := [text for text in known.label if "=" not in text]:
        raise ValueError(f"--label {wrong[0]} must be label=class, as in --label motion=left.")
    if known.prompt is not None and known.prompts is not None:
        raise ValueError(f"--prompt={known.prompt!r} and --prompts={known.prompts} exclude each other: pass one.")
    options: dict[str, Any] = {key: value for key in SHARED if (value := getattr(known, key)) is not None}
    options |= {"labels": dict(text.split("=", 1) for text in known.label), "num_frames": known.frames}
    options["actions"] = None if known.actions is None else [each.strip() for each in known.actions.split(",") if each]
    decoding = {key: value for key in DECODING if (value := getattr(known, key)) is not None}
    if (size := decoding.get("granularity")) and size.replace(",", "").isdecimal():
        rows = [int(part) for part in size.split(",")]
        decoding["granularity"] = rows[0] if len(rows) == 1 else tuple(rows)
    from blueberry_video.inference.clip_files import check_free, clip_files
    from blueberry_video.inference.prompt_files import read_prompts

    prompts = [{}] if known.prompts is None else read_prompts(known.prompts)
    texts = [prompt.get("prompt", known.prompt) for prompt in prompts]
    check_free(clip_files(known.out, texts, known.per_prompt), known.overwrite)
    from blueberry_video.generated_videos import generate_files

    counts = {"per_prompt": known.per_prompt, "seed": known.seed, "overwrite": known.overwrite}
    for file in generate_files(known.run, known.out, prompts, **counts, decoding=decoding, **options):
        print(f"wrote {file}")


def generate(run: str | Path, **options: Any) -> "Tensor":
    """Generates videos with a trained run.

    Args:
        run: a run folder, or the folder of an experiment: its newest run.
        options: arguments of :func:`~blueberry_video.generated_videos.open_videos`.

    Returns:
        Videos (B, 3, T, H, W) in [0, 1].
    """
    import torch

    from blueberry_video.generated_videos import open_videos

    return torch.cat(list(open_videos(run, **options).parts), dim=2)


if __name__ == "__main__":
    with OneParagraphErrors(), signals.handled("The last file is not complete: repeat the command to continue."):
        main()
