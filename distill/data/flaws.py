"""References that show how a mistake is taken back: a flawed span, the marker on a line of its own, the right lines.

The reference ``0 8 5 2 0 #0`` (one per line) with a wrong third line, carried on for one more line::

    0 8 7 4 ! 5 2 0 #0        the marker takes back everything from the first wrong line on

A model that never saw the marker cannot know what it means: taught to write it after its own mistakes (MOTAB with
``keep_flawed``), it imitates the mistakes too. With ``data.flawed`` above 0 some of the training references contain such a
span; test references never do. :func:`standing` reads a response the same way, so a mistake that was taken back does not
count against it.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence

from distill.data.config import FlawsConfig


class Flaws:
    """Puts flawed spans into some of the references of one split; which ones follows from (seed, index) alone."""

    def __init__(self, config: FlawsConfig) -> None:
        self.config = config

    def reference(
        self, index: int, lines: Sequence[str], places: range, redo: Callable[[int, int], Sequence[str]]
    ) -> list[str]:
        """``lines`` as they are, or with a flawed span that starts at one of ``places``.

        ``redo(place, draw)`` gives the lines from ``place`` on as they follow from a wrong one there; ``draw`` ≥ 0 chooses it.
        """
        config = self.config
        key = f"flaws/{config.name}/{config.seed}/{index}".encode()
        pool = int.from_bytes(hashlib.shake_256(key).digest(48), "big")
        pool, share = divmod(pool, 2**53)
        if share >= config.flawed * 2**53:
            return list(lines)
        pool, which = divmod(pool, len(places))
        place = places[which]
        pool, more = divmod(pool, config.max_carried - config.min_carried + 1)
        wrong = redo(place, pool)[: 1 + config.min_carried + more]
        return [*lines[:place], *wrong, config.marker, *lines[place:]]


def standing(lines: Sequence[str], marker: str, right: Sequence[str]) -> list[str]:
    """The lines of a response that stand once every marker has taken back what it can: all from the first wrong line on.

    ``right`` are the lines of a flawless response. A marker behind right lines takes nothing back.
    """
    kept: list[str] = []
    for line in lines:
        if line == marker:
            same = next(
                (n for n, pair in enumerate(zip(kept, right)) if pair[0] != pair[1]), min(len(kept), len(right))
            )
            del kept[same:]
        else:
            kept.append(line)
    return kept
