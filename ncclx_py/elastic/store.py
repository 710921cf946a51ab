"""The store of an elastic run: ``python -m ncclx_py.elastic.store --file run/membership.jsonl [--port 29400]``.

One small process, best on a host of its own or beside the scheduler. It keeps no tensor and no sample: only who is
alive, in which epoch, and which step is committed (`membership`), in a journal on disk (`journal`). Kill it and start it
again with the same file and port: replicas reconnect and go on. It listens on loopback unless --host says otherwise, and
then demands a token: set NCCLX_ELASTIC_TOKEN to the same secret for the store and for all replicas.
"""

from __future__ import annotations

import argparse
import contextlib
import hmac
import os
import socket
import sys
import threading
import time
from collections.abc import Callable
from typing import Any

from ncclx_py.elastic.errors import ElasticError
from ncclx_py.elastic.journal import Journal
from ncclx_py.elastic.membership import Answer, Membership, Rules
from ncclx_py.elastic.messages import TOKEN, Malformed, is_loopback, receive, send, token

POLL = 2.0  # seconds after which an undecided request is answered "wait": the caller asks again
TICK = 0.05
IDLE = 600.0  # seconds without a message after which a connection is closed
KEYS = 100_000  # of all groups together


class Store:
    """The server. `start` listens; `close` ends every connection."""

    def __init__(self, journal: Journal, host: str, port: int, secret: str, say: Callable[[str], None]) -> None:
        self._journal, self._secret, self._say = journal, secret, say
        self._changed = threading.Condition()
        self._membership = Membership(time.monotonic, self._decide)
        self._membership.restore(journal.events)
        self._keys: dict[str, str] = {}
        self._connections: set[socket.socket] = set()
        self._closed = False
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        self._server = socket.create_server((host, port), family=family, backlog=512, reuse_port=False)
        self.port = int(self._server.getsockname()[1])
        self.failure: str | None = None

    def start(self) -> None:
        for task in (self._accept, self._tick):
            threading.Thread(target=task, daemon=True).start()

    def close(self) -> None:
        self._closed = True
        self._server.close()
        with self._changed:
            for connection in list(self._connections):
                connection.close()
        self._journal.close()

    def _decide(self, event: dict[str, Any]) -> None:
        """Called by the membership for each decision, with the lock held."""
        event["at"] = round(time.time(), 3)
        try:
            self._journal.append(event)
        except ElasticError as error:
            self.failure = str(error)
            raise
        if event["event"] == "epoch":
            members = " ".join(map(str, event["members"])) or "none"
            self._say(f"step {event['step']}  epoch {event['epoch']}  {'; '.join(event['why'])}  members: {members}")
            current = f"epoch/{event['epoch']}/"
            self._keys = {key: value for key, value in self._keys.items() if not _stale(key, current)}
        elif event["event"] == "finish":
            self._say("the run is complete")

    def _tick(self) -> None:
        while not self._closed and self.failure is None:
            time.sleep(TICK)
            with self._changed, contextlib.suppress(ElasticError):  # `failure` has it
                if self._membership.tick():
                    self._changed.notify_all()

    def _accept(self) -> None:
        while not self._closed:
            try:
                connection, _ = self._server.accept()
            except OSError:
                return
            threading.Thread(target=self._serve, args=[connection], daemon=True).start()

    def _serve(self, connection: socket.socket) -> None:
        connection.settimeout(10.0)
        pulse: tuple[int, str, int] | None = None  # whose heartbeats come on this connection
        with self._changed:
            self._connections.add(connection)
        try:
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            if not self._greet(connection):
                return
            connection.settimeout(IDLE)
            while (request := receive(connection)) is not None:
                answer = self._answer(request)
                send(connection, answer)
                if request.get("op") == "beat" and answer["answer"] == "ok":
                    pulse = (int(request["replica"]), str(request["incarnation"]), int(request["rank"]))
        except (OSError, Malformed):
            pass  # the other side is gone or is none of ours: nothing is owed to it
        finally:
            connection.close()
            with self._changed:
                self._connections.discard(connection)
                if pulse is not None:
                    self._membership.lose(*pulse)

    def _greet(self, connection: socket.socket) -> bool:
        """The first message shows the token."""
        hello = receive(connection)
        good = hello is not None and hmac.compare_digest(str(hello.get("token", "")).encode(), self._secret.encode())
        send(
            connection, {"answer": "welcome"} if good else {"answer": "refused", "why": f"{TOKEN} is wrong or not set"}
        )
        return good

    def _answer(self, request: dict[str, Any]) -> Answer:
        try:
            handler = self._handler(request)
            until = time.monotonic() + POLL
            with self._changed:
                while (answer := self._try(handler)) is None:
                    left = until - time.monotonic()
                    if left <= 0 or not self._changed.wait(left):
                        return {"answer": "wait"}
                return answer
        except ElasticError as error:
            return {"answer": "refused", "why": str(error)}
        except (KeyError, TypeError, ValueError) as error:
            return {"answer": "refused", "why": f"malformed request: {type(error).__name__}: {error}"}

    def _try(self, handler: Callable[[], Answer | None]) -> Answer | None:
        """Ask once, and wake whoever waits for what this changed. With the lock held."""
        if self.failure is not None:  # what was decided last is not on disk: no one may learn of it
            raise ElasticError(self.failure)
        before = self._membership.fingerprint()
        answer = handler()
        if self._membership.fingerprint() != before:
            self._changed.notify_all()
        return answer

    def _handler(self, request: dict[str, Any]) -> Callable[[], Answer | None]:
        operation = request["op"]
        if operation in ("set", "get"):
            return self._keys_handler(operation, request)
        state, who = self._membership, (int(request["replica"]), str(request["incarnation"]))
        match operation:
            case "join":
                step, rules = int(request["step"]), Rules(**request["rules"])
                return lambda: state.join(*who, step, rules)
            case "ready":
                return lambda: state.ready(*who, int(request["step"]))
            case "begin":
                return lambda: state.begin(*who, int(request["step"]), int(request["known"]))
            case "arrive":
                return lambda: state.arrive(*who, int(request["epoch"]), str(request["stage"]))
            case "vote":
                return lambda: state.vote(*who, int(request["epoch"]), int(request["step"]))
            case "fail":
                return lambda: state.fail(*who, int(request["epoch"]), str(request["why"])[:500])
            case "beat":
                return lambda: state.beat(*who, int(request["rank"]), bool(request["busy"]))
            case "leave":
                return lambda: state.leave(*who)
            case "finish":
                return lambda: state.finish(*who)
            case "await_finish":
                return lambda: state.awaits_finish(*who, int(request["epoch"]))
        raise ValueError(f"unknown operation {operation!r}")

    def _keys_handler(self, operation: str, request: dict[str, Any]) -> Callable[[], Answer | None]:
        """Small texts by which the members of an epoch find each other; they are not kept over a restart."""
        if operation == "set":
            key, value = str(request["key"]), str(request["value"])

            def put() -> Answer:
                if len(self._keys) >= KEYS:
                    raise ElasticError(f"the store holds {KEYS} keys already")
                self._keys[key] = value
                self._changed.notify_all()
                return {"answer": "ok"}

            return put
        keys = [str(key) for key in request["keys"]]

        def look() -> Answer | None:
            if all(key in self._keys for key in keys):
                return {"answer": "ok", "values": [self._keys[key] for key in keys]}
            return None if request.get("wait") else {"answer": "missing"}

        return look


