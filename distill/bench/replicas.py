"""Kill replicas at random and check that nothing was lost: ``python -m distill.bench.replicas --replicas 4 --kills 20``.

Starts a store and a run of several replicas, each a torchrun job of its own, kills random ones with ``kill -9`` at random
instants and starts them again. Then it checks, from what lies on disk:

- every step was committed, and its samples are exactly the batch: none lost, none repeated;
- how long the survivors stood still: the longest time between two commits, against engine.replicas.deadline_s + 2 s;
- the weights and the optimizer's state are, to the bit, those of a second run without any fault in which the same replicas
  contribute to the same steps.

Exit code 1 where any of this fails.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

from distill.local_ranks import free_port
from distill.replicas.books import read_samples
from distill.runs import write_json

TINY = ["data.min_terms=2", "data.max_terms=6", "train.batch_size=24", "train.micro_batch_size=4", "train.log_every=50"]
RESTART_S = (0.0, 3.0)  # a killed replica is started again after a random time between these
POLL_S = 0.02


@dataclass
class Cluster:
    """A store and the jobs of one run. Use it in a ``with`` block: nothing outlives it."""

    folder: Path
    replicas: int
    overrides: list[str]
    deadline_s: float
    ranks: int = 1
    jobs: dict[int, subprocess.Popen[bytes]] = field(default_factory=dict)
    store: subprocess.Popen[bytes] | None = None
    port: int = 0
    _events: list[dict[str, Any]] = field(default_factory=list)
    _read: int = 0  # bytes of the journal

    @property
    def journal(self) -> Path:
        return self.folder / "membership.jsonl"

    def __enter__(self) -> Cluster:
        self.folder.mkdir(parents=True, exist_ok=True)
        self.port = free_port()
        self.start_store()
        return self

    def __exit__(self, *_: object) -> None:
        for replica in list(self.jobs):
            self.kill(replica)
        self.kill_store()

    def start_store(self) -> None:
        command = ["-m", "ncclx_py.elastic.store", "--file", str(self.journal), "--port", str(self.port)]
        self.store = self._start(command, "store")

    def kill_store(self) -> None:
        if self.store is not None:
            self.store.kill()
            self.store.wait()

    def start(self, replica: int) -> None:
        """Start one replica's job, as a user would."""
        torchrun = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={self.ranks}"]
        command = [*torchrun, "-m", "distill.train", *TINY, "run.tensorboard=false", f"run.dir={self.folder}"]
        self.jobs[replica] = self._start([*command, *self.options(replica), *self.overrides], f"replica_{replica}")

    def options(self, replica: int) -> list[str]:
        """What makes a job of `distill train` this replica."""
        options = {
            "enabled": "true",
            "id": replica,
            "count": self.replicas,
            "store": f"127.0.0.1:{self.port}",
            "deadline_s": self.deadline_s,
        }
        return [f"engine.replicas.{key}={value}" for key, value in options.items()]

    def kill(self, replica: int, how: signal.Signals = signal.SIGKILL) -> None:
        """Signal the launcher and every rank; torchrun gives ranks sessions of their own."""
        job = self.jobs[replica]
        if job.poll() is None:
            for pid in [job.pid, *_children(job.pid)]:
                try:
                    os.kill(pid, how)
                except ProcessLookupError:
                    continue  # it has ended by itself meanwhile
        if how == signal.SIGKILL:
            job.wait()
            del self.jobs[replica]

    def events(self) -> list[dict[str, Any]]:
        """What the store has decided so far; only what is new is read."""
        if self.journal.exists():
            with self.journal.open("rb") as file:
                file.seek(self._read)
                for line in file:
                    if line.endswith(b"\n"):
                        self._events.append(json.loads(line))
                        self._read += len(line)
        return self._events

    def check_jobs(self) -> None:
        """Raises RuntimeError with the end of its log where a job has failed by itself."""
        for replica, job in self.jobs.items():
            if job.poll():
                log = (self.folder / f"replica_{replica}.log").read_text(errors="replace")
                raise RuntimeError(f"replica {replica} ended with {job.returncode}:\n{log[-3000:]}")

    def wait(self, deadline_s: float) -> None:
        """Until every job has ended."""
        until = time.monotonic() + deadline_s
        while any(job.poll() is None for job in self.jobs.values()):
            self.check_jobs()
            if time.monotonic() > until:
                raise RuntimeError(f"the run in {self.folder} was not complete after {deadline_s:g} s")
            time.sleep(0.1)
        self.check_jobs()

    def _start(self, command: list[str], name: str) -> subprocess.Popen[bytes]:
        with (self.folder / f"{name}.log").open("ab") as log:
            # A launcher that is killed leaves its temporary folder behind: it goes with this one.
            environment = {**os.environ, "OMP_NUM_THREADS": "1", "TMPDIR": str(self.folder)}
            return subprocess.Popen(
                [sys.executable, *command], stdout=log, stderr=log, env=environment, start_new_session=True
            )


