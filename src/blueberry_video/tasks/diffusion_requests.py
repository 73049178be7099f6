"""Requests of videos of a trained diffusion task.

Shapes: B clips of T x H x W pixels, t x h x w latents.
"""

import copy
from collections.abc import Iterator

from torch import Tensor

from blueberry_video.diffusion.conditioning import takes_image
from blueberry_video.diffusion.generation import GivenVideo, generate
from blueberry_video.diffusion.guidance import ConstantGuidance, DynamicGuidance, EmbeddedGuidance, Guidance
from blueberry_video.diffusion.samplers import Sampler
from blueberry_video.models.text_encoder.words import WordText
from blueberry_video.tasks.clip_format import ClipFormat
from blueberry_video.tasks.diffusion import Diffusion
from blueberry_video.tasks.requests import Prepared, Request


def prepare_diffusion(task: Diffusion, clips: ClipFormat, request: Request) -> Prepared:
    """Implements :func:`~blueberry_video.tasks.generation.prepare` for diffusion."""
    model = task.model
    for key, value in (("labels", request.labels), ("actions", request.actions)):
        if value:
            raise ValueError(f"{key}={value} has no effect: the model of the run is conditioned on captions only.")
    for key, value in request.decoding.items():
        raise ValueError(
            f"decoding.{key}={value} has no effect: the run has no task.decoding. Diffusion has guidance and steps."
        )
    model.prepare()  # frozen parts that are built on first use
    request.check_prompt(True, model.text)
    if isinstance(text := model.text, WordText):  # rejects unknown words; published encoders accept any caption
        text([caption for caption in (request.prompt, request.negative) if caption is not None])
    sampler, guidance = _sampler(task, request), _guidance(task, request)
    height, width = request.size or (clips.height, clips.width)
    if request.video is not None and tuple(request.video.shape[2:]) != (height, width):
        raise ValueError(
            f"video has frames of {tuple(request.video.shape[2:])} pixels, and the clips have {height} x {width}: "
            f"resize it, or pass size={height, width}."
        )
    takes = takes_image(model, task.image_dropout)
    if request.video is None and takes and model.shape.image_condition != "optional":
        raise ValueError(
            "video is missing: the run is image-to-video. Pass image, or video, of which the first frame is used."
        )
    known = 0  # given frames that the clip continues
    if request.strength is not None:
        sampler.skipped_steps(request.strength)
        num_frames = _changed_frames(task, clips, request)
    elif request.video is not None and not takes:
        known = _continued_frames(task, request)
        num_frames = _total_frames(task, clips, request, known)
    else:
        num_frames = clips.num_frames if request.num_frames is None else request.num_frames
    size = model.check_clip(num_frames, height, width)
    window, pixels = _window(task, clips, num_frames), None if request.video is None else request.pixels()
    history = pixels[:, :, :known] if pixels is not None and known else None
    start = None if pixels is None or request.strength is None else pixels[:, :, :num_frames]
    given = GivenVideo(history, start, request.strength or 1.0, window)

    def sampled() -> Iterator[Tensor]:
        captions = [request.prompt or ""] * request.num_clips
        negative = None if request.negative is None else [request.negative] * request.num_clips
        image = pixels[:, :, :1] if pixels is not None and takes else None
        common = (sampler, guidance, task.objective, image, request.generators(), negative, given)
        yield generate(model, captions, size, *common)

    scale = guidance.cfg_scale if isinstance(guidance, EmbeddedGuidance) else getattr(guidance, "scale", 1.0)
    settings = {
        "prompt": request.prompt,
        "negative": request.negative,
        "num_frames": num_frames,
        "given_frames": known or int(takes and request.video is not None),
        "strength": request.strength,
        "window": window,
        "sampler": type(sampler).__name__,
        "steps": sampler.steps,
        "guidance": {"type": type(guidance).__name__, "scale": scale, "embedded": guidance.embedded},
    }
    return Prepared(sampled(), (height, width), settings)


def _sampler(task: Diffusion, request: Request) -> Sampler:
    if request.steps is None:
        return task.sampler
    if request.steps < 1:
        raise ValueError(f"steps={request.steps} must be at least 1.")
    sampler = copy.copy(task.sampler)
    sampler.steps = request.steps
    sampler.timesteps(task.objective)
    return sampler


