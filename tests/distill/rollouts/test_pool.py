"""The controller of sorted rollouts against random lengths, with a decoder of its own: every prompt enters one update, in time."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from itertools import pairwise

import pytest

from distill.rollouts.pool import Pool, Response, Unit
from distill.rollouts.slot_time import SlotTime, bubble_ratio

pytestmark = pytest.mark.unit

Supply = Callable[[int], list[Unit]]


class Stream:
    """Units of ``size`` samples, numbered from 0, ``count`` in all."""

    def __init__(self, count: int, size: int) -> None:
        self.count, self.size, self.entered = count, size, 0
        self.cycles: list[range] = []

    def __call__(self, wanted: int) -> list[Unit]:
        numbers = range(self.entered, min(self.entered + wanted, self.count))
        self.entered = numbers.stop
        self.cycles += [numbers] if numbers else []
        return [Unit(n, [Response(n * self.size + i, [1], 7) for i in range(self.size)]) for n in numbers]


def decode(pool: Pool, slots: int, lengths: list[int], needed: int, version: int, more: Supply) -> list[Unit]:
    """One update in the most literal way: a token per tick and row, token t of a sample is t, its logprob names the writer."""
    pool.begin(version)
    while wanted := pool.missing(needed):
        units = more(wanted)
        pool.fill(units)
        if len(units) < wanted:
            break
    waiting = pool.waiting(needed)
    rows: list[tuple[Response, list[int], list[float]]] = []
    while not pool.ready(needed):
        while waiting and len(rows) < slots:
            response = waiting.pop(0)
            rows.append((response, list(response.ids), list(response.logprobs)))
        assert rows, "nothing left to decode and not ready: a deadlock"
        for response, ids, logprobs in list(rows):
            ids.append(len(ids))
            logprobs.append(-float(version))
            if len(ids) == lengths[response.sample]:
                response.write(ids, logprobs, version, "eos")
                rows = [row for row in rows if row[0] is not response]
    for response, ids, logprobs in rows:
        response.write(ids, logprobs, version, None)
    taken = pool.take(version, needed)
    pool.end()
    return taken


@pytest.mark.parametrize("unfinished", ["drop", "partial"])
@pytest.mark.parametrize("seed", range(40))
def test_every_prompt_enters_one_update_in_time(unfinished: str, seed: int) -> None:
    """Random pools, groups, needs (0 included) and lengths with a heavy tail; state goes through JSON before each update."""
    chance = random.Random(seed)
    staleness = chance.randrange(0 if unfinished == "drop" else 1, 6)
    over, slots, size = chance.choice([1.0, 1.5, 2.0, 4.0]), chance.randrange(1, 20), chance.choice([1, 1, 2, 5])
    needs = [chance.randrange(0, 7) for _ in range(25)]
    stream = Stream(sum(needs), size)
    lengths = [min(400, int(3 * chance.paretovariate(0.8))) for _ in range(sum(needs) * size)]
    pool = Pool(over, unfinished, staleness)
    taken_at: dict[int, int] = {}
    for version, needed in enumerate(needs):
        state = json.loads(json.dumps(pool.state()))
        pool = Pool(over, unfinished, staleness)
        pool.restore(state)
        taken = decode(pool, slots, lengths, needed, version, stream)
        assert len(taken) == needed
        for unit in taken:
            assert unit.number not in taken_at, "counted twice"
            taken_at[unit.number] = version
            assert [r.sample for r in unit.responses] == list(range(unit.number * size, unit.number * size + size))
            assert 0 <= unit.staleness(version) <= staleness
            for response in unit.responses:
                assert response.ids == list(range(lengths[response.sample])), "tokens were lost or repeated"
                writers = [version for version, count in response.spans for _ in range(count)]
                assert response.logprobs == [-float(writer) for writer in writers]
                assert writers == sorted(writers)
    assert sorted(taken_at) == list(range(sum(needs))), "a prompt was lost"
    assert not pool.cycles
    times = [[taken_at[number] for number in cycle] for cycle in stream.cycles]
    assert all(max(one) <= min(other) for one, other in pairwise(times)), "a later cycle overtook an earlier one"


def test_short_ones_first_and_the_longest_together() -> None:
    lengths = [9, 2, 7, 1, 8, 3, 6, 4, 5, 10, 11, 12]
    pool, stream = Pool(4.0, "partial", 9), Stream(12, 1)
    updates = [[u.number for u in decode(pool, 12, lengths, 3, version, stream)] for version in range(4)]
    assert [sorted(lengths[n] for n in update) for update in updates] == [[1, 2, 3], [4, 5, 6], [7, 8, 9], [10, 11, 12]]


def test_drop_forgets_what_is_unfinished_and_counts_it() -> None:
    pool = Pool(2.0, "drop", 0)
    pool.fill(Stream(4, 2)(4))
    for unit in pool.cycles[0]:
        unit.responses[0].write([1, 2, 3], [0.0] * 3, 0, "eos")
    for unit in pool.cycles[0][:2]:
        unit.responses[1].write([1], [0.0], 0, "stop")
    assert pool.ready(2)
    assert not pool.ready(3)
    assert [unit.number for unit in pool.take(0, 2)] == [0, 1]
    lost = pool.end()
    assert (lost.tokens, lost.units) == (6, 2), "a finished sample goes with its group"
    assert all(r.ids == [] and r.finish is None and r.known in (0, 3) for u in pool.cycles[0] for r in u.responses)
    assert [r.sample for r in pool.waiting(2)] == [5, 7, 4, 6], "what is known to be long comes last"


def test_what_cannot_wait_is_taken_before_what_is_shorter_and_the_rest_starts_anew() -> None:
    pool = Pool(3.0, "partial", 2)
    pool.fill(Stream(3, 1)(3))
    old, short, stuck = (unit.responses[0] for unit in pool.cycles[0])
    for version in (0, 1):
        stuck.write([5] * (version + 1), [0.0] * (version + 1), version, None)
    old.write([1] * 9, [0.0] * 9, 0, "eos")
    assert pool.begin(2).units == 0
    short.write([1], [0.0], 2, "eos")
    assert [unit.number for unit in pool.take(2, 1)] == [0]
    assert pool.end().units == 0
    lost = pool.begin(3)
    assert (lost.tokens, lost.units, stuck.known, stuck.spans) == (2, 1, 2, [])
    assert short.spans == [(2, 1)]


def test_bubble_counts_ranks_that_wait_for_the_slowest() -> None:
    """Two ranks of 4 slots; 3 ticks against 6: 48 slot-ticks, of which 10 + 15 decode."""
    assert bubble_ratio([SlotTime(4, 3, 10), SlotTime(4, 6, 15)]) == 1 - 25 / 48
    assert bubble_ratio([SlotTime()]) == 0.0
    meter = SlotTime(2)
    for rows in (2, 2, 1):
        meter.tick(rows)
    assert bubble_ratio([meter]) == 1 - 5 / 6
