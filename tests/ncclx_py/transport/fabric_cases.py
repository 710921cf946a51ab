"""Fabrics on the ranks of a pool, the inputs of collectives, and what must come out, computed without communication.

All tests share one pool (conftest.py). `run` hands a worker to its first ``len(hosts)`` ranks; ``forks=True`` runs it in
a child of each, which may then be killed or stopped while the pool lives on.
"""

from __future__ import annotations

import itertools
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from multiprocessing.connection import Pipe
from typing import Any

import torch
from harness import Rank, RankPool, load
from torch import Tensor
from torch.distributed import ReduceOp

from ncclx_py.plans.algorithms.registry import build_rank
from ncclx_py.plans.plan import Problem, RankPlan
from ncclx_py.transport.executor import Executor
from ncclx_py.transport.fabric import Fabric
from ncclx_py.transport.signature import Signature

KINDS = {name: getattr(ReduceOp, name) for name in ("SUM", "PRODUCT", "MIN", "MAX", "BAND", "BOR", "BXOR")}
_kept: dict[tuple[int, ...], Node] = {}
_tickets = itertools.count()
_ticket = ""
_meetings = 0


def run(
    pool: RankPool, hosts: tuple[int, ...], worker: Callable[..., Any], *args: Any, forks: bool = False
) -> list[Any]:
    """Calls ``worker(me, hosts, *args)`` on one rank per entry of `hosts`; None for those that die or stop."""
    name = (worker.__code__.co_filename, worker.__qualname__)
    results = pool.run(dispatch, name, hosts, f"{os.getpid()}-{next(_tickets)}", args, forks, deadline=40)
    return results[: len(hosts)]


def dispatch(
    me: Rank, worker: tuple[str, str], hosts: tuple[int, ...], ticket: str, args: tuple[Any, ...], forks: bool
) -> Any:
    if me.rank >= len(hosts):
        return None
    me = Rank(me.rank, len(hosts), me.folder)
    function = getattr(load(worker[0]), worker[1])
    cases = sys.modules["fabric_cases"]  # the one that the worker's file uses
    cases._ticket, cases._meetings = ticket, 0  # type: ignore[attr-defined]
    return in_child(lambda: function(me, hosts, *args)) if forks else function(me, hosts, *args)


def in_child(act: Callable[[], Any], patience: float = 5.0) -> Any:
    """The result of `act` in a forked child; None where it dies, or has nothing to say for `patience` seconds."""
    mine, theirs = Pipe(duplex=False)
    child = os.fork()
    if not child:
        try:
            answer = ("ok", act())
        except BaseException:
            answer = ("raised", traceback.format_exc())
        theirs.send(answer)
        os._exit(0)
    theirs.close()
    try:
        kind, value = mine.recv() if mine.poll(patience) else ("ok", None)
    except EOFError:
        kind, value = "ok", None
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        mine.close()
    assert kind == "ok", value
    return value


class Node:
    """One rank of a fabric: runs plans, and counts its calls."""

    def __init__(self, me: Rank, hosts: tuple[int, ...], name: str) -> None:
        os.environ["NCCLX_HOST_ID"] = f"host-{hosts[me.rank]}"
        self.rank, self.size = me.rank, me.size
        self.fabric = Fabric.connect(me.store(name), me.rank, me.size, timedelta(seconds=30))
        self.executor = Executor(self.fabric)
        self.calls = 0

    def run(
        self,
        plan: RankPlan,
        buffers: dict[str, Tensor],
        reduction: str = "",
        op: str = "test",
        elements: int = 0,
        seconds: float = 30.0,
    ) -> None:
        lengths = {key: value.numel() for key, value in buffers.items()}
        schedule = self.executor.lower(plan, lengths)
        self.again(schedule, buffers, reduction, op, elements, seconds)

    def again(
        self,
        schedule: Any,
        buffers: dict[str, Tensor],
        reduction: str = "",
        op: str = "test",
        elements: int = 0,
        seconds: float = 30.0,
    ) -> None:
        dtype = next(iter(buffers.values())).dtype
        signature = Signature(self.calls, op, dtype, elements, -1, reduction)
        self.calls += 1
        kind = KINDS[reduction] if reduction else None
        self.executor.run(schedule, buffers, kind, signature, time.monotonic() + seconds)

    def collective(
        self,
        problem: Problem,
        algorithm: str,
        parameters: dict[str, int],
        buffers: dict[str, Tensor],
        reduction: str = "",
    ) -> None:
        plan = build_rank(problem, self.fabric.topology, algorithm, self.rank, parameters)
        self.run(plan, buffers, reduction, problem.collective, problem.count)

    def close(self) -> None:
        self.fabric.close()


