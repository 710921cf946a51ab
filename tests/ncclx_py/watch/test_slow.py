"""Slow ranks and links are found in traces in which nothing is stuck; clocks that differ, and jitter, fool nobody."""

from __future__ import annotations

import json
import random
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))

from synthetic import Call, Cluster, Job, Step, Work

from ncclx_py.watch.reading import read_job
from ncclx_py.watch.verdict import Verdict, judge

pytestmark = pytest.mark.unit


def trained(cluster: Cluster, work: dict[int, float], seed: int, steps: int = 40) -> list[list[Step]]:
    """Steps of 50 ms, or of `work` seconds, with 10 % of jitter, and a collective after each."""
    chance = random.Random(seed)
    return [
        [
            part
            for _ in range(steps)
            for part in (Work(work.get(rank, 0.05) * chance.uniform(0.95, 1.05)), Call("world", elements=100_000))
        ]
        for rank in range(cluster.size)
    ]


def judged(folder: Path, job: Job) -> Verdict:
    job.dump(folder, job.run() + 1, "demand")
    return judge(read_job(folder))


@pytest.mark.parametrize("seed", range(6))
def test_a_slow_rank_is_named_whatever_the_clocks_say(seed: int, tmp_path: Path) -> None:
    """20 % slower than the rest; the clocks of the hosts differ by seconds, a hundred times more than what is looked for."""
    chance = random.Random(seed)
    cluster = Cluster(4, 2, {"world": list(range(8))})
    slow = chance.randrange(8)
    job = Job(cluster, trained(cluster, {slow: 0.062}, seed), seed, skew=[chance.uniform(-9, 9) for _ in range(4)])
    verdict = judged(tmp_path, job)
    assert (verdict.word, verdict.cause, verdict.ranks) == ("SOME_RANKS_FISHY", "slow_rank", [slow]), verdict
    assert verdict.call_site == "/app/train.py:20 step"


def test_ranks_that_are_last_by_turns_are_not_slow(tmp_path: Path) -> None:
    cluster = Cluster(2, 2, {"world": list(range(4))})
    made: list[list[Step]] = [[] for _ in range(4)]
    for step in range(60):
        for rank, program in enumerate(made):
            program += [Work(0.08 if rank == step % 4 else 0.05), Call("world")]
    assert judged(tmp_path, Job(cluster, made)).word == "ALL_GOOD"


def test_a_pause_that_happened_once_is_not_a_slow_rank(tmp_path: Path) -> None:
    cluster = Cluster(2, 2, {"world": list(range(4))})
    made = trained(cluster, {}, 1)
    made[1].insert(20, Work(3.0))
    assert judged(tmp_path, Job(cluster, made)).word == "ALL_GOOD"


def with_links(folder: Path, rates: dict[tuple[int, int], float], cluster: Cluster, seed: int) -> None:
    """Adds to each dump what the kernel would count of its connections, at these bytes per second by pair of hosts."""
    chance = random.Random(seed)
    for rank in range(cluster.size):
        path = folder / f"trace-rank-{rank}.jsonl"
        head, rest = path.read_text().split("\n", 1)
        header = json.loads(head)
        header["links"] = []
        for peer in range(cluster.size):
            mine, other = cluster.host(rank), cluster.host(peer)
            if mine != other:
                rate = rates.get((mine, other), 1e8) * chance.uniform(0.9, 1.1)
                busy = chance.randrange(10**6, 10**7)
                header["links"].append(
                    {"peer": peer, "bytes": int(rate * busy / 1e6), "busy_us": busy + 5000, "limited_us": 5000}
                )
        path.write_text(json.dumps(header) + "\n" + rest)


@pytest.mark.parametrize("what", ["link", "host", "none"])
@pytest.mark.parametrize("seed", range(4))
def test_a_slow_link_is_named_by_what_its_connections_carried(what: str, seed: int, tmp_path: Path) -> None:
    chance = random.Random(seed)
    cluster = Cluster(4, 2, {"world": list(range(8))})
    one = chance.randrange(4)
    other = (one + 1) % 4
    rates = {"link": {(one, other): 5e7}, "none": {}, "host": {(one, peer): 5e7 for peer in range(4) if peer != one}}[
        what
    ]
    if what == "host":
        rates |= {(peer, one): 5e7 for peer in range(4) if peer != one}
    job = Job(cluster, trained(cluster, {}, seed), seed)
    job.dump(tmp_path, job.run() + 1)
    with_links(tmp_path, rates, cluster, seed)
    verdict = judge(read_job(tmp_path))
    if what == "none":
        assert verdict.word == "ALL_GOOD"
        return
    assert (verdict.word, verdict.cause) == ("NETWORK_PERF_SLOWNESS", "slow_link"), verdict
    assert f"host{one}" in verdict.summary
    if what == "host":
        assert verdict.ranks == [2 * one, 2 * one + 1]
    else:
        assert f"host{one} → host{other}" in verdict.summary
        assert verdict.ranks == sorted(rank for rank in range(8) if cluster.host(rank) in (one, other))


def test_without_counters_groups_that_are_alike_are_compared(tmp_path: Path) -> None:
    cluster = Cluster(2, 4, {f"rail{rail}": [rail, 4 + rail] for rail in range(4)})
    made: list[list[Step]] = [
        [part for _ in range(30) for part in (Work(0.05), Call(f"rail{rank % 4}", elements=10**6))] for rank in range(8)
    ]
    job = Job(cluster, made, transfer={**dict.fromkeys(cluster.groups, 0.02), "rail2": 0.05}, skew=[-3.0, 3.0])
    verdict = judged(tmp_path, job)
    assert (verdict.cause, verdict.ranks) == ("slow_link", [2, 6]), verdict
