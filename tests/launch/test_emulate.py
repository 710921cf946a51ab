"""The emulated cluster for real: namespaces are made, shaped, used and removed again, whatever ends the launcher."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from ncclx_py.launch import network
from ncclx_py.launch.emulate import Cluster, EmulationError
from ncclx_py.launch.ranks import Outcome
from ncclx_py.launch.shape import Shape

pytestmark = [
    pytest.mark.net,
    pytest.mark.skipif(os.geteuid() != 0, reason="emulated clusters need root"),
]

SUM = """
import os
import torch
import torch.distributed as dist
dist.init_process_group("gloo")
total = torch.tensor([float(dist.get_rank() + 1)])
dist.all_reduce(total)
print(f"sum {total.item()} on {os.uname().nodename}")
dist.destroy_process_group()
"""
SLEEP = """
import os, pathlib, subprocess, sys, time
child = subprocess.Popen(["sleep", "1000"], start_new_session=True)
pathlib.Path(sys.argv[1], os.environ["RANK"]).write_text(f"{os.getpid()} {child.pid}")
time.sleep(1000)
"""


@pytest.fixture(autouse=True)
def _nothing_is_left() -> Any:
    yield
    assert not _traces(os.getpid())


def test_the_hosts_appear_with_shaped_links_and_disappear() -> None:
    links = _links()
    with Cluster([2, 1], rate="200mbit,100mbit") as cluster:
        net = cluster.network
        assert _traces(os.getpid()) == {net.host(0), net.host(1), net.switch}
        assert _links() == links  # nothing is added to the machine's own network
        for where, interface in ((net.host(0), "eth{}"), (net.host(1), "eth{}"), (net.switch, "h1r{}")):
            assert _shaping(where, interface.format(0)) == (25_000_000, 128 * 1024)
            assert _shaping(where, interface.format(1)) == (12_500_000, 128 * 1024)


def test_hosts_use_the_congestion_control_that_was_asked_for(tmp_path: Path) -> None:
    allowed = network._ALLOWED.read_text().split()
    setting = Path("/proc/sys/net/ipv4/tcp_congestion_control")
    machine = setting.read_text()
    program = tmp_path / "job.py"
    program.write_text(f"import pathlib; print(pathlib.Path({str(setting)!r}).read_text())")
    for name in allowed:
        seen: list[str] = []
        with Cluster(Shape((1, 1), congestion=name)) as cluster:
            cluster.run([str(program)], show=lambda rank, line, error, seen=seen: seen.append(line.strip()))  # type: ignore[misc]
        assert [line for line in seen if line] == [name] * 2
    assert setting.read_text() == machine
    with pytest.raises(EmulationError, match=r"'vegas-2' as congestion control: this machine allows .*sysctl"):
        Cluster(Shape((1, 1), congestion="vegas-2")).__enter__()


def test_rails_are_separate_subnets_on_separate_bridges() -> None:
    with Cluster([1, 1, 1], rails=2) as cluster:
        net = cluster.network
        subnets = [_address(net.host(host), f"eth{rail}").rpartition(".")[0] for rail in (0, 1) for host in range(3)]
        assert len(set(subnets[:3])) == len(set(subnets[3:])) == 1
        assert subnets[0] != subnets[3]
        assert {_master(net.switch, f"h{host}r1") for host in range(3)} == {"rail1"}
        assert "noqueue" in _tc(net.host(0), "eth0")["kind"]
        _assert_reaches(net, source=0, address=net.address(2, 1))


def test_a_spine_joins_two_halves_of_the_hosts() -> None:
    with Cluster([1, 1, 1], rate="200mbit", rails=2, spine="100mbit") as cluster:
        net = cluster.network
        halves = [{_master(net.switch, f"h{host}r{rail}") for rail in (0, 1)} for host in range(3)]
        assert halves == [{"half0"}, {"half0"}, {"half1"}]
        assert _shaping(net.switch, "spine0") == _shaping(net.switch, "spine1") == (12_500_000, 128 * 1024)
        for rail in (0, 1):
            _assert_reaches(net, source=0, address=net.address(2, rail))


def test_a_torchrun_program_runs_on_hosts_of_their_own(tmp_path: Path) -> None:
    script, record = tmp_path / "sum.py", tmp_path / "record.json"
    script.write_text(SUM)
    done = _launch(["2+1", "--rate", "1gbit", "--placement", "cyclic", "--json", str(record)], [str(script)])
    assert done.returncode == 0, done.stderr
    hosts = ("host0", "host1", "host0")
    assert sorted(done.stdout.splitlines()) == [f"[{rank}] sum 6.0 on {host}" for rank, host in enumerate(hosts)]
    written = json.loads(record.read_text())
    assert (written["statuses"], written["host_of"], written["cluster"]) == ([0, 0, 0], [0, 1, 0], "2+1")


def test_every_rank_finds_what_torchrun_would_tell_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    lines: dict[int, str] = {}
    with Cluster([2, 1], rate="200mbit", rails=2) as cluster:
        words = ["-c", "import json, os; print(json.dumps(dict(os.environ)))"]
        outcome = cluster.run(words, env={"EXTRA": "1"}, show=lambda rank, line, error: lines.update({rank: line}))
        topology = cluster.network.topology_file.read_text()
    assert outcome == Outcome({0: 0, 1: 0, 2: 0})
    told = [json.loads(lines[rank]) for rank in range(3)]
    ranks = [(env["RANK"], env["LOCAL_RANK"], env["GROUP_RANK"], env["LOCAL_WORLD_SIZE"]) for env in told]
    assert ranks == [("0", "0", "0", "2"), ("1", "1", "0", "2"), ("2", "0", "1", "1")]
    for env in told:
        same = {
            name: env[name] for name in ("WORLD_SIZE", "GROUP_WORLD_SIZE", "MASTER_ADDR", "OMP_NUM_THREADS", "EXTRA")
        }
        assert same == {
            "WORLD_SIZE": "3",
            "GROUP_WORLD_SIZE": "2",
            "MASTER_ADDR": "10.77.0.1",
            "OMP_NUM_THREADS": "1",
            "EXTRA": "1",
        }
        assert (env["GLOO_SOCKET_IFNAME"], env["NCCLX_RAILS"]) == ("eth0", "eth0,eth1")
    assert len({env["NCCL_HOSTID"] for env in told}) == 2
    assert "25000000.0B/s" in topology


def test_the_first_failing_rank_decides_and_the_others_are_ended(tmp_path: Path) -> None:
    program = (
        "import os, sys, time\nif os.environ['RANK'] == '2':\n  print('about to fail'); sys.exit(7)\ntime.sleep(1000)"
    )
    done = _launch(["2x2"], ["-c", program])
    assert done.returncode == 7
    assert "rank 2 (host 1) failed first, with exit status 7" in done.stderr
    assert done.stderr.rstrip().endswith("about to fail")


def test_a_rank_that_dies_of_a_signal_gives_the_shell_its_number() -> None:
    program = (
        "import os, signal, time\nif os.environ['RANK'] == '0': os.kill(os.getpid(), signal.SIGSEGV)\ntime.sleep(1000)"
    )
    done = _launch(["1x2"], ["-c", program])
    assert done.returncode == 128 + signal.SIGSEGV
    assert "rank 0 (host 0) failed first, with SIGSEGV (exit status 139)" in done.stderr


def test_ranks_that_ignore_requests_to_end_are_killed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ncclx_py.launch.ranks.GRACE", 0.2)
    program = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); print('deaf'); time.sleep(1000)"
    with Cluster([1, 1]) as cluster, pytest.raises(TimeoutError, match=r"\[0, 1\]"):
        cluster.run(["-c", program], show=lambda *_: None, timeout=2.0)


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_ends_the_ranks_and_their_children_and_removes_the_hosts(signum: int, tmp_path: Path) -> None:
    launcher = _start(["2x1", "--rate", "1gbit"], tmp_path)
    pids = _wait_for_pids(launcher, tmp_path, ranks=2)
    launcher.send_signal(signum)
    _, errors = launcher.communicate(timeout=60)
    assert launcher.returncode == 128 + signum
    assert signal.Signals(signum).name in errors
    assert not _alive(pids)
    assert not _traces(launcher.pid)


def test_the_next_start_cleans_up_after_a_killed_launcher_and_spares_a_living_one(tmp_path: Path) -> None:
    with Cluster([1]) as living:
        launcher = _start(["2x1", "--rate", "1gbit"], tmp_path)
        pids = _wait_for_pids(launcher, tmp_path, ranks=2)
        launcher.kill()
        launcher.communicate(timeout=60)
        _until(lambda: not _alive(pids[::2]), "the ranks die with their launcher")
        assert len(_alive(pids)) == 2  # what the ranks started lives on, in namespaces that nobody owns
        assert len(_traces(launcher.pid)) == 3
        with Cluster([1]) as fresh:
            assert not _traces(launcher.pid)
            assert _traces(os.getpid()) == {
                living.network.host(0),
                living.network.switch,
                fresh.network.host(0),
                fresh.network.switch,
            }
            assert not _alive(pids)


def test_a_start_that_fails_half_way_leaves_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(network, "_shaping", lambda interface, rate, burst: f"qdisc add dev {interface} root nonsense")
    with pytest.raises(
        EmulationError, match=r"line 'qdisc add dev h0r0 root nonsense' failed: Error: .*unknown.*--privileged"
    ):
        Cluster([1, 1], rate="200mbit").__enter__()


def test_without_root_or_iproute2_the_remedy_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    with pytest.raises(EmulationError, match=r"needs root.*user 1000.*sudo"):
        Cluster([1, 1]).__enter__()
    monkeypatch.setenv("PATH", "")
    with pytest.raises(EmulationError, match=r"ip and tc.*install iproute2"):
        Cluster([1, 1]).__enter__()


def _command(options: list[str], program: list[str]) -> list[str]:
    return [sys.executable, "-m", "ncclx_py", "launch", "emulate", *options, "--", *program]


def _launch(options: list[str], program: list[str]) -> subprocess.CompletedProcess[str]:
    return subprocess.run(_command(options, program), capture_output=True, text=True, timeout=120)


def _start(options: list[str], folder: Path) -> subprocess.Popen[str]:
    script = folder / "sleep.py"
    script.write_text(SLEEP)
    words = _command(options, [str(script), str(folder)])
    return subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def _wait_for_pids(launcher: subprocess.Popen[str], folder: Path, ranks: int) -> list[int]:
    """The process of each rank and the child of each, rank after rank."""
    files = [folder / str(rank) for rank in range(ranks)]
    _until(
        lambda: all(file.exists() and file.read_text() for file in files) or launcher.poll() is not None, "ranks start"
    )
    assert launcher.poll() is None, launcher.communicate()
    return [int(pid) for file in files for pid in file.read_text().split()]


def _until(done: Callable[[], bool], what: str, deadline: float = 60.0) -> None:
    until = time.monotonic() + deadline
    while not done():
        assert time.monotonic() < until, what
        time.sleep(0.02)


def _alive(pids: list[int]) -> list[int]:
    """Those of `pids` that run; an ended process that nobody has waited for does not count."""
    states = {}
    for pid in pids:
        try:
            states[pid] = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
        except OSError:
            continue
    return [pid for pid, state in states.items() if state not in "ZX"]


def _traces(pid: int) -> set[str]:
    """What the emulated clusters of a process have left on this machine: namespaces and files."""
    folders = (Path("/run/netns"), Path("/etc/netns"))
    names = {path.name for folder in folders if folder.exists() for path in folder.iterdir()}
    return {name for name in names if name.startswith(f"ncclx-{pid}-")}


def _links() -> list[str]:
    return [link["ifname"] for link in json.loads(_output("ip", "-j", "link"))]


def _tc(namespace: str, interface: str) -> dict[str, Any]:
    (qdisc,) = json.loads(_output("tc", "-j", "-n", namespace, "qdisc", "show", "dev", interface))
    return qdisc


def _shaping(namespace: str, interface: str) -> tuple[int, int]:
    """Rate in bytes per second and burst in bytes, which the kernel keeps in ticks of its clock: to the next 1024."""
    qdisc = _tc(namespace, interface)
    assert qdisc["kind"] == "tbf"
    return qdisc["options"]["rate"], round(qdisc["options"]["burst"] / 1024) * 1024


def _address(namespace: str, interface: str) -> str:
    (link,) = json.loads(_output("ip", "-j", "-n", namespace, "-4", "addr", "show", "dev", interface))
    return str(link["addr_info"][0]["local"])


def _master(namespace: str, interface: str) -> str:
    (link,) = json.loads(_output("ip", "-j", "-n", namespace, "link", "show", "dev", interface))
    return str(link["master"])


def _assert_reaches(net: network.Network, source: int, address: str) -> None:
    """A TCP connection is refused by the other end, at once: packets go there and back."""
    program = f"import socket; s = socket.socket(); s.settimeout(10); print(s.connect_ex(('{address}', 9)))"
    assert _output(*net.enter(source), sys.executable, "-c", program).strip() == "111"


def _output(*words: str) -> str:
    return subprocess.run(words, capture_output=True, text=True, check=True, timeout=30).stdout
