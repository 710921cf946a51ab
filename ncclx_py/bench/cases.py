"""One collective at one size: its tensors, its call, and what must come out, computed in fp64 without communicating.

    case = Case("all_reduce", size=8, rank=3, topology=topology, nbytes=1 << 20, settings=settings)
    tensors = case.allocate(torch.empty)
    case.fill(tensors); case.call(tensors, group); case.wrong(tensors)      # → the number of wrong elements

Values are small integers, so that sums are exact in every dtype: element i of rank r is a(i) + w(r)·b(i) with a and b from
a hash of i, 0 to 3, and w(r) different from rank to rank where the dtype's range permits it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import torch
import torch.distributed as dist
from torch import Tensor

from ncclx_py.bench.settings import Settings
from ncclx_py.plans.plan import Collective, Problem
from ncclx_py.plans.topology import Topology

# Whole numbers up to here are exact; the hash's largest digit is 3.
_EXACT = {"float32": 2**24, "float64": 2**53, "bfloat16": 2**8, "float16": 2**11, "int8": 127, "uint8": 255}
_DIGIT = 3
_MOST_WEIGHTS = 61
_AVG_ULPS = 4  # an average is rounded, and a library may divide before or after it adds

Allocate = Callable[..., Tensor]


@dataclass(frozen=True)
class Tensors:
    """`given` goes in, and `result` comes out; they are the same tensor for collectives that work in place."""

    given: Tensor
    result: Tensor


class Case:
    """`nbytes` is the size as nccl-tests counts it, rounded down to whole elements for every rank (at least one).

    That is the vector of all_reduce, broadcast and reduce; the whole array, over all ranks, of all_gather and
    reduce_scatter; and what a rank sends (all_to_all_v: on average) to all others and itself.
    """

    def __init__(
        self, collective: str, size: int, rank: int, topology: Topology, nbytes: int, settings: Settings
    ) -> None:
        self.collective, self.size, self.rank = collective, size, rank
        self.settings = settings
        self.dtype: torch.dtype = getattr(torch, settings.dtype)
        self.problem = _problem(collective, topology, nbytes // self.dtype.itemsize, settings)
        self._weights = weights(size, _EXACT.get(settings.dtype, 2**31 - 1))

    @property
    def bytes(self) -> int:
        problem = self.problem
        elements = problem.count or sum(problem.counts) or sum(map(sum, problem.matrix)) // self.size
        return elements * self.dtype.itemsize

    @property
    def in_place(self) -> bool:
        return self.collective in ("all_reduce", "broadcast", "reduce")

    def allocate(self, empty: Allocate) -> Tensors:
        lengths = self.problem.lengths(self.rank)
        if self.in_place:
            data = self._one(empty, self.problem.count)
            return Tensors(data, data)
        return Tensors(self._one(empty, lengths["input"]), self._one(empty, lengths["output"]))

    def fill(self, tensors: Tensors) -> None:
        """Writes this rank's values, and nonsense where the result will be."""
        if tensors.result is not tensors.given:
            tensors.result.fill_(99)
        tensors.given.copy_(self._input)

    def call(self, tensors: Tensors, group: dist.ProcessGroup) -> None:
        """Runs the collective; it is done on return as far as the host is concerned (see `synchronize` in timing.py)."""
        given, result, op = tensors.given, tensors.result, getattr(dist.ReduceOp, self.settings.op.upper())
        root = self.settings.root
        if self.collective == "all_reduce":
            dist.all_reduce(result, op, group=group)
        elif self.collective == "reduce_scatter":
            dist.reduce_scatter_tensor(result, given, op, group=group)
        elif self.collective == "all_gather":
            dist.all_gather_into_tensor(result, given, group=group)
        elif self.collective == "broadcast":
            dist.broadcast(result, root, group=group)
        elif self.collective == "reduce":
            dist.reduce(result, root, op, group=group)
        else:
            uniform = self.collective == "all_to_all"
            received = None if uniform else [row[self.rank] for row in self.problem.matrix]
            sent = None if uniform else list(self.problem.matrix[self.rank])
            dist.all_to_all_single(result, given, received, sent, group=group)

    def wrong(self, tensors: Tensors) -> int:
        """How many elements of the result differ from the reference, on this rank."""
        expected = self._expected
        if expected is None:
            return 0
        result = tensors.result.cpu()
        if self.settings.op == "avg":
            slack = _AVG_ULPS * torch.finfo(self.dtype).eps * expected.abs()
            return int(((result.double() - expected).abs() > slack).sum())
        return int((result != expected.to(self.dtype)).sum())

    def _one(self, empty: Allocate, elements: int) -> Tensor:
        return empty(elements, dtype=self.dtype, device=self.settings.device)

    @cached_property
    def _input(self) -> Tensor:
        problem = self.problem
        if problem.collective == "all_to_all":
            row = problem.matrix[self.rank]
            return torch.cat([self._values(self._pair(self.rank, to), length) for to, length in enumerate(row)])
        length = (
            problem.counts[self.rank] if problem.collective == "all_gather" else problem.count or sum(problem.counts)
        )
        return self._values(self._weights[self.rank], length)

    @cached_property
    def _expected(self) -> Tensor | None:
        """The result in fp64; None on ranks that get none."""
        problem, root = self.problem, self.settings.root
        if problem.collective == "all_to_all":
            column = [row[self.rank] for row in problem.matrix]
            return torch.cat(
                [self._values(self._pair(s, self.rank), length) for s, length in enumerate(column)]
            ).double()
        if problem.collective == "all_gather":
            return torch.cat([self._values(w, n) for w, n in zip(self._weights, problem.counts)]).double()
        if problem.collective == "broadcast":
            return self._values(self._weights[root], problem.count).double()
        if problem.collective == "reduce" and self.rank != root:
            return None
        total = self._reduced(problem.count or sum(problem.counts))
        if problem.collective == "reduce_scatter":
            start = sum(problem.counts[: self.rank])
            return total[start : start + problem.counts[self.rank]]
        return total

    def _reduced(self, length: int) -> Tensor:
        """What `op` makes of all ranks' values, in fp64."""
        a, b = (digits.double() for digits in _digits(length))
        if self.settings.op == "max":
            return a + b * max(self._weights)
        if self.settings.op == "min":
            return a + b * min(self._weights)
        total = a * self.size + b * sum(self._weights)
        return total / self.size if self.settings.op == "avg" else total

    def _values(self, weight: int, length: int) -> Tensor:
        a, b = _digits(length)
        return a + weight * b

    def _pair(self, source: int, target: int) -> int:
        """A weight for the block from `source` to `target`: moved, not added, so that only the dtype's range limits it."""
        return (source + 7 * target) % (len(set(self._weights)) + 1)


