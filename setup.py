"""Copies the files outside src/ that the package reads into wheels; pyproject.toml contains everything else."""

import shutil
from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py

SHIPPED = ("conf", "experiments/template", "constraints.txt")  # read through blueberry_video.installation.shipped


class BuildWithShippedFiles(build_py):
    """Build step that adds the files to ``blueberry_video/shipped/``; an editable install reads them in place."""

    def run(self) -> None:
        super().run()
        if self.editable_mode:
            return
        target = Path(self.build_lib, "blueberry_video", "shipped")
        shutil.rmtree(target, ignore_errors=True)  # of an earlier build
        for name in SHIPPED:
            for file in sorted(path for path in (Path(name), *Path(name).rglob("*")) if path.is_file()):
                if file.suffix != ".pyc":
                    (target / file).parent.mkdir(parents=True, exist_ok=True)
                    shutil.copyfile(file, target / file)


setup(cmdclass={"build_py": BuildWithShippedFiles})
