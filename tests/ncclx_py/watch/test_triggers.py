"""When dumps are written: by the rank that fails and by those that are in user code, on signals, at bad ends, and on request;
never while all goes well, and never at the cost of the program."""

from __future__ import annotations

import json
import logging
import os
import signal
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from harness import Rank, RankPool, load

from ncclx_py import CollectiveError
from ncclx_py.watch import dump, requests, watcher
from ncclx_py.watch.trace import TRACE
from ncclx_py.watch.watcher import Watcher

traces = load(Path(__file__).with_name("test_trace.py"), "test_trace")


@pytest.fixture(scope="module")
def pool() -> Iterator[RankPool]:
    with RankPool(3) as ranks:
        yield ranks


def meet(me: Rank, folder: str, seconds: float) -> None:
    os.environ["NCCLX_TRACE_DIR"] = folder
    me.init(fresh=True)
    dist.barrier()
    me.init(fresh=True, timeout=timedelta(seconds=seconds))
    dist.barrier()


def asleep_in_user_code(me: Rank, folder: str) -> str:
    meet(me, folder, 2)
    if me.rank == 1:
        time.sleep(4)
    with pytest.raises(CollectiveError) as caught:
        dist.all_reduce(torch.ones(1000))
    dist.destroy_process_group()
    return str(caught.value)


def test_when_one_rank_is_behind_all_dump_and_its_own_shows_where_it_was(pool: RankPool, tmp_path: Path) -> None:
    pool.run(asleep_in_user_code, str(tmp_path))
    dumps = [traces.read(tmp_path / f"trace-rank-{rank}.jsonl") for rank in range(3)]
    last = [records[-1] for _, records, _ in dumps]
    reasons = [header["reason"] for header, _, _ in dumps]
    assert "timeout" in reasons
    assert set(reasons) <= {"timeout", "peer"}
    assert [record["op"] for record in last] == ["all_reduce", "barrier", "all_reduce"]
    assert [record["state"] for record in last] == ["failed", "completed", "failed"]
    for record in (last[0], last[2]):
        assert record["waiting_for"] == [1]
        assert 0 <= record["plan_step"][0] < record["plan_step"][1]
    assert "asleep_in_user_code" in " ".join(dumps[1][0]["threads"]["MainThread"][-2:])
    assert "rank 1" in dumps[1][0]["aborts"]["0"]
    text = traces.analyse(tmp_path)
    assert "missing ranks: {1}" in text, text


def mismatch(me: Rank, folder: str) -> None:
    meet(me, folder, 20)
    with pytest.raises(CollectiveError):
        dist.all_reduce(torch.ones(12 if me.rank == 2 else 10))
    dist.destroy_process_group()


def test_a_mismatch_is_dumped_by_all(pool: RankPool, tmp_path: Path) -> None:
    pool.run(mismatch, str(tmp_path))
    last = [traces.read(tmp_path / f"trace-rank-{rank}.jsonl")[1][-1] for rank in range(3)]
    assert [record["input_sizes"] for record in last] == [[[10]], [[10]], [[12]]]
    assert {record["state"] for record in last} == {"failed"}
    assert "SIZE_OR_SYNTAX_MISMATCH" in traces.analyse(tmp_path)


def preparation_fails(me: Rank, folder: str) -> tuple[str, float]:
    from ncclx_py.runtime import engine

    meet(me, folder, 30)
    build = engine.build_rank
    if me.rank == 1:

        def broken(*_: Any) -> None:
            raise MemoryError("no room for a plan")

        engine.build_rank = broken  # type: ignore[assignment]
    start = time.monotonic()
    with pytest.raises(RuntimeError) as caught:
        dist.all_reduce(torch.ones(123))
    seconds = time.monotonic() - start
    engine.build_rank = build
    dist.destroy_process_group()
    return str(caught.value), seconds


def test_a_rank_that_cannot_prepare_a_plan_ends_the_call_on_all(pool: RankPool, tmp_path: Path) -> None:
    for rank, (text, seconds) in enumerate(pool.run(preparation_fails, str(tmp_path))):
        assert seconds < 10  # not the deadline of 30 s
        assert "no room for a plan" in text
        if rank != 1:
            assert "aborted by rank 1" in text


def requested(me: Rank, folder: str) -> list[str]:
    meet(me, folder, 20)
    os.environ.pop("NCCLX_TRACE_DIR")
    before = sorted(os.listdir(folder)) if os.path.isdir(folder) else []
    dist.barrier()
    if me.rank == 0:
        requests.ask(Path(folder), "the test", automatic=False)
    own = Path(folder) / f"trace-rank-{me.rank}.jsonl"
    until = time.monotonic() + 10
    while not own.exists() and time.monotonic() < until:
        time.sleep(0.05)
    dist.destroy_process_group()
    return before


