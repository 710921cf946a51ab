"""OpenMPI as a peer: the same collectives, sizes, hosts and links, timed by a small MPI program. Only compared with, never used.

    rows = measure(cluster, settings, "openmpi-han", report)

Needs mpirun and mpicc (Debian: openmpi-bin, libopenmpi-dev). "openmpi" is OpenMPI as it comes; "openmpi-han" prefers its
hierarchical collectives (those of 4.1.4 crash above 64 KiB where the size is no multiple of 64 KiB). Every emulated host is
a node of its own for OpenMPI: a name, shared memory inside, TCP between.
"""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
import tempfile
from collections.abc import Callable
from pathlib import Path

from ncclx_py.bench.cases import Case
from ncclx_py.bench.rows import Row, Subject, progress
from ncclx_py.bench.settings import Settings
from ncclx_py.bench.timing import times_of
from ncclx_py.launch.emulate import Cluster
from ncclx_py.launch.ranks import Process, describe, run_ranks
from ncclx_py.plans.plan import Problem
from ncclx_py.plans.spec import VARIABLE, topology_for

_SOURCE = Path(__file__).with_name("mpi_peer.c")
_START_SECONDS = 60.0
_HAN = ("--mca", "coll_han_priority", "100")


def measure(cluster: Cluster, settings: Settings, backend: str, report: Callable[[str], None]) -> list[Row]:
    """One row per collective and size. Raises RuntimeError when MPI is missing or fails, ValueError for what it cannot do."""
    if settings.dtype != "float32" or settings.op != "sum" or settings.root:
        raise ValueError(f"{backend} is measured with --dtype float32 and --op sum only.")
    if missing := [tool for tool in ("mpirun", "mpicc") if shutil.which(tool) is None]:
        raise RuntimeError(f"{backend} needs {' and '.join(missing)}: apt-get install openmpi-bin libopenmpi-dev.")
    rows: list[Row] = []
    with tempfile.TemporaryDirectory(prefix="ncclx-mpi-") as folder:
        program = _compile(Path(folder))
        agent = _write_agent(cluster, Path(folder))
        for collective in settings.collectives:
            found = _measure(cluster, settings, backend, collective, [*_mpirun(cluster, backend, agent), str(program)])
            rows += found
            for row in found:
                report(progress([row]))
    return rows


def _measure(cluster: Cluster, settings: Settings, backend: str, collective: str, words: list[str]) -> list[Row]:
    topology = topology_for(
        cluster.shape.host_of, cluster.shape.rails, {VARIABLE: str(cluster.network.topology_file), **os.environ}
    )
    cases = [Case(collective, topology.size, 0, topology, size, settings) for size in settings.sizes]
    numbers = [str(settings.iters), str(settings.warmup), str(int(settings.check))]
    lines: list[str] = []
    job = Process(0, [*words, collective, *numbers, *(_argument(case.problem) for case in cases)], os.environ)
    deadline = _START_SECONDS + settings.timeout * len(cases)
    outcome = run_ranks([job], lambda _, line, error: lines.append(line), deadline)
    results = [line.split()[1:] for line in lines if line.startswith("result ")]
    if outcome.failed is not None or len(results) != len(cases):
        raise RuntimeError(f"mpirun failed with {describe(outcome.status)}:\n" + "\n".join(lines[-20:]))
    rows = []
    for case, (wrong, *numbers) in zip(cases, results):
        samples = [list(map(float, numbers[at : at + settings.iters])) for at in range(0, len(numbers), settings.iters)]
        subject = Subject(collective, case.bytes, case.problem, topology, case.dtype.itemsize)
        rows.append(subject.row(backend, times_of(samples), wrong == "0" if settings.check else None))
    return rows


def _argument(problem: Problem) -> str:
    """What mpi_peer.c calls ROWS."""
    if problem.collective == "all_to_all":
        return ",".join(str(row[0]) for row in problem.matrix)
    return str(problem.count or problem.counts[0])


def _compile(folder: Path) -> Path:
    program = folder / "mpi_peer"
    done = subprocess.run(
        ["mpicc", "-O2", str(_SOURCE), "-o", str(program)], capture_output=True, text=True, timeout=120
    )
    if done.returncode:
        raise RuntimeError(f"mpicc cannot compile {_SOURCE.name}:\n{done.stderr}")
    return program


def _write_agent(cluster: Cluster, folder: Path) -> Path:
    """A program that OpenMPI calls in place of ssh: AGENT HOST WORDS…, the words to be read by a shell on that host."""
    cases = [
        f'host{host}) exec {shlex.join(cluster.network.enter(host))} sh -c "$*";;'
        for host in range(cluster.shape.hosts)
    ]
    agent = folder / "agent"
    agent.write_text("\n".join(["#!/bin/sh", "host=$1; shift", 'case "$host" in', *cases, "esac", "exit 1", ""]))
    agent.chmod(0o755)
    return agent


def _mpirun(cluster: Cluster, backend: str, agent: Path) -> list[str]:
    """The words that start an MPI program on all ranks, placed as the cluster's."""
    shape, rails = cluster.shape, ",".join(cluster.network.interfaces)
    parameters = {
        "plm_rsh_agent": str(agent),
        "plm_rsh_no_tree_spawn": "1",
        "oob_tcp_if_include": cluster.network.interfaces[0],
        "btl": "self,vader,tcp",
        "btl_tcp_if_include": rails,
        "mpi_yield_when_idle": "1",  # there may be more ranks than cores: waiting ranks must let others run
    }
    return [
        *cluster.network.enter(0),
        "mpirun",
        "--allow-run-as-root",
        "--bind-to",
        "none",
        "--host",
        ",".join(f"host{host}:{ranks}" for host, ranks in enumerate(shape.ranks)),
        "--map-by",
        "slot" if shape.placement == "block" else "node",
        *(word for name, value in parameters.items() for word in ("--mca", name, value)),
        *(_HAN if backend == "openmpi-han" else ()),
    ]
