"""One rank of `test_engines.py`: a student whose loss is the fused-linear divergence, under DDP or ZeRO-3."""

import os
import sys
from typing import Any

import torch
import torch.distributed as dist
from distill.kernels import linear_divergence
from torch import Tensor, nn

MODE, RANK, STORE, OUT, GRADIENT = sys.argv[1], int(sys.argv[2]), sys.argv[3], sys.argv[4], sys.argv[5]
RANKS, N, H, V = 2, 6, 8, 50


class Student(nn.Module):
    """Owns its head, and computes the loss inside forward: engines gather and reduce what forward uses."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Linear(H, H)
        self.head = nn.Linear(H, V, bias=False)

    def forward(self, x: Tensor, teacher_hidden: Tensor, teacher_head: Tensor) -> Tensor:
        hidden = self.body(x)
        return linear_divergence(
            hidden, self.head.weight, teacher_hidden, teacher_head, "jsd", gradient=GRADIENT, budget_bytes=V * 8 * 2
        ).loss.mean()


def batch(rank: int) -> tuple[Tensor, Tensor, Tensor]:
    g = torch.Generator().manual_seed(rank)
    head = torch.randn(V, H, generator=torch.Generator().manual_seed(99))
    return torch.randn(N, H, generator=g), torch.randn(N, H, generator=g), head


def reference(model: Student) -> list[Tensor]:
    """Gradients of the mean loss over all ranks' tokens."""
    loss = torch.stack([model(*batch(rank)) for rank in range(RANKS)]).mean()
    return [g.detach() for g in torch.autograd.grad(loss, list(model.parameters()))]


def zero3(model: Student) -> list[Tensor]:
    import deepspeed
    from deepspeed.utils import safe_get_full_grad

    config: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": 1,
        "optimizer": {"type": "Adam", "params": {"lr": 1e-3, "torch_adam": True}},
        "zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0},
    }
    engine, *_ = deepspeed.initialize(model=model, model_parameters=model.parameters(), config=config)
    for _ in range(2):  # twice: the second pass follows the parameter trace of the first
        engine.backward(engine(*batch(RANK)))
        grads = [safe_get_full_grad(p).clone() for p in model.parameters()]
        engine.optimizer.zero_grad()
    return grads


def ddp(model: Student) -> list[Tensor]:
    wrapped = nn.parallel.DistributedDataParallel(model)
    wrapped(*batch(RANK)).backward()
    return [p.grad for p in model.parameters() if p.grad is not None]


def main() -> None:
    torch.set_num_threads(1)
    os.environ |= {"RANK": str(RANK), "WORLD_SIZE": str(RANKS), "LOCAL_RANK": str(RANK), "DS_ACCELERATOR": "cpu"}
    dist.init_process_group("gloo", init_method=f"file://{STORE}", rank=RANK, world_size=RANKS)
    torch.manual_seed(0)
    model = Student()
    expected = reference(model)
    actual = zero3(model) if MODE == "zero3" else ddp(model)
    torch.save((expected, actual), f"{OUT}.{RANK}")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
