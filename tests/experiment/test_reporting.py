"""Summary, report and gate of a finished run."""

import re
from html.parser import HTMLParser
from pathlib import Path

import pytest
import torch
from omegaconf import OmegaConf
from PIL import Image

from blueberry_video.callbacks import contact_sheet, save_gif
from blueberry_video.experiment import gate, report
from blueberry_video.experiment.curves import PAGE_COLORS, plot_curves
from blueberry_video.experiment.metrics_table import MetricsTable
from blueberry_video.experiment.run_folder import RunFolder
from blueberry_video.experiment.summary import comparisons, duration, summary

METRICS = {
    "val/loss": 0.4123,
    "val/loss_trivial": 0.92,
    "probe/motion": 0.61,
    "probe/motion_random_init": 0.22,
    "probe/motion_shuffled": 0.14,
    "val/share": 0.45,
}


@pytest.fixture
def run(tmp_path: Path) -> RunFolder:
    config = {
        "name": "idea",
        "seed": 1,
        "hypothesis": {"claim": "5 < 6 & so on"},
        "expected": {"probe/motion": {"at_least": 0.6}, "val/loss": {"at_most": 0.3}},
    }
    run = RunFolder.create(OmegaConf.create(config), tmp_path)
    table = MetricsTable(run.path / "metrics.csv")
    for step in range(500):
        table.write({"train/loss": 1 / (step + 1)}, step)
        if step % 100 == 99:
            table.write({"val/loss": 0.5, "val/loss_trivial": 0.92, "val/loss_trivial_mean": 1.2}, step)
    (run.path / "media").mkdir()
    for step in (100, 200):
        video = torch.randint(0, 255, (4, 3, 8, 8), dtype=torch.uint8)
        save_gif(video, run.path / "media" / f"reconstruction_{step:08d}.gif", fps=8)
        contact_sheet(video).save(run.path / "media" / f"reconstruction_{step:08d}.png")
    with run:
        run.finish(METRICS)
    return run


def test_comparisons_pair_a_metric_with_its_references() -> None:
    rows = {row.metric: row.references for row in comparisons(METRICS)}
    assert rows == {"val/loss": {"trivial": 0.92}, "probe/motion": {"random_init": 0.22, "shuffled": 0.14}}


def test_summary_is_an_aligned_table(run: RunFolder) -> None:
    lines = summary(run).splitlines()
    table = lines[2:5]
    assert table[0].split() == ["metric", "this", "run", "trivial", "random", "init", "shuffled"]
    assert table[1].split() == ["val/loss", "0.4123", "0.92", "-", "-"]
    assert table[2].split() == ["probe/motion", "0.61", "-", "0.22", "0.14"]
    assert len({len(line) for line in table}) == 1
    text = "\n".join(lines)
    assert "met     probe/motion = 0.61 (expected >= 0.6)" in text
    assert "MISSED  val/loss = 0.4123 (expected <= 0.3)" in text
    assert str(run.path) in text


def test_summary_without_comparisons_has_no_table(tmp_path: Path) -> None:
    run = RunFolder.create(OmegaConf.create({"name": "bare"}), tmp_path)
    run.finish({})
    assert str(run.path) in summary(run)
    assert "this run" not in summary(run)


@pytest.mark.parametrize(("count", "text"), [(1, "1 video file skipped"), (5, "5 video files skipped"), (0, None)])
def test_number_of_skipped_videos_is_shown(run: RunFolder, count: int, text: str | None) -> None:
    rows = [f"root,{i}.mp4,broken" for i in range(count)]
    (run.path / "skipped.csv").write_text("\n".join(["root,file,reason", *rows]) + "\n")
    run.finish(METRICS)
    for shown in (summary(run), report.write_report(run).read_text().partition("<h2>")[0]):
        assert ("skipped.csv" in shown) == (text is not None)
        assert text is None or f"{text}: skipped.csv" in shown


@pytest.mark.parametrize(
    ("seconds", "text"), [(0.4, "0 s"), (59.6, "1 min 0 s"), (200, "3 min 20 s"), (18720, "5 h 12 min")]
)
def test_duration(seconds: float, text: str) -> None:
    assert duration(seconds) == text


