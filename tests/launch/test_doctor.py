"""`make doctor` lists every problem with its fix."""

import re

import pytest

from blueberry_video.launch import doctor


def test_complete_environment_passes(capsys: pytest.CaptureFixture):
    assert doctor.main() == 0
    output = capsys.readouterr().out
    for what in ("python", "torch", "lightning", "cpu", "gpu", "disk", "ffmpeg", "av", "wandb", "slurm", "git"):
        assert f" {what} " in output
    assert "  ok    av " in output


def test_missing_package_fails_with_the_fix(capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(doctor, "PACKAGES", ("torch", "no-such-package"))
    assert doctor._versions() == ["no-such-package"]
    assert re.search("FAIL  no-such-package .*`make setup`", capsys.readouterr().out)


def test_untested_version_is_reported(capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(doctor, "_tested_versions", lambda: {"torch": "0.1"})
    assert doctor._versions() == []
    assert re.search(r"FAIL  torch .*0\.1\b.*`make setup`", capsys.readouterr().out)


def test_versions_are_read_from_constraints():
    assert doctor._tested_versions()["torchcodec"] == "0.13.0"


def test_missing_ffmpeg_is_reported_with_the_fix(capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(doctor.shutil, "which", lambda name: None)
    doctor._video()
    assert re.search(r"-     ffmpeg .*PyAV.*apt-get install ffmpeg", capsys.readouterr().out)
