"""Lists of videos for the commands that use a trained model."""

from collections.abc import Iterable
from pathlib import Path
from urllib.parse import urlsplit

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
    return list(video_names(sources))


def video_names(sources: Iterable[str | Path]) -> dict[str, str]:
    """Returns the videos of :func:`video_files`, with a relative path for the output of each: that below the given
    folder, or the name of the file.

    Raises:
        FileNotFoundError: see :func:`video_files`.
    """
    found: dict[str, str] = {}
    given = list(sources)
    for source in given:
        for video, name in _of_source(str(source)):
            found.setdefault(video, name)
    if not found:
        raise FileNotFoundError(
            f"VIDEO={' '.join(map(str, given))} names no video: use a file, a URL, a folder with files of "
            f"{', '.join(sorted(VIDEOS.extensions))}, or a .txt file with a path per line."
        )
    return found


def _of_source(source: str) -> list[tuple[str, str]]:
    """Returns (path or URL, relative path for the output) of each video of a source."""
    path = Path(source)
    if "://" in source:
        return [(source, _file_name(source))]
    if path.is_dir():
        files = (file for file in path.rglob("*") if file.suffix.lower() in VIDEOS.extensions and file.is_file())
        return [(str(file), str(file.relative_to(path))) for file in sorted(files) if not file.name.startswith(".")]
    if not path.is_file():
        raise FileNotFoundError(f"VIDEO={source} does not exist: use the path of a video, a folder, or a .txt list.")
    if path.suffix.lower() not in LISTS:
        return [(source, path.name)]
    lines = (line.strip() for line in path.read_text().splitlines())
    kept = [line for line in lines if line and not line.startswith("#")]
    return [(line if "://" in line else str(path.parent / line), _relative(line)) for line in kept]


def _relative(line: str) -> str:
    """Returns a line of a list, if it is a relative path that does not leave the folder; else the name of its file."""
    is_inside = "://" not in line and not Path(line).is_absolute() and ".." not in Path(line).parts
    return str(Path(line)) if is_inside else _file_name(line)


def _file_name(source: str) -> str:
    return Path(urlsplit(source).path).name if "://" in source else Path(source).name
