"""The trace in the schema of torch's Flight Recorder, for ``python -m torch.distributed.flight_recorder.fr_trace``.

The analyser takes every entry of a group for a collective of all its ranks, and pairs them by ``collective_seq_id``. So
messages are given to groups of two that stand for one direction between two ranks, where that is right.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from ncclx_py.errors import Call
from ncclx_py.watch.record import dtype_of, site_of, sizes_of

VERSION = "2.10"  # of the schema, as torch 2.13 writes it
_NAMES = {
    "all_reduce_coalesced": "allreduce_coalesced",
    "all_gather_single_coalesced": "all_gather_into_tensor_coalesced",
    "reduce_scatter_single_coalesced": "reduce_scatter_tensor_coalesced",
    "monitored_barrier": "barrier",
}
_UNKNOWN = frozenset({"connecting", "recv_any_source"})

Groups = Mapping[str, tuple[str, tuple[int, ...]]]


def flight_dump(rank: int, groups: Groups, calls: Sequence[Call], dropped: int) -> dict[str, Any]:
    """The content of a dump file of global rank `rank`. `groups` has the description and the global ranks of each group by its
    name, `calls` are the oldest first, after `dropped` that are not kept: the analyser ignores what is numbered before the
    first entry of any rank."""
    config = {name: _group(name, desc, ranks) for name, (desc, ranks) in groups.items()}
    entries: list[dict[str, Any]] = []
    for call in calls:
        if call.op in _UNKNOWN or call.group not in groups:
            continue
        entry = _entry(call, dropped + len(entries), groups[call.group][0])
        if call.message:
            source, target = (call.rank, call.peer) if call.op == "send" else (call.peer, call.rank)
            ranks = groups[call.group][1]
            name = f"{call.group} {source}->{target}"
            config[name] = _group(name, "messages", (ranks[source], ranks[target]))
            entry |= _direction(call, name, ranks[source] < ranks[target])
        entries.append(entry)
    return {"version": VERSION, "pg_config": config, "rank": rank, "entries": entries}


def _group(name: str, desc: str, ranks: Sequence[int]) -> dict[str, str]:
    return {"name": name, "desc": desc, "ranks": str(sorted(ranks))}


def _direction(call: Call, group: str, upward: bool) -> dict[str, Any]:
    """What differs in an entry of a message: its group, and the ranks in that group, which is sorted."""
    source, target = (0, 1) if upward else (1, 0)
    name = f"send {source}->{target}" if call.op == "send" else f"recv {target}<-{source}"
    return {"process_group": (group, "messages"), "profiling_name": f"ncclx:{name}", "p2p_seq_id": call.sequence}


def _entry(call: Call, number: int, desc: str) -> dict[str, Any]:
    inputs, outputs = sizes_of(call)
    if call.op == "all_gather":  # as NCCL has them: one tensor for all ranks
        outputs = [[sum(map(math.prod, outputs))]]
    elif call.op == "reduce_scatter":
        inputs = [[sum(map(math.prod, inputs))]]
    dtype = dtype_of(call)
    file, line, function = site_of(call)
    ended = bool(call.finished_ns) and not call.error
    uneven = call.op == "all_to_all_single" and call.splits and call.splits[0]  # sizes that differ between ranks
    return {
        "record_id": number,
        "pg_id": 0,
        "process_group": (call.group, desc),
        "collective_seq_id": call.sequence,
        "p2p_seq_id": 0,
        "op_id": number,
        "profiling_name": "ncclx:" + ("all_to_all" if uneven else _NAMES.get(call.op, call.op)),
        "time_created_ns": call.scheduled_ns,
        "time_discovered_started_ns": call.started_ns or None,
        "time_discovered_completed_ns": call.finished_ns if ended else None,
        "input_sizes": inputs,
        "input_dtypes": [dtype] * len(inputs),
        "output_sizes": outputs,
        "output_dtypes": [dtype] * len(outputs),
        "state": "completed" if ended else "started" if call.started_ns else "scheduled",
        "timeout_ms": max(0, round(call.timeout.total_seconds() * 1000)),
        "is_p2p": call.message,
        "retired": ended,
        "frames": [{"name": function, "filename": file, "line": line}],
    }
