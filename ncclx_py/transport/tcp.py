"""Messages between hosts: one TCP connection per (sender, receiver, lane), opened by the sender when it first sends.

A data connection carries headers and payloads, one way. One more connection per pair, the control connection, carries
nothing but the reason of an abort; its end says that the peer's process is gone. All sockets are non-blocking, and are
served by whoever runs a plan: there is no thread.
"""

from __future__ import annotations

import contextlib
import errno
import os
import socket
import struct
from collections import deque
from collections.abc import Callable, Sequence
from functools import cache
from itertools import islice

import torch
from torch import Tensor

from ncclx_py.transport.identity import Card, reach
from ncclx_py.transport.poller import READABLE, WRITABLE, Poller
from ncclx_py.transport.signature import RECORD_BYTES
from ncclx_py.transport.tcp_info import link_facts

HEADER = struct.Struct(f"<4sIQQ{RECORD_BYTES}s")  # magic, call, digest, length, text of the signature
MAGIC = b"ncxm"
BOUNCE = 256 * 1024  # bytes that a reduction receives before it combines them

_HELLO = struct.Struct("<8s32sIi")  # magic, token of the rank that is called, rank that calls, lane
_HELLO_MAGIC = b"ncclx-1\0"
_CONTROL = -1  # in place of a lane
_FRAME = struct.Struct("<I")  # length of an abort text
_GATHER = 16  # buffers per system call

Lost = Callable[[int, str], None]
Heard = Callable[[str], None]


class Sender:
    """The sending end of a data connection. `flushed` of `queued` bytes have left the caller's memory."""

    def __init__(self, peer: int, connection: socket.socket, hello: bytes, lost: Lost) -> None:
        self.peer = peer
        self.queued = self.flushed = 0
        self.connection = connection
        self._queue: deque[memoryview] = deque()
        self._writable = False  # until the connection stands
        self._lost = lost
        self._put(memoryview(hello))

    def send(self, header: bytes, payload: memoryview | None) -> int:
        """Queues a message and sends what can be sent now; it has left when `flushed` reaches the returned number."""
        self._put(memoryview(header))
        if payload is not None:
            self._put(payload)
        target = self.queued
        self.flush()
        return target

    def flush(self) -> bool:
        """Sends what the kernel takes. True when that was something."""
        moved = False
        while self._queue and self._writable:
            try:
                count = self.connection.sendmsg(list(islice(self._queue, _GATHER)))
            except BlockingIOError:
                self._writable = False
                break
            except OSError as error:
                self._fail(error)
                break
            moved = True
            self.flushed += count
            self._drop(count)
        return moved

    def idle(self) -> bool:
        return not self._queue

    def on_event(self, mask: int) -> None:
        failed = self.connection.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
        if failed:
            self._fail(OSError(failed, os.strerror(failed)))
        elif mask & READABLE:  # the receiver never writes: this is the end
            self._fail(ConnectionResetError(errno.ECONNRESET, "connection closed"))
        elif mask & WRITABLE:
            self._writable = True

    def _put(self, piece: memoryview) -> None:
        self._queue.append(piece)
        self.queued += len(piece)

    def _drop(self, count: int) -> None:
        queue = self._queue
        while count:
            first = queue[0]
            if count < len(first):
                queue[0] = first[count:]
                return
            count -= len(first)
            queue.popleft()

    def _fail(self, error: OSError) -> None:
        self._writable = False
        self._lost(self.peer, lost_text(error))


