"""Error messages without tracebacks."""

import errno
import os
import re
import sys
import textwrap
import traceback
from pathlib import Path
from types import TracebackType

from blueberry_video.installation import start_command

PACKAGE = Path(__file__).resolve().parents[1]
TRAINER = ("pytorch", "trainer", "trainer.py")  # the end of the path of Lightning's file
FULL = {errno.ENOSPC, errno.EDQUOT}
DENIED = {errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EISDIR}
TRACEBACK_VARIABLE = "BLUEBERRY_TRACEBACK"


class OneParagraphErrors:
    """Context manager that prints an error raised by this package without traceback and exits with code 1.

    Errors from other code keep their traceback: they are bugs. BLUEBERRY_TRACEBACK=1 shows every traceback. This is not
    a ``sys.excepthook``, because wandb replaces it with one that prints the traceback.
    """

    def __enter__(self) -> None: ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        message = None if error is None or os.environ.get(TRACEBACK_VARIABLE) == "1" else paragraph(error)
        if message is not None:
            text = textwrap.fill(f"Error: {message}", 118, break_long_words=False, break_on_hyphens=False)
            print(f"\n{text}", file=sys.stderr)
            raise SystemExit(1) from None


def paragraph(error: BaseException) -> str | None:
    """Returns the message of an error that this package raised or a config value caused; None for other errors.

    Unwraps the errors of constructors called by Hydra and of DataLoader workers, which send their traceback as text.
    """
    if type(error).__name__ == "InstantiationException" and error.__cause__ is not None:
        key = re.search(r"full_key: (\S+)", str(error))
        inner = paragraph(error.__cause__) or f"{type(error.__cause__).__name__}: {error.__cause__}"
        return f"`{key.group(1)}` cannot be built: {inner}" if key else inner
    if isinstance(error, OSError) and error.errno in DENIED and error.filename:
        return _denied(str(error.strerror), Path(os.fsdecode(error.filename)))
    if isinstance(error, OSError) and error.errno in FULL and error.strerror:  # not explained where it was raised
        where = f": {os.fsdecode(error.filename)}" if error.filename else ""
        return (
            f"{error.strerror}{where}. Free some space (`df -h` shows it), or use another disk, for example with "
            "output_dir=…; then repeat the command, with resume=last for a run."
        )
    worker = re.match(r"Caught \w+ in DataLoader worker process \d+\.\nOriginal Traceback", str(error))
    if worker:
        files = re.findall(r'^  File "([^"]+)"', str(error), re.MULTILINE)
        _, _, message = str(error).rstrip().rpartition(f"\n{type(error).__name__}: ")
        if (found := re.fullmatch(r"\[Errno (\d+)\] (.*): '(.*)'", message)) and int(found[1]) in DENIED:
            return _denied(found[2], Path(found[3]))
        return message if files and Path(files[-1]).is_relative_to(PACKAGE) else None
    frames = traceback.extract_tb(error.__traceback__)
    ours = bool(frames) and Path(frames[-1].filename).is_relative_to(PACKAGE)
    if ours:
        return str(error) if isinstance(error, Exception) else None
    return _trainer_error(error, frames)


def _denied(reason: str, path: Path) -> str:
    """Returns the message for a file or folder that this user must not read or write."""
    if reason in (os.strerror(errno.ENOTDIR), os.strerror(errno.EISDIR)):
        return f"{path}: {reason}. A file and a folder are confused: correct the path, or move what is in its place."
    if reason == os.strerror(errno.EROFS):
        return f"{path}: {reason}. Use a path on a different file system."
    paths = [*reversed(path.absolute().parents), path.absolute()]
    blocked = next((part for part in paths if not os.access(part, os.X_OK if part in paths[:-1] else os.R_OK)), path)
    if not path.parent.is_dir() or not os.path.lexists(path):
        blocked = path.parent if os.access(path.parent, os.X_OK) else blocked
    return (
        f"{path}: {reason}. This user has no permission for {blocked}: change it (`ls -ld '{blocked}'` shows it, "
        "`chmod u+rwX` adds it), or use a different path."
    )


def _trainer_error(error: BaseException, frames: traceback.StackSummary) -> str | None:
    """Returns the message of an error of Lightning's Trainer constructor, which Hydra does not wrap; None otherwise."""
    is_bad_value = isinstance(error, ValueError | TypeError) or type(error).__name__ == "MisconfigurationException"
    in_constructor = any(frame.name == "__init__" and Path(frame.filename).parts[-3:] == TRAINER for frame in frames)
    if not is_bad_value or not in_constructor:
        return None
    needs_gpu = re.search(r"gpu|cuda", str(error), re.IGNORECASE)
    hint = f" Use `trainer=cpu`; `{start_command('doctor')}` lists the devices of this machine." if needs_gpu else ""
    return f"`trainer` cannot be built: {error}{hint}"
