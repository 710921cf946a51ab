"""How the ranks of one host come together, the ranks being threads: what they share, what it takes, and who is missing."""

from __future__ import annotations

import os
import socket
import threading
import time
from collections.abc import Callable
from typing import Any

import pytest

from ncclx_py.transport import neighbours
from ncclx_py.transport.identity import Card, unix_name
from ncclx_py.transport.neighbours import Household

pytestmark = pytest.mark.unit


def cards(size: int) -> list[Card]:
    return [
        Card(10 + place, "here", "m", ("127.0.0.1",), False, 1, os.urandom(16).hex(), os.getpid(), 1)
        for place in range(size)
    ]


def together(local: list[Card], absent: tuple[int, ...] = (), before: Callable[[], None] = lambda: None) -> list[Any]:
    """The household of each rank, its error, or None for one that is absent."""
    found: list[Any] = [None] * len(local)
    lines = [None if place in absent else neighbours.listen(card.token) for place, card in enumerate(local)]
    before()

    def join(place: int, line: socket.socket) -> None:
        try:
            found[place] = neighbours.move_in(line, local, local[place].rank, time.monotonic() + 20)
        except OSError as error:
            line.close()
            found[place] = error

    threads = [threading.Thread(target=join, args=(at, line)) for at, line in enumerate(lines) if line is not None]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    return found


def test_everybody_sees_the_words_of_everybody() -> None:
    local = cards(3)
    homes: list[Household] = together(local)
    for place, home in enumerate(homes):
        assert home.me.place == place
        assert home.others == [card.rank for card in local if card.rank != home.me.rank]
        home.me.window.words[9] = 70 + place
    homes[2].set_abort_text("enough")
    for home in homes:
        assert [home.neighbour(card.rank).window.words[9] for card in local] == [70, 71, 72]
    assert [home.abort_text() for home in homes] == ["enough", "enough", ""]
    for home in homes:
        home.close()


def test_who_leaves_is_known_to_be_gone() -> None:
    homes: list[Household] = together(cards(3))
    assert homes[0].is_there(12)
    assert homes[0].state(12) == "alive"
    homes[2].close()
    assert not homes[0].is_there(12)
    assert homes[1].state(12) == "gone"
    assert homes[1].state(10) == "alive"
    for home in homes[:2]:
        home.close()


def test_a_sleeper_is_woken_and_wakes_others() -> None:
    homes: list[Household] = together(cards(2))
    homes[1].me.window.words[1] = 1
    homes[0].bell(11).ring()
    assert homes[1].line.recv(8) == b"\0"
    with pytest.raises(BlockingIOError):
        homes[0].line.recv(8)
    for home in homes:
        home.close()


def test_descriptors_and_maps_do_not_grow_with_the_ranks() -> None:
    taken = []
    for size in (2, 20):
        before = _resources()
        homes: list[Household] = together(cards(size))
        for home in homes:
            assert all(home.is_there(rank) for rank in home.others)
            assert home.neighbour(home.others[-1]).window.words[0] == 0
        taken.append([(now - then) / size for now, then in zip(_resources(), before)])
        for home in homes:
            home.close()
        assert _resources() == before
    assert taken == [[2.0, 1.0]] * 2


def _resources() -> tuple[int, int]:
    """Open descriptors, and maps of houses."""
    with open("/proc/self/maps") as maps:
        return len(os.listdir("/proc/self/fd")), sum("ncclx-house" in line for line in maps)


@pytest.mark.parametrize("absent", [0, 2])
def test_one_who_is_not_there_is_named_by_all(absent: int) -> None:
    began, before = time.monotonic(), _resources()
    found = together(cards(4), absent=(absent,))
    assert _resources() == before
    assert found.pop(absent) is None
    for error in found:
        assert isinstance(error, ConnectionError)
        assert f"rank {10 + absent} has the same host id, 'here', but cannot be reached" in str(error)
        assert "NCCLX_HOST_ID" in str(error)
    assert time.monotonic() - began < 10


def test_what_strangers_send_is_passed_over() -> None:
    local = cards(2)

    def stranger() -> None:
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as line, open("/dev/null") as other:
            socket_name = unix_name(local[1].token)
            line.connect(socket_name)
            line.send(b"x")
            socket.send_fds(line, [b"y" * 40], [other.fileno()])

    before = len(os.listdir("/proc/self/fd"))
    homes: list[Household] = together(local, before=stranger)
    homes[0].me.window.words[9] = 5
    assert homes[1].neighbour(10).window.words[9] == 5
    for home in homes:
        home.close()
    assert len(os.listdir("/proc/self/fd")) == before
