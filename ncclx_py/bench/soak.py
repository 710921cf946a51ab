"""Random faults for a long time: does anything grow in the ranks that survive them?

    python -m ncclx_py.bench.soak --minutes 30 --json soak.json

Four ranks make a group, run collectives, suffer a fault (``ncclx_py.faults``) or none, give the group up and make a new one,
round after round. Half of the ranks live from the first round to the last; of the others some are killed now and then, and
replaced. After each round each rank counts its memory, descriptors and threads; what a straight line through these
gains from the first fifth of the rounds to the last is the growth. Exit status 1 where something grows.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import random
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

import ncclx_py
from ncclx_py import faults
from ncclx_py.faults.spec import FOLDER, VARIABLE
from ncclx_py.launch.ranks import Interrupted, raise_on_signals

RANKS = 4
DEADLINE = 1.0  # seconds, of the collectives
KINDS = ("none", "kill", "stop", "delay", "skip", "wrong-size", "wrong-order", "nan", "abort")
STEPS = 12
ALLOWED = {"rss_bytes": 8 << 20, "descriptors": 1.0, "threads": 1.0}  # growth that is noise
_WARM = 0.2  # share of the rounds that does not count: caches fill
_STUCK = 120.0  # seconds without a new round
_LOOK = 0.02


def plan(seed: int, number: int) -> tuple[str, int, str]:
    """Kind, rank and text of the fault of a round; the same in all processes."""
    draw = random.Random(f"{seed}/{number}")
    kind = draw.choice(KINDS)
    rank = draw.randrange(RANKS // 2, RANKS) if kind == "kill" else draw.randrange(RANKS)
    when = f"rank={rank},step={draw.randint(2, STEPS - 2)}"
    lasting = {"stop": ",for=2", "delay": ",for=2"}.get(kind, "")
    return kind, rank, "" if kind in ("none", "abort") else f"{kind}:{when}{lasting}"


class Rank:
    """One rank's life, from round `number` on."""

    def __init__(self, folder: Path, rank: int, number: int, seed: int) -> None:
        self.folder, self.rank, self.number, self.seed = folder, rank, number, seed

    def live(self) -> None:
        while self.number <= self._last():
            kind, victim, fault = plan(self.seed, self.number)
            started = time.monotonic()
            failed = self._round(fault, aborts=kind == "abort" and victim == self.rank)
            self._count(kind, failed, time.monotonic() - started)
            self._meet()
            self.number += 1

    def _round(self, fault: str, aborts: bool) -> str:
        """Makes a group, uses it, gives it up. Returns how it failed, "" when it did not."""
        faults.disarm()
        os.environ[VARIABLE] = fault
        store = dist.FileStore(str(self.folder / f"store-{self.number}"), RANKS)
        failure = ""
        try:
            dist.init_process_group(
                "ncclx", store=store, rank=self.rank, world_size=RANKS, timeout=timedelta(seconds=_STUCK / 4)
            )
            dist.barrier()
            _world().set_timeout(timedelta(seconds=DEADLINE))
            self._use(aborts)
        except RuntimeError as error:
            failure = type(error).__name__
        if dist.is_initialized():
            if failure:
                _world().abort()
            dist.destroy_process_group()
        return failure

    def _use(self, aborts: bool) -> None:
        large, small = torch.ones(20_000), torch.ones(100)
        pair = [dist.new_group(ranks) for ranks in ([0, 1], [2, 3])][self.rank // 2]
        for step in range(1, STEPS + 1):
            ncclx_py.mark_step(step)
            work = dist.all_reduce(large, op=dist.ReduceOp.MAX, async_op=True)
            dist.all_gather([torch.empty(100) for _ in range(RANKS)], small)
            work.wait()
            dist.all_reduce(torch.ones(300), group=pair)
            if aborts and step == STEPS // 2:
                _world().abort()

    def _count(self, kind: str, failed: str, seconds: float) -> None:
        gc.collect()
        pages = int(Path("/proc/self/statm").read_text().split()[1])
        row = {
            "round": self.number,
            "kind": kind,
            "failed": failed,
            "seconds": round(seconds, 2),
            "pid": os.getpid(),
            "rss_bytes": pages * resource.getpagesize(),
            "descriptors": len(os.listdir("/proc/self/fd")),
            "threads": len(os.listdir("/proc/self/task")),
        }
        with (self.folder / f"rank-{self.rank}.jsonl").open("a") as file:
            file.write(json.dumps(row) + "\n")

    def _meet(self) -> None:
        """Waits for all ranks, the replaced ones too."""
        (self.folder / f"done-{self.number}-{self.rank}").touch()
        until = time.monotonic() + _STUCK
        while any(not (self.folder / f"done-{self.number}-{rank}").exists() for rank in range(RANKS)):
            if time.monotonic() > until:
                raise TimeoutError(f"round {self.number}: not all ranks came within {_STUCK:g} s")
            time.sleep(_LOOK)
        for old in (f"done-{self.number - 2}-{self.rank}", f"store-{self.number - 2}"):
            (self.folder / old).unlink(missing_ok=True)

    def _last(self) -> int:
        file = self.folder / "last"
        return int(file.read_text()) if file.exists() else self.number


def _world() -> Any:
    """The default group, which is one of ours."""
    return dist.group.WORLD


class Soak:
    """The parent: starts the ranks, replaces those that are killed, ends them in time."""

    def __init__(self, folder: Path, seed: int) -> None:
        self.folder, self.seed = folder, seed
        self.processes = [self._start(rank, 0) for rank in range(RANKS)]
        self.replaced = 0

    def run(self, seconds: float) -> None:
        """Raises RuntimeError where a rank ends that should not, or nothing moves any more."""
        began = noted = moved = time.monotonic()
        seen, last = -1, None
        while any(process.poll() is None for process in self.processes):
            time.sleep(_LOOK * 5)
            self._replace()
            now, current = time.monotonic(), self._round()
            if current != seen:
                seen, moved = current, now
            if last is None and now - began > seconds:
                last = current + 2
                partial = self.folder / "last.partial"
                partial.write_text(str(last))
                partial.replace(self.folder / "last")
            if now - moved > _STUCK * 1.5:
                raise RuntimeError(f"round {seen} does not end; the outputs are in {self.folder}")
            if now - noted > 30:
                noted = now
                _note(f"{now - began:.0f} s: round {seen}, {self.replaced} ranks replaced, {self._shown()}")

    def end(self) -> None:
        for process in self.processes:
            process.kill()
            process.wait()

    def _start(self, rank: int, number: int) -> subprocess.Popen[bytes]:
        env = {**os.environ, "RANK": str(rank), "OMP_NUM_THREADS": "1", "NCCLX_NAN_CHECK": "1"}
        env |= {"NCCLX_TRACE_DIR": str(self.folder / "trace"), VARIABLE: ""}
        env.pop(FOLDER, None)
        words = [sys.executable, "-m", "ncclx_py.bench.soak", "--rank", str(rank), "--round", str(number)]
        words += ["--folder", str(self.folder), "--seed", str(self.seed)]
        with (self.folder / f"rank-{rank}.txt").open("ab") as sink:
            return subprocess.Popen(words, stdin=subprocess.DEVNULL, stdout=sink, stderr=sink, env=env)

    def _replace(self) -> None:
        for rank, process in enumerate(self.processes):
            if process.poll() in (None, 0):
                continue
            number = self._of(rank) + 1
            kind, victim, _ = plan(self.seed, number)
            if (kind, victim) != ("kill", rank):
                raise RuntimeError(
                    f"rank {rank} ended with {process.returncode} in round {number} ({kind}); see {self.folder}"
                )
            (self.folder / f"done-{number}-{rank}").touch()
            with (self.folder / f"rank-{rank}.jsonl").open("a") as file:
                file.write(json.dumps({"round": number, "killed": True}) + "\n")
            self.processes[rank] = self._start(rank, number + 1)
            self.replaced += 1

    def _round(self) -> int:
        return min(self._of(rank) for rank in range(RANKS))

    def _of(self, rank: int) -> int:
        """The last round that a rank has finished, -1 for none."""
        rows = read_rows(self.folder, rank)
        return rows[-1]["round"] if rows else -1

    def _shown(self) -> str:
        row = next((row for row in reversed(read_rows(self.folder, 0)) if "rss_bytes" in row), None)
        return (
            ""
            if row is None
            else f"rank 0: {row['rss_bytes'] >> 20} MiB, {row['descriptors']} fds, {row['threads']} threads"
        )


def read_rows(folder: Path, rank: int) -> list[dict[str, Any]]:
    file = folder / f"rank-{rank}.jsonl"
    return (
        [json.loads(line) for line in file.read_text().splitlines(keepends=True) if line.endswith("\n")]
        if file.exists()
        else []
    )


def growth(rows: list[dict[str, Any]]) -> dict[str, float]:
    """What a straight line through each count gains over the rounds, without the first fifth."""
    kept = rows[int(len(rows) * _WARM) :]
    if len(kept) < 3:
        return dict.fromkeys(ALLOWED, 0.0)
    rounds = np.array([row["round"] for row in kept], dtype=float)
    gains = {}
    for name in ALLOWED:
        slope = np.polyfit(rounds, np.array([row[name] for row in kept], dtype=float), 1)[0]
        gains[name] = round(float(slope * (rounds[-1] - rounds[0])), 2)
    return gains


def conclude(folder: Path, soak: Soak, seconds: float, shared: set[str]) -> dict[str, Any]:
    """The figures of a soak; `shared` are the files of shared memory that were there before."""
    lasting = {rank: read_rows(folder, rank) for rank in range(RANKS // 2)}
    grown = {rank: growth(rows) for rank, rows in lasting.items()}
    first = lasting[0]
    kinds = [plan(soak.seed, row["round"])[0] for row in first]
    return {
        "minutes": round(seconds / 60, 2),
        "rounds": len(first),
        "faults": {kind: kinds.count(kind) for kind in KINDS},
        "failed_rounds": sum(bool(row["failed"]) for row in first),
        "replaced": soak.replaced,
        "growth": grown,
        "growth_per_hour": {
            rank: {name: round(gain / max(seconds * (1 - _WARM), 1) * 3600, 1) for name, gain in gains.items()}
            for rank, gains in grown.items()
        },
        "allowed": ALLOWED,
        "first": {name: first[len(first) // 5][name] for name in ALLOWED} if first else None,
        "last": {name: first[-1][name] for name in ALLOWED} if first else None,
        "shared_memory_left": sorted(set(os.listdir("/dev/shm")) - shared),
        "grows": sorted({name for gains in grown.values() for name, gain in gains.items() if gain > ALLOWED[name]}),
    }


def _note(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--minutes", type=float, default=30.0, help="how long (default 30)")
    parser.add_argument("--seed", type=int, default=1, help="another seed, other faults (default 1)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures")
    for name in ("--rank", "--round"):
        parser.add_argument(name, type=int, help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.rank is not None:
        Rank(args.folder, args.rank, args.round, args.seed).live()
        return 0
    folder, shared = Path(tempfile.mkdtemp(prefix="ncclx-soak-")), set(os.listdir("/dev/shm"))
    soak, began = Soak(folder, args.seed), time.monotonic()
    try:
        with raise_on_signals():
            soak.run(args.minutes * 60)
    except Interrupted as stop:
        _note(f"{stop}: the ranks were ended")
        return 128 + stop.signum
    finally:
        soak.end()
    record = conclude(folder, soak, time.monotonic() - began, shared)
    shutil.rmtree(folder, ignore_errors=True)
    print(json.dumps(record, indent=1))
    if args.json is not None:
        args.json.write_text(json.dumps(record, indent=1) + "\n")
    return 1 if record["grows"] or record["shared_memory_left"] else 0


if __name__ == "__main__":
    sys.exit(main())
