"""Format of the clips of a run, which ``run.json`` holds for the use of the trained model.

Shapes: clips of T x H x W pixels.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from typing import Any

from lightning import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback

from blueberry_video.models.text_encoder.words import WordText
from blueberry_video.tasks.base import IMAGENET_MEAN, IMAGENET_STD
from blueberry_video.tasks.diffusion import Diffusion

DEFAULT_FPS = 8.0  # of clips without a frame rate
UNIFORM = {"sampler": "uniform", "pad": True}  # of videos for a model that was trained on generated clips


@dataclass(frozen=True)
class ClipFormat:
    """Format of the clips of a run, as JSON in its ``run.json`` under ``clips``.

    Attributes:
        num_frames, height, width: T, H, W.
        classes: label -> class names.
        action_names: names of the actions, in the order of their indices.
        fps: frame rate of a clip, or ``None``.
        sampling: arguments of :class:`~blueberry_video.video.sampling.ClipSampling`, as in validation.
        resize: arguments of :class:`~blueberry_video.video.resize.ResizeOptions`, as in validation.
        decoding: arguments of :class:`~blueberry_video.video.decode.DecodeOptions` that change pixels.
        mean, std: of the normalization of pixels in [0, 1], per channel; ``None``: the model receives [-1, 1].
        vocabulary: words of captions that the text encoder knows; ``None`` if it is not limited to a list.
    """

    num_frames: int
    height: int
    width: int
    classes: Mapping[str, Sequence[str]] = field(default_factory=dict)
    action_names: Sequence[str] = ()
    fps: float | None = None
    sampling: Mapping[str, Any] = field(default_factory=dict)
    resize: Mapping[str, Any] = field(default_factory=dict)
    decoding: Mapping[str, Any] = field(default_factory=dict)
    mean: Sequence[float] | None = None
    std: Sequence[float] | None = None
    vocabulary: Sequence[str] | None = None

    @classmethod
    def of_run(cls, run: Any) -> "ClipFormat":
        """Returns the format in the record of an opened run; reads one clip of its data if it was recorded without."""
        recorded = run.record.get("clips")
        if not recorded:
            return cls.of(run.task, run.data)
        known = {each.name for each in fields(cls)}  # a later version may record more
        clips = cls(**{name: value for name, value in recorded.items() if name in known})
        return replace(clips, classes={label: tuple(names) for label, names in clips.classes.items()})

    @classmethod
    def of(cls, task: Any, data: Any) -> "ClipFormat":
        """Returns the format of the validation clips of a DataModule; reads one clip.

        Raises:
            ValueError: for stored tokens or latents that the task cannot decode.
        """
        dataset, clip = _longest(data.val)
        if reason := _undecodable(task, clip):
            raise ValueError(reason)
        num_frames, height, width = _size(task, clip)
        source = next((each for each in _chain(dataset) if hasattr(each, "sampling")), None)
        files = next((each for each in _chain(dataset) if hasattr(each, "resize")), None)
        text = getattr(task.model, "text", None)
        mean, std = task.input.mean or IMAGENET_MEAN, task.input.std or IMAGENET_STD
        return cls(
            num_frames=num_frames,
            height=height,
            width=width,
            classes={label: tuple(names) for label, names in getattr(data, "classes", {}).items()},
            action_names=tuple(getattr(data, "action_names", ())),
            fps=float(clip["fps"]) if clip.get("fps") else None,
            sampling=_sampling(source, num_frames),
            resize={
                "rule": getattr(files, "resize", "crop"),
                "image_size": [height, width],
                "resample": "fast",
                "interpolation": "bilinear",
                "antialias": getattr(files, "antialias", True),
                "square_pixels": getattr(files, "square_pixels", False),
            },
            decoding={
                name: getattr(decoding, name)
                for name in ("tone_map", "deinterlace")
                if (decoding := getattr(files, "decoding", None)) is not None
            },
            mean=[float(value) for value in mean] if task.normalizes else None,
            std=[float(value) for value in std] if task.normalizes else None,
            vocabulary=tuple(text.vocabulary) if isinstance(text, WordText) and text.vocabulary else None,
        )


class RecordClips(Callback):
    """Records the format of the clips when training begins.

    Args:
        update: receives ``clips=``, the fields of :class:`ClipFormat`, or ``None`` for stored latents or tokens that
            the task cannot decode.
    """

    def __init__(self, update: Callable[..., None]):
        self.update = update

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.is_global_zero:
            data: Any = trainer.datamodule  # type: ignore[attr-defined]
            decodable = not _undecodable(pl_module, _longest(data.val)[1])
            self.update(clips=asdict(ClipFormat.of(pl_module, data)) if decodable else None)


def _sampling(source: Any, num_frames: int) -> dict[str, Any]:
    """Returns the sampling of a dataset of files, or for ``None`` that of clips spread over a whole video."""
    if source is None:
        return {**UNIFORM, "num_frames": num_frames}
    sampling = asdict(source.sampling)
    if sampling["sampler"] == "random":  # of validation on one window: the middle one
        sampling |= {"sampler": "multi_clip", "num_clips": 1}
    return sampling if sampling["sampler"] == "segments" else {**sampling, "num_frames": num_frames, "pad": True}


def _size(task: Any, clip: Mapping[str, Any]) -> tuple[int, int, int]:
    """Returns (T, H, W) in pixels of a clip of a dataset, which may hold latents."""
    if "moments" not in clip:
        frames, _, height, width = clip["video"].shape
        return frames, height, width
    stride = task.model.autoencoder.stride
    t, h, w = (size * step for size, step in zip(clip["moments"].shape[1:], stride, strict=True))
    return t - stride[0] + 1, h, w


def _undecodable(task: Any, clip: Mapping[str, Any]) -> str:
    """Returns why a clip of stored tokens or latents cannot be decoded; empty if it can."""
    diffuses = isinstance(task, Diffusion)
    if "tokens" not in clip and ("moments" not in clip or (diffuses and task.model.autoencoder is not None)):
        return ""
    key = "model.autoencoder" if diffuses else "task.tokenizer"
    return (
        f"{key}=null: the clips of the run are stored latents or tokens, which it cannot decode to pixels. Set {key} "
        "in its config.yaml to the one that encoded them."
    )


def _longest(dataset: Any) -> tuple[Any, Mapping[str, Any]]:
    """Returns a dataset, or the part of a mixture with the longest clips, and its first clip."""
    parts = list(getattr(dataset, "parts", {}).values()) or [dataset]
    clips = [(part, getattr(part, "uncached", part)[0]) for part in parts]
    return max(clips, key=lambda pair: len(pair[1]["video"]) if "video" in pair[1] else 0)


def _chain(dataset: Any) -> Iterator[Any]:
    """Yields a dataset, and the datasets that it reads."""
    yield dataset
    for source in getattr(dataset, "sources", ()):
        yield from _chain(source)
