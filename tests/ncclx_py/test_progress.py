"""The thread that runs a group's collectives: order, inline runs, failures, the end."""

from __future__ import annotations

import gc
import threading
import time
import weakref
from datetime import timedelta

import pytest
import torch

from ncclx_py.errors import Call, CollectiveError
from ncclx_py.runtime.progress import Job, Progress
from ncclx_py.runtime.work import CollectiveWork

pytestmark = pytest.mark.unit


def call() -> Call:
    return Call("op", "g", 0, 2, 1)


def test_jobs_run_in_the_order_of_their_calls_whoever_runs_them() -> None:
    progress, seen = Progress("t"), []
    gate = threading.Event()
    first = progress.start(lambda job: gate.wait(5) and seen.append("first"), inline=False)
    rest = [progress.start(lambda job, n=n: seen.append(n), inline=False) for n in range(5)]
    late = threading.Thread(target=lambda: progress.start(lambda job: seen.append("inline"), inline=True).wait())
    late.start()
    time.sleep(0.05)
    assert seen == []
    gate.set()
    late.join(5)
    assert seen == ["first", 0, 1, 2, 3, 4, "inline"]
    assert all(job.is_completed() for job in (first, *rest))
    assert progress.close("over", 5)


def test_a_caller_that_waits_runs_its_job_itself() -> None:
    progress, threads = Progress("t"), []
    progress.start(lambda job: threads.append(threading.current_thread()), inline=True)
    assert threads == [threading.current_thread()]
    assert not any("ncclx-t" in thread.name for thread in threading.enumerate())


def test_a_job_started_during_an_inline_one_waits_for_it() -> None:
    progress, seen = Progress("t"), []

    def outer(job: Job) -> None:
        progress.start(lambda job: seen.append("second"), inline=False)
        time.sleep(0.05)
        seen.append("first")

    progress.start(outer, inline=True)
    assert progress.drain(5)
    assert seen == ["first", "second"]
    progress.close("over", 5)


@pytest.mark.parametrize("inline", [True, False])
def test_failures_reach_waits_and_futures(inline: bool) -> None:
    def fails(job: Job) -> None:
        job.carried_by("ring")
        raise CollectiveError("rank 3 is gone. Look there.")

    progress = Progress("t")
    job = progress.start(fails, inline)
    for _ in range(2):
        with pytest.raises(CollectiveError, match="rank 3"):
            job.wait()
    asked = call()
    job.belongs_to(asked)
    work = CollectiveWork(asked, [job], [])
    for use in (work.wait, lambda: work.get_future().wait()):
        with pytest.raises(RuntimeError, match=r"op \(call 1 on group 'g', rank 0 of 2, ring\) failed: rank 3 is gone"):
            use()
    assert not work.is_success()
    other = progress.start(lambda job: {}["missing"], inline)
    with pytest.raises(RuntimeError, match="KeyError: 'missing'"):
        other.wait()
    assert progress.start(lambda job: None, inline).wait()  # it goes on
    progress.close("over", 5)


def test_a_wait_gives_up_and_a_future_completes_later() -> None:
    progress, gate = Progress("t"), threading.Event()
    job = progress.start(lambda job: gate.wait(5), inline=False)
    with pytest.raises(RuntimeError, match=r"Timed out waiting 0\.01 s"):
        job.wait(timedelta(milliseconds=10))
    done = []
    future = job.get_future().then(lambda _: done.append(job.get_future().done()))  # asks again inside its callback
    gate.set()
    future.wait()
    assert done == [True]
    progress.close("over", 5)


@pytest.mark.parametrize("inline", [True, False])
def test_a_callback_may_start_another_job_and_wait_for_it(inline: bool) -> None:
    progress, seen, gate = Progress("t"), [], threading.Event()
    job = progress.start(lambda job: gate.wait(5) and seen.append("job"), inline=False)
    nested = job.get_future().then(lambda _: progress.start(lambda job: seen.append("nested"), inline).wait())
    later = progress.start(lambda job: seen.append("later"), inline=False)
    gate.set()
    nested.wait()
    later.wait()
    assert seen == ["job", "nested", "later"]
    assert progress.close("over", 5)


def test_nothing_is_kept_of_a_job_that_has_ended() -> None:
    progress = Progress("t")
    tensor = torch.ones(3)
    ref = weakref.ref(tensor)
    progress.start(lambda job, held=tensor: None, inline=False).wait()
    del tensor
    assert progress.drain(5)
    gc.collect()
    assert ref() is None
    progress.close("over", 5)


def test_closing_refuses_what_waits_and_ends_the_thread() -> None:
    progress, gate = Progress("closing"), threading.Event()
    progress.start(lambda job: gate.wait(5), inline=False)
    waiting = progress.start(lambda job: None, inline=False)
    threading.Timer(0.05, gate.set).start()
    assert progress.close("The group is no more.", 5)
    with pytest.raises(CollectiveError, match="no more"):
        waiting.wait()
    with pytest.raises(CollectiveError, match="no more"):
        progress.start(lambda job: None, inline=True)
    assert not any(thread.name == "ncclx-closing" for thread in threading.enumerate())
