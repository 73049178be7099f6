"""Function of a submitted job: it becomes the process that trains a point."""

import os
import sys
from collections.abc import Mapping, Sequence


class PointJob:
    """Callable that replaces its process by ``python -m <module> …``, which receives the signals of the scheduler.

    Args:
        words: module and arguments.
        folder: working directory.
        environment: variables to set; None removes a variable.
        threads: value of OMP_NUM_THREADS where it is not set.
        session: start a session, so that the process outlives the terminal.
    """

    def __init__(
        self,
        words: Sequence[str],
        folder: str,
        environment: Mapping[str, str | None],
        threads: int | None = None,
        session: bool = False,
    ) -> None:
        self.words = [*words]
        self.folder = folder
        self.environment = dict(environment)
        self.threads = threads
        self.session = session

    def __call__(self) -> None:
        variables = {**os.environ, **self.environment}
        if self.threads is not None:
            variables.setdefault("OMP_NUM_THREADS", str(self.threads))
        os.chdir(self.folder)
        if self.session and os.getpid() != os.getpgrp():
            os.setsid()
        known = {name: value for name, value in variables.items() if value is not None}
        os.execve(sys.executable, [sys.executable, "-m", *self.words], known)
