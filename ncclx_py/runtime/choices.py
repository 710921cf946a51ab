"""What a group decided: which algorithm carried which collective, why, and how often. Read by ``ncclx_py.explain``.

``NCCLX_LOG=1`` prints each decision once, on rank 0 of the group, when it is first taken.
"""

from __future__ import annotations

import sys
from collections import OrderedDict
from dataclasses import dataclass, field

from ncclx_py.units import format_size, format_time

_REMEMBERED = 1024  # decisions per group; the ones unused for longest are forgotten


@dataclass(slots=True)
class Decision:
    """One choice, and the number of calls that it has carried on this rank.

    `bytes` is the size as benchmarks count it (``plans.problems.payload``): the whole vector, or all blocks of a rank.
    `predicted_s` and `bound_s` are seconds, 0 where nothing was predicted.
    """

    collective: str
    bytes: int
    algorithm: str
    parameters: dict[str, int] = field(default_factory=dict)
    reason: str = ""
    predicted_s: float = 0.0
    bound_s: float = 0.0
    calls: int = 0

    def __str__(self) -> str:
        parameters = "".join(f" {name}={value}" for name, value in self.parameters.items())
        times = ""
        if self.predicted_s:
            times = f"; predicted {format_time(self.predicted_s)}, bound {format_time(self.bound_s)}"
        return f"{self.collective} of {format_size(self.bytes)}: {self.algorithm}{parameters} ({self.reason}{times})"


class Decisions:
    """The decisions of one group, in the order in which they were first taken."""

    def __init__(self, group: str, loud: bool) -> None:
        self._group = group
        self._loud = loud
        self._taken: OrderedDict[tuple[object, ...], Decision] = OrderedDict()

    def note(self, decision: Decision) -> Decision:
        """Remembers a decision, and returns the one that stands for it; its `calls` are the caller's to count."""
        key = (decision.collective, decision.bytes, decision.algorithm, *sorted(decision.parameters.items()))
        known = self._taken.get(key)
        if known is not None:
            return known
        self._taken[key] = decision
        if len(self._taken) > _REMEMBERED:
            self._taken.popitem(last=False)
        if self._loud:
            print(f"ncclx: group {self._group!r}: {decision}", file=sys.stderr, flush=True)
        return decision

    def all(self) -> list[Decision]:
        return list(self._taken.values())
