"""``ncclx probe`` and ``ncclx tune`` on real ranks, two to a host that they believe to be their own."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch.distributed as dist
from harness import Rank, RankPool

from ncclx_py.bench import tuning
from ncclx_py.bench.probing import Measurement, Probed, ping_plan, probe, stream_plan
from ncclx_py.bench.tuning import Options, forced, tune, worth_trying
from ncclx_py.commands.tune import as_text, merged
from ncclx_py.plans.plan import Plan, Problem
from ncclx_py.plans.problems import uniform
from ncclx_py.plans.replay import replay
from ncclx_py.plans.rules import forced_rules
from ncclx_py.plans.spec_file import place
from ncclx_py.plans.table import Row, Table, signature
from ncclx_py.plans.topology import DEFAULT_INTER, Link, Topology
from ncclx_py.plans.tuner import Tuner

HOSTS = Topology((0, 0, 1, 1))


@pytest.fixture(scope="module")
def pool() -> Iterator[RankPool]:
    with RankPool(4) as ranks:
        yield ranks


def _join(me: Rank, port: int) -> None:
    if dist.is_initialized():
        dist.destroy_process_group()
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), NCCLX_HOST_ID=f"host-{me.rank // 2}")


def free_port() -> int:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        return int(taken.getsockname()[1])


def probes(me: Rank, port: int) -> tuple[Probed, list[str]]:
    _join(me, port)
    said: list[str] = []
    return probe(2, 60.0, said.append), said


@pytest.mark.dist
def test_probe_measures_every_link_and_all_ranks_agree(pool: RankPool) -> None:
    answers = pool.run(probes, free_port(), deadline=120)
    found = answers[0][0]
    assert [answer[0] for answer in answers] == [found] * 4
    assert found.topology().host_of == HOSTS.host_of
    assert found.intra is not None
    assert found.inter is not None
    assert len(found.nics) == 2
    assert len(found.measurements) == 5  # α and bandwidth inside, α between, and two NICs
    for one in found.measurements:
        assert 0 < one.least <= one.median <= one.greatest
    assert found.inter.alpha < 1
    assert found.intra.bandwidth > 1e6
    assert answers[0][1]
    assert not answers[3][1]  # only rank 0 speaks


def tunes(me: Rank, port: int, spoil: str) -> tuple[Topology, list[Any], str]:
    _join(me, port)
    os.environ["NCCLX_ALGO"] = "all_reduce=double_tree"  # must not matter, and must still be there afterwards
    honest = tuning.Case.wrong

    def wrong(case: tuning.Case, tensors: Any) -> int:
        """Finds an error on rank 2 where the algorithm `spoil` ran."""
        return honest(case, tensors) + (5 if me.rank == 2 and running[-1].startswith(spoil) else 0)

    running: list[str] = ["nothing"]
    group = tuning._Collective._group

    def noting(self: Any, one: Any) -> Any:
        running.append(one.algorithm)
        return group(self, one)

    try:
        if spoil:
            tuning.Case.wrong, tuning._Collective._group = wrong, noting  # type: ignore[method-assign]
        topology, trials = tune(("all_reduce",), (1 << 12,), Options(iters=1, hopeless=1000), lambda _: None)
    finally:
        tuning.Case.wrong, tuning._Collective._group = honest, group  # type: ignore[method-assign]
    return topology, trials, os.environ.pop("NCCLX_ALGO")


@pytest.mark.dist
def test_tune_measures_and_checks_each_algorithm(pool: RankPool) -> None:
    answers = pool.run(tunes, free_port(), "", deadline=120)
    topology, trials, left = answers[0]
    assert left == "all_reduce=double_tree"
    assert topology == HOSTS
    rows = {trial.candidate.algorithm: trial.row for trial in trials}
    assert {name for name, row in rows.items() if row} == {
        "leader", "hierarchical", "halving_doubling", "ring", "direct", "double_tree",
    }  # fmt: skip
    assert all(row is None or (row.correct and 0 < row.median_s < 60) for row in rows.values())
    assert rows["ordered"] is None
    fastest = min((row for row in rows.values() if row), key=lambda row: row.median_s)
    tuner = Tuner(topology, Table(tuple(row for row in rows.values() if row)))
    choice = tuner.choose(uniform("all_reduce", 4, 1 << 12, 4), 4)
    assert choice.predicted_s == pytest.approx(fastest.median_s, rel=0.01)
    text = as_text(trials, tuner)
    assert f"→ {choice.algorithm}" in text
    assert "× the model" in text


@pytest.mark.dist
def test_tune_marks_what_is_wrong_on_any_rank(pool: RankPool) -> None:
    for topology, trials, _ in pool.run(tunes, free_port(), "leader", deadline=120):
        notes = {trial.candidate.algorithm: trial.note for trial in trials}
        assert notes["leader"] == "rank 2: 5 wrong elements"
        table = Table(tuple(trial.row for trial in trials if trial.row is not None), "t.json")
        assert [row.algorithm for row in table.rows if not row.correct] == ["leader"]
        choice = Tuner(topology, table).choose(uniform("all_reduce", 4, 1 << 12, 4), 4)
        assert choice.algorithm != "leader"
        assert "leader gave wrong results at 4 KiB" in choice.reason


@pytest.mark.unit
def test_what_is_worth_trying() -> None:
    topology = Topology(place([4, 4], "block"))
    tried, left_out = worth_trying(topology, uniform("all_reduce", 8, 16 << 20, 4), 4, 2.0)
    best = min(one.predicted_s or 0 for one in tried)
    assert all((one.predicted_s or 0) <= 2 * best for one in tried)
    reasons = {one.algorithm: one.why_not for one in left_out}
    assert reasons["ordered"] == "only where results shall be deterministic"
    assert reasons["direct"].startswith("predicted ")
    assert all(one.why_not for one in left_out)
    for one in tried:  # what forces it is what the tuner would take
        rule = forced_rules(forced("all_reduce", one))[0]
        assert (rule.algorithm, dict(rule.parameters)) == (one.algorithm, one.parameters)


@pytest.mark.unit
def test_new_rows_replace_old_ones() -> None:
    old = Row("all_reduce", 8, signature(HOSTS), "pipelined", {"chunks": 2}, 1.0, True)
    new, other = replace(old, median_s=2.0), replace(old, parameters={"chunks": 4})
    assert merged([old, other], [new]) == (new, other)


@pytest.mark.unit
def test_the_plans_of_a_probe_take_what_the_links_take() -> None:
    """Played on links of known α and bandwidth, the two kinds of plans give these back."""
    topology = Topology(HOSTS.host_of, 1, Link(4e-6, 1e9), Link(40e-6, 1e8))
    problem = Problem("all_reduce", 4, count=4000)
    pings = Plan(problem, "ping", tuple(ping_plan(rank, 1, 3) for rank in range(4)))
    assert replay(pings, topology, 1).seconds / 100 == pytest.approx(40e-6, rel=0.01)
    length = 1 << 22
    pairs = {0: 2, 2: 0}
    stream = Plan(problem, "stream", tuple(stream_plan(rank, pairs, length) for rank in range(4)))
    assert length / replay(stream, topology, 1).seconds == pytest.approx(1e8, rel=0.01)


@pytest.mark.unit
def test_unequal_nics_are_kept_and_equal_ones_are_not() -> None:
    even = Probed((0, 1), 1, None, Link(1e-5, 1e9), ((1e9,), (1.05e9,)), (Measurement("x", 1, 1, 1),))
    assert even.topology().nics == ()
    assert replace(even, nics=((1e9,), (5e8,))).topology().nics == ((1e9,), (5e8,))
    assert Probed((0, 0), 1, Link(1e-6, 1e10), None).topology().inter == DEFAULT_INTER
