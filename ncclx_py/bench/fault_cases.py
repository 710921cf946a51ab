"""The cases of the fault matrix: kinds of faults × placements, and what a right verdict on each is.

cases = make_cases(("kill", "stop"), placements=10, shape=Shape((3, 3)), seed=1)
cases[0].expects(verdict)            # the right ranks, and the right cause
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from ncclx_py.faults.spec import CALL
from ncclx_py.launch.shape import Shape

STEPS = range(3, 8)  # where faults strike, of the steps that a job takes
GROUPS = ("world", "host", "half")
WARM, CALLS = 3, 4  # collectives of a rank before the first step, and in each
HARMFUL = (1, 3, 4)  # those of a step that cannot change places with the next one without stopping the job
LATE = 8.0  # seconds: a delay that outlasts the deadline and the verdict

# The causes that are right for each kind. A rank that leaves out a collective and one that calls it too late are, at the moment
# of the dump, in the same place: in a later call that the others have not come to. Where that call is on another group the
# two wait for each other in a circle. All three words are true of both. Two hosts cannot tell whose end of a link is dead.
CAUSES = {
    "kill": ("crashed",),
    "stop": ("stopped",),
    "delay": ("outside",),
    "skip": ("skipped", "order", "cycle"),
    "wrong-size": ("size",),
    "wrong-order": ("order", "skipped", "cycle"),
    "nan": ("nan",),
    "drop-link": ("link", "partition", "host", "host_silent"),
    "halve-rate": ("slow_link",),
}
KINDS = tuple(kind for kind in CAUSES if kind != "halve-rate")  # those that stop a job


@dataclass(frozen=True)
class Case:
    """One fault; `host` is that of a link, else that of the rank."""

    name: str
    kind: str
    fault: str
    rank: int | None
    host: int

    def expects(self, verdict: dict[str, Any], host_of: Sequence[int]) -> tuple[bool, bool]:
        """Whether a verdict names the right ranks, and the right cause. A link is right when a rank at its end is named."""
        ranks = list(verdict["ranks"])
        if self.rank is None:
            right = any(host_of[rank] == self.host for rank in ranks)
        else:
            right = ranks == [self.rank]
        return right, verdict["cause"] in CAUSES[self.kind]


def make_cases(kinds: Sequence[str], placements: int, shape: Shape, seed: int) -> list[Case]:
    """`placements` cases of each kind, spread over ranks, hosts, steps and groups; equal for equal seeds."""
    cases = []
    for kind in kinds:
        draw = random.Random(f"{seed}/{kind}")
        ranks = [*range(shape.size)] * (placements // shape.size + 1)
        draw.shuffle(ranks)
        for number in range(placements):
            step, rank = draw.choice(STEPS), ranks[number]
            group = GROUPS[number % len(GROUPS)]
            if kind in ("drop-link", "halve-rate"):
                host = number % shape.hosts
                fault = f"{kind}:host={host},step={step}"
                cases.append(Case(f"{kind}-{number}", kind, fault, None, host))
                continue
            fault = f"{kind}:rank={rank},step={step}"
            if kind == "delay":
                fault += f",for={LATE:g}"
            elif kind == "wrong-order":
                call = WARM + CALLS * (step - 1) + HARMFUL[number % len(HARMFUL)]
                fault = f"{kind}:rank={rank},call={call}"
            elif kind in CALL:
                fault += f",group={group}"
            cases.append(Case(f"{kind}-{number}", kind, fault, rank, shape.host_of[rank]))
    return cases
