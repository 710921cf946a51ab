"""A message between two ranks while it is on its way, and what travels over a connection of mailboxes (``mail.py``).

A connection carries frames one way: a header and, for some kinds, a body. Per tag, messages are matched in the order in
which they were posted at each end:

    receiver → sender   WANT      a receive has been posted
    sender → receiver   HAVE      a send has been posted that nobody has asked for yet
                        EAGER     the same with the body, where it is short; the send has ended when its WANT comes
                        DATA      the body, once there was a WANT
                        MISFIT    in place of DATA: the sizes or dtypes of the two ends differ
    both                LEFT      the rank has left the group
                        ABORTED   the group has been aborted; the body says why
"""

from __future__ import annotations

import math
import socket
import struct
from collections.abc import Callable
from datetime import timedelta
from typing import Protocol

import torch
from torch import Tensor

from ncclx_py.ending import Ending
from ncclx_py.errors import Call, CollectiveError
from ncclx_py.transport.memory import bytes_at
from ncclx_py.transport.tcp import lost_text

HEADER = struct.Struct("<B7xQQ16s")  # kind, tag, bytes, dtype
WANT, HAVE, EAGER, DATA, MISFIT, LEFT, ABORTED = range(1, 8)
SHORT = 8 * 1024  # bytes of a body that may travel unasked
TEXT = 2048  # bytes of the reason of an abort

_BUFFER = 64 * 1024
_READS = 8  # of one connection, before others have their turn
_CLOSED = "it closed its connection: it exited, was killed or left the group"
_NAMES: dict[torch.dtype, bytes] = {}


class Letter(Ending):
    """One send or one receive: a work for `CollectiveWork`. `peer` is −1 while a receive from any source has no sender.

    `memory` and `tensor` are let go of when it has ended. `target` and `eager` belong to the mailbox.
    """

    __slots__ = (
        *("peer", "tag", "sends", "call", "tensor", "memory", "size", "dtype", "deadline", "target", "eager", "waited"),
        *("_post", "__weakref__"),
    )

    def __init__(self, post: Post, tensor: Tensor, dtype: torch.dtype, peer: int, tag: int, call: Call) -> None:
        """`tensor` is flat and contiguous; `dtype` is that of the caller's, which may travel as bytes."""
        super().__init__()
        self.peer, self.tag, self.sends, self.call = peer, tag, call.op == "send", call
        self.size = tensor.numel() * tensor.element_size()
        self.tensor: Tensor | None = tensor
        self.memory: memoryview | None = bytes_at(tensor.data_ptr(), self.size).cast("B") if self.size else None
        self.dtype = dtype_name(dtype)
        self.deadline = math.inf  # time.monotonic(), of a letter that nobody waits for but through its future
        self.target = 0  # bytes that its connection must have sent for it to have left
        self.eager = False
        self.waited = True  # whether leaving the group waits for it
        self._post = post

    def __str__(self) -> str:
        what = f"{described(self.size, self.dtype)} with tag {self.tag}"
        if self.sends:
            return f"rank {self.peer} has not received {what} from rank {self.call.rank}"
        return f"{f'rank {self.peer}' if self.peer >= 0 else 'no rank'} has not sent {what} to rank {self.call.rank}"

    def end(self) -> None:
        """Tells those who wait; `error` has been set where it failed. Callbacks of the future run here."""
        self.tensor = self.memory = None
        self.call.over() if self.error is None else self.call.failed(self.error)
        self.let_go()

    def wait(self, timeout: timedelta | None = None) -> bool:
        """Blocks without the GIL until the message is through. Raises its error; RuntimeError when `timeout` passes, while
        the message goes on. When the group's own timeout passes, the group ends."""
        if not self.is_completed():
            seconds = timeout.total_seconds() if timeout else self._post.timeout().total_seconds()
            if not self._post.wait_for(self, seconds):
                if timeout:
                    raise RuntimeError(f"Timed out waiting {seconds:g} s")
                self._post.expire(self, seconds)
        self.raise_error()
        return True

    def limit(self) -> None:
        """From now on the group's timeout holds for it although nobody is in `wait`."""
        self._post.limit(self)

    def _source_rank(self) -> int:
        return self.peer


class Post(Protocol):
    """What a letter needs of its mailbox."""

    timeout: Callable[[], timedelta]

    def wait_for(self, letter: Letter, seconds: float) -> bool: ...
    def expire(self, letter: Letter, seconds: float) -> None: ...
    def limit(self, letter: Letter) -> None: ...


