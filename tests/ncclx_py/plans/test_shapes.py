"""Trees, cuts, and how many messages the algorithms for small tensors take."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest

from ncclx_py.plans.algorithms.layout import ALIGNMENT, cut, merged, split
from ncclx_py.plans.algorithms.registry import build
from ncclx_py.plans.algorithms.trees import Node, binomial, double_binary_trees
from ncclx_py.plans.plan import INTER, Problem, Span
from ncclx_py.plans.topology import Topology

pytestmark = pytest.mark.unit


def depth(tree: list[Node]) -> int:
    """The longest way to the root; also checks that parents and children agree and that all are reached."""
    for position, node in enumerate(tree):
        assert all(tree[child].parent == position for child in node.children)
        assert node.parent is None or position in tree[node.parent].children
    roots = [position for position, node in enumerate(tree) if node.parent is None]
    assert len(roots) == 1
    level, reached, longest = roots, 1, 0
    while level := [child for position in level for child in tree[position].children]:
        reached, longest = reached + len(level), longest + 1
    assert reached == len(tree)
    return longest


@pytest.mark.parametrize("size", [*range(1, 40), 64, 100, 127])
def test_trees_span_all_ranks_and_are_shallow(size: int) -> None:
    assert depth([binomial(size, position) for position in range(size)]) == max(size.bit_length() - 1, 0)
    pairs = [double_binary_trees(size, position) for position in range(size)]
    for tree in ([pair[0] for pair in pairs], [pair[1] for pair in pairs]):
        assert depth(tree) <= math.ceil(math.log2(size)) + 1
        assert max(len(node.children) for node in tree) <= 2
    for first, second in pairs:  # nobody is a full inner node of both
        assert min(len(first.children), len(second.children)) <= 1


@pytest.mark.parametrize("length", [0, 1, 5, 63, 64, 1000, 4096, 100_003])
def test_cuts_cover_the_span_and_are_aligned_where_there_is_room(length: int) -> None:
    for weights in ([1], [1, 1, 1], [1.0, 3.0], [0.5] * 7):
        pieces = cut(Span("data", 11, 11 + length), weights)
        assert [pieces[0].start, pieces[-1].stop] == [11, 11 + length]
        assert all(a.stop == b.start for a, b in pairwise(pieces))
        slack = ALIGNMENT if length >= 4 * ALIGNMENT * len(weights) else 1
        for piece, weight in zip(pieces, weights, strict=True):
            assert abs(piece.length - length * weight / sum(weights)) <= slack
        if slack > 1:
            assert all((piece.start - 11) % ALIGNMENT == 0 for piece in pieces)


def test_spans_that_follow_one_another_are_joined() -> None:
    spans = [Span("a", 0, 2), Span("a", 2, 2), Span("a", 2, 5), Span("b", 5, 6), Span("b", 7, 8)]
    assert merged(spans) == [Span("a", 0, 5), Span("b", 5, 6), Span("b", 7, 8)]
    assert sum(piece.length for piece in split(Span("a", 3, 20), 4)) == 17


@pytest.mark.parametrize(
    ("collective", "name", "messages"),
    [
        ("all_reduce", "ring", 14),
        ("all_reduce", "halving_doubling", 6),
        ("all_gather", "bruck", 3),
        ("all_gather", "doubling", 3),
        ("reduce_scatter", "halving", 3),
        ("all_to_all", "bruck", 3),
        ("all_to_all", "pairwise", 7),
    ],
)
def test_messages_per_rank(collective: str, name: str, messages: int) -> None:
    problem = Problem(collective, 8, count=640, counts=(80,) * 8, matrix=((80,) * 8,) * 8)
    plan = build(problem, Topology((0,) * 8), name)
    for rank_plan in plan.ranks:
        sends = [step for step in rank_plan.steps if step.op == "send"]
        wraps = collective == "all_gather" and name == "bruck"  # a round that passes the last rank takes two messages
        assert messages <= len(sends) <= (2 * messages if wraps else messages)


@pytest.mark.parametrize("hosts", [2, 3, 4, 5, 8])
def test_leaders_exchange_in_a_logarithmic_number_of_messages(hosts: int) -> None:
    ranks = Topology(tuple(rank // 3 for rank in range(3 * hosts)))
    plan = build(Problem("all_reduce", 3 * hosts, count=10), ranks, "leader")
    for rank_plan in plan.ranks:
        between = [step for step in rank_plan.steps if step.op == "send" and step.level == INTER]
        assert len(between) <= (math.ceil(math.log2(hosts)) if rank_plan.rank % 3 == 0 else 0)
