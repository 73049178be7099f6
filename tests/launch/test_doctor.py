"""`make doctor` names every lack with what to do about it."""

import pytest

from blueberry_video.launch import doctor


def test_a_sound_environment_passes(capsys: pytest.CaptureFixture):
    assert doctor.main() == 0
    said = capsys.readouterr().out
    for what in ("python", "torch", "lightning", "cpu", "gpu", "disk", "ffmpeg", "av", "wandb", "slurm", "git"):
        assert f" {what} " in said
    assert "  ok    av " in said


def test_a_missing_package_fails_with_the_fix(capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(doctor, "PACKAGES", ("torch", "no-such-package"))
    assert doctor._versions() == ["no-such-package"]
    assert "LACK  no-such-package not installed. Run `make setup`." in capsys.readouterr().out


def test_another_version_than_the_tested_is_told(capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(doctor, "_tested_versions", lambda: {"torch": "0.1"})
    assert doctor._versions() == []
    assert "Tested with 0.1" in capsys.readouterr().out


def test_constraints_are_read():
    assert doctor._tested_versions()["torchcodec"] == "0.13.0"


def test_without_ffmpeg_it_says_what_decodes(capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(doctor.shutil, "which", lambda name: None)
    doctor._video()
    said = capsys.readouterr().out
    assert "PyAV brings its own" in said
    assert "apt-get install ffmpeg" in said
