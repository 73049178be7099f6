"""Progress of a long pass over clips, printed to stderr."""

import sys
import time


class Progress:
    """Progress printer: a line every two seconds, and one at the end.

    Args:
        what: prefix of each line.
        total: number of items.
        unit: name of the items.
    """

    def __init__(self, what: str, total: int, unit: str = "clips"):
        self.what, self.total, self.unit, self.done = what, total, unit, 0
        self._began = self._shown = time.monotonic()

    def add(self, count: int) -> None:
        """Adds a number of finished items."""
        self.done += count
        now = time.monotonic()
        if self.done == self.total or now - self._shown > 2:
            self._shown = now
            rate = self.done / max(now - self._began, 1e-9)
            text = f"{self.what}: {self.done:,} of {self.total:,} {self.unit}, {rate:,.1f} per second"
            print(text, file=sys.stderr, flush=True)
