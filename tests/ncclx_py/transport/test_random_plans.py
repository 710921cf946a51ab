"""Plans nobody would write: random messages on random lanes, between overlapping spans, run by real processes, against
the same steps carried out one after the other on plain tensors."""

from __future__ import annotations

import random
import time
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from harness import Rank, RankPool, load
from torch import Tensor

from ncclx_py.plans.plan import Program, RankPlan, Span

cases = load(Path(__file__).with_name("fabric_cases.py"), "fabric_cases")

RANKS = 4
HOSTS = [(0, 0, 0, 0), (0, 0, 1, 1), (0, 1, 0, 2)]
LENGTH = 4000  # elements of each buffer
LANES = 5


class Move(NamedTuple):
    """A message from `sender` to `receiver`, or, where they are equal, a local step."""

    sender: int
    receiver: int
    source: Span
    target: Span
    reduces: bool
    lane: int
    other_lane: int  # of the receiver; equal to `lane` for messages


def moves(seed: int, count: int) -> list[Move]:
    rng = random.Random(seed)
    found = [
        Move(rank, rank, Span("data", 0, LENGTH), Span("scratch", 0, LENGTH), False, 0, 0) for rank in range(RANKS)
    ]
    for _ in range(count):
        sender, receiver = rng.randrange(RANKS), rng.randrange(RANKS)
        length = rng.choice([0, 1, 7, 400, rng.randrange(300), rng.randrange(LENGTH // 2)])
        source, target = (span(rng, length) for _ in range(2))
        if sender == receiver and source.buffer == target.buffer:
            target = Span("scratch" if source.buffer == "data" else "data", target.start, target.stop)
        found.append(Move(sender, receiver, source, target, rng.random() < 0.5, rng.randrange(LANES), 0))
    return found


def span(rng: random.Random, length: int) -> Span:
    """Anywhere, but half of the time where others of this length lie, too: the same span is sent again and again."""
    start = rng.randrange(LENGTH - length + 1)
    if rng.random() < 0.5:
        start = (LENGTH - length) // 2
    return Span(rng.choice(["data", "scratch"]), start, start + length)


def plan(rank: int, sequence: list[Move]) -> RankPlan:
    program = Program(rank)
    for move in sequence:
        if rank == move.sender == move.receiver:
            if move.reduces:
                program.reduce(move.target, src=move.source, lane=move.lane)
            else:
                program.copy(move.source, move.target, lane=move.lane)
        elif rank == move.sender:
            program.send(move.source, move.receiver, lane=move.lane)
        elif rank == move.receiver:
            act = program.reduce if move.reduces else program.recv
            act(move.target, move.sender, lane=move.lane)
    return program.finish(LENGTH)


def expected(sequence: list[Move], inputs: list[Tensor]) -> list[Tensor]:
    memory = [{"data": tensor.clone(), "scratch": torch.zeros(LENGTH, dtype=tensor.dtype)} for tensor in inputs]
    for move in sequence:
        message = memory[move.sender][move.source.buffer][move.source.start : move.source.stop].clone()
        target = memory[move.receiver][move.target.buffer][move.target.start : move.target.stop]
        target.copy_(target + message if move.reduces else message)
    return [one["data"] for one in memory]


def run_random(me: Rank, hosts: tuple[int, ...], seeds: list[int], dtype: torch.dtype, nap: float) -> None:
    node = cases.node(me, hosts)
    rng = random.Random(me.rank)
    for seed in seeds:
        sequence = moves(seed, 60)
        inputs = [cases.values(rank, LENGTH, dtype, seed) for rank in range(RANKS)]
        data = inputs[me.rank].clone()
        if (seed + me.rank) % 3 == 0:
            data = node.fabric.arena.allocate((LENGTH,), dtype).copy_(data)
        time.sleep(rng.random() * nap)
        node.run(plan(me.rank, sequence), {"data": data}, "SUM")
        result = data.clone()
        data.fill_(55)  # whoever still reads it gets this
        assert torch.equal(result, expected(sequence, inputs)[me.rank]), f"seed {seed}, rank {me.rank}"


@pytest.mark.dist
@pytest.mark.parametrize("hosts", HOSTS)
def test_random_plans(pool: RankPool, hosts: tuple[int, ...]) -> None:
    cases.run(pool, hosts, run_random, list(range(30)), torch.int64, 0.0)


@pytest.mark.dist
def test_random_plans_on_ranks_that_are_late(pool: RankPool) -> None:
    cases.run(pool, HOSTS[0], run_random, list(range(100, 120)), torch.int32, 0.02)
    cases.run(pool, HOSTS[1], run_random, list(range(200, 220)), torch.int8, 0.02)


def many_messages(me: Rank, hosts: tuple[int, ...], count: int) -> None:
    """More messages than a ring holds, before the receiver takes the first: it waits for the last of them."""
    node = cases.node(me, hosts)
    program = Program(me.rank)
    if me.rank == 0:
        for at in range(count):
            program.send(Span("data", at, at + 1), 1)
        program.send(Span("data", 0, 0), 1, lane=1)
    elif me.rank == 1:
        program.recv(Span("data", 0, 0), 0, lane=1)
        for at in range(count):
            program.recv(Span("data", at, at + 1), 0)
    steps = program.finish().steps
    if me.rank == 1:
        steps = (steps[0], *(replace(step, deps=(0,)) for step in steps[1:]))
    data = torch.arange(count, dtype=torch.int32) * (me.rank == 0)
    node.run(RankPlan(me.rank, steps), {"data": data})
    assert me.rank != 1 or torch.equal(data, torch.arange(count, dtype=torch.int32))


@pytest.mark.dist
@pytest.mark.parametrize("hosts", HOSTS)
def test_more_messages_than_the_ring_holds_block_nobody(pool: RankPool, hosts: tuple[int, ...]) -> None:
    cases.run(pool, hosts, many_messages, 300)
