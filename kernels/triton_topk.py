"""Top-k of every row by threshold: one sweep, and work only where a tile holds something above the k-th best so far.

`torch.topk` radix-sorts a row in several passes over it. Here a program keeps the k best of its row in registers; a tile
whose maximum does not exceed the worst of them is done after one comparison. On random order about k·(1 + ln(V/k)) elements
are inserted per row, each costing two reductions of a tile.
"""

import torch
import triton
from torch import Tensor

from .launch import TOPK_BLOCK
from .triton_host import on
from .triton_row_kernels import topk_kernel


def topk(logits: Tensor, valid: Tensor | None, k: int) -> tuple[Tensor, Tensor]:
    """Values (fp32) and ids `[N, k]` of the k largest logits of every row of `[B, T, V]`, in no order.

    Rows that are not valid, and places that only −inf could fill, hold −inf and id −1.
    """
    count = logits.shape[0] * logits.shape[1]
    values = torch.full((count, k), -torch.inf, dtype=torch.float32, device=logits.device)
    ids = torch.full((count, k), -1, dtype=torch.int64, device=logits.device)
    mask = values if valid is None else valid.view(torch.uint8)
    with on(logits.device):
        topk_kernel[(count,)](
            logits, mask, values, ids, logits.shape[1], logits.stride(0), logits.stride(1), logits.shape[2], k,
            HAS_VALID=valid is not None, K=triton.next_power_of_2(k), BLOCK=TOPK_BLOCK, num_warps=4,
        )  # fmt: skip
    return values, ids


def agreement(student_ids: Tensor, teacher_ids: Tensor) -> Tensor:
    """Share of the k places that both sides give to the same id, `[N]`."""
    same = (student_ids.unsqueeze(2) == teacher_ids.unsqueeze(1)) & (student_ids >= 0).unsqueeze(2)
    return same.sum((1, 2)).float() / student_ids.shape[1]


def renormalised_entropy(values: Tensor) -> Tensor:
    """Entropy in nats of softmax(values) `[N, k]` → `[N]`; 0 for rows without a value."""
    logp = values.log_softmax(-1).nan_to_num(nan=-1e30, neginf=-1e30)
    return -(logp.exp() * logp).sum(-1)
