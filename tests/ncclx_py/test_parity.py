"""Training on `ncclx` gives what it gives on plain gloo: DDP, FSDP, DTensor, functional collectives, DeepSpeed ZeRO 0–3.

Each world size starts its processes once (importing DeepSpeed takes seconds) and runs every workload on one backend,
then on the other. Where both add the same numbers in the same order the losses are equal; reduce-scatter on three ranks
adds in another order than gloo's ring does, hence the tolerance of one part in a hundred thousand.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterator

import pytest
import torch
import torch.distributed as dist
import torch.distributed._functional_collectives as funcol
from harness import Rank, RankPool
from torch import Tensor, nn
from torch.distributed.algorithms.ddp_comm_hooks import default_hooks, powerSGD_hook
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.optim import ZeroRedundancyOptimizer
from torch.distributed.tensor import Partial, Replicate, Shard, distribute_tensor
from torch.nn.parallel import DistributedDataParallel

import ncclx_py  # noqa: F401

pytestmark = pytest.mark.dist

STEPS = 3
PRELOAD = ("deepspeed", "torch.distributed.fsdp", "torch.distributed.tensor", "torch._dynamo.backends.debugging")
Results = dict[str, list[float]]


@pytest.fixture(scope="module", params=[2, 3])
def pool(request: pytest.FixtureRequest) -> Iterator[RankPool]:
    with RankPool(request.param, {"DS_ACCELERATOR": "cpu"}, PRELOAD) as ranks:
        yield ranks


def model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 17), nn.GELU(), nn.Linear(17, 9), nn.GELU(), nn.Linear(9, 8))


def batch(rank: int, step: int) -> Tensor:
    return torch.randn(4, 8, generator=torch.Generator().manual_seed(100 * rank + step))


def train(me: Rank, net: nn.Module, optimizer: torch.optim.Optimizer) -> list[float]:
    losses = []
    for step in range(STEPS):
        loss = net(batch(me.rank, step)).pow(2).mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def ddp(me: Rank) -> Results:
    results = {}
    for name, options in {
        "one bucket": {},
        "many buckets": {"bucket_cap_mb": 0.0001},
        "views": {"gradient_as_bucket_view": True, "static_graph": True},
    }.items():
        net = DistributedDataParallel(model(), **options)
        results[f"ddp, {name}"] = train(me, net, torch.optim.AdamW(net.parameters(), lr=1e-2))
    net = DistributedDataParallel(model())
    net.register_comm_hook(None, default_hooks.fp16_compress_hook)
    results["ddp, fp16 hook"] = train(me, net, torch.optim.SGD(net.parameters(), lr=1e-1))
    net = DistributedDataParallel(model())
    state = powerSGD_hook.PowerSGDState(
        None, matrix_approximation_rank=2, start_powerSGD_iter=2, min_compression_rate=1
    )
    net.register_comm_hook(state, powerSGD_hook.powerSGD_hook)  # waits for collectives inside callbacks of others
    results["ddp, PowerSGD hook"] = train(me, net, torch.optim.SGD(net.parameters(), lr=1e-1))
    net = DistributedDataParallel(model())
    optimizer = ZeroRedundancyOptimizer(net.parameters(), torch.optim.AdamW, lr=1e-2)
    results["ddp, sharded optimizer"] = train(me, net, optimizer)
    return results


def fsdp(me: Rank) -> Results:
    mesh = init_device_mesh("cpu", (me.size,))
    results = {}
    for name, reshard in {"fsdp2": True, "fsdp2, kept gathered": False}.items():
        net = model()
        for layer in net:
            if isinstance(layer, nn.Linear):
                fully_shard(layer, mesh=mesh, reshard_after_forward=reshard)
        fully_shard(net, mesh=mesh)
        results[name] = train(me, net, torch.optim.AdamW(net.parameters(), lr=1e-2))
        norm = nn.utils.clip_grad_norm_([torch.ones(3, requires_grad=True)], 1.0)
        results[name].append(norm.item())
    return results


def dtensors(me: Rank) -> Results:
    results = {}
    for shape, names in {(me.size,): ("x",), (1, me.size): ("a", "b")}.items():
        mesh = init_device_mesh("cpu", shape, mesh_dim_names=names)
        whole = torch.arange(6 * 7, dtype=torch.float32).reshape(6, 7)
        sharded = distribute_tensor(whole, mesh, [Shard(0)] * len(shape))
        other = sharded.redistribute(mesh, [Shard(1)] * len(shape))
        assert torch.equal(sharded.full_tensor(), whole)
        assert torch.equal(other.full_tensor(), whole)
        product = torch.matmul(sharded.redistribute(mesh, [Replicate()] * len(shape)), other.t().contiguous())
        assert torch.equal(product.full_tensor(), whole @ whole.t())
        partial = dist.tensor.DTensor.from_local(torch.ones(4) * (me.rank + 1), mesh, [Partial()] * len(shape))
        results[f"dtensor on {shape}"] = partial.full_tensor().tolist() + product.full_tensor().sum(0).tolist()
    return results


def functional(me: Rank) -> Results:
    def steps(x: Tensor) -> Tensor:
        x = funcol.all_reduce(x * 2, "sum", dist.group.WORLD)
        gathered = funcol.all_gather_tensor(x, 0, dist.group.WORLD)
        scattered = funcol.reduce_scatter_tensor(gathered, "avg", 0, dist.group.WORLD)
        return funcol.all_to_all_single(scattered.repeat(me.size), None, None, dist.group.WORLD) + 1

    x = torch.arange(4.0) + me.rank
    eager = steps(x)
    compiled = torch.compile(steps, backend="aot_eager", fullgraph=True)(x)
    assert torch.equal(eager, compiled)
    several = funcol.all_reduce_coalesced([x, x * 2], "max", dist.group.WORLD)
    more = funcol.all_gather_into_tensor_coalesced([x, x * 2], dist.group.WORLD)
    less = funcol.reduce_scatter_tensor_coalesced([x.repeat(me.size)] * 2, "sum", [0, 0], dist.group.WORLD)
    sent = funcol.broadcast(x, 1, dist.group.WORLD)
    return {"functional": [value for tensor in (eager, *several, *more, *less, sent) for value in tensor.tolist()]}


def deepspeed_zero(me: Rank) -> Results:
    import deepspeed

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # or it compiles a C++ extension, and uses that
    deepspeed.utils.logging.logger.setLevel(logging.ERROR)
    forget_groups()
    results = {}
    for stage in range(4):
        net = model()
        config = {
            "train_micro_batch_size_per_gpu": 4,
            "gradient_accumulation_steps": 1,
            "gradient_clipping": 1.0,
            "zero_optimization": {"stage": stage},
        }
        optimizer = torch.optim.AdamW(net.parameters(), lr=1e-2)
        config["zero_allow_untested_optimizer"] = True
        engine, *_ = deepspeed.initialize(model=net, optimizer=optimizer, config=config)
        losses = []
        for step in range(STEPS):
            loss = engine(batch(me.rank, step)).pow(2).mean()
            engine.backward(loss)
            engine.step()
            losses.append(loss.item())
        results[f"zero-{stage}"] = losses
        engine.destroy()
    return results


def forget_groups() -> None:
    """DeepSpeed remembers the groups of the process group that it saw first; this run has another one."""
    from deepspeed.comm import comm
    from deepspeed.utils import groups

    comm.cdb = None
    for name, value in vars(groups).items():
        if name.isupper() and isinstance(value, (dist.ProcessGroup, dict)):
            setattr(groups, name, {} if isinstance(value, dict) else None)
    comm.init_distributed(dist_backend=dist.get_backend(), verbose=False)


def everything(me: Rank, backend: str, workloads: list[str]) -> Results:
    os.environ["DS_ACCELERATOR"] = "cpu"
    me.init(backend, fresh=True)
    assert (type(dist.group.WORLD).__name__ == "NcclxProcessGroup") == (backend == "ncclx")
    results: Results = {}
    for name in workloads:
        run: Callable[[Rank], Results] = globals()[name]
        results.update(run(me))
    me.leave()
    return results


@pytest.mark.parametrize("workload", ["ddp", "fsdp", "dtensors", "functional", "deepspeed_zero"])
def test_same_losses_as_gloo(pool: RankPool, workload: str) -> None:
    ours = pool.run(everything, "ncclx", [workload], deadline=200)
    theirs = pool.run(everything, "gloo", [workload], deadline=200)
    for rank, (mine, expected) in enumerate(zip(ours, theirs)):
        assert mine.keys() == expected.keys()
        for name in expected:
            tolerance = {"rel": 0.0, "abs": 0.0} if pool.size == 2 else {"rel": 1e-5}
            assert mine[name] == pytest.approx(expected[name], **tolerance), (rank, name)
            assert len(set(mine[name])) > 1, f"{name} does not depend on the training"


def hsdp(me: Rank) -> Results:
    """A mesh of 2 × 2: replicated over hosts, sharded within, with a sub-group per row and column."""
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicate", "shard"))
    assert dist.get_process_group_ranks(mesh.get_group("shard")) == [me.rank // 2 * 2, me.rank // 2 * 2 + 1]
    net = fully_shard(model(), mesh=mesh)
    losses = train(me, net, torch.optim.AdamW(net.parameters(), lr=1e-2))
    whole = torch.arange(12.0).reshape(4, 3)
    assert torch.equal(distribute_tensor(whole, mesh, [Shard(0), Shard(1)]).full_tensor(), whole)
    return {"hsdp": losses}