def _stale(key: str, current: str) -> bool:
    """Lanes belong to one epoch; where states are served is said again at every step."""
    return not key.startswith(current)


def main(arguments: list[str] | None = None) -> int:
    """Entry point; returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m ncclx_py.elastic.store",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--file", required=True, help="the journal; an existing one is continued")
    parser.add_argument("--port", type=int, default=29400, help="TCP port (default 29400; 0: any free one)")
    parser.add_argument(
        "--host", default="127.0.0.1", help=f"address to listen on (beyond loopback, {TOKEN} must be set)"
    )
    options = parser.parse_args(arguments)
    if not is_loopback(options.host) and not token():
        print(f"error: --host {options.host} is open to the network: set {TOKEN} to a secret", file=sys.stderr)
        return 2
    try:
        store = Store(Journal(options.file), options.host, options.port, token(), _print)
    except (ElasticError, OSError, OverflowError) as error:
        print(f"error: the store on {options.host}:{options.port} cannot start: {error}", file=sys.stderr)
        return 2
    store.start()
    _print(f"store on {options.host}:{store.port}, journal {options.file}, process {os.getpid()}")
    try:
        while store.failure is None:
            time.sleep(0.2)
    except KeyboardInterrupt:
        return 130
    finally:
        store.close()
    print(f"error: {store.failure}", file=sys.stderr)
    return 1


def _print(text: str) -> None:
    print(f"{time.strftime('%H:%M:%S')}  {text}", flush=True)


if __name__ == "__main__":
    sys.exit(main())
