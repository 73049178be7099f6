"""Progress of a long pass over clips, printed to stderr."""

import sys
import time


class Progress:
    """Progress printer: a line every two seconds, and one at the end.

    Args:
        what: prefix of each line.
        total: number of clips.
    """

    def __init__(self, what: str, total: int):
        self.what, self.total, self.done = what, total, 0
        self._began = self._shown = time.monotonic()

    def add(self, clips: int) -> None:
        """Adds a number of finished clips."""
        self.done += clips
        now = time.monotonic()
        if self.done == self.total or now - self._shown > 2:
            self._shown = now
            rate = self.done / max(now - self._began, 1e-9)
            text = f"{self.what}: {self.done:,} of {self.total:,} clips, {rate:,.1f} per second"
            print(text, file=sys.stderr, flush=True)
