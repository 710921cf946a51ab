"""JSON over HTTP/1.1 to one address, one try at a time, from many threads; who asks again, and when, is the caller's business.

    endpoint = Endpoint("http://127.0.0.1:8000", request_s=600.0, key=key_from("VLLM_API_KEY"))
    reply = endpoint.once("POST", "/v1/completions", json.dumps({"prompt": [1, 2, 3]}).encode())     # raises NoReply

Addresses: ``http://HOST:PORT``, ``https://HOST``, both with or without a path before ``/v1``, or ``unix:/PATH`` for a socket in the
file system, which only its owner can open. Each thread keeps a connection of its own. An idle connection that the server has
closed is no failure: the request goes out again on a new one. Requests must therefore be safe to repeat.
"""

from __future__ import annotations

import email.utils
import http.client
import json
import os
import random
import socket
import threading
import time
from dataclasses import dataclass
from typing import Any
from urllib.parse import SplitResult, urlsplit

from distill.errors import ConfigError

CONNECT_S = 10.0
_STALE = (http.client.RemoteDisconnected, ConnectionResetError, BrokenPipeError)


@dataclass(frozen=True, slots=True)
class Reply:
    """A whole answer. ``answer`` is parsed JSON, or text where it is none; ``size`` its bytes; ``wait_s`` what Retry-After says;
    ``fresh``: it came on a new connection, perhaps from another process than the last one."""

    status: int
    answer: Any
    is_json: bool
    size: int
    wait_s: float | None = None
    fresh: bool = False


class NoReply(Exception):
    """No whole answer came. ``reached``: the server took the connection; ``late``: it took longer than allowed."""

    def __init__(self, problem: str, *, reached: bool, late: bool = False) -> None:
        super().__init__(problem)
        self.reached, self.late = reached, late


class Endpoint:
    """One address. Raises ConfigError for what is no address; ``name`` is what to call it there."""

    def __init__(self, address: str, *, request_s: float, key: str | None = None, name: str = "the server") -> None:
        self.address, self._request_s = address.rstrip("/").removesuffix("/v1"), request_s
        self._parts = _checked_address(self.address, name)
        self._headers = {"Content-Type": "application/json"} | ({"Authorization": f"Bearer {key}"} if key else {})
        self._local = threading.local()
        self._open: set[http.client.HTTPConnection] = set()
        self._lock = threading.Lock()

    def once(self, method: str, path: str, data: bytes | None = None, request_s: float | None = None) -> Reply:
        """One request and its answer, within ``request_s`` seconds in all (None: the endpoint's). Raises NoReply."""
        seconds = self._request_s if request_s is None else request_s
        fresh = getattr(self._local, "connection", None) is None
        try:
            return self._exchange(method, path, data, seconds, fresh)
        except _STALE as error:
            self._drop()
            if fresh:
                raise NoReply(f"{type(error).__name__}: {error}", reached=True) from None
        except (OSError, http.client.HTTPException) as error:
            raise self._failed(error, seconds) from None
        try:
            return self._exchange(method, path, data, seconds, True)
        except (OSError, http.client.HTTPException) as error:
            raise self._failed(error, seconds) from None

    def close(self) -> None:
        """End all connections, also those on which other threads wait: they get NoReply."""
        with self._lock:
            connections, self._open = self._open, set()
        for connection in connections:
            sock = connection.sock
            if sock is not None:
                try:
                    sock.shutdown(socket.SHUT_RDWR)
                except OSError:
                    continue  # its other end was faster

    def _exchange(self, method: str, path: str, data: bytes | None, seconds: float, fresh: bool) -> Reply:
        deadline = time.monotonic() + seconds
        connection = self._connection()
        sock = connection.sock
        sock.settimeout(seconds)
        connection.request(
            method, self._parts.path + path if self._parts.scheme != "unix" else path, data, self._headers
        )
        response = connection.getresponse()
        parts = []
        while True:
            sock.settimeout(max(deadline - time.monotonic(), 1e-3))
            part = response.read1(1 << 20)
            if not part:
                break
            parts.append(part)
        raw = b"".join(parts)
        if response.length:
            raise http.client.IncompleteRead(raw, response.length)
        response.close()  # which `read1` does not do where the length was told
        if response.will_close:
            self._drop()
        try:
            answer, is_json = (json.loads(raw) if raw else None), True
        except (ValueError, RecursionError):
            answer, is_json = raw.decode(errors="replace"), False
        return Reply(response.status, answer, is_json, len(raw), _seconds(response.headers.get("Retry-After")), fresh)

    def _failed(self, error: Exception, seconds: float) -> NoReply:
        reached = getattr(self._local, "connection", None) is not None
        self._drop()
        if isinstance(error, TimeoutError):
            what = f"no answer within {seconds:g} s" if reached else f"no connection within {CONNECT_S:g} s"
            return NoReply(what, reached=reached, late=True)
        return NoReply(f"{type(error).__name__}: {error}", reached=reached)

    def _connection(self) -> http.client.HTTPConnection:
        """This thread's connection, opened where there is none."""
        connection: http.client.HTTPConnection | None = getattr(self._local, "connection", None)
        if connection is None:
            parts = self._parts
            if parts.scheme == "unix":
                connection = _UnixConnection(parts.path)
            elif parts.scheme == "https":
                connection = http.client.HTTPSConnection(str(parts.hostname), parts.port, timeout=CONNECT_S)
            else:
                connection = http.client.HTTPConnection(str(parts.hostname), parts.port, timeout=CONNECT_S)
            connection.connect()
            self._local.connection = connection
            with self._lock:
                self._open.add(connection)
        return connection

    def _drop(self) -> None:
        connection = getattr(self._local, "connection", None)
        if connection is not None:
            connection.close()
            self._local.connection = None
            with self._lock:
                self._open.discard(connection)


