"""Every collective of torch.distributed, over every dtype and memory layout, against `oracle.py`, on 2 and 3 ranks."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from harness import Rank, RankPool, load

import ncclx_py  # noqa: F401  (registers the backend in the ranks, which load this file)

oracle = load(Path(__file__).with_name("oracle.py"), "oracle")

pytestmark = pytest.mark.dist

LAYOUTS = ["plain", "strided", "transposed"]


@pytest.fixture(scope="module", params=[2, 3])
def pool(request: pytest.FixtureRequest) -> Iterator[RankPool]:
    with RankPool(request.param) as ranks:
        yield ranks


def cases(salt: str):
    """(dtype, shape, layout) in full for float32, and every dtype at least in each layout."""
    for dtype in oracle.DTYPES:
        for shape in oracle.SHAPES if dtype == torch.float32 else [(6, 4), (0, 3), ()]:
            for layout in LAYOUTS:
                yield dtype, shape, layout, f"{salt} {dtype} {shape} {layout}"


def inputs(me: Rank, shape, dtype, salt) -> list[torch.Tensor]:
    return [oracle.data(rank, shape, dtype, salt) for rank in range(me.size)]


# Reductions


def all_reduces(me: Rank, op: str) -> int:
    me.init()
    done = 0
    for dtype, shape, layout, what in cases(op):
        everyone = inputs(me, shape, dtype, what)
        tensor, around = oracle.laid_out(everyone[me.rank], layout)
        if not oracle.supported(op, dtype):
            with pytest.raises((TypeError, ValueError), match=r"(?i)complex|round|integers|meaning"):
                dist.all_reduce(tensor, op=getattr(dist.ReduceOp, op))
            continue
        dist.all_reduce(tensor, op=getattr(dist.ReduceOp, op))
        check = oracle.close if op == "AVG" else oracle.same
        assert check(tensor, oracle.reduced(everyone, op)), (what, tensor, oracle.reduced(everyone, op))
        assert oracle.untouched(tensor, around), what
        done += 1
    return done


@pytest.mark.parametrize("op", oracle.OPS)
def test_all_reduce(pool: RankPool, op: str) -> None:
    counts = pool.run(all_reduces, op)
    assert min(counts) >= 60


def reduces(me: Rank, op: str) -> None:
    me.init()
    for dtype, shape, layout, what in cases(f"reduce {op}"):
        if not oracle.supported(op, dtype) or (dtype.is_complex and op == "AVG"):
            continue
        everyone = inputs(me, shape, dtype, what)
        expected = oracle.reduced(everyone, op)
        for root in range(me.size):
            tensor, around = oracle.laid_out(everyone[me.rank], layout)
            dist.reduce(tensor, dst=root, op=getattr(dist.ReduceOp, op))
            check = oracle.close if op == "AVG" else oracle.same
            assert check(tensor, expected if me.rank == root else everyone[me.rank]), (what, root)
            assert oracle.untouched(tensor, around), what


@pytest.mark.parametrize("op", ["SUM", "AVG", "MAX", "BXOR"])
def test_reduce_leaves_other_ranks_alone(pool: RankPool, op: str) -> None:
    pool.run(reduces, op)


def reduce_scatters(me: Rank, op: str) -> None:
    me.init()
    reduction = getattr(dist.ReduceOp, op)
    for dtype, shape, layout, what in cases(f"reduce_scatter {op}"):
        if not oracle.supported(op, dtype) or dtype.is_complex:
            continue
        check = oracle.close if op == "AVG" else oracle.same
        blocks = [
            [oracle.data(rank, shape, dtype, f"{what} {part}") for part in range(me.size)] for rank in range(me.size)
        ]
        expected = oracle.reduced([blocks[rank][me.rank] for rank in range(me.size)], op)
        sources = [oracle.laid_out(block, layout)[0] for block in blocks[me.rank]]
        output, around = oracle.laid_out(torch.zeros(shape).to(dtype), layout)
        dist.reduce_scatter(output, sources, op=reduction)
        assert check(output, expected), what
        assert oracle.untouched(output, around), what
        assert all(oracle.same(source, block) for source, block in zip(sources, blocks[me.rank])), "inputs changed"
        whole, _ = oracle.laid_out(torch.stack(blocks[me.rank]), layout)
        output, around = oracle.laid_out(torch.zeros(shape).to(dtype), layout)
        dist.reduce_scatter_tensor(output, whole, op=reduction)
        assert check(output, expected), what
        assert oracle.untouched(output, around), what
        assert oracle.same(whole, torch.stack(blocks[me.rank])), "input changed"


@pytest.mark.parametrize("op", ["SUM", "AVG", "MIN", "PRODUCT", "BOR"])
def test_reduce_scatter(pool: RankPool, op: str) -> None:
    pool.run(reduce_scatters, op)


def in_place_forms(me: Rank) -> None:
    me.init()
    n = 5
    whole = torch.zeros(me.size * n)
    whole[me.rank * n : (me.rank + 1) * n] = oracle.data(me.rank, (n,), torch.float32)
    dist.all_gather_into_tensor(whole, whole[me.rank * n : (me.rank + 1) * n])
    assert oracle.same(whole, torch.cat(inputs(me, (n,), torch.float32, "")))
    whole = oracle.data(me.rank, (me.size * n,), torch.float32)
    mine = whole[me.rank * n : (me.rank + 1) * n]
    dist.reduce_scatter_tensor(mine, whole)
    expected = oracle.reduced(inputs(me, (me.size * n,), torch.float32, ""), "SUM")
    assert oracle.same(mine, expected[me.rank * n : (me.rank + 1) * n])


def test_output_inside_input_and_input_inside_output(pool: RankPool) -> None:
    pool.run(in_place_forms)


def real_numbers(me: Rank) -> None:
    """Values that do not add up exactly: within rounding of the double-precision result."""
    me.init()
    for dtype in oracle.FLOATS:
        everyone = [
            torch.randn(1001, generator=torch.Generator().manual_seed(rank)).to(dtype) for rank in range(me.size)
        ]
        exact = torch.stack([tensor.double() for tensor in everyone]).sum(0)
        bound = torch.stack([tensor.double().abs() for tensor in everyone]).sum(0) * torch.finfo(dtype).eps * me.size
        for op, expected in [("SUM", exact), ("AVG", exact / me.size)]:
            tensor = everyone[me.rank].clone()
            dist.all_reduce(tensor, op=getattr(dist.ReduceOp, op))
            assert ((tensor.double() - expected).abs() <= bound).all(), (dtype, op)
            results = [torch.empty_like(tensor) for _ in range(me.size)]
            dist.all_gather(results, tensor)
            assert all(oracle.same(result, tensor) for result in results), "ranks disagree"


def test_rounding_stays_in_bounds_and_ranks_agree(pool: RankPool) -> None:
    pool.run(real_numbers)


def premultiplied(me: Rank) -> None:
    me.init()
    for factor in (0.5, torch.tensor([0.25])):
        source = oracle.data(me.rank, (4, 3), torch.float32)
        tensor = source.clone()
        dist.all_reduce(tensor, op=dist._make_nccl_premul_sum(factor))
        total = sum(inputs(me, (4, 3), torch.float32, ""))
        assert torch.equal(tensor, total * float(factor))
        output = torch.zeros(3)
        whole = oracle.data(me.rank, (me.size, 3), torch.float32)
        kept = whole.clone()
        dist.reduce_scatter_tensor(output, whole, op=dist._make_nccl_premul_sum(factor))
        assert torch.equal(output, sum(inputs(me, (me.size, 3), torch.float32, ""))[me.rank] * float(factor))
        assert torch.equal(whole, kept)


def test_premultiplied_sum(pool: RankPool) -> None:
    pool.run(premultiplied)


def sparse_sum(me: Rank) -> None:
    me.init()
    tensor = torch.sparse_coo_tensor(torch.tensor([[me.rank, 4]]), torch.tensor([1.0, 2.0]), (6,))
    dist.all_reduce(tensor)
    expected = torch.zeros(6)
    expected[: me.size] = 1.0
    expected[4] += 2.0 * me.size
    assert torch.equal(tensor.to_dense(), expected)


def test_sparse_tensors_add_up(pool: RankPool) -> None:
    pool.run(sparse_sum)


# Data movement


def broadcasts(me: Rank) -> None:
    me.init()
    for dtype, shape, layout, what in cases("broadcast"):
        for root in range(me.size):
            expected = oracle.data(root, shape, dtype, what)
            tensor, around = oracle.laid_out(oracle.data(me.rank, shape, dtype, what), layout)
            dist.broadcast(tensor, src=root)
            assert oracle.same(tensor, expected), (what, root)
            assert oracle.untouched(tensor, around), what


def test_broadcast(pool: RankPool) -> None:
    pool.run(broadcasts)


def gathers(me: Rank) -> None:
    me.init()
    for dtype, shape, layout, what in cases("gather"):
        everyone = inputs(me, shape, dtype, what)
        source, _ = oracle.laid_out(everyone[me.rank], layout)
        outputs = [oracle.laid_out(torch.zeros(shape).to(dtype), layout)[0] for _ in range(me.size)]
        dist.all_gather(outputs, source)
        assert all(oracle.same(output, expected) for output, expected in zip(outputs, everyone)), what
        whole, around = oracle.laid_out(torch.zeros((me.size, *shape)).to(dtype), layout)
        dist.all_gather_into_tensor(whole, source)
        assert oracle.same(whole, torch.stack(everyone)), what
        assert oracle.untouched(whole, around), what
        for root in range(me.size):
            outputs = [oracle.laid_out(torch.zeros(shape).to(dtype), layout)[0] for _ in range(me.size)]
            dist.gather(source, outputs if me.rank == root else None, dst=root)
            if me.rank == root:
                assert all(oracle.same(output, expected) for output, expected in zip(outputs, everyone)), what


def test_gathers(pool: RankPool) -> None:
    pool.run(gathers)


def scatters(me: Rank) -> None:
    me.init()
    for dtype, shape, layout, what in cases("scatter"):
        for root in range(me.size):
            parts = [oracle.data(root, shape, dtype, f"{what} {part}") for part in range(me.size)]
            output, around = oracle.laid_out(torch.zeros(shape).to(dtype), layout)
            sources = [oracle.laid_out(part, layout)[0] for part in parts] if me.rank == root else None
            dist.scatter(output, sources, src=root)
            assert oracle.same(output, parts[me.rank]), (what, root)
            assert oracle.untouched(output, around), what


def test_scatter(pool: RankPool) -> None:
    pool.run(scatters)


def all_to_alls(me: Rank) -> None:
    me.init()
    for dtype in oracle.DTYPES:
        for layout in LAYOUTS:
            for counts in ([[1] * me.size] * me.size, rows(me.size), [[0] * me.size] * me.size):
                what = f"{dtype} {layout} {counts}"
                blocks = [
                    [oracle.data(src, (counts[src][dst], 3), dtype, f"{what} {dst}") for dst in range(me.size)]
                    for src in range(me.size)
                ]
                expected = [blocks[src][me.rank] for src in range(me.size)]
                source, _ = oracle.laid_out(torch.cat(blocks[me.rank]), layout)
                received = [counts[src][me.rank] for src in range(me.size)]
                output, around = oracle.laid_out(torch.zeros((sum(received), 3)).to(dtype), layout)
                even = len({count for row in counts for count in row}) == 1
                splits = () if even else (received, counts[me.rank])
                dist.all_to_all_single(output, source, *splits)
                assert oracle.same(output, torch.cat(expected)), what
                assert oracle.untouched(output, around), what
                sources = [oracle.laid_out(block, layout)[0] for block in blocks[me.rank]]
                outputs = [oracle.laid_out(torch.zeros(block.shape).to(dtype), layout)[0] for block in expected]
                dist.all_to_all(outputs, sources)
                assert all(oracle.same(output, block) for output, block in zip(outputs, expected)), what


def rows(size: int) -> list[list[int]]:
    """Uneven counts from each rank to each, some of them zero."""
    return [[(2 * src + dst) % 3 for dst in range(size)] for src in range(size)]


def test_all_to_all(pool: RankPool) -> None:
    pool.run(all_to_alls)


def uneven_lists(me: Rank) -> None:
    """Lists whose tensors differ in size, as NCCL allows: one of them empty."""
    me.init()
    for dtype in (torch.float32, torch.int16, torch.bool):
        everyone = [oracle.data(rank, (3 * rank,), dtype, "uneven") for rank in range(me.size)]
        outputs = [torch.zeros_like(tensor) for tensor in everyone]
        dist.all_gather(outputs, everyone[me.rank])
        assert all(oracle.same(output, expected) for output, expected in zip(outputs, everyone))
        blocks = [[oracle.data(rank, (2 * part,), dtype, part) for part in range(me.size)] for rank in range(me.size)]
        output = torch.zeros_like(blocks[0][me.rank])
        dist.reduce_scatter(output, blocks[me.rank], op=dist.ReduceOp.MAX)
        assert oracle.same(output, oracle.reduced([row[me.rank] for row in blocks], "MAX"))


def test_lists_of_uneven_sizes(pool: RankPool) -> None:
    pool.run(uneven_lists)


# Coalesced


def coalesced(me: Rank) -> None:
    me.init()
    shapes = [
        ((4, 3), torch.float32),
        ((5,), torch.float32),
        ((2, 2), torch.int16),
        ((0,), torch.bfloat16),
        ((3,), torch.bool),
    ]
    group = dist.group.WORLD
    tensors = [oracle.laid_out(oracle.data(me.rank, *shape), "strided")[0] for shape in shapes]
    options = dist.AllreduceCoalescedOptions()
    options.reduceOp = dist.ReduceOp.MAX
    group.allreduce_coalesced(tensors, options).wait()
    for tensor, (shape, dtype) in zip(tensors, shapes):
        assert oracle.same(tensor, oracle.reduced(inputs(me, shape, dtype, ""), "MAX")), dtype
    sources = [oracle.data(me.rank, *shape) for shape in shapes]
    outputs = [torch.zeros((me.size, *shape)).to(dtype) for shape, dtype in shapes]
    for name in ("all_gather_single_coalesced", "allgather_into_tensor_coalesced"):
        [output.zero_() for output in outputs]
        getattr(group, name)(outputs, sources).wait()
        for output, (shape, dtype) in zip(outputs, shapes):
            assert oracle.same(output, torch.stack(inputs(me, shape, dtype, ""))), name
    wholes = [oracle.data(me.rank, (me.size, *shape), dtype) for shape, dtype in shapes]
    for name in ("reduce_scatter_single_coalesced", "reduce_scatter_tensor_coalesced"):
        outputs = [torch.zeros(shape).to(dtype) for shape, dtype in shapes]
        getattr(group, name)(outputs, wholes).wait()
        for output, (shape, dtype) in zip(outputs, shapes):
            total = oracle.reduced(inputs(me, (me.size, *shape), dtype, ""), "SUM")
            assert oracle.same(output, total[me.rank]), (name, dtype)
    lists = [[torch.zeros(shape).to(dtype) for _ in range(me.size)] for shape, dtype in shapes]
    group.allgather_coalesced(lists, sources).wait()
    for several, (shape, dtype) in zip(lists, shapes):
        assert all(oracle.same(*pair) for pair in zip(several, inputs(me, shape, dtype, "")))


def test_coalesced_forms(pool: RankPool) -> None:
    pool.run(coalesced)


def coalescing_manager(me: Rank) -> None:
    me.init()
    for asynchronous in (False, True):
        tensors = [oracle.data(me.rank, (n,), torch.float32) for n in (3, 4)]
        with dist._coalescing_manager(async_ops=asynchronous) as manager:
            for tensor in tensors:
                dist.all_reduce(tensor)
        manager.wait()
        for tensor in tensors:
            assert oracle.same(tensor, oracle.reduced(inputs(me, tuple(tensor.shape), torch.float32, ""), "SUM"))
        outputs = [torch.zeros(me.size * n) for n in (3, 4)]
        with dist._coalescing_manager(async_ops=asynchronous) as manager:
            for output, n in zip(outputs, (3, 4)):
                dist.all_gather_into_tensor(output, oracle.data(me.rank, (n,), torch.float32))
        manager.wait()
        for output, n in zip(outputs, (3, 4)):
            assert oracle.same(output, torch.cat(inputs(me, (n,), torch.float32, "")))
    other, tensor = torch.zeros(4), torch.full((4,), float(me.rank))
    with dist._coalescing_manager(device=torch.device("cpu"), async_ops=True) as manager:
        dist.isend(tensor, (me.rank + 1) % me.size)
        dist.irecv(other, (me.rank - 1) % me.size)
    manager.wait()
    assert other.tolist() == [float((me.rank - 1) % me.size)] * 4


def test_coalescing_manager(pool: RankPool) -> None:
    pool.run(coalescing_manager)


# Point to point


def ring(me: Rank) -> None:
    me.init()
    right, left = (me.rank + 1) % me.size, (me.rank - 1) % me.size
    for dtype, shape, layout, what in cases("ring"):
        source, _ = oracle.laid_out(oracle.data(me.rank, shape, dtype, what), layout)
        output, around = oracle.laid_out(torch.zeros(shape).to(dtype), layout)
        work = dist.isend(source, right, tag=3)
        dist.recv(output, left, tag=3)
        work.wait()
        assert oracle.same(output, oracle.data(left, shape, dtype, what)), what
        assert oracle.untouched(output, around), what
        output, around = oracle.laid_out(torch.zeros(shape).to(dtype), layout)
        batch = [dist.P2POp(dist.isend, source, right), dist.P2POp(dist.irecv, output, left)]
        for work in dist.batch_isend_irecv(batch):
            work.wait()
        assert oracle.same(output, oracle.data(left, shape, dtype, what)), what
        assert oracle.untouched(output, around), what


def test_send_receive_and_batches(pool: RankPool) -> None:
    pool.run(ring)


def any_source(me: Rank) -> None:
    me.init()
    if me.rank:
        dist.send(torch.full((2,), float(me.rank)), 0)
        return
    heard = set()
    for _ in range(me.size - 1):
        tensor = torch.zeros(2)
        sender = dist.recv(tensor)
        assert tensor.tolist() == [float(sender)] * 2
        heard.add(sender)
    assert heard == set(range(1, me.size))


def test_receive_from_any_source(pool: RankPool) -> None:
    pool.run(any_source)


def tags(me: Rank) -> None:
    me.init()
    if me.rank == 0:
        works = [dist.isend(torch.full((3,), float(tag)), 1, tag=tag) for tag in (1, 2)]
        [work.wait() for work in works]
    elif me.rank == 1:
        second, first = torch.zeros(3), torch.zeros(3)
        dist.recv(second, 0, tag=2)
        dist.recv(first, 0, tag=1)
        assert (first[0], second[0]) == (1.0, 2.0)


def test_messages_are_told_apart_by_tag(pool: RankPool) -> None:
    pool.run(tags)


def barriers(me: Rank) -> list[bool]:
    me.init()
    store = me.store("barrier")
    store.add("arrived", 1)
    dist.barrier()
    seen = int(store.add("arrived", 0))
    dist.group.WORLD.monitored_barrier()
    work = dist.barrier(async_op=True)
    work.wait()
    return [seen >= me.size]


def test_nobody_passes_a_barrier_alone(pool: RankPool) -> None:
    assert pool.run(barriers) == [[True]] * pool.size
