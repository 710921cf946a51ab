"""The command on real processes: alone, over a store with a rank that never comes, and on emulated hosts."""

from __future__ import annotations

import contextlib
import io
import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from harness import Rank, RankPool, load
from ncclx_py.launch.emulate import Cluster

from ncclx_py.cli import main
from ncclx_py.doctor import gather
from ncclx_py.environment import read_launch

healthy = load(Path(__file__).with_name("healthy.py"), "doctor_healthy")

LAUNCHER = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "SLURM_PROCID", "SLURM_NTASKS", "MASTER_ADDR")


@pytest.fixture
def _alone(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in LAUNCHER:
        monkeypatch.delenv(name, raising=False)


@pytest.fixture(scope="module")
def pool() -> Iterator[RankPool]:
    with RankPool(3) as ranks:
        ranks.run(warm)
        yield ranks


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return int(server.getsockname()[1])


@pytest.mark.unit
@pytest.mark.usefixtures("_alone")
def test_one_machine_alone(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    command = ["doctor", "--json", "--run-folder", str(tmp_path), "--timeout", "100"]
    monkeypatch.setenv("NCCL_SOKET_IFNAME", "lo")
    status = main(command)
    record = json.loads(capsys.readouterr().out)
    assert status == (record["verdict"] == "fail")  # that of this machine
    levels = {check["check"]: check["level"] for check in record["checks"]}
    assert levels["variables"] == "warn"
    assert levels["ranks"] == levels["store"] == "ok"
    assert main([*command, "--strict"]) == 1
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "nothing0")
    assert main(command[:1] + command[2:]) == 1
    assert "names 'nothing0', which is no interface" in capsys.readouterr().out


@pytest.mark.unit
@pytest.mark.parametrize(
    ("arguments", "env", "words"),
    [
        (["--timeout", "0"], {}, "--timeout 0"),
        (["--timeout", "nan"], {}, "--timeout nan"),
        (["--store", "n0"], {"RANK": "0", "WORLD_SIZE": "2"}, "write HOST:PORT"),
        (["--store", "n0:x"], {"RANK": "0", "WORLD_SIZE": "2"}, "--store='x' is not a port"),
        (["--store", "n0:99999"], {}, "--store='99999' is not a port"),
        ([], {"RANK": "0", "WORLD_SIZE": "2"}, "MASTER_ADDR is not set"),
        ([], {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "n0", "MASTER_PORT": "99999"}, "MASTER_PORT='99999'"),
        ([], {"RANK": "2", "WORLD_SIZE": "2"}, "RANK=2"),
    ],
)
@pytest.mark.usefixtures("_alone")
def test_bad_usage(
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    arguments: list[str],
    env: dict[str, str],
    words: str,
) -> None:
    for name, value in env.items():
        monkeypatch.setenv(name, value)
    assert main(["doctor", *arguments]) == 2
    assert words in capsys.readouterr().err


SLURM = {"SLURM_PROCID": "1", "SLURM_NTASKS": "2", "SLURM_JOB_NODELIST": "n[3-4]", "SLURM_JOB_ID": "123456"}


@pytest.mark.unit
@pytest.mark.parametrize(
    ("env", "where"),
    [
        (SLURM, ("n3", 23456)),
        ({**SLURM, "SLURM_LAUNCH_NODE_IPADDR": "10.0.0.1"}, ("n3", 23456)),  # srun may be called on a login node
        ({**SLURM, "MASTER_ADDR": "n4", "MASTER_PORT": "1234"}, ("n4", 1234)),
        ({"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "fd00::1", "MASTER_PORT": "1234"}, ("fd00::1", 1234)),
    ],
)
def test_where_ranks_meet(env: dict[str, str], where: tuple[str, int]) -> None:
    assert gather.meeting_point(read_launch(env), env) == where


def warm(me: Rank) -> None:
    import torch.distributed  # noqa: F401


def doctor(me: Rank, port: int, timeout: float, present: list[int]) -> tuple[int, str, str] | None:
    if me.rank not in present:
        return None
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), NCCLX_ALGO="all_reduce=ring")
    if me.rank == 1:
        os.environ["NCCLX_ALGO"] = "all_reduce=tree"
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        status = main(["doctor", "--json", "--timeout", str(timeout)])
    return status, out.getvalue(), err.getvalue()


@pytest.mark.unit
@pytest.mark.parametrize("rank", ["0", "1"])
def test_a_store_that_cannot_be_used_ends_the_process_in_order(rank: str) -> None:
    """Rank 0: a name that leads nowhere, told at once. Rank 1: a listener that says nothing, while a thread of torch's waits."""
    with socket.create_server(("127.0.0.1", 0)) as mute:
        master = {"0": "nowhere.invalid", "1": "127.0.0.1"}[rank]
        port = str(mute.getsockname()[1])
        env = {name: value for name, value in os.environ.items() if name not in LAUNCHER}
        env |= {"RANK": rank, "WORLD_SIZE": "2", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1"}
        env |= {"MASTER_ADDR": master, "MASTER_PORT": port}
        words = [sys.executable, "-m", "ncclx_py", "doctor", "--timeout", "4"]
        done = subprocess.run(words, env=env, capture_output=True, text=True, timeout=60)
    assert done.returncode == 1, done.stderr
    assert {"0": f"open the store at {master}:{port}", "1": "The store does not answer at"}[rank] in done.stdout
    assert "remedy" in done.stdout


@pytest.mark.dist
def test_a_rank_that_never_comes_is_named(pool: RankPool) -> None:
    first, second, third = pool.run(doctor, free_port(), 12.0, [0, 1], deadline=60)
    assert third is None
    assert first[0] == 1
    assert second == (0, "", "")  # it was heard: rank 0 speaks
    record = json.loads(first[1])
    assert record["silent"] == {"2": "it did not reach the store in time"}
    found = {
        (check["check"], one["level"], tuple(one["ranks"])) for check in record["checks"] for one in check["findings"]
    }
    assert ("ranks", "fail", (2,)) in found
    assert {one for one in found if one[0] == "variables"} in (
        {("variables", "fail", (0,))},
        {("variables", "fail", (1,))},
    )


@pytest.mark.dist
def test_without_rank_0_every_node_speaks_for_itself(pool: RankPool) -> None:
    port = free_port()
    started = time.monotonic()
    nobody, second, third = pool.run(doctor, port, 3.0, [1, 2], deadline=60)
    assert time.monotonic() - started < 30
    assert nobody is None
    for status, _, error in (second, third):
        assert status == 1
        assert f"The store at 127.0.0.1:{port} (MASTER_ADDR and MASTER_PORT) cannot be reached" in error
        assert "refused" in error


def skewed(me: Rank, port: int) -> Any:
    """Rank 1 is on a host whose clock is ahead; rank 2 is on rank 0's and hands in what is too large to send."""
    until = time.monotonic() + 20
    store = gather.connect(("127.0.0.1", port), me.rank == 0, until, {})
    facts = healthy.rank_facts(me.rank, me.rank, 0, size=3)
    if me.rank == 0:
        gathered = gather.collect_all(store, facts, 3, until)
        gather.finish(store, gathered, "passed", until)
        return gathered
    if me.rank == 2:
        facts["variables"]["NCCL_ALGO"] = "x" * gather.LARGEST
        facts["machine"] = "boot 0"
    return gather.hand_in(store, facts, until, lambda: time.time() + 7.0)


@pytest.mark.dist
def test_clocks_and_facts_that_are_too_large(pool: RankPool) -> None:
    gathered, told, _ = pool.run(skewed, free_port(), deadline=60)
    assert told == {"verdict": "passed", "silent": []}
    assert gathered.silent == {}
    assert gathered.facts[1] == healthy.rank_facts(1, 1, 0, size=3)
    assert gathered.clocks.keys() == {1}
    clock = gathered.clocks[1]
    assert abs(clock.offset - 7.0) <= clock.uncertainty + 1e-4
    assert 0 < clock.uncertainty < 1
    assert "variables" not in gathered.facts[2]
    assert "more than the 262144 that are sent" in gathered.facts[2]["errors"]["facts"]


@pytest.mark.unit
@pytest.mark.parametrize(
    ("text", "words"),
    [
        (b"{" * 100_000, "no JSON"),
        (b"\xff\xfe", "no JSON"),
        (b"[1]", "not the facts of that rank"),
        (b'{"rank": 4, "host": "a", "machine": "b", "format": 1}', "not the facts of that rank"),
        (b"1" * (gather.LARGEST + 1), "bytes, more than"),
    ],
)
def test_what_is_handed_in_is_checked(text: bytes, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        gather.unpacked(text, 3)


@pytest.mark.net
@pytest.mark.skipif(os.geteuid() != 0, reason="emulated clusters need root")
def test_another_mtu_on_an_emulated_host() -> None:
    lines: list[str] = []
    with Cluster([2, 1]) as cluster:
        subprocess.run(
            ["ip", "-n", cluster.network.host(1), "link", "set", "eth0", "mtu", "1400"], check=True, timeout=30
        )
        program = ["-m", "ncclx_py", "doctor", "--json", "--timeout", "60"]
        outcome = cluster.run(program, show=lambda _, line, error: None if error else lines.append(line), timeout=120)
    assert outcome.status == 1
    assert outcome.failed == 0
    record = json.loads("\n".join(lines))
    found = [(check["check"], one) for check in record["checks"] for one in check["findings"] if one["level"] == "fail"]
    found = [one for one in found if one[0] not in ("memory", "disks", "limits")]  # those are the machine's own
    ((check, finding),) = found
    assert (check, finding["hosts"], finding["ranks"]) == ("interfaces", ["host1"], [2])
    assert "MTU of eth0 differs: 1500 on host0; 1400 on host1" in finding["text"]
    assert record["hosts"] == {"host0": [0, 1], "host1": [2]}
