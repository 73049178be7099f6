"""Checks that a run meets the expected values of its config.

``python -m blueberry_video.experiment.gate outputs/<experiment>[/<run>]``, by default the newest run.

Exits with 1 if an expected value is missed, the run did not finish, or the config has no ``expected`` section.
"""

import sys

from blueberry_video.experiment.expected import Verdict
from blueberry_video.experiment.run_folder import RunFolder, parse_run


def gate(run: RunFolder) -> tuple[bool, str]:
    """Returns whether the run passes, and a text with the verdicts."""
    record = run.record
    title = f"{run.experiment} / {run.name}"
    if record["status"] != "finished":
        return (False, f"{title}: status is {record['status']}, not finished. {record['error'] or ''}".rstrip())
    verdicts = [Verdict(**verdict) for verdict in record["expected"]]
    if not verdicts:
        return False, f"{title}: `expected` is empty in its config: add `expected: {{val/motion: {{at_least: 0.6}}}}`."
    missed = sum(not verdict.met for verdict in verdicts)
    result = (
        f"{missed} of {len(verdicts)} expected values missed" if missed else f"all {len(verdicts)} expected values met"
    )
    return not missed, "\n".join([f"{title}: {result}", *(f"  {verdict}" for verdict in verdicts)])


def main(arguments: list[str]) -> int:
    """Prints the verdicts of the run in ``arguments[0]``; returns the exit code."""
    passed, text = gate(parse_run("python -m blueberry_video.experiment.gate", arguments))
    print(text)
    return 0 if passed else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
