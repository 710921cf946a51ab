"""Mailboxes without a group: frames in any pieces, strangers, what is kept unasked, and a connection that talks nonsense."""

from __future__ import annotations

import contextlib
import random
import socket
import time
from collections.abc import Iterator
from datetime import timedelta

import pytest
import torch

from ncclx_py.errors import Call
from ncclx_py.transport.doors import HELLO, Doors
from ncclx_py.transport.identity import Card
from ncclx_py.transport.letters import DATA, EAGER, HAVE, WANT, Inlet, Letter, frame
from ncclx_py.transport.mail import Mailbox

pytestmark = pytest.mark.unit


class Pair:
    """Two mailboxes in this process, on one host or on two."""

    def __init__(self, hosts: tuple[str, str]) -> None:
        doors = [Doors(), Doors()]
        self.cards = [
            Card(rank, hosts[rank], "here", ("127.0.0.1",), False, 1, f"{id(self) + rank:032x}", mail=doors[rank].port)
            for rank in range(2)
        ]
        for rank, door in enumerate(doors):
            door.open(self.cards[rank].token)
        self.boxes = [Mailbox(rank, self.cards, doors[rank], 0) for rank in range(2)]
        for box in self.boxes:
            box.timeout = lambda: timedelta(seconds=10)

    def send(self, rank: int, tensor: torch.Tensor, tag: int = 0) -> Letter:
        call = Call("send", "g", rank, 2, 1, message=True, peer=1 - rank)
        return self.boxes[rank].send(tensor, tensor.dtype, 1 - rank, tag, call)

    def receive(self, rank: int, tensor: torch.Tensor, tag: int = 0) -> Letter:
        call = Call("recv", "g", rank, 2, 1, message=True, peer=1 - rank)
        return self.boxes[rank].receive(tensor, tensor.dtype, 1 - rank, tag, call)


@pytest.fixture(params=[("a", "a"), ("a", "b")], ids=["one host", "two hosts"])
def pair(request: pytest.FixtureRequest) -> Iterator[Pair]:
    made = Pair(request.param)
    yield made
    for box in made.boxes:
        box.close("the test is over")


class Heard:
    """A reader that keeps what comes. Bodies of DATA go to a letter of the announced size."""

    def __init__(self) -> None:
        self.frames: list[tuple[int, int, int, bytes]] = []
        self.bodies: list[torch.Tensor] = []
        self.why = ""

    def arrived(self, peer: int, kind: int, tag: int, size: int, dtype: bytes, body: bytes) -> None:
        self.frames.append((kind, tag, size, body))

    def arriving(self, peer: int, tag: int, size: int) -> Letter | None:
        if tag == 13:
            return None
        tensor = torch.zeros(size, dtype=torch.uint8)
        self.bodies.append(tensor)
        call = Call("recv", "g", 0, 2, 1, message=True, peer=1)
        return Letter(Mailbox.__new__(Mailbox), tensor, tensor.dtype, 1, tag, call)

    def filled(self, letter: Letter) -> None:
        self.frames.append((DATA, letter.tag, letter.size, b""))

    def ended(self, peer: int, why: str) -> None:
        self.why = why


@pytest.mark.parametrize("seed", range(3))
def test_frames_come_through_in_any_pieces(seed: int) -> None:
    draw = random.Random(seed)
    stream, expected, bodies = b"", [], []
    for tag in range(60):
        kind, size = draw.choice((WANT, HAVE, EAGER, DATA)), draw.choice((0, 1, 100, 5000, 100_000))
        size = min(size, 8192) if kind == EAGER else size
        body = draw.randbytes(size) if kind in (EAGER, DATA) else b""
        tag = tag + 100
        stream += frame(kind, tag, size, b"uint8") + body
        expected.append((kind, tag, size, body if kind == EAGER else b""))
        bodies += [body] if kind == DATA else []
    ours, theirs = socket.socketpair()
    ours.setblocking(False)
    heard = Heard()
    inlet = Inlet(1, ours, heard)
    while stream:
        count = draw.choice((1, 7, 39, 41, 1000, 60_000, 150_000))
        theirs.sendall(stream[:count])
        stream = stream[count:]
        for _ in range(3):
            inlet.on_event(0)
    theirs.close()
    for _ in range(5):
        inlet.on_event(0)
    ours.close()
    assert heard.frames == expected
    assert [bytes(tensor.numpy()) for tensor in heard.bodies] == bodies
    assert "closed its connection" in heard.why