def test_a_healthy_run_writes_nothing_until_it_is_asked(pool: RankPool, tmp_path: Path) -> None:
    folder = tmp_path / "trace"
    assert pool.run(requested, str(folder)) == [[], [], []]
    for rank in range(3):
        header, records, end = traces.read(folder / f"trace-rank-{rank}.jsonl")
        assert (header["reason"], header["detail"]) == ("demand", "the test")
        assert end["records"] == len(records)
    assert not [name for name in os.listdir(folder) if name.endswith(".tmp")]


SCRIPT = """
    import os, signal, sys, time, torch, torch.distributed as dist, ncclx_py
    from datetime import timedelta
    rank, how = int(sys.argv[1]), sys.argv[3]
    if how == "handled" and rank == 0:
        signal.signal(signal.SIGTERM, lambda *_: print("trainer's handler", flush=True))
    store = dist.FileStore(sys.argv[2], 2)
    dist.init_process_group("ncclx", store=store, rank=rank, world_size=2, timeout=timedelta(seconds=60))
    dist.barrier()
    stock = dist.new_group(backend="gloo") if how == "blocked" else None
    if rank == 1:
        print("ready", flush=True)
        sys.stdin.read()
        dist.destroy_process_group() if how != "exit" else None
        sys.exit(0)
    print("ready", flush=True)
    if how == "blocked":
        dist.recv(torch.ones(1), 1, group=stock)   # in C++: no Python handler of the main thread can run
    elif how == "handled":
        while sys.stdin.readline().strip() != "end":
            pass
    elif how == "raise":
        raise ValueError("on purpose")
    elif how == "fork":
        child = os.fork()
        if not child:
            time.sleep(60)
            os._exit(0)
        time.sleep(0.3)
        os.kill(child, signal.SIGTERM)
        print("child", os.waitpid(child, 0)[1], flush=True)
    if how != "exit":
        dist.destroy_process_group()
"""


class Pair:
    """Rank 0 does what the test wants; rank 1 waits until its input is closed."""

    def __init__(self, folder: Path, how: str) -> None:
        script = folder / "script.py"
        script.write_text(textwrap.dedent(SCRIPT))
        self.trace = folder / "trace"
        env = {**os.environ, "NCCLX_TRACE_DIR": str(self.trace), "OMP_NUM_THREADS": "1"}
        self.ranks = [
            subprocess.Popen(
                [sys.executable, "-P", str(script), str(rank), str(folder / "store"), how],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
                env=env,
            )
            for rank in (0, 1)
        ]
        for process in self.ranks:
            assert process.stdout is not None
            assert process.stdout.readline() == "ready\n"

    def wait_for(self, rank: int) -> dict[str, Any]:
        """The header of a rank's dump, as soon as there is one."""
        path, until = self.trace / f"trace-rank-{rank}.jsonl", time.monotonic() + 10
        while not path.exists() and time.monotonic() < until:
            time.sleep(0.02)
        header: dict[str, Any] = traces.read(path)[0]
        return header

    def __enter__(self) -> Pair:
        return self

    def __exit__(self, *_: object) -> None:
        for process in self.ranks:
            process.kill()
            process.communicate()


@pytest.mark.dist
def test_signals_dump_while_the_main_thread_is_blocked_in_c(tmp_path: Path) -> None:
    with Pair(tmp_path, "blocked") as pair:
        time.sleep(0.3)
        pair.ranks[0].send_signal(signal.SIGUSR2)
        header = pair.wait_for(0)
        assert (header["reason"], header["detail"]) == ("signal", "SIGUSR2")
        assert any("recv" in frame for frame in header["threads"]["MainThread"])
        assert pair.ranks[0].poll() is None
        (pair.trace / "trace-rank-0.jsonl").unlink()
        pair.ranks[0].send_signal(signal.SIGTERM)
        assert pair.wait_for(0)["detail"] == "SIGTERM"
        assert pair.ranks[0].wait(10) == -signal.SIGTERM


@pytest.mark.dist
def test_a_handler_of_the_trainer_still_has_the_say(tmp_path: Path) -> None:
    with Pair(tmp_path, "handled") as pair:
        process = pair.ranks[0]
        process.send_signal(signal.SIGTERM)
        assert pair.wait_for(0)["detail"] == "SIGTERM"
        assert process.stdout is not None
        assert process.stdout.readline() == "trainer's handler\n"
        process.communicate("end\n", timeout=20)
        assert process.returncode == 0


