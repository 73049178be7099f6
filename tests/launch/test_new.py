"""`blueberry new`: the copy composes unchanged, and nothing is overwritten."""

import re
from pathlib import Path

import pytest

from blueberry_video.config import compose
from blueberry_video.launch.new import new_experiment

EXPERIMENTS = Path(__file__).resolve().parents[2] / "experiments"


@pytest.fixture
def root(tmp_path: Path) -> Path:
    (tmp_path / "template").symlink_to(EXPERIMENTS / "template")
    return tmp_path


def test_copy_equals_the_template_except_for_the_name(root: Path):
    made = new_experiment("my_idea2", root)
    copy, template = compose(made / "config.yaml"), compose(EXPERIMENTS / "template" / "config.yaml")
    assert copy.name == "my_idea2"
    assert {**copy, "name": ""} == {**template, "name": ""}
    assert (made / "config.yaml").read_text().startswith("# run: make train EXP=my_idea2\n")
    assert (made / "README.md").read_text().startswith("# my_idea2\n")
    assert "template" not in (made / "config.yaml").read_text()


def test_nothing_is_overwritten(root: Path):
    (new_experiment("mine", root) / "config.yaml").write_text("my work")
    with pytest.raises(FileExistsError, match=r"EXP=mine: .*/mine "):
        new_experiment("mine", root)
    assert (root / "mine" / "config.yaml").read_text() == "my work"


@pytest.mark.parametrize(
    ("name", "suggestion"), [("My Idea", "my_idea"), ("../up", "up"), ("2nd", "nd"), ("", "my_idea"), ("a-b", "a_b")]
)
def test_invalid_name_raises_with_a_valid_one(root: Path, name: str, suggestion: str):
    with pytest.raises(ValueError, match=rf"EXP={re.escape(repr(name))} .*make new EXP={suggestion}`"):
        new_experiment(name, root)


def test_template_of_the_package_is_copied_where_there_is_none(tmp_path: Path):
    made = new_experiment("mine", tmp_path / "experiments", make=False)
    assert made == tmp_path / "experiments" / "mine"
    assert (made / "config.yaml").read_text().startswith("# run: blueberry train mine\n")
    assert "make " not in (made / "config.yaml").read_text()
    assert compose(made / "config.yaml").name == "mine"
