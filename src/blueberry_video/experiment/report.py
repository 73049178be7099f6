"""``report.html``: report of a run in one self-contained file, without scripts or network access.

``python -m blueberry_video.experiment.report outputs/<experiment>[/<run>]`` writes it again, by default for the newest
run.
"""

import base64
import html
import json
import sys
import warnings
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from blueberry_video.atomic import write_text
from blueberry_video.experiment import summary as summaries
from blueberry_video.experiment.curves import plot_curves
from blueberry_video.experiment.expected import Verdict
from blueberry_video.experiment.metrics_table import read_curves
from blueberry_video.experiment.run_folder import RunFolder, parse_run
from blueberry_video.experiment.summary import comparison_table, duration, number, shown, skipped_files
from blueberry_video.installation import start_command

CSS = """
:root { color-scheme: light dark; --ink: #1d2333; --soft: #667085; --line: #e3e6ee; --card: #ffffff; --page: #f5f6fa;

  --good: #13795b; --good-back: #dff3ea; --bad: #b42318; --bad-back: #fde7e4; --accent: #4759d6; }
@media (prefers-color-scheme: dark) { :root { --ink: #e6e9f2; --soft: #98a1b5; --line: #2b3143; --card: #191d29;
  --page: #11141d; --good: #5fd3a5; --good-back: #16382c; --bad: #ff8f84; --bad-back: #43201d; --accent: #93a0ff; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--page); color: var(--ink); font: 15px/1.5 system-ui, sans-serif; }
main { max-width: 1180px; margin: 0 auto; padding: 32px 20px 64px; }
h1 { margin: 0; font-size: 30px; letter-spacing: -.02em; }
h2 { margin: 36px 0 12px; font-size: 18px; }
.soft, figcaption, dt { color: var(--soft); }
.card { background: var(--card); border: 1px solid var(--line); border-radius: 12px; padding: 16px 20px; }
.card { overflow-x: auto; }
.chip { display: inline-block; padding: 1px 10px; border-radius: 99px; font-size: 13px; font-weight: 600; }
.good { color: var(--good); background: var(--good-back); }
.bad { color: var(--bad); background: var(--bad-back); }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; }
th { color: var(--soft); font-weight: 500; }
th, td { padding: 6px 14px 6px 0; border-bottom: 1px solid var(--line); text-align: right; }
th:first-child, td:first-child { text-align: left; }
td.own { font-weight: 700; }
tr:last-child td { border-bottom: 0; }
.grid { display: grid; gap: 16px; grid-template-columns: repeat(auto-fit, minmax(340px, 1fr)); }
figure { margin: 0; }
figure svg { width: 100%; height: auto; display: block; }
figure img { max-width: 100%; border-radius: 6px; display: block; margin-top: 8px; }
.media > * + * { margin-top: 16px; }
.pictures { display: flex; gap: 20px; align-items: flex-start; }
.pictures img { image-rendering: pixelated; min-width: 0; max-height: 560px; }
dl { display: grid; grid-template-columns: max-content 1fr; gap: 4px 18px; margin: 0; }
dd { margin: 0; overflow-wrap: anywhere; }
pre, code { font: 13px/1.5 ui-monospace, monospace; }
pre { margin: 8px 0; white-space: pre-wrap; overflow-wrap: anywhere; }
summary { cursor: pointer; color: var(--accent); }
.stack > .card + .card { margin-top: 12px; }
td.note { text-align: left; }
"""


def write_report(run: RunFolder) -> Path:
    """Writes ``report.html`` to the run folder, from the other files in it, and returns its path."""
    record = run.record
    curves = read_curves(run.path / "metrics.csv")
    sections = [
        _header(run, record),
        _section("Results", _comparison_table(record["metrics"])),
        _section("Expected values", _verdict_table([Verdict(**verdict) for verdict in record["expected"]])),
        _section("Pictures", _media(run.path / "media")),
        _section("Curves", _curves(curves)),
        _section("Final metrics", _final_metrics(record["metrics"])),
        _section("Provenance", _provenance(run, record)),
    ]
    title = html.escape(f"{run.experiment} / {run.name}")
    page = (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{title}</title><style>{CSS}</style></head><body><main>{''.join(sections)}</main></body></html>\n"
    )
    path = run.path / "report.html"
    write_text(path, page)
    return path


