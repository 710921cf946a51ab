"""Calls of libraries that must be asked: ended in order, noted at the next look, and late ones found."""

from __future__ import annotations

import pytest

from ncclx_py.errors import Call
from ncclx_py.runtime.pending import Unended

pytestmark = pytest.mark.unit


class Work:
    done = False

    def is_completed(self) -> bool:
        return self.done


def test_calls_end_when_their_works_have_in_order() -> None:
    unended, works = Unended(), [Work(), Work(), Work()]
    calls = [Call("all_reduce", "g", 0, 2, sequence) for sequence in range(2)]
    calls[1].parts = 2
    for call, work in zip([calls[0], calls[1], calls[1]], works):
        unended.add(call, work)
    assert all(call.started_ns and not call.finished_ns for call in calls)
    works[1].done = True
    unended.look()
    assert not calls[1].finished_ns  # the one before has not ended
    assert unended.older_than(0) is calls[0]
    assert unended.older_than(60) is None
    works[0].done = True
    unended.look()
    assert calls[0].finished_ns
    assert not calls[1].finished_ns  # one of its two works has
    works[2].done = True
    assert unended.older_than(0) is None
    unended.look()
    assert calls[1].finished_ns
