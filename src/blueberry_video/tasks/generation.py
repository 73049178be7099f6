"""Generation of videos with a trained task: requests of all kinds, and those of token generators.

Shapes: B clips of T x H x W pixels.
"""

from collections.abc import Sequence
from dataclasses import asdict, fields, replace
from typing import Any, cast

import torch
from torch import Tensor, nn

from blueberry_video.inference.frame_generation import FrameDecoding
from blueberry_video.inference.video_generation import stream_video
from blueberry_video.models.hydra_video.generator import Conditioning, HydraVideoGenerator
from blueberry_video.tasks.clip_format import ClipFormat
from blueberry_video.tasks.diffusion import Diffusion
from blueberry_video.tasks.diffusion_requests import prepare_diffusion
from blueberry_video.tasks.frame_generation import FrameGeneration
from blueberry_video.tasks.requests import Prepared, Request

KINDS = (FrameGeneration, Diffusion)  # tasks that generate videos


def prepare(task: Any, clips: ClipFormat, request: Request) -> Prepared:
    """Checks a request, and prepares the generation of its videos with a trained task of :data:`KINDS`.

    Args:
        task: the task in evaluation mode, on its device.
        clips: format of the clips of its run.
        request: the videos.

    Returns:
        The videos: a token generator generates one frame of tokens at a time at constant memory, a diffusion network
        all frames at once.

    Raises:
        ValueError: for a request that does not fit the model; the message names the values that do.
    """
    return (prepare_tokens if isinstance(task, FrameGeneration) else prepare_diffusion)(task, clips, request)


def prepare_tokens(task: FrameGeneration, clips: ClipFormat, request: Request) -> Prepared:
    """Implements :func:`prepare` for token generators."""
    model, count = task.model, request.num_clips
    tokenizer = task.tokenizer.to(model.base.device)  # if it was built just now
    request.check_prompt(model.text_proj is not None, model.text)
    for key in ("negative", "embedded_guidance", "strength", "steps"):
        if (value := getattr(request, key)) is not None:
            fix = " The rounds of decoding per frame are decoding.rounds." if key == "steps" else ""
            raise ValueError(f"{key}={value!r} has no effect: the run generates tokens, without diffusion.{fix}")
    if request.size not in (None, (clips.height, clips.width)):
        raise ValueError(f"size={request.size} must be {clips.height} {clips.width}, the size of the run's tokenizer.")
    if unknown := sorted(set(request.decoding) - {each.name for each in fields(FrameDecoding)}):
        known = ", ".join(each.name for each in fields(FrameDecoding))
        raise ValueError(f"decoding.{unknown[0]} is unknown: task.decoding of the run has {known}.")
    scale = {} if request.guidance is None else {"guidance": float(request.guidance)}
    decoding, step = replace(task.decoding, **{**request.decoding, **scale}), tokenizer.frame_step
    prompt, first = None, 1  # given frames, or the first frame, to which no action leads
    if request.video is not None:
        first = 1 + (len(request.video) - 1) // step * step
        prompt = request.pixels(model.base.device)[:, :, :first].to(model.base)
    num_frames = request.num_frames
    if num_frames is None and request.actions is None:
        num_frames = first + clips.num_frames - 1
    if num_frames is not None:
        tokenizer.check(num_frames, clips.height, clips.width)
        if request.video is not None and num_frames <= first:
            raise ValueError(
                f"num_frames={num_frames} includes the {first} frames of the video that are continued: use at least "
                f"{first + step}, or a shorter video."
            )
    groups = None if num_frames is None else (num_frames - first) // step
    actions = _actions(model, clips, request, groups, first, step)
    text = None if request.prompt is None else [request.prompt] * count
    labels = {label: index.expand(count) for label, index in _labels(model, clips, request).items()}
    parts = stream_video(
        *(model, tokenizer, Conditioning(labels or None, text), num_frames, decoding, prompt),
        actions=None if actions is None else actions.expand(count, -1, -1),
        generator=request.generators(),
    )
    settings = {
        "prompt": request.prompt,
        "labels": {label: int(index[0]) for label, index in labels.items()},
        "actions": None if actions is None else actions.flatten().tolist(),
        "num_frames": num_frames
        if num_frames is not None
        else first + step * (len(request.actions or ()) // model.actions_per_frame),
        "given_frames": 0 if prompt is None else first,
        "decoding": asdict(decoding),
    }
    return Prepared(parts, (clips.height, clips.width), settings)


def _labels(model: HydraVideoGenerator, clips: ClipFormat, request: Request) -> dict[str, Tensor]:
    """Returns the class (1,) of each label of a request, on the device of the model."""
    found = {}
    for label, value in request.labels.items():
        if label not in model.labels:
            known = f"conditioned on {', '.join(model.labels)}" if len(model.labels) else "not conditioned on labels"
            raise ValueError(f"label {label}={value} is unknown: the model of the run is {known}.")
        count = cast(nn.Embedding, model.labels[label]).num_embeddings - 1  # the last one is the null class
        index = _index(f"label {label}={value}", value, clips.classes.get(label, ()), count)
        found[label] = torch.tensor([index], device=model.base.device)
    return found


def _actions(
    model: HydraVideoGenerator, clips: ClipFormat, request: Request, groups: int | None, first: int, step: int
) -> Tensor | None:
    """Returns the actions (1, n, k) of a request for ``groups`` generated frames of tokens after ``first`` frames."""
    if request.actions is None:
        return None
    given, per_frame = list(request.actions), model.actions_per_frame
    if not model.num_actions:
        raise ValueError(f"actions={given} has no effect: the model of the run has num_actions=0. Leave it out.")
    if (groups is None and len(given) % per_frame) or groups not in (None, len(given) / per_frame):
        below = len(given) // per_frame
        if groups is None:
            problem, fix = "", f"{below * per_frame} or {(below + 1) * per_frame}"
        else:
            problem = f", and num_frames={request.num_frames} requires {groups * per_frame}"
            fix = f"{groups * per_frame}, or use num_frames={first + below * step}"
        raise ValueError(
            f"actions has {len(given)} entries, but there must be {per_frame} per {step} generated frames"
            f"{'' if request.video is not None else ' but the first'}{problem}: pass {fix}."
        )
    indices = [_index(f"action {each!r}", each, clips.action_names, model.num_actions) for each in given]
    return torch.tensor(indices, dtype=torch.long, device=model.base.device).view(1, len(given) // per_frame, per_frame)


def _index(key: str, value: str | int, names: Sequence[str], count: int) -> int:
    """Returns the index of a name, or of an index as number or text, below ``count``."""
    if value in names:
        return list(names).index(str(value))
    if (isinstance(value, int) or value.isdecimal()) and 0 <= int(value) < count:
        return int(value)
    raise ValueError(f"{key} is unknown: use one of {', '.join(names)}{' or ' if names else ''}0 to {count - 1}.")
