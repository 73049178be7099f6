"""What can be wrong with a video, as types: a caller counts them, and tells a refusal from a breakage."""


class VideoError(ValueError):
    """Something is wrong with a video; the message is one paragraph naming it and the fix."""


class RefusedSourceError(VideoError):
    """A source that could make us read other files or call other machines: refused before anything is opened."""


class FetchError(VideoError):
    """An address that could not be fetched within its limits."""


class LimitError(VideoError):
    """A video larger than a limit on bytes, duration, pixels or tokens; nothing of it was decoded."""


class BrokenVideoError(VideoError):
    """A file that no backend can read; the message names every backend's reason."""


class DamagedVideoError(BrokenVideoError):
    """A file of which a part cannot be decoded, where salvaging the rest is switched off."""


class KilledError(VideoError):
    """The process that worked on a video was ended: out of time, out of memory, or crashed."""
