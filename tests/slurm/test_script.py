"""The batch script of ``ncclx launch slurm``, without a SLURM: what it asks for, what bash makes of it, what is refused."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path
from typing import Any

import pytest
from ncclx_py.launch.ranks import JobError
from ncclx_py.launch.slurm import SlurmJob, parse_nodes, render
from ncclx_py.launch.slurm_follow import read_life

from ncclx_py import cli

pytestmark = pytest.mark.unit


def job(ranks: str = "2x2", **options: Any) -> SlurmJob:
    return SlurmJob(**{"program": ["job.py"], "ranks": parse_nodes(ranks), "folder": Path("logs")} | options)


def wanted(script: str) -> list[str]:
    return [line.removeprefix("#SBATCH ") for line in script.splitlines() if line.startswith("#SBATCH ")]


@pytest.mark.parametrize(
    ("text", "ranks"), [("2x8", (8, 8)), ("8", (8,)), ("8+4", (8, 4)), ("2x8+1x4", (8, 8, 4)), ("1x1+2", (1, 2))]
)
def test_clusters(text: str, ranks: tuple[int, ...]) -> None:
    assert parse_nodes(text) == ranks


@pytest.mark.parametrize("text", ["", "0x2", "2x0", "2x", "x2", "2x2x2", "-1", "2,2", "1000000x1", "9999999999"])
def test_what_is_no_cluster(text: str) -> None:
    with pytest.raises(JobError, match="is not a cluster"):
        parse_nodes(text)


def test_nodes_that_differ_are_components_of_their_own() -> None:
    script = render(job("2x8+4", gpus_per_rank=1, time="10", options=["exclusive", "--mem=0"]))
    each = ["--time=10", "--exclusive", "--mem=0"]
    first = ["--nodes=2", "--ntasks-per-node=8", "--gpus-per-node=8", *each]
    second = ["--nodes=1", "--ntasks-per-node=4", "--gpus-per-node=4", *each]
    assert wanted(script)[-len(first + second) - 1 :] == [*first, "hetjob", *second]
    assert "--signal=B:USR1@120" in wanted(script)
    assert "--het-group=0-1" in script


def test_bash_reads_the_words_as_they_were_written(tmp_path: Path) -> None:
    """The script runs with a `srun` of ours in the place of SLURM's, which runs one task."""
    words = ["a b", "it's", '"', "$HOME", "`id`", "x\ny", "{{program}}", "\\", "*", "é"]
    program = tmp_path / "say.py"
    program.write_text("import json, sys\njson.dump(sys.argv[1:], open(sys.argv[1], 'w'))\n")
    (tmp_path / "srun").write_text('#!/bin/bash\nwhile [[ $1 == --* ]]; do shift; done\nexec "$@"\n')
    (tmp_path / "srun").chmod(0o755)
    script = render(job("1x1", program=[str(program), str(tmp_path / "out"), *words], folder=tmp_path / "it's logs"))
    told = {"PROCID": "0", "NTASKS": "1", "LOCALID": "0", "NODEID": "0", "STEP_TASKS_PER_NODE": "1", "JOB_ID": "7"}
    env = {**os.environ, **{f"SLURM_{name}": value for name, value in told.items()}}
    env |= {
        "PATH": f"{tmp_path}:{os.environ['PATH']}",
        "SLURM_LAUNCH_NODE_IPADDR": "127.0.0.1",
        "SLURMD_NODENAME": "n1",
    }
    done = subprocess.run(["bash"], input=script, text=True, env=env, capture_output=True, timeout=30)
    assert (done.returncode, done.stderr) == (0, "")
    assert json.loads((tmp_path / "out").read_text()) == [str(tmp_path / "out"), *words]
    assert (tmp_path / "it's logs" / "rank-0.end").read_text().startswith("0 ")


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"runtime": "pyxis"}, ["--container-image=image"]),
        ({"runtime": "apptainer", "gpus_per_rank": 1}, ["apptainer exec --nv --bind", " image python -u job.py"]),
        (
            {"cpus_per_rank": 3},
            ["#SBATCH --cpus-per-task=3", "srun --kill-on-bad-exit=1 --distribution=block --cpus-per-task=3"],
        ),
        ({"rails": "ib0,ib1", "setup": ["module load cuda"]}, ["export NCCLX_RAILS=ib0,ib1", "\nmodule load cuda\n"]),
        ({"sweep": ["a=1,2", "b=x y"], "at_once": 1}, ["--array=0-1%1", "1) program+=(a=2 'b=x y') ;;"]),
    ],
)
def test_options(options: dict[str, Any], words: list[str]) -> None:
    script = render(job(container="image" if "runtime" in options else None, **options))
    for word in words:
        assert word in script
    assert subprocess.run(["bash", "-n"], input=script, text=True, timeout=30).returncode == 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["2*2"], "'2*2' is not a cluster"),
        (["2x2", "--grace", "0"], "--grace 0: at least 1"),
        (["2x2", "--sweep", "a"], "--sweep 'a': write NAME=VALUE,VALUE"),
        (["2+1", "--sweep", "a=1"], "--sweep: SLURM has no arrays of heterogeneous jobs"),
        (["2+1", "--placement", "cyclic"], "--placement cyclic"),
        (["2x2", "--partition", ""], "'' cannot be an option of sbatch"),
        (["2x2", "--json", "x"], "--json writes how the job ended: give --wait too"),
        (["2x2", "--inject", "kill:rank=4,step=1"], "rank"),
    ],
)
def test_bad_input_is_refused(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["launch", "slurm", *arguments, "--dry-run", "--", "job.py"]) == 2
    assert message in capsys.readouterr().err


def test_the_first_failure_is_the_earliest(tmp_path: Path) -> None:
    """In the order of the notes; a rank that stopped as it was told has not failed; srun's word where there is no note."""
    notes = {0: "1 100.500000 n1", 1: "7 100.250000 n1", 2: "75 99.0 n2", 3: "0 98.0 n2", 4: "1 1"}
    for rank, text in notes.items():
        (tmp_path / f"rank-{rank}.end").write_text(text + ("\n" if rank < 4 else ""))
    (tmp_path / "rank-1.err").write_text("one\ntwo\n")
    life = read_life(tmp_path, ["srun: error: n3: task 5: Killed"])
    assert (life.outcome.failed, life.outcome.status, life.node) == (1, 7, "n1")
    assert life.outcome.last_lines == ["one", "two"]
    for rank in (0, 1):
        (tmp_path / f"rank-{rank}.end").unlink()
    killed = read_life(tmp_path, ["srun: error: n3: tasks 5-7: Killed"])
    assert (killed.outcome.failed, killed.outcome.status, killed.node) == (5, 137, "n3")
    assert read_life(tmp_path, ["nothing of srun"]).outcome.failed is None