def fresh(me: Rank, hosts: tuple[int, ...]) -> Node:
    """A fabric of its own for one test; all ranks call it alike."""
    global _meetings
    _meetings += 1
    return Node(me, hosts, f"fabric-{_ticket}-{_meetings}")


def node(me: Rank, hosts: tuple[int, ...]) -> Node:
    """A fabric for these hosts, kept for the next test on the same processes."""
    if hosts not in _kept:
        _kept[hosts] = fresh(me, hosts)
    return _kept[hosts]


def values(rank: int, count: int, dtype: torch.dtype, salt: int = 0) -> Tensor:
    """Small integers, so that sums and products of a few ranks are exact in every dtype."""
    generator = torch.Generator().manual_seed(1000 * salt + rank)
    low = 0 if dtype == torch.uint8 else -2
    return torch.randint(low, 4, (count,), generator=generator).to(dtype)


def reduced(inputs: list[Tensor], reduction: str) -> Tensor:
    """Reduced element by element in a wider dtype, then put into the dtype (integers wrap)."""
    dtype = inputs[0].dtype
    wide = [tensor.to(torch.float64 if dtype.is_floating_point else torch.int64) for tensor in inputs]
    result = wide[0].clone()
    for tensor in wide[1:]:
        result = _REDUCE[reduction](result, tensor)
    return result.to(dtype)


_REDUCE: dict[str, Any] = {
    "SUM": lambda a, b: a + b,
    "PRODUCT": lambda a, b: a * b,
    "MIN": lambda a, b: torch.where(a < b, a, b),
    "MAX": lambda a, b: torch.where(a > b, a, b),
    "BAND": lambda a, b: a & b,
    "BOR": lambda a, b: a | b,
    "BXOR": lambda a, b: a ^ b,
}


def case(
    problem: Problem, rank: int, dtype: torch.dtype, reduction: str, salt: int
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The buffers of `rank` before a collective, and those that must be there afterwards."""
    lengths = problem.lengths
    size = range(problem.size)
    if problem.collective == "all_reduce":
        inputs = [values(other, problem.count, dtype, salt) for other in size]
        return {"data": inputs[rank]}, {"data": reduced(inputs, reduction)}
    if problem.collective == "broadcast":
        result = {"data": values(problem.root, problem.count, dtype, salt)}
        return {"data": values(rank, problem.count, dtype, salt)}, result
    inputs = [values(other, lengths(other)["input"], dtype, salt) for other in size]
    before = {"input": inputs[rank].clone(), "output": torch.full((lengths(rank)["output"],), 77, dtype=dtype)}
    return before, {"input": inputs[rank], "output": _output(problem, rank, inputs, reduction)}


def _output(problem: Problem, rank: int, inputs: list[Tensor], reduction: str) -> Tensor:
    if problem.collective == "reduce":
        return reduced(inputs, reduction) if rank == problem.root else inputs[0][:0]
    if problem.collective == "reduce_scatter":
        return reduced(inputs, reduction).split(list(problem.counts))[rank]
    if problem.collective == "all_gather":
        return torch.cat(inputs)
    return torch.cat([tensor.split(list(row))[rank] for tensor, row in zip(inputs, problem.matrix)])
