"""Shared memory in one process: the channels between two windows, the segments of one, and the arena."""

from __future__ import annotations

import gc
import itertools
import os
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from ncclx_py.transport import house as houses
from ncclx_py.transport.bells import Bell, hear
from ncclx_py.transport.channels import IN_ARENA, Inbox, Neighbour, Outbox
from ncclx_py.transport.house import House
from ncclx_py.transport.memory import Mapping, bytes_at
from ncclx_py.transport.segments import Segments
from ncclx_py.transport.window import ASLEEP, CALLS, PAGE, RING

pytestmark = pytest.mark.unit


class Pair:
    """Two ranks, each with its own map of the house."""

    def __init__(self) -> None:
        self.descriptor = houses.create("test-house", 2)
        self.houses = [House(self.descriptor, 2) for _ in range(2)]
        self.arenas = [house.own_arena(place) for place, house in enumerate(self.houses)]
        self.maps = [house.window(place) for place, house in enumerate(self.houses)]
        self.maps += [house.window(1 - place) for place, house in enumerate(self.houses)]  # the neighbour's
        self.lent = [self.houses[1].arena(0), self.houses[0].arena(1)]
        self.names = [f"\0ncclx-test-{os.getpid()}-{place}" for place in range(2)]
        self.lines = [socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) for _ in range(2)]
        for line, name in zip(self.lines, self.names):
            line.bind(name)
            line.setblocking(False)

    def neighbour(self, place: int, seen_by: int) -> Neighbour:
        if place == seen_by:
            return Neighbour(place, place, self.maps[place], self.arenas[place])
        return Neighbour(place, place, self.maps[2 + seen_by], self.lent[place])

    def channel(self, lane: int = 0) -> tuple[Outbox, Inbox]:
        at_receiver = Bell(self.lines[0], self.names[1], self.neighbour(1, 0).window)
        at_sender = Bell(self.lines[1], self.names[0], self.neighbour(0, 1).window)
        outbox = Outbox(self.neighbour(0, 0), self.neighbour(1, 0), lane, at_receiver)
        return outbox, Inbox(self.neighbour(1, 1), self.neighbour(0, 1), lane, at_sender)

    def close(self) -> None:
        for line in self.lines:
            line.close()
        for window in self.maps:
            window.close()
        for house in self.houses:
            house.close()
        os.close(self.descriptor)


def byte_waits(line: socket.socket) -> bool:
    try:
        return len(line.recv(1, socket.MSG_PEEK)) == 1
    except BlockingIOError:
        return False


@pytest.fixture
def pair() -> Iterator[Pair]:
    made = Pair()
    yield made
    made.close()


def test_messages_arrive_in_order_and_are_taken_one_by_one(pair: Pair) -> None:
    outbox, inbox = pair.channel(lane=63)
    other, _ = pair.channel(lane=62)
    other.post(1, 1, 1, 1)
    assert not inbox.ready()
    start = pair.maps[0].data_start
    pair.maps[0]._bytes[start : start + 5] = b"hello"
    outbox.post(start, 5, 2**64 - 1, 7)
    outbox.post(start + IN_ARENA, 6, 3, 8)
    address, length, digest, call = inbox.message()
    assert bytes(bytes_at(address, length)) == b"hello"
    assert (digest, call) == (2**64 - 1, 7)
    assert not outbox.consumed(1)
    inbox.consume()
    assert outbox.consumed(1)
    assert not outbox.consumed(2)
    assert inbox.message() == (pair.lent[0].address + start, 6, 3, 8)
    inbox.consume()
    assert not inbox.ready()


def test_what_the_ring_cannot_take_waits_and_keeps_its_order(pair: Pair) -> None:
    outbox, inbox = pair.channel()
    for number in range(3 * RING):
        outbox.post(number, number, number, number)
    assert outbox.count == 3 * RING
    assert len(outbox.backlog) == 2 * RING
    assert not outbox.drain()
    taken = []
    while inbox.ready():
        taken.append(inbox.message()[1])
        inbox.consume()
        if len(taken) % 5 == 0:
            outbox.drain()
        outbox.drain()
    assert taken == list(range(3 * RING))
    assert not outbox.backlog


def test_a_channel_goes_on_where_it_stood(pair: Pair) -> None:
    outbox, inbox = pair.channel()
    outbox.post(0, 1, 2, 3)
    again, reader = pair.channel()
    assert again.count == 1
    again.post(0, 9, 2, 3)
    inbox.consume()
    assert reader.message()[1] == 1
    _, later = pair.channel()
    assert later.message()[1] == 9


