"""Generation of videos with a trained task: names of classes and actions to indices, and streams of pixels.

Shapes: B clips of T x H x W pixels.
"""

import copy
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import fields, replace
from typing import Any, cast

import torch
from torch import Tensor, nn

from blueberry_video.diffusion.conditioning import takes_image
from blueberry_video.diffusion.generation import generate
from blueberry_video.diffusion.guidance import Guidance
from blueberry_video.inference.frame_generation import FrameDecoding
from blueberry_video.inference.video_generation import stream_video
from blueberry_video.models.hydra_video.generator import Conditioning, HydraVideoGenerator
from blueberry_video.tasks.clip_format import ClipFormat
from blueberry_video.tasks.diffusion import Diffusion
from blueberry_video.tasks.frame_generation import FrameGeneration
from blueberry_video.tasks.requests import Request

KINDS = (FrameGeneration, Diffusion)  # tasks that generate videos


def stream(task: Any, clips: ClipFormat, request: Request) -> Iterator[Tensor]:
    """Generates videos with a trained task of :data:`KINDS`, in evaluation mode.

    Args:
        task: the task, on its device.
        clips: format of the clips of its run.
        request: the videos.

    Returns:
        Iterator over consecutive parts (B, 3, n, H, W) in [-1, 1]: a token generator returns one frame of tokens at a
        time at constant memory, a diffusion network all frames at once.

    Raises:
        ValueError: for a request that does not fit the model; the message names the values that do.
    """
    if isinstance(task, FrameGeneration):
        return _stream_tokens(task, clips, request)
    return _sample(task, clips, request)


def _stream_tokens(task: FrameGeneration, clips: ClipFormat, request: Request) -> Iterator[Tensor]:
    model, count = task.model, request.num_clips
    tokenizer = task.tokenizer.to(model.base.device)  # if it was built just now
    request.check_prompt(model.text_proj is not None, model.text)
    if unknown := sorted(set(request.decoding) - {each.name for each in fields(FrameDecoding)}):
        known = ", ".join(each.name for each in fields(FrameDecoding))
        raise ValueError(f"decoding.{unknown[0]} is unknown: task.decoding of the run has {known}.")
    decoding, step = replace(task.decoding, **request.decoding), tokenizer.frame_step
    prompt, first = None, 1  # given frames, or the first frame, to which no action leads
    if request.video is not None:
        first = 1 + (len(request.video) - 1) // step * step
        pixels = request.video[:first].transpose(0, 1)[None].to(model.base).div(255) * 2 - 1
        prompt = pixels.expand(count, -1, -1, -1, -1)
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
    return stream_video(
        *(model, tokenizer, Conditioning(labels or None, text), num_frames, decoding, prompt),
        actions=None if actions is None else actions.expand(count, -1, -1),
        generator=request.generators(),
    )


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


def _sample(task: Diffusion, clips: ClipFormat, request: Request) -> Iterator[Tensor]:
    model, video = task.model, request.video
    for key, value in (("labels", request.labels), ("actions", request.actions)):
        if value:
            raise ValueError(f"{key}={value} has no effect: the model of the run is conditioned on captions only.")
    model.prepare()  # frozen parts that are built on first use
    request.check_prompt(True, model.text)
    takes = takes_image(model, task.image_dropout)
    if video is None and takes and model.shape.image_condition != "optional":
        raise ValueError("video is missing: the run is image-to-video. Pass VIDEO=, of which the first frame is used.")
    if video is not None and not takes:
        raise ValueError("video has no effect: the model of the run has no image condition. Leave it out.")
    guidance = _guidance(task.guidance, request.decoding)
    num_frames = clips.num_frames if request.num_frames is None else request.num_frames
    size = model.check_clip(num_frames, clips.height, clips.width)
    images = None
    if video is not None:
        images = (video[:1].transpose(0, 1)[None].float().div(255) * 2 - 1).expand(request.num_clips, -1, -1, -1, -1)

    def sampled() -> Iterator[Tensor]:
        captions, generators = [request.prompt or ""] * request.num_clips, request.generators()
        yield generate(model, captions, size, task.sampler, guidance, task.objective, images, generators)

    return sampled()


def _guidance(guidance: Guidance, given: Mapping[str, Any]) -> Guidance:
    """Returns a guidance with a different scale, if one is given."""
    if other := sorted(set(given) - {"guidance"}):
        raise ValueError(f"decoding.{other[0]}={given[other[0]]} has no effect: the run has no task.decoding.")
    if (scale := given.get("guidance")) is None:
        return guidance
    key = "embedded" if guidance.embedded is not None else "scale"
    if not hasattr(guidance, key) or scale < 0:
        name = type(guidance).__name__
        raise ValueError(f"guidance={scale} must be at least 0, and task.guidance={name} of the run must have a scale.")
    changed = copy.copy(guidance)
    setattr(changed, key, float(scale))
    return changed
