"""Videos in chat messages, as OpenAI's and Qwen's clients write them.

    {"role": "user", "content": [{"type": "video", "video": "clip.mp4", "fps": 1.0}, {"type": "text", "text": "…"}]}
    [{"type": "text", "text": "[0.0 s]"}, {"type": "image_url", "image_url": {"url": "data:image/jpeg;base64,…"}}, …]

A message, a conversation or the parts of a message hold one video, or images, which are the frames of one.
"""

from collections.abc import Mapping
from difflib import get_close_matches
from typing import Any

from blueberry_video.video.errors import VideoError

_VIDEOS, _IMAGES = ("video", "video_url"), ("image", "image_url")  # keys of the content of a part
_SETTINGS = {  # key of a video or image part in qwen-vl-utils → setting
    **{key: key for key in ("fps", "min_frames", "max_frames", "min_pixels", "max_pixels", "total_pixels")},
    **{key: key for key in ("resized_height", "resized_width", "video_start", "video_end")},
    "nframes": "num_frames",
    "sample_fps": "frames_fps",
}
_OTHER_KEYS = ("type", "text", "detail", "raw_fps", "uuid", "cache_control")  # without an effect on the frames


def is_message(value: object) -> bool:
    """Checks whether a source is a message, a conversation, a part or a list of parts."""
    if isinstance(value, list | tuple):
        return bool(value) and all(isinstance(item, Mapping) and is_message(item) for item in value)
    return isinstance(value, Mapping) and ("content" in value or "type" in value or bool(_content_keys(value)))


def read_message(value: Any) -> tuple[Any, dict[str, Any]]:
    """Returns the video of a message and the settings that its part names; other sources unchanged.

    Returns:
        The source, a list of them for images, and setting → value: ``{"video": "a.mp4", "nframes": 8}``
        is ``("a.mp4", {"num_frames": 8})``.

    Raises:
        VideoError: no video and no image, several videos, both, or a key of a part without a meaning.
    """
    if not is_message(value):
        return value, {}
    videos: list[tuple[Any, dict[str, Any]]] = []
    images: list[tuple[Any, dict[str, Any]]] = []
    for part in _parts(value):
        keys = _content_keys(part)
        if not keys:
            continue
        [key, *more] = keys
        if more:
            raise VideoError(f"A part of the message has both {key!r} and {more[0]!r}: keep one of them.")
        content = part[key]
        if isinstance(content, Mapping) and "url" in content:
            content = content["url"]
        (videos if key in _VIDEOS else images).append((content, _settings(part, key)))
    if len(videos) + bool(images) != 1:
        found = f"{len(videos)} videos and {len(images)} images"
        raise VideoError(f"The message holds {found}: pass one video, or images, which are the frames of one.")
    if videos:
        return videos[0]
    chosen: dict[str, Any] = {}
    for _, settings in images:
        if any(chosen.get(key, setting) != setting for key, setting in settings.items()):
            raise VideoError(f"The images of the message have different settings ({chosen}, {settings}): use the same.")
        chosen |= settings
    return [image for image, _ in images], chosen


def _parts(value: Any) -> list[Mapping[str, Any]]:
    if isinstance(value, Mapping):
        return _parts(value["content"]) if "content" in value else [value]
    if isinstance(value, str):  # a message of text alone
        return []
    return [part for item in value for part in _parts(item)]


def _content_keys(part: Mapping[str, Any]) -> list[str]:
    """Keys of the video or image of a part."""
    return [key for key in (*_VIDEOS, *_IMAGES) if part.get(key) is not None]


def _settings(part: Mapping[str, Any], content: str) -> dict[str, Any]:
    settings = {}
    for key, setting in part.items():
        if key in _SETTINGS:
            settings[_SETTINGS[key]] = setting
        elif key not in (content, *_OTHER_KEYS) and setting is not None:
            near = get_close_matches(key, _SETTINGS, n=1)
            hint = f" Did you mean {near[0]!r}?" if near else ""
            raise VideoError(f"A part of the message has the unknown key {key!r}: remove it.{hint}")
    return settings