def conclude(run: RunFolder) -> None:
    """Writes the report of a run that has ended, or warns if that fails, and prints the summary."""
    try:
        write_report(run)
    except OSError as error:  # run.json contains the results
        later = start_command("report", run.experiment)
        warnings.warn(f"report.html is not written ({error}): `{later}` writes it later.", stacklevel=2)
    print(f"\n{summaries.summary(run)}")


def _header(run: RunFolder, record: Mapping[str, Any]) -> str:
    finished = record["status"] == "finished"
    hypothesis = run.config.get("hypothesis") or {}
    claim = f"<p>{html.escape(str(hypothesis['claim']))}</p>" if hypothesis.get("claim") else ""
    error = f"<pre>{html.escape(record['error'])}</pre>" if record["error"] else ""
    skipped = f"<p>{text}</p>" if (text := skipped_files(record)) else ""
    return (
        f"<h1>{html.escape(run.experiment)}</h1>"
        f'<p class="soft">run {html.escape(run.name)} · {_chip(record["status"], finished)} · '
        f"{duration(record['wall_seconds'])} · {_highlights(run.config)}</p>{claim}{skipped}{error}"
    )


def _highlights(config: Any) -> str:
    """Returns one line with task, model, data, optimizer and their main settings."""
    found = [_short_target(config.get(key)) for key in ("task", "model", "data", "optimizer")]
    for key in ("trainer.max_steps", "data.batch_size", "optimizer.lr", "seed"):
        value = OmegaConf.select(config, key)
        if value is not None:
            found.append(f"{key.split('.')[-1]} {value}")
    return html.escape(" · ".join(text for text in found if text))


def _short_target(section: Any) -> str | None:
    target = section.get("_target_") if hasattr(section, "get") else None
    return str(target).rsplit(".", 1)[-1] if target else None


def _comparison_table(metrics: Mapping[str, float | None]) -> str:
    header, *rows = comparison_table(metrics)
    body = [[html.escape(metric), f'<td class="own">{value}</td>', *others] for metric, value, *others in rows]
    return _table(header, body)


def _verdict_table(verdicts: Sequence[Verdict]) -> str:
    body = [
        [
            html.escape(verdict.metric),
            f"{'≥' if verdict.bound == 'at_least' else '≤'} {verdict.limit:g}",
            number(verdict.value),
            _chip("met" if verdict.met else "missed", verdict.met),
            f'<td class="note">{html.escape(verdict.note)}</td>',
        ]
        for verdict in verdicts
    ]
    return _table(["metric", "expected", "measured", "verdict", ""], body)


def _media(folder: Path) -> str:
    """Shows confusion matrices, and the newest video of each name with its frames and the first one, collapsed."""
    steps: dict[str, list[tuple[int, Path]]] = {}
    for path in sorted(folder.glob("*.gif")):
        name, _, digits = path.stem.rpartition("_")
        steps.setdefault(name, []).append((int(digits), path))
    figures = [
        f'<figure class="card"><figcaption>{html.escape(path.stem)}</figcaption>{_image(path, path.stem)}</figure>'
        for path in sorted(folder.glob("confusion_*.png"))
    ]
    for name, made in steps.items():
        (step, newest), (first_step, first) = made[-1], made[0]
        sheet = newest.with_suffix(".png")
        shown_frames = _image(sheet, "its frames") if sheet.is_file() else ""
        start = _fold(f"at step {first_step}", _image(first, f"step {first_step}")) if first != newest else ""
        caption = f"<figcaption>{html.escape(name)}, step {step}</figcaption>"
        pictures = f'<div class="pictures">{_image(newest, name)}{shown_frames}</div>'
        figures.append(f'<figure class="card">{caption}{pictures}{start}</figure>')
    return f'<div class="media">{"".join(figures)}</div>' if figures else ""


