"""Operations between hosts, over TCP."""

from __future__ import annotations

from ncclx_py.transport.memory import bytes_at
from ncclx_py.transport.operations import DONE, STARTED, Mismatch, Operation, Run, difference
from ncclx_py.transport.tcp import BOUNCE, Receiver, Sender


class RemoteSend(Operation):
    __slots__ = ("_buffer", "_lane", "_length", "_sender", "_start")

    def __init__(self, index: int, peer: int, lane: int, buffer: int, start: int, length: int) -> None:
        super().__init__(index, peer)
        self._lane, self._buffer, self._start, self._length = lane, buffer, start, length
        self._sender: Sender | None = None

    def advance(self, run: Run) -> bool:
        sender = self._sender
        if sender is None:
            assert run.network is not None
            assert self.peer is not None
            sender = self._sender = run.network.sender(self.peer, self._lane)
        payload = bytes_at(run.address[self._buffer] + self._start, self._length) if self._length else None
        run.target[self.index] = sender.send(run.head(self._length), payload)
        run.done[self.index] = STARTED
        if not sender.idle():
            run.senders.add(sender)
        return True

    def complete(self, run: Run) -> bool:
        return self._sender is not None and self._sender.flushed >= run.target[self.index]


class RemoteReceive(Operation):
    __slots__ = ("_buffer", "_lane", "_length", "_receiver", "_start")

    def __init__(self, index: int, peer: int, lane: int, buffer: int, start: int, length: int) -> None:
        super().__init__(index, peer)
        self._lane, self._buffer, self._start, self._length = lane, buffer, start, length
        self._receiver: Receiver | None = None

    def advance(self, run: Run) -> bool:
        receiver = self._receiver
        if receiver is None:
            assert run.network is not None
            assert self.peer is not None
            receiver = self._receiver = run.network.receiver(self.peer, self._lane)
            if receiver is None:
                return False
        if not receiver.ready:
            return False
        header = receiver.header()
        if header is None:
            return False
        if header[2] != run.digest or header[3] != self._length:
            text = header[4].rstrip(b"\0").decode(errors="replace")
            raise Mismatch(difference(receiver.peer, text, header[2], header[3], run, self._length))
        if not self._fetch(run, receiver):
            return False
        receiver.close_message()
        run.done[self.index] = DONE
        return True

    def _fetch(self, run: Run, receiver: Receiver) -> bool:
        """Receives the payload as far as it has come. True when it is complete."""
        address = run.address[self._buffer] + self._start
        while receiver.got < self._length:
            count = receiver.read(bytes_at(address + receiver.got, self._length - receiver.got))
            if not count:
                return False
            run.moved = True
            receiver.got += count
        return True


class RemoteReduce(RemoteReceive):
    """Receives piece by piece, and combines each while the kernel receives the next."""

    __slots__ = ()

    def _fetch(self, run: Run, receiver: Receiver) -> bool:
        bounce = receiver.bounce()
        while receiver.got < self._length:
            start = receiver.got // BOUNCE * BOUNCE
            size = min(BOUNCE, self._length - start)
            inside = receiver.got - start
            count = receiver.read(bytes_at(bounce.data_ptr() + inside, size - inside))
            if not count:
                return False
            run.moved = True
            receiver.got += count
            if inside + count == size:
                target = run.views(run.address[self._buffer] + self._start + start, size)
                run.combine(target, run.views(bounce.data_ptr(), size))
        return True
