"""Times messages between two ranks, ncclx beside gloo: there and back, and both ways at once. Any torchrun-like start will do.

    torchrun --standalone --nproc-per-node 2 -m ncclx_py.bench.messages [--sizes 8,64KiB,1MiB,16MiB --repeats 5 --json FILE]
    ncclx launch emulate 2x1 -- -m ncclx_py.bench.messages

The first and the last rank exchange; backends take turns in blocks, of which the first does not count. `one_way_s` is half of a
round trip; `both_ways_s` the time until a rank has sent and received. Medians over blocks; exit status 1 when bytes arrived wrong.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

import ncclx_py  # noqa: F401  (registers the backend)
from ncclx_py.units import format_size, format_time, parse_size

_BLOCK = 0.05  # seconds of messages between two turns, as far as a first guess of their speed goes
_GUESS = 1e-4, 1e9  # seconds of a message, and bytes per second
_DEADLINE = timedelta(seconds=60)

Exchange = Callable[[Any, Tensor, Tensor, int], None]


def there_and_back(group: Any, out: Tensor, back: Tensor, peer: int) -> None:
    if dist.get_rank() < peer:
        dist.send(out, peer, group=group)
        dist.recv(back, peer, group=group)
    else:
        dist.recv(back, peer, group=group)
        dist.send(out, peer, group=group)


def both_ways(group: Any, out: Tensor, back: Tensor, peer: int) -> None:
    for work in (dist.isend(out, peer, group=group), dist.irecv(back, peer, group=group)):
        assert work is not None
        work.wait()


def measure(groups: dict[str, Any], size: int, repeats: int) -> dict[str, Any]:
    """One row for messages of `size` bytes; every rank calls it."""
    rank, last = dist.get_rank(), dist.get_world_size() - 1
    row: dict[str, Any] = {"bytes": size, "correct": True}
    count = max(2, int(_BLOCK / (_GUESS[0] + size / _GUESS[1])))
    for what, exchange, parts in (("one_way_s", there_and_back, 2), ("both_ways_s", both_ways, 1)):
        blocks: dict[str, list[float]] = {name: [] for name in groups}
        for _ in range(repeats + 1):
            for name, group in groups.items():
                dist.barrier()
                if rank in (0, last):
                    seconds, right = _block(exchange, group, size, count, last - rank)
                    blocks[name].append(seconds / parts)
                    row["correct"] = row["correct"] and right
        row[what] = {name: statistics.median(found[1:]) if found else 0.0 for name, found in blocks.items()}
    return row


def _block(exchange: Exchange, group: Any, size: int, count: int, peer: int) -> tuple[float, bool]:
    """Seconds of one exchange of `count`, and whether the last brought what the peer had sent."""
    out, back = _pattern(size, dist.get_rank()), torch.zeros(size, dtype=torch.uint8)
    began = time.perf_counter()
    for _ in range(count):
        exchange(group, out, back, peer)
    seconds = (time.perf_counter() - began) / count
    return seconds, torch.equal(back, _pattern(size, peer))


def _pattern(size: int, rank: int) -> Tensor:
    return ((torch.arange(size) * 31 + rank) % 251).to(torch.uint8)


def _as_text(row: dict[str, Any]) -> str:
    cells = [f"{format_size(row['bytes']):>10}"]
    for what in ("one_way_s", "both_ways_s"):
        ours, theirs = row[what]["ncclx"], row[what]["gloo"]
        cells.append(f"{format_time(ours):>9} {format_time(theirs):>9} {ours / theirs:5.2f}")
    return "   ".join([*cells, "ok" if row["correct"] else "WRONG"])


def main() -> int:
    """Runs on each rank of this launch; rank 0 prints."""
    parser = argparse.ArgumentParser(prog="python -m ncclx_py.bench.messages", description=__doc__)
    parser.add_argument("--sizes", default="8,64KiB,1MiB,16MiB", metavar="SIZE,…", help="default 8,64KiB,1MiB,16MiB")
    parser.add_argument("--repeats", type=int, default=5, metavar="N", help="blocks of each backend (default 5)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the rows")
    args = parser.parse_args()
    try:
        sizes = [parse_size(size) for size in args.sizes.split(",")]
    except ValueError as error:
        parser.error(f"--sizes: {error}")
    if args.repeats < 1:
        parser.error(f"--repeats {args.repeats}: at least one.")
    dist.init_process_group("ncclx", timeout=_DEADLINE)
    try:
        if dist.get_world_size() < 2:
            parser.error("needs two ranks or more: start it with torchrun --nproc-per-node 2.")
        groups = {"ncclx": dist.group.WORLD, "gloo": dist.new_group(backend="gloo")}
        rows = []
        if dist.get_rank() == 0:
            print(f"{'':>10}   {'one way: ncclx, gloo, ratio':<25}   both ways: ncclx, gloo, ratio", flush=True)
        for size in sizes:
            rows.append(measure(groups, size, args.repeats))
            if dist.get_rank() == 0:
                print(_as_text(rows[-1]), flush=True)
        if args.json is not None and dist.get_rank() == 0:
            args.json.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")
        return int(not all(row["correct"] for row in rows))
    finally:
        dist.destroy_process_group()


if __name__ == "__main__":
    sys.exit(main())
