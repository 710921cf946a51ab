"""Valid input that is too long to stand where it is used: a trace dump, as ``ncclx_py/watch/dump.py`` writes them."""

from __future__ import annotations

import json
from typing import Any


def dump(rank: int, stuck: bool = True) -> bytes:
    """The dump of rank `rank` of 3: the making of a group, collectives of which one may be stuck, a message."""
    groups = {
        "0": {"ranks": [0, 1, 2], "desc": "default_pg", "size": 3},
        "1": {"ranks": [0, 2], "desc": "pair", "size": 2},
    }
    header = {"format": "ncclx-trace", "version": 1, "rank": rank, "world_size": 3, "host": f"host{rank % 2}"}
    header |= {"pid": 100 + rank, "reason": "timeout", "detail": "no end after 2 s", "time_ns": 9_000_000_000}
    header |= {"monotonic_ns": 77, "dropped": 0, "groups": groups, "aborts": {"0": "no end after 2 s"}, "step": 4}
    header |= {"threads": {"MainThread": ["/home/u/train.py:7 main"]}, "peers": {str((rank + 1) % 3): "alive"}}
    calls = [
        _call(seq, op, stuck and seq == 3)
        for seq, op in enumerate(("connecting", "all_reduce", "all_gather", "all_reduce"))
    ]
    lines = [header, *calls, _call(1, "send", False), {"end": True, "records": len(calls) + 1}]
    return ("\n".join(map(json.dumps, lines)) + "\n").encode()


def _call(seq: int, op: str, stuck: bool) -> dict[str, Any]:
    begun = 1_000_000_000 * (seq + 1)
    call: dict[str, Any] = {"seq": seq, "group": "0", "op": op, "state": "started" if stuck else "completed"}
    call |= {
        "input_sizes": [[8]],
        "output_sizes": [[8]],
        "dtype": "float32",
        "root": -1,
        "reduce_op": "sum",
        "bytes": 32,
    }
    call |= {"peer": 2 if op == "send" else -1, "algorithm": "ring", "reason": "predicted", "splits": None}
    call |= {"plan_step": [1, 4] if stuck else None, "waiting_for": [2] if stuck else None, "error": None}
    call |= {"scheduled_ns": begun, "started_ns": begun + 5, "finished_ns": 0 if stuck else begun + 900}
    return call | {"call_site": "/home/u/train.py:7 main", "async": False, "timeout_s": None}
