"""The fused-linear divergence under DDP and DeepSpeed ZeRO-3, whose shards are gathered only while forward runs."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from distill.kernels import linear_divergence
from harness import Rank, RankPool
from torch import Tensor, nn

pytestmark = pytest.mark.dist
RANKS, N, H, V = 2, 6, 8, 50


class Student(nn.Module):
    """Owns its head, and computes the loss inside forward: engines gather and reduce what forward uses."""

    def __init__(self, gradient: str) -> None:
        super().__init__()
        self.gradient = gradient
        self.body = nn.Linear(H, H)
        self.head = nn.Linear(H, V, bias=False)

    def forward(self, x: Tensor, teacher_hidden: Tensor, teacher_head: Tensor) -> Tensor:
        hidden = self.body(x)
        return linear_divergence(
            hidden,
            self.head.weight,
            teacher_hidden,
            teacher_head,
            "jsd",
            gradient=self.gradient,
            budget_bytes=V * 8 * 2,
        ).loss.mean()


def batch(rank: int) -> tuple[Tensor, Tensor, Tensor]:
    g = torch.Generator().manual_seed(rank)
    head = torch.randn(V, H, generator=torch.Generator().manual_seed(99))
    return torch.randn(N, H, generator=g), torch.randn(N, H, generator=g), head


def reference(model: Student) -> list[Tensor]:
    """Gradients of the mean loss over all ranks' tokens."""
    loss = torch.stack([model(*batch(rank)) for rank in range(RANKS)]).mean()
    return [g.detach() for g in torch.autograd.grad(loss, list(model.parameters()))]


def zero3(model: Student, rank: int) -> list[Tensor]:
    import deepspeed
    from deepspeed.utils import safe_get_full_grad

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # or it compiles a C++ extension first

    config: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": 1,
        "optimizer": {"type": "Adam", "params": {"lr": 1e-3, "torch_adam": True}},
        "zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0},
    }
    engine, *_ = deepspeed.initialize(model=model, model_parameters=model.parameters(), config=config)
    for _ in range(2):  # twice: the second pass follows the parameter trace of the first
        engine.backward(engine(*batch(rank)))
        grads = [safe_get_full_grad(p).clone() for p in model.parameters()]
        engine.optimizer.zero_grad()
    return grads


def ddp(model: Student, rank: int) -> list[Tensor]:
    wrapped = nn.parallel.DistributedDataParallel(model)
    wrapped(*batch(rank)).backward()
    return [p.grad for p in model.parameters() if p.grad is not None]


def gradients(me: Rank, engine: str, gradient: str) -> list[list[Any]]:
    """Of one process on all tokens, and of this engine; as lists, because tensors do not travel between these processes."""
    torch.set_num_threads(1)
    me.init("gloo")
    torch.manual_seed(0)
    model = Student(gradient)
    expected = reference(model)
    actual = (zero3 if engine == "zero3" else ddp)(model, me.rank)
    return [[gradient.tolist() for gradient in side] for side in (expected, actual)]


@pytest.fixture(scope="module")
def pool() -> Iterator[RankPool]:
    with RankPool(RANKS, {"DS_ACCELERATOR": "cpu"}, ("deepspeed",)) as ranks:
        yield ranks


@pytest.mark.parametrize(("engine", "gradient"), [("ddp", "recompute"), ("zero3", "recompute"), ("zero3", "forward")])
def test_gradients_are_those_of_one_process(pool: RankPool, engine: str, gradient: str) -> None:
    for expected, actual in pool.run(gradients, engine, gradient, deadline=150):
        assert len(expected) == len(actual) == 3
        for want, got in zip(expected, actual, strict=True):
            torch.testing.assert_close(torch.tensor(got), torch.tensor(want), rtol=1e-4, atol=1e-7)
