"""Messages between replicas and their store: a length and one JSON object; beside them raw bytes of an announced size.

Nothing is unpickled, and nothing of more than `LIMIT` bytes is read as a message. Every wait ends with the socket's timeout.
"""

from __future__ import annotations

import json
import os
import socket
import struct
from typing import Any

LIMIT = 1 << 20
TOKEN = "NCCLX_ELASTIC_TOKEN"
_LENGTH = struct.Struct("!I")


class Malformed(ValueError):
    """Bytes that are no message of ours."""


def send(connection: socket.socket, message: dict[str, Any]) -> None:
    """Raises OSError when the connection is gone, ValueError for a message over the limit."""
    body = json.dumps(message).encode()
    if len(body) > LIMIT:
        raise ValueError(f"a message of {len(body)} bytes exceeds the limit of {LIMIT}")
    connection.sendall(_LENGTH.pack(len(body)) + body)


def receive(connection: socket.socket) -> dict[str, Any] | None:
    """The next message; None where the peer has closed in good order. Raises Malformed, OSError or TimeoutError."""
    head = read_exactly(connection, _LENGTH.size, may_end=True)
    if head is None:
        return None
    (size,) = _LENGTH.unpack(head)
    if size > LIMIT:
        raise Malformed(f"a message of {size} bytes was announced; the limit is {LIMIT}")
    body = read_exactly(connection, size)
    assert body is not None
    try:
        message = json.loads(body)
    except (ValueError, RecursionError) as error:
        raise Malformed(f"not JSON: {error}") from None
    if not isinstance(message, dict):
        raise Malformed(f"a JSON object was expected, not {type(message).__name__}")
    return message


def read_exactly(connection: socket.socket, size: int, may_end: bool = False) -> bytearray | None:
    """`size` bytes; None at a clean end where that is allowed. Raises ConnectionError for an end in the middle."""
    data = bytearray(size)
    view, filled = memoryview(data), 0
    while filled < size:
        count = connection.recv_into(view[filled:])
        if count == 0:
            if may_end and filled == 0:
                return None
            raise ConnectionError("the peer closed the connection in the middle of a message")
        filled += count
    return data


def parse_address(text: str) -> tuple[str, int]:
    """HOST:PORT. Raises ValueError with the remedy."""
    host, separator, port = text.rpartition(":")
    if not separator or not host or not port.isdecimal() or not 0 <= int(port) < 65536:
        raise ValueError(f"{text!r} is not of the form HOST:PORT, as in 127.0.0.1:29400")
    return host.strip("[]"), int(port)


def is_loopback(host: str) -> bool:
    return host in ("localhost", "::1") or host.startswith("127.")


def token() -> str:
    """The secret that replicas and store share; "" where none is set (loopback only)."""
    return os.environ.get(TOKEN, "")


def address_towards(host: str, port: int) -> str:
    """The address of this machine's interface that reaches `host`: where a peer of that network can reach us."""
    family, kind, _, _, where = socket.getaddrinfo(host, port, type=socket.SOCK_DGRAM)[0]
    with socket.socket(family, kind) as probe:
        probe.connect(where)
        return str(probe.getsockname()[0])
