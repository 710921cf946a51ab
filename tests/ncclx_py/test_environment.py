"""What the launcher's variables mean."""

from __future__ import annotations

import pytest

from ncclx_py.environment import Launch, expand_counts, expand_hosts, read_launch

pytestmark = pytest.mark.unit

TORCHRUN = {
    "RANK": "5",
    "WORLD_SIZE": "8",
    "LOCAL_RANK": "1",
    "LOCAL_WORLD_SIZE": "4",
    "MASTER_ADDR": "n1",
    "MASTER_PORT": "29500",
}
SLURM = {
    "SLURM_PROCID": "4",
    "SLURM_NTASKS": "5",
    "SLURM_LOCALID": "0",
    "SLURM_JOB_NODELIST": "n[1-2],x03",
    "SLURM_TASKS_PER_NODE": "2(x2),1",
}
# Every component of a heterogeneous job is dealt out by itself, and its ranks follow those of the one before.
HETEROGENEOUS = SLURM | {
    "SLURM_DISTRIBUTION": "cyclic",
    "SLURM_STEP_NUM_NODES": "3",
    "SLURM_HET_SIZE": "2",
    "SLURM_JOB_NUM_NODES_HET_GROUP_0": "2",
    "SLURM_JOB_NUM_NODES_HET_GROUP_1": "1",
}


def test_torchrun() -> None:
    assert read_launch(TORCHRUN) == Launch("torchrun", 5, 8, 1, 2, [4, 4], master="n1:29500")


def test_torchrun_wins_over_slurm() -> None:
    assert read_launch(TORCHRUN | SLURM).launcher == "torchrun"


def test_slurm_tells_more_where_both_count_alike() -> None:
    alike = {
        "RANK": "4",
        "WORLD_SIZE": "5",
        "LOCAL_RANK": "0",
        "LOCAL_WORLD_SIZE": "1",
        "MASTER_ADDR": "n1",
        "MASTER_PORT": "7",
    }
    assert read_launch(SLURM | alike) == Launch("slurm", 4, 5, 0, 3, [2, 2, 1], ["n1", "n2", "x03"], "n1:7")


def test_slurm() -> None:
    assert read_launch(SLURM) == Launch("slurm", 4, 5, 0, 3, [2, 2, 1], ["n1", "n2", "x03"], "n1")


def test_the_step_counts_where_the_job_has_more_hosts() -> None:
    step = {"SLURM_STEP_NODELIST": "n1", "SLURM_STEP_NUM_NODES": "1", "SLURM_STEP_TASKS_PER_NODE": "5"}
    assert read_launch(SLURM | step) == Launch("slurm", 4, 5, 0, 1, [5], ["n1"], "n1")


def test_no_launcher() -> None:
    assert read_launch({"PATH": "/bin"}) == Launch("none", 0, 1, 0, 1)


@pytest.mark.parametrize(
    ("text", "names"),
    [
        ("", []),
        ("n1", ["n1"]),
        ("n[1-3,07],gpu", ["n1", "n2", "n3", "n07", "gpu"]),
        ("a[08-10]-ib", ["a08-ib", "a09-ib", "a10-ib"]),
    ],
)
def test_host_lists(text: str, names: list[str]) -> None:
    assert expand_hosts(text) == names


@pytest.mark.parametrize(("text", "counts"), [("4", [4]), ("4(x2),2", [4, 4, 2]), ("1(x3)", [1, 1, 1])])
def test_counts(text: str, counts: list[int]) -> None:
    assert expand_counts(text) == counts


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"RANK": "8"}, "RANK=8 with WORLD_SIZE=8"),
        ({"WORLD_SIZE": "0", "LOCAL_WORLD_SIZE": "1"}, "WORLD_SIZE=0"),
        ({"WORLD_SIZE": "two"}, "WORLD_SIZE='two' is not a number"),
        ({"LOCAL_RANK": "4"}, "LOCAL_RANK=4"),
        ({"RANK": "-1"}, "RANK='-1'"),
    ],
)
def test_an_impossible_torchrun_environment_is_refused(change: dict[str, str], words: str) -> None:
    with pytest.raises(ValueError, match=words.replace("(", r"\(")):
        read_launch(TORCHRUN | change)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"SLURM_PROCID": "5"}, "SLURM_PROCID=5 with SLURM_NTASKS=5"),
        ({"SLURM_TASKS_PER_NODE": "2(x2)"}, "do not add up to SLURM_NTASKS=5"),
        ({"SLURM_TASKS_PER_NODE": "2*2"}, "malformed at '2"),
        ({"SLURM_JOB_NODELIST": "n[1-"}, "malformed"),
        ({"SLURM_JOB_NODELIST": "n[a-b]"}, "malformed at 'a-b'"),
    ],
)
def test_an_impossible_slurm_environment_is_refused(change: dict[str, str], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        read_launch(SLURM | change)


def test_a_missing_variable_is_named() -> None:
    with pytest.raises(ValueError, match="RANK is not set"):
        read_launch({"WORLD_SIZE": "2"})


@pytest.mark.parametrize(
    ("env", "host_of"),
    [
        (TORCHRUN, (0, 0, 0, 0, 1, 1, 1, 1)),
        (TORCHRUN | {"LOCAL_WORLD_SIZE": "3"}, ()),  # uneven: torchrun does not tell how
        (SLURM, (0, 0, 1, 1, 2)),
        (SLURM | {"SLURM_DISTRIBUTION": "cyclic,pack"}, (0, 1, 2, 0, 1)),
        (SLURM | {"SLURM_DISTRIBUTION": "arbitrary"}, ()),
        (HETEROGENEOUS, (0, 1, 0, 1, 2)),
        (HETEROGENEOUS | {"SLURM_HET_SIZE": "1"}, (0, 1, 2, 0, 1)),  # a step of one component says nothing of others
        ({}, (0,)),
    ],
)
def test_which_rank_is_on_which_host(env: dict[str, str], host_of: tuple[int, ...]) -> None:
    assert read_launch(env).host_of() == host_of
