"""Model card of a run: task, data, numbers with their baselines and controls, versions, and how to use the weights."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml
from omegaconf import DictConfig, OmegaConf

from blueberry_video.experiment.run_folder import RunFolder
from blueberry_video.experiment.summary import comparison_table, duration, number

TAGS = {  # last part of task._target_ -> pipeline tag of the hub
    "Classification": "video-classification",
    "Distillation": "video-classification",
    "FrameClassification": "video-classification",
    "Anticipation": "video-classification",
    "Diffusion": "text-to-video",
    "Depth": "depth-estimation",
    "MaskedPixels": "feature-extraction",
    "LatentPrediction": "feature-extraction",
}


def model_card(run: RunFolder, license: str | None = None) -> str:
    """Returns the card of a run as Markdown with the metadata of a hub.

    Args:
        run: the run.
        license: licence of the weights; ``None`` for that in the folder of the initial weights, if there is one.
    """
    record, config = run.record, run.config
    inherited = inherited_weights(config)
    license = license or next(filter(None, map(license_of, inherited.values())), None)
    task = str(OmegaConf.select(config, "task._target_") or "").rpartition(".")[2]
    about: dict[str, Any] = {"library_name": "blueberry-video", "tags": ["video", "blueberry-video"]}
    about |= {"pipeline_tag": TAGS[task]} if task in TAGS else {}
    about |= {"license": license} if license else {}
    about |= {"base_model": list(inherited.values())} if inherited else {}
    parts = [
        f"---\n{yaml.safe_dump(about, sort_keys=False)}---",
        f"# {run.experiment}",
        _model(config, record, task),
        _data(config, record),
        _numbers(record),
        _provenance(run, record),
        _use(record, task),
        _licence(inherited, license),
    ]
    return "\n\n".join(filter(None, parts)) + "\n"


def inherited_weights(config: DictConfig) -> dict[str, str]:
    """Returns key -> weights of other origin that a run contains or began with."""
    keys = ("init_from", "task.teacher_from", "model.lora.base", "model.autoencoder.path", "model.text.path")
    found = {key: OmegaConf.select(config, key, default=None) for key in keys}
    return {key: str(value) for key, value in found.items() if value}


def license_of(weights: str) -> str | None:
    """Returns the licence that the card in a local folder of weights states; ``None`` without one."""
    card = Path(weights) / "README.md"
    if not card.is_file():
        return None
    _, opened, rest = card.read_text().partition("---\n")
    try:
        about = yaml.safe_load(rest.partition("---\n")[0]) if opened else None
    except yaml.YAMLError:
        return None
    return str(about["license"]) if isinstance(about, dict) and about.get("license") else None


def _model(config: DictConfig, record: Mapping[str, Any], task: str) -> str:
    target = str(OmegaConf.select(config, "model._target_") or "").rpartition(".")[2]
    steps = f", {record['step']:,} optimizer steps" if record.get("step") else ""
    ended = f" ({record['ended_because']})" if record.get("ended_because") else ""
    lines = [f"A {target}, trained with the task {task}{steps}{ended}."]
    clips = record.get("clips")
    if clips:
        size = f"{clips['num_frames']} frames of {clips['width']} x {clips['height']} pixels"
        sampling = clips.get("sampling", {}).get("sampler", "uniform")
        lines.append(f"\nIt receives clips of {size}, sampled as `{sampling}`, RGB.")
        if clips.get("mean"):
            lines[-1] += f" Pixels are normalized with mean {clips['mean']} and std {clips['std']}."
        for label, names in clips.get("classes", {}).items():
            shown = ", ".join(map(str, names[:20]))
            lines.append(f"\n`{label}`: {shown}{f', … ({len(names)} classes)' if len(names) > 20 else ''}")
    return "\n".join(lines)


def _data(config: DictConfig, record: Mapping[str, Any]) -> str:
    rows = []
    for split in ("train", "val", "test"):
        node = OmegaConf.select(config, f"data.{split}", default=None)
        if node is None:
            continue
        inner = node.get("dataset") or node
        where = inner.get("root") or inner.get("list_file")
        name = str(inner.get("_target_", "")).rpartition(".")[2]
        size = f", {inner['size']:,} clips" if isinstance(inner.get("size"), int) else ""
        rows.append(f"- {split}: {name}{f' of `{where}`' if where else ' (generated)' if size else ''}{size}")
    skipped = f"\n{record['skipped']} broken files were skipped." if record.get("skipped") else ""
    return "\n".join(["## Data", "", *rows]) + skipped


def _numbers(record: Mapping[str, Any]) -> str:
    metrics = record["metrics"]
    if not metrics:
        return ""
    table = comparison_table(metrics)
    header, *rows = table if len(table) > 1 else [["metric", "this run"]]
    shown = {row[0] for row in rows} | {f"{row[0]}_{key}" for row in rows for key in _suffixes(metrics, row[0])}
    rows += [[name, number(value), *[""] * (len(header) - 2)] for name, value in metrics.items() if name not in shown]
    lines = ["## Numbers", "", "One run with one seed. Columns after the first are baselines and controls.", ""]
    lines += [f"| {' | '.join(header)} |", f"|{'---|' * len(header)}"]
    lines += [f"| {' | '.join(row)} |" for row in rows]
    if record["expected"]:
        met = sum(bool(verdict.get("met")) for verdict in record["expected"])
        lines += ["", f"{met} of {len(record['expected'])} expected values of the experiment are met."]
    return "\n".join(lines)


def _suffixes(metrics: Mapping[str, Any], name: str) -> list[str]:
    return [key.removeprefix(f"{name}_") for key in metrics if key.startswith(f"{name}_")]


def _provenance(run: RunFolder, record: Mapping[str, Any]) -> str:
    commit = record.get("commit")
    code = f"commit `{commit}`{' with local changes' if record.get('dirty') else ''}" if commit else "an unknown commit"
    versions = ", ".join(f"{name} {value}" for name, value in record.get("versions", {}).items() if value)
    hardware = record.get("hardware", {})
    device = ", ".join(hardware.get("gpus") or [hardware.get("cpu", "")])
    rows = [
        f"- run `{run.name}`, seed {record.get('seed')}, {duration(record.get('wall_seconds') or 0.0)} on {device}",
        f"- code: {code}",
        f"- {versions}",
    ]
    return "\n".join(
        ["## Provenance", "", *rows, "- `config.yaml` is the resolved config; training on it repeats the run."]
    )


def _use(record: Mapping[str, Any], task: str) -> str:
    call = 'model.predict("clip.mp4")' if TAGS.get(task) == "video-classification" else 'model("clip.mp4")'
    if task in ("Diffusion", "FrameGeneration"):
        call = 'model.generate(Request("a caption"))  # blueberry_video.tasks.requests'
    return f"""## Use

```python
from blueberry_video import load_run

model = load_run("path/to/this/folder")
{call}
```"""


def _licence(inherited: Mapping[str, str], license: str | None) -> str:
    if not inherited:
        return ""
    listed = "\n".join(f"- `{key}`: {value}" for key, value in inherited.items())
    note = "" if license else " Their licences are not known here: see their cards."
    return (
        f"## Inherited weights\n\nThe licence of these weights applies to what was trained from them.{note}\n\n{listed}"
    )


def published_files(run: RunFolder) -> dict[str, str]:
    """Returns name -> text of the files that describe a run beside its weights: ``config.yaml`` and ``run.json``."""
    kept = {
        key: value for key, value in run.record.items() if key not in ("hardware", "job", "wandb", "session_started")
    }
    return {"config.yaml": (run.path / "config.yaml").read_text(), "run.json": json.dumps(kept, indent=2) + "\n"}
