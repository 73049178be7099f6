"""Recognition of the launch environment, and of the number of processes that a config requires."""

import pytest

from blueberry_video.launch import environment, scheduler
from blueberry_video.launch.environment import Environment, check, first_host, recognize, tasks_per_node

TASK = {
    "SLURM_JOB_ID": "12",
    "SLURM_STEP_ID": "1",
    "SLURM_PROCID": "3",
    "SLURM_LOCALID": "1",
    "SLURM_NODEID": "1",
    "SLURM_NTASKS": "4",
    "SLURM_STEP_NUM_TASKS": "4",
    "SLURM_STEP_TASKS_PER_NODE": "2(x2)",
    "SLURM_STEP_NODELIST": "gpu[07-08]",
    "SLURM_JOB_NODELIST": "gpu[06-08]",
}
TORCHRUN = {
    "RANK": "3",
    "WORLD_SIZE": "4",
    "LOCAL_RANK": "1",
    "LOCAL_WORLD_SIZE": "2",
    "GROUP_RANK": "1",
    "MASTER_ADDR": "a",
    "MASTER_PORT": "29500",
    "TORCHELASTIC_USE_AGENT_STORE": "True",
}


def test_task_of_srun():
    here = recognize(TASK, in_terminal=False)
    assert (here.launcher, here.rank, here.world_size, here.local_rank) == ("slurm", 3, 4, 1)
    assert (here.local_world_size, here.node_rank, here.address, here.hosts_store) == (2, 1, "gpu07", True)
    assert here.port == recognize({**TASK, "SLURM_PROCID": "0"}, in_terminal=False).port
    assert here.port != recognize({**TASK, "SLURM_STEP_ID": "2"}, in_terminal=False).port
    assert here.key != recognize({**TASK, "SLURM_RESTART_COUNT": "1"}, in_terminal=False).key
    given = recognize({**TASK, "MASTER_ADDR": "b", "MASTER_PORT": "29501"}, in_terminal=False)
    assert (given.address, given.port) == ("b", 29501)


@pytest.mark.parametrize(
    "changed",
    [
        {"SLURM_STEP_ID": None, "SLURM_STEP_NUM_TASKS": None, "SLURM_PROCID": "0"},  # batch script with --ntasks=4
        {"SLURM_STEP_ID": "4294967291", "SLURM_PROCID": "0"},  # the same, newer versions
        {"SLURM_STEP_ID": "4294967290", "SLURM_PROCID": "0"},  # interactive step of salloc
        {"SLURM_STEP_ID": None, "SLURM_PROCID": None},  # shell of salloc
        {"SLURM_STEP_NUM_TASKS": "1"},  # srun --ntasks=1 in a job of four
    ],
)
def test_other_processes_of_a_job_are_standalone(changed: dict):
    variables = {key: value for key, value in {**TASK, **changed}.items() if value is not None}
    assert recognize(variables, in_terminal=False) == Environment()


def test_interactive_task_is_standalone():
    assert recognize(TASK, in_terminal=True).launcher == "standalone"


def test_process_of_torchrun():
    here = recognize({**TASK, **TORCHRUN})
    assert (here.launcher, here.rank, here.world_size, here.hosts_store) == ("torchrun", 3, 4, False)
    assert here.is_external
    assert here.follows
    assert not recognize({**TORCHRUN, "RANK": "0"}).follows
    assert recognize({key: value for key, value in TORCHRUN.items() if key != "LOCAL_RANK"}).launcher == "standalone"
    own = recognize({**TORCHRUN, environment.FOLDER_VARIABLE: "/run"})
    assert (own.launcher, own.is_external, own.follows) == ("rank", False, True)


@pytest.mark.parametrize(
    ("nodes", "host"),
    [("vm", "vm"), ("gpu[07-09,12],login", "gpu07"), ("a-1,b-2", "a-1"), ("r[1-2]n[3-4]", "r1n3"), ("n[5,7]", "n5")],
)
def test_first_host(nodes: str, host: str):
    assert first_host(nodes) == host


def test_tasks_per_node():
    assert tasks_per_node("2(x3),1") == [2, 2, 2, 1]
    assert tasks_per_node("8") == [8]


@pytest.mark.parametrize(
    ("trainer", "variables"),
    [
        ({"devices": 2, "num_nodes": 2}, TORCHRUN),
        ({"devices": -1, "num_nodes": 2}, TASK),
        ({"devices": [0, 1], "num_nodes": 2}, TASK),
        ({"devices": 8}, {}),
        ({"devices": 4}, {environment.FOLDER_VARIABLE: "/run"}),
    ],
)
def test_number_of_processes_that_fits(trainer: dict, variables: dict):
    check(trainer, recognize(variables, in_terminal=False), "")


@pytest.mark.parametrize(
    ("trainer", "variables", "expected"),
    [
        ({"devices": 8, "num_nodes": 2}, {}, r"num_nodes=2.*srun --nodes=2 --ntasks-per-node=8.*torchrun --nnodes=2"),
        (
            {"devices": 1},
            TORCHRUN,
            r"trainer\.devices=1 .*trainer\.devices=2 trainer\.num_nodes=2.*torchrun --nnodes=1",
        ),
        ({"devices": 4}, TASK, r"trainer\.devices=4 .*4 processes.*srun started 4, 2 on this machine"),
        ({"devices": [0], "num_nodes": 4}, TASK, r"trainer\.devices=\[0\].*--ntasks-per-node=1"),
        ({"devices": -1, "num_nodes": 1}, TASK, r"trainer\.num_nodes=1.*trainer\.num_nodes=2"),
    ],
)
def test_number_of_processes_that_does_not_fit_raises(trainer: dict, variables: dict, expected: str):
    with pytest.raises(ValueError, match=expected):
        check(trainer, recognize(variables, in_terminal=False), "--config-dir experiments/x")


def test_identity_of_a_job():
    assert scheduler.job({}) is None
    first = scheduler.job({"SLURM_JOB_ID": "5", "SLURM_CLUSTER_NAME": "c"})
    again = scheduler.job({"SLURM_JOB_ID": "5", "SLURM_CLUSTER_NAME": "c", "SLURM_RESTART_COUNT": "1"})
    assert scheduler.is_same(first, again)
    assert scheduler.is_continued(first, again)
    assert not scheduler.is_continued(again, again), "a run of this start of the job is not continued"
    assert not scheduler.is_continued(None, again)
    element = {"SLURM_JOB_ID": "9", "SLURM_ARRAY_JOB_ID": "8", "SLURM_ARRAY_TASK_ID": "3"}
    assert scheduler.job(element) == {"scheduler": "slurm", "cluster": None, "id": "8", "array": "3", "restart": 0}
    assert not scheduler.is_same(scheduler.job(element), scheduler.job({**element, "SLURM_ARRAY_TASK_ID": "4"}))