@pytest.mark.dist
@pytest.mark.parametrize(("how", "reason"), [("raise", "error"), ("exit", "exit"), ("fork", "")])
def test_bad_ends_are_dumped_and_good_ones_are_not(tmp_path: Path, how: str, reason: str) -> None:
    with Pair(tmp_path, how) as pair:
        out, err = pair.ranks[0].communicate(timeout=30)
        assert "terminate called" not in err
        if how == "fork":
            assert out == f"child {int(signal.SIGTERM)}\n"
            assert not pair.trace.exists(), os.listdir(pair.trace)
            return
        header = pair.wait_for(0)
        assert header["reason"] == reason
        assert how != "raise" or (header["detail"] == "ValueError: on purpose" and "on purpose" in err)


# The watcher alone


@pytest.fixture
def watching(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[Path], Watcher]]:
    monkeypatch.setattr(TRACE, "groups", {})  # what other tests of this process left behind is not looked at
    made: list[Watcher] = []

    def start(folder: Path) -> Watcher:
        made.append(Watcher(folder, lambda number, frame: None))
        return made[-1]

    yield start
    for one in made:
        one.close()


@pytest.mark.unit
def test_a_folder_that_cannot_be_written_costs_one_warning(
    tmp_path: Path, watching: Callable[[Path], Watcher], caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").write_text("")
    one = watching(tmp_path / "file" / "trace")
    with caplog.at_level(logging.WARNING):
        one.failed("a", "timeout", "first")
        one.failed("b", "timeout", "second")
    assert len(caplog.records) == 1
    assert "NotADirectoryError" in caplog.text
    assert "NCCLX_TRACE_DIR" in caplog.text


@pytest.mark.unit
def test_a_full_disk_leaves_the_last_whole_dump(
    tmp_path: Path, watching: Callable[[Path], Watcher], monkeypatch: pytest.MonkeyPatch
) -> None:
    one = watching(tmp_path)
    one.failed("a", "timeout", "first")
    before = (tmp_path / "trace-rank-0.jsonl").read_text()

    def full(self: Path, target: Path) -> Path:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "replace", full)
    one.failed("b", "timeout", "second")
    assert (tmp_path / "trace-rank-0.jsonl").read_text() == before
    assert not list(tmp_path.glob(".*.tmp"))


@pytest.mark.unit
def test_a_disk_that_hangs_holds_nobody_for_long(
    tmp_path: Path, watching: Callable[[Path], Watcher], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(watcher, "PATIENCE", 0.2)
    gate = threading.Event()
    monkeypatch.setattr(dump, "write", lambda folder, taken: gate.wait(20))
    one = watching(tmp_path)
    start = time.monotonic()
    one.failed("a", "timeout", "first")
    one.failed("b", "timeout", "second")
    assert time.monotonic() - start < 5
    gate.set()


@pytest.mark.unit
def test_the_first_failure_is_what_a_later_dump_still_names(
    tmp_path: Path, watching: Callable[[Path], Watcher]
) -> None:
    one = watching(tmp_path)
    one.failed("a", "timeout", "the first")
    written = (tmp_path / "trace-rank-0.jsonl").read_text()
    one.failed("a", "peer", "an echo")
    one.ended("exit", "the end")
    assert (tmp_path / "trace-rank-0.jsonl").read_text() == written
    one.want("demand", "a person")
    header = traces.read(tmp_path / "trace-rank-0.jsonl")[0]
    assert (header["reason"], header["detail"], header["also"]) == ("timeout", "the first", "demand: a person")
    assert json.loads((tmp_path / requests.NAME).read_text())["automatic"] is True


class Aborted:
    """A group that a peer has ended."""

    name = "b"

    def group(self) -> Aborted:
        return self

    def look(self) -> str:
        return "rank 1 has ended it"

    def late(self) -> str:
        return ""


@pytest.mark.unit
def test_a_group_found_aborted_does_not_take_the_place_of_the_first_failure(
    tmp_path: Path, watching: Callable[[Path], Watcher], monkeypatch: pytest.MonkeyPatch
) -> None:
    one = watching(tmp_path)
    one.failed("a", "timeout", "the first")
    why: list[tuple[str, ...]] = []
    monkeypatch.setattr(dump, "write", lambda folder, taken: None)
    monkeypatch.setattr(dump, "snapshot", lambda *given: why.append(given))
    monkeypatch.setattr(TRACE, "groups", {"b": Aborted()})
    until = time.monotonic() + 10
    while not why and time.monotonic() < until:
        time.sleep(0.02)
    assert why == [("timeout", "the first", "peer: rank 1 has ended it")]
