"""``blueberry process``: prints the plan of a video for a model and writes the processed frames.

    python -m blueberry_video.video.command VIDEO [--model NAME] [--out FOLDER] [key=value …]

prints the plan (frames, size, tokens, memory). With a folder it also decodes, and writes ``video.json`` (metadata),
``contact_sheet.png``, and the frames in the requested format: ``frames.safetensors`` (``tensor``, ``huggingface``),
``frames.npy`` (``numpy``), ``frames.json`` (``base64``, ``openai``) or ``frames/*.png`` (``pil``).
"""

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import av
import numpy as np
import safetensors.torch
import torch
import yaml
from PIL import Image
from torch import Tensor

from blueberry_video.video.contact_sheet import contact_sheet
from blueberry_video.video.errors import VideoError
from blueberry_video.video.plan import Plan
from blueberry_video.video.process import VideoProcessor
from blueberry_video.video.result import ProcessedVideo
from blueberry_video.video.settings import load_settings, models


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command; returns 0, or 1 after printing an error of the video or of an argument."""
    parser = argparse.ArgumentParser(prog="blueberry process", description=__doc__.splitlines()[0])
    parser.add_argument("video", help="a path or a URL")
    parser.add_argument("--model", default="qwen2.5-vl", help=f"a YAML file, or one of {', '.join(models())}")
    parser.add_argument("--out", help="output folder; without it only the plan is printed")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="any setting, such as fps=1 format=numpy")
    words = sys.argv[1:] if arguments is None else arguments
    given = parser.parse_intermixed_args([f"./{w}" if w.startswith("-") and Path(w).is_file() else w for w in words])
    av.logging.set_libav_level(av.logging.FATAL)  # FFmpeg's errors are part of the report
    try:
        processor = VideoProcessor(load_settings(given.model, _parsed(given.overrides)))
        plan = processor.plan(given.video)
        description = describe(plan, given.model)
        print("\n".join(description))
        if given.out:
            video = processor(given.video)
            print("\n".join([*_reported(video), *write(video, Path(given.out), description)]))
    except (VideoError, ValueError, TypeError, OSError, yaml.YAMLError) as error:
        print(f"blueberry process: {' '.join(str(error).split())}", file=sys.stderr)
        return 1
    return 0


def describe(plan: Plan, model: str) -> list[str]:
    """Returns a description of the plan, one item per line."""
    distinct = len(set(plan.indices))
    repeated = f" ({len(plan.indices) - distinct} of them repeated)" if distinct < len(plan.indices) else ""
    grid = f", grid {' x '.join(map(str, plan.tokens.grid_thw))}" if plan.tokens.grid_thw else ""
    lines = [
        f"model    {model}",
        f"frames   {len(plan.indices)}{repeated}, numbers {_shortened(plan.indices)}",
        f"size     {plan.width}x{plan.height} pixels, {_bytes(plan.frame_bytes)} with the formatted output",
        f"tokens   {plan.tokens.total} ({plan.tokens.visual} visual, {plan.tokens.text} around them{grid})",
    ]
    for precision, estimate in plan.memory.items():
        parts = {name: value for name, value in asdict(estimate).items() if value is not None}
        listed = ", ".join(f"{name.replace('_', ' ')} {_bytes(value)}" for name, value in parts.items())
        total = _bytes(estimate.total) if estimate.total is not None else "unknown"
        lines.append(f"{precision:8} {total} in the model ({listed})")
    lines += [f"damage   {plan.damage}"] if plan.damage else []
    return lines + [f"reduced  {step}" for step in plan.degraded]


def write(video: ProcessedVideo, folder: Path, title: list[str]) -> list[str]:
    """Writes the metadata, contact sheet and frames of a video; returns a line per written file."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "video.json").write_text(json.dumps(video.summary(), indent=2) + "\n")
    times = torch.tensor(video.metadata.timestamps)
    contact_sheet(video.pixels, times, video.missing, video.suspect, title=title).save(folder / "contact_sheet.png")
    written = ("video.json", "contact_sheet.png", _write_frames(video.frames, folder))
    return [f"wrote    {folder / name}" for name in written]


def _write_frames(frames: Any, folder: Path) -> str:
    if isinstance(frames, Tensor):
        frames = {"frames": frames}
    if isinstance(frames, dict):
        whole = {key: value.contiguous() for key, value in frames.items()}
        safetensors.torch.save_file(whole, folder / "frames.safetensors")
        return "frames.safetensors"
    if isinstance(frames, np.ndarray):
        np.save(folder / "frames.npy", frames)
        return "frames.npy"
    if isinstance(frames[0], Image.Image):
        (folder / "frames").mkdir(exist_ok=True)
        for number, picture in enumerate(frames):
            picture.save(folder / "frames" / f"{number:05}.png")
        return "frames/"
    (folder / "frames.json").write_text(json.dumps(frames))
    return "frames.json"


def _reported(video: ProcessedVideo) -> list[str]:
    timing = ", ".join(f"{stage} {seconds:.3f}" for stage, seconds in video.timing.items())
    known = video.metadata
    lines = [f"decoded  by {known.backend}; seconds: {timing}"]
    if known.hdr:
        lines.append(f"hdr      {known.hdr} of primaries {known.primaries or 'not stated'}; tone_map maps it to SDR")
    if known.interlaced:
        lines.append(f"fields   interlaced, {known.interlaced} first; deinterlace removes them")
    if known.pixel_aspect != (1, 1):
        aspect = "{}:{}".format(*known.pixel_aspect)
        lines.append(f"pixels   have an aspect ratio of {aspect}; square_pixels corrects it")
    if missing := int(video.missing.sum()):
        lines.append(f"missing  {missing} frames could not be decoded and were replaced by the nearest decoded frame")
    if suspect := int(video.suspect.sum()):
        lines.append(f"suspect  {suspect} frames were decoded after damage and may have wrong content")
    lines += [f"failed   {backend}: {reason}" for backend, reason in video.failures.items()]
    measured = ", ".join(f"{name.replace('_', ' ')} {value:.3g}" for name, value in video.quality.items())
    return [*lines, f"quality  {measured}"]


def _parsed(overrides: Sequence[str]) -> dict[str, Any]:
    parsed = {}
    for override in overrides:
        key, equals, value = override.partition("=")
        if not equals or not key:
            raise ValueError(f"{override!r} is not a setting: write key=value, such as fps=1.")
        parsed[key] = yaml.safe_load(value)
    return parsed


def _shortened(numbers: Sequence[int]) -> str:
    shown = [str(number) for number in numbers]
    return ", ".join(shown if len(shown) <= 12 else [*shown[:6], "…", *shown[-5:]])


def _bytes(count: int) -> str:
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.4g} {unit}"
        count = count / 1000  # type: ignore[assignment]
    return f"{count:.4g} TB"


if __name__ == "__main__":
    sys.exit(main())
