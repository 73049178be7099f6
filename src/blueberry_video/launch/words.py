"""Words of command lines that are given as one text, with shell quoting.

``ARGS="…" python -m blueberry_video.launch.words <arguments>`` runs Python with these arguments followed by the words
of ``ARGS``, of which the shell expands nothing (Makefile).
"""

import os
import shlex
import sys

from blueberry_video.launch.errors import OneParagraphErrors


def split(text: str) -> list[str]:
    """Splits a text into words.

    Raises:
        ValueError: a quote is not closed.
    """
    try:
        return shlex.split(text)
    except ValueError as error:
        raise ValueError(
            f"ARGS=`{text}` cannot be split into words ({error}): close every quote, and quote values with spaces, "
            "as in ARGS=\"name='two words'\"."
        ) from error


if __name__ == "__main__":
    with OneParagraphErrors():
        words = split(os.environ.get("ARGS", ""))
    os.execv(sys.executable, [sys.executable, *sys.argv[1:], *words])