def _image(path: Path, description: str) -> str:
    kind = path.suffix.removeprefix(".")
    data = base64.b64encode(path.read_bytes()).decode()
    text = html.escape(description)
    return f'<img src="data:image/{kind};base64,{data}" alt="{text}" title="{text}">'


def _curves(curves: Mapping[str, Sequence[tuple[int, float]]]) -> str:
    figures = [
        f'<figure class="card"><figcaption>{html.escape(title)}</figcaption>{svg}</figure>'
        for title, svg in plot_curves(curves)
    ]
    return f'<div class="grid">{"".join(figures)}</div>' if figures else ""


def _final_metrics(metrics: Mapping[str, float | None]) -> str:
    rows = [[html.escape(name), number(value)] for name, value in sorted(metrics.items())]
    return _fold(f"all {len(metrics)}", _table(["metric", "value"], rows)) if metrics else ""


def _provenance(run: RunFolder, record: Mapping[str, Any]) -> str:
    machine = record["hardware"]
    commit = record["commit"] or "none: not a git repository"
    changes = f", with uncommitted changes (SHA-256 {record['diff_hash'][:12]})" if record["dirty"] else ""
    facts = {
        "started": record["started"],
        "resumed": f"{len(record['resumes'])} times" if record["resumes"] else "never",
        "training ended": record.get("ended_because") or "-",
        "seed": record["seed"],
        "commit": f"{commit}{changes}",
        "machine": f"{machine['cpu']}, {machine['cores']} cores, {machine['memory_gib']} GiB",
        "GPUs": ", ".join(machine["gpus"]) or "none",
        "versions": ", ".join(f"{name} {version}" for name, version in record["versions"].items() if version),
        "wandb": record["wandb"].get("url") or f"offline, run id {record['wandb']['id']}",
    }
    listed = "".join(f"<dt>{key}</dt><dd>{html.escape(str(value))}</dd>" for key, value in facts.items())
    repeat = f"python -m blueberry_video.train {shown(run.path / 'config.yaml')}"
    config = html.escape((run.path / "config.yaml").read_text())
    return (
        f'<div class="stack"><div class="card"><dl>{listed}</dl></div>'
        f'<div class="card"><span class="soft">repeat this run</span><pre>{html.escape(repeat)}</pre>'
        f"{_fold('config.yaml', f'<pre>{config}</pre>')}"
        f"{_fold('run.json', f'<pre>{html.escape(json.dumps(record, indent=2))}</pre>')}</div></div>"
    )


def _section(title: str, body: str) -> str:
    return f"<h2>{title}</h2>{body}" if body else ""


def _fold(title: str, body: str) -> str:
    return f"<details><summary>{html.escape(title)}</summary>{body}</details>"


def _chip(text: str, good: bool) -> str:
    return f'<span class="chip {"good" if good else "bad"}">{html.escape(text)}</span>'


def _table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """HTML table. Cells are HTML; a cell that is a ``<td>`` is used unchanged. Without rows, an empty string."""
    head = "".join(f"<th>{cell}</th>" for cell in header)
    body = "".join(
        f"<tr>{''.join(cell if cell.startswith('<td') else f'<td>{cell}</td>' for cell in row)}</tr>" for row in rows
    )
    return f'<div class="card"><table><tr>{head}</tr>{body}</table></div>' if body else ""


def main(arguments: list[str]) -> int:
    """Writes the report of the run in ``arguments[0]`` and prints its path; returns the exit code."""
    print(shown(write_report(parse_run("blueberry report", arguments))))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