@pytest.mark.parametrize(
    "wrong", [frame(0), frame(8, 1), frame(EAGER, 1, 1 << 40), frame(DATA, 13, 4) + b"1234", b"\xff" * 40]
)
def test_nonsense_ends_a_connection(wrong: bytes) -> None:
    ours, theirs = socket.socketpair()
    heard = Heard()
    theirs.sendall(frame(WANT, 1) + wrong)
    Inlet(1, ours, heard).on_event(0)
    ours.close()
    theirs.close()
    assert [kind for kind, *_ in heard.frames] == [WANT]
    assert "no message of this group" in heard.why


def test_messages_go_both_ways_and_nothing_is_left(pair: Pair) -> None:
    big, got = torch.arange(300_000.0), torch.zeros(300_000)
    sent = pair.send(0, big)
    pair.receive(1, got).wait()
    assert sent.wait()
    assert torch.equal(big, got)
    answer = pair.receive(0, got[:3], 9)
    pair.send(1, torch.tensor([3.0, 2.0, 1.0]), 9).wait()
    answer.wait()
    assert got[:3].tolist() == [3.0, 2.0, 1.0]


def test_strangers_are_turned_away(pair: Pair) -> None:
    card = pair.cards[1]
    pending = pair.receive(1, torch.zeros(1), 1)  # somebody looks at what comes
    for hello in (
        HELLO.pack(b"ncclxm1\0", b"0" * 32, 0),
        HELLO.pack(b"ncclxm1\0", card.token.encode(), 1),
        HELLO.pack(b"ncclxm1\0", card.token.encode(), 2),
        HELLO.pack(b"ncclxm1\0", card.token.encode(), -1),
        HELLO.pack(b"ncclx-1\0", card.token.encode(), 0),
        b"GET / HTTP/1.1\r\nHost: localhost\r\n" + b"x" * 40,
    ):
        if card.host == pair.cards[0].host:
            stranger = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
            stranger.connect(f"\0ncclx-mail-{card.token}")
        else:
            stranger = socket.create_connection(("127.0.0.1", card.mail))
        with stranger:
            stranger.settimeout(5)
            stranger.sendall(hello + frame(EAGER, 1, 4, b"float32") + b"1234")
            with contextlib.suppress(ConnectionResetError):
                assert stranger.recv(1) == b""
    assert not pending.is_completed()
    pair.send(0, torch.tensor([5.0]), 1).wait()
    assert pending.wait()


def test_little_is_kept_of_what_nobody_asked_for(pair: Pair) -> None:
    first = pair.receive(1, torch.zeros(1), 1)
    pair.send(0, torch.ones(1), 1)
    first.wait()
    letters = [pair.send(0, torch.full((1000,), number, dtype=torch.uint8)) for number in range(200)]
    time.sleep(0.1)
    pair.receive(1, torch.zeros(1), 2)  # has the other end look at what came
    time.sleep(0.3)
    haves = pair.boxes[1]._sorter.peers[0].slots[0].haves
    assert len(haves) == 200
    assert 60_000 < sum(len(have.body) for have in haves if have.body is not None) <= 65_536
    assert not any(letter.is_completed() for letter in letters)
    for number in range(200):
        tensor = torch.zeros(1000, dtype=torch.uint8)
        pair.receive(1, tensor).wait()
        assert (tensor == number).all()
    assert all(letter.wait() for letter in letters)


def test_a_receive_that_is_through_has_told_its_sender(pair: Pair) -> None:
    """The answer goes over a connection that is only being made when the body is there already."""
    sent = pair.send(0, torch.tensor([6.0]), 3)
    got = torch.zeros(1)
    call = Call("recv_any_source", "g", 1, 2, 1, message=True)
    pair.boxes[1].receive(got, got.dtype, -1, 3, call).wait()
    assert sent.wait(timedelta(seconds=5))
    assert got.item() == 6.0