class Receiver:
    """The receiving end of a data connection: headers and payloads, in pieces as they come."""

    def __init__(self, peer: int, connection: socket.socket, lost: Lost) -> None:
        self.peer = peer
        self.got = 0  # bytes of the payload of the open message
        self._connection = connection
        self._ready = True
        self._lost = lost
        self._header = bytearray(HEADER.size)
        self._header_got = 0
        self._bounce: Tensor | None = None

    @property
    def ready(self) -> bool:
        """Whether a read may find something."""
        return self._ready

    def header(self) -> tuple[bytes, int, int, int, bytes] | None:
        """The header of the open message (magic, call, digest, length, text); None while it has not come."""
        while self._header_got < HEADER.size:
            count = self.read(memoryview(self._header)[self._header_got :])
            if not count:
                return None
            self._header_got += count
        return HEADER.unpack(self._header)

    def read(self, target: memoryview) -> int:
        """Reads into a non-empty `target`; 0 when there is nothing now."""
        if not self._ready:
            return 0
        try:
            count = self._connection.recv_into(target)
        except BlockingIOError:
            self._ready = False
            return 0
        except OSError as error:
            self._ready = False
            self._lost(self.peer, lost_text(error))
            return 0
        if not count:
            self._ready = False
            self._lost(self.peer, "it closed its connection: it exited, was killed or left the group")
        return count

    def bounce(self) -> Tensor:
        """`BOUNCE` bytes for the pieces of a message that is reduced as it comes."""
        if self._bounce is None:
            with torch.inference_mode(False):
                self._bounce = torch.empty(BOUNCE, dtype=torch.uint8)
        return self._bounce

    def close_message(self) -> None:
        self.got = self._header_got = 0

    def on_event(self, mask: int) -> None:
        if mask & READABLE:
            self._ready = True


class _Control:
    """Either end of a control connection."""

    def __init__(self, peer: int, connection: socket.socket, hello: bytes, lost: Lost, heard: Heard) -> None:
        self._peer = peer
        self._connection = connection
        self._to_send = hello
        self._received = b""
        self._lost, self._heard = lost, heard

    def tell(self, text: str) -> None:
        encoded = text.encode()
        self._to_send += _FRAME.pack(len(encoded)) + encoded
        with contextlib.suppress(OSError):
            self._flush()

    def on_event(self, mask: int) -> None:
        try:
            if mask & WRITABLE:
                self._flush()
            if mask & READABLE:
                self._read()
        except OSError as error:
            self._lost(self._peer, lost_text(error))

    def _flush(self) -> None:
        with contextlib.suppress(BlockingIOError):
            if self._to_send:
                self._to_send = self._to_send[self._connection.send(self._to_send) :]

    def _read(self) -> None:
        while True:
            try:
                piece = self._connection.recv(4096)
            except BlockingIOError:
                return
            if not piece:
                self._lost(self._peer, "it closed its connection: it exited, was killed or left the group")
                return
            self._received += piece
            if len(self._received) >= _FRAME.size:
                (length,) = _FRAME.unpack_from(self._received)
                if len(self._received) >= _FRAME.size + length:
                    self._heard(self._received[_FRAME.size : _FRAME.size + length].decode(errors="replace"))


