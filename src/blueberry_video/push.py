"""Push entry point: uploads the weights of a run with a model card to a hub, or writes the card alone.

    python -m blueberry_video.push outputs/<name>[/<run>] --repo org/name [--private] [--revision main]
    python -m blueberry_video.push outputs/<name>[/<run>] --card README.md

The repository holds the card, ``config.yaml``, ``run.json`` and one checkpoint with weights alone, so that a download
is a run folder for ``load_run``; and, where the model has a layout of transformers, its ``config.json`` and
``model.safetensors``. The token is that of huggingface_hub (``HF_TOKEN``), the address ``HF_ENDPOINT``.
"""

import argparse
import re
import sys
import tempfile
from dataclasses import asdict
from pathlib import Path

from blueberry_video.launch import command_line, signals
from blueberry_video.launch.errors import OneParagraphErrors


def main() -> None:
    parser = argparse.ArgumentParser(prog="blueberry push", allow_abbrev=False)
    parser.add_argument("run", help="a run folder, or the folder of an experiment: its newest run")
    kind = parser.add_mutually_exclusive_group(required=True)
    kind.add_argument("--repo", help="repository on the hub, org/name; created if it does not exist")
    kind.add_argument("--card", help="write the model card alone, to this file")
    parser.add_argument("--license", help="licence of the weights, as the hub names it (apache-2.0)")
    parser.add_argument("--private", action="store_true", help="create a private repository")
    parser.add_argument("--revision", help="branch; default: main")
    parser.add_argument("--best", action="store_true", help="weights of the best validation, not the newest")
    parser.add_argument("--overwrite", action="store_true", help="with --card: replace an existing file")
    known = parser.parse_args(sys.argv[1:])
    command_line.quiet_libraries()
    if known.card is not None:
        print(f"wrote {write_card(known.run, known.card, known.license, known.overwrite)}")
    else:
        print(f"pushed {push(known.run, known.repo, known.license, known.private, known.revision, known.best)}")


def write_card(run: str | Path, out: str | Path, license: str | None = None, overwrite: bool = False) -> Path:
    """Writes the model card of a run, see :func:`~blueberry_video.experiment.card.model_card`.

    Raises:
        FileNotFoundError: there is no run.
        FileExistsError: the file exists.
    """
    from blueberry_video.atomic import explained_errors, write_text
    from blueberry_video.experiment.card import model_card
    from blueberry_video.experiment.run_folder import RunFolder

    if (file := Path(out)).exists() and not overwrite:
        raise FileExistsError(f"--card={out} exists: choose another name, or pass --overwrite to replace it.")
    text = model_card(RunFolder.open(run), license)
    with explained_errors(file):
        file.parent.mkdir(parents=True, exist_ok=True)
        write_text(file, text)
    return file


def push(
    run: str | Path,
    repo: str,
    license: str | None = None,
    private: bool = False,
    revision: str | None = None,
    best: bool = False,
) -> str:
    """Uploads a run to a repository on a hub.

    Args:
        run: a run folder, or the folder of an experiment: its newest run.
        repo: ``org/name``; created if it does not exist.
        license: see :func:`~blueberry_video.experiment.card.model_card`.
        private: of a new repository.
        revision: branch; ``None`` for the main one.
        best: use the weights of the best validation.

    Returns:
        Address of the commit.

    Raises:
        FileNotFoundError: there is no run, or no valid checkpoint.
        ValueError: ``repo`` is no name of a repository.
        ConnectionError: the hub cannot be reached, or refuses.
    """
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", repo):
        raise ValueError(f"--repo={repo} is no repository of a hub: use org/name.")
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError

    with tempfile.TemporaryDirectory() as folder:
        stage(run, Path(folder), license, best)
        hub = HfApi()
        try:
            hub.create_repo(repo, private=private, exist_ok=True)
            done = hub.upload_folder(folder_path=folder, repo_id=repo, revision=revision, commit_message=f"Push {run}")
        except (HfHubHTTPError, OSError) as error:
            reason = " ".join(str(error).split())
            raise ConnectionError(
                f"{hub.endpoint} did not take {repo} ({reason}): check the network, HF_ENDPOINT, and that HF_TOKEN may "
                "write to this organization."
            ) from error
    return str(done.commit_url)


def stage(run: str | Path, folder: Path, license: str | None = None, best: bool = False) -> None:
    """Writes the files of a repository into an empty folder; the arguments are those of :func:`push`."""
    from blueberry_video.atomic import write_text
    from blueberry_video.experiment.card import model_card, published_files
    from blueberry_video.experiment.checkpoint import AtomicCheckpointIO
    from blueberry_video.experiment.run_folder import RunFolder
    from blueberry_video.experiment.trained import load_trained
    from blueberry_video.inference.export import export_model, no_layout
    from blueberry_video.tasks.clip_format import ClipFormat

    trained, opened = load_trained(run, best=best), RunFolder.open(run)
    if reason := no_layout(trained.task.model):
        print(f"without the layout of transformers: {reason}", file=sys.stderr)
    else:
        export_model(trained.task.model, folder, asdict(ClipFormat.of_run(trained)))
    step = opened.record.get("step") or 0
    state = {"state_dict": trained.task.state_dict(), "global_step": step}
    AtomicCheckpointIO().save_checkpoint(state, folder / "checkpoints" / f"step_{step:08d}.ckpt")
    for name, text in (published_files(opened) | {"README.md": model_card(opened, license)}).items():
        write_text(folder / name, text)


if __name__ == "__main__":
    with OneParagraphErrors(), signals.handled("The upload is not complete: repeat the command."):
        main()
