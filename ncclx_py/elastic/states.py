"""How a returning replica gets the state of a healthy one while the others go on.

Each rank of the donor serves what the same rank of the newcomer needs, from memory and from a thread of its own:

1. ``files``: the state at the beginning of some step, as the files of a checkpoint. Taking it is a copy in memory.
2. ``updates``: for every step committed since, what the donor applied. The newcomer applies the same, until it has
   caught up. So nobody waits for a transfer, however long it takes.

The server listens on loopback where the store does, else on the interface that reaches the store. A secret, which only
the store's clients learn, must be shown. What the bytes mean is the caller's business.
"""

from __future__ import annotations

import hmac
import secrets
import socket
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from ncclx_py.elastic.client import Client
from ncclx_py.elastic.errors import ElasticError
from ncclx_py.elastic.messages import (
    Malformed,
    address_towards,
    is_loopback,
    parse_address,
    read_exactly,
    receive,
    send,
)

MAX_UPDATES = 256  # kept per session: a newcomer that is further behind begins anew
POLL = 1.0
BLOCK = 8 << 20  # bytes per write


class Gone(ConnectionError):
    """The donor, or its session, is not there any more: ask for another one."""


@dataclass(slots=True)
class _Session:
    step: int
    files: dict[str, bytes]
    updates: dict[int, bytes] = field(default_factory=dict)
    ends: float | None = None  # time.monotonic after which it is forgotten


class StateServer:
    """One rank's server. The training thread opens sessions and adds updates; newcomers read."""

    def __init__(self, store_host: str, store_port: int, linger_s: float) -> None:
        host = "127.0.0.1" if is_loopback(store_host) else address_towards(store_host, store_port)
        self._server = socket.create_server((host, 0), backlog=16)
        self._secret, self._linger_s = secrets.token_hex(16), linger_s
        self._sessions: dict[str, _Session] = {}
        self._changed = threading.Condition()
        self._where = f"{host}:{self._server.getsockname()[1]} {self._secret}"
        threading.Thread(target=self._accept, daemon=True, name="ncclx-elastic-state").start()

    def publish(self, client: Client, replica: int, rank: int, session: str) -> None:
        """Tell the newcomer where this rank serves the session."""
        client.ask("set", key=_key(replica, rank, session), value=self._where)

    def has(self, session: str) -> bool:
        return session in self._sessions

    def open(self, session: str, step: int, files: Mapping[str, bytes]) -> None:
        """Serve `files`, the state at the beginning of `step`."""
        with self._changed:
            self._sessions[session] = _Session(step, dict(files))
            self._changed.notify_all()

    @property
    def serving(self) -> bool:
        """Whether anyone may still want an update."""
        return bool(self._sessions)

    def add_update(self, step: int, update: bytes) -> None:
        """What was applied in `step`, for all sessions."""
        with self._changed:
            for session in self._sessions.values():
                if step >= session.step:
                    session.updates[step] = update
            self._changed.notify_all()

    def keep(self, wanted: tuple[str, ...]) -> None:
        """Sessions that are no longer wanted linger a little, for a newcomer that is one step behind, then go."""
        now = time.monotonic()
        with self._changed:
            for name, session in list(self._sessions.items()):
                if name in wanted:
                    session.ends = None
                elif session.ends is None:
                    session.ends = now + self._linger_s
                if len(session.updates) > MAX_UPDATES or (session.ends is not None and now > session.ends):
                    del self._sessions[name]
            self._changed.notify_all()

    def close(self) -> None:
        self._server.close()
        with self._changed:
            self._sessions.clear()
            self._changed.notify_all()

    def _accept(self) -> None:
        while True:
            try:
                connection, _ = self._server.accept()
            except OSError:
                return
            threading.Thread(target=self._serve, args=[connection], daemon=True).start()

    def _serve(self, connection: socket.socket) -> None:
        with connection:
            connection.settimeout(60.0)
            try:
                hello = receive(connection)
                if hello is None or not hmac.compare_digest(str(hello.get("secret", "")), self._secret):
                    return
                while (request := receive(connection)) is not None:
                    header, body = self._answer(request)
                    send(connection, {**header, "size": len(body)})
                    for start in range(0, len(body), BLOCK):
                        connection.sendall(memoryview(body)[start : start + BLOCK])
            except (OSError, Malformed, ValueError):
                return  # the newcomer is gone, or none of ours

    def _answer(self, request: dict[str, Any]) -> tuple[dict[str, Any], bytes]:
        name, what = str(request.get("session")), request.get("what")
        with self._changed:
            session = self._sessions.get(name)
            if session is None:
                return {"answer": "gone"}, b""
            if what == "files":
                sizes = {file: len(data) for file, data in session.files.items()}
                return {"answer": "ok", "step": session.step, "files": sizes}, b""
            if what == "file" and request.get("name") in session.files:
                return {"answer": "ok"}, session.files[str(request["name"])]
            if what == "update":
                step = int(request["step"])
                patience = POLL if request.get("wait") else 0.0
                self._changed.wait_for(lambda: step in session.updates or not self.has(name), patience)
                return (
                    ({"answer": "ok"}, session.updates[step]) if step in session.updates else ({"answer": "wait"}, b"")
                )
        return {"answer": "gone"}, b""


class StateClient:
    """A newcomer's rank reading from its counterpart. Raises Gone wherever the donor does not answer."""

    def __init__(self, where: str, session: str, timeout_s: float) -> None:
        address, _, secret = where.partition(" ")
        self._session = session
        try:
            self._connection = socket.create_connection(parse_address(address), timeout=timeout_s)
            send(self._connection, {"secret": secret})
        except (OSError, ValueError) as error:
            raise Gone(f"the donor at {address} does not answer: {error}") from None

    def files(self) -> tuple[int, dict[str, bytes]]:
        """The step and the files of the state."""
        header, _ = self._read(what="files")
        names = header.get("files")
        if not isinstance(names, dict):
            raise Gone("the donor's answer has no files")
        return int(header["step"]), {str(name): bytes(self._read(what="file", name=name)[1]) for name in names}

    def update(self, step: int, wait: bool) -> bytes | None:
        """What was applied in `step`; None while it is not there (at once, or after about a second with `wait`)."""
        header, body = self._read(what="update", step=step, wait=wait)
        return bytes(body) if header["answer"] == "ok" else None

    def _read(self, **request: Any) -> tuple[dict[str, Any], bytearray]:
        try:
            send(self._connection, {"session": self._session, **request})
            header = receive(self._connection)
            if header is None or header.get("answer") not in ("ok", "wait"):
                raise Gone("the donor has ended the session")
            body = read_exactly(self._connection, int(header.get("size", 0)))
        except (OSError, ValueError, TypeError) as error:
            raise error if isinstance(error, Gone) else Gone(f"the donor does not answer: {error}") from None
        assert body is not None
        return header, body

    def close(self) -> None:
        self._connection.close()


def find_donor(client: Client, donor: int, rank: int, session: str) -> str | None:
    """Where rank `rank` of the donor serves the session; None while it does not yet."""
    answer = client.ask("get", keys=[_key(donor, rank, session)])
    return str(answer["values"][0]) if answer["answer"] == "ok" else None


def _key(replica: int, rank: int, session: str) -> str:
    if "/" in session:
        raise ElasticError(f"{session!r} is no name of a session")
    return f"state/{replica}/{session}/{rank}"
