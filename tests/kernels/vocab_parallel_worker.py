"""One rank of `test_vocab_parallel.py`: its shard of a vocabulary; results go to a file."""

import sys

import torch
import torch.distributed as dist
from distill.kernels import vocab_parallel_divergence

RANK, RANKS, STORE, OUT = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3], sys.argv[4]


def main() -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{STORE}", rank=RANK, world_size=RANKS)
    cases = torch.load(f"{OUT}.cases")
    results = []
    for case in cases:
        bounds = case["bounds"]
        low, high = bounds[RANK], bounds[RANK + 1]
        student = case["student"][..., low:high].clone().requires_grad_()
        teacher = case["teacher"][..., low:high]
        out = vocab_parallel_divergence(student, teacher, vocab_start=low, stats=True, **case["options"])
        (out.loss * case["upstream"]).sum().backward()
        results.append((out.loss.detach(), student.grad, dict(out.stats)))
    torch.save(results, f"{OUT}.{RANK}")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
