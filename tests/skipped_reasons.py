"""Lines about skipped tests at the end of a run."""

from collections import Counter

MISSING = {  # part of the reason of a skipped test: command or setting that makes it run
    "ffmpeg": "apt-get install ffmpeg (or conda install -c conda-forge ffmpeg), version 4 to 8",
    "torchcodec": "apt-get install ffmpeg (or conda install -c conda-forge ffmpeg), version 4 to 8, for torchcodec",
    "BLUEBERRY_TEST_VIDEOS": "set BLUEBERRY_TEST_VIDEOS to a folder of real clips",
    "cuda": "a CUDA device",
    "qwen-vl-utils": "pip install --no-deps qwen-vl-utils==0.0.14 requests",
    "pyarrow": "pip install -e '.[parquet]'",
    "pycolmap": "pip install pycolmap",
    "chromium": "apt-get install chromium",
    "viser": "pip install -e '.[viewer]'",
    "moto": "pip install 'moto[s3]' flask flask-cors s3fs",
    "webdataset": "pip install webdataset",
    "mkdocs": "pip install -e '.[docs]'",
    "gsplat": "pip install gsplat, and a CUDA device",
    "sinfo": "apt-get install slurm-wlm munge, then .ci/slurm as root",
    "mamba": "the source of mamba-ssm on PYTHONPATH",
}


def skipped_lines(reports: list) -> list[str]:
    """One line per file and reason: the number of skipped tests, the reason and, if it is known, the fix."""
    found: Counter[tuple[str, str]] = Counter()
    for report in reports:
        reason = report.longrepr[2] if isinstance(report.longrepr, tuple) else str(report.longrepr)
        found[report.nodeid.split("::")[0], reason.removeprefix("Skipped: ")] += 1
    lines = []
    for (file, reason), count in sorted(found.items()):
        fix = next((fix for part, fix in MISSING.items() if part.lower() in reason.lower()), None)
        lines.append(f"skipped: {count} in {file}: {reason}" + (f". To run: {fix}" if fix else ""))
    return lines