class Page(HTMLParser):
    """Parser that collects tags and attributes and checks that every tag is closed."""

    VOID = ("meta", "img", "br", "path", "use")

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.sources: list[str] = []
        self.tags: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.sources += [value or "" for name, value in attributes if name in ("src", "href", "xlink:href")]
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        if tag not in self.VOID:
            assert self.open.pop() == tag


def test_report_is_self_contained(run: RunFolder) -> None:
    path = report.write_report(run)
    text = path.read_text()
    page = Page(text)
    assert page.open == []
    assert "script" not in page.tags
    assert all(source.startswith(("data:", "#")) for source in page.sources)
    assert not re.search(r"url\((?!#)|@import", text)
    assert page.tags.count("img") == 3  # the newest GIF, its frames, the first GIF
    assert page.tags.count("svg") == 1
    assert "5 &lt; 6 &amp; so on" in text
    assert [
        name for name in ("missed", "0.4123", "train  0.002", run.name, "val/loss_trivial") if name not in text
    ] == []


def test_report_of_a_failed_run_shows_the_error(tmp_path: Path) -> None:
    run = RunFolder.create(OmegaConf.create({"name": "bare"}), tmp_path)
    with pytest.raises(ValueError, match="clip"), run:
        raise ValueError("no <clip> found")
    text = report.write_report(run).read_text()
    assert "no &lt;clip&gt; found" in text
    assert "failed" in text


def test_curves_of_a_metric_share_a_chart_with_its_references() -> None:
    curve = [(0, 1.0), (1, 0.5)]
    names = ("train/loss", "val/loss", "val/loss_trivial", "val/loss_trivial_mean", "throughput/clips_per_s", "epoch")
    charts = dict(plot_curves({**dict.fromkeys(names, curve), "probe/motion": [(9, 0.5)]}))
    assert list(charts) == ["loss", "throughput/clips_per_s"]
    assert all(text in charts["loss"] for text in ("train", "val", "trivial  0.5", "trivial mean  0.5"))
    assert not any(color in charts["loss"] for color in PAGE_COLORS)
    assert "var(--ink)" in charts["loss"]


def test_long_curves_are_downsampled() -> None:
    ((_, short),) = plot_curves({"a": [(step, step % 7) for step in range(400)]})
    ((_, long),) = plot_curves({"a": [(step, step % 7) for step in range(40000)]})
    assert len(long) < 2 * len(short)


def test_command_line_writes_the_newest_report(
    run: RunFolder, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(run.path.parent.parent)
    assert report.main(["idea"]) == 0
    assert capsys.readouterr().out == f"idea/{run.name}/report.html\n"
    with pytest.raises(SystemExit) as ended:
        report.main([])
    assert ended.value.code == 2


def test_gate_fails_if_an_expected_value_is_missed(run: RunFolder, capsys: pytest.CaptureFixture) -> None:
    assert gate.main([str(run.path)]) == 1
    assert "1 of 2" in capsys.readouterr().out
    run.finish({**METRICS, "val/loss": 0.2})
    assert gate.main([str(run.path.parent)]) == 0


def test_gate_fails_without_metrics_or_expected_values(tmp_path: Path) -> None:
    run = RunFolder.create(OmegaConf.create({"name": "bare"}), tmp_path)
    assert gate.gate(run)[0] is False
    assert "running" in gate.gate(run)[1]
    run.finish({"val/loss": 1.0})
    assert gate.gate(run)[0] is False
    assert "add `expected:" in gate.gate(run)[1]


def test_gif_contains_every_frame(run: RunFolder) -> None:
    with Image.open(run.path / "media" / "reconstruction_00000100.gif") as gif:
        assert (gif.n_frames, gif.size, gif.info["duration"]) == (4, (8, 8), 120)


@pytest.mark.parametrize("command", [report, gate])
def test_missing_run_exits_with_one_line(tmp_path: Path, capsys: pytest.CaptureFixture, command) -> None:
    with pytest.raises(SystemExit) as ended:
        command.main([str(tmp_path / "unknown")])
    assert ended.value.code == 1
    message = capsys.readouterr().err
    assert message.startswith(f"Error: {tmp_path / 'unknown'} ")
    assert len(message.splitlines()) == 1
