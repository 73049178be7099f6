"""Cluster profiles: valid files, misspelled keys and values, and the processes and nodes of a job."""

from pathlib import Path

import pytest
from omegaconf import OmegaConf

from blueberry_video.config import CONF
from blueberry_video.launch import cluster as clusters
from blueberry_video.launch.cluster import Cluster
from blueberry_video.launch.submission import slurm_parameters


@pytest.mark.parametrize("name", sorted(file.stem for file in (CONF / "cluster").glob("*.yaml")))
def test_profiles_of_the_project_are_valid(name: str):
    assert clusters.load(name).executor in clusters.EXECUTORS


def test_profile_of_the_working_directory_comes_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "conf" / "cluster"
    folder.mkdir(parents=True)
    (folder / "gpu.yaml").write_text("partition: mine\nhours: 0.5\n")
    found = clusters.load("gpu", ["hours=2", "sbatch.constraint=a100", "setup=[module load cuda]"])
    assert found == Cluster(partition="mine", hours=2.0, sbatch={"constraint": "a100"}, setup=["module load cuda"])
    assert clusters.load(str(folder / "gpu.yaml")).hours == 0.5


@pytest.mark.parametrize(
    ("text", "overrides", "error", "message"),
    [
        ("partitoin: x", [], ValueError, r"`partitoin` in .*mine\.yaml.*`partition`"),
        ("hours: soon", [], ValueError, r"`cluster\.hours` in .*mine\.yaml.*soon"),
        ("hours: 0", [], ValueError, r"`hours: 0"),
        ("executor: slrum", [], ValueError, r"`executor: slrum`.*`slurm`"),
        ("at_once: 0", [], ValueError, r"`at_once: 0`.*at least 1"),
        ("{}", ["gpus=2"], ValueError, r"`gpus` in `cluster\.gpus=2`.*gpus_per_node"),
        ("{}", ["hours"], ValueError, r"`cluster\.hours` has no value"),
        ("- a", [], ValueError, r"mine\.yaml must be a YAML mapping"),
        ("a: [", [], ValueError, r"mine\.yaml.*not valid YAML"),
    ],
)
def test_invalid_profiles_raise(tmp_path: Path, text: str, overrides: list[str], error: type[Exception], message: str):
    file = tmp_path / "mine.yaml"
    file.write_text(text)
    with pytest.raises(error, match=message):
        clusters.load(str(file), overrides)


def test_unknown_profile_raises():
    with pytest.raises(FileNotFoundError, match=r"CLUSTER=slrum.*`slurm`"):
        clusters.load("slrum")


@pytest.mark.parametrize(
    ("profile", "trainer", "expected"),
    [
        ({}, {"accelerator": "cpu", "devices": 1}, (1, 1)),
        ({}, {"accelerator": "cpu", "devices": 2, "num_nodes": 3}, (3, 2)),
        ({}, {"accelerator": "cpu", "devices": "auto"}, (1, 1)),
        ({"gpus_per_node": 8}, {"accelerator": "gpu", "devices": -1, "num_nodes": 2}, (2, 8)),
        ({"gpus_per_node": 8}, {"accelerator": "gpu", "devices": [0, 1]}, (1, 2)),
        ({"gpus_per_node": 4}, {"devices": "auto"}, (1, 4)),
        ({}, {"accelerator": "gpu", "devices": -1}, r"trainer\.devices=-1.*cluster\.gpus_per_node=0.*trainer=cpu"),
        ({"gpus_per_node": 1}, {"accelerator": "gpu", "devices": 4}, r"4 GPUs.*cluster\.gpus_per_node=4"),
        ({"nodes": 2}, {"accelerator": "cpu"}, r"cluster\.nodes=2 and trainer\.num_nodes=1"),
        ({"executor": "local"}, {"num_nodes": 2}, r"trainer\.num_nodes=2.*executor: slurm"),
    ],
)
def test_one_process_per_device(profile: dict, trainer: dict, expected):
    if isinstance(expected, str):
        with pytest.raises(ValueError, match=expected):
            clusters.tasks(Cluster(**profile), OmegaConf.create(trainer))
    else:
        assert clusters.tasks(Cluster(**profile), OmegaConf.create(trainer)) == expected


def test_parameters_of_slurm():
    profile = Cluster(partition="gpu", hours=1.01, gpus_per_node=8, cpus_per_task=4, at_once=3, setup=["module load x"])
    found = slurm_parameters(profile, {"PYTHONPATH": "a b"}, "mine", 2, 8)
    assert found == {
        "job_name": "mine",
        "partition": "gpu",
        "time": 61,
        "nodes": 2,
        "ntasks_per_node": 8,
        "gpus_per_node": 8,
        "cpus_per_task": 4,
        "array_parallelism": 3,
        "setup": ["module load x", "export PYTHONPATH='a b'"],
        "additional_parameters": {"signal": "USR1@120", "requeue": True},
    }
    other = slurm_parameters(Cluster(requeue=False, sbatch={"signal": "TERM@9"}), {}, "mine", 1, 1)
    assert other["additional_parameters"] == {"signal": "TERM@9", "no-requeue": True}