class Backoff:
    """Growing pauses between tries, with jitter, so that many who lost one server do not come back at one instant."""

    FIRST_S = 0.25
    LEAST_S = 0.05  # of the longest: nobody asks without pause

    def __init__(self, longest_s: float) -> None:
        self._longest_s, self._next_s = max(longest_s, self.LEAST_S), self.FIRST_S

    def pause(self, asked_s: float | None = None) -> float:
        """Seconds until the next try: at least ``asked_s`` (of Retry-After), at most the longest."""
        pause_s = self._next_s * random.uniform(0.5, 1.0)
        self._next_s = min(2 * self._next_s, self._longest_s)
        return min(max(pause_s, asked_s or 0.0), self._longest_s)


def key_from(variable: str | None) -> str | None:
    """A server's key from the environment (None: VLLM_API_KEY, which may be missing). Raises ConfigError that does not show it."""
    key = os.environ.get(variable or "VLLM_API_KEY", "").strip()
    if variable and not key:
        raise ConfigError(
            f"the environment variable {variable}, which is to hold a server's key, is not set; export it"
        )
    if not (key.isascii() and key.isprintable()):
        raise ConfigError(
            f"the environment variable {variable or 'VLLM_API_KEY'} holds no key that fits into an HTTP header"
        )
    return key or None


def explain(answer: Any) -> str:
    """What a server says is wrong, in one line of at most 300 characters."""
    error = answer.get("error", answer) if isinstance(answer, dict) else answer
    text = error.get("message", error) if isinstance(error, dict) else error
    return " ".join(str(text).split())[:300]


def other_weights(served: Any, path: str | None) -> str | None:
    """What to say where a server names the model that it loaded (vLLM's ``root`` in /v1/models), and that cannot be seen to be
    ``model.teacher.path``; None where it is, or where either is not known."""
    if not isinstance(served, str) or not path or served == path or os.path.realpath(served) == os.path.realpath(path):
        return None
    return (
        f"it serves '{served}', and model.teacher.path is '{path}': what it serves is what teaches. If these are not the same "
        "weights, serve the latter, or name the former"
    )


class _UnixConnection(http.client.HTTPConnection):
    def __init__(self, path: str) -> None:
        super().__init__("localhost")
        self._path = path

    def connect(self) -> None:
        self.sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self.sock.settimeout(CONNECT_S)
        self.sock.connect(self._path)


def _checked_address(address: str, name: str) -> SplitResult:
    try:
        parts = urlsplit(address)
        known = parts.scheme == "unix" or bool(
            parts.hostname and (parts.scheme == "https" or (parts.scheme == "http" and parts.port is not None))
        )
        secret = parts.username is not None or bool(parts.query)
    except ValueError:  # a port that is no number
        known = secret = False
    if secret:  # not shown: it may be a password
        raise ConfigError(
            f"{name}: its address holds a user, password or query; give http://HOST:PORT and the key in the environment"
        )
    if not known:
        raise ConfigError(f"{name} at '{address}': not an address; use http://HOST:PORT")
    return parts


def _seconds(retry_after: str | None) -> float | None:
    """The header's seconds or date, as seconds from now."""
    if not retry_after:
        return None
    try:
        return max(float(retry_after), 0.0)
    except ValueError:
        date = email.utils.parsedate_tz(retry_after)
        return None if date is None else max(email.utils.mktime_tz(date) - time.time(), 0.0)
