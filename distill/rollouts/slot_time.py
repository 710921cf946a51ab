"""How much of a rollout engine's capacity stands idle: the bubble ratio.

A *tick* is one batched decode step. An engine that holds ``slots`` rows could decode ``slots`` tokens in it, and decodes as
many as rows are in flight. For one update, over all ranks:

    total  = Σ_ranks slots_r · max_ranks ticks_r        a rank that is through waits for the slowest
    busy   = Σ_ranks Σ_ticks rows in flight             = tokens decoded
    bubble = 1 − busy / total                           idle slot-time over total slot-time, in [0, 1)

``slots_r`` is what the engine opened for the update: ``rollout.slots``, or fewer where fewer samples are at hand (plain: the
rank's share of the batch; sorted: its pool). Prefill is in no tick. Ticks rather than seconds: the figure does not
depend on the machine and comes out the same after a resume. It is taken alike with and without a schedule.

A bubble of 0 says nothing of decoded tokens that were thrown away: they count as busy, and ``dropped`` says how many.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from distill.wire import travels


@travels
@dataclass(slots=True)
class SlotTime:
    """One rank's slot-time in one update; ``+=`` adds what another call of the same engine took."""

    slots: int = 0  # the most that a call opened
    ticks: int = 0
    busy: int = 0  # rows in flight, summed over ticks: tokens decoded
    dropped: int = 0  # tokens thrown away in this update, whenever decoded
    requeued: int = 0  # prompts that start anew because of it

    def tick(self, rows: int) -> None:
        """Count one decode step of ``rows`` rows."""
        self.ticks += 1
        self.busy += rows

    def __iadd__(self, other: SlotTime) -> SlotTime:
        self.slots = max(self.slots, other.slots)
        for name in ("ticks", "busy", "dropped", "requeued"):
            setattr(self, name, getattr(self, name) + getattr(other, name))
        return self


def bubble_ratio(ranks: Sequence[SlotTime]) -> float:
    """Idle slot-time over total slot-time of one update, see the module; 0 where nothing was decoded."""
    longest = max((rank.ticks for rank in ranks), default=0)
    whole = sum(rank.slots for rank in ranks) * longest
    return 1.0 - sum(rank.busy for rank in ranks) / whole if whole else 0.0