def test_the_text_of_an_abort_is_cut_to_its_page(pair: Pair) -> None:
    assert pair.maps[3].abort_text() == ""
    pair.maps[0].set_abort_text("ü" * PAGE)
    assert pair.maps[3].abort_text().startswith("üü")
    pair.maps[0].set_call(5, b"all_reduce")
    assert pair.maps[3].call(5) == "all_reduce"
    assert pair.maps[3].call(5 + CALLS) == "all_reduce"


class Receiver:
    """Stands for an outbox whose receiver takes what it is told to."""

    peer = 3

    def __init__(self) -> None:
        self.taken = 0

    def consumed(self, count: int) -> bool:
        return self.taken >= count


def test_a_segment_is_free_when_its_receivers_have_taken_everything(pair: Pair) -> None:
    window = pair.maps[0]
    segments, receiver = Segments(window), Receiver()
    first = segments.find(1000, 0)
    assert first == window.data_start
    segments.use(first, 1000, 0, ((receiver, 1),))  # type: ignore[arg-type]
    second = segments.find(1000, 1)
    assert second >= first + 1000
    assert second % 256 == 0
    segments.use(second, 1000, 1, ((receiver, 2),))  # type: ignore[arg-type]
    assert segments.blockers() == [3]
    receiver.taken = 1
    assert segments.find(1000, 2) == first
    assert segments.find(2000, 2) >= second + 1000, "the gap is too small"
    receiver.taken = 2
    assert segments.find(2000, 2) == first
    assert segments.blockers() == []


def test_large_calls_wait_for_the_ones_before(pair: Pair) -> None:
    segments, receiver = Segments(pair.maps[0]), Receiver()
    start = segments.find(100 << 20, 0)
    assert start >= 0
    segments.use(start, 100 << 20, 0, ((receiver, 1),))  # type: ignore[arg-type]
    assert segments.find(1 << 20, 1) == -1
    assert segments.find(0, 1) >= 0, "a call that needs no room waits for none"
    receiver.taken = 1
    assert segments.find(1 << 20, 1) == start


def test_nobody_runs_further_ahead_than_the_texts_of_calls_last(pair: Pair) -> None:
    segments, receiver = Segments(pair.maps[0]), Receiver()
    for call in range(CALLS):
        segments.use(segments.find(8, call), 8, call, ((receiver, call + 1),))  # type: ignore[arg-type]
    assert segments.find(8, CALLS) == -1
    receiver.taken = 1
    assert segments.find(8, CALLS) >= 0


def test_more_than_the_machine_has_is_refused(pair: Pair) -> None:
    with pytest.raises(MemoryError, match="more than this machine has memory"):
        Segments(pair.maps[0]).find(pair.maps[0].size, 0)


