"""Topology files, and what becomes of them together with the world and the devices."""

from __future__ import annotations

from pathlib import Path

import pytest

from ncclx_py.plans.spec import Facts, resolve, topology_for
from ncclx_py.plans.spec_file import place, read_spec, write_spec
from ncclx_py.plans.topology import DEFAULT_INTER, DEFAULT_INTRA, Link, Topology

pytestmark = pytest.mark.unit

WHOLE = """
hosts = 2
ranks_per_host = [3, 1]
placement = "cyclic"
rails = 2
[intra]
alpha = "3us"
bandwidth = "16GB/s"
memory = "40GB/s"
reduction = "5GB/s"
[inter]
alpha = "20us"
bandwidth = "200Mbit/s"
[[nic]]
host = 1
rail = 0
bandwidth = "100Mbit/s"
"""


@pytest.fixture
def file(tmp_path: Path):
    def write(text: str) -> str:
        path = tmp_path / "cluster.toml"
        path.write_text(text)
        return str(path)

    return write


def test_a_whole_file(file) -> None:
    topology = resolve([], 0, read_spec(file(WHOLE))).topology
    assert topology == Topology(
        (0, 1, 0, 0),
        2,
        Link(3e-6, 16e9),
        Link(20e-6, 25e6),
        ((25e6, 25e6), (12.5e6, 25e6)),
        memory=40e9,
        gamma=1 / 5e9,
    )


def test_what_is_written_is_read_back(file) -> None:
    topology = resolve([], 0, read_spec(file(WHOLE))).topology
    again = resolve([], 0, read_spec(file(write_spec(topology, ["measured", "on a Monday"]))))
    assert again.topology == topology


@pytest.mark.parametrize(
    ("counts", "placement", "hosts"),
    [
        ([2, 2], "block", (0, 0, 1, 1)),
        ([2, 2], "cyclic", (0, 1, 0, 1)),
        ([1, 3], "cyclic", (0, 1, 1, 1)),
        ([], "block", ()),
    ],
)
def test_placements(counts: list[int], placement: str, hosts: tuple[int, ...]) -> None:
    assert place(counts, placement) == hosts


def test_hosts_are_renumbered_by_their_first_rank_and_nics_with_them(file) -> None:
    text = 'placement = [1, 0, 1]\n[[nic]]\nhost = 1\nrail = 0\nbandwidth = "1GB/s"\n'
    topology = topology_for([7, 3, 7], 1, {"NCCLX_TOPOLOGY": file(text)})
    assert topology.host_of == (0, 1, 0)
    assert topology.nic(0, 0) == 1e9
    assert topology.nic(1, 0) == DEFAULT_INTER.bandwidth


def test_a_file_with_links_only_takes_the_ranks_from_the_world(file) -> None:
    found = resolve([0, 0, 1], 2, read_spec(file('[inter]\nbandwidth = "1GB/s"\n')))
    assert found.topology == Topology((0, 0, 1), 2, DEFAULT_INTRA, Link(DEFAULT_INTER.alpha, 1e9))
    assert found.sources["hosts"] == "the world"
    assert found.sources["inter.bandwidth"].startswith("file ")
    assert found.sources["inter.alpha"] == found.sources["intra.bandwidth"] == "default"


def test_no_file() -> None:
    assert topology_for([4, 4, 9], 1, {}) == Topology((0, 0, 1))


def test_devices_fill_in_what_no_file_says(file) -> None:
    facts = {5: Facts(300e9, (1e9, 2e9), "devices"), 8: Facts(200e9, (1e9, 1e9), "devices")}
    found = resolve([5, 8, 5], 2, None, facts)
    assert found.topology.intra.bandwidth == 200e9
    assert [found.topology.nic(host, rail) for host in (0, 1) for rail in (0, 1)] == [1e9, 2e9, 1e9, 1e9]
    assert found.sources["inter.bandwidth"] == found.sources["nics"] == "devices"
    stated = resolve([5, 8, 5], 2, read_spec(file('[inter]\nbandwidth = "3GB/s"\n[intra]\nbandwidth = "4GB/s"')), facts)
    assert (stated.topology.intra.bandwidth, stated.topology.nic(0, 1)) == (4e9, 3e9)


def test_half_known_devices_count_for_nothing() -> None:
    facts = {0: Facts(300e9, (1e9,), "devices"), 1: Facts(None, (None,), "devices")}
    assert resolve([0, 1], 1, None, facts).topology == Topology((0, 1))