def _children(pid: int) -> list[int]:
    found = subprocess.run(["pgrep", "-P", str(pid)], capture_output=True, text=True, check=False).stdout.split()
    return [int(child) for child in found]


def live(events: Sequence[dict[str, Any]]) -> list[int]:
    """The members of the newest epoch."""
    epochs = [event for event in events if event["event"] == "epoch"]
    return sorted(map(int, epochs[-1]["members"])) if epochs else []


def done(events: Sequence[dict[str, Any]]) -> int:
    """Steps committed so far."""
    return max((event["step"] + 1 for event in events if event["event"] == "commit"), default=0)


def torment(cluster: Cluster, kill_steps: Sequence[int], rng: random.Random, deadline_s: float) -> None:
    """Start all replicas; kill a random one soon after each of these steps, while another lives; start it again."""
    until = time.monotonic() + deadline_s
    returns: dict[int, float] = {}
    for replica in range(cluster.replicas):
        cluster.start(replica)
    waiting = sorted(kill_steps)
    while waiting or returns:
        cluster.check_jobs()
        events, now = cluster.events(), time.monotonic()
        if now > until:
            raise RuntimeError(f"{len(waiting)} kills are left after {deadline_s:g} s, at step {done(events)}")
        for replica in [replica for replica, when in returns.items() if now >= when]:
            del returns[replica]
            cluster.start(replica)
        alive = [replica for replica in live(events) if replica in cluster.jobs]
        if waiting and done(events) > waiting[0] and len(alive) > 1:
            time.sleep(rng.uniform(0.0, 0.2))
            victim = rng.choice(alive)
            cluster.kill(victim)
            returns[victim] = time.monotonic() + rng.uniform(*RESTART_S)
            print(f"step {waiting.pop(0)}: killed replica {victim} of {alive}", flush=True)
            alive.remove(victim)
        time.sleep(POLL_S)
    cluster.wait(max(until - time.monotonic(), 1.0))


def check_samples(cluster: Cluster, steps: int, batch: int) -> dict[str, int]:
    """Lost and repeated samples over all committed steps, from the journal and from what each replica wrote down."""
    commits = {event["step"]: event for event in cluster.events() if event["event"] == "commit"}
    books = {r: read_samples(cluster.folder / "replicas" / str(r) / "samples.jsonl") for r in range(cluster.replicas)}
    lost = repeated = 0
    for step in range(steps):
        if step not in commits:
            lost += batch
            continue
        event = commits[step]
        made = [sample for r in map(int, event["members"]) for sample in books[r].get((step, event["epoch"]), [])]
        wanted = set(range(step * batch, (step + 1) * batch))
        lost += len(wanted - set(made))
        repeated += len(made) - len(set(made)) + len(set(made) - wanted)
    again = sum(event["event"] == "commit" for event in cluster.events()) - len(commits)
    return {"lost": lost, "repeated": repeated + again * batch}


def stalls(events: Sequence[dict[str, Any]]) -> list[float]:
    """Seconds between each commit and the next."""
    times = [event["at"] for event in events if event["event"] == "commit"]
    return [after - before for before, after in pairwise(times)]


def differing_files(left: Path, right: Path, step: int) -> list[str]:
    """Files of the final model and of the last checkpoint whose content differs between two runs."""
    import torch

    from distill.checkpoint import RecordingWriter

    names = ["final/model.safetensors"]
    differing = [name for name in names if (left / name).read_bytes() != (right / name).read_bytes()]
    for file in sorted((left / "checkpoints" / f"step_{step:08d}").glob("*.pt")):
        states = [RecordingWriter().load(str(root / file.relative_to(left)), "cpu") for root in (left, right)]
        flat = [[leaf for leaf in _leaves(state) if isinstance(leaf, torch.Tensor)] for state in states]
        if len(flat[0]) != len(flat[1]) or not all(map(torch.equal, *flat)):
            differing.append(str(file.relative_to(left)))
    return differing