def test_memory_beyond_what_the_window_keeps_is_given_back(pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NCCLX_WINDOW_MB", "1")
    window, receiver = pair.maps[0], Receiver()
    segments = Segments(window)
    start = segments.find(4 << 20, 0)
    window._bytes[start : start + (4 << 20)] = bytes(4 << 20)
    assert _blocks(pair.descriptor) >= 4 << 20
    segments.use(start, 4 << 20, 0, ((receiver, 1),))  # type: ignore[arg-type]
    segments.find(8, 1)
    assert _blocks(pair.descriptor) >= 4 << 20, "it is still being read"
    receiver.taken = 1
    segments.find(8, 1)
    assert _blocks(pair.descriptor) <= (1 << 20) + 4 * PAGE


def _blocks(descriptor: int) -> int:
    return os.fstat(descriptor).st_blocks * 512


@pytest.mark.parametrize("text", ["0", "-3", "many", ""])
def test_a_senseless_window_size_is_refused(pair: Pair, monkeypatch: pytest.MonkeyPatch, text: str) -> None:
    monkeypatch.setenv("NCCLX_WINDOW_MB", text)
    with pytest.raises(ValueError, match="must be a positive number of MiB"):
        Segments(pair.maps[0])


def test_the_memory_of_a_tensor_is_free_when_the_last_view_is_gone(pair: Pair) -> None:
    fd, arena = pair.descriptor, pair.arenas[0]
    tensor = arena.allocate((3, 5), torch.bfloat16)
    assert tensor.shape == (3, 5)
    assert tensor.dtype == torch.bfloat16
    first = arena.offset(tensor.data_ptr())
    assert first == 0
    other = arena.allocate((1 << 20,), torch.float32).fill_(2.0)
    assert arena.offset(other.data_ptr()) > first
    view = other[5:].view(torch.int32)
    del other
    gc.collect()
    assert arena.offset(arena.allocate((1 << 20,), torch.float32).data_ptr()) > arena.offset(view.data_ptr())
    place = view.data_ptr() - 20
    assert _blocks(fd) >= 4 << 20
    del view
    gc.collect()
    assert _blocks(fd) < 4 << 20
    assert arena.allocate((1 << 20,), torch.float32).data_ptr() == place
    assert arena.offset(torch.zeros(3).data_ptr()) == -1


def test_freed_pieces_of_an_arena_join(pair: Pair) -> None:
    arena = pair.arenas[0]
    tensors = [arena.allocate((1000,), torch.float32) for _ in range(5)]
    places = [tensor.data_ptr() for tensor in tensors]
    for index in (1, 3, 2):
        tensors[index] = torch.empty(0)
    assert arena.allocate((3000,), torch.float32).data_ptr() == places[1]
    tensors.clear()
    assert arena.allocate((0,), torch.float64).numel() == 0
    assert arena._free == [(0, arena.size)]


def test_an_arena_that_is_full_says_so(pair: Pair) -> None:
    arena = pair.arenas[0]
    with pytest.raises(MemoryError, match="in one piece left"):
        arena.allocate((arena.size + 1,), torch.uint8)


def test_a_tensor_outlives_its_arena() -> None:
    fd = houses.create("test-outlived", 3)
    house = House(fd, 3)
    os.close(fd)
    arena = house.own_arena(1)
    whole = mapped("test-outlived")
    tensor = arena.allocate((1000,), torch.float32)
    house.close()
    assert mapped("test-outlived") == arena.size < whole / 5, "the rest of the house is let go"
    tensor.fill_(4.0)
    assert tensor.sum() == 4000
    with pytest.raises(RuntimeError, match="has been destroyed"):
        arena.allocate((1,), torch.float32)
    del tensor
    gc.collect()
    assert not mapped("test-outlived")


def mapped(name: str) -> int:
    """Bytes of address space over the memory of that name."""
    ranges = [line.split()[0].split("-") for line in Path("/proc/self/maps").read_text().splitlines() if name in line]
    return sum(int(stop, 16) - int(start, 16) for start, stop in ranges)


def test_a_house_keeps_no_descriptor_and_ends_when_it_is_closed(tmp_path: Path) -> None:
    """A descriptor or two for each neighbour would take a process past 64 of them."""
    before = len(os.listdir("/proc/self/fd"))
    fd = houses.create("test-lean", 5)
    mine, lent = House(fd, 5), House(fd, 5)
    os.close(fd)
    assert len(os.listdir("/proc/self/fd")) == before
    windows = [house.window(4) for house in (mine, lent)]
    windows[0].words[7] = 1 << 63
    assert windows[1].words[7] == 1 << 63
    arena = mine.own_arena(4)
    assert mine.window(4).size - mine.window(4).data_start == arena.size >= 1 << 30
    assert Path("/proc/self/maps").read_text().count("test-lean") == 2
    for window in windows:
        window.close()
    mine.close()
    lent.close()
    arena.close()
    assert not mapped("test-lean")
    with pytest.raises(ValueError, match="released"):
        windows[1].abort_text()
    empty = tmp_path / "empty"
    empty.touch()
    with empty.open("r+b") as file, pytest.raises(OSError, match="0 bytes of shared memory cannot be mapped"):
        Mapping(file.fileno())


def test_windows_and_arenas_of_a_house_do_not_touch() -> None:
    """At its ends each is written through one map, and read through another."""
    fd = houses.create("test-rooms", 3)
    one, other = House(fd, 3), House(fd, 3)
    os.close(fd)
    rooms = [(kind, place) for kind in ("window", "arena") for place in range(3)]
    for number, (kind, place) in enumerate(rooms):
        room = getattr(one, kind)(place)
        for at in (0, room.size - 1):
            bytes_at(room.address + at, 1).cast("B")[0] = number + 1
    one.aborted[2] = 1
    extents = sorted((room.address, room.address + room.size) for room in (getattr(one, k)(p) for k, p in rooms))
    assert all(stop <= start for (_, stop), (start, _) in itertools.pairwise(extents))
    for number, (kind, place) in enumerate(rooms):
        room = getattr(other, kind)(place)
        assert [bytes_at(room.address + at, 1).cast("B")[0] for at in (0, room.size - 1)] == [number + 1] * 2
    assert list(other.aborted) == [0, 0, 1]
    one.close()
    other.close()


def test_a_message_wakes_only_a_sleeping_receiver(pair: Pair) -> None:
    outbox, _ = pair.channel()
    outbox.post(0, 8, 1, 0)
    assert not byte_waits(pair.lines[1])
    pair.maps[1].words[ASLEEP] = 1
    outbox.post(0, 8, 1, 0)
    assert byte_waits(pair.lines[1])
    hear(pair.lines[1])
    assert not byte_waits(pair.lines[1])


def test_taking_a_message_wakes_a_sleeping_sender(pair: Pair) -> None:
    outbox, inbox = pair.channel()
    outbox.post(0, 8, 1, 0)
    pair.maps[0].words[ASLEEP] = 1
    assert inbox.ready()
    inbox.consume()
    assert byte_waits(pair.lines[0])
