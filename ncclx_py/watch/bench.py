"""Measures what the trace costs: the time of a call with it, less the time with stubs in its place.

    python -m ncclx_py.watch.bench [--calls 20000 --rounds 15] [--json]

Calls pass through the process group and its progress machinery as in use, but nothing is sent: what is left is the cost of
Python, of which the trace is a part. Both arms take turns in blocks; the figure is the median over the blocks of
their difference. Then one dump of a full ring is written to a temporary folder, and timed. Exit status 1 when a call costs more
than `--limit` µs. What that is of a whole training step: ``distill.bench.recording``.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

import ncclx_py  # noqa: F401  (registers the backend)
from ncclx_py.errors import Call
from ncclx_py.runtime.progress import Progress
from ncclx_py.units import format_time
from ncclx_py.watch import dump
from ncclx_py.watch.trace import TRACE

_HOOKS: list[tuple[Any, str, Callable[..., None]]] = [
    (TRACE, "scheduled", lambda call, inputs, outputs=None: None),
    (Call, "begun", lambda call: None),
    (Call, "over", lambda call: None),
]
_ORIGINALS = [getattr(owner, name) for owner, name, _ in _HOOKS]


def main() -> int:
    """Prints the figures; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m ncclx_py.watch.bench", description=__doc__)
    parser.add_argument("--calls", type=int, default=20000, help="per block (default 20000)")
    parser.add_argument("--rounds", type=int, default=15, help="blocks of each arm (default 15)")
    parser.add_argument("--limit", type=float, default=2.0, help="µs that the trace may cost a call (default 2)")
    parser.add_argument("--json", action="store_true", help="one line of JSON")
    options = parser.parse_args()
    dist.init_process_group("ncclx", store=dist.HashStore(), rank=0, world_size=1)
    try:
        figures = measure(options.calls, options.rounds)
    finally:
        dist.destroy_process_group()
    if options.json:
        print(json.dumps(figures))
    else:
        print(
            f"a call without the trace {format_time(figures['without_s'])}, with it {format_time(figures['with_s'])}: it costs "
            f"{figures['cost_s'] * 1e6:.2f} µs per call; a dump of {figures['records']} calls takes "
            f"{format_time(figures['dump_s'])} and {figures['dump_bytes'] / 1e6:.2f} MB"
        )
    return int(figures["cost_s"] * 1e6 > options.limit)


def measure(calls: int, rounds: int) -> dict[str, float]:
    """Seconds per call without and with the trace, the median difference, and the time and size of a dump."""
    if TRACE.ring is None:
        raise SystemExit("NCCLX_TRACE_RECORDS=0 turns the trace off: unset it.")
    block = _block(calls)
    block()
    without, traced = [], []
    for _ in range(rounds):
        record(False)
        without.append(block() / calls)
        record(True)
        traced.append(block() / calls)
    with tempfile.TemporaryDirectory() as folder:
        start = time.perf_counter()
        path = dump.write(Path(folder), dump.snapshot("demand", "bench"))
        seconds, size = time.perf_counter() - start, path.stat().st_size
    return {
        "without_s": statistics.median(without),
        "with_s": statistics.median(traced),
        "cost_s": statistics.median(after - before for before, after in zip(without, traced)),
        "records": len(TRACE.calls()),
        "dump_s": seconds,
        "dump_bytes": size,
    }


def record(on: bool) -> None:
    """Calls of this process are recorded, as they always are, or (to measure) not: stubs take the place of what records."""
    for (owner, name, stub), original in zip(_HOOKS, _ORIGINALS):
        setattr(owner, name, original if on else stub)


def _block(calls: int) -> Callable[[], float]:
    """A function that makes `calls` calls of one tensor, and returns the seconds that they took."""
    group: Any = dist.group.WORLD
    progress, tensor = Progress("bench"), torch.ones(16)

    def one() -> None:
        call = group.ask("all_reduce")
        group.start(call, tensor, lambda local: progress.start(lambda job: None, inline=True, call=call))

    def block() -> float:
        start = time.thread_time()  # not of others who share the processor
        for _ in range(calls):
            one()
        return time.thread_time() - start

    return block


if __name__ == "__main__":
    sys.exit(main())