def _leaves(value: Any) -> list[Any]:
    if isinstance(value, dict):
        return [leaf for key in value for leaf in _leaves(value[key])]
    if isinstance(value, (list, tuple)):
        return [leaf for part in value for leaf in _leaves(part)]
    return [value]


def run(options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """The tormented run, the checks, and the run without faults; returns the figures."""
    rng = random.Random(options.seed)
    batch = int(next(text for text in TINY if text.startswith("train.batch_size=")).split("=")[1])
    common = [f"train.steps={options.steps}", f"engine.zero_stage={options.zero_stage}", *options.overrides]
    first = options.steps // 20
    kills = [rng.randrange(first, options.steps - first) for _ in range(options.kills)]
    with Cluster(folder / "killed", options.replicas, common, options.deadline, options.ranks) as killed:
        torment(killed, kills, rng, options.timeout)
        events = killed.events()
        figures: dict[str, Any] = {
            "replicas": options.replicas,
            "kills": options.kills,
            "steps": options.steps,
            "epochs": sum(event["event"] == "epoch" for event in events),
            "members_per_step": _share(events),
            **check_samples(killed, options.steps, batch),
            "stall_s": round(max(stalls(events)), 2),
            "stall_limit_s": options.deadline + 2.0,
            "median_step_s": round(sorted(stalls(events))[len(stalls(events)) // 2], 3),
        }
    print("replaying the same membership without faults", flush=True)
    replay = [*common, f"engine.replicas.schedule={killed.journal}"]
    with Cluster(folder / "whole", options.replicas, replay, 10 * options.deadline, options.ranks) as whole:
        for replica in range(options.replicas):
            whole.start(replica)
        whole.wait(options.timeout)
    figures["differing"] = differing_files(killed.folder, whole.folder, options.steps)
    return figures


def _share(events: Sequence[dict[str, Any]]) -> dict[str, int]:
    """How many steps were committed by how many replicas."""
    counts: dict[str, int] = {}
    for event in events:
        if event["event"] == "commit":
            size = str(len(event["members"]))
            counts[size] = counts.get(size, 0) + 1
    return dict(sorted(counts.items()))


def good(figures: dict[str, Any]) -> bool:
    """Whether everything that was promised holds."""
    kept = figures["stall_s"] <= figures["stall_limit_s"]
    return kept and not figures["lost"] and not figures["repeated"] and not figures["differing"]


def main(arguments: list[str] | None = None) -> int:
    """Entry point; returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m distill.bench.replicas",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--replicas", type=int, default=4)
    parser.add_argument("--ranks", type=int, default=1, help="ranks of each replica (default 1)")
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--steps", type=int, default=2000, help="of the optimizer (default 2000)")
    parser.add_argument("--zero-stage", type=int, default=2, choices=[0, 1, 2, 3])
    parser.add_argument("--deadline", type=float, default=5.0, help="engine.replicas.deadline_s (default 5)")
    parser.add_argument("--seed", type=int, default=0, help="of the kills")
    parser.add_argument("--timeout", type=float, default=1800.0, help="seconds for each of the two runs")
    parser.add_argument("--dir", type=Path, help="keep everything there (default: a temporary folder)")
    parser.add_argument("--json", type=Path, help="write the figures to a file")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="further overrides for distill train")
    options = parser.parse_args(arguments)
    folder = options.dir or Path(tempfile.mkdtemp(prefix="replicas-"))
    if (folder / "killed").exists():
        print(f"error: {folder} holds an earlier run; name another --dir", file=sys.stderr)
        return 2
    try:
        figures = run(options, folder)
    except RuntimeError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    finally:
        if options.dir is None:
            shutil.rmtree(folder, ignore_errors=True)
    print(json.dumps(figures, indent=2))
    if options.json:
        write_json(options.json, figures)
    return 0 if good(figures) else 1


if __name__ == "__main__":
    sys.exit(main())