def weights(size: int, exact: int) -> list[int]:
    """w(r) for each rank: as many different ones as keep the sum over all ranks within `exact`.

    Raises ValueError when not even equal values add up exactly.
    """
    for different in range(min(size, _MOST_WEIGHTS), 0, -1):
        found = [rank % different for rank in range(size)]
        if _DIGIT * (size + sum(found)) <= exact:
            return found
    raise ValueError(
        f"The sum over {size} ranks cannot be checked: this dtype is exact up to {exact}. Use --no-check or fp32."
    )


def _digits(length: int) -> tuple[Tensor, Tensor]:
    mixed = (torch.arange(length, dtype=torch.int64) * 2654435761) >> 13
    return mixed & _DIGIT, (mixed >> 2) & _DIGIT


def _problem(collective: str, topology: Topology, elements: int, settings: Settings) -> Problem:
    size = topology.size
    each = max(1, elements // size)
    if collective in ("all_gather", "reduce_scatter"):
        named: Collective = "all_gather" if collective == "all_gather" else "reduce_scatter"
        return Problem(named, size, counts=(each,) * size)
    if collective == "all_to_all":
        return Problem("all_to_all", size, matrix=((each,) * size,) * size)
    if collective == "all_to_all_v":
        return Problem("all_to_all", size, matrix=_skewed(topology, each, settings.skew))
    if collective == "broadcast":
        return Problem("broadcast", size, max(1, elements), settings.root)
    if collective == "reduce":
        return Problem("reduce", size, max(1, elements), settings.root)
    return Problem("all_reduce", size, max(1, elements))


def _skewed(topology: Topology, each: int, skew: float) -> tuple[tuple[int, ...], ...]:
    """Rows by sender: the first rank of a host holds `skew` of what the host sends, to all ranks alike."""
    rows = []
    for rank, host in enumerate(topology.host_of):
        ranks = len(topology.hosts[host])
        first = topology.local_rank[rank] == 0
        share = 1.0 if ranks == 1 else skew if first else (1 - skew) / (ranks - 1)
        rows.append((round(each * ranks * share),) * topology.size)
    return tuple(rows)
