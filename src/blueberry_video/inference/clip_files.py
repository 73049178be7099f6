"""Files of generated clips: mp4 with a sidecar of all settings, which a killed command continues.

The sidecar of ``clip.mp4`` is ``clip.json``. It is written when the video is complete, before the file gets its name: a
video with its sidecar is complete, and one without is not of this writer.
"""

import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from blueberry_video.atomic import write_text
from blueberry_video.data.metadata import VIDEOS
from blueberry_video.data.write import write_videos

SLUG = 48  # characters


def clip_files(out: str | Path, prompts: Sequence[str | None], per_prompt: int = 1) -> list[Path]:
    """Returns the files of clips.

    Args:
        out: an mp4 file, of which several clips of one prompt are named <name>_0.mp4, <name>_1.mp4, …; or a folder, of
            files <index>_<words of the prompt>.mp4.
        prompts: caption of each clip.
        per_prompt: clips per prompt.

    Raises:
        ValueError: a number of clips below 1, a file of a different format, or a file for several prompts.
    """
    out = Path(out)
    if per_prompt < 1:
        raise ValueError(f"--per-prompt={per_prompt} must be at least 1.")
    if out.suffix.lower() == ".mp4" and not out.is_dir():
        if len(prompts) > 1:
            raise ValueError(
                f"--out={out} is one file for {len(prompts)} prompts: use a folder, {out.with_suffix('')}."
            )
        return [out] if per_prompt == 1 else [out.with_name(f"{out.stem}_{i}{out.suffix}") for i in range(per_prompt)]
    if out.suffix.lower() in VIDEOS.extensions and not out.is_dir():
        raise ValueError(
            f"--out={out} must end in .mp4, the format that is written, or be a folder: use {out.with_suffix('.mp4')}."
        )
    captions = [caption for caption in prompts for _ in range(per_prompt)]
    digits = max(4, len(str(len(captions) - 1)))
    return [out / f"{index:0{digits}d}_{_slug(caption)}.mp4" for index, caption in enumerate(captions)]


def sidecar(file: Path) -> Path:
    """Returns the file of the settings of a clip."""
    return file.with_suffix(".json")


def check_free(files: Iterable[Path], overwrite: bool = False) -> None:
    """Checks that files are free or have a sidecar.

    Raises:
        FileExistsError: a file is a folder, or, unless ``overwrite``, a video without settings.
    """
    for file in files:
        if file.is_dir() or (file.exists() and not overwrite and not sidecar(file).is_file()):
            raise FileExistsError(
                f"--out={file} exists, without the settings {sidecar(file).name} of a generated clip: choose another "
                "name, or pass --overwrite to replace files."
            )


def is_complete(file: Path, settings: Mapping[str, Any], overwrite: bool = False) -> bool:
    """Returns whether a clip with these settings is complete.

    Raises:
        FileExistsError: the file or its sidecar are of other settings, unless ``overwrite``.
    """
    if overwrite or not sidecar(file).exists():
        return False
    try:
        found = json.loads(sidecar(file).read_text())
    except ValueError:
        found = None
    if found != (wanted := json.loads(json.dumps(settings))):
        changed = "it holds something else"
        if isinstance(found, dict):
            keys = [key for key in {**wanted, **found} if found.get(key) != wanted.get(key)]
            changed = "; ".join(f"{key} is {found.get(key)!r} and would be {wanted.get(key)!r}" for key in keys)
        raise FileExistsError(
            f"{sidecar(file)} is of another clip ({changed}): choose another --out, or pass --overwrite."
        )
    return file.exists()


def write_clip(
    parts: Iterable[Tensor], file: Path, size: tuple[int, int], fps: float, settings: Mapping[str, Any]
) -> None:
    """Writes a clip and its sidecar; both appear when the clip is complete.

    Args:
        parts: consecutive parts (1, 3, n, H, W) in [0, 1].
        file, size, fps: see :func:`~blueberry_video.data.write.write_videos`.
        settings: JSON values.
    """

    def all_parts() -> Iterator[Tensor]:
        yield from parts
        file.unlink(missing_ok=True)  # of --overwrite: the sidecar is never next to another video
        write_text(sidecar(file), json.dumps(settings, indent=2, ensure_ascii=False) + "\n")

    write_videos(all_parts(), [file], size, fps)


def _slug(caption: str | None) -> str:
    words = re.findall(r"\w+", (caption or "").lower())
    return "-".join(words)[:SLUG].rstrip("-") or "clip"
