"""What the tuner chooses, and why it says it does."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest

from ncclx_py.plans.algorithms.registry import ALGORITHMS, build
from ncclx_py.plans.bounds import lower_bound
from ncclx_py.plans.plan import Problem
from ncclx_py.plans.problems import uniform
from ncclx_py.plans.replay import replay
from ncclx_py.plans.rules import Interval, Rule, forced_rules
from ncclx_py.plans.spec_file import place
from ncclx_py.plans.table import Row, Table, signature
from ncclx_py.plans.topology import Link, Topology
from ncclx_py.plans.tuner import MARGIN, SHORT_BLOCK, Tuner
from ncclx_py.plans.verify import verify

pytestmark = pytest.mark.unit

KIB, MIB = 1 << 10, 1 << 20
TWO_BY_FOUR = Topology(place([4, 4], "block"))
FOUR_BY_TWO = Topology(place([2] * 4, "cyclic"))
ONE_HOST = Topology((0,) * 4)
FLAT = Topology(tuple(range(8)))


def chosen(topology: Topology, collective: str, size: int, **options: object) -> tuple[str, int]:
    """The algorithm and its chunks (0 without)."""
    choice = Tuner(topology, **options).choose(uniform(collective, topology.size, size, 4), 4)  # type: ignore[arg-type]
    return choice.algorithm, choice.parameters.get("chunks", 0)


@pytest.mark.parametrize(
    ("size", "expected"),
    [
        (4 * KIB, ("leader", 0)),
        (64 * KIB, ("leader", 0)),
        (256 * KIB, ("hierarchical", 0)),
        (MIB, ("hierarchical", 0)),
        (4 * MIB, ("pipelined", 2)),
        (16 * MIB, ("pipelined", 8)),
        (64 * MIB, ("pipelined", 32)),
    ],
)
def test_the_crossovers_that_were_measured_on_cpu_clusters(size: int, expected: tuple[str, int]) -> None:
    assert chosen(TWO_BY_FOUR, "all_reduce", size) == expected


@pytest.mark.parametrize("size", [16, 64 * KIB, 16 * MIB])
def test_one_host_reduces_directly(size: int) -> None:
    assert chosen(ONE_HOST, "all_reduce", size)[0] == "direct"


def test_hosts_of_one_rank_get_flat_algorithms() -> None:
    for collective, size in itertools.product(ALGORITHMS, (KIB, MIB, 64 * MIB)):
        assert chosen(FLAT, collective, size)[0] not in ("hierarchical", "pipelined", "two_level")
    assert chosen(FLAT, "all_reduce", 64 * MIB)[0] in ("pipelined", "ring")


@pytest.mark.parametrize(
    ("ranks", "rate", "block", "expected"),
    [
        ([2] * 4, 25e6, 0, "pairwise"),
        ([2] * 4, 25e6, 256, "bruck"),
        ([2] * 4, 25e6, KIB, "bruck"),
        ([2] * 4, 25e6, 4 * KIB, "two_level"),  # what Bruck sends twice costs more than the messages that it saves
        ([2] * 4, 2.5e6, KIB, "two_level"),
        ([2] * 4, 125e6, 8 * KIB, "bruck"),
        ([2] * 4, 1.25e9, 32 * KIB, "two_level"),
        ([2] * 4, 1.25e9, 2 * MIB, "pairwise"),
        ([4] * 2, 25e6, KIB, "bruck"),
        ([4] * 2, 1.25e9, 2 * MIB, "pairwise"),
        ([1] * 8, 25e6, KIB, "bruck"),
        ([8], 1.25e9, 4 * KIB, "pairwise"),  # inside one host messages cost little
    ],
)
def test_the_crossovers_of_all_to_all_that_were_measured(
    ranks: list[int], rate: float, block: int, expected: str
) -> None:
    topology = Topology(place(ranks, "block"), inter=Link(50e-6, rate))
    assert chosen(topology, "all_to_all", 8 * block)[0] == expected


def test_skewed_rows_are_balanced_where_that_pays() -> None:
    topology = Topology(place([4, 4], "block"), 4, inter=Link(50e-6, 25e6))
    heavy = tuple(
        tuple((1 << 13) * (13 if source % 4 == 0 else 1) * (5 if target % 4 == 0 else 1) for target in range(8))
        for source in range(8)
    )
    choice = Tuner(topology).choose(Problem("all_to_all", 8, matrix=heavy), 4)
    assert choice.algorithm == "balanced"
    assert choice.predicted_s < 1.25 * choice.bound_s
    even = Problem("all_to_all", 8, matrix=((1 << 18,) * 8,) * 8)
    assert Tuner(topology).choose(even, 4).algorithm == "pairwise"


@pytest.mark.parametrize(
    "topology", [ONE_HOST, TWO_BY_FOUR, FOUR_BY_TWO, FLAT, Topology((0, 1, 0, 0, 2, 1), 2), Topology((0,))]
)
def test_every_choice_can_be_built_and_is_right(topology: Topology) -> None:
    tuner = Tuner(topology)
    for collective, elements in itertools.product(ALGORITHMS, (0, 1, 999, 100_000)):
        problem = uniform(collective, topology.size, 4 * elements, 4)
        choice = tuner.choose(problem, 4)
        verify(build(problem, topology, choice.algorithm, choice.parameters), topology)
        assert choice.bound_s == lower_bound(problem, topology, 4).seconds
        assert choice.reason


@pytest.mark.parametrize("topology", [TWO_BY_FOUR, FOUR_BY_TWO, FLAT])
def test_the_choice_is_near_the_best_of_all_when_played(topology: Topology) -> None:
    """Every algorithm is built and played message by message; the choice may not be far from the fastest."""
    for collective, size in itertools.product(ALGORITHMS, (4 * KIB, 256 * KIB, 4 * MIB)):
        if collective == "all_to_all" and size <= SHORT_BLOCK * topology.size:
            continue  # decided by what a message costs beyond what is played, see the crossovers
        problem = uniform(collective, topology.size, size, 4)
        tuner = Tuner(topology)
        times = {
            (one.algorithm, *one.parameters.values()): replay(
                build(problem, topology, one.algorithm, one.parameters), topology, 4
            ).seconds
            for one in tuner.candidates(problem, 4)
            if one.predicted_s is not None
        }
        choice = tuner.choose(problem, 4)
        assert times[choice.algorithm, *choice.parameters.values()] <= 1.4 * min(times.values()), (collective, size)


def test_candidates_are_sorted_and_say_why_not() -> None:
    tuner = Tuner(TWO_BY_FOUR)
    problem = uniform("all_reduce", 8, MIB, 4)
    found = tuner.candidates(problem, 4)
    assert {one.algorithm for one in found} == set(ALGORITHMS["all_reduce"])
    able = [one.predicted_s or 0 for one in found if not one.why_not]
    assert able == sorted(able)
    assert all(one.why_not or one.predicted_s for one in found)
    assert tuner.choose(problem, 4).predicted_s <= (1 + MARGIN) * able[0]
    odd = {
        one.algorithm: one.why_not
        for one in Tuner(Topology((0, 0, 0))).candidates(uniform("reduce_scatter", 3, MIB, 4), 4)
    }
    assert "power of two" in odd["halving"]


def test_the_order_of_calls_does_not_matter() -> None:
    problems = [uniform("all_reduce", 8, size, 4) for size in (KIB, 100_000, MIB, 5 * MIB)]
    forth, back = Tuner(TWO_BY_FOUR), Tuner(TWO_BY_FOUR)
    first = [forth.choose(problem, 4) for problem in problems]
    assert [back.choose(problem, 4) for problem in reversed(problems)] == first[::-1]
    assert forth.choose(problems[0], 4) is first[0]


def test_deterministic() -> None:
    for collective in ("all_reduce", "reduce_scatter"):
        assert chosen(TWO_BY_FOUR, collective, MIB, deterministic=True)[0] == "ordered"
    assert chosen(TWO_BY_FOUR, "all_gather", MIB, deterministic=True)[0] != "ordered"
    with pytest.raises(ValueError, match="contradicts deterministic"):
        Tuner(TWO_BY_FOUR, rules=forced_rules("all_reduce=ring"), deterministic=True)
    tuner = Tuner(TWO_BY_FOUR, rules=[Rule("rule 1", "all_reduce", "ring")], deterministic=True)
    choice = tuner.choose(uniform("all_reduce", 8, MIB, 4), 4)
    assert choice.algorithm == "ordered"
    assert "rule 1 passed over" in choice.reason


def test_the_first_rule_that_matches_wins() -> None:
    rules = [
        Rule("rule 1", "all_reduce", "ring", bytes_per_rank=Interval(0, 1024)),
        Rule("rule 2", "all_reduce", "direct", level="intra"),
        Rule("rule 3", "all_reduce", "leader", bytes_per_rank=Interval(0, 2048)),
        Rule("rule 4", "broadcast", "chain", {"chunks": 5}),
    ]
    tuner = Tuner(TWO_BY_FOUR, rules=rules)
    assert [tuner.choose(uniform("all_reduce", 8, size, 4), 4).algorithm for size in (8188, 8192, 16380)] == [
        "ring",
        "leader",
        "leader",
    ]
    assert tuner.choose(uniform("all_reduce", 8, 16384, 4), 4).reason.startswith("predicted")
    choice = tuner.choose(uniform("broadcast", 8, 16384, 4), 4)
    assert (choice.algorithm, choice.parameters, choice.reason) == ("chain", {"chunks": 5}, "rule 4")
    assert choice.predicted_s > 0


def test_a_rule_that_does_not_apply_is_passed_over_aloud_and_a_forced_one_is_an_error() -> None:
    uneven = Problem("all_to_all", 2, matrix=((1, 2), (3, 4)))
    choice = Tuner(Topology((0, 1)), rules=[Rule("rule 1", "all_to_all", "bruck")]).choose(uneven, 4)
    assert choice.algorithm == "pairwise"
    assert "rule 1 passed over: bruck does not apply, the counts differ" in choice.reason
    with pytest.raises(ValueError, match=r"NCCLX_ALGO=all_to_all=bruck: bruck does not apply.*the counts differ"):
        Tuner(Topology((0, 1)), rules=forced_rules("all_to_all=bruck")).choose(uneven, 4)


def test_a_rule_that_can_never_apply_fails_the_start() -> None:
    rule = Rule("rule 7 of rules.toml", "reduce_scatter", "halving", ranks_per_host=Interval(3, 4))
    with pytest.raises(ValueError, match=r"rule 7 of rules\.toml: halving can never run reduce_scatter here"):
        Tuner(Topology((0, 0, 0)), rules=[rule])
    assert Tuner(Topology((0, 0)), rules=[rule]).rules  # there it does not match, and is no error


def row(algorithm: str, size: int, seconds: float, correct: bool = True, **parameters: int) -> Row:
    return Row("all_reduce", size, signature(TWO_BY_FOUR), algorithm, parameters, seconds, correct)


def test_measured_times_correct_the_model() -> None:
    table = Table((row("leader", MIB, 1e-3), row("ring", MIB, 2e-3), row("hierarchical", MIB, 9e-3)), "t.json")
    choice = Tuner(TWO_BY_FOUR, table).choose(uniform("all_reduce", 8, MIB, 4), 4)
    assert choice.algorithm == "leader"
    assert choice.predicted_s == pytest.approx(1e-3)
    assert "model × measured" in choice.reason
    elsewhere = Tuner(FOUR_BY_TWO, table).choose(uniform("all_reduce", 8, MIB, 4), 4)
    assert "(model)" in elsewhere.reason


def test_wrong_algorithms_are_never_chosen() -> None:
    fast_and_wrong = Table(
        (row("leader", MIB, 1e-6, correct=False), row("ring", MIB, 2e-3), row("direct", MIB, 3e-3)), "t.json"
    )
    tuner = Tuner(TWO_BY_FOUR, fast_and_wrong)
    for size in (KIB, MIB, 16 * MIB):
        choice = tuner.choose(uniform("all_reduce", 8, size, 4), 4)
        assert choice.algorithm in ("ring", "direct")
        assert "leader gave wrong results at 1 MiB (t.json)" in choice.reason
    right_elsewhere = Table((*fast_and_wrong.rows, row("leader", 2 * MIB, 1e-6)), "t.json")
    assert Tuner(TWO_BY_FOUR, right_elsewhere).choose(uniform("all_reduce", 8, MIB, 4), 4).algorithm != "leader"


def test_what_was_not_measured_cannot_beat_what_was() -> None:
    table = Table((row("leader", KIB, 1.0), row("leader", MIB, 2.0), row("ring", MIB, 1.0)), "t.json")
    tuner = Tuner(TWO_BY_FOUR, table)
    assert tuner.choose(uniform("all_reduce", 8, KIB, 4), 4).algorithm == "leader"
    assert tuner.choose(uniform("all_reduce", 8, MIB, 4), 4).algorithm == "ring"
    why = {one.algorithm: one.why_not for one in tuner.candidates(uniform("all_reduce", 8, 2 * KIB, 4), 4)}
    assert why["ring"] == "measured only from 1 MiB to 1 MiB"
    assert why["direct"] == "not measured, though others are"


def test_digests_tell_tuners_apart() -> None:
    table = Table((row("ring", MIB, 1.0),))
    tuners = [
        Tuner(TWO_BY_FOUR),
        Tuner(FOUR_BY_TWO),
        Tuner(TWO_BY_FOUR, table),
        Tuner(TWO_BY_FOUR, rules=forced_rules("all_reduce=ring")),
        Tuner(TWO_BY_FOUR, deterministic=True),
    ]
    assert len({tuner.digest() for tuner in tuners}) == len(tuners)
    assert Tuner(TWO_BY_FOUR, Table(table.rows, "kept elsewhere.json")).digest() == tuners[2].digest()


def test_the_environment(tmp_path: Path) -> None:
    (tmp_path / "rules.csv").write_text("collective,algorithm\nbroadcast,chain\n")
    (tmp_path / "table.json").write_text(Table((row("ring", MIB, 1.0),)).to_json())
    env = {
        "NCCLX_RULES": str(tmp_path / "rules.csv"),
        "NCCLX_TABLE": str(tmp_path / "table.json"),
        "NCCLX_ALGO": "all_gather=ring",
        "NCCLX_DETERMINISTIC": "0",
    }
    tuner = Tuner.from_environment(TWO_BY_FOUR, env)
    names = [tuner.choose(uniform(one, 8, MIB, 4), 4).algorithm for one in ("broadcast", "all_reduce", "all_gather")]
    assert names == ["chain", "ring", "ring"]
    assert Tuner.from_environment(TWO_BY_FOUR, {"NCCLX_DETERMINISTIC": "1"}).deterministic
    for name, value in (
        ("NCCLX_DETERMINISTIC", "yes"),
        ("NCCLX_RULES", "nowhere"),
        ("NCCLX_TABLE", "nowhere"),
        ("NCCLX_ALGO", "x"),
    ):
        with pytest.raises(ValueError, match="nowhere" if value == "nowhere" else f"{name}='?{value}"):
            Tuner.from_environment(TWO_BY_FOUR, {name: value})
