"""Network namespaces for an emulated cluster: one per host, one for the switches, joined by shaped veth pairs.

    network = Network(shape)
    network.build()            # raises EmulationError when the machine cannot, naming the command and the remedy
    network.enter(0)           # the words that start a command on host 0
    network.remove()

Everything lies in namespaces called ``ncclx-<pid>-<start time>-…`` after the process that made them (and in the folders of
the same names in /etc/netns, which hold the hosts' own /etc/hosts), so nothing is left in the machine's own network, and
`remove_leftovers` can tell the namespaces of dead processes from those in use.

Rail r is the interface eth<r> of every host, with the subnet 10.77.<r>.0/24 and a bridge of its own. With a spine, the hosts
are split into two halves with one bridge each, joined by one shaped link that all rails share.
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import signal
import subprocess
import time
from pathlib import Path

from ncclx_py.launch.shape import Shape

_PREFIX = "ncclx"
_NAMES, _FILES = (
    Path("/run/netns"),
    Path("/etc/netns"),
)  # where iproute2 keeps namespaces, and files that replace /etc's in them
_QUEUE = "50ms"  # how long a packet may wait in a shaped link before it is dropped
_EMPTY_DEADLINE = 5.0  # seconds for killed processes to leave a namespace
_COMMAND_DEADLINE = 60.0

# Hosts with several NICs: accept packets on any of them, and answer for an address only on the NIC that has it. TCP keeps its
# window over pauses, as clusters set it: else the next message of a loss-based control (reno, cubic) starts small, and where both
# directions of a link are used its acknowledgements queue behind what the other end sends: one waits until the other is through.
_SYSCTL = """
if [ -e /proc/sys/net/ipv4/tcp_slow_start_after_idle ]; then echo 0 > /proc/sys/net/ipv4/tcp_slow_start_after_idle; fi
cd /proc/sys/net/ipv4/conf
for c in all default; do echo 0 > $c/rp_filter; echo 1 > $c/arp_ignore; echo 2 > $c/arp_announce; done
if [ -e /proc/sys/net/ipv6/conf/default/disable_ipv6 ]; then echo 1 > /proc/sys/net/ipv6/conf/default/disable_ipv6; fi
"""

_CONGESTION = 'echo "$0" > /proc/sys/net/ipv4/tcp_congestion_control'
_ALLOWED = Path("/proc/sys/net/ipv4/tcp_allowed_congestion_control")  # which namespaces may choose
_RENAME = 'echo "$0" > /proc/sys/kernel/hostname; exec "$@"'


class EmulationError(RuntimeError):
    """This machine cannot emulate a cluster, or a step of it failed; the message names the remedy."""


class Network:
    """The namespaces of one emulated cluster, made by and named after this process."""

    def __init__(self, shape: Shape) -> None:
        self.shape = shape
        Network._made += 1
        self.name = f"{_PREFIX}-{os.getpid()}-{_start_time(os.getpid())}-{Network._made}"

    _made = 0  # a process may have several clusters at once

    @property
    def interfaces(self) -> list[str]:
        """The names of a host's rails."""
        return [f"eth{rail}" for rail in range(self.shape.rails)]

    def host(self, index: int) -> str:
        """The namespace of a host."""
        return f"{self.name}-host{index}"

    @property
    def switch(self) -> str:
        """The namespace that holds the bridges."""
        return f"{self.name}-switch"

    @staticmethod
    def address(host: int, rail: int = 0) -> str:
        return f"10.77.{rail}.{host + 1}"

    def enter(self, host: int) -> list[str]:
        """The words before a command that is to run on `host`; the process keeps its id."""
        return ["ip", "netns", "exec", self.host(host), "unshare", "--uts", "sh", "-ec", _RENAME, f"host{host}"]

    @property
    def topology_file(self) -> Path:
        """A topology file (see plans/spec_file.py) with the rates of the links, where they are shaped."""
        return _FILES / self.switch / "topology.toml"

    def build(self) -> None:
        """Makes the hosts and links, after removing what dead launchers left. Raises EmulationError."""
        check_machine()
        _check_congestion(self.shape.congestion)
        remove_leftovers()
        try:
            self._build()
        except BaseException:
            self.remove()
            raise

    # Faults of links, while the hosts are there

    def break_link(self, host: int, rail: int | None = None) -> None:
        """Pulls the plug of a host's rail (None: of all its rails) at the switch; what is sent meanwhile is lost."""
        self._ports(host, rail, "down")

    def mend_link(self, host: int, rail: int | None = None) -> None:
        """Undoes `break_link` and `slow_link`."""
        self._ports(host, rail, "up")
        self._reshape(host, rail, 1.0)

    def slow_link(self, host: int, rail: int | None = None) -> None:
        """Halves the rate of a host's rail (None: of all its rails) in both directions. Raises EmulationError for links
        that are not shaped."""
        self._reshape(host, rail, 0.5)

    def _ports(self, host: int, rail: int | None, state: str) -> None:
        lines = [f"link set h{host}r{index} {state}" for index in self._rails(rail)]
        _command(["ip", "-n", self.switch, "-batch", "-"], lines)

    def _reshape(self, host: int, rail: int | None, share: float) -> None:
        for index in self._rails(rail):
            rate = self.shape.rates[index]
            if rate is None:
                if share != 1.0:
                    raise EmulationError(f"Rail {index} has no rate that could be changed: give the cluster a --rate.")
                continue
            for where, interface in ((self.switch, f"h{host}r{index}"), (self.host(host), f"eth{index}")):
                line = _shaping(interface, rate * share, self.shape.burst)
                _command(["tc", "-n", where, "-batch", "-"], [line])

    def _rails(self, rail: int | None) -> list[int]:
        if rail is not None and rail >= self.shape.rails:
            raise EmulationError(f"There is no rail {rail}: the hosts have {self.shape.rails}.")
        return list(range(self.shape.rails)) if rail is None else [rail]

    def remove(self) -> None:
        """Kills what still runs on the hosts and removes them. Does nothing where nothing is left."""
        _remove([name for name in _namespaces() if name.startswith(f"{self.name}-")])

    def _build(self) -> None:
        shape, hosts = self.shape, range(self.shape.hosts)
        _command(["ip", "-batch", "-"], [f"netns add {name}" for name in (self.switch, *map(self.host, hosts))])
        for name in (self.switch, *map(self.host, hosts)):
            _command(["ip", "netns", "exec", name, "sh", "-ec", _SYSCTL])
            if shape.congestion is not None:
                _command(["ip", "netns", "exec", name, "sh", "-ec", _CONGESTION, shape.congestion])
        links = [line for bridge in self._bridges() for line in (f"add {bridge} type bridge", f"set {bridge} up")]
        shaped = []
        if shape.spine is not None:
            links.append("add spine0 type veth peer name spine1")
            for end in (0, 1):
                links += [f"set spine{end} master half{end}", f"set spine{end} up"]
                shaped.append(_shaping(f"spine{end}", shape.spine, shape.burst))
        for host in hosts:
            for rail, rate in enumerate(shape.rates):
                port = f"h{host}r{rail}"
                links.append(f"add {port} type veth peer name eth{rail} netns {self.host(host)}")
                links += [f"set {port} master {self._bridge(host, rail)}", f"set {port} up"]
                shaped.append(_shaping(port, rate, shape.burst))
        _command(["ip", "-n", self.switch, "-batch", "-"], [f"link {line}" for line in links])
        _command(["tc", "-n", self.switch, "-batch", "-"], shaped)
        for host in hosts:
            self._configure(host)
        self._write_files()

    def _write_files(self) -> None:
        hosts = range(self.shape.hosts)
        names = ["127.0.0.1 localhost", "::1 ip6-localhost"]
        for host in hosts:
            names.append(f"{self.address(host)} host{host}")
            for rail in range(self.shape.rails):  # what torch asks for when it names the other end of a connection
                names.append(f"::ffff:{self.address(host, rail)} host{host}-eth{rail}")
        for host in hosts:
            folder = _FILES / self.host(host)
            folder.mkdir(parents=True)
            (folder / "hosts").write_text("\n".join(names) + "\n")
        self.topology_file.parent.mkdir()
        self.topology_file.write_text(_topology(self.shape))

    def _configure(self, host: int) -> None:
        lines, shaped = ["link set lo up"], []
        for rail, rate in enumerate(self.shape.rates):
            lines += [f"addr add {self.address(host, rail)}/24 dev eth{rail}", f"link set eth{rail} up"]
            shaped.append(_shaping(f"eth{rail}", rate, self.shape.burst))
        _command(["ip", "-n", self.host(host), "-batch", "-"], lines)
        _command(["tc", "-n", self.host(host), "-batch", "-"], shaped)

    def _bridges(self) -> list[str]:
        hosts, rails = range(self.shape.hosts), range(self.shape.rails)
        return list(dict.fromkeys(self._bridge(host, rail) for host in hosts for rail in rails))

    def _bridge(self, host: int, rail: int) -> str:
        if self.shape.spine is None:
            return f"rail{rail}"
        return "half0" if host < (self.shape.hosts + 1) // 2 else "half1"