def _guidance(task: Diffusion, request: Request) -> Guidance:
    """Returns the guidance of a request: that of the run with other scales."""
    guidance, scale, distilled = task.guidance, request.guidance, task.model.shape.embedded_guidance
    if request.embedded_guidance is not None and not distilled:
        raise ValueError(
            f"embedded_guidance={request.embedded_guidance} has no effect: the network of the run has no embedded "
            "guidance. Pass guidance, the scale of classifier-free guidance."
        )
    if distilled:
        embedded = guidance.embedded if request.embedded_guidance is None else request.embedded_guidance
        guidance = EmbeddedGuidance(embedded or 0.0, getattr(guidance, "cfg_scale", 1.0) if scale is None else scale)
    elif scale is not None:
        changed = copy.copy(guidance) if isinstance(guidance, DynamicGuidance) else ConstantGuidance(scale)
        changed.scale, guidance = scale, changed
    optimization = task.optimization
    trained = task.caption_dropout > 0 or (not distilled and (optimization.init_from or task.model.lora is not None))
    if scale not in (None, 1) and request.negative is None and not trained:
        raise ValueError(
            f"guidance={scale} requires an unconditional network, and the run was trained with task.caption_dropout=0"
            f"{', a distilled network' if distilled else ''}: pass negative, a caption that is guided away from, or "
            f"{'embedded_guidance' if distilled else 'guidance=1'}."
        )
    if request.negative is not None and (not guidance.unconditional or scale == 1):
        raise ValueError(
            f"negative={request.negative!r} has no effect without classifier-free guidance: pass guidance, a scale "
            "above 1, such as 6."
        )
    return guidance


def _changed_frames(task: Diffusion, clips: ClipFormat, request: Request) -> int:
    """Returns the number of frames of a video that noise is added to: at most those of a clip of the run."""
    assert request.video is not None
    assert task.model.autoencoder is not None
    step, length = task.model.autoencoder.frame_step, len(request.video)
    if request.num_frames is not None:
        if request.num_frames > length:
            raise ValueError(f"num_frames={request.num_frames} must be at most {length}, the frames of the video.")
        return request.num_frames
    return clips.num_frames if clips.num_frames <= length else 1 + (length - 1) // step * step


def _continued_frames(task: Diffusion, request: Request) -> int:
    """Returns the number of first frames of a video that a network continues: those of whole chunks."""
    assert request.video is not None
    model, chunk = task.model, task.model.shape.causal_chunk
    if not chunk and not task.frame_timesteps:
        raise ValueError(
            "image or video has no effect: the model of the run has no image condition, and is neither causal nor "
            "trained with task.frame_timesteps=true, to continue frames. Pass strength, which changes the video, or "
            "leave it out."
        )
    assert model.autoencoder is not None
    step, whole, length = model.autoencoder.frame_step, chunk or model.shape.patch_size[0], len(request.video)
    legal = [n for n in range(1, length + step * whole + 1, step) if model.autoencoder.grid(n, 1, 1)[0] % whole == 0]
    if legal[0] > length:
        raise ValueError(
            f"video has {length} frames, and the model continues chunks of {whole} latent frames: use at least "
            f"{legal[0]} frames."
        )
    return max(n for n in legal if n <= length)


def _total_frames(task: Diffusion, clips: ClipFormat, request: Request, known: int) -> int:
    """Returns the number of frames of a continued video."""
    assert task.model.autoencoder is not None
    step = task.model.autoencoder.frame_step
    longest = known + clips.num_frames - 1 if task.model.shape.causal_chunk else clips.num_frames
    total = longest if request.num_frames is None else request.num_frames
    if total <= known:
        raise ValueError(
            f"num_frames={total} includes the {known} frames of the video that are continued: use at least "
            f"{known + step}, or a shorter video."
        )
    patch, latents = task.model.shape.patch_size[0], task.model.autoencoder.grid(total, 1, 1)[0]
    if latents % patch:
        near = [1 + (n - 1) * task.model.autoencoder.stride[0] for n in (latents - latents % patch, latents + patch)]
        raise ValueError(f"num_frames={total} is no whole number of patches after given frames: use {near[0]}.")
    return total


def _window(task: Diffusion, clips: ClipFormat, num_frames: int) -> int | None:
    """Returns the latent frames that a causal network receives at most; ``None`` for a clip no longer than trained."""
    model, chunk = task.model, task.model.shape.causal_chunk
    if not chunk or num_frames <= clips.num_frames:
        return None
    assert model.autoencoder is not None
    window = model.autoencoder.grid(clips.num_frames, 1, 1)[0]
    if window < 2 * chunk:
        raise ValueError(
            f"num_frames={num_frames} is more than num_frames={clips.num_frames} of the clips of the run, which hold "
            f"less than two chunks of {chunk} latent frames: the model has not learned to continue."
        )
    return window
