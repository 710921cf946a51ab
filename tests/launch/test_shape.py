"""What the words of the command line mean, and which are refused. No network, no root."""

from __future__ import annotations

import pytest
from ncclx_py.launch.shape import Shape, parse_ranks, parse_rates, str_ranks

from ncclx_py import cli

pytestmark = pytest.mark.unit


@pytest.mark.parametrize(
    ("text", "ranks"),
    [("4x2", (2, 2, 2, 2)), ("1x8", (8,)), ("4+2", (4, 2)), ("4,2,1", (4, 2, 1)), ("3", (3,))],
)
def test_clusters_are_hosts_times_ranks_or_a_number_for_each_host(text: str, ranks: tuple[int, ...]) -> None:
    assert parse_ranks(text) == ranks
    assert parse_ranks(str_ranks(ranks)) == ranks


@pytest.mark.parametrize("text", ["", "4x", "x2", "4x2x2", "4+", "four", "-1", "4 x 2"])
def test_a_malformed_cluster_is_named_with_an_example(text: str) -> None:
    with pytest.raises(ValueError, match="4x2"):
        parse_ranks(text)


def test_one_rate_is_for_all_rails_and_several_are_one_for_each() -> None:
    assert parse_rates("200mbit", None) == (25e6,)
    assert parse_rates("200mbit", 3) == (25e6,) * 3
    assert parse_rates("200mbit,100mbit", None) == parse_rates("200mbit,100mbit", 2) == (25e6, 12.5e6)
    assert parse_rates(None, 2) == (None, None)
    with pytest.raises(ValueError, match="2 rails, but there are 3"):
        parse_rates("200mbit,100mbit", 3)
    with pytest.raises(ValueError, match="0 rails"):
        parse_rates("200mbit", 0)


def test_block_and_cyclic_placement_number_the_ranks_of_uneven_hosts() -> None:
    block = Shape((3, 1, 2))
    assert (block.host_of, block.local_rank) == ((0, 0, 0, 1, 2, 2), (0, 1, 2, 0, 0, 1))
    cyclic = Shape((3, 1, 2), placement="cyclic")
    assert (cyclic.host_of, cyclic.local_rank) == ((0, 1, 2, 0, 2, 0), (0, 0, 0, 1, 1, 2))


@pytest.mark.parametrize(
    ("words", "complaint"),
    [
        ("emulate 4x0 -- x.py", "at least one rank"),
        ("emulate 0x4 -- x.py", "1 to 250 hosts"),
        ("emulate 2x2 --rate fast -- x.py", "'fast' is not a bandwidth"),
        ("emulate 2x2 --rate 200mbit --rails 0 -- x.py", "0 rails"),
        ("emulate 2x2 --rate 1mbit,2mbit --rails 3 -- x.py", "2 rails, but there are 3"),
        ("emulate 1x2 --spine 100mbit -- x.py", "one host"),
        ("emulate 2x2 --burst lots -- x.py", "'lots' is not a size"),
    ],
)
def test_an_impossible_cluster_is_refused_before_anything_is_made(
    words: str, complaint: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["launch", *words.split()]) == 2
    assert complaint in capsys.readouterr().err


@pytest.mark.parametrize(
    "words", ["emulate 2x2", "emulate --rate 1gbit -- x.py", "emulate 2x2 --placement odd -- x.py"]
)
def test_a_wrong_command_line_ends_with_status_2(words: str) -> None:
    with pytest.raises(SystemExit, match="2"):
        cli.main(["launch", *words.split()])


def test_what_follows_the_dashes_is_the_program_with_all_its_options() -> None:
    words = [
        "launch",
        "emulate",
        "2x2",
        "--rate",
        "1gbit",
        "--",
        "-m",
        "pkg.module",
        "--rate",
        "3",
        "--",
        "--json",
        "x",
    ]
    args = cli.build_parser().parse_args(words)
    assert args.program == ["-m", "pkg.module", "--rate", "3", "--", "--json", "x"]
    assert (args.rate, args.json, args.cluster) == ("1gbit", None, "2x2")