class Network:
    """All connections of this rank to ranks of other hosts.

    `rail` is the rail that this rank sends on. `lost(rank, why)` is called when a peer's process is gone, `heard(text)`
    when a peer has aborted.
    """

    def __init__(self, server: socket.socket, cards: Sequence[Card], rank: int, rail: int, poller: Poller) -> None:
        self._server = server
        self._cards, self._rank, self._rail = cards, rank, rail
        self._poller = poller
        self._senders: dict[tuple[int, int], Sender] = {}
        self._receivers: dict[tuple[int, int], Receiver] = {}
        self._controls: dict[int, list[_Control]] = {}
        self._sockets: list[socket.socket] = []
        self._lost: Lost = lambda rank, why: None
        self._heard: Heard = lambda text: None
        server.setblocking(False)

    def start(self, lost: Lost, heard: Heard) -> None:
        self._lost, self._heard = lost, heard
        self._poller.register(self._server.fileno(), self._accept)

    def sender(self, peer: int, lane: int) -> Sender:
        """The connection to send on, opened if it does not stand."""
        known = self._senders.get((peer, lane))
        if known is None:
            self.watch(peer)
            connection, hello = self._connect(peer, lane)
            known = self._senders[peer, lane] = Sender(peer, connection, hello, self._lost)
            self._poller.register(connection.fileno(), known.on_event)
        return known

    def receiver(self, peer: int, lane: int) -> Receiver | None:
        """The connection to receive from, None while the peer has not opened it."""
        return self._receivers.get((peer, lane))

    def watch(self, peer: int) -> None:
        """Opens a control connection, if there is none yet: from then on the end of the peer's process is noticed."""
        if peer not in self._controls:
            connection, hello = self._connect(peer, _CONTROL)
            self._control(peer, connection, hello)

    def tell(self, text: str) -> None:
        """Tells every rank with a control connection that the group is aborted, without waiting."""
        for controls in list(self._controls.values()):
            for control in controls:
                control.tell(text)

    def links(self) -> list[dict[str, int]]:
        """What the kernel knows of each connection that sends, with its `peer`."""
        facts = [(peer, link_facts(sender.connection)) for (peer, _), sender in list(self._senders.items())]
        return [{"peer": peer, **known} for peer, known in facts if known is not None]

    def forget_sockets(self) -> None:
        """In a forked child: closes its copies. The poller is the parent's, and stays as it is."""
        for one in [self._server, *self._sockets]:
            one.close()

    def close(self) -> None:
        for one in [self._server, *self._sockets]:
            if one.fileno() >= 0:
                self._poller.unregister(one.fileno())
                one.close()
        self._sockets.clear()

    def _connect(self, peer: int, lane: int) -> tuple[socket.socket, bytes]:
        me, card = self._cards[self._rank], self._cards[peer]
        address = reach(me, card, self._rail)
        connection = socket.socket(socket.AF_INET6 if ":" in address else socket.AF_INET, socket.SOCK_STREAM)
        self._sockets.append(connection)
        self._prepare(connection)
        if me.rails_named:
            connection.bind((me.addresses[self._rail], 0))
        failed = connection.connect_ex((address, card.port))
        if failed not in (0, errno.EINPROGRESS):
            self._lost(peer, lost_text(OSError(failed, os.strerror(failed))))
        return connection, _HELLO.pack(_HELLO_MAGIC, card.token.encode(), self._rank, lane)

    def _prepare(self, connection: socket.socket) -> None:
        connection.setblocking(False)
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

    def _control(self, peer: int, connection: socket.socket, hello: bytes) -> None:
        control = _Control(peer, connection, hello, self._lost, self._heard)
        self._controls.setdefault(peer, []).append(control)
        self._poller.register(connection.fileno(), control.on_event)

    def _accept(self, mask: int) -> None:
        while True:
            try:
                connection, _ = self._server.accept()
            except BlockingIOError:
                return
            self._prepare(connection)
            self._sockets.append(connection)
            arrival = _Arrival(connection, self._admit)
            self._poller.register(connection.fileno(), arrival.on_event)

    def _admit(self, connection: socket.socket, hello: bytes) -> None:
        """Makes a connection what its first bytes say that it is; strangers are turned away."""
        self._poller.unregister(connection.fileno())
        peer, lane = self._caller(hello)
        if peer < 0 or (peer, lane) in self._receivers:
            self._sockets.remove(connection)
            connection.close()
        elif lane == _CONTROL:
            self._control(peer, connection, b"")
        else:
            receiver = self._receivers[peer, lane] = Receiver(peer, connection, self._lost)
            self._poller.register(connection.fileno(), receiver.on_event)

    def _caller(self, hello: bytes) -> tuple[int, int]:
        if len(hello) == _HELLO.size:
            magic, token, peer, lane = _HELLO.unpack(hello)
            if magic == _HELLO_MAGIC and token == self._cards[self._rank].token.encode() and peer < len(self._cards):
                return peer, lane
        return -1, 0


class _Arrival:
    """A connection that has not said yet who it is."""

    def __init__(self, connection: socket.socket, admit: Callable[[socket.socket, bytes], None]) -> None:
        self._connection, self._admit = connection, admit
        self._hello = b""

    def on_event(self, mask: int) -> None:
        if not mask & READABLE:
            return
        try:
            while len(self._hello) < _HELLO.size:
                piece = self._connection.recv(_HELLO.size - len(self._hello))
                if not piece:
                    break
                self._hello += piece
        except BlockingIOError:
            return
        except OSError:
            self._hello = b""
        self._admit(self._connection, self._hello)


def listen() -> socket.socket:
    """A listening socket on every address of this host, on a free port."""
    server = socket.socket(socket.AF_INET6 if _dual_stack() else socket.AF_INET, socket.SOCK_STREAM)
    if server.family == socket.AF_INET6:
        server.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
    server.bind(("", 0))
    server.listen(1024)
    return server


@cache
def _dual_stack() -> bool:
    return socket.has_dualstack_ipv6()


def lost_text(error: OSError) -> str:
    if error.errno == errno.ECONNREFUSED:
        return "it refuses connections: it exited, was killed or left the group"
    return f"the connection to it broke ({error.strerror or error}): it exited, was killed or left the group"
