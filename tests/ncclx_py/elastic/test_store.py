"""The store as a process: restarts, wrong tokens, malformed messages, a journal cut short."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from ncclx_py.elastic.client import Client
from ncclx_py.elastic.errors import ElasticError, EpochChanged
from ncclx_py.elastic.journal import Journal, read_events, schedule
from ncclx_py.elastic.member import Member, new_incarnation
from ncclx_py.elastic.membership import Rules
from ncclx_py.elastic.messages import LIMIT, TOKEN
from ncclx_py.elastic.states import Gone, StateClient, StateServer, find_donor
from ncclx_py.elastic.store import Store, main

pytestmark = pytest.mark.unit
RULES = Rules("run", count=2, least=1, deadline_s=5.0, lease_s=5.0, gather_s=60.0)


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    server = Store(Journal(tmp_path / "journal"), "127.0.0.1", 0, "", lambda _: None)
    server.start()
    yield server
    server.close()


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def start_process(journal: Path, port: int) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "ncclx_py.elastic.store", "--file", str(journal), "--port", str(port)]
    return subprocess.Popen(command, stdout=subprocess.DEVNULL)


def train(member: Member, steps: int, applied: list[int]) -> None:
    member.start()
    member.join(0)
    while len(applied) < steps:
        seat = member.begin(len(applied))
        try:
            member.arrive(seat.epoch, "facts")
            member.vote(seat.epoch, seat.step)
            applied.append(seat.step)
        except EpochChanged:
            continue
        time.sleep(0.01)


def test_members_outlive_a_store_that_is_killed_and_started_again(tmp_path: Path) -> None:
    journal, port = tmp_path / "journal", free_port()
    process = start_process(journal, port)
    members = [Member(f"127.0.0.1:{port}", i, 0, new_incarnation(), RULES, 30.0) for i in range(2)]
    applied: list[list[int]] = [[], []]
    threads = [threading.Thread(target=train, args=[members[i], 120, applied[i]], daemon=True) for i in range(2)]
    for thread in threads:
        thread.start()
    for wanted in (30, 60):
        while len(applied[0]) < wanted:
            assert any(thread.is_alive() for thread in threads)
            time.sleep(0.01)
        process.send_signal(signal.SIGKILL)
        process.wait()
        process = start_process(journal, port)
    for thread in threads:
        thread.join(timeout=60)
    for member in members:
        member.close()
    process.kill()
    process.wait()
    assert applied == [list(range(120))] * 2
    assert schedule(journal) == {step: [0, 1] for step in range(120)}
    assert sum(event["event"] == "commit" for event in read_events(journal)[0]) == 120


def test_what_does_not_speak_our_language_is_shut_out_and_harms_nobody(store: Store) -> None:
    hello = json.dumps({"token": ""}).encode()
    hello = struct.pack("!I", len(hello)) + hello
    for poison in (
        b"\x00",
        b"GET / HTTP/1.1\r\n\r\n",
        struct.pack("!I", LIMIT + 1),
        struct.pack("!I", 4) + b"[[[[",
        struct.pack("!I", 2) + b"[]",
        hello + struct.pack("!I", 1) + b"\xff",
        hello + os.urandom(64),
    ):
        with (
            socket.create_connection(("127.0.0.1", store.port), timeout=5) as connection,
            contextlib.suppress(OSError),
        ):
            connection.sendall(poison)
            connection.shutdown(socket.SHUT_WR)
            while connection.recv(4096):
                pass
    client = Client(f"127.0.0.1:{store.port}", 5.0)
    for bad in (
        {"op": "no such"},
        {"op": "join", "replica": "x"},
        {"op": "beat", "replica": 1},
        {"op": "join", "rules": 3},
    ):
        with pytest.raises(ElasticError, match="malformed"):
            client.ask(bad.pop("op"), **bad)
    assert client.ask("get", keys=["a"]) == {"answer": "missing"}
    client.close()


def test_tokens(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    server = Store(Journal(tmp_path / "journal"), "127.0.0.1", 0, "secret", lambda _: None)
    server.start()
    client = Client(f"127.0.0.1:{server.port}", 5.0)
    with pytest.raises(ElasticError, match=f"{TOKEN} is wrong"):
        client.ask("get", keys=["a"])
    monkeypatch.setenv(TOKEN, "secret")
    assert client.ask("get", keys=["a"]) == {"answer": "missing"}
    client.close()
    server.close()
    monkeypatch.delenv(TOKEN)
    assert main(["--file", str(tmp_path / "other"), "--host", "0.0.0.0"]) == 2
    assert "open to the network" in capsys.readouterr().err


def test_a_store_that_is_away_too_long_is_named_with_the_remedy() -> None:
    client = Client(f"127.0.0.1:{free_port()}", 0.3)
    with pytest.raises(ElasticError, match="start it again"):
        client.ask("get", keys=["a"])
    with pytest.raises(ElasticError, match="HOST:PORT"):
        Client("nowhere", 1.0)


def test_journals(tmp_path: Path) -> None:
    path = tmp_path / "journal"
    journal = Journal(path)
    with pytest.raises(ElasticError, match="in use"):
        Journal(path)
    journal.append({"event": "commit", "step": 0, "epoch": 1, "members": {"2": "x", "0": "y"}})
    journal.close()
    whole = path.read_bytes()
    for cut in range(1, 20):  # killed while writing its last line
        path.write_bytes(whole[:-cut])
        journal = Journal(path)
        assert len(journal.events) == 1
        journal.append({"event": "commit", "step": 0, "epoch": 1, "members": {"2": "x", "0": "y"}})
        journal.close()
        assert schedule(path) == {0: [0, 2]}
    path.write_bytes(b"not a journal\n" + whole)
    with pytest.raises(ElasticError, match=":1: not a line"):
        Journal(path)


def test_a_newcomer_reads_files_then_updates(store: Store) -> None:
    client = Client(f"127.0.0.1:{store.port}", 5.0)
    server = StateServer("127.0.0.1", store.port, linger_s=0.0)
    assert find_donor(client, 3, 1, "s") is None
    server.open("s", 7, {"a.pt": b"x" * 20_000_000, "empty": b""})
    server.publish(client, 3, 1, "s")
    where = find_donor(client, 3, 1, "s")
    assert where is not None
    with pytest.raises(Gone):
        StateClient(where[:-1] + "!", "s", 5.0).files()  # not the secret
    newcomer = StateClient(where, "s", 5.0)
    assert newcomer.files() == (7, {"a.pt": b"x" * 20_000_000, "empty": b""})
    assert newcomer.update(7, wait=False) is None
    threading.Timer(0.2, lambda: server.add_update(7, b"seven")).start()
    assert newcomer.update(7, wait=True) == b"seven"
    server.keep(())
    time.sleep(0.01)
    server.keep(())
    with pytest.raises(Gone):
        newcomer.update(8, wait=True)
    newcomer.close()
    client.close()
    server.close()
