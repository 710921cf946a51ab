"""Adaptive KL (Wu et al. 2024, "Rethinking Kullback-Leibler Divergence in Knowledge Distillation", arXiv 2404.02657).

    L = Σ_t h_t·KL(p_t ‖ q_t) + (1 − h_t)·KL(q_t ‖ p_t),      h_t = g_head / (g_head + g_tail)
    g_head = Σ_{k in head} |p_k − q_k|,   g_tail = Σ_{k not in head} |p_k − q_k|

The head is the teacher's most probable ids: those whose cumulative probability, ids sorted by p, stays at or below μ, and
always the first. Forward KL, which fits the head first, weighs more where the head is further off; reverse KL where the
tail is. The weights carry no gradient.

Evidence: weights, head and μ = 0.5 exact, from the authors' code (which many repositories carry). That code divides 0 by 0
where p = q; here both weights are one half there (the loss is 0 either way). Options: ``conf/method/akl.yaml``.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from distill.config import in_range
from distill.methods.base import DivergenceSpec, Method, Source, Targets, TokenLosses
from distill.methods.parts import AnyTextSpec, row_chunks, shared_vocabulary
from distill.teachers.signals import FullLogits


@dataclass(kw_only=True)
class AklConfig(AnyTextSpec):
    name: str = "akl"
    mu: float = 0.5
    temperature: float = 1.0
    path: str = "auto"
    top_k: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        in_range("method.mu", self.mu, low=0.0, high=1.0)


class Akl(Method):
    Config = AklConfig

    def __init__(self, config: AklConfig) -> None:
        self.config = config
        self._forward = DivergenceSpec(
            kind="forward_kl", temperature=config.temperature, path=config.path, top_k=config.top_k
        )
        self._reverse = replace(self._forward, kind="reverse_kl", top_k=0)

    def source(self, sample: int, seed: int, progress: float = 0.0) -> Source:
        return Source(self.config.text)

    def token_losses(self, targets: Targets) -> TokenLosses:
        student, teacher = targets.student_logits, targets.teacher_logits
        assert teacher is not None
        head = head_share(student, teacher, self.config.mu, self.config.temperature)
        whole = replace(targets, student=FullLogits(student), teacher=FullLogits(teacher))
        forward, reverse = self._forward(whole), self._reverse(whole)
        return TokenLosses(
            head * forward.loss + (1.0 - head) * reverse.loss, {**forward.stats, "akl_forward_weight": head}
        )


@torch.no_grad()
def head_share(student_logits: Tensor, teacher_logits: Tensor, mu: float, temperature: float) -> Tensor:
    """h_t ``[T]`` fp32 in [0, 1]: the share of Σ|p − q| that lies in the teacher's head; ½ where p = q."""
    shared = shared_vocabulary(student_logits, teacher_logits)
    shares = [student_logits.new_empty(0, dtype=torch.float32)]
    for rows in row_chunks(len(student_logits), shared):
        p = (teacher_logits[rows, :shared].float() / temperature).softmax(-1)
        q = (student_logits[rows, :shared].float() / temperature).softmax(-1)
        sorted_p, order = p.sort(dim=-1, descending=True, stable=True)
        gap = (p - q).abs_()
        in_tail = sorted_p.cumsum(-1).clamp_max_(1.0) > mu  # rounding may exceed 1
        in_tail[:, 0] = False
        head, total = gap.gather(-1, order).masked_fill_(in_tail, 0.0).sum(-1), gap.sum(-1)
        shares.append(torch.where(total > 0, head / total, 0.5).clamp_max_(1.0))
    return torch.cat(shares)