class Reader(Protocol):
    """What takes in the frames of a connection."""

    def arrived(self, peer: int, kind: int, tag: int, size: int, dtype: bytes, body: bytes) -> None:
        """A frame that is complete."""

    def arriving(self, peer: int, tag: int, size: int) -> Letter | None:
        """The receive that a body of `size` bytes belongs to; None where there is none."""

    def filled(self, letter: Letter) -> None:
        """Its body is complete."""

    def ended(self, peer: int, why: str) -> None:
        """Nothing more comes over the connection."""


class Inlet:
    """The receiving end of a connection. Bodies of DATA go straight into the memory of their receive."""

    def __init__(self, peer: int, connection: socket.socket, reader: Reader) -> None:
        self.peer, self.connection = peer, connection
        self._reader = reader
        self._buffer = bytearray(_BUFFER)
        self._view = memoryview(self._buffer)
        self._start = self._end = 0  # of what has not been taken out of the buffer
        self._letter: Letter | None = None  # whose body is coming
        self._rest: memoryview | None = None  # of its memory

    def on_event(self, mask: int) -> None:
        """Something can be read; what is left after a few reads is announced again."""
        for _ in range(_READS):
            target = self._view[self._end :] if self._rest is None else self._rest
            try:
                count = self.connection.recv_into(target)
            except BlockingIOError:
                return
            except OSError as error:
                self._reader.ended(self.peer, lost_text(error))
                return
            if not count:
                self._reader.ended(self.peer, _CLOSED)
                return
            if not self._take(count):
                self._reader.ended(self.peer, "it sent something that is no message of this group")
                return
            if count < len(target):
                return

    def _take(self, count: int) -> bool:
        """`count` more bytes have come. False where they make no sense."""
        if self._rest is not None:
            assert self._letter is not None
            self._rest = self._rest[count:]
            if not self._rest:
                letter, self._letter, self._rest = self._letter, None, None
                self._reader.filled(letter)
            return True
        self._end += count
        while self._rest is None and self._end - self._start >= HEADER.size:
            kind, tag, size, dtype = HEADER.unpack_from(self._buffer, self._start)
            if kind == DATA:
                self._start += HEADER.size
                if not self._begin(tag, size):
                    return False
                continue
            body = size if kind in (EAGER, ABORTED) else 0
            if not WANT <= kind <= ABORTED or body > max(SHORT, TEXT):
                return False
            stop = self._start + HEADER.size + body
            if stop > self._end:
                break
            found = bytes(self._view[stop - body : stop]) if body else b""
            self._start = stop
            self._reader.arrived(self.peer, kind, tag, size, dtype, found)
        self._move_up()
        return True

    def _begin(self, tag: int, size: int) -> bool:
        """A body begins in the buffer, and may go on after it."""
        letter = self._reader.arriving(self.peer, tag, size)
        if letter is None:
            return False
        here = min(size, self._end - self._start)
        if letter.memory is not None:
            letter.memory[:here] = self._view[self._start : self._start + here]
        self._start += here
        if here == size:
            self._reader.filled(letter)
        else:
            assert letter.memory is not None
            self._letter, self._rest = letter, letter.memory[here:]
        return True

    def _move_up(self) -> None:
        left = self._end - self._start
        if left and self._start:
            self._buffer[:left] = self._buffer[self._start : self._end]
        self._start, self._end = 0, left


def frame(kind: int, tag: int = 0, size: int = 0, dtype: bytes = b"") -> bytes:
    return HEADER.pack(kind, tag, size, dtype)


def dtype_name(dtype: torch.dtype) -> bytes:
    known = _NAMES.get(dtype)
    if known is None:
        known = _NAMES[dtype] = str(dtype).removeprefix("torch.").encode()[:16].ljust(16, b"\0")
    return known


def described(size: int, dtype: bytes) -> str:
    """As in "4 x float32"."""
    name = dtype.rstrip(b"\0").decode(errors="replace")
    itemsize = getattr(getattr(torch, name, None), "itemsize", 0)
    return f"{size // itemsize} x {name}" if itemsize else f"{size} bytes"


def misfit(sender: int, sent: str, receiver: int, expected: str, tag: int) -> CollectiveError:
    """The error at both ends of a message that does not fit."""
    return CollectiveError(
        f"rank {sender} sends {sent} with tag {tag} to rank {receiver}, which expects {expected}. Give both ends the same "
        "size and dtype, and compare the order of their messages; nothing was received."
    )
