"""Metric curves of a run as SVG; colors are CSS variables of the surrounding page, for light and dark themes."""

import io
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from blueberry_video.experiment.summary import REFERENCES, number

Curve = Sequence[tuple[int, float]]

STAGES = ("train", "val", "test")
REFERENCE_COLORS = ("#d9730d", "#b83280", "#0f8b8d", "#8a63d2", "#6b7280", "#a16207")
MAX_POINTS = 400
# Matplotlib draws with these placeholder colors, which are then replaced by CSS variables.
PAGE_COLORS = {"#010203": "var(--ink)", "#040506": "var(--soft)", "#070809": "var(--line)", "#0a0b0c": "var(--accent)"}
INK, SOFT, LINE, ACCENT = PAGE_COLORS
COLORS = {"train": SOFT, "val": ACCENT, "test": "#13795b", "": ACCENT}


def plot_curves(curves: Mapping[str, Curve]) -> Iterator[tuple[str, str]]:
    """Yields title and ``<svg>`` of each chart: ``train/x`` and ``val/x`` share one, with references of ``x`` dashed.

    Metrics with a single value, measured at the end, have no chart; they are in the tables.

    Args:
        curves: metric -> [(step, value)], see :func:`~blueberry_video.experiment.metrics_table.read_curves`.
    """
    references = {name: base for name in curves if (base := _base_metric(name, curves))}
    groups: dict[str, list[str]] = {}
    for name in curves:
        if name not in references and name != "epoch":
            groups.setdefault(_split(name)[1], []).append(name)
    for title, names in groups.items():
        drawn = {name: curves[name] for name in names if len(curves[name]) > 1}
        if drawn:
            lines = {name: curves[name][-1][1] for name, base in references.items() if base in names}
            yield title, _chart(title, drawn, lines)


def _split(name: str) -> tuple[str, str]:
    """``val/loss`` -> ``("val", "loss")``; a name without a stage -> ``("", name)``."""
    stage, _, rest = name.partition("/")
    return (stage, rest) if stage in STAGES and rest else ("", name)


def _base_metric(name: str, curves: Mapping[str, Curve]) -> str | None:
    """``val/loss_trivial`` and ``val/loss_trivial_mean`` -> ``val/loss``, where that was logged."""
    match = re.fullmatch(rf"(.+?)_(?:{'|'.join(REFERENCES)})(?:_.+)?", name)
    return match[1] if match and match[1] in curves else None


def _chart(title: str, curves: Mapping[str, Curve], references: Mapping[str, float]) -> str:
    # The salt makes the ids inside the SVG differ from those of the other charts on the page.
    settings: Any = {"svg.fonttype": "none", "svg.hashsalt": title, "font.family": "sans-serif", "font.size": 9}
    with rc_context(settings):
        figure = Figure(figsize=(4.2, 2.5), layout="constrained")
        axes = figure.add_subplot()
        for name, curve in curves.items():
            stage = _split(name)[0]
            steps, values = _thinned(curve)
            label = f"{stage or 'run'}  {number(curve[-1][1])}"
            axes.plot(steps, values, color=COLORS[stage], linewidth=1.6, label=label, marker="o" * (len(steps) < 3))
        for (name, value), color in zip(references.items(), REFERENCE_COLORS * len(references)):
            label = f"{name.removeprefix(_common_prefix(name, curves))}  {number(value)}".replace("_", " ")
            axes.axhline(value, color=color, linewidth=1.2, linestyle=(0, (4, 3)), label=label)
        _style(axes)
        text = io.StringIO()
        figure.savefig(text, format="svg", transparent=True)
    svg = text.getvalue()
    svg = svg[svg.index("<svg") :]
    for placeholder, variable in PAGE_COLORS.items():
        svg = svg.replace(placeholder, variable)
    return svg


def _common_prefix(name: str, curves: Mapping[str, Curve]) -> str:
    return next((f"{base}_" for base in curves if name.startswith(f"{base}_")), "")


def _thinned(curve: Curve) -> tuple[np.ndarray, np.ndarray]:
    """Returns at most ``MAX_POINTS`` points: means over groups of neighboring points of equal size."""
    points = np.array([(step, value) for step, value in curve if np.isfinite(value)]).reshape(-1, 2)
    if len(points) > MAX_POINTS:
        points = np.array([part.mean(axis=0) for part in np.array_split(points, MAX_POINTS)])
    return points[:, 0], points[:, 1]


def _style(axes: Axes) -> None:
    axes.grid(color=LINE, linewidth=0.8)
    axes.set_axisbelow(True)
    axes.tick_params(colors=SOFT, length=0)
    for side in axes.spines.values():
        side.set_visible(False)
    axes.locator_params(nbins=5)
    axes.legend(frameon=False, labelcolor=INK, fontsize=8.5, handlelength=1.4, loc="best")
