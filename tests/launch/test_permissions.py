"""Files and folders without permission: one paragraph with the path and the fix, and no traceback.

The tests may run as root: the commands run without the capabilities that ignore permissions.
"""

import ctypes
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from blueberry_video import train
from blueberry_video.launch.errors import paragraph

ROOT = Path(__file__).resolve().parents[2]
PR_CAPBSET_DROP, CAP_DAC_OVERRIDE, CAP_DAC_READ_SEARCH = 24, 1, 2
# Imports once; a fork reads the folder without the permissions of each part, and its stderr is kept in a file.
READ = """
import json, os, sys
from pathlib import Path
from blueberry_video.data.video_folder import VideoFolder
from blueberry_video.launch.errors import OneParagraphErrors
results = {}
for part in sys.argv[2:]:
    path, log = Path(sys.argv[1], part), Path(sys.argv[1]).with_name("stderr.txt")
    mode = path.stat().st_mode
    path.chmod(0)
    if (process := os.fork()) == 0:
        with log.open("w") as file:
            os.dup2(file.fileno(), 2)
        with OneParagraphErrors():
            VideoFolder(root=sys.argv[1], num_frames=2, image_size=16)
        sys.exit(0)
    code = os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])
    path.chmod(mode)
    results[part] = [code, log.read_text()]
print(json.dumps(results))
"""
PARTS = (".", "metadata.jsonl", "videos", "videos/deep")
TINY = ["data.train.size=8", "data.val.size=4", "data.batch_size=4", "model.encoder.depth=1", "logger=csv"]


def without_privileges(*arguments: object) -> subprocess.CompletedProcess:
    def drop() -> None:
        for capability in (CAP_DAC_OVERRIDE, CAP_DAC_READ_SEARCH):
            ctypes.CDLL(None).prctl(PR_CAPBSET_DROP, capability, 0, 0, 0)

    command = [sys.executable, *map(str, arguments)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "src"), "OMP_NUM_THREADS": "1"}
    return subprocess.run(command, capture_output=True, text=True, preexec_fn=drop, env=environment, check=False)


def flat(text: str) -> str:
    return " ".join(text.split())


@pytest.fixture
def data(tmp_path: Path) -> Path:
    folder = tmp_path / "data"
    (folder / "videos" / "deep").mkdir(parents=True)
    (folder / "videos" / "a.mp4").write_bytes(b"a")
    (folder / "metadata.jsonl").write_text('{"file_name": "a.mp4", "motion": 1}\n')
    return folder


def test_unreadable_data_raises_with_the_path(data: Path):
    result = without_privileges("-c", READ, data, *PARTS)
    results = json.loads(result.stdout)
    assert tuple(results) == PARTS
    for part, (code, error) in results.items():
        path = (data / part).resolve()
        assert code == 1
        assert "Traceback" not in error
        assert re.search(rf"Permission denied\. .*permission for {path}: .*chmod u\+rwX", flat(error)), error


def check_run(folder: Path) -> list[str]:
    """Words of a dry run with its runs in a folder."""
    experiment = ["--config-dir", str(ROOT / "experiments" / "template"), *TINY]
    return [*experiment, f"output_dir={folder}/runs", "check=true", "callbacks.media=null"]


def test_dry_run_in_a_file_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture):
    folder = tmp_path / "outputs"
    folder.write_text("a file")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["train", *check_run(folder)])
    with pytest.raises(SystemExit) as ended:
        train.main()
    assert ended.value.code == 1
    assert re.search(
        rf"FAIL  outputs +output_dir={folder}/runs: {folder} .*Use a folder: `output_dir=…`", capsys.readouterr().out
    )


def test_dry_run_in_a_read_only_folder_fails(tmp_path: Path):
    folder = tmp_path / "outputs"
    folder.mkdir(mode=0o555)
    result = without_privileges("-m", "blueberry_video.train", *check_run(folder))
    assert result.returncode == 1
    assert re.search(
        rf"FAIL  outputs +output_dir={folder}/runs: {folder} .*is not writable\. Make it writable", result.stdout
    )


@pytest.mark.parametrize("error", [PermissionError(13, "Permission denied"), NotADirectoryError(20, "Not a directory")])
def test_error_of_a_path_becomes_a_paragraph(tmp_path: Path, error: OSError):
    named = type(error)(error.errno, error.strerror, str(tmp_path / "a"))
    assert str(tmp_path / "a") in (paragraph(named) or "")
    assert paragraph(error) is None, "an error without a path is a bug"


def test_error_of_a_path_in_a_worker_becomes_a_paragraph(tmp_path: Path):
    text = "Caught PermissionError in DataLoader worker process 0.\nOriginal Traceback (most recent call last):\n"
    text += '  File "/usr/lib/python3.11/pathlib.py", line 1\n'
    error = PermissionError(f"{text}PermissionError: [Errno 13] Permission denied: '{tmp_path}/a'\n")
    assert re.match(rf"{tmp_path}/a: Permission denied\. .*chmod", paragraph(error) or "")
