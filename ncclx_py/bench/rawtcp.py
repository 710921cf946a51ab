"""A raw TCP transfer from one host to another, one stream per rail: what links really carry, to print beside a bound."""

from __future__ import annotations

import socket
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

import torch.distributed as dist

from ncclx_py.bench.timing import Times, times_of
from ncclx_py.small_messages import broadcast_json

_LEAD = 256 * 1024  # bytes before the clock starts: more than a shaped link lets pass for free
_CHUNK = 1 << 20
_DEADLINE = 60.0


class RawTransfer:
    """Streams between two ranks; all ranks of `control` construct it, call `times` and `close` together.

    `addresses[r]` are rank r's, one per rail. Raises OSError where the receiver cannot be reached.
    """

    def __init__(
        self, control: dist.ProcessGroup, sender: int, receiver: int, addresses: Sequence[Sequence[str]]
    ) -> None:
        self._control, self._sends = control, dist.get_rank(control) == sender
        self._receives = dist.get_rank(control) == receiver
        self._streams: list[socket.socket] = []
        self._sender = sender
        listeners = [socket.create_server((address, 0)) for address in addresses[receiver]] if self._receives else []
        where = broadcast_json([listener.getsockname()[:2] for listener in listeners], receiver, control)
        if self._sends:
            self._streams = [
                socket.create_connection(tuple(target), _DEADLINE, source_address=(mine, 0))
                for target, mine in zip(where, addresses[sender])
            ]
        for listener in listeners:
            listener.settimeout(_DEADLINE)
            self._streams.append(listener.accept()[0])
            listener.close()
        for stream in self._streams:
            stream.settimeout(_DEADLINE)
            stream.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

    def times(self, per_rail: Sequence[int], repeats: int) -> Times:
        """Seconds until the receiver has confirmed `per_rail[i]` bytes on every rail i; the same answer on all ranks."""
        move = self._send if self._sends else self._receive
        samples = []
        with ThreadPoolExecutor(max(1, len(self._streams))) as threads:
            together = threads.map if len(self._streams) > 1 else map
            for _ in range(repeats):
                list(together(move, self._streams, [_LEAD] * len(self._streams)))
                start = time.perf_counter()
                list(together(move, self._streams, per_rail))
                samples.append(time.perf_counter() - start)
        return times_of([broadcast_json(samples, self._sender, self._control)])

    def close(self) -> None:
        for stream in self._streams:
            stream.close()

    @staticmethod
    def _send(stream: socket.socket, count: int) -> None:
        block = memoryview(bytes(min(count, _CHUNK)))
        left = count
        while left:
            left -= stream.send(block[: min(left, _CHUNK)])
        if stream.recv(1) != b"k":
            raise ConnectionError("The receiver of the raw transfer closed its connection.")

    @staticmethod
    def _receive(stream: socket.socket, count: int) -> None:
        block = bytearray(_CHUNK)
        left = count
        while left:
            got = stream.recv_into(block, min(left, _CHUNK))
            if not got:
                raise ConnectionError("The sender of the raw transfer closed its connection.")
            left -= got
        stream.sendall(b"k")
