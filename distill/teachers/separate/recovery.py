"""After a teacher's rank is lost: the next bridge, among those who are left (``teacher.on_loss=continue``).

Students come here together at the end of the step that failed, teachers as soon as their tick failed. Who is left is agreed in the
job's store; what was under way on the old bridge is forgotten by both sides.
"""

from __future__ import annotations

import ncclx_py
from distill.progress import say
from distill.teachers.separate.bridge import Bridge, BridgeError, Seats
from ncclx_py.errors import CollectiveError


def next_bridge(bridge: Bridge) -> Bridge:
    """Builds it; every rank that is left calls it. Raises BridgeError where a student is lost, or no teacher is left."""
    seats = bridge.seats
    try:
        left = tuple(ncclx_py.survivors(bridge.group, bridge.timeout_s))
        bridge.abort()
        students = [rank for rank in left if rank in seats.ranks[: seats.students]]
        if len(students) < seats.students:
            raise BridgeError("a student rank is lost as well")
        if len(left) == len(students):
            raise BridgeError("no teacher rank is left")
        lost = [place for place, rank in enumerate(seats.ranks) if rank not in left]
        if not seats.teaches:
            say(f"teacher {seats.named(lost)} of this job {'is' if len(lost) == 1 else 'are'} lost; going on without")
        chairs = Seats(left, seats.students, left.index(seats.ranks[seats.me]))
        return Bridge(
            bridge.backend, bridge.store, chairs, False, bridge.timeout_s, bridge.device, bridge.generation + 1
        )
    except CollectiveError as error:
        raise BridgeError(str(error)) from error
