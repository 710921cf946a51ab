"""Requests to the store that outlive its restart: reconnect, with growing pauses, and ask again.

Every request may be repeated: the store answers the same question the same way, so a reply that got lost does no harm.
"""

from __future__ import annotations

import random
import socket
import threading
import time
from collections.abc import Callable
from typing import Any

from ncclx_py.elastic.errors import ElasticError
from ncclx_py.elastic.messages import TOKEN, Malformed, parse_address, receive, send, token

Answer = dict[str, Any]
REPLY_S = 10.0  # the store answers within 2 s, be it with "wait"


class Client:
    """One connection to the store at `address` (HOST:PORT); `patience_s`: how long a store may be away.

    One request at a time; any thread may ask.
    """

    def __init__(self, address: str, patience_s: float) -> None:
        try:
            self.host, self.port = parse_address(address)
        except ValueError as error:
            raise ElasticError(f"the store's address {error}") from None
        self.patience_s = patience_s
        self._connection: socket.socket | None = None
        self._lock = threading.Lock()

    def ask(self, operation: str, **fields: Any) -> Answer:
        """One answer, which may be "wait". Raises ElasticError when the store refuses, or stays away too long."""
        until, pause, why = time.monotonic() + self.patience_s, 0.05, ""
        with self._lock:
            while True:
                try:
                    return self._once({"op": operation, **fields})
                except (OSError, Malformed) as error:
                    self._drop()
                    why = str(error) or type(error).__name__
                if time.monotonic() + pause > until:
                    raise ElasticError(
                        f"the store at {self.host}:{self.port} has been away for {self.patience_s:g} s ({why}); start it again "
                        "with the same --file and --port: python -m ncclx_py.elastic.store"
                    )
                time.sleep(pause * random.uniform(0.5, 1.0))
                pause = min(2 * pause, 1.0)

    def decide(self, operation: str, give_up: Callable[[], bool] | None = None, **fields: Any) -> Answer:
        """Ask until the answer is more than "wait", or until `give_up` says so: then "wait" it is."""
        while True:
            answer = self.ask(operation, **fields)
            if answer["answer"] != "wait" or (give_up is not None and give_up()):
                return answer

    def _once(self, request: Answer) -> Answer:
        if self._connection is None:
            self._connection = self._connect()
        send(self._connection, request)
        answer = receive(self._connection)
        if answer is None:
            raise ConnectionError("the store closed the connection")
        if answer.get("answer") == "refused":
            raise ElasticError(f"the store at {self.host}:{self.port} refused {request['op']}: {answer.get('why')}")
        return answer

    def _connect(self) -> socket.socket:
        connection = socket.create_connection((self.host, self.port), timeout=REPLY_S)
        try:
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            send(connection, {"token": token()})
            welcome = receive(connection)
        except BaseException:
            connection.close()
            raise
        if welcome is None or welcome.get("answer") != "welcome":
            connection.close()
            why = (welcome or {}).get("why", "it closed the connection")
            if welcome is None:
                raise ConnectionError(why)
            raise ElasticError(
                f"the store at {self.host}:{self.port} refused this process: {why}; set {TOKEN} as it has it"
            )
        return connection

    def _drop(self) -> None:
        if self._connection is not None:
            self._connection.close()
            self._connection = None

    def close(self) -> None:
        with self._lock:
            self._drop()
