"""Who is on which host, which addresses work, and what a call says about itself."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace

import pytest
import torch

from ncclx_py.transport.fabric import _check_rails
from ncclx_py.transport.identity import (
    Card,
    addresses,
    host_id,
    host_numbers,
    machine_id,
    make_card,
    rail_names,
    reach,
    unix_name,
)
from ncclx_py.transport.signature import RECORD_BYTES, Signature, digest

pytestmark = pytest.mark.unit


def card(
    rank: int, host: str = "a", machine: str = "m", where: tuple[str, ...] = ("127.0.0.1",), named: bool = False
) -> Card:
    return Card(rank, host, machine, where, named, 1234, "token")


def test_a_card_survives_its_journey() -> None:
    made = make_card(3, 4567, {"MASTER_ADDR": "127.0.0.1"}, 89)
    named = make_card(3, 4567, {"NCCLX_HOST_ID": "x", "NCCLX_RAILS": "lo,lo"})
    for one in (made, named):
        assert Card.from_row(3, json.loads(json.dumps(one.row()))) == one
    assert made.mail == 89
    assert made.token not in unix_name(made.token), "names can be seen"
    assert made.addresses[0] == "127.0.0.1"
    assert made.rails == 1


def test_hosts_are_named_or_else_told_by_boot_and_network_namespace() -> None:
    assert host_id({"NCCLX_HOST_ID": "x"}) != host_id({"NCCLX_HOST_ID": "y"})
    assert host_id({}) == host_id({"NCCLX_HOST_ID": ""}) == machine_id()
    assert host_id({"NCCLX_HOST_ID": machine_id()}) != host_id({})
    assert host_numbers([card(0, "b"), card(1, "a"), card(2, "b"), card(3, "c")]) == (0, 1, 0, 2)


def test_rails_are_interfaces() -> None:
    assert rail_names({}) == ()
    assert rail_names({"NCCLX_RAILS": "eth0, eth1"}) == ("eth0", "eth1")
    assert addresses({"NCCLX_RAILS": "lo,lo"}) == ("127.0.0.1", "127.0.0.1")
    assert make_card(0, 1, {"NCCLX_RAILS": "lo,lo"}).rails == 2
    with pytest.raises(ValueError, match="has an empty name"):
        rail_names({"NCCLX_RAILS": "eth0,,eth1"})
    with pytest.raises(ValueError, match=r"'eth99', which is no interface .* This host has: .*lo"):
        addresses({"NCCLX_RAILS": "eth99"})


def test_a_peer_is_reached_at_an_address_that_can_work() -> None:
    both = ("127.0.0.1", "10.0.0.7")
    assert reach(card(0), card(1, where=both), 0) == "127.0.0.1"
    assert reach(card(0), card(1, machine="other", where=both), 0) == "10.0.0.7"
    rails = card(1, machine="other", where=("10.0.0.1", "10.1.0.1"), named=True)
    assert reach(replace(rails, rank=0), rails, 1) == "10.1.0.1"
    with pytest.raises(ValueError, match=r"Rank 1 is on another machine, but knows only .* 127.0.0.1.* NCCLX_RAILS"):
        reach(card(0), card(1, machine="other"), 0)


def test_a_signature_says_what_was_called() -> None:
    plain = Signature(3, "all_gather", torch.bfloat16, 0)
    assert str(plain) == "all_gather of 0 x bfloat16 as call 3"
    full = Signature(4, "reduce", torch.float32, 10, 2, "SUM")
    assert str(full) == "reduce of 10 x float32 (SUM, root 2) as call 4"
    different = [replace(full, sequence=5), replace(full, op="all_reduce"), replace(full, dtype=torch.int32)]
    different += [replace(full, elements=11), replace(full, root=1), replace(full, reduction="MAX"), full]
    assert len({digest(one.record()) for one in different}) == len(different)
    assert len(replace(full, op="x" * 500).record()) == RECORD_BYTES


def test_digests_are_equal_in_all_processes() -> None:
    source = "from ncclx_py.transport.signature import digest; print(digest(b'all_reduce'))"
    printed = subprocess.run([sys.executable, "-c", source], capture_output=True, text=True, check=True).stdout
    assert int(printed) == digest(b"all_reduce")


@pytest.mark.parametrize(
    ("rails", "words"),
    [
        ((("10.0.0.1",), ()), "rank 1 has NCCLX_RAILS not set and rank 0 has 1 rails named in NCCLX_RAILS"),
        ((("a", "b"), ("c",)), "rank 1 has 1 rails named in NCCLX_RAILS and rank 0 has 2 rails named"),
    ],
)
def test_ranks_with_other_rails_are_told_who_has_what(rails: tuple[tuple[str, ...], ...], words: str) -> None:
    cards = [card(rank, where=named or ("10.0.0.9",), named=bool(named)) for rank, named in enumerate(rails)]
    for mine in cards:
        with pytest.raises(ValueError, match=words if mine.rank == 0 else "rank 0 has"):
            _check_rails(cards, mine)
