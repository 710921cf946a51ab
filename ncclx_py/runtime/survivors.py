"""Who is left of a group that failed: an agreement over the group's store, which needs no group.

Each rank that is left says so. When all others have said so too, are known to be gone, or have had their time, a rank
proposes those that have; the first proposal that reaches the store is the decision, for all.
"""

from __future__ import annotations

import json
import time
from typing import Any

from ncclx_py.errors import CollectiveError

_POLL = 0.05  # seconds


def agree_on_survivors(group: Any, seconds: float) -> list[int]:
    """See ``ncclx_py.survivors``. `group` is a `GroupBase`."""
    mine, ranks, store = group.rank(), group.global_ranks, group.get_group_store()
    try:
        present = _gather(store, mine, group, time.monotonic() + seconds)
        decided = json.loads(store.compare_set("survivors/decision", "", json.dumps(sorted(present))))
    except RuntimeError as error:  # c10d's store errors are
        raise CollectiveError(
            f"Rank {ranks[mine]}: the store of group {group.getGroupName()!r} does not answer ({error}), so the survivors "
            "cannot agree: start the job again, with a store that outlives a rank, like torchrun's."
        ) from error
    if mine not in decided:
        raise CollectiveError(
            f"Rank {ranks[mine]} came too late: the survivors of group {group.getGroupName()!r}, "
            f"{[ranks[rank] for rank in decided]}, have gone on without it. Leave, and join them anew."
        )
    return [ranks[rank] for rank in decided]


def _gather(store: Any, mine: int, group: Any, until: float) -> set[int]:
    """The group ranks that have come, as soon as nobody else can come any more or the time is up."""
    store.set(f"survivors/{mine}", "here")
    place = {rank: number for number, rank in enumerate(group.global_ranks)}
    while True:
        present = {rank for rank in place.values() if store.check([f"survivors/{rank}"])}
        gone = {place[rank] for rank, state in group.peers().items() if state == "gone"}
        if len(present | gone) == len(place) or time.monotonic() > until or store.check(["survivors/decision"]):
            return present
        time.sleep(_POLL)
