"""JSON over HTTP/1.1 to one server, from many threads, with patience: connections are kept, failures of the connection retried.

    http = Http("the teacher's vLLM server", "http://127.0.0.1:8000", request_s=600.0, retry_s=60.0)
    status, answer = http.ask("POST", "/v1/completions", {"prompt": [1, 2, 3]})

Addresses: ``http://HOST:PORT``, or ``unix:/PATH`` for a socket in the file system, which only its owner can open. A server that
does not answer is asked again with growing pauses until ``retry_s`` have passed; then, or where its own process is known to have
ended, ServerError names it. Every wait has a deadline: ``request_s`` for one answer. Requests must be safe to repeat.
"""

from __future__ import annotations

import http.client
import json
import os
import socket
import threading
import time
from collections.abc import Callable
from typing import Any
from urllib.parse import urlsplit

from distill.errors import ConfigError, ServerError

_PAUSES = (0.0, 0.25, 0.5, 1.0, 2.0, 4.0, 8.0)
"""Seconds before the 1st, 2nd, … retry. The first is immediate: an idle connection that the server has closed is no failure."""
_TRANSIENT = {429, 500, 502, 503, 504}
_CONNECT_S = 10.0

Answer = tuple[int, Any]


class Http:
    """``gone`` tells why a server that this process started has ended, or None while it runs."""

    def __init__(
        self, name: str, address: str, *, request_s: float, retry_s: float, gone: Callable[[], str | None] | None = None
    ) -> None:
        self.name, self.address, self._request_s, self._retry_s = name, address, request_s, retry_s
        self._gone = gone or (lambda: None)
        self._local = threading.local()
        key = os.environ.get("VLLM_API_KEY")
        self._headers = {"Content-Type": "application/json"} | ({"Authorization": f"Bearer {key}"} if key else {})
        parts = urlsplit(address)
        try:
            known = parts.scheme == "unix" or (parts.scheme == "http" and parts.hostname and parts.port is not None)
        except ValueError:  # a port that is no number
            known = False
        if not known:
            raise ConfigError(f"{name} at '{address}': not an address; use http://HOST:PORT")

    def ask(self, method: str, path: str, body: Any = None, *, patient: bool = True) -> Answer:
        """(status, answer) of one request; the answer is parsed JSON, or text where it is none.

        With ``patient=False`` an answer of status 500 is returned, not retried. Raises ServerError for a server that cannot be
        reached, refuses the key, or takes longer than ``request_s``.
        """
        data = None if body is None else json.dumps(body).encode()
        began, attempt = time.monotonic(), 0
        while True:
            problem, answer = self._try(method, path, data)
            if answer is not None and (answer[0] not in _TRANSIENT or (answer[0] == 500 and not patient)):
                return self._authorised(answer)
            ended = self._gone()
            if ended is not None:
                raise ServerError(f"{self.name} has ended: {ended}")
            pause = _PAUSES[min(attempt, len(_PAUSES) - 1)]
            if time.monotonic() - began + pause > self._retry_s and attempt:
                raise ServerError(
                    f"{self.name} at {self.address} does not answer {path} ({problem}; {attempt + 1} tries in "
                    f"{time.monotonic() - began:.0f} s, rollout.vllm.retry_s={self._retry_s:g}). Start it again, look at its "
                    "log, and run the same command once more"
                )
            time.sleep(pause)
            attempt += 1

    def _try(self, method: str, path: str, data: bytes | None) -> tuple[str, Answer | None]:
        """What went wrong, and the answer where there is one."""
        try:
            connection = self._connection()
            connection.request(method, path, data, self._headers)
            response = connection.getresponse()
            raw = response.read()
        except TimeoutError as error:
            self._drop()
            if self._gone() is None and self._reached:
                raise ServerError(
                    f"{self.name} at {self.address} gave no answer to {path} within {self._request_s:g} s; raise "
                    "rollout.vllm.request_s, or lower rollout.slots or rollout.max_new_tokens"
                ) from None
            return str(error) or "timed out", None
        except (OSError, http.client.HTTPException) as error:
            self._drop()
            return f"{type(error).__name__}: {error}", None
        try:
            answer = json.loads(raw) if raw else None
        except ValueError:
            answer = raw.decode(errors="replace")
        return f"status {response.status}: {explain(answer)}", (response.status, answer)

    def _authorised(self, answer: Answer) -> Answer:
        if answer[0] == 401:
            raise ServerError(
                f"{self.name} at {self.address} refuses this request ({explain(answer[1])}); set VLLM_API_KEY to its --api-key"
            )
        return answer

    @property
    def _reached(self) -> bool:
        return bool(getattr(self._local, "reached", False))

    def _connection(self) -> http.client.HTTPConnection:
        """This thread's connection, opened where there is none."""
        connection: http.client.HTTPConnection | None = getattr(self._local, "connection", None)
        if connection is None:
            self._local.reached = False
            parts = urlsplit(self.address)
            if parts.scheme == "unix":
                connection = _UnixConnection(parts.path)
            else:
                connection = http.client.HTTPConnection(str(parts.hostname), parts.port, timeout=_CONNECT_S)
            connection.connect()
            connection.sock.settimeout(self._request_s)
            self._local.connection, self._local.reached = connection, True
        return connection

    def _drop(self) -> None:
        connection = getattr(self._local, "connection", None)
        if connection is not None:
            connection.close()
            self._local.connection = None


class _UnixConnection(http.client.HTTPConnection):
    def __init__(self, path: str) -> None:
        super().__init__("localhost")
        self._path = path

    def connect(self) -> None:
        self.sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self.sock.settimeout(_CONNECT_S)
        self.sock.connect(self._path)


def explain(answer: Any) -> str:
    """What a server says is wrong, in one line of at most 300 characters."""
    error = answer.get("error", answer) if isinstance(answer, dict) else answer
    text = error.get("message", error) if isinstance(error, dict) else error
    return " ".join(str(text).split())[:300]
