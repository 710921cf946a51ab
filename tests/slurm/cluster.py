"""A real SLURM on this machine: munged, slurmctld and one slurmd per node, with a configuration, a key and ports of their own.

    with Cluster(nodes=2, cpus=2) as cluster:
        subprocess.run(["sbatch", …], env=cluster.env)

All daemons are children of this process and die with it. The nodes n1, n2, … share the machine; a job sees them as hosts by their
names. Nothing outside the temporary folder is touched: no systemd, no cgroups, no accounting.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import secrets
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "scontrol", "scancel", "sinfo", "squeue")
_SBIN = "/usr/sbin:/sbin"
_DEADLINE = 60.0

# Waits for the end of its input, which also comes when the tests are killed, and ends what still belongs to the cluster:
# jobs are children of slurmstepd, which outlives its slurmd on purpose.
_SWEEPER = """
read -r
for process in /proc/[0-9]*; do
    grep -qsz "^SLURM_CONF=$1/" "$process/environ" && kill -9 "${process#/proc/}"
done
rm -rf "$1"
"""

# cred_expire is also how long a requeued job has to wait before it may start again: 120 s where nothing is said. Late news of its
# former life must be over by then, or SLURM takes them for the end of the new one.
_CONFIGURATION = """
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={port}
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket,cred_expire=5
CredType=cred/munge
SlurmUser=root
SlurmdUser=root
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/%n.pid
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
MpiDefault=none
SwitchType=switch/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SchedulerParameters=bf_interval=1,sched_interval=1,batch_sched_delay=0,sched_min_interval=0
SlurmdParameters=config_overrides
ReturnToService=2
KillWait=5
"""


def missing() -> str:
    """Why SLURM cannot run here; "" where it can."""
    lacking = [name for name in PROGRAMS if shutil.which(name, path=f"{os.environ.get('PATH', '')}:{_SBIN}") is None]
    if lacking:
        return f"not installed: {', '.join(lacking)} (Debian: apt-get install slurmctld slurmd slurm-client munge)"
    return "" if os.geteuid() == 0 else "slurmd needs root"


class Cluster:
    """`nodes` nodes with `cpus` CPUs each, ready when entered. `env` is for every command that is to talk to it."""

    def __init__(self, nodes: int, cpus: int) -> None:
        self.nodes = [f"n{number}" for number in range(1, nodes + 1)]
        self.cpus = cpus
        self.folder = Path(tempfile.mkdtemp(prefix="slurm-"))
        path = f"{os.environ['PATH']}:{_SBIN}"
        clean = {name: value for name, value in os.environ.items() if not name.startswith(("SLURM_", "SBATCH_"))}
        self.env = {**clean, "PATH": path, "SLURM_CONF": str(self.folder / "slurm.conf"), "OMP_NUM_THREADS": "1"}
        self._daemons: list[subprocess.Popen[bytes]] = []
        words = ["bash", "-c", _SWEEPER, "sweeper", str(self.folder)]
        self._sweeper = subprocess.Popen(words, stdin=subprocess.PIPE, env=clean, start_new_session=True)

    def __enter__(self) -> Cluster:
        try:
            self._configure()
            socket_path = self.folder / "munge.socket"
            key, seed, log, pid = (self.folder / f"munge.{name}" for name in ("key", "seed", "log", "pid"))
            names = {"key-file": key, "seed-file": seed, "log-file": log, "pid-file": pid, "socket": socket_path}
            self._start(["munged", "--foreground", "--force", *(f"--{name}={path}" for name, path in names.items())])
            self._until(socket_path.exists, "munged")
            self._start(["slurmctld", "-D", "-c"])
            for node in self.nodes:
                self._start(["slurmd", "-D", "-N", node])
            self._until(lambda: self._idle() == len(self.nodes), "the nodes")
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        if len(self._daemons) > 1 and self._daemons[1].poll() is None:
            with contextlib.suppress(subprocess.SubprocessError):
                self.ask(["scancel", "--user=root"])
                self._until(lambda: not self.ask(["squeue", "--noheader"]).strip(), "the queue to empty")
        for daemon in reversed(self._daemons):
            daemon.send_signal(signal.SIGTERM)
        for daemon in self._daemons:
            try:
                daemon.wait(10)
            except subprocess.TimeoutExpired:
                daemon.kill()
                daemon.wait()
        self._sweeper.communicate()

    def ask(self, words: Sequence[str]) -> str:
        """What a SLURM command says. Raises CalledProcessError."""
        answer = subprocess.run(words, env=self.env, capture_output=True, text=True, timeout=30, check=True)
        return answer.stdout

    def steps(self) -> list[str]:
        """The slurmstepd processes of this cluster: empty once no job has anything left."""
        found = []
        for process in Path("/proc").glob("[0-9]*"):
            with contextlib.suppress(OSError):
                words = (process / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
                variables = (process / "environ").read_bytes().decode(errors="replace")
                if words.startswith("slurmstepd") and str(self.folder) in variables:
                    found.append(f"{process.name} {words}")
        return found

    def _configure(self) -> None:
        (self.folder / "munge.key").write_bytes(secrets.token_bytes(128))
        (self.folder / "munge.key").chmod(0o600)
        host = socket.gethostname().split(".")[0]
        controller, *ports = _free_ports(1 + len(self.nodes))
        lines = [_CONFIGURATION.format(host=host, port=controller, folder=self.folder)]
        for node, port in zip(self.nodes, ports, strict=True):
            (self.folder / node).mkdir()
            lines.append(f"NodeName={node} NodeHostname={host} NodeAddr=127.0.0.1 Port={port} CPUs={self.cpus}")
        lines.append(f"PartitionName=all Nodes={','.join(self.nodes)} Default=YES MaxTime=INFINITE State=UP")
        (self.folder / "state").mkdir()
        (self.folder / "slurm.conf").write_text("\n".join(lines) + "\n")

    def _start(self, words: list[str]) -> None:
        with (self.folder / f"{words[0]}.log").open("ab") as log:
            daemon = subprocess.Popen(
                words, env=self.env, stdin=subprocess.DEVNULL, stdout=log, stderr=log, preexec_fn=_die_with_parent
            )
        self._daemons.append(daemon)

    def _idle(self) -> int:
        with contextlib.suppress(subprocess.SubprocessError):
            return self.ask(["sinfo", "--noheader", "--Node", "--format=%T"]).split().count("idle")
        return 0

    def _until(self, done: Callable[[], bool], what: str) -> None:
        until = time.monotonic() + _DEADLINE
        while not done():
            dead = [daemon.args for daemon in self._daemons if daemon.poll() is not None]
            if dead or time.monotonic() > until:
                logs = "\n".join(f"-- {log.name}\n{log.read_text()[-2000:]}" for log in self.folder.glob("*.log"))
                raise TimeoutError(f"SLURM for the tests did not come up ({what}); ended: {dead}\n{logs}")
            time.sleep(0.1)


def _free_ports(count: int) -> list[int]:
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for one in sockets:
            one.bind(("127.0.0.1", 0))
        return [one.getsockname()[1] for one in sockets]


_libc = ctypes.CDLL(None)


def _die_with_parent() -> None:
    _libc.prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG
