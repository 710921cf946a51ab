"""What the NCCL backend asks of ProcessGroupNCCL, recorded by a stand-in: batches, directions, staging. Needs no GPU."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.futures import Future

from ncclx_py.errors import Call, CollectiveError
from ncclx_py.runtime.nccl import NcclBackend

pytestmark = pytest.mark.unit


class Work:
    def __init__(self) -> None:
        self.future: Future[list[torch.Tensor]] = Future()
        self.future.set_result([])

    def wait(self, *_: object) -> bool:
        return True

    def is_completed(self) -> bool:
        return True

    def get_future(self) -> Future[list[torch.Tensor]]:
        return self.future


class Native:
    """Records calls as (process group, name); inside a coalescing block it returns no work, as NCCL's does."""

    def __init__(self, name: str, log: list[tuple[str, str]]) -> None:
        self.name, self.log, self.open = name, log, False
        self.options: list[Any] = []

    def __getattr__(self, method: str) -> Any:
        def call(*args: Any) -> Work | None:
            self.log.append((self.name, method))
            if method == "_start_coalescing":
                self.open = True
                return None
            if method == "_end_coalescing":
                self.open = False
                return Work()
            self.options.append(args[-1])
            if method == "allreduce" and args[0][0].numel() == 13:
                raise RuntimeError("unlucky")
            return None if self.open else Work()

        return call


@pytest.fixture
def log() -> list[tuple[str, str]]:
    return []


@pytest.fixture
def backend(log: list[tuple[str, str]]) -> NcclBackend:
    return NcclBackend(lambda name: Native(name, log), rank=1, size=3)


def call(op: str = "op", async_op: bool = True) -> Call:
    return Call(op, "g", 1, 3, 1, async_op=async_op)


def test_the_two_directions_have_a_communicator_each(backend: NcclBackend, log: list) -> None:
    """Of any two ranks, what goes up and what goes down the order of ranks never wait for each other."""
    tensor = torch.ones(2)
    backend.send(call(), tensor, 2, 0)
    backend.recv(call(), tensor, 0, 0)
    backend.send(call(), tensor, 0, 0)
    backend.recv(call(), tensor, 2, 0)
    up, down = "cuda", "cuda-downward"
    assert log == [(up, "send"), (up, "recv"), (down, "send"), (down, "recv")]
    assert [native.name for native in backend.natives()] == [up, down]


def test_a_batch_is_one_group_on_one_communicator(backend: NcclBackend, log: list) -> None:
    strided = torch.ones(4, 4)[:, ::2]
    backend.start_batch()
    assert backend.send(call(), torch.ones(2), 0, 0) is None
    assert backend.recv(call(), strided, 2, 0) is None
    work = backend.end_batch(call())
    assert log == [("cuda", name) for name in ("_start_coalescing", "send", "recv", "_end_coalescing")]
    assert work is not None
    assert work.wait()
    assert work.get_future().done()
    assert len(work.result()) == 2


def test_several_operations_of_one_call_are_one_group(backend: NcclBackend, log: list) -> None:
    tensors = [torch.ones(2), torch.ones(3).bfloat16()]
    backend.all_reduce_coalesced(call(), tensors, dist.ReduceOp.SUM)
    names = [name for _, name in log]
    assert names == ["_start_coalescing", "allreduce", "allreduce", "_end_coalescing"]


def test_a_refused_part_does_not_leave_the_group_open(backend: NcclBackend, log: list) -> None:
    with pytest.raises(CollectiveError, match="unlucky"):
        backend.all_reduce_coalesced(call(), [torch.ones(13), torch.ones(2).int()], dist.ReduceOp.SUM)
    assert log[-1] == ("cuda", "_end_coalescing")


def test_what_is_staged_is_asynchronous(backend: NcclBackend) -> None:
    """A synchronous call runs on the caller's stream and has no future to chain the copy back to."""
    for tensor, expected in [(torch.ones(4), False), (torch.ones(8)[::2], True)]:
        backend.all_reduce(call(async_op=False), tensor, dist.ReduceOp.SUM)
        assert backend.native.options[-1].asyncOp is expected


def test_average_is_nccls_own(backend: NcclBackend) -> None:
    work = backend.all_reduce(call(), torch.ones(4), dist.ReduceOp.AVG)
    assert backend.native.options[-1].reduceOp == dist.ReduceOp.AVG
    assert work is not None
    assert work.is_success()


def test_a_barrier_names_its_device(backend: NcclBackend) -> None:
    backend.barrier(call(), torch.device("cuda", 2))
    options = backend.native.options[-1]
    assert options.device == torch.device("cuda", 2)
    assert options.device_ids == [2]
