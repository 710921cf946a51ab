"""Rule files: what they say, and how they are refused."""

from __future__ import annotations

import math
from pathlib import Path

import pytest

from ncclx_py.plans.rules import EVERYTHING, Interval, forced_rules, read_rules
from ncclx_py.plans.topology import Topology

pytestmark = pytest.mark.unit


def write(tmp_path: Path, text: str, name: str = "rules.toml") -> str:
    path = tmp_path / name
    path.write_text(text)
    return str(path)


def test_toml_and_csv_say_the_same(tmp_path: Path) -> None:
    toml = """
        [[rule]]
        collective = "all_reduce"
        bytes_per_rank = "(1KiB, 8KiB]"
        level = "both"
        hosts = "[2, *)"
        ranks_per_host = 4
        algorithm = "pipelined"
        parameters = { chunks = 8 }
        [[rule]]
        collective = "broadcast"
        algorithm = "tree"
    """
    csv = (
        "collective,bytes_per_rank,level,hosts,ranks_per_host,algorithm,parameters\n"
        'all_reduce,"(1KiB, 8KiB]",both,"[2, *)",4,pipelined,chunks=8\n'
        "broadcast,*,,*,,tree,\n"
    )
    first, second = (
        read_rules(write(tmp_path, toml)),
        read_rules(write(tmp_path, csv, "rules.csv")),
    )
    for rules in (first, second):
        assert [rule.algorithm for rule in rules] == ["pipelined", "tree"]
        assert rules[0].parameters == {"chunks": 8}
        assert rules[0].bytes_per_rank == Interval(1025, 8193)
        assert (rules[0].hosts, rules[0].ranks_per_host) == (Interval(2, math.inf), Interval(4, 5))
        assert rules[1].bytes_per_rank == EVERYTHING
    assert "rule 2" in first[1].name
    assert "line 3" in second[1].name


@pytest.mark.parametrize(
    ("host_of", "level"), [((0, 0), "intra"), ((0, 1), "inter"), ((0, 0, 1), "both"), ((0,), "intra")]
)
def test_levels(tmp_path: Path, host_of: tuple[int, ...], level: str) -> None:
    for stated in ("intra", "inter", "both"):
        text = f'[[rule]]\ncollective = "all_reduce"\nlevel = "{stated}"\nalgorithm = "ring"'
        assert read_rules(write(tmp_path, text))[0].fits(Topology(host_of)) == (stated == level)


BAD = [
    ("rule = 3", "must hold tables"),
    ("[x]", "must hold tables"),
    ("[[rule]", "is not TOML"),
    ('[[rule]]\nalgorithm = "ring"', "rule 1: collective = None; it must be one of all_reduce"),
    ('[[rule]]\ncollective = "all_reduce"', "rule 1: algorithm = None; all_reduce has ring|rule 1: algorithm = None"),
    ('[[rule]]\ncollective = "all_reduce"\nalgorithm = "bruck"', "algorithm = 'bruck'; all_reduce has"),
    ('[[rule]]\ncollective = "all_reduce"\nalgorithm = "ring"\nbytes = 3', "no key 'bytes'"),
    ('[[rule]]\ncollective = "all_reduce"\nalgorithm = "ring"\nlevel = "rack"', "level = 'rack'"),
    ('[[rule]]\ncollective = "all_reduce"\nalgorithm = "ring"\nhosts = "2-4"', "hosts = '2-4' is not an interval"),
    ('[[rule]]\ncollective = "all_reduce"\nalgorithm = "ring"\nhosts = "[4, 2]"', "holds no number"),
    ('[[rule]]\ncollective = "all_reduce"\nalgorithm = "ring"\nhosts = -1', "hosts = -1 is not an interval"),
    ('[[rule]]\ncollective = "all_reduce"\nalgorithm = "ring"\nbytes_per_rank = "[0, 8XB)"', "'8XB' is not a size"),
    ('[[rule]]\ncollective = "all_reduce"\nalgorithm = "ring"\nparameters = { chunks = 2 }', "no parameter 'chunks'"),
    ('[[rule]]\ncollective = "all_reduce"\nalgorithm = "pipelined"\nparameters = { chunks = 0 }', "chunks = 0 must be"),
    ('[[rule]]\ncollective = "all_reduce"\nalgorithm = "pipelined"\nparameters = 3', "parameters = 3"),
]


@pytest.mark.parametrize(("text", "words"), BAD)
def test_a_wrong_file_is_refused_with_its_name_and_rule(tmp_path: Path, text: str, words: str) -> None:
    with pytest.raises(ValueError, match=words) as caught:
        read_rules(write(tmp_path, text))
    assert "rules.toml" in str(caught.value)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("collective,algorithm\nall_reduce\n", "line 2: it has not as many fields"),
        ("collective,algorithm\nall_reduce,ring,3\n", "line 2: it has not as many fields"),
        ('collective,algorithm\n"all_reduce,ring\n', "not CSV|not as many fields"),
        ("collective,algorithm,parameters\nall_reduce,pipelined,chunks=x\n", "line 2: chunks = 'x' must be"),
    ],
)
def test_a_wrong_csv_is_refused_with_its_line(tmp_path: Path, text: str, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        read_rules(write(tmp_path, text, "rules.csv"))


def test_a_missing_file_is_named() -> None:
    with pytest.raises(ValueError, match=r"nowhere\.toml cannot be read"):
        read_rules("nowhere.toml")


def test_forced_algorithms() -> None:
    rules = forced_rules("all_reduce=ring, broadcast=chain(chunks=4),all_to_all=balanced(chunks=2,window=3)")
    assert [(rule.collective, rule.algorithm, dict(rule.parameters)) for rule in rules] == [
        ("all_reduce", "ring", {}),
        ("broadcast", "chain", {"chunks": 4}),
        ("all_to_all", "balanced", {"chunks": 2, "window": 3}),
    ]
    assert all(rule.forced for rule in rules)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("ring", "'ring' is malformed"),
        ("all_reduce=", "malformed"),
        ("all_reduce=ring,", "malformed"),
        ("all_reduce=ring,all_reduce=leader", "stands there twice"),
        ("all_reduce=magic", "algorithm = 'magic'"),
        ("everything=ring", "collective = 'everything'"),
        ("broadcast=chain(chunks)", "chunks"),
    ],
)
def test_a_wrong_forced_algorithm(text: str, words: str) -> None:
    with pytest.raises(ValueError, match=words) as caught:
        forced_rules(text)
    assert f"NCCLX_ALGO={text}" in str(caught.value)
