"""Exception types of the video pipeline, and the one-line form of an error."""


class VideoError(ValueError):
    """Base class of all errors about a video. The message is one paragraph naming the video, the reason and the fix."""


class RefusedSourceError(VideoError):
    """A source that could open other files or call other machines, refused before anything is opened."""


class FetchError(VideoError):
    """A URL that could not be fetched within its limits."""


class LimitError(VideoError):
    """A video above a limit on bytes, duration, pixels or tokens. No frame of it was decoded."""


class BrokenVideoError(VideoError):
    """A file that no backend can decode. The message names the reason of every backend."""


class DamagedVideoError(BrokenVideoError):
    """A file that is partly undecodable while ``salvage`` is off."""


class KilledError(VideoError):
    """The process that worked on a video was killed: out of time, out of memory, or crashed."""


def one_line(error: BaseException) -> str:
    """Returns the first 200 characters of an error on one line (torchcodec's is 6 kB where FFmpeg is missing)."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= 200 else text[:200] + "…"
