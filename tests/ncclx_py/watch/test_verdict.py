"""Verdicts on imitated jobs: the fault that was put in is the oracle, in many random places, shapes of jobs and programs."""

from __future__ import annotations

import random
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))

from synthetic import Call, Cluster, End, Job, Message, Step, Wait, Work

from ncclx_py.watch.reading import read_job
from ncclx_py.watch.verdict import Verdict, judge

pytestmark = pytest.mark.unit

CLUSTERS = [
    Cluster(1, 4, {"world": [0, 1, 2, 3]}),
    Cluster(2, 3, {"world": list(range(6)), "left": [0, 1, 2], "right": [3, 4, 5]}),
    Cluster(2, 4, {"world": list(range(8)), **{f"tp{h}": [4 * h + r for r in range(4)] for h in range(2)},
                   **{f"dp{r}": [r, 4 + r] for r in range(4)}}),
    Cluster(4, 2, {"world": list(range(8)), **{f"tp{h}": [2 * h, 2 * h + 1] for h in range(4)},
                   **{f"dp{r}": [2 * h + r for h in range(4)] for r in range(2)}}),
]  # fmt: skip


def programs(cluster: Cluster, chance: random.Random, steps: int = 6, groups: tuple[str, ...] = ()) -> list[list[Step]]:
    """The same training step again and again: collectives of several sizes over several groups, with work between."""
    kinds = sorted({name.rstrip("0123456789") for name in groups or cluster.groups})
    pattern = [
        (
            chance.choice(kinds),
            Call(
                "",
                chance.choice(["all_reduce", "all_gather", "reduce_scatter", "broadcast"]),
                elements=1000 + 100 * place + chance.randrange(50),
                root=0,
                site=f"/app/train.py:{20 + place} step",
                is_async=chance.random() < 0.3,
            ),
        )
        for place in range(chance.randint(4, 7))
    ]
    pattern = [(kind, call if call.op == "broadcast" else replace(call, root=-1)) for kind, call in pattern]
    made: list[list[Step]] = [[] for _ in range(cluster.size)]
    for _ in range(steps):
        for rank, program in enumerate(made):
            program.append(Work(0.05 + chance.uniform(0, 0.01)))
            for kind, call in pattern:
                for name, ranks in cluster.groups.items():
                    if name.rstrip("0123456789") == kind and rank in ranks:
                        program.append(replace(call, group=name))
                program.append(Work(chance.uniform(0, 0.002)))
            program.append(Wait())
    return made


