"""Entry point: writes the weights of a sharded checkpoint to one file (``blueberry consolidate``)."""

import sys

from blueberry_video.experiment.checkpoint import consolidated, latest_good_checkpoint
from blueberry_video.experiment.run_folder import parse_run
from blueberry_video.experiment.summary import shown


def main(arguments: list[str]) -> int:
    """Writes the weights of the newest checkpoint of the run in ``arguments[0]`` and prints the path of the file."""
    run = parse_run("blueberry consolidate", arguments)
    print(shown(consolidated(latest_good_checkpoint(run.path / "checkpoints"))))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