BAD = [
    ("hosts = 2", "hosts = 2: give ranks_per_host as well"),
    ("hosts = 0\nranks_per_host = 1", "hosts = 0: give a whole number, at least 1"),
    ("ranks_per_host = 4", "ranks_per_host = 4: give hosts as well"),
    ("hosts = 2\nranks_per_host = [1, 2, 3]", "it has 3 numbers, but hosts = 2"),
    ("ranks_per_host = []", "name at least one host"),
    ("hosts = 2\nranks_per_host = true", "ranks_per_host = True"),
    ("rails = -1", "rails = -1: give a whole number"),
    ("rack = 3", "rack = 3: no such key; known: hosts, "),
    ('[intra]\nspeed = "1GB/s"', "intra.speed = '1GB/s': no such key; known: alpha"),
    ("intra = 3", r"intra = 3: write it as a table \[intra\]"),
    ('[inter]\nalpha = "5"', "inter.alpha = '5': '5' is not a time"),
    ("[inter]\nalpha = 5", "inter.alpha = 5: '5' is not a time"),
    ('[inter]\nbandwidth = "25gb"', "inter.bandwidth = '25gb': '25gb' is not a bandwidth"),
    ('[inter]\nbandwidth = "0GB/s"', "must be above zero"),
    ('[intra]\nalpha = "-5us"', "intra.alpha = '-5us'"),
    ('placement = "random"', "placement = 'random': use"),
    ("placement = [0, 2]", r"placement = \[0, 2\]: name each host 0 to N - 1"),
    ("placement = []", "name each host"),
    ("hosts = 3\nplacement = [0, 1]", "it names 2 hosts, but hosts = 3"),
    ("ranks_per_host = [2, 1]\nplacement = [0, 1, 1]", r"gives \[1, 2\] ranks per host"),
    ("[[nic]]\nhost = 0\nrail = 0", r"nic\[0\].bandwidth = None: it is missing"),
    ('[[nic]]\nhost = 0\nrail = 1\nbandwidth = "1GB/s"', r"nic\[0\].rail = 1: rails are numbered 0 to 0"),
    ('hosts=1\nranks_per_host=2\n[[nic]]\nhost = 1\nrail = 0\nbandwidth = "1GB/s"', r"hosts are numbered 0 to 0"),
    ('[[nic]]\nhost=0\nrail=0\nbandwidth="1GB/s"\n[[nic]]\nhost=0\nrail=0\nbandwidth="2GB/s"', "given before"),
    ("nic = 3", "write each NIC as a table"),
    ("hosts = [", "is not TOML"),
]


@pytest.mark.parametrize(("text", "words"), BAD)
def test_a_wrong_file_is_refused_with_its_name_and_place(file, text: str, words: str) -> None:
    with pytest.raises(ValueError, match=words) as caught:
        read_spec(file(text))
    assert "cluster.toml" in str(caught.value)


def test_a_missing_file_is_named() -> None:
    with pytest.raises(ValueError, match=r"nowhere\.toml cannot be read"):
        topology_for([0], 1, {"NCCLX_TOPOLOGY": "nowhere.toml"})


@pytest.mark.parametrize(
    ("host_of", "rails", "words"),
    [
        ([0, 0, 1], 2, "has 4 ranks, but the world has 3|puts rank 1 on host 1, but that rank runs on host 0"),
        ([0, 1, 0], 2, "puts rank 3 on host 0, but the world has 3 ranks"),
        ([0, 1, 0, 0, 1], 2, "has 4 ranks, but the world has 5: rank 4 is on host 1"),
        ([0, 1, 1, 0], 2, "puts rank 2 on host 0, but that rank runs on host 1"),
        ([0, 1, 0, 0], 3, "rails = 2, but the ranks use 3 NICs"),
    ],
)
def test_a_file_that_contradicts_the_world_names_rank_and_host(file, host_of, rails, words: str) -> None:
    with pytest.raises(ValueError, match=words) as caught:
        topology_for(host_of, rails, {"NCCLX_TOPOLOGY": file(WHOLE)})
    assert "contradicts the world" in str(caught.value)


def test_a_nic_of_a_host_that_the_world_lacks(file) -> None:
    text = '[[nic]]\nhost = 4\nrail = 0\nbandwidth = "1GB/s"\n'
    with pytest.raises(ValueError, match="host 4, rail 0, but there are 2 hosts and 1 rails"):
        topology_for([0, 1], 1, {"NCCLX_TOPOLOGY": file(text)})


def test_nobody_says_where_the_ranks_are(file) -> None:
    with pytest.raises(ValueError, match="does not say where the ranks are"):
        resolve([], 0, read_spec(file("rails = 2")))
