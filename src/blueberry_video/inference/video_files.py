"""Lists of videos for the commands that use a trained model."""

from collections.abc import Iterable
from pathlib import Path

from blueberry_video.data.metadata import VIDEOS

LISTS = (".txt", ".lst")


def video_files(sources: Iterable[str | Path]) -> list[str]:
    """Returns the videos of files, URLs, folders and lists, each once, in their order.

    Args:
        sources: video files or URLs; folders, of which all video files are taken, also in sub-folders, sorted by path;
            text files (``.txt``) with a path or URL per line, relative to the folder of the list, where empty lines and
            lines that begin with # are ignored.

    Raises:
        FileNotFoundError: a path does not exist, or there is no video.
    """
    found: dict[str, None] = {}
    given = list(sources)
    for source in given:
        found |= dict.fromkeys(_of_source(str(source)))
    if not found:
        raise FileNotFoundError(
            f"VIDEO={' '.join(map(str, given))} names no video: use a file, a URL, a folder with files of "
            f"{', '.join(sorted(VIDEOS.extensions))}, or a .txt file with a path per line."
        )
    return list(found)


def _of_source(source: str) -> list[str]:
    path = Path(source)
    if "://" in source:
        return [source]
    if path.is_dir():
        files = (file for file in path.rglob("*") if file.suffix.lower() in VIDEOS.extensions and file.is_file())
        return [str(file) for file in sorted(files) if not file.name.startswith(".")]
    if not path.is_file():
        raise FileNotFoundError(f"VIDEO={source} does not exist: use the path of a video, a folder, or a .txt list.")
    if path.suffix.lower() not in LISTS:
        return [source]
    lines = (line.strip() for line in path.read_text().splitlines())
    return [line if "://" in line else str(path.parent / line) for line in lines if line and not line.startswith("#")]
