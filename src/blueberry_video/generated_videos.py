"""Videos of a trained generative run, as tensors or files."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from blueberry_video import __version__
from blueberry_video.data.progress import Progress
from blueberry_video.experiment import trained
from blueberry_video.experiment.trained import TrainedRun
from blueberry_video.inference.clip_files import check_free, clip_files, is_complete, write_clip
from blueberry_video.tasks.clip_format import DEFAULT_FPS, ClipFormat
from blueberry_video.tasks.generation import KINDS, prepare
from blueberry_video.tasks.requests import Request
from blueberry_video.video.clip import FrameReader, with_reader
from blueberry_video.video.decode import DecodeOptions
from blueberry_video.video.resize import ResizeOptions, resize_to, video_size
from blueberry_video.video.source import open_source

NAMES = {"frames": "num_frames"}  # keys of prompts -> arguments of open_videos


class Videos(NamedTuple):
    """Videos that are generated on iteration.

    Attributes:
        height, width: size in pixels.
        fps: frame rate.
        parts: consecutive parts (B, 3, n, H, W) in [0, 1].
        settings: all settings of the videos, as JSON values.
    """

    height: int
    width: int
    fps: float
    parts: Iterator[Tensor]
    settings: dict[str, Any]


def open_videos(
    run: str | Path | TrainedRun,
    prompt: str | None = None,
    labels: Mapping[str, str | int] | None = None,
    actions: Sequence[str | int] | None = None,
    num_frames: int | None = None,
    num_clips: int = 1,
    seed: int = 0,
    video: str | Path | None = None,
    decoding: Mapping[str, Any] | None = None,
    *,
    image: str | Path | None = None,
    negative: str | None = None,
    guidance: float | None = None,
    embedded_guidance: float | None = None,
    steps: int | None = None,
    size: tuple[int, int] | None = None,
    strength: float | None = None,
) -> Videos:
    """Opens a trained run to generate videos, part by part; on a GPU if there is one.

    Args:
        run: a run folder, the folder of an experiment for its newest run, or an opened run.
        video: file of a video, which is cropped to the size of the clips.
        image: file of an image, or of a video of which the first frame is used.
        prompt, labels, actions, num_frames, num_clips, seed, decoding, negative, guidance, embedded_guidance, steps,
            size, strength: see :class:`~blueberry_video.tasks.requests.Request`.

    Raises:
        FileNotFoundError: if there is no run, no valid checkpoint, or no such video.
        ValueError: if the run does not generate videos, or an argument does not fit its model.
    """
    opened = run if isinstance(run, TrainedRun) else _opened(run)
    if None not in (image, video):
        raise ValueError(f"image={image} and video={video} exclude each other: the first frame of the video is used.")
    clips, given, file = ClipFormat.of_run(opened), None, image if video is None else video
    if file is not None:
        if not Path(file).exists():
            key = "image" if video is None else "video"
            raise FileNotFoundError(f"{key}={file} does not exist: use the path of a video or image file.")
        limit = 1 if video is None else (num_frames or clips.num_frames) if strength is not None else None
        given = read_frames(file, size or (clips.height, clips.width), limit)
    request = Request(
        prompt=prompt,
        labels=labels or {},
        actions=actions,
        num_frames=num_frames,
        num_clips=num_clips,
        seed=seed,
        video=given,
        decoding=decoding or {},
        negative=negative,
        guidance=guidance,
        embedded_guidance=embedded_guidance,
        steps=steps,
        size=None if size is None else (size[0], size[1]),
        strength=strength,
    )
    prepared, fps = prepare(opened.task, clips, request), clips.fps or DEFAULT_FPS
    settings: dict[str, Any] = {
        "run": str(opened.path.resolve()),
        "checkpoint": opened.checkpoint.name,
        "version": __version__,
    }
    settings |= {"seed": seed, "height": prepared.size[0], "width": prepared.size[1], "fps": fps, **prepared.settings}
    settings |= {"image": image and str(Path(image).resolve()), "video": video and str(Path(video).resolve())}
    return Videos(*prepared.size, fps, ((part.float() + 1) / 2 for part in prepared.parts), settings)


def generate_files(
    run: str | Path,
    out: str | Path,
    prompts: Sequence[Mapping[str, Any]],
    per_prompt: int = 1,
    seed: int = 0,
    overwrite: bool = False,
    **options: Any,
) -> list[Path]:
    """Writes videos of a trained run as mp4 files, each with a sidecar ``.json`` of its settings.

    All clips are checked before the first one is generated. Each is generated alone, so that its bytes depend on its
    settings only. Complete files are kept, so that a killed call continues when it is repeated.

    Args:
        run: a run folder, or the folder of an experiment: its newest run.
        out: an mp4 file or a folder, see :func:`~blueberry_video.inference.clip_files.clip_files`.
        prompts: settings of each prompt, with the keys of
            :func:`~blueberry_video.inference.prompt_files.read_prompts`, which replace those of ``options``.
        per_prompt: clips per prompt.
        seed: clip i has the seed ``seed + i``; clip k of a prompt with a ``seed`` has that seed + k.
        overwrite: replace existing files.
        options: further arguments of :func:`open_videos` for all clips.

    Returns:
        The files.

    Raises:
        FileExistsError: a file has other settings, and ``overwrite`` is false.
        FileNotFoundError, ValueError: see :func:`open_videos`.
    """
    files = clip_files(out, [prompt.get("prompt", options.get("prompt")) for prompt in prompts], per_prompt)
    check_free(files, overwrite)
    calls = [
        {**options, "seed": seed + index * per_prompt + k, **_arguments(prompt, k)}
        for index, prompt in enumerate(prompts)
        for k in range(per_prompt)
    ]
    opened = _opened(run)
    settings = [open_videos(opened, **call).settings for call in calls]  # checks all, and holds no video
    done = [is_complete(file, wanted, overwrite) for file, wanted in zip(files, settings, strict=True)]
    progress = Progress("generate", sum(wanted["num_frames"] for wanted in settings), "frames")
    for file, call, wanted, complete in zip(files, calls, settings, done, strict=True):
        if complete:
            progress.add(wanted["num_frames"])
            continue
        videos = open_videos(opened, **call)
        write_clip(_counted(videos.parts, progress), file, (videos.height, videos.width), videos.fps, wanted)
    return files


def read_frames(file: str | Path, size: tuple[int, int], limit: int | None = None) -> Tensor:
    """Reads the first frames of a video or an image, cropped to a size: uint8 (T, 3, H, W).

    Args:
        file: a path.
        size: (H, W).
        limit: frames to read; ``None`` for all.
    """
    return _read(file, size, lambda count: range(min(count, limit or count)))


def read_last_frame(file: str | Path, size: tuple[int, int]) -> Tensor:
    """Reads the last frame of a video, or an image, cropped to a size (H, W): uint8 (3, H, W)."""
    return _read(file, size, lambda count: [count - 1])[0]


def _read(file: str | Path, size: tuple[int, int], choose: Callable[[int], Sequence[int]]) -> Tensor:
    options = ResizeOptions("crop", image_size=size, interpolation="bilinear")

    def read(reader: FrameReader) -> Tensor:
        indices = list(choose(len(reader.info.timestamps)))
        pixels = video_size(reader.info.height, reader.info.width, len(indices), options)
        return reader.load(indices, partial(resize_to, size=pixels, options=options)).pixels

    with open_source(Path(file)) as source:
        return with_reader(source, DecodeOptions(), read)


def _opened(run: str | Path) -> TrainedRun:
    return trained.load_trained(run, KINDS, "cuda" if torch.cuda.is_available() else "cpu")


def _arguments(prompt: Mapping[str, Any], repeat: int) -> dict[str, Any]:
    """Returns the arguments of :func:`open_videos` of a prompt."""
    found = {NAMES.get(key, key): value for key, value in prompt.items()}
    return found | ({"seed": found["seed"] + repeat} if "seed" in found else {})


def _counted(parts: Iterator[Tensor], progress: Progress) -> Iterator[Tensor]:
    for part in parts:
        yield part
        progress.add(part.shape[2])
