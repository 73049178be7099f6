"""Whether a run keeps what its experiment's config expects.

``python -m blueberry_video.experiment.gate outputs/<experiment>[/<run>]``, by default the newest run.

Exits with 1 where an expected value is missed, the run did not finish, or the experiment expects nothing.
"""

import sys

from blueberry_video.experiment.expected import Verdict
from blueberry_video.experiment.run_folder import RunFolder


def gate(run: RunFolder) -> tuple[bool, str]:
    """Whether the run passes, and why (not)."""
    record = run.record
    title = f"{run.experiment} / {run.name}"
    if record["status"] != "finished":
        return False, f"{title}: {record['status']}, so nothing was measured. {record['error'] or ''}".rstrip()
    verdicts = [Verdict(**verdict) for verdict in record["expected"]]
    if not verdicts:
        return (
            False,
            f"{title}: its config expects nothing; add `expected: {{val/motion: {{at_least: 0.6}}}}` to it.",
        )
    missed = sum(not verdict.met for verdict in verdicts)
    result = (
        f"{missed} of {len(verdicts)} expected values missed" if missed else f"all {len(verdicts)} expected values met"
    )
    return not missed, "\n".join([f"{title}: {result}", *(f"  {verdict}" for verdict in verdicts)])


def main(arguments: list[str]) -> int:
    """Prints the verdicts of the run in ``arguments[0]``; returns the exit code."""
    if len(arguments) != 1:
        print("usage: python -m blueberry_video.experiment.gate outputs/<experiment>[/<run>]", file=sys.stderr)
        return 2
    passed, text = gate(RunFolder.open(arguments[0]))
    print(text)
    return 0 if passed else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