def check_machine() -> None:
    """Raises EmulationError when this process cannot make network namespaces."""
    if missing := [tool for tool in ("ip", "tc") if shutil.which(tool) is None]:
        raise EmulationError(
            f"An emulated cluster needs {' and '.join(missing)}, which {'is' if len(missing) == 1 else 'are'} not installed: "
            "install iproute2 (apt-get install iproute2)."
        )
    if os.geteuid() != 0:
        raise EmulationError(
            f"An emulated cluster needs root (this is user {os.geteuid()}), because it makes network namespaces: "
            "run it with sudo, in a container with --privileged, or under unshare --user --map-root-user --net --mount "
            "with a /run/netns that can be written."
        )


def _check_congestion(name: str | None) -> None:
    """Raises EmulationError for a congestion control that this machine does not let its namespaces choose."""
    if name is None:
        return
    allowed = _ALLOWED.read_text().split()
    if name not in allowed:
        raise EmulationError(
            f"Emulated hosts may not use {name!r} as congestion control: this machine allows {', '.join(allowed)}. To allow "
            f"more: sysctl -w net.ipv4.tcp_allowed_congestion_control='{' '.join([*allowed, name])}' (and modprobe tcp_{name})."
        )


def remove_leftovers() -> list[str]:
    """Removes the namespaces of launchers that are dead, and the processes in them. Returns the namespaces' names."""
    dead = [name for name in _namespaces() if not _is_alive(name)]
    _remove(dead)
    return dead


