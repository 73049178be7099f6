"""Numbers in the curves, tables and pictures of the report."""

import json
import math
import re
from pathlib import Path

import numpy as np
import pytest
from matplotlib.axes import Axes
from matplotlib.colors import to_hex
from matplotlib.figure import Figure
from omegaconf import OmegaConf
from PIL import Image

from blueberry_video.experiment import curves, report
from blueberry_video.experiment.curves import plot_curves
from blueberry_video.experiment.expected import Verdict
from blueberry_video.experiment.run_folder import RunFolder
from blueberry_video.experiment.summary import comparison_table, comparisons, number, summary


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> tuple[list, list]:
    """Returns the lists of drawn curves (steps, values, options) and of reference lines (value, options)."""
    lines: list = []
    references: list = []
    plot, axhline = Axes.plot, Axes.axhline

    def draw(self: Axes, steps, values, **options):
        lines.append((list(steps), list(values), options))
        return plot(self, steps, values, **options)

    def reference(self: Axes, value, **options):
        references.append((value, options))
        return axhline(self, value, **options)

    monkeypatch.setattr(Axes, "plot", draw)
    monkeypatch.setattr(Axes, "axhline", reference)
    return lines, references


def test_curve_is_drawn_over_its_steps_with_its_last_value(drawn):
    lines, references = drawn
    points = {
        "train/loss": [(0, 3.0), (10, 2.5), (20, 1.23456)],
        "val/loss": [(5, 4.0), (20, 0.5)],
        "val/loss_trivial": [(5, 6.0), (20, 7.0)],
        "val/loss_random_init_mean": [(20, 8.25)],
        "lr": [(0, 0.1), (20, 0.2)],
    }
    assert [title for title, _ in plot_curves(points)] == ["loss", "lr"]
    train, val, rate = lines
    assert (train[0], train[1], train[2]["label"], train[2]["marker"]) == (
        [0, 10, 20],
        [3.0, 2.5, 1.23456],
        "train  1.235",
        "",
    )
    assert (val[0], val[1], val[2]["label"], val[2]["marker"]) == ([5, 20], [4.0, 0.5], "val  0.5", "o")
    assert (rate[0], rate[1], rate[2]["label"]) == ([0, 20], [0.1, 0.2], "run  0.2")
    assert len({options["color"] for _, _, options in lines}) == 2
    assert [(value, options["label"]) for value, options in references] == [
        (7.0, "trivial  7"),
        (8.25, "random init mean  8.25"),
    ]
    assert len({options["color"] for _, options in references}) == 2
    assert [options["linestyle"] for _, options in references] == [(0, (4, 3))] * 2, "dashed"


def test_more_references_than_colors_are_drawn(drawn):
    names = [f"val/x_trivial_{index}" for index in range(8)]
    points = {"val/x": [(0, 1.0), (1, 2.0)], **{name: [(1, float(index))] for index, name in enumerate(names)}}
    list(plot_curves(points))
    assert [value for value, _ in drawn[1]] == [float(index) for index in range(8)]


def test_name_that_only_looks_like_a_reference_has_a_chart():
    curve = [(0, 1.0), (1, 2.0)]
    names = ["val/x_trivial", "val/y_other", "val/y", "other/z", "val/"]
    assert [title for title, _ in plot_curves(dict.fromkeys(names, curve))] == [
        "x_trivial",
        "y_other",
        "y",
        "other/z",
        "val/",
    ]


def test_axes_have_a_grid_and_neither_frame_nor_ticks():
    axes = Figure().add_subplot()
    axes.plot([0.0, 1.0], [0.0, 1.0], label="x")
    curves._style(axes)
    assert not any(side.get_visible() for side in axes.spines.values())
    for tick in (*axes.xaxis.get_major_ticks(), *axes.yaxis.get_major_ticks()):
        assert tick.tick1line.get_markersize() == 0
        assert tick.gridline.get_visible()
        assert tick.gridline.get_color() == curves.LINE
    assert axes.get_axisbelow() is True
    assert [to_hex(text.get_color()) for text in axes.get_legend().get_texts()] == [curves.INK]


