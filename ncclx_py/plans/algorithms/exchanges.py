"""Reduce-scatter and all-gather in place among the members of a list, the halves that algorithms are put together from.

Each function writes the steps of ``members[me]`` into a script. `lane` is the first of the lanes used: messages in
opposite directions get lanes of their own, so that waiting for a message never holds back the next one to be sent.
"""

from __future__ import annotations

from collections.abc import Sequence

from ncclx_py.plans.algorithms.layout import split
from ncclx_py.plans.algorithms.script import Script
from ncclx_py.plans.plan import Span

LANES = 3  # the most that one exchange uses


def ring_reduce_scatter(
    script: Script, members: Sequence[int], me: int, parts: Sequence[Span], lane: int = 0, chunk: int = 0
) -> None:
    """Leaves in ``parts[me]`` the combination of all members' ``parts[me]``; the other parts hold partial results."""
    size = len(members)
    after, before = members[(me + 1) % size], members[me - 1]
    for step in range(size - 1):
        script.send(parts[(me - 1 - step) % size], after, lane + ring_lane(me, size), chunk)
        script.reduce(parts[(me - 2 - step) % size], before, lane + ring_lane((me - 1) % size, size), chunk)


def ring_all_gather(
    script: Script, members: Sequence[int], me: int, parts: Sequence[Span], lane: int = 0, chunk: int = 0
) -> None:
    """Fills all parts, of which each member brings ``parts[me]``."""
    size = len(members)
    after, before = members[(me + 1) % size], members[me - 1]
    for step in range(size - 1):
        script.send(parts[(me - step) % size], after, lane + ring_lane(me, size), chunk)
        script.recv(parts[(me - 1 - step) % size], before, lane + ring_lane((me - 1) % size, size), chunk)


def ring_lane(sender: int, size: int) -> int:
    """Neighbours in the ring send on different lanes; an odd ring needs a third one."""
    return 2 if sender == size - 1 and size % 2 else sender % 2


def halving_rounds(size: int, me: int, span: Span) -> list[tuple[int, Span, Span]]:
    """(the other member, what I keep, what I give away) of each round among a power of two of members.

    Nearest members come first: they exchange the longest pieces, and next to each other means on one host.
    """
    rounds = []
    distance = 1
    while distance < size:
        low, high = split(span, 2)
        keep, give = (high, low) if me & distance else (low, high)
        rounds.append((me ^ distance, keep, give))
        span = keep
        distance *= 2
    return rounds


def halving(script: Script, members: Sequence[int], me: int, span: Span, lane: int = 0, chunk: int = 0) -> None:
    """Recursive halving: leaves all members' combination in the piece that the last of `halving_rounds` keeps."""
    for other, keep, give in halving_rounds(len(members), me, span):
        script.send(give, members[other], lane + (me > other), chunk)
        script.reduce(keep, members[other], lane + (other > me), chunk)


def doubling(script: Script, members: Sequence[int], me: int, span: Span, lane: int = 0, chunk: int = 0) -> None:
    """Recursive doubling: fills `span`, of which each member brings what `halving` left it with."""
    for other, keep, give in reversed(halving_rounds(len(members), me, span)):
        script.send(keep, members[other], lane + (me > other), chunk)
        script.recv(give, members[other], lane + (other > me), chunk)


def is_power_of_two(number: int) -> bool:
    return number & (number - 1) == 0
