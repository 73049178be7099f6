"""Planning entry point: actions that a trained world model plans from an image to a goal image.

    python -m blueberry_video.plan outputs/<name>[/<run>] START GOAL --state 0.1,-0.2 [--out plan.json] [--horizon 2] …

START and GOAL are images, or videos, of which the last frame is used. The planner is that of the run's closed-loop
callback if it has one, with the given settings; otherwise the cross-entropy planner of V-JEPA 2-AC. Only the first
action of a plan is executed before planning again from the new image.
"""

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from blueberry_video.atomic import write_text
from blueberry_video.launch import command_line, signals
from blueberry_video.launch.errors import OneParagraphErrors

NUMBERS = ("samples", "elites", "iterations", "horizon")


def main() -> None:
    parser = argparse.ArgumentParser(prog="blueberry plan", allow_abbrev=False)
    parser.add_argument("run", help="a run folder, or the folder of an experiment: its newest run")
    parser.add_argument("start", metavar="START", help="image, or video of which the last frame is used")
    parser.add_argument("goal", metavar="GOAL", help="image, or video of which the last frame is used")
    parser.add_argument("--state", required=True, help="numbers of the state at START, separated by commas")
    parser.add_argument("--out", help=".json file to write")
    parser.add_argument("--seed", type=int, default=0, help="seed of the sampled actions")
    parser.add_argument("--limit", type=float, help="largest value of each number of a continuous action")
    for key in NUMBERS:
        parser.add_argument(f"--{key}", type=int, help=f"{key} of the planner")
    parser.add_argument("--overwrite", action="store_true", help="replace an existing file")
    known = parser.parse_args(sys.argv[1:])
    command_line.quiet_libraries()
    try:
        state = [float(number) for number in known.state.split(",")]
    except ValueError as error:
        raise ValueError(f"--state={known.state} must be numbers separated by commas, as in 0.1,-0.2.") from error
    if known.out and Path(known.out).exists() and not known.overwrite:
        raise FileExistsError(f"--out={known.out} exists: choose another name, or pass --overwrite to replace it.")
    settings = {key: value for key in NUMBERS if (value := getattr(known, key)) is not None}
    found = plan(known.run, known.start, known.goal, state, known.seed, settings, known.limit)
    print(json.dumps(found["actions"]))
    if known.out:
        Path(known.out).parent.mkdir(parents=True, exist_ok=True)
        write_text(Path(known.out), json.dumps(found, indent=2) + "\n")
        print(f"wrote {known.out}", file=sys.stderr)


def plan(
    run: str | Path,
    start: str | Path,
    goal: str | Path,
    state: Sequence[float],
    seed: int = 0,
    settings: Mapping[str, int] | None = None,
    limit: float | None = None,
) -> dict[str, Any]:
    """Plans the actions that lead from an image to a goal image.

    Args:
        run: a run folder of a world model, or the folder of an experiment: its newest run.
        start, goal: images, or videos, of which the last frame is used; cropped to the size of the run's clips.
        state: K numbers, the state at ``start``.
        seed: of the sampled actions.
        settings: of :class:`~blueberry_video.inference.planner.CrossEntropyPlanner`: ``samples``, ``elites``,
            ``iterations`` and ``horizon``.
        limit: largest value of each number of an action, of continuous actions other than those of DROID.

    Returns:
        ``actions``: names, indices or vectors; ``distance``, the L1 distance of the predicted end to the goal, and
        ``distance_start``, that of the start image; and all settings, as JSON values.

    Raises:
        FileNotFoundError: there is no run, no valid checkpoint, or no such file.
        ValueError: the run is not one of a world model, the state has a different width, or a setting is out of range.
    """
    import torch

    from blueberry_video.experiment import trained
    from blueberry_video.generated_videos import read_last_frame
    from blueberry_video.tasks.action_prediction import ActionPrediction
    from blueberry_video.tasks.clip_format import ClipFormat
    from blueberry_video.tasks.planning import plan_actions, planner_of

    for key, file in (("START", start), ("GOAL", goal)):
        if not Path(file).exists():
            raise FileNotFoundError(f"{key}={file} does not exist: use the path of an image or video file.")
    opened = trained.load_trained(run, (ActionPrediction,), "cuda" if torch.cuda.is_available() else "cpu")
    task, clips = opened.task, ClipFormat.of_run(opened)
    planner = planner_of(opened.config, task.model.action_dim, clips.action_names, settings or {}, limit)
    frames = torch.stack([read_last_frame(file, (clips.height, clips.width)) for file in (start, goal)], dim=1)
    found = plan_actions(task, planner, frames, state, seed, clips.action_names)
    return {
        **found,
        "run": str(opened.path.resolve()),
        "checkpoint": opened.checkpoint.name,
        "start": str(Path(start).resolve()),
        "goal": str(Path(goal).resolve()),
        "state": list(state),
        "seed": seed,
        **{key: getattr(planner, key) for key in NUMBERS},
    }


if __name__ == "__main__":
    with OneParagraphErrors(), signals.handled("No file was written: repeat the command."):
        main()
