"""The batch script of ``ncclx launch slurm``, without a SLURM: what it asks for, what bash makes of it, what is refused."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path
from typing import Any

import pytest
from ncclx_py.launch.ranks import JobError
from ncclx_py.launch.slurm import SlurmJob, parse_nodes, render, seconds_of
from ncclx_py.launch.slurm_follow import Follower, read_life

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
    ("preempted", "status", "requeued"),
    [("2026-01-01T00:00:00", 143, True), ("None", 143, False), ("2026-01-01T00:00:00", 7, False)],
)
def test_a_preempted_job_goes_back_into_the_queue(tmp_path: Path, preempted: str, status: int, requeued: bool) -> None:
    """SLURM ends the ranks with SIGTERM and leaves the script alone for the grace time."""
    calls = tmp_path / "calls"
    for name, text in {
        "srun": f"exit {status}",
        "scontrol": f'echo "$@" >>{calls}\n[[ $1 == requeue ]] && exit 1\necho "JobId=7 PreemptTime={preempted} Reason=x"',
    }.items():
        (tmp_path / name).write_text(f"#!/bin/bash\n{text}\n")
        (tmp_path / name).chmod(0o755)
    env = {**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}", "SLURM_JOB_ID": "7"}
    script = render(job("1x1", folder=tmp_path / "logs"))
    done = subprocess.run(["bash"], input=script, text=True, env=env, capture_output=True, timeout=30)
    assert done.returncode == status
    assert ("requeue 7" in (calls.read_text() if calls.exists() else "")) == requeued


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (
            {"container": "nvcr.io#image:1"},
            ["'--container-image=nvcr.io#image:1'", f"--container-workdir={Path.cwd()}"],
        ),
        (
            {"container": "image", "runtime": "pyxis", "mounts": ["/data", "/a:/b:ro"]},
            [f",{Path.cwd()}:{Path.cwd()},/data:/data,/a:/b:ro bash"],
        ),
        (
            {"container": "image", "runtime": "apptainer", "gpus_per_rank": 1, "mounts": ["/data"]},
            ["apptainer exec --nv --bind ", f":{Path.cwd()},/data:/data --pwd {Path.cwd()} image python -u job.py"],
        ),
        ({"time": "1-0", "grace": 600}, ["#SBATCH --signal=B:USR1@600", "#SBATCH --time=1-0"]),
        ({}, ["#SBATCH --signal=B:USR1@120"]),  # also without a limit: for preemption with notice
        (
            {"cpus_per_rank": 3},
            ["#SBATCH --cpus-per-task=3", "srun --kill-on-bad-exit=1 --distribution=block --cpus-per-task=3"],
        ),
        ({"rails": "ib0,ib1", "setup": ["module load cuda"]}, ["export NCCLX_RAILS=ib0,ib1", "\nmodule load cuda\n"]),
        (
            {"name": "my job", "options": ["comment=two words", "--exclude='n[1-2]'", "mem=0"]},
            ['--job-name="my job"\n', '--comment="two words"\n', "--exclude='n[1-2]'\n", "--mem=0\n"],
        ),
        ({"sweep": ["a=1,2", "b=x y"], "at_once": 1}, ["--array=0-1%1", "1) program+=(a=2 'b=x y') ;;"]),
    ],
)
def test_options(options: dict[str, Any], words: list[str]) -> None:
    script = render(job(**options))
    for word in words:
        assert word in script
    assert subprocess.run(["bash", "-n"], input=script, text=True, timeout=30).returncode == 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["2*2"], "'2*2' is not a cluster"),
        (["2x2", "--grace", "0"], "--grace 0: at least 1"),
        (["2x2", "--time", "4h"], "--time '4h' is no time limit"),
        (["2x2", "--time", "2", "--grace", "120"], "--grace 120 s is not less than --time 2 (120 s)"),
        (["2x2", "--time", "2-0", "--grace", "70000"], "--grace 70000: SLURM signals at most 65535 s"),
        (["2x2", "--at-once", "2"], "--at-once is for a job with --sweep"),
        (["2x2", "--mount", "/data"], "--mount is for a job with --container"),
        (["2x2", "--runtime", "apptainer"], "--runtime is for a job with --container"),
        (["2x2", "--rails", ""], "--rails '' cannot be an option"),
        (["2x2", "--wait", "--json", "/nowhere/x"], "--json /nowhere/x cannot be written"),
        (["2x2", "--sweep", "a"], "--sweep 'a': write NAME=VALUE,VALUE"),
        (["2+1", "--sweep", "a=1"], "--sweep: SLURM has no arrays of heterogeneous jobs"),
        (["2+1", "--placement", "cyclic"], "--placement cyclic"),
        (["2x2", "--partition", ""], "--partition '' cannot be an option"),
        (["2x2", "--name", 'a "b"'], "has a quote or a backslash"),
        (["2x2", "--json", "x"], "--json writes how the job ended: give --wait too"),
        (["2x2", "--inject", "kill:rank=4,step=1"], "rank"),
    ],
)
def test_bad_input_is_refused(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["launch", "slurm", *arguments, "--dry-run", "--", "job.py"]) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("limit", "seconds"),
    [("90", 5400), ("2:30", 150), ("4:00:00", 14400), ("1-12", 129600), ("1-12:30", 131400), ("0-0:1:5", 65)],
)
def test_time_limits_are_those_of_sbatch(limit: str, seconds: int) -> None:
    assert seconds_of(limit) == seconds
    assert seconds_of("UNLIMITED") is None


def test_what_cannot_be_submitted_leaves_no_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["launch", "slurm", "2x2", "--log-dir", str(tmp_path / "logs"), "--", "nowhere.py"]) == 2
    assert "nowhere.py: no such file in" in capsys.readouterr().err
    assert not (tmp_path / "logs").exists()
    (tmp_path / "logs").touch()
    words = ["launch", "slurm", "2x2", "--log-dir", str(tmp_path / "logs"), "--", __file__]
    assert cli.main(words) == 2
    assert f"--log-dir {tmp_path / 'logs'} cannot be written" in capsys.readouterr().err


def test_how_a_job_ends_that_was_not_let_to(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Cancelled: SLURM's own SIGTERM is no failure of a rank, another status is; stopped as told, but not requeued: 75."""
    follower = Follower(1, job(folder=tmp_path))

    def ended(state: str, *statuses: int) -> tuple[int, int | None]:
        for rank, status in enumerate(statuses):
            (tmp_path / f"rank-{rank}.end").write_text(f"{status} {100 + rank}.5 n1\n")
        monkeypatch.setattr("ncclx_py.launch.slurm_follow.look", lambda number: {"1": (state, "None")})
        end = follower.to_the_end()
        return end.status, end.outcome.failed

    assert ended("CANCELLED", 143, 143) == (143, None)
    assert ended("CANCELLED", 7, 143) == (7, 0)
    assert ended("FAILED", 143, 143) == (143, 0)
    assert ended("FAILED", 75, 75) == (75, None)
    assert ended("COMPLETED", 0, 0) == (0, None)


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