def test_long_curve_is_averaged_in_groups_of_neighbors():
    steps, values = curves._thinned([(step, step**2) for step in range(400)])
    assert (steps.tolist(), values.tolist()) == (list(range(400)), [step**2 for step in range(400)])
    steps, values = curves._thinned([(step, 10.0 * step) for step in range(800)])
    np.testing.assert_allclose(steps, np.arange(400) * 2 + 0.5)
    np.testing.assert_allclose(values, 10 * steps)
    steps, values = curves._thinned([(0, math.nan), (1, 2.0), (2, math.inf), (3, 4.0)])
    assert (steps.tolist(), values.tolist()) == ([1, 3], [2.0, 4.0])


def test_comparisons_have_the_values_of_the_metric_and_of_each_reference():
    metrics = {"a": 1.0, "a_trivial": 2.0, "a_shuffled": None, "b": 3.0, "c": 4.0, "c_scratch": 5.0}
    assert [(row.metric, row.value, row.references) for row in comparisons(metrics)] == [
        ("a", 1.0, {"trivial": 2.0, "shuffled": None}),
        ("c", 4.0, {"scratch": 5.0}),
    ]
    assert comparison_table(metrics) == [
        ["metric", "this run", "trivial", "from scratch", "shuffled"],
        ["a", "1", "2", "-", "-"],
        ["c", "4", "-", "5", "-"],
    ]


@pytest.mark.parametrize(("value", "text"), [(None, "-"), (0.123456, "0.1235"), (123456.0, "1.235e+05"), (0.0, "0")])
def test_number(value: float | None, text: str):
    assert number(value) == text


@pytest.mark.parametrize(
    ("verdict", "text"),
    [
        (Verdict("a", "at_least", 0.5, 0.25, False), "MISSED  a = 0.25 (expected >= 0.5)"),
        (Verdict("a", "at_most", 0.5, 0.25, True), "met     a = 0.25 (expected <= 0.5)"),
        (Verdict("a", "at_most", 2, None, False, "why"), "MISSED  a = no value (expected <= 2): why"),
    ],
)
def test_text_of_a_verdict(verdict: Verdict, text: str):
    assert str(verdict) == text


@pytest.fixture
def run(tmp_path: Path) -> RunFolder:
    config = {"name": "idea", "seed": 3, "trainer": {"max_steps": 70}, "data": {"_target_": "a.b.Clips"}}
    config |= {"expected": {"val/a": {"at_least": 0.5}, "val/b": {"at_most": 0.25}}}
    return RunFolder.create(OmegaConf.create(config), tmp_path)


def picture(folder: Path, name: str, color: int) -> None:
    folder.mkdir(exist_ok=True)
    Image.new("L", (2, 2), color).save(folder / name)


def test_newest_and_first_pictures_of_each_name_are_shown(run: RunFolder):
    for step in (2, 9, 10):
        picture(run.path / "media", f"sample_a_{step:08d}.gif", step)
    picture(run.path / "media", "sample_a_00000010.png", 100)
    picture(run.path / "media", "other_00000005.gif", 5)
    shown = report._media(run.path / "media")
    figures = shown.split('<figure class="card">')[1:]
    assert [re.findall(r"<figcaption>(.*?)</figcaption>", figure) for figure in figures] == [
        ["other, step 5"],
        ["sample_a, step 10"],
    ]
    assert [re.findall(r'alt="(.*?)"', figure) for figure in figures] == [
        ["other"],
        ["sample_a", "its frames", "step 2"],
    ]
    assert [re.findall(r"data:image/(\w+);", figure) for figure in figures] == [["gif"], ["gif", "png", "gif"]]
    assert report._image(run.path / "media" / "sample_a_00000010.gif", "sample_a") in figures[1]
    assert report._image(run.path / "media" / "sample_a_00000002.gif", "step 2") in figures[1]
    assert "<details><summary>at step 2</summary>" in figures[1]
    assert "<details>" not in figures[0], "the first picture is the newest"
    assert report._media(run.path / "nothing") == ""


