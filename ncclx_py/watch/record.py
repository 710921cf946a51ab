"""One call of the trace as plain data: a line of our dumps.

In it ``seq`` counts the collectives of a group (messages: those from one rank to one other), times are ns since the epoch
(0: not yet), ``plan_step`` is [done, in all] and ``waiting_for`` the group ranks this rank waits for, both null where they
are not known.
"""

from __future__ import annotations

import math
from types import CodeType
from typing import Any

from ncclx_py.errors import UNSET_TIMEOUT, Call

Progress = tuple[int, int, list[int]]


def line_of(call: Call, progress: Progress | None = None) -> dict[str, Any]:
    """A call as a line of a dump. `progress` is that of a call that runs as a plan right now."""
    decision, known = call.decision, progress or call.progress
    inputs, outputs = sizes_of(call)
    return {
        "seq": call.sequence,
        "group": call.group,
        "op": call.op,
        "state": _state(call),
        "input_sizes": inputs,
        "output_sizes": outputs,
        "dtype": dtype_of(call),
        "root": call.root,
        "peer": call.peer,
        "reduce_op": _reduction(call.reduce_op),
        "bytes": _bytes(call, inputs or outputs),
        "algorithm": call.engine,
        "reason": decision.reason if decision is not None else "",
        "plan_step": [known[0], known[1]] if known else None,
        "waiting_for": known[2] if known else None,
        "scheduled_ns": call.scheduled_ns,
        "started_ns": call.started_ns,
        "finished_ns": call.finished_ns,
        "call_site": "{}:{} {}".format(*site_of(call)),
        "error": call.error or None,
        "async": call.async_op,
        "timeout_s": None if call.timeout == UNSET_TIMEOUT else call.timeout.total_seconds(),
        "splits": [list(sizes) for sizes in call.splits] if call.splits and call.splits[0] else None,
        **({"nan": True} if call.nan else {}),
    }


def _state(call: Call) -> str:
    if call.error:
        return "failed"
    return "completed" if call.finished_ns else "started" if call.started_ns else "scheduled"


def sizes_of(call: Call) -> tuple[list[list[int]], list[list[int]]]:
    """Of the inputs and the outputs; who only receives has no input."""
    receives = call.op in ("recv", "recv_any_source") or (call.op == "scatter" and call.rank != call.root)
    return [] if receives else _shapes(call.inputs), _shapes(call.outputs)


def _shapes(noted: Any) -> list[list[int]]:
    """One shape per tensor of what was noted: a shape, or a list of them; () where there was no tensor."""
    if isinstance(noted, list):
        return [list(map(int, shape)) for shape in noted]
    return [] if type(noted) is tuple else [list(map(int, noted))]


def dtype_of(call: Call) -> str:
    return "" if call.dtype is None else str(call.dtype).removeprefix("torch.")


def _bytes(call: Call, sizes: list[list[int]]) -> int:
    """As benchmarks count them where a plan carries the call, else those of the inputs (a receive: of the output)."""
    if call.decision is not None:
        return int(call.decision.bytes)
    return sum(map(math.prod, sizes)) * (call.dtype.itemsize if call.dtype is not None else 0)


def _reduction(op: Any) -> str:
    """ "sum" for ``ReduceOp.SUM``; "" for none."""
    if op is None:
        return ""
    return str(getattr(op, "op", op)).rsplit(".", 1)[-1].lower()


def site_of(call: Call) -> tuple[str, int, str]:
    """File, line and function of the caller."""
    code: CodeType | None = call.code
    if code is None:
        return "?", 0, "?"
    for start, stop, line in code.co_lines():
        if start <= call.instruction < stop and line is not None:
            return code.co_filename, line, code.co_name
    return code.co_filename, code.co_firstlineno, code.co_name