def _namespaces() -> list[str]:
    """All namespaces of emulated clusters on this machine, also those of which only the files are left."""
    pattern = re.compile(rf"{_PREFIX}-\d+-\d+-\d+-(switch|host\d+)")
    names = {entry.name for folder in (_NAMES, _FILES) if folder.exists() for entry in folder.iterdir()}
    return sorted(name for name in names if pattern.fullmatch(name))


def _is_alive(namespace: str) -> bool:
    """Whether the process that a namespace is named after still runs (and its id was not given to another one)."""
    _, pid, start, *_ = namespace.split("-")
    return _start_time(int(pid)) == start


def _start_time(pid: int) -> str:
    """When a process started, in clock ticks since boot; empty for a process that is gone or has ended."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return ""
    return "" if fields[0] in "ZX" else fields[19]


def _remove(namespaces: list[str]) -> None:
    until = time.monotonic() + _EMPTY_DEADLINE
    while pids := [pid for name in namespaces for pid in _processes(name)]:
        if time.monotonic() > until:
            raise EmulationError(f"The processes {pids} in an emulated cluster do not end: kill them by hand.")
        for pid in pids:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        time.sleep(0.02)
    for name in namespaces:
        _run(["ip", "netns", "del", name])
        shutil.rmtree(_FILES / name, ignore_errors=True)
    if left := [name for name in namespaces if (_NAMES / name).exists()]:
        raise EmulationError(f"The namespaces {', '.join(left)} could not be removed: try ip netns del NAME.")


def _processes(namespace: str) -> list[int]:
    """The processes inside a namespace; none where it was only half made."""
    return [int(pid) for pid in _run(["ip", "netns", "pids", namespace]).stdout.split()]


def _shaping(interface: str, rate: float | None, burst: int) -> str:
    """tc's words for one direction of a link; an unshaped one is told to have no queue, which is a veth's default."""
    if rate is None:
        return f"qdisc replace dev {interface} root noqueue"
    return f"qdisc replace dev {interface} root tbf rate {round(rate * 8)}bit burst {burst} latency {_QUEUE}"


def _topology(shape: Shape) -> str:
    rates = [rate for rate in shape.rates if rate is not None]
    if len(rates) < shape.rails:
        return ""
    lines = [f"rails = {shape.rails}", "[inter]", f'bandwidth = "{max(rates)!r}B/s"']
    for host in range(shape.hosts):
        for rail, rate in enumerate(rates):
            if rate != max(rates):
                lines += ["[[nic]]", f"host = {host}", f"rail = {rail}", f'bandwidth = "{rate!r}B/s"']
    return "\n".join(lines) + "\n"


def _command(words: list[str], lines: list[str] | None = None) -> None:
    done = _run(words, None if lines is None else "\n".join(lines) + "\n")
    if done.returncode:
        failed = re.search(r"Command failed -:(\d+)", done.stderr)
        reason = (done.stderr.strip() or done.stdout.strip()).splitlines()[0].rstrip(".")
        line = f", line {lines[int(failed[1]) - 1]!r}" if lines and failed else ""
        raise EmulationError(
            f"{' '.join(words[:4])}{line} failed: {reason}. An emulated cluster needs the "
            "right to make network namespaces (in a container: --privileged) and a kernel with veth, bridge and sch_tbf."
        )


def _run(words: list[str], text: str | None = None) -> subprocess.CompletedProcess[str]:
    # In a session of its own: Ctrl-C in a terminal must not end it half way.
    return subprocess.run(
        words, input=text, capture_output=True, text=True, timeout=_COMMAND_DEADLINE, start_new_session=True
    )
