"""`make doctor` lists every problem with its fix."""

import re
from types import SimpleNamespace

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
    monkeypatch.setattr(doctor.subprocess, "run", lambda *_, **options: SimpleNamespace(returncode=0))
    doctor._video()
    assert re.search(r"-     ffmpeg .*PyAV.*apt-get install ffmpeg", capsys.readouterr().out)


INSTALLED = {"Torch": "2.13.0+cpu", "numpy": "2.3", "av": "16.0"}


def lines(capsys: pytest.CaptureFixture) -> dict[str, str]:
    """Returns name -> mark and text of the printed lines."""
    rows = [line for line in capsys.readouterr().out.splitlines() if line.startswith("  ")]
    return {row[8:20].strip(): f"{row[2:6].strip()} {row[21:]}" for row in rows}


@pytest.mark.parametrize(("missing", "code"), [([], 0), (["torch"], 1)])
def test_exit_code_is_1_if_a_package_is_missing(missing: list[str], code: int, monkeypatch: pytest.MonkeyPatch):
    called = []
    monkeypatch.setattr(doctor, "_versions", lambda: missing)
    for name in ("_devices", "_video", "_services"):
        monkeypatch.setattr(doctor, name, lambda name=name: called.append(name))
    assert doctor.main() == code
    assert called == ["_devices", "_video", "_services"]


def test_versions_are_compared_without_the_build(capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch):
    distributions = [SimpleNamespace(metadata={"Name": name}, version=version) for name, version in INSTALLED.items()]
    monkeypatch.setattr(doctor.metadata, "distributions", lambda: distributions)
    monkeypatch.setattr(doctor, "PACKAGES", ("torch", "numpy", "av", "wandb"))
    monkeypatch.setattr(doctor, "_tested_versions", lambda: {"torch": "2.13.0", "numpy": "2.2", "wandb": "1"})
    monkeypatch.setattr(doctor, "OPTIONAL", {"here": "json.decoder", "gone": "no_such.module", "part": "json.no_such"})
    assert doctor._versions() == ["wandb"]
    found = lines(capsys)
    assert found["torch"] == "ok 2.13.0+cpu"
    assert found["numpy"].startswith("FAIL 2.3. Tested with 2.2")
    assert (found["av"], found["wandb"]) == ("ok 16.0", "FAIL not installed. Run `make setup`.")
    assert (found["[here]"], found["[gone]"][0], found["[part]"][0]) == ("ok installed", "-", "-")
    assert "pip install -e '.[part]'" in found["[part]"]


@pytest.mark.parametrize(
    ("gpus", "driver", "built", "expected"),
    [
        (2, True, "12.8", {"gpu 0": "ok GPU 0, 80 GiB: `trainer=gpu`", "gpu 1": "ok GPU 1, 81 GiB: `trainer=gpu`"}),
        (0, True, None, {"gpu": "FAIL there is a driver, but PyTorch is a CPU build. Install the CUDA build"}),
        (0, True, "12.8", {"gpu": "FAIL PyTorch finds none. PyTorch needs CUDA 12.8"}),
        (0, False, "12.8", {"gpu": "- none: runs use the CPU"}),
    ],
)
def test_devices(gpus: int, driver: bool, built: str | None, expected: dict, capsys, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("torch.cuda.device_count", lambda: gpus)
    monkeypatch.setattr(
        "torch.cuda.get_device_properties",
        lambda index: SimpleNamespace(name=f"GPU {index}", total_memory=(80 + index) * 2**30),
    )
    monkeypatch.setattr("torch.version.cuda", built)
    monkeypatch.setattr(doctor.shutil, "which", lambda name: "/bin/nvidia-smi" if driver else None)
    monkeypatch.setattr(doctor.os, "sched_getaffinity", lambda process: {0, 3, 5}, raising=False)
    monkeypatch.setattr(doctor, "available_memory", lambda: 3 * 2**29)
    doctor._devices()
    found = lines(capsys)
    assert found["cpu"] == "ok 3 cores, 1.5 GiB of memory available"
    names = {name: text for name, text in found.items() if name.startswith("gpu")}
    assert names.keys() == expected.keys()
    assert all(names[name].startswith(text) for name, text in expected.items())


@pytest.mark.parametrize(("free", "mark"), [(5 * 2**30, "ok 5.0 GiB free"), (5 * 2**30 - 1, "FAIL 5.0 GiB free")])
def test_little_disk_space_fails(free: int, mark: str, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(doctor.shutil, "disk_usage", lambda folder: SimpleNamespace(free=free))
    doctor._devices()
    found = lines(capsys)["disk"]
    assert found.startswith(mark)
    assert ("output_dir=" in found) == mark.startswith("FAIL")


@pytest.mark.parametrize(
    ("ffmpeg", "fails", "expected"),
    [
        (True, (), {"ffmpeg": "ok /bin/ffmpeg", "av": "ok loads", "torchcodec": "ok loads"}),
        (True, ("torchcodec",), {"av": "ok loads", "torchcodec": "FAIL does not load (last line). `make setup`"}),
        (False, ("torchcodec",), {"ffmpeg": "- none", "torchcodec": "- does not load without FFmpeg"}),
        (False, ("av",), {"av": "FAIL does not load (last line)", "torchcodec": "ok loads"}),
    ],
)
def test_decoders(ffmpeg: bool, fails: tuple, expected: dict, capsys, monkeypatch: pytest.MonkeyPatch):
    def run(command: list[str], **options: object) -> SimpleNamespace:
        failed = command[-1].removeprefix("import ") in fails
        return SimpleNamespace(returncode=int(failed), stderr="first line\nlast line\n" if failed else "")

    monkeypatch.setattr(doctor.subprocess, "run", run)
    monkeypatch.setattr(doctor.shutil, "which", lambda name: f"/bin/{name}" if ffmpeg else None)
    doctor._video()
    found = lines(capsys)
    assert all(found[name].startswith(text) for name, text in expected.items()), found


def test_missing_shared_library_of_python_is_reported_with_the_fix(capsys, monkeypatch: pytest.MonkeyPatch):
    missing = "OSError: {}: cannot open shared object file: No such file or directory\n"
    error = "".join(missing.format(name) for name in ("libavutil.so.60", "libpython3.11.so.1.0", "libavutil.so.56"))
    result = SimpleNamespace(returncode=1, stderr=error + "[end of libtorchcodec loading traceback].")
    monkeypatch.setattr(doctor.subprocess, "run", lambda command, **options: result)
    monkeypatch.setattr(doctor.shutil, "which", lambda name: f"/bin/{name}")
    doctor._video()
    assert re.search(
        r"FAIL  torchcodec .*libpython3\.11\.so\.1\.0.*`apt-get install libpython3-dev`", capsys.readouterr().out
    )


@pytest.mark.parametrize("present", [False, True])
def test_services(present: bool, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(doctor, "wandb_key", lambda: "netrc" if present else None)
    monkeypatch.setattr(doctor.shutil, "which", lambda name: f"/bin/{name}" if present else None)
    doctor._services()
    found = lines(capsys)
    if present:
        assert found == {
            "wandb": "ok key in netrc: runs are logged online",
            "slurm": "ok /bin/sbatch",
            "git": "ok /bin/git",
        }
    else:
        assert [text.split()[0] for text in found.values()] == ["-", "-", "FAIL"]
        assert "login` sets one" in found["wandb"]