def test_report_of_a_finished_run(run: RunFolder):
    run.finish({"val/a": 0.5, "val/a_trivial": 0.125, "val/b": 0.75}, "the end", 70)
    text = report.write_report(run).read_text()
    assert text == (run.path / "report.html").read_text()
    assert text.startswith('<!doctype html>\n<html lang="en">')
    titles = re.findall("<h2>(.*?)</h2>", text)
    assert titles == ["Results", "Expected values", "Final metrics", "Provenance"]
    assert '<span class="chip good">finished</span>' in text
    assert "Clips · max_steps 70 · seed 3" in text
    results = text[text.index("<h2>Results") : text.index("<h2>Expected")]
    assert '<tr><td>val/a</td><td class="own">0.5</td><td>0.125</td></tr>' in results
    verdicts = text[text.index("<h2>Expected") : text.index("<h2>Final")]
    assert "<td>val/a</td><td>≥ 0.5</td><td>0.5</td>" in verdicts
    assert "<td>val/b</td><td>≤ 0.25</td><td>0.75</td>" in verdicts
    assert re.findall(r'chip (\w+)">(\w+)<', verdicts) == [("good", "met"), ("bad", "missed")]
    assert "<summary>all 3</summary>" in text
    facts = dict(re.findall("<dt>(.*?)</dt><dd>(.*?)</dd>", text))
    record = run.record
    assert facts["resumed"] == "never"
    assert (facts["training ended"], facts["seed"], facts["started"]) == ("the end", "3", record["started"])
    assert facts["wandb"] == f"offline, run id {record['wandb']['id']}"
    assert f"{record['hardware']['cores']} cores, {record['hardware']['memory_gib']} GiB" in facts["machine"]
    assert f"torch {record['versions']['torch']}" in facts["versions"]
    assert f"python -m blueberry_video.train {run.path / 'config.yaml'}" in text


def test_provenance_of_a_dirty_resumed_run_on_gpus(run: RunFolder):
    with pytest.raises(RuntimeError), run:
        raise RuntimeError("a < b")
    record = run.record
    run.update(
        commit="c" * 40,
        dirty=True,
        diff_hash="0123456789abcdef",
        resumes=[{}, {}],
        hardware={**record["hardware"], "gpus": ["H200", "H100"]},
        wandb={"id": "x", "url": "https://w/x"},
        versions={"torch": "2", "missing": None},
    )
    text = report.write_report(run).read_text()
    facts = dict(re.findall("<dt>(.*?)</dt><dd>(.*?)</dd>", text))
    assert facts["commit"] == f"{'c' * 40}, with uncommitted changes (SHA-256 0123456789ab)"
    assert (facts["resumed"], facts["GPUs"], facts["wandb"]) == ("2 times", "H200, H100", "https://w/x")
    assert (facts["versions"], facts["training ended"]) == ("torch 2", "-")
    assert '<span class="chip bad">failed</span>' in text
    assert "<pre>RuntimeError: a &lt; b</pre>" in text
    run.update(commit=None, dirty=None)
    facts = dict(re.findall("<dt>(.*?)</dt><dd>(.*?)</dd>", report.write_report(run).read_text()))
    assert facts["commit"] == "none: not a git repository"


def test_summary_names_the_results(run: RunFolder, monkeypatch: pytest.MonkeyPatch):
    run.finish({}, "trainer.max_steps=70 reached")
    run.update(wall_seconds=200, wandb={"id": "x", "url": None, "folder": None})
    assert summary(run).splitlines()[0] == f"idea / {run.name}: finished after 3 min 20 s: trainer.max_steps=70 reached"
    last = summary(run).split("results\n")[1].splitlines()
    assert last == [f"  files     {run.path}"]
    run.update(wandb={"id": "x", "url": "https://w/x", "folder": "wandb/offline"})
    report.write_report(run)
    monkeypatch.chdir(run.path.parent)
    last = summary(run).split("results\n")[1].splitlines()
    assert last[0] == f"  report    {run.name}/report.html"
    assert re.fullmatch(rf"  terminal  \S*wandb leet {run.name}/wandb/offline", last[1])
    assert last[2:] == ["  wandb     https://w/x", f"  files     {run.name}"]


def test_run_json_in_the_report_is_complete(run: RunFolder):
    run.finish({"val/a": math.nan})
    text = (run.path / "run.json").read_text()
    assert text.endswith("}\n")
    assert json.loads(text) == run.record