def spot(program: list[Step], chance: random.Random, fits: Callable[[Call], bool] = lambda call: True) -> int:
    """Where a fault goes: a call after the first step."""
    places = [at for at, step in enumerate(program) if isinstance(step, Call) and fits(step)]
    return chance.choice(places[len(places) // 4 : max(1, 3 * len(places) // 4)])


def judged(tmp_path: Path, job: Job, failing: bool = True) -> Verdict:
    end = job.run()
    job.dump(tmp_path, end + 30, "timeout" if failing else "demand", failing)
    return judge(read_job(tmp_path))


ENDS = {
    "outside": ("JOB_STUCK_OUTSIDE_NCCL", "outside"),
    "killed": ("RANK_CRASHED", "crashed"),
    "error": ("RANK_CRASHED", "crashed"),
    "stopped": ("RANK_NOT_JOIN", "stopped"),
    "exit": ("RANK_NOT_JOIN", "left"),
}


@pytest.mark.parametrize("how", ENDS)
@pytest.mark.parametrize("seed", range(12))
def test_a_rank_that_comes_no_more_is_named_and_what_became_of_it(how: str, seed: int, tmp_path: Path) -> None:
    chance = random.Random(seed)
    cluster = CLUSTERS[seed % len(CLUSTERS)]
    made, victim = programs(cluster, chance), chance.randrange(cluster.size)
    at = spot(made[victim], chance)
    made[victim][at] = End(how)
    verdict = judged(tmp_path, Job(cluster, made, seed), failing=seed % 2 == 0)
    assert (verdict.word, verdict.cause) == ENDS[how], verdict
    assert verdict.ranks == [victim]
    assert victim not in verdict.waiting
    if how in ("outside", "exit", "error"):
        assert verdict.call_site == "/app/data.py:33 load"


CHANGES: dict[str, Callable[[Call], Call]] = {
    "size": lambda call: replace(call, elements=call.elements + 7),
    "dtype": lambda call: replace(call, dtype="float16"),
    "op": lambda call: replace(call, op="all_to_all"),
    "reduce_op": lambda call: replace(call, reduce_op="max"),
    "root": lambda call: replace(call, root=1),
}


@pytest.mark.parametrize("cause", CHANGES)
@pytest.mark.parametrize("seed", range(8))
def test_the_odd_one_out_is_found_by_majority(cause: str, seed: int, tmp_path: Path) -> None:
    chance = random.Random(seed)
    cluster = CLUSTERS[seed % len(CLUSTERS)]
    made, victim = programs(cluster, chance), chance.randrange(cluster.size)
    fits = (lambda call: call.op == "broadcast") if cause == "root" else (lambda call: True)
    if cause == "root" and not any(isinstance(step, Call) and fits(step) for step in made[victim]):
        made = [
            [replace(step, op="broadcast", root=0) if isinstance(step, Call) else step for step in program]
            for program in made
        ]
    at = spot(made[victim], chance, fits)
    call = made[victim][at]
    assert isinstance(call, Call)
    made[victim][at] = CHANGES[cause](call)
    verdict = judged(tmp_path, Job(cluster, made, seed))
    assert (verdict.word, verdict.cause) == ("JOB_CONTAINS_COLL_METADATA_MISMATCH", cause), verdict
    if len(cluster.groups[call.group]) == 2:
        assert verdict.ranks == sorted(cluster.groups[call.group])
        assert "no majority" in verdict.remedy
    else:
        assert verdict.ranks == [victim]
    assert verdict.place is not None
    assert verdict.place.group.name == call.group
    before = [step for step in made[victim][:at] if isinstance(step, Call) and step.group == call.group]
    assert verdict.place.seq == len(before) + 1
    assert verdict.call_site == call.site


@pytest.mark.parametrize("seed", range(12))
def test_a_skipped_call_is_told_from_another_one(seed: int, tmp_path: Path) -> None:
    chance = random.Random(seed)
    cluster = CLUSTERS[seed % len(CLUSTERS)]
    made, victim = programs(cluster, chance, groups=("world",)), chance.randrange(cluster.size)
    at = spot(made[victim], chance)
    call = made[victim].pop(at)
    verdict = judged(tmp_path, Job(cluster, made, seed))
    assert (verdict.word, verdict.cause) == ("JOB_CONTAINS_COLL_METADATA_MISMATCH", "skipped"), verdict
    assert verdict.ranks == [victim]
    before = [step for step in made[victim][:at] if isinstance(step, Call)]
    assert verdict.place is not None
    assert verdict.place.seq == len(before) + 1
    assert isinstance(call, Call)
    assert f"the others called {call.op} " in verdict.summary


@pytest.mark.parametrize("seed", range(8))
def test_a_skipped_call_among_equal_ones_shows_by_its_place_in_the_program(seed: int, tmp_path: Path) -> None:
    """All calls look alike, so nothing contradicts anything until the others wait for one more."""
    chance = random.Random(seed)
    cluster = CLUSTERS[0]
    body = [Call("world", site=f"/app/train.py:{20 + place} step") for place in range(3)]
    made: list[list[Step]] = [[*body * 10, End("outside")] for _ in range(4)]
    victim = chance.randrange(4)
    at = chance.randrange(3, 27)
    made[victim].pop(at)
    verdict = judged(tmp_path, Job(cluster, made, seed))
    assert (verdict.cause, verdict.ranks) == ("skipped", [victim]), verdict
    assert verdict.place is not None
    assert verdict.place.seq == at + 1


@pytest.mark.parametrize("seed", range(12))
def test_groups_used_in_another_order_are_a_deadlock(seed: int, tmp_path: Path) -> None:
    chance = random.Random(seed)
    cluster = CLUSTERS[1 + seed % 3]
    group = next(name for name in cluster.groups if name != "world")
    body = [Call("world", elements=10), Call(group, elements=20)]
    made = [
        [step for _ in range(5) for step in body if rank in cluster.groups[step.group]] for rank in range(cluster.size)
    ]
    victim = chance.choice(cluster.groups[group])
    program = made[victim]
    program[4], program[5] = program[5], program[4]
    verdict = judged(tmp_path, Job(cluster, [list(one) for one in made], seed), failing=seed % 2 == 0)
    assert (verdict.word, verdict.cause) == ("JOB_CONTAINS_COLL_DEADLOCK", "cycle"), verdict
    assert verdict.ranks == [victim]


@pytest.mark.parametrize("seed", range(12))
def test_a_call_skipped_in_a_sub_group_names_the_rank_that_skipped_it(seed: int, tmp_path: Path) -> None:
    """The circle that follows runs over many ranks and groups; who left the common order is to blame."""
    chance = random.Random(seed)
    cluster = CLUSTERS[2 + seed % 2]
    sites = {name: f"/app/train.py:{30 + place} step" for place, name in enumerate(("tp", "dp", "world"))}
    body = ["tp", "world", "dp", "dp"]
    made: list[list[Step]] = []
    for rank in range(cluster.size):
        mine = [
            Call(
                name, "all_gather" if kind == "tp" else "all_reduce", site=sites[kind].replace("app", f"copies/{rank}")
            )
            for kind in body
            for name, ranks in cluster.groups.items()
            if name.rstrip("0123456789") == kind and rank in ranks
        ]
        made.append([*mine * 6])
    victim = chance.randrange(cluster.size)
    del made[victim][4 * chance.randrange(1, 5)]
    verdict = judged(tmp_path, Job(cluster, made, seed), failing=seed % 2 == 0)
    assert (verdict.cause, verdict.ranks) == ("skipped", [victim]), verdict


def test_two_halves_in_a_deadlock_are_both_named(tmp_path: Path) -> None:
    cluster = Cluster(1, 4, {"a": [0, 1, 2, 3], "b": [0, 1, 2, 3]})
    made: list[list[Step]] = [[Call("a"), Call("b")] if rank < 2 else [Call("b"), Call("a")] for rank in range(4)]
    verdict = judged(tmp_path, Job(cluster, made))
    assert verdict.cause == "cycle"
    assert verdict.ranks == [0, 1, 2, 3]


def test_messages_that_wait_for_each_other_are_a_deadlock(tmp_path: Path) -> None:
    cluster = Cluster(1, 3, {"world": [0, 1, 2]})
    made: list[list[Step]] = [[Call("world"), Message("world", "recv", (rank + 1) % 3)] for rank in range(3)]
    verdict = judged(tmp_path, Job(cluster, made))
    assert (verdict.cause, verdict.ranks) == ("cycle", [0, 1, 2]), verdict


def test_a_message_that_nobody_sends_names_the_sender(tmp_path: Path) -> None:
    cluster = Cluster(1, 3, {"world": [0, 1, 2]})
    made: list[list[Step]] = [[Message("world", "recv", 2)], [], [End("outside")]]
    verdict = judged(tmp_path, Job(cluster, made), failing=False)
    assert (verdict.cause, verdict.ranks) == ("outside", [2]), verdict


@pytest.mark.parametrize("seed", range(8))
def test_a_dead_link_is_told_from_a_late_rank(seed: int, tmp_path: Path) -> None:
    chance = random.Random(seed)
    cluster = Cluster(4, 2, {"world": list(range(8))})
    one = chance.randrange(4)
    job = Job(cluster, programs(cluster, chance), seed, broken=(one, (one + 1) % 4), broken_from=0.1)
    verdict = judged(tmp_path, job, failing=seed % 2 == 0)
    assert (verdict.word, verdict.cause) == ("JOB_STUCK_IN_NCCL_COLLECTIVE", "link"), verdict
    assert f"host{one}" in verdict.summary
    assert f"host{(one + 1) % 4}" in verdict.summary


def test_the_cause_is_found_behind_a_chain_of_waits(tmp_path: Path) -> None:
    """Rank 0 waits for 1 in one group, 1 for 2 in the next, and so on; only the last is to blame."""
    size = 40
    cluster = Cluster(1, size, {f"pair{rank}": [rank, rank + 1] for rank in range(size - 1)})
    made: list[list[Step]] = [[Call(f"pair{rank}")] if rank < size - 1 else [End("outside")] for rank in range(size)]
    for rank in range(1, size - 1):
        made[rank] = [Call(f"pair{rank}"), Call(f"pair{rank - 1}")]
    verdict = judged(tmp_path, Job(cluster, made))
    assert (verdict.cause, verdict.ranks) == ("outside", [size - 1])
    assert verdict.waiting == list(range(size - 1))
    assert any("other groups" in line for line in verdict.evidence)


@pytest.mark.parametrize("seed", range(200))
def test_healthy_jobs_are_all_good(seed: int, tmp_path: Path) -> None:
    """At their end, in the middle, with clocks that differ, dumps written at different moments, and one missing."""
    chance = random.Random(1000 + seed)
    cluster = CLUSTERS[seed % len(CLUSTERS)]
    job = Job(
        cluster, programs(cluster, chance, steps=8), seed, skew=[chance.uniform(-5, 5) for _ in range(cluster.hosts)]
    )
    end = job.run()
    if seed % 3:
        for number, rank in enumerate(job.ranks):
            middle = end * 0.6 + chance.uniform(0, 0.3)
            job._write(tmp_path, number, rank, middle, "demand", False, True)
    else:
        job.dump(tmp_path, end + 1, "exit")
    if seed % 5 == 0:
        (tmp_path / f"trace-rank-{seed % cluster.size}.jsonl").unlink()
    verdict = judge(read_job(tmp_path))
    assert verdict.word == "ALL_GOOD", verdict
