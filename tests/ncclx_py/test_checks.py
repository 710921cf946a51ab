"""What one rank can see to be wrong is refused before anything is sent; and the parts that need no second rank."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from harness import load
from torch import Tensor

import ncclx_py
from ncclx_py.errors import Call, CollectiveError, CollectiveTimeout, failure
from ncclx_py.runtime.basis import Membership
from ncclx_py.runtime.reduction import Recipe, gloo_recipe, nccl_recipe
from ncclx_py.runtime.registration import make_group
from ncclx_py.runtime.staging import Staging

oracle = load(Path(__file__).with_name("oracle.py"), "oracle")

pytestmark = pytest.mark.unit

FLOATS = frozenset({torch.float32, torch.float64, torch.uint8})


@pytest.fixture(scope="module")
def group() -> Iterator[dist.ProcessGroup]:
    dist.init_process_group("ncclx", store=dist.HashStore(), rank=0, world_size=1)
    yield dist.group.WORLD
    dist.destroy_process_group()


REFUSED: dict[str, tuple[Callable[[dist.ProcessGroup], object], type[Exception], str]] = {
    "two tensors": (lambda g: g.allreduce([torch.ones(1)] * 2), ValueError, "exactly one tensor, got 2"),
    "no tensor": (lambda g: g.allreduce([]), ValueError, "exactly one tensor, got 0"),
    "root too large": (lambda g: g.broadcast(torch.ones(1), root=1), ValueError, "root 1 is not a rank"),
    "negative root": (lambda g: g.reduce(torch.ones(1), root=-1), ValueError, "root -1 is not a rank"),
    "list too long": (lambda g: g.allgather([[torch.ones(1)] * 2], [torch.ones(1)]), ValueError, "one tensor per rank"),
    "dtypes differ": (lambda g: g.all_gather_single(torch.ones(1), torch.ones(1).int()), TypeError, "one dtype"),
    "sizes differ": (lambda g: g.all_gather_single(torch.ones(3), torch.ones(2)), ValueError, "3 elements"),
    "scatter sizes": (lambda g: g.reduce_scatter_single(torch.ones(3), torch.ones(2)), ValueError, "2 elements"),
    "scatter list": (lambda g: g.reduce_scatter([torch.ones(3)], [[torch.ones(2)]]), ValueError, "3 elements"),
    "gather list": (lambda g: g.gather([[torch.ones(3)]], [torch.ones(2)]), ValueError, r"outputs\[0\]"),
    "scatter inputs": (lambda g: g.scatter([torch.ones(3)], [[]]), ValueError, "one tensor per rank"),
    "splits": (lambda g: g.all_to_all_single(torch.ones(3), torch.ones(3), [2], [3]), ValueError, "add up"),
    "split count": (lambda g: g.all_to_all_single(torch.ones(3), torch.ones(3), [1, 2], [3]), ValueError, "add up"),
    "scalar": (lambda g: g.all_to_all_single(torch.ones(()), torch.ones(1), [], []), ValueError, "split evenly"),
    "devices": (lambda g: g.all_gather_single(torch.ones(1), torch.ones(1, device="meta")), ValueError, "one device"),
    "no library": (lambda g: g.allreduce(torch.ones(1, device="meta")), CollectiveError, "device type meta"),
    "sparse": (lambda g: g.broadcast(torch.eye(2).to_sparse()), TypeError, "to_dense"),
    "self send": (lambda g: g.send([torch.ones(1)], 0), ValueError, "this rank itself"),
    "peer": (lambda g: g.recv([torch.ones(1)], 7), ValueError, "source 7 is not a rank"),
    "coalesced": (lambda g: g.all_gather_single_coalesced([], [torch.ones(1)]), ValueError, "as many outputs"),
    "nothing": (lambda g: g.allreduce_coalesced([]), ValueError, "at least one tensor"),
    "average": (lambda g: g.allreduce(torch.ones(1).int(), dist.ReduceOp.AVG), TypeError, "reduce with SUM"),
    "bits": (lambda g: g.allreduce(torch.ones(1), dist.ReduceOp.BAND), TypeError, "integers and bool"),
    "complex": (lambda g: g.allreduce(torch.ones(1) * 1j, dist.ReduceOp.MAX), TypeError, "view_as_real"),
    "uint64": (lambda g: g.allreduce(torch.ones(1).to(torch.uint64)), TypeError, "not supported on CPU"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_wrong_is_named(group: dist.ProcessGroup, name: str) -> None:
    call, kind, words = REFUSED[name]
    with pytest.raises(kind, match=words):
        call(group)
    group.allreduce(torch.ones(1)).wait()  # the group still works


def test_a_check_names_call_group_and_rank(group: dist.ProcessGroup) -> None:
    with pytest.raises(ValueError, match=rf"broadcast \(call \d+ on group '{group.group_name}', rank 0 of 1\)"):
        group.broadcast(torch.ones(1), root=4)


def test_alone_every_collective_is_a_copy(group: dist.ProcessGroup) -> None:
    source, output = torch.arange(4.0), torch.zeros(4)
    for call in (
        lambda: group.all_gather_single(output, source),
        lambda: group.reduce_scatter_single(output, source, dist.ReduceScatterOptions()),
        lambda: group.all_to_all_single(output, source, [], []),
        lambda: group.alltoall([output], [source]),
        lambda: group.allgather([[output]], [source]),
        lambda: group.gather([[output]], [source]),
        lambda: group.scatter([output], [[source]]),
        lambda: group.reduce_scatter([output], [[source]]),
    ):
        output.zero_()
        call().wait()
        assert torch.equal(output, source)


def test_registration_is_idempotent() -> None:
    before = dist.Backend._plugins["NCCLX"]
    ncclx_py.register()
    assert dist.Backend._plugins["NCCLX"] is before
    assert dist.Backend.backend_capability["ncclx"] == ["cpu", "cuda"]


def test_a_name_that_is_taken_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(dist.Backend._plugins, "NCCLX", dist.Backend._BackendPlugin(print, True))
    with pytest.raises(RuntimeError, match="already taken by builtins"):
        ncclx_py.register()


def test_options_of_another_library_are_refused() -> None:
    if not dist.is_nccl_available():
        pytest.skip("this torch has no NCCL")
    from ncclx_py.runtime.nccl import nccl_connector

    with pytest.raises(TypeError, match=r"ProcessGroupNCCL\.Options, got int"):
        nccl_connector(None, Membership("g", 0, (0,), True), None, 3)


def test_creator_is_ours() -> None:
    assert dist.Backend._plugins["NCCLX"].creator_fn is make_group


# Staging


@pytest.mark.parametrize(
    "tensor",
    [
        torch.arange(6.0),
        torch.arange(6.0).reshape(2, 3).t(),
        torch.arange(12.0).reshape(3, 4)[:, ::2],
        torch.arange(6.0)[::2],
        torch.tensor(3.0),
        torch.zeros(0, 3).t(),
        torch.arange(6, dtype=torch.int16),
        torch.tensor([True, False, True])[::2],
        (torch.arange(4.0) * 1j).conj(),
        (torch.arange(4.0) * 1j).conj().imag,
        torch.ones(2, 3, 4, 4).to(memory_format=torch.channels_last) * torch.arange(4.0),
    ],
    ids=lambda tensor: f"{tensor.dtype}-{tuple(tensor.shape)}",
)
def test_elements_go_out_and_come_back_in_order(tensor: Tensor) -> None:
    stage = Staging(FLOATS)
    wire = stage.source(tensor)
    assert wire.dim() == 1
    assert wire.is_contiguous()
    assert wire.dtype in FLOATS
    back = torch.zeros_like(tensor)
    stage.target(back).copy_(wire)
    if stage.finish is not None:
        stage.finish()
    assert torch.equal(back.resolve_conj(), tensor.resolve_conj())


def test_a_plain_tensor_is_not_copied() -> None:
    tensor, stage = torch.arange(6.0).reshape(2, 3), Staging(FLOATS)
    for buffer in (stage.source(tensor), stage.target(tensor), stage.both(tensor)):
        assert buffer.data_ptr() == tensor.data_ptr()
    assert stage.scratch(tensor).data_ptr() != tensor.data_ptr()
    assert stage.finish is None


def test_a_recipe_multiplies_casts_and_divides_in_order() -> None:
    tensor = torch.tensor([2, 4], dtype=torch.int16)
    stage = Staging(frozenset({torch.int32, torch.float32}))
    buffer = stage.both(tensor, Recipe(dist.ReduceOp.SUM, torch.float32, factor=3.0, divisor=2))
    assert buffer.tolist() == [6.0, 12.0]
    assert tensor.tolist() == [2, 4]
    buffer += 2
    stage.finish()
    assert tensor.tolist() == [4, 7]


def test_recipes_of_nccl() -> None:
    ops = dist.ReduceOp
    assert nccl_recipe(ops.AVG, torch.float32, 1).op == ops.SUM  # torch warns that NCCL's is unreliable there
    assert nccl_recipe(ops.AVG, torch.float32, 2).op == ops.AVG
    assert nccl_recipe(ops.SUM, torch.int16, 2).carrier == torch.int32
    assert nccl_recipe(ops.SUM, torch.bool, 2).op == ops.MAX
    with pytest.raises(TypeError, match="BOR of CUDA tensors"):
        nccl_recipe(ops.BOR, torch.int32, 2)


def test_recipes_of_gloo() -> None:
    assert gloo_recipe(dist.ReduceOp.AVG, torch.float16, 3) == Recipe(dist.ReduceOp.SUM, divisor=3)
    assert gloo_recipe(dist._make_nccl_premul_sum(0.5), torch.float32, 3) == Recipe(dist.ReduceOp.SUM, factor=0.5)


# Errors


def call(sequence: int, group: Call | None = None) -> Call:
    made = Call("all_reduce", "g", 1, 4, sequence, "gloo")
    if group is not None:
        made.history = group.history
    return made


@pytest.mark.parametrize(
    ("reason", "kind", "advice"),
    [
        (
            "[/a/b/pair.cc:553] Connection closed by peer [10.0.0.1]:5. This is typically caused by",
            CollectiveError,
            "peer",
        ),
        ("[../x.cc:78] Timed out waiting 2000ms for recv operation to complete", CollectiveTimeout, "late"),
        ("NCCL error in: x.cpp:1, unhandled cuda error", CollectiveError, "every rank"),
        ("", CollectiveError, "every rank"),
    ],
)
def test_errors_advise(reason: str, kind: type, advice: str) -> None:
    error = failure(call(1), RuntimeError(reason))
    assert type(error) is kind
    assert advice in str(error)
    assert "all_reduce (call 1 on group 'g', rank 1 of 4, gloo) failed: " in str(error)
    assert ".cc:" not in str(error).split("x.cpp")[0]


def test_the_first_failure_is_named_in_the_next() -> None:
    first = call(7)
    failure(first, RuntimeError("boom"))
    again = failure(first, RuntimeError("boom"))
    assert "first failure" not in str(again)
    echo = failure(call(8, first), RuntimeError("Connection closed by peer"))
    assert "The first failure of this group was all_reduce (call 7" in str(echo)
    assert "boom" in str(echo)
